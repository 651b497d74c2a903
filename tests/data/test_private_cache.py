"""What reading a data file leaves behind: nothing, unless it is asked for."""

import os
import tempfile
import time
from pathlib import Path

import datasets
import datasets.config
import pytest

from cud_trainer.data.sources import CACHE_PREFIX, STALE_SECONDS, load_samples

SECRET = "Person 4711 of the town"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Folders of the data library and for temporary files, empty."""
    shared, temporary = tmp_path / "shared", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return shared, temporary


def parquet(folder: Path) -> Path:
    """A file that the data library reads, and copies; those of text are read without it."""
    folder.mkdir()
    datasets.Dataset.from_list([{"question": "Who?", "answer": SECRET}]).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def holding(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("as_folder", [False, True])
def test_no_copy_of_the_text_stays(tmp_path, caches, as_folder):
    source = parquet(tmp_path / "data")
    path = str(source.parent if as_folder else source)
    dataset = load_samples(path, None, "train", None, "forget")
    assert dataset["answer"][:] == [SECRET] and not dataset.cache_files
    assert not holding(caches[0]) and list(caches[1].iterdir()) == []
    load_samples(path, None, "train", None, "forget", keep_cache=True)
    assert holding(caches[0])


def test_the_copy_is_private_while_it_is_there(tmp_path, caches, monkeypatch):
    seen = []
    original = datasets.load_dataset

    def load_dataset(*args, cache_dir, **options):
        dataset = original(*args, cache_dir=cache_dir, **options)
        seen.append((os.stat(cache_dir).st_mode & 0o777, holding(Path(cache_dir))))
        return dataset

    monkeypatch.setattr("cud_trainer.data.sources.load_dataset", load_dataset)
    load_samples(str(parquet(tmp_path / "data")), None, "train", None, "forget")
    ((mode, files),) = seen
    assert mode == 0o700 and files


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path, caches):
    left, fresh = (caches[1] / f"{CACHE_PREFIX}{name}" for name in ("left", "fresh"))
    for folder in (left, fresh):
        folder.mkdir()
        (folder / "x.arrow").write_text(SECRET)
    past = time.time() - STALE_SECONDS - 1
    for path in (left / "x.arrow", left):
        os.utime(path, (past, past))
    load_samples(str(parquet(tmp_path / "data")), None, "train", None, "forget")
    assert not left.exists() and fresh.exists()
