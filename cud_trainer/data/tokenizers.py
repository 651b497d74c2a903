"""Tokenizers as the options want them, before any data is prepared."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOKENIZER_OPTIONS = ("pad_token", "eos_token", "chat_template", "chat_template_path")


@dataclass
class TokenizerArguments:
    """Options of tokenizers that are TRL's in `cud score` and `cud train`."""

    pad_token: str | None = field(
        default=None, metadata={"help": "Token that pads; by default the tokenizer's own, else its eos token."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends an answer; by default the tokenizer's own."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "A .jinja file with a chat template, or the folder or id of a model whose template is taken."
        },
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless `tokenizer` can end a sequence; one without a pad token takes the eos token, as in TRL.

    Padding is masked everywhere, so that it does not matter which token it is.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer '{name}' has no eos token: give eos_token, or set `tokenizer.eos_token`")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(f"tokenizer '{name}' has no pad token: its eos token {tokenizer.eos_token!r} pads, as in TRL")


def ready_tokenizer(
    tokenizer: Any,
    *,
    pad_token: str | None = None,
    eos_token: str | None = None,
    chat_template: str | None = None,
    chat_template_path: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer (of a processor, its own) with these tokens and this chat template, set in place.

    Args:
        pad_token, eos_token: of its vocabulary; by default its own.
        chat_template: a template, or the path of a file with one.
        chat_template_path: as in TRL: a `.jinja` file, or the folder or id of a model whose template is taken.

    Raises:
        ValueError: for a token that is not in the vocabulary, a template that cannot be read, or no tokenizer at all.
    """
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class must be a tokenizer or a processor with one, got {type(tokenizer).__name__}"
        )
    if chat_template is not None and chat_template_path is not None:
        raise ValueError("chat_template and chat_template_path are two templates: give one of them")
    vocabulary = tokenizer.get_vocab() if pad_token or eos_token else {}
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token and token not in vocabulary:
            raise ValueError(f"{name} {token!r} is not in the vocabulary of the tokenizer")
        if token:
            setattr(tokenizer, name, token)
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    elif chat_template_path is not None:
        tokenizer.chat_template = _template_at(chat_template_path, tokenizer)
    check_tokenizer(tokenizer)
    return tokenizer


def tokenizer_options(args: Any) -> dict[str, Any]:
    """The keyword arguments of `ready_tokenizer` among some options."""
    return {name: getattr(args, name, None) for name in TOKENIZER_OPTIONS}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> None:
    """Raise `ValueError` where the tokenizer has tokens for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    size = 1 + max(tokenizer.get_vocab().values(), default=0)
    if rows and size > rows:  # a model whose weights are elsewhere has none
        raise ValueError(
            f"the tokenizer has {size} tokens, more than the {rows} rows of the model's embeddings: give the tokenizer "
            "that belongs to the model, or resize its embeddings (`model.resize_token_embeddings`) and train them"
        )


def _template(text: str) -> str:
    """The template itself, or what the file of that name holds."""
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template {text!r} is no template, and no file that can be read: {error}") from None


def _template_at(path: str, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return _template(path)
    try:
        source = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"chat_template_path {path!r} holds no chat template: {str(error)[:200]}") from None
    if not source.chat_template:
        raise ValueError(f"the tokenizer at chat_template_path {path!r} has no chat template")
    lacking = sorted(set(source.get_added_vocab()) - set(tokenizer.get_vocab()))
    if lacking:
        raise ValueError(
            f"the chat template at {path!r} is for a tokenizer with tokens that this one lacks ({lacking[0]!r}): "
            "add them to the model first, or give chat_template"
        )
    if source.eos_token is not None and source.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = source.eos_token  # the turn of that template ends with it
    return source.chat_template
