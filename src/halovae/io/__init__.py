"""Latents and media, to and from files."""
