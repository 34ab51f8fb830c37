"""VAE families as data: sizes, layouts of checkpoints, maps of names; and how a VAE is loaded."""
