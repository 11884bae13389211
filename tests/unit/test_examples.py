"""The examples of docstrings work as they stand, and every public name has one."""

import doctest
import importlib
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.model.search_space import TABLES

ROOT = Path(ocelot_em.__file__).parent
PUBLIC = sorted(
    name
    for name in ocelot_em.__all__
    if inspect.isroutine(value := getattr(ocelot_em, name)) or inspect.isclass(value)
)


def examples_of_public_names():
    """What a reader copies: it imports all that it uses."""
    finder = doctest.DocTestFinder()
    for name in PUBLIC:
        value = getattr(ocelot_em, name)
        yield from finder.find(value, name, inspect.getmodule(value), globs={})


def examples_of_modules():
    """Those of other names, which use what their module has."""
    public = {(test.filename, test.lineno) for test in examples_of_public_names()}
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            for test in doctest.DocTestFinder().find(module):
                if (test.filename, test.lineno) not in public:
                    yield test


def runs(test):
    return any(not example.options.get(doctest.SKIP) for example in test.examples)


def as_parameters(tests):
    return [pytest.param(test, id=test.name) for test in tests if runs(test)]


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """What examples name as if it were the reader's own: a search, its result, files to import."""
    folder = tmp_path_factory.mktemp("examples")
    shape = 300, 400
    about = {"shape": shape, "n_partials": 3, "n_particles": 20, "seed": 1}
    indexed = ocelot_em.Simulation(**about, form="indexed", projections_per_pose=159)
    ocelot_em.simulate(folder, indexed).rename(folder / "SEARCH.zarr")
    ocelot_em.merge(folder / "SEARCH.zarr", folder / "MERGED.zarr", tile_size=256)
    write_mrc_set(folder / "MERGED.zarr", folder / "maps")
    explicit = ocelot_em.Simulation(**about)
    for number, count in enumerate(explicit.counts):
        maps = explicit.partial_block(number, ocelot_em.Region(0, shape[0], 0, shape[1]))
        np.savez(folder / f"gpu{number}.npz", **maps, total_projections=count)
    space = explicit.search_space
    tables = {name: getattr(space, name) for name in TABLES}
    np.savez(folder / "search_space.npz", **tables)
    exposures = [
        {"id": f"0{k}", "origin": [0, 350 * k], "acquired": k, "partials": [f"gpu{k}.npz"]}
        for k in range(2)
    ]
    (folder / "LAMELLA.yaml").write_text(json.dumps({"exposures": exposures}))
    ocelot_em.import_description(folder / "LAMELLA.yaml", folder / "LAMELLA.zarr")
    ocelot_em.merge(folder / "LAMELLA.zarr", folder / "MONTAGE.zarr")
    return folder


OWN = (
    "SEARCH.zarr",
    "MERGED.zarr",
    "MONTAGE.zarr",
    "maps",
    "gpu0.npz",
    "gpu1.npz",
    "search_space.npz",
)


@pytest.mark.parametrize(
    "test", as_parameters([*examples_of_public_names(), *examples_of_modules()])
)
def test_an_example_works(test, request, tmp_path, monkeypatch):
    """In a folder that is empty, but for what it names of the reader's own."""
    monkeypatch.chdir(tmp_path)
    for name in OWN:
        if name in test.docstring:
            file = request.getfixturevalue("own") / name
            (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / name)
    printed = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)


def test_public_names_have_examples():
    with_example = {
        test.name.partition(".")[0] for test in examples_of_public_names() if runs(test)
    }
    assert set(PUBLIC) == with_example
