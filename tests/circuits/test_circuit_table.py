"""Edge scores on disk."""

import pytest
import torch

from cud_trainer.circuits import CircuitTable, Graph


def table(n=3):
    graph = Graph(2, 4, 2, parallel=True)
    return CircuitTable([f"s{i}" for i in range(n)], torch.randn(n, graph.n_edges), graph, {"method": "eap"})


def test_round_trip(tmp_path):
    saved = table()
    loaded = CircuitTable.load(saved.save(tmp_path / "circuits.safetensors"))
    assert (loaded.ids, loaded.graph, loaded.settings) == (saved.ids, saved.graph, saved.settings)
    assert torch.equal(loaded.edges, saved.edges)
    assert [p.name for p in tmp_path.iterdir()] == ["circuits.safetensors"]


def test_never_overwritten_silently(tmp_path):
    path = table().save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="exists; pass overwrite"):
        table().save(path)
    table(2).save(path, overwrite=True)
    assert CircuitTable.load(path).ids == ["s0", "s1"]


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="cannot read circuits"):
        CircuitTable.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="cannot read circuits"):
        CircuitTable.load(tmp_path / "text")
    save_file({"edges": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="cannot read circuits"):
        CircuitTable.load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\[3, 5\] do not fit"):
        CircuitTable(["a", "b", "c"], torch.zeros(3, 5), Graph(2, 4, 2))


def test_parallel_blocks_have_no_edges_from_a_layers_heads_to_its_mlp():
    sequential, parallel = Graph(3, 4, 2), Graph(3, 4, 2, parallel=True)
    assert sequential.n_edges - parallel.n_edges == 3 * 4
    gone = (sequential.mask & ~parallel.mask).nonzero().tolist()
    names = {(parallel.sources[u], parallel.destinations[v]) for u, v in gone}
    assert names == {(f"a{layer}.h{head}", f"m{layer}") for layer in range(3) for head in range(4)}
    assert sequential.fingerprint != parallel.fingerprint
