"""What `cud score` and `cud train` read: options for data and model, and what they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..circuits import run_description
from ..config import CUDConfig
from ..data import FORMATS, ready_tokenizer, standardised
from ..data.chunks import DOCUMENT, chunk_texts
from ..data.formats import FOREIGN
from ..data.ids import use_id_key
from ..data.sources import load_samples, renamed
from ..data.tokenizers import tokenizer_options
from ..data.turns import CONVERSATION, every_turn, holds_conversations
from ..difficulty import METRICS
from ..difficulty.scores import merge_metrics
from ..models.loading import tokenizer_home
from ..registry import keyword_options
from ..scoring import SCORED
from ..stack_options import OF_AN_UPLOAD
from ..typed import check_void
from .help import About
from .parser import parse_options

# Options of all commands that name what is read.
READ = {
    "model_name_or_path",
    "original_model",
    "reference_model",
    "forget_dataset",
    "retain_dataset",
    "utility_dataset",
    "heldout_dataset",
    "holdout_dataset",
    "neighbour_dataset",
    "tofu",
    "difficulty_scores",
    "retain_difficulty_scores",
    "scores",
    "circuits",
    "anchor_bank",
    "recipe",
    "open_unlearning",
    "original_open_unlearning",
    "reference_open_unlearning",
    "lm_eval_include",
    "nli_model",
}


@dataclass
class DataArguments:
    """What to forget and what to keep."""

    forget_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Forget set: hub id, file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .xlsx; also .gz), or folder "
            "of files."
        },
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
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns that have other names in the data, as wanted=given, for example "
            "'question=prompt,answer=output'. It says how to read data that could be read in two ways."
        },
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Cut plain texts (column `text`, a document a row) into chunks of at most that many tokens; each "
            "is a sample. `max_*_samples` count documents. Folds never split a document (group_column 'document')."
        },
    )

    turns: Literal["last", "all"] = field(
        default="last",
        metadata={
            "help": "Of conversations: 'last' makes a sample of the last answer of the assistant (earlier ones are "
            "context, and stay), 'all' one of every answer, with what was said before it. Folds never split a "
            "conversation then (group_column 'conversation'); `max_*_samples` count conversations."
        },
    )
    architecture: str | None = field(
        default=None,
        metadata={
            "help": "Python file that describes the model's architecture for circuits, by calling "
            "cud_trainer.circuits.register_architecture. It is run: give only a file that you trust."
        },
    )

    id_key: str | None = field(
        default=None,
        metadata={
            "help": "File with the key of the ids of samples that have none of their own, instead of the file ids.key "
            "that every command keeps beside what it writes: without the key nobody can find a text from its id by "
            "trying. Made with a random key if it is not there. Needed where ids.key is missing."
        },
    )
    keep_cache: bool = field(
        default=False,
        metadata={
            "help": "Leave the copy of data files that the `datasets` library makes in its cache, as text that others "
            "may be able to read. By default that copy is private to the command and deleted once it is read."
        },
    )

    def __post_init__(self) -> None:
        use_id_key(self.id_key)
        if self.architecture is not None:  # here: wherever options are read, in whatever process
            run_description(self.architecture)

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
        """`load_samples`, columns renamed and texts cut into chunks if these arguments say so."""
        if Path(source).is_file() and (name is not None or split != "train"):
            option = f"{what}_{'config' if name is not None else 'split'}".replace("-", "")  # held-out
            raise ValueError(f"{option} has no effect: {source} is a file, which has neither configurations nor splits")
        samples = load_samples(source, name, split, limit, what, keep_cache=self.keep_cache)
        if self.columns:
            samples = renamed(samples, self.column_names, what, {**FORMATS, **FOREIGN})
        samples = standardised(samples, what)
        if self.turns == "all" and (what == "forget" or holds_conversations(samples, what)):
            samples = every_turn(samples, name=what)
        if self.chunk_tokens is None:
            return samples
        return chunk_texts(samples, tokenizer, self.chunk_tokens, name=what)

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as a mapping: the given name by the wanted one; `ValueError` for anything else."""
        pairs = [part.partition("=") for part in (self.columns or "").split(",")]
        names = {wanted.strip(): given.strip() for wanted, _, given in pairs}
        if not all(wanted and given for wanted, given in names.items()) or len(names) < len(pairs):
            raise ValueError(f"columns must be as in 'question=prompt,answer=output', got {self.columns!r}")
        return names

    @property
    def natural_group(self) -> str | None:
        """The group column of folds when none is given: chunks belong to documents, answers to conversations."""
        return DOCUMENT if self.chunk_tokens is not None else CONVERSATION if self.turns == "all" else None


@dataclass
class HeldOutArguments(DataArguments):
    """As `DataArguments`, with samples that no loss sees."""

    heldout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Memorised samples of groups that no loss of a run ever sees: what is kept that nothing asks for. "
            "With them a study compares schedules by H@0.1: the share of their answer probability that is kept when a "
            "run's own worst quarter is at most 0.10."
        },
    )
    heldout_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    heldout_split: str = field(default="train", metadata={"help": "Its split."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_void(self, {"heldout_config": "heldout_dataset", "heldout_split": "heldout_dataset"})

    def load_heldout(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The held-out samples, all of them; `None` without."""
        if self.heldout_dataset is None:
            return None
        return self.read(self.heldout_dataset, self.heldout_config, self.heldout_split, None, "held-out", tokenizer)


@dataclass
class TrainArguments(HeldOutArguments):
    """What `cud train` reads besides `CUDConfig` and TRL's `ModelConfig`."""

    difficulty_scores: str | None = field(
        default=None,
        metadata={"help": "Scores made before (`cud score`), a parquet file; by default they are computed."},
    )


@dataclass
class ScoreArguments(DataArguments):
    """What `cud score` reads besides `CUDConfig` (difficulty, objective, calibration) and TRL's `ModelConfig`."""

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "Difficulty metrics to compute, the first is the primary one. By default 'cud', what it has to "
            "beat ('loss', 'length', 'random'), and what `schedule` reads."
        },
    )
    anchor_bank: str | None = field(
        default=None,
        metadata={
            "help": "Anchor bank of an earlier request on the same model (`save_anchors` of 'cud'): its calibrated fit "
            "scores these samples, without another calibration."
        },
    )
    output: str = field(default="difficulty.parquet", metadata={"help": "Parquet file to write."})
    save_circuits: str | None = field(
        default=None,
        metadata={"help": "Write the edge scores of all samples to this safetensors file, whatever the metrics read."},
    )
    work_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for finished parts: the same command goes on there after it was killed. By default "
            "OUTPUT.work; removed at the end."
        },
    )

    def settle_metrics(self, config: CUDConfig) -> None:
        """Fill `metrics` where none are named, in place: the default ones, and what the schedule of `config` reads."""
        if self.metrics is None:
            self.metrics = merge_metrics(SCORED[0], [*SCORED, *(m for m in config.schedule_metrics if m in METRICS)])

    def metric_args(self, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Options by metric: those of the configuration, and the anchor bank for each that takes anchors.

        Raises:
            ValueError: when nothing would be scored from the bank, or other anchors are asked for, too.
        """
        if self.anchor_bank is None:
            return options
        taking = [name for name in self.metrics or () if "anchors" in keyword_options(METRICS.find(name).compute)]
        if not taking:
            raise ValueError(f"anchor_bank has no effect: none of the metrics {self.metrics} is scored from anchors")
        if any("anchors" in options.get(name, {}) for name in taking):
            raise ValueError(
                "anchor_bank and the option 'anchors' of difficulty_args name anchors: give one of the two"
            )
        return {**options, **{name: {**options.get(name, {}), "anchors": self.anchor_bank} for name in taking}}


def inputs_of(*options: Any) -> dict[str, Any]:
    """What a command reads, by option: the data, models and files that its options name."""
    named = {name: value for one in options for name, value in vars(one).items() if name in READ}
    for name in ("model_name_or_path", "original_model", "reference_model"):
        adapter = Path(str(named.get(name) or "")) / "adapter_config.json"
        if adapter.is_file():
            with suppress(OSError, ValueError, AttributeError):
                named[f"{name} (its base model)"] = json.loads(adapter.read_text()).get("base_model_name_or_path")
    return named


def load_tokenizer(model_args: ModelConfig, args: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, able to pad and end; `ValueError` otherwise.

    Args:
        args: options that say more of it: `TOKENIZER_OPTIONS`.
    """
    if not model_args.model_name_or_path:
        raise ValueError("model is missing: give --model_name_or_path")
    try:
        name, revision = tokenizer_home(model_args.model_name_or_path, model_args.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=bool(getattr(model_args, "trust_remote_code", False)),
        )
    except Exception as error:  # a damaged folder makes the libraries raise nearly anything
        said = str(error) or type(error).__name__
        raise ValueError(f"cannot load the tokenizer of {model_args.model_name_or_path!r}: {said}") from None
    return ready_tokenizer(tokenizer, **tokenizer_options(args))


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that the model options stand for."""
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    return options


def adapter_options(model_args: ModelConfig) -> Any:
    """The adapter that the model options stand for, a `LoraConfig`; `None` without `use_peft`.

    TRL makes a text of a single module name, which PEFT would match as a regular expression against whole paths.
    """
    adapter, modules = get_peft_config(model_args), model_args.lora_target_modules
    if adapter is not None and isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        adapter.target_modules = {modules}
    return adapter


# Of these nothing else would read them.
OF_AN_ADAPTER = [name for name in ModelConfig.__dataclass_fields__ if name.startswith(("lora_", "use_rs", "use_dora"))]
OF_FOUR_BITS = [name for name in ModelConfig.__dataclass_fields__ if "bnb_" in name]


def check_model_options(model_args: ModelConfig, argv: Sequence[str], *, trains: bool = True) -> None:
    """Raise `ValueError` naming an option of the model that has no effect, or cannot be.

    Args:
        argv: the command line. A recipe file may have options of an adapter that a command line can ask for.
        trains: whether the command trains anything, so that an adapter can be asked for.
    """
    if model_args.use_peft and not trains:
        raise ValueError("use_peft has no effect here: nothing is trained; an adapter is loaded from its folder")
    needs = dict.fromkeys(OF_AN_ADAPTER, "use_peft") | dict.fromkeys(OF_FOUR_BITS, "load_in_4bit")
    named = {text.removeprefix("--").split("=")[0] for text in argv}
    check_void(model_args, {name: needed for name, needed in needs.items() if name in named})
    if model_args.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"lora_task_type must be 'CAUSAL_LM', got {model_args.lora_task_type!r}")
    name = str(model_args.model_name_or_path)
    if model_args.model_revision != "main" and Path(name).is_dir():
        raise ValueError(f"model_revision has no effect: {name} is a folder, which has no revisions")


def parse_command(first: type, argv: list[str], program: str, about: About) -> tuple[Any, CUDConfig, ModelConfig]:
    data_args, args, model_args = parse_options((first, CUDConfig, ModelConfig), argv, program, about=about)
    check_model_options(model_args, argv)
    check_void(args, dict.fromkeys(OF_AN_UPLOAD, "push_to_hub"))
    args.group_column = args.group_column or data_args.natural_group
    return data_args, args, model_args
