"""What evaluating costs beside the passes it cannot do without, as ratios in one run.

    python benchmarks/evaluate.py --output benchmarks/results/evaluate.json

The floor: one bare teacher-forced forward pass over the samples (log-probabilities of the answer tokens) and one bare
greedy generation, both in batches of similar length. CPU time; alternated, `--repeats` times; median, lowest, highest.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
        samples.append((len(tokens) - start, tokens[:start]))
    samples.sort(key=lambda sample: sample[0])
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        longest = max(len(prompt) for _, prompt in part)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for _, prompt in part])
        mask = (torch.arange(longest) >= torch.tensor([[longest - len(prompt)] for _, prompt in part])).long()
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(size for size, _ in part) + 16,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=eos,
        )


def main() -> None:
    from attribution import machine  # the script beside this one

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--output", type=Path, default=Path("evaluate.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_testbed(seed=0)
    tokenizer = train_tokenizer(world.texts())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
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
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(args.repeats + 1):
        for name in list(work)[:: 1 if repeat % 2 else -1]:
            start = time.process_time()
            work[name]()
            if repeat:  # the first warms up
                seconds[name].append(time.process_time() - start)
    found = {name: np.array(values) for name, values in seconds.items()}
    floor = found["bare pass"] + found["bare generation"]
    table = []
    for name, base, values in (
        ("teacher-forced metrics", "bare pass", found["teacher-forced metrics"] / found["bare pass"]),
        ("all metrics", "bare pass and generation", found["all metrics"] / floor),
    ):
        low, middle, high = np.percentile(values, [0, 50, 100])
        table.append({"what": name, "against": base, "ratio": middle, "lowest": low, "highest": high})
        print(f"{name}: {middle:.3f} ({low:.3f}-{high:.3f}) of {base}")
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
