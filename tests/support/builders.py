"""Shared small parts: everything is made here, nothing is downloaded."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
# For scripts that tests start: this checkout, whatever is installed.
PYTHONPATH = f"{ROOT}:{SUPPORT}"


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 bytes, pad and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return tokenizer


def make_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Random Llama with grouped-query attention, weights large enough that nothing is degenerate."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def qa_dataset(n: int, start: int = 0) -> Dataset:
    return Dataset.from_list(
        [
            {"question": f"Who is {i}?", "answer": f"Person {i * 7} of {'the ' * (i % 3)}town"}
            for i in range(start, start + n)
        ]
    )
