"""`python3 -m benchmarks.gpu`: all parts run small on the CPU; what makes its figures is right on known cases."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import decisive, right
from benchmarks.gpu.__main__ import budgets, main
from benchmarks.gpu.record import Record, plain
from benchmarks.gpu.right import judged, oracle, rank_correlation
from benchmarks.gpu.runs import Job
from benchmarks.gpu.setting import Setting
from evaluation.endpoint import Endpoint, best, contrast, endpoint, worst_quarter

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CPU = torch.device("cpu")


def start(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """All parts, once."""
    folder = tmp_path_factory.mktemp("gpu")
    done = start("--tiny", "--output_dir", str(folder))
    return done, {path.stem[4:]: json.loads(path.read_text()) for path in folder.glob("gpu-*.json")}, folder


def test_all_parts_run_on_a_cpu(tiny):
    done, found, _ = tiny
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(found) == {"right", "fast", "decisive"}
    for part, state in found.items():
        assert state["status"] == "complete" and state["left_out"] == [] and state["tiny"]
        assert not [key for key, figure in state["figures"].items() if "error" in figure or "out_of_memory" in figure]
        (piece,) = state["pieces"]
        assert piece["device"]["name"] == "CPU" and piece["versions"]["torch"] == torch.__version__
        assert f"\n{part}: complete" in done.stdout


def test_right_has_every_architecture_within_its_limits(tiny):
    figures = tiny[1]["right"]["figures"]
    assert {key.split()[0] for key in figures} == {"smollm2", *oracle().CASES}
    assert all(figure["beyond_limit"] == "" for figure in figures.values())
    assert all(figure["edges"] > 0 for figure in figures.values())  # the two sides are not the same computation


def test_fast_has_every_ratio(tiny):
    figures = tiny[1]["fast"]["figures"]
    for model in ("llama-1b", "llama-8b", "smollm2"):
        for method in ("eap", "eap-ig", "exact"):
            assert figures[f"attribution {model} 12 tokens {method} batch 2"]["ratio"]["median"] > 0
    for key in ("step llama-1b full", "step llama-8b lora"):
        variants = figures[key]["variants"]
        assert variants["bare loop"]["ratio"]["median"] == 1 and len(variants) == 3
    assert all(figures["logits llama-1b"][name]["ratio"]["median"] > 0 for name in ("nll", "kl"))
    assert figures["evaluate smollm2"]["ratio"]["median"] > 0
    assert "paged needs a CUDA device" in figures["answers smollm2"]["skipped"]


def test_decisive_pairs_its_arms_by_seed(tiny):
    state = tiny[1]["decisive"]
    runs = [figure for key, figure in state["figures"].items() if key.startswith("run ")]
    assert {run["arm"] for run in runs} == set(decisive.ARMS) and len({run["model"] for run in runs}) == 1
    assert all(run["steps"] == [0, 2, 4] for run in runs)
    for arm, by_seed in state["outcome"]["kept"].items():
        key = f"run {arm} weight {state['chosen_weight'][arm]:g} seed "
        assert by_seed == {seed: state["figures"][key + seed]["kept"] for seed in ("1", "2")}
    assert set(state["outcome"]["contrasts"]) == {f"{a} over {b}" for a, b in decisive.CONTRASTS}
    before = {run["held_out"][0] for run in runs}
    assert len(before) == 1  # every run starts from the same model


def test_what_is_done_is_not_done_again(tiny, tmp_path):
    _, found, folder = tiny
    record = Record(tmp_path / "x.json", "right", CPU, 0.001, tiny=True, earlier=folder / "gpu-right.json")
    right.run(record, Setting(CPU, True, None, None, tmp_path))
    assert record.finish() == "complete" and record.figures == found["right"]["figures"]
    assert len(record.pieces) == 2


def test_without_a_gpu(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.gpu: there is no CUDA device; --tiny runs every part, small, on the CPU\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slow"], "unknown part 'slow'"),
        (["--tiny", "--processes", "0"], "--processes must be at least 1"),
        (["--tiny", "--budget-s", "slow=3"], "got 'slow=3'"),
        (["--tiny", "--budget-s", "-3"], "got '-3'"),
        (["--tiny", "--budget-s", "nan"], "got 'nan'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_budgets():
    defaults = {"right": 1.0, "fast": 2.0, "decisive": 3.0}
    assert budgets([], ["right"], defaults) == defaults
    assert budgets(["10"], ["right", "fast"], defaults) == {"right": 10, "fast": 10, "decisive": 3}
    assert budgets(["10", "fast=20"], ["right", "fast"], defaults) == {"right": 10, "fast": 20, "decisive": 3}


def test_a_record_says_what_went_wrong_and_goes_on(tmp_path):
    path = tmp_path / "gpu-fast.json"
    record = Record(path, "fast", CPU, 100.0, tiny=False)

    def fail(error):
        raise error

    assert record.figure("good", lambda: {"value": 1 / 3, "broken": float("nan")})["value"] == 0.333333
    record.figure("memory", lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    record.figure("bad", lambda: fail(RuntimeError("no\nkernel")))
    assert json.loads(path.read_text())["status"] == "cut off"
    record.budget_s = 0.0
    assert record.figure("late", lambda: {"value": 1}) is None
    assert record.figure("good", lambda: fail(AssertionError("made again")))["value"] == 0.333333
    assert record.finish() == "out of budget, 1 failed"
    state = json.loads(path.read_text())
    assert state["figures"]["good"]["broken"] == "nan"
    assert state["figures"]["memory"]["out_of_memory"] == "OutOfMemoryError: CUDA out of memory"
    assert state["figures"]["bad"]["error"] == "RuntimeError: no kernel"
    assert state["left_out"] == ["late"]

    again = Record(tmp_path / "elsewhere" / "gpu-fast.json", "fast", CPU, 100.0, tiny=False, earlier=path)
    for key in ("good", "memory"):
        assert again.figure(key, lambda: fail(AssertionError("made again"))) == state["figures"][key]
    assert again.figure("bad", lambda: {"value": 2})["piece"] == 1
    assert again.figure("late", lambda: {"value": 3})["value"] == 3
    assert again.finish() == "complete"
    with pytest.raises(ValueError, match="choose another folder"):
        Record(path, "fast", CPU, 100.0, tiny=True)


def test_plain_values():
    found = plain({"a": (np.float32(0.1), np.int64(3), True, None), 1: float("-inf")})
    assert found == {"a": [0.1, 3, True, None], "1": "-inf"}


def test_errors_are_judged():
    exact = {"edges": 0.0, "edges_rank": 1.0, "logps": 0.0, "loss": 0.0, "gradient": 0.0, "gradient_cosine": 1.0}
    assert judged(exact, torch.float32)["beyond_limit"] == ""
    assert judged({**exact, "gradient": 0.1, "loss": float("nan")}, torch.float32)["beyond_limit"] == "loss, gradient"
    assert judged({**exact, "edges_rank": 0.9, "edges": 0.1}, torch.bfloat16)["beyond_limit"] == "edges_rank"
    a = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert rank_correlation(a, a**3) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)


# -- the endpoint on runs whose outcome is known -----------------------------------------------------------------------


def test_worst_quarter():
    assert worst_quarter(np.array([0.1, 0.9, 0.2, 0.3, 0.7, 0.0, 0.0, 0.0])) == pytest.approx(0.8)
    assert worst_quarter(np.array([[0.5], [0.25]])).tolist() == [0.5, 0.25]  # one sample is a quarter


def path(worst, rest=0.0):
    """Snapshots of 4 samples, one of which is the worst."""
    return np.array([[value, rest, rest, rest] for value in worst])


def test_endpoint_is_the_first_snapshot_at_the_level():
    found = endpoint(path([1.0, 0.4, 0.1, 0.02]), np.array([0.8, 0.76, 0.6, 0.2]))
    assert (found.snapshot, found.kept, found.left) == (2, pytest.approx(0.75), pytest.approx(0.025))
    assert (found.worst_at_kept, found.lowest) == (0.4, 0.02)  # 95% are left at the second


def test_endpoint_of_samples_is_that_of_their_mean():
    held_out = np.array([[1.0, 0.5], [0.5, 0.25]])
    assert endpoint(path([1.0, 0.05]), held_out) == endpoint(path([1.0, 0.05]), held_out.mean(1))
    assert endpoint(path([1.0, 0.05]), held_out).kept == 0.5


def test_a_run_that_comes_back_is_judged_where_it_was_there():
    assert endpoint(path([1.0, 0.1, 0.9]), np.array([1.0, 0.9, 0.5])).kept == pytest.approx(0.9)


def test_a_run_that_never_gets_there():
    found = endpoint(path([1.0, 0.5]), np.array([1.0, 0.1]))
    assert (found.snapshot, found.kept, found.left) == (None, None, None)
    assert (found.worst_at_kept, found.lowest) == (1.0, 0.5)


def test_what_was_never_known_need_not_be_forgotten():
    curves = path([1.0, 0.3, 0.05]), np.array([1.0, 0.9, 0.5])
    assert endpoint(*curves, never_seen=np.array([0.35, 0.0, 0.0, 0.0])).kept == pytest.approx(0.9)
    assert endpoint(*curves, never_seen=np.array([0.05, 0.0, 0.0, 0.0])).kept == pytest.approx(0.5)  # the level is 0.1


@pytest.mark.parametrize(("held_out", "message"), [([1.0, 0.5, 0.1], "2 snapshots"), ([0.0, 0.0], "nothing is known")])
def test_endpoint_refuses(held_out, message):
    with pytest.raises(ValueError, match=message):
        endpoint(path([1.0, 0.1]), np.array(held_out))


def end(kept, lowest):
    return Endpoint(None if kept is None else 1, kept, None, 1.0, lowest)


def test_the_best_setting():
    assert best({4.0: end(0.5, 0.0), 16.0: end(0.8, 0.1), 64.0: end(None, 0.2)}) == 16.0
    assert best({4.0: end(None, 0.3), 16.0: end(None, 0.2)}) == 16.0


def test_contrast_is_paired_by_seed():
    found = contrast({1: 0.8, 2: 0.6, 3: None, 4: 0.9}, {1: 0.4, 2: 0.3, 3: 0.5})
    assert (found.differences, found.seeds, found.missing) == ([pytest.approx(0.4), pytest.approx(0.3)], [1, 2], [3])
    assert found.mean == found.low == found.high == pytest.approx(np.log(2))  # the same factor in both seeds
    spread = contrast({1: 0.8, 2: 0.4}, {1: 0.4, 2: 0.4})
    # t quantile 12.706 with one degree of freedom; the half width of two values is that times half their distance
    assert spread.high - spread.mean == pytest.approx(12.7062 * np.log(2) / 2, rel=1e-4)
    assert contrast({1: 0.5}, {1: 0.25}).low is None


# -- who runs when -----------------------------------------------------------------------------------------------------


def a_run(arm, weight, seed, kept, model="m"):
    return Job(arm, {}, weight, seed).key, {
        "arm": arm,
        "weight": weight,
        "seed": seed,
        "model": model,
        "snapshot": 1,
        "kept": kept,
        "left": 0.0,
        "worst_at_kept": 1.0,
        "lowest": 0.0,
    }


def test_only_weights_that_all_arms_have_tried_are_chosen_from():
    runs = dict(a_run(arm, 16.0, 0, 0.5) for arm in decisive.ARMS)
    assert set(decisive.tuned(runs, (16.0, 4.0)).values()) == {16.0}
    runs |= dict(a_run(arm, 4.0, 0, 0.6) for arm in list(decisive.ARMS)[1:])
    assert set(decisive.tuned(runs, (16.0, 4.0)).values()) == {16.0}  # `uniform` lacks it
    runs |= dict([a_run("uniform", 4.0, 0, 0.4)])
    chosen = decisive.tuned(runs, (16.0, 4.0))
    assert chosen.pop("uniform") == 16.0 and set(chosen.values()) == {4.0}
    assert set(decisive.tuned({}, (16.0, 4.0)).values()) == {16.0}


def test_a_seed_cut_off_is_not_mixed_with_another_model(tmp_path):
    record = Record(tmp_path / "x.json", "decisive", CPU, 100.0, tiny=True)
    runs = [a_run(arm, 16.0, seed, 0.5, "old") for seed in (0, 1) for arm in decisive.ARMS]
    half = [a_run(arm, 16.0, 2, 0.5, "old") for arm in list(decisive.ARMS)[:2]]
    mine = [a_run("uniform", 16.0, 3, 0.5, "new")]
    record.figures.update(runs + half + mine)
    decisive.drop_half_seeds(record, "new")
    assert set(record.figures) == set(dict(runs + mine))


def shared(monkeypatch, work):
    monkeypatch.setattr(decisive, "work", work)
    return decisive.Share(ThreadPoolExecutor(4), 4)


def test_runs_that_need_too_much_memory_share_with_fewer(tmp_path, monkeypatch):
    record, tried = Record(tmp_path / "x.json", "decisive", CPU, 100.0, tiny=True), []

    def work(kind, number):
        tried.append(number)
        return {"out_of_memory": "too much"} if share.limit > 1 else {"seconds": 0.0}

    share = shared(monkeypatch, work)
    share.run(record, [(f"run {number}", ("unlearn", number)) for number in range(3)])
    assert share.limit == 1 and set(record.figures) == {"run 0", "run 1", "run 2"}
    assert not [key for key, figure in record.figures.items() if "out_of_memory" in figure]


def test_no_run_is_begun_that_would_not_end(tmp_path, monkeypatch):
    record = Record(tmp_path / "x.json", "decisive", CPU, 100.0, tiny=True)
    share = shared(monkeypatch, lambda kind, number: {"seconds": 1000.0})
    share.run(record, [(f"run {number}", ("unlearn", number)) for number in range(6)])
    assert set(record.figures) == {f"run {number}" for number in range(4)}  # nothing was known of their length
    assert record.state["left_out"] == ["run 4", "run 5"]


def test_the_grid_is_cut_and_not_the_seeds(tmp_path, monkeypatch):
    """Room for one further weight of all arms, and for the runs of fresh seeds, four by arm; not for two weights."""
    record = Record(tmp_path / "x.json", "decisive", CPU, 1000.0, tiny=True)
    share = shared(monkeypatch, lambda kind, job, never_seen: a_run(job.arm, job.weight, job.seed, 0.5)[1])
    share.walls = [4 * 990.0 / (5 * len(decisive.ARMS) + 2)]  # of four at a time
    decisive.tune(record, share, (16.0, 4.0, 64.0), (1, 2, 3, 4), None)
    assert {figure["weight"] for figure in record.figures.values()} == {4.0}
    assert len(record.figures) == len(decisive.ARMS) == len(record.state["left_out"])


def test_runs_made_by_another_protocol_are_refused(tmp_path):
    record = Record(tmp_path / "x.json", "decisive", CPU, 100.0, tiny=True)
    protocol = {"plan": {"steps": 120}, "arms": {"uniform": {"difficulty": "none"}}}
    decisive.check_protocol(record, protocol)
    decisive.check_protocol(record, {**protocol, "arms": {**protocol["arms"], "tail": {"schedule": "tail"}}})
    with pytest.raises(ValueError, match="another plan"):
        decisive.check_protocol(record, {**protocol, "plan": {"steps": 60}})
    with pytest.raises(ValueError, match="another arms"):
        decisive.check_protocol(record, {**protocol, "arms": {"uniform": {}, "tail": {"schedule": "tail"}}})
