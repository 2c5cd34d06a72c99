"""How messages travel, where that is more than a gather or a sum."""
