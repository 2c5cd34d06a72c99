"""Compressors that are made of other compressors, and the identity."""
