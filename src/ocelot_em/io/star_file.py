"""Access to starfile, the optional package that reads and writes STAR files."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocelot_em.errors import MissingDependencyError


def load_starfile() -> Any:
    """Import starfile on demand, since few users need it.

    Raises
    ------
    MissingDependencyError
        starfile is not installed.
    """
    try:
        import starfile
    except ImportError as error:
        raise MissingDependencyError(
            "STAR files need starfile: pip install 'ocelot-em[tables]'"
        ) from error
    return starfile


def parse_star(text: str, as_text: Sequence[str]) -> dict[str, Any]:
    """Return the blocks of a STAR file: data frames, or dictionaries for blocks without a loop.

    Parameters
    ----------
    text
        Content of the file.
    as_text
        Columns whose values remain text: "00" would become the number 0.

    Raises
    ------
    ValueError
        The text is not a STAR file.
    MissingDependencyError
        starfile is not installed.
    """
    starfile = load_starfile()
    with tempfile.TemporaryDirectory(prefix="ocelot-") as folder:
        copy = Path(folder) / "TABLE.star"
        # starfile reads single lines through Python's linecache, which splits lines as Python does
        # and obeys an encoding declared in the first two. An undecodable file would be opened once
        # per line.
        lines = io.StringIO(f"\n\n{text}", newline=None)
        copy.write_text(lines.read(), encoding="utf-8", newline="\n")
        try:
            blocks = starfile.read(copy, always_dict=True, parse_as_string=list(as_text))
        except Exception as error:  # exceptions of starfile and pandas are undocumented
            raise ValueError(str(error).strip() or type(error).__name__) from error
    return {name: {} if block is None else block for name, block in blocks.items()}
