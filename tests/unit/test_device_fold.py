"""Merging on a device: the same code and the same CUDA source, on a stand-in for the device."""

import dataclasses
import struct
from functools import partial

import google_crc32c
import numpy as np
import pytest
import zarr

import ocelot_em
from builders import unsealed
from helpers import (
    assert_same_maps,
    chunk_values,
    combinations,
    make_result,
    read_maps,
    write_search,
)
from host_device import HostDevice, LateDevice, host_kernels, lend_device
from montages import SHOTS, write_shots
from ocelot_em.errors import PlanError, TilesFailedError
from ocelot_em.kernels.cuda import MAX_SOURCES, CudaKernels
from ocelot_em.merge.memory_model import DEVICE_TABLES_NBYTES
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import MapSet, PartialMaps, PoseForm
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.transfer import Arrival
from stacks import SPACE as TEST_SPACE
from stacks import as_partial, assert_same, draw_partial, fold_at_once

COUNTS = (1000, 2**31 + 7, 300, 25, 3)
SHAPE = (45, 60)
FORMS = ["explicit", "indexed"]
DERIVED = ["stored", "none"]


@pytest.fixture
def lend(monkeypatch):
    """Make a device the machine's only GPU."""
    host_kernels()
    return partial(lend_device, monkeypatch)


def results_of(rng, shape=SHAPE, counts=COUNTS, ties=True):
    return [make_result(rng, shape, count, ties=ties) for count in counts]


def merge(search, output, **options):
    return ocelot_em.merge(search, output, threads=2, **options)


@pytest.mark.parametrize(
    ("form", "nan", "tile_size", "make_device", "derived"),
    combinations(
        *(FORMS, ["raise", "mask"], [16, 33, None], [HostDevice, LateDevice], DERIVED),
        fast=[
            ("explicit", "raise", 33, HostDevice, "none"),
            ("indexed", "mask", 33, LateDevice, "none"),
            ("explicit", "mask", 16, LateDevice, "stored"),
            ("indexed", "raise", None, HostDevice, "stored"),
        ],
    ),
)
def test_a_device_gives_the_values_of_the_cpu(
    tmp_path, rng, lend, form, nan, tile_size, make_device, derived
):
    indexed = form == "indexed"
    results, counts = results_of(rng), [*COUNTS]
    if tile_size == 33:
        counts[2] = rng.integers(1, 300, SHAPE)
    results[1]["mip"][:3] = -np.inf
    results[1]["best_global_index"][:3] = -1
    search = write_search(tmp_path / "RUN.zarr", results, counts, indexed=indexed)
    if nan == "mask":
        spoil(search, "p2", "correlation_sum", (slice(5, 9), slice(None)))
    options = {"tile_size": tile_size, "nan": nan, "derived": derived}
    merge(search, tmp_path / "CPU.zarr", **options)
    device = lend(make_device())
    merge(search, tmp_path / "GPU.zarr", device="cuda", **options)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")
    assert "finalise" in device.launched


def spoil(search, partial, name, where):
    """Put NaN and infinities into a map of a finished partial."""
    array = zarr.open_array(unsealed(search) / "partials" / partial / name, mode="r+")
    values = array[where]
    array[where] = np.where(np.arange(values.size).reshape(values.shape) % 2, np.inf, np.nan)


@pytest.mark.parametrize("indexed", [False, True], ids=FORMS)
def test_whole_chunks_are_decoded_and_encoded_there(tmp_path, rng, lend, indexed, monkeypatch):
    shape, n_maps = (128, 264), 4 if indexed else 8
    search = write_search(tmp_path / "RUN.zarr", results_of(rng, shape), COUNTS, indexed=indexed)
    derived = "none" if indexed else "stored"
    merge(search, tmp_path / "CPU.zarr", derived=derived)
    device = lend(LateDevice())
    with monkeypatch.context() as context:
        context.setattr(Arrival, "decode", None)
        merge(search, tmp_path / "GPU.zarr", derived=derived, device="cuda")
    assert device.launched.count("decode_streams") == n_maps * len(COUNTS)
    assert device.launched.count("encode_streams") == (10 if indexed else 12)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")
    there, here = (MergedResult.open(tmp_path / f"{on}.zarr").statistics for on in ("GPU", "CPU"))
    for one, other in zip(there.sources, here.sources, strict=True):
        one, other = (s.model_dump(exclude={"name"}) for s in (one, other))
        assert one == pytest.approx(other, rel=1e-9)


def test_a_chunk_that_the_device_cannot_decode_is_named(tmp_path, rng, lend):
    results = results_of(rng, (128, 264))
    search = unsealed(write_search(tmp_path / "RUN.zarr", results, COUNTS))
    chunk = search / "partials" / "p2" / "best_psi" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes()[:-4])
    start = struct.unpack_from("<I", content, 16)[0] + 4
    content[start : start + 2] = b"\xff\xff"
    chunk.write_bytes(content + struct.pack("<I", google_crc32c.value(bytes(content))))
    lend(HostDevice())
    with pytest.raises(TilesFailedError, match=r"'p2': best_psi: chunk \(0, 0\).*LZ4 streams"):
        merge(search, tmp_path / "OUT.zarr", device="cuda")


@pytest.mark.parametrize("indexed", [False, True], ids=FORMS)
def test_earlier_merges_go_on_on_a_device(tmp_path, rng, lend, indexed):
    results = results_of(rng)
    write_search(tmp_path / "a.zarr", results[:3], COUNTS[:3], indexed=indexed)
    write_search(tmp_path / "b.zarr", results[3:], COUNTS[3:], indexed=indexed, first=3)
    merge(tmp_path / "a.zarr", tmp_path / "A.zarr")
    inputs = [tmp_path / "b.zarr", tmp_path / "A.zarr"]
    merge(inputs, tmp_path / "CPU.zarr")
    lend(LateDevice())
    merge(inputs, tmp_path / "GPU.zarr", device="cuda")
    assert_same_maps(read_maps(tmp_path / "GPU.zarr"), read_maps(tmp_path / "CPU.zarr"))


@pytest.mark.parametrize(
    ("form", "nan", "overlap", "derived"),
    combinations(
        *(FORMS, ["raise", "mask"], ["earliest", "max-zscore"], DERIVED),
        fast=[
            ("explicit", "mask", "earliest", "stored"),
            ("indexed", "raise", "max-zscore", "none"),
        ],
    ),
)
def test_montages_are_merged_on_a_device(tmp_path, lend, form, nan, overlap, derived):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS, indexed=form == "indexed")
    options = {"tile_size": 20, "nan": nan, "overlap": overlap, "derived": derived}
    merge(search, tmp_path / "CPU.zarr", **options)
    device = lend(LateDevice())
    merge(search, tmp_path / "GPU.zarr", device="cuda", **options)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")
    assert "finalise" in device.launched
    places = [tmp_path / f"{on}.zarr" for on in ("CPU", "GPU")]
    tables = [ocelot_em.find_peaks(place, cutoff=6.0, micrograph="M") for place in places]
    assert len(tables[0]) > 0
    for name, values in tables[0].columns.items():
        np.testing.assert_array_equal(values, tables[1].columns[name], err_msg=name)


@pytest.mark.parametrize("indexed", [pytest.param(False, marks=pytest.mark.slow), True], ids=FORMS)
def test_device_memory_is_predicted_and_kept(tmp_path, rng, lend, indexed):
    shape, counts = (256, 350), (10,) * 24
    results = results_of(rng, shape, counts)
    search = write_search(tmp_path / "RUN.zarr", results, counts, indexed=indexed)
    merge(search, tmp_path / "CPU.zarr", tile_size=128)
    plan = {}

    class Note(ocelot_em.Observer):
        def planned(self, ready, options):
            plan.update(dataclasses.asdict(ready.forecast))

    # All partials of a tile do not fit: several passes, within the limit.
    room = (12 if indexed else 16) * 2**20
    limit = DEVICE_TABLES_NBYTES + room
    assert 24 * shape[0] * shape[1] * (16 if indexed else 32) > 2 * room
    device = lend(HostDevice(limit), memory_nbytes=limit)
    merge(search, tmp_path / "GPU.zarr", tile_size=128, device="cuda", observer=Note())
    assert 1 < plan["partials_on_device"] < 24
    tiles = plan["device_nbytes"] - DEVICE_TABLES_NBYTES
    assert 0.8 * tiles < device.peak_nbytes <= plan["device_nbytes"] <= limit
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")


def test_when_others_hold_the_memory_fewer_partials_go_there_at_a_time(tmp_path, rng, lend, caplog):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng), COUNTS)
    merge(search, tmp_path / "CPU.zarr")
    least = SHAPE[0] * SHAPE[1] * (60 + 2 * 32) + 1000
    lend(HostDevice(least))
    merge(search, tmp_path / "GPU.zarr", device="cuda")
    assert "less free memory than planned" in caplog.text
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")


def test_without_any_memory_it_says_so_and_can_go_on_later(tmp_path, rng, lend):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng), COUNTS)
    lend(HostDevice(1000))
    with pytest.raises(TilesFailedError, match="bytes more do not fit"):
        merge(search, tmp_path / "GPU.zarr", tile_size=33, device="cuda")
    merge(search, tmp_path / "GPU.zarr", tile_size=33, device="cpu")
    merge(search, tmp_path / "CPU.zarr", tile_size=33)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")


def test_a_plan_that_no_device_holds_is_refused_with_numbers(tmp_path, rng, lend):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng, (300, 300)), COUNTS)
    lend(HostDevice(), memory_nbytes=65 * 2**20)
    with pytest.raises(
        PlanError,
        match=r"device memory: .*tiles of 128 pixels need [\d,]+ bytes .*, but [\d,]+ bytes are",
    ):
        merge(search, tmp_path / "OUT.zarr", device="cuda")
    assert not (tmp_path / "OUT.zarr").exists()


def test_tiles_shrink_to_the_device(tmp_path, rng, lend):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng, (300, 300)), COUNTS)
    lend(HostDevice(), memory_nbytes=76 * 2**20)
    report = merge(search, tmp_path / "OUT.zarr", device="cuda")
    assert report.n_tiles == 9


def test_bad_values_are_named(tmp_path, rng, lend):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng), COUNTS)
    spoil(search, "p3", "best_psi", (40, 50))
    lend(HostDevice())
    with pytest.raises(TilesFailedError, match=r"'p3': best_psi: NaN at 1 pixel, first \(40, 50\)"):
        merge(search, tmp_path / "OUT.zarr", device="cuda")


def test_the_choice_and_its_reason_are_recorded(tmp_path, rng, lend):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng), COUNTS)
    lend(HostDevice())
    for asked, kind, reason in (("cuda", "cuda", "1 x stand-in"), ("auto", "cpu", "auto: reading")):
        merge(search, tmp_path / f"{asked}.zarr", device=asked)
        options = ocelot_em.describe(tmp_path / f"{asked}.zarr").attributes.provenance.options
        assert options["device"] == kind
        assert reason in options["device_reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "cuda", "device": "cpu"}, "needs GPUs"),
        ({"cluster": "local", "device": "cuda"}, "use --cluster cuda"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, rng, options, message):
    search = write_search(tmp_path / "RUN.zarr", results_of(rng), COUNTS)
    with pytest.raises(PlanError, match=message):
        ocelot_em.merge(search, tmp_path / "OUT.zarr", **options)
    assert not (tmp_path / "OUT.zarr").exists()


# The kernels, beyond the contract that all kernels share.


@pytest.fixture
def cuda():
    host_kernels()
    return CudaKernels(HostDevice())


def test_tables_stay_while_a_kernel_reads_them(cuda, monkeypatch):
    """Even if another thread needs another search space meanwhile, as with groups."""
    maps, other = MapSet(PoseForm.INDEXED), SearchSpace.from_tables(np.full((5, 3), 7), [0], [0])
    acc = cuda.identity((3, 37), maps)
    cuda.fold_all(acc, [draw_partial(np.random.default_rng(0), (3, 37), maps, 0)], TEST_SPACE)
    device, launch, sizes = cuda._device, cuda._device.launch, []

    def meanwhile(*arguments):
        sizes.append(device.nbytes)
        cuda._on_device(other)
        sizes.append(device.nbytes)
        launch(*arguments)

    monkeypatch.setattr(device, "launch", meanwhile)
    merged = cuda.finalise(acc, maps, TEST_SPACE)
    assert sizes[1] == sizes[0] + 4 * (15 + 1 + 1)
    np.testing.assert_array_equal(
        merged["best_defocus"], TEST_SPACE.decode(merged["best_global_index"])[3]
    )


@pytest.mark.parametrize("form", list(PoseForm))
def test_unaligned_maps_and_many_partials(cuda, form):
    from ocelot_em.kernels import load

    rng, maps, n = np.random.default_rng(3), MapSet(form), 2 * MAX_SOURCES + 3
    partials = [draw_partial(rng, (3, 37), maps, number) for number in range(n)]
    expected, _ = fold_at_once(load("cpu"), maps, partials)
    for offset in (0, 4):

        def moved(values, offset=offset):
            memory = np.zeros(values.nbytes + offset, np.uint8)[offset:]
            memory = memory.view(values.dtype).reshape(values.shape)
            memory[...] = values
            return memory

        shifted = [dataclasses.replace(p, mip=moved(p.mip)) for p in partials]
        acc, _ = fold_at_once(cuda, maps, shifted)
        assert_same(acc, expected)


def test_fresh_is_reset_and_fold(cuda):
    from ocelot_em.kernels import load

    rng, maps = np.random.default_rng(4), MapSet(PoseForm.INDEXED, counts=True)
    partials = [draw_partial(rng, (5, 9), maps, number) for number in range(3)]
    for kernels in (cuda, load("cpu"), load("reference")):
        expected, _ = fold_at_once(kernels, maps, partials)
        acc, _ = fold_at_once(kernels, maps, partials[::-1])
        kernels.fold_all(acc, partials, TEST_SPACE, fresh=True)
        assert_same(acc, expected)
        kernels.fold_all(acc, [], TEST_SPACE, fresh=True)
        assert_same(acc, kernels.identity((5, 9), maps))


def test_arrays_that_a_kernel_cannot_read_are_refused(cuda):
    maps = MapSet(PoseForm.EXPLICIT)
    acc = cuda.identity((4, 4), maps)
    fine = as_partial(acc)
    narrow = np.zeros((4, 8), np.float32)[:, ::2]
    for mip in (narrow, fine.mip.astype(np.float64), np.zeros((4, 5), np.float32)):
        with pytest.raises(ValueError, match="C-contiguous array of 16 values of float32"):
            cuda.fold_all(acc, [fine, dataclasses.replace(fine, mip=mip)], None)
    with pytest.raises(ValueError, match="5 pose maps, got 4"):
        cuda.fold_all(acc, [dataclasses.replace(fine, pose=fine.pose[:4])], None)
    assert_same(acc, cuda.identity((4, 4), maps))


def test_the_stand_in_notices_what_is_used_too_early():
    host_kernels()
    device = LateDevice()
    there, slab = device.empty(4, "f4"), np.arange(4, dtype="f4")
    mark = device.copy_in(slab, there)
    slab[...] = 7
    mark.synchronize()
    assert list(there) == [7, 7, 7, 7]


def test_every_pixel_counts(cuda):
    n = 1037
    zeros = np.zeros((1, n), np.float32)
    partial = PartialMaps(np.ones((1, n), np.float32), (zeros,) * 5, zeros, zeros, 1, 0)
    acc = cuda.identity((1, n), MapSet(PoseForm.EXPLICIT))
    cuda.fold_all(acc, [partial], None)
    assert (acc.best_partial == 0).all()
