"""Compositing systems: from a request to what the networks need, and back."""
