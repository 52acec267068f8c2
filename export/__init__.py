"""From weights to files that other programs read."""
