"""An output directory has one owner, an overwritten run leaves nothing, and a refused command is as if it had not been."""

import json
import os
import shutil

import pytest
from builders import make_tokenizer, qa_dataset
from command_lines import data, make_world, train
from filelock import FileLock
from huggingface_hub.utils import filter_repo_objects

from cud_trainer.cli import COMMANDS, main
from cud_trainer.files import LOCK
from cud_trainer.ownership import clear, owned
from cud_trainer.training.checkpoints import NEVER_UPLOADED, last_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refusal(capsys, command, code=2) -> str:
    capsys.readouterr()
    assert main(command) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def evaluate(world, output, *extra) -> list[str]:
    return ["evaluate", *data(world), "--output_dir", str(output), "--generate", "false", *extra]


def score(world, output, *extra) -> list[str]:
    return ["score", *data(world), "--output", str(output), "--metrics", "loss", "--bf16", "false", "--use_cpu", "true",
            *extra]  # fmt: skip


def command_of(name, world, output):
    """A command line, and the folder that it locks."""
    study = ["study", *data(world), "--grid", '{"schedule": ["uniform"]}', "--train", '{"difficulty": "none"}']
    return {
        "train": (train(world, output), output),
        "evaluate": (evaluate(world, output), output),
        "score": (score(world, output / "s.parquet"), output / "s.parquet.work"),
        "study": ([*study, "--output_dir", str(output)], output),
        "import": (["import", "--open_unlearning", str(world / "forget.jsonl"), "--output_dir", str(output)], output),
        "demo": (["demo", "--output_dir", str(output)], output),
    }[name]


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"list"}))
def test_a_second_command_is_refused(world, tmp_path, capsys, name):
    command, folder = command_of(name, world, tmp_path / "out")
    folder.mkdir(parents=True)
    with FileLock(folder / LOCK):  # another's: not that of `owned`
        before = names(tmp_path)
        assert "is running in" in refusal(capsys, command)
        assert names(tmp_path) == before


class TestOwned:
    def test_it_may_be_taken_again_by_its_owner_and_nothing_stays(self, tmp_path):
        with owned(tmp_path / "a" / "b") as folder, owned(folder), owned(folder):
            assert (folder / LOCK).exists()
        assert not list(tmp_path.iterdir())

    def test_what_was_there_stays(self, tmp_path):
        (tmp_path / "mine").write_text("x")
        (tmp_path / LOCK).write_text("")  # of a process that was killed
        with owned(tmp_path):
            pass
        assert names(tmp_path) == {"mine"}

    def test_what_cannot_be_written(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
        (tmp_path / "file").write_text("x")
        for name in ("link", "file", "file/below"):
            with pytest.raises(ValueError, match="cannot write into output directory"), owned(tmp_path / name):
                pass

    def test_clearing_follows_no_link(self, tmp_path):
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "file").write_text("x")
        (tmp_path / "plots").symlink_to(tmp_path / "kept")
        clear(tmp_path, ["plots", "none*"])
        assert names(tmp_path) == {"kept", "kept/file"}


@pytest.mark.parametrize("place", ["", "checkpoint-4/", "a/b/"])
def test_leftovers_of_kills_are_not_uploaded(place):
    left = [f"{place}.model.7.tmp/model.safetensors", f"{place}.model.safetensors.7.tmp", f"{place}.lock"]
    assert not list(filter_repo_objects(left, ignore_patterns=list(NEVER_UPLOADED)))
    kept = [f"{place}model.safetensors", f"{place}config.json"]
    assert list(filter_repo_objects(kept, ignore_patterns=list(NEVER_UPLOADED))) == kept


def test_an_overwritten_run_leaves_nothing(world, tmp_path, capsys, monkeypatch):
    """Full weights, checkpoints and scores; then an adapter without scores that is stopped before its first write."""
    output = tmp_path / "out"
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--difficulty", "loss"]
    assert main(train(world, output, *steps)) == 0
    assert last_checkpoint(output) and (output / "model.safetensors").exists()
    (output / ".model.7.tmp").mkdir()
    (output / "checkpoint-2" / ".cud_state.json.7.tmp").write_text("{")
    (output / "notes.txt").write_text("mine")
    old = (output / "model.safetensors").read_bytes()
    other = train(
        world,
        output,
        "--overwrite",
        "true",
        "--difficulty",
        "none",
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    )
    for wrong in (["--objective", "nope"], ["--max_length", "5"], ["--forget_dataset", "none.jsonl"]):
        refusal(capsys, [*other, *wrong])
        assert (output / "model.safetensors").read_bytes() == old and last_checkpoint(output)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cud_trainer.trainer.run_reference", stop)
        assert main(other) == 130
    assert names(output) == {"notes.txt"}
    assert "no complete checkpoint" in refusal(
        capsys, [*other[: other.index("--overwrite")], "--resume_from_checkpoint", "true"]
    )
    assert main(other) == 0
    assert (output / "adapter_config.json").exists() and (output / "notes.txt").exists()
    assert not {"model.safetensors", "difficulty.parquet", "config.json"} & names(output)
    assert not list(output.glob("checkpoint-*")) and not list(output.rglob("*.tmp")) and not (output / LOCK).exists()


def test_an_overwritten_report_leaves_nothing(world, tmp_path, monkeypatch):
    output = tmp_path / "report"
    assert main(evaluate(world, output)) == 0

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.commands.evaluate.measure_models", stop)
    assert main(evaluate(world, output, "--overwrite", "true")) == 130
    assert {name for name in names(output) if not name.startswith("evaluation.work")} == {"ids.key"}  # it stays


def test_leftovers_go_at_the_next_start(world, tmp_path):
    output = tmp_path / "out"
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--difficulty", "loss"]
    assert main(train(world, output, *steps)) == 0
    straight = (output / "model.safetensors").read_bytes()
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-9")
    (output / "checkpoint-9" / "cud_state.json").unlink()  # cut short
    shutil.rmtree(output / "checkpoint-4")
    (output / "checkpoint-2" / ".model.7.tmp").mkdir()
    (output / "difficulty.work").mkdir()
    (output / "difficulty.work" / "run.json").write_text("{}")
    assert main([*train(world, output, *steps), "--resume_from_checkpoint", "true"]) == 0
    assert (output / "model.safetensors").read_bytes() == straight
    assert not list(output.rglob("*.tmp")) and not {"checkpoint-9", "difficulty.work"} & names(output)


def test_inputs_are_never_written_to(world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    place = ["--model_name_or_path", str(model)]
    for command in (train(world, model), evaluate(world, model), command_of("study", world, model)[0]):
        assert "model_name_or_path" in refusal(capsys, [*command, *place, "--overwrite", "true"])
    assert "original_model" in refusal(
        capsys, [*evaluate(world, model), "--original_model", str(model), "--overwrite", "true"]
    )
    for name in ("model.safetensors", "config.json"):
        line = refusal(capsys, score(world, model / name, *place, "--overwrite", "true"))
        assert "would replace what model_name_or_path reads" in line
    data_file = shutil.copy(world / "forget.jsonl", tmp_path)
    line = refusal(capsys, score(world, data_file, "--forget_dataset", str(data_file), "--overwrite", "true"))
    assert "would replace what forget_dataset reads" in line
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    output = tmp_path / "out"
    assert main(train(world, output, "--difficulty", "loss")) == 0
    again = train(world, output, "--overwrite", "true", "--difficulty_scores", str(output / "difficulty.parquet"))
    assert "overwrite would delete it" in refusal(capsys, [*again, "--difficulty", "loss"])
    assert (output / "difficulty.parquet").exists()


def test_the_model_of_a_trainer_is_never_written_to(world):
    from runs import config
    from transformers import AutoModelForCausalLM

    from cud_trainer import CUDTrainer

    for model in (str(world / "model"), AutoModelForCausalLM.from_pretrained(world / "model")):
        with pytest.raises(ValueError, match="the model's folder"):
            CUDTrainer(model, config(world / "model", overwrite=True), forget_dataset=qa_dataset(9),
                       retain_dataset=qa_dataset(7, 100), processing_class=make_tokenizer())  # fmt: skip


def test_overwrite_and_resume_contradict_each_other(world, tmp_path, capsys):
    command = train(world, tmp_path / "out", "--overwrite", "true", "--resume_from_checkpoint", "true")
    assert "overwrite deletes the checkpoints" in refusal(capsys, command)
    assert not (tmp_path / "out").exists()


class TestRefusedThenCorrected:
    def test_score(self, world, tmp_path, capsys):
        output = tmp_path / "s.parquet"
        command = score(world, output)
        command[command.index("--metrics") + 1] = "grad_alignment"
        without = command.copy()
        del without[without.index("--retain_dataset") : without.index("--retain_dataset") + 2]
        assert "retain" in refusal(capsys, without)
        assert not names(tmp_path)
        assert main(command) == 0
        assert names(tmp_path) == {"s.parquet", "ids.key"}

    def test_a_calibration_that_diverges(self, world, tmp_path, capsys):
        command = score(world, tmp_path / "s.parquet", "--folds", "3")
        command[command.index("--metrics") + 1] = "cud"
        assert "calibration run diverged" in refusal(capsys, [*command, "--learning_rate", "1e20"], code=4)
        assert not names(tmp_path)
        assert main([*command, "--learning_rate", "1e-3"]) == 0

    def test_train(self, world, tmp_path, capsys, monkeypatch):
        """Whatever is found late takes the scores with it that the corrected run could not use."""
        output = tmp_path / "out"

        def late(*args, **kwargs):
            raise ValueError("found late")

        with monkeypatch.context() as patch:
            patch.setattr("cud_trainer.trainer.run_reference", late)
            refusal(capsys, train(world, output, "--difficulty", "loss", "--seed", "1"))
        assert not output.exists()
        assert main(train(world, output, "--difficulty", "loss", "--seed", "2")) == 0


def test_circuits_outlive_the_work(world, tmp_path, capsys):
    command = score(world, tmp_path / "s.parquet", "--save_circuits", str(tmp_path / "work" / "c.safetensors"))
    assert "lies in work_dir" in refusal(capsys, [*command, "--work_dir", str(tmp_path / "work")])
    command = score(world, tmp_path / "same", "--save_circuits", str(tmp_path / "same"))
    assert "are the same file" in refusal(capsys, command)
    assert not names(tmp_path)


class TestExitCodes:
    def test_divergence(self, world, tmp_path, capsys):
        """The last checkpoint, which is good, stays."""
        command = train(
            world, tmp_path / "out", "--difficulty", "none", "--max_retain_loss", "0.1", "--save_steps", "1"
        )
        line = refusal(capsys, command, code=4)
        assert line.startswith("cud train: error: training diverged: the retain loss is") and "np." not in line
        assert not (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (ValueError("wrong"), 2, "error: wrong"),
            (ImportError("no package"), 2, "error: no package"),
            (OSError(28, "No space left on device"), 2, "error: [Errno 28]"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (KeyError("x"), 1, "error: KeyError: 'x' (a fault of cud: CUD_TRACEBACK=1 shows where)"),
        ],
    )
    def test_of_errors(self, monkeypatch, capsys, error, code, text):
        def fail(argv):
            raise error

        monkeypatch.setattr("evaluation.demo.main", fail)
        assert main(["demo"]) == code
        captured = capsys.readouterr().err
        assert captured.count("\n") == 1 and text in captured
        if code != 130:
            monkeypatch.setenv("CUD_TRACEBACK", "1")
            with pytest.raises(type(error)):
                main(["demo"])

    def test_they_are_in_the_help(self, capsys):
        main(["--help"])
        shown = capsys.readouterr().out
        assert all(f"{code} " in shown.split("exit codes:")[1] for code in (0, 1, 2, 3, 4, 130))


def test_a_killed_overwrite_goes_on_as_if_alone(world, tmp_path):
    """Kill at any write of the second run: what is resumed then is the second run, to the bit."""
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--difficulty", "loss", "--learning_rate"]
    assert main(train(world, tmp_path / "alone", *steps, "1e-4")) == 0
    straight = (tmp_path / "alone" / "model.safetensors").read_bytes()
    for moment in (1, 6, 20):
        output = tmp_path / f"out {moment}"
        assert main(train(world, output, *steps, "1e-2")) == 0
        replace, count = os.replace, [0]

        def limited(source, target, *rest, count=count, moment=moment, replace=replace, **options):
            count[0] += 1
            if count[0] >= moment:
                raise KeyboardInterrupt
            return replace(source, target, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", limited)
            assert main(train(world, output, *steps, "1e-4", "--overwrite", "true")) == 130
        resume = ["--resume_from_checkpoint", "true"] if last_checkpoint(output) else []
        assert main(train(world, output, *steps, "1e-4", *resume)) == 0
        assert (output / "model.safetensors").read_bytes() == straight
        state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["global_step"] == 4
