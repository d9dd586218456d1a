"""Implements training stages and losses of each system."""
