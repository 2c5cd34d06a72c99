"""Arithmetic that knows nothing of compression."""
