"""Private names of other packages that are used outside `training/hooks.py`: one test each, which fails when they go
away."""

import inspect

import torch
from accelerate import cpu_offload
from builders import make_model
from datasets import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainingArguments
from transformers.integrations import WandbCallback


def test_an_offloaded_module_says_where_it_runs():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert not hasattr(model[0], "_hf_hook")
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.device.type == "meta"
    assert torch.device(model[0]._hf_hook.execution_device) == torch.device("cpu")


def test_open_progress_bars_are_listed(tmp_path):
    with (tmp_path / "bar").open("w") as file:
        bar = tqdm(total=2, file=file)
        assert bar in tqdm._instances
        bar.close()
        assert bar not in tqdm._instances


def test_a_trainer_drops_columns_of_a_given_dataset(tmp_path):
    model = torch.nn.Linear(1, 1)  # its forward reads `input`
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    data = Dataset.from_dict({"input": [1.0], "author": ["x"]})
    assert trainer._remove_unused_columns(data, description="training").column_names == ["input"]


def test_the_wandb_callback_keeps_its_module():
    assert "self._wandb = wandb" in inspect.getsource(WandbCallback)


def test_a_configuration_says_which_attention_runs():
    model = make_model(0)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_module_computes_with_what_its_tables_hold():
    norm = torch.nn.BatchNorm1d(2).eval()
    norm._parameters["weight"], norm._buffers["running_mean"] = torch.full((2,), 3.0), torch.ones(2)
    torch.testing.assert_close(norm(torch.full((1, 2), 2.0)), torch.full((1, 2), 3.0), rtol=1e-4, atol=0)


def test_a_compiled_model_keeps_the_model():
    model = torch.nn.Linear(1, 1)
    assert torch.compile(model, backend="eager")._orig_mod is model and not hasattr(model, "_orig_mod")
