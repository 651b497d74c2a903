"""The documentation builds without a warning or the network, lists all that is public, and loads nothing from elsewhere."""

import html
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import cud_trainer

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

pytest.importorskip("mkdocs")
pytest.importorskip("griffe")

ROOT = Path(__file__).parents[2]
PACKAGES = ["cud_trainer"] + [
    f"cud_trainer.{p.parent.name}" for p in sorted((ROOT / "cud_trainer").glob("*/__init__.py"))
]
NOWHERE = "http://127.0.0.1:9"  # nobody listens there


def test_what_is_generated_is_up_to_date():
    """And so readable on GitHub: `python docs/generate.py` writes it."""
    space = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    found = space["generated"]()
    assert len(found) > 9
    for path, text in found.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run python docs/generate.py"
        assert "\n:::" not in text, path
    listed = {path for path in (ROOT / "docs" / "api").rglob("*.md")}
    assert listed <= set(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": NOWHERE, "https_proxy": NOWHERE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return target


def pages(site: Path) -> dict[str, str]:
    return {str(p.relative_to(site)): p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}


def loads(page: str) -> list[str]:
    """Addresses that a browser fetches to show a page: of every tag but links to follow, and in styles."""
    tags = re.findall(r"<(?!a\b)[a-z][^>]*>", page)
    found = [value for tag in tags for value in re.findall(r"""(?:src|href|data|poster)=["']?([^"'\s>]+)""", tag)]
    return [html.unescape(value) for value in found] + in_style(page)


def in_style(text: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s;]+)""", text)


def elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def test_what_counts_as_loaded():
    page = (
        '<a href="https://a.example">x</a><script src=https://b.example/x.js></script><img src="c.png">'
        '<link rel="stylesheet" href="//d.example/d.css"><style>@import "https://e.example/e.css"; '
        "p {background: url('https://f.example/f.png')}</style>"
    )
    assert [urlsplit(a).netloc[:1] for a in loads(page) if elsewhere(a)] == ["b", "d", "e", "f"]


def test_every_public_name_is_in_the_reference(site):
    listed = {name for page in pages(site / "api").values() for name in re.findall(r'id="([\w.]+)"', page)}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):  # a package that passes nothing on has none
            thing = getattr(module, name)
            # What a package passes on is listed once; a function called like its module is where it is written.
            places = {f"{package}.{name}", f"{getattr(thing, '__module__', package)}.{name}"}
            if getattr(cud_trainer, name, None) is thing:
                places = {f"cud_trainer.{name}"}
            assert places & listed, f"{package}.{name} is not in docs/api"


def test_every_option_is_in_the_reference(site):
    from dataclasses import fields

    from trl import SFTConfig

    from cud_trainer import CUDConfig

    page = (site / "api" / "trainer.html").read_text(encoding="utf-8")
    own = {f.name for f in fields(CUDConfig)} - {f.name for f in fields(SFTConfig)}
    assert {"objective", "schedule", "passes"} <= own
    for name in own:
        assert re.search(rf"<td><code>{name}</code></td>", page), name


def test_nothing_is_loaded_from_elsewhere(site):
    found = pages(site)
    assert {"index.html", "guide.html", "api/trainer.html", "benchmarks/results/difficulty.html"} <= set(found)
    for name, page in found.items():
        assert not [address for address in loads(page) if elsewhere(address)], name
        assert "mermaid" not in page, name  # the theme would fetch what draws such a diagram
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        assert not [a for a in in_style(path.read_text(encoding="utf-8")) if elsewhere(a)], path


def test_nothing_but_documentation_is_published(site):
    kinds = {p.suffix for p in site.rglob("*") if p.is_file()}
    assert kinds <= {".html", ".css", ".js", ".map", ".json", ".inv", ".png", ".svg", ".xml", ".gz", ".md"}
