"""A strategy with its own training loop."""
