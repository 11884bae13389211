"""Properties of a search and of an exposure."""

from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.arrays import HostRows
from ocelot_em.model.maps import MAPS, SQUARED_SUM, SUM, AnyArray, MapSet, PoseForm
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import attributes as fmt
from ocelot_em.store.metadata import problems_of

OneMap = TypeVar("OneMap", bound=AnyArray | HostRows)


@dataclass(frozen=True)
class Exposure:
    """One of several exposures of a search, which together cover a canvas.

    Parameters
    ----------
    id
        Name of the exposure, unique in the search: letters, digits, ``.``, ``_``, ``-``.
    origin
        Row and column (y, x) of its first pixel on the canvas, in pixels. May be negative or
        fractional, but a merge requires whole pixels unless asked to round.
    acquired
        Order of acquisition: lower is earlier.
    valid_shape
        Height and width of its valid pixels, starting at its first pixel. None means the valid
        shape from the search's template box.

    Examples
    --------
    >>> from ocelot_em import Exposure, SearchInfo
    >>> exposure = Exposure("03", origin=(0, 3900), acquired=3)
    >>> SearchInfo(template_box=512, exposure=exposure).exposure_id
    '03'
    """

    id: str
    origin: tuple[float, float]
    acquired: int
    valid_shape: tuple[int, int] | None = None

    def attributes(self, shape: tuple[int, int], info: "SearchInfo") -> fmt.ExposureAttributes:
        """Return its stored attributes for maps of this shape, without its final number."""
        try:
            valid = info.valid_shape(shape) if self.valid_shape is None else self.valid_shape
            if not self.id:
                raise InvalidInputError("exposure id: expected a name, got an empty one")
            y, x = self.origin
            return fmt.ExposureAttributes(
                id=self.id,
                number=0,
                origin=(float(y), float(x)),
                acquired=self.acquired,
                shape=shape,
                valid_shape=valid,
                total_projections=0,
            )
        except ValidationError as error:
            raise InvalidInputError(
                f"exposure {self.id!r}: {problem}" for problem in problems_of(error)
            ) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(
                f"exposure {self.id!r}: origin: expected two numbers (y, x), got {self.origin!r}"
            ) from None


@dataclass(frozen=True)
class SearchInfo:
    """Properties that all partials of a search share, and a new partial's exposure and counts.

    Parameters
    ----------
    template_box
        Edge of the template box in pixels, for maps of the micrograph's shape (mode ``same``):
        the last ``template_box - 1`` rows and columns are wrapped around and invalid. None means
        that all pixels are valid.
    pixel_size_angstrom
        Pixel size of the micrograph in Å, if known.
    search_space
        The tables of an indexed search; None for explicit poses.
    has_pixel_size
        Whether explicit poses include ``best_pixel_size``.
    float64_sums
        Whether the sums are stored as float64. float32, which most searches use, takes half the
        space; float64 sums are then rejected because they would be rounded.
    exposure
        Exposure of a montage that the partial belongs to; the same for all its partials.
    chunk_files
        Whether each chunk of a map is a file, as always in buckets; by default, up to 16 x 16
        chunks are a file, a Zarr shard.
    looks_wrapped
        Whether the edges of maps without a template box look wrapped around. Results state it.
    template_name
        Name of the template, as ``--group-by template`` uses it: letters, digits, ``.``, ``_``,
        ``-``. Default: the name of the store.
    has_counts
        Whether the new partial has a map ``total_projections``, because its pixels were correlated
        with different numbers of projections. Each partial of a search may or may not have one.

    Examples
    --------
    >>> from ocelot_em import SearchInfo
    >>> SearchInfo(template_box=512, pixel_size_angstrom=0.95).valid_shape((4092, 5760))
    (3581, 5249)
    """

    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    search_space: SearchSpace | None = None
    has_pixel_size: bool = True
    float64_sums: bool = False
    exposure: Exposure | None = None
    chunk_files: bool = False
    looks_wrapped: bool = False
    template_name: str | None = None
    has_counts: bool = False

    def stored_dtype(self, name: str) -> str:
        """Stored dtype of a map of a partial."""
        wide = self.float64_sums and name in (SUM, SQUARED_SUM)
        return "float64" if wide else MAPS[name].dtypes[0]

    @property
    def exposure_id(self) -> str:
        """Id of the exposure; empty if there is none."""
        return "" if self.exposure is None else self.exposure.id

    @property
    def takes_all_pixels(self) -> bool:
        """Whether all pixels are taken as valid, because nothing states which ones are."""
        exposure = self.exposure
        return self.template_box is None and (exposure is None or exposure.valid_shape is None)

    @property
    def maps(self) -> MapSet:
        """Maps of the new partial."""
        if self.search_space is not None:
            return MapSet(PoseForm.INDEXED, counts=self.has_counts)
        return MapSet(PoseForm.EXPLICIT, self.has_pixel_size, self.has_counts)

    def valid_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the valid pixels of maps of this shape.

        Raises
        ------
        InvalidInputError
            The template box does not fit.
        """
        if self.template_box is None:
            return shape
        box = self.template_box
        if not 1 <= box <= min(shape):
            raise InvalidInputError(
                f"template box: expected 1 to {min(shape)} pixels for maps of {shape}, got {box}"
            )
        return shape[0] - box + 1, shape[1] - box + 1
