"""Cost of edge attribution as a multiple of the model's own forward and backward passes, alternated in one run.

    python benchmarks/attribution.py --layers 12 --hidden_size 576 --output benchmarks/results/attribution.json

The floor is as many forward-plus-backward passes as the method has points (1 for EAP, m for EAP-IG) on the same batch:
parameters frozen (only activations need gradients), vocabulary projection on answer positions only.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cud_trainer.circuits import edge_attributions
from cud_trainer.fingerprint import versions
from cud_trainer.logprobs import score_answers


def make(args: argparse.Namespace) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """A random Llama with grouped-query attention and a batch whose second half of tokens is the answer."""
    torch.manual_seed(0)
    heads = args.hidden_size // 64
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 3),
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.tokens))
    labels = tokens.clone()
    labels[:, : args.tokens // 2] = -100
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def bare(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], points: int) -> None:
    """The passes that no attribution can do without."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    for _ in range(points):
        inputs = embeddings.detach().requires_grad_()
        torch.autograd.grad(score_answers(model, batch, inputs_embeds=inputs).mean_logps.exp().sum(), inputs)


def timed(function, *arguments, **options) -> float:
    start = time.process_time()
    function(*arguments, **options)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds of one thread: other work on the machine disturbs them least
    model, batch = make(args)
    rows = []
    for method, points in (("eap", 1), ("eap-ig", 5)):
        edge_attributions(model, batch, method=method, steps=points)
        pairs = [
            (timed(edge_attributions, model, batch, method=method, steps=points), timed(bare, model, batch, points))
            for _ in range(args.repeats)
        ]
        ratios = sorted(ours / floor for ours, floor in pairs)
        rows.append(
            {
                "method": method,
                "points": points,
                "seconds_per_sample": statistics.median(ours for ours, _ in pairs) / args.batch,
                "floor_seconds_per_sample": statistics.median(floor for _, floor in pairs) / args.batch,
                "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
            }
        )
        print(json.dumps(rows[-1]))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        result = {
            "settings": settings,
            "machine": platform.machine(),
            "threads": 1,
            "versions": versions(),
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
