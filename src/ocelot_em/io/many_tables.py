"""One table of the particles of many micrographs, written micrograph by micrograph."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from ocelot_em.io.optics import Optics
from ocelot_em.io.parquet import TableWriter
from ocelot_em.io.star_file import STAR_END, format_star, star_rows
from ocelot_em.io.tables import OpticsGroups, cistem_matches
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.whole_file import whole_or_nothing

Kind = Literal["csv", "parquet", "relion", "cistem"]
"""Format of a table."""

FILES: Mapping[Kind, str] = {
    "csv": "particles.csv",
    "parquet": "particles.parquet",
    "relion": "particles.star",
    "cistem": "particles_cistem.star",
}
"""File of each format."""

WITH_OPTICS = ("relion", "cistem")
"""Formats that need the optics of every micrograph."""

Write = Callable[[ParticleTable, str], None]
"""Adds the particles of a micrograph, by its name."""


@contextmanager
def open_tables(
    folder: Path,
    kinds: Collection[Kind],
    like: ParticleTable,
    optics: Mapping[str, Optics],
    comment: str = "",
) -> Iterator[Write]:
    """Yield a function that adds the particles of a micrograph to all tables.

    Each file is written whole or not at all, and replaces an existing one at the end.

    Parameters
    ----------
    folder, kinds
        Where the files are, and their formats.
    like
        An empty table with the columns of all.
    optics
        Optics by the names of the micrographs.
    comment
        Line at the beginning of STAR files, such as that searches were incomplete.

    Raises
    ------
    InvalidInputError
        STAR files cannot hold the name of a micrograph, a template or an optics group.
    StorageError
        A file cannot be written.
    MissingDependencyError
        pyarrow is not installed.
    """
    with ExitStack() as stack:
        writers = list[Write]()
        for kind in kinds:
            path = stack.enter_context(whole_or_nothing(folder / FILES[kind]))
            if kind == "parquet":
                own = stack.enter_context(TableWriter(path, like))
                writers.append(lambda table, _, own=own: own.write(table))  # type: ignore[misc]
                continue
            file = stack.enter_context(path.open("wb"))
            if kind == "csv":
                file.write((",".join(like.columns) + "\n").encode())
                writers.append(lambda table, _, file=file: file.write(table.csv_rows()))  # type: ignore[misc]
            elif optics:  # without any, there are no particles
                writers.append(_STAR_WRITERS[kind](file, like, optics, comment))
                stack.callback(file.write, STAR_END)

        def write(table: ParticleTable, name: str) -> None:
            for own in writers:
                own(table, name)

        yield write


def _relion(
    file: BinaryIO, like: ParticleTable, optics: Mapping[str, Optics], comment: str
) -> Write:
    several = list(optics.values())
    groups = OpticsGroups(several)
    blocks = {"optics": groups.block, "particles": groups.particles(like, several[0])}
    file.write(format_star(blocks, comment))

    def write(table: ParticleTable, name: str) -> None:
        file.write(star_rows(groups.particles(table, optics[name])))

    return write


def _cistem(
    file: BinaryIO, like: ParticleTable, optics: Mapping[str, Optics], comment: str
) -> Write:
    file.write(format_star({"": cistem_matches(like, next(iter(optics.values())))}, comment))
    n_before = 0

    def write(table: ParticleTable, name: str) -> None:
        nonlocal n_before
        file.write(star_rows(cistem_matches(table, optics[name], n_before + 1)))
        n_before += len(table)

    return write


_STAR_WRITERS = {"relion": _relion, "cistem": _cistem}


def require_star_names(kinds: Collection[Kind], optics: Optics) -> None:
    """Raise an InvalidInputError if STAR files cannot hold the names in optics."""
    for kind in {*kinds} & {*_STAR_WRITERS}:
        _STAR_WRITERS[kind](BytesIO(), ParticleTable.empty(), {"": optics}, "")
