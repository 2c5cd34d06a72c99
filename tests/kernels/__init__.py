"""Kernels for GPU and TPU."""
