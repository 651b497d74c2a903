"""The guide is true: its blocks run as printed, in order, in one directory, and print what it shows.

A block without a language behind a block of code is what that one prints at its end, the Trainer's own log lines left
out. Words and whole numbers must be as shown; a decimal may be off by 0.1 or a quarter, whichever is more, since rounding
differs between machines.
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
TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
DECIMAL = re.compile(r"-?\d+\.\d+")
# One process for all Python blocks, as in a notebook.
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
    pairs = zip(DECIMAL.findall(shown), DECIMAL.findall(printed), strict=False)
    return DECIMAL.sub("#", shown) == DECIMAL.sub("#", printed) and all(
        abs(float(a) - float(b)) <= max(0.1, abs(float(a)) / 4) for a, b in pairs
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
    assert alike("-8.00", "-9.90") and not alike("-8.00", "-10.10") and not alike("-8.00", "8.00")


def test_blocks_run_as_printed(tmp_path):
    code = [(language, text) for language, text in BLOCKS if language]
    assert {language for language, _ in code} == {"python", "bash"}
    assert len(code) + sum(not language for language, _ in BLOCKS) == TEXT.count("\n```") / 2  # none is overlooked
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
    remaining, printed, compared = iter(outputs), "", 0
    for language, text in BLOCKS:
        if language:
            printed = next(remaining)
        else:
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
