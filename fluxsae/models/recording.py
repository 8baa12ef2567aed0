"""Reads what modules of the transformer return while a pipeline runs.

Legend: B batch, T tokens an image, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor, nn

from fluxsae.models.compiled import Uncompiled
from fluxsae.models.steps import StepCounter, count_steps
from fluxsae.models.streams import find_module, read_stream
from fluxsae.records import Site, parse_site

Key = tuple[str, int]


class TapeIsFull(Exception):
    """Ends a call of the pipeline as soon as the tape is complete."""


class Tape(Mapping[Key, Tensor]):
    """Tokens [B, T, D] of the latest call of the pipeline, by site and step: `tape["transformer_blocks.1.ff", 8]`.

    Sites are written as in `parse_site`; `"transformer_blocks.1:image"` and `"transformer_blocks.1"` are the same.
    """

    def __init__(self, sites: Sequence[Site], steps: Sequence[int]) -> None:
        self._sites = tuple(dict.fromkeys(str(site) for site in sites))
        self._steps = tuple(sorted(set(steps)))
        self._tokens: dict[Key, Tensor] = {}
        self._schedule: int | None = None

    def __getitem__(self, key: tuple[str | Site, int]) -> Float[Tensor, "B T D"]:
        """KeyError, in one sentence, for what was not asked for and for a step that the schedule did not have."""
        site, step = str(parse_site(str(key[0]))), key[1]
        if (site, step) not in self._tokens:
            raise KeyError(self._why_absent(site, step))
        return self._tokens[site, step]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def is_full(self) -> bool:
        """Whether the tape holds every step of every site."""
        return len(self) == len(self._sites) * len(self._steps)

    def start(self, n_steps: int) -> None:
        """Forget the last call of the pipeline, because another one begins."""
        self._tokens.clear()
        self._schedule = n_steps

    def put(self, site: Site, step: int, tokens: Float[Tensor, "B T D"]) -> None:
        self._tokens[str(site), step] = tokens

    def _why_absent(self, site: str, step: int) -> str:
        if site not in self._sites:
            return f"site {site!r} was not recorded; recorded are {', '.join(self._sites)}."
        if step not in self._steps:
            return f"step {step} was not recorded; recorded are the steps {', '.join(map(str, self._steps))}."
        if self._schedule is None:
            return f"nothing was recorded at {site!r}, step {step}: call the pipeline inside the context first."
        last = self._schedule - 1
        if not 0 <= step <= last:
            return f"step {step} never came: the schedule had {self._schedule} steps (0-{last})."
        return f"step {step} of {self._schedule} never came at {site!r}: the pipeline stopped before it."


@contextmanager
def record(
    pipe: FluxPipeline, sites: Sequence[str | Site], steps: Sequence[int], stop_when_full: bool = False
) -> Iterator[Tape]:
    """Record the tokens at `sites` and `steps` of every call of `pipe` inside the context; the tape holds the latest.

    The tape holds copies, on the transformer's device and in its dtype. With true classifier-free guidance, the pass on
    the prompt is recorded.

    Contexts act in the order in which they are entered. So the tape sees the edits of an `intervene` that was entered
    before it, and not those of one that was entered after it. With `stop_when_full`, the call of the pipeline ends with
    `TapeIsFull` as soon as the tape holds everything.

    Raises ValueError, listing near matches, for a site that is no module or lacks the stream.
    """
    parsed = [site if isinstance(site, Site) else parse_site(site) for site in sites]
    modules = [find_module(pipe.transformer, site) for site in parsed]
    tape = Tape(parsed, steps)
    with ExitStack() as stack:
        counter = stack.enter_context(count_steps(pipe, on_start=tape.start))
        at = list(zip(parsed, modules, strict=True))
        recorder = _Recorder(tape, counter, frozenset(steps), stop_when_full, Uncompiled(pipe.transformer, modules), at)
        stack.callback(recorder.remove)
        stack.callback(pipe.transformer.register_forward_pre_hook(recorder.before_pass).remove)
        yield tape


class _Recorder:
    """The hooks of a `record`, in their modules only in the passes that are wanted: in others blocks run compiled."""

    def __init__(
        self,
        tape: Tape,
        counter: StepCounter,
        steps: frozenset[int],
        stop_when_full: bool,
        uncompiled: Uncompiled,
        at: Sequence[tuple[Site, nn.Module]],
    ) -> None:
        self._tape = tape
        self._counter = counter
        self._steps = steps
        self._stop_when_full = stop_when_full
        self._uncompiled = uncompiled
        self._hooks = [_Hook(module, partial(self._record, site)) for site, module in at]
        self._listens = False

    def before_pass(self, *_: Any) -> None:
        self._listen(self._counter.step in self._steps and self._counter.conditional)

    def remove(self) -> None:
        self._listen(False)

    def _listen(self, wanted: bool) -> None:
        if wanted == self._listens:
            return
        self._listens = wanted
        if wanted:
            self._uncompiled.__enter__()
        for hook in self._hooks:
            hook.put_in() if wanted else hook.take_out()
        if not wanted:
            self._uncompiled.__exit__()

    def _record(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        # A copy: a view would keep the other stream alive, and later layers may work in place.
        tokens = read_stream(output, site, self._counter.n_text).detach().clone()
        self._tape.put(site, self._counter.step, tokens)
        if self._stop_when_full and self._tape.is_full:
            raise TapeIsFull


class _Hook:
    """A forward hook that comes and goes, and among a module's hooks always has the place that it was made for."""

    def __init__(self, module: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> None:
        self._hooks: OrderedDict[int, Any] = module._forward_hooks  # type: ignore[assignment]
        self._hook = hook
        self._id = module.register_forward_hook(hook).id
        self.take_out()

    def put_in(self) -> None:
        later = [other for other in self._hooks if other > self._id]
        self._hooks[self._id] = self._hook
        for other in later:
            self._hooks.move_to_end(other)

    def take_out(self) -> None:
        self._hooks.pop(self._id, None)
