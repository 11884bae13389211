"""Reading of files from other programs and people, and of text in them."""

from os import PathLike
from pathlib import Path

from ocelot_em.errors import InvalidInputError
from ocelot_em.store.objects import is_local, normalise_url


def local_path(path: str | PathLike[str]) -> Path:
    """Return the path of a file or folder; refuse URLs, and texts that cannot be paths."""
    url = normalise_url(path)
    if not is_local(url):
        raise InvalidInputError(f"{url}: expected a path on this machine, got a URL; download it")
    return Path(path)


def file_identity(path: Path) -> tuple[int, ...]:
    """Return what changes if a file is replaced or written."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def require_unchanged(path: Path, identity: tuple[int, ...]) -> None:
    """Raise unless a file still has this identity."""
    if file_identity(path) != identity:
        raise InvalidInputError(f"{path}: was changed while it was imported")


def read_text(place: Path, max_nbytes: int, what: str, *, lenient: bool = False) -> str:
    """Return a file's text; refuse one that is missing, too large, binary, not UTF-8 or unreadable.

    ``what`` describes the expected content in errors. ``lenient`` replaces invalid UTF-8 with
    U+FFFD.
    """
    local_path(place)
    try:
        if not place.is_file():
            raise InvalidInputError(f"{place}: expected {what}, got no file")
        nbytes = place.stat().st_size
        if nbytes > max_nbytes:
            raise InvalidInputError(
                f"{place}: expected {what} of at most {max_nbytes:,} bytes, got {nbytes:,}"
            )
        data = place.read_bytes()
        if b"\0" in data:
            raise InvalidInputError(
                f"{place}: expected text, got binary data; save it as text in UTF-8"
            )
        return data.decode("utf-8-sig", "replace" if lenient else "strict")
    except OSError as error:
        raise InvalidInputError(f"{place}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{place}: expected text in UTF-8: {error}; save it in that encoding"
        ) from error
