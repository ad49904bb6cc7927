"""The page of a run in a real browser: what a reader sees, and what happens when they point, drag, scroll and type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
import tiny

from oxidizr_ref.report.page import write_report

pytestmark = pytest.mark.browser

STEPS = 10_000


def write_run(directory: Path, steps: int, scale: float = 1.0, **more: Any) -> Path:
    """A run's metrics, as if they had been logged at every step: with two mixtures of four experts."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            load = [0.25 + 0.1 * math.sin(step / 50), 0.25 - 0.1 * math.sin(step / 50), 0.25, 0.25]
            record: dict[str, Any] = {
                "step": step,
                "loss": scale * (5 / (1 + step / 200) + 0.2 * math.sin(step)),
                "grad_norm": 1 + math.cos(step),
                "learning_rate": 1e-3 * (1 - step / steps / 2),
                "epoch": step / 100,
                "expert_load": [load, load[::-1]],
                "expert_entropy": [0.9, 0.95],
                "balance_loss": 1.01,
                "dropped_tokens": 0,
                "it/s": 20 + math.sin(step / 10),
                "tokens/s": 5000 + step % 7,
                "memory_mb": 80 + step % 3,
                **more,
            }
            if step % 500 == 0:
                record["eval_loss"] = record["loss"] + 0.1
            file.write(json.dumps(record) + "\n")
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long")
    file = root / "page.html"
    write_report([write_run(root / "first", STEPS)], file)
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints that went back, and another one, on a page."""
    settings = {"max_steps": 6, "save_interval": 2, "eval_fraction": 0.2, "eval_interval": 2}
    run = tiny.make_run(tmp_path_factory.mktemp("trained"), trainer=settings)
    assert run.train() == 0 and run.into("other").train("--max-steps", 4, "--seed", 1) == 0
    assert run.train("--resume", run.path(2), "--set", "trainer.learning_rate=1e-3") == 0
    file = run.root / "page.html"
    write_report([run.directory, run.root / "other"], file)
    return file


@pytest.fixture(scope="module")
def window() -> Iterator[chromium.Chromium]:
    with chromium.Chromium() as browser:
        yield browser


@pytest.fixture
def browser(window: chromium.Chromium) -> Iterator[chromium.Chromium]:
    """At a desktop's size. The page may complain of nothing, and ask for nothing but itself."""
    window.size(1280, 900)
    window.dark(False)
    window.requests.clear()
    window.complaints.clear()
    yield window
    assert window.complaints == []
    assert {url.partition("?")[0].rpartition("/")[2] for url in window.requests} <= {"page.html"}
    assert all(url.startswith("file://") for url in window.requests)


def middle(browser: chromium.Chromium, chart: int = 0, part: float = 0.5) -> tuple[float, float]:
    """A place in a chart, scrolled into view: ``part`` of the way through the steps."""
    box = browser.ask(
        f"(() => {{ const svg = charts[{chart}].svg; svg.scrollIntoView({{block: 'center'}}); const b = "
        "svg.getBoundingClientRect(); return [b.left + LEFT, b.right - RIGHT, b.top + b.height / 2]; })()"
    )
    return box[0] + part * (box[1] - box[0]), box[2]


def legends(browser: chromium.Chromium) -> list[str]:
    return list(browser.ask("[...document.querySelectorAll('.legend')].map(legend => legend.textContent)"))


def steps_shown(browser: chromium.Chromium) -> list[float]:
    return list(browser.ask("[view.low, view.high]"))


def test_ten_thousand_steps_open_in_less_than_two_seconds(browser: chromium.Chromium, page: Path) -> None:
    assert min(browser.open(page) for _ in range(2)) < 2.0
    assert browser.ask("charts.every(chart => chart.drawn > 100)")


def test_every_chart_has_its_curve_a_few_points_a_pixel_and_all_values_behind_it(
    browser: chromium.Chromium, page: Path
) -> None:
    browser.open(page)
    titles = browser.ask("charts.map(chart => chart.title)")
    wanted = ["Loss", "Learning rate", "Gradient norm", "Steps a second", "Tokens a second", "Memory", "Balance loss"]
    assert titles == [*wanted, "Entropy of expert load"]
    assert browser.ask("charts.map(chart => chart.curves.map(curve => curve.xs.length))") == [
        [STEPS, STEPS // 500],
        *[[STEPS]] * 6,
        [STEPS, STEPS],
    ]
    for width, points in browser.ask("charts.map(chart => [chart.svg.clientWidth, chart.drawn / chart.curves.length])"):
        assert width / 4 < points < 4 * width
    assert browser.ask("document.querySelectorAll('svg.chart path.curve').length") == 10
    assert browser.ask("heats.map(heat => heat.drawn)") == [239, 239]  # 10,000 steps in columns of 42


def test_decimation_keeps_the_least_and_the_greatest(browser: chromium.Chromium, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5000)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3210] = json.dumps({**json.loads(lines[3210]), "grad_norm": 1000.0})
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    heights = "[...charts[2].svg.querySelector('.curve').getAttribute('d').matchAll(/[ML]\\S+ ([-.\\d]+)/g)].map(m => +m[1])"
    places = browser.ask(heights)
    assert min(places) == pytest.approx(8 + 170 * 0.06 / 1.12, abs=1.0)
    assert sum(place < 100 for place in places) == 1


def test_hovering_shows_the_values_at_the_nearest_step_in_all_charts(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    before = legends(browser)
    browser.mouse("move", *middle(browser, 1, 0.49))
    step = browser.ask("view.cursor")
    assert step == pytest.approx(0.49 * STEPS, abs=20) and step == int(step)
    assert f"step {int(step):,} " in browser.ask("document.getElementById('where').textContent")
    after = legends(browser)
    assert sum(a != b for a, b in zip(after, before, strict=True)) >= 6
    assert after[0].startswith("training") and float(after[0].removeprefix("training")) == pytest.approx(
        5 / (1 + step / 200) + 0.2 * math.sin(step), rel=1e-4
    )
    assert after[1].startswith("held out") and after[1].endswith("(at 5,000)")
    assert browser.ask("charts.every(chart => chart.line.getAttribute('visibility') === 'visible')")
    assert "0: " in browser.ask("document.querySelector('.heat p').textContent")
    browser.mouse("move", 2, 2)
    assert browser.ask("view.cursor") is None and legends(browser) == before


def test_pointing_at_a_heat_map_moves_the_cursor_and_its_colours_are_those_of_the_shares(
    browser: chromium.Chromium, page: Path
) -> None:
    browser.open(page)
    left, right, y = browser.ask(
        "(() => { const heat = heats[0].canvas; heat.scrollIntoView({block: 'center'}); const b = "
        "heat.getBoundingClientRect(); return [b.left + LEFT, b.right - RIGHT, b.top + b.height / 2]; })()"
    )
    browser.mouse("move", left + 0.25 * (right - left), y)
    assert browser.ask("view.cursor") == pytest.approx(STEPS / 4, abs=20)
    assert browser.ask("charts.every(chart => chart.line.getAttribute('visibility') === 'visible')")
    heat = "(({canvas: c}) => [...c.getContext('2d').getImageData(c.width / 2, c.height * 0.6, 1, 1).data])(heats[0])"
    assert browser.ask(heat) == [190, 196, 204, 255]  # the third expert's share is an even one


def test_dragging_zooms_all_charts_and_a_double_click_shows_all(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    (left, y), (right, _) = middle(browser, 0, 0.25), middle(browser, 0, 0.5)
    browser.mouse("press", left, y)
    browser.mouse("move", right, y, buttons=1)
    assert browser.ask("Number(charts[0].chosen.getAttribute('width'))") == pytest.approx(right - left, abs=1)
    browser.mouse("release", right, y)
    assert steps_shown(browser) == pytest.approx([STEPS / 4, STEPS / 2], rel=0.01)
    assert browser.ask("Math.max(...charts.map(chart => chart.curves[0].end - chart.curves[0].begin))") < STEPS / 3
    browser.mouse("press", left, y, clickCount=1)
    browser.mouse("release", left, y, clickCount=1)
    browser.mouse("press", left, y, clickCount=2)
    browser.mouse("release", left, y, clickCount=2)
    assert steps_shown(browser) == [1, STEPS]


def test_the_wheel_scrolls_the_page_until_a_chart_is_clicked_and_then_zooms(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    place = middle(browser, 0)
    browser.mouse("wheel", *place, deltaX=0, deltaY=-100)
    assert steps_shown(browser) == [1, STEPS]
    place = middle(browser, 0)
    browser.mouse("press", *place)
    browser.mouse("release", *place)
    browser.mouse("wheel", *place, deltaX=0, deltaY=-100)
    low, high = steps_shown(browser)
    assert high - low == pytest.approx(0.8 * (STEPS - 1)) and low < browser.ask("view.cursor") < high
    browser.mouse("wheel", *place, deltaX=0, deltaY=100)
    assert steps_shown(browser) == pytest.approx([1, STEPS])


def test_everything_works_from_the_keyboard(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    browser.ask("charts[0].svg.focus()")
    browser.key("Home")
    browser.key("ArrowRight")
    assert browser.ask("view.cursor") == 2
    assert browser.ask("document.getElementById('spoken').textContent").startswith("step 2: training 5.13")
    browser.key("+")
    assert steps_shown(browser)[1] < STEPS
    browser.key("0")
    assert steps_shown(browser) == [1, STEPS]
    browser.key("l")
    assert browser.ask("[charts[0].logarithmic, charts[0].log.getAttribute('aria-pressed')]") == [True, "true"]
    browser.key("Escape")
    assert browser.ask("view.cursor") is None
    focusable = "svg.chart[tabindex], #controls button, #controls input, figcaption button"
    assert browser.ask(f"document.querySelectorAll('{focusable}').length") == 8 + 3 + 1 + 8


def test_smoothing_draws_the_mean_over_what_was_logged(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    browser.ask("(s => { s.value = 0.9; s.dispatchEvent(new Event('input')); })(document.getElementById('smoothing'))")
    raw, smooth = browser.ask("[charts[2].curves[0].ys, charts[2].curves[0].smooth].map(ys => [...ys.slice(0, 50)])")
    total = share = 0.0
    for value, mean in zip(raw, smooth, strict=True):
        total, share = 0.9 * total + 0.1 * value, 0.9 * share + 0.1
        assert mean == pytest.approx(total / share, rel=1e-5)
    assert browser.ask("charts[2].svg.querySelectorAll('.curve').length") == 2  # what was logged stays, faint


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm(browser: chromium.Chromium, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    values = [0.0, -1.0, 1e-3, 1.0, 1e3]
    lines = [json.dumps({"step": i + 1, "loss": value}) for i, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.ask("charts[0].drawn") == 5
    browser.ask("charts[0].log.click()")
    assert browser.ask("charts[0].drawn") == 3
    assert "NaN" not in browser.ask("charts[0].svg.outerHTML")


def test_two_runs_share_charts_and_what_was_left_behind_is_dashed(browser: chromium.Chromium, trained: Path) -> None:
    browser.open(trained)
    names = browser.ask("charts[0].legends.map(({curve}) => curve.label)")
    assert names == ["checkpoints training", "checkpoints held out", "other training", "other held out"]
    left = browser.ask("charts[0].curves.filter(curve => curve.branch).map(curve => [...curve.xs])")
    assert left == [[3, 4, 5, 6], [4, 6]]
    assert browser.ask("charts[0].svg.querySelectorAll('.curve.left').length") == 2
    assert browser.ask("[...new Set(charts[0].curves.map(curve => curve.colour))]") == ["run0", "run1"]
    assert browser.ask("charts[0].svg.querySelectorAll('.change').length") == 1


def test_histograms_of_every_group_can_be_chosen(browser: chromium.Chromium, trained: Path) -> None:
    browser.open(trained)
    assert browser.ask("document.querySelectorAll('.spread').length") == 2
    groups = browser.ask("[...document.querySelector('.spread select').options].map(option => option.textContent)")
    assert groups[:2] == ["all", "embed_tokens"] and "layers.0.self_attn" in groups
    for index in range(len(groups)):
        choose = f"s => {{ s.selectedIndex = {index}; s.dispatchEvent(new Event('change')); }}"
        browser.ask(f"({choose})(document.querySelector('.spread select'))")
        paths = browser.ask("document.querySelector('.spread').querySelectorAll('.ridge').length")
        assert paths == 6  # three files, two kinds
        assert "NaN" not in browser.ask("document.querySelector('.spread').outerHTML")


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True), (320, True)])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(
    browser: chromium.Chromium, trained: Path, width: int, phone: bool, dark: bool
) -> None:
    browser.size(width, 800, phone)
    browser.dark(dark)
    browser.open(trained)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask("charts.every(chart => chart.drawn) && document.querySelectorAll('.ridge').length") > 0
    shade = browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(shade) < 60) == dark and (min(shade) > 200) != dark


def test_the_charts_follow_the_window(browser: chromium.Chromium, trained: Path) -> None:
    browser.open(trained)
    before = browser.ask("charts[0].svg.viewBox.baseVal.width")
    browser.size(700, 900)
    browser.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.ask("charts[0].svg.viewBox.baseVal.width") == browser.ask("charts[0].svg.clientWidth") < before


def test_hostile_text_stays_text(browser: chromium.Chromium, tmp_path: Path) -> None:
    evil = '</script><script>window.stolen = 1</script><img src=x onerror="window.stolen = 1">'
    run = write_run(tmp_path / "<b>&run", 3, **{evil: 1.5})
    (run / "config.json").write_text(json.dumps({"model": {"name": evil, evil: evil}}), encoding="utf-8")
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.ask("[window.stolen === undefined, document.images.length, document.scripts.length]") == [True, 0, 2]
    assert browser.ask("document.querySelector('h1').textContent") == "<b>&run"
    assert browser.ask("charts.some(chart => chart.title.includes('</script>'))")


def test_it_prints_its_charts_on_white_without_their_controls(
    browser: chromium.Chromium, trained: Path, tmp_path: Path
) -> None:
    browser.dark(True)
    browser.open(trained)
    pages = re.findall(rb"/Type\s*/Page\b", browser.print(tmp_path / "page.pdf").read_bytes())
    assert len(pages) > 2
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.getElementById('controls')).display") == "none"
    assert browser.ask("charts.every(chart => chart.svg.getBoundingClientRect().height > 50)")
    browser.send("Emulation.setEmulatedMedia", media="")
