"""Text that a model writes: by nothing but its weights, the end tokens, and the options given here.

Models bring a generation config with penalties, sampling options and lengths along. An audit must not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.timeout import apply_chat_template
from .layers import base_causal_lm, embedding_device
from .memory import free_memory, out_of_memory
from .modes import evaluation_mode
from .positions import own_positions, position_ids, positions_of
from .sampling import Sampling, drawing

logger = logging.get_logger(__name__)
MARK = "answer"
# Sequences that are drawn at a time, by prompts of a batch: a step of generation takes one position of each.
DRAWN_AT_ONCE = 16
# Answers of an engine that are held against the model, and by how many nats a token may be less probable there than the
# most probable one: rounding.
CHECKED = 4
SLACK = {torch.float64: 1e-3, torch.float32: 0.05}
SLACK_IN_HALF_PRECISION = 1.0


@dataclass(frozen=True)
class Asked:
    """What an engine is to write.

    Attributes:
        prompts: tokens, `[N]` lists of at least one.
        limits: tokens to write at most, `[N]`; nothing is written for a 0.
        stop: tokens that end an answer.
        pad: fills shorter prompts of a batch.
        batch_size: prompts at a time, for an engine that has batches.
        sampling: draw; `None`: take the most probable token.
        progress: whether anybody wants to see how far it is; on stderr.
    """

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    stop: list[int]
    pad: int
    batch_size: int
    sampling: Sampling | None = None
    progress: bool = False

    @property
    def draws(self) -> int:
        return 1 if self.sampling is None else self.sampling.draws


# Writes what is asked for: of draw d of prompt n its place, n x draws + d, and its tokens, in whatever order they come.
# It may write a stop token and go on behind it. The others are in `engines`.
Engine = Callable[[Any, Asked], Iterable[tuple[int, Sequence[int]]]]
_writing: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()


@contextmanager
def written_by(model: Any, engine: Engine) -> Iterator[None]:
    """Inside, this engine writes whatever `continuations` is asked for of this model, by whomever."""
    base = base_causal_lm(model)
    before = _writing.get(base)
    _writing[base] = engine
    try:
        yield
    finally:
        if before is None:
            del _writing[base]
        else:
            _writing[base] = before


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
    which others share its batch. The draws of a prompt follow each other. An engine in place of `in_batches` writes it
    inside `written_by`: what that writes greedily is held against the model.

    Args:
        prompts: tokens, `[N]` lists of at least one.
        limits: tokens to write at most, `[N]`.
        stop: tokens that end an answer (`stop_tokens`).
        pad: fills shorter prompts of a batch.
        batch_size: prompts at a time; of several draws each, at most `DRAWN_AT_ONCE` times as many sequences.
        sampling: draw instead.
        desc: label of a progress bar, which shows tokens per second; `None` shows none.

    Raises:
        ValueError: for an engine that leaves a prompt out, or writes what the model would not.
    """
    most = [max(0, min(limit, _room(model, len(prompt)))) for limit, prompt in zip(limits, prompts, strict=True)]
    asked = Asked(prompts, most, list(stop), pad, batch_size, sampling, progress=desc is not None)
    written: dict[int, list[int]] = {}
    engine = _writing.get(base_causal_lm(model), in_batches)
    total, tokens = sum(limit > 0 for limit in most) * asked.draws, 0
    with (
        evaluation_mode(model),
        tqdm(total=total, desc=desc, disable=desc is None, unit="answer", leave=False) as bar,
    ):
        for place, found in engine(model, asked) if total else ():
            limit = most[place // asked.draws]
            end = next((at for at, token in enumerate(found) if token in asked.stop), len(found))
            written[place] = list(found[: min(end, limit)])
            tokens += len(written[place])
            if desc is not None:
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            bar.update()
        if len(written) < total:
            raise ValueError(f"the engine has written {len(written)} of {total} answers")
        if engine is not in_batches and sampling is None and written:
            _check_written(model, asked, written)
    return [written.get(place, []) for place in range(len(prompts) * asked.draws)]


def _check_written(model: Any, asked: Asked, written: Mapping[int, list[int]]) -> None:
    """Raise `ValueError` unless some of the answers are, token by token, the most probable ones of the model itself.

    So that no engine can write with other weights, other positions or other attention than the model that is measured.
    """
    slack = SLACK.get(base_causal_lm(model).dtype, SLACK_IN_HALF_PRECISION)
    shortest = sorted(written, key=lambda row: (len(asked.prompts[row]) + len(written[row]), row))
    for row in shortest[:: -(-len(shortest) // CHECKED)]:
        prompt, found = list(asked.prompts[row]), written[row]
        tokens = torch.tensor([prompt + found], device=embedding_device(model))
        with own_positions(model):
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 :].float()
        best, chosen = logits.amax(-1), [logits[at, token] for at, token in enumerate(found)]
        if len(found) < asked.limits[row]:  # there it came to an end
            chosen.append(logits[len(found), asked.stop].max() if asked.stop else best.new_tensor(-torch.inf))
        gaps = [float(most - own) for most, own in zip(best, chosen, strict=False)]
        short = max((gap for gap in gaps if gap == gap), default=0.0)  # a model that diverged says nothing
        if short > slack:
            raise ValueError(
                f"the engine writes what the model would not: in one of {CHECKED} answers a token is {short:.3g} nats "
                "less probable than the model's own"
            )


def in_batches(model: Any, asked: Asked) -> Iterator[tuple[int, list[int]]]:
    """transformers' `generate`, prompts of similar length together, those that take most memory first.

    A prompt is encoded once for all its draws (`num_return_sequences` would do it for each).
    """
    at_once = max(1, min(asked.draws, DRAWN_AT_ONCE * asked.batch_size))
    batch_size = max(1, min(asked.batch_size, DRAWN_AT_ONCE * asked.batch_size // at_once))
    room = [_room(model, len(prompt)) for prompt in asked.prompts]
    for rows in _batches(asked.prompts, asked.limits, room, batch_size):
        for first in range(0, asked.draws, at_once):
            numbers = range(first, min(first + at_once, asked.draws))
            places = [row * asked.draws + number for row in rows for number in numbers]
            yield from zip(places, _halving(model, asked, rows, numbers), strict=True)


def _halving(model: Any, asked: Asked, rows: Sequence[int], numbers: range) -> list[list[int]]:
    """`_written`, in halves when that does not fit into memory: of the prompts, or of the draws of a single one."""
    try:
        return _written(model, asked, rows, numbers)
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(rows) == len(numbers) == 1:
            tokens = len(asked.prompts[rows[0]]) + asked.limits[rows[0]]
            raise ValueError(
                f"an answer does not fit into memory by itself ({tokens} tokens with its prompt): {error}"
            ) from None
    free_memory()
    logger.warning_once("out of memory: batches of answers are halved; a smaller batch_size saves the failed attempts")
    half = len(rows) // 2
    if half:
        return [one for part in (rows[:half], rows[half:]) for one in _halving(model, asked, part, numbers)]
    half = len(numbers) // 2
    return [one for part in (numbers[:half], numbers[half:]) for one in _halving(model, asked, rows, part)]


def _written(model: Any, asked: Asked, rows: Sequence[int], numbers: range) -> list[list[int]]:
    """Continuations of one batch, those with these `numbers` of a prompt in a row."""
    prompts, length = [asked.prompts[row] for row in rows], max(asked.limits[row] for row in rows)
    longest, device = max(len(prompt) for prompt in prompts), embedding_device(model)
    inputs, mask = (part.to(device) for part in _left_padded(prompts, longest, asked.pad))
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        eos_token_id=asked.stop or None,
        pad_token_id=asked.pad,
    )
    with without_generation_config(model), own_positions(model):
        encoded = _encoded_once(model, inputs, mask, len(numbers))
        output = model.generate(
            input_ids=inputs.repeat_interleave(len(numbers), 0),
            attention_mask=mask.repeat_interleave(len(numbers), 0),
            generation_config=config,
            logits_processor=drawing(prompts, asked.sampling, numbers, length),
            **({} if encoded is None else {"past_key_values": encoded}),
        )
    return output[:, longest:].tolist()


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
) -> list[list[int]]:
    """Rows of similar length together, none of which runs out of positions before its batch is done.

    The batch that takes the most memory comes first: whether all fit shows at once.
    """
    batches: list[list[int]] = []
    rows = [row for row in range(len(prompts)) if most[row]]
    for row in sorted(rows, key=lambda row: (-most[row], -len(prompts[row]), row)):
        if not batches or len(batches[-1]) == batch_size or most[batches[-1][0]] > room[row]:
            batches.append([])
        batches[-1].append(row)

    def positions(batch: list[int]) -> int:
        return len(batch) * (max(len(prompts[row]) for row in batch) + most[batch[0]])

    return sorted(batches, key=positions, reverse=True)


def _left_padded(prompts: Sequence[Sequence[int]], longest: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `[B, longest]`."""
    inputs = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):
        inputs[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return inputs, mask
