"""Contains what only the small example models need."""
