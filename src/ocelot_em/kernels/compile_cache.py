"""The folder in which numba caches compiled kernels: the first that can really be written.

Packages may be installed by an administrator, and homes may be missing or full. numba itself
refuses to import kernels then, or fails at the first tile.
"""

import contextlib
import fcntl
import functools
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from numba import config

from ocelot_em.kernels.ahead import digest_of_sources

log = logging.getLogger(__name__)

_PROBE_NBYTES = 4 * 2**20
"""Bytes written to a folder to find out whether there is space; all kernels take less."""

MAX_WAIT_SECONDS = 120.0
"""Timeout for another process that compiles, which may be suspended."""

_redirecting = threading.Lock()
"""Held while numba's setting is replaced."""

_BESIDE_SOURCE = Path(__file__).parent / "__pycache__"


@functools.lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """Return the folder of the cache, the same in all calls; None if none can be written.

    In this order: ``NUMBA_CACHE_DIR``, ``__pycache__`` beside the kernels, the user's cache, the
    folder for temporary files. A warning is logged if there is none, and if the first cannot be
    used.
    """
    reasons = list[str]()
    for folder in _candidates():
        try:
            _probe(folder)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
            continue
        if config.CACHE_DIR and reasons:
            log.warning("NUMBA_CACHE_DIR cannot be written (%s); using %s", reasons[0], folder)
        return folder
    log.warning(
        "each process compiles its kernels, which takes about 15 s, because no folder can be "
        "written to cache them (%s); set NUMBA_CACHE_DIR to one that can",
        "; ".join(reasons),
    )
    return None


def _candidates() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    yield _BESIDE_SOURCE
    with contextlib.suppress(RuntimeError):  # no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        yield cache / "ocelot-em"
    with contextlib.suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir(), f"ocelot-em-{os.getuid()}")


def _probe(folder: Path) -> None:
    """Raise OSError unless this user, and no other, can write files here."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent == Path(tempfile.gettempdir()):
        # numba unpickles what it finds.
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
            raise OSError("belongs to somebody else, or others can write there")
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(0, _PROBE_NBYTES, 2**20):
            if file.write(bytes(2**20)) != 2**20:
                raise OSError("no space is left")


@contextlib.contextmanager
def caching_there() -> Iterator[bool]:
    """Let numba use the folder for functions that are decorated meanwhile; False without one.

    Each version of the kernels has its own: numba does not notice if a function that is called by
    another one, which it has cached, has changed in another file.
    """
    folder = cache_folder()
    with _redirecting:
        before, own = config.CACHE_DIR, f"kernels-{digest_of_sources()[:16]}"
        config.CACHE_DIR = "" if folder is None else str(folder / own)
        try:
            yield folder is not None
        finally:
            config.CACHE_DIR = before


@contextlib.contextmanager
def compiling_alone(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of the cache, so that processes that share it do not compile the same kernels.

    ``waiting`` is called repeatedly until the lock is free. Where the folder takes no locks, each
    process compiles for itself.
    """
    folder, ends = cache_folder(), time.monotonic() + MAX_WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = None if folder is None else stack.enter_context((folder / "lock").open("ab"))
            while file is not None and time.monotonic() < ends:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting()
                    time.sleep(0.05)
        yield
