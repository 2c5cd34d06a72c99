"""Tests of the project as a whole: pages, tables, options, environment."""
