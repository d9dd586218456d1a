"""Executes the graphs of a bundle: by role, shape and size, whatever they compute."""
