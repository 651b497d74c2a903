"""CUD as published, against the recipe carried out edge by edge."""

import logging

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer import score_difficulty
from cud_trainer.circuits import edge_attributions
from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import AnchorBank, CUDSettings, DifficultyContext, DifficultyScores
from cud_trainer.difficulty.cud import cud, cud_paper, cud_top_k
from cud_trainer.difficulty.cud.settings import PAPER_CIRCUITS

K = 40


def make_context(**options):
    samples = prepare_samples(qa_dataset(12), make_tokenizer())
    return DifficultyContext(make_model(0), samples, None, folds=4, progress=False, **options)


def node(destination: str) -> str:
    return destination.rpartition(".")[0] if destination[0] == "a" else destination


def circuit(scores: dict[tuple[str, str], float], k: int) -> set[tuple[str, str]]:
    """From the logits up, `k` times the strongest edge into a node that is in; then what hangs loose goes."""
    inside, chosen = {"logits"}, set()
    for _ in range(k):
        free = [edge for edge in scores if node(edge[1]) in inside and edge not in chosen]
        best = max(free, key=lambda edge: abs(scores[edge]))
        chosen.add(best)
        inside.add(best[0])
    while True:
        read = {node(destination) for _, destination in chosen} | {"input"}
        written = {source for source, _ in chosen} | {"logits"}
        kept = {edge for edge in chosen if edge[0] in read and node(edge[1]) in written}
        if kept == chosen:
            return chosen
        chosen = kept


def cosine(a: set, b: set) -> float:
    return len(a & b) / np.sqrt(len(a) * len(b))


def test_edge_by_edge():
    context = make_context()
    ids = context.forget.ids
    found = cud_paper(context, k=K, anchors={"easy": ids[:4], "hard": ids[-4:]})
    scores = []
    for row in range(12):
        result = edge_attributions(
            context.model, context.forget.pad([row]), method="ig-activations", steps=5, baseline="zero", metric="prob",
            ungroup_kv=True, reference_quirk=True,
        )  # fmt: skip
        graph = result.graph
        scores.append(
            {
                (graph.sources[s], graph.destinations[d]): float(result.scores[0, s, d])
                for s, d in graph.mask.nonzero().tolist()
            }
        )
    for row in range(12):
        rows = [[i for i in side if context.fold[i] != context.fold[row]] for side in (range(4), range(8, 12))]
        anchors = [circuit({e: np.mean([scores[i][e] for i in side]) for e in scores[0]}, K) for side in rows]
        easy, hard = (1 - cosine(circuit(scores[row], K), anchor) for anchor in anchors)
        assert found[row] == pytest.approx(easy / (easy + hard), abs=1e-5)


def test_presets():
    paper, cheap = CUDSettings("paper"), CUDSettings("top_k")
    assert (paper.vector, paper.k, paper.selection, paper.prune, paper.distance) == (
        "binary",
        75,
        "greedy",
        True,
        "cosine",
    )
    assert (cheap.vector, cheap.k, cheap.selection, cheap.prune, cheap.distance) == (
        "signed",
        200,
        "top_k",
        False,
        "cosine",
    )
    assert paper.raw_anchors and not cheap.raw_anchors
    assert PAPER_CIRCUITS["method"] == "ig-activations" and PAPER_CIRCUITS["steps"] == 5


def test_its_circuits_are_its_own_whatever_the_options_are():
    """The attribution of the run is another one, and is left alone; each is made once."""
    ids = make_context().forget.ids
    anchors = {"easy": ids[:4], "hard": ids[-4:]}
    plain, other = make_context(), make_context(circuit_options={"metric": "logprob", "method": "eap-ig"})
    np.testing.assert_array_equal(cud_paper(plain, k=K, anchors=anchors), cud_paper(other, k=K, anchors=anchors))
    assert "_circuits" not in other.__dict__ and len(other._other_circuits) == 1
    assert not np.allclose(cud_top_k(plain, anchors=anchors), cud_paper(plain, k=K, anchors=anchors))


def test_refusals(tmp_path):
    context = make_context(calibrate=lambda _: np.linspace(0, 1, 12))
    with pytest.raises(ValueError, match="circuits of its own, which no anchor bank keeps"):
        cud(context, variant="paper", save_anchors=str(tmp_path / "bank"))
    bank = AnchorBank.fit(context.model, context.forget, np.linspace(0, 1, 12), progress=False)
    with pytest.raises(ValueError, match="circuits of its own, which no anchor bank keeps"):
        cud(context, variant="paper", anchors=bank)
    with pytest.raises(ValueError, match="have an empty circuit, the first is"):
        cud_paper(context, k=1)


def test_scores_of_before_say_that_they_are_others(tmp_path, caplog):
    """`cud_paper` meant the cheap form: an old file is told from a new one."""
    from transformers.utils import logging as library

    scores = score_difficulty(
        make_model(0), qa_dataset(9), make_tokenizer(), metrics=["cud_paper"], progress=False, folds=3,
        metric_args={"cud_paper": {"k": 40}}, work_dir=tmp_path / "work",
    )  # fmt: skip
    scores.save(tmp_path / "new.parquet")
    old = {key: value for key, value in scores.provenance.items() if key != "cud_paper"}
    DifficultyScores(scores.ids, scores.columns, scores.fold, old).save(tmp_path / "old.parquet")
    logger = library.get_logger("cud_trainer.difficulty.scores")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            DifficultyScores.load(tmp_path / "new.parquet")
            assert not caplog.records
            DifficultyScores.load(tmp_path / "old.parquet")
            assert "called cud_top_k now" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.isfinite(torch.from_numpy(scores["cud_paper"])).all()
