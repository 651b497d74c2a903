"""Names that others chose are text in Markdown, whatever they look like."""

import re

import pytest
from test_report import example

from cud_trainer.markdown import markdown_text
from evaluation.report.page import summary
from evaluation.report.schema import read_results

NAMES = [
    "![x](http://evil.example/t.png)",
    "[click](http://evil.example)",
    "[click] [ref]",
    "[ref]: http://evil.example",
    "https://evil.example and www.evil.example",
    "@somebody",
    "<img src=x onerror=alert(1)> & <https://evil.example>",
    "`code` *strong* __strong__ _em_ ~~gone~~ $x$",
    "a | b \\| c \\",
    "# heading",
    "- item",
    "1. item",
    "=== setext",
    "> quote\n\n# heading\r\n---",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_renderer_shows_the_name_itself(name):
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown_text(name))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == " ".join(name.splitlines())


def test_nothing_is_left_that_would_be_a_link():
    for name in NAMES:
        text = markdown_text(name)
        assert not re.search(r"\]\(|(?<!\\)\]\s*[\[:]|!\[|https?:|www\.|@|(?<!\\)\||\n|<", text), text


@pytest.mark.parametrize("text", ["a_b_c", "0.712 [0.601, 0.803]", "npo / uniform", "bucket 1 (easiest)", "-0.5"])
def test_ordinary_words_and_figures_stay_as_they_are(text):
    assert markdown_text(text) == text


def test_summary_has_no_markup_of_others():
    results, name = example(), NAMES[0]
    results["findings"][0] = f"{name} is harder"
    results["conditions"][0]["name"] = name
    cells = [name, {"value": 0.5, "low": 0.4, "high": 0.6}, {"value": None, "reason": name}]
    row = {"label": name, "cells": cells}
    columns = [name, "a figure", "none"]
    results["tables"] = [{"id": "groups", "title": name, "note": NAMES[1], "columns": columns, "rows": [row]}]
    text = summary(read_results(results))
    assert "evil.example" in text and "](http" not in text and "http:" not in text
    assert "![" not in text
