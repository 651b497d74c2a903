"""Takes the README's picture: the top of the report that the guide ends in. Needs Chromium.

python docs/picture.py            # runs the guide up to its audit (half a minute), writes docs/verdict.png
python docs/picture.py REPORT     # of another report.html
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageChops

DOCS = Path(__file__).resolve().parent
WIDTH, TALL = 900, 1600  # in CSS pixels; more than the top of a report takes
SCALE = 1.5  # pixels of the picture for one of them
COLOURS = 48
SHELL = "%%bash\n"


def audited(folder: Path) -> Path:
    """The report of the guide, whose cells are run in `folder` as far as its audit."""
    cells = json.loads((DOCS / "guide.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict[str, Any] = {"__name__": "__main__"}
    os.chdir(folder)
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if not source.startswith(SHELL):
            exec(compile(source, "<guide>", "exec"), space)
            continue
        subprocess.run(["sh", "-ec", source.removeprefix(SHELL)], check=True)
        if "cud evaluate" in source:
            return folder / "audit" / "report.html"
    raise ValueError("the guide audits nothing")


def picture(report: Path, folder: Path) -> Image.Image:
    """The page down to its first figure, on white, without what is empty at its end."""
    text = report.read_text(encoding="utf-8")
    (folder / "top.html").write_text(text[: text.index("</figure>")] + "</figure></body></html>", encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("there is no Chromium on this machine")
    shot = folder / "top.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--force-device-scale-factor={SCALE}"]
    command += [f"--window-size={WIDTH},{TALL}", f"--screenshot={shot}", f"file://{folder / 'top.html'}"]
    subprocess.run(command, check=True, capture_output=True)
    image = Image.open(shot).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, 0)))).getbbox()
    return image.crop((0, 0, image.width, min(image.height, box[3] + 16))).quantize(COLOURS)


def main(argv: list[str]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = [Path(one).resolve() for one in argv]
        image = picture(given[0] if given else audited(folder), folder)
        image.save(DOCS / "verdict.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
