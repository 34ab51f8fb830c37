"""One file per VAE family, and `load`, which builds them from checkpoints and live modules."""
