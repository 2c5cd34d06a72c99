"""Rules with local steps."""
