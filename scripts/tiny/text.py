"""The tokenizers of the bundled models, built from the vocabulary alone and the same every time."""

from __future__ import annotations

import json
import re
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form, its merges learned from the words of the world."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    merges = _merges(bpe)
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(merge) for merge in merges]
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)  # type: ignore[arg-type]


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
