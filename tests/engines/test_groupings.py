"""Which graphs are loaded together follows from their roles, whatever they are called and compute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.memory_plan import groupings
from engines.spec import ROLES, SAMPLING_ROLES, GraphSpec, Role

OTHERS: list[Role] = [role for role in ROLES if role not in ("step", "decode")]


def specs(*roles: Role) -> dict[str, GraphSpec]:
    """Graphs with these roles, named a, b, ..."""
    names = "abcdefghijklmnop"
    return {name: GraphSpec(name, role, (), ()) for name, role in zip(names, roles)}


def test_a_system_like_anydoor() -> None:
    assert groupings(specs("condition", "window", "step", "decode")) == [
        (("b", "c", "d", "a"),),
        (("b", "c", "d"), ("a",)),
        (("b", "c"), ("d",), ("a",)),
    ]


def test_a_system_of_two_graphs() -> None:
    assert groupings(specs("step", "decode")) == [(("a", "b"),), (("a",), ("b",))]


def test_a_system_with_a_graph_of_every_role() -> None:
    assert groupings(specs("condition", "scene", "window", "step", "decode", "segment"))[-1] == (
        ("c", "d"),
        ("e",),
        ("a",),
        ("b",),
        ("f",),
    )


@given(
    st.lists(st.sampled_from(OTHERS), max_size=8).flatmap(lambda o: st.permutations(["step", "decode", *o]))
)
def test_any_system(roles: list[Role]) -> None:
    of = specs(*roles)
    sampling = {name for name, spec in of.items() if spec.role in SAMPLING_ROLES}
    ways = groupings(of)
    assert len(ways[0]) == 1
    assert len(set(ways)) == len(ways)
    assert [len(way) for way in ways] == sorted({len(way) for way in ways})
    for way in ways:
        assert sorted(name for group in way for name in group) == sorted(of)
        assert all(group for group in way)
        assert sum(bool(sampling & set(group)) for group in way) == 1
