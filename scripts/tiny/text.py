"""The tokenizers of the bundled models, built from the vocabulary alone and the same every time."""

from __future__ import annotations

import re
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from scripts.tiny.vocabulary import BACKGROUNDS, OBJECTS, PLACES, SIZES

TEXT_LENGTH = 32
"""Tokens that the bundled models read of a prompt."""

WORDS = sorted(
    set(re.findall(r"\w+", " ".join([*OBJECTS, *BACKGROUNDS, *PLACES, *SIZES])))
    | set("a an and at on in to the with of middle background backdrop picture emoji drawing".split())
)


def t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer that holds every word of the world as one piece and spells the others by letters."""
    letters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -10.0) for letter in letters]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_tokenizer(folder: Path | None = None) -> CLIPTokenizer:
    """The tokenizer saved in `folder`, or else a byte-level BPE tokenizer in CLIP's form, its merges learned from the
    words of the world."""
    if folder is not None:
        return CLIPTokenizer.from_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(WORDS)
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet] + [left + right for left, right in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]  # last: open_clip takes the largest id for the end of the text
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)  # type: ignore[arg-type]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word is one piece: the most frequent pair first, of equally
    frequent ones the first in the alphabet. (The `tokenizers` package breaks such ties differently in each process.)"""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        spelled = [_merged(pieces, best) for pieces in spelled]
        merges.append(best)
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
