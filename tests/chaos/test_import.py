"""An import that was killed is finished by the same command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from builders import SPACE, explicit_maps, indexed_maps, save_plain_npz
from helpers import chunk_bytes
from ocelot_em.io.mrc import write_mrc_set

pytestmark = pytest.mark.chaos

SHAPE = (30, 40)

ATTEMPT = re.compile("/[0-9a-f]{12}/")

KILLED = """
import os, signal, sys
from ocelot_em.store.local import LocalObjects
from ocelot_em.cli.main import run

left = int(sys.argv[1])
for name in ("put", "create", "sync", "tidy"):
    def killed(self, *arguments, original=getattr(LocalObjects, name), **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)
    setattr(LocalObjects, name, killed)
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
def test_the_same_command_finishes_a_killed_import(made, tmp_path: Path) -> None:
    words = made(tmp_path)
    done = import_killed(10**9, words, tmp_path / "WHOLE")
    assert done.returncode == 0, done.stderr
    n_writes, whole = int(done.stdout.splitlines()[-1]), content(tmp_path / "WHOLE")
    moments = sorted({*range(0, n_writes, max(n_writes // 10, 1)), *range(n_writes - 5, n_writes)})
    for moment in moments:
        output = tmp_path / f"OUT{moment}"
        assert import_killed(moment, words, output).returncode == -9
        again = import_killed(10**9, words, output)
        assert again.returncode == 0, (moment, again.stderr)
        assert content(output) == whole, moment
        assert ocelot_em.check(output) == [], moment
