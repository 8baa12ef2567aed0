"""AuxK (Gao et al. 2024) in a fused step: the dead features explain what the others left.

The pre-activations of all features are there already, so it costs four products as narrow as there are dead features.
Legend: N tokens, D width, F features, A features of the auxiliary loss, of which some only fill up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.kernels import columns, selection
from fluxsae.sae import SAE
from fluxsae.training.steps.fused.kernels.row_updates import Auxiliary
from fluxsae.training.steps.fused.kernels.scalars import Weighed

_BUCKET = 128
"""The features' number is rounded up to this, so that few recorded graphs serve all numbers of dead features."""


class AuxiliaryLoss(NamedTuple):
    """The whole loss a channel, the encoder bias's whole gradient, and gradients of encoder and decoder rows."""

    loss: Float[Tensor, ""]
    bias: Float[Tensor, "F"]
    enc: Auxiliary | None
    dec: Auxiliary | None


class _Dead(NamedTuple):
    """The dead features; behind them feature 0, not used."""

    features: Int[Tensor, "A"]
    used: Float[Tensor, "A"]
    row_of: Int[Tensor, "F"]

    def fill(self, dead: Tensor) -> None:
        n = len(dead)
        self.features.zero_()[:n] = dead
        self.used.zero_()[:n] = 1.0
        self.row_of.fill_(-1)[dead] = torch.arange(n, device=dead.device, dtype=torch.int32)


class AuxiliaryPass:
    """The auxiliary loss of one SAE: of its `aux_k` strongest dead features a token, times `coef`."""

    def __init__(self, sae: SAE, aux_k: int, coef: float) -> None:
        self.d_in = sae.d_in
        self.n_features = sae.n_features
        self.aux_k = aux_k if coef else 0
        self.coef = coef
        self._last: Tensor | None = None
        self._of_size: dict[int, _Dead] = {}
        self._dead: _Dead | None = None

    def set_features(self, dead: Int[Tensor, "M"]) -> int:
        """Use these features from now on. Returns how many places they take; where as many did, in those places."""
        n = len(dead) if self.aux_k else 0
        size = -(-n // _BUCKET) * _BUCKET
        if dead is not self._last:
            if size not in self._of_size:
                self._of_size[size] = self._make(size, dead.device)
            self._of_size[size].fill(dead[:n])
            self._last, self._dead = dead, self._of_size[size]
        return size

    def codes(
        self, pre_acts: Float[Tensor, "N F"], bias: Float[Tensor, "F"] | None = None
    ) -> Float[Tensor, "N A"] | None:
        """The dead features' codes, None when there are none."""
        dead = self._dead
        if dead is None or not len(dead.features):
            return None
        codes = pre_acts.new_empty(len(pre_acts), len(dead.features))
        bias = torch.zeros(self.n_features, device=codes.device) if bias is None else bias
        columns.positive_columns(pre_acts, bias, dead.features, dead.used, codes)
        if self.aux_k < len(dead.features):
            selection.keep_largest(codes, codes, self.aux_k)
        return codes

    def loss(
        self,
        codes: Float[Tensor, "N A"] | None,
        x: Float[Tensor, "N D"],
        error: Float[Tensor, "N D"],
        weighed: Weighed,
        rows: Float[Tensor, "F D"],
        row_scale: Float[Tensor, "F"],
        along: Float[Tensor, "F"] | None,
        bias: Float[Tensor, "F"],
    ) -> AuxiliaryLoss:
        """Of `error` = weights · (recon - x), whose loss it joins. Adds the gradient along decoder rows to `along`."""
        dead, weights = self._dead, weighed.weights
        if codes is None or dead is None:
            return AuxiliaryLoss(weighed.loss, bias, None, None)
        chosen = (rows[dead.features] * row_scale[dead.features, None]).to(codes.dtype)
        miss = torch.addcmul(error, codes @ chosen, weights.to(error.dtype)[:, None])
        square = torch.empty(len(miss), device=miss.device)
        columns.squared_lengths(miss, square)
        slopes = miss @ chosen.T
        sums = columns.mask_slopes(codes, slopes, torch.zeros((), device=miss.device)) * self.coef
        if along is not None:
            along.index_add_(0, dead.features, sums[3])
        loss = weighed.loss + self.coef * (square / weights).mean() / self.d_in
        enc, dec = (torch.mm(a.T, b).mul_(self.coef) for a, b in ((slopes, x), (codes, miss)))
        bias = bias.index_add(0, dead.features, sums[1])
        return AuxiliaryLoss(loss, bias, Auxiliary(dead.row_of, enc), Auxiliary(dead.row_of, dec))

    def _make(self, size: int, device: torch.device) -> _Dead:
        row_of = torch.empty(self.n_features, device=device, dtype=torch.int32)
        return _Dead(torch.empty(size, device=device, dtype=torch.int64), torch.empty(size, device=device), row_of)
