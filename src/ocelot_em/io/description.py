"""Description of a montage: a YAML file that lists its exposures and their positions.

::

    pixel_size: 3.0               # optional, in Å
    search_space: space.npz       # for indexed poses
    template_box: 40              # for maps of the micrograph's shape; or valid_shape of exposures
    origins: origins.csv          # optional: see ocelot_em.io.origins
    exposures:
      - id: "00"
        origin: [2, 0]            # y, x; not needed if the origins file has them
        acquired: 0               # order of acquisition; not needed if the origins file has it
        valid_shape: [265, 297]   # optional
        partials: [dev0.npz, dev1.npz]
        total_projections: [17232, 9264]   # if the files have none

File paths are relative to the description's folder.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import date
from os import PathLike
from os.path import realpath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.import_options import Batch, ImportOptions
from ocelot_em.io.leopard import import_batches
from ocelot_em.io.origin import NAMES_SHOWN, Origin
from ocelot_em.io.origins import read_origins
from ocelot_em.io.yaml_file import as_number, read_yaml
from ocelot_em.model.problems import in_words
from ocelot_em.model.progress import OnProgress, share_bar
from ocelot_em.store import attributes as fmt
from ocelot_em.store.search_info import Exposure

log = logging.getLogger(__name__)


def _as_text(value: object) -> object:
    if isinstance(value, int | float | date):
        raise ValueError(
            f"YAML takes it for the {type(value).__name__} {value}; write it between quotation "
            "marks"
        )
    return value


_TEXT, _NUMBER = BeforeValidator(_as_text), BeforeValidator(as_number)
_FILE_OR_MAPPING = BeforeValidator(lambda value: {"file": value} if type(value) is str else value)
_PAIR = Field(min_length=2, max_length=2)
_FileName = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=4095), _TEXT]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class OriginsFile(_Strict):
    """File with origins; see :func:`ocelot_em.io.origins.read_origins`."""

    file: _FileName
    flip_y: bool = False
    coordinates: Literal["aligned", "aligned-vs", "piece"] | None = None


class ExposureEntry(_Strict):
    """One exposure of a description."""

    id: Annotated[fmt.PartialName, _TEXT]
    origin: Annotated[list[Annotated[fmt.Origin, _NUMBER]], _PAIR] | None = None
    acquired: fmt.Order | None = None
    valid_shape: Annotated[list[fmt.PixelCount], _PAIR] | None = None
    partials: Annotated[list[_FileName], Field(min_length=1)]
    total_projections: list[fmt.Count] = []


class Description(_Strict):
    """Content of a description file; see :mod:`ocelot_em.io.description`."""

    pixel_size: Annotated[fmt.Angstrom, _NUMBER] | None = None
    search_space: _FileName | None = None
    template_box: fmt.PixelCount | None = None
    origins: Annotated[OriginsFile, _FILE_OR_MAPPING] | None = None
    exposures: Annotated[list[ExposureEntry], Field(min_length=1)]


def import_description(
    path: str | PathLike[str],
    output: str | PathLike[str],
    progress: bool | OnProgress | None = None,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Convert the result files of a montage's exposures into a search.

    All files are read and checked first; nothing is written if there is a problem. New partials and
    exposures are added to an existing search; existing ones with the same content are not changed,
    so that a description can grow.

    Parameters
    ----------
    path
        The description.
    output
        Path or URL of the search.
    progress, overwrite
        As for :func:`ocelot_em.import_results`.

    Returns
    -------
    list of str
        Exposures and names of the new partials, as ``exposure/partial``.

    Raises
    ------
    InvalidInputError
        Listing every problem with the description or with the files.

    Examples
    --------
    >>> import json
    >>> from pathlib import Path
    >>> from ocelot_em import import_description
    >>> exposures = [
    ...     {"id": "00", "origin": [0, 0], "acquired": 0, "partials": ["gpu0.npz"]},
    ...     {"id": "01", "origin": [0, 350], "acquired": 1, "partials": ["gpu1.npz"]},
    ... ]
    >>> _ = Path("LAMELLA.yaml").write_text(json.dumps({"exposures": exposures}))
    >>> import_description("LAMELLA.yaml", "LAMELLA.zarr")
    ['00/gpu0', '01/gpu1']
    """
    place = Path(path)
    description = read_description(place)
    exposures = placed_exposures(description, place)
    if fractional := [e for e in exposures if not all(float(n).is_integer() for n in e.origin)]:
        shown = ", ".join(
            f"{e.id} ({e.origin[0]}, {e.origin[1]})" for e in fractional[:NAMES_SHOWN]
        )
        log.warning(
            "%s: origins that are not whole pixels: %s; maps are never interpolated, so a merge "
            "refuses them unless they are rounded (--origins round)",
            *(place, shown + ", ..." * (len(fractional) > NAMES_SHOWN)),
        )
    tables = description.search_space
    options = ImportOptions(
        search_space=None if tables is None else place.parent / tables,
        template_box=description.template_box,
        pixel_size_angstrom=description.pixel_size,
    )
    batches = [
        Batch([place.parent / file for file in entry.partials], entry.total_projections, exposure)
        for entry, exposure in zip(description.exposures, exposures, strict=True)
    ]
    with share_bar(progress) as on_progress:
        return import_batches(batches, output, options, on_progress, overwrite=overwrite)


def read_description(path: Path) -> Description:
    """Read and check a description; raise an error that lists every problem and its location."""
    content = read_yaml(path, "a description of a montage's exposures")
    try:
        described = Description.model_validate(dict(content))
    except ValidationError as error:
        raise InvalidInputError(
            f"{path}: {_place(problem['loc'])}: {in_words(problem)}" for problem in error.errors()
        ) from None
    counts = Counter(entry.id for entry in described.exposures)
    problems = [f"{path}: exposure {i!r}: is there {n} times" for i, n in counts.items() if n > 1]
    used = Counter(realpath(path.parent / f) for e in described.exposures for f in e.partials)
    problems += [f"{path}: {file}: given {n} times" for file, n in used.items() if n > 1]
    if problems:
        raise InvalidInputError(problems)
    return described


def _place(location: Sequence[int | str]) -> str:
    """Format a location in a description: ``exposures[3].origin``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "description"


def placed_exposures(description: Description, path: Path) -> list[Exposure]:
    """Return the exposures with origins from the description or from its origins file.

    Raise an error that names every exposure whose origin or order of acquisition is missing or
    contradictory.
    """
    known, exposures, problems = dict[str, Origin](), [], []
    if description.origins is not None:
        how = description.origins.model_dump()
        known = read_origins(path.parent / how.pop("file"), **how)
    for entry in description.exposures:
        found, place = known.get(entry.id), f"{path}: exposure {entry.id!r}"
        both: dict[str, tuple[Any, Any]] = {
            "acquired": (entry.acquired, None if found is None else found.acquired),
            "origin": (_pair(entry.origin), None if found is None else (found.y, found.x)),
        }
        for name, (given, listed) in both.items():
            if None not in (given, listed) and given != listed:
                problems.append(
                    f"{place}: {name}: {given} in the description, {listed} in the file of origins"
                )
        acquired, origin = (listed if given is None else given for given, listed in both.values())
        if origin is None:
            problems.append(f"{place}: origin: missing" + (" in the file of origins" * bool(known)))
        if acquired is None:
            problems.append(f"{place}: acquired: missing: its place in the order of acquisition")
        if origin is not None and acquired is not None:
            exposures.append(Exposure(entry.id, origin, acquired, _pair(entry.valid_shape)))
    if problems:
        raise InvalidInputError(problems)
    return exposures


def _pair(values: Sequence[Any] | None) -> Any:
    return None if values is None else (values[0], values[1])
