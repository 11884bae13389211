"""The search space of an indexed search: its tables, and poses of global indices."""

import hashlib
from dataclasses import dataclass

import numpy as np

from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.model.maps import AnyArray, Float32

TABLES = ("euler_angles", "defocus_values", "pixel_values")


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All poses of a search, in the order of their global index.

    ``index = cs * (n_defocus * n_orientations) + defocus * n_orientations + orientation``, as in
    Leopard-EM 1.1 and later.

    Parameters
    ----------
    euler_angles
        (n_orientations, 3) float32, degrees: phi, theta, psi (ZYZ).
    defocus_values
        (n_defocus,) float32, Å, relative to the micrograph's defocus.
    pixel_values
        (n_cs,) float32, Å: offsets to the pixel size.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import SearchSpace
    >>> space = SearchSpace.from_tables([[0, 0, 0], [90, 45, 0]], [-200, 0, 200], [0])
    >>> space.n_poses
    6
    >>> phi, theta, psi, defocus, pixel_size = space.decode(np.array([3, -1]))
    >>> phi, defocus
    (array([90., nan], dtype=float32), array([ 0., nan], dtype=float32))
    """

    euler_angles: Float32
    defocus_values: Float32
    pixel_values: Float32

    @classmethod
    def from_tables(
        cls, euler_angles: object, defocus_values: object, pixel_values: object
    ) -> "SearchSpace":
        """Check the tables and convert them to float32.

        Raises
        ------
        InvalidInputError
            Lists every problem: not numeric, wrong shape, empty, not finite, or more than
            2**31 - 1 poses.
        """
        tables = [np.asarray(t) for t in (euler_angles, defocus_values, pixel_values)]
        problems = []
        for name, table, ndim in zip(TABLES, tables, (2, 1, 1), strict=True):
            if table.dtype.kind not in "fiu":
                problems.append(f"{name}: expected numbers, got dtype {table.dtype}")
            elif table.ndim != ndim or (ndim == 2 and table.shape[1] != 3):
                expected = "(n, 3)" if ndim == 2 else "(n,)"
                problems.append(f"{name}: expected shape {expected}, got {table.shape}")
            elif table.size == 0:
                problems.append(f"{name}: expected at least one value, got none")
            elif not np.isfinite(table).all():
                problems.append(f"{name}: expected finite values, got NaN or infinity")
        if not problems:
            n_poses = len(tables[0]) * len(tables[1]) * len(tables[2])
            if n_poses > np.iinfo(np.int32).max:
                problems.append(f"search space: {n_poses} poses do not fit a 32-bit index")
        if problems:
            raise InvalidInputError(problems)
        angles, defocus, pixel = (np.ascontiguousarray(t, dtype=np.float32) for t in tables)
        return cls(angles, defocus, pixel)

    @property
    def n_poses(self) -> int:
        """Number of poses; valid indices are smaller."""
        return len(self.euler_angles) * len(self.defocus_values) * len(self.pixel_values)

    @property
    def digest(self) -> str:
        """Fingerprint of the tables; equal tables have equal fingerprints."""
        hasher = hashlib.sha256()
        for table in (self.euler_angles, self.defocus_values, self.pixel_values):
            hasher.update(repr(table.shape).encode())
            hasher.update(np.ascontiguousarray(table, dtype="<f4").tobytes())
        return hasher.hexdigest()

    def decode(self, index: AnyArray) -> tuple[Float32, Float32, Float32, Float32, Float32]:
        """Return the poses of global indices.

        Parameters
        ----------
        index
            Integers of any shape, -1 or 0 <= index < :attr:`n_poses`.

        Returns
        -------
        tuple
            phi, theta, psi (degrees), defocus (Å), pixel-size offset (Å), each float32 of the
            shape of ``index``; NaN where the index is -1.

        Raises
        ------
        InvalidDataError
            An index is outside the search space.
        """
        if index.size and not -1 <= int(index.min()) <= int(index.max()) < self.n_poses:
            raise InvalidDataError(
                f"index: expected -1 to {self.n_poses - 1}, got {index.min()} to {index.max()}"
            )
        n_orientations, n_defocus = len(self.euler_angles), len(self.defocus_values)
        searched = index >= 0
        safe = np.where(searched, index, 0).astype(np.int64)
        pixel_number, rest = np.divmod(safe, n_orientations * n_defocus)
        defocus_number, orientation = np.divmod(rest, n_orientations)

        def of_searched(values: Float32) -> Float32:
            return np.where(searched, values, np.float32(np.nan))

        phi, theta, psi = (of_searched(angle[orientation]) for angle in self.euler_angles.T)
        defocus = of_searched(self.defocus_values[defocus_number])
        return phi, theta, psi, defocus, of_searched(self.pixel_values[pixel_number])
