"""Command lines of `cud` for the files in a folder."""

from builders import make_model, make_tokenizer, qa_dataset


def make_world(root) -> None:
    """A model folder and two JSON Lines files in `root`."""
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    qa_dataset(9).to_json(root / "forget.jsonl")
    qa_dataset(7, 100).to_json(root / "retain.jsonl")


def data(world) -> list[str]:
    return [
        "--forget_dataset",
        str(world / "forget.jsonl"),
        "--retain_dataset",
        str(world / "retain.jsonl"),
        "--model_name_or_path",
        str(world / "model"),
    ]


def train(world, output, *extra) -> list[str]:
    return [
        "train",
        *data(world),
        "--output_dir",
        str(output),
        "--passes",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "1e-3",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
        "--folds",
        "3",
        "--use_cpu",
        "true",
        "--preserve",  # the model knows nothing: with a stop nothing would be done
        "false",
        *extra,
    ]
