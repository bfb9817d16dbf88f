"""Gains and plans: by hand, on a toy that is no simulator, and in Meta-World."""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import vlmrm  # before torch: see there

import numpy as np
import pytest
import torch
from PIL import Image

import common
import film
import guide
import planning
import workers
from conftest import one_line

NEVER = [999, 999]

@pytest.fixture
def any_pairs(monkeypatch):
    """Even one pair of windows counts."""
    monkeypatch.setattr(vlmrm, "FEWEST_PAIRS", 1)

def test_gain_by_hand(any_pairs):
    """The window of the steps 11 to 20 gains 2 in episode 0, which goes wrong at 21, and 1 in
    episode 1, which goes wrong at 11. All windows before are experts', all later ones random."""
    rewards = np.array([[0, 1, 3, 3, 9], [0, 5, 6, 9, 9]])
    assert guide.gain_auroc(rewards, [21, 11], NEVER) == 1
    assert guide.gain_auroc(-rewards, [21, 11], NEVER) == 0
    assert guide.gain_auroc(0 * rewards, [21, 11], NEVER) == 0.5  # equal gains count half
    assert np.isnan(guide.gain_auroc(rewards, [20, 11], NEVER))  # step 20 is random: neither
    assert np.isnan(guide.gain_auroc(rewards, [21, 12], NEVER))  # step 11 is an expert's: neither
    assert np.isnan(guide.gain_auroc(rewards, [21, 21], NEVER))  # nothing to compare

def test_few_pairs_are_none():
    """Seven experts against seven random windows are 49 pairs."""
    rewards = np.array([[0, 1, 3], [0, 1, 2]]).repeat(8, axis=0)
    assert guide.gain_auroc(rewards, [21] * 8 + [11] * 8, [999] * 16) == 1
    rewards = rewards[1:-1]
    assert np.isnan(guide.gain_auroc(rewards, [21] * 7 + [11] * 7, [999] * 14))

def test_a_clock_has_no_gain():
    """Whenever episodes go wrong."""
    rng = np.random.default_rng(0)
    clock = np.arange(12) * np.ones((30, 1))
    assert guide.gain_auroc(clock, rng.integers(20, 80, 30), [999] * 30) == 0.5

def test_what_ends_after_success_does_not_count(any_pairs):
    """Of the window of the steps 11 to 20, the only one to compare."""
    rewards = np.array([[0, 1, 3, 3], [0, 5, 6, 9]])
    assert guide.gain_auroc(rewards, [21, 11], [20, 999]) == 1
    assert np.isnan(guide.gain_auroc(rewards, [21, 11], [19, 999]))
    assert np.isnan(guide.gain_auroc(rewards, [21, 11], [999, 19]))

def test_the_search_finds_what_is_liked(monkeypatch):
    """A plan whose first action is near a target, if that is what is liked; and the best of all
    plans that were tried, not the last one."""
    target = np.array([0.5, -0.25, 1.0, 0.0])
    tried = []

    def keep(env, state, plan):
        tried.append(plan)
        return plan

    def rate(plans):
        return np.array([-np.abs(plan[0] - target).sum() for plan in plans])

    monkeypatch.setattr(planning, "carry_out", keep)
    plan, outcome = planning.search(None, None, rate, np.random.default_rng(0))
    assert (plan == outcome).all() and plan.shape == (planning.KNOTS, 4)
    assert np.abs(plan[0] - target).max() < 0.15
    assert rate([plan]) == rate(tried).max()
    assert len(tried) == planning.PLANS * planning.ROUNDS
    assert np.abs(tried).max() == 1

def test_the_search_stays_where_all_are_alike(monkeypatch):
    """Plans are as far spread in the last round as in the first one."""
    tried = []
    monkeypatch.setattr(planning, "carry_out", lambda env, state, plan: tried.append(plan))
    planning.search(None, None, lambda plans: np.zeros(len(plans)), np.random.default_rng(0))
    spreads = [np.std(tried[:planning.PLANS]), np.std(tried[-planning.PLANS:])]
    assert spreads == pytest.approx([0.62, 0.62], abs=0.05)  # .7, without what is over 1

def test_what_rows_think(monkeypatch):
    """Success, the simulator's reward, a model's, and success with the model as a potential."""
    steps = np.arange(80.0)
    outcomes = [{"rewards": steps, "success": [False] * 80, "poses": steps},
                {"rewards": 0 * steps, "success": [False] * 79 + [True], "poses": -steps}]
    scene = {"rewards": np.array([[1.0, 5.0], [3.0, 9.0]]), "picture": 7.0, "renderer": None,
             "env": None}
    monkeypatch.setattr(guide, "look", lambda renderer, env, poses: poses)
    monkeypatch.setattr(guide, "rewards_of", lambda row, videos, sentence: row * np.array(videos))
    models = {"triplet": 1.0, "r3m": 2.0}
    last = (69 + 79) / 2  # the mean of the two steps that are judged
    assert guide.rise(scene["rewards"]) == 5

    def rate(row):
        return guide.rate(row, outcomes, scene, models, "").tolist()

    assert rate("success") == [0, 1]
    assert rate("simulator") == [last - 2, -2]
    assert rate("triplet") == [last - 7, -last - 7]
    assert rate("r3m") == [2 * (last - 7), 2 * (-last - 7)]
    assert rate(guide.SHAPED) == [last - 7, 1 - last - 7]

@pytest.fixture
def small(monkeypatch, any_pairs):
    """A search of four plans, and four episodes that go wrong."""
    monkeypatch.setattr(planning, "ROUNDS", 2)
    monkeypatch.setattr(planning, "PLANS", 2)
    monkeypatch.setattr(planning, "ELITE", 1)
    monkeypatch.setattr(guide, "EPISODES", 4)

@pytest.mark.rendering
def test_a_state_is_put_back(rendering):
    """A plan from it has the outcome that the same actions have after a reset, whatever has been
    done since. Its picture is of where things are: reset() moves the window."""
    scene = planning.open_scene("window-close-v3", np.random.default_rng(0))
    env = scene["env"]
    plan = np.random.default_rng(0).uniform(-1, 1, (planning.KNOTS, 4))
    rewards = [env.step(action)[1] for action in plan.repeat(planning.HOLD, axis=0)]
    for _ in range(2):
        outcome = planning.carry_out(env, scene["state"], plan)
        assert outcome["rewards"] == pytest.approx(rewards, abs=1e-6)
        assert len(np.unique(rewards)) > 1
        planning.carry_out(env, scene["state"], -plan)
    moved = planning.carry_out(env, scene["state"], np.zeros((1, 4)))["poses"][0]
    [picture] = planning.look(scene["renderer"], env, [moved])
    assert np.abs(picture.astype(int) - scene["picture"]).mean() < 1  # a step later: the same
    assert scene["rewards"][:, 1].min() > scene["rewards"][:, 0].max()  # experts get it done
    scene["renderer"].close()

@pytest.mark.rendering
def test_a_task_is_guided(rendering, small, two_runs, monkeypatch):
    """Every row has a plan and a gain, under the sentence of the task."""
    asked = set()
    original = vlmrm.RewardModel.embed_texts

    def embed_texts(model, sentences):
        asked.update(sentences)
        return original(model, sentences)

    monkeypatch.setattr(vlmrm.RewardModel, "embed_texts", embed_texts)
    job = {"task": "drawer-close-v3", "name": "x", "runs": two_runs, "device": "cpu"}
    plans = guide.play(dict(job, kind="plans"))
    controls = {"random", "distance-from-start", "simulator", "success", guide.SHAPED}
    assert set(plans) == {"triplet", "zeroshot", *controls}
    assert plans["triplet"] == plans["zeroshot"]  # one model, one seed
    for row in plans.values():
        assert np.shape(row["plan"]) == (planning.KNOTS, 4) and isinstance(row["done"], bool)
    gains = guide.play(dict(job, kind="gain"))
    assert set(gains) == {"triplet", "zeroshot", "distance-from-start", "simulator"}
    assert gains["triplet"] == gains["zeroshot"] != gains["distance-from-start"]
    [sentence] = asked
    assert "drawer" in sentence and guide.play(dict(job, kind="gain")) == gains

@pytest.fixture
def two_runs(finished, tmp_path):
    """A run of triplet, and what passes for one of zeroshot."""
    other = tmp_path / "zeroshot-seed1"
    shutil.copytree(finished, other)
    config = vlmrm.read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps(dict(config, objective="zeroshot")))
    return finished, other

@pytest.fixture
def played(monkeypatch):
    """The names of jobs, which are done in this process, at once; push cannot be done."""
    names = []

    def play(job):
        names.append(job["name"])
        if job["task"] == "push-v3":
            raise vlmrm.InputError("no push today")
        return {"triplet": 0.5}

    monkeypatch.setattr(guide, "play", play)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return names

def test_it_goes_on(two_runs, tmp_path, played, capsys):
    """With what is left, and not with other models. A run of each objective has to be given."""
    def guided(*tasks, folders=two_runs):
        arguments = [*folders, "--results", tmp_path, "--tasks", *tasks]
        return common.main(guide.parser(), guide.work, [str(value) for value in arguments])

    def refused(says, *tasks, folders=two_runs):
        capsys.readouterr()
        assert guided(*tasks, folders=folders) == 2
        one_line(capsys, says, "guide")

    assert guided("reach-v3") == 0
    starts = [f"reach-v3, start {number}" for number in range(guide.STARTS)]
    assert sorted(played) == ["reach-v3", *starts]
    assert guided("reach-v3", "sweep-v3") == 0
    assert played[4:] == ["sweep-v3"]  # there nothing is planned
    refused("no push today", "push-v3")
    found = vlmrm.read_json(tmp_path / "guide.json")
    assert set(found["gain"]) == {"reach-v3", "sweep-v3"} and set(found["plans"]) == set(starts)
    assert set(found["metrics"]) == {"triplet", "zeroshot"}

    path = tmp_path / "guide.json"
    vlmrm.write_whole(path, vlmrm.to_json(dict(found, files={"code": "another"})))
    assert guided("reach-v3") == 0 and "nothing is left" in capsys.readouterr().out
    refused("with other files", "push-v3")
    vlmrm.write_whole(path, vlmrm.to_json(found))
    refused("one run of each objective", "reach-v3", folders=(two_runs[0], two_runs[0]))
    refused("triplet and zeroshot", "reach-v3", folders=two_runs[:1])
    weights = two_runs[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    refused("with other models", "reach-v3")

@pytest.mark.rendering
def test_a_plan_is_filmed(rendering, finished, tmp_path, monkeypatch, capsys):
    """The one that is liked most beyond what the simulator says, of those that get nothing done
    where another plan does. A model that did not make it is refused."""
    monkeypatch.setattr(film, "EVERY", 40)  # two pictures, and the last one once more
    nothing = np.zeros((planning.KNOTS, 4)).tolist()
    best = {"plan": nothing, "done": False, "said": 0.5, "liked": 1.5}
    plans = {"door-open-v3, start 0": {"triplet": best},
             "door-open-v3, start 4": {"triplet": dict(best, liked=9.0)},
             "door-open-v3, start 1": {"triplet": dict(best, said=0.6)},
             "door-open-v3, start 2": {"triplet": dict(best, liked=9.0, done=True)},
             "door-open-v3, start 3": {"triplet": {"plan": nothing, "done": False, "said": -9.0}}}
    for name, found in plans.items():
        found["simulator"] = {"done": name != "door-open-v3, start 4"}
    results = {"plans": plans, "models": {"triplet": vlmrm.digest(finished / "model.safetensors")}}
    path = tmp_path / "guide.json"
    out = tmp_path / "film.gif"

    def filmed():
        path.write_text(json.dumps(results))
        arguments = [finished, "--guide", path, "--out", out]
        return common.main(film.parser(), film.work, [str(value) for value in arguments])

    assert filmed() == 0 and "door-open-v3, start 0, triplet" in capsys.readouterr().out
    with Image.open(out) as saved:
        assert saved.n_frames >= 2
    for plan in plans.values():
        plan["triplet"]["done"] = True
    assert filmed() == 2
    one_line(capsys, "no plan of triplet fails where", "film")
    results["models"]["triplet"] = "of another"
    assert filmed() == 2
    one_line(capsys, "was made with another triplet", "film")
