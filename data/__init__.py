"""Data from raw text to training batches. Output goes to data/store/, which git ignores."""
