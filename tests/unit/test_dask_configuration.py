"""Worker jobs of SLURM: values in Dask's configuration, and jobs that sbatch rejects."""

import threading
import time
from pathlib import Path

import dask
import pytest
import yaml

from ocelot_em.errors import PlanError
from ocelot_em.merge.job import JobSpec
from ocelot_em.model.options import MergeOptions, SlurmJobs
from ocelot_em.run import clusters, executors, slurm

pytest.importorskip("dask_jobqueue")


def configured(text):
    values = yaml.safe_load(text)
    return dask.config.set({f"jobqueue.slurm.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("walltime: 1:30:00", "walltime: expected a text such as '01:30:00', in quotes, got 5400"),
        ("walltime: 1.5", "walltime: expected a text such as"),
        ("walltime: soon", "walltime: expected a text such as"),
        ("cores: many", "cores: expected a whole number, got 'many'"),
        ("processes: 0", "processes: expected at least 1, got 0"),
        ("memory: [1]", "memory: expected text, got"),
        ("log-directory: 7", "log-directory: expected text, got 7"),
    ],
)
def test_the_key_of_a_value_that_cannot_be_used_is_named(text, problem):
    with configured(text), pytest.raises(PlanError) as error:
        clusters.choose_device(MergeOptions(cluster="slurm"))
    assert str(error.value).startswith(f"Dask's configuration: jobqueue.slurm.{problem}")


def test_values_that_nobody_asks_for_are_ignored():
    text = "{walltime: 5400, cores: many, processes: x, memory: [1], log-directory: 7}"
    given = SlurmJobs(walltime="02:00:00", cores=2, processes=1, memory="3GB", log_directory="logs")
    with configured(text):
        assert slurm.with_defaults(given) == given
        assert clusters.choose_device(MergeOptions(cluster="threads"))[0].kind == "cpu"


def test_numbers_that_can_be_used():
    with configured("{cores: '8', memory: 4000000000, walltime: '90'}"):
        jobs = slurm.with_defaults(SlurmJobs())
    assert (jobs.cores, jobs.memory, jobs.walltime) == (8, "4000000000B", "90")
    assert slurm._seconds("90") == 5400
    assert slurm._seconds("1-12") == 36 * 3600


def test_worker_jobs_write_to_the_run_folder_unless_another_is_set():
    options = MergeOptions(cluster="slurm")

    def log_directory(folder, options):
        return slurm.with_logs_in(Path(folder), options).slurm.log_directory

    assert log_directory("/run/jobs", options) == "/run/jobs"
    assert log_directory("/with space/jobs", options) is None
    assert log_directory("/run", options.model_copy(update={"cluster": "threads"})) is None
    with configured("log-directory: /configured"):
        assert log_directory("/run", options) is None


@pytest.mark.parametrize("key", ["job-script-prologue", "worker-extra-args"])
def test_a_text_in_place_of_a_list_is_not_taken_letter_by_letter(key):
    options = MergeOptions(cluster="slurm")
    with (
        configured(f"{key}: --nanny"),
        pytest.raises(PlanError, match=f"{key}: expected a list of texts, got '--nanny'"),
        slurm.slurm_cluster(options, {}),
    ):
        pass


SBATCH = """\
#!/bin/sh
rm {accepts} 2>/dev/null && echo "Submitted batch job 7" && exit
echo "sbatch: error: invalid partition specified: nosuch" >&2
exit 1
"""


@pytest.mark.parametrize("n_accepted", [0, 1])
def test_a_job_that_sbatch_rejects(tmp_path, monkeypatch, caplog, n_accepted):
    accepts, program = tmp_path / "accepts", tmp_path / "sbatch"
    program.write_text(SBATCH.format(accepts=accepts))
    program.chmod(0o755)
    if n_accepted:
        accepts.touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    jobs = SlurmJobs(partition="nosuch", interface="lo", cores=1, memory="1GB")
    options = MergeOptions(cluster="slurm", workers=2, slurm=jobs)
    if not n_accepted:
        expected = "no worker job can be submitted: invalid partition specified: nosuch; check"
        with pytest.raises(PlanError, match=expected), clusters.open_cluster(options):
            pass
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        return
    stopping = threading.Event()
    with clusters.open_cluster(options) as cluster:
        threading.Timer(0.1, stopping.set).start()
        started = time.monotonic()
        # Nobody runs the tiles that are submitted, so nobody has to be waited for.
        cluster.executor.run(JobSpec("memory://nowhere", "run"), [(0, 0)], pytest.fail, stopping)
        assert time.monotonic() - started < executors.STOP_SECONDS / 2
    assert "rejected, and is submitted again: invalid partition specified: nosuch\n" in caplog.text
