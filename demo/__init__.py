"""The demo in a browser; demo_ui.py opens it."""
