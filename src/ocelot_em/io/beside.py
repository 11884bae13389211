"""Find the maps of a finished search, and what lies beside them.

===========  ========================================  ===========================================
program      maps                                      the rest
===========  ========================================  ===========================================
Leopard-EM   ``mip.mrc`` ... with any prefix; or one    configuration (YAML): count, pixel size,
             HDF5 file                                 paths; table of results (CSV): the same
cisTEM       ``mip.mrc``, ``corr_average.mrc`` ... of  ``histogram.txt``: sum of all counts; the
             ``match_template``; ``NAME_mip_1_0.mrc``  project's database: pixel size, box; headers:
             ... of its projects                       pixel size
===========  ========================================  ===========================================
"""

import csv
import io
import re
import sqlite3
import struct
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.hdf5 import is_result
from ocelot_em.io.leopard_maps import OUR_NAMES
from ocelot_em.io.map_files import (
    BOX,
    CISTEM,
    COUNT_FACT,
    LEOPARD,
    OFFSET,
    PIXEL,
    FoundSearch,
    positive_or_none,
    single_offset,
)
from ocelot_em.io.text_file import read_text
from ocelot_em.io.yaml_file import read_yaml
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.correlation_histogram import CorrelationHistogram
from ocelot_em.model.maps import PIXEL_SIZE

_NAMES = (*OUR_NAMES, PIXEL_SIZE)

_TOKENS: Mapping[str, Mapping[str, str]] = {
    ending: dict(zip(_NAMES, tokens, strict=False))
    for ending, tokens in (
        (r"\.mrc", OUR_NAMES),
        (
            r"(?:)\.mrc",
            [
                "mip",
                "mip_scaled",
                "corr_average",
                "corr_stddev",
                "psi",
                "theta",
                "phi",
                "defocus",
                "pixel_size",
            ],
        ),
        (
            r"_\d+_\d+\.mrc",
            ["mip", "scaled_mip", "avg", "std", "psi", "theta", "phi", "defocus", "pixel_size"],
        ),
    )
}
"""Maps in names of files by what follows: Leopard-EM's, ``match_template``'s, cisTEM projects'."""

_TABLES, _CONFIGURATIONS = (".csv",), (".yaml", ".yml", ".json")
_HDF5 = (".h5", ".hdf5")
_COMPLETE = 5
"""Number of maps from which on a set is one, rather than names that look like some of another."""

MAX_TEXT_NBYTES = 64_000_000
"""Maximum size of a table or a histogram."""


def is_finished(path: str | Path) -> bool:
    """Return whether a path may be of a finished search, rather than of a device's result."""
    place = Path(path)
    if place.suffix in (".mrc", *_TABLES, *_HDF5) or place.is_dir():
        return True
    return place.suffix in _CONFIGURATIONS and _is_configuration(place)


def find_search(source: Path, prefix: str = "") -> FoundSearch:
    """Find a finished search in a folder, or the one of a map, a table or a configuration.

    Raises
    ------
    InvalidInputError
        There is none, or more than one, or it is one that cannot be a search of a micrograph.
    """
    if prefix and Path(prefix).name != prefix:
        raise InvalidInputError(
            f"prefix {prefix!r}: expected the beginning of file names, got a path; give the folder "
            "by itself"
        )
    if not (source.is_dir() or source.is_file()):
        raise InvalidInputError(
            f"{source}: expected a folder or a file of a finished search, got nothing there"
        )
    is_record = source.suffix in (*_TABLES, *_CONFIGURATIONS)
    wanted = _map_named_in(source) if is_record else source
    folder = wanted if wanted.is_dir() else wanted.parent
    names = [path.name for path in (folder.iterdir() if wanted.is_dir() else [wanted])]
    if any(name.endswith(("_scores.mrc", "_angles.mrc", "_job.json")) for name in names):
        raise InvalidInputError(
            f"{source}: expected a search of a micrograph, got pytom-match-pick's of a tomogram: "
            "its scores are volumes with one standard deviation for all voxels, not one for each "
            "pixel, and cannot be merged"
        )
    found = _only_set(source, folder, None if wanted.is_dir() else wanted, prefix)
    _look_beside(found, folder, source if is_record else None)
    return found


def _only_set(source: Path, folder: Path, wanted: Path | None, prefix: str) -> FoundSearch:
    """Return the one set of maps in a folder, or the one that has a wanted file."""
    sets: dict[tuple[str, str, str], dict[str, Path]] = {}
    before = rf"({re.escape(prefix)}[_.-]?)" if prefix else "(|.*[_.-])"
    for path in filter(Path.is_file, sorted(folder.glob("*.mrc"))):
        for ending, tokens in _TOKENS.items():
            for name, token in tokens.items():
                if match := re.fullmatch(f"{before}{token}({ending})", path.name):
                    sets.setdefault((ending, match[1], match[2]), {})[name] = path
    files = [wanted] if wanted else sorted(folder.iterdir())
    hdf5 = [path for path in files if path.suffix in _HDF5 and path.is_file()]
    if len(hdf5) > 1:
        hdf5 = [path for path in hdf5 if is_result(path)]
    if wanted:
        sets = {key: found for key, found in sets.items() if wanted in found.values()}
    ranked = sorted(sets.items(), key=lambda item: -len(item[1]))
    several = [*hdf5, *(next(iter(s.values())) for _, s in ranked if len(s) >= _COMPLETE)]
    if len(several) > 1:
        raise InvalidInputError(
            f"{source}: expected one finished search, got {len(several)}; give a file of one of "
            f"them, such as {', '.join(path.name for path in several[:5])}"
        )
    if hdf5:
        return FoundSearch(LEOPARD, str(hdf5[0]), hdf5[0].stem, {"": hdf5[0]})
    if not ranked:
        raise InvalidInputError(
            f"{source}: expected a finished search's maps, such as mip.mrc, as Leopard-EM or "
            "cisTEM name them, got none; give results of devices (.npz, .pt) by their names"
        )
    (ending, before, after), paths = ranked[0]
    name = before.rstrip("_-.") or folder.absolute().name
    ordered = {name: paths[name] for name in _NAMES if name in paths}
    return FoundSearch(
        LEOPARD if ending == next(iter(_TOKENS)) else CISTEM,
        str(folder / f"{before}*{after}"),
        name + after.removesuffix(".mrc"),
        ordered,
    )


@dataclass(frozen=True)
class _Record:
    """What a table of results or a configuration says about the search that it names."""

    maps: tuple[str, ...]
    facts: Mapping[str, Any]
    micrograph: str | None = None
    template: str | None = None


def _look_beside(found: FoundSearch, folder: Path, given: Path | None) -> None:
    """Add the facts of all files that name this search's maps."""
    paths = found.files

    def is_of_search(text: str) -> bool:
        named = Path(text)
        return any(
            (path.name == named.name and (record == given or record.parent == path.parent))
            or named.parts[-2:] == path.absolute().parts[-2:]
            for path in paths
        )

    places = (folder, folder.absolute().parent)
    records = [given] if given else []
    records += [p for place in places for p in sorted(place.iterdir()) if p not in records]
    for record in records:
        reader = _READERS.get(record.suffix)
        if reader is None or not record.is_file():
            continue
        try:
            said = reader(record, is_of_search)
        except InvalidInputError:
            if record == given:
                raise
            continue  # it is of something else
        if said is None:
            continue
        for name, value in said.facts.items():
            found.facts.add(name, value, record.name)
        if (shape := _shape_of(record, said.template)) is not None:
            found.facts.add(BOX, shape[0][2], shape[1].name)
        if (shape := _shape_of(record, said.micrograph)) is not None:
            found.micrograph = (shape[0][1], shape[0][2]), shape[1]
    if found.program == CISTEM:
        _look_in_project(found, folder)


def _read_configuration(path: Path, is_of_search: Callable[[str], bool]) -> _Record | None:
    """Read Leopard-EM's configuration, which has counts if it was saved after the search."""
    if not _is_configuration(path):
        return None
    content = read_yaml(path, "Leopard-EM's configuration")
    result, optics = content.get("match_template_result"), content.get("optics_group")
    if not isinstance(result, Mapping):
        return None
    maps = tuple(str(result[key]) for key in ("mip_path", "hdf5_path") if result.get(key))
    if not any(map(is_of_search, maps)):
        return None
    size = positive_or_none(optics.get("pixel_size")) if isinstance(optics, Mapping) else None
    count = result.get("total_projections") or None
    facts = {COUNT_FACT: count, PIXEL: size, OFFSET: single_offset(result)}
    micrograph, template = (content.get(k) for k in ("micrograph_path", "template_volume_path"))
    return _Record(maps, facts, micrograph, template)


def _read_table(path: Path, is_of_search: Callable[[str], bool]) -> _Record | None:
    """Read Leopard-EM's table of results, of which every row repeats what it says of the search."""
    with path.open("rb") as file:
        if b"mip_path" not in file.readline(10_000):
            return None
    text = read_text(path, MAX_TEXT_NBYTES, "a table of results")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if is_of_search(row["mip_path"] or "")]
    if not rows:
        return None
    facts: dict[str, Any] = {}
    for name, column in ((COUNT_FACT, "total_correlations"), (PIXEL, "pixel_size")):
        values = {n for row in rows if (n := positive_or_none(row.get(column))) is not None}
        if len(values) > 1:
            raise InvalidInputError(f"{path}: {column}: expected one value, got {sorted(values)}")
        facts[name] = next(iter(values), None)
    if (count := facts[COUNT_FACT]) is not None and count.is_integer():
        facts[COUNT_FACT] = int(count)
    maps = (rows[0]["mip_path"],)
    return _Record(maps, facts, rows[0].get("micrograph_path"), rows[0].get("template_path"))


_READERS = dict.fromkeys(_TABLES, _read_table) | dict.fromkeys(_CONFIGURATIONS, _read_configuration)


def _is_configuration(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return b"match_template_result" in file.read(1_000_000)
    return False


def _map_named_in(record: Path) -> Path:
    """Return the map, or the HDF5 file, that a table or a configuration names."""
    named = _READERS[record.suffix](record, lambda _: True)
    if named is None:
        raise InvalidInputError(
            f"{record}: expected Leopard-EM's table of results or configuration, got something else"
        )
    for text in named.maps:
        if (path := _resolved(record, text)) is not None:
            return path
    raise InvalidInputError(f"{record}: names {', '.join(named.maps)}, which is not there")


def _resolved(record: Path, text: str | None) -> Path | None:
    """Return an existing file that a record names, by a path from where the search was started."""
    if not isinstance(text, str) or not text or "\0" in text:
        return None
    folder = record.absolute().parent
    candidates = (folder / text, Path(text), folder.parent / text, folder / Path(text).name)
    with suppress(OSError):
        return next((path for path in candidates if path.is_file()), None)
    return None


def _shape_of(record: Path, text: str | None) -> tuple[tuple[int, int, int], Path] | None:
    """Return the shape (z, y, x) of an MRC file that a record names, if it is there."""
    if (path := _resolved(record, text)) is None:
        return None
    with suppress(OSError, struct.error), path.open("rb") as file:
        header = file.read(224)
        nx, ny, nz = struct.unpack((">" if header[212:213] == b"\x11" else "<") + "3i", header[:12])
        return (nz, ny, nx), path
    return None


def _look_in_project(found: FoundSearch, folder: Path) -> None:
    """Add what cisTEM's histogram and its project's database have."""
    mip = found.paths.get("mip")
    if mip is None:
        return
    histogram = mip.with_name(re.sub(r"mip(_\d+_\d+)?\.mrc$", r"histogram\1.txt", mip.name))
    if histogram.is_file():
        lines = read_text(histogram, MAX_TEXT_NBYTES, "cisTEM's histogram").splitlines()
        rows = [line.split() for line in lines if line.strip() and line.lstrip()[0] not in "#C"]
        with suppress(ValueError, IndexError, OverflowError):
            found.histogram = _histogram_of(rows), histogram
    top = folder.absolute()
    for place in (top, *top.parents[:2]):
        for database in sorted(place.glob("*.db")):
            for pixel_size, box_angstrom in _rows_of_database(database, mip.name):
                size, edge = positive_or_none(pixel_size), positive_or_none(box_angstrom)
                found.facts.add(PIXEL, size, database.name)
                if size and edge:
                    found.facts.add(BOX, round(edge / size), database.name)


def _histogram_of(rows: list[list[str]]) -> CorrelationHistogram:
    """Return cisTEM's histogram, of which the text has the middles of the bins, and counts."""
    first, last = (float(row[0]) for row in (rows[0], rows[-1]))
    width = round((last - first) / max(len(rows) - 1, 1), 9) or 1.0  # middles are rounded
    if not all(0 <= float(row[1]) <= MAX_COUNT for row in rows):
        raise ValueError("not a count")
    counts = tuple(int(Decimal(row[1]).to_integral_value()) for row in rows)  # float64 would round
    return CorrelationHistogram(low=round(first - width / 2, 9), width=width, counts=counts)


def _rows_of_database(database: Path, mip: str) -> list[tuple[Any, Any]]:
    """Return pixel size and box size in Å of the searches that wrote a map of this name."""
    query = (
        "SELECT USED_PIXEL_SIZE, REF_BOX_SIZE_IN_ANGSTROMS FROM TEMPLATE_MATCH_LIST "
        "WHERE MIP_OUTPUT_FILE = ? OR MIP_OUTPUT_FILE LIKE ? ESCAPE '!'"
    )
    pattern = "%/" + re.sub("([!%_])", r"!\1", mip)
    with suppress(sqlite3.Error):
        connection = sqlite3.connect(f"file:{quote(str(database))}?mode=ro&immutable=1", uri=True)
        with closing(connection):
            steps = repeat(0, 1000)  # a view could run for ever
            connection.set_progress_handler(lambda: next(steps, 1), 100_000)
            return connection.execute(query, (mip, pattern)).fetchmany(100)
    return []
