"""The last lines of commands say what was done, measured and written, and what comes next."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from command_lines import data, make_world, train

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.commands.summary import score_summary, train_summary


def scores(values):
    return DifficultyScores([f"s{i}" for i in range(len(values))], {"cud": np.array(values)})


def test_hardest_groups_and_buckets():
    lines = score_summary(scores(np.arange(80) / 80), [f"g{i // 20}" for i in range(80)], 4)
    assert lines[1] == "  1, easiest: 0 to 0.2375 (20 samples)" and lines[4].startswith("  4, hardest: 0.75 to")
    assert lines[5].startswith("hardest of 4 groups by mean cud: g3 0.8688 (20 samples), g2 ")
    assert len(lines) == 6  # enough samples


@pytest.mark.parametrize(
    ("size", "groups", "said"),
    [
        (12, None, "too few samples to trust this: the smallest bucket has 3, and"),
        (80, ["a"] * 77 + ["b"] * 3, "too few samples to trust this: the smallest group has 3, and"),
        (12, ["a", "b"] * 6, "the smallest bucket has 3 and the smallest group has 6, and"),
        (3, None, "the smallest bucket has 1, and"),
    ],
)
def test_too_few_samples_are_said(size, groups, said):
    assert said in score_summary(scores(np.arange(size) / size), groups, 4)[-1]


def test_what_ranks_nothing_is_said():
    assert score_summary(scores([1.0, 1.0]), None, 4) == ["cud is the same for all samples: it ranks nothing"]
    assert score_summary(scores([1.0]), None, 4) == []


@pytest.mark.parametrize(("before", "after", "warned"), [(0.9, 0.86, False), (0.9, 0.84, True), (None, 0.1, False)])
def test_a_run_that_lost_over_a_twentieth_of_the_retain_probability_says_so(tmp_path, before, after, warned):
    """By the rule of the report, from figures that the run has; without one of before it says nothing."""
    measured = {"eval_forget_prob": 0.1, "eval_retain_prob": after, "step": 5}
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        forget_ids=["a"],
        state=SimpleNamespace(global_step=5),
        residual=SimpleNamespace(at_start=None, retain_at_start=before),
        measured=lambda: measured,
        difficulty_scores=None,
    )
    lines = train_summary(trainer, {})
    assert ("retain probability 0.900 -> " in lines[0]) == (before is not None)
    assert lines[1].startswith("warning: 7% of the retain probability went") == warned
    assert any("warning" in line for line in lines) == warned


@pytest.mark.slow
def test_last_lines_of_score_train_evaluate(tmp_path, capsys, monkeypatch):
    """Each names the next command, and that command works."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = ["--bf16", "false", "--use_cpu", "true", "--output_dir", "unused"]
    assert main(["score", *data(tmp_path), *settings, "--metrics", "loss", "length", "--output", "d.parquet"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "too few samples to trust this: the smallest bucket has 2" in out[-3]
    assert out[-2] == "difficulty of 9 samples under 2 metrics, higher = harder: d.parquet"
    command = out[-1].removeprefix("next: cud ").split()
    assert command[0] == "train" and command[-4:] == ["--difficulty_scores", "d.parquet", "--output_dir", "unlearned"]
    assert set(command[1:-4]) == set(data(tmp_path))

    adapter = [
        "--use_peft",
        "true",
        "--lora_r",
        "2",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--difficulty",
        "loss",
    ]
    assert main([*train(tmp_path, "unlearned", *adapter), "--difficulty_scores", "d.parquet"]) == 0
    done, written, what, gone, following = capsys.readouterr().out.splitlines()[-5:]
    figure = re.fullmatch(
        r"unlearned 9 samples in 5 steps; mean forget probability 0\.\d+ -> (0\.\d+), retain probability 0\.\d+, "
        r"measured at step 5",
        done,
    )
    assert written == "written: adapter, difficulty scores, schedule and card in unlearned"
    assert what.startswith("this folder is an adapter: load it with PEFT") and "merge" in what
    assert gone.startswith("is it gone? ") and "--holdout_dataset" in gone
    card = (tmp_path / "unlearned" / "README.md").read_text()
    measured = float(re.search(r"\| forget set \| (0\.\d+) \|", card)[1])
    assert f"{measured:.3f}" == figure[1]  # one number

    command = following.removeprefix("next: cud ").split()
    assert command[0] == "evaluate" and main([*command, "--generate", "false"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("next: ") and "written: " in out
    left = pd.read_parquet(tmp_path / "unlearned-report" / "per_sample.parquet")["probability"].mean()
    assert abs(left - measured) < 1e-4
