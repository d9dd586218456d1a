"""Implements networks, data and the training loop in PyTorch. Serving does not need it."""
