"""Tests of vlmrm.py and of what lies in data/. Run with: python -m pytest

Every formula is held against something that does not share its code: a value worked out by hand,
the numbers that the authors' own code returned (data/golden), a library, or a loop so naive that it
cannot be wrong. The parts follow vlmrm.py: losses, what a reader copies out of it, metrics, data,
the file alone in a folder, backbone, training, runs, objectives in files, --score, the command
line. Last come the README and the scripts of data/.
"""
import ast
import contextlib
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
import pyarrow.parquet
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import environment  # these are of data/
import exercises
import failures
import films
import hub
import lerobot_data
import policy
import report
import scenes
import show
import study

SOURCE = (HERE / "vlmrm.py").read_text(encoding="utf-8")
ZOO = {path.stem: str(path) for path in sorted((HERE / "data" / "objectives").glob("*.py"))}
PARTS = {name: vlmrm.get_objective(ZOO.get(name, name)) for name in [*vlmrm.OBJECTIVES, *ZOO]}

def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)

def complete(loss):
    """A loss that asks for what was before training gets the batch, its axes turned by one."""
    def completed(frames, texts, times, **options):
        before = [x.detach().roll(1, -1) for x in (frames, texts)]
        return loss(frames, texts, times, before, **options)
    return completed if vlmrm.takes_before(loss) else loss

LOSSES = {name: complete(parts["loss"]) for name, parts in PARTS.items() if parts["loss"]}

# Frames, texts, and times: five frames evenly spread over each episode.
BATCH = unit(6, 5, 8), unit(6, 8, seed=1), torch.linspace(0, 1, 5, dtype=torch.float64).expand(6, 5)

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

def golden_batch(method):
    """The arrays of a method, its embeddings as a leaf, and their frames in our order."""
    arrays = golden_arrays(method)
    leaf = arrays["emb"].double().requires_grad_()
    return arrays, leaf, torch.stack([torch.zeros_like(leaf[:, 0]) if slot is None
                                      else leaf[:, slot] for slot in SLOTS[method]], dim=1)

def check_golden(loss, expected, *gradients):
    """The value, and (leaf, its gradient)."""
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    for leaf, gradient in gradients:
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-12)

class InTurn:
    """Permutations that a loss uses twice: another set of them each time it goes through them."""
    def __init__(self, *sets):
        self.sets = iter(sets)

    def __iter__(self):
        return iter(next(self.sets))

@pytest.mark.parametrize("name, method, variant, options", [
    ("tcn", "r3m", "tcn_only_l2", {}), ("r3m", "r3m", "full_cosinehead_l2", {}),
    ("vip", "vip", "neg0", {"negatives": 0, "l1": 0, "l2": 0}),
    ("vip", "vip", "neg3", {"l1": 0, "l2": 0}), ("vip", "vip", "ego4d_cfg", {})])
def test_tcn_r3m_and_vip_golden(name, method, variant, options, monkeypatch):
    """With the permutations of the official run, call by call."""
    (arrays, leaf, frames), texts, language = golden_batch(method), None, ()
    if method == "r3m":
        texts = arrays["lang_same"] * arrays["has_lang"][:, None]
        arrays["perms"] = InTurn(*arrays["perms_tcn"].view(3, 2, 6).unbind(1))
    if name == "r3m":
        language = arrays["perms_lang"].view(3, 3, 6).unbind(1)
    if variant != "neg0":
        calls = iter([*language, arrays["perms"]])
        monkeypatch.setattr(vlmrm, "negative_permutations", lambda n, batch: {3: next(calls)}[n])
    loss = LOSSES[name](frames, texts, None, **options)
    check_golden(loss, GOLDEN[method]["results"][f"{variant}/float64"]["full_loss"],
                 (leaf, arrays[f"grad_{variant}"]))

@pytest.mark.parametrize("variant, options", [
    ("finetune_cos_neg0", {}), ("all_cos_neg0", {"language_weight": 1}),
    ("pretrain_cos_neg3", {"language_weight": 1})])
def test_liv_golden(variant, options, monkeypatch):
    arrays, leaf, frames = golden_batch("liv")
    if variant.endswith("neg3"):  # it drew anew for the sentences, we do not
        real, official = vlmrm.implicit_value_loss, iter((arrays["perms_visual"],
                                                          arrays["perms_lang"]))
        monkeypatch.setattr(vlmrm, "implicit_value_loss",
                            lambda *batch: real(*batch[:-1], next(official)))
    texts = arrays["text"].clone().requires_grad_()
    loss = vlmrm.liv_loss(frames, texts, None, **options)
    check_golden(loss, GOLDEN["liv"]["results"][f"{variant}/float64"]["full_loss"],
                 (leaf, arrays[f"grad_emb_{variant}"]), (texts, arrays[f"grad_text_{variant}"]))

@pytest.mark.parametrize("form, F_, scale", list(itertools.product("PT", (2, 4), (10, 100))))
def test_decisionnce_golden(form, F_, scale):
    arrays, name = golden_arrays("decisionnce"), f"{form}_F{F_}_{scale}"
    frames = arrays[f"vis{F_}"].double().requires_grad_()
    texts = arrays["text"].double().requires_grad_()
    loss = LOSSES[f"decisionnce-{form.lower()}"](frames, texts, None, scale=scale)
    expected = GOLDEN["decisionnce"]["results"][f"{form}_F{F_}_scale{scale}/float64"]["loss"]
    check_golden(loss, expected, (frames, arrays[f"grad_vis_{name}"]),
                 (texts, arrays[f"grad_text_{name}"]))

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
    check_golden(LOSSES["vlc"](*batch), full["total_w33"],
                 (texts, arrays["grad_full"].reshape(6, 72)))

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
    arrays, n = golden_arrays("vlmrm"), "3" * (prompts != "single")
    goal, baseline = (F.normalize(arrays[key + n], dim=-1).mean(0)
                      for key in ("target", "baseline"))
    ours = PARTS["vlm-rm"]["goal_baseline_reward"](arrays["frames"], goal, baseline, alpha)
    expected = GOLDEN["vlmrm"]["results"][f"{prompts}/alpha{alpha}"]
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)  # official: float32

# -----------------------------------------------------------------------------
# Losses by hand, against a library or loops, and what must hold of each

E0, E1 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
RISE = torch.stack([E1, E1, E1, E1, E0])[None]  # rewards 0 0 0 0 1 under the text e0
TURN = torch.stack([E1, E1, E0, E0, E0])[None]
AXES = torch.eye(3)  # two videos turn from e2 into their own axis, which is their text
TURNS = torch.stack([AXES[[2, 2, k, k, k]] * torch.tensor([[1], [1], [-1], [1], [1]])
                     for k in (0, 1)])  # but for the frame in the middle, which looks away
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
    # At right angles to the text p = 1/2 everywhere. Frames 1 to 4 and, rewound, 3 to 0 have
    # targets 1/4 1/2 3/4 1 3/4 1/2 1/4 0: squared errors 1/16 0 1/16 1/4 1/16 0 1/16 1/4. Two such
    # videos, orthogonal to both texts, add the wrong text, with target 0.
    ("progress", E1.expand(2, 5, 2), E0.expand(2, 2), {}, (3 / 32 + 1 / 4) / 2),
    # To each of the three goals the distance is sqrt 2, from next it is .001 (the clamp): target
    # -1 - .99 * .001, advantage positive (-1 > -1.41), weight .95.
    ("hilp", TURN, None, {}, 0.95 * (math.sqrt(2) - 1 - 0.99e-3) ** 2),
]

@pytest.mark.parametrize("name, frames, texts, options, expected", BY_HAND)
def test_loss_by_hand(name, frames, texts, options, expected):
    times = torch.linspace(0, 1, 5).expand(len(frames), 5)
    assert LOSSES[name](frames, texts, times, **options).item() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("name", ["preference", "preference-oracle"])
def test_preference_goes_by_its_labels(name):
    """The time: six level pairs cost log 2 each, four lead by 1. The oracle's: the last frame is
    the worst, the others tie, so four pairs trail by 1. Equal labels: no pair, and no loss."""
    for labels, expected in (
            ([0.0, 1, 2, 3, 4], (6 * math.log(2) + 4 * math.log(1 + math.exp(-1))) / 10),
            ([3.0, 3, 3, 3, 0], math.log(1 + math.e)), ([1.0] * 5, 0)):
        loss = LOSSES[name](RISE, E0[None], torch.tensor([labels]), scale=1.0)
        assert loss.item() == pytest.approx(expected)

def test_rewards_of_the_zoo_by_hand():
    """Goal e0, baseline -e0, frame e1: offset (-1, 1), along d 1, across 1. alpha 0: the cosine, 0;
    alpha 1: 1 - 1/2; alpha 1/2: 1 - (1 + 1/4) / 2. At the goal itself the reward is 1."""
    reward = PARTS["vlm-rm"]["goal_baseline_reward"]
    for alpha, expected in ((0.0, 0.0), (1.0, 0.5), (0.5, 0.375)):
        assert reward(E1, E0, -E0, alpha).item() == pytest.approx(expected)
        assert reward(E0, E0, -E0, alpha).item() == 1
    assert torch.isfinite(reward(TURN, E0, E0)).all()  # equal sentences: a number and not NaN
    assert (PARTS["vlm-rm"]["reward"](TURN, E0, -E0[None]) == reward(TURN, E0, -E0)).all()
    two, away = TURN.repeat(2, 1, 1), math.sqrt(2)
    assert PARTS["clock"]["reward"](two, E0).tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.testing.assert_close(PARTS["distance-from-start"]["reward"](two, E0),
                               torch.tensor([[0, 0, away, away, away]] * 2))

def torchs_triplet(x, l):
    """With D = 1 - cos as distance, torch's triplet loss on every (text, later, earlier)."""
    return np.mean([F.triplet_margin_with_distance_loss(
        l, x[:, late], x[:, early], margin=0.1,
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b))
        for early, late in itertools.combinations(range(5), 2)])

def open_clips_loss(x, l):
    return np.mean([open_clip.ClipLoss()(x[:, k], l, 1 / 0.07) for k in range(5)])

def naive_hilp(x, l):
    terms = []
    for i in range(len(x)):
        for goal in (x[i, 2], x[i, 3], x[i, 4], x[(i + 1) % len(x), 4]):
            v, target = (-max(((x[i, k] - goal) ** 2).sum(), 1e-6) ** 0.5 for k in (1, 2))
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

def naive_hop(x, l, scale=10):
    errors = []
    for video, text in zip(x, l):
        p = [1 / (1 + math.exp(-scale * frame @ text)) for frame in video]
        p, t = ([0.05 + 0.9 * value for value in some] for some in (p, np.arange(5) / 4))
        for u, v in itertools.permutations(range(5), 2):
            hops = [(y[v] - y[u]) / (1 - y[u] if v > u else y[u]) for y in (p, t)]
            errors.append((hops[0] - hops[1]) ** 2)
    return np.mean(errors)

def naive_anchored(x, l):
    moved = [sum((b - a) / (b - a).norm() for a, b in itertools.pairwise(video[[0, 1, 3, 4]]))
             for video in x]
    scores = torch.stack([torch.stack([3 * move @ text for text in l]) for move in moved])
    contrast = sum(F.cross_entropy(some, torch.arange(len(l))) for some in (scores, scores.T)) / 2
    away = np.mean([((frame - frame.roll(1)) ** 2).sum() for frame in x.flatten(0, 1)])
    return naive_hop(x, l, scale=5) + 0.1 * contrast + away

def naive_timerewarder(x, l):
    entropies, centres = [], np.linspace(-1, 1, 20)
    for video, text in zip(x, l):
        for u, v in itertools.permutations(range(5), 2):
            p = scipy.stats.norm.pdf(centres, 2.5 * (video[v] - video[u]) @ text, 2 / 19)
            place = ((v - u) / 4 + 1) * 19 / 2  # among the bins: the two around it share the target
            low, share = int(place), place % 1
            high = min(low + 1, 19)
            entropies.append(-(1 - share) * np.log(p[low] / p.sum())
                             - share * np.log(p[high] / p.sum()))
    return np.mean(entropies)

@pytest.mark.parametrize("name, oracle", [
    ("triplet", torchs_triplet), ("clip", open_clips_loss), ("hilp", naive_hilp),
    ("progress", naive_progress), ("anchored", naive_anchored), ("hop", naive_hop),
    ("timerewarder", naive_timerewarder)])
def test_loss_against_a_library_or_loops(name, oracle):
    assert LOSSES[name](*BATCH).item() == pytest.approx(float(oracle(*BATCH[:2])), rel=1e-9)

@pytest.mark.parametrize("name", ["tcn", "vip", "hilp"])
def test_text_versions_are_the_losses_with_the_sentence_as_the_last_frame(name):
    frames, texts, _ = BATCH
    replaced = torch.cat([frames[:, :4], texts[:, None]], dim=1)
    assert LOSSES[f"{name}-text"](frames, texts, None) == LOSSES[name](replaced, None, None)

@pytest.mark.parametrize("name", LOSSES)
def test_lower_for_the_better_ordered_batch(name):
    """Videos that end at their instruction, against the same with `now` and `next` far apart and
    the order broken; for clip, which knows no order, against the instructions of other videos."""
    texts, share = unit(8, 16), torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    times = share.T.expand(8, 5)
    start = unit(8, 16, seed=7)[:, None]  # the frames turn from here into their text
    good = F.normalize(start * (1 - share) + texts[:, None] * share, dim=-1)
    worse = good.roll(1, 0) if name == "clip" else good.flip(1)
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
def test_finite_on_any_input_and_turning_with_the_batch(name):
    """Frames equal to their texts or opposite, huge, tiny, one video alone; then batches of any
    shape: turned by a place, they turn the gradient by a place, and nothing else changes."""
    frames, texts, rng = BATCH[0].float(), BATCH[1].float(), np.random.default_rng(9)
    same = texts[:, None].repeat(1, 5, 1)
    batches = [(x, texts[:len(x)]) for x in (same, -same, 1e4 * frames, 1e-6 * frames, frames[:1])]
    for seed, (B, D) in enumerate(rng.integers(2, 40, (20, 2))):
        batches.append((unit(B, 5, D, seed=seed) * 10 ** rng.uniform(-3, 3), unit(B, D, seed=50)))
    for frames, texts in batches:
        times, found = torch.linspace(0, 1, 5).expand(len(frames), 5).to(frames), []
        for turn in (0, 1):
            x = frames.roll(turn, 0).requires_grad_()
            loss = LOSSES[name](x, texts.roll(turn, 0), times)
            found.append((loss, torch.autograd.grad(loss, x)[0].roll(-turn, 0)))
            assert loss.shape == () and all(value.isfinite().all() for value in found[-1])
            assert torch.equal(x.roll(-turn, 0), frames)  # inputs are not changed
        if frames.dtype == torch.float64:
            torch.testing.assert_close(found[1], found[0])

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

LOSS_ARGUMENTS = {name: [BATCH] for name in FUNCTIONS if name.endswith("_loss")} | {
    "softmax_loss": [(BATCH[1][0], [BATCH[1][1], BATCH[1][2]])],
    "implicit_value_loss": [(vlmrm.cosine, *BATCH[0].unbind(1)[:4], 0.98,
                             vlmrm.negative_permutations(3, 6))],
    "liv_loss": [BATCH, (*BATCH, 0.5, 0.98, 1.0, 2)],  # and its other branch
    "anchored_loss": [(*BATCH, (-BATCH[0], BATCH[1]))],
    "info_nce": [(unit(6, 6),)], "norm_penalty": [(BATCH[0], 0.1, 0.2)]}
ROWS = np.random.default_rng(3).random((2, 4, 9))
METRIC_ARGUMENTS = {
    "value_order_correlation": [(ROWS[0],)],
    "ranking_accuracy": [(*ROWS, pairs) for pairs in ("within", "across", "same_time")],
    "reading_metrics": [(np.random.default_rng(4).random((9, 2, 5)), 0, 1)]}

def test_every_metric_of_section_5_is_copied_out():
    """All that are functions of rewards alone; from evaluate() on a report is put together."""
    section = SOURCE[SOURCE.index("\n# 5. "):SOURCE.index("\ndef evaluate")]
    assert re.findall(r"^def (\w+)", section, re.MULTILINE) == list(METRIC_ARGUMENTS)

@pytest.mark.parametrize("name", [*LOSS_ARGUMENTS, *METRIC_ARGUMENTS])
def test_it_runs_when_copied_out(name):
    ours, copy_ = getattr(vlmrm, name), copied_out(name)
    assert copy_ is not ours
    for arguments in (LOSS_ARGUMENTS | METRIC_ARGUMENTS)[name]:
        np.testing.assert_equal(*(found.tolist() if isinstance(found, torch.Tensor) else found
                                  for found in (copy_(*arguments), ours(*arguments))))

def test_vlmrm_imports_nothing_of_ours():
    """Only the standard library and packages of requirements.txt, by plain import statements."""
    roots = {(getattr(node, "module", None) or name.name).split(".")[0] for node in ast.walk(TREE)
             if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names}
    assert not roots & {"data", "importlib", *(path.stem for path in HERE.rglob("*.py"))}
    assert roots - sys.stdlib_module_names == {
        "imageio", "numpy", "open_clip", "torch", "matplotlib", "PIL", "safetensors", "scipy",
        "tqdm", "mujoco", "metaworld"} and "__import__" not in SOURCE

def test_the_registry_and_the_zoo():
    """Constants are arguments of their losses, and a file of the zoo says what it is."""
    assert list(vlmrm.OBJECTIVES) == [
        "triplet", "tcn", "r3m", "vip", "liv", "anchored", "zeroshot"]
    assert set(vlmrm.OBJECTIVES) - set(LOSSES) == {"zeroshot"}
    for name in LOSSES:
        rate, constants = PARTS[name]["TUNED"]
        assert 1e-4 <= rate <= 1e-2, name
        parameters = list(inspect.signature(PARTS[name]["loss"]).parameters)
        assert parameters[:3] == ["frames", "texts", "times"]
        for constant, values in constants.items():
            assert constant in parameters, (name, constant)
            assert len(set(values)) == 3 and all(value > 0 for value in values)
    for name, path in ZOO.items():
        text = ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8")))
        assert "Notice:" in text and "Source:" in text, name
        assert PARTS[name]["loss"] or PARTS[name]["reward"] is not vlmrm.cosine_reward, name

# -----------------------------------------------------------------------------
# Metrics

def test_voc_by_hand():
    """Rewards 1 3 2: ranks 1 3 2 against times 1 2 3, sum of squared differences 0 + 1 + 1 = 2,
    Spearman 1 - 6 * 2 / (3 * 8) = .5. A constant counts 0, rising 1, falling -1."""
    predicted = np.array([[1, 3, 2], [5, 5, 5], [1, 2, 9], [3, 2, 1]], float)
    assert vlmrm.value_order_correlation(predicted) == pytest.approx([0.5, 0, 1, -1])

def test_voc_is_scipys_spearman_and_opengvls_value():
    predicted = np.random.default_rng(0).integers(0, 6, size=(50, 12)).astype(float)  # many ties
    expected = [scipy.stats.spearmanr(row, np.arange(12)).statistic for row in predicted]
    assert vlmrm.value_order_correlation(predicted) == pytest.approx(expected)
    arrays, results = golden_arrays("metrics"), GOLDEN["metrics"]["results"]
    for key, name in (("v", "voc"), ("v_ties", "voc_with_ties")):
        assert vlmrm.value_order_correlation(arrays[key].numpy()) == pytest.approx(results[name])

def test_ranking_accuracy_by_hand():
    """Rewards 0 1 2, predicted 0 2 2: pairs (0,1) right, (0,2) right, (1,2) a tie, 1/2: 2.5 of 3.
    With a threshold of 1 only (0,2) is left: 1 of 1. Of equal rewards there is no pair: NaN.
    Successes that end at .9 and .4, failures at .4 and .1: (1 + 1 + 1/2 + 1) / 4."""
    predicted, truth = np.array([[0.0, 2, 2]]), np.array([[0.0, 1, 2]])
    assert vlmrm.ranking_accuracy(predicted, truth) == pytest.approx(2.5 / 3)
    assert vlmrm.ranking_accuracy(predicted, truth, threshold=1.0) == 1
    assert math.isnan(vlmrm.ranking_accuracy(predicted, truth * 0))
    ends, success = np.array([[0.9, 0.4, 0.4, 0.1]]).T, np.array([[True, True, False, False]]).T
    assert vlmrm.ranking_accuracy(ends, success, "across") == 3.5 / 4
    clock, truth = np.tile(np.arange(9.0), (4, 1)), np.sort(ROWS[1], axis=1)
    assert [vlmrm.ranking_accuracy(clock, truth, p) for p in ("same_time", "within")] == [0.5, 1]

@pytest.mark.parametrize("pairs", ["within", "across", "same_time"])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_ranking_accuracy_is_the_double_loop(T, pairs):
    """Over (i, a), frame a of episode i, and every worse (j, b); with ties in both rewards."""
    rng, points = np.random.default_rng(T), []
    p, r = rng.integers(0, 5, (4, T)).astype(float), rng.integers(0, 40, (4, T)) / 9
    for i, a, j, b in np.ndindex(4, T, 4, T):
        counts = {"within": i == j, "across": i != j, "same_time": i != j and a == b}[pairs]
        if counts and r[i, a] - r[j, b] > 0.1:
            points.append(1 if p[i, a] > p[j, b] else 0.5 if p[i, a] == p[j, b] else 0)
    assert vlmrm.ranking_accuracy(np.float32(p), np.float32(r), pairs) == pytest.approx(
        np.mean(points) if points else math.nan, nan_ok=True)

@pytest.mark.parametrize("seed", range(20))
def test_metrics_ignore_increasing_maps_and_flip(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, 30, (4, 7)) * 10.0 ** rng.integers(-3, 4), rng.random((4, 7))
    for metric in (lambda p: vlmrm.value_order_correlation(p).mean(), *(
            lambda p, pairs=pairs: 2 * vlmrm.ranking_accuracy(p, truth, pairs) - 1
            for pairs in ("within", "across", "same_time"))):
        found = metric(predicted)
        assert -1 <= found <= 1 and found == pytest.approx(-metric(-predicted))
        assert found == pytest.approx(metric(np.cbrt(predicted) + 3))

def test_reading_metrics_by_hand():
    """Two experts under three instructions, the first their own, the third its opposite, and three
    paraphrases. By the ends, the own one is first of all for expert 0; to expert 1 another is as
    good, which is no first place. VOC under the own sentence is 1 and 1, under the opposite -1 and
    1; under the paraphrases 1 and -1, 1 and 1, 0 and 0."""
    rise, fall, flat = np.arange(3.0), -np.arange(3.0), np.ones(3)
    under = np.array([[rise, rise], [flat, 2 * flat], [fall, rise - 9],
                      [rise, fall], [rise, rise], [flat, flat]])
    assert vlmrm.reading_metrics(under, own=0, opposite=2) == pytest.approx({
        "voc": 1, "retrieval_top1": 1 / 2, "opposite_gap": 1,
        "voc_paraphrase": (1 - 1 + 1 + 1 + 0 + 0) / 6})
    alone = vlmrm.reading_metrics(under[[0, -3, -2, -1]], own=0, opposite=0)  # nothing to prefer
    assert math.isnan(alone["retrieval_top1"]) and math.isnan(alone["opposite_gap"])

def test_average_over_tasks_by_hand():
    """Half of eight unseen tasks score 0, half 1. Eight drawn again have k ones with probability
    C(8, k) / 256: k < 1 .4 %, k < 2 3.5 %, so the interval of 95 % is 1/8 to 7/8. One task is its
    own interval, and a task without the metric does not count."""
    tasks = {task: {"voc": k % 2} for k, task in enumerate(vlmrm.UNSEEN_TASKS[:8])} | {
        "reach-v3": {"voc": 0.3}, "push-v3": {}}
    report = vlmrm.average_over_tasks(tasks)
    for group, expected in (("unseen", (0.5, 8, 1 / 8, 7 / 8)), ("seen", (0.3, 1, 0.3, 0.3))):
        found = report[group].pop("voc")
        assert (found["value"], found["tasks"], *found["interval"]) == pytest.approx(expected)
    assert report == {"seen": {}, "unseen": {}, "tasks": tasks}

def test_epic_by_hand_and_golden():
    """Predictions that follow the rewards in a line: 0; against them: 1; constant: sqrt(1/2).
    Official EPIC of state rewards, uniform distribution, gamma .99: one frame a state."""
    predicted, truth = ROWS
    assert study.epic_distance(3 * truth + 7, truth) == pytest.approx(0, abs=1e-7)
    assert study.epic_distance(-truth, truth) == pytest.approx(1)
    assert study.epic_distance(np.full((4, 9), 0.3), truth) == pytest.approx(0.5**0.5)
    pearson = scipy.stats.pearsonr(predicted.ravel(), truth.ravel()).statistic
    assert study.epic_distance(predicted, truth) == pytest.approx(((1 - pearson) / 2)**0.5)
    a, b = (golden_arrays("epic")[key].numpy()[:, None] for key in ("va", "vb"))
    assert study.epic_distance(a, b) == pytest.approx(
        GOLDEN["epic"]["results"]["epic_uniform_state_rewards"])

def test_goal_image_reward_by_hand():
    """Experts end at e0 and e1, a failure at -e1; all start at e0. Goals are the ends of the other
    experts."""
    frames, away = torch.stack([torch.stack([E0, end]) for end in (E0, E1, -E1)]), -(2**0.5)
    np.testing.assert_allclose(study.goal_image_reward(frames, np.array([True, True, False])), [
        [away, away],                            # goal e1
        [0, away],                               # goal e0
        [away / 2, (away - 2) / 2]], atol=1e-6)  # goals e0 and e1

# -----------------------------------------------------------------------------
# Data: the shipped file, and a tiny one made here

SHIPPED = vlmrm.Dataset(HERE / "data" / "metaworld.npz")
SENTENCES = vlmrm.load_instructions(HERE / "data" / "instructions.json")

def test_shipped_data_is_what_the_protocol_asks_for():
    data, texts = SHIPPED, [e["instruction"] for e in SENTENCES.values()]
    assert data.path.stat().st_size < 30e6 and data.frames(0).shape == (24, 96, 96, 3)
    assert set(data.task) == set(SENTENCES) and len(SENTENCES) == 50
    assert not set(data.task[data.split != "test"]) & set(vlmrm.UNSEEN_TASKS)
    assert set(data.source[data.split == "train"]) == {"expert"}
    for task in SENTENCES:
        assert len(data.select(task=task, source="expert")) == 14
        assert len(data.select(task=task, source="mixed")) == 6
        assert len(set(data.seed[data.task == task])) == 20  # no episode in two splits
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert 0 <= data.rewards.min() and data.rewards.max() <= 10.01
    assert len({*texts, *itertools.chain(*(e["paraphrases"] for e in SENTENCES.values()))}) == 200
    opposites = {task: e["opposite"] for task, e in SENTENCES.items() if "opposite" in e}
    assert len(opposites) == 18 and all(opposites[opposites[task]] == task for task in opposites)

def test_splits():
    """Of 14 experts 9, 2 and 3, of six mixed episodes none, 2 and 4; of an unseen task all."""
    for task, expected in (("reach-v3", "t" * 9 + "vveee" + "vveeee"), ("door-open-v3", "e" * 20)):
        episodes = vlmrm.assign_splits([
            {"task": task, "source": "expert" if k < 14 else "mixed"} for k in range(20)])
        names = {"train": "t", "validation": "v", "test": "e"}
        assert "".join(names[episode["split"]] for episode in episodes) == expected

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
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    vlmrm.write_dataset(path, [episode for task in COLORS for episode in vlmrm.assign_splits(
        [toy_episode(task, seed) for seed in range(8)]
        + [toy_episode(task, seed, "mixed") for seed in range(100, 106)])])
    return vlmrm.Dataset(path)

def test_frames_survive_packing(tmp_path):
    """A slope of grey that brightens from frame to frame."""
    t, y, x, _ = np.indices((6, 64, 64, 3))
    frames = (3 * x + 5 * t + y % 2).astype(np.uint8)
    episode = toy_episode("reach-v3", 0, T=6, size=64) | {
        "strip": vlmrm.encode_frames(frames), "split": "test"}
    for name in ("one.npz", "again.npz"):
        vlmrm.write_dataset(tmp_path / name, [episode])
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    data = vlmrm.Dataset(tmp_path / "one.npz")
    assert np.abs(data.frames(0).astype(int) - frames).mean() < 4
    assert (data.load([0, 0]) == np.stack([data.frames(0)] * 2)).all()
    assert all((getattr(data, name)[0] == episode[name]).all() for name in ("rewards", "steps"))

TEST = toy_episode("reach-v3", 0) | {"split": "test"}

@pytest.mark.parametrize("episodes, error, says", [
    ([{key: value for key, value in TEST.items() if key != "split"}], KeyError, "split"),
    ([{key: TEST[key] for key in vlmrm.EPISODE}], KeyError, "strip"),
    ([TEST, toy_episode("reach-v3", 0, T=11) | {"split": "test"}], ValueError, "inhomogeneous"),
    ([], vlmrm.InputError, "unpack"), ([TEST | {"task": None}], vlmrm.InputError, "pickle"),
    ([TEST | {"split": "exam"}], vlmrm.InputError, "unknown split"),
    ([TEST | {"strip": toy_episode("reach-v3", 0, size=48)["strip"]}, TEST], vlmrm.InputError,
     "not every strip has 10 square pictures of 48")])
def test_episodes_that_make_no_data_set(tmp_path, episodes, error, says):
    """A field that is missing is the caller's mistake, and shown as one. Nothing is left behind."""
    with pytest.raises(error, match=says):
        vlmrm.write_dataset(tmp_path / "x.npz", episodes)
    assert not list(tmp_path.iterdir())

def test_batch_is_ordered_and_of_training_experts_of_different_seen_tasks(toy):
    """Not even a split that says otherwise makes it train on an unseen task."""
    data, episodes = vlmrm.Dataset(toy.path), vlmrm.training_episodes(toy, 3)
    data.split = np.full_like(toy.split, "train")
    assert set(episodes) == set(vlmrm.training_episodes(data, 3)) == set(list(COLORS)[:3])
    for seed in range(50):
        chosen, frame_ids = vlmrm.sample_batch(episodes, 10, np.random.default_rng(seed), batch=2)
        assert len(set(toy.task[chosen])) == 2 and set(toy.split[chosen]) == {"train"}
        assert set(toy.source[chosen]) == {"expert"} and frame_ids.shape == (2, 5)
        assert (np.diff(frame_ids, axis=1) > 0).all() and frame_ids.max() < 10
        assert (frame_ids[:, 2] == frame_ids[:, 1] + 1).all()
        assert (frame_ids[:, 0] < 2).all() and (frame_ids[:, 4] >= 8).all()

@pytest.mark.parametrize("change, says", [
    (lambda a: a.pop("steps"), "steps"), (lambda a: a.pop("offsets"), "offsets"),
    (lambda a: a.update(rewards=a["rewards"].astype(int)), "rewards is int64"),
    (lambda a: a.update(success=a["success"][:, :3]), "success is bool"),
    (lambda a: a["rewards"].__setitem__((0, 0), np.nan), "not finite"),
    (lambda a: a.update({key: a[key][:, :4] for key in ("rewards", "success", "steps")}), "fewer"),
    (lambda a: a.update(task=a["task"].astype(object)), "allow_pickle"),
    (lambda a: a.update(strips=a["strips"][:-1]), "OSError"),
    (lambda a: a["offsets"].__setitem__(3, a["offsets"][3] + 1), "cannot identify image"),
    (lambda a: a.update({key: a[key][:0] for key in a.keys() - {"offsets", "strips"}},
                        offsets=a["offsets"][:1], strips=a["strips"][:0]), "IndexError")])
def test_data_that_is_not_what_it_should_be_is_refused(toy, tmp_path, change, says):
    arrays = {name: array.copy() for name, array in np.load(toy.path).items()}
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(vlmrm.InputError, match="bad.npz.*" + re.escape(says)):
        vlmrm.Dataset(tmp_path / "bad.npz")

def test_damaged_data_are_refused(toy, tmp_path):
    """Cut short anywhere, or with one bit of it changed, whatever that breaks: zip's checksums
    tell, but for bits that mean nothing."""
    whole, bad, refused = toy.path.read_bytes(), tmp_path / "bad.npz", []
    for place in np.random.default_rng(0).integers(0, len(whole), 50):
        bit = bytes([whole[place] ^ 1 << place % 8])
        for content in (whole[:place], whole[:place] + bit + whole[place + 1:]):
            bad.write_bytes(content)
            try:
                vlmrm.Dataset(bad)
            except vlmrm.InputError:
                refused.append(content)
    assert len(refused) > 80

@pytest.mark.parametrize("text, says", [
    ("{", "JSONDecodeError"), ("[1]", "TypeError"), ('{"a": {}}', "KeyError"),
    ('{"a": {"instruction": "b", "paraphrases": ["c"]}}', "three paraphrases"),
    ('{"a": {"instruction": "b", "paraphrases": ["c", "d", "e"], "opposite": "x"}}', "opposite")])
def test_instructions_that_are_not_what_they_should_be(tmp_path, text, says):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(vlmrm.InputError, match="bad.json.*" + says):
        vlmrm.load_instructions(tmp_path / "bad.json")

# -----------------------------------------------------------------------------
# vlmrm.py alone in a folder, with its three data files

def command(*arguments, cwd, script="vlmrm.py"):
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        timeout=300, env=os.environ | {"PYTHONPATH": ""})
    return result.returncode, result.stdout, result.stderr

def torchrun(processes, script, *arguments, cwd):
    return command("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                   script, *arguments, cwd=cwd, script="-m")

TABLE = list(itertools.product(("voc", "ranking_accuracy_same_time"), ("seen", "unseen")))

def kept_in(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())

def began_at(printed):
    """The steps at which the progress bars of training began: "2/4" for a run that goes on."""
    return re.findall(r"training:[^\r\n]*\| (\d+/\d+) \[00:00<\?", printed)

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

def test_help_names_the_objectives_of_the_registry(monkeypatch, capsys):
    monkeypatch.setitem(vlmrm.OBJECTIVES, "newcomer", ("triplet_loss", 1e-3, {}))
    with pytest.raises(SystemExit, match="0"):
        vlmrm.parse_arguments(["--help"])
    printed = "".join(capsys.readouterr().out.split())  # a line may break anywhere
    assert f"{','.join(vlmrm.OBJECTIVES)},orafile" in printed

def test_alone_several_objectives_are_compared(alone):
    """One table, mean ± std over the seeds, in the order asked for, and a picture."""
    names, runs = ("zeroshot", "triplet"), alone / "runs"
    status, printed, error = command(
        "--objective", *names, "--seeds", 2, "--steps", 2, "--batch", 3, cwd=alone)
    assert status == 0, error
    assert set(os.listdir(runs)) == {
        "table.md", "comparison.png", *(f"{name}-seed{seed}" for name in names for seed in (0, 1))}
    assert (runs / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (runs / "table.md").read_text(encoding="utf-8")
    assert table in printed
    for name, line in zip(names, table.splitlines()[2:], strict=True):
        first, second = (kept_in(runs / f"{name}-seed{seed}") for seed in (0, 1))
        cells = [name]
        for metric, group in TABLE:
            a, b = (report[group][metric]["value"] for report in (first, second))
            # Of two numbers the mean is half the sum, the sample's std the difference over sqrt 2.
            cells.append(f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}")
        assert line == f"| {' | '.join(cells)} |"

KILLED = """if True:
    import os, vlmrm
    save = vlmrm.save_checkpoint
    vlmrm.save_checkpoint = lambda *arguments: [save(*arguments), os._exit(9)]
    vlmrm.main("--steps 3 --batch 2 --runs killed --device cpu".split())
    """
RESUMED = """if True:
    from vlmrm import triplet_loss
    import torch, vlmrm
    print("loss", triplet_loss(torch.eye(5)[None], torch.eye(5)[:1], None).item())
    for runs in ("whole", "again"):
        assert vlmrm.main(f"--steps 3 --batch 2 --runs {runs} --device cpu".split()) == 0
    assert vlmrm.main(["--resume", "killed/triplet-seed0"]) == 0
    assert vlmrm.main(["--score", "clip.png", "--instruction", "close the drawer",
                       "--model", "killed/triplet-seed0"]) == 0
    """

def test_alone_it_is_imported_killed_resumed_and_asked_for_a_score(alone, toy):
    """A killed run goes on by --resume and, in a copy, by the same command: the weights are those
    of a run that was never stopped, to the byte."""
    Image.fromarray(toy.frames(0)[0]).save(alone / "clip.png")
    (alone / "killed.py").write_text(KILLED)
    (alone / "resumed.py").write_text(RESUMED)
    assert command(cwd=alone, script="killed.py")[0] == 9
    shutil.copytree(alone / "killed", alone / "again")
    status, printed, error = command(cwd=alone, script="resumed.py")
    assert status == 0, error
    # Rewards 1 0 0 0 0: the first frame leads the four others by 1, six pairs are level.
    assert float(printed.split()[1]) == pytest.approx((4 * 1.1 + 6 * 0.1) / 10)
    assert "frame     0   reward" in printed
    assert (alone / "clip.png-triplet-seed0-close-the-drawer.png").exists()
    assert began_at(error) == ["0/3", "1/3", "1/3"]
    assert len({(alone / runs / "triplet-seed0" / "model.safetensors").read_bytes()
                for runs in ("whole", "again", "killed")}) == 1

MANY = """if True:
    import sys, torch, vlmrm
    import torch.nn.functional as F
    torch.distributed.init_process_group()
    torch.set_default_dtype(torch.float64)  # of float32's rounding AdamW makes steps of 1e-5
    vlmrm.RewardModel.encode = lambda self, tower, x: F.normalize(
        tower(x.double() if x.is_floating_point() else x), dim=-1)
    rank, world = vlmrm.RANK, vlmrm.WORLD
    data = vlmrm.Dataset("data/metaworld.npz")
    sentences = vlmrm.load_instructions("data/instructions.json")
    torch.manual_seed(0)  # in every process the same batch
    batch = torch.randn(6, 5, 16), torch.randn(6, 16)
    alone, many = (1, 0), (world, rank)

    def gradient(loss, own, gather):
        weights = [torch.eye(16, requires_grad=True) for _ in batch]
        frames, texts = (gather(F.normalize(x[own] @ weight, dim=-1))
                         for x, weight in zip(batch, weights))
        before = {"before": [x.detach().roll(1, -1) for x in (frames, texts)]}
        times = torch.linspace(0, 1, 5).expand(len(texts), 5)
        loss(frames, texts, times, **before if vlmrm.takes_before(loss) else {}).backward()
        return torch.cat([weight.grad for weight in weights if weight.grad is not None])

    def trained(loss):
        torch.manual_seed(0)
        model = vlmrm.build_backbone("tiny", "none")
        vlmrm.train(model, data, sentences, loss, {
            "steps": 2, "batch": world, "learning_rate": 1e-3, "seed": 0})
        return torch.cat([weight.flatten() for weight in model.state_dict().values()])

    for name in sys.argv[1:]:
        loss = vlmrm.get_objective(name)["loss"]
        own = slice(rank * 6 // world, (rank + 1) * 6 // world)
        one = gradient(loss, slice(6), lambda x: x)
        gathered, local = gradient(loss, own, vlmrm.gather), gradient(loss, own, lambda x: x)
        torch.distributed.all_reduce(gathered), torch.distributed.all_reduce(local)
        far = lambda other: ((one - other).norm() / one.norm()).item()
        weights = []
        for vlmrm.WORLD, vlmrm.RANK in alone, many:
            weights.append(trained(loss))
        if not rank:
            print(name, far(gathered), far(gathered / world), far(local / world),
                  (weights[0] - weights[1]).abs().max().item())
    """

@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_do_what_one_does(alone, processes):
    """For every loss: the gradient of one process, and its weights after two steps. The wrong ways:
    a mean for the sum, and a loss of one's own slice, which is right only where no video is held
    against another."""
    (alone / "many.py").write_text(MANY)
    status, printed, error = torchrun(
        processes, "many.py", *(ZOO.get(name, name) for name in LOSSES), cwd=alone)
    assert status == 0, error
    for name, line in zip(LOSSES, printed.splitlines(), strict=True):
        exact, averaged, local, apart = map(float, line.split()[1:])
        assert exact < 1e-12 and averaged == pytest.approx(1 - 1 / processes), name
        assert (local > 0.01) == (name not in ALONE), (name, local)
        assert apart < 1e-9, name

KILLED2 = """if True:
    import os, vlmrm
    loss, steps = vlmrm.triplet_loss, []

    def last(*batch, **options):  # the second process dies in the second step
        steps.append(1)
        if vlmrm.RANK and len(steps) == 2:
            os._exit(9)
        return loss(*batch, **options)

    vlmrm.triplet_loss = last
    vlmrm.main("--steps 3 --batch 2 --runs two --device cpu".split())
    """
ALONE = ("triplet", "preference", "preference-oracle", "timerewarder", "hop")

def test_many_processes_stop_and_go_on(alone):
    """A killed process ends the other, Ctrl-C ends both: nothing is half-written, and the same
    command goes on. What cannot be dealt out is refused in a line."""
    (alone / "killed2.py").write_text(KILLED2)
    assert torchrun(2, "killed2.py", cwd=alone)[0] != 0
    options, folder = "--steps 3 --batch 2 --device cpu --runs two".split(), alone / "two"
    assert {path.name for path in folder.rglob("*.*")} == {"config.json", "checkpoint.safetensors"}
    with subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "vlmrm.py", *options, "--seed", "1", "--steps", "60"], cwd=alone, text=True,
            stderr=subprocess.PIPE, start_new_session=True) as process:
        while not (folder / "triplet-seed1" / "checkpoint.safetensors").exists():
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert "vlmrm: stopped; the same command goes on" in process.stderr.read()
    assert process.returncode != 0 and not list(folder.rglob("*.unfinished"))
    status, printed, error = torchrun(2, "vlmrm.py", *options, cwd=alone)
    assert status == 0 and began_at(error) == ["1/3"], error
    assert printed.count("ranking accuracy within") == 1
    assert kept_in(folder / "triplet-seed0")["tasks"].keys() == {*COLORS}
    for value, why in ((3, "2 processes want equal parts"), ("many", "invalid int value")):
        error = torchrun(2, "vlmrm.py", "--batch", value, cwd=alone)[2]
        assert error.count("vlmrm: ") == 1 and why in error

def collect(path, tasks, **options):
    """Collect tasks here, one after the other."""
    options = vars(vlmrm.parse_arguments(["--collect"])) | options
    vlmrm.write_dataset(path, [episode for task in tasks
                               for episode in vlmrm.collect_task(options | {"task": task})])
    return vlmrm.Dataset(path)

def test_collection(tmp_path, capsys):
    """The command line writes what is written here without its two processes: experts that succeed,
    frames in order. And the first episode of a shipped task, made anew, has the same rewards, and
    pictures that differ by no more than packing and another GL library may cost."""
    pytest.importorskip("metaworld", reason="metaworld needs Python 3.10 to 3.13")
    status = vlmrm.main([
        *"--collect --tasks reach-v3 drawer-close-v3 --expert 1 --mixed 1 --size 48".split(),
        *"--frames 8 --workers 2 --data".split(), str(tmp_path / "new" / "two.npz")])
    printed, error = capsys.readouterr()
    if "cannot render" in error:
        pytest.skip(error)
    assert status == 0 and "wrote 4 episodes of 2 tasks" in printed
    assert os.listdir(tmp_path / "new") == ["two.npz"]
    data = collect(tmp_path / "two.npz", ("reach-v3", "drawer-close-v3"), expert=1, mixed=1,
                   size=48, frames=8)
    assert data.path.read_bytes() == (tmp_path / "new" / "two.npz").read_bytes()
    assert list(data.source) == ["expert", "mixed"] * 2
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert (np.diff(data.steps, axis=1) > 0).all()
    assert (data.steps[data.source == "mixed", -1] == 149).all()
    assert data.frames(0).shape == (8, 48, 48, 3)
    assert np.ptp(data.frames(0).astype(int), axis=0).max() > 50  # something moves
    again = collect(tmp_path / "again.npz", ["drawer-open-v3"], expert=1, mixed=0)
    first, second = SHIPPED.select(task="drawer-open-v3")[:2]
    np.testing.assert_allclose(again.rewards[0], SHIPPED.rewards[first], atol=1e-3)
    assert (again.steps[0] == SHIPPED.steps[first]).all()
    same, other = (np.abs(again.frames(0).astype(int) - SHIPPED.frames(episode)).mean()
                   for episode in (first, second))
    assert same < 2 < other

# -----------------------------------------------------------------------------
# Backbone

@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return vlmrm.build_backbone("tiny", "none").eval()

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)

def test_embeddings_are_unit_vectors_and_score_is_their_cosine(tiny):
    """Also in more chunks than one: 2 x 123 frames, which are these three by turns."""
    with torch.inference_mode():
        embedded = tiny.embed_frames(FRAMES)
        many = tiny.embed_frames(np.stack([np.tile(FRAMES, (41, 1, 1, 1))] * 2))
        cosines = vlmrm.cosine(embedded, tiny.embed_texts(["open the drawer"]))
    assert embedded.shape == (3, 128) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(many, embedded.repeat(2, 41, 1), atol=1e-5, rtol=0)
    rewards = tiny.score(FRAMES, "open the drawer")
    assert rewards.shape == (3,) and rewards.dtype == np.float32
    assert rewards == pytest.approx(cosines.numpy(), abs=1e-5)
    large = FRAMES.repeat(5, axis=1).repeat(4, axis=2)  # 200 x 224; Pillow averages too
    small = [np.asarray(Image.fromarray(frame).resize((96, 96), 2)) for frame in large]
    assert tiny.score(large, "push") == pytest.approx(tiny.score(np.stack(small), "push"), abs=1e-3)
    for sentence in ("żółć 🦾", "%s {} \\", "<script>", "推"):
        assert np.isfinite(tiny.score(FRAMES[:, :7, :9], sentence)).all()

def test_tiny_tokenizer_is_clips_with_fewer_merges():
    tokens = vlmrm.tiny_tokenizer()(["open the drawer"])[0]
    assert tokens[0] == 4094 and tokens.max() == 4095 and (tokens == 4095).sum() == 1
    inner = tokens[1:tokens.argmax()].tolist()
    assert open_clip.SimpleTokenizer().decode(inner).strip() == "open the drawer"

def test_a_thumbnail_in_place_of_the_vision_tower():
    """It sees the means of 8 x 8 blocks of the 96 x 96 pixels, and nothing else."""
    torch.manual_seed(0)
    model = vlmrm.build_backbone("thumbnail", None).eval()
    large = FRAMES.repeat(12, axis=1).repeat(12, axis=2)[:, :96, :96]
    shuffled = large.reshape(-1, 12, 8, 12, 8, 3)[:, :, ::-1, :, ::-1].reshape(large.shape)
    rewards = model.score(large, "open the drawer")
    assert (large != shuffled).any() and np.ptp(rewards) > 0.01
    assert model.score(shuffled, "open the drawer") == pytest.approx(rewards, abs=1e-5)

def test_score_refuses_what_are_no_frames(tiny):
    for shape, kind in (((2, 8, 8), "uint8"), ((2, 8, 8, 4), "uint8"), ((0, 8, 8, 3), "uint8"),
                        ((8, 8, 3), "uint8"), ((2, 8, 8, 3), "float64")):
        with pytest.raises(vlmrm.InputError, match=re.escape(f"{kind} {shape}")):
            tiny.score(np.zeros(shape, kind), "open the drawer")

@pytest.mark.parametrize("sentence", [
    "", " \n", None, "push \0", "push " * 23, "push \ud800", "<start_of_text> push",
    "push <END_OF_TEXT>", "push &lt;end_of_text&gt;", "push ＜end_of_text＞"])
def test_score_refuses_what_is_no_sentence_or_too_long(tiny, sentence):
    with pytest.raises(vlmrm.InputError, match="no sentence|own marks|word pieces"):
        tiny.score(FRAMES, sentence)

def test_lora_starts_at_the_model_and_trains_only_itself(tiny):
    before = tiny.score(FRAMES, "open the drawer")
    vlmrm.add_lora(tiny, rank=2)
    assert tiny.score(FRAMES, "open the drawer") == pytest.approx(before, abs=1e-6)
    trained = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    assert all(".0.A" in name or ".0.B" in name for name in trained)
    assert any("visual" not in name for name in trained)
    packed = next(name for name in trained if re.search(r"visual.*in_proj_weight\.0\.B", name))
    with torch.no_grad():
        trained[packed].normal_()
    assert np.abs(tiny.score(FRAMES, "open the drawer") - before).max() > 1e-3
    layer = tiny.get_submodule(packed.split(".parametrizations")[0])
    part = layer.parametrizations.in_proj_weight
    torch.testing.assert_close(layer.in_proj_weight, part.original + part[0].B @ part[0].A)

def test_weights_survive_saving_and_misfits_are_refused(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights := vlmrm.trained_weights(tiny), path)
    other = vlmrm.build_backbone("tiny", str(path)).eval()
    assert (other.score(FRAMES, "push") == tiny.score(FRAMES, "push")).all()
    for bad, says in (({name: weights[name] for name in list(weights)[1:]}, "missing"),
                      (weights | {"clip.logit_scale": torch.tensor(torch.nan)}, "not finite"),
                      (weights | {"clip.logit_scale": torch.ones(2)}, "size mismatch")):
        save_file(bad, path)
        with pytest.raises(vlmrm.InputError, match=f"(?s)cannot read .*{says}"):
            vlmrm.build_backbone("tiny", str(path))

@pytest.mark.parametrize("name, mean", [
    ("ViT-B-32-quickgelu", open_clip.OPENAI_DATASET_MEAN), ("ViT-B-16-SigLIP2", [0.5] * 3)])
def test_real_architectures_from_a_checkpoint(name, mean, toy, tmp_path, monkeypatch):
    """Checkpoints of the architectures the README recommends, with random weights, made here: they
    load, take adapters, train, are saved, loaded again and score the same. Not real are the layers,
    fewer where open_clip builds them, and SigLIP2's tokenizer, a download: it is CLIP's."""
    real = open_clip.get_model_config(name)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer(
        context_length=real["text_cfg"]["context_length"]))
    monkeypatch.setattr(open_clip, "create_model", functools.partial(
        open_clip.create_model, vision_cfg=real["vision_cfg"] | {"layers": 2},
        text_cfg=real["text_cfg"] | {"layers": 2, "vocab_size": 49408}))
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
    torch.testing.assert_close(model.mean.flatten(), 255 * torch.tensor(mean))
    log = vlmrm.train(model, toy, SENTENCES, vlmrm.triplet_loss, config)
    assert np.isfinite(log[0]["loss"])
    frame = toy.frames(0)[:1]
    rewards = model.eval().score(frame, "open the drawer")
    save_file(vlmrm.trained_weights(model), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6  # the adapters alone
    vlmrm.write_whole(tmp_path / "config.json", config)
    again = vlmrm.load_reward_model(tmp_path, device="cpu")
    assert again.score(frame, "open the drawer") == pytest.approx(rewards, abs=1e-5)
    checkpoint.write_bytes(b"other")
    with pytest.raises(vlmrm.InputError, match="adapts other weights"):
        vlmrm.load_reward_model(tmp_path, device="cpu")

# -----------------------------------------------------------------------------
# Training and evaluation

def train_toy(toy, loss, steps=80, **options):
    torch.manual_seed(0)
    model = vlmrm.build_backbone("tiny", "none")
    return model, vlmrm.train(model, toy, SENTENCES, loss, {
        "steps": steps, "batch": 3, "learning_rate": 2e-3, "seed": 0}, **options)

def test_training_learns_and_beats_the_untrained_model(toy, tiny):
    """And says in its log which share of the neighbours in time each batch had in order."""
    ordered = []

    def loss(frames, texts, times):
        rewards = (frames * texts[:, None]).sum(-1).tolist()
        ordered.append(np.mean([b > a for row in rewards for a, b in itertools.pairwise(row)]))
        return vlmrm.triplet_loss(frames, texts, times)

    trained, log = train_toy(toy, loss)
    assert [entry["ordered"] for entry in log] == pytest.approx(ordered)
    assert np.mean([entry["loss"] for entry in log[-5:]]) < 0.5 * log[0]["loss"]
    before = vlmrm.evaluate(tiny, toy, SENTENCES)["seen"]
    after = vlmrm.evaluate(trained, toy, SENTENCES)["seen"]
    assert after["voc"]["value"] > 0.8 > before["voc"]["value"] + 0.2
    assert after["ranking_accuracy_within"]["value"] > before["ranking_accuracy_within"]["value"]
    assert after["ranking_accuracy_within"]["value"] > 0.55  # by chance .5

@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_trains_with_the_constants_that_left_out_tasks_chose(toy, name):
    rate, constants = PARTS[name]["TUNED"]
    constants = {constant: values[0] for constant, values in constants.items()}
    assert study.tuned(name, study.FIRST) == ({} if name == "anchored" else {  # by a hunt
        "learning_rate": rate, "constants": constants})
    _, log = train_toy(toy, functools.partial(PARTS[name]["loss"], **constants), steps=1,
                       labels=PARTS[name]["LABELS"])
    assert np.isfinite(log[0]["loss"])

def test_a_loss_that_asks_for_what_was_before_gets_it(toy):
    """What the model was before the first step, without a gradient, all along."""
    batches = []

    def loss(frames, texts, times, before):
        batches.append(((frames, texts), before))
        return vlmrm.triplet_loss(frames, texts, times)

    train_toy(toy, loss, steps=2)
    assert not any(x.requires_grad for _, before in batches for x in before)
    torch.testing.assert_close(*batches[0])
    (_, texts), (_, texts_before) = batches[1]
    assert (texts - texts_before).abs().max() > 1e-4
    assert {tuple(text) for text in texts_before.tolist()} == {
        tuple(text) for text in batches[0][1][1].tolist()}  # three tasks: the same sentences

@pytest.mark.parametrize("loss, says", [
    (lambda frames, texts, times: frames.sum() * math.nan, "step 1: the loss is nan"),
    (lambda frames, texts, times: (frames - frames).square().sum().sqrt(), "its gradient nan"),
    (lambda frames, texts, times: frames.sum() * 0, "its gradient 0.0"),
    (lambda frames, texts, times: None, "must be one number"),
    (lambda frames, texts, times: frames.sum((1, 2)), "must be one number"),
    (lambda frames, texts, times: times.sum(), "made of the embeddings")])
def test_a_bad_loss_is_refused(toy, loss, says):
    with pytest.raises(vlmrm.InputError, match=says):
        train_toy(toy, loss)

class Oracle(vlmrm.nn.Module):
    """Stands in for a model: the embedding of a toy frame lies at an angle that its square's place
    decides, so that its cosine with the sentences of drawer-open-v3 grows with the place, and falls
    with all others: a perfect reward, or its negative."""

    def embed_frames(self, frames):
        place = (frames.max(-1) > 128).any(-2).argmax(-1) / 32  # (..., )
        angle = torch.from_numpy((1 - place) * math.pi / 2).float()
        return torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)

    def embed_texts(self, texts):
        own = SENTENCES["drawer-open-v3"]
        signs = [1 if text in (own["instruction"], *own["paraphrases"]) else -1 for text in texts]
        return torch.tensor([[sign, 0.0] for sign in signs])

@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_a_perfect_model_gets_perfect_scores(toy):
    data = vlmrm.Dataset(toy.path)  # without test experts of push-v3 there is no VOC of it: no NaN
    data.split = np.where((toy.task == "push-v3") & (toy.source == "expert"), "train", toy.split)
    no_opposite = {"push-v3": SENTENCES["push-v3"] | {"opposite": None}}
    report = vlmrm.evaluate(Oracle(), data, SENTENCES | no_opposite)
    for group, sign in (("seen", -1), ("unseen", 1)):
        found = {metric: cell["value"] for metric, cell in report[group].items()}
        assert sign * found["voc"] > 0.98 and found["voc_paraphrase"] == found["voc"]
        for pairs in ("within", "same_time", "across"):
            assert sign * (2 * found[f"ranking_accuracy_{pairs}"] - 1) > 0.9
        assert found["success_auroc"] == found["retrieval_top1"] == (sign > 0)
    assert found["opposite_gap"] == 2 * found["voc"]
    assert study.judge(Oracle(), toy, SENTENCES, ("drawer-open-v3",)) > 0.9  # the mean of both
    assert set(report["tasks"]) == set(COLORS) and "voc" not in report["tasks"]["push-v3"]
    assert [report["seen"][name]["tasks"] for name in ("voc", "ranking_accuracy_within")] == [2, 3]
    clock = vlmrm.evaluate(Oracle(), data, SENTENCES, PARTS["clock"]["reward"])
    assert clock["predicted"] == {e: [*range(10)] for e in data.select(split="test")}
    assert clock["unseen"]["voc"]["value"] == 2 * clock["seen"][TABLE[2][0]]["value"] == 1

def test_evaluation_shares_out_the_cores_and_gives_them_back(toy, tiny):
    """One task at a time with one core, three at once with three: the same rewards."""
    threads, reports = torch.get_num_threads(), []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            reports.append(vlmrm.evaluate(tiny, toy, SENTENCES))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(threads)
    one, three = (report["predicted"] for report in reports)
    assert list(one) == list(three) and reports[0]["tasks"].keys() == reports[1]["tasks"].keys()
    np.testing.assert_allclose(list(three.values()), list(one.values()), atol=1e-5)

# -----------------------------------------------------------------------------
# A run: its folder, stopping, damage; an objective in a file; --score

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

def test_run_folder(finished, toy, capsys):
    """Everything is there, printed as it is kept; --resume of what is done prints it again."""
    folder, printed = finished
    assert set(os.listdir(folder)) == {
        "model.safetensors", "config.json", "metrics.json", "curves.png"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    config, metrics = kept_in(folder, "config.json"), kept_in(folder)
    assert (config["steps"], config["seed"], config["constants"]) == (2, 1, {"margin": 0.1})
    for metric, group in TABLE:
        entry = metrics[group][metric]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(entry["value"], *entry["interval"]) in printed
    assert {int(e) for e in metrics["predicted"]} == {*toy.select(split="test")}
    assert {len(rewards) for rewards in metrics["predicted"].values()} == {10}
    assert [entry["step"] for entry in metrics["log"]] == [1, 2]
    assert (metrics["torch"], metrics["device"]) == (torch.__version__, "cpu")
    assert vlmrm.main(["--resume", str(folder)]) == 0
    assert capsys.readouterr().out == printed

@pytest.fixture
def stop(monkeypatch):
    """From when it is called: Ctrl-C when two steps of a run are saved."""
    save = vlmrm.save_checkpoint

    def save_and_stop(path, model, optimizer, log, config):
        save(path, model, optimizer, log, config)
        if len(log) == 2:
            raise KeyboardInterrupt
    return lambda: monkeypatch.setattr(vlmrm, "save_checkpoint", save_and_stop)

def contents(folder):
    """The files of a finished run, without times."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, json.loads(files.pop("metrics.json")) | {"wall_seconds": 0}

def test_a_stopped_run_goes_on_to_the_same_end(program, tmp_path, stop, capsys):
    """Ctrl-C after the second checkpoint of four: --resume and the same command both end with the
    bytes of the run that was never stopped, also if it looks back at where it began."""
    settings = "--objective", "anchored", "--lora", "2"
    assert program(*settings, runs="whole") == 0
    stop()
    for how in ("resumed", "again"):
        folder = tmp_path / how / "anchored-seed0"
        assert program(*settings, runs=how) == 130
        assert set(os.listdir(folder)) == {"config.json", "checkpoint.safetensors"}
        assert "the same command goes on" in capsys.readouterr().err
        assert (vlmrm.main(["--resume", str(folder), "--device", "cpu"]) if how == "resumed"
                else program(*settings, runs=how)) == 0
        assert began_at(capsys.readouterr().err)[0] == "2/4"
        assert contents(folder) == contents(tmp_path / "whole" / "anchored-seed0")
        assert os.listdir(tmp_path / how) == ["anchored-seed0"]

def test_the_whole_comparison_on_another_backbone(program, tmp_path, stop, capsys):
    """One command, with a checkpoint of random weights; stopped once in every run that trains, and
    given again each time."""
    (tmp_path / "small.json").write_text(json.dumps({
        "embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8,
                                        "head_width": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1}}))
    open_clip.add_model_config(tmp_path / "small.json")
    weights = tmp_path / "small.safetensors"
    save_file(open_clip.create_model("small").state_dict(), weights)
    stop()
    for stops in itertools.count():
        status = program("--objective", "all", "--seeds", 2, "--backbone", "small", "--pretrained",
                         weights, "--lora", 8, "--learning-rate", 1e-4)
        if status != 130:
            break
    assert (status, stops) == (0, 2 * 6)
    table = capsys.readouterr().out.partition("| mean ±")[2]
    assert [line.split()[1] for line in table.splitlines()[2:9]] == [*vlmrm.OBJECTIVES]

def test_what_is_not_the_same_run_any_more_is_not_resumed(program, toy, tmp_path, stop, capsys):
    """A checkpoint with less in it, cut short, or of another run; another data file; other steps in
    config.json, and a config.json that is none."""
    shutil.copy(toy.path, data := tmp_path / "own.npz")
    stop()
    for seed in (0, 1):
        assert program("--data", data, "--seed", seed) == 130
    capsys.readouterr()
    folder, other = (tmp_path / "runs" / f"triplet-seed{seed}" for seed in (0, 1))
    own, settings = folder / "checkpoint.safetensors", folder / "config.json"
    arrays = dict(np.load(data))
    np.savez(changed := io.BytesIO(), **arrays | {"seed": arrays["seed"] + 1})
    with safe_open(own, "pt") as file:
        header, tensors = file.metadata(), load_file(own)
    for file, content, says in (
            *((own, save({name: x for name, x in tensors.items() if name != lost}, header),
              f"cannot read {own}") for lost in ("generator", min(n for n in tensors if " " in n))),
            (own, own.read_bytes()[:5000], f"cannot read {own}"),
            (own, (other / own.name).read_bytes(), "it belongs to another run"),
            (data, changed.getvalue(), "files that this run was started with have changed"),
            (settings, settings.read_bytes().replace(b'"steps": 4', b'"steps": 3'), "cannot read"),
            (settings, b"{", f"cannot read {settings}"),
            (settings, b'{"seed": 0}', f"cannot read {settings}")):
        before = file.read_bytes()
        file.write_bytes(content)
        assert vlmrm.main(["--resume", str(folder)]) == 2
        one_line(capsys, says)
        file.write_bytes(before)

@pytest.mark.parametrize("writes", [0, 5])
def test_a_full_disk_ends_in_one_line(program, tmp_path, monkeypatch, capsys, writes):
    """The disk is full after so many files: one line, whole files only, the same command goes on
    in the same folder. Of the eight files, the first is config.json, the next four checkpoints."""
    replace, left = os.replace, iter(range(writes))

    def full(*names):
        if next(left, None) is None:
            raise OSError("No space left on device")
        replace(*names)

    monkeypatch.setattr(os, "replace", full)
    assert program() == 2
    one_line(capsys, "No space left")
    folder = tmp_path / "runs" / "triplet-seed0"
    assert not (folder / "metrics.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    assert program() == 0
    assert began_at(capsys.readouterr().err)[0] == ("4/4" if writes == 5 else "0/4")
    assert os.listdir(tmp_path / "runs") == ["triplet-seed0"] and len(os.listdir(folder)) == 4

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
    first, second = tmp_path / "runs" / "own-seed0", tmp_path / "runs" / "own-seed0-2"
    assert all(1 <= entry["loss"] <= 1.5 for entry in kept_in(first)["log"])
    own.write_text(OWN)
    for _ in range(2):  # the second time it is done
        assert program("--objective", own) == 0
    assert set((tmp_path / "runs").iterdir()) == {first, second}
    config, other = kept_in(first, "config.json"), kept_in(second, "config.json")
    assert (config["learning_rate"], config["constants"]) == (1e-3, {"weight": 0.5})
    assert (other["learning_rate"], other["constants"]) == (2e-3, {})
    assert other["sha256"]["objective"] != config["sha256"]["objective"]

def test_a_file_with_a_reward(program, tmp_path):
    """The reward replaces the cosine: a clock, and one that also looks at sentences of its own."""
    reader, runs = tmp_path / "reader.py", tmp_path / "runs"
    reader.write_text("SENTENCES = ['a table', 'a drawer']\n"
                      "def reward(frames, text, sentences):\n"
                      "    return frames @ (text - sentences.view(2, 128)[0])\n")
    assert program("--objective", "zeroshot", ZOO["clock"], reader) == 0
    assert kept_in(runs / "clock-seed0")["unseen"]["voc"]["value"] == 1
    found, cosine = (np.array([*kept_in(runs / name)["predicted"].values()])
                     for name in ("reader-seed0", "zeroshot-seed0"))
    assert np.ptp(found) > 0 and (found != cosine).any()

def test_a_mistake_in_a_file_is_shown_and_leaves_no_folder(program, tmp_path):
    """Python's traceback: whoever writes an objective needs its line."""
    (tmp_path / "own.py").write_text("def loss(frames, texts, times): return frames @ texts")
    with pytest.raises(RuntimeError):
        program("--objective", tmp_path / "own.py")
    assert not os.listdir(tmp_path / "runs")

def test_two_files_of_one_name_are_two_rows(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "own.py").write_text(f"{OWN}# {folder}")
    assert program("--steps", "1", "--objective", "a/own.py", "b/own.py") == 0
    assert Path("runs/table.md").read_text(encoding="utf-8").count("| own |") == 2

@pytest.mark.parametrize("suffix", [".gif", ".mp4", ""])
def test_score_a_video(finished, toy, tmp_path, capsys, suffix):
    """A GIF, a film and a folder of images, a grey and a transparent one among them: the model's
    scores of what another reader finds in them. The picture is drawn beside it."""
    path = tmp_path / f"clip{suffix}"
    pictures = [Image.fromarray(frame).resize((64, 64)) for frame in toy.frames(0)]
    if suffix == "":
        path.mkdir()
        pictures[0] = pictures[0].convert("L")
        for k, picture in enumerate(pictures):  # 10.png comes after 9.png
            (picture.convert("RGBA") if k == 1 else picture).save(path / f"{k + 2}.png")
        shown = np.stack([picture.convert("RGB") for picture in pictures])
    else:
        imageio.imwrite(path, np.stack(pictures))
        shown = imageio.imread(path)
    sentence = "open the $_$ drawer 🦾"  # no formula, and a sign that the font lacks
    assert vlmrm.main(["--score", str(path), "--instruction", sentence, "--model",
                       str(finished[0]), "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    drawn = tmp_path / f"clip{suffix}-triplet-seed1-open-the-_-drawer-.png"
    assert drawn.read_bytes()[:4] == b"\x89PNG" and last.endswith(f"see {drawn}")
    model = vlmrm.load_reward_model(finished[0], device="cpu")
    rewards = np.array([model.score(frame[None], sentence)[0] for frame in shown])
    assert len(rewards) == 10
    assert [float(line.split()[-1]) for line in lines] == pytest.approx(rewards, abs=1e-4)
    assert last.startswith(f"VOC {vlmrm.value_order_correlation(rewards):.2f}")

@pytest.mark.parametrize("file, model, says", [
    ("no.mp4", "run", "no.mp4: there is no such file"),
    ("README.md", "run", "cannot read README.md"), ("golden", "run", "has no pictures"),
    ("grey.png", "golden", "cannot read golden/config.json"),
    ("grey.png", "run", "its values are uint16, not bytes"),
    ("grey.png", "vip", "not trained for the cosine"),
    ("grey.png", "clock", "not trained for the cosine")])
def test_score_refuses_in_one_line(finished, tmp_path, monkeypatch, capsys, file, model, says):
    """No film, no pictures, no model; 16 bits; a loss that reads no sentence, and a reward that is
    not the cosine."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no film")
    Path("golden").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save("grey.png")
    for name, objective in (("run", "triplet"), ("vip", "vip"), ("clock", ZOO["clock"])):
        shutil.copytree(finished[0], name)
        vlmrm.write_whole(Path(name, "config.json"), kept_in(Path(name), "config.json") | {
            "objective": objective, "constants": {}})
    assert vlmrm.main(["--score", file, "--instruction", "open", "--model", model]) == 2
    one_line(capsys, says)
    assert not list(tmp_path.glob("*-open.png"))

# -----------------------------------------------------------------------------
# Command line

@pytest.mark.parametrize("arguments, says", [
    ("--backbone ViT-B-32", "laion2b_s34b_b79k"),
    ("--backbone ViT-B-32 --pretrained nonsense", "Without a network, --pretrained takes a file"),
    ("--pretrained missing.safetensors", "missing.safetensors: there is no such file"),
    ("--data missing.npz", "missing.npz: there is no such file"),
    ("--data few.npz --batch 1", "few.npz has no experts to test on"),
    ("--data README.md", "cannot read"), ("--instructions README.md", "JSONDecodeError"),
    ("--instructions towel.json", "-v3"), ("--batch 4", "--batch 4"),
    (f"--objective {ZOO['clip']} --batch 1", "larger --batch"),
    ("--objective nothing.py", "neither loss() nor reward()"),  # not taken for the cosine
    ("--objective nan.py", "not finite"), ("--runs README.md", "README.md"),
    ("--collect --tasks drawer-opn-v3 --data x.npz", "drawer-open-v3"),
    ("--collect --data README.md", "File exists"), ("--resume nowhere", "nowhere"),
    ("--objective tripplet", "'tripplet' is not all, triplet, tcn"),
    ("--objective missing.py", "or a Python file"), ("--steps 1.5", "invalid int value"),
    ("--steps 0", "0 is not between 1 and 1000000"), ("--device tpu", "invalid choice"),
    ("--learning-rate nan", "nan is not between"), ("--collect --frames 4", "not between 5 and"),
    ("--collect --frames 200 --data x.npz", "--frames x --size is over 16383"),
    ("--score clip.mp4 --collect", "--score has no effect with --collect"),
    ("--score clip.mp4", "--score needs --instruction"),
    ("--backbone thumbnail", "--backbone thumbnail needs --lora 0"),
    ("--instruction open", "--instruction has no effect with --objective"),
    ("--score clip.mp4 --instruction open --backbone RN50", "--backbone has no effect"),
    ("--collect --learning-rate 1", "--learning-rate has no effect"),
    ("--resume runs/x --steps 3", "--steps has no effect")])
def test_bad_input_is_one_line_and_exit_code_2(program, arguments, says, capsys, monkeypatch,
                                               tmp_path):
    """Also for what would not be obeyed. Nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no data")
    Path("nothing.py").write_text("def my_loss(frames, texts, times): pass")
    Path("nan.py").write_text("def reward(frames, text): return frames @ text * float('nan')")
    vlmrm.write_whole("towel.json", {"fold-towel": {
        "instruction": "a", "paraphrases": ["b", "c", "d"]}})
    vlmrm.write_dataset(Path("few.npz"), vlmrm.assign_splits(  # too few to test on
        [toy_episode("reach-v3", seed) for seed in range(3)]))
    options = shlex.split(arguments)
    direct = options[0] in ("--collect", "--resume", "--score")  # without the toy data's options
    try:
        status = vlmrm.main(options) if direct else program(*options)
    except SystemExit as end:
        status = end.code
    assert status == 2
    one_line(capsys, says)
    assert not list(tmp_path.glob("runs/*")) and not Path("x.npz").exists()

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_during_the_imports_is_no_traceback():
    with subprocess.Popen([sys.executable, "vlmrm.py", "--data", "missing.npz"], cwd=HERE,
                          stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                              signal.SIGINT, signal.default_int_handler)) as process:
        time.sleep(1)  # the imports take about four
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT

def test_the_code_keeps_to_its_own_rules():
    """Lines of at most 100 characters, no function beyond 50 lines, every public function and class
    of vlmrm.py with a docstring; no pickle is loaded; what data/ takes from vlmrm.py exists."""
    for path in (HERE / "vlmrm.py", HERE / "test_vlmrm.py", *(HERE / "data").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert max(map(len, source.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)
        if path.name != "test_vlmrm.py":
            assert not re.search(r"import pickle|torch\.load|allow_pickle=True", source), path
        names = {*re.findall(r"\bvlmrm\.(\w+)", source)} - {"py"}
        assert not [name for name in names if not hasattr(vlmrm, name)], path
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name

# -----------------------------------------------------------------------------
# README: its commands and its Python run, on the toy data. The saved results, the scripts of data/

RESULTS = HERE / "data" / "results"
PAGES = [page.read_text(encoding="utf-8") for page in (HERE / "README.md", RESULTS / "README.md")]
COMMANDS = sorted({line.split("  #")[0].strip() for line in re.findall(
    r"python vlmrm\.py ([^`\n]*)", "\n".join(PAGES))})

@pytest.fixture(scope="module")
def reader(finished, toy, tmp_path_factory):
    """A folder as a reader of the pages has it: a trained model, films made a data set, and every
    file that they tell to write; the README's Python is run there, in the order of the page."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("runs", "films/fold-towel/failed"):
        (folder / name).mkdir(parents=True)
    (folder / "data").symlink_to(HERE / "data")
    (folder / "runs" / "triplet-seed0").symlink_to(finished[0])
    film = np.stack([np.full((32, 48, 3), 8 * k, np.uint8) for k in range(30)])
    for path in ("clip.mp4", *(f"films/fold-towel/{k}.mp4" for k in range(5)),
                 "films/fold-towel/failed/0.mp4"):
        imageio.imwrite(folder / path, film)
    (folder / "towel.json").write_text(json.dumps({"fold-towel": {
        "instruction": "fold the towel", "paraphrases": ["fold it", "halve it", "a fold"]}}))
    shutil.copy(toy.path, folder / "mine.npz")  # LeRobot's data have tests of their own
    shutil.copy(HERE / "data" / "instructions.json", folder / "mine.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        [line] = re.findall(r"^python (data/films.py.*?) +#", PAGES[0], re.MULTILINE)
        patch.setattr(sys, "argv", line.split())
        assert films.main() == 0
        for snippet in re.findall(r"```python\n(.*?)```", PAGES[0], re.DOTALL):
            if name := re.match(r"# (\w+\.py)\n", snippet):
                (folder / name[1]).write_text(snippet)
            names = {"__name__": "README"}
            try:
                exec(compile(snippet, "README.md", "exec"), names)
            except vlmrm.InputError as problem:
                assert "cannot render" in str(problem)
            assert np.isfinite(names.get("rewards", 0)).all()
            if "renderer" in names:
                assert -1 <= names["reward"] <= 1 and names["info"]["environment_reward"] >= 0
                names["renderer"].close()
    return folder

@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_run(line, reader, toy, monkeypatch, capsys):
    """With a step. What needs a download must fail for that reason."""
    monkeypatch.chdir(reader)
    arguments = shlex.split(line)
    if (args := vlmrm.parse_arguments(arguments)).collect or args.resume:
        return  # their own tests run them
    if args.pretrained not in (None, "none") and not Path(args.pretrained).exists():  # a download
        monkeypatch.setattr(open_clip, "create_model", lambda *_: 1 / 0)
        assert vlmrm.main(arguments) == 2
        return one_line(capsys, f"cannot load {args.backbone}")
    if not args.score:
        if args.objective == ["all"]:  # all of them are trained above
            monkeypatch.setattr(vlmrm, "OBJECTIVES", {
                name: vlmrm.OBJECTIVES[name] for name in ("tcn", "zeroshot")})
        arguments += ["--steps", "1", "--seeds", "1", "--device", "cpu", "--runs", "tried"]
        if not args.data.exists() or args.data.parent != Path():  # not made by the page's Python
            arguments += ["--data", str(toy.path), "--batch", "2"]
    assert vlmrm.main(arguments) == 0

def test_films_become_episodes(reader, monkeypatch, capsys):
    """Frames evenly spread, success at the end of what is no failure; what is missing in a line."""
    monkeypatch.chdir(reader)
    data = vlmrm.Dataset("towel.npz")
    assert data.source.tolist() == ["expert"] * 5 + ["mixed"]
    assert data.success.sum(1).tolist() == [1] * 5 + [0] and data.success[:5, -1].all()
    assert (data.steps == np.linspace(0, 29, 24).round()).all() and data.S == 96
    assert (np.diff(data.frames(5).mean((1, 2, 3))) > 5).all()  # the film grows lighter by 8
    (reader / "empty" / "fold-towel").mkdir(parents=True)
    (reader / "odd" / "fold-rug").mkdir(parents=True)
    for arguments, says in (("films --frames 31", "30 frames, fewer than 31"),
                            ("films --frames 4", "--frames is below 5"), ("odd", "fold-rug"),
                            ("empty", "no film of the task done"), ("none", "no folders of tasks")):
        monkeypatch.setattr(sys, "argv", [
            "films", *arguments.split(), "--sentences", "towel.json", "--out", "new.npz"])
        assert films.main() == 2
        assert says in capsys.readouterr().err and not Path("new.npz").exists()

def test_pages_show_the_saved_results():
    for name, table in report.tables(RESULTS).items():
        assert table in "".join(PAGES), f"run python data/report.py: the table {name} is old"
    runs = report.load(RESULTS)["triplet"][report.FIRST]
    for metric, group in TABLE:
        values = [run[group][metric]["value"] for run in runs]
        line = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} {group}"
        assert line in vlmrm.__doc__, f"the header of vlmrm.py should say {line}"

def test_saved_results_are_of_this_code_and_data(monkeypatch):
    """The settings of every saved run are what the program would use now."""
    monkeypatch.setattr(vlmrm, "digest", functools.cache(vlmrm.digest))
    paths, seen = study.all_objectives(), set()
    for result in json.loads((RESULTS / "results.json").read_text()):
        saved, row = result["config"], result["row"]
        if row in {"thumbnail", *paths}:  # not the other starts
            assert saved == study.reduced(study.configure(
                vlmrm.parse_arguments([f"--seed={saved['seed']}"]), result["way"], backbone=saved[
                    "backbone"], lora=saved["lora"], objective=paths.get(row, "triplet"))), row
            seen.add((row, result["way"], saved["seed"]))
    assert seen >= set(itertools.product(LOSSES, study.WAYS, range(3)))

@pytest.mark.parametrize("number, answer, expected", [(1, 0.5, False), (3, 1.0, False),
    (2, vlmrm.triplet_loss, False), (2, LOSSES["decisionnce-p"], True), (10, "clock", False),
    (11, lambda model, loss, pixels, said: loss(
        model.embed_frames(pixels), model.embed_texts(said)).backward(), False)])
def test_exercises_know_right_from_wrong(number, answer, expected):
    right, remark = getattr(exercises, f"check_{number}")(answer)
    assert right == expected and remark

def test_paired_p_values_by_hand():
    """Ten tasks, so 2^10 ways to flip signs. `a` gains on all: 2 of them lie as far out. `b` loses
    the smallest gap, `c` the second smallest: 4 and 6. Holm: 3 * 2, 2 * 4, and for `c` 1 * 6, but
    not less than for `b`. With equal scores all flips are the same: 1."""
    reference, gaps = np.linspace(0.3, 0.9, 10), np.arange(1, 11) / 100
    scores = {"triplet": reference, "a": reference + gaps}
    for name, flipped in (("b", 0), ("c", 1)):
        scores[name] = reference + np.where(np.arange(10) == flipped, -gaps, gaps)
    assert study.paired_p_values(scores, "triplet") == pytest.approx(
        {"a": 6 / 1024, "b": 8 / 1024, "c": 8 / 1024})
    assert study.paired_p_values({"a": reference, "b": reference}, "a") == {"b": 1}

class Grey(gymnasium.Env):
    """Its picture grows lighter by 40 each step, its reward is -1, and it ends after two."""
    observation_space = action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, -1.0, self.steps == 2, False, {}

    def render(self):
        return np.full((8, 8, 3), 40 * self.steps, np.uint8)

def test_the_reward_of_an_environment(tiny, monkeypatch):
    """In the place of its own; as a potential, 0 at the end; of many environments in one call."""
    monkeypatch.setattr(tiny, "score", lambda frames, text: frames.mean((1, 2, 3)))
    for options, rewards in (({}, [40, 80]), (
            {"shaping": True, "gamma": 0.5}, [-1 + 0.5 * 40 - 0, -1 + 0 - 40])):
        env = environment.wrap_environment(Grey(), tiny, "go", **options)
        env.reset()
        for expected in rewards:
            _, reward, *_, info = env.step(0)
            assert reward == expected
            assert info["original_env_rew"] == info["environment_reward"] == -1
    many = gymnasium.vector.SyncVectorEnv([Grey] * 3)
    env = environment.wrap_environment(many, tiny, "go")
    env.reset()
    _, rewards, *_, infos = env.step(np.zeros(3, int))
    assert rewards.tolist() == [40] * 3 and infos["original_env_rew"].tolist() == [-1] * 3
    with pytest.raises(vlmrm.InputError, match="not for a vector"):
        environment.wrap_environment(many, tiny, "go", shaping=True)

def test_failures_are_seen_or_not(finished, tmp_path, monkeypatch, capsys):
    """Experts end at 1, 2, 3, 4: a quarter of them below 1.75. A constant sees nothing."""
    experts, failed = np.arange(1.0, 5)[:, None] * [0, 1], np.array([[9, 1.7], [0, 1.8]])
    assert study.failures_seen(experts, failed) == 0.5
    assert study.failures_seen(np.ones((3, 2)), np.ones((2, 2))) == 0
    shutil.copytree(finished[0], folder := tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["failures", str(folder)])
    assert failures.main() == 0
    assert "a clock 0.00" in capsys.readouterr().out and (folder / "failures.png").exists()
    (folder / "metrics.json").write_text("{")
    assert failures.main() == 2 and "metrics.json" in capsys.readouterr().err

def test_weights_of_episodes_by_hand():
    """Scores of 0 and 1 are a standard deviation off either way, on any scale."""
    expected = pytest.approx(np.exp([-4, 4]))
    assert policy.weigh(np.array([0.0, 1.0])) == expected == policy.weigh(np.array([7.0, 7.5]))
    assert policy.weigh(np.full(3, 0.25)).tolist() == [1, 1, 1]

def test_a_policy_does_what_its_weights_say():
    """Half of the episodes act by one rule, half by another: each row of weights learns its own."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 40, 3))
    rules = np.stack([states[..., :1].repeat(4, -1), 0.5 - states[..., 1:2].repeat(4, -1)])
    episodes = [{"states": states[e], "actions": rules[e % 2, e].clip(-1, 1)} for e in range(6)]
    weights = np.array([[1.0, 0] * 3, [0, 1.0] * 3])
    for act, rule in zip(policy.clone(episodes, weights, {"seed": 0, "steps": 600}), rules):
        errors = [act(state) - action for state, action in zip(states[0], rule[0].clip(-1, 1))]
        assert np.abs(errors).mean() < 0.15

def test_an_episode_goes_wrong(monkeypatch):
    """From the fourth step on: then the same action ten times, another ten times."""
    def roll_out(env, actor, *_, **options):
        for k in range(20):
            actor.get_action(np.full(39, k))
        return zip(*[({}, float(k), k > 15) for k in range(20)])

    monkeypatch.setattr(vlmrm, "roll_out", roll_out)
    monkeypatch.setattr(vlmrm, "draw", lambda *_: np.zeros((2, 2, 3), np.uint8))
    stub = type("Stub", (), {"data": None, "seed": lambda *_: 0, "get_action": lambda *_: [9] * 4})
    episode = policy.record(stub(), stub(), None, 0, wrong_from=3)
    actions = np.array(episode["actions"])
    assert (actions[:3] == 1).all() and (actions[3:13] == actions[3]).all()
    assert (actions[13:] == actions[13]).all() and len(np.unique(actions[:, 0])) == 3
    assert episode["true"] == 17 and episode["done"] and len(episode["pictures"]) == 6

def test_policies_from_rewards(finished, tmp_path, monkeypatch, capsys):
    """A small study, which is not done again; then what is refused."""
    pytest.importorskip("metaworld", reason="metaworld needs Python 3.10 to 3.13")

    def run(*runs, options=""):
        monkeypatch.setattr(sys, "argv", ["policy", *map(str, runs), *(
            "--tasks drawer-close-v3 --episodes 7 --starts 2 --steps 20 --seeds 1 --out".split()),
            str(path), *options.split()])
        return policy.main(), *capsys.readouterr()

    path = tmp_path / "policy.json"
    status, printed, error = run(finished[0])
    if "cannot render" in error:
        pytest.skip(error)
    found = vlmrm.read_json(path)
    assert status == 0 and len(printed.splitlines()) == 7 and path.with_suffix(".png").exists()
    [cells] = found["jobs"].values()
    assert cells.keys() == {
        "triplet", "all alike", "the simulator's reward", "experts alone"}
    assert cells["all alike"][1] == 0.5 and 0 <= np.min([*cells.values()]) <= np.max(
        [*cells.values()]) <= 1
    monkeypatch.setattr(policy, "compare", None)  # the second time there is no work
    assert run(finished[0])[:2] == (0, printed)
    for runs, options, says in (
            (finished[:1], "--starts 3", "other runs"), (finished[:1] * 2, "", "one run"),
            ([tmp_path], "", "config.json"), (finished[:1], "--tasks fly-v3", "fly-v3")):
        status, _, error = run(*runs, options=options)
        assert status == 2 and says in error

def test_tables_of_policies_by_hand():
    """Of two seen tasks and an unseen one. The worse model finds less and is worth less; VOC says
    the opposite."""
    cells = {"all alike": 0.2, "the simulator's reward": 0.6, "a": 0.5, "b": 0.3}
    found = {"jobs": {f"{task}-v3, seed {seed}": {
        row: [won + 0.1 * seed, won] for row, won in cells.items()}
        for task in ("drawer-close", "reach", "drawer-open") for seed in (0, 2)},
        "metrics": {"a": {"reach-v3": {"voc": 0.1}}, "b": {"reach-v3": {"voc": 0.2}}}}
    lines = report.policy_table(found).splitlines()
    assert "2 seen tasks" in lines[0] and "1 unseen tasks" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| the simulator's reward", "| all alike", "| a", "| b"]
    assert lines[4] == "| a | 0.60 ± 0.14 | 0.75 | 0.60 ± 0.14 | 0.75 |"
    assert [line.split(" | ")[1] for line in report.believe_table(found).splitlines()[2:]] == [
        "1.00", "-1.00"]

def test_a_model_for_others(finished, tmp_path, monkeypatch):
    """The folder alone scores as the run does; its adapters are in the weights, no path is left."""
    monkeypatch.setattr(sys, "argv", ["hub", str(finished[0]), str(out := tmp_path / "model")])
    assert hub.main() == 0 and hub.main() == 2  # it is there already
    shutil.copytree(finished[0], vip := tmp_path / "vip")
    vlmrm.write_whole(vip / "config.json", kept_in(vip, "config.json") | {"objective": "vip"})
    with pytest.raises(vlmrm.InputError, match="not trained for the cosine"):
        hub.publish(vip, tmp_path / "other")
    (out / "try.py").write_text("\n".join((
        "import sys, vlmrm, numpy", "model = vlmrm.load_reward_model('.', 'cpu')",
        "model.low_precision = False", "rewards = model.score(numpy.load(sys.argv[1]), 'push')",
        "print(vlmrm.__file__, *rewards)")))
    np.save(tmp_path / "frames.npy", FRAMES)
    status, printed, error = command(tmp_path / "frames.npy", cwd=out, script="try.py")
    assert status == 0, error
    where, *rewards = printed.split()
    (run := vlmrm.load_reward_model(finished[0], "cpu")).low_precision = False
    assert Path(where).parent == out
    assert np.float64(rewards) == pytest.approx(run.score(FRAMES, "push"), abs=1e-5)
    assert not kept_in(out, "config.json")["lora"] and "/" not in (out / "config.json").read_text()
    card = (out / "README.md").read_text()
    value = kept_in(finished[0])["seen"]["voc"]["value"]
    assert card.startswith("---\nlicense: mit") and f"frames | {value:.2f} | " in card
    shutil.copytree(finished[0], few := tmp_path / "few")
    vlmrm.write_whole(few / "metrics.json", kept_in(few) | {"sentences": 4})
    hub.publish(few, tmp_path / "of-few")  # one of four is found by chance in a quarter of cases
    assert re.search(r"its own text \|.*\| 0\.25 \|", (tmp_path / "of-few/README.md").read_text())

def test_a_film_over_its_reward(finished, tmp_path, monkeypatch, capsys):
    """As many pictures as the film has; what is to come of the curve is pale."""
    imageio.imwrite(clip := tmp_path / "clip.gif", SHIPPED.frames(0)[:4], duration=125)
    monkeypatch.setattr(sys, "argv", ["show", str(finished[0]), str(clip), "push", "open $x$"])
    assert show.main() == 0
    frames = imageio.imread(tmp_path / "clip-reward.gif").astype(int)
    assert frames.shape == (4, 480 + 240, 480, 3)
    dark = [(frame[480:] < 200).any(-1).sum() for frame in frames]
    assert dark == sorted(dark) and dark[-1] > dark[0] + 200
    clip.write_bytes(b"GIF89a")
    assert show.main() == 2 and "clip.gif" in capsys.readouterr().err

def test_best_of_is_the_mean_over_all_draws():
    values, truth = np.random.default_rng(5).random((2, 7))
    for n in range(1, 8):
        draws = [max(draw, key=values.item) for draw in itertools.combinations(range(7), n)]
        assert exercises.best_of(values, truth, n) == pytest.approx(truth[draws].mean())

def test_captions_of_scenes_are_no_orders_and_fit():
    """Whatever is true of a scene: no sentence of a task is in its captions, nor does one begin as
    an order does; each fact that a caption states is true."""
    tokenizer, sentences = vlmrm.tiny_tokenizer(), list(itertools.chain(*(
        [entry["instruction"], *entry["paraphrases"]] for entry in SENTENCES.values())))
    for task, kind in scenes.KIND_OF.items():
        facts, rng = scenes.measures_and_facts(kind)[1], np.random.default_rng(len(task))
        for _ in range(10):
            true = rng.random(len(facts)) < 0.3
            text, said = scenes.caption(rng, facts, true, tokenizer)
            assert text.split()[0] in ("the", "a", "an", "there"), text
            assert not any(sentence.lower() in text.lower() for sentence in sentences), text
            assert true[said].all() and 1 <= len(said) <= 3 and len(tokenizer.encode(text)) <= 22

def test_contrast_by_hand():
    """Logits 1 and 0. One true caption each: log(1 + e) - 1; both: the mean with log(1 + e)."""
    for true, expected in ((np.eye(2), math.log(1 + math.e) - 1),
                           (np.ones((2, 2)), math.log(1 + math.e) - 0.5)):
        loss = scenes.contrast(torch.eye(2), torch.eye(2), torch.tensor(true), 1.0)
        assert loss.item() == pytest.approx(expected, rel=1e-6)

TOP, I, EPISODE = "observation.images.top", np.arange(26), np.repeat(range(4), (6, 7, 5, 8))
STEP, SAID = I - np.array([0, 6, 13, 18])[EPISODE], ("Go  up.", "Go  up.", "Go  up.", "open")
READ, MARK = "read {0} --out {0}.npz --sentences {0}.json --frames 5", "progress run {0}"

def lerobot_folder(folder, version="v3.0", kind="video", said=SAID, command=READ, **changes):
    """LeRobot's data: frame i of 26 is a grey of 9 i, its reward i / 2. Returns what to run."""
    for path in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{TOP}/chunk-000"):
        (folder / path).mkdir(parents=True)
    v3, frames = version == "v3.0", np.repeat(np.uint8(9 * I), 3072).reshape(26, 32, 32, 3)
    table = pyarrow.table({
        "index": I, "episode_index": EPISODE, "frame_index": STEP, "next.reward": I / 2,
        "next.success": np.isin(I, [4, 5, 11, 25]), TOP: [
            {"bytes": imageio.imwrite("<bytes>", frame, extension=".png")} for frame in frames]})
    name = ("chunk-{chunk_index:03d}/file-{file_index:03d}" if v3 else
            "chunk-{episode_chunk:03d}/episode_{episode_index:06d}")
    for e, part in enumerate([I >= 0] if v3 else [EPISODE == e for e in range(4)]):
        file = name.format(chunk_index=0, file_index=0, episode_chunk=0, episode_index=e)
        imageio.imwrite(folder / f"videos/{TOP}/{file}.mp4", frames[part], fps=10)
        pyarrow.parquet.write_table(table.filter(part).drop_columns(
            [TOP] if kind == "video" else []), folder / f"data/{file}.parquet")
    meta = {"episode_index": range(4), "length": (6, 7, 5, 8), "tasks": [[text] for text in said]}
    (folder / "meta/episodes.jsonl").write_text("\n".join(
        json.dumps(dict(zip(meta, row))) for row in zip(*meta.values())))
    pyarrow.parquet.write_table(pyarrow.table(meta | {
        f"{files}/{part}_index": [0] * 4 for files in ("data", f"videos/{TOP}")
        for part in ("chunk", "file")} | {f"videos/{TOP}/from_timestamp": [0, 0.6, 1.3, 1.8]}),
        folder / "meta/episodes/chunk-000/file-000.parquet")
    vlmrm.write_whole(folder / "meta/info.json", {
        "codebase_version": version, "fps": 10, "total_episodes": 4, "features": {
            TOP: {"dtype": kind}}, "data_path": f"data/{name}.parquet",
        "video_path": f"videos/{{video_key}}/{name}.mp4"} | changes)
    return command.format(folder).split()

@pytest.mark.parametrize("layout", ["v3.0 video", "v3.0 image", "v2.0 image", "v2.1 video"])
def test_lerobots_data_in_and_progress_out(tmp_path, tiny, monkeypatch, layout):
    """Frame i gets the reward i: experts go from 0 and 6, mean 3, to 5 and 12, or from 18 to 25."""
    lerobot_data.main(lerobot_folder(tmp_path / "a", *layout.split()))
    data, shown = vlmrm.Dataset(tmp_path / "a.npz"), np.array([
        [0, 1, 2, 4, 5], [6, 8, 9, 10, 12], range(13, 18), [18, 20, 22, 23, 25]])
    assert (data.steps == STEP[shown]).all() and (data.rewards == shown / 2).all()
    assert np.abs(data.load(range(4)).mean((2, 3, 4)) - 9 * shown).max() < 3
    assert [np.flatnonzero(row).tolist() for row in data.success] == [[3, 4], [4], [], [4]]
    assert [*zip(data.task, data.source, data.split)] == [("go-up", "expert", "train")] * 2 + [
        ("go-up", "mixed", "validation"), ("open", "expert", "train")]
    assert vlmrm.load_instructions(tmp_path / "a.json")["go-up"]["paraphrases"] == ["Go up."] * 3
    monkeypatch.setattr(vlmrm, "check_cosine", lambda run: None)
    monkeypatch.setattr(vlmrm, "load_reward_model", lambda run: tiny)
    monkeypatch.setattr(tiny, "score", lambda frames, text: frames.mean((1, 2, 3)) / 9)
    lerobot_data.main(MARK.format(tmp_path / "a").split())
    table = pyarrow.parquet.read_table(tmp_path / "a/sarm_progress.parquet")
    assert [str(column.type) for column in table.columns] == ["int64"] * 3 + ["float"]
    for name, values in (("index", I), ("episode_index", EPISODE), ("frame_index", STEP), (
            "progress_sparse", np.where(I < 18, (I - 3) / 5.5, (I - 18) / 7).clip(0, 1))):
        np.testing.assert_allclose(table[name], values, atol=0.05)

@pytest.mark.parametrize("says, damage", [
    ("ArrowInvalid", {"data_path": "meta/info.json"}), ("no such file", {"video_path": "lost"}),
    ("v1.6", {"version": "v1.6"}), ("ends before episode 2", {"fps": 20}), ("pip install", {}),
    ("5 episodes, its folder 4", {"total_episodes": 5}), ("not one sentence", {"said": " " * 4}),
    ("has a, b", {"features": {"a": {"dtype": "image"}, "b": {"dtype": "video"}}}),
    (f"has {TOP}", {"command": READ + " --camera me"}), ("between 5", {"command": READ[:-1] + "4"}),
    ("rise", {"command": MARK}), ("no expert", {"said": "abcd", "command": MARK})])
def test_lerobots_data_that_are_refused(tmp_path, tiny, monkeypatch, capsys, says, damage):
    monkeypatch.setattr(vlmrm, "check_cosine", lambda run: None)
    monkeypatch.setattr(vlmrm, "load_reward_model", lambda run: tiny)
    monkeypatch.setattr(tiny, "score", lambda frames, text: np.zeros(len(frames)))
    command = lerobot_folder(tmp_path / "a", **damage)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet if damage else None)
    with pytest.raises(SystemExit, match="2"):
        lerobot_data.main(command)
    assert says in capsys.readouterr().err.splitlines()[-1] and len([*tmp_path.iterdir()]) == 1
