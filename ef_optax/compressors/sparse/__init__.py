"""Codecs that send a few entries."""
