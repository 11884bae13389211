"""Every reader of foreign files, fuzzed for some seconds: no crash, and the input if there is."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.files import KINDS

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
SECONDS = 5
LIMITS = ("-rss_limit_mb=2048", "-timeout=10", f"-max_total_time={SECONDS}")


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_gets_out_of_hand(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="coverage-guided fuzzing needs atheris")
    command = [sys.executable, "-m", "tests.fuzz.fuzz_files", kind, *LIMITS]
    fuzzer = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=400,
    )
    # At its end it has the input in base 64, and where it is.
    assert fuzzer.returncode == 0, f"{fuzzer.stdout}{fuzzer.stderr}"[-10_000:]
    assert "Done " in fuzzer.stderr, fuzzer.stderr
