"""Many rows at a time give what one at a time does, and `Samples` know what they are made of."""

import hashlib
import itertools
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import merging_tokenizer

from cud_trainer import score_difficulty
from cud_trainer.data import (
    ALTERNATIVES,
    COUNTERFACTUAL,
    PREPARED,
    Samples,
    check_disjoint,
    content_id,
    dataset_fingerprint,
    evenly_spaced,
    prepare_dataset,
    prepare_samples,
)

PLAIN, CHAT, MERGING = make_tokenizer(), make_tokenizer(chat=True), merging_tokenizer()


def shared_start(start, whole):
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))]


def by_hand(row, tokenizer):
    """Tokens and number of prompt tokens of one row, each string given to the tokenizer by itself."""

    def chat(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]

    if "text" in row:
        start, whole = [], tokenizer(row["text"])["input_ids"]
    elif "messages" in row or isinstance(row.get("prompt"), list) or ("question" in row and tokenizer.chat_template):
        if "question" in row:
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        else:
            turns = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        start = chat(turns[:-1], add_generation_prompt=True) if turns[:-1] else []
        return chat(turns), shared_start(start, chat(turns))
    else:
        prompt, answer = row.get("prompt"), row.get("completion")
        if "question" in row:
            prompt, answer = f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
        start, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    whole = whole if whole[-1:] == [tokenizer.eos_token_id] else [*whole, tokenizer.eos_token_id]
    return whole, shared_start(start, whole)


words = st.text("abs é", min_size=0, max_size=6)
filled = st.text("abs", min_size=1, max_size=6)
user = st.builds(lambda text: {"role": "user", "content": text}, words)
assistant = st.builds(lambda text: {"role": "assistant", "content": text}, filled)
ROWS = {
    "question-answer": st.fixed_dictionaries({"question": words, "answer": filled}),
    "prompt-completion": st.fixed_dictionaries({"prompt": words, "completion": filled}),
    "messages as prompt": st.fixed_dictionaries(
        {"prompt": st.lists(user, min_size=1, max_size=2), "completion": st.lists(assistant, min_size=1, max_size=1)}
    ),
    "conversational": st.fixed_dictionaries(
        {"messages": st.builds(lambda a, b: [*a, b], st.lists(st.one_of(user, assistant), max_size=3), assistant)}
    ),
    "text": st.fixed_dictionaries({"text": filled}),
}
CASES = [(kind, tokenizer) for kind in ROWS for tokenizer in (PLAIN, CHAT, MERGING)]
CASES = [(kind, t) for kind, t in CASES if t is CHAT or ("messages" not in kind and kind != "conversational")]


@pytest.mark.parametrize(("kind", "tokenizer"), CASES)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_batches_of_rows_give_what_single_rows_do(kind, tokenizer, data):
    rows = data.draw(st.lists(ROWS[kind], min_size=1, max_size=6))
    if tokenizer is MERGING:  # it has no other letters
        rows = [{key: text.replace("é", "") for key, text in row.items()} for row in rows]
    rows = [{"id": str(number), **row} for number, row in enumerate(rows)]
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer)
    for row, sample in zip(rows, prepared, strict=True):
        tokens, prompt = by_hand(row, tokenizer)
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        expected = {"sample_id": row["id"], "input_ids": tokens, "labels": labels}
        if tokenizer is CHAT and kind not in ("text", "prompt-completion"):
            said = row["completion"] if "completion" in row else row.get("messages")
            size = len(tokenizer(row["answer"] if "answer" in row else said[-1]["content"])["input_ids"])
            # of what the template writes, the message's own tokens count; its eos is trained on
            own = [-100] * (len(tokens) - size - 1) + tokens[-size - 1 : -1] + [-100]
            expected |= {"counted": own, "labels": own if len(row.get("messages", "..")) == 1 else labels}
        assert sample == expected
    assert prepare_dataset(prepared, tokenizer).to_list() == prepared.to_list()  # the tokenised format
    unnamed = prepare_dataset(Dataset.from_list([{k: v for k, v in rows[0].items() if k != "id"}]), tokenizer)
    tokens, prompt = by_hand(rows[0], tokenizer)
    assert unnamed["sample_id"][0] == content_id(tokens, len(prompt))


BAD = [
    {"answer": "  "},
    {"answer": None},
    {"question": None},
    {"id": None},
    {"answer": "long " * 30},
    {"other": ""},
    {"other": None},
]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([{}, {}, *BAD]), min_size=2, max_size=7))
def test_the_first_row_at_fault_is_named_whatever_is_wrong_with_others(faults):
    good = {"question": "Who?", "answer": "Ada.", "other": "Bo."}
    rows = [{"id": f"s{number}", **good, **fault} for number, fault in enumerate(faults)]
    options = {"max_length": 60, "counterfactual_column": "other"}
    first = next((number for number, fault in enumerate(faults) if fault), None)
    if first is None:
        assert len(prepare_dataset(Dataset.from_list(rows), PLAIN, **options)) == len(rows)
        return
    with pytest.raises(ValueError) as together:
        prepare_dataset(Dataset.from_list(rows), PLAIN, **options)
    if rows[first]["id"] is None:
        assert str(together.value) == f"forget sample {first} has no id"
        return
    features = Dataset.from_list(rows).features
    with pytest.raises(ValueError, match=f"forget sample 's{first}': ") as alone:
        prepare_dataset(Dataset.from_list([rows[first]], features=features), PLAIN, **options)
    assert str(together.value) == str(alone.value)


def test_a_later_batch_names_its_rows(monkeypatch):
    """`datasets` hands on 1000 rows at a time."""
    rows = [{"text": f"t{number}"} for number in range(1005)]
    rows[1003]["text"] = ""
    with pytest.raises(ValueError, match="^forget sample 1003: its text is empty$"):
        prepare_dataset(Dataset.from_list(rows), PLAIN)
    rows[1003]["text"] = "t0"
    with pytest.raises(ValueError, match=r"twice \(rows 0 and 1003\)"):
        prepare_dataset(Dataset.from_list(rows), PLAIN)


@pytest.mark.parametrize("column", [COUNTERFACTUAL, *ALTERNATIVES])
def test_a_column_that_only_some_have(column):
    row = {"input_ids": [5, 6], "labels": [-100, 6], COUNTERFACTUAL: [5, 7]}
    row |= {ALTERNATIVES[0]: [5, 8, 9], ALTERNATIVES[1]: [-100, 8, 9]}
    whole = [{"sample_id": "a", **row}, {"sample_id": "b", **row}]
    assert prepare_dataset(Dataset.from_list(whole), PLAIN).column_names == [*PREPARED, COUNTERFACTUAL, *ALTERNATIVES]
    whole[1][column] = None
    lacking = column if column == COUNTERFACTUAL else ALTERNATIVES[0]  # alternatives come as a pair
    with pytest.raises(ValueError, match=f"forget sample 'b' has no {lacking}, others have"):
        prepare_dataset(Dataset.from_list(whole), PLAIN)
    whole[0][column] = None
    assert column not in prepare_dataset(Dataset.from_list(whole), PLAIN).column_names


def test_nothing_is_left_in_a_cache(tmp_path):
    """What is to be forgotten is not written to disk by the way."""
    file = tmp_path / "data.jsonl"
    qa_dataset(5).to_json(file)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    before = sorted(path for path in tmp_path.rglob("*"))
    assert data.cache_files  # it would be written beside them
    prepared = prepare_dataset(data, PLAIN)
    assert sorted(path for path in tmp_path.rglob("*")) == before and not prepared.cache_files


def test_a_bar_for_many_rows_only(capfd, monkeypatch):
    monkeypatch.setattr("cud_trainer.data.mapping.MANY_ROWS", 5)
    prepare_dataset(qa_dataset(4), PLAIN)
    assert "samples" not in capfd.readouterr().err
    prepare_dataset(qa_dataset(5), PLAIN, name="retain")
    assert "retain samples" in capfd.readouterr().err


class TestSamples:
    @pytest.fixture
    def rows(self):
        rng = np.random.default_rng(0)
        rows = []
        for number in range(2300):  # more than are read at a time
            tokens = rng.integers(2, 258, rng.integers(2, 9)).tolist()
            start = int(rng.integers(0, len(tokens)))
            rows.append({"sample_id": f"é|{number}", "input_ids": tokens, "labels": [-100] * start + tokens[start:]})
        return rows

    def test_say_what_their_rows_are(self, rows):
        samples = Samples(Dataset.from_list(rows), 0)
        assert samples.ids == [row["sample_id"] for row in rows]
        assert samples.lengths == [len(row["input_ids"]) for row in rows]
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
        assert samples.answer_lengths.tolist() == counts
        lines = [f"{row['sample_id']}|{row['input_ids']}|{row['labels']}\n" for row in rows]
        assert samples.fingerprint == f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}"
        assert list(samples) == rows and samples[7] == rows[7] and len(samples) == len(rows)

    def test_some_of_them(self, rows):
        samples = Samples(Dataset.from_list(rows), 0)
        some = samples.select([2200, 5, 1100])
        assert some.ids == [rows[row]["sample_id"] for row in (2200, 5, 1100)]
        assert some.lengths == [len(rows[row]["input_ids"]) for row in (2200, 5, 1100)]
        assert some.answer_lengths.tolist() == samples.answer_lengths[[2200, 5, 1100]].tolist()
        assert some.fingerprint == dataset_fingerprint(Dataset.from_list([rows[row] for row in (2200, 5, 1100)]))
        assert evenly_spaced(samples, 3).ids == [rows[row]["sample_id"] for row in (0, 1150, 2299)]

    def test_overlap_among_many(self, rows):
        forget = Samples(Dataset.from_list(rows), 0)
        unlike = [{**row, "sample_id": f"r{number}"} for number, row in enumerate(rows)]
        retain = [{**row, "input_ids": [*row["input_ids"], 1], "labels": [*row["labels"], 1]} for row in unlike]
        check_disjoint(forget, Samples(Dataset.from_list([{**row, "input_ids": [1]} for row in unlike[:3]]), 0))
        contents = {tuple(row["input_ids"]) for row in rows}
        retain = [row for row in retain if tuple(row["input_ids"]) not in contents]
        long = max(range(1000, 2300), key=lambda row: len(rows[row]["input_ids"]))
        with pytest.raises(ValueError, match="has the same content as retain sample"):
            check_disjoint(forget, Samples(Dataset.from_list([*retain, unlike[long]]), 0))

    def test_are_computed_once_and_not_changed(self, monkeypatch):
        samples = prepare_samples(qa_dataset(3), PLAIN)
        assert samples.fingerprint == dataset_fingerprint(samples.dataset)
        monkeypatch.setattr("cud_trainer.data.samples.dataset_fingerprint", lambda dataset: pytest.fail("again"))
        assert samples.fingerprint and prepare_samples(samples, PLAIN) is samples
        with pytest.raises(FrozenInstanceError):
            samples.pad_token_id = 3

    def test_other_answers(self):
        row = {"input_ids": [5, 6], "labels": [-100, 6], COUNTERFACTUAL: [5, 7]}
        row |= {ALTERNATIVES[0]: [5, 8, 9], ALTERNATIVES[1]: [-100, 8, 9]}
        samples = prepare_samples(Dataset.from_list([{"sample_id": "a", **row}]), PLAIN)
        assert samples.has_counterfactuals and samples.pad([0])[COUNTERFACTUAL].tolist() == [[5, 7]]
        assert list(samples.alternatives) == [{"sample_id": "a", "input_ids": [5, 8, 9], "labels": [-100, 8, 9]}]
        plain = prepare_samples(qa_dataset(1), PLAIN)
        assert plain.alternatives is None and not plain.has_counterfactuals

    def test_are_scored_as_they_are(self, monkeypatch):
        options = {"metrics": ["loss", "grad_alignment"], "progress": False}
        data = qa_dataset(5).add_column("author", list("aabbc"))
        whole = score_difficulty(make_model(0), data, PLAIN, retain_dataset=qa_dataset(3, 50), **options)
        forget, retain = prepare_samples(data, PLAIN), prepare_samples(qa_dataset(3, 50), PLAIN, name="retain")
        monkeypatch.setattr("cud_trainer.data.prepare._prepare", lambda *a, **k: pytest.fail("again"))
        scores = score_difficulty(make_model(0), forget, retain_dataset=retain, **options)
        assert scores.to_pandas().equals(whole.to_pandas()) and scores.provenance == whole.provenance
        with pytest.raises(ValueError, match="forget dataset has no column 'author'; it has"):
            score_difficulty(make_model(0), forget, group_column="author", **options)
        with pytest.raises(ValueError, match="needs the tokenizer"):
            score_difficulty(make_model(0), forget, retain_dataset=qa_dataset(2, 50), **options)
        with pytest.raises(ValueError, match="in both the forget and the retain dataset"):
            score_difficulty(make_model(0), forget, retain_dataset=forget, **options)
