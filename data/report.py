"""Tables and pictures of data/results. It stays beside vlmrm.py so that no figure in the README is
typed by hand; what a run itself prints and draws needs no other program.

    python data/report.py     draw the pictures again, fill the tables of README.md and of
                              data/results/README.md, between <!-- name --> and <!-- end of name -->
"""
import functools
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import vlmrm  # before torch: see there

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from study import all_objectives, paired_p_values

SEEN, UNSEEN = "#30638e", "#c8384e"
SHORT = ("triplet", "tcn", "r3m", "vip", "liv",  # the paper's five, and what to hold against them
         "thumbnail", "distance-from-start", "clock", "zeroshot")

# -----------------------------------------------------------------------------
# Reading the results

def load(root: Path) -> tuple[dict, dict]:
    """The runs of the study, {(row, setting): [run of each seed]}, and the setting to show of each
    row, by VOC on unseen tasks. Their intervals are those over tasks."""
    runs = {}
    for result in json.loads((root / "results.json").read_text(encoding="utf-8")):
        runs.setdefault((result["row"], result["config"]["setting"]), []).append(result)
        by_task = vlmrm.average_over_tasks(result["tasks"])
        for group in ("seen", "unseen"):
            for metric, cell in result[group].items():  # without scores of tasks, no interval
                value = cell["value"]
                cell["interval"] = by_task[group].get(metric, {"interval": [value] * 2})["interval"]
    shown = {row: "tuned" if (row, "tuned") in runs else "official" for row, _ in runs}
    return runs, {row: shown[row] for row in sorted(shown, key=lambda row: (
        is_baseline(row), -mean(runs[row, shown[row]], "unseen")))}

@functools.cache
def remark_of(row: str) -> str:
    """Why a row is no rival like the others, as its objective tells; "" if it is one."""
    if row not in all_objectives():
        return "control"  # triplet on another backbone
    parts = vlmrm.get_objective(all_objectives()[row])
    if not parts["loss"]:
        frames, known = torch.rand(2, 5, 4), [torch.rand(len(parts["SENTENCES"]), 4)]
        one, other = (parts["reward"](frames, text, *known[:len(parts["SENTENCES"])])
                      for text in torch.rand(2, 4))
        return "control" if torch.equal(one, other) else "no training"
    return ("privileged" if parts["LABELS"] == "rewards" else
            "" if vlmrm.reads_instruction(parts["loss"]) else "no language")

def is_rival(row: str) -> bool:  # of triplet: trained, and without the simulator's reward
    return remark_of(row) in ("", "no language")

def is_baseline(row: str) -> bool:
    return remark_of(row) in ("control", "no training")

def label(row: str, quote: str = "") -> str:
    return f"{quote}{row}{quote}" + f" ({remark_of(row)})" * bool(remark_of(row))

def mean(runs: list[dict], group: str, metric: str = "voc") -> float:
    return float(np.mean([run[group][metric]["value"] for run in runs]))

# -----------------------------------------------------------------------------
# Tables

def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. The first title may be empty."""
    head, *lines = ["| " + " | ".join(cells).lstrip() + " |" for cells in (titles, *rows)]
    return "\n".join([head, "|" + " --- |" * len(titles), *lines])

def cell(runs: list[dict], group: str, metric: str, interval: bool = True) -> str:
    """Mean ± std over seeds, and the mean over seeds of the 95 % intervals over tasks."""
    if not (found := [run[group][metric] for run in runs if metric in run[group]]):
        return ""
    values = [entry["value"] for entry in found]
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    low, high = np.mean([entry["interval"] for entry in found], axis=0)
    if interval and low < high:
        text += f" [{low:.2f}, {high:.2f}]"
    return text.replace("-0.00", "0.00")

ORDER = [(metric, group) for metric in ("voc", "ranking_accuracy_within")
         for group in ("seen", "unseen")]
ORDER_TITLES = ["objective", "VOC, seen tasks", "VOC, unseen tasks",
                "ranking accuracy, seen", "ranking accuracy, unseen"]

def short_table(runs, shown) -> str:
    """The objectives of the paper and the controls."""
    return markdown(ORDER_TITLES, [
        [label(row, "`"), *(cell(runs[row, shown[row]], group, metric, False)
                            for metric, group in ORDER)] for row in SHORT if row in shown])

def comparison_table(runs, shown) -> str:
    """Order in videos by every objective, by VOC on unseen tasks. ↓: worse than triplet over the
    tasks of that column (p < .05). Bold: better, and triplet where it beats every rival."""
    marks = {}
    for metric, group in ORDER:
        some = runs["triplet", shown["triplet"]][0]["tasks"]
        tasks = sorted(task for task in some
                       if metric in some[task] and vlmrm.group_of(task) == group)
        scores = {row: np.mean([[run["tasks"][task][metric] for task in tasks]
                                for run in runs[row, setting]], axis=0)
                  for row, setting in shown.items() if is_rival(row)}
        p = paired_p_values(scores, "triplet")
        for row in p:
            sign = "↓" if (scores[row] - scores["triplet"]).mean() < 0 else "↑"
            marks[row, metric, group] = sign if p[row] < 0.05 else ""
        if all(marks[row, metric, group] == "↓" for row in p):
            marks["triplet", metric, group] = "↑"
    rows = []
    for row, setting in shown.items():
        cells = [label(row, "`")]
        for metric, group in ORDER:
            mark = marks.get((row, metric, group), "")
            text = cell(runs[row, setting], group, metric)
            cells.append(f"**{text}**" if mark == "↑" else f"{text} {mark}".strip())
        rows.append(cells)
    return markdown(ORDER_TITLES, rows)

def more_table(runs, shown) -> str:
    """What else each objective does, in the order of comparison_table()."""
    columns = {
        "ranking across, unseen": ("unseen", "ranking_accuracy_across"),
        "VOC under paraphrases, seen": ("seen", "voc_paraphrase"),
        "unseen": ("unseen", "voc_paraphrase"),
        "VOC by goal images, unseen": ("unseen", "goal_voc"),
        "VOC minus VOC of opposite, unseen": ("unseen", "opposite_gap"),
        "retrieval top 1, seen": ("seen", "retrieval_top1")}
    return markdown(["objective", *columns, "official constants: VOC, seen", "unseen"], [
        [label(row, "`"), *(cell(runs[row, setting], group, metric, False)
                            for group, metric in columns.values()),
         *(cell(runs.get((row, "official"), []) if setting == "tuned" else [], group, "voc", False)
           for group in ("seen", "unseen"))] for row, setting in shown.items()])

def metrics_table(runs, shown) -> str:
    """Every metric, before training and after training with triplet."""
    columns = [(runs[row, shown[row]], group) for group in ("seen", "unseen")
               for row in ("zeroshot", "triplet")]
    return markdown(["", "seen tasks: before", "triplet", "unseen tasks: before", "triplet"], [
        [text, *(cell(some, group, metric, False) for some, group in columns)]
        for metric, text in [*((metric, text) for metric, (text, _) in vlmrm.METRICS.items()),
                             ("epic", "EPIC distance (0 is best)")]
        if metric in columns[0][0][0]["seen"]])

def over_tasks(scores: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % t interval over tasks."""
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
    return "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(
        scores.mean(), scores.mean() - half, scores.mean() + half, s=sign).replace("-0.00", "0.00")

def folds_table(found: dict) -> str:
    """Unseen tasks of all folds of data/study.py, and by how much triplet beats its rivals."""
    columns = {row: {metric: np.array([scores[metric] for fold in folds
                                       for _, scores in sorted(fold.items()) if metric in scores])
                     for metric in ("voc", "ranking_accuracy_within")}
               for row, folds in found.items()}
    tested = [row for row in found if is_rival(row) or row in ("thumbnail", "distance-from-start")]
    p = paired_p_values({row: columns[row]["voc"] for row in tested}, "triplet")
    rows = []
    for row in sorted(columns, key=lambda row: (is_baseline(row), -columns[row]["voc"].mean())):
        gain = columns["triplet"]["voc"] - columns[row]["voc"]
        rows.append([
            label(row, "`"), *map(over_tasks, columns[row].values()),
            *([over_tasks(gain, "+"), f"{p[row]:.3f}", f"{(gain > 0).sum()} of {len(gain)}"]
              if row in p else [""] * 3)])
    return markdown(["objective", "VOC", "ranking within", "VOC: triplet minus it", "p",
                     "tasks won"], rows)

def benchmark_table(found: dict) -> str:
    """What data/benchmark.py measured."""
    def row(text: str, rates: dict, suffix: str = "") -> list[str]:
        others = (rates.get(other + suffix) for other in ("textbook", "bare"))
        ours = rates["ours" + suffix]
        return [text, f"{ours:.0f}", *(
            f"{other:.0f} ({ours / other:.2f})" if other else "" for other in others)]

    return markdown(["frames/s", "ours", "textbook (ours / it)", "limit (ours / it)"], [
        row("collection on one core: simulated, drawn, packed", found["collection"]),
        row("collection, 24 kept of an episode's 150", found["collection"], "_24_of_150"),
        row("training step", found["training"]), row("evaluation", found["evaluation"])])

def tables(root: Path) -> dict[str, str]:
    """All tables, by the names of the marks they stand between."""
    runs, shown = load(root)
    found = {name: table(runs, shown) for name, table in {
        "short": short_table, "comparison": comparison_table, "more": more_table,
        "metrics": metrics_table}.items()}
    return found | {name: table(vlmrm.read_json(root / f"{name}.json")) for name, table in {
        "folds": folds_table, "benchmark": benchmark_table}.items()}

def fill(page: str, root: Path) -> str:
    """A page with the tables between <!-- name --> and <!-- end of name --> made anew."""
    for name, table in tables(root).items():
        page = re.sub(rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- end of {name} -->)",
                      lambda marks: marks[1] + table + "\n" + marks[2], page, flags=re.DOTALL)
    return page

# -----------------------------------------------------------------------------
# Pictures of the study

def draw_heat_map(runs, shown, path: Path) -> None:
    """VOC of every task under every objective whose runs tell it by task."""
    some = runs["triplet", shown["triplet"]][0]["tasks"]
    tasks = sorted((task for task in some if "voc" in some[task]),
                   key=lambda task: (task not in vlmrm.UNSEEN_TASKS, task))
    rows = [row for row in shown if set(runs[row, shown[row]][0]["tasks"]) >= set(tasks)]
    voc = np.array([[np.mean([run["tasks"][task]["voc"] for run in runs[row, shown[row]]])
                     for row in rows] for task in tasks])
    axis = (figure := Figure(figsize=(12, 14.5), layout="constrained")).subplots()
    image = axis.imshow(voc, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(voc):
        axis.text(x, y, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center",
                  fontsize=10, color="white" if abs(value) > 0.6 else "black")
    axis.axhline(sum(task in vlmrm.UNSEEN_TASKS for task in tasks) - 0.5, color="black", lw=2)
    axis.set_yticks(range(len(tasks)), [task.removesuffix("-v3") for task in tasks], fontsize=10)
    axis.set_xticks(range(len(rows)), map(label, rows), rotation=55, ha="left", fontsize=11)
    axis.xaxis.tick_top()
    axis.set_title("VOC by task and objective; above the line: tasks never trained on", loc="left")
    figure.colorbar(image, shrink=0.3, label="VOC")
    vlmrm.write_whole(path, figure)

# -----------------------------------------------------------------------------
# looks.png: what each loss takes from a batch of two videos. Nodes: o0 to o4 are the frames of a
# video, p0 to p4 those of another, l and m their sentences. A "goal" is a ring around a node.

EDGES = {"pull": ("#2a9d5c", "-", "pull together"), "push": (UNSEEN, (0, (2, 2)), "push apart"),
         "rise": (SEEN, "-", "the score must rise"),
         "goal": ("#e9a23b", "-", "what scores are measured against")}
LOOKS = {  # objective: what it wants, and its edges, (kind, from, to)
    "triplet": ("of two frames the later wins under l, by a margin", [
        *[("rise", f"o{i}", f"o{j}") for j in range(5) for i in range(j)], ("goal", "l", "l")]),
    "tcn": ("neighbours in time close, the rest far; no sentence", [
        ("pull", "o4", "o3"), ("pull", "o3", "o1"), ("push", "o4", "o1"), ("push", "o4", "p4"),
        ("push", "o1", "p1")]),
    "r3m": ("tcn, and under l later beats earlier and others", [
        ("rise", "o0", "o4"), ("rise", "o1", "o3"), ("rise", "o3", "o4"), ("push", "l", "p4"),
        ("push", "l", "p3"), ("goal", "l", "l")]),
    "vip": ("nearer to the goal image by one step; no sentence", [
        ("pull", "o0", "o4"), ("rise", "o1", "o2"), ("rise", "p1", "p2"), ("goal", "o4", "o4")]),
    "liv": ("vip, and the end finds its sentence", [
        ("pull", "o0", "o4"), ("rise", "o1", "o2"), ("goal", "o4", "o4"), ("pull", "o4", "l"),
        ("push", "o4", "m"), ("push", "p4", "l")]),
    "clip": ("every frame finds its sentence", [
        *[("pull", f"o{k}", "l") for k in range(5)], ("push", "o2", "m"), ("push", "p2", "l")]),
}
TIMES = (0.04, 0.36, 0.46, 0.72, 0.97)  # of the five frames, as shares of the episode

def draw_batch(axis, data, sentences: dict) -> None:
    """Two videos of a batch: five frames on a time line each, and their sentences."""
    axis.set(xlim=(-0.06, 1.5), ylim=(-0.75, 1.65))
    axis.set_axis_off()
    for y, task in ((1.0, "drawer-close-v3"), (0.0, "button-press-wall-v3")):
        frames = data.frames(data.select(task=task, source="expert")[0])
        axis.plot([0, 1.05], [y - 0.42] * 2, color="0.6", lw=1)
        for k, t in enumerate(TIMES):
            x = t + {1: -0.035, 2: 0.035}.get(k, 0)  # neighbours in time would overlap
            axis.imshow(frames[round(t * (data.T - 1))], aspect="auto", zorder=3,
                        extent=(x - 0.048, x + 0.048, y - 0.34, y + 0.36))
            axis.plot([t, x], [y - 0.42, y - 0.34], color="0.6", lw=1)
            axis.plot(t, y - 0.42, "o", color="black", ms=4)
            if y:
                axis.text(x, 1.42, ("start", "now", "next", "later", "end")[k], ha="center")
        axis.text(1.09, y, f"“{sentences[task]['instruction']}”", fontsize=12, style="italic")
        axis.text(1.09, y - 0.3, "l, its instruction" if y else "l', that of another video")
    for k, (color, style, text) in enumerate(EDGES.values()):
        axis.plot([0.02 + 0.3 * k, 0.06 + 0.3 * k], [-0.66] * 2, color=color, ls=style, lw=2.4)
        axis.text(0.07 + 0.3 * k, -0.66, text, va="center", fontsize=10)

def draw_edges(axis, name: str, caption: str, edges: list) -> None:
    """What one objective takes from the batch: its edges between frames and sentences."""
    place = {letter + str(k): (t, y) for letter, y in (("o", 1.0), ("p", 0.0))
             for k, t in enumerate(TIMES)} | {"l": (1.22, 1.0), "m": (1.22, 0.0)}
    axis.set(xlim=(-0.06, 1.4), ylim=(-0.3, 2.2))
    axis.set_axis_off()
    axis.text(-0.03, 2.05, name, fontsize=11.5, fontweight="bold")
    axis.text(-0.03, 1.72, caption, fontsize=9, color="0.3")
    for y in (0, 1):
        axis.plot([0, 1.05], [y] * 2, color="0.88", lw=5, zorder=0, solid_capstyle="round")
    used = {node for _, *ends in edges for node in ends}
    for node, (x, y) in place.items():
        color = "black" if node in used else "0.75"
        if node in "lm":
            axis.text(x, y, {"l": "l", "m": "l'"}[node], ha="center", va="center", style="italic",
                      size=13, color=color, bbox={"boxstyle": "round", "fc": "white", "ec": color})
        else:
            axis.plot(x, y, "o", color=color, ms=6, zorder=4)
    for kind, a, b in edges:
        color, style, _ = EDGES[kind]
        (xa, ya), (xb, yb) = place[a], place[b]
        if kind == "goal":
            axis.plot(xa, ya, "o", ms=21, mfc="none", mec=color, mew=2.2)
            continue
        # Arcs along one time line, the longer the higher; straight from line to line.
        bend = np.sign(xa - xb) * min(0.6, 0.08 / abs(xb - xa) + 0.19) if ya == yb else 0.0
        axis.add_patch(FancyArrowPatch(
            (xa, ya), (xb, yb), connectionstyle=f"arc3,rad={bend}", color=color, lw=1.5,
            linestyle=style, shrinkA=4, shrinkB=4 if b not in "lm" else 10, mutation_scale=8,
            arrowstyle="-|>" if kind == "rise" else "-", zorder=3))

def draw_looks(data, sentences: dict, path: Path) -> None:
    """One batch on its time line, and what each objective takes from it."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[1.6, 1, 1])
    draw_batch(figure.add_subplot(grid[0, :]), data, sentences)
    for k, (name, (caption, edges)) in enumerate(LOOKS.items()):
        draw_edges(figure.add_subplot(grid[1 + k // 3, k % 3]), name, caption, edges)
    vlmrm.write_whole(path, figure)

def draw_all(root: Path) -> None:
    """All pictures of the results in a folder."""
    (runs, shown), rewards = load(root), np.load(root / "rewards.npz")
    data = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    sentences = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    with tempfile.TemporaryDirectory() as folder:
        vlmrm.compare({label(row): runs[row, shown[row]] for row in shown}, Path(folder))
        shutil.copy(Path(folder, "comparison.png"), root)
    draw_heat_map(runs, shown, root / "heatmap.png")
    draw_looks(data, sentences, root / "looks.png")
    predicted = dict(zip(rewards["triplet/episodes"].tolist(), rewards["triplet/predicted"]))
    vlmrm.draw_curves({"predicted": predicted}, data, sentences, root / "curves.png")

if __name__ == "__main__":
    draw_all(HERE / "results")
    for page in (HERE.parent / "README.md", HERE / "results" / "README.md"):
        page.write_text(fill(page.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
