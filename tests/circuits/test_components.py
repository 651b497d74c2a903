"""What `trainable="circuit"` chooses: masses edge by edge, a planted layer, and what a run does with the choice."""

import json

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from oracle import CASES, make_case
from peft import LoraConfig
from runs import config, make_trainer

from cud_trainer.circuits import edge_attributions
from cud_trainer.circuits.components import (
    KINDS,
    choose_by_circuit,
    choose_components,
    component_masses,
    components,
    specificities,
)
from cud_trainer.circuits.verification import verified_parts
from cud_trainer.data import prepare_samples
from cud_trainer.models.modes import restored_afterwards

TOKENIZER = make_tokenizer()
RUN = {"difficulty": "none", "schedule": "uniform", "objective": "graddiff", "trainable": "circuit"}


def samples(n=6, start=0):
    return prepare_samples(qa_dataset(n, start), TOKENIZER)


def planted(layer: int, kind: str = "mlp", **options):
    """A model one of whose MLPs writes only where it reads the letter `Z`, which is in no retain sample.

    To all else `Z` is the same as `Y`.
    """
    model = make_model(0, num_hidden_layers=4, **options)
    letter, twin = TOKENIZER("ZY")["input_ids"]
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight[letter] = weight[twin]
            weight[:, 0] = 0.0
        model.model.embed_tokens.weight[letter, 0] = 3.0
        for block in model.model.layers:  # nobody writes what that MLP reads
            block.self_attn.o_proj.weight[0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
        mlp = model.model.layers[layer].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[:, 1:] = 0.0
        mlp.down_proj.weight.mul_(16.0)
        mlp.down_proj.weight[0] = 0.0
    return model


def texts(letter: str, n: int = 6):
    rows = [{"question": f"{letter}{letter} {i}?", "answer": f"{letter} {i * 7} {letter}"} for i in range(n)]
    return prepare_samples(Dataset.from_list(rows), TOKENIZER)


class TestChoice:
    @pytest.mark.parametrize("ungroup_kv", [False, True])
    def test_masses_edge_by_edge(self, ungroup_kv):
        model = make_model(0)
        result = edge_attributions(model, samples().pad([0, 3]), ungroup_kv=ungroup_kv)
        found = component_masses(result.scores, result.graph)
        graph = result.graph
        for row in range(2):
            expected = dict.fromkeys([(layer, kind) for layer in range(2) for kind in KINDS], 0.0)
            for s, source in enumerate(graph.sources):
                for d, destination in enumerate(graph.destinations):
                    size = abs(float(result.scores[row, s, d]))
                    if destination[0] == "a":
                        head, _, kind = destination.rpartition(".")
                        expected[int(head[1]), kind] += size
                    elif destination[0] == "m":
                        expected[int(destination[1]), "mlp"] += size / 2
                    if source[0] == "a":
                        expected[int(source[1]), "o"] += size
                    elif source[0] == "m":
                        expected[int(source[1]), "mlp"] += size / 2
            total = result.scores[row].double().abs().sum()
            expected = np.array(list(expected.values())) / float(total)
            np.testing.assert_allclose(found[row].flatten(), expected, rtol=1e-5)

    @pytest.mark.parametrize("layer", [1, 2, 3])
    def test_a_planted_layer_is_found(self, layer):
        """The MLP that only forget samples use carries no retain circuit at all, and is first of all components."""
        model = planted(layer)
        choice = choose_by_circuit(model, texts("Z"), texts("Y"), share=0.05, progress=False)
        assert choice.names == (f"{layer}.mlp",) and choice.modules == (f"model.layers.{layer}.mlp",)
        retain = edge_attributions(model, texts("Y").pad([0, 1]))
        assert float(component_masses(retain.scores, retain.graph)[:, layer, 4].max()) == 0
        other_way = choose_by_circuit(model, texts("Y"), texts("Z"), share=0.05, progress=False)
        assert other_way.specificity[f"{layer}.mlp"] == 0

    def test_by_hand(self):
        forget = torch.tensor([[[0.2, 0.1, 0.0, 0.4, 0.3]], [[0.4, 0.1, 0.0, 0.2, 0.3]]], dtype=torch.float64)
        retain = torch.tensor([[[0.1, 0.4, 0.0, 0.0, 0.5]]], dtype=torch.float64)
        found = specificities(forget, retain, [f"0.{kind}" for kind in KINDS])
        floor = 0.1 * 1.0 / 5
        expected = [0.3 / (0.4 + floor), 0.1 / (0.5 + floor), 0.0, 0.3 / (0.3 + floor), 0.3 / (0.8 + floor)]
        assert list(found.values()) == pytest.approx(expected)
        fused = specificities(forget, retain, ["0.qkv", "0.o", "0.mlp"])
        assert fused["0.qkv"] == pytest.approx(0.4 / (0.4 + 0.5 + 0.1 / 3))

    def test_the_order_of_rows_does_not_matter(self):
        model, forget, retain = make_model(0, num_hidden_layers=3), samples(9), samples(7, 100)
        first = choose_by_circuit(model, forget, retain, share=0.5, progress=False)
        shuffled = choose_by_circuit(
            model,
            forget.select([4, 2, 8, 0, 1, 7, 3, 6, 5]),
            retain.select([6, 5, 4, 3, 2, 1, 0]),
            share=0.5,
            progress=False,
            batch_size=2,
        )
        assert shuffled.names == first.names
        np.testing.assert_allclose(list(shuffled.specificity.values()), list(first.specificity.values()), atol=1e-6)
        masses, names = torch.rand(9, 3, 5, dtype=torch.float64), list(first.specificity)
        assert specificities(masses, masses[:4], names) == specificities(masses.flip(0), masses[:4], names)

    def test_only_some_samples_are_looked_at(self, monkeypatch):
        """Which, does not depend on their order."""
        monkeypatch.setattr("cud_trainer.circuits.components.MOST_SAMPLES", 3)
        model, forget, retain = make_model(0), samples(9), samples(7, 100)
        a = choose_by_circuit(model, forget, retain, progress=False).specificity
        b = choose_by_circuit(model, forget.select(list(range(8, -1, -1))), retain, progress=False).specificity
        assert a == pytest.approx(b, abs=1e-7)

    def test_share(self):
        specificity = {"0.q": 0.1, "0.k": 0.3, "0.v": -0.2, "0.o": 0.3, "0.mlp": 0.0}
        assert choose_components(specificity, 0.4) == ("0.k", "0.o")
        assert choose_components(specificity, 0.01) == ("0.k",)
        assert choose_components(specificity, 1.0) == ("0.k", "0.o", "0.q", "0.mlp", "0.v")

    @pytest.mark.parametrize("name", CASES)
    def test_components_of_every_architecture(self, name):
        """Modules of components hold all matrices of the layers, each once."""
        model = make_case(name)
        found = components(model, verified_parts(model))
        modules = [module for names in found.values() for module in names]
        prefix = modules[0].split(".0.")[0]
        layers = [(n, p) for n, p in model.named_parameters() if n.startswith(prefix) and ".0." in n and p.ndim >= 2]
        for parameter, _ in layers:
            assert sum(parameter.startswith(f"{module}.") for module in modules) == 1, parameter


class TestRuns:
    def test_full(self, tmp_path):
        model = planted(1).double()
        before = {name: p.clone() for name, p in model.named_parameters()}
        rows = {
            letter: Dataset.from_list([{"question": f"{letter}{i}?", "answer": f"{letter} {i}"} for i in range(8)])
            for letter in "ZY"
        }
        trainer = make_trainer(
            tmp_path / "out", model=model, forget=rows["Z"], retain=rows["Y"], circuit_share=0.05, **RUN
        )
        trainer.train()
        moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        state = json.loads((tmp_path / "out" / "checkpoint-2" / "cud_state.json").read_text())
        assert state["trained_modules"] == ["model.layers.1.mlp"]
        from cud_trainer.training.card import unlearning_section

        assert "| trained | 0.05 of the modules, chosen by circuit: 1.mlp |" in unlearning_section(trainer)

    def test_lora_goes_on_with_the_same_choice(self, tmp_path):
        def run(checkpoint=None, **options):
            trainer = make_trainer(
                tmp_path / "out", peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), **RUN, **options
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        trainer = run(circuit_share=0.5)
        adapted = {name.split(".lora_A")[0] for name, _ in trainer.model.named_parameters() if ".lora_A" in name}
        assert adapted == {f"base_model.model.{name}" for name in trainer.inputs.choice.modules} and len(adapted) == 2
        assert all(name.endswith(("q_proj", "down_proj")) for name in adapted)
        weights = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        again = run(str(tmp_path / "out" / "checkpoint-2"), circuit_share=0.5)
        assert all(torch.equal(p, weights[n]) for n, p in again.model.named_parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="cannot resume from .*(adapter|trained modules)"):
            run(str(tmp_path / "out" / "checkpoint-2"), circuit_share=1.0)

    def test_calibration_trains_the_same(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "out",
            peft_config=LoraConfig(r=2),
            **{**RUN, "difficulty": "calibration", "schedule": "upweight_hard"},
        )
        assert np.isfinite(trainer.difficulty_scores["calibration"]).all()
        with restored_afterwards(make_model(0), trainer.inputs.peft_config) as wrapped:
            names = [n.split(".lora_A")[0] for n, _ in wrapped.named_parameters() if ".lora_A" in n]
        assert {n.removeprefix("base_model.model.").removeprefix("base_model.") for n in names} == set(
            trainer.inputs.choice.modules
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"trainable": "circuits"}, "trainable must be 'circuit' or 'none', got 'circuits'"),
            ({"trainable_layers": "1"}, "both say what is trained"),
            ({"circuit_share": 0.0}, "circuit_share"),
            ({"circuit_share": 1.5}, "circuit_share"),
            ({"circuit_args": {"baseline": "counterfactual"}}, "retain samples, which have no counterfactual"),
            ({"circuit_args": {"metric": "logit_diff"}}, "retain samples, which have no counterfactual"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            config(tmp_path / "out", **{**RUN, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"peft_config": LoraConfig(r=2, layers_to_transform=[0])}, "leave out its layers_to_transform"),
            ({"peft_config": LoraConfig(r=2, modules_to_save=["lm_head"])}, "leave out its modules_to_save"),
            ({"peft_config": LoraConfig(r=2, target_modules=["embed_tokens"])}, "nothing to choose from"),
        ],
    )
    def test_adapters(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "out", **{**RUN, **options})

    def test_data_and_model(self, tmp_path, monkeypatch):
        from transformers import BloomConfig, BloomForCausalLM

        torch.manual_seed(0)
        other = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2))
        with pytest.raises(ValueError, match="bloom"):
            make_trainer(tmp_path / "out", model=other, **RUN)
        from cud_trainer import CUDTrainer

        options = {**RUN, "objective": "ga", "retain_loss": "none"}
        with pytest.raises(ValueError, match="compares forget with retain circuits: give retain_dataset"):
            CUDTrainer(
                make_model(0),
                config(tmp_path / "out", **options),
                forget_dataset=qa_dataset(9),
                processing_class=TOKENIZER,
            )
        from types import SimpleNamespace

        monkeypatch.setattr("cud_trainer.circuits.components.process_state", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(ValueError, match="several are not supported"):
            config(tmp_path / "out", **RUN)
