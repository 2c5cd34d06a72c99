"""What a change of structure must leave as it is, written to a file and compared."""
