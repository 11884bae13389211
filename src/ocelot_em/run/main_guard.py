"""The guard ``if __name__ == "__main__":``, which scripts need that start worker processes."""

import ast
import contextlib
import multiprocessing
import sys
import tokenize
from types import FrameType

from ocelot_em.errors import PlanError


def require_main_guard(cluster: str) -> None:
    """Refuse to start processes from a script that each of them would run again.

    Raises
    ------
    PlanError
        The running statement of the script is outside ``if __name__ == "__main__":``.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    is_started = getattr(multiprocessing.current_process(), "_inheriting", False)
    line = _running_line(script)
    if is_started or (script and line and not _is_guarded(script, line)):
        where = f"{script}: line {line}: " if script and line else ""
        raise PlanError(
            f"{where}cluster {cluster!r} starts processes that import this script, and would run "
            "it again in each of them: put what it does below: if __name__ == '__main__':"
        )


def _running_line(script: str | None) -> int | None:
    """Return the line of the main script's running statement, if there is one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and code.co_filename == script:
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_guarded(script: str, line: int) -> bool:
    """Return whether a line is in a conditional statement; also if a script cannot be read."""
    with contextlib.suppress(OSError, SyntaxError, ValueError), tokenize.open(script) as file:
        conditions = [n for n in ast.walk(ast.parse(file.read())) if isinstance(n, ast.If)]
        return any(n.lineno <= line <= (n.end_lineno or line) for n in conditions)
    return True
