"""Limits of control groups, in folders that look like those of Linux."""

import subprocess
import sys

import pytest

from ocelot_em import merge
from ocelot_em.errors import PlanError
from ocelot_em.model.control_groups import control_groups, memory_nbytes
from ocelot_em.run import api

HUGE = 9223372036854771712
"""What version 1 has where there is no limit."""

V1 = "36 30 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "28 24 0:25 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = "23 28 0:22 / /sys rw - sysfs sysfs rw\n35 30 0:31 / /cpu rw - cgroup cgroup rw,cpu\n"


@pytest.fixture
def machine(tmp_path):
    def build(cgroup, mount, **limits):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        (tmp_path / "proc/self/mountinfo").write_text(OTHERS + mount + "\n")
        for path, limit in limits.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")
        return tmp_path

    return build


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
@pytest.mark.parametrize("place", ["", "slurm/", "slurm/job_7/", "slurm/job_7/step_0/"])
def test_the_smallest_limit_up_the_tree_counts(machine, place, name):
    """Of these folders, Dask looks at the first only."""
    every = {
        f"sys/fs/cgroup/{folder}memory.max": "max" for folder in ("slurm/", "slurm/job_7/step_0/")
    }
    limits = every | {f"sys/fs/cgroup/{place}{name}": 10**7, "sys/fs/cgroup/other/memory.max": 5}
    root = machine("0::/slurm/job_7/step_0\n", V2, **limits)
    assert memory_nbytes(root) == 10**7


def test_the_smallest_of_several_limits_counts(machine):
    limits = {f"sys/fs/cgroup/{folder}memory.max": n for folder, n in (("a/", 7), ("a/b/", 9))}
    assert memory_nbytes(machine("0::/a/b\n", V2, **limits)) == 7


@pytest.mark.parametrize("place", ["", "slurm/", "slurm/job_7/"])
def test_version_1(machine, place):
    at = "sys/fs/cgroup/memory/"
    limits = {f"{at}memory.limit_in_bytes": HUGE, f"{at}{place}memory.limit_in_bytes": 10**7}
    root = machine("5:cpu,memory:/slurm/job_7\n3:pids:/x\n0::/other\n", V1, **limits)
    assert memory_nbytes(root) == 10**7


def test_both_versions(machine):
    """A container in which memory is still of version 1, and the rest of version 2."""
    root = machine(
        "4:memory:/docker/1/x y\n0::/docker/1\n",
        V1.replace(" / /sys", " /docker/1 /sys") + "\n" + V2.replace("/sys/fs/cgroup", "/c"),
        **{"sys/fs/cgroup/memory/x y/memory.limit_in_bytes": 8, "c/memory.max": "max"},
    )
    folders = [f"{folder.relative_to(root)}" for folder in control_groups("memory", root)]
    memory = "sys/fs/cgroup/memory"
    assert folders == [f"{memory}/x y", memory, "c/docker/1", "c/docker", "c"]
    assert memory_nbytes(root) == 8


def test_a_group_outside_of_the_mount_has_the_limits_of_its_top(machine):
    root = machine("0::/../job\n", V2, **{"sys/fs/cgroup/memory.max": 8})
    assert memory_nbytes(root) == 8


def test_spaces_in_mount_points(machine):
    root = machine("0::/\n", V2.replace("/sys/fs/cgroup", r"/c\040g"), **{"c g/memory.max": 8})
    assert memory_nbytes(root) == 8


@pytest.mark.parametrize("cgroup", ["", "nonsense\n1:2\n", "0::/\n"])
def test_without_limits_the_whole_machine(machine, cgroup):
    root = machine(cgroup, V2, **{"sys/fs/cgroup/memory.max": "max"})
    assert memory_nbytes(root) == memory_nbytes(root / "empty") > 2**20


def test_a_limit_of_the_shell_counts():
    code = "from ocelot_em.model.control_groups import memory_nbytes; print(memory_nbytes())"
    limited = ["sh", "-c", f"ulimit -v 1000000; exec {sys.executable} -c '{code}'"]
    shown = subprocess.run(limited, capture_output=True, text=True, check=True).stdout
    assert int(shown) <= 1024 * 10**6


def test_plans_respect_the_limit(monkeypatch, crops_search, tmp_path):
    monkeypatch.setattr(api, "memory_nbytes", lambda: 10**6)
    with pytest.raises(PlanError, match="1,000,000"):
        merge(crops_search, tmp_path / "result.zarr", threads=1)
