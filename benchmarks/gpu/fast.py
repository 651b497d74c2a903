"""Part `fast`: time and peak memory of attribution, a training step, its logits, evaluation, over what none can avoid.

Attribution: random tokens, the second half of which is the answer; weights in bfloat16. `ratio` is over as many bare
forward and backward passes of the same batch (parameters frozen, answer positions through the vocabulary) as the
method has points: 1 (EAP), m (EAP-IG), (1 + 2 layers) m (exact node-wise interpolation, done literally). Exact
interpolation has m = 5 where that fits into `FIGURE_S`, else m = 2 (with m = 1 it is EAP).
"""

from __future__ import annotations

import itertools
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.attribution import bare
from benchmarks.evaluate import bare_generation, bare_pass
from cud_trainer.circuits import edge_attributions
from cud_trainer.models.engines import check_paged, paged
from cud_trainer.models.generation import written_by
from evaluation.metrics.memorization import evaluate_memorization, generate_answers

from .clock import Work, compare, peak_gib, ratio, seconds
from .record import Record
from .setting import Setting, random_batch
from .steps import logits, training

BUDGET_S = 410.0
FIGURE_S = 8.0  # of one exact attribution at most
METHODS = {"eap": 1, "eap-ig": 5, "exact": 5}
MODELS = ("llama-1b", "smollm2", "llama-8b")


def attribution(setting: Setting, model: str, tokens: int, method: str, batch: int) -> dict[str, Any]:
    """Seconds per sample, peak memory above the weights, and both of the bare passes."""
    network = setting.model(model)
    device = setting.device
    sample = random_batch(network.config.vocab_size, batch, tokens, device)  # type: ignore[arg-type,union-attr]
    floor: Work = partial(bare, network, sample, 1)
    floor_peak = peak_gib(floor, device)
    one_pass = statistics.median(compare({"bare": floor}, device, 3)["bare"])
    steps, points, repeats = METHODS[method], METHODS[method], 5
    name = method
    if method == "exact":
        nodes = 1 + 2 * network.config.num_hidden_layers  # type: ignore[operator,union-attr]
        steps = next((m for m in (5, 2) if nodes * m * one_pass <= FIGURE_S), 0)
        points, name, repeats = nodes * steps, "ig-activations", 1
        if not steps:
            return {"skipped": f"{2 * nodes} passes of {one_pass:.3g} s", "bare_s": one_pass}
    work: Work = partial(edge_attributions, network, sample, method=name, steps=steps)
    found: dict[str, Any] = {
        "batch": batch,
        "tokens": tokens,
        "m": steps,
        "weights_gib": gib_of(network),
        "bare_peak_gib": floor_peak,
        "peak_gib": peak_gib(work, device),
    }
    if method == "exact":
        ours, base = [seconds(work, device) for _ in range(repeats)], [one_pass * points] * repeats
    else:
        times = compare({"ours": work, "bare": partial(bare, network, sample, points)}, device, repeats)
        ours, base = times["ours"], times["bare"]
    return {
        **found,
        "seconds_per_sample": statistics.median(ours) / batch,
        "bare_seconds_per_sample": statistics.median(base) / points / batch,
        "passes": points,
        "ratio": ratio(ours, base),
    }


def gib_of(model: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30


def evaluation(setting: Setting) -> dict[str, Any]:
    """All metrics of `cud evaluate` on the forget set over one bare pass and one bare greedy generation."""
    device, size = setting.device, 8 if setting.tiny else 64
    model, tokenizer = setting.model("smollm2"), setting.tokenizer
    prepared = setting.prepared(setting.samples.forget.select(range(size)))
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)  # type: ignore[arg-type]

    def floor() -> None:
        bare_pass(model, prepared, size)
        bare_generation(model, prepared, pad, eos, size)

    def ours() -> None:
        evaluate_memorization(model, prepared, tokenizer, batch_size=size, token_statistics=True)

    def teacher_forced() -> None:
        evaluate_memorization(model, prepared, tokenizer, batch_size=size, token_statistics=True, generate=False)

    peaks = {"bare_peak_gib": peak_gib(floor, device), "peak_gib": peak_gib(ours, device)}
    times = compare({"ours": ours, "bare": floor}, device, 2)
    forced = compare({"ours": teacher_forced, "bare": lambda: bare_pass(model, prepared, size)}, device, 3)
    return {
        **peaks,
        "samples": size,
        "seconds": statistics.median(times["ours"]),
        "ratio": ratio(times["ours"], times["bare"]),
        "teacher_forced_ratio": ratio(forced["ours"], forced["bare"]),
    }


def answers(setting: Setting) -> dict[str, Any]:
    """Greedy answers to the forget set by paged attention over those in batches; `same`: share that are alike."""
    device, size = setting.device, 8 if setting.tiny else 64
    model, tokenizer = setting.model("smollm2"), setting.tokenizer
    prepared = setting.prepared(setting.samples.forget.select(range(size)))
    try:
        check_paged(model)
    except ValueError as reason:
        return {"skipped": str(reason)}

    def in_batches() -> list[str]:
        return generate_answers(model, prepared, tokenizer, batch_size=size)

    def by_pages() -> list[str]:
        with written_by(model, paged):
            return in_batches()

    same = [one == other for one, other in zip(in_batches(), by_pages(), strict=True)]
    times = compare({"paged": by_pages, "batches": in_batches}, device, 2)
    return {
        "samples": size,
        "same": sum(same) / size,
        "seconds": statistics.median(times["paged"]),
        "ratio": ratio(times["paged"], times["batches"]),
    }


def attributions(record: Record, setting: Setting, models: tuple[str, ...], methods: tuple[str, ...]) -> None:
    """Every size; batches above one that ran out of memory are not tried."""
    batches, lengths = ((1, 2), (12,)) if setting.tiny else ((1, 2, 4, 8, 16, 32), (48, 128))
    for model, tokens, method in itertools.product(models, lengths, methods):
        full = None
        for batch in batches:
            key = f"attribution {model} {tokens} tokens {method} batch {batch}"
            if full is not None and not record.done(key):
                record.keep(key, {"skipped": f"batch {full} ran out of memory"})
                continue
            figure = record.figure(key, partial(attribution, setting, model, tokens, method, batch))
            if figure is not None and "out_of_memory" in figure:
                full = batch


def run(record: Record, setting: Setting) -> None:
    """What is asked for most comes first, 1B before 8B before SmolLM2; exact interpolation, the dear one, is last."""
    cheap = ("eap", "eap-ig")
    attributions(record, setting, ("llama-1b",), cheap)
    record.figure("step llama-1b full", partial(training, setting, "llama-1b", lora=False))
    record.figure("logits llama-1b", partial(logits, setting, "llama-1b"))
    attributions(record, setting, ("llama-8b",), cheap)
    record.figure("step llama-8b lora", partial(training, setting, "llama-8b", lora=True))
    attributions(record, setting, ("smollm2",), cheap)
    record.figure("evaluate smollm2", partial(evaluation, setting))
    record.figure("answers smollm2", partial(answers, setting))
    attributions(record, setting, MODELS, ("exact",))
    setting.forget_models()


def table(figures: dict[str, Any]) -> list[str]:
    lines = ["fast: attribution, milliseconds per sample (x bare passes; peak above the weights, GiB) by batch"]
    rows: dict[str, list[str]] = {}
    for key, found in figures.items():
        if not key.startswith("attribution"):
            continue
        name, batch = key.removeprefix("attribution ").rsplit(" batch ", 1)
        cell = "out of memory" if "out_of_memory" in found else "-"
        if "ratio" in found:
            peak = "" if found["peak_gib"] is None else f"; {found['peak_gib']:.1f}"
            cell = f"{1e3 * found['seconds_per_sample']:.1f} ({found['ratio']['median']:.2f}{peak})"
        rows.setdefault(name, []).append(f"{batch}: {cell}")
    lines += [f"  {name}: {', '.join(cells)}" for name, cells in rows.items()]
    for key, found in figures.items():
        if key.startswith("step ") and "variants" in found:
            for name, row in found["variants"].items():
                peak = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB"
                shown = f"{row['seconds']:.3f} s, x{row['ratio']['median']:.3f} of bare"
                lines.append(f"  {key}, {name}: {shown}, {row['tokens_per_second']:.0f} tokens/s{peak}")
        elif key.startswith("logits ") and "nll" in found:
            for name in ("nll", "kl"):
                row = found[name]
                peaks = [f"{peak:.1f}" for peak in row["peak_gib"].values() if peak is not None]
                peak = f", peak {' -> '.join(peaks)} GiB" if peaks else ""
                lines.append(f"  {key}, {name}: some at a time x{row['ratio']['median']:.3f} of all at once{peak}")
        elif key.startswith("evaluate") and "ratio" in found:
            shown = f"x{found['ratio']['median']:.3f} of bare pass and generation"
            lines.append(f"  {key}: {shown}, teacher-forced x{found['teacher_forced_ratio']['median']:.3f}")
        elif key.startswith("answers") and "ratio" in found:
            lines.append(f"  {key}: paged x{found['ratio']['median']:.3f} of batches, {found['same']:.0%} the same")
    return lines
