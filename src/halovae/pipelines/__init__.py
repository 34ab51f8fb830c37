"""diffusers pipelines: drop-in, generator, and tiny ones for tests."""
