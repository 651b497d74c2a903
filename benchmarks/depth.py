"""What the unlearning depth score costs beside the forward passes that it is made of, as a ratio in one run.

    python benchmarks/depth.py --output benchmarks/results/depth.json

The floor is what UDS needs by its definition, `2 L + 3` bare passes of every batch for L layers: one of each model, and
two of the original for every layer. Each bare pass is a plain call of the model, with logits where the answer is
predicted, with no state put in. CPU time; alternated, `--repeats` times; median, lowest, highest.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
    from attribution import machine  # the script beside this one

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
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    original, reference, unlearned = models
    prepared = prepare_samples(world.forget, tokenizer)
    prepared = prepared.select(range(min(args.samples, len(prepared)))).measured

    def score() -> None:
        drops = [layer_drops(original, one, prepared, batch_size=args.batch_size) for one in (reference, unlearned)]
        unlearning_depth(*drops)

    passes = 2 * args.layers + 3
    work = {"bare passes": lambda: bare_passes(original, prepared, passes, args.batch_size), "UDS": score}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(args.repeats + 1):
        for name in list(work)[:: 1 if repeat % 2 else -1]:
            start = time.process_time()
            work[name]()
            if repeat:  # the first warms up
                seconds[name].append(time.process_time() - start)
    found = {name: np.array(values) for name, values in seconds.items()}
    low, middle, high = np.percentile(found["UDS"] / found["bare passes"], [0, 50, 100])
    print(f"UDS: {middle:.3f} ({low:.3f}-{high:.3f}) of {passes} bare passes")
    result = {
        "command": "python benchmarks/depth.py",
        "samples": len(prepared),
        "batch": args.batch_size,
        "layers": args.layers,
        "passes": passes,
        "machine": machine(),
        "parameters": sum(p.numel() for p in original.parameters()),
        "table": [{"what": "UDS", "against": f"{passes} bare passes", "ratio": middle, "lowest": low, "highest": high}],
        "seconds": {name: float(np.median(values)) for name, values in found.items()},
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
