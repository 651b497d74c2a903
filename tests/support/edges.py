"""Batches of random tokens for edge attribution."""

import torch


def random_samples(seed, lengths=(9, 14, 6), vocabulary=258):
    """Samples of unequal length, answer at the end; the last has a prompt of one token."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(2, vocabulary, (length,), generator=generator)
        prompt = 1 if index == len(lengths) - 1 else length // 2
        samples.append((tokens, prompt))
    return samples


def to_batch(samples, side="right"):
    longest = max(len(tokens) for tokens, _ in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.long),
        "labels": torch.full((len(samples), longest), -100),
    }
    for row, (tokens, prompt) in enumerate(samples):
        start = 0 if side == "right" else longest - len(tokens)
        window = slice(start, start + len(tokens))
        batch["input_ids"][row, window] = tokens
        batch["attention_mask"][row, window] = 1
        batch["labels"][row, start + prompt : start + len(tokens)] = tokens[prompt:]
    return batch
