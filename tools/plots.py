"""Pictures of comparisons and of the ladder of records."""

from pathlib import Path

import matplotlib
import numpy as np

from tools.comparison import Arm, Comparison

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {"A": "tab:blue", "B": "tab:orange"}


def plot_comparison(c: Comparison, path: Path) -> None:
    """Loss against time and step, and final loss and time by the order of the runs."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    figure.suptitle(f"B {c.verdict} {c.reason}")
    for arm, (letter, colour) in zip((c.a, c.b), COLOURS.items(), strict=True):
        label = f"{letter}  {arm.name}  n={len(arm.runs)}"
        draw_losses(axes[0, 0], arm, label, colour, by_time=True)
        draw_losses(axes[0, 1], arm, label, colour, by_time=False)
    draw_by_order(axes[1, 0], c, lambda run: run.val_loss, "final val_loss, nats per token")
    draw_by_order(axes[1, 1], c, lambda run: run.train_s, "train time, s")
    if not np.isnan(c.b.target):
        for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
            ax.axhline(c.b.target, color="grey", linestyle=":", label=f"target {c.b.target:g}")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    if axes[0, 0].has_data():
        axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(ax, arm: Arm, label: str, colour: str, by_time: bool) -> None:
    """The mean validation loss at each validation but the first, with a band of one sd."""
    curves = [np.array(run.val_curve[1:]) for run in arm.finished]
    if not curves or min(map(len, curves)) == 0:
        return
    stack = np.stack([curve[: min(map(len, curves))] for curve in curves])
    x, loss = stack[..., 1].mean(0) / 1000 if by_time else stack[0, :, 0], stack[..., 2]
    ax.plot(x, loss.mean(0), color=colour, label=label, marker=".")
    ax.fill_between(x, loss.mean(0) - loss.std(0), loss.mean(0) + loss.std(0), color=colour,
                    alpha=0.2)  # fmt: skip
    ax.set(xlabel="train time, s" if by_time else "step", ylabel="val_loss, nats per token")


def draw_by_order(ax, c: Comparison, figure, name: str) -> None:
    """A figure of every finished run, in the order in which the runs began."""
    finished = [(letter, run) for letter, run in c.in_order if run.finished]
    for place, (letter, run) in enumerate(finished, start=1):
        ax.plot(place, figure(run), "o", color=COLOURS[letter])
    for arm, colour in ((c.a, COLOURS["A"]), (c.b, COLOURS["B"])):
        if len(values := arm.values(figure)):
            ax.axhline(values.mean(), color=colour, alpha=0.5)
    ax.set(xlabel="run, in order", ylabel=name)


def plot_ladder(title: str, names: list[str], arms: list[Arm], path: Path) -> None:
    """Train time of each record of one class: a bar for the mean, a dot for every run."""
    figure, ax = plt.subplots(figsize=(9, 1.4 + 0.5 * len(arms)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for place, arm in enumerate(arms):
        mean, slowest = arm.times.mean(), arm.times.max()
        ax.barh(place, mean, color="tab:blue", alpha=0.35)
        ax.plot(arm.times, [place] * len(arm.times), ".", color="tab:blue")
        ax.annotate(
            f"{mean:.1f} s", (slowest, place), (7, 0), va="center", textcoords="offset points"
        )
    ax.set_xlabel("train time to the target, s (mean; a dot for each run)")
    ax.set_xlim(0, 1.12 * max(arm.times.max() for arm in arms))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
