"""One sentence for what is wrong with a command or a config file: one that is not there, or jsonargparse's report."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import NoneType
from typing import Any, NamedTuple

from fluxsae.cli.config_arguments import ConfigFile
from fluxsae.files import unknown_key


class Complaint(NamedTuple):
    """The innermost part of a report: the keys that lead to it, the last class on the way, and what is said there."""

    keys: tuple[str, ...]
    class_path: str | None
    since_class: tuple[str, ...]
    text: str


def explain(report: str, known: Mapping[str, Iterable[str]], files: Sequence[ConfigFile] = ()) -> str:
    """The report as one sentence that names the file, the key and, where it looks misspelt, the key that was meant.

    Args:
        report: what jsonargparse says.
        known: the keys that a config file may have, by the key that they stand under; those at the top under `""`.
        files: the config files that were read.
    """
    complaint = innermost(report)
    source = _source(complaint, files)
    replaced = bool(files and complaint.keys and not source)
    return source + _explain(complaint, known, replaced)


def _explain(complaint: Complaint, known: Mapping[str, Iterable[str]], replaced: bool) -> str:
    """`replaced`: no config file says anything of it."""
    at = f" (at {'.'.join(complaint.keys)})" if complaint.keys else ""
    text = complaint.text
    if match := re.fullmatch(r"Option '(.+)' is not accepted", text):
        if complaint.class_path is None:
            return _unknown_option(".".join([*complaint.keys, match[1]]), known)
        owner = _owner(complaint)
        return unknown_key(match[1], _options(owner), _name(complaint, owner)) + at
    if match := re.search(r"does not accept option '(.+)'", text):
        return _unknown_option(match[1], known)
    if match := re.match(r"unrecognized arguments: --([\w.]+)", text):
        return _unknown_option(match[1], known, "the command line")
    if match := re.search(r"module '(fluxsae[\w.]*)' has no attribute '(\w+)'", text):
        return unknown_key(match[2], import_module("fluxsae").__all__, match[1], what="class") + at
    if match := re.search(r"arguments are required: (.+)", text):
        missing = ", ".join(name.split(".")[-1] for name in match[1].split(", "))
        if complaint.class_path is not None:
            hint = "; what the command line names replaces all that a config file says there" if replaced else ""
            return f"{complaint.class_path.rpartition('.')[2]} needs {missing}{at}{hint}"
        return f"nothing says what {missing!r} is: name a config file, as in -c configs/tiny/topk.yaml"
    return _plain(text) + at


def _source(complaint: Complaint, files: Sequence[ConfigFile]) -> str:
    """The last file that says the key in question, which is the one that counts."""
    match = re.search(r"ption '(.+)'", complaint.text)
    keys = [*complaint.keys, *(match[1].split(".") if match else ())]
    return next((f"{file.path}: " for file in reversed(files) if keys and _says(file.values, keys)), "")


def _says(values: Any, keys: Sequence[str]) -> bool:
    if not keys:
        return True
    if isinstance(values, list):
        return any(_says(part, keys) for part in values)
    if not isinstance(values, dict):
        return False
    return _says(values[keys[0]], keys[1:]) if keys[0] in values else _says(values.get("init_args"), keys)


def is_report(text: str) -> bool:
    """Whether jsonargparse says what does not fit, rather than the class or file itself."""
    return text.startswith(("Does not validate against", "Problem with given class_path"))


def innermost(report: str) -> Complaint:
    """The most deeply indented statement of a report, and the way to it.

    jsonargparse tries every member of a union and reports all; the one that got furthest is the one that was meant.
    """
    lines = [(len(line) - len(line.lstrip(" -")), line.lstrip(" -")) for line in report.splitlines() if line.strip()]
    told = [(depth, text) for depth, text in lines if not _says_nothing(text)]
    if not told:
        return Complaint((), None, (), report)
    deepest = max(range(len(told)), key=lambda i: (told[i][0], -i))
    depth, text = told[deepest]
    way = []
    for above, line in reversed(told[:deepest]):
        if above < depth:
            way.append(line)
            depth = above
    keys: list[str] = []
    since: list[str] = []
    class_path = None
    statements = [*reversed(way), text]
    for line in statements:
        while match := re.match(r"(?:Parser key \"([^\"]+)\":|Problem with given class_path '([^']+)':)\s*", line):
            if match[1]:
                keys += match[1].split(".")
                since += match[1].split(".")
            else:
                class_path, since = match[2], []
            line = line[match.end() :]
        text = line or text
    return Complaint(tuple(keys), class_path, tuple(since), text)


def _unknown_option(option: str, known: Mapping[str, Iterable[str]], source: str = "the config file") -> str:
    head, _, rest = option.partition(".")
    if rest and head in known:
        return unknown_key(rest.split(".")[0], known[head], repr(head))
    return unknown_key(head, known.get("", ()), source)


def _says_nothing(text: str) -> bool:
    return bool(
        re.match(r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>", text)
    )


def _owner(complaint: Complaint) -> Any:
    """The class or dataclass whose key is unknown; None when it cannot be told."""
    if complaint.class_path is None:
        return None
    module, _, name = complaint.class_path.rpartition(".")
    try:
        owner: Any = getattr(import_module(module), name)
        for key in complaint.since_class:
            owner = _dataclass_in(typing.get_type_hints(owner.__init__)[key])
    except (ImportError, AttributeError, KeyError, NameError, ValueError, TypeError):
        return None
    return owner


def _dataclass_in(hint: Any) -> Any:
    return next(
        part for part in (typing.get_args(hint) or (hint,)) if part is not NoneType and dataclasses.is_dataclass(part)
    )


def _options(owner: Any) -> Sequence[str]:
    if owner is None:
        return ()
    return [name for name in inspect.signature(owner).parameters if name not in ("args", "kwargs")]


def _name(complaint: Complaint, owner: Any) -> str:
    return owner.__name__ if owner is not None else complaint.class_path or "the config file"


def _plain(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    text = re.sub(r"Expected an? (.+?)\. Got value: (.+)", r"expected \1, not \2", text)
    return text.rstrip(".")
