"""The guide is true: the cells of its notebook run, in order, in one directory, and print what it shows.

The notebook is generated from the page; its cells are run as a script, so no Jupyter is needed. An output is what a cell
prints at its end, the Trainer's own log lines left out. Words and whole numbers must be as shown; a decimal may be off by
0.1 or a quarter, whichever is more, and the count in "11 of 48" by 3, since rounding differs between machines.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from processes import run

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "docs" / "guide.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
DECIMAL = re.compile(r"-?\d+\.\d+")
COUNT = re.compile(r"\b\d+(?= of \d)")
SHELL = "%%bash\n"
# One process for all Python cells, as in a notebook.
RUNNER = """
import contextlib, io, json, subprocess, sys
blocks, outputs, space = json.load(open(sys.argv[1])), [], {"__name__": "__main__"}
for language, code in blocks:
    out = io.StringIO()
    if language == "python":
        with contextlib.redirect_stdout(out):
            exec(compile(code, "<guide>", "exec"), space)
    else:
        done = subprocess.run(["sh", "-ec", code], stdout=subprocess.PIPE, text=True, check=True)
        out.write(done.stdout)
    outputs.append(out.getvalue())
    json.dump(outputs, open(sys.argv[2], "w"))
"""


def alike(shown: str, printed: str) -> bool:
    """Whether the end of `printed` is `shown`, decimals apart."""
    lines = [line.split() for line in shown.strip().splitlines()]
    own = [line for line in printed.strip().splitlines() if not line.startswith("{'")]  # not those of the Trainer
    found = [line.split() for line in own[-len(lines) :]]
    shown, printed = ("\n".join(" ".join(words) for words in text) for text in (lines, found))
    numbers, counts = (zip(kind.findall(shown), kind.findall(printed), strict=False) for kind in (DECIMAL, COUNT))
    bare = [COUNT.sub("#", DECIMAL.sub("#", text)) for text in (shown, printed)]
    return (
        bare[0] == bare[1]
        and all(abs(float(a) - float(b)) <= max(0.1, abs(float(a)) / 4) for a, b in numbers)
        and all(abs(int(a) - int(b)) <= 3 for a, b in counts)
    )


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("loading\n3 samples, 0.25 left\n", True),
        ("3  samples, 0.34 left\n{'epoch': '1'}\n", True),
        ("3 samples, 0.36 left", False),
        ("4 samples, 0.25 left", False),
        ("3 samples, 0.25 left\nmore", False),
        ("", False),
    ],
)
def test_how_outputs_are_compared(printed, expected):
    assert alike("3 samples, 0.25 left\n", printed) is expected
    assert alike("11 of 48 left, 2", "9 of 48 left, 2") and not alike("11 of 48 left, 2", "11 of 48 left, 3")
    assert not alike("11 of 48", "15 of 48") and not alike("11 of 48", "11 of 47")
    assert alike("-8.00", "-9.90") and not alike("-8.00", "-10.10") and not alike("-8.00", "8.00")


def test_cells_run_as_shown(tmp_path):
    sources = ["".join(cell["source"]) for cell in CODE]
    code = [("bash" if text.startswith(SHELL) else "python", text.removeprefix(SHELL)) for text in sources]
    assert {language for language, _ in code} == {"python", "bash"} and len(code) == 10
    (tmp_path / "run").mkdir()
    (tmp_path / "blocks.json").write_text(json.dumps(code))
    (tmp_path / "runner.py").write_text(RUNNER)
    done = run(
        tmp_path / "runner.py",
        tmp_path / "blocks.json",
        tmp_path / "outputs.json",
        cwd=tmp_path / "run",
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    compared = 0
    for cell, printed in zip(CODE, outputs, strict=True):
        for shown in cell["outputs"]:
            text = "".join(shown["text"])
            assert alike(text, printed), f"the guide shows\n{text}\nbut this is printed:\n{printed}"
            compared += 1
    assert compared == 7
    # What its text says about the numbers.
    everything = "\n".join(outputs)
    easiest, hardest = (re.findall(rf"{side} (0\.\d+)", everything)[:2] for side in ("easiest", "hardest"))
    assert float(hardest[0]) > 2 * float(easiest[0]) and float(hardest[1]) < float(hardest[0])
    repeats = re.findall(r"^[1-4] +\S+ +(\S+)$", everything, re.M)
    assert repeats == sorted(repeats) and len(repeats) == 4
    before, after = re.search(r"of an answer: (\S+) -> (\S+)", everything).groups()
    assert float(after) > float(before)
    answers = [json.loads(line)["answer"] for line in (tmp_path / "run" / "forget.jsonl").open(encoding="utf-8")]
    for name in ("report.html", "summary.md", "results.json"):
        written = (tmp_path / "run" / "audit" / name).read_text(encoding="utf-8")
        assert not any(answer in written for answer in answers if len(answer) > 12), name
