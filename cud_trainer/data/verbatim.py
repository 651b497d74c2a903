"""Templates that write what messages say as it is: one conversation shows how they write all of its shape.

What a template does is read off its code. Where the content of messages goes nowhere but into the text, as it is or
without the blanks around it, the text of a conversation is that of another one of the same shape with the contents put
in their places: `str.join` in place of the template. A template that does anything else with a content (compares,
splits, stores or counts it) is left to Jinja, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateSyntaxError, nodes

# Blanks that no template writes, so that one that takes them off is known.
BLANK = "\u2003"
# What of a loop says nothing of its items.
COUNTERS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}
# Tests that say the same of all texts.
OF_TYPES = {"defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean"}
# Nodes that hand on what is written in them, or read what is not seen here.
UNKNOWN = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.AssignBlock,
    nodes.Block,
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.ScopedEvalContextModifier,
    nodes.EvalContextModifier,
    nodes.ContextReference,
    nodes.DerivedContextReference,
)


class Written(NamedTuple):
    """How conversations of a shape are written.

    Attributes:
        form: the text, with `%s` for what is said.
        said: for each, the message that says it, and whether it is written without the blanks around it.
    """

    form: str
    said: tuple[tuple[int, bool], ...]

    def __call__(self, conversation: Sequence[Mapping[str, Any]]) -> str:
        return self.form % tuple(
            [
                conversation[row]["content"].strip() if stripped else conversation[row]["content"]
                for row, stripped in self.said
            ]
        )


def shape_of(conversation: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, bool], ...] | None:
    """What a template can tell of a conversation beside what is said: roles, and who says nothing.

    `None` where a message has more than a role and a text.
    """
    shape = []
    for one in conversation:
        role, content = one.get("role"), one.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        if len(one) > 2 and sum(value is not None for value in one.values()) > 2:
            return None
        shape.append((role, content != ""))
    return tuple(shape)


def with_places(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a place in place of everything that is said: what `read_off` knows again."""
    return [
        {**one, "content": f"{BLANK}{_place(row)}{BLANK}" if one["content"] else ""}
        for row, one in enumerate(conversation)
    ]


def read_off(text: str, size: int) -> Written | None:
    """How conversations like that of `with_places`, which was written as `text`, are written.

    `None` where it does not show.

    Args:
        size: number of messages.
    """
    said: dict[int, tuple[int, bool]] = {}
    for row in range(size):
        for place in (f"{BLANK}{_place(row)}{BLANK}", _place(row)):
            position = text.find(place)
            while position >= 0:
                said.setdefault(position + (place[0] == BLANK), (row, place[0] != BLANK))
                position = text.find(place, position + len(place))
    form = text.replace("%", "%%")
    for row in range(size):
        form = form.replace(f"{BLANK}{_place(row)}{BLANK}", "%s").replace(_place(row), "%s")
    return None if BLANK in form else Written(form, tuple(said[position] for position in sorted(said)))


def _place(row: int) -> str:
    return f"\ue003{row}\ue004"


@lru_cache(maxsize=64)
def writes_verbatim(template: str) -> bool:
    """Whether a template lets what messages say into the text alone, as it is or stripped of blanks."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateSyntaxError, RecursionError):
        return False
    return _Reading(tree).harmless


class _Reading:
    """Follows the messages through the code of a template.

    A message is `messages[...]`, or what a loop over `messages`, or a part of them, is at. All that may be done with
    one is to take a field of it.
    """

    def __init__(self, tree: nodes.Template) -> None:
        loops = [loop for loop in tree.find_all(nodes.For) if self._is_conversation(loop.iter)]
        self.items = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
        bound = {id(loop.target) for loop in loops}
        names = {"messages", "loop", *self.items}
        rebound = any(
            name.ctx != "load" and name.name in names and id(name) not in bound for name in tree.find_all(nodes.Name)
        )
        hidden = any(space.name in names for space in tree.find_all(nodes.NSRef))
        self.harmless = not (rebound or hidden or self.items & {"messages", "loop"}) and self._plain(tree)

    def _is_conversation(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_conversation(node.node)
        return isinstance(node, nodes.Name) and node.name == "messages"

    def _is_message(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem):
            return self._is_conversation(node.node) and not isinstance(node.arg, nodes.Slice)
        return isinstance(node, nodes.Name) and node.name in self.items

    def _field(self, node: nodes.Node) -> str | None:
        """The field of a message that this is, if it is one."""
        if not isinstance(node, (nodes.Getattr, nodes.Getitem)) or not self._is_message(node.node):
            return None
        name = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        # what a dictionary has of itself would hand out all that is in it
        return name if isinstance(name, str) and not hasattr(dict, name) else None

    def _content(self, node: nodes.Node) -> bool:
        return self._field(node) == "content" and self._plain_index(node)

    def _plain_index(self, node: Any) -> bool:
        """Whether the way to a message (`messages[loop.index0 - 1]`) has nothing of what is said in it."""
        return not isinstance(node.node, nodes.Getitem) or self._plain(node.node.arg)

    def _written(self, node: nodes.Node) -> bool:
        """Whether an expression that is written shows a content as it is, or none."""
        if (
            isinstance(node, nodes.Filter)
            and node.name == "trim"
            and node.node is not None
            and self._content(node.node)
        ):
            return not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if isinstance(node, (nodes.Add, nodes.Concat)):
            return all(map(self._written, node.iter_child_nodes()))
        return self._content(node) or self._plain(node)

    def _asked(self, node: nodes.Node) -> bool:
        """Whether a condition asks of a content no more than whether there is one."""
        if isinstance(node, (nodes.And, nodes.Or, nodes.Not)):
            return all(map(self._asked, node.iter_child_nodes()))
        return self._content(node) or self._plain(node)

    def _plain(self, node: nodes.Node) -> bool:
        """Whether nothing that is said goes anywhere here but into the text."""
        if isinstance(node, UNKNOWN):
            return False
        if isinstance(node, nodes.Name):
            return node.name not in {"messages", "loop", "self", *self.items} or node.ctx != "load"
        if isinstance(node, nodes.Output):
            return all(map(self._written, node.nodes))
        if isinstance(node, nodes.If):
            return self._asked(node.test) and all(map(self._plain, [*node.body, *node.elif_, *node.else_]))
        if isinstance(node, nodes.For):
            over = self._is_conversation(node.iter) and isinstance(node.target, nodes.Name)
            rest = [*node.body, *node.else_, *([node.test] if node.test else [])]
            slices = [part for part in node.iter.find_all(nodes.Slice)] if over else [node.iter]
            return not node.recursive and all(map(self._plain, [*slices, *rest]))
        if isinstance(node, nodes.Test) and node.name in OF_TYPES and not node.args:
            return self._content(node.node) or self._is_conversation(node.node) or self._plain(node.node)
        if isinstance(node, nodes.Filter) and node.name in ("length", "count") and node.node is not None:
            return (isinstance(node.node, nodes.Name) and node.node.name == "messages") or self._plain(node.node)
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return node.attr in COUNTERS
        field = self._field(node)
        if field is not None:
            return field != "content" and self._plain_index(node)
        return all(map(self._plain, node.iter_child_nodes()))
