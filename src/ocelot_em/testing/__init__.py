"""Simulated searches, and tests that stores, executors and devices of others can subclass."""
