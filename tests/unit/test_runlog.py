"""What a run leaves: a log in JSON lines and a folder."""

import importlib.util
import json
import logging
import stat

import pytest

from builders import write_explicit_search
from ocelot_em import merge
from ocelot_em.cli import main as cli
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.yaml_file import read_yaml
from ocelot_em.run.runlog import RunLog
from report_pages import stub_rendering


@pytest.fixture
def search(tmp_path):
    return write_explicit_search(tmp_path / "RUN.zarr", (40, 50), n_partials=2)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_has_a_line_for_every_tile_with_phases_seconds_and_bytes(search, tmp_path):
    with RunLog(tmp_path / "deep" / "log.jsonl") as log:
        merge(search, tmp_path / "OUT.zarr", tile_size=16, observer=log)
    found = lines(tmp_path / "deep" / "log.jsonl")
    # The first merge after an installation compiles.
    kinds = [line["event"] for line in found if "compil" not in line["event"]]
    assert kinds == ["planned", "locked", "started", *["tile"] * 12, "merged", "ended"]
    assert {line["run"] for line in found} == {log.run_id}
    tiles = [line for line in found if line["event"] == "tile"]
    assert sorted(line["tile"] for line in tiles) == [[y, x] for y in range(3) for x in range(4)]
    for line in tiles:
        assert line["state"] == "merged"
        assert set(line["seconds"]) == {"read", "fold", "write", "waited"}
        assert all(nbytes > 0 for nbytes in line["bytes"].values())
        assert ":" in line["worker"]
    assert sum(line["bytes"]["decoded"] for line in tiles) == found[-2]["totals"]["decoded_nbytes"]


def test_lines_are_appended_and_warnings_are_in_it(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path / "log.jsonl"):
            logging.getLogger("ocelot_em.x").warning("take %s", "care")
            logging.getLogger("distributed.x").info("nothing")
    found = lines(tmp_path / "log.jsonl")
    assert [line["text"] for line in found] == ["take care", ""] * 2
    assert len({line["run"] for line in found}) == 2
    assert found[0]["level"] == "warning"
    assert logging.getLogger().handlers == [
        handler for handler in logging.getLogger().handlers if "runlog" not in repr(handler)
    ]


def test_a_log_that_cannot_be_written_is_refused_before_anything_starts(search, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="cannot be written"):
        RunLog(tmp_path / "file" / "log.jsonl").__enter__()
    options = ["--log", str(tmp_path / "file" / "log.jsonl")]
    assert cli.run(["merge", str(search), "--output", str(tmp_path / "OUT.zarr"), *options]) == 2
    assert not (tmp_path / "OUT.zarr").exists()


def test_failed_tiles_are_in_the_log_with_their_reason(search, tmp_path):
    (search / "partials" / "gpu1" / "mip" / "c" / "0" / "0").write_bytes(b"torn")
    arguments = ["merge", str(search), "--output", str(tmp_path / "OUT.zarr"), "--tile-size", "16"]
    assert cli.run([*arguments, "--log", str(tmp_path / "log.jsonl")]) == 1
    found = lines(tmp_path / "log.jsonl")
    failed = [line for line in found if line["event"] == "tile" and line["state"] == "failed"]
    # Once, and once more when all others were done.
    assert len(failed) == 24
    assert all("is corrupt" in line["error"] for line in failed)
    assert found[-1]["event"] == "ended"
    assert found[-1]["state"] == "TilesFailedError"


def test_a_run_folder_holds_all_that_a_run_leaves(search, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "night"
    arguments = ["merge", str(search), "--output", str(tmp_path / "OUT.zarr"), "--tile-size", "16"]
    assert cli.run([*arguments, "--run-folder", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    pages = {"performance.html", "report.html"}
    assert names == {"config.yaml", "versions.json", "log.jsonl", "statistics.json", *pages}
    assert read_yaml(folder / "config.yaml", "configuration")["tile-size"] == 16
    versions = json.loads((folder / "versions.json").read_text())
    assert {"python", "ocelot-em", "dask", "zarr"} <= set(versions)
    assert json.loads((folder / "statistics.json").read_text())["valid_pixels"] == 2000
    for page in pages:
        text = (folder / page).read_text()
        assert "cdn.bokeh.org" not in text  # it opens without a network
        assert "<script src=" not in text
    # The same again from its configuration: all is done, and the log goes on.
    assert cli.run(["merge", "--config", str(folder / "config.yaml")]) == 0
    assert [line["event"] for line in lines(folder / "log.jsonl")].count("planned") == 2


def test_files_are_for_whom_the_umask_says(search, tmp_path, monkeypatch):
    import os

    stub_rendering(monkeypatch)

    old = os.umask(0o077)
    try:
        arguments = ["merge", str(search), "--output", str(tmp_path / "OUT.zarr")]
        assert cli.run([*arguments, "--run-folder", str(tmp_path / "night")]) == 0
    finally:
        os.umask(old)
    made = [tmp_path / "OUT.zarr", tmp_path / "night"]
    for path in [*made, *(inner for outer in made for inner in outer.rglob("*"))]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_reports_are_written_without_bokeh_as_far_as_possible(
    search, tmp_path, monkeypatch, caplog
):
    found = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name == "bokeh" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    stub_rendering(monkeypatch)
    arguments = ["merge", str(search), "--output", str(tmp_path / "OUT.zarr")]
    assert cli.run([*arguments, "--run-folder", str(tmp_path / "night")]) == 0
    assert not (tmp_path / "night" / "performance.html").exists()
    assert "no performance report" in caplog.text
