"""The web demo that demo_ui.py starts."""
