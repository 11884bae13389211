"""What is wrong with a value or a name, in plain sentences."""

import re
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from typing import TYPE_CHECKING, TypeVar

from ocelot_em.errors import InvalidInputError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_Kind = TypeVar("_Kind")

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "an object",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What pydantic expected, by its types of errors."""


def in_words(problem: "ErrorDetails") -> str:
    """Describe a problem that pydantic found with a value: what was expected, and what it is."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "missing"
    whole = {k: int(v) for k, v in context.items() if isinstance(v, float) and v.is_integer()}
    text = "unknown" if kind == "extra_forbidden" else problem["msg"]
    if kind in _EXPECTED:
        text = f"expected {_EXPECTED[kind].format(**context | whole)}"
    return f"{text}, got {reprlib.repr(problem['input'])}"


def require(value: object, kind: type[_Kind], expected: str) -> _Kind:
    """Return a value that is of a type; otherwise raise an error that states what is expected.

    >>> require("peaks.csv", dict, "table: expected a dictionary")
    Traceback (most recent call last):
    ocelot_em.errors.InvalidInputError: table: expected a dictionary, got 'peaks.csv'
    """
    if isinstance(value, kind):
        return value
    raise InvalidInputError(f"{expected}, got {kind_text(value)}")


def kind_text(value: object) -> str:
    """Return a short value, such as a path, or the type of an object."""
    is_short = isinstance(value, (str, PathLike, int, float, tuple, type(None)))
    return reprlib.repr(value) if is_short else f"an object of type {type(value).__name__}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known name nearest to a word, if any."""
    names = list(known)
    near = [name for name in names if name.startswith(word)] or get_close_matches(word, names)
    return f"; did you mean {near[0]}?" if near else ""


def option_name(field: str) -> str:
    """Return the option of the command line for a field, whose unit is in the help text.

    Examples
    --------
    >>> option_name("defocus_u_angstrom")
    'defocus-u'
    """
    return re.sub("_(angstrom|degrees|kv|mm|px)$", "", field).replace("_", "-")
