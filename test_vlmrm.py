"""Tests of vlmrm.py and of what lies in data/. Run with: python -m pytest

Every formula is held against something that does not share its code: a value worked out by hand,
the numbers that the authors' own code returned (data/golden), a library, or a loop so naive that it
cannot be wrong. Functions stand in the order of vlmrm.py; the scripts of data/ come last.
"""
import ast
import contextlib
import copy
import errno
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")  # gymnasium imports mujoco, which reads it once
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))

import vlmrm  # before torch: see there

import gymnasium
import imageio.v3 as imageio
import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SOURCE = (HERE / "vlmrm.py").read_text(encoding="utf-8")
ZOO = {path.stem: str(path) for path in sorted((HERE / "data" / "objectives").glob("*.py"))}
PARTS = {name: vlmrm.get_objective(ZOO.get(name, name)) for name in [*vlmrm.OBJECTIVES, *ZOO]}
LOSSES = {name: parts["loss"] for name, parts in PARTS.items() if parts["loss"]}

def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)

def even_times(batch):
    """Five frames evenly spread over each episode: (B, 5), float64."""
    return torch.linspace(0, 1, 5, dtype=torch.float64).expand(batch, 5)

# -----------------------------------------------------------------------------
# Losses against the authors' own code: value and gradient

GOLDEN = json.loads((HERE / "data" / "golden" / "golden.json").read_text(encoding="utf-8"))
# Where the slots of the official batches lie in ours: start, now, next, later, end, and a sixth
# (R3M: the end, as its s2 may be another; LIV: the frame of the caption). R3M has no "next" frame,
# VIP and LIV have no "later": they must not look at it, so any frame will do there, here zeros.
SLOTS = {"r3m": [0, 2, None, 3, 4, 1], "vip": [0, 2, 3, None, 1], "liv": [0, 2, 3, None, 1, 4]}

def golden_arrays(method):
    return {key: torch.from_numpy(array)
            for key, array in np.load(HERE / "data" / "golden" / f"{method}.npz").items()}

def golden(method):
    """The arrays of a method, and its frames in the order of our batch as a leaf for gradients."""
    arrays = golden_arrays(method)
    embeddings = arrays["emb"].double()
    frames = torch.stack([torch.zeros_like(embeddings[:, 0]) if slot is None
                          else embeddings[:, slot] for slot in SLOTS[method]], dim=1)
    return arrays, frames.requires_grad_()

def check_golden(loss, method, variant, frames, gradient):
    expected = GOLDEN[method]["results"][f"{variant}/float64"]["full_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    ours = torch.zeros_like(gradient)
    for place, slot in enumerate(SLOTS[method]):
        if slot is not None:
            ours[:, slot] += frames.grad[:, place]
    torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-12)

class InTurn:
    """Permutations that a loss uses twice: another set of them each time it goes through them."""
    def __init__(self, *sets):
        self.sets = iter(sets)

    def __iter__(self):
        return iter(next(self.sets))

@pytest.fixture
def official_permutations(monkeypatch):
    """Hands the permutations of the official run to the loss, call by call."""
    def use(*permutations):
        calls = iter(permutations)
        monkeypatch.setattr(vlmrm, "negative_permutations", lambda n, batch: next(calls))
    return use

def test_tcn_golden(official_permutations):
    arrays, frames = golden("r3m")
    of_s0, of_s2 = arrays["perms_tcn"].view(3, 2, 6).unbind(1)
    official_permutations(InTurn(of_s0, of_s2))
    loss = vlmrm.tcn_loss(frames, None, None)
    check_golden(loss, "r3m", "tcn_only_l2", frames, arrays["grad_tcn_only_l2"])

def test_r3m_golden(official_permutations):
    arrays, frames = golden("r3m")
    of_s0, of_s2 = arrays["perms_tcn"].view(3, 2, 6).unbind(1)
    official_permutations(*arrays["perms_lang"].view(3, 3, 6).unbind(1), InTurn(of_s0, of_s2))
    texts = arrays["lang_same"] * arrays["has_lang"][:, None]
    loss = vlmrm.r3m_loss(frames, texts, None)
    check_golden(loss, "r3m", "full_cosinehead_l2", frames, arrays["grad_full_cosinehead_l2"])

@pytest.mark.parametrize("variant, options", [
    ("neg0", {"negatives": 0, "l1": 0, "l2": 0}), ("neg3", {"l1": 0, "l2": 0}), ("ego4d_cfg", {})])
def test_vip_golden(variant, options, official_permutations):
    arrays, frames = golden("vip")
    if variant != "neg0":
        official_permutations(arrays["perms"])
    loss = vlmrm.vip_loss(frames, None, None, **options)
    check_golden(loss, "vip", variant, frames, arrays[f"grad_{variant}"])

@pytest.mark.parametrize("variant, options", [
    ("finetune_cos_neg0", {}), ("all_cos_neg0", {"language_weight": 1}),
    ("pretrain_cos_neg3", {"language_weight": 1})])
def test_liv_golden(variant, options, monkeypatch):
    arrays, frames = golden("liv")
    if variant.endswith("neg3"):  # it drew anew for the sentences, we do not
        real, official = vlmrm.implicit_value_loss, iter((arrays["perms_visual"],
                                                          arrays["perms_lang"]))
        monkeypatch.setattr(vlmrm, "implicit_value_loss",
                            lambda *batch: real(*batch[:-1], next(official)))
    texts = arrays["text"].clone().requires_grad_()
    loss = vlmrm.liv_loss(frames, texts, None, **options)
    check_golden(loss, "liv", variant, frames, arrays[f"grad_emb_{variant}"])
    torch.testing.assert_close(texts.grad, arrays[f"grad_text_{variant}"], rtol=1e-6, atol=1e-12)

@pytest.mark.parametrize("scale", [10, 100])
@pytest.mark.parametrize("F_", [2, 4])
@pytest.mark.parametrize("form", ["P", "T"])
def test_decisionnce_golden(form, F_, scale):
    arrays = golden_arrays("decisionnce")
    frames = arrays[f"vis{F_}"].double().requires_grad_()
    texts = arrays["text"].double().requires_grad_()
    loss = LOSSES[f"decisionnce-{form.lower()}"](frames, texts, None, scale=scale)
    name = f"{form}_F{F_}_{scale}"
    expected = GOLDEN["decisionnce"]["results"][f"{form}_F{F_}_scale{scale}/float64"]["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    for leaf, key in ((frames, "vis"), (texts, "text")):
        torch.testing.assert_close(leaf.grad, arrays[f"grad_{key}_{name}"], rtol=1e-6, atol=1e-12)

def test_vlc_golden(monkeypatch):
    """The official scores are a transformer's. Frames that are the axes of a space, and texts whose
    coordinates are the scores, give any scores through a dot product in the cosine's place."""
    monkeypatch.setattr(vlmrm, "cosine", lambda a, b: (a * b).sum(-1))
    arrays, expected = golden_arrays("vlc"), GOLDEN["vlc"]["results"]
    texts = arrays["sim"].double().reshape(6, 72).requires_grad_()
    batch = torch.eye(72, dtype=torch.float64).view(6, 12, 72), texts, None
    full = expected["full/float64"]
    loss = LOSSES["vlc"](*batch, margin=0.1, rank_weight=1.0).item()
    assert loss - (full["t2v_ce"] + full["v2t_ce"]) / 2 == pytest.approx(
        expected["margin0.1/float64"]["ranking_loss"], rel=1e-9)
    (loss := LOSSES["vlc"](*batch)).backward()
    assert loss.item() == pytest.approx(full["total_w33"], rel=1e-9)
    torch.testing.assert_close(
        texts.grad.view(6, 6, 12), arrays["grad_full"], rtol=1e-6, atol=1e-12)

def test_hilp_golden():
    """The official loss on the embeddings of two networks and of their slow copies."""
    arrays = {key: array.double() for key, array in golden_arrays("hilp").items()}
    v = vlmrm.negative_distance
    loss = PARTS["hilp"]["expectile_loss"](
        v(arrays["phi"], arrays["phi_goal"]), v(arrays["tgt_phi"], arrays["tgt_phi_goal"]),
        v(arrays["tgt_phi_next"], arrays["tgt_phi_goal"]), arrays["success"],
        GOLDEN["hilp"]["discount"], GOLDEN["hilp"]["expectile"])
    assert loss.item() == pytest.approx(GOLDEN["hilp"]["results"]["value_loss"], rel=1e-7)

@pytest.mark.parametrize("prompts", ["single", "three_prompts"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_vlm_rm_golden(prompts, alpha):
    arrays = golden_arrays("vlmrm")
    n = "" if prompts == "single" else "3"
    goal, baseline = (F.normalize(arrays[key + n], dim=-1).mean(0) for key in (
        "target", "baseline"))
    ours = PARTS["vlm-rm"]["goal_baseline_reward"](arrays["frames"], goal, baseline, alpha)
    expected = GOLDEN["vlmrm"]["results"][f"{prompts}/alpha{alpha}"]
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)  # official: float32

# -----------------------------------------------------------------------------
# Losses and rewards by hand

E0, E1 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
RISE = torch.stack([E1, E1, E1, E1, E0])[None]  # rewards 0 0 0 0 1 under the text e0
TURN = torch.stack([E1, E1, E0, E0, E0])[None]
AXES = torch.eye(3)  # two videos turn from e2 into their own axis, and their texts are the axes
TURNS = torch.stack([torch.stack([AXES[i] for i in (2, 2, 2, k, k)]) for k in (0, 1)])
BY_HAND = [
    # Four pairs rise by 1: max(0, .1 - 1) = 0; six are level: .1 each. Mean over ten pairs.
    ("triplet", RISE, E0[None], {"margin": 0.1}, 0.06),
    # Each frame equal to its text, texts orthogonal: M = I, each row costs log(e + 1) - 1.
    ("clip", torch.stack([E0, E1])[:, None].expand(2, 5, 2), torch.stack([E0, E1]), {"scale": 1.0},
     math.log(math.e + 1) - 1),
    # One video: no negatives but (s2, s0). s0 = s1 = e0, s2 = e1: the pair (s1, s0) has distance 0,
    # the others sqrt 2. First term: log 2 (two equal logits); second: log(1 + exp(-sqrt 2)).
    ("tcn", torch.stack([E1, E0, E1, E0, E1])[None], E0[None], {},
     (math.log(2) + math.log(1 + math.exp(-math.sqrt(2)))) / 2),
    # A video that never moves, no penalty: every contrast is between two equal logits, three in the
    # language term and two in TCN.
    ("r3m", E0.expand(1, 5, 2), E0[None], {"l1": 0, "l2": 0}, 2 * math.log(2)),
    # V(start) = V(now) = -sqrt 2, V(next) = 0, so .02 sqrt 2 + (1 - sqrt 2 - 0).
    ("vip", TURN, E0[None], {"negatives": 0, "l1": 0, "l2": 0}, 1 - 0.98 * math.sqrt(2)),
    # The same under cos / (1 - gamma) = 50 cos: V(start) = V(now) = 0, V(next) = 50. CLIP of one
    # pair: 0. Value: -0 + 1 + 0 - .98 * 50 = -48, floored at log 1e-8.
    ("liv", TURN, E0[None], {}, math.log(1e-8)),
    # R is 2 on the diagonal (two late frames at cosine 1, early ones at 0), 0 beside it.
    ("decisionnce-p", TURNS, AXES[:2], {"scale": 1.0}, math.log(1 + math.exp(-2))),
    # They move once, by e_k - e2: along their own text by 1 / sqrt 2, along the other by 0. The
    # steps of length 0 count nothing.
    ("decisionnce-t", TURNS, AXES[:2], {"scale": 1.0}, math.log(1 + math.exp(-(0.5**0.5)))),
    # Scores 0 1 0 1 1: of four steps one falls, by 1. CLIP of a single pair is 0.
    ("vlc", torch.stack([E1, E0, E1, E0, E0])[None], E0[None], {}, 33 / 4),
    # Six level pairs cost log 2 each, four lead by 1.
    ("preference", RISE, E0[None], {"scale": 1.0},
     (6 * math.log(2) + 4 * math.log(1 + math.exp(-1))) / 10),
    # At right angles to the text p = 1/2 everywhere. Frames 1 to 4 and, rewound, 3 to 0 have
    # targets 1/4 1/2 3/4 1 3/4 1/2 1/4 0: squared errors 1/16 0 1/16 1/4 1/16 0 1/16 1/4. Two such
    # videos, orthogonal to both texts, add the wrong text, with target 0.
    ("progress", E1.expand(1, 5, 2), E0[None], {}, 3 / 32),
    ("progress", E1.expand(2, 5, 2), E0.expand(2, 2), {}, (3 / 32 + 1 / 4) / 2),
    # To each of the three goals the distance is sqrt 2, from next it is .001 (the clamp): target
    # -1 - .99 * .001, advantage positive (-1 > -1.41), weight .95.
    ("hilp", TURN, None, {}, 0.95 * (math.sqrt(2) - 1 - 0.99e-3) ** 2),
    # The instruction e0 takes the place of the last frame, which then may be anything.
    ("hilp-text", torch.stack([E1, E1, E0, E0, E1])[None], E0[None], {},
     0.95 * (math.sqrt(2) - 1 - 0.99e-3) ** 2),
]

@pytest.mark.parametrize("name, frames, texts, options, expected", BY_HAND)
def test_loss_by_hand(name, frames, texts, options, expected):
    times = torch.linspace(0, 1, 5).expand(len(frames), 5)
    assert LOSSES[name](frames, texts, times, **options).item() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("name", ["preference", "preference-oracle"])
def test_preference_goes_by_its_labels(name):
    """With equal labels there is no pair, and no loss. The oracle's: the last frame is the worst,
    the others tie. Four pairs trail by 1."""
    assert LOSSES[name](RISE, E0[None], torch.ones(1, 5), scale=1.0).item() == 0
    labels = torch.tensor([[3.0, 3, 3, 3, 0]])
    assert LOSSES[name](RISE, E0[None], labels, scale=1.0).item() == pytest.approx(
        math.log(1 + math.e))

def test_rewards_of_the_zoo_by_hand():
    """Goal e0, baseline -e0, frame e1: offset (-1, 1), along d 1, across 1. alpha 0: the cosine, 0;
    alpha 1: 1 - 1/2; alpha 1/2: 1 - (1 + 1/4) / 2. At the goal itself the reward is 1."""
    reward = PARTS["vlm-rm"]["goal_baseline_reward"]
    for alpha, expected in ((0.0, 0.0), (1.0, 0.5), (0.5, 0.375)):
        assert reward(E1, E0, -E0, alpha).item() == pytest.approx(expected)
        assert reward(E0, E0, -E0, alpha).item() == 1
    assert torch.isfinite(reward(TURN, E0, E0)).all()  # equal sentences: a number and not NaN
    assert (PARTS["vlm-rm"]["reward"](TURN, E0, -E0[None]) == reward(TURN, E0, -E0)).all()
    two = TURN.repeat(2, 1, 1)
    assert PARTS["clock"]["reward"](two, E0).tolist() == [[0, 1, 2, 3, 4]] * 2
    away = math.sqrt(2)
    torch.testing.assert_close(PARTS["distance-from-start"]["reward"](two, E0),
                               torch.tensor([[0, 0, away, away, away]] * 2))

# -----------------------------------------------------------------------------
# Losses against a library, or against the equations with loops, exp and log

def test_triplet_is_torchs_triplet():
    """With D = 1 - cos as distance, torch's triplet loss on every (text, later, earlier)."""
    frames, texts = unit(6, 5, 8), unit(6, 8, seed=1)
    theirs = np.mean([F.triplet_margin_with_distance_loss(
        texts, frames[:, late], frames[:, early], margin=0.1,
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)).item()
        for early, late in itertools.combinations(range(5), 2)])
    assert vlmrm.triplet_loss(frames, texts, None).item() == pytest.approx(theirs, rel=1e-9)

def test_clip_is_open_clips_loss():
    frames, texts = unit(6, 5, 8).float(), unit(6, 8, seed=1).float()
    theirs = np.mean([open_clip.ClipLoss()(frames[:, k], texts, 1 / 0.07).item() for k in range(5)])
    assert vlmrm.clip_loss(frames, texts, None).item() == pytest.approx(theirs, rel=1e-5)

def naive_hilp(x, l):
    terms = []
    for i in range(len(x)):
        for goal in (x[i, 2], x[i, 3], x[i, 4], x[(i + 1) % len(x), 4]):
            v, target = (-max(np.sum((x[i, k] - goal) ** 2), 1e-6) ** 0.5 for k in (1, 2))
            target = -1 + 0.99 * target
            terms.append((0.95 if target >= v else 0.05) * (target - v) ** 2)
    return np.mean(terms)

def naive_progress(x, l):
    errors = []
    for i in range(len(x)):
        for k in (1, 2, 3, 4, 3, 2, 1, 0):
            for text, target in ((l[i], k / 4), (l[(i + 1) % len(l)], 0)):
                errors.append((1 / (1 + math.exp(-10 * x[i, k] @ text)) - target) ** 2)
    return np.mean(errors)

@pytest.mark.parametrize("name, naive", [("hilp", naive_hilp), ("progress", naive_progress)])
def test_naive_version(name, naive):
    frames, texts = unit(6, 5, 8), unit(6, 8, seed=1)
    assert LOSSES[name](frames, texts, even_times(6)).item() == pytest.approx(
        naive(frames.numpy(), texts.numpy()), rel=1e-9)

@pytest.mark.parametrize("name", ["tcn", "vip", "hilp"])
def test_text_versions_are_the_losses_with_the_sentence_as_the_last_frame(name):
    frames, texts = unit(6, 5, 8), unit(6, 8, seed=1)
    replaced = torch.cat([frames[:, :4], texts[:, None]], dim=1)
    assert LOSSES[f"{name}-text"](frames, texts, None) == LOSSES[name](replaced, None, None)

# -----------------------------------------------------------------------------
# What must hold of every loss

@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["same frames", "opposite", "huge", "tiny", "one video"])
def test_finite_on_extreme_input(name, case):
    frames, texts = unit(6, 5, 8).float(), unit(6, 8, seed=1).float()
    if case == "same frames":
        frames = texts[:, None].repeat(1, 5, 1)
    elif case == "opposite":
        frames = -texts[:, None].repeat(1, 5, 1)
    elif case in ("huge", "tiny"):
        frames = frames * {"huge": 1e4, "tiny": 1e-6}[case]
    else:
        frames, texts = frames[:1], texts[:1]
    frames = frames.clone().requires_grad_()
    loss = LOSSES[name](frames, texts, even_times(len(frames)).float())
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert torch.isfinite(frames.grad).all()

@pytest.mark.parametrize("name", LOSSES)
def test_lower_for_the_better_ordered_batch(name):
    """Videos that end at their instruction, against the same with `now` and `next` far apart and
    the order broken; for clip, which knows no order, against the instructions of other videos."""
    texts, times = unit(8, 16), even_times(8)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    start = unit(8, 16, seed=7)[:, None]  # the frames turn from here into their text
    good = F.normalize(start * (1 - share) + texts[:, None] * share, dim=-1)
    if name == "clip":
        assert vlmrm.clip_loss(good, texts, times) < vlmrm.clip_loss(good, texts.roll(1, 0), times)
    else:
        worse = good.flip(1)
        if name in ("tcn", "tcn-text"):  # s0, s1, s2 = 3, 0, 4: neighbours in time far apart
            worse = good[:, [1, 3, 2, 0, 4]]
        elif name in ("vip", "vip-text", "liv", "hilp", "hilp-text"):  # a step back on the way
            worse = good[:, [1, 2, 0, 3, 4]]
        assert LOSSES[name](good, texts, times) < LOSSES[name](worse, texts, times)

def test_negative_permutations_never_pair_a_video_with_itself():
    for batch in (1, 2, 3, 6):
        perms = vlmrm.negative_permutations(3, batch)
        assert perms.shape == (min(3, batch - 1), batch)
        assert (perms != torch.arange(batch)).all()
        assert (perms.sort(dim=1).values == torch.arange(batch)).all()

@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_random_batches_of_any_shape(name):
    """Finite; turning the batch by a place turns the gradient by a place, and nothing else."""
    rng = np.random.default_rng(9)
    for draw in range(20):
        B, D = int(rng.integers(2, 9)), int(rng.integers(2, 40))
        frames, texts = unit(B, 5, D, seed=draw) * 10 ** rng.uniform(-3, 3), unit(B, D, seed=50)
        times = torch.from_numpy(np.sort(rng.random((B, 5)), axis=1))
        found = []
        for turn in (0, 1):
            batch = [x.roll(turn, 0) for x in (frames, texts, times)]
            loss = LOSSES[name](batch[0].requires_grad_(), *batch[1:])
            assert loss.shape == () and torch.isfinite(loss)
            found.append((loss, *torch.autograd.grad(loss, batch[0])))
            assert torch.equal(batch[0].roll(-turn, 0), frames)  # inputs are not changed
        torch.testing.assert_close(found[1][0], found[0][0])
        torch.testing.assert_close(found[1][1].roll(-1, 0), found[0][1])

def test_which_losses_read_the_instruction():
    assert {name for name, loss in LOSSES.items() if not vlmrm.reads_instruction(loss)} == {
        "tcn", "vip", "hilp"}

# -----------------------------------------------------------------------------
# Code that is copied out

TREE = ast.parse(SOURCE)
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
CONSTANTS = {node.targets[0].id: node for node in TREE.body if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Name)}

def copied_out(name):
    """The function in a namespace of its own, with what its docstring names as helper() or CONSTANT
    and what that names in turn, and with the libraries that a script for it would import."""
    wanted, nodes = [name], {}
    for name in wanted:
        node = nodes[name] = FUNCTIONS.get(name) or CONSTANTS[name]
        if text := isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            wanted += {word for word in re.findall(r"\b(\w+)\(\)", text) if word in FUNCTIONS}
            wanted += {word for word in re.findall(r"\b[A-Z][A-Z_]+\b", text) if word in CONSTANTS}
            wanted[:] = dict.fromkeys(wanted)
    space = {"torch": torch, "F": F, "math": math, "np": np, "rankdata": scipy.stats.rankdata}
    exec(compile(ast.Module(list(nodes.values())[::-1], []), "copied out", "exec"), space)
    return space[wanted[0]]

@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("_loss")])
def test_a_loss_runs_when_copied_out(name):
    loss, copy_ = getattr(vlmrm, name), copied_out(name)
    x, l = unit(6, 5, 8), unit(6, 8, seed=1)
    arguments = {"softmax_loss": (x[:, 0, 0], [x[:, 1, 0], x[:, 2, 0]]),
                 "implicit_value_loss": (vlmrm.cosine, x[:, 0], x[:, 1], x[:, 2], x[:, 4], 0.98,
                                         vlmrm.negative_permutations(3, 6))}
    batch = arguments.get(name, (x, l, even_times(6)))
    assert torch.equal(copy_(*batch), loss(*batch)) and copy_ is not loss
    if name == "liv_loss":  # its other branch
        assert copy_(*batch, language_weight=1, negatives=2) == loss(
            *batch, language_weight=1, negatives=2)

METRIC_ARGUMENTS = {
    "info_nce": lambda rng: (unit(6, 6),),
    "value_order_correlation": lambda rng: (rng.random((4, 9)),),
    "pair_counts": lambda rng: (rng.random((4, 9)), rng.random((4, 9))),
    "bootstrap_counts": lambda rng: (np.random.default_rng(5), np.array(["a", "b", "a"])),
    "weighted_ratio": lambda rng: (rng.random((3, 4)), rng.random(4), rng.random(4)),
    "epic_distance": lambda rng: (rng.random((3, 4)), rng.random((4, 9)), rng.random((4, 9))),
    "goal_image_reward": lambda rng: (unit(4, 9, 8), np.array([True, True, False, True]))}

def test_the_metrics_of_section_5_are_all_copied_out_below():
    section = SOURCE[SOURCE.index("\n# 5. "):SOURCE.index("\ndef ordering_metrics")]
    assert {*re.findall(r"^def (\w+)", section, re.MULTILINE), "info_nce"} == set(METRIC_ARGUMENTS)

@pytest.mark.parametrize("name", METRIC_ARGUMENTS)
def test_a_metric_runs_when_copied_out(name):
    of_copy, of_ours = (function(*METRIC_ARGUMENTS[name](np.random.default_rng(3)))
                        for function in (copied_out(name), getattr(vlmrm, name)))
    np.testing.assert_array_equal(of_copy, of_ours)

def test_vlmrm_imports_nothing_of_ours():
    """Only the standard library and packages of requirements.txt, by plain import statements."""
    names = [name.name for node in ast.walk(TREE) if isinstance(node, ast.Import)
             for name in node.names] + [
        node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert {"torch", "argparse", "mujoco"} < roots
    assert not roots & {path.stem for path in HERE.rglob("*.py")}
    assert not roots & {"data", "importlib"} and "__import__" not in SOURCE
    assert roots - sys.stdlib_module_names == {
        "imageio", "numpy", "open_clip", "torch", "matplotlib", "PIL", "safetensors", "scipy",
        "tqdm", "mujoco", "metaworld"}

def test_the_registry_and_the_zoo():
    """objective_names() reads the file while the registry is not there; constants are arguments of
    their losses; a file of the zoo says what it is."""
    names = vlmrm.objective_names()
    space = {"__file__": str(HERE / "vlmrm.py"), "Path": Path, "re": re}
    exec(compile(ast.Module([FUNCTIONS["objective_names"]], []), "vlmrm.py", "exec"), space)
    assert names == space["objective_names"]() == list(vlmrm.OBJECTIVES) and "triplet" in names
    for name, loss in LOSSES.items():
        rate, constants = PARTS[name]["TUNED"]
        assert 1e-4 <= rate <= 1e-2, name
        for constant, values in constants.items():
            assert constant in inspect.signature(loss).parameters, (name, constant)
            assert len(set(values)) == 3 and all(value > 0 for value in values)
        assert set(list(inspect.signature(loss).parameters)[:3]) == {"frames", "texts", "times"}
    for name, path in ZOO.items():
        text = ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8")))
        assert "Notice:" in text and "Source:" in text, name
        assert PARTS[name]["loss"] or PARTS[name]["reward"] is not torch.matmul, name

# -----------------------------------------------------------------------------
# Metrics

def mixed_metrics(predicted, true_reward, success, counts=None):
    """ordering_metrics() of episodes that are all mixed: {metric: (R,)}."""
    return vlmrm.ordering_metrics(np.ones((1, len(predicted))) if counts is None else counts,
                                  np.array(["mixed"] * len(predicted)), predicted, true_reward,
                                  success)

def test_metrics_stay_in_range_ignore_increasing_maps_and_flip():
    rng = np.random.default_rng(10)
    for _ in range(50):
        E, T = rng.integers(2, 7), rng.integers(2, 12)
        predicted = rng.integers(0, 30, (E, T)) * 10.0 ** rng.integers(-3, 4)
        truth, success = rng.random((E, T)) * 10, rng.random((E, T)) < 0.5

        def metrics(p):
            rows = mixed_metrics(p, truth, success) | {
                "voc": [vlmrm.value_order_correlation(p).mean()]}
            return {metric: row[0] for metric, row in rows.items()}

        found, mapped, negated = metrics(predicted), metrics(np.cbrt(predicted) + 3), metrics(
            -predicted)
        for metric in ("voc", "ranking_accuracy_within", "ranking_accuracy_across",
                       "success_auroc"):
            low = -1 if metric == "voc" else 0
            assert low <= found[metric] <= 1 or np.isnan(found[metric])
            np.testing.assert_allclose(mapped[metric], found[metric], atol=1e-12)
            np.testing.assert_allclose(negated[metric], low + 1 - found[metric], atol=1e-12)
        assert 0 <= found["epic"] <= 1
        np.testing.assert_allclose(found["epic"]**2 + negated["epic"]**2, 1, atol=1e-6)

def test_voc_by_hand():
    """Rewards 1 3 2: ranks 1 3 2 against times 1 2 3, sum of squared differences 0 + 1 + 1 = 2,
    Spearman 1 - 6 * 2 / (3 * 8) = .5. A constant counts 0, rising 1, falling -1."""
    predicted = np.array([[1, 3, 2], [5, 5, 5], [1, 2, 9], [3, 2, 1]], float)
    assert vlmrm.value_order_correlation(predicted) == pytest.approx([0.5, 0, 1, -1])

def test_voc_is_scipys_spearman_and_opengvls_value():
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 6, size=(50, 12)).astype(float)  # many ties
    expected = [scipy.stats.spearmanr(row, np.arange(12)).statistic for row in predicted]
    assert vlmrm.value_order_correlation(predicted) == pytest.approx(expected)
    arrays = np.load(HERE / "data" / "golden" / "metrics.npz")
    results = GOLDEN["metrics"]["results"]
    for key, name in (("v", "voc"), ("v_ties", "voc_with_ties")):
        assert vlmrm.value_order_correlation(arrays[key][None])[0] == pytest.approx(results[name])

def accuracy(predicted, truth, threshold=0.1):
    correct, total = vlmrm.pair_counts(predicted[None], truth[None], threshold)
    return correct.sum() / total.sum()

def test_ranking_accuracy_by_hand():
    """Rewards 0 1 2, predicted 0 2 2: pairs (0,1) right, (0,2) right, (1,2) a tie, 1/2: 2.5 of 3.
    With a threshold of 1 only (0,2) is left: 1 of 1."""
    predicted, truth = np.array([0.0, 2, 2]), np.array([0.0, 1, 2])
    assert accuracy(predicted, truth) == pytest.approx(2.5 / 3)
    assert accuracy(predicted, truth, threshold=1.0) == 1
    assert accuracy(-predicted, truth) == pytest.approx(0.5 / 3)
    assert accuracy(np.zeros(3), truth) == 0.5

@pytest.mark.parametrize("T", [1, 2, 3, 17])
def test_pair_counts_are_the_double_loop(T):
    """(i, j): a frame of episode i, and a worse one of episode j."""
    rng = np.random.default_rng(T)
    p, r = rng.integers(0, 9, (3, T)).astype(float), rng.integers(0, 40, (3, T)) / 9
    correct, total = np.zeros((2, 3, 3))
    for i, a, j, b in np.ndindex(3, T, 3, T):
        if r[i, a] - r[j, b] > 0.1:
            total[i, j] += 1
            correct[i, j] += 1 if p[i, a] > p[j, b] else 0.5 if p[i, a] == p[j, b] else 0
    for found, expected in zip(vlmrm.pair_counts(p, r), (correct, total)):
        assert found.tolist() == expected.tolist()

def test_bootstrapped_metrics_are_those_of_episodes_drawn_again():
    """Episodes are drawn, their copies laid side by side, and the metrics taken the long way: with
    masks over all pairs of frames. A copy makes no pairs with its twin."""
    rng = np.random.default_rng(7)
    E, T = 8, 5
    truth = rng.random((E, T)) * 10
    predicted, success = truth + rng.normal(0, 4, (E, T)), truth > 5
    kinds = np.array(["mixed"] * 7 + ["expert"])  # drawn apart: of one expert there is always one
    counts = vlmrm.bootstrap_counts(np.random.default_rng(1), kinds, 20)
    assert (counts[0] == 1).all() and (counts.sum(1) == E).all() and (counts[:, 7] == 1).all()
    assert counts[1:].max() > 1
    rows = mixed_metrics(predicted, truth, success, counts)
    for k, row in enumerate(counts.astype(int)):
        picked = np.repeat(np.arange(E), row)
        p, r, own = predicted[picked].ravel(), truth[picked].ravel(), np.repeat(picked, T)
        copy_ = np.repeat(np.arange(E), T)
        better = r[:, None] - r > 0.1
        right = better & (p[:, None] > p)
        for name, mask in (("within", copy_[:, None] == copy_), ("across", own[:, None] != own)):
            assert rows[f"ranking_accuracy_{name}"][k] == pytest.approx(
                (right & mask).sum() / (better & mask).sum())
        ends, won = predicted[picked, -1], success[picked, -1]
        assert rows["success_auroc"][k] == pytest.approx(
            np.mean(ends[won][:, None] > ends[~won]) if 0 < won.sum() < E else np.nan, nan_ok=True)
        assert rows["epic"][k] == pytest.approx(
            ((1 - scipy.stats.pearsonr(p, r).statistic) / 2)**0.5)

def test_epic_by_hand():
    """Predictions that follow the rewards in a line: 0; against them: 1; constant: sqrt(1/2)."""
    rng = np.random.default_rng(3)
    truth, predicted, one = rng.random((5, 8)), rng.random((5, 8)), np.ones((1, 5))
    assert vlmrm.epic_distance(one, 3 * truth + 7, truth)[0] == pytest.approx(0, abs=1e-7)
    assert vlmrm.epic_distance(one, -truth, truth)[0] == pytest.approx(1)
    assert vlmrm.epic_distance(one, np.full((5, 8), 0.3), truth)[0] == pytest.approx(0.5**0.5)
    pearson = scipy.stats.pearsonr(predicted.ravel(), truth.ravel()).statistic
    assert vlmrm.epic_distance(one, predicted, truth)[0] == pytest.approx(((1 - pearson) / 2)**0.5)

def test_epic_golden():
    """Official EPIC of state rewards, uniform distribution, gamma .99: one frame a state."""
    arrays = np.load(HERE / "data" / "golden" / "epic.npz")
    ours = vlmrm.epic_distance(np.ones((1, 7)), arrays["va"][:, None], arrays["vb"][:, None])
    assert ours[0] == pytest.approx(GOLDEN["epic"]["results"]["epic_uniform_state_rewards"])

def test_success_auroc_by_hand():
    """Successes score .9 and .4, failures .4 and .1: (1 + 1 + 1/2 + 1) / 4. With the first success
    counted twice and the first failure not at all: (1 + 1 + 1) / 3. Without failures: undefined."""
    predicted, success = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    counts = np.array([[1.0, 1, 1, 1], [2, 1, 0, 1], [1, 1, 0, 0]])
    auroc = mixed_metrics(predicted[:, None], predicted[:, None], success[:, None], counts)[
        "success_auroc"]
    assert auroc[:2] == pytest.approx([3.5 / 4, 1]) and np.isnan(auroc[2])

def test_goal_image_reward_by_hand():
    """Experts end at e0 and e1, a failure at -e1; all start at e0. Goals are the ends of the other
    experts."""
    frames = torch.stack([torch.stack([E0, end]) for end in (E0, E1, -E1)])  # (3, 2, 2)
    away = -(2**0.5)
    np.testing.assert_allclose(vlmrm.goal_image_reward(frames, np.array([True, True, False])), [
        [away, away],                            # goal e1
        [0, away],                               # goal e0
        [away / 2, (away - 2) / 2]], atol=1e-6)  # goals e0 and e1

def test_reading_metrics_by_hand():
    """Two experts and a mixed episode, which does not count; three sentences, the first their own,
    the last its opposite. By the ends, expert 0 prefers its own, to expert 1 sentence 1 is as good:
    that is no first place. VOC under the own sentence is 1 and 1, under the opposite -1 and 1."""
    rise, fall = np.arange(3.0), -np.arange(3.0)
    flat, source = np.ones(3), np.array(["expert", "expert", "mixed"])
    under = np.array([[rise, rise, fall], [flat, 2 * flat, flat], [fall, rise - 9, rise],
                      [rise, fall, rise], [rise, rise, fall], [flat, flat, rise]])
    found = vlmrm.reading_metrics(np.ones((1, 3)), source, under, own=0, opposite=2)
    assert {name: row[0] for name, row in found.items()} == pytest.approx({
        "retrieval_top1": 0.5, "retrieval_top5": 1, "opposite_gap": 1,
        "voc_paraphrase": (1 - 1 + 1 + 1 + 0 + 0) / 6})
    assert "opposite_gap" not in vlmrm.reading_metrics(np.ones((1, 3)), source, under, 0, 0)

def test_average_over_tasks_by_hand():
    """Tasks without the metric do not count; the interval is that of the replicates' averages."""
    rows = {"voc": {"reach-v3": np.r_[0.2, np.full(9, 0.1)], "push-v3": np.r_[0.4, np.full(9, 0.5)],
                    "sweep-v3": np.full(10, np.nan), "door-open-v3": np.r_[0.7, np.arange(9.0)]}}
    report = vlmrm.average_over_tasks(rows)
    assert report["seen"]["voc"]["value"] == pytest.approx(0.3)
    assert report["seen"]["voc"]["interval"] == pytest.approx([0.3, 0.3])
    assert report["seen"]["voc"]["tasks"] == 2 and "sweep-v3" not in report["tasks"]
    assert report["unseen"]["voc"]["interval"] == pytest.approx(np.quantile(
        np.arange(9), [0.025, 0.975]))

# -----------------------------------------------------------------------------
# Data: the shipped file, and a tiny one made here

@pytest.fixture(scope="session")
def shipped():
    return vlmrm.Dataset(HERE / "data" / "metaworld.npz")

@pytest.fixture(scope="session")
def sentences():
    return vlmrm.load_instructions(HERE / "data" / "instructions.json")

def test_shipped_data_is_what_the_protocol_asks_for(shipped, sentences):
    assert (HERE / "data" / "metaworld.npz").stat().st_size < 30e6
    assert set(shipped.task) == set(sentences) and len(sentences) == 50
    assert not set(shipped.task[shipped.split != "test"]) & set(vlmrm.UNSEEN_TASKS)
    assert set(shipped.source[shipped.split == "train"]) == {"expert"}
    for task in sentences:
        own = shipped.task == task
        assert (own & (shipped.source == "expert")).sum() == 14
        assert (own & (shipped.source == "mixed")).sum() == 6
        assert len(set(shipped.seed[own])) == 20  # no episode in two splits
    assert shipped.success[shipped.source == "expert"].any(axis=1).all()
    assert np.isfinite(shipped.rewards).all() and shipped.rewards.min() >= 0
    assert shipped.rewards.max() <= 10.01
    assert shipped.frames(0).shape == (24, 96, 96, 3) and shipped.frames(0).dtype == np.uint8

def test_sentences_are_distinct_and_opposites_mutual(sentences):
    everything = [text for entry in sentences.values()
                  for text in (entry["instruction"], *entry["paraphrases"])]
    assert len(set(everything)) == 200
    for task, entry in sentences.items():
        if "opposite" in entry:
            assert sentences[entry["opposite"]]["opposite"] == task
    assert sum("opposite" in entry for entry in sentences.values()) == 18

def test_splits():
    episodes = [{"task": "reach-v3", "source": "expert"} for _ in range(14)] + [
        {"task": "reach-v3", "source": "mixed"} for _ in range(6)]
    splits = [episode["split"] for episode in vlmrm.assign_splits(episodes)]
    assert splits == ["train"] * 9 + ["validation"] * 2 + ["test"] * 3 + [
        "validation"] * 2 + ["test"] * 4
    unseen = vlmrm.assign_splits([{"task": "door-open-v3", "source": "expert"}] * 5)
    assert {episode["split"] for episode in unseen} == {"test"}

COLORS = {"reach-v3": (255, 60, 60), "push-v3": (60, 255, 60), "sweep-v3": (60, 60, 255),
          "drawer-open-v3": (255, 255, 60)}

def toy_episode(task, seed, source="expert", T=10, size=32):
    """A square of the task's colour crosses the picture, or for `mixed` wanders; reward = place."""
    rng = np.random.default_rng(seed)
    frames = np.full((T, size, size, 3), 40, np.uint8)
    places = np.linspace(0, size - 8, T) if source == "expert" else rng.uniform(0, size - 8, T)
    top = rng.integers(0, size - 8)
    for t, left in enumerate(places.astype(int)):
        frames[t, top:top + 8, left:left + 8] = COLORS[task]
    return {"task": task, "source": source, "seed": seed, "steps": np.arange(T),
            "rewards": np.float32(10 * places / (size - 8)), "success": places > size - 10,
            "strip": vlmrm.encode_frames(frames)}

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A data set of four toy tasks, one of them unseen."""
    episodes = []
    for task in COLORS:
        episodes += vlmrm.assign_splits(
            [toy_episode(task, seed) for seed in range(8)]
            + [toy_episode(task, seed, "mixed") for seed in range(100, 106)])
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    vlmrm.write_dataset(path, episodes)
    return vlmrm.Dataset(path)

def test_frames_survive_packing(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 64).astype(np.uint8)[None, None, :, None]
    frames = np.broadcast_to(smooth, (6, 64, 64, 3)) + rng.integers(0, 9, (6, 1, 1, 3), np.uint8)
    episode = toy_episode("reach-v3", 0, T=6, size=64) | {
        "strip": vlmrm.encode_frames(frames), "split": "test"}
    vlmrm.write_dataset(tmp_path / "one.npz", [episode])
    data = vlmrm.Dataset(tmp_path / "one.npz")
    assert np.abs(data.frames(0).astype(int) - frames).mean() < 4
    assert data.load([0, 0], every=4).shape == (2, 2, 64, 64, 3)
    assert (data.load([0]).numpy()[0] == data.frames(0)).all()
    vlmrm.write_dataset(tmp_path / "again.npz", [data.episode(0)])
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2

TEST = toy_episode("reach-v3", 0) | {"split": "test"}

@pytest.mark.parametrize("episodes, says", [
    ([], "no data set"), ([{"task": "reach-v3"}], "split"),
    ([{key: TEST[key] for key in vlmrm.EPISODE}], "strip"), ([TEST | {"task": None}], "pickle"),
    ([TEST, toy_episode("reach-v3", 0, T=11) | {"split": "test"}], "inhomogeneous"),
    ([TEST | {"strip": toy_episode("reach-v3", 0, size=48)["strip"]}, TEST], "no strip of 10")])
def test_episodes_that_make_no_data_set(tmp_path, episodes, says):
    with pytest.raises(vlmrm.InputError, match=says):
        vlmrm.write_dataset(tmp_path / "x.npz", episodes)
    assert not list(tmp_path.iterdir())

def test_batch_is_ordered_distinct_and_from_different_tasks():
    episodes = {task: np.arange(10 * k, 10 * k + 5) for k, task in enumerate(COLORS)}
    for seed in range(50):
        chosen, frame_ids = vlmrm.sample_batch(episodes, 10, np.random.default_rng(seed), batch=3)
        assert len(set(chosen // 10)) == 3 and (chosen % 10 < 5).all()
        assert frame_ids.shape == (3, 5) and (np.diff(frame_ids, axis=1) > 0).all()
        assert (frame_ids[:, 2] == frame_ids[:, 1] + 1).all()
        assert (frame_ids[:, 0] < 2).all() and (frame_ids[:, 4] >= 8).all()
        assert frame_ids.max() < 10

def test_training_episodes_are_seen_experts(toy):
    episodes = vlmrm.training_episodes(toy, 3)
    assert set(episodes) == set(list(COLORS)[:3]) == set(toy.task[toy.select(split="train")])
    chosen = np.concatenate(list(episodes.values()))
    assert set(toy.source[chosen]) == {"expert"} and set(toy.split[chosen]) == {"train"}
    with pytest.raises(vlmrm.InputError, match="--batch 4"):
        vlmrm.training_episodes(toy, 4)

def wider(arrays):
    """One strip of as many pixels in another shape: read naively it would be reshaped."""
    strips = [arrays["strips"][a:b].tobytes() for a, b in itertools.pairwise(arrays["offsets"])]
    with Image.open(io.BytesIO(strips[5])) as strip:
        strip.resize((strip.width * 2, strip.height // 2)).save(file := io.BytesIO(), "WEBP")
    strips[5] = file.getvalue()
    arrays["strips"] = np.frombuffer(b"".join(strips), np.uint8)
    arrays["offsets"] = np.cumsum([0, *map(len, strips)])

@pytest.mark.parametrize("change, says", [
    (lambda a: a.pop("steps"), "steps"),
    (lambda a: a.update(rewards=a["rewards"].astype(int)), "rewards is int64"),
    (lambda a: a.update(success=a["success"][:, :3]), "success is bool"),
    (lambda a: a["rewards"].__setitem__((0, 0), np.nan), "not finite"),
    (lambda a: a.update(task=a["task"].astype(object)), "allow_pickle"),
    (lambda a: a.update(offsets=a["offsets"][::-1]), "offsets"),
    (lambda a: a.update(strips=a["strips"][:-1]), "offsets"),
    (lambda a: a["offsets"].__setitem__(3, a["offsets"][3] + 1), "cannot identify image"),
    (lambda a: a["split"].__setitem__(0, "x"), "unknown split"),
    (lambda a: a["strips"].__setitem__(slice(0, 300), 0), "cannot identify image"),
    (lambda a: a.update({key: a[key][:0] for key in a.keys() - {"offsets", "strips"}},
                        offsets=a["offsets"][:1], strips=a["strips"][:0]), "IndexError"),
    (wider, "episode 5 is no strip of 10 square pictures"),
])
def test_data_that_is_not_what_it_should_be_is_refused(toy, tmp_path, change, says):
    arrays = {name: array.copy() for name, array in np.load(toy.path).items()}
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(vlmrm.InputError, match="bad.npz.*" + re.escape(says)):
        vlmrm.Dataset(tmp_path / "bad.npz")

def test_missing_and_damaged_data_are_refused(toy, tmp_path):
    with pytest.raises(vlmrm.InputError, match="nothing.npz: there is no such file"):
        vlmrm.Dataset(tmp_path / "nothing.npz")
    whole, short = toy.path.read_bytes(), tmp_path / "short.npz"
    for length in np.random.default_rng(0).integers(0, len(whole), 10):
        short.write_bytes(whole[:length])
        with pytest.raises(vlmrm.InputError, match="cannot read"):
            vlmrm.Dataset(short)
    refused = 0
    for place in np.random.default_rng(1).integers(0, len(whole), 60):  # a bit, whatever it breaks
        short.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8])
                          + whole[place + 1:])
        try:
            vlmrm.Dataset(short)
        except vlmrm.InputError:
            refused += 1
    assert refused > 40  # zip's checksums tell, but for bits that mean nothing

@pytest.mark.parametrize("text, says", [
    ("{", "JSONDecodeError"), ("[1]", "TypeError"), ('{"a": {}}', "instruction"),
    ('{"a": {"instruction": "b", "paraphrases": ["c"]}}', "three paraphrases"),
    ('{"a": {"instruction": "b", "paraphrases": ["c", "d", "e"], "opposite": "x"}}', "opposite")])
def test_instructions_that_are_not_what_they_should_be(tmp_path, text, says):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(vlmrm.InputError, match="bad.json.*" + says):
        vlmrm.load_instructions(tmp_path / "bad.json")

# -----------------------------------------------------------------------------
# vlmrm.py alone in a folder, with its three data files

def command(*arguments, cwd, script="vlmrm.py"):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd,
                            capture_output=True, text=True, timeout=300, env=environment)
    return result.returncode, result.stdout, result.stderr

@pytest.fixture(scope="session")
def alone(toy, tmp_path_factory):
    """A folder with vlmrm.py and its data, the toy data in place of the real."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "data").mkdir()
    shutil.copy(HERE / "vlmrm.py", folder)
    shutil.copy(toy.path, folder / "data" / "metaworld.npz")
    for name in ("instructions.json", "tiny.safetensors"):
        shutil.copy(HERE / "data" / name, folder / "data")
    return folder

def test_help_is_there_before_the_slow_imports(alone):
    status, printed, imported = command("importtime", "vlmrm.py", "--help", cwd=alone, script="-X")
    assert status == 0 and "--objective" in printed
    assert "argparse" in imported and "torch" not in imported and "numpy" not in imported
    for name in vlmrm.OBJECTIVES:
        assert name in "".join(printed.split()), name  # it may be broken at a hyphen

def test_alone_several_objectives_are_compared(alone):
    """One table, mean ± std over the seeds, the control last, and a picture. The same command does
    not do it again."""
    status, printed, error = command(
        "--objective", "zeroshot", "triplet", "--seeds", 2, "--steps", 2, "--batch", 3,
        "--device", "cpu", cwd=alone)
    assert status == 0, error
    runs = alone / "runs"
    assert {path.name for path in runs.iterdir()} == {
        "table.md", "comparison.png", "zeroshot-seed0", "triplet-seed0", "triplet-seed1"}
    assert (runs / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (runs / "table.md").read_text(encoding="utf-8")
    assert table in printed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["`triplet`", "`zeroshot`"]
    for column, (metric, group) in enumerate(itertools.product(
            ("voc", "ranking_accuracy_within"), ("seen", "unseen")), start=1):
        first, second, control = (
            json.loads((runs / name / "metrics.json").read_text())[group][metric]["value"]
            for name in ("triplet-seed0", "triplet-seed1", "zeroshot-seed0"))
        # Of two numbers the mean is half the sum, the sample's std the difference over sqrt 2.
        assert rows[2][column] == (f"{(first + second) / 2:.2f} ± "
                                   f"{abs(first - second) / 2**0.5:.2f}")
        assert rows[-1][column] == f"{control:.2f}"

def test_alone_it_is_imported_resumed_and_asked_for_a_score(alone, toy):
    """One process, as a subprocess: the import, a run stopped and taken up again, a score."""
    Image.fromarray(toy.frames(0)[0]).save(alone / "clip.png")
    (alone / "script.py").write_text("""if True:
        from vlmrm import triplet_loss
        import vlmrm, torch
        print("loss", triplet_loss(torch.eye(5)[None], torch.eye(5)[:1], None).item())
        run = ["--steps", "2", "--batch", "2", "--runs", "own", "--seed", "5", "--device", "cpu"]
        save = vlmrm.save_checkpoint
        def save_and_stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt
        vlmrm.save_checkpoint = save_and_stop
        assert vlmrm.main(run) == 130
        vlmrm.save_checkpoint = save
        assert vlmrm.main(["--resume", "own/triplet-seed5"]) == 0
        assert vlmrm.main(["--score", "clip.png", "--instruction", "close the drawer",
                           "--model", "own/triplet-seed5"]) == 0
        """)
    status, printed, error = command(cwd=alone, script="script.py")
    assert status == 0, error
    # Rewards 1 0 0 0 0: the first frame leads the four others by 1, six pairs are level.
    assert float(printed.split()[1]) == pytest.approx((4 * 1.1 + 6 * 0.1) / 10)
    assert "frame     0   reward" in printed
    assert (alone / "clip.png-triplet-seed5.png").exists()
    assert (alone / "own" / "triplet-seed5" / "metrics.json").exists()

@pytest.fixture(scope="session")
def collected(alone):
    """Two tasks collected in two processes by the command line. Skips where nothing can render."""
    pytest.importorskip("metaworld", reason="metaworld needs Python 3.10 to 3.13")
    status, printed, error = command(
        "--collect", "--tasks", "reach-v3", "drawer-close-v3", "--expert", 1, "--mixed", 1,
        "--size", 48, "--frames", 8, "--workers", 2, "--data", "new/two.npz", cwd=alone)
    if "cannot render" in error:
        pytest.skip(error)
    assert status == 0 and "wrote 4 episodes of 2 tasks" in printed, error
    assert [path.name for path in (alone / "new").iterdir()] == ["two.npz"]
    return alone / "new" / "two.npz"

def test_collection_does_not_depend_on_the_number_of_workers(collected, tmp_path):
    options = vars(vlmrm.parse_arguments(["--collect"])) | {
        "expert": 1, "mixed": 1, "size": 48, "frames": 8}
    vlmrm.write_dataset(tmp_path / "serial.npz", [
        episode for task in ("reach-v3", "drawer-close-v3")
        for episode in vlmrm.collect_task(options | {"task": task})])
    assert (tmp_path / "serial.npz").read_bytes() == collected.read_bytes()

def test_collection_keeps_successful_experts_and_orders_its_frames(collected):
    data = vlmrm.Dataset(collected)
    assert list(data.source) == ["expert", "mixed"] * 2
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert (np.diff(data.steps, axis=1) > 0).all()
    assert (data.steps[data.source == "mixed", -1] == 149).all()
    assert data.frames(0).shape == (8, 48, 48, 3)
    assert np.ptp(data.frames(0).astype(int), axis=0).max() > 50  # something moves

def test_shipped_episode_renders_again(collected, shipped, tmp_path):
    """The first episode of a shipped task, made anew with the default settings: same rewards, and
    pictures that differ by no more than packing and another GL library may cost."""
    task = "drawer-open-v3"
    vlmrm.write_dataset(tmp_path / "again.npz", vlmrm.collect_task(
        vars(vlmrm.parse_arguments(["--collect"])) | {"task": task, "expert": 1, "mixed": 0}))
    again = vlmrm.Dataset(tmp_path / "again.npz")
    original = shipped.select(task=task)[0]
    np.testing.assert_allclose(again.rewards[0], shipped.rewards[original], atol=1e-3)
    assert (again.steps[0] == shipped.steps[original]).all()
    same, other = (np.abs(again.frames(0).astype(int) - shipped.frames(episode)).mean()
                   for episode in shipped.select(task=task)[:2])
    assert same < 2 < other

# -----------------------------------------------------------------------------
# Backbone

@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return vlmrm.build_backbone("tiny", "none").eval()

@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)

def test_embeddings_are_unit_vectors_and_score_is_their_cosine(tiny, frames):
    embedded = tiny.embed_frames(torch.from_numpy(np.stack([frames, frames])))
    assert embedded.shape == (2, 3, 128) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2, 3))
    rewards = tiny.score(frames, "open the drawer")
    assert rewards.shape == (3,) and rewards.dtype == np.float32
    with torch.inference_mode():
        cosines = vlmrm.cosine(embedded[0], tiny.embed_texts(["open the drawer"]))
    assert rewards == pytest.approx(cosines.numpy(), abs=1e-5)
    assert tiny.score(frames[1:2], "open the drawer") == pytest.approx(rewards[1:2], abs=1e-5)

def test_tiny_tokenizer_is_clips_with_fewer_merges():
    tokens = vlmrm.tiny_tokenizer()(["open the drawer"])[0]
    assert tokens[0] == 4094 and tokens.max() == 4095 and (tokens == 4095).sum() == 1
    inner = tokens[1:tokens.argmax()].tolist()
    assert open_clip.SimpleTokenizer().decode(inner).strip() == "open the drawer"

def test_a_thumbnail_in_place_of_the_vision_tower(frames):
    """It sees the means of 8 x 8 blocks of the 96 x 96 pixels, and nothing else."""
    torch.manual_seed(0)
    model = vlmrm.build_backbone("thumbnail", None).eval()
    large = frames.repeat(12, axis=1).repeat(12, axis=2)[:, :96, :96]
    shuffled = large.reshape(-1, 12, 8, 12, 8, 3)[:, :, ::-1, :, ::-1].reshape(large.shape)
    rewards = model.score(large, "open the drawer")
    assert (large != shuffled).any() and np.ptp(rewards) > 0.01
    assert model.score(shuffled, "open the drawer") == pytest.approx(rewards, abs=1e-5)

@pytest.mark.parametrize("shape, kind", [
    ((2, 8, 8), "uint8"), ((2, 8, 8, 4), "uint8"), ((2, 8, 8, 3), "float64"),
    ((0, 8, 8, 3), "uint8"), ((8, 8, 3), "uint8")])
def test_score_refuses_what_are_no_frames(tiny, shape, kind):
    with pytest.raises(vlmrm.InputError, match=re.escape(f"{kind} {shape}")):
        tiny.score(np.zeros(shape, kind), "open the drawer")

@pytest.mark.parametrize("sentence", ["push", "żółć 🦾", "%s {} \\", "<script>", "推"])
def test_score_takes_any_sentence(tiny, frames, sentence):
    assert np.isfinite(tiny.score(frames[:, :7, :9], sentence)).all()

@pytest.mark.parametrize("sentence", [
    "", " \n", None, "push \0", "push " * 23, "push \ud800", "push <end_of_text>",
    "<start_of_text> push", "push <END_OF_TEXT>", "push &lt;end_of_text&gt;",
    "push ＜end_of_text＞"])
def test_score_refuses_what_is_no_sentence_or_too_long(tiny, frames, sentence):
    with pytest.raises(vlmrm.InputError, match="no sentence|own marks|word pieces"):
        tiny.score(frames, sentence)

def test_lora_starts_at_the_model_and_trains_only_itself(tiny, frames):
    before = tiny.score(frames, "open the drawer")
    vlmrm.add_lora(tiny, rank=2)
    assert tiny.score(frames, "open the drawer") == pytest.approx(before, abs=1e-6)
    trained = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    assert all(".0.A" in name or ".0.B" in name for name in trained)
    assert any("visual" in name and "in_proj_weight" in name for name in trained)
    assert any("visual" not in name for name in trained)
    packed = next(name for name in trained if name.endswith("in_proj_weight.0.B"))
    with torch.no_grad():
        trained[packed].normal_()
    assert np.abs(tiny.score(frames, "open the drawer") - before).max() > 1e-3
    layer = tiny.get_submodule(packed.split(".parametrizations")[0])
    part = layer.parametrizations.in_proj_weight
    torch.testing.assert_close(layer.in_proj_weight, part.original + part[0].B @ part[0].A)

def test_weights_survive_saving_and_misfits_are_refused(tiny, frames, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights := vlmrm.trained_weights(tiny), path)
    other = vlmrm.build_backbone("tiny", str(path)).eval()
    assert (other.score(frames, "push") == tiny.score(frames, "push")).all()
    lacking = {name: weights[name] for name in list(weights)[1:]}
    poisoned = weights | {"clip.logit_scale": torch.tensor(torch.nan)}
    for bad, says in ((lacking, "missing"), (poisoned, "not finite"),
                      (weights | {"clip.logit_scale": torch.ones(2)}, "size mismatch")):
        save_file(bad, path)
        with pytest.raises(vlmrm.InputError, match=f"(?s)cannot read .*{says}"):
            vlmrm.build_backbone("tiny", str(path))

@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP2"])
def test_real_architectures_from_a_checkpoint_file(name, toy, sentences, tmp_path, monkeypatch):
    """Checkpoints of the architectures the README recommends, with random weights, made here: they
    load, take adapters, train, are saved, loaded again and score the same. Two things are not the
    real ones: SigLIP2's tokenizer is a download, so CLIP's stands in, and its vocabulary."""
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer(
        context_length=open_clip.get_model_config(name)["text_cfg"]["context_length"]))
    text = open_clip.get_model_config(name)["text_cfg"] | {"vocab_size": 49408}
    monkeypatch.setattr(open_clip, "create_model", functools.partial(
        open_clip.create_model, text_cfg=text))
    with torch.device("meta"):  # names and shapes alone: no time is lost on initialising weights
        shapes = open_clip.create_model(name, None, device="meta").state_dict()
    torch.manual_seed(0)
    torch.save({key: (torch.randn(value.shape) * 0.02 if value.ndim > 1 else torch.full(
        value.shape, float(key.endswith("weight")))).half() for key, value in shapes.items()},
        checkpoint := tmp_path / "clip.pt")
    config = {"backbone": name, "pretrained": str(checkpoint), "lora": 2, "seed": 0, "steps": 1,
              "batch": 1, "learning_rate": 1e-3,
              "sha256": {"pretrained": vlmrm.digest(checkpoint)}}
    model = vlmrm.prepare_model(config, "cpu")
    published = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    expected = published.get("mean") or open_clip.OPENAI_DATASET_MEAN
    torch.testing.assert_close(model.mean.flatten(), 255 * torch.tensor(expected))
    data = copy.copy(toy)  # without validation episodes, which would take most of the time
    data.split = np.where(toy.split == "validation", "test", toy.split)
    log = vlmrm.train(model, data, sentences, vlmrm.triplet_loss, config)
    assert np.isfinite([entry["loss"] for entry in log]).all()
    rewards = model.eval().score(toy.frames(0)[:1], "open the drawer")
    save_file(vlmrm.trained_weights(model), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6  # the adapters alone
    vlmrm.write_json(tmp_path / "config.json", config)
    del model
    again = vlmrm.load_reward_model(tmp_path, device="cpu")
    assert again.score(toy.frames(0)[:1], "open the drawer") == pytest.approx(rewards, abs=1e-5)
    checkpoint.write_bytes(b"other")
    with pytest.raises(vlmrm.InputError, match="adapts other weights"):
        vlmrm.load_reward_model(tmp_path, device="cpu")

# -----------------------------------------------------------------------------
# Training and evaluation

def train_toy(toy, sentences, seed=0, steps=80, loss=vlmrm.triplet_loss, **options):
    torch.manual_seed(seed)
    model = vlmrm.build_backbone("tiny", "none")
    return model, vlmrm.train(model, toy, sentences, loss, {
        "steps": steps, "batch": 3, "learning_rate": 2e-3, "seed": seed}, **options)

def test_training_learns_and_beats_the_untrained_model(toy, sentences, tiny):
    trained, log = train_toy(toy, sentences)
    assert np.mean([entry["loss"] for entry in log[-5:]]) < 0.5 * log[0]["loss"]
    before = vlmrm.evaluate(tiny, toy, sentences)["seen"]
    after = vlmrm.evaluate(trained, toy, sentences)["seen"]
    assert after["voc"]["value"] > 0.8 > before["voc"]["value"] + 0.2
    assert after["ranking_accuracy_within"]["value"] > before["ranking_accuracy_within"]["value"]
    assert log[-1]["validation_voc"] > 0.8

def test_same_seed_same_weights(toy, sentences):
    first, again, other = (train_toy(toy, sentences, seed, steps=3)[0] for seed in (0, 0, 1))
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert not torch.equal(first.clip.visual.proj, other.clip.visual.proj)

@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_trains_with_its_constants(toy, sentences, name):
    rate, constants = PARTS[name]["TUNED"]
    constants = {constant: values[0] for constant, values in constants.items()}
    _, log = train_toy(toy, sentences, steps=2, labels=PARTS[name]["LABELS"],
                       loss=functools.partial(LOSSES[name], **constants))
    assert np.isfinite([entry["loss"] for entry in log]).all()

@pytest.mark.parametrize("loss, says", [
    (lambda frames, texts, times: frames.sum() * math.nan, "step 1: the loss is nan"),
    (lambda frames, texts, times: (frames - frames).square().sum().sqrt(), "its gradient nan"),
    (lambda frames, texts, times: frames.sum() * 0, "no gradient"),
    (lambda frames, texts, times: None, "a tensor of one number"),
    (lambda frames, texts, times: 0.5, "a tensor of one number"),
    (lambda frames, texts, times: frames.sum((1, 2)), "a tensor of one number"),
    (lambda frames, texts, times: times.sum(), "a tensor of one number")])
def test_a_bad_loss_is_refused(toy, sentences, loss, says):
    with pytest.raises(vlmrm.InputError, match=says):
        train_toy(toy, sentences, loss=loss)

class Oracle(vlmrm.nn.Module):
    """Stands in for a model: the embedding of a toy frame lies at an angle that its square's place
    decides, so that cos(frame, text) grows with the place: a perfect reward."""

    def embed_frames(self, frames):
        place = (frames.amax(-1) > 128).any(dim=-2).float().argmax(dim=-1) / 32  # (..., )
        angle = (1 - place) * math.pi / 2
        return torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)

    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0.0]]).expand(len(texts), 2)

def test_a_perfect_model_gets_perfect_scores(toy, sentences):
    data = copy.copy(toy)  # a single test expert has no other's goal image
    data.split, last = toy.split.copy(), toy.select(task="push-v3", split="test", source="expert")
    data.split[last[1:]] = "validation"
    report = vlmrm.evaluate(Oracle(), data, sentences)
    for group in ("seen", "unseen"):
        found = {metric: cell["value"] for metric, cell in report[group].items()}
        assert found["voc"] > 0.98 and found["voc_paraphrase"] == found["voc"]
        assert min(found["ranking_accuracy_within"], found["ranking_accuracy_across"]) > 0.95
        assert found["success_auroc"] == 1 and found["epic"] < 0.2 and found["goal_voc"] > 0.9
        low, high = report[group]["voc"]["interval"]
        assert low <= found["voc"] <= high
    # Every sentence is the same to this model: it cannot retrieve, and opposites cancel.
    assert report["seen"]["retrieval_top1"]["value"] == 0
    assert report["unseen"]["opposite_gap"]["value"] == 0
    assert set(report["tasks"]) == set(COLORS)
    assert report["seen"]["voc"]["tasks"] == 3 and report["seen"]["goal_voc"]["tasks"] == 2
    clock = vlmrm.evaluate(Oracle(), data, sentences, PARTS["clock"]["reward"])
    assert clock["unseen"]["voc"]["value"] == 1 and clock["predicted"][0].tolist() == [*range(10)]

# -----------------------------------------------------------------------------
# A run: its folder, stopping, damage

@pytest.fixture
def program(toy, tmp_path):
    """The program on the toy data, in this process."""
    def run(*options, runs="runs"):
        return vlmrm.main(["--data", str(toy.path), "--steps", "4", "--batch", "2", "--device",
                           "cpu", "--runs", str(tmp_path / runs), *map(str, options)])
    return run

@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A finished run with adapters, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert vlmrm.main(["--data", str(toy.path), "--steps", "2", "--batch", "3", "--seed", "1",
                           "--runs", str(runs), "--lora", "2", "--device", "cpu"]) == 0
    return runs / "triplet-seed1", printed.getvalue()

def one_line(capsys, says):
    """What was printed to stderr but progress bars is one line, and says so."""
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line.strip() and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1 and lines[0].startswith("vlmrm: ") and says in lines[0], lines

def test_run_folder(finished, frames):
    folder, printed = finished
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "metrics.json", "rewards.npz", "curves.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    for group in ("seen", "unseen"):
        for name in ("voc", "ranking_accuracy_within", "ranking_accuracy_across"):
            entry = metrics[group][name]
            assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
            assert f"{entry['value']:.2f}" in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert (config["steps"], config["seed"], config["constants"]) == (2, 1, {"margin": 0.1})
    stored = np.load(folder / "rewards.npz")
    assert stored["predicted"].shape == (len(stored["episodes"]), 10)
    model = vlmrm.load_reward_model(folder, device="cpu")
    base = vlmrm.build_backbone("tiny", None).eval()
    base.low_precision = model.low_precision
    assert (model.score(frames, "push") != base.score(frames, "push")).any()  # adapters are on
    with pytest.raises(vlmrm.InputError, match="cannot read"):
        vlmrm.load_reward_model(HERE / "data")

@pytest.fixture
def stop(monkeypatch):
    """Ctrl-C after the nth checkpoint, and not again."""
    save = vlmrm.save_checkpoint

    def after(n):
        def save_and_stop(*arguments, left=iter(range(n - 1, -1, -1))):
            save(*arguments)
            if next(left, None) == 0:
                raise KeyboardInterrupt
        monkeypatch.setattr(vlmrm, "save_checkpoint", save_and_stop)
    return after

def contents(folder):
    """The files of a finished run, without times."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    metrics = json.loads(files.pop("metrics.json"))
    metrics = {name: metrics[name] for name in ("seen", "unseen", "tasks", "log")}
    return files, metrics | {"log": [entry | {"seconds": 0} for entry in metrics["log"]]}

@pytest.mark.parametrize("options", [(), ("--lora", "2")])
def test_a_stopped_run_goes_on_to_the_same_end(program, tmp_path, stop, capsys, options):
    """Ctrl-C after the second checkpoint of four: --resume and the same command both end with the
    bytes of the run that was never stopped. (data/soak.py does it with kills.)"""
    assert program(*options, runs="whole") == 0
    whole = contents(tmp_path / "whole" / "triplet-seed0")
    for how in ("resumed", "again"):
        folder = tmp_path / how / "triplet-seed0"
        stop(2)
        assert program(*options, runs=how) == 130
        assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
        assert "the same command goes on" in capsys.readouterr().err
        assert (vlmrm.main(["--resume", str(folder)]) if how == "resumed"
                else program(*options, runs=how)) == 0
        bar = capsys.readouterr().err
        assert "| 2/4" in bar and "| 0/4" not in bar  # it did not start from the beginning
        assert contents(folder) == whole
        assert len(list((tmp_path / how).iterdir())) == 1
        assert vlmrm.main(["--resume", str(folder)]) == 2
        one_line(capsys, "is finished")

def test_a_checkpoint_of_another_run_or_with_less_in_it_is_not_resumed(
        program, tmp_path, stop, capsys):
    for seed in (0, 1):
        stop(2)
        assert program("--seed", seed) == 130
    capsys.readouterr()
    own, other = (tmp_path / "runs" / f"triplet-seed{k}" / "checkpoint.safetensors" for k in (0, 1))
    whole = own.read_bytes()
    with safe_open(own, "pt") as file:
        header, tensors = file.metadata(), load_file(own)
    for lost in ("exp_avg clip.visual.proj", "clip.visual.proj", "generator"):
        save_file({name: x for name, x in tensors.items() if name != lost}, own, header)
        for again in (lambda: vlmrm.main(["--resume", str(own.parent)]), program):
            assert again() == 2
            one_line(capsys, "checkpoint.safetensors: some weights are missing")
    own.write_bytes(whole[:5000])
    assert vlmrm.main(["--resume", str(own.parent)]) == 2
    one_line(capsys, "cannot read")
    own.write_bytes(other.read_bytes())  # another seed's: the run of seed 0 does not take it
    assert program() == 0
    assert not (own.parent / "metrics.json").exists()
    assert program(runs="clean") == 0
    assert contents(own.parent.with_name("triplet-seed0-2")) == contents(
        tmp_path / "clean" / "triplet-seed0")

def test_data_that_changed_are_not_resumed(program, toy, tmp_path, stop, capsys):
    shutil.copy(toy.path, data := tmp_path / "own.npz")
    stop(1)
    assert program("--data", data) == 130
    vlmrm.write_dataset(data, [toy.episode(e) for e in range(toy.E - 1)])
    capsys.readouterr()
    assert vlmrm.main(["--resume", str(tmp_path / "runs" / "triplet-seed0")]) == 2
    one_line(capsys, "has changed")

@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_full_disk_ends_in_one_line(program, tmp_path, monkeypatch, capsys, writes):
    """The disk is full after so many files: one line, whole files only, the same command goes on.
    Of the ten files, four are checkpoints."""
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert program() == 2
    one_line(capsys, "No space left")
    folder = tmp_path / "runs" / "triplet-seed0"
    assert not (folder / "metrics.json").exists()
    if writes:
        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            assert json.loads(file.metadata()["log"])
    monkeypatch.setattr(os, "fsync", fsync)
    assert program() == 0
    finished, = (tmp_path / "runs").glob("*/metrics.json")
    assert not list(finished.parent.glob("*unfinished*"))

def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    vlmrm.write_json(path := tmp_path / "file.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlmrm.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}

# -----------------------------------------------------------------------------
# An objective in a file

OWN = "def loss(frames, texts, times):\n    return (frames[:, 0] - texts).square().mean()\n"

def test_a_file_with_a_loss_and_tuned_constants(program, tmp_path):
    """The loss gets its constants, rate and the simulator's rewards, may import vlmrm, and another
    content of the same file is another run."""
    own = tmp_path / "own.py"
    own.write_text("import vlmrm\nTUNED = (1e-3, {'weight': (0.5, 1.0)})\nLABELS = 'rewards'\n"
                   "def loss(frames, texts, times, weight=9.0):\n"
                   "    score = vlmrm.cosine(frames[:, 0], texts).square().mean()\n"
                   "    return weight * (2 + score) * (times.max() > 1)\n")
    assert program("--objective", own) == 0
    config = json.loads((tmp_path / "runs" / "own-seed0" / "config.json").read_text())
    assert config["learning_rate"] == 1e-3 and config["constants"] == {"weight": 0.5}
    metrics = json.loads((tmp_path / "runs" / "own-seed0" / "metrics.json").read_text())
    assert all(1 <= entry["loss"] <= 1.5 for entry in metrics["log"])
    own.write_text(OWN)
    for _ in range(2):  # the second time it is done
        assert program("--objective", own) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"own-seed0", "own-seed0-2"}
    other = json.loads((tmp_path / "runs" / "own-seed0-2" / "config.json").read_text())
    assert other["sha256"]["objective"] != config["sha256"]["objective"]
    assert other["learning_rate"] == vlmrm.OFFICIAL_RATE and other["constants"] == {}

def test_a_file_with_a_reward(program, tmp_path):
    """The reward replaces the cosine: a clock, and one that also looks at sentences of its own."""
    clock, reader = tmp_path / "clock.py", tmp_path / "reader.py"
    clock.write_text("import torch\ndef reward(frames, text):\n"
                     "    return torch.arange(frames.shape[1]).repeat(len(frames), 1)\n")
    reader.write_text("SENTENCES = ['a table', 'a drawer']\ndef reward(frames, text, known):\n"
                      "    assert known.shape == (2, 128)\n    return frames @ (text - known[0])\n")
    assert program("--objective", "zeroshot", clock, reader) == 0
    runs = tmp_path / "runs"
    assert json.loads((runs / "clock-seed0" / "metrics.json").read_text())["unseen"]["voc"][
        "value"] == 1
    found, cosine = (np.load(runs / name / "rewards.npz")["predicted"]
                     for name in ("reader-seed0", "zeroshot-seed0"))
    assert np.ptp(found) > 0 and (found != cosine).any()

@pytest.mark.parametrize("text, says", [
    ("def my_loss(frames, texts, times): pass", "own.py"),
    ("def reward(frames, text): return (frames @ text) * float('nan')", "finite")])
def test_a_file_that_says_nothing_is_refused(program, tmp_path, capsys, text, says):
    """Not evaluated as if it were the cosine, nor scored as if NaN were an order."""
    (tmp_path / "own.py").write_text(text)
    assert program("--objective", tmp_path / "own.py") == 2
    one_line(capsys, says)

def test_a_mistake_in_a_file_is_shown_and_leaves_no_folder(program, tmp_path):
    """Python's traceback: whoever writes an objective needs its line."""
    (tmp_path / "own.py").write_text("def loss(frames, texts, times): return frames @ texts")
    with pytest.raises(RuntimeError):
        program("--objective", tmp_path / "own.py")
    assert not list((tmp_path / "runs").iterdir())

def test_names_are_not_taken_for_files_nor_files_for_each_other(program, tmp_path, monkeypatch):
    """A file that is called triplet does not matter; two files of one name are two rows."""
    monkeypatch.chdir(tmp_path)
    Path("triplet").write_text("a note")
    assert program("--steps", "1") == 0
    assert json.loads(Path("runs/triplet-seed0/metrics.json").read_text())["log"]
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "own.py").write_text(f"{OWN}# {folder}")
    assert program("--steps", "1", "--objective", "a/own.py", "b/own.py") == 0
    assert Path("runs/table.md").read_text(encoding="utf-8").count("\n") == 4

# -----------------------------------------------------------------------------
# --score

@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4", ""])
def test_score_a_video(finished, toy, tmp_path, capsys, suffix):
    """An image, a GIF, a film and a folder of images, grey and transparent ones among them. The
    picture is drawn beside it, and never over one that is there."""
    path = tmp_path / f"clip{suffix}"
    pictures = [Image.fromarray(frame).resize((64, 64)) for frame in toy.frames(0)]
    if suffix == "":
        path.mkdir()
        for k, picture in enumerate(pictures, start=2):  # 10 comes after 9
            picture.convert("L" if k == 2 else ["RGBA", "RGB"][k % 2]).save(path / f"{k}.png")
    elif suffix == ".mp4":
        imageio.imwrite(path, np.stack([np.asarray(picture) for picture in pictures]), fps=5)
    else:
        more = {"save_all": True, "append_images": pictures[1:]} if suffix == ".gif" else {}
        pictures[0].save(path, **more)
    sentence = "open the $_$ drawer 🦾"  # no formula, and a sign that the font lacks
    for _ in range(2):
        assert vlmrm.main(["--score", str(path), "--instruction", sentence, "--model",
                           str(finished[0]), "--device", "cpu"]) == 0
        printed = capsys.readouterr().out.splitlines()
    drawn = {file.name: file.read_bytes() for file in tmp_path.glob("*-triplet-seed1*")}
    assert set(drawn) == {f"clip{suffix}-triplet-seed1.png", f"clip{suffix}-triplet-seed1-2.png"}
    assert all(content[:4] == b"\x89PNG" for content in drawn.values())
    rewards = [float(line.split()[-1]) for line in printed[:-1]]
    assert len(rewards) == (1 if suffix == ".png" else 10) and "best frame" in printed[-1]
    shown = np.stack(list(vlmrm.read_frames(path)))
    model = vlmrm.load_reward_model(finished[0], device="cpu")
    assert model.score(shown, sentence) == pytest.approx(rewards, abs=1e-4)
    if suffix == "":
        assert (shown[1:] == np.stack([np.asarray(p) for p in pictures])[1:]).all()

@pytest.mark.parametrize("arguments, says", [
    (["no.mp4", "--instruction", "open"], "no.mp4: there is no such file"),
    (["README.md", "--instruction", "open"], "cannot read README.md"),
    (["golden", "--instruction", "open"], "has no pictures"),
    (["README.md"], "--score needs the sentence"),
    (["README.md", "--instruction", "open", "--model", "data"], "cannot read data/config.json"),
    (["grey.png", "--instruction", "open"], "grey values have more than 8 bits"),
    (["huge.png", "--instruction", "open"], "cannot read huge.png"),
    (["README.md", "--instruction", "open", "--model", "blind"], "without sentences"),
])
def test_score_refuses_in_one_line(finished, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no film")
    Path("golden").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save("grey.png")
    header = Path("grey.png").read_bytes()
    Path("huge.png").write_bytes(header[:16] + b"\x00\x00\x3f\xff" * 2 + header[24:])
    shutil.copytree(finished[0], "blind")
    config = json.loads(Path("blind/config.json").read_text())
    Path("blind/config.json").write_text(json.dumps(config | {"reads_instruction": False}))
    model = [] if "--model" in arguments else ["--model", str(finished[0])]
    assert vlmrm.main(["--score", *arguments, *model]) == 2
    one_line(capsys, says)

# -----------------------------------------------------------------------------
# Command line

@pytest.mark.parametrize("arguments, says", [
    (["--backbone", "ViT-B-32"], "laion2b_s34b_b79k"),
    (["--backbone", "ViT-B-32", "--pretrained", "nonsense"], "nonsense"),
    (["--pretrained", "missing.safetensors"], "missing.safetensors: there is no such file"),
    (["--data", "missing.npz"], "missing.npz: there is no such file"),
    (["--data", "README.md"], "cannot read"),
    (["--instructions", "README.md"], "JSONDecodeError"),
    (["--collect", "--tasks", "drawer-opn-v3", "--data", "x.npz"], "drawer-open-v3"),
    (["--collect", "--frames", "200", "--data", "x.npz"], "16383"),
    (["--collect", "--data", "README.md"], "README.md exists"),
    (["--batch", "41"], "--batch 41"),
    (["--runs", "README.md"], "README.md"),
    (["--resume", "nowhere"], "nowhere"),
    (["--objective", "clip", "--batch", "1"], "larger --batch"),
])
def test_bad_input_is_one_line_and_exit_code_2(program, arguments, says, capsys, monkeypatch,
                                               tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no data")
    direct = arguments[0] in ("--collect", "--resume", "--batch")  # without the toy data's options
    assert (vlmrm.main(arguments) if direct else program(*arguments)) == 2
    one_line(capsys, says)
    assert not list(tmp_path.glob("runs/*/*")) and not Path("x.npz").exists()

@pytest.mark.parametrize("arguments, says", [
    ("--objective tripplet", "'tripplet' is not all, zeroshot, triplet"),
    ("--objective missing.py", "or a Python file"),
    ("--steps 0", "0 is not between 1 and 1000000"),
    ("--steps 1.5", "invalid int value"),
    ("--device tpu", "invalid choice"),
    ("--learning-rate -1", "-1.0 is not between 1e-09 and"),
    ("--learning-rate nan", "nan is not between"),
    ("--collect --frames 4", "4 is not between 5 and"),
    ("--score clip.mp4 --collect", "--score has no effect with --collect"),
    ("--instruction 'open the drawer'", "--instruction has no effect with --objective"),
    ("--score clip.mp4 --instruction open --backbone RN50", "--backbone has no effect"),
    ("--collect --learning-rate 1", "--learning-rate has no effect"),
    ("--resume runs/x --steps 3", "--steps has no effect"),
])
def test_argparse_refuses(arguments, says, capsys):
    """Also what would not be obeyed: nobody should wait for a run and find that out at its end."""
    with pytest.raises(SystemExit, match="2"):
        vlmrm.parse_arguments(shlex.split(arguments))
    one_line(capsys, says)

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_during_the_imports_is_no_traceback():
    with subprocess.Popen([sys.executable, "vlmrm.py", "--data", "missing.npz"], cwd=HERE,
                          stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                              signal.SIGINT, signal.default_int_handler)) as process:
        time.sleep(1)  # the imports take about four
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT

def test_offline_weights_end_in_one_line(program, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand more lines")
    monkeypatch.setattr(open_clip, "create_model", offline)
    assert program("--backbone", "ViT-B-32", "--pretrained", "openai") == 2
    one_line(capsys, "Without a network, --pretrained takes a file")

def test_the_code_keeps_to_its_own_rules():
    """Lines of at most 100 characters, no function beyond 50 lines, every public function and class
    of vlmrm.py with a docstring; no pickle is ever loaded."""
    for path in (HERE / "vlmrm.py", HERE / "test_vlmrm.py", *(HERE / "data").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert max(map(len, source.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 50, (path, node.name, length)
        if path.name != "test_vlmrm.py":
            assert not re.search(r"import pickle|torch\.load|allow_pickle=True", source), path
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name

# -----------------------------------------------------------------------------
# README: its commands and its Python run, on the toy data; its tables are those of data/results

README = (HERE / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({line.split("  #")[0].strip() for line in re.findall(
    r"python vlmrm\.py([^`\n]*)", README)})

@pytest.fixture(scope="module")
def reader(toy, finished, tmp_path_factory):
    """A folder as a reader of the README has it: a trained model, films, and every file that the
    README tells to write; its Python is run there, in the order of the page."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").symlink_to(HERE / "data")
    (folder / "runs").mkdir()
    (folder / "runs" / "triplet-seed0").symlink_to(finished[0])
    (folder / "films").mkdir()
    for path in (folder / "clip.mp4", *(folder / "films" / f"{k}.mp4" for k in range(5))):
        imageio.imwrite(path, np.stack([np.full((32, 48, 3), 8 * k, np.uint8) for k in range(30)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for snippet in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
            if name := re.match(r"# (\w+\.py)\n", snippet):
                (folder / name[1]).write_text(snippet)
            try:
                exec(compile(snippet, "README.md", "exec"), names := {"__name__": "README"})
            except vlmrm.InputError as problem:
                if "cannot render" not in str(problem):
                    raise
            if "rewards" in names:
                assert names["rewards"].shape == (24,) and names["best"].shape == (96, 96, 3)
            if "env" in names and "reward" in names:
                assert -1 <= names["reward"] <= 1 and names["info"]["environment_reward"] >= 0
                names["renderer"].close()
    return folder

def test_readme_has_commands_and_python(reader):
    assert len(COMMANDS) >= 10 and README.count("```python\n") >= 4
    assert (reader / "my_own.py").exists() and (reader / "towel.npz").exists()

@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_run(line, reader, toy, monkeypatch, capsys):
    """With a step or two. What needs a download must fail for that reason."""
    monkeypatch.chdir(reader)
    arguments = shlex.split(line)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            vlmrm.main(arguments)
        return
    args = vlmrm.parse_arguments(arguments)
    if args.collect or args.resume:  # their own tests run them
        assert args.collect or args.resume.parent.name == "runs"
        return
    if args.pretrained not in (None, "none"):  # a download, or a file of yours
        monkeypatch.setattr(open_clip, "create_model", lambda *_: 1 / 0)
        assert vlmrm.main(arguments) == 2
        return one_line(capsys, f"cannot load {args.backbone}")
    if not args.score:
        if args.objective == ["all"]:  # all of them are trained above
            monkeypatch.setattr(vlmrm, "OBJECTIVES", {
                name: vlmrm.OBJECTIVES[name] for name in ("zeroshot", "tcn")})
        own = args.data.exists() and args.data.parent == Path()
        arguments += ["--steps", "1", "--seeds", "1", "--device", "cpu", "--runs", "tried"]
        arguments += [] if own else ["--data", str(toy.path), "--batch", "2"]
    assert vlmrm.main(arguments) == 0

# -----------------------------------------------------------------------------
# The pages, the saved results and the scripts of data/

def test_pages_show_the_saved_results():
    import report
    results = HERE / "data" / "results"
    pages = {page: page.read_text(encoding="utf-8")
             for page in (HERE / "README.md", results / "README.md")}
    everything = "".join(pages.values())
    for name, table in report.tables(results).items():
        assert table in everything, f"run python data/report.py: the table {name} is old"
    assert len(pages[HERE / "README.md"].splitlines()) <= 250
    runs, shown = report.load(results)
    triplet = runs["triplet", shown["triplet"]]
    for metric in ("voc", "ranking_accuracy_within"):
        for group in ("seen", "unseen"):
            values = [run[group][metric]["value"] for run in triplet]
            line = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} {group}"
            assert line in vlmrm.__doc__, f"the header of vlmrm.py should say {line}"
    figures = [triplet[0][group][metric]["value"] for metric in ("voc", "ranking_accuracy_within")
               for group in ("seen", "unseen")]
    assert triplet[0]["config"]["seed"] == 0
    assert "VOC {:.2f} and {:.2f}, ranking accuracy {:.2f} and {:.2f}".format(
        *figures) in pages[HERE / "README.md"]
    timing = json.loads((results / "benchmark.json").read_text())["default"]["wall_seconds"]
    for page in (pages[HERE / "README.md"], vlmrm.__doc__):
        assert f"{np.median(timing):.0f} seconds" in page

def test_saved_results_are_of_this_code_and_data():
    """The settings of every saved run are what the program would use now."""
    import study
    paths = study.all_objectives()
    seen = set()
    for result in json.loads((HERE / "data" / "results" / "results.json").read_text()):
        saved = result["config"]
        objective = "triplet" if saved["backbone"] == "thumbnail" else result["row"]
        args = vlmrm.parse_arguments(["--seed", str(saved["seed"]), "--setting", saved["setting"],
                                      "--backbone", saved["backbone"]])
        args.objective = paths[objective]
        assert study.reduced(vlmrm.configuration(args)) == saved, result["row"]
        seen.add((result["row"], saved["seed"]))
    assert seen >= set(itertools.product(LOSSES, range(3)))

def commands():
    pages = (HERE / "README.md", HERE / "data" / "results" / "README.md")
    return sorted({line.split("  #")[0].strip() for page in pages for line in re.findall(
        r"python vlmrm\.py ([^`\n]*)", page.read_text(encoding="utf-8"))})

def test_commands_of_the_pages_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own.py").write_text("")
    (tmp_path / "data").symlink_to(HERE / "data")
    assert len(commands()) >= 12
    for line in commands():
        if line != "--help":
            vlmrm.parse_arguments(shlex.split(line))

def test_snippets_of_the_readme_run(program, tmp_path, monkeypatch):
    """The Python of README.md as it stands, with films and a trained model where it looks for
    them; its objective is trained for a few steps."""
    assert program("--objective", "zeroshot") == 0
    (tmp_path / "runs" / "zeroshot-seed0").rename(tmp_path / "runs" / "triplet-seed0")
    (tmp_path / "films").mkdir()
    for k in range(5):
        imageio.imwrite(tmp_path / "films" / f"{k}.mp4", np.stack(
            [np.full((32, 48, 3), 8 * step, np.uint8) for step in range(30)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "data").symlink_to(HERE / "data")
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    assert len(snippets) == 4
    for snippet in snippets:
        names = {}
        if "def loss" in snippet:
            (tmp_path / "my_own.py").write_text(snippet)
            assert program("--objective", "my_own.py") == 0
            continue
        try:
            exec(compile(snippet, "README.md", "exec"), names)
        except vlmrm.InputError as problem:
            if "cannot render" not in str(problem):
                raise
            pytest.skip(str(problem))
        if "rewards" in names:
            assert names["rewards"].shape == (24,) and names["best"].shape == (96, 96, 3)
        if "reward" in names:
            assert -1 <= names["reward"] <= 1 and names["info"]["environment_reward"] >= 0
            names["renderer"].close()
    assert vlmrm.main(["--data", "towel.npz", "--instructions", "towel.json", "--batch", "1",
                       "--learning-rate", "1e-4", "--steps", "1", "--runs", "towel"]) == 0

@pytest.mark.parametrize("number, wrong", [
    (1, 0.5), (2, lambda *batch: vlmrm.triplet_loss(*batch)), (3, 1.0)])
def test_exercises_refuse_what_is_wrong(number, wrong):
    import exercises
    right, remark = getattr(exercises, f"check_{number}")(wrong)
    assert not right and remark

def test_exercise_2_accepts_the_loss_of_the_file():
    import exercises
    assert exercises.check_2(PARTS["decisionnce-p"]["loss"])[0]

def test_paired_p_values_by_hand():
    """Ten tasks, so 2^10 ways to flip signs. `a` gains on all: 2 of them lie as far out. `b` loses
    the smallest gap, `c` the second smallest: 4 and 6. Holm: 3 * 2, 2 * 4, and for `c` 1 * 6, but
    not less than for `b`. With equal scores all flips are the same: 1."""
    from study import paired_p_values
    reference, gaps = np.linspace(0.3, 0.9, 10), np.arange(1, 11) / 100
    scores = {"triplet": reference, "a": reference + gaps}
    for name, flipped in (("b", 0), ("c", 1)):
        scores[name] = reference + np.where(np.arange(10) == flipped, -gaps, gaps)
    assert paired_p_values(scores, "triplet") == pytest.approx(
        {"a": 6 / 1024, "b": 8 / 1024, "c": 8 / 1024})
    equal = {"triplet": reference, "same": reference}
    assert paired_p_values(equal, "triplet") == {"same": 1}

def test_best_of_is_the_mean_over_all_draws():
    from exercises import best_of
    values, truth = np.random.default_rng(5).random((2, 7))
    for n in range(1, 8):
        draws = [max(draw, key=lambda i: values[i])
                 for draw in itertools.combinations(range(7), n)]
        assert best_of(values, truth, n) == pytest.approx(truth[draws].mean())
