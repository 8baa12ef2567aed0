"""Adam's step on what a forward pass found, by one process or by several.

Where several processes have tokens of their own, each steps its share of the features, and gives the others the copies
that products read (ZeRO, Rajbhandari et al. 2020, stage 1). The gradients of others' features reach memory, in the
dtype of products, to be sent; no other gradient of a sparse pass does. NCCL's exchanges are part of recorded graphs.
Legend: D width, F features, R rows of pieces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Adam

from fluxsae.kernels import columns
from fluxsae.runtime import Processes
from fluxsae.sae import SAE
from fluxsae.training.steps.base import Fired
from fluxsae.training.steps.fused.copies import Copies
from fluxsae.training.steps.fused.kernels import row_updates, scalars
from fluxsae.training.steps.fused.kernels.feature_lists import FeatureLists
from fluxsae.training.steps.fused.kernels.row_updates import AdamState, Auxiliary, UnitRows
from fluxsae.training.steps.fused.passes import Found, SparseFactors
from fluxsae.training.steps.fused.settings import Settings


class States(NamedTuple):
    """Adam's moments of each weight, and its step counts."""

    W_enc: tuple[Tensor, Tensor]
    W_dec: tuple[Tensor, Tensor]
    b_enc: tuple[Tensor, Tensor]
    b_dec: tuple[Tensor, Tensor]
    steps: list[Tensor]

    @classmethod
    def of(cls, optimizer: Adam, sae: SAE) -> States:
        """The optimizer's state, in the form that torch's own Adam leaves and loads."""
        parameters = (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
        for parameter in parameters:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [optimizer.state[parameter] for parameter in parameters]
        w_enc, w_dec, b_enc, b_dec = ((state["exp_avg"], state["exp_avg_sq"]) for state in states)
        return cls(w_enc, w_dec, b_enc, b_dec, [state["step"] for state in states])


class Updates:
    """Adam's steps on one SAE, by the learning rate that `lr` holds; none where the loss is not finite.

    `count` has how many were asked for, and which of them was the first whose loss was not, -1 for none.
    """

    def __init__(self, sae: SAE, settings: Settings, processes: Processes, copies: Copies) -> None:
        device = sae.W_enc.device
        self.sae = sae
        self.settings = settings
        self.processes = processes
        self.copies = copies
        self.own = processes.share(sae.n_features)
        self.lr = torch.zeros((), device=device)
        self.count = torch.tensor([0, -1], device=device)
        self._squares = torch.empty(row_updates.n_tiles(sae.d_in), self.own.stop - self.own.start, device=device)
        self._kept: dict[str, Tensor] = {}

    def make(self, found: Found, states: States) -> Fired:
        """One step. With several processes, all make it, each on its own features."""
        return self._alone(found, states) if self.processes.n == 1 else self._together(found, states)

    def _alone(self, found: Found, states: States) -> Fired:
        betas, aux = self.settings.betas, found.aux
        hyper = self._hyper(found.outcome.loss, states, 2 / (len(found.x) * self.sae.d_in))
        b_dec = self._b_dec_gradient(found)  # by the encoder as it was
        enc, dec = self._weights(states)
        if isinstance(found.factors, SparseFactors):
            lists, along = found.factors
            pieces = self._pieces(lists)
            for state, weights, source, unit, rows in (
                (enc, lists.slopes, found.x, None, aux.enc),
                (dec, lists.values, found.error, self._unit(along), aux.dec),
            ):
                row_updates.sum_pieces(lists, weights, source, pieces)
                row_updates.update_gathered(state, lists, weights, source, pieces, hyper, betas, unit, rows)
        else:
            codes, slopes = found.factors
            gradient = torch.mm(slopes.T, found.x)
            row_updates.update_given(enc, gradient, hyper, betas, aux.enc)
            torch.mm(codes.T, found.error, out=gradient)
            row_updates.update_given(dec, gradient, hyper, betas, aux.dec, unit=True)
        self._finish(found, states, hyper, aux.bias, b_dec)
        return Fired(found.outcome.fired, found.outcome.n_tokens)

    def _together(self, found: Found, states: States) -> Fired:
        """What is made travels while the next is made or the last is used."""
        enc, dec = self._weights(states)
        sums, rows = self._sums(found)
        arriving = [self.processes.all_reduce_async(one) for one in (sums, rows)]
        enc_gradient, dec_gradient = (self._send_others(found, name) for name in ("W_enc", "W_dec"))
        for work in arriving:
            work.wait()
        n, n_along = self.sae.n_features, self.sae.n_features * isinstance(found.factors, SparseFactors)
        fired, n_tokens, loss, b_enc, b_dec, along = sums.split([n, 1, 1, n, self.sae.d_in, n_along])
        hyper = self._hyper(loss[0], states, 2 / (self.processes.n * self.sae.d_in))
        self._step_own(enc, enc_gradient, hyper, self._own_rows(found.aux.enc, rows[0]))
        enc_spread = self.processes.all_gather_(self.copies.enc)
        self._step_own(dec, dec_gradient, hyper, self._own_rows(found.aux.dec, rows[1]), along)
        self._finish(found, states, hyper, b_enc, b_dec)
        enc_spread.wait()
        return Fired(fired, n_tokens[0].long())

    def _sums(self, found: Found) -> tuple[Tensor, Tensor]:
        """What is added up over processes beside the weights' gradients.

        One behind the other: tokens that each feature fired on, all tokens, the loss, gradients of b_enc and b_dec, and
        of a sparse pass those along decoder rows; and the auxiliary rows of both weights. All but numbers of tokens are
        means over tokens.
        """
        share = 1 / len(found.x)
        counts = found.outcome.fired, torch.full_like(found.outcome.loss[None], len(found.x))
        means = [found.outcome.loss[None], found.aux.bias, self._b_dec_gradient(found)]
        if isinstance(found.factors, SparseFactors):
            means.append(found.factors.along)
        enc, dec = found.aux.enc, found.aux.dec
        rows = found.bias.new_empty(2, 0, self.sae.d_in)
        if enc is not None and dec is not None:
            rows = torch.stack([enc.gradient, dec.gradient]) * share
        return torch.cat([*counts, torch.cat(means) * share]), rows

    def _send_others(self, found: Found, name: str) -> _Gradient:
        """Make and send the gradient, a token, of the features that other processes step; what those send comes."""
        share, dec = 1 / len(found.x), self.copies.dec
        everyone = self._place(f"gradient of {name}", dec)  # and zeros for this process's own
        from_others = self._place(f"others' gradient of {name}", dec[self.own])
        source = found.x if name == "W_enc" else found.error
        own: _Own | None = None
        if isinstance(found.factors, SparseFactors):
            lists = found.factors.lists
            factors, pieces = lists.slopes if name == "W_enc" else lists.values, self._pieces(lists)
            row_updates.sum_pieces(lists, factors, source, pieces)
            row_updates.gather(lists, factors, source, pieces, share, everyone, self.own)
            parts = {part: getattr(lists, part)[self.own] for part in ("counts", "starts", "pieces")}
            own = _Own(lists._replace(**parts), pieces)
        else:
            factors = found.factors.slopes if name == "W_enc" else found.factors.codes
            for others in (slice(self.own.start), slice(self.own.stop, None)):
                out = everyone[others]
                torch.addmm(out, factors[:, others].T, source, beta=0, alpha=share, out=out)
        sent = self.processes.reduce_scatter_async(everyone, from_others)
        return _Gradient(factors, source, share, own, from_others, sent)

    def _step_own(
        self, state: AdamState, gradient: _Gradient, hyper: Tensor, aux: Auxiliary | None, along: Tensor | None = None
    ) -> None:
        """Adam's step on the features that this process steps, of what its own tokens say and what others sent.

        `along` is given for rows that stay at unit length; a dense pass's is empty, as it is found with whole rows.
        """
        betas, (factors, source, share, own, from_others, sent) = self.settings.betas, gradient
        sent.wait()
        if own is not None:
            unit = None if along is None else self._unit(along)
            row_updates.update_gathered(
                state, own.lists, factors, source, own.pieces, hyper, betas, unit, aux, share, from_others
            )
        else:
            from_others.addmm_(factors[:, self.own].T, source, alpha=share)
            row_updates.update_given(state, from_others, hyper, betas, aux, unit=along is not None)

    def _own_rows(self, aux: Auxiliary | None, gradient: Tensor) -> Auxiliary | None:
        return aux and Auxiliary(aux.row_of[self.own], gradient)

    def _pieces(self, lists: FeatureLists) -> Float[Tensor, "R D"]:
        return lists.values.new_empty(len(lists.owners), self.sae.d_in)

    def _b_dec_gradient(self, found: Found) -> Float[Tensor, "D"]:
        return columns.column_sums(found.error) - self.copies.through_encoder(found.bias)

    def _hyper(self, loss: Tensor, states: States, factor: float) -> Float[Tensor, "5"]:
        settings = self.settings
        return scalars.adam_factors(loss, self.lr, states.steps, self.count, settings.betas, factor, settings.eps)

    def _weights(self, states: States) -> tuple[AdamState, AdamState]:
        """The features of W_enc and W_dec that this process steps, for Adam."""
        enc, dec = (
            AdamState(weight[self.own], moments[0][self.own], moments[1][self.own], low[self.own])
            for weight, moments, low in (
                (self.sae.W_enc, states.W_enc, self.copies.enc),
                (self.sae.W_dec, states.W_dec, self.copies.dec),
            )
        )
        fp8 = self.copies.enc_fp8
        return (enc if fp8 is None else enc._replace(low_scale=fp8.scale)), dec

    def _unit(self, along: Tensor) -> UnitRows:
        return UnitRows(self.copies.row_scale[self.own], along[self.own], self._squares)

    def _finish(self, found: Found, states: States, hyper: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        """Note how long the decoder's rows are after a sparse step, and step the biases."""
        if isinstance(found.factors, SparseFactors):
            row_updates.unit_scale(self._squares, self.copies.row_scale[self.own], hyper)
        for bias, gradient, moments in ((self.sae.b_enc, b_enc, states.b_enc), (self.sae.b_dec, b_dec, states.b_dec)):
            rounded = torch.empty_like(bias)
            state = AdamState(*(t.view(1, -1) for t in (bias.detach(), *moments, rounded)))
            row_updates.update_given(state, gradient.view(1, -1), hyper, self.settings.betas)

    def _place(self, name: str, like: Tensor) -> Tensor:
        """Memory of this name, always the same, at first of zeros."""
        if name not in self._kept:
            self._kept[name] = torch.zeros_like(like)
        return self._kept[name]


class _Own(NamedTuple):
    """The lists of the features that this process steps, and pieces of the sums over all lists."""

    lists: FeatureLists
    pieces: Tensor


class _Gradient(NamedTuple):
    """What a weight's gradient is made of: factors of tokens or errors, each times `share`, by which lists where it is
    sparse; others' sums to come."""

    factors: Tensor
    source: Tensor
    share: float
    own: _Own | None
    from_others: Tensor
    sent: Any
