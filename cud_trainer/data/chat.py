"""Conversations as tokens: what the template writes, what of it is trained on, and what of it counts.

Trained on (labels) is all that the template writes behind the prompt, as in TRL: an empty think block, the end of the
turn, a line break. What counts is what the message itself says: every figure of how well an answer is known is made of
its own tokens, for the template's are likely in any model and would flatter it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .columns import IGNORE_INDEX
from .encode import Encoder, Span, parts
from .secret import secret_spans
from .template import DATE_STRING, TRAIN_ON, Renderer, TemplateContext

# Other names for what an assistant thinks before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")
OPENERS = {"system", "developer"}
THINKS, ANSWERS_NOW = "<think>", "</think>"


class Tokens(NamedTuple):
    """A sample as tokens.

    Attributes:
        prompt: number of its first tokens that are not trained on.
        ids: all of them.
        counted: where the tokens stand that figures are made of, from, to; `None` for all that are trained on.
        undated: prompt and tokens as they would be on no day in particular; `None` where the template writes no date.
        earlier: answers of the assistant in the prompt.
        opens: whether nobody has spoken before: what counts is then all that is trained on.
        secret: where the tokens of the secret in the answer stand; `None` where nobody asks for it.
    """

    prompt: int
    ids: list[int]
    counted: list[Span] | None = None
    undated: tuple[int, list[int]] | None = None
    earlier: int = 0
    opens: bool = False
    secret: list[Span] | None = None

    @property
    def trained(self) -> list[Span]:
        """Where the tokens stand that are trained on, from, to."""
        return self.counted if self.opens and self.counted is not None else [(self.prompt, len(self.ids))]

    @property
    def labels(self) -> list[int]:
        """`ids`, -100 for what is not trained on."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, end in self.trained:
            labels[start:end] = self.ids[start:end]
        return labels


class Chat(NamedTuple):
    """A conversation, what the template is told beside it (`tools`, variables), and the secrets in its answer."""

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    options: dict[str, Any]
    where: str
    secrets: list[str] | None = None


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tools` and variables of the template from the columns of a row, as in TRL; `ValueError` for malformed ones."""
    options = {}
    given = row.get("chat_template_kwargs")
    for name, value, kind in (
        ("tools", row.get("tools"), list),
        ("chat_template_kwargs", given, dict),
    ):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise ValueError(f"{where}: its {name} are no JSON") from None
        if value is None:
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{where}: its {name} are a {type(value).__name__}, no {kind.__name__}")
        if name == "tools":
            options["tools"] = value
        else:  # a column has the keys of all rows
            options |= {key: one for key, one in dict(value).items() if one is not None}
    return options


def chat_tokens(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, context: TemplateContext
) -> Iterator[Tokens]:
    """Tokens of conversations whose last message is the assistant's, in order.

    Raises:
        ValueError: for a conversation that the template refuses, or does not write as it is, naming one of them.
    """
    encoder = Encoder(tokenizer, special=False)
    for written, encoded in encoder.each(_written_parts(chats, tokenizer, context)):
        wholes, undated = encoded[: len(written.chats)], encoded[len(written.chats) :]
        starts = encoder.beginnings(written.starts, written.wholes, wholes)
        for row, chat in enumerate(written.chats):
            ids = wholes[row].ids
            spans = [encoder.covered(span, wholes[row]) for span in written.spans[row]]
            secret = None
            if chat.secrets is not None:
                places = secret_spans(written.wholes[row], written.spans[row], chat.secrets, chat.where)
                secret = [encoder.covered(place, wholes[row]) for place in places]
            first = spans[0][0]
            asked = _is_asked(chat)
            answers_only = context.train_on == "answer" and any(_split(message)[0] for message in chat.completion)
            # An opening has no generation prompt to share with the full chat.
            prompt = first if not asked or answers_only else min(starts[row], first)
            canonical = (_same_end(ids[prompt:], undated[row].ids), undated[row].ids) if undated else None
            earlier = sum(message["role"] == "assistant" for message in chat.prompt)
            yield Tokens(prompt, ids, spans, canonical, earlier, opens=not asked, secret=secret)


class _Written(NamedTuple):
    """What the template makes of conversations.

    Attributes:
        starts: the texts of the prompts, up to where the answer is to begin; empty for a prompt without a turn.
        wholes: the texts of the conversations.
        spans: the characters of each that count.
    """

    chats: Sequence[Chat]
    starts: list[str]
    wholes: list[str]
    spans: list[list[Span]]


def _written_parts(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, context: TemplateContext
) -> Iterator[tuple[_Written, list[str]]]:
    """What the template makes of conversations, some at a time, each with the texts of which tokens are wanted.

    These are the conversations; and where the template may write a date, the same on no day in particular.
    """
    renderer = Renderer(tokenizer, context)
    marks: dict[Any, tuple[str, str]] = {}
    undated = Renderer(tokenizer, context.undated())
    try:
        dated = renderer.may_write_the_date([chat.options for chat in chats])
        for part in parts(chats):
            starts, wholes = _texts(part, renderer)
            texts = wholes
            if dated:
                still = [
                    chat._replace(options={k: v for k, v in chat.options.items() if k != DATE_STRING}) for chat in part
                ]
                texts = wholes + _whole_texts(still, undated)
            yield _Written(part, starts, wholes, _spans(part, starts, wholes, renderer, marks)), texts
    except (TemplateError, TypeError, TimeoutError) as error:  # TypeError: content that is no text
        raise ValueError(f"{chats[0].where}: the chat template refuses it: {str(error)[:200]}") from None


def _same_end(end: list[int], whole: list[int]) -> int:
    """Where the same end begins in another sequence; 0 where it ends otherwise."""
    start = len(whole) - len(end)
    return start if start >= 0 and whole[start:] == end else 0


def _is_asked(chat: Chat) -> bool:
    """Whether somebody has spoken before the answer."""
    return not {message["role"] for message in chat.prompt} <= OPENERS


def _texts(chats: Sequence[Chat], renderer: Renderer) -> tuple[list[str], list[str]]:
    """What the template makes of every prompt (nothing of one without a turn), and of every conversation."""
    context = renderer.context
    asked = [chat for chat in chats if _is_asked(chat)]
    starts = iter(
        renderer(
            [context.conversation(chat.prompt) for chat in asked],
            [chat.options for chat in asked],
            generation_prompt=True,
        )
    )
    have = {id(chat) for chat in asked}
    return [next(starts) if id(chat) in have else "" for chat in chats], _whole_texts(chats, renderer)


def _whole_texts(chats: Sequence[Chat], renderer: Renderer) -> list[str]:
    return renderer(
        [renderer.context.conversation([*chat.prompt, *chat.completion]) for chat in chats],
        [chat.options for chat in chats],
    )


def _spans(
    chats: Sequence[Chat], starts: list[str], wholes: list[str], renderer: Renderer, known: dict[Any, tuple[str, str]]
) -> list[list[Span]]:
    """Where the text of what counts stands in every conversation, in characters.

    It is found by writing the conversation once more, with marks in its place. Where that showed for one of the same
    shape what stands between the prompt and the answer, and behind it, and the same stands there, it is not done again.

    Args:
        known: these two by shape; what is found out is added.
    """
    spans: dict[int, list[Span]] = {}
    shapes = [_shape(chat) for chat in chats]

    def by_marks(rows: list[int]) -> None:
        marked, marks = _marked([chats[row] for row in rows], renderer, renderer.context)
        for row, text, parts_of_row in zip(rows, marked, marks, strict=True):
            spans[row] = _said(wholes[row], text, parts_of_row, chats[row].where)
            before, mark, behind = text.partition(parts_of_row[0][0])
            if shapes[row] is not None and mark and before.startswith(starts[row]):
                known.setdefault(shapes[row], (before[len(starts[row]) :], behind))

    new = {shape: row for row, shape in reversed([*enumerate(shapes)]) if shape not in known}
    by_marks(sorted({*new.values()} | {row for row, shape in enumerate(shapes) if shape is None}))
    for row, chat in enumerate(chats):
        if row in spans or shapes[row] not in known:
            continue
        between, behind = known[shapes[row]]
        if wholes[row].startswith(starts[row] + between):
            found = _written(wholes[row], len(starts[row]) + len(between), chat.completion[0]["content"], behind)
            if found is not None:
                spans[row] = [found]
    by_marks([row for row in range(len(chats)) if row not in spans])
    return [spans[row] for row in range(len(chats))]


def _shape(chat: Chat) -> Any:
    """What conversations have in common of which only the texts differ; `None` where more than one text counts."""
    only = chat.completion[0]
    if len(chat.completion) > 1 or ANSWERS_NOW in only["content"] or any(map(only.get, REASONING)):
        return None
    return tuple([message["role"] for message in chat.prompt]), repr(chat.options) if chat.options else ""


def _marked(
    chats: Sequence[Chat], renderer: Renderer, context: TemplateContext
) -> tuple[list[str], list[list[tuple[str, str, bool]]]]:
    """Every conversation with marks in place of what is to be said; and the marks, with what they stand for."""
    conversations, parts = [], []
    for chat in chats:
        messages: list[dict[str, Any]] = list(chat.prompt)
        marks: list[tuple[str, str, bool]] = []
        for message in chat.completion:
            if message["role"] == "assistant" and isinstance(message.get("content"), str) and message["content"]:
                message = _with_marks(message, marks, context.train_on == TRAIN_ON[0], chat.where)
            messages.append(message)
        conversations.append(context.conversation(messages))
        parts.append(marks)
    return renderer(conversations, [chat.options for chat in chats]), parts


def _with_marks(
    message: dict[str, Any], marks: list[tuple[str, str, bool]], all_counts: bool, where: str
) -> dict[str, Any]:
    """A message with marks for its reasoning and answer, which are added to `marks`: mark, text, whether it counts."""

    def mark(text: str, counts: bool) -> str:
        name = f"\ue000{len(marks)}\ue001"  # characters that no text has and no template changes
        marks.append((name, text, counts))
        return name

    reasoning, answer = _split(message)
    if not answer.strip():
        raise ValueError(f"{where}: its assistant message says nothing behind the reasoning")
    made = dict(message)
    content = message["content"]
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            made[name] = mark(message[name], all_counts)
    if ANSWERS_NOW in content:
        head = content[: len(content) - len(answer)]
        if reasoning and reasoning in head and not any(isinstance(message.get(name), str) for name in REASONING):
            before, after = head.split(reasoning, 1)
            head = before + mark(reasoning, all_counts) + after
        made["content"] = head + mark(answer, True)
    else:
        made["content"] = mark(answer, True)
    return made


def _split(message: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning and answer of a message; the reasoning is empty where there is none."""
    content = message.get("content")
    content = content if isinstance(content, str) else ""
    apart = next((message[n] for n in REASONING if isinstance(message.get(n), str) and message[n].strip()), "")
    if ANSWERS_NOW not in content:
        return apart, content
    head, _, answer = content.rpartition(ANSWERS_NOW)
    return apart or head.rpartition(THINKS)[2].strip(), answer.lstrip("\n") if answer.strip() else ""


def _said(whole: str, marked: str, parts: list[tuple[str, str, bool]], where: str) -> list[Span]:
    """Where the text of what counts stands in what the template wrote, in characters; `ValueError` if it does not."""
    spans: list[Span] = []
    position, rest = 0, marked
    for number, (mark, text, counts) in enumerate(parts):
        if rest.count(mark) != 1:
            if not counts:
                continue  # reasoning that is not asked for
            raise ValueError(f"{where}: {_dropped(parts, number)}")
        before, rest = rest.split(mark)
        known = [one for one, _, _ in parts[number + 1 :] if one in rest]
        behind = rest.split(known[0])[0] if known else rest
        found = _written(whole, position + len(before), text, behind) if whole.startswith(before, position) else None
        if found is None:
            return _by_search(whole, parts, where)
        if counts:
            spans.append(found)
        position = found[1]
    return spans


def _written(whole: str, start: int, text: str, behind: str) -> Span | None:
    """The text at `start`, as it is or without the blanks around it, with `behind` behind it."""
    if whole.startswith(text + behind, start):
        return start, start + len(text)
    forms = (text.strip(), text.strip("\n"), text.lstrip(), text.rstrip(), text.lstrip("\n"), text.rstrip("\n"))
    for form in dict.fromkeys(forms):
        if whole.startswith(form + behind, start):
            return start, start + len(form)
    return None


def _by_search(whole: str, parts: list[tuple[str, str, bool]], where: str) -> list[Span]:
    """The texts in what the template wrote, each in one place only, for a template that minds what is said."""
    spans = []
    for number, (_, text, counts) in enumerate(parts):
        if not counts:
            continue
        if whole.count(text.strip()) != 1:
            raise ValueError(f"{where}: {_dropped(parts, number)}")
        start = whole.index(text.strip())
        spans.append((start, start + len(text.strip())))
    return spans


def _dropped(parts: list[tuple[str, str, bool]], number: int) -> str:
    """What the template does not write."""
    if number + 1 < len(parts) and sum(counts for _, _, counts in parts) > 1:
        return (
            "the chat template does not write the reasoning of the assistant's message as it is: give the option "
            "train_on 'answer' to forget the answer alone, or another chat_template"
        )
    return (
        "the chat template does not write the assistant's message as it is (it changes or drops it), so that "
        "something else would be forgotten: give another chat_template"
    )
