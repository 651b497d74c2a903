"""What a chat template sees beside the messages. A run fixes it once: its date, too."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .timeout import apply_chat_template
from .verbatim import Written, read_off, shape_of, with_places, writes_verbatim

TRAIN_ON = ("reasoning+answer", "answer")
# Ids and fingerprints are those of this day, whatever day it is.
NO_DAY = datetime.date(2000, 1, 1)
# What Llama 3 calls its date, and how people write one.
DATE_STRING = "date_string"
WRITTEN = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%b %d, %Y", "%d.%m.%Y", "%d/%m/%Y")

DIRECTIVES = tuple(f"%{sign}{letter}" for sign in ("-", "") for letter in "aAbBcdDeFGgHIjmMpRSTuUVwWxXyYZz")
# Templates ask the clock by `strftime_now`. Only strings reach them from outside, so that the clock is one of theirs:
# a macro of that name, in a line of its own so that what follows is read as it would be without.
OWN_CLOCK = (
    "{% macro strftime_now(form) %}"
    "{% set written = namespace(text=form | replace('%%', '\ue002')) %}"
    "{% for directive, text in clock %}{% set written.text = written.text | replace(directive, text) %}{% endfor %}"
    "{{ written.text | replace('\ue002', '%') }}{% endmacro %}\n"
)

# Below this many conversations of a shape it does not pay to find out how the template writes it.
FEW = 4
# Arguments of the tokenizer, of which the template sees nothing, and which may change what it sees.
OF_THE_TOKENIZER = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"tools"}


def today() -> datetime.date:
    """What day it is where this runs."""
    return datetime.date.today()


def read_date(text: Any) -> datetime.date | None:
    """The day that a text names, in one of the usual ways to write it; `None` for anything else."""
    for form in WRITTEN:
        try:
            return datetime.datetime.strptime(str(text).strip(), form).date()
        except ValueError:
            continue
    return None


@dataclass(frozen=True)
class TemplateContext:
    """What a chat template sees beside the messages.

    Attributes:
        system_prompt: opens every conversation that has no system (or developer) message of its own.
        kwargs: further variables of the template, for example `{"enable_thinking": False}` or, for the date that
            Llama 3 writes, `{"date_string": "10 Apr 2025"}`. The column `chat_template_kwargs` of a dataset goes before
            them, row by row.
        train_on: `"reasoning+answer"`, all that the assistant's message says; or `"answer"`, what stands behind its
            reasoning (`<think>...</think>`, `reasoning_content`), which is context then.
        day: what is today for a template that asks. Without one it is the day on which this is made, or that which
            `date_string` names.

    Raises:
        ValueError: for an unknown `train_on`, or options of a wrong type.
    """

    system_prompt: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_on: str = TRAIN_ON[0]
    day: datetime.date | None = None

    def __post_init__(self) -> None:
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"train_on must be one of {list(TRAIN_ON)}, got {self.train_on!r}")
        if not isinstance(self.kwargs, Mapping):
            raise ValueError(f"chat_template_kwargs must be a mapping, got {self.kwargs!r}")
        if self.system_prompt is not None and not isinstance(self.system_prompt, str):
            raise ValueError(f"system_prompt must be a string, got {self.system_prompt!r}")
        if self.day is None:
            object.__setattr__(self, "day", read_date(self.kwargs.get(DATE_STRING)) or today())

    def on(self, recorded: Mapping[str, Any] | None) -> TemplateContext:
        """The same on the day of what was recorded before (see `identity`), unless `date_string` says another."""
        text = (recorded or {}).get("date")
        day = read_date(text) if text else None
        return self if day is None or DATE_STRING in self.kwargs else replace(self, day=day)

    def undated(self) -> TemplateContext:
        """The same on no day in particular: what ids and fingerprints are made of."""
        return replace(self, kwargs={k: v for k, v in self.kwargs.items() if k != DATE_STRING}, day=NO_DAY)

    def conversation(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with the system prompt in front where there is none."""
        if self.system_prompt is None or (messages and messages[0].get("role") in ("system", "developer")):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def identity(self, tokenizer: PreTrainedTokenizerBase, dated: bool) -> dict[str, Any]:
        """What goes into the record of scores, checkpoints and reports, as plain JSON values.

        Args:
            dated: whether the template writes a date; without one the day says nothing.
        """
        assert self.day is not None
        written = json.dumps(tokenizer.chat_template, sort_keys=True).encode()
        recorded: dict[str, Any] = {"chat_template": hashlib.sha256(written).hexdigest()[:16]}
        if dated:
            recorded["date"] = self.day.isoformat()
        if self.system_prompt is not None:
            recorded["system_prompt"] = self.system_prompt
        if self.kwargs:
            recorded["chat_template_kwargs"] = json.loads(json.dumps(dict(self.kwargs), default=str))
        recorded["train_on"] = self.train_on
        return recorded


@dataclass
class TemplateArguments:
    """Options of what a chat template sees, the same in every command."""

    chat_template: str | None = field(
        default=None,
        metadata={"help": "Chat template to use instead of the tokenizer's own: a template, or a file with one."},
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message of every conversation (also of question + answer) that has none of its own."},
    )
    chat_template_kwargs: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={
            "help": 'Variables of the chat template, for example {"enable_thinking": false}, or {"date_string": '
            '"10 Apr 2025"} for the date that it writes. A column `chat_template_kwargs` goes before them. Without '
            "date_string it is the day on which scores or run began, also on resume and in `cud evaluate`."
        },
    )
    train_on: str = field(
        default="reasoning+answer",
        metadata={
            "help": "What is forgotten of an assistant's message: 'reasoning+answer', or 'answer', what stands behind "
            "its reasoning (`<think>...</think>`, `reasoning_content`)."
        },
    )

    def template_context(self, recorded: Mapping[str, Any] | None = None) -> TemplateContext:
        """What these options stand for, on the day that was recorded before, if any."""
        kwargs = self.chat_template_kwargs or {}
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"chat_template_kwargs must be a mapping, got {kwargs!r}")
        return TemplateContext(self.system_prompt, kwargs, self.train_on).on(recorded)


@dataclass(frozen=True)
class Renderer:
    """Writes conversations with a chat template, on the day of its context.

    Attributes:
        written: how it writes conversations, by their shape; `None` for those that it must be asked for.
    """

    tokenizer: PreTrainedTokenizerBase
    context: TemplateContext
    written: dict[Any, Written | None] = field(default_factory=dict, compare=False)

    def __call__(
        self, conversations: list[list[dict]], options: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False
    ) -> list[str]:
        """The texts of conversations.

        Args:
            options: of each conversation, its `tools` and what goes before `context.kwargs`.
        """
        if not conversations:
            return []
        if all(one == options[0] for one in options):
            return self._render(conversations, options[0], generation_prompt)
        return [
            self._render([conversation], one, generation_prompt)[0]
            for conversation, one in zip(conversations, options, strict=True)
        ]

    def may_write_the_date(self, options: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template asks for the date, or is told one."""
        told = any(DATE_STRING in one for one in (self.context.kwargs, *options))
        return told or any("strftime_now" in self._template(one) for one in options)

    def _template(self, options: Mapping[str, Any]) -> str:
        return str(self.tokenizer.get_chat_template(None, options.get("tools")))

    def _render(
        self, conversations: list[list[dict]], options: Mapping[str, Any], generation_prompt: bool
    ) -> list[str]:
        if len(conversations) < FEW or not self._writes_verbatim(options):
            return self._by_template(conversations, options, generation_prompt)
        told = generation_prompt, repr(options)
        shapes = [(shape_of(conversation), *told) for conversation in conversations]
        counts = Counter(shapes)
        new = {
            shape: conversation
            for shape, conversation in zip(shapes, conversations, strict=True)
            if shape[0] is not None and counts[shape] >= FEW and shape not in self.written
        }
        pairs = [one for conversation in new.values() for one in (with_places(conversation), conversation)]
        texts = self._by_template(pairs, options, generation_prompt) if pairs else []
        for (shape, conversation), places, text in zip(new.items(), texts[::2], texts[1::2], strict=True):
            written = read_off(places, len(conversation))
            self.written[shape] = written if written is not None and written(conversation) == text else None
        forms = [self.written.get(shape) for shape in shapes]
        rest = [one for one, form in zip(conversations, forms, strict=True) if form is None]
        others = iter(self._by_template(rest, options, generation_prompt) if rest else [])
        return [
            next(others) if form is None else form(conversation)
            for conversation, form in zip(conversations, forms, strict=True)
        ]

    def _writes_verbatim(self, options: Mapping[str, Any]) -> bool:
        """Whether a conversation shows how the template writes others of its shape."""
        own = getattr(type(self.tokenizer), "apply_chat_template", None)
        if own is not PreTrainedTokenizerBase.apply_chat_template or OF_THE_TOKENIZER & {
            *self.context.kwargs,
            *options,
        }:
            return False
        return writes_verbatim(self._template(options))

    def _by_template(
        self, conversations: list[list[dict]], options: Mapping[str, Any], generation_prompt: bool
    ) -> list[str]:
        given = {**self.context.kwargs, **options}
        template = self._template(options)
        if "strftime_now" in template:
            template = OWN_CLOCK + template
            given["clock"] = self._clock()
        try:
            return apply_chat_template(
                self.tokenizer,
                conversations,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **given,
            )
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of the template's own code
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    def _clock(self) -> list[tuple[str, str]]:
        """What every directive of `strftime` is at noon of the day, those with a sign first."""
        assert self.context.day is not None
        noon = datetime.datetime.combine(self.context.day, datetime.time(12))
        return [(directive, noon.strftime(directive)) for directive in DIRECTIVES]
