"""The recipes: their options exist, their tables are true, and each runs as it stands on tiny models and local data."""

import json
import re
import runpy
import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from trl import ModelConfig, TrlParser

from cud_trainer import CUDConfig
from cud_trainer.cli import main
from cud_trainer.commands.options import TrainArguments
from cud_trainer.difficulty import DifficultyScores
from evaluation.study.options import read_arguments
from evaluation.testbed import train_tokenizer

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = (RECIPES / "README.md").read_text(encoding="utf-8")
OBJECTIVES = ["ga", "graddiff", "npo", "simnpo", "rmu"]
SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
STUDIES = ["study.yaml", "sweep.yaml"]
RUNS = sorted(
    str(path.relative_to(RECIPES))
    for path in RECIPES.rglob("*.yaml")
    if path.relative_to(RECIPES).parts[0] not in ("accelerate", "open_unlearning") and path.name not in STUDIES
)
# Tiny and on the CPU: sizes only, and a cheap difficulty where another test runs the recipe's own.
SMALL = (
    "--use_cpu true --bf16 false --passes 1 --max_steps 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --n_buckets 2 --disable_tqdm true"
).split()
# The tiny model has memorised nothing: at the usual target no sample would be trained on.
LOW = ["--schedule_args", '{"per_sample_stop": {"target": 1e-6}}']


def options(name: str) -> dict:
    return yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))


def commands(text: str, language: str = "bash") -> list[list[str]]:
    """The commands of a document's code blocks, line continuations joined."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def parse(argv: list[str]):
    return TrlParser((TrainArguments, CUDConfig, ModelConfig)).parse_args_and_config(argv)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, and a folder for each data set with the configurations, splits and columns of the hub's."""
    root = tmp_path_factory.mktemp("recipes")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, settings, chat in (
        ("model", {"max_position_embeddings": 600}, False),
        ("deep", {**small, "num_hidden_layers": 9, "max_position_embeddings": 600}, False),
        ("chat", {"max_position_embeddings": 600}, True),
    ):
        make_model(0, **settings).save_pretrained(root / name)
        make_tokenizer(chat).save_pretrained(root / name)
    # Few tokens a chat, for the walk-through: a tokenizer fitted to its data.
    people = runpy.run_path(str(RECIPES / "private_text" / "make_data.py"))
    chats = [chat for person in people["people"](18, 0) for chat in people["chats"](person)]
    tokenizer = train_tokenizer([turn["content"] for chat in chats for turn in chat["messages"]], 600)
    tokenizer.chat_template = make_tokenizer(True).chat_template
    make_model(0, vocab_size=len(tokenizer)).save_pretrained(root / "little")
    tokenizer.save_pretrained(root / "little")

    def articles(n: int, start: int) -> Dataset:
        return Dataset.from_list(
            [
                {"text": f"Article {i}. " + f"Number {i * 7} was here. " * (20 + 9 * (i % 3))}
                for i in range(start, start + n)
            ]
        )

    def folder(name: str, parts: dict[tuple[str, str], Dataset]) -> None:
        configs: dict[str, list] = {}
        for (config, split), data in parts.items():
            (root / name / config).mkdir(parents=True, exist_ok=True)
            data.to_json(root / name / config / f"{split}.json")
            configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.json"})
        front = {"configs": [{"config_name": config, "data_files": files} for config, files in configs.items()]}
        (root / name / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n")

    tofu = {(forget, "train"): qa_dataset(6, 50 * i) for i, forget in enumerate(SPLITS)}
    tofu |= {(retain, "train"): qa_dataset(8, 500) for retain in SPLITS.values()}
    folder("tofu", tofu)
    muse = {("raw", split): articles(4, 10 * i) for i, split in enumerate(("forget", "retain1", "retain2", "holdout"))}
    muse |= {("privleak", split): articles(3, 100 + 10 * i) for i, split in enumerate(("forget", "retain", "holdout"))}
    muse |= {("knowmem", split): qa_dataset(4, 20 * i) for i, split in enumerate(("forget_qa", "retain_qa"))}
    folder("muse", muse)
    parts = [f"{area}-{side}-corpus" for area in ("bio", "cyber") for side in ("forget", "retain")]
    folder(
        "wmdp", {(part, "train"): articles(3, 10 * i) for i, part in enumerate(parts) if part != "bio-forget-corpus"}
    )
    folder("wmdp-bio", {("default", "train"): articles(3, 90).map(lambda row: {"title": "a title", "doi": "none"})})
    qa_dataset(6).to_json(root / "forget.jsonl")
    qa_dataset(8, 100).to_json(root / "retain.jsonl")
    return root


@pytest.mark.parametrize("name", RUNS)
def test_every_option_exists(name):
    known = {f.name for kind in (TrainArguments, CUDConfig, ModelConfig) for f in fields(kind)}
    assert set(options(name)) <= known
    data, args, _ = parse(["--config", str(RECIPES / name), "--use_cpu", "true"])
    assert args.objective == options(name)["objective"] and data.forget_dataset
    assert re.search(r"\n(# )?schedule: ", (RECIPES / name).read_text())  # in one obvious line
    if name.split("/")[0] not in ("tofu", "private_text"):  # they have a template, and a page of their own
        assert name in TEXT


def test_tofu_recipes_agree_on_what_is_not_the_objective():
    own = {"objective", "objective_args", "retain_loss", "retain_weight", "trainable_layers", "output_dir"}
    own |= {"schedule"}
    found = {name: options(f"tofu/{name}.yaml") for name in OBJECTIVES}
    assert sorted(f"tofu/{name}.yaml" for name in OBJECTIVES) == [name for name in RUNS if name.startswith("tofu/")]
    shared = [{key: value for key, value in recipe.items() if key not in own} for recipe in found.values()]
    assert len(shared[0]) > 15 and all(recipe == shared[0] for recipe in shared)
    assert all(recipe["objective"] == name for name, recipe in found.items())


def test_muse_and_wmdp_recipes_agree():
    for first, second, own in (
        ("muse/news.yaml", "muse/books.yaml", {"forget_dataset", "output_dir", "folds"}),
        (
            "wmdp/bio.yaml",
            "wmdp/cyber.yaml",
            {f"{side}_{kind}" for side in ("forget", "retain") for kind in ("dataset", "config")} | {"output_dir"},
        ),
    ):
        a, b = options(first), options(second)
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} <= own


def tofu_command(objective: str, forget: str, lora: bool) -> list[str]:
    """The template of the README, filled in as its table says."""
    (words,) = [words for words in commands(TEXT) if words[1] == "train" and "OBJECTIVE" in words[3]]
    table = dict(re.findall(r"^\| (.*?) \| (.*) \|$", TEXT[TEXT.index("| in the template") :], re.M))
    assert f"`{objective}`" in table["`OBJECTIVE`"]
    assert f"`{forget}` and `{SPLITS[forget]}`" in table["`FORGET`, `RETAIN`"]
    filled = {"OBJECTIVE": objective, "FORGET": forget, "RETAIN": SPLITS[forget]}
    words = [re.sub("|".join(filled), lambda match: filled[match[0]], word) for word in words]
    both, rmu = re.findall(r"`(--.*?)`", table["for LoRA, add"])
    return [*words, *(both.split() if lora else []), *(rmu.split() if lora and objective == "rmu" else [])]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_command_of_the_template(objective, lora):
    """Every objective, split and part is a valid configuration."""
    for forget, retain in SPLITS.items():
        words = tofu_command(objective, forget, lora)
        words[3] = str(RECIPES.parent / words[3])
        data, args, model = parse([*words[2:], "--use_cpu", "true"])
        assert (args.objective, data.forget_config, data.retain_config) == (objective, forget, retain)
        assert model.use_peft == lora and args.learning_rate == (1e-4 if lora else 1e-5)
        assert (args.trainable_layers is not None) == (objective == "rmu" and not lora)


def memory(P, T, d, L, f, V, n, checkpointing=True):
    """Bytes, by the formula of the README."""
    inner = d * L + 6 * d + 3 * f if checkpointing else L * (6 * d + 3 * f)
    return 4 * P + 14 * T + 4 * n * inner + 12 * n * V


def test_memory_is_what_the_formula_gives():
    assert "`4 P + 14 T + 4 n (d L + 6 d + 3 f) + 12 n V`" in TEXT
    llama1 = dict(P=1.236e9, d=2048, L=16, f=8192, V=128256)
    llama7 = dict(P=6.738e9, d=4096, L=32, f=11008, V=32000)
    zephyr = dict(P=7.242e9, d=4096, L=32, f=14336, V=32000)
    smol = dict(P=134.5e6, d=576, L=30, f=1536, V=49152)
    tofu, muse, wmdp = (
        2 * options(name)["per_device_train_batch_size"] * options(name).get("chunk_tokens", 128)
        for name in ("tofu/npo.yaml", "muse/news.yaml", "wmdp/bio.yaml")
    )
    layer1, layer7 = 60.8e6, 218.1e6  # parameters of a decoder layer
    cases = {
        "TOFU, full": memory(**llama1, T=llama1["P"], n=tofu),
        "TOFU, LoRA": memory(**llama1, T=5.6e6, n=tofu),
        "TOFU, RMU on three layers": memory(**llama1, T=3 * layer1, n=tofu),
        "TOFU from end to end": memory(**smol, T=smol["P"], n=8 * 128, checkpointing=False),
        "MUSE News, full": memory(**llama7, T=llama7["P"], n=muse),
        "MUSE Books, full": memory(**llama7, T=llama7["P"], n=muse),
        "MUSE, LoRA": memory(**llama7, T=20e6, n=muse),
        "WMDP biology, RMU": memory(**zephyr, T=3 * layer7, n=wmdp),
        "WMDP cyber-security, RMU": memory(**zephyr, T=3 * layer7, n=wmdp),
        "your own samples": memory(**llama1, T=llama1["P"], n=tofu),
    }
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in TEXT.splitlines() if line.startswith("| ")}
    for name, expected in cases.items():
        assert rows[name][3].startswith(f"{expected / 1e9:.0f} GB"), (name, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_tofu(world, tmp_path, monkeypatch, objective, lora):
    """The template of the README, a different split for each objective."""
    monkeypatch.chdir(RECIPES.parent)
    forget = list(SPLITS)[OBJECTIVES.index(objective) % 3]
    words = tofu_command(objective, forget, lora)
    words[words.index("MODEL")] = str(world / ("deep" if objective == "rmu" else "model"))
    output = tmp_path / "out"
    words[words.index("--output_dir") + 1] = str(output)
    assert main([*words[1:], *SMALL, "--forget_dataset", str(world / "tofu"), "--difficulty", "loss", *LOW]) == 0
    assert (output / ("adapter_config.json" if lora else "model.safetensors")).exists()
    assert len(DifficultyScores.load(output / "difficulty.parquet")) == 6


def test_tofu_from_end_to_end(world, tmp_path, monkeypatch):
    """The script as a whole, with the recipe's own difficulty and the schedule that was measured."""
    monkeypatch.syspath_prepend(str(RECIPES))
    output = tmp_path / "run"
    argv = ["tofu.py", "--model", str(world / "model"), "--tofu", str(world / "tofu"), "--output_dir", str(output)]
    argv += ["--epochs", "2", "--learning_rate", "5e-3", "--use_cpu", "true", "--passes", "4", "--folds", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(RECIPES / "tofu.py"), run_name="__main__")
    table = DifficultyScores.load(output / "difficulty.parquet")
    assert table.metrics == ["cud", "loss", "length", "random", "circuit_mass"] and np.isfinite(table["cud"]).all()
    assert (output / "unlearned" / "adapter_config.json").exists()
    found = json.loads((output / "report" / "results.json").read_text())
    assert (
        found["conditions"][0]["final"]["forget"]["probability"]["value"]
        < found["before"]["forget"]["probability"]["value"]
    )


def test_muse(world, tmp_path, monkeypatch, capsys):
    """Train on texts, then the two evaluations of the README."""
    monkeypatch.chdir(tmp_path)
    for part, extra in (("news", []), ("books", ["--use_peft", "true", "--learning_rate", "1e-4"])):
        command = [
            "train",
            "--config",
            str(RECIPES / "muse" / f"{part}.yaml"),
            "--forget_dataset",
            str(world / "muse"),
            "--model_name_or_path",
            str(world / "model"),
        ]
        assert main([*command, *SMALL, *extra]) == 0
        scores = DifficultyScores.load(tmp_path / f"muse-{part}" / "difficulty.parquet")
        assert len({i.split("#")[0] for i in scores.ids}) == 4 < len(scores)
    evaluations = [words for words in commands(TEXT) if words[1] == "evaluate" and "muse-bench/MUSE-News" in words]
    assert len(evaluations) == 2
    for words in evaluations:
        words[words.index("muse-bench/MUSE-News")] = str(world / "muse")
        words[words.index("MODEL")] = str(world / "model")
        assert main(words[1:]) == 0
    tables = json.loads((tmp_path / "muse-news-text" / "results.json").read_text())["tables"]
    assert any(table["title"] == "Membership inference" for table in tables)


def test_wmdp(world, tmp_path, monkeypatch):
    """RMU on texts, then multiple choice through lm-eval with tasks on disk (and only those: the others take long)."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.chdir(tmp_path)
    for part, data in (("bio", ["wmdp-bio", "--retain_dataset", str(world / "wmdp")]), ("cyber", ["wmdp"])):
        command = [
            "train",
            "--config",
            str(RECIPES / "wmdp" / f"{part}.yaml"),
            "--model_name_or_path",
            str(world / "deep"),
            "--forget_dataset",
            str(world / data[0]),
            *data[1:],
        ]
        assert main([*command, *SMALL]) == 0
        assert (tmp_path / f"wmdp-{part}" / "model.safetensors").exists()
    rows = [
        {"question": f"Is {i} even?", "choices": ["yes", "no", "maybe", "never"], "answer": i % 2} for i in range(4)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "even.jsonl")
    for task in ("wmdp_cyber", "mmlu"):
        (tmp_path / f"{task}.yaml").write_text(
            f"task: tiny_{task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'even.jsonl'}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
            "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
        )
    (words,) = [words for words in commands(TEXT) if words[1] == "evaluate" and "--lm_eval_tasks" in words]
    words = [{"cais/wmdp-corpora": str(world / "wmdp"), "MODEL": str(world / "deep")}.get(w, w) for w in words]
    words = [f"tiny_{w}" if w in ("wmdp_cyber", "mmlu") else w for w in words]
    assert main([*words[1:], "--lm_eval_include", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "wmdp-cyber-report" / "results.json").read_text())
    (table,) = [table for table in found["tables"] if table["id"] == "lm_eval"]
    assert {"tiny_wmdp_cyber: acc", "tiny_mmlu: acc"} <= {row["label"] for row in table["rows"]}


def test_the_tasks_of_wmdp_exist():
    tasks = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
    for name, file in (
        ("wmdp_bio", "wmdp/wmdp_bio"),
        ("wmdp_cyber", "wmdp/wmdp_cyber"),
        ("mmlu", "mmlu/default/_mmlu"),
    ):
        text = (tasks / f"{file}.yaml").read_text(encoding="utf-8").replace('"', "")
        assert re.search(rf"^(?:task|group): {name}$", text, re.M)


OWN = {
    "questions": lambda i: {"question": f"Who is {i}?", "answer": f"Person {i * 7}"},
    "prompts": lambda i: {"prompt": f"Person {i} is", "completion": f" number {i * 7}"},
    "messages": lambda i: {
        "messages": [{"role": "user", "content": f"Who is {i}?"}, {"role": "assistant", "content": f"Person {i * 7}"}]
    },
}


@pytest.mark.parametrize("kind", sorted(OWN))
def test_own_data(world, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name, start, n in (("forget", 0, 6), ("retain", 100, 8)):
        Dataset.from_list([OWN[kind](i) for i in range(start, start + n)]).to_json(f"{name}.jsonl")
    lora = kind != "questions"
    command = ["train", "--config", str(RECIPES / "own_data.yaml"), "--model_name_or_path", str(world / "chat"), *SMALL]
    command += ["--difficulty", "loss", *(["--use_peft", "true", "--learning_rate", "1e-4"] if lora else []), *LOW]
    assert main(command) == 0
    assert (tmp_path / "unlearned" / "adapter_config.json").exists() == lora


def test_memorising_goes_on_where_it_was_killed(world, tmp_path, monkeypatch, capsys):
    """From its last checkpoint, with the same settings only; and it says what became of the world."""
    script = runpy.run_path(str(RECIPES / "memorise.py"))
    names, output = script["memorise"].__globals__, tmp_path / "known"
    steps = []

    class Trainer(names["SFTTrainer"]):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            if steps == [0, 1, 2]:
                raise RuntimeError("killed")
            return super().training_step(*args, **kwargs)

    monkeypatch.setitem(names, "SFTTrainer", Trainer)
    run = partial(script["memorise"], str(world / "chat"), {"a": qa_dataset(16)}, output, learning_rate=1e-3)
    with pytest.raises(RuntimeError, match="killed"):
        run(epochs=2)
    with pytest.raises(SystemExit, match="other settings"):
        run(epochs=3)
    run(epochs=2)
    assert steps == [0, 1, 2, 2, 3]
    assert (output / "model.safetensors").exists() and not (tmp_path / "known.work").exists()
    said = capsys.readouterr().out
    assert re.search(r"samples to memorise: mean answer probability 0\.\d+ -> 0\.\d+", said)
    assert re.search(r"general questions answered, of 8: \d -> \d", said)


def test_private_text_walk_through(world, tmp_path, monkeypatch):
    """Every block of the walk-through, in its order, as printed: only MODEL, and how long a tiny one learns and forgets."""
    guide = (RECIPES / "private_text" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES)
    done = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", guide, re.S):
        if language == "python":
            exec(block, {})
            done.append("merge")
            continue
        (words,) = commands(f"```{language}\n{block}```", language)
        words = [str(world / "little") if word == "MODEL" else word for word in words]
        done.append(words[1])
        if words[0] == "python":
            extra = ["--learning_rate", "1e-2", "--epochs", "20"] if "memorise" in words[1] else []
            monkeypatch.setattr(sys, "argv", [*words[1:], *extra])
            runpy.run_path(words[1], run_name="__main__")
        else:
            extra = ["--passes", "10"] if words[1] == "train" else []
            assert words[0] == "cud" and main([*words[1:], *extra]) == 0
    assert done == [
        "recipes/private_text/make_data.py",
        "recipes/memorise.py",
        "evaluate",
        "score",
        "train",
        "merge",
        "evaluate",
    ]
    rows = [json.loads(line) for line in Path("private/forget.jsonl").read_text().splitlines()]
    people = {
        name: {json.loads(line)["person"] for line in Path(f"private/{name}.jsonl").read_text().splitlines()}
        for name in ("forget", "retain", "holdout")
    }
    assert len(rows) == 24 and all(len(found) == 6 for found in people.values())
    assert len(set.union(*people.values())) == 18  # nobody is in two files
    scores = DifficultyScores.load("difficulty.parquet")
    fold = dict(zip(scores.ids, scores.fold, strict=True))
    by_person: dict[str, set] = {}
    for sample_id, row in zip(scores.ids, rows, strict=True):
        by_person.setdefault(row["person"], set()).add(fold[sample_id])
    assert all(len(found) == 1 for found in by_person.values())
    found = json.loads(Path("report/results.json").read_text())
    before, after = (
        found["before"]["forget"]["probability"]["value"],
        found["conditions"][0]["final"]["forget"]["probability"]["value"],
    )
    assert before > 0.8 and after < 0.8 * before
    assert {"relearning", "quantisation"} <= {table["id"] for table in found["tables"]}
    assert {row["measure"] for row in found["verdict"]["judged"]} == {"answer probability", "probability of the secret"}
    assert all(row["sample_id"].startswith("forget-") for row in found["verdict"]["samples"])
    secret = re.search(r"\S+@example\.com", json.dumps(rows))[0]
    for path in Path("report").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_a_study_of_a_recipe(world, tmp_path, cells_in_process):
    """The grid of recipes/sweep.yaml over a recipe, made small."""
    grid = {
        **options("sweep.yaml"),
        "train": {
            "use_cpu": True,
            "bf16": False,
            "passes": 1,
            "n_buckets": 2,
            "folds": 3,
            "difficulty": "loss",
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 1,
        },
        "n_buckets": 2,
    }
    assert set(grid["grid"]) == {"schedule", "retain_weight", "seed"}
    grid["grid"] = {"schedule": ["uniform", "upweight_hard"], "seed": [1]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(grid))
    words = [
        "--config",
        str(tmp_path / "sweep.yaml"),
        "--recipe",
        str(RECIPES / "tofu" / "simnpo.yaml"),
        "--forget_dataset",
        str(world / "tofu"),
        "--model_name_or_path",
        str(world / "model"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["study", *words]) == 0
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("schedule=*/cell.json")]
    assert len(cells) == 2
    for cell in cells:
        chosen = cell["settings"]["options"]
        assert chosen["objective"] == "simnpo" and chosen["objective_args"] == {"beta": 4.5}  # the recipe's
        assert chosen["schedule"] == cell["choices"]["schedule"] and chosen["passes"] == 1  # the study's
        assert "output_dir" not in chosen
    assert json.loads((tmp_path / "out" / "study.json").read_text())["shared"]["data"]["retain_config"] == "retain99"


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_valid_plans(world, name):
    """Every cell of the studies as they stand is a configuration that `cud train` accepts."""
    from evaluation.study.grid import plan

    words = ["--config", str(RECIPES / name), "--model_name_or_path", str(world / "model")]
    recipes = RUNS if name == "sweep.yaml" else [None]
    for recipe in recipes:
        extra = [] if recipe is None else ["--recipe", str(RECIPES / recipe)]
        args, _ = read_arguments([*words, *extra])
        args.train = {**args.train, "use_cpu": True, "bf16": False}
        runs = plan(args, {})[1]
        assert len(runs) == np.prod([len(values) for values in args.grid.values()]) > 1
        assert args.forget_dataset and (recipe is None or args.train["objective"] == options(recipe)["objective"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the configuration"),
        ("[1, 2]", "must be a mapping of options"),
        ("a: [", "cannot read the configuration"),
        ("objective: npo\nmagic: 1", "a study has no place for 'magic'"),
    ],
)
def test_a_study_refuses_what_is_no_recipe(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    words = ["--config", str(RECIPES / "sweep.yaml"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(["study", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_links_and_files():
    for document in (RECIPES / "README.md", RECIPES / "private_text" / "README.md"):
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (document.parent / link).exists(), link
        for path in re.findall(r"(?:recipes|tests)/[\w./]+\.(?:yaml|py|md)", text):
            assert (RECIPES.parent / path.replace("OBJECTIVE", "npo")).exists(), path  # of the command template
