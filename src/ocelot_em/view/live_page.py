"""Interactive parts of a page: models of bokeh with the scripts that draw them, compressed."""

import gzip
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from ocelot_em.view.page import INK


@dataclass(frozen=True)
class LivePage:
    """Scripts and data of the interactive part of a page.

    ``packed`` are the scripts, and last the data, compressed; ``loader`` is the script that unpacks
    them; ``policy`` has the hashes of all scripts, so that browsers run no others.
    """

    packed: tuple[str, ...]
    loader: str
    policy: str

    @classmethod
    def of(cls, roots: Mapping[str, Any], content: Mapping[str, Any], script: str) -> "LivePage":
        """Pack models by the id of their element, and what the page's own script needs.

        ``script`` is the name of that script among the templates; it follows ``live.js``.
        """
        from bokeh.document import Document

        document = Document()
        for root in roots.values():
            document.add_root(root)
        everything = {
            "document": document.to_json(deferred=False),
            "roots": [{"id": root.id, "element": place} for place, root in roots.items()],
            "ink": INK,
            **content,
        }
        text = json.dumps(_numbered(everything, {}), separators=(",", ":"))
        scripts, glue, policy = _scripts(script)
        return cls((*scripts, _packed(text)), glue, policy)


@cache
def _scripts(script: str) -> tuple[tuple[str, ...], str, str]:
    """Return the scripts of bokeh, compressed, our own, and the hashes of all."""
    from bokeh.resources import Resources

    components = ["bokeh", "bokeh-widgets", "bokeh-tables"]
    raw = Resources("inline", log_level="error", components=components).js_raw
    folder = files("ocelot_em") / "view/templates"
    glue = "".join((folder / name).read_text("utf-8") for name in ("live.js", script))
    hashes = (b64encode(sha256(own.encode()).digest()).decode() for own in (*raw, glue))
    return tuple(map(_packed, raw)), glue, " ".join(f"'sha256-{own}'" for own in hashes)


def _packed(text: str) -> str:
    return b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _numbered(value: Any, numbers: dict[str, str]) -> Any:
    """Number the ids of models from 1, so that equal pages are equal files."""
    if isinstance(value, dict):
        return {
            key: numbers.setdefault(one, f"m{len(numbers) + 1}")
            if key == "id"
            else _numbered(one, numbers)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_numbered(one, numbers) for one in value]
    return value
