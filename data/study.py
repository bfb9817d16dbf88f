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
    differs = found["loss"] and (rate != vlmrm.OFFICIAL_RATE or any(
        values[0] != official(found["loss"], constant) for constant, values in constants.items()))
    return ("tuned", "official") if differs else ("official",)

def finish(args: argparse.Namespace, **changes) -> tuple[Path, dict]:
    """Do one run, with these options changed, unless it is done. Returns its folder and metrics."""
    job = argparse.Namespace(**vars(args) | changes)
    folder = vlmrm.folder_for(config := vlmrm.configuration(job), job.runs)
    return folder, vlmrm.run_in(folder, config, job.device)

def study(args: argparse.Namespace, results: Path) -> None:
    """Compare all objectives over several seeds. The last row is triplet on thumbnails."""
    seeds = range(args.seed, args.seed + args.seeds)
    folders = [
        (name, finish(args, objective=objective, setting=setting, seed=seed)[0])
        for seed in seeds for name, objective in all_objectives().items()
        for setting in settings_of(objective)
        # Without training all seeds are alike.
        if seed == args.seed or vlmrm.get_objective(objective)["loss"]]
    folders += [
        ("thumbnail", finish(args, objective="triplet", setting="official", seed=seed,
                             backbone="thumbnail")[0]) for seed in seeds]
    gather(folders, args.seed, results)

def gather(folders: list[tuple[str, Path]], seed: int, results: Path) -> None:
    """Write the metrics of all runs to results.json, the rewards of the first seed, of the tuned
    run where there is one, to rewards.npz. folders: (row of the table, folder of a run)."""
    entries, rewards = [], {}
    for row, folder in folders:
        metrics, config = (json.loads(
            (folder / name).read_text(), parse_float=lambda number: round(float(number), 4))
            for name in ("metrics.json", "config.json"))
        tasks = {task: {metric: scores[metric] for metric in (
            "voc", "ranking_accuracy_within") if metric in scores}
            for task, scores in metrics["tasks"].items()}
        entries.append({"row": row, "objective": Path(config["objective"]).stem} | {
            key: metrics[key] for key in ("wall_seconds", "frames_per_second", "seen", "unseen")}
            | {"tasks": tasks, "config": reduced(config)})
        if config["seed"] == seed and f"{row}/predicted" not in rewards:  # tuned runs come first
            for name, array in np.load(folder / "rewards.npz").items():
                rewards[f"{row}/{name}"] = np.float16(array) if name == "predicted" else array
    vlmrm.write_whole(results / "results.json", (
        "[" + ",\n".join(json.dumps(entry) for entry in entries) + "]\n").encode())
    np.savez_compressed(results / "rewards.npz", **rewards)

def reduced(config: dict) -> dict:
    """What of a run's configuration is the same on every machine: no paths, no versions."""
    return {key: config[key] for key in (
        "seed", "setting", "backbone", "lora", "steps", "batch", "learning_rate", "constants")} | {
        "pretrained": config["pretrained"] and Path(config["pretrained"]).name,
        "sha256": {key: config["sha256"].get(key)
                   for key in ("data", "instructions", "pretrained")}}

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
    base = vlmrm.configuration(argparse.Namespace(**vars(args) | {"objective": "zeroshot"}))
    settings = {key: value for key, value in reduced(base).items()
                if key not in ("setting", "learning_rate", "constants")}
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
            scores[key] = round(
                vlmrm.validation_voc(model, data, sentences, every=1)
                if vlmrm.reads_instruction(loss) else goal_image_voc(model, data), 4)
            vlmrm.write_json(path, found)
        print(f"{name:18} {key:38} validation VOC {scores[key]:6.3f}", flush=True)
        return scores[key]

    for objective in all_objectives().values() if args.objective == ["all"] else args.objective:
        if (parts := vlmrm.get_objective(objective))["loss"]:
            [(constant, values)] = parts["TUNED"][1].items()
            values = sorted(values, key=lambda value: value != official(parts["loss"], constant))
            one = functools.partial(validate, Path(objective).stem, parts, constant)
            one(5e-4, max(values, key=functools.partial(one, 2e-3)))

@torch.inference_mode()
def goal_image_voc(model, data) -> float:
    """VOC of the rewards by goal images, on the validation experts: for who knows no sentence."""
    experts, scores = data.select(split="validation", source="expert"), []
    for task in np.unique(data.task[experts]):
        frames = vlmrm.embed_episodes(model.eval(), data, experts[data.task[experts] == task])
        scores.append(vlmrm.value_order_correlation(
            vlmrm.goal_image_reward(frames, np.ones(len(frames), bool))))
    return float(np.concatenate(scores).mean())

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
            warm, _ = finish(job, objective="clip", setting="official", pretrained="none",
                             steps=math.ceil(2.5 * args.steps), learning_rate=1e-3)
            job.pretrained = str(warm / "model.safetensors")
        rows = {name: finish(job, objective=objective)[1]
                for name, objective in all_objectives().items()}
        rows["thumbnail"] = finish(job, objective="triplet", backbone="thumbnail")[1]
        for row, metrics in rows.items():
            found.setdefault(row, []).append({
                task: {metric: round(scores[metric], 4)
                       for metric in ("voc", "ranking_accuracy_within") if metric in scores}
                for task, scores in metrics["tasks"].items() if vlmrm.group_of(task) == "unseen"})
    vlmrm.write_json(results / "folds.json", found)

def split_anew(shipped, path: Path) -> Path:
    """Write the shipped episodes with the splits of the present UNSEEN_TASKS, unless it is done."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        vlmrm.write_dataset(path, [
            episode for task in dict.fromkeys(shipped.task) for episode in vlmrm.assign_splits(
                [shipped.episode(e) for e in shipped.select(task=task)])])
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
