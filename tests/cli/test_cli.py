"""The command line: real runs on a tiny model, and one line with exit code 2 for bad input."""

import json
import subprocess
import sys

import pytest
from builders import make_tokenizer, qa_dataset
from command_lines import data, make_world, train
from transformers import OPTConfig
from trl import ModelConfig

from cud_trainer.cli import COMMANDS, main
from cud_trainer.commands.options import adapter_options
from cud_trainer.difficulty import DifficultyScores

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([".*q_proj"], ".*q_proj"),
        (None, None),
    ],
)
def test_one_module_is_a_name_and_no_pattern(modules, expected):
    model_args = ModelConfig(use_peft=True, lora_target_modules=modules)
    assert adapter_options(model_args).target_modules == expected
    model_args.use_peft = False
    assert adapter_options(model_args) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and two JSON Lines files."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


def test_score_train_evaluate(world, tmp_path, capsys):
    scores, circuits = tmp_path / "scores.parquet", tmp_path / "circuits.safetensors"
    command = [
        "score",
        *data(world),
        "--output",
        str(scores),
        "--folds",
        "3",
        "--bf16",
        "false",
        "--output_dir",
        str(tmp_path / "unused"),
        "--use_cpu",
        "true",
        "--save_circuits",
        str(circuits),
    ]
    assert main([*command, "--metrics", "cud", "circuit_mass", "loss", "length"]) == 0
    loaded = DifficultyScores.load(scores)
    assert loaded.metrics == ["cud", "circuit_mass", "loss", "length"] and len(loaded) == 9
    assert not (tmp_path / "unused").exists()

    unlearned = tmp_path / "unlearned"
    extra = [
        "--schedule",
        "inverse_mass",
        "--difficulty_scores",
        str(scores),
        "--use_peft",
        "--lora_r",
        "2",
        "--lora_target_modules",
        "q_proj",
    ]
    assert main(train(world, unlearned, *extra)) == 0
    assert json.loads((unlearned / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert "unlearned 9 samples in 5 steps" in capsys.readouterr().out

    command = [
        "evaluate",
        *data(world),
        "--scores",
        str(scores),
        "--original_model",
        str(world / "model"),
        "--output_dir",
        str(tmp_path / "report"),
        "--circuits",
        str(circuits),
        "--faithfulness",
        "true",
    ]
    command[command.index("--model_name_or_path") + 1] = str(unlearned)
    assert main(command) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(results["conditions"][0]["final"]["buckets"]) == 4
    assert {"faithfulness", "faithfulness_of_random_edges"} <= set(results["circuits"]["buckets"][0])
    assert "report:" in capsys.readouterr().out
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Person" not in html and "Who is" not in html  # no forget text


def test_resume_from_the_command_line(world, tmp_path):
    extra = ["--difficulty", "loss", "--save_strategy", "steps", "--save_steps", "2"]
    command = train(world, tmp_path / "out", *extra)
    command.remove("no")
    command.remove("--save_strategy")
    assert main(command) == 0
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0


def bad(world, tmp_path):
    """Name -> (arguments, what the message must say)."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "ans')
    (tmp_path / "blank.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": " "}\n')
    (tmp_path / "twice.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 2)
    (tmp_path / "columns.jsonl").write_text('{"x": 1}\n')
    out = tmp_path / "out"

    def forget(name):
        command = train(world, out)
        command[command.index("--forget_dataset") + 1] = str(tmp_path / name)
        return command

    return {
        "command": (["learn"], "unknown command 'learn'.*demo"),
        "objective": (train(world, out, "--objective", "rmux"), "unknown objective 'rmux'"),
        "metric": (train(world, out, "--difficulty", "magic"), "unknown difficulty metric 'magic'"),
        "output": (train(world, tmp_path / "full"), "is not empty; pass --overwrite"),
        "missing file": (forget("none.jsonl"), "none.jsonl does not exist"),
        "empty file": (forget("empty.jsonl"), "forget dataset"),
        "broken file": (forget("broken.jsonl"), "cannot load the forget dataset"),
        "columns": (forget("columns.jsonl"), "forget dataset has columns \\['x'\\]"),
        "blank answer": (forget("blank.jsonl"), "forget sample 1: its answer is empty"),
        "duplicates": (forget("twice.jsonl"), "twice \\(rows 0 and 1\\)"),
        "length": (train(world, out, "--max_length", "10"), "beyond max_length=10"),
        "overlap": ([*train(world, out), "--retain_dataset", str(world / "forget.jsonl")], "is in both"),
        "model": ([*train(world, out), "--model_name_or_path", str(tmp_path / "nothing")], "there is no .*nothing"),
        "scores": (train(world, out, "--difficulty_scores", str(tmp_path / "blank.jsonl")), "has no column sample_id"),
        "no data": (
            ["train", "--model_name_or_path", str(world / "model"), "--output_dir", str(out)],
            "forget dataset is missing",
        ),
        "demo": (["demo", "--output_dir", str(tmp_path / "full")], "is not empty"),
        "demo option": (["demo", "--retain_level", "1"], "retain_level must be between 0 and 1"),
        "evaluate": (
            ["evaluate", *data(world), "--scores", "missing.parquet", "--output_dir", str(out)],
            "cannot read difficulty scores",
        ),
        "faithfulness": (
            ["evaluate", *data(world), "--faithfulness", "true", "--output_dir", str(out)],
            "give --circuits and --original_model",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "command",
        "objective",
        "metric",
        "output",
        "missing file",
        "empty file",
        "broken file",
        "columns",
        "blank answer",
        "duplicates",
        "length",
        "overlap",
        "model",
        "scores",
        "no data",
        "demo",
        "demo option",
        "evaluate",
        "faithfulness",
    ],
)
def test_bad_input(world, tmp_path, capsys, case):
    import re

    arguments, message = bad(world, tmp_path)[case]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cud") and "error:" in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--config" in capsys.readouterr().out or command


@pytest.mark.subprocess
def test_usage_needs_no_torch():
    code = "import sys; from cud_trainer.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_score_from_an_anchor_bank(world, tmp_path, capsys):
    """A second request is scored from the bank of the first, without calibration; what contradicts it is refused."""
    qa_dataset(3, 40).to_json(tmp_path / "later.jsonl")
    bank = tmp_path / "bank.safetensors"
    common = ["--folds", "3", "--bf16", "false", "--output_dir", str(tmp_path / "unused"), "--use_cpu", "true"]
    first = json.dumps({"save_anchors": str(bank), "features": ["hidden", "outputs"]})
    output = ["--output", str(tmp_path / "first.parquet"), "--metrics", "cud"]
    assert main(["score", *data(world), *common, *output, "--difficulty_args", first]) == 0
    later = [*data(world), "--anchor_bank", str(bank), *common, "--output", str(tmp_path / "later.parquet")]
    later[1] = str(tmp_path / "later.jsonl")
    assert main(["score", *later]) == 0
    scores = DifficultyScores.load(tmp_path / "later.parquet")
    assert scores.metrics == ["cud", "loss", "length", "random"] and len(scores) == 3 and scores.fold is None
    assert "calibration" not in scores.provenance
    capsys.readouterr()
    for extra, message in (
        (["--metrics", "loss"], "anchor_bank has no effect: none of the metrics ['loss']"),
        (["--difficulty_args", '{"anchors": "calibration"}'], "give one of the two"),
        (["--difficulty_args", '{"variant": "log"}'], "no circuits, which the CUD variant 'log' compares"),
        (["--anchor_bank", str(tmp_path / "later.jsonl")], "cannot read an anchor bank"),
        (["--output", str(bank)], "output"),
    ):
        assert main(["score", *later, "--overwrite", "true", *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--save_circuits", "{out}/c.safetensors"], ["--metrics", "circuit_mass"]])
def test_circuits_that_cannot_be_are_refused_before_the_model_is_loaded(world, tmp_path, capsys, extra):
    """The folder has a configuration and no weights: who loads them first gets another error."""
    OPTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=16).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    command = ["score", *data(world), "--output", str(tmp_path / "s.parquet")]
    command[command.index(str(world / "model"))] = str(tmp_path / "opt")
    assert main([*command, *[word.format(out=tmp_path) for word in extra]]) == 2
    assert "needs circuits, and circuits are not available for architecture 'opt'" in capsys.readouterr().err
