"""The runs behind the figures in data/results. It stays beside vlmrm.py to make them again, and is
none of the lesson: `python vlmrm.py --objective all --seeds 3` compares objectives without it.

    python data/study.py tune      choose rates and constants on left-out seen tasks: 20 minutes
    python data/study.py study     all objectives, three seeds, and controls: 40 minutes
    python data/study.py starts    of these the controls alone, the rest stays: 12 minutes
    python data/study.py folds     each task unseen in one of five folds: 50 minutes

The times are of two cores. Options of vlmrm.py may follow (--seeds, --steps, --runs, --device, ...;
tune also obeys --objective). The same command goes on with what was stopped.
"""
import argparse
import copy
import functools
import io
import itertools
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent))

import vlmrm  # before torch: see there

import numpy as np
import scipy.stats
import torch
from safetensors.torch import load_file

WAYS = {"LoRA": 8, "all weights": 0}  # of fine-tuning: the rank of its adapters; the default first
FIRST = next(iter(WAYS))
RATES = (2e-3, 5e-4)  # to try with adapters; with all weights a quarter of them

def all_objectives() -> dict[str, str]:
    """{name: what get_objective() takes}, those of vlmrm.py and those of data/objectives/."""
    return {name: name for name in vlmrm.OBJECTIVES} | {
        path.stem: str(path) for path in sorted((HERE / "objectives").glob("*.py"))}

def configure(args: argparse.Namespace, way: str = FIRST, **changes) -> dict:
    """The configuration of a run with these options changed, trained in this way."""
    job = argparse.Namespace(**vars(args) | {"lora": WAYS[way]} | changes)
    return vlmrm.configuration(job) | ({} if way == FIRST else tuned(job.objective, way))

def finish(args: argparse.Namespace, way: str = FIRST, **changes) -> tuple[Path, dict]:
    """Do one run, unless it is done. Returns its folder and metrics."""
    config = configure(args, way, **changes)
    return (folder := vlmrm.folder_for(config, args.runs)), vlmrm.run(config, folder, args.device)

def trains(objective: str) -> bool:
    return bool(vlmrm.get_objective(objective)["loss"])

# Its linear map starts from random weights: there is nothing to adapt.
THUMBNAIL = {"backbone": "thumbnail", "objective": "triplet", "lora": 0}

def study(args: argparse.Namespace) -> None:
    """Compare all objectives over several seeds, and the controls."""
    gather([(name, way, {"objective": objective}) for way in WAYS
            for name, objective in all_objectives().items()] + controls(args), args)

def starts(args: argparse.Namespace) -> None:
    """The controls alone. Other rows of results.json stay."""
    gather(controls(args), args)

def controls(args: argparse.Namespace) -> list[tuple]:
    """Triplet on thumbnails and from other starts: (row of the table, way, changed options)."""
    return [("thumbnail", FIRST, THUMBNAIL)] + [
        (f"{objective}, {start}", way, {"objective": objective, "pretrained": weights})
        for start, weights in other_starts(args).items() for way in WAYS
        for objective in ("triplet", "zeroshot")]

def other_starts(args: argparse.Namespace) -> dict[str, str]:
    """{what the weights have seen: a file, or none}: the controls of the start."""
    warm, _ = finish(args, objective=all_objectives()["clip"], pretrained="none", steps=300,
                     learning_rate=1e-3, lora=0)
    return {"start on 40 sentences": str(warm / "model.safetensors"), "random weights": "none"} | (
        {"strict start": str(path)} if (path := HERE / "strict.safetensors").exists() else {})

def gather(jobs: list[tuple], args: argparse.Namespace) -> None:
    """Do these jobs, of controls(), with all seeds, and write results.json; of the first seed and
    way rewards.npz, and reading.json: what is between start and end. Rows of other jobs stay."""
    def rounded(content):  # but not a configuration: rates are small
        return json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 4))

    runs = [(row, way, *finish(args, way, seed=seed, **changes))
            for seed in range(args.seed, args.seed + args.seeds) for row, way, changes in jobs
            # Without training all seeds and ways are alike.
            if trains(changes["objective"]) or (seed, way) == (args.seed, FIRST)]
    entries, rewards, reading, data = [], {}, {"door": {}, "between": {}}, vlmrm.Dataset(args.data)
    if (RESULTS / "results.json").exists():
        entries = [entry for entry in json.loads((RESULTS / "results.json").read_text())
                   if entry["row"] not in {row for row, _, _ in jobs}]
        rewards = dict(np.load(RESULTS / "rewards.npz"))
        reading = vlmrm.read_json(RESULTS / "reading.json")
    for row, way, folder, metrics in runs:
        config = vlmrm.read_json(folder / "config.json")
        add_metrics(metrics, folder, config, data)
        entries.append(rounded({"row": row, "way": way, "tasks": {
            task: {metric: scores[metric] for metric in ORDER if metric in scores}
            for task, scores in metrics["tasks"].items()}} | {
            key: metrics[key] for key in ("wall_seconds", "seen", "unseen")})
            | {"config": reduced(config)})
        if config["seed"] == args.seed and way == FIRST:
            rewards[f"{row}/predicted"] = np.float16(list(metrics["predicted"].values()))
            rewards[f"{row}/episodes"] = np.array([*metrics["predicted"]], int)
            if row in all_objectives() and trains(config["objective"]):
                reading["between"][row] = between(config, folder, data, args)
        if config["seed"] == args.seed and row in ("zeroshot", "triplet"):
            reading["door"][f"{row}, {way}"] = read_door(folder, data, args)
    vlmrm.write_whole(RESULTS / "results.json", (
        "[" + ",\n".join(json.dumps(entry) for entry in entries) + "]\n").encode())
    vlmrm.write_whole(RESULTS / "reading.json", rounded(reading))
    np.savez_compressed(RESULTS / "rewards.npz", **rewards)

def reduced(config: dict) -> dict:
    """What of a run's configuration is the same on every machine: no paths, no versions."""
    return {key: config[key] for key in (
        "seed", "backbone", "lora", "steps", "batch", "learning_rate", "constants")} | {
        "pretrained": config["pretrained"] and Path(config["pretrained"]).name,
        "sha256": {key: config["sha256"].get(key)
                   for key in ("data", "instructions", "pretrained")}}

# -----------------------------------------------------------------------------
# What fine-tuning keeps of the start

def interpolate(start: dict, end: dict, share: float) -> dict:
    """Weights between two models of one shape. Source: WiSE-FT, 2109.01903, Wortsman et al."""
    return {name: torch.lerp(start[name], weight, share) for name, weight in end.items()}

def between(config: dict, folder: Path, data, args) -> dict[str, dict]:
    """{share of the way from the start to the trained weights: means over unseen tasks}."""
    sentences, parts = vlmrm.load_instructions(args.instructions), vlmrm.get_objective(
        config["objective"])
    model, found, data = vlmrm.prepare_model(config, args.device), {}, copy.copy(data)
    data.split = np.where(np.isin(data.task, vlmrm.UNSEEN_TASKS), data.split, "train")
    start, end = vlmrm.trained_weights(model), load_file(folder / "model.safetensors")
    start = {name: weight.clone() for name, weight in start.items()}
    for share in (0.25, 0.5, 0.75):
        vlmrm.put_weights(model, interpolate(start, end, share))
        report = vlmrm.evaluate(model, data, sentences, parts["reward"], parts["SENTENCES"])
        found[f"{share}"] = {metric: cell["value"] for metric, cell in report["unseen"].items()}
    return found

def read_door(folder: Path, data, args) -> dict[str, list]:
    """Mean rewards (T,) of the experts of door-open under its instruction and the opposite one."""
    sentences, model = vlmrm.load_instructions(args.instructions), vlmrm.load_reward_model(folder)
    videos = data.load(data.select(task="door-open-v3", source="expert", split="test"))
    texts = (sentences[task]["instruction"] for task in ("door-open-v3", "door-close-v3"))
    return {text: np.mean([model.score(video, text) for video in videos], axis=0).tolist()
            for text in texts}

# -----------------------------------------------------------------------------
# Metrics that the lesson can do without

ORDER = ("voc", "ranking_accuracy_within", "ranking_accuracy_same_time")  # kept for each task

def epic_distance(predicted: np.ndarray, true_reward: np.ndarray) -> float:
    """EPIC, how far two rewards are from equal up to scale and offset: sqrt(1/2 (1 - Pearson)), 0
    is best; a constant counts Pearson 0. For rewards of the next state EPIC's canonical form only
    subtracts a constant, which Pearson ignores. Source: Gleave et al., 2006.13900, with the 1/2 of
    its code."""
    p, r = (x - x.mean() for x in (np.float64(predicted), np.float64(true_reward)))
    scale = math.sqrt((p * p).sum() * (r * r).sum())
    return math.sqrt(max(0.0, 1 - ((p * r).sum() / scale if scale > 1e-12 * p.size else 0)) / 2)

def goal_image_reward(frames: torch.Tensor, expert: np.ndarray) -> np.ndarray:
    """The reward of whoever has seen the goal: -|o - g|, averaged over the last frames g of the
    OTHER experts of the task. frames (E, T, D), expert (E,) -> (E, T)."""
    goals = [frames[expert & (np.arange(len(expert)) != i), -1] for i in range(len(expert))]
    return np.stack([vlmrm.negative_distance(video[:, None], goal).mean(1)
                     for video, goal in zip(frames, goals)])

def failures_seen(experts: np.ndarray, failures: np.ndarray) -> float:
    """Share of failures (F, T) that end below 25 % of the experts (E, T) of their task."""
    return float((failures[:, -1] < np.quantile(experts[:, -1], 0.25)).mean())

def add_metrics(metrics: dict, folder: Path, config: dict, data) -> None:
    """Add EPIC and failures_seen() to the metrics of a run and, if it was trained without
    sentences, VOC and ranking accuracy of its rewards by goal images."""
    loss = vlmrm.get_objective(config["objective"])["loss"]
    model = vlmrm.load_reward_model(folder) if loss and not vlmrm.reads_instruction(loss) else None
    episodes, predicted = np.array([*metrics["predicted"]], int), np.array(
        list(metrics["predicted"].values()))
    for task, scores in metrics["tasks"].items():
        where = np.flatnonzero(data.task[episodes] == task)
        truth, expert = data.rewards[episodes[where]], data.source[episodes[where]] == "expert"
        scores["epic"] = epic_distance(predicted[where], truth)
        if (failed := ~data.success[episodes[where]].any(1) & ~expert).any():
            scores["failures_seen"] = failures_seen(
                predicted[where][expert], predicted[where][failed])
        if model and expert.sum() > 1:  # an expert's goal images are the others'
            with torch.inference_mode():
                frames = model.embed_frames(data.load(episodes[where])).cpu()
            reward = goal_image_reward(frames, expert)
            scores["goal_voc"] = vlmrm.value_order_correlation(reward[expert]).mean()
    for group in ("seen", "unseen"):
        for metric in ("epic", "failures_seen", "goal_voc"):
            values = [scores[metric] for task, scores in metrics["tasks"].items()
                      if vlmrm.group_of(task) == group and metric in scores]
            if values:
                metrics[group][metric] = {"value": np.mean(values)}

def paired_p_values(scores: dict[str, np.ndarray], reference: str) -> dict[str, float]:
    """Does each objective differ from the reference over the same tasks? scores: {objective:
    (tasks,)}. If nothing but chance set the two apart, each task's difference could as well have
    had the other sign: p is the share of all such flips (of 9,999 random ones beyond 13 tasks)
    whose mean lies as far from 0. Then Holm's correction: the smallest p times their number, the
    next times one less, and so on."""
    p = {name: scipy.stats.permutation_test(
        (values - scores[reference],), np.mean, permutation_type="samples",
        random_state=0).pvalue if len(values) > 1 else 1.0
        for name, values in scores.items() if name != reference}
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected

# -----------------------------------------------------------------------------
# Choosing rates and constants. Every third of the forty seen tasks is left out of training, and
# nothing but these judges: by the mean of VOC and 2 RA - 1, RA the ranking accuracy at the same
# time, on all their episodes. Without sentences, by VOC of the rewards by goal images.

def left_out() -> tuple[str, ...]:
    """The seen tasks that choose."""
    return tuple(sorted(task for task in vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
                        if vlmrm.group_of(task) == "seen")[::3])

@torch.inference_mode()
def judge(model, data, sentences: dict, tasks: tuple, by_goal: bool = False) -> float:
    """The mean over tasks of what chooses, -1 to 1."""
    scores = []
    for task in tasks:
        episodes = data.select(task=task)
        expert, truth = data.source[episodes] == "expert", data.rewards[episodes]
        frames = model.eval().embed_frames(data.load(episodes)).cpu()
        text = model.embed_texts([sentences[task]["instruction"]]).cpu()[0]
        reward = (goal_image_reward(frames, expert) if by_goal
                  else vlmrm.cosine_reward(frames, text).numpy())
        both = [vlmrm.value_order_correlation(reward[expert]).mean(),
                2 * vlmrm.ranking_accuracy(reward[~expert], truth[~expert], "same_time") - 1]
        scores.append(both[0] if by_goal else np.nanmean(both))
    return float(np.mean(scores))

def tune(args: argparse.Namespace) -> None:
    """Three values of one constant of each objective at the first of RATES, the best of them at the
    second, in both ways."""
    path, tasks, split = RESULTS / "tuning.json", left_out(), vlmrm.UNSEEN_TASKS
    sentences = vlmrm.load_instructions(args.instructions)
    vlmrm.UNSEEN_TASKS += tasks
    data = vlmrm.Dataset(split_anew(vlmrm.Dataset(args.data), args.runs / "metaworld.npz"))
    base = vlmrm.configuration(argparse.Namespace(**vars(args) | {"objective": "zeroshot"}))
    base["batch"] = min(args.batch, 50 - len(vlmrm.UNSEEN_TASKS))
    settings = reduced(base)
    found = vlmrm.read_json(path) if path.exists() else {"settings": settings}
    if found["settings"] != settings:
        raise vlmrm.InputError(f"{path} was made with other settings: move it away")

    def validate(name: str, parts: dict, way: str, constant: str, rate: float, value: float):
        key = f"{way}, learning rate {rate:g}, {constant} {value:g}"
        scores = found.setdefault(name, {})
        if key not in scores:
            config = base | {"learning_rate": rate, "lora": WAYS[way]}
            loss, model = parts["loss"], vlmrm.prepare_model(config, args.device)
            vlmrm.train(model, data, sentences, functools.partial(loss, **{constant: value}),
                        config, parts["LABELS"])
            scores[key] = round(judge(model, data, sentences, tasks,
                                      by_goal=not vlmrm.reads_instruction(loss)), 4)
            vlmrm.write_whole(path, found)
        print(f"{name:18} {key:50} {scores[key]:6.3f}", flush=True)
        return scores[key]

    objectives = all_objectives().values() if args.objective == ["all"] else args.objective
    objectives = [some for some in objectives if trains(some) and some != "anchored"]  # by a hunt
    for objective, way in itertools.product(objectives, WAYS):
        parts = vlmrm.get_objective(objective)
        [(constant, values)] = parts["TUNED"][1].items()
        one = functools.partial(validate, Path(objective).stem, parts, way, constant)
        first, second = (rate / (1 if WAYS[way] else 4) for rate in RATES)
        one(second, max(sorted(values), key=functools.partial(one, first)))
    vlmrm.UNSEEN_TASKS = split

def tuned(objective: str, way: str) -> dict:
    """The rate and constant that tune() found best, if it had to choose them."""
    found = vlmrm.read_json(RESULTS / "tuning.json").get(Path(objective).stem)
    if not found:
        return {}
    scores = {key: score for key, score in found.items() if key.startswith(way)}
    _, rate, constant = max(scores, key=scores.get).split(", ")
    name, value = constant.split()
    return {"learning_rate": float(rate.split()[-1]), "constants": {name: float(value)}}

# -----------------------------------------------------------------------------
# Fold 0 is the split of vlmrm.py. The other forty tasks, in alphabetical order, are dealt out to
# four more, so that tasks alike (door-close, door-lock) come into different ones. The start serves
# all: it has seen no task. Every objective has one run a fold, with constants that left-out tasks
# of fold 0's forty chose: some tasks unseen in the others had a say in them.

def folds(args: argparse.Namespace) -> None:
    """Write folds.json: {row: [of each fold {unseen task: {metric: score}}]}."""
    shipped, split, found = vlmrm.Dataset(args.data), vlmrm.UNSEEN_TASKS, {}
    others = sorted(set(vlmrm.load_instructions(args.instructions)) - set(split))
    for fold in range(5):
        job = argparse.Namespace(**vars(args) | {"runs": args.runs / f"fold{fold}"})
        if fold:
            vlmrm.UNSEEN_TASKS = tuple(others[fold - 1::4])
            job.data = split_anew(shipped, job.runs / "metaworld.npz")
        rows = {name: finish(job, objective=objective)[1]
                for name, objective in all_objectives().items()}
        rows["thumbnail"] = finish(job, **THUMBNAIL)[1]
        for objective, way in itertools.product(("triplet", "anchored"), [*WAYS][1:]):
            rows[f"{objective}, {way}"] = finish(job, way, objective=objective)[1]
        for row, metrics in rows.items():
            found.setdefault(row, []).append({
                task: {metric: round(scores[metric], 4) for metric in (*ORDER, "opposite_gap")
                       if metric in scores}
                for task, scores in metrics["tasks"].items() if vlmrm.group_of(task) == "unseen"})
    vlmrm.write_whole(RESULTS / "folds.json", found)

def split_anew(shipped, path: Path) -> Path:
    """Write the shipped episodes with the splits of the present UNSEEN_TASKS. Returns the path."""
    np.savez(file := io.BytesIO(), **dict(np.load(shipped.path)) | {"split": np.array([
        episode["split"] for task in dict.fromkeys(shipped.task)
        for episode in vlmrm.assign_splits([
            {"task": task, "source": shipped.source[e]} for e in shipped.select(task=task)])])})
    path.parent.mkdir(parents=True, exist_ok=True)
    vlmrm.write_whole(path, file.getvalue())
    return path

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tune", "study", "starts", "folds"))
    own, rest = parser.parse_known_args()
    args = vlmrm.parse_arguments([
        "--objective", "all", "--seeds", "3", "--runs",
        "runs/study" if own.part == "starts" else f"runs/{own.part}", *rest])
    try:
        {"tune": tune, "study": study, "starts": starts, "folds": folds}[own.part](args)
    except vlmrm.InputError as problem:
        sys.exit(f"study: {problem}")
    except KeyboardInterrupt:
        sys.exit("\nstudy: stopped; the same command goes on")

if __name__ == "__main__":
    main()
