"""Tables of particles and of correlations in Parquet files."""

import json
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ocelot_em.errors import InvalidInputError, optional_import
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.problems import require
from ocelot_em.particles.column_table import ColumnTable
from ocelot_em.particles.correlations import Correlations
from ocelot_em.particles.csv_columns import text_array
from ocelot_em.particles.detections import Detections
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    TABLE_EXPECTED,
    ParticleTable,
    PickInfo,
)
from ocelot_em.store.whole_file import refuse_existing, whole_or_nothing

_PARQUET_KEY = b"ocelot_em.about"
MAX_PARTICLES = 2**24
"""Maximum number of particles to read; they take two gigabytes of memory."""

_ROW_GROUP = 2**20
"""Minimum number of rows of a group, but for the last one."""

_TEXT_COLUMNS = [name for name, column in ALL_COLUMNS.items() if column.dtype == "str"]


def write_parquet(
    table: ColumnTable | Detections, output: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write all columns with units, and the picking parameters in the schema's metadata.

    A :class:`ocelot_em.Comparison` is written likewise, with what was compared. Detections are
    found meanwhile, and written block by block.

    Raises
    ------
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written.
    MissingDependencyError
        pyarrow is not installed.

    Examples
    --------
    >>> from ocelot_em import find_peaks, read_parquet, write_parquet
    >>> path = write_parquet(find_peaks("MERGED.zarr"), "particles.parquet")
    >>> len(read_parquet(path))
    20
    """
    if isinstance(table, Detections):
        return write_correlations(table, output, overwrite=overwrite)
    require(table, ColumnTable, TABLE_EXPECTED)
    refuse_existing([Path(output)], overwrite)
    with whole_or_nothing(Path(output)) as staged, TableWriter(staged, table) as writer:
        writer.write(table)
    return Path(output)


class TableWriter:
    """Writes rows into a Parquet file, table by table; a context manager.

    Parameters
    ----------
    path
        File to write.
    like
        Table whose columns and facts the file gets.
    """

    def __init__(self, path: Path, like: ColumnTable) -> None:
        self._pa = pa = _pyarrow()
        fields = [
            pa.field(
                name,
                pa.from_numpy_dtype(values.dtype),
                nullable=False,
                metadata={"unit": about.unit, "meaning": about.meaning},
            )
            for name, values in like.columns.items()
            if (about := like.described[name])
        ]
        self._schema = pa.schema(fields, metadata={_PARQUET_KEY: json.dumps(like.facts())})
        self._writer = pa.parquet.ParquetWriter(path, self._schema)
        self._blocks = list[Any]()

    def write(self, table: ColumnTable) -> None:
        """Add the rows of a table with the same columns."""
        arrays = [_convertible(values) for values in table.columns.values()]
        self._blocks.append(self._pa.record_batch(arrays, schema=self._schema))
        if sum(block.num_rows for block in self._blocks) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._pa.Table.from_batches(self._blocks, self._schema))
        self._blocks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()


def write_correlations(
    source: Correlations | Detections, output: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write correlations block by block; the schema's metadata describes them.

    It has their threshold and cutoff, of a montage the lowest and those of each exposure, of
    detections what suppressed others, and what the search lacked, if anything. Columns have units.
    """
    pa, place, blocks = _pyarrow(), Path(output), list[Any]()
    fields = [
        pa.field(
            name,
            pa.from_numpy_dtype(np.dtype(dtype)),
            nullable=False,
            metadata={"unit": ALL_COLUMNS[name].unit if name in ALL_COLUMNS else "1"},
        )
        for name, dtype in source.columns.items()
    ]
    schema = pa.schema(fields, metadata={_PARQUET_KEY: json.dumps(source.facts)})
    refuse_existing([place], overwrite)
    with whole_or_nothing(place) as staged, pa.parquet.ParquetWriter(staged, schema) as writer:

        def write() -> None:
            writer.write_table(pa.Table.from_batches(blocks, schema))
            blocks.clear()

        for rows in source:
            arrays = [_convertible(rows[name]) for name in source.columns]
            blocks.append(pa.record_batch(arrays, schema=schema))
            if sum(block.num_rows for block in blocks) >= _ROW_GROUP:
                write()
        write()
    return place


def read_parquet(path: str | PathLike[str]) -> ParticleTable:
    """Read a table written by :func:`write_parquet`, without any loss.

    Files of other programs with the same columns are read without picking parameters.

    Raises
    ------
    InvalidInputError
        The file is not a table of particles; lists every problem.
    MissingDependencyError
        pyarrow is not installed.

    Examples
    --------
    >>> from ocelot_em import find_peaks, read_parquet
    >>> path = find_peaks("MERGED.zarr").to_parquet("particles.parquet")
    >>> read_parquet(path).about.method
    'gaussian'
    """
    pa = _pyarrow()
    try:
        found = _read_arrow(pa, Path(path))
        problems = [
            f"{name}: expected a value for each particle, got {found[name].null_count} without"
            for name in found.column_names
            if found[name].null_count
        ]
        about = None
        try:
            text = (found.schema.metadata or {}).get(_PARQUET_KEY, b"null")
            about = TypeAdapter(PickInfo | None).validate_json(text)
        except ValidationError as error:
            problems += [
                f"{_PARQUET_KEY.decode()}: {'.'.join(map(str, e['loc']))}: {e['msg']}"
                for e in error.errors()
            ]
        if problems:
            raise InvalidInputError(problems)
        return ParticleTable(_to_columns(found), about)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {problem}" for problem in error.problems) from None


def _read_arrow(pa: Any, path: Path) -> Any:
    """Check a file's metadata, then read its table."""
    try:
        if not path.is_file():
            raise ValueError("expected a file, got nothing there")
        names = pa.parquet.read_schema(path).names
        texts = [name for name in _TEXT_COLUMNS if name in names]
        # Text that is repeated in many rows is stored once in memory.
        with pa.parquet.ParquetFile(path, read_dictionary=texts) as file:
            n = file.metadata.num_rows
            if n > MAX_PARTICLES:
                raise InvalidInputError(f"expected at most {MAX_PARTICLES:,} particles, got {n:,}")
            _to_columns(file.schema_arrow.empty_table())
            table = file.read()
        table.validate(full=True)
        return table
    except InvalidInputError:
        raise
    except Exception as error:  # pyarrow's exceptions are undocumented
        raise InvalidInputError(f"cannot be read as Parquet: {error}") from error


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


def _convertible(values: AnyArray) -> Any:
    """Return values from which pyarrow makes one array: it makes several of long texts of NumPy."""
    if values.dtype.kind != "U":
        return values
    if values.nbytes:  # usually one name, of which all code points are compared
        codes = np.ascontiguousarray(values).view("u4").reshape(len(values), -1)
        if (codes == codes[0]).all():
            return _pyarrow().repeat(str(values[0]), len(values))
    return values.tolist()


def _pyarrow() -> Any:
    with optional_import("Parquet files need pyarrow", extra="tables"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow
