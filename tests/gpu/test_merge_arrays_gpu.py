"""Results that are on a GPU already; everything here is skipped, with the reason, without one."""

import numpy as np
import pytest

from builders import SPACE, same_bits
from gpu_kernels import needs_gpu
from helpers import make_result
from ocelot_em import SearchInfo, merge_arrays, open_partials, write_partial
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge import in_memory
from ocelot_em.model.arrays import as_numpy
from ocelot_em.model.maps import COUNT, INDEX, MIP, POSES, SQUARED_SUM, SUM
from stacks import assert_same_bits

pytestmark = needs_gpu

COUNTS = (1000, 2**31 + 7, 300, 25, 3, 2**53 + 1)
FORMS = {"explicit": [INDEX], "indexed": POSES, "both": []}


def to_cupy(values):
    import cupy

    return cupy.asarray(values)


def to_torch(values):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch is for the CPU only")
    return torch.from_numpy(values).cuda()


libraries = pytest.mark.parametrize("send", [to_cupy, to_torch])


def results_of(rng, shape=(1100, 1500), form="both"):
    results = []
    for count in COUNTS:
        result = make_result(rng, shape, count, ties=True)
        result[INDEX] %= SPACE.n_poses
        result[MIP][:3], result[INDEX][:3] = -np.inf, -1
        results.append({n: v for n, v in result.items() if n not in FORMS[form]} | {COUNT: count})
    return results


def sent(results, send):
    return [{n: v if n == COUNT else send(v) for n, v in r.items()} for r in results]


def assert_merged(merged, expected):
    assert list(merged) == list(expected)
    assert merged[COUNT] == expected[COUNT]
    for name, values in expected.items():
        if name != COUNT:
            assert_same_bits(as_numpy(merged[name]), values, name)


@libraries
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("band_pixels", [10_001, 4 * 2**20])
def test_the_gpu_gives_the_bits_of_the_cpu(monkeypatch, rng, send, form, band_pixels):
    monkeypatch.setattr(in_memory, "_GPU_BAND_PIXELS", band_pixels)
    results = results_of(rng, form=form)
    results[2][SUM] = results[2][SUM].astype(np.float64)
    there = sent(results, send)
    merged = merge_arrays(there)
    assert_merged(merged, merge_arrays(results))
    assert all(type(merged[n]) is type(there[0][n]) for n in merged)
    for result, before in zip(there, results, strict=True):
        for name, values in before.items():
            assert name == COUNT or same_bits(as_numpy(result[name]), values)


@libraries
def test_maps_that_are_not_contiguous(rng, send):
    results = results_of(rng, (300, 200))
    there = [
        {n: v if n == COUNT else send(np.repeat(v, 2, axis=1))[:, ::2] for n, v in result.items()}
        for result in results
    ]
    assert_merged(merge_arrays(there), merge_arrays(results))


@libraries
def test_bad_values_are_named(rng, send):
    results = results_of(rng)
    results[3][SQUARED_SUM][1090, 3] = np.nan
    results[5][INDEX][7, 7] = -9
    with pytest.raises(InvalidInputError) as caught:
        merge_arrays(sent(results, send))
    first, second = caught.value.problems
    assert first.startswith("device 3: correlation_squared_sum: NaN at 1 pixel, first (109")
    assert second.startswith("device 5: best_global_index: expected -1 or more, got -9 to -9")


def test_kinds_are_not_mixed(rng):
    results = results_of(rng, (4, 4))
    results[1] = sent(results, to_cupy)[1]
    with pytest.raises(InvalidInputError, match="as device 0, mip, got a CuPy array"):
        merge_arrays(results)


@libraries
@pytest.mark.parametrize("form", ["explicit", "indexed"])
def test_two_steps_and_a_partial(tmp_path, rng, send, form):
    results = results_of(rng, form=form)[:-1]
    for result in results:
        for name in (SUM, SQUARED_SUM):  # whole numbers, so that no order rounds
            result[name] = np.round(result[name]).astype(np.float64)
    there, space = sent(results, send), SPACE if form == "indexed" else None
    merged = merge_arrays(
        [merge_arrays(there[:2], search_space=space), merge_arrays(there[2:], search_space=space)],
        search_space=space,
    )
    assert_merged(merged, merge_arrays(results, search_space=space))
    merged[COUNT] = 10**6
    info = SearchInfo(search_space=space)
    write_partial(tmp_path / "R", "node0", merged, total_projections=10**6, search=info)
    stored = open_partials(tmp_path / "R").sel(partial="node0")
    for name, values in merged.items():
        assert name == COUNT or same_bits(stored[name], as_numpy(values)), name


def test_arrays_that_are_still_being_filled_on_other_streams(rng):
    import cupy

    results = results_of(rng, (2048, 2048), "explicit")
    work, streams = cupy.ones((3000, 3000)), []
    there = []
    for result in results:
        streams.append(cupy.cuda.Stream(non_blocking=True))
        maps = {n: v if n == COUNT else cupy.asarray(v) for n, v in result.items()}
        mip = cupy.zeros_like(maps[MIP])
        cupy.cuda.get_current_stream().synchronize()
        with streams[-1]:
            for _ in range(5):
                work @ work
            mip[...] = maps[MIP]
        there.append(maps | {MIP: mip})
    before = cupy.cuda.get_current_stream()
    merged = merge_arrays(there)
    assert cupy.cuda.get_current_stream() == before
    assert_merged(merged, merge_arrays(results))


def test_memory_besides_the_result_is_a_band(monkeypatch, rng):
    import cupy

    monkeypatch.setattr(in_memory, "_GPU_BAND_PIXELS", 2**16)
    pool = cupy.get_default_memory_pool()
    there = sent(results_of(rng, (2048, 2048), "explicit"), to_cupy)
    merge_arrays([{n: v if n == COUNT else v[:64] for n, v in r.items()} for r in there])
    pool.free_all_blocks()
    before = pool.total_bytes()
    merged = merge_arrays(there)
    result_nbytes = sum(v.nbytes for n, v in merged.items() if n != COUNT)
    assert pool.total_bytes() - before <= result_nbytes + 20 * 2**16 + 32 * 2**20
