"""Who may reach a cluster, and what must never be written down."""

import os
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import dask
import psutil
import pytest

from builders import write_explicit_search
from ocelot_em import import_results, merge
from ocelot_em.cli import main as cli
from ocelot_em.errors import InvalidInputError, PlanError
from ocelot_em.model.options import MergeOptions
from ocelot_em.run import security
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.observer import Observer
from ocelot_em.store import objects

SECRET = "dont-tell"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/RUN.zarr",
        f"https://me:{SECRET}@host/RUN.zarr",
        f"https://host/RUN.zarr?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/RUN.zarr?sv=2024&sig={SECRET}",
        f"https://host/RUN.zarr?access_token={SECRET}",
        f"gs://bucket/RUN.zarr?secret={SECRET}",
        f"s3://bucket/RUN.zarr?apikey={SECRET}",
        f"s3://bucket/RUN.zarr?region=x;x-api-key={SECRET}",
        f"s3://bucket/RUN.zarr?key={SECRET}",
        f"s3://bucket/RUN.zarr?%70assw%64={SECRET}",
        f"s3://bucket/RUN.zarr?pwd={SECRET}",
        f"s3://bucket/RUN.zarr?Authorization={SECRET}",
        f"s3://bucket/RUN.zarr?GoogleAccessId={SECRET}",
        f"s3://bucket/RUN.zarr#session={SECRET}",
        f"memory://{SECRET}@x",
        f"http://{SECRET}@[broken/RUN.zarr",
    ],
)
def test_urls_with_credentials_are_refused_without_repeating_them(url, tmp_path, capsys):
    with pytest.raises(InvalidInputError, match=r"in the environment|is invalid") as error:
        objects.normalise_url(url)
    assert SECRET not in str(error.value)
    assert cli.run(["merge", url, "--output", str(tmp_path / "O"), "--log", "-"]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert not (tmp_path / "O").exists()


@pytest.mark.parametrize("url", ["https://host/design/RUN.zarr", "s3://bucket/a?versionId=3"])
def test_other_urls_are_taken(url):
    assert objects.normalise_url(url) == url
    assert objects.normalise_url(Path(url)) == url


def test_credentials_are_neither_printed_nor_stored_by_any_command(tmp_path, capsys):
    """Also where no URL belongs."""
    url, output = f"s3://key:{SECRET}@bucket/x", str(tmp_path / "O")
    kept = ["--run-folder", str(tmp_path / "night"), "--log", str(tmp_path / "log.jsonl")]
    for words in (
        ["merge", url, "--output", output, *kept],
        ["merge", "x", "--output", url, *kept],
        ["merge", "x", "--output", output, "--run-folder", url],
        ["merge", "x", "--output", output, "--origins", url, *kept],
        ["import", url, "--output", output],
        ["import", "x", "--output", output, "--search-space", url],
        ["info", url],
        ["check", url],
        ["report", url, "--output", output],
        ["peaks", "x", "--output", url],
        ["export", "x", "--to", "leopard", "--output", output, "--optics", url],
    ):
        assert cli.run(words) == 2, words
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err, words
        assert "carries credentials" in printed.err, words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["inputs", "output"])
def test_credentials_in_a_file_of_options_are_not_repeated(tmp_path, capsys, place):
    url = f"s3://key:{SECRET}@bucket/x"
    config = tmp_path / "config.yaml"
    config.write_text(f"inputs: ['{url}']" if place == "inputs" else f"output: {url}")
    kept = ["--run-folder", str(tmp_path / "night"), "--log", str(tmp_path / "log.jsonl")]
    words = ["x"] if place == "output" else ["--output", "y"]
    assert cli.run(["merge", *words, "--config", str(config), *kept]) == 2
    printed = capsys.readouterr()
    assert "carries credentials" in printed.err
    assert SECRET not in printed.out + printed.err
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_address_of_a_web_server_gets_one_sentence(scheme, tmp_path, capsys):
    url = f"{scheme}://example.org/RUN.zarr"
    assert cli.run(["merge", url, "--output", str(tmp_path / "O")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(
        f"ocelot: {url}: expected a path, or the URL of a bucket, got that of a"
    )
    assert printed.count("\n") == 1
    for name in ["gpu0.npz", "LAMELLA.yaml", "result.h5"]:
        assert cli.run(["import", f"{scheme}://example.org/{name}", "--output", "O"]) == 2
        printed = capsys.readouterr().err
        assert (
            f"{scheme}://example.org/{name}: expected a path on this machine, got a URL" in printed
        )
        assert printed.count("\n") == 1


def test_a_path_with_a_nul_character_gets_one_sentence(tmp_path, capsys):
    with pytest.raises(InvalidInputError, match=r"x\\x00y: expected a path, got a text with a NUL"):
        merge("x\0y", tmp_path / "O")
    with pytest.raises(InvalidInputError, match="with a NUL character"):
        merge(Path("x\0y"), tmp_path / "O")
    with pytest.raises(InvalidInputError, match="with a NUL character"):
        import_results(["x\0y.npz"], tmp_path / "O")
    config = tmp_path / "config.yaml"
    config.write_text('output: "a\\0b"')
    assert cli.run(["merge", "x", "--config", str(config)]) == 2
    assert "expected a path, got a text with a NUL character" in capsys.readouterr().err


GUARDED = """
import sys
from ocelot_em import merge

def main():
    print(merge(sys.argv[1], sys.argv[2], cluster="local", workers=1, threads=1).n_merged)

{guard}main()
"""


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__':\n    "])
def test_a_script_without_its_main_guard_is_refused_before_anything_starts(tmp_path, guard):
    search = write_explicit_search(tmp_path / "RUN.zarr", (40, 50))
    script = tmp_path / "script.py"
    script.write_text(GUARDED.format(guard=guard))
    done = subprocess.run(
        [sys.executable, script, search, tmp_path / "OUT.zarr"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if guard:
        assert (done.returncode, done.stdout) == (0, "1\n")
    else:
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ocelot_em.errors.PlanError: {script}: line 8: cluster 'local'")
        assert last.endswith("put what it does below: if __name__ == '__main__':")
        assert done.stderr.count("Traceback") == 1
        assert not (tmp_path / "OUT.zarr").exists()


def test_nothing_of_the_environment_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    search = write_explicit_search(tmp_path / "RUN.zarr", (40, 50))
    arguments = ["merge", str(search), "--output", str(tmp_path / "OUT.zarr")]
    assert cli.run([*arguments, "--run-folder", str(tmp_path / "night")]) == 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("address", "is_open"),
    [
        ("tcp://127.0.0.1:8786", False),
        ("tcp://localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tls://10.0.0.3:8786", False),
        ("tcp://10.0.0.3:8786", True),
        ("tcp://head-node:8786", True),
        ("ucx://10.0.0.3:8786", True),
    ],
)
def test_a_scheduler_that_everybody_can_reach_is_warned_of(address, is_open, caplog):
    security.warn_if_open(address)
    assert ("anyone who can reach it can run code as you" in caplog.text) == is_open


def listening():
    """Addresses at which this process, or one that it started, waits for connections."""
    me = psutil.Process()
    return {
        connection.laddr
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


class Looks(Observer):
    """Looks at what listens, and asks for metrics, while a cluster lives."""

    def __init__(self):
        self.listening, self.metrics, self.scheduler = [], "", ""
        self.before = listening()  # what other tests of this process have left is none of its

    def started(self, cluster):
        self.client, self.dashboard = cluster.executor.client, cluster.dashboard
        self.scheduler = self.client.scheduler.address

    def ending(self):
        self.listening = [address.ip for address in listening() - self.before]
        self.page, self.status, self.metrics = (
            urllib.request.urlopen(f"{self.dashboard.removesuffix('ocelot')}{page}").read().decode()
            for page in ("ocelot", "status", "metrics")
        )


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_local_cluster_listens_to_this_machine_alone_and_tells_its_metrics(tmp_path, tls):
    search = write_explicit_search(tmp_path / "RUN.zarr", (40, 50))
    looks = Looks()
    report = merge(
        *(search, tmp_path / "OUT.zarr"),
        **{"tile_size": 16, "cluster": "local", "workers": 2, "tls": tls, "observer": looks},
    )
    assert looks.scheduler.startswith("tls://" if tls else "tcp://")
    assert len(looks.listening) >= 4
    assert set(looks.listening) == {"127.0.0.1"}
    assert "bokeh" in looks.page
    assert 'href="ocelot"' in looks.status
    printed = [line for line in looks.metrics.splitlines() if line.startswith("ocelot_")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in printed}
    # The scheduler is in this process, and may have had other runs.
    folding = 'ocelot_seconds_total{phase="fold",run="'
    seconds = pytest.approx(report.totals.fold_seconds)
    (label,) = (
        line.removeprefix(folding).removesuffix('"}')
        for line, value in values.items()
        if line.startswith(folding) and value == seconds
    )
    assert values[f'ocelot_planned_tiles{{run="{label}"}}'] == 12
    assert values[f'ocelot_done_tiles{{run="{label}"}}'] == 12
    assert values[f'ocelot_tiles_total{{run="{label}",state="merged"}}'] == 12
    decoded = values[f'ocelot_bytes_total{{kind="decoded",run="{label}"}}']
    assert decoded == report.totals.decoded_nbytes


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_link_to_a_dashboard_names_the_host_that_it_listens_on(host):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, host="0.0.0.0", dashboard_address=f"{host}:0") as scheduler,
        open_cluster(MergeOptions(cluster=scheduler.scheduler_address, device="cpu")) as cluster,
    ):
        assert scheduler.dashboard_link is not None
        if host == "127.0.0.1":
            assert cluster.dashboard.startswith("http://127.0.0.1:")
        else:
            assert cluster.dashboard == scheduler.dashboard_link


def test_tls_needs_an_address_with_tls(tmp_path):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        pytest.raises(PlanError, match="an address that starts with tls://"),
        open_cluster(MergeOptions(cluster=cluster.scheduler_address, tls=True, device="cpu")),
    ):
        pass


def test_credentials_that_are_shared_are_for_this_user_alone(tmp_path):
    folder = tmp_path / "tls"
    old = os.umask(0)
    try:
        made = security.share_certificates(folder, creates=True)
    finally:
        os.umask(old)
    assert security.share_certificates(folder, creates=False) == made
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    with dask.config.set(made):
        assert security.configured_security() is not None
        assert security.share_certificates(folder, creates=True) == {}
    security.remove_certificates(folder)
    assert not folder.exists()


def test_credentials_that_do_not_come_are_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(security, "CERTIFICATES_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(PlanError, match="all tasks of a job need access"):
        security.share_certificates(tmp_path / "tls", creates=False)


def test_containers_run_as_a_user():
    text = (Path(__file__).parents[2] / "docker" / "Dockerfile").read_text()
    stages = text.split("\nFROM ")[1:]
    names = {stage.split()[2]: stage for stage in stages if " AS " in stage.splitlines()[0]}
    for target in ("cpu", "cuda"):
        lines = names[target].splitlines()
        assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
        assert lines.index("USER 1000:1000") < lines.index('ENTRYPOINT ["ocelot"]')


def test_importing_the_package_starts_and_changes_nothing():
    code = (
        "import signal, logging, os; before = dict(os.environ), signal.getsignal(signal.SIGINT); "
        "import ocelot_em, ocelot_em.cli.main, ocelot_em.run.slurm, ocelot_em.run.security; "
        "assert before == (dict(os.environ), signal.getsignal(signal.SIGINT))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
