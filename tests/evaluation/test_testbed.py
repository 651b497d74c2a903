"""The generated world: the same text everywhere, disjoint parts, a model that comes to know it."""

import hashlib
import json

import pytest
import torch

from cud_trainer.data import prepare_samples
from evaluation.testbed import build_testbed, fictitious_authors, memorise, tiny_llama, train_tokenizer


@pytest.fixture(scope="module")
def world():
    return build_testbed(0)


def test_text_is_a_pure_function_of_the_seed():
    rows = fictitious_authors(3, 4, 7)
    assert rows == fictitious_authors(3, 4, 7) != fictitious_authors(3, 4, 8)
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()
    assert digest[:16] == "5a278c0f7402e7cc", (
        "the text of a seed changed: results of earlier demos cannot be reproduced"
    )
    assert all(row["author"] in row["question"] and row["answer"].strip() for row in rows)
    assert len({(row["author"], row["fact"]) for row in rows}) == 12


def test_parts(world):
    sizes = [len(part) for part in (world.forget, world.retain, world.retain_eval, world.train)]
    assert sizes == [120, 160, 80, 360]
    forget, retain = set(world.forget["author"]), set(world.retain["author"])
    assert not forget & retain and set(world.retain_eval["author"]) <= retain
    questions = [*world.forget["question"], *world.retain["question"], *world.retain_eval["question"]]
    assert len(set(questions)) == 360
    assert not {name for name in forget for text in world.retain["answer"] if name in text}
    counts = sorted(set(world.forget["repeats"]))
    assert counts == [1, 2, 4] and set(world.retain["repeats"]) == {1}


def test_tokenizer_gives_the_text_back(world):
    tokenizer = train_tokenizer(world.texts())
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None and tokenizer.chat_template is None
    for text in world.texts()[:20]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = train_tokenizer(world.texts())
    assert again.get_vocab() == tokenizer.get_vocab()
    prepare_samples(world.train, tokenizer, max_length=64, name="train")


def test_only_the_answer_and_its_end_are_learned(world):
    tokenizer = train_tokenizer(world.texts())
    prepared = prepare_samples(world.forget, tokenizer, max_length=64, name="forget")
    for row, tokens, labels in zip(world.forget, prepared["input_ids"], prepared["labels"], strict=True):
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        assert tokens == prompt + answer
        assert labels == [-100] * len(prompt) + answer


def test_names_are_unique_and_first_authors_do_not_depend_on_how_many_follow():
    rows = fictitious_authors(300, 1, 0)
    assert len({row["author"] for row in rows}) == 300
    assert fictitious_authors(20, 1, 0) == rows[:20]
    three = fictitious_authors(20, 1, 0, phrasings=3)
    assert len({row["question"] for row in three}) == 60
    assert all(len({row["answer"] for row in three[i : i + 3]}) == 1 for i in range(0, 60, 3))
    with pytest.raises(ValueError, match="facts_per_author must be in"):
        fictitious_authors(1, 99, 0)


def test_memorising_is_repeatable_and_lowers_the_loss():
    small = build_testbed(1, n_forget_authors=1, n_retain_authors=1, facts_per_author=3)
    tokenizer = train_tokenizer(small.texts(), vocab_size=300)
    runs = []
    for _ in range(2):
        model = tiny_llama(tokenizer, 0, layers=1, hidden_size=32, intermediate_size=32, heads=4, kv_heads=2)
        found = memorise(model, tokenizer, small, epochs=4, batch_size=4, progress=False)
        runs.append((found.losses, [p.clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0] and runs[0][0][-1] < runs[0][0][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1"):
        memorise(model, tokenizer, small, epochs=0)


def test_held_out_authors_are_memorised_and_in_no_other_set(world):
    """Nothing else changes: a world with them has the same forget and retain sets."""
    more = build_testbed(0, n_heldout_authors=2)
    assert world.held_out is None and more.held_out is not None
    for name in ("forget", "retain", "retain_eval"):
        assert getattr(more, name).to_list() == getattr(world, name).to_list()
    authors = set(more.held_out["author"])
    assert len(authors) == 2 and len(more.held_out) == 20
    assert not authors & {*more.forget["author"], *more.retain["author"]}
    assert len(more.train) == len(world.train) + 20 and set(more.held_out["question"]) <= set(more.train["question"])
