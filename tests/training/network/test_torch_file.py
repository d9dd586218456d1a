"""Files that torch.save wrote: read as torch.load reads them, but nothing runs, and memory is bounded."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import resource
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.network.checkpoint_file import CheckpointError, read_tensors

GIB = 1 << 30


def saved(folder: Path, content: Any) -> Path:
    path = folder / "file.ckpt"
    torch.save(content, path)
    return path


def with_pickle(folder: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file that holds a pickle and no storage."""
    path = folder / "file.ckpt"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.bool,
        torch.complex64,
    ),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_those_that_torch_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (torch.arange(60) % 2).reshape(3, 4, 5).to(dtype)
    tensors = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "part": whole[1:, ::2],
        "scalar": whole[0, 0, 1],
        "empty": whole[:0],
    }
    found = read_tensors(saved(tmp_path, tensors))
    expected = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.shapes[name] == tuple(tensor.shape)
        assert found.tensors[name].dtype == dtype
        assert found.tensors[name].tolist() == tensor.tolist()


def test_writing_into_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.zeros(1000)})
    before = path.read_bytes()
    with warnings.catch_warnings(action="error"):
        read_tensors(path).tensors["x"].fill_(1)
    assert path.read_bytes() == before


class AttributeDict(dict[str, Any]):
    """As Lightning's, for hyperparameters."""


class Names(list[str]):
    pass


class Settings:
    def __init__(self) -> None:
        self.rate = 1e-4


def test_what_else_lies_in_a_checkpoint_does_no_harm(tmp_path: Path) -> None:
    content = {
        "state_dict": collections.OrderedDict(x=torch.ones(3), y=torch.nn.Parameter(torch.zeros(2))),
        "hyper_parameters": AttributeDict(rate=1, betas=(0.9, 0.99), inner=AttributeDict(a=1)),
        "names": Names(["a", "b"]),
        "settings": {Settings(): Settings()},
        "counts": collections.Counter("abba"),
        "defaults": collections.defaultdict(list, {"a": [1]}),
        "members": {1, 2, 3},
        "frozen": frozenset("ab"),
        "place": Path("x.ckpt"),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }
    tensors = read_tensors(saved(tmp_path, content)).tensors
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"x": [1, 1, 1], "y": [0, 0]}


def test_tensors_of_a_mapping_of_another_kind(tmp_path: Path) -> None:
    assert read_tensors(saved(tmp_path, AttributeDict(x=torch.ones(3)))).shapes == {"x": (3,)}


class Call:
    """Calls a function when pickle itself unpickles it."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_call_that_would_take_memory_is_not_made(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"x": torch.ones(3), "y": Call(bytearray, 8 * GIB), "z": Call(torch.zeros, 8 * GIB)}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_tensors(path).shapes == {"x": (3,)}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_pickle_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path, b"\x80\x02" + bytes(65 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "it was packed again, with compression" in refused(path)


def operation(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


MEMORY = {
    "more than 2000000 operations": operation(b"(" + b"}" * 2_100_000 + b"l"),
    "it counts what it holds wrongly": operation(b"}r\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("sentence", MEMORY)
def test_a_pickle_that_takes_memory_is_refused(tmp_path: Path, sentence: str) -> None:
    assert sentence in refused(with_pickle(tmp_path, MEMORY[sentence]))


STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def a_tensor(offset: bytes = b"K\x00", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """A pickle of {"x": a tensor of four numbers}."""
    arguments = STORAGE + offset + size + stride + b"\x89}t"
    return operation(b"}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n", arguments, b"Rs")


def with_storage(folder: Path, content: bytes, storage: bytes = bytes(16), compression: int = 0) -> Path:
    path = with_pickle(folder, content)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("archive/data/0", storage)
    return path


def test_a_tensor_by_hand(tmp_path: Path) -> None:
    assert read_tensors(with_storage(tmp_path, a_tensor())).tensors["x"].tolist() == [0, 0, 0, 0]


TENSORS: dict[str, tuple[bytes, bytes, int]] = {
    "larger than its storage": (a_tensor(size=b"J\x00\x00\x00\x7f\x85", stride=b"K\x00\x85"), bytes(16), 0),
    "out of bounds": (a_tensor(stride=b"K\x09\x85"), bytes(16), 0),
    "invalid storage offset": (a_tensor(offset=b"J\xff\xff\xff\xff"), bytes(16), 0),
    "fewer bytes than its tensors": (a_tensor(), bytes(15), 0),
    "packed again, with compression": (a_tensor(), bytes(16), zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("sentence", TENSORS)
def test_a_tensor_that_cannot_be(tmp_path: Path, sentence: str) -> None:
    assert sentence in refused(with_storage(tmp_path, *TENSORS[sentence]))


def test_numbers_of_another_kind_of_processor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", a_tensor())
        archive.writestr("archive/byteorder", "big")
    assert "the other byte order" in refused(path)


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_a_damaged_pickle_is_read_or_refused(tmp_path: Path, place: int) -> None:
    content = io.BytesIO()
    torch.save({"state_dict": {"x": torch.ones(3)}, "y": Call(bytearray, 3), "z": [1, {"a": 2.5}]}, content)
    stored = zipfile.ZipFile(content).read("archive/data.pkl")
    for change in (0x01, 0x80, 0xFF):
        damaged = bytearray(stored)
        damaged[place % len(stored)] ^= change
        path = with_storage(tmp_path, bytes(damaged))
        with contextlib.suppress(CheckpointError):
            read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02", b"s", b"R.", b"0.", b"cos\nsystem\n."])
def test_a_pickle_that_is_none(tmp_path: Path, content: bytes) -> None:
    assert "pickle" in refused(with_pickle(tmp_path, content))


ATTACKS = [
    *("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.open"),
    *(
        "torch.load",
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "functools.partial",
        "builtins.getattr",
    ),
]


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_that_a_pickle_names_is_imported_or_run(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    proof = tmp_path / "proof"
    argument = f"open({str(proof)!r}, 'w')" if function in ("eval", "exec") else str(proof)
    call = b"c%b\n%b\n" % (module.encode(), function.encode())
    text = argument.encode()
    call += b"(X%b%bX\x01\x00\x00\x00wtR" % (len(text).to_bytes(4, "little"), text)
    path = with_storage(tmp_path, a_tensor()[:-2] + b"sX\x01\x00\x00\x00y" + call + b"s.")
    if module in ("os", "posix", "subprocess"):
        assert f"it does more than hold tensors: it names {name}" in refused(path)
    else:
        assert read_tensors(path).shapes == {"x": (4,)}
    assert not proof.exists()


def test_older_forms_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"x": 1}))
    torch.save({"x": torch.ones(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "a pickle, which can run code" in refused(tmp_path / "bare.ckpt")
    assert "written by torch.save before PyTorch 1.6" in refused(tmp_path / "old.ckpt")
