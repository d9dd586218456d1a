"""Implements the gRPC server, `anydoor serve`. The contract is proto/anydoor/v1/compositor.proto."""
