"""Rewrites an exported graph for an execution provider, and accounts for every pattern."""

from __future__ import annotations

from collections import Counter, defaultdict

import onnx_ir as ir
import onnx_ir.passes.common as passes

from engines.errors import AnyDoorError
from export.rewrite.report import Kept, Report, count_operators
from export.rewrite.rule import MICROSOFT
from export.rewrite.targets import TARGETS
from export.rewrite.weights import fold_casts


class RewriteError(AnyDoorError):
    """A pattern that should have been replaced was not recognised."""


def rewrite(model: ir.Model, target: str, strict: bool = True) -> Report:
    """Replaces patterns by operators that the target is faster with, in place.

    Args:
        model: an exported graph. Weights are not read: those that change are computed when it is saved.
        target: one of `TARGETS`.
        strict: refuse a graph in which a pattern was not recognised, rather than leave it slow.

    Raises:
        RewriteError: names the patterns that were not recognised, and how many.
    """
    graph = model.graph
    before = count_operators(graph)
    if TARGETS[target].changes_weights:
        fold_casts(graph)
    matches: Counter[str] = Counter()
    kept: list[Kept] = []
    missed: list[str] = []
    for family in TARGETS[target].families():
        expected = sum(map(family.anchor, graph))
        matches.update(family.apply(model))
        nodes: defaultdict[str | None, list[str]] = defaultdict(list)
        for node in filter(family.anchor, graph):
            nodes[family.reason(node)].append(node.name or "")
        kept += [
            Kept(family.name, reason or "not recognised", tuple(names)) for reason, names in nodes.items()
        ]
        if unknown := nodes.get(None):
            missed.append(f"{family.name}: {len(unknown)} of {expected}, the first at '{unknown[0]}'")
    if missed and strict:
        raise RewriteError(
            f"the rules for {target} did not recognise patterns of the graph: {'; '.join(missed)}"
        )
    # two readers of a picture may each have transposed it
    passes.CommonSubexpressionEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _leave_out_unread(graph)
    return Report(before, count_operators(graph), matches, tuple(kept))


def _leave_out_unread(graph: ir.Graph) -> None:
    """Takes the names of results that nobody reads, so that the provider does not write them."""
    for node in graph:
        if node.domain == MICROSOFT:
            for output in node.outputs[1:]:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""
