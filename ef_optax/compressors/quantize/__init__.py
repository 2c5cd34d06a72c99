"""Codecs that send every entry with fewer bits."""
