"""Merges of a running search: replaced checkpoints, updates of the result, what is left out."""

import io
import json
from dataclasses import replace

import h5py
import mrcfile
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr

from ocelot_em import (
    Exposure,
    MergedResult,
    MergeOptions,
    Optics,
    ParticleTable,
    describe,
    find_peaks,
    merge,
    open_merged,
    write_cistem_star,
    write_leopard_csv,
    write_relion_star,
)
from ocelot_em.cli import watch_command
from ocelot_em.cli.console import PlainConsole
from ocelot_em.cli.main import run as ocelot
from ocelot_em.cli.text_map import map_text, strip_text
from ocelot_em.errors import IncompleteError, OutputExistsError, PlanError
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.merge.lazy import lazy_merge
from ocelot_em.model.correlations import TABLE
from ocelot_em.particles.table import SEARCHED
from ocelot_em.run.api import MAX_PLANS
from ocelot_em.run.observer import Observer
from ocelot_em.store.objects import open_objects
from recording import BATCHES, INFO, N, new_maps, new_table, record, recorder, search
from report_pages import stub_rendering


class Device:
    """A device that searches batch by batch, each a checkpoint."""

    def __init__(self, run, name="gpu0", batches=BATCHES, **options):
        self.recorder, self.maps = recorder(run, name, **options)
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


def test_checkpoints_that_are_always_replaced_and_nothing_else(monkeypatch):
    """The error states what happens, and what to do."""
    monkeypatch.setattr("ocelot_em.run.api.REPLAN_SECONDS", 0)
    run = "memory://replaced-only/run"
    device = Device(run, batches=[(number, number + 1) for number in range(N)])
    with pytest.raises(IncompleteError, match="has no partials yet; run this again when"):
        merge(run, "memory://replaced-only/out", so_far=True)
    device.step()
    with pytest.raises(IncompleteError, match="of 1 partial, none is complete, or of a process"):
        merge(run, "memory://replaced-only/out", complete_only=True)
    with pytest.raises(IncompleteError, match="replaced 5 times before they were merged, and"):
        merge(run, "memory://replaced-only/out", so_far=True, observer=Meanwhile(device, MAX_PLANS))


def test_the_same_command_updates_the_result_and_completes_it(monkeypatch):
    run, output = "memory://updated/run", "memory://updated/out"
    one, other = Device(run, "gpu0", BATCHES[:6]), Device(run, "gpu1", BATCHES[6:])
    with pytest.raises(IncompleteError, match="the search has no partials yet"):
        merge(run, output, so_far=True)
    one.step()
    monkeypatch.setattr(type(open_objects(output)), "free_bytes", lambda _: 10)
    with pytest.raises(PlanError, match="disk: the output needs about"):
        merge(run, output, so_far=True)
    monkeypatch.undo()
    for n in (4, 8):
        if n == 8:  # an update replaces what is there
            one.step(), other.step()
            monkeypatch.setattr(type(open_objects(output)), "free_bytes", lambda _: 10)
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


def test_everything_that_is_written_states_that_the_search_was_incomplete(tmp_path, capsys):
    run, out = str(tmp_path / "RUN"), str(tmp_path / "OUT")
    recorded, maps = recorder(run, maps=new_maps() | {TABLE: new_table()})
    for found in recorded.ranges(BATCHES[:3]):
        search(maps, *found)
    recorded.finish()
    share, text = 12 / N, "incomplete search: searched 12 of 48 orientations (25.0%)"
    report = merge(run, out, so_far=True)
    assert report.incomplete_search == text in report._repr_html_()
    merged = MergedResult.open(out)
    assert text in repr(merged)
    assert open_merged(out).incomplete_search == lazy_merge(run, so_far=True).incomplete_search
    optics = Optics(300, 2.7, 0.1, 2.0, 5200, 4900, 25, 0, "m.mrc", "t.mrc", 8)
    for table in (find_peaks(out, cutoff=4), find_peaks(out, cutoff=100)):
        assert text in repr(table)
        paths = [tmp_path / f"table.{number}" for number in range(4)]
        table.to_csv(paths[0])
        found = pd.read_csv(paths[0])[SEARCHED]
        assert found.tolist() == [share] * len(table)
        again = ParticleTable.read_csv(paths[0])
        said = ": searched 25.0% of the orientations" * bool(len(table))
        assert again.incomplete_text == f"incomplete search{said}"
        assert write_relion_star(again, paths[1], optics=optics, overwrite=True)
        assert write_cistem_star(table, paths[2], optics=optics, overwrite=True)
        assert paths[1].read_text().splitlines()[1] == f"# {again.incomplete_text}"
        assert paths[2].read_text().splitlines()[1] == f"# {text}"
        write_leopard_csv(table, paths[3], optics=optics, overwrite=True)
        assert pd.read_csv(paths[3])[SEARCHED].tolist() == [share] * len(table)
        assert (
            read_parquet(write_parquet(table, tmp_path / "p", overwrite=True)).about == table.about
        )
    capsys.readouterr()
    for to in ("mrc", "hdf5", "ome-zarr", "correlations"):
        assert ocelot(["export", out, "--to", to, "--output", str(tmp_path / to)]) == 0
        assert text in capsys.readouterr().out
    with mrcfile.open(tmp_path / "mrc" / "mip.mrc", header_only=True) as file:
        assert text in file.get_labels()
    with h5py.File(tmp_path / "hdf5") as file:
        assert file.attrs["incomplete_search"] == text
    assert zarr.open_group(tmp_path / "ome-zarr").attrs["incomplete_search"] == text
    schema = pq.read_schema(tmp_path / "correlations")
    assert json.loads(schema.metadata[b"ocelot_em.about"])["incomplete_search"] == text


@pytest.mark.parametrize("derived", ["stored", "none"])
def test_of_a_montage_only_exposures_with_new_checkpoints_are_merged_again(derived):
    run, output = (f"memory://montage-{derived}/{name}" for name in ("run", "out"))

    def device(name, x):
        exposure = Exposure(name, origin=(0, x), acquired=x)
        return Device(run, search=replace(INFO, exposure=exposure))

    def assert_merged(n_tiles):
        options = {"tile_size": 32, "so_far": True, "derived": derived}
        assert merge(run, output, **options).n_merged == n_tiles
        found, expected = open_merged(output), lazy_merge(run, so_far=True)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)

    one, other = device("one", 0), device("other", 40)
    one.step(), other.step(2)
    assert_merged(6)
    other.step()
    assert_merged(4)
    third = device("third", 80)
    third.step()
    assert_merged(6)
    assert_merged(0)


def test_a_search_is_watched_until_it_is_complete(tmp_path, monkeypatch, capsys):
    stub_rendering(monkeypatch)
    run, page, output = str(tmp_path / "RUN"), tmp_path / "page.html", str(tmp_path / "OUT")
    device = Device(run)
    device.step(2)
    merge(run, output, so_far=True, derived="none")
    device.step()
    assert ocelot(["watch", run, "--once", "--page", str(page), "--output", output]) == 0
    assert not MergedResult.open(output).attributes.has_derived_maps
    out = capsys.readouterr().out
    assert "searched 12 of 48 orientations (25.0%), gpu0 wrote " in out
    assert "  gpu0: running, 12 (25.0%), wrote " in out
    assert "particles above z = " in out
    assert find_peaks(output).about.incomplete_text.startswith("incomplete search: searched 12")
    html = page.read_text()
    assert '<meta http-equiv="refresh" content="30">' in html
    assert "Incomplete search: searched 12 of 48 orientations (25.0%)." in html
    monkeypatch.setattr(watch_command.time, "sleep", lambda _seconds: device.step(5))
    assert ocelot(["watch", run, "--page", str(page)]) == 0
    assert capsys.readouterr().out.count("searched 48 of 48 orientations (100%)\n") == 1
    assert "refresh" not in page.read_text()
    assert "ncomplete" not in page.read_text()
    assert ocelot(["watch", output]) == 2
    assert "expected a search, got a merged result" in capsys.readouterr().err


def test_a_watched_search_of_many_exposures_shows_the_last_written_and_counts_the_others(
    monkeypatch,
):
    monkeypatch.setattr(watch_command, "MAX_DEVICES", 2)
    times = (f"2026-01-01T00:{n // 60:02d}:{n % 60:02d}+00:00" for n in range(3600))
    monkeypatch.setattr("ocelot_em.store.recorded.now", lambda: next(times))
    run = "memory://watched-many/run"
    exposures = [Exposure(f"e{n}", origin=(0, 40 * n), acquired=n) for n in range(4)]
    devices = [Device(run, search=replace(INFO, exposure=exposure)) for exposure in exposures]
    for number in (0, 1, 2, 3, 1):
        devices[number].step()
    devices[3].step(N)
    devices[3].recorder.finish()
    console = PlainConsole(file=io.StringIO(), width=120)
    options = MergeOptions.parse({"so_far": True})
    watched = watch_command.Watched(run, ("memory://watched-many/out", None), options, console)
    assert watched.look()
    watched._print()
    out = console.file.getvalue()
    assert [line.split(":")[0] for line in out.splitlines()[1:3]] == ["  e1/gpu0", "  e2/gpu0"]
    assert "searched 64 of 192 orientations" in out
    assert "and others: 1 running, 1 complete" in out
    assert not watched.is_complete


@pytest.mark.parametrize(("colours", "encoding"), [("truecolor", "utf-8"), (None, "ascii")])
def test_a_watched_search_fits_the_terminal(colours, encoding, tmp_path):
    run = str(tmp_path / "RUN")
    record(run, "gpu0", n=5)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = PlainConsole(
        force_terminal=True, color_system=colours, width=70, height=24, file=stream
    )
    options = MergeOptions(so_far=True)
    watched = watch_command.Watched(run, (tmp_path / "OUT", None), options, console)
    watched.look()
    empty = console.render_lines(watched.render())
    watched.merge()
    assert not watched.look()
    assert not watched.is_complete
    lines = console.render_lines(watched.render())
    assert len(empty) < len(lines) <= 24
    watched.show_once()
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert ("▀" in shown) == (colours is not None)
    assert "\x1b[2J" not in shown


def test_the_map_is_pooled_by_maximum_and_fits():
    z = np.zeros((90, 200), np.float32)
    z[88, 199], z[:4] = 9, np.nan
    console = PlainConsole(force_terminal=True, color_system=None, width=41, height=30)
    lines = map_text(z, console, 20).plain.splitlines()
    assert len(lines) <= 20
    assert {len(line) for line in lines} == {40}
    assert "".join(lines).strip() == "█"
    assert lines[-1][-1] == "█"
    assert map_text(z[:4], console, 20).plain.strip() == ""
    assert strip_text(((0, 50), (75, 80)), 100, 4, "utf-8") == "██·░"
