"""The package that reads and writes STAR files, where it is installed."""

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
