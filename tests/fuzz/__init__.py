"""Fuzzers of user input and downloads, one file per subject."""
