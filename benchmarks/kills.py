"""Commands killed at random moments and started again: the same bits as without a kill.

    python benchmarks/kills.py --output benchmarks/results/kills.json

A moment is any change of a file in the output, or a forward pass (tests/support/dies.py), drawn evenly over those of an
uninterrupted run. The process that comes to it is killed, or all of the command. Then the user does what anyone would:
goes on from the last checkpoint if there is one, else gives the same command again. Half of the runs overwrite an older
run with other settings. Compared: the names of all files, and the bits of weights, scores, schedules and tables of
samples; of reports all figures. Processes: one, or two (gloo); a study runs its cells in its own
(tests/evaluation/test_study_reliability.py kills those with theirs).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(SUPPORT), str(ROOT)]

# ruff: noqa: E402
from builders import make_model, make_tokenizer, qa_dataset
from dies import watch

from cud_trainer.files import write_json

# What may differ between two runs: times, paths, and random numbers of libraries in what they write of themselves.
BYTES = (".parquet", ".safetensors", ".csv")
LEFT_OUT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json", ".pth", "log.txt", "README.md")


@dataclass
class Case:
    """A command line without its output, which is `{output}`; the same with other settings, for what is overwritten."""

    name: str
    command: list[str]
    other: list[str]
    kills: int
    processes: int = 1
    resumes: bool = False
    moments: int = field(default=0, init=False)


def cases(world: Path) -> list[Case]:
    data = ["--model_name_or_path", f"{world}/model", "--forget_dataset", f"{world}/forget.jsonl"]
    data += ["--retain_dataset", f"{world}/retain.jsonl", "--id_key", f"{world}/key"]
    few = ["--bf16", "false", "--use_cpu", "true", "--folds", "3", "--learning_rate", "1e-3"]
    score = ["score", *data, *few, "--metrics", "cud", "loss", "random", "--passes", "4"]
    score += ["--output", "{output}/s.parquet", "--save_circuits", "{output}/c.safetensors"]
    train = ["train", *data, *few, "--output_dir", "{output}", "--passes", "3", "--per_device_train_batch_size", "2"]
    train += ["--preserve", "false"]
    train += ["--difficulty", "cud", "--schedule", "easy_to_hard", "--objective", "npo", "--retain_loss", "kl"]
    train += ["--report_to", "none", "--save_strategy", "steps", "--save_steps", "4", "--disable_tqdm", "true"]
    evaluate = ["evaluate", *data, "--scores", f"{world}/s/s.parquet", "--output_dir", "{output}", "--batch_size", "3"]
    evaluate += ["--max_length", "128", "--quantize", "8"]
    options = {"passes": 2, "learning_rate": 0.003, "difficulty": "cud", "folds": 3, "bf16": False, "use_cpu": True}
    study = ["study", *data, "--output_dir", "{output}", "--grid", '{"schedule": ["uniform", "easy_to_hard"]}']
    study += ["--train", json.dumps({**options, "per_device_train_batch_size": 4})]
    changed = json.dumps({**options, "per_device_train_batch_size": 4, "learning_rate": 0.01})
    return [
        Case("score", score, [*score, "--seed", "9"], 6),
        Case("score", score, [*score, "--seed", "9"], 3, processes=2),
        Case("train", train, [*train, "--seed", "9"], 8, resumes=True),
        Case("train", train, [*train, "--seed", "9"], 4, processes=2, resumes=True),
        Case("evaluate", evaluate, [*evaluate, "--seed", "9"], 4),
        Case("study", study, [*study[:-1], changed], 5),
    ]


@cache
def server() -> multiprocessing.context.BaseContext:
    """A context whose processes are forked from one that has imported what commands need: a start costs nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "datasets", "transformers", "peft", "trl", "cud_trainer.trainer"])
    return context


def command_in_a_process(argv: list[str], variables: dict[str, str], log: str, die: dict | None) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(variables)
    if die is not None:
        watch(**die)
    from cud_trainer.cli import main as cud
    from evaluation.study import pool

    # Cells run in this process: one of their own takes longer to start than to do all of its work.
    pool.Worker.run = lambda worker, study, cell, work: pool.complete(study, cell, work)

    sys.exit(cud(argv))


def start(
    command: list[str],
    output: Path,
    scratch: Path,
    *extra: str,
    processes: int = 1,
    at: int | None = None,
    together: bool = False,
) -> tuple[list[int], str]:
    """Run a command to its end, or its death at moment `at`; exit codes, and what it said.

    Args:
        at: 0 only counts, in `scratch`/count.
        together: whether all processes die where one does; else the others have to end by themselves.
    """
    argv = [*(word.replace("{output}", str(output)) for word in command), *extra]
    (scratch / "count").unlink(missing_ok=True)
    die = None if at is None else {"folder": str(output), "count": str(scratch / "count"), "at": at}
    variables = {"PYTHONPATH": f"{SUPPORT / 'dying'}:{ROOT}", "OMP_NUM_THREADS": "1", "CUD_DIE": json.dumps(die)}
    if processes > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started, logs = [], [scratch / f"log{rank}" for rank in range(processes)]
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else variables
        started.append(server().Process(target=command_in_a_process, args=(argv, own, str(log), die)))
        started[-1].start()
    wait([process.sentinel for process in started])  # for the first one
    if together and any(process.exitcode == -signal.SIGKILL for process in started):
        for process in started:
            process.kill()
    for process in started:
        process.join()
    return [int(process.exitcode) for process in started], "".join(log.read_text() for log in logs if log.exists())


def finish(case: Case, output: Path, scratch: Path, overwrite: bool) -> list[str]:
    """What the user does after a kill, until the command has ended well; what was given, in words."""
    tried = []
    ways = [["--resume_from_checkpoint", "true"]] if case.resumes else []
    ways += [["--overwrite", "true"]] if overwrite else [[], ["--overwrite", "true"]]
    for extra in ways:
        codes, said = start(case.command, output, scratch, *extra, processes=case.processes)
        tried.append(f"{' '.join(extra) or 'again'}: {codes[0]}")
        if set(codes) == {0}:
            return tried
        if set(codes) - {2}:
            raise RuntimeError(f"{case.name}: {tried}: {said[-2000:]}")
    raise RuntimeError(f"{case.name}: refused in every way, {tried}: {said[-2000:]}")


def bits(folder: Path) -> dict[str, str]:
    """Every file with a hash of what must be the same."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path) -> str:
    if path.name == "results.json" or path.name == "result.json":
        found = json.loads(path.read_text())
        for name in ("created", "run", "seconds", "head"):
            found.pop(name, None)
        for entry in found.get("matched") or []:
            for row in entry["rows"]:
                row.pop("seconds", None)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix in BYTES else ""


def differences(have: dict[str, str], expected: dict[str, str]) -> list[str]:
    names = sorted(name for name in {**have, **expected} if have.get(name) != expected.get(name))
    return [name for name in names if not (name in have and name in expected and name.endswith(LEFT_OUT))]


def one_kill(
    case: Case, old: Path | None, expected: dict[str, str], root: Path, at: int, together: bool
) -> dict[str, Any]:
    """Kill a command at moment `at`, finish it, and compare.

    Args:
        old: the run that is overwritten, if one is.
        expected: `bits` of the command without a kill.
    """
    output, overwrite = root / "out", old is not None
    shutil.rmtree(output, ignore_errors=True)
    if old is not None:
        shutil.copytree(old, output)
    extra = ["--overwrite", "true"] if overwrite else []
    codes, _ = start(case.command, output, root, *extra, processes=case.processes, at=at, together=together)
    reached = (root / "count").stat().st_size >= at
    try:
        tried = finish(case, output, root, overwrite) if codes != [0] * case.processes else ["ended"]
        wrong = differences(bits(output), expected)
    except RuntimeError as error:
        tried, wrong = [str(error)[-1500:]], ["it did not end"]
    row = {"command": case.name, "processes": case.processes, "overwrite": overwrite, "moment": at, "of": case.moments}
    row |= {"killed": "all" if together else "one", "reached": reached}
    return {**row, "exit_codes": codes, "then": tried, "differs": wrong}


def make_world(world: Path) -> None:
    make_model(0).save_pretrained(world / "model")
    make_tokenizer().save_pretrained(world / "model")
    qa_dataset(9).to_json(world / "forget.jsonl")
    qa_dataset(7, 100).to_json(world / "retain.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a case; the rows of the others stay as they are in the output")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {}
    if args.only and args.output and Path(args.output).exists():
        for row in json.loads(Path(args.output).read_text())["rows"]:
            rows.setdefault(f"{row['command']}{row['processes']}", []).append(row)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root)
        made = cases(root)
        codes, said = start(made[0].command, root / "s", root)  # what evaluations read
        assert codes == [0], said
        for case in made:
            name = f"{case.name}{case.processes}"
            if args.only and args.only != name:
                continue
            straight, old, draw = root / name, root / f"{name}-old", random.Random(f"{name} {args.seed}")
            codes, said = start(case.command, straight, root, processes=case.processes, at=0)
            assert set(codes) == {0}, said[-3000:]
            case.moments = (root / "count").stat().st_size
            codes, said = start(case.other, old, root, processes=case.processes)
            assert set(codes) == {0}, said[-3000:]
            expected, rows[name] = bits(straight), []
            for number in range(case.kills):
                at, together = draw.randint(1, case.moments), draw.random() < 0.5
                rows[name].append(one_kill(case, old if number % 2 else None, expected, root, at, together))
                print(json.dumps(rows[name][-1]), flush=True)
            if args.output:
                write_result(args.output, args.seed, [row for several in rows.values() for row in several])


def write_result(output: str, seed: int, rows: list[dict[str, Any]]) -> None:
    same = sum(not row["differs"] for row in rows)
    print(f"{same} of {len(rows)} the same")
    write_json(output, {"kills": len(rows), "same": same, "seed": seed, "rows": rows})


if __name__ == "__main__":
    main()
