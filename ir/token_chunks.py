"""How many tokens a fused operator computes at a time.

A chunk whose activations stay in the cache is read back from there. A chunk also reads every weight once, so too few
tokens make a product wait for its weights (`benchmarks/results/low_rank_chunks.json`). So the cache chooses between
`FEWEST` and `MOST`.
"""

from __future__ import annotations

from collections.abc import Iterator

FEWEST, MOST = 512, 1024
# Where the processor does not say, and in artifacts, which do not know where they will run.
USUAL_CACHE_BYTES = 16 << 20


def chunk_tokens(token_bytes: int, cache_bytes: int = USUAL_CACHE_BYTES) -> int:
    """Most tokens of a chunk.

    Args:
        token_bytes: Of the activations of a token that are alive at once.
        cache_bytes: Of the cache that they should stay in; half of it is left to the weights.
    """
    return max(FEWEST, min(MOST, cache_bytes // (2 * max(1, token_bytes))))


def even_chunks(tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and end of as few chunks as there can be, of nearly equal size: a short last one would be slow.

    Args:
        tokens: All of them.
        most: Tokens of a chunk.
    """
    chunks = -(-tokens // most)
    size = -(-tokens // max(1, chunks))
    for start in range(0, tokens, max(1, size)):
        yield start, min(start + size, tokens)
