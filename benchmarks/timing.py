"""What the benchmarks of costs share: a small model, work timed in turns, and ratios in one run."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(args: Any, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama with `args.layers` layers of size `args.hidden` that never ends an answer by itself."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 32000,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **options})).eval()


def alternated(work: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """CPU seconds of each piece of work by its name, `[repeats]`, after one turn that warms up.

    Every second turn goes the other way round, so that a drift of the machine favours nobody.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name in list(work)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            work[name]()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(ratios: Any) -> dict[str, float]:
    """Median, lowest and highest of some ratios, as results hold them."""
    low, middle, high = np.percentile(np.asarray(ratios), [0, 50, 100])
    return {"ratio": float(middle), "lowest": float(low), "highest": float(high)}


def said(found: Mapping[str, float]) -> str:
    """The same in words."""
    return f"{found['ratio']:.3f} ({found['lowest']:.3f}-{found['highest']:.3f})"
