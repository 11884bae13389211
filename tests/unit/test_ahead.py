"""Kernels that are compiled when the package is built."""

import numpy as np
import pytest

from builders import write_explicit_search
from ocelot_em import merge
from ocelot_em.kernels import ahead, build, by_chunk, by_map, collect, compiling, cpu_statistics
from ocelot_em.kernels.compiling import Kernel

needs_built = pytest.mark.skipif(
    not any(map(ahead.is_current, ahead.cpus())),
    reason="no kernels were compiled from these sources: python -m ocelot_em.kernels.build here",
)


@pytest.fixture
def library():
    ahead._library.cache_clear()
    yield
    ahead._library.cache_clear()


@pytest.mark.parametrize("line", list(build.signatures()))
def test_types_are_read_as_they_are_written(line):
    _, _, types = line.partition(" ")

    def example(numba_type):
        if hasattr(numba_type, "layout"):
            array = np.zeros((2,) * numba_type.ndim, str(numba_type.dtype))
            return array if numba_type.layout == "C" else array[..., :1]
        if hasattr(numba_type, "types"):
            return tuple(map(example, numba_type))
        return {"bool": bool, "int64": int, "float64": float}.get(
            str(numba_type), np.dtype(str(numba_type)).type
        )(0)

    words = []
    assert compiling.types_of(tuple(map(example, build.Types(types))), words) == types
    assert len(words) == len("".join(ahead.words_of(types)))


def test_code_of_other_sources_is_not_loaded(monkeypatch, library):
    monkeypatch.setattr(ahead, "digest_of_sources", lambda: "of another version")
    assert ahead.find("by_map.blank", "i2:1C f4:1C") is None


@needs_built
def test_code_for_other_processors_is_not_loaded(monkeypatch, library):
    from llvmlite import binding

    assert ahead.find("by_map.blank", "i2:1C f4:1C") is not None
    assert ahead.find("by_map.blank", "i4:1C f4:1C") is None
    ahead._library.cache_clear()
    monkeypatch.setattr(binding, "get_host_cpu_features", dict)
    assert ahead.find("by_map.blank", "i2:1C f4:1C") is None


@needs_built
@pytest.mark.slow
def test_numba_computes_the_same_bytes(monkeypatch, tmp_path):
    search = write_explicit_search(tmp_path / "RUN.zarr", (120, 130), n_partials=3)
    merge(search, tmp_path / "AHEAD.zarr", tile_size=64)
    missing = []
    monkeypatch.setattr(ahead, "find", lambda name, _types: missing.append(name))
    for module in (by_chunk, by_map, collect, cpu_statistics):
        for kernel in vars(module).values():
            if isinstance(kernel, Kernel):
                monkeypatch.setattr(kernel, "_ready", {})
    merge(search, tmp_path / "NUMBA.zarr", tile_size=64)
    assert {"by_chunk.fold_winners", "by_chunk.fold_sums"} <= set(missing)
    chunks = list((tmp_path / "AHEAD.zarr").glob("*/c/*/*"))
    assert chunks
    for path in chunks:
        other = tmp_path / "NUMBA.zarr" / path.relative_to(tmp_path / "AHEAD.zarr")
        assert other.read_bytes() == path.read_bytes()
