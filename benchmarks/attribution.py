"""Cost of edge attribution as a multiple of the model's own forward and backward passes, alternated in one run.

    python benchmarks/attribution.py --output benchmarks/results/attribution.json
    python benchmarks/attribution.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2.json

The floor is a forward-plus-backward pass of the same batch, parameters frozen (only activations need gradients),
vocabulary projection on answer positions only. `ratio_m` divides by as many of them as the method has points (1 for
EAP, m for EAP-IG), `ratio_m_plus_1` by one more, the clean pass that the usual implementations need.
Memory is the process's peak above the loaded model, each in a process of its own, beside one AdamW training step.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cud_trainer.circuits import edge_attributions
from cud_trainer.logprobs import score_answers
from cud_trainer.models.fingerprint import versions


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    if not args.model:
        return make(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens))
    labels = tokens.clone()
    labels[:, : args.tokens // 2] = -100
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def make(args: argparse.Namespace) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """A random Llama with grouped-query attention and a batch whose second half of tokens is the answer."""
    torch.manual_seed(0)
    heads = args.hidden_size // 64
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.tokens))
    labels = tokens.clone()
    labels[:, : args.tokens // 2] = -100
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def bare(model: torch.nn.Module, batch: dict[str, torch.Tensor], points: int) -> None:
    """The passes that no attribution can do without."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    for _ in range(points):
        inputs = embeddings.detach().requires_grad_()
        torch.autograd.grad(score_answers(model, batch, inputs_embeds=inputs).mean_logps.exp().sum(), inputs)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown processor"


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {processor()}"


def timed(function, *arguments, **options) -> float:
    start = time.process_time()
    function(*arguments, **options)
    return time.process_time() - start


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch).loss.backward()
    optimizer.step()


def peak_bytes(args: argparse.Namespace, what: str) -> int:
    """Peak memory of `what` above the loaded model, in a process of its own."""
    child = [sys.executable, __file__, "--peak_of", what]
    for name in ("model", "layers", "hidden_size", "vocabulary", "batch", "tokens"):
        if getattr(args, name) is not None:
            child += [f"--{name}", str(getattr(args, name))]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    model, batch = load(args)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    if args.peak_of == "training":
        training_step(model, batch)
    else:
        edge_attributions(model, batch, method=args.peak_of)
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(args: argparse.Namespace) -> list[dict]:
    model, batch = load(args)
    training = peak_bytes(args, "training")
    rows = []
    for method, points in (("eap", 1), ("eap-ig", 5)):
        edge_attributions(model, batch, method=method, steps=points)
        pairs = [
            (timed(edge_attributions, model, batch, method=method, steps=points), timed(bare, model, batch, points))
            for _ in range(args.repeats)
        ]
        ratios = sorted(ours / floor for ours, floor in pairs)
        ratio = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
        rows.append(
            {
                "tokens": args.tokens,
                "method": method,
                "points": points,
                "seconds_per_sample": statistics.median(ours for ours, _ in pairs) / args.batch,
                "floor_seconds_per_sample": statistics.median(floor for _, floor in pairs) / args.batch,
                "ratio_m": ratio,
                "ratio_m_plus_1": {name: value * points / (points + 1) for name, value in ratio.items()},
                "peak_over_training_step": peak_bytes(args, method) / training,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model; by default a random Llama of the size below")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds of one thread: other work on the machine disturbs them least
    if args.peak_of:
        args.tokens = args.tokens[0]
        print_peak(args)
        return
    rows = [row for tokens in args.tokens for row in measure(argparse.Namespace(**{**vars(args), "tokens": tokens}))]
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "peak_of")}
        settings["model"] = None if args.model is None else Path(args.model).name
        result = {
            "settings": settings,
            "machine": machine(),
            "threads": 1,
            "versions": versions(),
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
