"""Machines that lack something: threads, a network, a usable environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ocelot_em
from builders import write_explicit_search

pytestmark = pytest.mark.chaos

OCELOT = [sys.executable, "-m", "ocelot_em"]

TIMEOUT_SECONDS = 300


def ocelot(
    *words: object, before: tuple[str, ...] = (), **environment: str
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [*before, *OCELOT, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=TIMEOUT_SECONDS,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    folder.chmod(0o777)
    return write_explicit_search(folder / "RUN.zarr", (60, 80))


@pytest.mark.parametrize("backend", ["nonsense", "TkAgg", "module://nothing"])
def test_reports_are_drawn_whatever_backend_matplotlib_was_given(search, tmp_path, backend) -> None:
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    page = tmp_path / "page.html"
    done = ocelot("report", tmp_path / "OUT.zarr", "--output", page, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert "<svg" in page.read_text()


def test_a_local_cluster_without_loopback_is_refused_in_a_sentence(search, tmp_path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"]).returncode:
        pytest.skip("needs a network of its own: unshare -n")
    alone = ("unshare", "-n")
    merge = ("merge", search, "--output", tmp_path / "OUT.zarr")
    done = ocelot(*merge, "--cluster", "local", before=alone)
    assert done.returncode == 2, done.stderr
    assert "cannot start: OSError: [Errno 101] Network is unreachable" in done.stderr
    assert "or use --cluster threads" in done.stderr
    assert ocelot(*merge, before=alone).returncode == 0


def limited(number: int) -> tuple[str, ...]:
    """Words before a command that becomes a user of its own, with at most so many threads."""
    capabilities = "+dac_override,+dac_read_search"
    words = ("setpriv", "--reuid", f"{54300 + number}", "--clear-groups")
    words += ("--inh-caps", capabilities, "--ambient-caps", capabilities)
    code = f"resource.setrlimit(resource.RLIMIT_NPROC, ({number}, {number}))"
    code = f"import os, resource, sys; {code}; os.execv(sys.argv[1], sys.argv[1:])"
    return (*words, sys.executable, "-c", code)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, whom limits bind")
@pytest.mark.parametrize(
    ("options", "numbers"),
    [(["--threads", "1"], range(1, 9)), (["--cluster", "local", "--workers", "2"], (18, 19, 64))],
    ids=["threads", "local"],
)
def test_merges_with_few_threads_end(search, tmp_path, options, numbers) -> None:
    found = set()
    tmp_path.chmod(0o777)
    for number in numbers:
        merge = ("merge", search, "--output", tmp_path / f"OUT{number}.zarr", *options)
        done = ocelot(*merge, "--worker-timeout", "60", before=limited(number))
        found.add(done.returncode)
        assert done.returncode == 0 or "new thread" in done.stderr or "more threads" in done.stderr
    assert found >= {0, 2}
