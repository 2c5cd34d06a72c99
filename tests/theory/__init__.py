"""Tests of the constants, step sizes and bounds of theory."""
