"""Of `mkdocs build`: what the site takes from outside of `docs`, without importing the package."""

from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

RESULTS = "benchmarks/results"


def on_files(files, config):
    """The results of the benchmarks become pages."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.md")):
        page = File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that GitHub follows out of `docs` stay inside of the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
