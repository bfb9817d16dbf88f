"""
Train a vision-language reward model, measure it, and change only its learning objective.

Such a model looks at a picture and a sentence ("open the drawer") and returns a number that should
rise as the task gets done. Ours is the plainest there is: two towers map frame and sentence to unit
vectors, and their cosine is the reward. What it is worth depends on the objective it was trained
with, and that is what this file compares, after "Revisiting the learning objectives of
vision-language reward models" (arXiv 2512.20675): same backbone, same videos, same evaluation.

    python vlmrm.py --objective triplet     train, test, draw: 43 seconds on two CPU cores
    python vlmrm.py --score clip.mp4 --instruction "open the drawer"        use what was trained
    python vlmrm.py --objective all --seeds 3                               the study
    python vlmrm.py --collect --tasks reach-v3 push-v3 --output two.npz     make your own videos
    python vlmrm.py --data two.npz --batch 2                                and train on them
    python vlmrm.py --backbone ViT-B-32-quickgelu --pretrained openai --lora 8 --learning-rate 1e-4
    python vlmrm.py --help                                                  everything else

Expect of triplet (mean ± std of seeds 0, 1, 2; torch 2.15 on two cores of an AMD EPYC):
    VOC (order of an expert's frames, 1 is best)       0.93 ± 0.00 seen tasks, 0.55 ± 0.04 unseen
    ranking accuracy (chance .5)                       0.77 ± 0.01 seen tasks, 0.65 ± 0.02 unseen

In order: 1 data, 2 backbone, 3 objectives, 4 training, 5 metrics, 6 a run, 7 use. What is no part
of the lesson lies in data/: options.py, plumbing.py (messages, files, checkpoints), report.py
(tables, pictures), study.py (many runs: study, tuning, ensembles), score.py (videos).

Notation: cos(a, b) is the cosine and |a - b| the Euclidean distance of two embeddings, o a frame,
l an instruction, l' that of another video, t the share of the episode that has passed, V or r a
reward, L a loss, eps = 1e-8, i and j rows and columns of a matrix. Other letters are explained
where they are used. Shapes: B videos in a batch, K frames of each, D dimensions, E episodes, T
frames of each, S x S pixels, M sentences.

Left out on purpose: a configuration system (argparse is one), a trainer class (it is one loop),
experiment trackers (a run is a folder of five files), data loaders (a batch is drawn in a few ms),
downloads (data and starting weights are in data/).
"""
import time

STARTED = time.perf_counter()  # the wall time of a run counts its imports

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# OpenMP's threads wait for each other by spinning, which beside any other busy process doubles the
# time of a run. Give up after a moment instead: read once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(), Ctrl-C ends without a traceback

import numpy as np

DATA = Path(__file__).resolve().parent / "data"


class InputError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""


@functools.cache
def companion(name: str):
    """The module data/<name>.py, for what is no part of the lesson.

    It may `import vlmrm`: run as a program this file is called __main__, and would be loaded a
    second time, so it gets this name too.
    """
    sys.modules.setdefault("vlmrm", sys.modules[__name__])
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parse_arguments = companion("options").parse_arguments
if __name__ == "__main__":
    parse_arguments()  # answers --help and typing errors before the imports below, which take 4 s

import open_clip  # the CLIP architectures and tokenizers
import torch
import torch.nn.functional as F
from PIL import Image  # WebP, and --score's pictures
from scipy.stats import rankdata
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

plumbing = companion("plumbing")  # messages, files written whole, checkpoints, a run's folder

# -----------------------------------------------------------------------------
# 1. Dataset collection
#
# A reward model learns what "further along" looks like, so it needs videos in which things get
# done. Meta-World comes with a scripted policy for each of its 50 tasks: run it and you have an
# expert. Two kinds of episodes are collected:
#   expert  the scripted policy; only episodes that succeed are kept, cut 5 steps after success.
#           We train on some of them; on the others, time itself says which frame is further.
#   mixed   the same policy with some of its actions replaced by random ones and noise on all, for
#           150 steps: some succeed, most dither, fail or go backwards. Nobody trains on them. Here
#           time says less, and the simulator's own dense reward (0 to 10) says which frame is
#           better.
# Ten tasks are never trained on. Each has a sibling among the other forty (open the drawer, close
# the drawer): they show whether a model reads the instruction or goes by the look of the scene.

UNSEEN_TASKS = (
    "button-press-v3", "coffee-pull-v3", "door-open-v3", "door-unlock-v3", "drawer-open-v3",
    "faucet-open-v3", "handle-pull-side-v3", "plate-slide-back-v3", "push-wall-v3",
    "window-close-v3")


def group_of(task: str) -> str:
    """"unseen" for the ten tasks that nobody trains on, "seen" for the others."""
    return "unseen" if task in UNSEEN_TASKS else "seen"


def load_instructions(path: Path) -> dict[str, dict]:
    """Read the sentences: {task: {"instruction", "paraphrases" (3), "opposite" (some tasks)}}.

    Training only ever sees "instruction". "opposite" names the task that undoes this one.
    Raises InputError when the file is missing or is not such a dictionary.
    """
    try:
        sentences = json.loads(path.read_text(encoding="utf-8"))
        if not sentences:
            raise ValueError("there is no task in it")
        for task, entry in sentences.items():
            texts = [entry["instruction"], *entry["paraphrases"]]
            if len(texts) != 4 or isinstance(entry["paraphrases"], str) or not all(
                    isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{task} needs one instruction and three paraphrases")
            if entry.get("opposite", task) not in sentences:
                raise ValueError(f"the opposite of {task} is no task")
    except FileNotFoundError:
        raise InputError(f"no instructions at {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise InputError(f"cannot use the instructions in {path}: {problem!r:.150}; each task "
                         'needs {"instruction": "...", "paraphrases": ["...", "...", "..."]}'
                         ) from None
    return sentences


# All in the simulator's state that a picture depends on: where things, lights and cameras are.
POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "light_xpos", "light_xdir", "cam_xpos",
         "cam_xmat")


def roll_out(env, policy, rng, steps: int, noise: float, random_share: float):
    """Run one episode. Returns the POSES, the reward and the success flag after every step, as
    three lists. With noise 0 this is the expert, which stops 5 steps after success.

    noise is the standard deviation of the Gaussian noise on each action (actions lie in [-1, 1]),
    random_share the probability that a step's action is first replaced by a uniform one.
    """
    poses, rewards, successes = [], [], []
    observation, _ = env.reset()
    for _ in range(steps):
        action = policy.get_action(observation)
        if rng.random() < random_share:
            action = rng.uniform(-1, 1, size=4)  # x, y, z, gripper
        action = np.clip(action + noise * rng.normal(size=4), -1, 1)
        observation, reward, _, _, info = env.step(action)
        # Rendering costs ten times a simulation step, and which frames we want depends on how long
        # the episode turns out to be: keep the poses (cheap), draw the chosen few afterwards.
        poses.append({name: getattr(env.data, name).copy() for name in POSES})
        rewards.append(reward)
        successes.append(bool(info["success"]))
        if noise == 0 and any(successes[:-5]):
            break
    return poses, rewards, successes


def open_task(task: str, size: int):
    """The simulator of a task, its scripted policy, and a renderer of size x size pictures.

    Without shadows, reflections and multisampling it draws 9 times as fast as env.render() on a
    CPU. One renderer may live per process: a second one, opened while the first is not closed,
    returns stale frames without a word.
    Raises InputError when Meta-World or a graphics library is missing.
    """
    if sys.platform == "linux":  # mujoco reads this once, at import: draw in software by default
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    # "Constant(s) may be too high": Meta-World's policies ask for more than [-1, 1], and we clip.
    warnings.filterwarnings("ignore", message="Constant")
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as policies

        if task not in policies:
            raise plumbing.unknown("task", task, list(policies))
        env = environments[task + "-goal-observable"](seed=0)
        env.model.vis.quality.offsamples = 0  # multisampling; read when the renderer is made
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = size
        renderer = mujoco.Renderer(env.model, size, size)
    except ModuleNotFoundError as problem:
        raise InputError(
            f"--collect needs {problem.name}, which supports Python 3.10 to 3.13: "
            "pip install -r requirements.txt") from None
    except InputError:
        raise
    except Exception as problem:  # graphics libraries fail in many ways
        raise InputError(
            f"cannot render ({plumbing.first_line(problem, 80)}): most often for want of an OpenGL "
            "library. On Debian or Ubuntu run 'apt-get install libosmesa6'; with an NVIDIA GPU set "
            "MUJOCO_GL=egl") from None
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return env, policies[task], renderer


def draw(renderer, data, poses: dict | None = None) -> np.ndarray:
    """A picture of the simulator's state `data`, uint8 (S, S, 3), or of an earlier one, whose poses
    are put back into it."""
    for name, pose in (poses or {}).items():
        getattr(data, name)[:] = pose
    renderer.update_scene(data, camera="corner4")
    # The camera hangs upside down. Turn the picture, which flips BOTH axes: flipping the rows alone
    # looks right, but mirrors the scene, and left becomes right.
    return renderer.render()[::-1, ::-1]


def vary_scene(model, original, rng) -> None:
    """Move the camera by up to 20 cm in each direction, and scale every colour and light by a
    random factor: in a simulator's model, from those of the original one."""
    model.cam_pos[:] = original.cam_pos + rng.uniform(-0.2, 0.2, 3)
    for name in ("mat_rgba", "geom_rgba", "light_diffuse"):
        colours = getattr(original, name)[:, :3]
        getattr(model, name)[:, :3] = colours * rng.uniform(0.5, 1.2, colours.shape)


def encode_frames(frames: np.ndarray) -> bytes:
    """Pack one episode, uint8 (T, S, S, 3), into one WebP: a strip of its frames, top to bottom.

    About 1.2 kB per frame of 96 x 96: 24 times smaller than the pixels, at the price of an error
    of about 4 grey levels of 255 on average, most of it in the grain of the wooden table.
    """
    strip = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(
        strip, "WEBP", quality=70, method=6)
    return strip.getvalue()


def collect_task(job: dict) -> list[dict]:
    """Simulate, render and pack all episodes of one task: the unit of work of one process.

    Raises InputError when the expert succeeds too rarely to give the number asked for.
    """
    task, size = job["task"], job["size"]
    env, policy, renderer = open_task(task, size)
    original, episodes, attempts = copy.copy(env.model), [], 0
    while len(episodes) < job["expert"] + job["mixed"]:
        mixed = len(episodes) >= job["expert"]
        if not mixed and attempts >= 4 * job["expert"]:
            raise InputError(f"{task}: fewer than {job['expert']} successes in {attempts} attempts "
                             "of the scripted expert; ask for fewer --expert episodes")
        # reset(seed=...) is ignored by Meta-World: this is how an episode gets a start of its own.
        seed = 10_000 * job["seed"] + 5_000 * mixed + attempts
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env.seed(seed)
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        if job["vary"]:  # looks alone: what happens is as it is without
            vary_scene(env.model, original, rng.spawn(1)[0])
        poses, rewards, successes = roll_out(
            env, policy(), rng, steps=150 if mixed else 300,
            noise=rng.uniform(0.3, 1.5) if mixed else 0.0,
            random_share=rng.choice([0.0, 0.3, 0.7]) if mixed else 0.0)
        attempts += 1
        if not mixed and not any(successes):
            continue
        steps = np.linspace(0, len(poses) - 1, job["frames"]).round().astype(int)
        frames = np.stack([draw(renderer, env.data, poses[step]) for step in steps])
        # Success may flicker between two frames: a flag covers all steps since the frame before.
        since = np.minimum(np.r_[0, steps[:-1] + 1], steps)
        episodes.append({
            "task": task, "source": "mixed" if mixed else "expert", "seed": seed, "steps": steps,
            "rewards": np.float32(rewards)[steps],
            "success": np.logical_or.reduceat(successes, since), "strip": encode_frames(frames)})
    renderer.close()
    env.close()
    return assign_splits(episodes)


def assign_splits(episodes: list[dict]) -> list[dict]:
    """Give each episode of one task its split, in order of collection (ours, not the paper's).

    Experts: 60 % train, 15 % validation, 25 % test. Mixed: a third validation, the rest test.
    Everything of an unseen task is test.
    """
    for source, train_until, validation_until in (("expert", 0.6, 0.75), ("mixed", 0, 1 / 3)):
        group = [episode for episode in episodes if episode["source"] == source]
        for i, episode in enumerate(group):
            position = i / len(group)
            episode["split"] = ("test" if episode["task"] in UNSEEN_TASKS
                                or position >= validation_until
                                else "train" if position < train_until else "validation")
    return episodes


def collect(args: argparse.Namespace) -> None:
    """Collect episodes of args.tasks in parallel processes and write them to args.output.

    One task is one job, and every random number of an episode comes from its own seed: the file
    is the same to the byte whatever the number of workers. Raises InputError when Meta-World or
    a graphics library is missing.
    """
    known = sorted(load_instructions(args.instructions))
    for task in args.tasks:
        if task not in known:
            raise plumbing.unknown("task", task, known)
    if args.frames * args.size > 16383:
        raise InputError(f"--frames {args.frames} of --size {args.size} do not fit into one WebP "
                         "strip: their product may be 16383 at most")
    if args.output.exists():
        raise InputError(f"{args.output} exists: choose another --output, or remove it")
    args.output.parent.mkdir(parents=True, exist_ok=True)  # or fail now, not when all is rendered
    jobs = [{"task": task} | {key: getattr(args, key) for key in (
        "expert", "mixed", "frames", "size", "seed", "vary")} for task in args.tasks or known]
    episodes = []
    context = multiprocessing.get_context("spawn")  # a forked process inherits a broken GL state
    heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for us, not for the workers
    with context.Pool(min(args.workers, len(jobs))) as pool, \
            plumbing.progress_bar(jobs, desc="collecting", unit="task") as bar:
        signal.signal(signal.SIGINT, heed)
        workers, results = multiprocessing.active_children(), pool.imap(collect_task, jobs)
        for _ in bar:
            while (found := next_result(results)) is None:
                if any(worker.exitcode is not None for worker in workers):
                    raise InputError("a worker died, perhaps for want of memory: take fewer "
                                     "--workers")
            episodes += found
            bar.set_postfix(episodes=len(episodes), refresh=False,
                            end_in_success=sum(episode["success"][-1] for episode in episodes))
    write_dataset(args.output, episodes)
    print(f"wrote {len(episodes)} episodes of {len(jobs)} tasks to {args.output} "
          f"({args.output.stat().st_size / 1e6:.1f} MB)")


EPISODE = ("task", "split", "source", "seed", "rewards", "success", "steps")  # and its strip


def next_result(results) -> list[dict] | None:
    """What the next job of a pool returns, or None if it takes more than a second."""
    try:
        return results.next(timeout=1)
    except multiprocessing.TimeoutError:
        return None


def write_dataset(path: Path, episodes: list[dict]) -> None:
    """Write the episodes as one plain npz: an array per field, the WebP strips end to end.

    An episode is a dictionary, as collect_task() makes them: the fields of EPISODE and its "strip",
    of encode_frames(). Raises InputError if there are none, or they are not alike.
    """
    if not episodes:
        raise InputError(f"there are no episodes to write to {path}")
    try:
        fields = {name: np.array([episode[name] for episode in episodes]) for name in EPISODE}
        strips = [episode["strip"] for episode in episodes]
    except (KeyError, ValueError) as problem:
        raise InputError(f"the episodes are not whole, or not alike: {problem!r}") from None
    fields["steps"] = fields["steps"].astype(
        np.int16 if fields["steps"].max() < 2**15 else np.int32)
    fields["offsets"] = np.cumsum([0, *map(len, strips)])
    fields["strips"] = np.frombuffer(b"".join(strips), np.uint8)
    with plumbing.whole_file(Path(path)) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **fields)  # uncompressed: Dataset reads single episodes from the middle


class Dataset:
    """The episodes of one npz file: E episodes of T frames, S x S pixels each.

    task, split, source, seed   (E,) names, "train"/"validation"/"test", "expert"/"mixed", integer
    rewards, success, steps     (E, T) simulator's reward (0 to 10), success flag, step index
    Pictures stay in the file until they are asked for: it may be larger than memory.
    Raises InputError when the file is missing, damaged or not of this form.
    """

    BUFFER = 256_000_000  # bytes

    def __init__(self, path: Path):
        self.path = path
        try:
            self.start, self.length = plumbing.find_strips(path)
            with np.load(path, allow_pickle=False) as file:  # a pickle could run any code
                for name in (*EPISODE, "offsets"):
                    setattr(self, name, file[name])
            self.E, self.T = self.rewards.shape
            plumbing.check_dataset(self)
            height, self.S = self.strip(0).shape[:2]
            if height != self.T * self.S:
                raise ValueError(f"an episode of {self.T} frames has {height} x {self.S} pixels")
        except FileNotFoundError:
            raise InputError(f"no data set at {path}: make one with --collect "
                             f"--output {path}") from None
        except Exception as problem:  # damage surfaces in zip, numpy, Python's tokenizer or WebP
            raise InputError(f"{path} is not a data set of this program: "
                             f"{plumbing.first_line(problem, 150)}") from None
        # Unpacking an episode takes 2 ms, so those that frames() gave last stay unpacked: all that
        # training needs of the default data, and a bound for any other.
        episodes = self.BUFFER // (3 * self.T * self.S**2)
        self.frames = functools.lru_cache(maxsize=episodes)(self.unpack)

    def episode(self, number: int) -> dict:
        """One episode as write_dataset() takes it: to select some, or to join data sets."""
        return {name: getattr(self, name)[number] for name in EPISODE} | {
            "strip": self.packed(number)}

    def packed(self, episode: int) -> bytes:
        """The WebP of one episode, as it lies in the file."""
        first, last = (int(offset) for offset in self.offsets[episode:episode + 2])
        with open(self.path, "rb") as file:
            file.seek(self.start + first)
            return file.read(last - first)

    def strip(self, episode: int) -> np.ndarray:
        """The frames of one episode, one beneath the other: uint8 (T * S, S, 3)."""
        with Image.open(io.BytesIO(self.packed(episode)), formats=["WEBP"]) as picture:
            return np.asarray(picture.convert("RGB"))

    def unpack(self, episode: int) -> np.ndarray:
        """The frames of one episode, uint8 (T, S, S, 3). Raises InputError if it is damaged."""
        if not 0 <= episode < self.E:
            raise InputError(f"{self.path} has the episodes 0 to {self.E - 1}, not {episode}")
        try:
            return self.strip(episode).reshape(self.T, self.S, self.S, 3)
        except (OSError, ValueError) as problem:
            raise InputError(f"episode {episode} of {self.path} is damaged: {problem}") from None

    def load(self, episodes, every: int = 1) -> torch.Tensor:
        """Every n-th frame of some episodes, unpacked by all cores: uint8 (len(episodes),
        ceil(T / every), S, S, 3)."""
        frames = np.empty((len(episodes), -(-self.T // every), self.S, self.S, 3), np.uint8)

        def put(place):
            frames[place] = self.unpack(episodes[place])[::every]

        with ThreadPoolExecutor() as threads:
            list(threads.map(put, range(len(episodes))))  # a list, or errors would go unseen
        return torch.from_numpy(frames)

    def select(self, **wanted) -> np.ndarray:
        """Indices of the episodes that match: select(split="test", source="expert")."""
        keep = np.ones(self.E, bool)
        for field, value in wanted.items():
            keep &= getattr(self, field) == value
        return np.flatnonzero(keep)


# -----------------------------------------------------------------------------
# 2. The CLIP backbone
#
# CLIP is two towers: one maps a picture to a vector, the other a sentence, and both land in the
# same space. The reward of a frame is the cosine between its vector and the instruction's. That
# is the whole reward model; an objective only decides where the vectors go. All vectors have unit
# length: then cosine, dot product and distance say the same (|a - b|^2 = 2 - 2 cos(a, b)), and no
# objective can win by scale.

# Ours, not the paper's (which fine-tunes SigLIP2): small enough to train while you watch. On
# validation, towers three times as costly were no better, and three text layers no better than
# one layer, with which a sentence is little more than a bag of words. The weights in data/ come
# from `--objective clip` on the seen tasks, from random ones.
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4,
                   "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 4096, "width": 128, "heads": 2, "layers": 1},
}


def tiny_tokenizer():
    """CLIP's own tokenizer, cut to its 3,582 most frequent merges, for a vocabulary of 4,096.

    Byte-pair merges are ranked by frequency, so the first few make a smaller tokenizer of the
    same kind: frequent words stay whole, rare ones fall into more pieces.
    """
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
        self.clip, self.tokenizer = clip, tokenizer
        size = clip.visual.image_size
        self.size = size[0] if isinstance(size, (tuple, list)) else size
        mean = getattr(clip.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        std = getattr(clip.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        # Published for pixels from 0 to 1; ours are bytes, 0 to 255.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        self.low_precision = False  # set by to_device() where the hardware gains from it

    def encode(self, tower, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of a tower as unit vectors, float32, whatever precision the tower ran in."""
        device = self.mean.device.type
        # On a CPU plain attention trains faster than the fused kernel, made for longer sequences.
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=self.low_precision), attention:
            features = tower(inputs)
        return F.normalize(features.float(), dim=-1)

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

    def check_length(self, sentences: list[str]) -> None:
        """Raise InputError if a sentence is longer than the backbone reads: CLIP's tokenizer cuts
        it without a word. (Other tokenizers do not tell a sentence's length.)"""
        limit = self.clip.context_length - 2  # without the marks of start and end
        for sentence in sentences if hasattr(self.tokenizer, "encode") else ():
            if (n := len(self.tokenizer.encode(sentence))) > limit:
                raise InputError(f"{sentence[:40]!r} has {n} word pieces, and this backbone reads "
                                 f"{limit}: shorten it")

    @torch.inference_mode()
    def score(self, frames: np.ndarray, instruction: str) -> np.ndarray:
        """Rewards of uint8 frames (N, H, W, 3) of any size, for one sentence: float32 (N,).

        The reward is the cosine of frame and sentence, in [-1, 1]: compare frames under one
        sentence, not sentences under one frame. Raises InputError for other frames, and for a
        sentence that is empty or longer than the backbone reads.
        """
        frames = np.ascontiguousarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise InputError("frames must be uint8 (N, H, W, 3), red green blue, 0 to 255; these "
                             f"are {frames.dtype} {frames.shape}")
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError("the instruction must be one sentence, and not empty")
        self.check_length([instruction])
        text = self.embed_texts([instruction])[0]  # (D,)
        parts = [self.embed_frames(torch.tensor(frames[i:i + 256])) @ text
                 for i in range(0, len(frames), 256)]
        return torch.cat(parts).cpu().numpy()


class Thumbnail(nn.Module):
    """A control in place of tiny's vision tower: one linear map of a 12 x 12 thumbnail.

    What it can do takes no understanding of pictures: where things are in the picture is enough. On
    our data that is as much as tiny can do; see the README before you trust a score on it.
    """

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3 * 12 * 12, TINY["embed_dim"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.map(F.adaptive_avg_pool2d(pixels, 12).flatten(1))  # (N, D)


def build_backbone(name: str, pretrained: str | None) -> RewardModel:
    """Build `tiny`, `thumbnail` (tiny with a Thumbnail for an image tower) or any open_clip model.
    `pretrained` is a tag, a checkpoint path or "none".

    Without it tiny gets its own weights, and any other model is refused: random weights are never a
    silent choice. Raises InputError for an unknown model or tag, or when weights cannot be had.
    """
    if name in ("tiny", "thumbnail"):
        clip, tokenizer = open_clip.CLIP(**TINY), tiny_tokenizer()
        clip.visual.image_mean = clip.visual.image_std = (0.5, 0.5, 0.5)
        model = RewardModel(clip, tokenizer)
        pretrained = pretrained or str(DATA / "tiny.safetensors")
        if pretrained != "none":
            plumbing.load_weights(model, Path(pretrained))
        if name == "thumbnail":
            clip.visual = Thumbnail()
        return model
    if name not in open_clip.list_models():
        raise plumbing.unknown("backbone", name, ["tiny", "thumbnail", *open_clip.list_models()])
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in ["none", *tags] or Path(pretrained).is_file()):
        given = f"has no weights {pretrained!r}" if pretrained else "needs --pretrained"
        raise InputError(f"{name} {given}: give a checkpoint file, "
                         f"'none' for random weights, or one of {', '.join(tags) or 'no tag'}")
    logging.disable(logging.ERROR)  # open_clip logs at length what we say in one line
    try:
        clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
        if tags and pretrained not in tags:  # neither a file nor "none" says how to normalise
            published = open_clip.get_pretrained_cfg(name, tags[0])
            clip.visual.image_mean, clip.visual.image_std = (
                published.get("mean"), published.get("std"))
        return RewardModel(clip, open_clip.get_tokenizer(name))
    except ImportError as problem:
        raise InputError(f"{name} needs another package: {problem}") from None
    except Exception as problem:  # hubs fail in as many ways as there are network libraries
        raise InputError(f"cannot load {name} / {pretrained}: {plumbing.first_line(problem, 120)}. "
                         "Without a network, download the checkpoint elsewhere; --pretrained takes "
                         "its path") from None
    finally:
        logging.disable(logging.NOTSET)


class LoRA(nn.Module):
    """Low-rank adapter of a weight matrix: W + B A, with only A and B trained.

    B starts at zero, so training starts at the pretrained model. Source: Hu et al., 2106.09685.
    Differs: no dropout, and no factor alpha / rank, which the learning rate can stand in for.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.B @ self.A


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model and put an adapter on every linear layer of both towers.

    nn.MultiheadAttention keeps queries, keys and values in one packed matrix, which is no layer
    of its own: parametrising the weight, rather than wrapping the layer, covers it too. Patch
    convolution, embeddings, norms and a last projection that is a bare matrix (CLIP's) stay frozen.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        packed = isinstance(module, nn.MultiheadAttention)
        if packed or isinstance(module, nn.Linear):
            name = "in_proj_weight" if packed else "weight"
            weight = getattr(module, name)
            parametrize.register_parametrization(module, name, LoRA(weight, rank).to(weight.device))


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into the matrix it adapts: same outputs, no adapters, no extra cost."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


# -----------------------------------------------------------------------------
# 3. The learning objectives
#
# An objective says which of these vectors should be closer than they are, and which farther apart.
# There are four ideas, and mixtures of them:
#
#     order in a video        a later frame beats an earlier      triplet, preference, vlc, r3m
#     progress as a number    reward is the time that has passed  progress
#     videos and sentences    the right pair beats wrong ones     clip, decisionnce, vlc, liv, r3m
#     distance in time        near is near, or steps to a goal    tcn, r3m, vip, liv, hilp
#
# All but clip, tcn and preference-oracle assume that an expert's later frame is the better one.
# Every objective sees the same batch: B videos of B different tasks, so that no sentence fits two
# of them, and of each K = 5 frames,
#
#     frames  (B, K, D)   unit vectors of start < now < next = now + 1 < later < end
#     texts   (B, D)      unit vector of the instruction of each video
#     times   (B, K)      share of the episode that has passed at each frame, 0 to 1 (for
#                         preference-oracle the simulator's reward)
#
# and returns one number. It is free to ignore what it has no use for. (Our batches have unit
# vectors; where a loss normalises them again, it is for official test values on others.) In
# equations the frames have these names, og being the goal:
#
#     start   now   next   later   end
#     o0      o     o'             og      VIP, LIV, HILP
#             s0           s1      s2      TCN, R3M
#
# eps = 1e-8 keeps logarithms finite. CE(M) is the mean over rows i of -log softmax(M_i)_i. Means
# are over the batch unless the equation says otherwise. "Here" are the figures of data/results
# (mean of three seeds, tuned constants): VOC, how well the reward orders an expert's frames
# (section 5), on seen and on unseen tasks, and how often the end of a video of a seen task prefers
# its own instruction among all 50 (before fine-tuning .80).
#
# The constants in the signatures are the official ones. With them TCN, R3M, VIP, LIV and
# DecisionNCE return, value and gradient, what the authors' code returns, VLC what a transcription
# of it does, HILP's core and the goal baseline the value (the tests compare with data/golden/,
# whose batches have, for R3M and LIV, a sixth frame and videos without a text, which ours never
# have). Where the official codes contrast with other videos, they draw random permutations of the
# batch, which now and then pair a video with itself. Our batches come in random order, so we shift
# them by 1, 2, 3 places: as random, never itself, and the loss stays a pure function.

LOG_EPS = math.log(1e-8)  # -18.4


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cos(a, b) over the last dimension; the others broadcast."""
    return F.cosine_similarity(a, b, dim=-1)


def negative_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """-|a - b| over the last dimension (not squared): the similarity of R3M and VIP."""
    return -torch.linalg.vector_norm(a - b, dim=-1)


def shifts(n: int, batch: int) -> torch.Tensor:
    """Up to n permutations of a batch without fixed points, by 1, 2, ... places: (n, B)."""
    return (torch.arange(batch) + torch.arange(1, min(n, batch - 1) + 1)[:, None]) % batch


def triplet_loss(frames, texts, times, margin: float = 0.1) -> torch.Tensor:
    """Triplet: of two frames, the later one is closer to the instruction, by a margin.

        L = mean over pairs early < late of max(0, margin - cos(late, l) + cos(early, l))

    Anchor: the instruction; positive: the later frame; negative: the earlier one. A reward that
    rises with time, and nothing else: no other video, no other sentence ever enters, so that
    nothing ties a sentence to its task, and the model forgets which is which.
    Here: VOC 0.93 seen, 0.55 unseen; retrieval 0.12.
    Source: the baseline of 2512.20675, whose exact form we have not seen; this, with all ten pairs
    of the five frames and this margin, is ours.
    """
    reward = cosine(frames, texts[:, None])  # (B, K)
    early, late = torch.triu_indices(frames.shape[1], frames.shape[1], offset=1)
    return F.relu(margin - reward[:, late] + reward[:, early]).mean()


def preference_loss(frames, texts, times, scale: float = 1.0) -> torch.Tensor:
    """Preference: of two frames, the better one is better with a probability that grows with the
    difference of rewards (Bradley-Terry).

        L = mean over pairs of -log sigmoid(scale (cos(better, l) - cos(worse, l)))

    Triplet with a soft margin: a pair never stops pulling. In `preference` later is better; in
    `preference-oracle` the training loop hands over the simulator's reward as `times`, and ties are
    dropped: privileged labels, on the same expert frames, so not a peer of the others. Forgets the
    tasks as triplet does. Here: VOC 0.93 seen, 0.53 unseen; retrieval 0.08.
    Source: RL-VLM-F, Wang et al., 2402.03681, reward_model.py. Differs: there a VLM labels pairs of
    any two frames, and a CNN without language learns from them; both rewards lie in (-1, 1).
    """
    reward = scale * cosine(frames, texts[:, None])  # (B, K)
    better = times[:, :, None] > times[:, None]  # (B, K, K)
    lead = reward[:, :, None] - reward[:, None]
    return (better * F.softplus(-lead)).sum() / better.sum().clamp(min=1)


def progress_loss(frames, texts, times, scale: float = 10.0) -> torch.Tensor:
    """Progress: the reward is the share of the episode that has passed; under a wrong instruction
    there is no progress.

        p = sigmoid(scale cos(o, l));  L = 1/2 mean [ (p(o, l) - t)^2 + (p(o, l') - 0)^2 ]

    Triplet only orders frames; this also says how far along each is, straight from the clock. It
    assumes that progress is even in time: a pause, or a slow start, costs. As in ReWiND the clip is
    continued by its own rewinding, with the targets it had on the way up: to a model of single
    frames this shows no new pair, only the middle twice.
    Here: VOC 0.76 seen, 0.48 unseen; retrieval 0.67.
    Source: ReWiND, Zhang et al., 2505.10911; SARM, 2509.25358. Differs: no network over time, the
    sigmoid of a scaled cosine instead of a head. There is no official form for single frames: we
    chose the scale.
    """
    frames = torch.cat([frames, frames[:, :-1].flip(1)], dim=1)[:, 1:]  # (B, 2 K - 2, D)
    times = torch.cat([times, times[:, :-1].flip(1)], dim=1)[:, 1:]
    sentences = torch.stack([texts, *texts[shifts(1, len(texts))]])  # (2, B, D): own and wrong
    targets = torch.stack([times, torch.zeros_like(times)])[:len(sentences)]
    return F.mse_loss(torch.sigmoid(scale * cosine(frames, sentences[:, :, None])), targets)


def matching_loss(scores: torch.Tensor) -> torch.Tensor:
    """1/2 [CE(M) + CE(M^T)]: in scores M (..., B, B) each row and column finds its diagonal."""
    rows, columns = (-scores.log_softmax(dim).diagonal(dim1=-2, dim2=-1) for dim in (-1, -2))
    return (rows + columns).mean() / 2


def clip_loss(frames, texts, times, scale: float = 1 / 0.07) -> torch.Tensor:
    """CLIP: a frame and its own instruction find each other among all pairs of the batch.

        L = matching_loss(M) averaged over the frames of a video, M_ij = scale cos(o_i, l_j)

    Knows nothing of time: start and end fit the sentence alike, so it orders nothing, and tells
    tasks apart best of all. It also made the starting weights of `tiny`.
    Here: VOC 0.00 seen, -0.14 unseen; retrieval 0.84.
    Source: Radford et al., 2103.00020. Differs: CLIP learns the scale; ours is where it starts.
    """
    return matching_loss(scale * cosine(frames.transpose(0, 1)[:, :, None], texts))  # of (K, B, B)


def decisionnce_p_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-P: the progress made in a video finds the instruction it was made under.

        R_ij = scale [ sum_late cos(o, l_j) - sum_early cos(o, l_j) ] over the frames of video i,
        L = matching_loss(R)

    The reward has to rise more under its own instruction than under others: how a scene looks
    cancels, so nothing is gained by telling tasks apart by their furniture. A rise common to all
    videos and sentences cancels too: unlike triplet's, this reward may fall, if only less than that
    of wrong pairs.
    Assumes that the sentences of a batch ask for different changes.
    Here: VOC 0.86 seen, 0.44 unseen; retrieval 0.72.
    Source: Li et al., 2402.18137, losses.py. Differs: two late and two early frames instead of one
    (the code allows both); the middle one of five is left out.
    """
    rewards = cosine(frames[:, None], texts[:, None])  # (B videos, B texts, K)
    half = frames.shape[1] // 2
    return matching_loss(scale * (rewards[..., -half:].sum(-1) - rewards[..., :half].sum(-1)))


def decisionnce_t_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-T: the direction in which a video moves points along its instruction.

        R_ij = scale sum over steps a -> b of video i of (b - a) / (|b - a| + 1e-6) . l_j
        L = matching_loss(R)

    Assumes that a task is one direction. The length of a step is divided away: one in which little
    happens counts as much as one that gets the task done, and two nearly equal frames give a random
    direction. Here: VOC 0.90 seen, 0.51 unseen; retrieval 0.12.
    Source: Li et al., 2402.18137, losses.py. Differs: three steps instead of one (the code allows
    both); the middle one of five frames is left out, being too close to its neighbour.
    """
    half = frames.shape[1] // 2
    steps = torch.cat([frames[:, :half], frames[:, -half:]], dim=1).diff(dim=1)  # (B, 3, D)
    directions = steps / (torch.linalg.vector_norm(steps, dim=-1, keepdim=True) + 1e-6)
    return matching_loss(scale * directions.sum(1) @ F.normalize(texts, dim=-1).T)


def vlc_loss(frames, texts, times, scale: float = 1.0, margin: float = 0.0,
             rank_weight: float = 33.0) -> torch.Tensor:
    """VLC, the video-language critic: the score rises from frame to frame, and the end of a video
    finds its instruction.

        S_ijk = scale cos(frame k of video j, l_i)
        L = rank_weight mean max(0, S_iik - S_ii(k+1) + margin) + matching_loss(S at the end)

    A triplet of neighbours, and CLIP on the last frame to remember which task is which. At margin 0
    a flat reward costs nothing. What makes it rise is the CLIP term, which pulls up the end alone;
    the hinge only forbids that a frame is above the one after it.
    Here: VOC 0.87 seen, 0.46 unseen; retrieval 0.66.
    Source: Alakuijala et al., 2405.19988, modules/until_module.py. Differs: S is a transformer
    over the video so far; ours looks at single frames, and its scores spread less, which the
    scale can mend. No failed videos in the batch.
    """
    scores = scale * cosine(frames, texts[:, None, None])  # (B texts, B videos, K)
    own = scores.diagonal().mT  # (B, K)
    falls = F.relu(own[:, :-1] - own[:, 1:] + margin)
    return rank_weight * falls.mean() + matching_loss(scores[..., -1])


def softmax_loss(positive: torch.Tensor, negatives: list[torch.Tensor]) -> torch.Tensor:
    """-log(eps + p) with p = exp(pos) / (eps + exp(pos) + sum exp(neg)), elementwise: (B,).

    Adding eps to the denominator is adding log eps as one more logit: no exp() ever overflows.
    """
    floor = torch.full_like(positive, LOG_EPS)
    log_p = positive - torch.logsumexp(torch.stack([positive, *negatives, floor]), dim=0)
    return -torch.logaddexp(log_p, floor)


def tcn_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3) -> torch.Tensor:
    """TCN, time-contrastive: frames close in time are close, far in time far, other videos far.

        L = 1/2 mean [ -log p(s2, s1) - log p(s1, s0) ],  p of softmax_loss() over the similarities
        -|a - b| / temperature, where the pair (s2, s1) competes with (s2, s0) and (s2, s2 of other
        videos), the pair (s1, s0) with (s2, s0) and (s0, s0 of other videos)

    Ignores the instruction: the image tower moves, the text tower does not, and what becomes of
    their cosine is left to chance. Its own reward is minus the distance to an image of the goal.
    Here: VOC 0.18 seen, -0.01 unseen; retrieval 0.56. By goal images 0.48 unseen.
    Source: Sermanet et al., 1704.06888, in the softmax form of R3M's code (r3m/trainer.py), the
    likeliest meaning of "TCN" in a comparison of reward models. Differs: there the three are any
    s0 < s1 <= s2, here s2 is the end.
    """
    _, s0, _, s1, s2 = frames[:, :5].unbind(1)

    def similarity(a, b):
        return negative_distance(a, b) / temperature  # (B,)

    others_0 = [similarity(s0, s0[perm]) for perm in shifts(negatives, len(frames))]
    others_2 = [similarity(s2, s2[perm]) for perm in shifts(negatives, len(frames))]
    late = softmax_loss(similarity(s2, s1), [similarity(s2, s0), *others_2])
    early = softmax_loss(similarity(s1, s0), [similarity(s2, s0), *others_0])
    return (late + early).mean() / 2


def norm_penalty(frames: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """l1 mean |x|_1 + l2 mean |x|_2 over all embeddings; with unit norm the l2 part is constant."""
    return (l1 * frames.abs().sum(-1) + l2 * torch.linalg.vector_norm(frames, dim=-1)).mean()


def r3m_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3,
             l1: float = 1e-5, l2: float = 1e-5) -> torch.Tensor:
    """R3M: TCN, and a score G(o, l) of progress under the instruction that grows with time.

        L = L_tcn + mean 1/3 sum_(pos, neg) -log p(pos) + l1 |x|_1 + l2 |x|_2,  where G(pos, l)
        competes with G(neg, l) and, under the SAME sentence, with G(pos, l) of other videos' pos;
        (pos, neg) = (end, start), (s1, s0), (s2, s1);  G = cos / temperature

    A later frame wins against an earlier one, the right video against the wrong one: a reward must
    tell both, and it remembers its tasks. With unit vectors and no temperature the softmax is
    nearly flat: small gradients. Here: VOC 0.86 seen, 0.45 unseen; retrieval 0.75.
    Source: Nair et al., 2203.12601, r3m/trainer.py. Differs: the official head is an MLP over the
    first frame, this one and frozen DistilBERT; ours is the cosine, the reward that is tested; and
    s2 = end, unless a sixth frame is the end. A text of zeros is none.
    """
    start, s0, _, s1, s2 = frames[:, :5].unbind(1)
    end = frames[:, -1]
    language = 0
    for positive, negative in ((end, start), (s1, s0), (s2, s1)):
        rivals = [negative, *(positive[perm] for perm in shifts(negatives, len(frames)))]
        language = language + softmax_loss(
            cosine(positive, texts) / temperature,
            [cosine(rival, texts) / temperature for rival in rivals]) / 3
    has_text = texts.any(dim=-1)  # (B,)
    tcn = tcn_loss(frames, texts, times, temperature, negatives)
    used = torch.stack([start, s0, s1, s2, end])
    return tcn + (has_text * language).mean() + norm_penalty(used, l1, l2)


def value_loss(value, start, now, next_, goal, gamma: float, perms: torch.Tensor) -> torch.Tensor:
    """The core of VIP and LIV: learn from videos alone a value V(o; goal), which should be
    the number of steps to the goal, discounted and negative.

        L = (1 - gamma) mean -V(o0; og) + log(eps + mean exp(1 + V(o; og) - gamma V(o'; og)))
            [ + the same second term over other videos' (o, o') under this goal ]

    Each step costs 1, so V(o) = -1 + gamma V(o') for whoever walks straight to the goal. The first
    term pulls the start towards the goal; the second punishes V(o) > -1 + gamma V(o'), the worst
    steps most. Nothing punishes V(o) < ..., so V need not end as a count. Frames (B, D), perms (m,
    B).
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

        V(o; og) = -scale |o - og|;  L = value_loss(V) + l1 |x|_1 + l2 |x|_2

    Ignores the instruction: its own reward needs an image of the goal. Each log can be lowered by
    driving intermediate frames away from the goal, down to log eps; only the length of the vectors
    stops it. With unit vectors and scale 1, V lies in [-2, 0], while a goal 23 frames away should
    get -(1 - .98^23) / .02 = -18.6: the scale is ours.
    Here: VOC -0.14 seen, -0.35 unseen; retrieval 0.07. By goal images 0.61 unseen.
    Source: Ma et al., 2210.00030, vip/trainer.py and the released Ego4D constants. Differs: the
    goal is the end of the episode rather than of a random part of it.
    """
    start, now, next_, _, goal = frames.unbind(1)

    def value(a, b):
        return scale * negative_distance(a, b)

    return (value_loss(value, start, now, next_, goal, gamma, shifts(negatives, len(frames)))
            + norm_penalty(torch.stack([start, goal, now, next_]), l1, l2))


def liv_loss(frames, texts, times, temperature: float = 1.0, gamma: float = 0.98,
             language_weight: float = 0.0, negatives: int = 0) -> torch.Tensor:
    """LIV: VIP and CLIP in one space, so that an instruction could stand where the goal image does.

        V(o; og) = cos(o, og) / (1 - gamma);  M_ij = cos(og_i, l_j) / temperature
        L = matching_loss(M) + value_loss(V; goal og) + w_lang value_loss(V; goal l)

    The division makes room for V to count steps; at the goal V is 50 and not 0, an offset that
    shifts 1 + V - gamma V' by a constant 1. With the official w_lang = 0 a sentence meets the
    end of its video in the CLIP term, and no frame before it: what orders those is the goal image.
    The CLIP term has logit scale 1, nearly flat on cosines: 40 instructions start at log 40 = 3.69,
    and end at best at log(1 + 39 exp(-40/39)) = 2.71.
    Here: VOC 0.58 seen, 0.17 unseen; retrieval 0.55.
    Source: Ma et al., 2306.00958, liv/trainer.py with the constants of its finetune.yaml (where
    w_lang = 0 and negatives = 0). The frame that meets the instruction is the end: the last of
    `frames`, a sixth if there is one. Differs: only in the batch.
    """
    start, now, next_, _, goal = frames[:, :5].unbind(1)

    def value(a, b):
        return cosine(a, b) / (1 - gamma)

    loss = matching_loss(cosine(frames[:, None, -1], texts) / temperature)
    for target, weight in ((goal, 1.0), (texts, language_weight)):
        if weight:
            loss = loss + weight * value_loss(
                value, start, now, next_, target, gamma, shifts(negatives, len(frames)))
    return loss


def expectile_loss(value, target, next_target, success, gamma, expectile) -> torch.Tensor:
    """The core of HILP: V(o; g) moves to -1 + gamma V(o'; g), faster up than down.

        L = sum_i mean w (q_i - V_i)^2,  q_i = r + gamma (1 - success) V_i(o'; g),  r = success - 1,
        w = expectile if min_i q_i >= mean_i V_i(o; g), else 1 - expectile

    An expectile near 1 is almost a maximum: V becomes the length of the shortest way seen. value,
    target, next_target (n, B): V_i(o; g) of n networks, and V_i(o; g), V_i(o'; g) without
    gradient. success (B,): 1 where o is the goal.
    """
    rewards, goes_on = success - 1, gamma * (1 - success)
    advantage = rewards + goes_on * next_target.min(0).values - target.mean(0)  # (B,)
    weight = torch.where(advantage >= 0, expectile, 1 - expectile)
    return (weight * (rewards + goes_on * next_target - value) ** 2).mean(-1).sum()


def hilp_loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.99,
              expectile: float = 0.95) -> torch.Tensor:
    """HILP: the distance between two frames is the number of steps from one to the other.

        V(o; g) = -scale |o - g|;  L = expectile_loss(V) over the goals o', later, og, and the og of
        another video

    Ignores the instruction. Where VIP makes V rise along the video, HILP fits it to a count of
    steps, by temporal differences, and assumes that the shortest way seen is the right one. As in
    VIP, unit vectors can only be 2 apart, and the scale is ours. Frames of other videos are goals
    that are never reached: they keep videos apart.
    Here: VOC 0.05 seen, -0.24 unseen; retrieval 0.16. By goal images 0.56 unseen.
    Source: Park et al., 2402.15567, hilp_gcrl/src/agents/hilp.py. Differs: one network instead of
    two; its own output, detached, instead of a slow copy; goals from five frames.
    """
    _, now, next_, later, end = frames.unbind(1)
    goals = torch.stack([next_, later, end, *end[shifts(1, len(frames))]])  # (4, B, D)

    def value(state):
        squared = (state - goals).square().sum(-1).clamp(min=1e-6)
        return -scale * squared.sqrt().flatten()[None]  # (1, 4 B): one network

    v = value(now)
    return expectile_loss(v, v.detach(), value(next_).detach(), torch.zeros_like(v[0]),
                          gamma, expectile)


def instruction_as_goal(loss):
    """The language version of an objective that ignores language: the instruction takes the place
    of the last frame, which is the goal of VIP and HILP, and the latest of TCN's three. Where those
    contrast ends of videos, this contrasts sentences. VOC on unseen tasks: tcn-text and vip-text do
    about as well as R3M, hilp-text does not. This is our own idea."""
    def with_instruction(frames, texts, times, **constants):
        return loss(torch.cat([frames[:, :-1], texts[:, None]], dim=1), texts, times, **constants)
    return with_instruction


def goal_baseline_reward(frames, goal, baseline, alpha: float = 0.5) -> torch.Tensor:
    """VLM-RM: no training; part of what does not point from a baseline to the goal is ignored.

        d = g - b;  r = 1 - 1/2 |P (o - g)|^2,  P = alpha d d^T / |d|^2 + (1 - alpha) I

    g and b embed the instruction and a sentence about the scene before anything is done ("a robot
    arm over a table"), o is the frame, of unit norm; all (..., D), they broadcast. alpha = 0 gives
    the cosine, alpha = 1 counts movement along d alone; beyond the goal r falls again.
    Assumes that the two sentences differ by what the task changes: on a backbone that knows no
    order it finds none. Source: Rocamonde et al., 2310.12921, src/vlmrm/reward_model.py. The only
    difference: if the two sentences are equal, this is a number and not NaN.
    """
    direction, offset = goal - baseline, F.normalize(frames, dim=-1) - goal
    along = (offset * direction).sum(-1) ** 2 / direction.square().sum(-1).clamp(min=1e-12)
    across = offset.square().sum(-1) - along
    return 1 - (along + (1 - alpha) ** 2 * across) / 2


# To add an objective, write its function and name it here and in the help of data/options.py.
OBJECTIVES = {
    "zeroshot": None,  # the backbone before fine-tuning; tiny has been warmed up with clip
    "goal-baseline": None,  # the same, with goal_baseline_reward()
    "clock": None,  # a control: the reward is the time that has passed
    "moved": None,  # a control: the reward is the distance from the first frame
    "triplet": triplet_loss,
    "preference": preference_loss,
    "preference-oracle": preference_loss,
    "progress": progress_loss,
    "clip": clip_loss,
    "decisionnce-p": decisionnce_p_loss,
    "decisionnce-t": decisionnce_t_loss,
    "vlc": vlc_loss,
    "tcn": tcn_loss,
    "tcn-text": instruction_as_goal(tcn_loss),
    "r3m": r3m_loss,
    "vip": vip_loss,
    "vip-text": instruction_as_goal(vip_loss),
    "liv": liv_loss,
    "hilp": hilp_loss,
    "hilp-text": instruction_as_goal(hilp_loss),
}
LANGUAGE_FREE = {"tcn", "vip", "hilp"}  # trained without a sentence
ORACLES = {"preference-oracle"}  # trained on the simulator's reward: privileged, no peer

# `--setting faithful` trains with the constants of the signatures and this learning rate (the
# optimiser is ours in any case). Those constants were chosen for other backbones and free norms, so
# `--setting tuned` takes what won on the validation episodes, among as many settings for each
# objective: python vlmrm.py --tune --objective all, whose grid is in data/study.py.
LEARNING_RATE = 2e-3
TUNED = {  # objective: (learning rate, its constant)
    "clip": (5e-4, {"scale": 50.0}),
    "tcn": (5e-4, {"temperature": 0.3}),
    "tcn-text": (5e-4, {"temperature": 0.03}),
    "r3m": (2e-3, {"temperature": 0.3}),
    "vip": (5e-4, {"scale": 5.0}),
    "vip-text": (5e-4, {"scale": 1.0}),
    "hilp": (5e-4, {"scale": 5.0}),
    "hilp-text": (2e-3, {"scale": 1.0}),
    "liv": (2e-3, {"temperature": 0.1}),
    "decisionnce-p": (5e-4, {"scale": 3.0}),
    "decisionnce-t": (2e-3, {"scale": 3.0}),
    "vlc": (5e-4, {"scale": 20.0}),
    "preference": (5e-4, {"scale": 100.0}),
    "preference-oracle": (2e-3, {"scale": 20.0}),
    "progress": (5e-4, {"scale": 10.0}),
    "triplet": (2e-3, {"margin": 0.1}),
}


# -----------------------------------------------------------------------------
# 4. The training loop
#
# One loop for every objective and every device. A step: draw a batch, embed its frames and its
# instructions once, ask the objective for its number, move the weights. The videos of a batch are
# of different tasks, or a wrong sentence might be right; next is the frame after now, because VIP,
# LIV and HILP learn from single steps. The learning rate climbs first, while AdamW's averages are
# young, and then falls to nothing, so that the last steps settle; clipping tames the odd batch.


def pick_device(name: str) -> torch.device:
    """"auto" is the first of cuda, mps, cpu that this machine has."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise InputError(f"no {name} device here; --device cpu is everywhere")
    return torch.device(name)


def to_device(model: RewardModel, device: torch.device) -> RewardModel:
    """Move the model to the device; multiply in bfloat16 where that is faster there."""
    if device.type == "cuda":
        model.low_precision = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: float32
        model.low_precision = capabilities.get("avx512_bf16", False)
    return model.to(device)


def training_episodes(data: Dataset, batch: int) -> dict[str, np.ndarray]:
    """The episodes to train on, {task: indices}. Raises InputError if a batch needs more tasks."""
    train_set = data.select(split="train", source="expert")
    train_set = train_set[~np.isin(data.task[train_set], UNSEEN_TASKS)]
    tasks = np.unique(data.task[train_set])
    if batch > len(tasks):
        raise InputError(f"--batch {batch} needs as many tasks to train on, and {data.path} has "
                         f"{len(tasks)}: every video of a batch comes from another task, and the "
                         "ten unseen ones are never trained on")
    return {task: train_set[data.task[train_set] == task] for task in tasks}


def sample_batch(episodes: dict[str, np.ndarray], T: int, rng, batch: int):
    """Draw one video of each of `batch` different tasks, and five frames of each video.

    episodes maps a task to the indices of its training episodes, T is their length. Returns episode
    indices (B,) and frame numbers (B, 5) in order of time. Start and end are drawn from the first
    and last fifth of the episode (as in R3M), the other three from between; all are different.
    """
    tasks = rng.choice(list(episodes), size=batch, replace=False)
    numbers, fifth = [], max(T // 5, 1)
    for _ in tasks:
        start = rng.integers(0, fifth)
        end = rng.integers(T - fifth, T)
        now = rng.integers(start + 1, end - 2)
        later = rng.integers(now + 2, end)
        numbers.append([start, now, now + 1, later, end])
    return np.array([rng.choice(episodes[task]) for task in tasks]), np.array(numbers)


def train(model: RewardModel, data: Dataset, sentences: dict, loss_function, *, steps: int,
          batch: int, learning_rate: float, seed: int, oracle: bool = False,
          checkpoint: Path | None = None) -> list[dict]:
    """Train the model in place. Returns the log: step, loss, seconds and, now and then, validation
    VOC. Same seed, same CPU, same number of threads: the same weights, bit for bit.

    oracle: the loss gets the simulator's rewards as times. checkpoint: a file to save to about ten
    times on the way, and to go on from. Raises InputError when the loss is no number or not finite.
    """
    device, rng = model.mean.device, np.random.default_rng(seed)
    episodes = training_episodes(data, batch)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, weight_decay=0.01, fused=device.type in ("cuda", "cpu"))
    log, latest, warmup = [], "?", max(1, steps // 10)
    if checkpoint and checkpoint.exists():
        log = plumbing.load_checkpoint(checkpoint, model, optimizer)
        for _ in log:  # draw again what was drawn: the generator then stands where it stood
            sample_batch(episodes, data.T, rng, batch)
    model.train()
    with plumbing.progress_bar(range(len(log) + 1, steps + 1), initial=len(log), total=steps,
                      desc="training", unit="step") as bar:
        for step in bar:
            began = time.perf_counter()
            chosen, numbers = sample_batch(episodes, data.T, rng, batch)  # (B,), (B, 5)
            pixels = np.stack([data.frames(e)[n] for e, n in zip(chosen, numbers)])
            times = data.rewards[chosen[:, None], numbers] if oracle else numbers / (data.T - 1)
            frames = model.embed_frames(torch.from_numpy(pixels))  # (B, 5, D)
            texts = model.embed_texts(
                [sentences[task]["instruction"] for task in data.task[chosen]])  # (B, D)
            loss = loss_function(frames, texts, torch.tensor(times).float().to(device))
            check_loss(loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            check_gradient(step, loss.item(), norm.item())
            optimizer.param_groups[0]["lr"] = learning_rate * min(  # up in a line, down in a cosine
                step / warmup, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
            optimizer.step()
            log.append({"step": step, "loss": loss.item(), "seconds": time.perf_counter() - began})
            if step % max(1, steps // 5) == 0 or step == steps:
                log[-1]["validation_voc"] = voc = validation_voc(model, data, sentences)
                latest = f"{voc:.2f}"
                model.train()
            if checkpoint and (step % max(1, steps // 10) == 0 or step == steps):
                plumbing.save_checkpoint(checkpoint, model, optimizer, log)
            # The VOC is the latest there is, as of a fifth of the steps ago at most.
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", validation_voc=latest, refresh=False)
    return log


def check_loss(loss) -> None:
    """Raise InputError unless an objective has returned something to minimise."""
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        raise InputError("the objective must return a tensor with one number, which depends on the "
                         "embeddings")


def check_gradient(step: int, loss: float, norm: float) -> None:
    """Raise InputError if a loss or its gradient's norm is not finite, or the first norm is 0."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"step {step}: the loss is {loss}, the gradient's norm {norm}; lower "
                         "--learning-rate, or look for a root or a division by 0 in the objective")
    if step == 1 and norm == 0:
        raise InputError("the objective gives no gradient; if it compares videos, it needs a "
                         "larger --batch")


# -----------------------------------------------------------------------------
# 5. The evaluation metrics
#
# Two questions. Does the reward rise while an expert works (VOC)? Does it put frames in the order
# in which the simulator's reward puts them (ranking accuracy)? And some more, to see what a model
# that does well on these has in truth learnt: does it read the instruction? By name, and on what:
#
#     voc                        experts: Spearman correlation of the reward with time
#     voc_paraphrase             the same under three sentences that training never saw
#     antonym                    the same, minus its value under the sentence that undoes the task
#     retrieval_top1, _top5      experts' last frames: is the own sentence the most similar of all?
#     ranking_accuracy_within    mixed: pairs of frames of one episode, in the simulator's order?
#     ranking_accuracy_across    all: pairs of frames of two episodes of the same task
#     epic                       all: how far model's and simulator's reward are from proportional
#     success_auroc              all, last frames: do successes get more than failures?
#     goal_...                   the same with -distance to other experts' last frames as reward
#     own_...                    the same with the reward of clock, moved or goal-baseline
#
# Mind that a clock gets .8 within: even a failing arm mostly gets closer with time.
#
# Values are (E, T): the model's reward of T frames of each of E episodes. Every metric comes from
# sums over episodes, so a bootstrap over episodes needs no second pass over the frames: draw how
# often each episode counts, R times, and weigh the sums. Such counts are called weights below.


def value_order_correlation(values: np.ndarray) -> np.ndarray:
    """VOC: Spearman correlation of each row of values (E, T) with time. (E,), in [-1, 1].

        1 = always rising, 0 = no order, -1 = always falling. Ties share their rank; a constant row
        counts 0.
    Source: GVL, 2411.04549, and OpenGVL's code for constants.
    """
    ranks = rankdata(values, axis=-1)
    centred_time = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    ranks = ranks - ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1) * (centred_time**2).sum())
    return np.divide(ranks @ centred_time, norm, out=np.zeros(len(ranks)), where=norm > 0)


def count_below(ranks: np.ndarray, start, end, limits: np.ndarray) -> np.ndarray:
    """How many of ranks[start:end] are less than the limit, for queries of any shape.

    All are arrays of whole numbers >= 0; start and end broadcast to limits. Costs O(n log n), as
    sorting does: bit by bit from the highest, entries whose bit is 0 move to the front and the
    others to the back, each keeping their order. A query follows the half that its limit's bit
    points to, and where that is 1, all entries of its range in the other half are less. (This is a
    wavelet matrix.)
    """
    counts = np.zeros(limits.shape, np.int64)
    for bit in reversed(range(int(max(limits.max(initial=0), ranks.max(initial=0))).bit_length())):
        one, up = ranks >> bit & 1 == 1, limits >> bit & 1 == 1
        zeros = np.concatenate([[0], np.cumsum(~one)])  # how many among the first k entries
        counts += np.where(up, zeros[end] - zeros[start], 0)
        start, end = (np.where(up, zeros[-1] + edge - zeros[edge], zeros[edge])
                      for edge in (start, end))
        ranks = np.concatenate([ranks[~one], ranks[one]])
    return counts


def pair_counts(values: np.ndarray, rewards: np.ndarray, threshold: float = 0.1):
    """For each frame the pairs that it is part of, within its row: how many the values order as the
    rewards do, and how many there are. values, rewards (E, T) -> two arrays (E, T).

    A pair counts if its rewards differ by more than the threshold (0.1 on Meta-World's scale of 0
    to 10, our choice); equal values count half. Every pair is counted at both its frames, so the
    ranking accuracy is the ratio of the two sums. O(n log n).
    """
    values, rewards = np.float64(values), np.float64(rewards)
    correct, total = np.zeros(values.shape), np.zeros(values.shape)
    row = np.arange(len(values))[:, None] * values.shape[1]  # where each begins, end to end
    for v, r in ((values, rewards), (-values, -rewards)):  # as the better frame, as the worse one
        order = np.argsort(r, axis=1, kind="stable")
        worse = np.stack([np.searchsorted(one[by], one - threshold) for one, by in zip(r, order)])
        ranks = np.unique(v, return_inverse=True)[1].reshape(v.shape)
        limits = np.stack([ranks, ranks + 1])  # lower values, and lower or equal ones: (2, E, T)
        ranks = np.take_along_axis(ranks, order, axis=1).ravel()  # the worse ones come first
        correct += count_below(ranks, row, row + worse, limits).mean(0)
        total += worse
    return correct, total


def bootstrap_weights(rng, source: np.ndarray, replicates: int = 1000) -> np.ndarray:
    """How often each episode counts: (1 + replicates, E). Row 0 is the data as they are.

    Experts and mixed episodes are drawn apart, so that every replicate has as many of either.
    """
    weights = np.ones((1 + replicates, len(source)))
    for kind in np.unique(source):
        group = np.flatnonzero(source == kind)
        weights[1:, group] = rng.multinomial(
            len(group), np.full(len(group), 1 / len(group)), size=replicates)
    return weights


def weighted_ratio(weights: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """sum part / sum whole over episodes (E,), counted by weights (R, E); NaN for 0 / 0. (R,)"""
    part, whole = (weights * part).sum(1), (weights * whole).sum(1)
    return np.divide(part, whole, out=np.full(len(weights), np.nan), where=whole > 0)


def epic_distance(weights: np.ndarray, values: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """EPIC, how far two rewards are from equal up to scale and offset: sqrt(1/2 (1 - Pearson)).

    In [0, 1], 0 is best. weights (R, E) count the episodes of values, rewards (E, T). Returns
    (R,). For rewards of the next state alone, EPIC's canonical form only subtracts a constant,
    which Pearson ignores.
    Source: Gleave et al., 2006.13900, with the 1/2 of its code. A constant counts Pearson 0.
    """
    # Pearson from sums over each episode's frames: n, sum v, sum r, sum v^2, sum r^2, sum vr.
    v, r = values - values.mean(), np.float64(rewards) - rewards.mean()
    sums = np.stack([np.ones_like(v), v, r, v * v, r * r, v * r]).sum(-1)  # (6, E)
    n, sv, sr, svv, srr, svr = np.einsum("se,re->sr", sums, weights)
    variance = np.maximum(n * svv - sv**2, 0) * np.maximum(n * srr - sr**2, 0)
    scale = np.sqrt(variance)
    defined = scale > 1e-12 * n**2
    pearson = np.divide(n * svr - sv * sr, scale, out=np.zeros_like(scale), where=defined)
    return np.sqrt(np.maximum(0, 1 - pearson) / 2)


def success_auroc(weights: np.ndarray, values: np.ndarray, success: np.ndarray) -> np.ndarray:
    """Probability that a success gets more reward than a failure; equal values count half.

    values and success (E,) are of the last frame of each episode, weights (R, E) count the
    episodes. (R,), NaN without successes or failures.
    """
    order = np.argsort(values)
    failures = np.cumsum((weights * ~success)[:, order], axis=1)
    failures = np.concatenate([np.zeros((len(weights), 1)), failures], axis=1)  # (R, E + 1)
    lower, not_higher = (failures[:, np.searchsorted(values[order], values, side)]
                         for side in ("left", "right"))  # (R, E): failures beaten by each episode
    return weighted_ratio(weights * success, (lower + not_higher) / 2, failures[:, -1:])


def goal_image_rewards(frames: torch.Tensor, expert: np.ndarray) -> np.ndarray:
    """The reward of whoever has seen the goal: -|o - g|, averaged over the last frames g of the
    OTHER experts of the task. frames (E, T, D) of one task, expert (E,) -> (E, T); 0 without any.
    """
    values = np.zeros(frames.shape[:2], np.float32)
    for i in range(len(frames)):
        others = np.flatnonzero(expert & (np.arange(len(expert)) != i))
        if len(others):
            values[i] = negative_distance(frames[i, :, None], frames[others, -1]).mean(1)
    return values


@torch.inference_mode()
def validation_voc(model: RewardModel, data: Dataset, sentences: dict, every: int = 3) -> float:
    """VOC on every n-th frame of the validation experts: to watch a run, and, with every frame, to
    choose settings. NaN if there are none."""
    model.eval()
    episodes, scores = data.select(split="validation", source="expert"), []
    if not len(episodes):
        return math.nan
    for some in np.split(episodes, range(10, len(episodes), 10)):
        frames = model.embed_frames(data.load(some, every)).cpu()  # (10, T / every, D)
        texts = model.embed_texts([sentences[task]["instruction"] for task in data.task[some]])
        values = torch.einsum("etd,ed->et", frames, texts.cpu()).numpy()
        scores.append(value_order_correlation(values))
    return float(np.concatenate(scores).mean())


def score_task(frames: torch.Tensor, expert: np.ndarray, own: int, opposite: int,
               texts: torch.Tensor, paraphrases: torch.Tensor, own_reward=None):
    """Rewards and scores of one task's episodes.

    frames (E, T, D); expert (E,) flags; texts (M, D) all instructions, paraphrases (3, D) of this
    task; own and opposite: rows of texts, the same one if there is no opposite. Returns rewards
    {"": cosines (E, T), "goal_": by goal images, "own_": own_reward(frames, text)}, scores
    {metric: (score (E,), 1 where it is defined (E,))} and the sentence each end prefers (E,).
    """
    def rewards_under(text):
        return torch.einsum("etd,ed->et", frames, text.expand(len(frames), -1)).numpy()

    values = {"": rewards_under(texts[own])}
    if expert.sum() > 1:  # an expert's goal images are the others'
        values["goal_"] = goal_image_rewards(frames, expert)
    if own_reward:
        values["own_"] = own_reward(frames, texts[own]).numpy()
    voc = {prefix + "voc": value_order_correlation(v) for prefix, v in values.items()}
    voc_paraphrase = np.mean([value_order_correlation(rewards_under(text))
                              for text in paraphrases], axis=0)
    voc_opposite = value_order_correlation(rewards_under(texts[opposite]))
    last = (frames[:, -1] @ texts.T).numpy()  # (E, M): whose end does it look like?
    rank = (last >= last[:, [own]]).sum(1)  # 1 = the right one, alone
    scores = voc | {"voc_paraphrase": voc_paraphrase, "antonym": voc["voc"] - voc_opposite,
                    "retrieval_top1": rank <= 1, "retrieval_top5": rank <= 5}
    defined = expert.astype(float)
    return values, {metric: (score, defined * (metric != "antonym" or own != opposite))
                    for metric, score in scores.items()}, last.argmax(1)


def task_metrics(rng, source, rewards, success, values: dict, scores: dict) -> dict:
    """Every metric of one task, as it is and under 1,000 bootstraps: {metric: (1001,)}, NaN where
    undefined. source (E,), rewards and success (E, T); values and scores as of score_task()."""
    weights = bootstrap_weights(rng, source)
    mixed = (source == "mixed").astype(float)
    rows = {metric: weighted_ratio(weights, score * defined, defined)
            for metric, (score, defined) in scores.items()}
    for prefix, v in values.items():
        within = np.sum(pair_counts(v, rewards), axis=-1)  # (2, E): correct, total
        everywhere = np.sum([counts.reshape(v.shape) for counts in pair_counts(
            v.reshape(1, -1), rewards.reshape(1, -1))], axis=-1)  # (2, E)
        rows[prefix + "ranking_accuracy_within"] = weighted_ratio(weights, *(within * mixed))
        # A pair across counts as often as BOTH its episodes are drawn, product of two weights.
        # This weighs it by one of them, which to first order moves the ratio half as far: double.
        across = weighted_ratio(weights, *(everywhere - within))
        rows[prefix + "ranking_accuracy_across"] = np.clip(
            across[0] + 2 * (across - across[0]), 0, 1)
        rows[prefix + "success_auroc"] = success_auroc(weights, v[:, -1], success[:, -1])
        rows[prefix + "epic"] = epic_distance(weights, v, rewards)
    return rows


@torch.inference_mode()
def evaluate(model: RewardModel, data: Dataset, sentences: dict, own_reward=None) -> dict:
    """All metrics on the test episodes: average_over_tasks()'s report and, for every test episode,
    "episodes" (E,), "values" {prefix: (E, T)} and the sentence "preferred" (E,) of its end."""
    model.eval()
    names, test = list(sentences), data.select(split="test")
    texts = model.embed_texts([sentences[name]["instruction"] for name in names]).cpu()  # (M, D)
    rng, rows, preferred, values = np.random.default_rng(0), {}, np.zeros(len(test), int), {}
    for task in plumbing.progress_bar(np.unique(data.task[test]), desc="evaluating", unit="task",
                             leave=False, disable=None):  # None: not where there is no terminal
        where = np.flatnonzero(data.task[test] == task)
        mine, own = test[where], names.index(task)
        frames = torch.cat([model.embed_frames(data.load(some)).cpu()
                            for some in np.split(mine, range(10, len(mine), 10))])  # (E, T, D)
        paraphrases = model.embed_texts(sentences[task]["paraphrases"]).cpu()
        opposite = names.index(sentences[task].get("opposite", task))
        found, scores, preferred[where] = score_task(
            frames, data.source[mine] == "expert", own, opposite, texts, paraphrases, own_reward)
        for prefix, v in found.items():
            values.setdefault(prefix, np.zeros((len(test), data.T), np.float32))[where] = v
        for metric, row in task_metrics(rng, data.source[mine], data.rewards[mine],
                                        data.success[mine], found, scores).items():
            rows.setdefault(metric, {})[task] = row
    return average_over_tasks(rows) | {
        "episodes": test, "values": values, "preferred": preferred}


def average_over_tasks(rows: dict) -> dict:
    """The report: {"seen", "unseen": {metric: {value, tasks, interval}}, "tasks": {task: scores}}.

    rows: metric -> task -> (1 + replicates,), NaN where undefined. The interval holds 95 % of the
    averages that come out when each task's episodes are drawn again, with replacement.
    """
    report = {"seen": {}, "unseen": {}, "tasks": {}}
    for metric, by_task in rows.items():
        defined = {task: row for task, row in by_task.items() if not np.isnan(row[0])}
        for task, row in defined.items():
            report["tasks"].setdefault(task, {})[metric] = row[0]
        for group in ("seen", "unseen"):
            chosen = [row for task, row in defined.items() if group_of(task) == group]
            if chosen:
                with warnings.catch_warnings():  # of few episodes some bootstraps have no pair
                    warnings.simplefilter("ignore", RuntimeWarning)
                    means = np.nanmean(chosen, axis=0)
                report[group][metric] = {"value": means[0], "tasks": len(chosen),
                                         "interval": np.nanquantile(means[1:], [0.025, 0.975])}
    return report


# -----------------------------------------------------------------------------
# 6. A run
#
# Settings in, a folder out: config.json first, checkpoint.safetensors while it trains, metrics.json
# last. A folder without metrics.json is a run that was stopped, and can go on.


def load_data(args: argparse.Namespace) -> tuple[Dataset, dict]:
    """The data set and the sentences. Raises InputError when they do not fit each other."""
    sentences, data = load_instructions(args.instructions), Dataset(args.data)
    if strangers := set(data.task) - set(sentences):
        raise InputError(f"{args.data} has tasks without a sentence in {args.instructions}: "
                         + ", ".join(sorted(strangers)))
    if not len(data.select(split="test", source="expert")):
        raise InputError(f"{args.data} has no experts to test on: it takes 4 of a task")
    return data, sentences


SETTINGS = ("objective", "setting", "seed", "backbone", "pretrained", "lora", "steps", "batch",
            "learning_rate", "alpha", "baseline")  # the options that decide the outcome of a run


def configuration(args: argparse.Namespace) -> dict:
    """All that decides the outcome of a run but versions and machine. (Weights that a hub keeps
    under a tag have no checksum here: they may change.)"""
    tuned = TUNED if args.setting == "tuned" else {}
    learning_rate, constants = tuned.get(args.objective, (LEARNING_RATE, {}))
    return {key: getattr(args, key) for key in SETTINGS} | {
        "learning_rate": args.learning_rate or learning_rate, "constants": constants,
        "data_sha256": plumbing.checksum(args.data),
        "instructions_sha256": plumbing.checksum(args.instructions),
        "weights_sha256": weights_checksum(args.pretrained)}


def weights_checksum(pretrained: str | None) -> str | None:
    """SHA-256 of the weights that a run starts from; None for a tag, which is no file here."""
    path = Path(pretrained or DATA / "tiny.safetensors")
    return plumbing.checksum(path) if path.is_file() else None


def prepare_model(args: argparse.Namespace) -> RewardModel:
    """The backbone as a run with these arguments starts from it."""
    device = pick_device(args.device)
    if args.lora and (args.pretrained == "none" or args.backbone == "thumbnail"):
        raise InputError("--lora adapts pretrained weights, and --pretrained none or a thumbnail "
                         "has none; a run stores the adapters alone")
    torch.manual_seed(args.seed)  # decides the adapters' start, and random backbones
    model = build_backbone(args.backbone, args.pretrained)
    if args.lora:
        add_lora(model, args.lora)
    return to_device(model, device)


def own_reward_of(args: argparse.Namespace, model: RewardModel):
    """The reward of what is neither the cosine nor the distance to goal images: a function of
    frames (E, T, D) and a text (D,), or None."""
    if args.objective == "goal-baseline":
        with torch.inference_mode():
            baseline = model.eval().embed_texts([args.baseline])[0].cpu()
        return lambda frames, text: goal_baseline_reward(frames, text, baseline, args.alpha)
    return {
        "clock": lambda frames, text: torch.arange(frames.shape[1]).repeat(len(frames), 1),
        "moved": lambda frames, text: -negative_distance(frames, frames[:, :1]),
    }.get(args.objective)


def run(args: argparse.Namespace, data: Dataset, sentences: dict, started: float,
        folder: Path) -> dict:
    """Train one objective, evaluate it, and leave everything in a folder. Returns the report.

    What was stopped in that folder goes on, and comes to the same end. started is the
    perf_counter() from which the wall time counts. Raises InputError when the folder is in use, or
    holds a run with other settings.
    """
    config = configuration(args)
    if (folder / "config.json").exists():
        plumbing.refuse_other_settings(folder, config)
    if loss := OBJECTIVES[args.objective]:
        training_episodes(data, args.batch)  # refuses what cannot be, before there is a folder
    model = prepare_model(args)
    for entry in sentences.values():
        model.check_length([entry["instruction"], *entry["paraphrases"]])
    with plumbing.locked(folder):
        plumbing.write_json(folder / "config.json", config | {
            "data": str(args.data), "instructions": str(args.instructions),
            "device": model.mean.device.type, "cores": os.cpu_count(), "torch": torch.__version__,
            "open_clip": open_clip.__version__, "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}"})
        trained = sum(p.numel() for p in model.parameters() if loss and p.requires_grad)
        print(f"{args.objective} on {args.backbone}, {trained / 1e6:.1f} M weights to train, "
              f"{model.mean.device}{', bfloat16' if model.low_precision else ''}; {data.E} "
              f"episodes of {len(np.unique(data.task))} tasks from {data.path}", flush=True)
        log = train(model, data, sentences, functools.partial(loss, **config["constants"]),
                    steps=args.steps, batch=args.batch, learning_rate=config["learning_rate"],
                    seed=args.seed, oracle=args.objective in ORACLES,
                    checkpoint=folder / "checkpoint.safetensors") if loss else []
        report = evaluate(model, data, sentences, own_reward_of(args, model))
        plumbing.save_weights(model, folder / "model.safetensors")
        with plumbing.whole_file(folder / "curves.png") as unfinished:
            companion("report").draw_curves(
                report, data, sentences, f"{args.objective}: rewards of test episodes over time",
                unfinished)
        with plumbing.whole_file(folder / "rewards.npz") as unfinished:
            np.savez(unfinished, episodes=report["episodes"], preferred=report["preferred"],
                     **{prefix + "values": values for prefix, values in report["values"].items()})
        report |= {"wall_seconds": round(time.perf_counter() - started, 1),
                   "frames_per_second": round(5 * args.batch / np.median(
                       [entry["seconds"] for entry in log])) if log else None}
        plumbing.write_json(folder / "metrics.json", {  # last: a folder that has it is whole
            "objective": args.objective, "seed": args.seed} | {
            key: report[key] for key in ("wall_seconds", "frames_per_second", "seen", "unseen",
                                         "tasks")} | {"log": log})
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return report


def check_objective(name: str) -> None:
    """Raise InputError unless there is such an objective."""
    if name not in [*OBJECTIVES, "all"]:
        raise plumbing.unknown("objective", name, [*OBJECTIVES, "all"])


def settings_in(folder: Path, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with which the unfinished run in the folder was started, for --resume."""
    made = plumbing.read_config(folder)
    if (folder / "metrics.json").exists():
        raise InputError(f"the run in {folder} is finished: there is nothing to go on with")
    check_objective(made["objective"])
    try:
        return argparse.Namespace(**vars(args) | {key: made[key] for key in SETTINGS} | {
            "device": made["device"] if args.device == "auto" else args.device} | {
            key: Path(made[key]) for key in ("data", "instructions")})
    except (KeyError, TypeError) as problem:
        raise InputError(f"{folder}/config.json is damaged: {problem!r}") from None


def run_once(args: argparse.Namespace) -> None:
    """One run, in runs/<name>: by default <objective>-seed<seed>, numbered if that is taken.
    --resume FOLDER needs nothing else, the settings come from there."""
    if args.resume:
        folder, args = args.resume, settings_in(args.resume, args)
    elif args.name:
        folder = args.runs / args.name
        if folder.exists() and {path.name for path in folder.iterdir()} - {"lock"}:
            raise InputError(f"{folder} exists: choose another --name, remove it, or go on with "
                             f"it: --resume {folder}")
    else:
        folder, n = args.runs / f"{args.objective}-seed{args.seed}", 2
        while folder.exists():
            folder, n = args.runs / f"{args.objective}-seed{args.seed}-{n}", n + 1
    data, sentences = load_data(args)
    started = STARTED if __name__ == "__main__" else time.perf_counter()
    try:
        report = run(args, data, sentences, started, folder)
    except KeyboardInterrupt:
        again = (f"python vlmrm.py --resume {shlex.quote(str(folder))}" if __name__ == "__main__"
                 else f'vlmrm.main(["--resume", {str(folder)!r}])')
        raise KeyboardInterrupt(f"; go on with: {again}" if folder.exists() else "") from None
    print(companion("report").format_report(report, len(sentences)))
    if OBJECTIVES[args.objective] and np.ptp(report["values"][""], axis=1).mean() < 0.02:
        print("The reward hardly changes within an episode: it has collapsed, or was never "
              "trained. A lower --learning-rate may help.")
    print(f"{report['wall_seconds']:.0f} s in all. Weights, metrics and pictures are in {folder}; "
          f'--score VIDEO --instruction "..." --model {folder} uses them')


# -----------------------------------------------------------------------------
# 7. Use: a trained model as a function, and as the reward of an environment
#
# A reward that is maximised is also exploited: what it likes without reason will be found. See
# "Several models at once" in the README before trusting one with a policy.


def load_reward_model(run_dir: str | Path, device: str = "auto") -> RewardModel:
    """The trained model of a run folder, ready to score(frames, instruction).

    Of tcn, vip and hilp, which know no sentence, the score means nothing: use embed_frames() and
    the distance to a goal image. A model with LoRA also needs the pretrained weights it was trained
    on, from the same place as then. Raises InputError when the folder is no run or its weights do
    not fit.
    """
    config = plumbing.read_config(Path(run_dir))
    backbone, pretrained, lora = config["backbone"], config["pretrained"], config["lora"]
    if lora and config.get("weights_sha256", now := weights_checksum(pretrained)) != now:
        raise InputError(f"{run_dir} adapts other weights than those of {backbone} are now")
    model = build_backbone(backbone, pretrained if lora else "none")
    if lora:
        add_lora(model, lora)
    plumbing.load_weights(model, Path(run_dir) / "model.safetensors")
    merge_lora(model)
    return to_device(model, pick_device(device)).eval()


def wrap_environment(env, model: RewardModel, instruction: str, render=None, shaping: bool = False,
                     gamma: float = 0.99):
    """The gymnasium environment with the model's reward in place of its own, or added to it as a
    potential; its own stays in info["environment_reward"].

    render() -> uint8 (H, W, 3); not given, env.render(). The reward is that of the frame after the
    step. With shaping it is added to the environment's own, as gamma r(s') - r(s): whatever the
    model says, the best policy stays the best one (Ng, Harada and Russell, 1999), as long as r
    counts as 0 where an episode terminates. Raises InputError for a bad sentence, and, at the first
    step, when there is no picture.
    """
    import gymnasium
    model.score(np.zeros((1, 8, 8, 3), np.uint8), instruction)  # refuses a bad sentence now

    class ModelReward(gymnasium.Wrapper):
        def look(self) -> float:
            if (picture := (render or self.env.render)()) is None:
                raise InputError("the environment renders nothing: make it with "
                                 "render_mode='rgb_array'")
            return float(model.score(picture[None], instruction)[0])

        def reset(self, **options):
            observation, info = self.env.reset(**options)
            self.before = self.look() if shaping else 0.0
            return observation, info

        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            info = info | {"environment_reward": reward}
            seen = self.look()
            if shaping:
                after = 0.0 if terminated else seen
                seen, self.before = reward + gamma * after - self.before, after
            return observation, seen, terminated, truncated, info

    return ModelReward(env)


def main(argv: list[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    try:
        check_objective(args.objective)
        if args.collect:
            collect(args)
        elif args.score:
            companion("score").main(args)
        elif args.tune or args.ensemble or args.objective == "all":
            companion("study").main(args)
        else:
            run_once(args)
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder that is read-only
        print(f"vlmrm: {plumbing.one_line(problem)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nvlmrm: stopped{interrupt}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # there are terminals without ± and ↓
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
