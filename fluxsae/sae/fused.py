"""A training step of an L1 or TopK SAE as a few hand-made passes: no autograd, no gradients in memory, no host waits.

It minimises what `SAETraining` minimises. A sparse step (TopK, small k) touches only the decoder rows, tokens and
errors that belong to codes above 0; a dense one does everything by matrix products. Either is recorded once as CUDA
graphs and replayed. Gradients are of half the summed squared error until Adam multiplies them by 2 / (N · D).
Where several processes have tokens of their own, each steps its share of the features, and gives the others the copies
that products read (ZeRO, Rajbhandari et al. 2020, stage 1). The gradients of others' features reach memory, in the
dtype of products, to be sent. NCCL's exchanges are part of the graphs.
Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Adam

from fluxsae.graphs import Graphs
from fluxsae.processes import OneAllReduce, Processes
from fluxsae.sae.coder import L1, SAE, TopK
from fluxsae.sae.fp8 import Scaled, product, why_no_fp8

if find_spec("triton") is not None:
    from fluxsae.sae.auxiliary import AuxiliaryLoss, AuxiliaryPass
    from fluxsae.sae.kernels import columns, decoding, feature_lists, row_updates, scalars, selection
    from fluxsae.sae.kernels.feature_lists import FeatureLists
    from fluxsae.sae.kernels.row_updates import AdamState, Auxiliary, UnitRows

SPARSE_UP_TO = 128
"""The largest k for which gathering rows beats matrix products (measured on an H100 at D = 3072, F = 12288)."""


ALONE = Processes(0, 1, None)

CHECKED = 1024
"""Tokens on which a fused step is compared with autograd's before it trains."""

_FITTED_EVERY = 64
"""Steps between looks at how large numbers are that are multiplied as fp8."""


class Outcome(NamedTuple):
    """What a forward pass found, on the device. `loss` and `mse` are a channel; `fired` counts tokens a feature."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    fired: Tensor
    n_tokens: int

    @property
    def l0(self) -> Float[Tensor, ""]:
        return self.fired.sum() / self.n_tokens


class Seen(NamedTuple):
    """On how many tokens of all processes each feature fired in a step, and how many tokens there were."""

    fired: Tensor
    n_tokens: Tensor | int


@dataclass(frozen=True)
class Settings:
    """What the objective and Adam need to know beside the SAE."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_tokens: float = 10.0
    aux_k: int = 0
    aux_coef: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    graphs: bool = True
    fp8_encoder: bool = False


class StepAdam(Adam):
    """torch's Adam, whose step a fused step may make; the state is the same."""

    fused_step: FusedStep | None = None

    def step(self, closure: Any = None) -> Any:
        if self.fused_step is None:
            return super().step(closure)
        loss = closure() if closure is not None else None
        if self.fused_step is None:  # the closure found it wrong, and left gradients
            super().step()
        else:
            self.fused_step.update(self, self.param_groups[0]["lr"])
        return loss


def why_not_fused(sae: SAE, trainer: Trainer) -> str | None:
    """What keeps a fused step from training this SAE, in words; None when nothing does."""
    checks = {
        f"it is a {type(sae).__name__} and only L1 and TopK have one": type(sae) in (L1, TopK),
        "its features are in groups": len(sae.groups) == 1,
        "Triton is not installed": find_spec("triton") is not None,
        "there is no NVIDIA GPU": sae.W_enc.device.type == "cuda" and torch.version.hip is None,
        f"the precision is {trainer.precision} and not bf16-mixed": trainer.precision == "bf16-mixed",
        f"there are {trainer.world_size} processes whose gradients do not travel as bf16": trainer.world_size == 1
        or (isinstance(trainer.strategy, OneAllReduce) and trainer.strategy.compress),
        f"{trainer.world_size} processes cannot share {sae.n_features} features evenly": not (
            sae.n_features % trainer.world_size
        ),
        "gradients are accumulated over batches": trainer.accumulate_grad_batches == 1,
        "the Trainer clips gradients": not trainer.gradient_clip_val,
    }
    return next((obstacle for obstacle, passed in checks.items() if not passed), None)


class FusedStep:
    """Training steps of one SAE: `forward`, then `update`, for each batch.

    Between steps the decoder's rows may be off unit length by what one step of Adam changes; `settle` makes them exact,
    and must be called before anyone else reads or writes the weights, or reads Adam's moments. With several `processes`
    a step is by the average of what their own tokens say, and all of them must `settle` together. With `fp8_encoder`
    pre-activations are products of fp8 numbers, and gradients pass straight through the rounding to these.
    """

    def __init__(self, sae: SAE, settings: Settings, processes: Processes = ALONE) -> None:
        if type(sae) not in (L1, TopK) or len(sae.groups) > 1:
            raise TypeError(f"a fused step knows L1 and TopK without groups, not this {type(sae).__name__}.")
        self.sae = sae
        self.settings = settings
        self.processes = processes
        self.sparse = isinstance(sae, TopK) and sae.k <= SPARSE_UP_TO
        device = sae.W_enc.device
        obstacle = why_no_fp8(device, sae.d_in, sae.n_features) if settings.fp8_encoder else None
        if obstacle is not None:
            raise ValueError(f"fp8_encoder is true, but {obstacle}; leave it out.")
        self.enc_fp8 = Scaled.of(sae.W_enc.detach()) if settings.fp8_encoder else None
        self.enc_low = sae.W_enc.detach().to(settings.dtype) if self.enc_fp8 is None else self.enc_fp8.values
        self.dec_low = sae.W_dec.detach().to(settings.dtype)
        self.row_scale = torch.ones(sae.n_features, device=device)
        self.own = processes.share(sae.n_features)
        self.squares = torch.empty(row_updates.n_tiles(sae.d_in), self.own.stop - self.own.start, device=device)
        self.lr = torch.zeros((), device=device)
        self.penalty = torch.zeros((), device=device)
        self.updates = torch.tensor([0, -1], device=device)
        self._aux = AuxiliaryPass(sae, settings.aux_k, settings.aux_coef)
        self._buffers: dict[str, Tensor] = {}
        self._x_fp8: Scaled | None = None
        self._until_fitted = 0
        self._kept: dict[str, Tensor] = {}
        self._coming: list[Any] = []  # decoder rows that other processes stepped
        self._states: _States | None = None
        self.seen: Seen  # by the last update
        self._graphs = Graphs(settings.graphs and device.type == "cuda" and processes.recordable)
        self._found: Any = None

    @torch.no_grad()
    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty: float = 0.0) -> Outcome:
        """Loss and what the update needs, for raw tokens. `penalty` is the weight of the codes' sum (L1)."""
        sae = self.sae
        self._make_room(len(tokens))
        self.x = self._buffers["x"][: len(tokens)]
        copy = None if self.sparse else self._buffers["error"][: len(tokens)]
        if self.enc_fp8 is not None:
            if self._until_fitted == 0:
                self._fit_fp8(tokens)
            self._until_fitted -= 1
        x_fp8 = None if self._x_fp8 is None else self._x_fp8.part(len(tokens))
        columns.centre(tokens, sae.mean, sae.scale, sae.b_dec, self.x, copy, x_fp8)
        self.penalty.fill_(penalty / 2)
        self._key = (len(tokens), self._aux.set_features(dead))
        encode, explain = (
            (self._encode_sparse, self._explain_sparse) if self.sparse else (self._encode_dense, self._explain_dense)
        )
        encoded = self._graphs.run(("encode", *self._key), encode)
        self._arrive()
        self._found = self._graphs.run(("explain", *self._key), lambda: explain(encoded), reads=encoded)
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """What the last forward pass found; the next one writes to the same place."""
        outcome: Outcome = self._found.outcome
        return outcome

    def variance_explained(self) -> Float[Tensor, ""]:
        """The FVE of the last batch, against the batch's own channel means."""
        return 1 - self.outcome.mse / self.x.float().var(dim=0, correction=0).mean()

    @torch.no_grad()
    def update(self, optimizer: Adam, lr: float) -> None:
        """Adam's step on the SAE's weights, moments in `optimizer`'s state; nothing where the loss was not finite."""
        states = self._states = _adam_states(optimizer, self.sae)
        self.lr.fill_(lr)
        alone = self.processes.n == 1
        step = partial(self._update_alone if alone else self._update_together, states)
        self.seen = self._graphs.run(("update", *self._key), step, reads=self._found)
        if not alone:  # they may still come while the next tokens are encoded
            rows = (self.dec_low, self.row_scale) if self.sparse else (self.dec_low,)
            self._coming = [self.processes.spread(some) for some in rows]

    def steps_since_bad(self) -> int | None:
        """How many updates ago a loss was not finite for the first time. Waits for the device."""
        made, bad = self.updates.tolist()
        return made - bad if bad >= 0 else None

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the decoder's rows to unit length, and round the copies anew; all processes get all rows."""
        self._arrive()
        if self._states is not None:
            self._spread(self.sae.W_enc, self.sae.W_dec, *self._states.W_enc, *self._states.W_dec)
        self.sae.W_dec.mul_(self.row_scale[:, None])
        self.row_scale.fill_(1.0)
        self.dec_low.copy_(self.sae.W_dec)
        self._until_fitted = 0
        if self.enc_fp8 is None:
            self.enc_low.copy_(self.sae.W_enc)

    def _spread(self, *shared: Tensor) -> None:
        """Give each process's features to all."""
        if self.processes.n > 1:
            for work in [self.processes.spread(rows.detach()) for rows in shared]:
                work.wait()

    def _arrive(self) -> None:
        """What the device does from here on it does with the decoder rows that other processes stepped."""
        while self._coming:
            self._coming.pop().wait()

    def _fit_fp8(self, tokens: Float[Tensor, "N D"]) -> None:
        """Look how large weights and tokens are, and round the weights anew."""
        assert self.enc_fp8 is not None and self._x_fp8 is not None
        self._spread(self.sae.W_enc)
        columns.centre(tokens, self.sae.mean, self.sae.scale, self.sae.b_dec, self.x)
        self._x_fp8.fit(self.x)
        self.enc_fp8.fit(self.sae.W_enc)
        self.enc_fp8.encode(self.sae.W_enc)
        self._until_fitted = _FITTED_EVERY

    def _pre_acts(self, out: Float[Tensor, "N F"], bias: Float[Tensor, "F"] | None = None) -> Float[Tensor, "N F"]:
        """Write W_enc x, and the bias where it is given."""
        if self.enc_fp8 is not None and self._x_fp8 is not None:
            return product(self._x_fp8.part(len(self.x)), self.enc_fp8, out, bias)
        if bias is None:
            return torch.mm(self.x, self.enc_low.T, out=out)
        return torch.addmm(bias, self.x, self.enc_low.T, out=out)

    def _encode_sparse(self) -> _Encoded:
        sae, n = self.sae, len(self.x)
        assert isinstance(sae, TopK)
        pre = self._pre_acts(self._buffers["pre"][:n])
        values, indices = torch.empty(n, sae.k, device=pre.device), pre.new_empty(n, sae.k, dtype=torch.int32)
        selection.select(pre, sae.b_enc, values, indices)
        return _Encoded(values, self._aux.codes(pre, sae.b_enc), indices)

    def _explain_sparse(self, encoded: _Encoded) -> _Found:
        sae, n, (values, aux_codes, indices) = self.sae, len(self.x), encoded
        assert indices is not None
        error = self._buffers["error"][:n]
        slopes = values.new_empty(decoding.n_tiles(sae.d_in), *values.shape)
        squares = values.new_empty(len(slopes), n)
        decoding.explain(values, indices, self.dec_low, self.row_scale, self.x, error, slopes, squares)
        lengths = self._add_up_lengths(squares)
        places = feature_lists.find_places(values, indices, sae.n_features)  # while lengths are added up
        weighed = self._weigh(error, squares, lengths)
        lists = feature_lists.list_by_feature(values, indices, slopes, weighed.weights, places)
        along, bias = torch.empty(2, sae.n_features, device=error.device).unbind()
        row_updates.feature_sums(lists, along, bias)
        aux = self._explain_dead(aux_codes, error, weighed, along, bias)
        outcome = Outcome(aux.loss, weighed.mse, lists.counts, n)
        return _Found(outcome, error, bias, aux, along=along, lists=lists)

    def _encode_dense(self) -> _Encoded:
        sae, n = self.sae, len(self.x)
        codes = self._buffers["codes"][:n]
        bias = sae.b_enc.to(codes.dtype)
        if isinstance(sae, TopK):
            pre = self._pre_acts(self._buffers["pre"][:n], bias)
            selection.keep_largest(pre, codes, sae.k, self._active)
            return _Encoded(codes, self._aux.codes(pre))
        if self.enc_fp8 is not None:
            self._pre_acts(codes, bias).relu_()
        else:
            torch._addmm_activation(bias, self.x, self.enc_low.T, use_gelu=False, out=codes)  # ReLU in the epilogue
        return _Encoded(codes, self._aux.codes(codes))  # a code's ReLU is the code

    def _explain_dense(self, encoded: _Encoded) -> _Found:
        sae, n, (codes, aux_codes, _) = self.sae, len(self.x), encoded
        error = self._buffers["error"][:n]  # which holds x until now
        error.addmm_(codes, self.dec_low, beta=-1)
        squares = torch.empty(1, n, device=error.device)
        columns.squared_lengths(error, squares[0])
        weighed = self._weigh(error, squares, self._add_up_lengths(squares))
        slopes = self._buffers["pre"][:n]
        torch.mm(error, self.dec_low.T, out=slopes)
        active = self._active
        sums = columns.mask_slopes(codes, slopes, self.penalty) if active is None else columns.mask(active, slopes)
        fired, bias = sums[:2]
        aux = self._explain_dead(aux_codes, error, weighed, None, bias)
        loss = aux.loss
        if isinstance(sae, L1):
            loss = scalars.add_penalty(loss, sums[2], self.penalty, 2 / (n * sae.d_in))
        return _Found(Outcome(loss, weighed.mse, fired, n), error, bias, aux, codes=codes, slopes=slopes)

    @property
    def _active(self) -> UInt8[Tensor, "N B"] | None:
        """Room for the bits that say which codes are above 0, where `keep_largest` can tell."""
        bits = self._buffers.get("active")
        return None if bits is None else bits[: len(self.x)]

    def _add_up_lengths(self, squares: Float[Tensor, "P N"]) -> _Lengths | None:
        """Begin to add up the errors' lengths over processes."""
        if self.processes.n == 1:
            return None
        sums = scalars.sum_lengths(squares)
        return _Lengths(sums, self.processes.add_up(sums))

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
        return self._aux.loss(codes, self.x, error, weighed, self.dec_low, self.row_scale, along, bias)

    def _update_alone(self, states: _States) -> Seen:
        found, betas = self._found, self.settings.betas
        hyper = self._factors(found.outcome.loss, states, 2 / (len(self.x) * self.sae.d_in))
        b_dec = self._b_dec_gradient(found)  # by the encoder as it was
        enc, dec = self._weights(states)
        if (lists := found.lists) is not None:
            pieces = self._pieces(lists)
            for state, weights, source, rows, aux in (
                (enc, lists.slopes, self.x, None, found.aux.enc),
                (dec, lists.values, found.error, self._unit(found.along), found.aux.dec),
            ):
                row_updates.sum_pieces(lists, weights, source, pieces)
                row_updates.update_gathered(state, lists, weights, source, pieces, hyper, betas, rows, aux)
        else:
            gradient = torch.mm(found.slopes.T, self.x)
            row_updates.update_given(enc, gradient, hyper, betas, found.aux.enc)
            torch.mm(found.codes.T, found.error, out=gradient)
            row_updates.update_given(dec, gradient, hyper, betas, found.aux.dec, unit=True)
        self._finish(states, hyper, found.aux.bias, b_dec)
        return Seen(found.outcome.fired, found.outcome.n_tokens)

    def _update_together(self, states: _States) -> Seen:
        """Adam's step on this process's share; what is made travels while the next is made or the last is used."""
        found, (enc, dec) = self._found, self._weights(states)
        sums, rows = self._sums()
        arriving = [self.processes.add_up(one) for one in (sums, rows)]
        enc_gradient, dec_gradient = (self._send_others(name) for name in ("W_enc", "W_dec"))
        for work in arriving:
            work.wait()
        n = self.sae.n_features
        fired, n_tokens, loss, b_enc, b_dec, along = sums.split([n, 1, 1, n, self.sae.d_in, n * self.sparse])
        hyper = self._factors(loss[0], states, 2 / (self.processes.n * self.sae.d_in))
        self._step_own(enc, enc_gradient, hyper, self._own_rows(found.aux.enc, rows[0]))
        enc_spread = self.processes.spread(self.enc_low)
        self._step_own(dec, dec_gradient, hyper, self._own_rows(found.aux.dec, rows[1]), along)
        self._finish(states, hyper, b_enc, b_dec)
        enc_spread.wait()
        return Seen(fired, n_tokens[0].long())

    def _sums(self) -> tuple[Tensor, Tensor]:
        """What is added up over processes beside the weights' gradients.

        One behind the other: tokens that each feature fired on, all tokens, the loss, gradients of b_enc and b_dec, and
        of a sparse pass those along decoder rows; and the auxiliary rows of both weights. All but numbers of tokens are
        means over tokens.
        """
        found, share = self._found, 1 / len(self.x)
        counts = found.outcome.fired, torch.full_like(found.outcome.loss[None], len(self.x))
        means = [found.outcome.loss[None], found.aux.bias, self._b_dec_gradient(found)]
        if found.along is not None:
            means.append(found.along)
        enc, dec = found.aux.enc, found.aux.dec
        rows = found.bias.new_empty(2, 0, self.sae.d_in)
        if enc is not None and dec is not None:
            rows = torch.stack([enc.gradient, dec.gradient]) * share
        return torch.cat([*counts, torch.cat(means) * share]), rows

    def _send_others(self, name: str) -> _Gradient:
        """Make and send the gradient, a token, of the features that other processes step; what those send comes."""
        found, share = self._found, 1 / len(self.x)
        everyone = self._place(f"gradient of {name}", self.dec_low)  # and zeros for this process's own
        from_others = self._place(f"others' gradient of {name}", self.dec_low[self.own])
        source = self.x if name == "W_enc" else found.error
        if (lists := found.lists) is not None:
            factors, pieces = lists.slopes if name == "W_enc" else lists.values, self._pieces(lists)
            row_updates.sum_pieces(lists, factors, source, pieces)
            row_updates.gather(lists, factors, source, pieces, share, everyone, self.own)
        else:
            factors, pieces = found.slopes if name == "W_enc" else found.codes, None
            for others in (slice(self.own.start), slice(self.own.stop, None)):
                out = everyone[others]
                torch.addmm(out, factors[:, others].T, source, beta=0, alpha=share, out=out)
        sent = self.processes.add_up_share(everyone, from_others)
        return _Gradient(factors, source, pieces, from_others, sent)

    def _step_own(
        self, state: AdamState, gradient: _Gradient, hyper: Tensor, aux: Auxiliary | None, along: Tensor | None = None
    ) -> None:
        """Adam's step on the features that this process steps, of what its own tokens say and what others sent.

        `along` is given for rows that stay at unit length.
        """
        betas, share = self.settings.betas, 1 / len(self.x)
        factors, source, pieces, from_others, sent = gradient
        sent.wait()
        if pieces is not None:
            lists = self._found.lists
            own = lists._replace(**{name: getattr(lists, name)[self.own] for name in ("counts", "starts", "pieces")})
            unit = None if along is None else self._unit(along)
            row_updates.update_gathered(
                state, own, factors, source, pieces, hyper, betas, unit, aux, factor=share, others=from_others
            )
        else:
            from_others.addmm_(factors[:, self.own].T, source, alpha=share)
            row_updates.update_given(state, from_others, hyper, betas, aux, unit=along is not None)

    def _own_rows(self, aux: Auxiliary | None, gradient: Tensor) -> Auxiliary | None:
        return aux and Auxiliary(aux.row_of[self.own], gradient)

    def _pieces(self, lists: FeatureLists) -> Float[Tensor, "R D"]:
        return self.x.new_empty(len(lists.owners), self.sae.d_in, dtype=torch.float32)

    def _b_dec_gradient(self, found: _Found) -> Float[Tensor, "D"]:
        through = columns.column_sums(self.enc_low, found.bias)
        if self.enc_fp8 is not None:
            through *= self.enc_fp8.inverse
        return columns.column_sums(found.error) - through

    def _factors(self, loss: Tensor, states: _States, factor: float) -> Float[Tensor, "5"]:
        settings = self.settings
        return scalars.adam_factors(loss, self.lr, states.steps, self.updates, settings.betas, factor, settings.eps)

    def _weights(self, states: _States) -> tuple[AdamState, AdamState]:
        """The features of W_enc and W_dec that this process steps, for Adam."""
        enc, dec = (
            AdamState(weight[self.own], moments[0][self.own], moments[1][self.own], low[self.own])
            for weight, moments, low in (
                (self.sae.W_enc, states.W_enc, self.enc_low),
                (self.sae.W_dec, states.W_dec, self.dec_low),
            )
        )
        return (enc if self.enc_fp8 is None else enc._replace(low_scale=self.enc_fp8.scale)), dec

    def _unit(self, along: Tensor) -> UnitRows:
        return UnitRows(self.row_scale[self.own], along[self.own], self.squares)

    def _finish(self, states: _States, hyper: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        """Note how long the decoder's rows are now, and step the biases."""
        if self.sparse:
            row_updates.unit_scale(self.squares, self.row_scale[self.own], hyper)
        for bias, gradient, moments in ((self.sae.b_enc, b_enc, states.b_enc), (self.sae.b_dec, b_dec, states.b_dec)):
            rounded = torch.empty_like(bias)
            state = AdamState(*(t.view(1, -1) for t in (bias.detach(), *moments, rounded)))
            row_updates.update_given(state, gradient.view(1, -1), hyper, self.settings.betas)

    def _place(self, name: str, like: Tensor) -> Tensor:
        """Memory of this name, always the same, at first of zeros."""
        if name not in self._kept:
            self._kept[name] = torch.zeros_like(like)
        return self._kept[name]

    def _make_room(self, n_tokens: int) -> None:
        """Make buffers for as many tokens: before a pass, as recorded graphs write to those that there were."""
        if self._buffers and n_tokens <= len(self._buffers["x"]):
            return
        widths = {"x": self.sae.d_in, "error": self.sae.d_in, "pre": self.sae.n_features}
        if not self.sparse:
            widths["codes"] = self.sae.n_features
        self._graphs.clear()
        self._buffers = {
            name: torch.empty(n_tokens, width, device=self.enc_low.device, dtype=self.settings.dtype)
            for name, width in widths.items()
        }
        if isinstance(self.sae, TopK) and not self.sparse and selection.packs(self.sae.n_features, self.settings.dtype):
            self._buffers["active"] = torch.empty(
                n_tokens, self.sae.n_features // 8, device=self.enc_low.device, dtype=torch.uint8
            )
        if self.enc_fp8 is not None:
            self._x_fp8 = Scaled.empty(n_tokens, self.sae.d_in, self.enc_low.device)
            self._until_fitted = 0


def disagreement(
    step: FusedStep, optimizer: Adam, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty: float, loss: Tensor
) -> str | None:
    """In words, what tells a fused step on `tokens` grossly from autograd's, whose `loss` of them it is; else None.

    Kernels are compiled for the GPU at hand, and few of all GPUs have run them. Which of two equal pre-activations is
    kept differs, and with it up to a fifth of the gradients; wrong addresses or signs make more. Weights stay as they
    are, and the optimizer's state as if it had made no step; so it must have made none.
    """
    sae = step.sae
    with torch.enable_grad():
        loss.backward()
    for parameter in sae.parameters():
        if parameter.grad is not None and step.processes.n > 1:
            parameter.grad = step.processes.total(parameter.grad) / step.processes.n
    sae.remove_parallel_gradient()
    outcome = step.forward(tokens, dead, penalty)
    step.update(optimizer, 0.0)
    step.settle()
    checks = {"loss": (outcome.loss, loss.detach(), 0.03)}
    for name, parameter in sae.named_parameters():
        state = optimizer.state[parameter]
        if parameter.shape[0] == sae.n_features and parameter.grad is not None:
            gradient = state["exp_avg"] / (1 - step.settings.betas[0])
            checks[f"gradient of {name}"] = (gradient, parameter.grad, 0.5)
        for value in state.values():
            value.zero_()
        parameter.grad = None
    for name, (found, expected, tolerance) in checks.items():
        off = float((found - expected).norm() / expected.norm())
        if not off <= tolerance:
            return f"the {name} is {off:.0%} off autograd's on this GPU"
    return None


class _Encoded(NamedTuple):
    """Codes and those of dead features; of a sparse pass also the features that the codes are of."""

    codes: Tensor
    aux_codes: Tensor | None
    indices: Tensor | None = None


class _Lengths(NamedTuple):
    """Sums over this process's errors, which become those of all when what is `coming` is there."""

    sums: Tensor
    coming: Any


class _Gradient(NamedTuple):
    """What a weight's gradient is made of: factors of tokens or errors, pieces of sparse sums, others' sums to come."""

    factors: Tensor
    source: Tensor
    pieces: Tensor | None
    from_others: Tensor
    sent: Any


class _Found(NamedTuple):
    """What the update needs of a forward pass: gradients along decoder rows and lists from a sparse one, codes and
    slopes from a dense one."""

    outcome: Outcome
    error: Tensor
    bias: Tensor  # without the auxiliary loss's part, which leaves b_dec alone
    aux: AuxiliaryLoss
    along: Tensor | None = None
    lists: FeatureLists | None = None
    codes: Tensor | None = None
    slopes: Tensor | None = None


class _States(NamedTuple):
    """Adam's moments of each weight, and its step counts."""

    W_enc: tuple[Tensor, Tensor]
    W_dec: tuple[Tensor, Tensor]
    b_enc: tuple[Tensor, Tensor]
    b_dec: tuple[Tensor, Tensor]
    steps: list[Tensor]


def _adam_states(optimizer: Adam, sae: SAE) -> _States:
    """The state in the form that torch's own Adam leaves and loads."""
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
    return _States(w_enc, w_dec, b_enc, b_dec, [state["step"] for state in states])
