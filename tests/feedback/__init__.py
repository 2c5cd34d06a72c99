"""The feedback rules against the NumPy references."""
