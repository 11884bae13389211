"""The command ``ocelot``, which only parses, prints and exits.

It imports little, so that its help is there at once.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import BoundArguments
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from ocelot_em import __version__
from ocelot_em.cli.examples import epilogue
from ocelot_em.cli.exit_codes import DONE, EXIT_CODES, FAILED, INTERRUPTED, REFUSED, STOPPED
from ocelot_em.cli.parameters import AS_COMMAND, OPTION, PathOrUrl
from ocelot_em.errors import OcelotError, StoppedError, TilesFailedError

COMMANDS = {
    "import": ("import_commands:import_files", "Convert result files into a search."),
    "merge": ("merge_command:app", "Merge the partials of searches, tile by tile."),
    "batch": ("batch_command:app", "Merge many micrographs into one table and one page."),
    "watch": ("info_command:watch", "Show the progress and particles of a running search."),
    "peaks": ("particle_commands:peaks", "Pick particles from a merged result."),
    "detections": (
        "particle_commands:detections",
        "Find all significant poses, beyond the best of each pixel.",
    ),
    "export": ("particle_commands:export", "Write maps or particles for other programs."),
    "report": ("report_command:report", "Write an HTML page to judge merged results by."),
    "compare": ("compare_command:compare", "Compare the particles of two searches on a page."),
    "view": ("view_command:view_map", "Show maps and particles in a browser."),
    "info": ("info_command:info", "Describe a store."),
    "check": ("info_command:check", "Find everything that is wrong with stores."),
    "config": ("config_command:config", "Write a commented configuration file of a command."),
    "doctor": ("trial_commands:doctor", "Test an installation, a folder and a cluster."),
    "simulate": ("trial_commands:simulate", "Make partial results of any size."),
    "demo": ("trial_commands:demo", "Simulate, merge, compare with the truth, save a picture."),
}
"""Where each command is, for when it is needed, and its summary."""

app = App(
    name="ocelot",
    help="Merge the partial results of cryo-EM 2D template matching, out of core.",
    help_epilogue=EXIT_CODES,
    help_format="plaintext",
    version=f"ocelot-em {__version__}",
    default_parameter=OPTION,
    group_parameters=Group.create_default_parameters("Options"),
)
"""The commands; ``app.meta`` has the options of every command, too."""

for _number, (_name, (_place, _summary)) in enumerate(COMMANDS.items()):
    _own = {} if _place.endswith(":app") else AS_COMMAND | {"help_epilogue": epilogue(_name)}
    app.command(f"ocelot_em.cli.{_place}", name=_name, help=_summary, sort_key=_number, **_own)


@app.command(name="--install-completion", sort_key=len(COMMANDS), help_format="markdown")
def install_completion(
    shell: Literal["bash", "zsh", "fish", "powershell"] | None = None,
    *,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
) -> None:
    """Install completion of commands and options for your shell.

    Parameters
    ----------
    shell
        Shell to install it for. Default: the one that runs this command.
    output
        File to write. Default: the shell's own place for completions.
    """
    from cyclopts.completion.install import create_install_completion_command

    create_install_completion_command(app.install_completion, True)(shell=shell, output=output)


EVERY = Parameter(group=Group.create_ordered("Every command", sort_key=2))


@app.meta.default
def launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, EVERY] = False,
    config: Annotated[tuple[PathOrUrl, ...], EVERY] = (),
) -> int:
    """Run a command.

    Parameters
    ----------
    verbose
        Log what happens.
    config
        YAML file with options by name; options of the command line take precedence. Paths in it
        are relative to the current folder.
    """
    import logging

    command, bound = parse(words, config)
    # Set the level of the handler: Dask sets the levels of its loggers when it is imported.
    handler = logging.StreamHandler()
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(levelname)s %(name)s: %(message)s")
    # Failed tiles are reported once, at the end.
    logging.getLogger("ocelot_em.merge.outcome").setLevel(
        logging.DEBUG if verbose else logging.CRITICAL
    )
    return command(*bound.args, **bound.kwargs) or DONE


def parse(
    words: Sequence[str], files: Sequence[PathOrUrl] = ()
) -> tuple[Callable[..., int | None], BoundArguments]:
    """Parse the words of a command, with options from files for those that are not given."""
    if not words:
        raise CycloptsError(msg=f"expected a command: {', '.join(COMMANDS)}", app=app)
    words = _joined(words)
    if files:
        from ocelot_em.cli.config_file import apply_files

        app.config = partial(apply_files, files)
    try:
        command, bound, others = app.parse_args(words, exit_on_error=False, print_error=False)
        bound.arguments |= dict.fromkeys(others, app)
    finally:
        app.config = None
    return command, bound


def _joined(words: Sequence[str]) -> list[str]:
    """Return the words with ``--slurm KEY=VALUE`` as ``--slurm.KEY=VALUE``, and ``--log=-``."""
    joined = list[str]()
    for word in words:
        if joined and (joined[-1] == "--slurm" or [joined[-1], word] == ["--log", "-"]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [re.sub("^--slurm=", "--slurm.", word) for word in joined]


_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

_MORE_THREADS = "raise 'ulimit -u' and 'ulimit -v', or set OPENBLAS_NUM_THREADS=1 and fewer threads"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    from ocelot_em.cli.streams import secure_streams

    # Nothing here uses the threads of BLAS. OpenBLAS starts one per core when NumPy is imported,
    # and interrupts the process (SIGINT) where it may not.
    for name in _BLAS_THREADS:
        os.environ.setdefault(name, "1")
    os.environ["MPLBACKEND"] = "agg"  # figures are only written into files
    secure_streams()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        command, bound, _ = app.meta.parse_args(words, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs) or DONE
    except CycloptsError as error:
        from ocelot_em.cli.refusals import in_one_sentence

        print(f"ocelot: {in_one_sentence(error)}", file=sys.stderr)
        return REFUSED
    except OcelotError as error:
        print(f"ocelot: {error}", file=sys.stderr)
        codes = {TilesFailedError: FAILED, StoppedError: STOPPED}
        return next((code for kind, code in codes.items() if isinstance(error, kind)), REFUSED)
    except BaseException as error:
        if _lacks_threads(error):
            print(f"ocelot: no more threads can be started; {_MORE_THREADS}", file=sys.stderr)
            return REFUSED
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("ocelot: interrupted; the same command resumes the merge", file=sys.stderr)
        return INTERRUPTED


def _lacks_threads(error: BaseException) -> bool:
    """Return whether Python, a Rust library or OpenBLAS could not start a thread."""
    if not isinstance(error, KeyboardInterrupt):
        return re.search("can't (start new|spawn worker) thread", str(error)) is not None
    innermost = error.__traceback__  # OpenBLAS interrupts the import of NumPy
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    folders = re.split(r"[/\\]", code.co_filename)
    return code.co_name == "<module>" and ("numpy" in folders or "scipy" in folders)
