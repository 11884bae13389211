"""A small search of Leopard-EM, recorded, as a script: ``leopard_search.py FOLDER RUN N_DEVICES``.

The devices are processes of the CPU, for which functions of CUDA are replaced. Written to FOLDER:
the micrograph, the template and, at the end, Leopard-EM's results: ``recorded.npz``. RUN may
be ``-``: then nothing is recorded, and they are in ``alone.npz``.
"""

import contextlib
import importlib
import os
import sys
import time
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import numpy as np
import torch

from leopard_manager import EDGE, match_template_manager, write_inputs
from ocelot_em import leopard

RESULTS = "mip", "scaled_mip", "orientation_phi", "orientation_theta", "orientation_psi"


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
    recorded = contextlib.nullcontext() if run == "-" else leopard.recording(run, every=0.5)
    started = time.time()
    with recorded:
        search.run_match_template(orientation_batch_size=4, do_result_export=False)
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
