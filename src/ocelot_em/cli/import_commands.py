"""The command ``import``."""

from os.path import exists
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import PathOrUrl
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.import_options import ImportOptions
from ocelot_em.model.problems import option_name
from ocelot_em.model.progress import share_bar

MISSING = Parameter(
    name="*", consume_multiple=True, group=Group.create_ordered("What the files lack", sort_key=1)
)
DEFAULTS = ImportOptions()


def import_files(
    files: list[PathOrUrl],
    /,
    *,
    output: PathOrUrl,
    overwrite: bool = False,
    options: Annotated[ImportOptions, MISSING] = DEFAULTS,
) -> None:
    """Import result files as partials of a search.

    Parameters
    ----------
    files
        One .npz or .pt file of each device, in order; or the description of a montage's exposures
        (.yaml); or a finished search: the folder with the results of Leopard-EM or cisTEM, or one
        of its files. cisTEM's histogram of all correlations is stored, too.
    output
        Path or URL of the search to write, or to add to.
    overwrite
        Replace an existing search. The new one is complete before the old one is removed.
    """
    missing = [file for file in files if not ("://" in str(file) or exists(file))]  # noqa: PTH110
    if len(missing) == len(files):
        raise InvalidInputError(f"{f}: expected a file, got nothing there" for f in missing)
    from ocelot_em.io.beside import is_finished

    if any(map(is_finished, files)):
        import_search(files, output, options, overwrite)
    elif any(Path(file).suffix.lower() in (".yaml", ".yml") for file in files):
        import_montage(files, output, options, overwrite)
    else:
        import_devices(files, output, options, overwrite)


def import_devices(
    files: list[PathOrUrl], output: PathOrUrl, options: ImportOptions, overwrite: bool
) -> None:
    """Import the results of devices."""
    from ocelot_em.io.leopard import import_results
    from ocelot_em.io.partial_names import name_partials
    from ocelot_em.store.objects import open_objects
    from ocelot_em.store.search import read_attributes

    console = open_console()
    for file, name in zip(files, name_partials(files), strict=True):
        if name != Path(file).stem:
            console.print(f"partial {name} is {file}")
    with share_bar(console=console) as on_progress:
        names = import_results(files, output, options, on_progress, overwrite=overwrite)
    console.print(
        f"imported {len(names)} partials into {output}{': ' * bool(names)}{', '.join(names)}"
    )
    if len(names) < len(files):
        console.print(f"{len(files) - len(names)} had been imported before, and are unchanged")
    # If the edges look wrapped, a warning was logged.
    if options.template_box is None and not read_attributes(open_objects(output)).looks_wrapped:
        console.print(
            "all pixels are taken as valid; if the maps have the micrograph's shape, import with "
            "--template-box N"
        )


def import_montage(
    files: list[PathOrUrl], output: PathOrUrl, options: ImportOptions, overwrite: bool
) -> None:
    """Import the exposures listed in a description file, which excludes options."""
    from ocelot_em.io.description import import_description

    given = sorted(options.model_fields_set)
    if len(files) > 1 or given:
        names = [f"--{option_name(n)}" for n in given]
        raise InvalidInputError(
            "import: expected one description of exposures (.yaml), which contains everything else"
            + (f", got {', '.join(names)}, too" if given else f", got {len(files)} files")
        )
    console = open_console()
    with share_bar(console=console) as on_progress:
        names = import_description(files[0], output, on_progress, overwrite=overwrite)
    exposures = {name.partition("/")[0] for name in names}
    console.print(f"imported {len(names)} partials of {len(exposures)} exposures into {output}")


def import_search(
    files: list[PathOrUrl], output: PathOrUrl, options: ImportOptions, overwrite: bool
) -> None:
    """Import a finished search."""
    from ocelot_em.io.finished import import_finished

    if len(files) > 1:
        raise InvalidInputError(
            f"import: expected one finished search, got {len(files)} files; import each with its "
            "own command, by its folder or one of its files"
        )
    console = open_console()
    with share_bar(console=console) as on_progress:
        found = import_finished(files[0], output, options, on_progress, overwrite=overwrite)
    console.print(f"imported {files[0]} into {output}; its partial is named {found.name}")
    for note in found.notes:
        console.print(f"  - {note}")
