"""The report in a headless Chromium: films play, nothing is cut off, curves answer the pointer.

It needs a Chromium (Debian: chromium-headless-shell) and `pip install playwright`; no browser of
playwright's own is downloaded. CHROMIUM names another binary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.files import read_jsonl
from launch import report
from tests.launch.reporting.pages import (
    alignment_run,
    clip,
    evaluation,
    lines,
    make_demo,
)

pytestmark = pytest.mark.slow

BINARIES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
)
LONG = "a_reward_with_a_name_that_is_longer_than_its_column"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    found = map(shutil.which, BINARIES)
    binary = os.environ.get("CHROMIUM") or next(filter(None, found), None)
    if binary is None:
        pytest.skip("needs a Chromium: apt install chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        # tests in a container run as root
        browser = playwright.chromium.launch(
            executable_path=binary, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def add_heldout(run: Path) -> None:
    """Save two held-out prompts at three steps."""
    for step in (0, 20, 40):
        folder = run / "evaluation" / f"step-{step:06d}"
        rows = []
        for i in range(2):
            rows.append(
                {"file": f"{i}.mp4", "prompt": f"held out {i}", "seed": i, "texts": {}}
                | {"rewards": {"descore": step / 10, LONG: 1.5}}
            )
            clip(folder / f"{i}.mp4", 3 * step)
        lines(folder / "samples.jsonl", rows)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a demo folder and of two runs that are compared."""
    root = tmp_path_factory.mktemp("browser")
    demo = make_demo(root / "demo")
    add_heldout(demo / "grpo")
    # A long name of a reward is what breaks a narrow page.
    for step in (0, 39):
        file = demo / "grpo" / "samples" / f"step-{step:06d}" / "samples.jsonl"
        rows = read_jsonl(file)
        for row in rows:
            scored = None if (step, row["member"]) == (0, 0) else -1234.5678
            row["rewards"] |= {"shapes": row["member"] / 2, LONG: scored}
        lines(file, rows)
    evaluation(demo / "eval_dpo", [0.3, 0.5, 0.7, 0.7], adapter="x/dpo/final")
    other = alignment_run(root / "other" / "grpo")
    add_heldout(other)
    with (other / "config.yaml").open("a") as config:
        config.write(f"checkpoint: runs/{'long_' * 30}\n")
    report.main([str(demo)])
    both = [str(demo / "grpo"), str(other)]
    report.main([*both, "--out", str(root / "compared.html")])
    return {"demo": demo / "report.html", "compared": root / "compared.html"}


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end of the test no message may be on its console."""
    said: list[str] = []
    contexts = []

    def open_page(path: Path, *, width: int = 1400, scheme: str = "light") -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto(path.as_uri())
        return page

    requests: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    # the page itself and its films
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("name", ["demo", "compared"])
def test_films_play_and_nothing_is_cut_off(
    pages: dict[str, Path],
    visit: Callable[..., Any],
    name: str,
    width: int,
    scheme: str,
) -> None:
    page = visit(pages[name], width=width, scheme=scheme)
    films = page.locator("video:visible")
    assert films.count() >= 4
    for i in range(films.count()):
        film = films.nth(i)
        film.scroll_into_view_if_needed()
        handle = film.element_handle()
        playing = (
            "film => film.error !== null || (film.readyState >= 2 && !film.paused)"
        )
        page.wait_for_function(playing, arg=handle)
        assert film.evaluate("film => [film.error, film.videoWidth]") == [None, 16]
    # no bar at the bottom, and no text that its box does not show
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter((e) => !e.closest("svg, .plot"))
            .filter((e) => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1)
            .filter((e) => getComputedStyle(e).overflowX !== "visible")
            .map((e) => e.className + ": " + e.textContent.slice(0, 60))"""
    )
    assert cut == []


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)" by WCAG 2."""
    parts = color[color.index("(") + 1 : -1].split(",")
    linear = []
    for part in parts[:3]:
        share = float(part) / 255
        low = share / 12.92
        high = ((share + 0.055) / 1.055) ** 2.4
        linear.append(low if share <= 0.04045 else high)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_both_schemes(
    pages: dict[str, Path], visit: Callable[..., Any], scheme: str
) -> None:
    """WCAG asks for a contrast of 4.5 between a text and what is behind it."""
    page = visit(pages["demo"], scheme=scheme)
    behind = luminance(
        page.evaluate(
            "getComputedStyle(document.querySelector('.card')).backgroundColor"
        )
    )
    assert (behind < 0.2) == (scheme == "dark")
    for selector in (".card h3", ".card dt", "figcaption small", ".up", "nav a"):
        color = page.evaluate(
            "s => getComputedStyle(document.querySelector(s)).color", selector
        )
        light, dim = sorted((luminance(color), behind), reverse=True)
        assert (light + 0.05) / (dim + 0.05) >= 4.5, selector


def test_curve_shows_its_values_and_zooms(
    pages: dict[str, Path], visit: Callable[..., Any]
) -> None:
    """The reward is 0.1 step: 2 at step 20 in the middle, where the average is 2 as well."""
    page = visit(pages["demo"])
    plot = page.locator("figure", has_text="Reward: descore (trained").locator(".plot")
    plot.scroll_into_view_if_needed()
    area = plot.locator(".u-over")
    box = area.bounding_box()

    def at(share: float) -> tuple[float, float]:
        return box["x"] + share * box["width"], box["y"] + box["height"] / 2

    # steps 0 to 39
    page.mouse.move(*at(20 / 39))
    values = plot.locator(".values")
    assert values.inner_text().split("\n") == ["step 20", "value 2", "average 2"]
    # a drag from step 10 to 30 shows these
    page.mouse.move(*at(10 / 39))
    page.mouse.down()
    page.mouse.move(*at(30 / 39), steps=5)
    page.mouse.up()

    def steps_at_the_ends() -> list[int]:
        steps = []
        for share in (0.002, 0.998):
            page.mouse.move(*at(share))
            steps.append(int(values.inner_text().split()[1]))
        return steps

    # a pixel is a third of a step
    assert steps_at_the_ends() in ([10, 30], [10, 29], [11, 30])
    page.mouse.dblclick(*at(0.5))
    assert steps_at_the_ends() == [0, 39]


def test_slider_shows_one_step(
    pages: dict[str, Path], visit: Callable[..., Any]
) -> None:
    page = visit(pages["demo"])
    section = page.locator("#same-prompts")
    slides = section.locator(".slide")
    shown = [slides.nth(i).is_visible() for i in range(slides.count())]
    assert shown == [False, False, True]
    assert section.locator("output").inner_text() == "step 40"
    section.locator("input").focus()
    page.keyboard.press("ArrowLeft")
    assert section.locator("output").inner_text() == "step 20"
    assert slides.nth(1).is_visible()
    assert not slides.nth(2).is_visible()


def test_table_is_sorted_by_its_headings(
    pages: dict[str, Path], visit: Callable[..., Any]
) -> None:
    """Advantages -0.25, 0.75, -0.5 at two steps."""
    page = visit(pages["demo"])
    table = page.locator("table.rollouts")
    column = table.locator("tbody tr td:nth-child(4)")
    button = table.get_by_role("button", name="advantage")
    button.click()
    assert column.all_inner_texts() == ["-0.5"] * 2 + ["-0.25"] * 2 + ["0.75"] * 2
    button.click()
    assert column.all_inner_texts() == ["0.75"] * 2 + ["-0.25"] * 2 + ["-0.5"] * 2
    # what has no score comes last either way
    button = table.get_by_role("button", name=LONG)
    for _ in range(2):
        button.click()
        scores = table.locator("tbody tr td:nth-child(7)").all_inner_texts()
        assert scores == ["-1.23e+03"] * 5 + ["–"]
    # chains of thought are folded until somebody asks
    chain = table.locator("pre").first
    assert not chain.is_visible()
    table.locator("summary").first.click()
    assert chain.inner_text() == "chain"


def watched(pages: dict[str, Path], seconds: int, prompt: str) -> Path:
    """Write a page that loads itself again, with another prompt, as --watch does."""
    text = pages["demo"].read_text(encoding="utf-8")
    text = text.replace("<body>", f'<body data-refresh="{seconds}">')
    path = pages["demo"].parent / "watched.html"
    path.write_text(text.replace("held out 0", prompt), encoding="utf-8")
    return path


def test_page_that_loads_itself_again_keeps_the_place(
    pages: dict[str, Path], visit: Callable[..., Any]
) -> None:
    page = visit(watched(pages, 3600, "first"))
    section = page.locator("#same-prompts")
    section.locator("input").fill("0")
    page.locator("table.rollouts summary").first.click()
    page.evaluate("scrollTo(0, 900)")
    watched(pages, 3600, "second")
    page.evaluate("loadAgain()")
    page.wait_for_selector("text=second", state="attached")
    page.wait_for_function("() => document.readyState === 'complete'")
    assert page.evaluate("scrollY") == 900
    assert section.locator("output").inner_text() == "step 0"
    assert page.locator("table.rollouts pre").first.is_visible()


def test_page_loads_itself_again_after_its_seconds(
    pages: dict[str, Path], visit: Callable[..., Any]
) -> None:
    page = visit(watched(pages, 1, "first"))
    watched(pages, 1, "second")
    page.wait_for_selector("text=second", state="attached")


def test_page_without_scripts_shows_everything(
    pages: dict[str, Path], chromium: Any
) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["demo"].as_uri())
    slides = page.locator("#same-prompts .slide")
    assert [slides.nth(i).is_visible() for i in range(3)] == [True] * 3
    assert page.locator(".plot svg").count() == page.locator(".plot").count()
    context.close()
