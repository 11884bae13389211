"""Docstrings for the site: Sphinx roles become code, with links where the site has the object."""

import re
from typing import Any

import griffe

import ocelot_em

ROLE = re.compile(r":(?:mod|class|func|data|meth|attr|exc):`~?\.?([\w.]+)`")


class Roles(griffe.Extension):  # type: ignore[misc]
    """Rewrites roles such as ``:func:`merge```."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_written, obj.docstring.value)


def _written(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2] if match[1].startswith("ocelot_em.") else match[1]
    home = ocelot_em._HOME.get(name)
    return f"[`{name}`][ocelot_em.{home}.{name}]" if home else f"`{name}`"
