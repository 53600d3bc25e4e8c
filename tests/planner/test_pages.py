"""Pages: self-contained, escaped, and readable in a real browser at a laptop's and a telephone's width."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from planner.page import comparison_page, curve_page, plan_page
from planner.pictures.of_plan import curve_of_plan
from planner.pictures.points import Point
from planner.pictures.svg import DARK, LIGHT
from planner.plan_file import Plan
from tests.planner.plans import chain, make_plan, plan_fields
from tests.planner.test_pictures import NASTY, nasty_plan

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium")


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def pages(plan: Plan) -> dict[str, str]:
    """Every kind of page."""
    others = curve_of_plan(plan).points
    points = [Point(NASTY, "plan", 700, 690, 0.05, 0.04), Point("within 90%", "plan", 800, 750, 0.01, 0.0)]
    return {
        "plan": plan_page(plan),
        "curve": curve_page(NASTY, 750, points, others),
        "comparison": comparison_page(plan, make_plan(), (NASTY, "b.json")),
    }


@pytest.mark.parametrize("kind", ["plan", "curve", "comparison"])
def test_a_page_loads_nothing_and_runs_nothing(kind: str) -> None:
    page = pages(nasty_plan())[kind]
    reader = Reader(page)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    names = {name for name, _ in reader.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    assert any(NASTY in words for words in reader.words)  # shown as text, as it is


def test_the_page_of_a_plan_has_everything() -> None:
    text = " ".join(Reader(plan_page(make_plan())).words)
    for part in (
        *("Chain within 655 bytes", "5.26 %", "What the budget covers", "parameters", "left of the budget"),
        *("layers.{0-2,4-5}", "released, for", "The instant of the peak", "model.py:10", "chen-sqrt"),
        *("checkpoint every block", "The graph", "a note", "feasible"),
    ):
        assert part in text, part


def test_the_comparison_says_what_differs() -> None:
    everything = Plan(**plan_fields(chain()))
    text = " ".join(Reader(comparison_page(everything, make_plan(), ("a.json", "b.json"))).words)
    for part in ("layers.*", "600 bytes", "500 bytes", "+5.26 points", "+1 s"):
        assert part in text, part
    text = " ".join(Reader(comparison_page(make_plan(), make_plan(solver="other"), ("a.json", "b.json"))).words)
    assert "Both keep and recompute the same, module by module." in text
    assert "differs" in text


def browse(arguments: list[str], profile: Path) -> str:
    """Run the browser without a window; returns what it prints."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    measure = "<script>document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;"
    measure += "document.body.dataset.shown = getComputedStyle(document.querySelector('.narrow')).display</script>"
    for kind, page in pages(make_plan()).items():
        # The page's own policy would refuse the ruler.
        path = tmp_path / f"{kind}.html"
        path.write_text(re.sub(r'<meta http-equiv="Content[^>]*>', "", page).replace("</main>", f"</main>{measure}"))
        shown = browse(["--dump-dom", f"--window-size={width},900", path.as_uri()], tmp_path)
        assert re.search(r'data-over="(-?\d+)"', shown)[1] == "0"  # type: ignore[index]
        assert ('data-shown="block"' in shown) == (width < 700)


@in_a_browser
@pytest.mark.parametrize(("flags", "colours"), [([], LIGHT), (["--force-dark-mode"], DARK)], ids=["light", "dark"])
def test_both_themes_are_drawn(flags: list[str], colours: dict[str, str], tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image", reason="Pillow comes with matplotlib, an optional extra")
    page, shot = tmp_path / "plan.html", tmp_path / "shot.png"
    page.write_text(plan_page(make_plan()))
    flags = [*flags, *(["--blink-settings=preferredColorScheme=0"] if flags else [])]
    browse([*flags, f"--screenshot={shot}", "--window-size=1280,1400", page.as_uri()], tmp_path / "profile")
    with images.open(shot) as image:
        found = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.convert("RGB").getcolors(1 << 20)}
        corner = "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((3, 3)))
    assert corner == colours["paper"]
    for name in ("panel", "line", "store"):
        assert colours[name] in found, name
