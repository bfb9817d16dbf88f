"""The tables of README.md and of data/results/README.md, made of the saved results.

    python data/study/tables.py      fills them, between <!-- name --> and <!-- end of name -->
"""
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import scipy.stats

import vlmrm
from guide import METRICS, SHAPED, STARTS, TASKS
from trial import (
    ARMS, CANDIDATES, CONTROLS, SEEDS, best_setting, ours, reads, score, settings_of,
    tried_settings)
from workers import RESULTS

PAGES = (vlmrm.DATA.parent / "README.md", RESULTS / "README.md")
SAME = "ranking_accuracy_same_time"
OPPOSITE = "VOC under the opposite sentence (lower is better)"
NEEDED = ("triplet", "r3m", "zeroshot")  # a fold with these answers the first question
COLUMNS = {"VOC": "voc", OPPOSITE: "voc_opposite",
           "ranking at the same time": SAME, "retrieval": "retrieval_top1",
           "success (AUROC)": "success_auroc", "VOC, paraphrased": "voc_paraphrase"}
MARGIN = 0.02  # differences that surely are smaller are none

# 1. Reading the trial -----------------------------------------------------------------------------

def load(root: Path) -> tuple[dict, dict]:
    """The runs of choices.json and of trial.json, {name of a run: {task: {metric: score}}}."""
    choices = vlmrm.read_json(root / "choices.json")
    trial = vlmrm.read_json(root / "trial.json")
    return choices["runs"], trial["runs"]

def is_whole(runs: dict, arm: str, fold: int) -> bool:
    """Whether all seeds of an arm were tested in a fold, and none diverged."""
    seeds = 1
    if ARMS[arm][0]:
        seeds = SEEDS
    for seed in range(seeds):
        if not runs.get(f"{arm}, fold {fold}, seed {seed}"):
            return False
    return True

def folds_of(runs: dict, *arms: str) -> list[int]:
    """The folds in which these arms were tested, and those that every fold needs."""
    return [fold for fold in range(5)
            if all(is_whole(runs, arm, fold) for arm in (*NEEDED, *arms))]

def groups_of(runs: dict) -> dict[tuple, list[str]]:
    """The arms that were tested in the same folds, {folds: arms}, those of all folds first. Each
    group has triplet, to compare with on the same tasks."""
    groups = {tuple(folds_of(runs)): []}
    for arm in ARMS:
        folds = tuple(folds_of(runs, arm))
        if folds:
            groups.setdefault(folds, ["triplet"]).append(arm)
    return groups

def over_seeds(runs: dict, arm: str, fold: int) -> dict[str, dict]:
    """The scores of an arm in a fold, means over its seeds: {metric: {task: score}}."""
    found = {}
    for name, tasks in runs.items():
        if not name.startswith(f"{arm}, fold {fold}, seed "):
            continue
        for task, scores in tasks.items():
            for metric, value in scores.items():
                found.setdefault(metric, {}).setdefault(task, []).append(value)
    for by_task in found.values():
        for task, values in by_task.items():
            by_task[task] = float(np.mean(values))
    return found

def over_folds(runs: dict, arms: dict[int, str]) -> dict[str, dict]:
    """The scores of the arm that is named for each fold: {metric: {task: score}}."""
    scores = {metric: {} for metric in [*COLUMNS.values(), "pairs_same_time"]}
    for fold, arm in arms.items():
        for metric, by_task in over_seeds(runs, arm, fold).items():
            if metric in scores:
                scores[metric].update(by_task)
    return scores

def trial_scores(runs: dict, arms: list[str], folds) -> dict[str, dict]:
    """{arm: {metric: {task: score}}} on the tasks of these folds."""
    return {arm: over_folds(runs, dict.fromkeys(folds, arm)) for arm in arms}

def planned_scores(runs: dict, choices: dict) -> dict[str, dict]:
    """The same of the arms that the planned questions are about, each in all folds that it was
    tested in. "ours" is what the rule takes in a fold that has all candidates."""
    scores = {}
    for arm in ("triplet", "r3m", "zeroshot", "triplet + directions"):
        scores |= trial_scores(runs, [arm], folds_of(runs, arm))
    chosen = {fold: ours(choices, fold) for fold in folds_of(runs, *CANDIDATES)}
    scores["ours"] = over_folds(runs, chosen)
    return scores

# 2. Comparisons -----------------------------------------------------------------------------------

def differences(one: dict, other: dict) -> np.ndarray:
    """One minus the other, {task: score} each, on the tasks that both have."""
    return np.array([one[task] - other[task] for task in sorted(set(one) & set(other))])

def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean."""
    half = scipy.stats.t.ppf((1 + share) / 2, len(values) - 1) * scipy.stats.sem(values)
    return values.mean() - half, values.mean() + half

def brackets(values: np.ndarray, share: float = 0.95, digits: int = 2) -> str:
    """Their interval, with signs. Three digits where two would hide a rule."""
    low, high = interval(values, share)
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"

def over_tasks(values: np.ndarray) -> str:
    """Mean and 95 % interval over tasks, with signs."""
    return f"{values.mean():+.2f} {brackets(values)}"

def sign_flips(values: np.ndarray) -> float:
    """The p of differences: could their signs be chance?"""
    return vlmrm.paired_p_value(values, np.zeros(len(values)))

def p_cell(values: np.ndarray) -> str:
    """That p, for a table. It is never 0: there are 10,000 flips at most."""
    return f"{sign_flips(values):.3f}".replace("0.000", "< 0.001")

def verdict(values: np.ndarray) -> str:
    """What differences say: the rule that was written down before the first run."""
    low, high = interval(values)
    if low > 0:
        return "more"
    if high < 0:
        return "less"
    low, high = interval(values, 0.9)
    if -MARGIN < low and high < MARGIN:
        return "equivalent"
    return "undecided"

def planned(scores: dict, chosen: set[str]) -> dict[tuple, np.ndarray]:
    """The planned comparisons: {(one arm, another, title of the metric): differences}. The third
    question is asked if ours is not that arm everywhere."""
    every = ("VOC", OPPOSITE, "ranking at the same time")
    pairs = [("triplet", "r3m", every[::2])]  # asked in two metrics only
    if chosen != {"none"}:
        pairs.append(("ours", "triplet", every))
    if chosen != {"triplet + directions"}:
        pairs.append(("triplet + directions", "triplet", every))
    found = {}
    for one, other, titles in pairs:
        for title in titles:
            metric = COLUMNS[title]
            values = differences(scores[one][metric], scores[other][metric])
            if len(values):
                found[one, other, title] = values
    return found

# 3. Tables ----------------------------------------------------------------------------------------

def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without minus before a zero."""
    text = common.markdown_table([titles, *rows])
    return re.sub(r"-0\.00(?!\d)", "0.00", text)

def label(arm: str, chosen: set[str]) -> str:
    """An arm's name, and what is special about it."""
    if chosen == {arm}:
        return f"`{arm}` (the rule's choice)"
    if arm in CONTROLS:
        return f"`{arm}` (control)"
    if arm == "zeroshot":
        return "`zeroshot` (no training)"
    return f"`{arm}`"

def cells(by_metric: dict, titles) -> list[str]:
    """Means over tasks."""
    row = []
    for title in titles:
        values = list(by_metric[COLUMNS[title]].values())
        if values:
            row.append(f"{np.mean(values):.2f}")
        else:
            row.append("")
    return row

def in_order(scores: dict) -> list[str]:
    """The arms by VOC, the controls last."""
    def place(arm):
        return arm in CONTROLS, -np.mean(list(scores[arm]["voc"].values()))

    return sorted(scores, key=place)

def grouped(runs: dict, make) -> str:
    """One table for each group of arms: make(scores, folds). Folds stand above if they differ."""
    groups = groups_of(runs)
    parts = []
    for folds, arms in groups.items():
        text = make(trial_scores(runs, arms, folds), folds)
        if len(groups) > 1:
            text = f"Folds tested: {', '.join(map(str, folds))}\n\n{text}"
        parts.append(text)
    return "\n\n".join(parts)

def short_table(scores: dict, chosen: set[str]) -> str:
    """The arms, but for candidates of three terms, in three columns."""
    titles = list(COLUMNS)[:3]
    rows = []
    for arm in in_order(scores):
        if CANDIDATES.get(arm, 0) < 3:
            rows.append([label(arm, chosen), *cells(scores[arm], titles)])
    return table(["objective (tasks)", *with_counts(scores, titles)], rows)

def with_counts(scores: dict, titles) -> list[str]:
    """Titles with the number of tasks that have the metric."""
    return [f"{title} ({len(scores['triplet'][COLUMNS[title]])})" for title in titles]

def trial_table(scores: dict, choices: dict, chosen: set[str], folds) -> str:
    """Every arm on the tasks that it had not seen, how far its VOC is from triplet's, and the
    scores of its eight settings on the judges: worst, median and best."""
    titles = ["objective (tasks)", *with_counts(scores, COLUMNS), "VOC minus triplet's",
              "its settings"]
    rows = []
    for arm in in_order(scores):
        row = [label(arm, chosen)]
        row += cells(scores[arm], COLUMNS)
        away = ""
        if arm != "triplet":
            away = over_tasks(differences(scores[arm]["voc"], scores["triplet"]["voc"]))
        rows.append(row + [away, spread(choices, arm, folds)])
    return table(titles, rows)

def spread(choices: dict, arm: str, folds) -> str:
    """The scores of the eight settings of an arm, of all folds: worst, median, best."""
    if not ARMS[arm][0]:
        return ""  # nothing is trained
    tried = []
    for fold in folds:
        tried += [score(tasks) for tasks in tried_settings(choices, arm, fold)]
    text = f"{np.min(tried):.2f}, {np.median(tried):.2f}, {np.max(tried):.2f}"
    return text.replace("-inf", "diverged")

def planned_table(found: dict) -> str:
    """The answers to the planned questions."""
    rows = []
    for (one, other, title), values in found.items():
        row = [f"`{one}` minus `{other}`, {title}", str(len(values)), f"{values.mean():+.3f}"]
        row.append(brackets(values, 0.95, 3))
        row.append(brackets(values, 0.9, 3))
        row.append(f"{np.median(values):+.3f}")
        row.append(str((values > 0).sum()))
        row.append(p_cell(values))
        row.append(f"{scipy.stats.wilcoxon(values).pvalue:.3f}")
        row.append(verdict(values))
        rows.append(row)
    return table(["question", "tasks", "mean", "95 % interval", "90 %", "median", "tasks with more",
                  "p, sign flips", "p, Wilcoxon", "so"], rows)

def settings_table(choices: dict, runs: dict) -> str:
    """What was chosen for each arm in each fold."""
    rows = []
    for arm, fold in itertools.product(ARMS, folds_of(runs)):
        if not ARMS[arm][0] or fold not in folds_of(runs, arm):
            continue
        best = best_setting(choices, arm, fold)
        setting = settings_of(arm)[best]
        row = [f"`{arm}`", str(fold), "all weights"]
        if setting["lora"]:
            row[-1] = "adapters"
        row.append(f"{setting['learning_rate']:g}")
        row.append(str(setting["steps"]))
        row.append(str(setting["constants"]).strip("{}").replace("'", ""))
        row.append(f"{score(tried_settings(choices, arm, fold)[best]):.2f}")
        rows.append(row)
    return table(["objective", "fold", "trained", "rate", "steps", "constants", "score"], rows)

def counts_sentences(scores: dict, choices: dict, runs: dict) -> str:
    """What the trial rests on so far, and what the rule for ours did."""
    judged = folds_of(runs, *CANDIDATES)
    pairs = sorted(scores["zeroshot"]["pairs_same_time"].values())
    few = sum(count < vlmrm.FEWEST_PAIRS for count in pairs)
    kept = []
    for fold, arm in itertools.product(judged, CANDIDATES):
        kept += list(reads(choices, arm, fold))
    text = (f"{len(folds_of(runs))} of 5 folds are there: {len(pairs)} tasks with "
            f"{np.median(pairs):,.0f} pairs of frames at the same time in the median, "
            f"{pairs[0]:,.0f} at least; {few} of them have fewer than {vlmrm.FEWEST_PAIRS}. "
            f"Of the candidates' {len(kept)} settings {sum(kept)} kept four fifths of the start's "
            "gap on the judges. Ours is")
    for fold in judged:
        text += f" `{ours(choices, fold)}` in fold {fold},"
    return text.rstrip(",") + "."

def result_sentence(scores: dict, found: dict, folds: list[int]) -> str:
    """The first planned question and its answer."""
    parts = []
    for (one, other, title), values in found.items():
        if (one, other) == ("triplet", "r3m"):
            parts.append(f"{title} {values.mean():+.3f} {brackets(values, 0.95, 3)}, "
                         f"{verdict(values)} (p = {p_cell(values)})".replace("= <", "<"))
    count = len(scores["triplet"]["voc"])
    return (f"**On {count} unseen tasks, {len(folds)} of 5 folds, `triplet` "
            f"minus `r3m`: {'; '.join(parts)}.** Brackets are 95 % intervals over tasks, p is of "
            f"sign flips, not corrected for the {len(found)} planned comparisons.")

def benchmark_table(measured: dict) -> str:
    """Pictures a second of each part."""
    rows = []
    for text, part, suffix in (
            ("collection on one core: simulated, drawn, packed", "collection", ""),
            ("collection, 24 kept of an episode's 150", "collection", "_24_of_150"),
            ("training step", "training", ""), ("evaluation", "evaluation", "")):
        speed = measured[part]["ours" + suffix]
        row = [text, f"{speed:.0f}", ""]
        if not suffix:
            limit = measured[part]["bare"]
            row[2] = f"{limit:.0f} ({speed / limit:.2f})"
        rows.append(row)
    return table(["frames/s", "ours", "limit (ours / it)"], rows)

# 4. Does a reward guide? --------------------------------------------------------------------------

def guide_scores(guide: dict) -> dict[str, dict]:
    """{row: {"gain": {task: AUROC}, "done": {task: share of its starts}, "said": [of each plan],
    "liked": [the same]}} of guide.json. Of a task with few pairs there is no gain. Raises
    InputError unless all is there."""
    if len(guide["gain"]) < 50 or len(guide["plans"]) < STARTS * len(TASKS):
        raise vlmrm.InputError("guide.json is not whole: give the command of guide.py again")
    scores = defaultdict(lambda: {"gain": {}, "done": {}, "said": [], "liked": []})
    for task, gains in guide["gain"].items():
        for row, value in gains.items():
            if not np.isnan(value):
                scores[row]["gain"][task] = value
    for name, plans in guide["plans"].items():
        task = name.split(",")[0]
        for row, plan in plans.items():
            found = scores[row]
            found["done"].setdefault(task, []).append(plan["done"])
            for what in ("said", "liked"):
                if what in plan:
                    found[what].append(plan[what])
    for found in scores.values():
        found["done"] = {task: float(np.mean(starts)) for task, starts in found["done"].items()}
    return dict(scores)

def of_unseen(by_task: dict) -> dict:
    """The unseen tasks' part."""
    return {task: value for task, value in by_task.items() if vlmrm.group_of(task) == "unseen"}

def guide_table(scores: dict) -> str:
    """What each reward gains, and what comes of the plans that it likes best."""
    def mean(values):
        return f"{np.mean(list(values)):.2f}" if len(values) else ""

    rows = []
    for row in sorted(scores, key=lambda row: -np.mean(list(scores[row]["done"].values()))):
        found = scores[row]
        cells = [f"`{row}`", "", "", mean(found["done"].values()),
                 mean(of_unseen(found["done"]).values()), f"{np.median(found['said']):.2f}", ""]
        if found["gain"]:
            values = np.array(list(found["gain"].values()))
            low, high = interval(values)
            cells[1] = f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"
            cells[2] = mean(of_unseen(found["gain"]).values())
        if found["liked"]:
            cells[6] = f"{np.median(found['liked']):.2f}"
        rows.append(cells)
    gains = scores["triplet"]["gain"]
    done = scores["triplet"]["done"]
    return table(["plans by", f"gain ({len(gains)})", f"gain, unseen ({len(of_unseen(gains))})",
                  f"plans that get it done ({len(done)})", f"unseen ({len(of_unseen(done))})",
                  "the simulator's reward says", "the row's own says"], rows)

def guide_answers(scores: dict) -> dict[str, np.ndarray]:
    """The planned comparisons: {question: differences over tasks}."""
    def difference(one, other, what, part):
        return differences(part(scores[one][what]), part(scores[other][what]))

    gains = scores["triplet"]["gain"]
    found = {"gain of `triplet` minus .5": np.array(list(gains.values())) - 0.5}
    found["the same, unseen"] = np.array(list(of_unseen(gains).values())) - 0.5
    title = "gain of `triplet` minus `zeroshot`"
    found[title] = difference("triplet", "zeroshot", "gain", dict)
    found[title + ", unseen"] = difference("triplet", "zeroshot", "gain", of_unseen)
    title = "plans that get it done, `{}` minus `{}`"
    found[title.format("triplet", "zeroshot")] = difference("triplet", "zeroshot", "done", dict)
    found[title.format(SHAPED, "success")] = difference(SHAPED, "success", "done", dict)
    return found

def answers_table(found: dict[str, np.ndarray]) -> str:
    """Mean, interval, wins and p of each."""
    rows = []
    for question, values in found.items():
        row = [question, str(len(values)), f"{values.mean():+.3f}", brackets(values, 0.95, 3)]
        row.append(f"{(values > 0).sum()}, {(values < 0).sum()}")
        row.append(p_cell(values))
        rows.append(row)
    return table(["question", "tasks", "mean", "95 % interval", "tasks with more, with less", "p"],
                 rows)

def what_predicts(guide: dict, scores: dict) -> str:
    """Does a metric of models go with the success of their plans, all on unseen tasks? Spearman's
    correlation over the models, and its interval: 1,000 times as many models are drawn again, with
    replacement."""
    def mean(model, what):
        return np.mean(list(of_unseen(scores[model][what]).values()))

    models = sorted(guide["metrics"])
    done = np.array([mean(model, "done") for model in models])
    columns = {metric: [guide["metrics"][model][metric] for model in models] for metric in METRICS}
    columns["gain"] = [mean(model, "gain") for model in models]
    rows = []
    for metric, values in columns.items():
        values = np.array(values)
        drawn = []
        for places in np.random.default_rng(0).integers(0, len(models), (1000, len(models))):
            if np.ptp(values[places]) and np.ptp(done[places]):
                drawn.append(scipy.stats.spearmanr(values[places], done[places]).statistic)
        low, high = np.quantile(drawn, [0.025, 0.975])
        correlation = scipy.stats.spearmanr(values, done).statistic
        name = vlmrm.METRICS.get(metric, ("gain (AUROC)",))[0]
        rows.append([name, f"{correlation:+.2f}", f"[{low:+.2f}, {high:+.2f}]"])
    return table([f"over {len(models)} models", "correlation", "95 % interval"], rows)

def guide_tables(guide: dict) -> dict[str, str]:
    """All that the pages show of guide.json."""
    scores = guide_scores(guide)
    return {"guide": guide_table(scores), "answers": answers_table(guide_answers(scores)),
            "predicts": what_predicts(guide, scores)}

# 5. The pages -------------------------------------------------------------------------------------

def tables(root: Path) -> dict[str, str]:
    """All tables, by the names of the marks they stand between."""
    choices, runs = load(root)
    folds = folds_of(runs)
    if not folds:
        raise vlmrm.InputError(f"no fold is whole in {root / 'trial.json'}")
    scores = planned_scores(runs, choices)
    chosen = {ours(choices, fold) for fold in folds_of(runs, *CANDIDATES)}
    found = planned(scores, chosen)
    return {
        "result": result_sentence(scores, found, folds),
        "short": grouped(runs, lambda part, _: short_table(part, chosen)),
        "counts": counts_sentences(scores, choices, runs),
        "planned": planned_table(found),
        "trial": grouped(runs, lambda part, folds: trial_table(part, choices, chosen, folds)),
        "settings": settings_table(choices, runs),
        "default": (root / "default.md").read_text(encoding="utf-8"),
        "benchmark": benchmark_table(vlmrm.read_json(root / "benchmark.json")),
        **guide_tables(vlmrm.read_json(root / "guide.json"))}

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
