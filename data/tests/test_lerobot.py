"""Tests of lerobot.py: LeRobot's data in, progress out. Data sets are written in its layouts."""
import json
import sys
from pathlib import Path

import vlmrm  # before torch: see there

import imageio.v3 as imageio
import numpy as np
import pytest

import lerobot
from conftest import refuses

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet

TOP = "observation.images.top"
FROM = f"videos/{TOP}/from_timestamp"
TO = f"videos/{TOP}/to_timestamp"
SAID = ("Go  up.", "Go  up.", "Go  up.", "open")
READ = "read a --out a.npz --sentences a.json --frames 5"
LENGTHS = (6, 7, 5, 8)
EPISODE = np.repeat(range(4), LENGTHS)  # of each of the 26 pictures
STEP = np.concatenate([np.arange(length) for length in LENGTHS])
I = np.arange(26)

def lerobot_folder(folder, version="v3.0", kind="video", said=SAID, lengths=LENGTHS, table={},
                   rows={}, **changes):
    """LeRobot's data at 10 pictures a second: picture i is a grey of 9 i, its reward i / 2. table,
    rows and changes replace columns, those of the meta data, and entries of info.json."""
    for path in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{TOP}/chunk-000"):
        (folder / path).mkdir(parents=True)
    episode = np.repeat(range(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    i = np.arange(len(step))
    shades = np.uint8(9 * i if len(i) < 28 else 10 * step)
    frames = shades.repeat(32 * 32 * 3).reshape(-1, 32, 32, 3)
    columns = {"index": i, "episode_index": episode, "frame_index": step, "timestamp": step / 10,
               "next.reward": i / 2, "next.success": np.isin(i, [4, 5, 11]) | (i == i[-1])}
    if kind == "image":
        columns[TOP] = [{"bytes": imageio.imwrite("<bytes>", frame, extension=".png")}
                        for frame in frames]
    columns.update(table)
    parts = {"chunk-000/file-000": i >= 0}  # v3.0: one for all
    if version != "v3.0":
        parts = {f"chunk-000/episode_{e:06d}": episode == e for e in range(len(lengths))}
    for file, part in parts.items():
        if kind == "video":
            imageio.imwrite(folder / f"videos/{TOP}/{file}.mp4", frames[part], fps=10)
        own = {column: [value for value, wanted in zip(values, part) if wanted]
               for column, values in columns.items() if values is not None}
        pyarrow.parquet.write_table(pyarrow.table(own), folder / f"data/{file}.parquet")

    ends = np.cumsum(lengths) / 10  # seconds
    meta = {"episode_index": range(len(lengths)), "length": lengths, "tasks": [[s] for s in said]}
    lines = [json.dumps(dict(zip(meta, row))) for row in zip(*meta.values())]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines))
    for column in ("data/chunk_index", "data/file_index", f"videos/{TOP}/chunk_index",
                   f"videos/{TOP}/file_index"):
        meta[column] = [0] * len(lengths)
    meta.update({FROM: [0, *ends[:-1]], TO: ends})
    meta.update(rows)
    pyarrow.parquet.write_table(pyarrow.table({k: v for k, v in meta.items() if v is not None}),
                                folder / "meta/episodes/chunk-000/file-000.parquet")
    name = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    if version != "v3.0":
        name = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    info = {"codebase_version": version, "fps": 10, "total_episodes": len(lengths),
            "features": {TOP: {"dtype": kind}}, "data_path": f"data/{name}.parquet",
            "video_path": f"videos/{{video_key}}/{name}.mp4"}
    (folder / "meta/info.json").write_text(json.dumps(dict(info, **changes)))

@pytest.mark.parametrize("layout", ["v3.0 video", "v3.0 image", "v2.0 image", "v2.1 video"])
def test_lerobots_data_in_and_progress_out(place, brightness, layout):
    """Picture i gets the reward i: experts go from 0 and 6, mean 3, to 5 and 12, or 18 to 25."""
    lerobot_folder(Path("a"), *layout.split())
    assert lerobot.main(READ.split()) == 0
    data = vlmrm.Dataset("a.npz")
    shown = np.array([[0, 1, 2, 4, 5], [6, 8, 9, 10, 12], range(13, 18), [18, 20, 22, 23, 25]])
    assert (data.steps == STEP[shown]).all() and (data.rewards == shown / 2).all()
    assert np.abs(data.load(range(4)).mean((2, 3, 4)) - 9 * shown).max() < 3
    assert [np.flatnonzero(row).tolist() for row in data.success] == [[3, 4], [4], [], [4]]
    assert data.task.tolist() == ["go-up", "go-up", "go-up", "open"]
    assert data.source.tolist() == ["expert", "expert", "mixed", "expert"]
    assert data.split.tolist() == ["train", "train", "validation", "train"]
    assert vlmrm.load_instructions("a.json")["go-up"]["paraphrases"] == ["Go up."] * 3

    assert lerobot.main(["progress", "run", "a"]) == 0
    table = pyarrow.parquet.read_table("a/sarm_progress.parquet")
    assert [str(column.type) for column in table.columns] == ["int64"] * 3 + ["float"]
    progress = np.where(I < 18, (I - 3) / 5.5, (I - 18) / 7).clip(0, 1)
    for name, values in (("index", I), ("episode_index", EPISODE), ("frame_index", STEP),
                         ("progress_sparse", progress)):
        np.testing.assert_allclose(table[name], values, atol=0.05)

@pytest.mark.parametrize("layout", ["v3.0 video", "v2.1 video", "v3.0 image"])
def test_only_the_first_episodes(place, layout):
    lerobot_folder(Path("a"), *layout.split())
    assert lerobot.main([*READ.split(), "--episodes", "2"]) == 0
    assert vlmrm.Dataset("a.npz").seed.tolist() == [0, 1]

def test_a_data_set_of_one_task_works_at_once(place, capsys):
    """Read, train and progress, with the options that they have by default."""
    lerobot_folder(Path("a"), said=["make it light"] * 5, lengths=(24, 30, 26, 24, 25),
                   table={"next.success": None, "next.reward": None})
    assert lerobot.main(["read", "a", "--out", "a.npz", "--sentences", "a.json"]) == 0
    data = vlmrm.Dataset("a.npz")
    assert (data.E, data.T, data.S) == (5, 24, 96) and data.success.sum() == 5
    assert vlmrm.main(["--data", "a.npz", "--instructions", "a.json", "--runs", "runs/a", "--steps",
                       "2", "--device", "cpu"]) == 0
    assert lerobot.main(["progress", "runs/a/triplet-seed0", "a"]) == 0
    table = pyarrow.parquet.read_table("a/sarm_progress.parquet")
    model = vlmrm.load_reward_model("runs/a/triplet-seed0", "cpu")
    rewards = model.score(data.pictures(0), "make it light")
    assert vlmrm.value_order_correlation(rewards) > 0
    first = table["progress_sparse"].to_numpy()[:24]
    assert np.corrcoef(first, rewards)[0, 1] > 0.9
    assert table.num_rows == 129 and {first[0] < 0.2, first[-1] > 0.8} == {True}

def test_sentences_that_differ_are_tasks_that_differ(place):
    said = ["Go up.", "go up!", "go up", "?"]
    lerobot_folder(Path("a"), said=said)
    assert lerobot.main(READ.split()) == 0
    tasks = vlmrm.Dataset("a.npz").task.tolist()
    assert len(set(tasks)) == 4 and tasks[0] == "go-up"
    instructions = vlmrm.load_instructions("a.json")
    assert [instructions[task]["instruction"] for task in tasks] == said

def swapped(values):
    """The last row of the first episode and the first of the second in each other's place."""
    values = list(values)
    values[5:7] = values[6], values[5]
    return values

@pytest.mark.parametrize("says, damage", [
    ("ArrowInvalid", {"data_path": "meta/info.json"}),
    ("no such file", {"video_path": "lost"}),
    ("its version is v1.6", {"version": "v1.6"}),
    ("5 episodes, its folder 4", {"total_episodes": 5}),
    ("4 episodes, its folder 3", {"rows": {"episode_index": [0, 1, 1, 3]}}),
    ("not one sentence", {"said": " " * 4}),
    ("not one sentence", {"rows": {"tasks": [["a", "b"]] * 4}}),
    ("has a, b", {"features": {"a": {"dtype": "image"}, "b": {"dtype": "video"}}}),
    ("has none", {"features": {}}),
    ("timestamp of episode 0", {"fps": 20}),
    ("with fps 20", {"fps": 20, "table": {"timestamp": None}}),
    ("episode 1 is not at", {"rows": {FROM: [0.0] * 4}}),
    ("episode 0 is not at", {"rows": {FROM: [0.0] * 4, TO: [2.6] * 4}}),
    ("episode 1 is not at", {"rows": {FROM: [0, 0.5, 1.2, 1.7], TO: [0.6, 1.2, 1.7, 2.5]}}),
    ("from_timestamp", {"rows": {FROM: None}}),
    ("to_timestamp", {"rows": {TO: None}}),
    ("episode 0 is not at", {"rows": {TO: [float("nan"), 1.3, 1.8, 2.6]}}),
    ("episode 0 is not 6 rows", {"table": {"episode_index": swapped(EPISODE)}}),
    ("episode 1 is not 7 rows", {"table": {"episode_index": np.where(I == 8, 3, EPISODE)}}),
    ("frame_index of episode 0", {"table": {"frame_index": swapped(STEP)}}),
    ("frame_index of episode 0 is float", {"table": {"frame_index": STEP / 1}}),
    ("index of episode 1", {"table": {"index": I - EPISODE}}),
    ("index of episode 0", {"table": {"index": I[::-1].copy()}}),
    ("timestamp of episode 0", {"table": {"timestamp": STEP / 5}}),
    ("next.reward of episode 0 is object", {"table": {"next.reward": ["much"] * 26}}),
    ("next.reward of episode 0 is object", {"table": {"next.reward": [[0.5, 1.0]] * 26}}),
    ("next.reward of episode 1 is float64", {"table": {"next.reward": [0.5] * 9 + [None] * 17}}),
    ("next.success of episode 0 is int64", {"table": {"next.success": I * 0 + 1}})])
def test_lerobots_data_that_are_refused(place, brightness, capsys, says, damage):
    lerobot_folder(Path("a"), **damage)
    before = sorted(place.rglob("*"))
    refuses(lerobot.main, READ.split(), capsys, says)
    refuses(lerobot.main, ["progress", "run", "a"], capsys, says)
    assert sorted(place.rglob("*")) == before

@pytest.mark.parametrize("layout, length, says", [
    ("v3.0", 25, "ends in episode 3"), ("v3.0", 27, "more pictures than its episodes"),
    ("v2.1", 7, "ends in episode 3"), ("v2.1", 9, "more pictures than its episodes")])
def test_a_film_has_the_pictures_of_its_episodes(place, capsys, layout, length, says):
    lerobot_folder(Path("a"), layout)
    film = sorted(Path(f"a/videos/{TOP}/chunk-000").iterdir())[-1]
    imageio.imwrite(film, np.zeros((length, 32, 32, 3), np.uint8), fps=10)
    refuses(lerobot.main, READ.split(), capsys, says)
    assert not Path("a.npz").exists()

@pytest.mark.parametrize("arguments, said, says", [
    (READ + " --camera me", SAID, f"has {TOP}"),
    (READ + "6", SAID, "an episode has only 5 pictures"),
    (READ, SAID, "pip install pyarrow"),
    ("progress run a", SAID, "no rise in the rewards of experts"),
    ("progress run a", "abcd", "'c' has no expert"),
    ("progress run a", ["a"] * 3 + ["b " * 30], "word pieces")])
def test_lerobots_commands_that_are_refused(
        place, brightness, monkeypatch, capsys, arguments, said, says):
    lerobot_folder(Path("a"), said=said)
    monkeypatch.setattr(brightness, "score", lambda pictures, text: np.zeros(len(pictures)))
    if "pyarrow" in says:
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    before = sorted(place.rglob("*"))
    refuses(lerobot.main, arguments.split(), capsys, says)
    assert sorted(place.rglob("*")) == before
