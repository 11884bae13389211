"""The command ``ocelot``."""
