"""Searches of Leopard-EM 1.2 or 1.3 with its merging functions replaced by ours.

Leopard-EM is no dependency of the tests: CONTRIBUTING.md says how to install it. Devices are
threads on the CPU here, and Leopard-EM does not compile its functions.
"""

import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ocelot_em
from leopard_manager import (
    EDGE,
    POSITION,
    SHAPE,
    match_template_manager,
    run_options,
    write_inputs,
)
from ocelot_em import process_results as ours

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

pytest.importorskip("leopard_em", reason="Leopard-EM is not installed; see CONTRIBUTING.md")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

REPLACED = "aggregate_distributed_results", "scale_mip"
COLUMNS = "global_idx", "pos_x", "pos_y", "corr_value"


class _Stream:
    """Stands in for a stream of a GPU."""

    def __init__(self, device: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leopard-EM's backend, with threads of this process as its devices."""
    import sys

    import leopard_em.backend.core_match_template  # noqa: F401 - the package names a function so

    core = sys.modules["leopard_em.backend.core_match_template"]

    def in_threads(
        target: Any, kwargs_list: list[dict[str, Any]], **_: Any
    ) -> Mapping[int, Mapping[str, Any]]:
        results: dict[int, Mapping[str, Any]] = {}
        threads = [
            threading.Thread(target=target, args=(results, rank), kwargs=kwargs)
            for rank, kwargs in enumerate(kwargs_list)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    monkeypatch.setattr(core, "run_multiprocess_jobs", in_threads)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    for name in ("synchronize", "empty_cache", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return core


@pytest.fixture
def manager(core: Any, tmp_path: Path) -> Any:
    """A small search on two devices, of a micrograph with one particle."""
    rng = np.random.default_rng(7)
    z, y, x = np.mgrid[:EDGE, :EDGE, :EDGE] - EDGE // 2
    volume = np.exp(-((z - 3) ** 2 + y**2 + (x / 2) ** 2) / 9)
    volume += np.exp(-((y + 5) ** 2 + x**2 + z**2) / 5)
    write_inputs(tmp_path, rng, volume)
    return match_template_manager(tmp_path, n_devices=2)


def test_a_search_runs_to_the_end(
    core: Any, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are those of Leopard-EM's own functions, which see the same devices."""
    is_13 = hasattr(core, "CORRELATION_TABLE_THRESHOLD")
    if is_13:
        monkeypatch.setattr(core, "CORRELATION_TABLE_THRESHOLD", 4.0)
    theirs, seen = {name: getattr(core, name) for name in REPLACED}, list[Any]()

    def aggregate(results: list[dict[str, Any]]) -> Any:
        seen.append(results)
        return ours.aggregate_distributed_results(results)

    monkeypatch.setattr(core, "aggregate_distributed_results", aggregate)
    monkeypatch.setattr(core, "scale_mip", ours.scale_mip)
    manager.run_match_template(**run_options(manager))

    (devices,) = seen
    assert len(devices) == 2
    found = ours.aggregate_distributed_results(devices)
    expected = theirs["aggregate_distributed_results"](devices)
    assert set(found) == set(expected)
    table, their_table = (each.pop("correlation_table", {}) for each in (found, expected))
    # Mirror images of the template tie. Theirs takes the earlier device, ours the lower index.
    one, other = (torch.as_tensor(device["mip"]) for device in devices)
    lower = np.minimum(*(np.asarray(device["best_global_index"]) for device in devices))
    ties = (one == other).numpy()
    expected["best_global_index"][ties] = torch.from_numpy(lower)[ties]
    assert set(table) == set(their_table) == ({*COLUMNS, "threshold"} if is_13 else set())
    for ours_here, theirs_here in ((found, expected), (table, their_table)):
        for name, values in theirs_here.items():
            np.testing.assert_array_equal(ours_here[name], values, err_msg=name)
            assert getattr(ours_here[name], "dtype", None) == getattr(values, "dtype", None) or (
                name == "threshold"
            )

    result, count = manager.match_template_result, manager.match_template_result.total_projections
    sums = expected["correlation_sum"], expected["correlation_squared_sum"]
    mip = expected["mip"]
    _, z, mean, std = theirs["scale_mip"](mip, torch.empty_like(mip), *sums, count)
    height, width = (edge - EDGE + 1 for edge in SHAPE)
    np.testing.assert_array_equal(result.mip, mip[:height, :width])
    for name, values in (
        ("scaled_mip", z),
        ("correlation_average", mean),
        ("correlation_variance", std),
    ):
        valid = values[:height, :width]
        np.testing.assert_allclose(getattr(result, name), valid, atol=2e-5, err_msg=name)
    assert result.mip.argmax() == width * POSITION[0] + POSITION[1]
    if is_13:
        assert result.correlation_table.num_observations == len(table["corr_value"]) > 100
        kept_out_of_core(manager, devices, tmp_path)


def kept_out_of_core(manager: Any, devices: list[dict[str, Any]], place: Path) -> None:
    """Compare the rows above a cutoff, from stores, with those of Leopard-EM's own table."""
    inputs = manager.make_backend_core_function_kwargs()
    tables = (inputs[name] for name in ("euler_angles", "defocus_values", "pixel_values"))
    search = ocelot_em.SearchInfo(search_space=ocelot_em.SearchSpace.from_tables(*tables))
    count = manager.match_template_result.total_projections
    for number, own in enumerate((count - 1000, 1000)):  # only their sum matters
        write = partial(ocelot_em.write_partial, total_projections=own, search=search)
        write(place / "RUN", f"cpu{number}", devices[number])
    ocelot_em.merge(place / "RUN", place / "OUT")

    frame = manager.match_template_result.correlation_table.to_dataframe()
    z = (frame.correlation_value - frame.correlation_mean) / frame.correlation_variance
    heights = np.sort(z)[::-1][20:200]
    widest = int(np.argmin(np.diff(heights)))  # where rounding changes nothing
    cutoff = float(heights[widest : widest + 2].mean())
    kept = frame[z >= cutoff]
    blocks = list(ocelot_em.read_correlations(place / "OUT", cutoff=cutoff))
    names = {"pos_y": "y", "pos_x": "x", "global_index": "search_index"}
    names["correlation"] = "correlation_value"
    found, expected = (
        sorted(zip(*columns, strict=True))
        for columns in (
            [np.concatenate([b[ours_here] for b in blocks]).tolist() for ours_here in names],
            [kept[theirs_here].tolist() for theirs_here in names.values()],
        )
    )
    assert found == expected
    assert 20 < len(found) < len(frame)
