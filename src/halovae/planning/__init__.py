"""Plans: what a decode takes on each grid, and which grid to use."""
