"""Circuit selection and signature against plain Python on node objects."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.circuits import Graph, circuit_signature, select_circuits

GRAPHS = [Graph(3, 4, 2), Graph(2, 3, 3), Graph(3, 2, 1, parallel=True), Graph(1, 1, 1)]


def node_of(name):
    """Nodes a destination belongs to, by name; group size needed for k and v."""
    return name.rsplit(".", 1)[0] if name[-2:] == ".q" else name


def owners(graph, destination):
    if destination[-2:] not in (".k", ".v"):
        return [node_of(destination)]
    layer, head, _ = destination.split(".")
    group = graph.n_heads // graph.n_kv_heads
    return [f"{layer}.h{query}" for query in range(graph.n_heads) if query // group == int(head[1:])]


def edge_list(graph):
    return [(graph.sources[u], graph.destinations[v]) for u, v in graph.mask.nonzero().tolist()]


def greedy_by_hand(scores, graph, k):
    names = edge_list(graph)
    incoming = {}
    for index, (_, destination) in enumerate(names):
        incoming.setdefault(destination, []).append(index)
    mine = {}
    for destination in graph.destinations[:-1]:
        for owner in owners(graph, destination):
            mine.setdefault(owner, []).append(destination)
    heap, opened, chosen = [], {"logits"}, set()
    for index in incoming["logits"]:
        heapq.heappush(heap, (-abs(scores[index]), index))
    while heap and len(chosen) < k:
        value, index = heapq.heappop(heap)
        if value == 0:
            break
        chosen.add(index)
        for destination in mine.get(names[index][0], []):
            if destination not in opened:
                opened.add(destination)
                for other in incoming.get(destination, []):
                    heapq.heappush(heap, (-abs(scores[other]), other))
    return chosen


def prune_by_hand(chosen, graph):
    """Drop nodes without a way in or out until nothing changes."""
    names, chosen = edge_list(graph), set(chosen)
    while True:
        fed = {"input"} | {owner for i in chosen for owner in owners(graph, names[i][1])}
        heard = {names[i][0] for i in chosen}
        kept = {
            i
            for i in chosen
            if names[i][0] in fed and (names[i][1] == "logits" or heard & set(owners(graph, names[i][1])))
        }
        if kept == chosen:
            return chosen
        chosen = kept


def random_edges(graph, n=4, seed=0):
    edges = torch.randn(n, graph.n_edges, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edges[:, ::7] = 0
    return edges


def as_sets(circuits):
    return [set(row.nonzero().flatten().tolist()) for row in circuits]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("k", [1, 3, 10, 40, 10_000])
def test_greedy_and_prune_match_node_objects(graph, k):
    edges = random_edges(graph)
    for selection in ("greedy", "top_k"):
        plain = select_circuits(edges, graph, selection=selection, k=k)
        pruned = select_circuits(edges, graph, selection=selection, k=k, prune=True)
        for row, found, rest in zip(edges.tolist(), as_sets(plain), as_sets(pruned), strict=True):
            if selection == "greedy":
                assert found == greedy_by_hand(row, graph, k)
            else:
                order = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]
                assert found == {i for i in order if row[i]}
            assert rest == prune_by_hand(found, graph)


def test_groups_of_samples_change_nothing(monkeypatch):
    from cud_trainer.circuits import selection

    graph = GRAPHS[0]
    whole = select_circuits(random_edges(graph, 9), graph, selection="greedy", k=20)
    monkeypatch.setattr(selection, "CHUNK_BYTES", 1)
    assert torch.equal(select_circuits(random_edges(graph, 9), graph, selection="greedy", k=20), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.sampled_from(GRAPHS))
def test_properties(seed, k, graph):
    edges = random_edges(graph, 3, seed)
    greedy = select_circuits(edges, graph, selection="greedy", k=k)
    assert (greedy.sum(1) <= k).all() and not greedy[edges == 0].any()
    assert (greedy & ~select_circuits(edges, graph, selection="greedy", k=k + 1)).sum() == 0
    assert torch.equal(greedy, select_circuits(-3 * edges, graph, selection="greedy", k=k))
    pruned = select_circuits(edges, graph, selection="greedy", k=k, prune=True)
    assert not (pruned & ~greedy).any()
    level = float(edges.abs().median())
    assert torch.equal(
        select_circuits(edges, graph, selection="threshold", threshold=level), (edges.abs() >= level) & (edges != 0)
    )
    assert torch.equal(select_circuits(edges, graph, selection="all"), edges != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "unknown circuit selection 'best'"),
        ({"selection": "greedy"}, "'greedy' needs k"),
        ({"selection": "all", "k": 3}, "'all' takes no k"),
        ({"selection": "top_k", "k": 0}, "k must be a positive"),
        ({"selection": "threshold"}, "needs threshold"),
        ({"selection": "threshold", "threshold": -1.0}, "threshold must be a positive"),
        ({"selection": "top_k", "k": 3, "threshold": 1.0}, "takes no threshold"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        select_circuits(random_edges(GRAPHS[0]), GRAPHS[0], **options)


def layer_of(graph, name):
    return -1 if name == "input" else graph.n_layers if name == "logits" else int(name[1:].split(".")[0])


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_signature_by_hand(graph):
    edges = random_edges(graph, 3, seed=5)
    circuits = select_circuits(edges, graph, selection="top_k", k=15)
    found = circuit_signature(edges, graph, circuits)
    names, span = edge_list(graph), graph.n_layers + 1

    def layer(name):
        return layer_of(graph, name)

    for row, inside in enumerate(as_sets(circuits)):
        mass = {i: abs(float(edges[row, i])) for i in inside}
        total = sum(mass.values())

        def mean(value, mass=mass, total=total):
            return sum(weight * value(*names[i]) for i, weight in mass.items()) / total

        expected = {
            "mean_edge_length": mean(lambda u, v: layer(v) - layer(u)),
            "mean_source_depth": mean(lambda u, v: (layer(u) + 1) / span),
            "mean_destination_depth": mean(lambda u, v: (layer(v) + 1) / span),
            "late_share": mean(lambda u, v: layer(v) >= graph.n_layers * 2 / 3),
            "attention_share": mean(lambda u, v: u[0] == "a"),
            "mlp_share": mean(lambda u, v: u[0] == "m"),
            "n_edges": len(inside),
        }
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value), name

        def longest(node, inside=inside):
            paths = [
                1 + (0 if v == "logits" else max(map(longest, owners(graph, v))))
                for u, v in (names[i] for i in inside)
                if u == node
            ]
            return max(paths, default=-(10**6))

        assert float(found["longest_path"][row]) == max(0, longest("input"))


def test_an_empty_circuit_has_no_signature():
    graph = GRAPHS[0]
    found = circuit_signature(torch.zeros(2, graph.n_edges), graph)
    assert found["mean_edge_length"].isnan().all() and found["mlp_share"].isnan().all()
    assert found["n_edges"].tolist() == found["longest_path"].tolist() == [0, 0]


def test_cud_on_greedy_circuits():
    from cud_trainer.difficulty import CUDSettings, cud_scores

    graph = GRAPHS[0]
    edges = random_edges(graph, 12).float()
    settings = CUDSettings("top_k", k=30, selection="greedy", prune=True)
    found = cud_scores(edges[:4], edges[4:8], edges[8:], settings, graph=graph)
    chosen = select_circuits(edges[:4], graph, selection="greedy", k=30, prune=True)
    assert chosen.any(1).all()
    anchors = []
    for side in (edges[4:8], edges[8:]):
        mean = (side / side.norm(dim=1, keepdim=True)).mean(0, keepdim=True)
        anchors.append(mean * select_circuits(mean, graph, selection="greedy", k=30, prune=True))
    near = [1 - torch.cosine_similarity(edges[:4] * chosen, anchor) for anchor in anchors]
    assert found == pytest.approx((near[0] / (near[0] + near[1])).numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="need the graph"):
        cud_scores(edges[:4], edges[4:8], edges[8:], settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "greedy"}, "do not apply to log"),
        ({"prune": True}, "do not apply to log"),
        ({"variant": "top_k", "selection": "threshold"}, "unknown circuit selection 'threshold'"),
        ({"variant": "top_k", "selection": "greedy", "k": "all"}, "needs a number of edges"),
        ({"variant": "top_k", "prune": "yes"}, "prune must be"),
    ],
)
def test_settings_of_cud(options, message):
    from cud_trainer.difficulty import CUDSettings

    with pytest.raises(ValueError, match=message):
        CUDSettings(**options)
