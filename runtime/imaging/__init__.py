"""Pictures before and after the networks: NumPy and Pillow alone."""
