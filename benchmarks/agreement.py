"""How well one-pass EAP, RelP and EAP-IG agree with node-wise interpolation (`ig-activations`), and what each costs.

    python benchmarks/agreement.py --model tofu-run/memorised --dataset locuslab/TOFU --configs forget01 retain90 \
        --samples 50 --output benchmarks/results/agreement.json

Zero baseline, metric `prob`. Per sample: Pearson correlation of the edge scores, Spearman correlation of their absolute
values, overlap of the 200 and 1000 strongest edges. Over samples: Spearman correlation of what difficulty is made of,
the circuit mass and CUD (log-magnitude, and the 200 strongest edges by cosine as in `cud_top_k`; anchors: the quarters
of lowest and highest initial log-probability outside the sample's fold).
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets, load_dataset
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from cud_trainer.circuits import edge_attributions
from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import CUDSettings, cud_scores, make_folds
from cud_trainer.difficulty.cud import extremes, log_standardisation
from cud_trainer.models.fingerprint import versions
from evaluation.statistics import bootstrap_mean

METHODS = {
    "eap": {"method": "eap"},
    "eap-ig, 5 steps": {"method": "eap-ig", "steps": 5},
    "relp": {"method": "relp"},
    "ig-activations, 5 steps": {"method": "ig-activations", "steps": 5},
}
EXACT = "ig-activations, 5 steps"


def overlap(a: torch.Tensor, b: torch.Tensor, k: int) -> float:
    return len(set(a.abs().topk(k).indices.tolist()) & set(b.abs().topk(k).indices.tolist())) / k


def difficulty(edges: torch.Tensor, mean_logps: np.ndarray, variant: str) -> np.ndarray:
    settings, fold = CUDSettings(variant), make_folds(len(edges), 5, 0)
    scores = np.zeros(len(edges))
    for held_out in np.unique(fold):
        test, train = np.flatnonzero(fold == held_out), np.flatnonzero(fold != held_out)
        easy, hard = extremes(mean_logps[train], 0.25)
        standardisation = log_standardisation(edges[train]) if settings.vector == "log" else None
        scores[test] = cud_scores(edges[test], edges[train[easy]], edges[train[hard]], settings, standardisation)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configs", nargs="+", default=["forget01", "retain90"])
    parser.add_argument("--samples", type=int, default=50, help="the shortest ones among --pool")
    parser.add_argument("--pool", type=int, default=240, help="samples that are chosen from")
    parser.add_argument("--batch_size", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    parts = [
        load_dataset(args.dataset, name, split="train").select_columns(["question", "answer"]) for name in args.configs
    ]
    pool = concatenate_datasets(parts)
    prepared = prepare_samples(pool.select(range(min(args.pool, len(pool)))), tokenizer)
    order = np.argsort([len(tokens) for tokens in prepared["input_ids"]], kind="stable")
    prepared = prepared.select(order[: args.samples].tolist())
    edges: dict[str, list] = {name: [None] * len(prepared) for name in METHODS}
    mean_logps = np.zeros(len(prepared))
    seconds = dict.fromkeys(METHODS, 0.0)
    for rows, batch in prepared.batches(args.batch_size):
        for name, options in METHODS.items():
            start = time.process_time()
            result = edge_attributions(model, batch, **options)
            seconds[name] += time.process_time() - start
            for row, scores in zip(rows, result.edges, strict=True):
                edges[name][row] = scores
        mean_logps[rows] = result.mean_logps.numpy()
        print(len(rows), {name: round(value, 1) for name, value in seconds.items()}, flush=True)
    stacked = {name: torch.stack(values) for name, values in edges.items()}
    rows_out = []
    for name in METHODS:
        if name == EXACT:
            continue
        pairs = list(zip(stacked[name], stacked[EXACT], strict=True))
        columns = {
            "pearson": [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs],
            "spearman_absolute": [float(spearmanr(a.abs(), b.abs()).statistic) for a, b in pairs],
            "top_200_overlap": [overlap(a, b, 200) for a, b in pairs],
            "top_1000_overlap": [overlap(a, b, 1000) for a, b in pairs],
        }
        row = {"method": name, "against": EXACT}
        for column, values in columns.items():
            row[column] = {**bootstrap_mean(np.array(values), seed=0).as_dict(), "min": min(values), "max": max(values)}
        row["circuit_mass"] = float(spearmanr(stacked[name].abs().sum(1), stacked[EXACT].abs().sum(1)).statistic)
        for variant in ("log", "top_k"):
            ours, exact = (difficulty(stacked[key], mean_logps, variant) for key in (name, EXACT))
            row[f"cud_{variant}"] = float(spearmanr(ours, exact).statistic)
        rows_out.append(row)
        print(json.dumps(row))
    result = {
        "settings": {
            "model": Path(args.model).name,
            "n_samples": len(prepared),
            "tokens": [len(tokens) for tokens in prepared["input_ids"]],
            "batch_size": args.batch_size,
            "mean_answer_probability": float(np.exp(mean_logps).mean()),
        },
        "seconds_per_sample": {name: value / len(prepared) for name, value in seconds.items()},
        "machine": {"processor": platform.machine(), "threads": 1},
        "versions": versions(),
        "rows": rows_out,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
