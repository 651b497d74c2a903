"""What evaluating costs beside the passes it cannot do without, as ratios in one run.

    python benchmarks/evaluate.py --output benchmarks/results/evaluate.json

The floor: one bare teacher-forced forward pass over the samples (log-probabilities of the answer tokens) and one bare
greedy generation, both in batches of similar length. CPU time; alternated, `--repeats` times; median, lowest, highest.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cud_trainer.data import IGNORE_INDEX, prepare_samples
from cud_trainer.files import write_json
from evaluation.metrics.memorization import evaluate_memorization
from evaluation.testbed import build_testbed, train_tokenizer

BATCH = 16


@torch.no_grad()
def bare_pass(model, prepared, batch_size=BATCH) -> None:
    for _, batch in prepared.batches(batch_size, device=model.device):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(1)


@torch.no_grad()
def bare_generation(model, prepared, pad, eos, batch_size=BATCH) -> None:
    samples = []
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        samples.append((len(tokens) - start + 16, tokens[:start]))
    written(model, sorted(samples, key=lambda sample: sample[0]), pad, eos, batch_size)


@torch.no_grad()
def written(model, samples, pad, eos, batch_size=BATCH) -> None:
    """Bare greedy generation from (limit, prompt), as they come; a batch goes to its longest limit."""
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        longest = max(len(prompt) for _, prompt in part)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for _, prompt in part])
        mask = (torch.arange(longest) >= torch.tensor([[longest - len(prompt)] for _, prompt in part])).long()
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(size for size, _ in part),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=eos,
        )


def main() -> None:
    from attribution import machine  # the scripts beside this one
    from timing import alternated, said, small_llama, spread

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--output", type=Path, default=Path("evaluate.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_testbed(seed=0)
    tokenizer = train_tokenizer(world.texts())
    model = small_llama(args)
    # The model knows nothing, so that it never ends an answer: both sides generate to the limit.
    prepared = prepare_samples(world.forget, tokenizer)
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.weight[eos] -= 100 * model.lm_head.weight.abs().mean()
    work = {
        "bare pass": lambda: bare_pass(model, prepared),
        "bare generation": lambda: bare_generation(model, prepared, pad, eos),
        "teacher-forced metrics": lambda: evaluate_memorization(
            model, prepared, tokenizer, batch_size=BATCH, generate=False, token_statistics=True
        ),
        "all metrics": lambda: evaluate_memorization(
            model, prepared, tokenizer, batch_size=BATCH, token_statistics=True
        ),
    }
    found = alternated(work, args.repeats)
    floor = found["bare pass"] + found["bare generation"]
    table = []
    for name, base, values in (
        ("teacher-forced metrics", "bare pass", found["teacher-forced metrics"] / found["bare pass"]),
        ("all metrics", "bare pass and generation", found["all metrics"] / floor),
    ):
        table.append({"what": name, "against": base, **spread(values)})
        print(f"{name}: {said(table[-1])} of {base}")
    result = {
        "command": "python benchmarks/evaluate.py",
        "samples": len(prepared),
        "batch": BATCH,
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "table": table,
        "seconds": {name: float(np.median(values)) for name, values in found.items()},
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
