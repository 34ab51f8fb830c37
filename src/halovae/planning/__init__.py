"""What a decode needs, and how to split it."""
