"""Files that others read are on the disk before anybody hears of them, whole, and as a set."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import ocelot_em
from builders import write_explicit_search
from ocelot_em.cli.config_file import write_config
from ocelot_em.errors import FormatError, OutputExistsError
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.io.ome_zarr import write_ome_zarr
from ocelot_em.io.parquet import write_parquet
from ocelot_em.particles.picking import find_peaks
from ocelot_em.store import local
from ocelot_em.store.whole_file import finish_set, whole_or_nothing, whole_set_or_nothing
from ocelot_em.view.report import save_overview

NAMES = ["mip.mrc", "psi.mrc", "phi.mrc"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merged")
    write_explicit_search(place / "RUN.zarr", (40, 40), 2)
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", tile_size=40)
    return place / "OUT.zarr"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Inode and size of each file and folder that is brought to the disk; 0 for a whole disk."""
    found: list[tuple[int, int]] = []
    fsync, syncfs = os.fsync, local.sync_file_system

    def of_file(descriptor: int) -> None:
        status = os.fstat(descriptor)
        found.append((status.st_ino, status.st_size))
        fsync(descriptor)

    def of_disk(descriptor: int) -> None:
        found.append((0, 0))
        syncfs(descriptor)

    monkeypatch.setattr(os, "fsync", of_file)
    monkeypatch.setattr(local, "sync_file_system", of_disk)
    return found


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "particles.csv": lambda store, path: find_peaks(store).to_csv(path),
    "particles.parquet": lambda store, path: write_parquet(find_peaks(store), path),
    "report.html": lambda store, path: ocelot_em.write_report(store, path),
    "overview.png": save_overview,
    "maps.h5": lambda store, path: write_hdf5(store, path),
    "config.yaml": lambda _, path: write_config(path, {}),
    "mip.mrc": lambda store, path: write_mrc_set(store, path.parent),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_written_is_on_the_disk(
    name: str, merged: Path, tmp_path: Path, synced: list[tuple[int, int]]
) -> None:
    WRITERS[name](merged, tmp_path / name)
    for file in tmp_path.iterdir():
        status = file.stat()
        contents = synced.index((status.st_ino, status.st_size))
        assert tmp_path.stat().st_ino in [inode for inode, _ in synced[contents + 1 :]], file
    assert (tmp_path / name).is_file()


def test_an_image_is_on_the_disk_before_it_has_its_name(
    merged: Path, tmp_path: Path, synced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, before = tmp_path / "image.ome.zarr", list[bool]()
    syncfs = local.sync_file_system
    monkeypatch.setattr(
        local,
        "sync_file_system",
        lambda descriptor: (before.append(place.exists()), syncfs(descriptor)),
    )
    write_ome_zarr(merged, place)
    assert before == [False]
    assert synced[-1][0] == tmp_path.stat().st_ino


def write_set(folder: Path, content: str) -> None:
    with whole_set_or_nothing(folder, NAMES) as staged:
        for path, name in zip(staged, NAMES, strict=True):
            path.write_text(f"{content} {name}")


def visible(folder: Path) -> set[str]:
    """Sets of which the folder has a file."""
    return {path.read_text().split()[0] for path in folder.glob("*.mrc")}


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run in a child that ends at once before one of its changes to a folder; whether it did."""
    child = os.fork()
    if child == 0:
        n_steps = 0

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **options: object) -> object:
                nonlocal n_steps
                n_steps += 1
                if n_steps > step:
                    os._exit(9)
                return change(*args, **options)

            return counting

        try:
            for name in ("replace", "unlink", "fsync"):
                setattr(os, name, counted(getattr(os, name)))
            Path.replace = counted(Path.replace)  # type: ignore[assignment, method-assign]
            Path.unlink = counted(Path.unlink)  # type: ignore[assignment, method-assign]
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def test_a_set_that_is_replaced_is_never_mixed(tmp_path: Path) -> None:
    outcomes, n_files = list[str](), list[int]()
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        write_set(folder, "old")
        killed = killed_at(step, partial(write_set, folder, "new"))
        n_files.append(len(list(folder.glob("*.mrc"))))
        assert len(visible(folder)) <= 1
        finish_set(folder)
        assert {path.name for path in folder.glob("*.mrc")} == set(NAMES)
        (left,) = visible(folder)
        outcomes.append(left)
        if not killed:
            break
    assert outcomes == sorted(outcomes, reverse=True)
    assert {"old", "new"} == set(outcomes)
    assert 0 in n_files, "killed while none of the files is there"


def test_the_next_export_and_import_finish_a_set(merged: Path, tmp_path: Path) -> None:
    write_mrc_set(merged, tmp_path)
    expected = {path.name: path.read_bytes()[1024:] for path in tmp_path.iterdir()}
    assert len(expected) == 8
    for file in tmp_path.iterdir():
        file.write_bytes(b"of another result")
    for step in range(100):
        assert killed_at(step, partial(write_mrc_set, merged, tmp_path, overwrite=True))
        if not (tmp_path / "mip.mrc").exists():
            break
    with pytest.raises(OutputExistsError):
        write_mrc_set(merged, tmp_path)
    found = {path.name: path.read_bytes()[1024:] for path in tmp_path.glob("*.mrc")}
    assert found == expected


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ocelot-replacing.json").write_text("[1]")
    with pytest.raises(FormatError, match=r"\.ocelot-replacing\.json: expected a list of files"):
        finish_set(tmp_path)


def test_an_error_leaves_the_old_set(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_set_or_nothing(tmp_path, NAMES) as staged:
            staged[0].write_text("new")
            raise RuntimeError

    write_set(tmp_path, "old")
    with pytest.raises(RuntimeError):
        fail()
    assert visible(tmp_path) == {"old"}
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_devices_are_written_directly() -> None:
    with whole_or_nothing(Path("/dev/null")) as place:
        assert place == Path("/dev/null")
