"""STAR files: read with gemmi, whose grammar is strict, and written as RELION and cisTEM read them.

See DESIGN.md for why gemmi does not write them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from ocelot_em.errors import optional_import

_TO_ESCAPE = re.compile(r"[^\t\n -~]+|%")
_VALUE = re.compile(r"#.*|'[^']*'(?!\S)|\"[^\"]*\"(?!\S)|\S+")
_NOT_A_ROW = re.compile(r"_|(data|save)_|(loop|stop|global)_\s*($|#)", re.IGNORECASE)
_POSITION = re.compile(r"string:(\d+):\d+\(\d+\)")
_QUOTED = re.compile(r"$|.*\s|[_$;\[\]]|[.?]$|(data|save)_|(loop|stop|global)_$", re.IGNORECASE)
"""Values that are something else unless they are between quotation marks."""

_MISSING = ("nan", "NaN", "<NA>")
"""What pandas and starfile write for a missing value."""


@dataclass(frozen=True, slots=True)
class StarTable:
    """A loop of a STAR file, or the values of a block that stand outside loops as one row.

    ``columns`` are without the leading underscore, in the order of the file; ``rows`` have text
    without quotation marks, empty where a value is missing; ``lines`` are the rows' lines from 1.
    """

    block: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    lines: Sequence[int]


def parse_star(text: str) -> tuple[list[StarTable], list[str]]:
    """Return the tables of a STAR file without ragged rows, and a problem for each of these.

    Raise a ValueError if it is no STAR file, or the rows of a loop are not on lines of their own.
    """
    with optional_import("STAR files need gemmi", extra="tables"):
        from gemmi import cif
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    loops, problems = dict[int, list[int]](), list[str]()
    for start, width, rows in _loops(lines):
        for line in rows:
            n = sum(not value.startswith("#") for value in _VALUE.findall(lines[line - 1]))
            if n != width:
                problems.append(f"line {line}: expected {width} values, got {n}")
                lines[line - 1] = ""
        loops[start] = [line for line in rows if lines[line - 1]]
    document = cif.Document()
    try:
        document.parse_string(_TO_ESCAPE.sub(lambda m: quote(m[0], safe=""), "\n".join(lines)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(_POSITION.sub(r"line \1", str(error))) from error
    tables = []
    for block in document:
        name = unquote(block.name.strip())
        items: list[Any] = list(block)  # gemmi types pairs as objects
        if single := [item for item in items if item.pair]:
            tags, values = zip(*(item.pair for item in single), strict=True)
            tables.append(_table(cif, name, tags, values, [single[0].line_number]))
        for item in (item for item in items if item.loop):
            rows, n = loops.get(item.line_number, []), item.loop.length()
            if n != len(rows):
                raise ValueError(
                    f"line {item.line_number}: expected every row of the loop on a line of its "
                    f"own, got {n} rows on {len(rows)} lines"
                )
            tables.append(_table(cif, name, item.loop.tags, item.loop.values, rows))
    return tables, problems


def _loops(lines: Sequence[str]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield the line of each loop, its number of columns and the lines of its rows, from 1."""
    start, width, rows = 0, 0, list[int]()
    for number, line in enumerate(lines, 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        is_row = not _NOT_A_ROW.match(content)
        if start and is_row:
            rows.append(number)
        elif start and not rows and content.startswith("_"):
            width += 1
        elif not is_row:
            if start:
                yield start, width, rows
            is_loop = content.partition("#")[0].strip().lower() == "loop_"
            start, width, rows = number * is_loop, 0, []
    if start:
        yield start, width, rows


def _table(
    cif: Any, block: str, tags: Sequence[str], values: Sequence[str], lines: Sequence[int]
) -> StarTable:
    """Return values, row by row, without quotation marks and escapes."""
    plain = ["" if value in _MISSING else unquote(cif.as_string(value)) for value in values]
    rows = [tuple(plain[i : i + len(tags)]) for i in range(0, len(plain), len(tags))]
    return StarTable(block, tuple(unquote(tag[1:]) for tag in tags), rows, lines)


def format_star(blocks: Mapping[str, Any], comment: str = "") -> bytes:
    """Return a STAR file of blocks with a loop each: data frames, or lists of values by column.

    ``comment`` is a line at its beginning. Values that need quotation marks get double ones; none
    may contain them. :func:`star_rows` continues the last loop.
    """
    lines = ["# Created by ocelot-em", *([f"# {comment}"] if comment else []), ""]
    for name, block in blocks.items():
        lines += ["", f"data_{name}", "", "loop_"]
        lines += [f"_{column} #{number}" for number, column in enumerate(block, 1)]
        lines += [*_rows(block), ""]
    return "".join(f"{line}\n" for line in lines[:-1]).encode()


def star_rows(block: Any) -> bytes:
    """Return rows as of :func:`format_star`."""
    return "".join(f"{line}\n" for line in _rows(block)).encode()


STAR_END = b"\n\n"
"""End of a STAR file."""


def _rows(block: Any) -> Iterator[str]:
    columns = [np.asarray(values).astype(str).tolist() for _, values in block.items()]
    for row in zip(*columns, strict=True):
        yield "\t".join(f'"{v}"' if _QUOTED.match(v) else v for v in row)
