"""Experiments: variants and seeds of a command, their statistics, and records of the results."""
