"""The page fits: nothing is wider than it, on a desk, on a phone and on paper; by its styles, and in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import example
from test_study_verdicts import run
from test_verdict import IDS, evidence

from evaluation.decision import RULE
from evaluation.report.page import write_report
from evaluation.report.schema import jsonable
from evaluation.report.story import verdict_of
from evaluation.study.heldout import Unseen
from evaluation.study.verdicts import arm_verdicts, verdicts

LONG = "group_with_a_name_that_has_no_place_to_break_" * 6
# Every element that reaches over the right end of the page, and every wrapper that scrolls, all folds open.
MEASURE = """<script>
window.addEventListener("load", function () {
  document.querySelectorAll("details").forEach(function (one) { one.open = true; });
  fit();
  var end = document.documentElement.clientWidth;
  var wide = Array.from(document.querySelectorAll("body *")).filter(function (one) {
    if (one.closest("svg") !== null && one.tagName !== "svg") { return false; }
    var scrolls = one.classList.contains("scroll") && one.scrollWidth > one.clientWidth + 1;
    return scrolls || one.getBoundingClientRect().right > end + 1;
  });
  var names = wide.map(function (one) { return one.tagName + " " + one.textContent.slice(0, 60); });
  var stacked = document.querySelectorAll("table.stack").length;
  // How large figures are drawn; their letters are 8 points or more.
  var shown = Array.from(document.querySelectorAll("figure svg")).filter(function (one) { return one.clientWidth > 0; });
  var scales = shown.map(function (one) { return one.clientWidth / (one.viewBox.baseVal.width * 4 / 3); });
  var found = { scales: scales, width: end, page: document.documentElement.scrollWidth, stacked: stacked, wide: names };
  parent.postMessage("FOUND" + JSON.stringify(found) + "END", "*");
});
</script></body>"""
# A window is no narrower than 500 pixels, but a frame in it is.
FRAME = """<body><script>addEventListener("message", function (told) { document.body.append(told.data); });</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with a verdict, wide tables, long names and every section."""
    results = example()
    cells = [{"value": 0.123, "low": 0.1, "high": 0.456}] * 12
    results["tables"] = [
        {
            "id": "wide",
            "title": "Wide",
            "note": LONG,
            "columns": [f"a column with a long name {number}" for number in range(12)],
            "rows": [{"label": LONG, "cells": cells}, {"label": "b", "cells": [*cells[:11], LONG]}],
        }
    ]
    results["findings"].append(LONG)
    known = evidence(leaking=3)
    ids = [LONG, *IDS[1:]]
    results["verdict"] = jsonable(verdict_of(type(known)(**(vars(known) | {"ids": ids})), 0))
    return write_report(results, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A page of a study, or of the demo: verdicts on many runs, and a decision."""
    results = example()
    rows, _ = arm_verdicts("npo", {LONG: [run(1), run(2, leaking=3)], "b": [run(3)]}, Unseen(), None, 0)
    results["verdicts"] = jsonable(verdicts(rows, [LONG], [], "cud evaluate tries it"))
    arm = {"objective": "npo", "arm": LONG, "verdict": "undecided", "reason": "", "against": []}
    results["decision"] = {"rule": RULE, "arms": [arm]}
    results["findings"].append(LONG)
    for condition in results["conditions"]:
        condition["name"] = f"{LONG} / {condition['schedule']}"
    return write_report(results, tmp_path_factory.mktemp("study"))


def test_a_decision_is_on_the_page_and_in_the_summary_once(study):
    for name in ("report.html", "summary.md"):
        text = (study.parent / name).read_text()
        assert text.count("Does difficulty earn its place?") == 1 and text.count("It does not (no) if one of") == 1, (
            name
        )


def test_the_verdict_on_runs_comes_first(study):
    text = study.read_text()
    assert text.count("Is it gone?") == 1 and "In 2 of 3 runs" in text
    places = [text.index(part) for part in ("Is it gone?", "Does difficulty earn", "Was it only hidden?", "<details")]
    assert places == sorted(places) and places[-1] < text.index("All findings") < text.index("Trade-off")
    assert '<details class="section" open' not in text and "more than 5% lost" in text
    said = (study.parent / "summary.md").read_text()
    assert said.index("Is it gone?") < said.index("Does difficulty earn") < said.index("### Findings")


def test_styles(page):
    """Without a browser: what keeps it from running out is there."""
    text = page.read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    assert 'name="viewport" content="width=device-width' in text
    assert text.count("<table") == len(re.findall(r'<div class="scroll"><table', text)) > 10
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style) and re.search(
        r"figure svg \{[^}]*max-width: 100%", style
    )
    assert "min-width" not in style and "nowrap" not in style
    assert text.count("<details") == text.count("</details>") > 8
    printed = style[style.index("@media print") :]
    assert "overflow: visible" in printed and "details-content" in printed and 'addEventListener("beforeprint"' in text


def test_the_story_comes_first_and_the_rest_unfolds(page):
    text = page.read_text()
    places = [text.index(part) for part in ("Is it gone?", "What did it cost?", "For whom?", "Was it only hidden?")]
    assert places == sorted(places) and places[-1] < text.index("<details") < text.index("Did difficulty predict")
    folded = text[: text.index("Did difficulty predict")]
    assert folded.count("<details") == folded.count("</details>") + 1  # it stands in a fold
    assert '<details class="section" open' not in text


def found_in(browser, text, width, folder):
    """What `MEASURE` finds on a page of this width."""
    (folder / "page.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--no-first-run",
            "--disable-background-networking",
            "--virtual-time-budget=5000",
            f"--window-size={max(width, 600) + 50},1000",
            "--dump-dom",
            f"file://{folder / 'frame.html'}",
        ],
        capture_output=True,
        text=True,
    )
    return json.loads(re.search(r"FOUND(\{.*?\})END", done.stdout)[1])


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("kind", ["page", "study"])
def test_no_element_is_wider_than_the_page(kind, tmp_path, width, request):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    found = found_in(browser, request.getfixturevalue(kind).read_text(), width, tmp_path)
    assert abs(found["width"] - width) <= 20  # a scroll bar
    assert found["page"] <= found["width"] and found["wide"] == []
    assert found["stacked"] > 0 or (kind, width) == ("study", 1200)
    assert len(found["scales"]) > 2 and min(found["scales"]) > 0.9
