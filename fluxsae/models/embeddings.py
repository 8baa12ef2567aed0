"""Prompt embeddings, each prompt encoded once and kept on disk.

Legend: B batch, L text tokens, E their width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxsae.files import hash_json, whole_file


class PromptEmbeddings(NamedTuple):
    """Prompts as FLUX's transformer reads them: T5's token states and CLIP's pooled state."""

    prompt: Float[Tensor, "B L E"]
    pooled: Float[Tensor, "B P"]


@torch.no_grad()
def encode_prompts(pipe: FluxPipeline, prompts: Sequence[str], text_length: int) -> PromptEmbeddings:
    """Embeddings of `prompts`, cut or padded to `text_length` tokens.

    Each prompt is encoded by itself, so that its embedding does not depend on the others to the last bit.
    """
    device = pipe.text_encoder_2.device
    parts = [pipe.encode_prompt(prompt, device=device, max_sequence_length=text_length)[:2] for prompt in prompts]
    return PromptEmbeddings(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class EmbeddingsAhead:
    """Brings the embeddings of a batch to a device, while the images of the batch before are generated.

    On a GPU, a thread does this on a CUDA stream of its own, so that the sampler does not wait for the encoders.

    Args:
        cache: where embeddings come from. Nothing else may use it meanwhile.
        device: where embeddings go.
        beside: whether to fetch the next embeddings while images are generated; by default on a GPU.
    """

    def __init__(self, cache: EmbeddingCache, device: torch.device, beside: bool | None = None) -> None:
        self._cache = cache
        self._device = device
        self._thread = _thread()
        self._beside = device.type == "cuda" if beside is None else beside
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: _Coming | None = None

    def get(self, prompts: Sequence[str], following: Sequence[str] = ()) -> PromptEmbeddings:
        """Those of `prompts`; from now on those of `following`, for the next call, are on their way."""
        if not self._beside:
            return self._bring(prompts).embeddings
        if self._coming is None or self._coming.prompts != list(prompts):
            self._send_for(prompts)
        assert self._coming is not None
        found, arrival = self._coming.embeddings.result()
        self._coming = None
        if following:
            self._send_for(following)
        if arrival is not None:
            computation = torch.cuda.current_stream(self._device)
            computation.wait_event(arrival)
            for tensor in found:
                tensor.record_stream(computation)  # its memory is not given away before it has been read
        return found

    def close(self) -> None:
        """Return once nothing is on its way any more."""
        self._coming = None
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = _thread()

    def _send_for(self, prompts: Sequence[str]) -> None:
        self._coming = _Coming(list(prompts), self._thread.submit(self._bring, prompts))

    def _bring(self, prompts: Sequence[str]) -> _Arriving:
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            found = self._cache.get(prompts)
            if self._stream is None:
                return _Arriving(found, None)
            there = PromptEmbeddings(*(one.pin_memory().to(self._device, non_blocking=True) for one in found))
            return _Arriving(there, self._stream.record_event())


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="fluxsae-embeddings")


class _Coming(NamedTuple):
    """What is on its way, and for which prompts."""

    prompts: list[str]
    embeddings: Future[_Arriving]


class _Arriving(NamedTuple):
    """Embeddings, and when they are on the device."""

    embeddings: PromptEmbeddings
    arrival: torch.cuda.Event | None


class EmbeddingCache:
    """Encodes each prompt once; with a folder also across runs and processes.

    Args:
        folder: where embeddings are kept, one safetensors file for each prompt. If None, only those of the last call
            are kept, in memory. That is enough when repetitions of a prompt follow each other.
        pipe: the pipeline whose text encoders are used.
        model_hash: the identity of its weights, see `weights_identity`.
        text_length: number of text tokens of a prompt.
    """

    def __init__(self, folder: Path | None, pipe: FluxPipeline, model_hash: str, text_length: int) -> None:
        self._folder = folder
        self._pipe: FluxPipeline | None = pipe
        self._text_length = text_length
        self._identity = [model_hash, text_length, str(pipe.text_encoder_2.dtype)]
        self._latest: dict[str, PromptEmbeddings] = {}

    def get(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """The embeddings of `prompts`, in order, on the CPU."""
        self._latest = {prompt: self._latest.get(prompt) or self._one(prompt) for prompt in dict.fromkeys(prompts)}
        parts = [self._latest[prompt] for prompt in prompts]
        return PromptEmbeddings(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def encode_ahead(self, prompts: Sequence[str], device: torch.device) -> None:
        """Put the embeddings of `prompts` into the folder, and let go of the pipeline's text encoders.

        They are on `device` meanwhile, alone; where nothing is missing from the folder they never get there.
        """
        assert self._folder is not None and self._pipe is not None
        encoders = (self._pipe.text_encoder, self._pipe.text_encoder_2)
        missing = [prompt for prompt in dict.fromkeys(prompts) if _read(self._path(prompt)) is None]
        for prompt in missing:
            for encoder in encoders:
                encoder.to(device)
            self._one(prompt)
        self._pipe.register_modules(text_encoder=None, text_encoder_2=None)
        self._pipe = None

    def _path(self, prompt: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hash_json([*self._identity, prompt])}.safetensors"

    def _one(self, prompt: str) -> PromptEmbeddings:
        if self._folder is None:
            return self._encode(prompt)
        path = self._path(prompt)
        found = _read(path)
        if found is None:
            if self._pipe is None:
                raise FileNotFoundError(f"{path} was removed or damaged meanwhile; run the capture again to go on.")
            found = self._encode(prompt)
            with whole_file(path) as temporary:
                save_file(found._asdict(), temporary)
        return found

    def _encode(self, prompt: str) -> PromptEmbeddings:
        assert self._pipe is not None
        encoded = encode_prompts(self._pipe, [prompt], self._text_length)
        return PromptEmbeddings(encoded.prompt.cpu().contiguous(), encoded.pooled.cpu().contiguous())


def _read(path: Path) -> PromptEmbeddings | None:
    """A damaged file is as good as none: it is made again."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        return PromptEmbeddings(tensors["prompt"], tensors["pooled"])
    except (SafetensorError, KeyError):
        return None
