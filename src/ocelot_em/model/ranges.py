"""Sets of integers, such as orientations, as sorted disjoint half-open ranges."""

from collections.abc import Iterable

Range = tuple[int, int]
"""First number, and the number after the last one."""

Ranges = tuple[Range, ...]
"""Ranges in ascending order, with a gap between any two of them."""


def union(given: Iterable[Range]) -> Ranges:
    """Join ranges in any order, which may overlap.

    >>> union([(8, 12), (0, 4), (4, 8), (20, 24)])
    ((0, 12), (20, 24))
    """
    joined: list[Range] = []
    for start, stop in sorted(given):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def minus(one: Ranges, other: Ranges) -> Ranges:
    """Remove the numbers of other ranges.

    >>> minus(((0, 10), (20, 30)), ((2, 4), (8, 25)))
    ((0, 2), (4, 8), (25, 30))
    """
    left, removed = [], iter((*other, (2**63, 2**63)))
    first, last = next(removed)
    for start, stop in one:
        while start < stop:
            if last <= start:
                first, last = next(removed)
                continue
            if start < first:
                left.append((start, min(stop, first)))
            start = last if first < stop else stop
    return tuple(left)


def shared(one: Ranges, other: Ranges) -> Ranges:
    """Return the numbers that are in both.

    >>> shared(((0, 10),), ((2, 4), (8, 25)))
    ((2, 4), (8, 10))
    """
    return minus(one, minus(one, other))


def size(ranges: Ranges) -> int:
    """Count the numbers.

    >>> size(((0, 10), (20, 30)))
    20
    """
    return sum(stop - start for start, stop in ranges)


def ranges_text(ranges: Ranges) -> str:
    """Format ranges; :func:`parse_ranges` reads them.

    >>> ranges_text(((0, 12), (20, 24)))
    '0:12 20:24'
    """
    return " ".join(f"{start}:{stop}" for start, stop in ranges)


def parse_ranges(text: object) -> object:
    """Parse formatted ranges; anything that is no text is returned as it is."""
    if not isinstance(text, str):
        return text
    pairs = (pair.partition(":") for pair in text.split())
    return tuple((int(start), int(stop)) for start, _, stop in pairs)
