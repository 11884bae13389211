"""The examples of docstrings work as they stand, and every public name has one."""

import doctest
import importlib
import inspect
import shutil
from pathlib import Path

import pytest

import ocelot_em

ROOT = Path(ocelot_em.__file__).parent
PUBLIC = sorted(
    name
    for name in ocelot_em.__all__
    if inspect.isroutine(value := getattr(ocelot_em, name)) or inspect.isclass(value)
)

WITHOUT_EXAMPLE = {
    "ImportOptions",
    "MergeOptions",
    "MergeReport",
    "Observer",
    "OcelotError",
    "Optics",
    "Region",
    "import_description",
    "import_results",
    "merge",
    "plot_correlations",
    "plot_crop",
    "plot_defocus",
    "plot_distributions",
    "plot_joint",
    "plot_partials",
    "plot_poses",
    "plot_psi",
    "plot_survival",
    "plot_zscore",
    "read_search_space_file",
    "write_cistem_star",
    "write_leopard_csv",
    "write_relion_star",
    "write_report",
}
"""Public names whose docstring lacks an example that runs. Who writes one removes the name."""


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
def stores(tmp_path_factory):
    """A search and its merged result, which examples may read as if they were the reader's own."""
    folder = tmp_path_factory.mktemp("examples")
    simulation = ocelot_em.Simulation(
        (300, 400), n_partials=3, n_particles=20, seed=1, form="indexed", projections_per_pose=159
    )
    ocelot_em.simulate(folder, simulation).rename(folder / "SEARCH.zarr")
    ocelot_em.merge(folder / "SEARCH.zarr", folder / "MERGED.zarr", tile_size=256)
    return folder


@pytest.mark.parametrize(
    "test", as_parameters([*examples_of_public_names(), *examples_of_modules()])
)
def test_an_example_works(test, request, tmp_path, monkeypatch):
    """In a folder that is empty, but for the stores that it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("SEARCH.zarr", "MERGED.zarr"):
        if name in test.docstring:
            shutil.copytree(request.getfixturevalue("stores") / name, tmp_path / name)
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


def test_public_names_have_examples():
    """The list of those without only becomes shorter."""
    with_example = {
        test.name.partition(".")[0] for test in examples_of_public_names() if runs(test)
    }
    assert set(PUBLIC) - with_example == WITHOUT_EXAMPLE
