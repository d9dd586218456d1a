"""Formats of picture files: which are read, and what to call the others."""

from __future__ import annotations

from PIL import features

HAS_AVIF = "avif" in features.modules and bool(features.check("avif"))
"""Pillow's wheels have it from 11.3 on."""

READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF") + ("AVIF",) * HAS_AVIF

_RAW = "a camera's raw picture"
_SIGNATURES = {
    "PNG": [(0, b"\x89PNG")],
    "JPEG": [(0, b"\xff\xd8\xff")],
    "WebP": [(8, b"WEBP")],
    "BMP": [(0, b"BM")],
    "TIFF": [(0, b"II*\0"), (0, b"MM\0*")],
    "GIF": [(0, b"GIF8")],
    "AVIF": [(4, b"ftypavif"), (4, b"ftypavis")],
    "JPEG 2000": [(4, b"jP  "), (0, b"\xff\x4f\xff\x51")],
    "JPEG XL": [(4, b"JXL "), (0, b"\xff\x0a")],
    "JPEG XR": [(0, b"II\xbc\x01")],
    "HEIC": [(4, b"ftyphe"), (4, b"ftypmif1"), (4, b"ftypmsf1")],
    _RAW: [(4, b"ftypcrx"), (0, b"FUJIFILMCCD-RAW"), (0, b"IIRO"), (0, b"IIU\0")],
    "a film": [(4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI ")],
    "a Photoshop document (PSD)": [(0, b"8BPS")],
    "a GIMP document (XCF)": [(0, b"gimp xcf")],
    "PDF": [(0, b"%PDF")],
    "PostScript": [(0, b"%!PS"), (0, b"\xc5\xd0\xd3\xc6")],
    "an icon (ICO)": [(0, b"\0\0\x01\0"), (0, b"icns")],
    "DDS": [(0, b"DDS ")],
    "OpenEXR": [(0, b"v/1\x01")],
    "Radiance HDR": [(0, b"#?RADIANCE"), (0, b"#?RGBE")],
    "QOI": [(0, b"qoif")],
    "BPG": [(0, b"BPG\xfb")],
    "FITS": [(0, b"SIMPLE  =")],
    "DICOM": [(128, b"DICM")],
    "a portable map (PBM, PGM, PPM)": [(0, b"P%c" % kind) for kind in b"1234567Ff"],
    "a NumPy array (.npy)": [(0, b"\x93NUMPY")],
    "a gzip archive": [(0, b"\x1f\x8b")],
    "a zip archive": [(0, b"PK\x03\x04")],
    "a pointer of Git LFS": [(0, b"version https://git-lfs")],
}
"""Name -> where such a file has which bytes."""
_MARKUP = {b"<svg": "SVG", b"<!doctype html": "a web page (HTML)", b"<html": "a web page (HTML)"}


def name_of_format(content: bytes) -> str:
    """Returns the format that the first bytes of a file indicate, like "HEIC"; empty if unknown."""
    for name, signatures in _SIGNATURES.items():
        if any(content.startswith(signature, offset) for offset, signature in signatures):
            return name
    head = content[:1000].lower()
    return next((name for tag, name in _MARKUP.items() if tag in head), "")


def refusal_of_format(content: bytes) -> str:
    """Explains why bytes that no reader recognises are refused, as the end of a sentence."""
    name, readable = name_of_format(content), ", ".join(READABLE_FORMATS)
    if not content:
        return "is empty"
    if name == "TIFF":
        return (
            "is damaged, or a TIFF of a kind that is not read, like colours in floating point: save it with "
            "8 or 16 bits for each colour"
        )
    if name.upper() in READABLE_FORMATS:
        return f"is damaged or cut short: it begins as {name}"
    if name:
        return f"is {name}, which is not read: convert it to PNG or JPEG"
    return f"is not a picture ({readable} are read)"
