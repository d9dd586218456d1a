"""Recognises public segmentation networks by their inputs and outputs.

Sources: U2Net (u2net_test.py), DIS (Inference.py), BiRefNet (image_proc.py), MODNet (inference_onnx.py),
RMBG-1.4 (model card), segment-anything (utils/onnx.py), sam2 (utils/transforms.py), samexporter,
EfficientSAM (efficient_sam.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from engines.errors import AnyDoorError
from engines.spec import TensorSpec
from export.segmenters.network import shape_of

SALIENT, EMBED, CLICK = "salient", "embed", "click"
_LARGEST_SIDE = 8192
"""Of a picture, in pixels."""

POINTS = "points"
"""Variable dimension of the click graph."""


@dataclass(frozen=True)
class Normalisation:
    """What is done to the values of a picture, 0..1."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    by_peak: bool = False
    """Whether they are divided by the largest first."""
    stretched: bool = False
    """Whether the mask is stretched to 0..1."""

    def __str__(self) -> str:
        peak = "divided by its largest value, " if self.by_peak else ""
        mean, deviation = (" ".join(f"{of:g}" for of in values) for values in (self.mean, self.deviation))
        return f"{peak}mean {mean}, deviation {deviation}"


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

NORMALISATIONS: Mapping[str, Normalisation] = {
    "imagenet": Normalisation(*_IMAGENET),
    "u2net": Normalisation(*_IMAGENET, by_peak=True, stretched=True),
    "half": Normalisation((0.5,) * 3, (1.0,) * 3, stretched=True),
    "signed": Normalisation((0.5,) * 3, (0.5,) * 3),
}

PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class Family:
    """Networks that find the main object of a picture, and how one of them is recognised."""

    title: str
    normalisation: str
    size: int
    """Side of the picture that it takes, in pixels."""
    several_outputs: bool | None = None
    """None: either."""
    input: str | None = None
    """Name of what it takes, where sizes do not decide."""


FAMILIES = (
    Family("U2Net", "u2net", 320),
    Family("MODNet", "signed", 512, several_outputs=False),
    Family("IS-Net", "half", 1024, several_outputs=True),
    Family("BiRefNet", "imagenet", 1024, several_outputs=False, input="input_image"),
)


@dataclass(frozen=True)
class Clicker:
    """Networks that find what is clicked on: an encoder and a decoder."""

    title: str
    features: tuple[str, ...]
    """Outputs of the encoder that the decoder takes."""
    points: str
    labels: str
    masks: tuple[str, ...]
    """Outputs with logits; the first that the decoder has counts."""
    normalisation: Normalisation
    keeps_proportions: bool
    """Whether the picture is padded to a square, not stretched."""


CLICKERS = (
    Clicker(
        "SAM 2",
        ("image_embed", "high_res_feats_0", "high_res_feats_1"),
        "point_coords",
        "point_labels",
        ("low_res_masks", "masks"),
        NORMALISATIONS["imagenet"],
        keeps_proportions=False,
    ),
    Clicker(
        "SAM",
        ("image_embeddings",),
        "point_coords",
        "point_labels",
        ("low_res_masks", "masks"),
        NORMALISATIONS["imagenet"],
        keeps_proportions=True,
    ),
    Clicker(
        "EfficientSAM",
        ("image_embeddings",),
        "batched_point_coords",
        "batched_point_labels",
        ("output_masks",),
        PLAIN,
        keeps_proportions=False,
    ),
)


@dataclass(frozen=True)
class Wrap:
    """A network, recognised, and what is put around it."""

    graph: str
    """What its graph is called: `SALIENT`, `EMBED` or `CLICK`."""
    title: str
    size: int
    """Side of the picture, in pixels."""
    normalisation: Normalisation = PLAIN
    clicker: Clicker | None = None
    channels_last: bool = False
    """Whether the network takes (S, S, 3) from 0 to 255 and normalises it itself."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the graph; the features of a click graph come before them."""
        picture = TensorSpec("picture", "float32", (1, 3, self.size, self.size))
        if self.graph == CLICK:
            return TensorSpec("points", "float32", (1, POINTS, 2)), TensorSpec(
                "labels", "float32", (1, POINTS)
            )
        if self.clicker and self.clicker.keeps_proportions:
            return picture, TensorSpec("inside", "float32", (1, 1, self.size, self.size))
        return (picture,)

    @property
    def description(self) -> str:
        """What is done around the network, for people."""
        if self.graph == CLICK:
            return f"{self.title}: points in pixels of {self.size} x {self.size}"
        how = "padded" if self.clicker and self.clicker.keeps_proportions else "stretched"
        values = "values 0..255 that it normalises itself" if self.channels_last else str(self.normalisation)
        return f"{self.title}: {how} to {self.size} x {self.size}, {values}"


def read_network(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file with its weights.

    Raises:
        AnyDoorError: it is none, or its weights are missing.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # of protobuf, of the file system, and of onnx's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AnyDoorError(f"cannot read the network '{path}': {reason}") from error
    if not model.graph.node or not model.graph.output:
        raise AnyDoorError(f"cannot read the network '{path}': there is none in it")
    return model


def recognise(paths: Sequence[Path], models: Sequence[onnx.ModelProto], normalise: str | None) -> list[Wrap]:
    """Returns which networks these are, in the order of the models.

    Args:
        paths: of the files, for refusals.
        models: one that finds the main object; or an encoder and a decoder, in any order.
        normalise: of `NORMALISATIONS`, where the user says it.

    Raises:
        AnyDoorError: they are none that is known; says what is.
    """
    if len(models) == 1:
        return [_recognise_salient(paths[0], models[0], normalise)]
    if normalise:
        raise AnyDoorError(
            "--normalise is for a single network that finds the main object, not for two files"
        )
    for encoder, decoder in ((0, 1), (1, 0)):
        given, taken = inputs_of(models[encoder]), inputs_of(models[decoder])
        outputs = {output.name for output in models[encoder].graph.output}
        for clicker in CLICKERS:
            wanted = {*clicker.features, clicker.points, clicker.labels}
            if len(given) == 1 and wanted <= taken.keys() and outputs.issuperset(clicker.features):
                _check_decoder(paths[decoder], models[decoder])
                size, last = _side(paths[encoder], *given.values())
                embed = Wrap(EMBED, clicker.title, size, clicker.normalisation, clicker, last)
                click = Wrap(CLICK, clicker.title, size, clicker=clicker)
                return [embed, click] if encoder == 0 else [click, embed]
    raise AnyDoorError(
        f"'{paths[0]}' and '{paths[1]}' are not a known encoder and decoder; known are those of SAM, "
        "MobileSAM, SAM 2 and EfficientSAM"
    )


def _check_decoder(path: Path, model: onnx.ModelProto) -> None:
    outputs = [output.name for output in model.graph.output]
    if len(outputs) < 2:
        raise AnyDoorError(
            f"the decoder '{path}' gives '{outputs[0]}' alone: known decoders give masks and their scores"
        )


def _recognise_salient(path: Path, model: onnx.ModelProto, normalise: str | None) -> Wrap:
    inputs = inputs_of(model)
    if not inputs:
        raise AnyDoorError(f"'{path}' takes nothing: a network that finds objects takes a picture")
    if len(inputs) > 1:
        raise AnyDoorError(
            f"'{path}' takes {', '.join(inputs)}: a network for clicks comes in two files, "
            "its encoder and its decoder; give both"
        )
    ((name, shape),) = inputs.items()
    if len(shape) != 4 or shape[1] not in (3, None) or len({*shape[2:]} - {None}) > 1:
        raise AnyDoorError(f"'{path}' takes '{name}' {_text(shape)}: pictures are (1, 3, S, S)")
    size = _checked(path, shape[2] or shape[3])
    several = len(model.graph.output) > 1
    if normalise:
        usual = next(family.size for family in FAMILIES if family.normalisation == normalise)
        wrap = Wrap(SALIENT, "main object", size or usual, NORMALISATIONS[normalise])
    else:
        wrap = _of_a_family(path, name, shape, size, several)
    mask = model.graph.output[0]
    check_mask(path, mask.name, shape_of(mask), wrap.size)
    return wrap


def check_mask(path: Path, name: str, shape: Sequence[int | None], size: int) -> None:
    """Refuses an output that is no mask of the picture's size.

    Args:
        path: of the network, for the refusal.
        name: of the output.
        shape: its sizes, None for one that is not known; empty if none is.
        size: side of the picture.

    Raises:
        AnyDoorError: it has another number of values, or another shape.
    """
    sides, others = shape[-2:], shape[:-2]
    if any(side not in (size, None) for side in sides) or any(other not in (1, None) for other in others):
        raise AnyDoorError(
            f"'{path}' gives '{name}' {_text(shape)}: a network that finds the main object gives a mask "
            f"(1, 1, {size}, {size})"
        )


def _of_a_family(path: Path, name: str, shape: Sequence[int | None], size: int | None, several: bool) -> Wrap:
    """Returns the wrap of the family that a network is of, by the size of its picture and its outputs.

    Raises:
        AnyDoorError: there is none.
    """
    for family in FAMILIES:
        if (
            (size or 512) == family.size
            and family.several_outputs in (None, several)
            and family.input in (None, name)
        ):
            return Wrap(SALIENT, family.title, family.size, NORMALISATIONS[family.normalisation])
    raise AnyDoorError(
        f"'{path}' takes '{name}' {_text(shape)} and gives {'several outputs' if several else 'one output'}, "
        "which does not say how its pictures are normalised: say --normalise imagenet (BiRefNet, RMBG-2.0), "
        "half (IS-Net, RMBG-1.4), signed (MODNet) or u2net"
    )


def _side(path: Path, shape: tuple[int | None, ...]) -> tuple[int, bool]:
    """Returns side of the picture that an encoder takes, 1024 where it is variable, and whether channels are
    last."""
    if len(shape) == 3 and shape[2] in (3, None):
        return _checked(path, shape[0]) or 1024, True
    if len(shape) == 4 and shape[1] in (3, None) and shape[2] == shape[3]:
        return _checked(path, shape[2]) or 1024, False
    raise AnyDoorError(f"the encoder '{path}' takes {_text(shape)}: pictures are (1, 3, S, S) or (S, S, 3)")


def _checked(path: Path, side: int | None) -> int | None:
    """Returns the side of a picture, None for a variable one.

    Raises:
        AnyDoorError: no machine has memory for it.
    """
    if side is not None and not 0 < side <= _LARGEST_SIDE:
        raise AnyDoorError(f"'{path}' takes pictures of {side} px, and at most {_LARGEST_SIDE} are possible")
    return side


def inputs_of(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Returns name -> shape of what a network takes."""
    weights = {initializer.name for initializer in model.graph.initializer}
    return {value.name: shape_of(value) for value in model.graph.input if value.name not in weights}


def _text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join(str(size or "?") for size in shape) + ")"
