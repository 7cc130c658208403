"""Wikitext to plain prose, crudely: enough for reading, not a parser."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"<(math|gallery|timeline|source|syntaxhighlight|imagemap)\b[^>]*>.*?</\1>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\]")  # a caption may hold [single] ones
_ADDRESS = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.MULTILINE)
_BACK_MATTER = re.compile(
    r"^==\s*(?:see also|references|notes|footnotes|further reading|external links|bibliography|"
    r"sources|citations|notes and references)\s*==\s*$",
    re.MULTILINE | re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)


def plain_text(wikitext: str) -> str:
    """The article's words: no templates, tables, notes, pictures, mark-up, or lists of sources."""
    text = _BACK_MATTER.split(_COMMENT.sub("", wikitext), maxsplit=1)[0]
    text = _BLOCK.sub("", _REFERENCE.sub("", text))
    for nested in (_TEMPLATE, _TABLE):
        text = _until_stable(nested, "", text)
    text = _until_stable(_LINK, _shown, text)
    text = _TAG.sub("", _ADDRESS.sub(r"\1", text))
    text = _HEADING.sub(r"\2", text)
    text = re.sub(r"'{2,}", "", text)
    text = _LIST_MARK.sub("", html.unescape(text)).replace("\xa0", " ")
    text = re.sub(r"\(\s*[;,]*\s*\)", "", text)  # what a removed template leaves
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _shown(link: re.Match[str]) -> str:
    """What the reader sees of `[[target|label]]`; nothing for pictures and categories."""
    target, _, label = link[1].partition("|")
    if re.match(r"\s*(?:file|image|category)\s*:", target, re.IGNORECASE):
        return ""
    if not label and re.match(r"[a-z-]{2,12}:[^ ]", target):  # the same article in another language
        return ""
    return label.rpartition("|")[2] or target


def _until_stable(
    pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str
) -> str:
    """Innermost first, until nothing is left: these constructs nest."""
    replaced = 1
    while replaced:
        text, replaced = pattern.subn(replacement, text)
    return text
