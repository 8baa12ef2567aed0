"""The autoencoders: codes from tokens, tokens from codes. L1 (Bricken et al. 2023) and TopK (Gao et al. 2024).

A raw token x is normalised to (x - mean) · scale; codes and weights live in that space, and decoding leads back out.
Legend: N tokens, D width, F features, K kept.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from fluxsae.sae import kernels
from fluxsae.shards.format import Statistics
from fluxsae.spec import CaptureSpec


class Pass(NamedTuple):
    """One pass over normalised tokens, with all that training needs of it."""

    recon: Float[Tensor, "N D"]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, "F"]


class SAE(nn.Module, ABC):
    """A sparse autoencoder over tokens of width `d_in`. Subclasses say which pre-activations become codes.

    `W_dec` has one feature direction a row, of unit length after training here; `W_enc` starts as a copy of it.
    `spec` says what the SAE was trained on and `mean_norm` is E‖x‖ there; both are None where nobody knows.

    Args:
        d_in: width of a token.
        n_features: number of features.
    """

    mean: Tensor
    scale: Tensor
    restart_gain: ClassVar[float] = 0.2
    """Length of a restarted feature's encoder row, in mean lengths of the living ones'."""

    def __init__(self, d_in: int, n_features: int) -> None:
        super().__init__()
        if d_in < 1 or n_features < 1:
            raise ValueError(f"an SAE needs d_in and n_features of at least 1, not {d_in} and {n_features}.")
        directions = normalize(torch.randn(n_features, d_in), dim=1)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.spec: CaptureSpec | None = None
        self.mean_norm: float | None = None

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def directions(self) -> Float[Tensor, "F D"]:
        """The feature directions in raw activation space, of unit length."""
        return normalize(self.W_dec.detach(), dim=1)

    @abstractmethod
    def options(self) -> dict[str, int | float]:
        """The constructor's arguments beside `d_in` and `n_features`."""

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """Codes, non-negative and sparse, from pre-activations."""

    def normalise(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return (x.to(self.mean.dtype) - self.mean) * self.scale

    def pre_acts(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """Pre-activations of raw tokens."""
        return self.project(self.normalise(x))

    def project(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """Pre-activations of normalised tokens: W_enc (x - b_dec) + b_enc."""
        return (x - self.b_dec) @ self.W_enc.T + self.b_enc

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """Codes of raw tokens, in the parameters' dtype."""
        return self.activate(self.pre_acts(x))

    def decode(self, codes: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch D"]:
        """Raw tokens from codes."""
        return (codes @ self.W_dec + self.b_dec) / self.scale + self.mean

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The reconstruction of raw tokens."""
        return self.decode(self.encode(x))

    def run(self, x: Float[Tensor, "N D"]) -> Pass:
        """One training pass over normalised tokens."""
        codes = self.activate(self.project(x))
        active = codes.detach() > 0
        return Pass(
            recon=codes @ self.W_dec + self.b_dec,
            penalty=self.penalty(codes),
            l0=active.sum(dim=1, dtype=torch.float32).mean(),
            fired=active.any(dim=0),
        )

    def penalty(self, codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        """What the objective adds to the reconstruction error for dense codes; nothing where `activate` is sparse."""
        return codes.new_zeros(())

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the length of its rows (Bricken et al. 2023)."""
        gradient = self.W_dec.grad
        if gradient is not None:
            rows = normalize(self.W_dec, dim=1)
            gradient.addcmul_((gradient * rows).sum(dim=1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def normalise_rows(self) -> None:
        """Bring the decoder's rows back to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    def set_statistics(self, numbers: Statistics, spec: CaptureSpec | None) -> None:
        """Normalise as these statistics of the data say from now on, and remember where the data came from."""
        if numbers.mean.numel() != self.d_in:
            raise ValueError(
                f"the tokens are {numbers.mean.numel()} wide but the SAE's d_in is {self.d_in}; "
                f"set d_in to {numbers.mean.numel()}."
            )
        self.mean.copy_(numbers.mean)
        self.scale.fill_(numbers.scale)
        self.mean_norm = numbers.mean_norm
        self.spec = spec

    @torch.no_grad()
    def fold(self) -> SAE:
        """A copy with the same codes and reconstructions whose normalisation is in its weights (mean 0, scale 1).

        Its decoder rows have length 1/scale: codes keep their unit, so rows must carry the raw one.
        """
        folded = copy.deepcopy(self)
        folded.W_enc.mul_(self.scale)
        folded.W_dec.div_(self.scale)
        folded.b_dec.copy_(self.mean + self.b_dec / self.scale)
        folded.mean.zero_()
        folded.scale.fill_(1.0)
        return folded


class L1(SAE):
    """ReLU codes; training adds `l1` times the mean over tokens of the codes' sum.

    Args:
        d_in: width of a token.
        n_features: number of features.
        l1: weight of the penalty, beside a squared error summed over channels of normalised tokens.
    """

    def __init__(self, d_in: int, n_features: int, l1: float = 1.0) -> None:
        super().__init__(d_in, n_features)
        self.l1 = l1

    def options(self) -> dict[str, int | float]:
        return {"l1": self.l1}

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return pre_acts.relu()

    def penalty(self, codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        # Decoder rows have unit length, so the sum of codes cannot be made small by making the rows long.
        return self.l1 * codes.sum(dim=1).mean()


class TopK(SAE):
    """The k largest pre-activations of a token, where positive.

    Args:
        d_in: width of a token.
        n_features: number of features.
        k: features kept a token.
    """

    restart_gain: ClassVar[float] = 1.0  # a shorter row would never be among the k largest

    def __init__(self, d_in: int, n_features: int, k: int) -> None:
        super().__init__(d_in, n_features)
        if not 1 <= k <= n_features:
            raise ValueError(f"k is {k}, expected 1 to n_features = {n_features}.")
        self.k = k

    def options(self) -> dict[str, int | float]:
        return {"k": self.k}

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        flat = pre_acts.reshape(-1, self.n_features)
        indices = kernels.largest(flat.detach(), self.k)
        codes = torch.zeros_like(flat).scatter(1, indices, flat.gather(1, indices).relu())
        return codes.view_as(pre_acts)

    def run(self, x: Float[Tensor, "N D"]) -> Pass:
        pre = self.project(x)
        indices = kernels.largest(pre.detach(), self.k)
        values = pre.gather(1, indices).relu()
        active = values.detach() > 0
        fired = torch.zeros(self.n_features, device=x.device).index_add_(0, indices.flatten(), active.flatten().float())
        return Pass(
            recon=kernels.decode(values, indices, self.W_dec) + self.b_dec,
            penalty=values.new_zeros(()),
            l0=active.sum(dim=1, dtype=torch.float32).mean(),
            fired=fired > 0,
        )
