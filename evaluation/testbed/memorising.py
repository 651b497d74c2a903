"""Training until every answer of the generated world is known verbatim."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.logprobs import score_answers

from .world import Testbed, shuffled


@dataclass(frozen=True)
class Memorised:
    """What `memorise` did.

    Attributes:
        losses: mean NLL per answer token of each epoch, in training mode, in nats.
        steps: optimizer steps taken.
    """

    losses: list[float]
    steps: int


def memorise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    testbed: Testbed,
    *,
    epochs: int = 20,
    learning_rate: float = 4e-3,
    batch_size: int = 24,
    seed: int = 0,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    progress: bool = True,
) -> Memorised:
    """Train `model` in place on the answers (and their end) of `testbed.train` until it knows them by heart.

    AdamW, linear warm-up and cosine decay to 0, batches of similar length. Reproducible bit for bit for a given
    number of threads.

    Args:
        epochs: passes over `testbed.train` with its repeats, at least 1.
        learning_rate: the highest, after warm-up.
        batch_size: samples per step.
        seed: of the order.
        warmup: share of the steps in which the learning rate rises.
        progress: show a bar.

    Raises:
        ValueError: for a non-positive number of epochs or batch size.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    prepared = prepare_samples(testbed.train, tokenizer, max_length=model.config.max_position_embeddings, name="train")
    samples = [
        {"input_ids": tokens, "labels": labels}
        for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True)
    ]
    occurrences = [index for index, count in enumerate(testbed.train["repeats"]) for _ in range(count)]
    total = epochs * math.ceil(len(occurrences) / batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(total, warmup))
    rng = random.Random(seed)
    losses: list[float] = []
    model.train()
    with tqdm(total=total, desc="memorise", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            summed, tokens = 0.0, 0
            for indices in _epoch_batches(occurrences, [len(s["input_ids"]) for s in samples], batch_size, rng):
                batch = pad_batch([samples[i] for i in indices], tokenizer.pad_token_id)
                scores = score_answers(model, {key: value.to(model.device) for key, value in batch.items()})
                loss = -scores.logps.sum() / scores.lengths.sum()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                summed -= float(scores.logps.detach().sum())
                tokens += int(scores.lengths.sum())
                bar.update()
            losses.append(summed / tokens)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return Memorised(losses, total)


def _warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))

    return factor


def _epoch_batches(
    occurrences: Sequence[int], lengths: Sequence[int], batch_size: int, rng: random.Random, pool: int = 8
) -> Iterator[list[int]]:
    """Random batches of similar length: sorted by length within pools of `pool` batches, then shuffled."""
    order = shuffled(rng, occurrences)
    size = batch_size * pool
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        chunk = sorted(order[start : start + size], key=lambda index: lengths[index])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    yield from shuffled(rng, batches)
