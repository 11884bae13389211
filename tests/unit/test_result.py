"""A merged result is opened once: whoever reads it reads each metadata object once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import ocelot_em
from builders import write_explicit_search, write_indexed_search
from montages import SHOTS, write_shots
from ocelot_em.cli.main import run
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.io.ome_zarr import POOLED, write_ome_zarr
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.regions import Region
from ocelot_em.store.local import LocalObjects
from ocelot_em.view.report import write_report
from report_pages import stub_rendering

SHAPE = (24, 30)
KINDS = ("explicit", "indexed", "index_only", "montage")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("results")
    write_explicit_search(place / "explicit", SHAPE, 2)
    write_indexed_search(place / "indexed", SHAPE, 2)
    write_shots(place / "montage", [replace(shot, counts=(70_000, 31_000)) for shot in SHOTS])
    for kind in KINDS:
        search = place / ("indexed" if kind == "index_only" else kind)
        poses = "index" if kind == "index_only" else "decoded"
        ocelot_em.merge(search, place / f"{kind}_merged", tile_size=16, poses=poses)
    return place


@pytest.fixture
def reads(monkeypatch):
    """Keys of the metadata objects that were read, with their numbers of reads."""
    counted = Counter()
    get = LocalObjects.get

    def watched(self, key, *limits):
        counted.update([key] if key.endswith("zarr.json") else [])
        return get(self, key, *limits)

    monkeypatch.setattr(LocalObjects, "get", watched)
    return counted


COMMANDS = (
    ("report", ".html"),
    ("peaks", ".csv"),
    ("peaks", ".csv", "--method=pvalue"),
    ("export", "", "--to=mrc"),
    ("export", ".h5", "--to=hdf5"),
    ("export", ".zarr", "--to=ome-zarr"),
    ("info",),
    ("check",),
)
"""Names of commands, the suffix of what they write if they do, and options."""


@pytest.fixture
def rendering(kind, monkeypatch):
    """Leave out the rendering of reports of all but one kind."""
    if kind != "montage":
        stub_rendering(monkeypatch)


@pytest.mark.usefixtures("rendering")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS, ids="".join)
def test_a_command_reads_each_metadata_object_once(results, tmp_path, reads, kind, command):
    name, *suffix = command[:2]
    output = [f"--output={tmp_path / 'OUT'}{suffix[0]}"] if suffix else []
    assert run([name, str(results / f"{kind}_merged"), *output, *command[2:]]) == 0
    assert reads
    assert set(reads.values()) == {1}


@pytest.mark.usefixtures("rendering")
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_is_handed_on_is_read_once(results, tmp_path, reads, kind):
    merged = MergedResult.open(results / f"{kind}_merged")
    maps = ocelot_em.open_merged(merged).compute()
    particles = ocelot_em.find_peaks(merged)
    assert len(particles) > 0
    write_report(merged, tmp_path / "report.html", particles=particles)
    write_mrc_set(merged, tmp_path / "MRC")
    write_hdf5(merged, tmp_path / "maps.h5")
    write_ome_zarr(merged, tmp_path / "picture.zarr", maps=POOLED)
    region = Region(3, 20, 5, 21)
    for name, values in maps.items():
        read = merged.read(region, str(name))
        np.testing.assert_array_equal(read, values.to_numpy()[region.slices])
    assert set(reads.values()) == {1}
    # Weak candidates in the overlaps of these tiny exposures are read from their partials.
    assert len([key for key in reads if not key.startswith("exposures/")]) < 30
