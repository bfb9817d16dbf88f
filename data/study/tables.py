"""Tables and pictures of data/results. It stays beside vlmrm.py so that no figure in the README is
typed by hand; what a run itself prints and draws needs no other program.

    python data/report.py     draw the pictures again, fill the tables of README.md and of
                              data/results/README.md, between <!-- name --> and <!-- end of name -->
"""
import functools
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import vlmrm  # before torch: see there

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from study import FIRST, WAYS, all_objectives, paired_p_values

SEEN, UNSEEN = "#30638e", "#c8384e"
SHORT = ("triplet", "tcn", "r3m", "vip", "liv", "anchored",  # the paper's five, ours, controls
         "triplet, all weights", "anchored, all weights",
         "thumbnail", "distance-from-start", "clock", "zeroshot")

# -----------------------------------------------------------------------------
# Reading the results

def load(root: Path) -> dict[str, dict[str, list]]:
    """The runs of the study, {row: {way of fine-tuning: [run of each seed]}}, by VOC on unseen
    tasks in the first way."""
    runs = {}
    for result in json.loads((root / "results.json").read_text(encoding="utf-8")):
        runs.setdefault(result["row"], {}).setdefault(result["way"], []).append(result)
    return {row: runs[row] for row in sorted(runs, key=lambda row: (
        is_baseline(row), -mean(runs[row][FIRST], "unseen")))}

@functools.cache
def remark_of(row: str) -> str:
    """Why a row is no rival like the others, as its objective tells; "" if it is one."""
    name, _, way = row.partition(", ")
    row = name if way in WAYS else row
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
    """A Markdown table, without minus before a zero. The first title may be empty."""
    head, *lines = ["| " + " | ".join(cells).lstrip() + " |" for cells in (titles, *rows)]
    return "\n".join([head, "|" + " --- |" * len(titles), *lines]).replace("-0.00", "0.00")

def cell(runs: list[dict], group: str, metric: str) -> str:
    """Mean ± std over seeds."""
    if not (found := [run[group][metric]["value"] for run in runs if metric in run[group]]):
        return ""
    spread = f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
    return f"{np.mean(found):.2f}{spread}"

SAME, WITHIN = "ranking_accuracy_same_time", "ranking_accuracy_within"
ORDER = {("voc", "seen"): "VOC, seen tasks", ("voc", "unseen"): "VOC, unseen tasks",
         (SAME, "seen"): "ranking at the same time, seen",
         (SAME, "unseen"): "ranking at the same time, unseen"}

def short_table(runs: dict) -> str:
    """The paper's objectives, ours and the controls, trained as by default unless it is said."""
    columns = ORDER | {("opposite_gap", "unseen"): "VOC minus that of the opposite, 7 unseen"}
    rows = []
    for name in SHORT:
        row, _, way = name.partition(", ")
        rows.append([label(row, "`") + f", {way}" * bool(way), *(
            cell(runs[row][way or FIRST], group, metric) for metric, group in columns)])
    return markdown(["objective", *columns.values()], rows)

def by_ways(titles) -> list[str]:
    return [f"{title}: {way}" for title in titles for way in WAYS]

def versus_triplet(runs: dict, way: str, metric: str, group: str) -> dict[str, str]:
    """{row: "↓" or "↑"} where a row differs from triplet over the tasks, p < .05. Triplet gets "↑"
    if it beats every rival."""
    some = runs["triplet"][way][0]["tasks"]
    tasks = [task for task in some if metric in some[task] and vlmrm.group_of(task) == group]
    scores = {row: np.mean([[run["tasks"][task][metric] for task in tasks]
                            for run in by_way[way]], axis=0)
              for row, by_way in runs.items() if is_rival(row)}
    marks = {row: "↑" if (scores[row] - scores["triplet"]).mean() > 0 else "↓"
             for row, p in paired_p_values(scores, "triplet").items() if p < 0.05}
    return marks | ({"triplet": "↑"} if [*marks.values()] == ["↓"] * (len(scores) - 1) else {})

def comparison_table(runs: dict) -> str:
    """Order in videos by every objective, in both ways of fine-tuning, by VOC on unseen tasks."""
    columns = [(*column, way) for column in ORDER for way in WAYS]
    marks = {(metric, group, way): versus_triplet(runs, way, metric, group)
             for metric, group, way in columns}
    rows = []
    for row, by_way in runs.items():
        rows.append([label(row, "`")])
        for metric, group, way in columns:
            text = cell(by_way.get(way, []), group, metric)
            mark = marks[metric, group, way].get(row, "")
            rows[-1].append(f"**{text}**" if mark == "↑" else f"{text} {mark}".strip())
    return markdown(["objective", *by_ways(ORDER.values())], rows)

def reading_table(runs: dict) -> str:
    """What is left of reading, on unseen tasks, in both ways of fine-tuning."""
    columns = {"opposite_gap": "VOC minus VOC of the opposite (7 tasks)",
               "success_auroc": "success (AUROC)", "retrieval_top1": "retrieval",
               "voc_paraphrase": "VOC, paraphrased"}
    rows = [row for row in runs if row not in ("clock", "distance-from-start")]  # know no sentence
    return markdown(["objective", *by_ways(columns.values())], [
        [label(row, "`"), *(cell(runs[row].get(way, []), "unseen", metric)
                            for metric in columns for way in WAYS)] for row in rows])

def more_table(runs: dict) -> str:
    """What else each objective does, trained as by default."""
    columns = {
        "ranking within, seen": ("seen", WITHIN), "unseen": ("unseen", WITHIN),
        "ranking across, unseen": ("unseen", "ranking_accuracy_across"),
        "VOC paraphrased, seen": ("seen", "voc_paraphrase"),
        "VOC by goal images, unseen": ("unseen", "goal_voc"),
        "failures seen, unseen": ("unseen", "failures_seen"),
        "retrieval, seen": ("seen", "retrieval_top1"),
        "EPIC distance, unseen (0 is best)": ("unseen", "epic")}
    return markdown(["objective", *columns], [
        [label(row, "`"), *(cell(by_way[FIRST], group, metric)
                            for group, metric in columns.values())]
        for row, by_way in runs.items()])

def metrics_table(runs: dict) -> str:
    """Every metric, before training and after training with triplet."""
    columns = [(runs[row][way], group) for group in ("seen", "unseen")
               for row, way in (("zeroshot", FIRST), *(("triplet", way) for way in WAYS))]
    return markdown(["", "seen tasks: before", *by_ways(["triplet"]), "unseen tasks: before",
                     *by_ways(["triplet"])], [
        [text, *(cell(some, group, metric) for some, group in columns)]
        for metric, (text, _) in vlmrm.METRICS.items()])

def over_tasks(scores: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % t interval over tasks."""
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
    return "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(
        scores.mean(), scores.mean() - half, scores.mean() + half, s=sign)

def folds_table(found: dict, reference: str = "triplet") -> str:
    """Unseen tasks of all folds of data/study.py, and by how much the reference beats the rest."""
    columns = {row: {metric: np.array([scores[metric] for fold in folds
                                       for _, scores in sorted(fold.items()) if metric in scores])
                     for metric in ("voc", SAME, WITHIN, "opposite_gap")}
               for row, folds in found.items()}
    tested = [row for row in found if is_rival(row) or row in ("thumbnail", "distance-from-start")]
    p = {metric: paired_p_values({row: columns[row][metric] for row in tested}, reference)
         for metric in ("voc", SAME)}
    rows = []
    for row in sorted(columns, key=lambda row: (is_baseline(row), -columns[row]["voc"].mean())):
        rows.append([label(row, "`"), *(
            f"{scores.mean():.2f}" for scores in columns[row].values())])
        for metric in p:
            gain = columns[reference][metric] - columns[row][metric]
            rows[-1] += [over_tasks(gain, "+"), f"{p[metric][row]:.3f}"] if row in p[metric] else [
                "", ""]
    return markdown(["objective", "VOC", "ranking at the same time", "ranking within",
                     "opposite gap (18 tasks)", f"VOC: {reference} minus it", "p",
                     f"same time: {reference} minus it", "p"], rows)

def kept_reading(scores: dict, start: dict) -> bool:
    """The rule of the hunt, which data/results/README.md tells of."""
    return (scores["opposite_gap"] >= 0.8 * start["opposite_gap"]
            and scores["success_auroc"] >= 0.75)

def hunt_score(scores: dict) -> float:
    return (scores["voc"] + 2 * scores[SAME] - 1) / 2

def hunt_table(found: dict) -> str:
    """Of every candidate the best setting that keeps reading, or else the best of all."""
    [start], rows = found["start"].values(), []
    for candidate, settings in found.items():
        name, scores = max(settings.items(), key=lambda item: (
            kept_reading(item[1], start), hunt_score(item[1])))
        rows.append((hunt_score(scores), [
            f"`{candidate}`", name, "yes" if kept_reading(scores, start) else "no",
            *(f"{value:.2f}" for value in scores.values())]))
    return markdown(["candidate", "its best setting", "keeps", "VOC", "same time", "within",
                     "opposite gap", "success (AUROC)", "retrieval", "VOC, paraphrased"],
                    [row for _, row in sorted(rows, reverse=True)])

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

def seconds_table(found: dict) -> str:
    """How long the default run takes."""
    return markdown(["the default run", "seconds"], [
        [text, f"{np.median(seconds):.0f}"] for text, seconds in (
            ("as it is, seeds 0, 1, 2", found["default"]["wall_seconds"]),
            ("of these until VOC on validation experts is .90", found["reach"]),
            ("one process with two threads", found["many"]["one"]),
            ("two processes with one thread each", found["many"]["two"]))])

def gpu_table(found: dict) -> str:
    """Training steps of real architectures."""
    return markdown(["random weights, LoRA of rank 8, 224 pixels", "frames/s", "share of the peak",
                     "GB"], [
        [name, f"{cells['frames']:.0f}", f"{cells['share']:.2f}", f"{cells['gigabytes']:.1f}"]
        for name, cells in found.items() if isinstance(cells, dict)])

def outcomes(found: dict, groups=("seen", "unseen")) -> dict[str, np.ndarray]:
    """{row: what data/policy.py found (tasks, seeds, 2)} for the tasks of some groups."""
    rows = {}
    for job, cells in found["jobs"].items():
        task, _, _ = job.partition(", ")
        for row, pair in cells.items() if vlmrm.group_of(task) in groups else ():
            rows.setdefault(row, {}).setdefault(task, []).append(pair)
    return {row: np.array([*by_task.values()]) for row, by_task in rows.items()}

def policy_table(found: dict) -> str:
    """Success of policies by what weighed their episodes, mean ± std over seeds, the share that is
    of the way from all alike to the simulator's reward, and p over all tasks."""
    titles, lines = ["weights from"], {row: [] for row in outcomes(found)}
    for group in ("seen", "unseen"):
        if some := {row: pairs[..., 0] for row, pairs in outcomes(found, [group]).items()}:
            low, high = (some[row].mean() for row in ("all alike", "the simulator's reward"))
            titles += [f"success, {len(some['all alike'])} {group} tasks", "share of the way"]
            for row, won in some.items():
                spread = f" ± {won.mean(0).std(ddof=1):.2f}" if won.shape[1] > 1 else ""
                lines[row] += [f"{won.mean():.2f}{spread}",
                               f"{(won.mean() - low) / (high - low):.2f}" if high > low else ""]
    if "zeroshot" in found["metrics"]:
        titles.append("p, against `zeroshot`")
        p = paired_p_values({row: pairs[..., 0].mean(1) for row, pairs in outcomes(found).items()
                             if row in found["metrics"]}, "zeroshot")
        for row in lines:
            lines[row].append(f"{p[row]:.3f}" if row in p else "")
    return markdown(titles, [[row, *lines[row]] for row in sorted(
        lines, key=lambda row: (row not in found["metrics"], lines[row]), reverse=True)])

FINDS = "an episode that ends in success beats another (AUROC), these episodes"

def by_model(found: dict) -> tuple[list[float], dict[str, list[float]]]:
    """Mean success of the policy of each reward model, and {metric: its means over tasks}."""
    some, metrics = outcomes(found), {}
    for metric, (text, _) in vlmrm.METRICS.items():
        values = [[scores[metric] for scores in tasks.values() if metric in scores]
                  for tasks in found["metrics"].values()]
        metrics |= {text: [*map(np.mean, values)]} if all(values) else {}
    success, metrics[FINDS] = ([some[row][..., k].mean() for row in found["metrics"]]
                               for k in (0, 1))
    return success, metrics

def believe_table(found: dict) -> str:
    """Does a metric rank reward models as the success of their policies does? All of them, and
    those alone that are trained, on the tower."""
    every = [*found["metrics"]]
    rivals = [row for row in every if is_rival(row)]
    titles, columns = ["Spearman's correlation with success, means over these tasks"], []
    for rows in (every, rivals) if len(rivals) > 2 else (every,):
        titles += [f"{len(rows)} models", "p"]
        success, metrics = by_model(found | {"metrics": {
            row: found["metrics"][row] for row in rows}})
        columns.append({text: scipy.stats.spearmanr(success, metrics[text]) for text in metrics})
    return markdown(titles, [
        [text, *(f"{number:.{digits}f}" for column in columns
                 for number, digits in zip(column[text], (2, 3)))]
        for text in sorted(columns[0], key=lambda text: -columns[0][text].statistic)])

def tables(root: Path) -> dict[str, str]:
    """All tables, by the names of the marks they stand between."""
    runs, (folds, hunt, benchmark, policy) = load(root), (vlmrm.read_json(
        root / f"{name}.json") for name in ("folds", "hunt", "benchmark", "policy"))
    return {
        "short": short_table(runs), "comparison": comparison_table(runs),
        "reading": reading_table(runs), "more": more_table(runs), "metrics": metrics_table(runs),
        "folds": folds_table(folds), "ours": folds_table(folds, "anchored, all weights"),
        "hunt": hunt_table(hunt), "benchmark": benchmark_table(benchmark),
        "seconds": seconds_table(benchmark), "gpu": gpu_table(benchmark["gpu"]),
        "policy": policy_table(policy), "believe": believe_table(policy)}

def fill(page: str, root: Path) -> str:
    """A page with the tables between <!-- name --> and <!-- end of name --> made anew."""
    for name, table in tables(root).items():
        page = re.sub(rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- end of {name} -->)",
                      lambda marks: marks[1] + table + "\n" + marks[2], page, flags=re.DOTALL)
    return page

# -----------------------------------------------------------------------------
# Pictures of the study

def draw_heat_map(runs: dict, path: Path) -> None:
    """VOC of every task under every objective."""
    some = runs["triplet"][FIRST][0]["tasks"]
    tasks = sorted((task for task in some if "voc" in some[task]),
                   key=lambda task: (task not in vlmrm.UNSEEN_TASKS, task))
    voc = np.array([[np.mean([run["tasks"][task]["voc"] for run in by_way[FIRST]])
                     for by_way in runs.values()] for task in tasks])
    axis = (figure := Figure(figsize=(12, 14.5), layout="constrained")).subplots()
    image = axis.imshow(voc, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(voc):
        axis.text(x, y, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center",
                  fontsize=10, color="white" if abs(value) > 0.6 else "black")
    axis.axhline(sum(task in vlmrm.UNSEEN_TASKS for task in tasks) - 0.5, color="black", lw=2)
    axis.set_yticks(range(len(tasks)), [task.removesuffix("-v3") for task in tasks], fontsize=10)
    axis.set_xticks(range(len(runs)), map(label, runs), rotation=55, ha="left", fontsize=11)
    axis.xaxis.tick_top()
    axis.set_title("VOC by task and objective; above the line: tasks never trained on", loc="left")
    figure.colorbar(image, shrink=0.3, label="VOC")
    vlmrm.write_whole(path, figure)

def draw_kept(runs: dict, reading: dict, data, path: Path) -> None:
    """Order against reading on unseen tasks, from the start to the end of each fine-tuning; and
    what becomes of door-open, which is unseen, under its sentence and the opposite one."""
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 2))
    for axis, metric in zip(left.subplots(1, 2), ("voc", SAME)):
        place = lambda some: [mean(some, "unseen", name) for name in ("opposite_gap", metric)]
        start = place(runs["zeroshot"][FIRST])
        for k, row in enumerate(row for row in runs if remark_of(row) in ("", "privileged")):
            line = [start, *([some["opposite_gap"], some[metric]]
                             for some in reading["between"][row].values()),
                    place(runs[row][FIRST][:1])]  # of the first seed; the mark is the mean
            axis.plot(*zip(*line), color=f"C{k % 10}", lw=1, alpha=0.4)
            for way, mark in zip(runs[row], "oD"):
                axis.plot(*(end := place(runs[row][way])), mark, color=f"C{k % 10}")
                axis.annotate(row, end, xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.plot(*start, "*", color="black", ms=18)
        axis.set(xlabel="reading: VOC minus VOC of the opposite instruction",
                 title=f"{vlmrm.METRICS[metric][0]}, unseen tasks")
    doors = sorted(reading["door"].items(), reverse=True)  # zeroshot first
    axes = right.subplots(len(doors) + 1, 1, height_ratios=(1, *[2] * len(doors)))
    frames = data.frames(data.select(task="door-open-v3", source="expert", split="test")[0])
    axes[0].imshow(np.concatenate(frames[np.linspace(0, data.T - 1, 6).astype(int)], axis=1))
    axes[0].set_axis_off()
    for axis, (title, curves) in zip(axes[1:], doors):
        for (text, rewards), color in zip(curves.items(), (SEEN, UNSEEN)):
            axis.plot(rewards, color=color, label=text)
        axis.set_title("the start" if title.startswith("zeroshot") else title, fontsize=10)
    axes[1].legend(fontsize=8)
    vlmrm.write_whole(path, figure)

def draw_frontier(found: dict, path: Path) -> None:
    """Order against reading: every setting of the hunt."""
    axis = (figure := Figure(figsize=(9, 6), layout="constrained")).subplots()
    families = {"start": ("*", "black", 18), "triplet": ("o", UNSEEN, 8),
                "hop, features, directions": ("o", "#2a9d5c", 9), "captions": ("o", SEEN, 5),
                "WiSE-FT": ("D", "#e9a23b", 6), "": (".", "0.7", 8)}
    for candidate, settings in found.items():
        mark, color, size = next(
            look for name, look in families.items() if candidate.startswith(name))
        axis.plot([scores["opposite_gap"] for scores in settings.values()],
                  [hunt_score(scores) for scores in settings.values()], mark, color=color, ms=size)
    for family, (mark, color, size) in families.items():
        axis.plot([], [], mark, color=color, ms=size, label=family or "others")
    [start] = found["start"].values()
    axis.axvline(0.8 * start["opposite_gap"], color="0.8", zorder=0)
    axis.set(xlabel="reading: VOC minus VOC of the opposite (the line: 80 % of the start's)",
             ylabel="order: mean of VOC and 2 RA - 1 at the same time")
    axis.legend()
    vlmrm.write_whole(path, figure)

def draw_policies(found: dict, path: Path) -> None:
    """Success of policies against some metrics of the reward models that weighed their episodes."""
    figure, (success, metrics) = Figure(figsize=(13, 11.5), layout="constrained"), by_model(found)
    shown = [text for text in (*(vlmrm.METRICS[metric][0] for metric in (
        "voc", SAME, "success_auroc")), FINDS) if text in metrics]
    for axis, text in zip(figure.subplots(2, 2).ravel(), shown):
        axis.plot(metrics[text], success, "o", color=SEEN)
        height = 0.0
        for *place, row in sorted(zip(success, metrics[text], found["metrics"])):
            height = max(place[0], height + 0.017)  # no name lies on another
            axis.annotate(row, place[::-1], xytext=(1.02, height), fontsize=8, va="center",
                          textcoords=("axes fraction", "data"), arrowprops={
                              "arrowstyle": "-", "color": "0.8", "lw": 0.6, "relpos": (0, 0.5)})
        for row in set(outcomes(found)) - set(found["metrics"]):  # no model's weights
            level = outcomes(found)[row][..., 0].mean()
            axis.axhline(level, color="0.7", ls=":")
            axis.annotate(row, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8)
        axis.set(xlabel=text, ylabel="success of the cloned policy, mean over tasks")
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
    "anchored": ("steps of the right size, along l and not l'; near the start", [
        ("rise", "o0", "o1"), ("rise", "o1", "o3"), ("rise", "o3", "o4"), ("goal", "l", "l"),
        ("push", "o4", "m")]),
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
    runs, rewards = load(root), np.load(root / "rewards.npz")
    data = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    sentences = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    vlmrm.compare({label(row): by_way[FIRST] for row, by_way in runs.items()}, root)
    (root / "table.md").unlink()  # the page has a longer one
    draw_heat_map(runs, root / "heatmap.png")
    draw_kept(runs, vlmrm.read_json(root / "reading.json"), data, root / "kept.png")
    draw_looks(data, sentences, root / "looks.png")
    draw_frontier(vlmrm.read_json(root / "hunt.json"), root / "frontier.png")
    draw_policies(vlmrm.read_json(root / "policy.json"), root / "policy.png")
    predicted = dict(zip(rewards["triplet/episodes"].tolist(), rewards["triplet/predicted"]))
    vlmrm.draw_curves({"predicted": predicted}, data, sentences, root / "curves.png")

if __name__ == "__main__":
    draw_all(HERE / "results")
    for page in (HERE.parent / "README.md", HERE / "results" / "README.md"):
        page.write_text(fill(page.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
