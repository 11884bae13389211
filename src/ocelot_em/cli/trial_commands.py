"""The commands ``doctor``, ``simulate`` and ``demo``, which try things out."""

import os
import time
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from ocelot_em.cli.console import open_console
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.parameters import PathOrUrl

DEMO: dict[str, Any] = {"shape": (1024, 1280), "n_partials": 4, "n_particles": 60, "seed": 20}
"""The search that the demonstration simulates."""


def doctor(*, folder: PathOrUrl = ".", cluster: str | None = None) -> int:
    """Test an installation, a folder and a cluster.

    Parameters
    ----------
    folder
        Folder on the file system of the stores.
    cluster
        Cluster to test, too: the address of a Dask scheduler, whose workers are tested, or slurm,
        whose partitions are shown. Default: none.
    """
    from ocelot_em.cli.doctor import examine

    findings = examine(folder, cluster)
    marks = {"ok": ("✓", "green"), "absent": ("–", "dim")}
    marks |= {"warning": ("!", "yellow"), "problem": ("✗", "red")}
    table = Table("", "check", "found")
    for finding in findings:
        table.add_row(Text(*marks[finding.state]), finding.name, finding.text)
    open_console().print(table, soft_wrap=False)
    return FAILED if any(finding.state == "problem" for finding in findings) else DONE


def simulate(
    directory: PathOrUrl,
    /,
    *,
    shape: tuple[int, int],
    partials: int = 4,
    particles: int = 50,
    seed: int = 0,
    form: Literal["explicit", "indexed"] = "explicit",
) -> None:
    """Make the partial results of a search, and the truth.

    Parameters
    ----------
    directory
        Folder to write to.
    shape
        Height and width in pixels.
    partials
        Number of partial results.
    particles
        Number of planted particles.
    seed
        Seed of the random numbers.
    form
        Form of the poses.
    """
    from ocelot_em.model.maps import PoseForm
    from ocelot_em.model.text import seconds_text
    from ocelot_em.testing.simulation import Simulation, simulate

    simulation = Simulation(
        shape=shape, n_partials=partials, n_particles=particles, seed=seed, form=PoseForm(form)
    )
    started = time.perf_counter()
    store = simulate(directory, simulation, n_threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    open_console().print(
        f"simulated {partials} partials of {shape[0]} x {shape[1]} pixels with {particles} "
        f"particles in {seconds_text(seconds)}: {store}; truth in {store.parent / 'truth.csv'}"
    )


def demo(*, output: PathOrUrl = "ocelot-demo") -> int:
    """Simulate, merge, compare with the truth, save a picture.

    Parameters
    ----------
    output
        Folder to write to.
    """
    import math
    import shutil
    from importlib.util import find_spec

    from ocelot_em.cli.terminal import MergeProgress, print_report
    from ocelot_em.errors import OutputExistsError
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.gaussian import gaussian_cutoff
    from ocelot_em.run.api import merge
    from ocelot_em.testing.recovery import compare_with_truth
    from ocelot_em.testing.simulation import Simulation, simulate

    folder, console = Path(output), open_console()
    mark = folder / ".ocelot-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise OutputExistsError(f"{folder}: expected nothing or an earlier demo, got other files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()
    planted = Simulation(**DEMO)
    console.print(
        f"simulating {planted.n_partials} devices' results of {planted.shape[0]} x "
        f"{planted.shape[1]} pixels with {planted.n_particles} particles"
    )
    search = simulate(folder, planted, n_threads=2)
    with MergeProgress(console) as progress:
        report = merge(search, folder / "MERGED.zarr", observer=progress)
    print_report(console, report)
    merged = MergedResult.open(report.output)
    cutoff = gaussian_cutoff(math.prod(merged.valid_shape), merged.projections_per_pixel)
    found = compare_with_truth(planted.truth, lambda name, r: merged.read(r, name), cutoff)
    console.print(
        f"of {found.n} planted particles {found.found} are above the cutoff z = {cutoff:.2f}, "
        f"{found.pose_right} of them with the planted pose"
    )
    if find_spec("matplotlib") is None:
        console.print("no picture: pip install 'ocelot-em[viz]' for the matplotlib that it needs")
    else:
        from ocelot_em.view.report import save_overview, write_report

        picture = folder / "zscore.png"
        save_overview(merged, picture, cutoff=cutoff, truth=planted.truth)
        page = write_report(merged, folder / "report.html")
        console.print(f"picture: {picture}, report: {page}")
    console.print(f"look at it with: ocelot info {report.output}")
    return DONE if found.found == found.n else FAILED
