"""A bucket that misbehaves: behind a proxy that answers as it should not."""

import http.client
import os
import random
import re
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from chaos_common import (
    Gate,
    Undisturbed,
    digests,
    end,
    fetched,
    merge_command,
    start,
    undisturbed,
    wait_for,
)
from ocelot_em import check, describe, merge
from ocelot_em.errors import FormatError, StoppedError, TilesFailedError
from ocelot_em.merge.outcome import Outcome
from ocelot_em.run.observer import Observer
from ocelot_em.store.objects import open_objects
from s3 import BUCKET, bucket, server

__all__ = ["bucket", "server"]  # fixtures

pytestmark = pytest.mark.chaos

RUN, OUT = f"s3://{BUCKET}/x/RUN.zarr", f"s3://{BUCKET}/x/OUT.zarr"
CHUNK = re.compile(r"\.zarr/(?P<path>.*/c(/\d+)+)$")

LISTED = re.compile(
    r"<(Contents|CommonPrefixes)>\s*<(Key|Prefix)>(?P<key>[^<]*)</.*?</\1>", re.DOTALL
)
"""An entry of a listing."""

Fault = Callable[[str, str], str]
"""What befalls a request for a chunk, of a method and a key: a word of :class:`Proxy`, or none."""


@dataclass
class Faults:
    """What the proxy does to requests for chunks of maps, and how often it did."""

    fault: Fault | None = None
    hidden: re.Pattern[str] | None = None
    """Keys that listings do not show yet."""
    struck: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    counting: threading.Lock = field(default_factory=threading.Lock)
    company: "Company" = field(default_factory=lambda: Company())

    def next(self, method: str, path: str) -> str:
        """Choose what befalls a request."""
        found = CHUNK.search(path)
        if found is None or self.fault is None:
            return ""
        with self.counting:
            self.asked += 1
            chosen = self.fault(method, found["path"])
            if chosen:
                self.struck[f"{method} {chosen}"] += 1
        return chosen

    def late_listing(self, content: bytes) -> bytes:
        """Leave the hidden keys out of the answer to a listing."""
        assert self.hidden is not None
        hidden = self.hidden

        def shown(entry: re.Match[str]) -> str:
            is_hidden = hidden.search(entry["key"]) is not None
            self.struck["late"] += is_hidden
            return "" if is_hidden else entry[0]

        return LISTED.sub(shown, content.decode()).encode()


class Company:
    """Requests that are answered only when several wait, or when no more come.

    So many answers together are a round; one request at a time would need a round for each.
    """

    SIZE = 6

    ALONE_SECONDS = 1.0
    """Requests that wait so long are answered although they are few, as the last ones are."""

    def __init__(self) -> None:
        self.rounds = 0
        self._waiting = 0
        self._together = threading.Condition()

    def join(self) -> None:
        """Wait for the others of a round."""
        with self._together:
            mine = self.rounds
            self._waiting += 1
            if self._waiting < self.SIZE:
                self._together.wait_for(lambda: self.rounds != mine, self.ALONE_SECONDS)
            if self.rounds == mine:
                self.rounds, self._waiting = mine + 1, 0
                self._together.notify_all()


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, or answers ``503``, ``404``, ``slow``, or with a ``reset`` on the way."""

    protocol_version = "HTTP/1.1"
    behind: ClassVar[tuple[str, int]]
    faults: ClassVar[Faults]

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.next(self.command, self.path.partition("?")[0])
        if fault in ("503", "404"):
            code = {"503": "SlowDown", "404": "NoSuchKey"}[fault]
            content = f"<Error><Code>{code}</Code><Message>said the test</Message></Error>".encode()
            self._answer(int(fault), [("Content-Type", "application/xml")], content, len(content))
            return
        if fault == "slow":
            self.faults.company.join()
        if fault == "reset" and self.command != "GET":
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.behind, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if self.faults.hidden is not None and "list-type=2" in self.path:
            content = self.faults.late_listing(content)
            answer.headers.replace_header("Content-Length", str(len(content)))
        length = int(answer.headers.get("Content-Length") or len(content))
        if fault == "reset":
            self._answer(answer.status, answer.getheaders(), content[: len(content) // 2], length)
            self._reset()
            return
        self._answer(answer.status, answer.getheaders(), content, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, length: int
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close the connection at once, which the other side sees as a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Say nothing: connections break here on purpose."""


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("store"), 200, 80, n_partials=2)


@pytest.fixture
def faults(server: str, bucket, search: Undisturbed, monkeypatch) -> Iterator[Faults]:
    """A bucket with the search in it, behind a proxy that does no harm yet."""
    made, behind = Faults(), urlsplit(server)
    place = behind.hostname, behind.port
    handler = type("Handler", (Proxy,), {"behind": place, "faults": made})
    proxy = Server(("127.0.0.1", 0), handler)
    serving = threading.Thread(target=proxy.serve_forever, daemon=True)
    serving.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    for path in search.run.rglob("*"):
        if path.is_file():
            key = f"x/RUN.zarr/{path.relative_to(search.run)}"
            bucket.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    yield made
    proxy.shutdown()
    serving.join()
    proxy.server_close()


def assert_finished(search: Undisturbed, faults: Faults, folder: Path) -> None:
    faults.fault = None
    assert check(OUT) == []
    search.assert_finished(fetched(OUT, folder / "fetched-output"))
    assert digests(fetched(RUN, folder / "fetched-input")) == search.inputs
    print(f"struck {dict(faults.struck)} of {faults.asked} requests for chunks")


def sometimes(fault: str, share: float) -> Fault:
    """A fault of a share of the requests, by chance."""
    chance = random.Random(fault)
    return lambda _method, _path: fault if chance.random() < share else ""


@pytest.mark.parametrize("share", [0.3])
def test_a_busy_bucket_slows_a_merge_but_harms_nothing(search, faults, tmp_path, share) -> None:
    faults.fault = sometimes("503", share)
    assert merge(RUN, OUT, tile_size=search.tile, threads=4).n_merged == search.n_tiles
    assert 0.2 * faults.asked < faults.struck.total() < 0.4 * faults.asked
    assert faults.struck["GET 503"] > 10
    assert faults.struck["PUT 503"] > 10
    assert_finished(search, faults, tmp_path)


def test_a_slow_bucket_harms_nothing(search, faults, tmp_path) -> None:
    faults.fault = lambda _method, _path: "slow"
    merge(RUN, OUT, tile_size=search.tile, threads=4)
    rounds = faults.company.rounds
    print(f"{rounds} rounds of {faults.asked} answers")
    assert rounds < faults.asked / 4  # they were waited for together
    assert_finished(search, faults, tmp_path)


def test_connections_that_break_half_way_harm_nothing(search, faults, tmp_path) -> None:
    faults.fault = sometimes("reset", 0.2)
    merge(RUN, OUT, tile_size=search.tile, threads=4)
    assert faults.struck["GET reset"] > 10
    assert faults.struck["PUT reset"] > 10
    assert_finished(search, faults, tmp_path)


def test_a_chunk_that_is_not_found_for_a_while_is_no_empty_chunk(search, faults, tmp_path) -> None:
    seen: Counter[str] = Counter()

    def not_at_first(method: str, path: str) -> str:
        seen[path] += method == "GET"
        return "404" if method == "GET" and "mip" in path and seen[path] == 1 else ""

    faults.fault = not_at_first
    merge(RUN, OUT, tile_size=search.tile, threads=4)
    assert faults.struck["GET 404"] > 0
    assert_finished(search, faults, tmp_path)


def test_a_chunk_that_is_not_found_fails_by_name_and_a_rerun_finishes(
    search, faults, tmp_path
) -> None:
    def is_gone(method: str, path: str) -> str:
        return "404" if method == "GET" and path == "partials/p1/mip/c/0/0" else ""

    faults.fault = is_gone
    run = start(merge_command(RUN, OUT, search.tile))
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 1, printed
    assert re.search(
        r"MissingChunkError: .*partial 'p1': mip: chunk \(0, 0\).* is missing", printed
    )
    info = describe(OUT)
    assert info.attributes.state == "writing"
    assert info.tiles_done < search.n_tiles
    left = search.n_tiles - info.tiles_done
    assert f"{left} of {search.n_tiles} tiles failed" in printed
    with pytest.raises(TilesFailedError, match="MissingChunkError"):
        merge(RUN, OUT, tile_size=search.tile)
    faults.fault = None
    assert merge(RUN, OUT, tile_size=search.tile).n_merged == left
    assert_finished(search, faults, tmp_path)


@pytest.mark.parametrize(
    "hidden", ["/partials/p1/", "/RUN.zarr/(partials|roster)/", "/(p1|roster)/.*zarr.json"]
)
def test_partials_that_a_listing_does_not_show_yet_are_missed_by_name(
    search, faults, tmp_path, hidden
) -> None:
    faults.hidden = re.compile(hidden)
    if hidden.endswith(".json"):  # folders are listed, and all else is fetched by its name
        merge(RUN, OUT, tile_size=search.tile)
    else:
        with pytest.raises(FormatError, match=r"partial 'p1' is missing"):
            merge(RUN, OUT, tile_size=search.tile)
        assert open_objects(OUT).sizes("") == {}
        assert any("partial 'p1' is missing" in problem for problem in check(RUN))
        faults.hidden = None
        merge(RUN, OUT, tile_size=search.tile)
    faults.hidden = None
    assert_finished(search, faults, tmp_path)


def test_a_result_that_listings_do_not_show_yet_is_complete_only_when_it_is(
    search, faults, tmp_path
) -> None:
    """All that a run has just written is hidden: while it runs, and from the one that resumes."""

    class Stops(Observer):
        def locked(self, stop: Callable[[], None]) -> None:
            self.stop = stop

        def tile_ended(self, outcome: Outcome) -> None:
            self.stop()

    faults.hidden = re.compile(r"OUT\.zarr/(?!lock/)")
    with pytest.raises(StoppedError):
        merge(RUN, OUT, tile_size=search.tile, threads=1, observer=Stops())
    assert describe(OUT).attributes.state == "writing"
    merge(RUN, OUT, tile_size=search.tile, threads=1)
    assert describe(OUT).attributes.state == "complete"
    faults.hidden = re.compile(r"OUT\.zarr/")
    merge(RUN, OUT, tile_size=search.tile, threads=1)
    merge(RUN, OUT, tile_size=search.tile, threads=1, overwrite=True)
    assert faults.struck["late"] > 0
    faults.hidden = None
    assert_finished(search, faults, tmp_path)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate", 3)


@pytest.fixture
def first(search, faults, gate: Gate) -> Iterator["subprocess.Popen[str]"]:
    """A run that has done some tiles, and holds the others until the gate is opened."""
    run = start(merge_command(RUN, OUT, search.tile), gate.environment)
    try:
        marks = open_objects(OUT)
        folder = "progress/tile_summary/c"
        wait_for(lambda: len(marks.sizes(folder)) >= gate.n_tiles, "tiles of the first", alive=run)
        yield run
    finally:
        end(run)


def test_one_run_at_a_time_writes_an_output_in_a_bucket(
    search, faults, tmp_path, first, gate
) -> None:
    second = start(merge_command(RUN, OUT, search.tile))
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 2, printed
    assert f"another run is writing it: process {first.pid} on" in printed
    gate.open()
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 0, printed
    assert_finished(search, faults, tmp_path)


def test_a_lock_that_a_killed_run_left_in_a_bucket_is_taken_over(
    search, faults, tmp_path, first, gate
) -> None:
    os.kill(first.pid, 9)
    first.communicate()
    assert len(open_objects(OUT).sizes("lock")) == 1
    assert merge(RUN, OUT, tile_size=search.tile).n_merged == search.n_tiles - gate.n_tiles
    assert_finished(search, faults, tmp_path)
