"""Processes that may not start threads (``ulimit -u``)."""

import functools
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from builders import write_explicit_search

AS_ANOTHER = ("setpriv", "--reuid", "54321", "--clear-groups")
CAPABILITIES = "+dac_override,+dac_read_search"
"""Of root, whom the limit does not bind, a user remains who may read the same files."""

REFUSAL = (
    "ocelot: no more threads can be started; raise 'ulimit -u' and 'ulimit -v', or set "
    "OPENBLAS_NUM_THREADS=1 and fewer threads"
)


@functools.cache
def limited(n):
    """Words before a command that runs it with at most n threads of its user."""
    limit = f"resource.setrlimit(resource.RLIMIT_NPROC, ({n}, {n}))"
    code = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", code]
    if os.getuid() == 0:
        capabilities = ("--inh-caps", CAPABILITIES, "--ambient-caps", CAPABILITIES)
        words = [*AS_ANOTHER, *capabilities, *words]
    threads = "import threading; threading.Thread(target=print).start()"
    if shutil.which(words[0]) is None:
        pytest.skip("needs setpriv")
    done = subprocess.run([*words, sys.executable, "-c", threads], capture_output=True, text=True)
    if "can't start new thread" not in done.stderr:
        pytest.skip(f"threads cannot be limited here: {shlex.join(words)}: {done.stderr}")
    return words


def ocelot(*words, **environment):
    kept = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    return subprocess.run(
        [*limited(1), sys.executable, "-m", "ocelot_em", *map(str, words)],
        capture_output=True,
        text=True,
        env=kept | environment,
    )


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenBLAS starts no threads on one core")
def test_the_driver_starts_no_threads_of_blas(tmp_path):
    search = write_explicit_search(tmp_path / "RUN.zarr", (20, 30))
    done = ocelot("info", search / "zarr.json")
    assert done.returncode == 2
    assert "expected an ocelot-em store" in done.stderr


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenBLAS starts no threads on one core")
def test_threads_that_openblas_cannot_start_are_no_interruption(tmp_path):
    done = ocelot("info", tmp_path, OPENBLAS_NUM_THREADS="2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == REFUSAL
    assert "Traceback" not in done.stderr


def test_a_merge_without_threads_is_refused_in_a_sentence(tmp_path):
    search = write_explicit_search(tmp_path / "RUN.zarr", (20, 30))
    done = ocelot("merge", search, "--output", tmp_path / "OUT.zarr")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == REFUSAL
    assert "Traceback" not in done.stderr
