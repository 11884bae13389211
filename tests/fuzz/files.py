"""Readers of foreign files for fuzzing: for each kind of file, tiny valid ones and what reads it.

A kind is a function that is given a folder of its own and returns seeds and a reader of bytes. The
reader takes anything: it returns, or raises an OcelotError.
"""

import io
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import torch
from tests.builders import SPACE, explicit_maps, indexed_maps

from ocelot_em import import_results, read_search_space_file
from ocelot_em.io.description import placed_exposures, read_description
from ocelot_em.io.finished import import_finished
from ocelot_em.io.hdf5 import GROUP
from ocelot_em.io.import_options import ImportOptions
from ocelot_em.io.leopard_maps import OUR_NAMES
from ocelot_em.io.optics import Optics
from ocelot_em.io.origins import read_origins
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.io.yaml_file import read_yaml
from ocelot_em.model.maps import COUNT, MIP
from ocelot_em.model.search_space import TABLES
from ocelot_em.particles.table import COLUMNS, MONTAGE_COLUMNS, NEG_LOG_P, ParticleTable, PickInfo

Reader = Callable[[bytes], object]
Kind = Callable[[Path], tuple[list[bytes], Reader]]

SHAPE = (5, 6)
N_PROJECTIONS = 1000
TABLE_ARRAYS = {name: getattr(SPACE, name) for name in TABLES}


def in_file(path: Path, read: Callable[[Path], object]) -> Reader:
    """Return a reader of bytes from what reads a file."""

    def reader(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reader


def into_search(folder: Path, convert: Callable[[Path], object]) -> None:
    """Convert a file into a new search, which is removed."""
    output = folder / "OUT.zarr"
    try:
        convert(output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def of_bytes(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def npz_bytes(maps: Mapping[str, object], *, compressed: bool = False) -> bytes:
    save = np.savez_compressed if compressed else np.savez
    return of_bytes(lambda buffer: save(buffer, **maps))


def pt_bytes(content: object) -> bytes:
    return of_bytes(lambda buffer: torch.save(content, buffer))


def tensors(maps: Mapping[str, np.ndarray]) -> dict[str, object]:
    return {name: torch.from_numpy(values) for name, values in maps.items()}


def results() -> list[dict[str, np.ndarray]]:
    """Results with explicit poses, and with indices."""
    return [explicit_maps(SHAPE), indexed_maps(SHAPE) | TABLE_ARRAYS]


def with_member(archive: bytes, member: str, data: bytes) -> bytes:
    """Return a zip archive with a member's bytes replaced, its checksum right."""

    def save(buffer: io.BytesIO) -> None:
        with (
            zipfile.ZipFile(io.BytesIO(archive)) as given,
            zipfile.ZipFile(buffer, "w") as written,
        ):
            for info in given.infolist():
                written.writestr(
                    info.filename, data if info.filename == member else given.read(info)
                )

    return of_bytes(save)


def result_reader(folder: Path, suffix: str) -> Reader:
    return in_file(
        folder / f"A{suffix}",
        lambda path: into_search(folder, lambda output: import_results([path], output)),
    )


def npz(folder: Path) -> tuple[list[bytes], Reader]:
    """Whole archives."""
    contents = [maps | {COUNT: np.int64(N_PROJECTIONS)} for maps in results()]
    seeds = [npz_bytes(content, compressed=c) for content in contents for c in (False, True)]
    return seeds, result_reader(folder, ".npz")


def npy(folder: Path) -> tuple[list[bytes], Reader]:
    """A member of a ``.npz`` file, whose checksum is always right."""
    archive = npz_bytes(explicit_maps(SHAPE) | {COUNT: np.int64(N_PROJECTIONS)})
    read = result_reader(folder, ".npz")
    seeds = [
        of_bytes(lambda buffer, v=values: np.save(buffer, v))  # type: ignore[misc]
        for values in (explicit_maps(SHAPE)[MIP], explicit_maps(SHAPE)[MIP].astype(">f4"))
    ]
    return seeds, lambda data: read(with_member(archive, f"{MIP}.npy", data))


def npy_count(folder: Path) -> tuple[list[bytes], Reader]:
    """The number of projections in a ``.npz`` file."""
    archive = npz_bytes(explicit_maps(SHAPE) | {COUNT: np.int64(N_PROJECTIONS)})
    read = result_reader(folder, ".npz")
    seeds = [
        of_bytes(lambda buffer, v=value: np.save(buffer, v))  # type: ignore[misc]
        for value in (np.int64(3), np.uint8([3]), np.array([[2**40]], ">i8"))
    ]
    return seeds, lambda data: read(with_member(archive, f"{COUNT}.npy", data))


def pt(folder: Path) -> tuple[list[bytes], Reader]:
    """Whole archives."""
    contents = [tensors(maps) | {COUNT: N_PROJECTIONS} for maps in results()]
    return [pt_bytes(content) for content in contents], result_reader(folder, ".pt")


def pt_pickle(folder: Path) -> tuple[list[bytes], Reader]:
    """The pickle of a ``.pt`` file, whose checksum is always right."""
    archive = pt_bytes(tensors(explicit_maps(SHAPE)) | {COUNT: N_PROJECTIONS})
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        (member,) = (name for name in opened.namelist() if name.endswith("/data.pkl"))
        seed = opened.read(member)
    read = result_reader(folder, ".pt")
    return [seed], lambda data: read(with_member(archive, member, data))


def search_space(folder: Path) -> tuple[list[bytes], Reader]:
    seeds = [npz_bytes(TABLE_ARRAYS), npz_bytes(TABLE_ARRAYS, compressed=True)]
    return seeds, in_file(folder / "SPACE.npz", read_search_space_file)


def finished_maps() -> dict[str, np.ndarray]:
    """The maps of a finished search, without the z-score: these may have any values."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(1, 2, SHAPE).astype(np.float32)
        for name in OUR_NAMES
        if name != "scaled_mip"
    }


def mrc(folder: Path) -> tuple[list[bytes], Reader]:
    """One of the files of a set."""
    inputs = folder / "SET"
    inputs.mkdir()
    for name, values in finished_maps().items():
        with mrcfile.new(inputs / f"{name}.mrc", values) as file:
            file.voxel_size = 1.06
    path = inputs / "mip.mrc"
    seed = path.read_bytes()
    values = finished_maps()["mip"]
    with mrcfile.new(folder / "BIG.mrc") as file:
        file.set_extended_header(np.zeros(32, "V1"))
        file.set_data(values.astype(">f4"))
    seeds = [seed, (folder / "BIG.mrc").read_bytes()]
    about = ImportOptions(total_projections=(N_PROJECTIONS,))
    read = in_file(
        path,
        lambda _: into_search(folder, lambda output: import_finished(inputs, output, about)),
    )
    return seeds, read


def hdf5(folder: Path) -> tuple[list[bytes], Reader]:
    seeds = []
    for libver in ("earliest", "latest"):
        with h5py.File(folder / "SEED.h5", "w", libver=libver) as file:
            file.attrs["total_projections"] = N_PROJECTIONS
            file.attrs["pixel_size_angstrom"] = 1.06
            for name, values in finished_maps().items():
                file.create_dataset(f"{GROUP}/{name}", data=values, chunks=SHAPE, compression=4)
        seeds.append((folder / "SEED.h5").read_bytes())
    read = in_file(
        folder / "A.h5",
        lambda path: into_search(folder, lambda output: import_finished(path, output)),
    )
    return seeds, read


def csv_origins(folder: Path) -> tuple[list[bytes], Reader]:
    seed = b'exposure,y,x,acquired\n"00",0,0,3\n01,-12.5,3686.25,2\n'
    return [seed], in_file(folder / "ORIGINS.csv", read_origins)


def star_origins(folder: Path) -> tuple[list[bytes], Reader]:
    seeds = [
        b"data_exposures\n\nloop_\n_exposure #1\n_y #2\n_x #3\n_acquired #4\n"
        b'00 0 0 3\n"01" -12.5 3686.25 2\n',
        b"data_optics\n\n_rlnImagePixelSize 1.06\n\ndata_a\n\n_rlnMicrographName A/00.mrc\n"
        b"_rlnCoordinateX 0.0\n_rlnCoordinateY 1\n",
    ]
    return seeds, in_file(folder / "ORIGINS.star", read_origins)


def mdoc(folder: Path) -> tuple[list[bytes], Reader]:
    seed = (
        b"PixelSpacing = 4.603\nMontage = 1\n\n[T = SerialEM: Titan   08-Jul-22 10:11]\n\n"
        b"[ZValue = 0]\nPieceCoordinates = 0 0 0\nAlignedPieceCoords = 2 3 0\n"
        b"SubFramePath = X:\\a\\00.tif\nDateTime = 08-Jul-22  10:11:12\n\n"
        b"[ZValue = 1]\nPieceCoordinates = 100 0 0\nAlignedPieceCoords = 104 3 0\n"
        b"SubFramePath = X:\\a\\01.tif\nDateTime = 2022-Jul-08  10:12:12\n"
    )

    def read(path: Path) -> object:
        return read_origins(path), read_origins(path, flip_y=True, coordinates="piece")

    return [seed], in_file(folder / "ORIGINS.mdoc", read)


def yaml(folder: Path) -> tuple[list[bytes], Reader]:
    seeds = [
        b'a: 1\nb: [1.5, x, {c: null}]\nd:\n  - 2026-01-02 03:04:05\n  - "q\\x41"\n',
        b"a: &x 1\nb: *x\nc: !!str 1\n<<: {d: 0x1F}\n? e\n: |-\n  f\n",
    ]
    return seeds, in_file(folder / "A.yaml", lambda path: read_yaml(path, "a mapping"))


def description(folder: Path) -> tuple[list[bytes], Reader]:
    (folder / "o.csv").write_text("exposure,y,x,acquired\na,0,0,3\nb,-12.5,36.25,2\n")
    seed = (
        b'pixel_size: 3.0\nsearch_space: s.npz\ntemplate_box: 40\nexposures:\n  - id: "00"\n'
        b"    origin: [2, 1e1]\n    acquired: 0\n    valid_shape: [265, 297]\n"
        b"    partials: [a.npz, b.npz]\n    total_projections: [172, 924]\n"
    )
    with_file = b"origins: {file: o.csv}\nexposures: [{id: a, partials: [a.npz]}]\n"

    def read(path: Path) -> object:
        return placed_exposures(read_description(path), path)

    return [seed, with_file], in_file(folder / "RUN.yaml", read)


def leopard_config(folder: Path) -> tuple[list[bytes], Reader]:
    header = bytearray(1024)
    header[:12] = np.array([57, 57, 57], "<i4").tobytes()
    header[208:212] = b"MAP "
    (folder / "T.mrc").write_bytes(header)
    seed = (
        b"template_volume_path: T.mrc\nmicrograph_path: M1.mrc\noptics_group:\n"
        b"  label: g\n  voltage: 300.0\n  spherical_aberration: 2.7\n"
        b"  amplitude_contrast_ratio: 0.07\n  pixel_size: 1.06\n  defocus_u: 9.1e+3\n"
        b"  defocus_v: 8600\n  astigmatism_angle: 30.5\n  phase_shift: 0.0\n"
        b"  even_zernikes: {a: [1, 2]}\n  mag_matrix: [[1, 0], [0, 1]]\n"
        b"match_template_result:\n  mip_path: mip.mrc\n  total_projections: 1000\n"
    )
    return [seed], in_file(folder / "CONFIG.yaml", Optics.from_leopard_yaml)


def particles(n: int, *, montage: bool = False) -> ParticleTable:
    """Particles, of a montage with what they were picked by."""
    rng = np.random.default_rng(n)
    names = [*COLUMNS, *MONTAGE_COLUMNS] if montage else [c for c in COLUMNS if c != NEG_LOG_P]
    columns = {}
    for name in names:
        dtype = (COLUMNS | MONTAGE_COLUMNS)[name].dtype  # type: ignore[operator]
        columns[name] = (
            np.array([f"e{i}" for i in range(n)], str)
            if dtype == "str"
            else (1000 * rng.normal(size=n)).astype(dtype)
        )
    about = PickInfo("OUT.zarr", "gaussian", 6.5, 5.0, 1.0, 2.5, (432, 480), (377, 425), "exposure")
    return ParticleTable(columns, about if montage else None)


def particles_csv(folder: Path) -> tuple[list[bytes], Reader]:
    path, seeds = folder / "P.csv", []
    for table in (particles(2), particles(2, montage=True)):
        table.to_csv(path)
        seeds.append(path.read_bytes())
    return seeds, in_file(path, ParticleTable.read_csv)


def particles_parquet(folder: Path) -> tuple[list[bytes], Reader]:
    path, seeds = folder / "P.parquet", []
    for table in (particles(2), particles(2, montage=True)):
        write_parquet(table, path, overwrite=True)
        seeds.append(path.read_bytes())
    return seeds, in_file(path, read_parquet)


KINDS: Mapping[str, Kind] = {
    kind.__name__: kind
    for kind in (
        npz,
        npy,
        npy_count,
        pt,
        pt_pickle,
        search_space,
        mrc,
        hdf5,
        csv_origins,
        star_origins,
        mdoc,
        yaml,
        description,
        leopard_config,
        particles_csv,
        particles_parquet,
    )
}
"""By their names, in the order of what they read."""
