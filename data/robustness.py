"""Does the finding depend on which ten tasks are unseen, or on what the pictures look like?

    python data/robustness.py folds     each task unseen in one of five folds: an hour
    python data/robustness.py varied    other cameras and colours in each episode: 20 minutes

If it is stopped, the same command goes on. Figures are kept in data/results/folds.json and
varied.json; data/report.py turns them into tables.

Fold 0 is the split of vlmrm.py. The other forty tasks, in alphabetical order, are dealt out to four
more, so that tasks alike (door-close, door-lock) come into different ones. A fold has its own warm
start, which has not seen its ten tasks either, and one run of every objective: tuned constants,
seed 0. The constants were chosen on validation episodes of fold 0, so that in the others some of
their unseen tasks had a say in them, for all objectives alike.
"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # noqa: E402  (it lies one folder up)

study = vlmrm.companion("study")
SPLIT = vlmrm.UNSEEN_TASKS


def runs_of(options: list, folder: Path, jobs: list) -> list[Path]:
    """The folders of some runs, which are done if they are not. jobs: (objective, setting, seed).
    """
    args = vlmrm.parse_arguments([
        *options, "--runs", str(folder.parent), "--name", folder.name])
    return study.finish(args, *vlmrm.load_data(args), jobs)


def metrics_of(options: list, backbone: str, folder: Path, jobs: list) -> list[dict]:
    """The metrics of some runs with tuned constants. jobs: (objective, seed)."""
    return [json.loads((path / "metrics.json").read_text()) for path in runs_of(
        [*options, "--backbone", backbone], folder / backbone,
        [(objective, "tuned", seed) for objective, seed in jobs])]


def warm_start(data: Path, folder: Path) -> list[str]:
    """Train tiny's starting weights on a data set, as those in data/ were. Returns the options that
    use both."""
    [made] = runs_of(["--data", str(data), "--pretrained", "none", "--steps", "300",
                      "--learning-rate", "1e-3"], folder / "warmstart", [("clip", "faithful", 0)])
    return ["--data", str(data), "--pretrained", str(made / "model.safetensors")]


def unseen_of(fold: int, tasks: list[str]) -> tuple[str, ...]:
    """The ten tasks that nobody sees in this fold."""
    others = sorted(set(tasks) - set(SPLIT))
    return tuple(others[fold - 1::4]) if fold else SPLIT


def split_anew(path: Path) -> None:
    """Write the shipped episodes with the splits of the present UNSEEN_TASKS."""
    shipped = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    vlmrm.write_dataset(path, [
        episode for task in dict.fromkeys(shipped.task) for episode in vlmrm.assign_splits(
            [shipped.episode(number) for number in shipped.select(task=task)])])


def folds(root: Path) -> dict:
    """{row: [of each fold {unseen task: {metric: score}}]}, a row for each objective and for the
    thumbnail."""
    tasks, found = list(vlmrm.load_instructions(vlmrm.DATA / "instructions.json")), {}
    for fold in range(5):
        vlmrm.UNSEEN_TASKS, folder, options = unseen_of(fold, tasks), root / f"fold{fold}", []
        if fold:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "metaworld.npz").exists():
                split_anew(folder / "metaworld.npz")
            options = warm_start(folder / "metaworld.npz", folder)
        rows = {metrics["objective"]: metrics for metrics in metrics_of(
            options, "tiny", folder, [(objective, 0) for objective in vlmrm.OBJECTIVES])}
        [rows["thumbnail"]] = metrics_of(options, "thumbnail", folder, [("triplet", 0)])
        for row, metrics in rows.items():
            own = "own_" * ("own_voc" in metrics["unseen"])  # of what has a reward of its own
            found.setdefault(row, []).append({
                task: {metric: round(scores[own + metric], 4)
                       for metric in ("voc", "ranking_accuracy_within") if own + metric in scores}
                for task, scores in metrics["tasks"].items() if vlmrm.group_of(task) == "unseen"})
    return found


def varied(root: Path) -> dict:
    """{experts per task: {backbone: [of each seed {"seen", "unseen": {metric: {"value"}}}]}}, on
    data of which every episode looks different."""
    found = {}
    for experts in (14, 56):
        folder = root / f"varied{experts}"
        if not (folder / "varied.npz").exists():
            vlmrm.collect(vlmrm.parse_arguments(["--collect", "--vary", "--expert", str(experts),
                                                 "--output", str(folder / "varied.npz")]))
        options = warm_start(folder / "varied.npz", folder)
        found[experts] = {backbone: [
            {group: {metric: {"value": round(metrics[group][metric]["value"], 4)}
                     for metric in ("voc", "ranking_accuracy_within")}
             for group in ("seen", "unseen")}
            for metrics in metrics_of(options, backbone, folder,
                                      [("triplet", seed) for seed in range(3)])]
            for backbone in ("tiny", "thumbnail")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("folds", "varied"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args()
    try:
        found = {"folds": folds, "varied": varied}[args.part](args.runs)
    except vlmrm.InputError as problem:
        sys.exit(f"robustness: {problem}")
    vlmrm.plumbing.write_json(HERE / "results" / f"{args.part}.json", found)


if __name__ == "__main__":
    main()
