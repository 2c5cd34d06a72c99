"""Bits in words: fields, masks, codes."""
