"""What goes to the hub, without one: the model and its card do, what tells about single samples does not."""

from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.trainer
from builders import make_model, make_tokenizer, qa_dataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from runs import make_trainer
from transformers import AutoModelForCausalLM

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.data.ids import KEY_FILE, key_in
from cud_trainer.training.card import unlearning_section
from cud_trainer.training.checkpoints import NEVER_UPLOADED, UPLOADED_IF_ASKED

FORGET = qa_dataset(9)


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it would be sent: `{path in the repository: bytes}` of every upload."""
    uploads = []

    def upload_folder(
        self, *, repo_id, folder_path, path_in_repo="", ignore_patterns=None, run_as_future=False, **options
    ):
        assert repo_id == "somebody/model"
        root = Path(folder_path)
        names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
        sent = filter_repo_objects(names, ignore_patterns=ignore_patterns)  # as the hub's own client chooses
        uploads.append({str(Path(path_in_repo) / name): (root / name).read_bytes() for name in sent})
        done = Future()
        done.set_result("commit")
        return done if run_as_future else "commit"

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=f"somebody/{Path(repo_id).name}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    return uploads


def tells_about_samples(upload: dict[str, bytes], ids: list[str]) -> list[str]:
    """Files of an upload that hold an id, as in memory or in files, or a text of a forget sample."""
    hashes = [name.removeprefix("sha256:") for name in ids]
    needles = [text.encode() for text in [*hashes, "hmac:", *FORGET["question"], *FORGET["answer"]]]
    return [name for name, content in upload.items() if any(needle in content for needle in needles)]


def private(upload: dict[str, bytes]) -> list[str]:
    return [n for n in upload if any(fnmatch(Path(n).name, p) for p in (*NEVER_UPLOADED, *UPLOADED_IF_ASKED))]


def run(output, **options):
    options = {"keep_reference": True, **options}
    trainer = make_trainer(output, forget=FORGET, objective="npo", schedule="upweight_hard", **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_model_and_card_are_uploaded_and_nothing_about_samples(hub, tmp_path, lora):
    adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    trainer = run(tmp_path / "model", eval_strategy="steps", eval_steps=5, **adapter)
    (tmp_path / "model" / "difficulty.work").mkdir()
    (tmp_path / "model" / "difficulty.work" / "part-0.safetensors").write_bytes(trainer.forget_ids[0].encode())
    before = transformers.trainer.hf_api
    assert trainer.push_to_hub() == "commit" and transformers.trainer.hf_api is before
    (upload,) = hub
    weights = {"adapter_model.safetensors", "adapter_config.json"} if lora else {"model.safetensors", "config.json"}
    assert weights | {"README.md", "tokenizer.json"} <= set(upload)
    assert not [name for name in upload if name.startswith("checkpoint-") or "difficulty.work" in name]
    assert not private(upload) and not tells_about_samples(upload, trainer.forget_ids)
    card = upload["README.md"].decode()
    measured = [entry for entry in trainer.state.log_history if "eval_forget_prob" in entry][-1]
    for line in (
        "| objective | npo |",
        "| schedule | upweight_hard |",
        "| difficulty | loss |",
        f"| forget set, extraction strength | {measured['eval_forget_extraction']:.4f} |",
        f"| difficulty bucket 1, easiest | {measured['eval_forget_prob/bucket_1']:.4f} |",
        f"| difficulty bucket 4, hardest | {measured['eval_forget_prob/bucket_4']:.4f} |",
        f"| retain set | {measured['eval_retain_prob']:.4f} |",
    ):
        assert line in card, line
    # They are still where the run left them.
    for name in ("difficulty.parquet", "schedule.parquet", "reference.safetensors"):
        assert (tmp_path / "model" / name).is_file()


def test_scores_are_uploaded_if_asked(hub, tmp_path):
    trainer = run(tmp_path / "model", hub_difficulty=True)
    trainer.push_to_hub()
    assert set(UPLOADED_IF_ASKED) <= set(hub[0]) and not {"reference.safetensors", KEY_FILE} & set(hub[0])
    (tmp_path / "copy.parquet").write_bytes(hub[0]["difficulty.parquet"])
    key = key_in(tmp_path / "model")
    assert DifficultyScores.load(tmp_path / "copy.parquet").ids == [key.keyed(name) for name in trainer.forget_ids]


def test_checkpoints_during_training(hub, tmp_path):
    """Every save is pushed (the default with `push_to_hub`), and the last checkpoint beside it."""
    trainer = run(tmp_path / "model", push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True)
    assert len(hub) >= 4 and any("last-checkpoint/optimizer.pt" in upload for upload in hub)
    for upload in hub:
        assert not private(upload) and not tells_about_samples(upload, trainer.forget_ids)
    assert "## Unlearning" in hub[-2]["README.md"].decode()


def test_an_upload_that_fails_leaves_the_trainer_as_it_was(tmp_path, monkeypatch):
    trainer = run(tmp_path / "model")
    before = transformers.trainer.hf_api

    def fail(self, *args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ConnectionError):
        trainer.push_to_hub()
    assert transformers.trainer.hf_api is before


def test_command_line(hub, tmp_path):
    """`cud train` measures at its end, writes the card, and pushes on request."""
    make_model(0).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    FORGET.to_json(tmp_path / "forget.jsonl")
    qa_dataset(7, 100).to_json(tmp_path / "retain.jsonl")
    command = [
        "train",
        "--model_name_or_path",
        str(tmp_path / "start"),
        "--forget_dataset",
        str(tmp_path / "forget.jsonl"),
        "--retain_dataset",
        str(tmp_path / "retain.jsonl"),
        "--output_dir",
        str(tmp_path / "model"),
        "--passes",
        "1",
        "--difficulty",
        "loss",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--use_cpu",
        "true",
        "--preserve",
        "false",
        "--learning_rate",
        "1e-3",
        "--disable_tqdm",
        "true",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "somebody/model",
    ]
    assert main(command) == 0
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---") and card.count("## Unlearning") == 1 and "cud-trainer" in card
    for line in ("measured at step 2:", "| difficulty bucket 4, hardest | 0.", "| retain set | 0."):
        assert line in card, line
    assert hub[-1]["README.md"].decode() == card and not private(hub[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == 258


class TestCard:
    def test_without_an_evaluation_the_retain_loss_stands_for_utility(self, tmp_path):
        trainer = run(tmp_path / "model", passes=1)
        card = unlearning_section(trainer)
        last = [entry["retain_loss"] for entry in trainer.state.log_history if "retain_loss" in entry][-1]
        assert f"Retain loss (nll) of the last training steps: {last:.4f}." in card
        assert "| forget samples of these steps | 0." in card and "| forget set |" not in card

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_says_what_predict_says(self, tmp_path, lora):
        """One number, whoever asks: the card from Python, the log, `predict`."""
        make_model(0).save_pretrained(tmp_path / "a_base")
        make_tokenizer().save_pretrained(tmp_path / "a_base")
        adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
        trainer = run(tmp_path / "model", model=str(tmp_path / "a_base"), passes=2, **adapter)
        trainer.create_model_card()
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        said = trainer.predict().metrics
        assert f"| forget set | {said['test_forget_prob']:.4f} |" in card
        assert f"| retain set | {said['test_retain_prob']:.4f} |" in card
        assert trainer.measured()["eval_forget_prob"] == said["test_forget_prob"]
        assert "fine-tuned version of a_base." in card and "None" not in card.split("## Quick")[0]
        assert "| base model | a_base |" in card and str(tmp_path) not in card
        assert f"| trained | {'an adapter (LORA)' if lora else 'the weights'} |" in card
        assert "trained with npo, schedule upweight_hard, difficulty loss." in card and "2601.09624" not in card

    def test_names_cud_where_it_was_used(self, tmp_path):
        scores = DifficultyScores([f"s{i}" for i in range(9)], {"cud": [i / 9 for i in range(9)]})
        forget = FORGET.add_column("id", scores.ids)
        trainer = make_trainer(tmp_path / "model", forget=forget, difficulty="cud", difficulty_scores=scores)
        trainer.create_model_card()
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        assert "trained with CUD (" in card and "2601.09624" in card

    def test_figures_are_those_of_the_weights_that_were_kept(self, tmp_path):
        """With `load_best_model_at_end` the last evaluation may be of other weights."""
        trainer = run(
            tmp_path / "model",
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="forget_prob",
            greater_is_better=True,
        )
        trainer.create_model_card()
        assert trainer.state.best_global_step == 2 and trainer.state.global_step > 2
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        assert "measured at step 2:" in card
        assert f"| forget set | {trainer.predict().metrics['test_forget_prob']:.4f} |" in card

    def test_no_ids_or_folders_in_it(self, tmp_path):
        ids = ["first", "second"]
        forget = FORGET.add_column("id", [*ids, *(f"s{i}" for i in range(7))])
        trainer = make_trainer(
            tmp_path / "model",
            forget=forget,
            difficulty="cud",
            folds=2,
            difficulty_args={"anchors": {"easy": ids[:1], "hard": ids[1:]}, "save_anchors": str(tmp_path / "bank.st")},
            difficulty_scores=DifficultyScores(list(forget["id"]), {"cud": [i / 9 for i in range(9)]}),
        )
        trainer.create_model_card()
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        assert "| difficulty | cud (anchors=given, save_anchors=bank.st) |" in card
        assert str(tmp_path) not in card.split("## Unlearning")[1]
