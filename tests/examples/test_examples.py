"""The examples run, at quick sizes, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example with arguments, as `python example.py` does; returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_solver_of_ones_own(example) -> None:
    own, chosen = example("write_a_solver.py", "--layers", "3", "--budget", "75%").splitlines()
    assert own.startswith("drop-cheapest")
    assert "lower bound 0.000%" in own
    overheads = [float(line.partition("overhead ")[2].partition("%")[0]) for line in (own, chosen)]
    assert overheads[0] >= overheads[1] > 0


def test_a_plan_made_by_another_process(example, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    assert "overhead" in example("export_and_apply.py", "plan", path)
    assert "measured peak" in example("export_and_apply.py", "train", path)  # exits with 1 where a loss differs


def test_planning_for_a_card_that_is_not_there(example) -> None:
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    out = example("plan_for_h100.py", *("--layers", "1", "--width", "64", "--batch", "1", "--cards", "h100-80gb"))
    assert out.startswith("h100-80gb")
    assert "overhead 0.00%" in out


@pytest.mark.parametrize(
    ("script", "needs"), [("train_huggingface.py", "accelerate"), ("train_lightning.py", "lightning")]
)
@pytest.mark.filterwarnings("ignore")
def test_training_with_a_trainer(example, script: str, needs: str) -> None:
    pytest.importorskip(needs, reason=f"{needs} is an optional extra")
    small = ("--layers", "1", "--width", "32", "--length", "32", "--batch", "4", "--steps", "3", "--accumulate", "2")
    out = example(script, *small, "--budget", "90%", "--check")
    assert "optimizer state" in out
    assert "overhead" in out
    assert out.splitlines()[-1] == "equal to training without a plan True"


def test_comparing_solvers(example, tmp_path: Path) -> None:
    page = tmp_path / "curve.html"
    solvers = ("--solvers", "auto", "checkmate", "store-all")
    out = example("compare_solvers.py", "--blocks", "2", "--budget", "85%", "--html", str(page), *solvers)
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "overhead" in rows["checkmate"]
    assert rows["store-all"].startswith("store-all             unknown")
    assert "checkmate" in page.read_text()


def test_training_a_gpt2_within_a_budget(example) -> None:
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    out = example("demo_gpt2.py", "--layers", "1", "--batch", "1", "--steps", "2", "--fraction", "0.95")
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line and not line.startswith(" "))
    said = {label: text.strip() for label, text in rows.items()}
    assert said["largest gradient difference"] == "0"
    assert said["losses of 2 AdamW steps equal"] == said["parameters equal after them"] == "True"


def test_a_loop_with_revolve(example) -> None:
    out = example("heat_equation.py", "--steps", "600", "--slots", "6", "--points", "8")
    assert "500 steps, against plain autograd: gradients equal bit for bit" in out
    assert "600 steps with 6 slots:" in out


def test_the_picture_of_the_readme(example, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    path = tmp_path / "memory.svg"
    out = example(
        "readme_picture.py", str(path), *("--layers", "1", "--width", "64", "--batch", "1", "--budget", "100%")
    )
    assert "h100-80gb" in out
    assert path.read_text().startswith("<svg")
