"""The error-feedback rules, one file a paper, each beside its algorithm box."""
