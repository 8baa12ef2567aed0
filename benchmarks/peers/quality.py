"""Quality at equal k and equal tokens: each library at the best rate of its sweep, on several seeds, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

from benchmarks.peers.library import Library, Task
from benchmarks.peers.measure import Run, train_and_measure
from benchmarks.peers.tokens import Tokens


class Sweep(NamedTuple):
    """A library's runs of seed 0, one a rate, and its runs at the best of these rates, one a seed, seed 0 first."""

    library: str
    tried: list[Run]
    runs: list[Run]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried, so that one further out may be better still."""
        rates = sorted(run.rate for run in self.tried)
        return len(rates) > 1 and self.runs[0].rate in (rates[0], rates[-1])


def sweep_rates(
    kind: type[Library], task: Task, tokens: Tokens, factors: Sequence[float], n_seeds: int, every: int
) -> Sweep:
    """Try `factors` of the library's own rate on seed 0, choose by validation FVE, and run the other seeds with it."""
    few = replace(task, rate=kind.default_rate(task.n_features), n_steps=min(10, task.n_steps))
    train_and_measure(kind, few, *tokens)  # compiles and allocates what the clock should not see
    tried = []
    for factor in factors:
        rate = factor * kind.default_rate(task.n_features)
        tried.append(told(train_and_measure(kind, replace(task, rate=rate, seed=0), *tokens, every=every)))
    best = max(tried, key=lambda one: one.validation.fve)
    others = [replace(task, rate=best.rate, seed=seed) for seed in range(1, n_seeds)]
    return Sweep(
        kind.name, tried, [best, *(told(train_and_measure(kind, one, *tokens, every=every)) for one in others)]
    )


def told(one: Run) -> Run:
    """The run itself, after a line on it for those who wait."""
    fve, l0, dead = one.validation
    print(
        f"{one.library}, rate {one.rate:.2g}, seed {one.seed}: validation FVE {fve:.4f}, L0 {l0:.1f}, "
        f"dead {dead:.1%}, {one.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return one


def seconds_to(runs: Sequence[Run], fve: float) -> float | None:
    """Seconds of training until the validation FVE, a mean over runs, was first that high; None when it never was."""
    curves = zip(*(one.curve for one in runs), strict=True)
    reached = (mean(point.seconds for point in points) for points in curves if mean(p.fve for p in points) >= fve)
    return next(reached, None)


def table(sweeps: Sequence[Sweep], ours: str) -> str:
    """Test results as a Markdown table: the mean over seeds, and half the range. Best FVE first."""
    lines = [
        "| library | best rate | FVE, test | dead | L0 | s, whole run | s to best peer's FVE |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    peers = [mean(run.validation.fve for run in sweep.runs) for sweep in sweeps if sweep.library != ours]
    best_peer = max(peers) if peers else None
    return "\n".join([*lines, *(_row(sweep, best_peer) for sweep in sorted(sweeps, key=lambda one: -_test_fve(one)))])


def _row(sweep: Sweep, best_peer: float | None) -> str:
    to_best = None if best_peer is None else seconds_to(sweep.runs, best_peer)
    cells = [
        sweep.library,
        f"{sweep.runs[0].rate:.2g}{' (edge)' if sweep.at_edge else ''}",
        spread([run.test.fve for run in sweep.runs], ".4f"),
        spread([run.test.dead for run in sweep.runs], ".1%"),
        f"{mean(run.test.l0 for run in sweep.runs):.1f}",
        f"{mean(run.seconds for run in sweep.runs):.1f}",
        "–" if to_best is None else f"{to_best:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _test_fve(sweep: Sweep) -> float:
    return mean(run.test.fve for run in sweep.runs)


def spread(values: Sequence[float], form: str) -> str:
    """The mean and half the range, such as `0.9200 ± 0.0010`."""
    return f"{mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"
