"""Pipelines of diffusers: a drop-in for their VAE, a generator, previews, and tiny pipelines for tests."""
