"""Searches that are recorded while they run: nothing searched twice, nothing half written."""

import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pytest
import torch

from ocelot_em import (
    Exposure,
    SearchInfo,
    SearchSize,
    check,
    describe,
    find_peaks,
    merge,
    open_merged,
    write_partial,
)
from ocelot_em.cli.main import run as ocelot
from ocelot_em.errors import (
    FormatError,
    IncompleteError,
    InputChangedError,
    InvalidInputError,
    StorageError,
)
from ocelot_em.merge import planning
from ocelot_em.merge.lazy import lazy_merge
from ocelot_em.merge.recorder import read_recorded
from ocelot_em.merge.result import MergedResult
from ocelot_em.model import ranges as sets
from ocelot_em.model.correlations import TABLE
from ocelot_em.model.maps import MEAN, SCALED_MIP, SQUARED_SUM, STD, SUM
from ocelot_em.model.options import MergeOptions
from ocelot_em.store import recorded
from ocelot_em.store.bucket import MemoryObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partials
from ocelot_em.store.sources import open_source_maps
from ocelot_em.view.report_sections import ReportData, warnings_of
from recording import (
    BATCHES,
    COLUMNS,
    INFO,
    SHAPE,
    N,
    new_maps,
    new_table,
    record,
    recorder,
    search,
)

INEXACT = SUM, SQUARED_SUM, MEAN, STD, SCALED_MIP


@pytest.fixture(scope="module")
def undisturbed():
    maps = new_maps()
    search(maps, 0, N)
    write_partial("memory://undisturbed", "one", maps, total_projections=2 * N, search=INFO)
    return lazy_merge("memory://undisturbed").compute()


def assert_same(found, expected):
    """Bit for bit, but for what is computed from sums, whose order differs."""
    assert found.total_projections == expected.total_projections
    for key in {*expected} - {"best_partial"}:
        tolerance = 1e-5 if key in INEXACT else 0
        np.testing.assert_allclose(found[key], expected[key], tolerance, tolerance, err_msg=key)


class Killed(BaseException):
    """What ends a process at some write."""


def test_after_a_kill_at_any_write_the_rest_is_searched(undisturbed, monkeypatch):
    """At every third write in turn, until the search ends before; then two devices resume it."""
    kept = {name: getattr(MemoryObjects, name) for name in ("put", "create", "delete")}
    n_left = 0

    def counted(name):
        def call(self, *arguments, **options):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise Killed
            return kept[name](self, *arguments, **options)

        return call

    for number in count(0, 3):
        place, n_left = f"memory://killed{number}", number
        with monkeypatch.context() as patched, suppress(Killed):
            for name in kept:
                patched.setattr(MemoryObjects, name, counted(name))
            record(place, batches=[(0, 24), (24, N)])
        if n_left >= 0:
            break
        record(place, name="gpu1", batches=BATCHES[3:8], every=3600)
        record(place, name="gpu0", every=3600)
        assert check(place) == [], number
        if number % 9 == 0:
            assert_same(lazy_merge(place).compute(), undisturbed)
    assert number > 40


@pytest.mark.parametrize("kind", ["explicit", "torch", "local"])
def test_a_resumed_search_is_as_one_that_was_not_interrupted(kind, undisturbed, tmp_path):
    place = tmp_path / "RUN" if kind == "local" else f"memory://resumed-{kind}"
    for name, last in (("gpu0", 5), ("gpu1", None)):
        maps = new_maps(explicit=kind == "explicit")
        if kind == "torch":
            maps = {key: torch.from_numpy(values) for key, values in maps.items()}
        options = {"search": INFO}
        if kind == "explicit":
            options = {
                "search": SearchInfo(template_box=8, pixel_size_angstrom=2.0),
                "size": SearchSize(N, projections_each=2),
            }
        device, _ = recorder(place, name, maps, **options)
        for number, (start, stop) in enumerate(device.ranges(iter(BATCHES))):
            if number == last:
                break
            numpy_maps = {key: np.asarray(values) for key, values in maps.items()}
            search(numpy_maps, start, stop)
        else:
            device.finish()
    found, expected = lazy_merge(place).compute(), undisturbed
    if kind == "explicit":
        expected = expected.drop_vars("best_global_index")
    assert_same(found, expected)


def test_a_correlation_table_grows_with_the_maps():
    place, alone = "memory://tables", new_maps() | {TABLE: new_table()}
    search(alone, 0, N)
    for last in (5, N):
        device, maps = recorder(place, maps=new_maps() | {TABLE: new_table()})
        for number, (start, stop) in enumerate(device.ranges(BATCHES)):
            if number == last:
                break
            search(maps, start, stop)
        else:
            device.finish()
    assert len(maps[TABLE]["pos_y"]) == 0
    table = read_recorded(place)[1][TABLE]
    found, expected = (
        sorted(zip(*(t[key] for key in COLUMNS), strict=True)) for t in (table, alone[TABLE])
    )
    assert found == expected
    assert len(found) > 100
    assert check(place) == []


def test_who_has_ended_is_completed_and_what_it_left_is_deleted(monkeypatch):
    place, dead = "memory://ended", {**recorded.this_process(), "pid": 2**22 + 1, "started": 1}
    with monkeypatch.context() as patched:
        patched.setattr(recorded, "this_process", lambda: dead)
        device = record(place, n=3)
        device._partial.begin()  # a checkpoint that was not finished
    objects = open_objects(place)
    assert len(objects.children("partials/gpu0")) == 3
    assert describe(place).partials == (("gpu0", "running", 24),)
    with pytest.raises(InvalidInputError, match="already there and running"):
        write_partial(place, "gpu0", new_maps(), total_projections=0, search=INFO)
    assert record(place).name == "gpu0.2"
    assert describe(place).partials == (("gpu0", "complete", 24), ("gpu0.2", "complete", 72))
    assert {*objects.children("partials/gpu0")} == {device._partial._record.folder, "manifest"}
    assert check(place) == []
    maps = new_maps()
    search(maps, 12, 16)
    device._maps.update(maps)
    device._pending.append((12, 16))
    device._given = None
    with pytest.raises(IncompleteError, match="was completed or replaced"):
        device.write()
    with pytest.raises(IncompleteError, match=r"recorded by 'gpu0\.2' meanwhile"):
        device._partial.searched_before(((12, 16),))


def test_of_two_that_search_the_same_one_records(monkeypatch):
    place = "memory://twice"
    (one, maps), (other, others) = recorder(place, "gpu0"), recorder(place, "gpu1")
    record_one, record_other = one.ranges(BATCHES), other.ranges(BATCHES)
    next(record_one), next(record_other)
    search(maps, 0, 4), search(others, 0, 4)
    look, looked = recorded.RecordedPartial.searched_before, []

    def meanwhile(self, ranges=()):
        """The other one records between the last look of this one and its record."""
        found = look(self, ranges)
        if self is one._partial:
            looked.append(ranges)
            if len(looked) == 1:
                next(record_other)
        return found

    monkeypatch.setattr(recorded.RecordedPartial, "searched_before", meanwhile)
    with pytest.raises(IncompleteError, match="partial 'gpu0': 4 orientations, from 0 on"):
        next(record_one)
    assert describe(place).progress.n_searched == 4
    assert [p.coverage.ranges for _, p in read_partials(open_objects(place))] == [(), ((0, 4),)]
    assert "incomplete" in check(place)[0]


def test_what_was_searched_twice_is_not_merged():
    for place in ("memory://first", "memory://second"):
        record(place, name="gpu0" if "first" in place else "gpu1")
    with pytest.raises(InvalidInputError, match=r"48 orientations are in both, from 0 on"):
        lazy_merge(["memory://first", "memory://second"])


def test_an_incomplete_search_is_named_everywhere(tmp_path, capsys, monkeypatch):
    run, merged = str(tmp_path / "RUN"), str(tmp_path / "M")
    size = SearchSize(N, projections_each=2, batch_size=5)
    with pytest.warns(UserWarning, match="48 orientations are not a multiple of the batch size 5"):
        device, maps = recorder(run, "gpu1", every="30 min", size=size)
    for start, stop in device.ranges([(0, 20), (20, 30)]):
        search(maps, start, stop)
    device.write()
    with pytest.raises(IncompleteError, match=r"searched 30 of 48 .*62\.5%.*\(--so-far\)"):
        merge(run, merged)
    merge(run, merged, so_far=True)
    assert ocelot(["merge", run, "--so-far", "--output", f"{merged}2", "--dry-run"]) == 0
    for store in (run, merged):
        assert ocelot(["info", store]) == 0
        assert describe(store).progress.n_searched == 30
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("searched 30 of 48 orientations (62.5%)") == 3
    assert out.count("not a multiple of the batch size 5") == 3
    assert "gpu1 wrote " in out
    assert " left" in out
    later = datetime.now(UTC) + timedelta(days=2)
    with monkeypatch.context() as context:
        context.setattr("ocelot_em.store.progress._now", lambda: later)
        stopped = describe(run).progress.text
    assert stopped.endswith("gpu1 has not written for 2 days")
    assert open_merged(merged).total_projections == 60
    particles, result = find_peaks(merged, cutoff=4), MergedResult.open(merged)
    assert "incomplete search: searched 30 of 48" in repr(particles)
    warnings = warnings_of(ReportData(result, result.summary, particles, ""))
    assert any(text.startswith("Incomplete search: searched 30 of 48") for text in warnings)
    assert any("not a multiple of the batch size 5" in text for text in warnings)


def test_a_merge_reads_what_it_planned_until_the_checkpoint_after_the_next():
    place = "memory://slots"
    device, _ = recorder(place)
    ranges = device.ranges(BATCHES)
    next(ranges), next(ranges)
    plan = planning.make_plan([place], "memory://m", MergeOptions(so_far=True))
    (source,) = plan.sources
    assert sets.size(source.contributions[0].coverage.ranges) == 4
    next(ranges)
    open_source_maps(source, plan.maps, SHAPE)["mip"].read(plan.grid[0].region)
    next(ranges)
    with pytest.raises(InputChangedError, match="changed since the merge was planned"):
        open_source_maps(source, plan.maps, SHAPE)


def test_what_is_wrong_is_named():
    with pytest.raises(InvalidInputError) as refused:
        recorder("memory://wrong", maps={}, every="soon")
    assert {text.split(":")[0] for text in refused.value.problems} == {"gpu0", "every"}
    with pytest.raises(InvalidInputError, match="expected a SearchSize"):
        recorder("memory://wrong", search=SearchInfo(), maps=new_maps(explicit=True))
    with pytest.raises(InvalidInputError, match="of at least 1, got 0"):
        recorder("memory://wrong", size=SearchSize(0, 2))
    with pytest.raises(InvalidInputError, match="as the search space, got"):
        recorder("memory://wrong", size=SearchSize(N, 3))
    explicit = {"search": SearchInfo(), "maps": new_maps(explicit=True)}
    device, _ = recorder("memory://wrong", size=SearchSize(N), **explicit)
    next(ranges := device.ranges(BATCHES)), next(ranges)
    with pytest.raises(InvalidInputError, match=r"expected a search of 47 orient.*, got 48"):
        recorder("memory://wrong", size=SearchSize(47), **explicit)


def test_a_range_counts_once_and_only_within_the_search(undisturbed):
    device, maps = recorder("memory://given-twice", every=1e9)
    for start, stop in device.ranges([(0, 12), (0, 12), (12, N)]):
        search(maps, start, stop)
    device.finish()
    assert_same(lazy_merge("memory://given-twice").compute(), undisturbed)
    device, _ = recorder("memory://beyond", every=1e9)
    with pytest.raises(InvalidInputError, match=r"within 0 to 48.*got 40 to 50"):
        list(device.ranges([(0, 40), (40, 50)]))


def test_maps_in_the_middle_of_a_range_are_not_recorded():
    device, maps = recorder("memory://middle", every=1e9)
    for start, stop in device.ranges(BATCHES):
        search(maps, start, stop)
        break
    with pytest.raises(IncompleteError, match="in the middle of orientations 0 to 4"):
        device.finish()


@pytest.mark.parametrize("moment", ["after the record", "while the maps are reset"])
def test_a_checkpoint_that_failed_is_not_added_again(undisturbed, monkeypatch, moment):
    place = f"memory://failed-{moment[:5]}"
    device, maps = recorder(place, every=1e9)
    for start, stop in device.ranges(BATCHES):
        search(maps, start, stop)
    looked = []

    def fail(*_args):
        looked.append(1)
        if moment != "after the record" or len(looked) == 2:
            raise StorageError("the network is down")

    if moment == "after the record":
        monkeypatch.setattr(device._partial, "searched_before", fail)
    else:
        monkeypatch.setattr(sys.modules["ocelot_em.merge.recorder"], "fill", fail)
    with pytest.raises(StorageError, match="network"):
        device.write()
    monkeypatch.undo()
    with pytest.raises(IncompleteError, match="an earlier checkpoint failed"):
        device.finish()
    assert_same(lazy_merge(place).compute(), undisturbed)


def test_a_recorder_leaves_other_partials_to_their_writers(tmp_path):
    place = tmp_path / "RUN"
    for name in ("a", "b"):
        maps = new_maps()
        search(maps, 0, 4)
        write_partial(place, name, maps, total_projections=8, search=INFO)
    shutil.rmtree(place / "partials/b")
    recorder(place)
    with pytest.raises(FormatError, match="'b' is missing"):
        lazy_merge(place)


def test_an_exposure_without_a_checkpoint_is_not_left_out():
    place = "memory://exposures"
    for number, name in enumerate(("A", "B")):
        info = replace(INFO, exposure=Exposure(name, (0, 60 * number), number))
        device, maps = recorder(place, search=info)
        if name == "A":
            for start, stop in device.ranges(BATCHES):
                search(maps, start, stop)
            device.finish()
        else:
            device._partial.begin()
    with pytest.raises(IncompleteError, match=r"B.*no partials yet"):
        lazy_merge(place)
