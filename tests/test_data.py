"""Samples: every format, the answer mask, ids, batches, and refusals that name the sample."""

import pytest
import torch
from conftest import make_model, make_tokenizer, qa_dataset
from datasets import Dataset, DatasetDict

from cud_trainer.data import (
    PairedCollator,
    check_disjoint,
    dataset_fingerprint,
    length_sorted_batches,
    pad_batch,
    prepare_dataset,
)

CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}


def prepare(rows, tokenizer=None, **options):
    dataset = rows if hasattr(rows, "column_names") else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer or make_tokenizer(), **options)


def parts(sample, tokenizer):
    """`(prompt text, answer text)` as the labels tell them apart."""
    answer = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
    prompt = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100]
    assert all(label in (-100, t) for t, label in zip(sample["input_ids"], sample["labels"], strict=True))
    return tokenizer.decode(prompt), tokenizer.decode(answer)


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "chat", "prompt", "answer"),
        [
            ({"prompt": "The sky is", "completion": " blue."}, False, "The sky is", " blue.<eos>"),
            ({"prompt": "The sky is", "completion": " blue."}, True, "The sky is", " blue.<eos>"),
            ({"question": "Who?", "answer": "Ada."}, False, "Question: Who?\nAnswer:", " Ada.<eos>"),
            ({"question": "Who?", "answer": "Ada."}, True, "[user]Who?[assistant]", "Ada.<eos>"),
            (CHAT, True, "[user]Hi[assistant]", "Hello.<eos>"),
            ({"messages": [*CHAT["prompt"], *CHAT["completion"]]}, True, "[user]Hi[assistant]", "Hello.<eos>"),
            ({"text": "Once upon a time"}, False, "", "Once upon a time<eos>"),
        ],
    )
    def test_prompt_and_answer(self, row, chat, prompt, answer):
        tokenizer = make_tokenizer(chat)
        assert parts(prepare([row], tokenizer)[0], tokenizer) == (prompt, answer)

    def test_only_the_last_turn_is_the_answer(self):
        tokenizer = make_tokenizer(True)
        turns = [
            {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        ]
        prompt, answer = parts(prepare([{"messages": turns}], tokenizer)[0], tokenizer)
        assert prompt == "[user]a[assistant]b<eos>[user]c[assistant]" and answer == "d<eos>"

    def test_tokens_given_are_taken(self):
        sample = prepare([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])[0]
        assert sample["input_ids"] == [5, 6, 7] and sample["labels"] == [-100, 6, 7]

    def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer(self):
        """'s b' is one token: the prompt tokenised alone ends differently from the whole."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<pad>": 0, "<eos>": 1, "s": 2, "b": 3, "sb": 4, "x": 5}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("s", "b")]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
        sample = prepare([{"prompt": "xs", "completion": "bx"}], tokenizer)[0]
        assert sample["input_ids"] == [5, 4, 5, 1] and sample["labels"] == [-100, 4, 5, 1]

    @pytest.mark.parametrize("conversational", [False, True])
    def test_agrees_with_trl(self, tmp_path, conversational):
        from trl import SFTConfig, SFTTrainer

        tokenizer = make_tokenizer(True)
        rows = [
            CHAT,
            {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]},
        ]
        if not conversational:
            rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "Grass:", "completion": " green"}]
        trainer = SFTTrainer(
            make_model(),
            SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        mine = prepare(rows, tokenizer)
        for theirs, ours in zip(trainer.train_dataset, mine, strict=True):
            assert theirs["input_ids"] == ours["input_ids"] and theirs["labels"] == ours["labels"]


class TestIds:
    def test_from_a_column(self):
        rows = [{"id": i, "text": f"t{i}"} for i in (7, 3)]
        assert list(prepare(rows)["sample_id"]) == ["7", "3"]
        assert list(prepare([{"sample_id": "a", "id": 1, "text": "t"}])["sample_id"]) == ["a"]

    def test_from_the_content_whatever_the_order(self):
        first, reverse = prepare(qa_dataset(4)), prepare(qa_dataset(4).select([3, 2, 1, 0]))
        assert list(first["sample_id"]) == list(reverse["sample_id"])[::-1]
        assert first["sample_id"][0] == "106ef231441914ce"  # the same on every machine
        assert dataset_fingerprint(first) != dataset_fingerprint(reverse)
        assert dataset_fingerprint(first) == dataset_fingerprint(prepare(qa_dataset(4)))

    def test_columns_are_kept_on_request(self):
        prepared = prepare([{"text": "t", "author": "A", "other": 1}], keep_columns=["author"])
        assert prepared.column_names == ["sample_id", "input_ids", "labels", "author"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (None, "forget dataset is missing"),
            (Dataset.from_dict({"text": []}), "forget dataset is empty"),
            (DatasetDict({"train": qa_dataset(2)}), "DatasetDict: choose a split, one of \\['train'\\]"),
            (qa_dataset(2).to_iterable_dataset(), "must be a map-style"),
            ([{"text": "a"}], "must be a map-style"),
            (Dataset.from_list([{"x": 1}]), "has columns \\['x'\\]; expected one of"),
            (Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": "  "}]),
             "forget sample 1: its answer is empty"),
            (Dataset.from_list([{"id": "s1", "prompt": "a", "completion": None}]), "sample 's1': its completion is empty"),
            (Dataset.from_list([{"text": ""}]), "sample 0: its text is empty"),
            (Dataset.from_list([{"question": "q", "answer": "long " * 20, "id": "x9"}]), "'x9'.* beyond max_length=40"),
            (Dataset.from_list([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]), "the id '1' twice \\(rows 0 and 1\\)"),
            (Dataset.from_list([{"text": "a"}, {"text": "a"}]), "twice \\(rows 0 and 1\\)"),
            (Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]), "last message must be the assistant"),
            (Dataset.from_list([{"messages": [*CHAT["prompt"], *CHAT["completion"]]}]), "tokenizer has no chat template"),
            (Dataset.from_list([{"input_ids": [4, 5], "labels": [4, -100]}]), "no answer token that can be predicted"),
            (Dataset.from_list([{"input_ids": [4, 5], "labels": [4]}]), "differ in length"),
        ],
    )  # fmt: skip
    def test_dataset(self, dataset, message):
        with pytest.raises(ValueError, match=message):
            prepare_dataset(dataset, make_tokenizer(), max_length=40)

    @pytest.mark.parametrize("token", ["pad", "eos"])
    def test_tokenizer(self, token):
        tokenizer = make_tokenizer()
        setattr(tokenizer, f"{token}_token", None)
        with pytest.raises(ValueError, match=f"no {token} token"):
            prepare(qa_dataset(1), tokenizer)

    def test_overlap(self):
        forget = prepare([{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
        with pytest.raises(ValueError, match="sample 'b' is in both"):
            check_disjoint(forget, prepare([{"id": "b", "text": "other"}]))
        with pytest.raises(ValueError, match="'a' has the same content as retain sample 'z'"):
            check_disjoint(forget, prepare([{"id": "z", "text": "one"}]))
        check_disjoint(forget, prepare([{"id": "z", "text": "three"}]))


class TestBatches:
    def test_padding(self):
        batch = pad_batch(
            [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}], 0
        )
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]

    def test_every_sample_once_longest_first(self):
        prepared = prepare(qa_dataset(11))
        seen, widths = [], []
        for rows, batch in length_sorted_batches(prepared, 4, 0):
            seen += rows
            widths.append(batch["input_ids"].shape[1])
            for row, tokens in zip(rows, batch["input_ids"], strict=True):
                assert tokens[: len(prepared[row]["input_ids"])].tolist() == prepared[row]["input_ids"]
        assert sorted(seen) == list(range(11)) and widths == sorted(widths, reverse=True)

    def test_pairs(self):
        forget, retain = prepare([{"text": "abc"}]), prepare([{"text": "defgh"}, {"text": "i"}])
        rows = [{"row": 4, "forget_index": 0, "retain_index": 1, "weight": 0.5, "retain_scale": 2.0}]
        batch = PairedCollator(forget, retain, 0, pad_to_multiple_of=8)(rows)
        assert batch["input_ids"].shape == (2, 8)
        assert batch["attention_mask"].sum(1).tolist() == [4, 2]
        assert (batch["row"].tolist(), batch["weight"].tolist(), batch["retain_scale"].tolist()) == ([4], [0.5], [2.0])
        alone = PairedCollator(forget, None, 0)(rows)
        assert alone["input_ids"].shape == (1, 4)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][0, :4])
