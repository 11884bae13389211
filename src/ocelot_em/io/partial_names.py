"""Names of partials, derived from the names of files."""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ocelot_em.store.validation import name_problems

_MAX_LENGTH = 110
"""Maximum length of a cleaned name, which leaves room for what makes it unique."""


def cleaned_name(text: str) -> str:
    """Return a text as a valid name of a partial; a valid name is not changed.

    >>> cleaned_name("gpu.0"), cleaned_name("Größe [1] 5 Å")
    ('gpu.0', 'Grosse-1-5-A')
    """
    if not name_problems(text):
        return text
    letters = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    name = re.sub("[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:_MAX_LENGTH] or "partial"
    return name if not name_problems(name) else name.replace(".", "-")


def name_partials(files: Sequence[str | PathLike[str]]) -> list[str]:
    """Name partials after their files, with as many folders as needed to make names unique.

    Only files that are given twice get the same name.
    """
    paths = [Path(file) for file in files]
    folders = [path.absolute().parent.parts[1:] for path in paths]
    for depth in range(1 + max(map(len, folders), default=0)):
        texts = [
            "-".join((*parts[max(len(parts) - depth, 0) :], path.stem))
            for parts, path in zip(folders, paths, strict=True)
        ]
        if len(set(texts)) == len(texts):
            return _unique(texts)
    return [cleaned_name(path.stem) for path in paths]


def _unique(texts: Sequence[str]) -> list[str]:
    """Clean different texts; a checksum of the text distinguishes names that became equal."""
    names = [cleaned_name(text) for text in texts]
    n = Counter(names)
    return [
        name if n[name] == 1 or name == text else f"{name}-{zlib.crc32(_bytes(text)):08x}"
        for name, text in zip(names, texts, strict=True)
    ]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
