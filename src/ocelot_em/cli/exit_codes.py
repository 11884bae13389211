"""Exit codes of ``ocelot``."""

DONE, FAILED, REFUSED, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


EXIT_CODES = """\
exit codes:
  0    done
  1    failed: some tiles, or 'check' or 'doctor' found problems; the rest is kept
  2    refused: nothing was started
  75   stopped by SIGTERM or SIGUSR1, or the cluster was lost; the same command goes on
  130  interrupted; the same command goes on where it stopped
"""
