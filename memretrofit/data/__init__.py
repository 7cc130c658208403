"""Long text that installs with pip, split by whole documents and cut into rows of token ids.

`load_documents` reads a named source or the user's own files, `split_documents` holds out whole
documents, `RowDataset` cuts what is left into rows. Nothing here touches the network.
"""

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
