"""How trainings went: loss, variance explained, codes a token and dead features, from a fit's logs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxsae.figures.style import BLUE, GREEN, ORANGE, PINK, drawing
from fluxsae.files import write_csv

TAGS = {
    "train/loss": "Training loss",
    "val/fve": "Variance explained, held-out prompts",
    "val/l0": "Active codes a token (L0)",
    "val/dead_fraction": "Share of dead features",
}


class Curve(NamedTuple):
    """One logged quantity over training steps."""

    steps: list[int]
    values: list[float]


Run = Mapping[str, Curve]


def read_run(folder: str | Path) -> dict[str, Curve]:
    """The curves named in `TAGS`, from the newest TensorBoard event files or `metrics.csv` under `folder` with any.

    FileNotFoundError when there is neither, ValueError when they hold none of the curves.
    """
    folder = Path(folder)
    logs = [*folder.rglob("events.out.tfevents.*"), *folder.rglob("metrics.csv")]
    if not logs:
        raise FileNotFoundError(
            f"there are no TensorBoard event files or metrics.csv under {folder}; name a fit's folder."
        )
    for log in sorted(logs, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        curves = _read_csv_log(log) if log.suffix == ".csv" else _read_events(log.parent)
        if curves:  # a fit that ended before its first step leaves a log without any
            return curves
    raise ValueError(f"the logs under {folder} hold none of {', '.join(TAGS)}; name the folder of a finished fit.")


def training_curves(runs: Mapping[str, Run], path: Path) -> None:
    """Draw one panel a quantity and one line a run, with the last value at its end.

    The numbers go to a CSV of the same name, one row a point: run, tag, step, value.
    """
    path = Path(path)
    tags = [tag for tag in TAGS if any(tag in run for run in runs.values())]
    columns = 2 if len(tags) > 1 else 1
    rows = -(-len(tags) // columns)
    with drawing(path, 4.6 * columns, 2.7 * rows + (0.3 if len(runs) > 1 else 0)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, tag in zip(axes, tags, strict=False):
            _panel(axis, tag, runs)
        for axis in list(axes)[len(tags) :]:
            axis.remove()
        if len(runs) > 1:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper left", ncols=len(runs))
    write_csv(path.with_suffix(".csv"), _rows(runs, tags), ("run", "tag", "step", "value"))


def _panel(axis: Axes, tag: str, runs: Mapping[str, Run]) -> None:
    axis.set_title(TAGS[tag])
    axis.set_xlabel("step")
    colours = (BLUE, ORANGE, GREEN, PINK)
    drawn = [(name, run[tag], colours[i % len(colours)]) for i, (name, run) in enumerate(runs.items()) if tag in run]
    for name, (steps, values), colour in drawn:
        axis.plot(steps, values, color=colour, linewidth=1.8, label=name, marker="o" if len(steps) < 2 else None)
    if tag == "train/loss":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    elif tag == "val/fve":
        axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))  # below 0, worse than the mean, is nothing to compare
    else:
        axis.set_ylim(bottom=0)
    axis.margins(x=0.02)
    _last_values(axis, [(curve, colour) for _, curve, colour in drawn])


def _last_values(axis: Axes, curves: Sequence[tuple[Curve, str]]) -> None:
    """Write each curve's last value at its end, moved apart where two would overlap."""
    ends = [(curve.steps[-1], curve.values[-1]) for curve, _ in curves]
    axis.autoscale_view()  # else limits are still those of an empty panel
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = [min(max(float(to_axes.transform(end)[1]), 0.0), 1.0) for end in ends]
    for i, height in zip(sorted(range(len(heights)), key=heights.__getitem__), spread(heights), strict=True):
        axis.annotate(
            f"{ends[i][1]:.3g}",
            (ends[i][0], height),
            xycoords=axis.get_xaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            color=curves[i][1],
            weight="bold",
            va="center",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float = 0.1) -> list[float]:
    """The heights in ascending order, neighbours at least `gap` apart, moved upwards only where they must be."""
    placed: list[float] = []
    for height in sorted(heights):
        placed.append(max(height, placed[-1] + gap) if placed else height)
    return placed


def _rows(runs: Mapping[str, Run], tags: Sequence[str]) -> list[dict[str, str | int | float]]:
    return [
        {"run": name, "tag": tag, "step": step, "value": value}
        for name, run in runs.items()
        for tag in tags
        if tag in run
        for step, value in zip(*run[tag], strict=True)
    ]


def _read_events(folder: Path) -> dict[str, Curve]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 1})
    events.Reload()
    found = {}
    for tag in TAGS:
        if tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag)}  # a resumed run logs some steps twice
            found[tag] = Curve(sorted(points), [points[step] for step in sorted(points)])
    return found


def _read_csv_log(path: Path) -> dict[str, Curve]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for tag in TAGS:
        points = {int(row["step"]): float(row[tag]) for row in rows if row.get(tag)}
        if points:
            found[tag] = Curve(sorted(points), [points[step] for step in sorted(points)])
    return found
