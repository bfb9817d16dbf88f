"""Tests of the exercises: each check knows a right answer from a wrong one."""
import json
import math
import re

import exercises
import guide
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vlmrm
from conftest import mixes, toy_episode

def mended_loss(frames, texts, times):
    progress = torch.einsum("ikd,jd->ijk", frames, texts) @ torch.tensor([-1.0, -1, 0, 1, 1])
    return vlmrm.info_nce(100 * progress)

def falling_sentences(frames):
    """Of each video the x with frames x = (4, 3, 2, 1, 0): five equations, D unknowns."""
    return F.normalize(torch.linalg.pinv(frames) @ torch.arange(4.0, -1, -1), dim=-1)

def in_parts(model, loss, pictures, sentences):
    """Embed all without a graph, ask the loss what it needs, embed again with it, by twos."""
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    with torch.no_grad():
        frames = torch.cat([model.embed_frames(pictures[part]) for part in parts])
        texts = torch.cat([model.embed_texts(sentences[part]) for part in parts])
    loss(frames.requires_grad_(), texts.requires_grad_()).backward()
    for part in parts:
        model.embed_frames(pictures[part]).backward(frames.grad[part])
        model.embed_texts(sentences[part]).backward(texts.grad[part])

def each_alone(model, loss, pictures, sentences):
    """A loss of two at a time is not the loss of all."""
    for i in range(0, 8, 2):
        exercises.one_backward_pass(model, loss, pictures[i:i + 2], sentences[i:i + 2])

@pytest.mark.parametrize("number, answer, right, says", [
    (1, 0.05, True, ""),  # 0.2 after 0.3 costs 0.2, twice; 0.2 after 0.2 costs 0.1; ten pairs
    (1, 0.04, False, "0.04"),
    (2, mended_loss, True, ""),
    (2, exercises.planted_loss, False, "difference"),
    (3, math.log(2) / 0.01, True, ""),  # the largest difference is at x = 0, log(2) / s
    (3, 68.0, False, "0.01019"),
    (3, 71.0, False, "0.00976"),
    (4, falling_sentences, True, ""),
    (4, lambda frames: -frames[:, -1], False, "of 300 videos"),
    (4, torch.clone, False, "unit vectors"),
    (9, mixes, True, "wrong about none of 19"),
    (9, lambda loss: True, False, "wrong about hilp, hop, preference, tcn, timerewarder, triplet"),
    (9, lambda loss: loss.__name__ == "r3m_loss", False, "r3m"),
    (10, in_parts, True, "at most 2 videos"),
    (10, exercises.one_backward_pass, False, "at most 8 videos"),
    (10, each_alone, False, "wrong by"),
])
def test_exercises_know_right_from_wrong(number, answer, right, says):
    found, remark = exercises.CHECKS[number - 1](answer)
    assert found == right and says in remark, remark

def test_a_new_task(toy, tmp_path):
    """A square that crosses the picture is learnt; Meta-World's names are no new tasks."""
    path = tmp_path / "answer_5.npz"
    episodes = [toy_episode("reach-v3", seed) for seed in range(10)]
    for episode in episodes:
        episode["task"] = "cross"
    vlmrm.write_dataset(path, vlmrm.assign_splits(episodes))
    sentences = {"instruction": "cross the picture", "paraphrases": ["cross", "go over", "move"]}
    path.with_suffix(".json").write_text(json.dumps({"cross": sentences}))
    assert exercises.check_5(path)[0]
    right, remark = exercises.check_5(toy.path)
    assert not right and "not Meta-World's: {}" in remark

@pytest.mark.parametrize("turned, raised, right", [
    (False, 0, True), (True, 0, False), (False, 1, False)])  # raised: another episode's rewards
def test_a_new_camera(tmp_path, turned, raised, right):
    """Pictures like a film's negative are what no turning makes."""
    shipped = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    e = shipped.select(task="drawer-open-v3")[0]
    episode = {name: getattr(shipped, name)[e] for name in (*vlmrm.PER_EPISODE, *vlmrm.PER_PICTURE)}
    episode["rewards"] = episode["rewards"] + raised
    pictures = shipped.pictures(e)
    new = pictures[:, ::-1, ::-1] if turned else 255 - pictures
    episode["strip"] = vlmrm.pack_pictures(new)
    vlmrm.write_dataset(tmp_path / "answer_6.npz", [episode])
    assert exercises.check_6(tmp_path / "answer_6.npz")[0] == right

def test_a_new_backbone_has_no_attention(tiny):
    right, remark = exercises.check_7(lambda: tiny)
    assert not right and "attention" in remark

@pytest.mark.parametrize("voc, opposite, right", [(0.7, 0.2, 1), (0.7, 0.4, 0), (0.5, 0.2, 0)])
def test_the_repair_orders_more_and_reads_more(tmp_path, monkeypatch, voc, opposite, right):
    """Triplet has .6 and .3 here; an answer must be better in both."""
    path = tmp_path / "answer_8.py"
    path.write_text("def loss(frames, texts, times):\n    return frames.sum()")

    def fake_run(config, runs):
        assert config["lora"] == 0 and config["learning_rate"] == 2e-3
        found = (0.6, 0.3) if config["objective"] == "triplet" else (voc, opposite)
        return runs, {"unseen": {"voc": {"value": found[0]}, "voc_opposite": {"value": found[1]}}}

    monkeypatch.setattr(vlmrm, "run", fake_run)
    assert exercises.check_8(path)[0] == right

@pytest.mark.parametrize("text, says", [
    ("from vlmrm import r3m_loss as loss", "this is r3m"),
    ("def reward(frames, text): return frames[..., 0]", "it takes a loss"),
    ("from vlmrm import r3m_loss as loss\nLABELS = 'rewards'", "the labels are the times")])
def test_the_repair_is_a_loss_of_the_readers_own(tmp_path, text, says):
    path = tmp_path / "answer_8.py"
    path.write_text(text)
    right, remark = exercises.check_8(path)
    assert not right and says in remark

@pytest.mark.rendering
@pytest.mark.parametrize("risen, right", [(1.0, True), (0.5, False)])
def test_a_plan_has_to_fool_the_model_alone(rendering, finished, monkeypatch, risen, right):
    """A reward that has risen as with experts whatever is done, and one that has not."""
    def rewards_of(row, videos, sentence):
        if np.shape(videos)[1] == 2:  # start and end of experts
            return np.array([[0.0, 1.0]] * len(videos))
        return np.array([[0.0, risen, risen]] * len(videos))

    monkeypatch.setattr(vlmrm, "run", lambda config, runs: (finished, {}))
    monkeypatch.setattr(guide, "rewards_of", rewards_of)
    found, remark = exercises.check_11(np.zeros((8, 4)))
    assert found == right and f"rises by {risen:.2f}" in remark
    assert "the task is not done" in remark

@pytest.mark.parametrize("plan", [np.zeros((7, 4)), np.full((8, 4), 2.0), np.full((8, 4), np.nan)])
def test_what_is_no_plan(plan):
    right, remark = exercises.check_11(plan)
    assert not right and "from -1 to 1" in remark

@pytest.mark.parametrize("number, text, says", [
    (1, "answer_1 = 0.05", "right: "),
    (3, None, "not yet: there is no .*answers.py"),
    (8, None, "not yet: there is no .*answer_8.py"),
    (7, "answer_1 = 0.05", "not yet: .*answers.py does not define answer_7"),
    (4, "\ndef answer_4(frames):\n    return 1 / 0", "not yet: .*py, line 3: ZeroDivisionError"),
    (1, "answer_1 = (", "not yet: .*SyntaxError")])
def test_the_program_says_one_line(tmp_path, monkeypatch, capsys, number, text, says):
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    if text:
        (tmp_path / "answers.py").write_text(text)
    assert exercises.main([str(number)]) == (0 if says.startswith("right") else 1)
    assert re.fullmatch(f"{says}.*\n", capsys.readouterr().out)

def test_the_page_has_every_exercise(capsys):
    page = exercises.PAGE.read_text(encoding="utf-8")
    heads = re.findall(r"^## (\d+)\. ", page, re.M)
    assert heads == [str(number + 1) for number in range(len(exercises.CHECKS))]
    for number in heads:
        assert f"answer_{number}" in page.split(f"## {number}. ")[1].split("## ")[0]
    assert exercises.main([]) == 0 and str(exercises.PAGE) in capsys.readouterr().out
    assert exercises.main(["12"]) == 2 and "1 to 11" in capsys.readouterr().err
