"""The package that reads and writes STAR files, where it is installed."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocelot_em.errors import MissingDependencyError


def load_starfile() -> Any:
    """Import starfile; only here, since few need it.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        import starfile
    except ImportError as error:
        raise MissingDependencyError(
            "STAR files need starfile: pip install 'ocelot-em[tables]'"
        ) from error
    return starfile


def parse_star(text: str, as_text: Sequence[str]) -> dict[str, Any]:
    """Return the blocks of a STAR file: data frames, and dictionaries where there is no loop.

    Parameters
    ----------
    text
        Of the file.
    as_text
        Columns whose values stay text: "00" would be the number 0.

    Raises
    ------
    ValueError
        It is no STAR file.
    MissingDependencyError
        starfile is not installed.
    """
    starfile = load_starfile()
    with tempfile.TemporaryDirectory(prefix="ocelot-") as folder:
        copy = Path(folder) / "TABLE.star"
        # starfile reads every line by itself, through Python's cache of source code. A line ends
        # there as in Python, and the first two may name an encoding, which it would follow; a file
        # that cannot be decoded would be opened once for every line.
        lines = io.StringIO(f"\n\n{text}", newline=None)
        copy.write_text(lines.read(), encoding="utf-8", newline="\n")
        try:
            blocks = starfile.read(copy, always_dict=True, parse_as_string=list(as_text))
        except Exception as error:  # neither starfile nor pandas has a list of what it raises
            raise ValueError(str(error).strip() or type(error).__name__) from error
    return {name: {} if block is None else block for name, block in blocks.items()}
