"""How far a prefix reaches, by which pages of a pool are there."""

from __future__ import annotations

from collections.abc import Sequence


def leading(there: Sequence[bool]) -> int:
    """Pages from the start without a gap."""
    return next((n for n, is_there in enumerate(there) if not is_there), len(there))


def ends_of_windows(there: Sequence[bool], window: int) -> list[int]:
    """Lengths of prefixes whose last `window` pages (or all, if it is shorter) are there."""
    lengths, run = [], 0
    for n, is_there in enumerate(there, start=1):
        run = run + 1 if is_there else 0
        if run >= min(n, window):
            lengths.append(n)
    return lengths


def keys_of_groups(pages: Sequence[bytes], block_pages: int, group_pages: int) -> list[bytes]:
    """A group stands for a whole block of pages; its keys are those of the last pages of the block. A block that is not
    complete has none."""
    ends = range(block_pages, len(pages) + 1, block_pages)
    return [key for end in ends for key in pages[end - group_pages : end]]


def leading_groups(there: Sequence[bool], block_pages: int, group_pages: int) -> int:
    """Pages that the groups from the start without a gap stand for."""
    return leading(there) // group_pages * block_pages
