"""The networks in PyTorch, and the one place that reads and writes checkpoints."""
