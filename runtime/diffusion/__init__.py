"""Noise schedules, samplers and presets: NumPy alone."""
