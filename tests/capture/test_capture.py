"""Captures on a random FLUX: what lies on disk, going on after an interrupt, several processes, refusals."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from lightning import Trainer

import fluxsae.capture.module
import fluxsae.models.placement
from fluxsae.capture.folder import set_folder
from fluxsae.capture.module import FluxCapture
from fluxsae.capture.prompt_data import PromptData, RequestBatch, image_seed
from fluxsae.models.embeddings import EmbeddingCache, EmbeddingsAhead, PromptEmbeddings
from fluxsae.models.generation import Generated, generate
from fluxsae.models.load import load_pipeline
from fluxsae.models.recording import record
from fluxsae.shards.read import ShardSet

SITE, TEXT_SITE = "transformer_blocks.1.ff", "single_transformer_blocks.0:text"
HOSTILE = [
    "../../etc/passwd",
    "=cmd()",
    "a" * 4000,
    "<|endoftext|></s><pad>",
    "\x00\x1b[31m",
    "狐狸 🦊 \u202e",
    "%s{0}$HOME",
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"scene {i}", "background": "blue" if i % 2 else ""} for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**quiet, **options})


def capture(tiny_flux: Path, folder: Path, **changes: Any) -> FluxCapture:
    options: dict[str, Any] = {
        "sites": [SITE, TEXT_SITE],
        "steps": [1, 2],
        "height": 32,
        "width": 48,
        "n_steps": 4,
        "storage": "fp32",
    }
    return FluxCapture(str(tiny_flux), folder, **{**options, **changes})


def data(prompts: Path, **changes: Any) -> PromptData:
    return PromptData(prompts, **{"repetitions": 2, "batch_size": 3, "images_per_shard": 4, **changes})


def run(module: FluxCapture, prompts: PromptData) -> None:
    trainer().predict(module, prompts, return_predictions=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_fewer_shards_than_processes_are_refused(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without any would end the others' wait for it at a time-out."""
    monkeypatch.setattr(Trainer, "world_size", property(lambda _: 4))
    asked = data(prompts)
    asked.trainer = trainer()
    with pytest.raises(ValueError, match=r"4 processes cannot share 10 images in 3 shard.*lower images_per_shard to 2"):
        asked.setup("predict")
    monkeypatch.setattr(Trainer, "world_size", property(lambda _: 3))
    asked.setup("predict")


@pytest.fixture
def finished(tiny_flux: Path, prompts: Path, tmp_path: Path) -> Path:
    run(capture(tiny_flux, tmp_path / "finished"), data(prompts))
    return tmp_path / "finished"


def test_what_lies_on_disk(finished: Path, tiny_pipe: FluxPipeline) -> None:
    record_ = json.loads((finished / "generation.json").read_text())
    assert (record_["n_prompts"], record_["n_images"]) == (5, 10)
    assert record_["spec"]["text_length"] == 16 and record_["spec"]["dtype"] == "float32"
    assert record_["spec"]["shift"] == pytest.approx(math.exp(0.5 - (256 - 6) * 0.65 / 3840))
    line = json.loads((finished / "prompts.jsonl").read_text().splitlines()[1])
    assert line == {"id": 1, "prompt": "scene 1", "attributes": {"background": "blue"}}
    images = ShardSet.open(finished / "images")
    for site, n_tokens in ((SITE, 6), (TEXT_SITE, 16)):
        for step in (1, 2):
            tokens = ShardSet.open(set_folder(finished, site, step))
            assert len(tokens) == 10 and tokens.spec.site == site and tokens.spec.step == step
            assert tokens.tokens(3).shape == (n_tokens, 32)
            assert tokens.records == images.records
    third = images.records[3]
    assert (third.prompt_id, third.repetition, third.seed) == (1, 1, image_seed(0, 3))
    assert images.image(3).size == (48, 32)
    with record(tiny_pipe, [SITE], [2]) as tape:
        again = generate(
            tiny_pipe, ["scene 1"], [third.seed], height=32, width=48, n_steps=4, guidance=3.5, text_length=16
        )
    stored = ShardSet.open(set_folder(finished, SITE, 2)).tokens(3)
    assert torch.equal(stored, tape[SITE, 2][0])
    assert again.images is not None and again.images[0].tobytes() == images.image(3).tobytes()


@pytest.mark.parametrize("n_batches", [0, 1, 3])
def test_a_killed_capture_goes_on_to_the_same_files(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path, n_batches: int
) -> None:
    folder = tmp_path / "killed"

    class Killed(FluxCapture):
        def predict_step(self, batch: RequestBatch, batch_idx: int = 0) -> int:
            if batch_idx == n_batches:
                self._background.wait()
                raise RuntimeError("killed")
            return super().predict_step(batch, batch_idx)

    first = Killed(str(tiny_flux), folder, [SITE, TEXT_SITE], [1, 2], 32, 48, 4, storage="fp32")
    with pytest.raises(RuntimeError, match="killed"):
        run(first, data(prompts))
    assert not list(folder.rglob("metadata.json"))
    with counted() as made:
        run(capture(tiny_flux, folder), data(prompts))
    assert len(made) == 5 - n_batches  # of 3, 1, 3, 1 and 2 images
    assert files(folder) == files(finished)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many images each batch made has."""
    original, made = fluxsae.capture.module.generate, []

    def generate_(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> Any:
        made.append(len(seeds))
        return original(pipe, prompt, seeds, **options)

    with mock.patch.object(fluxsae.capture.module, "generate", generate_):
        yield made


def begin(tiny_flux: Path, prompts: Path, folder: Path, **changes: Any) -> None:
    """A capture that ends with an error once the first batch, 3 of the first shard's 4 images, is on the disk."""
    original, calls = fluxsae.capture.module.generate, []

    def second_fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return original(*args, **options)

    with (
        mock.patch.object(fluxsae.capture.module, "generate", second_fails),
        pytest.raises(RuntimeError, match="broken"),
    ):
        run(capture(tiny_flux, folder, **changes), data(prompts))


def test_batches_of_another_size_go_on_behind_what_is_there(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    begin(tiny_flux, prompts, tmp_path / "out")
    with counted() as made:
        run(capture(tiny_flux, tmp_path / "out"), data(prompts, batch_size=2))
    assert made == [2, 2, 2, 2]
    assert files(tmp_path / "out") == files(finished)


def test_what_was_kept_is_only_used_whole_and_for_the_same(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    begin(tiny_flux, prompts, tmp_path / "out")
    kept = tmp_path / "out" / "images" / ".shard-00000-open.tar"
    bytes_ = bytearray(kept.read_bytes())
    bytes_[700] ^= 1
    kept.write_bytes(bytes_)
    for part in set_folder(tmp_path / "out", SITE, 1).glob(".shard-00000-open.json"):
        part.unlink()
    kept_before = files(set_folder(tmp_path / "out", SITE, 2))
    with counted() as made:
        run(capture(tiny_flux, tmp_path / "out"), data(prompts))
    assert made == [3, 1, 3, 1, 2]  # again, for the two sets that lost it
    assert files(tmp_path / "out") == files(finished) and kept_before
    begin(tiny_flux, prompts, tmp_path / "other", storage="bf16")
    with counted() as made:
        run(capture(tiny_flux, tmp_path / "other"), data(prompts))
    assert made == [3, 1, 3, 1, 2]
    assert files(tmp_path / "other") == files(finished)


KILLED = """
import os, sys, time
from pathlib import Path
import fluxsae.capture.module
from tests.capture.test_capture import capture, data, run

original, calls = fluxsae.capture.module.generate, []

def die_at_the_fourth(*args, **options):
    calls.append(1)
    if len(calls) < 4:
        return original(*args, **options)
    while not list(Path(sys.argv[2]).rglob(".shard-00001*")):  # the third batch is being written
        time.sleep(0.01)
    os._exit(9)

fluxsae.capture.module.generate = die_at_the_fourth
run(capture(Path(sys.argv[1]), Path(sys.argv[2])), data(Path(sys.argv[3])))
"""


def test_a_process_that_dies_leaves_nothing_that_stays(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    folder = tmp_path / "dead"
    arguments = [str(tiny_flux), str(folder), str(prompts)]
    child = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
    assert child.returncode == 9, child.stderr.decode()
    assert list(folder.rglob(".shard-*")) and list(folder.rglob("shard-00000.tar"))
    (folder / "embeddings" / ".half.safetensors").write_text("left by a process that died while it wrote")
    run(capture(tiny_flux, folder), data(prompts))
    assert files(folder) == files(finished)


def test_an_error_while_making_images_leaves_whole_batches(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    begin(tiny_flux, prompts, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("shard-*"))
    with counted() as made:
        run(capture(tiny_flux, tmp_path / "out"), data(prompts))
    assert made == [1, 3, 1, 2]
    assert files(tmp_path / "out") == files(finished)


def test_two_processes_leave_the_same_files(tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "two"
    for rank in (1, 0):  # the first finalises, so it comes last here; real processes meet at a barrier
        one = trainer()
        with (
            mock.patch.object(Trainer, "global_rank", rank),
            mock.patch.object(Trainer, "world_size", 2),
            mock.patch.object(Trainer, "is_global_zero", rank == 0),
        ):
            one.predict(capture(tiny_flux, folder), data(prompts), return_predictions=False)
    assert files(folder) == files(finished)


def test_a_finished_capture_started_again_loads_and_writes_nothing(
    tiny_flux: Path, prompts: Path, finished: Path
) -> None:
    before = files(finished)
    with mock.patch.object(fluxsae.capture.module, "load_pipeline", side_effect=AssertionError):
        run(capture(tiny_flux, finished), data(prompts))
    assert files(finished) == before


def test_a_step_added_later_leaves_the_other_sets_alone(tiny_flux: Path, prompts: Path, finished: Path) -> None:
    before = files(finished)
    run(capture(tiny_flux, finished, steps=[1, 2, 3]), data(prompts))
    after = files(finished)
    assert {name: after[name] for name in before} == before
    assert len(ShardSet.open(set_folder(finished, SITE, 3))) == 10


def test_without_images_the_sampler_stops_at_the_last_step_behind_the_last_site(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    passes: list[type[torch.nn.Module]] = []

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["hidden_states"].device.type != "meta":  # the pass that finds the shapes at the sites
            passes.append(type(module))

    def counted_pipeline(*args: Any, **options: Any) -> FluxPipeline:
        pipe = load_pipeline(*args, **options)
        for path in ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"):
            pipe.transformer.get_submodule(path).register_forward_pre_hook(count, with_kwargs=True)
        return pipe

    with mock.patch.object(fluxsae.capture.module, "load_pipeline", counted_pipeline):
        run(capture(tiny_flux, tmp_path / "out", sites=[SITE], images=False), data(prompts, batch_size=4))
    n_batches, n_passes = 3, 3  # steps 0 to 2
    assert passes.count(FluxTransformerBlock) == n_batches * n_passes * 2
    assert passes.count(FluxSingleTransformerBlock) == n_batches * (n_passes - 1)
    assert not (tmp_path / "out" / "images").exists()
    found = files(set_folder(tmp_path / "out", SITE, 2))
    assert found == files(set_folder(finished, SITE, 2))


def test_tokens_do_not_depend_on_the_batch_size(tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path) -> None:
    run(capture(tiny_flux, tmp_path / "one"), data(prompts, batch_size=1))
    a, b = (ShardSet.open(set_folder(folder, SITE, 1)) for folder in (finished, tmp_path / "one"))
    assert a.records == b.records
    for i in range(10):
        assert torch.equal(a.tokens(i), b.tokens(i))


def test_prompts_encoded_as_they_come_and_blocks_in_host_memory_change_nothing(
    tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path
) -> None:
    expected = {name: content for name, content in files(finished).items() if not name.startswith("embeddings/")}
    run(capture(tiny_flux, tmp_path / "come", keep_embeddings=False), data(prompts))
    assert files(tmp_path / "come") == expected
    run(capture(tiny_flux, tmp_path / "offload", keep_embeddings=False, offload_blocks=1), data(prompts))
    assert files(tmp_path / "offload") == expected
    asked: list[list[str]] = []

    def one_batch(cache: EmbeddingCache, prompts: list[str]) -> PromptEmbeddings:
        asked.append(list(prompts))
        return get(cache, prompts)

    get, beside = EmbeddingCache.get, partial(EmbeddingsAhead, beside=True)
    with (
        mock.patch.object(fluxsae.capture.module, "EmbeddingsAhead", beside),
        mock.patch.object(EmbeddingCache, "get", one_batch),
    ):
        run(capture(tiny_flux, tmp_path / "ahead", keep_embeddings=False), data(prompts))
    assert files(tmp_path / "ahead") == expected
    assert len(asked) == 5  # each batch once, in order
    assert [prompt for some in asked for prompt in some] == [f"scene {image // 2}" for image in range(10)]


def test_compiled_blocks(tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path) -> None:
    with mock.patch.object(fluxsae.models.placement, "compile_blocks", side_effect=compile_in_python) as compile_:
        run(capture(tiny_flux, tmp_path / "compiled", compile=True, offload_blocks=1), data(prompts))
    assert compile_.call_count == 1
    a, b = (ShardSet.open(set_folder(folder, TEXT_SITE, 2)) for folder in (finished, tmp_path / "compiled"))
    for i in range(10):
        torch.testing.assert_close(a.tokens(i), b.tokens(i), rtol=1e-4, atol=1e-5)


def compile_in_python(transformer: FluxTransformer2DModel) -> None:
    transformer.compile_repeated_blocks(backend="eager")


def test_text_encoders_are_gone_before_the_first_image(tiny_flux: Path, prompts: Path, tmp_path: Path) -> None:
    pipes: list[FluxPipeline] = []

    def keep(pipe: FluxPipeline, *args: Any, **options: Any) -> Generated:
        pipes.append(pipe)
        return generate(pipe, *args, **options)

    with mock.patch.object(fluxsae.capture.module, "generate", keep):
        run(capture(tiny_flux, tmp_path / "out"), data(prompts))
    assert pipes and all(pipe.text_encoder is None and pipe.text_encoder_2 is None for pipe in pipes)


@contextmanager
def changed(at_site: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What SITE gives is changed on its way."""

    def load(*args: Any, **options: Any) -> FluxPipeline:
        pipe = load_pipeline(*args, **options)
        pipe.transformer.get_submodule(SITE).register_forward_hook(lambda m, i, out: at_site(out))
        return pipe

    with mock.patch.object(fluxsae.capture.module, "load_pipeline", load):
        yield


def test_a_value_that_is_not_finite_is_told_with_image_site_and_step(
    tiny_flux: Path, prompts: Path, tmp_path: Path
) -> None:
    with (
        changed(lambda out: out / torch.zeros(())),
        pytest.raises(ValueError, match=rf"image 0 \(prompt 'scene 0'\) at {SITE}, step 1, hold NaN or infinite"),
    ):
        run(capture(tiny_flux, tmp_path / "out", sites=[SITE]), data(prompts))
    assert not list(set_folder(tmp_path / "out", SITE, 1).rglob("*shard-*"))


def test_tokens_that_are_not_finite_are_skipped_by_choice(tiny_flux: Path, prompts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sites": [SITE], "steps": [1], "images": False}
    run(capture(tiny_flux, tmp_path / "whole", **options), data(prompts))
    with changed(lambda out: torch.cat([out[:1], out[1:2] * torch.nan, out[2:]])):
        run(capture(tiny_flux, tmp_path / "out", not_finite="skip", **options), data(prompts))
    whole, found = (ShardSet.open(set_folder(tmp_path / name, SITE, 1)) for name in ("whole", "out"))
    assert found.skipped == {1, 5, 9}  # the second of each batch that has two
    for image in range(10):
        expected = torch.zeros(6, 32) if image in found.skipped else whole.tokens(image)
        assert torch.equal(found.tokens(image), expected)


def test_a_full_disk_is_told_of_before_weights_are_loaded(tiny_flux: Path, prompts: Path, tmp_path: Path) -> None:
    with (
        mock.patch.object(fluxsae.capture.module, "load_pipeline", side_effect=AssertionError),
        mock.patch.object(shutil, "disk_usage", return_value=shutil.disk_usage(tmp_path)._replace(free=100_000)),
        pytest.raises(ValueError, match=r"there is no room left for .*out: it would take about 0.\d+ GB more"),
    ):
        run(capture(tiny_flux, tmp_path / "out"), data(prompts))
    assert not (tmp_path / "out").exists()


def test_a_site_without_tokens_is_refused_before_weights_are_loaded(
    tiny_flux: Path, prompts: Path, tmp_path: Path
) -> None:
    with (
        mock.patch.object(fluxsae.capture.module, "load_pipeline", side_effect=AssertionError),
        pytest.raises(ValueError, match=r"returns a tensor of shape \[1, 192\], not tokens"),
    ):
        run(capture(tiny_flux, tmp_path / "out", sites=["transformer_blocks.0.norm1.linear"]), data(prompts))


@pytest.fixture(scope="module")
def schnell(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX as FLUX.1-schnell is: without a guidance embedding, and with a fixed time shift of 1."""
    pipe = load_pipeline(tiny_flux)
    config = {**pipe.transformer.config, "guidance_embeds": False}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config), scheduler=scheduler)
    folder = tmp_path_factory.mktemp("schnell")
    pipe.save_pretrained(folder)
    return folder


def test_four_steps_without_guidance(schnell: Path, prompts: Path, tmp_path: Path) -> None:
    run(capture(schnell, tmp_path / "out", steps=[3], guidance=0.0), data(prompts, limit=2))
    tokens = ShardSet.open(set_folder(tmp_path / "out", SITE, 3))
    assert tokens.tokens(0).shape == (6, 32) and tokens.spec.generation.shift == 1.0  # type: ignore[union-attr]


def test_images_of_1024_pixels(tiny_flux: Path, prompts: Path, tmp_path: Path) -> None:
    options = {"height": 1024, "width": 1024, "n_steps": 2, "steps": [1], "sites": [SITE]}
    run(capture(tiny_flux, tmp_path / "out", **options), data(prompts, limit=1, repetitions=1))
    assert ShardSet.open(set_folder(tmp_path / "out", SITE, 1)).tokens(0).shape == (4096, 32)
    assert ShardSet.open(tmp_path / "out" / "images").image(0).size == (1024, 1024)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_half_precision(tiny_flux: Path, prompts: Path, tmp_path: Path, finished: Path, storage: str) -> None:
    run(capture(tiny_flux, tmp_path / "out", dtype="bfloat16", storage=storage), data(prompts))
    half, full = (ShardSet.open(set_folder(folder, SITE, 1)) for folder in (tmp_path / "out", finished))
    assert half.spec.generation.dtype == "bfloat16"  # type: ignore[union-attr]
    distance = (half.tokens(0).float() - full.tokens(0)).norm() / full.tokens(0).norm()
    assert distance < 0.1


@pytest.mark.filterwarnings("ignore:Token indices sequence length")
def test_hostile_prompts_are_only_text(tiny_flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "hostile.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HOSTILE))
    run(capture(tiny_flux, tmp_path / "out"), data(path, repetitions=1))
    assert [r.prompt for r in ShardSet.open(tmp_path / "out" / "images").records] == [t.strip() for t in HOSTILE]
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not any("passwd" in name or "cmd" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 30}, "height 30 is not a positive multiple of 16 pixels; use 32"),
        ({"steps": [4]}, "step 4 is beyond the schedule: steps count from 0, so 4 steps are 0 to 3"),
        ({"steps": [-1]}, "step -1 is beyond the schedule"),
        ({"n_steps": 0, "steps": []}, "n_steps is 0"),
        ({"sites": ["a b"]}, "'a b' is not a module path"),
        ({"text_length": 513}, "text_length is 513; FLUX reads 1 to 512"),
        ({"sites": []}, "name at least one of each"),
        ({"sites": [], "steps": [], "images": False}, "nothing to capture"),
        ({"guidance": float("nan")}, "guidance is nan"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    tiny_flux: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        capture(tiny_flux, tmp_path, **changes)


def test_a_wrong_site_or_model_is_refused_before_weights_are_loaded(
    tiny_flux: Path, prompts: Path, tmp_path: Path
) -> None:
    with mock.patch.object(fluxsae.capture.module, "load_pipeline", side_effect=AssertionError):
        with pytest.raises(ValueError, match=r"'transformer_blocks.9.ff' is no module"):
            run(capture(tiny_flux, tmp_path / "out", sites=["transformer_blocks.9.ff"]), data(prompts))
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
            run(capture(tmp_path / "absent", tmp_path / "out"), data(prompts))
        with pytest.raises(FileNotFoundError, match="there is no prompts file"):
            run(capture(tiny_flux, tmp_path / "out"), data(tmp_path / "absent.txt"))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_capture_is_refused(tiny_flux: Path, prompts: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another capture \(guidance: 3.5 != 2.0\)"):
        run(capture(tiny_flux, finished, guidance=2.0), data(prompts))
    with pytest.raises(ValueError, match=r"images_per_shard: 4 != 5"):
        run(capture(tiny_flux, finished), data(prompts, images_per_shard=5))
    with pytest.raises(ValueError, match=r"prompts_hash: "):
        run(capture(tiny_flux, finished), data(prompts, limit=2))
    with pytest.raises(ValueError, match=r"storage: 'fp32' != 'bf16'"):
        run(capture(tiny_flux, finished, storage="bf16"), data(prompts))


def test_requests_cover_every_image_once_in_whole_shards(prompts: Path) -> None:
    whole = data(prompts)
    batches = list(whole.predict_dataloader())
    assert len(whole.predict_dataloader()) == len(batches) == 5
    images = [request.image for batch in batches for request in batch.requests]
    assert images == list(range(10))
    assert [batch.last_of_shard for batch in batches] == [False, True, False, True, True]
    assert len({image_seed(base, image) for base in range(3) for image in range(100)}) == 300
    assert all(0 <= request.seed < 2**63 for batch in batches for request in batch.requests)


@pytest.mark.parametrize("name", ["repetitions", "batch_size", "images_per_shard", "limit"])
def test_counts_of_images_are_positive(prompts: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        data(prompts, **{name: 0})
