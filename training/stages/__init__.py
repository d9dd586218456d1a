"""Defines the stages of a training run: one module per system, and what they share."""
