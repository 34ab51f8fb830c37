"""What graph passes lower convolutions and norms to."""
