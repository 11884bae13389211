"""Partials that are out of line are named."""

from types import SimpleNamespace

import numpy as np
import pytest

import ocelot_em
from helpers import make_result
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.histograms import Z_AXIS, Histogram1D
from ocelot_em.particles.quality import montage_warnings, partial_warnings, picking_warnings
from ocelot_em.particles.table import COLUMNS, ParticleTable
from ocelot_em.store.partials import write_partial
from ocelot_em.store.statistics_attributes import SourceStatistics

SHAPE, COUNTS = (120, 130), (1000, 2000, 1500)


def search_of(rng, counts=COUNTS):
    """Devices whose maxima follow from how much they searched."""
    results = []
    for count in counts:
        result = make_result(rng, SHAPE, count)
        draws = rng.random(SHAPE) ** (1 / count)
        result["mip"] = np.float32(-np.log(-np.log(draws)))
        result["correlation_sum"] = (count * rng.normal(0, 0.05, SHAPE)).astype(np.float32)
        result["correlation_squared_sum"] = np.full(SHAPE, count, np.float32)
        results.append(result)
    return results


def words(place, results, counts=COUNTS):
    for number, (result, count) in enumerate(zip(results, counts, strict=True)):
        write_partial(place / "RUN.zarr", f"gpu{number}", result, total_projections=count)
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", threads=2)
    return partial_warnings(MergedResult.open(place / "OUT.zarr").statistics)


def test_nothing_is_said_of_a_sound_search(tmp_path, rng):
    assert words(tmp_path, search_of(rng)) == []


def test_a_wrong_count(tmp_path, rng):
    warnings = words(tmp_path, search_of(rng), (1000, 4000, 1500))
    assert any(
        "Input gpu1: the correlations of gpu1 have a root mean square of 0.70" in s
        for s in warnings
    )
    assert any(s.startswith("Partial gpu1 won") and "fewer" in s for s in warnings)


def test_a_share_that_was_searched_twice(tmp_path, rng):
    results = search_of(rng)
    warnings = words(tmp_path, [*results, results[1]], (*COUNTS, COUNTS[1]))
    assert any(s.startswith("Input gpu3 has the same sums as gpu1") for s in warnings)
    assert any(s.startswith("Partial gpu3 won no pixel") for s in warnings)


def test_a_device_with_other_correlations(tmp_path, rng):
    results = search_of(rng)
    results[2]["correlation_sum"] += np.float32(0.3 * COUNTS[2])
    results[2]["mip"] += 5
    warnings = words(tmp_path, results)
    assert any(
        s.startswith("Input gpu2: the correlations of gpu2 have a mean of 0.3") for s in warnings
    )
    assert any(s.startswith("Partial gpu2 won") and "more" in s for s in warnings)


def correlations(rng, n_orientations=200, edge=64):
    """Correlations of neighbouring projections of a random particle with a noisy image."""
    atoms, axis = rng.normal(0, rng.uniform(1.5, 3.5), (30, 3)), np.arange(17) - 8
    k = np.hypot(np.fft.fftfreq(edge)[:, None], np.fft.rfftfreq(edge))
    image = np.fft.rfft2(rng.normal(size=(edge, edge))) * (1 + 0.15 * np.cos(12 * k))
    templates = []
    for number in range(n_orientations):
        theta, phi = np.divmod(number, 20) * np.array([np.pi * 20 / n_orientations, np.pi / 10])
        (c, s), (cp, sp) = (np.cos([a, a - np.pi / 2]) for a in (theta, phi))
        y, x = np.array([[cp * c, sp * c, -s], [-sp, cp, 0]]) @ atoms.T
        distance = ((axis[:, None] - y) ** 2)[:, None] + (axis[:, None] - x) ** 2
        template = np.exp(-distance / 2.4).sum(axis=-1)
        template -= template.mean()
        templates.append(template / np.sqrt((template**2).sum()))
    spectra = np.fft.rfft2(templates, (edge, edge))
    return np.fft.irfft2(image * spectra.conj(), (edge, edge))


def source_of(name, share, count):
    """What a merge collects of a share's correlations, if this count is given."""
    mean, squares = share.sum(axis=0) / count, (share**2).sum(axis=0) / count
    return SourceStatistics(
        name=name,
        total_projections=count,
        mean=float(mean.mean()),
        mean_spread=float(mean.std()),
        std=float(np.sqrt(max((squares - mean**2).mean(), 0))),
    )


def statistics_of(shares, counts):
    each = enumerate(zip(shares, counts, strict=True))
    sources = tuple(source_of(f"p{k}", share, count) for k, (share, count) in each)
    return SimpleNamespace(partials=(), sources=sources)


def test_fair_shares_of_any_size_give_no_warning(rng):
    """Also those of a few similar projections, in which the standard deviation is low."""
    for _ in range(4):
        searched = correlations(rng)
        for n_shares in np.repeat([2, 2, 3, 4, 8], 10).tolist():
            ends = np.sort(rng.choice(np.arange(1, 200), n_shares - 1, replace=False))
            shares = np.split(searched, ends)
            assert partial_warnings(statistics_of(shares, [len(s) for s in shares])) == []


@pytest.mark.parametrize("n_shares", [2, 3, 4, 8])
@pytest.mark.parametrize("factor", [0.97, 1.03, 1.1, 2.0])
def test_a_count_that_is_wrong_by_a_few_percent_is_noticed(rng, n_shares, factor):
    """Of shares as large as those of real searches, whose root mean squares differ by 0.1 %."""
    for _ in range(20):
        counts = rng.integers(9_000, 10**7, n_shares).tolist()
        squares = rng.uniform(0.999, 1.001, n_shares)
        fair = [
            SourceStatistics(
                name=f"p{k}", total_projections=n, mean=0.0, mean_spread=0.1, std=float(rms)
            )
            for k, (n, rms) in enumerate(zip(counts, squares, strict=True))
        ]
        assert partial_warnings(SimpleNamespace(partials=(), sources=tuple(fair))) == []
        wrong = int(rng.integers(n_shares))
        unfair = list(fair)
        unfair[wrong] = fair[wrong].model_copy(
            update={
                "total_projections": round(factor * counts[wrong]),
                "mean_spread": 0.1 / factor,
                "std": float(np.sqrt((squares[wrong] ** 2 + 0.01) / factor - 0.01 / factor**2)),
            }
        )
        (warnings,) = partial_warnings(SimpleNamespace(partials=(), sources=tuple(unfair)))
        assert warnings.startswith("Input p0 or p1: " if n_shares == 2 else f"Input p{wrong}: ")


@pytest.mark.parametrize("counts", [(0,), (5,)])
def test_one_partial_or_none_that_searched(tmp_path, rng, counts):
    results = search_of(rng, (5,))
    if counts == (0,):
        results[0]["mip"][...] = -np.inf
        results[0]["correlation_sum"][...] = results[0]["correlation_squared_sum"][...] = 0
    assert words(tmp_path, results, counts) == []


def montage_words(place, shots, **options):
    """What is said of exposures, given as places and results of devices, with their counts."""
    for number, (origin, results, counts) in enumerate(shots):
        info = ocelot_em.SearchInfo(exposure=ocelot_em.Exposure(f"e{number}", origin, number))
        for k, (result, count) in enumerate(zip(results, counts, strict=True)):
            write_partial(
                place / "RUN.zarr", f"gpu{k}", result, total_projections=count, search=info
            )
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", threads=2, **options)
    merged = MergedResult.open(place / "OUT.zarr")
    return montage_warnings(merged.statistics, merged.statistics_of_exposures)


def beside(rng, counts=COUNTS, n=3):
    """Exposures that overlap by 40 columns."""
    return [((0, 90 * k), search_of(rng, counts), counts) for k in range(n)]


@pytest.mark.parametrize("overlap", ["earliest", "farthest-from-edge"])
def test_nothing_is_said_of_a_sound_montage(tmp_path, rng, overlap):
    assert montage_words(tmp_path, beside(rng), overlap=overlap) == []


def test_the_highest_of_several_leaves_seams(tmp_path, rng):
    (warnings,) = montage_words(tmp_path, beside(rng), overlap="max-zscore")
    assert warnings.startswith("Visible seams: the z-scores have a mean of ")
    assert warnings.endswith("(the highest of several values is higher).")


def test_a_partial_is_compared_with_those_of_its_exposure(tmp_path, rng):
    shots = beside(rng)
    origin, results, counts = shots[1]
    shots[1] = origin, results, (counts[0], 2 * counts[1], counts[2])
    warnings = montage_words(tmp_path, shots)
    assert any(text.startswith("Exposure e1: input gpu1: ") for text in warnings)
    assert not any(text.startswith(("Exposure e0: ", "Exposure e2: ")) for text in warnings)


def test_an_exposure_that_stands_out(tmp_path, rng):
    shots = beside(rng, n=4)
    for result in shots[2][1]:
        result["mip"] = result["mip"] + np.float32(1.0)
    warnings = montage_words(tmp_path, shots)
    assert [text.partition(": its")[0] for text in warnings if "unusual" in text] == [
        "Exposure e2: unusual"
    ]


def test_exposures_that_searched_more_may_be_higher(tmp_path, rng):
    """The highest of more correlations is higher; that is no fault."""
    shots = beside(rng)
    many = tuple(20 * count for count in COUNTS)
    shots.append(((0, 400), search_of(rng, many), many))
    assert not any("unusual" in text for text in montage_words(tmp_path, shots))


def test_particles_with_the_z_scores_of_noise_are_named():
    histogram = Histogram1D(Z_AXIS, np.histogram(np.linspace(0, 5, 100_000), Z_AXIS.edges)[0])
    columns = {name: np.zeros(3, column.dtype) for name, column in COLUMNS.items()}
    columns["scaled_mip"] = np.array([9, 4.5, 4.1], np.float32)
    (warning,) = picking_warnings(ParticleTable(columns), histogram)
    assert "2 of 3 particles have z-scores of 4.10 to 4.50" in warning
    columns["scaled_mip"][:] = 4.97
    assert not picking_warnings(ParticleTable(columns), histogram)
    assert not picking_warnings(ParticleTable.empty(), histogram)
