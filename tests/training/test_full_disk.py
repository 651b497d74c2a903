"""No room on the disk: one line that names the file, nothing half written, and the same command goes on afterwards."""

import errno
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from command_lines import data, train
from runs import make_trainer
from studies import config, results

from cud_trainer.cli import main
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import DiskFullError, atomic_write, full_disk_named, write_json
from cud_trainer.training.checkpoints import STATE_FILE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    forget = qa_dataset(9)
    forget.add_column("author", [f"author {i % 4}" for i in range(9)]).to_json(root / "forget.jsonl")
    qa_dataset(7, 100).to_json(root / "retain.jsonl")
    return root


@pytest.fixture
def disk(tmp_path):
    """A disk of one megabyte that `filled` takes nearly all of."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk free."""
    state = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * max(0, state.f_bavail * state.f_frsize - leave))
    return ballast


def refused(capsys, command) -> str:
    """The one error line of a command that found the disk full."""
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(f"cud {command[0]}: error: the disk is full: cannot write "), lines
    return lines[0]


def score(world, folder, *extra) -> list[str]:
    return [
        "score",
        *data(world),
        "--output",
        str(folder / "scores.parquet"),
        "--metrics",
        "loss",
        "grad_norm",
        "--bf16",
        "false",
        "--use_cpu",
        "true",
        *extra,
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "ballast"
    }


class TestSimulated:
    """Everywhere: the third write of a command finds no room, whichever it is."""

    @pytest.mark.parametrize("allowed", [0, 1])
    def test_score(self, world, tmp_path, monkeypatch, capsys, allowed):
        command = score(world, tmp_path / "out")
        count = full_after(monkeypatch, allowed)
        refused(capsys, command)
        assert not (tmp_path / "out" / "scores.parquet").exists() and count[0] > allowed
        monkeypatch.undo()
        assert main(command) == 0
        assert len(DifficultyScores.load(tmp_path / "out" / "scores.parquet")) == 9
        assert set(files(tmp_path / "out")) == {"scores.parquet", "ids.key"}  # no work left, no temporary file

    def test_what_was_there_stays(self, tmp_path, monkeypatch):
        path = write_json(tmp_path / "a.json", {"a": 1})
        before = path.read_bytes()
        full_after(monkeypatch, 0)
        with pytest.raises(DiskFullError, match=r"the disk is full: cannot write .*a\.json"):
            write_json(path, {"a": 2})
        assert files(tmp_path) == {"a.json": before}

    def test_a_model_is_saved_whole_or_not_at_all(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path / "out", save_strategy="no")
        trainer.save_model(str(tmp_path / "model"))
        before = files(tmp_path / "model")
        save = type(trainer.model).save_pretrained

        def half(model, folder, **options):
            save(model, folder, **options)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(type(trainer.model), "save_pretrained", half)
        with pytest.raises(DiskFullError):
            trainer.save_model(str(tmp_path / "model"))
        assert files(tmp_path / "model") == before
        monkeypatch.undo()
        (tmp_path / "model" / "model-00001-of-00002.safetensors").write_bytes(b"of a save in other pieces")
        trainer.save_model(str(tmp_path / "model"))
        assert files(tmp_path / "model").keys() == before.keys()

    @pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "Disk quota exceeded"])
    def test_errors_of_libraries(self, tmp_path, text):
        with pytest.raises(DiskFullError, match="cannot write x"), full_disk_named("x"):
            raise RuntimeError(text)
        with pytest.raises(RuntimeError, match="a bug"), full_disk_named("x"):
            raise RuntimeError("a bug")

        def cut_short(path):
            path.write_text("half")
            raise OSError(errno.EIO, "broken")

        with pytest.raises(OSError, match="broken"):
            atomic_write(tmp_path / "a", cut_short)
        assert not list(tmp_path.iterdir())


def full_after(monkeypatch, allowed: int) -> list[int]:
    """Let `os.replace` of temporary files fail for want of room after so many of them; returns a counter."""
    count, replace = [0], os.replace

    def limited(source, target, *rest, **options):
        if str(source).endswith(".tmp"):
            count[0] += 1
            if count[0] > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target, *rest, **options)

    monkeypatch.setattr(os, "replace", limited)
    return count


def test_score_on_a_full_disk(world, disk, capsys):
    command = score(world, disk)
    ballast = fill(disk, 12_000)
    line = refused(capsys, command)
    assert str(disk) in line and not (disk / "scores.parquet").exists()
    ballast.unlink()
    assert main(command) == 0
    assert set(files(disk)) == {"scores.parquet", "ids.key"}
    kept = files(disk)
    ballast = fill(disk, 0)
    refused(capsys, [*command, "--overwrite", "true"])
    assert files(disk)["scores.parquet"] == kept["scores.parquet"]


@pytest.mark.parametrize("leave", [0, 24_000, 80_000, 220_000])
def test_train_on_a_full_disk(world, disk, capsys, leave):
    """At the scores, in the first checkpoint, in a later one or at the end; then the same command ends well."""
    output = disk / "out"
    command = train(world, output, "--difficulty", "loss", "--save_steps", "2", "--learning_rate", "1e-3")
    command[command.index("--save_strategy") + 1] = "steps"
    ballast = fill(disk, leave)
    refused(capsys, command)
    for checkpoint in output.glob("checkpoint-*"):
        assert (checkpoint / STATE_FILE).exists() and (checkpoint / "optimizer.pt").exists()
    assert not (output / "model.safetensors").exists()
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]
    ballast.unlink()
    resume = ["--resume_from_checkpoint", "true"] if list(output.glob("checkpoint-*")) else []
    assert main([*command, "--save_total_limit", "1", *resume]) == 0
    assert (output / "model.safetensors").exists()


def test_evaluate_on_a_full_disk(world, disk, capsys):
    command = ["evaluate", *data(world), "--output_dir", str(disk / "report"), "--generate", "false"]
    ballast = fill(disk, 8_000)
    refused(capsys, command)
    assert not (disk / "report" / "report.html").exists()
    ballast.unlink()
    assert main([*command, "--overwrite", "true"]) == 0
    assert (disk / "report" / "report.html").exists()


def test_study_on_a_full_disk(world, disk, capsys):
    command = config(
        world,
        disk / "out",
        grid={"schedule": ["uniform"]},
        train={
            "objective": "ga",
            "passes": 1,
            "difficulty": "none",
            "per_device_train_batch_size": 9,
            "bf16": False,
            "use_cpu": True,
        },
    )
    ballast = fill(disk, 12_000)
    assert main(command) in (1, 2)
    error = capsys.readouterr().err
    assert "the disk is full: cannot write" in error and str(disk) in error and "Traceback" not in error
    assert not list((disk / "out").rglob("result.json"))
    ballast.unlink()
    assert main(command) == 0
    assert results(disk / "out")["matched"] and len(pd.read_parquet(disk / "out" / "per_sample.parquet")) == 9
