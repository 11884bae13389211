"""What Leopard-EM itself makes of the table and the maps that are exported for it.

Leopard-EM 1.2 is no dependency of the tests, and needs torch-motion-correction 0.0.5 to import. Its
refinement runs on CUDA devices only, so that these tests end with what it hands to its kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

import ocelot_em
from conftest import SHARED
from helpers import read_maps
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.io.optics import LEOPARD_MAPS, Optics, with_maps_in
from ocelot_em.io.tables import write_leopard_csv
from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, STD, AnyArray
from ocelot_em.particles.picking import find_peaks

pytest.importorskip(
    "leopard_em",
    reason="Leopard-EM is not installed: pip install 'leopard-em==1.2.*' "
    "'torch-motion-correction==0.0.5'",
)

pytestmark = [
    pytest.mark.skipif(
        not SHARED.is_dir(), reason="the whole real search is not on this machine (shared/data)"
    ),
    # PyTorch of itself, as Leopard-EM compiles its functions.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    # A table before its refinement has nothing that is refined.
    pytest.mark.filterwarnings("ignore:Refined defocus values not found:UserWarning"),
]

MICROGRAPH, VALID, COUNT = (432, 480), (377, 425), 129_600
TEMPLATE, BOX = (56, 56), (68, 64)
WINDOW = (BOX[0] - TEMPLATE[0] + 1, BOX[1] - TEMPLATE[1] + 1)
"""What refinement looks at around a particle: positions of the template in its box."""

MAPS = {
    "mip": MIP,
    "scaled_mip": SCALED_MIP,
    "correlation_average": MEAN,
    "correlation_variance": STD,
    "orientation_psi": "best_psi",
    "orientation_theta": "best_theta",
    "orientation_phi": "best_phi",
    "relative_defocus": "best_defocus",
}
"""Leopard-EM's names of the maps and ours."""


@dataclass(frozen=True)
class Exported:
    """A merged search, and what was written of it for Leopard-EM."""

    maps: Mapping[str, AnyArray]
    """Valid pixels of the store's maps."""
    particles: Mapping[str, AnyArray]
    optics: Optics
    micrograph: AnyArray
    table: Path

    def around(self, name: str, outside: float) -> AnyArray:
        """Windows of a map with the particles in their middle."""
        beyond = [((edge - 1) // 2, (edge - 1) // 2) for edge in WINDOW]
        padded = np.pad(self.maps[name], beyond, constant_values=outside)
        windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
        return windows[self.particles["pos_y"], self.particles["pos_x"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("exported")
    options = ocelot_em.ImportOptions(template_box=TEMPLATE[0], pixel_size_angstrom=2.5)
    ocelot_em.import_results([SHARED / f"A_shard{i}.npz" for i in range(4)], place / "R", options)
    ocelot_em.merge(place / "R", place / "M", tile_size=100, threads=2)
    particles = find_peaks(place / "M")
    # The search's own micrograph is not among the data; what is in it does not matter here.
    micrograph = np.random.default_rng(1).standard_normal(MICROGRAPH).astype(np.float32)
    mrcfile.write(place / "micrograph.mrc", micrograph)
    optics = replace(
        Optics.from_leopard_yaml(SHARED / "A_official_config.yaml", template_box_px=TEMPLATE[0]),
        micrograph=str(place / "micrograph.mrc"),
    )
    optics = with_maps_in(optics, write_mrc_set(place / "M", place / "SET"))
    write_leopard_csv(particles, place / "particles.csv", optics=optics)
    merged = read_maps(place / "M")
    return Exported(
        maps={name: merged[name][: VALID[0], : VALID[1]] for name in MAPS.values()},
        particles=particles.columns,
        optics=optics,
        micrograph=micrograph,
        table=place / "particles.csv",
    )


@pytest.fixture
def stack(exported: Exported) -> Any:
    from leopard_em.pydantic_models.data_structures import ParticleStack

    return ParticleStack(
        df_path=str(exported.table), extracted_box_size=BOX, original_template_size=TEMPLATE
    )


def test_it_picks_our_particles_from_our_maps(exported: Exported) -> None:
    from leopard_em.pydantic_models.results import MatchTemplateResult

    paths = {key: exported.optics.leopard_columns[column] for column, key in LEOPARD_MAPS.items()}
    # Or it would refuse files that are there, though it only reads them.
    result = MatchTemplateResult(**paths, allow_file_overwrite=True, total_projections=COUNT)
    result.load_tensors_from_paths()
    for theirs, ours in MAPS.items():
        found = getattr(result, theirs).numpy()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exported.maps[ours], err_msg=theirs)
    picked = result.peaks_to_dataframe().rename(columns={"correlation_variance": STD})
    assert len(picked) == 16
    for name in picked:
        np.testing.assert_array_equal(picked[name], exported.particles[name], err_msg=name)


def test_it_reads_our_table(exported: Exported, stack: Any) -> None:
    from leopard_em.pydantic_models.formats import MATCH_TEMPLATE_DF_COLUMN_ORDER

    assert stack.df_columns == MATCH_TEMPLATE_DF_COLUMN_ORDER
    ours = exported.particles
    assert stack.num_particles == len(ours["pos_y"]) == 16
    for name in (
        *("mip", "scaled_mip", "correlation_mean", "total_correlations", "pos_y", "pos_x"),
        *("phi", "theta", "psi", "relative_defocus"),
    ):
        read = stack[name].to_numpy()
        assert read.dtype.kind == ours[name].dtype.kind, name
        np.testing.assert_array_equal(read.astype(ours[name].dtype), ours[name], err_msg=name)
    np.testing.assert_array_equal(stack["correlation_variance"].astype(np.float32), ours[STD])
    for column in LEOPARD_MAPS:
        assert set(stack[column]) == {exported.optics.leopard_columns[column]}


def test_it_cuts_out_what_our_table_points_at(exported: Exported, stack: Any) -> None:
    images, rows = stack.load_images_grouped_by_column("micrograph_path")
    boxes = stack.construct_image_stack(images, rows, BOX, padding_mode="reflect").numpy()
    middles = exported.micrograph[stack["pos_y_img"], stack["pos_x_img"]]
    np.testing.assert_array_equal(boxes[:, BOX[0] // 2, BOX[1] // 2], middles)


def test_its_refinement_starts_from_our_numbers(exported: Exported, stack: Any) -> None:
    import torch
    from leopard_em.pydantic_models.managers import RefineTemplateManager

    off = {"enabled": False}
    manager = RefineTemplateManager(
        skip_mrc_preloads=True,
        template_volume_path=exported.optics.template,
        particle_stack=stack,
        defocus_refinement_config=off,
        pixel_size_refinement_config=off,
        orientation_refinement_config=off,
        preprocessing_filters={},
        computational_config={"gpu_ids": "cpu"},
        movie_config=off,
    )
    edge = TEMPLATE[0]
    manager.template_volume = torch.ones((edge, edge, edge))
    start = manager.make_backend_core_function_kwargs(prefer_refined_angles=False)

    mean, std = start["corr_mean"].numpy(), start["corr_std"].numpy()
    np.testing.assert_array_equal(mean, exported.around(MEAN, outside=0))
    # It takes the root of what it calls a variance and has saved as a standard deviation itself.
    np.testing.assert_allclose(std**2, exported.around(STD, outside=1e10), rtol=1e-6)
    middle = (slice(None), WINDOW[0] // 2, WINDOW[1] // 2)
    ours = exported.particles
    z = (ours[MIP] - mean[middle]) / std[middle] ** 2
    np.testing.assert_allclose(z, ours[SCALED_MIP], rtol=1e-5)

    angles = np.column_stack([ours[name] for name in ("phi", "theta", "psi")])
    np.testing.assert_array_equal(start["euler_angles"].numpy().astype(np.float32), angles)
    np.testing.assert_array_equal(start["defocus_u"], 9000 + ours["relative_defocus"])
    np.testing.assert_array_equal(start["defocus_v"], 8600 + ours["relative_defocus"])
    np.testing.assert_array_equal(start["defocus_angle"], np.full(16, 30))
    assert start["ctf_kwargs"] == {
        "voltage": 200.0,
        "spherical_aberration": 2.7,
        "amplitude_contrast_ratio": 0.1,
        "ctf_B_factor": 60.0,
        "phase_shift": 0.0,
        "pixel_size": 2.5,
        "template_shape": TEMPLATE,
        "even_zernikes": None,
        "odd_zernikes": None,
        "mag_matrix": None,
    }
