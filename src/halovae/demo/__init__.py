"""The demo: a model trained on made clips, and a run that shows what halovae does with it."""
