"""Training: config, optimizers, loop, checkpoints. Loaders and evaluations are passed in."""
