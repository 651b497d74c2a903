"""What difficulty metrics look at: the original model and the samples, each expensive pass made once and shared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..circuits import Graph, attribute_dataset, model_graph
from ..data import BATCH_BYTES, Samples
from ..logprobs import score_answers
from ..models.layers import embedding_device, widest_float
from ..models.modes import evaluation_mode
from ..models.precision import exact
from ..resumable import Compute, WorkDir, run_batches
from .folds import make_folds
from .gradients import mean_gradient, sample_gradients
from .noise import noise_effects
from .outputs import output_features

RETAIN_GRADIENT_SAMPLES = 256

# With the zero baseline one-pass EAP ranks edges as the authors' node-wise interpolation does, for a fraction of its
# cost.
CIRCUIT_DEFAULTS = {"method": "eap", "steps": 5, "baseline": "zero", "metric": "prob"}


def circuit_settings(options: dict[str, Any]) -> dict[str, Any]:
    """All options of the attribution, defaults filled in; `steps` only where it matters."""
    settings = {**CIRCUIT_DEFAULTS, **options}
    if settings["method"] == "eap":
        settings["steps"] = 1
    return settings


@dataclass
class DifficultyContext:
    """Inputs of the metrics. Properties are computed on first use and kept.

    Attributes:
        model: the original model, in evaluation mode.
        forget: the forget set, `N` samples.
        retain: the retain set, or `None`.
        batch_size, batch_bytes: for batching, see `cud_trainer.data.plan_batches`.
        seed: of the folds.
        folds: number of cross-fitting folds.
        groups: group of each forget sample (for example its author), never split over folds; or `None`.
        circuit_options: of `cud_trainer.circuits.edge_attributions`.
        calibrate: runs a short unlearning of the forget set, with the user's objective (`None`) or the one named, and
            returns its residual memorisation `[N]`.
        metrics: names of all metrics asked for: passes compute what any of them needs.
        work: keeps what is done, for a run that is killed.
        progress: show progress bars.
    """

    model: PreTrainedModel
    forget: Samples
    retain: Samples | None
    batch_size: int | None = None
    batch_bytes: int = BATCH_BYTES
    seed: int = 0
    folds: int = 5
    groups: list[Any] | None = None
    circuit_options: dict[str, Any] = field(default_factory=dict)
    calibrate: Callable[[str | None], np.ndarray] | None = None
    metrics: tuple[str, ...] = ()
    work: WorkDir | None = None
    progress: bool = True
    _noise: dict[tuple[float, int], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _other_circuits: dict[str, tuple[Tensor, Graph]] = field(default_factory=dict, init=False, repr=False)
    _residuals: dict[str | None, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # Difficulty is that of the answers' own tokens, not of what a chat template adds.
        self.forget = self.forget.measured
        self.retain = None if self.retain is None else self.retain.measured

    @cached_property
    def circuit_settings(self) -> dict[str, Any]:
        """All options of the attribution, defaults filled in; `steps` only where it matters."""
        return circuit_settings(self.circuit_options)

    @cached_property
    def _circuits(self) -> tuple[Tensor, Tensor, Tensor, Graph]:
        return self._attributed(self.circuit_settings)

    def _attributed(self, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Graph]:
        return attribute_dataset(
            self.model,
            self.forget,
            batch_size=self.batch_size,
            batch_bytes=self.batch_bytes,
            work=self.work,
            progress=self.progress,
            **options,
        )

    def circuits(self, options: dict[str, Any] | None = None) -> tuple[Tensor, Graph]:
        """Edge scores of every forget sample and their graph, by the options of the run or by others, each once."""
        if options is None:
            return self.edges, self.graph
        key = json.dumps(options, sort_keys=True)
        if key not in self._other_circuits:
            name = f"circuits-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            edges, _, _, graph = self._attributed({**options, "name": name})
            self._other_circuits[key] = edges, graph
        return self._other_circuits[key]

    @property
    def edges(self) -> Tensor:
        """Edge scores of every forget sample, float32 `[N, n_edges]`."""
        return self._circuits[0]

    @cached_property
    def graph(self) -> Graph:
        """Of the model, known before any circuit is."""
        return model_graph(self.model, ungroup_kv=self.circuit_settings.get("ungroup_kv", False))

    @cached_property
    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean answer log-probability and number of answer tokens of every forget sample, each `[N]`."""
        if "_circuits" in self.__dict__:  # the attribution pass has scored the answers too
            _, mean_logps, lengths, _ = self._circuits
        elif "forget_outputs" in self.__dict__:
            mean_logps, lengths = (self.forget_outputs[name] for name in ("mean_logps", "lengths"))
        else:
            mean_logps, lengths = self.score_answers(self.model, "answers")
        return mean_logps.cpu().double().numpy(), lengths.cpu().double().numpy()

    def score_answers(self, model: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
        """Mean answer log-probabilities of the forget set under `model`, and answer lengths, each `[N]`."""

        def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad(), evaluation_mode(model), exact(model):
                scores = score_answers(model, batch)
            return {"mean_logps": scores.mean_logps.float(), "lengths": scores.lengths}

        scored = self._pass(name, self.forget, compute, hidden=8, model=model)
        return scored["mean_logps"], scored["lengths"]

    @cached_property
    def forget_outputs(self) -> dict[str, Tensor]:
        """See `output_features`, rows of the forget set."""
        return self._outputs("outputs", self.forget)

    @cached_property
    def retain_outputs(self) -> dict[str, Tensor]:
        """See `output_features`, rows of the retain set."""
        assert self.retain is not None
        return self._outputs("retain-outputs", self.retain)

    def _outputs(self, name: str, samples: Samples) -> dict[str, Tensor]:
        layers = self.model.config.get_text_config().num_hidden_layers
        return self._pass(name, samples, lambda batch: output_features(self.model, batch), hidden=8 + layers)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """See `sample_gradients`: norms of every forget sample and, where a metric asks for it, products."""
        direction, norm = None, 0.0
        if "grad_alignment" in self.metrics:
            assert self.retain is not None
            size = min(RETAIN_GRADIENT_SAMPLES, len(self.retain))
            rows = np.random.default_rng(self.seed).permutation(len(self.retain))[:size]
            some = self.retain.select(rows)
            plan = self._plan(some, self._per_token(hidden=self._activations))
            batches = (some.pad(part) for part in plan)
            direction = mean_gradient(self.model, ({k: v.to(self.device) for k, v in b.items()} for b in batches))
            norm = float(
                torch.stack([part.to(widest_float(part.device)).square().sum().cpu() for part in direction])
                .sum()
                .sqrt()
            )
        name = "gradients" if direction is None else "gradients-retain"
        gradients = self._pass(
            name, self.forget, lambda batch: sample_gradients(self.model, batch, direction), hidden=self._activations
        )
        if direction is not None:
            gradients["cosines"] = gradients["products"].cpu().double() / (
                gradients["squares"].cpu().double().sum(1).sqrt() * norm
            )
        return gradients

    def noise(self, sigma: float, draws: int) -> dict[str, Tensor]:
        """What noise on the weights does to every forget sample, see `noise_effects`; one pass for all metrics."""
        if (sigma, draws) not in self._noise:
            self._noise[sigma, draws] = self._pass(
                f"noise-{sigma!r}-{draws}",
                self.forget,
                lambda batch: noise_effects(self.model, batch, sigma=sigma, draws=draws, seed=self.seed),
                hidden=8 + self.model.config.get_text_config().num_hidden_layers,
            )
        return self._noise[sigma, draws]

    def _pass(
        self, name: str, samples: Samples, compute: Compute, *, hidden: float, model: PreTrainedModel | None = None
    ) -> dict[str, Tensor]:
        """One pass over `samples`; `hidden`: hidden states that a token takes, beside its logits."""
        return run_batches(
            name,
            samples,
            lambda batch: {key: value.cpu() for key, value in compute(batch).items()},
            self._plan(samples, self._per_token(hidden)),
            device=embedding_device(model or self.model),
            work=self.work,
            progress=self.progress,
        )

    def _plan(self, samples: Samples, per_token: float) -> list[list[int]]:
        return samples.plan(bytes_per_token=per_token, batch_size=self.batch_size, batch_bytes=self.batch_bytes)

    def _per_token(self, hidden: float) -> float:
        config = self.model.config.get_text_config()
        return 8.0 * config.vocab_size + 4.0 * hidden * config.hidden_size

    @property
    def _activations(self) -> float:
        return 24.0 * self.model.config.get_text_config().num_hidden_layers  # what a backward pass keeps

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return embedding_device(self.model)

    @property
    def residual(self) -> np.ndarray:
        """Residual memorisation of every forget sample after the calibration run, `[N]`, higher = harder."""
        return self.residual_of(None)

    def residual_of(self, objective: str | None) -> np.ndarray:
        """The same for a calibration run with another objective than the user's; each is run once."""
        if self.calibrate is None:
            raise ValueError("this metric needs a calibration run, which is not available here")
        if objective not in self._residuals:
            self._residuals[objective] = np.asarray(self.calibrate(objective), dtype=np.float64)
        return self._residuals[objective]

    @property
    def folded(self) -> bool:
        """Whether a metric has asked for folds."""
        return "fold" in self.__dict__

    @cached_property
    def fold(self) -> np.ndarray:
        """Cross-fitting fold of every forget sample, int `[N]`."""
        return make_folds(len(self.forget), self.folds, self.seed, self.groups)
