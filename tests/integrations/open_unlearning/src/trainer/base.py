from transformers import Trainer


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        return {"vocabulary": len(self.tokenizer)} if self.evaluators else {}  # `tokenizer` as in transformers 4
