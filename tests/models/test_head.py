"""The head a few positions at a time: the same scores, losses and gradients as with all logits, in float64."""

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from every_model import tiny
from peft import LoraConfig, get_peft_model
from runs import make_trainer
from transformers import LlamaForCausalLM

from cud_trainer.data import PairedCollator, pad_batch, prepare_samples
from cud_trainer.logprobs import read_answers
from cud_trainer.models.head import BYTES_OF_A_LOGIT, HeadStates, positions_at_once
from cud_trainer.models.modes import left_as_found
from cud_trainer.objectives import OBJECTIVES, UnlearningLoss
from cud_trainer.objectives.alternatives import with_alternatives

AT_ONCE = 5
SPEED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
FEW = 258 * BYTES_OF_A_LOGIT * AT_ONCE


@pytest.fixture(scope="module")
def batch():
    return pad_batch(list(prepare_samples(qa_dataset(3), make_tokenizer())), 0)


def scored(model, batch, logits_bytes):
    """What was read, the scores, and every gradient of their sum weighted by position."""
    kinds = []

    def read(scores):
        kinds.append(type(scores.head))
        (entropy,) = scores.map_rows(lambda some, rows: ((some.logits.log_softmax(-1) ** 2).sum(-1),))
        return scores.token_logps, entropy

    values = read_answers(model, batch, read, logits_bytes=logits_bytes)
    weights = torch.arange(1.0, values[0].numel() + 1, dtype=torch.float64).view_as(values[0])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(sum((weights * v).sum() for v in values), list(trained.values()), allow_unused=True)
    return kinds[0], values, dict(zip(trained, found, strict=True))


def check_same(model, batch, kind=HeadStates):
    (whole, values, gradients), (few, some, others) = (scored(model, batch, size) for size in (0, FEW))
    assert whole is torch.Tensor and few is kind
    torch.testing.assert_close(some, values, rtol=1e-9, atol=1e-9)
    scale = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-8, atol=1e-11 * scale, msg=name)


# A plain head, a tied one, a cap, two kinds of scale, biases, a decoder in a decoder.
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 7.0}),
        ("phi", {}),
        ("opt", {}),
        ("gptj", {}),
    ],
)
def test_whatever_a_model_does_behind_its_decoder(model_type, settings, batch):
    check_same(tiny(model_type, **settings).double().eval(), batch)


def test_an_adapter_on_the_head(batch):
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = get_peft_model(make_model(0).double(), LoraConfig(r=2, init_lora_weights=False, **options))
        check_same(model.eval(), batch)


def test_a_model_that_does_not_show_the_states_makes_all_logits(batch):
    """What it calls its decoder is its head."""
    check_same(tiny("modernbert-decoder").double().eval(), batch, kind=torch.Tensor)


class ByPlace(LlamaForCausalLM):
    """Says something else of a state by itself."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        outputs = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if not isinstance(logits_to_keep, int):
            outputs.logits = outputs.logits * (1 + logits_to_keep[:, None] / 10)
        return outputs


def test_a_head_that_looks_at_the_place_makes_all_logits(batch):
    check_same(ByPlace(make_model(0).config).double().eval(), batch, kind=torch.Tensor)


def test_compiled_models_and_split_weights_make_all_logits():
    model = make_model(0)
    assert positions_at_once(model, 1000, FEW) == AT_ONCE
    assert positions_at_once(torch.compile(model, backend="eager"), 1000, FEW) is None
    split = make_model(0)
    split.lm_head.weight.ds_id = 0  # what DeepSpeed's stage 3 puts on a weight
    assert positions_at_once(split, 1000, FEW) is None
    assert positions_at_once(model, AT_ONCE, FEW) is None and positions_at_once(model, 1000, 0) is None


def test_checkpointed_layers_and_autocast(batch):
    model = make_model(0)
    with left_as_found(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            (_, values, gradients), (kind, some, others) = (scored(model, batch, size) for size in (0, FEW))
    assert kind is HeadStates
    torch.testing.assert_close(some, values, rtol=0.02, atol=0.05)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm() / gradient.norm()) < 0.03, name


def paired(step):
    tokenizer = make_tokenizer()
    forget, retain = prepare_samples(qa_dataset(3), tokenizer), prepare_samples(qa_dataset(4, 50), tokenizer)
    if step.uses_alternative:
        forget = with_alternatives(forget, qa_dataset(3), tokenizer, "refusal")
    rows = [
        {"row": 0, "forget_index": f, "retain_index": r, "weight": 1.0, "retain_scale": 1.0}
        for f, r in [(0, 3), (2, 0), (1, 1)]
    ]
    return forget, retain, PairedCollator(forget, retain, alternative=step.uses_alternative)(rows)


@pytest.mark.parametrize(
    ("objective", "retain_loss", "apart"),
    [*((name, "kl", False) for name in sorted(OBJECTIVES)), ("npo", "nll", False), ("undial", "kl", True)],
)
def test_losses_and_gradients_of_every_objective(objective, retain_loss, apart):
    found = []
    for size in (0, FEW):
        step = UnlearningLoss(objective, {}, retain_loss, reference_top_k=9, logits_bytes=size)
        forget, retain, batch = paired(step)
        model, original = make_model(1).double(), make_model(0).double()
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu")
        if apart:
            terms = step.side("forget", model, batch, reference)
            terms.retain = step.side("retain", model, batch, reference).retain
        else:
            terms = step(model, batch, reference)
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        ((terms.forget + terms.retain) * weights).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        tops = [*reference.forget_top.logps, *reference.retain_top.logps, *reference.retain_top.rest]
        found.append((terms.forget, terms.retain, terms.mean_logps, reference.forget_logps, tops, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", ["npo", "pdu"])
def test_no_more_logits_at_a_time(objective):
    """In the forward and in the backward pass: `AT_ONCE` positions, or one sample."""
    step, seen = UnlearningLoss(objective, {}, "kl", logits_bytes=FEW), []
    forget, retain, batch = paired(step)
    model = make_model(0).double()
    reference = step.reference(model, forget, retain, batch_size=3, device="cpu")
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    terms = step(model, batch, reference)
    longest = int((batch["labels"][:, 1:] != -100).any(0).sum())
    assert len(batch["labels"]) < max(seen) <= longest  # the first call: one position of every sample
    forward = len(seen)
    (terms.forget + terms.retain).sum().backward()
    assert len(seen) > forward + 2 and max(seen[forward:]) <= longest


def test_a_run_is_the_same_run(tmp_path):
    """Also where the sizes of updates are logged, for which the output layer is looked at."""
    logs = []
    for name, size in (("all", 0), ("few", FEW)):
        options = {
            "objective": "npo",
            "retain_loss": "kl",
            "log_update_share": True,
            "logging_steps": 2,
            "n_buckets": 2,
        }
        trainer = make_trainer(tmp_path / name, logits_bytes=size, **options)
        trainer.train()
        logs.append([v for entry in trainer.state.log_history for k, v in sorted(entry.items()) if k not in SPEED])
        kinds = {key for entry in trainer.state.log_history for key in entry}
        assert "update_share/retain" in kinds
    assert len(logs[0]) > 20
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-6, atol=1e-9)
