"""The text of the studies: the language reference that comes with Python, which differs from version to version."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Corpus", "corpus", "fingerprint", "identified", "windows"]

Unit = Literal["word", "character"]

_HELD_OUT = 5  # every fifth document
_SPLIT = {"word": re.compile(r"\w+|[^\w\s]+|\n\n"), "character": re.compile(r"(?s).")}


@dataclass(frozen=True)
class Corpus:
    """Documents as numbers; 0 stands for whatever is not in the vocabulary, which comes from the training documents."""

    training: tuple[Tensor, ...]  # (tokens,) int64 each
    held_out: tuple[Tensor, ...]
    num_tokens: int  # in the vocabulary, 0 among them


@functools.lru_cache(maxsize=2)
def corpus(unit: Unit, most: int) -> Corpus:
    """The documents cut into words or characters, with a vocabulary of the `most` frequent ones.

    >>> corpus("character", 100).num_tokens <= 100
    True
    """
    documents = [_SPLIT[unit].findall(topics[name]) for name in sorted(topics)]
    kept = [document for index, document in enumerate(documents) if index % _HELD_OUT]
    counts = Counter(token for document in kept for token in document)
    numbers = {token: number for number, (token, _) in enumerate(counts.most_common(most - 1), 1)}
    return Corpus(_encode(kept, numbers), _encode(documents[::_HELD_OUT], numbers), len(numbers) + 1)


def _encode(documents: Iterable[list[str]], numbers: dict[str, int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([numbers.get(token, 0) for token in document]) for document in documents)


def windows(documents: Iterable[Tensor], length: int) -> Tensor:
    """Every document cut into pieces of `length` tokens that do not overlap: (pieces, length); rests are dropped.

    >>> windows([torch.arange(5), torch.arange(1)], 2)
    tensor([[0, 1],
            [2, 3]])
    """
    return torch.cat([one[: len(one) // length * length].view(-1, length) for one in documents])


def fingerprint() -> float:
    """The first 48 bits of the SHA-256 of the text, as a whole number, so that results can keep it."""
    text = "\n".join(f"{name}\n{topics[name]}" for name in sorted(topics))
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))


def identified(kept: float) -> str:
    """Which text results are of, from its fingerprint, as a sentence."""
    return f"The text's SHA-256 begins with `{int(kept):012x}`; another version of Python has another text."
