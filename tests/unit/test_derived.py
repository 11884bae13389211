"""Results without z-score, mean and standard deviation: every tool gives the same bytes."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

import ocelot_em
from builders import explicit_maps, same_bits, snapshot, write_explicit_search, write_indexed_search
from helpers import assert_same_maps, read_maps
from montages import SHOTS, write_shots
from ocelot_em.cli.main import run
from ocelot_em.errors import CorruptChunkError, OutputExistsError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import DERIVED
from ocelot_em.model.regions import Region
from ocelot_em.particles.population import Population
from ocelot_em.store.partials import write_partial
from ocelot_em.view.plots import pooled_zscore

SHAPE = (24, 30)


def write_damaged_search(place):
    """A search with NaN, so that counts differ from pixel to pixel."""
    for number, name in enumerate(("a", "b")):
        maps = explicit_maps(SHAPE, number)
        maps["correlation_sum"][number : number + 4, 5:9] = np.nan
        with (
            mock.patch("ocelot_em.store.partials.value_problems", return_value=[]),
            mock.patch("ocelot_em.store.partials.BadValues.problems", return_value=[]),
        ):
            write_partial(place, name, maps, total_projections=1000 + number, order=number)
    return place


def write_montage(place):
    return write_shots(place, [replace(shot, counts=(70_000, 31_000)) for shot in SHOTS])


KINDS = {
    "explicit": (write_explicit_search, {}),
    "index": (write_indexed_search, {"poses": "index"}),
    "counts": (write_damaged_search, {"nan": "mask"}),
    "max-zscore": (write_montage, {"overlap": "max-zscore"}),
}


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """A result with and one without stored derived maps."""
    write, options = KINDS[request.param]
    search = write(tmp_path / "RUN")
    for derived in ("stored", "none"):
        ocelot_em.merge(search, tmp_path / derived, tile_size=16, derived=derived, **options)
    return tmp_path / "stored", tmp_path / "none"


def tools(place):
    """Everything that tools make of a result: arrays, and files in a folder beside it."""
    merged = MergedResult.open(place)
    lazy = ocelot_em.open_merged(place)
    made = {f"lazy {name}": values.values for name, values in lazy.items()}
    corner = lazy.scaled_mip[3:9:2, 5].values
    made |= {"corner": corner, "pooled": pooled_zscore(merged, 8)[0]}
    whole = Region.whole(merged.attributes.shape)
    made |= {f"read {name}": merged.read(whole, name) for name in lazy}
    for method in ("gaussian", "pvalue"):
        options = {"cutoff": 0.1, "min_distance": 2, "micrograph": "M1"}
        table = ocelot_em.find_peaks(place, method=method, **options)
        made |= {f"{method} {name}": values for name, values in table.columns.items()}
    made |= {f"pixels {n}": p for n, p in enumerate(Population(merged, 0).values())}
    histograms = merged.summary.histograms
    made |= {"z": histograms.z, "joint": histograms.joint}
    files = place.parent / f"files of {place.name}"
    counts = {e.total_projections for e in merged.attributes.exposures}
    for name in ("mrc", "hdf5", "ome-zarr") if len(counts) < 2 else ("ome-zarr",):
        out = files / name
        out.parent.mkdir(exist_ok=True)
        assert run(["export", str(place), "--output", str(out), "--to", name]) == 0
    return made, snapshot(files)


def test_every_tool_gives_the_same(both):
    """Lazy arrays, picking from records and from maps, plots, exports: equal to the bit."""
    stored, none = both
    (made, files), (other, other_files) = map(tools, both)
    assert made.keys() == other.keys()
    for name, values in made.items():
        is_text = values.dtype.kind == "U"
        assert (values == other[name]).all() if is_text else same_bits(values, other[name]), name
    assert files.keys() == other_files.keys()
    for name, content in files.items():
        # The header of an MRC file names the result.
        start = 1024 if name.endswith(".mrc") else 0
        assert content[start:] == other_files[name][start:], name
    assert not any((none / name).exists() for name in DERIVED)
    assert run(["check", str(none)]) == run(["info", str(none)]) == 0
    assert MergedResult.open(none).statistics == MergedResult.open(stored).statistics


def test_it_is_merged_again_as_exactly_as_at_once(tmp_path):
    """Its sums are float64; another choice is another plan."""
    one, other = write_explicit_search(tmp_path / "A", SHAPE), tmp_path / "B"
    write_partial(other, "b", explicit_maps(SHAPE, 9), total_projections=70)
    ocelot_em.merge(one, tmp_path / "M", tile_size=16, derived="none")
    ocelot_em.merge([tmp_path / "M", other], tmp_path / "TWICE", tile_size=16)
    ocelot_em.merge([one, other], tmp_path / "ONCE", tile_size=16)
    assert_same_maps(read_maps(tmp_path / "TWICE"), read_maps(tmp_path / "ONCE"))
    with pytest.raises(
        OutputExistsError, match="derived: the output has none, requested is stored"
    ):
        ocelot_em.merge(one, tmp_path / "M", tile_size=16)


def test_damage_of_its_sums_is_named_and_merged_again(tmp_path):
    search, out = write_explicit_search(tmp_path / "RUN", SHAPE), tmp_path / "M"
    ocelot_em.merge(search, out, tile_size=16, derived="none")
    damaged = out / "correlation_sum/c/0/1"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = ocelot_em.check(out)
    assert "correlation_sum: chunk (0, 1)" in problem
    with pytest.raises(CorruptChunkError, match=r"correlation_sum: chunk \(0, 1\)"):
        ocelot_em.open_merged(out).scaled_mip.compute()
    assert ocelot_em.merge(search, out, tile_size=16, derived="none").n_merged == 1
    assert damaged.read_bytes() == content
