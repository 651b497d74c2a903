"""Command lines of `cud` for the files in a folder."""


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
        *extra,
    ]
