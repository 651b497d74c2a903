"""Every causal LM of transformers that can be built tiny: scored, trained, saved, loaded again and resumed.

    python benchmarks/architectures.py --output benchmarks/results/architectures.json
    python benchmarks/architectures.py --output benchmarks/results/architectures.json --types gemma3 qwen3

With `--types` the rows of those types alone are made again. Beside the JSON goes a table in Markdown. Columns: largest
difference in nats between a score in a padded batch and the model's own forward pass of that sample alone; NPO's first
loss over its value at a log-ratio of 0; largest difference after saving and loading; whether a run resumed from its
first checkpoint ends with the same weights; circuits: verified, why there are none, or none where nobody has described
the type.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from builders import make_tokenizer, qa_dataset
from every_model import TYPES, NotTinyError, tiny
from runs import make_trainer
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hub_logging

from cud_trainer.circuits import verify_architecture
from cud_trainer.circuits.architectures import check_architecture
from cud_trainer.data import Samples, prepare_samples
from cud_trainer.logprobs import score_answers
from cud_trainer.models.fingerprint import versions

BETA = 0.1
RUN = {
    "objective": "npo",
    "objective_args": {"beta": BETA},
    "preserve": False,
    "passes": 1,
    "n_buckets": 2,
    "save_steps": 1,
    "overwrite": True,
}


def alone(model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    """Mean log-probability of every answer, by the model's own forward pass of one sample at a time."""
    means = []
    with torch.no_grad():
        for row in samples:
            tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])[:, 1:]
            logps = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            means.append(logps.gather(-1, tokens[:, 1:, None])[..., 0][labels != -100].mean())
    return torch.stack(means)


def scored(model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return score_answers(model.eval(), samples.pad(list(range(len(samples))))).mean_logps


def examine(model_type: str, folder: Path) -> dict:
    """What was found of one type; a stage that fails is named, with the error."""
    found: dict = {"type": model_type}
    stage = "build"
    try:
        model = tiny(model_type)
        found["parameters"] = model.num_parameters()
        tokenizer = make_tokenizer()
        samples = prepare_samples(qa_dataset(4), tokenizer, name="forget")
        stage = "own forward pass"
        expected = alone(model, samples)
        stage = "score"
        found["score"] = float((scored(model, samples) - expected).abs().max())
        stage = "train"
        data = {"forget": qa_dataset(8), "retain": qa_dataset(4, 100), "tokenizer": tokenizer}
        data["gradient_checkpointing"] = model.supports_gradient_checkpointing
        trainer = make_trainer(folder / "run", model=model, **data, **RUN)
        trainer.train()
        first = next(entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry)
        found["first_loss"] = first * BETA / (2 * math.log(2))
        stage = "save and load"
        trainer.save_model(str(folder / "final"))
        again = AutoModelForCausalLM.from_pretrained(folder / "final")
        found["reload"] = float((scored(trainer.model, samples) - scored(again, samples)).abs().max())
        stage = "resume"
        resumed = make_trainer(folder / "run", model=tiny(model_type), **data, **{**RUN, "overwrite": False})
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))
        pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
        found["resume"] = all(torch.equal(a, b) for a, b in pairs)
    except NotTinyError as error:
        found["not_built"] = str(error)
    except Exception as error:
        found["failed"] = {"stage": stage, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if "not_built" not in found:
        found["circuits"] = circuits(model_type)
    return found


def circuits(model_type: str) -> str:
    try:
        model = tiny(model_type)
        check_architecture(model)
    except ValueError as error:
        reason = str(error).partition(f"architecture {model.config.model_type!r}: ")[2]
        return f"no: {reason}" if reason else "no"
    try:
        verify_architecture(model)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return "yes"


def table(rows: list[dict]) -> str:
    built = [row for row in rows if "not_built" not in row]
    whole = [row for row in built if "failed" not in row]
    lines = [
        "# Every causal LM that can be built tiny",
        "",
        f"{len(rows)} types, {len(built)} built, {len(whole)} through all stages (`benchmarks/architectures.py`).",
        "",
        "| type | score off by (nats) | first NPO loss / its value at 0 | reload | resumed the same | circuits |",
        "|---|---|---|---|---|---|",
    ]
    for row in built:
        if "failed" in row:
            failed = row["failed"]
            text = failed["error"].replace("|", "/")
            lines.append(f"| `{row['type']}` | {failed['stage']}: {text} | | | | {row['circuits']} |")
        else:
            figures = f"{row['score']:.1e} | {row['first_loss']:.6f} | {row['reload']:.1e}"
            lines.append(f"| `{row['type']}` | {figures} | {'yes' if row['resume'] else 'no'} | {row['circuits']} |")
    lines += ["", "Not built:", ""]
    lines += [f"- `{row['type']}`: {row['not_built']}" for row in rows if "not_built" in row]
    lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=TYPES, choices=TYPES)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    hub_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    earlier = json.loads(args.output.read_text(encoding="utf-8"))["types"] if args.types != TYPES else []
    made = {row["type"]: row for row in earlier}
    for model_type in args.types:
        folder = Path(tempfile.mkdtemp())
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = examine(model_type, folder)
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found), f"{time.perf_counter() - start:.1f} s", flush=True)
        made[model_type] = found
    rows = [made[model_type] for model_type in TYPES if model_type in made]
    args.output.write_text(json.dumps({"versions": versions(), "types": rows}, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
