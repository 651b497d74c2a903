"""What a model writes depends on its weights, its end tokens and what is asked for, and on nothing else."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from cud_trainer.data import prepare_samples
from cud_trainer.models.generation import continuations, stop_tokens
from cud_trainer.models.sampling import Sampling, _Draw, _levels
from cud_trainer.objectives.alternatives import model_alternatives
from evaluation.metrics.memorization import evaluate_memorization, generate_answers, true_answers

LEFTOVERS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"min_new_tokens": 60},
    {"suppress_tokens": [70, 71, 72]},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20},
    {"max_length": 5},
    {"return_dict_in_generate": True},
    {"forced_eos_token_id": 1},
    {"guidance_scale": 1.5},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"stop_strings": ["e"]},
    {"bad_words_ids": [[70]], "typical_p": 0.2, "min_p": 0.3},
]


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer()
    return make_model(0, num_hidden_layers=1), tokenizer, prepare_samples(qa_dataset(5), tokenizer)


def test_the_models_generation_config_has_no_say(parts):
    model, tokenizer, data = parts
    own = model.generation_config
    greedy, drawn = (
        generate_answers(model, data, tokenizer),
        generate_answers(model, data, tokenizer, sampling=Sampling(2.0)),
    )
    assert greedy != drawn
    try:
        for leftover in LEFTOVERS:
            model.generation_config = given = GenerationConfig(eos_token_id=1, pad_token_id=0, **leftover)
            assert generate_answers(model, data, tokenizer) == greedy, leftover
            assert generate_answers(model, data, tokenizer, sampling=Sampling(2.0)) == drawn, leftover
            assert model.generation_config is given
    finally:
        model.generation_config = own


def test_an_adapter_writes_like_its_merged_model(parts):
    from peft import LoraConfig, get_peft_model

    _, tokenizer, data = parts
    model = make_model(0, num_hidden_layers=1)
    model.generation_config.repetition_penalty = 1.5
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    written = generate_answers(adapted, data, tokenizer)
    assert model.generation_config.repetition_penalty == 1.5  # put back
    assert generate_answers(adapted.merge_and_unload(), data, tokenizer) == written


def test_no_answer_depends_on_its_batch(parts):
    model, tokenizer, _ = parts
    rows = [{"question": "Who?" * k, "answer": "Person " * (1 + 4 * (k % 3))} for k in range(1, 7)]
    data = prepare_samples(Dataset.from_list(rows), tokenizer)
    for sampling in (None, Sampling()):
        several = [generate_answers(model, data, tokenizer, batch_size=b, sampling=sampling) for b in (1, 4, 6)]
        assert several[0] == several[1] == several[2]
        order = [3, 1, 5, 0, 2, 4]
        moved = generate_answers(model, data.select(order), tokenizer, batch_size=4, sampling=sampling)
        assert moved == [several[0][row] for row in order]
    prompts, limits = [[5, 6], [7] * 9, [8]], [3, 40, 1]
    written = continuations(model, prompts, limits, stop=[], pad=0, batch_size=3)
    assert [len(tokens) for tokens in written] == limits


def test_what_stops_an_answer(parts):
    model, prompts = parts[0], [[5, 6, 7]]
    whole = continuations(model, prompts, [20], stop=[], pad=0, batch_size=1)[0]
    cut = continuations(model, prompts, [20], stop=[whole[4]], pad=0, batch_size=1)[0]
    assert cut == whole[: whole.index(whole[4])]
    chat = make_tokenizer(chat=True)
    chat.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chat.chat_template = chat.chat_template.replace("'<eos>' if", "'\\n<end>\\n<eos>' if")
    assert stop_tokens(chat) == [1, 258]
    model.generation_config.eos_token_id = [1, 99]
    try:
        assert stop_tokens(chat, model) == [1, 99, 258]
    finally:
        model.generation_config.eos_token_id = 1
    chat.chat_template = "{{ raise_exception('no chat') }}"
    assert stop_tokens(chat) == [1]
    chat.eos_token = None
    assert stop_tokens(chat, make_model(0, num_hidden_layers=1, eos_token_id=None)) == []


def test_arg_max_metrics_stop_where_the_model_does(parts):
    model, tokenizer, data = parts
    first = data[0]["input_ids"][data[0]["labels"].count(-100)]  # every answer begins with it
    plain = evaluate_memorization(model, data, tokenizer)
    model.generation_config.eos_token_id = [1, first]
    try:
        values = evaluate_memorization(model, data, tokenizer)
    finally:
        model.generation_config.eos_token_id = 1
    for name in ("exact_memorization", "extraction_strength", "rouge_l_recall", "verbatim"):
        assert np.isnan(values[name]).all() and np.isfinite(plain[name]).all(), name
    np.testing.assert_array_equal(values["probability"], plain["probability"])


def test_never_past_the_models_positions():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    prompts = [[5] * 28, [6] * 3, [7] * 32, [8] * 20]
    written = continuations(model, prompts, [100] * 4, stop=[], pad=0, batch_size=4)
    assert [len(tokens) for tokens in written] == [4, 29, 0, 12]
    for prompt, tokens in zip(prompts, written, strict=True):
        assert continuations(model, [prompt], [100], stop=[], pad=0, batch_size=1)[0] == tokens


def test_plain_text_starts_where_its_continuation_does(monkeypatch):
    """Truth and continuation begin at the second token, with and without a bos token, and end together."""
    tokenizer, model = make_tokenizer(), make_model(0, num_hidden_layers=1)
    data = prepare_samples(Dataset.from_list([{"text": "Storm hit Vell."}]), tokenizer)
    tokens = data[0]["input_ids"]
    assert true_answers(data, tokenizer) == ["torm hit Vell."]

    def knows_by_heart(model, prompts, limits, **options):
        text = [*tokens, *tokenizer(" goes on and on", add_special_tokens=False)["input_ids"]]
        return [text[len(prompt) : len(prompt) + limit] for prompt, limit in zip(prompts, limits, strict=True)]

    monkeypatch.setattr("evaluation.metrics.memorization.continuations", knows_by_heart)
    cut = type(data)(data.dataset.map(lambda row: {k: row[k][:8] for k in ("input_ids", "labels")}), data.pad_token_id)
    assert generate_answers(model, cut, tokenizer) == true_answers(cut, tokenizer)  # a chunk that ends inside a word


def test_draws_are_from_the_models_distribution():
    size = 4000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    levels = torch.from_numpy(_levels([5, 6], 0, range(size), 1))
    drawn = _Draw(levels)(None, p.log().repeat(size, 1)).argmax(-1)
    found = torch.bincount(drawn, minlength=4) / size
    torch.testing.assert_close(found, p, atol=0.03, rtol=0)
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)
    assert _Draw(torch.tensor([[0.0], [1 - 2**-24]]))(None, impossible).argmax(-1).tolist() == [1, 1]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (6, 16)])
def test_many_draws_are_those_one_by_one(parts, sizes, monkeypatch):
    """However many at a time, and though the prompt is encoded once: the draws are those of whole passes."""
    model = parts[0]
    monkeypatch.setattr("cud_trainer.models.generation.DRAWN_AT_ONCE", sizes[1])
    prompts, limits = [[9, 8, 7], [5], [40] * 9, [9, 8, 7, 6]], [9, 9, 4, 0]
    options = {"stop": [70], "pad": 0}
    several = continuations(model, prompts, limits, batch_size=sizes[0], sampling=Sampling(draws=5, seed=3), **options)
    by_hand = []
    for prompt, limit in zip(prompts, limits, strict=True):
        for levels in _levels(prompt, 3, range(5), 9):
            tokens = list(prompt)
            for level in levels[:limit]:
                with torch.no_grad():
                    p = model(torch.tensor([tokens])).logits[0, -1].softmax(-1)
                tokens.append(int((p.cumsum(-1) <= level).sum()))
                if tokens[-1] == 70:
                    break
            by_hand.append([token for token in tokens[len(prompt) :] if token != 70])
    assert several == by_hand


def test_alternatives_do_not_depend_on_batches_or_leftovers():
    tokenizer, model = make_tokenizer(), make_model(0, num_hidden_layers=1)
    first = model_alternatives(model, tokenizer, qa_dataset(3), batch_size=3, seed=1, progress=False)
    model.generation_config.repetition_penalty, model.generation_config.min_p = 2.0, 0.9
    assert model_alternatives(model, tokenizer, qa_dataset(3), batch_size=1, seed=1, progress=False) == first
    assert model_alternatives(model, tokenizer, qa_dataset(3), batch_size=1, seed=2, progress=False) != first
    assert Sampling().top_p == 1.0
