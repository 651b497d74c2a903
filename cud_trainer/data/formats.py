"""The formats samples come in, and how each becomes prompt and answer, first as text or messages, then as tokens.

Rows are tokenised many at a time. An error names a row; which one, when several are at fault, is only sure for a single
row: `cud_trainer.data.prepare` goes back to single rows when a batch fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .columns import COUNTERFACTUAL, IGNORE_INDEX
from .timeout import apply_chat_template

FORMATS = {
    "tokenised": ("input_ids", "labels"),
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
# The column that holds the answer, of the formats that have a prompt.
ANSWERS = {"prompt-completion": "completion", "question-answer": "answer", "conversational": "messages"}
# Nothing else is wanted of a tokenizer; masks are a fifth of its time.
ONLY_IDS = {"return_attention_mask": False, "return_token_type_ids": False}

Row: TypeAlias = dict[str, Any]
# Number of prompt tokens, and all tokens.
Tokens: TypeAlias = tuple[int, list[int]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless `tokenizer` can end and pad a sequence."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer '{name}' has no eos token: set `tokenizer.eos_token`")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer '{name}' has no pad token: set `tokenizer.pad_token` (for example to the eos token)"
        )


def detect_format(columns: Sequence[str], name: str) -> str:
    """The first entry of `FORMATS` whose columns are all present; `ValueError` when there is none."""
    for format_name, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return format_name
    expected = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"{name} dataset has columns {sorted(columns)}; expected one of: {expected}")


def tokenise(rows: Sequence[Row], kind: str, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[Tokens]:
    """The tokens of rows of one format.

    Args:
        kind: key of `FORMATS`.
        names: what to call each row in an error.

    Raises:
        ValueError: for a row that is malformed, named. A batch may name another one than its first.
    """
    named = list(zip(rows, names, strict=True))
    if kind == "tokenised":
        return [_given_tokens(row, tokenizer, where) for row, where in named]
    if kind == "text":
        texts = [filled(row["text"], "text", where) for row, where in named]
        return [(0, tokens) for tokens in _texts(texts, tokenizer)]
    pairs = [(*_prompt_and_completion(row, kind, tokenizer, where), where) for row, where in named]
    if not isinstance(pairs[0][0], str):  # a column has one type, so that all are messages or none
        return _chats(pairs, tokenizer)
    for _, completion, where in pairs:
        filled(completion, "completion", where)
    starts = tokenizer([prompt for prompt, _, _ in pairs], **ONLY_IDS)["input_ids"]
    wholes = tokenizer([prompt + completion for prompt, completion, _ in pairs], **ONLY_IDS)["input_ids"]
    return [_answer_from(start, whole) for start, whole in zip(starts, _with_eos(wholes, tokenizer), strict=True)]


def text_tokens(text: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Tokens of a plain text with eos at the end; `ValueError` naming `where` for an empty one."""
    return _texts([filled(text, "text", where)], tokenizer)[0]


def _texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # A long text is no reason for a warning: what does not fit is an error later, or is cut into chunks.
    return _with_eos(tokenizer(texts, verbose=False, **ONLY_IDS)["input_ids"], tokenizer)


def _prompt_and_completion(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[Any, Any]:
    """Both as strings, or both as lists of messages."""
    if kind == "conversational":
        messages = row["messages"] or []
        if not isinstance(messages, list):
            raise ValueError(f"{where}: its messages are no list")
        return messages[:-1], messages[-1:]
    if kind == "question-answer":
        question, answer = row["question"], filled(row["answer"], "answer", where)
        if not isinstance(question, str):
            raise ValueError(f"{where}: its question is missing")
        if tokenizer.chat_template:
            return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
        return f"Question: {question}\nAnswer:", f" {answer}"
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"{where}: its prompt is missing")
    if completion and isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{where}: prompt and completion must both be strings or both be lists of messages")
    return prompt, completion


def _chats(pairs: Sequence[tuple[list, list, str]], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Tokens of conversations, through the chat template."""
    for prompt, completion, where in pairs:
        for message in [*prompt, *(completion or [])]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
                raise ValueError(f"{where}: a message must have a role and a content, got {_keys(message)}")
        if not completion or completion[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's, it is what will be forgotten")
        filled(completion[-1].get("content"), "assistant message", where)
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: the data is conversational but the tokenizer has no chat template")
    # An opening with no user turn has no generation prompt to share with the full chat.
    prompts = [prompt for prompt, _, _ in pairs if prompt]
    try:
        starts = iter(_chat(tokenizer, prompts, add_generation_prompt=True) if prompts else [])
        wholes = _chat(tokenizer, [[*p, *completion] for p, completion, _ in pairs], add_generation_prompt=False)
    except (TemplateError, TypeError, TimeoutError) as error:  # TypeError: content that is no text
        raise ValueError(f"{pairs[0][2]}: the chat template refuses it: {str(error)[:200]}") from None
    return [
        _answer_from(next(starts) if prompt else [], whole) for (prompt, _, _), whole in zip(pairs, wholes, strict=True)
    ]


def _chat(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], add_generation_prompt: bool
) -> list[list[int]]:
    encoded = apply_chat_template(
        tokenizer,
        conversations,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs=ONLY_IDS,
    )
    return encoded["input_ids"]


def _answer_from(start: list[int], whole: list[int]) -> Tokens:
    """Where the answer starts: a tokenizer may merge the end of the prompt with the start of the answer."""
    if whole[: len(start)] == start:
        return len(start), whole
    shared = 0
    while shared < min(len(start), len(whole)) and start[shared] == whole[shared]:
        shared += 1
    return shared, whole


def _with_eos(sequences: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    end = tokenizer.eos_token_id
    return [tokens if tokens and tokens[-1] == end else [*tokens, end] for tokens in sequences]


def _given_tokens(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    """Of a row that is tokenised already."""
    tokens, labels = row["input_ids"], row["labels"]
    if tokens is None or labels is None:
        raise ValueError(f"{where}: its {'labels' if labels is None else 'input_ids'} are missing")
    check_tokens(tokens, "input_ids", tokenizer, where)
    check_tokens(labels, "labels", tokenizer, where, IGNORE_INDEX)
    if len(labels) != len(tokens):
        raise ValueError(f"{where}: labels and input_ids differ in length")
    start = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    if labels[start:] == tokens[start:]:
        return start, tokens
    wrong = next((p for p, label in enumerate(labels) if label not in (IGNORE_INDEX, tokens[p])), None)
    if wrong is not None:
        raise ValueError(
            f"{where}: label {labels[wrong]} at position {wrong} is neither {IGNORE_INDEX} nor the token there, "
            f"{tokens[wrong]} (labels are not shifted)"
        )
    return start, tokens


def check_tokens(tokens: Any, column: str, tokenizer: PreTrainedTokenizerBase, where: str, *also: int) -> None:
    """Raise `ValueError` unless `tokens` are a list of the tokenizer's token ids, or of what else is allowed."""
    if not isinstance(tokens, list):
        raise ValueError(f"{where}: its {column} are no list")
    size = len(tokenizer)
    if {int}.issuperset(map(type, tokens)) and all(0 <= token < size for token in {*tokens}.difference(also)):
        return
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{where}: {column} has a {type(token).__name__} at position {position}, no token id")
        if not 0 <= token < size and token not in also:
            raise ValueError(f"{where}: {column} has {token} at position {position}, the tokenizer has {size} tokens")


def filled(value: Any, what: str, where: str) -> str:
    """`value`, a string that is not blank; `ValueError` naming `where` for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: its {what} is empty")
    return value


def _keys(message: Any) -> str:
    """What a malformed message looks like, without its text."""
    return f"the keys {sorted(message)}" if isinstance(message, dict) else f"a {type(message).__name__}"


def question_and_answer(row: Row, kind: str) -> tuple[str, str]:
    """What is asked last and what is answered, as text; of a row that `prepare_dataset` accepts, not `text`."""
    if kind == "question-answer":
        return row["question"], row["answer"]
    if kind == "conversational":
        turns = row["messages"]
        prompt, completion = turns[:-1], turns[-1:]
    else:
        prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return prompt, completion
    asked = next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")
    return asked, completion[-1]["content"]


def tokenise_answer(
    row: Row, kind: str, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row with `text` for its answer."""
    answer: Any = text
    if kind == "conversational":
        answer = [*row["messages"][:-1], {"role": "assistant", "content": text}]
    elif kind == "prompt-completion" and not isinstance(row["completion"], str):
        answer = [*row["completion"][:-1], {"role": "assistant", "content": text}]
    elif kind == "prompt-completion" and row["completion"][:1].isspace() and not text[:1].isspace():
        answer = row["completion"][0] + text  # the same separation from the prompt
    prompt, tokens = tokenise([{**row, ANSWERS[kind]: answer}], kind, tokenizer, [where])[0]
    return {"input_ids": tokens, "labels": [IGNORE_INDEX] * prompt + tokens[prompt:]}


def counterfactuals(
    rows: Sequence[Row],
    kind: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenised: Sequence[Tokens],
    names: Sequence[str],
) -> list[list[int]]:
    """The tokens of each row with another answer, from `column`, in place of its own, aligned token by token.

    Args and errors: see `tokenise`; `tokenised` is what it returned for `rows`.
    """
    others: list[Row] = []
    sizes: list[int] = []
    for row, where in zip(rows, names, strict=True):
        if kind not in ("prompt-completion", "question-answer") or not isinstance(row[ANSWERS[kind]], str):
            raise ValueError(
                f"{where}: counterfactual answers need question + answer or prompt + completion as text "
                f"(or a column {COUNTERFACTUAL} beside input_ids)"
            )
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        if not texts:
            raise ValueError(f"{where}: its {column} is empty")
        others += [{**row, ANSWERS[kind]: filled(text, column, where)} for text in texts]
        sizes.append(len(texts))
    whose = [where for where, size in zip(names, sizes, strict=True) for _ in range(size)]
    rivals = iter(tokenise(others, kind, tokenizer, whose))
    return [
        _aligned(prompt, tokens, [next(rivals)[1] for _ in range(size)])
        for (prompt, tokens), size in zip(tokenised, sizes, strict=True)
    ]


def _aligned(prompt: int, tokens: list[int], rivals: list[list[int]]) -> list[int]:
    """The rival nearest in length, cut or filled with the answer's own last tokens to that length."""
    nearest = min(rivals, key=lambda rival: abs(len(rival) - len(tokens)))
    # the sample's own end of sequence stays in its place
    body = nearest[prompt : len(tokens) - 1] if len(nearest) >= len(tokens) else nearest[prompt:-1]
    return [*tokens[:prompt], *body, *tokens[prompt + len(body) :]]
