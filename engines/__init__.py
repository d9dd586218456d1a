"""Executes the graphs of a bundle. Knows nothing of diffusion, and imports nothing else of ours."""
