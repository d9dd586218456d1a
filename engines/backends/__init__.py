"""Backends, one folder each: what executes the graphs of a bundle. `engines.registry` finds them."""
