"""Conversations and preference pairs as token rows."""
