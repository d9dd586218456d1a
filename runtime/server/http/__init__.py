"""Serves over HTTP, with the queue, batch, limits, tokens, metrics and shutdown of the gRPC server."""
