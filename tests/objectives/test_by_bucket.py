"""Another objective for each bucket: every sample has the loss of its own, and the union of what they read."""

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer.data import PairedCollator, prepare_samples
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.objectives.alternatives import with_alternatives

OWN = {1: "idk_dpo", "3": {"objective": "undial"}, 4: {"objective": "simnpo", "beta": 2.0}}
BUCKETS = torch.tensor([2, 0, 3, 1, 0]).numpy()
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5, 1.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def world():
    data, tokenizer = qa_dataset(5), make_tokenizer()
    forget = with_alternatives(prepare_samples(data, tokenizer), data, tokenizer, "refusal")
    return forget, prepare_samples(qa_dataset(4, 50), tokenizer), make_model(0).double()


def batch(world, loss, order=range(5)):
    rows = [{"row": 0, "forget_index": i, "retain_index": i % 4, "weight": 1.0, "retain_scale": 1.0} for i in order]
    return PairedCollator(world[0], world[1], None, loss.uses_alternative)(rows)


def reference(world, loss):
    found = loss.reference(world[2], world[0], world[1], batch_size=2, device="cpu")
    part = loss.part_of(BUCKETS, 4)
    found.part = None if part is None else torch.from_numpy(part)
    return found


def each_alone(world, model, order):
    """The loss of every sample under its own objective, for all samples and alone."""
    alone = {0: ("idk_dpo", {}), 1: ("npo", {"beta": 0.3}), 2: ("undial", {}), 3: ("simnpo", {"beta": 2.0})}
    found = []
    for place, row in enumerate(order):
        loss = UnlearningLoss(*alone[int(BUCKETS[row])], "nll")
        found.append(loss(model, batch(world, loss, order), reference(world, loss)).forget[place])
    return torch.stack(found)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 1, 4), (2,)])
def test_every_sample_has_the_loss_of_its_own_objective(world, order):
    loss, model = UnlearningLoss("npo", {"beta": 0.3}, "nll", by_bucket=OWN), make_model(1).double()
    found = loss(model, batch(world, loss, order), reference(world, loss))
    torch.testing.assert_close(found.forget, each_alone(world, model, order), rtol=1e-10, atol=1e-10)
    side = loss.side("forget", model, batch(world, loss, order), reference(world, loss))
    torch.testing.assert_close(side.forget, found.forget)
    assert loss.alternative == "refusal" and loss.uses_reference and not loss.token_mean


def test_gradient_of_the_weighted_sum_by_finite_differences(world):
    """Of the weighted mixed loss, along a random direction; undial's target and NPO's reference stay."""
    loss, model = UnlearningLoss("npo", {"beta": 0.3}, "nll", by_bucket=OWN), make_model(1).double()
    rows, known = batch(world, loss), reference(world, loss)
    total = (WEIGHT * loss(model, rows, known).forget).sum()
    total.backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))

    def at(step):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
            value = (WEIGHT * each_alone(world, model, range(5))).sum()
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= step * d
        return value

    # the model's own norms are in float32: no smaller step, no closer agreement
    assert float((at(1e-4) - at(-1e-4)) / 2e-4) == pytest.approx(float(slope), rel=1e-3)
    mixed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (WEIGHT * each_alone(world, model, range(5))).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], mixed, rtol=1e-5, atol=1e-6)


def test_without_buckets_all_have_the_first(world):
    mixed, plain = (UnlearningLoss("npo", {"beta": 0.3}, "nll", by_bucket=own) for own in (OWN, {}))
    model, known = make_model(1).double(), reference(world, mixed)
    known.part = None
    expected = plain(model, batch(world, plain), reference(world, plain)).forget
    torch.testing.assert_close(mixed(model, batch(world, mixed), known).forget, expected)
    assert plain.part_of(BUCKETS, 4) is None and mixed.part_of(BUCKETS, 4).tolist() == [2, 1, 3, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by_bucket": {1: "nop"}}, "unknown objective 'nop'"),
        ({"by_bucket": {0: "ga"}}, "goes by the numbers of buckets, 1 the easiest, got 0"),
        ({"by_bucket": {"hard": "ga"}}, "1 the easiest, got 'hard'"),
        ({"by_bucket": {True: "ga"}}, "1 the easiest, got True"),
        ({"by_bucket": {1: "ga", "1": "npo"}}, "has bucket 1 twice"),
        ({"by_bucket": {1: {"beta": 1.0}}}, "bucket 1 needs a name or"),
        ({"by_bucket": {1: None}}, "bucket 1 needs a name or"),
        ({"by_bucket": ["ga"]}, "must be a dictionary"),
        ({"by_bucket": {1: {"objective": "npo", "gamma": 1.0}}}, "objective 'npo' has no option 'gamma'"),
        ({"by_bucket": {1: {"objective": "npo", "beta": -1.0}}}, "'beta' of objective 'npo' must be positive"),
        ({"by_bucket": {1: {"objective": "npo", "beta_by": "length"}}}, "no option of bucket 1 can go by sample"),
        ({"by_bucket": {2: "rmu"}}, "objective 'rmu' cannot be mixed"),
        ({"objective": "rmu", "by_bucket": {2: "ga"}}, "objective 'rmu' cannot be mixed"),
        ({"by_bucket": {1: "idk_dpo", 2: "alt_po"}}, "the objectives want model and refusal"),
        ({"objective": "ga", "by_bucket": {2: "graddiff"}}, "objective 'graddiff' needs a retain loss"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearningLoss(**options)


def test_a_bucket_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="there is no bucket 4, only 3"):
        UnlearningLoss("npo", by_bucket={4: "ga"}).part_of(BUCKETS, 3)
