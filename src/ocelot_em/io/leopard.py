"""Import of Leopard-EM's per-device result files as partials of a search, in bands."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Unpack, cast

from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.io.import_checks import check_batch, unequal
from ocelot_em.io.import_options import (
    Batch,
    Checked,
    ImportKeywords,
    ImportOptions,
    OnFraction,
    bands_of,
    part_of,
    read_search_space_file,
)
from ocelot_em.io.origin import NAMES_SHOWN
from ocelot_em.model.correlations import TABLE
from ocelot_em.model.keywords import takes
from ocelot_em.model.progress import OnProgress, share_bar
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.text import partial_text
from ocelot_em.store.attributes import WRAPPED_EDGES
from ocelot_em.store.creation import ensure_search, refresh_total
from ocelot_em.store.distinct import require_distinct
from ocelot_em.store.objects import as_places, open_objects
from ocelot_em.store.partials import PartialWriter
from ocelot_em.store.roster import register
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.whole_folder import replaced_search

log = logging.getLogger(__name__)


@takes(ImportOptions)
def import_results(
    files: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: ImportOptions | None = None,
    progress: bool | OnProgress | None = None,
    *,
    overwrite: bool = False,
    **keywords: Unpack[ImportKeywords],
) -> list[str]:
    """Convert result files into partials of a search, in the given order.

    All files are read and checked first, then converted in bands of rows; nothing is written if
    there is a problem. Partials are appended to an existing search; those that are there with the
    same name and content stay, so that running an interrupted import again finishes it.

    Parameters
    ----------
    files
        One or more ``.npz`` or ``.pt`` dictionaries with map names as keys.
    output
        Path or URL of the search.
    options
        Options that several imports share, if any.
    progress
        Whether to show a bar; None: in a notebook, and in an interactive session on a terminal; not
        in a script. A function is called with the phase (``check`` or ``convert``) and the fraction
        of it done, 0 to 1.
    overwrite
        Replace an existing search. The new one is complete before the old one is removed.
    **keywords
        Information that the files lack: the fields of :class:`ImportOptions`, which describes them.

    Returns
    -------
    list of str
        Names of the new partials: those of the files, with other characters than letters, digits,
        ``.``, ``_`` and ``-`` replaced.

    Raises
    ------
    InvalidInputError
        Listing every problem with the files.

    Examples
    --------
    >>> from ocelot_em import import_results
    >>> import_results(["gpu0.npz", "gpu1.npz"], "RUN.zarr", pixel_size_angstrom=2.5)
    ['gpu0', 'gpu1']
    """
    options = ImportOptions.of(options, keywords)
    files = as_places(files)
    if not files:
        raise InvalidInputError("import: expected at least one file, got none")
    if unused := {"pixel_size_offset_angstrom", "prefix", "name"} & options.model_fields_set:
        raise InvalidInputError(
            f"import: {', '.join(sorted(unused))}: expected with a finished search, got results of "
            "devices"
        )
    batches = [Batch(files, options.total_projections)]
    with share_bar(progress) as on_progress:
        return import_batches(batches, output, options, on_progress, overwrite=overwrite)


def import_batches(
    batches: Sequence[Batch],
    output: str | PathLike[str],
    options: ImportOptions,
    on_progress: OnProgress,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Convert files of several exposures as :func:`import_results` does for one search.

    Existing partials with the same name and content are not changed. Return the names of the
    new partials, for exposures as ``exposure/partial``.
    """
    files = [file for batch in batches for file in batch.files]
    if overwrite:
        with replaced_search(output, files) as place:
            return import_batches(batches, place, options, on_progress)
    problems: list[str] = []
    space: SearchSpace | None = None
    if options.search_space is not None:
        try:
            space = read_search_space_file(options.search_space)
        except InvalidInputError as error:
            problems += error.problems
    seen: dict[str, Path] = {}
    checked: list[Checked] = []
    for number, batch in enumerate(batches):
        on_batch = part_of(partial(on_progress, "check"), number, len(batches))
        found = check_batch(batch, output, options, space, seen, on_batch)
        problems += found.problems
        checked.append(found)
    different = [] if problems else unequal(checked)
    if different:
        raise InvalidInputError(different)
    if problems:
        if (space is None) == (options.search_space is None) and all(
            c.has_only_bad_values for c in checked
        ):
            raise InvalidDataError(problems)
        raise InvalidInputError(problems)
    opened = [candidate.file for found in checked for candidate in found.candidates]
    if names := [file.path.name for file in opened if file.has_correlation_table]:
        shown = ", ".join(names[:NAMES_SHOWN]) + ", ..." * (len(names) > NAMES_SHOWN)
        log.warning(
            "%s: the %s is left out: import reads maps only; ocelot_em.write_partial stores it",
            *(shown, TABLE),
        )
    require_distinct(output, files)
    if looks_wrapped := any(found.looks_wrapped for found in checked):
        log.warning(WRAPPED_EDGES)
    for number, found in enumerate(checked):
        on_batch = part_of(partial(on_progress, "convert"), number, len(batches))
        assert found.info is not None
        _convert(found, replace(found.info, looks_wrapped=looks_wrapped), output, on_batch)
    return [
        partial_text(batch.exposure.id if batch.exposure else "", candidate.name)
        for batch, found in zip(batches, checked, strict=True)
        for candidate in found.candidates
    ]


def _convert(
    checked: Checked, info: SearchInfo, output: str | PathLike[str], on_fraction: OnFraction
) -> None:
    """Write the partials of a batch, and then their total, which an interrupted import lacks."""
    objects = open_objects(output)
    names = [candidate.name for candidate in checked.candidates]
    if names:
        ensure_search(objects, cast("tuple[int, int]", checked.candidates[0].shape), info)
        register(objects, info.exposure_id, names)
    for number, candidate in enumerate(checked.candidates):
        shape, own = cast("tuple[int, int]", candidate.shape), candidate.info_of(info)
        writer = PartialWriter(
            output,
            candidate.name,
            shape,
            total_projections=candidate.count or 0,
            order=checked.first_order + number,
            search=own,
        )
        writer.in_batch()
        writer.describe(file=candidate.path.name, sha256=candidate.sha256)
        with closing(candidate.file) as file, writer:
            readers = {key: file.rows(key) for key in own.maps.partial}
            for band in bands_of(shape):
                region = band.region
                maps = {key: read(region.y0, region.y1) for key, read in readers.items()}
                writer.write(region, maps, validated=True)
                on_fraction((number + region.y1 / shape[0]) / len(names))
            file.require_unchanged()
    refresh_total(objects, info.exposure_id)
    objects.sync()
