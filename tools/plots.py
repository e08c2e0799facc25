"""The charts of the page about records (report.py), and the ladder of a class of records."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from referee.files import whole
from tools.comparison import Arm, Comparison

COLOURS = {"A": "tab:blue", "B": "tab:orange"}


def loss_kind(arms: list[Arm]) -> str:
    """val_loss where the runs validated often enough for a curve, else train_loss."""
    validations = min((len(run.val_curve) for arm in arms for run in arm.finished), default=0)
    return "val_loss" if validations > 2 else "train_loss"  # the first is of step 0


def draw_losses(ax, arm: Arm, kind: str, label: str, colour: str, by_time: bool) -> None:
    """The mean loss of the finished runs with a band of one sd, without its steep beginning.

    Of validation losses the first is left out, of training losses the first tenth.
    """
    is_val = kind == "val_loss"
    curves = [run.val_curve[1:] if is_val else run.train_curve for run in arm.finished]
    if not curves or not (shortest := min(map(len, curves))):
        return
    stack = np.array([curve[:shortest] for curve in curves])[:, 0 if is_val else shortest // 10 :]
    x = stack[..., 1].mean(0) / 1000 if by_time else stack[0, :, 0]
    mean, sd = stack[..., 2].mean(0), stack[..., 2].std(0)
    ax.plot(x, mean, color=colour, label=label, marker="." if is_val else "", linewidth=1)
    ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2)
    ax.set(xlabel="train time, s" if by_time else "step", ylabel=f"{kind}, nats per token")


def draw_target(ax, target: float) -> None:
    """A line at the target, if it is near the losses."""
    low, high = ax.get_ylim()
    if ax.has_data() and 2 * low - high < target < 2 * high - low:
        ax.axhline(target, color="grey", linestyle=":", label=f"target {target:g}")


def draw_by_order(ax, c: Comparison, figure, name: str) -> None:
    """A figure of every finished run, in the order of their starts; lines join pairs."""
    runs = [(letter, figure(run)) for letter, run in c.in_order if run.finished]
    places = np.arange(1, len(runs) + 1)
    values = np.array([value for _, value in runs])
    if c.in_pairs:
        ax.plot(places.reshape(-1, 2).T, values.reshape(-1, 2).T, color="grey", linewidth=1,
                zorder=1)  # fmt: skip
    for letter, colour in COLOURS.items():
        own = [x == letter for x, _ in runs]
        if any(own):
            ax.plot(places[own], values[own], "o", color=colour)
            ax.axhline(values[own].mean(), color=colour, alpha=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=f"run, in order{'; pairs are joined' if c.in_pairs else ''}", ylabel=name)


def plot_ladder(title: str, names: list[str], arms: list[Arm], path: Path) -> None:
    """Train time of each record of one class: a bar for the mean, a dot for every run."""
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(arms)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    ax = figure.subplots()
    for place, arm in enumerate(arms):
        mean, slowest = arm.times.mean(), arm.times.max()
        ax.barh(place, mean, color="tab:blue", alpha=0.35)
        ax.plot(arm.times, [place] * len(arm.times), ".", color="tab:blue")
        ax.annotate(f"{mean:.1f} s", (slowest, place), (7, 0), textcoords="offset points",
                    va="center")  # fmt: skip
    ax.set_xlim(0, 1.12 * max(arm.times.max() for arm in arms))
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("train time of the whole run, s (mean; a dot for each run)")
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def plot_ideas(ideas: list, judge: str, path: Path) -> None:
    """What the kept ideas of a campaign gained together, by the number of ideas tried."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    steps = [idea.change if idea.decision == "keep" and idea.number else 0 for idea in ideas]
    total = np.cumsum(steps) if judge == "loss" else 100 * np.cumprod(1 + np.array(steps))
    ax.step(range(len(ideas)), total, where="post", color="tab:blue")
    for idea, y in zip(ideas, total, strict=True):
        kept = idea.decision == "keep"
        ax.plot(idea.number, y, "o" if kept else "x", color="tab:blue" if kept else "grey")
    figure_of = "loss of the best, minus the first's" if judge == "loss" else "time of the best, %"
    ax.set(xlabel="ideas tried (dots: kept)", ylabel=figure_of)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
