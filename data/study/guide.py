r"""Does a reward guide? Its gain step by step, and plans that are chosen by the reward alone.

    python vlmrm.py --objective triplet r3m liv timerewarder decisionnce-t triplet-directions \
        zeroshot --runs runs/guide
    python data/study/guide.py runs/guide/*-seed0   34 min on two slow cores; goes on if stopped

Gain: an expert goes wrong at a random step. Does the reward gain more in ten steps of the expert's
than in ten random ones at the same time of the same task? A clock gets .5. Plan: search for the
actions that the reward likes best, from a fixed start. Does the best plan get the task done? All
is kept in data/results/guide.json, plans included: film.py replays one.
"""
import sys
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import torch

import vlmrm
from planning import HOLD, KNOTS, carry_out, look, open_at, open_scene, search
from workers import add_options, from_file, keep, side_by_side

# To plan in: eight unseen tasks (not the two in which things are gripped and carried), four seen.
TASKS = ("button-press-v3", "door-open-v3", "door-unlock-v3", "drawer-open-v3", "faucet-open-v3",
         "handle-pull-side-v3", "plate-slide-back-v3", "window-close-v3",
         "door-close-v3", "drawer-close-v3", "reach-v3", "window-open-v3")
EPISODES = 20  # of each task, that go wrong
STARTS = 3
JUDGED = [-HOLD - 1, -1]  # the steps of a plan whose pictures a reward judges
SHAPED = "success + triplet"  # the success, and triplet as a potential
METRICS = ("voc", "voc_opposite", "ranking_accuracy_same_time", "success_auroc", "retrieval_top1")

def objective_of(folder: Path) -> str:
    """The name of a run's objective. Raises InputError."""
    with vlmrm.reading(folder / "config.json"):
        return Path(vlmrm.read_json(folder / "config.json")["objective"]).stem

def load_models(runs: list[Path], device: str) -> dict[str, tuple]:
    """{objective: (model, reward)} of the folders of runs, and a control that does not read."""
    models = {}
    for folder in runs:
        name = objective_of(folder)
        model = vlmrm.load_reward_model(folder, device)
        models[name] = (model, vlmrm.cosine_reward)
        if name == "zeroshot":
            control = from_file("distance-from-start", "reward")
            models["distance-from-start"] = (model, control)
    return models

@torch.inference_mode()
def rewards_of(row: tuple, videos, sentence: str) -> np.ndarray:
    """Rewards (E, T) of pictures (E, T, S, S, 3). row: (model, reward)."""
    model, reward = row
    text = model.embed_texts([sentence])[0]
    return reward(model.embed_frames(np.array(videos)).cpu(), text.cpu()).numpy()

# 1. Gain ------------------------------------------------------------------------------------------

def gain_auroc(rewards, wrong_from, done_at) -> float:
    """How often a window of an expert gains more than a random one of another episode at the same
    time; ties count half. rewards (E, T): after the steps 0, HOLD, 2 HOLD, ... wrong_from (E,): the
    first random step, done_at (E,): that of success. A window that ends later has nothing to gain,
    and does not count. NaN with fewer than vlmrm.FEWEST_PAIRS pairs."""
    gains = np.diff(rewards, axis=1)  # (E, T - 1): of the steps begins + 1 to ends
    begins = HOLD * np.arange(gains.shape[1])
    ends = begins + HOLD
    before_success = ends <= np.array(done_at)[:, None]  # (E, T - 1)
    expert = before_success & (ends < np.array(wrong_from)[:, None])
    random = before_success & (begins + 1 >= np.array(wrong_from)[:, None])
    right = 0.0
    pairs = 0
    for now in range(gains.shape[1]):
        one = gains[expert[:, now], now, None]
        other = gains[random[:, now], now]
        right += (one > other).sum() + (one == other).sum() / 2
        pairs += one.size * other.size
    if pairs < vlmrm.FEWEST_PAIRS:
        return float("nan")
    return right / pairs

def measure_gain(task: str, sentence: str, models: dict, rng) -> dict[str, float]:
    """{row: AUROC}, of each model and of the simulator's own reward."""
    env, policy, renderer = open_at(task, int(rng.integers(2**31)))
    wrong_from = rng.integers(20, 80, EPISODES)
    videos = []
    rewards = []
    done_at = []
    for step in wrong_from:
        history = vlmrm.roll_out(env, policy(), rng, 111, noise=0.1, wrong_from=step)
        kept = history[::HOLD]
        videos.append(look(renderer, env, [poses for poses, _, _ in kept]))
        rewards.append([reward for _, reward, _ in kept])
        successes = [success for _, _, success in history]
        done_at.append([*successes, True].index(True))
    renderer.close()
    found = {"simulator": gain_auroc(rewards, wrong_from, done_at)}
    for name, row in models.items():
        found[name] = gain_auroc(rewards_of(row, videos, sentence), wrong_from, done_at)
    return found

# 2. Plans -----------------------------------------------------------------------------------------

def rate(row: str, outcomes: list[dict], scene: dict, models: dict, sentence: str) -> np.ndarray:
    """How far a row's reward rises from the start to the end of plans, by their outcomes: (n,); the
    simulator's from where it is at the start of experts."""
    done = np.array([any(outcome["success"]) for outcome in outcomes], float)
    if row == "success":
        return done
    if row == "simulator":
        rewards = np.array([outcome["rewards"] for outcome in outcomes])  # (n, steps)
        return rewards[:, JUDGED].mean(axis=1) - scene["rewards"][:, 0].mean()
    videos = []
    for outcome in outcomes:
        judged = [outcome["poses"][step] for step in JUDGED]
        videos.append([scene["picture"], *look(scene["renderer"], scene["env"], judged)])
    model = "triplet" if row == SHAPED else row
    rewards = rewards_of(models[model], videos, sentence)  # (n, 1 + judged)
    risen = rewards[:, 1:].mean(axis=1) - rewards[:, 0]
    if row == SHAPED:
        return done + risen
    return risen

def rise(rewards: np.ndarray) -> float:
    """From the first to the last of each episode (E, T), on average."""
    return float((rewards[:, -1] - rewards[:, 0]).mean())

def share_of_experts(row: str, outcome: dict, scene: dict, models: dict, sentence: str) -> float:
    """How far the reward of a model, or the simulator's, rises with a plan, as a share of how far
    it rises with three experts: it may be more than 1. NaN where it falls with them."""
    expected = scene["rewards"]
    if row != "simulator":
        expected = rewards_of(models[row], scene["experts"], sentence)
    if rise(expected) <= 0:
        return float("nan")
    [risen] = rate(row, [outcome], scene, models, sentence)
    return float(risen) / rise(expected)

def make_plans(task: str, sentence: str, models: dict, rng) -> dict[str, dict]:
    """{row: {"plan", "done", "said", "liked"}} from one start: the plan that the row likes best,
    and the shares of experts by the simulator's reward and by the row's own. Without "liked": the
    own reward falls with experts."""
    scene = open_scene(task, rng)
    plan = rng.uniform(-1, 1, (KNOTS, 4)).round(2)
    found = {"random": (plan, carry_out(scene["env"], scene["state"], plan))}
    seed = int(rng.integers(2**31))  # all rows begin with the same plans
    for row in (*models, "simulator", "success", SHAPED):
        found[row] = search(scene["env"], scene["state"], lambda outcomes: rate(
            row, outcomes, scene, models, sentence), np.random.default_rng(seed))
    results = {}
    for row, (plan, outcome) in found.items():
        results[row] = {"plan": plan.tolist(), "done": any(outcome["success"]),
                        "said": share_of_experts("simulator", outcome, scene, models, sentence)}
        if row in models:
            liked = share_of_experts(row, outcome, scene, models, sentence)
            if not np.isnan(liked):
                results[row]["liked"] = liked
    scene["renderer"].close()
    return results

# 3. All of it -------------------------------------------------------------------------------------

def random_numbers(name: str):
    """A generator of its own for each job."""
    return np.random.default_rng(zlib.crc32(name.encode()))

def play(job: dict) -> dict:
    """The gain of a task, or the plans from one of its starts."""
    warnings.simplefilter("ignore")  # Meta-World's, of its own constants
    rng = random_numbers(job["name"])
    models = load_models(job["runs"], job["device"])
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    sentence = instructions[job["task"]]["instruction"]
    if job["kind"] == "gain":
        return measure_gain(job["task"], sentence, models, rng)
    return make_plans(job["task"], sentence, models, rng)

def what_was_run(folders: list[Path]) -> dict[str, dict]:
    """{"files": {"code and sentences": SHA-256}, "models": {objective: SHA-256 of its
    weights}, "metrics": {objective: {metric: score}}, on unseen tasks}. Raises InputError."""
    here = Path(__file__)
    files = vlmrm.digest(vlmrm.__file__, here, here.with_name("planning.py"),
                         vlmrm.DATA / "instructions.json")
    models = {}
    metrics = {}
    for folder in folders:
        name = objective_of(folder)
        with vlmrm.reading(folder / "metrics.json"):
            unseen = vlmrm.read_json(folder / "metrics.json")["unseen"]
            metrics[name] = {metric: unseen[metric]["value"] for metric in METRICS}
        models[name] = vlmrm.digest(folder / "model.safetensors")
    if not {"triplet", "zeroshot"} <= set(models) or len(models) < len(folders):
        raise vlmrm.InputError("one run of each objective, triplet and zeroshot among them")
    return {"files": {"code and sentences": files}, "models": models, "metrics": metrics}

def work(args) -> None:
    """Do all jobs, side by side, and keep each result at once."""
    path = args.results / "guide.json"
    now = what_was_run(args.runs)
    found = {"gain": {}, "plans": {}, **now}
    if path.exists():
        found = vlmrm.read_json(path)
    jobs = {}
    for task in args.tasks:
        jobs[task] = {"kind": "gain", "task": task}
        for start in range(STARTS if task in TASKS else 0):
            jobs[f"{task}, start {start}"] = {"kind": "plans", "task": task}
    left = {name: dict(vars(args), **job, name=name) for name, job in jobs.items()
            if name not in found[job["kind"]]}
    for part in now:
        # What is complete stays right, whatever the code is by now.
        if found[part] != now[part] and (left or part != "files"):
            raise vlmrm.InputError(f"{path} was made with other {part}: move it away")
    if not left:
        print(f"nothing is left to do: {path} has these {len(jobs)} results")
    for name, result in side_by_side(play, left, args.workers, len(jobs), "guiding"):
        found[jobs[name]["kind"]][name] = result
        found = keep(found, path)

def parser() -> common.Parser:
    """The options."""
    known = sorted(vlmrm.load_instructions(vlmrm.DATA / "instructions.json"))
    options = common.Parser("guide", description=__doc__)
    add = options.add_argument
    add("runs", nargs="+", type=Path, help="folders, of triplet and zeroshot at least")
    add("--tasks", nargs="+", choices=known, default=known, metavar="TASK", help="(all 50)")
    add_options(options)
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
