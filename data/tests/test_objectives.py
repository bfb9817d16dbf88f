"""Tests of the files in data/objectives/, and of what vlmrm.py makes of a file with an objective.

Each is held against the numbers that its authors' own code returned (golden/), values worked out by
hand, a library, or loops that cannot be wrong; and for all it is tested what must hold of any loss.
"""
import ast
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

from conftest import one_line, read_kept, unit  # imports vlmrm before torch

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import vlmrm

TESTS = Path(__file__).resolve().parent
FILES = sorted((TESTS.parent / "objectives").glob("*.py"))
PARTS = {path.stem: vlmrm.get_objective(str(path)) for path in FILES}
CONTROLS = ["clock", "distance-from-start", "vlm-rm"]  # rewards without a loss

def complete(loss):
    """A loss that asks for what was before training gets the batch, its axes turned by one."""
    if not vlmrm.takes_before(loss):
        return loss

    def completed(frames, texts, times, **options):
        before = (frames.detach().roll(1, -1), texts.detach().roll(1, -1))
        return loss(frames, texts, times, before, **options)

    return completed

LOSSES = {}
for name, parts in PARTS.items():
    if parts["loss"]:
        LOSSES[name] = complete(parts["loss"])

# Frames, texts, and times: five frames evenly spread over each episode.
FRAMES = unit(6, 5, 8)
TEXTS = unit(6, 8, seed=1)
TIMES = torch.linspace(0, 1, 5, dtype=torch.float64).expand(6, 5)

def test_every_file_says_what_it_is():
    """What to notice and where it is from; constants are arguments of its loss, rates are sane."""
    assert set(PARTS) - set(LOSSES) == set(CONTROLS)
    for path in FILES:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert "Notice:" in text and "Source:" in text, path
        parts = PARTS[path.stem]
        rate, constants = parts["TUNED"]
        assert 1e-4 <= rate <= 1e-2, path
        if parts["loss"]:
            parameters = list(inspect.signature(parts["loss"]).parameters)
            assert parameters[:3] == ["frames", "texts", "times"], path
            assert set(constants) <= set(parameters[3:]), path
            assert all(value > 0 for value in constants.values()), path
            assert parts["reward"] is vlmrm.cosine_reward, path

@pytest.mark.parametrize("name", PARTS)
def test_which_objectives_train_the_cosine(name):
    """COSINE is what the gradient says: hilp's does not reach the sentence; rewards have none."""
    if name in CONTROLS:
        assert PARTS[name]["COSINE"] is False
        return
    frames = FRAMES.clone().requires_grad_()
    texts = TEXTS.clone().requires_grad_()
    LOSSES[name](frames, texts, TIMES, **PARTS[name]["TUNED"][1]).backward()
    assert frames.grad.abs().max() > 0
    assert (texts.grad is not None) == PARTS[name]["COSINE"] == (name != "hilp")

# -----------------------------------------------------------------------------
# The authors' own code: value and gradient

OFFICIAL = vlmrm.read_json(TESTS / "golden" / "golden.json")

def golden_arrays(method):
    arrays = np.load(TESTS / "golden" / f"{method}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

def check_golden(loss, expected, gradients):
    """The value, and the gradient of each leaf."""
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    for leaf, gradient in gradients:
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-12)

@pytest.mark.parametrize("form", ["P", "T"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("scale", [10, 100])
def test_decisionnce_golden(form, count, scale):
    arrays = golden_arrays("decisionnce")
    name = f"{form}_F{count}_{scale}"
    frames = arrays[f"vis{count}"].double().requires_grad_()
    texts = arrays["text"].double().requires_grad_()
    loss = LOSSES[f"decisionnce-{form.lower()}"](frames, texts, None, scale=scale)
    expected = OFFICIAL["decisionnce"]["results"][f"{form}_F{count}_scale{scale}/float64"]["loss"]
    check_golden(loss, expected, [(frames, arrays[f"grad_vis_{name}"]),
                                  (texts, arrays[f"grad_text_{name}"])])

def test_vlc_golden(monkeypatch):
    """The official scores are a transformer's. Frames that are the axes of a space, and texts whose
    coordinates are the scores, give any scores through a dot product in the cosine's place."""
    monkeypatch.setattr(vlmrm, "cosine", lambda a, b: (a * b).sum(-1))
    arrays = golden_arrays("vlc")
    expected = OFFICIAL["vlc"]["results"]
    frames = torch.eye(72, dtype=torch.float64).view(6, 12, 72)
    texts = arrays["sim"].double().reshape(6, 72).requires_grad_()
    full = expected["full/float64"]
    ranking = LOSSES["vlc"](frames, texts, None, margin=0.1, rank_weight=1.0).item()
    ranking -= (full["t2v_ce"] + full["v2t_ce"]) / 2
    official = expected["margin0.1/float64"]["ranking_loss"]
    assert ranking == pytest.approx(official, rel=1e-9)
    check_golden(LOSSES["vlc"](frames, texts, None), full["total_w33"],
                 [(texts, arrays["grad_full"].reshape(6, 72))])

def test_hilp_golden():
    """The official loss on the embeddings of two networks and of their slow copies."""
    arrays = {key: array.double() for key, array in golden_arrays("hilp").items()}
    value = vlmrm.negative_distance(arrays["phi"], arrays["phi_goal"])
    target = vlmrm.negative_distance(arrays["tgt_phi"], arrays["tgt_phi_goal"])
    next_target = vlmrm.negative_distance(arrays["tgt_phi_next"], arrays["tgt_phi_goal"])
    official = OFFICIAL["hilp"]
    loss = PARTS["hilp"]["expectile_loss"](value, target, next_target, arrays["success"],
                                           official["discount"], official["expectile"])
    assert loss.item() == pytest.approx(official["results"]["value_loss"], rel=1e-7)

@pytest.mark.parametrize("prompts, suffix", [("single", ""), ("three_prompts", "3")])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_vlm_rm_golden(prompts, suffix, alpha):
    arrays = golden_arrays("vlmrm")
    goal = F.normalize(arrays["target" + suffix], dim=-1).mean(0)
    baseline = F.normalize(arrays["baseline" + suffix], dim=-1).mean(0)
    ours = PARTS["vlm-rm"]["goal_baseline_reward"](arrays["frames"], goal, baseline, alpha)
    expected = OFFICIAL["vlmrm"]["results"][f"{prompts}/alpha{alpha}"]
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)  # official: float32

# -----------------------------------------------------------------------------
# By hand

E0 = torch.tensor([1.0, 0.0])
E1 = torch.tensor([0.0, 1.0])
RISE = torch.stack([E1, E1, E1, E1, E0])[None]  # rewards 0 0 0 0 1 under the text e0
TURN = torch.stack([E1, E1, E0, E0, E0])[None]
AXES = torch.eye(3)
# Two videos turn from e2 into their own axis, which is their text; in the middle they look away.
TURNS = torch.stack([AXES[[2, 2, 0, 0, 0]], AXES[[2, 2, 1, 1, 1]]])
TURNS[:, 2] *= -1
BY_HAND = [
    # Each frame equal to its text, texts orthogonal: M = I, each row costs log(e + 1) - 1.
    ("clip", torch.stack([E0, E1])[:, None].expand(2, 5, 2), torch.stack([E0, E1]), {"scale": 1.0},
     math.log(math.e + 1) - 1),
    # R is 2 on the diagonal (two late frames at cosine 1, early ones at 0), 0 beside it.
    ("decisionnce-p", TURNS, AXES[:2], {"scale": 1.0}, math.log(1 + math.exp(-2))),
    # They move once, by e_k - e2: along their own text by 1 / sqrt 2, along the other by 0. The
    # steps of length 0 count nothing.
    ("decisionnce-t", TURNS, AXES[:2], {"scale": 1.0}, math.log(1 + math.exp(-(0.5**0.5)))),
    # Scores 0 1 0 1 1: of four steps one falls, by 1. CLIP of a single pair is 0.
    ("vlc", torch.stack([E1, E0, E1, E0, E0])[None], E0[None], {}, 33 / 4),
    # At right angles to the text p = 1/2 everywhere. Frames 1 to 4 and, rewound, 3 to 0 have
    # targets 1/4 1/2 3/4 1 3/4 1/2 1/4 0: squared errors 1/16 0 1/16 1/4 1/16 0 1/16 1/4. Two such
    # videos, orthogonal to both texts, add the wrong text, with target 0.
    ("progress", E1.expand(2, 5, 2), E0.expand(2, 2), {}, (3 / 32 + 1 / 4) / 2),
    # To each of the three goals the distance is sqrt 2, from next it is .001 (the clamp): target
    # -1 - .99 * .001, advantage positive (-1 > -1.41), weight .95.
    ("hilp", TURN, None, {}, 0.95 * (math.sqrt(2) - 1 - 0.99e-3) ** 2)]

@pytest.mark.parametrize("name, frames, texts, options, expected", BY_HAND)
def test_loss_by_hand(name, frames, texts, options, expected):
    times = torch.linspace(0, 1, 5).expand(len(frames), 5)
    assert LOSSES[name](frames, texts, times, **options).item() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("name, labels", [
    ("preference", "times"), ("preference-oracle", "rewards")])
def test_preference_goes_by_its_labels(name, labels):
    """The time: six level pairs cost log 2 each, four lead by 1. The oracle's: the last frame is
    the worst, the others tie, so four pairs trail by 1. Equal labels: no pair, and no loss."""
    by_time = (6 * math.log(2) + 4 * math.log(1 + math.exp(-1))) / 10
    trailing = math.log(1 + math.e)
    for times, expected in (([0.0, 1, 2, 3, 4], by_time), ([3.0, 3, 3, 3, 0], trailing),
                            ([1.0] * 5, 0)):
        loss = LOSSES[name](RISE, E0[None], torch.tensor([times]), scale=1.0)
        assert loss.item() == pytest.approx(expected)
    assert PARTS[name]["LABELS"] == labels

def test_vlm_rm_by_hand():
    """Goal e0, baseline -e0, frame e1: offset (-1, 1), along d 1, across 1. alpha 0: the cosine, 0;
    alpha 1: 1 - 1/2; alpha 1/2: 1 - (1 + 1/4) / 2. At the goal itself the reward is 1."""
    reward = PARTS["vlm-rm"]["goal_baseline_reward"]
    for alpha, expected in ((0.0, 0.0), (1.0, 0.5), (0.5, 0.375)):
        assert reward(E1, E0, -E0, alpha).item() == pytest.approx(expected)
        assert reward(E0, E0, -E0, alpha).item() == 1
    assert torch.isfinite(reward(TURN, E0, E0)).all()  # equal sentences: a number and not NaN
    embedded = []

    def embed(sentences):
        embedded.extend(sentences)
        return -E0[None]

    assert torch.equal(PARTS["vlm-rm"]["reward"](TURN, E0, embed), reward(TURN, E0, -E0))
    assert embedded == [PARTS["vlm-rm"]["BASELINE"]]

def test_controls_by_hand():
    two = TURN.repeat(2, 1, 1)
    assert PARTS["clock"]["reward"](two, E0).tolist() == [[0, 1, 2, 3, 4]] * 2
    away = math.sqrt(2)
    expected = torch.tensor([[0, 0, away, away, away]] * 2)
    torch.testing.assert_close(PARTS["distance-from-start"]["reward"](two, E0), expected)

# -----------------------------------------------------------------------------
# Against a library or loops

def sigmoid(x):
    return 1 / (1 + math.exp(-float(x)))

def open_clips_loss():
    return np.mean([open_clip.ClipLoss()(FRAMES[:, k], TEXTS, 1 / 0.07) for k in range(5)])

def naive_hilp():
    terms = []
    for i in range(6):
        for goal in (FRAMES[i, 2], FRAMES[i, 3], FRAMES[i, 4], FRAMES[(i + 1) % 6, 4]):
            value = -math.sqrt(max(math.dist(FRAMES[i, 1], goal) ** 2, 1e-6))
            target = -1 - 0.99 * math.sqrt(max(math.dist(FRAMES[i, 2], goal) ** 2, 1e-6))
            weight = 0.95 if target >= value else 0.05
            terms.append(weight * (target - value) ** 2)
    return np.mean(terms)

def naive_progress():
    errors = []
    for i in range(6):
        for k in (1, 2, 3, 4, 3, 2, 1, 0):
            for text, target in ((TEXTS[i], k / 4), (TEXTS[(i + 1) % 6], 0)):
                errors.append((sigmoid(10 * FRAMES[i, k] @ text) - target) ** 2)
    return np.mean(errors)

def naive_hop(scale=10):
    errors = []
    for video, text in zip(FRAMES, TEXTS):
        p = [0.05 + 0.9 * sigmoid(scale * frame @ text) for frame in video]
        t = [0.05 + 0.9 * k / 4 for k in range(5)]
        for u, v in itertools.permutations(range(5), 2):
            hops = []
            for y in (p, t):
                rest = 1 - y[u] if v > u else y[u]
                hops.append((y[v] - y[u]) / rest)
            errors.append((hops[0] - hops[1]) ** 2)
    return np.mean(errors)

def naive_contrast_of_directions():
    scores = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in np.ndindex(6, 6):
        for a, b in ((0, 1), (1, 3), (3, 4)):
            step = FRAMES[i, b] - FRAMES[i, a]
            scores[i, j] += 3 * step @ TEXTS[j] / step.norm()
    own = torch.arange(6)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

def naive_anchored():
    away = [math.dist(frame, frame.roll(1)) ** 2 for frame in FRAMES.flatten(0, 1)]
    return naive_hop(scale=5) + 0.1 * naive_contrast_of_directions() + np.mean(away)

def naive_triplet_directions():
    terms = []
    for video, text in zip(FRAMES, TEXTS):
        for early, late in itertools.combinations(video, 2):
            terms.append(max(0, 0.1 - late @ text + early @ text))
    return np.mean(terms) + 0.03 * naive_contrast_of_directions()

def naive_timerewarder():
    entropies = []
    centres = np.linspace(-1, 1, 20)
    for video, text in zip(FRAMES, TEXTS):
        for u, v in itertools.permutations(range(5), 2):
            p = scipy.stats.norm.pdf(centres, 2.5 * (video[v] - video[u]) @ text, 2 / 19)
            p = p / p.sum()
            place = ((v - u) / 4 + 1) * 19 / 2  # among the bins: the two around it share the target
            low = int(place)
            high = min(low + 1, 19)
            share = place - low
            entropies.append(-(1 - share) * np.log(p[low]) - share * np.log(p[high]))
    return np.mean(entropies)

@pytest.mark.parametrize("name, oracle", [
    ("clip", open_clips_loss), ("hilp", naive_hilp), ("progress", naive_progress),
    ("hop", naive_hop), ("anchored", naive_anchored), ("timerewarder", naive_timerewarder),
    ("triplet-directions", naive_triplet_directions)])
def test_loss_against_a_library_or_loops(name, oracle):
    assert LOSSES[name](FRAMES, TEXTS, TIMES).item() == pytest.approx(float(oracle()), rel=1e-9)

@pytest.mark.parametrize("name", ["tcn", "vip", "hilp"])
def test_text_versions_are_the_losses_with_the_sentence_as_the_last_frame(name):
    original = vlmrm.OBJECTIVES[name][0] if name in vlmrm.OBJECTIVES else LOSSES[name]
    replaced = torch.cat([FRAMES[:, :4], TEXTS[:, None]], dim=1)
    assert LOSSES[f"{name}-text"](FRAMES, TEXTS, None) == original(replaced, None, None)

# -----------------------------------------------------------------------------
# What must hold of each loss

@pytest.mark.parametrize("name", LOSSES)
def test_lower_for_the_better_ordered_batch(name):
    """Videos that end at their instruction, against the same with `now` and `next` far apart and
    the order broken; for clip, which knows no order, against the instructions of other videos."""
    texts = unit(8, 16)
    start = unit(8, 16, seed=7)[:, None]  # the frames turn from here into their text
    share = TIMES[:1, :, None]
    good = F.normalize(start * (1 - share) + texts[:, None] * share, dim=-1)
    worse = good.flip(1)
    if name == "clip":
        worse = good.roll(1, 0)
    elif name == "tcn-text":  # s0, s1, s2 = 3, 0, 4: neighbours in time far apart
        worse = good[:, [1, 3, 2, 0, 4]]
    elif name in ("vip-text", "hilp", "hilp-text"):  # a step back on the way
        worse = good[:, [1, 2, 0, 3, 4]]
    times = TIMES[:1].expand(8, 5)
    assert LOSSES[name](good, texts, times) < LOSSES[name](worse, texts, times)

def odd_batches():
    """Frames equal to their texts or opposite, huge, tiny, one video alone; then any shapes."""
    frames = FRAMES.float()
    texts = TEXTS.float()
    same = texts[:, None].repeat(1, 5, 1)
    batches = [(same, texts), (-same, texts), (1e4 * frames, texts), (1e-6 * frames, texts),
               (frames[:1], texts[:1])]
    rng = np.random.default_rng(9)
    for seed in range(20):
        B, D = rng.integers(2, 40, 2)
        scale = 10 ** rng.uniform(-3, 3)
        batches.append((unit(B, 5, D, seed=seed) * scale, unit(B, D, seed=50)))
    return batches

def value_and_gradient(loss, frames, texts, turn):
    """Of a batch turned by some places; the gradient is turned back."""
    x = frames.roll(turn, 0).requires_grad_()
    value = loss(x, texts.roll(turn, 0), TIMES[:1].expand(len(x), 5).to(x))
    [gradient] = torch.autograd.grad(value, x)
    assert value.shape == () and value.isfinite() and gradient.isfinite().all()
    assert torch.equal(x.roll(-turn, 0), frames)  # inputs are not changed
    return value, gradient.roll(-turn, 0)

@pytest.mark.parametrize("name", LOSSES)
def test_finite_on_any_input_and_turning_with_the_batch(name):
    """Turned by a place, a batch turns the gradient by a place, and nothing else changes."""
    for frames, texts in odd_batches():
        expected = value_and_gradient(LOSSES[name], frames, texts, 0)
        found = value_and_gradient(LOSSES[name], frames, texts, 1)
        if frames.dtype == torch.float64:
            torch.testing.assert_close(found, expected)

# -----------------------------------------------------------------------------
# A file of a reader's

@pytest.fixture
def program(toy, tmp_path, monkeypatch):
    """Two steps on the toy data with some objectives, in this process, without drawing."""
    monkeypatch.setattr(vlmrm, "draw_curves", lambda *_: None)

    def run(*objectives):
        return vlmrm.main([
            "--data", str(toy.path), "--steps", "2", "--batch", "2", "--device", "cpu",
            "--runs", str(tmp_path / "runs"), "--objective", *map(str, objectives)])
    return run

OWN = "def loss(frames, texts, times):\n    return (frames[:, 0] - texts).square().mean()\n"
LOSS = "def loss(frames, texts, times):\n    "

def test_a_file_with_a_loss_and_tuned_constants(program, tmp_path):
    """The loss gets its constants, rate and the simulator's rewards, and may import vlmrm."""
    own = tmp_path / "own.py"
    own.write_text("import vlmrm\nTUNED = (1e-3, {'weight': 0.5})\nLABELS = 'rewards'\n"
                   "def loss(frames, texts, times, weight=9.0):\n"
                   "    score = vlmrm.cosine(frames[:, 0], texts).square().mean()\n"
                   "    return weight * (2 + score) * (times.max() > 1)\n")
    assert program(own) == 0
    folder = tmp_path / "runs" / "own-seed0"
    assert all(1 <= entry["loss"] <= 1.5 for entry in read_kept(folder)["log"])
    config = read_kept(folder, "config.json")
    assert (config["learning_rate"], config["constants"]) == (1e-3, {"weight": 0.5})

def test_a_file_with_a_reward(program, tmp_path):
    """It replaces the cosine: a clock, and one that looks at a sentence of its own."""
    reader = tmp_path / "reader.py"
    reader.write_text("def reward(frames, text, embed):\n"
                      "    return frames @ (text - embed(['a table', 'a drawer'])[0])\n")
    assert program("zeroshot", "clock", reader) == 0
    runs = tmp_path / "runs"
    clock = read_kept(runs / "clock-seed0")
    assert clock["unseen"]["voc"]["value"] == 1
    assert clock["seen"]["ranking_accuracy_same_time"]["value"] == 0.5
    found = np.array(list(read_kept(runs / "reader-seed0")["predicted"].values()))
    cosine = np.array(list(read_kept(runs / "zeroshot-seed0")["predicted"].values()))
    assert np.ptp(found) > 0 and np.abs(found - cosine).max() > 0.01
    assert read_kept(runs / "reader-seed0", "config.json")["cosine"] is False

@pytest.mark.parametrize("text, says", [
    ("def my_loss(frames, texts, times): pass", "neither loss() nor reward()"),
    ("def loss(frames, texts:", "SyntaxError"), ("import nothing_of_this_name", "own.py, line 1"),
    (LOSS + "return frames @ texts", "own.py, line 2: RuntimeError"),
    (LOSS + "raise SystemExit(0)", "own.py, line 2: SystemExit: 0"),
    ("import sys\nsys.exit(0)", "own.py, line 2: SystemExit: 0"),
    ("def loss(frames, texts): return frames.sum()", "own.py: TypeError"),
    (OWN + "LABELS = 'reward'", "LABELS must be times or rewards"),
    (OWN + "TUNED = (-1e-3, {})", "learning_rate -0.001 is not between"),
    (OWN + "TUNED = (0, {})", "learning_rate 0 is not between"),
    (OWN + "TUNED = 1e-3", "own.py"), (OWN + "TUNED = (1e-3, {'weight': 1.0})", "weight"),
    ("import numpy\n" + OWN + "TUNED = (1e-3, {'weight': numpy.float32(1)})", "a plain number"),
    (OWN + "TUNED = (1e-3, {'weight': (1, 2)})", "(1, 2): a constant is a plain number"),
    (OWN + "TUNED = (1e-3, {0: 1.0})", "a constant is a plain number"),
    ("import torch\nloss = torch.nn.L1Loss()", "Make it a function"),
    ("import vlmrm\nvlmrm.cosine = None\n" + OWN, "changes vlmrm.cosine"),
    ("import vlmrm\nvlmrm.METRICS['new'] = ('', 0)\n" + OWN, "changes vlmrm.OBJECTIVES, or"),
    ("import vlmrm\nvlmrm.RewardModel.encode = print\n" + OWN, "changes vlmrm.RewardModel.encode"),
    (OWN + "TUNED = (1e-3, {'weight': float('nan')})", "nan: a constant is a plain number"),
    (OWN + "COSINE = 'no'", "COSINE must be True or False"),
    (LOSS + "return open('no such file')", "own.py, line 2: FileNotFoundError"),
    (LOSS + "return frames.square().mean() + frames.sum()", "needs COSINE = False"),
    (LOSS + "return (frames[:, 0] @ texts.T).sum() * float('nan')", "step 1: the loss is nan"),
    (LOSS + "return (0 * (frames[:, 0] - texts)).norm(dim=1).sqrt().sum()", "its gradient nan"),
    (LOSS + "return 0 * frames.sum() + 0 * texts.sum()", "nothing to learn"),
    (LOSS + "return None", "must be one number"), (LOSS + "return texts", "must be one number"),
    (LOSS + "return times.sum()", "made of the embeddings"),
    ("def reward(frames, text): return frames @ text * float('nan')", "must be finite"),
    ("def reward(frames, text): return (frames @ text).T", "(E, T)"),
    ("def reward(frames): return frames[..., 0]", "own.py: TypeError")])
def test_a_mistake_in_a_file_is_one_line_and_leaves_no_folder(
        program, tmp_path, capsys, text, says):
    (tmp_path / "own.py").write_text(text)
    assert program(tmp_path / "own.py") == 2
    one_line(capsys, says)
    assert not list(tmp_path.glob("runs/*"))

def test_a_loss_without_sentences_may_say_so(program, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("COSINE = False\n" + LOSS + "return frames[:, 0].sum(-1).square().mean()")
    assert program(own) == 0
    assert read_kept(tmp_path / "runs" / "own-seed0", "config.json")["cosine"] is False

def test_a_reward_that_writes_into_its_arguments_changes_nothing(toy, tiny):
    def careless(frames, text):
        frames *= 2
        text += 1
        return frames @ text

    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    found = vlmrm.evaluate(tiny, toy, instructions, careless)["predicted"]
    expected = vlmrm.evaluate(tiny, toy, instructions, lambda frames, text: 2 * frames @ (text + 1))
    assert found == expected["predicted"]

def test_a_reward_of_turned_shape_is_refused(toy, tiny):
    """Also where a task has as many test episodes as an episode has pictures, ten."""
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    data = vlmrm.Dataset(toy.path)
    data.split[:] = "train"
    data.split[data.select(task="reach-v3")[:10]] = "test"
    with pytest.raises(vlmrm.InputError, match=r"rewards must be finite, \(E, T\)"):
        vlmrm.evaluate(tiny, data, instructions, lambda frames, text: (frames @ text).T)

def test_a_file_reaches_no_other(program, tmp_path, monkeypatch):
    """Neither by a module beside it, in a folder of it or above it, nor by sys.path, the folder or
    the default type. What is no file beside it, or hidden, does not count."""
    monkeypatch.chdir(tmp_path)
    for folder, sign in (("a", "-"), ("b", "+")):
        (tmp_path / folder / "in" / "d.py").mkdir(parents=True)
        (tmp_path / folder / "in" / ".#own.py").symlink_to("nowhere")
        (tmp_path / folder / "lib").mkdir()
        for helper in ("helper.py", "lib/deeper.py"):
            (tmp_path / folder / helper).write_text(f"SIGN = {sign}1")
        (tmp_path / folder / "in" / "own.py").write_text(
            "import os, sys, torch\n"
            "sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))\n"
            "from helper import SIGN\nfrom lib import deeper\nassert deeper.SIGN == SIGN\n"
            "os.chdir('/')\ntorch.set_default_dtype(torch.float64)\n"
            + LOSS + "return SIGN * (frames[:, 0] - texts).square().mean()")
    path = list(sys.path)
    assert program(tmp_path / "a" / "in" / "own.py", tmp_path / "b" / "in" / "own.py") == 0
    assert sys.path == path and Path.cwd() == tmp_path
    assert torch.get_default_dtype() == torch.float32
    one = read_kept(tmp_path / "runs" / "own-seed0")["log"]
    other = read_kept(tmp_path / "runs" / "own-seed0-2")["log"]
    assert one[0]["loss"] == -other[0]["loss"] < 0

def test_a_file_reaches_no_other_while_it_trains(program, tmp_path):
    """Here it imports its helper, and changes the default type, when the loss is asked for."""
    for folder, sign in (("a", "-"), ("b", "+")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text(f"SIGN = {sign}1")
        (tmp_path / folder / "own.py").write_text(
            "import os, sys, torch\n" + LOSS + "sys.path.insert(0, os.path.dirname(__file__))\n"
            "    torch.set_default_dtype(torch.float64)\n    from helper import SIGN\n"
            "    return SIGN * (frames[:, 0] - texts).square().mean()")
    assert program(tmp_path / "a" / "own.py", tmp_path / "b" / "own.py", "zeroshot") == 0
    assert torch.get_default_dtype() == torch.float32
    one = read_kept(tmp_path / "runs" / "own-seed0")["log"]
    other = read_kept(tmp_path / "runs" / "own-seed0-2")["log"]
    assert one[0]["loss"] == -other[0]["loss"] < 0

def test_whose_a_module_is(tmp_path, monkeypatch):
    """Python's and installed packages stay; what lies beside them is the reader's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_reader.py").touch()
    import of_a_reader
    assert vlmrm.is_readers_own(of_a_reader)
    for module in (sys, json, np, torch, np.linalg):
        assert not vlmrm.is_readers_own(module)
    of_a_reader.__file__ = f"{sys.prefix}/project/own.py"
    assert vlmrm.is_readers_own(of_a_reader)

def test_a_loss_that_writes_into_its_arguments_changes_nothing(program, tmp_path):
    """What it returns is what counts, also for the share of frames in order."""
    for name, text in (("careful", "frames = frames - 1\n    "), ("careless", "frames -= 1\n    ")):
        (tmp_path / f"{name}.py").write_text(LOSS + text + "return (frames[:, 0] @ texts.T).sum()")
    assert program(tmp_path / "careful.py", tmp_path / "careless.py") == 0
    logs = [read_kept(tmp_path / "runs" / f"{name}-seed0")["log"]
            for name in ("careful", "careless")]
    assert logs[0] == logs[1]

def test_two_files_of_one_name_are_two_rows(program, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(f"{OWN}# {folder}")
    assert program(tmp_path / "a" / "own.py", tmp_path / "b" / "own.py") == 0
    table = (tmp_path / "runs" / "table.md").read_text(encoding="utf-8")
    assert table.count("| own |") == 2
