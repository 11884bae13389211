"""Every reader of foreign bytes, fuzzed for a while: no crash, and the input if there is one."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.fuzz.files import KINDS

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
LIMITS = ("-rss_limit_mb=2048", "-timeout=100")
"""The time is for an input that hangs its reader: a busy machine needs seconds for some others."""

STORES = ["metadata", "frame", "shard", "store"]


@pytest.mark.parametrize(
    "enough", ["-runs=150", pytest.param("-max_total_time=20", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(("fuzzer", "kinds"), [("fuzz_files", [*KINDS]), ("fuzz_stores", STORES)])
def test_no_input_gets_out_of_hand(
    fuzzer: str, kinds: Sequence[str], enough: str, tmp_path: Path
) -> None:
    pytest.importorskip("atheris", reason="coverage-guided fuzzing needs atheris")
    command = [sys.executable, "-m", f"tests.fuzz.{fuzzer}", *kinds, *LIMITS]
    done = subprocess.run(
        [*command, enough, f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=540,
    )
    # At its end it has the input in base 64, and where it is.
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-10_000:]
    for kind in kinds:
        assert f"{kind}: ended with 0" in done.stderr
    assert done.stderr.count("Done ") == len(kinds)
