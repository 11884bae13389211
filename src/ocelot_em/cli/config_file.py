"""Options of a command from a file: ``--config FILE``, for any parser of :mod:`argparse`.

The file is a YAML mapping from option names to values. Every value is read as text, and converted
and checked by the type and choices of its option, like a command-line argument: ``1e-3`` is a
number for a numeric option, and ``8:30``, ``yes`` and ``00`` are strings for a text option.
"""

import argparse
import difflib
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.text_file import read_text
from ocelot_em.io.yaml_file import MAX_NBYTES, MAX_UNQUOTED, read_yaml

_NULL, _BOOLEAN = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"

_TRUE = ("true", "yes", "on")
"""Spellings of true in YAML 1.1; case is ignored."""

_FLAGS = (argparse._StoreTrueAction, argparse._StoreFalseAction)


class _Replaced(list[Any]):
    """A default list that the command line replaces: argparse appends to a copy of it."""

    def __copy__(self) -> list[Any]:
        return []


_KINDS = {int: "a whole number", float: "a number", str: "text"}
"""Names of types in error messages; other types use their own name."""


class _Reread(Exception):
    """Raised when a file has changed the defaults: parse the command line again."""


class _ConfigAction(argparse.Action):
    """Applies a file at its first occurrence, and has the command line parsed again."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._applied: list[str] = []

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        *_: Any,
    ) -> None:
        if values not in self._applied:
            apply_config(parser, values)
            self._applied.append(values)
            raise _Reread
        setattr(namespace, self.dest, values)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--config FILE`` to a command, for :func:`parse_arguments`.

    If several files set a key, the last one takes precedence.
    """
    parser.add_argument(
        "--config",
        action=_ConfigAction,
        metavar="FILE",
        help="options by name, in YAML; those given here win; paths are relative to this folder",
    )


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line whose options may come from files.

    Parameters
    ----------
    parser
        Parser of the whole command line; its commands had :func:`add_config_option`. Create one
        per call: files change its defaults.
    arguments
        Arguments; None uses those of the process.

    Raises
    ------
    InvalidInputError
        As :func:`apply_config`.
    """
    while True:
        try:
            return parser.parse_args(arguments)
        except _Reread:
            continue


def apply_config(parser: argparse.ArgumentParser, path: str | PathLike[str]) -> None:
    """Make the values of a file the defaults of a command's options.

    Options in the file are no longer required. The command line overrides the file; it replaces
    lists instead of extending them.

    Parameters
    ----------
    parser
        Parser of one command.
    path
        YAML file with a mapping. Keys are option names without leading dashes, with ``-`` or ``_``,
        and names of positional arguments; flags take ``true`` or ``false``, and options with
        several values take a list. Relative paths are relative to the current folder, as on the
        command line, not to the file.

    Raises
    ------
    InvalidInputError
        The file is invalid, keys are unknown or duplicated, or options reject values; lists all
        problems with file, line and key. No value is applied.
    """
    actions = _actions_by_name(parser)
    problems, values = list[str](), dict[str, Any]()
    seen: dict[str, int] = {}
    for entry in _read(path):
        where, name = f"{path}: line {entry.line}: {entry.key}", entry.key.replace("_", "-")
        if name not in actions:
            problems.append(f"{where}: {_unknown(name, actions, parser.prog)}")
        elif name in seen:
            problems.append(f"{where}: is there twice, first on line {seen[name]}")
        else:
            action = actions[name]
            try:
                values[action.dest] = _value(action, entry.node)
            except InvalidInputError as error:
                problems += [f"{where}: {problem}" for problem in error.problems]
        seen.setdefault(name, entry.line)
    if problems:
        raise InvalidInputError(problems)
    for action in actions.values():
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)


class _Entry(NamedTuple):
    key: str
    line: int
    node: Any


def _read(path: str | PathLike[str]) -> list[_Entry]:
    """Validate a file with the strict reader, and return its keys, lines and nodes."""
    import yaml

    what = "options and their values"
    read_yaml(path, what)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    root = yaml.compose(read_text(Path(path), MAX_NBYTES, what), Loader=loader)
    return [_Entry(key.value, key.start_mark.line + 1, node) for key, node in root.value]


def _actions_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options that a file can set: those that store or append values, and flags."""
    actions = dict[str, argparse.Action]()
    for action in parser._actions:
        if isinstance(action, (argparse._StoreAction, argparse._AppendAction, *_FLAGS)):
            for name in action.option_strings or ("--" + action.dest,):
                if name.startswith("--"):
                    actions[name.removeprefix("--").replace("_", "-")] = action
    return actions


def _unknown(name: str, actions: Mapping[str, object], command: str) -> str:
    near = difflib.get_close_matches(name, actions, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(actions))}"
    return f"'{command}' has no such option; {hint}"


def _value(action: argparse.Action, node: Any) -> Any:
    """Convert a value as its option does."""
    if isinstance(action, _FLAGS):
        if node.tag != _BOOLEAN:
            raise InvalidInputError(f"expected true or false, got {_shown(node)}")
        return action.const if node.value.lower() in _TRUE else not action.const
    appends = isinstance(action, argparse._AppendAction)
    if not appends and action.nargs in (None, argparse.OPTIONAL):
        return _one(action, node)
    n = action.nargs if isinstance(action.nargs, int) else None
    least = n or (0 if action.nargs == argparse.ZERO_OR_MORE else 1)
    if node.id != "sequence" or len(node.value) < least or len(node.value) > (n or math.inf):
        wanted = f"{n} values" if n else "one or more values" if least else "values"
        raise InvalidInputError(f"expected a list of {wanted}, as in [A, B], got {_shown(node)}")
    values, problems = [], []
    for number, item in enumerate(node.value, 1):
        try:
            values.append(_one(action, item))
        except InvalidInputError as error:
            problems.append(f"value {number}: {error}")
    if problems:
        raise InvalidInputError(problems)
    return _Replaced(values) if appends else values


def _one(action: argparse.Action, node: Any) -> Any:
    kind: Any = action.type or str
    name = _KINDS.get(kind) or getattr(kind, "__name__", repr(kind))
    if node.id != "scalar" or node.tag == _NULL:
        hint = "; leave the key out for the default" if node.tag == _NULL else ""
        raise InvalidInputError(f"expected {name}, got {_shown(node)}{hint}")
    try:
        value = kind(node.value)
    except argparse.ArgumentTypeError as error:
        raise InvalidInputError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"expected {name}, got {node.value!r}") from error
    if action.choices is not None and value not in action.choices:
        allowed = ", ".join(map(str, action.choices))
        raise InvalidInputError(f"expected one of {allowed}, got {value!r}")
    return value


def _shown(node: Any) -> str:
    if node.id == "sequence":
        return f"a list of {len(node.value)}"
    if node.id == "mapping":
        return "a mapping"
    return "nothing" if node.tag == _NULL else repr(node.value)


def write_config(path: str | PathLike[str], options: Mapping[str, object]) -> None:
    """Write the options of a run to a file for ``--config``.

    Parameters
    ----------
    path
        The file; an existing one is replaced atomically.
    options
        Strings, paths, numbers, booleans, or sequences of them, by name with ``-`` or ``_``. A
        mapping becomes strings ``KEY=VALUE``, one per value. None and empty sequences are omitted,
        because no command line can express them.

    Raises
    ------
    InvalidInputError
        Some values cannot be written; lists all of them.
    StorageError
        The file cannot be written.
    """
    from ocelot_em.particles.table import write_file

    problems, written = list[str](), dict[str, Any]()
    for name, value in options.items():
        key = name.replace("_", "-")
        try:
            plain = _plain_or_several(value)
        except InvalidInputError as error:
            problems.append(f"{path}: {key}: {error}")
            continue
        if key in written:
            problems.append(f"{path}: {key}: expected it once, got it as {name!r}, too")
        elif plain not in (None, []):
            written[key] = plain
    if problems:
        raise InvalidInputError(problems)
    write_file(path, _as_yaml(written).encode())


def _plain_or_several(value: object) -> Any:
    if isinstance(value, Mapping):
        pairs = [(key, _plain_or_several(inner)) for key, inner in value.items()]
        return [
            f"{key}={item}"
            for key, inner in pairs
            for item in (inner if isinstance(inner, list) else [inner])
            if item is not None
        ]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if value is None else _plain(value)


def _plain(value: object) -> str | int | float:
    """Return a YAML scalar that is read back like the value on the command line."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if not isinstance(value, (str, PathLike)):
        raise InvalidInputError(f"expected text, a number or a list of them, got {value!r}")
    text = fspath(value)
    if not isinstance(text, str) or not _is_unicode(text):
        raise InvalidInputError(f"expected text that is Unicode, got {text!r}")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]
        """Quotes strings that would not be read back unquoted."""

    def represent_text(dumper: Any, text: str) -> Any:
        # PyYAML writes some line breaks in a form that it reads back as others.
        style = None if text.isprintable() and len(text) <= MAX_UNQUOTED else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    text: str = yaml.dump(
        dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text
