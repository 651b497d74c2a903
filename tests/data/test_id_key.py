"""Ids that cannot be found by trying, for who has no key."""

import hashlib
import hmac
import json

import pytest
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.data import prepare_dataset
from cud_trainer.data.columns import use_id_key


@pytest.fixture(autouse=True)
def without_a_key():
    yield
    use_id_key(None)


def ids():
    return list(prepare_dataset(qa_dataset(3), make_tokenizer())["sample_id"])


def test_ids_are_those_of_the_key(tmp_path):
    plain = ids()
    use_id_key(tmp_path / "keys" / "a")
    keyed = ids()
    assert not set(plain) & set(keyed) and (tmp_path / "keys" / "a").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["a"]
    row = prepare_dataset(qa_dataset(3), make_tokenizer())[0]
    content = f"{row['labels'].count(-100)}|{row['input_ids']}".encode()
    key = (tmp_path / "keys" / "a").read_bytes()
    assert keyed[0] == hmac.new(key, content, hashlib.sha256).hexdigest()[:16]
    assert plain[0] == hashlib.sha256(content).hexdigest()[:16]
    use_id_key(tmp_path / "b")
    assert not set(ids()) & set(keyed)
    use_id_key(tmp_path / "keys" / "a")
    assert ids() == keyed
    use_id_key(None)
    assert ids() == plain


def test_ids_of_a_column_stay(tmp_path):
    use_id_key(tmp_path / "key")
    rows = qa_dataset(3).add_column("id", ["a", "b", "c"])
    assert list(prepare_dataset(rows, make_tokenizer())["sample_id"]) == ["a", "b", "c"]


@pytest.mark.parametrize("content", [b"", b"short\n"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match="holds no key: a key has at least 16 bytes"):
        use_id_key(tmp_path / "key")
    with pytest.raises(ValueError, match="cannot read id_key"):
        use_id_key(tmp_path)


@pytest.mark.slow
def test_commands_share_a_key(tmp_path, capsys):
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_dataset(5)))
    data = ["--model_name_or_path", f"{tmp_path}/model", "--forget_dataset", f"{tmp_path}/forget.jsonl"]
    scores, key = f"{tmp_path}/scores.parquet", ["--id_key", f"{tmp_path}/key"]
    few = ["--metrics", "length", "--use_cpu", "true", "--bf16", "false"]
    assert main(["score", *data, *few, *key, "--output", scores]) == 0
    use_id_key(None)
    assert not set(DifficultyScores.load(scores).ids) & set(
        prepare_dataset(qa_dataset(5), make_tokenizer())["sample_id"]
    )
    audit = ["evaluate", *data, "--scores", scores, "--generate", "false", "--n_buckets", "2"]
    assert main([*audit, *key, "--output_dir", f"{tmp_path}/ev"]) == 0
    assert main([*audit, "--output_dir", f"{tmp_path}/other"]) == 2
    assert "made for another dataset" in capsys.readouterr().err
