"""Where compiled kernels are cached, in installations and homes that cannot be written."""

import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from ocelot_em.cli import doctor
from ocelot_em.kernels import ahead, compile_cache, compiling, jit, load


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which every folder for a cache can be written."""
    monkeypatch.setattr(compile_cache, "_BESIDE_SOURCE", tmp_path / "package")
    monkeypatch.setattr(compile_cache.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    compile_cache.cache_folder.cache_clear()
    yield tmp_path
    compile_cache.cache_folder.cache_clear()


def temporary(machine):
    return machine / "tmp" / f"ocelot-em-{os.getuid()}"


def add_one(x):
    return x + 1


def test_the_first_writable_folder(machine, monkeypatch, caplog):
    order = [machine / "package", machine / "home/ocelot-em", temporary(machine)]
    for folder in order:
        compile_cache.cache_folder.cache_clear()
        assert compile_cache.cache_folder() == folder
        compiled = compiling.compiled(add_one)
        assert compiled(1) == 2
        assert list(folder.rglob("*add_one*.nbi"))
        assert compile_cache.config.CACHE_DIR == ""
        shutil.rmtree(folder)
        folder.parent.mkdir(exist_ok=True)
        folder.write_text("a file where the folder would be")
    assert not caplog.messages
    compile_cache.cache_folder.cache_clear()
    compiled = compiling.compiled(add_one)
    assert compile_cache.cache_folder() is None
    assert compiling.compiled(add_one)(np.float32(1)) == compiled(1) == 2
    (warning,) = caplog.messages
    assert all(str(folder) in warning for folder in order)
    assert "set NUMBA_CACHE_DIR" in warning


def test_a_full_folder_is_not_taken(machine, monkeypatch):
    probe = compile_cache._probe

    def full(folder):
        if folder == machine / "package":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        probe(folder)

    monkeypatch.setattr(compile_cache, "_probe", full)
    assert compile_cache.cache_folder() == machine / "home/ocelot-em"


def test_the_variable_counts_first(machine, monkeypatch, caplog):
    monkeypatch.setattr(compile_cache.config, "CACHE_DIR", str(machine / "mine"))
    assert compile_cache.cache_folder() == machine / "mine"
    monkeypatch.setattr(compile_cache.config, "CACHE_DIR", "/proc/self/no-such-folder")
    compile_cache.cache_folder.cache_clear()
    assert compile_cache.cache_folder() == machine / "package"
    assert caplog.messages[0].startswith("NUMBA_CACHE_DIR cannot be written (/proc/self/no-such")


def test_shared_folders_for_temporary_files(machine):
    """numba unpickles its cache: nobody else may write there."""
    for folder in ("package", "home"):
        (machine / folder).write_text("")
    temporary(machine).mkdir()
    temporary(machine).chmod(0o777)
    assert compile_cache.cache_folder() is None
    temporary(machine).rmdir()
    temporary(machine).symlink_to(machine)
    compile_cache.cache_folder.cache_clear()
    assert compile_cache.cache_folder() is None


def test_a_worker_loads_what_another_one_compiles(machine, monkeypatch):
    """Dispatchers of two processes, as threads."""
    monkeypatch.setattr(jit, "ANNOUNCE_AFTER_SECONDS", 0)
    monkeypatch.setattr(compile_cache.config, "CACHE_DIR", str(machine / "mine"))
    one, other = compiling.compiled(add_one), compiling.compiled(add_one)
    is_waiting, seconds = threading.Event(), []

    def work():
        seconds.append(compiling.seconds_compiling(lambda: other(1), is_waiting.set))

    second = threading.Thread(target=work)
    with compile_cache.compiling_alone(lambda: None):
        second.start()
        assert is_waiting.wait(60)
        assert one(1) == 2
    second.join()
    assert seconds[0] > 0
    assert sum(other.dispatcher.stats.cache_hits.values()) == 1
    assert compiling.seconds_compiling(lambda: other(1), is_waiting.set) == 0


def test_a_lock_that_is_kept_holds_up_nobody(machine, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_WAIT_SECONDS", 0)
    monkeypatch.setattr(compile_cache.config, "CACHE_DIR", str(machine / "mine"))
    with compile_cache.compiling_alone(pytest.fail):
        assert compiling.seconds_compiling(lambda: compiling.compiled(add_one)(1), print) > 0


load("cpu")  # so that it is cached where it always is


def test_the_doctor_shows_the_folder(machine, monkeypatch):
    monkeypatch.setattr(ahead, "are_loaded", lambda: False)
    assert f"cached in {machine / 'package'}" in doctor._kernels()[1]
    monkeypatch.setattr(compile_cache, "cache_folder", functools.cache(lambda: None))
    state, text = doctor._kernels()
    assert state == "warning"
    assert "no folder can be written" in text


CODE = """
import numpy as np
from ocelot_em.kernels import by_map, compile_cache
assert not by_map.any_not_finite(np.zeros(1, np.float32))
print(compile_cache.cache_folder())
"""


@pytest.mark.parametrize("has_temporary", [True, False])
def test_a_package_that_cannot_be_written_and_no_home(tmp_path, has_temporary):
    """numba alone raises "no locator available" while the kernels are imported."""
    package = tmp_path / "ocelot_em"
    left_out = shutil.ignore_patterns("__pycache__", "built")
    shutil.copytree(Path(ocelot_em.__file__).parent, package, ignore=left_out)
    (package / "kernels/__pycache__").write_text("")
    (tmp_path / "tmp").mkdir()
    shared = temporary(tmp_path)
    if not has_temporary:
        shared.write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HOME": "/proc/nobody"}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (str(shared) if has_temporary else "None")
    assert bool(list(shared.rglob("*.nbi"))) == has_temporary
    assert done.stderr.count("each process compiles") == (not has_temporary)
