"""Bits in words: fields, masks and codes."""
