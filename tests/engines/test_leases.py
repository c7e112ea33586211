"""Which lease a key that is given back belongs to, and how far a prefix reaches."""

from __future__ import annotations

import time

from kvkeep.connectors import leases
from kvkeep.connectors.leases import Leases
from kvkeep.connectors.sglang import hits


def test_the_oldest_lease_is_given_back_first():
    held = Leases()
    assert held.hold(1, 60, [b"a", b"b"]) == [] and held.hold(2, 60, [b"a"]) == []
    assert held.over([b"a", b"b"]) == 1 and held.over([b"x"]) is None and held.over([]) is None
    assert held.give_back([b"a"]) == []
    assert held.over([b"a"]) == 2
    assert held.give_back([b"a"]) == [2]
    assert held.give_back([b"b", b"b", b"unknown"]) == [1]
    assert len(held) == 0


def test_a_key_that_is_held_twice_is_given_back_twice():
    held = Leases()
    held.hold(1, 60, [b"a", b"a"])
    assert held.give_back([b"a"]) == [] and held.give_back([b"a"]) == [1]


def test_a_lease_that_is_over_is_not_used_and_soon_forgotten():
    held = Leases()
    held.hold(1, 0.0, [b"a"])
    time.sleep(0.001)
    assert held.over([b"a"]) is None
    assert held.hold(2, 60, [b"a"]) == [1]
    assert held.over([b"a"]) == 2 and len(held) == 1


def test_leases_are_bounded(monkeypatch):
    monkeypatch.setattr(leases, "HELD_MAX", 3)
    held = Leases()
    given_up = [held.hold(n, 60, [bytes([n])]) for n in range(5)]
    assert given_up == [[], [], [], [0], [1]]
    assert held.give_up() == [2, 3, 4] and len(held) == 0
    assert held.give_back([b"\x02"]) == []


def test_windows_and_groups():
    here = [True, True, False, True, True, True]
    assert hits.leading(here) == 2 and hits.leading([]) == 0 and hits.leading([True]) == 1
    assert hits.ends_of_windows(here, 1) == [1, 2, 4, 5, 6]
    assert hits.ends_of_windows(here, 2) == [1, 2, 5, 6]
    # A prefix that is shorter than the window needs all of it.
    assert hits.ends_of_windows(here, 3) == [1, 2, 6]
    pages = [bytes([n]) for n in range(10)]
    assert hits.keys_of_groups(pages, 4, 2) == [bytes([n]) for n in (2, 3, 6, 7)]
    assert hits.leading_groups([True, True, True, False], 4, 2) == 4
    assert hits.leading_groups([], 4, 2) == 0
