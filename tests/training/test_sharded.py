"""DeepSpeed and FSDP 2 on two processes, over gloo: a run is the run that it is on plain DDP."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from builders import ROOT, SUPPORT, make_model, make_tokenizer, qa_dataset
from peft import PeftModel
from processes import run
from runs import config, make_trainer
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_available

from cud_trainer import score_difficulty
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.training import stack

pytestmark = pytest.mark.slow

# Reference quantities of both losses, an order, and weights that follow the run: some samples stop, others go on.
LIVELY = {
    "objective": "npo",
    "retain_loss": "kl",
    "passes": 3,
    "save_steps": 1,
    "schedule": "hard_to_easy+upweight_hard+per_sample_stop+dynamic",
    "schedule_args": {"per_sample_stop": {"target": 0.0008, "start": 0.0015}, "dynamic": {"every": 1}},
    "logits_bytes": 1,  # one position at a time where weights are whole; split ones make all at once
}
SHORT = {"objective": "npo", "retain_loss": "kl", "passes": 1, "save_strategy": "no"}
FORGOTTEN = {"schedule": "upweight_hard+per_sample_stop", "schedule_args": {"per_sample_stop": {"target": 0.9}}}


def started(folder, runs):
    (folder / "runs.json").write_text(json.dumps(runs))
    make_model(0).save_pretrained(folder / "model")
    arguments = [folder, folder / "result.json", folder / "runs.json"]
    done = run(SUPPORT / "sharded_worker.py", *arguments, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text()), folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """Plain DDP, and FSDP 2."""
    return started(
        tmp_path_factory.mktemp("fsdp"),
        [
            {"name": "plain", "how": "ddp", **LIVELY},
            {"name": "plain lora", "how": "ddp", "lora": True, **LIVELY},
            {"name": "fsdp2", "how": "fsdp2", **LIVELY},
            {"name": "fsdp2 resumed", "how": "fsdp2", "resume": "fsdp2", **LIVELY},
            {"name": "fsdp2 lora", "how": "fsdp2", "lora": True, **LIVELY},
            {"name": "fsdp2 still", "how": "fsdp2", **SHORT, "learning_rate": 0.0},
            {"name": "fsdp2 void", "how": "fsdp2", **SHORT, **FORGOTTEN},
        ],
    )


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    if not is_deepspeed_available():
        pytest.skip("the package deepspeed is not installed (extra `deepspeed`)")
    folder = tmp_path_factory.mktemp("deepspeed")
    return started(
        folder,
        [
            {"name": "zero1", "how": "zero1", **LIVELY},
            {"name": "zero2", "how": "zero2", **LIVELY},
            {"name": "zero2 resumed", "how": "zero2", "resume": "zero2", **LIVELY},
            {"name": "zero3", "how": "zero3", "path": str(folder / "model"), **LIVELY},
            {"name": "zero3 resumed", "how": "zero3", "resume": "zero3", **LIVELY},
            {"name": "zero3 lora", "how": "zero3", "lora": True, **LIVELY},
            {"name": "zero2 bf16", "how": "zero2", **SHORT, "bf16": True},
            {"name": "zero3 bf16", "how": "zero3 launched", "path": str(folder / "model"), **SHORT, "bf16": True},
            {"name": "zero2 still", "how": "zero2", **SHORT, "learning_rate": 0.0},
            {"name": "zero3 still", "how": "zero3", **SHORT, "learning_rate": 0.0},
        ],
    )


def check_same(found, plain, kind):
    assert found["type"] == kind and plain["type"] == "MULTI_CPU"
    assert found["served"] == found["planned"] == plain["served"]
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["norms"], plain["norms"], rtol=1e-5)
    np.testing.assert_allclose(found["factor"], plain["factor"], rtol=1e-4)
    np.testing.assert_allclose(found["left"], plain["left"], rtol=1e-4)


def check_saved(found, path, tokenizer, lora):
    saved = PeftModel.from_pretrained(make_model(0), path) if lora else AutoModelForCausalLM.from_pretrained(path)
    left = answer_probability(saved, prepare_samples(qa_dataset(9), tokenizer, name="forget"))
    np.testing.assert_allclose(left, found["left"], rtol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.subprocess
class TestFSDP:
    @pytest.mark.parametrize("lora", ["", " lora"])
    def test_is_the_run_of_plain_ddp(self, fsdp, tokenizer, lora):
        found, folder = fsdp
        check_same(found["fsdp2" + lora], found["plain" + lora], "FSDP")
        check_saved(found["fsdp2" + lora], folder / f"fsdp2{lora}" / "final", tokenizer, lora)

    def test_weights_follow_the_run(self, fsdp):
        factor = np.array(fsdp[0]["plain"]["factor"])
        assert (factor == 0).any() and ((factor != 0) & (factor != 1)).any()

    def test_goes_on(self, fsdp):
        straight, resumed = fsdp[0]["fsdp2"], fsdp[0]["fsdp2 resumed"]
        assert resumed["served"] == straight["served"] and resumed["factor"] == straight["factor"]
        np.testing.assert_allclose(resumed["losses"], straight["losses"], rtol=1e-6)
        np.testing.assert_allclose(resumed["left"], straight["left"], rtol=1e-6)

    def test_what_comes_to_nothing_is_seen(self, fsdp):
        found, _ = fsdp
        assert found["fsdp2"]["void"] is None and "no weight has changed" in found["fsdp2 still"]["void"]
        assert "no forget sample that was served had a weight" in found["fsdp2 void"]["void"]
        assert found["fsdp2 void"]["left"] == found["fsdp2 still"]["left"]


@pytest.mark.subprocess
class TestDeepSpeed:
    @pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3 lora"])
    def test_is_the_run_of_plain_ddp(self, deepspeed, fsdp, tokenizer, name):
        found, folder = deepspeed
        lora = " lora" if "lora" in name else ""
        check_same(found[name], fsdp[0]["plain" + lora], "DEEPSPEED")
        check_saved(found[name], folder / name / "final", tokenizer, lora)

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_goes_on(self, deepspeed, name):
        straight, resumed = deepspeed[0][name], deepspeed[0][f"{name} resumed"]
        assert resumed["served"] == straight["served"]
        for figure in ("factor", "losses", "left"):
            np.testing.assert_allclose(resumed[figure], straight[figure], rtol=1e-6)

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_bfloat16_compares_with_the_weights_that_are_trained(self, deepspeed, name):
        """DeepSpeed rounds the weights when it takes the model: the reference is what they say after that."""
        found = deepspeed[0][f"{name} bf16"]
        assert abs(found["retain_losses"][0]) < 1e-6 < found["retain_losses"][1]
        assert found["void"] is None

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_what_moves_nothing_is_seen(self, deepspeed, name):
        assert deepspeed[0][name]["void"] is None
        assert "no weight has changed" in deepspeed[0][f"{name} still"]["void"]


def test_partitioned_weights_are_refused(tmp_path):
    model = make_model(0)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="already partitioned by DeepSpeed"):
        make_trainer(tmp_path / "out", model=model)
    with pytest.raises(ValueError, match="already partitioned by DeepSpeed"):
        score_difficulty(model, qa_dataset(3), make_tokenizer(), metrics=["length"], progress=False)


SAVES = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": SAVES, "gradient_clipping": "auto"}, None),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, None),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}, "on_model_save to true"),
        ({"zero_optimization": SAVES}, 'set gradient_clipping to "auto"'),
    ],
)
def test_what_a_configuration_leaves_undone_is_refused(tmp_path, settings, message):
    args = config(tmp_path / "out")
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(settings))
    if message is None:
        stack.check_stack(args, make_model(0), own_optimizer=False)
        return
    with pytest.raises(ValueError, match=message):
        stack.check_stack(args, make_model(0), own_optimizer=False)


@pytest.mark.skipif(is_deepspeed_available(), reason="the package deepspeed is installed")
def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"deepspeed needs the package deepspeed \(pip install"):
        config(tmp_path / "out", deepspeed={"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "bf16" and loaded.use_cpu is False
    assert str(loaded.distributed_type.value) == yaml.safe_load(path.read_text())["distributed_type"]
