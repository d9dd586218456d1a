"""Turns in the queue, without a thread: who is accepted, who is next, and what positions are told."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.server.deadlines import Work
from runtime.server.events import Queued, QueueFullError
from runtime.server.queue import FairQueue, SharedQueue, _note, fair_order
from runtime.server.ticket import Ticket


def ticket(client: str = "", pictures: Sequence[str] = (), **fields: Any) -> Ticket:
    """A request of a client; its pictures are names here, as the queue only hands them on."""
    made = Ticket(lambda event: None, client=client, **({"work": Work(1, 0, 1)} | fields))
    made.waiting.extend(pictures)  # type: ignore[arg-type]
    return made


def queue_of(*tickets: Ticket, capacity: int = 100) -> FairQueue:
    queue = FairQueue(capacity)
    for each in tickets:
        queue.add(each)
    return queue


def taken(queue: FairQueue) -> list[object]:
    """All pictures that are ready, in the order in which they join; none leaves."""
    pictures: list[object] = []
    while (turn := queue.next()) is not None:
        pictures.append(turn[1])
    return pictures


# --- who is next ------------------------------------------------------------------------------------------


def test_one_clients_requests_come_in_their_order() -> None:
    assert taken(queue_of(ticket(pictures=["a", "b"]), ticket(pictures=["c"]))) == ["a", "b", "c"]


def test_clients_take_turns() -> None:
    greedy = [ticket("greedy", ["g0", "g1"]), ticket("greedy", ["g2"])]
    assert taken(queue_of(*greedy, ticket("modest", ["m0", "m1"]))) == ["g0", "m0", "g1", "m1", "g2"]


def test_fewest_in_the_batch_comes_before_served_longest_ago() -> None:
    first, second = ticket("first", ["f0", "f1"]), ticket("second", ["s0", "s1"])
    queue = queue_of(first, second)
    assert [queue.next(), queue.next()] == [(first, "f0"), (second, "s0")]
    second.running -= 1  # it left the batch
    assert queue.next() == (second, "s1")


def test_among_equals_the_one_served_longest_ago_is_next() -> None:
    first, second = ticket("first", ["f0", "f1"]), ticket("second", ["s0", "s1"])
    queue = queue_of(second, first)
    assert [queue.next(), queue.next()] == [(second, "s0"), (first, "f0")]
    first.running = second.running = 0
    assert queue.next() == (second, "s1")


def test_a_request_without_a_ready_picture_is_passed_over() -> None:
    queue = queue_of(ticket("slow"), ticket("quick", ["q"]))
    assert taken(queue) == ["q"]
    queue.tickets[0].waiting.append("s")  # type: ignore[arg-type]
    assert taken(queue) == ["s"]


def test_a_removed_request_is_over_and_no_longer_counts() -> None:
    running, waiting = ticket("a", ["a0"]), ticket("a", ["a1"])
    queue = queue_of(running, waiting, ticket("b", ["b0"]))
    assert queue.next() == (running, "a0")
    queue.remove(running)
    queue.remove(waiting)
    assert not running.open
    assert not waiting.open
    assert taken(queue) == ["b0"]


def test_the_last_slot_is_kept_for_who_comes_back_within_two_seconds() -> None:
    greedy, modest = ticket("greedy", ["g0", "g1", "g2"]), ticket("modest", ["m0"])
    queue = queue_of(greedy, modest)
    assert taken(queue) == ["g0", "m0", "g1", "g2"]
    modest.running = 0
    queue.remove(modest, now=10.0)
    greedy.waiting.append("g3")  # type: ignore[arg-type]
    assert queue.next(is_last=True, now=11.0) is None
    assert queue.next(is_last=True, now=12.0) == (greedy, "g3")


def test_the_last_slot_is_kept_for_who_is_still_decoded() -> None:
    greedy, slow = ticket("greedy", ["g0", "g1"]), ticket("slow")
    queue = queue_of(greedy, slow)
    assert queue.next(is_last=True) == (greedy, "g0")  # it is not in the batch yet
    assert queue.next(is_last=True) is None
    slow.waiting.append("s0")  # type: ignore[arg-type]
    assert queue.next(is_last=True) == (slow, "s0")
    assert queue.next(is_last=True) == (greedy, "g1")  # all are in it


def test_the_last_slot_is_not_kept_for_who_never_joins() -> None:
    greedy, segmenting = ticket("greedy", ["g0", "g1", "g2"]), ticket("segmenting", work=None)
    queue = queue_of(greedy, segmenting)
    assert queue.next(is_last=True) == (greedy, "g0")
    assert queue.next(is_last=True) == (greedy, "g1")
    queue.remove(segmenting, now=10.0)
    assert queue.next(is_last=True, now=10.0) == (greedy, "g2")


def test_of_clients_of_whom_nothing_was_heard_longest_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.server.queue._REMEMBERED_CLIENTS", 2)
    facts: OrderedDict[str, int] = OrderedDict()
    for turn, client in enumerate("abac"):
        _note(facts, client, turn)
    assert facts == {"a": 2, "c": 3}


# --- positions --------------------------------------------------------------------------------------------


def test_positions_are_the_order_of_starting() -> None:
    tickets = [ticket("greedy", ["g0"]), ticket("greedy", ["g1"]), ticket("modest", ["m0"])]
    queue = queue_of(*tickets)
    assert queue.positions() == [(tickets[0], 0), (tickets[2], 1), (tickets[1], 2)]
    assert queue.positions() == []
    assert queue.next() == (tickets[0], "g0")
    assert queue.positions() == [(tickets[2], 0), (tickets[1], 1)]


def test_who_is_overtaken_keeps_its_position() -> None:
    waiting = [ticket("greedy"), ticket("greedy")]
    queue = queue_of(ticket("greedy", ["g"]), *waiting)
    queue.next()
    assert queue.positions() == [(waiting[0], 0), (waiting[1], 1)]
    modest = ticket("modest")
    queue.add(modest)
    assert queue.positions() == [(modest, 0)]
    assert [each.position for each in waiting] == [0, 1]


def old_fairest(tickets: Sequence[Ticket], running: Mapping[str, int], served: Mapping[str, int]) -> Ticket:
    return min(tickets, key=lambda each: (running.get(each.client, 0), served.get(each.client, 0)))


@given(
    waiting=st.lists(st.sampled_from("abcd"), max_size=12),
    running=st.lists(st.sampled_from("abcd"), max_size=6),
    served=st.permutations("abcd"),
    known=st.integers(0, 4),
)
def test_fair_order_is_choosing_the_fairest_again_and_again(
    waiting: list[str], running: list[str], served: list[str], known: int
) -> None:
    in_batch = [ticket(client, running=1) for client in running]
    left = [ticket(client) for client in waiting]
    turns = {client: turn for turn, client in enumerate(served[:known], 1)}
    found = list(fair_order(left, in_batch, turns))
    counts: Counter[str] = Counter(running)
    expected = []
    while left:
        expected.append(old_fairest(left, counts, turns))
        left.remove(expected[-1])
        counts[expected[-1].client] += 1
        turns[expected[-1].client] = known + len(expected)
    assert found == expected


# --- how many are accepted --------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_the_time_until_a_place() -> None:
    queue = queue_of(*(ticket(job=SimpleNamespace(total_steps=steps)) for steps in (10, 30)), capacity=2)
    queue.tickets[1].steps_done = 20
    for seconds_per_step, expected in ((0.0, 0.1), (0.5, 5.0), (100.0, 60.0)):
        with pytest.raises(QueueFullError) as refusal:
            queue.add(ticket(), seconds_per_step)
        assert refusal.value.retry_seconds == expected
    assert len(queue.tickets) == 2


def test_nothing_is_heard_of_a_request_that_is_over() -> None:
    heard: list[object] = []
    queue, over = SharedQueue(capacity=2), Ticket(heard.append)
    queue.requests.add(over)
    queue.announce()
    queue.end(over)
    queue.tell(over, Queued(5))
    queue.put(over, ["picture"])  # type: ignore[list-item]
    queue.end(over)
    assert heard == [Queued(0)]
    assert not over.waiting


def test_a_place_is_given_to_who_has_two_fewer() -> None:
    first, last, other = ticket("a"), ticket("a"), ticket("b")
    queue = queue_of(first, last, other, capacity=3)
    assert queue.yielding("c") is last
    assert queue.yielding("b") is queue.yielding("a") is None
    first.starts = 1
    assert queue.yielding("c") is None
