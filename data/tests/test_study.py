"""The study: its pages agree with the saved results; tables by hand; scenes with captions."""
import vlmrm  # before torch: see there

import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import safetensors
import scipy.stats
import torch
from PIL import Image

import common
import guide
import pictures
import scenes
import tables
import trial
from workers import RESULTS
from conftest import mixes, one_line

PAGES = [path.read_text(encoding="utf-8") for path in tables.PAGES]
MADE = tables.tables(RESULTS)
INSTRUCTIONS = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")

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

def test_the_header_of_the_file_shows_the_default_table():
    """VOC and ranking at the same time of triplet, seen and unseen: default.md has its row."""
    titles, _, row, *_ = (RESULTS / "default.md").read_text(encoding="utf-8").splitlines()
    assert row.startswith("| triplet |")
    cells = dict(zip(titles.strip("| ").split(" | "), row.strip("| ").split(" | ")))
    for title in ("VOC: order of experts' frames", "ranking accuracy at the same time"):
        for group in ("seen", "unseen"):
            assert f"{cells[f'{title}, {group} tasks']} {group}" in vlmrm.__doc__

def test_nothing_on_the_pages_is_left_to_fill_in():
    exercises = (vlmrm.DATA / "exercises" / "README.md").read_text(encoding="utf-8")
    for page in (*PAGES, exercises):
        words = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", page))
        assert words <= {"THIS_REPOSITORY", "MUJOCO_GL", "YOUR_NAME"}
        assert "<!-- end of" not in page.replace("\n<!-- end of", "") or page is exercises

def test_files_that_the_results_page_names_are_there():
    for name in ("comparison.png", "kept.png", "curves.png", "choices.json", "trial.json"):
        assert (RESULTS / name).is_file() and f"({name})" in PAGES[1]

def test_the_saved_trial_is_of_these_data():
    """And sentences. All arms of a fold have one start and one test set, in the first fold the
    shipped start."""
    starts = {"fold 0": vlmrm.digest(vlmrm.DATA / "tiny.safetensors")}
    tests = {}
    for name in ("choices.json", "trial.json"):
        found = vlmrm.read_json(RESULTS / name)
        for key, files in found["files"].items():
            _, fold = key.split(", ")
            assert files["data"] == vlmrm.digest(vlmrm.DATA / "metaworld.npz")
            assert files["instructions"] == vlmrm.digest(vlmrm.DATA / "instructions.json")
            assert files["start"] == starts.setdefault(fold, files["start"])
            if name == "trial.json":
                assert files["trial"] == tests.setdefault(fold, files["trial"])
        for arm, settings in found["settings"].items():
            assert settings == trial.settings_of(arm)

def test_the_shipped_start_has_not_seen_the_unseen_tasks():
    """Its file lists the forty environments it was trained on."""
    with safetensors.safe_open(vlmrm.DATA / "tiny.safetensors", "np") as file:
        made_of = json.loads(file.metadata()["made_of"])
    seen = set(made_of["environments"])
    assert len(seen) == 40 and seen == set(INSTRUCTIONS) - set(vlmrm.UNSEEN_TASKS)
    assert (made_of["seed"], made_of["steps"]) == (0, 5000)

def test_the_saved_trial_is_whole():
    """In each fold every arm that was tested has all its settings and seeds, on the right tasks."""
    choices, runs = tables.load(RESULTS)
    groups = tables.groups_of(runs)
    assert set(trial.CANDIDATES) <= set(groups[tuple(tables.folds_of(runs))])
    for folds, arms in groups.items():
        for fold, arm in itertools.product(folds, arms):
            trained = trial.ARMS[arm][0] is not None
            for seed in range(trial.SEEDS if trained else 1):
                assert set(runs[f"{arm}, fold {fold}, seed {seed}"]) == set(scenes.left_out(fold))
            for k in range(8 if trained else 0):
                tried = choices[f"{arm}, fold {fold}, setting {k}"]
                assert set(tried) in ({*trial.judges(fold)}, set())  # none: it diverged

@pytest.mark.parametrize("name", ["triplet", "r3m", "liv"])
def test_the_constants_of_the_file_are_what_the_judges_chose(name):
    """The best of the four settings with adapters, in the first fold."""
    choices, _ = tables.load(RESULTS)
    scores = [trial.score(choices[f"{name}, fold 0, setting {k}"]) for k in range(4)]
    setting = trial.settings_of(name)[int(np.argmax(scores))]
    _, rate, constants, _ = vlmrm.OBJECTIVES[name]
    assert setting["lora"] == 8
    assert (rate, constants) == (setting["learning_rate"], setting["constants"])

def test_pictures_are_drawn_of_the_saved_results(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    for name in ("choices.json", "trial.json", "guide.json"):
        (tmp_path / name).symlink_to(RESULTS / name)
    pictures.work(None)
    for name in ("comparison.png", "kept.png", "guide.png"):
        with Image.open(tmp_path / name) as new, Image.open(RESULTS / name) as shipped:
            assert new.text["Source"] == shipped.text["Source"]  # of the same results
            assert new.size == shipped.size

# Tables by hand -----------------------------------------------------------------------------------

def made_runs(**voc):
    """Runs of two folds, every needed arm with three seeds: {arm: VOC of its seeds in fold 0}, by
    default 0; in fold 2 it is .1 more. Tasks a, b and c, d, whose VOC under the opposite sentence
    is 1 less; the ranking is .5 and rests on 900 pairs, but for b with 60 and d with 3."""
    runs = {}
    for arm in (*tables.NEEDED, *trial.CANDIDATES, *trial.CONTROLS):
        for seed, score in enumerate(voc.get(arm, (0.0, 0.0, 0.0))):
            if trial.ARMS[arm][0] or seed == 0:
                for fold, tasks in ((0, "ab"), (2, "cd")):
                    found = {}
                    for task in tasks:
                        found[task] = {"voc": score + 0.05 * fold, "pairs_same_time": 900,
                                       "voc_opposite": score + 0.05 * fold - 1,
                                       "retrieval_top1": 0.25, tables.SAME: 0.5}
                    runs[f"{arm}, fold {fold}, seed {seed}"] = found
    runs["zeroshot, fold 0, seed 0"]["b"]["pairs_same_time"] = 60
    del runs["zeroshot, fold 2, seed 0"]["d"][tables.SAME]
    runs["zeroshot, fold 2, seed 0"]["d"]["pairs_same_time"] = 3
    return runs

@pytest.fixture
def two_ours(monkeypatch):
    """Ours is triplet + keep in fold 0 and none in fold 2; half of the settings read."""
    arms = {0: "triplet + keep", 2: "none"}
    monkeypatch.setattr(tables, "ours", lambda choices, fold: arms[fold])
    monkeypatch.setattr(tables, "reads", lambda *_: np.arange(8) % 2 == 0)

def test_scores_are_means_over_seeds_of_whole_folds(two_ours):
    """In fold 3 an arm that is needed lacks a seed, in 4 one has diverged."""
    runs = made_runs(triplet=(0.1, 0.2, 0.6))
    for name in list(runs):
        if ", fold 0, " in name and not name.startswith("r3m, fold 0, seed 2"):
            runs[name.replace("fold 0", "fold 3")] = runs[name]
            runs[name.replace("fold 0", "fold 4")] = runs[name]
    runs["r3m, fold 4, seed 2"] = {}
    assert tables.folds_of(runs) == [0, 2]
    scores = tables.planned_scores(runs, {})
    assert scores["triplet"]["voc"] == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.4, "d": 0.4})
    assert scores["triplet"]["voc_opposite"]["a"] == pytest.approx(-0.7)
    assert set(scores["ours"]["voc"]) == {"a", "b"}  # of the fold that has one

def test_arms_of_fewer_folds_have_a_table_of_their_own(two_ours):
    """liv was tested in fold 0 only, and anchored not at all in fold 2. Ours is asked of fold 0."""
    runs = made_runs(triplet=(0.1, 0.2, 0.6))
    for seed in range(3):
        runs[f"liv, fold 0, seed {seed}"] = runs[f"r3m, fold 0, seed {seed}"]
        del runs[f"anchored, fold 2, seed {seed}"]
    every, some = tables.groups_of(runs).items()
    assert every[0] == (0, 2) and some == ((0,), ["triplet", "liv", "anchored"])
    assert {"triplet", "r3m", "triplet + keep", "clock"} < set(every[1])
    assert not {"liv", "anchored"} & set(every[1])
    assert set(tables.planned_scores(runs, {})["ours"]["voc"]) == {"a", "b"}
    text = tables.grouped(runs, lambda scores, _: tables.short_table(scores, set()))
    first, second = text.split("Folds tested: 0\n\n")
    assert first.startswith("Folds tested: 0, 2\n\n| objective (tasks) | VOC (4) |")
    assert second.splitlines()[0].startswith("| objective (tasks) | VOC (2) |")
    assert second.splitlines()[2:] == ["| `triplet` | 0.30 | -0.70 | 0.50 |",
                                       "| `liv` | 0.00 | -1.00 | 0.50 |"]

def test_tables_by_hand(two_ours):
    """Triplet has .3, .3, .4, .4, the others 0, 0, .1, .1: its lead is .3 on each of four tasks, of
    whose 16 flips 2 lie as far out."""
    runs = made_runs(triplet=(0.1, 0.2, 0.6))
    choices = {f"{arm}, fold {fold}, setting {k}": {"a": {"voc": k / 10, tables.SAME: 0.5}}
               for arm in trial.ARMS for fold in (0, 2) for k in range(8)}
    choices["r3m, fold 2, setting 0"] = {}  # it diverged
    scores = tables.planned_scores(runs, choices)
    found = tables.planned(scores, {"triplet + keep", "none"})
    lines = tables.planned_table(found).splitlines()
    assert lines[2].startswith("| `triplet` minus `r3m`, VOC | 4 | +0.300 | [+0.300, +0.300] |")
    assert lines[2].endswith("| +0.300 | 4 | 0.125 | 0.125 | more |")
    assert lines[4].startswith("| `ours` minus `triplet`, VOC | 2 | -0.300 |")
    assert lines[4].endswith("| less |")
    everywhere = tables.trial_scores(runs, tables.groups_of(runs)[0, 2], (0, 2))
    short = tables.short_table(everywhere, {"triplet + keep", "none"}).splitlines()
    assert short[2] == "| `triplet` | 0.35 | -0.65 | 0.50 |"
    assert short[-1].endswith("` (control) | 0.05 | -0.95 | 0.50 |")
    text = tables.trial_table(everywhere, choices, {"triplet"}, [0, 2])
    assert "| objective (tasks) | VOC (4) | VOC under the opposite" in text
    assert "| `triplet` (the rule's choice) | 0.35 | -0.65 | 0.50 | 0.25 |" in text
    assert " |  |  |  | 0.00, 0.17, 0.35 |" in text  # (.15 + .20) / 2
    assert "| -0.30 [-0.30, -0.30] | diverged, 0.17, 0.35 |" in text
    counts = tables.counts_sentences(scores, choices, runs)
    assert "4 tasks with 480 pairs" in counts
    assert "3 at least; 1 of them have fewer than 50" in counts
    assert "`triplet + keep` in fold 0, `none` in fold 2." in counts
    assert "32 kept" in counts and "64 settings" in counts
    result = tables.result_sentence(scores, found, [0, 2])
    assert "On 4 unseen tasks, 2 of 5 folds" in result and "ours" not in result
    assert "`triplet` minus `r3m`: VOC +0.300 [+0.300, +0.300], more (p = 0.125); ranking" in result

GUIDE = {
    "metrics": {name: {metric: place / 4 for metric in guide.METRICS}
                for place, name in enumerate(("zeroshot", "r3m", "triplet"))},
    "gain": {"reach-v3": {"triplet": 0.75, "zeroshot": 0.5, "r3m": 0.75, "simulator": 1.0},
             "door-open-v3": {"triplet": 0.5, "zeroshot": 0.75, "r3m": 1.0, "simulator": 1.0},
             "drawer-open-v3": {"triplet": 0.5, "zeroshot": 0.5, "r3m": 0.5, "simulator": 1.0},
             "push-v3": dict.fromkeys(("triplet", "zeroshot", "r3m", "simulator"), math.nan)},
    "plans": {}}
for name, done in (("reach-v3, start 0", True), ("reach-v3, start 1", False),
                   ("door-open-v3, start 0", True)):
    GUIDE["plans"][name] = {
        "triplet": {"done": True, "said": 1.0, "liked": 1.5},
        "r3m": {"done": done, "said": 0.5 + done, "liked": 2.0},
        "zeroshot": {"done": False, "said": -0.004},
        "simulator": {"done": True, "said": 1.0},
        "success": {"done": done, "said": 0.5},
        guide.SHAPED: {"done": True, "said": 0.5}}

def test_tables_of_the_guide_by_hand(monkeypatch):
    """Tasks count alike, not plans: r3m gets one of two starts of reach done, and door-open."""
    with pytest.raises(vlmrm.InputError, match="not whole"):
        tables.guide_scores(GUIDE)
    monkeypatch.setattr(tables, "TASKS", ("reach-v3",))
    whole = dict(GUIDE, gain=GUIDE["gain"] | {str(k): GUIDE["gain"]["push-v3"] for k in range(46)})
    scores = tables.guide_scores(whole)
    lines = tables.guide_table(scores).splitlines()
    assert "gain (3) | gain, unseen (2) | plans that get it done (2) | unseen (1)" in lines[0]
    assert lines[2].endswith("0.50 | 1.00 | 1.00 | 1.00 | 1.50 |")  # triplet
    assert [line for line in lines if line.startswith("| `r3m`")][0].endswith(
        "0.75 | 0.75 | 1.00 | 1.50 | 2.00 |")
    assert lines[-1].startswith("| `zeroshot` | 0.58 [")
    assert lines[-1].endswith("0.62 | 0.00 | 0.00 | 0.00 |  |")  # it likes no plan
    answers = tables.guide_answers(scores)
    assert [values.tolist() for values in answers.values()] == [
        [0.25, 0.0, 0.0], [0.0, 0.0], [-0.25, 0.0, 0.25], [-0.25, 0.0], [1.0, 1.0], [0.0, 0.5]]
    row = tables.answers_table(answers).splitlines()[-1]
    assert "done, `success + triplet` minus `success` | 2 | +0.25" in row
    assert "| 1, 0 |" in row
    predicts = tables.what_predicts(GUIDE, scores).splitlines()
    assert "over 3 models" in predicts[0] and len(predicts) == 2 + len(guide.METRICS) + 1
    assert "| +0.87 |" in predicts[2]  # ranks 1 2 3 and, of door-open alone, 1 2.5 2.5

def test_squares_are_losses_that_mix_sentences():
    """As a gradient finds out."""
    for arm, (loss, lists) in trial.ARMS.items():
        if loss:
            constants = {name: values[0] for name, values in lists.items()}
            assert mixes(functools.partial(loss, **constants)) == (arm in pictures.CONTRASTS), arm

def test_differences_are_of_the_tasks_that_both_have():
    found = tables.differences({"a": 1.0, "b": 2.0, "c": 3.0}, {"b": 0.5, "c": 1.0, "d": 9.0})
    assert list(found) == [1.5, 2]

def test_over_tasks_is_scipys_interval():
    scores = np.random.default_rng(0).normal(0.3, 0.2, 12)
    low, high = scipy.stats.ttest_1samp(scores, 0).confidence_interval()
    assert tables.over_tasks(scores) == f"{scores.mean():+.2f} [{low:+.2f}, {high:+.2f}]"

@pytest.mark.parametrize("values, says", [
    ((0.1, 0.2, 0.3), "undecided"), ((0.1, 0.12, 0.11), "more"), ((-0.1, -0.12, -0.11), "less"),
    ((0.005, -0.005, 0.001), "equivalent"),
    # Student's t of two degrees is 4.30 for 95 % and 2.92 for 90 %. The standard error is .00577:
    ((0.01, -0.01, 0.0), "equivalent"),  # .0169 < .02, though 4.30 times it is .0248
    ((0.015, -0.015, 0.0), "undecided")])
def test_verdicts_by_hand(values, says):
    assert tables.verdict(np.array(values)) == says

def test_the_planned_questions():
    """Three if ours is not triplet + directions everywhere; else two; none about ours without."""
    arms = ("triplet", "r3m", "ours", "triplet + directions")
    scores = {arm: {metric: {"a": 0.5} for metric in tables.COLUMNS.values()} for arm in arms}

    def asked(*chosen):
        return [(one, other) for one, other, _ in tables.planned(scores, set(chosen))]

    first = [("triplet", "r3m")] * 2
    about_ours = [("ours", "triplet")] * 3
    third = [("triplet + directions", "triplet")] * 3
    assert asked("triplet + directions") == first + about_ours
    assert asked("anchored", "triplet + directions") == first + about_ours + third
    assert asked("none") == first + third
    assert asked("none", "triplet + directions") == first + about_ours + third

def test_a_minus_before_zero_goes_but_not_before_other_numbers():
    text = tables.table(["x"], [["-0.00 -0.004 [-0.00, -0.05]"]])
    assert "0.00 -0.004 [0.00, -0.05]" in text

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
    for changed in (["--seed", "1"], ["--count", "15"]):
        capsys.readouterr()
        assert common.main(scenes.parser(), scenes.work, ["collect", *options, *changed]) == 2
        one_line(capsys, "scenes of another --seed or --count", "scenes")
    loaded = scenes.load_scenes(tmp_path, ["drawer-open-v3"])
    assert loaded["pictures"].shape == (14, 96, 96, 3) and loaded["pictures"].std() > 20
    texts, said = scenes.describe(loaded, "drawer-open-v3", np.arange(14),
                                  np.random.default_rng(0), vlmrm.tiny_tokenizer())
    agreed = scenes.agreement(loaded, np.arange(14), said)
    assert agreed.diagonal().all() and 0.1 < agreed.mean() < 0.9 and len(set(texts)) > 9

def test_the_tiny_clip_is_trained_on_scenes(tmp_path, monkeypatch, capsys):
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
    capsys.readouterr()
    assert train("two") == 2  # 45 minutes in earnest
    one_line(capsys, "two exists, or is asked for twice: delete it", "scenes")
    with safetensors.safe_open(tmp_path / "one", "np") as file:
        made_of = json.loads(file.metadata()["made_of"])
    assert made_of == {"environments": ["drawer-open-v3"], "seed": 0, "steps": 2}
