"""Kernels that were compiled when the package was built, and are loaded without numba.

``built/`` has a folder for each kind of processor, with one object file, and ``index.json``, which
names the kernels in it and the sources that they were compiled from. Nothing is loaded on other
processors or if a source has changed since: numba compiles the kernels there.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

FOLDER = Path(__file__).parent / "built"

INDEX, OBJECT = "index.json", "kernels.o"

SOURCES = (
    "build.py",
    "by_chunk.py",
    "by_map.py",
    "collect.py",
    "compiling.py",
    "compositing.py",
    "cpu.py",
    "cpu_statistics.py",
    "jit.py",
    "signatures.txt",
    "streams.py",
    "suppression.py",
)
"""Files of this package that the machine code depends on."""

_FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        "x86-64-v3": ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"),
    },
    "aarch64": {"generic": ()},
}
"""What a processor must have, by its machine and LLVM's name of its kind, best first."""

Words = Sequence[int | float]
"""Arguments of a kernel, see :mod:`ocelot_em.kernels.compiling`."""

_MAX_RETURNED = 4
"""Maximum number of words that a kernel returns."""

_ENTRY = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)
"""numba's own calling convention, whose first two arguments are a result and an exception."""


@lru_cache(maxsize=1)
def digest_of_sources() -> str:
    """Return the digest of the files that the machine code depends on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def cpus() -> Sequence[str]:
    """Return LLVM's names of the processors to compile for, best first."""
    return list(_FEATURES.get(os.uname().machine, ()))


def find(name: str, types: str) -> Callable[[Words], Any] | None:
    """Return a function that calls a kernel with words, or None if it was not compiled ahead."""
    return None if (library := _library()) is None else library.find(name, types)


def is_current(cpu: str) -> bool:
    """Whether the kernels were compiled for a processor from the sources as they are."""
    return _kernels_for(cpu) is not None


def are_loaded() -> bool:
    """Whether this process uses kernels that were compiled ahead."""
    return _library() is not None


def _kernels_for(cpu: str) -> dict[str, Any] | None:
    """Return the kernels by name if they were compiled from the sources as they are."""
    path = FOLDER / cpu / INDEX
    index: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return index["kernels"] if index.get("sources") == digest_of_sources() else None


def can_run(cpu: str) -> bool:
    """Whether this processor has the features of a kind of processors."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in _FEATURES[os.uname().machine][cpu])


@lru_cache(maxsize=1)
def _library() -> "_Library | None":
    for cpu in cpus():
        kernels = _kernels_for(cpu)
        if kernels is not None and can_run(cpu):
            return _Library(FOLDER / cpu / OBJECT, kernels)
    return None


class _Library:
    def __init__(self, path: Path, kernels: dict[str, Any]) -> None:
        from llvmlite import binding

        self._kernels = kernels
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(path.read_bytes()))
        self._engine.finalize_object()

    def find(self, name: str, types: str) -> Callable[[Words], Any] | None:
        """Load a kernel."""
        try:
            symbol, returned = self._kernels[name][types]
        except KeyError:
            return None
        entry = _ENTRY(self._engine.get_function_address(symbol))
        entry.engine = self._engine  # type: ignore[attr-defined]  # owns the machine code
        return _call(entry, name, types, returned)


def _call(entry: Any, name: str, types: str, returned: str) -> Callable[[Words], Any]:
    arguments = Struct("".join(words_of(types)))
    results, unused = Struct("".join(words_of(returned))), ctypes.create_string_buffer(16)
    is_tuple, is_truth = returned.startswith("("), returned == "?"

    def call(words: Words) -> Any:
        out = ctypes.create_string_buffer(8 * _MAX_RETURNED)
        if entry(unused, unused, arguments.pack(*words), out):
            raise RuntimeError(f"{name}({types}): expected no exception of a kernel, got one")
        values = results.unpack_from(out)
        if is_tuple or not values:
            return values or None
        return bool(values[0]) if is_truth else values[0]

    return call


def words_of(types: str) -> Iterator[str]:
    """Yield the format of each word: ``q`` or ``d``."""
    for one in types.replace("(", " ").replace(")", " ").split():
        if one[-1] in "CA":
            n_dimensions = int(one[-2])
            yield "q" * (1 + (n_dimensions if one[-1] == "C" else 2 * n_dimensions))
        else:
            yield "d" if one[0] == "f" else "q"
