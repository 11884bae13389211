"""What reaches a person: no control characters, and no stream that ends a command."""

import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from builders import explicit_maps, write_explicit_search
from ocelot_em import OcelotError, SearchInfo, describe, write_partial
from ocelot_em.cli.console import open_console
from ocelot_em.errors import StorageError, printable
from ocelot_em.run.runlog import RunLog

OCELOT = [sys.executable, "-m", "ocelot_em"]
HOSTILE = "a\x1b[2J\x9b1m\rb\x07\u202ec\udcff"
SHOWN = r"a\x1b[2J\x9b1m\rb\x07\u202ec\udcff"
CONTROL = {*range(32), 127} - {10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_explicit_search(tmp_path_factory.mktemp("streams") / "RUN.zarr", (40, 50))


def call(*arguments, **environment):
    """Run a command with pipes; its exit code, and the bytes of stdout and stderr."""
    done = subprocess.run(
        [*OCELOT, *map(os.fspath, arguments)], capture_output=True, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr


def on_terminal(*arguments):
    """Run a command on a terminal; what it sends there."""
    ours, its = pty.openpty()
    with subprocess.Popen([*OCELOT, *map(os.fspath, arguments)], stdout=its, stderr=its):
        os.close(its)
        sent = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # the other end is closed
                block = b""
            if not block:
                break
            sent += block
    os.close(ours)
    return sent


def test_control_characters_become_text():
    assert printable(HOSTILE) == SHOWN
    assert printable("Å 7\tx\n") == "Å 7\tx\n"
    assert str(StorageError(HOSTILE)) == SHOWN
    assert str(OcelotError("x")) == "x"


@pytest.mark.slow
def test_names_cannot_control_a_terminal(run, tmp_path):
    place = tmp_path / HOSTILE.replace("\udcff", "")
    shutil.copytree(run, place)
    missing = tmp_path / f"missing{HOSTILE}"
    for path in (place, missing):
        for command in (("info", path), ("check", path), ("merge", path, "--output", path)):
            _, out, err = call(*command)
            assert not CONTROL & {*out, *err}, command
            assert b"\xc2\x9b" not in out + err
            assert rb"a\x1b[2J" in out + err
    sent = on_terminal("import", tmp_path / HOSTILE, "--output", tmp_path / "R")
    assert b"a\x1b[2J" not in sent
    assert rb"a\x1b[2J" in sent


def test_content_of_a_file_cannot_control_a_terminal(tmp_path):
    file = tmp_path / "gpu0.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a\x1b[2J.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a\x1b[2J.npy", b"")
    sent = on_terminal("import", file, "--output", tmp_path / "R")
    assert b"a\x1b" not in sent
    assert rb"a\x1b[2J.npy: expected once" in sent


def test_messages_of_other_libraries_are_escaped_too(tmp_path):
    code = (
        "import logging, sys; from ocelot_em.cli.streams import secure_streams; secure_streams();"
        "logging.getLogger('x').warning('a\\x1b[2J'); raise KeyError('b\\x1b[2J\\x07')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert rb"a\x1b[2J" in done.stderr
    assert not CONTROL & {*done.stderr}


def test_no_control_character_is_logged(tmp_path):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.event("x", text=HOSTILE, paths=[tmp_path / HOSTILE], more={"a": HOSTILE + "\x7f"})
        logging.getLogger("ocelot_em").warning("%s", HOSTILE.removesuffix("\udcff"))
    data = (tmp_path / "log.jsonl").read_bytes()
    assert not CONTROL & {*data}
    first, second, _ = map(json.loads, data.splitlines())
    assert first["text"] == SHOWN
    assert second["text"] == SHOWN.removesuffix(r"\udcff")
    assert first["more"] == {"a": SHOWN + r"\x7f"}
    assert first["paths"] == [f"{tmp_path}/{SHOWN}"]


def test_a_log_on_a_full_disk_does_not_end_a_run():
    with RunLog("/dev/full") as log:
        log.event("x")


def merge_command(run, output, *options):
    return [*OCELOT, "merge", run, "--output", output, "--tile-size", "16", *options]


@pytest.mark.parametrize("stream", ["stdout", pytest.param("stderr", marks=pytest.mark.slow)])
def test_a_merge_outlives_the_reader_of_its_output(run, tmp_path, stream):
    output = tmp_path / "OUT.zarr"
    options = ["--log", "-"] if stream == "stderr" else []
    process = subprocess.Popen(
        merge_command(run, output, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        getattr(process, stream).readline()
        getattr(process, stream).close()
        other = process.stderr if stream == "stdout" else process.stdout
        printed = other.read()
    assert process.returncode == 0, printed
    assert b"Traceback" not in printed
    if stream == "stdout":
        assert printed == b""
    found = describe(output)
    assert (found.attributes.state, found.tiles_done) == ("complete", 12)


def test_every_command_ends_quietly_without_its_reader(run):
    """What is in buffers at exit is no error either."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*OCELOT, "info", run], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "closed",
    ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-"))],
)
def test_a_merge_needs_no_streams(run, tmp_path, closed):
    output = tmp_path / "OUT.zarr"
    words = merge_command(run, output, "--log", "-")
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *map(str, words)], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert describe(output).attributes.state == "complete"


def test_a_full_disk_below_the_output_is_reported_once(run, tmp_path):
    output = tmp_path / "OUT.zarr"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            merge_command(run, output), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0
    assert done.stderr.count("the output cannot be written: No space left on device") == 1
    assert describe(output).attributes.state == "complete"


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_terminals_without_our_characters(tmp_path, encoding):
    info = SearchInfo(pixel_size_angstrom=2.5)
    write_partial(tmp_path / "Å α.zarr", "p", explicit_maps(), total_projections=9, search=info)
    code, out, err = call("info", tmp_path / "Å α.zarr", PYTHONIOENCODING=encoding)
    assert (code, err) == (0, b"")
    assert ("2.5 A" if encoding == "ascii" else "2.5 Å").encode(encoding) in out
    assert rb"\u03b1.zarr" in out
    code, out, err = call("doctor", PYTHONIOENCODING=encoding)
    assert b"Traceback" not in err
    assert b" + " in out


def test_names_are_printed_as_they_are(capsys):
    open_console().print("[red]a[/red] :sun:")
    assert capsys.readouterr().out == "[red]a[/red] :sun:\n"
