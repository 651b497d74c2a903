"""Which models and data: those of the kit on a GPU, small ones that are made here with `--tiny`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cud_trainer.data import Samples, prepare_samples
from evaluation.testbed import fictitious_authors, tiny_llama, train_tokenizer

ROWS_PER_AUTHOR = 20  # of TOFU
SHAPES = {
    "llama-1b": dict(  # Llama-3.2-1B
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-8b": dict(  # Llama-3.1-8B
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16)


@dataclass(frozen=True)
class Parts:
    """What is forgotten, what the retain loss trains on, and what no loss sees: no author is in two of them.

    Columns question, answer, author.
    """

    forget: Dataset
    retain: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class Setting:
    """Attributes:
    device: what computes.
    tiny: everything small.
    smollm2, tofu: folders of the model and of the data; not needed with `tiny`.
    work: folder for what is trained on the way.
    """

    device: torch.device
    tiny: bool
    smollm2: str | None
    tofu: str | None
    work: Path
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def samples(self) -> Parts:
        """TOFU forget10 (400 samples), and twice 400 of the other authors; with `tiny`, 6 generated authors each."""
        if self.tiny:
            rows = fictitious_authors(18, 4, seed=0)
            parts = [rows[start : start + 24] for start in (0, 24, 48)]
            names = ("question", "answer", "author")
            return Parts(*(Dataset.from_list(part).select_columns(list(names)) for part in parts))
        if not self.tofu:
            raise ValueError("the environment variable TOFU must name the folder of TOFU")
        forget, rest = (load_dataset(self.tofu, name, split="train") for name in ("forget10", "retain90"))
        size = 400
        retain = rest.select(range(len(rest) - size, len(rest)))
        held_out = rest.select(range(len(rest) - 2 * size, len(rest) - size))
        return Parts(*(by_author(part, name) for part, name in ((forget, "f"), (retain, "r"), (held_out, "h"))))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tiny:
            parts = (self.samples.forget, self.samples.retain, self.samples.held_out)
            rows = [row for part in parts for row in part]
            return train_tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows])
        tokenizer = AutoTokenizer.from_pretrained(self._smollm2())
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = None  # a third of the tokens of a short question would be template
        return tokenizer

    def text_model(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """SmolLM2, or a small random Llama, on the CPU, frozen."""
        if self.tiny:
            size = dict(layers=2, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2)
            model = tiny_llama(self.tokenizer, 0, **size).to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(self._smollm2(), dtype=dtype)
        return model.eval().requires_grad_(False)

    def _smollm2(self) -> str:
        if not self.smollm2:
            raise ValueError("the environment variable SMOLLM2 must name the folder of SmolLM2-135M-Instruct")
        return self.smollm2

    def shaped(self, name: str, dtype: torch.dtype) -> LlamaForCausalLM:
        """A random Llama of one of `SHAPES` on the device, frozen."""
        shape = {**TINY, "num_key_value_heads": 2} if self.tiny else SHAPES[name]
        vocabulary = len(self.tokenizer) if self.tiny else 128_256
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, **shape)  # type: ignore[arg-type]
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
        """A model on the device, frozen; it takes the place of the one that was asked for before."""
        key = f"{name} {dtype}"
        if key not in self._kept:
            self.forget_models()
            self._kept[key] = self.text_model(dtype).to(self.device) if name == "smollm2" else self.shaped(name, dtype)
        return self._kept[key]

    def forget_models(self) -> None:
        self._kept.clear()

    def prepared(self, dataset: Dataset, **options: Any) -> Samples:
        dataset = dataset.select_columns(["question", "answer"])
        return prepare_samples(dataset, self.tokenizer, max_length=512, **options)


def by_author(part: Dataset, name: str) -> Dataset:
    """Rows of TOFU with their author: 20 in a row are one's."""
    part = part.select_columns(["question", "answer"])
    return part.add_column("author", [f"{name}{row // ROWS_PER_AUTHOR}" for row in range(len(part))])  # type: ignore[call-arg]


def random_batch(vocabulary: int, batch: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, the second half of which is the answer."""
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
