"""The driver: it runs the protocols of all leaves, with one transfer per round."""
