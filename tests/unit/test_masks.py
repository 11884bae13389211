"""Masks: which pixels polygons cover, what files may be, and what is refused."""

import h5py
import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from ocelot_em import open_mask
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.regions import Region
from ocelot_em.particles.masks import as_mask, inside_polygon

SHAPE = (23, 31)
WHOLE = Region.whole(SHAPE)
IMAGE = (np.indices(SHAPE).sum(axis=0) % 5 > 1).astype(np.int16)
TRIANGLE = np.array([[2.0, 3.0], [20.0, 8.0], [5.0, 28.0]])

# No vertex or edge meets the centre of a pixel, where rounding would decide.
place = st.integers(-40, 300).map(lambda k: k / 10 + 0.0317)


@given(st.lists(st.tuples(place, place), min_size=3, max_size=9))
def test_pixels_in_a_polygon_are_those_whose_centres_are(vertices):
    corners = np.array(vertices)
    centres = np.indices(SHAPE).reshape(2, -1).T
    first, (other, later) = corners[0], (corners[1:-1], corners[2:])
    # By the even-odd rule, a polygon is the exclusive or of the triangles of a fan.
    expected = np.zeros(len(centres), bool)
    for one, next_one in zip(other, later, strict=True):
        expected ^= Outline([first, one, next_one, first], closed=True).contains_points(centres)
    np.testing.assert_array_equal(inside_polygon(corners, WHOLE).ravel(), expected)


@given(st.integers(0, 23), st.integers(0, 31))
def test_regions_of_a_polygon_fit_together(y, x):
    parts = [[Region(0, y, 0, x), Region(0, y, x, 31)], [Region(y, 23, 0, x), Region(y, 23, x, 31)]]
    corners = np.array([[0, 0], [0, 15.5], [30, 31], [11, 4], [22, -5]], float)
    joined = np.block([[inside_polygon(corners, part) for part in row] for row in parts])
    np.testing.assert_array_equal(joined, inside_polygon(corners, WHOLE))


def test_polygons_that_share_an_edge_share_no_pixel():
    left = np.array([[0, 0], [0, 10], [20, 10], [20, 0]], float)
    right = np.array([[0, 10], [0, 20], [20, 20], [20, 10]], float)
    both = inside_polygon(left, WHOLE).astype(int) + inside_polygon(right, WHOLE)
    assert both[:20, :20].min() == both.max() == 1
    assert both.sum() == 400
    # On an edge from (0, 0) to (11, 15), crossings of rows are not exact.
    left = np.array([[0, 0], [11, 15], [11, -9], [0, -9]], float)
    right = np.array([[11, 15], [0, 0], [0, 99], [11, 99]], float)
    both = inside_polygon(left, WHOLE).astype(int) + inside_polygon(right, WHOLE)
    assert both[:11].min() == both.max() == 1


def as_file(folder, kind, image):
    path = folder / f"mask.{kind}"
    if kind == "mrc":
        mrcfile.write(path, image)
    elif kind == "npy":
        np.save(path, image)
    elif kind == "zarr":
        zarr.save_array(path, image)
    else:
        name = "mask" if image.ndim == 2 else "of/mask"
        with h5py.File(path, "w") as file:
            file.create_dataset(name, data=image, chunks=(*image.shape[:-2], 8, 8))
            file["other"] = np.zeros((2, 2))
            file["stack/mask"] = np.zeros((2, 2, 2))
    return path


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("kind", ["mrc", "npy", "zarr", "h5"])
def test_every_kind_of_image_is_read_by_regions(tmp_path, kind, n_axes):
    """An image may be the only section of a stack."""
    mask = open_mask(as_file(tmp_path, kind, IMAGE.reshape((1,) * (n_axes - 2) + SHAPE)))
    assert (mask.name, mask.shape, mask.marks_kept) == (f"mask.{kind}", SHAPE, True)
    region = Region(3, 20, 7, 31)
    np.testing.assert_array_equal(mask.marked(region), IMAGE[3:20, 7:31] != 0)
    assert not isinstance(mask.image, np.ndarray) or isinstance(mask.image, np.memmap)


def test_nan_marks_nothing():
    image = np.array([[np.nan, 1.0, 0.0]])
    assert as_mask(image).marked(Region.whole((1, 3))).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ("polygon,y,x", (0, 1, 2)),
        ("x, y, Polygon", (2, 1, 0)),
        ("index,axis-0,axis-1", (0, 1, 2)),
        ("index,axis-0,axis-1,axis-2", (0, 3, 1, 2)),  # drawn over a stack of one section
    ],
)
def test_tables_of_polygons(tmp_path, header, order):
    path = tmp_path / "mask.csv"
    rows = [(number, *(TRIANGLE[k] + number), 0) for number in (0, 1) for k in range(3)]
    lines = [header, *(",".join(str(row[k]) for k in order) for row in rows)]
    path.write_text("\n".join(lines))
    mask = open_mask(path)
    expected = inside_polygon(TRIANGLE, WHOLE) | inside_polygon(TRIANGLE + 1, WHOLE)
    np.testing.assert_array_equal(mask.marked(WHOLE), expected)
    assert mask.shape is None
    assert not mask.marks_kept


def test_a_spatial_constraint_of_leopard_em(tmp_path):
    """As its draft of a constrained search writes them (pull request 138)."""
    path = tmp_path / "constraint.h5"
    with h5py.File(path, "w") as file:
        file.attrs["coordinate_frame"] = "pos_xy_img"
        file["maps/eligible"] = (IMAGE > 0).astype(np.uint8)
        file["maps/region_id"] = IMAGE
        file["maps/n_orientations"] = 70_000 * IMAGE.astype(np.int32)
        file["maps/n_defocus"] = np.full(SHAPE, 90_000, np.int32)
    mask = open_mask(path)
    assert mask.of == "micrograph"
    np.testing.assert_array_equal(mask.marked(WHOLE), IMAGE > 0)
    np.testing.assert_array_equal(mask.counted(WHOLE), IMAGE.astype(np.int64) * 6_300_000_000)
    counts = {"maps/n_defocus": IMAGE[1:], "maps/n_orientations": IMAGE * 1.5}
    write_hdf5(tmp_path / "other.h5", **{"maps/eligible": IMAGE}, **counts)
    with pytest.raises(InvalidInputError) as refusal:
        open_mask(tmp_path / "other.h5")
    assert len(refusal.value.problems) == 2


def write_hdf5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values


@pytest.mark.parametrize(
    ("name", "write", "problem"),
    [
        ("mask.tif", lambda p: p.write_bytes(b""), "ends with .csv, .*, got '.tif'"),
        ("mask.npy", lambda p: p.write_bytes(b"no"), "cannot be read as an array"),
        ("mask.npy", lambda p: np.save(p, np.ones((2, 3, 4))), r"^mask.npy: expected an image"),
        ("mask.mrc", lambda p: p.exists(), "mask.mrc: expected a mask, got nothing there"),
        ("mask.mrc", lambda p: p.write_bytes(b"no"), "cannot be read as an MRC file"),
        ("mask.h5", lambda p: p.write_bytes(b"no"), "cannot be read as HDF5"),
        ("mask.h5", lambda p: write_hdf5(p, a=IMAGE, b=IMAGE), "one called mask, got a, b"),
        ("mask.h5", lambda p: write_hdf5(p, a=[1]), "one called mask, got none"),
        ("folder", lambda p: p.mkdir(), "expected a Zarr array, got another folder"),
        ("mask.csv", lambda p: p.write_text("a,b\n1,2"), "polygon, y, x or index, .*, got a, b"),
        ("mask.csv", lambda p: p.write_text("polygon,y,x\n0,1,a"), "x: line 2: .*got 'a'"),
        ("mask.csv", lambda p: p.write_text("polygon,y,x\n0,1,2\n0,3"), "line 3: expected 3"),
        ("mask.csv", lambda p: p.write_text("polygon,y,x\n0,1,2\n0,3,4"), "3 or more vertices"),
        ("mask.csv", lambda p: p.write_text("polygon,y,x"), "one polygon or more, got none"),
        (
            "mask.csv",
            lambda p: p.write_text("polygon,y,x\n0,1,nan\n0,3,4\n0,5,6"),
            r"a finite y and x, got \[1\.0, nan\]",
        ),
        (
            "mask.csv",
            lambda p: p.write_text("index,shape-type,axis-0,axis-1\n0,ellipse,1,2"),
            "polygons and rectangles, got 'ellipse'",
        ),
    ],
)
def test_what_is_no_mask_is_refused_in_one_sentence(tmp_path, name, write, problem):
    write(tmp_path / name)
    with pytest.raises(InvalidInputError, match=problem) as refusal:
        open_mask(tmp_path / name)
    assert len(refusal.value.problems) == 1
    assert name in str(refusal.value)


def test_other_objects_are_refused():
    for given_mask in (5, "abc", np.array([["a"]]), [np.zeros((2, 2))], [["a"]]):
        with pytest.raises(InvalidInputError):
            as_mask(given_mask)
