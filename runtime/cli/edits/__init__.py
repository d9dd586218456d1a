"""Implements the commands that edit a scene, one file per command."""
