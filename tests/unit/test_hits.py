"""The best particles in the micrograph, and projections of the template at their poses."""

import mrcfile
import numpy as np
import pytest
from numpy import cos, sin

from builders import explicit_maps
from ocelot_em import SearchInfo, merge, write_partial
from ocelot_em.cli.exit_codes import DONE, REFUSED
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.particles.picking import find_peaks
from ocelot_em.view.crops import bin_volume, crop_box, project
from ocelot_em.view.hits import ReportImages, read_hits
from report_pages import stub_rendering

SHAPE, BOX, VALID = (70, 61), 16, (55, 46)


def blob(shape, place, width=1.5):
    """A Gaussian in a volume or an image; the place is (z,) y, x."""
    axes = np.indices(shape)
    squares = sum((axis - at) ** 2 for axis, at in zip(axes, place, strict=True))
    return np.exp(-squares / (2 * width**2)).astype(np.float32)


def centroid(image):
    return [(axis * image).sum() / image.sum() for axis in np.indices(image.shape)]


def rotation(phi, theta, psi):
    """Rz(phi) Ry(theta) Rz(psi), written out; it turns columns x, y, z."""

    def about_z(t):
        return np.array([[cos(t), -sin(t), 0], [sin(t), cos(t), 0], [0, 0, 1]])

    about_y = np.array([[cos(theta), 0, sin(theta)], [0, 1, 0], [-sin(theta), 0, cos(theta)]])
    return about_z(phi) @ about_y @ about_z(psi)


POSES = [(0, 0, 0), (90, 0, 0), (0, 90, 0), (0, 0, 90), (25, 70, 110), (310, 140, 45)]


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("edge", [32, 33])
def test_a_point_of_the_template_is_seen_where_its_pose_turns_it(pose, edge):
    """A point p of the volume is at q of the projection where R q = p."""
    centre = edge // 2
    for point in [(8, 0, 0), (0, 7, 0), (0, 0, 8), (4, -5, 6)]:
        x, y, _ = rotation(*np.radians(pose)).T @ point
        volume = blob((edge,) * 3, centre + np.array(point)[::-1])
        seen = centroid(project(volume, centre, pose))
        assert seen == pytest.approx([centre + y, centre + x], abs=0.02)


def test_an_image_turned_in_its_plane_is_turned_by_minus_psi():
    """By hand: with psi = 90°, what was along x is along -y."""
    volume = blob((33,) * 3, (16, 16, 26))
    assert centroid(project(volume, 16, (0, 0, 90))) == pytest.approx([6, 16], abs=0.01)
    # Phi turns the volume about its own z first: without theta, both angles add up.
    both = project(volume, 16, (30, 0, 60))
    np.testing.assert_allclose(both, project(volume, 16, (0, 0, 90)), atol=1e-4)


@pytest.mark.parametrize(("edge", "most"), [(96, 32), (100, 32), (33, 16), (32, 32)])
def test_a_binned_volume_keeps_its_centre(edge, most):
    place = np.array([edge // 2 + 5, edge // 2 - 4, edge // 2 + 3])
    binned, centre = bin_volume(blob((edge,) * 3, place, width=2), most)
    assert binned.shape == (len(binned),) * 3
    assert most / 2 < len(binned) <= most
    factor = edge // len(binned)
    offset = (np.array(centroid(binned)) - centre) * factor
    assert offset == pytest.approx([5, -4, 3], abs=0.02)


@pytest.mark.parametrize("corner", [(0, 0), (3, 7), (14, 30), (20, 5)])
def test_a_crop_is_the_template_box_of_the_smoothed_micrograph(corner):
    micrograph = np.random.default_rng(3).normal(size=(30, 40)).astype(np.float32)
    y, x = corner
    np.testing.assert_array_equal(
        crop_box(micrograph, corner, 10, 0), micrograph[y : y + 10, x : x + 10]
    )
    whole = crop_box(micrograph, (0, 0), 40, 1.5)
    assert whole.std() < micrograph.std() / 3
    crop = crop_box(micrograph, corner, 10, 1.5)
    np.testing.assert_allclose(crop, whole[y : y + 10, x : x + 10], atol=1e-5)


def make_result(place, template_box=BOX, shape=SHAPE):
    """A merged result with three high pixels."""
    maps = explicit_maps(shape, 0)
    maps["mip"][[10, 40, 20], [30, 8, 12]] = [300, 250, 200]
    search = SearchInfo(template_box=template_box)
    write_partial(place / "RUN.zarr", "gpu0", maps, total_projections=1000, search=search)
    merge(place / "RUN.zarr", place / "OUT.zarr")
    return place / "OUT.zarr"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A result, its particles, the template and a micrograph with it, dark, at their poses."""
    place = tmp_path_factory.mktemp("hits")
    store = make_result(place)
    particles = find_peaks(store, cutoff=50)
    template = blob((BOX,) * 3, (8, 4, 11)) + blob((BOX,) * 3, (4, 9, 8))
    mrcfile.write(place / "template.mrc", template)
    micrograph, columns = np.zeros(SHAPE, np.float32), particles.columns
    for y, x, *pose in zip(
        *(columns[name].tolist() for name in ("pos_y", "pos_x", "phi", "theta", "psi")),
        strict=True,
    ):
        micrograph[y : y + BOX, x : x + BOX] -= project(template, BOX // 2, pose)
    mrcfile.write(place / "micrograph.mrc", micrograph)
    return store, particles


def hits_of(store, particles, images, rows=(0, 1)):
    return read_hits(MergedResult.open(store), particles, np.array(rows), images)


def images_of(store, *names):
    return ReportImages(**{name: store.parent / f"{name}.mrc" for name in names})


def test_crops_show_what_is_projected(result):
    store, particles = result
    assert len(particles) == 3
    rows = np.argsort(-particles.columns[SCALED_MIP])[:2][::-1]
    images = images_of(store, "micrograph", "template")
    hits = hits_of(store, particles, images, rows)
    assert hits.box_px == BOX
    shares = np.corrcoef([image.ravel() for image in hits.crops + hits.projections])[:2, 2:]
    assert (np.diag(shares) < -0.8).all()
    assert (shares[[0, 1], [1, 0]] > np.diag(shares)).all()


def test_one_image_is_enough_and_none_is_needed(result):
    store, particles = result
    for names in [(), ("micrograph",), ("template",)]:
        hits = hits_of(store, particles, images_of(store, *names))
        assert len(hits.crops) == 2 * ("micrograph" in names)
        assert len(hits.projections) == 2 * ("template" in names)


def test_the_page_has_the_pictures(result, monkeypatch, tmp_path, capsys):
    stub_rendering(monkeypatch)
    store, _ = result
    words = ["report", str(store), "--output", str(tmp_path / "a.html"), "--cutoff", "50"]
    for name in ("micrograph", "template"):
        words += [f"--{name}", str(store.parent / f"{name}.mrc")]
    assert run(words) == DONE
    page = (tmp_path / "a.html").read_text()
    assert page.count(">micrograph</text>") == page.count(">projection</text>") == 3
    assert f"{BOX} × {BOX} pixels" in page
    assert run(["report", str(store), *words[1:], "--overwrite"]) == REFUSED
    assert "--micrograph: expected one merged result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("micrograph", np.zeros((70, 60)), r"expected 70 × 61 pixels, .* got 70 × 60"),
        ("micrograph", np.zeros(VALID), "expected 70 × 61 pixels"),
        ("micrograph", np.zeros((2, *SHAPE)), "expected one image, got 2 sections"),
        ("template", np.zeros((15, 15, 15)), "expected a cube of 16 voxels .* got 15"),
        ("template", np.zeros((16, 16, 15)), r"expected a cube, .* shape \(16, 16, 15\)"),
        ("template", np.zeros(SHAPE), "expected a cube"),
    ],
)
def test_other_images_are_refused(result, tmp_path, name, values, problem):
    path = tmp_path / "image.mrc"
    mrcfile.write(path, values.astype(np.float32))
    with pytest.raises(InvalidInputError, match=problem):
        hits_of(*result, ReportImages(**{name: path}))


def test_a_box_is_known_from_the_shapes_or_the_template(result, tmp_path):
    """Of maps with valid pixels only, and of maps that were imported without a template box."""
    store, _ = result
    micrograph, both = images_of(store, "micrograph"), images_of(store, "micrograph", "template")
    (tmp_path / "valid").mkdir()
    (tmp_path / "whole").mkdir()
    cropped = make_result(tmp_path / "valid", None, VALID)
    uncropped = make_result(tmp_path / "whole", None)
    for other, images in [(cropped, micrograph), (cropped, both), (uncropped, both)]:
        assert hits_of(other, find_peaks(other, cutoff=50), images).crops[0].shape == (BOX, BOX)
    with pytest.raises(InvalidInputError, match=r"known template box.*--template-box"):
        hits_of(uncropped, find_peaks(uncropped, cutoff=50), micrograph)
