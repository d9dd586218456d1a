"""The flags of `build_engines.py`, which is also `anydoor build`."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from pathlib import Path
from typing import Any

from export.options import BACKENDS, PRECISIONS
from export.segmenters.command import add_segmenter_arguments
from runtime.parameters import PLACEMENT_PARAMETERS, SAMPLING_PARAMETERS

_PARAMETERS = (*SAMPLING_PARAMETERS, *PLACEMENT_PARAMETERS)

SKELETONS = {"anydoor": Path("build/card/full"), "stable_diffusion": Path("build/card/stable-diffusion")}
"""System -> where its skeleton goes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="CKPT",
        help="checkpoint: a file of safetensors or torch.save, the folder or index of one in shards, or a "
        "folder of diffusers; a bundle of ONNX graphs, to build plans without PyTorch; or a network "
        "that cuts out objects, as ONNX",
    )
    add_segmenter_arguments(parser)
    parser.add_argument(
        "--skeleton",
        action="store_true",
        help="instead of CKPT: a published network without weights, 2 MB "
        f"(default output: {SKELETONS['anydoor'].parent})",
    )
    parser.add_argument(
        "--system",
        choices=tuple(SKELETONS),
        help="of the skeleton (default: anydoor); checkpoints say theirs",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the bundle (default: build/engines/NAME of the checkpoint)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="what will execute it (default: best of this machine)",
    )
    parser.add_argument(
        "--targets",
        type=lambda text: tuple(text.lower().split(",")),
        default=(),
        metavar="SM,SM",
        help="cards that tensorrt_rtx builds for: sm75 sm86 sm89 sm120 sm121 (default: sm86,sm89,sm120)."
        " Of onnxruntime: cuda or any (default: cuda where there is a card)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="with --targets cuda: the same seed gives the same bits; group normalisation is slower",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: fp16 for TensorRT, fp32 for ONNX Runtime"
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="most samples in one call (default: 4)")
    parser.add_argument(
        "--resolution",
        type=parse_resolution,
        metavar="PX",
        help="side of the picture, or its width and height, like 768x512 (default: 512)",
    )
    parser.add_argument(
        "--default",
        action="append",
        type=parse_default,
        metavar="NAME=VALUE",
        help="value of a parameter that requests leave open, which the model was trained for, like "
        "guidance_scale=2; may be repeated (default: those of the system)",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="a bundle: graphs whose weights and settings are the same are copied from it",
    )
    _add_source_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `SourceOptions`."""
    anydoor = parser.add_argument_group("checkpoints of AnyDoor")
    anydoor.add_argument(
        "--unet-head-width",
        type=int,
        metavar="N",
        help="channels per attention head, if not stored (default: 64)",
    )
    anydoor.add_argument(
        "--dino-heads",
        type=int,
        metavar="N",
        help="heads of the ID encoder, if not stored (default: width / 64)",
    )
    parser.add_argument(
        "--references",
        type=int,
        metavar="N",
        help="pictures of an object that a placement may have, for AnyDoor and IMPRINT (default: 1)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="take averages of weights, where the checkpoint has them",
    )
    stable_diffusion = parser.add_argument_group("checkpoints of Stable Diffusion")
    stable_diffusion.add_argument("--variant", metavar="NAME", help="of the weights in a folder, like fp16")
    stable_diffusion.add_argument(
        "--prediction",
        choices=("epsilon", "v"),
        help="what the UNet predicts, if not stored (default: epsilon); 2.x for 768 px predicts v",
    )
    stable_diffusion.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="merges.txt, or the folder of a tokenizer, for a file, which has none (default: that of "
        "open_clip_torch, if installed)",
    )
    stable_diffusion.add_argument(
        "--lora",
        action="append",
        type=parse_lora,
        metavar="FILE[:SCALE]",
        help="LoRA to merge into the weights, and how much of it (default: 1); may be repeated",
    )


def parse_default(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` as a parameter and its value, which is JSON, or else a string.

    Raises:
        argparse.ArgumentTypeError: it is not, or there is no such parameter.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE, like guidance_scale=2")
    if name not in _PARAMETERS:
        close = difflib.get_close_matches(name, _PARAMETERS, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(_PARAMETERS)}"
        raise argparse.ArgumentTypeError(f"there is no parameter '{name}': {hint}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_resolution(text: str) -> int | tuple[int, int]:
    """`SIDE` or `WIDTHxHEIGHT` as the side, or (height, width).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"'{text}' is no size: give the side, or WIDTHxHEIGHT, like 768x512")
    return sides[0] if len(sides) == 1 else (sides[1], sides[0])


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE` as file and scale. A colon that no number follows is part of the name.

    Raises:
        argparse.ArgumentTypeError: the scale is not finite.
    """
    file, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        return Path(text), 1.0
    if not file:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"'{number}' is no scale of a LoRA: give a number, like 0.8")
    return Path(file), scale
