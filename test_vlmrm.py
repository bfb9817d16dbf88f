"""Tests of vlmrm.py, and of what README.md tells to run. Run with: python -m pytest

Every formula is held against something that does not share its code: a value worked out by hand,
the numbers that the authors' own code returned (data/tests/golden), a library, or a loop so naive
that it cannot be wrong. The parts follow vlmrm.py; what lies in data/ has tests in data/tests.
"""
import ast
import contextlib
import functools
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # whoever imports mujoco first: it reads it once

import vlmrm  # before torch: see there

import numpy as np
import open_clip
import pytest
import scipy.stats
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "vlmrm.py").read_text(encoding="utf-8")
LOSSES = {}
for name, (loss, *_) in vlmrm.OBJECTIVES.items():
    if loss:
        LOSSES[name] = loss

def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)

# Frames, texts, and times: five frames evenly spread over each episode.
FRAMES = unit(6, 5, 8)
TEXTS = unit(6, 8, seed=1)
TIMES = torch.linspace(0, 1, 5, dtype=torch.float64).expand(6, 5)

# Losses against the authors' own code: value and gradient ---

GOLDEN = HERE / "data" / "tests" / "golden"
OFFICIAL = vlmrm.read_json(GOLDEN / "golden.json")
# Where the slots of the official batches lie in ours: start, now, next, later, end, and a sixth
# (R3M: the end, as its s2 may be another; LIV: the frame of the caption). R3M has no "next" frame,
# VIP and LIV have no "later": they must not look at it, so any frame will do there, here zeros.
SLOTS = {"r3m": [0, 2, None, 3, 4, 1], "vip": [0, 2, 3, None, 1], "liv": [0, 2, 3, None, 1, 4]}

def golden_arrays(method):
    arrays = np.load(GOLDEN / f"{method}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

def golden_batch(method):
    """The arrays of a method, its embeddings as a leaf, and their frames in our order."""
    arrays = golden_arrays(method)
    leaf = arrays["emb"].double().requires_grad_()
    frames = []
    for slot in SLOTS[method]:
        unused = torch.zeros_like(leaf[:, 0])
        frames.append(unused if slot is None else leaf[:, slot])
    return arrays, leaf, torch.stack(frames, dim=1)

def check_golden(loss, method, variant, gradients):
    """The value, and (leaf, its gradient)."""
    expected = OFFICIAL[method]["results"][f"{variant}/float64"]["full_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    for leaf, gradient in gradients:
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-12)

class InTurn:
    """Permutations that a loss uses twice: another set of them each time it goes through them."""
    def __init__(self, sets):
        self.sets = iter(sets)

    def __iter__(self):
        return iter(next(self.sets))

@pytest.mark.parametrize("name, variant", [("tcn", "tcn_only_l2"), ("r3m", "full_cosinehead_l2")])
def test_tcn_and_r3m_golden(name, variant, monkeypatch):
    """With the permutations of the official run, call by call."""
    arrays, leaf, frames = golden_batch("r3m")
    texts = arrays["lang_same"] * arrays["has_lang"][:, None]
    calls = [InTurn(arrays["perms_tcn"].view(3, 2, 6).unbind(1))]
    if name == "r3m":
        calls = list(arrays["perms_lang"].view(3, 3, 6).unbind(1)) + calls
    calls = iter(calls)
    monkeypatch.setattr(vlmrm, "negative_permutations", lambda n, batch: next(calls))
    gradients = [(leaf, arrays[f"grad_{variant}"])]
    check_golden(LOSSES[name](frames, texts, None), "r3m", variant, gradients)

@pytest.mark.parametrize("variant, options", [
    ("neg0", {"negatives": 0, "l1": 0, "l2": 0}), ("neg3", {"l1": 0, "l2": 0}), ("ego4d_cfg", {})])
def test_vip_golden(variant, options, monkeypatch):
    arrays, leaf, frames = golden_batch("vip")
    if variant != "neg0":
        monkeypatch.setattr(vlmrm, "negative_permutations", lambda n, batch: arrays["perms"])
    gradients = [(leaf, arrays[f"grad_{variant}"])]
    check_golden(vlmrm.vip_loss(frames, None, None, **options), "vip", variant, gradients)

@pytest.mark.parametrize("variant, options", [
    ("finetune_cos_neg0", {}), ("all_cos_neg0", {"language_weight": 1}),
    ("pretrain_cos_neg3", {"language_weight": 1})])
def test_liv_golden(variant, options, monkeypatch):
    arrays, leaf, frames = golden_batch("liv")
    if variant.endswith("neg3"):  # it drew anew for the sentences, we do not
        ours = vlmrm.implicit_value_loss
        official = iter([arrays["perms_visual"], arrays["perms_lang"]])

        def with_official(value, start, now, next_, goal, gamma, perms):
            return ours(value, start, now, next_, goal, gamma, next(official))

        monkeypatch.setattr(vlmrm, "implicit_value_loss", with_official)
    texts = arrays["text"].clone().requires_grad_()
    gradients = [(leaf, arrays[f"grad_emb_{variant}"]), (texts, arrays[f"grad_text_{variant}"])]
    check_golden(vlmrm.liv_loss(frames, texts, None, **options), "liv", variant, gradients)

# Losses by hand, against a library or loops, and what must hold of each ---

E0 = torch.tensor([1.0, 0.0])
E1 = torch.tensor([0.0, 1.0])
RISE = torch.stack([E1, E1, E1, E1, E0])[None]  # rewards 0 0 0 0 1 under the text e0
TURN = torch.stack([E1, E1, E0, E0, E0])[None]
BY_HAND = [
    # Four pairs rise by 1: max(0, .1 - 1) = 0; six are level: .1 each. Mean over ten pairs.
    ("triplet", RISE, {"margin": 0.1}, 0.06),
    # One video: no negatives but (s2, s0). s0 = s1 = e0, s2 = e1: the pair (s1, s0) has distance 0,
    # the others sqrt 2. First term: log 2 (two equal logits); second: log(1 + exp(-sqrt 2)).
    ("tcn", torch.stack([E1, E0, E1, E0, E1])[None], {},
     (math.log(2) + math.log(1 + math.exp(-math.sqrt(2)))) / 2),
    # A video that never moves, no penalty: every contrast is between two equal logits, three in the
    # language term and two in TCN.
    ("r3m", E0.expand(1, 5, 2), {"l1": 0, "l2": 0}, 2 * math.log(2)),
    # V(start) = V(now) = -sqrt 2, V(next) = 0, so .02 sqrt 2 + (1 - sqrt 2 - 0).
    ("vip", TURN, {"negatives": 0, "l1": 0, "l2": 0}, 1 - 0.98 * math.sqrt(2)),
    # The same under cos / (1 - gamma) = 50 cos: V(start) = V(now) = 0, V(next) = 50. CLIP of one
    # pair: 0. Value: -0 + 1 + 0 - .98 * 50 = -48, floored at log 1e-8.
    ("liv", TURN, {}, math.log(1e-8)),
]

@pytest.mark.parametrize("name, frames, options, expected", BY_HAND)
def test_loss_by_hand(name, frames, options, expected):
    loss = LOSSES[name](frames, E0[None], TIMES[:1], **options)
    assert loss.item() == pytest.approx(expected, rel=1e-5)

def test_triplet_is_torchs():
    """With D = 1 - cos as distance, torch's triplet loss on every (text, later, earlier)."""
    losses = []
    for early, late in itertools.combinations(range(5), 2):
        losses.append(F.triplet_margin_with_distance_loss(
            TEXTS, FRAMES[:, late], FRAMES[:, early], margin=0.1,
            distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)))
    ours = vlmrm.triplet_loss(FRAMES, TEXTS, None, margin=0.1)
    torch.testing.assert_close(ours, torch.stack(losses).mean())

@pytest.mark.parametrize("name", LOSSES)
def test_lower_for_the_better_ordered_batch(name):
    """Videos that turn from their start into their instruction, against the same with the order
    broken: backwards; for TCN with neighbours in time far apart; for VIP, LIV with a step back."""
    texts = unit(8, 16)
    start = unit(8, 16, seed=7)[:, None]
    share = TIMES[:1, :, None]
    good = F.normalize(start * (1 - share) + texts[:, None] * share, dim=-1)
    worse = good.flip(1)
    if name == "tcn":
        worse = good[:, [1, 3, 2, 0, 4]]
    elif name in ("vip", "liv"):
        worse = good[:, [1, 2, 0, 3, 4]]
    assert LOSSES[name](good, texts, None) < LOSSES[name](worse, texts, None)

def test_negative_permutations_never_pair_a_video_with_itself():
    for batch in (1, 2, 3, 6):
        perms = vlmrm.negative_permutations(3, batch)
        assert perms.shape == (min(3, batch - 1), batch)
        assert (perms != torch.arange(batch)).all()
        assert (perms.sort(dim=1).values == torch.arange(batch)).all()

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

@pytest.mark.parametrize("name", LOSSES)
def test_the_registry(name):
    """The paper's five; constants are arguments of their loss; whether the sentence is read."""
    assert list(vlmrm.OBJECTIVES) == ["triplet", "tcn", "r3m", "vip", "liv", "zeroshot"]
    parts = vlmrm.get_objective(name)
    rate, constants = parts["TUNED"]
    assert 1e-4 <= rate <= 1e-2 and parts["reward"] is vlmrm.cosine_reward
    texts = TEXTS.clone().requires_grad_()
    frames = FRAMES.clone().requires_grad_()
    LOSSES[name](frames, texts, TIMES, **constants).backward()
    assert (texts.grad is not None) == parts["COSINE"] == (name not in ("tcn", "vip"))

# Code that is copied out ----------------------------------

TREE = ast.parse(SOURCE)
CODE = ast.unparse(TREE)
FUNCTIONS = {}
CONSTANTS = {}
for node in TREE.body:
    if isinstance(node, ast.FunctionDef):
        FUNCTIONS[node.name] = node
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        CONSTANTS[node.targets[0].id] = node

def copied_out(name):
    """The function in a namespace of its own, with what its docstring names as helper() or CONSTANT
    and what that names in turn, and with the libraries that a script for it would import."""
    wanted = [name]
    for other in wanted:  # grows meanwhile
        if other in FUNCTIONS:
            text = ast.get_docstring(FUNCTIONS[other])
            helpers = [word for word in re.findall(r"\b(\w+)\(\)", text) if word in FUNCTIONS]
            settings = [word for word in re.findall(r"\b[A-Z_]+\b", text) if word in CONSTANTS]
            wanted += [need for need in helpers + settings if need not in wanted]
    nodes = [FUNCTIONS.get(other) or CONSTANTS[other] for other in reversed(wanted)]
    space = {"torch": torch, "F": F, "math": math, "np": np, "scipy": scipy}
    exec(compile(ast.Module(nodes, []), "copied out", "exec"), space)
    return space[name]

BATCH = (FRAMES, TEXTS, TIMES)
ROWS = np.random.default_rng(3).random((2, 4, 9))
ARGUMENTS = [
    ("triplet_loss", BATCH), ("tcn_loss", BATCH), ("r3m_loss", BATCH), ("vip_loss", BATCH),
    ("liv_loss", BATCH), ("liv_loss", (FRAMES, TEXTS, TIMES, 0.5, 0.98, 1.0, 2)),
    ("softmax_loss", (TEXTS[0], [TEXTS[1], TEXTS[2]])),
    ("implicit_value_loss", (vlmrm.cosine, FRAMES[:, 0], FRAMES[:, 1], FRAMES[:, 2], FRAMES[:, 3],
                             0.98, vlmrm.negative_permutations(3, 6))),
    ("info_nce", (unit(6, 6),)), ("norm_penalty", (FRAMES, 0.1, 0.2)),
    ("value_order_correlation", (ROWS[0],)), ("ranking_accuracy", (ROWS[0], ROWS[1])),
    ("worse_frames", (ROWS[1], "across")), ("ranking_accuracy", (ROWS[0], ROWS[1], "across")),
    ("ranking_accuracy", (ROWS[0], ROWS[1], "same_time")),
    ("reading_metrics", (np.random.default_rng(4).random((9, 2, 5)), 0, 1)),
    ("paired_p_value", (ROWS[0, 0], ROWS[1, 0]))]

@pytest.mark.parametrize("name, arguments", ARGUMENTS)
def test_it_runs_when_copied_out(name, arguments):
    ours = getattr(vlmrm, name)
    copied = copied_out(name)
    assert copied is not ours
    expected = ours(*arguments)
    found = copied(*arguments)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        np.testing.assert_equal(found, expected)

def test_every_loss_and_metric_is_copied_out():
    """Of section 5 all that are functions of rewards alone; evaluate() puts a report together."""
    section = SOURCE.partition("\n# 5. ")[2].partition("\ndef evaluate(")[0]
    names = re.findall(r"^def (\w+)", section, re.MULTILINE)
    names += [name for name in FUNCTIONS if name.endswith("_loss")]
    assert {"triplet_loss", "paired_p_value"} < set(names) <= {name for name, _ in ARGUMENTS}

def test_vlmrm_imports_nothing_of_ours():
    """Only the standard library and packages of requirements.txt, by plain import statements."""
    roots = set(re.findall(r"^ *(?:import|from) (\w+)(?: |$|\.)", CODE, re.MULTILINE))
    packages = {"numpy", "open_clip", "torch", "matplotlib", "PIL", "safetensors",
                "scipy", "tqdm", "mujoco", "metaworld"}
    assert roots - sys.stdlib_module_names == packages
    assert "__import__" not in SOURCE and "importlib" not in roots

# Metrics --------------------------------------------------

def test_voc_by_hand():
    """Rewards 1 3 2: ranks 1 3 2 against times 1 2 3, sum of squared differences 0 + 1 + 1 = 2,
    Spearman 1 - 6 * 2 / (3 * 8) = .5. A constant counts 0, rising 1, falling -1."""
    predicted = np.array([[1, 3, 2], [5, 5, 5], [1, 2, 9], [3, 2, 1]], float)
    assert vlmrm.value_order_correlation(predicted) == pytest.approx([0.5, 0, 1, -1])

def test_voc_is_scipys_spearman_and_opengvls_value():
    predicted = np.random.default_rng(0).integers(0, 6, size=(50, 12)).astype(float)  # many ties
    expected = [scipy.stats.spearmanr(row, np.arange(12)).statistic for row in predicted]
    assert vlmrm.value_order_correlation(predicted) == pytest.approx(expected)
    arrays = golden_arrays("metrics")
    for key, name in (("v", "voc"), ("v_ties", "voc_with_ties")):
        official = OFFICIAL["metrics"]["results"][name]
        assert vlmrm.value_order_correlation(arrays[key].numpy()) == pytest.approx(official)

def test_ranking_accuracy_by_hand():
    """Rewards 0 1 2, predicted 0 2 2: pairs (0,1) right, (0,2) right, (1,2) a tie, 1/2: 2.5 of 3.
    With a threshold of 1 only (0,2) is left: 1 of 1. Of equal rewards there is no pair: NaN.
    Successes that end at .9 and .4, failures at .4 and .1: (1 + 1 + 1/2 + 1) / 4."""
    predicted = np.array([[0.0, 2, 2]])
    truth = np.array([[0.0, 1, 2]])
    assert vlmrm.ranking_accuracy(predicted, truth) == pytest.approx(2.5 / 3)
    assert vlmrm.ranking_accuracy(predicted, truth, threshold=1.0) == 1
    assert math.isnan(vlmrm.ranking_accuracy(predicted, truth * 0))
    one_is_nan = np.array([1, 1, math.nan])
    assert math.isnan(vlmrm.ranking_accuracy(predicted * one_is_nan, truth))
    assert math.isnan(vlmrm.ranking_accuracy(predicted, truth * one_is_nan))
    ends = np.array([[0.9], [0.4], [0.4], [0.1]])
    success = np.array([[True], [True], [False], [False]])
    assert vlmrm.ranking_accuracy(ends, success, "across") == 3.5 / 4

@pytest.mark.parametrize("pairs", ["within", "across", "same_time"])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_ranking_accuracy_is_the_double_loop(T, pairs):
    """Over (i, a), frame a of episode i, and every worse (j, b); with ties in both rewards."""
    rng = np.random.default_rng(T)
    p = rng.integers(0, 5, (4, T)).astype(float)
    r = rng.integers(0, 40, (4, T)) / 9
    points = []
    for i, a, j, b in np.ndindex(4, T, 4, T):
        counts = {"within": i == j, "across": i != j, "same_time": i != j and a == b}[pairs]
        if counts and r[i, a] - r[j, b] > 0.1:
            points.append((np.sign(p[i, a] - p[j, b]) + 1) / 2)
    expected = np.mean(points) if points else math.nan
    found = vlmrm.ranking_accuracy(np.float32(p), np.float32(r), pairs)
    assert found == pytest.approx(expected, nan_ok=True)

@pytest.mark.parametrize("seed", range(20))
def test_metrics_ignore_increasing_maps_and_flip(seed):
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, 30, (4, 7)) * 10.0 ** rng.integers(-3, 4)
    truth = rng.random((4, 7))

    def metrics(p):
        kinds = ("within", "across", "same_time")
        accuracies = [vlmrm.ranking_accuracy(p, truth, pairs) for pairs in kinds]
        return np.append(2 * np.array(accuracies) - 1, vlmrm.value_order_correlation(p).mean())

    found = metrics(predicted)
    assert np.abs(found).max() <= 1
    assert found == pytest.approx(-metrics(-predicted))
    assert found == pytest.approx(metrics(np.cbrt(predicted) + 3))

def test_reading_metrics_by_hand():
    """Two experts under three instructions, the first their own, the third its opposite, and three
    paraphrases. By the ends, the own one is first of all for expert 0; to expert 1 another is as
    good, which is no first place. VOC under the own sentence is 1 and 1, under the opposite -1 and
    1; under the paraphrases 1 and -1, 1 and 1, 0 and 0."""
    rise = np.arange(3.0)
    fall = -rise
    flat = np.ones(3)
    under = np.array([[rise, rise], [flat, 2 * flat], [fall, rise - 9],
                      [rise, fall], [rise, rise], [flat, flat]])
    assert vlmrm.reading_metrics(under, own=0, opposite=2) == pytest.approx({
        "voc": 1, "retrieval_top1": 1 / 2, "voc_opposite": 0, "opposite_gap": 1,
        "voc_paraphrase": (1 - 1 + 1 + 1 + 0 + 0) / 6})
    alone = vlmrm.reading_metrics(under[[0, -3, -2, -1]], own=0, opposite=0)  # nothing to prefer
    for metric in ("retrieval_top1", "voc_opposite", "opposite_gap"):
        assert math.isnan(alone[metric])
    assert set(alone) < set(vlmrm.METRICS)

def test_average_over_tasks_by_hand():
    """Half of eight unseen tasks score 0, half 1. Eight drawn again have k ones with probability
    C(8, k) / 256: k < 1 .4 %, k < 2 3.5 %, so the interval of 95 % is 1/8 to 7/8. One task is its
    own interval, and a task without the metric does not count."""
    tasks = {"reach-v3": {"voc": 0.3}, "push-v3": {}}
    for k, task in enumerate(vlmrm.UNSEEN_TASKS[:8]):
        tasks[task] = {"voc": k % 2}
    report = vlmrm.average_over_tasks(tasks)
    for group, expected in (("unseen", [0.5, 8, 1 / 8, 7 / 8]), ("seen", [0.3, 1, 0.3, 0.3])):
        found = report[group].pop("voc")
        assert [found["value"], found["tasks"], *found["interval"]] == pytest.approx(expected)
    assert report == {"seen": {}, "unseen": {}, "tasks": tasks}

def test_nan_stays_nan():
    """A reward that is not a number makes no number; kinds of pairs that are none make an error."""
    rewards = np.array([[0.0, np.nan, 2.0]])
    assert np.isnan(vlmrm.value_order_correlation(rewards)).all()
    assert math.isnan(vlmrm.ranking_accuracy(rewards, np.arange(3.0)[None]))
    assert math.isnan(vlmrm.paired_p_value(rewards[0], np.zeros(3)))
    with pytest.raises(KeyError):
        vlmrm.ranking_accuracy(rewards, rewards, "withn")

def test_paired_p_value_by_hand():
    """Ten tasks, so 2^10 ways to flip signs. With a gain on all, two lie as far out: all up and all
    down. With the smallest gap lost, the two that keep it lie farther: four. Equal scores: 1. Of
    twenty tasks chance draws some flips, and of those none is as far out."""
    reference = np.linspace(0.3, 0.9, 10)
    gaps = np.arange(1, 11) / 100
    assert vlmrm.paired_p_value(reference + gaps, reference) == pytest.approx(2 / 1024)
    gaps[0] = -gaps[0]
    assert vlmrm.paired_p_value(reference + gaps, reference) == pytest.approx(4 / 1024)
    assert vlmrm.paired_p_value(reference, reference) == 1
    assert vlmrm.paired_p_value(np.arange(1.0, 21), np.zeros(20)) < 0.001

# Data: the shipped file, and a tiny one made here ---------

SHIPPED = vlmrm.Dataset(HERE / "data" / "metaworld.npz")
INSTRUCTIONS = vlmrm.load_instructions(HERE / "data" / "instructions.json")

def test_shipped_data_is_what_the_protocol_asks_for():
    data = SHIPPED
    assert data.path.stat().st_size < 30e6
    assert data.pictures(0).shape == (24, 96, 96, 3) and len(INSTRUCTIONS) == 50
    assert not set(data.task[data.split != "test"]) & set(vlmrm.UNSEEN_TASKS)
    assert set(data.source[data.split == "train"]) == {"expert"}
    for task in INSTRUCTIONS:
        assert len(data.select(task=task, source="expert")) == 14
        assert len(data.select(task=task, source="mixed")) == 6
        assert len(set(data.seed[data.task == task])) == 20  # no episode in two splits
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert 0 <= data.rewards.min() and data.rewards.max() <= 10.01
    # 200 different sentences, 18 tasks that undo another one, which undoes them.
    assert set(data.task) == set(INSTRUCTIONS)
    sentences = set()
    opposites = {}
    for task, entry in INSTRUCTIONS.items():
        sentences.update(entry["paraphrases"], [entry["instruction"]])
        if "opposite" in entry:
            opposites[task] = entry["opposite"]
    assert len(sentences) == 200 and len(opposites) == 18
    assert all(opposites[opposite] == task for task, opposite in opposites.items())

@pytest.mark.parametrize("task, expected", [
    ("reach-v3", "r" * 9 + "aaeee" + "aaeeee"), ("door-open-v3", "e" * 20)])
def test_splits(task, expected):
    """Of 14 experts 9, 2 and 3, of six mixed episodes none, 2 and 4; of an unseen task all. What
    tells the names of the splits apart is their second letter."""
    sources = ["expert"] * 14 + ["mixed"] * 6
    episodes = vlmrm.assign_splits([{"task": task, "source": source} for source in sources])
    assert "".join(episode["split"][1] for episode in episodes) == expected

COLORS = {"reach-v3": (255, 60, 60), "push-v3": (60, 255, 60), "sweep-v3": (60, 60, 255),
          "drawer-open-v3": (255, 255, 60)}

def toy_episode(task, seed, source="expert", T=10, size=32):
    """A square of the task's colour crosses the picture, or for `mixed` wanders; reward = place."""
    rng = np.random.default_rng(seed)
    places = np.linspace(0, size - 8, T)
    if source == "mixed":
        places = rng.uniform(0, size - 8, T)
    pictures = np.full((T, size, size, 3), 40, np.uint8)
    top = rng.integers(0, size - 8)
    for picture, left in zip(pictures, places.astype(int)):
        picture[top:top + 8, left:left + 8] = COLORS[task]
    return {"task": task, "source": source, "seed": seed, "steps": np.arange(T),
            "rewards": np.float32(10 * places / (size - 8)), "success": places > size - 10,
            "strip": vlmrm.pack_pictures(pictures)}

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A data set of four toy tasks, one of them unseen."""
    episodes = []
    for task in COLORS:
        experts = [toy_episode(task, seed) for seed in range(8)]
        mixed = [toy_episode(task, seed, "mixed") for seed in range(100, 106)]
        episodes += vlmrm.assign_splits(experts + mixed)
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    vlmrm.write_dataset(path, episodes)
    return vlmrm.Dataset(path)

def test_pictures_survive_packing(tmp_path):
    """A slope of grey that brightens from picture to picture."""
    t, y, x, _ = np.indices((6, 64, 64, 3))
    pictures = (3 * x + 5 * t + y % 2).astype(np.uint8)
    episode = toy_episode("reach-v3", 0, T=6, size=64)
    episode |= {"strip": vlmrm.pack_pictures(pictures), "split": "test"}
    for name in ("one.npz", "again.npz"):
        vlmrm.write_dataset(tmp_path / name, [episode])
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    data = vlmrm.Dataset(tmp_path / "one.npz")
    assert np.abs(data.pictures(0).astype(int) - pictures).mean() < 4
    assert (data.load([0, 0]) == np.stack([data.pictures(0)] * 2)).all()
    for name in ("rewards", "steps", "success"):
        assert (getattr(data, name)[0] == episode[name]).all()

GOOD = toy_episode("reach-v3", 0) | {"split": "test"}
LARGE = toy_episode("reach-v3", 0, size=48) | {"split": "test"}
LONG = toy_episode("reach-v3", 0, T=11) | {"split": "test"}

@pytest.mark.parametrize("episodes, error, says", [
    ([toy_episode("reach-v3", 0)], KeyError, "split"),
    ([dict.fromkeys(vlmrm.PER_EPISODE | vlmrm.PER_PICTURE, 0)], KeyError, "strip"),
    ([GOOD, LONG], ValueError, "inhomogeneous"), ([], vlmrm.InputError, "unpack"),
    ([GOOD | {"task": None}], vlmrm.InputError, "pickle"),
    ([GOOD | {"split": "exam"}], vlmrm.InputError, "unknown split"),
    ([LARGE, GOOD], vlmrm.InputError, "not every strip has 10 square pictures of 48")])
def test_episodes_that_make_no_data_set(tmp_path, episodes, error, says):
    """A field that is missing is the caller's mistake, and shown as one. Nothing is left behind."""
    with pytest.raises(error, match=says):
        vlmrm.write_dataset(tmp_path / "x.npz", episodes)
    assert not list(tmp_path.iterdir())

def test_episodes_are_counted_from_the_end_too(toy):
    assert (toy.pictures(-1) == toy.pictures(toy.E - 1)).all()
    with pytest.raises(IndexError):
        toy.strip(toy.E)

def test_data_that_are_not_what_they_should_be_are_refused(toy, tmp_path):
    arrays = dict(np.load(toy.path))
    bad = tmp_path / "bad.npz"

    def refused(says, **changed):
        np.savez(bad, **{name: array for name, array in (arrays | changed).items()
                         if array is not None})
        with pytest.raises(vlmrm.InputError, match="bad.npz.*" + re.escape(says)):
            vlmrm.Dataset(bad)

    refused("steps", steps=None)
    refused("offsets", offsets=None)
    refused("rewards is int64", rewards=arrays["rewards"].astype(int))
    refused("success is bool", success=arrays["success"][:, :3])
    refused("not finite", rewards=np.where(arrays["steps"] == 3, np.nan, arrays["rewards"]))
    refused("fewer", **{name: arrays[name][:, :4] for name in vlmrm.PER_PICTURE})
    refused("unknown split", source=np.full_like(arrays["source"], "other"))
    refused("allow_pickle", task=arrays["task"].astype(object))
    refused("OSError", strips=arrays["strips"][:-1])
    refused("cannot identify image", offsets=arrays["offsets"] + 1)
    none = {name: arrays[name][:0] for name in vlmrm.PER_EPISODE | vlmrm.PER_PICTURE}
    refused("IndexError", offsets=arrays["offsets"][:1], strips=arrays["strips"][:0], **none)

@pytest.mark.parametrize("text, says", [
    ("{", "JSONDecodeError"), ("[1]", "TypeError"), ('{"a": {}}', "KeyError"),
    ('{"a": {"instruction": "b", "paraphrases": ["c"]}}', "three paraphrases"),
    ('{"a": {"instruction": "b", "paraphrases": "cde"}}', "three paraphrases"),
    ('{"a": {"instruction": "b", "paraphrases": ["c", "d", "e"], "opposite": "x"}}', "opposite")])
def test_instructions_that_are_not_what_they_should_be(tmp_path, text, says):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(vlmrm.InputError, match="bad.json.*" + says):
        vlmrm.load_instructions(bad)

@pytest.fixture(scope="session")
def rendering():
    """Skips what asks for it on a machine that cannot render."""
    try:
        _, _, renderer = vlmrm.open_task("reach-v3", 32)
    except vlmrm.InputError as problem:
        pytest.skip(str(problem))
    renderer.close()

def test_without_a_simulator_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(vlmrm.InputError, match="cannot render reach-v3.*libosmesa6"):
        vlmrm.open_task("reach-v3", 32)

def test_an_episode_goes_wrong():
    """From step 4 on the expert's 1 gives way to random actions, each for ten steps; and without
    noise an episode ends five steps after success."""
    done = []

    def step(action):
        done.append(action)
        return None, 0.0, False, False, {"success": len(done) == 7}

    poses = SimpleNamespace(**{name: np.zeros(3) for name in vlmrm.POSES})
    env = SimpleNamespace(reset=lambda: (None, {}), step=step, data=poses)
    expert = SimpleNamespace(get_action=lambda observation: np.ones(4))
    rng = np.random.default_rng(0)
    assert len(vlmrm.roll_out(env, expert, rng, 40)) == 12
    done.clear()
    history = vlmrm.roll_out(env, expert, rng, 30, 1e-9, wrong_from=4)
    assert len(history) == len(done) == 30
    actions = np.round(done, 6)
    changes = np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1)) + 1
    assert list(changes) == [4, 14, 24]
    assert (actions[:4] == 1).all() and (np.abs(actions) <= 1).all()

@pytest.mark.rendering
def test_collection(rendering, tmp_path, capsys):
    """Experts that succeed, pictures in order, and the same without processes. An episode of the
    shipped data is made again: the same rewards, and pictures that differ by no more than another
    GL library may cost."""
    new = tmp_path / "new" / "two.npz"
    options = "--collect --tasks reach-v3 drawer-open-v3 --expert 1 --mixed 1 --workers 2 --data"
    options = [*options.split(), str(new)]
    assert vlmrm.main(options) == 0
    assert "wrote 4 episodes of 2 tasks" in capsys.readouterr().out
    assert os.listdir(new.parent) == ["two.npz"]
    data = vlmrm.Dataset(new)
    assert list(data.source) == ["expert", "mixed"] * 2
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert (np.diff(data.steps, axis=1) > 0).all()
    assert (data.steps[data.source == "mixed", -1] == 149).all()
    expert, mixed = data.select(task="drawer-open-v3")
    pictures = data.pictures(expert).astype(int)
    assert pictures.shape == (24, 96, 96, 3)
    assert np.ptp(pictures, axis=0).max() > 50  # something moves
    job = vars(vlmrm.parse_arguments(options)) | {"task": "drawer-open-v3"}
    for e, episode in zip((expert, mixed), vlmrm.collect_task(job), strict=True):
        assert (data.rewards[e] == episode["rewards"]).all()
        assert data.strips[data.offsets[e]:data.offsets[e + 1]].tobytes() == episode["strip"]
    first, second = SHIPPED.select(task="drawer-open-v3")[:2]
    np.testing.assert_allclose(data.rewards[expert], SHIPPED.rewards[first], atol=1e-3)
    assert (data.steps[expert] == SHIPPED.steps[first]).all()
    same = np.abs(pictures - SHIPPED.pictures(first)).mean()
    assert same < 2 < np.abs(pictures - SHIPPED.pictures(second)).mean()

# Backbone -------------------------------------------------

@pytest.fixture
def tiny():
    """Tiny with random weights."""
    torch.manual_seed(0)
    return vlmrm.build_backbone("tiny", "none").eval()

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)

def test_embeddings_are_unit_vectors_and_score_is_their_cosine(tiny):
    """Also in more chunks than one: 2 x 123 pictures, which are these three by turns."""
    with torch.inference_mode():
        embedded = tiny.embed_frames(PICTURES)
        many = tiny.embed_frames(np.stack([np.tile(PICTURES, (41, 1, 1, 1))] * 2))
        cosines = vlmrm.cosine(embedded, tiny.embed_texts(["open the drawer"]))
    assert embedded.shape == (3, 128) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(many, embedded.repeat(2, 41, 1), atol=1e-5, rtol=0)
    rewards = tiny.score(PICTURES, "open the drawer")
    assert rewards.shape == (3,) and rewards.dtype == np.float32
    assert rewards == pytest.approx(cosines.numpy(), abs=1e-5)
    for listed in (list(PICTURES), [Image.fromarray(picture) for picture in PICTURES]):
        assert (tiny.score(listed, "open the drawer") == rewards).all()

def test_pictures_of_any_size_and_any_sentence_have_a_score(tiny):
    large = PICTURES.repeat(5, axis=1).repeat(4, axis=2)  # 200 x 224; Pillow averages too
    small = [np.asarray(Image.fromarray(picture).resize((96, 96), 2)) for picture in large]
    rewards = tiny.score(np.stack(small), "push")
    assert tiny.score(large, "push") == pytest.approx(rewards, abs=1e-3)
    for sentence in ("żółć 🦾", "%s {} \\", "<script>", "推"):
        assert np.isfinite(tiny.score(PICTURES[:, :7, :9], sentence)).all()

def test_tiny_tokenizer_is_clips_with_fewer_merges():
    tokens = vlmrm.tiny_tokenizer()(["open the drawer"])[0]
    assert tokens[0] == 4094 and tokens.max() == 4095 and (tokens == 4095).sum() == 1
    inner = tokens[1:tokens.argmax()].tolist()
    assert open_clip.SimpleTokenizer().decode(inner).strip() == "open the drawer"

@pytest.mark.parametrize("pictures", [
    np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint8),
    np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), Image.new("RGB", (8, 8)),
    "clip.mp4", Path("clip.mp4"), None, [], [np.zeros((8, 8, 3), np.uint8), None],
    [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)]])
def test_score_refuses_what_are_no_pictures(tiny, pictures):
    with pytest.raises(vlmrm.InputError, match=r"pictures must be uint8 \(N, H, W, 3\)"):
        tiny.score(pictures, "open the drawer")

@pytest.mark.parametrize("sentence", [
    "", " \n", None, "push \0", "push " * 23, "push \ud800", "<start_of_text> push",
    "push <END_OF_TEXT>", "push &lt;end_of_text&gt;", "push ＜end_of_text＞"])
def test_score_refuses_what_is_no_sentence_or_too_long(tiny, sentence):
    with pytest.raises(vlmrm.InputError, match="no sentence|own marks|word pieces"):
        tiny.score(PICTURES, sentence)

def test_a_sentence_is_embedded_once(tiny, monkeypatch):
    """Until another is asked for, or a weight changes in whatever way; also from two threads."""
    asked = []
    embed = tiny.embed_texts
    monkeypatch.setattr(
        tiny, "embed_texts", lambda sentences: asked.append(sentences) or embed(sentences))
    first = tiny.score(PICTURES, "push")
    assert (tiny.score(PICTURES, "push") == first).all() and asked == [["push"]]
    second = tiny.score(PICTURES, "open the drawer")
    assert asked == [["push"], ["open the drawer"]]
    with ThreadPoolExecutor(2) as threads:
        for rewards, expected in zip(threads.map(lambda k: tiny.score(
                PICTURES, ("push", "open the drawer")[k % 2]), range(12)), [first, second] * 6):
            assert rewards == pytest.approx(expected, abs=1e-6)
    weight = tiny.clip.text_projection
    tiny.score(PICTURES, "push")
    for change in (lambda: weight.data.mul_(-1), lambda: setattr(
            tiny.clip, "text_projection", torch.nn.Parameter(-weight.detach()))):
        before = tiny.score(PICTURES, "push")
        change()
        assert tiny.score(PICTURES, "push") == pytest.approx(-before, abs=1e-5)

@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_scores_in_the_callers_precision(finished, kind):
    """Whatever the default type is, under autocast, and of a model that was cast."""
    expected = vlmrm.load_reward_model(finished[0], "cpu").score(PICTURES, "push")
    near = pytest.approx(expected, abs=0.03)
    try:
        torch.set_default_dtype(kind)
        model = vlmrm.load_reward_model(finished[0], "cpu")
        assert model.score(PICTURES, "push") == near
    finally:
        torch.set_default_dtype(torch.float32)
    model = vlmrm.load_reward_model(finished[0], "cpu")
    assert model.to(kind).score(PICTURES, "push") == near
    model = vlmrm.load_reward_model(finished[0], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model.score(PICTURES, "push")
    assert rewards == near and rewards.dtype == np.float32

@pytest.mark.parametrize("fused", [False, True])
def test_a_sentence_is_embedded_again_after_a_step(tiny, fused):
    """An optimiser writes to the weights, whichever way it does, or they are loaded."""
    def fresh():
        with torch.inference_mode():
            cosines = tiny.embed_frames(PICTURES) @ tiny.embed_texts(["push"])[0]
        return pytest.approx(cosines.numpy(), abs=1e-6)

    first = tiny.score(PICTURES, "push")
    weights = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.01, fused=fused)
    tiny.embed_texts(["push"])[0, 0].backward()
    optimizer.step()
    assert tiny.score(PICTURES, "push") == fresh()
    assert np.abs(tiny.requires_grad_(False).score(PICTURES, "push") - first).max() > 1e-3
    tiny.load_state_dict(weights)
    assert tiny.score(PICTURES, "push") == fresh()

def test_lora_starts_at_the_model_trains_only_itself_and_is_merged(tiny):
    before = tiny.score(PICTURES, "open the drawer")
    vlmrm.add_lora(tiny, rank=2)
    assert tiny.score(PICTURES, "open the drawer") == pytest.approx(before, abs=1e-6)
    trained = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    assert all(name.endswith((".0.A", ".0.B")) for name in trained)
    assert any("visual" not in name for name in trained)
    packed = next(name for name in trained if re.search(r"visual.*in_proj_weight\.0\.B", name))
    with torch.no_grad():
        for name in trained:
            trained[name].normal_(std=0.1)
    assert np.abs(tiny.score(PICTURES, "open the drawer") - before).max() > 1e-3
    layer = tiny.get_submodule(packed.split(".parametrizations")[0])
    part = layer.parametrizations.in_proj_weight
    torch.testing.assert_close(layer.in_proj_weight, part.original + part[0].B @ part[0].A)
    expected = tiny.score(PICTURES, "push")
    vlmrm.merge_lora(tiny)
    assert not [name for name in tiny.state_dict() if "parametrizations" in name]
    assert tiny.score(PICTURES, "push") == pytest.approx(expected, abs=1e-5)

def test_weights_survive_saving_and_misfits_are_refused(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    weights = vlmrm.trained_weights(tiny)
    save_file(weights, path)
    other = vlmrm.build_backbone("tiny", str(path)).eval()
    assert (other.score(PICTURES, "push") == tiny.score(PICTURES, "push")).all()
    for value, says in ((None, "missing"), (math.nan, "not finite"), ([1.0, 2], "size mismatch")):
        bad = dict(weights)
        del bad["clip.logit_scale"]
        if value:
            bad["clip.logit_scale"] = torch.tensor(value)
        save_file(bad, path)
        with pytest.raises(vlmrm.InputError, match=f"(?s)cannot read .*{says}"):
            vlmrm.build_backbone("tiny", str(path))

def small_checkpoint(name, path, monkeypatch):
    """A file with random weights of an architecture of open_clip, but for its layers, which are
    fewer, and its tokenizer, which is CLIP's: SigLIP2's is a download."""
    real = open_clip.get_model_config(name)
    text = real["text_cfg"] | {"layers": 2, "vocab_size": 49408}
    vision = real["vision_cfg"] | {"layers": 2}
    smaller = functools.partial(open_clip.create_model, vision_cfg=vision, text_cfg=text)
    monkeypatch.setattr("timm.create_model", functools.partial(timm.create_model, depth=2))
    tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    monkeypatch.setattr(open_clip, "get_tokenizer", {name: tokenizer}.get)
    monkeypatch.setattr(open_clip, "create_model", smaller)
    with torch.device("meta"):  # names and shapes alone: no time is lost on initialising weights
        shapes = smaller(name, None, device="meta").state_dict()
    torch.manual_seed(0)
    weights = {}
    for key, value in shapes.items():
        weights[key] = torch.full(value.shape, float(key.endswith("weight"))).half()
        if value.ndim > 1:
            weights[key] = (torch.randn(value.shape) * 0.02).half()
    torch.save(weights, path)

@pytest.mark.parametrize("name, mean", [
    ("ViT-B-32-quickgelu", open_clip.OPENAI_DATASET_MEAN), ("ViT-B-16-SigLIP2", [0.5] * 3)])
def test_real_architectures_from_a_checkpoint(name, mean, toy, tmp_path, monkeypatch):
    """They load, take adapters, train, are saved, loaded again and score the same."""
    checkpoint = tmp_path / "clip.pt"
    small_checkpoint(name, checkpoint, monkeypatch)
    config = {"backbone": name, "pretrained": str(checkpoint), "lora": 2, "seed": 0, "steps": 1,
              "batch": 1, "learning_rate": 1e-3, "cosine": True,
              "sha256": {"pretrained": vlmrm.digest(checkpoint)}}
    model = vlmrm.prepare_model(config, "cpu")
    torch.testing.assert_close(model.mean.flatten(), 255 * torch.tensor(mean))
    log = vlmrm.train(model, toy, INSTRUCTIONS, vlmrm.triplet_loss, config)
    assert np.isfinite(log[0]["loss"])
    picture = toy.pictures(0)[:1]
    model.low_precision = False
    rewards = model.eval().score(picture, "open the drawer")
    save_file(vlmrm.trained_weights(model), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6  # the adapters alone
    (tmp_path / "config.json").write_bytes(vlmrm.to_json(config))
    again = vlmrm.load_reward_model(tmp_path, device="cpu")
    again.low_precision = False
    assert again.score(picture, "open the drawer") == pytest.approx(rewards, abs=1e-5)
    checkpoint.write_bytes(b"other")
    with pytest.raises(vlmrm.InputError, match="weights of its backbone"):
        vlmrm.load_reward_model(tmp_path, device="cpu")

OPENAI, HALF = open_clip.OPENAI_DATASET_MEAN, (0.5, 0.5, 0.5)

@pytest.mark.parametrize("name, tag, quick_gelu, mean", [
    ("ViT-B-32", "openai", True, OPENAI), ("ViT-B-32-quickgelu", "openai", True, OPENAI),
    ("ViT-B-32", "laion2b_s34b_b79k", False, OPENAI), ("ViT-B-32", "a.pt", False, OPENAI),
    ("ViT-L-14", "laion2b_s32b_b82k", False, HALF), ("ViT-L-14", "openai", True, OPENAI),
    ("ViT-L-14", "none", False, OPENAI)])
def test_activation_and_colours_are_those_of_the_weights(
        name, tag, quick_gelu, mean, tmp_path, monkeypatch):
    """Also when a run of all weights is loaded, which brings its own."""
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda name, weights, **options:
                        asked.append((weights, options)))
    monkeypatch.setattr(vlmrm, "RewardModel", lambda *parts: parts)
    for load, weights in ((True, None if tag == "none" else tag), (False, None)):
        _, _, colours, _ = vlmrm.build_backbone(name, tag, load)
        assert tuple(colours) == tuple(mean)
        assert asked.pop() == (weights, {"force_quick_gelu": quick_gelu})
    config = {"backbone": name, "pretrained": tag, "lora": 0, "seed": 0, "cosine": True}
    (tmp_path / "config.json").write_bytes(vlmrm.to_json(config))
    monkeypatch.setattr(vlmrm, "build_backbone", lambda *names: asked.append(names))
    with pytest.raises(vlmrm.InputError):  # there is no model
        vlmrm.load_reward_model(tmp_path, device="cpu")
    assert asked == [(name, tag, False)]

# Training -------------------------------------------------

def test_batch_is_ordered_and_of_training_experts_of_different_seen_tasks(toy):
    """Not even a split that says otherwise makes it train on an unseen task."""
    data = vlmrm.Dataset(toy.path)
    data.split = np.full_like(toy.split, "train")
    assert set(vlmrm.training_episodes(data)) == set(list(COLORS)[:3])
    episodes = vlmrm.training_episodes(toy)
    assert set(episodes) == set(list(COLORS)[:3])
    for seed in range(50):
        chosen, frame_ids = vlmrm.sample_batch(episodes, 10, np.random.default_rng(seed), batch=2)
        assert len(set(toy.task[chosen])) == 2 and set(toy.split[chosen]) == {"train"}
        assert set(toy.source[chosen]) == {"expert"} and frame_ids.shape == (2, 5)
        assert (np.diff(frame_ids, axis=1) > 0).all() and frame_ids.max() < 10
        assert (frame_ids[:, 2] == frame_ids[:, 1] + 1).all()
        assert (frame_ids[:, 0] < 2).all() and (frame_ids[:, 4] >= 8).all()

def test_a_batch_may_be_larger_than_the_number_of_tasks():
    """Then some repeat. Where it is not, what is drawn stays what it has always been: saved runs
    depend on it."""
    episodes = {"a": np.array([0, 1]), "b": np.array([2, 3, 4]), "c": np.array([5, 6])}
    chosen, frame_ids = vlmrm.sample_batch(episodes, 24, np.random.default_rng(0), 3)
    assert chosen.tolist() == [6, 1, 3]
    assert frame_ids.tolist() == [[1, 3, 4, 5, 20], [0, 13, 14, 22, 23], [2, 19, 20, 21, 22]]
    chosen, frame_ids = vlmrm.sample_batch(episodes, 24, np.random.default_rng(0), 200)
    assert set(chosen) == set(range(7)) and frame_ids.shape == (200, 5)
    counts = np.bincount(np.searchsorted([2, 5], chosen, side="right"))  # a, b, c
    assert counts.min() > 40  # of 200 / 3 on average

def test_rate_by_hand():
    """Forty steps: four up, and a cosine down from the first, half of the peak in the middle."""
    assert vlmrm.rate_at(1, 40, 8.0) == 2
    assert vlmrm.rate_at(21, 40, 8.0) == pytest.approx(4)
    assert vlmrm.rate_at(40, 40, 8.0) == pytest.approx(4 - 4 * math.cos(math.pi / 40))

def train_toy(toy, loss, steps=80):
    torch.manual_seed(0)
    model = vlmrm.build_backbone("tiny", "none")
    config = {"steps": steps, "batch": 3, "learning_rate": 2e-3, "seed": 0}
    return model, vlmrm.train(model, toy, INSTRUCTIONS, loss, config)

def test_training_learns_and_beats_the_untrained_model(toy, tiny):
    """And says in its log which share of the neighbours in time each batch had in order."""
    ordered = []

    def loss(frames, texts, times):
        rewards = (frames * texts[:, None]).sum(-1)
        ordered.append(float((rewards[:, 1:] > rewards[:, :-1]).double().mean()))
        return vlmrm.triplet_loss(frames, texts, times)

    trained, log = train_toy(toy, loss)
    assert [entry["ordered"] for entry in log] == pytest.approx(ordered)
    assert np.mean([entry["loss"] for entry in log[-5:]]) < 0.5 * log[0]["loss"]
    before = vlmrm.evaluate(tiny, toy, INSTRUCTIONS)["seen"]
    after = vlmrm.evaluate(trained, toy, INSTRUCTIONS)["seen"]
    assert after["voc"]["value"] > 0.8 > before["voc"]["value"] + 0.2
    assert after["ranking_accuracy_within"]["value"] > before["ranking_accuracy_within"]["value"]
    assert after["ranking_accuracy_within"]["value"] > 0.55  # by chance .5

def test_a_loss_that_asks_for_what_was_before_gets_it(toy):
    """What the model was before the first step, without a gradient, all along."""
    batches = []

    def loss(frames, texts, times, before):
        batches.extend([(frames.detach(), texts.detach()), before])
        return vlmrm.triplet_loss(frames, texts, times)

    train_toy(toy, loss, steps=2)
    first, first_before, second, second_before = batches
    assert not first_before[0].requires_grad and not first_before[1].requires_grad
    torch.testing.assert_close(first_before, first)
    assert (second[1] - second_before[1]).abs().max() > 1e-4
    # Three tasks in either batch: the same sentences, in some order.
    torch.testing.assert_close(second_before[1].sort(0).values, first[1].sort(0).values)

# Evaluation -----------------------------------------------

class Oracle(torch.nn.Module):
    """Stands in for a model: the embedding of a toy picture lies at an angle that its square's
    place decides, so that its cosine with the sentences of drawer-open-v3 grows with the place, and
    falls with all others: a perfect reward, or its negative."""
    mean = torch.zeros(3)

    def embed_frames(self, pictures):
        place = (pictures.max(-1) > 128).any(-2).argmax(-1) / 32  # (..., )
        angle = torch.from_numpy((1 - place) * math.pi / 2).float()
        return torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)

    def embed_texts(self, sentences):
        entry = INSTRUCTIONS["drawer-open-v3"]
        own = [entry["instruction"], *entry["paraphrases"]]
        signs = [1.0 if sentence in own else -1.0 for sentence in sentences]
        return torch.tensor([signs, [0.0] * len(signs)]).T

def test_a_perfect_model_gets_perfect_scores(toy):
    """And a task without test experts has no VOC: it is left out, no NaN."""
    data = vlmrm.Dataset(toy.path)
    data.split[data.select(task="push-v3", source="expert")] = "train"
    no_opposite = {"push-v3": INSTRUCTIONS["push-v3"] | {"opposite": None}}
    with np.errstate(invalid="ignore"):
        report = vlmrm.evaluate(Oracle(), data, INSTRUCTIONS | no_opposite)
    for group, sign in (("seen", -1), ("unseen", 1)):
        found = {metric: cell["value"] for metric, cell in report[group].items()}
        assert sign * found["voc"] > 0.98 and found["voc_paraphrase"] == found["voc"]
        for pairs in ("within", "same_time", "across"):
            assert sign * (2 * found[f"ranking_accuracy_{pairs}"] - 1) > 0.9
        assert found["success_auroc"] == found["retrieval_top1"] == (sign > 0)
    assert found["opposite_gap"] == 2 * found["voc"] == -2 * found["voc_opposite"]
    assert report["sentences"] == 50 == len(vlmrm.distinct_sentences(INSTRUCTIONS))
    assert set(report["tasks"]) == set(COLORS) and "voc" not in report["tasks"]["push-v3"]
    assert report["seen"]["voc"]["tasks"] == 2
    assert report["seen"]["ranking_accuracy_within"]["tasks"] == 3

def test_few_pairs_are_no_ranking(toy, monkeypatch):
    """A task has as many pairs at the same time as are counted by hand; with fewer than asked for
    it has no ranking there, but all other metrics."""
    data = vlmrm.Dataset(toy.path)
    episodes = data.select(split="test", source="mixed", task="push-v3")
    truth = data.rewards[episodes]
    pairs = 0
    for one, other in itertools.permutations(truth, 2):
        pairs += int((one > other + 0.1).sum())
    before = vlmrm.evaluate(Oracle(), data, INSTRUCTIONS)["tasks"]["push-v3"]
    assert before["pairs_same_time"] == pairs > 0
    monkeypatch.setattr(vlmrm, "FEWEST_PAIRS", pairs)
    assert "ranking_accuracy_same_time" in vlmrm.evaluate(
        Oracle(), data, INSTRUCTIONS)["tasks"]["push-v3"]
    monkeypatch.setattr(vlmrm, "FEWEST_PAIRS", pairs + 1)
    after = vlmrm.evaluate(Oracle(), data, INSTRUCTIONS)["tasks"]["push-v3"]
    assert set(before) - set(after) <= {"ranking_accuracy_same_time"}
    assert "ranking_accuracy_same_time" not in after

def test_tasks_with_one_sentence_are_no_rivals(toy):
    """Of four tasks two have the same: three sentences, which the oracle tells apart."""
    instructions = {task: dict(INSTRUCTIONS[task], opposite=None) for task in COLORS}
    instructions["sweep-v3"]["instruction"] = instructions["push-v3"]["instruction"]
    report = vlmrm.evaluate(Oracle(), toy, instructions)
    assert report["sentences"] == 3
    assert {"voc", "retrieval_top1"} <= set(report["tasks"]["push-v3"])
    assert vlmrm.distinct_sentences(instructions).count(INSTRUCTIONS["push-v3"]["instruction"]) == 1

def test_evaluation_shares_out_the_cores_and_gives_them_back(toy, tiny):
    """One task at a time with one core, three at once with three: the same rewards."""
    threads = torch.get_num_threads()
    reports = []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            reports.append(vlmrm.evaluate(tiny, toy, INSTRUCTIONS))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(threads)
    one, three = reports
    assert list(one["predicted"]) == list(three["predicted"])
    assert list(one["tasks"]) == list(three["tasks"])
    rewards = list(three["predicted"].values())
    np.testing.assert_allclose(rewards, list(one["predicted"].values()), atol=1e-5)

# A run: its folder, stopping, damage ----------------------

@pytest.fixture
def program(toy, tmp_path, monkeypatch):
    """The program on the toy data, in this process. It does not draw, which takes the longest."""
    monkeypatch.setattr(
        vlmrm, "draw_curves", lambda *arguments: vlmrm.write_whole(arguments[-1], b"\x89PNG"))

    def run(*options, runs="runs"):
        settings = ["--data", toy.path, "--steps", 4, "--batch", 2, "--device", "cpu",
                    "--runs", tmp_path / runs]
        return vlmrm.main([str(setting) for setting in (*settings, *options)])
    return run

@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A finished run with adapters, with more videos a step than tasks, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    options = ["--steps=2", "--batch=7", "--seed=1", "--lora=2", "--device=cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert vlmrm.main([*options, f"--data={toy.path}", f"--runs={runs}"]) == 0
    return runs / "triplet-seed1", printed.getvalue()

def one_line(capsys, says):
    """What was printed to stderr but progress bars is one line, and says so."""
    lines = []
    for line in re.split(r"[\r\n]", capsys.readouterr().err):
        if line.strip() and not re.search(r"\d+%\|", line):
            lines.append(line)
    assert len(lines) == 1 and lines[0].startswith("vlmrm: ") and says in lines[0], lines

def began_at(printed):
    """The steps at which the progress bars of training began: "2/4" for a run that goes on."""
    return re.findall(r"training:[^\r\n]*\| (\d+/\d+) \[00:00<\?", printed)

def test_run_folder(finished, toy):
    """Everything is there, printed as it is kept, and how many were trained and tested on."""
    folder, printed = finished
    assert sorted(os.listdir(folder)) == [
        "config.json", "curves.png", "metrics.json", "model.safetensors"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = vlmrm.read_json(folder / "config.json")
    assert (config["steps"], config["seed"], config["cosine"]) == (2, 1, True)
    metrics = vlmrm.read_json(folder / "metrics.json")
    for group in ("seen", "unseen"):
        for entry in metrics[group].values():
            low, high = entry["interval"]
            cell = f" {entry['value']:.2f}"
            if entry["tasks"] > 1:  # one task has no interval
                cell += f" [{low:.2f}, {high:.2f}]"
            assert cell + " " in printed
    assert {int(e) for e in metrics["predicted"]} == set(toy.select(split="test"))
    assert {len(rewards) for rewards in metrics["predicted"].values()} == {10}
    assert [entry["step"] for entry in metrics["log"]] == [1, 2]
    assert (metrics["torch"], metrics["device"]) == (torch.__version__, "cpu")
    assert "15 episodes to train on, 32 to test" in printed  # 3 x 5; 3 x (2 + 4) + 14

def test_a_finished_run_is_not_done_again(program, tmp_path, capsys):
    """It says so. What a kill has left goes, and a report that is none is one line."""
    assert program("--objective", "zeroshot") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "zeroshot-seed0"
    for name in ("checkpoint.pt", "metrics.json.7.unfinished"):
        (folder / name).touch()
    assert program("--objective", "zeroshot") == 0
    again = capsys.readouterr().out
    assert f"zeroshot, seed 0: done before; delete {folder} to repeat it\n" in again
    assert again.partition("\n")[2] == printed.partition("\n")[2]
    assert len(os.listdir(folder)) == 4
    (folder / "metrics.json").write_text("{}")
    assert program("--objective", "zeroshot") == 2
    one_line(capsys, "metrics.json")

@pytest.mark.parametrize("name", ["vlmrm.py", "own/own.py", "own/neighbour.py", "weights"])
def test_another_file_is_another_run(tmp_path, monkeypatch, name):
    """One byte more in the program, an objective, a file beside it, or weights without a suffix."""
    (tmp_path / "own").mkdir()
    for file in ("own/own.py", "own/neighbour.py"):
        (tmp_path / file).write_text("def reward(frames, text): return frames @ text\n")
    (tmp_path / "weights").write_bytes(b"1")
    shutil.copy(vlmrm.__file__, tmp_path / "vlmrm.py")
    args = vlmrm.parse_arguments([f"--pretrained={tmp_path / 'weights'}"])

    def configure():
        return vlmrm.configuration(args, str(tmp_path / "own" / "own.py"), 0)

    before = configure()
    assert configure() == before
    with open(tmp_path / name, "a") as file:
        file.write("\n")
    if name == "vlmrm.py":  # its checksum is that of the code that runs
        assert vlmrm.THIS_FILE == vlmrm.digest(vlmrm.__file__)
        monkeypatch.setattr(vlmrm, "THIS_FILE", vlmrm.digest(tmp_path / name))
    after = configure()
    assert after["sha256"] != before["sha256"]
    assert after | {"sha256": {}} == before | {"sha256": {}}
    for config, folder in ((before, "own-seed0"), (after, "own-seed0-2"), (before, "own-seed0")):
        assert vlmrm.claim_folder(config, tmp_path)[0] == tmp_path / folder

@pytest.fixture
def stop(monkeypatch):
    """From when it is called: Ctrl-C when two steps of a run are saved."""
    save = vlmrm.save_checkpoint

    def save_and_stop(path, model, optimizer, rng, log, config):
        save(path, model, optimizer, rng, log, config)
        if len(log) == 2:
            raise KeyboardInterrupt

    return lambda: monkeypatch.setattr(vlmrm, "save_checkpoint", save_and_stop)

def contents(folder):
    """The files of a finished run, without times."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, json.loads(files.pop("metrics.json")) | {"wall_seconds": 0}

def test_a_stopped_run_goes_on_to_the_same_end(program, tmp_path, stop, capsys):
    """Ctrl-C after the second checkpoint of four: the same command ends with the bytes of the run
    that was never stopped, also if it looks back at where it began."""
    settings = ("--objective", "anchored", "--lora", 2)
    assert program(*settings, runs="whole") == 0
    stop()
    assert program(*settings) == 130
    folder = tmp_path / "runs" / "anchored-seed0"
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "config.json"]
    assert "vlmrm: stopped" in capsys.readouterr().err
    assert program(*settings) == 0
    assert began_at(capsys.readouterr().err)[0] == "2/4"
    assert contents(folder) == contents(tmp_path / "whole" / "anchored-seed0")
    assert os.listdir(tmp_path / "runs") == ["anchored-seed0"]

def test_the_whole_comparison_on_another_backbone(program, tmp_path, stop, capsys):
    """One command, with a checkpoint of random weights; stopped once in every run that trains, and
    given again each time."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"width": 32, "heads": 2, "layers": 1}
    small = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "small.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path / "small.json")
    weights = tmp_path / "small.safetensors"
    save_file(open_clip.create_model("small").state_dict(), weights)
    stop()
    settings = ("--objective", "all", "--backbone", "small", "--pretrained", weights)
    statuses = [program(*settings, "--learning-rate", 1e-4) for _ in range(6)]
    assert statuses == [130] * 5 + [0]
    table = capsys.readouterr().out.partition("| objective |")[2]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == list(vlmrm.OBJECTIVES)

def test_a_checkpoint_of_something_else_is_refused(program, tmp_path, stop, capsys):
    """Cut short, with a bit turned, of another run, with a weight less."""
    stop()
    assert program() == program("--seed", 1) == 130
    capsys.readouterr()
    own = tmp_path / "runs" / "triplet-seed0" / "checkpoint.pt"
    whole = own.read_bytes()
    half = len(whole) // 2
    less = torch.load(own, weights_only=True)
    del less["weights"][min(less["weights"])]
    torch.save(less, tmp_path / "less.pt")
    bad = {whole[:5000]: "cannot read",
           whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]: "it is damaged",
           (tmp_path / "runs" / "triplet-seed1" / "checkpoint.pt").read_bytes(): "another run",
           (tmp_path / "less.pt").read_bytes(): "1 weights too many or missing"}
    for content, says in bad.items():
        own.write_bytes(content)
        assert program() == 2
        one_line(capsys, says)

@pytest.mark.parametrize("writes", [0, 4])
def test_a_full_disk_ends_in_one_line(program, tmp_path, monkeypatch, capsys, writes):
    """Full after so many files: one line, whole files only, and the same command goes on in the
    same folder. The first four are checkpoints."""
    replace = os.replace
    written = []

    def full(source, target):
        if len(written) == writes:
            raise OSError("No space left on device")
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert program() == 2
    one_line(capsys, "No space left")
    folder = tmp_path / "runs" / "triplet-seed0"
    left = ["checkpoint.pt", "config.json"] if writes else []
    assert [path.name for path in sorted(folder.glob("*"))] == left
    monkeypatch.setattr(os, "replace", replace)
    assert program() == 0
    assert began_at(capsys.readouterr().err)[0] == ("4/4" if writes else "0/4")
    assert os.listdir(tmp_path / "runs") == ["triplet-seed0"] and len(os.listdir(folder)) == 4

def test_a_folder_is_of_who_made_it(program, toy, tmp_path, monkeypatch, capsys):
    """A second process of the same command that fails takes nothing away; nor does one without the
    data. A kill before or after config.json leaves a folder that is used."""
    folder = tmp_path / "runs" / "triplet-seed0"
    args = vlmrm.parse_arguments([f"--data={toy.path}", "--steps=4", "--batch=2"])
    folder.mkdir(parents=True)  # killed before config.json
    config = vlmrm.configuration(args, "triplet", 0)
    assert vlmrm.claim_folder(config, folder.parent) == (folder, True)  # and right after it
    with monkeypatch.context() as patch:
        patch.setattr(vlmrm, "build_backbone", lambda *names: vlmrm.read_json("away"))
        assert program() == 2
        one_line(capsys, "cannot read away")
    assert os.listdir(folder) == ["config.json"]
    assert program("--data", tmp_path / "away.npz") == 2
    one_line(capsys, "there is no such file")
    assert os.listdir(folder.parent) == [folder.name] and os.listdir(folder) == ["config.json"]
    assert program() == 0
    assert os.listdir(folder.parent) == [folder.name] and len(os.listdir(folder)) == 4

def test_tables_of_other_comparisons_stay(program, tmp_path, monkeypatch, capsys):
    """The same comparison writes its own again. An objective with two names is one. Formulas are
    none, nor are marks that the font lacks a reason to stop."""
    monkeypatch.undo()  # it draws
    runs = tmp_path / "$runs_^"
    entry = {"instruction": "$_^ push \\frac 🦾", "paraphrases": ["a", "b", "c"]}
    (tmp_path / "own.json").write_text(json.dumps(dict.fromkeys(COLORS, entry)))
    clock = vlmrm.DATA / "objectives" / "clock.py"
    for objectives in (("zeroshot", "clock"), ("clock", "zeroshot"), ("zeroshot", clock, "clock")):
        options = ("--instructions", tmp_path / "own.json", "--objective", *objectives)
        assert program(*options, runs="$runs_^") == 0
    assert len(list(runs.glob("table*"))) == 2
    first = (runs / "table.md").read_text(encoding="utf-8").splitlines()
    second = (runs / "table-2.md").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in first[2:]] == ["zeroshot", "clock"]
    assert [line.split()[1] for line in second[2:]] == ["clock", "zeroshot"]
    assert "±" not in "".join(first)  # of one seed each
    assert f"This table is {runs / 'table-2.md'}" in capsys.readouterr().out

# Using a run ----------------------------------------------

def altered(finished, folder, **changes):
    """A copy of the finished run whose config.json says something else."""
    shutil.copytree(finished[0], folder)
    config = vlmrm.read_json(folder / "config.json") | changes
    (folder / "config.json").write_bytes(vlmrm.to_json(config))
    return folder

def test_using_a_run_never_runs_its_objective(finished, tmp_path):
    """Nor need it be there: config.json says what is to be known. A run comes from anywhere."""
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    run = altered(finished, tmp_path / "run", objective=str(evil))
    vlmrm.load_reward_model(run, "cpu")
    evil.unlink()
    vlmrm.load_reward_model(run, "cpu")
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("changes, says", [
    ({"cosine": False}, "not trained for the cosine"), ({"learning_rate": -1e-3}, "-0.001"),
    ({"learning_rate": 0}, "learning_rate 0"), ({"steps": 0}, "steps 0"), ({"lora": -1}, "lora -1"),
    ({"lora": 3}, "cannot read"), ({"lora": "2"}, "cannot read"), ({"seed": None}, "cannot read"),
    ({"backbone": "no"}, "cannot load no"), ({"sha256": {"pretrained": "0"}}, "weights of its")])
def test_a_run_that_cannot_be_used_is_refused(finished, tmp_path, changes, says):
    with pytest.raises(vlmrm.InputError, match=says):
        vlmrm.load_reward_model(altered(finished, tmp_path / "run", **changes), "cpu")

def test_a_loaded_model_leaves_the_callers_settings(finished):
    """Random numbers, the default device. Its adapters are merged, a sentence is embedded once."""
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = vlmrm.load_reward_model(finished[0], device=torch.device("cpu"))
        drawn.append(torch.rand(1).item())
    assert drawn == pytest.approx([0.4963, 0.7576], abs=1e-4)  # the first of seeds 0 and 1
    assert not model.training and "parametrizations" not in "".join(model.state_dict())
    expected = pytest.approx(model.score(PICTURES, "push"), abs=1e-3)
    with torch.device("meta"):
        model = vlmrm.load_reward_model(finished[0], device="cpu")
        assert model.score(PICTURES, "push") == expected
    model.embed_texts = None
    assert model.score(PICTURES, "push") == expected
    for device in ("meta", "gpu"):
        with pytest.raises(vlmrm.InputError, match=f"no {device} device here"):
            vlmrm.load_reward_model(finished[0], device)

# Command line ---------------------------------------------

@pytest.mark.parametrize("arguments, says", [
    ("--backbone ViT-B-32", "laion2b_s34b_b79k"),
    ("--backbone ViT-B-32 --pretrained ''", "laion2b_s34b_b79k"),
    ("--tasks reach-v3", "--tasks is for --collect"),
    ("--backbone ViT-B-32 --pretrained nonsense", "Without a network, --pretrained takes a file"),
    ("--pretrained missing.safetensors", "cannot read missing.safetensors"),
    ("--data missing.npz", "missing.npz: ValueError: there is no such file"),
    ("--data few.npz --batch 1", "few.npz has no experts to test on"),
    ("--data README.md", "cannot read"), ("--instructions README.md", "JSONDecodeError"),
    ("--instructions towel.json", "-v3"), ("--runs README.md", "README.md"),
    ("--objective clip --batch 1", "larger --batch"),
    ("--collect --tasks drawer-opn-v3 --data x.npz", "drawer-open-v3"),
    ("--collect --data README.md", "File exists"),
    ("--objective tripplet", "'tripplet' is not all, triplet, tcn"),
    ("--objective missing.py", "or a Python file"), ("--steps 1.5", "invalid int value"),
    ("--steps 0", "steps 0 is not between 1 and"), ("--seeds 0", "seeds 0 is not between"),
    ("--batch 0", "batch 0 is not between"), ("--device tpu", "invalid choice"),
    ("--learning-rate nan", "nan is not between"), ("--learning-rate 0", "0.0 is not between"),
    ("--collect --frames 4", "not between 5 and"), ("--lora -1", "not between 0 and"),
    ("--collect --frames 200 --data x.npz", "--frames x --size is over 16383"),
    ("--resume runs/x", "--resume")])
def test_bad_input_is_one_line(program, arguments, says, capsys, monkeypatch, tmp_path):
    """And exit code 2. Nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no data")
    Path("towel.json").write_text('{"fold": {"instruction": "a", "paraphrases": ["b", "c", "d"]}}')
    experts = [toy_episode("reach-v3", seed) for seed in range(3)]  # too few to test on
    vlmrm.write_dataset("few.npz", vlmrm.assign_splits(experts))
    options = shlex.split(arguments)
    if options[0] == "--collect":  # without the toy data's options
        assert vlmrm.main(options) == 2
    else:
        assert program(*options) == 2
    one_line(capsys, says)
    assert not list(tmp_path.glob("runs/*")) and not Path("x.npz").exists()

def test_too_little_memory_is_one_line(monkeypatch, capsys):
    """Whoever says so. Any other error is ours, and is shown as it is."""
    def fails(args):
        raise problem

    monkeypatch.setattr(vlmrm, "run_all", fails)
    for problem in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                    RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert vlmrm.main([]) == 2
        one_line(capsys, "try a smaller --batch")
    problem = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        vlmrm.main([])

def test_a_checksum_of_files_knows_their_borders(tmp_path):
    """What moves from one file to the next changes it."""
    digests = set()
    for contents in (b"ab", b"c"), (b"a", b"bc"):
        files = []
        for name, content in zip("xy", contents):
            (tmp_path / name).write_bytes(content)
            files.append(tmp_path / name)
        digests.add(vlmrm.digest(*files))
    assert len(digests) == 2 and vlmrm.digest(files[0]) == hashlib.sha256(b"a").hexdigest()

PYTHON = [HERE / "vlmrm.py", HERE / "test_vlmrm.py", *sorted((HERE / "data").rglob("*.py"))]

@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_the_code_keeps_to_its_own_rules(path):
    """Lines of at most 100 characters, no function beyond 50 lines, docstrings in vlmrm.py; no
    pickle is loaded; what is taken from vlmrm.py exists."""
    source = path.read_text(encoding="utf-8")
    assert max(len(line) for line in source.splitlines()) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
            top = path.name == "vlmrm.py" and node.col_offset == 0
            assert ast.get_docstring(node) or not top, node.name
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
    assert not re.search(r"import pickl[e]|allow_pickle=Tru[e]", source)
    for name in set(re.findall(r"\bvlmrm\.([A-Za-z_]\w*)", source)) - {"py"}:
        assert hasattr(vlmrm, name), name

# vlmrm.py alone in a folder, with its three data files ----

def command(*arguments, cwd, **environment):
    """vlmrm.py in a process of its own: (exit code, stdout, stderr)."""
    line = [sys.executable, "vlmrm.py", *map(str, arguments)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ, PYTHONPATH="", **environment))
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

def test_alone_several_objectives_are_compared(alone):
    """One table, mean ± std over the seeds, in the order asked for; also where HOME cannot be
    written, matplotlib is told to use LaTeX and a backend that is missing, RANK is set, and the
    terminal has no ±."""
    (alone / "matplotlibrc").write_text("text.usetex: True\n")
    status, printed, error = command(
        "--objective", "zeroshot", "triplet", "--seeds", 2, "--steps", 2, "--batch", 3, cwd=alone,
        HOME="/dev/null", MATPLOTLIBRC=str(alone), RANK="1", PYTHONIOENCODING="ascii",
        MPLBACKEND="module://of.a.notebook")
    assert status == 0, error
    runs = alone / "runs"
    assert len(os.listdir(runs)) == 2 * 2 + 1
    table = (runs / "table.md").read_text(encoding="utf-8")
    assert "±" in table and table.replace("±", "?") in printed
    for name, line in zip(("zeroshot", "triplet"), table.splitlines()[2:], strict=True):
        first = vlmrm.read_json(runs / f"{name}-seed0" / "metrics.json")
        second = vlmrm.read_json(runs / f"{name}-seed1" / "metrics.json")
        metrics = ("voc", "voc_opposite", "ranking_accuracy_same_time")
        columns = itertools.product(metrics, ("seen", "unseen"))
        for (metric, group), cell in zip(columns, line.split("|")[2:-1], strict=True):
            if metric in first[group]:
                a = first[group][metric]["value"]
                b = second[group][metric]["value"]
                # Of two numbers the sample's std is the difference over sqrt 2.
                assert cell.startswith(f" {(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}")
                tasks = first[group][metric]["tasks"]  # with one there is nothing to flip
                assert ("(p " in cell) == (name == "triplet" and tasks > 1)

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_alone_it_is_killed_stopped_and_goes_on_to_the_same_bytes(alone, toy, program, tmp_path):
    """Killed at the first checkpoint, Ctrl-C after a later one, then the same command to the end:
    the weights are those of a run that was never stopped."""
    options = ["--steps", "20", "--batch", "2", "--device", "cpu", "--runs", "killed"]
    folder = alone / "killed" / "triplet-seed0"
    saved = folder / "checkpoint.pt"
    for sign, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        with subprocess.Popen([sys.executable, "vlmrm.py", *options], cwd=alone,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while not saved.exists() or saved.stat().st_mtime_ns == before:
                time.sleep(0.01)
            process.send_signal(sign)
            error = process.stderr.read().decode()
        assert process.returncode == code, error
        assert not (folder / "model.safetensors").exists()
    assert "vlmrm: stopped" in error and "Traceback" not in error
    status, _, error = command(*options, cwd=alone)
    assert status == 0, error
    assert began_at(error)[0] in [f"{step}/20" for step in range(4, 20, 2)]  # two or more saved
    assert len(os.listdir(folder)) == 4 and os.listdir(folder.parent) == [folder.name]
    assert program("--steps", 20) == 0
    whole = (tmp_path / "runs" / "triplet-seed0" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == whole

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_during_the_imports_is_no_traceback():
    with subprocess.Popen([sys.executable, "vlmrm.py", "--data", "missing.npz"], cwd=HERE,
                          stderr=subprocess.PIPE) as process:
        time.sleep(1)  # the imports take about four
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT

# README: its commands and its Python run, on the toy data ---

README = (HERE / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python vlmrm\.py ((?!--collect)[^`\n]*?)(?:  +#[^\n]*|`|\n)", README)
BLOCKS = []
for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    marks = [pytest.mark.rendering] if "open_task" in block else []
    BLOCKS.append(pytest.param(block, marks=marks))

@pytest.fixture(scope="module")
def reader(finished, tmp_path_factory):
    """A folder as a reader of the page has it: the data, a trained model."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "runs").mkdir()
    (folder / "data").symlink_to(HERE / "data")
    (folder / "runs" / "triplet-seed0").symlink_to(finished[0])
    (folder / "mine").mkdir()
    for name, code in re.findall(r"```python\n# (mine/\w+\.py)\n(.*?)```", README, re.DOTALL):
        (folder / name).write_text(code)
    return folder

@pytest.mark.parametrize("block", BLOCKS)
def test_readme_python_runs(block, reader, monkeypatch, request):
    """The rewards in it are numbers."""
    monkeypatch.chdir(reader)
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    if "open_task" in block:
        request.getfixturevalue("rendering")
    names = {"__name__": "README"}
    exec(compile(block, "README.md", "exec"), names)
    assert np.isfinite(names.get("rewards", 0)).all() and np.isfinite(names.get("reward", 0))
    if "renderer" in names:
        names["renderer"].close()

@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_readme_commands_run(line, reader, toy, monkeypatch, capsys):
    """With a step. What needs a download must fail for that reason, and nothing else."""
    monkeypatch.chdir(reader)
    arguments = shlex.split(line)
    args = vlmrm.parse_arguments(arguments)
    arguments += ["--steps=1", "--seeds=1", "--device=cpu", "--runs=tried", "--batch=2"]
    arguments += [f"--data={toy.path}", "--instructions=data/instructions.json"]
    if args.pretrained not in (None, "none"):  # a download, or a file that is not here
        monkeypatch.setattr(open_clip, "create_model", lambda *names, **options: 1 / 0)
        assert vlmrm.main(arguments) == 2
        one_line(capsys, f"cannot load {args.backbone}")
        return
    if args.objective == ["all"]:  # all of them are trained above
        fewer = {name: vlmrm.OBJECTIVES[name] for name in ("tcn", "zeroshot")}
        monkeypatch.setattr(vlmrm, "OBJECTIVES", fewer)
    assert vlmrm.main(arguments) == 0
