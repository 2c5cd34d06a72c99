"""The driver: it runs the protocols of all leaves, one transfer a round."""
