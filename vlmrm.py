"""
Train a vision-language reward model, measure it, and change only its learning objective.

Such a model looks at a picture and a sentence ("close the drawer") and returns a number that should
rise as the task gets done. Two towers map frame and sentence to unit vectors, whose cosine is the
reward. What that is worth depends on the objective, and objectives are what this file compares, as
"Revisiting the learning objectives of vision-language reward models" does (arXiv 2512.20675).

  python vlmrm.py --objective triplet              train, test, draw: 22 seconds on two CPU cores
  python vlmrm.py --objective all --seeds 3                      compare the paper's five, and ours
  python vlmrm.py --score clip.mp4 --instruction "close the drawer"      use what was trained
  python vlmrm.py --collect --tasks reach-v3 push-v3 --data two.npz      make your own videos
  python vlmrm.py --backbone ViT-B-32-quickgelu --pretrained openai --lora 8 --learning-rate 1e-4

Expect of triplet (mean ± std of seeds 0, 1, 2; other CPUs than ours differ by some hundredths):
  VOC (order of an expert's frames, 1 is best)       0.90 ± 0.00 seen tasks, 0.77 ± 0.02 unseen
  ranking accuracy at the same time (chance .5)      0.76 ± 0.01 seen tasks, 0.71 ± 0.00 unseen

Shapes: B videos in a batch, K frames of each; E episodes, T frames of each; N frames of H x W
pixels (S x S in our data); M sentences; D dimensions.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import time
import warnings
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

# torch's threads spin while they wait, unless told otherwise before its import: let them sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.modules.setdefault("vlmrm", sys.modules[__name__])  # a file with an objective may import it
DATA = Path(__file__).resolve().parent / "data"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
if RANK and __name__ == "__main__":  # the first process speaks for all
    sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"

class InputError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""

# {name: (its loss in section 3, learning rate, {constant: values})}. The first value was the best
# of three on tasks kept out for it (data/study.py tune). The authors' are in the loss's signature.
OBJECTIVES = {
    "triplet": ("triplet_loss", 2e-3, {"margin": (0.1, 0.05, 0.2)}),
    "tcn": ("tcn_loss", 2e-3, {"temperature": (0.1, 0.3, 1.0)}),
    "r3m": ("r3m_loss", 2e-3, {"temperature": (0.1, 0.3, 1.0)}),
    "vip": ("vip_loss", 2e-3, {"scale": (20.0, 5.0, 1.0)}),
    "liv": ("liv_loss", 5e-4, {"temperature": (0.1, 0.03, 1.0)}),
    "anchored": ("anchored_loss", 2e-3, {"keep": (1.0, 0.3, 3.0)}),  # ours; how: data/results/
    "zeroshot": (None, 0, {}),  # the backbone as it is
}

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from argv or the command line. Bad ones end in one line and exit code 2."""
    parser = argparse.ArgumentParser("vlmrm", description="Train and test reward models.")
    parser.error = lambda text: parser.exit(2, f"vlmrm: {' '.join(text.split())}; see --help\n")
    add = parser.add_argument_group("training").add_argument
    add("--objective", nargs="+", default=["triplet"], metavar="NAME",
        help=f"{', '.join(OBJECTIVES)}, or a file with your own; several, or all, compared")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--seeds", type=int, default=1, help="how many, from --seed on (1)")
    add("--backbone", default="tiny", help="tiny, thumbnail, or any of open_clip (tiny)")
    add("--pretrained", help="tag of open_clip, file, or none: random weights (tiny has its own)")
    add("--lora", type=int, default=8, metavar="RANK", help="of adapters; 0: all weights train (8)")
    add("--steps", type=int, default=60, help="optimiser steps (60)")
    add("--batch", type=int, default=40, help="videos per step, 5 frames of each (40)")
    add("--learning-rate", type=float, help="at its peak (the objective's, a quarter if --lora 0)")
    add("--data", type=Path, default=DATA / "metaworld.npz", help="data set (data/metaworld.npz)")
    add("--instructions", type=Path, default=DATA / "instructions.json", help="its sentences")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best")
    add("--runs", type=Path, default=Path("runs"), help="where the folders of runs are (runs)")
    add("--resume", type=Path, metavar="FOLDER", help="go on with a run that was stopped")
    add = parser.add_argument_group("using a run").add_argument
    add("--score", type=Path, metavar="VIDEO", help="reward the frames of a video or picture(s)")
    add("--instruction", help="what the video should show")
    add("--model", type=Path, default=Path("runs/triplet-seed0"), help="a run (runs/triplet-seed0)")
    add = parser.add_argument_group("making a data set").add_argument
    add("--collect", action="store_true", help="write episodes to --data")
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
    use, make = {"score", "instruction", "model"}, {
        "collect", "tasks", "expert", "mixed", "frames", "size", "workers"}
    mode, obeyed = (("collect", make | {"seed", "data", "instructions"}) if args.collect else
                    ("score", use | {"device"}) if args.score else
                    ("resume", {"resume", "device"}) if args.resume else
                    ("objective", set(vars(args)) - use - make))
    for text in args.objective:
        if text not in ("all", *OBJECTIVES) and not (text.endswith(".py") and Path(text).is_file()):
            parser.error(f"{text!r} is not all, {', '.join(OBJECTIVES)}, or a Python file")
    for wrong, text in (
            (mode == "score" and not args.instruction, "--score needs --instruction, a sentence"),
            (args.frames * args.size > 16383, "--frames x --size is over 16383, the limit of WebP"),
            (WORLD > 1 and mode in ("collect", "score"), f"--{mode} is for one process"),
            (args.backbone == "thumbnail" and args.lora, "--backbone thumbnail needs --lora 0")):
        if wrong:
            parser.error(text)
    for name, value in vars(args).items():
        option, low = f"--{name.replace('_', '-')}", least.get(name, 1)
        if type(value) in (int, float) and not low <= value <= 10**6:
            parser.error(f"{option} {value} is not between {low} and 1000000")
        if name not in obeyed and value != parser.get_default(name):
            parser.error(f"{option} has no effect with --{mode}")

if __name__ == "__main__":  # --help and typing errors need not wait for torch
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback
    RANK or parse_arguments()  # one process is enough to say what is wrong

import imageio.v3 as imageio  # --score's films and pictures
import numpy as np
import open_clip  # the CLIP architectures and tokenizers
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot: no window opens by mistake
from PIL import Image  # WebP
from safetensors import safe_open
from safetensors.torch import load_file, save
from scipy.stats import rankdata
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from tqdm import tqdm

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
        raise InputError(f"cannot read {path}: {kind}{str(problem)[:200]}") from None

def read_json(path: Path) -> dict:
    """A JSON file with a dictionary. Raises InputError."""
    with reading(path):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))

def write_whole(path: Path, content) -> None:
    """Write bytes, a dictionary or a figure, whole or not at all; of many processes the first."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, default=lambda array: array.tolist()).encode()
    if isinstance(content, Figure):
        content.savefig(png := io.BytesIO(), dpi=110)
        content = png.getvalue()
    if not RANK:
        Path(f"{path}.unfinished").write_bytes(content)
        os.replace(f"{path}.unfinished", path)

# 1. Dataset collection ----------------------------------------------------------------------------
# A reward model learns what "further along" looks like, from videos in which things get done.
# Meta-World has 50 tasks, and for each a scripted policy: an expert. Two kinds of episodes:
#   expert  the scripted policy; only successes are kept, cut 5 steps later. We train on some. On
#           the others, time itself says which frame is further.
#   mixed   the same policy with noise and random actions, for 150 steps: some succeed, most dither,
#           fail or go backwards. No training: the simulator's reward says which frame is better.
# Ten tasks are unseen: never trained on. Each has a sibling among the other forty (open, close).

UNSEEN_TASKS = tuple(f"{task}-v3" for task in (
    "button-press coffee-pull door-open door-unlock drawer-open faucet-open handle-pull-side "
    "plate-slide-back push-wall window-close").split())
EPISODE = {"task": ("U", 1), "split": ("U", 1), "source": ("U", 1), "seed": ("iu", 1),
           "rewards": ("f", 2), "success": ("b", 2), "steps": ("iu", 2)}  # kind, dimensions
POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "light_xpos", "light_xdir", "cam_xpos",
         "cam_xmat")  # all in the simulator's state that a picture depends on

def group_of(task: str) -> str:
    """"unseen" for the ten tasks that nobody trains on, "seen" for the others."""
    return "unseen" if task in UNSEEN_TASKS else "seen"

def load_instructions(path: Path, tasks=()) -> dict[str, dict]:
    """{task: {"instruction", "paraphrases" (3, never trained on), "opposite" (the task that undoes
    this one, if there is one)}}, the given tasks among them. Raises InputError."""
    with reading(path):
        known = {None, *(sentences := read_json(path))}
        for entry in [sentences[task] for task in {*sentences, *tasks}]:
            many = isinstance(entry["paraphrases"], list) and len(entry["paraphrases"])
            if many != 3 or "instruction" not in entry or entry.get("opposite") not in known:
                raise ValueError(f"not one instruction, three paraphrases, one opposite: {entry}")
    return sentences

def open_task(task: str, size: int):
    """The simulator of a task, the class of its scripted policy, a renderer of size x size pictures
    (close it before the next is opened, or the next one's are stale). Raises InputError."""
    if sys.platform == "linux":  # without a screen; mujoco reads this once, at import
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as policies
        env = environments[task + "-goal-observable"](seed=0)
        env.model.vis.quality.offsamples = 0  # no multisampling: 9 times as fast as env.render()
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = size
        view = env.model.camera("corner4")  # turned to where hands work: things 1.6 times as large
        view.fovy[:], view.quat[:] = 40.6, (-0.3691, 0.1892, -0.4376, 0.7978)
        renderer = mujoco.Renderer(env.model, size, size)
    except Exception as problem:  # graphics libraries fail in many ways
        raise InputError(
            f"cannot render {task} ({str(problem)[:80]!r}). It takes metaworld (Python 3.10-3.13) "
            "and OpenGL: 'apt-get install libosmesa6', or for a GPU MUJOCO_GL=egl") from None
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = False
    return env, policies[task], renderer

def roll_out(env, policy, rng, steps: int, noise: float, random_share: float):
    """The poses, rewards and success flags of an episode, one of each a step. A share of actions is
    random, all get Gaussian noise. Without noise, an expert's, it ends 5 steps after success."""
    history, (observation, _) = [], env.reset()
    for _ in range(steps):
        action = policy.get_action(observation)
        if rng.random() < random_share:
            action = rng.uniform(-1, 1, size=4)  # x, y, z, gripper
        action = np.clip(action + noise * rng.normal(size=4), -1, 1)
        observation, reward, _, _, info = env.step(action)
        # Drawing costs ten times as much as a step: keep the poses now, draw a chosen few later.
        poses = {name: getattr(env.data, name).copy() for name in POSES}
        history.append((poses, reward, bool(info["success"])))
        if noise == 0 and any(success for *_, success in history[:-5]):
            break
    return zip(*history)

def draw(renderer, data, poses: dict) -> np.ndarray:
    """A picture, uint8 (S, S, 3), of the simulator's state `data` with these poses."""
    for name, pose in poses.items():
        getattr(data, name)[:] = pose
    renderer.update_scene(data, camera="corner4")
    # The camera hangs upside down. Turn the picture, which flips BOTH axes: flipping the rows alone
    # looks right, but mirrors the scene, and left becomes right.
    return renderer.render()[::-1, ::-1]

def encode_frames(frames: np.ndarray) -> bytes:
    """Pack uint8 frames (T, S, S, 3) into a WebP, top to bottom: a 29th of the bytes."""
    strip = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(strip, "WEBP", quality=70, method=6)
    return strip.getvalue()

def collect_task(job: dict) -> list[dict]:
    """All episodes of one task. job: the task, and --collect's options. Raises InputError."""
    task, (env, policy, renderer) = job["task"], open_task(job["task"], job["size"])
    episodes, attempts = [], 0
    while len(episodes) < job["expert"] + job["mixed"]:
        mixed = len(episodes) >= job["expert"]
        if not mixed and attempts >= 4 * job["expert"]:
            raise InputError(f"{task}: {len(episodes)} of {attempts} tries succeed: lower --expert")
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
        steps = np.linspace(0, len(poses) - 1, job["frames"]).round().astype(np.int16)
        frames = [draw(renderer, env.data, poses[step]) for step in steps]
        # Success may flicker: a flag is True if any step since the last kept frame succeeded.
        since = np.minimum(np.r_[0, steps[:-1] + 1], steps)
        episodes.append({
            "task": task, "source": "mixed" if mixed else "expert", "seed": seed, "steps": steps,
            "rewards": np.float32(rewards)[steps],
            "success": np.logical_or.reduceat(successes, since), "strip": encode_frames(frames)})
    renderer.close()
    return assign_splits(episodes)

def assign_splits(episodes: list[dict]) -> list[dict]:
    """Give each episode of one task its split. Experts: 60 % train, 15 % validation (for choices
    of yours), 25 % test. Mixed: 1/3 validation. Of an unseen task all is test."""
    for source, train_until, validation_until in (("expert", 0.6, 0.75), ("mixed", 0, 1 / 3)):
        group = [episode for episode in episodes if episode["source"] == source]
        for i, episode in enumerate(group):
            place = 1 if group_of(episode["task"]) == "unseen" else i / len(group)
            episode["split"] = ("train" if place < train_until else
                                "validation" if place < validation_until else "test")
    return episodes

def collect(args: argparse.Namespace) -> None:
    """Write episodes of args.tasks to args.data: the same bytes for any number of workers."""
    all_tasks = sorted(load_instructions(args.instructions))
    tasks = args.tasks or all_tasks
    if strange := set(tasks) - set(all_tasks):
        raise InputError(f"unknown task {min(strange)!r}; there are {', '.join(all_tasks)}")
    args.data.parent.mkdir(parents=True, exist_ok=True)
    open(args.data, "xb").close()  # it exists, or one cannot write there: say so before the work
    args.data.unlink()
    with ProcessPoolExecutor(  # spawn: a forked process would inherit a broken graphics library
            min(args.workers, len(tasks)), multiprocessing.get_context("spawn"),
            signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C is for us alone
        jobs = pool.map(collect_task, [vars(args) | {"task": task} for task in tasks])
        episodes = list(itertools.chain(*tqdm(jobs, "collecting", total=len(tasks))))
    write_dataset(args.data, episodes)
    print(f"wrote {len(episodes)} episodes of {len(tasks)} tasks to {args.data}")

def write_dataset(path: Path, episodes: list[dict]) -> None:
    """Write episodes, {EPISODE's fields and "strip": value}, as one npz file. Raises InputError."""
    unfinished, strips = Path(f"{path}.unfinished.npz"), [episode["strip"] for episode in episodes]
    try:
        np.savez(unfinished, **{name: np.array([e[name] for e in episodes]) for name in EPISODE},
                 offsets=np.cumsum([0, *map(len, strips)]),
                 strips=np.frombuffer(b"".join(strips), np.uint8))
        Dataset(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

class Dataset:
    """The episodes of one npz file: E episodes of T frames, S x S pixels each.
    task, split, source, seed   (E,) names, "train"/"validation"/"test", "expert"/"mixed", integer
    rewards, success, steps     (E, T) simulator's reward (0 to 10), success flag, step index
    offsets, strips             (E + 1,) where each packed strip begins in (bytes,) of all of them
    """
    def __init__(self, path: Path):
        self.path = path
        with reading(path), np.load(path, allow_pickle=False) as file:  # a pickle could run code
            vars(self).update(file)  # self.task, self.rewards, ...
            self.E, self.T = self.rewards.shape
            for name, (kinds, ndim) in EPISODE.items():
                array = getattr(self, name)
                if array.dtype.kind not in kinds or array.shape != (self.E, self.T)[:ndim]:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}")
            if not ({*self.split} <= {"train", "validation", "test"} and self.T >= 5
                    and {*self.source} <= {"expert", "mixed"} and np.isfinite(self.rewards).all()):
                raise ValueError("unknown split or source, fewer than 5 frames, reward not finite")
            self.S = self.picture(0).width
            if {self.picture(e).size for e in range(self.E)} != {(self.S, self.T * self.S)}:
                raise ValueError(f"not every strip has {self.T} square pictures of {self.S} pixels")

    def picture(self, e: int) -> Image.Image:
        """The strip of one episode, still packed but for its size."""
        strip = self.strips[self.offsets[e]:self.offsets[e + 1]].tobytes()
        return Image.open(io.BytesIO(strip), formats=["WEBP"])

    def frames(self, e: int) -> np.ndarray:
        """The frames of one episode, uint8 (T, S, S, 3). Raises InputError if it is damaged."""
        with reading(self.path):
            return np.asarray(self.picture(e)).reshape(self.T, self.S, self.S, 3)

    def load(self, episodes) -> np.ndarray:
        """The frames of some episodes, unpacked by all cores: uint8 (len(episodes), T, S, S, 3)."""
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(self.frames, episodes)))

    def select(self, **wanted) -> np.ndarray:
        """Indices of the episodes that match: select(split="test", source="expert")."""
        return np.flatnonzero(np.all([getattr(self, key) == wanted[key] for key in wanted], axis=0))

# 2. The CLIP backbone -----------------------------------------------------------------------------
# CLIP is two towers: one maps a picture to a vector, the other a sentence, both in one space. The
# reward of a frame is the cosine of its vector and the instruction's. That is the whole reward
# model; an objective only decides where the vectors go. All have unit length, so that no objective
# can win by scale: cosine, dot product and distance say the same, |a - b|^2 = 2 - 2 cos(a, b).
# TINY is ours (the paper fine-tunes SigLIP2): small enough to train while you watch. Before any
# objective it has seen its world: captioned pictures of all the drawers, doors and mugs of these
# tasks in random states (data/scenes.py), but no instruction and nobody at work.

TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 4096, "width": 128, "heads": 2, "layers": 1},
}

def tiny_tokenizer():
    """CLIP's own tokenizer, cut to a vocabulary of 4,096: rare words fall into more pieces."""
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY["text_cfg"]["context_length"])
    merges = TINY["text_cfg"]["vocab_size"] - 2 * 256 - 2  # bytes, bytes at a word's end, 2 marks
    tokenizer.bpe_ranks = {pair: r for pair, r in tokenizer.bpe_ranks.items() if r < merges}
    # CLIP reads a sentence off at its largest token id: the end mark must be the last.
    tokenizer.sot_token_id, tokenizer.eot_token_id = 512 + merges, 512 + merges + 1
    return tokenizer

class RewardModel(nn.Module):
    """A CLIP model, its tokenizer and its normalisation: frames and sentences in, rewards out."""
    def __init__(self, clip: nn.Module, tokenizer, mean=None, std=None):
        super().__init__()
        self.clip, self.tokenizer, self.low_precision = clip, tokenizer, False  # prepare_model()
        self.size = int(np.max(clip.visual.image_size))
        pixels = lambda norm: 255 * torch.tensor(norm).view(3, 1, 1)  # from 0 to 255, not to 1
        self.register_buffer("mean", pixels(mean or open_clip.OPENAI_DATASET_MEAN))
        self.register_buffer("std", pixels(std or open_clip.OPENAI_DATASET_STD))

    def encode(self, tower, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of a tower as unit vectors, float32, whatever precision the tower ran in."""
        device = self.mean.device.type
        # On a CPU plain attention trains faster than the fused kernel, made for longer sequences.
        plain = device == "cpu" and torch.is_grad_enabled()
        attention = sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=self.low_precision), attention:
            return F.normalize(tower(inputs).float(), dim=-1)

    def embed_frames(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 frames (..., H, W, 3), stretched to the model's size -> (..., D), unit, float32."""
        features, most = [], 10**9 if torch.is_grad_enabled() else 120  # a graph keeps all anyway
        for part in torch.tensor(frames).flatten(0, -4).split(most):
            pixels = part.to(self.mean.device).permute(0, 3, 1, 2).contiguous().float()
            if pixels.shape[2:] != (self.size, self.size):  # (N, 3, H, W)
                pixels = F.interpolate(pixels, (self.size,) * 2, mode="bilinear", antialias=True)
            pixels = pixels.sub_(self.mean).div_(self.std)
            features.append(self.encode(self.clip.encode_image, pixels))  # (N, D)
        return torch.cat(features).view(*frames.shape[:-3], -1)

    def embed_texts(self, sentences: list[str]) -> torch.Tensor:
        """M sentences -> unit vectors (M, D), float32."""
        return self.encode(self.clip.encode_text, self.tokenizer(sentences).to(self.mean.device))

    def check_sentences(self, sentences: list[str]) -> None:
        """Raise InputError for what is no sentence, or is too long, if the tokenizer can tell."""
        room = self.clip.context_length - 2  # without the marks of start and end
        for text in sentences:
            if not isinstance(text, str) or not text.strip() or not text.isprintable():
                raise InputError(f"{text!r} is no sentence")
            ids = self.tokenizer.encode(text) if hasattr(self.tokenizer, "encode") else []
            if len(ids) > room or any(i >= len(self.tokenizer.encoder) - 2 for i in ids):
                raise InputError(f"{text[:40]!r}: {len(ids)} word pieces, of which this backbone "
                                 f"reads {room}, or the tokenizer's own marks are among them")

    @torch.inference_mode()
    def score(self, frames: np.ndarray, instruction: str) -> np.ndarray:
        """Rewards of uint8 frames (N, H, W, 3) of any size under one sentence: cosines, (N,).
        Their level differs from sentence to sentence. Raises InputError."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise InputError("frames must be uint8 (N, H, W, 3), red green blue, 0 to 255; these "
                             f"are {frames.dtype} {frames.shape}")
        self.check_sentences([instruction])
        text = self.embed_texts([instruction])[0]  # (D,)
        return (self.embed_frames(np.ascontiguousarray(frames)) @ text).cpu().numpy()

def build_backbone(name: str, pretrained: str | None = None) -> RewardModel:
    """tiny, thumbnail (a control: a linear map of 12 x 12 pixels in place of the vision tower), or
    any open_clip model. pretrained: a tag, a file or "none". Raises InputError."""
    if name in ("tiny", "thumbnail"):
        model = RewardModel(open_clip.CLIP(**TINY), tiny_tokenizer(), [0.5] * 3, [0.5] * 3)
        if pretrained != "none":
            with reading(path := Path(pretrained or DATA / "tiny.safetensors")):
                put_weights(model, load_file(path))
        if name == "thumbnail":
            model.clip.visual = nn.Sequential(
                nn.AdaptiveAvgPool2d(12), nn.Flatten(), nn.Linear(3 * 12 * 12, TINY["embed_dim"]))
        return model
    try:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:  # random weights are never a silent choice
            raise ValueError(f"choose --pretrained: a file, none, {', '.join(tags)}")
        clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
        tag = pretrained if pretrained in tags else next(iter(tags), "")
        known = open_clip.get_pretrained_cfg(name, tag)  # a file does not say how to normalise
        return RewardModel(clip, open_clip.get_tokenizer(name), known.get("mean"), known.get("std"))
    except Exception as problem:  # hubs fail in many ways
        raise InputError(f"cannot load {name} / {pretrained}: {str(problem)[:250]}. Without a "
                         "network, --pretrained takes a file") from None

class LoRA(nn.Module):
    """W becomes W + B A; only A, B are trained, B starts at 0. No alpha / r. arXiv 2106.09685."""
    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.B @ self.A

def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model, and put an adapter on every nn.Linear and attention matrix in it."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        # MultiheadAttention packs queries, keys and values into one matrix, which is no nn.Linear.
        packed = isinstance(module, nn.MultiheadAttention)
        if packed or isinstance(module, nn.Linear):
            name = "in_proj_weight" if packed else "weight"
            parametrize.register_parametrization(module, name, LoRA(getattr(module, name), rank))

def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without what is frozen: all that a run has to remember."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {k: x.cpu().contiguous() for k, x in model.state_dict().items() if k not in frozen}

def put_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """The inverse of trained_weights(). Raises ValueError if not this model's, or not finite."""
    if strange := set(weights) ^ set(trained_weights(model)):
        raise ValueError(f"{len(strange)} weights too many or missing, such as {min(strange)}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError("some weights are not finite")
    model.load_state_dict(weights, strict=False)

# 3. The learning objectives -----------------------------------------------------------------------
# An objective says which of these vectors should be closer, and which farther apart. Three ideas:
#     order in a video        a later frame beats an earlier      triplet, r3m
#     videos and sentences    the right pair beats wrong ones     liv, r3m, anchored
#     distance in time        near is near, or steps to a goal    tcn, r3m, vip, liv, anchored
# All but anchored, ours, are the paper's. Others are in data/objectives/, one a file.
# Each gets the same batch, B videos of B different tasks and K = 5 frames of each, and returns one
# number, a scalar tensor:
#     frames  (B, K, D)   unit vectors of the frames start < now < next = now + 1 < later < end
#     texts   (B, D)      unit vectors of the instructions
#     times   (B, K)      share of the episode that has passed at each frame, 0 to 1
#     before              for a loss with this parameter: (frames, texts) of the untrained model
# In the equations o is a frame, l its instruction, t the time, V a value, cos(a, b) a cosine,
# |a - b| a Euclidean distance. VIP and LIV call start, now, next and end o0, o, o', og (the goal);
# TCN and R3M call now, later and end s0, s1, s2. CE(M) is the mean over the rows i of
# -log softmax(M_i)_i; eps = 1e-8 keeps logarithms finite; means are over the batch.
#
# The signatures of TCN, R3M, VIP (but for scale) and LIV have the authors' constants, runs those of
# OBJECTIVES. With the former they return, value and gradient, what the authors' code returns
# (tests, data/golden/). Official batches of R3M and LIV have a sixth frame: hence [:, :5], [:, -1].
# Their code pairs videos by chance, some with themselves. We shift the batch, in random order.

LOG_EPS = math.log(1e-8)  # -18.4

def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cos(a, b) over the last dimension; the others broadcast."""
    return F.cosine_similarity(a, b, dim=-1)

def negative_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """-|a - b| over the last dimension (not squared): the similarity of R3M and VIP."""
    return -torch.linalg.vector_norm(a - b, dim=-1)

def negative_permutations(n: int, batch: int) -> torch.Tensor:
    """Cyclic shifts by 1, 2, ... places: (min(n, B - 1), B). No video meets itself."""
    return (torch.arange(batch) + torch.arange(1, min(n, batch - 1) + 1)[:, None]) % batch

def triplet_loss(frames, texts, times, margin: float = 0.1) -> torch.Tensor:
    """Triplet: of two frames, the later one is closer to the instruction, by a margin.
        L = mean over pairs early < late of max(0, margin - cos(late, l) + cos(early, l))
    Notice: nothing but order. Nothing ties a sentence to its task. Source: the baseline of
    2512.20675, in a form of ours, as we have not seen theirs: all ten pairs. Uses cosine().
    """
    reward = cosine(frames, texts[:, None])  # (B, K)
    early, late = torch.triu_indices(frames.shape[1], frames.shape[1], offset=1)
    return F.relu(margin - reward[:, late] + reward[:, early]).mean()

def info_nce(scores: torch.Tensor) -> torch.Tensor:
    """1/2 [CE(M) + CE(M^T)] of M (..., B, B): each row and each column finds its diagonal."""
    rows, columns = (-scores.log_softmax(dim).diagonal(dim1=-2, dim2=-1) for dim in (-1, -2))
    return (rows + columns).mean() / 2

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
    Notice: no sentence. The cosine is not trained; TCN's own reward would be -|o - og|.
    Source: Sermanet et al., 1704.06888, as in R3M's code (r3m/trainer.py). Differs: there s2 need
    not be the end. Uses softmax_loss(), negative_distance() and negative_permutations().
    """
    _, s0, _, s1, s2 = frames[:, :5].unbind(1)
    similarity = lambda a, b: negative_distance(a, b) / temperature  # (B,)
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
    Notice: it must tell frames and videos apart by the sentence, so it remembers its tasks. Source:
    Nair et al., 2203.12601, r3m/trainer.py. Differs: there an MLP over first frame, frame and
    DistilBERT, here the cosine; s2 = end, unless a sixth frame is the end. Uses tcn_loss(),
    softmax_loss(), cosine(), norm_penalty() and negative_permutations().
    """
    start, s0, _, s1, s2 = frames[:, :5].unbind(1)
    end, language, under = frames[:, -1], 0, lambda frame: cosine(frame, texts) / temperature
    for positive, negative in ((end, start), (s1, s0), (s2, s1)):
        perms = negative_permutations(negatives, len(frames))
        rivals = [negative, *(positive[perm] for perm in perms)]
        language = language + softmax_loss(under(positive), [*map(under, rivals)]) / 3
    has_text = texts.any(dim=-1)  # (B,): in the official batches zeros mean "no sentence"
    tcn = tcn_loss(frames, texts, times, temperature, negatives)
    used = torch.stack([start, s0, s1, s2, end])
    return tcn + (has_text * language).mean() + norm_penalty(used, l1, l2)

def implicit_value_loss(value, start, now, next_, goal, gamma: float, perms) -> torch.Tensor:
    """The core of VIP and LIV: a value V(o; goal), minus the discounted number of steps to it.
        L = (1 - gamma) mean -V(o0; og) + log(eps + mean exp(1 + V(o; og) - gamma V(o'; og)))
            [ + the same second term over other videos' (o, o') under this goal ]
    A step costs 1: V(o) = -1 + gamma V(o') on the way. The first term pulls the start to the goal,
    the second punishes V(o) > -1 + gamma V(o'). value(o, goal) gives V; perms (n, B). Uses LOG_EPS.
    """
    def step_penalty(a, b):
        residual = 1 + value(a, goal) - gamma * value(b, goal)
        log_mean = torch.logsumexp(residual.flatten(), dim=0) - math.log(residual.numel())
        return torch.logaddexp(log_mean, log_mean.new_tensor(LOG_EPS))

    loss = (1 - gamma) * -value(start, goal).mean() + step_penalty(now, next_)
    return loss + step_penalty(now[perms], next_[perms]) if len(perms) else loss

def vip_loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.98, negatives: int = 3,
             l1: float = 1e-3, l2: float = 1e-3) -> torch.Tensor:
    """VIP: the distance to the goal image shrinks with every step, learnt as a value function.
        L = implicit_value_loss(V) + l1 |x|_1 + l2 |x|_2,  V(o; og) = -scale |o - og|
    Notice: no sentence. Unit vectors are 2 apart at most, while a goal 23 frames away should get
    V = -(1 - .98^23) / .02 = -18.6: scale is ours. Source: Ma et al., 2210.00030, vip/trainer.py,
    Ego4D constants. Differs: the goal ends the episode, not a random part of it. Uses
    implicit_value_loss(), negative_distance(), norm_penalty() and negative_permutations().
    """
    start, now, next_, _, goal = frames.unbind(1)
    perms = negative_permutations(negatives, len(frames))
    loss = implicit_value_loss(lambda o, g: scale * negative_distance(o, g),
                               start, now, next_, goal, gamma, perms)
    return loss + norm_penalty(torch.stack([start, goal, now, next_]), l1, l2)

def liv_loss(frames, texts, times, temperature: float = 1.0, gamma: float = 0.98,
             language_weight: float = 0.0, negatives: int = 0) -> torch.Tensor:
    """LIV: VIP and CLIP in one space, so that an instruction could stand where the goal image does.
        L = info_nce(M) + implicit_value_loss(V; goal og) + w_lang implicit_value_loss(V; goal l),
        V(o; og) = cos(o, og) / (1 - gamma),  M_ij = cos(og_i, l_j) / temp
    Notice: with the official w_lang = 0 a sentence meets the end of its video and no other frame.
    Source: Ma et al., 2306.00958, liv/trainer.py, finetune.yaml. Differs: only in how the batch is
    drawn. Uses implicit_value_loss(), info_nce(), cosine() and negative_permutations().
    """
    start, now, next_, _, goal = frames[:, :5].unbind(1)
    perms = negative_permutations(negatives, len(frames))
    loss = info_nce(cosine(frames[:, None, -1], texts) / temperature)
    for weight, target in ((1, goal), (language_weight, texts)):
        if weight:
            loss = loss + weight * implicit_value_loss(
                lambda o, g: cosine(o, g) / (1 - gamma), start, now, next_, target, gamma, perms)
    return loss

def anchored_loss(frames, texts, times, before, scale: float = 5.0, keep: float = 1.0,
                  directions: float = 0.1) -> torch.Tensor:
    """Anchored (ours): from frame to frame the right share of what remains gets done; a video moves
    along its own sentence and no other's; frames stay where they were before training.
        L = mean over u != v [(hop(p; u, v) - hop(t; u, v))^2] + directions info_nce(R) + keep mean
        |o - o_before|^2,  hop(x; u, v) = (y_v - y_u) / (1 - y_u) if v is later, else / y_u,
        y = .05 + .9 x,  p = sigmoid(scale cos(o, l)),
        R_ij = 3 sum_(steps a, b of video i) l_j . (b - a) / |b - a|
    Notice: the untrained model looks at each batch too. Source: hops are of Robo-Dopamine
    (2512.23703, there a VLM words them), R of DecisionNCE-T (2402.18137), the last term is feature
    distillation (1606.09282). The mixture is ours, data/results/. Uses cosine() and info_nce().
    """
    u, v = (~torch.eye(frames.shape[1], dtype=torch.bool)).nonzero().T
    progress = torch.sigmoid(scale * cosine(frames, texts[:, None]))  # (B, K)
    done, due = (0.05 + 0.9 * x for x in (progress, times))  # from 0 or 1 there is no hop
    hops = [(x[:, v] - x[:, u]) / torch.where(due[:, v] > due[:, u], 1 - x[:, u], x[:, u])
            for x in (done, due)]  # (B, 20)
    steps = frames[:, [0, 1, 3, 4]].diff(dim=1)  # (B, 3, D), but not to the next: too close
    contrast = info_nce(3 * F.normalize(steps, dim=-1, eps=1e-6).sum(dim=1) @ texts.T)
    away = (frames - before[0]).square().sum(dim=-1).mean()
    return (hops[0] - hops[1]).square().mean() + directions * contrast + keep * away

def cosine_reward(frames: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The reward under test, of unit vectors: frames (E, T, D), text (D,) -> (E, T)."""
    return frames @ text

def get_objective(name: str) -> dict:
    """What a name in OBJECTIVES, or a Python file, defines: loss(frames, texts, times) and/or
    reward(frames (E, T, D), text (D,)) -> (E, T), else the cosine. A file may add TUNED = (rate,
    {constant: (value, others to try)}); LABELS = "rewards": times (B, K) are the simulator's; and
    SENTENCES: M more, embedded (M, D) for a third argument of reward(). Raises InputError."""
    loss, *tuned = (None, 2e-3, {}) if name.endswith(".py") else OBJECTIVES[name]
    found = {"loss": globals().get(loss), "TUNED": tuned, "LABELS": "times", "SENTENCES": []}
    if name.endswith(".py"):
        found |= runpy.run_path(name)
        if not found["loss"] and "reward" not in found:
            raise InputError(f"{name} defines neither loss() nor reward()")
    return {"reward": cosine_reward} | found

def takes_before(loss) -> bool:
    """Whether a loss asks for the embeddings before training."""
    return "before" in inspect.signature(loss).parameters

def reads_instruction(loss) -> bool:
    """Whether a gradient reaches the sentences: not in TCN and VIP, their cosine is untrained."""
    frames, texts = (torch.rand(8, *shape, requires_grad=True) for shape in ((5, 128), (128,)))
    extra = {"before": (frames.detach(), texts.detach())} if takes_before(loss) else {}
    loss(frames, texts, torch.linspace(0, 1, 5).expand(8, 5), **extra).backward()
    return texts.grad is not None

# 4. The training loop -----------------------------------------------------------------------------
# A step: draw a batch, embed it, ask the objective for its number, move the weights. The learning
# rate climbs while AdamW's averages are young, and falls to nothing, so that the last steps settle.
# torchrun starts WORLD processes, one a GPU, all with the same weights. They draw the same batch,
# and each embeds its own slice. But most losses hold every video against every other: a slice alone
# has another loss. So they hand their embeddings round, and each computes the loss of the whole
# batch. Each has the gradient of its own slice only: their sum is what one process would have.

def gather(own: torch.Tensor) -> torch.Tensor:
    """All embeddings (B, ...); a gradient goes back only to one's own (B / WORLD, ...)."""
    if WORLD > 1:
        parts = [torch.empty_like(own) for _ in range(WORLD)]
        torch.distributed.all_gather(parts, own.detach().contiguous())
        own = torch.cat([*parts[:RANK], own, *parts[RANK + 1:]])
    return own

def share(content) -> list:
    """What each process has, by rank. All wait for one another."""
    everyone = [content] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(everyone, content)
    return everyone

def training_episodes(data: Dataset, batch: int) -> dict[str, np.ndarray]:
    """The episodes to train on, {task: indices}. Raises InputError if the batch does not fit."""
    tasks = np.unique(data.task[data.select(split="train", source="expert")])
    tasks = [task for task in tasks if group_of(task) == "seen"]
    if batch > len(tasks) or batch % WORLD:
        raise InputError(f"--batch {batch}: {data.path} can train on {len(tasks)} tasks only"
                         + f", and {WORLD} processes want equal parts" * (WORLD > 1))
    return {task: data.select(split="train", source="expert", task=task) for task in tasks}

def sample_batch(episodes: dict[str, np.ndarray], T: int, rng, batch: int):
    """A video each of `batch` different tasks, and five frames of each: episode indices (B,), frame
    numbers (B, 5). Start and end are of the first and last fifth (R3M), next follows now (VIP)."""
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
          labels: str = "times", saved: Path | None = None) -> list[dict]:
    """Train the model in place, by seed, steps, batch and learning_rate of config: the same bits on
    the same CPU and number of threads. labels="rewards" hands those to the loss as times. saved: a
    file to save to some ten times, and to go on from. Returns the log."""
    rng, steps, batch = np.random.default_rng(config["seed"]), config["steps"], config["batch"]
    episodes = training_episodes(data, batch)
    videos = {e: video for some in episodes.values() for e, video in zip(some, data.load(some))}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01, fused=model.mean.device.type != "mps")
    untrained = copy.deepcopy(model).eval() if takes_before(loss_function) else None
    log = load_checkpoint(saved, model, optimizer, config) if saved and saved.exists() else []
    for _ in log:  # draw again what was drawn: the generator then stands where it stood
        sample_batch(episodes, data.T, rng, batch)
    model.train()
    own = range(batch)[RANK * batch // WORLD:(RANK + 1) * batch // WORLD]
    for step in (bar := tqdm(range(1, steps + 1)[len(log):], "training", steps, initial=len(log))):
        episode_ids, frame_ids = sample_batch(episodes, data.T, rng, batch)
        pixels = np.stack([videos[episode_ids[i]][frame_ids[i]] for i in own])
        said = [sentences[data.task[episode_ids[i]]]["instruction"] for i in own]
        times = (data.rewards[episode_ids[:, None], frame_ids] if labels == "rewards"
                 else frame_ids / (data.T - 1))
        embed = lambda some: (gather(some.embed_frames(pixels)), gather(some.embed_texts(said)))
        frames, texts = embed(model)  # (B, 5, D), (B, D)
        with torch.no_grad():
            extra = {"before": embed(untrained)} if untrained else {}
        loss = loss_function(frames, texts, torch.tensor(times).float().to(frames.device), **extra)
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
            raise InputError("the loss must be one number, a tensor made of the embeddings")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for weight in weights:
            if WORLD > 1 and weight.grad is not None:  # all have one, or none has
                torch.distributed.all_reduce(weight.grad)
        norm = nn.utils.clip_grad_norm_(weights, 1.0)  # tames the odd batch
        if not (loss + norm).isfinite() or step == 1 and norm == 0:
            raise InputError(f"step {step}: the loss is {loss.item()}, its gradient {norm.item()}; "
                             "try a lower --learning-rate, a larger --batch, no division by 0")
        optimizer.param_groups[0]["lr"] = config["learning_rate"] * min(  # a line up, a cosine down
            step / max(1, steps // 10), 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        optimizer.step()
        with torch.no_grad():  # the share of neighbours in time that this batch had in order
            ordered = (cosine(frames, texts[:, None]).diff(dim=1) > 0).float().mean().item()
        log.append({"step": step, "loss": loss.item(), "ordered": ordered})
        bar.set_postfix(loss=f"{loss.item():.3f}", ordered=f"{ordered:.2f}", refresh=False)
        if saved and not RANK and (step % max(1, steps // 10) == 0 or step == steps):
            save_checkpoint(saved, model, optimizer, log, config)
    return log

def save_checkpoint(path: Path, model, optimizer, log: list[dict], config: dict) -> None:
    """Write all that the next step depends on (on a CPU), and the configuration of the run."""
    tensors = trained_weights(model) | {"generator": torch.get_rng_state()}
    for name, weight in model.named_parameters():
        tensors |= {f"{key} {name}": state for key, state in optimizer.state[weight].items()}
    run = json.dumps({"log": log, "config": config, "names": sorted(tensors)})
    write_whole(path, save(tensors, {"run": run}))

def load_checkpoint(path: Path, model, optimizer, config: dict) -> list[dict]:
    """Put model and optimiser where save_checkpoint() left them. Returns the log."""
    with reading(path), safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["run"])
        if header["config"] != config:
            raise ValueError("it belongs to another run")
        tensors = {name: file.get_tensor(name) for name in header["names"]}
        torch.set_rng_state(tensors.pop("generator"))
        for name, weight in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key} {name}" in tensors:  # of a tower that the loss ignores there is none
                    optimizer.state[weight][key] = tensors.pop(f"{key} {name}").to(weight.device)
        put_weights(model, tensors)
        return header["log"]

# 5. The evaluation metrics ------------------------------------------------------------------------
# Does the reward rise while an expert works (VOC)? Does it order frames as the simulator's does
# (ranking accuracy)? Does it read (paraphrases, retrieval, opposites)? A clock gets .8 in ranking
# within episodes, as even a failing arm mostly gets closer; at the SAME time of two it gets .5.
# `predicted` is the model's reward, `true_reward` the simulator's: (E, T), of one task's episodes.

METRICS = {  # name in metrics.json: (what it is, the value of a reward that knows nothing)
    "voc": ("VOC: order of experts' frames", 0.0),
    "voc_paraphrase": ("VOC under unseen paraphrases", 0.0),
    "ranking_accuracy_within": ("ranking accuracy within episodes", 0.5),
    "ranking_accuracy_same_time": ("ranking accuracy at the same time", 0.5),
    "ranking_accuracy_across": ("ranking accuracy across episodes", 0.5),
    "success_auroc": ("success beats failure (AUROC)", 0.5),  # flags are its rewards
    "retrieval_top1": ("the end prefers its own text", 0.02),  # of 50
    "opposite_gap": ("VOC minus VOC of the opposite", 0.0),
}

def value_order_correlation(predicted: np.ndarray) -> np.ndarray:
    """VOC: Spearman correlation of rewards (..., T) with time: (...,). Ties share their rank, a
    constant gets 0. Source: GVL, 2411.04549, and OpenGVL's code."""
    ranks = rankdata(predicted, axis=-1) - (predicted.shape[-1] + 1) / 2
    centred_time = np.arange(predicted.shape[-1]) - (predicted.shape[-1] - 1) / 2
    norm = np.sqrt((ranks**2).sum(-1) * (centred_time**2).sum())
    return np.divide(ranks @ centred_time, norm, out=np.zeros_like(norm), where=norm > 0)

def ranking_accuracy(predicted: np.ndarray, true_reward: np.ndarray, pairs: str = "within",
                     threshold: float = 0.1) -> float:
    """Share of pairs (a frame, a worse one) that are put in the right order; ties count half. Both
    (E, T) -> 0 to 1, NaN without pairs. pairs: "within" an episode, "across" different ones, or at
    the "same_time" of different ones. Worse: by more than the threshold, our choice."""
    episode, frame = np.indices(predicted.shape).reshape(2, -1, 1)  # (E T, 1)
    p, r = predicted.reshape(-1, 1), np.float64(true_reward).reshape(-1, 1)
    worse = (r.T < r - threshold) & ((episode == episode.T) == (pairs == "within"))  # (E T, E T)
    if pairs == "same_time":
        worse &= frame == frame.T
    right = (p > p.T)[worse].sum() + (p == p.T)[worse].sum() / 2
    return right / worse.sum() if worse.any() else math.nan

def reading_metrics(under: np.ndarray, own: int, opposite: int) -> dict[str, float]:
    """Order and reading. under (M + 3, E, T): experts' rewards under M instructions (`own` and
    `opposite` are rows, the same if it has none), 3 paraphrases. Uses value_order_correlation()."""
    ends = under[:-3, :, -1]  # (M, E)
    rank = (ends >= ends[own]).sum(0)  # (E,), 1: the own one, alone
    voc = value_order_correlation(under[[own, opposite, -3, -2, -1]]).mean(1)  # (5,)
    return {"voc": voc[0], "voc_paraphrase": voc[2:].mean(),
            "retrieval_top1": (rank == 1).mean() if len(ends) > 1 else math.nan,
            "opposite_gap": voc[0] - voc[1] if own != opposite else math.nan}  # NaN: no rival

@torch.inference_mode()
def evaluate(model: RewardModel, data: Dataset, sentences: dict, reward=cosine_reward, extra=()):
    """All metrics on the test episodes: average_over_tasks(), "predicted" {an episode's number: its
    rewards}, "sentences" M. extra: texts that reward() wants embedded. Raises InputError."""
    names, tasks = list(sentences), [*dict.fromkeys(data.task[data.split == "test"])][RANK::WORLD]
    texts = model.eval().embed_texts([sentences[name]["instruction"] for name in names])  # (M, D)
    extra = [model.embed_texts(extra).cpu()] if extra else []  # for a reward that takes it
    device, cores, texts = texts.device.type, torch.get_num_threads(), texts.cpu()

    @torch.inference_mode()  # again: it holds for one thread
    def judge(task):
        episodes, own = data.select(split="test", task=task), names.index(task)
        opposite = names.index(sentences[task].get("opposite") or task)
        truth, expert = data.rewards[episodes], data.source[episodes] == "expert"
        frames = model.embed_frames(np.stack([data.frames(e) for e in episodes])).cpu()  # (E, T, D)
        paraphrases = model.embed_texts(sentences[task]["paraphrases"]).cpu()
        under = np.stack([reward(frames, text, *extra) for text in (*texts, *paraphrases)])
        if not np.isfinite(under).all():  # under is (M + 3, E, T)
            raise InputError(f"the reward of {task} is not finite")
        p, scores = under[own], reading_metrics(under[:, expert], own, opposite)
        scores |= {
            "ranking_accuracy_within": ranking_accuracy(p[~expert], truth[~expert]),
            "ranking_accuracy_same_time": ranking_accuracy(p[~expert], truth[~expert], "same_time"),
            "ranking_accuracy_across": ranking_accuracy(p, truth, "across"),
            "success_auroc": ranking_accuracy(p[:, -1:], data.success[episodes, -1:], "across")}
        scores = {metric: score for metric, score in scores.items() if not math.isnan(score)}
        return {task: scores}, dict(zip(episodes.tolist(), p.tolist()))

    # Cores that share one small product often wait: judge tasks side by side, a few cores each.
    workers = {"cpu": min(4, cores), "cuda": 2}.get(device, 1)  # cuda: one unpacks
    pool = ThreadPoolExecutor(workers, "", torch.set_num_threads, (cores // workers,))
    with pool, parametrize.cached():  # W + B A once, not for every part
        found = list(tqdm(pool.map(judge, tasks), "evaluating", len(tasks), leave=False))
    scored, predicted = (dict(sorted(itertools.chain(*(part.items() for part in parts))))
                         for parts in zip(*itertools.chain(*share(found))))
    return average_over_tasks(scored) | {"predicted": predicted, "sentences": len(names)}

def average_over_tasks(tasks: dict[str, dict]) -> dict:
    """{"seen", "unseen": {metric: {value, tasks, interval}}, "tasks"} of {task: {metric: score}}.
    The interval is a bootstrap: 95 % of the means over tasks drawn again with replacement."""
    report = {"seen": {}, "unseen": {}, "tasks": tasks}
    for group, metric in itertools.product(("seen", "unseen"), METRICS):
        if scores := [found[metric] for task, found in tasks.items()
                      if group_of(task) == group and metric in found]:
            drawn = np.random.default_rng(0).choice(scores, (1000, len(scores))).mean(1)
            report[group][metric] = {"value": np.mean(scores), "tasks": len(scores),
                                     "interval": np.quantile(drawn, [0.025, 0.975])}
    return report

# 6. A run: settings in, a folder out (config.json first, metrics.json last) -----------------------

def digest(file: str | None) -> str:
    """SHA-256 of a file, of tiny's own weights if none is named."""
    return hashlib.sha256(Path(file or DATA / "tiny.safetensors").read_bytes()).hexdigest()

def configuration(args: argparse.Namespace) -> dict:
    """What decides the outcome of a run: options, constants, checksums of the files they name."""
    rate, constants = get_objective(args.objective)["TUNED"]
    config = {name: getattr(args, name) for name in (
        "objective seed backbone pretrained lora steps batch data instructions").split()} | {
        # The rates are those of adapters. All weights together want smaller steps.
        "learning_rate": args.learning_rate or rate / (1 if args.lora else 4), "sha256": {},
        "constants": {name: values[0] for name, values in constants.items()}}
    for name in ("objective", "pretrained", "data", "instructions"):
        path = Path(config[name] or DATA / "tiny.safetensors")
        if path.is_file() and (path.suffix or name in ("data", "instructions")):  # or it is a name
            config["sha256"][name] = digest(path)
            config[name] = config[name] and str(path.resolve())
    return json.loads(json.dumps(config, default=str))  # as config.json gives it back

def folder_for(config: dict, root: Path) -> Path:
    """runs/triplet-seed0, or -2, -3, ...: the first that has this run, or is free."""
    for n in itertools.count(1):
        folder = root / f"{Path(config['objective']).stem}-seed{config['seed']}{f'-{n}' * (n > 1)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # nobody else can take it now
            return folder
        if (folder / "config.json").exists() and read_json(folder / "config.json") == config:
            return folder

def prepare_model(config: dict, device: str = "auto") -> RewardModel:
    """The backbone as a run starts from it, in bfloat16 where that is faster. Raises InputError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    device = next(name for name in there if there[name]) if device == "auto" else device
    if not there[device]:
        raise InputError(f"no {device} device here; --device cpu is everywhere")
    torch.manual_seed(config["seed"])  # decides the adapters' start, and random backbones
    model = build_backbone(config["backbone"], config["pretrained"])
    if config["lora"]:
        add_lora(model, config["lora"])
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: float32
    model.low_precision = capabilities.get("avx512_bf16", False) if device == "cpu" else (
        device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return model.to(device)

def load_reward_model(folder: str | Path, device: str = "auto") -> RewardModel:
    """The trained model of a run's folder, ready to score(frames, sentence). Raises InputError."""
    config = read_json(settings := Path(folder, "config.json"))
    with reading(settings):
        if not config["lora"]:
            config["pretrained"] = "none"  # all weights are in the folder
        elif "pretrained" in config["sha256"] and (
                digest(config["pretrained"]) != config["sha256"]["pretrained"]):
            raise ValueError("it adapts other weights than those of its backbone are now")
        model = prepare_model(config, device)
    with reading(weights := Path(folder, "model.safetensors")):
        put_weights(model, load_file(weights))
    return model.eval()

def run(config: dict, folder: Path, device: str = "auto") -> dict:
    """Train and evaluate, or go on with that, in a folder. Returns its metrics.json."""
    if not (settings := folder / "config.json").exists():
        write_whole(settings, config)
    share(None)  # all wait for the file
    with reading(settings):
        print(f"{Path(config['objective']).stem}, seed {config['seed']}: {folder}", flush=True)
        if (folder / "metrics.json").exists():
            return read_json(folder / "metrics.json")
        if config["sha256"] != configuration(argparse.Namespace(**config))["sha256"]:
            raise ValueError("the files that this run was started with have changed")
    began, parts = time.perf_counter(), get_objective(config["objective"])
    data = Dataset(config["data"])
    if not len(data.select(split="test", source="expert")):
        raise InputError(f"{data.path} has no experts to test on: it takes 4 of a task")
    sentences = load_instructions(config["instructions"], data.task)
    model, log = prepare_model(config, device), []
    for entry in sentences.values():
        model.check_sentences([entry["instruction"], *entry["paraphrases"]])
    if parts["loss"]:
        loss = functools.partial(parts["loss"], **config["constants"])
        log = train(model, data, sentences, loss, config, parts["LABELS"],
                    folder / "checkpoint.safetensors")
    report = evaluate(model, data, sentences, parts["reward"], parts["SENTENCES"])
    write_whole(folder / "model.safetensors", save(trained_weights(model)))
    draw_curves(report, data, sentences, folder / "curves.png")
    write_whole(folder / "metrics.json", report | {  # last: a folder that has it is whole
        "torch": torch.__version__, "device": str(model.mean.device), "log": log,
        "wall_seconds": time.perf_counter() - began})
    share(None)  # all of it is there, for all to read
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return read_json(folder / "metrics.json")

def run_all(args: argparse.Namespace) -> None:
    """Every objective asked for, with every seed; then the table of the one run, or of all."""
    names = [name for some in args.objective for name in (OBJECTIVES if some == "all" else [some])]
    configs = [read_json(args.resume / "config.json")] if args.resume else [
        configuration(argparse.Namespace(**vars(args) | {"objective": name, "seed": seed}))
        for name in dict.fromkeys(names) for seed in range(args.seed, args.seed + args.seeds)]
    rows = {}
    for config in configs:
        folder = args.resume or share(None if RANK else folder_for(config, args.runs))[0]
        try:
            report = run(config, folder, args.device)
        finally:
            if not RANK and {*os.listdir(folder)} <= {"config.json", "config.json.unfinished"}:
                shutil.rmtree(folder, ignore_errors=True)  # nothing was begun
        rows.setdefault(config["objective"], []).append(report)
    if len(configs) > 1:
        return compare(rows, args.runs)
    print(f"{'':34}{'seen tasks':>22}{'unseen tasks':>22}{'by chance':>11}")
    for metric, (text, chance) in METRICS.items():
        chance = 1 / report.get("sentences", 50) if metric == "retrieval_top1" else chance
        cells = ["{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**found[metric])
                 if metric in found else "-" for found in (report["seen"], report["unseen"])]
        if cells != ["-", "-"]:
            print(f"{text:34}{cells[0]:>22}{cells[1]:>22}{chance:>11.2f}")
    print(f"[95 % intervals, over tasks]\n{report['wall_seconds']:.0f} s after the imports")

def compare(rows: dict[str, list[dict]], folder: Path) -> None:
    """Print and keep the table and the picture of {objective: [report of each seed]}."""
    columns = list(itertools.product(("voc", "ranking_accuracy_same_time"), ("seen", "unseen")))
    titles, lines = ["mean ± std over seeds"], [[Path(name).stem] for name in rows]
    figure = Figure(figsize=(13, 0.3 * len(rows) + 1), layout="constrained")
    for axis, (metric, group) in zip(figure.subplots(1, len(columns), sharey=True), columns):
        titles.append(f"{METRICS[metric][0]}, {group} tasks")
        for y, reports in enumerate(rows.values()):
            cells = [report[group][metric] for report in reports if metric in report[group]]
            values = [cell["value"] for cell in cells]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            lines[y].append(f"{np.mean(values):.2f}{spread}" if values else "-")
            axis.plot(values, [y] * len(values), "o", color="#30638e")
            for cell in cells:
                axis.plot(cell["interval"], [y, y], color="#c8384e", lw=2, alpha=0.3)
        axis.axvline(METRICS[metric][1], color="0.8", zorder=0)  # chance
        axis.set_title(titles[-1].replace(", ", "\n"), loc="left", fontsize=9)
    axis.set(yticks=range(len(rows)), yticklabels=[row[0] for row in lines], ylim=(len(rows), -1))
    write_whole(folder / "comparison.png", figure)
    table = "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))
    write_whole(folder / "table.md", table.encode())
    print(f"{table}\nThe table and comparison.png are in {folder}")

def draw_videos(videos: list[tuple], path: Path) -> None:
    """A strip and a curve of each (title, frames uint8 (T, H, W, 3), up to two {label: (T,)})."""
    figure = Figure(figsize=(13, 1.9 * len(videos)), layout="constrained")
    axes = figure.subplots(len(videos), 2, squeeze=False, width_ratios=(3, 1))
    for (strip, axis), (title, frames, curves) in zip(axes, videos):
        shown = np.linspace(0, len(frames) - 1, min(8, len(frames))).astype(int)
        strip.imshow(np.concatenate(frames[shown], axis=1), aspect="auto")
        strip.set_axis_off()
        strip.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
        for k, (label, values) in enumerate(curves.items()):
            axis = axis.twinx() if k else axis
            axis.plot(values, color=("#c8384e", "#30638e")[k], marker="o", ms=3)
            axis.set_ylabel(label, color=("#c8384e", "#30638e")[k])
    write_whole(path, figure)

def draw_curves(report: dict, data: Dataset, sentences: dict, path: Path) -> None:
    """An expert, and a failure that shows movement, of a seen and an unseen task each."""
    videos, moved = [], np.ptp(data.rewards, axis=1)
    failed = (data.source == "mixed") & ~data.success.any(1) & ((moved > 1) | (moved == 0))
    for (kind, fits), group in itertools.product(
            (("expert", data.source == "expert"), ("failure", failed)), ("seen", "unseen")):
        some = [e for e in report["predicted"] if fits[e] and group_of(data.task[e]) == group]
        for e in some[len(some) // 2:][:1]:
            title = f"{sentences[data.task[e]]['instruction']} ({kind}, {group} task)"
            known = {"simulator's": data.rewards[e]} if moved[e] else {}  # nobody knows a film's
            curves = {"model's reward": report["predicted"][e]} | known
            videos.append((title, data.frames(e), curves))
    draw_videos(videos, path)

def check_cosine(folder: Path) -> None:
    """Raise InputError if a run's reward is not the cosine, or if its loss reads no sentence."""
    with reading(folder / "config.json"):
        parts = get_objective(read_json(folder / "config.json")["objective"])
    if parts["reward"] != cosine_reward or parts["loss"] and not reads_instruction(parts["loss"]):
        raise InputError(f"{folder} was not trained for the cosine of frame and sentence")

def score(args: argparse.Namespace) -> None:
    """Print and draw the rewards of a film, a picture, or a folder of numbered pictures."""
    check_cosine(args.model)
    model, rewards, shown = load_reward_model(args.model, args.device), [], []
    files = [args.score] if not args.score.is_dir() else sorted(
        args.score.iterdir(), key=lambda file: (len(file.name), file.name))  # 10.png after 9.png
    for file in files:
        with reading(file):
            for frame in imageio.imiter(file):
                if frame.dtype != np.uint8:  # would be clipped
                    raise ValueError(f"its values are {frame.dtype}, not bytes")
                picture = Image.fromarray(frame).convert("RGB")
                rewards.append(model.score(np.asarray(picture)[None], args.instruction).item())
                shown.append(np.asarray(picture.resize((160, 120))))
                print(f"frame {len(rewards) - 1:5}   reward {rewards[-1]:.4f}")
    if not rewards:
        raise InputError(f"{args.score} has no pictures in it")
    video, words = args.score.resolve(), re.sub(r"\W+", "-", args.instruction)[:80]
    path = video.with_name(f"{video.name}-{args.model.resolve().name}-{words}.png")
    draw_videos([(args.instruction, np.stack(shown), {"cos(frame, sentence)": rewards})], path)
    print(f"VOC {value_order_correlation(np.array(rewards)):.2f} (1: rises all along); see {path}")

def main(argv: list[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # what matters is said in one line
    args = parse_arguments(argv)
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.distributed.init_process_group()
    try:
        (collect if args.collect else score if args.score else run_all)(args)
    except (InputError, OSError, BrokenExecutor) as problem:  # OSError: a full disk, say
        time.sleep(2 * bool(RANK))  # torchrun ends all when one ends: let the first say why
        print("vlmrm:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvlmrm: stopped; the same command goes on with a run", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # closed by whoever started us
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
