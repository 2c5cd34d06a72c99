"""The page about some runs."""
