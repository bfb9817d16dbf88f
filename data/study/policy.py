"""Does a better reward model give a better policy? It stays beside vlmrm.py because the lesson ends
where a reward is measured; this is what such a reward is for.

    python vlmrm.py --objective triplet anchored zeroshot data/objectives/clock.py
    python data/policy.py runs/*-seed0 --tasks drawer-open-v3           2 minutes on two cores

Of each task 120 episodes: a sixth by the expert, in the others it goes wrong at a random time. A
reward model weighs them by its rewards of their last pictures; a policy clones their actions, from
the simulator's state, and is tried from fresh starts. So this asks how well a model picks what came
to a good end, not whether its reward could guide a policy on the way. Beside it all episodes alike,
weights from the simulator's reward, and experts alone. The same command goes on when stopped.
"""
import argparse
import functools
import itertools
import multiprocessing
import signal
import sys
import warnings
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]
import vlmrm  # before torch: see there
import numpy as np
import torch
from report import draw_policies, policy_table
from tqdm import tqdm

# The eight policy tasks of ReWiND (2505.10911), one of them unseen here, and four more that are.
TASKS = [f"{task}-v3" for task in (
    "window-close reach-wall faucet-close coffee-button button-press-wall door-lock "
    "handle-press-side sweep-into drawer-open door-unlock faucet-open plate-slide-back").split()]
LENGTH, LAST = 150, 5  # steps at most; pictures of an episode whose mean reward is its score
SHARPNESS = 4  # of the weights

def follow(env, policy, seed: int):
    """The poses, rewards and success flags of an episode from a start that the seed decides, until
    5 steps after success or LENGTH. policy(state (39,)) returns an action (4,)."""
    env.seeded_rand_vec, env._freeze_rand_vec = True, False  # see vlmrm.collect_task()
    env.seed(seed)
    actor = argparse.Namespace(get_action=policy)  # all that it asks an expert for
    return tuple(vlmrm.roll_out(env, actor, np.random, LENGTH, noise=0.0, random_share=0.0))

def record(env, policy, renderer, seed: int, wrong_from: int) -> dict:
    """An episode of the expert that goes wrong at a step: from there on it moves in a direction at
    random, another one every ten steps. {"states": list of (39,), "actions": list of (4,), "true":
    mean reward, "done": a late success?, "pictures": uint8 (1 + LAST, S, S, 3), first and last}."""
    states, actions, rng = [], [], np.random.default_rng(seed)

    def act(state):
        late = len(states) - wrong_from
        action = (policy.get_action(state) if late < 0 else
                  actions[-1] if late % 10 else rng.uniform(-1, 1, 4))
        states.append(state)
        actions.append(np.clip(action, -1, 1))
        return actions[-1]

    poses, rewards, successes = follow(env, act, seed)
    return {"states": states, "actions": actions, "true": np.mean(rewards[-LAST:]),
            "done": any(successes[-LAST:]), "pictures": np.stack([
                vlmrm.draw(renderer, env.data, poses[step]) for step in (0, *range(-LAST, 0))])}

def record_all(env, policy, renderer, job: dict) -> list[dict]:
    """The episodes of a task: successes of its expert, then those that go wrong."""
    start = 10**7 * (job["seed"] + 1) + zlib.crc32(job["task"].encode()) % 10**6  # of the seeds
    count = job["episodes"]
    tries = (record(env, policy(), renderer, start + k, LENGTH) for k in range(count))
    good = [*itertools.islice((e | {"expert": True} for e in tries if e["done"]), -(-count // 6))]
    if len(good) < count / 6:
        raise vlmrm.InputError(f"the expert of {job['task']} hardly ever succeeds")
    until = int(np.mean([len(episode["states"]) for episode in good]))
    wrong_from = np.random.default_rng(start).integers(until, size=count - len(good))
    return good + [record(env, policy(), renderer, start + count + k, when) | {"expert": False}
                   for k, when in enumerate(wrong_from)]

@torch.inference_mode()
def score(folder: Path, task: str, pictures: np.ndarray) -> np.ndarray:
    """Mean rewards (E,) by a run of the last pictures of episodes, uint8 (E, 1 + LAST, S, S, 3)."""
    config = vlmrm.read_json(folder / "config.json")
    parts, model = vlmrm.get_objective(config["objective"]), vlmrm.load_reward_model(folder)
    sentence = vlmrm.load_instructions(config["instructions"], [task])[task]["instruction"]
    text, *known = [model.embed_texts(s).cpu() for s in ([sentence], parts["SENTENCES"]) if s]
    reward = parts["reward"](model.embed_frames(pictures).cpu(), text[0], *known)
    return np.asarray(reward)[:, 1:].mean(1)

def weigh(scores: np.ndarray) -> np.ndarray:
    """Weights (E,) of episodes from their scores, on whatever scale. Equal ones weigh the same."""
    return np.exp(SHARPNESS * (scores - scores.mean()) / max(scores.std(), 1e-6))

def clone(episodes: list[dict], weights: np.ndarray, job: dict) -> list:
    """Policies, one of each row of weights (P, E), that do what was done in these states: a step of
    an episode is drawn as often as its weight says. A layer is a batch of P matrices."""
    torch.manual_seed(job["seed"])
    states, actions = (torch.tensor(np.concatenate([e[name] for e in episodes])).float()
                       for name in ("states", "actions"))
    mean, std = states.mean(0), states.std(0) + 1e-3  # some of a state never change
    lengths = torch.tensor([len(e["states"]) for e in episodes])
    first, weights = lengths.cumsum(0) - lengths, torch.tensor(weights) * lengths
    layers = [(torch.randn(len(weights), a, b).mul((2 / a) ** 0.5).requires_grad_(),
               torch.zeros(len(weights), 1, b, requires_grad=True))
              for a, b in itertools.pairwise((states.shape[1], 128, 128, 4))]
    optimizer = torch.optim.Adam(itertools.chain(*layers), fused=True)
    for step in range(job["steps"]):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / job["steps"])
        e = torch.multinomial(weights, 256, replacement=True)  # (P, 256)
        at = first[e] + (torch.rand(e.shape) * lengths[e]).long()
        x = (states[at] - mean) / std  # (P, 256, 39)
        for k, (w, b) in enumerate(layers):
            x = torch.baddbmm(b, x.relu() if k else x, w)
        optimizer.zero_grad()
        (x - actions[at]).square().mean((1, 2)).sum().backward()
        optimizer.step()
    parts = [(w.detach().numpy(), b.detach().numpy()) for w, b in layers]
    return [functools.partial(act, [(w[p], b[p, 0]) for w, b in parts], mean.numpy(), std.numpy())
            for p in range(len(weights))]

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
    pictures, expert, done, true = (np.stack([e[name] for e in episodes])
                                    for name in ("pictures", "expert", "done", "true"))
    scores = {"all alike": 0 * true, "the simulator's reward": true, "experts alone": 1.0 * expert}
    scores |= {row: score(Path(run), job["task"], pictures) for row, run in job["rows"].items()}
    policies, found = clone(episodes, np.stack([*map(weigh, scores.values())]), job), {}
    for (row, some), policy in zip(scores.items(), policies):
        won = [any(follow(env, policy, 10**9 + 10**6 * job["seed"] + start)[2])
               for start in range(job["starts"])]
        finds = vlmrm.ranking_accuracy(some[:, None], done[:, None], "across")
        found[row] = [round(float(np.mean(won)), 4), round(finds, 4)]
    return found

def row_of(config: dict) -> str:
    """What a run is called in the tables."""
    full = not config["lora"] and vlmrm.get_objective(config["objective"])["loss"]
    name = Path(config["objective"]).stem + ", all weights" * bool(full)
    return "thumbnail" if config["backbone"] == "thumbnail" else name

def study(args: argparse.Namespace) -> dict:
    """Do what is not in args.out yet, a job of each core at a time. Returns what it then has."""
    rows = {row_of(vlmrm.read_json(run / "config.json")): str(run) for run in args.runs}
    numbers = {name: getattr(args, name) for name in ("seeds", "episodes", "starts", "steps")}
    if len(rows) < len(args.runs) or min(numbers.values()) < 1:
        raise vlmrm.InputError("of each objective one run, and of everything at least 1")
    vlmrm.load_instructions(vlmrm.DATA / "instructions.json", args.tasks)  # knows these tasks
    tests = {row: vlmrm.read_json(Path(run, "metrics.json"))["tasks"] for row, run in rows.items()}
    new = {"settings": numbers | {"tasks": args.tasks, "runs": {
        row: vlmrm.digest(f"{run}/metrics.json") for row, run in rows.items()}},
        "metrics": {row: {task: scores.get(task, {}) for task in args.tasks}
                    for row, scores in tests.items()}, "jobs": {}}
    found = vlmrm.read_json(args.out) if args.out.exists() else new
    if found["settings"] != new["settings"]:
        raise vlmrm.InputError(f"{args.out} has other runs or options: choose another --out")
    jobs = {name: numbers | {"task": task, "seed": seed, "rows": rows}
            for seed in range(args.seeds) for task in args.tasks
            if (name := f"{task}, seed {seed}") not in found["jobs"]}
    with ProcessPoolExecutor(None, multiprocessing.get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_DFL)) as pool:  # Ctrl-C ends all
        for name, done in zip(jobs, tqdm(pool.map(compare, jobs.values()), "cloning", len(jobs))):
            found["jobs"][name] = done
            vlmrm.write_whole(args.out, found)
    return found

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="their folders, such as runs/triplet-seed0")
    add("--tasks", nargs="+", default=TASKS, metavar="TASK", help="(ReWiND's, and four unseen)")
    add("--episodes", type=int, default=120, help="of each task (120)")
    add("--starts", type=int, default=50, help="from which a policy is tried (50)")
    add("--steps", type=int, default=3000, help="of a policy's training (3000)")
    add("--seeds", type=int, default=5, help="of episodes, policies and starts (5)")
    add("--out", type=Path, default=Path("runs/policy.json"), help="results (runs/policy.json)")
    args = parser.parse_args()
    try:
        found = study(args)
    except (vlmrm.InputError, OSError, BrokenExecutor, KeyboardInterrupt) as problem:
        print("\npolicy:", str(problem) or "stopped; the same command goes on", file=sys.stderr)
        return 2
    draw_policies(found, args.out.with_suffix(".png"))
    print(f"{policy_table(found)}\nsee {args.out.with_suffix('.png')}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
