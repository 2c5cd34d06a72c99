"""The compressors, one file a family; each is a frozen codec and a lower-case factory."""
