"""Long texts as chunks: their tokens come back, nothing is too long, empty or lost, and every command reads them."""

import json

import pytest
from builders import make_model, make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.cli import main
from cud_trainer.data import prepare_dataset
from cud_trainer.data.chunks import chunk_lengths, chunk_texts
from cud_trainer.difficulty import DifficultyScores, make_folds


def with_bos():
    """The tokenizer of the other tests, but every text begins with a bos token (as Llama's do)."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def texts(rows) -> Dataset:
    return Dataset.from_list([row if isinstance(row, dict) else {"text": row} for row in rows])


@given(n=st.integers(1, 5000), size=st.integers(7, 600))
def test_lengths(n, size):
    found = chunk_lengths(n, size)
    assert sum(found) == n and max(found) <= size and len(found) == -(-n // size)
    assert max(found) - min(found) <= 1
    assert len(found) == 1 or min(found) >= 2  # so that every chunk has a token that can be predicted


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.text("ab éß\n", min_size=1, max_size=90).filter(str.strip), min_size=1, max_size=4, unique=True),
    size=st.integers(8, 40),
    bos=st.booleans(),
)
def test_tokens_come_back(rows, size, bos):
    tokenizer = with_bos() if bos else make_tokenizer()
    chunks = chunk_texts(texts(rows), tokenizer, size)
    whole = prepare_dataset(texts(rows), tokenizer)
    assert list(dict.fromkeys(chunks["document"])) == whole["sample_id"][:]
    for sample_id, tokens in zip(whole["sample_id"], whole["input_ids"], strict=True):
        own = [row for row in chunks if row["document"] == sample_id]
        assert [row["sample_id"] for row in own] == [f"{sample_id}#{number}" for number in range(len(own))]
        assert [label for row in own for label in row["labels"] if label != -100] == tokens
        for row in own:
            assert 0 < len(row["input_ids"]) <= size
            assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
            assert not bos or row["input_ids"][0] == tokenizer.bos_token_id
    prepared = prepare_dataset(chunks, tokenizer, max_length=size, keep_columns=["document"])  # accepts them all
    assert prepared["sample_id"][:] == chunks["sample_id"][:] and prepared["labels"][:] == chunks["labels"][:]


def test_ids_and_columns_of_the_rows_stay(monkeypatch):
    monkeypatch.setattr("cud_trainer.data.chunks.DOCUMENTS", 1)
    rows = [{"id": i, "text": "word " * 9, "author": f"a{i}"} for i in (7, 8)]
    chunks = chunk_texts(texts(rows), make_tokenizer(), 20)
    assert chunks["sample_id"][:] == ["7#0", "7#1", "7#2", "8#0", "8#1", "8#2"]
    assert chunks["author"][:] == ["a7"] * 3 + ["a8"] * 3 and sorted(chunks.column_names) == sorted(
        ["sample_id", "input_ids", "labels", "document", "author"]
    )
    assert [len(tokens) for tokens in chunks["input_ids"]] == [16, 15, 15] * 2
    fold = make_folds(6, 2, 0, chunks["document"][:])
    assert len(set(fold[:3])) == len(set(fold[3:])) == 1


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        (["abc"], 7, "chunk_tokens must be an integer of at least 8, got 7"),
        (["abc"], True, "chunk_tokens must be an integer of at least 8"),
        (["abc"], 8.0, "chunk_tokens must be an integer of at least 8"),
        (["abc", " "], 8, "forget sample 1: its text is empty"),
        (["abc", None], 8, "forget sample 1: its text is empty"),
        (["abc", "d", "abc"], 8, r"twice \(rows 0 and 2\)"),
        ([{"id": "x", "text": "a"}, {"id": None, "text": "b"}], 8, "forget sample 1 has no id"),
        ([{"id": "x", "text": "a"}, {"id": "y", "text": ""}], 8, "forget sample 'y': its text is empty"),
        ([{"document": "x", "text": "a"}], 8, "its column 'document' is in the way"),
        ([{"question": "x", "answer": "a"}], 8, "chunk_tokens is for plain text .* forget dataset is question-answer"),
        ([{"body": "x"}], 8, r"forget dataset has columns \['body'\]"),
    ],
)
def test_bad_input(rows, size, message):
    with pytest.raises(ValueError, match=message):
        chunk_texts(texts(rows), make_tokenizer(), size)


def test_every_command_reads_chunks(tmp_path, capsys, cells_in_process):
    """Score, train, evaluate and study agree on the chunks, and no fold splits a document unless asked to."""
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name, first in (("forget", 0), ("retain", 10), ("holdout", 20)):
        texts([f"Article {i}. " + f"Number {i * 7} was here. " * (1 + i % 3) for i in range(first, first + 4)]).to_json(
            tmp_path / f"{name}.jsonl"
        )
    data = [
        "--forget_dataset",
        str(tmp_path / "forget.jsonl"),
        "--retain_dataset",
        str(tmp_path / "retain.jsonl"),
        "--chunk_tokens",
        "24",
        "--model_name_or_path",
        str(tmp_path / "model"),
    ]
    train = {
        "objective": "graddiff",
        "preserve": False,
        "passes": 1,
        "difficulty": "loss",
        "per_device_train_batch_size": 4,
        "folds": 4,
        "bf16": False,
        "use_cpu": True,
        "learning_rate": 0.001,
    }
    options = [word for key, value in train.items() for word in (f"--{key}", str(value))]
    scores = tmp_path / "scores.parquet"
    assert main(["score", *data, *options, "--metrics", "loss", "group_mean", "--output", str(scores)]) == 0
    table = DifficultyScores.load(scores)
    documents: dict[str, set] = {}
    for sample_id, fold in zip(table.ids, table.fold, strict=True):
        documents.setdefault(sample_id.split("#")[0], set()).add(int(fold))
    assert len(documents) == 4 < len(table) and all(len(found) == 1 for found in documents.values())
    out = tmp_path / "unlearned"
    assert (
        main(
            [
                "train",
                *data,
                *options,
                "--difficulty_scores",
                str(scores),
                "--output_dir",
                str(out),
                "--report_to",
                "none",
                "--save_strategy",
                "no",
            ]
        )
        == 0
    )
    command = [
        "evaluate",
        *data,
        "--scores",
        str(scores),
        "--generate",
        "false",
        "--group_column",
        "document",
        "--holdout_dataset",
        str(tmp_path / "holdout.jsonl"),
        "--output_dir",
        str(tmp_path / "report"),
    ]
    command[command.index("--model_name_or_path") + 1] = str(out)
    assert main(command) == 0
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert found["run"]["data"]["n_forget"] == len(table) and found["run"]["data"]["n_holdout"] > 4
    study = {"grid": {"schedule": ["uniform"]}, "train": train}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    where = tmp_path / "study"
    assert main(["study", *data, "--config", str(tmp_path / "study.yaml"), "--output_dir", str(where)]) == 0
    run = json.loads((where / "cells" / "schedule=uniform" / "result.json").read_text())
    (own,) = where.glob("cells/scores-*/scores.parquet")
    assert run["forget_ids"] == DifficultyScores.load(own).ids and len(run["forget_ids"]) == len(table)
    cell = json.loads((where / "cells" / "schedule=uniform" / "cell.json").read_text())
    assert cell["settings"]["options"]["group_column"] == "document"
    capsys.readouterr()
    assert main(["score", *data[:-4], "--chunk_tokens", "3", *data[-2:], "--output", str(tmp_path / "x.parquet")]) == 2
    assert "chunk_tokens must be an integer of at least 8, got 3" in capsys.readouterr().err
