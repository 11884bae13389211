"""Pages that show how to do something: their commands and programs run, as they stand there."""

import re
import shlex
import shutil
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest

import ocelot_em
from conftest import CROPS, DATA
from ocelot_em.cli.exit_codes import DONE
from ocelot_em.cli.main import run
from report_pages import stub_rendering

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/format.md",
    "docs/montages.md",
    "docs/operations.md",
    "docs/particles.md",
    *(
        str(path.relative_to(ROOT))
        for folder in ("start", "concepts", "how-to")
        for path in sorted((ROOT / "docs" / folder).glob("*.md"))
    ),
]
ELSEWHERE = re.compile(r"ocelot (demo|doctor|view)|s3://|tcp://|slurm|cuda|--config")
"""What needs another machine, does not end, or has slow tests of its own."""

OPTICS = """\
micrograph_path: M.mrc
template_volume_path: T.mrc
optics_group: {label: A, pixel_size: 2.5, voltage: 200, defocus_u: 9000, defocus_v: 8600,
               astigmatism_angle: 30}
"""
MICROGRAPHS = """\
data_micrographs
loop_
_rlnMicrographName
_rlnDefocusU
_rlnDefocusV
_rlnDefocusAngle
_rlnVoltage
_rlnSphericalAberration
_rlnAmplitudeContrast
raw/M1.mrc 9000 8600 30 300 2.7 0.07
raw/M2.mrc 9500 9100 30 300 2.7 0.07
"""
ORIGINS = {"00": (0, 0), "01": (4, 150), "02": (3, 439)}
LAMELLA = "pixel_size: 3.0\nexposures:\n" + "".join(
    f'  - {{id: "{name}", origin: [{y}, {x}], acquired: {int(name)}, '
    f"partials: [{DATA}/montage/M_exp{name}_dev0.npz, {DATA}/montage/M_exp{name}_dev1.npz]}}\n"
    for name, (y, x) in ORIGINS.items()
)


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page):
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks(page, "bash")))
    lines = re.findall(r"^ocelot .*$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines if not ELSEWHERE.search(line)]


def programs(page):
    found = blocks(page, "python")
    return [block for block in found if "cluster=" not in block]


def write_masks(place, image):
    """Masks of the micrograph: an image, polygons, and a spatial constraint of Leopard-EM."""
    mrcfile.write(place / "ice.mrc", image)
    (place / "contamination.csv").write_text("polygon,y,x\n0,0,0\n0,0,90\n0,60,70\n")
    with h5py.File(place / "constraint.h5", "w") as file:
        for name, number in (("eligible", 1), ("n_orientations", 1000), ("n_defocus", 3)):
            file[f"maps/{name}"] = number * image.astype(np.int32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whatever the pages suppose to be there, under their names."""
    place = tmp_path_factory.mktemp("files")
    for number, crop in enumerate(CROPS):
        shutil.copy(crop, place / f"gpu{number}.npz")
    shutil.copy(DATA / "search_space.npz", place)
    (place / "match_template.yaml").write_text(OPTICS)
    (place / "00.yaml").write_text(OPTICS.replace("pixel_size: 2.5", "pixel_size: 3.0"))
    (place / "LAMELLA.yaml").write_text(LAMELLA)
    info = ocelot_em.ImportOptions(template_box=56, pixel_size_angstrom=2.5)
    ocelot_em.import_results(sorted(place.glob("gpu*.npz")), place / "RUN.zarr", info)
    ocelot_em.merge(place / "RUN.zarr", place / "MERGED.zarr")
    indexed = info.model_copy(update={"search_space": place / "search_space.npz"})
    ocelot_em.import_results(sorted(place.glob("gpu*.npz")), place / "INDEXED", indexed)
    ocelot_em.merge(place / "INDEXED", place / "40S.zarr")
    shutil.copytree(place / "40S.zarr", place / "60S.zarr")
    write_tables(place)
    for name in ("M1", "M2"):
        shutil.copytree(place / "RUN.zarr", place / "SEARCHES" / f"{name}.zarr")
    (place / "micrographs.csv").write_text("micrograph,search\nA1,SEARCHES/M1.zarr\n")
    (place / "micrographs_ctf.star").write_text(MICROGRAPHS)
    with np.load(CROPS[0]) as crop:
        later = {name: crop[name] for name in crop.files} | {"mip": crop["mip"] + 0.5}
    np.savez(place / "later.npz", **later)
    ocelot_em.import_results([place / "later.npz"], place / "NIGHT2.zarr", info)
    for name, template in (("RUN", "APO"), ("NIGHT2", "HOLO")):
        shutil.copytree(place / f"{name}.zarr", place / template / "M1.zarr")
    mrcfile.write(place / "micrograph.mrc", np.zeros_like(later["mip"]))
    write_masks(place, np.tri(128, k=40, dtype=np.int8))
    mrcfile.write(place / "template.mrc", np.zeros((56, 56, 56), np.float32))
    for target, output in (("mrc", "maps"), ("hdf5", "results.h5")):
        command = ["export", place / "MERGED.zarr", "--to", target, "--output", place / output]
        assert run([str(word) for word in command]) == DONE
    return place


def write_tables(place):
    """The result of a search with a correlation table."""
    space = ocelot_em.read_search_space_file(place / "search_space.npz")
    row = {"global_idx": [5], "pos_y": [9], "pos_x": [9], "corr_value": np.float32([50])}
    with np.load(CROPS[0]) as crop:
        result = {**crop, "correlation_table": {**row, "threshold": 5.5}}
    count, search = int(result["total_projections"]), ocelot_em.SearchInfo(search_space=space)
    ocelot_em.write_partial(
        place / "TABLES.zarr", "gpu0", result, total_projections=count, search=search
    )
    ocelot_em.merge(place / "TABLES.zarr", place / "MERGED_TABLES.zarr")


@pytest.fixture
def folder(files, tmp_path, monkeypatch, request):
    """A folder of their own, without what the page's commands make."""
    page = request.getfixturevalue("page")
    made = [
        Path(words[words.index("--output") + 1]) for words in commands(page) if "--output" in words
    ]
    made += [Path(name) for name in re.findall(r"^mkdir (\S+)$", "\n".join(blocks(page, "bash")))]
    skip = {path.parts[0] for path in made}
    for path in files.iterdir():
        if path.name not in skip:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the golden stores
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or programs(page)])
def test_what_a_page_shows_runs(page, folder, capsys, monkeypatch):
    stub_rendering(monkeypatch)
    for words in commands(page):
        assert run(words) == DONE, f"ocelot {shlex.join(words)}: {capsys.readouterr().err}"
    for name in programs(page):
        exec(compile(name, page, "exec"), names_of_the_pages())
    for store in re.findall(
        r"^`ocelot check (\S+)` finds no problem", (ROOT / page).read_text(), re.M
    ):
        assert ocelot_em.check(store) == []


def names_of_the_pages():
    """What the programs use and do not define."""
    with np.load("gpu0.npz") as file:
        result = {name: file[name] for name in file.files}
    n = int(result.pop("total_projections"))
    height, width = result["mip"].shape
    shares = [result | {"total_projections": n}, result | {"total_projections": n}]
    return {
        "ocelot_em": ocelot_em,
        "result": result,
        "n": n,
        "rank": 0,
        "height": height,
        "width": width,
        "maps_of": lambda region: {k: v[region.slices] for k, v in result.items() if v.ndim == 2},
        "result_of_gpu0": shares[0],
        "result_of_gpu1": shares[1],
        "results": shares,
    }
