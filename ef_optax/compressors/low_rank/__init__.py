"""Codecs that send low-rank factors."""
