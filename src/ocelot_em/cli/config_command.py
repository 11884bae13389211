"""The command ``config``: an example of a configuration file, with comments."""

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import App, Argument, Group, Parameter

from ocelot_em.cli.config_file import as_yaml
from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import PathOrUrl
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.problems import suggestion

WIDTH = 88
"""Maximum width of a comment."""


def config(
    command: str = "merge",
    /,
    *,
    output: Annotated[PathOrUrl | None, Parameter(alias="-o")] = None,
    overwrite: bool = False,
    app: Annotated[App, Parameter(parse=False)],
) -> None:
    """Write a configuration file with all options of a command, their meaning and defaults.

    Parameters
    ----------
    command
        Command that the file is for.
    output
        YAML file to write. Default: standard output.
    overwrite
        Replace an existing file.
    app
        All commands.
    """
    known = [name for name in app if not name.startswith("-") and name != "config"]
    if command not in known:
        hint = suggestion(command, known) or f"; expected one of {', '.join(known)}"
        raise InvalidInputError(f"config: unknown command {command!r}{hint}")
    text, console = "\n".join(example(app, command)), open_console()
    if output is None:
        console.print(text)
        return
    from ocelot_em.store.whole_file import write_file

    write_file(output, f"{text}\n".encode(), overwrite=overwrite)
    console.print(f"wrote {output}; set its options, then: ocelot {command} --config {output}")


def example(app: App, command: str) -> Iterator[str]:
    """Yield the lines of an example: every option of a command as a comment."""
    yield f"# Options of ocelot {command}, read by: ocelot {command} --config FILE"
    yield "# Remove '# ' before an option to set it; the command line takes precedence."
    heading = outer = ""
    options = app[command].assemble_argument_collection(parse_docstring=True)
    for option in (option for option in options if option.parse and option.name != "*"):
        title = next((group.name for group in groups_of(option)), "Options")
        name, _, inner = option.name.removeprefix("--").lower().partition(".")
        if option.children:
            continue
        if title != heading:
            heading = title
            yield from ("", f"## {title if '--' in title else title.upper()}")
        yield ""
        if inner and name != outer:
            yield f"# {name}:"
        outer = name
        text = (option.parameter.help or "").replace("``", "")
        yield from textwrap.wrap(text, WIDTH, initial_indent="## ", subsequent_indent="## ")
        yield f"# {'  ' * bool(inner)}{_with_value(inner or name, option)}"


def groups_of(option: Argument) -> list[Group]:
    """Return the groups under which the help shows an option."""
    given = option.parameter.group
    several = [given] if isinstance(given, Group) else list(given or ())
    return [group for group in several if isinstance(group, Group)]


def _with_value(name: str, option: Argument) -> str:
    """Return an option with its default, or with the kind of value where there is none."""
    default: Any = option.field_info.default
    if isinstance(default, bool | int | float | str) and default != "":
        return as_yaml({name: default}).rstrip()
    kinds = {int: "NUMBER", float: "NUMBER", bool: "false"}
    kind = option.parameter.metavar or kinds.get(option.resolved_hint, "TEXT")
    return f"{name}: [{kind}]" if option.token_count()[1] else f"{name}: {kind}"
