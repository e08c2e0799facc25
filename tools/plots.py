"""Pictures of comparisons and of the ladder of records."""

from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np

from tools.comparison import Arm, Comparison

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLOURS = {"A": "tab:blue", "B": "tab:orange"}


def plot_comparison(c: Comparison, path: Path) -> None:
    """Loss against time and step, and final loss and time by the order of the runs."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    figure.suptitle("\n".join(wrap(f"B {c.verdict} {c.reason}", 110)))
    kind = "val_loss" if validations(c) > 1 else "train_loss"
    for arm, (letter, colour) in zip((c.a, c.b), COLOURS.items(), strict=True):
        label = f"{letter}  {arm.name}  n={len(arm.runs)}"
        draw_losses(axes[0, 0], arm, kind, label, colour, by_time=True)
        draw_losses(axes[0, 1], arm, kind, label, colour, by_time=False)
    draw_by_order(axes[1, 0], c, lambda run: run.val_loss, "final val_loss, nats per token")
    draw_by_order(axes[1, 1], c, lambda run: run.train_s, "train time, s")
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0])[0 if kind == "val_loss" else 2 :]:
        draw_target(ax, c.b.target)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def validations(c: Comparison) -> int:
    """The fewest validations of a finished run, without that of the untrained network."""
    return min((len(run.val_curve) - 1 for arm in (c.a, c.b) for run in arm.finished), default=0)


def draw_losses(ax, arm: Arm, kind: str, label: str, colour: str, by_time: bool) -> None:
    """The mean loss of the finished runs with a band of one sd, without its steep beginning.

    kind: val_loss, at each validation but the first; or train_loss, whose first tenth is left out.
    """
    is_val = kind == "val_loss"
    curves = [run.val_curve[1:] if is_val else run.train_curve for run in arm.finished]
    if not curves or not (shortest := min(map(len, curves))):
        return
    stack = np.array([curve[:shortest] for curve in curves])[:, 0 if is_val else shortest // 10 :]
    x, loss = stack[..., 1].mean(0) / 1000 if by_time else stack[0, :, 0], stack[..., 2]
    ax.plot(x, loss.mean(0), color=colour, label=label, marker="." if is_val else "", linewidth=1)
    ax.fill_between(x, loss.mean(0) - loss.std(0), loss.mean(0) + loss.std(0), color=colour,
                    alpha=0.2)  # fmt: skip
    ax.set(xlabel="train time, s" if by_time else "step", ylabel=f"{kind}, nats per token")


def draw_target(ax, target: float) -> None:
    """A line at the target where it is near the losses; further off it is named, not drawn."""
    low, high = ax.get_ylim()
    if not ax.has_data() or np.isnan(target):
        return
    if low - (high - low) < target < high + (high - low):
        ax.axhline(target, color="grey", linestyle=":", label=f"target {target:g}")
    else:
        where = "above" if target > high else "below"
        ax.plot([], [], color="grey", linestyle=":", label=f"target {target:g}, far {where}")


def draw_by_order(ax, c: Comparison, figure, name: str) -> None:
    """A figure of every finished run, in the order in which the runs began; pairs are joined."""
    finished = [(letter, run) for letter, run in c.in_order if run.finished]
    places = range(1, len(finished) + 1)
    if c.in_pairs:
        ys = [figure(run) for _, run in finished]
        for k in range(0, len(ys), 2):
            ax.plot(places[k : k + 2], ys[k : k + 2], color="grey", linewidth=1, zorder=1)
    for place, (letter, run) in zip(places, finished, strict=True):
        ax.plot(place, figure(run), "o", color=COLOURS[letter])
    for arm, colour in ((c.a, COLOURS["A"]), (c.b, COLOURS["B"])):
        if len(values := arm.values(figure)):
            ax.axhline(values.mean(), color=colour, alpha=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=f"run, in order{'; pairs are joined' if c.in_pairs else ''}", ylabel=name)


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
    ax.set_xlabel("train time of the whole run, s (mean; a dot for each run)")
    ax.set_xlim(0, 1.12 * max(arm.times.max() for arm in arms))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
