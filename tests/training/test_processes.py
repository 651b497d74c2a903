"""However many processes share the batches of a run, it ends with the same weights."""

import processes
import pytest
import split_worker
import torch
from builders import SUPPORT, make_model
from runs import config, make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights of the models that one process trained, by name."""
    output = tmp_path_factory.mktemp("alone")
    split_worker.train(str(output), 1)
    return {path.stem: torch.load(path) for path in output.glob("*.pt")}


@pytest.mark.parametrize("count", [3, 5])
def test_any_number_of_processes(alone, tmp_path, count):
    """As with two (test_run). 11 forget samples, 7 retain samples, 3 steps: nothing is a multiple of anything.

    GPT-2 computes in float64 throughout. Llama's norms round to float32, so that a difference of 1e-16 can become one of
    6e-8 there; Adam then moves a weight by some thousandths of the learning rate differently.
    """
    done = processes.run(SUPPORT / "split_worker.py", tmp_path, processes=count)
    assert done.returncode == 0, done.stdout + done.stderr
    bounds = {"gpt2": 1e-10, "llama": 0.01 * config(tmp_path / "none").learning_rate}
    for name, bound in bounds.items():
        weights = torch.load(tmp_path / f"{name}.pt")
        assert max(float((a - b).abs().max()) for a, b in zip(alone[name], weights, strict=True)) <= bound


@pytest.mark.parametrize(("dtype", "expected"), [("double", torch.float64), ("bfloat16", torch.float32)])
def test_weights_of_rows_are_as_exact_as_the_model(tmp_path, dtype, expected):
    trainer = make_trainer(tmp_path, model=getattr(make_model(0), dtype)(), schedule="upweight_hard", passes=1)
    rows = [{name: values[row] for name, values in trainer.plan.rows.items()} for row in range(8, 12)]  # the last batch
    batch = trainer.plan.collator(rows)
    for name in ("weight", "retain_scale"):
        assert batch[name].dtype == expected
        assert batch[name].tolist() == torch.tensor([row[name] for row in rows], dtype=expected).tolist()
