"""Random damage to every file that vlmrm.py reads: no traceback, and no wrong number.

What a damaged file is answered with is one line, or the number that the whole file gives. Damage is
drawn from a seed, another one each day: DAMAGE_SEED=20261130 repeats that of a day.
"""
import datetime
import io
import json
import os
import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

import vlmrm

import films
import lerobot
import show
from conftest import one_line, toy_episode

SEED = int(os.environ.get("DAMAGE_SEED", f"{datetime.date.today():%Y%m%d}"))
VALUES = [None, True, False, -1, 0, 1, 3, 10**9, 0.5, float("nan"), "", "x", "../x", [], ["x"], {},
          {"x": 1}]
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)

@pytest.fixture
def rng(request):
    """Random numbers of the day and of the test."""
    return np.random.default_rng([SEED, len(request.node.name)])

def damage_bytes(content: bytes, rng) -> bytes:
    """The bytes cut short, emptied, with a bit turned, or with a stretch of them overwritten."""
    place = int(rng.integers(len(content)))
    kind = rng.choice(["cut", "empty", "bit", "stretch"], p=[0.3, 0.05, 0.4, 0.25])
    if kind == "cut":
        return content[:place]
    if kind == "empty":
        return b""
    changed = bytearray(content)
    if kind == "bit":
        changed[place] ^= 1 << int(rng.integers(8))
    else:
        junk = rng.bytes(min(40, len(content) - place))
        changed[place:place + len(junk)] = junk
    return bytes(changed)

def damage_json(content: bytes, rng) -> bytes:
    """A value somewhere in it is replaced or lost; or it is damaged as bytes are."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    found = json.loads(content)
    place = found
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        deeper = isinstance(place[key], (dict, list)) and len(place[key])
        if not deeper or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(found).encode()

def answer(function, *arguments):
    """What a function returns, or None if it refuses its input as it should."""
    try:
        return function(*arguments)
    except vlmrm.InputError as problem:
        assert str(problem)
        return None

def test_damaged_data_sets(toy, tmp_path, rng):
    """Whatever is accepted has the arrays and the pictures of the whole file."""
    path = tmp_path / "data.npz"
    refused = 0
    for _ in range(60):
        path.write_bytes(damage_bytes(toy.path.read_bytes(), rng))
        data = answer(vlmrm.Dataset, path)
        e = int(rng.integers(toy.E))
        pictures = answer(data.pictures, e) if data else None
        if pictures is None:
            refused += 1
        else:
            assert (pictures == toy.pictures(e)).all()
            for name in (*vlmrm.PER_EPISODE, *vlmrm.PER_PICTURE):
                assert (getattr(data, name) == getattr(toy, name)).all()
    assert refused > 30

def test_data_sets_of_other_arrays(toy, tmp_path, rng):
    """A field of another kind or shape, with other values, or none of it."""
    path = tmp_path / "data.npz"
    for _ in range(40):
        arrays = dict(np.load(toy.path))
        name = str(rng.choice(list(arrays)))
        changes = [arrays[name][:-1], arrays[name][..., None], np.array(0), arrays[name][:0],
                   arrays[name].astype(str), np.full(arrays[name].shape, np.nan),
                   np.full(arrays[name].shape, -1), arrays[name] != arrays[name]]
        arrays[name] = changes[rng.integers(len(changes))]
        if rng.random() < 0.2:
            del arrays[name]
        np.savez(path, **arrays)
        data = answer(vlmrm.Dataset, path)
        if data:  # such as other seeds, or steps
            assert data.E == toy.E and data.T == toy.T
            assert answer(data.pictures, toy.E - 1) is not None

def test_damaged_instructions(tmp_path, rng, tiny):
    """Whatever is accepted has sentences that the model can read, or says which it cannot."""
    whole = (vlmrm.DATA / "instructions.json").read_bytes()
    path = tmp_path / "instructions.json"
    for _ in range(60):
        path.write_bytes(damage_json(whole, rng))
        instructions = answer(vlmrm.load_instructions, path)
        for entry in (instructions or {}).values():
            assert len(entry["paraphrases"]) == 3
            for sentence in (entry["instruction"], *entry["paraphrases"]):
                answer(tiny.check_sentence, sentence)

@pytest.mark.parametrize("name, damage, count", [
    ("config.json", damage_json, 40), ("model.safetensors", damage_bytes, 30),
    ("metrics.json", damage_json, 10)])
def test_damaged_runs(finished, tmp_path, rng, name, damage, count):
    """A model that is loaded scores as the whole one does."""
    expected = vlmrm.load_reward_model(finished, "cpu").score(PICTURE, "open the drawer")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for _ in range(count):
        (folder / name).write_bytes(damage((finished / name).read_bytes(), rng))
        model = answer(vlmrm.load_reward_model, folder, "cpu")
        if model:
            assert model.score(PICTURE, "open the drawer") == pytest.approx(expected, abs=1e-6)

def test_damaged_checkpoints(toy, tmp_path, rng, monkeypatch):
    """A run goes on from a whole checkpoint to the same weights, and from no damaged one."""
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    config = {"seed": 0, "steps": 2, "batch": 2, "learning_rate": 1e-3}
    path = tmp_path / "checkpoint.pt"

    def train(steps):
        model = vlmrm.build_backbone("tiny", str(vlmrm.DATA / "tiny.safetensors"))
        vlmrm.add_lora(model, 2)
        vlmrm.train(model, toy, instructions, vlmrm.triplet_loss, config, saved=path)
        return vlmrm.trained_weights(model)

    expected = train(2)
    whole = path.read_bytes()
    for _ in range(30):
        path.write_bytes(damage_bytes(whole, rng))
        weights = answer(train, 2)
        for name in weights or {}:
            assert (weights[name] == expected[name]).all()

@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".jpg", ""])
def test_damaged_films(finished, tmp_path, rng, suffix):
    """A number for each picture, or one line. Nobody can tell a damaged film from a strange one."""
    pictures = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    whole = tmp_path / f"whole{suffix or '.png'}"
    imageio.imwrite(whole, pictures if suffix in (".mp4", ".gif") else pictures[0])
    path = tmp_path / f"clip{suffix}"
    model = vlmrm.load_reward_model(finished, "cpu")
    file = path
    if suffix == "":
        path.mkdir()
        file = path / "1.png"
        Image.fromarray(pictures[0]).save(path / "0.png")
    for _ in range(6):
        file.write_bytes(damage_bytes(whole.read_bytes(), rng))
        rewards = answer(show.score, model, path, "open")
        assert rewards is None or len(rewards) and np.isfinite(rewards).all()

def makes_a_data_set_or_refuses(main, arguments, path, capsys):
    """No third thing. What it makes has pictures and rewards."""
    path.unlink(missing_ok=True)
    status = main([str(argument) for argument in arguments])
    assert status in (0, 2)
    if status == 2:
        one_line(capsys, "", name=main.__module__)
        assert not path.exists()
        return
    capsys.readouterr()
    data = vlmrm.Dataset(path)
    assert data.E and len(data.pictures(data.E - 1)) == data.T

def test_damaged_films_of_a_data_set(towel, tmp_path, rng, capsys):
    """Of one film, or of the sentences."""
    folder = tmp_path / "towel"
    shutil.copytree(towel, folder)
    arguments = [folder / "films", "--sentences", folder / "towel.json", "--out",
                 tmp_path / "towel.npz"]
    for name in ("0.mp4", "2.gif", "failed/0.mp4", "../../towel.json") * 2:
        file = folder / "films" / "fold-towel" / name
        whole = file.read_bytes()
        file.write_bytes((damage_json if name.endswith("json") else damage_bytes)(whole, rng))
        makes_a_data_set_or_refuses(films.main, arguments, tmp_path / "towel.npz", capsys)
        file.write_bytes(whole)

@pytest.mark.parametrize("layout", ["v3.0 video", "v2.0 image"])
def test_damaged_lerobot_folders(tmp_path, rng, layout, capsys):
    """Of one file: the description, a table, a film."""
    pytest.importorskip("pyarrow")
    from test_lerobot import lerobot_folder
    lerobot_folder(tmp_path / "a", *layout.split())
    arguments = ["read", tmp_path / "a", "--out", tmp_path / "a.npz", "--sentences",
                 tmp_path / "a.json", "--frames", "5"]
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    for file in files * (20 // len(files) + 1):
        (tmp_path / "a.json").unlink(missing_ok=True)
        whole = file.read_bytes()
        damage = damage_json if file.name == "info.json" else damage_bytes
        file.write_bytes(damage(whole, rng))
        makes_a_data_set_or_refuses(lerobot.main, arguments, tmp_path / "a.npz", capsys)
        file.write_bytes(whole)

OBJECTIVE = """import torch
TUNED = (1e-3, {"weight": 0.5})
LABELS = "times"

def loss(frames, texts, times, weight=1.0):
    reward = (frames * texts[:, None]).sum(-1)
    falls = torch.relu(reward[:, :-1] - reward[:, 1:] + 0.1)
    return weight * falls.mean()
"""

def test_damaged_objectives(toy, tmp_path, rng, monkeypatch, capsys):
    """A letter lost, changed or doubled somewhere in a Python file."""
    monkeypatch.setattr(vlmrm, "draw_curves", lambda *_: None)  # it takes the longest
    path = tmp_path / "own.py"
    for _ in range(25):
        place = int(rng.integers(len(OBJECTIVE)))
        put = str(rng.choice(["", "x", " ", "0", "(", OBJECTIVE[place] * 2]))
        path.write_text(OBJECTIVE[:place] + put + OBJECTIVE[place + 1:])
        status = vlmrm.main(["--objective", str(path), "--data", str(toy.path), "--steps", "1",
                             "--batch", "2", "--device", "cpu", "--lora", "2",
                             "--runs", str(tmp_path / "runs")])
        assert status in (0, 2), OBJECTIVE[:place] + put + OBJECTIVE[place + 1:]
        lines = [line for line in capsys.readouterr().err.splitlines() if "vlmrm:" in line]
        assert len(lines) == (status == 2)

# What others do to the files meanwhile

def run_on(data, folder, *options):
    """A step on a data set, in this process."""
    return vlmrm.main(["--data", str(data), "--steps", "1", "--batch", "2", "--device", "cpu",
                       "--lora", "2", "--runs", str(folder / "runs"), *options])

def test_a_bad_data_set_does_not_take_the_place_of_a_good_one(tmp_path):
    path = tmp_path / "x.npz"
    good = toy_episode("reach-v3", 0) | {"split": "test"}
    vlmrm.write_dataset(path, [good])
    whole = path.read_bytes()
    clear = io.BytesIO()
    Image.new("RGBA", (32, 320)).save(clear, "WEBP")
    for bad in ({"split": "exam"}, {"strip": clear.getvalue()}):
        with pytest.raises(vlmrm.InputError):
            vlmrm.write_dataset(path, [good | bad])
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["x.npz"]

def test_a_file_that_changes_while_it_is_used(toy, tmp_path, monkeypatch, capsys):
    """Between two seeds: the second does not run under the checksum of the first. So for weights,
    also of the name of an objective."""
    shutil.copy(toy.path, tmp_path / "own.npz")
    evaluate = vlmrm.evaluate

    def change(*arguments):
        with open(tmp_path / "own.npz", "ab") as file:
            file.write(b"more")
        return evaluate(*arguments)

    monkeypatch.setattr(vlmrm, "evaluate", change)
    assert run_on(tmp_path / "own.npz", tmp_path, "--seeds", "2") == 2
    one_line(capsys, "has changed: give the command again")
    assert os.listdir(tmp_path / "runs") == ["triplet-seed0"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(vlmrm.DATA / "tiny.safetensors", "vip")
    config = vlmrm.configuration(vlmrm.parse_arguments(["--pretrained", "vip"]), "vip", 0)
    assert config["pretrained"] == str(tmp_path / "vip") and config["objective"] == "vip"
    assert set(config["sha256"]) == {"vlmrm.py", "pretrained", "data", "instructions"}

def test_no_rewards_to_learn_from(toy, tmp_path, capsys):
    """Films have none. A run without training says that it trained on nothing."""
    episodes = [toy_episode("reach-v3", seed) | {"rewards": np.zeros(10)} for seed in range(8)]
    vlmrm.write_dataset(tmp_path / "films.npz", vlmrm.assign_splits(episodes))
    assert run_on(tmp_path / "films.npz", tmp_path, "--objective", "preference-oracle") == 2
    one_line(capsys, "has no rewards, which this objective learns from")
    assert run_on(toy.path, tmp_path, "--objective", "zeroshot") == 0
    assert "0 episodes to train on" in capsys.readouterr().out

def test_a_file_may_be_written_by_two(tmp_path, monkeypatch):
    """The one that ends first tidies up."""
    path = tmp_path / "x"
    replace = os.replace

    def first(unfinished, path):
        Path(path).write_bytes(b"whole")
        os.remove(unfinished)
        replace(unfinished, path)

    monkeypatch.setattr(os, "replace", first)
    vlmrm.write_whole(path, b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["x"]
