"""Bits in words."""
