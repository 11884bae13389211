"""What all options of the command line have in common."""

import json
from collections.abc import Sequence
from os.path import exists, join
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from cyclopts import Parameter, Token

from ocelot_em.errors import FormatError, StoreNotFoundError
from ocelot_em.model.problems import option_name


def _from_text(kind: Any, tokens: Sequence[Token]) -> Any:
    """Convert texts as pydantic does, also for options that are in no model.

    Refuse credentials and NUL characters in paths before anything is logged or stored.
    """
    from pydantic import TypeAdapter

    texts = [token.value for token in tokens]
    for text in texts:
        if "://" in text or "\0" in text:
            from ocelot_em.store.objects import normalise_url

            normalise_url(text)
    is_several = (get_origin(kind) or kind) in (list, tuple)
    return TypeAdapter(kind).validate_python(texts if is_several else texts[0])


def require_stores(*places: str | Path, kind: str = "") -> None:
    """Raise the error of a store that is missing, before imports that take longer than this.

    The same for a store of another kind, ``search`` or ``merged``, if one is given.
    """
    for place in places:
        metadata = join(place, "zarr.json")  # noqa: PTH118
        if "://" in str(place):
            continue
        try:
            with open(metadata, encoding="utf-8") as file:  # noqa: PTH123
                found = json.load(file)["attributes"]["ocelot"]["kind"]
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not exists(place):  # noqa: PTH110
                raise StoreNotFoundError(
                    f"{Path(place).absolute()}: expected an ocelot-em store, got nothing there"
                ) from None
            from ocelot_em.store.objects import open_objects
            from ocelot_em.store.search import read_attributes

            read_attributes(open_objects(place))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # what is wrong is found when it is opened
        else:
            if kind == "merged" and found == "search":
                raise FormatError(f"{place}: is a search, not a merged result; merge it first")


def _shown(default: object) -> str | None:
    """Return the text of a default, if the help does not say what it means."""
    if default is None or default is False or default in ((), ""):
        return None
    return ", ".join(default) if isinstance(default, tuple) else str(default)


OPTION = Parameter(
    allow_repeating=True,
    converter=_from_text,
    name_transform=option_name,
    negative=(),
    show_default=_shown,
)
PathOrUrl = Annotated[str | Path, Parameter(metavar="PATH")]
"""Text that shells complete like a path; it stays text, as URLs are not paths."""

MapName = Literal["scaled_mip", "mip", "correlation_mean", "correlation_std"]
"""Map of an image, pooled by maximum."""

Merged = Annotated[PathOrUrl, Parameter(help="Path or URL of a merged result.")]
"""A merged result that a command reads."""

AS_COMMAND: dict[str, Any] = {"default_parameter": OPTION, "help_format": "markdown"}
"""Arguments of the app of a command."""
