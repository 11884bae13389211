"""Runs and workers that are stopped in the middle of a write, and continued when it is too late."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ocelot_em
from builders import explicit_maps, save_plain_npz
from chaos_common import Undisturbed, digests, do, end, require, start, undisturbed, wait_for
from ocelot_em import PartialWriter, Region, write_partial
from ocelot_em.errors import CorruptChunkError, FormatError, InvalidInputError
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.resume import confirm, create_output
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.api import plan_merge
from ocelot_em.store import local, lock
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects

pytestmark = pytest.mark.chaos

SLEEPER = """
import os, signal, socket, sys
from ocelot_em.store import local, lock
from ocelot_em.store.fence import _HeldFolder
lock.HEARTBEAT_SECONDS = 0.1
socket.gethostname = lambda: "elsewhere"  # so that nobody can see whether this process is alive
step, part, count, flag = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)

def stops(kind):
    original, n = getattr(kind, step), 0
    def stopped(self, *arguments):
        nonlocal n
        n += str(arguments[-1]).endswith(part)
        if n == count:
            n += 1
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *arguments)
    setattr(kind, step, stopped)

stops(_HeldFolder if step in vars(_HeldFolder) else local.LocalObjects)
"""
"""Stops its own process before a step of writing, when the lock has been proved."""

DRIVER = SLEEPER + "\nfrom ocelot_em.cli.main import main\nsys.exit(main())"

WORKER = (
    SLEEPER
    + """
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import attempt_tiles
print([end.error for end in attempt_tiles(JobSpec(*sys.argv[1:5]), [(0, 0), (0, 1)])])
"""
)

WRITER = (
    SLEEPER.replace("_HeldFolder if step in vars(_HeldFolder) else ", "")
    + """
from builders import explicit_maps
from ocelot_em import write_partial
from ocelot_em.store import constants
constants.DEFAULT_CHUNK = int(sys.argv[2])
write_partial(sys.argv[1], "gpu0", explicit_maps((40, 30), 1), total_projections=7)
"""
)

MOMENTS = {
    "chunk": ("_stage", "OUT.zarr/mip/c/1/1", 1),
    "written chunk": ("_publish", "OUT.zarr/mip/c/1/1", 1),
    "mark": ("_stage", "tile_summary/c/1/1/0", 1),
    "statistics": ("_stage", "statistics/mip_histogram/zarr.json", 1),
    "manifest": ("_stage", "manifest/content/c/0", 1),
    "root": ("_stage", "OUT.zarr/zarr.json", 2),
    "heartbeat": ("_stage", "lock/0", 2),
    "release": ("_discard", "lock/0", 1),
}


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("fence"), 60, 20)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Another search of the same shape."""
    return undisturbed(tmp_path_factory.mktemp("other"), 60, 20, n_partials=1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are stale after a second, for the runs of this process."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "CHECK_SECONDS", 0.1)


def result_of(output: Path) -> dict[str, tuple[str, int]]:
    """Digest and number of all files but locks, which change with every heartbeat."""
    return {
        key: (digest, (output / key).stat().st_ino)
        for key, digest in digests(output).items()
        if not key.startswith("lock")
    }


Sleeper = tuple["subprocess.Popen[str]", Callable[[], str]]


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[Callable[..., Sleeper]]:
    """Start a process that stops itself; return it, and what lets it end and tells its output."""
    started: list[subprocess.Popen[str]] = []

    def begin(script: str, moment: tuple[str, str, int], arguments: Sequence[str]) -> Sleeper:
        step, part, count = moment
        flag = tmp_path / "stopped"
        command = [sys.executable, "-c", script, step, part, str(count), str(flag), *arguments]
        process = start(command, {"PYTHONPATH": os.pathsep.join(sys.path)})
        started.append(process)
        wait_for(flag.exists, "a process that stops itself", alive=process)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

        def wake() -> str:
            os.kill(process.pid, signal.SIGCONT)
            return process.communicate(timeout=300)[0]

        return process, wake

    yield begin
    for process in started:
        end(process)


@pytest.mark.parametrize(
    ("moment", "overwrites"),
    [
        ("chunk", False),
        ("chunk", True),
        ("written chunk", True),
        ("mark", True),
        ("statistics", False),
        ("manifest", False),
        ("root", True),
        ("heartbeat", False),
        ("release", True),
    ],
)
def test_a_driver_that_was_stopped_writes_nothing_into_what_another_run_made(
    moment: str,
    overwrites: bool,
    search: Undisturbed,
    other: Undisturbed,
    tmp_path: Path,
    impatient: None,
    asleep: Callable[..., Sleeper],
) -> None:
    output, by = tmp_path / "OUT.zarr", other if overwrites else search
    arguments = ["merge", str(search.run), "--output", str(output), "--tile-size", "20"]
    driver, wake = asleep(DRIVER, MOMENTS[moment], [*arguments, "--threads", "2"])
    with OutputLock(open_objects(output)):
        pass  # a run between, so that numbers of locks start again at 0
    with contextlib.ExitStack() as held:
        ocelot_em.merge(by.run, output, tile_size=20, overwrite=overwrites)
        if moment == "release":  # a third run holds the lock meanwhile, with the same number
            third = held.enter_context(OutputLock(open_objects(output)))
            assert third.key == "lock/0"
        before = result_of(output)
        printed = wake()
        assert result_of(output) == before
        if moment == "release":
            third.prove()
            assert driver.returncode == 0
        else:
            assert driver.returncode == 75, printed
            assert "this run no longer holds the output" in " ".join(printed.split())
    by.assert_finished(output)
    search.assert_inputs_untouched()


def test_a_worker_that_was_stopped_writes_nothing_after_its_run(
    search: Undisturbed,
    other: Undisturbed,
    tmp_path: Path,
    asleep: Callable[..., Sleeper],
) -> None:
    output = tmp_path / "OUT.zarr"
    ready, options = plan_merge(search.run, output, MergeOptions(tile_size=20))
    with OutputLock(open_objects(output)) as held:
        attributes = create_output(held.objects, confirm(ready, held.objects), options)
        spec = JobSpec(str(output), attributes.id, held.key, held.id)
        arguments = [spec.output, spec.run_id, spec.lock, spec.holder]
        _, wake = asleep(WORKER, ("_stage", "mip/c/0/0", 1), arguments)
    ocelot_em.merge(other.run, output, tile_size=20, overwrite=True)
    before = result_of(output)
    assert "LockLostError" in wake()
    assert result_of(output) == before
    other.assert_finished(output)


def test_an_overwriting_run_that_is_killed_at_any_moment_leaves_the_old_or_the_new_result(
    search: Undisturbed, other: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state before each step that moves or deletes something is what a kill leaves."""
    output, states = tmp_path / "OUT.zarr", list[Path]()
    monkeypatch.setattr(local.LocalObjects, "sync", lambda _: None)  # too slow for many merges
    monkeypatch.setattr(os, "fsync", lambda _: None)
    ocelot_em.merge(search.run, output, tile_size=20)
    finished = digests(output)

    def staged(folder: str, names: list[str]) -> list[str]:
        """Files that a heartbeat, in its own thread, is about to rename."""
        return [name for name in names if "#" in name and not Path(folder, name).is_dir()]

    def remember() -> None:
        states.append(tmp_path / f"state-{len(states)}")
        shutil.copytree(output, states[-1], ignore=staged)

    with monkeypatch.context() as patched:
        rename, rmtree = os.rename, shutil.rmtree

        def remember_and_rename(path: Path | str, target: Path | str) -> None:
            remember()
            rename(path, target)

        def remember_and_delete(path: Path) -> None:
            remember()
            rmtree(path)

        patched.setattr(os, "rename", remember_and_rename)
        patched.setattr(shutil, "rmtree", remember_and_delete)
        ready, options = plan_merge(other.run, output, MergeOptions(tile_size=20, overwrite=True))
        with OutputLock(open_objects(output)) as held:
            create_output(held.objects, confirm(ready, held.objects), options)
    # The locks in them are of this process, which holds them no more.
    was_restored = []
    for number, state in enumerate(states):
        again = tmp_path / f"again-{number}"
        shutil.copytree(state, again)
        with OutputLock(open_objects(again)):
            pass
        was_restored.append(digests(again) == finished)
        if not was_restored[-1]:
            assert ocelot_em.describe(again).attributes.state == "writing"
        ocelot_em.merge(other.run, state, tile_size=20, overwrite=True)
        other.assert_finished(state)
    assert was_restored == sorted(was_restored, reverse=True)  # once there, the new one stays
    assert 10 < sum(was_restored) < len(states)


@pytest.mark.parametrize("chunk", [1024, 16])
@pytest.mark.parametrize(
    "moment",
    [
        ("_stage", "gpu0/mip/c/0/0", 1),
        ("_publish", "gpu0/best_phi/c/0/0", 1),
        ("_stage", "gpu0/manifest/content/c/0", 1),
        ("_stage", "gpu0/zarr.json", 2),
    ],
    ids=lambda moment: moment[1],
)
def test_a_writer_that_was_stopped_does_not_change_what_another_one_completed(
    moment: tuple[str, str, int], chunk: int, tmp_path: Path, asleep: Callable[..., Sleeper]
) -> None:
    """Neither in files of chunks nor in shards."""
    run, maps = tmp_path / "RUN.zarr", explicit_maps((40, 30), 2)
    first = PartialWriter(run, "gpu0", (40, 30), total_projections=9)
    is_second = moment[1] == "gpu0/zarr.json"  # it stops before it takes an unfinished one over
    if is_second:
        first.__enter__()
    writer, wake = asleep(WRITER, moment, [str(run), str(chunk)])
    if is_second:
        first.write(Region.whole((40, 30)), maps)
        first.__exit__(None, None, None)
    else:
        write_partial(run, "gpu0", maps, total_projections=9)
    before = digests(run)
    told = wake()
    assert writer.returncode != 0
    assert "taken over by another writer" in told or "already there and complete" in told
    assert digests(run) == before
    assert ocelot_em.open_partials(run).total_projections.values.tolist() == [9]
    assert ocelot_em.check(run) == []


def test_bind_mounts_do_not_hide_that_an_output_is_an_input(
    search: Undisturbed, tmp_path: Path
) -> None:
    require("mount", "umount")
    output, bound = tmp_path / "OUT.zarr", tmp_path / "bound"
    ocelot_em.merge(search.run, output, tile_size=20)
    before = digests(output)
    bound.mkdir()
    (output / "in").mkdir()
    for source, target, inputs, to in (
        (output, bound, [output], bound),
        (output, bound, [bound], output),
        (search.run, bound, [search.run], bound / "OUT.zarr"),
        (search.run / "partials", bound, [search.run], bound / "OUT.zarr"),
        (search.run, output / "in", [search.run], output),
    ):
        do("mount", "--bind", source, target)
        try:
            with pytest.raises(InvalidInputError, match=r"is also an input|is inside|contains"):
                ocelot_em.merge(inputs, to, tile_size=20, overwrite=True)
        finally:
            do("umount", target)
        assert digests(output) == before
        search.assert_inputs_untouched()
    (tmp_path / "given").mkdir()
    folder = save_plain_npz(tmp_path / "given" / "a.npz", explicit_maps((4, 5), 1), 9).parent
    do("mount", "--bind", folder, bound)
    try:
        with pytest.raises(InvalidInputError, match="contains the input"):
            ocelot_em.import_results([folder / "a.npz"], bound)
    finally:
        do("umount", bound)
    assert [*folder.iterdir()] == [folder / "a.npz"]


def test_what_a_bucket_receives_late_is_an_error_with_its_place(
    search: Undisturbed, other: Undisturbed
) -> None:
    """Of a request that was proved, and sent before another run replaced the result."""
    output = open_objects("memory://late/OUT.zarr")
    ocelot_em.merge(search.run, output.url, tile_size=20)
    late = {key: output.get(key) for key in ("mip/c/1/1", "zarr.json", "manifest/content/c/0")}
    ocelot_em.merge(other.run, output.url, tile_size=20, overwrite=True)
    for key, content in late.items():
        newer = output.get(key)
        assert content is not None
        assert newer is not None
        output.put(key, [content])
        with pytest.raises((CorruptChunkError, FormatError), match=r"mip|manifest"):
            ocelot_em.open_merged(output.url).mip.compute()
        output.put(key, [newer])
    assert ocelot_em.check(output.url) == []
