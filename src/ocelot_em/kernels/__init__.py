"""Kernels: the arithmetic of a merge, one module per kind of processor."""
