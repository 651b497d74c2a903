from trainer.base import FinetuneTrainer


class UnlearnTrainer(FinetuneTrainer):
    pass
