"""The weights as the products and gathers of a fused step read them.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.kernels import columns
from fluxsae.kernels.fp8 import Scaled, product, why_no_fp8
from fluxsae.sae import SAE
from fluxsae.training.steps.fused.settings import Settings


class Copies:
    """`enc` and `dec`, in the dtype of products; with an fp8 encoder, `enc` are the values of `enc_fp8`.

    Between sparse steps the decoder's rows, here and in the SAE, are off unit length; times `row_scale` they have it.
    """

    def __init__(self, sae: SAE, settings: Settings) -> None:
        device = sae.W_enc.device
        obstacle = why_no_fp8(device, sae.d_in, sae.n_features) if settings.fp8_encoder else None
        if obstacle is not None:
            raise ValueError(f"fp8_encoder is true, but {obstacle}; leave it out.")
        self.sae = sae
        self.enc_fp8 = Scaled.of(sae.W_enc.detach()) if settings.fp8_encoder else None
        self.enc = sae.W_enc.detach().to(settings.dtype) if self.enc_fp8 is None else self.enc_fp8.values
        self.dec = sae.W_dec.detach().to(settings.dtype)
        self.row_scale = torch.ones(sae.n_features, device=device)

    def project(
        self,
        x: Float[Tensor, "N D"],
        x_fp8: Scaled | None,
        out: Float[Tensor, "N F"],
        bias: Float[Tensor, "F"] | None = None,
    ) -> Float[Tensor, "N F"]:
        """Write W_enc x, and the bias where it is given; by `x_fp8` where the encoder is fp8."""
        if self.enc_fp8 is not None and x_fp8 is not None:
            return product(x_fp8, self.enc_fp8, out, bias)
        if bias is None:
            return torch.mm(x, self.enc.T, out=out)
        return torch.addmm(bias, x, self.enc.T, out=out)

    def through_encoder(self, weights: Float[Tensor, "F"]) -> Float[Tensor, "D"]:
        """W_encᵀ weights."""
        through = columns.column_sums(self.enc, weights)
        return through if self.enc_fp8 is None else through.mul_(self.enc_fp8.inverse)

    def fit_fp8(self) -> None:
        """Look how large the encoder's numbers are, and round them anew."""
        assert self.enc_fp8 is not None
        self.enc_fp8.fit(self.sae.W_enc)
        self.enc_fp8.encode(self.sae.W_enc)

    def renew(self) -> None:
        """Bring the decoder's rows to unit length, and round what is not fp8 anew."""
        self.sae.W_dec.mul_(self.row_scale[:, None])
        self.row_scale.fill_(1.0)
        self.dec.copy_(self.sae.W_dec)
        if self.enc_fp8 is None:
            self.enc.copy_(self.sae.W_enc)
