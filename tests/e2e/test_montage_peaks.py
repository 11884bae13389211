"""Particles of montages: the real one's, wherever tiles are cut, each once."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from conftest import SHARED
from helpers import expensive
from montages import SHOTS, Shot, merged_alone, write_shots
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.attributes import dump_attributes
from ocelot_em.store.groups import update_attributes
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_attributes

REAL = SHARED.with_name("leopard_em_montage")
ORIGINS = {"00": (2, 0), "01": (0, 287), "02": (3, 576)}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real montage in {REAL}")

DESCRIPTION = "pixel_size: 3.0\nexposures:\n" + "".join(
    f'  - {{id: "{name}", origin: [{y}, {x}], acquired: {int(name)}, valid_shape: [265, 297], '
    f"partials: [{REAL}/M_exp{name}_dev0.npz, {REAL}/M_exp{name}_dev1.npz]}}\n"
    for name, (y, x) in ORIGINS.items()
)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    (folder / "RUN.yaml").write_text(DESCRIPTION)
    assert run(["import", str(folder / "RUN.yaml"), "--output", str(folder / "RUN.zarr")]) == 0
    for overlap in ("earliest", "max-zscore"):
        ocelot_em.merge(folder / "RUN.zarr", folder / f"{overlap}.zarr", overlap=overlap)
    return folder


def leopards_peaks() -> list[dict[str, str]]:
    with (REAL / "M_peaks_zscore_per_exposure.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["exposure"] in ORIGINS]


def assert_equal(left: ParticleTable, right: ParticleTable) -> None:
    """Compare all but the names of the stores, and ranks, which are of the whole montage."""
    assert list(left.columns) == list(right.columns)
    for name, values in left.columns.items():
        if name == "micrograph":
            continue
        if name == "rank":
            assert (np.diff(values) > 0).all()
            continue
        np.testing.assert_array_equal(values, right.columns[name], err_msg=name)


@needs_real
@pytest.mark.parametrize("overlap", ["earliest", "max-zscore"])
def test_the_peaks_of_the_exposures_are_leopards(real, overlap):
    table = find_peaks(real / f"{overlap}.zarr", same_distance=0)
    wanted = leopards_peaks()
    assert len(table) == len(wanted) == 32
    assert table.about.exposure_cutoffs[0][1] == pytest.approx(6.1161, abs=1e-4)
    columns = table.columns
    for name in ORIGINS:
        own = columns["exposure"] == name
        rows = [row for row in wanted if row["exposure"] == name]
        for ours, theirs in (
            ("pos_y", "pos_y"),
            ("pos_x", "pos_x"),
            ("canvas_y", "canvas_y_topleft"),
            ("canvas_x", "canvas_x_topleft"),
            ("total_correlations", "total_correlations"),
        ):
            assert columns[ours][own].tolist() == [int(row[theirs]) for row in rows]
        for ours, theirs in (
            ("mip", "mip"),
            ("scaled_mip", "scaled_mip"),
            ("psi", "psi"),
            ("theta", "theta"),
            ("phi", "phi"),
            ("relative_defocus", "relative_defocus"),
            ("correlation_mean", "correlation_mean"),
            ("correlation_std", "correlation_variance"),
        ):
            expected = [float(row[theirs]) for row in rows]
            np.testing.assert_allclose(columns[ours][own], expected, rtol=2e-5, atol=2e-6)


@needs_real
def test_a_particle_seen_twice_is_reported_once(real):
    """Leopard-EM's table names the planted particle of every peak."""
    by_place = {
        (row["exposure"], row["pos_y"], row["pos_x"]): row["truth_id"] for row in leopards_peaks()
    }
    table = find_peaks(real / "earliest.zarr", same_angle=30)
    seen = [
        by_place[exposure, str(y), str(x)]
        for exposure, y, x in zip(
            *(table.columns[n] for n in ("exposure", "pos_y", "pos_x")), strict=True
        )
    ]
    truth = [row["truth_id"] for row in leopards_peaks()]
    assert sorted(seen) == sorted(set(truth))
    twice = {text for text in truth if truth.count(text) > 1}
    named = [number for number, text in enumerate(table.columns["also_seen"]) if text]
    assert {seen[number] for number in named} == twice
    assert len(twice) == 2
    for number in named:  # the earliest acquired is reported
        other = str(table.columns["also_seen"][number]).split(":")[0]
        assert table.columns["exposure"][number] < other


@needs_real
@pytest.mark.parametrize("overlap", ["earliest", "max-zscore"])
def test_the_cutoff_of_a_montage_counts_what_could_be_shown(real, overlap):
    table = find_peaks(real / f"{overlap}.zarr", per="montage")
    shown = int((ocelot_em.open_merged(real / f"{overlap}.zarr").source_exposure >= 0).sum())
    pixels = 3 * 265 * 297 if overlap == "max-zscore" else shown
    assert shown < 3 * 265 * 297
    assert table.about.cutoff == pytest.approx(gaussian_cutoff(pixels, 26496), abs=1e-12)
    maps = ocelot_em.open_merged(real / f"{overlap}.zarr")
    at = table.columns["canvas_y"], table.columns["canvas_x"]
    np.testing.assert_array_equal(maps.scaled_mip.values[at], table.columns["scaled_mip"])
    ids = np.array(maps.attrs["exposures"])[maps.source_exposure.values[at]]
    np.testing.assert_array_equal(ids, table.columns["exposure"])


@needs_real
def test_the_command_line_picks_and_exports_one_exposure(real, tmp_path, capsys):
    store, output = str(real / "earliest.zarr"), str(tmp_path / "P.csv")
    assert run(["peaks", store, "--output", output, "--same-angle", "30"]) == 0
    assert "30 particles, gaussian cutoff 6.1161 per exposure" in capsys.readouterr().out
    table = ParticleTable.read_csv(output)
    assert_equal(table, find_peaks(store, same_angle=30))
    assert len(table.of_exposure("01")) == int((table.columns["exposure"] == "01").sum()) > 0
    parquet = str(tmp_path / "P.parquet")
    arguments = ["export", store, "--to", "parquet", "--particles", output, "--output", parquet]
    assert run([*arguments, "--exposure", "02"]) == 0
    star = str(tmp_path / "P.star")
    config = str(REAL.parent / "leopard_em_shards/A_official_config.yaml")
    optics = ["--optics", config, "--template-box", "40"]
    assert run(["export", store, "--to", "relion", "--output", star, *optics]) == 2
    assert "take one exposure's with --exposure ID" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["earliest", "max-zscore", "farthest-from-edge"])
def tiled(request, tmp_path_factory) -> list[Path]:
    """One montage merged in one tile and in many."""
    folder = tmp_path_factory.mktemp("tiled")
    search = write_shots(folder / "RUN.zarr", SHOTS)
    outputs = [folder / "ONE.zarr", folder / "MANY.zarr"]
    for output, size in zip(outputs, (1024, 17), strict=True):
        ocelot_em.merge(search, output, tile_size=size, overlap=request.param)
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"cutoff": 0.5},
        {"cutoff": 2.5, "per": "montage"},
        {"cutoff": -0.5, "same_distance": 3.0},
        {"false_positives": 60.0},
        {"false_positives": 60.0, "per": "montage"},
        {"method": "pvalue", "cutoff": 1.0},
        {"method": "pvalue", "cutoff": 1.5, "per": "montage"},
    ],
)
def test_particles_do_not_depend_on_tiles(tiled, options):
    tables = [find_peaks(output, same_angle=90, **options) for output in tiled]
    assert_equal(*tables)
    assert len(tables[0]) > 0


def test_an_exposures_particles_are_those_of_it_alone(tmp_path):
    """Also where another exposure is shown, and between pixels across the edges of tiles."""
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=14)
    table = find_peaks(tmp_path / "OUT.zarr", cutoff=6.0, same_distance=0)
    for shot in SHOTS:
        merged_alone(tmp_path, shot, valid_only=True)
        alone = find_peaks(tmp_path / f"{shot.id}_merged.zarr", cutoff=6.0)
        assert len(alone) > 0
        assert_equal(table.of_exposure(shot.id), alone)


CROWDED = [
    Shot("one", (0, 0), 0, (256, 256), (256, 256), (40_000,)),
    Shot("two", (30, 30), 1, (256, 256), (256, 256), (40_000,)),
]
"""Exposures with far more pixels above the level of the candidates than records can hold."""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A crowded montage by the size of its tiles, and its exposures merged alone."""
    folder = tmp_path_factory.mktemp("crowded")
    search = write_shots(folder / "RUN.zarr", CROWDED)
    for size in (64, 512):
        ocelot_em.merge(search, folder / f"{size}.zarr", tile_size=size)
    for shot in CROWDED:
        merged_alone(folder, shot)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cutoff": 4.0},
        {"cutoff": "lowest kept"},
        {"method": "pvalue"},
        {"method": "gev", "false_positives": 200.0},
    ],
)
def test_no_particle_is_lost_where_records_are_full(crowded, options):
    """Also where another exposure is shown: those of each exposure are those of it alone."""
    if options.get("cutoff") == "lowest kept":
        merged = MergedResult.open(crowded / "64.zarr")
        z = merged.candidates(merged.plan.exposures[0]).rows[:, CANDIDATE_FIELDS.index(SCALED_MIP)]
        options = {"cutoff": float(z.min())}
    tables = [find_peaks(crowded / f"{n}.zarr", same_distance=0, **options) for n in (64, 512)]
    for shot in CROWDED:
        alone = find_peaks(crowded / f"{shot.id}_merged.zarr", **options)
        assert len(alone) > 50
        for table in tables:
            assert_equal(table.of_exposure(shot.id), alone)
            assert table.about.incomplete_exposures == ()


def test_particles_that_may_be_missing_are_announced(crowded, tmp_path, capsys, caplog):
    for name in ("64", "512"):
        shutil.copytree(crowded / f"{name}.zarr", tmp_path / f"{name}.zarr")
    for size in (64, 512):
        objects = open_objects(tmp_path / f"{size}.zarr")
        attributes = read_attributes(objects)
        plan = json.dumps(attributes.plan).replace(str(crowded), str(tmp_path / "GONE"))
        moved = attributes.model_copy(update={"plan": json.loads(plan)})
        update_attributes(objects, "", dump_attributes(moved))
    table = find_peaks(tmp_path / "64.zarr")
    assert table.about.incomplete_exposures == ("one", "two")
    assert "incomplete where others are shown: exposures one, two" in repr(table)
    assert "exposure two: weak candidates are missing where other" in caplog.text
    assert run(["peaks", str(tmp_path / "64.zarr"), "--output", str(tmp_path / "P.csv")]) == 0
    assert "incomplete where others are shown: exposures one, two" in capsys.readouterr().out
    assert find_peaks(tmp_path / "512.zarr", cutoff=9.0).about.incomplete_exposures == ()


def test_the_cutoff_of_an_exposure_counts_its_searched_pixels(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    for overlap in ("earliest", "max-zscore"):
        ocelot_em.merge(search, tmp_path / f"{overlap}.zarr", overlap=overlap)
        merged = MergedResult.open(tmp_path / f"{overlap}.zarr")
        cutoffs = dict(find_peaks(merged).about.exposure_cutoffs)
        assert merged.statistics.searched_pixels < merged.statistics.valid_pixels
        for about, exposure in zip(SHOTS, merged.statistics.exposures, strict=True):
            assert cutoffs[about.id] == gaussian_cutoff(exposure.searched_pixels, sum(about.counts))
        name = "searched_pixels" if overlap == "max-zscore" else "shown_pixels"
        correlations = sum(
            getattr(exposure, name) * exposure.total_projections
            for exposure in merged.statistics.exposures
        )
        expected = gaussian_cutoff(correlations, 1)
        assert find_peaks(merged, per="montage").about.cutoff == expected


def test_statistics_of_exposures_are_of_all_their_pixels(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=19)
    ocelot_em.merge(search, tmp_path / "ONE.zarr")
    maps = ocelot_em.open_merged(tmp_path / "OUT.zarr")
    merged = MergedResult.open(tmp_path / "OUT.zarr")
    total = merged.summary
    assert total.attributes.valid_pixels == sum(np.prod(s.valid_shape) for s in SHOTS)
    rounded = {"sources", "exposures"}  # sums of floats
    at_once = MergedResult.open(tmp_path / "ONE.zarr").statistics.model_dump(exclude=rounded)
    assert total.attributes.model_dump(exclude=rounded) == at_once
    for number, shot in enumerate(SHOTS):
        own = merged.summary_of(merged.plan.exposures[number])
        z = merged_alone(tmp_path, shot)["scaled_mip"][: shot.valid_shape[0], : shot.valid_shape[1]]
        assert own.attributes.searched_pixels == int(np.isfinite(z).sum())
        assert own.attributes.scaled_mip_range == (np.nanmin(z), np.nanmax(z))
        assert own.histograms.z.sum() == own.attributes.searched_pixels
        shown = total.attributes.exposures[number]
        own_z = maps.scaled_mip.values[maps.source_exposure.values == number]
        own_z = own_z[np.isfinite(own_z)].astype(np.float64)
        assert shown.shown_pixels == own_z.size
        sums = [s.pixels * (s.mean or 0) for s in (shown.alone, shown.overlap)]
        assert sum(sums) == pytest.approx(own_z.sum(), rel=1e-9)


@expensive
@given(st.integers(-6, 6), st.integers(-6, 6))
def test_an_exposure_on_top_of_another_adds_no_particle(tmp_path_factory, dy, dx):
    """The same maps at the same place: everything is seen twice, and reported once."""
    folder = tmp_path_factory.mktemp("twice")
    one = Shot("one", (dy, dx), 0, (20, 22), (20, 22), (40,))
    search = write_shots(folder / "RUN.zarr", [one])
    maps = one.results()
    exposure = ocelot_em.Exposure("two", (dy, dx), 1, (20, 22))
    info = ocelot_em.SearchInfo(pixel_size_angstrom=2.0, exposure=exposure)
    ocelot_em.write_partial(search, "gpu0", maps[0], total_projections=40, search=info)
    ocelot_em.merge(search, folder / "OUT.zarr", tile_size=12)
    table = find_peaks(folder / "OUT.zarr", cutoff=4.2, min_distance=4.0)
    assert len(table) > 0
    assert set(table.columns["exposure"]) == {"one"}
    assert all(text.startswith("two:") for text in table.columns["also_seen"])
    both = find_peaks(folder / "OUT.zarr", cutoff=4.2, min_distance=4.0, same_distance=0)
    assert len(both) == 2 * len(table)


def test_one_exposures_particles_are_those_of_a_micrograph(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    own = find_peaks(tmp_path / "OUT.zarr", cutoff=0.0).of_exposure("late")
    assert not own.is_of_montage
    assert own.about.valid_shape == SHOTS[0].valid_shape
    with pytest.raises(InvalidInputError, match="expected particles of a montage"):
        own.of_exposure("late")
