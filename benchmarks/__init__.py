"""Measurements that the figures in the documentation come from; run with ``python -m``."""
