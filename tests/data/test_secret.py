"""The secret's tokens are those that cover its characters, in every format; what does not fit is refused by name."""

from unittest import mock

import numpy as np
import pytest
from builders import make_model, make_tokenizer
from datasets import Dataset
from transformers import PreTrainedTokenizer

from cud_trainer.data import prepare_dataset, prepare_samples
from cud_trainer.data.formats import each_tokenised
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


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which does not say where its tokens stand: a token a letter, and one before all."""

    def __init__(self):
        self.letters = {chr(number): number for number in (10, *range(32, 127))} | {"<bos>": 0, "<eos>": 1, "<pad>": 2}
        self.names = {number: letter for letter, number in self.letters.items()}
        super().__init__(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")

    vocab_size = property(lambda self: 127)

    def get_vocab(self):
        return dict(self.letters)

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters[token]

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids, other=None):
        return [0, *ids]


@pytest.mark.parametrize("kind", ["prompt", "question", "text"])
def test_tokens_that_the_tokenizer_adds_are_no_part_of_it(kind):
    """Also where it does not say which characters are whose."""
    tokenizer = Letters()
    rows = [{**ROWS[kind], "secret": secrets, "id": str(secrets)} for secrets in (["PIN", "42"], ["4711"])]
    data = prepare_samples(
        Dataset.from_list([{"id": "a"} | row for row in rows]),
        tokenizer,
        secret_column="secret",
        tokenizer_checked=True,
    )
    assert data[0]["input_ids"][0] == 0 and data[0]["input_ids"][-1] == 1
    assert [said(tokenizer, row) for row in data] == ["PIN42", "4711"]
    first = next(place for place, token in enumerate(data[1]["secret"]) if token != -100)
    assert tokenizer.decode(data[1]["input_ids"][1:first]).endswith("His PIN is ")


def test_texts_are_tokenised_once():
    tokenizer = make_tokenizer()
    with mock.patch.object(type(tokenizer), "__call__", autospec=True, side_effect=type(tokenizer).__call__) as calls:
        list(each_tokenised([{"text": ANSWER, "secret": "42"}], "text", tokenizer, ["a"], None, "secret"))
    assert calls.call_count == 1


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
