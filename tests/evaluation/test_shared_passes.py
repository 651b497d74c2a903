"""`cud evaluate` on several processes, and where it goes on after a kill: the figures of one process that was left alone."""

import json
import stat

import pandas as pd
import pytest
from builders import SUPPORT, make_model, make_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from processes import run
from tofu import tofu_like

from cud_trainer.cli import main
from cud_trainer.data import plan_batches
from cud_trainer.resumable import WorkDir
from evaluation.metrics.passes import Passes, SharedPasses, joined

PARTS = "evaluation.work"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 9))
def test_parts_are_made_of_the_batches_of_one_process(lengths, batch_size, most):
    plan = plan_batches(lengths, batch_size=batch_size)
    parts = joined(plan, most)
    assert len(parts) <= most and [row for rows in parts for row in rows] == [row for rows in plan for row in rows]
    again = [
        [rows[place] for place in batch]
        for rows in parts
        for batch in plan_batches([lengths[row] for row in rows], batch_size=batch_size)
    ]
    assert again == plan


def test_figures_of_no_sample_are_computed_once(tmp_path):
    found = [["task: acc", 0.5, None], ["task: ppl", float("inf"), 0.25]]
    for passes in (Passes(), SharedPasses(None, 4)):
        assert passes.of("model", "f").once("tasks", lambda: found) == found
    kept = SharedPasses(WorkDir(tmp_path / "w", {}), 4).of("model", "f")
    assert kept.once("tasks", lambda: found) == found == kept.once("tasks", lambda: 1 / 0)
    assert kept.once("others", lambda: 1) == kept.of("model", "g").once("tasks", lambda: 1) == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("original", 0), ("unlearned", 1)):
        make_model(seed, num_hidden_layers=1).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    for name, number, start in (("forget", 6, 0), ("retain", 2, 100), ("holdout", 3, 200)):
        rows = [{**row, "id": f"{name}-{place}"} for place, row in enumerate(tofu_like(number, start))]
        Dataset.from_list(rows).to_json(root / f"{name}.jsonl")
    return root


def arguments(world, output, **options):
    given = {
        "model_name_or_path": world / "unlearned",
        "original_model": world / "original",
        "forget_dataset": world / "forget.jsonl",
        "retain_dataset": world / "retain.jsonl",
        "holdout_dataset": world / "holdout.jsonl",
        "secret_pattern": r"\d+",
        "batch_size": 2,
        "samples": 3,
        "relearn_samples": 3,
        "relearn_steps": [1, 2],
        "quantize": [8],
        "depth": True,
        "logit_lens": True,
        "gradient_norm": True,
        "output_dir": output,
        **options,
    }
    given = {name: value for name, value in given.items() if value is not None}
    pairs = [(f"--{name}", value if isinstance(value, list) else [value]) for name, value in given.items()]
    return ["evaluate", *(str(part) for name, values in pairs for part in (name, *values))]


def launch(parts, *command, **options):
    return run(SUPPORT / "evaluating_worker.py", parts, *command, **options)


def check_same_report(folder, other):
    """All figures, bit for bit; not when they were made, nor the command line, which names the folder."""
    for name in ("per_sample.parquet", "kept_samples.parquet"):
        found, expected = (pd.read_parquet(one / name) for one in (folder, other))
        assert_frame_equal(found, expected, check_exact=True)
    results, others = (json.loads((one / "results.json").read_text()) for one in (folder, other))
    for one in (results, others):
        one["run"].pop("command")
        one.pop("created")
    assert results == others


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main(arguments(world, folder)) == 0
    assert not (folder / PARTS).exists()
    return folder


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes_write_what_one_does(world, alone, tmp_path):
    """The retain set is a single batch, of which one of them has nothing."""
    done = launch(0, *arguments(world, tmp_path / "out"), processes=2)
    assert done.returncode == 0, done.stderr
    check_same_report(tmp_path / "out", alone)
    assert done.stdout.count("is it gone?") == 1 and not (tmp_path / "out" / PARTS).exists()


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_process_that_dies_costs_nothing_that_was_done(world, alone, tmp_path, capsys):
    command, work = arguments(world, tmp_path / "out"), tmp_path / "out" / PARTS
    done = launch(20, *command, processes=2)
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode and "cud evaluate: error: another process is gone" in line and "Traceback" not in done.stderr
    parts = sorted(work.glob("*.safetensors"))
    assert len(parts) >= 40
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    for path in work.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert b"of the town" not in content and b"Who is" not in content and b"forget-0" not in content
    # another evaluation does not take them for its own, and leaves them
    for option, value, there in (("seed", 1, 0), ("temperature", 0.5, 1.0)):
        assert main(arguments(world, tmp_path / "out", **{option: value})) == 2
        assert f"belongs to another run ({option}: there {there}, here {value})" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in parts}
    assert times == {path: path.stat().st_mtime_ns for path in sorted(work.glob("*.safetensors"))}
    done = launch(1, *command)  # one process now, that dies, too
    assert done.returncode == -9
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(kept) == len(parts) + 1 and {path: kept[path] for path in parts} == times
    assert main(command) == 0
    check_same_report(tmp_path / "out", alone)
    assert not work.exists()


@pytest.mark.slow
def test_parts_of_other_models_or_data_are_not_used(world, tmp_path, monkeypatch, capsys):
    """A model that was trained on meanwhile is measured anew; other data are another evaluation."""
    others = ("original_model", "holdout_dataset", "samples", "relearn_samples", "relearn_steps", "secret_pattern")
    others += ("quantize", "depth", "logit_lens", "gradient_norm")
    model, output = tmp_path / "model", tmp_path / "out"
    command = arguments(world, output, model_name_or_path=model, generate=False, **dict.fromkeys(others))

    def stop(inputs, measurements, command):
        seen.append(measurements.after.sets["forget"]["probability"].tolist())
        raise KeyboardInterrupt

    seen: list[list[float]] = []
    monkeypatch.setattr("evaluation.commands.evaluate.report_on", stop)
    for seed in (1, 1, 2):
        make_model(seed, num_hidden_layers=1).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        assert main(command) == 130
        assert {path.name for path in output.iterdir()} == {PARTS}
    assert seen[0] == seen[1] and not set(seen[0]) & set(seen[2])
    rows = [{**row, "id": f"retain-{place}"} for place, row in enumerate(tofu_like(2, 300))]
    Dataset.from_list(rows).to_json(tmp_path / "retain.jsonl")
    other = [*command, "--retain_dataset", str(tmp_path / "retain.jsonl")]
    assert main(other) == 2
    assert "belongs to another run (retain dataset: there 'hmac:" in capsys.readouterr().err
    assert main([*other, "--overwrite", "true"]) == 130 and seen[3] == seen[2]
