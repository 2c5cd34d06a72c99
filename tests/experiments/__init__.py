"""The experiments as a user meets them."""
