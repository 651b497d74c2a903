"""Log-probabilities and objectives against formulas by hand, finite differences and known limits."""

import itertools
import math

import pytest
import torch
from conftest import make_model, make_tokenizer, qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from cud_trainer.data import PairedCollator, pad_batch, prepare_dataset
from cud_trainer.logprobs import score_answers
from cud_trainer.objectives import OBJECTIVES, Reference, UnlearningLoss, register_objective
from cud_trainer.objectives.retain import retain_kl, retain_nll
from cud_trainer.options import keyword_options

L = torch.tensor([-1.5, -8.0, -0.1], dtype=torch.float64)
R = torch.tensor([-2.0, -3.0, -0.2], dtype=torch.float64)
N = torch.tensor([3, 4, 1])


def loss(name, logps=L, **options):
    return OBJECTIVES[name].loss(logps, N, R, **options)


def gradient(name, **options):
    logps = L.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(name, logps, **options).sum(), logps)
    return result


class TestFormulas:
    def test_by_hand(self):
        for i in range(3):
            l, r, n = float(L[i]), float(R[i]), int(N[i])  # noqa: E741
            assert float(loss("ga")[i]) == pytest.approx(l / n)
            assert float(loss("graddiff")[i]) == pytest.approx(l / n)
            expected = -(2 / 0.3) * math.log(1 / (1 + math.exp(0.3 * (l - r))))
            assert float(loss("npo", beta=0.3)[i]) == pytest.approx(expected)
            expected = -(2 / 2.5) * math.log(1 / (1 + math.exp(2.5 * l / n + 0.7)))
            assert float(loss("simnpo", beta=2.5, gamma=0.7)[i]) == pytest.approx(expected)

    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    def test_gradient_by_finite_difference_and_pushes_down(self, name):
        exact = gradient(name)
        step = 1e-6
        numeric = (loss(name, L + step) - loss(name, L - step)) / (2 * step)
        torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
        assert (exact > 0).all()  # minimising it lowers the log-probability

    def test_limits(self):
        torch.testing.assert_close(gradient("npo", beta=1e-9), torch.ones_like(L))  # gradient ascent on l
        at_reference = OBJECTIVES["npo"].loss(R, N, R, beta=0.1)
        torch.testing.assert_close(at_reference, torch.full_like(R, 20 * math.log(2)))
        torch.testing.assert_close(gradient("simnpo", beta=1e-9), 1 / N.double())
        assert float(loss("npo", torch.full_like(L, -1e4))[0]) == pytest.approx(0)  # forgotten: nothing left to push
        assert torch.isfinite(loss("npo", torch.full_like(L, -1e6))).all()

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 10_000))
    def test_kl_is_exact_for_the_whole_vocabulary_and_grows_with_k(self, seed):
        generator = torch.Generator().manual_seed(seed)
        reference, current = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64) * 2
        mask = torch.tensor([[True, True, False], [True, False, False]])
        per_token = kl_divergence(Categorical(logits=reference), Categorical(logits=current))
        exact = (per_token * mask).sum(1) / mask.sum(1)
        found = []
        for k in range(1, 8):
            top, ids = reference.log_softmax(-1).topk(k, -1)
            found.append(retain_kl(current, mask, top, ids))
        torch.testing.assert_close(found[-1], exact)
        assert all((b >= a - 1e-9).all() and (a >= -1e-12).all() for a, b in itertools.pairwise(found))
        top, ids = current.log_softmax(-1).topk(3, -1)
        torch.testing.assert_close(retain_kl(current, mask, top, ids), torch.zeros(2, dtype=torch.float64))

    def test_retain_nll(self):
        torch.testing.assert_close(retain_nll(L, N), torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64))


class TestScores:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_against_full_logits(self, side):
        model, tokenizer = make_model(0).double(), make_tokenizer()
        data = prepare_dataset(qa_dataset(4), tokenizer)
        batch = pad_batch(list(data), 0)
        if side == "left":
            for row in range(4):
                shift = int((batch["attention_mask"][row] == 0).sum())
                for key in batch:
                    batch[key][row] = batch[key][row].roll(shift)
        scores = score_answers(model, batch)
        assert scores.token_logps.dtype == torch.float64
        for row, sample in enumerate(data):
            tokens, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
            with torch.no_grad():
                logps = model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
            answer = logps[labels[1:] != -100]
            assert float(scores.logps[row]) == pytest.approx(float(answer.sum()))
            assert int(scores.lengths[row]) == len(answer)
            assert float(scores.mean_logps[row]) == pytest.approx(float(answer.mean()))

    def test_architecture_that_ignores_logits_to_keep(self):
        model, data = make_model(0), prepare_dataset(qa_dataset(3), make_tokenizer())

        class Stubborn(torch.nn.Module):
            def forward(self, logits_to_keep=None, **inputs):
                return model(**inputs)

        batch = pad_batch(list(data), 0)
        torch.testing.assert_close(score_answers(Stubborn(), batch).logps, score_answers(model, batch).logps)


class TestStep:
    def make(self, **options):
        tokenizer = make_tokenizer()
        forget, retain = prepare_dataset(qa_dataset(3), tokenizer), prepare_dataset(qa_dataset(4, 50), tokenizer)
        step = UnlearningLoss(**options)
        return step, forget, retain if step.uses_retain else None

    def terms(self, step, model, reference, forget, retain, pairs):
        rows = [{"row": 0, "forget_index": f, "retain_index": r, "weight": 1.0, "retain_scale": 1.0} for f, r in pairs]
        return step(model, PairedCollator(forget, retain, 0)(rows), reference)

    @pytest.mark.parametrize("retain_loss", ["nll", "kl"])
    def test_does_not_depend_on_batch_mates(self, retain_loss):
        step, forget, retain = self.make(objective="npo", retain_loss=retain_loss, kl_top_k=9)
        original, model = make_model(0).double(), make_model(1).double()
        reference = step.reference(original, forget, retain, pad_token_id=0, batch_size=2, device="cpu")
        pairs = [(0, 3), (2, 0), (1, 1)]
        together = self.terms(step, model, reference, forget, retain, pairs)
        for i, pair in enumerate(pairs):
            alone = self.terms(step, model, reference, forget, retain, [pair])
            torch.testing.assert_close(alone.forget[0], together.forget[i])
            torch.testing.assert_close(alone.retain[0], together.retain[i])

    def test_reference_is_the_model_as_it_is(self):
        step, forget, retain = self.make(objective="npo", retain_loss="kl", kl_top_k=300)
        model = make_model(0).double().train()
        reference = step.reference(model, forget, retain, pad_token_id=0, batch_size=2, device="cpu")
        assert model.training
        terms = self.terms(step, model.eval(), reference, forget, retain, [(0, 0), (1, 2)])
        torch.testing.assert_close(terms.forget, torch.full((2,), 20 * math.log(2), dtype=torch.float64))
        torch.testing.assert_close(terms.retain, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_without_retain(self):
        step, forget, retain = self.make(objective="ga")
        terms = self.terms(step, make_model(0), Reference(), forget, retain, [(0, 0)])
        assert terms.retain is None and terms.forget.shape == (1,)


def test_registering():
    with pytest.raises(ValueError, match="'npo' is already registered"):
        register_objective("npo")(lambda logps, lengths, reference: logps)
    try:

        @register_objective("mine")
        def mine(logps, lengths, reference_logps, *, power: float = 2.0):
            return logps**power

        assert keyword_options(OBJECTIVES["mine"].loss) == {"power": 2.0}
        assert UnlearningLoss("mine", {"power": 3.0}).retain_loss == "nll"
        with pytest.raises(ValueError, match="no option 'q'; it has \\['power'\\]"):
            UnlearningLoss("mine", {"q": 1})
    finally:
        OBJECTIVES.pop("mine", None)
