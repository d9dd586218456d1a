"""Builds bundles from checkpoints, on a build machine. Serving does not need it."""
