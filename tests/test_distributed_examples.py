"""The distributed examples run as their first lines say, and train what plain DDP and FSDP2 train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("train_ddp.py", ["--budget", "80%"], "equal to plain DDP on every rank True"),
        ("train_fsdp2.py", ["--bf16", "--budget", "90%"], "equal to plain FSDP2 on every rank True"),
    ],
)
def test_the_example_runs(script: str, options: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / script), "--steps", "2", "--layers", "2", "--check", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert expected in result.stdout
    assert "overhead" in result.stdout
