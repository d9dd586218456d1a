"""Recognises files that are mistaken for checkpoints, by their first bytes."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = {"safetensors": "safetensors", "torch": "torch"}
"""Kinds that hold tensors."""
INDEX = "index"
"""The kind of a JSON object, such as the index of a checkpoint in shards."""

_HEAD_BYTES = 512
_LARGEST_HEADER = 100_000_000
"""Bytes; the library safetensors reads none that is larger."""

_STARTS = (
    (b"PK\x03\x04", CHECKPOINT["torch"]),
    (b"version https://git-lfs", "it is a pointer of Git LFS, without the weights: run 'git lfs pull'"),
    (b"<", "it is a web page, as a failed download leaves one: download it again"),
    (b"GGUF", "it is quantised, in the format GGUF: get the weights as .safetensors"),
    (b"\x89HDF", "it is HDF5, of Keras: get the weights as .safetensors"),
    (b"\x93NUMPY", "it is an array of NumPy"),
    (b"\x1f\x8b", "it is packed with gzip: unpack it"),
    (b"7z\xbc\xaf", "it is packed with 7-Zip: unpack it"),
    (b"Rar!", "it is packed with RAR: unpack it"),
    (b"(\xb5/\xfd", "it is packed with Zstandard: unpack it"),
    (
        # protocol, and the number that every such file begins with
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "it was written by torch.save before PyTorch 1.6: read it with torch.load(NAME, weights_only=True), "
        "and save that with torch.save",
    ),
    (b"\x80", "it is a pickle, which can run code, and not in the format of torch.save"),
    (b"\0" * _HEAD_BYTES, "it begins with zeros, as an unfinished download does: download it again"),
)


def kind_of(path: Path) -> str:
    """Returns one of `CHECKPOINT`, `INDEX`, or a sentence that says what the file is and what to do.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "it is empty"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _LARGEST_HEADER:
        return CHECKPOINT["safetensors"]
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"{":
        return INDEX
    if head[257:262] == b"ustar":
        return "it is packed with tar: unpack it"
    for start, kind in _STARTS:
        if head.startswith(start) or text.startswith(start):
            return kind
    return "it is neither .safetensors nor a file of torch.save"
