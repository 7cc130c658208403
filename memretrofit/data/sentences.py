"""Running text in sentences."""

from __future__ import annotations

import re

# A sentence ends at white space after a stop, with up to two closing quotes or brackets, and before
# a capital or a digit; not after a title. Look-behinds keep the quotes with their sentence.
_CLOSING, _OPENING = r"[\"')\]\u2019\u201d]", r"[\"'(\[\u2018\u201c]"
_END = re.compile(
    rf"(?:(?<=[.!?])|(?<=[.!?]{_CLOSING})|(?<=[.!?]{_CLOSING}{{2}}))"
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
    rf"\s+(?={_OPENING}*[A-Z0-9])"
)


def split_sentences(text: str) -> list[str]:
    """Sentences of running text, white space made single."""
    return [tidy for part in _END.split(text) if (tidy := " ".join(part.split()))]
