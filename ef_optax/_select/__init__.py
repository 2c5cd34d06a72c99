"""The k largest: of a leaf, of blocks, of several leaves."""
