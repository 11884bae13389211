"""Merge the partial results of 2D template matching out of core, tile by tile.

The names below are the public interface. They are imported at their first use, so that
``import ocelot_em`` is fast and changes nothing in the process.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ocelot_em.errors import OcelotError
    from ocelot_em.io.description import import_description
    from ocelot_em.io.finished import import_finished
    from ocelot_em.io.import_options import ImportOptions, read_search_space_file
    from ocelot_em.io.leopard import import_results
    from ocelot_em.io.masks import open_mask
    from ocelot_em.io.optics import Optics
    from ocelot_em.io.optics_files import read_optics
    from ocelot_em.io.parquet import read_parquet, write_parquet
    from ocelot_em.io.tables import write_cistem_star, write_leopard_csv, write_relion_star
    from ocelot_em.merge.in_memory import merge_arrays
    from ocelot_em.merge.lazy import lazy_merge, open_merged, open_partials
    from ocelot_em.merge.outcome import MergeReport
    from ocelot_em.merge.recorder import SearchRecorder
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.model.batch_options import BatchOptions
    from ocelot_em.model.correlation_histogram import CorrelationHistogram
    from ocelot_em.model.options import MergeOptions
    from ocelot_em.model.pick_options import PickOptions
    from ocelot_em.model.regions import Region
    from ocelot_em.model.search_space import SearchSpace
    from ocelot_em.particles.comparison import Comparison, compare
    from ocelot_em.particles.correlations import read_correlations
    from ocelot_em.particles.detections import find_detections
    from ocelot_em.particles.estimates import estimate
    from ocelot_em.particles.gaussian import gaussian_cutoff
    from ocelot_em.particles.picking import find_peaks
    from ocelot_em.particles.table import ParticleTable
    from ocelot_em.run.api import merge
    from ocelot_em.run.batch import BatchReport, merge_many
    from ocelot_em.run.observer import Observer
    from ocelot_em.store.partials import PartialWriter, write_partial
    from ocelot_em.store.recorded import SearchSize
    from ocelot_em.store.search_info import Exposure, SearchInfo
    from ocelot_em.testing.simulation import Simulation, simulate
    from ocelot_em.view.comparison_page import write_comparison
    from ocelot_em.view.index import write_index
    from ocelot_em.view.inspection import StoreInfo, check, describe
    from ocelot_em.view.montage_plots import (
        plot_exposures,
        plot_partials_of_exposures,
        plot_seams,
    )
    from ocelot_em.view.plots import (
        plot_crop,
        plot_defocus,
        plot_groups,
        plot_map,
        plot_poses,
        plot_psi,
        plot_zscore,
    )
    from ocelot_em.view.report import write_report
    from ocelot_em.view.statistics_plots import (
        plot_correlations,
        plot_distributions,
        plot_histogram,
        plot_joint,
        plot_partials,
        plot_survival,
    )

_HOME = {
    name: module
    for module, names in {
        "errors": "OcelotError",
        "io.description": "import_description",
        "io.finished": "import_finished",
        "io.import_options": "ImportOptions read_search_space_file",
        "io.leopard": "import_results",
        "io.masks": "open_mask",
        "io.optics": "Optics",
        "io.optics_files": "read_optics",
        "io.parquet": "read_parquet write_parquet",
        "io.tables": "write_cistem_star write_leopard_csv write_relion_star",
        "merge.in_memory": "merge_arrays",
        "merge.lazy": "lazy_merge open_merged open_partials",
        "merge.outcome": "MergeReport",
        "merge.recorder": "SearchRecorder",
        "merge.result": "MergedResult",
        "model.correlation_histogram": "CorrelationHistogram",
        "model.options": "MergeOptions",
        "model.regions": "Region",
        "model.search_space": "SearchSpace",
        "particles.comparison": "Comparison compare",
        "particles.correlations": "read_correlations",
        "particles.detections": "find_detections",
        "particles.estimates": "estimate",
        "particles.gaussian": "gaussian_cutoff",
        "model.pick_options": "PickOptions",
        "particles.picking": "find_peaks",
        "particles.table": "ParticleTable",
        "run.api": "merge",
        "run.batch": "BatchReport merge_many",
        "model.batch_options": "BatchOptions",
        "run.observer": "Observer",
        "store.partials": "PartialWriter write_partial",
        "store.recorded": "SearchSize",
        "store.search_info": "Exposure SearchInfo",
        "testing.simulation": "Simulation simulate",
        "view.comparison_page": "write_comparison",
        "view.index": "write_index",
        "view.inspection": "StoreInfo check describe",
        "view.montage_plots": "plot_exposures plot_partials_of_exposures plot_seams",
        "view.plots": "plot_crop plot_defocus plot_groups plot_map plot_poses plot_psi plot_zscore",
        "view.report": "write_report",
        "view.statistics_plots": (
            "plot_correlations plot_distributions plot_histogram plot_joint plot_partials "
            "plot_survival"
        ),
    }.items()
    for name in names.split()
}
"""The module of each public name."""

__all__ = [  # noqa: RUF022 - grouped as people look for them
    "merge",
    "merge_many",
    "merge_arrays",
    "lazy_merge",
    "open_merged",
    "open_partials",
    "MergedResult",
    "find_peaks",
    "PickOptions",
    "open_mask",
    "read_correlations",
    "find_detections",
    "CorrelationHistogram",
    "gaussian_cutoff",
    "ParticleTable",
    "estimate",
    "compare",
    "Comparison",
    "Optics",
    "read_optics",
    "write_leopard_csv",
    "write_relion_star",
    "write_cistem_star",
    "read_parquet",
    "write_parquet",
    "import_finished",
    "import_results",
    "import_description",
    "write_partial",
    "PartialWriter",
    "SearchRecorder",
    "SearchSize",
    "Exposure",
    "SearchInfo",
    "SearchSpace",
    "Region",
    "ImportOptions",
    "MergeOptions",
    "MergeReport",
    "BatchOptions",
    "BatchReport",
    "Observer",
    "StoreInfo",
    "check",
    "describe",
    "read_search_space_file",
    "write_report",
    "write_index",
    "write_comparison",
    "plot_zscore",
    "plot_map",
    "plot_crop",
    "plot_survival",
    "plot_distributions",
    "plot_histogram",
    "plot_joint",
    "plot_partials",
    "plot_correlations",
    "plot_poses",
    "plot_psi",
    "plot_defocus",
    "plot_groups",
    "plot_exposures",
    "plot_seams",
    "plot_partials_of_exposures",
    "Simulation",
    "simulate",
    "OcelotError",
    "__version__",
]


class _Package(ModuleType):
    """A package whose attribute ``merge`` is a function, not the subpackage of that name.

    Importing anything from a subpackage sets it as an attribute of its parent package.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "merge" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        from ocelot_em.model.problems import suggestion

        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{suggestion(name, __all__)}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
