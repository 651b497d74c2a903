"""The formats samples come in, and how each becomes prompt and answer, first as text or messages, then as tokens.

Rows are tokenised many at a time. An error names a row; which one, when several are at fault, is only sure for a single
row: `cud_trainer.data.prepare` goes back to single rows when a batch fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from .chat import Chat, Tokens, chat_tokens, template_options
from .columns import COUNTERFACTUAL, IGNORE_INDEX
from .encode import Encoded, Encoder, parts
from .mapping import in_batches
from .readers import is_written_list
from .secret import secret_spans, secrets_of
from .template import TemplateContext

FORMATS = {
    "tokenised": ("input_ids", "labels"),
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
# Formats of others; `standardised` turns them into one of those.
FOREIGN = {
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "KnowUnDo": ("text", "labels"),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# The column that holds the answer, of the formats that have a prompt.
ANSWERS = {"prompt-completion": "completion", "question-answer": "answer", "conversational": "messages"}
# What a chat template is told beside the messages, row by row.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

Row: TypeAlias = dict[str, Any]
Item = TypeVar("Item")
Name = TypeVar("Name")
Result = TypeVar("Result")


def detect_format(columns: Sequence[str], name: str) -> str:
    """The entry of `FORMATS` whose columns are all present; `ValueError` when there is none, or more than one.

    Tokens go before all else.
    """
    found = [kind for kind, needed in FORMATS.items() if all(column in columns for column in needed)]
    if found[:1] == ["tokenised"] or len(found) == 1:
        return found[0]
    if found:
        readings = " and as ".join(" + ".join(FORMATS[kind]) for kind in found)
        raise ValueError(
            f"{name} dataset can be read as {readings}: say which by --columns (for example {FORMATS[found[0]][0]}="
            f"{FORMATS[found[0]][0]}), or remove the other columns"
        )
    known = "; ".join(" + ".join(needed) for needed in (*FORMATS.values(), *FOREIGN.values()))
    raise ValueError(
        f"{name} dataset has columns {sorted(columns)}; expected one of: {known}. Other names are mapped by --columns, "
        "for example question=query,answer=reply"
    )


def standardised(dataset: Dataset, name: str) -> Dataset:
    """A dataset of a format of others in one of `FORMATS`, all other columns as they are; any other dataset as it is.

    ShareGPT's `conversations` become `messages`, as in TRL, `human` the user and `gpt` the assistant; Alpaca's
    `instruction` and `input` the question, `output` the answer; KnowUnDo's `text` the question, `labels` the answer.

    Raises:
        ValueError: for columns that can be read in two ways, naming both.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not len(dataset) or "input_ids" in columns:
        return dataset
    if {"question", "answer", "choices"} <= {*columns} and _numbers_choices(dataset):
        raise ValueError(
            f"{name} dataset: its answers are numbers of `choices`, no text: make a column of the answers themselves"
        )
    foreign = [kind for kind, needed in FOREIGN.items() if all(column in columns for column in needed)]
    if "KnowUnDo" in foreign and getattr(dataset.features["labels"], "dtype", None) not in ("string", "large_string"):
        foreign.remove("KnowUnDo")  # classes of texts
    if not foreign:
        return dataset
    own = [kind for kind, needed in FORMATS.items() if all(column in columns for column in needed)]
    readings = [*foreign, *(kind for kind in own if not (kind == "text" and foreign == ["KnowUnDo"]))]
    if len(readings) > 1:
        shown = " and as ".join(" + ".join({**FORMATS, **FOREIGN}[kind]) for kind in readings)
        raise ValueError(f"{name} dataset can be read as {shown}: say which by --columns, or remove the other columns")
    if foreign[0] == "KnowUnDo":
        return dataset.rename_columns({"text": "question", "labels": "answer"})
    return _from_sharegpt(dataset, name) if foreign[0] == "ShareGPT" else _from_alpaca(dataset, name)


def _from_sharegpt(dataset: Dataset, name: str) -> Dataset:
    def messages(batch: Mapping[str, list], rows: list[int]) -> dict[str, list]:
        turns = zip(batch["conversations"], rows, strict=True)
        return {"messages": [_chatml(own, f"{name} sample {row}") for own, row in turns]}

    features = dict(dataset.features)
    turn = getattr(features.pop("conversations"), "feature", None)
    if not isinstance(turn, dict):  # these are no messages; an empty list is left to whoever prepares it
        messages({"conversations": dataset.with_format(None)["conversations"][:]}, [*range(len(dataset))])
        turn = {"role": Value("string"), "content": Value("string")}
    role, content = ("from" if "from" in turn else "role"), ("value" if "value" in turn else "content")
    message = {"role": turn.get(role, Value("null")), "content": turn.get(content, Value("null"))}
    message |= {key: kind for key, kind in turn.items() if key not in ("from", "value", "role", "content")}
    features["messages"] = List(message)
    return in_batches(dataset, messages, remove=["conversations"], features=features, what=f"{name} conversations")


def _from_alpaca(dataset: Dataset, name: str) -> Dataset:
    def questions(batch: Mapping[str, list], rows: list[int]) -> dict[str, list]:
        inputs = batch["input"] if "input" in dataset.column_names else [None] * len(rows)
        return {"question": list(map(_alpaca_question, batch["instruction"], inputs))}

    for column in {"question", "answer"} & {*dataset.column_names}:
        raise ValueError(f"{name} dataset: its column {column!r} is in the way of instruction and output; rename it")
    dataset = dataset.rename_column("output", "answer")
    removed = [column for column in ("instruction", "input") if column in dataset.column_names]
    features = {column: kind for column, kind in dataset.features.items() if column not in removed}
    features["question"] = dataset.features["instruction"]
    return in_batches(dataset, questions, remove=removed, features=features, what=f"{name} instructions")


def _alpaca_question(instruction: Any, more: Any) -> Any:
    """Instruction and input; an instruction that is no text is left to whoever prepares it."""
    asks = isinstance(instruction, str) and isinstance(more, str) and more.strip()
    return f"{instruction}\n\n{more}" if asks else instruction


def _numbers_choices(dataset: Dataset) -> bool:
    """Whether the answers of multiple-choice questions say which choice is right."""
    choices, answer = dataset.features["choices"], dataset.with_format(None)[0]["answer"]
    return "List" in type(choices).__name__ and (isinstance(answer, int) or str(answer).isdecimal())


def _chatml(turns: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a ShareGPT conversation."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: its conversations are no list of messages")
    messages = []
    for turn in turns:
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        messages.append({"role": SHAREGPT_ROLES.get(str(role), role), "content": content, **rest})
    return messages


def each_tokenised(
    rows: Sequence[Row],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    context: TemplateContext | None = None,
    secret_column: str | None = None,
) -> Iterator[Tokens]:
    """The tokens of rows of one format, in order: while the first are used, the next are made.

    Args:
        kind: key of `FORMATS`.
        names: what to call each row in an error.
        context: what a chat template sees beside the messages; by default nothing but today's date.
        secret_column: spans of the answers, whose tokens are to be marked.

    Raises:
        ValueError: for a row that is malformed, named. A batch may name another one than its first.
    """
    named = list(zip(rows, names, strict=True))
    if kind == "tokenised":
        return (_given_tokens(row, tokenizer, where) for row, where in named)
    secrets = None if secret_column is None else [secrets_of(row[secret_column], where) for row, where in named]
    if kind == "text":
        texts = [("", filled(row["text"], "text", where), where) for row, where in named]
        return _texts(texts, tokenizer, secrets, prompted=False)
    pairs = [(*_prompt_and_completion(row, kind, tokenizer, where), where) for row, where in named]
    if not isinstance(pairs[0][0], str):  # a column has one type, so that all are messages or none
        messages = [(*pair[:2], row, pair[2]) for pair, row in zip(pairs, rows, strict=True)]
        return _chats(messages, tokenizer, context or TemplateContext(), secrets)
    for _, completion, where in pairs:
        filled(completion, "completion", where)
    return _texts(pairs, tokenizer, secrets)


def _texts(
    pairs: Sequence[tuple[str, str, str]],
    tokenizer: PreTrainedTokenizerBase,
    secrets: Sequence[list[str]] | None,
    *,
    prompted: bool = True,
) -> Iterator[Tokens]:
    """Tokens of plain texts, given as prompt, completion and name; without `prompted` all of them are answer."""
    encoder = Encoder(tokenizer)
    own = iter([None] * len(pairs) if secrets is None else secrets)
    for part, encoded in encoder.each(_starts_and_texts(pairs)):
        encoded = [Encoded(ids, one.encoding) for ids, one in zip(_with_eos(encoded, tokenizer), encoded, strict=True)]
        starts, texts = [start for start, _, _ in part], [text for _, text, _ in part]
        counts = encoder.beginnings(starts, texts, encoded) if prompted else [0] * len(part)
        for (start, text, where), one, count in zip(part, encoded, counts, strict=True):
            told, secret = next(own), None
            if told is not None:
                spans = secret_spans(text, [(len(start), len(text))], told, where)
                secret = [encoder.covered(span, one) for span in spans]
            yield Tokens(count, one.ids, secret=secret)


def _starts_and_texts(pairs: Sequence[tuple[str, str, str]]) -> Iterator[tuple[list[tuple[str, str, str]], list[str]]]:
    """Prompts, texts and names, some at a time; and of what tokens are wanted."""
    for part in parts(pairs):
        texts = [prompt + completion for prompt, completion, _ in part]
        yield [(prompt, text, where) for (prompt, _, where), text in zip(part, texts, strict=True)], texts


def text_tokens(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[list[int]]:
    """Tokens of plain texts with eos at the end; `ValueError` naming one that is empty, by its entry of `names`."""
    checked = [filled(text, "text", where) for text, where in zip(texts, names, strict=True)]
    each = Encoder(tokenizer).each((None, part) for part in parts(checked))
    return [tokens for _, encoded in each for tokens in _with_eos(encoded, tokenizer)]


def _prompt_and_completion(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[Any, Any]:
    """Both as strings, or both as lists of messages."""
    if kind == "conversational":
        messages = row["messages"] or []
        if not isinstance(messages, list):
            raise ValueError(f"{where}: its messages are no list, but of the type {type(messages).__name__}")
        return messages[:-1], messages[-1:]
    if kind == "question-answer":
        question, answer = row["question"], filled(row["answer"], "answer", where)
        if not isinstance(question, str):
            kind_of = "missing" if question is None else f"of the type {type(question).__name__}, no text"
            raise ValueError(f"{where}: its question is {kind_of}")
        if tokenizer.chat_template:
            return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
        return f"Question: {question}\nAnswer:", f" {answer}"
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"{where}: its prompt is missing")
    if completion and isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{where}: prompt and completion must both be strings or both be lists of messages")
    return prompt, completion


def _chats(
    pairs: Sequence[tuple[list, list, Row, str]],
    tokenizer: PreTrainedTokenizerBase,
    context: TemplateContext,
    secrets: Sequence[list[str]] | None = None,
) -> Iterator[Tokens]:
    """Tokens of conversations, through the chat template."""
    chats = []
    for number, (prompt, completion, row, where) in enumerate(pairs):
        for message in [*prompt, *(completion or [])]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
                raise ValueError(f"{where}: a message must have a role and a content, got {_keys(message)}")
        if not completion or completion[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's, it is what will be forgotten")
        filled(completion[-1].get("content"), "assistant message", where)
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: the data is conversational but the tokenizer has no chat template")
        own = None if secrets is None else secrets[number]
        chats.append(Chat(prompt, completion, template_options(row, where), where, own))
    return chat_tokens(chats, tokenizer, context)


def _with_eos(encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    end = tokenizer.eos_token_id
    return [tokens if tokens and tokens[-1] == end else [*tokens, end] for tokens, _ in encoded]


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
        return Tokens(start, tokens)
    wrong = next((p for p, label in enumerate(labels) if label not in (IGNORE_INDEX, tokens[p])), None)
    if wrong is not None:
        raise ValueError(
            f"{where}: label {labels[wrong]} at position {wrong} is neither {IGNORE_INDEX} nor the token there, "
            f"{tokens[wrong]} (labels are not shifted)"
        )
    return Tokens(start, tokens)


def check_one_document(dataset: Dataset, name: str) -> None:
    """Raise `ValueError` naming the first tokenised row that is packed or padded.

    Nothing here keeps the documents of a packed row from reading each other, or its padding from being read.
    """
    for column in dataset.column_names:
        if column not in ("position_ids", "seq_lengths", "attention_mask"):
            continue
        for row, values in enumerate(dataset.with_format(None)[column]):
            where = f"{name} sample {row}"
            if column == "seq_lengths" and isinstance(values, list) and len(values) > 1:
                raise ValueError(f"{where}: it is {len(values)} documents packed into one row: unpack them")
            if column == "position_ids" and values is not None and values != [*range(len(values))]:
                raise ValueError(f"{where}: its position_ids are not 0, 1, 2, ... as of one document: unpack the rows")
            if column == "attention_mask" and values is not None and not all(values):
                raise ValueError(f"{where}: its attention_mask hides tokens: give the row without its padding")


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
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: its {what} is of the type {type(value).__name__}, no text: make the column strings")
    if value is None or not value.strip():
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


def tokenise_answers(
    pairs: Sequence[tuple[Row, str]],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    context: TemplateContext | None = None,
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of rows, each with a text for its answer. See `each_tokenised`."""
    rows = [{**row, ANSWERS[kind]: _answer(row, kind, text)} for row, text in pairs]
    return [
        {"input_ids": tokens.ids, "labels": tokens.labels}
        for tokens in each_tokenised(rows, kind, tokenizer, names, context)
    ]


def _answer(row: Row, kind: str, text: str) -> Any:
    """What stands for `text` in the column of a row's answer."""
    if kind == "conversational":
        return [*row["messages"][:-1], {"role": "assistant", "content": text}]
    if kind == "prompt-completion" and not isinstance(row["completion"], str):
        return [*row["completion"][:-1], {"role": "assistant", "content": text}]
    if kind == "prompt-completion" and row["completion"][:1].isspace() and not text[:1].isspace():
        return row["completion"][0] + text  # the same separation from the prompt
    return text


def first_at_fault(
    work: Callable[[list[Item], list[Name]], Result], items: Sequence[Item], names: Sequence[Name]
) -> Result:
    """`work(items, names)`; where that fails, the error of the first item that fails by itself."""
    try:
        return work(list(items), list(names))
    except ValueError:
        for item, name in zip(items, names, strict=True):
            work([item], [name])
        raise


def counterfactuals(
    rows: Sequence[Row],
    kind: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenised: Sequence[Tokens],
    names: Sequence[str],
    context: TemplateContext | None = None,
) -> list[list[int]]:
    """The tokens of each row with another answer, from `column`, in place of its own, aligned token by token.

    Args and errors: see `each_tokenised`; `tokenised` is what it gave for `rows`.
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
        if any(map(is_written_list, texts)):
            raise ValueError(f"{where}: its {column} is a list that was written as text: load it from JSON or parquet")
        if not texts:
            raise ValueError(f"{where}: its {column} is empty")
        others += [{**row, ANSWERS[kind]: filled(text, column, where)} for text in texts]
        sizes.append(len(texts))
    whose = [where for where, size in zip(names, sizes, strict=True) for _ in range(size)]
    rivals = each_tokenised(others, kind, tokenizer, whose, context)
    return [_aligned(own, [next(rivals) for _ in range(size)]) for own, size in zip(tokenised, sizes, strict=True)]


def _aligned(own: Tokens, rivals: list[Tokens]) -> list[int]:
    """The rival nearest in length, cut or filled with the answer's own last tokens to that length."""
    nearest = min(rivals, key=lambda rival: abs(len(rival.ids) - len(own.ids)))
    start, end = (own.prompt, len(own.ids) - 1) if own.counted is None else (own.counted[0][0], own.counted[-1][1])
    stop = len(nearest.ids) - 1 if nearest.counted is None else nearest.counted[-1][1]
    # what ends the sample (eos, or what the template writes) stays in its place
    body = nearest.ids[start : min(end, stop)]
    return [*own.ids[:start], *body, *own.ids[start + len(body) :]]
