"""`cud score` and `cud train`: options to data, model and trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from .alternatives import with_alternatives
from .arguments import parse_options
from .chunks import DOCUMENT, chunk_texts
from .circuits import check_architecture
from .config import CUDConfig
from .data import check_tokenizer, prepare_dataset
from .difficulty import METRICS, DifficultyScores
from .files import check_new_file, check_output_dir
from .passes import remove_work
from .scoring import check_metrics, score_difficulty
from .sources import load_samples
from .trainable import train_only
from .trainer import CUDTrainer, begun, load_causal_lm


@dataclass
class DataArguments:
    """What to forget and what to keep."""

    forget_dataset: str | None = field(
        default=None,
        metadata={"help": "Forget set: id or folder for `load_dataset`, or a .json(l), .csv or .parquet file."},
    )
    forget_config: str | None = field(
        default=None, metadata={"help": "Its configuration name, for example 'forget01'."}
    )
    forget_split: str = field(default="train", metadata={"help": "Its split."})
    max_forget_samples: int | None = field(default=None, metadata={"help": "Use the first samples only."})
    retain_dataset: str | None = field(
        default=None, metadata={"help": "Retain set; by default the forget dataset, if `retain_config` is given."}
    )
    retain_config: str | None = field(
        default=None, metadata={"help": "Its configuration name, for example 'retain99'."}
    )
    retain_split: str = field(default="train", metadata={"help": "Its split."})
    max_retain_samples: int | None = field(default=None, metadata={"help": "Use the first samples only."})
    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Cut plain texts (column `text`, a document a row) into chunks of at most that many tokens; each "
            "is a sample. `max_*_samples` count documents. Folds never split a document (group_column 'document')."
        },
    )

    def load(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
        """Forget and retain set; `ValueError` naming what cannot be loaded."""
        if not self.forget_dataset:
            raise ValueError("forget dataset is missing: give --forget_dataset")
        forget = self.read(
            self.forget_dataset, self.forget_config, self.forget_split, self.max_forget_samples, "forget", tokenizer
        )
        source = self.retain_dataset or (self.forget_dataset if self.retain_config else None)
        if source is None:
            return forget, None
        retain = self.read(source, self.retain_config, self.retain_split, self.max_retain_samples, "retain", tokenizer)
        return forget, retain

    def read(
        self,
        source: str,
        name: str | None,
        split: str,
        limit: int | None,
        what: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Dataset:
        """`load_samples`, texts cut into chunks if these arguments say so."""
        samples = load_samples(source, name, split, limit, what)
        if self.chunk_tokens is None:
            return samples
        return chunk_texts(samples, tokenizer, self.chunk_tokens, name=what)

    @property
    def natural_group(self) -> str | None:
        """The group column of folds when none is given: chunks belong to documents."""
        return None if self.chunk_tokens is None else DOCUMENT


@dataclass
class TrainArguments(DataArguments):
    """What `cud train` reads besides `CUDConfig` and TRL's `ModelConfig`."""

    difficulty_scores: str | None = field(
        default=None,
        metadata={"help": "Scores made before (`cud score`), a parquet file; by default they are computed."},
    )


@dataclass
class ScoreArguments(DataArguments):
    """What `cud score` reads besides `CUDConfig` (difficulty, objective, calibration) and TRL's `ModelConfig`."""

    metrics: list[str] = field(
        default_factory=lambda: ["cud", "cud_paper", "circuit_mass", "loss", "length"],
        metadata={"help": "Difficulty metrics to compute, the first is the primary one."},
    )
    output: str = field(default="difficulty.parquet", metadata={"help": "Parquet file to write."})
    save_circuits: str | None = field(
        default=None, metadata={"help": "Write the edge scores of all samples to this safetensors file."}
    )
    work_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for finished parts: the same command goes on there after it was killed. By default "
            "OUTPUT.work; removed at the end."
        },
    )


def load_tokenizer(model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, able to pad and end; `ValueError` otherwise."""
    if not model_args.model_name_or_path:
        raise ValueError("model is missing: give --model_name_or_path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=bool(getattr(model_args, "trust_remote_code", False)),
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {model_args.model_name_or_path!r}: {error}") from None
    check_tokenizer(tokenizer)
    return tokenizer


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that the model options stand for."""
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    return options


def _parse(first: type, argv: list[str], program: str) -> tuple[Any, CUDConfig, ModelConfig]:
    data_args, args, model_args = parse_options((first, CUDConfig, ModelConfig), argv, program)
    args.group_column = args.group_column or data_args.natural_group
    return data_args, args, model_args


def train(argv: list[str]) -> int:
    """`cud train`."""
    data_args, args, model_args = _parse(TrainArguments, argv, "cud train")
    resume: str | bool | None = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if args.process_index == 0:
        known = begun(args.output_dir)
        check_output_dir(args.output_dir, overwrite=args.overwrite, resume=bool(resume), known=known)
    scores = DifficultyScores.load(data_args.difficulty_scores) if data_args.difficulty_scores else None
    tokenizer = load_tokenizer(model_args)
    forget, retain = data_args.load(tokenizer)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_options(model_args)}
    trainer = CUDTrainer(
        model_args.model_name_or_path,
        args,
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        difficulty_scores=scores,
    )
    trainer.train(resume_from_checkpoint=resume)
    measured = {entry["step"] for entry in trainer.state.log_history if "eval_forget_prob" in entry}
    if not args.load_best_model_at_end and trainer.state.global_step not in measured:
        trainer.evaluate()  # for the model card
    trainer.save_model(args.output_dir)
    trainer.create_model_card(model_name=Path(args.hub_model_id or args.output_dir).name)
    if args.push_to_hub:
        trainer.push_to_hub()
    last = [entry for entry in trainer.state.log_history if "forget_prob" in entry]
    if trainer.is_world_process_zero():
        ends = (
            f"; mean forget probability {last[0]['forget_prob']:.3f} -> {last[-1]['forget_prob']:.3f}" if last else ""
        )
        print(f"unlearned {len(trainer.forget_ids)} samples in {trainer.state.global_step} steps{ends}")
        print(f"model and difficulty scores: {args.output_dir}")
    trainer.end()
    return 0


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
    model = load_causal_lm(str(model_args.model_name_or_path), trust_remote_code=trust, **model_options(model_args)).to(
        args.device
    )
    if args.trainable_layers is not None:  # what calibration trains
        train_only(model, args.trainable_layers)
    options = {**args.scoring_options(get_peft_config(model_args)), **options}
    source = args.unlearning_loss.spec.alternative
    if source is not None:
        prepared = prepare_dataset(
            forget,
            tokenizer,
            max_length=args.max_length,
            keep_columns=[args.group_column] if args.group_column else [],
            counterfactual_column=args.counterfactual_column,
        )
        forget = with_alternatives(prepared, forget, tokenizer, source, model=model, **args.alternative_options())
        options["counterfactual_column"] = None  # it is in the prepared samples
    return score_difficulty(model, forget, tokenizer, retain_dataset=retain, **options)


def score(argv: list[str]) -> int:
    """`cud score`."""
    data_args, args, model_args = _parse(ScoreArguments, argv, "cud score")
    check_new_file(data_args.output, args.overwrite)
    work_dir = data_args.work_dir or f"{data_args.output}.work"
    check_metrics(data_args.metrics, args.scoring_options()["metric_args"])
    tokenizer = load_tokenizer(model_args)
    forget, retain = data_args.load(tokenizer)
    trust = bool(getattr(model_args, "trust_remote_code", False))
    if any(METRICS[name].needs_circuits for name in data_args.metrics):
        check_architecture(AutoConfig.from_pretrained(model_args.model_name_or_path, trust_remote_code=trust))
    scores = score_model(
        args,
        model_args,
        forget,
        retain,
        tokenizer,
        metrics=data_args.metrics,
        work_dir=work_dir,
        save_circuits=data_args.save_circuits,
        overwrite=args.overwrite,
    )
    if args.process_index != 0:
        return 0
    scores.save(data_args.output, overwrite=args.overwrite)
    remove_work(work_dir)
    print(f"difficulty of {len(scores)} samples: {data_args.output}")
    print(
        scores.to_pandas()[scores.metrics].describe().loc[["mean", "std", "min", "max"]].to_string(float_format="%.4g")
    )
    return 0
