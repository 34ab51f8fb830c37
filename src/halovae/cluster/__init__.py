"""Datasets of clips and pictures, encoded and decoded on Ray Data: exactly once, on any number of hosts."""
