"""
Train a vision-language reward model, measure it, and change only its learning objective.

Such a model looks at a picture and a sentence ("close the drawer") and returns a number that should
rise as the task gets done. Ours is the plainest there is: two towers map frame and sentence to unit
vectors, and their cosine is the reward. What it is worth depends on the objective it was trained
with, and that is what this file compares, after "Revisiting the learning objectives of
vision-language reward models" (arXiv 2512.20675): same backbone, same videos, same evaluation.

  python vlmrm.py --objective triplet              train, test, draw: 43 seconds on two CPU cores
  python vlmrm.py --objective all --seeds 3                      compare all objectives
  python vlmrm.py --objective triplet my_own.py                  compare one with yours
  python vlmrm.py --score clip.mp4 --instruction "close the drawer"      use what was trained
  python vlmrm.py --collect --tasks reach-v3 push-v3 --data two.npz      make your own videos
  python vlmrm.py --backbone ViT-B-32-quickgelu --pretrained openai --lora 8 --learning-rate 1e-4

Expect of triplet (mean ± std of seeds 0, 1, 2; torch 2.15, two cores of an AMD EPYC; on other CPUs
some hundredths more or less):
  VOC (order of an expert's frames, 1 is best)       0.93 ± 0.00 seen tasks, 0.55 ± 0.04 unseen
  ranking accuracy (chance .5)                       0.77 ± 0.01 seen tasks, 0.65 ± 0.02 unseen

Shapes: B videos in a batch, K frames of each, D dimensions, E episodes, T frames of each, S x S
pixels, M sentences, R bootstrap replicates. Left out on purpose: a configuration system (argparse
is one), a trainer class (it is one loop), experiment trackers (a run is a folder of five files),
data loaders (the videos fit into memory), downloads (all it takes is in data/).
"""
import time

STARTED = time.perf_counter()  # the wall time of a run counts its imports

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import warnings
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

# OpenMP's threads wait for each other by spinning, which makes a run many times slower beside any
# other busy process. Let them sleep. torch reads this once: import vlmrm before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.modules.setdefault("vlmrm", sys.modules[__name__])  # a file with an objective may import it
DATA = Path(__file__).resolve().parent / "data"

class InputError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""

# -----------------------------------------------------------------------------
# The options come first: --help and typing errors need not wait for torch.

def objective(text: str) -> str:
    """A type for argparse: a registered objective, "all", or the path of a Python file."""
    if text in ("all", *objective_names()) or text.endswith(".py") and Path(text).is_file():
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is not all, {', '.join(objective_names())}, or a Python file")

def objective_names() -> list[str]:
    """The names in OBJECTIVES (end of section 3), read off this file while they are not there."""
    table = Path(__file__).read_text(encoding="utf-8").split("\nOBJECTIVES = {")[1].split("\n}")[0]
    return list(globals().get("OBJECTIVES", re.findall(r'^    "([^"]+)":', table, re.MULTILINE)))

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from argv or the command line. Bad ones end in one line and exit code 2."""
    parser = argparse.ArgumentParser("vlmrm", description="Train and test reward models.")
    parser.error = lambda text: parser.exit(2, f"vlmrm: {' '.join(text.split())}; see --help\n")
    add = parser.add_argument_group("what to do").add_argument
    add("--objective", nargs="+", type=objective, default=["triplet"], metavar="NAME",
        help=f"{', '.join(objective_names())}, or a file with your own; several, or all, compared")
    add("--resume", type=Path, metavar="FOLDER", help="go on with a run that was stopped")
    add("--score", type=Path, metavar="VIDEO", help="reward the frames of a video or picture(s)")
    add("--collect", action="store_true", help="make a data set: --data")
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--seeds", type=int, default=1, help="how many, from --seed on (1)")
    add("--setting", choices=("tuned", "official"), default="tuned", help="the constants")
    add("--backbone", default="tiny", help="tiny, thumbnail, or any of open_clip (tiny)")
    add("--pretrained", help="open_clip tag, file of weights, or none: random (tiny has its own)")
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank only (0)")
    add("--steps", type=int, default=120, help="optimiser steps (120)")
    add("--batch", type=int, default=40, help="videos per step, 5 frames of each (40)")
    add("--learning-rate", type=float, help="at its peak (that of --setting)")
    add("--data", type=Path, default=DATA / "metaworld.npz", help="data set (data/metaworld.npz)")
    add("--instructions", type=Path, default=DATA / "instructions.json", help="its sentences")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(first there is)")
    add("--runs", type=Path, default=Path("runs"), help="where the folders of runs are (runs)")
    add = parser.add_argument_group("with --score").add_argument
    add("--instruction", help="what the video should show")
    add("--model", type=Path, default=Path("runs/triplet-seed0"), help="a run (runs/triplet-seed0)")
    add = parser.add_argument_group("with --collect").add_argument
    add("--tasks", nargs="+", default=[], metavar="TASK", help="such as drawer-open-v3 (all 50)")
    add("--expert", type=int, default=14, help="experts per task (14)")
    add("--mixed", type=int, default=6, help="mixed episodes per task (6)")
    add("--frames", type=int, default=24, help="frames per episode (24)")
    add("--size", type=int, default=96, help="pixels, square (96)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    refuse_options(parser, args := parser.parse_args(argv))
    return args

def refuse_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End in one line for a number out of range, or an option that would not be obeyed."""
    least = {"seed": 0, "lora": 0, "mixed": 0, "frames": 5, "learning_rate": 1e-9}  # others: 1
    use, collection = {"instruction", "model"}, {"tasks", "expert", "mixed", "frames", "size",
                                                 "workers"}
    obeyed = {"collect": collection | {"seed", "data", "instructions"}, "resume": {"device"},
              "score": use | {"device"}, "objective": set(vars(args)) - use - collection}
    mode = next(mode for mode in ("collect", "score", "resume", "objective") if getattr(args, mode))
    for name, value in vars(args).items():
        option, low = f"--{name.replace('_', '-')}", least.get(name, 1)
        if type(value) in (int, float) and not low <= value <= 10**6:
            parser.error(f"{option} {value} is not between {low} and 1000000")
        if name not in {mode, *obeyed[mode]} and value != parser.get_default(name):
            parser.error(f"{option} has no effect with --{mode}")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback
    parse_arguments()

import imageio.v3 as imageio  # films
import numpy as np
import open_clip  # the CLIP architectures and tokenizers
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot: no window opens by mistake
from PIL import Image, ImageOps  # WebP, and --score's pictures
from safetensors import safe_open
from safetensors.torch import load_file, save
from scipy.stats import rankdata
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Files: whatever goes wrong with one is one line, and none is left half written.

@contextlib.contextmanager
def reading(path: Path):
    """Turn whatever goes wrong while a file is read into one line that names the file."""
    try:
        if not Path(path).is_file():  # a pipe or a device could keep us waiting
            raise ValueError("there is no such file")
        yield
    except InputError:
        raise
    except Exception as problem:  # numpy, zip, json, PIL and safetensors have dozens of kinds
        kind = "" if type(problem) is ValueError else type(problem).__name__ + ": "
        text = " ".join(str(problem).split())[:200]
        raise InputError(f"cannot read {path}: {kind}{text}") from None

def read_json(path: Path) -> dict:
    """The dictionary in a JSON file. Raises InputError."""
    with reading(path):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))

def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, which is changed when all of it is on the disk."""
    with open(f"{path}.unfinished", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)

def write_json(path: Path, content: dict) -> None:
    """A dictionary, arrays in it as lists, as a JSON file."""
    write_whole(path, json.dumps(content, indent=1, default=lambda array: array.tolist()).encode())

def progress_bar(items, **options):
    """tqdm; in a log file a line every 20 s instead of ten a second."""
    terminal = bool(sys.stderr) and sys.stderr.isatty()
    return tqdm(items, dynamic_ncols=terminal, mininterval=0.1 if terminal else 20, **options)

# -----------------------------------------------------------------------------
# 1. Dataset collection
#
# A reward model learns what "further along" looks like, so it needs videos in which things get
# done. Meta-World has 50 tasks, and for each a scripted policy: an expert. Two kinds of episodes:
#   expert  the scripted policy; only episodes that succeed are kept, cut 5 steps after success.
#           We train on some of them. On the others, time itself says which frame is further.
#   mixed   the same policy with noise on its actions and some of them random, for 150 steps: some
#           succeed, most dither, fail or go backwards. Nobody trains on them. Here the simulator's
#           own dense reward (0 to 10) says which frame is better.
# Ten tasks are unseen: never trained on. Each has a sibling among the other forty (open the drawer,
# close the drawer). They show whether a model reads the instruction or goes by how a scene looks.

UNSEEN_TASKS = (
    "button-press-v3", "coffee-pull-v3", "door-open-v3", "door-unlock-v3", "drawer-open-v3",
    "faucet-open-v3", "handle-pull-side-v3", "plate-slide-back-v3", "push-wall-v3",
    "window-close-v3")
EPISODE = {"task": "U", "split": "U", "source": "U", "seed": "iu", "rewards": "f", "success": "b",
           "steps": "iu"}  # an episode's fields, see Dataset, and their kinds of numpy array
# All in the simulator's state that a picture depends on: where things, lights and cameras are.
POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "light_xpos", "light_xdir", "cam_xpos",
         "cam_xmat")

def group_of(task: str) -> str:
    """"unseen" for the ten tasks that nobody trains on, "seen" for the others."""
    return "unseen" if task in UNSEEN_TASKS else "seen"

def load_instructions(path: Path) -> dict[str, dict]:
    """The sentences: {task: {"instruction", "paraphrases" (3, never trained on), "opposite" (some:
    the task that undoes this one)}}. Raises InputError."""
    sentences = read_json(path)
    with reading(path):
        for task, entry in sentences.items():
            if len([entry["instruction"], *entry["paraphrases"]]) != 4:
                raise ValueError(f"{task} needs one instruction and three paraphrases")
            if entry.get("opposite", task) not in sentences:
                raise ValueError(f"the opposite of {task} is no task")
    return sentences

def roll_out(env, policy, rng, steps: int, noise: float, random_share: float):
    """Run one episode: the POSES, the reward and the success flag after each step, as three
    sequences. Each action, in [-1, 1], is random with probability random_share, and then gets
    Gaussian noise. With noise 0 this is the expert, which stops 5 steps after success."""
    history, (observation, _) = [], env.reset()
    for _ in range(steps):
        action = policy.get_action(observation)
        if rng.random() < random_share:
            action = rng.uniform(-1, 1, size=4)  # x, y, z, gripper
        action = np.clip(action + noise * rng.normal(size=4), -1, 1)
        observation, reward, _, _, info = env.step(action)
        # Drawing costs ten times as much as a step, and which frames we want depends on how long
        # the episode gets: keep the poses now, draw the chosen few later.
        poses = {name: getattr(env.data, name).copy() for name in POSES}
        history.append((poses, reward, bool(info["success"])))
        if noise == 0 and any(success for *_, success in history[:-5]):
            break
    return zip(*history)

def open_task(task: str, size: int):
    """The simulator of a task, its scripted policy, and a renderer of size x size pictures, without
    shadows, reflections and multisampling: 9 times as fast as env.render() on a CPU. Raises
    InputError. Close the renderer before the next is opened, or that returns stale frames."""
    if sys.platform == "linux":  # mujoco reads this once, at import: draw in software by default
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as policies
        env = environments[task + "-goal-observable"](seed=0)
        env.model.vis.quality.offsamples = 0  # multisampling; read when the renderer is made
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = size
        renderer = mujoco.Renderer(env.model, size, size)
    except Exception as problem:  # graphics libraries fail in many ways
        raise InputError(
            f"cannot render {task} ({str(problem)[:80]!r}). It takes metaworld, which needs Python "
            "3.10 to 3.13, and OpenGL: on Debian or Ubuntu 'apt-get install libosmesa6'; with an "
            "NVIDIA GPU set MUJOCO_GL=egl") from None
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return env, policies[task], renderer

def draw(renderer, data, poses: dict) -> np.ndarray:
    """A picture, uint8 (S, S, 3), of the simulator's state `data` with these poses."""
    for name, pose in poses.items():
        getattr(data, name)[:] = pose
    renderer.update_scene(data, camera="corner4")
    # The camera hangs upside down. Turn the picture, which flips BOTH axes: flipping the rows alone
    # looks right, but mirrors the scene, and left becomes right.
    return renderer.render()[::-1, ::-1]

def encode_frames(frames: np.ndarray) -> bytes:
    """Pack one episode, uint8 (T, S, S, 3), into one WebP: a strip of its frames, top to bottom.
    24 times smaller than the pixels, with an error of about 4 grey levels of 255."""
    strip = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(strip, "WEBP", quality=70, method=6)
    return strip.getvalue()

def collect_task(job: dict) -> list[dict]:
    """Simulate, render and pack all episodes of one task. job: the task, and --collect's options.
    Raises InputError when the expert succeeds too rarely."""
    task, (env, policy, renderer) = job["task"], open_task(job["task"], job["size"])
    episodes, attempts = [], 0
    while len(episodes) < job["expert"] + job["mixed"]:
        mixed = len(episodes) >= job["expert"]
        if not mixed and attempts >= 4 * job["expert"]:
            raise InputError(f"{task}: the scripted expert succeeded {len(episodes)} times in "
                             f"{attempts} attempts; ask for fewer --expert episodes")
        # reset(seed=...) is ignored by Meta-World: this is how an episode gets a start of its own.
        seed = 10_000 * job["seed"] + 5_000 * mixed + attempts
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env.seed(seed)
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        poses, rewards, successes = roll_out(
            env, policy(), rng, steps=150 if mixed else 300,
            noise=rng.uniform(0.3, 1.5) if mixed else 0.0,
            random_share=rng.choice([0.0, 0.3, 0.7]) if mixed else 0.0)
        attempts += 1
        if not mixed and not any(successes):
            continue
        steps = np.linspace(0, len(poses) - 1, job["frames"]).round().astype(int)
        frames = [draw(renderer, env.data, poses[step]) for step in steps]
        # Success may flicker between two frames: a flag covers all steps since the frame before.
        since = np.minimum(np.r_[0, steps[:-1] + 1], steps)
        episodes.append({
            "task": task, "source": "mixed" if mixed else "expert", "seed": seed, "steps": steps,
            "rewards": np.float32(rewards)[steps],
            "success": np.logical_or.reduceat(successes, since), "strip": encode_frames(frames)})
    renderer.close()
    return assign_splits(episodes)

def assign_splits(episodes: list[dict]) -> list[dict]:
    """Give each episode of one task its split, in order of collection (ours, not the paper's).
    Experts: 60 % train, 15 % validation, 25 % test. Mixed: a third validation, the rest test. All
    of an unseen task is test."""
    for source, train_until, validation_until in (("expert", 0.6, 0.75), ("mixed", 0, 1 / 3)):
        group = [episode for episode in episodes if episode["source"] == source]
        for i, episode in enumerate(group):
            place = 1 if group_of(episode["task"]) == "unseen" else i / len(group)
            episode["split"] = ("train" if place < train_until else
                                "validation" if place < validation_until else "test")
    return episodes

def collect(args: argparse.Namespace) -> None:
    """Collect episodes of args.tasks in parallel processes and write them to args.data: the same
    bytes whatever the number of workers. Raises InputError."""
    tasks = sorted(load_instructions(args.instructions))
    if strange := set(args.tasks) - set(tasks):
        near = difflib.get_close_matches(min(strange), tasks, 5, cutoff=0)
        raise InputError(f"unknown task {min(strange)!r}; the nearest are {', '.join(near)}")
    if args.frames * args.size > 16383:
        raise InputError(f"--frames {args.frames} times --size {args.size} is more than the 16383 "
                         "pixels that a WebP strip can have")
    if args.data.exists():
        raise InputError(f"{args.data} exists: name a new --data set, or remove it")
    jobs, episodes = [vars(args) | {"task": task} for task in args.tasks or tasks], []
    args.data.parent.mkdir(parents=True, exist_ok=True)
    (probe := Path(f"{args.data}.unfinished")).touch()  # find out now that one cannot write there
    probe.unlink()
    with ProcessPoolExecutor(  # spawn: a forked process would inherit a broken graphics library
            min(args.workers, len(jobs)), multiprocessing.get_context("spawn"),
            signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C is for us alone
        for some in progress_bar(pool.map(collect_task, jobs), total=len(jobs), desc="collecting"):
            episodes += some
    write_dataset(args.data, episodes)
    print(f"wrote {len(episodes)} episodes of {len(jobs)} tasks to {args.data}")

def write_dataset(path: Path, episodes: list[dict]) -> None:
    """Write episodes, each a dictionary of EPISODE's fields and its "strip", as one npz file.
    Raises InputError if Dataset would not read it again."""
    unfinished = Path(f"{path}.unfinished.npz")
    try:
        fields = {name: np.array([episode[name] for episode in episodes]) for name in EPISODE}
        if fields["steps"].max() < 2**15:
            fields["steps"] = fields["steps"].astype(np.int16)
        strips = [episode["strip"] for episode in episodes]
        np.savez(unfinished, **fields, offsets=np.cumsum([0, *map(len, strips)]),
                 strips=np.frombuffer(b"".join(strips), np.uint8))
        Dataset(unfinished)
        os.replace(unfinished, path)
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"these episodes make no data set: {problem!r}") from None
    finally:
        unfinished.unlink(missing_ok=True)

class Dataset:
    """The episodes of one npz file: E episodes of T frames, S x S pixels each.

    task, split, source, seed   (E,) names, "train"/"validation"/"test", "expert"/"mixed", integer
    rewards, success, steps     (E, T) simulator's reward (0 to 10), success flag, step index
    offsets, strips             (E + 1,) where each packed strip begins in (bytes,) of all of them
    Raises InputError when the file is missing, damaged or not of this form.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path), np.load(path, allow_pickle=False) as file:  # a pickle could run code
            vars(self).update({name: file[name] for name in (*EPISODE, "offsets", "strips")})
            self.E, self.T = self.rewards.shape
            for name, kinds in EPISODE.items():
                array = getattr(self, name)
                shape = (self.E, self.T) if name in ("rewards", "success", "steps") else (self.E,)
                if array.dtype.kind not in kinds or array.shape != shape:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, not {shape}")
            if not ({*self.split} <= {"train", "validation", "test"}
                    and {*self.source} <= {"expert", "mixed"}
                    and self.T >= 5 and np.isfinite(self.rewards).all()):
                raise ValueError("an unknown split or source, a reward that is not finite, or "
                                 "fewer than five frames an episode")
            if len(self.offsets) != self.E + 1 or self.offsets[-1] != len(self.strips):
                raise ValueError("the offsets do not fit the strips")
            self.S = self.picture(0).width
            for e in range(self.E):  # headers only: what is found now costs no run
                if self.picture(e).size != (self.S, self.T * self.S):
                    raise ValueError(f"episode {e} is no strip of {self.T} square pictures")

    def episode(self, e: int) -> dict:
        """One episode as write_dataset() takes it: to select some, or to join data sets."""
        strip = self.strips[self.offsets[e]:self.offsets[e + 1]].tobytes()
        return {name: getattr(self, name)[e] for name in EPISODE} | {"strip": strip}

    def picture(self, e: int) -> Image.Image:
        """The strip of one episode, still packed but for its size."""
        return Image.open(io.BytesIO(self.episode(e)["strip"]), formats=["WEBP"])

    def frames(self, e: int) -> np.ndarray:
        """The frames of one episode, uint8 (T, S, S, 3). Raises InputError if it is damaged."""
        with reading(self.path):
            return np.asarray(self.picture(e).convert("RGB")).reshape(self.T, self.S, self.S, 3)

    def load(self, episodes, every: int = 1) -> torch.Tensor:
        """Every n-th frame of some episodes, unpacked by all cores: uint8 (len(episodes),
        ceil(T / every), S, S, 3)."""
        with ThreadPoolExecutor() as threads:
            return torch.from_numpy(np.stack(list(threads.map(
                lambda e: self.frames(e)[::every], episodes))))

    def select(self, **wanted) -> np.ndarray:
        """Indices of the episodes that match: select(split="test", source="expert")."""
        return np.flatnonzero(np.all(
            [getattr(self, field) == value for field, value in wanted.items()], axis=0))

# -----------------------------------------------------------------------------
# 2. The CLIP backbone
#
# CLIP is two towers: one maps a picture to a vector, the other a sentence, both in one space. The
# reward of a frame is the cosine of its vector and the instruction's. That is the whole reward
# model; an objective only decides where the vectors go. All have unit length, so that no objective
# can win by scale: cosine, dot product and distance say the same, |a - b|^2 = 2 - 2 cos(a, b).

# Ours, not the paper's (which fine-tunes SigLIP2): small enough to train while you watch. Its
# weights in data/ come from random ones by `--objective clip` on the seen tasks.
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4,
                   "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 4096, "width": 128, "heads": 2, "layers": 1},
}

def tiny_tokenizer():
    """CLIP's own tokenizer, cut to its 3,582 most frequent merges, for a vocabulary of 4,096:
    frequent words stay whole, rare ones fall into more pieces."""
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY["text_cfg"]["context_length"])
    merges = TINY["text_cfg"]["vocab_size"] - 2 * 256 - 2  # bytes, bytes at a word's end, 2 marks
    tokenizer.bpe_ranks = {pair: r for pair, r in tokenizer.bpe_ranks.items() if r < merges}
    # CLIP reads a sentence off at its largest token id: the end mark must be the last.
    tokenizer.sot_token_id, tokenizer.eot_token_id = 512 + merges, 512 + merges + 1
    return tokenizer

class RewardModel(nn.Module):
    """A CLIP model, its tokenizer and its normalisation: frames and sentences in, rewards out."""

    def __init__(self, clip: nn.Module, tokenizer):
        super().__init__()
        self.clip, self.tokenizer, self.low_precision = clip, tokenizer, False
        self.size = int(np.max(clip.visual.image_size))
        mean = getattr(clip.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        std = getattr(clip.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        # Published for pixels from 0 to 1; ours are bytes, 0 to 255.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def encode(self, tower, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of a tower as unit vectors, float32, whatever precision the tower ran in."""
        device = self.mean.device.type
        # On a CPU plain attention trains faster than the fused kernel, made for longer sequences.
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=self.low_precision), attention:
            return F.normalize(tower(inputs).float(), dim=-1)

    def embed_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 frames (..., H, W, 3), stretched to the model's size -> (..., D), unit, float32."""
        pixels = frames.reshape(-1, *frames.shape[-3:]).to(self.mean.device)  # still bytes
        pixels = pixels.permute(0, 3, 1, 2).contiguous().float()  # (N, 3, H, W)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.encode(self.clip.encode_image, pixels.sub_(self.mean).div_(self.std))
        return features.view(*frames.shape[:-3], -1)

    def embed_texts(self, sentences: list[str]) -> torch.Tensor:
        """M sentences -> unit vectors (M, D), float32."""
        return self.encode(self.clip.encode_text, self.tokenizer(sentences).to(self.mean.device))

    def check_sentences(self, sentences: list[str]) -> None:
        """Raise InputError for what is no sentence, or is too long: CLIP would cut it silently."""
        for text in sentences:
            if not isinstance(text, str) or not text.strip() or not text.isprintable():
                raise InputError(f"{text!r} is no sentence")
            ids = self.tokenizer.encode(text) if hasattr(self.tokenizer, "encode") else []
            if any(i >= len(self.tokenizer.encoder) - 2 for i in ids):
                raise InputError(f"{text!r} has the tokenizer's own marks of start or end in it")
            if len(ids) > self.clip.context_length - 2:  # without those marks
                raise InputError(f"{text[:40]!r}... has {len(ids)} word pieces, and this backbone "
                                 f"reads {self.clip.context_length - 2}: shorten it")

    @torch.inference_mode()
    def score(self, frames: np.ndarray, instruction: str) -> np.ndarray:
        """Rewards of uint8 frames (N, H, W, 3) of any size under one sentence: cosines, (N,).
        Compare frames under one sentence, not sentences under one frame. Raises InputError."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise InputError("frames must be uint8 (N, H, W, 3), red green blue, 0 to 255; these "
                             f"are {frames.dtype} {frames.shape}")
        self.check_sentences([instruction])
        text = self.embed_texts([instruction])[0]  # (D,)
        parts = torch.tensor(np.ascontiguousarray(frames)).split(256)
        return torch.cat([self.embed_frames(part) @ text for part in parts]).cpu().numpy()

def build_backbone(name: str, pretrained: str | None = None) -> RewardModel:
    """Build tiny, thumbnail (a control: one linear map of 12 x 12 pixels in place of tiny's vision
    tower) or any open_clip model. pretrained: a tag, a file or "none". Raises InputError."""
    if name in ("tiny", "thumbnail"):
        clip = open_clip.CLIP(**TINY)
        clip.visual.image_mean = clip.visual.image_std = (0.5, 0.5, 0.5)
        model = RewardModel(clip, tiny_tokenizer())
        if pretrained != "none":
            with reading(path := Path(pretrained or DATA / "tiny.safetensors")):
                put_weights(model, load_file(path))
        if name == "thumbnail":
            clip.visual = nn.Sequential(
                nn.AdaptiveAvgPool2d(12), nn.Flatten(), nn.Linear(3 * 12 * 12, TINY["embed_dim"]))
        return model
    logging.disable(logging.ERROR)  # open_clip logs at length what we say in one line
    try:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:  # random weights are never a silent choice
            raise ValueError(f"choose --pretrained: a file, none, {', '.join(tags)}")
        clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
        if tags and pretrained not in tags:  # neither a file nor "none" says how to normalise
            published = open_clip.get_pretrained_cfg(name, tags[0])
            clip.visual.image_mean, clip.visual.image_std = (
                published.get("mean"), published.get("std"))
        return RewardModel(clip, open_clip.get_tokenizer(name))
    except Exception as problem:  # hubs fail in as many ways as there are network libraries
        raise InputError(f"cannot load {name} / {pretrained}: {str(problem)[:250]}. Without a "
                         "network, --pretrained takes a file") from None
    finally:
        logging.disable(logging.NOTSET)

class LoRA(nn.Module):
    """Low-rank adapter of a weight matrix: W + B A, with only A and B trained, from B = 0. Source:
    Hu et al., 2106.09685. Differs: no dropout, no factor alpha / rank (the learning rate does)."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.B @ self.A

def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model and put an adapter on every linear layer of both towers."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        # nn.MultiheadAttention packs queries, keys and values into one matrix, which is no layer:
        # parametrising the weight, rather than wrapping the layer, covers it too.
        packed = isinstance(module, nn.MultiheadAttention)
        if packed or isinstance(module, nn.Linear):
            name = "in_proj_weight" if packed else "weight"
            parametrize.register_parametrization(module, name, LoRA(getattr(module, name), rank))

def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without what is frozen: all that a run has to remember."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: state.cpu().contiguous() for name, state in model.state_dict().items()
            if name not in frozen}

def put_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """The inverse of trained_weights(). Raises ValueError if they are not this model's."""
    if strange := set(weights) ^ set(trained_weights(model)):
        raise ValueError(f"{len(strange)} weights too many or missing, as {min(strange)}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError("some weights are not finite")
    model.load_state_dict(weights, strict=False)

# -----------------------------------------------------------------------------
# 3. The learning objectives
#
# An objective says which of these vectors should be closer than they are, and which farther apart.
# There are four ideas, and mixtures of them:
#     order in a video        a later frame beats an earlier      triplet, preference, r3m
#     progress as a number    reward is the time that has passed  progress
#     videos and sentences    the right pair beats wrong ones     clip, decisionnce, liv, r3m
#     distance in time        near is near, or steps to a goal    tcn, r3m, vip, liv
# The paper compares five: triplet, tcn, r3m, vip and liv. More are in data/objectives/.
#
# Every objective gets the same batch, B videos of B different tasks and K = 5 frames of each, and
# returns one number, a scalar tensor. It may ignore what it has no use for:
#     frames  (B, K, D)   unit vectors of the frames start < now < next = now + 1 < later < end
#     texts   (B, D)      unit vectors of the instructions
#     times   (B, K)      share of the episode that has passed at each frame, 0 to 1
# In the equations o is a frame, l its instruction, l' that of another video, t the time, V a value,
# cos(a, b) a cosine, |a - b| a Euclidean distance. VIP and LIV call start, now, next and end o0, o,
# o', og (the goal); TCN and R3M call now, later and end s0, s1, s2. CE(M) is the mean over the rows
# i of -log softmax(M_i)_i; eps = 1e-8 keeps logarithms finite; means are over the batch.
#
# The constants in the signatures are the authors' own. With them TCN, R3M, VIP, LIV and DecisionNCE
# return, value and gradient, what the authors' code returns (tests, data/golden/). Where that draws
# random permutations of the batch to contrast videos, which now and then pair a video with itself,
# we shift the batch by 1, 2, 3 places: it comes in random order, and losses stay pure functions.

LOG_EPS = math.log(1e-8)  # -18.4

def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cos(a, b) over the last dimension; the others broadcast."""
    return F.cosine_similarity(a, b, dim=-1)

def negative_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """-|a - b| over the last dimension (not squared): the similarity of R3M and VIP."""
    return -torch.linalg.vector_norm(a - b, dim=-1)

def negative_permutations(n: int, batch: int) -> torch.Tensor:
    """Up to n permutations of a batch without fixed points, by 1, 2, ... places: (n, B)."""
    return (torch.arange(batch) + torch.arange(1, min(n, batch - 1) + 1)[:, None]) % batch

def triplet_loss(frames, texts, times, margin: float = 0.1) -> torch.Tensor:
    """Triplet: of two frames, the later one is closer to the instruction, by a margin.
        L = mean over pairs early < late of max(0, margin - cos(late, l) + cos(early, l))
    Notice: nothing but order. Nothing ties a sentence to its task, and the model forgets which is
    which. Source: the baseline of 2512.20675. We have not seen its exact form: all ten pairs of the
    five frames, and this margin, are ours. Uses cosine().
    """
    reward = cosine(frames, texts[:, None])  # (B, K)
    early, late = torch.triu_indices(frames.shape[1], frames.shape[1], offset=1)
    return F.relu(margin - reward[:, late] + reward[:, early]).mean()

def preference_loss(frames, texts, times, scale: float = 1.0) -> torch.Tensor:
    """Preference: the later frame is better with a probability that grows with its lead.
        L = mean over pairs of -log sigmoid(scale (cos(late, l) - cos(early, l)))
    Notice: a triplet with a soft margin (Bradley-Terry), whose pairs never stop pulling.
    Source: RL-VLM-F, Wang et al., 2402.03681, reward_model.py. Differs: there a VLM says which of
    two frames is better, and a CNN without language learns it. Equal `times` make no pair. Uses
    cosine().
    """
    reward = scale * cosine(frames, texts[:, None])  # (B, K)
    better = times[:, :, None] > times[:, None]  # (B, K, K)
    lead = reward[:, :, None] - reward[:, None]
    return (better * F.softplus(-lead)).sum() / better.sum().clamp(min=1)

def progress_loss(frames, texts, times, scale: float = 10.0) -> torch.Tensor:
    """Progress: the reward is the time that has passed; under a wrong instruction there is none.
        p = sigmoid(scale cos(o, l));  L = 1/2 mean [ (p(o, l) - t)^2 + (p(o, l') - 0)^2 ]
    Notice: it takes progress for even in time: a pause costs. A clip also rewinds at its end.
    Source: ReWiND, Zhang et al., 2505.10911; SARM, 2509.25358. Differs: no network over time, and
    the scale is ours. Uses cosine() and negative_permutations().
    """
    frames = torch.cat([frames, frames[:, :-1].flip(1)], dim=1)[:, 1:]  # (B, 2 K - 2, D)
    times = torch.cat([times, times[:, :-1].flip(1)], dim=1)[:, 1:]
    wrong = texts[negative_permutations(1, len(texts))]  # (1, B, D); (0, B, D) if B = 1
    sentences = torch.cat([texts[None], wrong])  # (2, B, D)
    targets = torch.stack([times, torch.zeros_like(times)])[:len(sentences)]
    return F.mse_loss(torch.sigmoid(scale * cosine(frames, sentences[:, :, None])), targets)

def info_nce(scores: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of M (..., B, B), 1/2 [CE(M) + CE(M^T)]: rows and columns find their
    diagonal."""
    rows, columns = (-scores.log_softmax(dim).diagonal(dim1=-2, dim2=-1) for dim in (-1, -2))
    return (rows + columns).mean() / 2

def clip_loss(frames, texts, times, scale: float = 1 / 0.07) -> torch.Tensor:
    """CLIP: a frame and its own instruction find each other among all pairs of the batch.
        L = info_nce(M) averaged over the frames of a video, M_ij = scale cos(o_i, l_j)
    Notice: start and end fit the sentence alike. It orders nothing, and tells tasks apart best of
    all. It made the starting weights. Source: Radford et al., 2103.00020. Differs: CLIP learns the
    scale; ours is where it starts. Uses cosine() and info_nce().
    """
    return info_nce(scale * cosine(frames.transpose(0, 1)[:, :, None], texts))  # of (K, B, B)

def decisionnce_p_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-P: the progress made in a video finds the instruction it was made under.
        L = info_nce(R),  R_ij = scale [ sum_late cos(o, l_j) - sum_early cos(o, l_j) ] of video i
    Notice: how a scene looks cancels, so nothing is gained by telling tasks apart by furniture. A
    rise common to all sentences cancels too. Source: Li et al., 2402.18137, losses.py. Differs: two
    late and two early frames, not one (the code allows both). Uses cosine() and info_nce().
    """
    rewards = cosine(frames[:, None], texts[:, None])  # (B videos, B texts, K)
    half = frames.shape[1] // 2
    return info_nce(scale * (rewards[..., -half:].sum(-1) - rewards[..., :half].sum(-1)))

def decisionnce_t_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-T: the direction in which a video moves points along its instruction.
        L = info_nce(R),  R_ij = scale sum_(steps a -> b of video i) l_j . (b - a)/(|b - a| + 1e-6)
    Notice: it takes a task for one direction. A step in which little happens counts as much as one
    that gets the task done. Source: Li et al., 2402.18137, losses.py. Differs: three steps, not one
    (the code allows both). The middle frame is too close to its neighbour. Uses info_nce().
    """
    half = frames.shape[1] // 2
    steps = torch.cat([frames[:, :half], frames[:, -half:]], dim=1).diff(dim=1)  # (B, 3, D)
    directions = steps / (torch.linalg.vector_norm(steps, dim=-1, keepdim=True) + 1e-6)
    return info_nce(scale * directions.sum(1) @ F.normalize(texts, dim=-1).T)

def softmax_loss(positive: torch.Tensor, negatives: list[torch.Tensor]) -> torch.Tensor:
    """-log(eps + p), p = exp(pos) / (eps + exp(pos) + sum exp(neg)), elementwise: (B,). Uses
    LOG_EPS, as one more logit: no exp() ever overflows."""
    floor = torch.full_like(positive, LOG_EPS)
    log_p = positive - torch.logsumexp(torch.stack([positive, *negatives, floor]), dim=0)
    return -torch.logaddexp(log_p, floor)

def tcn_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3) -> torch.Tensor:
    """TCN, time-contrastive: frames close in time are close, far in time far, other videos far.
        L = 1/2 mean [ -log p(s2, s1) - log p(s1, s0) ],  p of softmax_loss() over -|a - b| / temp:
        (s2, s1) against (s2, s0) and (s2, other s2), (s1, s0) against (s2, s0) and (s0, other s0)
    Notice: no sentence. What becomes of the cosine is left to chance; its own reward is -|o - og|.
    Source: Sermanet et al., 1704.06888, as in R3M's code (r3m/trainer.py). Differs: there s2 need
    not be the end. Uses softmax_loss(), negative_distance() and negative_permutations().
    """
    _, s0, _, s1, s2 = frames[:, :5].unbind(1)

    def similarity(a, b):
        return negative_distance(a, b) / temperature  # (B,)

    perms = negative_permutations(negatives, len(frames))
    others_0, others_2 = ([similarity(s, s[perm]) for perm in perms] for s in (s0, s2))
    late = softmax_loss(similarity(s2, s1), [similarity(s2, s0), *others_2])
    early = softmax_loss(similarity(s1, s0), [similarity(s2, s0), *others_0])
    return (late + early).mean() / 2

def norm_penalty(frames: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """l1 mean |x|_1 + l2 mean |x|_2 over all embeddings; with unit norm the l2 part is constant."""
    return (l1 * frames.abs().sum(-1) + l2 * torch.linalg.vector_norm(frames, dim=-1)).mean()

def r3m_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3,
             l1: float = 1e-5, l2: float = 1e-5) -> torch.Tensor:
    """R3M: TCN, and under the instruction a later frame beats an earlier one and other videos.
        L = L_tcn + mean 1/3 sum_(pos, neg) -log p(pos) + l1 |x|_1 + l2 |x|_2,  p of cos(pos, l) /
        temp against cos(neg, l) / temp and cos(other videos' pos, l) / temp under the SAME l;
        (pos, neg) = (end, start), (s1, s0), (s2, s1)
    Notice: it must tell frames and videos apart by the sentence, so it remembers its tasks.
    Source: Nair et al., 2203.12601, r3m/trainer.py. Differs: its head is an MLP over first frame,
    frame and frozen DistilBERT, ours the cosine; s2 = end, unless a sixth frame is the end. Uses
    tcn_loss(), softmax_loss(), cosine(), norm_penalty() and negative_permutations().
    """
    start, s0, _, s1, s2 = frames[:, :5].unbind(1)
    end, language = frames[:, -1], 0
    for positive, negative in ((end, start), (s1, s0), (s2, s1)):
        perms = negative_permutations(negatives, len(frames))
        rivals = [negative, *(positive[perm] for perm in perms)]
        language = language + softmax_loss(
            cosine(positive, texts) / temperature,
            [cosine(rival, texts) / temperature for rival in rivals]) / 3
    has_text = texts.any(dim=-1)  # (B,): in the official batches zeros mean "no sentence"
    tcn = tcn_loss(frames, texts, times, temperature, negatives)
    used = torch.stack([start, s0, s1, s2, end])
    return tcn + (has_text * language).mean() + norm_penalty(used, l1, l2)

def implicit_value_loss(value, start, now, next_, goal, gamma: float, perms) -> torch.Tensor:
    """The core of VIP and LIV: a value V(o; goal), minus the discounted number of steps to it.
        L = (1 - gamma) mean -V(o0; og) + log(eps + mean exp(1 + V(o; og) - gamma V(o'; og)))
            [ + the same second term over other videos' (o, o') under this goal ]
    A step costs 1: V(o) = -1 + gamma V(o') for whoever walks straight to the goal. The first term
    pulls the start to the goal, the second punishes V(o) > -1 + gamma V(o'). value(o, goal) gives
    V; frames (B, D), perms (n, B). Uses LOG_EPS.
    """
    def step_penalty(now, next_):
        residual = 1 + value(now, goal) - gamma * value(next_, goal)
        log_mean = torch.logsumexp(residual.flatten(), dim=0) - math.log(residual.numel())
        return torch.logaddexp(log_mean, log_mean.new_tensor(LOG_EPS))

    loss = (1 - gamma) * -value(start, goal).mean() + step_penalty(now, next_)
    return loss + step_penalty(now[perms], next_[perms]) if len(perms) else loss

def vip_loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.98, negatives: int = 3,
             l1: float = 1e-3, l2: float = 1e-3) -> torch.Tensor:
    """VIP: the distance to the goal image shrinks with every step, learnt as a value function.
        L = implicit_value_loss(V) + l1 |x|_1 + l2 |x|_2,  V(o; og) = -scale |o - og|
    Notice: no sentence. Unit vectors are 2 apart at most, while a goal 23 frames away should get
    V = -(1 - .98^23) / .02 = -18.6: the scale, which makes up for that, is ours.
    Source: Ma et al., 2210.00030, vip/trainer.py, Ego4D constants. Differs: the goal is the end of
    the episode, not of a random part of it. Uses implicit_value_loss(), negative_distance(),
    norm_penalty() and negative_permutations().
    """
    start, now, next_, _, goal = frames.unbind(1)

    def value(a, b):
        return scale * negative_distance(a, b)

    perms = negative_permutations(negatives, len(frames))
    return (implicit_value_loss(value, start, now, next_, goal, gamma, perms)
            + norm_penalty(torch.stack([start, goal, now, next_]), l1, l2))

def liv_loss(frames, texts, times, temperature: float = 1.0, gamma: float = 0.98,
             language_weight: float = 0.0, negatives: int = 0) -> torch.Tensor:
    """LIV: VIP and CLIP in one space, so that an instruction could stand where the goal image does.
        L = info_nce(M) + implicit_value_loss(V; goal og) + w_lang implicit_value_loss(V; goal l),
        V(o; og) = cos(o, og) / (1 - gamma),  M_ij = cos(og_i, l_j) / temp
    Notice: with the official w_lang = 0 a sentence meets the end of its video and no other frame.
    Source: Ma et al., 2306.00958, liv/trainer.py, finetune.yaml. Differs: in the batch alone, where
    a sixth frame would be the one that meets the sentence. Uses implicit_value_loss(), info_nce(),
    cosine() and negative_permutations().
    """
    start, now, next_, _, goal = frames[:, :5].unbind(1)
    perms = negative_permutations(negatives, len(frames))

    def value(a, b):
        return cosine(a, b) / (1 - gamma)

    loss = info_nce(cosine(frames[:, None, -1], texts) / temperature)
    loss = loss + implicit_value_loss(value, start, now, next_, goal, gamma, perms)
    if language_weight:
        loss = loss + language_weight * implicit_value_loss(
            value, start, now, next_, texts, gamma, perms)
    return loss

# Name, loss, learning rate and constants. The first value of each constant won on validation
# episodes, where `data/study.py tune` tried all of them, as many for each objective. With --setting
# official the constants are those of the signature, and the rate is OFFICIAL_RATE.
OFFICIAL_RATE = 2e-3  # of this file: the authors' are for other optimisers and backbones
OBJECTIVES = {
    "zeroshot": (None, 0, {}),  # the backbone as it is
    "triplet": (triplet_loss, 2e-3, {"margin": (0.1, 0.05, 0.2)}),
    "preference": (preference_loss, 5e-4, {"scale": (100.0, 20.0, 1.0)}),
    "progress": (progress_loss, 5e-4, {"scale": (10.0, 5.0, 20.0)}),
    "clip": (clip_loss, 5e-4, {"scale": (50.0, 1 / 0.07, 5.0)}),
    "decisionnce-p": (decisionnce_p_loss, 5e-4, {"scale": (3.0, 10.0, 100.0)}),
    "decisionnce-t": (decisionnce_t_loss, 2e-3, {"scale": (3.0, 10.0, 100.0)}),
    "tcn": (tcn_loss, 5e-4, {"temperature": (0.3, 0.1, 1.0)}),
    "r3m": (r3m_loss, 2e-3, {"temperature": (0.3, 0.1, 1.0)}),
    "vip": (vip_loss, 5e-4, {"scale": (5.0, 1.0, 20.0)}),
    "liv": (liv_loss, 2e-3, {"temperature": (0.1, 0.03, 1.0)}),
}

def cosine_reward(frames: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The reward under test, of unit vectors: frames (E, T, D), text (D,) -> (E, T)."""
    return torch.einsum("etd,ed->et", frames, text.expand(len(frames), -1))

def get_objective(name: str) -> dict:
    """What a registered objective, or a Python file (its path), defines: loss(frames, texts, times)
    and/or reward(frames (E, T, D), text (D,)) -> (E, T), which is else the cosine. A file may add
    TUNED = (learning rate, constants), as in the registry; LABELS = "rewards": its loss gets the
    simulator's rewards as times; SENTENCES, whose embeddings are reward()'s third argument."""
    loss, *tuned = OBJECTIVES.get(name, (None, OFFICIAL_RATE, {}))
    found = {"loss": loss, "reward": cosine_reward, "TUNED": tuned, "LABELS": "times",
             "SENTENCES": []}
    if name.endswith(".py"):
        found |= (defined := runpy.run_path(name))
        if not {"loss", "reward"} & set(defined):
            raise InputError(f"{name} defines neither loss() nor reward()")
    return found

def reads_instruction(loss) -> bool:
    """Whether a loss looks at the sentences: TCN and VIP do not, so their cosine means nothing."""
    frames, texts = (torch.rand(2, *shape, requires_grad=True) for shape in ((5, 4), (4,)))
    loss(frames, texts, torch.linspace(0, 1, 5).expand(2, 5)).backward()
    return texts.grad is not None

# -----------------------------------------------------------------------------
# 4. The training loop
#
# One loop for every objective and every device. A step: draw a batch, embed its frames and its
# instructions once, ask the objective for its number, move the weights. The learning rate climbs
# first, while AdamW's averages are young, and then falls to nothing, so that the last steps settle.

def training_episodes(data: Dataset, batch: int) -> dict[str, np.ndarray]:
    """The episodes to train on, {task: indices}. Raises InputError if a batch needs more tasks."""
    tasks = sorted(task for task in {*data.task[data.select(split="train", source="expert")]}
                   if group_of(task) == "seen")
    if batch > len(tasks):
        raise InputError(f"--batch {batch} takes as many seen tasks with training experts, and "
                         f"{data.path} has {len(tasks)}")
    return {task: data.select(split="train", source="expert", task=task) for task in tasks}

def sample_batch(episodes: dict[str, np.ndarray], T: int, rng, batch: int):
    """Draw a video of each of `batch` different tasks, and five frames of each video: episode
    indices (B,) and frame numbers (B, 5). Start and end come from the first and last fifth of the
    episode (as in R3M), the others from between; next is one step after now, as in VIP."""
    tasks = rng.choice(list(episodes), size=batch, replace=False)
    frame_ids, fifth = [], max(T // 5, 1)
    for _ in tasks:
        start = rng.integers(0, fifth)
        end = rng.integers(T - fifth, T)
        now = rng.integers(start + 1, end - 2)
        later = rng.integers(now + 2, end)
        frame_ids.append([start, now, now + 1, later, end])
    return np.array([rng.choice(episodes[task]) for task in tasks]), np.array(frame_ids)

def train(model: RewardModel, data: Dataset, sentences: dict, loss_function, config: dict,
          labels: str = "times", checkpoint: Path | None = None) -> list[dict]:
    """Train the model in place, with the seed, steps, batch and learning_rate of config. Returns
    the log: step, loss, seconds and, now and then, validation VOC. Same seed, CPU and number of
    threads: the same weights, bit for bit. labels="rewards" hands the simulator's rewards to the
    loss as times. checkpoint: a file to save to ten times, and to go on from. Raises InputError."""
    rng, steps, log = np.random.default_rng(config["seed"]), config["steps"], []
    episodes = training_episodes(data, config["batch"])
    videos = {e: video for some in episodes.values()  # unpacked once
              for e, video in zip(some, data.load(some).numpy())}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config["learning_rate"], weight_decay=0.01,
                                  fused=model.mean.device.type != "mps")
    if checkpoint and checkpoint.exists():
        log = load_checkpoint(checkpoint, model, optimizer)
        for _ in log:  # draw again what was drawn: the generator then stands where it stood
            sample_batch(episodes, data.T, rng, config["batch"])
    bar = progress_bar(range(len(log) + 1, steps + 1), initial=len(log), total=steps,
                       desc="training", unit="step")
    for step in bar:
        began = time.perf_counter()
        episode_ids, frame_ids = sample_batch(episodes, data.T, rng, config["batch"])
        pixels = np.stack([videos[e][ids] for e, ids in zip(episode_ids, frame_ids)])
        times = (data.rewards[episode_ids[:, None], frame_ids] if labels == "rewards"
                 else frame_ids / (data.T - 1))
        model.train()
        frames = model.embed_frames(torch.from_numpy(pixels))  # (B, 5, D)
        texts = model.embed_texts(
            [sentences[task]["instruction"] for task in data.task[episode_ids]])  # (B, D)
        loss = loss_function(frames, texts, torch.tensor(times).float().to(frames.device))
        optimizer.param_groups[0]["lr"] = config["learning_rate"] * min(  # a line up, a cosine down
            step / max(1, steps // 10), 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        descend(optimizer, weights, loss, step)
        log.append({"step": step, "loss": loss.item(), "seconds": time.perf_counter() - began})
        if step % max(1, steps // 5) == 0 or step == steps:
            log[-1]["validation_voc"] = voc = validation_voc(model, data, sentences)
            bar.set_postfix(loss=f"{loss.item():.3f}", validation_voc=f"{voc:.2f}", refresh=False)
        if checkpoint and (step % max(1, steps // 10) == 0 or step == steps):
            save_checkpoint(checkpoint, model, optimizer, log, config)
    return log

def descend(optimizer, weights: list, loss, step: int) -> None:
    """One step down the gradient, which is clipped to tame the odd batch. Raises InputError."""
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        raise InputError("the loss must be a tensor of one number that depends on the embeddings")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(weights, 1.0)
    if not loss.isfinite() or not norm.isfinite():
        raise InputError(f"step {step}: the loss is {loss.item()}, its gradient {norm.item()}; "
                         "lower --learning-rate, or look for a root or division by 0 in the loss")
    if step == 1 and norm == 0:
        raise InputError("no gradient; if the loss compares videos, it takes a larger --batch")
    optimizer.step()

def save_checkpoint(path: Path, model, optimizer, log: list[dict], config: dict) -> None:
    """Write all that the next step depends on (on a CPU), and the configuration of the run."""
    tensors = trained_weights(model) | {"generator": torch.get_rng_state()}
    for name, weight in model.named_parameters():
        tensors |= {f"{key} {name}": state for key, state in optimizer.state[weight].items()}
    header = {"log": log, "config": config, "names": sorted(tensors)}
    write_whole(path, save(tensors, {key: json.dumps(value) for key, value in header.items()}))

def load_checkpoint(path: Path, model, optimizer) -> list[dict]:
    """Put model and optimiser where save_checkpoint() left them. Returns the log. Raises
    InputError."""
    with reading(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if sorted(tensors) != json.loads(file.metadata()["names"]):
            raise ValueError("some weights are missing")
        torch.set_rng_state(tensors.pop("generator"))
        for name, weight in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key} {name}" in tensors:  # of a tower that the loss ignores there is none
                    optimizer.state[weight][key] = tensors.pop(f"{key} {name}").to(weight.device)
        put_weights(model, tensors)
        return json.loads(file.metadata()["log"])

# -----------------------------------------------------------------------------
# 5. The evaluation metrics
#
# Does the reward rise while an expert works (VOC)? Does it put frames in the order in which the
# simulator's reward puts them (ranking accuracy)? Does it read the instruction (the others)? Mind
# that a clock gets .8 in ranking: even a failing arm mostly gets closer with time.
#
# `predicted` is the model's reward, (E, T). Every metric is made of sums over episodes, or pairs of
# them. So a bootstrap needs no second pass over the frames: draw R times how often each episode
# counts, and weigh the sums by these `counts`, (R, E).

METRICS = {  # name in metrics.json: (what it is, the value of a reward that knows nothing)
    "voc": ("VOC: order of experts' frames", 0.0),
    "voc_paraphrase": ("VOC under unseen paraphrases", 0.0),
    "ranking_accuracy_within": ("ranking accuracy, mixed", 0.5),
    "ranking_accuracy_across": ("ranking accuracy, across", 0.5),
    "epic": ("EPIC distance (0 is best)", 0.71),
    "success_auroc": ("success beats failure (AUROC)", 0.5),
    "retrieval_top1": ("own instruction is first of all", 0.02),
    "retrieval_top5": ("own instruction is in first 5", 0.1),
    "opposite_gap": ("VOC minus VOC of the opposite", 0.0),
    "goal_voc": ("VOC by goal images", 0.0),
    "goal_ranking_accuracy_within": ("ranking, mixed, by goal images", 0.5),
}

def value_order_correlation(predicted: np.ndarray) -> np.ndarray:
    """VOC: Spearman correlation of each row of rewards (E, T) with time, (E,). 1: always rising, 0:
    no order, -1: always falling. Ties share their rank, a constant row gets 0.
    Source: GVL, 2411.04549, and OpenGVL's code for constants."""
    ranks = rankdata(predicted, axis=-1)
    centred_time = np.arange(predicted.shape[-1]) - (predicted.shape[-1] - 1) / 2
    ranks = ranks - ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1) * (centred_time**2).sum())
    return np.divide(ranks @ centred_time, norm, out=np.zeros(len(ranks)), where=norm > 0)

def pair_counts(predicted: np.ndarray, true_reward: np.ndarray, threshold: float = 0.1):
    """Ranking accuracy: of a frame of episode i and a worse one of episode j, how many pairs the
    prediction orders right, and how many there are. (E, T), (E, T) -> (E, E), (E, E). Within an
    episode these are the diagonals. Worse means by more than the threshold (0.1 on a scale of 0 to
    10, our choice); equal predictions count half."""
    E, T = predicted.shape
    correct, total = np.zeros((2, E, E))
    for i in range(E):
        worse = true_reward.ravel() < np.float64(true_reward[i, :, None]) - threshold  # (T, E * T)
        lower = predicted.ravel() < predicted[i, :, None]
        equal = predicted.ravel() == predicted[i, :, None]
        total[i] = worse.reshape(T, E, T).sum((0, 2))
        correct[i] = (worse * (lower + equal / 2)).reshape(T, E, T).sum((0, 2))
    return correct, total

def bootstrap_counts(rng, source: np.ndarray, replicates: int = 1000) -> np.ndarray:
    """How often each episode counts: (1 + replicates, E). Row 0 is the data as they are. Experts
    and mixed episodes are drawn apart, so that every replicate has as many of either."""
    counts = np.ones((1 + replicates, len(source)))
    for kind in np.unique(source):
        group = np.flatnonzero(source == kind)
        counts[1:, group] = rng.multinomial(
            len(group), np.full(len(group), 1 / len(group)), size=replicates)
    return counts

def weighted_ratio(counts: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """sum part / sum whole over episodes (E,), times their counts, or over pairs of episodes
    (E, E), times both counts. counts (R, E) -> (R,), NaN for 0 / 0."""
    part, whole = (counts @ x if x.ndim == 1 else (counts @ x * counts).sum(1)
                   for x in (part, whole))
    return np.divide(part, whole, out=np.full(len(counts), np.nan), where=whole > 0)

def epic_distance(counts: np.ndarray, predicted: np.ndarray, true_reward: np.ndarray) -> np.ndarray:
    """EPIC, how far two rewards are from equal up to scale and offset: sqrt(1/2 (1 - Pearson)), 0
    is best; a constant counts Pearson 0. counts (R, E), rewards (E, T) -> (R,). For rewards of the
    next state EPIC's canonical form only subtracts a constant, which Pearson ignores.
    Source: Gleave et al., 2006.13900, with the 1/2 of its code."""
    # Pearson from sums over each episode's frames: n, sum p, sum r, sum p^2, sum r^2, sum pr.
    p, r = predicted - predicted.mean(), np.float64(true_reward) - true_reward.mean()
    sums = np.stack([np.ones_like(p), p, r, p * p, r * r, p * r]).sum(-1)  # (6, E)
    n, sp, sr, spp, srr, spr = sums @ counts.T  # (6, R)
    scale = np.sqrt(np.maximum(n * spp - sp**2, 0) * np.maximum(n * srr - sr**2, 0))
    pearson = np.divide(n * spr - sp * sr, scale, out=np.zeros_like(scale),
                        where=scale > 1e-12 * n**2)
    return np.sqrt(np.maximum(0, 1 - pearson) / 2)

def goal_image_reward(frames: torch.Tensor, expert: np.ndarray) -> np.ndarray:
    """The reward of whoever has seen the goal: -|o - g|, averaged over the last frames g of the
    OTHER experts of the task. frames (E, T, D), expert (E,) -> (E, T). Uses negative_distance()."""
    goals = [frames[expert & (np.arange(len(expert)) != i), -1] for i in range(len(expert))]
    return np.stack([negative_distance(video[:, None], goal).mean(1)
                     for video, goal in zip(frames, goals)])

def ordering_metrics(counts, source, predicted, true_reward, success) -> dict[str, np.ndarray]:
    """Do rewards (E, T) order the frames of one task's episodes? {metric: (R,)}."""
    expert, diagonal = (source == "expert").astype(float), np.eye(len(source))
    correct, total = pair_counts(predicted, true_reward)
    within = [pairs.diagonal() * (source == "mixed") for pairs in (correct, total)]
    ends = pair_counts(predicted[:, -1:], success[:, -1:].astype(float))  # success beats failure
    return {"voc": weighted_ratio(counts, value_order_correlation(predicted) * expert, expert),
            "ranking_accuracy_within": weighted_ratio(counts, *within),
            "ranking_accuracy_across": weighted_ratio(
                counts, correct * (1 - diagonal), total * (1 - diagonal)),
            "success_auroc": weighted_ratio(counts, *ends),
            "epic": epic_distance(counts, predicted, true_reward)}

def reading_metrics(counts, source, under: np.ndarray, own: int, opposite: int) -> dict:
    """Does the reward read? {metric: (R,)}. under (M + 3, E, T): the rewards of one task's episodes
    under all instructions, the rows `own` and `opposite` (= own: there is none) among them, and
    under three paraphrases of its own."""
    voc, expert = value_order_correlation, (source == "expert").astype(float)
    ends = under[:-3, :, -1]  # (M, E)
    rank = (ends >= ends[own]).sum(0)  # (E,), 1: the own one, alone
    scores = {"voc_paraphrase": np.mean([voc(rewards) for rewards in under[-3:]], axis=0),
              "retrieval_top1": rank <= 1, "retrieval_top5": rank <= 5}
    if own != opposite:
        scores["opposite_gap"] = voc(under[own]) - voc(under[opposite])
    return {metric: weighted_ratio(counts, score * expert, expert)
            for metric, score in scores.items()}

def embed_episodes(model: RewardModel, data: Dataset, episodes, every: int = 1) -> torch.Tensor:
    """Every n-th frame of some episodes, ten episodes at a time: (E, T / every, D), on the CPU."""
    return torch.cat([model.embed_frames(data.load(episodes[k:k + 10], every)).cpu()
                      for k in range(0, len(episodes), 10)])

@torch.inference_mode()
def validation_voc(model: RewardModel, data: Dataset, sentences: dict, every: int = 3) -> float:
    """VOC on every n-th frame of the validation experts, to watch a run, or to choose settings. NaN
    if there are none."""
    model.eval()
    if not len(episodes := data.select(split="validation", source="expert")):
        return math.nan
    frames = embed_episodes(model, data, episodes, every)
    texts = model.embed_texts([sentences[task]["instruction"] for task in data.task[episodes]])
    predicted = torch.einsum("etd,ed->et", frames, texts.cpu()).numpy()
    return float(value_order_correlation(predicted).mean())

@torch.inference_mode()
def evaluate(model: RewardModel, data: Dataset, sentences: dict, reward=cosine_reward) -> dict:
    """All metrics on the test episodes: the report of average_over_tasks() and, for every test
    episode, "episodes" (E,), "predicted" rewards (E, T) and the sentence "preferred" by its end."""
    model.eval()
    names, test, rng = list(sentences), data.select(split="test"), np.random.default_rng(0)
    texts = model.embed_texts([sentences[name]["instruction"] for name in names]).cpu()  # (M, D)
    rows, preferred, predicted = {}, np.zeros(len(test), int), np.zeros((len(test), data.T))
    for task in tqdm(np.unique(data.task[test]), "evaluating", leave=False, disable=None):
        where = np.flatnonzero(data.task[test] == task)
        episodes, own = test[where], names.index(task)
        source, truth = data.source[episodes], (data.rewards[episodes], data.success[episodes])
        counts = bootstrap_counts(rng, source)
        frames = embed_episodes(model, data, episodes)  # (E, T, D)
        paraphrases = model.embed_texts(sentences[task]["paraphrases"]).cpu()
        under = np.stack([reward(frames, text) for text in (*texts, *paraphrases)])  # (M + 3, E, T)
        if not np.isfinite(under).all():
            raise InputError(f"the reward of {task} is not finite")
        predicted[where], preferred[where] = under[own], under[:-3, :, -1].argmax(0)
        opposite = names.index(sentences[task].get("opposite", task))
        scores = ordering_metrics(counts, source, under[own], *truth) | reading_metrics(
            counts, source, under, own, opposite)
        if (source == "expert").sum() > 1:  # an expert's goal images are the others'
            by_goal = goal_image_reward(frames, source == "expert")
            scores |= {"goal_" + metric: row for metric, row in ordering_metrics(
                counts, source, by_goal, *truth).items()}
        for metric, row in scores.items():
            rows.setdefault(metric, {})[task] = row
    return average_over_tasks(rows) | {
        "episodes": test, "predicted": np.float32(predicted), "preferred": preferred}

def average_over_tasks(rows: dict) -> dict:
    """{"seen", "unseen": {metric: {value, tasks, interval}}, "tasks": {task: scores}} of rows,
    {metric: {task: (R,)}}, NaN where undefined. The interval holds 95 % of the averages that come
    out when each task's episodes are drawn again, with replacement."""
    report = {"seen": {}, "unseen": {}, "tasks": {}}
    for metric, by_task in rows.items():
        defined = {task: row for task, row in by_task.items() if not np.isnan(row[0])}
        for task, row in defined.items():
            report["tasks"].setdefault(task, {})[metric] = row[0]
        for group in ("seen", "unseen"):
            if chosen := [row for task, row in defined.items() if group_of(task) == group]:
                means = np.nanmean(chosen, axis=0)
                report[group][metric] = {"value": means[0], "tasks": len(chosen),
                                         "interval": np.nanquantile(means[1:], [0.025, 0.975])}
    return report

# -----------------------------------------------------------------------------
# 6. A run
#
# Settings in, a folder out: checkpoint.safetensors while it trains, metrics.json last. The same
# command goes on with what was stopped, and does not repeat what is done.

SETTINGS = ("objective", "seed", "setting", "backbone", "pretrained", "lora", "steps", "batch",
            "learning_rate", "data", "instructions")  # the options that decide the outcome

def digest(file: str | None) -> str | None:
    """SHA-256 of a file, of tiny's own weights if none is named; None if there is no such file."""
    path = Path(file or DATA / "tiny.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

def configuration(args: argparse.Namespace) -> dict:
    """What decides the outcome of a run but versions and machine: its options, the rate and the
    constants that they stand for, and the checksums of the files that they name."""
    config = {name: getattr(args, name) for name in SETTINGS}
    rate, constants = get_objective(args.objective)["TUNED"]
    if args.setting == "official":
        rate, constants = OFFICIAL_RATE, {}
    config["learning_rate"] = args.learning_rate or rate
    config["constants"] = {name: values[0] for name, values in constants.items()}
    files = ["pretrained", "data", "instructions", *["objective"] * args.objective.endswith(".py")]
    config["sha256"] = {name: found for name in files if (found := digest(config[name]))}
    for name in config["sha256"]:
        config[name] = config[name] and str(Path(config[name]).resolve())
    return config

def read_config(folder: Path) -> dict:
    """The configuration of the run in a folder, finished or stopped. Raises InputError."""
    if (checkpoint := folder / "checkpoint.safetensors").exists():
        with reading(checkpoint), safe_open(checkpoint, "pt") as file:
            return json.loads(file.metadata()["config"])
    return read_json(folder / "config.json")

def folder_for(config: dict, root: Path) -> Path:
    """runs/triplet-seed0, or -2, -3, ...: the first folder that has this run, or is new, and ours
    as soon as it is made. Raises InputError."""
    for n in itertools.count(1):
        folder = root / f"{Path(config['objective']).stem}-seed{config['seed']}{f'-{n}' * (n > 1)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        known = [folder / "checkpoint.safetensors", folder / "config.json"]
        if any(path.exists() for path in known) and read_config(folder).items() >= config.items():
            return folder

def prepare_model(config: dict, device: str = "auto") -> RewardModel:
    """The backbone as a run with this configuration starts from it, on a device, in bfloat16 where
    that multiplies faster. Raises InputError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    device = max(there, key=there.get) if device == "auto" else device  # the first that is there
    if not there[device]:
        raise InputError(f"no {device} device here; --device cpu is everywhere")
    torch.manual_seed(config["seed"])  # decides the adapters' start, and random backbones
    model = build_backbone(config["backbone"], config["pretrained"])
    if config["lora"]:
        add_lora(model, config["lora"])
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: float32
    model.low_precision = (device == "cpu" and capabilities.get("avx512_bf16", False) or
                           device == "cuda" and torch.cuda.is_bf16_supported(False))
    return model.to(device)

def load_reward_model(folder: str | Path, device: str = "auto") -> RewardModel:
    """The trained model of a run's folder, ready to score(frames, instruction). With LoRA it needs
    the weights that it adapts, as they were then. Raises InputError."""
    config = read_json(settings := Path(folder, "config.json"))
    with reading(settings):
        if not config["lora"]:
            config["pretrained"] = "none"  # all weights are in the folder
        elif digest(config["pretrained"]) != config["sha256"].get("pretrained"):
            raise ValueError("it adapts other weights than those of its backbone are now")
        model = prepare_model(config, device)
    with reading(weights := Path(folder, "model.safetensors")):
        put_weights(model, load_file(weights))
    return model.eval()

def run(config: dict, folder: Path, device: str = "auto", began: float | None = None) -> dict:
    """Train and evaluate, or go on where that was stopped, and leave everything in the folder.
    Returns its metrics.json. Raises InputError."""
    if (folder / "metrics.json").exists():
        return read_json(folder / "metrics.json")
    began, objective = began or time.perf_counter(), get_objective(config["objective"])
    data, sentences = Dataset(config["data"]), load_instructions(config["instructions"])
    if strange := set(data.task) - set(sentences):
        raise InputError(f"{config['instructions']} has no sentence for {min(strange)}")
    if not len(data.select(split="test", source="expert")):
        raise InputError(f"{data.path} has no experts to test on: it takes 4 of a task")
    model, log, reward = prepare_model(config, device), [], objective["reward"]
    for entry in sentences.values():
        model.check_sentences([entry["instruction"], *entry["paraphrases"]])
    if objective["loss"]:
        loss = functools.partial(objective["loss"], **config["constants"])
        log = train(model, data, sentences, loss, config, objective["LABELS"],
                    folder / "checkpoint.safetensors")
    if objective["SENTENCES"]:
        with torch.inference_mode():
            known = model.eval().embed_texts(objective["SENTENCES"]).cpu()
        reward = lambda frames, text: objective["reward"](frames, text, known)
    report = evaluate(model, data, sentences, reward)
    write_whole(folder / "model.safetensors", save(trained_weights(model)))
    draw_curves(report, data, sentences, folder / "curves.png")
    np.savez(file := io.BytesIO(), **{
        name: report.pop(name) for name in ("episodes", "predicted", "preferred")})
    write_whole(folder / "rewards.npz", file.getvalue())
    write_json(folder / "config.json", config | {
        "torch": torch.__version__, "device": str(model.mean.device),
        "reads_instruction": not objective["loss"] or reads_instruction(objective["loss"])})
    seconds = [entry["seconds"] for entry in log]
    write_json(folder / "metrics.json", report | {  # last: a folder that has it is whole
        "wall_seconds": time.perf_counter() - began, "log": log,
        "frames_per_second": 5 * config["batch"] / np.median(seconds) if log else None})
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return read_json(folder / "metrics.json")

def run_in(folder: Path, config: dict, device: str = "auto", began: float | None = None) -> dict:
    """run(), announced, in a folder that goes again if nothing comes of it."""
    print(f"{Path(config['objective']).stem}, seed {config['seed']}: {folder}", flush=True)
    try:
        return run(config, folder, device, began)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # it is not empty, unless nothing came of it

def resumed(folder: Path) -> dict:
    """The configuration of the stopped run in a folder. Raises InputError if it cannot go on."""
    if (folder / "metrics.json").exists():
        raise InputError(f"the run in {folder} is finished: there is nothing to go on with")
    if (config := read_config(folder)) != configuration(argparse.Namespace(**config)):
        raise InputError(f"a file that the run in {folder} was started with has changed")
    return config

def run_all(args: argparse.Namespace) -> None:
    """Every objective asked for, with every seed; then the table of the one run, or a table and a
    picture of all. Those without training, of which all seeds are alike, stand last."""
    names = [name for some in args.objective for name in (OBJECTIVES if some == "all" else [some])]
    trained, rows = {name: bool(get_objective(name)["loss"]) for name in names}, {}
    jobs = [resumed(args.resume)] if args.resume else [
        configuration(argparse.Namespace(**vars(args) | {"objective": name, "seed": seed}))
        for name in sorted(trained, key=lambda name: not trained[name])
        for seed in range(args.seed, args.seed + (args.seeds if trained[name] else 1))]
    for config in jobs:
        folder = args.resume or folder_for(config, args.runs)
        report = run_in(folder, config, args.device,
                        STARTED if __name__ == "__main__" and len(jobs) == 1 else None)
        rows.setdefault(config["objective"], []).append(report)
    if len(jobs) == 1:
        return print(format_report(report))
    write_whole(args.runs / "table.md", (table := format_comparison(rows)).encode())
    draw_comparison(rows, args.runs / "comparison.png")
    print(f"{table}\nThe table and comparison.png are in {args.runs}")

def format_report(report: dict) -> str:
    """The table of a run: every metric that is defined, with its 95 % interval."""
    lines = [f"{'':34}{'seen tasks':>22}{'unseen tasks':>22}{'by chance':>11}"]
    for metric, (text, chance) in METRICS.items():
        cells = ["{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**found[metric])
                 if metric in found else "-" for found in (report["seen"], report["unseen"])]
        if cells != ["-", "-"]:
            lines.append(f"{text:34}{cells[0]:>22}{cells[1]:>22}{chance:>11.2f}")
    return "\n".join([*lines, "[95 % interval: bootstrap over the test episodes of these tasks]",
                      f"{report['wall_seconds']:.0f} s in all"])

def format_comparison(rows: dict[str, list[dict]]) -> str:
    """The table of a comparison, in Markdown: mean ± std over the seeds of each objective."""
    columns = list(itertools.product(("voc", "ranking_accuracy_within"), ("seen", "unseen")))
    titles = [f"{METRICS[metric][0]}, {group} tasks" for metric, group in columns]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(columns)]
    for name, runs in rows.items():
        lines.append(f"| `{Path(name).stem}` |")
        for metric, group in columns:
            values = [run[group].get(metric, {"value": math.nan})["value"] for run in runs]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            lines[-1] += f" {np.mean(values):.2f}{spread} |"
    return "\n".join(lines) + "\n"

def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    figure.savefig(file := io.BytesIO(), dpi=110)
    write_whole(path, file.getvalue())

def draw_comparison(rows: dict[str, list[dict]], path: Path) -> None:
    """VOC and ranking accuracy of every objective: a dot for each seed, and its 95 % interval."""
    figure = Figure(figsize=(11, 0.35 * len(rows) + 1.2), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 2, sharey=True), ("voc", "ranking_accuracy_within")):
        for group, color, shift in (("seen", "#30638e", -0.13), ("unseen", "#c8384e", 0.13)):
            cells = [(y + shift, run[group][metric]) for y, runs in enumerate(rows.values())
                     for run in runs if metric in run[group]]
            for y, cell in cells:
                axis.plot(cell["interval"], [y, y], color=color, lw=2, alpha=0.3)
            axis.plot([cell["value"] for _, cell in cells], [y for y, _ in cells], "o", ms=5,
                      color=color, label=f"{group} tasks")
        axis.axvline(METRICS[metric][1], color="0.8", lw=1, zorder=0)
        axis.set_title(METRICS[metric][0], loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_yticks(range(len(rows)), [Path(name).stem for name in rows])
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)

def draw_panels(panels: list[dict], path: Path) -> None:
    """Film strips, two in a row, and curves beneath them. A panel has "frames" (T, H, W, 3),
    "title", "remark", "x" (T,) and "curves" {label: values (T,)}."""
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure(figsize=(7 * columns, 3.6 * rows), layout="constrained")
    for part, panel in zip(figure.subfigures(rows, columns, squeeze=False).flat, panels):
        strip, *axes = part.subplots(1 + len(panel["curves"]), 1)
        shown = np.linspace(0, len(panel["frames"]) - 1, min(8, len(panel["frames"]))).astype(int)
        strip.imshow(np.concatenate(panel["frames"][shown], axis=1), aspect="auto")
        strip.set_axis_off()
        strip.set_title(panel["title"].replace("$", r"\$"), loc="left", fontweight="bold")
        strip.set_title(panel["remark"], loc="right", fontsize=9)
        for axis, color, name in zip(axes, ("#c8384e", "#30638e"), panel["curves"]):
            axis.plot(panel["x"], panel["curves"][name], color=color, marker="o", ms=3)
            axis.set_ylabel(name, color=color, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

def draw_curves(report: dict, data: Dataset, sentences: dict, path: Path) -> None:
    """Rewards of up to four test episodes: an expert and a failure, at a seen and an unseen task.
    The data alone choose them: no model is flattered, and two runs show the same episodes."""
    panels, test = [], report["episodes"]
    tried = ~data.success[test].any(1) & (np.ptp(data.rewards[test], axis=1) > 1)  # and failed
    source = data.source[test]
    unseen = np.isin(data.task[test], UNSEEN_TASKS)
    for kind in ("expert", "mixed"):
        for group in (~unseen, unseen):
            some = np.flatnonzero(group & (source == kind) & (tried | (source == "expert")))
            for k in some[len(some) // 2:][:1]:
                task, curves = data.task[test[k]], {"model's reward": report["predicted"][k]}
                if np.ptp(data.rewards[test[k]]):  # of films of one's own nobody knows them
                    curves["simulator's reward"] = data.rewards[test[k]]
                panels.append({"frames": data.frames(test[k]), "x": data.steps[test[k]],
                               "curves": curves, "title": sentences[task]["instruction"],
                               "remark": f"{'expert' if kind == 'expert' else 'failure'}, "
                                         f"{group_of(task)} task"})
    draw_panels(panels, path)

def read_frames(path: Path):
    """The frames, uint8 (H, W, 3), of a film, a GIF, a picture, or a folder of pictures in the
    order of the numbers in their names, one by one. Raises InputError."""
    pictures = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in pictures]
        for file in sorted(files, key=lambda file: [  # 10.png after 9.png
                int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]):
            yield from read_frames(file)
        return
    with reading(path):
        if path.suffix.lower() in pictures | {".gif"}:
            with Image.open(path) as picture:
                for k in range(getattr(picture, "n_frames", 1)):
                    picture.seek(k)
                    if picture.mode[0] in "IF":  # would be clipped to white
                        raise ValueError("its grey values have more than 8 bits")
                    yield np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        else:
            yield from imageio.imiter(path, plugin="FFMPEG")

def score(args: argparse.Namespace) -> None:
    """Print the reward of every frame of the video args.score, and draw them beside it."""
    if not args.instruction:
        raise InputError('--score needs the sentence: --instruction "close the drawer"')
    config = read_json(args.model / "config.json")
    if not config.get("reads_instruction", True):
        raise InputError(f"{args.model} was trained without sentences: its cosine means nothing")
    model, rewards, shown = load_reward_model(args.model, args.device), [], []
    for _, alike in itertools.groupby(read_frames(args.score), np.shape):  # one shape, one batch
        while some := list(itertools.islice(alike, 32)):
            rewards += model.score(np.stack(some), args.instruction).tolist()
            shown += [np.asarray(Image.fromarray(frame).resize((160, 120))) for frame in some]
            for k in range(len(rewards) - len(some), len(rewards)):
                print(f"frame {k:5}   reward {rewards[k]:.4f}")
    if not rewards:
        raise InputError(f"{args.score} has no pictures in it")
    voc, best = value_order_correlation(np.array([rewards]))[0], np.argmax(rewards)
    stem = f"{args.score.resolve().name}-{args.model.resolve().name}"
    path = next(path for n in itertools.count(1) if not (  # never over a file that is there
        path := args.score.resolve().with_name(stem + f"-{n}" * (n > 1) + ".png")).exists())
    draw_panels([{"frames": np.stack(shown), "x": range(len(rewards)), "title": args.instruction,
                  "remark": args.model, "curves": {"cos(frame, sentence)": rewards}}], path)
    print(f"VOC {voc:.2f} (1: rises all along), best frame {best}; drawn in {path}")

def main(argv: list[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    warnings.simplefilter("ignore")  # what matters is said in one line
    args = parse_arguments(argv)
    try:
        (collect if args.collect else score if args.score else run_all)(args)
    except (InputError, OSError, BrokenExecutor) as problem:  # OSError: a full disk, say
        print("vlmrm:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvlmrm: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # closed by whoever started us, or without ±
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
