"""Imports that are killed, or whose files are replaced meanwhile."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from builders import SPACE, explicit_maps, indexed_maps, save_plain_npz
from chaos_common import end, start, wait_for
from helpers import chunk_bytes
from ocelot_em.cli.main import run as ocelot
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partials

pytestmark = pytest.mark.chaos

SHAPE = (30, 40)

ATTEMPT = re.compile("/[0-9a-f]{12}/")

KILLED = """
import os, signal, sys
from ocelot_em.store import constants, local
from ocelot_em.cli.main import run

constants.DEFAULT_CHUNK = 16
left = int(sys.argv[1])
for of, names in (
    (local.LocalObjects, ("put", "create", "sync", "tidy", "append_to")),
    (local._AppendedFile, ("append", "publish")),
):
    for name in names:
        def killed(self, *arguments, original=getattr(of, name), **options):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)
        setattr(of, name, killed)
code = run(sys.argv[2:])
print(int(sys.argv[1]) - left)
sys.exit(code)
"""
"""Runs a command that is killed before one of its writes; else prints how many they were."""


def indexed(folder: Path) -> list[str | Path]:
    files = [
        save_plain_npz(folder / f"gpu {n}.npz", indexed_maps(SHAPE, seed=n), 9 + n)
        for n in range(2)
    ]
    space = folder / "space.npz"
    np.savez(
        space,
        euler_angles=SPACE.euler_angles,
        defocus_values=SPACE.defocus_values,
        pixel_values=SPACE.pixel_values,
    )
    return [*files, "--search-space", space]


def montage(folder: Path) -> list[str | Path]:
    lines = ["exposures:"]
    for n in range(2):
        save_plain_npz(folder / f"gpu{n}.npz", explicit_maps(SHAPE, seed=n), 9 + n)
        lines.append(
            f"- {{id: e{n}, origin: [0, {20 * n}], acquired: {n}, partials: [gpu{n}.npz]}}"
        )
    (folder / "LAMELLA.yaml").write_text("\n".join(lines))
    return [folder / "LAMELLA.yaml"]


def finished(folder: Path) -> list[str | Path]:
    ocelot_em.write_partial(folder / "R", "p", explicit_maps(SHAPE), total_projections=10**6)
    ocelot_em.merge(folder / "R", folder / "M")
    write_mrc_set(folder / "M", folder / "maps")
    return [folder / "maps", "--total-projections", "1000000"]


def import_killed(
    before: int, words: list[str | Path], output: Path
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", KILLED, f"{before}", "import", *words, "--output", output]
    return subprocess.run([*map(os.fspath, command)], capture_output=True, text=True)


def content(store: Path) -> tuple[object, ...]:
    """What a search holds; a second attempt has a group of its own for its maps."""
    files = sorted(
        ATTEMPT.sub("/", str(path.relative_to(store)))
        for path in store.rglob("*")
        if path.is_file() and not ATTEMPT.search(f"/{path.parent.name}/")
    )
    chunks = {ATTEMPT.sub("/", key): data for key, data in chunk_bytes(store).items()}
    info = ocelot_em.describe(store)
    exposures = [(e.id, e.number, e.total_projections) for e in info.exposures]
    return files, chunks, info.partials, exposures, info.attributes.total_projections


@pytest.mark.parametrize("made", [indexed, montage, finished])
def test_the_same_command_finishes_a_killed_import(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 16)
    words = made(tmp_path)
    done = import_killed(10**9, words, tmp_path / "WHOLE")
    assert done.returncode == 0, done.stderr
    n_writes, whole = int(done.stdout.splitlines()[-1]), content(tmp_path / "WHOLE")
    moments = sorted({*range(0, n_writes, max(n_writes // 7, 1)), *range(n_writes - 5, n_writes)})
    for moment in moments:
        output = tmp_path / f"OUT{moment}"
        assert import_killed(moment, words, output).returncode == -9
        if (output / "zarr.json").exists():
            found = read_partials(open_objects(output), "e0" if made is montage else "")
            assert {partial.state for _, partial in found} <= {"writing", "complete"}
        assert ocelot(["import", *map(str, words), "--output", str(output)]) == 0, moment
        assert content(output) == whole, moment
        assert ocelot_em.check(output) == [], moment


PAUSED = """
import sys, time
from pathlib import Path
from ocelot_em.cli.main import run
from ocelot_em.store.partials import PartialWriter

folder, when = Path(sys.argv[1]), sys.argv[2]
def paused(self, *arguments, original=getattr(PartialWriter, when), **options):
    (folder / "checked").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return original(self, *arguments, **options)
setattr(PartialWriter, when, paused)
sys.exit(run(sys.argv[3:]))
"""
"""Runs a command that waits before or within the conversion of its first partial."""


def in_npz(folder: Path, seed: int) -> list[Path]:
    return [save_plain_npz(folder / "a.npz", explicit_maps(SHAPE, seed=seed), 9)]


def in_result(folder: Path, seed: int) -> Path:
    ocelot_em.write_partial(folder / "R", "p", explicit_maps(SHAPE, seed), total_projections=9)
    ocelot_em.merge(folder / "R", folder / "M")
    return folder / "M"


def in_mrc(folder: Path, seed: int) -> list[Path]:
    return sorted(write_mrc_set(in_result(folder, seed), folder / "maps").iterdir())


def in_hdf5(folder: Path, seed: int) -> list[Path]:
    return [write_hdf5(in_result(folder, seed), folder / "a.h5")]


@pytest.mark.parametrize("when", ["__enter__", "write"])
@pytest.mark.parametrize("is_in_place", [False, True], ids=["renamed", "in place"])
@pytest.mark.parametrize("made", [in_npz, in_mrc, in_hdf5])
def test_files_that_are_replaced_between_check_and_conversion_are_refused(
    made, is_in_place: bool, when: str, tmp_path: Path
) -> None:
    for folder in ("given", "newer"):
        (tmp_path / folder).mkdir()
    files, newer = made(tmp_path / "given", 1), made(tmp_path / "newer", 2)
    words = [files[0] if len(files) == 1 else files[0].parent]
    if made is not in_npz:
        words += ["--total-projections", "9"]
    words += ["--output", tmp_path / "OUT"]
    command = [sys.executable, "-c", PAUSED, tmp_path, when, "import", *words]
    importing = start([*map(os.fspath, command)], {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        wait_for((tmp_path / "checked").exists, "files that were checked", alive=importing)
        replace = shutil.copyfile if is_in_place else os.replace
        for old, new in zip(files, newer, strict=True):
            replace(new, old)
        (tmp_path / "go").touch()
        printed = importing.communicate(timeout=300)[0]
    finally:
        end(importing)
    assert importing.returncode == 2, printed
    assert "was changed while it was imported" in " ".join(printed.split())
    partials = read_partials(open_objects(tmp_path / "OUT"))
    assert [partial.state for _, partial in partials] == ["writing"]
    again = import_killed(10**9, words, tmp_path / "OUT")
    assert again.returncode == 0, again.stderr
    assert ocelot_em.check(tmp_path / "OUT") == []
