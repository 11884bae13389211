"""What all options of the command line have in common."""

from collections.abc import Sequence
from os.path import exists, join
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from cyclopts import Parameter, Token

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


def require_stores(*places: str | Path) -> None:
    """Raise the error of a store that is missing, before imports that take longer than this."""
    for place in places:
        if "://" in str(place) or exists(join(place, "zarr.json")):  # noqa: PTH110, PTH118
            continue
        from ocelot_em.store.objects import open_objects
        from ocelot_em.store.search import read_attributes

        read_attributes(open_objects(place))


def _shown(default: object) -> str | None:
    """Return the text of a default, if the help does not say what it means."""
    return None if default is None or default is False or default in ((), "") else str(default)


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
