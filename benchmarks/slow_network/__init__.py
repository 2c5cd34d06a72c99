"""Training over slow links, measured: see ``python -m benchmarks.slow_network --help``."""
