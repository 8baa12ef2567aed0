"""Prompt embeddings, encoded once."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import FluxPipeline

import fluxsae.flux.embeddings
from fluxsae.flux.embeddings import EmbeddingCache, encode_prompts


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_prompt_is_encoded_once(tiny_pipe: FluxPipeline, tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "embeddings" if on_disk else None
    with mock.patch.object(fluxsae.flux.embeddings, "encode_prompts", wraps=encode_prompts) as encode:
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
