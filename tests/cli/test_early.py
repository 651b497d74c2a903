"""Names and files are refused before torch is imported, with the words of whoever would refuse them later."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from builders import PYTHONPATH

from cud_trainer.commands import early, names
from cud_trainer.commands.imports import registries
from cud_trainer.commands.options import READ
from cud_trainer.data import readers, sources

STUDY = {"grid": {"schedule": ["uniform"]}, "arms": {"a": {"difficulty": "oracle"}}, "train": {"objective": "npo"}}


def kinds():
    return {registry.kind: registry for registry in registries().values()}


def of_this_project(entry):
    """Whether a registered function is not one that a test, or a user, has added."""
    functions = [getattr(entry, name, None) for name in ("loss", "compute", "function")]
    return any(function.__module__.startswith("cud_trainer.") for function in functions if function)


@pytest.mark.parametrize("kind", names.SOURCES)
def test_the_source_names_what_the_registry_has(kind):
    registered = kinds()[kind]
    own = {name for name, entry in registered.items() if of_this_project(entry)}
    assert set(names.registered(kind)) == own and own
    with pytest.raises(ValueError) as early_said:
        names.find(kind, "none")
    with pytest.raises(ValueError) as said:
        type(registered)(kind, registered.hint).find("none")
    choices = re.compile(r"\[.*\]")
    assert choices.sub("", str(early_said.value)) == choices.sub("", str(said.value))


@pytest.mark.parametrize("source", ["x.jsonl", "./x", "~/x", "/x", "x", "a/b", "x*", "x.foo", "x.jsonl.gz"])
def test_a_missing_file_is_what_the_reader_calls_one(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: [])
    assert set(early.DATA_SUFFIXES) == {*readers.SUFFIXES, ".gz"}
    if early.is_missing(source):
        with pytest.raises(ValueError, match="does not exist"):
            sources.load_samples(source, None, "train", None, "forget")
    elif "*" not in source:
        sources.load_samples(source, None, "train", None, "forget")


def test_every_option_that_names_what_is_read_is_looked_at():
    """A recipe is read at once, with the same words as a configuration."""
    assert set(early.FILES) == READ - {"recipe"}


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("train", ["--objective", "nope"], "unknown objective 'nope'"),
        ("train", ["--objective=nope"], "unknown objective 'nope'"),
        ("train", ["--step", "nope"], "unknown step 'nope'"),
        ("train", ["--schedule", "odds+nope"], "unknown schedule 'nope'"),
        ("train", ["--difficulty", "nope"], "unknown difficulty metric 'nope'"),
        ("train", ["--difficulty", "oracle"], "unknown difficulty metric 'oracle'"),
        ("score", ["--metrics", "loss", "nope"], "unknown difficulty metric 'nope'"),
        ("train", ["--forget_dataset", "nope.jsonl"], "forget dataset nope.jsonl does not exist"),
        ("train", ["--retain-dataset", "./nope"], "retain dataset ./nope does not exist"),
        ("train", ["--model_name_or_path", "./nope"], "model_name_or_path: there is no ./nope"),
        ("train", ["--difficulty_scores", "nope.parquet"], "cannot read difficulty scores from nope.parquet"),
        ("evaluate", ["--circuits", "nope.safetensors"], "cannot read circuits from nope.safetensors"),
        ("score", ["--anchor_bank", "nope.safetensors"], "cannot read an anchor bank from nope.safetensors"),
        ("evaluate", ["--retain_difficulty_scores", "nope.parquet"], "cannot read difficulty scores from nope.parquet"),
        ("evaluate", ["--nli_model", "./nope"], "nli_model: there is no ./nope"),
        ("evaluate", ["--lm_eval_include", "./nope"], "lm_eval_include: there is no ./nope"),
        ("import", ["--open_unlearning", "nope.json"], "cannot read nope.json"),
        ("study", ["--grid", '{"schedule": ["nope"]}'], "unknown schedule 'nope'"),
        ("train", ["--config", "nope.yaml"], "cannot read the configuration 'nope.yaml'"),
        ("train", {"objective": "nope"}, "unknown objective 'nope'"),
        ("study", {**STUDY, "grid": [{"objective": ["nope"]}]}, "unknown objective 'nope'"),
        ("study", {**STUDY, "arms": {"a": {"schedule": "nope"}}}, "unknown schedule 'nope'"),
        ("study", {**STUDY, "arms": {}, "train": {"difficulty": "nope"}}, "unknown difficulty metric 'nope'"),
        ("study", {**STUDY, "train": {"difficulty_scores": "nope.parquet"}}, "cannot read difficulty scores"),
    ],
)
def test_refused(tmp_path, monkeypatch, command, argv, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(argv, dict):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(argv))
        argv = ["--config", "c.yaml"]
    with pytest.raises(ValueError, match=re.escape(message)):
        early.check_early(command, argv)


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("train", ["--objective", "nope", "--import", "mine.py"]),  # it may register that
        ("train", ["--objective", "nope", "--objective", "npo"]),
        ("train", ["--difficulty", "none", "--forget_dataset", "org/data", "--model_name_or_path", "org/model"]),
        ("train", ["--difficulty", "given", "--forget_dataset", "docs/*.txt", "--schedule", "odds + per_sample_stop"]),
        ("study", ["--grid", json.dumps(STUDY["grid"]), "--arms", json.dumps(STUDY["arms"]), "--train", "x"]),
        ("evaluate", ["--metric", "mine"]),  # a column of the scores
        ("train", ["--objective"]),
        ("train", []),
    ],
)
def test_what_may_be_right_is_left_to_others(command, argv):
    early.check_early(command, argv)


def test_a_study_may_have_the_better_name_in_an_arm(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: nope\n")
    study = {**STUDY, "train": {}, "recipe": str(recipe)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match="unknown objective 'nope'"):
        early.check_early("study", ["--config", str(tmp_path / "c.yaml")])
    study["arms"] = {"a": {"objective": "npo"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(study))
    early.check_early("study", ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.subprocess
def test_nothing_slow_is_imported_first(tmp_path):
    code = (
        "import sys; from cud_trainer.cli import main\n"
        "assert main(['train', '--objective', 'nope']) == 2\n"
        "assert main(['score', '--metrics', 'nope']) == 2\n"
        "assert main(['train', '--forget_dataset', 'nope.jsonl']) == 2\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path, env=environment)
