"""One pass of a model over a dataset: batches by bytes, shared among processes, kept on disk as they are done.

What a batch holds depends on the dataset and the settings alone, never on the number of processes or on free memory, so
that one process and eight compute the very same numbers.
"""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .data import Samples
from .data.ids import KEY_FILE, keyed_for, keys_beside
from .files import atomic_write, holds_something, private_folder, remove_leftovers, write_json
from .models.memory import in_halves

logger = logging.get_logger(__name__)

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Value = TypeVar("Value")


class OtherProcessError(ValueError):
    """What another process came to: it failed, or is gone. What was done until then stays."""


def process_state() -> PartialState:
    """The processes that work together: those of `torchrun` or `accelerate launch`, else this one alone."""
    # Without an accelerator it has to be told, or it starts every process as if it were the only one.
    return PartialState(cpu=not torch.accelerator.is_available())


def gathered(value: Value) -> list[Value]:
    """What each of the processes has, in their order; all of them have to ask.

    Raises:
        OtherProcessError: when one of them is gone.
    """
    if process_state().num_processes == 1:
        return [value]
    try:
        return gather_object([value])
    except RuntimeError as error:
        raise OtherProcessError(f"another process is gone ({error})") from error


def of_main_process(value: Value) -> Value:
    """What the main process has; all have to ask. Raises `OtherProcessError` as `gathered`."""
    if process_state().num_processes == 1:
        return value
    shared = [value]
    try:
        broadcast_object_list(shared)
    except RuntimeError as error:
        raise OtherProcessError(f"another process is gone ({error})") from error
    return shared[0]


def end_together() -> None:
    """Wait for all processes at the end of a command; each parts from the others when it exits.

    Under a launcher a process that ends badly, be it by a thread of its back end, takes along those that still write.
    """
    if process_state().num_processes > 1:
        gathered(None)
        atexit.register(process_state().destroy_process_group)


@contextmanager
def entered_by_main_process(context: AbstractContextManager) -> Iterator[None]:
    """A context that the main process alone is in, for what it writes; where it is refused, all processes are."""
    problem: ValueError | None = None
    with ExitStack() as stack:
        if process_state().is_main_process:
            try:
                stack.enter_context(context)
            except ValueError as error:
                problem = error
        (told, *_) = gathered(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if told is not None:
            raise ValueError(told)
        yield


class WorkDir:
    """A directory that keeps what is done of a piece of work, so that a killed run goes on where it stopped.

    Args:
        path: made if it is not there.
        identity: what the results depend on (model, dataset, settings, versions), plain JSON values.

    Attributes:
        is_new: whether this process began the work.

    Raises:
        ValueError: when it holds another piece of work, saying what differs, or something else.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path, self.is_new = Path(path).expanduser(), False
        identity = json.loads(json.dumps(identity))
        state, problem = process_state(), None
        if state.is_main_process:
            problem = self._claim(identity)
        problem = next((text for text in gathered(problem) if text), None)
        if problem:
            raise ValueError(problem)

    @staticmethod
    def begun(path: str | Path) -> bool:
        """Whether a piece of work was started at `path`."""
        return (Path(path) / "run.json").exists()

    @staticmethod
    def recorded(path: str | Path) -> dict[str, Any]:
        """The identity of the piece of work that was started at `path`; empty where there is none."""
        try:
            found = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _claim(self, identity: dict[str, Any]) -> str | None:
        record = self.path / "run.json"
        if record.exists():
            try:
                recorded = json.loads(record.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return f"cannot read {record}: {error}"
            if not isinstance(recorded, dict):
                return f"{record} holds no settings; remove the work directory or choose another one"
            for key in keys_beside(record):
                identity = key.keyed_values(identity)
            differs = [key for key in {**recorded, **identity} if recorded.get(key) != identity.get(key)]
            if differs:
                differences = "; ".join(
                    f"{key}: there {recorded.get(key)!r}, here {identity.get(key)!r}" for key in sorted(differs)
                )
                return (
                    f"work directory {self.path} belongs to another run ({differences}); "
                    "remove it or choose another one"
                )
        elif holds_something(self.path, [KEY_FILE]):
            return f"work directory {self.path} holds something else; choose another one"
        else:
            private_folder(self.path)
            write_json(record, keyed_for(record, identity), private=True)
            self.is_new = True
        return None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors saved under `name`, in their order; `None` when they are not there or not whole."""
        try:
            with safe_open(str(self.path / f"{name}.safetensors"), framework="pt") as file:
                order = json.loads((file.metadata() or {}).get("order", "null")) or file.keys()
                return {key: file.get_tensor(key) for key in order}
        except (OSError, SafetensorError, ValueError):
            return None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors under `name`, completely or not at all."""
        tensors, order = (
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            {"order": json.dumps([*tensors])},
        )
        path = self.path / f"{name}.safetensors"
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=order), private=True)

    def remove(self) -> None:
        """See `remove_work`."""
        remove_work(self.path)

    @contextmanager
    def kept_unless_refused(self) -> Iterator[None]:
        """What was begun goes again where it is refused inside (`ValueError`): the corrected call is other work."""
        try:
            yield
        except OtherProcessError:
            raise
        except ValueError:
            if self.is_new:
                self.remove()
            raise


def remove_work(path: str | Path) -> None:
    """Delete what a `WorkDir` has written to `path`, and the directory if nothing else is in it."""
    path = Path(path).expanduser()
    for file in [*path.glob("*.safetensors"), path / "run.json", path / KEY_FILE]:
        file.unlink(missing_ok=True)
    remove_leftovers(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def run_batches(
    name: str,
    samples: Samples,
    compute: Compute,
    plan: list[list[int]],
    *,
    device: torch.device | str = "cpu",
    work: WorkDir | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Call `compute` on every batch of `plan` and put the rows of its results in dataset order.

    Under `torchrun` or `accelerate launch` every process computes its share of the batches and all return everything.

    Args:
        name: of the pass, for the progress bar and the files.
        compute: from a padded batch to tensors on the CPU whose first axis is the batch's.
        work: keeps each finished batch; batches found there are not computed again.

    Raises:
        ValueError: on every process when one of them failed, naming the error; for a sample that does not fit into
            memory by itself.
    """

    def part(rows: list[int]) -> dict[str, Tensor]:
        batch = {column: values.to(device) for column, values in samples.pad(rows).items()}
        found = list(in_halves(compute, rows, batch, samples.ids, "batch_bytes"))  # in the order of the rows
        return {column: torch.cat([of_part[column] for _, of_part in found]) for column in found[0][1]}

    return run_parts(name, part, plan, work=work, progress=progress)


def run_parts(
    name: str,
    compute: Callable[[list[int]], dict[str, Tensor]],
    plan: list[list[int]],
    *,
    label: str | None = None,
    work: WorkDir | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Call `compute` on the rows of every part of `plan` and put the rows of its results in order.

    Under `torchrun` or `accelerate launch` every process computes its share of the parts and all return everything.

    Args:
        name: of the pass, for errors and files.
        label: of the progress bar, where it is not the name.
        compute: from rows to tensors on the CPU whose first axis is the rows'.
        plan: every row from 0 on once. Not made from the number of processes.
        work: keeps each finished part; parts found there are not computed again.

    Raises:
        OtherProcessError: when another process failed, naming its error, or is gone.
    """
    state = process_state()
    key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:8]
    mine = range(state.process_index, len(plan), state.num_processes)
    shards: dict[int, dict[str, Tensor]] = {}
    failure: Exception | None = None
    with tqdm(
        total=sum(len(plan[index]) for index in mine),
        desc=label or name,
        unit="sample",
        leave=False,
        disable=not progress or not state.is_main_process,
    ) as bar:
        try:
            for index in mine:
                shard = work.load(f"{name}-{key}-{index:05d}") if work is not None else None
                if shard is None or any(len(tensor) != len(plan[index]) for tensor in shard.values()):
                    shard = compute(plan[index])
                    if work is not None:
                        work.save(f"{name}-{key}-{index:05d}", shard)
                shards[index] = shard
                bar.update(len(plan[index]))
        except Exception as error:  # the others must hear of it, else they wait for this process
            failure = error
    try:
        told = gathered((shards, None if failure is None else f"{type(failure).__name__}: {failure}"))
    finally:
        if failure is not None:
            raise failure
    broken = [f"process {rank}: {text}" for rank, (_, text) in enumerate(told) if text]
    if broken:
        raise OtherProcessError(f"{name} failed on another process; {broken[0]}")
    for other, _ in told:
        shards.update(other)
    result: dict[str, Tensor] = {}
    for index, rows in enumerate(plan):
        for column, values in shards[index].items():
            if column not in result:
                result[column] = values.new_zeros(sum(map(len, plan)), *values.shape[1:])
            result[column][rows] = values
    return result
