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

import mrcfile
import numpy as np
import pytest

import ocelot_em
from ocelot_em import process_results as ours

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

pytest.importorskip("leopard_em", reason="Leopard-EM is not installed; see CONTRIBUTING.md")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

REPLACED = "aggregate_distributed_results", "scale_mip"
COLUMNS = "global_idx", "pos_x", "pos_y", "corr_value"
EDGE, SHAPE, POSITION = 32, (112, 96), (40, 30)


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
    from leopard_em.pydantic_models.managers import MatchTemplateManager

    rng = np.random.default_rng(7)
    z, y, x = np.mgrid[:EDGE, :EDGE, :EDGE] - EDGE // 2
    volume = np.exp(-((z - 3) ** 2 + y**2 + (x / 2) ** 2) / 9)
    volume += np.exp(-((y + 5) ** 2 + x**2 + z**2) / 5)
    micrograph = rng.normal(0, 1, SHAPE)
    rows, columns = (slice(start, start + EDGE) for start in POSITION)
    micrograph[rows, columns] -= 2 * volume.sum(axis=0)
    mrcfile.write(tmp_path / "volume.mrc", volume.astype(np.float32), voxel_size=2.5)
    mrcfile.write(tmp_path / "micrograph.mrc", micrograph.astype(np.float32), voxel_size=2.5)
    maps = (
        *("mip", "scaled_mip", "correlation_average", "correlation_variance"),
        *("orientation_psi", "orientation_theta", "orientation_phi", "relative_defocus"),
    )
    return MatchTemplateManager(
        micrograph_path=str(tmp_path / "micrograph.mrc"),
        template_volume_path=str(tmp_path / "volume.mrc"),
        optics_group={
            **{"label": "A", "pixel_size": 2.5, "voltage": 200.0, "spherical_aberration": 2.7},
            **{"amplitude_contrast_ratio": 0.1, "phase_shift": 0.0, "ctf_B_factor": 60.0},
            **{"defocus_u": 5000.0, "defocus_v": 4800.0, "astigmatism_angle": 30.0},
        },
        defocus_search_config={"defocus_min": 0, "defocus_max": 200, "defocus_step": 200},
        orientation_search_config={"psi_step": 30.0, "theta_step": 20.0},
        preprocessing_filters={},
        match_template_result={
            **{f"{name}_path": str(tmp_path / f"{name}.mrc") for name in maps},
            "allow_file_overwrite": True,
        },
        computational_config={"gpu_ids": ["cpu", "cpu"], "num_cpus": 1, "backend": "batched"},
    )


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
    manager.run_match_template(orientation_batch_size=4, do_result_export=False)

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
