"""Finds deadlines that cannot be met, by a lower bound of the remaining time of a request."""

from __future__ import annotations

from dataclasses import dataclass

_ENOUGH_CALLS = 20
"""Calls of a kind that are seen before the fastest counts: the first ones allocate, compile and capture."""


@dataclass(frozen=True)
class Work:
    """The steps of a request, over all its pictures and placements."""

    guided: int
    """Those with guidance."""
    unguided: int
    """Those without."""
    at_once: int
    """Most pictures of the request that can share a call of the step graph."""


class FastestCalls:
    """The fastest calls of the step graph that were ever seen, with guidance and without."""

    def __init__(self) -> None:
        self._seen = {True: 0, False: 0}
        self._fastest = {True: float("inf"), False: float("inf")}

    def note(self, guided: bool, seconds: float) -> None:
        """Takes note of a call.

        Args:
            guided: whether a sample in it had guidance.
            seconds: what the device took for the step graph, or less; never more, as for banks or decoding.
        """
        self._seen[guided] += 1
        self._fastest[guided] = min(self._fastest[guided], seconds)

    def least_seconds(self, work: Work) -> float:
        """Returns the seconds from a request's first step to its last if all goes as well as it ever did; 0
        if not known.

        That is its own steps alone, in the fastest batch that was seen. Who is ahead of it does not count:
        any of them may be cancelled or late at any moment, and leave its slot. Nor do banks, which may be
        kept from another request.
        """
        guided, unguided = self._fastest[True], self._fastest[False]
        seconds = 0.0
        if self._seen[True] >= _ENOUGH_CALLS:
            seconds += work.guided * guided
        if self._seen[False] >= _ENOUGH_CALLS:
            # a step without guidance may share a call with one that has it
            seconds += work.unguided * min(guided, unguided)
        return seconds / work.at_once
