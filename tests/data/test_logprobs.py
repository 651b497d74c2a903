"""Answer scores against full logits: padding, batch mates, architectures, adapters and precision."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from scipy.special import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel

from cud_trainer.data import pad_batch, prepare_dataset, prepare_samples
from cud_trainer.logprobs import answer_positions, check_padding, score_answers
from cud_trainer.models.modes import evaluation_mode
from cud_trainer.models.positions import position_ids

TEXT = [{"text": "hello"}, {"text": "a much longer one"}, {"text": "."}]


def make_gpt2():
    """Learned positions: a shifted sequence would be another one."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval().double()


def samples(rows=None):
    return list(prepare_dataset(qa_dataset(4) if rows is None else Dataset.from_list(rows), make_tokenizer()))


def to_left(batch):
    """The same batch padded on the left."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(s) for row, s in zip(value, shifts, strict=True)]) for key, value in batch.items()
    }


@torch.no_grad()
def by_hand(model, sample):
    """Log-probabilities of a sample's answer tokens, alone and unpadded, through numpy."""
    tokens = sample["input_ids"]
    table = log_softmax(model(torch.tensor([tokens])).logits[0].double().numpy(), axis=-1)
    return [table[p - 1, tokens[p]] for p in range(1, len(tokens)) if sample["labels"][p] != -100]


def assert_by_hand(scores, model, data, **tolerance):
    for row, sample in enumerate(data):
        expected = by_hand(model, sample)
        found = scores.token_logps[row][scores.mask[row]].detach().numpy()
        np.testing.assert_allclose(found, expected, **tolerance)
        assert scores.targets[row][scores.mask[row]].tolist() == [t for t in sample["labels"][1:] if t != -100]
        assert int(scores.lengths[row]) == len(expected)
        np.testing.assert_allclose(scores.logps[row].item(), sum(expected), **tolerance)
        np.testing.assert_allclose(scores.mean_logps[row].item(), sum(expected) / len(expected), **tolerance)


@pytest.mark.parametrize("rows", [None, TEXT], ids=["question-answer", "text"])
@pytest.mark.parametrize("make", [lambda: make_model(0).double(), make_gpt2], ids=["rotary", "learned"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_against_full_logits(make, rows, side):
    """Both sides of padding; in plain text the first token is a label, too, but nothing predicts it."""
    model, data = make(), samples(rows)
    batch = pad_batch(data, 0)
    scores = score_answers(model, batch if side == "right" else to_left(batch))
    assert scores.token_logps.dtype == torch.float64
    assert not scores.token_logps[~scores.mask].any() and not scores.targets[~scores.mask].any()
    assert_by_hand(scores, model, data, rtol=1e-10)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 5))
def test_does_not_depend_on_batch_mates(rows, extra):
    """Any rows together, in any order, repeated or with more padding, in float32."""
    model, data = make_model(0), samples()
    batch = pad_batch([data[row] for row in rows], 0)
    padding = {"input_ids": 77, "attention_mask": 0, "labels": -100}  # what is in the padding does not matter
    batch = {key: torch.nn.functional.pad(value, (0, extra), value=padding[key]) for key, value in batch.items()}
    together = score_answers(model, batch)
    assert_by_hand(together, model, [data[row] for row in rows], rtol=1e-4)


def test_architecture_that_ignores_logits_to_keep():
    """Only `input_ids`, `attention_mask` and `position_ids` reach the model, all its logits come back."""
    model, data = make_model(0).double(), samples()

    class Stubborn(torch.nn.Module):
        def forward(self, input_ids, attention_mask, position_ids, **ignored):
            assert set(ignored) == {"logits_to_keep", "use_cache"}
            return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    scores = score_answers(Stubborn(), pad_batch(data, 0))
    assert_by_hand(scores, model, data, rtol=1e-10)
    assert scores.logits.shape[:2] == scores.mask.shape


def test_only_answer_positions_reach_the_vocabulary():
    batch = pad_batch(samples(), 0)
    kept = answer_positions(batch["labels"])
    assert kept.tolist() == sorted(
        {p - 1 for row in batch["labels"] for p in row.ne(-100).nonzero().flatten().tolist()}
    )
    assert score_answers(make_model(0), batch).logits.shape == (4, len(kept), 258)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(dtype):
    """float64 stays; half precision is widened before the log-softmax, and the logits are handed on as they are."""
    model = make_model(0).to(dtype)
    scores = score_answers(model, pad_batch(samples(), 0))
    assert scores.logits.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert scores.token_logps.dtype == wide
    table = log_softmax(scores.logits.detach().to(torch.float64).numpy(), axis=-1)
    expected = np.take_along_axis(table, scores.targets[..., None].numpy(), -1)[..., 0] * scores.mask.numpy()
    np.testing.assert_allclose(scores.token_logps.detach().numpy(), expected, rtol=1e-5)


def test_embeddings_replace_tokens():
    model, batch = make_model(0).double(), pad_batch(samples(), 0)
    inputs = model.get_input_embeddings()(batch["input_ids"])
    found = score_answers(model, {**batch, "input_ids": None}, inputs_embeds=inputs).logps
    torch.testing.assert_close(found, score_answers(model, batch).logps)


def test_gradient_by_finite_difference():
    model, batch = make_gpt2(), pad_batch(samples(), 0)  # Llama's norms compute in float32 even here
    weight = model.transformer.h[0].mlp.c_fc.weight
    (gradient,) = torch.autograd.grad(score_answers(model, batch).mean_logps.sum(), weight)
    row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight[row, column] += step
            values.append(score_answers(model, batch).mean_logps.sum().item())
    assert gradient[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_a_row_without_an_answer_scores_zero():
    batch = pad_batch(samples(), 0)
    batch["labels"][1] = -100
    scores = score_answers(make_model(0), batch)
    assert (scores.logps[1].item(), scores.lengths[1].item(), scores.mean_logps[1].item()) == (0, 1, 0)


def test_slices():
    scores = score_answers(make_model(0), pad_batch(samples(), 0))
    tail = scores[2:]
    torch.testing.assert_close(tail.mean_logps, scores.mean_logps[2:])
    assert tail.logits.shape[0] == tail.targets.shape[0] == tail.mask.shape[0] == 2


def test_positions_follow_the_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


class TestAdapters:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_virtual_tokens_are_refused(self, wrapped):
        """They would shift the answer by their number, silently."""
        model = get_peft_model(make_model(0), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if wrapped:  # as by DistributedDataParallel

            class Wrapper(torch.nn.Module):
                def __init__(self, module):
                    super().__init__()
                    self.module = module

            model = Wrapper(model)
        with pytest.raises(ValueError, match="adapters of type .*PROMPT_TUNING.* are not supported: .* use LoRA"):
            score_answers(model, pad_batch(samples(), 0))

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ],
        ids=["lora", "prefix"],
    )
    def test_others_agree_with_full_logits(self, config):
        torch.manual_seed(0)
        model = get_peft_model(make_model(0).double(), config).double().eval()
        data = samples()
        assert_by_hand(score_answers(model, pad_batch(data, 0)), model, data, rtol=1e-10)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_mode_puts_every_module_back(fails):
    """A model in training with a part in evaluation (frozen batch norms, disabled dropouts) comes back like that."""
    model = make_model(0).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_that_reads_the_padding_is_refused(tmp_path):
    from every_model import tiny
    from runs import make_trainer

    from cud_trainer import score_difficulty

    tokenizer, data = make_tokenizer(), qa_dataset(6)
    for model in (make_model(0), make_model(0).bfloat16()):
        check_padding(model, "forget", prepare_samples(data, tokenizer))
    # counts the tokens that are not 0, wherever they stand
    model = tiny("cpmant")
    for refused in (
        lambda: score_difficulty(model, data, tokenizer, metrics=["loss"], progress=False),
        lambda: make_trainer(
            tmp_path, model=model, difficulty="none", schedule="uniform", gradient_checkpointing=False
        ),
    ):
        with pytest.raises(ValueError, match="CpmAntForCausalLM reads the padding"):
            refused()
