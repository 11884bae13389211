"""A SLURM of two nodes on this machine, on loopback, for as long as a test needs it."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = "slurmctld", "slurmd", "munged", "sbatch", "scontrol"

NODES = "n1", "n2"

CONFIGURATION = """\
ClusterName=ocelot
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
MailProg=/bin/true
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=8000
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}]
PartitionName=DEFAULT Nodes=n[1-2] MaxTime=INFINITE State=UP
PartitionName=normal Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent PriorityTier=10 GraceTime=0
"""


def missing() -> list[str]:
    """What a SLURM of one's own lacks here."""
    lacks = [program for program in PROGRAMS if shutil.which(program) is None]
    return lacks if os.geteuid() == 0 else [*lacks, "the rights of root"]


@dataclass(frozen=True)
class Slurm:
    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=cwd, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submit a job; its number."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd)

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-j", job, "-t", "all", "-o", "%T")

    def exit_code(self, job: str) -> str:
        printed = self.call("scontrol", "show", "job", job).split()
        return next(word for word in printed if word.startswith("ExitCode=")).removeprefix(
            "ExitCode="
        )

    def wait(self, job: str, *states: str, seconds: float = 400) -> str:
        """Wait until a job is in one of some states; the time only ends a hang."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}"
            time.sleep(0.2)
        return state

    def finish(self, job: str, seconds: float = 400) -> None:
        """Have a job that was requeued begin at once, not in two minutes; wait for its end."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) != "COMPLETED":
            printed = self.call("scontrol", "show", "job", job)
            assert state in ("PENDING", "RUNNING", "COMPLETING"), printed
            assert time.monotonic() < deadline, printed
            self.hurry(job)
            time.sleep(1)

    def hurry(self, job: str) -> None:
        """Have a job begin at once, should it wait: one that was requeued waits two minutes."""
        if self.state(job) == "PENDING":
            # A node refuses a job within the second in which it ended there.
            time.sleep(2)
            with contextlib.suppress(AssertionError):  # it has begun meanwhile
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start it, and stop it in the end; everything of it is in the folder."""
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    munge = folder / "munge"
    for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    munge.chmod(0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    subprocess.run(["chown", "-R", "munge:munge", str(munge)], check=True)
    port = _free_ports(3)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            control_port=port,
            node_port=port + 1,
            last_port=port + 2,
        )
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = [
        ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground"]
        + [f"--{name}={munge / file}" for name, file in MUNGE_FILES.items()],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-c", "-N", node] for node in NODES),
    ]
    with (folder / "daemons.log").open("w") as log, contextlib.ExitStack() as stack:
        for command in commands:
            daemon = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(daemon.wait, 30)
            stack.callback(daemon.terminate)
            time.sleep(0.5)
        made = Slurm(folder, environment)
        deadline = time.monotonic() + 300
        while made.call("sinfo", "-h", "-p", "normal", "-o", "%T %D") != "idle 2":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.5)
        try:
            yield made
        finally:
            subprocess.run(["scancel", "-u", "root", "-f"], env=environment, capture_output=True)
            time.sleep(2)


MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def _free_ports(n: int) -> int:
    """The first of some ports in a row that nobody listens on."""
    # Those of another SLURM that starts at this moment are others, in all likelihood.
    for first in random.SystemRandom().sample(range(21000, 32000, 10), 1000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + n):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
