"""The micrographs of a batch: from stores, folders that contain them, and lists in files."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ocelot_em.errors import FormatError, InvalidInputError, StoreNotFoundError
from ocelot_em.io.text_file import read_text
from ocelot_em.particles.csv_columns import ragged, read_rows
from ocelot_em.particles.micrographs import store_name
from ocelot_em.particles.table import is_formula
from ocelot_em.store.attributes import MergedAttributes, SearchAttributes
from ocelot_em.store.objects import (
    PathOrUrl,
    as_places,
    is_local,
    normalise_url,
    open_objects,
    stores_below,
)
from ocelot_em.store.search import read_attributes

MAX_NAME = 200
"""Maximum length of a name: that of a file, with a suffix."""

_MAX_LIST_NBYTES = 2**26
_COLUMNS = ("search", "micrograph")
_SHOWN = 20  # names in an error


@dataclass(frozen=True)
class Micrograph:
    """A micrograph by its name, and the URLs of its searches or of a merged result."""

    name: str
    urls: tuple[str, ...]


def find_micrographs(
    places: PathOrUrl | Sequence[PathOrUrl], output: PathOrUrl, *, join_names: bool = False
) -> list[Micrograph]:
    """Return the micrographs of a batch, in the stated order; those of a folder by name.

    Parameters
    ----------
    places
        Searches or merged results; local folders, of which all searches are taken, or all merged
        results if there is no search; and files with a list: one path a line, or a CSV table with
        the column ``search``, and perhaps ``micrograph`` for the names. Relative paths in a list
        are relative to its folder.
    output
        Folder that is not searched.
    join_names
        Whether searches of one name are the groups of one micrograph; otherwise they are refused.

    Raises
    ------
    InvalidInputError
        Two micrographs have the same name, or a name cannot be used in tables and as a file; there
        are none; a list cannot be read.
    """
    own = normalise_url(output)
    found = [one for place in as_places(places) for one in _found(place, own)]
    if not found:
        raise InvalidInputError("searches: expected at least one search, got none")
    several = list(dict.fromkeys(found))
    if join_names:
        urls = dict[str, list[str]]()
        for one in several:
            urls.setdefault(one.name, []).extend(one.urls)
        several = [Micrograph(name, tuple(own)) for name, own in urls.items()]
    if problems := [*_name_problems(several), *_duplicates(several)]:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + [f"and {more} more such names"] * (more > 0)
        raise InvalidInputError(
            [
                *shown,
                "give names in a list: a CSV file with the columns micrograph and search"
                + "; with --group-by, searches of one name are groups of one micrograph"
                * (not join_names),
            ]
        )
    return several


def _found(place: PathOrUrl, output: str) -> Iterator[Micrograph]:
    url = normalise_url(place)
    if is_local(url) and Path(url).is_file():
        for path, name in _listed(Path(url)):
            target = normalise_url(path if "://" in path else Path(url).parent / path)
            yield Micrograph(name or _name_of(path, target), (target,))
        return
    if not is_local(url) or not Path(url).is_dir() or (Path(url) / "zarr.json").exists():
        yield Micrograph(_name_of(str(place), url), (url,))
        return
    stores = {own: kind for own in stores_below(url, output) if (kind := _kind_of(own))}
    wanted = "search" if "search" in stores.values() else "merged"
    chosen = [folder for folder, kind in stores.items() if kind in (wanted, "unknown")]
    if not chosen:
        raise InvalidInputError(f"{url}: expected searches in this folder, found none")
    for folder in chosen:
        parts = Path(folder).relative_to(url).parts
        yield Micrograph(store_name("_".join(parts)), (folder,))


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    """Yield path and name (or none) of each search of a list."""
    if path.suffix.lower() != ".csv":
        text = read_text(path, _MAX_LIST_NBYTES, "a list of searches")
        for line in text.splitlines():
            if (content := line.strip()) and not content.startswith("#"):
                yield content, ""
        return
    names, rows = read_rows(path)
    problems = [f"{n!r}: expected one of {', '.join(_COLUMNS)}" for n in {*names} - {*_COLUMNS}]
    if names.count("search") != 1:
        problems.append("expected a column search")
    if problems := [*problems, *ragged(rows, len(names))]:
        raise InvalidInputError(f"{path}: {problem}" for problem in problems)
    for row in rows:
        own = dict(zip(names, row, strict=True))
        yield own["search"].strip(), own.get("micrograph", "").strip()


def _kind_of(folder: str) -> str:
    """Return ``search``, ``merged``, ``unknown``, or nothing for a store of other programs."""
    try:
        attributes = read_attributes(open_objects(folder))
    except (FormatError, StoreNotFoundError):
        try:
            content = json.loads((Path(folder) / "zarr.json").read_bytes())
            is_other = "ocelot" not in content.get("attributes", {})
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            is_other = False
        return "" if is_other else "unknown"
    return "search" if isinstance(attributes, SearchAttributes) else "merged"


def is_result(url: str) -> bool:
    """Whether a store is a merged result, which need not be merged."""
    return isinstance(read_attributes(open_objects(url)), MergedAttributes)


def _name_of(given: str, url: str) -> str:
    """Return the name of a store as given, which may be a link; of ``.``, that of its URL."""
    return store_name(given if store_name(given).strip(".") else url)


def _name_problems(several: Sequence[Micrograph]) -> Iterator[str]:
    for one in several:
        name = one.name
        if (
            not name.isprintable()
            or not name.strip()
            or name.startswith(".")
            or set(name) & set(',"/\\')
            or len(name.encode()) > MAX_NAME
            or is_formula(name)
        ):
            yield (
                f"{one.urls[0]}: expected a name for the micrograph of up to {MAX_NAME} "
                "characters, without commas, quotation marks, slashes and a leading point or "
                f"operator, got {name!r}"
            )


def _duplicates(several: Sequence[Micrograph]) -> Iterator[str]:
    counts = Counter(one.name.casefold() for one in several)
    for key in (key for key, n in counts.items() if n > 1):
        same = [one for one in several if one.name.casefold() == key]
        yield (
            f"micrograph {same[0].name!r}: expected one search, got {len(same)}: "
            + ", ".join(one.urls[0] for one in same[:_SHOWN])
        )
