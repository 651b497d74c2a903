"""Options of `CUDTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, logging
from trl import SFTConfig

from .config_checks import (
    check_accelerator,
    check_checkpoints,
    check_launch,
    check_mappings,
    check_objective,
    check_step,
)
from .data import BATCH_BYTES
from .data.template import TemplateArguments
from .difficulty.context import circuit_settings
from .difficulty.scores import PRECOMPUTED
from .models.head import LOGITS_BYTES
from .objectives import UnlearningLoss
from .objectives.alternatives import REFUSALS
from .preserving import fill_preserving
from .schedule import ScheduleRule, parse
from .scoring import check_metrics
from .scoring.calibration import CalibrationSettings
from .stack_options import check_stack_options, higher_is_better, under_new_names
from .typed import check_options

logger = logging.get_logger(__name__)

# No difficulty has earned a place in it: benchmarks/results/evidence-*.md, docs/results.md.
AUTO = "auto"  # as a difficulty: what is needed
OWN_DICTIONARIES = (
    "objective_args",
    "objective_by_bucket",
    "step_args",
    "difficulty_args",
    "circuit_args",
    "schedule_args",
    "chat_template_kwargs",
)


@dataclass
class CUDConfig(TemplateArguments, SFTConfig):
    r"""Configuration of [`CUDTrainer`]: everything in [`~trl.SFTConfig`], and what unlearning adds.

    > Parameters that control the objective

    objective, objective_args, objective_by_bucket, step, step_args, preserve, retain_loss, retain_weight,
    retain_weight_end, retain_pairing, retain_limit, dual_rate, l2_sp, loss_normalization, reference_top_k,
    logits_bytes, alternative_column, refusals, trainable_layers, trainable, circuit_share

    > Parameters that control difficulty and schedule

    difficulty, difficulty_args, circuit_args, counterfactual_column, scoring_batch_bytes, calibration_share,
    folds, group_column, schedule, schedule_args, passes, n_buckets

    > Parameters that control what a chat template sees

    chat_template, system_prompt, chat_template_kwargs, train_on; and TRL's chat_template_path, eos_token, pad_token,
    which act before the data is prepared

    > Parameters that control when a run ends and what it logs

    target_forget_prob, max_retain_loss, eval_retain_samples, log_update_share

    > Parameters that control what a run goes on from and what it may replace

    override, overwrite

    > Parameters that control what leaves the machine

    hub_difficulty

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]: `learning_rate` 1e-5,
    > `num_train_epochs` 1 (use `passes`), `train_sampling_strategy` `"sequential"` (the order is in the data),
    > `logging_nan_inf_filter` `False` (a diverged loss must show), `remove_unused_columns` `False`, `bf16` only where
    > an accelerator supports it.

    Raises:
        ValueError: for an unknown or contradictory option, with the valid values.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, *OWN_DICTIONARIES]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. If not set: where an accelerator supports it."}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Must stay 1: the run is one pass over the schedule. Use `passes`."}
    )
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={"help": "Must stay 'sequential': the schedule is the order of the data."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a non-finite loss as 0. Off, since unlearning can diverge."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay off: the schedule's columns are part of a batch."}
    )

    objective: str = field(
        default="npo",
        metadata={
            "help": "Forget loss: 'ga', 'graddiff', 'kl_min', 'npo', 'simnpo', 'dpo', 'idk_dpo', 'alt_po', 'idk_nll', "
            "'wga', 'satimp', 'undial', 'ceu', 'pdu', 'rmu' or a registered one."
        },
    )
    objective_args: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={"help": 'Options of the objective, for example {"beta": 0.1, "beta_by": "length"} for NPO.'},
    )
    objective_by_bucket: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={
            "help": 'Other objectives for some difficulty buckets, 1 the easiest, for example {"5": "ga", "4": '
            '{"objective": "npo", "beta": 0.05}} (RUM). All other buckets, and the calibration run, have `objective`.'
        },
    )
    step: str = field(
        default="plain",
        metadata={
            "help": "What is done with the gradients: 'plain', 'sam' (forget gradient at perturbed weights), 'gru' "
            "(forget gradient off the side of the retain gradient) or a registered one. Not with FSDP, DeepSpeed, fp16."
        },
    )
    step_args: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": 'Options of the step, for example {"rho": 0.01} for SAM.'}
    )
    retain_loss: str | None = field(
        default=None,
        metadata={
            "help": "Retain loss: 'none', 'nll', 'kl' or, for 'rmu', 'activations'. By default 'kl' with "
            "`preserve`, else the objective's own."
        },
    )
    preserve: bool | None = field(
        default=None,
        metadata={
            "help": "Keep what neither forget nor retain set mentions: where they are not given, retain_loss is 'kl', "
            "l2_sp 0.03, retain_weight falls from 256 to 8, and 'graddiff' has a `schedule` of its own. By "
            "default with 'npo' and 'graddiff', as measured; not with FSDP, DeepSpeed or a `retain_loss` 'nll'. "
            "'false' for algorithms as published."
        },
    )
    retain_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the retain loss. By default 1, with `preserve` 256 at first. Tune it first: it decides "
            "more than the schedule does."
        },
    )
    retain_weight_end: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the retain loss in the last step of the plan. It goes there from `retain_weight` by "
            "equal ratios, so that a run that the first weight holds back goes on. By default 8 with "
            "`preserve`, where no `retain_weight` is given; else the weight is fixed."
        },
    )
    retain_pairing: str = field(
        default="random",
        metadata={
            "help": "Retain partner of a forget sample: 'random', or 'nearest' in turn (a forward pass of both sets)."
        },
    )
    retain_limit: float | None = field(
        default=None,
        metadata={
            "help": "Hold the retain loss at this limit: after every step, retain_weight += dual_rate * (retain loss - "
            "retain_limit), never below 0 (primal-dual, as PDU does). By default the weight is fixed."
        },
    )
    dual_rate: float = field(default=1.0, metadata={"help": "Step size of the retain weight with `retain_limit`."})
    l2_sp: float | None = field(
        default=None,
        metadata={
            "help": "After every optimizer step each trained weight goes back by this share of its way from where it "
            "started (decoupled L2-SP), in [0, 1): what is forgotten needs no further step, and what it cost fades. "
            "Keeps a copy of what is trained. Not with FSDP, DeepSpeed or half-precision weights. By default 0, with "
            "`preserve` 0.03."
        },
    )
    loss_normalization: str = field(
        default="sample",
        metadata={
            "help": "Losses of a batch are averaged over its samples ('sample') or over its answer tokens ('token', "
            "for losses that are means over tokens: GA, GradDiff, WGA, SatImp, ...)."
        },
    )
    reference_top_k: int = field(
        default=128,
        metadata={"help": "Tokens of the original distribution kept per position (retain loss 'kl', 'undial')."},
    )
    logits_bytes: int = field(
        default=LOGITS_BYTES,
        metadata={
            "help": "Estimated memory of a step's logits at a time, in bytes. Where all take more, some are made, read "
            "and made again for the backward pass, same values. 0 makes all at once."
        },
    )
    alternative_column: str | None = field(
        default=None, metadata={"help": "Column of the forget dataset with the answer that 'dpo' prefers."}
    )
    refusals: list[str] | None = field(
        default=None,
        metadata={"help": "What 'idk_dpo' and 'idk_nll' teach to answer. By default a few refusals in English."},
    )
    trainable_layers: str | None = field(
        default=None,
        metadata={"help": "Train these decoder layers only, for example '5-7' or '0,2,4-6'. By default ('none') all."},
    )
    trainable: str | None = field(
        default=None,
        metadata={
            "help": "'circuit' trains the modules only (or puts the adapter there) that the forget set's circuits use "
            "most beyond what those of the retain set do: one attribution pass. By default ('none') all are trained."
        },
    )
    circuit_share: float = field(
        default=0.25,
        metadata={"help": "Share of the modules (q, k, v, o, MLP of each layer) that `trainable` 'circuit' chooses."},
    )
    difficulty: str | None = field(
        default=AUTO,
        metadata={
            "help": "Difficulty metric of schedules and buckets ('cud', 'circuit_mass', 'loss', ...); 'given' for the "
            "first metric of `difficulty_scores`, whatever it is called (published scores, say); 'none'; or 'auto': "
            "'cud' where something reads it (a schedule, an option by difficulty, `difficulty_args`), 'given' where "
            "there are `difficulty_scores`, else 'none'. 'cud' needs a calibration run of 0.4 to 1.3 times the cost of "
            "the unlearning run; in schedules a random difficulty gave nearly the same."
        },
    )
    difficulty_args: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={"help": 'Options of the difficulty metric, for example {"variant": "top_k", "k": 200} for CUD.'},
    )
    circuit_args: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={"help": "Options of edge attribution: method, steps, baseline, metric."},
    )
    counterfactual_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget dataset with another answer, for the circuits' counterfactual baseline."
        },
    )
    scoring_batch_bytes: int = field(
        default=BATCH_BYTES,
        metadata={
            "help": "Estimated memory of a batch while difficulty is scored, in bytes. What does not fit is halved."
        },
    )
    calibration_share: float = field(
        default=0.75,
        metadata={
            "help": "Passes of the calibration run at most, as a share of `passes`, in (0, 1]. It ends earlier when "
            "less than 0.15 of the forget probability is left."
        },
    )
    folds: int = field(default=5, metadata={"help": "Cross-fitting folds: no sample helps to score itself."})
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column of the forget dataset (author, topic) whose groups are never split over folds."},
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "How difficulty acts: an order ('uniform', 'easy_to_hard', 'competence', ...), weights "
            "('inverse_mass', 'upweight_hard', ...), weights that follow the run ('per_sample_stop', 'odds', "
            "'dynamic', ...), or several joined by '+'. Default: 'odds+per_sample_stop', for 'graddiff' with "
            "`preserve` 'unlikelihood+per_sample_stop'. They read no difficulty: with one they kept no more "
            "(docs/results.md)."
        },
    )
    schedule_args: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={"help": 'Options of the schedule, for example {"strength": 0.5}, or of each part by its name.'},
    )
    passes: int = field(default=5, metadata={"help": "How often each forget sample is trained on."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets for logging, equal in size."})
    target_forget_prob: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the mean forget probability (of each sample when it was trained on last) is at most "
            "this, and the retain loss within `retain_limit` and `max_retain_loss`."
        },
    )
    max_retain_loss: float | None = field(
        default=None,
        metadata={"help": "Stop as diverged when the mean retain loss since the last log is above this."},
    )
    eval_retain_samples: int = field(
        default=256,
        metadata={
            "help": "Retain samples, and held-out ones, that an evaluation during training scores, evenly spaced."
        },
    )
    log_update_share: bool = field(
        default=False,
        metadata={
            "help": "Log which share of the update every difficulty bucket has, from the gradient norm of each sample "
            "in the batches of logging steps."
        },
    )
    hub_difficulty: bool = field(
        default=False,
        metadata={
            "help": "Upload difficulty scores and schedule with the model. Their sample ids hide the text, but whoever "
            "has a text can tell from them that it was to be forgotten."
        },
    )
    override: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options that may differ from those of the checkpoint to resume from, by name, for example "
            "'learning_rate' or 'retain_weight'. By default all that a step depends on must be the same."
        },
    )
    keep_reference: bool = field(
        default=False,
        metadata={
            "help": "Keep `reference.safetensors` when the run is done. It can hold the answers of the forget set as "
            "token ids; an unfinished run needs it to go on without scoring the data again."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that holds earlier results."})

    def __post_init__(self) -> None:
        check_options(self, strict=False)
        if self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available()  # TRL's default, True, is an error on a machine without
        if self.load_best_model_at_end and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "balance"
        # Before anything is derived from them.
        idle = check_stack_options(self, fields(SFTConfig))
        if self.metric_for_best_model is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = higher_is_better(self.metric_for_best_model)
        check_mappings(self)
        under_new_names(self)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin memory for, and torch would warn
        try:
            super().__post_init__()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # what the stack does not foresee
            raise ValueError(f"options: {type(error).__name__}: {error}") from error
        check_launch(self)
        for line in idle:
            logger.warning(line)
        for name in OWN_DICTIONARIES:
            value = getattr(self, name)
            if value is None:
                setattr(self, name, {})
            elif not isinstance(value, dict):
                raise ValueError(f"{name} must be a dictionary, got {value!r}")
        self.template_context()  # raises for what is wrong with its options
        if self.difficulty == "":
            self.difficulty = None
        for name in ("difficulty", "trainable_layers", "trainable"):  # how a command line takes back what a recipe sets
            if getattr(self, name) in ("none", "None"):
                setattr(self, name, None)
        fill_preserving(self)
        loss = self.unlearning_loss
        self.retain_loss = loss.retain_loss
        self.schedule_parts  # noqa: B018  (raises for an unknown schedule or option)
        self._difficulty_is_auto = self.difficulty == AUTO
        self.use_scores(())
        if self.difficulty == PRECOMPUTED:
            if self.difficulty_args:
                raise ValueError(
                    f"difficulty {PRECOMPUTED!r} has no options, got difficulty_args {self.difficulty_args}"
                )
        elif self.difficulty is not None:
            check_metrics([self.difficulty], {self.difficulty: self.difficulty_args})  # type: ignore[dict-item]
        elif self.schedule_metrics:
            raise ValueError(f"schedule {self.schedule!r} needs a difficulty metric, but difficulty is 'none'")
        check_objective(self, loss)
        check_checkpoints(self)
        check_step(self, loss)
        check_accelerator(self)

    @property
    def schedule_parts(self) -> list[tuple[ScheduleRule, dict[str, Any]]]:
        """The parts of the schedule with the options of each; parsed again only when these options have changed."""
        options = (self.schedule, self.schedule_args)
        parsed = self.__dict__.get("_parsed")
        if parsed is None or parsed[0] != options:
            parts = parse(self.schedule, self.schedule_args)  # type: ignore[arg-type]
            self._parsed = parsed = deepcopy(options), parts
        return parsed[1]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, and saved with a model: nothing that is made of the options."""
        return {name: value for name, value in self.__dict__.items() if name != "_parsed"}

    @property
    def schedule_metrics(self) -> list[str]:
        """The metrics that the schedule reads, without repeats."""
        read = [metric for part, _ in self.schedule_parts for metric in part.metrics]
        named = [self.difficulty if metric == "difficulty" and self.difficulty else metric for metric in read]
        return list(dict.fromkeys(named))

    @property
    def reads_difficulty(self) -> bool:
        """Whether schedule or losses depend on what `difficulty` is."""
        of_parts = any("difficulty" in part.metrics for part, _ in self.schedule_parts)
        return of_parts or bool(self.unlearning_loss.own) or "difficulty" in self.unlearning_loss.by.values()

    def use_scores(self, metrics: Sequence[str]) -> None:
        """What `difficulty` 'auto' stands for where there are scores of these metrics; without scores, `()`."""
        if not self._difficulty_is_auto:
            return
        self.difficulty = None  # so that `schedule_metrics` has the names of what is read
        if self.reads_difficulty or self.difficulty_args:
            self.difficulty = "cud"
        elif self.schedule_metrics:
            self.difficulty = self.schedule_metrics[0]
        elif metrics:
            self.difficulty = "cud" if "cud" in metrics else PRECOMPUTED

    @property
    def unlearning_loss(self) -> UnlearningLoss:
        options = (
            self.objective,
            self.objective_args,
            self.retain_loss,
            self.reference_top_k,
            self.objective_by_bucket,
            self.logits_bytes,
        )
        return UnlearningLoss(*options)  # type: ignore[arg-type]

    def scoring_options(self, peft_config: Any = None) -> dict[str, Any]:
        """Keyword arguments of `score_difficulty` that this configuration stands for."""
        metric_args = {self.difficulty: self.difficulty_args} if self.difficulty and self.difficulty_args else {}
        return {
            "metric_args": metric_args,
            "circuit_args": self.circuit_args,
            "calibration": self.calibration_settings(peft_config),
            "folds": self.folds,
            "group_column": self.group_column,
            "counterfactual_column": self.counterfactual_column,
            "batch_size": self.per_device_train_batch_size,
            "batch_bytes": self.scoring_batch_bytes,
            "max_length": self.max_length,
            "seed": self.seed,
            "progress": not self.disable_tqdm,
        }

    def circuit_choice_options(self) -> dict[str, Any]:
        """Keyword arguments of `train_by_circuit` that this configuration stands for."""
        return {
            "share": self.circuit_share,
            "batch_size": self.per_device_train_batch_size,
            "batch_bytes": self.scoring_batch_bytes,
            "progress": not self.disable_tqdm,
            **circuit_settings(self.circuit_args),  # type: ignore[arg-type]
        }

    def alternative_options(self) -> dict[str, Any]:
        """Keyword arguments of `with_alternatives` that this configuration stands for."""
        return {
            "column": self.alternative_column,
            "refusals": REFUSALS if self.refusals is None else self.refusals,
            "batch_size": self.per_device_eval_batch_size,
            "max_length": self.max_length,
            "seed": self.seed,
            "progress": not self.disable_tqdm,
        }

    def calibration_settings(self, peft_config: Any = None) -> CalibrationSettings:
        """The calibration run of this configuration: same objective, learning rate and trained part, but shorter."""
        return CalibrationSettings(
            loss=replace(self.unlearning_loss, by_bucket={}),
            retain_weight=self.retain_weight,  # type: ignore[arg-type]
            learning_rate=self.learning_rate,
            # Snapshots cost a third of a pass more. The whole was measured at 0.39 to 1.30 of an unlearning run.
            max_passes=max(1, int(self.passes * self.calibration_share)),
            batch_size=self.per_device_train_batch_size,
            seed=self.seed,
            peft_config=peft_config,
            autocast=torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None,
        )
