"""Who imports whom: one way, and heavy packages only where they belong and when they are needed."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import ocelot_em

PACKAGE = "ocelot_em"
ROOT = Path(ocelot_em.__file__).parent
MODULES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return the source of each module, parsed."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


FLOORS = (
    ("errors",),
    ("model",),
    ("store", "kernels"),
    ("merge",),
    ("process_results", "leopard"),
    ("particles",),
    ("io",),
    ("view",),
    ("testing",),
    ("run",),
    ("cli",),
    ("__main__",),
)
"""Folders, and modules beside them, from the lowest up."""

FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}

HOME = {
    "zarr": {"io.ome_zarr"},
    "numcodecs": {"cli.doctor", "store.blosc"},
    "google_crc32c": {"cli.doctor", "store.blosc"},
    "obstore": {"store"},
    "dask": {"run", "merge.lazy"},
    "distributed": {"run", "cli.doctor_cluster"},
    "dask_jobqueue": {"run.slurm"},
    "prometheus_client": {"run.metrics"},
    "psutil": {"cli.doctor", "store.lock"},
    "xarray": {"merge.lazy"},
    "numba": {"kernels"},
    "llvmlite": {"kernels.ahead", "kernels.build", "kernels.jit"},
    "cupy": {"kernels.device", "model.arrays"},
    "cupyx": {"kernels.device"},
    "dask_cuda": {"run.clusters"},
    "leopard_em": {"leopard"},
    "torch": {"model.arrays", "process_results"},
    "cyclopts": {"cli"},
    "rich": {"cli", "model.progress"},
    "IPython": {"model.progress"},
    "jinja2": {"model.html"},
    "bokeh": {"run.panel", "view"},
    "matplotlib": {"view"},
    "mrcfile": {"io.mrc"},
    "h5py": {"io.hdf5"},
    "isal": {"io.hdf5"},
    "gemmi": {"io.star_file"},
    "pyarrow": {"io.parquet"},
    "pandas": {"particles.column_table", "io.tables", "view.index"},
    "pytest": {"testing"},
    "yaml": {"cli.config_file", "io.yaml_file"},
    "scipy": {"model.histograms", "particles", "view.crops"},
}


def imports(tree):
    """Modules that a module names in import statements, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


@functools.cache
def imports_of(name):
    return frozenset(imports(trees()[name]))


def own_imports(name):
    return {m for m in imports_of(name) if m in MODULES} - {PACKAGE, name}


def everything_below(name, seen=None):
    seen = set() if seen is None else seen
    for module in own_imports(name) - seen:
        seen.add(module)
        everything_below(module, seen)
    return seen


def test_imports_go_one_way():
    graph = {name: own_imports(name) for name in MODULES if name != PACKAGE}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


@pytest.mark.parametrize("package", HOME)
def test_a_package_is_imported_only_where_it_belongs(package):
    users = {
        name.removeprefix(f"{PACKAGE}.")
        for name in MODULES
        if any(module.partition(".")[0] == package for module in imports_of(name))
    }
    assert {user for user in users if not {user, folder_of(user)} & HOME[package]} == set()


def folder_of(name):
    """Folder of a module; a module beside the folders is one of its own."""
    return name.removeprefix(f"{PACKAGE}.").partition(".")[0]


def test_folders_import_one_way():
    """From each folder only those below it, and those beside it not at all."""
    upward = {
        (name, imported)
        for name in MODULES
        if name != PACKAGE
        for imported in own_imports(name)
        if folder_of(imported) != folder_of(name)
        and FLOOR[folder_of(imported)] >= FLOOR[folder_of(name)]
    }
    assert not upward


def test_every_module_has_a_floor():
    assert {folder_of(name) for name in MODULES if name != PACKAGE} == FLOOR.keys()


def test_nothing_imports_the_command_line():
    importers = {name for name in MODULES if "ocelot_em.cli.main" in own_imports(name)}
    assert importers <= {"ocelot_em.__main__"}


def test_only_the_command_line_prints_and_exits():
    def is_banned(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit")

    guilty = {name for name, tree in trees().items() if any(map(is_banned, ast.walk(tree)))}
    assert guilty <= {"ocelot_em.cli.main", "ocelot_em.cli.streams", "ocelot_em.__main__"}


MAX_PARAMETERS = 6
MAX_LINES = 500


def functions(name, node):
    """Every function of a module by its full name, methods and nested ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            full = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield full, child
            yield from functions(full, child)
        else:
            yield from functions(name, child)


def n_parameters(function):
    found = function.args
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    rest = [one for one in (found.vararg, found.kwarg) if one is not None]
    return len([one for one in named if one.arg not in ("self", "cls")]) + len(rest)


def test_functions_have_few_parameters():
    found = {
        full.removeprefix(f"{PACKAGE}.")
        for name, tree in trees().items()
        for full, function in functions(name, tree)
        if n_parameters(function) > MAX_PARAMETERS
    }
    assert found == set()


def test_modules_are_short():
    lengths = {name: len(path.read_bytes().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def loaded_by(statement):
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"numpy", "scipy", "dask", "distributed", "torch", "cupy", "zarr", "numba", "xarray"}
    assert not loaded_by("import ocelot_em") & (heavy | {"jinja2", "pydantic"})


def test_importing_the_command_line_imports_nothing_slow():
    slow = {"dask", "distributed", "torch", "cupy", "numba", "scipy", "zarr", "xarray"}
    assert not loaded_by("import ocelot_em.cli") & (slow | {"matplotlib"})


def test_the_help_imports_nothing_slow():
    slow = {"logging", "numpy", "pydantic", "yaml", "markdown_it", "dask", "zarr", "numba"}
    assert not loaded_by("from ocelot_em.cli.main import run; run(['--help'])") & slow


@pytest.mark.parametrize(
    "words",
    ["merg", "merge A --clutser", "merge A --output B", "info A", "watch A", "view A"],
)
def test_common_errors_import_nothing_slow(words):
    slow = {"numpy", "scipy", "pandas", "dask", "zarr", "numba", "xarray", "obstore"}
    assert (
        not loaded_by(f"from ocelot_em.cli.main import run; assert run({words.split()}) == 2")
        & slow
    )


def test_every_public_name_is_there():
    assert set(ocelot_em.__all__) <= set(dir(ocelot_em))
    assert all(getattr(ocelot_em, name) is not None for name in ocelot_em.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ocelot_em.no_such_name
