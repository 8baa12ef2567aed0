"""The way from tokens to the loss, and to what the update needs of it.

A sparse pass (TopK, small k) touches only the decoder rows, tokens and errors that belong to codes above 0; a dense one
does everything by matrix products. Gradients are of half the summed squared error, until Adam multiplies them.
Legend: N tokens, D width, F features, M dead features, P tiles of channels, B bytes of F bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fluxsae.kernels import columns, selection
from fluxsae.kernels.fp8 import Scaled
from fluxsae.runtime import Processes
from fluxsae.sae import SAE, FusedForm
from fluxsae.training.steps.fused.auxiliary import AuxiliaryLoss, AuxiliaryPass
from fluxsae.training.steps.fused.copies import Copies
from fluxsae.training.steps.fused.kernels import decoding, feature_lists, row_updates, scalars
from fluxsae.training.steps.fused.kernels.feature_lists import FeatureLists
from fluxsae.training.steps.fused.settings import Settings


class Batch(NamedTuple):
    """What a forward pass found, on the device. `loss` and `mse` are a channel; `fired` counts tokens a feature."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    fired: Tensor
    n_tokens: int

    @property
    def l0(self) -> Float[Tensor, ""]:
        return self.fired.sum() / self.n_tokens


class Encoded(NamedTuple):
    """Codes and those of dead features; of a sparse pass also the features that the codes are of."""

    codes: Tensor
    aux_codes: Tensor | None
    indices: Tensor | None = None


class SparseFactors(NamedTuple):
    """What the weights' gradients are sums of, feature by feature, and how much of them is along decoder rows."""

    lists: FeatureLists
    along: Float[Tensor, "F"]


class DenseFactors(NamedTuple):
    """What the weights' gradients are products of: codes, and gradients of pre-activations."""

    codes: Float[Tensor, "N F"]
    slopes: Float[Tensor, "N F"]


class Found(NamedTuple):
    """What the update needs of a forward pass. `bias` is b_enc's gradient without the auxiliary loss's part, which
    leaves b_dec alone."""

    outcome: Batch
    x: Float[Tensor, "N D"]
    error: Float[Tensor, "N D"]
    bias: Float[Tensor, "F"]
    aux: AuxiliaryLoss
    factors: SparseFactors | DenseFactors


class Passes(ABC):
    """Forward passes of one SAE: `begin`, `encode`, then `explain`, for each batch. The next one writes to the same
    places, so that graphs can be recorded of what follows `begin`."""

    def __init__(self, sae: SAE, form: FusedForm, settings: Settings, processes: Processes, copies: Copies) -> None:
        self.sae = sae
        self.form = form
        self.settings = settings
        self.processes = processes
        self.copies = copies
        self.penalty = torch.zeros((), device=sae.W_enc.device)
        self.aux = AuxiliaryPass(sae, settings.aux_k, settings.aux_coef)
        self.buffers: dict[str, Tensor] = {}
        self.x_fp8: Scaled | None = None
        self.x: Tensor

    def make_room(self, n_tokens: int) -> bool:
        """Make buffers for as many tokens. Returns whether there were none, so that what was recorded is void."""
        if self.buffers and n_tokens <= len(self.buffers["x"]):
            return False
        self.buffers = {
            name: torch.empty(n_tokens, width, device=self.sae.W_enc.device, dtype=dtype)
            for name, (width, dtype) in self._widths().items()
        }
        if self.settings.fp8_encoder:
            self.x_fp8 = Scaled.empty(n_tokens, self.sae.d_in, self.sae.W_enc.device)
        return True

    def begin(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty: float) -> tuple[int, int]:
        """Centre raw tokens. Returns what tells recordings apart: how many tokens, and places for dead features."""
        self._centre(tokens, self._x_fp8(len(tokens)))
        self.penalty.fill_(penalty / 2)
        return len(tokens), self.aux.set_features(dead)

    def fit_fp8(self, tokens: Float[Tensor, "N D"]) -> None:
        """Look how large raw tokens and weights are, once centred, and round the weights anew."""
        assert self.x_fp8 is not None
        self._centre(tokens, None)
        self.x_fp8.fit(self.x)
        self.copies.fit_fp8()

    @abstractmethod
    def encode(self) -> Encoded:
        """The codes."""

    @abstractmethod
    def explain(self, encoded: Encoded) -> Found:
        """The reconstruction's error, by the decoder as it is by then, and its gradients."""

    def _widths(self) -> dict[str, tuple[int, torch.dtype]]:
        """Of which width and dtype the buffers are, a row a token."""
        d_in, dtype = self.sae.d_in, self.settings.dtype
        return {"x": (d_in, dtype), "error": (d_in, dtype), "pre": (self.sae.n_features, dtype)}

    def _centre(self, tokens: Float[Tensor, "N D"], x_fp8: Scaled | None) -> None:
        self.x = self.buffers["x"][: len(tokens)]
        columns.centre(tokens, self.sae.mean, self.sae.scale, self.sae.b_dec, self.x, self._copy_of_x(), x_fp8)

    def _copy_of_x(self) -> Float[Tensor, "N D"] | None:
        """Where x is wanted a second time."""
        return None

    def _x_fp8(self, n_tokens: int) -> Scaled | None:
        return None if self.x_fp8 is None else self.x_fp8.part(n_tokens)

    def _project(self, bias: Float[Tensor, "F"] | None = None, out: str = "pre") -> Float[Tensor, "N F"]:
        """Write pre-activations to the buffer `out`, with the bias where it is given."""
        n = len(self.x)
        return self.copies.project(self.x, self._x_fp8(n), self.buffers[out][:n], bias)

    def _add_up_lengths(self, squares: Float[Tensor, "P N"]) -> _Lengths | None:
        """Begin to add up the errors' lengths over processes."""
        if self.processes.n == 1:
            return None
        sums = scalars.sum_lengths(squares)
        return _Lengths(sums, self.processes.all_reduce_async(sums))

    def _weigh(
        self, error: Float[Tensor, "N D"], squares: Float[Tensor, "P N"], lengths: _Lengths | None
    ) -> scalars.Weighed:
        """The tokens' weights, from parts of their errors' squared lengths; multiplies the errors by them."""
        if lengths is not None:
            lengths.coming.wait()
        weighed = scalars.weigh_tokens(squares, self.settings.clip_tokens, self.sae.d_in, lengths and lengths.sums)
        columns.weigh(error, weighed.weights)
        return weighed

    def _explain_dead(
        self, codes: Tensor | None, error: Tensor, weighed: scalars.Weighed, along: Tensor | None, bias: Tensor
    ) -> AuxiliaryLoss:
        return self.aux.loss(codes, self.x, error, weighed, self.copies.dec, self.copies.row_scale, along, bias)


class SparsePasses(Passes):
    """For small k, through gathers of decoder rows and lists of the tokens that each feature fired on."""

    def encode(self) -> Encoded:
        assert self.form.k is not None
        pre, bias, shape = self._project(), self.sae.b_enc, (len(self.x), self.form.k)
        values, indices = torch.empty(shape, device=pre.device), pre.new_empty(shape, dtype=torch.int32)
        selection.select(pre, bias, values, indices)
        return Encoded(values, self.aux.codes(pre, bias), indices)

    def explain(self, encoded: Encoded) -> Found:
        (values, aux_codes, indices), n, n_features = encoded, len(self.x), self.sae.n_features
        assert indices is not None
        error = self.buffers["error"][:n]
        slopes = values.new_empty(decoding.n_tiles(self.sae.d_in), *values.shape)
        squares = values.new_empty(len(slopes), n)
        decoding.explain(values, indices, self.copies.dec, self.copies.row_scale, self.x, error, slopes, squares)
        lengths = self._add_up_lengths(squares)
        places = feature_lists.find_places(values, indices, n_features)  # while lengths are added up
        weighed = self._weigh(error, squares, lengths)
        lists = feature_lists.list_by_feature(values, indices, slopes, weighed.weights, places)
        along, bias = torch.empty(2, n_features, device=error.device).unbind()
        row_updates.feature_sums(lists, along, bias)
        aux = self._explain_dead(aux_codes, error, weighed, along, bias)
        outcome = Batch(aux.loss, weighed.mse, lists.counts, n)
        return Found(outcome, self.x, error, bias, aux, SparseFactors(lists, along))


class DensePasses(Passes):
    """By matrix products, for any k or none. The buffer of errors holds x until they are there."""

    def _widths(self) -> dict[str, tuple[int, torch.dtype]]:
        n_features, dtype = self.sae.n_features, self.settings.dtype
        widths = super()._widths() | {"codes": (n_features, dtype)}
        if self.form.k is not None and selection.packs(n_features, dtype):
            widths["active"] = (n_features // 8, torch.uint8)
        return widths

    def _copy_of_x(self) -> Float[Tensor, "N D"]:
        return self.buffers["error"][: len(self.x)]

    @property
    def _active(self) -> UInt8[Tensor, "N B"] | None:
        """Room for the bits that say which codes are above 0, where `keep_largest` can tell."""
        bits = self.buffers.get("active")
        return None if bits is None else bits[: len(self.x)]

    def encode(self) -> Encoded:
        codes = self.buffers["codes"][: len(self.x)]
        bias = self.sae.b_enc.to(codes.dtype)
        if self.form.k is not None:
            pre = self._project(bias)
            selection.keep_largest(pre, codes, self.form.k, self._active)
            return Encoded(codes, self.aux.codes(pre))
        if self.settings.fp8_encoder:
            self._project(bias, "codes").relu_()
        else:  # with ReLU in the product's last step
            torch._addmm_activation(bias, self.x, self.copies.enc.T, use_gelu=False, out=codes)
        return Encoded(codes, self.aux.codes(codes))  # a code's ReLU is the code

    def explain(self, encoded: Encoded) -> Found:
        (codes, aux_codes, _), n = encoded, len(self.x)
        error = self.buffers["error"][:n]
        error.addmm_(codes, self.copies.dec, beta=-1)
        squares = torch.empty(1, n, device=error.device)
        columns.squared_lengths(error, squares[0])
        weighed = self._weigh(error, squares, self._add_up_lengths(squares))
        slopes = self.buffers["pre"][:n]
        torch.mm(error, self.copies.dec.T, out=slopes)
        active = self._active
        sums = columns.mask_slopes(codes, slopes, self.penalty) if active is None else columns.mask(active, slopes)
        fired, bias = sums[:2]
        aux = self._explain_dead(aux_codes, error, weighed, None, bias)
        loss = aux.loss
        if self.form.penalty:
            loss = scalars.add_penalty(loss, sums[2], self.penalty, 2 / (n * self.sae.d_in))
        return Found(Batch(loss, weighed.mse, fired, n), self.x, error, bias, aux, DenseFactors(codes, slopes))


class _Lengths(NamedTuple):
    """Sums over this process's errors, which become those of all when what is `coming` is there."""

    sums: Tensor
    coming: Any
