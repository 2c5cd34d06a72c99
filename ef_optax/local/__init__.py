"""Rules with several steps between two exchanges."""
