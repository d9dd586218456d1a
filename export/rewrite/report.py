"""Reports a rewrite: operators before and after, and what every rule replaced or left."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True)
class Kept:
    """Operators that stay because the provider's kernel does not take them."""

    rule: str
    reason: str
    nodes: tuple[str, ...]
    """Names of the operators that the rule looks for."""

    def __str__(self) -> str:
        return f"{self.rule}: {len(self.nodes)} kept, {self.reason}"


@dataclass(frozen=True)
class Report:
    """What a rewrite did to one graph."""

    before: Counter[str]
    """Type of operator -> how many there were."""
    after: Counter[str]
    matches: Counter[str] = field(default_factory=Counter)
    """Rule -> how often it replaced its pattern."""
    kept: tuple[Kept, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.before.total()} operators -> {self.after.total()}"]
        lines += [f"  {rule}: {count}" for rule, count in self.matches.items() if count]
        lines += [f"  {kept}" for kept in self.kept]
        return "\n".join(lines)


def count_operators(graph: ir.Graph) -> Counter[str]:
    """Type of operator -> how many there are; those of other domains as DOMAIN.TYPE."""
    return Counter(".".join(filter(None, (node.domain, node.op_type))) for node in graph)
