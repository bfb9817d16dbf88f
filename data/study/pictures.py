"""The pictures of data/results, drawn from the saved results.

    python data/study/pictures.py
"""
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
from matplotlib.figure import Figure

import vlmrm
from study import FIRST, RESULTS
from tables import ORDER, SAME, label, load, mean_of, remark_of

BLUE = "#30638e"
RED = "#c8384e"
NAMED = ("triplet", "tcn", "r3m", "vip", "liv", "anchored")  # the paper's five, and ours
MARKS = {"LoRA": "o", "all weights": "D"}

def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    vlmrm.write_whole(path, png.getvalue())

def draw_comparison(runs: dict, path: Path) -> None:
    """Each row's score with every seed, and the intervals over tasks."""
    figure = Figure(figsize=(13, 0.3 * len(runs) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(ORDER), sharey=True)
    for axis, (title, (group, metric)) in zip(axes, ORDER.items()):
        for y, by_way in enumerate(runs.values()):
            for run in by_way[FIRST]:
                score = run[group][metric]
                axis.plot(score["interval"], [y, y], color=RED, lw=2, alpha=0.3)
                axis.plot(score["value"], y, "o", color=BLUE, ms=5)
        axis.axvline(vlmrm.METRICS[metric][1], color="0.8", zorder=0)
        axis.set_title(title.replace(", ", "\n"), loc="left", fontsize=9)
    names = [label(row).replace("`", "") for row in runs]
    axes[0].set(yticks=range(len(runs)), yticklabels=names, ylim=(len(runs), -1))
    axes[0].plot([], [], "o", color=BLUE, label="a training seed (LoRA adapters)")
    axes[0].plot([], [], color=RED, lw=2, alpha=0.5, label="its 95 % interval over tasks")
    axes[0].plot([], [], color="0.8", label="a reward that knows nothing")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    save(figure, path)

def draw_kept(runs: dict, doors: dict, data, path: Path) -> None:
    """Order against reading on unseen tasks, before and after fine-tuning; and what becomes of
    door-open, which is unseen, under its sentence and the opposite one."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 2))
    axes = left.subplots(1, 2)
    for axis, metric in zip(axes, ("voc", SAME)):
        draw_trade(axis, runs, metric)
    left.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)

    axes = right.subplots(1 + len(doors), 1, height_ratios=(1, *[2] * len(doors)))
    pictures = data.pictures(data.select(task="door-open-v3", source="expert", split="test")[0])
    shown = pictures[np.linspace(0, data.T - 1, 6).astype(int)]
    axes[0].imshow(np.concatenate(shown, axis=1))
    axes[0].set_axis_off()
    for axis, (name, curves) in zip(axes[1:], sorted(doors.items(), reverse=True)):
        for (sentence, rewards), color in zip(curves.items(), (BLUE, RED)):
            axis.plot(rewards, color=color, label=f"reward under “{sentence}”")
        title = f"after {name}"
        if name.startswith("zeroshot"):
            title = "before training"
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("picture")
    right.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center")
    save(figure, path)

def draw_trade(axis, runs: dict, metric: str) -> None:
    """A metric against reading: a mark for each objective and way of fine-tuning, and a line to it
    from before."""
    def place(row, way):
        return [mean_of(runs[row][way], "unseen", name) for name in ("opposite_gap", metric)]

    start = place("zeroshot", FIRST)
    for row in runs:
        if remark_of(row) in ("control", "no training"):
            continue
        color = f"C{NAMED.index(row)}" if row in NAMED else "0.8"
        for way, mark in MARKS.items():
            end = place(row, way)
            axis.plot(*end, mark, color=color, ms=8 if row in NAMED else 5, zorder=2)
            if row in NAMED:
                axis.plot(*zip(start, end), color=color, lw=0.8, zorder=1)
    axis.plot(*start, "*", color="black", ms=18, label="before training", ls="")
    for way, mark in MARKS.items():
        axis.plot([], [], mark, color="0.4", label=f"after training: {way}")
    axis.plot([], [], "s", color="0.8", label="other objectives, either way")
    for k, row in enumerate(NAMED):
        axis.plot([], [], "s", color=f"C{k}", label=row)
    axis.set(xlabel="reading: VOC minus VOC of the opposite instruction",
             title=f"{vlmrm.METRICS[metric][0]}, unseen tasks")

def work(args) -> None:
    """Draw all of them."""
    runs = load(RESULTS)
    doors = vlmrm.read_json(RESULTS / "reading.json")["door"]
    draw_comparison(runs, RESULTS / "comparison.png")
    draw_kept(runs, doors, vlmrm.Dataset(vlmrm.DATA / "metaworld.npz"), RESULTS / "kept.png")

if __name__ == "__main__":
    sys.exit(common.main(common.Parser("pictures", description=__doc__), work))
