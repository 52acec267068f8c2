"""Evaluations of a checkpoint folder. Imports models and data."""
