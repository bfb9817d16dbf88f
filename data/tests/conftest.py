"""What the tests in this folder share: the folders of the code, toy data, a run, a model."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("data/exercises", "data/study", "data/tools", "."):
    sys.path.insert(0, str(ROOT / folder))

import vlmrm  # before torch: see there

import imageio.v3 as imageio
import torch
import torch.nn.functional as F

COLORS = {"reach-v3": (255, 60, 60), "push-v3": (60, 255, 60), "sweep-v3": (60, 60, 255),
          "drawer-open-v3": (255, 255, 60)}
TOWEL = {"fold-towel": {"instruction": "fold it", "paraphrases": ["halve it", "a fold", "folds"]}}
GROWING = np.stack([np.full((32, 48, 3), 8 * k, np.uint8) for k in range(30)])  # lighter by 8

def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)

def toy_episode(task, seed, source="expert", T=10, size=32):
    """A square of the task's colour crosses the picture, or for `mixed` wanders; reward = place."""
    rng = np.random.default_rng(seed)
    pictures = np.full((T, size, size, 3), 40, np.uint8)
    places = np.linspace(0, size - 8, T)
    if source == "mixed":
        places = rng.uniform(0, size - 8, T)
    top = rng.integers(0, size - 8)
    for t, left in enumerate(places.astype(int)):
        pictures[t, top:top + 8, left:left + 8] = COLORS[task]
    return {"task": task, "source": source, "seed": seed, "steps": np.arange(T),
            "rewards": np.float32(10 * places / (size - 8)), "success": places > size - 10,
            "strip": vlmrm.pack_pictures(pictures)}

def mixes(loss):
    """Whether the gradient of a video's frames is another one if the other sentences are. All are
    close to one another, or a softmax has its mind made up."""
    torch.manual_seed(0)
    centre = torch.randn(16)

    def near(*shape):
        return F.normalize(centre + 0.3 * torch.randn(*shape, 16), dim=-1)

    frames = near(6, 5).requires_grad_()
    times = torch.linspace(0, 1, 5).expand(6, 5)
    texts = near(6)
    others = near(6)
    others[0] = texts[0]
    more = {}
    if vlmrm.takes_before(loss):
        more["before"] = (near(6, 5), near(6))
    gradients = []
    for sentences in (texts, others):
        value = loss(frames, sentences, times, **more)
        gradients.append(torch.autograd.grad(value, frames)[0][0])
    return bool((gradients[0] - gradients[1]).abs().max() > 1e-6)

def read_kept(folder, name="metrics.json"):
    """What a run keeps in a JSON file of its folder."""
    return json.loads((folder / name).read_text())

def command(*arguments, cwd, script="vlmrm.py"):
    """Run a script in a process of its own: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        timeout=300, env=dict(os.environ, PYTHONPATH=""))
    return result.returncode, result.stdout, result.stderr

def one_line(capsys, says, name="vlmrm"):
    """What was printed to stderr but progress bars is one line of this program, and says so."""
    lines = []
    for line in re.split(r"[\r\n]", capsys.readouterr().err):
        if line.strip() and not re.search(r"\d\d:\d\d[<,]", line):
            lines.append(line)
    assert len(lines) == 1 and lines[0].startswith(f"{name}: ") and says in lines[0], lines

def refuses(main, arguments, capsys, says):
    """A tool ends with code 2 and one line."""
    assert main([str(argument) for argument in arguments]) == 2
    one_line(capsys, says, name=main.__module__)

@pytest.fixture
def rendering():
    """Skips what asks for it on a machine that cannot render."""
    try:
        _, _, renderer = vlmrm.open_task("reach-v3", 32)
    except vlmrm.InputError as problem:
        pytest.skip(str(problem))
    renderer.close()

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A data set of four toy tasks, one of them unseen."""
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    episodes = []
    for task in COLORS:
        experts = [toy_episode(task, seed) for seed in range(8)]
        mixed = [toy_episode(task, seed, "mixed") for seed in range(100, 106)]
        episodes += vlmrm.assign_splits(experts + mixed)
    vlmrm.write_dataset(path, episodes)
    return vlmrm.Dataset(path)

@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """The folder of a finished run of triplet with adapters, two steps on the toy data."""
    runs = tmp_path_factory.mktemp("runs")
    assert vlmrm.main(["--data", str(toy.path), "--steps", "2", "--batch", "3", "--seed", "1",
                       "--runs", str(runs), "--lora", "2", "--device", "cpu"]) == 0
    return runs / "triplet-seed1"

@pytest.fixture
def tiny():
    """The tiny backbone with random weights, always the same."""
    torch.manual_seed(0)
    return vlmrm.build_backbone("tiny", "none").eval()

@pytest.fixture
def brightness(tiny, monkeypatch):
    """A model whose reward is the mean brightness, / 9, in the place of any run's."""
    monkeypatch.setattr(vlmrm, "load_reward_model", lambda run, device="auto": tiny)
    monkeypatch.setattr(tiny, "score", lambda pictures, text: pictures.mean((1, 2, 3)) / 9)
    return tiny

@pytest.fixture(scope="session")
def towel(tmp_path_factory):
    """A folder with films of a task done and failed, and its sentences."""
    root = tmp_path_factory.mktemp("towel")
    folder = root / "films/fold-towel"
    (folder / "failed").mkdir(parents=True)
    for name in ("0.mp4", "1.mp4", "2.gif", "3.mp4", "4.mp4", "failed/0.mp4"):
        imageio.imwrite(folder / name, GROWING)
    (root / "towel.json").write_text(json.dumps(TOWEL))
    return root

@pytest.fixture
def place(towel, tmp_path, monkeypatch):
    """A folder to work in, with a copy of it."""
    shutil.copytree(towel, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
