"""An NVIDIA card as every backend drives it: one arena, one stream, fixed places, captured calls."""
