"""Verbs: each file is a command over the parts, run as python -m scripts.<name>."""
