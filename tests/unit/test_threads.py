"""The one map over threads: in order, with a bounded number of calls in flight."""

import itertools
import threading

import pytest

from ocelot_em.model.threads import map_in_threads


def test_results_are_in_the_order_of_the_items():
    assert list(map_in_threads(lambda n: n * n, range(1000), 3)) == [n * n for n in range(1000)]
    assert list(map_in_threads(abs, [])) == []


def test_items_are_taken_as_they_are_needed():
    taken = itertools.count()
    results = map_in_threads(lambda _: None, iter(lambda: next(taken), -1), 2)
    for _ in range(10):
        next(results)
    results.close()
    assert next(taken) < 20


def test_calls_run_at_the_same_time():
    together = threading.Barrier(3, timeout=60)
    assert len(list(map_in_threads(lambda _: together.wait(), range(3), 3))) == 3


def test_the_first_error_in_order_ends_the_map_and_its_threads():
    called = []

    def fail_from_two(n):
        called.append(n)
        if n >= 2:
            raise ValueError(str(n))
        return n

    results = map_in_threads(fail_from_two, range(10**9), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match=r"^2$"):
        next(results)
    n_called = len(called)
    assert n_called < 20
    assert not [t for t in threading.enumerate() if t.name.startswith("ocelot-map")]
    assert len(called) == n_called
