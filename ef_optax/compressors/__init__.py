"""The compressors, one file per family; each is a frozen codec and a lower-case factory."""
