"""Coverage-guided fuzzing of what reads foreign bytes: what all fuzzers share.

A fuzzer imports what it drives inside :func:`instrumented`, and hands :func:`run` a target. A
target gets bytes; it may return, or raise an OcelotError. Anything else is a crash: another
exception, a warning, a dead process, too much memory (``-rss_limit_mb``), too much time
(``-timeout``).
"""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path

INSTRUMENTED = ("ocelot_em", "zipfile", "csv", "mrcfile", "yaml", "zarr")
"""Packages whose branches guide the fuzzer, if they were not imported before."""

KERNELS = Path(__file__).parents[2] / "src/ocelot_em/kernels"

COMPILED = tuple(f"ocelot_em.kernels.{file.stem}" for file in KERNELS.glob("*.py"))
"""What numba compiles, which it could not if something were added."""

_REMOVE_AT_END = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1])"


def instrumented() -> AbstractContextManager[object]:
    """Return a context in which imports of :data:`INSTRUMENTED` count the branches they take.

    Without atheris it does nothing.
    """
    try:
        import atheris
    except ImportError:
        return nullcontext()
    context: AbstractContextManager[object] = atheris.instrument_imports(
        include=[*INSTRUMENTED], exclude=[*COMPILED]
    )
    return context


def tolerant(target: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """Return the target as the fuzzer calls it: only what is not allowed is raised.

    Parameters
    ----------
    target
        Reads bytes; what it returns is ignored.
    """
    from ocelot_em.errors import OcelotError

    def call(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                target(data)
            except OcelotError as error:
                if not str(error).strip():
                    raise AssertionError("an error without a message") from error

    return call


def main(
    kinds: Mapping[str, Callable[[Path], tuple[Iterable[bytes], Callable[[bytes], object]]]],
    arguments: Sequence[str],
    usage: str,
) -> None:
    """Fuzz what is named, one after another; end this process at the first finding, with its code.

    Each has a process of its own, a copy of this one: instrumenting takes longer than some tests.

    Parameters
    ----------
    kinds
        Make seeds and a target, given a folder for files.
    arguments
        Names of kinds, then options of libFuzzer.
    usage
        Printed when none is named.
    """
    named = [argument for argument in arguments if argument in kinds]
    options = arguments[len(named) :]
    if not named or named != [*arguments[: len(named)]]:
        sys.exit(f"{usage}\nKIND: {', '.join(kinds)}")
    for kind in named:
        child = os.fork()
        if child == 0:
            seeds, target = kinds[kind](folder_until_exit())
            run(target, seeds, options)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{kind}: ended with {code}", file=sys.stderr, flush=True)
        if code:
            sys.exit(abs(code))


def run(
    target: Callable[[bytes], object], seeds: Iterable[bytes], options: Iterable[str] = ()
) -> None:
    """Fuzz a target until libFuzzer's options end it; this ends the process.

    Parameters
    ----------
    target
        As for :func:`tolerant`.
    seeds
        What mutation starts from: small, and read without an error.
    options
        Of libFuzzer, such as ``-max_total_time=60``, folders of more inputs, or a file to run once.
    """
    import atheris

    listed = list(options)
    if not any(Path(option).is_file() for option in listed):  # otherwise only these are run
        folder = folder_until_exit()
        for seed in seeds:
            (folder / sha256(seed).hexdigest()).write_bytes(seed)
        # The first folder is the one that gets new inputs.
        listed.append(str(folder))
    atheris.Setup([sys.argv[0], *listed], tolerant(target))
    atheris.Fuzz()


def folder_until_exit() -> Path:
    """Make a temporary folder, in memory where there is such a place, that ends with this process.

    libFuzzer leaves Python without its clean-up, so that another process has to see to it.
    """
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    subprocess.Popen(
        [sys.executable, "-c", _REMOVE_AT_END, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # an interrupt is not for it
    )
    return Path(folder)
