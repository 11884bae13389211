"""Strict reading of hand-written YAML files as plain values."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.text_file import read_text

MAX_NBYTES = 64_000_000
"""Maximum size of a file; a description of thousands of exposures has a few megabytes."""

MAX_DEPTH = 50
"""Maximum nesting depth; a description has four levels."""

MAX_VALUES = 1_000_000
"""Maximum number of values and keys; each takes a kilobyte of memory."""

MAX_UNQUOTED = 3000
"""Maximum length of an unquoted value: Python refuses to convert very long numbers."""

_MERGE = "tag:yaml.org,2002:merge"


def as_number(value: object) -> object:
    """Convert to float where possible: YAML reads 300 as an integer and 1e4 as text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def read_yaml(path: str | PathLike[str], what: str) -> Mapping[Any, Any]:
    """Read a mapping, which errors call ``what``.

    Nothing in the file is executed; numbers such as ``1e4``, which YAML 1.1 reads as text, remain
    text. Refused are duplicate keys and ``<<``, which YAML would resolve silently; aliases, which
    can make a small file endless; tags; excessive nesting, size or numbers of values; and anything
    that is not a mapping.
    """
    return _read(path, what)[0]


def read_items(path: str | PathLike[str], what: str) -> Iterable[tuple[Any, Any]]:
    """Read a mapping as :func:`read_yaml` does, and return PyYAML's nodes of its items."""
    return cast("Iterable[tuple[Any, Any]]", _read(path, what)[1].value)


def _read(path: str | PathLike[str], what: str) -> tuple[Mapping[Any, Any], Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text, content = read_text(Path(path), MAX_NBYTES, what), None
    try:
        problems = _unwanted(yaml.parse(text, Loader=loader))
        if not problems:
            document = loader(text)
            node = document.get_single_node()
            problems = _repeated_keys(node)
            if node is not None and not problems:
                content = document.construct_document(node)
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise InvalidInputError(f"{path}: cannot be read as YAML: {error}") from error
    if problems:
        raise InvalidInputError(f"{path}: {problem}" for problem in problems)
    if not isinstance(content, Mapping):
        got = "nothing" if content is None else type(content).__name__
        if content is None and "#" in text:
            got = "only comments; remove '# ' before a line to use it"
        raise InvalidInputError(f"{path}: expected {what}, got {got}")
    return content, node


def _unwanted(events: Iterable[Any]) -> list[str]:
    """List the first unwanted feature; reading the whole file might take forever."""
    import yaml

    depth = n_values = 0
    for event in events:
        n_values += isinstance(event, yaml.NodeEvent)  # a collection, a value or a key
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        problem, unquoted = None, isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        if isinstance(event, yaml.AliasEvent):
            problem = f"expected no aliases, got *{event.anchor}; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"expected no tags, got {event.tag}; write text between quotation marks"
        elif n_values > MAX_VALUES:
            problem = f"expected at most {MAX_VALUES:,} values and keys, got more"
        elif depth > MAX_DEPTH:
            problem = f"expected values nested at most {MAX_DEPTH} deep, got deeper ones"
        elif (n := len(event.value) if unquoted else 0) > MAX_UNQUOTED:
            problem = (
                f"expected at most {MAX_UNQUOTED} characters of a value, got {n}; write text "
                "between quotation marks"
            )
        if problem:
            return [f"line {event.start_mark.line + 1}: {problem}"]
    return []


def _repeated_keys(root: Any) -> list[str]:
    """List repeated keys of mappings, and merge keys (``<<``), with their lines."""
    import yaml

    problems, todo = list[tuple[int, str]](), [root]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag == _MERGE:
                    problems.append((line, "expected no <<; write the keys out"))
                elif isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        first = f"is there twice, first on line {seen[key.value]}"
                        problems.append((line, f"{key.value!r}: {first}"))
                    seen.setdefault(key.value, line)
                todo.append(value)
    return [f"line {line}: {problem}" for line, problem in sorted(problems)]
