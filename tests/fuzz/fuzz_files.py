"""Fuzz a reader of foreign files until libFuzzer's options end it, or something is found.

``python -m tests.fuzz.fuzz_files KIND [-max_total_time=60 ...]``, from the repository's root; a
file instead of options is read once, as when a finding is looked into.
"""

import sys

from tests.fuzz.common import folder_until_exit, instrumented, run

with instrumented():
    from tests.fuzz.files import KINDS

if __name__ == "__main__":
    kind, *options = sys.argv[1:] or [""]
    if kind not in KINDS:
        sys.exit(f"{__doc__}\nKIND: {', '.join(KINDS)}")
    seeds, read = KINDS[kind](folder_until_exit())
    run(read, seeds, options)
