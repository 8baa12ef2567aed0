"""Prompt embeddings, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import FluxPipeline

import fluxsae.models.embeddings
from fluxsae.models.embeddings import EmbeddingCache, EmbeddingsAhead, PromptEmbeddings, encode_prompts


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_prompt_is_encoded_once(tiny_pipe: FluxPipeline, tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "embeddings" if on_disk else None
    with mock.patch.object(fluxsae.models.embeddings, "encode_prompts", wraps=encode_prompts) as encode:
        cache = EmbeddingCache(folder, tiny_pipe, "model", 16)
        found = cache.get(["a fox", "an owl", "a fox"])
        assert torch.equal(cache.get(["a fox"]).prompt[0], found.prompt[2])
        assert encode.call_count == 2
        EmbeddingCache(folder, tiny_pipe, "model", 16).get(["an owl"])
        assert encode.call_count == (2 if on_disk else 3)
        for other in (EmbeddingCache(folder, tiny_pipe, "another", 16), EmbeddingCache(folder, tiny_pipe, "model", 8)):
            other.get(["an owl"])
        assert encode.call_count == (4 if on_disk else 5)
    whole = tiny_pipe.encode_prompt(["a fox", "an owl"], max_sequence_length=16)
    torch.testing.assert_close(found.prompt[:2], whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled[:2], whole[1], rtol=1e-4, atol=1e-5)


def test_a_damaged_embedding_is_made_again(tiny_pipe: FluxPipeline, tmp_path: Path) -> None:
    first = EmbeddingCache(tmp_path, tiny_pipe, "model", 16).get(["a fox"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(EmbeddingCache(tmp_path, tiny_pipe, "model", 16).get(["a fox"]).prompt, first.prompt)


@pytest.mark.parametrize("beside", [False, True])
def test_embeddings_come_ahead(tiny_pipe: FluxPipeline, beside: bool) -> None:
    batches = [["a fox", "a fox"], ["a fox", "an owl"], ["an owl", "two red apples"]]
    expected = [EmbeddingCache(None, tiny_pipe, "model", 16).get(prompts) for prompts in batches]
    asked: list[list[str]] = []

    class Cache(EmbeddingCache):
        def get(self, prompts: Sequence[str]) -> PromptEmbeddings:
            asked.append(list(prompts))
            return super().get(prompts)

    ahead = EmbeddingsAhead(Cache(None, tiny_pipe, "model", 16), torch.device("cpu"), beside)
    found = [ahead.get(one, after) for one, after in zip(batches, [*batches[1:], []], strict=True)]
    assert asked == batches  # each once, although each was asked for twice
    found.append(ahead.get(batches[0], ["a crab"]))
    found.append(ahead.get(batches[1]))  # another than was announced
    ahead.close()
    found.append(ahead.get(batches[2]))  # closed, it can be gone on with
    ahead.close()
    for one, other in zip(found, [*expected, *expected], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_error_on_the_way_is_raised_to_who_asks(tiny_pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe_of_its_own = FluxPipeline(**tiny_pipe.components)  # its text encoders go
    cache = EmbeddingCache(tmp_path, pipe_of_its_own, "model", 16)
    cache.encode_ahead(["a fox", "an owl"], torch.device("cpu"))
    ahead = EmbeddingsAhead(cache, torch.device("cpu"), beside=True)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="was removed or damaged meanwhile"):
        ahead.get(["a fox"], ["an owl"])
    ahead.close()
