"""Fuzz what reads stores until libFuzzer's options end it, or something is found.

``python -m tests.fuzz.fuzz_stores KIND... [-max_total_time=60 ...]``, from the repository's root; a
file instead of options is read once, as when a finding is looked into.
"""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from tests.fuzz.common import instrumented, main

with instrumented():
    from tests.builders import INDEXED, explicit_maps, indexed_maps

    import ocelot_em
    from ocelot_em.errors import OcelotError
    from ocelot_em.merge.plan import read_plan
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.store import attributes as fmt
    from ocelot_em.store import constants, statistics_attributes
    from ocelot_em.store.blosc import BloscChunk, encode, lz4_address
    from ocelot_em.store.metadata import parse_array, parse_group
    from ocelot_em.store.partials import write_partial
    from ocelot_em.store.search_info import Exposure, SearchInfo

# Numba could not compile what is instrumented.
from ocelot_em.kernels.streams import decode_planes, find_streams

Reader = Callable[[bytes], object]

SHAPE = (5, 6)
VALUES = np.arange(2**12, dtype=np.float32)
MAX_FILES = 64


def each(*reads: Callable[[], object]) -> None:
    """Do all of it, also where some is refused."""
    for read in reads:
        try:
            read()
        except OcelotError:
            continue


def write_stores(folder: Path) -> list[Path]:
    """Tiny valid stores of several kinds."""
    for number in range(2):
        maps, count = explicit_maps(SHAPE, number), 70 + number
        write_partial(folder / "explicit", f"gpu{number}", maps, total_projections=count)
        write_partial(
            folder / "indexed",
            f"gpu{number}",
            indexed_maps(SHAPE, number),
            total_projections=count,
            search=INDEXED,
        )
        write_partial(
            folder / "montage",
            "gpu",
            maps,
            total_projections=count,
            search=SearchInfo(
                template_box=2, exposure=Exposure(f"e{number}", (0, 3 * number), number)
            ),
        )
    for kind in ("explicit", "indexed", "montage"):
        ocelot_em.merge(folder / kind, folder / f"{kind}_merged")
    return sorted(folder.iterdir())


def metadata(folder: Path) -> tuple[list[bytes], Reader]:
    """Read a ``zarr.json``, as a group and as an array, and what a group's attributes are of."""
    seeds = {
        file.read_bytes() for place in write_stores(folder) for file in place.rglob("zarr.json")
    }
    models = [
        fmt.SearchAttributes,
        fmt.PartialAttributes,
        fmt.ExposureAttributes,
        statistics_attributes.StatisticsAttributes,
    ]

    def read(data: bytes) -> None:
        def merged() -> object:
            attributes = parse_group(data, "here")
            return read_plan(fmt.parse_attributes(fmt.MergedAttributes, attributes, "here"), "here")

        def array() -> None:
            about = parse_array(data, "here", "here", ("float32", "int64", "uint32"))
            assert 1 <= len(about.shape) == len(about.chunk)
            assert all(1 <= n < 2**31 for n in (*about.shape, *about.chunk))

        each(
            array,
            lambda: parse_array(data, "here", "here", ("float32",), constants.DIMENSIONS),
            merged,
            *(
                lambda model=model: fmt.parse_attributes(model, parse_group(data, "here"), "here")
                for model in models
            ),
        )

    return sorted(seeds), read


def frame(_folder: Path) -> tuple[list[bytes], Reader]:
    """Decode a chunk, whole, in parts and in blocks; its checksum and its sizes are made to fit."""
    settings = ((0, 0, 0), (5, 1, 0), (5, 1, 1024), (1, 2, 2048), (9, 0, 4096))
    seeds = [
        encode(values, Blosc(cname=cname, clevel=level, shuffle=shuffle, blocksize=block))[0]
        for cname in ("lz4", "zstd", "blosclz", "zlib")
        for level, shuffle, block in settings
        for values in (VALUES, VALUES % 7)
    ]

    def read(data: bytes) -> None:
        if len(data) >= 16:
            block, rest = data[8:12], data[16:]
            data = data[:4] + struct.pack("<I", VALUES.nbytes) + block
            data += struct.pack("<I", len(rest) + 16) + rest
        encoded = data + google_crc32c.value(data).to_bytes(4, "little")
        whole = np.empty_like(VALUES)

        def try_to(decode: Callable[[BloscChunk], object]) -> None:
            for memory in (memoryview(bytearray(encoded)), memoryview(encoded)):
                before = bytes(memory)
                try:
                    decode(BloscChunk(memory, VALUES.nbytes))
                except ValueError:
                    continue
                finally:
                    assert bytes(memory) == before

        def blocks(opened: BloscChunk) -> None:
            out = np.empty(VALUES.size // opened.n_blocks, np.float32)
            for number in range(opened.n_blocks):
                opened.decode_block(number, out)

        def in_kernel(opened: BloscChunk) -> None:
            opened.streams(find_streams)
            blocks = opened.blocks
            if blocks is None or not blocks.are_alike or blocks.n_streams != 4:
                return
            frame, n = np.frombuffer(opened.frame, np.uint8), blocks.nbytes // 4
            row = np.array([frame.ctypes.data, frame.size, 4])
            for block in range(blocks.n):
                to, parts = whole.ctypes.data, np.zeros(8, np.int64)
                decode_planes(lz4_address(), row, block, n, to, parts)

        try_to(in_kernel)
        try_to(lambda opened: opened.decode(whole))
        try_to(lambda opened: opened.decode_part(1000, 3000, whole))
        try_to(blocks)

    return seeds, read


def shard(folder: Path) -> tuple[list[bytes], Reader]:
    """Read maps from a shard: its index, whose CRC32C is put behind it, and the chunks."""
    maps = explicit_maps(SHAPE, 0)
    with patch.object(constants, "DEFAULT_CHUNK", 3):
        write_partial(folder / "S", "gpu", maps, total_projections=70, search=SearchInfo())
    file = folder / "S/partials/gpu/mip/c/0/0"
    original, index_nbytes = file.read_bytes(), 16 * 4

    def read(data: bytes) -> None:
        index, chunks = data[:index_nbytes], data[index_nbytes:]
        file.write_bytes(index + google_crc32c.value(index).to_bytes(4, "little") + chunks)
        found = ocelot_em.open_partials(folder / "S")["mip"].compute(scheduler="synchronous")
        np.testing.assert_array_equal(found[0], maps["mip"])  # the manifest has the checksums

    return [original[:index_nbytes] + original[index_nbytes + 4 :]], read


def whole_store(folder: Path) -> tuple[list[bytes], Reader]:
    """Read a store whose files are the input: which valid one it begins as, and what differs.

    The first byte chooses the store; then come a byte that chooses a file, a byte that says whether
    a checksum is put after the content, two bytes for its length and the content, and so on.
    """
    originals = write_stores(folder / "originals")
    files = [sorted(p for p in place.rglob("*") if p.is_file()) for place in originals]
    contents = {file: file.read_bytes() for own in files for file in own}

    def seed(which: int, number: int) -> bytes:
        content = contents[files[which][number]]
        is_chunk = files[which][number].name != "zarr.json"
        content = content[:-4] if is_chunk else json.dumps(json.loads(content)).encode()
        return struct.pack("<BBBH", which, number, is_chunk, len(content)) + content

    seeds = [
        seed(which, number)
        for which, own in enumerate(files)
        for number, file in [*enumerate(own[:256])][::3]  # mutations reach the others
        if len(contents[file]) < 2**12
    ]
    place = folder / "S"
    made: list[Path] = []

    def read(data: bytes) -> None:
        if not data:
            return
        which = data[0] % len(originals)
        if made[:1] != [originals[which]]:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(originals[which], place)
            made[:] = [originals[which]]
        changed, rest = [], data[1:]
        while len(rest) > 4 and len(changed) < MAX_FILES:
            number, has_crc, length = struct.unpack_from("<BBH", rest)
            content, rest = rest[4 : 4 + length], rest[4 + length :]
            if has_crc % 2:
                content += google_crc32c.value(content).to_bytes(4, "little")
            original = files[which][number % len(files[which])]
            (place / original.relative_to(originals[which])).write_bytes(content)
            changed.append(original)
        try:
            each(
                lambda: ocelot_em.describe(place),
                lambda: ocelot_em.check(place),
                lambda: ocelot_em.open_merged(place).isel(y=0).compute(scheduler="synchronous"),
                lambda: ocelot_em.open_partials(place).isel(y=0).compute(scheduler="synchronous"),
                lambda: MergedResult.open(place).summary,
                lambda: ocelot_em.find_peaks(place),
            )
        finally:
            for original in changed:
                target = place / original.relative_to(originals[which])
                target.write_bytes(contents[original])

    return seeds, read


KINDS = {"metadata": metadata, "frame": frame, "shard": shard, "store": whole_store}

if __name__ == "__main__":
    main(KINDS, sys.argv[1:], __doc__ or "")
