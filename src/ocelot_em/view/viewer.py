"""Serve a picture to a browser on this machine, with a link that opens it in neuroglancer.

Only this machine is answered (127.0.0.1), and only who knows the link: every address begins with a
random word, so that neither other users nor the pages of other sites can look. What is outside the
folder cannot be reached through it.
"""

import http.server
import json
import logging
import os
import re
import secrets
import socketserver
import threading
from collections.abc import Mapping
from http import HTTPStatus
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from ocelot_em.errors import InvalidInputError, StorageError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PUBLIC_CLIENT = "https://neuroglancer-demo.appspot.com/"
"""Where browsers get neuroglancer from if the package is not installed; needs a network."""

FITTING_PX = 800
"""Pixels of a screen that the longest edge of a picture takes when it is opened."""

IDLE_SECONDS = 60
"""How long a connection may be silent."""

_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "Range",
    "Access-Control-Allow-Private-Network": "true",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class View:
    """A folder that is being served; a context manager that stops doing so.

    Parameters
    ----------
    url
        Address of the folder.
    neuroglancer_url
        Link that opens it in neuroglancer, with the picture's contrast limits.
    is_offline
        Whether the link works without a network: neuroglancer comes from this machine, too.
    """

    def __init__(self, server: "_Server", url: str, state: str) -> None:
        page, self._client = _own_client() or (PUBLIC_CLIENT, None)
        self.url = url
        self.neuroglancer_url = f"{page}#!{state}"
        self.is_offline = self._client is not None
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, args=(0.1,), name="ocelot-view", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when it was closed, or interrupted."""
        while self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """Stop serving the folder. Neuroglancer's own server goes on, and has nothing to show."""
        self._client = None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def view(path: str | PathLike[str], port: int = 0) -> View:
    """Serve an OME-Zarr picture on this machine, until the result is closed or the process ends.

    Parameters
    ----------
    path
        Folder of a picture, as :func:`ocelot_em.io.ome_zarr.write_ome_zarr` writes it.
    port
        Where to listen on 127.0.0.1; 0: at any free port.

    Returns
    -------
    View
        With ``url`` and ``neuroglancer_url``. If the package neuroglancer is installed (extra
        ``view``), it serves its part from this machine as well, and no network is needed.

    Raises
    ------
    InvalidInputError
        There is no picture, or no such port.
    StorageError
        The port is taken.
    """
    folder = Path(path)
    state = _neuroglancer_state(folder)
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"port: expected 0 to 65535, got {port}")
    prefix = f"/{secrets.token_urlsafe(16)}/"
    try:
        server = _Server((HOST, port), prefix, folder.resolve())
    except OSError as error:
        raise StorageError(
            f"cannot listen at {HOST}:{port}: {error.strerror or error}; choose another port, or 0 "
            "for any that is free"
        ) from error
    url = f"http://{HOST}:{server.server_address[1]}{prefix}"
    log.info("serving %s at %s:%d", folder, HOST, server.server_address[1])
    for layer in state["layers"]:
        layer["source"] = f"zarr3://{url}"
    return View(server, url, quote(json.dumps(state), safe=""))


def _neuroglancer_state(folder: Path) -> dict[str, Any]:
    """What neuroglancer is to show: a layer for each map of a picture, the first one visible."""
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        ome = metadata["attributes"]["ome"]
        layers = [
            {
                "type": "image",
                "name": str(channel["label"]),
                "visible": number == 0,
                "localPosition": [number],
                "shaderControls": {
                    "normalized": {"range": [float(channel["window"][k]) for k in ("start", "end")]}
                },
            }
            for number, channel in enumerate(ome.get("omero", {}).get("channels", []))
        ] or [{"type": "image", "name": folder.name}]
        multiscale = ome["multiscales"][0]
        full = json.loads((folder / multiscale["datasets"][0]["path"] / "zarr.json").read_bytes())
        state = {
            "dimensions": _dimensions(multiscale),
            "crossSectionScale": max(full["shape"][-2:]) / FITTING_PX,
            "layers": layers,
            "layout": "xy",
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{folder}: expected a folder with an OME-Zarr 0.5 picture, got something else "
            f"({type(error).__name__}: {error}); write_ome_zarr makes one from a merged result"
        ) from error
    return state


def _dimensions(multiscale: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Pixel sizes of x and y, in this order: neuroglancer draws the first axis to the right."""
    axes = {axis["name"]: axis.get("unit") for axis in multiscale["axes"]}
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    sizes = dict(zip(axes, scale, strict=True))
    return {
        name: (sizes[name] * 1e-10, "m") if axes[name] == "angstrom" else (sizes[name], "")
        for name in ("x", "y")
    }


def _own_client() -> tuple[str, object] | None:
    """Address of neuroglancer itself on this machine, and what keeps it there; None without it."""
    try:
        import neuroglancer
    except ImportError:
        return None
    if not neuroglancer.is_server_running():
        neuroglancer.set_server_bind_address(HOST)
    client = neuroglancer.UnsynchronizedViewer()
    return client.get_viewer_url().partition("#!")[0], client


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], prefix: str, root: Path) -> None:
        self.prefix, self.root = prefix, root
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what the base class would print; mostly browsers that hang up."""
        log.debug("request of %s failed", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
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
        found = self._find(urlsplit(self.path).path)
        try:
            opened = None if found is None else found.open("rb")
        except OSError:
            opened = None
        if found is None or opened is None:
            self._head(HTTPStatus.NOT_FOUND, 0)
            return
        with opened as file:
            size = os.fstat(file.fileno()).st_size
            kind = "application/json" if found.suffix == ".json" else "application/octet-stream"
            headers = {"Content-Type": kind}
            status, (start, stop) = HTTPStatus.OK, (0, size)
            picked = _byte_range(self.headers.get("Range", ""), size)
            if picked is not None:
                status, (start, stop) = HTTPStatus.PARTIAL_CONTENT, picked
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                if start >= stop:
                    refused = {"Content-Range": f"bytes */{size}"}
                    self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, refused)
                    return
            self._head(status, stop - start, headers)
            if with_body:
                file.seek(start)
                self._copy(file, stop - start)

    def _find(self, path: str) -> Path | None:
        """The file that an address names, if it lies in the folder, links followed."""
        prefix, root = self.server.prefix, self.server.root
        if not secrets.compare_digest(path[: len(prefix)].encode(), prefix.encode()):
            return None
        parts = [unquote(part) for part in path[len(prefix) :].split("/")]
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            return None
        try:
            found = root.joinpath(*parts).resolve()
            return found if found.is_relative_to(root) and found.is_file() else None
        except (OSError, RuntimeError):  # names that are too long, links in a circle
            return None

    def _head(
        self, status: HTTPStatus, n_bytes: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        common = {
            "Content-Length": str(n_bytes),
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in (common | _CORS | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _copy(self, file: Any, n_bytes: int) -> None:
        while n_bytes > 0:
            piece = file.read(min(n_bytes, 2**20))
            if not piece:  # the file was cut short meanwhile: what was promised cannot be kept
                self.close_connection = True
                return
            self.wfile.write(piece)
            n_bytes -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        # The address has the word that opens everything: only what was answered is logged.
        log.debug("answered %s", args[1] if len(args) > 1 else format)


def _byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Half-open bounds of the bytes that are asked for, empty if there are none such.

    None if all are wanted: a header that does not name one range of bytes may be ignored.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size
