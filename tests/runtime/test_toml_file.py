"""TOML files as dataclasses: what is read, and what a slip is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from runtime.errors import InputError
from runtime.toml_file import read_settings, read_values


@dataclass(frozen=True)
class Wheel:
    spokes: int
    width: float = 1.5


@dataclass(frozen=True)
class Cart:
    name: str = "cart"
    colour: Literal["red", "blue"] = "red"
    load: int = field(default=0, metadata={"is_size": True})
    sides: tuple[float, float] = (1.0, 2.0)
    stops: tuple[str, ...] = ()
    spare: Wheel | None = None
    wheels: tuple[Wheel, ...] = ()
    marks: Mapping[str, float | str | tuple[float, ...]] = field(default_factory=dict)
    closed: bool = False


def read(tmp_path: Path, text: str) -> Cart:
    (tmp_path / "cart.toml").write_text(text)
    return read_settings(tmp_path / "cart.toml", Cart, "the cart")


def test_keys_are_fields_and_tables_are_dataclasses(tmp_path: Path) -> None:
    text = """
        colour = "blue"
        load = "6G"
        sides = [3, 4.5]
        stops = []
        closed = true
        [spare]
        spokes = 4
        [[wheels]]
        spokes = 5
        [[wheels]]
        spokes = 6
        width = 2
        [marks]
        front = 1
        back = "none"
        both = [1, 2.5]
    """
    assert read(tmp_path, text) == Cart(
        colour="blue",
        load=6 * 10**9,
        sides=(3, 4.5),
        closed=True,
        spare=Wheel(4),
        wheels=(Wheel(5), Wheel(6, 2)),
        marks={"front": 1, "back": "none", "both": (1, 2.5)},
    )
    assert read(tmp_path, "") == Cart()
    assert read(tmp_path, "load = 5000").load == 5000


def test_values_are_those_that_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "cart.toml").write_text('name = "dray"\nstops = ["a", "b"]\n')
    values = read_values(tmp_path / "cart.toml", Cart, "the cart")
    assert values == {"name": "dray", "stops": ("a", "b")}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nmae = 'x'", "'{}': the cart has no 'nmae'; did you mean 'name'?"),
        ("[wheel]", "'{}': unknown section [wheel]; did you mean 'wheels'?"),
        (
            "q = 1",
            "'{}': the cart has no 'q'; "
            "known: closed, colour, load, marks, name, sides, spare, stops, wheels",
        ),
        ("[spare]\nspoke = 1", "'{}': [spare] has no 'spoke'; did you mean 'spokes'?"),
        ("name = 3", "'{}': name of the cart is 3, expected a text"),
        ("closed = 1", "'{}': closed of the cart is 1, expected true or false"),
        ("colour = 'pink'", """'{}': colour of the cart is "pink", expected "red" or "blue\""""),
        ("sides = [1]", "'{}': sides of the cart is [1], expected a list, 2 times a number"),
        ("stops = ['a', 1]", """'{}': stops of the cart is ["a", 1], expected a list, a text"""),
        ("load = true", "'{}': load of the cart is true, expected a whole number"),
        ("load = '6X'", "'{}': load: '6X' is not a size: a number is expected, like 6G or 800M"),
        ("[spare]\nwidth = 2", "'{}': [spare] lacks 'spokes', which has no default"),
        ("[spare]\nspokes = 1.5", "'{}': spokes of [spare] is 1.5, expected a whole number"),
        ("spare = 3", "'{}': spare is 3, expected a section [spare]"),
        ("[wheels]\nspokes = 3", "'{}': wheels are written [[wheels]], once for each"),
        ("[[wheels]]\nspokes = 'x'", """'{}': spokes of [wheels] is "x", expected a whole number"""),
        ("marks = 1", "'{}': marks is 1, expected a section [marks]"),
        ("[marks]\na = true", "'{}': a of [marks] is true, expected a number or a text or a list, a number"),
        (
            "[marks]\na = 1979-05-27",
            """'{}': a of [marks] is "1979-05-27", expected a number or a text or a list, a number""",
        ),
    ],
)
def test_a_slip_is_told_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        read(tmp_path, text)
    assert str(refusal.value) == sentence.format(tmp_path / "cart.toml")


@pytest.mark.parametrize("content", [b"[cart", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cart.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot read the cart: '{path}' is not TOML: "):
        read_settings(path, Cart, "the cart")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the cart '.*none\.toml': No such file"):
        read_settings(tmp_path / "none.toml", Cart, "the cart")
