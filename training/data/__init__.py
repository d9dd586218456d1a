"""Provides the training data: rendered and real pairs of views of one object."""
