"""The viewer: HTTP features that browsers need, local access only, files of the folder only."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from ocelot_em import MergedResult, Simulation, find_peaks, merge, simulate
from ocelot_em.cli.exit_codes import DONE
from ocelot_em.cli.main import run
from ocelot_em.errors import FormatError, InvalidInputError, OutputExistsError, StorageError
from ocelot_em.io.napari import write_napari_csv
from ocelot_em.view.scene import FITTING_PX, MAGMA
from ocelot_em.view.viewer import PUBLIC_CLIENT, view

CHUNK = bytes(range(256)) * 4


def make_picture(folder, channels=("scaled_mip",), unit="angstrom"):
    """Write the parts of an image that the server reads."""
    ome = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "y", "type": "space", "unit": unit},
                    {"name": "x", "type": "space", "unit": unit},
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [{"type": "scale", "scale": [1, 2, 2.5]}],
                    }
                ],
            }
        ],
        "omero": {
            "channels": [
                {"label": name, "window": {"start": 4.5 + k, "end": 9.25, "min": 3, "max": 10}}
                for k, name in enumerate(channels)
            ]
        },
    }
    (folder / "0" / "c" / "0").mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps({"attributes": {"ome": ome}}))
    (folder / "0" / "c" / "0" / "0").write_bytes(CHUNK)
    (folder / "0" / "zarr.json").write_text(json.dumps({"shape": [len(channels), 1600, 1200]}))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image, next to a file that must not be served; tests only add files."""
    place = tmp_path_factory.mktemp("pictures")
    (place / "secret.txt").write_text("secret")
    return make_picture(place / "P.zarr")


@pytest.fixture
def no_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "neuroglancer", None)


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A stub of the package neuroglancer, which has a page."""
    folder = tmp_path / "site" / "neuroglancer" / "static" / "client"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("<title>neuroglancer</title>")
    (folder / "main.js").write_text("1")
    (folder.parents[1] / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "neuroglancer", raising=False)


@pytest.fixture(scope="module")
def served(picture):
    """Opened once: a server takes a tenth of a second to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "neuroglancer", None)
        opened = view(picture)
    with opened:
        yield opened


def get(url, method="GET", **headers):
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, dict(answer.headers), answer.read()


def status_of(url, method="GET", **headers):
    try:
        return get(url, method, **headers)[0]
    except urllib.error.HTTPError as error:
        with error:
            return error.code if error.read() == b"" else None


def raw_status(url, path):
    """Status of a URL path that urllib would normalise."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.read() == b"" or answer.status < 300
        return answer.status
    finally:
        connection.close()


def test_files_are_served_with_what_browsers_need(served):
    status, headers, body = get(served.url + "picture/0/c/0/0")
    assert (status, body) == (200, CHUNK)
    assert headers["Content-Length"] == "1024"
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert headers["Accept-Ranges"] == "bytes"
    _, headers, body = get(served.url + "picture/zarr.json")
    assert headers["Content-Type"] == "application/json"
    assert "ome" in json.loads(body)["attributes"]
    assert get(served.url + "picture/zarr.json?cached=no")[0] == 200


def test_head_and_preflight_responses_have_no_body(served):
    status, headers, body = get(served.url + "picture/0/c/0/0", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "1024")
    status, headers, body = get(
        served.url + "picture/0/c/0/0", "OPTIONS", Origin="https://example.org"
    )
    assert (status, body) == (204, b"")
    assert headers["Access-Control-Allow-Headers"] == "Range"
    assert headers["Access-Control-Allow-Private-Network"] == "true"
    assert "GET" in headers["Access-Control-Allow-Methods"]


@pytest.mark.parametrize(
    ("requested", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=1000-", 1000, 1023),
        ("bytes=-24", 1000, 1023),
        ("bytes=1000-5000", 1000, 1023),
        ("bytes=0-", 0, 1023),
        ("bytes=-9999", 0, 1023),
    ],
)
def test_ranges_of_bytes_are_served(served, requested, first, last):
    status, headers, body = get(served.url + "picture/0/c/0/0", Range=requested)
    assert status == 206
    assert body == CHUNK[first : last + 1]
    assert headers["Content-Range"] == f"bytes {first}-{last}/1024"
    assert headers["Content-Length"] == str(last - first + 1)
    status, _, body = get(served.url + "picture/0/c/0/0", "HEAD", Range=requested)
    assert (status, body) == (206, b"")


@pytest.mark.parametrize("requested", ["bytes=1024-", "bytes=5-4", "bytes=-0"])
def test_ranges_outside_the_file_are_refused(served, requested):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(served.url + "picture/0/c/0/0", Range=requested)
    with caught.value as error:
        assert error.code == 416
        assert error.headers["Content-Range"] == "bytes */1024"


@pytest.mark.parametrize("requested", ["bytes=0-1,5-6", "lines=0-1", "bytes=-"])
def test_unsupported_ranges_return_the_whole_file(served, requested):
    status, _, body = get(served.url + "picture/0/c/0/0", Range=requested)
    assert (status, body) == (200, CHUNK)


def test_an_empty_file_is_served(served, picture):
    (picture / "empty").touch()
    assert get(served.url + "picture/empty")[::2] == (200, b"")
    assert status_of(served.url + "picture/empty", Range="bytes=0-") == 416


def test_there_is_no_way_out_of_the_folder(served, picture):
    prefix = urlsplit(served.url).path + "picture/"
    (picture / "link").symlink_to(picture.parent / "secret.txt")
    (picture / "up").symlink_to(picture.parent)
    (picture / "circle").symlink_to(picture / "circle")
    (picture / "inside").symlink_to(picture / "0")
    os.mkfifo(picture / "pipe")
    for name in (
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "0/../../secret.txt",
        "./zarr.json",
        "/zarr.json",
        "0//c/0/0",
        f"%2F{picture.parent}/secret.txt",
        str(picture.parent / "secret.txt"),
        "link",
        "up/secret.txt",
        "circle",
        "pipe",
        "zarr.json%00.txt",
        "n" * 5000,
        "nothing",
        "%ff%fe",
    ):
        assert raw_status(served.url, prefix + name) == 404, name
    assert raw_status(served.url, prefix + "inside/c/0/0") == 200


def test_folders_are_not_listed(served):
    for name in ("picture", "picture/", "picture/0", "picture/0/", "picture/0/c", "client/"):
        assert status_of(served.url + name) == 404


def test_files_that_cannot_be_opened_are_not_there(served, picture, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert status_of(served.url + "picture/zarr.json") == 404


def test_requests_without_the_token_are_refused(served, picture, no_client):
    base = "http://" + urlsplit(served.url).netloc
    for path in ("/", "/v/", "/zarr.json", "/v/picture/zarr.json", "/events/", "/P.zarr/zarr.json"):
        assert status_of(base + path) == 404
    with view(picture) as other:
        assert urlsplit(other.url).path != urlsplit(served.url).path
        wrong = urlsplit(other.url).path + "picture/zarr.json"
        assert status_of(base + wrong) == 404


def test_the_server_listens_locally(served):
    assert urlsplit(served.url).hostname == "127.0.0.1"
    assert served.socket.getsockname()[0] == "127.0.0.1"


def test_a_closed_view_does_not_respond(picture, no_client):
    with view(picture) as opened:
        url = opened.url
        assert status_of(url + "picture/zarr.json") == 200
    with pytest.raises(urllib.error.URLError):
        get(url + "picture/zarr.json")
    opened.wait()  # returns


def test_a_port_can_be_chosen_and_may_be_taken(picture, no_client):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StorageError, match=rf"cannot listen at 127\.0\.0\.1:{port}"):
            view(picture, port)
    with view(picture, port) as opened:
        assert urlsplit(opened.url).port == port
    for port in (-1, 65536):
        with pytest.raises(InvalidInputError, match="expected 0 to 65535"):
            view(picture, port)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"attributes": {}}', '{"attributes": {"ome": 1}}']
)
def test_other_folders_are_refused(tmp_path, content):
    folder = tmp_path / "F"
    folder.mkdir()
    if content is not None:
        (folder / "zarr.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"a folder with an OME-Zarr 0\.5 image"):
        view(folder)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="got a file"):
        view(tmp_path / "file")
    with pytest.raises(InvalidInputError, match="got nothing there"):
        view(tmp_path / "NOTHING")


def state_of(shown):
    """Where the short link leads, and the state that this page reads."""
    connection = HTTPConnection(urlsplit(shown.url).netloc, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", urlsplit(shown.url).path)
        answer = connection.getresponse()
        assert answer.status == 302
        page, _, state = answer.headers["Location"].partition("#!")
    return page, json.loads(get(state)[2])


def test_the_link_opens_the_picture_with_its_contrast(served):
    page, state = state_of(served)
    assert page == PUBLIC_CLIENT
    assert not served.is_offline
    assert len(served.url) < 60
    assert state["layout"] == "xy"
    assert list(state["dimensions"]) == ["x", "y"]  # to the right and down
    assert state["dimensions"]["x"] == [pytest.approx(2.5e-10), "m"]
    assert state["crossSectionScale"] == pytest.approx(1600 / FITTING_PX)
    (layer,) = state["layers"]
    assert layer["source"] == f"zarr3://{served.url}picture/"
    assert layer["name"] == "scaled_mip"
    assert layer["shaderControls"]["normalized"]["range"] == [4.5, 9.25]
    assert "{" not in layer["source"]


def test_another_machine_gets_the_same_link_through_one_port(served):
    port = urlsplit(served.url).port
    assert f"ssh -NL {port}:127.0.0.1:{port} " in served.ssh_command
    assert served.ssh_command.endswith(f"@{socket.gethostname()}")


def test_the_colours_are_those_of_magma(served):
    matplotlib = pytest.importorskip("matplotlib")
    t = np.linspace(0, 1, 101)
    colours = sum(np.outer(t**n, c) for n, c in enumerate(MAGMA))
    assert np.abs(colours - matplotlib.colormaps["magma"](t)[:, :3]).max() < 0.03
    shader = state_of(served)[1]["layers"][0]["shader"]
    assert all(f"vec3{coefficients}" in shader for coefficients in MAGMA)


def test_every_map_is_a_layer_and_the_first_is_shown(tmp_path, no_client):
    with view(make_picture(tmp_path / "P.zarr", ("scaled_mip", "mip"))) as opened:
        _, state = state_of(opened)
    names = [(layer["name"], layer["visible"]) for layer in state["layers"]]
    assert names == [("scaled_mip", True), ("mip", False)]
    assert [layer["localPosition"] for layer in state["layers"]] == [[0], [1]]
    ranges = [layer["shaderControls"]["normalized"]["range"] for layer in state["layers"]]
    assert ranges == [[4.5, 9.25], [5.5, 9.25]]


def test_images_without_contrast_limits_are_shown(tmp_path, no_client):
    with view(make_picture(tmp_path / "P.zarr", ())) as opened:
        _, state = state_of(opened)
    assert [layer["name"] for layer in state["layers"]] == ["P.zarr"]


def test_an_unknown_pixel_size_is_counted_in_pixels(tmp_path, no_client):
    with view(make_picture(tmp_path / "P.zarr", unit=None)) as opened:
        _, state = state_of(opened)
    assert state["dimensions"] == {"x": [2.5, ""], "y": [2, ""]}


def test_maps_can_be_chosen(tmp_path, no_client):
    picture = make_picture(tmp_path / "P.zarr", ("scaled_mip", "mip", "correlation_mean"))
    with view(picture, maps=("correlation_mean", "scaled_mip")) as opened:
        layers = state_of(opened)[1]["layers"]
    shown = [(layer["name"], layer["localPosition"], layer["visible"]) for layer in layers]
    assert shown == [("correlation_mean", [2], True), ("scaled_mip", [0], False)]
    with pytest.raises(InvalidInputError, match=r"scaled_mip, mip, correlation_mean; got psi"):
        view(picture, maps=("psi",))


def test_an_installed_client_is_served_at_the_same_port(picture, client):
    with view(picture) as opened:
        page, state = state_of(opened)
        assert page == f"{opened.url}client/index.html"
        assert opened.is_offline
        assert state["layers"][0]["source"] == f"zarr3://{opened.url}picture/"
        _, headers, body = get(page)
        assert (headers["Content-Type"], body) == ("text/html", b"<title>neuroglancer</title>")
        assert get(f"{opened.url}client/main.js")[1]["Content-Type"] == "text/javascript"
        assert status_of(f"{opened.url}client/../__init__.py") == 404


def test_the_page_stays_connected_until_the_view_is_closed(picture, client):
    opened = view(picture)
    events = opened.url.replace("/v/", "/events/").rstrip("/")
    with opened, urllib.request.urlopen(events, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        opened.close()
        assert answer.read() == b""
    assert status_of_closed(events)


def status_of_closed(url):
    with pytest.raises(urllib.error.URLError):
        get(url)
    return True


def test_the_real_client_comes_from_this_machine(picture):
    pytest.importorskip("neuroglancer", reason="the extra 'view' is not installed")
    with view(picture) as opened:
        page, _ = state_of(opened)
        assert page.startswith(opened.url)
        assert b"<title>neuroglancer</title>" in get(page)[2]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    place = tmp_path_factory.mktemp("merged")
    search = simulate(place, Simulation(shape=(180, 200), n_partials=2, n_particles=6, seed=3))
    merge(search, place / "MERGED.zarr")
    return MergedResult.open(place / "MERGED.zarr")


def test_a_result_is_shown_with_its_particles(merged, no_client):
    particles = find_peaks(merged)
    with view(merged.url, maps=("mip", "scaled_mip")) as opened:
        folder = opened.folders["picture"]
        _, state = state_of(opened)
        info = json.loads(get(opened.url + "particles/info")[2])
        chunk = get(opened.url + "particles/all/0_0")[2]
        selected = get(opened.url + "particles/by_id/1")[2]
        assert folder.is_dir()
    assert not folder.exists()  # it was written for this view
    assert [layer["name"] for layer in state["layers"]] == ["mip", "scaled_mip", "particles"]
    assert state["layers"][-1]["source"] == f"precomputed://{opened.url}particles/"
    assert info["dimensions"] == state["dimensions"]
    names = [own["id"] for own in info["properties"]]
    n, width = len(particles), 4 * (2 + len(names))
    assert n > 1
    assert int.from_bytes(chunk[:8], "little") == info["spatial"][0]["limit"] == n
    rows = np.frombuffer(chunk[8 : 8 + n * width], "<f4").reshape(n, -1)
    assert np.array_equal(rows[:, :2].T, [particles["pos_x"], particles["pos_y"]])
    assert np.array_equal(rows[:, 2:].T, [particles[name] for name in names])
    assert np.array_equal(np.frombuffer(chunk[8 + n * width :], "<u8"), np.arange(n))
    assert selected == rows[1].tobytes()


def test_a_search_is_merged_first(merged):
    with pytest.raises(FormatError, match="is a search, not a merged result; merge it first"):
        view(Path(merged.url).parent / "RUN.zarr")


def test_particles_of_a_table_are_drawn_over_an_image(picture, merged, no_client):
    particles = find_peaks(merged)
    with view(picture, particles=particles[:2]) as opened:
        assert int.from_bytes(get(opened.url + "particles/all/0_0")[2][:8], "little") == 2
    with view(picture, particles=particles[:0]) as opened:
        assert "particles" not in [layer["name"] for layer in state_of(opened)[1]["layers"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_deletes_its_image_however_it_ends(
    merged, no_client, monkeypatch, capsys, number
):
    folders = []

    def wait(opened):
        folders.append(opened.folders["picture"])
        assert folders[0].is_dir()
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("ocelot_em.view.viewer.View.wait", wait)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # dask-jobqueue has another handler, once another test has imported it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(["view", merged.url, "--map", "mip"]) == DONE
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert not folders[0].exists()
    out = capsys.readouterr().out
    assert re.search(r"open http://127\.0\.0\.1:\d+/v/\S+/\n", out)
    assert "ssh -NL " in out


def test_napari_gets_points_in_the_units_of_the_image(merged, tmp_path):
    particles, size = find_peaks(merged), merged.attributes.pixel_size_angstrom
    path = write_napari_csv(particles, tmp_path / "P.csv", pixel_size_angstrom=size)
    header, first, *rest = path.read_text().splitlines()
    assert header.split(",")[:3] == ["index", "axis-0", "axis-1"]
    assert header.split(",")[3:] == list(particles.columns)
    y, x = (float(value) for value in first.split(",")[1:3])
    assert (y, x) == (size * particles["pos_y"][0], size * particles["pos_x"][0])
    assert len(rest) == len(particles) - 1
    with pytest.raises(OutputExistsError):
        write_napari_csv(particles, path)


def test_nothing_is_printed_and_the_token_is_not_logged(picture, no_client, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    with view(picture) as opened:
        token = urlsplit(opened.url).path.split("/")[2]
        status_of(opened.url + "picture/zarr.json")
        status_of(opened.url + "picture/nothing")
        with socket.create_connection(("127.0.0.1", urlsplit(opened.url).port)) as connection:
            connection.sendall(b"GET /" + b"x" * 100)
        with socket.create_connection(("127.0.0.1", urlsplit(opened.url).port)) as connection:
            connection.sendall(b"\xff\xfe nonsense\r\n\r\n")
            assert b"400" in connection.recv(1000)
    assert capfd.readouterr() == ("", "")
    assert any("serving" in record.message for record in caplog.records)
    assert token not in caplog.text


def test_a_file_cut_short_meanwhile_ends_the_connection(served, picture, monkeypatch):
    class Longer(BytesIO):
        def seek(self, *args):
            return super().seek(*args) if args == (0,) else 2000

    monkeypatch.setattr("pathlib.Path.open", lambda *_: Longer(CHUNK))
    with pytest.raises(Exception, match="IncompleteRead"):
        get(served.url + "picture/0/c/0/0")
