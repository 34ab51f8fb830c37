"""The kernels that graph passes lower convolutions and norms to."""
