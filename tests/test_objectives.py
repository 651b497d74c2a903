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

    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.parametrize("height", [5.0, 20.0, 60.0, 1000.0])
    def test_kl_pulls_back_a_model_that_has_collapsed(self, k, height):
        """Float32 and a tail whose probability rounds to 0 under the model: still a bound, and its gradient is there."""
        reference = torch.tensor([[[2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
        current = (reference + torch.tensor([height, 0, 0, 0, 0, 0])).requires_grad_()
        top, ids = reference.log_softmax(-1).topk(k, -1)
        found = retain_kl(current, torch.ones(1, 1, dtype=torch.bool), top, ids).sum()
        wide = current.detach().double().requires_grad_()
        before = reference.double().log_softmax(-1)
        exact = torch.nn.functional.kl_div(wide.log_softmax(-1), before, log_target=True, reduction="sum")
        # the tail is uniform under both, so that nothing is lost by merging it
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)
        (gradient,), (expected,) = torch.autograd.grad(found, current), torch.autograd.grad(exact, wide)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10_000), st.floats(0.1, 60), st.floats(0.1, 60))
    def test_kl_is_a_bound_at_any_temperature(self, seed, sharp_reference, sharp_current):
        generator = torch.Generator().manual_seed(seed)
        reference, current = torch.randn(2, 3, 1, 9, generator=generator)
        reference, current = reference * sharp_reference, current * sharp_current
        wide = [Categorical(logits=x.double()) for x in (reference, current)]
        exact = kl_divergence(*wide).squeeze(1)
        for k in range(1, 10):
            top, ids = reference.log_softmax(-1).topk(k, -1)
            found = retain_kl(current, torch.ones(3, 1, dtype=torch.bool), top, ids).double()
            # what may be missing or left over: reference mass below 1e-6, and the rounding of its logarithm
            assert (found <= exact + 1e-3 + 1e-5 * exact).all() and (found >= -1e-3).all()

    def test_simnpo_does_not_see_the_reference_and_npo_not_the_length(self):
        moved, longer = R - 5, N * 3
        assert torch.equal(OBJECTIVES["simnpo"].loss(L, N, moved), OBJECTIVES["simnpo"].loss(L, N, None))
        assert torch.equal(OBJECTIVES["npo"].loss(L, longer, R), OBJECTIVES["npo"].loss(L, N, R))

    def test_npo_weighs_gradient_ascent(self):
        """Zhang et al., eq. 5: its gradient is that of ascent times 2 p^beta / (p^beta + p_r^beta)."""
        p, reference = L.exp() ** 0.4, R.exp() ** 0.4
        torch.testing.assert_close(gradient("npo", beta=0.4), 2 * p / (p + reference))

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

    def test_reference_is_each_sample_scored_alone(self):
        """In dataset order, whatever the batches; the tail of the distribution is what was left out."""
        step, forget, retain = self.make(objective="npo", retain_loss="kl", kl_top_k=5)
        model = make_model(0).double()
        reference = step.reference(model, forget, retain, pad_token_id=0, batch_size=2, device="cpu")
        for row, sample in enumerate(forget):
            alone = score_answers(model, pad_batch([sample], 0)).logps
            torch.testing.assert_close(reference.forget_logps[row], alone[0].detach())
        for row, sample in enumerate(retain):
            scores = score_answers(model, pad_batch([sample], 0))
            top = scores.logits[0].log_softmax(-1).sort(descending=True, stable=True)
            torch.testing.assert_close(reference.retain_top_logps[row].double(), top.values[:, :5].detach())
            assert torch.equal(reference.retain_top_ids[row], top.indices[:, :5])

    @pytest.mark.parametrize("name", ["npo", "ga"])
    def test_reference_puts_every_mode_back(self, name):
        step, forget, retain = self.make(objective=name, retain_loss="kl")
        model = make_model(0).train()
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        step.reference(model, forget, retain, pad_token_id=0, batch_size=2, device="cpu")
        assert [module.training for module in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())

    def test_retain_kl_against_both_models(self):
        step, forget, retain = self.make(objective="ga", retain_loss="kl", kl_top_k=258)
        original, model = make_model(0).double(), make_model(1).double()
        reference = step.reference(original, forget, retain, pad_token_id=0, batch_size=3, device="cpu")
        terms = self.terms(step, model, reference, forget, retain, [(0, 1), (1, 3)])
        for position, row in enumerate((1, 3)):
            batch = pad_batch([retain[row]], 0)
            before, now = (Categorical(logits=score_answers(m, batch).logits[0]) for m in (original, model))
            expected = kl_divergence(before, now).mean()
            assert terms.retain[position].item() == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize("multiple", [None, 64])
    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    def test_padding_changes_nothing(self, name, multiple):
        step, forget, retain = self.make(objective=name, retain_loss="kl")
        original, model = make_model(0), make_model(1)
        reference = step.reference(original, forget, retain, pad_token_id=0, batch_size=2, device="cpu")
        rows = [{"row": 0, "forget_index": 1, "retain_index": 2, "weight": 1.0, "retain_scale": 1.0}]
        plain = step(model, PairedCollator(forget, retain, 0)(rows), reference)
        padded = step(model, PairedCollator(forget, retain, 7, multiple)(rows), reference)
        torch.testing.assert_close(padded.forget, plain.forget, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.retain, plain.retain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.mean_logps, plain.mean_logps, rtol=1e-4, atol=1e-5)
        assert not padded.mean_logps.requires_grad and padded.forget.requires_grad and padded.retain.requires_grad

    @pytest.mark.parametrize(
        ("name", "alone"), [("graddiff", ("ga", {})), ("npo", ("npo", {"beta": 0.3})), ("ga", ("ga", {}))]
    )
    def test_an_objective_alone(self, name, alone):
        step = UnlearningLoss(name, alone[1], "nll", kl_top_k=7).without_retain()
        assert (step.objective, step.objective_args, step.retain_loss) == (*alone, "none") and not step.uses_retain

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "magic"}, "unknown objective 'magic'; choose one of \\['ga', 'graddiff', 'npo', 'simnpo'\\]"),
            ({"objective_args": {"gamma": 1}}, "objective 'npo' has no option 'gamma'; it has \\['beta'\\]"),
            ({"objective": "ga", "objective_args": {"beta": 1}}, "it has none"),
            ({"objective_args": {"beta": 0}}, "'beta' of objective 'npo' must be positive, got 0"),
            ({"objective_args": {"beta": float("nan")}}, "must be positive"),
            ({"objective_args": {"beta": "0.1"}}, "must be a number, got '0.1'"),
            ({"objective_args": {"beta": True}}, "must be a number, got True"),
            ({"objective": "simnpo", "objective_args": {"gamma": None}}, "must be a number, got None"),
            ({"retain_loss": "mse"}, "unknown retain_loss 'mse'; choose one of \\['none', 'nll', 'kl'\\]"),
            ({"objective": "graddiff", "retain_loss": "none"}, "needs a retain loss; use 'ga'"),
        ],
    )  # fmt: skip
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            UnlearningLoss(**options)

    def test_own_retain_losses(self):
        assert {name: UnlearningLoss(name).retain_loss for name in sorted(OBJECTIVES)} == {
            "ga": "none",
            "graddiff": "nll",
            "npo": "nll",
            "simnpo": "nll",
        }

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
