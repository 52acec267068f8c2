"""Train, load and export tokenizers."""
