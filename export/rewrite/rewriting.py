"""Rewrites an exported graph for an execution provider, and accounts for every pattern."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engines.errors import AnyDoorError
from export.rewrite.attention import CPU_HEADS, CUDA_HEADS, Attention, TransposedKeys
from export.rewrite.report import Kept, Report, count_operators
from export.rewrite.rule import Anchor, Rule, operator


class RewriteError(AnyDoorError):
    """A pattern that should have been replaced was not found."""


@dataclass(frozen=True)
class Family:
    """Rules that together replace all patterns of a kind."""

    name: str
    rules: Sequence[Rule]
    anchor: Anchor
    """Says whether a node belongs to such a pattern. Every one is replaced or has a reason to stay."""


def _cuda() -> list[Family]:
    return [Family("MultiHeadAttention", [TransposedKeys(), Attention(CUDA_HEADS)], operator("Softmax"))]


def _cpu() -> list[Family]:
    return [Family("MultiHeadAttention", [TransposedKeys(), Attention(CPU_HEADS)], operator("Softmax"))]


TARGETS: dict[str, Callable[[], list[Family]]] = {"cuda": _cuda, "cpu": _cpu}
"""Execution provider -> its families of rules, in the order in which they are applied."""


def rewrite(model: ir.Model, target: str, strict: bool = True) -> Report:
    """Replaces patterns by the operators of ONNX Runtime's execution provider, in place.

    Args:
        model: an exported graph. Weights are not read: those that change are computed when it is saved.
        target: cuda or cpu.
        strict: refuse a graph in which a pattern was not recognised, rather than leave it slow.

    Raises:
        RewriteError: names the patterns that were not recognised, and how many.
    """
    graph = model.graph
    before = count_operators(graph)
    matches: dict[str, int] = {}
    kept: list[Kept] = []
    missed: list[str] = []
    for family in TARGETS[target]():
        expected = sum(map(family.anchor, graph))
        for rule in family.rules:
            matches[rule.name] = matches.get(rule.name, 0) + rule.apply(model)
        reasons = {node: (rule.name, why) for rule in family.rules for node, why in rule.kept.items()}
        named = defaultdict(list)
        left = [node for node in graph if family.anchor(node)]
        for node in left:
            named[reasons.get(node, (family.name, _UNKNOWN))].append(node.name or "")
        kept += [Kept(rule, why, tuple(nodes)) for (rule, why), nodes in named.items()]
        unknown = [node.name or "" for node in left if node not in reasons]
        if unknown:
            missed.append(f"{family.name}: {len(unknown)} of {expected}, the first at '{unknown[0]}'")
    if missed and strict:
        raise RewriteError(
            f"the graph has patterns that no rule for {target} recognised: {'; '.join(missed)}"
        )
    return Report(before, count_operators(graph), matches, tuple(kept))


_UNKNOWN = "not recognised"
