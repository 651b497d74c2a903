"""The table of docs/files.md is what commands leave: every file has its row, and the mode that stands there."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
import pytest
from builders import ROOT, make_model, make_tokenizer, qa_dataset
from command_lines import data, make_world, train
from studies import config

import cud_trainer.commands.score
from cud_trainer.cli import main
from cud_trainer.data import prepare_dataset

pytestmark = pytest.mark.slow

TEXTS = [text.encode() for text in (*qa_dataset(9)["question"], *qa_dataset(9)["answer"])]


def table() -> list[tuple[str, int | None]]:
    """Patterns of docs/files.md, folders with their slash, and the mode of files there; `None` for that of the umask."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", (ROOT / "docs" / "files.md").read_text(), re.M)
    assert len(rows) > 20
    modes = {"600": 0o600, "700, files 600": 0o600}
    return [(name, modes.get(mode)) for names, mode in rows for name in re.findall(r"`([^`]+)`", names)]


def modes_below(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mode & 0o777
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Path and mode of what the commands left in their folders, with a umask that forbids nothing."""
    root = tmp_path_factory.mktemp("files")
    make_world(root)
    out, found = root / "out", {}
    patch, before = pytest.MonkeyPatch(), os.umask(0)
    original = cud_trainer.commands.score.remove_work

    def remove_work(path):
        found.update({f"scores.parquet.work/{name}": mode for name, mode in modes_below(Path(path)).items()})
        assert Path(path).stat().st_mode & 0o777 == 0o700
        original(path)

    patch.setattr(cud_trainer.commands.score, "remove_work", remove_work)
    few = ["--use_cpu", "true", "--bf16", "false", "--folds", "3"]
    metrics = ["--metrics", "circuit_mass", "loss", "length"]
    scores, circuits = str(out / "score" / "scores.parquet"), str(out / "score" / "circuits.safetensors")
    evaluated = ["--scores", scores, "--generate", "false", "--show_text", "true"]
    try:
        assert main(["score", *data(root), *few, *metrics, "--output", scores, "--save_circuits", circuits]) == 0
        assert main(["score", *data(root), *few, "--metrics", "length", "--output", str(out / "score" / "l.csv")]) == 0
        extra = ["--objective", "undial", "--retain_loss", "kl", "--difficulty", "loss", "--keep_reference", "true"]
        extra += ["--schedule", "upweight_hard"]
        command = train(root, out / "train", *extra, "--save_steps", "3")
        command[command.index("--save_strategy") + 1] = "steps"
        assert main(command) == 0
        assert main(["evaluate", *data(root), *evaluated, "--output_dir", str(out / "evaluate")]) == 0
        for folder in ("score", "train", "evaluate"):
            found.update(modes_below(out / folder))
        yield found, out
    finally:
        os.umask(before)
        patch.undo()


def row_of(name: str) -> list[tuple[str, int | None]]:
    return [(p, mode) for p, mode in table() if fnmatch(name, f"{p}*" if p.endswith("/") else p)]


def test_every_file_has_its_row_and_mode(left):
    found, _ = left
    assert len(found) > 25 and any("checkpoint-" in name for name in found) and any(".work/" in name for name in found)
    for name, mode in found.items():
        rows = row_of(name)
        assert rows, f"{name} is not in docs/files.md"
        assert mode == (rows[0][1] or mode), f"{name} has mode {mode:o}"
    sensitive = {name for name in found if row_of(name)[0][1]}
    assert {"difficulty.parquet", "schedule.parquet", "reference.safetensors", "per_sample.parquet"} <= sensitive
    assert {"scores.parquet", "circuits.safetensors", "l.csv"} <= sensitive


def test_text_is_where_it_was_asked_for_and_nowhere_else(left):
    _, out = left
    holds = {path.name for path in out.rglob("*") if path.is_file() and any(t in path.read_bytes() for t in TEXTS)}
    assert holds == {"per_sample.parquet"}


def hashes_below(folder: Path) -> set[str]:
    """Files that hold what an id could be found from by trying."""
    hashes = [name.split(":")[1] for size, start in ((9, 0), (7, 100)) for name in content_ids(qa_dataset(size, start))]

    def read(path: Path) -> str:
        text = path.read_bytes().decode(errors="replace")
        return text + pd.read_parquet(path).to_csv() if path.suffix == ".parquet" else text

    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p.relative_to(folder)) for p in files if any(h in (text := read(p)) for h in hashes) or "sha256:" in text
    }


def content_ids(dataset) -> list[str]:
    return prepare_dataset(dataset, make_tokenizer())["sample_id"][:]


def test_no_file_leads_back_without_its_key(left):
    _, out = left
    assert not hashes_below(out)
    assert {f"{folder}/ids.key" for folder in ("score", "train", "evaluate")} == {
        str(path.relative_to(out)) for path in out.rglob("ids.key")
    }
    keys = {path.read_bytes() for path in out.rglob("ids.key")}
    assert len(keys) == 2  # the report has that of the scores it was given, so that the two can be joined
    scored = pd.read_parquet(out / "score" / "scores.parquet")["sample_id"].tolist()
    assert scored == pd.read_parquet(out / "evaluate" / "per_sample.parquet")["sample_id"].tolist()
    assert all(name.startswith("hmac:") for name in scored)


def test_files_of_a_study(tmp_path, cells_in_process):
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    qa_dataset(9).add_column("author", [f"author {i % 4}" for i in range(9)]).to_json(tmp_path / "forget.jsonl")
    qa_dataset(7, 100).to_json(tmp_path / "retain.jsonl")
    before = os.umask(0)
    try:
        command = config(tmp_path, tmp_path / "out", workers=1, grid={"schedule": ["upweight_hard"], "seed": [1]})
        assert main(command) == 0
    finally:
        os.umask(before)
    found = modes_below(tmp_path / "out")
    assert any(name.endswith("scores.parquet") for name in found) and any("result.json" in name for name in found)
    for name, mode in found.items():
        rows = [(p, m) for p, m in row_of(name) if "/" in p or "/" not in name]
        assert rows, f"{name} is not in docs/files.md"
        assert mode == (rows[-1][1] or mode), f"{name} has mode {mode:o}"
    assert not hashes_below(tmp_path / "out")
    assert found["ids.key"] == 0o600
