"""Serve an image to a browser on this machine, with a link that opens it in neuroglancer.

The server listens on 127.0.0.1 only, and every URL begins with a random token, so that neither
other users nor other web sites can read the image. Files outside its folder cannot be reached.
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
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ocelot_em.errors import InvalidInputError, StorageError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PUBLIC_CLIENT = "https://neuroglancer-demo.appspot.com/"
"""URL of neuroglancer if the package is not installed; needs a network."""

FITTING_PX = 800
"""Screen pixels of the longest edge of an image when it is opened."""

IDLE_SECONDS = 60
"""Timeout of an idle connection, in seconds."""

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
    """A served folder; as a context manager, it stops serving on exit.

    ``is_offline`` states whether the link to neuroglancer works without a network, because it is
    served locally, too.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, root: Path, port: int, state: dict[str, Any]) -> None:
        self.root, self.prefix = root, f"/{secrets.token_urlsafe(16)}/"
        super().__init__((HOST, port), _Handler)
        self.url = f"http://{HOST}:{self.server_address[1]}{self.prefix}"
        for layer in state["layers"]:
            layer["source"] = f"zarr3://{self.url}"
        page, self._client = _own_client() or (PUBLIC_CLIENT, None)
        self.neuroglancer_url = f"{page}#!{quote(json.dumps(state), safe='')}"
        self.is_offline = self._client is not None
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.1,), name="ocelot-view", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is closed or interrupted."""
        while self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """Stop serving the folder; neuroglancer's own server keeps running with nothing to show."""
        self._client = None
        self.shutdown()
        self._thread.join()
        self.server_close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what the base class would print; mostly closed connections."""
        log.debug("request of %s failed", client_address, exc_info=True)


def view(path: str | PathLike[str], port: int = 0) -> View:
    """Serve an OME-Zarr image on this machine until the view is closed or the process ends.

    ``port`` is on 127.0.0.1; 0 takes any free port. If the package neuroglancer is installed (extra
    ``view``), the viewer is served from this machine, too, and no network is needed.
    """
    folder = Path(path)
    state = _neuroglancer_state(folder)
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"port: expected 0 to 65535, got {port}")
    try:
        served = View(folder.resolve(), port, state)
    except OSError as error:
        raise StorageError(
            f"cannot listen at {HOST}:{port}: {error.strerror or error}; choose another port, or 0 "
            "for any free port"
        ) from error
    log.info("serving %s at %s:%d", folder, HOST, served.server_address[1])
    return served


def _neuroglancer_state(folder: Path) -> dict[str, Any]:
    """Return the state of neuroglancer: one layer per map of the image, the first visible."""
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
            f"{folder}: expected a folder with an OME-Zarr 0.5 image, got something else "
            f"({type(error).__name__}: {error}); write one with ocelot export --to ome-zarr"
        ) from error
    return state


def _dimensions(multiscale: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return pixel sizes, x first because neuroglancer draws the first axis to the right."""
    axes = {axis["name"]: axis.get("unit") for axis in multiscale["axes"]}
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    sizes = dict(zip(axes, scale, strict=True))
    return {
        name: (sizes[name] * 1e-10, "m") if axes[name] == "angstrom" else (sizes[name], "")
        for name in ("x", "y")
    }


def _own_client() -> tuple[str, object] | None:
    """Return the URL of a local neuroglancer, and the object that keeps it; None if missing."""
    try:
        import neuroglancer
    except ImportError:
        return None
    if not neuroglancer.is_server_running():
        neuroglancer.set_server_bind_address(HOST)
    client = neuroglancer.UnsynchronizedViewer()
    return client.get_viewer_url().partition("#!")[0], client


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
        opened = self._open(urlsplit(self.path).path)
        if opened is None:
            self._head(HTTPStatus.NOT_FOUND, 0)
            return
        with opened as file:
            size = os.fstat(file.fileno()).st_size
            kind = "json" if file.name.endswith(".json") else "octet-stream"
            headers, status = {"Content-Type": f"application/{kind}"}, HTTPStatus.OK
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

    def _open(self, path: str) -> BufferedReader | None:
        """Open the file of a URL path if it is in the folder, with links resolved."""
        prefix, root = self.server.prefix, self.server.root
        if not secrets.compare_digest(path[: len(prefix)].encode(), prefix.encode()):
            return None
        parts = [unquote(part) for part in path[len(prefix) :].split("/")]
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
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

    def _copy(self, file: BufferedReader, n_bytes: int) -> None:
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
