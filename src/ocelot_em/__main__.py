"""``python -m ocelot_em`` is the command ``ocelot``."""

from ocelot_em.cli.main import main

if __name__ == "__main__":
    main()
