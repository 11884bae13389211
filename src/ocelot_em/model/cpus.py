"""The number of processors that this process may use."""

import contextlib
import math
import os
from functools import lru_cache

from ocelot_em.model.control_groups import control_groups


@lru_cache(maxsize=1)
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
