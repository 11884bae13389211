"""Correlation tables: correlations above a threshold, as Leopard-EM 1.3 records them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.arrays import as_numpy
from ocelot_em.model.maps import AnyArray

TABLE: Final = "correlation_table"
"""Key of a result that holds its table."""

THRESHOLD: Final = "threshold"
"""Key of a table that is not a column: all correlations of the search above it are rows."""

VALUE: Final = "corr_value"
"""Column with the correlations."""


@dataclass(frozen=True)
class CorrelationTable:
    """The correlations of one device, or of several, above a threshold.

    Parameters
    ----------
    threshold
        All correlations above it are in the table.
    columns
        One-dimensional arrays of one length by name. Leopard-EM 1.3 has ``global_idx``, ``pos_x``,
        ``pos_y`` (pixels) and ``corr_value``.
    """

    threshold: float
    columns: Mapping[str, AnyArray]

    @classmethod
    def of(cls, value: Any, place: str) -> Self:
        """Return the table of a result: a dictionary or a TensorDict of NumPy arrays or tensors.

        Raises
        ------
        InvalidInputError
        """
        try:
            columns = {key: as_numpy(column) for key, column in dict(value.items()).items()}
            threshold = float(columns.pop(THRESHOLD))
        except KeyError:
            raise InvalidInputError(f"{place}: {THRESHOLD}: missing") from None
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"{place}: expected a dictionary of columns and a {THRESHOLD}, got "
                f"{type(value).__name__} ({error})"
            ) from None
        if VALUE not in columns:
            raise InvalidInputError(f"{place}: {VALUE}: missing")
        shapes = {key: column.shape for key, column in columns.items()}
        if any(len(shape) != 1 for shape in shapes.values()) or len({*shapes.values()}) > 1:
            raise InvalidInputError(f"{place}: expected columns of one length, got {shapes}")
        return cls(threshold, columns)

    def above(self, threshold: float) -> Self:
        """Return the table of a higher threshold."""
        if threshold == self.threshold:
            return self
        rows = self.columns[VALUE] > threshold
        columns = {key: column[rows] for key, column in self.columns.items()}
        return type(self)(threshold, columns)


def merge_tables(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Concatenate the tables of results, in their order, under their key; empty without any.

    If thresholds differ, the highest one applies to all, since only above it nothing is missing.

    Raises
    ------
    InvalidInputError
        Lists every problem: a table that only some results have, or that cannot be read; unequal
        columns.
    """
    if not any(TABLE in result for result in results):
        return {}
    tables, problems = list[CorrelationTable](), list[str]()
    for number, result in enumerate(results):
        place = f"device {number}, {TABLE}"
        if TABLE not in result:
            problems.append(f"{place}: missing, but other devices have it; give it for all of them")
            continue
        try:
            tables.append(CorrelationTable.of(result[TABLE], place))
        except InvalidInputError as error:
            problems += error.problems
            continue
        expected, got = ({*table.columns} for table in (tables[0], tables[-1]))
        if expected != got:
            problems.append(f"{place}: expected columns {sorted(expected)}, got {sorted(got)}")
    if problems:
        raise InvalidInputError(problems)
    threshold = max(table.threshold for table in tables)
    parts = [table.above(threshold).columns for table in tables]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {TABLE: {**columns, THRESHOLD: threshold}}
