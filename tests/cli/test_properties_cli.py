"""Whatever stands in a file or an option: success, or exit code 2 and one line on stderr, and no output half made."""

import json
import os
import random

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import make_model, make_tokenizer, qa_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cud_trainer.circuits import CircuitTable
from cud_trainer.circuits.graph import Graph
from cud_trainer.cli import main
from cud_trainer.data import prepare_dataset
from cud_trainer.data.sources import load_samples
from cud_trainer.difficulty import AnchorBank, DifficultyScores
from cud_trainer.schedule import Schedule, make_schedule

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("CUD_EXAMPLES", "25"))
SECRET = "SEKRET"
IDS = [f"s{i}" for i in range(6)]


def few(count: int = EXAMPLES):
    """The same examples every time; `CUD_EXAMPLES` runs more."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


ODD = ["a", "é", "\u202e", "\u200b", "😀", "\x00", "\u2028", "\x85", "\n", " ", "ب", "\ud800", ""]
texts = st.lists(st.sampled_from(ODD), max_size=5).map("".join).flatmap(lambda t: st.sampled_from([t, t + SECRET]))
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "", None, 5]),
        "content": st.one_of(texts, st.none(), st.just([])),
    }
)
values = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 258, 2**63, 10**30, 0.5, float("nan"), float("inf")]),
    st.lists(st.sampled_from([-100, -1, 3, 257, 258, None, "x", 1.5, True]), max_size=3),
    st.lists(messages, max_size=3),
    st.just({"k": SECRET}),
    st.just([[SECRET]]),
    st.just("long " * 2000),
)
TOKENS = {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}
ROWS = [
    {"question": "who", "answer": SECRET},
    {"sample_id": "i", "question": "who", "answer": SECRET},
    {"prompt": "who", "completion": SECRET},
    {"text": SECRET},
    TOKENS,
    {**TOKENS, "counterfactual_input_ids": [3, 4, 6]},
    {**TOKENS, "alternative_input_ids": [3, 5], "alternative_labels": [3, 5]},
    {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": SECRET}]},
]


@st.composite
def data_files(draw):
    """`(suffix, bytes)` of a data file with something wrong in it, or not."""
    first, rows = draw(st.sampled_from(ROWS)), []
    for number in range(draw(st.integers(0, 3))):
        row = {k: f"{v} {number}" if isinstance(v, str) else v for k, v in first.items()}
        if draw(st.booleans()):
            row[draw(st.sampled_from([*first, "other"]))] = draw(values)
        if draw(st.integers(0, 5)) == 0:
            row.pop(next(iter(row)))
        rows.append(row)
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv"]))
    if suffix == ".csv":
        content = pd.DataFrame(rows).to_csv(index=False).encode("utf-8", "surrogatepass")
    else:
        escaped = draw(st.booleans())
        content = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    return suffix, damaged(draw, content)


def damaged(draw, content: bytes) -> bytes:
    """Whole, cut short, with bits flipped, or with something foreign at its end."""
    how = draw(st.sampled_from(["whole", "whole", "cut", "flipped", "more", "empty"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:place]
    if how == "flipped" and content:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if how == "more":
        return content + draw(st.sampled_from([b"\xff\xfe", b"[1]\n", b"null\n", b'{"question": "a', b"[" * 5000]))
    return b"" if how == "empty" else content


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    qa_dataset(6).to_json(root / "forget.jsonl")
    qa_dataset(5, 100).to_json(root / "retain.jsonl")
    return root


def checked(capsys, command, output, allowed=(0, 2)) -> None:
    """Run a command: success, or one line, and then nothing at `output`."""
    capsys.readouterr()
    code = main(command)
    error = capsys.readouterr().err
    assert code in allowed and "Traceback" not in error
    if code == 2:
        lines = [line for line in error.split("\n") if "error" in line]
        assert len(lines) == 1 and lines[0].startswith(f"cud {command[0]}: error: ") and len(lines[0]) < 1200, error
        assert not output.exists()


@few()
@given(file=data_files(), chat=st.booleans(), other=st.sampled_from([None, "answer", "completion"]))
def test_data(world, tmp_path_factory, capsys, file, chat, other):
    """What is wrong with a sample is said without its text (names of columns and ids may be)."""
    path = tmp_path_factory.mktemp("data") / f"forget{file[0]}"
    path.write_bytes(file[1])
    try:
        rows = load_samples(str(path), None, "train", None, "forget")
        prepare_dataset(rows, make_tokenizer(chat=chat), counterfactual_column=other)
    except ValueError as error:
        assert type(error) is ValueError and "forget" in str(error)
        assert SECRET not in str(error) or file[0] == ".csv" or b"\xff" in file[1] or "column" in str(error), error


@few(max(10, EXAMPLES // 2))
@given(file=data_files())
def test_score_and_evaluate(world, tmp_path_factory, capsys, file):
    folder = tmp_path_factory.mktemp("cli")
    path = folder / f"forget{file[0]}"
    path.write_bytes(file[1])
    common = ["--forget_dataset", str(path), "--model_name_or_path", str(world / "model")]
    output = folder / "scores.parquet"
    checked(
        capsys,
        ["score", *common, "--metrics", "length", "--output", str(output), "--bf16", "false", "--use_cpu"],
        output,
    )
    if not output.exists():
        report = folder / "report"
        checked(capsys, ["evaluate", *common, "--output_dir", str(report), "--generate", "false"], report)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Name -> (bytes of a file that loads, how it is loaded)."""
    root = tmp_path_factory.mktemp("good")
    scores = DifficultyScores(IDS, {"cud": np.arange(6.0), "loss": np.ones(6)}, np.arange(6) % 2, {"model": "m"})
    for suffix in ("parquet", "csv", "jsonl"):
        scores.save(root / f"scores.{suffix}")
    plan = make_schedule("easy_to_hard", IDS, difficulty=np.arange(6.0), retain_ids=["r0", "r1"], passes=2)
    plan.save(root / "schedule.parquet")
    graph = Graph(2, 2, 1)
    CircuitTable(IDS, torch.zeros(6, graph.n_edges), graph, {"baseline": "zero"}).save(root / "circuits.safetensors")
    side = torch.tensor([-1, 1, 0, 0, 0, 0])
    AnchorBank(IDS, torch.ones(6, 5), torch.ones(6), side, "g", {}, {"hidden": torch.ones(6, 2)}).save(
        root / "anchors.safetensors"
    )
    torch.save({name: float(row) for row, name in enumerate(IDS)}, root / "published.pt")
    (root / "published.json").write_text(json.dumps({"easy": ["s1"], "hard": ["s2", 3]}))
    (root / "published.txt").write_text("\n".join(IDS))
    return {path.name: path.read_bytes() for path in root.iterdir()}


def load(name: str, path):
    if name.startswith("published"):
        return DifficultyScores.published(path, IDS)
    kinds = {"scores": DifficultyScores, "schedule": Schedule, "circuits": CircuitTable, "anchors": AnchorBank}
    return kinds[name.split(".")[0]].load(path)


NAMES = [
    "scores.parquet",
    "scores.csv",
    "scores.jsonl",
    "schedule.parquet",
    "circuits.safetensors",
    "anchors.safetensors",
    "published.pt",
    "published.json",
    "published.txt",
]


@pytest.mark.parametrize("name", NAMES)
@few()
@given(content=st.data())
def test_loaders(good, tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("load") / f"broken.{name.split('.')[1]}"
    path.write_bytes(damaged(content.draw, good[name]))
    try:
        load(name, path)
    except ValueError as error:
        assert type(error) is ValueError and "broken." in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_and_a_missing_file(tmp_path, name):
    (tmp_path / name).mkdir()
    for path in (tmp_path / name, tmp_path / "missing" / name):
        with pytest.raises(ValueError, match=name):
            load(name, path)


rows_of_scores = st.lists(st.fixed_dictionaries({"sample_id": values, "cud": values}), max_size=3)


@few()
@given(rows=rows_of_scores, kind=st.sampled_from(["lines", "json"]))
def test_wrong_values_in_scores(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("rows") / ("broken.jsonl" if kind == "lines" else "broken.json")
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if kind == "lines" else f"[{','.join(lines)}]")
    try:
        load("scores.jsonl" if kind == "lines" else "published.json", path)
    except ValueError as error:
        assert type(error) is ValueError and "broken." in str(error)


WRONG = [
    "five",
    "[1, 2]",
    "{a: 1}",
    "",
    "2020-01-01",
    "!!binary aGk=",
    "!!python/object:os.system {}",
    ".nan",
    "&a [*a]",
    "*x",
    "'\x00'",
    "true",
    "1.5",
    "-3",
    "{1: 2}",
    "? [a]",
    "!!set {a}",
    "[" * 2000,
    "\u202e😀",
    "'{bad'",
    "1e400",
]


@few(2 * EXAMPLES)
@given(
    command=st.sampled_from(["train", "train", "score", "evaluate", "study"]),
    wrong=st.sampled_from(WRONG),
    draw=st.data(),
)
def test_configurations(world, tmp_path_factory, capsys, command, wrong, draw):
    folder = tmp_path_factory.mktemp("yaml")
    output = folder / "out"
    config: dict = {"forget_dataset": str(world / "forget.jsonl"), "model_name_or_path": str(world / "model")}
    if command in ("train", "score"):
        config |= {
            "passes": 1,
            "difficulty": "none",
            "objective": "ga",
            "objective_args": {},
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "learning_rate": 1e-4,
            "max_length": 64,
        }
    if command == "study":
        config |= {
            "grid": {"seed": [1]},
            "train": {"passes": 1, "difficulty": "none", "objective": "ga", "use_cpu": True, "bf16": False},
            "workers": 1,
            "retain_level": 0.9,
        }
    if command == "evaluate":
        config |= {"generate": False, "n_buckets": 2, "relearn_steps": [1], "quantize": []}
    if command == "score":
        config["metrics"] = ["length"]
    lines = yaml.safe_dump(config, sort_keys=False).splitlines()
    tops = [number for number, line in enumerate(lines) if line[:1].isalpha()]
    number = draw.draw(st.sampled_from(tops))
    how = draw.draw(st.sampled_from(["value", "value", "value", "twice", "unknown", "bytes"]))
    if how == "value":
        lines[number] = f"{lines[number].split(':')[0]}: {wrong}"
    elif how == "twice":
        lines.append(lines[number])
    elif how == "unknown":
        lines.append(f"no_such_option: {wrong}")
    path = folder / "config.yaml"
    path.write_bytes("\n".join(lines).encode() + (b"\n# \xff" if how == "bytes" else b""))
    place = ["--output", str(output)] if command == "score" else ["--output_dir", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.study.pool.Worker.run", lambda *a: "not run here")
        patch.chdir(folder)
        checked(capsys, [command, "--config", str(path), *place], output, (0, 1, 2) if command == "study" else (0, 2))
    if how != "value":
        assert not output.exists()


@pytest.mark.parametrize("command", ["train", "score", "evaluate", "study"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "cannot read the configuration ''"),
        (["--config", "missing.yaml"], "cannot read the configuration 'missing.yaml': No such file"),
        (["--config=."], "cannot read the configuration '.': Is a directory"),
        (["--no_such_option", "5"], "unknown option '--no_such_option'"),
        (["stray"], "stray 'stray'"),
        (["--max_forget_samples", "many"], "argument --max_forget_samples"),
        (["--forget_dataset", "a\0b"], "forget dataset"),
    ],
)
def test_options(world, tmp_path, monkeypatch, capsys, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    grid = ["--grid", '{"seed": [1]}'] if command == "study" else []
    assert main([command, "--model_name_or_path", str(world / "model"), *grid, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not list(tmp_path.iterdir())


def test_mappings_on_the_command_line(world, tmp_path, capsys):
    from cud_trainer.commands.parser import parse_options
    from evaluation.study.options import StudyArguments

    (found,) = parse_options((StudyArguments,), ["--grid", '{"seed": [1, 2]}', "--train", '{"passes": 2}'], "cud study")
    assert found.grid == {"seed": [1, 2]} and found.train == {"passes": 2}
    with pytest.raises(ValueError, match="argument --grid: not a JSON object"):
        parse_options((StudyArguments,), ["--grid", "[1]"], "cud study")


def test_a_single_value_stands_for_a_list_of_one(tmp_path):
    from cud_trainer.commands.options import ScoreArguments
    from cud_trainer.commands.parser import parse_options

    (tmp_path / "c.yaml").write_text("metrics: loss\n")
    assert parse_options((ScoreArguments,), ["--config", str(tmp_path / "c.yaml")], "cud score")[0].metrics == ["loss"]


@few(4 * EXAMPLES)
@given(seed=st.integers(0, 10**6))
def test_models_that_are_damaged(world, tmp_path_factory, capsys, seed):
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("model")
    for path in (world / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = draw.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    command = [
        "score",
        "--model_name_or_path",
        str(folder),
        "--forget_dataset",
        str(world / "forget.jsonl"),
        "--metrics",
        "length",
        "--bf16",
        "false",
        "--use_cpu",
        "--output",
        str(folder / "out.parquet"),
    ]
    checked(capsys, command, folder / "out.parquet")
