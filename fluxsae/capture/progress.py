"""Says now and then how far a capture is."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

logger = logging.getLogger(__name__)


class CaptureProgress(NamedTuple):
    """What a process has done of its share: images made, images of its share, tokens and bytes written, seconds."""

    n_made: int
    n_images: int
    n_tokens: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        """`64 of 4,000 images, 3.6 images/s, 920 tokens/s, 0.1 GB written, 18 min left`."""
        rate = self.n_made / max(self.seconds, 1e-9)
        left = (self.n_images - self.n_made) / rate if rate else float("inf")
        return (
            f"{self.n_made:,} of {self.n_images:,} images, {rate:.2f} images/s, "
            f"{self.n_tokens / max(self.seconds, 1e-9):,.0f} tokens/s, {self.n_bytes / 1e9:.3g} GB written, "
            f"{left / 60:.0f} min left"
        )


class ProgressLog:
    """Logs a `CaptureProgress` when `every` seconds have passed since the last one."""

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self.started = self._said = time.monotonic()

    def show(self, n_made: int, n_images: int, n_tokens: int, n_bytes: int) -> None:
        now = time.monotonic()
        if now - self._said >= self.every:
            self._said = now
            logger.info("%s", CaptureProgress(n_made, n_images, n_tokens, n_bytes, now - self.started))
