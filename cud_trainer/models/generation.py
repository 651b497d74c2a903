"""Text that a model writes: by nothing but its weights, the end tokens, and the options given here.

Models bring a generation config with penalties, sampling options and lengths along. An audit must not depend on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from ..data.timeout import apply_chat_template
from .modes import evaluation_mode
from .positions import own_positions, positions_of

MARK = "answer"


@dataclass(frozen=True)
class Sampling:
    """How to draw instead of taking the most probable token.

    Attributes:
        temperature: of the distribution; positive.
        top_p: smallest share of the probability mass that is drawn from, in (0, 1].
        seed: whatever tells one series of draws from another. A draw depends on it and on the prompt alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: Any = 0


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Tokens that end an answer, sorted: the eos of tokenizer and model, and what ends a turn of the chat template."""
    found = {tokenizer.eos_token_id}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return sorted({int(token) for token in found if token is not None} | _turn_end(tokenizer))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The first special token after the answer that the chat template writes; none without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
    try:
        (text,) = apply_chat_template(tokenizer, [chat], tokenize=False)
    except Exception:  # a template may raise anything, and this chat need not suit it
        return set()
    _, found, rest = str(text).rpartition(MARK)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    after = tokenizer(rest, add_special_tokens=False)["input_ids"] if found and rest else []
    return set([token for token in after if token in special][:1])


@contextmanager
def without_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """The model's own generation config has no say inside: `generate` fills in from it whatever is not given."""
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, config in zip(owners, before, strict=True):
            module.generation_config = config


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    stop: Sequence[int],
    pad: int,
    batch_size: int,
    sampling: Sampling | None = None,
    desc: str | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, tokens, `[N]` lists: greedily, or drawn.

    Each ends before the first of its stop tokens, at its own limit, or at the model's last position. So none depends on
    which others share its batch.

    Args:
        prompts: tokens, `[N]` lists of at least one.
        limits: tokens to write at most, `[N]`.
        stop: tokens that end an answer (`stop_tokens`).
        pad: fills shorter prompts of a batch.
        sampling: draw instead.
        desc: label of a progress bar; `None` shows none.
    """
    device = model.get_input_embeddings().weight.device
    room = [_room(model, len(prompt)) for prompt in prompts]
    most = [max(0, min(limit, space)) for limit, space in zip(limits, room, strict=True)]
    written: list[list[int]] = [[] for _ in prompts]
    with (
        evaluation_mode(model),
        tqdm(total=len(prompts), desc=desc, disable=desc is None, unit="sample", leave=False) as bar,
    ):
        ends = list(stop)
        for rows in _batches(prompts, most, room, batch_size):
            longest, length = max(len(prompts[row]) for row in rows), max(most[row] for row in rows)
            if length:
                inputs, mask = _left_padded([prompts[row] for row in rows], longest, pad)
                config = GenerationConfig(
                    max_new_tokens=length, do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad
                )
                with without_generation_config(model), own_positions(model):
                    output = model.generate(
                        input_ids=inputs.to(device),
                        attention_mask=mask.to(device),
                        generation_config=config,
                        logits_processor=_drawn([prompts[row] for row in rows], sampling),
                    )
                for row, tokens in zip(rows, output[:, longest:].tolist(), strict=True):
                    cut = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                    written[row] = tokens[: min(cut, most[row])]
            bar.update(len(rows))
    return written


def _room(model: Any, used: int) -> int:
    """Positions that are left after `used` tokens."""
    own = positions_of(model)
    positions = own.limit
    if positions is None and not own.rotary:  # those that follow the length go on
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions - used if isinstance(positions, int) and positions > 0 else 1 << 30


def _batches(
    prompts: Sequence[Sequence[int]], most: Sequence[int], room: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Rows of similar length together, none of which runs out of positions before its batch is done."""
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: (most[row], len(prompts[row]), row)):
        if batch and (len(batch) == batch_size or most[row] > min(room[other] for other in batch)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _left_padded(prompts: Sequence[Sequence[int]], longest: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `[B, longest]`."""
    inputs = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):
        inputs[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return inputs, mask


def _drawn(prompts: Sequence[Sequence[int]], sampling: Sampling | None) -> LogitsProcessorList:
    if sampling is None:
        return LogitsProcessorList()
    cut = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([_Temperature(sampling.temperature), *cut, _Draw(prompts, sampling.seed)])


class _Temperature(LogitsProcessor):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperature


class _Draw(LogitsProcessor):
    """Gumbel noise on the log-probabilities: their arg max is a draw from them (Gumbel-max trick).

    Every row has a generator of its own, so that its draws do not depend on the others.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], seed: Any) -> None:
        texts = [f"{seed}|{list(prompt)}".encode() for prompt in prompts]
        self.seeds = [int.from_bytes(hashlib.sha256(text).digest()[:7], "big") for text in texts]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in enumerate(self.generators):
            noise[row].exponential_(generator=generator)
        return scores - noise.clamp(min=torch.finfo(scores.dtype).tiny).log()
