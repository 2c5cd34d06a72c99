"""The error-feedback rules, one file per paper, each with its algorithm box."""
