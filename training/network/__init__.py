"""Defines the networks in PyTorch, and reads and writes checkpoints."""
