"""The comparison as a picture; for those who have matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from benchmarks.report import Outcome, Report, in_words
from benchmarks.stats import Summary

_OURS, _THEIRS, _INK = "#1b6ca8", "#9aa5b1", "#333333"
_INCHES = (9.0, 3.6)
_DOTS_PER_INCH = 120


def draw(result: Report, path: Path) -> None:
    """Draw a PNG: on the left what a test takes, on a logarithmic scale, on the right how many are done in a second."""
    measured = {name: outcome for name, outcome in result.outcomes.items() if not outcome.not_measured}
    names = list(reversed(measured))
    colours = [_OURS if name.startswith("lxc_pool") else _THEIRS for name in names]
    # Nothing of the machine's own configuration, or of its screen.
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 9, "text.color": _INK}):
        canvas = Canvas(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
        left, right = canvas.subplots(1, 2, sharey=True)
        for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
            value = _summary(measured[name], "a test, -n 1")
            left.plot([value.least, value.p99], [place, place], color=colour, linewidth=6, alpha=0.35)
            left.plot([value.median], [place], "o", color=colour, markersize=8)
            left.annotate(
                f"{in_words(value.median)} ms", (value.median, place), (0, 8), textcoords="offset points", ha="center"
            )
        left.set_xscale("log")
        left.set_yticks(range(len(names)), names)
        left.set_ylim(-0.5, len(names) - 0.3)
        left.set_title("a test, one worker: median, and least to 99th percentile; ms", fontsize=9)
        rates = [_summary(measured[name], "tests a second, -n 2").median for name in names]
        bars = right.barh(range(len(names)), rates, color=colours, height=0.6)
        right.bar_label(bars, labels=[in_words(rate) for rate in rates], padding=3)
        right.margins(x=0.15)
        right.set_title("tests a second, two workers", fontsize=9)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        canvas.supxlabel(_caption(result), fontsize=8)
        # Without the version of matplotlib: the same numbers are the same file.
        canvas.savefig(path, format="png", metadata={"Software": None})


def _summary(outcome: Outcome, what: str) -> Summary:
    for figure in outcome.figures:
        if figure.what == what and isinstance(figure.value, Summary):
            return figure.value
    raise ValueError(f"{what} has not been measured")


def _caption(result: Report) -> str:
    machine = result.machine
    text = f"{result.began[:10]}, {machine['cpus']} CPUs ({machine['cpu']}), {machine['system']}, {machine['kernel']}"
    return f"{text}: a quick run, which means nothing" if result.plan["quick"] else text
