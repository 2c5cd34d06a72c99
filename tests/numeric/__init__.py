"""Arithmetic that does not depend on compression."""
