"""From raw text to batches. Imports nothing of ours. What it writes goes to data/store/, which git ignores."""
