"""Official checkpoints: what goes in comes out again, and what is not one is named."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.seeded import SMALL, TINY, seeded_tensor
from training.network.architecture import Architecture, infer_architecture, settings_to_metadata
from training.network.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from training.network.checkpoint_file import read_tensors
from training.network.modules import AnyDoor
from training.network.official_keys import SCHEDULE_KEYS, schedule_buffers

Tensors = dict[str, Tensor]

# sha256 of "key shape\n", sorted, for the 1843 weights of the published network
OFFICIAL_KEYS = "f7822413db3e8d36308e875fdab27d67608802987fff47a48c66f301e5076a22"
# sha256 of the 13 schedule buffers of a recorded checkpoint, in the order of their names
SCHEDULE_BUFFERS = "603fc905e53382f8ce55ac30d0de70ef3b3bfcaac5942df1f6769df6f9be0f49"


def weights(path: Path) -> Tensors:
    return load_file(path)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def through_the_model(path: Path) -> Tensors:
    """Reads a checkpoint, loads it into the network, and takes the weights out again."""
    checkpoint = read_checkpoint(path)
    model = AnyDoor(checkpoint.architecture).to(checkpoint.dtype)
    model.load_official_state_dict(checkpoint.tensors)
    buffers = {key: checkpoint.tensors[key] for key in SCHEDULE_KEYS}
    return buffers | model.official_state_dict()


# --- architecture -----------------------------------------------------------------------------------------


def test_full_size_network_has_the_keys_and_shapes_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        shapes = AnyDoor(Architecture()).official_shapes()
    lines = "".join(f"{key} {shape}\n" for key, shape in sorted(shapes.items()))
    assert len(shapes) == 1843
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_451_860_627 - 13 * 1000
    assert hashlib.sha256(lines.encode()).hexdigest() == OFFICIAL_KEYS


@pytest.mark.parametrize("architecture", [TINY, SMALL, Architecture()], ids=["tiny", "small", "full"])
def test_architecture_is_read_off_the_shapes(architecture: Architecture) -> None:
    with torch.device("meta"):
        shapes = AnyDoor(architecture).official_shapes()
    assert infer_architecture(shapes, architecture.unet_head_width, architecture.dino_heads) == architecture


def test_sd21_head_widths_are_the_default() -> None:
    with torch.device("meta"):
        shapes = AnyDoor(Architecture()).official_shapes()
    assert infer_architecture(shapes) == Architecture()


def test_schedule_buffers_are_those_of_the_original() -> None:
    buffers = schedule_buffers()
    content = b"".join(buffers[key].numpy().tobytes() for key in sorted(buffers))
    assert hashlib.sha256(content).hexdigest() == SCHEDULE_BUFFERS


# --- reading and writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoint_survives_the_network_bit_for_bit(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = weights(tiny_checkpoint)
    expected = {k: v if k in SCHEDULE_KEYS else v.to(dtype) for k, v in stored.items()}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_checkpoint(first, expected, TINY)
    write_checkpoint(second, through_the_model(first), TINY)
    assert_same(weights(second), expected)


def test_lightning_checkpoint_is_read_without_its_optimizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stored = weights(tiny_checkpoint)
    path = tmp_path / "epoch=1-step=8687.ckpt"
    moments = {0: {"step": 8687, "exp_avg": torch.zeros(1000), "exp_avg_sq": torch.zeros(1000)}}
    torch.save(
        {
            "epoch": 1,
            "callbacks": {Path: {"best": Path("x.ckpt")}},
            "state_dict": stored,
            "optimizer_states": [{"state": moments}],
        },
        path,
    )
    assert_same(dict(read_tensors(path).tensors), stored)


class Malicious:
    """Calls a function when pickle itself unpickles it."""

    def __init__(self, function: Callable[..., object], *arguments: str) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return self.call


def test_functions_that_a_pickle_names_are_not_called(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stored = weights(tiny_checkpoint)
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    torch.save({"state_dict": stored, "callbacks": [Malicious(shutil.copy, __file__, str(proof))]}, path)
    assert_same(dict(read_tensors(path).tensors), stored)
    assert not proof.exists()


def test_pickle_that_names_a_shell_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    torch.save({"state_dict": weights(tiny_checkpoint), "x": Malicious(os.system, f"touch {proof}")}, path)
    with pytest.raises(CheckpointError, match=r"does more than hold tensors: it names \w+\.system"):
        read_tensors(path)
    assert not proof.exists()


def test_head_widths_travel_as_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert read_checkpoint(tiny_checkpoint).architecture == TINY


def test_head_widths_are_found_in_a_configuration_beside_the_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(weights(tiny_checkpoint), path)
    with pytest.raises(CheckpointError, match="--unet-head-width"):
        read_checkpoint(path)
    (tmp_path / "tiny_config.json").write_text(
        '{"model": {"params": {"unet_config": {"params": {"num_head_channels": 8}}}},'
        ' "dino": {"num_heads": 2}}'
    )
    assert read_checkpoint(path).architecture == TINY
    assert read_checkpoint(path, unet_head_width=16).architecture.unet_head_width == 16


def test_defaults_travel_as_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert read_checkpoint(tiny_checkpoint).defaults == {}
    defaults = {"guidance_scale": 2.0, "mode": "keep_background", "guidance_interval": [0, 500]}
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path, weights(tiny_checkpoint), TINY, defaults)
    assert read_checkpoint(path).defaults == defaults
    assert read_checkpoint(path).architecture == TINY


def test_the_resolution_travels_as_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert read_checkpoint(tiny_checkpoint).resolution is None
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path, weights(tiny_checkpoint), TINY, resolution=96)
    assert read_checkpoint(path).resolution == 96
    assert read_checkpoint(path).architecture == TINY


@pytest.mark.parametrize("text", ["0", "-96", "96x64", ""])
def test_a_resolution_that_is_no_number_is_refused(tiny_checkpoint: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(weights(tiny_checkpoint), path, settings_to_metadata(TINY) | {"anydoor.resolution": text})
    with pytest.raises(CheckpointError, match=f"resolution is '{text}', which is not a number above 0"):
        read_checkpoint(path)


def test_a_checkpoint_is_readable_like_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_checkpoint(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, TINY)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("text", ["[1]", "2", "{", ""])
def test_defaults_that_are_not_an_object_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "tiny.safetensors"
    metadata = settings_to_metadata(TINY) | {"anydoor.defaults": text}
    save_file(weights(tiny_checkpoint), path, metadata)
    with pytest.raises(
        CheckpointError, match=f"anydoor.defaults is not a JSON object but '{re.escape(text)}'"
    ):
        read_checkpoint(path)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "out.safetensors", {"a": shared, "b": shared[:2]}, TINY)
    assert list(tmp_path.iterdir()) == []


# --- refusals ---------------------------------------------------------------------------------------------


def broken(tiny_checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = tmp_path / "broken.safetensors"
    write_checkpoint(path, change(weights(tiny_checkpoint)), TINY)
    return path


def without(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


def test_missing_keys_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = broken(tiny_checkpoint, tmp_path, without("model.diffusion_model.out."))
    with pytest.raises(
        CheckpointError, match=r"4 of \d+ keys are missing \('model.diffusion_model.out.0.*1 more"
    ):
        read_checkpoint(path)


def test_unexpected_keys_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = broken(
        tiny_checkpoint, tmp_path, lambda tensors: {**tensors, "control_model.lora": torch.zeros(3)}
    )
    with pytest.raises(CheckpointError, match=r"1 keys are unexpected \('control_model.lora'\)"):
        read_checkpoint(path)


def test_misshaped_tensors_are_named_with_both_shapes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    key = "control_model.input_hint_block.0.weight"
    change: Callable[[Tensors], Tensors] = lambda t: {**t, key: torch.zeros(16, 3, 3, 3)}  # noqa: E731
    path = broken(tiny_checkpoint, tmp_path, change)
    with pytest.raises(CheckpointError, match=r"is \(16, 3, 3, 3\) and should be \(16, 4, 3, 3\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (without("control_model.", "cond_stage_model."), "plain Stable Diffusion: this has no control_model"),
        (
            lambda tensors: {
                key.removeprefix("cond_stage_model.model."): tensor
                for key, tensor in tensors.items()
                if key.startswith("cond_stage_model.model.")
            },
            "a DINOv2 encoder alone",
        ),
        (lambda tensors: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)}, "diffusers' layout"),
    ],
)
def test_other_checkpoints_are_recognised(
    tiny_checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], kind: str
) -> None:
    with pytest.raises(CheckpointError, match=kind):
        read_checkpoint(broken(tiny_checkpoint, tmp_path, change))


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.ckpt"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_files_that_are_no_checkpoints(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_cut_short_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        read_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tiny_checkpoint: Path, tmp_path: Path, value: float) -> None:
    key = "model.diffusion_model.out.2.weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[key].view(-1)[5] = value
        return tensors

    checkpoint = read_checkpoint(broken(tiny_checkpoint, tmp_path, spoil))
    with pytest.raises(CheckpointError, match=f"not finite numbers.*'{key}'"):
        checkpoint.load_part("unet")
    unchecked = checkpoint.load_part("unet", check_finite=False).official_state_dict()[key]
    assert not unchecked.isfinite().all()


def test_seeded_tensors_are_those_of_the_recipe() -> None:
    tensor = seeded_tensor("control_model.zero_convs.0.0.weight", (32, 32, 1, 1), 0)
    assert hashlib.sha256(tensor.tobytes()).hexdigest()[:16] == "48a0f5ee0709cafa"
