"""Passes over a dataset: batches by bytes, out of memory, several processes, killed runs."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from builders import PYTHONPATH, SUPPORT, make_model, make_tokenizer, qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run
from transformers import OPTConfig, OPTForCausalLM

from cud_trainer import score_difficulty
from cud_trainer.circuits import CircuitTable
from cud_trainer.data import BATCH_BYTES, plan_batches, prepare_samples
from cud_trainer.resumable import OtherProcessError, WorkDir, run_batches


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 3000),
    st.sampled_from([0.0, 1.0, 7.5]),
)
@settings(max_examples=100, deadline=None)
def test_plan(lengths, batch_size, batch_bytes, per_token):
    plan = plan_batches(lengths, bytes_per_token=per_token, batch_size=batch_size, batch_bytes=batch_bytes)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    ordered = [lengths[row] for rows in plan for row in rows]
    assert ordered == sorted(lengths, reverse=True)
    for rows in plan:
        padded = len(rows) * max(lengths[row] for row in rows)
        assert len(rows) == 1 or padded * per_token <= batch_bytes
        assert batch_size is None or len(rows) <= batch_size
    # no batch could have taken the first sample of the next one
    for rows, following in itertools.pairwise(plan):
        more = (len(rows) + 1) * max(lengths[row] for row in rows) * per_token
        assert len(rows) == batch_size or more > batch_bytes, following


def prepared(n=9):
    return prepare_samples(qa_dataset(n), make_tokenizer())


def sums(batch):
    return {"sum": batch["input_ids"].sum(1), "length": batch["attention_mask"].sum(1)}


def test_rows_come_back_in_dataset_order():
    data = prepared()
    plan = plan_batches([len(tokens) for tokens in data["input_ids"]], batch_size=4)
    found = run_batches("sums", data, sums, plan, progress=False)
    assert found["sum"].tolist() == [sum(tokens) for tokens in data["input_ids"]]
    assert found["length"].tolist() == [len(tokens) for tokens in data["input_ids"]]


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    )
    def test_batches_are_halved_and_results_stay(self, error, monkeypatch):
        from cud_trainer.circuits import attribution

        options = dict(metrics=["circuit_mass", "loss"], batch_size=8, progress=False)
        whole = score_difficulty(make_model(0), qa_dataset(11), make_tokenizer(), **options)
        sizes, edge_attributions = [], attribution.edge_attributions

        def small(model, batch, **rest):
            sizes.append(len(batch["input_ids"]))
            if sizes[-1] > 3:
                raise error
            return edge_attributions(model, batch, **rest)

        monkeypatch.setattr(attribution, "edge_attributions", small)
        halved = score_difficulty(make_model(0), qa_dataset(11), make_tokenizer(), **options)
        assert sizes == [8, 4, 2, 2, 4, 2, 2, 3]
        for name in ("circuit_mass", "loss"):
            assert halved[name] == pytest.approx(whole[name], rel=1e-5)

    def test_a_sample_that_never_fits_is_named(self):
        def never(batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        data = prepared(3)
        longest = max(range(3), key=lambda row: len(data[row]["input_ids"]))
        plan = plan_batches([len(tokens) for tokens in data["input_ids"]])
        with pytest.raises(ValueError, match=f"'{data[longest]['sample_id']}' .*tokens. does not fit into memory"):
            run_batches("sums", data, never, plan, progress=False)

    def test_other_errors_are_not_swallowed(self):
        def wrong(batch):
            raise RuntimeError("shapes differ")

        with pytest.raises(RuntimeError, match="shapes differ"):
            run_batches("sums", prepared(3), wrong, [[0, 1, 2]], progress=False)


class TestWorkDir:
    def test_finished_batches_are_not_computed_again(self, tmp_path):
        data, calls = prepared(), []

        def counted(batch):
            calls.append(len(batch["input_ids"]))
            return sums(batch)

        def run():
            work = WorkDir(tmp_path / "w", {"model": "a"})
            return run_batches("sums", data, counted, plan, work=work, progress=False)

        plan = plan_batches([len(tokens) for tokens in data["input_ids"]], batch_size=2)
        first = run()
        assert calls == [2, 2, 2, 2, 1]
        assert torch.equal(run()["sum"], first["sum"]) and len(calls) == 5
        shards = sorted((tmp_path / "w").glob("sums-*.safetensors"))
        shards[1].write_bytes(shards[1].read_bytes()[:40])  # cut short
        shards[3].unlink()
        assert torch.equal(run()["sum"], first["sum"]) and len(calls) == 7
        WorkDir(tmp_path / "w", {"model": "a"}).remove()
        assert not (tmp_path / "w").exists()

    def test_other_work_is_refused(self, tmp_path):
        WorkDir(tmp_path / "w", {"model": "a", "steps": 5})
        with pytest.raises(ValueError, match="belongs to another run .model: there 'a', here 'b'; steps: there 5"):
            WorkDir(tmp_path / "w", {"model": "b"})
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("precious")
        with pytest.raises(ValueError, match="holds something else"):
            WorkDir(tmp_path / "mine", {"model": "a"})
        (tmp_path / "w" / "run.json").write_text("{")
        with pytest.raises(ValueError, match=r"cannot read .*run.json"):
            WorkDir(tmp_path / "w", {"model": "a"})

    @pytest.mark.parametrize(("error", "stays"), [(ValueError("no"), False), (OtherProcessError("dead"), True)])
    def test_what_a_refusal_takes_away(self, error, stays, tmp_path):
        """Nothing of a call that was to be corrected; all that was done until another process failed."""

        def refused():
            work = WorkDir(tmp_path / "w", {"model": "a"})
            with pytest.raises(type(error)), work.kept_unless_refused():
                work.save("part", {"b": torch.ones(1), "a": torch.zeros(1)})
                raise error

        refused()
        assert (tmp_path / "w").exists() == stays
        before = WorkDir(tmp_path / "w", {"model": "a"})
        before.save("part", {"b": torch.ones(1), "a": torch.zeros(1)})
        refused()  # what was begun before is not its own
        assert list(before.load("part")) == ["b", "a"]

    def test_scoring_again_with_another_model_is_refused(self, tmp_path):
        options = dict(metrics=["circuit_mass"], work_dir=tmp_path / "w", progress=False)
        score_difficulty(make_model(0), qa_dataset(6), make_tokenizer(), **options)
        with pytest.raises(ValueError, match="another run .model: there"):
            score_difficulty(make_model(1), qa_dataset(6), make_tokenizer(), **options)
        with pytest.raises(ValueError, match="circuits: there.*'eap'.*here.*'eap-ig'"):
            score_difficulty(
                make_model(0), qa_dataset(6), make_tokenizer(), circuit_args={"method": "eap-ig"}, **options
            )


def test_circuits_file_and_its_refusals(tmp_path):
    path = tmp_path / "circuits.safetensors"
    scores = score_difficulty(
        make_model(0), qa_dataset(5), make_tokenizer(), metrics=["circuit_mass"], save_circuits=path, progress=False
    )
    table = CircuitTable.load(path)
    table = table.aligned(scores.ids)
    assert scores["circuit_mass"] == pytest.approx(-table.edges.double().abs().sum(1).log().numpy())
    with pytest.raises(ValueError, match="exists"):
        score_difficulty(
            make_model(0), qa_dataset(5), make_tokenizer(), metrics=["loss"], save_circuits=path, progress=False
        )
    other = tmp_path / "other.safetensors"  # also where no metric reads them
    score_difficulty(
        make_model(0), qa_dataset(5), make_tokenizer(), metrics=["loss"], save_circuits=other, progress=False
    )
    torch.testing.assert_close(CircuitTable.load(other).aligned(scores.ids).edges, table.edges)
    with pytest.raises(ValueError, match="save_circuits needs circuits, and .*'opt'"):
        model = OPTForCausalLM(OPTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=16))
        score_difficulty(model, qa_dataset(5), make_tokenizer(), metrics=["loss"], save_circuits=tmp_path / "new")


def test_circuits_file_written_just_before_a_kill(tmp_path):
    path, work = tmp_path / "circuits.safetensors", tmp_path / "work"
    options = dict(metrics=["circuit_mass"], save_circuits=path, work_dir=work, progress=False)
    score_difficulty(make_model(0), qa_dataset(5), make_tokenizer(), **options)
    before = path.read_bytes()
    score_difficulty(make_model(0), qa_dataset(5), make_tokenizer(), **options)  # its own file is no obstacle
    assert path.read_bytes() == before
    other = CircuitTable.load(path)
    other.edges[0, 0] += 1
    other.save(path, overwrite=True)
    with pytest.raises(ValueError, match="exists"):
        score_difficulty(make_model(0), qa_dataset(5), make_tokenizer(), **options)
    score_difficulty(make_model(0), qa_dataset(5), make_tokenizer(), overwrite=True, **options)
    assert path.read_bytes() == before


def test_counterfactual_and_mean_baselines_of_a_dataset():
    data = qa_dataset(6)
    data = data.add_column("perturbed_answer", [[f"Nobody of {i} towns", "No"] for i in range(6)])
    options = dict(metrics=["circuit_mass"], progress=False)
    found = {}
    for baseline in ("zero", "mean", "counterfactual"):
        rival = "perturbed_answer" if baseline == "counterfactual" else None
        found[baseline] = score_difficulty(
            make_model(0),
            data,
            make_tokenizer(),
            circuit_args={"baseline": baseline},
            counterfactual_column=rival,
            **options,
        )["circuit_mass"]
    assert len({tuple(values) for values in found.values()}) == 3
    with pytest.raises(ValueError, match="give counterfactual_column"):
        score_difficulty(make_model(0), data, make_tokenizer(), circuit_args={"baseline": "counterfactual"}, **options)
    with pytest.raises(ValueError, match="no column 'other'"):
        score_difficulty(make_model(0), data, make_tokenizer(), counterfactual_column="other", **options)


def launch(*arguments, check=True, **options):
    done = run(SUPPORT / "scoring_worker.py", *arguments, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(*arguments):
    """Started as a person does it: once, since that imports everything three times."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(SUPPORT / "scoring_worker.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def results(folder):
    return {name: (folder / name).read_bytes() for name in ("scores.parquet", "circuits.safetensors")}


@pytest.mark.subprocess
def test_same_bytes_for_any_number_of_processes_and_after_a_kill(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two", "killed", "killed_two", "no_work")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "ids.key").write_text("0" * 64)  # the same ids in every folder
    launch(folders["one"], tmp_path / "w1", OMP_NUM_THREADS="2")
    expected = results(folders["one"])
    torchrun(folders["two"], tmp_path / "w2")
    launch(folders["no_work"], "none", processes=2)
    for name in ("two", "no_work"):
        assert results(folders[name]) == expected
    assert launch(folders["killed"], tmp_path / "w3", 4, check=False).returncode == -9
    done = sorted((tmp_path / "w3").glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in done}
    assert len(done) == 4 and [path.name for path in folders["killed"].iterdir()] == ["ids.key"]
    launch(folders["killed"], tmp_path / "w3")
    assert results(folders["killed"]) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == before
    # killed with two processes, finished by one
    assert launch(folders["killed_two"], tmp_path / "w4", 2, processes=2, check=False).returncode != 0
    launch(folders["killed_two"], tmp_path / "w4")
    assert results(folders["killed_two"]) == expected


@pytest.mark.subprocess
def test_a_failing_process_stops_them_all(tmp_path):
    done = launch(tmp_path, "none", "fail", processes=2, check=False)  # nobody ends the other one but itself
    assert done.returncode != 0
    assert "circuits failed on another process; process 1: RuntimeError: the second process fails" in done.stderr
    assert not (tmp_path / "scores.parquet").exists()


def test_no_run_dependent_value_in_the_table(tmp_path):
    scores = score_difficulty(make_model(0), qa_dataset(5), make_tokenizer(), metrics=["loss"], progress=False)
    text = json.dumps(scores.provenance)
    assert str(tmp_path) not in text and "world" not in text and "time" not in text
    assert BATCH_BYTES == 2 * 2**30
