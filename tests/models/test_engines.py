"""Whatever writes, the answers are those of the model, in the order of the prompts; who cannot write says why."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
import vllm_here
from builders import make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from cud_trainer.models import engines, generation
from cud_trainer.models.engines import Vllm, check_engine, check_paged, engine_of, paged
from cud_trainer.models.generation import continuations, in_batches, written_by
from cud_trainer.models.sampling import Sampling

STOP = [70, 71]


@pytest.fixture(scope="module")
def model():
    return make_model(0, num_hidden_layers=1)


@pytest.fixture
def asked():
    """Prompts and limits of all lengths, none of them in order; some write nothing, some are the same."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 258, size=size).tolist() for size in (3, 17, 1, 9, 30, 4, 9, 2, 12)]
    return [*prompts, prompts[3]], [6, 3, 12, 0, 2, 9, 12, 1, 5, 12]


@pytest.fixture
def on_cpu(monkeypatch):
    """transformers' continuous batching, which the CPU can do, too, with a cache that is small."""
    monkeypatch.setattr(engines, "PAGED_ON", ("cpu", "cuda"))
    monkeypatch.setattr(engines, "PAGED_CACHE", {"num_blocks": 16, "max_batch_tokens": 64})


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_here)
    monkeypatch.setattr(vllm_here, "MADE", [])
    monkeypatch.setattr(vllm_here, "ASKED", [])
    return vllm_here


def written(model, prompts, limits, engine, **options):
    with written_by(model, engine):
        return continuations(model, prompts, limits, **{"stop": STOP, "pad": 0, "batch_size": 2, **options})


@torch.no_grad()
def by_hand(model, prompts, limits, stop=STOP):
    """The most probable token again and again, without batch, padding or cache."""
    found = []
    for prompt, limit in zip(prompts, limits, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + limit:
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in stop:
                break
            tokens.append(token)
        found.append(tokens[len(prompt) :])
    return found


def test_greedy_is_the_same_in_any_batches_and_any_order(model, asked):
    """In float32: no two tokens of these answers are as near as rounding."""
    prompts, limits = asked
    expected = by_hand(model, prompts, limits)
    assert len({tuple(answer) for answer in expected}) > 5
    rng = np.random.default_rng(1)
    for size in (1, 3, 4, 16):
        order = rng.permutation(len(prompts))
        rows = [prompts[row] for row in order], [limits[row] for row in order]
        found = continuations(model, *rows, stop=STOP, pad=0, batch_size=size)
        assert found == [expected[row] for row in order], size


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_batch_that_takes_the_most_memory_comes_first(asked, size):
    prompts, limits = asked
    batches = generation._batches(prompts, limits, [1000] * len(prompts), size)
    assert sorted(row for batch in batches for row in batch) == [row for row, limit in enumerate(limits) if limit]
    taken = [
        len(batch) * (max(len(prompts[row]) for row in batch) + max(limits[row] for row in batch)) for batch in batches
    ]
    assert taken == sorted(taken, reverse=True)
    steps = sum(max(limits[row] for row in batch) for batch in batches)
    ranked = sorted(limits, reverse=True)
    assert steps == sum(ranked[::size])  # no other batches of this size take fewer
    plain = [max(limits[first : first + size]) for first in range(0, len(limits), size)]
    assert steps < sum(plain) or size == 1


@pytest.mark.parametrize("sampling", [None, Sampling(2.0, seed=5, draws=3)])
def test_what_does_not_fit_into_memory_is_written_in_halves(model, asked, monkeypatch, sampling):
    prompts, limits = asked
    options = {"stop": STOP, "pad": 0, "sampling": sampling}
    expected = continuations(model, prompts, limits, batch_size=1, **options)
    generate, tried, room = model.generate, [], 2

    def fits(input_ids, **given):
        tried.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **given)

    monkeypatch.setattr(model, "generate", fits)
    assert continuations(model, prompts, limits, batch_size=8, **options) == expected
    assert max(tried) > 2 and sum(size for size in tried if size <= 2) == 9 * (3 if sampling else 1)
    room = 0
    with pytest.raises(ValueError, match=r"an answer does not fit into memory by itself \(21 tokens with its prompt\)"):
        continuations(model, prompts[3:4], [12], batch_size=8, **options)


@pytest.mark.slow
def test_paged_writes_what_batches_write(model, asked, on_cpu):
    prompts, limits = asked
    before, attention, own = torch.random.get_rng_state(), model.config._attn_implementation, model.generation_config
    found = written(model, prompts, limits, paged)
    assert found == by_hand(model, prompts, limits)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.config._attn_implementation == attention and model.generation_config is own
    adapted = get_peft_model(make_model(3), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    found = written(adapted, prompts, limits, paged, stop=[])
    assert found == by_hand(adapted, prompts, limits, []) != by_hand(make_model(3), prompts, limits, [])


def test_paged_says_what_it_cannot(model, asked, monkeypatch, on_cpu):
    prompts, limits = asked
    with pytest.raises(ValueError, match="greedily alone"):
        written(model, prompts, limits, paged, sampling=Sampling())
    prompted = get_peft_model(make_model(0), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="paged cannot write with LlamaForCausalLM: its adapter is none on weights"):
        check_paged(prompted)
    stretched = make_model(0, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="its positions depend on the rest of a batch"):
        check_paged(stretched)
    torch.manual_seed(0)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    check_paged(learned)

    def fails(*_, **__):
        raise RuntimeError("out of pages")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(ValueError, match="the paged engine has failed: out of pages"):
        list(paged(model, generation.Asked(prompts, limits, STOP, 0, 2)))


def test_vllm_is_asked_for_what_batches_write(model, asked, vllm, tmp_path):
    """Each prompt with its own limit and stop tokens, each draw with its own seed; nothing else has a say."""
    prompts, limits = asked
    model.save_pretrained(tmp_path / "model")
    options = {"stop": STOP, "pad": 0, "batch_size": 2}
    with engine_of("vllm", model, str(tmp_path / "model"), longest=1000):
        assert continuations(model, prompts, limits, **options) == by_hand(model, prompts, limits)
        draws = continuations(model, prompts, limits, **options, sampling=Sampling(2.0, seed=5, draws=3))
        fewer = continuations(model, prompts[:4], limits[:4], **options, sampling=Sampling(2.0, seed=5, draws=2))
    assert [draws[row * 3 + number] for row in range(4) for number in range(2)] == fewer
    assert len(draws) == 30 and len(set(map(tuple, draws))) > 20 and [len(one) for one in draws[9:12]] == [0, 0, 0]
    made = vllm.MADE[0]
    assert made["generation_config"] == "vllm" and made["skip_tokenizer_init"] and made["dtype"] == "float32"
    assert made["max_model_len"] == 256  # the model's positions
    greedy, drawn, _ = vllm.ASKED
    assert {one.temperature for one in greedy} == {0.0} and {one.seed for one in greedy} == {None}
    assert len({one.seed for one in drawn}) == 27 and all(0 <= one.seed < 2**63 for one in drawn)
    assert all(one.ignore_eos and one.stop_token_ids == STOP and not one.detokenize for one in [*greedy, *drawn])


def test_an_engine_is_held_against_the_model(model, asked, vllm, tmp_path):
    """Other weights, an answer that ends early or goes on, a prompt that is left out."""
    prompts, limits = asked
    make_model(1, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the engine writes what the model would not"):
        written(model, prompts, limits, Vllm(str(tmp_path / "other")))

    def changed(how):
        return lambda model, asked: [(place, how(found)) for place, found in in_batches(model, asked)]

    for how in (lambda found: found[:-1], lambda found: [3, *found[1:]], lambda found: []):
        with pytest.raises(ValueError, match="what the model would not"):
            written(model, prompts, limits, changed(how))
    with pytest.raises(ValueError, match="the engine has written 8 of 9 answers"):
        written(model, prompts, limits, lambda *given: list(in_batches(*given))[1:])
    assert written(model, prompts, limits, changed(list)) == by_hand(model, prompts, limits)
    with written_by(model, changed(lambda found: [])), written_by(model, in_batches):
        pass  # what was before is put back: here nothing
    assert continuations(model, [[5]], [3], stop=[], pad=0, batch_size=1) == by_hand(model, [[5]], [3], [])
    for nothing in (([], []), ([[5], [6]], [0, 0])):  # no engine is started for it
        assert written(model, *nothing, lambda *given: 1 / 0) == [[]] * len(nothing[0])
    broken = make_model(0, num_hidden_layers=1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)  # it says nothing that could be held against anybody
    written(broken, prompts, limits, changed(list))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("paged", {}, "needs a CUDA device, here is cpu"),
        ("paged", {"drawn": True}, "writes greedily alone"),
        ("vllm", {"rounded": True}, "not those of load_in_4bit or 8bit"),
        ("vllm", {"model": "org/name"}, "takes a folder with a model, model_name_or_path 'org/name' is none"),
        ("vllm", {"model": "adapter"}, "takes a folder with a whole model, .*adapter' is an adapter"),
    ],
)
def test_refusals(vllm, tmp_path, monkeypatch, name, options, message):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    path = options.pop("model", None)
    models = {"original_model": None, "model_name_or_path": str(tmp_path / path) if path == "adapter" else path}
    with pytest.raises(ValueError, match=f"^generation_engine {name}.*{message}"):
        check_engine(name, models, **options)
    check_engine("transformers", models, **options)


def test_without_vllm_it_says_what_to_install(monkeypatch, vllm):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="vllm works in one process"):
        check_engine("vllm", {})
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^generation_engine vllm needs vLLM: pip install 'cud-trainer\[vllm\]'$"):
        check_engine("vllm", {})


def test_progress_is_tokens_per_second_on_stderr(model, asked, capsys, monkeypatch):
    monkeypatch.setattr(generation, "tqdm", partial(tqdm, mininterval=0))
    continuations(model, *asked, stop=STOP, pad=0, batch_size=2, desc="forget, generating")
    shown = capsys.readouterr()
    assert shown.out == "" and "forget, generating" in shown.err and "tokens/s" in shown.err and "9/9" in shown.err
    continuations(model, *asked, stop=STOP, pad=0, batch_size=2)
    assert capsys.readouterr() == ("", "")
