"""Long text that installs with pip, split by whole documents and cut into rows of token ids; and
small worlds that are told and asked about.

`load_documents` reads a named source or the user's own files, `split_documents` holds out whole
documents, `RowDataset` cuts what is left into rows. `recall` and `stories` invent facts with a
question. Nothing here touches the network.

Each name below is imported when it is first used: to invent facts loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memretrofit.data.rows import Row, RowDataset
    from memretrofit.data.sources import (
        SOURCES,
        Document,
        TextSource,
        load_documents,
        split_documents,
    )

__all__ = [
    "SOURCES",
    "Document",
    "Row",
    "RowDataset",
    "TextSource",
    "load_documents",
    "split_documents",
]

_HOMES = dict.fromkeys(__all__, "sources") | {"Row": "rows", "RowDataset": "rows"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'memretrofit.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memretrofit.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
