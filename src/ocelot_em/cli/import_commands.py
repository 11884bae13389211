"""The command ``import``."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from ocelot_em.cli.exit_codes import DONE


def import_files(parsed: argparse.Namespace, console: Console) -> int:
    """Import result files as partials of a search."""
    if any(Path(file).suffix.lower() in (".yaml", ".yml") for file in parsed.files):
        return import_montage(parsed, console)
    if any(Path(file).is_dir() or Path(file).suffix in (".h5", ".hdf5") for file in parsed.files):
        return import_finished(parsed, console)
    from ocelot_em.io.import_options import ImportOptions
    from ocelot_em.io.leopard import import_results

    options = ImportOptions(
        search_space=parsed.search_space,
        template_box=parsed.template_box,
        pixel_size_angstrom=parsed.pixel_size,
        total_projections=parsed.total_projections,
    )
    with share_bar(console) as tell:
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


def import_montage(parsed: argparse.Namespace, console: Console) -> int:
    """Import the exposures listed in a description file."""
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
    with share_bar(console) as tell:
        names = import_description(parsed.files[0], parsed.output, tell)
    exposures = {name.partition("/")[0] for name in names}
    console.print(
        f"imported {len(names)} partials of {len(exposures)} exposures into {parsed.output}",
        markup=False,
    )
    return DONE


def import_finished(parsed: argparse.Namespace, console: Console) -> int:
    """Import the results of a finished search: MRC files or an HDF5 file."""
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
    with share_bar(console) as tell:
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


@contextlib.contextmanager
def share_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show progress by phase on a terminal, and nothing elsewhere."""
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
