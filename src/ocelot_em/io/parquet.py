"""Tables of particles and of correlations in Parquet files."""

import json
from collections import Counter
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ocelot_em.errors import InvalidInputError, optional_import
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import AnyArray
from ocelot_em.particles.correlations import COLUMNS as ROW
from ocelot_em.particles.correlations import Correlations
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    MONTAGE_COLUMNS,
    ParticleTable,
    PickInfo,
    text_array,
)
from ocelot_em.store.whole_file import whole_or_nothing, write_file

_PARQUET_KEY = b"ocelot_em.about"
MAX_PARTICLES = 2**24
"""Maximum number of particles to read; they take two gigabytes of memory."""

_ROW_GROUP = 2**20
"""Minimum number of rows of a group, but for the last one."""

_TEXT_COLUMNS = [name for name, column in MONTAGE_COLUMNS.items() if column.dtype == "str"]


def write_parquet(table: ParticleTable, path: str | PathLike[str]) -> None:
    """Write all columns with units, and the picking parameters in the schema's metadata."""
    pa = _pyarrow()
    schema = pa.schema(
        [
            pa.field(
                name,
                pa.from_numpy_dtype(values.dtype),
                nullable=False,
                metadata={"unit": ALL_COLUMNS[name].unit, "meaning": ALL_COLUMNS[name].meaning},
            )
            for name, values in table.columns.items()
        ],
        metadata={_PARQUET_KEY: json.dumps(asdict(table.about)) if table.about else "null"},
    )
    arrays = [pa.array(values) for values in table.columns.values()]
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    write_file(path, buffer.getvalue().to_pybytes())


def write_correlations(
    place: str | PathLike[str] | MergedResult,
    path: str | PathLike[str],
    *,
    cutoff: float | None = None,
) -> tuple[int, Correlations]:
    """Write the rows of :func:`~ocelot_em.read_correlations`, block by block.

    Returns the number of rows, and what was read. The schema's metadata has threshold and cutoff.
    """
    pa, found = _pyarrow(), Correlations(place, cutoff)
    about = json.dumps({"threshold": found.threshold, "cutoff": found.cutoff})
    schema = pa.schema(
        [pa.field(name, pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in ROW.items()],
        metadata={_PARQUET_KEY: about},
    )
    n_rows, blocks = 0, list[Any]()
    with whole_or_nothing(Path(path)) as staged, pa.parquet.ParquetWriter(staged, schema) as writer:

        def write() -> None:
            writer.write_table(pa.Table.from_batches(blocks, schema))
            blocks.clear()

        for rows in found:
            arrays = [pa.array(rows[name]) for name in ROW]
            blocks.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
            n_rows += len(arrays[0])
            if sum(block.num_rows for block in blocks) >= _ROW_GROUP:
                write()
        write()
    return n_rows, found


def read_parquet(path: str | PathLike[str]) -> ParticleTable:
    """Read a table written by :func:`write_parquet`, without any loss.

    Files of other programs with the same columns are read without picking parameters.
    """
    pa = _pyarrow()
    try:
        found = _read_arrow(pa, Path(path))
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {problem}" for problem in error.problems) from None
    except Exception as error:  # pyarrow's exceptions are undocumented
        raise InvalidInputError(f"{path}: cannot be read as Parquet: {error}") from error
    metadata = found.schema.metadata or {}
    problems = [
        f"{name}: expected a value for each particle, got {found[name].null_count} without"
        for name in found.column_names
        if found[name].null_count
    ]
    about = None
    try:
        about = TypeAdapter(PickInfo | None).validate_json(metadata.get(_PARQUET_KEY, b"null"))
    except ValidationError as error:
        problems += [
            f"{_PARQUET_KEY.decode()}: {'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors()
        ]
    if not problems:
        try:
            return ParticleTable(_to_columns(found), about)
        except InvalidInputError as error:
            problems += error.problems
    raise InvalidInputError(f"{path}: {problem}" for problem in problems)


def _read_arrow(pa: Any, path: Path) -> Any:
    """Check a file's metadata, then read its table."""
    if not path.is_file():
        raise ValueError("expected a file, got nothing there")
    names = pa.parquet.read_schema(path).names
    texts = [name for name in _TEXT_COLUMNS if name in names]
    # Text repeated in many rows is in memory once.
    with pa.parquet.ParquetFile(path, read_dictionary=texts) as file:
        n = file.metadata.num_rows
        if n > MAX_PARTICLES:
            raise InvalidInputError(f"expected at most {MAX_PARTICLES:,} particles, got {n:,}")
        _to_columns(file.schema_arrow.empty_table())
        table = file.read()
    table.validate(full=True)
    return table


def _to_columns(table: Any) -> dict[str, AnyArray]:
    """Return the columns of an Arrow table, with text as NumPy arrays.

    Unknown columns are refused, and so is text that would need too much memory.
    """
    counts = Counter(table.column_names)
    problems = [f"{n}: expected once, got {k} columns" for n, k in counts.items() if k > 1]
    columns = dict[str, AnyArray]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = column.to_numpy()
        if name in _TEXT_COLUMNS and columns[name].dtype == object:
            columns[name], problem = text_array(columns[name].tolist())
            problems += [f"{name}: {problem}"] if problem else []
    if problems:
        raise InvalidInputError(problems)
    return dict(ParticleTable(columns).columns)


def _pyarrow() -> Any:
    with optional_import("Parquet files need pyarrow", extra="tables"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow
