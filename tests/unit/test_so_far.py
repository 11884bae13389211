"""Merges of a running search: replaced checkpoints, updates of the result, what is left out."""

import numpy as np
import pytest

from ocelot_em import describe, merge, open_merged
from ocelot_em.errors import IncompleteError, OutputExistsError
from ocelot_em.merge.lazy import lazy_merge
from ocelot_em.run.api import MAX_PLANS, Observer
from recording import BATCHES, N, record, recorder, search


class Device:
    """A device that searches batch by batch, each a checkpoint."""

    def __init__(self, run, name="gpu0", batches=BATCHES):
        self.recorder, self.maps = recorder(run, name)
        self._ranges = self.recorder.ranges(batches)
        self.step()

    def step(self, n=1):
        for _ in range(n):
            if (found := next(self._ranges, None)) is not None:
                search(self.maps, *found)


class Meanwhile(Observer):
    """Lets a device write checkpoints between the plan of a merge and its tiles."""

    def __init__(self, device, n_plans, n_steps=2):
        self.device, self.n_plans, self.n_steps, self.reasons = device, n_plans, n_steps, []

    def locked(self, stop):
        self.n_plans -= 1
        if self.n_plans >= 0:
            self.device.step(self.n_steps)

    def waiting(self, reason):
        self.reasons.append(reason)


def n_searched(store):
    return describe(store).progress.n_searched


@pytest.mark.parametrize(
    ("n_steps", "n_plans", "merged"),
    [(1, 1, 4 + 1), (2, 1, 4 + 3), (2, MAX_PLANS, 4)],
)
def test_replaced_checkpoints_are_planned_again_and_in_the_end_left_out(n_steps, n_plans, merged):
    place = f"memory://replaced-{n_steps}-{n_plans}"
    run, output = f"{place}/run", f"{place}/out"
    record(run, "done", [(0, 4)])
    device = Device(run, batches=[(number, number + 1) for number in range(4, N)])
    device.step()
    observer = Meanwhile(device, n_plans, n_steps)
    merge(run, output, so_far=True, tile_size=32, observer=observer)
    assert n_searched(output) == merged
    n_again = 0 if n_steps == 1 else min(n_plans, MAX_PLANS - 1)
    assert len(observer.reasons) == n_again + (merged == 4)
    assert ("leaving running partials out" in " ".join(observer.reasons)) == (merged == 4)


def test_the_same_command_updates_the_result_and_completes_it():
    run, output = "memory://updated/run", "memory://updated/out"
    one, other = Device(run, "gpu0", BATCHES[:6]), Device(run, "gpu1", BATCHES[6:])
    with pytest.raises(IncompleteError, match="the search has no partials yet"):
        merge(run, output, so_far=True)
    for n in (4, 8):
        one.step()
        other.step(n == 8)
        report = merge(run, output, so_far=True, tile_size=32)
        assert report.n_merged == 4
        assert n_searched(output) == n + 4 * (n == 8)
    assert merge(run, output, so_far=True).n_merged == 0
    merge(run, output, so_far=True, without=("gpu1",))
    assert n_searched(output) == 8
    one.step(6)
    one.recorder.finish()
    merge(run, output, complete_only=True)
    assert n_searched(output) == 24
    with pytest.raises(IncompleteError, match="the search is incomplete"):
        merge(run, output)
    with pytest.raises(OutputExistsError, match="nan: the output has raise"):
        merge(run, output, so_far=True, nan="mask")
    with pytest.raises(OutputExistsError, match="from another merge: inputs"):
        merge("memory://updated/other", output) if record("memory://updated/other") else None
    other.step(6)
    merge(run, output)
    assert describe(output).progress.is_whole
    found, expected = open_merged(output), lazy_merge(run)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    other.recorder.finish()
    assert merge(run, output, so_far=True).n_merged == 0
