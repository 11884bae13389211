"""Serve maps and particles to a browser on this machine, with neuroglancer to look at them.

The server listens on 127.0.0.1 only, and every URL begins with a random token, so that neither
other users nor other web sites can read the maps. Files outside its folders cannot be reached.
"""

import http.server
import json
import logging
import re
import secrets
import socket
import socketserver
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from getpass import getuser
from http import HTTPStatus
from importlib.util import find_spec
from io import BytesIO
from os import SEEK_END, PathLike
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from ocelot_em.errors import InvalidInputError, OcelotError, StorageError
from ocelot_em.io.ome_zarr import write_ome_zarr
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_attributes
from ocelot_em.view import scene

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PUBLIC_CLIENT = "https://neuroglancer-demo.appspot.com/"
"""URL of neuroglancer if the package is not installed; needs a network."""

_CLIENT, _STATE = "client", "state.json"

_KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
"""Content types that browsers insist on, by suffix."""

IDLE_SECONDS = 60
"""Timeout of an idle connection, in seconds."""

EVENT_SECONDS = 15
"""Time between signs of life on an open page's stream of events, in seconds."""

_HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "Range",
    "Access-Control-Allow-Private-Network": "true",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class View(socketserver.ThreadingTCPServer):
    """Served maps; as a context manager, it stops serving on exit.

    ``url`` opens neuroglancer with the maps. ``is_offline`` states whether that works without a
    network, because neuroglancer is served from this machine, too.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folders: Mapping[str, Path], contents: dict[str, bytes], port: int) -> None:
        self.folders, self.contents = folders, contents
        token = secrets.token_urlsafe(16)
        # These paths are the ones that neuroglancer's page expects of its server.
        self.prefix, self.events, self.is_closed = f"/v/{token}/", f"/events/{token}", Event()
        super().__init__((HOST, port), _Handler)
        self.port = int(self.server_address[1])
        self.url = f"http://{HOST}:{self.port}{self.prefix}"
        contents[_STATE] = contents[_STATE].replace(scene.ORIGIN.encode(), self.url.encode())
        self.is_offline = _CLIENT in folders
        page = f"{self.url}{_CLIENT}/index.html" if self.is_offline else PUBLIC_CLIENT
        self.neuroglancer_url = f"{page}#!{self.url}{_STATE}"
        self._resources = ExitStack()
        self._thread = Thread(
            target=self.serve_forever, args=(0.1,), name="ocelot-view", daemon=True
        )
        self._thread.start()

    @property
    def ssh_command(self) -> str:
        """Command for another machine, after which ``url`` opens the maps there."""
        return f"ssh -NL {self.port}:{HOST}:{self.port} {getuser()}@{socket.gethostname()}"

    def keep_until_closed(self, resources: ExitStack) -> None:
        """Close resources after the view."""
        self._resources = resources

    def wait(self) -> None:
        """Wait until it is closed or interrupted."""
        while self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """Stop serving, and delete the image if it was written for this view."""
        self.is_closed.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._resources.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what the base class would print; mostly closed connections."""
        log.debug("request of %s failed", client_address, exc_info=True)


def view(
    source: str | PathLike[str] | MergedResult,
    port: int = 0,
    *,
    maps: Sequence[str] = (),
    particles: ParticleTable | None = None,
) -> View:
    """Serve maps and particles on this machine until the view is closed or the process ends.

    Parameters
    ----------
    source
        An OME-Zarr image, or a merged result, of which an image is written into a temporary folder.
    port
        Port on 127.0.0.1; 0 takes any free port. If the package neuroglancer is installed (extra
        ``view``), the viewer is served there, too, and no network is needed.
    maps
        Maps to show, the first one visible. By default all of an image, ``scaled_mip`` of a result.
    particles
        Particles to draw over them. By default those of
        :func:`ocelot_em.particles.picking.find_peaks` for a result, none for an image.

    Raises
    ------
    InvalidInputError
        The source is neither, or has no such map.
    StorageError
        The port is taken, or the temporary image cannot be written.
    """
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"port: expected 0 to 65535, got {port}")
    with ExitStack() as stack:
        if isinstance(source, MergedResult) or is_store(source):
            merged = MergedResult.open(source)
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocelot-")))
            folder = write_ome_zarr(merged, temporary / "MAPS.zarr", maps=maps or (SCALED_MIP,))
            if particles is None:
                with suppress(InvalidInputError):  # nothing was searched
                    particles = find_peaks(merged)
        else:
            folder = Path(source)
        state = scene.read_state(folder, maps, particles)
        contents = {_STATE: json.dumps(state).encode()}
        if particles is not None and len(particles):
            contents |= scene.annotations(particles, state["dimensions"])
        folders = {scene.PICTURE: folder.resolve(), **_own_client()}
        try:
            served = View(folders, contents, port)
        except OSError as error:
            raise StorageError(
                f"cannot listen at {HOST}:{port}: {error.strerror or error}; choose another port, "
                "or 0 for any free port"
            ) from error
        served.keep_until_closed(stack.pop_all())
    log.info("serving %s at %s:%d", folder, HOST, served.port)
    return served


def is_store(place: str | PathLike[str]) -> bool:
    """Whether a place has a store of this package, as opposed to an image."""
    with suppress(OcelotError):
        read_attributes(open_objects(place))
        return True
    return False


def _own_client() -> dict[str, Path]:
    """Return the folder of neuroglancer's page; nothing if the package is missing."""
    spec = find_spec("neuroglancer")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "static" / "client"
    return {_CLIENT: folder.resolve()} if (folder / "index.html").is_file() else {}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: View
    protocol_version = "HTTP/1.1"
    server_version = "ocelot-em"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_OPTIONS(self) -> None:
        self._head(HTTPStatus.NO_CONTENT, 0)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if secrets.compare_digest(path.encode(), self.server.events.encode()):
            self._stay_connected()
            return
        if secrets.compare_digest(path.encode(), self.server.prefix.encode()):
            self._head(HTTPStatus.FOUND, 0, {"Location": self.server.neuroglancer_url})
            return
        opened = self._open(path)
        if opened is None:
            self._head(HTTPStatus.NOT_FOUND, 0)
            return
        with opened as file:
            size = file.seek(0, SEEK_END)
            kind = _KINDS.get(Path(path).suffix, "application/octet-stream")
            headers, status = {"Content-Type": kind}, HTTPStatus.OK
            picked = _byte_range(self.headers.get("Range", ""), size)
            start, stop = picked or (0, size)
            if picked:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            if picked and start >= stop:
                status, stop = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, start
                headers = {"Content-Range": f"bytes */{size}"}
            self._head(status, stop - start, headers)
            if with_body:
                file.seek(start)
                self._copy(file, stop - start)

    def _stay_connected(self) -> None:
        """Keep a stream of events open, on which neuroglancer's page insists; there are none."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        while not self.server.is_closed.wait(EVENT_SECONDS):
            self.wfile.write(b":\n\n")  # a comment, which fails once the page is closed

    def _open(self, path: str) -> BinaryIO | None:
        """Open what a URL path names: content, or a file of a folder, with links resolved."""
        prefix = self.server.prefix
        if not secrets.compare_digest(path[: len(prefix)].encode(), prefix.encode()):
            return None
        name = path[len(prefix) :]
        if name in self.server.contents:
            return BytesIO(self.server.contents[name])
        folder, *parts = [unquote(part) for part in name.split("/")]
        root = self.server.folders.get(folder)
        if root is None or any(p in ("", ".", "..") or "/" in p or "\0" in p for p in parts):
            return None
        try:
            found = root.joinpath(*parts).resolve()
            return found.open("rb") if found.is_relative_to(root) and found.is_file() else None
        except (OSError, RuntimeError):  # too long names, circular links, no permission
            return None

    def _head(
        self, status: HTTPStatus, n_bytes: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(n_bytes))
        for name, value in (_HEADERS | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _copy(self, file: BinaryIO, n_bytes: int) -> None:
        while n_bytes > 0:
            piece = file.read(min(n_bytes, 2**20))
            if not piece:  # the file was truncated: Content-Length cannot be met
                self.close_connection = True
                return
            self.wfile.write(piece)
            n_bytes -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        # The URL contains the secret token: only the status is logged.
        log.debug("answered %s", args[1] if len(args) > 1 else format)


def _byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return half-open bounds of the requested bytes, empty if the file has none of them.

    None for the whole file: a header other than a single byte range may be ignored.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size
