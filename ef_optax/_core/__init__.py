"""What a codec is, what it asks of the workers, and what it answers."""
