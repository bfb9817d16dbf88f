"""Many runs of vlmrm.py: the study, its tuning, and several models as one.

    python vlmrm.py --objective all --seeds 3        compare all objectives: tables and pictures
    python vlmrm.py --tune --objective all           choose their constants on validation episodes
    python vlmrm.py --objective triplet --ensemble 5

A comparison is a list of runs. Each has a folder of its own, and those that are finished are not
done again: stop it when you like, the same command goes on.
"""
import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats
import torch

import vlmrm
from vlmrm import InputError

# What --tune tries: three values of one constant of each objective, the official one first, at the
# first learning rate, then the best of them at the second.
LEARNING_RATES = (vlmrm.LEARNING_RATE, 5e-4)
GRID = {
    "clip": ("scale", (1 / 0.07, 5.0, 50.0)),
    "tcn": ("temperature", (1.0, 0.3, 0.1)),
    "tcn-text": ("temperature", (1.0, 0.1, 0.03)),
    "r3m": ("temperature", (1.0, 0.3, 0.1)),
    "vip": ("scale", (1.0, 5.0, 20.0)),
    "vip-text": ("scale", (1.0, 5.0, 20.0)),
    "hilp": ("scale", (1.0, 5.0, 20.0)),
    "hilp-text": ("scale", (1.0, 5.0, 20.0)),
    "liv": ("temperature", (1.0, 0.1, 0.03)),
    "decisionnce-p": ("scale", (100.0, 10.0, 3.0)),
    "decisionnce-t": ("scale", (100.0, 10.0, 3.0)),
    "vlc": ("scale", (1.0, 20.0, 100.0)),
    "preference": ("scale", (1.0, 20.0, 100.0)),
    "preference-oracle": ("scale", (1.0, 20.0, 100.0)),
    "progress": ("scale", (10.0, 5.0, 20.0)),
    "triplet": ("margin", (0.1, 0.05, 0.2)),
}


def finish(args: argparse.Namespace, data, sentences: dict, jobs: list) -> list[Path]:
    """Do the runs that are missing. jobs: (objective, setting, seed). Returns their folders."""
    experts = data.select(split="test", source="expert")
    if len({vlmrm.group_of(task) for task in data.task[experts]}) < 2:
        raise InputError(f"{data.path} has no test experts of unseen tasks, or of seen ones: a "
                         "comparison needs both")
    folders = []
    for objective, setting, seed in jobs:
        job = argparse.Namespace(**vars(args) | {
            "objective": objective, "setting": setting, "seed": seed})
        folder = args.runs / (args.name or "study") / f"{objective}-{setting}-seed{seed}"
        folders.append(folder)
        progress = f"[{len(folders)}/{len(jobs)}] {folder.name}"
        if (folder / "metrics.json").exists():
            vlmrm.plumbing.refuse_other_settings(folder, vlmrm.configuration(job))
            print(progress + ": done before")
        else:
            print(progress, flush=True)
            vlmrm.run(job, data, sentences, time.perf_counter(), folder)
    return folders


def validation_by_goal_images(model, data) -> float:
    """VOC of the rewards by goal images, on the validation experts: for who knows no sentence."""
    experts, scores = data.select(split="validation", source="expert"), []
    for task in np.unique(data.task[experts]):
        with torch.inference_mode():
            frames = model.eval().embed_frames(data.load(experts[data.task[experts] == task]))
        values = vlmrm.goal_image_rewards(frames.cpu(), np.ones(len(frames), bool))
        scores.append(vlmrm.value_order_correlation(values))
    return float(np.concatenate(scores).mean())


def tune(args: argparse.Namespace, data, sentences: dict) -> None:
    """Four settings of each objective, judged by VOC on the validation experts of the seen tasks.
    Who knows no sentence is judged by its VOC under goal images."""
    if not len(data.select(split="validation", source="expert")):
        raise InputError(f"{data.path} has no validation experts: collect 14 per task")
    path = args.runs / (args.name or "study") / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    settings = {key: value for key, value in vlmrm.configuration(args).items() if key in (
        "seed", "backbone", "pretrained", "lora", "steps", "batch", "data_sha256",
        "instructions_sha256", "weights_sha256")}
    if found.setdefault("settings", settings) != settings:
        raise InputError(f"{path} was made with other settings: choose another --name, or remove "
                         "it")

    def validate(objective, learning_rate, value):
        constant = GRID[objective][0]
        key = f"learning rate {learning_rate:g}, {constant} {value:g}"
        scores = found.setdefault(objective, {})
        if key not in scores:
            model = vlmrm.prepare_model(args)
            loss = functools.partial(vlmrm.OBJECTIVES[objective], **{constant: value})
            vlmrm.train(model, data, sentences, loss, steps=args.steps, batch=args.batch,
                        learning_rate=learning_rate, seed=args.seed,
                        oracle=objective in vlmrm.ORACLES)
            scores[key] = round(
                validation_by_goal_images(model, data) if objective in vlmrm.LANGUAGE_FREE
                else vlmrm.validation_voc(model, data, sentences, every=1), 4)
            vlmrm.plumbing.write_json(path, found)
        print(f"{objective:18} {key:38} validation VOC {scores[key]:6.3f}")
        return scores[key]

    for objective in GRID if args.objective == "all" else [args.objective]:
        first, second = LEARNING_RATES
        best = max(GRID[objective][1], key=functools.partial(validate, objective, first))
        validate(objective, second, best)


def round_to_4(number: str) -> float:
    return round(float(number), 4)


def study(args: argparse.Namespace, data, sentences: dict) -> None:
    """Compare all objectives over several seeds: tables, and pictures. Where the tuned setting
    differs from the faithful one, the latter is run too. A last row is triplet on thumbnails."""
    differs = {objective for objective, tuned in vlmrm.TUNED.items()
               if objective not in GRID
               or tuned != (LEARNING_RATES[0], {GRID[objective][0]: GRID[objective][1][0]})}
    jobs = [(objective, setting, args.seed + k)
            for k in range(args.seeds) for objective, loss in vlmrm.OBJECTIVES.items()
            for setting in (("tuned", "faithful") if objective in differs else ("faithful",))
            if loss or k == 0]  # without training all seeds are alike
    folders = finish(args, data, sentences, jobs)
    root = folders[0].parent
    control = argparse.Namespace(**vars(args) | {
        "backbone": "thumbnail", "name": f"{root.name}/thumbnail"})
    folders += finish(control, data, sentences, [
        ("triplet", "faithful", args.seed + k) for k in range(args.seeds)])
    gather(folders, args.seed, root)
    report = vlmrm.companion("report")
    tables = "\n\n".join(report.tables(root).values())
    (root / "tables.md").write_text(tables + "\n", encoding="utf-8")
    report.draw_all(root, data, sentences)
    print(f"{tables}\nresults, tables and figures are in {root}")


def gather(folders: list[Path], seed: int, root: Path) -> None:
    """Write the metrics of all runs to results.json, the rewards of the first seed to rewards.npz.
    """
    results, rewards = [], {}
    for folder in folders:
        metrics, config = (json.loads((folder / name).read_text(), parse_float=round_to_4)
                           for name in ("metrics.json", "config.json"))
        tasks = {task: {metric: scores[metric] for metric in scores if metric in (
            "voc", "ranking_accuracy_within")} for task, scores in metrics["tasks"].items()}
        del metrics["log"]
        row = config["objective"] if folder.parent == root else "thumbnail"
        results.append(metrics | {"row": row, "tasks": tasks, "config": config})
        if config["seed"] == seed:
            for name, array in np.load(folder / "rewards.npz").items():
                key = f"{row}/{name}"  # of the tuned run, if there is one
                if name != "goal_values":
                    rewards.setdefault(key, np.float16(array) if "values" in name else array)
    (root / "results.json").write_text(
        "[" + ",\n".join(json.dumps(result) for result in results) + "]\n")
    np.savez_compressed(root / "rewards.npz", **rewards)


def paired_p_values(scores: dict[str, np.ndarray], reference: str) -> dict[str, float]:
    """Does each objective differ from the reference over the same tasks? p-values, corrected.

    scores: {objective: (tasks,)}. If nothing but chance set the two apart, each task's difference
    could as well have had the other sign: p is the share of all such flips (of 9,999 random ones
    beyond 13 tasks) whose mean lies as far from 0. Then Holm's correction: the smallest p times
    their number, the next times one less, and so on.
    """
    p = {name: scipy.stats.permutation_test(
        (values - scores[reference],), np.mean, permutation_type="samples",
        random_state=0).pvalue if len(values) > 1 else 1.0
        for name, values in scores.items() if name != reference}
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


def best_of(values: np.ndarray, truth: np.ndarray, n: int) -> float:
    """Expected truth of the frame that the values like best among n drawn at random, without
    replacement, from these M: values, truth (M,), 1 <= n <= M. Exact, by counting draws.

    Of the C(M, n) draws, C(k, n - 1) have the frame with k lower ones as their best (of two equal
    ones the later counts as higher).
    """
    k, gammaln = np.arange(len(values)), scipy.special.gammaln  # gammaln(n + 1) = log n!
    log_best = gammaln(k + 1) - gammaln(n) - gammaln(k - n + 2)  # -inf where k < n - 1
    log_draws = gammaln(len(k) + 1) - gammaln(n + 1) - gammaln(len(k) - n + 1)
    return float(np.exp(log_best - log_draws) @ truth[np.argsort(values, kind="stable")])


def standardised(values: np.ndarray) -> np.ndarray:
    """Rewards (models, E, T) of one task on one scale: models differ in it, sentences in level."""
    return (values - values.mean((1, 2), keepdims=True)) / (
        values.std((1, 2), keepdims=True) + 1e-9)


def ensemble(args: argparse.Namespace, data, sentences: dict) -> None:
    """Rewards of several independently trained models, combined, and what they are good for.

    Whoever maximises a learned reward finds its errors, the more so the harder the search: pick the
    best of N frames by the reward, and see what the simulator says of the pick. Where models err
    apart, a frame that all of them like is a safer pick. Ours differ only in the order of their
    batches, and share their warm start and its errors: the weaker kind of ensemble.
    Source: Eisenstein et al., "Helping or Herding?", 2312.09244.
    """
    jobs = [(args.objective, args.setting, args.seed + k) for k in range(args.ensemble)]
    folders = finish(args, data, sentences, jobs)
    test = data.select(split="test")
    values = np.stack([np.load(folder / "rewards.npz")["values"] for folder in folders])  # (N,E,T)
    tasks, counts = np.unique(data.task[test], return_counts=True)
    draws = 2 ** np.arange(int(math.log2(data.T * counts.min())) + 1)
    rng, rows, picks = np.random.default_rng(0), {}, {}
    for task in tasks:
        where = data.task[test] == task
        mine, rewards = test[where], data.rewards[test[where]]
        v = standardised(values[:, where])
        combined = {f"seed {seed}": one for (_, _, seed), one in zip(jobs, v)} | {
            "mean": v.mean(0), "minimum": v.min(0), "mean - std": v.mean(0) - v.std(0),
            "simulator": rewards}
        for name, one in combined.items():
            for metric, row in vlmrm.task_metrics(
                    rng, data.source[mine], rewards, data.success[mine], {"": one},
                    {"voc": (vlmrm.value_order_correlation(one),
                             (data.source[mine] == "expert").astype(float))}).items():
                rows.setdefault(name, {}).setdefault(metric, {})[task] = row
            picks.setdefault((name, vlmrm.group_of(task)), []).append(
                [best_of(one.ravel(), rewards.ravel(), n) for n in draws])
    found = {"draws": draws}
    print(f"{'':12}{'VOC unseen':>12}{'within unseen':>15}   simulator's reward (0 to 10) of the "
          f"best of {draws}, unseen tasks")
    for name in rows:
        report = vlmrm.average_over_tasks(rows[name])
        found[name] = {group: report[group] | {"best_of": np.mean(picks[name, group], axis=0)}
                       for group in ("seen", "unseen")}
        unseen = found[name]["unseen"]
        print(f"{name:12}{unseen['voc']['value']:12.2f}"
              f"{unseen['ranking_accuracy_within']['value']:15.2f}   "
              + " ".join(f"{pick:.2f}" for pick in unseen["best_of"]))
    path = folders[0].parent / f"ensemble-{args.objective}.json"
    vlmrm.plumbing.write_json(path, found)
    print(f"all figures are in {path}")


def main(args: argparse.Namespace) -> None:
    if args.tune and args.objective not in [*GRID, "all"]:
        raise InputError(f"{args.objective} has no entry in GRID: there is nothing to tune")
    if args.ensemble and not vlmrm.OBJECTIVES.get(args.objective):
        raise InputError(f"--ensemble needs an objective that is trained, not {args.objective}")
    work = tune if args.tune else ensemble if args.ensemble else study
    try:
        work(args, *vlmrm.load_data(args))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; what is finished is kept; the same command goes on") from None
