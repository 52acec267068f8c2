"""Generated questions with verified answers."""
