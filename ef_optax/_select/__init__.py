"""The k largest entries: of a leaf, of blocks, of several leaves."""
