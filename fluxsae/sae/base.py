"""What all kinds of autoencoders share; each kind has a file of its own in `kinds/`.

A raw token x is normalised to (x - mean) · scale; codes and weights live in that space, and decoding leads back out.
Legend: N tokens, D width, F features, K kept, M restarted features.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import normalize

from fluxsae.kernels.reference import decode, largest
from fluxsae.records import CaptureSpec, Statistics
from fluxsae.sae.feature_rows import set_rows


class ThresholdForm(NamedTuple):
    """Each code is weight (x - b_dec) + bias where that is above the feature's threshold, else 0."""

    weight: Float[Tensor, "F D"]
    bias: Float[Tensor, "F"]
    thresholds: Float[Tensor, "F"]


class FusedForm(NamedTuple):
    """What a fused training step can minimise, with pre-activations W_enc (x - b_dec) + b_enc.

    Codes are the `k` largest pre-activations of a token, where positive. If `k` is None, they are all positive ones.
    The loss is the squared error plus `penalty` times the mean over tokens of the codes' sum.
    """

    k: int | None
    penalty: float = 0.0


CAPABILITIES = ("threshold_form", "top_k_form", "fused_form", "sharded_form")
"""The methods by which a kind declares what it can do faster. A subclass does not inherit them."""


class TrainOutput(NamedTuple):
    """The result of one training pass over normalised tokens.

    The loss is the squared error of `recon`, plus `penalty`, whose weight may rise over the first steps, plus
    `auxiliary`, a squared error for each token. `partial` holds the reconstructions of a Matryoshka SAE by its first
    group, its first two groups and so on, without the last. `cutoff` is the smallest code that was kept, for kinds that
    choose over the whole batch.
    """

    recon: Float[Tensor, "N D"]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, "F"]
    partial: tuple[Float[Tensor, "N D"], ...] = ()
    auxiliary: Float[Tensor, "N"] | None = None
    cutoff: Float[Tensor, ""] | None = None


class SAE(nn.Module, ABC):
    """A sparse autoencoder over tokens of width `d_in`. A kind is a subclass that says which pre-activations are codes.

    A kind must define `activate`. It defines `options` if its constructor takes further arguments. Everything else has
    a default that is correct but slow. A kind may override how it trains (`training_forward`, `penalty`, `remember`)
    and how dead features come back (`expected_l0`, `reconstruct_from`, `restart`). It may declare faster forms
    (`threshold_form`, `top_k_form`, `fused_form`, `sharded_form`). Faster forms are not inherited, because a subclass
    may compute something else: it must declare them again. A saved SAE names its kind by class path.

    Each row of `W_dec` is the direction of one feature. Training here keeps rows at length 1. `W_enc` starts along the
    same directions. `spec` says what the SAE was trained on, and `mean_norm` is E‖x‖ of those tokens. Both are None
    where that is unknown.

    Training and inference may choose codes differently. `training_forward` is the training pass, and everything else
    is inference. In inference, the codes of a token depend on that token alone.

    Args:
        d_in: width of a token.
        n_features: number of features.
        groups: makes a Matryoshka SAE (Bussmann et al. 2025). The first `groups[0]` features, the first `groups[1]`
            and so on must each rebuild a token without the rest. Sizes ascend and end with n_features. By default
            there is one group of all features.
        seed: decides the initial weights; by default torch's global generator does.
        encoder_gain: initial length of the encoder's rows; those of the decoder have length 1.
    """

    mean: Tensor
    scale: Tensor
    restart_gain: ClassVar[float] = 0.2
    """Length of a restarted feature's encoder row, in mean lengths of the living ones'."""

    def __init__(
        self,
        d_in: int,
        n_features: int,
        groups: list[int] | None = None,
        seed: int | None = None,
        encoder_gain: float = 1.0,
    ) -> None:
        super().__init__()
        if d_in < 1 or n_features < 1:
            raise ValueError(f"an SAE needs d_in and n_features of at least 1, not {d_in} and {n_features}.")
        self.groups = tuple(groups) if groups is not None else (n_features,)
        if self.groups[-1:] != (n_features,) or any(end <= begin for begin, end in pairwise((0, *self.groups))):
            raise ValueError(
                f"groups is {groups}, expected sizes that ascend from at least 1 to n_features = {n_features}."
            )
        self.seed = seed
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        directions = normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(encoder_gain * directions)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.spec: CaptureSpec | None = None
        self.mean_norm: float | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in CAPABILITIES:
            if name not in vars(cls):
                setattr(cls, name, vars(SAE)[name])

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

    @property
    def per_feature(self) -> list[nn.Parameter]:
        """The parameters that have one row, or one number, for each feature."""
        return [self.W_enc, self.b_enc, self.W_dec]

    @property
    def expected_l0(self) -> float | None:
        """The mean number of codes for a token, if the kind fixes it; None if training decides."""
        return None

    def options(self) -> dict[str, Any]:
        """The constructor's arguments beside `d_in` and `n_features`."""
        return {"groups": list(self.groups) if len(self.groups) > 1 else None, "seed": self.seed}

    def threshold_form(self) -> ThresholdForm | None:
        """Inference as one threshold for each feature, for kernels that pool codes; None if it is not of that form."""
        return None

    def top_k_form(self) -> int | None:
        """k, if codes are the k largest pre-activations W_enc (x - b_dec) + b_enc of a token, where positive."""
        return None

    def fused_form(self) -> FusedForm | None:
        """The loss, if a fused step can minimise it; None means that autograd trains."""
        return None

    def sharded_form(self) -> type[SAE] | None:
        """The class that computes with a share of the features in each process, if there is one (see `sharding`)."""
        return None

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

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        """One training pass over normalised tokens."""
        pre = self.project(x)
        return self.train_output(pre, self.activate(pre))

    def train_output(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> TrainOutput:
        """The rest of a training pass whose codes have been chosen."""
        *partial, recon = self.reconstructions(codes)
        active = codes.detach() > 0
        return TrainOutput(
            recon=recon,
            penalty=self.penalty(pre_acts, codes),
            l0=active.sum(dim=1, dtype=torch.float32).mean(),
            fired=active.any(dim=0),
            partial=tuple(partial),
        )

    def reconstructions(self, codes: Float[Tensor, "N F"]) -> list[Float[Tensor, "N D"]]:
        """Reconstructions of normalised tokens by the first group of features, the first two groups, …, all of them."""
        recons: list[Tensor] = []
        for begin, end in pairwise((0, *self.groups)):
            before = recons[-1] if recons else self.b_dec
            recons.append(torch.addmm(before, codes[:, begin:end], self.W_dec[begin:end]))
        return recons

    def penalty(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        """What training adds to the squared error; 0 by default."""
        return codes.new_zeros(())

    def reconstruct_from(self, x: Float[Tensor, "N D"], features: Int[Tensor, "M"], k: int) -> Float[Tensor, "N D"]:
        """What the `k` strongest of some features add to b_dec. Gradients reach these features only."""
        pre = (x - self.b_dec.detach()) @ self.W_enc[features].T + self.b_enc[features]
        indices = largest(pre.detach(), k)
        return decode(pre.gather(1, indices).relu(), indices, self.W_dec[features])

    def of_all(self, numbers: Shaped[Tensor, "H *shape"]) -> Shaped[Tensor, "F *shape"]:
        """Numbers of all features, from the numbers of the features that this process holds."""
        return numbers

    def remember(self, run: TrainOutput, average: Callable[[Tensor], Tensor]) -> None:
        """Keep what inference needs of a training pass; `average` computes the mean over processes."""

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the part of the decoder's gradient that only changes the length of rows (Bricken et al. 2023)."""
        gradient = self.W_dec.grad
        if gradient is not None:
            rows = normalize(self.W_dec, dim=1)
            gradient.addcmul_((gradient * rows).sum(dim=1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def normalise_rows(self) -> None:
        """Bring the decoder's rows back to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def restart(self, features: Int[Tensor, "M"], directions: Float[Tensor, "M D"], length: Float[Tensor, ""]) -> None:
        """Start features anew along unit `directions`, with encoder rows of this length."""
        set_rows(self.W_dec, features, directions)
        set_rows(self.W_enc, features, length * directions)
        set_rows(self.b_enc, features, 0.0)

    def set_statistics(self, numbers: Statistics, spec: CaptureSpec | None) -> None:
        """Use these statistics of the data for normalisation, and remember where the data came from."""
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
        """A copy whose weights include the normalisation, so that it has mean 0 and scale 1.

        Codes and reconstructions stay the same. Decoder rows then have length 1 / scale.
        """
        folded = copy.deepcopy(self)
        folded.W_enc.mul_(self.scale)
        folded.W_dec.div_(self.scale)
        folded.b_dec.copy_(self.mean + self.b_dec / self.scale)
        folded.mean.zero_()
        folded.scale.fill_(1.0)
        return folded


def checked_k(k: int, n_features: int) -> int:
    """k itself. ValueError if it is below 1 or above n_features."""
    if not 1 <= k <= n_features:
        raise ValueError(f"k is {k}, expected 1 to n_features = {n_features}.")
    return k


def kinds_with(form: str) -> list[str]:
    """The names of the kinds at hand that have one of the `CAPABILITIES`."""
    kinds = [kind for kind in SAE.__subclasses__() if vars(kind)[form] is not vars(SAE)[form]]
    return sorted(kind.__name__ for kind in kinds)
