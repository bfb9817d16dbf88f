"""Does a better reward model pick better episodes to learn from?

    python vlmrm.py --objective triplet anchored zeroshot clock
    python data/study/policy.py runs/*-seed0 --tasks drawer-open-v3    some minutes on two cores

Of each task 120 finished episodes: a sixth by the expert, in the others it goes wrong at a random
time. A reward model weighs them by its rewards of their last pictures; a policy clones their
actions, from the simulator's state, and is tried from fresh starts. So this asks how well a model
picks what came to a good end, not whether its reward could guide a policy on the way. Beside it all
episodes alike, weights from the simulator's reward, and experts alone. The same command goes on
when stopped.
"""
import argparse
import functools
import inspect
import itertools
import multiprocessing
import signal
import sys
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import torch
from tqdm import tqdm

import vlmrm
from study import trained_model
from tables import policy_table

TASKS = (  # the eight policy tasks of ReWiND (2505.10911), and four more that are unseen here
    "window-close-v3", "reach-wall-v3", "faucet-close-v3", "coffee-button-v3",
    "button-press-wall-v3", "door-lock-v3", "handle-press-side-v3", "sweep-into-v3",
    "drawer-open-v3", "door-unlock-v3", "faucet-open-v3", "plate-slide-back-v3")
LENGTH = 150  # steps of an episode, at most
LAST = 5  # pictures of an episode whose mean reward is its score
SHARPNESS = 4  # of the weights

def follow(env, policy, seed: int) -> list[tuple]:
    """roll_out() from a start that the seed decides. policy(state (39,)) returns an action (4,)."""
    env.seeded_rand_vec = True  # see vlmrm.collect_task()
    env._freeze_rand_vec = False
    env.seed(seed)
    actor = argparse.Namespace(get_action=policy)  # all that it asks an expert for
    return vlmrm.roll_out(env, actor, np.random, LENGTH, noise=0.0, random_share=0.0)

def record(env, policy, renderer, seed: int, wrong_from: int) -> dict:
    """An episode of the expert that goes wrong at a step: from there on it moves in a direction at
    random, another one every ten steps. {"states": list of (39,), "actions": list of (4,), "true":
    mean reward, "done": a late success?, "pictures": uint8 (1 + LAST, S, S, 3), first and last}."""
    rng = np.random.default_rng(seed)
    states = []
    actions = []

    def act(state):
        late = len(states) - wrong_from
        if late < 0:
            action = policy.get_action(state)
        elif late % 10 == 0:
            action = rng.uniform(-1, 1, 4)
        else:
            action = actions[-1]
        states.append(state)
        actions.append(np.clip(action, -1, 1))
        return actions[-1]

    poses, rewards, successes = zip(*follow(env, act, seed))
    pictures = [vlmrm.draw(renderer, env.data, poses[step]) for step in (0, *range(-LAST, 0))]
    return {"states": states, "actions": actions, "true": np.mean(rewards[-LAST:]),
            "done": any(successes[-LAST:]), "pictures": np.stack(pictures)}

def record_all(env, policy, renderer, job: dict) -> list[dict]:
    """The episodes of a task: successes of its expert, then those that go wrong."""
    start = 10**7 * (job["seed"] + 1) + zlib.crc32(job["task"].encode()) % 10**6  # of the seeds
    count = job["episodes"]
    episodes = []
    for k in range(count):
        episode = record(env, policy(), renderer, start + k, LENGTH)
        if episode["done"]:
            episodes.append(dict(episode, expert=True))
        if len(episodes) >= count / 6:
            break
    else:
        raise vlmrm.InputError(f"the expert of {job['task']} hardly ever succeeds")
    until = int(np.mean([len(episode["states"]) for episode in episodes]))
    wrong = np.random.default_rng(start).integers(until, size=count - len(episodes))
    for k, wrong_from in enumerate(wrong):
        episode = record(env, policy(), renderer, start + count + k, wrong_from)
        episodes.append(dict(episode, expert=False))
    return episodes

@torch.inference_mode()
def score(folder: Path, task: str, pictures: np.ndarray) -> np.ndarray:
    """Mean rewards (E,) by a run of the last pictures of episodes, uint8 (E, 1 + LAST, S, S, 3).
    It runs the file of the run's objective, for its reward."""
    config = vlmrm.read_json(folder / "config.json")
    model = trained_model(folder, config)
    reward = vlmrm.get_objective(config["objective"])["reward"]
    if "embed" in inspect.signature(reward).parameters:
        reward = functools.partial(reward, embed=lambda some: model.embed_texts(some).cpu())
    sentence = vlmrm.load_instructions(config["instructions"], [task])[task]["instruction"]
    text = model.embed_texts([sentence]).cpu()[0]
    rewards = reward(model.embed_frames(pictures).cpu(), text)
    return np.asarray(rewards)[:, 1:].mean(1)

def weigh(scores: np.ndarray) -> np.ndarray:
    """Weights (E,) of episodes from their scores, on whatever scale. Equal ones weigh the same."""
    return np.exp(SHARPNESS * (scores - scores.mean()) / max(scores.std(), 1e-6))

def clone(episodes: list[dict], weights: np.ndarray, job: dict) -> list:
    """Policies, one of each row of weights (P, E), that do what was done in these states: a step of
    an episode is drawn as often as its weight says. A layer is a batch of P matrices."""
    torch.manual_seed(job["seed"])
    states = torch.tensor(np.concatenate([e["states"] for e in episodes])).float()
    actions = torch.tensor(np.concatenate([e["actions"] for e in episodes])).float()
    mean = states.mean(0)
    std = states.std(0) + 1e-3  # some of a state never change
    lengths = torch.tensor([len(e["states"]) for e in episodes])
    first = lengths.cumsum(0) - lengths
    weights = torch.tensor(weights) * lengths
    layers = []
    for a, b in itertools.pairwise((states.shape[1], 128, 128, 4)):
        matrices = torch.randn(len(weights), a, b).mul((2 / a) ** 0.5).requires_grad_()
        layers.append((matrices, torch.zeros(len(weights), 1, b, requires_grad=True)))
    optimizer = torch.optim.Adam(itertools.chain(*layers), fused=True)

    for step in range(job["steps"]):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / job["steps"])
        drawn = torch.multinomial(weights, 256, replacement=True)  # (P, 256)
        at = first[drawn] + (torch.rand(drawn.shape) * lengths[drawn]).long()
        x = (states[at] - mean) / std  # (P, 256, 39)
        for k, (w, b) in enumerate(layers):
            x = torch.baddbmm(b, x.relu() if k else x, w)
        loss = (x - actions[at]).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policies = []
    for p in range(len(weights)):
        own = [(w[p].detach().numpy(), b[p, 0].detach().numpy()) for w, b in layers]
        policies.append(functools.partial(act, own, mean.numpy(), std.numpy()))
    return policies

def act(layers: list[tuple], mean: np.ndarray, std: np.ndarray, state: np.ndarray) -> np.ndarray:
    """What a policy of clone() does in a state (39,): an action (4,)."""
    x = (state - mean) / std
    for k, (w, b) in enumerate(layers):
        x = (np.maximum(x, 0) if k else x) @ w + b
    return np.clip(x, -1, 1)

def compare(job: dict) -> dict[str, list[float]]:
    """{row: [share of starts from which its policy succeeds, how probably an episode that ends in
    success scores above another]}. job: task, seed, rows {name: folder} and the options."""
    torch.set_num_threads(1)  # the other cores have jobs of their own
    warnings.simplefilter("ignore")
    env, policy, renderer = vlmrm.open_task(job["task"], 96)
    episodes = record_all(env, policy, renderer, job)
    renderer.close()
    true = np.array([e["true"] for e in episodes])
    done = np.array([e["done"] for e in episodes])
    expert = np.array([e["expert"] for e in episodes])
    pictures = np.stack([e["pictures"] for e in episodes])
    scores = {"all alike": 0 * true, "the simulator's reward": true, "experts alone": 1.0 * expert}
    for row, folder in job["rows"].items():
        scores[row] = score(Path(folder), job["task"], pictures)
    policies = clone(episodes, np.stack([weigh(some) for some in scores.values()]), job)
    found = {}
    for (row, some), policy in zip(scores.items(), policies):
        won = []
        for start in range(job["starts"]):
            history = follow(env, policy, 10**9 + 10**6 * job["seed"] + start)
            won.append(any(success for _, _, success in history))
        finds = vlmrm.ranking_accuracy(some[:, None], done[:, None], "across")
        found[row] = [round(float(np.mean(won)), 4), round(finds, 4)]
    return found

def row_of(config: dict) -> str:
    """What a run is called in the table."""
    name = Path(config["objective"]).stem
    if config["lora"] or not vlmrm.get_objective(config["objective"])["loss"]:
        return name
    return f"{name}, all weights"

def study(args: argparse.Namespace) -> dict:
    """Do what is not in args.out yet, a job of each core at a time. Returns what it then has."""
    rows = {row_of(vlmrm.read_json(run / "config.json")): str(run) for run in args.runs}
    if len(rows) < len(args.runs):
        raise vlmrm.InputError("of each objective one run")
    vlmrm.load_instructions(vlmrm.DATA / "instructions.json", args.tasks)  # knows these tasks
    numbers = {name: getattr(args, name) for name in ("seeds", "episodes", "starts", "steps")}
    digests = {row: vlmrm.digest(f"{run}/metrics.json") for row, run in rows.items()}
    settings = dict(numbers, tasks=list(args.tasks), runs=digests)
    found = {"settings": settings, "metrics": {}, "jobs": {}}
    for row, run in rows.items():
        tests = vlmrm.read_json(Path(run, "metrics.json"))["tasks"]
        found["metrics"][row] = {task: tests.get(task, {}) for task in args.tasks}
    if args.out.exists():
        found = vlmrm.read_json(args.out)
    if found["settings"] != settings:
        raise vlmrm.InputError(f"{args.out} has other runs or options: choose another --out")

    jobs = {}
    for seed, task in itertools.product(range(args.seeds), args.tasks):
        name = f"{task}, seed {seed}"
        if name not in found["jobs"]:
            jobs[name] = dict(numbers, task=task, seed=seed, rows=rows)
    policies = len(jobs) * (len(rows) + 3)
    print(f"{len(jobs)} jobs, {policies} policies; a job takes some minutes of a core", flush=True)
    with ProcessPoolExecutor(None, multiprocessing.get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_DFL)) as pool:  # Ctrl-C ends all
        for name, done in zip(jobs, tqdm(pool.map(compare, jobs.values()), "jobs", len(jobs))):
            found["jobs"][name] = done
            vlmrm.write_whole(args.out, vlmrm.to_json(found))
    return found

def work(args: argparse.Namespace) -> None:
    """Do the study and print its table."""
    found = study(args)
    print(policy_table(found), "Success of policies that clone finished episodes, picked by the "
          "rewards of their last pictures. Share of the way: from all alike, 0, to the simulator's "
          "reward, 1.", sep="\n\n")

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("policy", description=__doc__)
    add = options.add_argument
    add("runs", type=Path, nargs="+", help="their folders, such as runs/triplet-seed0")
    add("--tasks", nargs="+", default=TASKS, metavar="TASK", help="(ReWiND's, and four unseen)")
    add("--episodes", type=int, default=120, help="of each task (120)")
    add("--starts", type=int, default=50, help="from which a policy is tried (50)")
    add("--steps", type=int, default=3000, help="of a policy's training (3000)")
    add("--seeds", type=int, default=5, help="of episodes, policies and starts (5)")
    add("--out", type=Path, default=Path("runs/policy.json"), help="results (runs/policy.json)")
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
