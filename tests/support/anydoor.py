"""Names of AnyDoor's graphs, for tests that look at single calls."""

ID_ENCODER = "id_encoder"
CONTROL = "control"
DENOISE = "denoise"
DECODE = "decode"
