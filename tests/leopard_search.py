"""A small search of Leopard-EM, recorded, as a script: ``leopard_search.py FOLDER RUN N_DEVICES``.

The devices are processes of the CPU, for which functions of CUDA are replaced. Written to FOLDER:
the micrograph, the template and, at the end, Leopard-EM's results: ``recorded.npz``. RUN may
be ``-``: then nothing is recorded, and they are in ``alone.npz``.

``KILL`` in the environment, ``WHO WHERE NUMBER SECONDS``, kills once. WHERE is ``write``, in the
middle of that write of a file by one device, or ``given``, some time after a device was given
orientations that many times. WHO is ``device``, that one, or ``all``; with ``both``, all are killed
a little after that device. The working folder has what was ``given``, and whether it ``killed``.
"""

import contextlib
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import numpy as np
import torch

from leopard_manager import EDGE, match_template_manager, run_options, write_inputs
from ocelot_em import leopard
from ocelot_em.store import local

RESULTS = (
    *("mip", "scaled_mip", "correlation_average", "correlation_variance", "relative_defocus"),
    *("orientation_phi", "orientation_theta", "orientation_psi"),
)


class Stream:
    """Stands in for a stream of a GPU."""

    def __init__(self, device=None):
        pass

    def synchronize(self):
        pass


torch.cuda.Stream = Stream
for name in ("synchronize", "empty_cache", "ipc_collect"):
    setattr(torch.cuda, name, lambda *_: None)
torch.set_num_threads(1)
CORE = "leopard_em.backend.core_match_template"
importlib.import_module(CORE)
if hasattr(sys.modules[CORE], "CORRELATION_TABLE_THRESHOLD"):
    sys.modules[CORE].CORRELATION_TABLE_THRESHOLD = 4.0


def kill_at(who, where, number, seconds):
    """Kill this device or all of the search, unless another one did; see above."""
    n_written, n_given, n_later = (itertools.count(1) for _ in range(3))
    write_all, get_next_indices = local.write_all, leopard._Queue.get_next_indices

    def is_first():
        with contextlib.suppress(FileExistsError):
            return not Path("killed").touch(exist_ok=False)
        return False

    def kill():
        os.kill(0 if who == "all" else os.getpid(), signal.SIGKILL)

    def write(descriptor, parts):
        if where == "write" and next(n_written) == int(number) and is_first():
            write_all(descriptor, [b"".join(parts)[:7]])
            kill()
        write_all(descriptor, parts)

    def given(queue, process_id=None):
        found = get_next_indices(queue, process_id)
        if found is not None:
            with Path("given").open("a") as lines:
                print(*found, file=lines)
        if where == "given" and next(n_given) == int(number):
            later = threading.Timer(float(seconds), lambda: is_first() and kill())
            later.daemon = True
            later.start()
        if who == "both" and Path("killed").exists() and next(n_later) == 2:
            os.kill(0, signal.SIGKILL)
        return found

    local.write_all, leopard._Queue.get_next_indices = write, given


if "KILL" in os.environ and __name__ != "__main__":  # in the processes of the devices
    kill_at(*os.environ["KILL"].split())


def manager(folder, n_devices):
    if not (folder / "micrograph.mrc").exists():
        rng = np.random.default_rng(7)
        volume = rng.normal(0, 0.1, (EDGE,) * 3)  # without symmetry, so that no poses tie
        z, y, x = np.mgrid[:EDGE, :EDGE, :EDGE] - EDGE // 2
        volume *= np.exp(-(z**2 + y**2 + x**2) / 60)
        volume += np.exp(-((z - 3) ** 2 + (y + x / 3) ** 2 + (x / 2 - 1) ** 2) / 9)
        write_inputs(folder, rng, volume)
    return match_template_manager(folder, n_devices)


def main(folder, run, n_devices):
    search = manager(Path(folder), int(n_devices))
    options = run_options(search)
    recorded = contextlib.nullcontext() if run == "-" else leopard.recording(run, every=0)
    started = time.time()
    with recorded:
        search.run_match_template(**options)
    found = search.match_template_result
    maps = {name: np.asarray(getattr(found, name)) for name in RESULTS}
    maps["count"] = np.int64(found.total_projections)
    if table := getattr(found, "correlation_table", None):
        rows = zip(table.search_index, table.y, table.x, table.correlation_value, strict=True)
        maps["rows"] = np.array(sorted(rows))
    name = "alone" if run == "-" else "recorded"
    np.savez(Path(folder, f"{name}.npz"), **maps)
    print(f"finished in {time.time() - started:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
