"""Every library is asked the same: the same tokens in the same order, one measure, evaluations that change nothing."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peers.__main__ import LIBRARIES, importable, main, plain
from benchmarks.peers.library import Batches, Library, Reconstruction, Task
from benchmarks.peers.measure import Point, Quality, Run, evaluate, train_and_measure
from benchmarks.peers.ours import Ours
from benchmarks.peers.quality import Sweep, seconds_to, spread, table
from benchmarks.peers.tokens import load_tokens, split_images
from fluxsae.files.json_files import read_json
from tests.synthetic import dictionary, draw, token_shards

D, F, K = 16, 32, 3
TASK = Task(D, F, K, batch_size=64, n_steps=30, rate=0.01, seed=0, device=torch.device("cpu"))


class HalfRight(Library):
    """Gives back the first channel and nothing of the others; its first feature fires on every token."""

    name = "half right"
    distribution = "half-right"

    @staticmethod
    def default_rate(n_features: int) -> float:
        return 1.0

    def __init__(self, task: Task) -> None:
        self.seen: list[Tensor] = []

    def train(self, batches: Batches) -> None:
        self.seen += batches

    def reconstruct(self, x: Tensor) -> Reconstruction:
        codes = torch.zeros(len(x), 4)
        codes[:, 0] = 1.0
        return Reconstruction(codes, x * torch.eye(x.shape[1])[0])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    drawn = draw(dictionary(D), 4096, torch.Generator().manual_seed(1))
    return (drawn - drawn.mean(dim=0)) / drawn.var(dim=0).mean().sqrt()


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda kind: kind.distribution)
def kind(request: pytest.FixtureRequest) -> type[Library]:
    found: type[Library] = request.param
    try:
        metadata.version(found.distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{found.distribution} is not installed")
    return found


@pytest.mark.filterwarnings("default")  # peers have warnings of their own
@pytest.mark.parametrize("plain", [False, True])
def test_a_library_learns_and_keeps_at_most_k_codes(kind: type[Library], tokens: Tensor, plain: bool) -> None:
    task = replace(TASK, plain=plain)
    before = evaluate(kind(task), tokens).fve
    one = train_and_measure(kind, task, tokens[:3072], tokens[3072:3584], tokens[3584:])
    assert one.test.fve > max(before, 0.3)
    assert 0 < one.test.l0 <= K
    assert [point.step for point in one.curve] == [30]


@pytest.mark.filterwarnings("default")
def test_an_evaluation_changes_nothing(kind: type[Library], tokens: Tensor) -> None:
    sides = tokens[:3072], tokens[3072:3584], tokens[3584:]
    plainly, watched = (train_and_measure(kind, TASK, *sides, every=every) for every in (0, 7))
    assert [point.step for point in watched.curve] == [7, 14, 21, 28, 30]
    assert watched.test.fve == pytest.approx(plainly.test.fve, abs=1e-5)


def test_batches_hold_each_token_once_an_epoch_in_an_order_that_the_seed_decides() -> None:
    tokens = torch.arange(12.0)[:, None]

    def order(seed: int) -> list[float]:
        return torch.cat(list(Batches(tokens, 4, 6, seed, lambda done: None))).flatten().tolist()

    assert sorted(order(0)[:12]) == sorted(order(0)[12:]) == list(range(12))
    assert order(0) == order(0) != order(1)
    assert order(0)[:12] != order(0)[12:]


def test_the_watcher_hears_how_many_steps_are_done() -> None:
    heard: list[int] = []
    for _ in Batches(torch.zeros(8, 1), 2, 5, 0, heard.append):
        heard.append(0)
    assert heard == [0, 1, 0, 2, 0, 3, 0, 4, 0, 5]


def test_quality_is_variance_explained_a_channel_and_features_that_never_fire() -> None:
    x = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [1.0, 8.0], [-1.0, 8.0]])
    quality = evaluate(HalfRight(TASK), x, chunk=3)
    error, variance = 5.0**2 * 2 + 8.0**2 * 2, 4 * 1.0 + 4 * 1.5**2
    assert quality == pytest.approx((1 - error / variance, 1.0, 0.75))


def test_tokens_are_normalised_and_no_prompt_is_on_two_sides(tmp_path: Path) -> None:
    shards = token_shards(tmp_path / "set", n_prompts=40)
    train, validation, test = load_tokens(shards.folder, None, 0.3, torch.device("cpu"))
    both = torch.cat([train, validation, test])
    assert both.mean(dim=0).abs().max() < 0.05
    assert both.var(dim=0).mean() == pytest.approx(1.0, abs=0.05)
    assert len(both) == len(shards) * shards.spec.n_tokens
    assert min(len(train), len(validation), len(test)) > 0
    sides = [{shards.records[image].prompt for image in images} for images in split_images(shards, 0.3)]
    assert sorted(prompt for side in sides for prompt in side) == sorted({one.prompt for one in shards.records})


def test_more_tokens_than_there_are_is_refused(tmp_path: Path) -> None:
    shards = token_shards(tmp_path / "set", n_prompts=10)
    with pytest.raises(ValueError, match="fewer than the 9999 asked for; lower --n-tokens"):
        load_tokens(shards.folder, 9999, 0.3, torch.device("cpu"))


def made_up(library: str, rate: float, seed: int, fve: float, curve: list[Point] | None = None) -> Run:
    quality = Quality(fve, 3.0, 0.0)
    return Run(library, rate, seed, quality, quality, 9.0, curve or [Point(10, 9.0, fve)])


def test_a_best_rate_at_the_edge_of_the_sweep_is_told() -> None:
    tried = [made_up("a", rate, 0, fve) for rate, fve in ((1.0, 0.7), (2.0, 0.9), (4.0, 0.8))]
    assert not Sweep("a", tried, [tried[1]]).at_edge
    assert Sweep("a", tried[:2], [tried[1]]).at_edge
    assert not Sweep("a", tried[1:2], [tried[1]]).at_edge


def test_seconds_to_a_quality_are_those_of_the_first_point_whose_mean_has_it() -> None:
    curve = [Point(1, 1.0, 0.5), Point(2, 2.0, 0.7), Point(3, 3.0, 0.6)]
    other = [Point(1, 2.0, 0.7), Point(2, 4.0, 0.6), Point(3, 6.0, 0.9)]
    runs = made_up("a", 1.0, 0, 0.6, curve), made_up("a", 1.0, 1, 0.9, other)
    assert seconds_to(runs[:1], 0.7) == 2.0
    assert seconds_to(runs, 0.64) == 3.0
    assert seconds_to(runs, 0.8) is None


def test_the_table_is_sorted_by_quality_and_says_mean_and_half_the_range() -> None:
    sweeps = [
        Sweep("fluxsae", [], [made_up("fluxsae", 1.0, 0, 0.9), made_up("fluxsae", 1.0, 1, 0.8)]),
        Sweep("peer", [], [made_up("peer", 1.0, 0, 0.88)]),
    ]
    first, second = table(sweeps, "fluxsae").splitlines()[2:]
    assert first.startswith("| peer | 1 | 0.8800 ± 0.0000 |") and first.endswith("| 9.0 |")
    assert second.startswith("| fluxsae | 1 | 0.8500 ± 0.0500 |") and second.endswith("| – |")
    assert spread([0.1, 0.3], ".1%") == "20.0% ± 10.0%"


class Missing(HalfRight):
    """A library that cannot be imported."""

    def __init__(self, task: Task) -> None:
        raise ModuleNotFoundError("No module named 'half_right'")


def test_a_library_that_is_missing_is_left_out_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert importable([Ours, Missing], torch.device("cpu")) == [Ours]
    said = "half right is left out (No module named 'half_right'); pip install half-right\n"
    assert capsys.readouterr().err == said


def test_the_commands_print_tables_and_leave_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = token_shards(tmp_path / "set", n_prompts=40)
    small = ["--peers", "fluxsae", "--n-features", "32", "--batch", "64", "--k", "3", "--device", "cpu"]
    where = ["--tokens", str(shards.folder), "--out", str(tmp_path / "q.json"), "--figure", str(tmp_path / "q.png")]
    main(["quality", *small, *where, "--rates", "10", "20", "--seeds", "2", "--held-out", "0.3"])
    assert "| fluxsae |" in capsys.readouterr().out
    (sweep,) = read_json(tmp_path / "q.json")["sweeps"]
    assert len(sweep["tried"]) == len(sweep["runs"]) == 2
    assert sweep["runs"][0]["validation"]["fve"] == max(one["validation"]["fve"] for one in sweep["tried"])
    assert (tmp_path / "q.png").is_file()
    main(["step", *small, "--d-in", "16", "--warmup", "1", "--steps", "4", "--out", str(tmp_path / "s.json")])
    assert "| fluxsae | 3 | plain | – | 1.00 |" in capsys.readouterr().out
    assert [one["plain"] for one in read_json(tmp_path / "s.json")["steps"]] == [True, False]


def test_plain_turns_named_tuples_into_dicts_at_every_depth() -> None:
    assert plain([Point(1, 2.0, 0.5)]) == [{"step": 1, "seconds": 2.0, "fve": 0.5}]
