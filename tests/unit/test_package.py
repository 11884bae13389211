"""What is shipped: the sources and what they need to run, and nothing that lies beside them."""

import io
import os
import pickle
import runpy
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from ocelot_em import errors
from ocelot_em.kernels import ahead

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src"
SHIPPED_SUFFIXES = {".py", ".cu", ".j2", ".css", ".js"}
SHIPPED_NAMES = {"py.typed", "DESIGN.md", "signatures.txt", "index.json", "kernels.o"}


def files_of_sources() -> set[str]:
    """Whatever lies in ``src``, whether Git knows it or not, except what Python compiles."""
    found = (path.relative_to(SOURCES) for path in SOURCES.rglob("*") if not path.is_dir())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_sources_have_nothing_that_is_not_to_be_shipped() -> None:
    found = files_of_sources()
    assert {"ocelot_em/__init__.py", "ocelot_em/py.typed", "ocelot_em/kernels/merge.cu"} <= found
    assert {f"ocelot_em/kernels/{name}.cu" for name in ("decode", "encode")} <= found
    others = {
        name
        for name in found
        if Path(name).suffix not in SHIPPED_SUFFIXES and Path(name).name not in SHIPPED_NAMES
    }
    assert others == set()
    assert {name.partition("/")[0] for name in found} == {"ocelot_em"}


# The installation compiles all kernels, for the processor of this machine.
@pytest.mark.parametrize("kernels", ["by_map.", pytest.param("", marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_a_wheel_has_the_sources_and_nothing_else(kernels: str, tmp_path: Path) -> None:
    wheel = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling, which builds wheels, is not installed"
    )
    root = tmp_path / "root"
    nothing_compiled = shutil.ignore_patterns("built", "__pycache__")
    shutil.copytree(SOURCES, root / "src", ignore=nothing_compiled)
    for name in (".gitignore", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    listed = root / "src/ocelot_em/kernels/signatures.txt"
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join(line for line in lines if line.startswith(kernels)))
    (built,) = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert {Path(name).name for name in about} >= {"METADATA", "RECORD", "WHEEL", "LICENSE"}
    compiled = {
        f"ocelot_em/kernels/built/{cpu}/{name}"
        for cpu in ahead.cpus()
        for name in (ahead.INDEX, ahead.OBJECT)
    }
    sources = {name for name in files_of_sources() if "/built/" not in name}
    assert names - about == sources | compiled


def test_kernels_are_compiled_with_the_packages_of_an_isolated_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pip passes them to processes in PYTHONPATH."""
    pytest.importorskip("hatchling", reason="hatchling, which builds wheels, is not installed")
    seen = []

    def run(command: list[str], env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        seen.append(env["PYTHONPATH"].split(os.pathsep))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "isolated")
    kind = runpy.run_path(str(ROOT / "hatch_build.py"))["CompileKernels"]
    kind(str(ROOT), {}, None, None, "", "wheel").initialize("editable", {})
    assert seen == [[str(SOURCES), "isolated"]]


def test_containers_are_built_from_all_that_a_wheel_is_built_from() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", "hatch_build.py", about["project"]["readme"], "src"}
    needed |= set(about["project"]["license-files"])
    assert "custom" in about["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]
    wheel = (ROOT / "docker/Dockerfile").read_text().partition(" AS wheel")[2].partition("FROM ")[0]
    copied = " ".join(line for line in wheel.splitlines() if line.startswith("COPY "))
    assert needed <= set(copied.replace("./src", "").split())
    assert {f"!{name}" for name in needed} <= set((ROOT / ".dockerignore").read_text().split())
    assert needed <= set((ROOT / "docker/ocelot.def").read_text().split())


def tree_of_errors(error: type[Exception], indent: str = "", own: str = "") -> list[str]:
    """Lines that show an error with its subclasses, and the built-in exception of each."""
    builtin = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins"]
    builtins = f" ({', '.join(builtin)})" if own and builtin else ""
    lines = [own + error.__name__ + builtins]
    subclasses = [each for each in error.__subclasses__() if each.__module__ == errors.__name__]
    for subclass in subclasses:
        below = "    " if subclass is subclasses[-1] else "|   "
        lines += tree_of_errors(subclass, indent + below, f"{indent}+-- ")
    return lines


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = "\n".join(f"    {line}" for line in tree_of_errors(errors.OcelotError))
    assert drawn in str(errors.__doc__)


def every_error(error: type[errors.OcelotError]) -> list[type[errors.OcelotError]]:
    return [error, *(each for subclass in error.__subclasses__() for each in every_error(subclass))]


@pytest.mark.parametrize("problems", ["one", ["one"], ["one", "two"], ["\x1b[2J", "", "Å"]])
@pytest.mark.parametrize("kind", every_error(errors.OcelotError))
def test_errors_survive_the_way_from_a_worker(
    kind: type[errors.OcelotError], problems: str | list[str]
) -> None:
    lists = issubclass(kind, errors.InvalidInputError)
    error = kind(problems if lists else str(problems))
    error.add_note("from a worker")
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = {}  # without the functions for exceptions that Dask registers
    pickler.dump(error)
    received = pickle.loads(buffer.getvalue())
    assert type(received) is kind
    assert (str(received), received.__dict__) == (str(error), error.__dict__)
