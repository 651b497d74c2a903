"""What leak@k costs beside bare batched sampling, as a ratio in one run.

    python benchmarks/leak.py --output benchmarks/results/leak.json

Bare: `generate(do_sample=True, num_return_sequences=n)` in batches of similar length, nothing else. Ours: the same many
answers, drawn by seed whatever the batch, decoded, and compared with the true ones by ROUGE-L recall and verbatim span.
CPU time, one thread; alternated, `--repeats` times; median, lowest, highest.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cud_trainer.data import IGNORE_INDEX, prepare_samples
from cud_trainer.files import write_json
from evaluation.metrics.leak import LeakRule, sampled_leaks
from evaluation.testbed import build_testbed, train_tokenizer

BATCH = 8
EXTRA = 16  # tokens beyond the true answer, as in `generate_answers`


@torch.no_grad()
def bare_sampling(model, prepared, pad, eos, n) -> None:
    samples = []
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        samples.append((len(tokens) - start, tokens[:start]))
    samples.sort(key=lambda sample: sample[0])
    for first in range(0, len(samples), BATCH):
        part = samples[first : first + BATCH]
        longest = max(len(prompt) for _, prompt in part)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for _, prompt in part])
        mask = (torch.arange(longest) >= torch.tensor([[longest - len(prompt)] for _, prompt in part])).long()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(size for size, _ in part) + EXTRA,
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            pad_token_id=pad,
            eos_token_id=eos,
        )


def main() -> None:
    from attribution import machine  # the scripts beside this one
    from timing import alternated, said, small_llama, spread

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--answers", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("leak.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_testbed(seed=0)
    tokenizer = train_tokenizer(world.texts())
    model = small_llama(args, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    prepared = prepare_samples(world.forget, tokenizer).select(range(args.samples))
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0  # no tokens that the tokenizer does not know
        model.lm_head.weight[eos] = 0  # a model that knows nothing hardly ever ends an answer: both go to the limit
    table = []
    for n in args.answers:
        work = {
            "bare": lambda n=n: bare_sampling(model, prepared, pad, eos, n),
            "leak@k": lambda n=n: sampled_leaks(model, prepared, tokenizer, LeakRule(n), batch_size=BATCH),
        }
        seconds = alternated(work, args.repeats)
        table.append({"answers": n, **spread(seconds["leak@k"] / seconds["bare"])})
        table[-1]["seconds"] = {name: float(np.median(values)) for name, values in seconds.items()}
        print(f"{n} answers: {said(table[-1])} of bare sampling")
    result = {
        "command": "python benchmarks/leak.py",
        "samples": len(prepared),
        "batch": BATCH,
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "table": table,
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
