"""Starts a study of one's own: a folder with the configs of a bundled study, changed where it differs, and its prompts.

Configs are changed line by line, so that they keep their comments.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fluxsae.files import bundled, unknown_key, write_text
from fluxsae.records import check_step, parse_site, read_prompts, token_grid
from fluxsae.study.config_files import STUDY_FILE, read_mapping


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
    settings = _settings(template)
    own_prompts = prompts or template / "prompts.jsonl"
    n_prompts = len(read_prompts(own_prompts))
    chosen = _Choice(
        _as_written(model) if model is not None else settings["model"],
        tuple(map(str, map(parse_site, sites or settings["sites"]))),
        tuple(steps or settings["steps"]),
        f"prompts{own_prompts.suffix}",
    )
    for step in chosen.steps:
        check_step(step, settings["n_steps"])
    width = _width(chosen, settings)
    texts = {
        path.relative_to(template).as_posix(): path.read_text(encoding="utf-8").replace(f"configs/{like}", str(folder))
        for path in sorted(template.rglob("*.yaml"))
    }
    copies = {chosen.prompts: own_prompts} | {path.name: path for path in template.glob("*.txt")}
    for name in (STUDY_FILE, *texts, *copies):
        if (folder / name).exists():
            raise ValueError(f"{folder} has a {name} already, which init does not overwrite; name another folder.")

    for name, text in _changed(texts, chosen, settings, width).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    for name, path in copies.items():
        shutil.copyfile(path, folder / name)
    check = _to_check(chosen, settings, width)
    if prompts is not None:
        check.append(f"steering-prompts.txt holds the prompts of {like}, on which features are tried out.")
    return Start(folder, chosen.model, chosen.sites, chosen.steps, n_prompts, tuple(check))


class _Choice(NamedTuple):
    model: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    prompts: str


def _template(like: str) -> Path:
    studies = {path.parent.name: path.parent for path in sorted(bundled("configs").glob(f"*/{STUDY_FILE}"))}
    if like not in studies:
        raise ValueError(unknown_key(like, studies, "--like", what="study"))
    return studies[like]


def _settings(template: Path) -> dict[str, Any]:
    """How a bundled study captures: what its config says, and the defaults of what it does not."""
    from fluxsae.capture import FluxCapture  # which takes seconds to import

    parameters = inspect.signature(FluxCapture).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return {**defaults, **read_mapping(template / "capture.yaml")["model"]["init_args"]}


def _changed(texts: dict[str, str], chosen: _Choice, settings: dict[str, Any], width: int | None) -> dict[str, str]:
    """The configs of a bundled study with what was chosen in place of what it had."""
    values: dict[str, dict[str, Any]] = {
        STUDY_FILE: {"root": "${here}/run"},
        "capture.yaml": {
            "model": chosen.model,
            "sites": list(chosen.sites),
            "steps": list(chosen.steps),
            "prompts": f"${{here}}/{chosen.prompts}",
        },
    }
    shards = _shards(settings["sites"][0], settings["steps"][0]), _shards(chosen.sites[0], chosen.steps[0])
    changed = {}
    for name, text in texts.items():
        text = text.replace(*shards)
        if chosen.model != settings["model"]:  # comments say whose SAE it is
            text = re.sub(r"^(#.*?) (?:on|of) (?:the bundled FLUX|FLUX\.1-dev)\b", r"\1", text, flags=re.MULTILINE)
        for key, value in {**values.get(name, {}), **({} if width is None else {"d_in": width})}.items():
            text = _with_value(text, key, value)
        changed[name] = text
    return changed


def _as_written(model: str) -> str:
    """A folder by its full path, so that the study may be run from anywhere; other names as they are."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model


def _width(chosen: _Choice, settings: dict[str, Any]) -> int | None:
    """D at the first site, found without weights; None when the model is not on this machine."""
    from fluxsae.models import is_on_hub, token_shapes, transformer_skeleton

    if is_on_hub(chosen.model):
        return None
    grid = token_grid(settings["height"], settings["width"])
    sites = [parse_site(site) for site in chosen.sites]
    return token_shapes(transformer_skeleton(chosen.model), sites, grid, settings["text_length"])[0].width


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
