"""Plans in Meta-World: carry one out from a fixed start, and search for the one that is liked best.

guide.py asks by it which rewards lead to success, film.py replays a plan, exercise 11 looks for one
that a model likes too much. A plan is (KNOTS, 4): actions x, y, z and gripper, from -1 to 1, each
kept for HOLD steps.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np

import vlmrm
from environment import pose

HOLD = 10  # steps
KNOTS = 8
ROUNDS = 8
PLANS = 16  # a round
ELITE = 4  # the plans of a round that the next one is drawn from

def look(renderer, env, poses: list[dict]) -> np.ndarray:
    """Pictures of some poses, uint8 (T, S, S, 3)."""
    return np.array([vlmrm.draw(renderer, env.data, pose) for pose in poses])

def open_at(task: str, seed: int):
    """What open_task() gives: simulator, class of the policy, renderer. The seed decides starts."""
    env, policy, renderer = vlmrm.open_task(task, 96)
    vlmrm.seed_starts(env, seed)
    return env, policy, renderer

def open_scene(task: str, rng) -> dict:
    """A start to plan from: {"env", "renderer", "state", "picture" (S, S, 3)}, and of three experts
    the first and last picture, "experts" (3, 2, S, S, 3), and the simulator's "rewards" (3, 2)."""
    env, policy, renderer = open_at(task, int(rng.integers(2**31)))
    experts = []
    rewards = []
    while len(experts) < 3:
        history = vlmrm.roll_out(env, policy(), rng, 300)
        if not history[-1][2]:
            continue  # no success at its end
        ends = (history[0], history[-1])
        experts.append(look(renderer, env, [poses for poses, _, _ in ends]))
        rewards.append([reward for _, reward, _ in ends])
    env.reset()
    pose(env)
    [picture] = look(renderer, env, [{}])
    return {"env": env, "renderer": renderer, "state": get_state(env), "picture": picture,
            "experts": np.array(experts), "rewards": np.array(rewards)}

def get_state(env) -> np.ndarray:
    """All that the next step of the simulator depends on."""
    import mujoco
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return state

def carry_out(env, state: np.ndarray, plan) -> dict[str, list]:
    """From a state on: the poses, the simulator's reward and success after each step."""
    import mujoco
    mujoco.mj_setState(env.model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(env.model, env.data)
    env.curr_path_length = 0
    outcome = {"poses": [], "rewards": [], "success": []}
    for action in np.repeat(plan, HOLD, axis=0):
        _, reward, _, _, info = env.step(action)
        outcome["poses"].append({name: getattr(env.data, name).copy() for name in vlmrm.POSES})
        outcome["rewards"].append(float(reward))
        outcome["success"].append(bool(info["success"]))
    return outcome

def search(env, state: np.ndarray, rate, rng) -> tuple[np.ndarray, dict]:
    """The plan whose outcome is rated best, and that outcome: the cross-entropy method. Plans are
    drawn around a mean, which moves to the best of them; where all are alike it stays. rate: n
    outcomes -> (n,)."""
    mean = np.zeros((KNOTS, 4))
    spread = np.full((KNOTS, 4), 0.7)
    most = -np.inf
    for _ in range(ROUNDS):
        plans = mean + spread * rng.normal(size=(PLANS, KNOTS, 4))
        plans = np.clip(plans, -1, 1).round(2)
        outcomes = [carry_out(env, state, plan) for plan in plans]
        rated = rate(outcomes)
        order = np.argsort(-rated, kind="stable")
        first = order[0]
        if rated[first] > most:
            most = rated[first]
            best = (plans[first], outcomes[first])
        if np.ptp(rated) > 0:
            elite = plans[order[:ELITE]]
            mean = elite.mean(axis=0)
            spread = elite.std(axis=0) + 0.05
    return best
