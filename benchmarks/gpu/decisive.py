"""Part `decisive`: which schedule keeps most of what no loss sees, and whether a difficulty adds to it.

GradDiff with LoRA on TOFU forget10; 400 retain samples in the loss, 400 memorised ones of other authors held out. Every
arm is tuned (retain weight, one seed for that), then run with fresh seeds; H@0.1 (`endpoint`) is compared seed by seed.
Several runs share the GPU, a process each. The first run is timed alone; a further retain weight is only tried, for all
arms, when the fresh seeds still fit behind it: the grid is cut, not the seeds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from evaluation.endpoint import Contrast, Endpoint, best, contrast

from .record import Record, failure, plain
from .runs import MEMORISED, NEVER_SEEN, SCORES, Job, Plan, start, work
from .setting import Setting

BUDGET_S = 540.0
ALONE, PRESERVING = "odds+per_sample_stop", "unlikelihood+per_sample_stop"
BY_DIFFICULTY = f"upweight_hard+{PRESERVING}"  # what difficulty could add to it
PRESERVE = {
    "preserve": True,
    "retain_weight_end": 4.0,  # from every weight of the grid
    "schedule_args": {"per_sample_stop": {"target": 0.05}},
}
ARMS: dict[str, dict[str, Any]] = {  # by name, what they set in CUDConfig
    "uniform": {"difficulty": "none", "schedule": "uniform"},
    "schedule alone": {"difficulty": "none", "schedule": ALONE},
    "preserve": {"difficulty": "none", "schedule": PRESERVING, **PRESERVE},
    "preserve by cud": {"difficulty": "cud", "schedule": BY_DIFFICULTY, **PRESERVE},
    "preserve by random": {"difficulty": "given", "schedule": BY_DIFFICULTY, **PRESERVE},
}
CONTRASTS = [
    ("schedule alone", "uniform"),
    ("preserve", "uniform"),
    ("preserve", "schedule alone"),
    ("preserve by cud", "preserve"),
    ("preserve by cud", "preserve by random"),
]
WEIGHTS = (16.0, 4.0, 64.0)  # the first is always tried
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4)
Task = tuple[str, tuple[Any, ...]]  # key of the figure; which work of `runs`, with its arguments


@dataclass
class Share:
    """Processes that share the device, and what a piece of work takes there.

    Attributes:
        limit: processes at work at a time; halved when memory runs out.
        walls: seconds of runs that shared the device.
        alone: seconds of the run that had it alone.
    """

    pool: ProcessPoolExecutor
    limit: int
    walls: list[float] = field(default_factory=list)
    alone: float = 0.0

    @property
    def wall(self) -> float:
        """Seconds that the next run will take: before any has shared the device, as if two thirds were in its way."""
        return statistics.median(self.walls) if self.walls else self.alone * max(1.0, self.limit * 2 / 3)

    @property
    def cost(self) -> float:
        """Seconds of the budget that a run takes."""
        return self.wall / self.limit

    def run(self, record: Record, tasks: list[Task]) -> None:
        """Do named tasks that are not done yet; none is begun that would not end within the budget."""
        queue = [(key, arguments) for key, arguments in tasks if not record.done(key)]
        running: dict[Future, tuple[str, tuple[Any, ...], int]] = {}
        while queue or running:
            while queue and len(running) < self.limit:
                key, arguments = queue.pop(0)
                if record.left <= self.wall:
                    record.leave_out(key)
                else:
                    running[self.pool.submit(work, *arguments)] = key, arguments, self.limit
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                key, arguments, beside = running.pop(future)
                error = future.exception()
                figure = future.result() if error is None else failure(error)  # type: ignore[arg-type]
                if "out_of_memory" in figure and beside > 1:  # others had their share of it
                    self.limit = min(self.limit, max(1, beside // 2))
                    queue.insert(0, (key, arguments))
                    continue
                if arguments[0] == "unlearn" and "seconds" in figure and self.limit > 1:
                    self.walls.append(figure["seconds"])
                record.keep(key, figure)


@contextmanager
def sharing(setting: Setting, plan: Plan, processes: int) -> Iterator[Share]:
    threads = 1 if setting.tiny else max(1, 16 // processes)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=start,
        initargs=(replace(setting, _kept={}), plan, threads),
    )
    for _ in range(processes):  # all of them start at once, beside the first work
        pool.submit(time.sleep, 1.0)
    try:
        yield Share(pool, processes)
    finally:
        pool.shutdown(cancel_futures=True)


def of_run(figure: dict[str, Any]) -> Endpoint:
    return Endpoint(*(figure[name] for name in ("snapshot", "kept", "left", "worst_at_kept", "lowest")))


def tuned(figures: dict[str, Any], weights: tuple[float, ...]) -> dict[str, float]:
    """The best retain weight of each arm, among those that all arms have been run with; the first if there is none."""
    found = {arm: tried(figures, arm, weights) for arm in ARMS}
    shared = [w for w in weights if all(w in of_arm for of_arm in found.values())]
    return {arm: best({w: of_arm[w] for w in shared}) if shared else weights[0] for arm, of_arm in found.items()}


def tried(figures: dict[str, Any], arm: str, weights: tuple[float, ...]) -> dict[float, Endpoint]:
    runs = {w: figures.get(Job(arm, {}, w, TUNING_SEED).key, {}) for w in weights}
    return {w: of_run(figure) for w, figure in runs.items() if "lowest" in figure}


def drop_half_seeds(record: Record, model: str) -> None:
    """After a cut-off, the model may have been learned anew: of runs on another one, only seeds that all arms have run
    stay (they are compared among themselves). Tuning runs stay."""
    runs = {key: f for key, f in record.figures.items() if "lowest" in f and f["seed"] in SEEDS}
    for seed in SEEDS:
        of_seed = {key: f for key, f in runs.items() if f["seed"] == seed}
        models = {f["model"] for f in of_seed.values()}
        complete = len(models) == 1 and {f["arm"] for f in of_seed.values()} == set(ARMS)
        if models - {model} and not complete:
            for key in of_seed:
                del record.figures[key]


def check_protocol(record: Record, protocol: dict[str, Any]) -> None:
    """Runs of an earlier piece are only worth something beside ours if they were made alike; an arm may be new.

    Raises:
        ValueError: naming what differs.
    """
    earlier = record.state.get("protocol")
    if earlier is not None:
        mine = {name: protocol["arms"].get(name) for name in earlier["arms"]}
        for what, before, now in (("plan", earlier["plan"], plain(protocol["plan"])), ("arms", earlier["arms"], mine)):
            if before != now:
                raise ValueError(f"the earlier runs were made with another {what}, {before}: choose another folder")
    record.state["protocol"] = protocol


def level(weight: float | dict[str, float], seed: int, never_seen: list[float] | None) -> list[Task]:
    """A run of every arm."""
    weights = weight if isinstance(weight, dict) else dict.fromkeys(ARMS, weight)
    jobs = [Job(arm, options, weights[arm], seed) for arm, options in ARMS.items()]
    return [(job.key, ("unlearn", job, never_seen)) for job in jobs]


def first_weight(record: Record, share: Share, weight: float, model: str, setting: Setting, tasks: list[Task]) -> None:
    """The first run alone, then the scores beside the runs that do not wait for them."""
    limit, share.limit = share.limit, 1
    share.run(record, tasks[:1])
    share.limit, share.alone = limit, record.figures.get(tasks[0][0], {}).get("seconds", 0.0)
    if record.figures.get("scores", {}).get("model") != model or not (setting.work / SCORES).exists():
        record.figures.pop("scores", None)
    scored = [task for task in tasks if task[1][1].options["difficulty"] == "cud"]
    scores: Task = ("scores", ("score", weight, TUNING_SEED))
    share.run(record, [scores, *(task for task in tasks if task not in scored)])
    share.run(record, scored)


def tune(record: Record, share: Share, weights: tuple[float, ...], seeds: tuple[int, ...], never_seen: Any) -> None:
    """The further retain weights, as many as leave time for the fresh seeds."""
    begun: list[Task] = []
    for weight in weights[1:]:
        tasks = [task for task in level(weight, TUNING_SEED, never_seen) if not record.done(task[0])]
        if (len(begun) + len(tasks) + len(ARMS) * len(seeds)) * share.cost <= record.left:
            begun += tasks
        else:
            for key, _ in tasks:
                record.leave_out(key)
    share.run(record, begun)


def run(record: Record, setting: Setting, processes: int | None = None) -> None:
    plan = Plan.tiny() if setting.tiny else Plan()
    weights, seeds = (WEIGHTS[:2], SEEDS[:2]) if setting.tiny else (WEIGHTS, SEEDS)
    grid = {"weights": list(weights), "tuning_seed": TUNING_SEED, "seeds": list(seeds)}
    check_protocol(record, {"plan": asdict(plan), "arms": ARMS, **grid})
    with sharing(setting, plan, processes or (2 if setting.tiny else 6)) as share:
        learn(record, setting, share)
        if "model" not in record.figures.get(MEMORISED, {}):
            return
        model = record.figures[MEMORISED]["model"]
        drop_half_seeds(record, model)
        never_seen = record.figures.get(NEVER_SEEN, {}).get("forget_probability")
        first_weight(record, share, weights[0], model, setting, level(weights[0], TUNING_SEED, never_seen))
        tune(record, share, weights, seeds, never_seen)
        chosen = tuned(record.figures, weights)
        # One seed after the other: one that all arms have run is worth more than two that some have.
        share.run(record, [task for seed in seeds for task in level(chosen, seed, never_seen)])
        record.state["chosen_weight"] = chosen
        record.state["outcome"] = outcome(record.figures, chosen, seeds)
        record.state["sharing"] = {"processes": share.limit, "alone_s": share.alone, "shared_s": share.wall}


def learn(record: Record, setting: Setting, share: Share) -> None:
    """The model that knows all, anew where a cut-off has lost it, and what one says that never saw the forget set."""
    if not (setting.work / MEMORISED / "learned.json").exists():
        record.figures.pop(MEMORISED, None)
    share.run(record, [(name, ("learn", name)) for name in (MEMORISED, NEVER_SEEN)])


def outcome(figures: dict[str, Any], chosen: dict[str, float], seeds: tuple[int, ...]) -> dict[str, Any]:
    """H of every arm by seed, and the contrasts."""
    kept: dict[str, dict[int, float | None]] = {}
    for arm, seed in itertools.product(ARMS, seeds):
        figure = figures.get(Job(arm, {}, chosen[arm], seed).key, {})
        if "lowest" in figure:
            kept.setdefault(arm, {})[seed] = figure["kept"]
    found: dict[str, Contrast] = {
        f"{ours} over {other}": contrast(kept[ours], kept[other])
        for ours, other in CONTRASTS
        if ours in kept and other in kept
    }
    return {"kept": kept, "contrasts": {name: asdict(value) for name, value in found.items()}}


def table(figures: dict[str, Any], state: dict[str, Any]) -> list[str]:
    lines = ["decisive: share of held-out probability kept when the worst quarter is at most 0.1, by seed"]
    for name in (MEMORISED, NEVER_SEEN):
        if "forget" in figures.get(name, {}):
            parts = ", ".join(f"{part} {figures[name][part]['mean']:.3f}" for part in ("forget", "retain", "held_out"))
            lines.append(f"  {name}: probability {parts}")
    if "outcome" not in state:
        return [*lines, "  no outcome yet"]
    for arm, by_seed in state["outcome"]["kept"].items():
        shown = ", ".join("never" if value is None else f"{value:.3f}" for value in by_seed.values())
        lines.append(f"  {arm} (retain weight {state['chosen_weight'][arm]:g}): {shown}")
    for name, found in state["outcome"]["contrasts"].items():
        differences = ", ".join(f"{value:+.3f}" for value in found["differences"])
        interval = "" if found["mean"] is None else "; log ratio {mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)
        missing = f"; not reached in seeds {found['missing']}" if found["missing"] else ""
        lines.append(f"  {name}: {differences}{interval}{missing}")
    return lines
