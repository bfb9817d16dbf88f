"""The tables of README.md and of data/results/README.md, made of the saved results.

    python data/study/tables.py      fills them, between <!-- name --> and <!-- end of name -->
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import scipy.stats

import vlmrm
from study import FIRST, RESULTS, WAYS, all_objectives, corrected_p_values

PAGES = (vlmrm.DATA.parent / "README.md", RESULTS / "README.md")
SAME = "ranking_accuracy_same_time"
WITHIN = "ranking_accuracy_within"
ORDER = {"VOC, seen tasks": ("seen", "voc"), "VOC, unseen tasks": ("unseen", "voc"),
         "ranking at the same time, seen": ("seen", SAME),
         "ranking at the same time, unseen": ("unseen", SAME)}
SHORT = ("triplet", "tcn", "r3m", "vip", "liv", "zeroshot")  # the paper's five, and the start

# 1. Reading the results ---------------------------------------------------------------------------

def load(root: Path) -> dict[str, dict[str, list]]:
    """The runs of the study, {row: {way of fine-tuning: [run of each seed]}}, by VOC on unseen
    tasks in the first way."""
    runs = {}
    for run in json.loads((root / "results.json").read_text(encoding="utf-8")):
        runs.setdefault(run["row"], {}).setdefault(run["way"], []).append(run)

    def place(row):
        return is_baseline(row), -mean_of(runs[row][FIRST], "unseen", "voc")

    return {row: runs[row] for row in sorted(runs, key=place)}

def mean_of(runs: list[dict], group: str, metric: str) -> float:
    """Mean over seeds."""
    return float(np.mean([run[group][metric]["value"] for run in runs]))

def remark_of(row: str) -> str:
    """Why a row is no rival like the others; "" if it is one."""
    name, _, way = row.partition(", ")
    if name in ("thumbnail", "clock", "distance-from-start") or way not in ("", *WAYS):
        return "control"
    parts = vlmrm.get_objective(all_objectives()[name])
    if not parts["loss"]:
        return "no training"
    if parts["LABELS"] == "rewards":
        return "privileged"
    if not parts["COSINE"]:
        return "no language"
    return ""

def is_rival(row: str) -> bool:
    """Trained, and without the simulator's reward."""
    return remark_of(row) in ("", "no language")

def is_baseline(row: str) -> bool:
    return remark_of(row) in ("control", "no training")

def label(row: str) -> str:
    """A row's name and the remark on it."""
    remark = remark_of(row)
    return f"`{row}` ({remark})" if remark else f"`{row}`"

# 2. Tables of the study ---------------------------------------------------------------------------

def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without minus before a zero."""
    return common.markdown_table([titles, *rows]).replace("-0.00", "0.00")

def cell(runs: list[dict], group: str, metric: str) -> str:
    """Mean ± std over seeds."""
    return over_seeds([run[group][metric]["value"] for run in runs if metric in run[group]])

def over_seeds(values: list[float]) -> str:
    """Their mean ± std, "" if there are none."""
    if not values:
        return ""
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text

def in_both_ways(columns: dict) -> dict[str, tuple]:
    """Columns (group, metric) for each way of fine-tuning: {title: (group, metric, way)}."""
    both = {}
    for title, column in columns.items():
        for way in WAYS:
            both[f"{title}: {way}"] = (*column, way)
    return both

def study_table(runs: dict, columns: dict, marks: dict = None) -> str:
    """Rows of the study. columns: {title: (group, metric, way)}; marks: {title: {row: "↑" or
    "↓"}}."""
    rows = []
    for name, by_way in runs.items():
        row = [label(name)]
        for title, (group, metric, way) in columns.items():
            text = cell(by_way.get(way, []), group, metric)
            mark = marks[title].get(name) if marks else ""
            if mark == "↑":
                text = f"**{text}**"
            elif mark:
                text += " ↓"
            row.append(text)
        rows.append(row)
    return table(["objective", *columns], rows)

def short_table(runs: dict) -> str:
    """The paper's objectives and the start, trained as by default."""
    titles = ["objective", *ORDER, "VOC under the opposite sentence, 7 unseen"]
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    rows = []
    for name in SHORT:
        cells = [cell(runs[name][FIRST], *column) for column in ORDER.values()]
        opposite = [voc_opposite(run, instructions) for run in runs[name][FIRST]]
        rows.append([label(name), *cells, over_seeds(opposite)])
    return table(titles, rows)

def voc_opposite(run: dict, instructions: dict) -> float:
    """Mean VOC of unseen tasks under the opposite sentence: their VOC minus the gap."""
    own = []
    for task, scores in run["tasks"].items():
        if vlmrm.group_of(task) == "unseen" and instructions[task].get("opposite"):
            own.append(scores["voc"])
    return float(np.mean(own) - run["unseen"]["opposite_gap"]["value"])

def result_sentence(folds: dict) -> str:
    """The study in some sentences, of the tasks that each fold leaves out."""
    control = "distance-from-start"
    voc = {}
    for row in ("triplet", "r3m", "liv", "vip", "tcn", control):
        left_out = {}
        for fold in folds[row]:
            left_out.update(fold)
        voc[row] = np.array([scores["voc"] for _, scores in sorted(left_out.items())])
    distance = voc.pop(control)
    ours = voc["triplet"]
    found = {"more than": [], "less than": [], "not surely other than": []}
    for row, p in corrected_p_values(voc, "triplet").items():
        text = f"`{row}` ({voc[row].mean():.2f}, p = {p:.3f})"
        found[relation(ours, voc[row], p)].append(text)
    parts = [f"{words} {', '.join(rows)}" for words, rows in found.items() if rows]
    p = vlmrm.paired_p_value(ours, distance)
    return (f"**On {len(ours)} tasks, each left out of training once, `triplet` has a VOC of "
            f"{ours.mean():.2f}: {', and '.join(parts)}.** (One run each; p over tasks, Holm's "
            "correction for four. `vip` and `tcn` read no sentence.) It is "
            f"{relation(ours, distance, p)} a control without training or sentence, the distance "
            f"from the first picture ({distance.mean():.2f}, p = {p:.2f}).")

def relation(ours: np.ndarray, other: np.ndarray, p: float) -> str:
    """What a p says of two objectives over tasks."""
    if p >= 0.05:
        return "not surely other than"
    return "more than" if ours.mean() > other.mean() else "less than"

def comparison_table(runs: dict) -> str:
    """Order in videos by every objective, in both ways of fine-tuning, by VOC on unseen tasks."""
    columns = in_both_ways(ORDER)
    marks = {title: versus_triplet(runs, *column) for title, column in columns.items()}
    return study_table(runs, columns, marks)

def versus_triplet(runs: dict, group: str, metric: str, way: str) -> dict[str, str]:
    """{row: "↓" or "↑"} where a row differs from triplet over the tasks, p < .05. Triplet gets
    "↑" if it beats all others."""
    scores = {}
    for row, by_way in runs.items():
        if is_rival(row):
            scores[row] = vlmrm.task_scores(by_way[way], metric, group).mean(0)  # (tasks,)
    marks = {}
    for row, p in corrected_p_values(scores, "triplet").items():
        if p < 0.05:
            marks[row] = "↑" if scores[row].mean() > scores["triplet"].mean() else "↓"
    if list(marks.values()) == ["↓"] * (len(scores) - 1):
        marks["triplet"] = "↑"
    return marks

def reading_table(runs: dict) -> str:
    """What is left of reading, on unseen tasks, in both ways of fine-tuning."""
    columns = {"VOC minus VOC of the opposite (7 tasks)": ("unseen", "opposite_gap"),
               "success (AUROC)": ("unseen", "success_auroc"),
               "retrieval": ("unseen", "retrieval_top1"),
               "VOC, paraphrased": ("unseen", "voc_paraphrase")}
    readers = dict(runs)
    for name in ("clock", "distance-from-start"):  # they know no sentence
        del readers[name]
    return study_table(readers, in_both_ways(columns))

def more_table(runs: dict) -> str:
    """What else each objective does, trained as by default."""
    return study_table(runs, {
        "ranking within, seen": ("seen", WITHIN, FIRST),
        "unseen": ("unseen", WITHIN, FIRST),
        "ranking across, unseen": ("unseen", "ranking_accuracy_across", FIRST),
        "VOC paraphrased, seen": ("seen", "voc_paraphrase", FIRST),
        "VOC by goal images, unseen": ("unseen", "goal_voc", FIRST),
        "retrieval, seen": ("seen", "retrieval_top1", FIRST),
        "EPIC distance, unseen (0 is best)": ("unseen", "epic", FIRST)})

def over_tasks(scores: np.ndarray) -> str:
    """Mean and 95 % t interval over tasks, with signs."""
    mean = scores.mean()
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"

def folds_table(folds: dict, reference: str) -> str:
    """Unseen tasks of all folds, and by how much the reference beats the rest."""
    columns = {"voc": {}, SAME: {}, WITHIN: {}, "opposite_gap": {}}
    for row, by_fold in folds.items():
        for metric, scores in columns.items():
            scores[row] = []  # of every task that has it
            for fold in by_fold:
                for task in sorted(fold):
                    if metric in fold[task]:
                        scores[row].append(fold[task][metric])
            scores[row] = np.array(scores[row])
    tested = [row for row in folds if is_rival(row) or row in ("thumbnail", "distance-from-start")]

    def place(row):
        return is_baseline(row), -columns["voc"][row].mean()

    order = sorted(folds, key=place)
    rows = {row: [label(row)] for row in order}
    for scores in columns.values():
        for row in order:
            rows[row].append(f"{scores[row].mean():.2f}")
    for metric in ("voc", SAME):
        scores = columns[metric]
        p = corrected_p_values({row: scores[row] for row in tested}, reference)
        for row in order:
            cells = ["", ""]
            if row in p:
                cells = [over_tasks(scores[reference] - scores[row]), f"{p[row]:.3f}"]
            rows[row] += cells
    return table(["objective", "VOC", "ranking at the same time", "ranking within",
                  "opposite gap (18 tasks)", f"VOC: {reference} minus it", "p",
                  f"same time: {reference} minus it", "p"], list(rows.values()))

# 3. The benchmark -------------------------------------------------------------------------------

def benchmark_table(measured: dict) -> str:
    """Pictures a second of each part."""
    rows = []
    for text, part, suffix in (
            ("collection on one core: simulated, drawn, packed", "collection", ""),
            ("collection, 24 kept of an episode's 150", "collection", "_24_of_150"),
            ("training step", "training", ""), ("evaluation", "evaluation", "")):
        ours = measured[part]["ours" + suffix]
        row = [text, f"{ours:.0f}", ""]
        if not suffix:
            limit = measured[part]["bare"]
            row[2] = f"{limit:.0f} ({ours / limit:.2f})"
        rows.append(row)
    return table(["frames/s", "ours", "limit (ours / it)"], rows)

# 4. The pages -------------------------------------------------------------------------------------

def tables(root: Path) -> dict[str, str]:
    """All tables, by the names of the marks they stand between."""
    runs = load(root)
    folds = vlmrm.read_json(root / "folds.json")
    return {
        "result": result_sentence(folds), "short": short_table(runs),
        "comparison": comparison_table(runs), "reading": reading_table(runs),
        "more": more_table(runs), "folds": folds_table(folds, "triplet"),
        "benchmark": benchmark_table(vlmrm.read_json(root / "benchmark.json"))}

def fill(page: str, made: dict[str, str]) -> str:
    """A page with the tables between <!-- name --> and <!-- end of name --> made anew."""
    for name, text in made.items():
        marks = re.search(rf"<!-- {name}\b[^>]*-->\n", page)
        if marks:
            end = page.index(f"<!-- end of {name} -->")
            page = page[:marks.end()] + text + "\n" + page[end:]
    return page

def work(args) -> None:
    """Fill the tables of both pages."""
    made = tables(RESULTS)
    for path in PAGES:
        page = fill(path.read_text(encoding="utf-8"), made)
        vlmrm.write_whole(path, page.encode())

if __name__ == "__main__":
    sys.exit(common.main(common.Parser("tables", description=__doc__), work))
