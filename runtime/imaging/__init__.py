"""Processes pictures before and after the networks, with NumPy and Pillow."""
