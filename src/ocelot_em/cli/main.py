"""The command ``ocelot``, which only parses, prints and exits."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ocelot_em import __version__
from ocelot_em.cli.config_file import add_config_option, parse_arguments
from ocelot_em.cli.exit_codes import DONE, EXIT_CODES, FAILED, INTERRUPTED, REFUSED, STOPPED
from ocelot_em.cli.import_commands import import_files
from ocelot_em.cli.info_command import info
from ocelot_em.cli.merge_command import merge_stores
from ocelot_em.cli.particle_commands import (
    MAP_FORMATS,
    TABLE_FORMATS,
    export,
    peaks,
    report,
    view_map,
)
from ocelot_em.cli.picking_options import add_optics, add_picking
from ocelot_em.errors import OcelotError, StoppedError, TilesFailedError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    try:
        parsed = parse_arguments(parser, arguments)
    except OcelotError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        return REFUSED
    # Set the level of the handler: Dask sets the levels of its loggers when it is imported.
    handler = logging.StreamHandler()
    handler.setLevel(logging.DEBUG if parsed.verbose else logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(levelname)s %(name)s: %(message)s")
    # Failed tiles are reported once, at the end.
    logging.getLogger("ocelot_em.merge.merge").setLevel(
        logging.DEBUG if parsed.verbose else logging.CRITICAL
    )
    console = Console(highlight=False, soft_wrap=True)
    command: Callable[[argparse.Namespace, Console], int] = parsed.command
    try:
        return command(parsed, console)
    except TilesFailedError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        return FAILED
    except StoppedError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        return STOPPED
    except OcelotError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("ocelot: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed our output; without this, Python reports an error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ocelot",
        description="Merge the partial results of cryo-EM 2D template matching, out of core.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ocelot-em {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    p = commands.add_parser(
        "import",
        help="convert result files into a search",
        description="One .npz or .pt file of each device; or the description of a montage's "
        "exposures (.yaml); or what a finished search has left: one folder of Leopard-EM's MRC "
        "files, or its HDF5 file.",
        allow_abbrev=False,
    )
    p.add_argument("files", nargs="+", metavar="FILE", help="one per device, in order")
    p.add_argument("--output", required=True, metavar="RUN.zarr", help="path or URL of the search")
    p.add_argument("--search-space", metavar="FILE", help="tables of an indexed search (.npz, .pt)")
    p.add_argument(
        "--template-box",
        type=int,
        metavar="N",
        help="edge of the template box in pixels, for maps of the micrograph's shape",
    )
    p.add_argument(
        "--pixel-size", type=float, metavar="ANGSTROM", help="pixel size of the micrograph"
    )
    p.add_argument(
        "--total-projections",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="cross-correlations of each file, where the files do not say",
    )
    p.add_argument("--prefix", default="", help="of the names of MRC files, as in output_mip.mrc")
    p.add_argument(
        "--pixel-size-offset",
        type=float,
        metavar="ANGSTROM",
        help="of a finished search, whose files do not say it: 0 if it was not varied",
    )
    p.set_defaults(command=import_files)

    p = commands.add_parser(
        "merge",
        help="merge the partials of searches, tile by tile; again: go on",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("inputs", nargs="+", metavar="RUN.zarr", help="searches or earlier merges")
    p.add_argument("--output", required=True, metavar="OUT.zarr", help="path or URL of the result")
    p.add_argument(
        "--cluster",
        default="threads",
        metavar="threads|local|cuda|slurm|slurm-job|ADDRESS",
        help="where tiles are merged (default: threads of this process; cuda: a worker per GPU; "
        "slurm: jobs are submitted; slurm-job: the tasks of this job)",
    )
    p.add_argument(
        "--workers", type=int, metavar="N", help="worker processes of 'local', 'cuda'; jobs"
    )
    p.add_argument("--threads", type=int, metavar="N", help="threads in each worker")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what does the arithmetic (default: auto: GPUs if all workers have one)",
    )
    p.add_argument(
        "--rmm-pool-size",
        metavar="SIZE",
        help="GPU memory that each worker of 'cuda' takes at once",
    )
    p.add_argument(
        "--tile-size", type=int, metavar="N", help="edge of a tile in pixels (default: 1024)"
    )
    p.add_argument("--memory-limit", metavar="SIZE", help="most memory of a worker, as in 800MB")
    p.add_argument(
        "--nan",
        choices=("raise", "mask"),
        default="raise",
        help="NaN in a partial: an error, or leave the partial out at these pixels",
    )
    p.add_argument(
        "--poses",
        choices=("decoded", "index"),
        default="decoded",
        help="of indexed poses: store the pose maps, too, or only the index (faster, smaller)",
    )
    p.add_argument(
        "--overlap",
        choices=("earliest", "max-zscore", "farthest-from-edge"),
        default="earliest",
        help="of a montage: which exposure wins a pixel (default: the earliest acquired)",
    )
    p.add_argument(
        "--erode",
        type=int,
        default=0,
        metavar="PX",
        help="leave so wide an edge of every exposure out",
    )
    p.add_argument(
        "--origins",
        choices=("exact", "round"),
        default="exact",
        help="refuse origins of exposures that are not whole pixels, or round them",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing merged result")
    p.add_argument(
        "--worker-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait while a cluster has no workers (default: 300; slurm: a day)",
    )
    p.add_argument(
        "--tls",
        action="store_true",
        help="encrypt what driver, scheduler and workers say, with certificates",
    )
    p.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what jobs of 'slurm' ask for: partition, account, walltime, cores, processes, "
        "memory, interface, directives, log_directory",
    )
    p.add_argument("--log", metavar="FILE", help="append a log in JSON lines; -: standard error")
    p.add_argument(
        "--run-folder",
        metavar="DIR",
        help="keep configuration, versions, log, performance, statistics and report there",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.set_defaults(command=merge_stores)

    p = commands.add_parser("peaks", help="pick particles from a merged result", allow_abbrev=False)
    p.add_argument("store", metavar="MERGED.zarr")
    p.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help=".csv, .parquet, or .star (RELION; needs --optics)",
    )
    add_picking(p)
    add_optics(p)
    p.set_defaults(command=peaks)

    p = commands.add_parser(
        "export", help="write maps or particles for other programs", allow_abbrev=False
    )
    p.add_argument("store", metavar="MERGED.zarr")
    p.add_argument("--to", required=True, choices=(*MAP_FORMATS, *TABLE_FORMATS), help="what for")
    p.add_argument("--output", required=True, metavar="PLACE", help="file, or folder")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    p.add_argument("--prefix", default="", help="of the names of MRC files, as in output_mip.mrc")
    p.add_argument("--exposure", metavar="ID", help="of a montage: only particles of this one")
    p.add_argument(
        "--maps", metavar="FOLDER", help="of the MRC files that Leopard-EM's table shall name"
    )
    p.add_argument(
        "--particles", metavar="FILE", help=".csv or .parquet that 'peaks' wrote (default: pick)"
    )
    add_picking(p)
    add_optics(p)
    p.set_defaults(command=export)

    p = commands.add_parser(
        "report", help="one HTML page to judge a merged result by", allow_abbrev=False
    )
    p.add_argument("store", metavar="MERGED.zarr")
    p.add_argument("--output", required=True, metavar="FILE.html")
    add_picking(p)
    p.set_defaults(command=report)

    p = commands.add_parser(
        "view", help="show a picture (export --to ome-zarr) in a browser", allow_abbrev=False
    )
    p.add_argument("picture", metavar="PICTURE.ome.zarr")
    p.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1 (default: any)")
    p.set_defaults(command=view_map)

    p = commands.add_parser("info", help="say what a store is", allow_abbrev=False)
    p.add_argument("store", metavar="STORE")
    p.set_defaults(command=info)

    p = commands.add_parser("check", help="name everything that is wrong", allow_abbrev=False)
    p.add_argument("stores", nargs="+", metavar="STORE")
    p.set_defaults(command=_check)

    p = commands.add_parser(
        "doctor", help="try out an installation, a folder, a cluster", allow_abbrev=False
    )
    p.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler, to ask its workers")
    p.add_argument("--folder", default=".", metavar="DIR", help="of the stores (default: this one)")
    p.set_defaults(command=_doctor)

    p = commands.add_parser("simulate", help="make partial results of any size", allow_abbrev=False)
    p.add_argument("directory", metavar="DIR")
    p.add_argument("--shape", type=int, nargs=2, required=True, metavar=("H", "W"))
    p.add_argument("--partials", type=int, default=4, metavar="N")
    p.add_argument("--particles", type=int, default=50, metavar="K")
    p.add_argument("--seed", type=int, default=0, metavar="S")
    p.add_argument(
        "--form", choices=("explicit", "indexed"), default="explicit", help="form of the poses"
    )
    p.set_defaults(command=_simulate)

    p = commands.add_parser(
        "demo", help="simulate, merge, compare with the truth, save a picture", allow_abbrev=False
    )
    p.add_argument("--output", default="ocelot-demo", metavar="DIR", help="default: ocelot-demo")
    p.set_defaults(command=_demo)
    for command in commands.choices.values():
        add_config_option(command)
    return parser


def _check(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.view.inspection import check

    found_any = False
    for place in parsed.stores:
        problems = check(place)
        found_any |= bool(problems)
        console.print(
            f"{place}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}", markup=False
        )
        for problem in problems:
            console.print(f"  - {problem}", markup=False)
    return FAILED if found_any else DONE


def _doctor(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.cli.doctor import examine

    findings = examine(parsed.folder, parsed.cluster)
    marks = {"ok": "[green]✓", "warning": "[yellow]!", "problem": "[red]✗"}
    table = Table("", "check", "found")
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, Text(finding.says))
    console.print(table, soft_wrap=False)
    return FAILED if any(finding.state == "problem" for finding in findings) else DONE


def _simulate(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.model.maps import PoseForm
    from ocelot_em.testing.simulation import Simulation, simulate

    simulation = Simulation(
        shape=tuple(parsed.shape),
        n_partials=parsed.partials,
        n_particles=parsed.particles,
        seed=parsed.seed,
        form=PoseForm(parsed.form),
    )
    started = time.perf_counter()
    store = simulate(parsed.directory, simulation, n_threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    console.print(
        f"simulated {parsed.partials} partials of {parsed.shape[0]} x {parsed.shape[1]} pixels "
        f"with {parsed.particles} particles in {seconds:.1f} s: {store}; truth in "
        f"{store.parent / 'truth.csv'}",
        markup=False,
    )
    return DONE


def _demo(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.cli.demo import demo
    from ocelot_em.cli.terminal import MergeProgress, print_report

    with MergeProgress(console) as progress:
        result = demo(
            parsed.output, progress, lambda text: progress.console.print(text, markup=False)
        )
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
