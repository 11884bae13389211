"""The commands ``doctor``, ``simulate`` and ``demo``, which try things out."""

import os
import time
from typing import Literal

from rich.table import Table
from rich.text import Text

from ocelot_em.cli.console import open_console
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.parameters import PathOrUrl


def doctor(*, folder: PathOrUrl = ".", cluster: str | None = None) -> int:
    """Test an installation, a folder and a cluster.

    Parameters
    ----------
    folder
        Folder on the file system of the stores.
    cluster
        Address of a Dask scheduler whose workers are tested, too.
    """
    from ocelot_em.cli.doctor import examine

    findings = examine(folder, cluster)
    marks = {"ok": "[green]✓", "warning": "[yellow]!", "problem": "[red]✗"}
    table = Table("", "check", "found")
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, Text(finding.text))
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
) -> int:
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
    from ocelot_em.testing.simulation import Simulation, simulate

    simulation = Simulation(
        shape=shape, n_partials=partials, n_particles=particles, seed=seed, form=PoseForm(form)
    )
    started = time.perf_counter()
    store = simulate(directory, simulation, n_threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    open_console().print(
        f"simulated {partials} partials of {shape[0]} x {shape[1]} pixels with {particles} "
        f"particles in {seconds:.1f} s: {store}; truth in {store.parent / 'truth.csv'}",
        markup=False,
    )
    return DONE


def demo(*, output: PathOrUrl = "ocelot-demo") -> int:
    """Simulate, merge, compare with the truth, save a picture.

    Parameters
    ----------
    output
        Folder to write to.
    """
    from ocelot_em.cli.demo import demo
    from ocelot_em.cli.terminal import MergeProgress, print_report

    console = open_console()
    with MergeProgress(console) as progress:
        result = demo(output, progress, lambda text: progress.console.print(text, markup=False))
    print_report(console, result.report)
    r = result.recovery
    console.print(
        f"of {r.n} planted particles {r.found} are above the cutoff z = {result.cutoff:.2f}, "
        f"{r.pose_right} of them with the planted pose"
    )
    console.print(
        f"picture: {result.picture}, report: {result.page}"
        if result.picture
        else "no picture: pip install 'ocelot-em[viz]' for the matplotlib that it needs",
        markup=False,
    )
    console.print(f"look at it with: ocelot info {result.report.output}", markup=False)
    return DONE if r.found == r.n else FAILED
