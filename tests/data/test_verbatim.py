"""Conversations are put together without the template only where that cannot be told from what the template writes."""

import random
from pathlib import Path

import pytest
import trl
from builders import make_tokenizer

from cud_trainer.data import verbatim
from cud_trainer.data.template import Renderer, TemplateContext
from cud_trainer.data.verbatim import read_off, shape_of, with_places, writes_verbatim

LOOP = (
    "{% for m in messages %}{{ m.role + ': ' + CONTENT }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
PLAIN = LOOP.replace("CONTENT", "m.content")
HARMLESS = {
    "plain": PLAIN,
    "trimmed": LOOP.replace("CONTENT", "m['content'] | trim"),
    "first": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}No one.{% endif %}"
    "{% for m in messages[1:] %}<{{ loop.index }}/{{ messages | length }}>{{ m.content }}{% endfor %}",
    "if any": "{% for m in messages %}{% if m.content and m.role != 'user' %}{{ m.content }}{% endif %}!{% endfor %}",
    "is text": "{% for m in messages %}{% if m.content is string %}{{ '%s %' ~ m.content }}{% endif %}{% endfor %}",
    "last": "{% set last = messages[-1].role %}{% for m in messages %}{{ m.content }}{{ last }}{% endfor %}",
}
# What each does with what is said, other than to write it.
HARMFUL = {
    "compares": PLAIN + "{% if messages[0].content == 'a' %}!{% endif %}",
    "looks into": PLAIN + "{% if '/no_think' in messages[0]['content'] %}!{% endif %}",
    "counts": "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
    "splits": "{% for m in messages %}{{ m.content.split('a')[0] }}{% endfor %}",
    "changes": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "trims the whole": "{% for m in messages %}{{ (m.content + ' ') | trim }}{% endfor %}",
    "trims a letter": "{% for m in messages %}{{ m.content | trim('a') }}{% endfor %}",
    "keeps": "{% for m in messages %}{% set said = m.content %}{{ said }}{% if said == 'a' %}!{% endif %}{% endfor %}",
    "keeps a message": "{% set m = messages[0] %}{{ m.content | upper }}",
    "renames": "{% set messages = messages[1:] %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "dumps": "{{ messages | tojson }}",
    "asks the method": "{% for m in messages %}{{ m.get('content') | upper }}{% endfor %}",
    "asks for a method": "{% for m in messages %}{{ m['values']() | list }}{% endfor %}",
    "the one before": "{% for m in messages %}{{ loop.previtem.content | upper if not loop.first }}{% endfor %}",
    "has it changed": "{% for m in messages %}{% if loop.changed(m.content) %}{{ m.content }}{% endif %}{% endfor %}",
    "chooses": "{% for m in messages %}{{ m.content if m.content != 'a' else 'b' }}{% endfor %}",
    "macro": "{% macro say(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) | upper }}{% endfor %}",
    "filter": "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}",
    "captured": "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | upper }}",
    "skips": "{% for m in messages if m.content != 'a' %}{{ m.content }}{% endfor %}",
    "no template": "{% for m in messages %}",
}
SAID = ["a", "b", "  padded \n", "100% %s %d", "{{ messages }}", "/no_think", "<think>x</think> y", "é", "", " "]


def conversations(count: int = 60) -> list[list[dict]]:
    chooses, made = random.Random(0), []
    for number in range(count):
        roles = (["system"] if number % 3 == 0 else []) + ["user", "assistant"] * (1 + number % 2)
        made.append([{"role": role, "content": chooses.choice(SAID)} for role in roles])
    made[7][0]["name"] = "Ann"  # more than the shape says
    return made


def one_by_one(tokenizer, chats: list[list[dict]], generation_prompt: bool) -> list[str]:
    options = {"tokenize": False, "add_generation_prompt": generation_prompt}
    return [tokenizer.apply_chat_template(chat, **options) for chat in chats]


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("name", [*HARMLESS, *HARMFUL])
def test_the_texts_are_the_templates(name, generation_prompt):
    template = {**HARMLESS, **HARMFUL}[name]
    assert writes_verbatim(template) == (name in HARMLESS)
    if name == "no template":
        return
    tokenizer, chats = make_tokenizer(), conversations()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, TemplateContext())
    texts = renderer(chats, [{}] * len(chats), generation_prompt=generation_prompt)
    assert texts == one_by_one(tokenizer, chats, generation_prompt)
    assert bool(renderer.written) == (name in HARMLESS) and None not in renderer.written.values()


TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def test_templates_in_use():
    """Those that TRL knows: where one is read off, it gives the same texts."""
    harmless = [path for path in TRL if writes_verbatim(path.read_text(encoding="utf-8"))]
    assert {"phi3.jinja", "qwen2_5.jinja"} <= {path.name for path in harmless}
    assert len(harmless) < len(TRL)
    for path in harmless:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        chats = [chat for chat in conversations() if chat[0]["role"] != "system"]  # some refuse that
        for prompt in (False, True):
            texts = Renderer(tokenizer, TemplateContext())(chats, [{}] * len(chats), generation_prompt=prompt)
            assert texts == one_by_one(tokenizer, chats, prompt), path.name


def test_the_template_is_asked_a_few_times_only(monkeypatch):
    tokenizer, rendered = make_tokenizer(), []
    tokenizer.chat_template = PLAIN
    renderer = Renderer(tokenizer, TemplateContext())
    by_template = Renderer._by_template
    monkeypatch.setattr(
        Renderer, "_by_template", lambda self, chats, *rest: rendered.extend(chats) or by_template(self, chats, *rest)
    )
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(100)]
    for _ in range(2):
        renderer(chats, [{}] * 100)
    assert len(rendered) == 2
    # a rare shape, and what the tokenizer does and not the template
    renderer([[{"role": "x", "content": "y"}]], [{}])
    Renderer(tokenizer, TemplateContext(kwargs={"sanitize_control_tokens": False}))(chats, [{}] * 100)
    assert len(rendered) == 2 + 1 + 100


def test_what_does_not_show_is_not_read_off():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert shape_of(chat) == (("user", True), ("assistant", False))
    assert shape_of([{"role": "user", "content": ["a"]}]) is shape_of([{"role": "user"}]) is None
    assert shape_of([{"role": "user", "content": "a", "name": None}]) is not None
    assert shape_of([{"role": "user", "content": "a", "name": "b"}]) is None
    places = with_places(chat)
    assert places[1]["content"] == ""
    assert read_off(f"<{places[0]['content']}>", 2)(chat) == "<a>"
    assert read_off(f"<{places[0]['content'].strip()}>%", 2)([{"content": " a "}]) == "<a>%"
    assert read_off(f"<{places[0]['content'][1:]}>", 2) is None  # stripped on one side
    assert verbatim.BLANK.isspace()
