"""Benchmarks; run one as ``python -m benchmarks.codec``. Never part of the tests."""
