"""The saved results and the scripts of data/study that made them."""
import functools
import itertools
import json
import math
import os

os.environ.setdefault("MUJOCO_GL", "osmesa")  # mujoco reads it once
import numpy as np
import pytest
import scipy.stats
import torch

from conftest import ROOT

import vlmrm

import common
import pictures
import scenes
import study
import tables

RESULTS = study.RESULTS
PAGES = [path.read_text(encoding="utf-8") for path in tables.PAGES]
MADE = tables.tables(RESULTS)
INSTRUCTIONS = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
TRAINED = {name: path for name, path in study.all_objectives().items()
           if vlmrm.get_objective(path)["loss"]}

# The pages and the saved results ------------------------------------------------------------------

@pytest.mark.parametrize("name", MADE)
def test_pages_show_the_saved_results(name):
    """Each table stands between its marks, on one of the two pages."""
    shown = f"-->\n{MADE[name]}\n<!-- end of {name} -->"
    assert sum(shown in page for page in PAGES) == 1, "run python data/study/tables.py"

def test_all_marks_of_the_pages_are_known():
    for page in PAGES:
        marks = [line for line in page.splitlines() if line.startswith("<!-- ")]
        starts = [mark.split()[1].rstrip(":") for mark in marks if "end of" not in mark]
        ends = [mark.split()[3] for mark in marks if "end of" in mark]
        assert starts == ends and set(starts) <= set(MADE)

def test_filling_a_page_changes_what_is_between_the_marks():
    page = "a\n<!-- one: made -->\nold\n<!-- end of one -->\nb\n"
    filled = tables.fill(page, {"one": "\\1 new", "two": "x"})
    assert filled == "a\n<!-- one: made -->\n\\1 new\n<!-- end of one -->\nb\n"

@pytest.mark.parametrize("group", ["seen", "unseen"])
@pytest.mark.parametrize("metric", ["voc", "ranking_accuracy_same_time"])
def test_the_header_of_the_file_shows_the_saved_results(metric, group):
    runs = tables.load(RESULTS)["triplet"][study.FIRST]
    values = [run[group][metric]["value"] for run in runs]
    line = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} {group}"
    assert line in vlmrm.__doc__

def test_files_that_the_results_page_names_are_there():
    for name in ("comparison.png", "kept.png", "curves.png", "tuning.json"):
        assert (RESULTS / name).is_file() and f"({name})" in PAGES[1]

def test_saved_results_are_of_this_code_and_data(monkeypatch):
    """The settings of every saved run are what the program would use now."""
    monkeypatch.setattr(vlmrm, "digest", functools.cache(vlmrm.digest))
    args = vlmrm.parse_arguments([])
    known = set()
    for result in json.loads((RESULTS / "results.json").read_text()):
        saved = result["config"]
        row = result["row"]
        job = {"row": row, "objective": TRAINED.get(row), "way": result["way"]}
        if row == "thumbnail":
            job = study.THUMBNAIL
        elif row not in TRAINED:
            continue  # other starts, and what has no settings
        now = study.reduced(study.configure(job, args, saved["seed"]))
        if row == "thumbnail":
            now["backbone"] = "thumbnail"  # it is built later
        assert saved == now, row
        known.add((row, result["way"], saved["seed"]))
    assert known >= set(itertools.product(TRAINED, study.WAYS, range(3)))

def test_the_constants_are_the_best_that_were_tried():
    """With adapters: those of vlmrm.py and of data/objectives/. The grids are what was tried."""
    scores = vlmrm.read_json(RESULTS / "tuning.json")
    assert set(scores) == {"settings", *study.GRIDS}
    for name, values in study.GRIDS.items():
        rate, constants = vlmrm.get_objective(TRAINED[name])["TUNED"]
        best = study.tuned(name, study.FIRST)
        assert best["learning_rate"] == rate
        assert best["constants"] == pytest.approx(constants, rel=1e-5)
        [constant] = constants
        for value in values:
            assert f"LoRA, learning rate 0.002, {constant} {value:g}" in scores[name]

@pytest.mark.parametrize("row, remark", [
    ("triplet", ""), ("anchored, all weights", ""), ("tcn", "no language"), ("vip-text", ""),
    ("hilp", "no language"), ("preference-oracle", "privileged"), ("vlm-rm", "no training"),
    ("zeroshot", "no training"), ("clock", "control"), ("distance-from-start", "control"),
    ("thumbnail", "control"), ("triplet, strict start", "control"),
    ("zeroshot, random weights", "control")])
def test_remarks_on_rows(row, remark):
    assert tables.remark_of(row) == remark

def test_pictures_are_drawn_of_the_saved_results(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    for name in ("results.json", "reading.json"):
        (tmp_path / name).symlink_to(RESULTS / name)
    pictures.work(None)
    for name in ("comparison.png", "kept.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

# Metrics and tests --------------------------------------------------------------------------------

def test_epic_by_hand_and_golden():
    """Predictions that follow the rewards in a line: 0; against them: 1; constant: sqrt(1/2).
    Official EPIC of state rewards, uniform distribution, gamma .99: one frame a state."""
    predicted, truth = np.random.default_rng(0).random((2, 4, 9))
    assert study.epic_distance(3 * truth + 7, truth) == pytest.approx(0, abs=1e-7)
    assert study.epic_distance(-truth, truth) == pytest.approx(1)
    assert study.epic_distance(np.full((4, 9), 0.3), truth) == pytest.approx(0.5**0.5)
    pearson = scipy.stats.pearsonr(predicted.ravel(), truth.ravel()).statistic
    assert study.epic_distance(predicted, truth) == pytest.approx(((1 - pearson) / 2)**0.5)
    golden = ROOT / "data" / "tests" / "golden"
    expected = vlmrm.read_json(golden / "golden.json")["epic"]["results"]
    with np.load(golden / "epic.npz") as arrays:
        distance = study.epic_distance(arrays["va"][:, None], arrays["vb"][:, None])
    assert distance == pytest.approx(expected["epic_uniform_state_rewards"])

def test_goal_image_reward_by_hand():
    """Experts end at e0 and e1, a failure at -e1; all start at e0. Goals are the ends of the other
    experts."""
    e0, e1 = torch.eye(2)
    frames = torch.stack([torch.stack([e0, end]) for end in (e0, e1, -e1)])
    away = -(2**0.5)
    expected = [[away, away],                           # goal e1
                [0, away],                              # goal e0
                [away / 2, (away - 2) / 2]]             # goals e0 and e1
    reward = study.goal_image_reward(frames, np.array([True, True, False]))
    np.testing.assert_allclose(reward, expected, atol=1e-6)

def test_corrected_p_values_by_hand():
    """Ten tasks, so 2^10 ways to flip signs. `a` gains on all: 2 of them lie as far out. `b` loses
    the smallest gap, `c` the second smallest: 4 and 6. Holm: 3 * 2, 2 * 4, and for `c` 1 * 6, but
    not less than for `b`. With equal scores all flips are the same: 1."""
    reference = np.linspace(0.3, 0.9, 10)
    gaps = np.arange(1, 11) / 100
    scores = {"triplet": reference, "a": reference + gaps}
    for name, flipped in (("b", 0), ("c", 1)):
        scores[name] = reference + np.where(np.arange(10) == flipped, -gaps, gaps)
    assert study.corrected_p_values(scores, "triplet") == pytest.approx(
        {"a": 6 / 1024, "b": 8 / 1024, "c": 8 / 1024})
    assert study.corrected_p_values({"a": reference, "b": reference}, "a") == {"b": 1}

def test_over_tasks_is_scipys_interval():
    scores = np.random.default_rng(0).normal(0.3, 0.2, 12)
    low, high = scipy.stats.ttest_1samp(scores, 0).confidence_interval()
    assert tables.over_tasks(scores) == f"{scores.mean():+.2f} [{low:+.2f}, {high:+.2f}]"

def test_folds_table_by_hand():
    """Two folds of two tasks each. triplet beats clip by .2 on three tasks and loses .1 on one."""
    voc = {"triplet": (0.5, 0.6, 0.7, 0.8), "clip": (0.3, 0.4, 0.5, 0.9)}
    folds = {}
    for row, values in voc.items():
        scores = [dict.fromkeys(("voc", tables.SAME, tables.WITHIN, "opposite_gap"), value)
                  for value in values]
        folds[row] = [{"a": scores[0], "b": scores[1]}, {"c": scores[2], "d": scores[3]}]
    lines = tables.folds_table(folds, "triplet").splitlines()
    assert lines[2].startswith("| `triplet` | 0.65 | 0.65 | 0.65 | 0.65 |  |")
    assert lines[3].startswith("| `clip` | 0.53 | 0.53 | 0.53 | 0.53 | +0.12 [")
    assert " 0.250 " in lines[3]  # of the 16 flips 4: the mean gain is .5, or -.5, or of +-.7

# The study, on toy data ---------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path, toy):
    """Runs study.py with a few objectives on the toy data, results in a folder of its own."""
    few = {name: TRAINED.get(name, name) for name in ("triplet", "zeroshot", "tcn")}
    few["clip"] = TRAINED["clip"]
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "all_objectives", lambda: few)
    monkeypatch.setattr(vlmrm, "UNSEEN_TASKS", vlmrm.UNSEEN_TASKS)  # it is put back
    monkeypatch.setattr(study, "left_out", lambda: ("sweep-v3",))
    monkeypatch.setattr(study, "DOOR", ("drawer-open-v3", "drawer-close-v3"))
    monkeypatch.setitem(study.WARM_UP, "steps", 1)
    monkeypatch.setattr(vlmrm, "draw_curves", lambda *_: None)  # it takes the longest
    options = ["--data", toy.path, "--steps", 1, "--batch", 2, "--seeds", 1, "--device", "cpu",
               "--runs", tmp_path / "runs"]

    def run(part, *more):
        return common.main(study.parser(), study.work, [part, *map(str, [*options, *more])])

    return run

def test_tune_and_study(small, tmp_path, capsys):
    """Three values and the best of them at the second rate, in both ways; then a row of each
    objective and control. The second time nothing is trained again."""
    assert small("tune", "--objective", "tcn") == 0
    scores = vlmrm.read_json(tmp_path / "tuning.json")
    assert set(scores) == {"settings", "tcn"}
    assert len(scores["tcn"]) == 8
    assert small("tune", "--batch", 1) == 2
    assert "other settings" in capsys.readouterr().err

    vlmrm.UNSEEN_TASKS = ("drawer-open-v3",)
    assert small("study") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(result["row"], result["way"]) for result in results}
    assert {("triplet", "all weights"), ("thumbnail", "LoRA"), ("zeroshot", "LoRA")} <= rows
    assert ("zeroshot", "all weights") not in rows and len(rows) == len(results)
    for result in results:
        assert ("goal_voc" in result["seen"]) == (result["row"] == "tcn")
        assert 0 <= result["seen"]["epic"]["value"] <= 1
    doors = vlmrm.read_json(tmp_path / "reading.json")["door"]
    assert set(doors) == {"zeroshot, LoRA", "triplet, LoRA", "triplet, all weights"}
    with np.load(tmp_path / "rewards.npz") as rewards:
        assert rewards["thumbnail/predicted"].shape == (len(rewards["thumbnail/episodes"]), 10)
    capsys.readouterr()
    assert small("study") == 0
    printed = capsys.readouterr()
    assert "training" not in printed.err and printed.out.count("done before") > 8

def test_the_thumbnail_looks_at_the_colours_of_144_places(small, tmp_path, toy, monkeypatch):
    """All its weights are trained, and its map is where the tower was."""
    seen = []
    monkeypatch.setattr(vlmrm, "train", lambda model, *_: seen.append(model))
    args = vlmrm.parse_arguments(["--data", str(toy.path), "--runs", str(tmp_path)])
    study.run_thumbnail(study.configure(study.THUMBNAIL, args), args.runs)
    [model] = seen
    assert all(weight.requires_grad for weight in model.parameters())
    black = np.zeros((1, 96, 96, 3), np.uint8)
    dots = black.copy()
    dots[:, ::8, ::8] = 255  # each of the 144 squares has one white dot
    moved = np.roll(dots, 4, axis=(1, 2))
    one, two, three = (model.embed_frames(some) for some in (black, dots, moved))
    assert torch.allclose(two, three, atol=1e-5) and not torch.allclose(one, two, atol=1e-5)

def test_folds_leave_out_every_task_once(small, tmp_path, monkeypatch):
    """Of forty tasks a fifth fold each; here the toy's three are in three of them."""
    monkeypatch.setattr(vlmrm, "UNSEEN_TASKS", ("drawer-open-v3",))
    toys = {name: dict(INSTRUCTIONS[name])
            for name in ("drawer-open-v3", "push-v3", "reach-v3", "sweep-v3", "door-lock-v3")}
    for entry in toys.values():
        entry.pop("opposite", None)
    monkeypatch.setattr(study, "all_objectives", lambda: {"triplet": "triplet"})
    path = tmp_path / "toys.json"
    path.write_text(json.dumps(toys))
    vlmrm.write_whole(tmp_path / "tuning.json", b"{}")
    assert small("folds", "--instructions", path) == 0
    rows = vlmrm.read_json(tmp_path / "folds.json")
    assert set(rows) == {"triplet", "thumbnail", "triplet, all weights"}
    for folds in rows.values():
        assert [list(fold) for fold in folds] == [
            ["drawer-open-v3"], [], ["push-v3"], ["reach-v3"], ["sweep-v3"]]

# Scenes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", scenes.KIND_OF)
def test_captions_of_scenes_are_no_orders_and_fit(task):
    """Whatever is true of a scene: no sentence of a task is in its captions, nor does one begin as
    an order does; each fact that a caption states is true."""
    tokenizer = vlmrm.tiny_tokenizer()
    facts = scenes.numbered_facts(task)
    rng = np.random.default_rng(len(task))
    for _ in range(10):
        true = rng.random(len(facts)) < 0.3
        text, said = scenes.caption(rng, facts, true, tokenizer)
        assert text.split()[0] in ("the", "a", "an", "there")
        assert true[said].all() and 1 <= len(said) <= 3 and len(tokenizer.encode(text)) <= 22
        assert len({facts[k][0] for k in said}) == len(said)
        for entry in INSTRUCTIONS.values():
            for sentence in (entry["instruction"], *entry["paraphrases"]):
                assert sentence.lower() not in text.lower()

@pytest.mark.parametrize("true, expected", [
    (np.eye(2), math.log(1 + math.e) - 1), (np.ones((2, 2)), math.log(1 + math.e) - 0.5)])
def test_contrast_by_hand(true, expected):
    """Logits 1 and 0. One true caption each: log(1 + e) - 1; both: the mean with log(1 + e)."""
    loss = scenes.contrast(torch.eye(2), torch.eye(2), torch.tensor(true), 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)

def test_pictures_are_moved_and_lit():
    """A grey picture stays grey, 15 % brighter or darker at most; white does not overflow."""
    grey = np.full((20, 96, 96, 3), 100, np.uint8)
    lit = scenes.augment(grey, np.random.default_rng(0))
    assert np.ptp(lit, axis=(1, 2, 3)).max() == 0
    assert 84 <= lit.min() < 95 and 105 < lit.max() <= 115
    white = scenes.augment(np.full((20, 96, 96, 3), 255, np.uint8), np.random.default_rng(0))
    assert white.min() > 215
    dot = np.zeros((20, 96, 96, 3), np.uint8)
    dot[:, 48, 48] = 255
    places = np.argwhere(scenes.augment(dot, np.random.default_rng(0)).max(3) > 0)[:, 1:]
    assert places.min() >= 44 and places.max() <= 52 and len(np.unique(places, axis=0)) > 10

@pytest.mark.rendering
def test_scenes_are_collected_and_trained_on(rendering, tmp_path, capsys):
    """Twice the same bytes. What is said of a scene agrees with it."""
    options = ["--scenes", str(tmp_path), "--tasks", "drawer-open-v3", "--count", "14",
               "--workers", "1"]
    assert common.main(scenes.parser(), scenes.work, ["collect", *options]) == 0
    file = tmp_path / "drawer-open-v3.npz"
    first = file.read_bytes()
    file.unlink()
    assert common.main(scenes.parser(), scenes.work, ["collect", *options]) == 0
    assert file.read_bytes() == first
    loaded = scenes.load_scenes(tmp_path, ["drawer-open-v3"])
    assert loaded["pictures"].shape == (14, 96, 96, 3) and loaded["pictures"].std() > 20
    texts, said = scenes.describe(loaded, "drawer-open-v3", np.arange(14),
                                  np.random.default_rng(0), vlmrm.tiny_tokenizer())
    agreed = scenes.agreement(loaded, np.arange(14), said)
    assert agreed.diagonal().all() and 0.1 < agreed.mean() < 0.9 and len(set(texts)) > 9

def test_the_tiny_clip_is_trained_on_scenes(tmp_path, monkeypatch):
    """On noise with random measures. Twice the same bytes, which are weights of tiny: also if it is
    stopped after the first of its two steps."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (264, 96, 96, 3), np.uint8)
    strips = [vlmrm.pack_pictures(noise[k:k + 24]) for k in range(0, 264, 24)]
    measures = rng.random((264, len(scenes.facts_of("drawer-open-v3"))))
    np.savez(tmp_path / "drawer-open-v3.npz", measures=np.float32(measures),
             offsets=np.cumsum([0, *map(len, strips)]),
             strips=np.frombuffer(b"".join(strips), np.uint8))

    def train(name):
        return common.main(scenes.parser(), scenes.work, [
            "train", "--scenes", str(tmp_path), "--tasks", "drawer-open-v3", "--steps", "2",
            "--out", str(tmp_path / name)])

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    assert train("one") == 0
    save = vlmrm.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(vlmrm, "save_checkpoint", save_and_stop)
        assert train("two") == 130
    assert not (tmp_path / "two").exists()
    assert train("two") == 0
    assert not list(tmp_path.glob("*.checkpoint"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    vlmrm.build_backbone("tiny", str(tmp_path / "one"))
