"""S on disk equals S by its definition, and shards of another capture are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback
from torch import Tensor

from fluxsae.records.features import Selection, read_features, update_features
from fluxsae.sae import save_sae
from fluxsae.sae.pooling import PlainPooling, Pooled
from fluxsae.scoring import by_feature, reading
from fluxsae.scoring.analyses.alive import AliveStatistics
from fluxsae.scoring.analyses.scores_writer import ScoresWriter
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.by_feature import read_by_feature, write_by_feature
from fluxsae.scoring.module import prompt_key
from fluxsae.scoring.scores import Scores
from tests.scoring.study import Study, all_scores, make_study, run
from tests.synthetic import capture_spec


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


def test_matrix_and_table(study: Study) -> None:
    run(study, ScoresWriter(study.folder / "scores", study.folder / "prompts.jsonl"))
    scores = Scores.open(study.folder / "scores")
    assert np.allclose(scores.matrix, all_scores(study).numpy(), atol=1e-5)
    assert isinstance(scores.matrix, np.memmap) and scores.spec == study.tokens.spec
    assert scores.images[3] == {
        "image": "3", "prompt_id": "1", "repetition": "1", "seed": "1003",
        "prompt": "a small thing number 1", "kind": "a|b", "object": "thing 1",
    }  # fmt: skip


def test_what_a_capture_skipped_counts_nowhere(tmp_path: Path) -> None:
    study = make_study(tmp_path, skipped=[3, 4, 23])
    run(study, ScoresWriter(tmp_path / "scores"), AliveStatistics(study.features), TopImages(study.features))
    scores, expected = Scores.open(tmp_path / "scores"), all_scores(study).numpy()
    expected[[3, 4, 23]] = 0
    assert np.allclose(scores.matrix, expected, atol=1e-5) and len(scores.images) == 24
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["skipped"] == [3, 4, 23]
    for feature in read_features(study.features):
        assert feature.frequency == pytest.approx((expected[:, feature.feature] > 1e-3).sum() / 21)
        assert not {3, 4, 23} & set(feature.top_images)


@pytest.mark.parametrize("block", [None, 1, 60, 10**6])
def test_scores_of_a_feature(study: Study, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the matrix, or from the files in the order of features, which are filled a block at a time."""
    monkeypatch.setattr(by_feature, "_BLOCK", block or 1)
    run(study, ScoresWriter(study.folder / "scores", by_feature=block is not None))
    scores, asked = Scores.open(study.folder / "scores"), []
    read = by_feature.read_by_feature
    monkeypatch.setattr("fluxsae.scoring.scores.read_by_feature", lambda *args: asked.append(args) or read(*args))
    found = [scores.of_feature(feature) for feature in range(24)]
    for feature, (images, values) in enumerate(found):
        assert np.array_equal(images, np.flatnonzero(scores.matrix[:, feature]))
        assert np.array_equal(values, scores.matrix[images, feature])
    assert 0 < sum(len(one.images) for one in found) < scores.matrix.size
    assert len(asked) == (0 if block is None else 24)
    for feature in (-1, 24):
        with pytest.raises(IndexError, match=f"feature {feature} is not in .*features 0 to 23"):
            scores.of_feature(feature)


def test_by_feature_of_nothing(tmp_path: Path) -> None:
    write_by_feature(np.zeros((3, 2), np.float32), tmp_path)
    assert len(read_by_feature(tmp_path, 1).images) == 0


def test_where_kernels_are_wrong_pytorch_goes_on(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(PlainPooling):
        def pool(self, tokens: Tensor) -> Pooled:
            pooled = super().pool(tokens)
            return pooled._replace(scores=pooled.scores.roll(1, dims=1))

    for kind, warns in ((Wrong, True), (PlainPooling, False)):
        caplog.clear()
        monkeypatch.setattr(reading, "pooling_of", lambda sae, _, kind=kind: kind(sae))
        run(study, ScoresWriter(study.folder / "scores"))
        assert np.allclose(Scores.open(study.folder / "scores").matrix, all_scores(study).numpy(), atol=1e-5)
        assert ("scoring goes on by PyTorch" in caplog.text) == warns


def test_no_scores_where_none_were_finished(study: Study) -> None:
    class Fails(Callback):
        def on_predict_batch_end(self, *_: object, **__: object) -> None:
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        run(study, ScoresWriter(study.folder / "scores"), Fails())
    assert not (study.folder / "scores").exists()
    with pytest.raises(FileNotFoundError, match="run the scores stage"):
        Scores.open(study.folder / "scores")


def test_another_step_is_refused_with_both_values(study: Study) -> None:
    study.sae.spec = capture_spec(step=1)
    save_sae(study.folder / "sae", study.sae)
    with pytest.raises(ValueError, match="step: 1 != 2"):
        run(study)


def test_what_may_differ_is_named(study: Study) -> None:
    study.sae.spec = capture_spec(step=1, prompts_hash="2" * 64, base_seed=5)  # other images always may
    save_sae(study.folder / "sae", study.sae)
    with pytest.raises(ValueError, match=r"\(step: 1 != 2\).* under `allow`"):
        run(study)
    run(study, allow=["step"])
    with pytest.raises(ValueError, match="unknown field 'stop' of allow: did you mean 'step'"):
        run(study, allow=["stop"])


def test_an_unknown_spec_is_accepted(study: Study) -> None:
    study.sae.spec = None
    save_sae(study.folder / "sae", study.sae)
    run(study)


def test_a_score_that_is_no_number_is_refused(study: Study) -> None:
    stored = study.tokens.stored_tokens(7)
    with stored.tar.file.path.open("rb+") as file:
        file.seek(stored.start + stored.layout.tokens)
        file.write(b"\xc0\x7f")  # NaN in bf16
    with pytest.raises(FloatingPointError, match=r"image 7 in .*shard-\d+.tar .*site .*, step .*delete that file"):
        run(study, ScoresWriter(study.folder / "nan"))
    assert not (study.folder / "nan").exists()


def test_some_images_are_not_all(study: Study) -> None:
    update_features(study.features, {"alive": [True] * 24, "max": [1.0] * 24, "top_images": ["0"] * 24})
    with pytest.raises(ValueError, match="only"):
        run(study, ScoresWriter(study.folder / "scores"), only=Selection(study.features, rank_by="max"))


def test_prompt_key_depends_on_the_text_alone() -> None:
    assert prompt_key("a fox") == prompt_key("a fox") != prompt_key("a fox ")
    assert 0 <= prompt_key("a fox") < 2**63
