"""The fair trial: every objective with the same budget, judged on tasks that nothing has seen.

    python vlmrm.py --collect --seed 1 --mixed 60 --data runs/trial.npz     the test episodes
    python data/study/scenes.py train --fold 0                 and 1 to 4: a start for each fold
    python data/study/trial.py choose     eight settings of each arm, on tasks left out of training
    python data/study/trial.py test       the best of them, three seeds, on the fold's unseen tasks

What is asked, and how it is decided, was written down before the first run: data/results/README.md.
Each stage keeps its results in a file in data/results and goes on with what was stopped.
"""
import argparse
import functools
import hashlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import safetensors
import scipy.stats

import vlmrm
from scenes import left_out
from workers import RESULTS, add_options, from_file, keep, side_by_side

CODE = ("vlmrm.py", "trial.py and the objectives")  # of the files that a run depends on
KEPT = ("voc", "voc_opposite", "voc_paraphrase", "ranking_accuracy_same_time",
        "pairs_same_time", "ranking_accuracy_within", "success_auroc", "retrieval_top1")

# 1. Arms and settings -----------------------------------------------------------------------------

directed = from_file("triplet-directions")

def mixture(frames, texts, times, before, margin: float = 0.1, directions: float = 0.0,
            keep: float = 0.0):
    """Triplet, with a contrast of directions or without, plus the distance of frames to where they
    were before training."""
    loss = directed(frames, texts, times, margin, directions)
    return loss + keep * (frames - before[0]).square().sum(dim=-1).mean()

# {arm: (loss, {constant: values})}. Each arm has at most two constants of its own.
ARMS = {
    "triplet": (vlmrm.triplet_loss, {"margin": (0.05, 0.1, 0.2)}),
    "r3m": (vlmrm.r3m_loss, {"temperature": (0.03, 0.1, 0.3), "negatives": (3, 10)}),
    "liv": (vlmrm.liv_loss, {"temperature": (0.03, 0.1, 1.0), "language_weight": (0.3, 1.0)}),
    "tcn-text": (from_file("tcn-text"), {"temperature": (0.03, 0.1, 0.3)}),
    "vip-text": (from_file("vip-text"), {"scale": (2.0, 5.0, 20.0)}),
    "timerewarder": (from_file("timerewarder"), {"scale": (0.6, 1.25, 2.5)}),
    "decisionnce-t": (from_file("decisionnce-t"), {"scale": (1.0, 3.0, 10.0)}),
    "hop": (from_file("hop"), {"scale": (5.0, 10.0, 20.0)}),
    "triplet + directions": (directed, {"margin": (0.05, 0.1, 0.2),
                                        "directions": (0.01, 0.03, 0.1)}),
    "triplet + keep": (mixture, {"margin": (0.05, 0.1, 0.2), "keep": (0.1, 0.3, 1.0)}),
    "triplet + keep + directions": (mixture, {"keep": (0.1, 0.3, 1.0),
                                              "directions": (0.01, 0.03, 0.1)}),
    "anchored": (from_file("anchored"), {"keep": (0.3, 1.0, 3.0),
                                         "directions": (0.03, 0.1, 0.3)}),
    "zeroshot": (None, {}),
    "clock": (None, {}),
    "distance-from-start": (None, {}),
    "simulator": (None, {}),  # its own reward
}
CONTROLS = ("clock", "distance-from-start", "simulator")  # only tested
# Ours may be one of these: {arm: number of its terms}. All but triplet have to go on reading.
CANDIDATES = {"triplet + directions": 2, "triplet + keep": 2, "triplet + keep + directions": 3,
              "anchored": 3}
RATES = (4e-3, 2e-3, 1e-3, 5e-4)  # of adapters; with all weights a quarter of them
SEEDS = 3
KEEPS = 0.8  # of the start's gap: what a candidate has to keep, to count

def settings_of(arm: str) -> list[dict]:
    """Eight settings of an arm: each rate with adapters and with all weights; steps and the places
    in the lists of constants are dealt out in an order that is the same for every arm."""
    loss, lists = ARMS[arm]
    rng = np.random.default_rng(0)
    steps = rng.permutation([60, 60, 60, 120, 120, 120, 240, 240])
    places = rng.permuted([[0, 0, 0, 1, 1, 1, 2, 2]] * 2, axis=1)
    settings = []
    for k, (lora, rate) in enumerate(itertools.product((8, 0), RATES)):
        setting = {"lora": lora, "learning_rate": rate, "steps": int(steps[k]), "constants": {}}
        if not lora:
            setting["learning_rate"] = rate / 4
        for place, (name, values) in zip(places, lists.items()):
            setting["constants"][name] = values[place[k] % len(values)]
        settings.append(setting)
    if not loss:
        return settings[:1]  # nothing is trained
    return settings

# 2. A run -----------------------------------------------------------------------------------------

def judges(fold: int) -> tuple[str, ...]:
    """Thirteen of the fold's forty tasks, which are left out of training to choose a setting: first
    up to three pairs of opposites, to see who reads without a sentence of the ten unseen tasks."""
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    seen = sorted(set(instructions) - set(left_out(fold)))
    chosen = []
    for task in seen:
        opposite = instructions[task].get("opposite")
        if opposite in seen and task not in chosen and len(chosen) < 6:
            chosen += [task, opposite]
    others = [task for task in seen if task not in chosen]
    missing = 13 - len(chosen)
    return (*chosen, *others[::len(others) // missing][:missing])

def split_anew(data, tasks: tuple) -> None:
    """Split the episodes by the present UNSEEN_TASKS, and test on these tasks alone."""
    data.split = data.split.astype("U10")  # "validation" may not have been among them
    for task in np.unique(data.task):
        chosen = data.select(task=task)
        episodes = [{"task": task, "source": data.source[e]} for e in chosen]
        data.split[chosen] = [episode["split"] for episode in vlmrm.assign_splits(episodes)]
    data.split[(data.split == "test") & ~np.isin(data.task, tasks)] = "validation"

def simulator_scores(data) -> dict[str, dict]:
    """VOC of the simulator's own reward, on experts to test on: {task: {"voc": score}}. It is below
    1: the reward of an expert does not rise with every step."""
    scores = {}
    for task in np.unique(data.task[data.split == "test"]):
        experts = data.select(split="test", source="expert", task=task)
        voc = vlmrm.value_order_correlation(data.rewards[experts]).mean()
        scores[str(task)] = {"voc": round(float(voc), 4)}
    return scores

def play(job: dict) -> dict[str, dict]:
    """Train an arm and test it: {task: {metric: score}}, or {} if it diverges. job: arm, fold,
    setting, seed, test (the unseen tasks, or the judges), start, data and trial, the files of
    training and of testing."""
    unseen = left_out(job["fold"])
    tested = unseen
    if job["test"] == "judges":
        tested = judges(job["fold"])
    vlmrm.UNSEEN_TASKS = tuple({*unseen, *tested})
    data = vlmrm.Dataset(job["data"])
    split_anew(data, tested)
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json", data.task)
    config = {"backbone": "tiny", "pretrained": job["start"], "seed": job["seed"], "cosine": True,
              "batch": min(40, len(vlmrm.training_episodes(data))), **job["setting"]}
    model = vlmrm.prepare_model(config, job["device"])
    loss, _ = ARMS[job["arm"]]
    if loss:
        loss = functools.partial(loss, **config["constants"])
        try:
            vlmrm.train(model, data, instructions, loss, config)
        except vlmrm.InputError as problem:
            if "the loss is" in str(problem):  # not finite
                return {}  # it diverged: worse than all others
            raise
    if job["test"] == "unseen":
        data = vlmrm.Dataset(job["trial"])
        split_anew(data, tested)
    if job["arm"] == "simulator":
        return simulator_scores(data)
    reward = vlmrm.cosine_reward
    if job["arm"] in CONTROLS:
        reward = from_file(job["arm"], "reward")
    kept = {}
    for task, scores in vlmrm.evaluate(model, data, instructions, reward)["tasks"].items():
        if job["test"] == "judges" and instructions[task].get("opposite") not in tested:
            scores.pop("voc_opposite", None)  # of pairs of judges alone
        kept[task] = {}
        for metric in KEPT:
            if metric in scores:
                kept[task][metric] = round(float(scores[metric]), 4)
    missing = set(tested) - set(kept)
    if missing:
        raise vlmrm.InputError(f"{data.path} has no episodes of {', '.join(sorted(missing))}")
    return kept

def check_files(found: dict, arm: str, fold: int, files: dict, goes_on: bool) -> None:
    """Raise InputError if an arm of this fold was made of other data: they could not be compared.
    An arm that goes on must have the same code, too."""
    for name, before in found["files"].items():
        if not name.endswith(f", fold {fold}"):
            continue
        for part in sorted(files):
            matters = part not in CODE or (goes_on and name == f"{arm}, fold {fold}")
            if matters and before.get(part) != files[part]:
                raise vlmrm.InputError(
                    f"{name} was begun with another {part}: move the results away, or put it back")

def play_all(jobs: dict[str, dict], path: Path, files_of, workers: int) -> dict:
    """Play the jobs that path has not, side by side, and keep each result at once. files_of(fold)
    is what they depend on: an arm that was begun with other files is not gone on with."""
    found = {"files": {}, "settings": {}, "runs": {}}
    if path.exists():
        found |= vlmrm.read_json(path)
    for arm in sorted({job["arm"] for job in jobs.values()}):
        if found["settings"].get(arm, settings_of(arm)) != settings_of(arm):
            raise vlmrm.InputError(f"{path}: {arm} had other settings: move it away")
    left = {key: job for key, job in jobs.items() if key not in found["runs"]}
    files = {}
    to_do = {(job["arm"], job["fold"]) for job in left.values()}
    for arm, fold in sorted({(job["arm"], job["fold"]) for job in jobs.values()}):
        if fold not in files:
            files[fold] = files_of(fold)
        check_files(found, arm, fold, files[fold], (arm, fold) in to_do)
    if not left:
        print(f"nothing is left to do: {path} has these {len(jobs)} runs")
    for key, tasks in side_by_side(play, left, workers, len(jobs), path.stem):
        arm = left[key]["arm"]
        fold = left[key]["fold"]
        found["runs"][key] = tasks
        found["settings"][arm] = settings_of(arm)
        found["files"][f"{arm}, fold {fold}"] = files[fold]
        found = keep(found, path)
    return found["runs"]

# 3. What chooses ----------------------------------------------------------------------------------

def mean_of(tasks: dict, metric: str) -> float:
    """Over the tasks that have it. Raises InputError if none has."""
    if not any(metric in scores for scores in tasks.values()):
        raise vlmrm.InputError(f"no task has {metric}: {', '.join(tasks)}")
    return float(np.mean([scores[metric] for scores in tasks.values() if metric in scores]))

def score(tasks: dict) -> float:
    """The mean of VOC and of 2 RA - 1, RA the ranking accuracy at the same time: -1 to 1; of a run
    that diverged minus infinity."""
    if not tasks:
        return -np.inf
    return (mean_of(tasks, "voc") + 2 * mean_of(tasks, "ranking_accuracy_same_time") - 1) / 2

def gap(tasks: dict) -> float:
    """VOC under the own sentence minus VOC under the opposite one, of the tasks that have one."""
    if not tasks:
        return -np.inf
    return float(np.mean([scores["voc"] - scores["voc_opposite"] for scores in tasks.values()
                          if "voc_opposite" in scores]))

def tried_settings(runs: dict, arm: str, fold: int) -> list[dict]:
    """The results of each setting of an arm."""
    return [runs[f"{arm}, fold {fold}, setting {k}"] for k in range(len(settings_of(arm)))]

def reads(runs: dict, arm: str, fold: int) -> np.ndarray:
    """Which settings of an arm keep four fifths of the gap of the start: bool (8,)."""
    [start] = tried_settings(runs, "zeroshot", fold)
    gaps = np.array([gap(tasks) for tasks in tried_settings(runs, arm, fold)])
    return gaps >= KEEPS * gap(start)

def best_setting(runs: dict, arm: str, fold: int) -> int:
    """The number of the best setting of an arm in a fold. A candidate of ours has to read; if none
    of its settings does, the one with the largest gap is taken."""
    tried = tried_settings(runs, arm, fold)
    scores = np.array([score(tasks) for tasks in tried])
    if arm in CANDIDATES:
        if not reads(runs, arm, fold).any():
            return int(np.argmax([gap(tasks) for tasks in tried]))
        scores[~reads(runs, arm, fold)] = -np.inf
    return int(scores.argmax())

def ours(runs: dict, fold: int) -> str:
    """Of the candidates within one standard error of the best one, over the judges, the one with
    the fewest terms; "none" if none reads."""
    readers = [arm for arm in CANDIDATES if reads(runs, arm, fold).any()]
    if not readers:
        return "none"
    scores = {}  # of each task that has pairs: (tasks,)
    for arm in readers:
        tasks = tried_settings(runs, arm, fold)[best_setting(runs, arm, fold)]
        scores[arm] = np.array([score({task: tasks[task]}) for task in sorted(tasks)
                                if "ranking_accuracy_same_time" in tasks[task]])
    order = sorted(readers, key=lambda arm: -scores[arm].mean())
    near = [order[0]]
    for arm in order[1:]:
        behind = scores[order[0]] - scores[arm]
        if behind.mean() <= scipy.stats.sem(behind):
            near.append(arm)
    return min(near, key=CANDIDATES.get)  # the better one of two that have as many

# 4. The two stages --------------------------------------------------------------------------------

def chosen_setting(args, arm: str, fold: int) -> int:
    """The best setting of an arm by choices.json, which must be of the same files and settings."""
    path = args.results / "choices.json"
    with vlmrm.reading(path):  # there, and whole
        choices = vlmrm.read_json(path)
        now = files_of(argparse.Namespace(**dict(vars(args), stage="choose")), fold)
        check_files(choices, arm, fold, now, goes_on=False)
        if choices["settings"][arm] != settings_of(arm):
            raise ValueError(f"{arm} had other settings")
        return best_setting(choices["runs"], arm, fold)

def jobs_of(args) -> dict[str, dict]:
    """The jobs of a stage, by name."""
    jobs = {}
    for fold, arm in itertools.product(args.folds, args.arms):
        job = {"arm": arm, "fold": fold, "start": args.starts / f"fold{fold}.safetensors",
               "data": args.data, "trial": args.trial, "device": args.device}
        settings = settings_of(arm)
        if args.stage == "choose":
            for k, setting in enumerate(settings if arm not in CONTROLS else []):
                jobs[f"{arm}, fold {fold}, setting {k}"] = dict(
                    job, setting=setting, test="judges", seed=0)
            continue
        best = 0
        if arm not in CONTROLS:
            best = chosen_setting(args, arm, fold)
        for seed in range(SEEDS if ARMS[arm][0] else 1):
            jobs[f"{arm}, fold {fold}, seed {seed}"] = dict(
                job, setting=settings[best], test="unseen", seed=seed)
    return jobs

def episodes_digest(path: Path, tasks: tuple) -> str:
    """SHA-256 of the episodes of some tasks: whatever else is in the file."""
    data = vlmrm.Dataset(path)
    found = hashlib.sha256()
    for e in np.flatnonzero(np.isin(data.task, tasks)):
        found.update(data.strips[data.offsets[e]:data.offsets[e + 1]].tobytes())
        found.update(data.rewards[e].tobytes() + data.success[e].tobytes())
        found.update(data.source[e].encode())
    return found.hexdigest()

def check_start(path: Path, fold: int) -> None:
    """Raise InputError if a start has seen what is unseen in this fold."""
    with vlmrm.reading(path), safetensors.safe_open(path, "np") as file:
        made_of = json.loads(file.metadata()["made_of"])
        known = set(made_of["environments"]) & set(left_out(fold))
        if known:
            raise ValueError(f"it has seen {min(known)}, which is unseen in fold {fold}")

def files_of(args, fold: int) -> dict[str, str]:
    """The checksums of all that the runs of a fold depend on."""
    code = [__file__, *sorted((vlmrm.DATA / "objectives").glob("*.py"))]
    checksums = dict(zip(CODE, (vlmrm.THIS_FILE, vlmrm.digest(*code))))
    files = {"data": args.data, "instructions": vlmrm.DATA / "instructions.json",
             "start": args.starts / f"fold{fold}.safetensors"}
    for name, path in files.items():
        with vlmrm.reading(path):
            checksums[name] = vlmrm.digest(path)
    check_start(files["start"], fold)
    if args.stage == "test":
        checksums["trial"] = episodes_digest(args.trial, left_out(fold))
    return checksums

def work(args) -> None:
    """Do a stage."""
    name = {"choose": "choices.json", "test": "trial.json"}[args.stage]
    files = functools.partial(files_of, args)
    jobs = jobs_of(args)
    if not jobs:
        raise vlmrm.InputError("controls have no settings to choose from: test them")
    runs = play_all(jobs, args.results / name, files, args.workers)
    if args.stage == "choose" and {"zeroshot", *CANDIDATES} <= set(args.arms):
        for fold in args.folds:
            print(f"fold {fold}: ours is {ours(runs, fold)}")

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("trial", description=__doc__)
    add = options.add_argument
    add("stage", choices=("choose", "test"))
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(all)")
    add("--folds", nargs="+", type=int, choices=range(5), default=[0, 1, 2, 3, 4], metavar="N",
        help="(0 to 4)")
    add("--data", type=Path, default=vlmrm.DATA / "metaworld.npz", help="to train on")
    add("--trial", type=Path, default=Path("runs/trial.npz"), help="to test on (runs/trial.npz)")
    add("--starts", type=Path, default=Path("runs/starts"), help="a folder (runs/starts)")
    add_options(options)
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
