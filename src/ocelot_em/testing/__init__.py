"""Simulated searches, for tests, demonstrations and benchmarks."""
