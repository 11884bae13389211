"""What is wrong with a command line, in plain sentences."""

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.problems import in_words, suggestion


def in_one_sentence(error: CycloptsError) -> str:
    """Describe an error of the command line, with a suggestion and the command that helps."""
    command = " ".join(("ocelot", *(error.command_chain or ())))
    problem = _problem(error)
    if isinstance(error, (CoercionError, ValidationError)):
        return problem
    return f"{problem}{' See' if problem.endswith('?') else '; see'} '{command} --help'"


def _problem(error: CycloptsError) -> str:
    unknown = [word for word in error.unused_tokens or () if word.startswith("--") and word != "--"]
    if isinstance(error, UnknownCommandError) and error.app and error.unused_tokens:
        word, commands = error.unused_tokens[0], [n for n in error.app if not n.startswith("-")]
        if word.startswith("-"):
            return _unknown(word, error)
        hint = suggestion(word, commands) or f"; expected one of {', '.join(commands)}"
        return f"unknown command {word!r}{hint}"
    if isinstance(error, UnknownOptionError):
        return _unknown(error.token.keyword or error.token.value, error)
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}"
    if isinstance(error, MissingArgumentError) and error.argument:
        if error.argument.tokens or error.keyword:
            return f"{error.keyword or error.argument.name}: expected a value"
        if unknown:
            return _unknown(unknown[0].partition("=")[0], error)
        return f"{error.argument.name} is required"
    if isinstance(error, (CoercionError, ValidationError)) and error.__cause__ and error.argument:
        return str(InvalidInputError(_invalid(error)))
    return str(error)


def _unknown(word: str, error: CycloptsError) -> str:
    app = error.app
    options = app.assemble_argument_collection() if app and app.default_command else ()
    names = [name for option in options for name in option.names]
    return f"unknown option {word}{suggestion(word, [*names, '--config', '--verbose', '--help'])}"


def _invalid(error: CoercionError | ValidationError) -> list[str]:
    """Name every option whose value pydantic refused."""
    from pydantic import ValidationError as InvalidError

    if not isinstance(error.__cause__, InvalidError) or error.argument is None:
        return [str(error)]
    names = {option.keys: option.name for option in error.argument.children_recursive}
    return [
        f"{names.get(tuple(k for k in p['loc'] if isinstance(k, str)), error.argument.name)}: "
        f"{in_words(p)}"
        for p in error.__cause__.errors()
    ]
