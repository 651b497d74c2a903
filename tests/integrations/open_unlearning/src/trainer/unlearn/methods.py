"""The losses sample by sample and token by token, in plain loops."""

import copy

import deepspeed  # imported at the top, as theirs do
import torch
from transformers import TrainerCallback

from trainer.unlearn.base import UnlearnTrainer


def run(model, batch, **options):
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, **options)


def answers(model, batch):
    """For every sample, log-probabilities of its answer's tokens."""
    logps = run(model, batch).logits.log_softmax(-1)
    for row, labels in enumerate(batch["labels"]):
        places = [place for place in range(1, len(labels)) if labels[place] != -100]
        yield torch.stack([logps[row, place - 1, labels[place]] for place in places])


class GradAscent(UnlearnTrainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = run(model, inputs["forget"])
        return (-outputs.loss, outputs) if return_outputs else -outputs.loss


class CEU(UnlearnTrainer):
    def __init__(self, ignore_first_n_answer_tokens=1, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ignore_first_n_answer_tokens = ignore_first_n_answer_tokens

    def compute_loss(self, model, inputs, return_outputs=False):
        logits, found = model(**inputs["forget"]).logits, []
        for row, labels in enumerate(inputs["forget"]["labels"]):
            places = [place for place in range(len(labels)) if labels[place] != -100]
            for place in places[self.ignore_first_n_answer_tokens :]:
                p = logits[row, place - 1].softmax(-1)
                others = p.detach().clone()
                others[labels[place]] = 0
                found.append(-(others / others.sum() * p.log()).sum())
        return torch.stack(found).mean()


class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type, self.ref_model = gamma, alpha, retain_loss_type, None

    def _prepare_ref_model(self, model):
        return self.accelerator.prepare_model(copy.deepcopy(model).eval(), evaluation_mode=True)

    def compute_retain_loss(self, model, retain_inputs):
        if self.retain_loss_type != "NLL":
            raise NotImplementedError(self.retain_loss_type)
        return run(model, retain_inputs).loss

    def forget_loss(self, model, forget):
        return -run(model, forget).loss

    def compute_loss(self, model, inputs, return_outputs=False):
        forget = self.forget_loss(model, inputs["forget"])
        return self.gamma * forget + self.alpha * self.compute_retain_loss(model, inputs["retain"])


class Referring(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.ref_model = beta, self._prepare_ref_model(self.model)

    def ratios(self, model, batch):
        with torch.no_grad():
            start = [logps.sum() for logps in answers(self.ref_model, batch)]
        return torch.stack([logps.sum() for logps in answers(model, batch)]) - torch.stack(start)


class NPO(Referring):
    def forget_loss(self, model, forget):
        return (2 / self.beta * (1 + self.ratios(model, forget).mul(self.beta).exp()).log()).mean()


class DPO(Referring):
    def forget_loss(self, model, forget):
        gain = self.ratios(model, forget["alternate"]) - self.ratios(model, forget["original"])
        return (2 / self.beta * (1 + gain.mul(-self.beta).exp()).log()).mean()


class UNDIAL(Referring):
    def forget_loss(self, model, forget):
        logps = run(model, forget).logits.log_softmax(-1)
        with torch.no_grad():
            teacher = run(self.ref_model, forget).logits
        found = []
        for row, labels in enumerate(forget["labels"]):
            for place in range(1, len(labels)):
                target = teacher[row, place - 1].clone()
                target[labels[place]] -= self.beta
                found.append(-(target.softmax(-1) * logps[row, place - 1]).sum())
        return torch.stack(found).mean()


class SimNPO(GradDiff):
    def __init__(self, delta=0.0, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.delta, self.beta = delta, beta

    def forget_loss(self, model, forget):
        losses = torch.stack([-logps.mean() for logps in answers(model, forget)]) - self.delta
        return (2 / self.beta * (1 + losses.mul(-self.beta).exp()).log()).mean()


class WGA(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def forget_loss(self, model, forget):
        logps = torch.cat(list(answers(model, forget)))
        return (logps.exp().detach() ** self.beta * logps).mean()


class SatImp(GradDiff):
    def __init__(self, beta1=5.0, beta2=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta1, self.beta2 = beta1, beta2

    def forget_loss(self, model, forget):
        logps = torch.cat(list(answers(model, forget)))
        p = logps.exp().detach()
        return (p**self.beta1 * (1 - p) ** self.beta2 * logps).mean()


class RMU(GradDiff):
    def __init__(self, module_regex="", trainable_params_regex=(), steering_coeff=20, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert not isinstance(self.model, deepspeed.DeepSpeedEngine)
        self.model_module = dict(self.model.named_modules())[module_regex.replace("\\", "")]
        self.steering_coeff, self.control_vec = steering_coeff, None

    def forward_with_cache(self, model, inputs, module, no_grad=True):
        kept = []
        handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
        with torch.set_grad_enabled(not no_grad):
            outputs = model(**inputs)
        handle.remove()
        return kept[0] if torch.is_tensor(kept[0]) else kept[0][0], outputs

    def get_control_vector(self, dim):
        if self.control_vec is None:
            vector = torch.rand(1, 1, dim)
            self.control_vec = vector / vector.norm() * self.steering_coeff
        return self.control_vec

    def forget_loss(self, model, forget):
        inputs = {name: forget[name] for name in ("input_ids", "attention_mask", "labels")}
        hidden, _ = self.forward_with_cache(model, inputs, self.model_module, no_grad=False)
        control = self.get_control_vector(hidden.shape[-1]).to(hidden.dtype)
        mask = forget["labels"] != -100
        sums = [((hidden[row] - control[0]) ** 2).mean(-1)[mask[row]].sum() for row in range(len(mask))]
        return torch.stack([total / length for total in sums for length in mask.sum(-1)]).mean()


class PDU(GradDiff):
    def __init__(
        self,
        retain_loss_eps=0.0,
        primal_dual=False,
        dual_step_size=1.0,
        dual_update_upon="step",
        dual_warmup_epochs=0,
        loss_names=None,
        *args,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.preferences, self.can_update = [self.gamma, self.alpha], dual_warmup_epochs == 0
        self.eps, self.size, self.primal_dual = retain_loss_eps, dual_step_size, primal_dual
        if primal_dual:
            self.add_callback(DualUpdates(self, dual_warmup_epochs))

    def enable_updates(self):
        self.can_update = True

    def final_loss_value(self, losses):
        loss = self.preferences[0] * losses[0] + self.preferences[1] * (losses[1] - self.eps)
        if self.primal_dual and self.can_update:
            self.preferences[1] = max(0, self.preferences[1] + self.size * (losses[1].item() - self.eps))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False):
        logits, mask = run(model, inputs["forget"]).logits, inputs["forget"]["labels"] != -100
        spread = ((logits.max(-1).values - logits.mean(-1)) ** 2)[mask].mean()
        return self.final_loss_value([spread, self.compute_retain_loss(model, inputs["retain"])])


class DualUpdates(TrainerCallback):
    def __init__(self, trainer, warmup):
        self.trainer, self.warmup = trainer, warmup

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch >= self.warmup:
            self.trainer.enable_updates()


class Community(GradDiff):
    """A method that nobody here knows."""

    def forget_loss(self, model, forget):
        return run(model, forget).loss.cos()
