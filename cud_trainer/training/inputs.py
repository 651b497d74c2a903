"""`RunInputs`: what a run is given, checked and prepared before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..circuits import check_architecture
from ..circuits.components import CircuitChoice, check_adapter_can_follow, train_by_circuit
from ..config import CUDConfig
from ..data import (
    Samples,
    TemplateContext,
    check_disjoint,
    check_vocabulary,
    evenly_spaced,
    prepare_dataset,
    prepare_samples,
    ready_tokenizer,
    standardised,
)
from ..data.groups import check_groups
from ..data.samples import check_unseen
from ..data.tokenizers import tokenizer_options
from ..difficulty import DifficultyScores
from ..difficulty.scores import PRECOMPUTED, merge_metrics
from ..files import write_json
from ..models.fingerprint import model_fingerprint
from ..models.loading import adapter_file, load_causal_lm, tokenizer_home
from ..models.modes import on_device
from ..models.positions import check_sets
from ..models.shards import check_unpartitioned, loaded_whole
from ..models.trainable import check_trained, train_only
from ..models.whole import check_finite
from ..objectives import UnlearningLoss
from ..objectives.alternatives import with_alternatives
from ..scoring import check_metrics
from ..stack_options import sharded_by
from .anchor import check_whole_floats
from .checkpoints import (
    TEMPLATE_FILE,
    check_is_no_model,
    check_may_start,
    recorded_template,
    template_to_go_on_with,
)
from .stack import check_stack, warn_of_still_weights

logger = logging.get_logger(__name__)

Evaluated: TypeAlias = "Dataset | dict[str, Dataset] | None"


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run is given; whoever gets one checks and prepares nothing again.

    Attributes:
        args: options.
        loss: the objective and retain loss of `args`.
        model: the model before unlearning, not wrapped yet.
        tokenizer: with pad and eos tokens.
        peft_config: the adapter to train, or `None`.
        forget, retain: prepared samples. `forget` has alternative answers where the objective needs them.
        heldout: prepared samples that neither loss sees, or `None`.
        evaluated: further prepared samples, for the Trainer's own evaluation loss.
        template: what a chat template sees beside the messages.
        scores: difficulty scores made before, in the order of `forget`; `None` when they are to be computed, or when
            the run needs none.
        merged: whether an earlier adapter was folded into the model, to put `peft_config` on top.
        choice: the modules that are trained, where circuits choose them; `peft_config` is on them then.
    """

    args: CUDConfig
    loss: UnlearningLoss
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    peft_config: Any
    forget: Samples
    retain: Samples | None
    heldout: Samples | None
    evaluated: Evaluated
    scores: DifficultyScores | None
    template: TemplateContext
    merged: bool
    choice: CircuitChoice | None = None

    @classmethod
    def checked(
        cls,
        args: CUDConfig,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        forget: Dataset,
        retain: Dataset | None,
        heldout: Dataset | None,
        evaluated: Evaluated,
        peft_config: Any,
        scores: DifficultyScores | str | Path | None,
        own_optimizer: bool = False,
    ) -> RunInputs:
        """The inputs of `CUDTrainer`.

        Cheap checks come first, then the data, then the model. Alternative answers that the model writes, and the
        modules that circuits choose, are all that is computed.

        Raises:
            ValueError: for bad input, naming the sample, column or option.
        """
        if not isinstance(args, CUDConfig):
            raise ValueError(f"args must be a CUDConfig, got a {type(args).__name__}")
        model = str(model) if isinstance(model, Path) else model
        if isinstance(scores, (str, Path)):
            scores = DifficultyScores.load(scores)
        args.use_scores(() if scores is None else scores.metrics)
        loss = args.unlearning_loss
        check_is_no_model(args, model)
        _check_options(args, loss, retain, peft_config, scores)
        tokenizer = _ready_tokenizer(args, model, tokenizer)
        args.chat_template_path = None  # used up; TRL would add its tokens to the model
        template = _template(args, scores)
        forget = standardised(forget, "forget")
        forget_samples = prepare_samples(
            forget,
            tokenizer,
            tokenizer_checked=True,
            max_length=args.max_length,
            name="forget",
            keep_columns=[args.group_column] if args.group_column else [],
            counterfactual_column=args.counterfactual_column,
            template=template,
        )
        retain_samples, heldout_samples = _prepared_beside(forget_samples, retain, heldout, args, tokenizer, template)
        if args.difficulty is not None and len(forget_samples) < args.n_buckets:
            raise ValueError(f"cannot make {args.n_buckets} difficulty buckets of {len(forget_samples)} forget samples")
        evaluated = prepare_evaluated(evaluated, tokenizer, args.max_length, template)
        steps = -(-len(forget_samples) * args.passes // global_batch(args))
        if args.max_steps > steps:
            raise ValueError(
                f"max_steps={args.max_steps} goes beyond the schedule ({steps} steps for {args.passes} passes): "
                "raise passes"
            )
        merged = isinstance(model, str) and peft_config is not None and _is_adapter(model, args)
        model = _checked_model(model, args, loss, peft_config)
        check_vocabulary(tokenizer, model)
        sets = forget_samples, retain_samples, heldout_samples
        check_sets(model, **dict(zip(("forget", "retain", "held-out"), sets, strict=True)))
        inputs = cls(args, loss, model, tokenizer, peft_config, *sets, evaluated, None, template, merged)
        inputs = replace(inputs, scores=inputs._checked_scores(scores))
        check_stack(args, model, own_optimizer=own_optimizer)
        if peft_config is None:
            warn_of_still_weights(args, model)
        _check_l2_sp(args, model, peft_config)
        return replace(inputs, forget=inputs._with_alternatives(forget))._with_choice()

    @cached_property
    def model_fingerprint(self) -> str:
        """Fingerprint of the model before unlearning; to be read before it is trained."""
        return model_fingerprint(self.model)

    @property
    def paired_retain(self) -> Samples | None:
        """The retain samples that steps train on; `None` without a retain loss."""
        return self.retain if self.loss.uses_retain else None

    @cached_property
    def evaluated_retain(self) -> Samples | None:
        """The retain samples that an evaluation scores."""
        return None if self.retain is None else evenly_spaced(self.retain, self.args.eval_retain_samples)

    @cached_property
    def evaluated_heldout(self) -> Samples | None:
        """The held-out samples that an evaluation scores."""
        return None if self.heldout is None else evenly_spaced(self.heldout, self.args.eval_retain_samples)

    @property
    def needed_metrics(self) -> list[str]:
        """The difficulty metrics that the run reads, the primary one first."""
        if self.args.difficulty is None:
            return []
        return merge_metrics(self.args.difficulty, [*self.args.schedule_metrics, "loss", "length"])

    @property
    def global_batch(self) -> int:
        """Pairs of an optimizer step, over all processes."""
        return global_batch(self.args)

    @property
    def evaluates_itself(self) -> bool:
        """Whether evaluations during training have no other dataset than the forget and retain set."""
        return self.evaluated is None and self.args.eval_strategy != "no"

    @property
    def shards_model(self) -> bool:
        """Whether the model is split over processes when it is wrapped, and must not be on a device before."""
        return bool(sharded_by(self.args))

    def _checked_scores(self, scores: DifficultyScores | None) -> DifficultyScores | None:
        """Scores made before, in the order of the forget samples, with all that the schedule reads."""
        args = self.args
        if scores is None:
            check_metrics(self.needed_metrics or ["loss"], args.scoring_options()["metric_args"], self.model)
        elif args.difficulty is not None:
            scores = scores.aligned(self.forget.ids)
            if args.difficulty == PRECOMPUTED:
                scores = scores.with_given()
            by_difficulty = "difficulty" in self.loss.by.values()
            for metric in [*args.schedule_metrics, *([args.difficulty] if by_difficulty else [])]:
                scores[metric]  # raises when it is not there
        return scores

    def _with_alternatives(self, dataset: Dataset) -> Samples:
        """The forget set with the alternative answers that the objective asks for, the same on all processes."""
        args, source = self.args, self.loss.alternative
        if source is None:
            return self.forget
        options = {**args.alternative_options(), "template": self.template}
        if source != "model":
            return with_alternatives(self.forget, dataset, self.tokenizer, source, **options)
        shared: list[Any] = [None]
        if args.process_index == 0:
            with on_device(self.model, args.device, put_back=self.shards_model):
                written = with_alternatives(self.forget, dataset, self.tokenizer, source, model=self.model, **options)
                shared = [written.dataset.to_dict()]
        if args.world_size > 1:
            broadcast_object_list(shared)
        return replace(self.forget, dataset=Dataset.from_dict(shared[0]))

    def _with_choice(self) -> RunInputs:
        """With only the modules trained that circuits choose, if they are to."""
        if self.args.trainable is None:
            return self
        assert self.retain is not None
        with on_device(self.model, self.args.device, put_back=self.shards_model):
            choice, peft_config = train_by_circuit(
                self.model,  # type: ignore[arg-type]
                self.forget,
                self.retain,
                self.peft_config,
                **self.args.circuit_choice_options(),
            )
        check_trained(self.model, peft_config)
        return replace(self, peft_config=peft_config, choice=choice)


def global_batch(args: CUDConfig) -> int:
    """Pairs of an optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def prepare_evaluated(
    dataset: Evaluated, tokenizer: PreTrainedTokenizerBase, max_length: int | None, template: TemplateContext
) -> Evaluated:
    """What the Trainer's own evaluation loss is taken of, prepared."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {
            name: prepare_dataset(part, tokenizer, max_length=max_length, name=f"eval ({name})", template=template)
            for name, part in dataset.items()
        }
    return prepare_dataset(dataset, tokenizer, max_length=max_length, name="eval", template=template)


def _template(args: CUDConfig, scores: DifficultyScores | None) -> TemplateContext:
    """What a chat template sees, on the day of what the run goes on with, the same on all processes."""
    shared = [args.template_context(template_to_go_on_with(args, scores))]
    if args.world_size > 1:  # they may start on both sides of midnight
        broadcast_object_list(shared)
    return shared[0]


def record_template(inputs: RunInputs) -> None:
    """Write what the chat template sees into the folder of the run, before anything that takes time."""
    args, template = inputs.args, inputs.forget.template
    if template is None or args.process_index != 0:
        return
    output = Path(args.output_dir)
    before = None if args.overwrite else recorded_template(output)
    if before is not None and before != template:
        differs = sorted(key for key in {**before, **template} if before.get(key) != template.get(key))
        raise ValueError(
            f"the run in {output} was begun with another {differs[0]} ({before.get(differs[0])!r}, here "
            f"{template.get(differs[0])!r}); pass overwrite to replace it"
        )
    write_json(output / TEMPLATE_FILE, template)


def _check_options(
    args: CUDConfig, loss: UnlearningLoss, retain: Dataset | None, peft_config: Any, scores: DifficultyScores | None
) -> None:
    """Raise `ValueError` for what contradicts itself whatever the data and the model are."""
    if args.difficulty == PRECOMPUTED and scores is None:
        raise ValueError(f"difficulty {PRECOMPUTED!r} is the first metric of difficulty_scores: give them")
    if args.process_index == 0:
        check_may_start(args)
    if args.retain_pairing not in ("random", "nearest"):
        raise ValueError(f"retain_pairing must be 'random' or 'nearest', got {args.retain_pairing!r}")
    if args.retain_pairing == "nearest" and not loss.uses_retain:
        raise ValueError("retain_pairing 'nearest' pairs with retain samples, but retain_loss is 'none'")
    if args.step != "plain" and sharded_by(args) is not None:
        raise ValueError(
            f"step {args.step!r} is not supported with {sharded_by(args)}: no process has whole gradients there"
        )
    if args.l2_sp and sharded_by(args) is not None:
        raise ValueError(f"l2_sp is not supported with {sharded_by(args)}: no process has whole weights there")
    if peft_config is not None and args.trainable_layers is not None:
        raise ValueError("trainable_layers is for training without an adapter; use layers_to_transform of the adapter")
    _check_adapter(args, peft_config)
    if args.trainable == "circuit":
        if retain is None:
            raise ValueError("trainable 'circuit' compares forget with retain circuits: give retain_dataset")
        if sharded_by(args) is not None:
            raise ValueError(f"trainable 'circuit' is not supported with {sharded_by(args)}")
        if peft_config is not None:
            check_adapter_can_follow(peft_config)
    if loss.uses_retain and retain is None:
        raise ValueError(
            f"retain dataset is missing: objective {args.objective!r} with retain_loss {loss.retain_loss!r} needs one"
        )


def _check_l2_sp(args: CUDConfig, model: nn.Module, peft_config: Any) -> None:
    """Raise `ValueError` where weights cannot go back by so small steps; if nobody asked for it, it is left out."""
    if not args.l2_sp:
        return
    try:
        check_whole_floats(model, adapter=peft_config is not None)
    except ValueError as error:
        if "l2_sp" not in args.preserve_filled:
            raise
        args.l2_sp = 0.0
        logger.warning(f"preserve goes without l2_sp: {error}")


def _prepared_beside(
    forget: Samples,
    retain: Dataset | None,
    heldout: Dataset | None,
    args: CUDConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateContext,
) -> tuple[Samples | None, Samples | None]:
    """Retain and held-out set, prepared.

    Raises:
        ValueError: naming a sample that is in two of the sets, or a group of the held-out one that a loss sees, too.
    """
    group, found = args.group_column, {}
    for name, part in (("retain", retain), ("held-out", heldout)):
        if part is not None:
            found[name] = prepare_samples(
                part,
                tokenizer,
                tokenizer_checked=True,
                max_length=args.max_length,
                name=name,
                keep_columns=[group] if heldout is not None and group in (part.column_names or ()) else [],
                template=template,
            )
    if "retain" in found:
        check_disjoint(forget, found["retain"])
    if "held-out" in found:
        unseen = found["held-out"]
        for name, seen in (("forget", forget), ("retain", found.get("retain"))):
            if seen is None:
                continue
            check_unseen(unseen, seen, name)
            if group is not None and all(group in samples.dataset.column_names for samples in (unseen, seen)):
                check_groups(unseen[group], seen[group], group, name)
    return found.get("retain"), found.get("held-out")


def _ready_tokenizer(
    args: CUDConfig, model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer, by default that of the model, as the options of the run want it."""
    if tokenizer is None:
        if not isinstance(model, str):
            raise ValueError("pass the tokenizer as processing_class")
        home, revision = tokenizer_home(model, dict(args.model_init_kwargs or {}).get("revision"))  # type: ignore[arg-type]
        tokenizer = AutoTokenizer.from_pretrained(home, revision=revision, trust_remote_code=args.trust_remote_code)
    return ready_tokenizer(tokenizer, **tokenizer_options(args))


def _is_adapter(model: str, args: CUDConfig) -> bool:
    return adapter_file(model, dict(args.model_init_kwargs or {}).get("revision")) is not None  # type: ignore[arg-type]


def _check_adapter(args: CUDConfig, peft_config: Any) -> None:
    """Raise `ValueError` for an adapter that cannot be trained here, whatever the model is."""
    if peft_config is None:
        return
    if getattr(peft_config, "inference_mode", False):
        raise ValueError("nothing would be trained: the peft_config has inference_mode=True")
    if getattr(peft_config, "is_prompt_learning", False):
        if peft_config.peft_type != "PREFIX_TUNING":
            raise ValueError(
                f"adapters of type {str(peft_config.peft_type).rpartition('.')[2]} are not supported: their virtual "
                "tokens shift the answer; use LoRA or another adapter that leaves the input as it is"
            )
        if args.gradient_checkpointing:
            raise ValueError("prefix tuning needs gradient_checkpointing=False: it works through the cache")


def _checked_model(model: nn.Module | str, args: CUDConfig, loss: UnlearningLoss, peft_config: Any) -> nn.Module:
    """The model, loaded if it is a name, with the layers that are trained; `ValueError` when it cannot be."""
    if isinstance(model, str):
        options = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        # As in TRL: full precision weights unless asked otherwise, mixed precision comes from `bf16`.
        if "torch_dtype" not in options:
            options.setdefault("dtype", "float32")
        options.setdefault("trust_remote_code", args.trust_remote_code)
        # A new adapter goes on top of what is there.
        # What transformers was told of: by the option, or by `accelerate launch`.
        told = getattr(args, "hf_deepspeed_config", None) or getattr(args.deepspeed_plugin, "dschf", None)
        with loaded_whole(told):
            model = load_causal_lm(model, merge_adapter=peft_config is not None, **options)
        args.model_init_kwargs = None  # used up; TRL would warn that it ignores them
    else:
        check_unpartitioned(model)
        check_finite(getattr(model, "name_or_path", None) or type(model).__name__, model)
    # Of a compiled model the one that was compiled, whose weights it has: `torch_compile` compiles the training step.
    model = getattr(model, "_orig_mod", model)
    loss.check_model(model.config)
    if getattr(model, "is_quantized", False) and peft_config is None and not hasattr(model, "peft_config"):
        raise ValueError("the model's weights are quantised and cannot be trained: give a peft_config (QLoRA)")
    if args.trainable_layers is not None:
        if hasattr(model, "peft_config"):
            raise ValueError("trainable_layers is for training without an adapter, but the model has one")
        train_only(model, args.trainable_layers)
    if peft_config is not None and hasattr(model, "peft_config"):
        raise ValueError(
            "the model has an adapter, and peft_config asks for another one: merge it first (merge_and_unload), or "
            "leave out peft_config to train the one that is there"
        )
    if args.trainable == "circuit":
        if hasattr(model, "peft_config"):
            raise ValueError("trainable 'circuit' puts a new adapter on what it chooses, but the model has one")
        check_architecture(model)
    else:
        check_trained(model, peft_config)
    return model
