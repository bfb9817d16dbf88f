"""Does a trained model notice failure? It stays beside vlmrm.py because it only reads what a run
has saved.

    python data/failures.py runs/triplet-seed0     prints a number, draws failures.png in the folder

Of a task's test episodes some experts succeed; of the mixed ones some never do. Under the same
sentence a failure should end lower than experts do: seen is one that ends below 25 % of them. An
expert's film played backwards ends where it began. A clock sees none of it.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import vlmrm  # before torch: see there

import numpy as np
from matplotlib.figure import Figure
from study import failures_seen

def read_run(folder: Path) -> tuple[dict, vlmrm.Dataset]:
    """{task: (rewards of experts, of failures)}, (E, T) each, and the data."""
    with vlmrm.reading(folder / "metrics.json"):
        predicted = vlmrm.read_json(folder / "metrics.json")["predicted"]
        data = vlmrm.Dataset(vlmrm.read_json(folder / "config.json")["data"])
        found, failed = {}, (data.source == "mixed") & ~data.success.any(1)
        for task in dict.fromkeys(data.task[[*map(int, predicted)]]):
            kinds = [np.array([predicted[e] for e in predicted if data.task[int(e)] == task
                               and some[int(e)]]) for some in (data.source == "expert", failed)]
            if all(map(len, kinds)):
                found[str(task)] = kinds
    if not found:
        raise vlmrm.InputError(f"{folder} has no failures of tasks that have experts")
    return found, data

def draw_failures(found: dict, path: Path) -> None:
    """Experts, failures and experts played backwards, of the eight tasks with most failures."""
    tasks = sorted(found, key=lambda task: (-len(found[task][1]), task))[:8]
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    for axis, task in zip(axes, tasks):
        experts, failed = found[task]
        for rewards, color, label in ((experts[:, ::-1], "0.7", "experts, backwards"),
                                      (experts, "#30638e", "experts"),
                                      (failed, "#c8384e", "failures")):
            axis.plot(rewards.T, color=color, lw=1)
            axis.plot([], [], color=color, label=label)
        axis.axhline(np.quantile(experts[:, -1], 0.25), color="#30638e", ls=":")
        axis.set_title(f"{task.removesuffix('-v3')} ({vlmrm.group_of(task)})", fontsize=10)
    axes[0].legend(fontsize=8)
    vlmrm.write_whole(path, figure)

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder, such as runs/triplet-seed0")
    folder = parser.parse_args().run
    try:
        found, data = read_run(folder)
    except vlmrm.InputError as problem:
        print("failures:", problem, file=sys.stderr)
        return 2
    for group in ("seen", "unseen"):
        some = [kinds for task, kinds in found.items() if vlmrm.group_of(task) == group]
        if some:
            clock = [[np.broadcast_to(np.arange(data.T), kind.shape) for kind in kinds]
                     for kinds in some]
            backwards = [(experts, experts[:, ::-1]) for experts, _ in some]
            print(f"{group} tasks, {len(some)}: of failures it sees {{:.2f}}, of experts played "
                  "backwards {:.2f}; a clock {:.2f}".format(*(
                      np.mean([failures_seen(*kinds) for kinds in kind])
                      for kind in (some, backwards, clock))))
    draw_failures(found, folder / "failures.png")
    print(f"see {folder / 'failures.png'}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
