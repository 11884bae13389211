"""Searches and their partials: writing them, and opening them (or earlier merges) as inputs."""

import datetime
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from os import PathLike
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import StringConstraints, TypeAdapter, ValidationError

from ocelot_em.errors import (
    FormatError,
    IncompleteError,
    InvalidDataError,
    InvalidInputError,
    StoreNotFoundError,
)
from ocelot_em.model.arrays import HostRows, as_numpy, exact_count
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    INDEX,
    MAPS,
    MIP,
    NOT_SEARCHED,
    PIXEL_SIZE,
    SQUARED_SUM,
    SUM,
    AnyArray,
    MapSet,
    PoseForm,
)
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store.objects import Objects, open_objects

_Map = TypeVar("_Map", bound=AnyArray | HostRows)


@dataclass(frozen=True)
class SearchInfo:
    """What all partials of a search share.

    Parameters
    ----------
    template_box
        Edge of the template box in pixels, for maps of the micrograph's shape (mode ``same``):
        the last ``template_box - 1`` rows and columns are wrapped around and not valid. None: all
        pixels are valid.
    pixel_size_angstrom
        Pixel size of the micrograph in Å, if known.
    search_space
        The tables of an indexed search; None for explicit poses.
    has_pixel_size
        Whether explicit poses include ``best_pixel_size``.
    float64_sums
        Whether the sums are stored as float64; as float32, which most searches have, they take
        half the space, and float64 sums are refused because they would be rounded.
    """

    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    search_space: SearchSpace | None = None
    has_pixel_size: bool = True
    float64_sums: bool = False

    def stored_dtype(self, name: str) -> str:
        """Dtype that a map of a partial is stored in."""
        wide = self.float64_sums and name in (SUM, SQUARED_SUM)
        return "float64" if wide else MAPS[name].dtypes[0]

    @property
    def maps(self) -> MapSet:
        """Which maps each partial has."""
        if self.search_space is not None:
            return MapSet(PoseForm.INDEXED)
        return MapSet(PoseForm.EXPLICIT, self.has_pixel_size)

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


@dataclass(frozen=True)
class Exposure:
    """One of several exposures of a search, which together cover a canvas.

    Parameters
    ----------
    id
        Name of the exposure, unique in the search: letters, digits, ``.``, ``_``, ``-``.
    origin
        Row and column (y, x) of its first pixel on the canvas, in pixels. May be negative, and
        fractional, though a merge takes whole pixels only, or rounds when asked to.
    acquired
        Order of acquisition: lower is earlier.
    valid_shape
        Height and width of its valid pixels, from its first pixel on. None: what the search's
        template box leaves.
    """

    id: str
    origin: tuple[float, float]
    acquired: int
    valid_shape: tuple[int, int] | None = None

    def attributes(self, shape: tuple[int, int], info: SearchInfo) -> fmt.ExposureAttributes:
        """Return what is stored of it, with maps of this shape, but for its number.

        Raises
        ------
        InvalidInputError
            Naming everything that is wrong.
        """
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
                f"exposure {self.id!r}: {'.'.join(map(str, p['loc'])) or 'shapes'}: {p['msg']}, "
                f"got {p['input']!r}"
                for p in error.errors()
            ) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(
                f"exposure {self.id!r}: origin: expected two numbers (y, x), got {self.origin!r}"
            ) from None


def write_partial(
    store: str | PathLike[str],
    name: str,
    result: Mapping[str, object],
    *,
    total_projections: int,
    order: int = 0,
    search: SearchInfo | None = None,
    exposure: Exposure | None = None,
) -> None:
    """Write what one device found as a partial of a search.

    Several processes may write different partials of one search at the same time; the first one
    creates it. Nothing is written unless everything is in order.

    Parameters
    ----------
    store
        Path or URL of the search; made if it is not there.
    name
        Name of the partial, unique in the search: letters, digits, ``.``, ``_``, ``-``.
    result
        Maps by name (see :class:`MapSet`), each (y, x), NumPy, torch or CuPy; ``mip`` is -inf
        where nothing was searched. Other keys are ignored. With a search space the indexed form
        is taken, without it the explicit one. Sums keep their dtype, float32 or float64. Maps on
        a GPU are brought to the host a band of rows at a time, twice: to check them, and to write.
    total_projections
        How many cross-correlations the sums hold, exactly.
    order
        Partials are merged in ascending order, then by name; earlier ones win ties.
    search
        What the partials share; by default explicit poses, all pixels valid.
    exposure
        Which exposure of a montage this is a partial of; the same for all its partials. Names of
        partials need to be unique in their exposure only.

    Raises
    ------
    InvalidInputError
        Listing everything that is wrong: maps that are missing, of unequal shape or wrong dtype,
        NaN, indices outside the search space, a name that is taken, a search or exposure that
        differs.
    """
    info = search or SearchInfo(has_pixel_size=PIXEL_SIZE in result)
    maps, problems = _converted(result, info, name, HostRows)
    wide = any(rows.dtype.name == "float64" for key, rows in maps.items() if key != MIP)
    info = replace(info, float64_sums=info.float64_sums or wide)
    given_shape = next((rows.shape for rows in maps.values()), ())
    if len(given_shape) != 2:
        raise InvalidInputError(
            [*problems, f"{name}: expected maps (y, x), got shape {given_shape}"]
        )
    shape = given_shape[0], given_shape[1]
    bands = [band.region for band in TileGrid(shape, (fmt.DEFAULT_CHUNK, max(shape[1], 1)))]

    def on_host(band: Region) -> dict[str, AnyArray]:
        return {key: rows[band.slices[0]] for key, rows in maps.items()}

    wrong_layout = layout_problems(maps, shape, info, name)
    if not wrong_layout:
        found = BadValues(info, name)
        for band in bands:
            found.look(on_host(band), band)
        problems += found.problems()
    problems += wrong_layout
    try:
        partial = PartialWriter(
            store,
            name,
            shape,
            total_projections=total_projections,
            order=order,
            search=info,
            exposure=exposure,
        )
    except InvalidInputError as error:
        raise InvalidInputError([*problems, *error.problems]) from None
    if problems:
        raise InvalidDataError(problems)
    with partial as writer:
        for band in bands:
            writer.write(band, on_host(band))


class PartialWriter:
    """Writes a partial region by region, for maps larger than memory.

    A context manager: leaving it normally checks that every pixel was written and marks the
    partial complete; leaving it by an exception leaves it incomplete, and merging it is refused. A
    partial that was left incomplete may be written again under its name.

    Parameters
    ----------
    store, name, total_projections, order, search, exposure
        As for :func:`write_partial`.
    shape
        Height and width of the maps in pixels.

    Raises
    ------
    InvalidInputError
        Listing everything that is wrong.
    """

    def __init__(
        self,
        store: str | PathLike[str],
        name: str,
        shape: tuple[int, int],
        *,
        total_projections: int,
        order: int = 0,
        search: SearchInfo | None = None,
        exposure: Exposure | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.chunk = (min(fmt.DEFAULT_CHUNK, shape[0]), min(fmt.DEFAULT_CHUNK, shape[1]))
        self._info = search or SearchInfo()
        self._exposure = exposure
        self._exposure_id = "" if exposure is None else exposure.id
        self._path = partial_path(name, self._exposure_id)
        self._objects = open_objects(store)
        self._provenance = provenance(inputs=(), options={})
        self._written: set[tuple[int, int]] = set()
        self._id = uuid.uuid4().hex
        self._order = order
        problems = []
        try:
            self._count = exact_count(total_projections)
        except ValueError as error:
            problems.append(f"{name}: total_projections: {error}")
        wrong_names = name_problems(name)
        if exposure is not None:
            wrong_names += name_problems(exposure.id, "exposure id")
        problems += wrong_names or self._taken_problems()
        if not wrong_names:
            try:
                problems += layout_differences(self._objects, shape, self._info, exposure)
            except InvalidInputError as error:
                problems += error.problems
        if problems:
            raise InvalidInputError(problems)

    def describe(self, *, file: str, sha256: str) -> None:
        """Record the file that the partial comes from; call it before entering the writer."""
        self._provenance = provenance(inputs=(file,), input_sha256=sha256, options={})

    def __enter__(self) -> Self:
        ensure_search(self._objects, self.shape, self._info, self._exposure)
        path = self._path
        attributes = fmt.dump_attributes(self._attributes("writing"))
        if not store.create_group(self._objects, path, attributes):
            problems = self._taken_problems()
            if problems:
                raise InvalidInputError(problems)
            store.update_attributes(self._objects, path, attributes)
        for key in self._info.maps.partial:
            dtype = self._info.stored_dtype(key)
            store.create_map(self._objects, f"{path}/{key}", key, self.shape, self.chunk, dtype)
        self._maps = open_partial_maps(self._objects, path, self.name, self._info.maps.partial)
        return self

    def write(self, region: Region, maps: Mapping[str, object]) -> None:
        """Write all maps over one region, made of whole chunks of :attr:`chunk` pixels.

        Raises
        ------
        InvalidDataError
            Listing everything that is wrong with the maps; nothing of the region is written.
        ValueError
            The region is not made of whole chunks.
        """
        arrays, problems = _converted(maps, self._info, self.name, as_numpy)
        problems += layout_problems(arrays, region.shape, self._info, self.name) or value_problems(
            arrays, region, self._info, self.name
        )
        if problems:
            raise InvalidDataError(problems)
        for key, chunked in self._maps.items():
            chunked.write(region, arrays[key])
        grid = TileGrid(self.shape, self.chunk)
        self._written.update((chunk.iy, chunk.ix) for chunk in grid.touching(region))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._complete()

    def _complete(self) -> None:
        grid = TileGrid(self.shape, self.chunk)
        missing = [cell for cell in grid if (cell.iy, cell.ix) not in self._written]
        if missing:
            raise IncompleteError(
                f"{self._objects.url}: partial {self.name!r}: {len(missing)} of {len(grid)} chunks "
                f"were not written, the first at pixels {missing[0].region}; it stays incomplete"
            )
        if read_partial_attributes(self._objects, self.name, self._exposure_id).id != self._id:
            raise IncompleteError(
                f"{self._objects.url}: partial {self.name!r} was taken over by another writer; "
                "give every writer a name of its own"
            )
        self._objects.tidy(self._path)
        self._objects.sync()  # so that what is called complete stays complete
        attributes = fmt.dump_attributes(self._attributes("complete"))
        store.update_attributes(self._objects, self._path, attributes)
        _refresh_total(self._objects, self._exposure_id)
        self._objects.sync()

    def _taken_problems(self) -> list[str]:
        if store.group_attributes(self._objects, self._path) is None:
            return []
        found = read_partial_attributes(self._objects, self.name, self._exposure_id)
        if found.state != "complete":
            return []
        of = f"exposure {self._exposure_id!r}: " if self._exposure_id else ""
        return [
            f"{self._objects.url}: {of}a partial {self.name!r} is already there and complete; "
            "choose another name, or leave it out"
        ]

    def _attributes(self, state: Any) -> fmt.PartialAttributes:
        return fmt.PartialAttributes(
            id=self._id,
            order=self._order,
            total_projections=self._count,
            state=state,
            provenance=self._provenance,
        )


def _converted(
    maps: Mapping[str, object], info: SearchInfo, place: str, convert: Callable[[object], _Map]
) -> tuple[dict[str, _Map], list[str]]:
    """Maps that a search needs, as something of NumPy, and what is wrong with the others."""
    converted: dict[str, _Map] = {}
    problems: list[str] = []
    for key in info.maps.partial:
        try:
            converted[key] = convert(maps[key])
        except KeyError:
            problems.append(f"{place}: {key}: missing")
        except (TypeError, ValueError, RuntimeError) as error:  # such as torch's bfloat16
            problems.append(f"{place}: {key}: cannot become a NumPy array: {error}")
    return converted, problems


def layout_problems(
    maps: Mapping[str, AnyArray] | Mapping[str, HostRows],
    shape: tuple[int, int],
    info: SearchInfo,
    place: str,
) -> list[str]:
    """Why those maps of a partial that are there have another dtype or shape, if they have."""
    problems = []
    for key, values in maps.items():
        problems += dtype_problems(key, values.dtype, f"{place}: {key}", info.float64_sums)
        if values.shape != shape:
            problems.append(f"{place}: {key}: expected shape {shape}, got {values.shape}")
    return problems


def dtype_problems(
    name: str, dtype: "np.dtype[Any]", place: str, float64_sums: bool = True
) -> list[str]:
    """Why values of this dtype cannot become this map without a loss, if they cannot."""
    allowed = [d for d in MAPS[name].dtypes if float64_sums or d != "float64"]
    if name == INDEX:
        allowed.append("int64")  # checked against the search space, then stored as int32
    if dtype.newbyteorder("=").name in allowed:
        return []
    return [f"{place}: expected dtype {' or '.join(allowed)}, got {dtype}"]


def value_problems(
    maps: Mapping[str, AnyArray], region: Region, info: SearchInfo, place: str
) -> list[str]:
    """NaN, and indices outside the search space, each with the first pixel where it stands.

    Maps that are not there are not looked at.
    """
    found = BadValues(info, place)
    found.look(maps, region)
    return found.problems()


class BadValues:
    """Values of a partial that no search produces, from as many regions as are looked at.

    Parameters
    ----------
    info
        What the partial has.
    place
        How to call it.
    """

    def __init__(self, info: SearchInfo, place: str) -> None:
        self._info, self._place = info, place
        self._found: dict[str, tuple[int, tuple[int, int]]] = {}
        self._outside: list[int] = []

    def look(self, maps: Mapping[str, AnyArray], region: Region) -> None:
        """Look at one region; maps that are not there are left out."""
        mip = maps.get(MIP, np.zeros(region.shape, np.float32))
        unsearched = mip == -np.inf
        for key in self._info.maps.partial:
            values = maps.get(key)
            if values is None or values.dtype.kind != "f":
                continue
            nan = np.isnan(values)
            if key in self._info.maps.pose:
                nan &= ~unsearched
            self._note(key, nan, region)
        space = self._info.search_space
        if space is not None and INDEX in maps:
            index = maps[INDEX]
            outside = (index < NOT_SEARCHED) | (index >= space.n_poses)
            if self._note(_OUTSIDE, outside, region):
                self._outside += [int(index[outside].min()), int(index[outside].max())]
            if MIP in maps:
                missing = (index == NOT_SEARCHED) & ~unsearched & ~np.isnan(mip)
                self._note(_MISSING, missing, region)

    def _note(self, what: str, bad: AnyArray, region: Region) -> bool:
        """Count pixels; whether there are any."""
        if not bad.any():
            return False
        y, x = np.unravel_index(int(np.argmax(bad)), bad.shape)
        n_before, first = self._found.get(what, (0, (region.y0 + int(y), region.x0 + int(x))))
        self._found[what] = n_before + int(np.count_nonzero(bad)), first
        return True

    def problems(self) -> list[str]:
        """Say what was found, map by map."""
        said = []
        for what in (*self._info.maps.partial, _OUTSIDE, _MISSING):
            if what not in self._found:
                continue
            count, first = self._found[what]
            where = f"at {count} pixel{'s' * (count > 1)}, first {first}"
            if what == _MISSING:
                said.append(f"{self._place}: {INDEX}: -1 where {MIP} was searched {where}")
            elif what == _OUTSIDE and self._info.search_space is not None:
                said.append(
                    f"{self._place}: {INDEX}: expected -1 to "
                    f"{self._info.search_space.n_poses - 1}, got {min(self._outside)} to "
                    f"{max(self._outside)} {where}; either the search space is another one, or "
                    "this is Leopard-EM 1.2's wrong index in the last batch, when the number of "
                    "orientations is no multiple of the batch size: search again with a batch "
                    "size that divides it"
                )
            else:
                said.append(f"{self._place}: {what}: NaN {where}")
        return said


_OUTSIDE, _MISSING = "outside", "missing"
"""What can be wrong with indices, beside the names of maps that have NaN."""


def name_problems(name: str, what: str = "partial name") -> list[str]:
    """Why a partial, or an exposure, cannot have this name, if it cannot."""
    try:
        TypeAdapter(fmt.PartialName).validate_python(name)
    except ValidationError:
        return [
            f"{what} {name!r}: expected up to 128 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        ]
    if name == "zarr.json":
        return [f"{what} {name!r}: is the name of Zarr's own metadata"]
    return []


def exposure_path(exposure: str) -> str:
    """Path of an exposure's group; empty for the one of a search that has no others."""
    return f"{fmt.EXPOSURES}/{exposure}" if exposure else ""


def partials_path(exposure: str = "") -> str:
    """Path of the group of an exposure's partials."""
    return f"{exposure_path(exposure)}/{fmt.PARTIALS}" if exposure else fmt.PARTIALS


def partial_path(name: str, exposure: str = "") -> str:
    """Path of a partial's group."""
    return f"{partials_path(exposure)}/{name}"


def provenance(
    *, inputs: Sequence[str], options: Mapping[str, Any], input_sha256: str = ""
) -> fmt.Provenance:
    """Where and with what something was made, now."""
    return fmt.Provenance(
        created=now(),
        versions={name: version(name) for name in ("ocelot-em", "zarr", "numpy", "numcodecs")},
        inputs=tuple(inputs),
        input_sha256=input_sha256,
        options=dict(options),
    )


def now() -> str:
    """Return the time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def ensure_search(
    objects: Objects,
    shape: tuple[int, int],
    info: SearchInfo,
    exposure: Exposure | None = None,
) -> None:
    """Create the search and the exposure, or check that what is there has the same properties.

    Raises
    ------
    InvalidInputError
        Listing every property that differs.
    """
    wanted = search_attributes(shape, info, exposure)
    problems = layout_differences(objects, shape, info, exposure)
    if problems:
        raise InvalidInputError(problems)
    if not store.create_group(objects, "", fmt.dump_attributes(wanted)):
        # Another process may have been first just now, with other properties.
        problems = search_problems(objects, wanted)
        if problems:
            raise InvalidInputError(problems)
    if exposure is not None:
        _ensure_exposure(objects, exposure.attributes(shape, info))
    store.create_group(objects, partials_path("" if exposure is None else exposure.id), {})
    # The tables are written one after another: the last one says whether their writer lived.
    last = f"{fmt.SEARCH_SPACE}/{TABLES[-1]}/c/0"
    if info.search_space is not None and objects.get(last) is None:
        write_search_space(objects, info.search_space)


def _ensure_exposure(objects: Objects, wanted: fmt.ExposureAttributes) -> None:
    """Create an exposure under a number that no other one has, unless it is there."""
    store.create_group(objects, fmt.EXPOSURES, {})
    path = exposure_path(wanted.id)
    if store.group_attributes(objects, path) is None:
        numbered = wanted.model_copy(update={"number": _claim_number(objects, wanted.id)})
        if store.create_group(objects, path, fmt.dump_attributes(numbered)):
            return
    if problems := exposure_problems(objects, wanted):
        raise InvalidInputError(problems)


_NUMBER = re.compile("0|[1-9][0-9]{0,9}")


def _claim_number(objects: Objects, exposure: str) -> int:
    """Take the next number; two processes never get the same. One that dies now leaves a gap."""
    store.create_group(objects, fmt.EXPOSURE_NUMBERS, {})
    claim = fmt.dump_attributes(fmt.NumberAttributes(exposure=exposure))
    taken = (int(n) for n in objects.children(fmt.EXPOSURE_NUMBERS) if _NUMBER.fullmatch(n))
    number = max(taken, default=-1) + 1
    if number > 2**31 - 2:
        raise FormatError(f"{objects.url}/{fmt.EXPOSURE_NUMBERS}: there is no number left")
    while not store.create_group(objects, f"{fmt.EXPOSURE_NUMBERS}/{number}", claim):
        number += 1
    return number


def search_attributes(
    shape: tuple[int, int], info: SearchInfo, exposure: Exposure | None = None
) -> fmt.SearchAttributes:
    """Root attributes of a search with maps of this shape, before its first partial.

    Raises
    ------
    InvalidInputError
        The maps have no pixels, the template box does not fit, or the pixel size is not positive.
    """
    problems: list[str] = []
    valid_shape, size = shape, info.pixel_size_angstrom
    if not all(1 <= n < 2**31 for n in shape):
        problems.append(f"shape: expected 1 to 2**31 - 1 rows and columns of pixels, got {shape}")
    elif (n := len(TileGrid(shape, (fmt.DEFAULT_CHUNK,) * 2))) > fmt.MOST_CHUNKS:
        problems.append(f"shape: expected at most {fmt.MOST_CHUNKS:,} chunks, got {n:,}")
    elif exposure is None or exposure.valid_shape is None:
        try:
            valid_shape = info.valid_shape(shape)
        except InvalidInputError as error:
            problems += error.problems
    if size is not None and not (np.isfinite(size) and size > 0):
        problems.append(f"pixel size: expected a positive number of Å, got {size}")
    if problems:
        raise InvalidInputError(problems)
    return fmt.SearchAttributes(
        format_version=fmt.FORMAT_VERSION,
        kind="search",
        shape=shape if exposure is None else None,
        valid_shape=valid_shape if exposure is None else None,
        pixel_size_angstrom=info.pixel_size_angstrom,
        pose_form=info.maps.form,
        has_pixel_size=info.maps.pixel_size,
        has_counts=False,
        search_space_digest=None if info.search_space is None else info.search_space.digest,
        total_projections=0,
        provenance=provenance(inputs=(), options={}),
    )


def layout_differences(
    objects: Objects, shape: tuple[int, int], info: SearchInfo, exposure: Exposure | None
) -> list[str]:
    """How the search and the exposure that are there differ from those of a new partial.

    Raises
    ------
    InvalidInputError
        What is wanted is impossible anyway.
    """
    problems = search_problems(objects, search_attributes(shape, info, exposure))
    if exposure is not None:
        problems += exposure_problems(objects, exposure.attributes(shape, info))
    return problems


def search_problems(objects: Objects, wanted: fmt.SearchAttributes) -> list[str]:
    """How an existing search differs from the wanted one; empty if it does not, or is not there."""
    attributes = store.group_attributes(objects, "")
    if attributes is None:
        return []
    found = read_attributes(objects)
    if isinstance(found, fmt.MergedAttributes):
        return [f"{objects.url}: expected a search, got a merged result"]
    if found.has_exposures != wanted.has_exposures:
        return [
            f"{objects.url}: the search has {'' if found.has_exposures else 'no '}exposures, the "
            f"new partial belongs to {'one' if wanted.has_exposures else 'none'}"
        ]
    return [
        f"{objects.url}: {key}: the search has {getattr(found, key)}, "
        f"the new partial {getattr(wanted, key)}"
        for key in fmt.SHARED_BY_PARTIALS
        if getattr(found, key) != getattr(wanted, key)
    ]


def exposure_problems(objects: Objects, wanted: fmt.ExposureAttributes) -> list[str]:
    """How an existing exposure differs from the wanted one; empty if it is not there."""
    if objects.get(f"{exposure_path(wanted.id)}/zarr.json") is None:
        return []
    found = read_exposure(objects, wanted.id)
    return [
        f"{objects.url}: exposure {wanted.id!r}: {key}: the search has {getattr(found, key)}, "
        f"the new partial {getattr(wanted, key)}"
        for key in fmt.SHARED_BY_EXPOSURE
        if getattr(found, key) != getattr(wanted, key)
    ]


def read_exposure(objects: Objects, exposure: str) -> fmt.ExposureAttributes:
    """Read the attributes of one exposure.

    Raises
    ------
    FormatError
    """
    path = exposure_path(exposure)
    where = f"{objects.url}/{path}"
    found = fmt.parse_attributes(
        fmt.ExposureAttributes, store.group_attributes(objects, path), where
    )
    if found.id != exposure:
        raise FormatError(f"{where}: expected the exposure {exposure!r}, got {found.id!r}")
    return found


def read_exposures(
    objects: Objects, attributes: fmt.SearchAttributes | fmt.MergedAttributes
) -> list[fmt.ExposureAttributes]:
    """Read what a store's maps are of, by number: its exposures, or the one that it is itself.

    Raises
    ------
    FormatError
        An exposure cannot be read, or two have one number.
    """
    if attributes.shape is not None and attributes.valid_shape is not None:
        return [
            fmt.ExposureAttributes(
                id="",
                number=0,
                origin=(0, 0),
                acquired=0,
                shape=attributes.shape,
                valid_shape=attributes.valid_shape,
                total_projections=attributes.total_projections,
            )
        ]
    names = _names_of_groups(objects, fmt.EXPOSURES, "exposure id")
    found = [read_exposure(objects, name) for name in names]
    found.sort(key=lambda exposure: exposure.number)
    for one, other in pairwise(found):
        if one.number == other.number:
            raise FormatError(
                f"{objects.url}: exposures {one.id!r} and {other.id!r} have the same number "
                f"{one.number}"
            )
    return found


def write_search_space(objects: Objects, space: SearchSpace) -> None:
    """Write the tables of a search space."""
    store.create_group(objects, fmt.SEARCH_SPACE, {})
    dimensions = (("orientation", "angle"), ("defocus",), ("pixel_size",))
    for name, dims in zip(TABLES, dimensions, strict=True):
        store.write_table(objects, f"{fmt.SEARCH_SPACE}/{name}", getattr(space, name), dims)


def read_search_space(objects: Objects, digest: str | None) -> SearchSpace | None:
    """Read the tables and check them against the recorded fingerprint.

    Raises
    ------
    FormatError
        They are missing, or are not those the search was written with.
    """
    if digest is None:
        return None
    tables = (store.read_table(objects, f"{fmt.SEARCH_SPACE}/{name}") for name in TABLES)
    try:
        space = SearchSpace.from_tables(*tables)
    except InvalidInputError as error:
        raise FormatError(f"{objects.url}/{fmt.SEARCH_SPACE}: {error}") from None
    if space.digest != digest:
        raise FormatError(
            f"{objects.url}/{fmt.SEARCH_SPACE}: the tables are not the ones the search was "
            f"written with: expected digest {digest[:12]}, got {space.digest[:12]}"
        )
    return space


def read_attributes(objects: Objects) -> fmt.SearchAttributes | fmt.MergedAttributes:
    """Read the root attributes of a search or a merged result.

    Raises
    ------
    StoreNotFoundError, FormatError
    """
    attributes = store.group_attributes(objects, "")
    if attributes is None:
        raise StoreNotFoundError(f"{objects.url}: expected an ocelot-em store, got nothing there")
    content = attributes.get(fmt.ATTRIBUTE_KEY)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "merged":
        return fmt.parse_attributes(fmt.MergedAttributes, attributes, objects.url)
    return fmt.parse_attributes(fmt.SearchAttributes, attributes, objects.url)


def read_partial_attributes(
    objects: Objects, name: str, exposure: str = ""
) -> fmt.PartialAttributes:
    """Read the attributes of one partial.

    Raises
    ------
    FormatError
    """
    path = partial_path(name, exposure)
    attributes = store.group_attributes(objects, path)
    return fmt.parse_attributes(fmt.PartialAttributes, attributes, f"{objects.url}/{path}")


def partial_names(objects: Objects, exposure: str = "") -> list[str]:
    """Names of all partials of an exposure, complete or not, in alphabetical order.

    Raises
    ------
    FormatError
        A group has a name that no partial has.
    """
    return _names_of_groups(objects, partials_path(exposure), "partial name")


def _names_of_groups(objects: Objects, path: str, what: str) -> list[str]:
    names = {
        name
        for name in objects.children(path)
        if objects.get(f"{path}/{name}/zarr.json") is not None
    }
    problems = [problem for name in names for problem in name_problems(name, what)]
    if problems:
        raise FormatError(f"{objects.url}/{path}: {'; '.join(sorted(problems)[:20])}")
    return sorted(names)


def read_partials(objects: Objects, exposure: str = "") -> list[tuple[str, fmt.PartialAttributes]]:
    """Names and attributes of an exposure's partials in the stated order: ``order``, then name.

    Names sort as people count: ``gpu9`` before ``gpu10``.
    """
    found = [
        (name, read_partial_attributes(objects, name, exposure))
        for name in partial_names(objects, exposure)
    ]
    return sorted(found, key=lambda item: (item[1].order, _natural(item[0])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces = re.findall(r"\d+|\D+", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces]


def open_partial_maps(
    objects: Objects,
    path: str,
    name: str,
    keys: tuple[str, ...],
    shape: tuple[int, int] | None = None,
) -> dict[str, store.ChunkedMap]:
    """Open maps of a partial (or, with an empty path, of a merged result).

    Raises
    ------
    FormatError
        A map is missing, does not follow the format, or has not the shape, if one is given.
    """
    prefix = f"{path}/" if path else ""
    label = _place(objects.url, path, name)
    maps = {
        key: store.open_map(objects, f"{prefix}{key}", f"{label}: {key}", MAPS[key].dtypes)
        for key in keys
    }
    for chunked in maps.values():
        if shape is not None and chunked.shape != shape:
            raise FormatError(f"{chunked.place}: expected shape {shape}, got {chunked.shape}")
        if wrong := chunk_problem(chunked, next(iter(maps.values()))):
            raise FormatError(wrong)
    return maps


def chunk_problem(chunked: store.ChunkedMap, other: store.ChunkedMap) -> str:
    """Say so where maps of one partial, or of one merged result, have different chunks."""
    if chunked.grid == other.grid:
        return ""
    return (
        f"{chunked.place}: expected chunks of {other.grid.cell} pixels in {other.shape}, as "
        f"{other.path} has them, got {chunked.grid.cell} in {chunked.shape}"
    )


def _place(url: str, path: str, name: str) -> str:
    """How errors call a partial, or a merged result."""
    if not path:
        return url
    folder = path.removesuffix(f"/{fmt.PARTIALS}/{name}")
    of = f"exposure {folder.removeprefix(f'{fmt.EXPOSURES}/')!r}: " if folder != path else ""
    return f"{url}: {of}partial {name!r}"


def _refresh_total(objects: Objects, exposure: str) -> None:
    """Write the sum of the complete partials' counts into the root, or into their exposure.

    Writers that finish at the same time each look again after writing, so that the last one to
    write has seen them all.
    """
    written = None
    while True:
        partials = read_partials(objects, exposure)
        total = sum(p.total_projections for _, p in partials if p.state == "complete")
        if total == written:
            return
        owner = read_exposure(objects, exposure) if exposure else read_attributes(objects)
        changed = owner.model_copy(update={"total_projections": total})
        store.update_attributes(objects, exposure_path(exposure), fmt.dump_attributes(changed))
        written = total


_NAME = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}"
_GROUP = rf"^(({fmt.EXPOSURES}/{_NAME}/)?{fmt.PARTIALS}/{_NAME})?$"
"""Paths of groups that can be merged: a partial, or all of an earlier result."""


class Source(fmt.Attributes):
    """One input of a merge: a partial of a search, or an earlier merged result.

    Parameters
    ----------
    url, path
        The store, and the group in it (empty for a merged result).
    name
        Name of the partial, or of the merged store.
    id
        Identity of this version of the data.
    total_projections
        Its exact count.
    first_number
        Number of the first of its contributions in the stated order of the merge.
    contributions
        The partials in it: itself, or those of the earlier merge.
    has_counts
        Whether its count is a map.
    """

    url: str
    path: Annotated[str, StringConstraints(pattern=_GROUP)]
    name: str
    id: str
    total_projections: fmt.Count
    first_number: fmt.Number
    contributions: fmt.Several[fmt.Contribution]
    has_counts: bool

    @property
    def place(self) -> str:
        """How errors call it."""
        return _place(self.url, self.path, self.name)

    def map_names(self, maps: MapSet) -> tuple[str, ...]:
        """Names of its maps that a merge with these maps needs."""
        names = MapSet(maps.form, maps.pixel_size, self.has_counts).partial
        return names if self.path else (*names, BEST_PARTIAL)


def open_one(source: Source, name: str) -> store.ChunkedMap:
    """Open one map of a source; all its maps have the same shape and chunks.

    Raises
    ------
    FormatError
        It is missing, or does not follow the format.
    """
    objects = open_objects(source.url)
    return open_partial_maps(objects, source.path, source.name, (name,))[name]


def open_source_maps(
    source: Source, maps: MapSet, shape: tuple[int, int]
) -> dict[str, store.ChunkedMap]:
    """Open the maps of a source that a merge needs, which have to have this shape.

    Raises
    ------
    FormatError
        As :func:`open_partial_maps`.
    """
    objects = open_objects(source.url)
    return open_partial_maps(objects, source.path, source.name, source.map_names(maps), shape)


def open_sources(
    objects: Objects,
) -> tuple[
    fmt.SearchAttributes | fmt.MergedAttributes, list[tuple[fmt.ExposureAttributes, list[Source]]]
]:
    """Read what a store offers to a merge, in its stated order.

    Returns
    -------
    attributes
        Of the store.
    exposures
        Attributes of each, by number, and its sources, numbered from 0; at least one of each.

    Raises
    ------
    StoreNotFoundError, FormatError
        It is not a store, or a merged montage, which cannot be merged again.
    IncompleteError
        A partial, or the merged result, was never finished; all of them are named.
    """
    attributes = read_attributes(objects)
    exposures = read_exposures(objects, attributes)
    if isinstance(attributes, fmt.MergedAttributes):
        if attributes.state != "complete":
            raise IncompleteError(
                f"{objects.url}: this merge was never finished; run the command that made it again"
            )
        if attributes.exposures:
            raise FormatError(
                f"{objects.url}: is a merged montage, in which exposures have lost the pixels that "
                "others won; merge their searches instead"
            )
        source = Source(
            url=objects.url,
            path="",
            name=objects.url.rpartition("/")[2],
            id=attributes.id,
            total_projections=attributes.total_projections,
            first_number=0,
            contributions=attributes.partials,
            has_counts=attributes.has_counts,
        )
        return attributes, [(exposures[0], [source])]
    opened, problems, n_partials = [], [], 0
    for exposure in exposures:
        partials = read_partials(objects, exposure.id)
        n_partials += len(partials)
        of = f"exposure {exposure.id!r}: " if exposure.id else ""
        if not partials and exposure.id:
            problems.append(f"{of}has no partials yet")
        before = f"{exposure.id}/" if exposure.id else ""
        problems += [f"{before}{n}" for n, p in partials if p.state != "complete"]
        opened.append(
            (
                exposure,
                [
                    _source(objects, exposure.id, name, partial, number)
                    for number, (name, partial) in enumerate(partials)
                ],
            )
        )
    if problems:
        what = "partials" if not attributes.has_exposures else "partials of exposures"
        raise IncompleteError(
            f"{objects.url}: {len(problems)} of {n_partials} {what} were never finished: "
            f"{', '.join(problems)}; their writer died or still runs: write them again, or "
            "delete their groups to leave them out"
        )
    if not n_partials:
        raise IncompleteError(f"{objects.url}: the search has no partials yet")
    return attributes, opened


def _source(
    objects: Objects, exposure: str, name: str, partial: fmt.PartialAttributes, number: int
) -> Source:
    count = partial.total_projections
    return Source(
        url=objects.url,
        path=partial_path(name, exposure),
        name=name,
        id=partial.id,
        total_projections=count,
        first_number=number,
        contributions=(fmt.Contribution(name=name, id=partial.id, total_projections=count),),
        has_counts=False,
    )
