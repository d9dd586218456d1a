"""Checkpoint -> bundle. Runs on a build machine; nothing of it is needed to serve."""
