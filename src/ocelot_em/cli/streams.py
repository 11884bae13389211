"""Standard output and standard error as the command line uses them: they cannot end a run.

A reader may go away (``ocelot merge | head``), a stream may be closed, a terminal may lack
characters. None of this stops a command.
"""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

from ocelot_em.errors import printable

_PLAIN = {"Å": "A", "µ": "u", "×": "x", "—": "-", "✓": "+", "✗": "x"}
"""ASCII characters for terminals that lack ours; other characters become escapes."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks; an error handler of :mod:`codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escaped), error.end


class Outlet:
    """A text stream of which no write fails: text is edited, and dropped if it cannot be written.

    The other methods and attributes are those of the wrapped stream.
    """

    def __init__(self, stream: TextIO, edit: Callable[[str], str] = str) -> None:
        self._stream = stream
        self._edit = edit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self._dropping():
            self._stream.write(self._edit(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Any:
        try:
            yield
        except (BlockingIOError, ValueError):  # a reader that is late, or a closed file
            pass
        except OSError as error:
            # Everything else goes nowhere, also what is left in buffers at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE and self is not sys.stderr:
                reason = f"the output cannot be written: {error.strerror}"
                print(f"ocelot: {reason}; the command continues", file=sys.stderr)


def secure_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that cannot end a run.

    Standard error shows no control characters. On standard output, the console is responsible for
    that, because it needs them itself.
    """
    # Without this, the next files that are opened would be the standard streams that are closed.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    codecs.register_error("ocelot-plain", _plain)
    for name, number, edit in (("stdout", 1, str), ("stderr", 2, printable)):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ocelot-plain")
        setattr(sys, name, cast("TextIO", Outlet(stream, edit)))
