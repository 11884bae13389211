"""Columns of text: CSV files are read into them, and texts are checked and made arrays."""

import csv
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray

_MAX_NBYTES = 2**30
"""Maximum size of a CSV file to read: about six million particles."""

_MAX_CHARACTERS = 2**28
"""Maximum size of a text column (1 GiB), padded to the longest row."""


def read_rows(path: str | PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a CSV file as text."""
    place = Path(path)
    if not place.is_file():
        raise InvalidInputError(f"{place}: expected a CSV file, got nothing there")
    try:
        nbytes = place.stat().st_size
        if nbytes > _MAX_NBYTES:
            raise InvalidInputError(
                f"{place}: expected at most {_MAX_NBYTES:,} bytes, got {nbytes:,}; is it a table "
                "of particles?"
            )
        with place.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a BOM
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{place}: cannot be read as CSV: {error}") from error
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise InvalidInputError(
            f"{place}: expected a header line with the columns, got an empty file"
        )
    return rows[0], rows[1:]


def ragged(rows: Sequence[Sequence[str]], n_columns: int) -> list[str]:
    """Return an error message if rows have another number of values, else nothing."""
    bad = [(line, len(row)) for line, row in enumerate(rows, 2) if len(row) != n_columns]
    if not bad:
        return []
    line, n = bad[0]
    return [f"line {line}: expected {n_columns} values, got {n}{_and_more(len(bad) - 1)}"]


def _and_more(n: int) -> str:
    return f"; and {n} more such line{'' if n == 1 else 's'}" if n else ""


def parse_column(texts: Sequence[str], dtype: str) -> tuple[AnyArray, list[str]]:
    """Parse a column; return its values and an error message for the first invalid text, if any."""
    kind = np.dtype(dtype)
    if kind.kind == "U":
        values, problem = text_array(texts)
        return values, [problem] if problem else []
    convert: Any = int if kind.kind == "i" else float
    widest = np.dtype(np.int64 if kind.kind == "i" else np.float64)
    try:
        wide = np.fromiter(map(convert, texts), widest, len(texts))
        with np.errstate(over="ignore"):
            values = wide.astype(kind)
    except (ValueError, OverflowError):
        bad = [(line, text) for line, text in enumerate(texts, 2) if not _fits(text, convert)]
    else:
        same = (values == wide) if kind.kind == "i" else (np.isinf(values) == np.isinf(wide))
        bad = [(i + 2, texts[i]) for i in np.flatnonzero(~same).tolist()]
        if not bad:
            return values, []
    line, text = bad[0]
    return np.empty(0, kind), [
        f"line {line}: expected {dtype}, got {text!r}{_and_more(len(bad) - 1)}"
    ]


def text_array(texts: Sequence[object]) -> tuple[AnyArray, str | None]:
    """Return texts as a fixed-width NumPy array, and an error message or None."""
    other = next((type(text).__name__ for text in texts if not isinstance(text, str)), None)
    if other is not None:
        return np.empty(0, str), f"expected text, got {other}"
    longest = max((len(cast("str", text)) for text in texts), default=0)
    if longest * len(texts) > _MAX_CHARACTERS:
        return np.empty(0, str), (
            f"expected at most {_MAX_CHARACTERS // len(texts):,} characters in each of "
            f"{len(texts):,} rows, got {longest:,}"
        )
    return np.array(texts, str), None


def _fits(text: str, convert: Any) -> bool:
    try:
        number = convert(text)
    except ValueError:
        return False
    return convert is float or -(2**63) <= number < 2**63
