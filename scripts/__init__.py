"""Commands, run as python -m scripts.<name>. No other module imports them."""
