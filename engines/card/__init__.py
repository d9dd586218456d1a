"""Drives an NVIDIA card for all backends: one arena, one stream, fixed addresses, captured calls."""
