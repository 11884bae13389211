"""YAML files that people wrote: read as plain values, with all that YAML lets slip refused."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ocelot_em.errors import InvalidInputError

MAX_NBYTES = 64_000_000
"""Of a file; a description of thousands of exposures has a few."""


def read_yaml(path: str | PathLike[str], what: str) -> Mapping[Any, Any]:
    """Read a mapping.

    Parameters
    ----------
    path
        The file. Nothing in it is executed; numbers such as ``1e4``, which YAML 1.1 takes for
        text, stay text.
    what
        What it should be, for errors.

    Raises
    ------
    InvalidInputError
        It cannot be read; has a key twice, of which YAML would take the last; has aliases, which
        can make a small file endless; or is no mapping.
    """
    import yaml

    place = Path(path)
    try:
        nbytes = place.stat().st_size
        if nbytes > MAX_NBYTES:
            raise InvalidInputError(
                f"{path}: expected {what} of at most {MAX_NBYTES:,} bytes, got {nbytes:,}"
            )
        text = place.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise InvalidInputError(
                    f"{path}: line {line}: expected no aliases, got *{event.anchor}; write the "
                    "value out"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = [f"{path}: {problem}" for problem in _repeated_keys(node)]
        if repeated:
            raise InvalidInputError(repeated)
        content = yaml.safe_load(text)
    except InvalidInputError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidInputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise InvalidInputError(f"{path}: expected {what}, got {type(content).__name__}")
    return content


def _repeated_keys(root: Any) -> list[str]:
    """Keys that stand twice in one mapping, with the line of the second."""
    import yaml

    problems, todo = [], [root]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    problems.append(
                        f"line {line}: {key.value!r}: is there twice, first on line "
                        f"{seen[key.value]}"
                    )
                if isinstance(key, yaml.ScalarNode):
                    seen.setdefault(key.value, line)
                todo.append(value)
    return sorted(problems)
