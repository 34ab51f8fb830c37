"""Ranks: how they start, where they stand in a grid, and how data travels between them."""
