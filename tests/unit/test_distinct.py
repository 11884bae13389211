"""Outputs that are an input, contain one, or lie inside of one: refused before anything changes."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from builders import explicit_maps, write_explicit_search
from chaos_common import digests
from ocelot_em import ImportOptions
from ocelot_em.errors import InvalidInputError, OutputExistsError
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.io.ome_zarr import write_ome_zarr
from ocelot_em.store.distinct import overlaps
from ocelot_em.store.objects import normalise_url
from ocelot_em.store.whole_file import write_file

SHAPE = 40, 30

REFUSED = r"is also an input|is inside the|contains|is a search|from another merge"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two searches and their results."""
    folder = tmp_path_factory.mktemp("made")
    for n in range(2):
        run = write_explicit_search(folder / f"RUN{n}.zarr", SHAPE, 2)
        ocelot_em.merge(run, folder / f"OUT{n}.zarr", tile_size=32)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, which is the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "work"))
    return tmp_path / "work"


def linked(target: str) -> str:
    Path("link").symlink_to(Path(target).absolute())
    return "link"


def moved(source: str, target: str) -> str:
    shutil.move(source, target)
    return target


def hard_linked(source: str) -> str:
    shutil.copytree(source, "copy", copy_function=os.link)
    return "copy"


Way = Callable[[], tuple[Sequence[str], str]]

WAYS: dict[str, Way] = {
    "itself": lambda: (["OUT0.zarr"], "OUT0.zarr"),
    "a slash": lambda: (["OUT0.zarr"], "OUT0.zarr/"),
    "dots": lambda: (["OUT0.zarr"], "RUN0.zarr/../OUT0.zarr"),
    "an absolute path": lambda: (["OUT0.zarr"], str(Path("OUT0.zarr").absolute())),
    "file://": lambda: (["OUT0.zarr"], Path("OUT0.zarr").absolute().as_uri()),
    "FILE://localhost": lambda: (["OUT0.zarr"], f"FILE://localhost{Path('OUT0.zarr').absolute()}"),
    "a link": lambda: (["OUT0.zarr"], linked("OUT0.zarr")),
    "a link of the input": lambda: ([linked("OUT0.zarr")], "OUT0.zarr"),
    "hard links": lambda: (["OUT0.zarr"], hard_linked("OUT0.zarr")),
    "the search": lambda: (["RUN0.zarr"], "RUN0.zarr"),
    "beside the partials": lambda: (["RUN0.zarr"], "RUN0.zarr/OUT.zarr"),
    "among the partials": lambda: (["RUN0.zarr"], "RUN0.zarr/partials/OUT.zarr"),
    "below a link to a partial": lambda: (
        ["RUN0.zarr"],
        f"{linked('RUN0.zarr/partials/gpu0')}/OUT.zarr",
    ),
    "inside of a result": lambda: (["OUT0.zarr"], "OUT0.zarr/mip/OUT.zarr"),
    "inside another store": lambda: (["RUN0.zarr"], "RUN1.zarr/OUT.zarr"),
    "around the input": lambda: ([moved("RUN0.zarr", "OUT0.zarr/RUN.zarr")], "OUT0.zarr"),
    "around a linked input": lambda: (
        [linked(moved("RUN0.zarr", "OUT0.zarr/mip/RUN.zarr"))],
        "OUT0.zarr",
    ),
    "around another store": lambda: (
        ["RUN0.zarr"],
        str(Path(moved("RUN1.zarr", "OUT1.zarr/mip/c")).parents[1]),
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_merge_does_not_touch_its_inputs(place: Path, way: Way) -> None:
    inputs, output = way()
    before = digests(place)
    for overwrite in (True, False):
        with pytest.raises((InvalidInputError, OutputExistsError), match=REFUSED):
            ocelot_em.merge(inputs, output, tile_size=32, overwrite=overwrite)
        assert digests(place) == before


@pytest.mark.parametrize(
    "write",
    [
        lambda: write_mrc_set("OUT0.zarr", "OUT0.zarr", overwrite=True),
        lambda: write_mrc_set("OUT0.zarr", "RUN0.zarr/partials", overwrite=True),
        lambda: write_hdf5("OUT0.zarr", "OUT0.zarr/zarr.json", overwrite=True),
        lambda: write_ome_zarr("OUT0.zarr", "OUT0.zarr", overwrite=True),
        lambda: write_ome_zarr("OUT0.zarr", "OUT0.zarr/image", overwrite=True),
        lambda: write_ome_zarr(moved("OUT0.zarr", "image/OUT.zarr"), "image", overwrite=True),
        lambda: write_file("RUN0.zarr/partials/x.csv", b"x"),
        lambda: ocelot_em.import_results(["a/x.npz"], "a", ImportOptions(total_projections=[9])),
        lambda: ocelot_em.import_results(["a/x.npz"], "RUN0.zarr/partials/gpu0/x"),
        lambda: ocelot_em.write_partial(
            "RUN0.zarr/partials/new", "x", explicit_maps(SHAPE, 1), total_projections=3
        ),
    ],
)
def test_exports_and_imports_do_not_touch_stores_and_inputs(
    place: Path, write: Callable[[], object]
) -> None:
    Path("a").mkdir()
    np.savez("a/x.npz", **explicit_maps(SHAPE, 1))
    write_ome_zarr("OUT1.zarr", "image")
    n_files = len(digests(place))
    with pytest.raises((InvalidInputError, OutputExistsError)):
        write()
    assert len(digests(place)) == n_files
    for n in range(2):
        found = next(place.rglob(f"OUT{n or ''}*.zarr"))
        assert ocelot_em.check(found) == ocelot_em.check(f"RUN{n}.zarr") == []


@pytest.mark.parametrize(
    ("output", "given", "is_refused"),
    [
        ("s3a://b/x", "s3://b/x", True),
        ("S3://b/x/", "s3://b/x", True),
        ("s3://b/x//y/", "s3a://b/x", True),
        ("s3://b", "s3://b/x", True),
        ("s3://b/a%20b", "s3://b/a b/c", True),
        ("abfss://b/x", "az://b/x/y", True),
        ("memory://b/x", "memory://b/x2", False),
        ("memory://b/x", "memory://c/x", False),
    ],
)
def test_urls_have_several_spellings(output: str, given: str, is_refused: bool) -> None:
    assert bool(overlaps(output, [given])) == is_refused
    assert normalise_url(output) == output.rstrip("/")


def test_a_damaged_result_that_contains_a_store_is_not_overwritten(place: Path) -> None:
    moved("RUN1.zarr", "OUT0.zarr/kept.zarr")
    Path("OUT0.zarr/zarr.json").write_bytes(b"{")
    before = digests(place)
    with pytest.raises(InvalidInputError, match=r"contains kept\.zarr, which would be deleted"):
        ocelot_em.merge("RUN0.zarr", "OUT0.zarr", overwrite=True)
    assert digests(place) == before
