"""What feedback rules are made of."""
