"""The report's section on circuits."""

import json

import numpy as np
import pytest
import torch

from cud_trainer.circuits import CircuitTable, Graph, circuit_signature, select_circuits
from cud_trainer.difficulty import Buckets
from evaluation.report import plots
from evaluation.report.circuits import circuit_section
from evaluation.report.schema import jsonable


def table(n=24, graph=None):
    graph = graph or Graph(4, 4, 2)
    edges = torch.randn(n, graph.n_edges, generator=torch.Generator().manual_seed(0))
    edges[0] = 0
    return CircuitTable([f"s{i}" for i in range(n)], edges, graph, {"method": "eap"})


def section(**options):
    found = table()
    bucket = np.arange(24) * 4 // 24
    residual = np.random.default_rng(0).random(24)
    return (
        found,
        bucket,
        residual,
        jsonable(circuit_section(found, Buckets(bucket, 4), residual, seed=0, note="whose", k=30, **options)),
    )


def test_numbers_by_hand():
    found, bucket, residual, result = section()
    assert (result["n"], result["n_empty"], result["k"]) == (24, 1, 30)
    assert [row["n"] for row in result["buckets"]] == [5, 6, 6, 6]
    circuits = select_circuits(found.edges, found.graph, selection="top_k", k=30)
    signature = circuit_signature(found.edges, found.graph, circuits)
    hardest = signature["mean_edge_length"].numpy()[bucket == 3]
    assert result["buckets"][-1]["mean_edge_length"]["value"] == pytest.approx(hardest.mean())
    from scipy.stats import spearmanr

    row = next(row for row in result["spearman"] if row["name"] == "late_share")
    assert row["spearman"]["value"] == pytest.approx(spearmanr(signature["late_share"][1:], residual[1:]).statistic)
    unit = found.edges / found.edges.norm(dim=1, keepdim=True)
    gap = unit[bucket == 3].abs().mean(0) - unit[1:6].abs().mean(0)
    strongest = result["difference"][0]
    place = (found.graph.sources.index(strongest["source"]), found.graph.destinations.index(strongest["destination"]))
    index = found.graph.mask.nonzero().tolist().index(list(place))
    assert (
        strongest["value"]
        == pytest.approx(float(gap[index]), rel=1e-4)
        == pytest.approx(float(gap[gap.abs().argmax()]), rel=1e-4)
    )
    assert len(result["difference"]) <= 150
    json.dumps(result)


@pytest.mark.parametrize("graph", [Graph(4, 4, 2), Graph(30, 9, 3), Graph(2, 3, 3, parallel=True)], ids=str)
def test_pictures_are_drawn(graph):
    found = table(8, graph)
    result = circuit_section(found, Buckets(np.arange(8) // 2, 4), None, seed=0, note="whose")
    for edges in ("mean_circuit", "difference"):
        assert plots.to_svg(plots.circuit(result, edges, "more", "less")).startswith("<svg")
    assert "spearman" not in jsonable(result)


def test_rows_are_aligned_by_id():
    found = table(5)
    swapped = found.aligned(["s3", "s1"])
    assert swapped.ids == ["s3", "s1"] and torch.equal(swapped.edges, found.edges[[3, 1]])
    with pytest.raises(ValueError, match="lack 1 of 2 samples, the first is 'x'"):
        found.aligned(["s1", "x"])


def test_the_page_shows_it(tmp_path):
    from test_report import example

    from evaluation.report.page import write_report

    page = write_report({**example(), "circuits": section()[3]}, tmp_path).read_text(encoding="utf-8")
    assert "Circuits of easy and hard samples" in page and "mean_edge_length" in page
    assert (tmp_path / "plots" / "circuit_difference.png").exists()
    broken = section()[3]
    del broken["difference"]
    with pytest.raises(ValueError, match="results have no 'circuits.difference'"):
        write_report({**example(), "circuits": broken}, tmp_path / "b")
