"""What travels and what it costs, read or counted."""
