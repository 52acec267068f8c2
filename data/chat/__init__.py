"""Conversations and preference pairs, prepared as token rows for SFT and DPO."""
