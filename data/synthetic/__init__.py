"""Generated conversations and preference pairs with verified answers."""
