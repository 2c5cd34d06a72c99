"""Codecs: what they are, what they ask of the workers, and what they return."""
