"""Watch, restart and profile runs."""
