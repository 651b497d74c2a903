"""`cud train`: unlearn a forget set."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from trl import ModelConfig

from ..config import CUDConfig
from ..difficulty import DifficultyScores
from ..ownership import output_directory
from ..trainer import CUDTrainer
from ..training.checkpoints import CHECKPOINTS, RUN_FILES, begun
from .help import About
from .options import TrainArguments, adapter_options, inputs_of, load_tokenizer, model_options, parse_command
from .summary import train_summary

NOTHING_DONE = 3  # exit code

ABOUT = About(
    what="Unlearn a forget set with a difficulty-aware schedule.",
    usage="--model_name_or_path MODEL --forget_dataset FILE --retain_dataset FILE --output_dir FOLDER "
    "[--OPTION VALUE ...]",
    examples=[
        (
            "your own samples, options in a file; a line here goes before it",
            "cud train --config recipes/own_data.yaml --model_name_or_path MODEL --retain_weight 4",
        ),
        (
            "an adapter, with scores made before",
            "cud train --config recipes/own_data.yaml --model_name_or_path MODEL \\\n"
            "    --use_peft true --learning_rate 1e-4 --difficulty_scores difficulty.parquet",
        ),
        ("without any difficulty", "cud train --config recipes/tofu/npo.yaml --difficulty none --schedule uniform"),
        ("Names: cud list objectives schedules metrics steps. Recipes in a clone: recipes/own_data.yaml,", ""),
        ("recipes/tofu/{ga,graddiff,npo,simnpo,rmu}.yaml, recipes/private_text/unlearn.yaml, recipes/muse, wmdp.", ""),
    ],
)


def train(argv: list[str]) -> int:
    """`cud train`."""
    data_args, args, model_args = parse_command(TrainArguments, argv, "cud train", ABOUT)
    resume: str | bool | None = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume and args.overwrite:
        raise ValueError("overwrite deletes the checkpoints that resume_from_checkpoint goes on from: give one of them")
    args.resume_from_checkpoint = resume or False  # known here: see `clear_before`
    owner = output_directory(
        args.output_dir,
        (*RUN_FILES, CHECKPOINTS),
        inputs=inputs_of(data_args, model_args),
        overwrite=args.overwrite,
        resume=bool(resume),
        known=begun(args.output_dir),
    )
    with owner if args.process_index == 0 else nullcontext():
        return _train(data_args, args, model_args, resume)


def _train(data_args: TrainArguments, args: CUDConfig, model_args: ModelConfig, resume: str | bool | None) -> int:
    scores = DifficultyScores.load(data_args.difficulty_scores) if data_args.difficulty_scores else None
    tokenizer = load_tokenizer(model_args, args)
    forget, retain = data_args.load(tokenizer)
    heldout = data_args.load_heldout(tokenizer)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_options(model_args)}
    trainer = CUDTrainer(
        model_args.model_name_or_path,
        args,
        forget_dataset=forget,
        retain_dataset=retain,
        heldout_dataset=heldout,
        processing_class=tokenizer,
        peft_config=adapter_options(model_args),
        difficulty_scores=scores,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.measured() is None:
        trainer.evaluate()  # what the card and the last line say
    reason = trainer.void_reason()
    if trainer.void.unmoved() is None:  # a model that was not unlearned is not left as one that was
        trainer.save_model(args.output_dir)
        trainer.create_model_card()
    if reason is not None:
        if trainer.is_world_process_zero():
            print(f"cud train: {reason}", file=sys.stderr)
        trainer.end()
        return NOTHING_DONE
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print("\n".join(train_summary(trainer, {**vars(data_args), **vars(model_args)})))
    trainer.end()
    return 0
