"""Descriptions of montages: what they say becomes a search, or everything wrong is named."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from builders import same_bits, snapshot
from helpers import SPACE, assert_same_maps, make_result, read_maps
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.io import import_options, leopard
from ocelot_em.io.description import (
    Description,
    import_description,
    placed_exposures,
    read_description,
)
from ocelot_em.model.maps import COUNT, INDEX, MIP, PIXEL_SIZE, POSES, SUM
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import Exposure, SearchInfo

SHAPES = {"00": (12, 14), "01": (10, 16)}
COUNTS = {"00": (70_000, 20_000), "01": (50_000, 40_000)}
ORIGINS = {"00": (2.0, 0.0), "01": (0.0, 11.0)}


def result(exposure: str, device: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    rng = np.random.default_rng((*exposure.encode(), device))
    return make_result(rng, shape or SHAPES.get(exposure, (8, 9)), 1000)


def save(path: Path, maps: Mapping[str, Any], count: int | None = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **maps, **({} if count is None else {COUNT: np.int64(count)}))
    return path


class Montage:
    """Two exposures of two devices each in a folder, and their description, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "RUN.yaml"
        self.output = folder / "RUN.zarr"
        self.content: dict[str, Any] = {"pixel_size": 3.0, "exposures": []}
        for name, counts in COUNTS.items():
            for device, count in enumerate(counts):
                save(self.file(name, device), result(name, device), count)
            self.add(name, ORIGINS[name], 1 - int(name), 2)

    def file(self, exposure: str, device: int) -> Path:
        return self.folder / f"results/{exposure}/dev{device}.npz"

    def add(self, name: str, origin: tuple[float, float], acquired: int, n_devices: int) -> None:
        files = [f"results/{name}/dev{device}.npz" for device in range(n_devices)]
        entry = {"id": name, "origin": [*origin], "acquired": acquired, "partials": files}
        self.content["exposures"].append(entry)

    def change(self, number: int, **changes: Any) -> None:
        """Change an exposure; what becomes None is left out."""
        entry = self.content["exposures"][number] | changes
        self.content["exposures"][number] = {k: v for k, v in entry.items() if v is not None}

    def write(self) -> Path:
        self.path.write_text(yaml.safe_dump(self.content, sort_keys=False), encoding="utf-8")
        return self.path

    def imported(self) -> list[str]:
        return import_description(self.write(), self.output)

    def refusal(self, kind: type[InvalidInputError] = InvalidInputError) -> tuple[str, ...]:
        """Problems of an import, which writes nothing; with folders left out."""
        self.write()
        before, existed = snapshot(self.output), self.output.exists()
        with pytest.raises(InvalidInputError) as refused:
            import_description(self.path, self.output)
        assert type(refused.value) is kind
        assert snapshot(self.output) == before
        assert self.output.exists() == existed
        return tuple(problem.replace(f"{self.folder}/", "") for problem in refused.value.problems)


@pytest.fixture
def montage(tmp_path: Path) -> Montage:
    return Montage(tmp_path)


def assert_mentions(problems: tuple[str, ...], *parts: str) -> None:
    """Every part is in a problem of its own, in this order."""
    assert len(problems) == len(parts), problems
    for problem, part in zip(problems, parts, strict=True):
        assert part in problem, (part, problem)


def stored(output: Path, exposure: str, partial: str) -> dict[str, Any]:
    group = zarr.open_group(output / f"exposures/{exposure}/partials/{partial}", mode="r")
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


# What a description becomes


def test_a_whole_montage(montage):
    """It is what writing the same partials of the same exposures gives."""
    inputs = snapshot(montage.folder / "results")
    assert montage.imported() == ["00/dev0", "00/dev1", "01/dev0", "01/dev1"]
    assert snapshot(montage.folder / "results") == inputs
    assert ocelot_em.check(montage.output) == []
    about = {e.id: e for e in ocelot_em.describe(montage.output).exposures}
    for number, (name, shape) in enumerate(SHAPES.items()):
        exposure = about[name]
        assert (exposure.number, exposure.origin) == (number, ORIGINS[name])
        assert (exposure.acquired, exposure.shape, exposure.valid_shape) == (
            1 - number,
            shape,
            shape,
        )
        assert exposure.total_projections == 90_000
        for device in range(2):
            maps = stored(montage.output, name, f"dev{device}")
            assert set(maps) == {MIP, *POSES, "correlation_sum", "correlation_squared_sum"}
            for key, values in maps.items():
                assert same_bits(values, result(name, device)[key]), (name, device, key)
    for name, counts in COUNTS.items():
        exposure = Exposure(name, ORIGINS[name], 1 - int(name))
        info = SearchInfo(pixel_size_angstrom=3.0, exposure=exposure)
        for device, count in enumerate(counts):
            write_partial(
                montage.folder / "EXPECTED.zarr",
                f"dev{device}",
                result(name, device),
                total_projections=count,
                order=device,
                search=info,
            )
    ocelot_em.merge(montage.output, montage.folder / "OUT.zarr")
    ocelot_em.merge(montage.folder / "EXPECTED.zarr", montage.folder / "SAME.zarr")
    merged = read_maps(montage.folder / "OUT.zarr")
    assert_same_maps(merged, read_maps(montage.folder / "SAME.zarr"))
    assert merged[MIP].shape == (14, 27)
    opened = ocelot_em.open_merged(montage.folder / "OUT.zarr")
    assert opened.attrs["pixel_size_angstrom"] == 3.0


def test_files_are_looked_for_beside_the_description(montage, monkeypatch):
    (montage.folder / "elsewhere").mkdir()
    monkeypatch.chdir(montage.folder / "elsewhere")
    montage.change(1, partials=[str(montage.file("01", 0)), "../other/dev1.npz"])
    shutil.copytree(montage.folder / "results/01", montage.folder.parent / "other")
    montage.write()
    names = import_description("../RUN.yaml", "RUN.zarr")
    assert names == ["00/dev0", "00/dev1", "01/dev0", "01/dev1"]
    assert list(Path().iterdir()) == [Path("RUN.zarr")]
    shutil.rmtree(montage.folder.parent / "other")


def test_progress_is_of_the_whole(montage):
    shares: list[tuple[str, float]] = []
    import_description(montage.write(), montage.output, lambda *step: shares.append(step))
    assert shares == sorted(shares)
    assert shares[-1] == ("convert", 1.0)
    assert ("check", 1.0) in shares


def test_the_template_box_leaves_what_is_valid(montage):
    """An exposure that says it itself is believed."""
    montage.content["template_box"] = 5
    montage.change(1, valid_shape=[9, 7])
    montage.imported()
    about = {e.id: e.valid_shape for e in ocelot_em.describe(montage.output).exposures}
    assert about == {"00": (8, 10), "01": (9, 7)}


def test_counts_are_given_where_files_have_none(montage):
    for device in range(2):
        save(montage.file("01", device), result("01", device), None)
    montage.change(0, total_projections=[70_000, 20_000])
    montage.change(1, total_projections=[2**40, 5])
    montage.imported()
    about = {e.id: e.total_projections for e in ocelot_em.describe(montage.output).exposures}
    assert about == {"00": 90_000, "01": 2**40 + 5}


def test_indexed_poses(montage):
    space = montage.folder / "space.npz"
    np.savez(space, **{name: getattr(SPACE, name) for name in TABLES})
    montage.content["search_space"] = "space.npz"
    montage.imported()
    for name in SHAPES:
        maps = stored(montage.output, name, "dev1")
        assert INDEX in maps
        assert same_bits(maps[INDEX], result(name, 1)[INDEX])
        assert not set(POSES) & set(maps)
    attributes = ocelot_em.describe(montage.output).attributes
    assert attributes.search_space_digest == SPACE.digest


def test_tables_that_the_files_carry(montage):
    tables = {name: getattr(SPACE, name) for name in TABLES}
    for name, counts in COUNTS.items():
        for device, count in enumerate(counts):
            maps = {k: v for k, v in result(name, device).items() if k not in POSES}
            save(montage.file(name, device), maps | tables, count)
    montage.imported()
    assert ocelot_em.describe(montage.output).attributes.search_space_digest == SPACE.digest


@pytest.mark.parametrize(
    ("text", "size"), [("1e-3", 1e-3), ("2E1", 20.0), ("1.e-2", 0.01), ("2", 2.0), ('"1.5"', 1.5)]
)
def test_pixel_sizes_that_yaml_takes_for_text(montage, text, size):
    montage.write()
    montage.path.write_text(montage.path.read_text().replace("3.0", text, 1))
    assert read_description(montage.path).pixel_size == size


def test_numbers_of_origins_that_yaml_takes_for_text(montage):
    montage.path.write_text(
        "exposures: [{id: a, origin: [1e2, -2.5e1], acquired: -1, partials: [a.npz]}]"
    )
    exposures = placed_exposures(read_description(montage.path), montage.path)
    assert exposures == [Exposure("a", (100.0, -25.0), -1)]


# Origins from a file


def test_origins_of_a_table(montage):
    (montage.folder / "origins.csv").write_text(
        "id,y,x,acquired\n01,4,-5.5,8\n00,1,2,9\n77,0,0,1\n"
    )
    montage.content["origins"] = "origins.csv"
    montage.change(0, origin=None, acquired=None)
    montage.change(1, origin=[4, -5.5], acquired=None)
    montage.add("own", (7, 7), 3, 1)
    save(montage.file("own", 0), result("own", 0))
    montage.imported()
    about = {e.id: (e.origin, e.acquired) for e in ocelot_em.describe(montage.output).exposures}
    assert about == {"00": ((1, 2), 9), "01": ((4, -5.5), 8), "own": ((7, 7), 3)}


def test_a_table_without_the_order_of_acquisition(montage):
    (montage.folder / "origins.csv").write_text("id,y,x\n00,1,2\n01,3,4\n")
    montage.content["origins"] = "origins.csv"
    montage.change(0, origin=None)
    montage.change(1, origin=None, acquired=None)
    assert montage.refusal() == (
        "RUN.yaml: exposure '01': acquired: missing: its place in the order of acquisition",
    )
    montage.change(1, acquired=7)
    exposures = placed_exposures(read_description(montage.write()), montage.path)
    assert [(e.origin, e.acquired) for e in exposures] == [((1, 2), 1), ((3, 4), 7)]


MDOC = """\
[Image = 00.tif]
PieceCoordinates = 0 0 0
AlignedPieceCoords = 1 3 0
[Image = 01.tif]
PieceCoordinates = 10 20 0
AlignedPieceCoords = 12 24 0
"""


@pytest.mark.parametrize(
    ("how", "origins"),
    [
        ({}, {"00": (0, 0), "01": (21, 11)}),
        ({"flip_y": True}, {"00": (21, 0), "01": (0, 11)}),
        ({"coordinates": "piece"}, {"00": (0, 0), "01": (20, 10)}),
        ({"coordinates": "piece", "flip_y": True}, {"00": (20, 0), "01": (0, 10)}),
    ],
)
def test_origins_of_serialem(montage, how, origins):
    (montage.folder / "m.mdoc").write_text(MDOC)
    montage.content["origins"] = {"file": "m.mdoc", **how}
    for number in range(2):
        montage.change(number, origin=None, acquired=None)
    exposures = placed_exposures(read_description(montage.write()), montage.path)
    assert {e.id: e.origin for e in exposures} == origins
    assert [e.acquired for e in exposures] == [0, 1]


def test_a_description_that_contradicts_its_table(montage):
    (montage.folder / "origins.csv").write_text("id,y,x,acquired\n00,2,0,0\n01,0,12,1\n")
    montage.content["origins"] = "origins.csv"
    assert montage.refusal() == (
        "RUN.yaml: exposure '00': acquired: 1 in the description, 0 in the file of origins",
        "RUN.yaml: exposure '01': acquired: 0 in the description, 1 in the file of origins",
        "RUN.yaml: exposure '01': origin: (0.0, 11.0) in the description, (0.0, 12.0) in the file "
        "of origins",
    )


def test_exposures_that_are_nowhere(montage):
    (montage.folder / "origins.csv").write_text("id,y,x,acquired\n0,2,0,0\n")
    montage.content["origins"] = "origins.csv"
    for number in range(2):
        montage.change(number, origin=None)
    montage.change(1, acquired=None)
    assert montage.refusal() == (
        "RUN.yaml: exposure '00': origin: missing in the file of origins",
        "RUN.yaml: exposure '01': origin: missing in the file of origins",
        "RUN.yaml: exposure '01': acquired: missing: its place in the order of acquisition",
    )


@pytest.mark.parametrize(
    ("origins", "problem"),
    [
        ("NONE.csv", "NONE.csv: expected a file with origins of exposures, got no file"),
        ("RUN.yaml", "RUN.yaml: expected a name that ends in .csv, .star or .mdoc"),
        ({"file": "o.csv", "flip_y": True}, "o.csv: origins of a .csv file are taken as they are"),
        ({"file": "o.csv", "flip": True}, "RUN.yaml: origins.flip: unknown"),
        ({"flip_y": True}, "RUN.yaml: origins.file: missing"),
        (
            {"file": "o.csv", "flip_y": "yes"},
            "RUN.yaml: origins.flip_y: expected true or false",
        ),
        (
            {"file": "o.csv", "coordinates": "stage"},
            "RUN.yaml: origins.coordinates: expected 'aligned', 'aligned-vs' or 'piece'",
        ),
        (3, "RUN.yaml: origins: expected an object"),
        ("", "RUN.yaml: origins.file: expected text that matches"),
    ],
)
def test_unusable_origins(montage, origins, problem):
    (montage.folder / "o.csv").write_text("id,y,x\n00,0,0\n01,0,0\n")
    montage.content["origins"] = origins
    assert_mentions(montage.refusal(), problem)


# What is wrong with a description


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({"pixelsize": 3}, ["pixelsize: unknown, got 3"]),
        ({3: 4}, ["[3]: Keys should be strings"]),
        ({"pixel_size": 0}, ["pixel_size: expected more than 0, got 0"]),
        ({"pixel_size": ".nan"}, ["pixel_size: expected a number, got '.nan'"]),
        ({"pixel_size": "nan"}, ["pixel_size: expected a finite number, got nan"]),
        ({"pixel_size": float("inf")}, ["pixel_size: expected a finite number, got inf"]),
        ({"pixel_size": "3 A"}, ["pixel_size: expected a number, got '3 A'"]),
        ({"pixel_size": True}, ["pixel_size: expected a number, got True"]),
        ({"pixel_size": 10**400}, ["pixel_size: expected a"]),
        ({"template_box": 0}, ["template_box: expected at least 1, got 0"]),
        ({"template_box": 5.0}, ["template_box: expected a whole number, got 5.0"]),
        ({"search_space": 5}, ["search_space: YAML takes it for the int 5; write it between"]),
        ({"exposures": []}, ["exposures: expected a list of at least 1"]),
        ({"exposures": {"00": {}}}, ["exposures: expected a list"]),
        ({"exposures": ["00"]}, ["exposures[0]: expected an object"]),
        (
            {"exposures": [{"id": "a"}, {"partials": ["a.npz"]}]},
            ["exposures[0].partials: missing", "exposures[1].id: missing"],
        ),
    ],
)
def test_what_is_wrong_with_the_whole(montage, change, problems):
    montage.content |= change
    found = montage.refusal()
    assert all(problem.startswith("RUN.yaml: ") for problem in found)
    assert_mentions(found, *problems)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"orign": [0, 0]}, "orign: unknown"),
        ({"id": 1}, "id: YAML takes it for the int 1; write it between quotation marks"),
        ({"id": 1.5}, "id: YAML takes it for the float 1.5; write it between"),
        ({"id": False}, "id: YAML takes it for the bool False; write it between"),
        ({"id": ""}, "id: expected text that matches"),
        ({"id": "../up"}, "id: expected text that matches"),
        ({"id": "a\n"}, "id: expected text that matches"),
        ({"id": ["a"]}, "id: expected text, got ['a']"),
        ({"origin": [1]}, "origin: expected a list of at least 2"),
        ({"origin": [1, 2, 3]}, "origin: expected a list of at most 2"),
        ({"origin": "1, 2"}, "origin: expected a list"),
        ({"origin": [1, "x"]}, "origin[1]: expected a number, got 'x'"),
        ({"origin": ["nan", 1]}, "origin[0]: expected"),
        ({"origin": [1e10, 1]}, "origin[0]: expected at most 2147483648"),
        ({"origin": [10**400, 1]}, "origin[0]: expected"),
        ({"acquired": "1e3"}, "acquired: expected a whole number, got '1e3'"),
        ({"acquired": 1.0}, "acquired: expected a whole number, got 1.0"),
        ({"acquired": 2**60}, "acquired: expected at most"),
        ({"valid_shape": [0, 5]}, "valid_shape[0]: expected at least 1"),
        ({"partials": []}, "partials: expected a list of at least 1"),
        ({"partials": "dev0.npz"}, "partials: expected a list, got 'dev0.npz'"),
        ({"partials": ["a.npz", 5]}, "partials[1]: YAML takes it for the int 5; write it between"),
        ({"partials": [""]}, "partials[0]: expected text that matches"),
        ({"partials": ["a\0.npz"]}, "partials[0]: expected text that matches"),
        (
            {"partials": ["x" * 4000 + " " * 999]},
            "partials[0]: expected at most 4095 characters",
        ),
        ({"total_projections": 5}, "total_projections: expected a list, got 5"),
        ({"total_projections": [1, -5]}, "total_projections[1]: expected at least"),
        ({"total_projections": [1, 5.0]}, "total_projections[1]: expected a whole number"),
    ],
)
def test_what_is_wrong_with_an_exposure(montage, change, problem):
    montage.change(1, **change)
    assert_mentions(montage.refusal(), f"RUN.yaml: exposures[1].{problem}")


@pytest.mark.parametrize(
    "written", ["00", "010", "1_000", "0x10", "12:30", "1.5", "no", "2026-01-02"]
)
def test_ids_that_yaml_takes_for_something_else(montage, written):
    text = f"exposures: [{{id: {written}, origin: [0, 0], acquired: 0, partials: [a.npz]}}]"
    montage.path.write_text(text)
    with pytest.raises(
        InvalidInputError, match=r"exposures\[0\]\.id: YAML takes it for the .* mark"
    ):
        read_description(montage.path)
    montage.path.write_text(text.replace(written, f'"{written}"', 1))
    if ":" not in written:
        assert read_description(montage.path).exposures[0].id == written


def test_all_that_is_wrong_comes_at_once(montage):
    montage.content["dose"] = 1
    montage.change(0, origin=[0], valid_shape=[1, "x"])
    montage.change(1, id=1, acquired="first")
    assert_mentions(
        montage.refusal(),
        "exposures[0].origin: expected a list of",
        "exposures[0].valid_shape[1]: ",
        "exposures[1].id: YAML",
        "exposures[1].acquired: ",
        "dose: unknown",
    )


def test_missing_places_are_named(montage):
    montage.change(0, origin=None)
    montage.change(1, acquired=None)
    assert montage.refusal() == (
        "RUN.yaml: exposure '00': origin: missing",
        "RUN.yaml: exposure '01': acquired: missing: its place in the order of acquisition",
    )


def test_what_is_there_twice(montage):
    (montage.folder / "link.npz").symlink_to(montage.file("00", 1))
    montage.change(1, id="00", partials=["results/../results/00/dev0.npz", "link.npz"])
    assert montage.refusal() == (
        "RUN.yaml: exposure '00': is there 2 times",
        "RUN.yaml: results/00/dev0.npz: given 2 times",
        "RUN.yaml: results/00/dev1.npz: given 2 times",
    )


def test_a_link_to_itself(montage):
    (montage.folder / "loop.npz").symlink_to("loop.npz")
    montage.change(1, partials=["loop.npz"])
    assert montage.refusal() == ("loop.npz: expected a file, got nothing there",)


@pytest.mark.parametrize("text", ["", "[]", "a: *b", "exposures: {", "- &a [*a]", "[" * 9999, "\0"])
def test_what_is_no_description(montage, text):
    montage.path.write_text(text)
    with pytest.raises(InvalidInputError) as refused:
        import_description(montage.path, montage.output)
    assert str(refused.value).startswith(f"{montage.path}: ")
    assert not montage.output.exists()


# What is wrong with the files


def test_nan_in_the_second_exposure(montage):
    """Nothing of the first is written either; what is wrong in all of them is named."""
    for name, device in (("00", 1), ("01", 0)):
        maps = result(name, device)
        maps[SUM][3, 4] = np.nan
        save(montage.file(name, device), maps)
    assert montage.refusal(InvalidDataError) == (
        "results/00/dev1.npz: correlation_sum: NaN at 1 pixel, first (3, 4)",
        "results/01/dev0.npz: correlation_sum: NaN at 1 pixel, first (3, 4)",
    )


def test_missing_and_unreadable_files(montage):
    montage.file("00", 1).unlink()
    montage.file("01", 0).write_bytes(b"hello")
    montage.change(1, partials=["results/01/dev0.npz", "results/01", "y" * 300 + ".npz"])
    assert_mentions(
        montage.refusal(),
        "results/00/dev1.npz: expected a file, got nothing there",
        "results/01/dev0.npz: expected a .npz or .pt dictionary of arrays",
        "results/01: expected a file, got nothing there",
        "yyy.npz: cannot be opened: ",
    )


def test_shapes_that_differ_inside_an_exposure(montage):
    save(montage.file("01", 1), result("01", 1, (16, 10)))
    problems = montage.refusal()
    assert all(p.startswith("results/01/dev1.npz: ") for p in problems)
    assert all("expected shape (10, 16), got (16, 10)" in p for p in problems)


@pytest.mark.parametrize("change", ["no pixel size", "no sum", "float64 mip"])
def test_maps_that_do_not_suit(montage, change):
    for device in range(2):
        maps = result("01", device)
        if change == "no pixel size":
            del maps[PIXEL_SIZE]
        elif change == "no sum":
            del maps[SUM]
        else:
            maps[MIP] = maps[MIP].astype("f8")
        save(montage.file("01", device), maps)
    problems = montage.refusal()
    if change == "no pixel size":
        assert_mentions(
            problems,
            f"results/00/dev0.npz: has the maps {MIP}, ",
            f"results/01/dev0.npz: has the maps {MIP}, ",
            "exposures: expected the same maps in all of them",
        )
        assert PIXEL_SIZE in problems[0]
        assert PIXEL_SIZE not in problems[1]
    else:
        what = f"{SUM}: missing" if change == "no sum" else f"{MIP}: expected dtype float32"
        assert_mentions(problems, f"results/01/dev0.npz: {what}", f"results/01/dev1.npz: {what}")


def test_search_spaces_that_differ(montage):
    """Also between exposures, of which the first is not written either."""
    other = SearchSpace.from_tables(SPACE.euler_angles, SPACE.defocus_values, [0.0, 0.3])
    for name, space in (("00", SPACE), ("01", other)):
        for device in range(2):
            maps = {k: v for k, v in result(name, device).items() if k not in POSES}
            maps |= {table: getattr(space, table) for table in TABLES}
            save(montage.file(name, device), maps)
    assert montage.refusal() == (
        "results/01/dev0.npz: its search space is not the one of results/00/dev0.npz",
    )


def test_a_search_space_that_cannot_be_read_is_named_once(montage):
    montage.content["search_space"] = "space.npz"
    assert montage.refusal() == ("space.npz: expected a file, got nothing there",)


def test_a_search_space_is_read_once(montage, monkeypatch):
    np.savez(montage.folder / "space.npz", **{name: getattr(SPACE, name) for name in TABLES})
    montage.content["search_space"] = "space.npz"
    calls, read = [], import_options.read_search_space_file
    monkeypatch.setattr(leopard, "read_search_space_file", lambda p: calls.append(p) or read(p))
    montage.imported()
    assert calls == [montage.folder / "space.npz"]


def test_indexed_poses_without_their_tables(montage):
    for device in range(2):
        maps = {k: v for k, v in result("00", device).items() if k not in POSES}
        save(montage.file("00", device), maps)
    assert all(
        problem == f"results/00/dev{device}.npz: poses are indexed ({INDEX}): give the tables with "
        "search_space"
        for device, problem in enumerate(montage.refusal())
    )


@pytest.mark.parametrize(
    ("stored_count", "given", "problem"),
    [
        (None, None, "total_projections: missing (Leopard-EM 1.1 and 1.2 write none)"),
        (7, [7, 40_000], None),
        (7, [8, 40_000], "the file has 7, total_projections of exposure '01' has 8"),
        (7, [7], "exposure '01': total projections: expected one count for each of 2 files, got 1"),
    ],
)
def test_counts_that_do_not_suit(montage, stored_count, given, problem):
    save(montage.file("01", 0), result("01", 0), stored_count)
    montage.change(1, total_projections=given)
    if problem is None:
        montage.imported()
    else:
        assert_mentions(montage.refusal(), problem)


def test_counts_stay_with_their_files_when_one_is_missing(montage):
    for device in range(2):
        save(montage.file("01", device), result("01", device), 10 + device)
    montage.file("01", 0).unlink()
    montage.change(1, total_projections=[10, 11])
    assert_mentions(montage.refusal(), "results/01/dev0.npz: expected a file")


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({"valid_shape": [13, 3]}, ["exposure '01': valid_shape: "]),
        ({"id": "zarr.json"}, ["exposure id 'zarr.json': is the name of Zarr's own metadata"]),
    ],
)
def test_exposures_that_cannot_be(montage, change, problems):
    montage.change(1, **change)
    assert_mentions(montage.refusal(), *problems)


def test_a_template_box_that_does_not_fit_says_where(montage):
    montage.content["template_box"] = 11
    assert montage.refusal() == (
        "exposure '01': template box: expected 1 to 10 pixels for maps of (10, 16), got 11",
    )


def test_names_of_files_that_are_no_names_are_cleaned(montage):
    montage.file("01", 0).rename(montage.folder / "my result.npz")
    montage.change(1, partials=["my result.npz"])
    assert montage.imported()[-1] == "01/my-result"
    assert montage.imported() == []


def test_one_result_of_two_exposures(montage):
    shutil.copy(montage.file("00", 1), montage.folder / "copy.npz")
    montage.change(1, partials=["copy.npz"])
    (problem,) = montage.refusal()
    assert problem.startswith("copy.npz: has the same content as results/00/dev1.npz; its project")
    # Also where the first is there already.
    entry = montage.content["exposures"].pop()
    montage.imported()
    montage.content["exposures"].append(entry)
    assert montage.refusal() == (problem,)


def test_idle_devices_may_be_alike(montage):
    """What they found is nothing, and counts nothing."""
    idle = {key: np.zeros_like(values) for key, values in result("00", 0, (6, 7)).items()}
    idle[MIP][...] = -np.inf
    idle[INDEX][...] = -1
    for name in SHAPES:
        for device in range(2):
            save(montage.file(name, 7 + device), idle, 0)
    montage.add("idle", (0, 0), 5, 0)
    montage.change(2, partials=["results/00/dev7.npz", "results/00/dev8.npz"])
    montage.add("more", (0, 0), 6, 0)
    montage.change(3, partials=["results/01/dev7.npz"])
    names = montage.imported()
    assert names[4:] == ["idle/dev7", "idle/dev8", "more/dev7"]
    montage.change(3, partials=["results/01/dev7.npz", "results/01/dev8.npz"])
    assert montage.imported() == ["more/dev8"]
    assert montage.imported() == []


# Descriptions that grow


def test_only_what_is_new_is_imported(montage):
    assert len(montage.imported()) == 4
    before = snapshot(montage.output)
    assert montage.imported() == []
    assert snapshot(montage.output) == before
    save(montage.file("00", 2), result("00", 2), 5)
    montage.change(0, partials=[f"results/00/dev{device}.npz" for device in (2, 0, 1)])
    montage.add("02", (9, 9), 2, 2)
    for device in range(2):
        save(montage.file("02", device), result("02", device))
    assert montage.imported() == ["00/dev2", "02/dev0", "02/dev1"]
    after = snapshot(montage.output)
    unchanged = {k: v for k, v in before.items() if "/c/" in k or "/01/" in k}
    assert {key: after[key] for key in unchanged} == unchanged
    assert ocelot_em.check(montage.output) == []
    about = {e.id: e.total_projections for e in ocelot_em.describe(montage.output).exposures}
    assert about == {"00": 90_005, "01": 90_000, "02": 2000}


def test_a_description_of_what_is_new_only(montage):
    whole = montage.content["exposures"]
    for entry in whole:
        montage.content["exposures"] = [entry]
        assert len(montage.imported()) == 2
    montage.content["exposures"] = whole
    assert montage.imported() == []


def test_files_of_one_name_that_come_in_turns(montage):
    """Partials are named after their files; those that are there keep the names they have."""
    for device in range(3):
        save(montage.folder / f"node{device}/gpu.npz", result("two", device), 10)
    montage.add("two", (0, 0), 5, 0)
    montage.change(2, partials=["node0/gpu.npz"])
    assert montage.imported()[4:] == ["two/gpu"]
    montage.change(2, partials=["node0/gpu.npz", "node1/gpu.npz"])
    assert montage.imported() == ["two/node1-gpu"]
    montage.change(2, partials=["node1/gpu.npz", "node0/gpu.npz", "node2/gpu.npz"])
    assert montage.imported() == ["two/node2-gpu"]
    assert ocelot_em.describe(montage.output).exposures[2].total_projections == 30


def test_a_file_that_has_changed(montage):
    montage.imported()
    save(montage.file("01", 1), result("01", 9), 40_000)
    montage.add("02", (9, 9), 2, 1)
    save(montage.file("02", 0), result("02", 0))
    problems = montage.refusal()
    assert_mentions(problems, "results/01/dev1.npz: RUN.zarr has a partial 'dev1' already; leave")


def test_a_count_that_has_changed(montage):
    save(montage.file("01", 0), result("01", 0), None)
    montage.change(1, partials=["results/01/dev0.npz"], total_projections=[7])
    montage.imported()
    montage.change(1, total_projections=[8])
    assert montage.refusal() == (
        "results/01/dev0.npz: total_projections: RUN.zarr has its partial 'dev0' with 7, now it "
        "is 8",
    )


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (1, {"origin": [0, 12]}, "exposure '01': origin: the search has (0.0, 11.0), the new par"),
        (0, {"acquired": 9}, "exposure '00': acquired: the search has 1, the new partial 9"),
        (1, {"valid_shape": [9, 9]}, "exposure '01': valid_shape: the search has (10, 16), the n"),
    ],
)
def test_an_exposure_that_has_changed(montage, number, change, problem):
    montage.imported()
    montage.change(number, **change)
    assert_mentions(montage.refusal(), problem)


def test_a_search_of_another_kind(montage):
    montage.imported()
    montage.content["pixel_size"] = 2.0
    problems = montage.refusal()
    assert len(problems) == 2  # of each exposure
    assert all(
        "pixel_size_angstrom: the search has 3.0, the new partial 2.0" in p for p in problems
    )
    shutil.rmtree(montage.output)
    write_partial(montage.output, "p", result("x", 0), total_projections=1)
    assert "the search has no exposures, the new partial belongs to one" in montage.refusal()[0]


def test_an_import_that_died_is_gone_on_with(montage, monkeypatch):
    writer, begun = leopard.PartialWriter, []

    def dies(output, name, *arguments, **options):
        if len(begun) == 2:
            raise KeyboardInterrupt
        begun.append(name)
        return writer(output, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(leopard, "PartialWriter", dies)
        with pytest.raises(KeyboardInterrupt):
            montage.imported()
    assert montage.imported() == ["01/dev0", "01/dev1"]
    assert ocelot_em.check(montage.output) == []
    assert [e.total_projections for e in ocelot_em.describe(montage.output).exposures] == [
        90_000
    ] * 2


# The command line


def test_the_command_line(montage, capsys):
    montage.write()
    command = ["import", str(montage.path), "--output", str(montage.output)]
    assert run(command) == 0
    assert f"imported 4 partials of 2 exposures into {montage.output}" in capsys.readouterr().out
    assert run(command) == 0
    assert "imported 0 partials of 0 exposures" in capsys.readouterr().out
    montage.path.rename(montage.folder / "RUN.yml")
    command[1] = str(montage.folder / "RUN.yml")
    assert run(command) == 0


@pytest.mark.parametrize(
    "more",
    [
        ["--search-space", "s.npz"],
        ["--template-box", "5"],
        ["--pixel-size", "3"],
        ["--total-projections", "1", "2"],
    ],
)
def test_the_command_line_takes_no_other_options(montage, capsys, more):
    montage.write()
    assert run(["import", str(montage.path), "--output", str(montage.output), *more]) == 2
    error = capsys.readouterr().err
    assert (
        f"expected one description of exposures (.yaml), which contains everything "
        f"else, got {more[0]}" in (" ".join(error.split()))
    )
    assert not montage.output.exists()


def test_the_command_line_takes_one_description(montage, capsys):
    files = [str(montage.write()), str(montage.file("00", 0))]
    assert run(["import", *files, "--output", str(montage.output)]) == 2
    assert "got 2 files" in " ".join(capsys.readouterr().err.split())
    montage.change(1, id=1)
    assert run(["import", str(montage.write()), "--output", str(montage.output)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "exposures[1].id: YAML takes it for the int 1; write it between quotation marks" in error
    assert not montage.output.exists()


# Anything


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.sampled_from(["1e3", "a.npz", "00", 0, 1, 2.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {"id": st.text("ab0.", min_size=1, max_size=2) | values, "partials": values},
    optional=dict.fromkeys(("origin", "acquired", "valid_shape", "total_projections", "x"), values),
)
contents = st.fixed_dictionaries(
    {"exposures": st.lists(entries, max_size=3) | values},
    optional=dict.fromkeys(("pixel_size", "search_space", "template_box", "origins"), values),
)


@given(contents)
def test_anything_is_a_description_or_a_clean_refusal(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "RUN.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with contextlib.suppress(InvalidInputError):
        description = read_description(path)
        assert isinstance(description, Description)
        placed_exposures(description, path)


def test_origins_that_are_not_whole_pixels_are_named(montage: Montage, caplog: Any) -> None:
    montage.change(1, origin=[0, 11.5])
    montage.imported()
    assert "origins that are not whole pixels: 01 (0.0, 11.5); maps are" in caplog.text
    caplog.clear()
    ocelot_em.merge(montage.output, montage.folder / "M.zarr", origins="round")
    assert "origins are rounded to whole pixels: 01 (0.0, 11.5) to (0, 12)" in caplog.text
