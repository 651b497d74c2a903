"""A byte-level tokenizer fitted to the generated text, and a small Llama from scratch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to `texts`, with pad and eos tokens and no chat template.

    Args:
        texts: what the merges are learned from; any other text still round-trips, in more tokens.
        vocab_size: upper limit, at least 258 (256 bytes, pad, eos).

    Raises:
        ValueError: for a vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (all bytes, pad and eos), got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(list(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN)


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    layers: int = 4,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    max_positions: int = 128,
    initializer_range: float = 0.04,
) -> LlamaForCausalLM:
    """Llama from scratch: grouped-query attention, tied embeddings, float32, in evaluation mode.

    The global random state is left as it was.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        seed: of the initial weights.
        max_positions: longest sequence, in tokens.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
