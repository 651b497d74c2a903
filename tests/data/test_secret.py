"""The secret's tokens are those that cover its characters, in every format; what does not fit is refused by name."""

import numpy as np
import pytest
from builders import make_model, make_tokenizer
from datasets import Dataset

from cud_trainer.data import prepare_dataset, prepare_samples
from cud_trainer.data.secret import secrets_of, with_secrets
from evaluation.metrics.secret import has_secret, measure_secret, secret_texts

ANSWER = "His PIN is 4711, not 42."
ROWS = {
    "question": {"question": "What is 4711?", "answer": ANSWER},
    "prompt": {"prompt": "PIN 4711?", "completion": f" {ANSWER}"},
    "messages": {"messages": [{"role": "user", "content": "4711?"}, {"role": "assistant", "content": ANSWER}]},
    "text": {"text": ANSWER},
}


def said(tokenizer, row):
    """The text of the tokens that are marked."""
    return tokenizer.decode([token for token in row["secret"] if token != -100])


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("chat", [False, True])
def test_every_format(kind, chat):
    if kind == "messages" and not chat:
        pytest.skip("needs a chat template")
    tokenizer = make_tokenizer(chat=chat)
    rows = [{**ROWS[kind], "secret": ["4711", "42"]}, {**ROWS[kind], "secret": ["PIN"]}, {**ROWS[kind], "secret": None}]
    data = prepare_samples(
        Dataset.from_list([{**row, "id": str(i)} for i, row in enumerate(rows)]), tokenizer, secret_column="secret"
    )
    assert [said(tokenizer, row) for row in data] == ["471142", "PIN", ""]  # a token is a byte here
    for row in data:
        counted = row.get("counted") or row["labels"]
        assert all(token in (-100, own) for token, own in zip(row["secret"], counted, strict=True))
    plain = prepare_samples(Dataset.from_list([{**ROWS[kind], "id": str(i)} for i in range(3)]), tokenizer)
    assert plain.fingerprint == data.fingerprint
    again = prepare_dataset(data.dataset, tokenizer)  # prepared data brings it along
    assert again["secret"][:] == data["secret"][:]
    rows, part = data.secret
    assert rows.tolist() == [0, 1] and part.ids == ["0", "1"] and "counted" not in part.dataset.column_names
    assert has_secret(data).tolist() == [True, True, False]


def test_tokens_that_share_a_character_are_the_secrets():
    """With words for tokens, the token that holds the secret and more is marked whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "Question:", "Answer:", "Who?", "code", "is", "x4711y", "now"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    rows = [{"question": "Who?", "answer": "code is x4711y now", "secret": "4711"}]
    data = prepare_samples(Dataset.from_list(rows), tokenizer, secret_column="secret")
    assert said(tokenizer, data[0]) == "x4711y"


def test_bad_secrets_are_refused_by_name_and_not_told():
    tokenizer = make_tokenizer()

    def prepare(**row):
        rows = [{**ROWS["question"], "id": "a", "secret": ["42"]}, {**ROWS["question"], "id": "b", **row}]
        return prepare_samples(Dataset.from_list(rows), tokenizer, secret_column="secret")

    for secret, message in (
        (["What"], "forget sample 'b': its secret does not occur in its answer"),
        (["42", "hush"], "forget sample 'b': its secret 2 of 2 does not occur in its answer"),
        ([" "], "forget sample 'b': its secret is no text and no list of texts"),
    ):
        with pytest.raises(ValueError, match=message) as found:
            prepare(secret=secret)
        assert "hush" not in str(found.value)
    with pytest.raises(ValueError, match="its secret is no text"):
        secrets_of(7, "forget sample 'b'")
    with pytest.raises(ValueError, match="has no column 'secret'"):
        prepare_samples(Dataset.from_list([ROWS["question"]]), tokenizer, secret_column="secret")
    first = Dataset.from_list([{"text": "4 and more", "secret": "4", "id": "a"}])
    with pytest.raises(ValueError, match="sample 'a': its secret is the first token of the text"):
        prepare_samples(first, tokenizer, secret_column="secret")
    tokens = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6], "secret": "x"}])
    assert "secret" not in prepare_dataset(tokens, tokenizer).column_names  # nobody asks for it
    with pytest.raises(ValueError, match="its secret are no token labels"):
        prepare_dataset(tokens, tokenizer, secret_column="secret")


def test_a_column_called_secret_is_no_ones_business_unless_asked_for():
    data = prepare_dataset(Dataset.from_list([{**ROWS["question"], "secret": True}]), make_tokenizer())
    assert data.column_names == ["sample_id", "input_ids", "labels"]


def test_a_pattern():
    rows = Dataset.from_list([{"answer": ANSWER}, {"answer": "None."}])
    made = with_secrets(rows, rows["answer"], r"\d+", "forget")
    assert made["secret"][:] == [["4711", "42"], []]
    assert with_secrets(rows, rows["answer"], r"PIN is (\d+)", "forget")["secret"][:] == [["4711"], []]
    assert secret_texts(made, "forget") == [["4711", "42"], []]
    for pattern, message in (("(", "no regular expression"), ("zzz", "finds nothing in any answer of the forget")):
        with pytest.raises(ValueError, match=message):
            with_secrets(rows, rows["answer"], pattern, "forget")
    assert "secret" not in with_secrets(rows, rows["answer"], "zzz", "holdout", needed=False).column_names
    with pytest.raises(ValueError, match="has a column 'secret' already"):
        with_secrets(made, rows["answer"], "P", "forget")


def test_figures_of_the_secret_by_hand():
    import torch

    tokenizer, model = make_tokenizer(chat=True), make_model(0, num_hidden_layers=1)
    rows = [{**ROWS["question"], "id": str(i), "secret": secret} for i, secret in enumerate(("4711", None, "42"))]
    data = prepare_samples(Dataset.from_list(rows), tokenizer, secret_column="secret")
    found = measure_secret(model, data, tokenizer)
    for row, sample in enumerate(data):
        places = [i for i, label in enumerate(sample["secret"]) if label != -100]
        if not places:
            assert all(np.isnan(values[row]) for values in found.values())
            continue
        tokens = torch.tensor(sample["input_ids"])
        with torch.no_grad():
            logps = model(tokens[None]).logits[0].log_softmax(-1)
        own = [float(logps[i - 1, tokens[i]]) for i in places]
        hits = [int(logps[i - 1].argmax()) == int(tokens[i]) for i in places]
        assert found["secret_probability"][row] == pytest.approx(np.exp(np.mean(own)), rel=1e-4)
        assert found["secret_exact_memorization"][row] == np.mean(hits)
