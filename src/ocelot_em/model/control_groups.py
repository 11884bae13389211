"""The memory and processors that this process may use, limited by its control groups (cgroups).

SLURM jobs and containers set such limits. Every group up to the root counts: SLURM limits the job,
and the process is in a step of it.
"""

import contextlib
import math
import os
import re
import resource
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

_MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
"""Files with a limit in bytes: two of version 2 and one of version 1."""


def memory_nbytes(root: Path = Path("/")) -> int:
    """Return the smallest limit of this process's memory, in bytes; ``root`` contains ``proc``."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_RSS)]
    limits += [limit for limit in soft if limit != resource.RLIM_INFINITY]
    for group in control_groups("memory", root):
        for name in _MEMORY_LIMITS:
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
                limits.append(int((group / name).read_text()))
    return min(limits)


@cache
def n_cpus() -> int:
    """Return the number of processors: the machine's, or fewer by affinity or control group."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS and Windows
        count = os.cpu_count() or 1
    for group in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
            quota, period = (group / "cpu.max").read_text().split()
            count = min(count, max(math.ceil(int(quota) / int(period)), 1))
    return count


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process's groups, from its own up.

    They are those of version 2 and of a ``controller`` of version 1, such as ``memory``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):  # without control groups
        return
    own = dict[str, PurePosixPath]()
    for line in lines:
        hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
        own |= dict.fromkeys(controllers.split(",") if hierarchy != "0" else ("",), _path(path))
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        in_version_1 = kind[0] == "cgroup" and controller in kind[-1].split(",")
        group = own.get(controller if in_version_1 else "")
        if group is None or not (in_version_1 or kind[0] == "cgroup2"):
            continue
        mounted, top = _path(fields[3]), root / _path(fields[4]).relative_to("/")
        # A group outside of what is mounted here has no folder; only the top is known then.
        below = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        yield from (top / part for part in (below, *below.parents) if ".." not in part.parts)


def _path(text: str) -> PurePosixPath:
    """Return a path of the kernel's tables, in which spaces are written as octal numbers."""
    return PurePosixPath(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text))
