"""HTML from the package's jinja2 templates, which escape values and control characters."""

from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ocelot_em.errors import printable
from ocelot_em.model import text

if TYPE_CHECKING:
    from jinja2 import Environment


def is_html(path: str | PathLike[str]) -> bool:
    """Whether a path is that of an HTML file, by its name."""
    return Path(path).suffix.lower() in (".html", ".htm")


def render(template: str, **values: object) -> str:
    """Fill in a template of the package; a value that is missing is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ocelot_em", ""),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["integer"] = "{:,}".format
    for name in ("area", "count", "nbytes", "number", "percent", "seconds", "shape"):
        environment.filters[f"{name}_text"] = getattr(text, f"{name}_text")
    return environment
