"""`cud score`: how hard each forget sample will be to unlearn."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from ..circuits.components import check_adapter_can_follow, train_by_circuit
from ..config import CUDConfig
from ..data import Samples, check_vocabulary, prepare_samples
from ..difficulty import METRICS, DifficultyScores
from ..files import check_new_file
from ..models.loading import load_causal_lm, load_config
from ..models.trainable import train_only
from ..objectives.alternatives import with_alternatives
from ..ownership import check_no_input, check_output_file, owned, same_file
from ..resumable import WorkDir, remove_work
from ..scoring import check_circuits, check_metrics, score_difficulty
from .help import About
from .options import ScoreArguments, adapter_options, inputs_of, load_tokenizer, model_options, parse_command
from .summary import after_scoring, score_summary

ABOUT = About(
    what="Score how hard each forget sample will be to unlearn; no text is written.",
    usage="--model_name_or_path MODEL --forget_dataset FILE [--retain_dataset FILE] [--output FILE.parquet] "
    "[--OPTION VALUE ...]",
    examples=[
        (
            "CUD and the trivial baselines, with folds that never split an author",
            "cud score --model_name_or_path MODEL --forget_dataset forget.jsonl --retain_dataset retain.jsonl \\\n"
            "    --group_column author --output difficulty.parquet",
        ),
        (
            "metrics without calibration or circuits: one pass",
            "cud score --config recipes/own_data.yaml --model_name_or_path MODEL --metrics loss length",
        ),
        ("Names of metrics: cud list metrics. Recipes: recipes/own_data.yaml, recipes/tofu/*.yaml in a clone.", ""),
    ],
)


def score_model(
    args: CUDConfig,
    model_args: ModelConfig,
    forget: Dataset,
    retain: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> DifficultyScores:
    """Load the model and score it as `args` say; `options` are further ones of `score_difficulty`."""
    trust = bool(getattr(model_args, "trust_remote_code", False))
    adapter = adapter_options(model_args)
    model = load_causal_lm(
        str(model_args.model_name_or_path),
        merge_adapter=adapter is not None,
        trust_remote_code=trust,
        **model_options(model_args),
    ).to(args.device)
    if args.trainable_layers is not None:  # what calibration trains
        train_only(model, args.trainable_layers)
    check_vocabulary(tokenizer, model)
    options.setdefault("template", args.template_context())
    if args.trainable == "circuit":
        adapter = _adapter_by_circuit(args, model, forget, retain, tokenizer, adapter, options["template"])
    options = {**args.scoring_options(adapter), **options}
    samples: Dataset | Samples = forget
    source = args.unlearning_loss.spec.alternative
    if source is not None:
        prepared = prepare_samples(
            forget,
            tokenizer,
            max_length=args.max_length,
            keep_columns=[args.group_column] if args.group_column else [],
            counterfactual_column=args.counterfactual_column,
            template=options["template"],
        )
        samples = with_alternatives(
            prepared, forget, tokenizer, source, model=model, template=options["template"], **args.alternative_options()
        )
    return score_difficulty(model, samples, tokenizer, retain_dataset=retain, **options)


def _adapter_by_circuit(
    args: CUDConfig,
    model: Any,
    forget: Dataset,
    retain: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Any,
    template: Any,
) -> Any:
    """Have only the modules trained that circuits choose, as in `cud train`; the adapter's configuration for them."""
    if retain is None:
        raise ValueError("trainable 'circuit' compares forget with retain circuits: give retain_dataset")
    if adapter is not None:
        check_adapter_can_follow(adapter)
    sets = [
        prepare_samples(dataset, tokenizer, max_length=args.max_length, name=name, template=template)
        for name, dataset in (("forget", forget), ("retain", retain))
    ]
    return train_by_circuit(model, sets[0], sets[1], adapter, **args.circuit_choice_options())[1]


def score(argv: list[str]) -> int:
    """`cud score`."""
    data_args, args, model_args = parse_command(ScoreArguments, argv, "cud score", ABOUT)
    data_args.settle_metrics(args)
    check_new_file(data_args.output, args.overwrite)
    work_dir = Path(data_args.work_dir or f"{data_args.output}.work").expanduser()
    _check_files(data_args, model_args, work_dir)
    with owned(work_dir, passing=True) if args.process_index == 0 else nullcontext():
        return _score(data_args, args, model_args, work_dir)


def _check_files(data_args: ScoreArguments, model_args: ModelConfig, work_dir: Path) -> None:
    """Raise `ValueError` when a file that is to be written is another's, or would not outlive the command."""
    read = inputs_of(data_args, model_args)
    check_no_input(work_dir, read)
    written = {"output": data_args.output, "save_circuits": data_args.save_circuits}
    for name, path in written.items():
        if path is not None:
            check_output_file(name, path, read)
            if work_dir.resolve() in Path(path).expanduser().resolve().parents:
                raise ValueError(f"{name} {path} lies in work_dir, which is removed at the end; choose another place")
    if data_args.save_circuits is not None and same_file(data_args.output, data_args.save_circuits):
        raise ValueError(f"output and save_circuits are the same file, {data_args.output}")


def _score(data_args: ScoreArguments, args: CUDConfig, model_args: ModelConfig, work_dir: Path) -> int:
    metric_args = data_args.metric_args(args.scoring_options()["metric_args"])
    metrics = data_args.metrics or []
    check_metrics(metrics, metric_args)
    tokenizer = load_tokenizer(model_args, args)
    forget, retain = data_args.load(tokenizer)
    trust = bool(getattr(model_args, "trust_remote_code", False))
    saved = data_args.save_circuits is not None
    if saved or any(METRICS[name].reads_circuits(metric_args.get(name, {})) for name in metrics):
        name, revision = str(model_args.model_name_or_path), model_args.model_revision
        config = load_config(name, revision=revision, trust_remote_code=trust)
        check_metrics(metrics, metric_args, config)
        if saved:
            check_circuits("save_circuits", config)
    scores = score_model(
        args,
        model_args,
        forget,
        retain,
        tokenizer,
        metrics=metrics,
        metric_args=metric_args,
        work_dir=work_dir,
        save_circuits=data_args.save_circuits,
        overwrite=args.overwrite,
        template=args.template_context(WorkDir.recorded(work_dir).get("template")),
    )
    if args.process_index != 0:
        return 0
    scores.save(data_args.output, overwrite=args.overwrite)
    remove_work(work_dir)
    print(
        scores.to_pandas()[scores.metrics].describe().loc[["mean", "std", "min", "max"]].to_string(float_format="%.4g")
    )
    groups = None if args.group_column is None else list(forget[args.group_column])
    written = data_args.output + (f" and {data_args.save_circuits}" if data_args.save_circuits else "")
    print("\n".join(score_summary(scores, groups, args.n_buckets)))
    print(f"difficulty of {len(scores)} samples under {len(scores.metrics)} metrics, higher = harder: {written}")
    print(after_scoring(data_args.output, {**vars(data_args), **vars(model_args)}))
    return 0
