"""Merge the partial results of 2D template matching out of core, tile by tile.

The names below are the public interface; they are imported when they are first used, so that
``import ocelot_em`` costs nothing and changes nothing in the process.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ocelot_em.api import Observer, merge
    from ocelot_em.canvas import Region
    from ocelot_em.errors import OcelotError
    from ocelot_em.in_memory import merge_arrays
    from ocelot_em.inspection import StoreInfo, check, describe
    from ocelot_em.interop.leopard import (
        ImportOptions,
        import_results,
        read_search_space_file,
    )
    from ocelot_em.lazy import lazy_merge, open_merged, open_partials
    from ocelot_em.particles import ParticleTable
    from ocelot_em.picking import find_peaks
    from ocelot_em.pipeline import MergeReport
    from ocelot_em.plan import MergeOptions
    from ocelot_em.search import Exposure, PartialWriter, SearchInfo, write_partial
    from ocelot_em.search_space import SearchSpace
    from ocelot_em.simulation import Simulation, simulate

_HOME = {
    "Exposure": "search",
    "ImportOptions": "interop.leopard",
    "MergeOptions": "plan",
    "MergeReport": "pipeline",
    "Observer": "api",
    "OcelotError": "errors",
    "PartialWriter": "search",
    "ParticleTable": "particles",
    "Region": "canvas",
    "SearchInfo": "search",
    "SearchSpace": "search_space",
    "Simulation": "simulation",
    "StoreInfo": "inspection",
    "check": "inspection",
    "describe": "inspection",
    "find_peaks": "picking",
    "import_results": "interop.leopard",
    "lazy_merge": "lazy",
    "merge": "api",
    "merge_arrays": "in_memory",
    "open_merged": "lazy",
    "open_partials": "lazy",
    "read_search_space_file": "interop.leopard",
    "simulate": "simulation",
    "write_partial": "search",
}

__all__ = [  # noqa: RUF022 - grouped as people look for them
    "merge",
    "merge_arrays",
    "lazy_merge",
    "open_merged",
    "open_partials",
    "find_peaks",
    "ParticleTable",
    "import_results",
    "write_partial",
    "PartialWriter",
    "Exposure",
    "SearchInfo",
    "SearchSpace",
    "Region",
    "ImportOptions",
    "MergeOptions",
    "MergeReport",
    "Observer",
    "StoreInfo",
    "check",
    "describe",
    "read_search_space_file",
    "Simulation",
    "simulate",
    "OcelotError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
