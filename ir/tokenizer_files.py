"""Which files of a model folder belong to its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

_TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json|vocab\.txt|merges\.txt"
    r"|tokenizer\.model(\.v\d+)?|spiece\.model|spm\.model|sentencepiece\.bpe\.model|.+\.tiktoken|chat_template\.jinja"
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Files that an artifact must carry for the tokenizer and chat templates of a model to work.

    Args:
        folder: Of a model, or an artifact.

    Returns:
        Existing files, sorted. Never code, never weights.
    """
    files = [file for file in folder.glob("*") if _TOKENIZER_FILE.fullmatch(file.name)]
    files += folder.glob("additional_chat_templates/*.jinja")
    return sorted(file for file in files if file.is_file())
