"""Damages copies of small shard sets and judges what comes of it: `python -m tests.faults.fuzz --cases 2000`."""

from __future__ import annotations

import argparse
import contextlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from fluxsae.records.spec import differences
from fluxsae.shards import ShardSet, ShardWriter
from fluxsae.shards.verification import verify
from tests.faults.damage import FAULTS, Damage
from tests.synthetic import image_shards, token_shards

SECONDS, ROOM = 20, 1 << 30
"""What one case may take, and by how much the process's address space may grow meanwhile."""


class Original(NamedTuple):
    """A sound set and all that can be read of it."""

    folder: Path
    content: list[Any]
    writer: dict[str, Any]


class Case(NamedTuple):
    """One damaged copy. `outcome` is what came of it; `failure` says what should not have, empty when all is well."""

    fault: str
    outcome: str
    failure: str = ""


def originals(folder: Path) -> list[Original]:
    """Sets of 3 shards of each kind and storage, of images of 3 × 3 tokens."""
    shape: dict[str, Any] = {"n_prompts": 6, "repetitions": 2, "size": 48, "images_per_shard": 5}
    for storage in ("bf16", "fp32", "fp8"):
        token_shards(folder / storage, storage=storage, d_in=64, **shape)  # type: ignore[arg-type]
    image_shards(folder / "images", **shape)
    return [
        Original(path, content(path), {"kind": kind, "storage": path.name if kind == "tokens" else "bf16"})
        for path in sorted(folder.iterdir())
        for kind in ("images" if path.name == "images" else "tokens",)
    ]


def content(folder: Path) -> list[Any]:
    """All that a set holds, in a form that compares."""
    shards = ShardSet.open(folder)
    head: list[Any] = [len(shards), shards.metadata.kind, shards.generation]
    if shards.metadata.kind == "images":
        pictures = [(shards.image(i).mode, shards.image(i).tobytes()) for i in range(len(shards))]
        return [*head, shards.records, pictures]
    numbers = shards.statistics
    tokens = [shards.tokens(i) for i in range(len(shards))]
    raw = [(t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tokens]
    told = [
        shards.spec.site,
        shards.spec.step,
        numbers.mean.tolist(),
        numbers.scale,
        numbers.mean_norm,
        numbers.n_tokens,
    ]
    return [*head, *told, shards.records, raw]


def same(a: list[Any], b: list[Any]) -> bool:
    """The model's name is left out of the comparison, as it is wherever two specs are compared."""
    return a[:2] + a[3:] == b[:2] + b[3:] and not differences(a[2], b[2])


def run_case(original: Original, name: str, seed: int) -> Case:
    """Damage a copy of `original` with the fault called `name` and judge every way of using it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "set"
        shutil.copytree(original.folder, folder)
        damage = FAULTS[name](Random(seed), folder)
        try:
            with _limits():
                outcome, failure = _judge(original, folder, damage)
                failure = failure or _judge_resuming(original, folder, damage)
        except Exception as error:
            outcome, failure = "failed", f"{type(error).__name__}: {error}"
        return Case(name, outcome, f"case {seed} ({damage.what}, {original.folder.name}): {failure}" if failure else "")


def _judge(original: Original, folder: Path, damage: Damage) -> tuple[str, str]:
    try:
        problems = [str(problem) for problem in verify(folder)]
    except (ValueError, FileNotFoundError) as error:
        problems = [str(error)]
    try:
        found = content(folder)
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            return "failed", f"{type(error).__name__} ({error}) is not a sentence for a user"
        if not problems:
            return "failed", f"reading says {error}, verify says nothing"
        return "refused", _unclear(str(error), folder, damage)
    if same(found, original.content):
        return ("harmless, told by verify" if problems else "harmless"), ""
    if damage.forged:
        return "forged", ""
    if any(name in problem for problem in problems for name in damage.files):
        return "found by verify", ""
    return "failed", f"other data were read, and verify says {problems}"


def _unclear(message: str, folder: Path, damage: Damage) -> str:
    """What the message of an error fails to name."""
    if "metadata.json" not in message and not any(name in message for name in damage.files):
        return f"the message names none of {damage.files}: {message}"
    if str(folder) not in message:
        return f"the message does not tell the folder: {message}"
    if "metadata.json" not in message and not re.search(r"member |after the start|no member|is empty|missing", message):
        return f"the message names no member: {message}"
    return ""


def _judge_resuming(original: Original, folder: Path, damage: Damage) -> str:
    """A capture that is started again takes no damaged record for a whole shard."""
    if damage.forged:
        return ""
    first = ShardSet.open(original.folder)
    try:
        writer = ShardWriter(folder, first.metadata.spec, images_per_shard=5, **original.writer)
        if not all(writer.is_complete(shard) for shard in range(3)):
            return ""  # these are made again, by a capture
        writer.finalise(3)
    except (ValueError, FileNotFoundError, IsADirectoryError):
        return ""
    ours, theirs = ((path / "metadata.json").read_bytes() for path in (folder, original.folder))
    return "" if ours == theirs else "started again, it wrote other metadata"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """TimeoutError for what hangs, MemoryError for a huge allocation."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def cases(sets: list[Original], n_cases: int, seed: int = 0) -> Iterator[Case]:
    """Each fault in turn, on a set drawn at random."""
    names = sorted(FAULTS)
    for index in range(n_cases):
        number = seed * 1_000_000 + index
        yield run_case(Random(number).choice(sets), names[index % len(names)], number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = list(cases(originals(Path(folder)), options.cases, options.seed))
    table = Counter((case.fault, case.outcome) for case in done)
    for (fault, outcome), count in sorted(table.items()):
        print(f"{fault:<16} {outcome:<26} {count}")
    for outcome, count in Counter(case.outcome for case in done).most_common():
        print(f"{'all':<16} {outcome:<26} {count}")
    failures = [case.failure for case in done if case.failure]
    print(f"{len(failures)} of {len(done)} cases failed", *failures[:40], sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
