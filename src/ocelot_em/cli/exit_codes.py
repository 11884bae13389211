"""Exit codes of ``ocelot``."""

DONE, FAILED, REFUSED, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

EXIT_CODES = """\
Exit codes:

- 0: done
- 1: some tiles failed, micrographs are bad, or check or doctor found problems; the rest is kept
- 2: refused: nothing was started
- 75: stopped by SIGTERM or SIGUSR1, or cluster lost; the same command resumes
- 130: interrupted; the same command resumes
"""
