"""Tables that are stored by column and can be used like data frames."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.html import render
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.problems import suggestion
from ocelot_em.store.whole_file import write_file

if TYPE_CHECKING:
    import pandas as pd

_ROWS_SHOWN = 10
"""Number of rows shown in a notebook."""


@dataclass(frozen=True, slots=True)
class Column:
    """Dtype, unit and meaning of a column."""

    dtype: str
    unit: str
    meaning: str


@dataclass(frozen=True, eq=False, repr=False)
class ColumnTable:
    """One-dimensional arrays of equal length by name.

    A name selects the values of a column; names, columns as a pandas frame; a number, one row as a
    dictionary; and a slice, numbers or a mask, rows as a table. Iteration is over the rows, and the
    length is their number. ``described`` has the dtype, unit and meaning of every column.
    """

    described: ClassVar[Mapping[str, Column]]

    columns: Mapping[str, AnyArray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = zip(*(values.tolist() for values in self.columns.values()), strict=True)
        return (dict(zip(self.columns, row, strict=True)) for row in rows)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    @overload
    def __getitem__(self, key: str) -> AnyArray: ...
    @overload
    def __getitem__(self, key: list[str]) -> "pd.DataFrame": ...
    @overload
    def __getitem__(self, key: "int | np.integer[Any]") -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: "slice | Sequence[int] | AnyArray | pd.Series") -> Self: ...
    def __getitem__(self, key: Any) -> Any:
        names = [key] if isinstance(key, str) else key
        if isinstance(names, list) and names and isinstance(names[0], str):
            unknown = [name for name in names if name not in self.columns]
            if unknown:
                raise InvalidInputError(
                    f"column {name!r}: expected one of {', '.join(self.columns)}"
                    + suggestion(str(name), self.columns)
                    for name in unknown
                )
            return self.columns[key] if isinstance(key, str) else self.to_pandas()[names]
        if isinstance(key, (int, np.integer)):
            return {name: values[key].item() for name, values in self.columns.items()}
        which = key if isinstance(key, slice) else np.asarray(key)
        if isinstance(which, np.ndarray) and not which.size:
            which = which.astype(np.intp)  # an empty list
        return replace(self, columns={name: own[which] for name, own in self.columns.items()})

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.columns)

    def head(self, n: int = 5) -> Self:
        """Return the first, highest particles."""
        return self[:n]

    def __repr__(self) -> str:
        return "\n".join([f"<{self._summary()}>", *([str(self.to_pandas())] if len(self) else [])])

    def to_csv(self, path: str | PathLike[str], *, overwrite: bool = True) -> Path:
        """Write a header line and one line per particle; return the path.

        Floating-point numbers have enough digits to be read again with the same bits; NaN is
        ``nan``.

        Raises
        ------
        OutputExistsError
            If the file exists, and ``overwrite`` is False.
        StorageError
            If the file cannot be written.
        """
        header = ",".join(self.columns) + "\n"
        return write_file(path, header.encode() + self.csv_rows(), overwrite=overwrite)

    def csv_rows(self) -> bytes:
        """Return the lines of :meth:`to_csv` after the first."""
        rows = zip(*(as_text(values) for values in self.columns.values()), strict=True)
        return "".join(",".join(row) + "\n" for row in rows).encode()

    def to_pandas(self) -> "pd.DataFrame":
        """Return the columns as a pandas DataFrame, without what else is known of the table."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def facts(self) -> Mapping[str, object] | None:
        """Return what is known of the whole table, for the metadata of a file; None: nothing."""
        raise NotImplementedError

    def to_parquet(self, path: str | PathLike[str], *, overwrite: bool = True) -> Path:
        """Write all columns with their units, and what is known of the table; return the path.

        Raises
        ------
        OutputExistsError
            If the file exists, and ``overwrite`` is False.
        StorageError
            If the file cannot be written.
        MissingDependencyError
            pyarrow is not installed.
        """
        from ocelot_em import write_parquet

        return write_parquet(self, path, overwrite=overwrite)

    def _summary(self) -> str:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return an HTML summary with the first rows, for notebooks."""
        known = [(name, self.described[name]) for name in self.columns]
        shown = [map(_short, values[:_ROWS_SHOWN]) for values in self.columns.values()]
        return render(
            "particles/templates/table.html.j2",
            summary=self._summary(),
            columns=[(name, f"{column.meaning} ({column.unit})") for name, column in known],
            rows=zip(*shown, strict=True),
            n_more=max(len(self) - _ROWS_SHOWN, 0),
        )


def _short(value: np.generic) -> str:
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)


def as_text(values: AnyArray) -> list[str]:
    """Convert (n,) values to the shortest text that reads back as the same values."""
    # A float32 converted to a Python float would have too many digits.
    return [str(v) for v in (values if values.dtype == np.float32 else values.tolist())]
