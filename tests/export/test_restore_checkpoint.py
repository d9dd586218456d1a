"""A bundle and its remainder give back the checkpoint, bit for bit; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import onnx
import pytest
from safetensors import safe_open

from engines.bundle import REST, Bundle
from export import restore_checkpoint
from export.restore_checkpoint import main
from training.network.checkpoint_file import CheckpointError, read_tensors

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def complete_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The smallest network's bundle with its remainder; do not write into it."""
    bundle = tmp_path_factory.mktemp("complete") / "tiny"
    shutil.copytree(tiny_bundle, bundle)
    assert main(["--split", str(tiny_checkpoint), str(bundle)]) == 0
    return bundle


@pytest.fixture
def bundle(complete_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it to write into."""
    return shutil.copytree(complete_bundle, tmp_path / "tiny")


def refused(capsys: Capture, *arguments: object) -> str:
    """The one sentence with which a command ends."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_manifest(bundle: Path, **fields: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- there and back ---------------------------------------------------------------------------------------


def test_the_example_is_restored_bit_for_bit(
    example_bundle: Path, example_checkpoint: Path, tmp_path: Path
) -> None:
    """It is in half precision: so its weights lie in the graphs, which compute in single precision."""
    bundle = shutil.copytree(example_bundle, tmp_path / "example")
    (bundle / REST).unlink(missing_ok=True)
    assert main(["--split", str(example_checkpoint), str(bundle)]) == 0
    assert (bundle / REST).stat().st_size < 1_000_000
    assert main([str(bundle)]) == 0
    assert (tmp_path / "example.safetensors").read_bytes() == example_checkpoint.read_bytes()


def test_a_checkpoint_in_single_precision_is_restored_bit_for_bit(
    complete_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new folder" / "restored.safetensors"
    assert main([str(complete_bundle), "-o", str(output)]) == 0
    assert output.read_bytes() == tiny_checkpoint.read_bytes()


def test_the_remainder_holds_what_no_graph_has(complete_bundle: Path, tiny_checkpoint: Path) -> None:
    with safe_open(tiny_checkpoint, "np") as whole, safe_open(complete_bundle / REST, "np") as rest:
        names = set(rest.keys())
        # the schedule of training; biases of a few values
        assert {"betas", "model.diffusion_model.out.2.bias"} < names < set(whole.keys())
        assert all((rest.get_tensor(name) == whole.get_tensor(name)).all() for name in names)
    assert (complete_bundle / REST).stat().st_size < tiny_checkpoint.stat().st_size / 3


def test_a_bundle_with_a_remainder_is_sound(complete_bundle: Path) -> None:
    Bundle.open(complete_bundle).verify_all()


def test_a_missing_checkpoint_names_the_command_that_restores_it(
    bundle: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    path = bundle.with_name("tiny.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint at") as error:
        read_tensors(path)
    command = str(error.value).partition("'python -m export.restore_checkpoint ")[2].rstrip("'")
    assert main([command]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == tiny_checkpoint.read_bytes()


def test_help_shows_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m export.restore_checkpoint examples/anydoor-small\n" in capsys.readouterr().out


# --- what is damaged --------------------------------------------------------------------------------------


def test_a_changed_bit_of_a_weight_is_found(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "restored.safetensors"
    output.write_text("what was there")
    flip_a_bit(bundle / "denoise.onnx.data")
    line = refused(capsys, bundle, "-o", output)
    assert "is damaged: denoise.onnx.data is not the file that was built (its hash differs)" in line
    assert output.read_text() == "what was there"


def test_a_changed_bit_that_the_manifest_agrees_with_is_found(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    data, manifest = bundle / "denoise.onnx.data", bundle / "manifest.json"
    before = hashlib.sha256(data.read_bytes()).hexdigest()
    flip_a_bit(data)
    after = hashlib.sha256(data.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))
    line = refused(capsys, bundle)
    assert "do not belong together: they do not give the checkpoint that the bundle was built from" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_changed_bit_of_the_remainder_is_found(bundle: Path, capsys: Capture) -> None:
    content = bytearray((bundle / REST).read_bytes())
    content[-1] ^= 1
    (bundle / REST).write_bytes(content)
    assert "do not belong together" in refused(capsys, bundle)


def test_the_remainder_of_another_bundle(bundle: Path, capsys: Capture) -> None:
    rest = (bundle / REST).read_bytes()
    (bundle / REST).write_bytes(rest.replace(b"denoise.onnx", b"another.onnx"))
    line = refused(capsys, bundle)
    assert line.endswith("does not belong to this bundle: there is no 'another.onnx'")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged (it is not in the format of safetensors): copy the bundle again"),
        (b"\0" * 100, "is damaged (its header is damaged): copy the bundle again"),
        (struct.pack("<Q", 2) + b"{}", "is damaged (it does not say where the tensors are)"),
        (struct.pack("<Q", 2) + b"{}0", "is damaged (it has 1 bytes of tensors instead of 0)"),
    ],
)
def test_damaged_remainders(bundle: Path, capsys: Capture, content: bytes, sentence: str) -> None:
    (bundle / REST).write_bytes(content)
    assert sentence in refused(capsys, bundle)


def change_header(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what the remainder says before its tensors."""
    content = (bundle / REST).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).replace("Infinity", "1e400").encode()
    (bundle / REST).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("anydoor.places", '{"betas": [[["a.onnx"], "w", false]]}', "it does not say where the tensors are"),
        ("anydoor.places", '{"betas": [["a.onnx", "w", 0]]}', "it does not say where the tensors are"),
        ("anydoor.places", "[" * 100_000, "it does not say where the tensors are"),
        ("anydoor.checkpoint_header", '{"__metadata__": {"a": "\ud800"}}', "its header is damaged"),
    ],
)
def test_remainders_whose_metadata_make_no_sense(
    bundle: Path, capsys: Capture, key: str, value: str, sentence: str
) -> None:
    change_header(bundle, lambda header: header["__metadata__"].update({key: value}))
    assert f"is damaged ({sentence}): copy the bundle again" in refused(capsys, bundle)


def test_a_remainder_with_an_endless_tensor(bundle: Path, capsys: Capture) -> None:
    change_header(bundle, lambda header: header["betas"].update({"data_offsets": [0, float("inf")]}))
    assert "is damaged (its header is damaged): copy the bundle again" in refused(capsys, bundle)


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (3,), (-1, 4)])
def test_an_initialiser_that_is_larger_or_smaller_than_it_says(
    bundle: Path, capsys: Capture, shape: tuple[int, ...]
) -> None:
    """In a bundle whose maker also wrote the hash of that."""
    path, manifest = bundle / "denoise.onnx", bundle / "manifest.json"
    before = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    model = onnx.load(path, load_external_data=False)
    weight = next(each for each in model.graph.initializer if each.data_location == each.EXTERNAL)
    weight.dims[:] = shape
    path.write_bytes(model.SerializeToString())
    after = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    text = manifest.read_text()
    for old, new in zip(before, after):
        text = text.replace(str(old), str(new))
    manifest.write_text(text)
    line = refused(capsys, bundle)
    assert f"is damaged: the weights of denoise.onnx cannot be read ('{weight.name}' {shape} does not" in line


# --- what cannot be restored or split ---------------------------------------------------------------------


def test_a_bundle_without_remainder(tiny_bundle: Path, capsys: Capture) -> None:
    line = refused(capsys, tiny_bundle)
    assert f"has no {REST}, which its checkpoint is restored with: whoever has the checkpoint writes" in line
    assert f"'python -m export.restore_checkpoint --split CHECKPOINT {tiny_bundle}'" in line


def test_no_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert "there is no bundle at" in refused(capsys, tmp_path / "none")


def test_plans_hold_no_weights_that_can_be_read(bundle: Path, capsys: Capture) -> None:
    change_manifest(bundle, backend="tensorrt", target="sm89")
    assert "is a bundle of tensorrt, whose weights cannot be read: give the one of ONNX" in refused(
        capsys, bundle
    )


def test_another_checkpoint(bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    other, before = tmp_path / "other.safetensors", (bundle / REST).read_bytes()
    shutil.copy(tiny_checkpoint, other)
    flip_a_bit(other)
    line = refused(capsys, "--split", other, bundle)
    assert f"'{bundle}' was not built from '{other}': the sha256 in its manifest is another one" in line
    assert (bundle / REST).read_bytes() == before


def test_a_remainder_that_would_give_other_bytes_is_not_written(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    monkeypatch.setattr(restore_checkpoint, "_digest", lambda content: b"the same for all")
    assert refused(capsys, "--split", tiny_checkpoint, bundle).endswith("other bytes came out")
    assert not (bundle / REST).exists()


_GAP = json.dumps({"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}).encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is not in the format of safetensors"),
        (b'{"weight_map": {}}', "it is not in the format of safetensors"),
        (struct.pack("<Q", 4) + b"[{}]", "its header is damaged"),
        (struct.pack("<Q", len(_GAP)) + _GAP + b"1234", "its tensors do not lie in a row"),
    ],
)
def test_files_that_are_no_safetensors(
    bundle: Path, tmp_path: Path, capsys: Capture, content: bytes, sentence: str
) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    line = refused(capsys, "--split", path, bundle)
    assert f"'{path}' cannot be split ({sentence}): only a checkpoint of one .safetensors file" in line


def test_checkpoints_that_are_not_there_or_not_one_file(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    line = refused(capsys, "--split", tmp_path, bundle)
    assert f"'{tmp_path}' is a folder: only a checkpoint of one .safetensors file can be split" in line
    line = refused(capsys, "--split", tmp_path / "none", bundle)
    assert f"cannot read '{tmp_path / 'none'}': No such file or directory" in line


def test_another_checkpoint_beside_the_bundle_is_not_replaced(
    bundle: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    path = bundle.with_name("tiny.safetensors")
    path.write_text("the next version")
    line = refused(capsys, bundle)
    assert f"'{path}' is there, and is not the checkpoint of '{bundle}': move it away, or say with -o" in line
    assert path.read_text() == "the next version"
    for arguments in ([str(bundle), "-o", str(path)], [str(bundle)]):  # then it is the one that is wanted
        assert main(arguments) == 0
        assert path.read_bytes() == tiny_checkpoint.read_bytes()


def test_ctrl_c_ends_in_a_line(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(restore_checkpoint, "read_weights", interrupted)
    assert main([str(bundle)]) == 130
    assert capsys.readouterr().err == "restore_checkpoint: interrupted; nothing was written\n"


def test_places_that_cannot_be_written(complete_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    assert f"cannot write '{tmp_path}': Is a directory" in refused(capsys, complete_bundle, "-o", tmp_path)
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "restored.safetensors"
    assert f"cannot write '{place}': " in refused(capsys, complete_bundle, "-o", place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_remainder_that_cannot_be_written(bundle: Path, tiny_checkpoint: Path, capsys: Capture) -> None:
    (bundle / REST).unlink()
    (bundle / REST).mkdir()
    assert f"cannot write '{bundle / REST}': " in refused(capsys, "--split", tiny_checkpoint, bundle)


def test_split_has_no_output(bundle: Path, tiny_checkpoint: Path, capsys: Capture) -> None:
    line = refused(capsys, "--split", tiny_checkpoint, bundle, "-o", "there.safetensors")
    assert line.endswith("--output goes without --split, which writes into the bundle")
