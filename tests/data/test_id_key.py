"""Ids that cannot be found by trying, for who has no key: hashes in memory, keyed in every file."""

import hashlib
import hmac
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from builders import make_tokenizer, qa_dataset

from cud_trainer import DifficultyScores
from cud_trainer.data import prepare_dataset
from cud_trainer.data.ids import KEY_FILE, IdKey, key_for, use_id_key, without_hashes
from cud_trainer.difficulty import AnchorBank
from cud_trainer.schedule import Schedule


@pytest.fixture(autouse=True)
def without_a_key():
    use_id_key(None)
    yield
    use_id_key(None)


def ids(size=3):
    return list(prepare_dataset(qa_dataset(size), make_tokenizer())["sample_id"])


def scores(size=3):
    return DifficultyScores(ids(size), {"loss": np.arange(size) / 2})


def test_a_hash_in_memory_is_an_id_of_the_key_in_a_file(tmp_path):
    row = prepare_dataset(qa_dataset(3), make_tokenizer())[0]
    content = f"{row['labels'].count(-100)}|{row['input_ids']}".encode()
    assert ids()[0] == "sha256:" + hashlib.sha256(content).hexdigest()[:16]
    path = scores().save(tmp_path / "scores.parquet")
    key = tmp_path / KEY_FILE
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 64
    expected = "hmac:" + hmac.new(key.read_bytes(), ids()[0].encode(), hashlib.sha256).hexdigest()[:16]
    assert pd.read_parquet(path)["sample_id"][0] == expected == DifficultyScores.load(path).ids[0]
    assert DifficultyScores.load(path).aligned(ids()).ids == ids()
    assert sorted(os.listdir(tmp_path)) == [KEY_FILE, "scores.parquet"]


def test_a_folder_has_one_key_and_another_folder_another(tmp_path):
    first = pd.read_parquet(scores().save(tmp_path / "a" / "1.parquet"))["sample_id"].tolist()
    again = pd.read_csv(scores().save(tmp_path / "a" / "2.csv"))["sample_id"].tolist()
    other = pd.read_parquet(scores().save(tmp_path / "b" / "1.parquet"))["sample_id"].tolist()
    assert first == again and not set(first) & set(other)


def test_scores_that_were_read_take_their_key_along(tmp_path):
    loaded = DifficultyScores.load(scores().save(tmp_path / "a" / "s.parquet"))
    there = loaded.save(tmp_path / "b" / "s.parquet")
    assert DifficultyScores.load(there).aligned(ids()).ids == ids()
    scores().save(tmp_path / "c" / "s.parquet")
    with pytest.raises(ValueError, match="is another key; choose another folder"):
        loaded.save(tmp_path / "c" / "t.parquet")
    loaded.aligned(ids()).save(tmp_path / "c" / "t.parquet")  # of these the contents are known
    assert DifficultyScores.load(tmp_path / "c" / "t.parquet").aligned(ids()).ids == ids()


def test_a_missing_key_is_named(tmp_path):
    path = scores().save(tmp_path / "a" / "s.parquet")
    shutil.move(tmp_path / "a" / KEY_FILE, tmp_path / "key")
    for wanted in (ids(), ids()[:1]):
        with pytest.raises(
            ValueError, match=r"the key that the ids of the difficulty scores .* id_key, or .* ids\.key"
        ):
            DifficultyScores.load(path).aligned(wanted)
    use_id_key(tmp_path / "key")
    assert DifficultyScores.load(path).aligned(ids()).ids == ids()
    use_id_key(tmp_path / "another")
    with pytest.raises(ValueError, match="made for another dataset, or with another id_key"):
        DifficultyScores.load(path).aligned(ids())


def test_a_given_key_stays_where_it_is(tmp_path):
    use_id_key(tmp_path / "keys" / "a")
    scores().save(tmp_path / "x" / "s.parquet")
    assert os.listdir(tmp_path / "x") == ["s.parquet"] and os.listdir(tmp_path / "keys") == ["a"]
    assert (tmp_path / "keys" / "a").stat().st_mode & 0o777 == 0o600


def test_ids_of_a_column_stay_and_need_no_key(tmp_path):
    rows = qa_dataset(3).add_column("id", ["a", "0123456789abcdef", "c"])
    own = list(prepare_dataset(rows, make_tokenizer())["sample_id"])
    path = DifficultyScores(own, {"loss": np.zeros(3)}).save(tmp_path / "s.parquet")
    assert pd.read_parquet(path)["sample_id"].tolist() == ["a", "0123456789abcdef", "c"] == own
    assert os.listdir(tmp_path) == ["s.parquet"]


def test_a_schedule_and_its_hash_are_keyed(tmp_path):
    schedule = Schedule("uniform", np.array(ids()), np.ones(3), np.array(ids()[::-1]))
    loaded = Schedule.load(schedule.save(tmp_path / "s.parquet"))
    key = key_for(tmp_path)
    assert loaded.hash == schedule.keyed(key).hash != schedule.hash
    assert loaded.order.tolist() == [key.keyed(name) for name in ids()]
    assert loaded.retain_id.tolist() == loaded.order.tolist()[::-1]


def test_no_sample_of_a_bank_scores_itself(tmp_path):
    bank = AnchorBank(ids(4), torch.ones(4, 2), torch.ones(4), torch.tensor([-1, 1, -1, 1]), "g", {})
    loaded = AnchorBank.load(bank.save(tmp_path / "bank.safetensors"))
    assert not set(loaded.ids) & set(ids(4))
    assert loaded.without(set(ids(4)[:2])).tolist() == [2, 3]
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(ValueError, match="the key that the ids of the anchor bank .* is missing"):
        AnchorBank.load(tmp_path / "bank.safetensors").without(set(ids(4)[:2]))


def test_an_error_for_others_to_read_holds_no_hash(tmp_path):
    said = f"sample {ids()[0]!r} is broken"
    assert without_hashes(said) == "sample '(without an id)' is broken"
    key = key_for(tmp_path)
    assert without_hashes(said) == f"sample {key.keyed(ids()[0])!r} is broken"


@pytest.mark.parametrize("content", [b"", b"short\n"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match="holds no key: a key has at least 16 bytes"):
        use_id_key(tmp_path / "key")
    with pytest.raises(ValueError, match="cannot read id_key"):
        use_id_key(tmp_path)
    with pytest.raises(ValueError, match="cannot read id_key"):
        IdKey.read(tmp_path / "none")
