"""Starts a study of one's own: a folder with the configs of a bundled study, changed where it differs, and its prompts.

Configs are changed line by line, so that they keep their comments.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fluxsae.files import bundled, unknown_key, weights_folder, write_text
from fluxsae.records import check_step, parse_site, read_prompts, token_grid
from fluxsae.study.config_files import STUDY_FILE, read_mapping
from fluxsae.study.plan import read_study


class Start(NamedTuple):
    """What a study begins with: its folder, what was taken over, and what its owner should look at."""

    folder: Path
    model: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    n_prompts: int
    check: tuple[str, ...]


def start_study(
    folder: Path,
    like: str = "tiny",
    prompts: Path | None = None,
    model: str | None = None,
    sites: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
) -> Start:
    """Write a study like a bundled one into `folder`; its results go to `folder/run`.

    Args:
        folder: for the study's configs and prompts.
        like: the bundled study that it is like, `tiny` or `flux-dev`.
        prompts: a file of prompts to take in, by default those of `like`.
        model: a pipeline folder, a hub id or `bundled:NAME`, by default that of `like`.
        sites: modules to capture, by default those of `like`. SAEs are of the first.
        steps: 0-based steps to capture, by default those of `like`. SAEs are of the first.

    Raises ValueError and FileNotFoundError, before anything is written, when an argument names nothing that is there,
    when a site is no module of the model, or when the folder has such files already.
    """
    template = _template(like)
    capture = read_mapping(template / "capture.yaml")
    settings = capture["model"]["init_args"]
    files = {path.relative_to(template): path.read_text(encoding="utf-8") for path in sorted(template.rglob("*.yaml"))}
    own_prompts = prompts or template / Path(capture["data"]["init_args"]["prompts"]).name
    kept = {own_prompts: f"prompts{own_prompts.suffix}"} | {path: path.name for path in template.glob("*.txt")}
    n_prompts = len(read_prompts(own_prompts))
    for name in (STUDY_FILE, *map(str, files), *kept.values()):
        if (folder / name).exists():
            raise ValueError(f"{folder} has a {name} already, which init does not overwrite; name another folder.")

    chosen = _Choice(
        _as_written(model) if model is not None else settings["model"],
        tuple(map(str, map(parse_site, sites or settings["sites"]))),
        tuple(steps or settings["steps"]),
    )
    for step in chosen.steps:
        check_step(step, settings.get("n_steps", 20))
    width = _width(chosen, settings)
    changes = {
        "model": chosen.model,
        "sites": list(chosen.sites),
        "steps": list(chosen.steps),
        "prompts": f"${{here}}/prompts{own_prompts.suffix}",
    }
    shards = _shards(settings["sites"][0], settings["steps"][0]), _shards(chosen.sites[0], chosen.steps[0])
    for name, text in files.items():
        text = text.replace(f"configs/{like}/", f"{folder.as_posix()}/").replace(*shards)
        if name == Path(STUDY_FILE):
            text = _with_value(text, "root", "${here}/run")
        if name == Path("capture.yaml"):
            for key, value in changes.items():
                text = _with_value(text, key, value)
        files[name] = _with_value(text, "d_in", width) if width is not None else text

    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    for path, copy in kept.items():
        shutil.copyfile(path, folder / copy)
    read_study(folder / STUDY_FILE)
    check = _to_check(chosen, settings, width)
    if prompts is not None:
        check.append(f"steering-prompts.txt holds the prompts of {like}, on which features are tried out.")
    return Start(folder, *chosen, n_prompts, tuple(check))


class _Choice(NamedTuple):
    model: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]


def _template(like: str) -> Path:
    studies = {path.parent.name: path.parent for path in sorted(bundled("configs").glob(f"*/{STUDY_FILE}"))}
    if like not in studies:
        raise ValueError(unknown_key(like, studies, "--like", what="study"))
    return studies[like]


def _as_written(model: str) -> str:
    """A folder by its full path, so that the study may be run from anywhere; other names as they are."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model


def _width(chosen: _Choice, settings: dict[str, Any]) -> int | None:
    """D at the first site, found without weights; None when the model is not on this machine."""
    from fluxsae.models import is_on_hub, token_shapes, transformer_skeleton  # which take seconds to import

    if is_on_hub(chosen.model):
        return None
    grid = token_grid(settings.get("height", 256), settings.get("width", 256))
    skeleton = transformer_skeleton(weights_folder(chosen.model))
    shapes = token_shapes(skeleton, list(map(parse_site, chosen.sites)), grid, settings.get("text_length", 512))
    return shapes[0].width


def _shards(site: str, step: int) -> str:
    from fluxsae.capture import set_folder

    return set_folder(Path("capture"), site, step).as_posix()


def _with_value(text: str, key: str, value: Any) -> str:
    """A config's text with another value wherever `key` has one on its line."""
    shown = (
        yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True).removesuffix("...\n").strip()
    )
    return re.sub(rf"^( *(?:- )?{key}:) +\S.*$", lambda match: f"{match[1]} {shown}", text, flags=re.MULTILINE)


def _to_check(chosen: _Choice, settings: dict[str, Any], width: int | None) -> list[str]:
    told = []
    if len(chosen.sites) > 1 or len(chosen.steps) > 1:
        told.append(
            f"SAEs are trained on {chosen.sites[0]} at step {chosen.steps[0]}; for another, name it under `shards:`."
        )
    if width is None and (chosen.model != settings["model"] or chosen.sites != tuple(settings["sites"])):
        told.append("`d_in:` is as it was; make it the width of the tokens at the site, which only the model tells.")
    if chosen.model != settings["model"]:
        told.append("`height:`, `width:`, `n_steps:` and `text_length:` in capture.yaml are as they were.")
    return told
