"""Changes what a site returns while a pipeline runs: along a feature's direction, or through its codes.

Legend: B batch, T tokens an image, D width, F features, E edited features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from fluxsae.files import derived_seed
from fluxsae.models import FluxPipeline, StepCounter, Uncompiled, count_steps, find_module, read_stream, replace_stream
from fluxsae.records import Site, check_step, parse_site
from fluxsae.sae import SAE

Schedule = Literal["constant", "linear", "cosine"]


class CodeEdit(NamedTuple):
    """What becomes of the codes of some features: z → factor · z + offset."""

    features: list[int]
    factor: Float[Tensor, "E"]
    offset: Float[Tensor, "E"]


@contextmanager
def intervene(
    pipe: FluxPipeline,
    sae: SAE | None = None,
    *,
    add: Mapping[int, float] | None = None,
    scale: Mapping[int, float] | None = None,
    clamp: Mapping[int, float] | None = None,
    ablate: Sequence[int] = (),
    direction: Float[Tensor, "D"] | None = None,
    strength: float = 0.0,
    mask: Tensor | Sequence[Any] | None = None,
    site: str | Site | None = None,
    steps: Iterable[int] | None = None,
    schedule: Schedule = "constant",
    mean_norm: float | None = None,
) -> Iterator[None]:
    """Edit the tokens at a site in every call of `pipe` inside the context, for every image of the batch alike.

    A token x becomes x + w · m · Δ. Here w is the schedule's weight at the step, and m is the mask's weight at the
    token. Δ is the sum of two parts: strength · mean_norm · unit direction for everything that is added, and
    (z′ − z) · decoder row for every code z that is changed.

    Only the difference is added. So the part of x that the SAE does not explain is kept. Edits that change nothing
    (strength 0, scale 1) leave images equal bit for bit. Contexts act in the order in which they are entered, and codes
    are computed from tokens as earlier contexts left them. All passes of a step are edited.

    Args:
        pipe: any `FluxPipeline`.
        sae: the SAE whose features are edited; not needed for `direction` alone.
        add: strength by feature, in units of `mean_norm`.
        scale: factor of the code by feature.
        clamp: new value of the code by feature, on every token of the mask.
        ablate: features whose codes become 0.
        direction: a direction of any length in activation space, added with `strength`.
        strength: of `direction`, in units of `mean_norm`.
        mask: weight of each token, [rows, columns] of the token grid or flat.
        site: where; the SAE's own by default.
        steps: 0-based steps to edit; all by default.
        schedule: the weight over those steps: 1 throughout, or from 1 at the first towards 0 after the last.
        mean_norm: E‖x‖ at the site, raw; the SAE's own by default.

    Raises ValueError for features, sites, steps, masks and widths that do not fit, most of them on entry.
    """
    where = _site(sae, site)
    module = find_module(pipe.transformer, where)
    shift = _shift(sae, add or {}, direction, strength, mean_norm)
    codes = _code_edit(sae, scale or {}, clamp or {}, ablate)
    if shift is None and codes is None:
        yield
        return
    window = None if steps is None else sorted(set(steps))
    if window is not None and window and window[0] < 0:
        raise ValueError(f"step {window[0]} is negative; steps count from 0.")
    weights = None if mask is None else torch.as_tensor(mask, dtype=torch.float32).flatten()
    edit = _Edit(sae, shift, codes, weights)
    with ExitStack() as stack:
        stack.enter_context(Uncompiled(pipe.transformer, [module]))
        counter = stack.enter_context(count_steps(pipe))
        hook = _editor(edit, counter, where, window, schedule)
        stack.callback(module.register_forward_hook(hook).remove)
        yield


def schedule_weight(schedule: Schedule, index: int, n_steps: int) -> float:
    """The weight at the `index`-th of `n_steps` edited steps: 1 at the first; linear, cosine reach 0 after the last."""
    if schedule == "constant":
        return 1.0
    part = index / n_steps
    return 1.0 - part if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))


def random_twin(sae: SAE, features: Sequence[int], seed: int) -> SAE:
    """A copy of `sae` that reads the same codes but whose decoder rows of `features` point in random directions.

    Row norms stay, so an edit through the twin moves tokens as far as the same edit through `sae`: the control.
    """
    twin = copy.deepcopy(sae)
    for feature in features:
        generator = torch.Generator().manual_seed(derived_seed(seed, feature))
        drawn = normalize(torch.randn(sae.d_in, generator=generator), dim=0).to(sae.W_dec)
        with torch.no_grad():
            twin.W_dec[feature] = drawn * sae.W_dec[feature].norm()
    return twin


class _Edit:
    """x → x + weight · mask · Δ(x), its tensors brought to the device of the tokens once."""

    def __init__(self, sae: SAE | None, shift: Tensor | None, codes: CodeEdit | None, mask: Tensor | None) -> None:
        self._sae, self._shift, self._codes, self._mask = sae, shift, codes, mask
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "B T D"], weight: float) -> Float[Tensor, "B T D"]:
        self._move(x.device)
        delta = torch.zeros((), device=x.device)
        if self._shift is not None:
            _check_width(len(self._shift), x)
            delta = delta + self._shift
        if self._codes is not None:
            delta = delta + self._decoded_change(x, self._codes)
        if self._mask is not None:
            delta = delta * self._token_weights(x)
        # The sum is taken in float32, so that a small change of a bfloat16 token is rounded once.
        return (x.float() + weight * delta).to(x.dtype)

    def _decoded_change(self, x: Tensor, edit: CodeEdit) -> Tensor:
        assert self._sae is not None
        _check_width(self._sae.d_in, x)
        z = self._sae.encode(x)[..., edit.features].float()
        change = z * (edit.factor - 1.0) + edit.offset
        return change @ self._sae.W_dec[edit.features].float() / self._sae.scale

    def _token_weights(self, x: Tensor) -> Tensor:
        assert self._mask is not None
        if len(self._mask) != x.shape[1]:
            raise ValueError(
                f"the mask has {len(self._mask)} tokens but an image has {x.shape[1]} at this site; "
                "give one weight for each 16×16 pixels."
            )
        return self._mask[:, None]

    def _move(self, device: torch.device) -> None:
        if self._device == device:
            return
        self._device = device
        if self._sae is not None and self._sae.W_dec.device != device:
            self._sae = copy.deepcopy(self._sae).to(device)  # the caller's stays where it is
        self._shift = None if self._shift is None else self._shift.to(device)
        self._mask = None if self._mask is None else self._mask.to(device)
        if self._codes is not None:
            features, factor, offset = self._codes
            self._codes = CodeEdit(features, factor.to(device), offset.to(device))


def _editor(
    edit: _Edit, counter: StepCounter, site: Site, window: list[int] | None, schedule: Schedule
) -> Callable[[nn.Module, Any, Any], Any]:
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if window:
            check_step(window[-1], counter.n_steps)
        steps = range(counter.n_steps) if window is None else window
        if counter.step not in steps:
            return None
        weight = schedule_weight(schedule, steps.index(counter.step), len(steps))
        x = read_stream(output, site, counter.n_text)
        return replace_stream(output, site, counter.n_text, edit(x, weight))

    return after


def _site(sae: SAE | None, site: str | Site | None) -> Site:
    if site is None and sae is not None and sae.spec is not None:
        site = sae.spec.site
    if site is None:
        raise ValueError(
            "nothing says where to intervene: this SAE names no site, so give site='transformer_blocks.15.ff'."
        )
    return site if isinstance(site, Site) else parse_site(site)


def _shift(
    sae: SAE | None, add: Mapping[int, float], direction: Tensor | None, strength: float, mean_norm: float | None
) -> Float[Tensor, "D"] | None:
    """What is added to every token, in float32; None when that is nothing."""
    _check_features(sae, add)
    parts = [(value, sae.directions[feature]) for feature, value in add.items() if value and sae is not None]
    if direction is not None and strength:
        parts.append((strength, normalize(direction.detach().flatten().float(), dim=0)))
    if not parts:
        return None
    unit = mean_norm if mean_norm is not None else sae.mean_norm if sae is not None else None
    if unit is None:
        raise ValueError(
            "strengths are in units of the mean token norm at the site, which this SAE does not know; give mean_norm."
        )
    return torch.stack([value * unit * row.float().cpu() for value, row in parts]).sum(dim=0)


def _code_edit(
    sae: SAE | None, scale: Mapping[int, float], clamp: Mapping[int, float], ablate: Sequence[int]
) -> CodeEdit | None:
    _check_features(sae, [*scale, *clamp, *ablate])
    changes = [
        *((feature, factor, 0.0) for feature, factor in scale.items() if factor != 1),
        *((feature, 0.0, value) for feature, value in clamp.items()),
        *((feature, 0.0, 0.0) for feature in ablate),
    ]
    if not changes:
        return None
    features = [feature for feature, _, _ in changes]
    twice = {feature for feature in features if features.count(feature) > 1}
    if twice:
        raise ValueError(f"the code of feature {min(twice)} is changed twice; scale, clamp or ablate it.")
    return CodeEdit(
        features, torch.tensor([factor for _, factor, _ in changes]), torch.tensor([value for _, _, value in changes])
    )


def _check_features(sae: SAE | None, features: Iterable[int]) -> None:
    for feature in features:
        if sae is None:
            raise ValueError(f"feature {feature} of no SAE: give the SAE whose feature is meant.")
        if not 0 <= feature < sae.n_features:
            raise ValueError(f"feature {feature} is not in this SAE, which has features 0 to {sae.n_features - 1}.")


def _check_width(width: int, x: Tensor) -> None:
    if x.shape[-1] != width:
        raise ValueError(
            f"the edit is for tokens of width {width} but the site's are {x.shape[-1]} wide; "
            "use the SAE on the model and site that it was trained on."
        )
