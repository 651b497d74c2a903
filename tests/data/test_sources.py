"""Files, folders and formats as people have them: read as they are, or refused with the reason."""

import gzip
import json
import sys
import zipfile

import pandas as pd
import pytest
from builders import make_tokenizer
from datasets import Dataset, DatasetDict, load_dataset

from cud_trainer.commands.options import DataArguments
from cud_trainer.data import load_samples, prepare_dataset, standardised
from cud_trainer.data.readers import READERS, kind_of

QA = [{"question": f"Who is {name}?", "answer": f"{name} lives in Köln."} for name in ("Ann", "Bob")]
CSV = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in QA)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in QA)


def put(folder, name, content, encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def load(path, split="train", limit=None):
    return load_samples(str(path), None, split, limit, "forget")


@pytest.fixture(params=[None, 1, 2])
def rows_at_a_time(request, monkeypatch):
    """As files of a usual length are read, and as a long one is: some rows, and some characters, after the others."""
    if request.param:
        monkeypatch.setattr("cud_trainer.data.tables.ROWS", request.param)
        monkeypatch.setattr("cud_trainer.data.readers.PIECE", 3)


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("a.jsonl", LINES, "utf-8-sig"),
        ("A.JSONL", LINES, "utf-16"),
        ("a.ndjson", LINES.replace("\n", "\r\n") + "\r\n", "utf-8"),
        ("a.data", LINES, "utf-8"),  # no suffix that says it
        ("a.json", LINES, "utf-8"),
        ("b.json", json.dumps(QA), "utf-8"),
        ("c.json", json.dumps({"version": 1, "data": QA}), "utf-8"),
        ("d.json", json.dumps({str(i): row for i, row in enumerate(QA)}), "utf-8"),
        ("e.json", json.dumps({key: [row[key] for row in QA] for key in QA[0]}), "utf-8"),
        ("A.CSV", CSV, "utf-8-sig"),
        ("semicolon.csv", CSV.replace(",", ";"), "utf-8"),
        ("a.tsv", CSV.replace(",", "\t"), "utf-8"),
        ("quoted.csv", "question, answer\r\n" + "".join(f'"{r["question"]}","{r["answer"]}"\r\n' for r in QA), "utf-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), None),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0), None),
        ("packed.csv", gzip.compress(CSV.encode(), mtime=0), None),
    ],
)
def test_a_file_is_what_it_holds(tmp_path, name, content, encoding, rows_at_a_time):
    assert load(put(tmp_path, name, content, encoding)).to_list() == QA


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.json", '[{"text": "a"},\n{"text": "b"},\n{"text": }]'),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": }'),
        ("a.csv", 'text\na\nb\nc,"'),
    ],
)
def test_rows_come_one_after_the_other(tmp_path, monkeypatch, name, rows):
    """A reader is at a row before it has seen what is behind it."""
    monkeypatch.setattr("cud_trainer.data.readers.PIECE", 3)
    path = put(tmp_path, name, rows)
    found = READERS[kind_of(path)](path)
    assert [next(found), next(found)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ValueError, match="line [34] of a"):
        next(found)


def test_the_type_of_a_column_is_that_of_all_its_rows(tmp_path, rows_at_a_time):
    rows = [
        {"topic": 1, "score": 1, "messages": [{"role": "user"}]},
        {"topic": 2.50, "score": None, "messages": [{"role": None, "content": "a"}]},
        {"topic": "b", "score": 0.5, "messages": []},
        {"topic": True, "more": ["x"]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows).replace("2.5", "2.50")
    data = load(put(tmp_path, "a.jsonl", lines))
    assert data["topic"][:] == ["1", "2.50", "b", "true"] and data["score"][:] == [1.0, None, 0.5, None]
    assert data["messages"][:2] == [[{"role": "user", "content": None}], [{"role": None, "content": "a"}]]
    assert data["more"][:] == [None, None, None, ["x"]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["secret", "b", "c", ["secret"]], "the list in row 3 of column 'x' of a.jsonl does not fit"),
        ([["secret"], ["b"], [1]], "the list in row 2"),
        ([{"a": 1}, {"a": "secret"}], "the object in row 1"),
        ([1, 2**70], "the number in row 1"),
    ],
)
def test_the_first_row_of_another_type_is_named_without_its_text(tmp_path, values, message, rows_at_a_time):
    with pytest.raises(ValueError, match=message) as error:
        load(put(tmp_path, "a.jsonl", "".join(json.dumps({"x": value}) + "\n" for value in values)))
    assert "secret" not in str(error.value)


def test_other_kinds(tmp_path):
    data = Dataset.from_list(QA)
    data.to_parquet(tmp_path / "a.pq")
    data.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "splits"))
    for path in (tmp_path / "a.pq", tmp_path / "saved", tmp_path / "splits"):
        assert load(path).to_list() == QA
    assert len(load(tmp_path / "splits", "test")) == 1
    assert load(put(tmp_path, "texts.json", '["one", "two"]'))["text"][:] == ["one", "two"]
    for name in ("b eval.txt", "a-test.txt"):
        put(tmp_path, f"docs/{name}", f"{name}\n\nSecond paragraph.\n")
    assert load(tmp_path / "docs")["text"][:] == [f"{n}\n\nSecond paragraph.\n" for n in ("a-test.txt", "b eval.txt")]
    assert len(load(f"{tmp_path}/docs/*.txt")) == 2
    for name in ("train", "test"):
        put(tmp_path, f"called/{name}.jsonl", json.dumps({"text": name}))
    assert load(tmp_path / "called", "test")["text"][:] == ["test"]


def test_text_and_ids_are_strings_whatever_they_look_like(tmp_path):
    values = ["007", "00491512345", "NA", "None", "null", "True", "1985-04-12", "1e5", "34.50", "2021-04-12T10:00:00"]
    rows = [{"id": value, "question": value, "answer": value} for value in values]
    table = "id,question,answer\n" + "".join(f"{v},{v},{v}\n" for v in values)
    for path in (
        put(tmp_path, "a.csv", table),
        put(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        put(tmp_path, "a.json", json.dumps(rows)),
    ):
        assert load(path).to_list() == rows
        assert prepare_dataset(load(path), make_tokenizer())["sample_id"][:] == values
    numbers = put(
        tmp_path, "n.jsonl", '{"id": 1, "question": "a", "answer": 34.50}\n{"id": "b", "question": "a", "answer": true}'
    )
    assert load(numbers)["answer"][:] == ["34.50", "true"] and load(numbers)["id"][:] == ["1", "b"]


def test_workbooks(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="b.xlsx needs openpyxl"):
        patch.setitem(sys.modules, "openpyxl", None)
        load(tmp_path / "b.xlsx")
    pytest.importorskip("openpyxl")
    rows = [{"id": "007", "text": "NA"}, {"id": "1e5", "text": "1985-04-12"}]
    pd.DataFrame(rows).to_excel(tmp_path / "a.xlsx", index=False)
    assert load(tmp_path / "a.xlsx").to_list() == rows


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": CSV.encode("cp1252")}, "a.csv is not UTF-8: byte 0xf6 in line 2"),
        ({"a.jsonl": LINES + '{"question": "a",}\n'}, "line 3 of a.jsonl"),
        ({"a.json": '[\n{"text": "a"},\n{"text" "b"}]'}, "line 3 of a.json: Expecting ':' delimiter"),
        ({"a.json": '{\n"version": 1,\n"data": [}'}, "line 3 of a.json: Expecting value"),
        ({"a.json": '[{"text": "a"}'}, "line 1 of a.json: the array ends in the middle"),
        ({"a.json": '[{"text": "a"}]\n[{"text": "b"}]'}, "line 2 of a.json: there is more behind the array"),
        ({"a.json": '[{"text": "a"}, "b"]'}, "neither rows nor columns of a dataset .entry 1"),
        ({"a.csv": "question,answer\n"}, "a.csv has no rows"),
        ({"a.jsonl.gz": gzip.compress(LINES.encode(), mtime=0)[:40]}, "a.jsonl.gz cannot be unpacked"),
        ({"a.jsonl": '{"text": "a", "text": "b"}'}, "key 'text' is there twice"),
        ({"a.jsonl": '{"text": "\\ud83d"}'}, "half a character"),
        ({"a.csv": "question,answer\na,b,c\n"}, "line 2 of a.csv has 3 fields, its header has 2"),
        ({"a.csv": "question,perturbed_answer\na,\"['b', 'c']\"\n"}, "column 'perturbed_answer' .* list .* as text"),
        ({"a.pdf": "%PDF"}, "none of the kinds that can be read"),
        ({"a.xlsx": b"PK\x03\x04"}, "no workbook"),
        ({"a.jsonl": b""}, "empty"),
        ({"a.jsonl": LINES, "b.csv": CSV, "README.md": "# data"}, "several kinds.*a.jsonl, b.csv$"),
        ({"a.jsonl": LINES, "notes.pdf": "%PDF"}, "several kinds.*a.jsonl, notes.pdf"),
        ({"forget.jsonl": LINES, "retain.jsonl": LINES}, "called after different sets"),
        ({"train.jsonl": LINES, "more.jsonl": LINES}, "some of its files are called after splits"),
        ({"a.jsonl": LINES, "b.jsonl": '{"text": "a"}'}, "different columns"),
    ],
)
def test_what_is_there_is_never_called_missing(tmp_path, files, message, rows_at_a_time):
    for name, content in files.items():
        put(tmp_path, name, content)
    path = tmp_path if len(files) > 1 else tmp_path / next(iter(files))
    with pytest.raises(ValueError, match=f"(?s)cannot load the forget dataset .*{message}"):
        load(path)


def test_what_is_not_there_is(tmp_path):
    for source in (tmp_path / "no.jsonl", "~/no.csv", "./no"):
        with pytest.raises(ValueError, match="does not exist"):
            load(source)


def test_formats_of_others():
    tokenizer = make_tokenizer(chat=True)
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]
    for rows, expected in (
        ([{"conversations": turns}], "[user]Who?[assistant]Ann.<eos>"),
        ([{"instruction": "Say", "input": "who", "output": "Ann."}], "[user]Say\n\nwho[assistant]Ann.<eos>"),
        ([{"instruction": "Who?", "input": "", "output": "Ann."}], "[user]Who?[assistant]Ann.<eos>"),
        ([{"text": "Who?", "labels": "Ann."}], "[user]Who?[assistant]Ann.<eos>"),
    ):
        prepared = prepare_dataset(Dataset.from_list(rows), tokenizer)
        assert tokenizer.decode(prepared[0]["input_ids"]) == expected
        assert tokenizer.decode([t for t in prepared[0]["counted"] if t != -100]) == "Ann."
    classes = Dataset.from_list([{"text": "Who?", "labels": 1}])
    assert standardised(classes, "forget") is classes  # of texts


def test_formats_of_others_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Roles, fields and columns are those of every row; nothing is left in a cache; a row is named by its place."""
    monkeypatch.setattr("cud_trainer.data.mapping.BATCH", 2)
    named = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
    chats = [
        [{"from": "human", "value": f"Who {row}?", "weight": None}, {"from": other, "value": "Ann.", "weight": row}]
        for row, other in enumerate(("gpt", "bot", "chatgpt", "assistant", "gpt"))
    ]
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"conversations": chats, "topic": [*range(5)]}).to_parquet(path)
    data = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    made = standardised(data.select([4, 0, 1, 2, 3]), "forget")
    assert made.to_dict() == {
        "topic": [4, 0, 1, 2, 3],
        "messages": [
            [
                {"role": named.get(turn["from"], turn["from"]), "content": turn["value"], "weight": turn["weight"]}
                for turn in chats[row]
            ]
            for row in (4, 0, 1, 2, 3)
        ],
    }
    assert sorted(tmp_path.rglob("*")) == before and not made.cache_files
    with pytest.raises(ValueError, match="forget sample 3: its conversations are no list of messages"):
        standardised(Dataset.from_dict({"conversations": [*chats[:3], None]}), "forget")
    with pytest.raises(ValueError, match="forget sample 0: its conversations are no list of messages"):
        standardised(Dataset.from_dict({"conversations": ["human: Who?"]}), "forget")

    rows = {"instruction": ["a", "b", None], "input": ["x", " ", "y"], "output": ["1", "2", "3"], "topic": [0, 1, 2]}
    made = standardised(Dataset.from_dict(rows), "forget")
    assert made.to_dict() == {"answer": rows["output"], "topic": [0, 1, 2], "question": ["a\n\nx", "b", None]}
    with pytest.raises(ValueError, match="its question is missing"):
        prepare_dataset(made, make_tokenizer())
    with pytest.raises(ValueError, match="column 'question' is in the way"):
        standardised(Dataset.from_dict({**rows, "question": ["?"] * 3}), "forget")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "prompt . completion and as question . answer",
        ),
        ({"instruction": "a", "output": "b", "text": "c"}, "instruction . output and as text"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "numbers of `choices`"),
        ({"query": "a", "reply": "b"}, "Other names are mapped by --columns"),
    ],
)
def test_two_readings_are_an_error_that_names_both(row, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(Dataset.from_list([row]), make_tokenizer())


def test_a_mapping_of_columns(tmp_path):
    rows = [{"prompt": "Who?", "completion": "Bob.", "question": "x", "answer": "y", "query": "What?", "topic": "t"}]
    path = put(tmp_path, "a.jsonl", json.dumps(rows[0]))
    args = DataArguments(forget_dataset=str(path), columns="question=query,answer=completion")
    forget, _ = args.load(make_tokenizer())
    assert forget.to_list() == [{"answer": "Bob.", "question": "What?", "topic": "t"}]
    for columns, message in (
        ("question", "columns must be"),
        ("asked=query", "no column of a format"),
        ("text=no", "no column 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            DataArguments(forget_dataset=str(path), columns=columns).load(make_tokenizer())
