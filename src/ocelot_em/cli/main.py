"""The command ``ocelot``: parses, prints, exits; nothing else."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from ocelot_em import __version__
from ocelot_em.cli.config_file import add_config_option, parse_arguments, write_config
from ocelot_em.errors import OcelotError, StoppedError, TilesFailedError

if TYPE_CHECKING:
    from ocelot_em.io.tables import Optics
    from ocelot_em.particles.table import ParticleTable
    from ocelot_em.run.api import Observer
    from ocelot_em.store.attributes import StatisticsAttributes
    from ocelot_em.view.inspection import StoreInfo

MAP_FORMATS = ("mrc", "hdf5", "ome-zarr")
TABLE_FORMATS = ("leopard", "relion", "cistem", "parquet")
"""What ``ocelot export`` writes for: maps, and particles."""

ROWS_SHOWN = 60
"""Of a table; the rest is counted."""

DONE, FAILED, REFUSED, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

EXIT_CODES = """\
exit codes:
  0    done
  1    failed: some tiles, or 'check' or 'doctor' found problems; the rest is kept
  2    refused: nothing was started
  75   stopped by SIGTERM or SIGUSR1, or the cluster was lost; the same command goes on
  130  interrupted; the same command goes on where it stopped
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = _parser()
    try:
        parsed = parse_arguments(parser, arguments)
    except OcelotError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        return REFUSED
    # The level is the handler's: Dask sets levels of its own loggers when it is imported.
    handler = logging.StreamHandler()
    handler.setLevel(logging.DEBUG if parsed.verbose else logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(levelname)s %(name)s: %(message)s")
    # Tiles that fail are reported once, at the end, in words.
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
        # The reader of our output has gone; Python would complain once more while closing it.
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
    p.set_defaults(command=_import)

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
    p.set_defaults(command=_merge)

    p = commands.add_parser("peaks", help="pick particles from a merged result", allow_abbrev=False)
    p.add_argument("store", metavar="MERGED.zarr")
    p.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help=".csv, .parquet, or .star (RELION; needs --optics)",
    )
    _add_picking(p)
    _add_optics(p)
    p.set_defaults(command=_peaks)

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
    _add_picking(p)
    _add_optics(p)
    p.set_defaults(command=_export)

    p = commands.add_parser(
        "report", help="one HTML page to judge a merged result by", allow_abbrev=False
    )
    p.add_argument("store", metavar="MERGED.zarr")
    p.add_argument("--output", required=True, metavar="FILE.html")
    _add_picking(p)
    p.set_defaults(command=_report)

    p = commands.add_parser(
        "view", help="show a picture (export --to ome-zarr) in a browser", allow_abbrev=False
    )
    p.add_argument("picture", metavar="PICTURE.ome.zarr")
    p.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1 (default: any)")
    p.set_defaults(command=_view)

    p = commands.add_parser("info", help="say what a store is", allow_abbrev=False)
    p.add_argument("store", metavar="STORE")
    p.set_defaults(command=_info)

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


def _add_picking(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--method",
        choices=("gaussian", "gev", "pvalue"),
        default="gaussian",
        help="how significance is judged (default: Gaussian noise)",
    )
    p.add_argument(
        "--false-positives",
        type=float,
        default=1.0,
        metavar="F",
        help="accepted in the whole map (default: 1)",
    )
    p.add_argument(
        "--cutoff",
        type=float,
        metavar="C",
        help="taken as it is, in the method's scale: z-score, or -ln p (default there: 8)",
    )
    p.add_argument(
        "--min-distance",
        type=float,
        default=5.0,
        metavar="PX",
        help="no two peaks are closer (default: 5)",
    )
    _add_montage_picking(p)


def _add_montage_picking(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--per",
        choices=("exposure", "montage"),
        default="exposure",
        help="of a montage: a cutoff for every exposure, or one for all that is shown "
        "(default: exposure)",
    )
    p.add_argument(
        "--same-distance",
        type=float,
        metavar="PX",
        help="peaks of several exposures so near are one particle (default: --min-distance)",
    )
    p.add_argument(
        "--same-angle",
        type=float,
        default=10.0,
        metavar="DEGREES",
        help="... if their orientations differ by at most this (default: 10)",
    )
    p.add_argument(
        "--same-defocus",
        type=float,
        default=500.0,
        metavar="ANGSTROM",
        help="... and their defoci by at most this (default: 500)",
    )


def _add_optics(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--optics", metavar="CONFIG.yaml", help="Leopard-EM's configuration of the search"
    )
    p.add_argument(
        "--template-box", type=int, metavar="N", help="edge of the template (default: its file's)"
    )


def _import(parsed: argparse.Namespace, console: Console) -> int:
    if any(Path(file).suffix.lower() in (".yaml", ".yml") for file in parsed.files):
        return _import_montage(parsed, console)
    if any(Path(file).is_dir() or Path(file).suffix in (".h5", ".hdf5") for file in parsed.files):
        return _import_finished(parsed, console)
    from ocelot_em.io.leopard import ImportOptions, import_results

    options = ImportOptions(
        search_space=parsed.search_space,
        template_box=parsed.template_box,
        pixel_size_angstrom=parsed.pixel_size,
        total_projections=parsed.total_projections,
    )
    with _share_bar(console) as tell:
        names = import_results(parsed.files, parsed.output, options, tell)
    console.print(
        f"imported {len(names)} partials into {parsed.output}: {', '.join(names)}", markup=False
    )
    if parsed.template_box is None:
        console.print(
            "all pixels are taken as valid; if the maps have the micrograph's shape, import with "
            "--template-box N"
        )
    return DONE


def _import_montage(parsed: argparse.Namespace, console: Console) -> int:
    """Import the exposures that a description names."""
    from ocelot_em.errors import InvalidInputError
    from ocelot_em.io.description import import_description

    elsewhere: dict[str, object] = {
        "search_space": None,
        "template_box": None,
        "pixel_size": None,
        "total_projections": [],
        "prefix": "",
        "pixel_size_offset": None,
    }
    given = [
        f"--{name.replace('_', '-')}"
        for name, default in elsewhere.items()
        if getattr(parsed, name) != default
    ]
    if len(parsed.files) > 1 or given:
        raise InvalidInputError(
            "import: expected one description of exposures (.yaml) that says everything else"
            + (f", got {', '.join(given)}, too" if given else f", got {len(parsed.files)} files")
        )
    with _share_bar(console) as tell:
        names = import_description(parsed.files[0], parsed.output, tell)
    exposures = {name.partition("/")[0] for name in names}
    console.print(
        f"imported {len(names)} partials of {len(exposures)} exposures into {parsed.output}",
        markup=False,
    )
    return DONE


def _import_finished(parsed: argparse.Namespace, console: Console) -> int:
    """Import what a finished search has left: MRC files or an HDF5 file."""
    from ocelot_em.errors import InvalidInputError
    from ocelot_em.io.hdf5 import import_hdf5
    from ocelot_em.io.leopard_maps import FinishedSearch
    from ocelot_em.io.mrc import import_mrc_set

    if len(parsed.files) > 1 or len(parsed.total_projections) > 1 or parsed.search_space:
        raise InvalidInputError(
            "import: expected one folder of MRC files, or one HDF5 file, with at most one count "
            "and no search space; import others with commands of their own"
        )
    place = Path(parsed.files[0])
    about = FinishedSearch(
        total_projections=parsed.total_projections[0] if parsed.total_projections else None,
        template_box=parsed.template_box,
        pixel_size_angstrom=parsed.pixel_size,
        pixel_size_offset_angstrom=parsed.pixel_size_offset,
    )
    with _share_bar(console) as tell:
        if place.is_dir():
            found = import_mrc_set(
                place, parsed.output, about, prefix=parsed.prefix, on_progress=tell
            )
        else:
            found = import_hdf5(place, parsed.output, about, on_progress=tell)
    console.print(f"imported {place} as partial {found.name} into {parsed.output}", markup=False)
    for note in found.notes:
        console.print(f"  - {note}", markup=False)
    return DONE


def _picked(parsed: argparse.Namespace) -> "ParticleTable":
    """Pick particles as the command line says, or read those that were."""
    table = _given_or_picked(parsed)
    exposure = getattr(parsed, "exposure", None)
    return table if exposure is None else table.of_exposure(exposure)


def _given_or_picked(parsed: argparse.Namespace) -> "ParticleTable":
    from ocelot_em.errors import InvalidInputError
    from ocelot_em.particles.picking import PickOptions, find_peaks
    from ocelot_em.particles.table import ParticleTable

    given = getattr(parsed, "particles", None)
    if given is None:
        options = {name: getattr(parsed, name) for name in PickOptions.model_fields}
        return find_peaks(parsed.store, **options)
    if Path(given).suffix == ".csv":
        return ParticleTable.read_csv(given)
    if Path(given).suffix == ".parquet":
        from ocelot_em.io.tables import read_parquet

        return read_parquet(given)
    raise InvalidInputError(f"{given}: expected a table that ends in .csv or .parquet")


def _optics(parsed: argparse.Namespace) -> "Optics | None":
    from ocelot_em.io.tables import Optics

    if parsed.optics is None:
        return None
    return Optics.from_leopard_yaml(parsed.optics, parsed.template_box)


def _say_particles(console: Console, table: "ParticleTable", output: str) -> None:
    about = table.about
    cutoff = "" if about is None else f", {about.method} cutoff {about.cutoff_text}"
    if about is not None and about.per is not None:
        cutoff += f" per {about.per}"
    console.print(f"{len(table)} particles{cutoff}: {output}", markup=False)


def _peaks(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.io.tables import write_table

    optics = _optics(parsed)
    table = _picked(parsed)
    write_table(table, parsed.output, optics)
    _say_particles(console, table, parsed.output)
    return DONE


def _export(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.errors import InvalidInputError, OutputExistsError
    from ocelot_em.io import hdf5, mrc, ome_zarr, tables

    if parsed.to in MAP_FORMATS:
        if parsed.to == "mrc":
            mrc.write_mrc_set(
                parsed.store, parsed.output, prefix=parsed.prefix, overwrite=parsed.overwrite
            )
        else:
            write = {"hdf5": hdf5.write_hdf5, "ome-zarr": ome_zarr.write_ome_zarr}[parsed.to]
            write(parsed.store, parsed.output, overwrite=parsed.overwrite)
        console.print(f"wrote {parsed.output}", markup=False)
        return DONE
    if Path(parsed.output).exists() and not parsed.overwrite:
        raise OutputExistsError(
            f"{parsed.output}: is there already; choose another name, or --overwrite"
        )
    optics = _optics(parsed)
    if parsed.to == "parquet":
        table = _picked(parsed)
        tables.write_parquet(table, parsed.output)
    elif optics is None:
        raise InvalidInputError(
            f"--to {parsed.to}: needs the micrograph's optics; give Leopard-EM's configuration of "
            "the search with --optics CONFIG.yaml"
        )
    else:
        table = _picked(parsed)
        if parsed.maps is not None:
            optics = tables.with_maps_in(optics, parsed.maps, parsed.prefix)
        writers = {
            "leopard": tables.write_leopard_csv,
            "relion": tables.write_relion_star,
            "cistem": tables.write_cistem_star,
        }
        writers[parsed.to](table, optics, parsed.output)
    _say_particles(console, table, parsed.output)
    return DONE


def _report(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.view.report import write_report

    table = _picked(parsed)
    write_report(parsed.store, parsed.output, particles=table)
    _say_particles(console, table, parsed.output)
    return DONE


def _view(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.view.viewer import view

    with view(parsed.picture, parsed.port) as shown:
        console.print(f"serving {shown.url}", markup=False)
        console.print(f"open {shown.neuroglancer_url}", markup=False)
        if not shown.is_offline:
            console.print(
                "neuroglancer itself comes from the network: pip install 'ocelot-em[view]' for one "
                "that does not"
            )
        console.print("Ctrl-C stops it")
        with contextlib.suppress(KeyboardInterrupt):
            shown.wait()
    return DONE


def _merge(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.cli.terminal import MergeProgress, print_plan, print_report
    from ocelot_em.merge.plan import MergeOptions
    from ocelot_em.run.api import Observers, merge, plan_merge
    from ocelot_em.run.clusters import within_job

    options = {name: getattr(parsed, name) for name in MergeOptions.model_fields}
    if parsed.dry_run:
        ready, checked = plan_merge(parsed.inputs, parsed.output, MergeOptions.parse(options))
        print_plan(console, ready, checked)
        return DONE
    with MergeProgress(console) as progress, _stopped_by_signals(progress.stop):
        # The other tasks of a SLURM job never get further than here.
        with within_job(MergeOptions.parse(options)) as asked, _run_kept(parsed) as others:
            report = merge(
                parsed.inputs,
                parsed.output,
                observer=Observers(progress, *others),
                **options | {"cluster": asked.cluster},
            )
        print_report(console, report)
    return DONE


@contextlib.contextmanager
def _run_kept(parsed: argparse.Namespace) -> Iterator[list["Observer"]]:
    """Keep a log and a folder of a run, as far as they are asked for."""
    from ocelot_em.run.runlog import RunFolder, RunLog

    kept: list[Observer] = []
    with contextlib.ExitStack() as stack:
        logs = [parsed.log] if parsed.log else []
        if parsed.run_folder:
            effective = {
                name: value
                for name, value in vars(parsed).items()
                if name not in ("command", "config", "verbose")
            }
            folder = RunFolder(parsed.run_folder, lambda path: write_config(path, effective))
            kept.append(stack.enter_context(folder))
            logs.append(folder.log_file)
        writers = [stack.enter_context(RunLog(path)) for path in logs]
        kept += writers
        try:
            yield kept
        except BaseException as error:
            for writer in writers:
                writer.event("ended", state=type(error).__name__, says=str(error))
            raise
        for writer in writers:
            writer.event("ended", state="done", says="")


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Have a run end well when its time does: batch systems announce it by these signals."""
    announcements = signal.SIGTERM, signal.SIGUSR1
    before = {number: signal.getsignal(number) for number in announcements}
    for number in announcements:
        signal.signal(number, lambda number, _frame: stop(signal.Signals(number).name))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _info(parsed: argparse.Namespace, console: Console) -> int:
    from ocelot_em.cli.terminal import size
    from ocelot_em.store.attributes import MergedAttributes
    from ocelot_em.view.inspection import describe

    info = describe(parsed.store)
    attributes = info.attributes
    rows: list[tuple[str, object]] = [
        ("store", info.url),
        ("kind", f"{attributes.kind}, format version {attributes.format_version}"),
        ("shape", _pixels(attributes.shape)),
        ("valid", _pixels(attributes.valid_shape)),
        (
            "pixel size",
            f"{attributes.pixel_size_angstrom} Å" if attributes.pixel_size_angstrom else "unknown",
        ),
        ("poses", attributes.pose_form.value),
        ("maps", ", ".join(attributes.maps.merged if info.n_tiles else attributes.maps.partial)),
        ("projections", _projections(info)),
        ("stored", size(info.stored_nbytes)),
        ("created", attributes.provenance.created),
    ]
    if isinstance(attributes, MergedAttributes):
        rows.append(("state", attributes.state))
        rows.append(("tiles", f"{info.tiles_done} of {info.n_tiles} done"))
        if attributes.finished:
            rows.append(("finished", attributes.finished))
    for label, value in rows:
        console.print(f"{label:12}  {value}", markup=False)
    if info.exposures:
        _say_exposures(console, info)
    table = Table("partial", "state", "projections")
    table.columns[2].justify = "right"
    for name, state, count in info.partials[:ROWS_SHOWN]:
        table.add_row(name, state, f"{count:,}")
    console.print(table)
    _say_more(console, len(info.partials))
    if isinstance(attributes, MergedAttributes) and attributes.state == "complete":
        _say_statistics(console, parsed.store)
    return DONE


def _projections(info: "StoreInfo") -> str:
    """How many cross-correlations a pixel has, of exposures perhaps not all as many."""
    if not info.exposures:
        return f"{info.attributes.total_projections:,}"
    counts = sorted({exposure.total_projections for exposure in info.exposures})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def _pixels(shape: tuple[int, int] | None) -> str:
    return "of each exposure" if shape is None else f"{shape[0]} x {shape[1]} pixels"


def _say_more(console: Console, n: int) -> None:
    if n > ROWS_SHOWN:
        console.print(f"and {n - ROWS_SHOWN:,} more")


def _say_exposures(console: Console, info: "StoreInfo") -> None:
    """Where each exposure lies, and what it has."""
    table = Table("exposure", "number", "origin", "acquired", "valid", "projections")
    for exposure in info.exposures[:ROWS_SHOWN]:
        y, x = exposure.origin
        table.add_row(
            exposure.id,
            f"{exposure.number}",
            f"{y:g}, {x:g}",
            f"{exposure.acquired}",
            f"{exposure.valid_shape[0]} x {exposure.valid_shape[1]}",
            f"{exposure.total_projections:,}",
        )
    console.print(table)
    _say_more(console, len(info.exposures))


def _say_statistics(console: Console, place: str) -> None:
    """What the merge has counted, and which partials are out of line."""
    from ocelot_em.merge.stats.records import read_summary
    from ocelot_em.particles.quality import partials_out_of_line

    summary = read_summary(place)
    if summary is None:
        console.print("no statistics: merged by an earlier version")
        return
    counted = summary.attributes
    rows = [
        ("pixels", f"{counted.valid_pixels:,} valid, {counted.searched_pixels:,} searched"),
        ("no variance", f"{counted.zero_std_pixels:,} pixels"),
        ("NaN", f"{counted.nan_pixels:,} pixels"),
    ]
    if counted.mip_range is not None and counted.scaled_mip_range is not None:
        rows.append(("mip", "{:.4g} to {:.4g}".format(*counted.mip_range)))
        rows.append(("z-score", "{:.4g} to {:.4g}".format(*counted.scaled_mip_range)))
    if counted.candidate_level is not None:
        rows.append(
            (
                "candidates",
                f"{counted.n_candidates:,} pixels above z = {counted.candidate_level:.2f}",
            )
        )
    for label, value in rows:
        console.print(f"{label:12}  {value}", markup=False)
    if counted.exposures:
        _say_shown(console, place, counted)
        return
    table = Table("partial", "pixels won", "expected", title_justify="left")
    total = sum(partial.total_projections for partial in counted.partials) or 1
    won = sum(partial.won_pixels for partial in counted.partials)
    for partial in counted.partials:
        expected = won * partial.total_projections / total
        table.add_row(partial.name, f"{partial.won_pixels:,}", f"{expected:,.0f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    sources = Table("input", "mean", "spread of it", "standard deviation")
    for source in counted.sources:
        numbers = (source.mean, source.mean_spread, source.std)
        sources.add_row(source.name, *("-" if n is None else f"{n:.4g}" for n in numbers))
    console.print(sources)
    for sentence in partials_out_of_line(counted):
        console.print(f"  - {sentence}", markup=False)


def _say_shown(console: Console, place: str, counted: "StatisticsAttributes") -> None:
    """What a montage shows of each exposure, and what is out of line."""
    from ocelot_em.merge.stats.records import read_exposure_statistics
    from ocelot_em.particles.quality import montage_out_of_line

    table = Table(
        "exposure", "valid pixels", "shown", "of them in overlaps", "mean z there", "else"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for exposure in counted.exposures[:ROWS_SHOWN]:
        means = (exposure.overlap.mean, exposure.alone.mean)
        table.add_row(
            exposure.id,
            f"{exposure.valid_pixels:,}",
            f"{exposure.shown_pixels:,}",
            f"{exposure.overlap.pixels:,}",
            *("-" if mean is None else f"{mean:.4g}" for mean in means),
        )
    console.print(table)
    _say_more(console, len(counted.exposures))
    for sentence in montage_out_of_line(counted, read_exposure_statistics(place, counted)):
        console.print(f"  - {sentence}", markup=False)


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


@contextlib.contextmanager
def _share_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Progress of two phases on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield lambda _phase, _share: None
        return
    with Progress(console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(phase: str, share: float) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=1.0)
            bar.update(tasks[phase], completed=share)

        yield tell
