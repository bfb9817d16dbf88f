"""The runs behind the figures in data/results.

    python data/study/study.py tune      choose rates and constants on left-out tasks: 20 minutes
    python data/study/study.py study     all objectives, three seeds, and controls: 40 minutes
    python data/study/study.py folds     each task unseen in one of five folds: 50 minutes

The times are of two cores. Options of vlmrm.py may follow (--seeds, --steps, --runs, --device, ...;
tune also obeys --objective). The same command goes on with what was stopped.
"""
import argparse
import functools
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import vlmrm

RESULTS = vlmrm.DATA / "results"
WAYS = {"LoRA": 8, "all weights": 0}  # of fine-tuning: the rank of its adapters; the default first
FIRST = "LoRA"
ORDER = ("voc", "ranking_accuracy_within", "ranking_accuracy_same_time")  # kept for each task

DOOR = ("door-open-v3", "door-close-v3")  # for reading.json

# A run of the study is a job: {"row" of the tables, "objective", "way", maybe "pretrained"}.

def all_objectives() -> dict[str, str]:
    """{name: what get_objective() takes}, those of vlmrm.py and those of data/objectives/."""
    objectives = {name: name for name in vlmrm.OBJECTIVES}
    for path in sorted((vlmrm.DATA / "objectives").glob("*.py")):
        objectives[path.stem] = str(path)
    return objectives

def jobs_of(way: str) -> list[dict]:
    """A job of each objective."""
    return [{"row": name, "objective": objective, "way": way}
            for name, objective in all_objectives().items()]

THUMBNAIL = {"row": "thumbnail", "objective": "triplet", "way": FIRST}

def configure(job: dict, args: argparse.Namespace, seed: int = 0) -> dict:
    """The configuration of a job: the options, and what tune() chose for all weights."""
    options = dict(vars(args), lora=WAYS[job["way"]], pretrained=job.get("pretrained"))
    if job == THUMBNAIL:
        options["lora"] = 0  # its map starts from random weights: there is nothing to adapt
    config = vlmrm.configuration(argparse.Namespace(**options), job["objective"], seed)
    if job["way"] != FIRST:
        config.update(tuned(Path(job["objective"]).stem, job["way"]))
    return config

def finish(job: dict, args: argparse.Namespace, seed: int) -> tuple[dict, Path, dict]:
    """Do a job, unless it is done. Returns its configuration, folder and metrics."""
    config = configure(job, args, seed)
    if job == THUMBNAIL:
        return run_thumbnail(config, args.runs)
    folder, metrics = vlmrm.run(config, args.runs, args.device)
    return config, folder, metrics

def run_thumbnail(config: dict, runs: Path) -> tuple[dict, Path, dict]:
    """A control: a linear map of 12 x 12 pixels in place of the vision tower."""
    data = vlmrm.Dataset(config["data"])
    instructions = vlmrm.load_instructions(config["instructions"], data.task)
    model = vlmrm.prepare_model(config, "cpu")
    model.clip.visual = nn.Sequential(
        nn.AdaptiveAvgPool2d(12), nn.Flatten(), nn.Linear(3 * 12 * 12, 128))
    config["backbone"] = "thumbnail"
    folder, _ = vlmrm.claim_folder(config, runs)
    if not (folder / "metrics.json").exists():
        loss = functools.partial(vlmrm.triplet_loss, **config["constants"])
        vlmrm.train(model, data, instructions, loss, config)
        report = vlmrm.evaluate(model, data, instructions)
        vlmrm.write_whole(folder / "metrics.json", vlmrm.to_json(report))
    return config, folder, vlmrm.read_json(folder / "metrics.json")

def kept(scores: dict, metrics: tuple) -> dict:
    """Some metrics of a task, as far as it has them, in four digits."""
    return {metric: round(scores[metric], 4) for metric in metrics if metric in scores}

def reduced(config: dict) -> dict:
    """What of a run's configuration is the same on every machine: no paths, no versions."""
    names = ("seed", "backbone", "lora", "steps", "batch", "learning_rate", "constants")
    result = {name: config[name] for name in names}
    weights = Path(config["pretrained"]).name
    result["pretrained"] = None if weights == "tiny.safetensors" else weights
    files = ("data", "instructions", "pretrained")
    result["sha256"] = {name: config["sha256"].get(name) for name in files}
    return result

# 1. The study: every objective in both ways of fine-tuning, and the controls ----------------------

WARM_UP = {"steps": 300, "learning_rate": 1e-3, "lora": 0, "pretrained": "none"}

def controls(args: argparse.Namespace) -> list[dict]:
    """Triplet on thumbnails, and from weights that have seen other things."""
    options = argparse.Namespace(**dict(vars(args), **WARM_UP))
    config = vlmrm.configuration(options, all_objectives()["clip"], args.seed)
    folder, _ = vlmrm.run(config, args.runs, args.device)
    starts = {"start on 40 sentences": folder / "model.safetensors", "random weights": "none"}
    strict = Path("runs/starts/fold0.safetensors")  # made by scenes.py
    if strict.exists():
        starts["strict start"] = strict
    jobs = [THUMBNAIL]
    for start, weights in starts.items():
        for way in WAYS:
            for objective in ("triplet", "zeroshot"):
                jobs.append({"row": f"{objective}, {start}", "objective": objective, "way": way,
                             "pretrained": weights})
    return jobs

def study(args: argparse.Namespace) -> None:
    """Write results.json; of the first seed and way rewards.npz; and reading.json: of door-open."""
    data = vlmrm.Dataset(args.data)
    instructions = vlmrm.load_instructions(args.instructions, data.task)
    jobs = jobs_of(FIRST) + jobs_of("all weights") + controls(args)
    results = []
    rewards = {}
    doors = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for job in jobs:
            row = job["row"]
            trained = vlmrm.get_objective(job["objective"])["loss"] is not None
            first = seed == args.seed and job["way"] == FIRST
            if not trained and not first:
                continue  # without training all seeds and ways are alike
            config, folder, metrics = finish(job, args, seed)
            add_metrics(metrics, folder, config, data)
            results.append(saved(job, config, metrics))
            if first:
                predicted = metrics["predicted"]
                rewards[f"{row}/predicted"] = np.float16(list(predicted.values()))
                rewards[f"{row}/episodes"] = np.array(list(predicted), int)
            if seed == args.seed and row in ("zeroshot", "triplet"):
                doors[f"{row}, {job['way']}"] = read_door(folder, data, instructions)
    lines = ",\n".join(json.dumps(result) for result in results)
    vlmrm.write_whole(RESULTS / "results.json", f"[{lines}]\n".encode())
    vlmrm.write_whole(RESULTS / "reading.json", vlmrm.to_json(rounded({"door": doors})))
    np.savez_compressed(RESULTS / "rewards.npz", **rewards)

def rounded(content: dict) -> dict:
    """The same with four digits."""
    return json.loads(json.dumps(content), parse_float=lambda digits: round(float(digits), 4))

def saved(job: dict, config: dict, metrics: dict) -> dict:
    """What results.json keeps of a run. (The rates of its configuration are not rounded.)"""
    tasks = {task: kept(scores, ORDER) for task, scores in metrics["tasks"].items()}
    groups = rounded({"seen": metrics["seen"], "unseen": metrics["unseen"]})
    return {"row": job["row"], "way": job["way"], "tasks": tasks, **groups,
            "config": reduced(config)}

def read_door(folder: Path, data, instructions: dict) -> dict[str, list]:
    """Mean rewards (T,) of the experts of the first DOOR under its instruction and the other's."""
    model = vlmrm.load_reward_model(folder)
    videos = data.load(data.select(task=DOOR[0], source="expert", split="test"))
    curves = {}
    for task in DOOR:
        sentence = instructions[task]["instruction"]
        rewards = [model.score(pictures, sentence) for pictures in videos]
        curves[sentence] = np.mean(rewards, axis=0).tolist()
    return curves

# 2. Metrics that the lesson can do without --------------------------------------------------------

def epic_distance(predicted: np.ndarray, true_reward: np.ndarray) -> float:
    """EPIC, how far two rewards are from equal up to scale and offset: sqrt(1/2 (1 - Pearson)), 0
    is best; a constant counts Pearson 0. For rewards of the next state EPIC's canonical form only
    subtracts a constant, which Pearson ignores. Source: Gleave et al., 2006.13900, with the 1/2 of
    its code."""
    p = np.float64(predicted)
    r = np.float64(true_reward)
    p = p - p.mean()
    r = r - r.mean()
    scale = math.sqrt((p * p).sum() * (r * r).sum())
    pearson = (p * r).sum() / scale if scale > 1e-12 * p.size else 0.0
    return math.sqrt(max(0.0, 1 - pearson) / 2)

def goal_image_reward(frames: torch.Tensor, expert: np.ndarray) -> np.ndarray:
    """The reward of whoever has seen the goal: -|o - g|, averaged over the last frames g of the
    OTHER experts of the task. frames (E, T, D), expert (E,) -> (E, T)."""
    rewards = []
    for i, video in enumerate(frames):
        others = expert & (np.arange(len(expert)) != i)
        rewards.append(vlmrm.negative_distance(video[:, None], frames[others, -1]).mean(1))
    return np.stack(rewards)

def trained_model(folder: Path, config: dict):
    """The model of a run, also of one whose cosine is not trained."""
    model = vlmrm.prepare_model(config, "cpu").eval()
    vlmrm.put_weights(model, load_file(folder / "model.safetensors"))
    return model

@torch.inference_mode()
def add_metrics(metrics: dict, folder: Path, config: dict, data) -> None:
    """Add EPIC to the metrics of a run and, if it was trained without sentences, VOC of its rewards
    by goal images."""
    model = None
    if not config["cosine"] and vlmrm.get_objective(config["objective"])["loss"]:
        model = trained_model(folder, config)
    for task, scores in metrics["tasks"].items():
        episodes = [e for e in map(int, metrics["predicted"]) if data.task[e] == task]
        predicted = np.array([metrics["predicted"][str(e)] for e in episodes])
        expert = data.source[episodes] == "expert"
        scores["epic"] = epic_distance(predicted, data.rewards[episodes])
        if model and expert.sum() > 1:  # an expert's goal images are the others'
            reward = goal_image_reward(model.embed_frames(data.load(episodes)), expert)
            scores["goal_voc"] = vlmrm.value_order_correlation(reward[expert]).mean()
    for group in ("seen", "unseen"):
        for metric in ("epic", "goal_voc"):
            values = [scores[metric] for task, scores in metrics["tasks"].items()
                      if vlmrm.group_of(task) == group and metric in scores]
            if values:
                metrics[group][metric] = {"value": np.mean(values)}

def corrected_p_values(scores: dict[str, np.ndarray], reference: str) -> dict[str, float]:
    """paired_p_value() of all others against the reference, {objective: scores (tasks,)}. Holm's
    correction: the smallest p times their number, the next times one less, and so on."""
    p = {name: vlmrm.paired_p_value(values, scores[reference])
         for name, values in scores.items() if name != reference}
    corrected = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected

# 3. Choosing rates and constants ------------------------------------------------------------------
# Every third of the forty seen tasks is left out of training, and nothing but these judges: by the
# mean of VOC and 2 RA - 1, RA the ranking accuracy at the same time, on all their episodes. Without
# sentences, by VOC of the rewards by goal images.

RATES = (2e-3, 5e-4)  # of adapters; with all weights a quarter of them
GRIDS = {  # three values of its constant at the first rate, the best of them at the second
    "triplet": (0.05, 0.1, 0.2), "r3m": (0.1, 0.3, 1.0), "liv": (0.03, 0.1, 1.0),
    "tcn": (0.1, 0.3, 1.0), "tcn-text": (0.03, 0.1, 1.0),
    "vip": (1.0, 5.0, 20.0), "vip-text": (1.0, 5.0, 20.0),
    "hilp": (1.0, 5.0, 20.0), "hilp-text": (1.0, 5.0, 20.0),
    "decisionnce-p": (3.0, 10.0, 100.0), "decisionnce-t": (3.0, 10.0, 100.0),
    "preference": (1.0, 20.0, 100.0), "preference-oracle": (1.0, 20.0, 100.0),
    "hop": (5.0, 10.0, 20.0), "progress": (5.0, 10.0, 20.0), "timerewarder": (1.25, 2.5, 5.0),
    "clip": (5.0, 1 / 0.07, 50.0), "vlc": (1.0, 20.0, 100.0),
}

def left_out() -> tuple[str, ...]:
    """The seen tasks that choose."""
    tasks = sorted(vlmrm.load_instructions(vlmrm.DATA / "instructions.json"))
    return tuple([task for task in tasks if vlmrm.group_of(task) == "seen"][::3])

@torch.inference_mode()
def judge(model, data, instructions: dict, tasks: tuple, by_goal: bool) -> float:
    """The mean over tasks of what chooses, -1 to 1."""
    model.eval()
    scores = []
    for task in tasks:
        episodes = data.select(task=task)
        truth = data.rewards[episodes]
        expert = data.source[episodes] == "expert"
        frames = model.embed_frames(data.load(episodes)).cpu()
        text = model.embed_texts([instructions[task]["instruction"]]).cpu()[0]
        reward = goal_image_reward(frames, expert) if by_goal else (frames @ text).numpy()
        voc = vlmrm.value_order_correlation(reward[expert]).mean()
        ranking = vlmrm.ranking_accuracy(reward[~expert], truth[~expert], "same_time")
        scores.append(voc if by_goal else np.nanmean([voc, 2 * ranking - 1]))
    return float(np.mean(scores))

def tune(args: argparse.Namespace) -> None:
    """Write tuning.json: {objective: {setting: score}}, in both ways of fine-tuning."""
    path = RESULTS / "tuning.json"
    config = configure({"objective": "zeroshot", "way": FIRST}, args)
    config["learning_rate"] = 0.0  # each setting has its own
    tasks = left_out()
    vlmrm.UNSEEN_TASKS += tasks
    config["batch"] = min(args.batch, 50 - len(vlmrm.UNSEEN_TASKS))
    data = vlmrm.Dataset(split_anew(vlmrm.Dataset(args.data), args.runs / "metaworld.npz"))
    instructions = vlmrm.load_instructions(args.instructions, data.task)
    found = vlmrm.read_json(path) if path.exists() else {"settings": reduced(config)}
    if found["settings"] != reduced(config):
        raise vlmrm.InputError(f"{path} was made with other settings: move it away")

    def try_out(value: float, objective: str, way: str, rate: float) -> float:
        parts = vlmrm.get_objective(objective)
        [constant] = parts["TUNED"][1]
        scores = found.setdefault(Path(objective).stem, {})
        key = f"{way}, learning rate {rate:g}, {constant} {value:g}"
        if key not in scores:
            setting = dict(config, learning_rate=rate, lora=WAYS[way], cosine=parts["COSINE"])
            model = vlmrm.prepare_model(setting, args.device)
            loss = functools.partial(parts["loss"], **{constant: value})
            vlmrm.train(model, data, instructions, loss, setting, parts["LABELS"])
            score = judge(model, data, instructions, tasks, by_goal=not parts["COSINE"])
            scores[key] = round(score, 4)
            vlmrm.write_whole(path, vlmrm.to_json(found))
        print(f"{Path(objective).stem:18} {key:50} {scores[key]:6.3f}", flush=True)
        return scores[key]

    chosen = all_objectives().values() if args.objective == ["all"] else args.objective
    for objective in chosen:
        values = GRIDS.get(Path(objective).stem, ())  # others have no constant, or one of a hunt
        for way in WAYS if values else ():
            first, second = np.array(RATES) / (1 if WAYS[way] else 4)
            best = max(values, key=lambda value: try_out(value, objective, way, first))
            try_out(best, objective, way, second)

def tuned(name: str, way: str) -> dict:
    """The rate and constant that tune() found best, if it had to choose them."""
    scores = vlmrm.read_json(RESULTS / "tuning.json").get(name, {})
    scores = {key: score for key, score in scores.items() if key.startswith(way)}
    if not scores:
        return {}
    _, rate, constant = max(scores, key=scores.get).split(", ")
    constant, value = constant.split()
    return {"learning_rate": float(rate.split()[-1]), "constants": {constant: float(value)}}

# 4. Folds -----------------------------------------------------------------------------------------
# Fold 0 is the split of vlmrm.py. The other forty tasks, in alphabetical order, are dealt out to
# four more, so that tasks alike (door-close, door-lock) come into different ones. The start serves
# all: it has seen no task. Every objective has one run a fold, with constants that left-out tasks
# of fold 0's forty chose: some tasks unseen in the others had a say in them.

def folds(args: argparse.Namespace) -> None:
    """Write folds.json: {row: [of each fold {unseen task: {metric: score}}]}."""
    jobs = [*jobs_of(FIRST), THUMBNAIL]
    for job in jobs_of("all weights"):
        if job["row"] in ("triplet", "anchored"):
            jobs.append(dict(job, row=f"{job['row']}, all weights"))
    shipped = vlmrm.Dataset(args.data)
    others = sorted(set(vlmrm.load_instructions(args.instructions)) - set(vlmrm.UNSEEN_TASKS))
    runs = args.runs
    rows = {job["row"]: [] for job in jobs}
    for fold in range(5):
        args.runs = runs / f"fold{fold}"
        if fold:
            vlmrm.UNSEEN_TASKS = tuple(others[fold - 1::4])
            args.data = split_anew(shipped, args.runs / "metaworld.npz")
        for job in jobs:
            _, _, metrics = finish(job, args, args.seed)
            rows[job["row"]].append({
                task: kept(scores, (*ORDER, "opposite_gap"))
                for task, scores in metrics["tasks"].items() if vlmrm.group_of(task) == "unseen"})
    vlmrm.write_whole(RESULTS / "folds.json", vlmrm.to_json(rows))

def new_splits(data) -> np.ndarray:
    """The splits (E,) of a data set by the present UNSEEN_TASKS."""
    split = data.split.astype("U10")  # "validation" may not have been among them
    for task in np.unique(data.task):
        chosen = data.select(task=task)
        episodes = [{"task": task, "source": data.source[e]} for e in chosen]
        split[chosen] = [episode["split"] for episode in vlmrm.assign_splits(episodes)]
    return split

def split_anew(shipped, path: Path) -> Path:
    """Write the shipped episodes with the splits of the present UNSEEN_TASKS. Returns the path."""
    file = io.BytesIO()
    with np.load(shipped.path) as arrays:
        np.savez(file, **dict(arrays, split=new_splits(shipped)))
    path.parent.mkdir(parents=True, exist_ok=True)
    vlmrm.write_whole(path, file.getvalue())
    return path

def work(own: argparse.Namespace) -> None:
    """Do one part of the study."""
    args = vlmrm.parse_arguments(
        ["--objective", "all", "--seeds", "3", "--runs", f"runs/{own.part}", *own.options])
    {"tune": tune, "study": study, "folds": folds}[own.part](args)

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("study", description=__doc__)
    options.add_argument("part", choices=("tune", "study", "folds"))
    options.add_argument("options", nargs=argparse.REMAINDER, help="of vlmrm.py")
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
