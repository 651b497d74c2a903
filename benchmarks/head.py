"""What logits a few positions at a time cost and save: CPU time and peak memory of a step's forward and backward pass.

    python benchmarks/head.py --output benchmarks/results/head.json

A small Llama with a vocabulary of 50,304: the head is most of it, so that the ratio of time is about the highest there
is. `logits_bytes` 0 is the floor, all logits at once; median, lowest and highest ratio of the repeats. Memory is what
tensors take at most above the weights, by the profiler.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from attribution import machine
from timing import alternated, said, small_llama, spread
from torch.profiler import ProfilerActivity, profile

from cud_trainer.files import write_json
from cud_trainer.objectives import Reference, UnlearningLoss
from cud_trainer.objectives.reference import TopTokens

VOCABULARY, TOP = 50_304, 128
# Of answers alone, of distributions, and of distributions beside a reference.
LOSSES = (("graddiff", "nll"), ("pdu", "nll"), ("graddiff", "kl"))


def peak_mib(work: Callable[[], None]) -> float:
    """Most memory of tensors at a time above that at the start, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample; the second half is its answer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--mib", type=int, nargs="+", default=[128], help="`logits_bytes`, in MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("head.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = small_llama(args, vocab_size=VOCABULARY).train()
    ids = torch.randint(2, VOCABULARY, (2 * args.pairs, args.tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(args.tokens) < args.tokens // 2, -100)
    index, answer = torch.arange(args.pairs), args.tokens - args.tokens // 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {"forget_index": index, "retain_index": index}
    top = (torch.full((answer, TOP), -6.0), torch.arange(TOP).expand(answer, TOP).int(), torch.zeros(answer))
    reference = Reference(retain_top=TopTokens.empty([answer] * args.pairs))
    for kept, part in zip(
        (reference.retain_top.logps, reference.retain_top.ids, reference.retain_top.rest), top, strict=True
    ):
        kept.keep(range(args.pairs), part.repeat(args.pairs, *[1] * (part.ndim - 1)), [answer] * args.pairs)

    def step(objective: str, retain_loss: str, mib: int) -> None:
        loss = UnlearningLoss(objective, {}, retain_loss, logits_bytes=mib * 2**20)
        terms = loss(model, batch, reference)
        (terms.forget.mean() + terms.retain.mean()).backward()
        model.zero_grad()

    table = []
    for objective, retain_loss in LOSSES:
        work = {str(mib): (lambda o=objective, r=retain_loss, m=mib: step(o, r, m)) for mib in (0, *args.mib)}
        seconds = alternated(work, args.repeats)
        for name, run in work.items():
            ratios = spread(seconds[name] / seconds["0"])
            row = {"objective": objective, "retain_loss": retain_loss, "logits_mib": int(name), **ratios}
            table.append({**row, "peak_mib": peak_mib(run)})
            print(
                f"{objective} + {retain_loss}, {name} MiB: {said(ratios)}, {table[-1]['peak_mib']:.0f} MiB", flush=True
            )
    result = {
        "command": "python benchmarks/head.py",
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(),
        "table": table,
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
