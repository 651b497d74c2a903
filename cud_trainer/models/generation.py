"""Text that a model writes: by nothing but its weights, the end tokens, and the options given here.

Models bring a generation config with penalties, sampling options and lengths along. An audit must not depend on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from .positions import own_positions, position_ids, positions_of

MARK = "answer"
# Sequences that are drawn at a time, by prompts of a batch: a step of generation takes one position of each.
DRAWN_AT_ONCE = 16


@dataclass(frozen=True)
class Sampling:
    """How to draw instead of taking the most probable token.

    Attributes:
        temperature: of the distribution; positive.
        top_p: smallest share of the probability mass that is drawn from, in (0, 1].
        seed: whatever tells one series of draws from another. A draw depends on it, on its own number and on the
            prompt: not on the device, nor on how many are drawn, nor, but for rounding, on what shares its batch.
        draws: of each prompt, which is encoded once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: Any = 0
    draws: int = 1


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
    """What the model writes after each prompt, tokens, `[N]` lists: greedily, or drawn, `[N x draws]` lists.

    Each ends before the first of its stop tokens, at its own limit, or at the model's last position. So none depends on
    which others share its batch. The draws of a prompt follow each other.

    Args:
        prompts: tokens, `[N]` lists of at least one.
        limits: tokens to write at most, `[N]`.
        stop: tokens that end an answer (`stop_tokens`).
        pad: fills shorter prompts of a batch.
        batch_size: prompts at a time; of several draws each, at most `DRAWN_AT_ONCE` times as many sequences.
        sampling: draw instead.
        desc: label of a progress bar; `None` shows none.
    """
    draws = 1 if sampling is None else sampling.draws
    room = [_room(model, len(prompt)) for prompt in prompts]
    most = [max(0, min(limit, space)) for limit, space in zip(limits, room, strict=True)]
    written: list[list[int]] = [[] for _ in range(len(prompts) * draws)]
    at_once = max(1, min(draws, DRAWN_AT_ONCE * batch_size))
    batch_size = max(1, min(batch_size, DRAWN_AT_ONCE * batch_size // at_once))
    with (
        evaluation_mode(model),
        tqdm(total=len(prompts), desc=desc, disable=desc is None, unit="sample", leave=False) as bar,
    ):
        for rows in _batches(prompts, most, room, batch_size):
            for first in range(0, draws if max(most[row] for row in rows) else 0, at_once):
                numbers = range(first, min(first + at_once, draws))
                asked = [prompts[row] for row in rows]
                answers = iter(_written(model, asked, [most[row] for row in rows], stop, pad, sampling, numbers))
                for row in rows:
                    for number in numbers:
                        written[row * draws + number] = next(answers)
            bar.update(len(rows))
    return written


def _written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    stop: Sequence[int],
    pad: int,
    sampling: Sampling | None,
    numbers: range,
) -> list[list[int]]:
    """Continuations of one batch, at most so many tokens each, those with these `numbers` of a prompt in a row."""
    device, ends = model.get_input_embeddings().weight.device, list(stop)
    longest, length = max(len(prompt) for prompt in prompts), max(most)
    inputs, mask = (part.to(device) for part in _left_padded(prompts, longest, pad))
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad
    )
    with without_generation_config(model), own_positions(model):
        encoded = _encoded_once(model, inputs, mask, len(numbers))
        output = model.generate(
            input_ids=inputs.repeat_interleave(len(numbers), 0),
            attention_mask=mask.repeat_interleave(len(numbers), 0),
            generation_config=config,
            logits_processor=_drawn(prompts, sampling, numbers, length),
            **({} if encoded is None else {"past_key_values": encoded}),
        )
    limits = [limit for limit in most for _ in numbers]
    found = []
    for limit, tokens in zip(limits, output[:, longest:].tolist(), strict=True):
        cut = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokens[: min(cut, limit)])
    return found


def _encoded_once(model: Any, inputs: Tensor, mask: Tensor, times: int) -> Any:
    """What the model keeps of all but the last token of each prompt, so many times each; `None` where it is of no use.

    `generate` alone would encode every prompt as often as it is drawn from.
    """
    if times == 1 or inputs.shape[1] < 2:
        return None
    start = mask[:, :-1]
    options = {"position_ids": position_ids(start), "use_cache": True, "logits_to_keep": 1}
    cache = getattr(model(input_ids=inputs[:, :-1], attention_mask=start, **options), "past_key_values", None)
    if cache is None:
        return None
    try:
        cache.batch_repeat_interleave(times)
    except (AttributeError, NotImplementedError, TypeError):  # a state of another kind
        return None
    return cache


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


def _drawn(
    prompts: Sequence[Sequence[int]], sampling: Sampling | None, numbers: range, length: int
) -> LogitsProcessorList:
    if sampling is None:
        return LogitsProcessorList()
    cut = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    levels = np.concatenate([_levels(prompt, sampling.seed, numbers, length) for prompt in prompts])
    return LogitsProcessorList([_Temperature(sampling.temperature), *cut, _Draw(torch.from_numpy(levels))])


def _levels(prompt: Sequence[int], seed: Any, numbers: range, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that decide on the tokens of these draws, float32 `[len(numbers), length]`."""
    made = []
    for number in numbers:
        digest = hashlib.sha256(f"{seed}|{number}|{list(prompt)}".encode()).digest()
        made.append(np.random.default_rng(int.from_bytes(digest[:16], "big")).random(length, dtype=np.float32))
    return np.stack(made)


class _Temperature(LogitsProcessor):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperature


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from its distribution: the first at which the sum of the probabilities so far
    exceeds a uniform number (inverse transform sampling).

    Args:
        levels: the uniform numbers, `[rows, steps]`; each step takes one, so that a row depends on no other.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.step = levels, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.levels = self.levels.to(scores.device, scores.dtype)  # once
        level = self.levels[:, self.step, None]
        self.step += 1
        sums = scores.softmax(-1).cumsum(-1)
        total = sums[:, -1:]
        below = torch.minimum(level * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(sums, below, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
