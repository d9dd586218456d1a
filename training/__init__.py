"""AnyDoor in PyTorch: the network, its data and the training loop. Nothing of it is needed to serve."""
