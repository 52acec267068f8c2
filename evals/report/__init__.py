"""One page and one table about a checkpoint."""
