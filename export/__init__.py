"""Export checkpoints to files of other programs: GGUF."""
