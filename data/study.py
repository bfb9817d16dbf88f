"""The runs behind the figures in data/results. It stays beside vlmrm.py to make them again, and is
none of the lesson: `python vlmrm.py --objective all --seeds 3` compares objectives without it.

    python data/study.py study     all objectives, tuned and official, and a control: 90 minutes
    python data/study.py tune      choose their constants on validation episodes: 50 minutes
    python data/study.py folds     each task unseen in one of five folds: 80 minutes

The times are of two cores. Options of vlmrm.py may follow (--seeds, --steps, --runs, --device, ...;
tune also obeys --objective). The same command goes on with what was stopped.
"""
import argparse
import functools
import inspect
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # before torch: see there

import numpy as np
import scipy.stats
import torch

RATE = 2e-3  # of the runs with official constants: the authors' are for other optimisers

def all_objectives() -> dict[str, str]:
    """{name: what get_objective() takes}, those of vlmrm.py and those of data/objectives/."""
    return {name: name for name in vlmrm.OBJECTIVES} | {
        path.stem: str(path) for path in sorted((HERE / "objectives").glob("*.py"))}

def official(loss, constant: str) -> float:
    """The authors' own value of a constant: the default in the signature of the loss."""
    return inspect.signature(loss).parameters[constant].default

def settings_of(objective: str) -> tuple[str, ...]:
    """The settings that differ: where the official constants won on validation, there is one."""
    found = vlmrm.get_objective(objective)
    rate, constants = found["TUNED"]
    differs = found["loss"] and (rate != RATE or any(
        values[0] != official(found["loss"], constant) for constant, values in constants.items()))
    return ("tuned", "official") if differs else ("official",)

def configure(args: argparse.Namespace, setting: str = "tuned", **changes) -> dict:
    """The configuration of a run with these options changed, and with the authors' constants."""
    job = argparse.Namespace(**vars(args) | changes)
    authors = {"learning_rate": job.learning_rate or RATE, "constants": {}}
    return vlmrm.configuration(job) | (authors if setting == "official" else {})

def finish(args: argparse.Namespace, setting: str = "tuned", **changes) -> tuple[Path, dict]:
    """Do one run, unless it is done. Returns its folder and metrics."""
    config = configure(args, setting, **changes)
    return (folder := vlmrm.folder_for(config, args.runs)), vlmrm.run(config, folder, args.device)

def study(args: argparse.Namespace, results: Path) -> None:
    """Compare all objectives over several seeds. The last row is triplet on thumbnails."""
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [
        (name, setting, *finish(args, setting, objective=objective, seed=seed))
        for seed in seeds for name, objective in all_objectives().items()
        for setting in settings_of(objective)
        # Without training all seeds are alike.
        if seed == args.seed or vlmrm.get_objective(objective)["loss"]]
    runs += [
        ("thumbnail", "official", *finish(args, "official", objective="triplet", seed=seed,
                                          backbone="thumbnail")) for seed in seeds]
    gather(runs, vlmrm.Dataset(args.data), args.seed, results)

def gather(runs: list[tuple], data, seed: int, results: Path) -> None:
    """Write the metrics of all runs to results.json, the rewards of the first seed, of the tuned
    run where there is one, to rewards.npz. runs: (row of the table, setting, folder, metrics)."""
    entries, rewards = [], {}
    for row, setting, folder, metrics in runs:
        config = vlmrm.read_json(folder / "config.json")
        add_metrics(metrics, folder, config, data)
        entries.append({"row": row, "objective": Path(config["objective"]).stem, "tasks": {
            task: {metric: scores[metric] for metric in ORDER if metric in scores}
            for task, scores in metrics["tasks"].items()}} | {
            key: metrics[key] for key in ("wall_seconds", "seen", "unseen")}
            | {"config": {"setting": setting} | reduced(config)})
        if config["seed"] == seed and f"{row}/predicted" not in rewards:  # tuned runs come first
            rewards[f"{row}/predicted"] = np.float16(list(metrics["predicted"].values()))
            rewards[f"{row}/episodes"] = np.array([*metrics["predicted"]], int)
    entries = json.loads(json.dumps(entries), parse_float=lambda number: round(float(number), 4))
    vlmrm.write_whole(results / "results.json", (
        "[" + ",\n".join(json.dumps(entry) for entry in entries) + "]\n").encode())
    np.savez_compressed(results / "rewards.npz", **rewards)

def reduced(config: dict) -> dict:
    """What of a run's configuration is the same on every machine: no paths, no versions."""
    return {key: config[key] for key in (
        "seed", "backbone", "lora", "steps", "batch", "learning_rate", "constants")} | {
        "pretrained": config["pretrained"] and Path(config["pretrained"]).name,
        "sha256": {key: config["sha256"].get(key)
                   for key in ("data", "instructions", "pretrained")}}

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

@torch.inference_mode()
def validation_voc(model, data, sentences: dict, by_goal: bool = False) -> float:
    """VOC on the validation experts; by_goal: of the rewards by goal images, for a model that was
    trained without sentences."""
    experts, scores = data.select(split="validation", source="expert"), []
    for task in np.unique(data.task[experts]):
        frames = model.eval().embed_frames(data.load(experts[data.task[experts] == task])).cpu()
        text = model.embed_texts([sentences[task]["instruction"]]).cpu()[0]
        scores.append(vlmrm.value_order_correlation(
            goal_image_reward(frames, np.ones(len(frames), bool)) if by_goal
            else vlmrm.cosine_reward(frames, text).numpy()))
    return float(np.concatenate(scores).mean())

@torch.inference_mode()
def add_metrics(metrics: dict, folder: Path, config: dict, data) -> None:
    """Add EPIC to the metrics of a run and, if it was trained without sentences, VOC and ranking
    accuracy of its rewards by goal images."""
    loss = vlmrm.get_objective(config["objective"])["loss"]
    model = vlmrm.load_reward_model(folder) if loss and not vlmrm.reads_instruction(loss) else None
    episodes, predicted = np.array([*metrics["predicted"]], int), np.array(
        list(metrics["predicted"].values()))
    for task, scores in metrics["tasks"].items():
        where = np.flatnonzero(data.task[episodes] == task)
        truth, expert = data.rewards[episodes[where]], data.source[episodes[where]] == "expert"
        scores["epic"] = epic_distance(predicted[where], truth)
        if model and expert.sum() > 1:  # an expert's goal images are the others'
            reward = goal_image_reward(
                model.embed_frames(data.load(episodes[where])).cpu(), expert)
            scores["goal_voc"] = vlmrm.value_order_correlation(reward[expert]).mean()
            scores["goal_ranking_accuracy_within"] = vlmrm.ranking_accuracy(
                reward[~expert], truth[~expert])
    for group in ("seen", "unseen"):
        for metric in ("epic", "goal_voc", "goal_ranking_accuracy_within"):
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

def tune(args: argparse.Namespace, results: Path) -> None:
    """Three values of one constant of each objective at the first learning rate, the best of them
    at the second; judged by VOC on the validation experts, all of seen tasks."""
    path, data = results / "tuning.json", vlmrm.Dataset(args.data)
    sentences = vlmrm.load_instructions(args.instructions)
    base = configure(args, objective="zeroshot")
    settings = {key: value for key, value in reduced(base).items()
                if key not in ("learning_rate", "constants")}
    found = vlmrm.read_json(path) if path.exists() else {"settings": settings}
    if found["settings"] != settings:
        raise vlmrm.InputError(f"{path} was made with other settings: choose other --results")

    def validate(name: str, parts: dict, constant: str, rate: float, value: float) -> float:
        key = f"learning rate {rate:g}, {constant} {value:g}"
        scores = found.setdefault(name, {})
        if key not in scores:
            loss, model = parts["loss"], vlmrm.prepare_model(base, args.device)
            vlmrm.train(model, data, sentences, functools.partial(loss, **{constant: value}),
                        base | {"learning_rate": rate}, parts["LABELS"])
            scores[key] = round(validation_voc(
                model, data, sentences, by_goal=not vlmrm.reads_instruction(loss)), 4)
            vlmrm.write_whole(path, found)
        print(f"{name:18} {key:38} validation VOC {scores[key]:6.3f}", flush=True)
        return scores[key]

    for objective in all_objectives().values() if args.objective == ["all"] else args.objective:
        if (parts := vlmrm.get_objective(objective))["loss"]:
            [(constant, values)] = parts["TUNED"][1].items()
            values = sorted(values, key=lambda value: value != official(parts["loss"], constant))
            one = functools.partial(validate, Path(objective).stem, parts, constant)
            one(5e-4, max(values, key=functools.partial(one, 2e-3)))

# -----------------------------------------------------------------------------
# Fold 0 is the split of vlmrm.py. The other forty tasks, in alphabetical order, are dealt out to
# four more, so that tasks alike (door-close, door-lock) come into different ones. A fold has its
# own warm start, which has not seen its ten tasks either, and one run of every objective: tuned
# constants, which were chosen on fold 0, so that some tasks unseen in the others had a say in them.

def folds(args: argparse.Namespace, results: Path) -> None:
    """Write folds.json: {row: [of each fold {unseen task: {metric: score}}]}."""
    shipped, split, found = vlmrm.Dataset(args.data), vlmrm.UNSEEN_TASKS, {}
    others = sorted(set(vlmrm.load_instructions(args.instructions)) - set(split))
    for fold in range(5):
        job = argparse.Namespace(**vars(args) | {"runs": args.runs / f"fold{fold}"})
        if fold:
            vlmrm.UNSEEN_TASKS = tuple(others[fold - 1::4])
            job.data = split_anew(shipped, job.runs / "metaworld.npz")
            warm, _ = finish(job, "official", objective=all_objectives()["clip"],
                             pretrained="none", steps=math.ceil(2.5 * args.steps),
                             learning_rate=1e-3)
            job.pretrained = str(warm / "model.safetensors")
        rows = {name: finish(job, objective=objective)[1]
                for name, objective in all_objectives().items()}
        rows["thumbnail"] = finish(job, objective="triplet", backbone="thumbnail")[1]
        for row, metrics in rows.items():
            found.setdefault(row, []).append({
                task: {metric: round(scores[metric], 4)
                       for metric in ("voc", "ranking_accuracy_within") if metric in scores}
                for task, scores in metrics["tasks"].items() if vlmrm.group_of(task) == "unseen"})
    vlmrm.write_whole(results / "folds.json", found)

def split_anew(shipped, path: Path) -> Path:
    """Write the shipped episodes with the splits of the present UNSEEN_TASKS, unless it is done."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(f"{path}.unfinished.npz", **dict(np.load(shipped.path)) | {"split": np.array([
            episode["split"] for task in dict.fromkeys(shipped.task)
            for episode in vlmrm.assign_splits([
                {"task": task, "source": shipped.source[e]} for e in shipped.select(task=task)])])})
        Path(f"{path}.unfinished.npz").rename(path)
    return path

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("study", "tune", "folds"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(data/results)")
    own, rest = parser.parse_known_args()
    own.results.mkdir(parents=True, exist_ok=True)
    args = vlmrm.parse_arguments([
        "--objective", "all", "--seeds", "3", "--runs", f"runs/{own.part}", *rest])
    try:
        {"study": study, "tune": tune, "folds": folds}[own.part](args, own.results)
    except vlmrm.InputError as problem:
        sys.exit(f"study: {problem}")
    except KeyboardInterrupt:
        sys.exit("\nstudy: stopped; the same command goes on")

if __name__ == "__main__":
    main()
