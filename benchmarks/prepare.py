"""What `prepare_dataset` costs beside one row at a time, as ratios in one run.

    python benchmarks/prepare.py --output benchmarks/results/prepare.json

Beside it: the same tokens and ids, every string given to the tokenizer by itself and every column a list; the
fingerprint and the check for overlap on lists, too. Wall-clock time, because tokenizers use all cores for a batch, and
CPU time of the process; alternated, `--repeats` times; median, lowest, highest. Both sides must agree. The floor is the
tokenizer alone: the same texts, all in lists, every one once.
"""

import argparse
import hashlib
import time
from functools import partial
from pathlib import Path

import numpy as np
from attribution import machine
from datasets import Dataset

from cud_trainer.data import IGNORE_INDEX, Samples, check_disjoint, content_id, dataset_fingerprint, prepare_dataset
from cud_trainer.files import write_json
from evaluation.testbed import build_testbed, train_tokenizer

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def row_by_row(dataset: Dataset, tokenizer) -> Dataset:
    """Questions and answers, prepared one at a time."""
    columns: dict[str, list] = {"sample_id": [], "input_ids": [], "labels": []}
    for row in dataset:
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": row["question"]}]
            both = [*asked, {"role": "assistant", "content": row["answer"]}]
            start = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
            tokens = list(tokenizer.apply_chat_template(both)["input_ids"])
        else:
            prompt = f"Question: {row['question']}\nAnswer:"
            start = list(tokenizer(prompt)["input_ids"])
            tokens = [*tokenizer(f"{prompt} {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        shared = 0
        while shared < min(len(start), len(tokens)) and start[shared] == tokens[shared]:
            shared += 1
        columns["sample_id"].append(content_id(tokens, shared))
        columns["input_ids"].append(tokens)
        columns["labels"].append([IGNORE_INDEX] * shared + tokens[shared:])
    return Dataset.from_dict(columns)


def bare(dataset: Dataset, tokenizer) -> None:
    """The tokenizer alone, on texts as long as those of `row_by_row`; no template, no prompts, no columns."""
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in dataset]
    for start in range(0, len(texts), 1000):
        tokenizer(texts[start : start + 1000], return_attention_mask=False, return_token_type_ids=False)


def listed_fingerprint(prepared: Dataset) -> str:
    digest = hashlib.sha256()
    for sample_id, tokens, labels in zip(prepared["sample_id"], prepared["input_ids"], prepared["labels"], strict=True):
        digest.update(f"{sample_id}|{list(tokens)}|{list(labels)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def listed_overlap(forget: Dataset, retain: Dataset) -> None:
    ids, contents = set(retain["sample_id"]), {tuple(tokens) for tokens in retain["input_ids"]}
    for sample_id, tokens in zip(forget["sample_id"], forget["input_ids"], strict=True):
        assert sample_id not in ids and tuple(tokens) not in contents


def timed(work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "prepare.json")
    args = parser.parse_args()
    world = build_testbed(seed=0)
    plain, chat = train_tokenizer(world.texts()), train_tokenizer(world.texts())
    chat.chat_template = CHAT
    # The questions of the generated authors again and again, each with a number that makes it another sample.
    pool = world.train
    rows = [pool[number % len(pool)] for number in range(args.rows)]
    data = Dataset.from_list(
        [{"question": row["question"], "answer": f"{row['answer']} {number}"} for number, row in enumerate(rows)]
    )
    few = data.select(range(min(1000, len(data))))
    for tokenizer in (plain, chat):
        assert (
            prepare_dataset(few, tokenizer).select_columns(["sample_id", "input_ids", "labels"]).to_dict()
            == row_by_row(few, tokenizer).to_dict()
        )
    prepared = prepare_dataset(data, plain)
    assert dataset_fingerprint(prepared) == listed_fingerprint(prepared)
    halves = [prepared.select(range(half, args.rows, 2)) for half in (0, 1)]
    work = {
        "question and answer": (lambda: row_by_row(data, plain), lambda: prepare_dataset(data, plain)),
        "through a chat template": (lambda: row_by_row(data, chat), lambda: prepare_dataset(data, chat)),
        "fingerprint": (lambda: listed_fingerprint(prepared), lambda: dataset_fingerprint(prepared)),
        "overlap": (lambda: listed_overlap(*halves), lambda: check_disjoint(*(Samples(half, 0) for half in halves))),
    }
    tokenizers = {"question and answer": plain, "through a chat template": chat}
    table = []
    for name, (rowwise, ours) in work.items():
        pairs = np.array([[timed(rowwise), timed(ours)] for _ in range(args.repeats)])  # [repeats, 2 sides, 2 clocks]
        entry: dict[str, object] = {"what": name}
        for clock, values in (("wall", pairs[..., 0]), ("cpu", pairs[..., 1])):
            low, middle, high = np.percentile(values[:, 0] / values[:, 1], [0, 50, 100])
            before, after = np.median(values, axis=0) / args.rows * 1e3
            entry[clock] = {
                "times_faster": middle,
                "lowest": low,
                "highest": high,
                "milliseconds_a_row": {"row by row": before, "prepare_dataset": after},
            }
            print(
                f"{name}, {clock}: {middle:.1f} times ({low:.1f}-{high:.1f}), {before:.3f} -> {after:.3f} ms a row",
                flush=True,
            )
        if name in tokenizers:
            alone = partial(bare, data, tokenizers[name])
            floor = np.median([timed(alone) for _ in range(args.repeats)], axis=0)
            over = dict(zip(("wall", "cpu"), np.median(pairs[:, 1], axis=0) / floor, strict=True))
            print(f"{name}, times the floor: {over['wall']:.2f} wall, {over['cpu']:.2f} cpu", flush=True)
            entry["times_the_floor"] = over
        table.append(entry)
    tokens = sum(len(row) for row in prepared["input_ids"]) / args.rows
    result = {
        "command": f"python benchmarks/prepare.py --repeats {args.repeats}",
        "rows": args.rows,
        "tokens_a_row": tokens,
        "machine": machine(),
        "repeats": args.repeats,
        "table": table,
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
