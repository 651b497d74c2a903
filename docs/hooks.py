"""Of `mkdocs build`: what the site takes from outside of `docs`, without importing the package."""

import ast
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

RESULTS = "benchmarks/results"
OPTIONS = "CUD_OPTIONS"


def on_files(files, config):
    """The results of the benchmarks become pages."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.md")):
        page = File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that GitHub follows out of `docs` stay inside of the site; the options of `CUDConfig` become a table."""
    markdown = markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
    if OPTIONS in markdown:
        package = Path(config.config_file_path).parent / "cud_trainer"
        sources = [package / "config.py", package / "data" / "template.py"]
        tables = [options_table(path.read_text(encoding="utf-8")) for path in sources]
        rest = [table.split("\n", 2)[2] for table in tables[1:]]  # without their heads
        markdown = markdown.replace(OPTIONS, "\n".join([tables[0], *rest]))
    return markdown


def options_table(source):
    """Markdown table of the fields of a module's dataclasses: name, default, help."""
    rows = ["| option | default | |", "|---|---|---|"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            if "metadata" not in given:
                continue  # no option
            default = (
                ast.unparse(given["default"]) if "default" in given else f"{ast.unparse(given['default_factory'])}()"
            )
            text = ast.literal_eval(given["metadata"])["help"]
            rows.append(f"| `{node.target.id}` | `{default}` | {text} |".replace("\n", " "))
    return "\n".join(rows)
