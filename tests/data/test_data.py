"""Samples: every format, the answer mask, ids, batches, and refusals that name the sample."""

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.data import (
    PairedCollator,
    Samples,
    check_disjoint,
    dataset_fingerprint,
    pad_batch,
    prepare_dataset,
)
from cud_trainer.data.encode import Encoder, shared
from cud_trainer.data.encode import parts as texts_in_parts

CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}


def prepare(rows, tokenizer=None, **options):
    dataset = rows if hasattr(rows, "column_names") else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer or make_tokenizer(), **options)


def samples(rows):
    return Samples(prepare(rows), 0)


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

    @pytest.mark.parametrize(
        ("beside", "message"),
        [
            ({"seq_lengths": [2, 3]}, "2 documents packed into one row"),
            ({"position_ids": [0, 1, 0, 1, 2]}, "position_ids are not 0, 1, 2"),
            ({"attention_mask": [0, 1, 1, 1, 1]}, "attention_mask hides tokens"),
        ],
    )
    def test_packed_and_padded_tokens_are_refused(self, beside, message):
        row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, 9]}
        whole = {"seq_lengths": [5], "position_ids": [0, 1, 2, 3, 4], "attention_mask": [1] * 5}
        assert prepare([{**row, **{name: whole[name] for name in beside}}])[0]["input_ids"] == row["input_ids"]
        with pytest.raises(ValueError, match=f"forget sample 1: .*{message}"):
            prepare([{**row, **{name: whole[name] for name in beside}}, {**row, **beside}])

    def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer(self):
        """'s b' is one token: the prompt tokenised alone ends differently from the whole."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<pad>": 0, "<eos>": 1, "s": 2, "b": 3, "sb": 4, "x": 5}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("s", "b")]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
        sample = prepare([{"prompt": "xs", "completion": "bx"}], tokenizer)[0]
        assert sample["input_ids"] == [5, 4, 5, 1] and sample["labels"] == [-100, 4, 5, 1]

    @settings(deadline=None, max_examples=60)
    @given(st.text("abs ", min_size=0, max_size=8), st.text("abs", min_size=1, max_size=8))
    def test_the_prompt_is_whole_tokens_of_the_prompt(self, prompt, completion):
        """Whatever a tokenizer merges: the masked part decodes to a start of the prompt, the rest to what follows."""
        tokenizer = merging_tokenizer()
        sample = prepare([{"prompt": prompt, "completion": completion}], tokenizer)[0]
        masked = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100]
        assert sample["input_ids"] == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        assert sample["labels"] == [-100] * len(masked) + sample["input_ids"][len(masked) :]
        assert prompt.startswith(tokenizer.decode(masked))
        alone = tokenizer(prompt)["input_ids"]
        assert alone[: len(masked)] == masked
        if len(masked) < len(alone):  # stops early only where the tokens do change
            assert sample["input_ids"][len(masked)] != alone[len(masked)]

    def test_tokens_given_may_have_holes(self):
        """Labels that skip tokens in the middle are taken as they are."""
        labels = [-100, 5, -100, 7]
        assert prepare([{"input_ids": [4, 5, 6, 7], "labels": labels}])[0]["labels"] == labels

    def test_an_eos_that_is_there_is_not_doubled(self):
        tokenizer = make_tokenizer()
        for row in ({"prompt": "a", "completion": "b<eos>"}, {"text": "ab<eos>"}):
            assert prepare([row], tokenizer)[0]["input_ids"].count(tokenizer.eos_token_id) == 1

    @pytest.mark.parametrize("conversational", [False, True])
    def test_agrees_with_trl(self, tmp_path, conversational):
        from tokenizers.processors import TemplateProcessing
        from trl import SFTConfig, SFTTrainer

        tokenizer = make_tokenizer(True)
        rows = [
            CHAT,
            {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]},
            {
                "prompt": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")],
                "completion": [{"role": "assistant", "content": "Because."}],
            },
        ]
        if not conversational:
            # A start token before everything, as Llama's tokenizers have it; one completion brings its own eos.
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<pad> $A", special_tokens=[("<pad>", 0)]
            )
            rows = [
                {"prompt": "The sky is", "completion": " blue."},
                {"prompt": "Grass:", "completion": " green<eos>"},
                {"prompt": "é ", "completion": "\n\nö"},
            ]
        trainer = SFTTrainer(
            make_model(),
            SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        mine = prepare(rows, tokenizer)
        for theirs, ours in zip(trainer.train_dataset, mine, strict=True):
            assert theirs["input_ids"] == ours["input_ids"] and theirs["labels"] == ours["labels"]


def merging_tokenizer():
    """Byte-level tokens with merges, also across the boundary of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = ["<pad>", "<eos>", "a", "b", "s", "Ġ", "ab", "bs", "abs", "Ġs", "sa"]
    merges = [("a", "b"), ("b", "s"), ("ab", "s"), ("Ġ", "s"), ("s", "a")]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = space, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


class TestIds:
    def test_from_a_column(self):
        rows = [{"id": i, "text": f"t{i}"} for i in (7, 3)]
        assert list(prepare(rows)["sample_id"]) == ["7", "3"]
        assert list(prepare([{"sample_id": "a", "id": 1, "text": "t"}])["sample_id"]) == ["a"]

    def test_from_the_content_whatever_the_order(self):
        first, reverse = prepare(qa_dataset(4)), prepare(qa_dataset(4).select([3, 2, 1, 0]))
        assert list(first["sample_id"]) == list(reverse["sample_id"])[::-1]
        assert first["sample_id"][0] == "sha256:106ef231441914ce"  # the same on every machine
        assert dataset_fingerprint(first) != dataset_fingerprint(reverse)
        assert dataset_fingerprint(first) == dataset_fingerprint(prepare(qa_dataset(4)))

    @pytest.mark.parametrize("view", ["numpy", "torch", "pandas"])
    def test_do_not_depend_on_how_the_user_views_the_data(self, view):
        tokens = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "author": "A"}])
        for data in (tokens, qa_dataset(2)):
            keep = [data.column_names[-1]] if data is tokens else []
            plain, viewed = (prepare(d, keep_columns=keep) for d in (data, data.with_format(view)))
            assert viewed.to_list() == plain.to_list()
            assert dataset_fingerprint(viewed) == dataset_fingerprint(plain)

    @pytest.mark.parametrize("change", [{"sample_id": "b"}, {"input_ids": [5, 6, 8]}, {"labels": [-100, -100, 7]}])
    def test_the_fingerprint_sees_every_change(self, change):
        row = {"sample_id": "a", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
        assert dataset_fingerprint(Dataset.from_list([row])) != dataset_fingerprint(
            Dataset.from_list([{**row, **change}])
        )

    def test_a_prepared_dataset_stays_as_it_is(self):
        once = prepare(qa_dataset(3))
        assert prepare(once).to_list() == once.to_list()

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
            (
                Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": "  "}]),
                "forget sample 1: its answer is empty",
            ),
            (
                Dataset.from_list([{"id": "s1", "prompt": "a", "completion": None}]),
                "sample 's1': its completion is empty",
            ),
            (Dataset.from_list([{"text": ""}]), "sample 0: its text is empty"),
            (Dataset.from_list([{"question": "q", "answer": "long " * 20, "id": "x9"}]), "'x9'.* beyond max_length=40"),
            (
                Dataset.from_list([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]),
                "the id '1' twice \\(rows 0 and 1\\)",
            ),
            (Dataset.from_list([{"text": "a"}, {"text": "a"}]), "twice \\(rows 0 and 1\\)"),
            (
                Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]),
                "last message must be the assistant",
            ),
            (
                Dataset.from_list([{"messages": [*CHAT["prompt"], *CHAT["completion"]]}]),
                "tokenizer has no chat template",
            ),
            (Dataset.from_list([{"input_ids": [4, 5], "labels": [4, -100]}]), "no answer token that can be predicted"),
            (Dataset.from_list([{"input_ids": [4, 5], "labels": [4]}]), "differ in length"),
        ],
    )
    def test_dataset(self, dataset, message):
        with pytest.raises(ValueError, match=message):
            prepare_dataset(dataset, make_tokenizer(), max_length=40)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": None, "answer": "SECRET"}, "sample 0: its question is missing"),
            ({"question": "q", "answer": None}, "sample 0: its answer is empty"),
            ({"prompt": None, "completion": "SECRET"}, "sample 0: its prompt is missing"),
            ({"prompt": "SECRET", "completion": ""}, "sample 0: its completion is empty"),
            ({"prompt": CHAT["prompt"], "completion": "SECRET"}, "must both be strings or both be lists of messages"),
            (
                {"prompt": "SECRET", "completion": CHAT["completion"]},
                "must both be strings or both be lists of messages",
            ),
            ({"prompt": CHAT["prompt"], "completion": None}, "last message must be the assistant's"),
            (
                {"prompt": CHAT["prompt"], "completion": [{"role": "user", "content": "SECRET"}]},
                "must be the assistant's",
            ),
            ({"messages": None}, "last message must be the assistant's"),
            ({"messages": "SECRET"}, "its messages are no list"),
            ({"messages": ["SECRET"]}, "a message must have a role and a content, got a str"),
            (
                {"messages": [{"content": "SECRET"}]},
                "a message must have a role and a content, got the keys \\['content'\\]",
            ),
            (
                {"messages": [{"role": "user", "content": "SECRET"}, {"role": "assistant", "content": None}]},
                "assistant message is empty",
            ),
            ({"messages": [{"role": "assistant", "content": "  "}]}, "assistant message is empty"),
            ({"text": None}, "its text is empty"),
            ({"text": 5}, "its text is of the type int, no text"),
            ({"id": None, "text": "SECRET"}, "forget sample 0 has no id"),
            ({"id": "s1", "text": "SECRET " * 9}, "'s1': its answer ends at token 64, beyond max_length=40"),
            (
                {"input_ids": [4, 5, 6], "labels": [-100, 6, 7]},
                "label 6 at position 1 is neither -100 nor the token there, 5",
            ),
            ({"input_ids": [4, 5, 6], "labels": None}, "its labels are missing"),
            ({"input_ids": [], "labels": []}, "no answer token that can be predicted"),
            ({"input_ids": [4, 5, 6], "labels": [4, -100, -100]}, "no answer token that can be predicted"),
        ],
    )
    def test_row(self, row, message):
        """Every malformed row is named, and its text is not repeated."""
        with pytest.raises(ValueError, match=message) as error:
            prepare_dataset(Dataset.from_list([row]), make_tokenizer(chat=True), max_length=40)
        assert "SECRET" not in str(error.value) and "sample" in str(error.value)

    def test_the_sample_at_fault_is_named_by_its_content_id(self):
        good, long = {"text": "short"}, {"text": "long " * 20}
        found = prepare([good, long], max_length=None)["sample_id"][1]
        with pytest.raises(ValueError, match=f"forget sample {found} \\(row 1\\): its answer ends at token 101"):
            prepare([good, long], max_length=100)
        assert len(prepare([good, long], max_length=101)) == 2  # the limit itself is allowed

    def test_columns_to_keep(self):
        rows = [{"text": "a", "labels": 1, "sample_id": "x"}]
        with pytest.raises(ValueError, match="no column 'author'; it has \\['labels', 'sample_id', 'text'\\]"):
            prepare(rows, keep_columns=["author"])
        for column in ("labels", "sample_id", "secret", "counted", "content", "alternative_labels"):
            with pytest.raises(ValueError, match=f"column '{column}' cannot be kept beside the prepared one"):
                prepare([{column: "mine", **rows[0]}], keep_columns=[column])

    def test_tokenizer(self):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = None
        prepare(qa_dataset(1), tokenizer)
        assert tokenizer.pad_token == "<eos>"  # as in TRL
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no eos token"):
            prepare(qa_dataset(1), tokenizer)

    def test_overlap(self):
        forget = samples([{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
        with pytest.raises(ValueError, match="sample 'b' is in both"):
            check_disjoint(forget, samples([{"id": "b", "text": "other"}]))
        with pytest.raises(ValueError, match="'a' has the same content as retain sample 'z'"):
            check_disjoint(forget, samples([{"id": "z", "text": "one"}]))
        check_disjoint(forget, samples([{"id": "z", "text": "three"}]))


class TestBatches:
    def test_padding(self):
        batch = pad_batch(
            [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}], 0
        )
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]

    def test_every_sample_once_longest_first(self):
        prepared = samples(qa_dataset(11))
        seen, widths = [], []
        for rows, batch in prepared.batches(4):
            seen += rows
            widths.append(batch["input_ids"].shape[1])
            for row, tokens in zip(rows, batch["input_ids"], strict=True):
                assert tokens[: len(prepared[row]["input_ids"])].tolist() == prepared[row]["input_ids"]
        assert sorted(seen) == list(range(11)) and widths == sorted(widths, reverse=True)

    @settings(deadline=None, max_examples=20)
    @given(st.integers(1, 12), st.lists(st.integers(2, 9), min_size=1, max_size=9))
    def test_batches_cover_each_row_once(self, batch_size, lengths):
        rows = [{"sample_id": str(i), "input_ids": [i + 2] * n, "labels": [i + 2] * n} for i, n in enumerate(lengths)]
        batches = list(Samples(Dataset.from_list(rows), 0).batches(batch_size))
        assert len(batches) == -(-len(lengths) // batch_size)
        assert sorted(row for chunk, _ in batches for row in chunk) == list(range(len(lengths)))
        for chunk, batch in batches:
            assert batch["input_ids"].shape == (len(chunk), max(lengths[row] for row in chunk))
            assert batch["attention_mask"].sum(1).tolist() == [lengths[row] for row in chunk]
            assert batch["input_ids"][:, 0].tolist() == [row + 2 for row in chunk]

    def test_pairs_by_hand(self):
        def prepared(*samples):
            rows = [{"sample_id": str(s), "input_ids": s, "labels": [-100, *s[1:]]} for s in samples]
            return Samples(Dataset.from_list(rows), 0)

        collate = PairedCollator(prepared([2, 3], [4, 5, 6]), prepared([7, 8, 9, 10], [11, 12]), 5)
        rows = [
            {"row": 0, "forget_index": 1, "retain_index": 1, "weight": 0.25, "retain_scale": 1.0},
            {"row": -1, "forget_index": 0, "retain_index": 0, "weight": 0.0, "retain_scale": 0.0},
        ]
        batch = collate(rows)
        expected = {
            "input_ids": [[4, 5, 6, 0, 0], [2, 3, 0, 0, 0], [11, 12, 0, 0, 0], [7, 8, 9, 10, 0]],
            "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
            "labels": [[-100, *row, *[-100] * (4 - len(row))] for row in ([5, 6], [3], [12], [8, 9, 10])],
            "row": [0, -1],
            "forget_index": [1, 0],
            "retain_index": [1, 0],
            "weight": [0.25, 0.0],
            "retain_scale": [1.0, 0.0],
        }
        assert {key: value.tolist() for key, value in batch.items()} == expected
        assert all(batch[key].dtype == torch.int64 for key in list(expected)[:6])
        assert PairedCollator(collate.forget, collate.retain, 4)(rows)["input_ids"].shape == (4, 4)  # none needed
        plain = collate([{"input_ids": [5, 6], "labels": [-100, 6]}])  # an evaluation batch
        assert {key: value.tolist() for key, value in plain.items()} == {
            "input_ids": [[5, 6]],
            "attention_mask": [[1, 1]],
            "labels": [[-100, 6]],
        }

    def test_pairs(self):
        forget, retain = samples([{"text": "abc"}]), samples([{"text": "defgh"}, {"text": "i"}])
        rows = [{"row": 4, "forget_index": 0, "retain_index": 1, "weight": 0.5, "retain_scale": 2.0}]
        batch = PairedCollator(forget, retain, pad_to_multiple_of=8)(rows)
        assert batch["input_ids"].shape == (2, 8)
        assert batch["attention_mask"].sum(1).tolist() == [4, 2]
        assert (batch["row"].tolist(), batch["weight"].tolist(), batch["retain_scale"].tolist()) == ([4], [0.5], [2.0])
        alone = PairedCollator(forget, None)(rows)
        assert alone["input_ids"].shape == (1, 4)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][0, :4])


class TestBatchesOfTexts:
    """Where the tokens of a text tell how many of them its start has, the start is not tokenised."""

    @pytest.fixture(
        scope="class", params=["bytes", "merged", "digits", "words", "dropping", "lookahead", "single", "ending"]
    )
    def encoder(self, request):
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE(unk_token="<unk>" if request.param == "words" else None))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = {
            "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
            "words": pre_tokenizers.Metaspace(),
            "dropping": pre_tokenizers.Metaspace(),
            # groups of three digits, counted from the right: what stands in front depends on what comes behind
            "lookahead": pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*(\D|$))|\D"), "isolated"), raw]
            ),
        }.get(request.param, byte_level)
        backend.normalizer = normalizers.NFC() if request.param == "merged" else None
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        text = "Question: who wrote it? Answer: nobody wrote 123456 of it, it's the the then there e\u0301t\u00e9. "
        backend.train_from_iterator([text * 5], trainer)
        if request.param == "single":
            backend.add_tokens([AddedToken("nobody", single_word=True)])
        if request.param == "ending":
            backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
        return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"))

    @given(
        st.lists(
            st.tuples(*[st.text(alphabet="ath 12:\n.'e\u0301\u00e9\u4e2d<", max_size=6)] * 2)
            | st.tuples(
                *[st.sampled_from(["Answer:", " nobody", "nobody", "the", "12", "3456", "<eos>", " ", "\n"])] * 2
            ),
            min_size=1,
            max_size=8,
        )
    )
    @settings(deadline=None, max_examples=60)
    def test_starts_are_those_of_two_calls(self, encoder, pairs):
        starts, texts = [a for a, _ in pairs], [a + b for a, b in pairs]
        encoded = encoder(texts)
        expected = [shared(alone.ids, whole.ids) for alone, whole in zip(encoder(starts), encoded, strict=True)]
        assert encoder.beginnings(starts, texts, encoded) == expected

    def test_of_a_usual_text_they_are_read_off(self, encoder, request):
        kind = request.node.callspec.params["encoder"]
        starts, texts = ["Question: who?\nAnswer:"], ["Question: who?\nAnswer: nobody"]
        calls = []
        counting = Encoder(lambda texts, **options: calls.append(texts) or encoder.tokenizer(texts, **options))
        vars(counting)["_words_stand_alone"], vars(counting)["_special_ids"] = encoder._words_stand_alone, {1}
        count = counting.beginnings(starts, texts, counting(texts))
        assert encoder._words_stand_alone == (kind not in ("dropping", "lookahead", "single"))
        assert len(calls) == (1 if encoder._words_stand_alone else 2)
        assert count == [len(encoder(starts)[0].ids) - (kind == "ending")]

    def test_parts_come_in_order(self, encoder, monkeypatch):
        monkeypatch.setattr("cud_trainer.data.encode.PART", 3)
        texts = [f"the {number}" for number in range(10)]
        each = list(encoder.each((part, part) for part in texts_in_parts(texts)))
        assert [one.ids for _, encoded in each for one in encoded] == [one.ids for one in encoder(texts)]
        assert [text for part, _ in each for text in part] == texts

    def test_many_rows_are_those_of_single_rows(self, monkeypatch):
        """Also where the shape of a conversation changes from row to row, and some answers have blanks at their ends."""
        monkeypatch.setattr("cud_trainer.data.encode.PART", 7)
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b"}]
        answers = ["Yes.", " Yes.", "Yes. ", "Yes.<eos>", "<think>why</think>Yes.", "[assistant]Yes.", "a b"]
        rows = []
        for number in range(30):
            asked = [*(turns if number % 3 == 0 else []), {"role": "user", "content": f"{number}?"}]
            answered = {"role": "assistant", "content": answers[number % 7]}
            rows.append({"messages": [*asked, answered], "id": f"s{number}"})
        together = prepare(rows, make_tokenizer(chat=True)).to_list()
        assert together == [prepare([row], make_tokenizer(chat=True))[0] for row in rows]
