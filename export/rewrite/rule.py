"""Defines a rewrite rule: a pattern, its replacement, and the limits of the kernel that computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

MICROSOFT = "com.microsoft"
"""Domain of the operators that ONNX Runtime adds to ONNX."""

Anchor = Callable[[ir.Node], bool]
"""Says whether a node belongs to a pattern and to nothing else, so that counting nodes counts patterns."""


class Rule(ABC):
    """Operators that become others with the same result."""

    name: str

    def __init__(self) -> None:
        self.kept: dict[ir.Node, str] = {}
        """Node -> why the kernel does not take the pattern that it belongs to."""

    def keep(self, node: ir.Node, reason: str) -> bool:
        """Notes that a pattern stays because the kernel does not take it. Returns False."""
        self.kept[node] = reason
        return False

    @abstractmethod
    def apply(self, model: ir.Model) -> int:
        """Replaces what the rule is for wherever it is found. Returns how often that was."""


class PatternRule(Rule):
    """A pattern of a fixed form.

    `pattern`, `check` and `rewrite` are those of onnxscript's rewriter. Nodes whose results nobody uses any
    more are removed afterwards, so a result inside the pattern may have other readers.
    """

    commutes = True
    """Whether inputs of commutative operators may come in either order."""

    @abstractmethod
    def pattern(self, op: Any, *values: Any) -> Any:
        """Describes the operators to look for."""

    def check(self, context: Any, **found: Any) -> bool:
        """Says whether operators that look like the pattern can be replaced."""
        return True

    @abstractmethod
    def rewrite(self, op: Any, *values: Any, **found: Any) -> Any:
        """Builds the replacement."""

    def apply(self, model: ir.Model) -> int:
        """Replaces the pattern wherever it is found. Returns how often that was."""
        rule = RewriteRule(self.pattern, self.rewrite, self.check, name=self.name, remove_nodes=False)
        count: int = RewriteRuleSet([rule], commute=self.commutes).apply_to_model(model)
        if count:
            passes.IdentityEliminationPass()(model)
            passes.RemoveUnusedNodesPass()(model)
            # a replacement stands where the last node of its pattern did, but others may read its results
            model.graph.sort()
        return count


def operator(*types: str) -> Anchor:
    """Returns the nodes of some types of standard operators."""
    return lambda node: node.domain == "" and node.op_type in types
