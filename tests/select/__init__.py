"""The k largest."""
