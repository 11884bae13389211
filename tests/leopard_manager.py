"""A small search of Leopard-EM, of a micrograph with one particle; importing it needs nothing."""

import inspect

EDGE, SHAPE, POSITION = 32, (112, 96), (40, 30)
BATCH = 2


def write_inputs(folder, rng, volume):
    """Write a template and, as noise from a generator, a micrograph that contains it."""
    import mrcfile

    image = rng.normal(0, 1, SHAPE)
    rows, columns = (slice(start, start + EDGE) for start in POSITION)
    image[rows, columns] -= 2 * volume.sum(axis=0)
    mrcfile.write(folder / "volume.mrc", volume.astype("f4"), voxel_size=2.5)
    mrcfile.write(folder / "micrograph.mrc", image.astype("f4"), voxel_size=2.5)


def match_template_manager(folder, n_devices):
    """Leopard-EM's manager of a search of these files, on devices that are the CPU."""
    from leopard_em.pydantic_models.managers import MatchTemplateManager

    maps = (
        *("mip", "scaled_mip", "correlation_average", "correlation_variance"),
        *("orientation_psi", "orientation_theta", "orientation_phi", "relative_defocus"),
    )
    return MatchTemplateManager(
        micrograph_path=str(folder / "micrograph.mrc"),
        template_volume_path=str(folder / "volume.mrc"),
        optics_group={
            **{"label": "A", "pixel_size": 2.5, "voltage": 200.0, "spherical_aberration": 2.7},
            **{"amplitude_contrast_ratio": 0.1, "phase_shift": 0.0, "ctf_B_factor": 60.0},
            **{"defocus_u": 5000.0, "defocus_v": 4800.0, "astigmatism_angle": 30.0},
        },
        defocus_search_config={"defocus_min": 0, "defocus_max": 200, "defocus_step": 200},
        orientation_search_config={"orientation_configs": _directions()},
        preprocessing_filters={},
        match_template_result={
            **{f"{name}_path": str(folder / f"{name}.mrc") for name in maps},
            "allow_file_overwrite": True,
        },
        computational_config={
            **{"gpu_ids": ["cpu"] * n_devices, "num_cpus": 1, "backend": "batched"}
        },
    )


def _directions():
    """Each with all angles in the plane before the next one, the only order that 1.3.0 accepts."""
    return [
        {
            **{"symmetry": None, "psi_step": 30.0},
            **{"theta_min": theta, "theta_max": theta, "phi_min": phi, "phi_max": phi},
        }
        for theta in range(10, 180, 20)
        for phi in range(0, 360, 30)
    ]


def run_options(manager):
    """What a search is asked for: in 1.3 with its correlation table, which 1.3.0 leaves out."""
    names = inspect.signature(type(manager).run_match_template).parameters
    options = {"orientation_batch_size": BATCH, "do_result_export": False}
    wanted = "compute_correlation_table"
    return options | ({wanted: True} if wanted in names else {})
