"""The pictures of a run and of the study, and the study's table. Draws what vlmrm.py has computed.

    python data/report.py       draw the figures of data/results/ again, fill the README's tables

vlmrm.py calls draw_curves() for each run, tables() and draw_all() for the study.
"""
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.figure import Figure  # without pyplot: no window opens by mistake
from matplotlib.patches import FancyArrowPatch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # noqa: E402  (it lies one folder up)

SEEN, UNSEEN, GREY = "#30638e", "#c8384e", "0.55"


METRICS = {  # the names in the table, and the value of a model that knows nothing (of 50 sentences)
    "own_voc": ("VOC of its own reward", 0.0),
    "own_ranking_accuracy_within": ("ranking within, its own reward", 0.5),
    "voc": ("VOC, expert episodes", 0.0),
    "voc_paraphrase": ("VOC under unseen paraphrases", 0.0),
    "ranking_accuracy_within": ("ranking accuracy, within", 0.5),
    "ranking_accuracy_across": ("ranking accuracy, across", 0.5),
    "epic": ("EPIC distance (0 is best)", 0.71),
    "success_auroc": ("success AUROC", 0.5),
    "retrieval_top1": ("instruction retrieval, top 1", 0.02),
    "retrieval_top5": ("instruction retrieval, top 5", 0.1),
    "antonym": ("VOC minus VOC of opposite", 0.0),
    "goal_voc": ("VOC by goal images", 0.0),
    "goal_ranking_accuracy_within": ("ranking within, by goal images", 0.5),
}


def format_report(report: dict, sentences: int) -> str:
    """The table for the terminal: every metric, seen and unseen, then best and worst tasks. Of so
    many sentences an instruction was to be retrieved."""
    lines = [f"{'':32}{'seen tasks':>22}{'unseen tasks':>22}{'chance':>8}"]
    for metric, (text, chance) in METRICS.items():
        if metric.startswith("own_") and metric not in report["unseen"] | report["seen"]:
            continue
        if metric.startswith("retrieval"):
            chance = min(1, 50 * chance / sentences)
        cells = ""
        for group in ("seen", "unseen"):
            found = report[group].get(metric)
            cells += "{:>22}".format("-" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(
                found["value"], *found["interval"]))
        lines.append(f"{text:32}{cells}{chance:>8.2f}")
    lines.append("intervals: 95 %, bootstrap over the test episodes of each task, for these tasks "
                 "and this seed; -: there are no such episodes")
    for group in ("seen", "unseen"):
        ranked = sorted(((scores["voc"], task) for task, scores in report["tasks"].items()
                         if vlmrm.group_of(task) == group and "voc" in scores), reverse=True)
        for title, some in (("best", ranked[:3]), ("worst", ranked[-3:])):
            lines.append(f"{title:5} VOC, {group:6}  " + ("   ".join(
                f"{task.removesuffix('-v3')} {voc:.2f}" for voc, task in some) or "-"))
    return "\n".join(lines)


def choose_episodes(data: vlmrm.Dataset, test: np.ndarray) -> list[int]:
    """Positions in `test` of up to four episodes: seen and unseen task, expert and failed attempt.

    The choice looks at the data alone: no model is flattered, and two runs show the same episodes.
    """
    chosen = []
    unseen = np.isin(data.task[test], vlmrm.UNSEEN_TASKS)
    expert = data.source[test] == "expert"
    failed = ~expert & ~data.success[test].any(1) & (np.ptp(data.rewards[test], axis=1) > 1)
    for kind in (~unseen & expert, unseen & expert, ~unseen & failed, unseen & failed):
        if len(candidates := np.flatnonzero(kind)):
            chosen.append(candidates[len(candidates) // 2])
    return chosen


def film_strip(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` of the frames (T, S, S, 3), evenly spaced, side by side with a white gap."""
    shown = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    framed = np.pad(shown, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=255)
    return np.concatenate(list(framed), axis=1)


def quoted(sentence: str) -> str:
    """A sentence as a title: what is between two $ is no formula."""
    return "“" + sentence.replace("$", r"\$") + "”"


def draw_curves(report: dict, data: vlmrm.Dataset, sentences: dict, title: str, path: Path) -> None:
    """Film strips of a few test episodes; beneath each the model's reward and the simulator's."""
    positions = choose_episodes(data, report["episodes"])
    rows, columns = math.ceil(len(positions) / 2), min(2, len(positions))
    height = 3.7 * rows + 0.5
    figure = Figure(figsize=(7 * columns, height))
    figure.suptitle(title, x=0.04, y=1 - 0.12 / height, ha="left", fontsize=15, fontweight="bold")
    grid = figure.add_gridspec(rows, columns, hspace=0.3, wspace=0.09, left=0.08 / columns,
                               right=0.985, top=1 - 0.87 / height, bottom=0.47 / height)
    for panel, position in enumerate(positions):
        episode, values = report["episodes"][position], report["values"][""][position]
        task, steps, rewards = data.task[episode], data.steps[episode], data.rewards[episode]
        rows = grid[panel // 2, panel % 2].subgridspec(
            3, 1, height_ratios=[1, 1.5, 0.9], hspace=0.1)
        strip, curve, truth = (figure.add_subplot(row) for row in rows)
        strip.imshow(film_strip(data.frames(episode), 8), aspect="auto")
        strip.set_axis_off()
        expert = data.source[episode] == "expert"
        strip.set_title(quoted(sentences[task]["instruction"]), loc="left", fontweight="bold")
        strip.set_title(("expert" if expert else "failed attempt") + (
            ", task never trained on" if task in vlmrm.UNSEEN_TASKS else ""),
            loc="right", fontsize=10)
        correct, total = vlmrm.pair_counts(values[None], rewards[None])
        merit = (f"VOC {vlmrm.value_order_correlation(values[None])[0]:.2f}" if expert else
                 f"ranking accuracy {correct.sum() / total.sum():.2f}")
        for axis, y, color, label in (
                (curve, values, "#c8384e", f"model: cos(frame, sentence), {merit}"),
                (truth, rewards, "#30638e", "simulator's reward")):
            axis.fill_between(steps, min(y.min(), 0), y, color=color, alpha=0.13, lw=0)
            axis.plot(steps, y, color=color, lw=2, marker="o", ms=3)
            axis.text(0.01, 0.97, label, va="top", transform=axis.transAxes, color=color)
            axis.set_xlim(steps[0], steps[-1])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8, colors="0.35")
        low, high = min(values.min(), 0), values.max()
        curve.set_ylim(low, high + 0.35 * (high - low) + 1e-6)
        curve.set_xticklabels([])
        truth.set_xlabel("simulator step", fontsize=8.5, color="0.35", labelpad=1)
        truth.set_ylim(0, 14)
        truth.set_yticks([0, 10])
    figure.savefig(path, dpi=110)


def draw_video(frames: np.ndarray, rewards: np.ndarray, instruction: str, path: Path) -> None:
    """A film strip of frames (N, H, W, 3) and, beneath it, the reward of each."""
    warnings.filterwarnings("ignore", message="Glyph")  # of sentences in scripts the font lacks
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    strip, curve = figure.subplots(2, 1, height_ratios=[1, 2])
    strip.imshow(film_strip(frames, min(8, len(frames))))
    strip.set_axis_off()
    strip.set_title(quoted(instruction), loc="left", fontweight="bold", wrap=True)
    curve.plot(rewards, color=UNSEEN, lw=2, marker="o", ms=3)
    curve.set_xlabel("frame")
    curve.set_ylabel("reward: cos(frame, sentence)")
    curve.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def cell(runs: list[dict], group: str, metric: str, interval: bool = True) -> str:
    """Mean ± std over seeds, and the mean over seeds of the 95 % intervals over episodes."""
    found = [run[group][metric] for run in runs if metric in run[group]]
    if not found:
        return ""
    values = [entry["value"] for entry in found]
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    if interval:
        text += " [{:.2f}, {:.2f}]".format(*np.mean([entry["interval"] for entry in found], axis=0))
    return text.replace("-0.00", "0.00")


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. The first title may be empty."""
    head, *lines = ["| " + " | ".join(cells).lstrip() + " |" for cells in (titles, *rows)]
    return "\n".join([head, "|" + " --- |" * len(titles), *lines])


def of_reward(runs: list[dict], metric: str) -> str:
    """The name of a metric for the reward that stands for these runs: the cosine, or, for a
    control or the goal baseline, their own."""
    return "own_" * ("own_voc" in runs[0]["seen"]) + metric


def is_peer(row: str) -> bool:
    """Whether a row is compared with triplet: it was trained, without the simulator's reward."""
    return bool(vlmrm.OBJECTIVES.get(row)) and row not in vlmrm.ORACLES


def against_triplet(runs, shown, group: str, metric: str):
    """Each peer minus triplet, task by task: {objective: (tasks,)}, and corrected p-values."""
    some = next(iter(runs.values()))[0]["tasks"]
    tasks = sorted(task for task in some
                   if metric in some[task] and vlmrm.group_of(task) == group)
    scores = {name: np.mean([[run["tasks"][task][metric] for task in tasks]
                             for run in runs[name, setting]], axis=0)
              for name, setting in shown.items() if is_peer(name)}
    return ({name: values - scores["triplet"] for name, values in scores.items()
             if name != "triplet"}, vlmrm.companion("study").paired_p_values(scores, "triplet"))


def comparison_table(runs, shown) -> str:
    """Order in videos by every objective, in Markdown, by VOC on unseen tasks.

    ↓ and ↑: worse and better than triplet over the tasks of that column (p < .05).
    Bold: what beats triplet, and triplet where it beats every peer.
    """
    columns = [(metric, group) for metric in ("voc", "ranking_accuracy_within")
               for group in ("seen", "unseen")]
    marks = {}
    for metric, group in columns:
        differences, p = against_triplet(runs, shown, group, metric)
        for name in p:
            sign = "↓" if differences[name].mean() < 0 else "↑"
            marks[name, metric, group] = sign if p[name] < 0.05 else ""
        if all(marks[name, metric, group] == "↓" for name in p):
            marks["triplet", metric, group] = "↑"
    rows = []
    for name, setting in shown.items():
        cells = [label(name, quote="`")]
        for metric, group in columns:
            mark = marks.get((name, metric, group), "")
            text = cell(runs[name, setting], group, of_reward(runs[name, setting], metric))
            cells.append(f"**{text}**" if mark == "↑" else f"{text} {mark}".strip())
        rows.append(cells)
    return markdown(["objective", "VOC, seen", "VOC, unseen", "ranking within, seen",
                     "ranking within, unseen"], rows)


def more_table(runs, shown) -> str:
    """What else each objective does, in the order of comparison_table()."""
    rows = []
    for name, setting in shown.items():
        some = runs[name, setting]
        official = runs.get((name, "faithful"), []) if setting == "tuned" else []
        own = of_reward(some, "voc") != "voc"  # not the cosine: the rest does not apply
        rows.append([
            label(name, quote="`"),
            cell(some, "unseen", of_reward(some, "ranking_accuracy_across"), False),
            *("" if own else cell(some, group, metric, False) for group, metric in (
                ("seen", "voc_paraphrase"), ("unseen", "voc_paraphrase"), ("unseen", "goal_voc"),
                ("unseen", "antonym"), ("seen", "retrieval_top1"))),
            *(cell(official, group, "voc", False) for group in ("seen", "unseen"))])
    return markdown(["objective", "ranking across, unseen", "VOC under paraphrases, seen",
                     "unseen", "VOC by goal images, unseen", "VOC minus VOC of opposite, unseen",
                     "retrieval top 1, seen", "official constants: VOC, seen", "unseen"], rows)


def short_table(runs, shown) -> str:
    """The objectives of the paper, the best of the others, and the controls: a few columns."""
    rows = []
    for name in shown:
        if name in ("triplet", "preference", "decisionnce-t", "r3m", "liv", "tcn", "vip",
                    "zeroshot", "clock", "thumbnail"):
            some = runs[name, shown[name]]
            rows.append([label(name, quote="`"), *(
                cell(some, group, of_reward(some, metric), False) for metric, group in (
                    ("voc", "seen"), ("voc", "unseen"), ("ranking_accuracy_within", "seen"),
                    ("ranking_accuracy_within", "unseen")))])
    return markdown(["objective", "VOC, seen tasks", "VOC, unseen tasks", "ranking accuracy, seen",
                     "ranking accuracy, unseen"], rows)


def metrics_table(runs, shown) -> str:
    """Every metric, before training and after training with triplet."""
    columns = [(runs[name, shown[name]], group) for group in ("seen", "unseen")
               for name in ("zeroshot", "triplet")]
    return markdown(["", "seen tasks: before", "triplet", "unseen tasks: before", "triplet"], [
        [text, *(cell(some, group, metric) for some, group in columns)]
        for metric, (text, _) in METRICS.items() if not metric.startswith(("own_", "goal_"))])


def over_tasks(scores: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % t interval over tasks."""
    half = (scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
            if len(scores) > 1 else np.nan)
    return "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(
        scores.mean(), scores.mean() - half, scores.mean() + half, s=sign).replace("-0.00", "0.00")


def varied_table(found: dict) -> str:
    """Triplet on two backbones, on data whose episodes look different: of data/robustness.py."""
    return markdown(["experts per task", "backbone", "VOC, seen", "VOC, unseen",
                     "ranking within, seen", "ranking within, unseen"], [
        [experts, f"`{backbone}`", *(
            cell(runs, group, metric, False) for metric in ("voc", "ranking_accuracy_within")
            for group in ("seen", "unseen"))]
        for experts, backbones in found.items() for backbone, runs in backbones.items()])


def folds_table(found: dict) -> str:
    """Unseen tasks of all folds of data/robustness.py, and by how much triplet beats its peers."""
    columns = {row: {metric: np.array([scores[metric] for fold in folds
                                       for _, scores in sorted(fold.items()) if metric in scores])
                     for metric in ("voc", "ranking_accuracy_within")}
               for row, folds in found.items()}
    p = vlmrm.companion("study").paired_p_values(
        {row: column["voc"] for row, column in columns.items()
         if is_peer(row) or row in ("thumbnail", "moved")}, "triplet")
    rows = []
    for row in sorted(columns, key=lambda row: (
            not vlmrm.OBJECTIVES.get(row), -columns[row]["voc"].mean())):
        gain = columns["triplet"]["voc"] - columns[row]["voc"]
        rows.append([
            label(row, quote="`"), *map(over_tasks, columns[row].values()),
            *([over_tasks(gain, "+"), f"{p[row]:.3f}", f"{(gain > 0).sum()} of {len(gain)}"]
              if row in p else [""] * 3)])
    return markdown(["objective", "VOC", "ranking within", "VOC: triplet minus it", "p",
                     "tasks won"], rows)


def load(root: Path):
    """The runs of the study, {(row, setting): [run of each seed]}, a row being an objective or the
    control "thumbnail"; the setting to show of each row, by VOC on unseen tasks; and the rewards of
    the first seed."""
    runs = {}
    for result in json.loads((root / "results.json").read_text(encoding="utf-8")):
        runs.setdefault((result["row"], result["config"]["setting"]), []).append(result)
    shown = {name: "tuned" if (name, "tuned") in runs else "faithful" for name, _ in runs}
    order = sorted(shown, key=lambda name: (  # untrained ones last
        not vlmrm.OBJECTIVES.get(name), -mean(runs[name, shown[name]], "unseen", "voc")))
    rewards = {}  # objective -> field -> array
    for key, array in np.load(root / "rewards.npz").items():
        rewards.setdefault(key.split("/")[0], {})[key.split("/")[1]] = array
    return runs, {name: shown[name] for name in order}, rewards


def mean(runs: list[dict], group: str, metric: str) -> float:
    return float(np.mean([run[group][metric]["value"] for run in runs]))


def speed(runs: list[dict]) -> float | None:
    """Median frames/s of the runs; None if nothing was trained."""
    speeds = [run["frames_per_second"] for run in runs if run["frames_per_second"]]
    return float(np.median(speeds)) if speeds else None


def label(name: str, quote: str = "") -> str:
    remark = ("no language" if name in vlmrm.LANGUAGE_FREE else
              "privileged" if name in vlmrm.ORACLES else
              "control" if name in ("clock", "moved", "thumbnail") else "")
    return f"{quote}{name}{quote}" + (f" ({remark})" if remark else "")


def draw_comparison(runs, shown, path: Path) -> None:
    """VOC, ranking accuracy and speed of every objective, seen and unseen tasks."""
    figure = Figure(figsize=(13, 0.36 * len(shown) + 1.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[4, 4, 1.6])
    rows = np.arange(len(shown))[::-1]
    for axis, metric, title, chance in (
            (axes[0], "voc", "VOC: does it rise while an expert works?", 0),
            (axes[1], "ranking_accuracy_within",
             "ranking accuracy: frames in the simulator's order?", 0.5)):
        axis.axvline(chance, color="0.8", lw=1)
        for row, (name, setting) in zip(rows, shown.items()):
            for group, color, offset in (("seen", SEEN, 0.13), ("unseen", UNSEEN, -0.13)):
                reward = of_reward(runs[name, setting], metric)
                found = [run[group][reward] for run in runs[name, setting]]
                low, high = np.mean([entry["interval"] for entry in found], axis=0)
                axis.plot([low, high], [row + offset] * 2, color=color, lw=2.2, alpha=0.45)
                axis.plot([entry["value"] for entry in found], [row + offset] * len(found), "|",
                          color=color, ms=6)
                axis.plot(mean(runs[name, setting], group, reward), row + offset, "o", color=color,
                          ms=6, label=f"{group} tasks" if row == rows[0] else None)
                if setting == "tuned" and (name, "faithful") in runs:
                    axis.plot(mean(runs[name, "faithful"], group, metric), row + offset, "x",
                              color=color, ms=5, alpha=0.6)
                if name in vlmrm.LANGUAGE_FREE:
                    axis.plot(mean(runs[name, setting], group, f"goal_{metric}"), row + offset, "D",
                              color=color, ms=5, mfc="white")
        axis.set_title(title, loc="left", fontsize=10.5)
    axes[0].plot([], [], "x", color=GREY, ms=5, label="official constants")
    axes[0].plot([], [], "D", color=GREY, ms=5, mfc="white", label="by goal images instead")
    axes[0].plot([], [], color=GREY, lw=2.2, alpha=0.5, label="95 % interval over test episodes")
    axes[0].plot([], [], "|", color=GREY, label="training seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
                  frameon=False, fontsize=9)
    axes[0].set_yticks(rows, [label(name) for name in shown])
    for row, (name, setting) in zip(rows, shown.items()):
        if speed(runs[name, setting]) and name in vlmrm.OBJECTIVES:  # thumbnail's is another scale
            axes[2].barh(row, speed(runs[name, setting]), color="0.8", height=0.6)
    axes[2].set_title("training, frames/s", loc="left", fontsize=10.5)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.93")
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def draw_episode(shown, rewards, data, sentences: dict, path: Path) -> None:
    """One expert at an unseen task, and the reward over time under every objective."""
    test = next(iter(rewards.values()))["episodes"]
    position = choose_episodes(data, test)[1]  # an expert at an unseen task
    task, steps = data.task[test[position]], data.steps[test[position]]
    columns = 6
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(14, 2.2 + 1.75 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.15] + [1] * rows)
    strip = figure.add_subplot(grid[0, :])
    strip.imshow(film_strip(data.frames(test[position]), 10))
    strip.set_axis_off()
    strip.set_title(f"{quoted(sentences[task]['instruction'])}: an expert at a task never trained "
                    "on", loc="left", fontweight="bold")
    for k, name in enumerate(shown):
        axis = figure.add_subplot(grid[1 + k // columns, k % columns])
        values = rewards[name].get("own_values", rewards[name]["values"])[position].astype(float)
        voc = vlmrm.value_order_correlation(values[None])[0]
        color = SEEN if voc > 0.5 else GREY if voc > -0.2 else UNSEEN
        axis.plot(steps, values, color=color, lw=1.8)
        axis.fill_between(steps, values.min(), values, color=color, alpha=0.12, lw=0)
        axis.set_title(name, loc="left", fontsize=9.5)
        axis.set_title(f"VOC {voc:.2f}", loc="right", fontsize=9, color=color)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7, colors="0.45")
        axis.locator_params(axis="y", nbins=3)
    figure.supxlabel("simulator step; each panel has its own scale, as only the order counts",
                     fontsize=9, color="0.4")
    figure.savefig(path, dpi=100)


def draw_heat_map(runs, shown, path: Path) -> None:
    """VOC of every task under every objective."""
    some = next(iter(runs.values()))[0]["tasks"]
    tasks = sorted((task for task in some if "voc" in some[task]),
                   key=lambda task: (task not in vlmrm.UNSEEN_TASKS, task))
    shown = {name: setting for name, setting in shown.items()
             if of_reward(runs[name, setting], "voc") == "voc"}
    voc = np.array([[np.mean([run["tasks"][task]["voc"] for run in runs[name, setting]])
                     for name, setting in shown.items()] for task in tasks])
    figure = Figure(figsize=(10.5, 12.5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(voc, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(voc):
        axis.text(column, row, f"{value:.1f}".replace("0.", ".").replace("-.0", ".0"),
                  ha="center", va="center", fontsize=6.5,
                  color="white" if abs(value) > 0.6 else "0.25")
    unseen = sum(task in vlmrm.UNSEEN_TASKS for task in tasks)
    axis.axhline(unseen - 0.5, color="black", lw=1.5)
    axis.set_yticks(range(len(tasks)), [task.removesuffix("-v3") for task in tasks], fontsize=8)
    axis.set_xticks(range(len(shown)), shown, rotation=55, ha="left", fontsize=9)
    axis.xaxis.tick_top()
    axis.set_title("VOC by task and objective; above the line: tasks never trained on",
                   loc="left", fontsize=11)
    figure.colorbar(image, shrink=0.3, label="VOC")
    figure.savefig(path, dpi=90)


def draw_confusion(runs, shown, rewards, data, sentences: list[str], path: Path) -> None:
    """Which of all sentences each task's last expert frames prefer."""
    names = [name for name in ("zeroshot", "triplet", "decisionnce-p", "vlc") if name in shown]
    order = np.array(sorted(range(len(sentences)),
                            key=lambda k: (sentences[k] in vlmrm.UNSEEN_TASKS, sentences[k])))
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), sharey=True), names):
        test, preferred = rewards[name]["episodes"], rewards[name]["preferred"]
        expert = data.source[test] == "expert"
        confusion = np.zeros((len(sentences),) * 2)
        for task, choice in zip(data.task[test][expert], preferred[expert]):
            confusion[sentences.index(task), choice] += 1
        confusion /= np.maximum(confusion.sum(1, keepdims=True), 1)
        axis.imshow(confusion[order][:, order], cmap="magma_r", vmin=0, vmax=1)
        edge = sum(task not in vlmrm.UNSEEN_TASKS for task in sentences) - 0.5
        axis.axhline(edge, color=UNSEEN, lw=0.8)
        axis.axvline(edge, color=UNSEEN, lw=0.8)
        right = {group: mean(runs[name, shown[name]], group, "retrieval_top1")
                 for group in ("seen", "unseen")}
        axis.set_title(f"{name}: right {right['seen']:.2f} seen, {right['unseen']:.2f} unseen",
                       loc="left", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("sentence preferred", fontsize=9)
    figure.axes[0].set_ylabel("task of the frame (red line: unseen below)", fontsize=9)
    figure.savefig(path, dpi=110)


# What each loss takes from a batch of two videos. Nodes: o0 to o4 the frames of a video, p0 to p4
# those of another, l and m their sentences. Edges: see EDGES; a "goal" is a ring around a node.
LOOKS = {
    "triplet": ("of two frames the later wins under l, by a margin", [
        *[("rise", f"o{i}", f"o{j}") for j in range(5) for i in range(j)], ("goal", "l", "l")]),
    "preference": ("of two frames the later wins under l, softly", [
        *[("rise", f"o{i}", f"o{j}") for j in range(5) for i in range(j)], ("goal", "l", "l")]),
    "progress": ("each frame has a number under l, and 0 under l'", [
        *[("count", f"o{k}", "l") for k in range(5)], ("push", "o4", "m")]),
    "clip": ("every frame finds its sentence", [
        *[("pull", f"o{k}", "l") for k in range(5)], ("push", "o2", "m"), ("push", "p2", "l")]),
    "decisionnce-p": ("progress early to late is larger under l than under l'", [
        ("rise", "o0", "o3"), ("rise", "o1", "o4"), ("push", "o4", "m"), ("push", "p4", "l"),
        ("goal", "l", "l")]),
    "decisionnce-t": ("each step points along l, not along l'", [
        ("rise", "o0", "o1"), ("rise", "o1", "o3"), ("rise", "o3", "o4"), ("push", "o4", "m"),
        ("push", "p4", "l"), ("goal", "l", "l")]),
    "vlc": ("rises at every step under l, and the end finds its sentence", [
        *[("rise", f"o{k}", f"o{k + 1}") for k in range(4)], ("pull", "o4", "l"),
        ("push", "o4", "m"), ("push", "p4", "l"), ("goal", "l", "l")]),
    "tcn": ("neighbours in time close, the rest far; no sentence", [
        ("pull", "o4", "o3"), ("pull", "o3", "o1"), ("push", "o4", "o1"), ("push", "o4", "p4"),
        ("push", "o1", "p1")]),
    "tcn-text": ("the sentence in place of the end", [
        ("pull", "l", "o3"), ("pull", "o3", "o1"), ("push", "l", "o1"), ("push", "l", "m"),
        ("push", "o1", "p1")]),
    "r3m": ("tcn, and under l later beats earlier and others", [
        ("rise", "o0", "o4"), ("rise", "o1", "o3"), ("rise", "o3", "o4"), ("push", "l", "p4"),
        ("push", "l", "p3"), ("goal", "l", "l")]),
    "vip": ("nearer to the goal image by one step; no sentence", [
        ("pull", "o0", "o4"), ("rise", "o1", "o2"), ("rise", "p1", "p2"), ("goal", "o4", "o4")]),
    "vip-text": ("the same with the sentence as goal", [
        ("pull", "o0", "l"), ("rise", "o1", "o2"), ("rise", "p1", "p2"), ("goal", "l", "l")]),
    "liv": ("vip, and the end finds its sentence", [
        ("pull", "o0", "o4"), ("rise", "o1", "o2"), ("goal", "o4", "o4"), ("pull", "o4", "l"),
        ("push", "o4", "m"), ("push", "p4", "l")]),
    "hilp": ("distance = number of steps; no sentence", [
        ("count", "o1", "o2"), ("count", "o1", "o3"), ("count", "o1", "o4"),
        ("count", "o1", "p4")]),
    "hilp-text": ("the same with the sentence in place of the end", [
        ("count", "o1", "o2"), ("count", "o1", "o3"), ("count", "o1", "l"),
        ("count", "o1", "m")]),
}
EDGES = {"pull": ("#2a9d5c", "-", "pull together"), "push": (UNSEEN, (0, (2, 2)), "push apart"),
         "rise": (SEEN, "-", "the score must rise"), "count": ("#b07aa1", "-", "fit a number"),
         "goal": ("#e9a23b", "-", "what scores are measured against")}


TIMES = (0.04, 0.36, 0.46, 0.72, 0.97)  # of the five frames, as shares of the episode


def draw_batch(head, data) -> None:
    """Two videos of a batch: five frames on a time line each, and their sentences."""
    sentences = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    head.set(xlim=(-0.06, 1.5), ylim=(-0.75, 1.65))
    head.set_axis_off()
    for row, task in ((1.0, "drawer-close-v3"), (0.0, "button-press-wall-v3")):
        episode = data.select(task=task, source="expert")[0]
        picks = data.frames(episode)[
            (np.array(TIMES) * (data.T - 1)).round().astype(int)]
        head.plot([0, 1.05], [row - 0.42] * 2, color="0.6", lw=1)
        for t, picture, letter in zip(TIMES, picks, range(5)):
            shift = {1: -0.035, 2: 0.035}.get(letter, 0)  # neighbours in time would overlap
            head.imshow(picture, extent=(t + shift - 0.048, t + shift + 0.048, row - 0.34,
                                         row + 0.36), aspect="auto", zorder=3)
            head.plot([t, t + shift], [row - 0.42, row - 0.34], color="0.6", lw=1)
            head.plot(t, row - 0.42, "o", color="black", ms=4)
        head.text(1.09, row, quoted(sentences[task]["instruction"]), va="center", fontsize=12,
                  style="italic")
    for t, shift, name in zip(TIMES, (0, -0.03, 0.03, 0, 0), (
            "start", "now", "next", "later", "end")):
        head.text(t + shift, 1.42, name, ha="center", fontsize=10)
    head.text(1.09, 0.68, "l, its instruction", fontsize=9.5, color="0.4")
    head.text(1.09, -0.32, "l', that of another video", fontsize=9.5, color="0.4")
    for k, (color, style, text) in enumerate(EDGES[kind] for kind in EDGES):
        head.plot([0.02 + 0.27 * k, 0.06 + 0.27 * k], [-0.66] * 2, color=color, ls=style, lw=2.4)
        head.text(0.07 + 0.27 * k, -0.66, text, va="center", fontsize=10)


def draw_edges(axis, name: str, caption: str, edges: list) -> None:
    """What one objective takes from the batch: the edges of LOOKS between its frames and texts."""
    place = {f"o{k}": (t, 1.0) for k, t in enumerate(TIMES)} | {
        f"p{k}": (t, 0.0) for k, t in enumerate(TIMES)} | {"l": (1.22, 1.0), "m": (1.22, 0.0)}
    axis.set(xlim=(-0.06, 1.4), ylim=(-0.3, 2.2))
    axis.set_axis_off()
    axis.text(-0.03, 2.12, name, fontsize=11.5, fontweight="bold", va="center")
    axis.text(-0.03, 1.8, caption, fontsize=9, color="0.3", va="center")
    for row in (0, 1):
        axis.plot([0, 1.05], [row] * 2, color="0.88", lw=5, zorder=0, solid_capstyle="round")
    used = {node for _, *ends in edges for node in ends}
    for node, (x, y) in place.items():
        color = "black" if node in used else "0.75"
        if node in "lm":
            axis.text(x, y, "l" if node == "l" else "l'", ha="center", va="center", fontsize=12,
                      style="italic", color=color, bbox={
                          "boxstyle": "round", "fc": "white", "ec": color})
        else:
            axis.plot(x, y, "o", color=color, ms=6, zorder=4)
    for kind, a, b in edges:
        color, style, _ = EDGES[kind]
        (xa, ya), (xb, yb) = place[a], place[b]
        if kind == "goal":
            axis.plot(xa, ya, "o", ms=21, mfc="none", mec=color, mew=2.2)
            continue
        # Arcs along one time line, the longer the higher; straight from line to line.
        bend = -min(0.6, 0.08 / abs(xb - xa) + 0.19) if ya == yb else 0.0
        if xb < xa:
            bend = -bend
        axis.add_patch(FancyArrowPatch(
            (xa, ya), (xb, yb), connectionstyle=f"arc3,rad={bend}", color=color, lw=1.5,
            linestyle=style, shrinkA=4, shrinkB=4 if b not in "lm" else 10, mutation_scale=8,
            arrowstyle="-|>" if kind == "rise" else "<->" if kind == "count" else "-",
            zorder=3))


def draw_looks(data, path: Path) -> None:
    """One batch on its time line, and what each objective takes from it."""
    columns, rows = 3, -(-len(LOOKS) // 3)
    figure = Figure(figsize=(14, 3.6 + 1.95 * rows))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.6] + [1] * rows, left=0.01,
                               right=0.99, top=0.985, bottom=0.01, hspace=0.16, wspace=0.05)
    draw_batch(figure.add_subplot(grid[0, :]), data)
    for k, (name, (caption, edges)) in enumerate(LOOKS.items()):
        draw_edges(figure.add_subplot(grid[1 + k // columns, k % columns]), name, caption, edges)
    figure.savefig(path, dpi=100)


def draw_best_of(found: dict, path: Path) -> None:
    """The simulator's reward of the best of N frames, picked by one model and by several."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, group in zip(figure.subplots(1, 2, sharey=True), ("seen", "unseen")):
        singles = [curve[group]["best_of"] for name, curve in found.items()
                   if name.startswith("seed")]
        axis.fill_between(found["draws"], np.min(singles, 0), np.max(singles, 0), color=GREY,
                          alpha=0.25, lw=0, label=f"one model (range of {len(singles)})")
        axis.plot(found["draws"], np.mean(singles, 0), color=GREY, lw=2, label="one model (mean)")
        for name, color in (("mean", "#2a9d5c"), ("minimum", UNSEEN), ("mean - std", "#b07aa1"),
                            ("simulator", "black")):
            axis.plot(found["draws"], found[name][group]["best_of"], color=color, lw=2,
                      ls=":" if name == "simulator" else "-",
                      label="the simulator itself" if name == "simulator" else
                      f"{name} of the ensemble")
        axis.set_xscale("log", base=2)
        axis.set_xticks(found["draws"], found["draws"])
        axis.set_xlabel("N: frames to pick the best from")
        axis.set_title(f"{group} tasks", loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("simulator's reward of the pick (0 to 10)")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def speed_table(found: dict) -> str:
    """What data/benchmark.py measured."""
    def row(text: str, rates: dict, suffix: str, aims: str) -> list[str]:
        ours = rates["ours" + suffix]
        return [text, f"{ours:.0f}", *(
            f"{rates[other]:.0f} ({ours / rates[other]:.2f})" if other in rates else ""
            for other in ("textbook" + suffix, "bare" + suffix)), aims]

    collection = "collection on one core, frames/s: "
    return markdown(["", "ours", "textbook (ours / it)", "limit (ours / it)", "aims"], [
        row(collection + "simulated, drawn, packed", found["collection"], "", "15, 0.85"),
        row(collection + "24 kept of an episode's 150", found["collection"], "_24_of_150", ""),
        row("training step, frames/s", found["training"], "", "3, 0.90"),
        row("evaluation, frames/s", found["evaluation"], "", "0.95")])


def soak_table(found: dict) -> str:
    """What data/soak.py counted."""
    kills, answers = found["kills"], found["bad inputs"]
    return markdown(["what", "times", "as it should be"], [
        ["a run killed at a random moment, resumed: same weights bit for bit, same metrics",
         str(kills["kills"]), str(kills["identical"])],
        [f"bad inputs of {answers['kinds']} kinds: one line, exit code 2, nothing left behind",
         str(answers["bad inputs"]), str(answers["answered"])]])


def draw_growth(found: dict, path: Path) -> None:
    """Memory and time of a short run, with more data and with larger pictures."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = [(key, label, field, title)
              for key, label in (("episodes", "episodes"), ("size", "pixels, width and height"))
              for field, title in (("peak_gigabytes", "memory, GB"), ("seconds", "time, s"))]
    for axis, (key, label, field, title) in zip(figure.subplots(1, len(panels)), panels):
        points = found["growth"][key]
        axis.plot([point["x"] for point in points], [point[field] for point in points], "o-",
                  color=SEEN)
        axis.set_ylim(0, 1.1 * max(point[field] for point in points))
        axis.set_xscale("log", base=2)
        axis.set_xticks([point["x"] for point in points], [point["x"] for point in points])
        axis.minorticks_off()
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_all(root: Path, data, sentences: dict) -> None:
    """All pictures of the results in a folder."""
    runs, shown, rewards = load(root)
    draw_comparison(runs, shown, root / "comparison.png")
    draw_episode(shown, rewards, data, sentences, root / "episode.png")
    draw_heat_map(runs, shown, root / "heatmap.png")
    draw_confusion(runs, shown, rewards, data, list(sentences), root / "confusion.png")
    draw_looks(vlmrm.Dataset(vlmrm.DATA / "metaworld.npz"), root / "looks.png")
    if "triplet" in rewards:
        draw_curves({"episodes": rewards["triplet"]["episodes"],
                     "values": {"": rewards["triplet"]["values"]}}, data, sentences,
                    "triplet: rewards of test episodes over time", root / "curves.png")
    if (root / "benchmark.json").exists():
        draw_growth(json.loads((root / "benchmark.json").read_text()), root / "growth.png")
    for path in root.glob("ensemble-*.json"):
        draw_best_of(json.loads(path.read_text(encoding="utf-8")),
                     root / f"best-of-{path.stem.removeprefix('ensemble-')}.png")


def tables(root: Path) -> dict[str, str]:
    """The tables of the README, by the names of the marks they stand between. Others are
    made where their programs have left figures."""
    runs, shown, _ = load(root)
    found = {"short": short_table(runs, shown), "comparison": comparison_table(runs, shown),
             "more": more_table(runs, shown), "metrics": metrics_table(runs, shown)}
    for name, table in (("benchmark", speed_table), ("soak", soak_table), ("folds", folds_table),
                        ("varied", varied_table)):
        if (root / f"{name}.json").exists():
            found[name] = table(json.loads((root / f"{name}.json").read_text(encoding="utf-8")))
    return found


def fill(readme: str, root: Path) -> str:
    """The README with the tables between <!-- name --> and <!-- end of name --> made anew."""
    for name, table in tables(root).items():
        readme = re.sub(rf"(<!-- {name}\b.*?-->\n).*?(<!-- end of {name} -->)",
                        lambda marks: marks[1] + table + "\n" + marks[2], readme, flags=re.DOTALL)
    return readme


if __name__ == "__main__":
    draw_all(HERE / "results", *vlmrm.load_data(vlmrm.parse_arguments([])))
    readme = HERE.parent / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
