"""The demonstration: simulate a search, merge it, compare with the truth, plot and report."""

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ocelot_em.errors import OutputExistsError
from ocelot_em.merge.outcome import MergeReport
from ocelot_em.merge.result import MergedResult
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.run.api import Observer, merge
from ocelot_em.testing.recovery import Recovery, compare_with_truth
from ocelot_em.testing.simulation import Simulation, simulate

DEMO = Simulation(shape=(1024, 1280), n_partials=4, n_particles=60, seed=20)


@dataclass(frozen=True)
class DemoResult:
    """Result of the demonstration.

    ``cutoff`` is the z-score that noise is expected to exceed once. ``picture`` and ``page`` are
    None without matplotlib.
    """

    report: MergeReport
    cutoff: float
    recovery: Recovery
    picture: Path | None
    page: Path | None


def demo(
    directory: str | PathLike[str], observer: Observer, say: Callable[[str], None]
) -> DemoResult:
    """Run the demonstration in its own directory, replacing an earlier demonstration."""
    place = Path(directory)
    mark = place / ".ocelot-demo"
    if place.exists() and any(place.iterdir()) and not mark.exists():
        raise OutputExistsError(f"{place}: expected nothing or an earlier demo, got other files")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    mark.touch()
    height, width = DEMO.shape
    say(
        f"simulating {DEMO.n_partials} devices' results of {height} x {width} pixels with "
        f"{DEMO.n_particles} particles"
    )
    search = simulate(place, DEMO, n_threads=2)
    report = merge(search, place / "MERGED.zarr", observer=observer)
    merged = MergedResult.open(report.output)
    cutoff = gaussian_cutoff(math.prod(merged.valid_shape), merged.projections_per_pixel)
    recovery = compare_with_truth(DEMO.truth, lambda name, r: merged.read(r, name), cutoff)
    picture = page = None
    if importlib.util.find_spec("matplotlib") is not None:
        from ocelot_em.view.report import save_overview, write_report

        picture = place / "zscore.png"
        save_overview(merged, picture, cutoff=cutoff, truth=DEMO.truth)
        page = write_report(merged, place / "report.html")
    return DemoResult(report, cutoff, recovery, picture, page)
