"""Time and memory of the in-memory functions, against stacking as Leopard-EM does.

``python -m benchmarks.process_results [--quick] [--side N]``. Each way runs in a process of its
own. Extra memory is the highest resident size during the call less that before it, when the inputs
are there and everything is compiled and imported.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

N_DEVICES, COUNT = 8, 20_500_000
FORMS = {
    "explicit": ("best_phi", "best_theta", "best_psi", "best_defocus"),
    "indexed": ("best_global_index",),
}
Devices = list[dict[str, np.ndarray]]


def make_devices(side: int, form: str) -> Devices:
    rng = np.random.default_rng(0)

    def one(name: str) -> np.ndarray:
        if name == "best_global_index":
            return rng.integers(0, COUNT, (side, side), dtype=np.int32)
        values = rng.standard_normal((side, side), dtype=np.float32)
        return np.square(values) if name == "correlation_squared_sum" else values

    names = ("mip", *FORMS[form], "correlation_sum", "correlation_squared_sum")
    return [{name: one(name) for name in names} for _ in range(N_DEVICES)]


def ours(devices: Devices) -> None:
    import torch

    from ocelot_em.process_results import aggregate_distributed_results, scale_mip

    merged = aggregate_distributed_results(devices)
    sums = merged["correlation_sum"], merged["correlation_squared_sum"]
    scale_mip(merged["mip"], torch.empty_like(merged["mip"]), *sums, N_DEVICES * COUNT)


def stacking(devices: Devices) -> None:
    """Do with all maps in one array what Leopard-EM does with them."""
    import torch

    mips = np.stack([device["mip"] for device in devices])
    poses = [n for n in devices[0] if n.startswith("best")]
    stacks = {name: np.stack([device[name] for device in devices]) for name in poses}
    mip, winner = torch.from_numpy(mips.max(axis=0)), mips.argmax(axis=0)[None]
    for name, stack in stacks.items():
        stacks[name] = np.take_along_axis(stack, winner, axis=0)[0]
    total, squared = (
        torch.from_numpy(np.stack([device[name] for device in devices]).sum(axis=0))
        for name in ("correlation_sum", "correlation_squared_sum")
    )
    mean = total / (N_DEVICES * COUNT)
    std = torch.sqrt(torch.clamp(squared / (N_DEVICES * COUNT) - mean**2, min=0))
    torch.where(std != 0, (mip - mean) / std, torch.zeros_like(mip))


WAYS: dict[str, Callable[[Devices], None]] = {"ours": ours, "stacking": stacking}


def peak_bytes() -> int:
    """Return the highest resident size of this process so far.

    Linux keeps in VmHWM what this process reached itself; ``ru_maxrss`` can begin with its
    parent's size, and is for other systems.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_one(way: str, form: str, side: int) -> None:
    WAYS[way](make_devices(8, form))  # imports, compiles
    devices = make_devices(side, form)
    before = peak_bytes()  # making the inputs takes no more than they do
    start = time.perf_counter()
    WAYS[way](devices)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "extra": peak_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256^2 instead of 4096^2")
    parser.add_argument("--side", type=int, help="pixels along one side of a map")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FORM"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    side = asked.side or (256 if asked.quick else 4096)
    if asked.one:
        run_one(*asked.one, side)
        return
    command = [sys.executable, "-m", "benchmarks.process_results", "--side", str(side), "--one"]
    for form, poses in FORMS.items():
        n_in = N_DEVICES * (3 + len(poses)) * side**2 * 4
        print(f"\n{form}, {N_DEVICES} devices x {side}^2, {n_in / 1e9:.2f} GB in")
        print(f"{'way':10} {'s':>8} {'extra GB':>9}")
        found = {}
        for way in WAYS:
            output = subprocess.run(
                [*command, way, form], check=True, capture_output=True, text=True
            )
            found[way] = json.loads(output.stdout)
            print(f"{way:10} {found[way]['seconds']:8.2f} {found[way]['extra'] / 1e9:9.2f}")
        a, b = found["ours"], found["stacking"]
        ratios = a["seconds"] / b["seconds"], a["extra"] / b["extra"]
        print(f"{'ratio':10} {ratios[0]:8.2f} {ratios[1]:9.2f}")


if __name__ == "__main__":
    main()
