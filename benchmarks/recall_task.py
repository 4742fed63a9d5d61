"""Seeded prompts that name a person early, in lines of dialogue between prose, and ask for the name at the end.

    "I am here," answered Albert Fisher.          planted MENTIONS times, over the first part of the prompt
    "I am here," answered                         the end of the prompt; the answer is ` Albert Fisher`

The question repeats the planted words, so finding the name takes no more than copying what followed them: the rule
"what came after the longest earlier occurrence of the prompt's last tokens" answers every planted item and no other.
Names are put together from common first names and surnames that the filler does not contain. A line of dialogue is used
because small models expect a name there; with `planted=False` the same items have prose in place of the lines, which
says what a model guesses without having read the name. Compare the two with a full cache first: where they hardly
differ the model does not copy from its context, and its figures say nothing about what a cache policy keeps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

# Short and common, so that a small vocabulary spells them in few tokens.
FIRST_NAMES = (
    "Albert Alice Anna Arthur Charles Edward Elizabeth Emma Frank Frederick George Henry James Jane John Louis Martin "
    "Mary Paul Peter Philip Rachel Richard Robert Sarah Simon Thomas Walter William"
)
SURNAMES = (
    "Baker Bishop Carter Cook Field Fisher Ford Freeman Green Hall Hill King Lake Marsh Mason Porter Stone Turner "
    "Walker Ward Waters White Wilson Wood Wright Young"
)
QUESTION = '\n"I am here," answered'
ENDING = "."
MENTIONS = 6
# The share of the prompt, from its start, over which the mentions are spread.
PLANTED_SHARE = 0.4
# Between sentences, in front of the space; not behind a title.
SENTENCE_EDGE = re.compile(r'(?<=[.!?"”])(?<!Mr\.)(?<!Dr\.)(?<!Mrs\.)(?=\s+["“A-Z])')

Encode = Callable[[str], list[int]]


def make_recall(
    encode: Encode,
    text: str,
    *,
    items: int,
    prompt_tokens: int,
    seed: int,
    mentions: int = MENTIONS,
    planted: bool = True,
) -> list[dict[str, list[int]]]:
    """Recall items, each of a person and a stretch of filler of its own.

    Args:
        encode: Text to token ids, without special tokens.
        text: Prose to hide the lines in.
        items: How many.
        prompt_tokens: Exact length of every prompt.
        seed: Equal seeds give equal items; items with and without `planted` differ in the planted lines alone.
        mentions: How often the line is planted.
        planted: False leaves the lines out and has more filler in their place.

    Returns:
        Items of `prompt` and `answer`, both token ids. The answer is the name with the space before it.

    Raises:
        ValueError: The text is too short, contains the names, or the prompt has no room for the lines.
    """
    source = random.Random(seed)
    sentences = [encode(sentence) for sentence in SENTENCE_EDGE.split(text)]
    first_names = [name for name in FIRST_NAMES.split() if name not in text]
    surnames = [name for name in SURNAMES.split() if name not in text]
    if not first_names or not surnames:
        raise ValueError("recall: the filler text contains every first name or every surname. Give less of it.")
    made = []
    for _ in range(items):
        answer = encode(f" {source.choice(first_names)} {source.choice(surnames)}")
        line = [*encode(QUESTION), *answer, *encode(ENDING)]
        filler = _stretch(sentences, prompt_tokens, source)
        body = _body(filler, line, prompt_tokens - len(encode(QUESTION)), mentions if planted else 0)
        made.append({"prompt": [*body, *encode(QUESTION)], "answer": answer})
    return made


def _stretch(sentences: list[list[int]], tokens: int, source: random.Random) -> list[list[int]]:
    """Consecutive whole sentences from a random place, at least so many tokens."""
    total, last = 0, len(sentences)
    while last and total < tokens:
        last -= 1
        total += len(sentences[last])
    if total < tokens:
        raise ValueError(f"recall: the filler text has {total} tokens, and a prompt needs {tokens}. Give more of it.")
    start = source.randrange(last + 1)
    end, total = start, 0
    while total < tokens:
        total += len(sentences[end])
        end += 1
    return sentences[start:end]


def _body(filler: list[list[int]], line: list[int], tokens: int, mentions: int) -> list[int]:
    """The last `tokens` of the filler, with mentions between its sentences where they are nearest to their places."""
    room = tokens - mentions * len(line)
    if room <= 0:
        raise ValueError(f"recall: {mentions} lines of {len(line)} tokens do not fit in {tokens}. Give longer prompts.")
    prose, edges = [], []
    for sentence in filler:
        prose += sentence
        edges.append(len(prose))
    dropped = len(prose) - room
    edges = [edge - dropped for edge in edges[:-1] if edge > dropped] or [0]
    prose = prose[dropped:]
    wanted = [room * PLANTED_SHARE * (number + 1) / mentions for number in range(mentions)]
    places = sorted((min(edges, key=lambda edge: abs(edge - place)) for place in wanted), reverse=True)
    for place in places:
        prose[place:place] = line
    return prose
