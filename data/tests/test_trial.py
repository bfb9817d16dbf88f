"""The fair trial: its arms, how it chooses, and all of it on toy data."""
from concurrent.futures import ThreadPoolExecutor

import vlmrm  # before torch: see there

import numpy as np
import pytest
import safetensors.numpy
import torch

import common
import scenes
import trial
import workers
from conftest import toy_episode, unit

INSTRUCTIONS = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")

def test_folds_and_judges():
    """Each task is left out once; judges are never among what is left out, and have pairs of
    opposites among them."""
    seen_once = []
    for fold in range(5):
        unseen = scenes.left_out(fold)
        judges = trial.judges(fold)
        seen_once += unseen
        assert len(set(judges)) == 13
        assert not set(judges).intersection(unseen)
        pairs = [task for task in judges if INSTRUCTIONS[task].get("opposite") in judges]
        assert len(pairs) == (4 if fold == 0 else 6)
    assert sorted(seen_once) == sorted(INSTRUCTIONS)
    assert scenes.left_out(0) == vlmrm.UNSEEN_TASKS

@pytest.mark.parametrize("arm", sorted(arm for arm in trial.ARMS if trial.ARMS[arm][0]))
def test_equal_budgets(arm):
    """Each rate in both ways; the same steps for every arm; every constant twice or more."""
    _, lists = trial.ARMS[arm]
    assert len(lists) <= 2
    ways = set()
    used = {name: [] for name in lists}
    for setting, other in zip(trial.settings_of(arm), trial.settings_of("triplet"), strict=True):
        ways.add((setting["lora"], setting["learning_rate"]))
        assert setting["steps"] == other["steps"]
        for name, value in setting["constants"].items():
            used[name].append(value)
    assert len(ways) == 8
    for name, values in lists.items():
        assert set(used[name]) == set(values)
        for value in values:
            assert used[name].count(value) >= 2

def test_the_mixture_is_the_sum_of_its_terms():
    """Triplet, DecisionNCE-T at scale 3, and a distance."""
    frames = unit(4, 5, 8)
    texts = unit(4, 8, seed=1)
    before = unit(4, 5, 8, seed=2)
    times = torch.linspace(0, 1, 5).repeat(4, 1)
    triplet = vlmrm.triplet_loss(frames, texts, times, 0.2)
    assert trial.mixture(frames, texts, times, (before, texts), 0.2) == triplet
    contrast = trial.from_file("decisionnce-t")(frames, texts, times, scale=3.0)
    away = (2 - 2 * (frames * before).sum(-1)).mean()
    expected = (triplet + 0.3 * contrast + 0.7 * away).item()
    mixed = trial.mixture(frames, texts, times, (before, texts), 0.2, 0.3, 0.7).item()
    assert mixed == pytest.approx(expected, abs=1e-5)
    expected = (triplet + 0.3 * contrast).item()
    mixed = trial.directed(frames, texts, times, 0.2, 0.3).item()
    assert mixed == pytest.approx(expected, abs=1e-5)

def result(voc, same_time, opposite=None):
    """Two tasks, of which one has an opposite and one has pairs."""
    first = {"voc": voc, "ranking_accuracy_same_time": same_time}
    if opposite is not None:
        first["voc_opposite"] = opposite
    return {"a": first, "b": {"voc": voc}}

def test_scores_by_hand():
    """VOC .6 and RA .8 are (.6 + .6) / 2. Tasks that lack a metric do not count for it."""
    assert trial.score(result(0.6, 0.8)) == pytest.approx(0.6)
    assert trial.gap(result(0.6, 0.8, -0.1)) == pytest.approx(0.7)

def runs_of(**settings):
    """What choose would find in fold 0: {arm: (VOC, RA, opposite) of its settings}, the start has a
    gap of 1. The rest is bad."""
    runs = {}
    for arm in trial.ARMS:
        for k in range(8):
            runs[f"{arm}, fold 0, setting {k}"] = result(-1.0, 0.0, -1.0)
    for arm, tried in settings.items():
        for k, values in enumerate(tried):
            runs[f"{arm}, fold 0, setting {k}"] = result(*values)
    runs["zeroshot, fold 0, setting 0"] = result(0.5, 0.5, -0.5)
    return runs

def test_the_best_setting_of_a_candidate_goes_on_reading():
    """The second is best; of a candidate the third is, which keeps .8 of the gap; if none does,
    the one that keeps most."""
    tried = [(0.5, 0.6, -0.5), (0.9, 0.9, 0.5), (0.7, 0.7, -0.15)]
    runs = runs_of(triplet=tried, anchored=tried)
    assert trial.best_setting(runs, "triplet", 0) == 1
    assert trial.best_setting(runs, "anchored", 0) == 2
    runs = runs_of(anchored=tried[1:2] + [(0.7, 0.7, 0.1)])
    assert trial.best_setting(runs, "anchored", 0) == 1

def with_tasks(*scores):
    """VOC of three tasks, all of which have an opposite and pairs, and read."""
    tasks = {}
    for task, voc in zip("abc", scores):
        tasks[task] = {"voc": voc, "voc_opposite": voc - 1, "ranking_accuracy_same_time": 0.5}
    return tasks

def test_ours_is_the_simplest_within_one_standard_error():
    """anchored (3 terms) is best. directions (2) is behind by 0, .1 and .2: mean .1, standard error
    .058 of VOC, half of both in the score: too far. keep (2) by -.02, 0 and .2: .06, error .07."""
    runs = runs_of()
    runs["anchored, fold 0, setting 3"] = with_tasks(0.5, 0.6, 0.7)
    runs["triplet + directions, fold 0, setting 1"] = with_tasks(0.5, 0.5, 0.5)
    runs["triplet + keep, fold 0, setting 2"] = with_tasks(0.52, 0.6, 0.5)
    for key, tasks in runs.items():
        if set(tasks) != set("abc"):
            runs[key] = with_tasks(-1, -1, -1)
    assert trial.ours(runs, 0) == "triplet + keep"
    runs["triplet + keep, fold 0, setting 2"] = with_tasks(0.4, 0.5, 0.5)
    assert trial.ours(runs, 0) == "anchored"

def test_ours_reads():
    """anchored is best but keeps no gap, directions does; where none does, there is none. A run
    that diverged is worse than any."""
    runs = runs_of(anchored=[(0.9, 0.9, 0.9)] * 8)
    assert trial.ours(runs, 0) == "none"
    runs["triplet + directions, fold 0, setting 1"] = result(0.6, 0.6, -0.4)
    assert trial.ours(runs, 0) == "triplet + directions"
    for k in range(7):
        runs[f"triplet, fold 0, setting {k}"] = {}
    assert trial.best_setting(runs, "triplet", 0) == 7

def test_results_of_two_processes_are_kept(monkeypatch, tmp_path):
    """What fails is not kept, nor what it was made of."""
    def play(job):
        if job["what"] == "other":
            vlmrm.write_whole(path, vlmrm.to_json({
                "files": {"hop, fold 1": {}}, "settings": {},
                "runs": {"theirs": result(0.1, 0.5)}}))
        if job["what"] == "fails":
            raise vlmrm.InputError("no data")
        return result(0.5, 0.5)

    path = tmp_path / "choices.json"
    monkeypatch.setattr(workers, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(workers, "get_context", str)
    monkeypatch.setattr(trial, "play", play)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    def play_all(**jobs):
        jobs = {name: {"fold": 0, "arm": "hop", "what": what} for name, what in jobs.items()}
        return trial.play_all(jobs, path, lambda fold: {"data": "some"}, 1)

    with pytest.raises(vlmrm.InputError, match="no data"):
        play_all(c="fails")
    assert not path.exists()
    assert set(play_all(a="other", b="")) == {"theirs", "a", "b"}
    with pytest.raises(vlmrm.InputError, match="no data"):
        play_all(a="", c="fails")
    found = vlmrm.read_json(path)
    assert set(found["runs"]) == {"theirs", "a", "b"}
    assert found["files"] == {"hop, fold 0": {"data": "some"}, "hop, fold 1": {}}
    assert found["settings"] == {"hop": trial.settings_of("hop")}
    monkeypatch.setattr(trial, "settings_of", lambda arm: [])
    with pytest.raises(vlmrm.InputError, match="hop had other settings"):
        play_all(a="")

@pytest.fixture
def small(monkeypatch, tmp_path, toy):
    """Runs trial.py with two arms on the toy data, in this process. There are four tasks: one is
    unseen, two judge. The test set has other episodes."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(workers, "get_context", str)
    monkeypatch.setattr(trial, "judges", lambda fold: ("sweep-v3", "push-v3"))
    monkeypatch.setattr(trial, "left_out", lambda fold: ("drawer-open-v3",))
    monkeypatch.setattr(trial, "ARMS", {arm: trial.ARMS[arm]
                                        for arm in ("triplet", "zeroshot", *trial.CONTROLS)})
    monkeypatch.setattr(vlmrm, "UNSEEN_TASKS", vlmrm.UNSEEN_TASKS)  # it is put back
    monkeypatch.setattr(trial, "SEEDS", 2)
    short = [dict(setting, steps=1) for setting in trial.settings_of("triplet")[:2]]
    monkeypatch.setattr(
        trial, "settings_of", lambda arm: short if arm == "triplet" else short[:1])
    threads = torch.get_num_threads()
    (tmp_path / "starts").mkdir()
    for fold in range(5):
        (tmp_path / f"starts/fold{fold}.safetensors").symlink_to(vlmrm.DATA / "tiny.safetensors")
    others = [toy_episode("drawer-open-v3", seed, source)
              for seed, source in enumerate(["expert"] * 3 + ["mixed"] * 4)]
    vlmrm.write_dataset(tmp_path / "trial.npz", vlmrm.assign_splits(others))
    options = ["--data", toy.path, "--trial", tmp_path / "trial.npz", "--starts",
               tmp_path / "starts", "--results", tmp_path, "--folds", 0, "--device", "cpu",
               "--workers", 1]
    yield lambda *more: common.main(trial.parser(), trial.work, [*map(str, [*more, *options])])
    torch.set_num_threads(threads)

@pytest.fixture
def trained_on(monkeypatch):
    """The tasks and the learning rate of each training."""
    found = []
    train = vlmrm.train

    def watched(model, data, instructions, loss, config):
        found.append((set(vlmrm.training_episodes(data)), config["learning_rate"]))
        return train(model, data, instructions, loss, config)

    monkeypatch.setattr(vlmrm, "train", watched)
    return found

def test_the_trial_on_toy_data(small, trained_on, tmp_path, toy, monkeypatch):
    """Settings are judged on the judges, which are left out of training, and by pairs of judges
    alone; the better one, here the second, is trained on all but what is unseen, and tested there,
    on other episodes."""
    assert small("choose") == 0
    found = vlmrm.read_json(tmp_path / "choices.json")
    assert set(found["runs"]) == {"triplet, fold 0, setting 0", "triplet, fold 0, setting 1",
                                  "zeroshot, fold 0, setting 0"}
    for tasks in found["runs"].values():
        assert set(tasks) == {"sweep-v3", "push-v3"}
        assert not any("voc_opposite" in scores for scores in tasks.values())
    assert [tasks for tasks, _ in trained_on] == [{"reach-v3"}] * 2

    for scores in found["runs"]["triplet, fold 0, setting 1"].values():
        scores["voc"] = 2.0
    vlmrm.write_whole(tmp_path / "choices.json", vlmrm.to_json(found))
    trained_on.clear()
    assert small("test") == 0
    runs = vlmrm.read_json(tmp_path / "trial.json")["runs"]
    untrained = {f"{arm}, fold 0, seed 0" for arm in ("zeroshot", *trial.CONTROLS)}
    assert set(runs) == {"triplet, fold 0, seed 0", "triplet, fold 0, seed 1", *untrained}
    for tasks in runs.values():
        assert set(tasks) == {"drawer-open-v3"}
    rate = trial.settings_of("triplet")[1]["learning_rate"]
    assert trained_on == [({"reach-v3", "push-v3", "sweep-v3"}, rate)] * 2
    assert runs["triplet, fold 0, seed 0"] != runs["triplet, fold 0, seed 1"]
    clock = runs["clock, fold 0, seed 0"]["drawer-open-v3"]
    assert (clock["voc"], clock["voc_opposite"]) == (1, 1)
    assert set(runs["simulator, fold 0, seed 0"]["drawer-open-v3"]) == {"voc"}
    model = vlmrm.build_backbone("tiny", str(vlmrm.DATA / "tiny.safetensors"))
    scores = runs["zeroshot, fold 0, seed 0"]["drawer-open-v3"]
    for path, same in ((tmp_path / "trial.npz", True), (toy.path, False)):
        expected = vlmrm.evaluate(model, vlmrm.Dataset(path), INSTRUCTIONS)
        voc = expected["tasks"]["drawer-open-v3"]["voc"]
        assert (scores["voc"] == pytest.approx(voc, abs=1e-3)) == same

def test_a_setting_that_diverges_stops_nothing(small, tmp_path, monkeypatch):
    """It has no results."""
    [setting, _] = trial.settings_of("triplet")
    wild = dict(setting, learning_rate=1e30, steps=3)
    monkeypatch.setattr(trial, "settings_of", lambda arm: [wild])
    assert small("choose") == 0
    runs = vlmrm.read_json(tmp_path / "choices.json")["runs"]
    assert runs["triplet, fold 0, setting 0"] == {} != runs["zeroshot, fold 0, setting 0"]

def test_arms_of_a_fold_have_the_same_data():
    """And the code of an arm does not change between its runs; that of others may."""
    code, _ = trial.CODE
    found = {"files": {"hop, fold 1": {"data": "a", code: "1"}}}
    trial.check_files(found, "r3m", 1, {"data": "a", code: "2"}, True)
    trial.check_files(found, "r3m", 2, {"data": "b", code: "2"}, True)
    trial.check_files(found, "hop", 1, {"data": "a", code: "2"}, False)  # it is complete
    for arm, files, goes_on in (("r3m", {"data": "b"}, True), ("hop", {"data": "b"}, False),
                                ("hop", {"data": "a", code: "2"}, True)):
        with pytest.raises(vlmrm.InputError, match="hop, fold 1 was begun with another"):
            trial.check_files(found, arm, 1, files, goes_on)

def test_a_score_is_never_of_nothing():
    """Without pairs of mixed episodes there is no ranking: said, not chosen by."""
    assert trial.score({}) == -np.inf
    with pytest.raises(vlmrm.InputError, match="no task has ranking_accuracy_same_time: reach-v3"):
        trial.score({"reach-v3": {"voc": 0.5}})

def test_two_processes_keep_what_both_found(tmp_path):
    path = tmp_path / "guide.json"
    first = {"gain": {"a": 1}, "plans": {}}
    assert workers.keep(first, path) == first
    both = workers.keep({"gain": {"b": 2}, "plans": {"c": 3}}, path)
    assert both == vlmrm.read_json(path) == {"gain": {"a": 1, "b": 2}, "plans": {"c": 3}}

def test_the_trial_goes_on_with_the_same_files_alone(small, tmp_path, monkeypatch, capsys):
    """Nothing is done twice; and what is left of a fold is not done with other files."""
    assert small("choose") == 0 and small("test") == 0
    found = vlmrm.read_json(tmp_path / "trial.json")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(trial, "play", None)  # there is no work
        assert small("choose") == 0 and small("test") == 0
    assert capsys.readouterr().out.count("nothing is left to do") == 2
    clock = found["runs"].pop("clock, fold 0, seed 0")
    (tmp_path / "starts/fold4.safetensors").unlink()  # of another fold
    monkeypatch.setattr(trial, "play", lambda job: clock)
    vlmrm.write_whole(tmp_path / "trial.json", vlmrm.to_json(found))
    assert small("test") == 0
    vlmrm.write_whole(tmp_path / "trial.json", vlmrm.to_json(found))
    (tmp_path / "starts/fold0.safetensors").unlink()
    capsys.readouterr()
    assert small("test") == 2
    assert "fold0" in capsys.readouterr().err
    other = {"made_of": '{"environments": []}'}
    safetensors.numpy.save_file({}, tmp_path / "starts/fold0.safetensors", other)
    assert small("test") == 2
    assert "begun with another start" in capsys.readouterr().err
    choices = vlmrm.read_json(tmp_path / "choices.json")
    del choices["runs"]["zeroshot, fold 0, setting 0"]
    vlmrm.write_whole(tmp_path / "choices.json", vlmrm.to_json(choices))
    assert small("choose") == 2
    assert "begun with another start" in capsys.readouterr().err

def test_a_start_that_has_seen_what_is_unseen_is_refused(small, monkeypatch, capsys):
    """The shipped one has not seen the first fold's tasks alone."""
    assert small("choose", "--arms", "zeroshot") == 0
    assert small("choose", "--arms", "clock") == 2
    for fold in (1, 2, 3, 4):
        monkeypatch.setattr(trial, "left_out", lambda _: scenes.left_out(fold))
        assert small("choose") == 2
        assert "which is unseen in fold 0" in capsys.readouterr().err

def test_the_digest_of_episodes(toy, tmp_path):
    """It is of the given tasks alone, in whatever file they are."""
    data = vlmrm.Dataset(toy.path)
    task, other, *_ = sorted(set(data.task))
    with np.load(toy.path) as arrays:
        changed = dict(arrays)
    changed["rewards"][data.task == other] += 1
    np.savez(tmp_path / "other.npz", **changed)
    same = trial.episodes_digest(tmp_path / "other.npz", (task,))
    assert same == trial.episodes_digest(toy.path, (task,))
    different = trial.episodes_digest(tmp_path / "other.npz", (other,))
    assert different != trial.episodes_digest(toy.path, (other,))
