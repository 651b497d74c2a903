"""Text of others (names of groups, models, metrics, conditions) in Markdown: shown as it is, never read as markup."""

from __future__ import annotations

import re

# Of inline markup: code, emphasis (an underscore inside a word is none), strikethrough, formulas, table cells, and what
# turns brackets into links and images. Intervals such as [0.1, 0.2] stay as they are.
INLINE = re.compile(r"[\\`*~$|]|\](?=\s*[(\[:])|(?<=\])\(|!(?=\[)|(?<=!)\[|(?<![^\W_])_|_(?![^\W_])")
# What GitHub makes a link of without any brackets, and what calls people or issues.
BARE_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp):|\b(www)\.")
# What opens a heading, list, quote, rule or code block at the start of a line.
BLOCK = re.compile(r"^(#|[-+=](?=[\s+=-]|$)|\d+(?=[.)](\s|$)))")


def markdown_text(text: str) -> str:
    """`text` in one line, for a paragraph, list item, heading or table cell."""
    text = " ".join(text.splitlines()).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = INLINE.sub(r"\\\g<0>", text)
    text = BARE_LINK.sub(lambda m: f"{m[1]}&#58;" if m[1] else f"{m[2]}&#46;", text)
    text = text.replace("@", "&#64;")
    if number := re.match(r"\d+(?=[.)](\s|$))", text):
        return f"{number[0]}\\{text[number.end() :]}"
    return f"\\{text}" if BLOCK.match(text) else text
