"""Options of a command from YAML files: ``--config FILE``.

A file is a mapping from option names to values. Every value is read as text, and converted and
checked like the option's value on the command line: ``1e-3`` is a number for a numeric option, and
``8:30``, ``yes`` and ``00`` are strings for a text option.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from cyclopts import App, Argument, ArgumentCollection, Token

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.yaml_file import MAX_UNQUOTED, read_items
from ocelot_em.model.problems import in_words, suggestion

_NULL, _BOOLEAN = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"

_TRUE = ("true", "yes", "on")
"""Spellings of true in YAML 1.1; case is ignored."""

_Given = list[tuple[Argument, Token]]
"""What a file says of an option: of itself, or of the options inside it."""


def apply_files(
    paths: Sequence[str | Path], _app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Set the options that the command line does not set, as a source of cyclopts.

    If several files set a key, the last one takes precedence. Keys are option names without leading
    dashes, with ``-`` or ``_``, and names of positional arguments; flags take ``true`` or
    ``false``, and options with several values take a list. Relative paths in them are relative to
    the current folder, as on the command line, not to the file. All problems are raised together,
    with file, line and key.
    """
    options = {
        _key(a.name): a for a in arguments if a.parse and a.name != "*" and "." not in a.name
    }
    command = " ".join(("ocelot", *commands))
    found, problems = dict[str, _Given](), list[str]()
    for path in paths:
        seen = dict[str, int]()
        for item, node in read_items(path, "options and their values"):
            name, line = item.value, item.start_mark.line + 1
            where, key = f"{path}: line {line}: {name}", _key(name)
            if key not in options:
                problems.append(f"{where}: {_unknown(key, options, command)}")
            elif key in seen:
                problems.append(f"{where}: given twice, first on line {seen[key]}")
            else:
                try:
                    found[key] = _given(options[key], node, path)
                except InvalidInputError as error:
                    problems += [f"{where}: {problem}" for problem in error.problems]
            seen.setdefault(key, line)
    if problems:
        raise InvalidInputError(problems)
    for key, given in found.items():
        if not options[key].has_tokens:
            for argument, token in given:
                argument.append(token)


def _key(name: str) -> str:
    """Return the key of an option such as ``--tile-size``, or of a positional argument."""
    name = name.removeprefix("--").replace("_", "-")
    return name.lower() if name.isupper() else name


def _unknown(key: str, options: Iterable[str], command: str) -> str:
    hint = suggestion(key, options) or f"; expected one of {', '.join(sorted(options))}"
    return f"'{command}' has no such option{hint}"


def _given(argument: Argument, node: Any, path: str | Path) -> _Given:
    """Return what a file says of an option, checked."""
    if argument.children:
        return _given_inside(argument, node, path)
    n_values, is_list = argument.token_count()
    if argument.resolved_hint is bool:
        if node.tag != _BOOLEAN:
            raise InvalidInputError(f"expected true or false, got {_shown(node)}")
        return [(argument, Token(source=str(path), implicit_value=node.value.lower() in _TRUE))]
    nodes, is_several = [node], is_list or n_values > 1
    if is_several:
        wanted = "one or more values" if is_list else f"{n_values} values"
        nodes = node.value
        if node.id != "sequence" or not nodes or (not is_list and len(nodes) != n_values):
            raise InvalidInputError(
                f"expected a list of {wanted}, as in [A, B], got {_shown(node)}"
            )
    for number, item in enumerate(nodes, 1):
        if item.id != "scalar" or item.tag == _NULL:
            hint = "; leave the key out for the default" if item.tag == _NULL else ""
            place = f"value {number}: " * is_several
            raise InvalidInputError(f"{place}expected a value, got {_shown(item)}{hint}")
    texts = [item.value for item in nodes]
    _check(argument, texts if is_several else texts[0])
    return [(argument, Token(source=str(path), value=t, index=i)) for i, t in enumerate(texts)]


def _check(argument: Argument, value: object) -> None:
    """Raise unless an option accepts a value."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(argument.field_info.annotation).validate_python(value)
    except ValidationError as error:
        raise InvalidInputError(
            "".join(f"value {int(number) + 1}: " for number in p["loc"]) + in_words(p)
            for p in error.errors()
        ) from None


def _given_inside(argument: Argument, node: Any, path: str | Path) -> _Given:
    """Return what a file says of the options inside an option: a mapping, or texts KEY=VALUE."""
    import yaml

    if node.id == "mapping":
        pairs = [(key.value, value) for key, value in node.value]
    elif node.id == "sequence" and all("=" in str(item.value) for item in node.value):
        pairs = []
        for item in node.value:
            key, _, text = item.value.partition("=")
            pairs.append((key, yaml.ScalarNode("tag:yaml.org,2002:str", text)))
    else:
        raise InvalidInputError(f"expected options and their values, got {_shown(node)}")
    inner = {_key(child.name.rpartition(".")[2]): child for child in argument.children}
    given, problems = _Given(), list[str]()
    for name, value in pairs:
        key = _key(name)
        try:
            if key not in inner:
                raise InvalidInputError(_unknown(key, inner, _key(argument.name)))
            if value.id == "scalar" and inner[key].token_count()[1]:
                value = yaml.SequenceNode("tag:yaml.org,2002:seq", [value])
            given += _given(inner[key], value, path)
        except InvalidInputError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise InvalidInputError(problems)
    return given


def _shown(node: Any) -> str:
    if node.id == "sequence":
        return f"a list of {len(node.value)}"
    if node.id == "mapping":
        return "a mapping"
    return "nothing" if node.tag == _NULL else repr(node.value)


def write_config(path: str | PathLike[str], options: Mapping[str, object]) -> None:
    """Write the options of a run to a file for ``--config``.

    ``options`` are by name with ``-`` or ``_``. None, and empty lists and mappings, are omitted,
    because no command line can express them. An existing file is replaced atomically.
    """
    from ocelot_em.store.whole_file import write_file

    try:
        content = as_yaml(_without_empty(options)).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{path}: expected text that is Unicode, got {error.object!r}"
        ) from None
    write_file(path, content)


def _without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        name.replace("_", "-"): _without_empty(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
    }
    return {name: value for name, value in given.items() if value not in (None, [], (), {})}


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return YAML that is read back as the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]
        """Quotes strings that would not be read back unquoted."""

    def represent_text(dumper: Any, text: str) -> Any:
        text.encode()  # PyYAML writes what is not Unicode in a form that it does not read.
        # PyYAML writes some line breaks in a form that it reads back as others.
        style = None if text.isprintable() and len(text) <= MAX_UNQUOTED else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
    text: str = yaml.dump(
        values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text
