"""The pictures of data/results, drawn from the saved results.

    python data/study/pictures.py
"""
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import vlmrm
from tables import (
    COLUMNS, CONTROLS, groups_of, guide_scores, in_order, interval, load, trial_scores)
from trial import ARMS
from workers import RESULTS

BLUE = "#30638e"
RED = "#c8384e"
# What these teach a video depends on the sentences of other videos: exercise 9 finds that out.
CONTRASTS = ("r3m", "liv", "tcn-text", "vip-text", "decisionnce-t", "triplet + directions",
             "triplet + keep + directions", "anchored")

def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. It says which results it was made of."""
    png = io.BytesIO()
    results = [RESULTS / name for name in ("choices.json", "trial.json", "guide.json")]
    made_of = vlmrm.digest(*results)
    figure.savefig(png, dpi=110, metadata={"Source": made_of})
    vlmrm.write_whole(path, png.getvalue())

def draw_comparison(scores: dict, path: Path) -> None:
    """Each arm: a dot for each task, their mean and its interval."""
    titles = list(COLUMNS)[:3]
    order = in_order(scores)
    figure = Figure(figsize=(14, 0.36 * len(order) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True)
    for axis, title in zip(axes, titles):
        for y, arm in enumerate(order):
            values = np.array(list(scores[arm][COLUMNS[title]].values()))
            if not len(values):
                continue
            axis.plot(values, np.full(len(values), y), "o", color="0.75", ms=4, zorder=1)
            axis.plot(interval(values), [y, y], color=RED, lw=2, zorder=2)
            axis.plot(values.mean(), y, "o", color=BLUE, ms=7, zorder=3)
        axis.axvline(vlmrm.METRICS[COLUMNS[title]][1], color="0.8", zorder=0)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].set(yticks=range(len(order)), yticklabels=order, ylim=(len(order), -1))
    axes[0].plot([], [], "o", color="0.75", label="an unseen task")
    axes[0].plot([], [], "o", color=BLUE, label="mean")
    axes[0].plot([], [], color=RED, lw=2, label="its 95 % interval over tasks")
    axes[0].plot([], [], color="0.8", label="a reward that knows nothing")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    save(figure, path)

def draw_kept(scores: dict, path: Path) -> None:
    """VOC under the own sentence against VOC under the opposite one, on tasks that have both."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axis = figure.subplots()
    order = [arm for arm in in_order(scores) if arm not in CONTROLS]
    places = {}
    for arm in order:
        opposite = scores[arm]["voc_opposite"]
        own = [scores[arm]["voc"][task] for task in opposite]
        places[arm] = (np.mean(list(opposite.values())), np.mean(own))
    for k, arm in enumerate(order):
        if arm == "zeroshot":
            continue
        shape = "s" if arm in CONTRASTS else "o"
        axis.plot(*zip(places["zeroshot"], places[arm]), color="0.85", lw=0.8, zorder=1)
        axis.plot(*places[arm], shape, color=matplotlib.colormaps["tab20"](k), ms=11,
                  zorder=2, ls="", markeredgecolor="black", label=arm)
    axis.plot(*places["zeroshot"], "*", color="black", ms=18, ls="", label="before training")
    axis.axline((0, 0), slope=1, color="0.6", ls=":", label="reads nothing")
    axis.plot([], [], "s", color="white", markeredgecolor="black",
              label="square: what a video learns depends\non other videos' sentences, too")
    axis.plot([], [], "o", color="white", markeredgecolor="black",
              label="circle: on its own alone")
    axis.set(xlabel="VOC under the opposite sentence: a reward that reads falls, to the left",
             ylabel="VOC under the own sentence: up is better",
             title=f"{len(scores['zeroshot']['voc_opposite'])} unseen tasks that have an opposite")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, path)

def draw_guide(scores: dict, path: Path) -> None:
    """The success of plans against the gain, of every reward that was searched by."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in scores if scores[row]["gain"]]
    for k, row in enumerate(rows):
        gains = np.array(list(scores[row]["gain"].values()))
        done = np.array(list(scores[row]["done"].values()))
        colour = matplotlib.colormaps["tab10"](k)
        place = (gains.mean(), done.mean())
        axis.plot(interval(gains), [place[1]] * 2, color=colour, lw=1, alpha=0.5)
        axis.plot([place[0]] * 2, np.clip(interval(done), 0, 1), color=colour, lw=1, alpha=0.5)
        axis.plot(*place, "o", color=colour, ms=10, label=row, markeredgecolor="black")
    chance = np.mean(list(scores["random"]["done"].values()))
    axis.axhline(chance, color="0.6", ls=":", label="a random plan")
    axis.axvline(0.5, color="0.6", ls="--", label="chance")
    axis.set(xlabel="how often the reward rises more when an expert acts than when actions are "
                    f"random ({len(gains)} tasks)",
             ylabel=f"starts from which a plan succeeds ({len(done)} tasks)",
             title="Rewards that tell good steps from bad ones, and what comes of maximising them")
    axis.plot([], [], color="0.6", lw=1, label="95 % interval over tasks")
    figure.legend(loc="outside right center", fontsize=9)
    save(figure, path)

def work(args) -> None:
    """Draw all of them."""
    _, runs = load(RESULTS)
    groups = groups_of(runs)
    folds, arms = next(iter(groups.items()))  # of all folds
    draw_comparison(trial_scores(runs, arms, folds), RESULTS / "comparison.png")
    shared = set.intersection(*map(set, groups))
    tested = [arm for arm in ARMS if any(arm in arms for arms in groups.values())]
    draw_kept(trial_scores(runs, tested, shared), RESULTS / "kept.png")
    draw_guide(guide_scores(vlmrm.read_json(RESULTS / "guide.json")), RESULTS / "guide.png")

if __name__ == "__main__":
    sys.exit(common.main(common.Parser("pictures", description=__doc__), work))
