"""The tokenizers know every word of the world, spell the others, and are the same every time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scripts.tiny.data import tokenise
from scripts.tiny.scenes import random_caption
from scripts.tiny.text import TEXT_LENGTH, WORDS, clip_tokenizer, t5_tokenizer

MAKERS = pytest.mark.parametrize("make", [t5_tokenizer, clip_tokenizer])


def captions(n: int) -> list[str]:
    rng = random.Random(0)
    return [random_caption(rng, held_out=False)[1].text for _ in range(n)]


def ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts).input_ids


@MAKERS
def test_every_word_is_one_token(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    assert {word: len(tokenizer.tokenize(word)) for word in WORDS} == dict.fromkeys(WORDS, 1)
    assert len({tokenizer.tokenize(word)[0] for word in WORDS}) == len(WORDS)


@MAKERS
def test_captions_fit_and_hold_nothing_unknown(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    for tokens in ids(tokenizer, captions(300)):
        assert len(tokens) <= TEXT_LENGTH
    unknown = t5_tokenizer().unk_token_id
    assert not any(unknown in tokens for tokens in ids(t5_tokenizer(), [*captions(300), "a zebra, 3 quarks!"]))


@MAKERS
def test_captions_come_back_from_their_tokens(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    for text, tokens in zip(captions(50), ids(tokenizer, captions(50)), strict=True):
        back = tokenizer.decode(tokens, skip_special_tokens=True)
        assert back.replace(" ,", ",").strip() == text


@MAKERS
def test_made_again_or_loaded_a_tokenizer_is_the_same(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make().save_pretrained(tmp_path)
    wanted = ids(make(), captions(50))
    assert ids(make(), captions(50)) == wanted
    assert ids(AutoTokenizer.from_pretrained(tmp_path), captions(50)) == wanted


def test_tokenise_pads_to_the_text_length() -> None:
    t5_ids, clip_ids = tokenise(["", *captions(3)])
    assert t5_ids.shape == clip_ids.shape == (4, TEXT_LENGTH)
