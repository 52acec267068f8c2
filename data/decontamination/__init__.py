"""Find benchmark items in training text."""
