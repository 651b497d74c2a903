"""Engines that write `continuations` in place of transformers' batches: its paged attention, and vLLM.

An engine takes what is `Asked`, tokens of prompts, and gives tokens. It is another way to the same answers, not another
measure: what it writes greedily is held against the model.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from .generation import Asked, without_generation_config, written_by
from .layers import base_causal_lm
from .loading import adapter_file
from .positions import positions_of
from .sampling import seed_of

TRANSFORMERS, PAGED, VLLM = "transformers", "paged", "vllm"
PAGED_ON = ("cuda",)  # devices
PAGED_CACHE: dict[str, int] = {}  # options of transformers' `ContinuousBatchingConfig`; by itself it takes what is free
# Of the GPU memory that is free beside the model, vLLM takes this share: the rest is for the passes between.
MEMORY_SHARE = 0.5


def check_engine(name: str, models: Mapping[str, str | None], *, drawn: bool = False, rounded: bool = False) -> None:
    """Raise `ValueError` saying why an engine cannot write here, before a model is loaded.

    Args:
        name: `"transformers"`, `"paged"` or `"vllm"`.
        models: that are to write, by the option that names them; `None` for one that is not there.
        drawn: whether answers are drawn, too.
        rounded: whether weights are rounded while they are loaded.
    """
    if name == PAGED:
        if drawn:
            raise ValueError(
                "generation_engine paged writes greedily alone: what it draws depends on what else is being written; "
                "leave samples out, or take transformers"
            )
        _check_device(torch.accelerator.current_accelerator() or torch.device("cpu"))
    if name == VLLM:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("generation_engine vllm needs vLLM: pip install 'cud-trainer[vllm]'")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("generation_engine vllm works in one process: start the command without a launcher")
        if rounded:
            raise ValueError(
                "generation_engine vllm reads the weights in the folder, not those of load_in_4bit or 8bit"
            )
        for option, path in models.items():
            if path is not None:
                _check_folder(path, option)


def _check_device(device: torch.device) -> None:
    if device.type not in PAGED_ON:
        raise ValueError(
            f"generation_engine paged needs a CUDA device, here is {device.type}: there it would take memory from all "
            "else and save no time; take transformers"
        )


def _check_folder(path: str, option: str = "model") -> None:
    if not Path(path).is_dir():
        raise ValueError(
            f"generation_engine vllm takes a folder with a model, {option} {path!r} is none: download it there "
            f"(hf download {path} --local-dir FOLDER)"
        )
    if adapter_file(path) is not None:
        raise ValueError(
            f"generation_engine vllm takes a folder with a whole model, {option} {path!r} is an adapter: save it "
            "merged (merge_and_unload)"
        )


@contextmanager
def engine_of(name: str, model: Any, folder: str, *, longest: int | None = None) -> Iterator[None]:
    """Inside, the engine of this name writes for the model.

    Args:
        folder: where the model was loaded from; vLLM loads it once more.
        longest: tokens of prompt and continuation together, at most; `None`: as many as the model has positions.
    """
    if name == TRANSFORMERS:
        yield
        return
    engine: Any = paged
    if name == VLLM:
        base = base_causal_lm(model)
        positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        longest = min((most for most in (longest, positions) if most), default=None)
        engine = Vllm(folder, dtype=str(base.dtype).removeprefix("torch."), longest=longest)
    with written_by(model, engine):
        yield
    if name == VLLM:
        del engine
        gc.collect()  # its memory is given back


def check_paged(model: Any) -> None:
    """Raise `ValueError` saying why the paged engine cannot write with this model."""
    base = base_causal_lm(model)
    _check_device(base.device)
    why = None
    if not hasattr(base, "continuous_batching_context_manager"):
        why = "transformers has no continuous batching for it"
    elif hasattr(model, "peft_config") and not hasattr(model, "merge_and_unload"):
        why = "its adapter is none on weights"
    elif positions_of(model).first or positions_of(model).rotary:
        why = "its positions depend on the rest of a batch, or do not begin at 0"
    if why is not None:
        raise ValueError(f"generation_engine paged cannot write with {type(base).__name__}: {why}; take transformers")


def paged(model: Any, asked: Asked) -> Iterator[tuple[int, list[int]]]:
    """transformers' continuous batching over a paged cache: a row that is done makes room for the next one.

    What `generate_batch` does, but each row has its own limit, and a failure is an error. Greedy alone. The model has
    the attention that it was loaded with.
    """
    from transformers import ContinuousBatchingConfig

    if asked.sampling is not None:
        raise ValueError("the paged engine writes greedily alone")
    check_paged(model)
    base = base_causal_lm(model)
    config = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=asked.stop or [-1], pad_token_id=asked.pad)
    cache = ContinuousBatchingConfig(auto_switch_to_flash=False, **PAGED_CACHE)
    rows = _longest_first(asked)
    devices = [base.device] if base.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),  # it sets the seed of the process
        without_generation_config(base),
        base.continuous_batching_context_manager(generation_config=config, continuous_batching_config=cache) as manager,
    ):
        try:
            for row in rows:
                manager.add_request(list(asked.prompts[row]), str(row), max_new_tokens=asked.limits[row])
            left = len(rows)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and manager.is_running():
                    continue
                if result is None or result.error is not None:
                    raise ValueError(f"the paged engine has failed: {'it ended' if result is None else result.error}")
                if result.is_finished():
                    left -= 1
                    yield int(result.request_id), result.generated_tokens
        except BaseException:  # what is left need not be written
            manager.stop(hard_stop=True)
            raise


class Vllm:
    """vLLM on the model in a folder, as `save_pretrained` leaves it.

    It reads the weights from there: not those of a model in memory, nor an adapter.

    Args:
        dtype: of the weights.
        longest: tokens of prompt and continuation together, at most; what the model's configuration says.

    Raises:
        ValueError: for a path that is no such folder.
    """

    def __init__(self, folder: str, *, dtype: str = "float32", longest: int | None = None) -> None:
        _check_folder(folder)
        from vllm import LLM

        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (1, 1)
        self.model = LLM(
            model=folder,
            dtype=dtype,
            max_model_len=longest,
            gpu_memory_utilization=MEMORY_SHARE * free / total,
            skip_tokenizer_init=True,  # tokens in, tokens out
            generation_config="vllm",  # none of the model's
        )

    def __call__(self, model: Any, asked: Asked) -> Iterator[tuple[int, Sequence[int]]]:
        from vllm import SamplingParams

        how: dict[str, Any] = {
            "temperature": 0.0,
            "stop_token_ids": asked.stop,
            "ignore_eos": True,
            "detokenize": False,
        }
        if asked.sampling is not None:
            how |= {"temperature": asked.sampling.temperature, "top_p": asked.sampling.top_p}
        places, prompts, options = [], [], []
        for row in _longest_first(asked):
            for number in range(asked.draws):
                if asked.sampling is not None:
                    how["seed"] = seed_of(asked.prompts[row], asked.sampling.seed, number) % 2**63
                places.append(row * asked.draws + number)
                prompts.append({"prompt_token_ids": list(asked.prompts[row])})
                options.append(SamplingParams(max_tokens=asked.limits[row], **how))
        results = self.model.generate(prompts, options, use_tqdm=asked.progress)
        for place, result in zip(places, results, strict=True):
            yield place, result.outputs[0].token_ids


def _longest_first(asked: Asked) -> list[int]:
    """Rows that are to be written: the one that takes longest does not begin last."""
    rows = [row for row, limit in enumerate(asked.limits) if limit]
    return sorted(rows, key=lambda row: (-asked.limits[row], -len(asked.prompts[row]), row))
