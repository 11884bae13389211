"""Every reader of foreign bytes, fuzzed for some seconds: no crash, and the input if there is."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.files import KINDS

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
SECONDS = 5
LIMITS = ("-rss_limit_mb=2048", "-timeout=10", f"-max_total_time={SECONDS}")
STORES = ("metadata", "frame", "store")


@pytest.mark.parametrize(
    ("fuzzer", "kind"),
    [*(("fuzz_files", kind) for kind in KINDS), *(("fuzz_stores", kind) for kind in STORES)],
)
def test_no_input_gets_out_of_hand(fuzzer: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="coverage-guided fuzzing needs atheris")
    command = [sys.executable, "-m", f"tests.fuzz.{fuzzer}", kind, *LIMITS]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=400,
    )
    # At its end it has the input in base 64, and where it is.
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-10_000:]
    assert "Done " in done.stderr, done.stderr
