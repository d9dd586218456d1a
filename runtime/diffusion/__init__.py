"""Implements noise schedules, samplers and presets in NumPy."""
