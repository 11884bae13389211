"""The command ``import``."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.console import Console
from rich.progress import Progress, TaskID

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import PathOrUrl
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.import_options import ImportOptions

MISSING = Parameter(
    name="*", consume_multiple=True, group=Group.create_ordered("What the files lack", sort_key=1)
)
FINISHED = Parameter(group=Group.create_ordered("Finished searches", sort_key=1))
DEFAULTS = ImportOptions()


def import_files(
    files: list[PathOrUrl],
    /,
    *,
    output: PathOrUrl,
    options: Annotated[ImportOptions, MISSING] = DEFAULTS,
    prefix: Annotated[str, FINISHED] = "",
    pixel_size_offset: Annotated[float | None, FINISHED] = None,
) -> None:
    """Import result files as partials of a search.

    Parameters
    ----------
    files
        One .npz or .pt file of each device, in order; or the description of a montage's exposures
        (.yaml); or the result of a finished search: a folder of Leopard-EM's MRC files, or an HDF5
        file.
    output
        Path or URL of the search to write.
    prefix
        Prefix of the names of MRC files, such as ``output`` for ``output_mip.mrc``.
    pixel_size_offset
        The single pixel-size offset of the search in Å, which the files do not contain; 0 if the
        pixel size was not varied.
    """
    if any(Path(file).suffix.lower() in (".yaml", ".yml") for file in files):
        given = [
            *options.model_fields_set,
            *["prefix"] * bool(prefix),
            *["pixel_size_offset"] * (pixel_size_offset is not None),
        ]
        import_montage(files, output, given)
        return
    if any(Path(file).is_dir() or Path(file).suffix in (".h5", ".hdf5") for file in files):
        import_finished(files, output, options, prefix, pixel_size_offset)
        return
    from ocelot_em.io.leopard import import_results
    from ocelot_em.io.partial_names import name_partials

    console = open_console()
    for file, name in zip(files, name_partials(files), strict=True):
        if name != Path(file).stem:
            console.print(f"partial {name} is {file}")
    with share_bar(console) as on_progress:
        names = import_results(files, output, options, on_progress)
    console.print(
        f"imported {len(names)} partials into {output}{': ' * bool(names)}{', '.join(names)}"
    )
    if len(names) < len(files):
        console.print(f"{len(files) - len(names)} had been imported before, and are unchanged")
    if options.template_box is None:
        console.print(
            "all pixels are taken as valid; if the maps have the micrograph's shape, import with "
            "--template-box N"
        )


def import_montage(files: list[PathOrUrl], output: PathOrUrl, given: list[str]) -> None:
    """Import the exposures listed in a description file, which excludes the given options."""
    from ocelot_em.io.description import import_description

    if len(files) > 1 or given:
        names = [f"--{n.removesuffix('_angstrom').replace('_', '-')}" for n in sorted(given)]
        raise InvalidInputError(
            "import: expected one description of exposures (.yaml), which contains everything else"
            + (f", got {', '.join(names)}, too" if given else f", got {len(files)} files")
        )
    console = open_console()
    with share_bar(console) as on_progress:
        names = import_description(files[0], output, on_progress)
    exposures = {name.partition("/")[0] for name in names}
    console.print(f"imported {len(names)} partials of {len(exposures)} exposures into {output}")


def import_finished(
    files: list[PathOrUrl],
    output: PathOrUrl,
    options: ImportOptions,
    prefix: str,
    pixel_size_offset: float | None,
) -> None:
    """Import the results of a finished search: MRC files or an HDF5 file."""
    from ocelot_em.io.hdf5 import import_hdf5
    from ocelot_em.io.leopard_maps import FinishedSearch
    from ocelot_em.io.mrc import import_mrc_set

    if len(files) > 1 or len(options.total_projections) > 1 or options.search_space:
        raise InvalidInputError(
            "import: expected one folder of MRC files, or one HDF5 file, with at most one count "
            "and no search space; import each of the others with its own command"
        )
    place, console = Path(files[0]), open_console()
    about = FinishedSearch(
        total_projections=next(iter(options.total_projections), None),
        template_box=options.template_box,
        pixel_size_angstrom=options.pixel_size_angstrom,
        pixel_size_offset_angstrom=pixel_size_offset,
    )
    with share_bar(console) as on_progress:
        if place.is_dir():
            found = import_mrc_set(place, output, about, prefix=prefix, on_progress=on_progress)
        else:
            found = import_hdf5(place, output, about, on_progress=on_progress)
    console.print(f"imported {place} into {output}; its partial is named {found.name}")
    for note in found.notes:
        console.print(f"  - {note}")


@contextlib.contextmanager
def share_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show progress by phase on a terminal, and nothing elsewhere."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(phase: str, fraction: float) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=1.0)
            bar.update(tasks[phase], completed=fraction)

        yield on_progress
