"""The HTTP door, beside gRPC's: the same queue, batch, limits, tokens, metrics and drain."""
