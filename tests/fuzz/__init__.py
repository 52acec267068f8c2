"""Fuzzers of what users and downloads hand to the project, one file a subject."""
