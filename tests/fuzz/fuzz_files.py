"""Fuzz a reader of foreign files until libFuzzer's options end it, or something is found.

``python -m tests.fuzz.fuzz_files KIND... [-max_total_time=60 ...]``, from the repository's root; a
file instead of options is read once, as when a finding is looked into.
"""

import sys

from tests.fuzz.common import instrumented, main

with instrumented():
    from tests.fuzz.files import KINDS

if __name__ == "__main__":
    main(KINDS, sys.argv[1:], __doc__ or "")
