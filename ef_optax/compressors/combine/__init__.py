"""Compressors made of others, and the identity."""
