from transformers import Trainer, TrainingArguments

from trainer.base import FinetuneTrainer
from trainer.unlearn import methods

TRAINER_REGISTRY = {}


def _register_trainer(trainer_class):
    TRAINER_REGISTRY[trainer_class.__name__] = trainer_class


def load_trainer_args(trainer_args, dataset):
    return TrainingArguments(**dict(trainer_args))


def load_trainer(
    trainer_cfg,
    model,
    train_dataset=None,
    eval_dataset=None,
    tokenizer=None,
    data_collator=None,
    evaluators=None,
    template_args=None,
):
    args = load_trainer_args(trainer_cfg.args, train_dataset)
    kind = TRAINER_REGISTRY[trainer_cfg.handler]
    return kind(
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
        args=args,
        data_collator=data_collator,
        evaluators=evaluators,
        template_args=template_args,
        **trainer_cfg.get("method_args", {}),
    ), args


for kind in (Trainer, FinetuneTrainer):
    _register_trainer(kind)
for name in "GradAscent GradDiff NPO DPO SimNPO RMU UNDIAL CEU WGA SatImp PDU Community".split():
    _register_trainer(getattr(methods, name))
