"""Evaluates checkpoints: harness, engines, benchmarks (eval_*.py) and the report."""
