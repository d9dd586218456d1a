"""Rewrites exported graphs into the operators that an execution provider has fast kernels for."""
