"""What `cud evaluate` reads: its options, and the data, scores and models that they name, checked beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from cud_trainer.circuits import CircuitTable
from cud_trainer.circuits.attribution import needs_counterfactual
from cud_trainer.commands.options import HeldOutArguments, load_tokenizer, model_options
from cud_trainer.data import Samples, TemplateContext, check_vocabulary, prepare_samples
from cud_trainer.data.columns import SECRET
from cud_trainer.data.groups import check_groups, group_labels
from cud_trainer.data.ids import IdKey, as_written, key_in
from cud_trainer.data.samples import check_unseen
from cud_trainer.data.sources import load_samples
from cud_trainer.data.template import TemplateArguments
from cud_trainer.data.tokenizers import TokenizerArguments
from cud_trainer.difficulty import Buckets, DifficultyScores
from cud_trainer.logprobs import check_padding
from cud_trainer.models.engines import PAGED, check_engine, check_paged
from cud_trainer.models.loading import merged_adapter
from cud_trainer.models.positions import check_sets
from cud_trainer.resumable import WorkDir, of_main_process
from cud_trainer.training.checkpoints import recorded_template
from cud_trainer.typed import check_options, check_void

from ..metrics.depth import check_layers
from ..metrics.entailment import Entailment
from ..metrics.gradients import check_gradient_norms
from ..metrics.leak import LeakRule
from ..metrics.lm_eval import check_lm_eval
from ..metrics.measure import check_texts
from ..metrics.secret import secret_texts
from ..metrics.utility import UTILITY_SETS
from ..report.attacks import Groups
from ..report.audit import check_score_names
from .models import check_depth, check_same_tokenizer, load_model
from .secrets import SECRET_SETS, with_secret_column

WORK_DIR = "evaluation.work"  # in the output directory
NAMES = {"heldout": "held-out"}  # of sets, in errors, where they are not those of the options
# What gives an option its meaning.
NEEDS = {
    "samples": "generate",
    "generation_engine": "generate",
    "temperature": "samples",
    "leak_rouge": "samples",
    "leak_span": "samples",
    "nli_model": "samples",
    "relearn_steps": "relearn_samples",
    "relearn_rate": "relearn_samples",
    "metric": "scores|retain_difficulty_scores",
    "n_buckets": "scores|retain_difficulty_scores",
    "retain_difficulty_scores": "original_model",
    "depth": "original_model",
    "gradient_norm": "holdout_dataset|holdout_config",
    "lm_eval_include": "lm_eval_tasks",
    "retain_split": "retain_dataset|retain_config",
    "max_retain_samples": "retain_dataset|retain_config",
    "holdout_split": "holdout_dataset|holdout_config",
    "neighbour_split": "neighbour_dataset|neighbour_config",
}


@dataclass
class EvaluateArguments(TemplateArguments, TokenizerArguments, HeldOutArguments):
    """What `cud evaluate` reads besides TRL's `ModelConfig`; `model_name_or_path` is the unlearned model or adapter."""

    output_dir: str = field(
        default="cud-evaluation",
        metadata={"help": "Where the report goes; after a kill the same command goes on there."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that is not empty."})
    original_model: str | None = field(
        default=None, metadata={"help": "The model before unlearning, to be measured beside it."}
    )
    scores: str | None = field(
        default=None, metadata={"help": "Difficulty scores (parquet); without them there are no buckets."}
    )
    retain_difficulty_scores: str | None = field(
        default=None,
        metadata={
            "help": "Difficulty scores of the retain set (`cud score` with it as the forget dataset): which retained "
            "samples were predicted to be lost, and which were."
        },
    )
    circuits: str | None = field(
        default=None,
        metadata={"help": "Edge scores of the forget set (`cud score --save_circuits`), for pictures of the circuits."},
    )
    faithfulness: bool = field(
        default=False,
        metadata={
            "help": "Measure what share of the answer metric the circuits keep in the original model, beside random "
            "circuits (needs circuits and original_model; eight passes)."
        },
    )
    metric: str | None = field(default=None, metadata={"help": "Metric that makes the buckets (default: the primary)."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    generate: bool = field(default=True, metadata={"help": "Generate answers for ROUGE-L recall and verbatim match."})
    generation_engine: Literal["transformers", "paged", "vllm"] = field(
        default="transformers",
        metadata={
            "help": "What writes answers: transformers in batches; its paged attention (CUDA, without samples); or "
            "vLLM (extra `vllm`), of models in folders that are no adapters. lm_eval_tasks have their own."
        },
    )
    samples: int = field(
        default=0,
        metadata={"help": "Also sample as many answers per prompt, for leak@k: does one of k give the sample away?"},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of these samples."})
    leak_rouge: float = field(
        default=0.8, metadata={"help": "ROUGE-L recall of the true answer from which on a sampled answer leaks."}
    )
    leak_span: int = field(
        default=6,
        metadata={"help": "Words of the true answer in a row from which on a sampled answer leaks, or all of it."},
    )
    nli_model: str | None = field(
        default=None,
        metadata={"help": "A model with a label 'entailment': does the true answer follow from a sampled one?"},
    )
    secret_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for what is secret in an answer (its groups, if it has some), for data without "
            "a column `secret`: probability, extraction and leak of those tokens beside the answer's."
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "A model that never saw the forget set: relative memorisation, forget quality, PrivLeak."},
    )
    holdout_dataset: str | None = field(
        default=None,
        metadata={"help": "Samples that no model saw, for membership inference; default: the forget dataset."},
    )
    holdout_config: str | None = field(
        default=None, metadata={"help": "Its configuration name; one of the two must be given for attacks."}
    )
    holdout_split: str = field(default="train", metadata={"help": "Its split."})
    neighbour_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Samples near the forget set (same topic, not to be forgotten); default: the forget dataset."
        },
    )
    neighbour_config: str | None = field(
        default=None, metadata={"help": "Its configuration name; one of the two must be given for a neighbour set."}
    )
    neighbour_split: str = field(default="train", metadata={"help": "Its split."})
    tofu: str | None = field(
        default=None,
        metadata={"help": "Id or folder of TOFU, for model utility (retain, real authors, world facts)."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column of the forget dataset (author, topic, source) for a table by group."}
    )
    relearn_samples: int = field(
        default=0, metadata={"help": "Fine-tune a copy on as many forget samples again and see what else comes back."}
    )
    relearn_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10], metadata={"help": "After these steps."})
    relearn_rate: float = field(default=1e-5, metadata={"help": "Learning rate of relearning."})
    quantize: list[int] = field(default_factory=list, metadata={"help": "Round the weights to so many bits: 8, 4."})
    straight_line: bool = field(
        default=False, metadata={"help": "Measure along the line from the original to the unlearned weights."}
    )
    depth: bool = field(
        default=False,
        metadata={
            "help": "How deep forgetting goes: hidden states are put into original_model, layer by layer. Unlearning "
            "depth score (UDS) with reference_model, depth of change without. Holds two models at a time."
        },
    )
    logit_lens: bool = field(
        default=False, metadata={"help": "Read the answers off every layer, through the final norm and the head."}
    )
    gradient_norm: bool = field(
        default=False,
        metadata={"help": "Attack by the norm of each sample's gradient, too: a backward pass over both sets."},
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness (extra `lm-eval`)."}
    )
    lm_eval_include: str | None = field(default=None, metadata={"help": "Folder with tasks of your own for it."})
    show_text: bool = field(
        default=False, metadata={"help": "Put forget text and answers into per_sample.parquet. Off: no text anywhere."}
    )
    batch_size: int = field(default=16, metadata={"help": "Samples per forward pass."})
    max_length: int | None = field(default=1024, metadata={"help": "The longest sample in tokens."})
    seed: int = field(default=0, metadata={"help": "Of bootstrap intervals, sampled answers and relearning."})

    @property
    def work_dir(self) -> Path:
        """Where finished parts are kept until the report is written."""
        return Path(self.output_dir).expanduser() / WORK_DIR

    @property
    def works_on_weights(self) -> bool:
        """Whether anything is done to the weights of a model, beside measuring it."""
        return bool(self.quantize or self.straight_line or self.relearn_samples or self.lm_eval_tasks)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        check_void(self, NEEDS)
        if any(bits not in (4, 8) for bits in self.quantize):
            raise ValueError(f"quantize takes 8 and 4 bits, got {self.quantize}")
        if self.relearn_samples and not self.relearn_steps:
            raise ValueError(f"relearn_steps must be at least 1, got {self.relearn_steps}")
        if self.retain_difficulty_scores and not (self.retain_dataset or self.retain_config):
            raise ValueError("retain_difficulty_scores has no effect without retain_dataset or retain_config")
        if self.straight_line and not self.original_model:
            raise ValueError("the straight line starts at the original model: give --original_model")


@dataclass
class EvaluateInputs:
    """What `cud evaluate` works on; the parts fit each other.

    Attributes:
        args, model_name_or_path, model_options: what was asked for, and how models are loaded.
        tokenizer: of all models.
        forget_raw: the forget set as text.
        sets: prepared `forget` and, where they are given, `retain`, `neighbour`, `holdout` and `heldout` sets.
        template: what a chat template sees beside the messages.
        utility: TOFU's sets, by the names in `UTILITY_SETS`; may be empty.
        groups: of each forget sample and, where it has that column, of each holdout sample.
        secrets: spans of the answers of the forget and the holdout set, where the data names them.
        leak: what counts as a leak of sampled answers; `None` where none are sampled.
        scores, buckets: difficulty of the forget samples, in their order.
        retain_scores, retain_buckets, retain_groups: the same of the retain samples.
        circuits: edge scores of the forget samples, in their order.
    """

    args: EvaluateArguments
    model_name_or_path: str
    model_options: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    forget_raw: Dataset
    sets: dict[str, Samples]
    template: TemplateContext
    utility: dict[str, Dataset]
    groups: Groups
    secrets: dict[str, list[list[str]] | None]
    leak: LeakRule | None
    scores: DifficultyScores | None
    buckets: Buckets | None
    circuits: CircuitTable | None
    retain_scores: DifficultyScores | None = None
    retain_buckets: Buckets | None = None
    retain_groups: list[Any] | None = None

    @property
    def forget(self) -> Samples:
        return self.sets["forget"]

    @property
    def keys(self) -> tuple[IdKey, ...]:
        """Of the ids in the scores, or else in the folder of the model."""
        model = Path(self.model_name_or_path)
        found = () if self.scores is None else self.scores.keys
        return (*found, *(key for key in map(key_in, (model, model.parent)) if key is not None))

    def load_model(self, path: str, *, finite: bool = True) -> Any:
        """The model at `path`, ready to be measured; `ValueError` if it is none, or has too few embeddings.

        What works on weights later (`works_on_weights`) has to work on the model that was measured: an adapter is
        folded in first, or refused.
        """
        model = load_model(path, self.model_options, finite=finite)
        if self.args.works_on_weights:
            model = merged_adapter(model, repr(path))
        try:
            check_vocabulary(self.tokenizer, model)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        check_sets(model, **self.sets)
        name, samples = next(iter(self.sets.items()))
        check_padding(model, name, samples)
        if self.args.generation_engine == PAGED:
            check_paged(model)
        if self.args.gradient_norm:
            check_gradient_norms(model, path)
        if self.args.depth or self.args.logit_lens:
            check_layers(model, path, self.forget)
        return model


def read_inputs(args: EvaluateArguments, model_args: ModelConfig) -> EvaluateInputs:
    """Read and check all but the models; `ValueError` for what does not fit."""
    models = {"model_name_or_path": model_args.model_name_or_path}
    models |= {name: getattr(args, name) for name in ("original_model", "reference_model")}
    rounded = model_args.load_in_4bit or model_args.load_in_8bit
    check_engine(args.generation_engine, models, drawn=args.samples > 0, rounded=rounded)
    tokenizer = load_tokenizer(model_args, args)
    raw = with_secret_column(read_datasets(args, tokenizer), args.secret_pattern, args.chunk_tokens)
    scores = DifficultyScores.load(args.scores) if args.scores else None
    known = template_of(str(model_args.model_name_or_path), scores)
    if known is None:
        known = WorkDir.recorded(args.work_dir).get("template")  # of a start that was killed
    template = of_main_process(args.template_context(known))
    options: dict[str, Any] = {"max_length": args.max_length, "template": template}
    secrets = {name: secret_texts(raw[name], name) for name in SECRET_SETS if name in raw}
    marked = {name: SECRET if secrets.get(name) is not None else None for name in raw}
    sets = {
        name: prepare_samples(part, tokenizer, name=NAMES.get(name, name), secret_column=marked[name], **options)
        for name, part in raw.items()
    }
    forget = sets["forget"]
    for name in ("retain", "neighbour", "holdout"):
        if name in sets:
            _check_disjoint("forget", forget, name, sets[name])
    if "holdout" in sets and "retain" in sets:  # non-members are no samples that were trained on
        _check_disjoint("retain", sets["retain"], "holdout", sets["holdout"])
    check_heldout(raw, sets, args.group_column)
    utility = {}
    if args.tofu:
        utility = {part: load_samples(args.tofu, name, "train", None, part) for part, name in UTILITY_SETS.items()}
    check_texts(raw["forget"], utility, tokenizer, **options)
    groups = Groups() if args.group_column is None else read_groups(raw, args.group_column)
    of_retain = "retain" in raw and args.group_column in raw["retain"].column_names
    if args.relearn_samples >= len(forget):
        raise ValueError(
            f"relearn_samples must leave some of the {len(forget)} forget samples, got {args.relearn_samples}"
        )
    if args.lm_eval_tasks:
        check_lm_eval()
    scores, buckets = ranked_scores(scores, forget, args, "forget")
    of_kept = DifficultyScores.load(args.retain_difficulty_scores) if args.retain_difficulty_scores else None
    retain_scores, retain_buckets = ranked_scores(of_kept, sets.get("retain"), args, "retain")
    circuits = read_circuits(args, forget.ids)
    for path in (args.original_model, args.reference_model):
        if path:
            check_same_tokenizer(tokenizer, path)
    if args.depth:
        others = (args.reference_model, model_args.model_name_or_path)
        check_depth(str(args.original_model), others, model_args.model_revision)
    assert model_args.model_name_or_path is not None  # it has a tokenizer
    return EvaluateInputs(
        args=args,
        model_name_or_path=model_args.model_name_or_path,
        model_options=model_options(model_args),
        tokenizer=tokenizer,
        forget_raw=raw["forget"],
        sets=sets,
        template=template,
        utility=utility,
        groups=groups,
        secrets=secrets,
        leak=leak_rule(args),
        scores=scores,
        buckets=buckets,
        circuits=circuits,
        retain_scores=retain_scores,
        retain_buckets=retain_buckets,
        retain_groups=list(raw["retain"][args.group_column]) if of_retain else None,
    )


def check_same_samples(scores: DifficultyScores, forget: Samples) -> None:
    """Raise `ValueError` where samples of the same names have another content than those that were scored.

    That shows where all of them are there, in whatever order.
    """
    position = {name: row for row, name in enumerate(as_written(scores.ids, forget.ids, scores.keys))}
    if len(scores) == len(position) and position.keys() == set(scores.ids):
        scores.check_provenance(dataset=forget.select([position[name] for name in scores.ids]).fingerprint)


def ranked_scores(
    scores: DifficultyScores | None, samples: Samples | None, args: EvaluateArguments, of: str
) -> tuple[DifficultyScores | None, Buckets | None]:
    """Scores in the order of the samples of the set `of`, and their buckets; `ValueError` where they do not fit."""
    if scores is None or samples is None:
        return None, None
    check_score_names(scores)
    if samples.template is not None:
        scores.check_provenance(template=samples.template)
    check_same_samples(scores, samples)
    scores = scores.aligned(samples.ids, of)
    return scores, scores.bucketed(args.metric, args.n_buckets)


def check_heldout(raw: Mapping[str, Dataset], sets: Mapping[str, Samples], group: str | None) -> None:
    """Raise `ValueError` naming a sample, or a group, of the held-out set that is forgotten or retained, too."""
    for name in ("forget", "retain") if "heldout" in sets else ():
        if name not in sets:
            continue
        check_unseen(sets["heldout"], sets[name], name)
        if group is not None and all(group in raw[part].column_names for part in ("heldout", name)):
            check_groups(raw["heldout"][group], raw[name][group], group, name)


def template_of(model: str, scores: DifficultyScores | None) -> dict[str, Any] | None:
    """What a chat template saw when the scores were made, or when the model was trained; `None` if nobody says."""
    recorded = None if scores is None else scores.provenance.get("template")
    if recorded is not None or not Path(model).is_dir():
        return recorded
    return recorded_template(model) or recorded_template(Path(model).parent)  # a checkpoint in the folder of a run


def _check_disjoint(first: str, one: Samples, second: str, other: Samples) -> None:
    """Raise `ValueError` for a sample that is in both sets, with their names."""
    both = set(one.ids) & set(other.ids)
    if both:
        row = next(row for row, name in enumerate(one.ids) if name in both)
        raise ValueError(
            f"sample {one.ids[row]!r} is in both the {first} and the {second} dataset ({len(both)} are; it "
            f"is row {row} of the {first} dataset)"
        )


def read_datasets(args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """The data sets as text that the options name: `forget`, and the others where they are."""
    forget, retain = args.load(tokenizer)
    raw = {"forget": forget}
    if retain is not None:
        raw["retain"] = retain
    for name in ("neighbour", "holdout"):
        source, config, split = (getattr(args, f"{name}_{kind}") for kind in ("dataset", "config", "split"))
        if source or config:
            raw[name] = args.read(str(source or args.forget_dataset), config, split, None, name, tokenizer)
    heldout = args.load_heldout(tokenizer)
    if heldout is not None:
        raw["heldout"] = heldout
    return raw


def leak_rule(args: EvaluateArguments) -> LeakRule | None:
    """What counts as a leak, with the entailment model loaded; `None` where no answers are sampled."""
    if not args.samples:
        return None
    entailment = None if args.nli_model is None else Entailment(args.nli_model)
    return LeakRule(args.samples, args.temperature, args.seed, args.leak_rouge, args.leak_span, entailment)


def read_groups(raw: Mapping[str, Dataset], column: str) -> Groups:
    """The group of each forget and, if it has that column, holdout sample; `ValueError` where the forget set has none,
    or one group only."""
    forget, holdout = raw["forget"], raw.get("holdout")
    if column not in forget.column_names:
        raise ValueError(f"forget dataset has no column {column!r}; it has {sorted(forget.column_names)}")
    groups = list(forget[column])
    if len(set(group_labels(groups))) < 2:
        raise ValueError(f"group column {column!r} has one value only")
    known = holdout is not None and column in holdout.column_names
    return Groups(groups, list(holdout[column]) if known and holdout is not None else None)


def read_circuits(args: EvaluateArguments, ids: list[str]) -> CircuitTable | None:
    """Edge scores of the samples `ids`, if they are asked for; `ValueError` without what they are shown beside."""
    table = None
    if args.circuits:
        if args.scores is None:
            raise ValueError("circuits are shown by difficulty bucket: give --scores, too")
        table = CircuitTable.load(args.circuits).aligned(ids)
    if args.faithfulness:
        if table is None or not args.original_model:
            raise ValueError(
                "faithfulness is that of circuits in the original model: give --circuits and --original_model"
            )
        if needs_counterfactual(table.settings["baseline"], table.settings["metric"]):
            raise ValueError("faithfulness needs circuits of the zero or mean baseline and the metric prob or logprob")
    return table
