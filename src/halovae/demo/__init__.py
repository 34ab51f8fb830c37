"""The demo: a model trained on synthetic clips, and a run that compares ways to decode with it."""
