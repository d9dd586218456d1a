"""Defines the flags of `build_engines.py`, which is also `anydoor build`."""

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
"""Maps systems to the folders of their skeletons."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="CKPT",
        help="a checkpoint: a file of safetensors or torch.save, the folder or index of a sharded one, or a "
        "folder in diffusers' layout; a bundle of ONNX graphs, to build plans without PyTorch; or the ONNX "
        "file of a segmentation network",
    )
    add_segmenter_arguments(parser)
    parser.add_argument(
        "--skeleton",
        action="store_true",
        help="build a published network without weights, 2 MB, instead of CKPT "
        f"(default output: {' or '.join(map(str, SKELETONS.values()))})",
    )
    parser.add_argument(
        "--system",
        choices=tuple(SKELETONS),
        help="system of the skeleton (default: anydoor); that of a checkpoint is recognised",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory of the bundle; one there is replaced (default: build/engines/NAME of the checkpoint)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="backend that will run it (default: the best on this machine)",
    )
    parser.add_argument(
        "--targets",
        type=parse_targets,
        default=(),
        metavar="SM,SM",
        help="for tensorrt_rtx, card architectures: sm75 sm86 sm89 sm120 sm121 (default: sm86,sm89,sm120). "
        "For onnxruntime: cuda or any (default: cuda on a machine with a card)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="with --targets cuda: the same seed gives the same bits; group normalisation is slower",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the graphs (default: fp16 for TensorRT, else fp32)",
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="most samples in one call (default: 4)")
    parser.add_argument(
        "--resolution",
        type=parse_resolution,
        metavar="PX",
        help="side of the picture, or its width and height, like 768x512 (default: the one that the "
        "checkpoint says it was trained on, else 512)",
    )
    parser.add_argument(
        "--default",
        action="append",
        type=parse_default,
        metavar="NAME=VALUE",
        help="default of a request parameter, for which the model was trained, like guidance_scale=2; may be "
        "repeated (default: those of the system)",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="bundle from which graphs with equal weights and settings are copied",
    )
    _add_source_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="do not print a progress bar")


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
        help="pictures of an object per placement, for AnyDoor and IMPRINT (default: 1)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="use averaged weights, if the checkpoint has them",
    )
    stable_diffusion = parser.add_argument_group("checkpoints of Stable Diffusion")
    stable_diffusion.add_argument(
        "--variant", metavar="NAME", help="variant of a folder's weights, like fp16"
    )
    stable_diffusion.add_argument(
        "--prediction",
        choices=("epsilon", "v"),
        help="prediction type of the UNet, if not stored (default: epsilon); 2.x for 768 px predicts v",
    )
    stable_diffusion.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="merges.txt, or a tokenizer folder, for a single file, which has none (default: that of "
        "open_clip_torch, if installed)",
    )
    stable_diffusion.add_argument(
        "--lora",
        action="append",
        type=parse_lora,
        metavar="FILE[:SCALE]",
        help="LoRA to merge into the weights, and its scale (default: 1); may be repeated",
    )


def parse_targets(text: str) -> tuple[str, ...]:
    """Parses names that commas separate; one that is there twice counts once.

    Raises:
        argparse.ArgumentTypeError: a name is empty.
    """
    names = [name.strip() for name in text.lower().split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"'{text}' does not name a target between all commas: give it like sm86,sm89"
            if text.strip()
            else "no target is named: give it like sm86,sm89, or leave --targets out"
        )
    return tuple(dict.fromkeys(names))


def parse_default(text: str) -> tuple[str, Any]:
    """Parses `NAME=VALUE` into a parameter and its value, which is JSON, or else a string.

    Raises:
        argparse.ArgumentTypeError: the text is malformed, there is no such parameter, or its number is not
            finite.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE, like guidance_scale=2")
    if name not in _PARAMETERS:
        close = difflib.get_close_matches(name, _PARAMETERS, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(_PARAMETERS)}"
        raise argparse.ArgumentTypeError(f"there is no parameter '{name}': {hint}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return name, value
    # no parameter is a list of lists
    if not all(map(_is_finite, parsed if isinstance(parsed, list) else [parsed])):
        raise argparse.ArgumentTypeError(f"{name} is {value}: expected a finite number")
    return name, parsed


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def parse_resolution(text: str) -> int | tuple[int, int]:
    """Parses `SIDE` or `WIDTHxHEIGHT` into the side, or (height, width).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a size: give the side, or WIDTHxHEIGHT, like 768x512"
        )
    return sides[0] if len(sides) == 1 else (sides[1], sides[0])


def parse_lora(text: str) -> tuple[Path, float]:
    """Parses `FILE` or `FILE:SCALE` into file and scale. A colon without a number is part of the name.

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
        raise argparse.ArgumentTypeError(f"'{number}' is not a scale of a LoRA: give a number, like 0.8")
    return Path(file), scale
