"""The learning rate over a training."""

from __future__ import annotations


def lr_factor(step: int, n_steps: float, warmup_steps: int, decay_fraction: float) -> float:
    """The learning rate at a step as a share of its peak: it rises over the warm-up, and falls to 0 at the end."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    decay_steps = decay_fraction * n_steps
    fall = min(1.0, (n_steps - step) / decay_steps) if 0 < decay_steps < float("inf") else 1.0
    return min(rise, max(0.0, fall))
