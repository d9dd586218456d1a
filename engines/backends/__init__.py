"""Contains the execution backends, one folder each; `engines.registry` finds them."""
