"""Malformed, contradictory and void invocations: one line and exit code 2, before anything is computed, no file left.

Each case is one that was tried against the commands: see `ALWAYS`. The property test combines them with the command line,
a YAML file, a study's `train` and Python, which must agree; `CUD_EXAMPLES`
runs more, benchmarks/malformed.py all.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml
from builders import ROOT, make_model, make_tokenizer, qa_dataset
from command_lines import data, make_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cud_trainer import CUDConfig
from cud_trainer.cli import main

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("CUD_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


BASE = {"use_cpu": True, "bf16": False, "report_to": "none", "difficulty": "none", "passes": 1, "save_strategy": "no"}
HUGE = 99999999999999999999
NUMBERS = {  # options of `cud train` and values that they cannot have
    **{name: [-1, HUGE, "x"] for name in ("seed", "data_seed")},
    **{name: [0, -1, HUGE, "x", True] for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "passes", "folds",
        "n_buckets", "reference_top_k", "eval_retain_samples", "scoring_batch_bytes")},
    **{name: [-1.0, float("nan"), float("inf"), "x", True] for name in (
        "learning_rate", "weight_decay", "retain_weight", "warmup_steps", "adam_epsilon")},
    **{name: [1.0, -0.5, float("nan")] for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor")},
    **{name: [0.0, -1.0, float("nan"), float("inf")] for name in (
        "dual_rate", "calibration_share", "retain_limit", "max_retain_loss", "target_forget_prob", "logging_steps",
        "save_steps", "neftune_noise_alpha")},
    "max_grad_norm": [-1.0, float("nan")],
    "max_steps": [-5, HUGE],
    "max_length": [0, -1, "abc"],
    "dataloader_num_workers": [-1, HUGE],
    "save_total_limit": [0, -1],
}  # fmt: skip
OTHERS = {
    "gradient_checkpointing": ["maybe", 2, []],
    "overwrite": ["maybe", 1.5],
    "trainable_layers": ["0-99999999999", "3-1", "x", "99"],
    "objective": ["", "nope", ["npo"], {"npo": 1}],
    "schedule": ["", "nope", ["uniform"]],
    "difficulty": ["nope", 5],
    "retain_loss": ["nope", "", 1],
    "loss_normalization": ["nope"],
    "objective_args": ["[]", {"nope": 1}, {"beta": float("nan")}, {"beta": "x"}, {"beta": True}],
    "schedule_args": [{"nope": 1}, "x"],
    "circuit_args": ["x", []],
    "accelerator_config": [{"nope": 1}, "nope.json"],
    "lr_scheduler_kwargs": ["[]", "nope"],
    "model_init_kwargs": ["[]", "nope"],
    "deepspeed": ["nope.json"],
    "fsdp_config": ["nope.json"],
    "lr_scheduler_type": ["nope"],
    "optim": ["nope"],
    "save_strategy": ["nope", "best"],
    "eval_strategy": ["nope"],
    "log_level": ["nope"],
    "counterfactual_column": ["", "nope"],
    "group_column": ["", "nope"],
    "alternative_column": ["", "nope"],
    "refusals": [["I do not know."]],
    "num_train_epochs": [2.0],
    "packing": [True],
}
WRONG = [(name, value) for options in (NUMBERS, OTHERS) for name, values in options.items() for value in values]


def text(value) -> list[str]:
    """A value on the command line."""
    if isinstance(value, list):
        return [str(one) for one in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


# What only the data or the model can tell is no matter of the options alone.
LATE_VALUES = {("counterfactual_column", "nope"), ("group_column", "nope"), ("trainable_layers", "99")}
NOT_OF_STUDIES = {"save_strategy", "eval_strategy", "overwrite", "max_steps", "target_forget_prob"}


def fits(how: str, name: str, value) -> bool:
    """Whether a wrong value can be given in this way, and is wrong there."""
    late = isinstance(value, str) and (name, value) in LATE_VALUES
    if how == "line":  # `True` is the text "True" there
        return value is not True and not isinstance(value, list)
    if how == "yaml":
        return True
    if isinstance(value, str) and name in NUMBERS:
        return False
    return not late and (how == "python" or name not in NOT_OF_STUDIES)


def names(line: str, wrong: dict) -> bool:
    """Whether an error names one of the options, what is inside it, or a column; and is not too long."""
    inner = [name for value in wrong.values() if isinstance(value, dict) for name in value]
    texts = [repr(value) for value in wrong.values() if isinstance(value, str) and value]
    return any(name in line for name in (*wrong, *map(repr, inner), *texts)) and len(line) < 2000


def command(world, folder, how: str, wrong: dict) -> list[str]:
    """A command line of `cud train`, or of a study, with wrong options."""
    options = {**BASE, **wrong}
    if how == "study":
        free = next(name for name in ("seed", "data_seed", "weight_decay") if name not in wrong)
        options = {name: value for name, value in options.items() if name not in NOT_OF_STUDIES | {"report_to"}}
        path = folder / "c.yaml"
        path.write_text(yaml.safe_dump({"grid": {free: [1]}, "train": options}))
        return ["study", *data(world), "--config", str(path), "--output_dir", str(folder / "out")]
    if how == "yaml":
        path = folder / "c.yaml"
        path.write_text(yaml.safe_dump(options))
        return ["train", *data(world), "--config", str(path), "--output_dir", str(folder / "out")]
    line = [part for key, one in options.items() for part in (f"--{key}", *text(one))]
    return ["train", *data(world), "--output_dir", str(folder / "out"), *line]


def refused(capsys, line, folder, kept=()) -> str:
    capsys.readouterr()
    code = main(line)
    error = capsys.readouterr().err
    assert code == 2, f"exit code {code}: {line}"
    (said,) = [part for part in error.splitlines() if "error" in part]
    assert said.startswith(f"cud {line[0]}: error: ") and "Traceback" not in error and "fault of cud" not in error, (
        error
    )
    assert {path.name for path in folder.iterdir()} <= {"c.yaml", *kept}, line
    return said


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(case=st.sampled_from(WRONG), how=st.sampled_from(["line", "yaml", "study", "python"]))
def test_wrong_options(world, tmp_path_factory, capsys, monkeypatch, case, how):
    name, value = case
    folder = tmp_path_factory.mktemp("wrong")
    monkeypatch.setattr("evaluation.study.pool.Worker.run", lambda *a: "not run here")
    how = how if fits(how, name, value) else "yaml"
    if how != "python":
        assert names(refused(capsys, command(world, folder, how, {name: value}), folder), {name: value})
        return
    with pytest.raises(ValueError) as found:
        CUDConfig(str(folder / "out"), **{**BASE, name: value})
    assert names(str(found.value), {name: value}) and not list(folder.iterdir())


def test_a_thousand_were_tried():
    found = json.loads(Path(ROOT, "benchmarks", "results", "malformed.json").read_text())
    assert found["refused"] == found["invocations"] >= 1000 and not found["faults"]
    assert found["options"] == len({name for name, _ in WRONG})


EVALUATE = ["evaluate", "--generate", "false"]
SCORE = ["score", "--use_cpu", "true", "--bf16", "false", "--metrics", "length"]
TRAIN = ["train", *(part for key, one in BASE.items() for part in (f"--{key}", *text(one)))]
ALWAYS = [
    (EVALUATE, ["--use_peft", "true"], "use_peft"),
    (EVALUATE, ["--lora_r", "3"], "lora_r"),
    (SCORE, ["--lora_r", "3"], "lora_r"),
    (EVALUATE, ["--samples", "2"], "samples"),  # with --generate false
    (EVALUATE, ["--temperature", "0.5"], "temperature"),  # without samples
    (EVALUATE, ["--generation_engine", "paged"], "generation_engine"),  # with --generate false
    (EVALUATE[:1], ["--generation_engine", "tgi"], "generation_engine"),
    (EVALUATE[:1], ["--generation_engine", "paged", "--samples", "2"], "generation_engine paged"),
    (EVALUATE, ["--nli_model", "x"], "nli_model"),  # without samples
    (EVALUATE[:1], ["--samples", "2", "--leak_rouge", "1.5"], "leak_rouge"),
    (EVALUATE[:1], ["--samples", "2", "--leak_span", "0"], "leak_span"),
    (EVALUATE[:1], ["--samples", "2", "--nli_model", "nowhere"], "nowhere"),
    (EVALUATE, ["--secret_pattern", "("], "secret_pattern"),
    (EVALUATE, ["--secret_pattern", "no such thing"], "secret_pattern"),
    (EVALUATE, ["--relearn_samples", "3", "--relearn_rate", "inf"], "relearn_rate"),
    (EVALUATE, ["--relearn_rate", "0.1"], "relearn_rate"),  # without relearn_samples
    (EVALUATE, ["--relearn_samples", "3", "--relearn_steps", "99999999999"], "relearn_steps"),
    (EVALUATE, ["--metric", "cud"], "metric"),  # without scores
    (EVALUATE, ["--n_buckets", "9"], "n_buckets"),  # without scores
    (EVALUATE, ["--batch_size", "0"], "batch_size"),
    (EVALUATE, ["--seed", "-1"], "seed"),
    (EVALUATE, ["--temperature", "nan"], "temperature"),
    (EVALUATE, ["--quantize", "3"], "quantize"),
    (EVALUATE, ["--holdout_dataset", "RETAIN"], "holdout"),
    (EVALUATE, ["--holdout_dataset", "FORGET"], "holdout"),
    (EVALUATE, ["--lm_eval_include", "x"], "lm_eval_include"),
    (EVALUATE, ["--holdout_split", "test"], "holdout_split"),
    (EVALUATE, ["--retain_split", "test"], "retain_split"),
    (SCORE, ["--folds", "0"], "folds"),
    (SCORE, ["--max_forget_samples", "0"], "max_forget_samples"),
    (SCORE, ["--chunk_tokens", "-1"], "chunk_tokens"),
    (SCORE, ["--output", ""], "output"),
    (TRAIN, ["--forget_split", "test"], "forget_split"),
    (TRAIN, ["--forget_config", "x"], "forget_config"),
    (TRAIN, ["--use_peft", "true", "--lora_r", "0", "--lora_target_modules", "q_proj", "v_proj"], "lora_r"),
    (TRAIN, ["--use_peft", "true", "--lora_alpha", "0", "--lora_target_modules", "q_proj", "v_proj"], "lora_alpha"),
    (TRAIN, ["--use_peft", "true", "--lora_dropout", "1.5"], "lora_dropout"),
    (["demo"], ["--workers", "99999999999"], "workers"),
    (["demo"], ["--retain_level", "nan"], "retain_level"),
    (["demo"], ["--epochs", "0"], "epochs"),
    (["import"], ["--open_unlearning", "DEEP"], "DEEP"),
    (["import"], ["--open_unlearning", "DEEP", "--n_buckets", "0"], "n_buckets"),
]  # fmt: skip


@pytest.mark.parametrize("case", ALWAYS, ids=lambda case: " ".join([case[0][0], *case[1]]))
def test_always(world, tmp_path, capsys, monkeypatch, case):
    base, extra, named = case
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "DEEP").write_text("[" * 50000)
    places = {"RETAIN": world / "retain.jsonl", "FORGET": world / "forget.jsonl", "DEEP": tmp_path / "DEEP"}
    line = [*base, *(data(world) if base[0] in ("train", "score", "evaluate") else []),
            *([] if base[0] == "score" else ["--output_dir", "out"]), *(str(places.get(one, one)) for one in extra)]  # fmt: skip
    assert named in refused(capsys, line, folder)


# With difficulty to compute: each of these used to be found after it, or never.
LATE = [
    (["--resume_from_checkpoint", "nope"], "nope is no complete checkpoint"),
    (["--resume_from_checkpoint", "MODEL"], "is no complete checkpoint"),
    (["--resume_from_checkpoint", "true"], "no complete checkpoint to resume from"),
    (
        ["--save_strategy", "best", "--eval_strategy", "steps", "--metric_for_best_model", "nope"],
        "metric_for_best_model",
    ),
    (["--save_strategy", "best"], "metric_for_best_model"),
    (["--fsdp", "full_shard"], "fsdp"),
    (["--torch_compile", "true", "--torch_compile_backend", "nope"], "torch_compile_backend"),
    (["--deepspeed", "nope.json"], "deepspeed nope.json"),
    (["--report_to", "wandb"], "report_to 'wandb'"),
    (["--optim", "galore_adamw", "--optim_target_modules", "q_proj"], "optim 'galore_adamw'"),
    (["--torch_compile_mode", "nope"], "torch_compile_mode 'nope'"),
    (["--activation_offloading", "true"], "activation_offloading needs"),
    (["--use_liger_kernel", "true"], "use_liger_kernel needs"),
    (["--use_peft", "true", "--lora_target_modules", "("], "the adapter cannot be put on this model"),
    (["--optim_target_modules", "zzz"], "optim_target_modules has no effect"),
    (["--lr_scheduler_kwargs", '{"nope": 1}'], "lr_scheduler_type"),
    (["--chat_template_path", "nope"], "chat_template_path 'nope'"),
    (["--use_peft", "true", "--lora_target_modules", "nope"], "Target modules {'nope'} not found in the base model"),
    (["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", "--lora_modules_to_save", "zzz"], "'zzz'"),
    (["--use_peft", "true", "--lora_target_parameters", "zzz"], "'zzz', which target_parameters"),
    (["--use_peft", "true", "--lora_task_type", "SEQ_CLS"], "lora_task_type"),
    (["--lora_r", "8"], "lora_r has no effect without use_peft"),
    (["--lora_target_modules", "q_proj"], "lora_target_modules has no effect without use_peft"),
    (["--use_dora", "true"], "use_dora has no effect without use_peft"),
    (["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type has no effect without load_in_4bit"),
    (["--model_revision", "nope"], "model_revision has no effect"),
    (["--hub_token", "x"], "hub_token has no effect without push_to_hub"),
    (["--hub_model_id", "x/y"], "hub_model_id has no effect without push_to_hub"),
    (["--hub_private_repo", "true"], "hub_private_repo has no effect without push_to_hub"),
    (["--hub_strategy", "checkpoint"], "hub_strategy has no effect without push_to_hub"),
    (["--gradient_checkpointing_kwargs", '{"nope": 1}'], "gradient_checkpointing_kwargs {'nope': 1}: "),
    (["--dataloader_persistent_workers", "true"], "dataloader_persistent_workers has no effect without"),
    (["--optim", "adafactor", "--optim_args", "nope=1"], "optim 'adafactor' has no option 'nope'"),
    (["--optim", "sgd", "--optim_args", "momentum=0.0,nope=1"], "optim 'sgd' has no option 'nope'"),
]


@pytest.mark.parametrize("case", LATE, ids=lambda case: " ".join(case[0]))
def test_before_difficulty_is_computed(world, tmp_path, capsys, monkeypatch, case):
    extra, named = case

    def computed(*args, **options):
        raise AssertionError("difficulty is computed")

    monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", computed)
    options = {**BASE, "difficulty": "loss", "schedule": "easy_to_hard"}
    line = [part for key, one in options.items() for part in (f"--{key}", *text(one))]
    line = ["train", *data(world), "--output_dir", str(tmp_path / "out"), *line]
    if any(importlib.util.find_spec(name) for name in ("wandb", "liger_kernel") if named.find(name[:5]) >= 0):
        pytest.skip("the package is here")
    assert named in refused(
        capsys, [*line, *(str(world / "model") if one == "MODEL" else one for one in extra)], tmp_path
    )


def test_a_checkpoint_of_another_run_is_refused_before_difficulty_is_computed(world, tmp_path, capsys, monkeypatch):
    options = {**BASE, "difficulty": "loss", "schedule": "easy_to_hard", "save_strategy": "steps", "save_steps": 1}
    line = [part for key, one in options.items() for part in (f"--{key}", *text(one))]
    line = ["train", *data(world), *line, "--output_dir"]
    assert main([*line, str(tmp_path / "a")]) in (0, 3)
    (checkpoint, *_) = (tmp_path / "a").glob("checkpoint-*")
    monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", lambda *a, **k: pytest.fail("computed"))
    resumed = [*line, str(tmp_path / "b"), "--resume_from_checkpoint", str(checkpoint)]
    assert "its weight decay is" in refused(capsys, [*resumed, "--weight_decay", "0.5"], tmp_path, {"a"})
    fewer = [*resumed, "--max_forget_samples", "8"]
    assert "its forget set is hmac:" in refused(capsys, fewer, tmp_path, {"a"})
    (tmp_path / "a" / "ids.key").unlink()
    assert "the key that its ids were made with is missing" in refused(capsys, resumed, tmp_path, {"a"})


STUDIES = [
    ({"grid": {"schedule": [["uniform"]]}}, "schedule"),
    ({"grid": {"difficulty_scores": [1]}}, "difficulty_scores"),
    ({"grid": {"passes": [1]}, "train": {"max_length": "abc"}}, "max_length"),
    ({"grid": {"passes": [1]}, "train": {"gradient_checkpointing": "false"}}, "gradient_checkpointing"),
    ({"grid": {"passes": [True]}}, "passes"),
    ({"grid": {"learning_rate": [1e-3, "2e-3"]}}, "learning_rate"),
    ({"grid": {"passes": [1]}, "relearn_samples": 1000}, "relearn_samples"),
    ({"grid": {"passes": [1]}, "relearn_rate": 0.1}, "relearn_rate"),
    ({"grid": {"passes": [1]}, "workers": HUGE}, "workers"),
    ({"grid": {"passes": [1]}, "retain_level": [float("nan")]}, "retain_level"),
    ({"grid": {"passes": [1]}, "generate_seeds": [-1]}, "generate_seeds"),
    ({"grid": {"passes": [1]}, "snapshot_every": 0}, "snapshot_every"),
]


@pytest.mark.parametrize("case", STUDIES, ids=lambda case: json.dumps(case[0])[:60])
def test_studies(world, tmp_path, capsys, case):
    settings, named = case
    train = {**BASE, **settings.get("train", {})}
    train = {
        name: value for name, value in train.items() if name not in (*settings["grid"], "save_strategy", "report_to")
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "train": train}))
    line = ["study", *data(world), "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")]
    assert named in refused(capsys, line, tmp_path)


MODELS = {
    "config.json": [{"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"dtype": "nope"},
                    {"quantization_config": {"quant_method": "gptq", "bits": 4}}],
    "tokenizer_config.json": [{"chat_template": "{{ 1 / 0 }}"}, {"chat_template": "{% for x in %}"}],
}  # fmt: skip


@pytest.mark.parametrize("case", [(file, change) for file, changes in MODELS.items() for change in changes], ids=str)
def test_models(world, tmp_path, capsys, case):
    """What is wrong with a model folder; a template that fails is only asked where there are chats."""
    import shutil

    file, change = case
    model = shutil.copytree(world / "model", tmp_path / "model")
    (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **change}))
    line = [*EVALUATE, *data(world), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    chats = tmp_path / "chats.jsonl"
    if file == "tokenizer_config.json":
        rows = [
            {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
            for i in range(3)
        ]
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        line += ["--forget_dataset", str(chats)]
    refused(capsys, line, tmp_path, {"model", "chats.jsonl"})


def test_states_that_are_none(world, tmp_path, capsys):
    """Files of ours that hold something else."""
    out = tmp_path / "a"
    (out / "checkpoint-5").mkdir(parents=True)
    (out / "checkpoint-5" / "cud_state.json").write_text("{}")
    line = [*TRAIN, *data(world), "--output_dir", str(out), "--resume_from_checkpoint", "true"]
    assert "checkpoint-5" in refused(capsys, line, tmp_path, {"a"})
    cells = tmp_path / "st" / "cells" / "schedule=uniform"
    cells.mkdir(parents=True)
    (tmp_path / "st" / "study.json").write_text("{}")
    (cells / "cell.json").write_text("[]")
    line = ["study", *data(world), "--output_dir", str(tmp_path / "st"), "--grid", '{"schedule": ["uniform"]}',
            "--train", '{"difficulty": "none", "use_cpu": true, "bf16": false}']  # fmt: skip
    assert "schedule=uniform" in refused(capsys, line, tmp_path, {"a", "st"})


def test_a_tilde_is_home_everywhere(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "f.jsonl").write_bytes((world / "forget.jsonl").read_bytes())
    (here / "e.yaml").write_text("output_dir: ~/audit\nforget_dataset: ~/f.jsonl\n")
    model = ["--model_name_or_path", str(world / "model")]
    assert main([*EVALUATE, *model, "--config", "e.yaml"]) == 0 and (tmp_path / "audit" / "report.html").exists()
    assert main([*SCORE, *model, "--forget_dataset", "~/f.jsonl", "--output", "~/s/s.parquet"]) == 0
    assert (tmp_path / "s" / "s.parquet").exists() and [path.name for path in here.iterdir()] == ["e.yaml"]


@pytest.mark.parametrize(
    "options",
    [{"folds": 0}, {"folds": True}, {"seed": -1}, {"seed": 0.5}, {"batch_bytes": 0}, {"batch_size": HUGE},
     {"circuit_args": {"steps": float("nan")}}, {"circuit_args": {"steps": HUGE}}, {"group_column": ""}, {"metrics": "loss"}],
    ids=str,
)  # fmt: skip
def test_scoring_in_python(options):
    from cud_trainer import score_difficulty

    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        score_difficulty(make_model(0), qa_dataset(9), make_tokenizer(), **{"metrics": ["length"], **options})


@pytest.mark.parametrize(
    "options", [{"learning_rate": float("nan")}, {"max_passes": 0}, {"seed": -1}, {"retain_weight": -1.0}]
)
def test_calibration_in_python(options):
    from cud_trainer.scoring.calibration import CalibrationSettings

    with pytest.raises(ValueError, match=next(iter(options))):
        CalibrationSettings(**options)


def test_paths_as_objects(world, tmp_path):
    import numpy as np

    from cud_trainer import CUDTrainer, DifficultyScores
    from evaluation.commands.inputs import EvaluateArguments

    args = CUDConfig(tmp_path / "out", **{**BASE, "passes": np.int64(1), "learning_rate": np.float32(1e-3)})
    assert args.output_dir == str(tmp_path / "out") and type(args.passes) is int
    assert EvaluateArguments(forget_dataset=world / "forget.jsonl").forget_dataset == str(world / "forget.jsonl")
    sets = dict(forget_dataset=qa_dataset(9), retain_dataset=qa_dataset(7, 100), processing_class=make_tokenizer())
    assert CUDTrainer(world / "model", args, **sets).forget_ids
    assert main([*SCORE, *data(world), "--output", str(tmp_path / "s.parquet"), "--metrics", "length", "loss"]) == 0
    own = CUDConfig(tmp_path / "b", **{**BASE, "difficulty": "loss"})
    for path in (tmp_path / "s.parquet", str(tmp_path / "s.parquet")):
        with pytest.raises(ValueError, match="scores|model"):  # of a file: made of other samples' ids, or taken
            CUDTrainer(make_model(1), own, difficulty_scores=path, **sets)
    from trl import SFTConfig

    with pytest.raises(ValueError, match="args must be a CUDConfig, got a SFTConfig"):
        CUDTrainer(make_model(0), SFTConfig(str(tmp_path / "c"), use_cpu=True, bf16=False), **sets)
    assert isinstance(DifficultyScores.load(tmp_path / "s.parquet"), DifficultyScores)
