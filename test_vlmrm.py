"""Tests of vlmrm.py. Run with: python -m pytest

Every formula is held against something that does not share its code: a value worked out by hand
in the test's docstring, the numbers that the authors' own code returned (data/golden), a library,
or a loop so naive that it cannot be wrong.
"""
import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vlmrm

HERE = Path(__file__).resolve().parent
LOSSES = {name: loss for name, loss in vlmrm.OBJECTIVES.items() if loss}
README = (HERE / "README.md").read_text(encoding="utf-8")


def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


# -----------------------------------------------------------------------------
# Losses against the authors' own code: value and gradient

GOLDEN = json.loads((HERE / "data" / "golden" / "golden.json").read_text(encoding="utf-8"))
# Where the slots of the official batches lie in ours: start, now, next, later, end (, caption).
# VIP and LIV have no "later"; they must not look at it, so any frame will do there: here zeros.
SLOTS = {"r3m": [0, 2, 3, 4, 1], "vip": [0, 2, 3, None, 1], "liv": [0, 2, 3, None, 1, 4]}


def golden(method):
    """The arrays of a method, and its frames in the order of our batch as a leaf for gradients."""
    arrays = {key: torch.from_numpy(array)
              for key, array in np.load(HERE / "data" / "golden" / f"{method}.npz").items()}
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


@pytest.mark.parametrize("similarity, name", [
    (vlmrm.negative_distance, "l2"), (vlmrm.cosine, "cos")])
def test_tcn_golden(similarity, name):
    arrays, frames = golden("r3m")
    loss = vlmrm.tcn_loss(frames, None, similarity, perms=arrays["perms_tcn"].view(3, 2, 6))
    check_golden(loss, "r3m", f"tcn_only_{name}", frames, arrays[f"grad_tcn_only_{name}"])


@pytest.mark.parametrize("variant, weights", [
    ("lang_only_cosinehead", {"tcn_weight": 0, "l1": 0, "l2": 0}), ("full_cosinehead_l2", {}),
    ("lang_only_mlp", {"tcn_weight": 0, "l1": 0, "l2": 0}), ("full_mlp_l2", {})])
def test_r3m_golden(variant, weights):
    arrays, frames = golden("r3m")

    def mlp(start, frame, text):  # the official head, with the weights stored beside the values
        x = torch.cat([start, frame, text], dim=-1)
        for layer in range(5):
            x = F.linear(x, arrays[f"w{layer}"], arrays[f"b{layer}"])
            x = x.relu() if layer < 4 else x
        return x[:, 0]

    official_head = "mlp" in variant
    texts = arrays["lang" if official_head else "lang_same"] * arrays["has_lang"][:, None]
    loss = vlmrm.r3m_loss(frames, texts, head=mlp if official_head else None,
                          perms_language=arrays["perms_lang"].view(3, 3, 6),
                          perms_tcn=arrays["perms_tcn"].view(3, 2, 6), **weights)
    check_golden(loss, "r3m", variant, frames, arrays[f"grad_{variant}"])


@pytest.mark.parametrize("variant, options", [
    ("neg0", {"negatives": 0, "l1": 0, "l2": 0}), ("neg3", {"l1": 0, "l2": 0}), ("ego4d_cfg", {})])
def test_vip_golden(variant, options):
    arrays, frames = golden("vip")
    perms = arrays["perms"] if variant != "neg0" else None
    loss = vlmrm.vip_loss(frames, None, perms=perms, **options)
    check_golden(loss, "vip", variant, frames, arrays[f"grad_{variant}"])


@pytest.mark.parametrize("variant, options", [
    ("finetune_cos_neg0", {}), ("all_cos_neg0", {"language_weight": 1}),
    ("pretrain_cos_neg3", {"language_weight": 1}),
    ("all_l2_neg3", {"language_weight": 1, "similarity": vlmrm.negative_distance})])
def test_liv_golden(variant, options):
    arrays, frames = golden("liv")
    if variant.endswith("neg3"):
        options = options | {"perms_vision": arrays["perms_visual"],
                             "perms_language": arrays["perms_lang"]}
    texts = arrays["text"].clone().requires_grad_()
    loss = vlmrm.liv_loss(frames, texts, **options)
    check_golden(loss, "liv", variant, frames, arrays[f"grad_emb_{variant}"])
    torch.testing.assert_close(texts.grad, arrays[f"grad_text_{variant}"], rtol=1e-6, atol=1e-12)


# -----------------------------------------------------------------------------
# Losses by hand: two videos on the axes of a plane, one that rises and one that falls

E0, E1 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_triplet_by_hand():
    """Rewards 0, 0, 0, 0, 1 under the text e0. Four pairs rise by 1: max(0, .1 - 1) = 0; six are
    level: .1 each. Mean over ten pairs: .06."""
    frames = torch.stack([E1, E1, E1, E1, E0])[None]
    assert vlmrm.triplet_loss(frames, E0[None], margin=0.1).item() == pytest.approx(0.06)


def test_clip_by_hand():
    """Two videos, each frame equal to its text, texts orthogonal, scale 1: M = I, and each row
    costs log(e + 1) - 1 = .313262 in both directions."""
    frames = torch.stack([E0, E1])[:, None].expand(2, 5, 2)
    loss = vlmrm.clip_loss(frames, torch.stack([E0, E1]), scale=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 1) - 1, rel=1e-6)


def test_tcn_by_hand():
    """One video, so no negatives but (s2, s0). s0 = s1 = e0, s2 = e1: the pair (s1, s0) has
    distance 0, the others sqrt 2. First term: log 2 (two equal logits); second:
    log(1 + exp(-sqrt 2))."""
    frames = torch.stack([E0, E0, E0, E1, E1])[None]
    by_hand = (math.log(2) + math.log(1 + math.exp(-math.sqrt(2)))) / 2
    assert vlmrm.tcn_loss(frames, E0[None]).item() == pytest.approx(by_hand, rel=1e-5)


def test_r3m_by_hand():
    """One video that never moves, no penalty: every contrast is between two equal logits, three in
    the language term and two in TCN. log 2 + log 2."""
    frames = E0.expand(1, 5, 2)
    loss = vlmrm.r3m_loss(frames, E0[None], l1=0, l2=0)
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-5)


def test_vip_by_hand():
    """start = now = e1, next = end = e0, gamma .98: V(start) = V(now) = -sqrt 2, V(next) = 0.
    (1 - .98) sqrt 2 + (1 + V(now) - .98 V(next)) = .02 * 1.414214 + 1 - 1.414214 = -.385929."""
    frames = torch.stack([E1, E1, E0, E0, E0])[None]
    loss = vlmrm.vip_loss(frames, None, negatives=0, l1=0, l2=0)
    assert loss.item() == pytest.approx(1 - 0.98 * math.sqrt(2), rel=1e-5)


def test_liv_by_hand():
    """The same frames under cos / (1 - gamma) = 50 cos: V(start) = V(now) = 0, V(next) = 50.
    CLIP of one pair: 0. Value: -0 + 1 + 0 - .98 * 50 = -48, floored at log 1e-8 = -18.42068."""
    frames = torch.stack([E1, E1, E0, E0, E0])[None]
    assert vlmrm.liv_loss(frames, E0[None]).item() == pytest.approx(math.log(1e-8), rel=1e-5)


# -----------------------------------------------------------------------------
# Losses against a library, or against the equations with loops, exp and log


def test_triplet_is_torchs_triplet():
    """With D = 1 - cos as distance, torch's triplet loss on every (text, later, earlier)."""
    frames, texts = unit(6, 5, 8), unit(6, 8, seed=1)
    pairs = [(i, j) for j in range(5) for i in range(j)]
    theirs = np.mean([F.triplet_margin_with_distance_loss(
        texts, frames[:, late], frames[:, early], margin=0.1,
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)).item()
        for early, late in pairs])
    assert vlmrm.triplet_loss(frames, texts).item() == pytest.approx(theirs, rel=1e-9)


def test_clip_is_open_clips_loss():
    frames, texts = unit(6, 5, 8).float(), unit(6, 8, seed=1).float()
    theirs = np.mean([open_clip.ClipLoss()(frames[:, k], texts, 1 / 0.07).item() for k in range(5)])
    assert vlmrm.clip_loss(frames, texts).item() == pytest.approx(theirs, rel=1e-5)


def naive_contrast(positive, negatives):
    a = math.exp(positive)
    return -math.log(1e-8 + a / (1e-8 + a + sum(math.exp(n) for n in negatives)))


def naive_tcn(x, l, similarity=lambda a, b: -np.linalg.norm(a - b)):
    B, terms = len(x), []
    for i in range(B):
        s0, s1, s2 = x[i, 1], x[i, 2], x[i, 3]
        others = [(i + k) % B for k in (1, 2, 3)]
        far = similarity(s2, s0)
        terms.append(naive_contrast(similarity(s2, s1),
                                    [far] + [similarity(s2, x[j, 3]) for j in others]) / 2)
        terms.append(naive_contrast(similarity(s1, s0),
                                    [far] + [similarity(s0, x[j, 1]) for j in others]) / 2)
    return sum(terms) / B


def naive_r3m(x, l):
    B, language = len(x), 0
    for i in range(B):
        for positive, negative in ((4, 0), (2, 1), (3, 2)):
            others = [x[(i + k) % B, positive] @ l[i] for k in (1, 2, 3)]
            language += naive_contrast(x[i, positive] @ l[i], [x[i, negative] @ l[i]] + others) / 3
    return naive_tcn(x, l) + language / B + 1e-5 * (np.abs(x).sum(-1).mean() + 1)


def naive_value(V, x, goal, others):
    B = len(x)
    own = [math.exp(1 + V(x[i, 1], goal[i]) - 0.98 * V(x[i, 2], goal[i])) for i in range(B)]
    loss = -0.02 * np.mean([V(x[i, 0], goal[i]) for i in range(B)]) + math.log(1e-8 + np.mean(own))
    if others:
        mixed = [math.exp(1 + V(x[(i + k) % B, 1], goal[i]) - 0.98 * V(x[(i + k) % B, 2], goal[i]))
                 for i in range(B) for k in others]
        loss += math.log(1e-8 + np.mean(mixed))
    return loss


def naive_vip(x, l):
    penalised = x[:, [0, 1, 2, 4]]
    return (naive_value(lambda a, g: -np.linalg.norm(a - g), x, x[:, 4], (1, 2, 3))
            + 1e-3 * (np.abs(penalised).sum(-1).mean() + 1))


def naive_liv(x, l):
    logits = x[:, 4] @ l.T
    clip = -(np.diag(scipy.special.log_softmax(logits, 1)).mean()
             + np.diag(scipy.special.log_softmax(logits, 0)).mean()) / 2
    return clip + naive_value(lambda a, g: 50 * (a @ g), x, x[:, 4], ())


@pytest.mark.parametrize("name", ["tcn", "r3m", "vip", "liv"])
def test_naive_version(name):
    frames, texts = unit(6, 5, 8), unit(6, 8, seed=1)
    naive = globals()[f"naive_{name}"](frames.numpy(), texts.numpy())
    assert LOSSES[name](frames, texts).item() == pytest.approx(naive, rel=1e-9)


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
    loss = LOSSES[name](frames, texts)
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert torch.isfinite(frames.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_videos_is_irrelevant_to_gradients_and_inputs_are_not_changed(name):
    """Turning the batch by one place only turns the gradient by one place."""
    frames, texts = unit(6, 5, 8).requires_grad_(), unit(6, 8, seed=1)
    before = frames.detach().clone()
    first, = torch.autograd.grad(LOSSES[name](frames, texts), frames)
    turned = frames.detach().roll(1, 0).requires_grad_()
    second, = torch.autograd.grad(LOSSES[name](turned, texts.roll(1, 0)), turned)
    torch.testing.assert_close(second, first.roll(1, 0))
    assert torch.equal(frames, before)


def walk(texts):
    """Frames that turn evenly, in five steps, from a direction of their own into their text."""
    start = unit(*texts.shape, seed=7)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    return F.normalize(start[:, None] * (1 - share) + texts[:, None] * share, dim=-1)


@pytest.mark.parametrize("name", LOSSES)
def test_lower_for_the_better_ordered_batch(name):
    """Videos that end at their instruction, against the same with `now` and `next` far apart and
    the order broken; for clip, which knows no order, against the instructions of other videos."""
    texts = unit(8, 16)
    good = walk(texts)
    if name == "clip":
        assert vlmrm.clip_loss(good, texts) < vlmrm.clip_loss(good, texts.roll(1, 0))
    else:
        worse = good[:, [4, 3, 0, 2, 1]] if name == "tcn" else good[:, [1, 2, 0, 3, 4]]
        worse = good.flip(1) if name in ("r3m", "triplet") else worse
        assert LOSSES[name](good, texts) < LOSSES[name](worse, texts)


def test_shifts_never_pair_a_video_with_itself():
    for batch in (1, 2, 3, 6):
        perms = vlmrm.shifts(3, batch)
        assert perms.shape == (min(3, batch - 1), batch)
        assert (perms != torch.arange(batch)).all()
        assert (perms.sort(dim=1).values == torch.arange(batch)).all()


# -----------------------------------------------------------------------------
# Metrics


def test_voc_by_hand():
    """Values 1 3 2: ranks 1 3 2 against times 1 2 3, sum of squared differences 0 + 1 + 1 = 2,
    Spearman 1 - 6 * 2 / (3 * 8) = .5. A constant counts 0, rising 1, falling -1."""
    values = np.array([[1, 3, 2], [5, 5, 5], [1, 2, 9], [3, 2, 1]], float)
    assert vlmrm.value_order_correlation(values) == pytest.approx([0.5, 0, 1, -1])


def test_voc_is_scipys_spearman_and_opengvls_value():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, size=(50, 12)).astype(float)  # many ties
    expected = [scipy.stats.spearmanr(row, np.arange(12)).statistic for row in values]
    assert vlmrm.value_order_correlation(values) == pytest.approx(expected)
    arrays = np.load(HERE / "data" / "golden" / "metrics.npz")
    results = GOLDEN["metrics"]["results"]
    for key, name in (("v", "voc"), ("v_ties", "voc_with_ties")):
        assert vlmrm.value_order_correlation(arrays[key][None])[0] == pytest.approx(results[name])


def accuracy(values, rewards, diagonal, threshold=0.1):
    correct, total = vlmrm.pair_counts(values, rewards, threshold)
    mask = np.eye(len(values)) if diagonal else 1 - np.eye(len(values))
    return (correct * mask).sum() / (total * mask).sum()


def test_ranking_accuracy_by_hand():
    """One episode, rewards 0 1 2, values 0 2 2: pairs (0,1) right, (0,2) right, (1,2) a tie, 1/2:
    2.5 of 3. With a threshold of 1 only (0,2) is left: 1 of 1."""
    values, rewards = np.array([[0.0, 2, 2]]), np.array([[0.0, 1, 2]])
    assert accuracy(values, rewards, diagonal=True) == pytest.approx(2.5 / 3)
    assert accuracy(values, rewards, diagonal=True, threshold=1.0) == 1
    assert accuracy(-values, rewards, diagonal=True) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("diagonal", [True, False])
def test_ranking_accuracy_is_the_double_loop(diagonal):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 5, size=(4, 6)).astype(float)
    rewards = rng.integers(0, 20, size=(4, 6)) / 10
    right = pairs = 0
    for i, a in np.ndindex(4, 6):
        for j, b in np.ndindex(4, 6):
            if (i == j) == diagonal and rewards[i, a] - rewards[j, b] > 0.1:
                pairs += 1
                right += (values[i, a] > values[j, b]) + (values[i, a] == values[j, b]) / 2
    assert accuracy(values, rewards, diagonal) == pytest.approx(right / pairs)
    assert accuracy(-values, rewards, diagonal) == pytest.approx(1 - right / pairs)


def test_pair_accuracy_of_a_constant_is_one_half_and_matches_kendall():
    rng = np.random.default_rng(2)
    rewards, values = rng.random((1, 30)), rng.random((1, 30))
    assert accuracy(np.zeros((1, 30)), rewards, True) == 0.5
    tau = scipy.stats.kendalltau(values[0], rewards[0]).statistic  # no ties: tau = 2 accuracy - 1
    assert accuracy(values, rewards, True, threshold=0.0) == pytest.approx((tau + 1) / 2)


def test_epic_by_hand_and_against_scipy():
    """Values that follow the rewards in a line: 0; against them: 1; constant: sqrt(1/2)."""
    rng = np.random.default_rng(3)
    rewards, values = rng.random((5, 8)), rng.random((5, 8))
    one = np.ones((1, 5))
    assert vlmrm.epic_distance(one, 3 * rewards + 7, rewards)[0] == pytest.approx(0, abs=1e-7)
    assert vlmrm.epic_distance(one, -rewards, rewards)[0] == pytest.approx(1)
    assert vlmrm.epic_distance(one, np.full((5, 8), 0.3), rewards)[0] == pytest.approx(0.5**0.5)
    pearson = scipy.stats.pearsonr(values.ravel(), rewards.ravel()).statistic
    assert vlmrm.epic_distance(one, values, rewards)[0] == pytest.approx(((1 - pearson) / 2)**0.5)
    twice = np.array([[2.0, 0, 1, 1, 0]])  # episode 0 twice, episodes 2 and 3 once
    picked = [0, 0, 2, 3]
    assert vlmrm.epic_distance(twice, values, rewards)[0] == pytest.approx(
        vlmrm.epic_distance(np.ones((1, 4)), values[picked], rewards[picked])[0])


def test_epic_golden():
    """Official EPIC of state rewards, uniform distribution, gamma .99: one frame a state."""
    arrays = np.load(HERE / "data" / "golden" / "epic.npz")
    ours = vlmrm.epic_distance(np.ones((1, 7)), arrays["va"][:, None], arrays["vb"][:, None])
    assert ours[0] == pytest.approx(GOLDEN["epic"]["results"]["epic_uniform_state_rewards"])


def test_success_auroc_by_hand():
    """Successes score .9 and .4, failures .4 and .1: (1 + 1 + 1/2 + 1) / 4."""
    correct, total = vlmrm.success_counts(np.array([0.9, 0.4, 0.4, 0.1]),
                                          np.array([True, True, False, False]))
    assert vlmrm.weighted_ratio(np.ones((1, 4)), correct, total)[0] == pytest.approx(3.5 / 4)


def test_weighted_ratio_is_the_ratio_of_the_repeated_episodes():
    rng = np.random.default_rng(4)
    correct, total = rng.random((5, 5)), 1 + rng.random((5, 5))
    picked = [0, 0, 3, 4, 4, 4]
    weights = np.bincount(picked, minlength=5)[None].astype(float)
    block = np.ix_(picked, picked)
    assert vlmrm.weighted_ratio(weights, correct, total)[0] == pytest.approx(
        correct[block].sum() / total[block].sum())
    assert vlmrm.weighted_ratio(weights, correct[0], total[0])[0] == pytest.approx(
        correct[0, picked].sum() / total[0, picked].sum())
    assert np.isnan(vlmrm.weighted_ratio(weights, correct[0] * 0, total[0] * 0)[0])


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
        mine = shipped.task == task
        assert (mine & (shipped.source == "expert")).sum() == 14
        assert (mine & (shipped.source == "mixed")).sum() == 6
        seeds = shipped.seed[mine]  # no episode in two splits
        assert len(set(seeds)) == len(seeds)
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


def test_frames_survive_packing():
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 64).astype(np.uint8)[None, None, :, None]
    frames = np.broadcast_to(smooth, (6, 64, 64, 3)) + rng.integers(0, 9, (6, 1, 1, 3), np.uint8)
    strip = np.frombuffer(vlmrm.encode_frames(frames), np.uint8)
    data = vlmrm.Dataset.__new__(vlmrm.Dataset)
    data.strips, data.offsets, data.T = strip, np.array([0, len(strip)]), 6
    assert np.abs(data.unpack(0).astype(int) - frames).mean() < 4


def test_batch_is_ordered_distinct_and_from_different_tasks(toy):
    """The square's place tells the time of a toy frame: it must move right from frame to frame."""
    train_set = toy.select(split="train", source="expert")
    episodes = {task: train_set[toy.task[train_set] == task] for task in list(COLORS)[:3]}
    for seed in range(20):
        frames, tasks = vlmrm.sample_batch(toy, episodes, np.random.default_rng(seed), batch=3)
        assert frames.shape == (3, 5, 32, 32, 3) and len(set(tasks)) == 3
        places = (frames.max(-1) > 128).any(axis=2).argmax(axis=-1)  # (3, 5)
        assert (np.diff(places, axis=1) > 0).all()


def test_select_and_missing_file(toy, tmp_path):
    assert set(toy.task[toy.select(split="train")]) == set(list(COLORS)[:3])
    with pytest.raises(vlmrm.InputError, match="no data set"):
        vlmrm.Dataset(tmp_path / "nothing.npz")
    np.savez(tmp_path / "pickled.npz", task=np.array([{}], dtype=object))
    with pytest.raises(vlmrm.InputError, match="not a data set"):
        vlmrm.Dataset(tmp_path / "pickled.npz")


# -----------------------------------------------------------------------------
# Collection: needs metaworld and a graphics library


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """The same two tasks collected by one process and by two."""
    pytest.importorskip("metaworld", reason="metaworld needs Python 3.10 to 3.13")
    folder = tmp_path_factory.mktemp("collected")
    for workers in (1, 2):
        result = command("--collect", "--tasks", "reach-v3", "drawer-close-v3", "--expert", "2",
                         "--mixed", "1", "--size", "48", "--frames", "8",
                         "--workers", str(workers), "--output", str(folder / f"{workers}.npz"))
        if "cannot render" in result.stderr:
            pytest.skip(result.stderr)
        assert result.returncode == 0, result.stderr
    return folder


def test_collection_does_not_depend_on_the_number_of_workers(collected):
    assert (collected / "1.npz").read_bytes() == (collected / "2.npz").read_bytes()


def test_collection_keeps_successful_experts_and_orders_its_frames(collected):
    data = vlmrm.Dataset(collected / "1.npz")
    assert list(data.source) == ["expert", "expert", "mixed"] * 2
    assert data.success[data.source == "expert"].any(axis=1).all()
    assert (np.diff(data.steps, axis=1) > 0).all()
    assert (data.steps[data.source == "mixed", -1] == 149).all()
    assert data.frames(0).shape == (8, 48, 48, 3)
    assert np.ptp(data.frames(0).astype(int), axis=0).max() > 50  # something moves


def test_shipped_episode_renders_again(collected, shipped, tmp_path):
    """The first episode of a shipped task, made anew with the README's settings: same rewards, and
    pictures that differ by no more than packing and another GL library may cost."""
    task = "drawer-open-v3"
    result = command("--collect", "--tasks", task, "--expert", "1", "--mixed", "1",
                     "--output", str(tmp_path / "again.npz"))
    assert result.returncode == 0, result.stderr
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
    return vlmrm.build_backbone("tiny", "none")


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def test_embeddings_have_unit_norm_and_shape(tiny, frames):
    embedded = tiny.embed_frames(torch.from_numpy(np.stack([frames, frames])))
    assert embedded.shape == (2, 3, 128) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2, 3))
    texts = tiny.embed_texts(["open the drawer", "", "zażółć 🦾 " * 30])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(3))


def test_tiny_tokenizer_is_clips_with_fewer_merges():
    full, tiny = open_clip.SimpleTokenizer(), vlmrm.tiny_tokenizer()
    tokens = tiny(["open the drawer"])[0]
    assert tokens[0] == 4094 and tokens.max() == 4095 and (tokens == 4095).sum() == 1
    inner = tokens[1:tokens.argmax()].tolist()
    assert full.decode(inner).strip() == "open the drawer"


def test_score_is_the_cosine_and_does_not_depend_on_its_company(tiny, frames):
    rewards = tiny.eval().score(frames, "open the drawer")
    assert rewards.shape == (3,) and rewards.dtype == np.float32
    assert (np.abs(rewards) <= 1 + 1e-6).all()
    assert tiny.score(frames[1:2], "open the drawer") == pytest.approx(rewards[1:2], abs=1e-5)


def test_lora_starts_at_the_model_trains_only_itself_and_merges(tiny, frames):
    tiny.eval()
    before = tiny.score(frames, "open the drawer")
    vlmrm.add_lora(tiny, rank=2)
    assert tiny.score(frames, "open the drawer") == pytest.approx(before, abs=1e-6)
    trained = [name for name, p in tiny.named_parameters() if p.requires_grad]
    assert all(".0.A" in name or ".0.B" in name for name in trained)
    assert any("visual" in name and "in_proj_weight" in name for name in trained)
    assert any("visual" not in name for name in trained)
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            if name.endswith("B"):
                p.normal_(std=0.05)
    adapted = tiny.score(frames, "open the drawer")
    assert np.abs(adapted - before).max() > 1e-3
    vlmrm.merge_lora(tiny)
    assert not any("parametrizations" in name for name, _ in tiny.named_parameters())
    assert tiny.score(frames, "open the drawer") == pytest.approx(adapted, abs=1e-5)


def test_weights_survive_saving_and_misfits_are_refused(tiny, frames, tmp_path):
    vlmrm.save_weights(tiny, tmp_path / "model.safetensors")
    other = vlmrm.build_backbone("tiny", str(tmp_path / "model.safetensors"))
    assert (other.eval().score(frames, "push") == tiny.eval().score(frames, "push")).all()
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:9999])
    with pytest.raises(vlmrm.InputError, match="does not fit"):
        vlmrm.load_weights(other, tmp_path / "short.safetensors")
    vlmrm.add_lora(other, 2)
    with pytest.raises(vlmrm.InputError, match="does not fit"):
        vlmrm.load_weights(other, tmp_path / "model.safetensors")


def test_open_clip_model_from_a_checkpoint_file(tmp_path, frames):
    """A checkpoint of a real architecture, with random weights, made here: it loads and scores."""
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = vlmrm.build_backbone("ViT-S-32-alt", str(tmp_path / "clip.pt")).eval()
    torch.testing.assert_close(model.clip.visual.conv1.weight, clip.visual.conv1.weight)
    assert model.score(frames, "open the drawer").shape == (3,)
    vlmrm.add_lora(model, 4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 1e6


# -----------------------------------------------------------------------------
# Training


def train_toy(toy, sentences, seed=0, steps=80, loss=vlmrm.triplet_loss, **options):
    torch.manual_seed(seed)
    model = vlmrm.build_backbone("tiny", "none")
    log = vlmrm.train(model, toy, sentences, loss, **{
        "steps": steps, "batch": 3, "learning_rate": 2e-3, "seed": seed} | options)
    return model, log


def test_training_learns_and_beats_the_untrained_model(toy, sentences):
    torch.manual_seed(0)
    untrained = vlmrm.build_backbone("tiny", "none")
    trained, log = train_toy(toy, sentences)
    assert np.mean([entry["loss"] for entry in log[-5:]]) < 0.5 * log[0]["loss"]
    before = vlmrm.evaluate(untrained, toy, sentences)["seen"]
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
def test_every_objective_trains(toy, sentences, name):
    model, log = train_toy(toy, sentences, steps=2, loss=LOSSES[name])
    assert np.isfinite([entry["loss"] for entry in log]).all()


def test_a_loss_that_is_not_finite_stops_the_run(toy, sentences):
    with pytest.raises(vlmrm.InputError, match="step 1: the loss is nan"):
        train_toy(toy, sentences, loss=lambda frames, texts: frames.sum() * math.nan)


def test_batch_larger_than_the_number_of_tasks(toy, sentences):
    with pytest.raises(vlmrm.InputError, match="--batch 4"):
        train_toy(toy, sentences, batch=4)


# -----------------------------------------------------------------------------
# Evaluation and the run folder


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
    report = vlmrm.evaluate(Oracle(), toy, sentences, replicates=20)
    for group in ("seen", "unseen"):
        assert report[group]["voc"]["value"] > 0.98
        assert report[group]["ranking_accuracy_within"]["value"] > 0.95
        assert report[group]["ranking_accuracy_across"]["value"] > 0.95
        assert report[group]["success_auroc"]["value"] == 1
        assert report[group]["epic"]["value"] < 0.2
        low, high = report[group]["voc"]["interval"]
        assert low <= report[group]["voc"]["value"] <= high
    # Every sentence is the same to this model: it cannot retrieve, and opposites cancel.
    assert report["seen"]["retrieval_top1"]["value"] == 0
    assert report["unseen"]["antonym"]["value"] == 0
    assert set(report["tasks"]) == set(COLORS)


def command(*arguments, cwd=HERE):
    return subprocess.run([sys.executable, str(HERE / "vlmrm.py"), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A run of the program itself, as a user would start it."""
    folder = tmp_path_factory.mktemp("runs")
    result = command("--data", str(toy.path), "--steps", "2", "--batch", "3", "--seed", "1",
                     "--runs", str(folder), "--lora", "2")
    assert result.returncode == 0, result.stderr
    return folder / "triplet-seed1", result.stdout


def test_run_folder(finished):
    folder, printed = finished
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "metrics.json", "curves.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["objective"] == "triplet" and metrics["seed"] == 1
    assert metrics["wall_seconds"] > 0
    for group in ("seen", "unseen"):
        for name in ("voc", "ranking_accuracy_within", "ranking_accuracy_across"):
            entry = metrics[group][name]
            assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
            assert f"{entry['value']:.2f}" in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["steps"] == 2
    assert set(load_file(folder / "model.safetensors"))


def test_load_reward_model(finished, frames):
    model = vlmrm.load_reward_model(finished[0], device="cpu")
    rewards = model.score(frames, "open the drawer")
    assert rewards.shape == (3,) and rewards.dtype == np.float32
    base = vlmrm.build_backbone("tiny", None)
    base.low_precision = model.low_precision
    assert (rewards != base.eval().score(frames, "open the drawer")).any()  # adapters are on
    with pytest.raises(vlmrm.InputError, match="not the folder of a run"):
        vlmrm.load_reward_model(HERE / "data")


# -----------------------------------------------------------------------------
# Command line and README


def test_help():
    result = command("--help")
    assert result.returncode == 0 and "--objective" in result.stdout
    assert "(default: triplet)" in result.stdout


@pytest.mark.parametrize("arguments, says", [
    (["--backbone", "ViT-B-23"], "ViT-B-32"),
    (["--backbone", "ViT-B-32"], "laion2b_s34b_b79k"),
    (["--backbone", "ViT-B-32", "--pretrained", "nonsense"], "openai"),
    (["--pretrained", "missing.safetensors"], "no weights at missing.safetensors"),
    (["--data", "missing.npz"], "no data set at missing.npz"),
    (["--data", "README.md"], "not a data set"),
    (["--collect", "--tasks", "drawer-opn-v3", "--output", "x.npz"], "drawer-open-v3"),
    (["--batch", "41"], "--batch 41"),
    (["--lora", "2", "--pretrained", "none"], "adapts pretrained weights"),
    (["--name", "data", "--runs", "."], "data exists"),
    (["--collect", "--frames", "200"], "16383"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    assert vlmrm.main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if not line.startswith("training")]) == 1
    assert error[-1].startswith("vlmrm: ") and says in error[-1]


@pytest.mark.parametrize("arguments", [
    ["--objective", "best"], ["--steps", "0"], ["--seed", "x"], ["--learning-rate", "-1"]])
def test_argparse_refuses(arguments):
    with pytest.raises(SystemExit, match="2"):
        vlmrm.parse_arguments(arguments)


def test_offline_weights_end_in_one_line(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand more lines")
    monkeypatch.setattr(open_clip, "create_model", offline)
    assert vlmrm.main(["--backbone", "ViT-B-32", "--pretrained", "openai"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "download the checkpoint" in error


def test_readme_commands_parse():
    commands = re.findall(r"^python vlmrm\.py (.*)$", README, flags=re.M)
    assert len(commands) >= 4
    for line in commands:
        assert isinstance(vlmrm.parse_arguments(line.split("#")[0].split()), argparse.Namespace)


def saved(run):
    return json.loads((HERE / "data" / "results" / f"{run}.json").read_text(encoding="utf-8"))


def cell(runs, group, metric):
    values = [run[group][metric]["value"] for run in runs]
    if len(values) == 1:
        return f"{round(values[0], 2) + 0:.2f}"  # + 0 turns -0.0 into 0.0
    low, high = runs[0][group][metric]["interval"]
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} [{low:.2f}, {high:.2f}]"


def readme_table():
    """The README's table, from the saved metrics: the warm start, and triplet with three seeds."""
    before, after = [saved("zeroshot-seed0")], [saved(f"triplet-seed{seed}") for seed in range(3)]
    lines = ["| | seen tasks: before | triplet | unseen tasks: before | triplet |",
             "|" + " --- |" * 5]
    for metric, (label, _) in vlmrm.METRICS.items():
        cells = [cell(runs, group, metric) for group in ("seen", "unseen")
                 for runs in (before, after)]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def test_readme_and_header_show_the_saved_results():
    runs = [saved(f"triplet-seed{seed}") for seed in range(3)]
    seconds = f"{np.median([run['wall_seconds'] for run in runs]):.0f} seconds"
    table = readme_table()
    assert table in README, f"README.md should show this table:\n{table}"
    assert seconds in README and seconds in vlmrm.__doc__
    for metric in ("voc", "ranking_accuracy_within"):
        for group in ("seen", "unseen"):
            values = [run[group][metric]["value"] for run in runs]
            line = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} {group}"
            assert line in vlmrm.__doc__, f"the header of vlmrm.py should say {line}"
