"""What travels and what it costs."""
