"""What the unlearning depth score costs beside the forward passes that it is made of, as a ratio in one run.

    python benchmarks/depth.py --output benchmarks/results/depth.json

The floor is what UDS needs by its definition, `2 L + 3` bare passes of every batch for L layers: one of each model, and
two of the original for every layer. Each bare pass is a plain call of the model, with logits where the answer is
predicted, with no state put in. CPU time; alternated, `--repeats` times; median, lowest, highest.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cud_trainer.data import IGNORE_INDEX, prepare_samples
from cud_trainer.files import write_json
from evaluation.metrics.depth import layer_drops, unlearning_depth
from evaluation.testbed import build_testbed, train_tokenizer


@torch.no_grad()
def bare_passes(model, prepared, times, batch_size) -> None:
    for _, batch in prepared.batches(batch_size, device=model.device):
        places = (batch["labels"][:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(-1)
        labels = batch["labels"][:, 1:][:, places]
        for _ in range(times):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=places,
                use_cache=False,
            ).logits
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
            )


def main() -> None:
    from attribution import machine  # the scripts beside this one
    from timing import alternated, said, small_llama, spread

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("depth.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_testbed(seed=0)
    tokenizer = train_tokenizer(world.texts())
    models = [small_llama(args, seed, vocab_size=args.vocabulary) for seed in range(3)]
    original, reference, unlearned = models
    prepared = prepare_samples(world.forget, tokenizer)
    prepared = prepared.select(range(min(args.samples, len(prepared)))).measured

    def score() -> None:
        drops = [layer_drops(original, one, prepared, batch_size=args.batch_size) for one in (reference, unlearned)]
        unlearning_depth(*drops)

    passes = 2 * args.layers + 3
    work = {"bare passes": lambda: bare_passes(original, prepared, passes, args.batch_size), "UDS": score}
    found = alternated(work, args.repeats)
    cost = spread(found["UDS"] / found["bare passes"])
    print(f"UDS: {said(cost)} of {passes} bare passes")
    result = {
        "command": "python benchmarks/depth.py",
        "samples": len(prepared),
        "batch": args.batch_size,
        "layers": args.layers,
        "passes": passes,
        "machine": machine(),
        "parameters": sum(p.numel() for p in original.parameters()),
        "table": [{"what": "UDS", "against": f"{passes} bare passes", **cost}],
        "seconds": {name: float(np.median(values)) for name, values in found.items()},
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
