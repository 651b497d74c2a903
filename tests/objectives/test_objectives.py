"""Log-probabilities and objectives against formulas by hand, finite differences and known limits."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from cud_trainer.data import PairedCollator, pad_batch, prepare_samples
from cud_trainer.logprobs import score_answers
from cud_trainer.objectives import OBJECTIVES, QUANTITIES, Reference, UnlearningLoss, register_objective
from cud_trainer.objectives.alternatives import with_alternatives
from cud_trainer.objectives.retain import retain_activations, retain_kl, retain_nll
from cud_trainer.registry import keyword_options

B, K, V = 3, 4, 6
MASK = torch.tensor([[True, True, True, False], [True, True, True, True], [False, True, False, False]])
N = MASK.sum(1)


def quantities(seed=0, **given):
    """Everything an objective can ask for, of answers of 3, 4 and 1 tokens, from random logits in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, before, targets = 2 * normal(B, K, V), 2 * normal(B, K, V), torch.randint(V, (B, K), generator=generator)
    logits = given.get("logits", logits)
    logps, reference = logits.log_softmax(-1), before.log_softmax(-1)
    picked = [x.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * MASK for x in (logps, reference)]
    top = reference.scatter(-1, targets.unsqueeze(-1), torch.inf).topk(given.get("k", V), -1).indices
    found = {
        "logits": logits,
        "targets": targets,
        "mask": MASK,
        "lengths": N,
        "token_logps": picked[0],
        "logps": picked[0].sum(1),
        "mean_logps": picked[0].sum(1) / N,
        "reference_logps": picked[1].sum(1),
        "reference_top_logps": reference.gather(-1, top),
        "reference_top_ids": top,
        "reference_rest_logps": reference.scatter(-1, top, -torch.inf).logsumexp(-1),
        "hidden": normal(B, K, 5),
        "direction": torch.tensor([0.0, 0.6, 0.0, 0.8, 0.0], dtype=torch.float64),
        "alternative_logps": -normal(B).abs(),
        "alternative_reference_logps": -normal(B).abs(),
        "before": before,
    }
    found["alternative_mean_logps"] = found["alternative_logps"] / 3
    return {**found, **{name: value for name, value in given.items() if name in QUANTITIES}}


def loss(name, known=None, **options):
    known = quantities() if known is None else known
    return OBJECTIVES[name].loss(*(known[quantity] for quantity in OBJECTIVES[name].needs), **options)


def gradient(name, quantity="logits", **options):
    """Of the summed loss with respect to the logits (the reference stays), or to another quantity."""
    start = quantities()[quantity].clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(name, quantities(**{quantity: start}), **options).sum(), start)
    return result


def sigma(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name, row):
    """The paper's formula for one sample, token by token, in plain Python."""
    q = quantities()
    steps = [t for t in range(K) if MASK[row, t]]
    probabilities = [[float(p) for p in q["logits"][row, t].softmax(-1)] for t in steps]
    before = [[float(p) for p in q["before"][row, t].softmax(-1)] for t in steps]
    y = [int(q["targets"][row, t]) for t in steps]
    p, p_r = [x[i] for x, i in zip(probabilities, y, strict=True)], [x[i] for x, i in zip(before, y, strict=True)]
    n, l, l_r = len(steps), sum(map(math.log, p)), sum(map(math.log, p_r))  # noqa: E741
    plus, plus_r = float(q["alternative_logps"][row]), float(q["alternative_reference_logps"][row])
    if name in ("ga", "graddiff", "kl_min"):
        return l / n
    if name == "npo":
        return -(2 / 0.1) * math.log(sigma(-0.1 * (l - l_r)))
    if name == "simnpo":
        return -(2 / 4.5) * math.log(sigma(-4.5 * l / n))
    if name in ("dpo", "idk_dpo", "alt_po"):
        return -(2 / 0.1) * math.log(sigma(0.1 * ((plus - plus_r) - (l - l_r))))
    if name == "idk_nll":
        return -plus / 3
    if name == "wga":
        return sum(x * math.log(x) for x in p) / n
    if name == "satimp":
        return sum(x**5 * (1 - x) * math.log(x) for x in p) / n
    if name == "undial":
        total = 0.0
        for now, then, i in zip(probabilities, before, y, strict=True):
            target = [x * (math.exp(-10) if j == i else 1) for j, x in enumerate(then)]
            total += -sum(t / sum(target) * math.log(x) for t, x in zip(target, now, strict=True))
        return total / n
    if name == "ceu":
        total = 0.0
        for now, i in list(zip(probabilities, y, strict=True))[1:]:
            rest = 1 - now[i]
            total += -sum(x / rest * math.log(x) for j, x in enumerate(now) if j != i)
        return total / max(n - 1, 1)
    if name == "pdu":
        rows = [q["logits"][row, t].tolist() for t in steps]
        return sum((max(x) - sum(x) / V) ** 2 for x in rows) / n
    if name == "rmu":
        u = [0.0, 0.6, 0.0, 0.8, 0.0]
        rows = [q["hidden"][row, t].tolist() for t in steps]
        return sum((h - 2 * c) ** 2 for x in rows for h, c in zip(x, u, strict=True)) / 5 / n
    raise KeyError(name)


class TestFormulas:
    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    def test_by_hand(self, name):
        found = loss(name)
        assert found.shape == (B,) and found.dtype == torch.float64
        for row in range(B):
            assert float(found[row]) == pytest.approx(by_hand(name, row), abs=1e-12), row

    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    def test_gradient_pushes_the_answer_down(self, name):
        """A small step against the gradient lowers the answer's probability, or raises the alternative's."""
        if name == "rmu":
            exact = gradient(name, "hidden")
            known = quantities()
            away = 2 * known["direction"] - known["hidden"]
            assert ((exact * away).sum(-1)[MASK] < 0).all() and (exact[~MASK] == 0).all()
            return
        if name == "idk_nll":
            assert (gradient(name, "alternative_mean_logps") < 0).all()
            return
        start = quantities()
        exact = gradient(name)
        after = quantities(logits=start["logits"] - 1e-5 * exact)
        if name == "pdu":  # flattens; the answer falls where it is the arg max
            spread = lambda q: (q["logits"].amax(-1) - q["logits"].mean(-1))[MASK]  # noqa: E731
            assert (spread(after) < spread(start)).all()
        elif name == "ceu":  # the answer of one token has none behind the first
            assert (after["logps"] < start["logps"])[:2].all() and after["logps"][2] == start["logps"][2]
        elif name == "undial":
            assert (loss(name, after) < loss(name)).all() and (exact[~MASK] == 0).all()
        else:
            assert (after["logps"] < start["logps"]).all()

    @pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"wga", "satimp", "ceu"}))
    def test_gradient_by_finite_difference(self, name):
        quantity = {"rmu": "hidden", "idk_nll": "alternative_mean_logps"}.get(name, "logits")
        exact, step = gradient(name, quantity), 1e-6
        generator = torch.Generator().manual_seed(1)
        moved = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        values = [
            loss(name, quantities(**{quantity: quantities()[quantity] + s * step * moved})).sum() for s in (1, -1)
        ]
        assert float((exact * moved).sum()) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=1e-5)

    def test_weights_of_tokens_have_no_gradient(self):
        """WGA, SatImp and CE-U stop the gradient of their weight or target: by hand, per token."""
        start = quantities()["token_logps"].clone().requires_grad_()
        p = start.detach().exp()
        for name, weight in (("wga", p), ("satimp", p**5 * (1 - p))):
            (found,) = torch.autograd.grad(loss(name, quantities(token_logps=start)).sum(), start)
            torch.testing.assert_close(found * MASK, weight * MASK / N[:, None])
        q = quantities()
        now = q["logits"].softmax(-1)
        target = now.scatter(-1, q["targets"].unsqueeze(-1), 0.0)
        target = target / target.sum(-1, keepdim=True)
        later = (MASK & (MASK.cumsum(-1) > 1)).double()
        expected = (now - target) * (later / later.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        torch.testing.assert_close(gradient("ceu"), expected)

    def test_limits(self):
        ascent, whole = gradient("ga"), gradient("ga") * N[:, None, None]
        torch.testing.assert_close(gradient("npo", beta=1e-9), whole)
        torch.testing.assert_close(gradient("simnpo", beta=1e-9), ascent)
        torch.testing.assert_close(gradient("wga", beta=0.0), ascent)
        torch.testing.assert_close(gradient("satimp", beta1=0, beta2=0), ascent)
        assert gradient("graddiff").equal(ascent) and gradient("kl_min").equal(ascent)
        q = quantities()
        level = 20 * math.log(2)
        at_reference = loss("npo", {**q, "logps": q["reference_logps"]})
        torch.testing.assert_close(at_reference, torch.full_like(at_reference, level))
        still = {**q, "alternative_logps": q["alternative_reference_logps"]}
        for name in ("dpo", "idk_dpo", "alt_po"):
            torch.testing.assert_close(loss(name, still), loss("npo"))
        torch.testing.assert_close(
            loss("simnpo", gamma=0.0, beta=2.0),
            loss("npo", {**q, "logps": q["mean_logps"], "reference_logps": 0 * N}, beta=2.0),
        )
        # UNDIAL pushes nothing down at beta -> 0: cross-entropy to the reference itself, lowest where the model is that
        same = quantities(logits=q["before"])
        torch.testing.assert_close(loss("undial", same, beta=1e-9)[2], Categorical(logits=q["before"]).entropy()[2, 1])
        # ... and is cross-entropy to the reference without the token at beta -> infinity
        alone = q["before"].scatter(-1, q["targets"].unsqueeze(-1), -torch.inf).softmax(-1)
        expected = -(alone * q["logits"].log_softmax(-1)).sum(-1)
        torch.testing.assert_close(loss("undial", beta=1e4), (expected * MASK).sum(1) / N)
        # forgotten: nothing left to push, and nothing overflows
        for far in (-1e4, -1e6):
            gone = {**q, "logps": torch.full((B,), far, dtype=torch.float64)}
            assert (loss("npo", gone) < 1e-9).all() and torch.isfinite(loss("npo", gone)).all()
        steered = {**q, "hidden": (2 * q["direction"]).expand(B, K, 5)}
        assert (loss("rmu", steered) == 0).all()

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 10_000), st.floats(0.1, 20))
    def test_undial_with_fewer_tokens_is_a_lower_bound(self, seed, beta):
        exact = loss("undial", quantities(seed), beta=beta)
        found = [loss("undial", quantities(seed, k=k), beta=beta) for k in range(1, V + 1)]
        torch.testing.assert_close(found[-1], exact)
        assert all((b >= a - 1e-9).all() for a, b in itertools.pairwise(found))

    def test_undial_of_a_saturated_model_is_finite_in_float32(self):
        """The original model is certain of the answer: the target lives in the tail."""
        logits = torch.full((B, K, V), -30.0).scatter(-1, quantities()["targets"].unsqueeze(-1), 0.0)
        for k in (1, 3, V):
            reference = logits.log_softmax(-1)
            top = reference.scatter(-1, quantities()["targets"].unsqueeze(-1), torch.inf).topk(k, -1).indices
            q = {
                **quantities(),
                "logits": logits,
                "reference_top_logps": reference.gather(-1, top),
                "reference_top_ids": top,
                "reference_rest_logps": reference.scatter(-1, top, -torch.inf).logsumexp(-1),
            }
            assert torch.isfinite(loss("undial", q)).all()

    def test_npo_weighs_gradient_ascent(self):
        """Zhang et al., eq. 5: its gradient is that of ascent times 2 p^beta / (p^beta + p_r^beta)."""
        q = quantities()
        p, reference = q["logps"].exp() ** 0.4, q["reference_logps"].exp() ** 0.4
        torch.testing.assert_close(gradient("npo", "logps", beta=0.4), 2 * p / (p + reference))

    def test_retain_nll(self):
        logps = torch.tensor([-1.5, -8.0, -0.1], dtype=torch.float64)
        expected = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
        torch.testing.assert_close(retain_nll(logps, torch.tensor([3, 4, 1])), expected)

    def test_retain_activations(self):
        now, before = quantities(0)["hidden"], quantities(1)["hidden"]
        expected = [((now - before)[row][MASK[row]] ** 2).mean() for row in range(B)]
        torch.testing.assert_close(retain_activations(now, MASK, before), torch.stack(expected))

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


class TestBySample:
    @pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].by_sample])
    def test_each_sample_has_its_own_beta(self, name):
        found = loss(name, beta=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
        expected = [loss(name, beta=beta)[row] for row, beta in enumerate((0.5, 1.0, 3.0))]
        torch.testing.assert_close(found, torch.stack(expected))

    def test_by_length_and_difficulty_by_hand(self):
        lengths, rank = torch.tensor([2.0, 8.0, 5.0]).numpy(), torch.tensor([0.0, 1.0, 0.5]).numpy()
        by_length = UnlearningLoss("npo", {"beta_by": "length"})
        assert by_length.option_scale(lengths, rank).tolist() == pytest.approx([2.5, 0.625, 1.0])
        by_rank = UnlearningLoss("wga", {"beta": 2.0, "beta_by": "difficulty"})
        assert by_rank.option_scale(lengths, rank).tolist() == [2.0, 0.5, 1.0]
        assert by_rank.option_scale(lengths) is None and UnlearningLoss("npo").option_scale(lengths, rank) is None

    def test_npo_by_length_saturates_by_the_token(self):
        """Answers that lost as much per token have the same gradient, whatever their length; without, they do not."""
        lengths, dropped = torch.tensor([2.0, 10.0], dtype=torch.float64), -1.5
        scale = UnlearningLoss("npo", {"beta_by": "length"}).option_scale(lengths.numpy())

        def gradients(beta):
            logps = (dropped * lengths).requires_grad_()
            (found,) = torch.autograd.grad(OBJECTIVES["npo"].loss(logps, torch.zeros(2), beta=beta).sum(), logps)
            return found

        short, long = gradients(0.1 * torch.from_numpy(scale))
        assert short == pytest.approx(2 * sigma(0.1 * 6 * dropped)) == pytest.approx(long)
        short, long = gradients(0.1)
        assert long < 0.6 * short

    def test_a_step_looks_samples_up(self):
        """By the sample's place in the forget set, not in the batch: over the set's mean length, in any batch."""
        tokenizer, data = make_tokenizer(), qa_dataset(3)
        data = data.remove_columns("answer").add_column("answer", ["ab", "a much longer answer", "middling"])
        forget, retain = prepare_samples(data, tokenizer), prepare_samples(qa_dataset(4, 50), tokenizer)
        step, plain = UnlearningLoss("npo", {"beta": 0.2, "beta_by": "length"}), UnlearningLoss("npo", {"beta": 0.2})
        original, model = make_model(0).double(), make_model(1).double()
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu")
        collate = PairedCollator(forget, retain)
        rows = [{"row": 0, "forget_index": i, "retain_index": i, "weight": 1.0, "retain_scale": 1.0} for i in (2, 0, 1)]
        together = step(model, collate(rows), reference).forget
        n = forget.answer_lengths
        for place, row in enumerate((2, 0, 1)):
            torch.testing.assert_close(
                step(model, collate(rows[place : place + 1]), reference).forget[0], together[place]
            )
            own = UnlearningLoss("npo", {"beta": 0.2 * n.mean() / n[row]})
            bare = own.reference(original, forget, retain, batch_size=3, device="cpu")
            torch.testing.assert_close(own(model, collate(rows), bare).forget[place], together[place])
        bare = plain.reference(original, forget, retain, batch_size=2, device="cpu")
        assert (plain(model, collate(rows), bare).forget - together).abs().min() > 1e-3

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("npo", {"beta_by": "mood"}, "'beta_by' of objective 'npo' must be one of \\['length', 'difficulty'\\]"),
            ("simnpo", {"beta_by": "length"}, "must be one of \\['difficulty'\\], got 'length'"),
            ("satimp", {"beta_by": "length"}, "objective 'satimp' has no option 'beta_by'"),
            ("npo", {"gamma_by": "length"}, "has no option 'gamma_by'; it has \\['beta', 'beta_by'\\]"),
        ],
    )
    def test_refusals(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            UnlearningLoss(name, options)


class TestScores:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_against_full_logits(self, side):
        model, tokenizer = make_model(0).double(), make_tokenizer()
        data = prepare_samples(qa_dataset(4), tokenizer)
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
        model, data = make_model(0), prepare_samples(qa_dataset(3), make_tokenizer())

        class Stubborn(torch.nn.Module):
            def forward(self, logits_to_keep=None, **inputs):
                return model(**inputs)

        batch = pad_batch(list(data), 0)
        torch.testing.assert_close(score_answers(Stubborn(), batch).logps, score_answers(model, batch).logps)


class TestStep:
    def make(self, **options):
        tokenizer = make_tokenizer()
        forget, retain = prepare_samples(qa_dataset(3), tokenizer), prepare_samples(qa_dataset(4, 50), tokenizer)
        step = UnlearningLoss(**options)
        if step.uses_alternative:
            forget = with_alternatives(forget, qa_dataset(3), tokenizer, "refusal")
        return step, forget, retain if step.uses_retain else None

    def terms(self, step, model, reference, forget, retain, pairs):
        rows = [{"row": 0, "forget_index": f, "retain_index": r, "weight": 1.0, "retain_scale": 1.0} for f, r in pairs]
        collate = PairedCollator(forget, retain, alternative=step.uses_alternative)
        return step(model, collate(rows), reference)

    @pytest.mark.parametrize(
        ("objective", "retain_loss"), [("npo", "nll"), *((name, "kl") for name in sorted(OBJECTIVES)), ("rmu", None)]
    )
    def test_does_not_depend_on_batch_mates(self, objective, retain_loss):
        step, forget, retain = self.make(objective=objective, retain_loss=retain_loss, reference_top_k=9)
        original, model = make_model(0).double(), make_model(1).double()
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu")
        pairs = [(0, 3), (2, 0), (1, 1)]
        together = self.terms(step, model, reference, forget, retain, pairs)
        for i, pair in enumerate(pairs):
            alone = self.terms(step, model, reference, forget, retain, [pair])
            torch.testing.assert_close(alone.forget[0], together.forget[i])
            torch.testing.assert_close(alone.retain[0], together.retain[i])

    def test_reference_is_the_model_as_it_is(self):
        step, forget, retain = self.make(objective="npo", retain_loss="kl", reference_top_k=300)
        model = make_model(0).double().train()
        reference = step.reference(model, forget, retain, batch_size=2, device="cpu")
        assert model.training
        terms = self.terms(step, model.eval(), reference, forget, retain, [(0, 0), (1, 2)])
        torch.testing.assert_close(terms.forget, torch.full((2,), 20 * math.log(2), dtype=torch.float64))
        torch.testing.assert_close(terms.retain, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_reference_is_each_sample_scored_alone(self):
        """In dataset order, whatever the batches; the tail of the distribution is what was left out."""
        step, forget, retain = self.make(objective="npo", retain_loss="kl", reference_top_k=5)
        model = make_model(0).double()
        reference = step.reference(model, forget, retain, batch_size=2, device="cpu")
        for row, sample in enumerate(forget):
            alone = score_answers(model, pad_batch([sample], 0)).logps
            torch.testing.assert_close(reference.forget_logps[row], alone[0].detach())
        for row, sample in enumerate(retain):
            scores = score_answers(model, pad_batch([sample], 0))
            top = scores.logits[0].log_softmax(-1).sort(descending=True, stable=True)
            torch.testing.assert_close(reference.retain_top.logps[row].double(), top.values[:, :5].detach())
            assert torch.equal(reference.retain_top.ids[row].long(), top.indices[:, :5])

    @pytest.mark.parametrize("name", ["npo", "ga"])
    def test_reference_puts_every_mode_back(self, name):
        step, forget, retain = self.make(objective=name, retain_loss="kl")
        model = make_model(0).train()
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        step.reference(model, forget, retain, batch_size=2, device="cpu")
        assert [module.training for module in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())

    def test_retain_kl_against_both_models(self):
        step, forget, retain = self.make(objective="ga", retain_loss="kl", reference_top_k=258)
        original, model = make_model(0).double(), make_model(1).double()
        reference = step.reference(original, forget, retain, batch_size=3, device="cpu")
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
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu")
        rows = [{"row": 0, "forget_index": 1, "retain_index": 2, "weight": 1.0, "retain_scale": 1.0}]
        both = step.uses_alternative
        plain = step(model, PairedCollator(forget, retain, None, both)(rows), reference)
        other = replace(forget, pad_token_id=7)
        padded = step(model, PairedCollator(other, retain, multiple, both)(rows), reference)
        torch.testing.assert_close(padded.forget, plain.forget, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.retain, plain.retain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.mean_logps, plain.mean_logps, rtol=1e-4, atol=1e-5)
        assert not padded.mean_logps.requires_grad and padded.forget.requires_grad and padded.retain.requires_grad

    @pytest.mark.parametrize(
        ("name", "alone"), [("graddiff", ("ga", {})), ("npo", ("npo", {"beta": 0.3})), ("ga", ("ga", {}))]
    )
    def test_an_objective_alone(self, name, alone):
        step = UnlearningLoss(name, alone[1], "nll", reference_top_k=7).without_retain()
        assert (step.objective, step.objective_args, step.retain_loss) == (*alone, "none") and not step.uses_retain

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "magic"}, "unknown objective 'magic'; choose one of \\['alt_po', 'ceu', 'dpo', "),
            ({"objective_args": {"gamma": 1}}, "objective 'npo' has no option 'gamma'; it has \\['beta', 'beta_by'\\]"),
            ({"objective": "ga", "objective_args": {"beta": 1}}, "it has none"),
            ({"objective_args": {"beta": 0}}, "'beta' of objective 'npo' must be positive, got 0"),
            ({"objective_args": {"beta": float("nan")}}, "must be a finite number"),
            ({"objective_args": {"beta": "0.1"}}, "must be a number, got '0.1'"),
            ({"objective_args": {"beta": True}}, "must be a number, got True"),
            ({"objective": "simnpo", "objective_args": {"gamma": None}}, "must be a number, got None"),
            (
                {"retain_loss": "mse"},
                "unknown retain_loss 'mse'; choose one of \\['none', 'nll', 'kl', 'activations'\\]",
            ),
            ({"retain_loss": "activations"}, "compares hidden states: it goes with 'rmu', not with 'npo'"),
            ({"objective": "kl_min", "retain_loss": "none"}, "needs a retain loss"),
            ({"objective": "wga", "objective_args": {"beta": -1}}, "'beta' of objective 'wga' must not be negative"),
            ({"objective": "satimp", "objective_args": {"beta2": -1}}, "'beta2' of objective 'satimp' must not be"),
            ({"objective": "rmu", "objective_args": {"layer": 1.5}}, "'layer' of objective 'rmu' must be the index"),
            ({"objective": "rmu", "objective_args": {"steering": 0}}, "'steering' of objective 'rmu' must be positive"),
            ({"objective": "graddiff", "retain_loss": "none"}, "needs a retain loss; use 'ga'"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            UnlearningLoss(**options)

    def test_own_retain_losses(self):
        own = {name: UnlearningLoss(name).retain_loss for name in sorted(OBJECTIVES)}
        assert {name: kind for name, kind in own.items() if kind != "nll"} == {
            "ga": "none",
            "ceu": "none",
            "undial": "none",
            "kl_min": "kl",
            "rmu": "activations",
        }

    def test_undial_and_rmu_against_both_models(self):
        """The whole way through references and batches, one sample at a time by hand."""
        original, model = make_model(0).double(), make_model(1).double()
        step, forget, retain = self.make(objective="undial", reference_top_k=258)
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu")
        found = self.terms(step, model, reference, forget, retain, [(0, 0), (2, 0)])
        for position, row in enumerate((0, 2)):
            before, now = (score_answers(m, pad_batch([forget[row]], 0)) for m in (original, model))
            target = (before.logits - 10 * torch.nn.functional.one_hot(before.targets, 258)).softmax(-1)
            expected = -(target * now.logits.log_softmax(-1)).sum(-1).mean()
            assert found.forget[position].item() == pytest.approx(expected.item(), rel=1e-9)

        step, forget, retain = self.make(objective="rmu", objective_args={"layer": 0, "steering": 3.0})
        reference = step.reference(original, forget, retain, batch_size=2, device="cpu", seed=5)
        assert float(reference.direction.norm()) == pytest.approx(1) and (reference.direction >= 0).all()
        found = self.terms(step, model, reference, forget, retain, [(1, 2), (0, 3)])

        def hidden(network, sample):
            with torch.no_grad():
                states = network(torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states[1][0]
            answer = [t for t, label in enumerate(sample["labels"]) if label != -100]
            return states[[t - 1 for t in answer]]

        for position, (f, r) in enumerate([(1, 2), (0, 3)]):
            expected = (hidden(model, forget[f]) - 3 * reference.direction).square().mean()
            torch.testing.assert_close(found.forget[position], expected)
            moved = hidden(model, retain[r]) - hidden(original, retain[r])
            torch.testing.assert_close(found.retain[position], moved.square().mean())

    def test_rmu_gives_no_gradient_behind_its_layer(self):
        model = make_model(0)
        step, forget, retain = self.make(objective="rmu", objective_args={"layer": 0})
        reference = step.reference(model, forget, retain, batch_size=2, device="cpu")
        terms = self.terms(step, model, reference, forget, retain, [(0, 0)])
        (terms.forget + terms.retain).sum().backward()
        late = [p for name, p in model.named_parameters() if "layers.1" in name or name.startswith("model.norm")]
        assert late and all(p.grad is None or not p.grad.any() for p in late)
        assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("layer", [2, 7])
    def test_a_layer_that_does_not_exist(self, layer):
        step = UnlearningLoss("rmu", {"layer": layer})
        with pytest.raises(
            ValueError, match=f"'layer' of objective 'rmu' must be from 0 to 1 .* 2 layers, got {layer}"
        ):
            step.check_model(make_model(0).config)
        UnlearningLoss("npo").check_model(make_model(0).config)

    def test_missing_alternatives(self):
        _, forget, retain = self.make(objective="npo")
        with pytest.raises(ValueError, match="'dpo' needs an alternative answer for every forget sample"):
            UnlearningLoss("dpo").reference(make_model(0), forget, retain, batch_size=2, device="cpu")

    @pytest.mark.parametrize(
        "options",
        [
            {"objective": "npo", "retain_loss": "kl"},
            {"objective": "idk_dpo"},
            {"objective": "undial"},
            {"objective": "rmu"},
        ],
    )
    def test_reference_on_disk(self, tmp_path, options):
        """What comes back is the same to the bit; for another fingerprint, or from a broken file, nothing does."""
        step, forget, retain = self.make(**options, reference_top_k=5)
        reference = step.reference(make_model(0), forget, retain, batch_size=2, device="cpu")
        path = tmp_path / "reference.safetensors"
        reference.save(path, "mine")
        again = Reference.load(path, "mine", "cpu")
        left, right = (self.terms(step, make_model(1), r, forget, retain, [(0, 0), (1, 1)]) for r in (reference, again))
        assert torch.equal(left.forget, right.forget)
        assert (left.retain is None and right.retain is None) or torch.equal(left.retain, right.retain)
        assert Reference.load(path, "other", "cpu") is None and Reference.load(tmp_path / "none", "mine", "cpu") is None
        path.write_bytes(path.read_bytes()[:50])
        assert Reference.load(path, "mine", "cpu") is None

    @pytest.mark.parametrize("options", [{"objective": "npo", "retain_loss": "kl"}, {"objective": "rmu"}])
    def test_reference_of_what_is_served(self, tmp_path, options):
        """Other retain samples cost nothing, and what is served says the same, also from disk."""
        step, forget, retain = self.make(**options, reference_top_k=5)
        model, scored = make_model(0).double(), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: scored.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        whole = step.reference(model, forget, retain, batch_size=2, device="cpu")
        every = sum(scored)
        part = step.reference(model, forget, retain, batch_size=2, device="cpu", retain_rows=[1, 0, 1])
        assert len(retain) > 2 and sum(scored) - every == every - (len(retain) - 2)
        part.save(tmp_path / "reference.safetensors", "mine")
        for reference in (part, Reference.load(tmp_path / "reference.safetensors", "mine", "cpu")):
            lists = [reference.retain_hidden, reference.retain_top.logps, reference.retain_top.ids]
            for values, expected in zip(
                lists, [whole.retain_hidden, whole.retain_top.logps, whole.retain_top.ids], strict=True
            ):
                assert [len(value) > 0 for value in values] == [row < 2 for row in range(len(values))]
                for value, other in zip(list(values)[:2], list(expected)[:2], strict=True):
                    torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)

    def test_without_retain(self):
        step, forget, retain = self.make(objective="ga")
        terms = self.terms(step, make_model(0), Reference(), forget, retain, [(0, 0)])
        assert terms.retain is None and terms.forget.shape == (1,)


def test_registering():
    refused = {
        "'npo' is already registered": ("npo", {}, lambda logps: logps),
        "'mine' asks for 'loss'; it can ask for": ("mine", {}, lambda loss: loss),
        "must both read an alternative answer and say where it comes from": ("mine", {}, lambda alternative_logps: 0),
        "alternative of objective 'mine' must be one of": ("mine", {"alternative": "any"}, lambda alternative_logps: 0),
        "reads hidden states: it needs an option 'layer'": ("mine", {}, lambda hidden: hidden),
    }
    for message, (name, properties, function) in refused.items():
        with pytest.raises(ValueError, match=message):
            register_objective(name, **properties)(function)
    try:

        @register_objective("mine")
        def mine(mean_logps, *, power: float = 2.0):
            return mean_logps**power

        assert keyword_options(OBJECTIVES["mine"].loss) == {"power": 2.0}
        assert OBJECTIVES["mine"].needs == ("mean_logps",) and not OBJECTIVES["mine"].needs_reference
        assert UnlearningLoss("mine", {"power": 3.0}).retain_loss == "nll"
        with pytest.raises(ValueError, match="no option 'q'; it has \\['power'\\]"):
            UnlearningLoss("mine", {"q": 1})
    finally:
        OBJECTIVES.pop("mine", None)
