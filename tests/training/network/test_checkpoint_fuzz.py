"""Checkpoints that nobody would write: each is opened or refused in one sentence, within bounded memory.

500 of them in the usual test run; the nightly command asks for more:

    ANYDOOR_FUZZ_CHECKPOINTS=20000 python -m pytest tests/training/network/test_checkpoint_fuzz.py

One half are files with flipped, cut or doubled bytes, the other half are made from the grammar of their
format: headers of safetensors, pickles and archives of torch.save.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from training.network.checkpoint_file import CheckpointError, read_tensors

FILES = int(os.environ.get("ANYDOOR_FUZZ_CHECKPOINTS", "500"))
FUZZ = settings(
    max_examples=FILES // 4,
    database=None,
    derandomize="ANYDOOR_FUZZ_CHECKPOINTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
MOST_MEMORY = 1 << 30
"""Bytes that opening small files may take: how much the largest resident set grows over all of them."""

TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.zeros(2, dtype=torch.float8_e4m3fn),
}


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


SEEDS = {
    "safetensors": save(TENSORS, {"format": "pt"}),
    "torch": torch_file(OrderedDict(TENSORS)),
    "lightning": torch_file({"state_dict": TENSORS, "callbacks": {Path: {Path("a"), 1.5}}, "epoch": 3}),
    "index": json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors"}}).encode(),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where every file is written, one after the other; the memory of opening them is bounded."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path_factory.mktemp("fuzz") / "a.ckpt"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def open_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with suppress(CheckpointError):
        file = read_tensors(path)
        for key, shape in file.shapes.items():
            assert tuple(file.tensors[key].shape) == shape


@FUZZ
@given(st.sampled_from(sorted(SEEDS)), st.randoms(use_true_random=False))
def test_damaged_files(path: Path, kind: str, chance: random.Random) -> None:
    content = bytearray(SEEDS[kind])
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    cut = chance.randrange(len(content))
    changed = (content, content[:cut], content[cut:], content[:cut] + content)
    open_or_refuse(path, bytes(chance.choice(changed)))


@FUZZ
@given(st.randoms(use_true_random=False))
def test_damaged_pickles_in_whole_archives(path: Path, chance: random.Random) -> None:
    content = bytearray(SEEDS["lightning"])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    start = content.index(b"\x80\x02", info.header_offset)
    for _ in range(chance.randint(1, 4)):
        content[start + chance.randrange(info.file_size)] = chance.randrange(256)
    open_or_refuse(path, bytes(content))


NUMBERS = st.one_of(st.sampled_from([-1, 0, 1, 24, 2**31, 2**63, 2**64]), st.integers(-9, 99), st.floats())
DTYPES = st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I4", "C64", "BOOL", "U64", "x", None])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.just([0, 24])),
    },
)
HEADERS = st.dictionaries(
    st.one_of(st.sampled_from(["__metadata__", "a", "module.a", "weight_map"]), st.text(max_size=3)),
    st.one_of(ENTRIES, NUMBERS, st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2)),
    max_size=4,
)


@FUZZ
@given(HEADERS, st.integers(-2, 2), st.binary(max_size=64), st.booleans())
def test_headers_of_safetensors(
    path: Path, header: dict[str, object], off: int, data: bytes, nested: bool
) -> None:
    text = b'{"a":' * 3000 if nested and off == 0 else json.dumps(header).encode()
    open_or_refuse(path, struct.pack("<Q", max(len(text) + off, 0)) + text + data)


OPCODES = st.one_of(
    st.sampled_from(
        [
            *(b"(", b")", b"]", b"}", b"\x8f", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"N", b"\x88"),
            *(b"R", b"b", b"Q", b"o", b"\x81", b"\x92", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"\x90"),
            *(
                b"q\0",
                b"h\0",
                b"\x94",
                b"r\xff\xff\xff\x7f",
                b"j\xff\xff\xff\x7f",
                b"K\x05",
                b"J\xff\xff\xff\xff",
            ),
            *(b"X\x01\0\0\0a", b"X\xff\xff\xff\x7f", b"\x96" + b"\xff" * 5 + b"\0\0\0", b"U\x03abc"),
            *(
                b"X\x07\0\0\0storage",
                b"X\x01\0\0\0" + b"0",
                b"\x8a\xff",
                b"\x8b\xff\xff\xff\x7f",
                b"\x82\x01",
            ),
            *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n"),
            *(b"ccollections\nOrderedDict\n", b"cpathlib\nPath\n", b"cbuiltins\neval\n", b"\x93", b"\x97"),
        ]
    ),
    st.binary(min_size=1, max_size=3),
)


@FUZZ
@given(
    st.lists(OPCODES, max_size=24), st.sampled_from([b"\x80\x02", b"\x80\x05\x95\xff\xff\0\0\0\0\0\0", b""])
)
def test_made_up_pickles(path: Path, opcodes: list[bytes], start: bytes) -> None:
    open_or_refuse(path, archive_of(start + b"".join(opcodes) + b"."))


@pytest.mark.parametrize("end", [b"Ns.", b"\x91.", b"\x90."])
def test_tuples_in_tuples_without_end(path: Path, end: bytes) -> None:
    """Python's own dictionaries and sets would end the process."""
    open_or_refuse(path, archive_of(b"\x80\x04}\x8f()" + b"\x85" * 500_000 + end))


@pytest.mark.parametrize("pickled", [b"}" + b"X\x01\0\0\0a}" * 9999 + b"s" * 9999, b"}q\0X\x01\0\0\0ah\0s"])
def test_dictionaries_in_dictionaries_without_end(path: Path, pickled: bytes) -> None:
    open_or_refuse(path, archive_of(b"\x80\x04" + pickled + b"."))


def archive_of(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(24))
    return buffer.getvalue()
