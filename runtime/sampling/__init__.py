"""Takes latents from noise to picture on an engine."""
