"""
Train a vision-language reward model, measure it, and change only its learning objective.

Such a model looks at a picture and a sentence ("close the drawer") and returns a number that should
rise as the task gets done. Two towers map picture and sentence to unit vectors, whose cosine is the
reward. What that is worth depends on the objective, and objectives are what this file compares, as
"Revisiting the learning objectives of vision-language reward models" does (arXiv 2512.20675).

  python vlmrm.py --objective triplet            # train, test, draw: 22 to 80 s on two CPU cores
  python vlmrm.py --objective all --seeds 3        # compare the paper's five and no training at all
  python data/tools/show.py runs/triplet-seed0 clip.mp4 "close the drawer"  # use what was trained
  python vlmrm.py --collect --tasks reach-v3 push-v3 --data two.npz    # make your own videos
  python vlmrm.py --backbone ViT-B-32-quickgelu --pretrained openai --learning-rate 1e-4     # GPU

Expect of triplet (mean ± std of seeds 0, 1, 2; other CPUs than ours differ by some hundredths), on
tasks it was trained on (seen) and on ten others (unseen):
  VOC: value-order correlation on experts (1: best)    0.92 ± 0.00 seen, 0.75 ± 0.03 unseen
  ranking of two videos at one time (chance is .5)     0.79 ± 0.00 seen, 0.73 ± 0.00 unseen

Shapes: B videos in a batch, K frames of each; E episodes, T pictures of each; N pictures of H x W
pixels (S x S in our data); M sentences; D dimensions. A video is the pictures of an episode. In the
code `pictures` are bytes, `frames` and `texts` the unit vectors of pictures and sentences.
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
import runpy
import signal
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

# Idle threads of torch burn a core while they wait. This, set before its import, makes them sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.pop("MPLBACKEND", None)  # that of a notebook may be missing here; we open no window
if __name__ == "__main__":
    # An objective's file may `import vlmrm`: then it gets this module, not a second copy.
    sys.modules["vlmrm"] = sys.modules["__main__"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C during the imports
    logging.disable(logging.ERROR)  # libraries' warnings

import matplotlib
import numpy as np
import open_clip  # the CLIP architectures and tokenizers
import scipy  # its parts load when they are first used
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot: no window opens by mistake
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from tqdm import tqdm

DATA = Path(__file__).resolve().parent / "data"

class InputError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""

@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong while a file is read or checked into one line that names it."""
    try:
        if not Path(path).is_file():  # to open a pipe could block for ever
            raise ValueError("there is no such file")
        yield
    except InputError:
        raise
    except Exception as problem:  # numpy, zip, json, PIL and safetensors have dozens of kinds
        kind = type(problem).__name__
        raise InputError(f"cannot read {path}: {kind}: {str(problem)[:200]}") from None

def write_whole(path, content: bytes):
    """Write a file whole or not at all, even if another process writes it, too."""
    unfinished = Path(f"{path}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except FileNotFoundError:  # a process that has just finished the same run has tidied up
        if not Path(path).exists():
            raise
    finally:
        unfinished.unlink(missing_ok=True)

def read_json(path):
    """A JSON file with a dictionary. Raises InputError."""
    with reading(path):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))

# 1. Dataset collection -------------------------------------
# A reward model learns what "further along" looks like, from videos in which things get done.
# Meta-World, a simulated robot arm at a table, has 50 tasks, for each a scripted policy: an expert.
# It also has a reward of its own, 0 to 10, which models never see. Two kinds of episodes:
#   expert  the scripted policy. Only successes are kept, and end 5 steps after success. We train on
#           some and test on others: there the later picture is the one that is further.
#   mixed   the same policy with noise and random actions, or one that goes wrong half-way, for 150
#           steps: some succeed, most dither, fail or go backwards. No training: the simulator's
#           reward says which picture is better.
# Ten tasks are unseen: never trained on. Each has a relative among the other forty: door-close for
# door-open.

UNSEEN_TASKS = (
    "button-press-v3", "coffee-pull-v3", "door-open-v3", "door-unlock-v3", "drawer-open-v3",
    "faucet-open-v3", "handle-pull-side-v3", "plate-slide-back-v3", "push-wall-v3",
    "window-close-v3")
# The arrays of a data set, a value for each episode (E,) or picture (E, T): {name: dtype.kind}.
PER_EPISODE = {"task": "U", "split": "U", "source": "U", "seed": "iu"}
PER_PICTURE = {"rewards": "f", "success": "b", "steps": "iu"}
# The parts of the simulator's state that decide what a picture shows.
POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
         "light_xpos", "light_xdir", "cam_xpos", "cam_xmat")

def group_of(task: str):
    """Either "unseen", for the ten tasks that nobody trains on, or "seen"."""
    return "unseen" if task in UNSEEN_TASKS else "seen"

def load_instructions(path, tasks=()) -> dict[str, dict]:
    """{task: {"instruction", "paraphrases" (3, never trained on), "opposite" (the task that undoes
    this one, if there is one)}}; the given tasks must be in it. Raises InputError."""
    with reading(path):  # for the checks below
        instructions = read_json(path)
        for task in set(instructions).union(tasks):
            entry = instructions[task]
            paraphrases = entry["paraphrases"]
            if not isinstance(paraphrases, list) or len(paraphrases) != 3:
                raise ValueError(f"{task} has not three paraphrases")
            if "instruction" not in entry:
                raise ValueError(f"{task} has no instruction")
            if entry.get("opposite") and entry["opposite"] not in instructions:
                raise ValueError(f"the opposite of {task} is unknown")
    return instructions

def distinct_sentences(instructions: dict) -> list[str]:
    """The M instructions. Of tasks that have the same one it is one."""
    return list(dict.fromkeys(entry["instruction"] for entry in instructions.values()))

def open_task(task: str, size: int):
    """The simulator of a task, the class of its scripted policy, a renderer of size x size pictures
    (close it before you open another, or the new one draws old pictures). Raises InputError."""
    if sys.platform == "linux":  # without a screen; mujoco reads this once, at import
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as policies
        env = environments[task + "-goal-observable"](seed=0)
        visual = env.model.vis
        visual.quality.offsamples = 0  # no multisampling, for speed
        visual.global_.offwidth = size
        visual.global_.offheight = size
        view = env.model.camera("corner4")  # turned and zoomed to where the arm works
        view.fovy[:] = 40.6
        view.quat[:] = (-0.3691, 0.1892, -0.4376, 0.7978)
        renderer = mujoco.Renderer(env.model, size, size)
    except Exception as problem:  # graphics libraries fail in many ways
        raise InputError(
            f"cannot render {task} ({str(problem)[:80]!r}). It takes metaworld (Python 3.10-3.13) "
            "and OpenGL: 'apt-get install libosmesa6', or for a GPU MUJOCO_GL=egl") from None
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return env, policies[task], renderer

def seed_starts(env, seed: int):
    """Decide where the episodes to come begin. Meta-World ignores reset(seed=...)."""
    env.seeded_rand_vec = True
    env._freeze_rand_vec = False
    env.seed(seed)

def roll_out(env, policy, rng, steps: int, noise: float = 0.0, random_share: float = 0.0,
             wrong_from: float = math.inf) -> list[tuple]:
    """An episode: of each step (poses, reward, success flag). A share of actions is random, all get
    Gaussian noise; from step wrong_from on they are random, each for ten steps. Without noise (an
    expert) it ends 5 steps after success."""
    observation, _ = env.reset()
    history = []
    after_success = 0  # counts the success, too
    while len(history) < steps and after_success <= 5:
        action = policy.get_action(observation)
        if rng.random() < random_share:
            action = rng.uniform(-1, 1, size=4)  # x, y, z, gripper
        if len(history) >= wrong_from:
            if (len(history) - wrong_from) % 10 == 0:
                wrong = rng.uniform(-1, 1, size=4)
            action = wrong
        action = np.clip(action + noise * rng.normal(size=4), -1, 1)
        observation, reward, _, _, info = env.step(action)
        # Drawing costs ten times as much as a step: keep the poses now, draw a chosen few later.
        poses = {name: getattr(env.data, name).copy() for name in POSES}
        history.append((poses, reward, bool(info["success"])))
        if noise == 0 and (info["success"] or after_success):
            after_success += 1
    return history

def draw(renderer, data, poses: dict):
    """A picture, uint8 (S, S, 3), of the simulator's state `data` with these poses."""
    for name, pose in poses.items():
        getattr(data, name)[:] = pose
    renderer.update_scene(data, camera="corner4")
    # The camera hangs upside down: turn the picture by 180 degrees, which flips BOTH axes. To flip
    # the rows alone looks right, but mirrors the scene: left becomes right.
    return renderer.render()[::-1, ::-1]

def pack_pictures(pictures):
    """Pack uint8 pictures (T, S, S, 3) into a WebP, top to bottom: a 29th of the bytes."""
    packed = io.BytesIO()
    strip = Image.fromarray(np.concatenate(pictures))
    strip.save(packed, "WEBP", quality=70, method=6)
    return packed.getvalue()

def collect_task(job: dict) -> list[dict]:
    """All episodes of one task. job: the task, and --collect's options. Raises InputError."""
    task = job["task"]
    warnings.simplefilter("ignore")  # Meta-World's, of its own constants
    env, policy, renderer = open_task(task, job["size"])
    episodes = []
    attempts = 0
    while len(episodes) < job["expert"] + job["mixed"]:
        mixed = len(episodes) >= job["expert"]
        if not mixed and attempts >= 4 * job["expert"]:
            raise InputError(f"{task}: {len(episodes)} of {attempts} tries succeed: lower --expert")
        # No two episodes of a task have the same number: experts count from 0, mixed ones from
        # 5,000, of each --seed.
        seed = 10_000 * job["seed"] + 5_000 * mixed + attempts
        attempts += 1
        seed_starts(env, seed)
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        if not mixed:
            history = roll_out(env, policy(), rng, 300)
        elif (len(episodes) - job["expert"]) % 3 == 2:  # every third one goes wrong
            history = roll_out(env, policy(), rng, 150, 0.1, wrong_from=rng.integers(10, 60))
        else:
            noise = rng.uniform(0.3, 1.5)
            history = roll_out(env, policy(), rng, 150, noise, rng.choice([0.0, 0.3, 0.7]))
        poses, rewards, successes = zip(*history)
        if not mixed and not any(successes):
            continue
        steps = np.linspace(0, len(history) - 1, job["frames"]).round().astype(np.int16)
        pictures = [draw(renderer, env.data, poses[step]) for step in steps]
        # Success may flicker: a flag is True if any step after the last kept one, up to this one,
        # succeeded. A short episode keeps a step twice: then min() looks at that step again.
        last = -1
        success = []
        for step in steps:
            success.append(any(successes[min(last + 1, step):step + 1]))
            last = step
        episodes.append({
            "task": task, "source": "mixed" if mixed else "expert", "seed": seed, "steps": steps,
            "rewards": np.float32(rewards)[steps], "success": success,
            "strip": pack_pictures(pictures)})
    renderer.close()
    return assign_splits(episodes)

def assign_splits(episodes: list[dict]) -> list[dict]:
    """Give each episode of one task its split. Experts: 60 % train, 15 % validation (not used here,
    for choices of yours), 25 % test. Mixed: 1/3 validation, 2/3 test. Unseen tasks: all test."""
    for source, train_until, validation_until in (("expert", 0.6, 0.75), ("mixed", 0, 1 / 3)):
        group = [episode for episode in episodes if episode["source"] == source]
        for i, episode in enumerate(group):
            place = i / len(group)
            episode["split"] = "test"
            if group_of(episode["task"]) == "seen" and place < validation_until:
                episode["split"] = "train" if place < train_until else "validation"
    return episodes

def collect(args):
    """Write episodes of args.tasks to args.data: the same bytes for any number of workers."""
    known = sorted(load_instructions(args.instructions))
    tasks = list(dict.fromkeys(args.tasks)) or known  # without repeats
    if not set(tasks) <= set(known):
        raise InputError(f"not all of {tasks} are tasks; there are {', '.join(known)}")
    args.data.parent.mkdir(parents=True, exist_ok=True)
    open(args.data, "xb").close()  # if it exists, or cannot be written, fail before the work
    args.data.unlink()
    jobs = [dict(vars(args), task=task) for task in tasks]
    with ProcessPoolExecutor(
            max_workers=min(args.workers, len(tasks)),
            # A forked process would inherit a broken graphics library. Workers ignore Ctrl-C.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        collected = tqdm(pool.map(collect_task, jobs), "collecting", len(tasks))
        episodes = sum(collected, [])
    write_dataset(args.data, episodes)
    print(f"wrote {len(episodes)} episodes of {len(tasks)} tasks to {args.data}")

def write_dataset(path, episodes: list[dict]):
    """Write episodes as one npz file. An episode has the fields of PER_EPISODE and PER_PICTURE, and
    "strip", its packed pictures. Raises InputError if they make no valid data set."""
    arrays = {}
    for name in (*PER_EPISODE, *PER_PICTURE):
        arrays[name] = np.array([episode[name] for episode in episodes])
    strips = [episode["strip"] for episode in episodes]
    arrays["offsets"] = np.cumsum([0, *map(len, strips)])
    arrays["strips"] = np.frombuffer(b"".join(strips), np.uint8)
    unfinished = Path(f"{path}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        Dataset(unfinished)  # the checks of any data set
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

class Dataset:
    """The episodes of one npz file: E episodes of T pictures, S x S pixels each.
    task, split, source, seed   (E,) names, "train"/"validation"/"test", "expert"/"mixed", integer
    rewards, success, steps     (E, T) simulator's reward (0 to 10), success flag, step index
    offsets, strips             (E + 1,) and bytes: strips[offsets[e]:offsets[e + 1]] is episode e's
    """
    def __init__(self, path):
        self.path = Path(path)
        with reading(path), np.load(path, allow_pickle=False) as file:  # a pickle could run code
            for name in ("offsets", "strips", *PER_EPISODE, *PER_PICTURE):
                setattr(self, name, file[name])
            self.E, self.T = self.rewards.shape
            self.check()

    def check(self):
        """Raise ValueError for what is no data set."""
        for name, kinds in (PER_EPISODE | PER_PICTURE).items():
            array = getattr(self, name)
            shape = (self.E, self.T) if name in PER_PICTURE else (self.E,)
            if array.dtype.kind not in kinds or array.shape != shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}")
        splits = np.isin(self.split, ("train", "validation", "test"))
        if not splits.all() or not np.isin(self.source, ("expert", "mixed")).all():
            raise ValueError("unknown split or source")
        if self.T < 5 or not np.isfinite(self.rewards).all():
            raise ValueError("fewer than 5 pictures of an episode, or a reward is not finite")
        self.S = self.strip(0).width
        for e in range(self.E):
            strip = self.strip(e)
            if strip.size != (self.S, self.T * self.S) or strip.mode != "RGB":
                raise ValueError(f"not every strip has {self.T} square pictures of {self.S} pixels")

    def strip(self, e: int):
        """The strip of one episode. PIL reads its size, and unpacks the pixels when needed."""
        e = range(self.E)[e]  # -1 is the last one
        packed = self.strips[self.offsets[e]:self.offsets[e + 1]]
        return Image.open(io.BytesIO(packed.tobytes()), formats=["WEBP"])

    def pictures(self, e: int):
        """The pictures of one episode, uint8 (T, S, S, 3). Raises InputError if it is damaged."""
        with reading(self.path):
            return np.asarray(self.strip(e)).reshape(self.T, self.S, self.S, 3)

    def load(self, episodes):
        """The pictures of N episodes, unpacked by all cores: uint8 (N, T, S, S, 3)."""
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(self.pictures, episodes)))

    def select(self, **wanted):
        """Indices of the episodes that match: select(split="test", source="expert")."""
        matches = np.full(self.E, True)
        for name, value in wanted.items():
            matches &= getattr(self, name) == value
        return np.flatnonzero(matches)

# 2. The CLIP backbone --------------------------------------
# CLIP is two towers: one maps a picture to a vector, the other a sentence, both in one space. The
# reward of a picture is the cosine of its vector and the instruction's. That is the whole reward
# model; an objective only decides where the vectors go. All have unit length, so that no objective
# can win by scale: cosine, dot product and distance say the same, |a - b|^2 = 2 - 2 cos(a, b).
# TINY is ours (the paper fine-tunes SigLIP2). It was pre-trained on captioned pictures of drawers,
# doors and mugs in random states (data/study/scenes.py), but on no instruction, on no robot at
# work, and on no environment of the ten unseen tasks. (Eight of these have the same furniture as a
# seen one: door-open and door-close have one door.) Training starts from there.

TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 4096, "width": 128, "heads": 2, "layers": 1},
}

def tiny_tokenizer():
    """CLIP's own tokenizer, cut to a vocabulary of 4,096: rare words fall into more pieces."""
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    # 4,096 = 256 bytes + 256 bytes at the end of a word + merges + the marks of start and end.
    merges = 4096 - 2 * 256 - 2
    ranks = tokenizer.bpe_ranks.items()
    tokenizer.bpe_ranks = {pair: rank for pair, rank in ranks if rank < merges}
    # CLIP's vector of a sentence is its output at the largest id: that must be the end mark.
    tokenizer.sot_token_id = 4094
    tokenizer.eot_token_id = 4095
    return tokenizer

class RewardModel(nn.Module):
    """A CLIP model, its tokenizer, and the mean and std of its colours, (3,), 0 to 1."""
    def __init__(self, clip, tokenizer, mean, std):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.low_precision = False  # see prepare_model()
        self.last_text = None  # see score()
        self.size = int(np.max(clip.visual.image_size))
        # The pixels are 0 to 255.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def encode(self, tower, inputs: torch.Tensor):
        """Outputs of a tower as unit vectors, float32, whatever precision the tower ran in."""
        device = self.mean.device.type
        # For speed alone: on a CPU plain attention trains faster than the fused kernel.
        plain = device == "cpu" and torch.is_grad_enabled()
        attention = sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=self.low_precision), attention:
            return F.normalize(tower(inputs).float(), dim=-1)

    def embed_frames(self, pictures: np.ndarray):
        """uint8 pictures (..., H, W, 3), stretched to the model's size -> unit vectors (..., D)."""
        *shape, height, width, _ = pictures.shape
        most = 10**9  # pictures a pass: all in training, as gradients keep them all anyway
        if not torch.is_grad_enabled():  # few, to save memory
            most = max(1, min(120, 6_000_000 // (height * width)))
        square = (self.size, self.size)
        frames = []
        for part in torch.tensor(pictures, device="cpu").reshape(-1, height, width, 3).split(most):
            pixels = part.to(self.mean.device).permute(0, 3, 1, 2).contiguous().float()
            if pixels.shape[2:] != square:  # (N, 3, H, W)
                pixels = F.interpolate(pixels, square, mode="bilinear", antialias=True)
            pixels = pixels.sub_(self.mean).div_(self.std).to(self.mean.dtype)
            frames.append(self.encode(self.clip.encode_image, pixels))  # (N, D)
        return torch.cat(frames).view(*shape, -1)

    def embed_texts(self, sentences: list[str]):
        """M sentences -> unit vectors (M, D), float32."""
        with torch.device("cpu"):  # whatever the caller's default is
            tokens = self.tokenizer(sentences)
        return self.encode(self.clip.encode_text, tokens.to(self.mean.device))

    def check_sentence(self, sentence: str):
        """Raise InputError for what is no sentence, or is too long, if the tokenizer can tell."""
        if not isinstance(sentence, str) or not sentence.strip() or not sentence.isprintable():
            raise InputError(f"{sentence!r} is no sentence")
        if hasattr(self.tokenizer, "encode"):
            ids = self.tokenizer.encode(sentence)
            room = self.clip.context_length - 2  # without the marks of start and end
            if not 0 < len(ids) <= room:
                raise InputError(f"{sentence[:40]!r} has {len(ids)} word pieces, of which this "
                                 f"backbone reads 1 to {room}")
            if max(ids) >= len(self.tokenizer.encoder) - 2:
                raise InputError(f"{sentence[:40]!r} has the tokenizer's own marks in it")

    @torch.inference_mode()
    def score(self, pictures: np.ndarray, sentence: str):
        """Rewards of uint8 pictures (N, H, W, 3) of any size under one sentence: cosines, (N,).
        Compare rewards under the same sentence alone. Raises InputError."""
        try:
            pictures = np.ascontiguousarray(pictures)
        except ValueError:  # a list of pictures of several sizes
            pictures = np.array(None)  # refused below
        if pictures.dtype != np.uint8 or pictures.shape[3:] != (3,) or not pictures.size:
            raise InputError("pictures must be uint8 (N, H, W, 3), red green blue, 0 to 255; these "
                             f"are {pictures.dtype} {pictures.shape}")
        # Embed a sentence once, as long as the weights that do it have the same sums.
        sums = [weight.sum() for name, weight in self.clip.named_parameters()
                if not name.startswith("visual")]
        known = sentence, torch.stack(sums).tolist()
        last = self.last_text  # read once: another thread may change it
        if last is None or last[0] != known:
            self.check_sentence(sentence)
            last = known, self.embed_texts([sentence])[0]
            self.last_text = last
        frames = self.embed_frames(pictures)
        products = frames * last[1].to(frames.device)  # no matrix product: autocast would round it
        return products.sum(dim=-1).cpu().numpy()

def build_backbone(name: str, pretrained: str, load: bool = True):
    """tiny, or any open_clip model, with the weights of a tag of open_clip, of a file, or with
    random ones ("none", or not load: others will be put into it). Raises InputError."""
    load = load and pretrained != "none"
    if name == "tiny":
        model = RewardModel(open_clip.CLIP(**TINY), tiny_tokenizer(), [0.5] * 3, [0.5] * 3)
        if load:
            with reading(pretrained):
                put_weights(model, load_file(pretrained))
        return model
    try:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not pretrained:  # random weights are never a silent choice
            raise ValueError(f"choose --pretrained: a file, none, {', '.join(tags)}")
        known = open_clip.get_pretrained_cfg(name, pretrained)  # {} of a file
        activation = known.get("quick_gelu", False)  # the one that these weights were trained with
        clip = open_clip.create_model(
            name, pretrained if load else None, force_quick_gelu=activation)
        tokenizer = open_clip.get_tokenizer(name)
        if not known:  # how to normalise colours? As for the first weights listed
            known = open_clip.get_pretrained_cfg(name, next(iter(tags), ""))
        mean = known.get("mean") or open_clip.OPENAI_DATASET_MEAN
        std = known.get("std") or open_clip.OPENAI_DATASET_STD
        return RewardModel(clip, tokenizer, mean, std)
    except Exception as problem:  # hubs fail in many ways
        raise InputError(f"cannot load {name} / {pretrained}: {str(problem)[:250]}. Without a "
                         "network, --pretrained takes a file") from None

class LoRA(nn.Module):
    """A low-rank adapter: a large matrix W (m, n) is frozen and becomes W + B A. Only A (rank, n)
    and B (m, rank) are trained, few numbers. B starts at 0: the model starts as it was. Source:
    2106.09685. Differs: no factor alpha / rank."""
    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor):
        return weight + self.B @ self.A

def add_lora(model, rank: int):
    """Freeze the model. From now on each nn.Linear or attention matrix W in it is read as W + B A:
    a parametrization computes that whenever W is asked for."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        # MultiheadAttention packs queries, keys and values into one matrix, which is no nn.Linear.
        packed = isinstance(module, nn.MultiheadAttention)
        if packed or isinstance(module, nn.Linear):
            name = "in_proj_weight" if packed else "weight"
            adapter = LoRA(getattr(module, name), rank)
            parametrize.register_parametrization(module, name, adapter)

def merge_lora(model):
    """Put W + B A in the place of W and take the adapters off: the same rewards in less time."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name)

def trained_weights(model) -> dict[str, torch.Tensor]:
    """The state of the model without what is frozen: all that a run has to remember."""
    state = model.state_dict()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            del state[name]
    return {name: weight.cpu().contiguous() for name, weight in state.items()}

def put_weights(model, weights: dict[str, torch.Tensor]):
    """The inverse of trained_weights(). Raises ValueError if not this model's, or not finite."""
    strange = set(weights).symmetric_difference(trained_weights(model))
    if strange:
        raise ValueError(f"{len(strange)} weights too many or missing, such as {min(strange)}")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite")
    model.load_state_dict(weights, strict=False)

# 3. The learning objectives --------------------------------
# An objective says which of these vectors should be closer, and which farther apart. Four ideas:
#     order in a video        a later frame beats an earlier      triplet, r3m
#     videos and sentences    the right pair beats wrong ones     liv, r3m
#     distance in time        near in time is near in space       tcn, r3m
#     value                   how many steps are left to go?      vip, liv
# These five are the paper's. More are in data/objectives/, one a file. TCN and VIP see no sentence:
# the reward under test, the cosine with a sentence, changes only by accident. As in the paper they
# are tested by it all the same: what do pictures alone teach?
# Each gets the same batch, B videos of B different tasks and K = 5 frames of each, and returns one
# number, a scalar tensor:
#     frames  (B, K, D)   unit vectors of the frames start < now < next = now + 1 < later < end
#     texts   (B, D)      unit vectors of the instructions
#     times   (B, K)      share of the episode that has passed at each frame, 0 to 1
# The five do not need times; some in data/objectives/ do. A loss that has a fourth parameter,
# `before`, also gets (frames, texts) of the untrained model.
# In the equations o is a frame, l its instruction, t the time, cos(a, b) a cosine, |a - b| a
# Euclidean distance. The papers have other names for the five frames:
#     VIP, LIV    o0 = start, o = now, o' = next, og = end (the goal)
#     TCN, R3M    s0 = now, s1 = later, s2 = end
# CE(M) is the mean over the rows i of -log softmax(M_i)_i; eps = 1e-8 keeps logarithms finite;
# means are over the batch.
#
# Default constants are the authors' (VIP's scale and triplet's margin are ours): with them a loss
# returns what their code returns, value and gradient (data/tests/golden/). Our runs use the
# constants in OBJECTIVES instead. The authors' batches of R3M and LIV have a sixth frame: hence
# [:, :5] and [:, -1] below.

LOG_EPS = math.log(1e-8)  # -18.4

def cosine(a: torch.Tensor, b: torch.Tensor):
    """cos(a, b) over the last dimension; the others broadcast."""
    return F.cosine_similarity(a, b, dim=-1)

def negative_distance(a: torch.Tensor, b: torch.Tensor):
    """-|a - b| over the last dimension (not squared): the similarity of R3M and VIP."""
    return -torch.linalg.vector_norm(a - b, dim=-1)

def negative_permutations(n: int, batch: int):
    """Cyclic shifts by 1, 2, ... places: (min(n, B - 1), B). No video meets itself. Which others it
    meets is chance, as a batch comes in random order."""
    shifts = torch.arange(1, min(n, batch - 1) + 1)
    return (torch.arange(batch) + shifts[:, None]) % batch

def triplet_loss(frames, texts, times, margin: float = 0.1):
    """Triplet: of two frames, the later one is closer to the instruction, by a margin.
        L = mean over pairs early < late of max(0, margin - cos(late, l) + cos(early, l))
    Notice: only order counts. There is no wrong sentence: nothing ties a sentence to its task.
    Source: the baseline of 2512.20675, in a form of ours, as we have not seen theirs: all ten
    pairs. Uses cosine().
    """
    reward = cosine(frames, texts[:, None])  # (B, K)
    early, late = torch.triu_indices(frames.shape[1], frames.shape[1], offset=1)
    return F.relu(margin - reward[:, late] + reward[:, early]).mean()

def info_nce(scores: torch.Tensor):
    """1/2 [CE(M) + CE(M^T)] of M (..., B, B): each row and each column finds its diagonal."""
    rows = -scores.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)
    columns = -scores.log_softmax(dim=-2).diagonal(dim1=-2, dim2=-1)
    return (rows + columns).mean() / 2

def softmax_loss(positive: torch.Tensor, negatives: list[torch.Tensor]):
    """-log(eps + p), p = exp(pos) / (eps + exp(pos) + sum exp(neg)), elementwise: (B,). As eps is
    exp(LOG_EPS), it is one more logit in both sums: no exp() ever overflows."""
    floor = torch.full_like(positive, LOG_EPS)
    logits = torch.stack([positive, *negatives, floor])  # (2 + negatives, B)
    log_p = positive - torch.logsumexp(logits, dim=0)
    return -torch.logaddexp(log_p, floor)

def tcn_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3):
    """TCN, time-contrastive: frames close in time are close, far in time far, other videos far.
        L = mean of two softmax_loss() of -|a - b| / temp;  s0, s1, s2 = now, later, end:
            (s2, s1) beats (s2, s0) and (s2, others' s2)
            (s1, s0) beats (s2, s0) and (s0, others' s0)
    Notice: no sentence. TCN's own reward would be -|o - og|, which needs a picture of the goal.
    Source: Sermanet et al., 1704.06888, as in R3M's code (r3m/trainer.py). Differs: there s2 need
    not be the end. Uses softmax_loss(), negative_distance() and negative_permutations().
    """
    def similarity(a, b):  # (B,)
        return negative_distance(a, b) / temperature

    _, s0, _, s1, s2 = frames[:, :5].unbind(1)
    perms = negative_permutations(negatives, len(frames))
    others_0 = [similarity(s0, s0[perm]) for perm in perms]
    others_2 = [similarity(s2, s2[perm]) for perm in perms]
    late = softmax_loss(similarity(s2, s1), [similarity(s2, s0), *others_2])
    early = softmax_loss(similarity(s1, s0), [similarity(s2, s0), *others_0])
    return (late + early).mean() / 2

def norm_penalty(frames: torch.Tensor, l1: float, l2: float):
    """l1 mean |x|_1 + l2 mean |x|_2 over all embeddings. With unit norm the l2 part is constant: it
    is here so that the value is the authors'."""
    norm_1 = frames.abs().sum(-1)
    norm_2 = torch.linalg.vector_norm(frames, dim=-1)
    return (l1 * norm_1 + l2 * norm_2).mean()

def r3m_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3,
             l1: float = 1e-5, l2: float = 1e-5):
    """R3M: TCN, and under the instruction a later frame beats an earlier one and other videos.
        L = L_tcn + mean of three softmax_loss() of scores cos(o, l) / temp + l1 |x|_1 + l2 |x|_2:
            end beats start and others' end, all under the SAME l
            s1 beats s0 and others' s1, s2 beats s1 and others' s2
    Notice: only the sentence says which video is right, so the model must keep reading it. Source:
    Nair et al., 2203.12601, r3m/trainer.py. Differs: there an MLP over first frame, frame and
    DistilBERT, here the cosine; s2 = end, unless a sixth frame is the end. Uses tcn_loss(),
    softmax_loss(), cosine(), norm_penalty() and negative_permutations().
    """
    start, s0, _, s1, s2 = frames[:, :5].unbind(1)
    end = frames[:, -1]
    language = 0
    for positive, negative in ((end, start), (s1, s0), (s2, s1)):
        perms = negative_permutations(negatives, len(frames))
        rivals = [negative] + [positive[perm] for perm in perms]
        score = cosine(positive, texts) / temperature  # (B,)
        rival_scores = [cosine(rival, texts) / temperature for rival in rivals]
        language = language + softmax_loss(score, rival_scores) / 3
    has_text = texts.any(dim=-1)  # (B,): in the official batches zeros mean "no sentence"
    tcn = tcn_loss(frames, texts, times, temperature, negatives)
    used = torch.stack([start, s0, s1, s2, end])
    return tcn + (has_text * language).mean() + norm_penalty(used, l1, l2)

def implicit_value_loss(value, start, now, next_, goal, gamma: float, perms):
    """The core of VIP and LIV. A value V(o; og) is about minus the steps left from o to the goal
    og. Each costs 1: V(o) = -1 + gamma V(o'), gamma < 1: far ones cost less. o0, o, o' = start,
    now, next.
        L = (1 - gamma) mean -V(o0; og) + log(eps + mean exp(1 + V(o; og) - gamma V(o'; og)))
            [ + the same second term over other videos' (o, o') under this goal ]
    The second term punishes V(o) > -1 + gamma V(o'), a step that seems to cost less than 1; log
    mean exp is a soft maximum: the worst steps count most. As it alone could be met by lowering all
    V for ever, the first term pulls V up at the start. value(o, goal) gives V; perms (n, B).
    Derived in 2210.00030. Uses LOG_EPS.
    """
    def step_penalty(now, next_):
        residual = 1 + value(now, goal) - gamma * value(next_, goal)
        log_mean = torch.logsumexp(residual.flatten(), dim=0) - math.log(residual.numel())
        return torch.logaddexp(log_mean, log_mean.new_tensor(LOG_EPS))

    loss = (1 - gamma) * -value(start, goal).mean() + step_penalty(now, next_)
    if len(perms):
        loss = loss + step_penalty(now[perms], next_[perms])
    return loss

def vip_loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.98, negatives: int = 3,
             l1: float = 1e-3, l2: float = 1e-3):
    """VIP: the distance to the goal image shrinks with every step, learnt as a value function.
        L = implicit_value_loss(V) + l1 |x|_1 + l2 |x|_2,  V(o; og) = -scale |o - og|
    Notice: no sentence. Unit vectors are 2 apart at most, while a goal 23 frames away, the most in
    our data, should get V = -(1 + .98 + ... + .98^22) = -18.6: so scale, which is ours. Source: Ma
    et al., 2210.00030, vip/trainer.py. Differs: the goal ends the episode, not a part of it. Uses
    implicit_value_loss(), negative_distance(), norm_penalty() and negative_permutations().
    """
    def value(frame, goal):
        return scale * negative_distance(frame, goal)

    start, now, next_, _, end = frames.unbind(1)
    perms = negative_permutations(negatives, len(frames))
    loss = implicit_value_loss(value, start, now, next_, end, gamma, perms)
    return loss + norm_penalty(torch.stack([start, end, now, next_]), l1, l2)

def liv_loss(frames, texts, times, temperature: float = 1.0, gamma: float = 0.98,
             language_weight: float = 0.0, negatives: int = 0):
    """LIV: VIP and CLIP in one space, so that an instruction could stand where the goal image does.
        L = info_nce(M) + implicit_value_loss(V; goal og) + w_lang implicit_value_loss(V; goal l),
        V(o; og) = cos(o, og) / (1 - gamma),  M_ij = cos(og_i, l_j) / temp
    Notice: with the official w_lang = 0 a sentence meets the end of its video and no other frame.
    V = cos / .02, from -50 to 50, no longer counts steps. That is the authors' choice.
    Source: Ma et al., 2306.00958, liv/trainer.py, finetune.yaml. Differs: only in how the batch is
    drawn. Uses implicit_value_loss(), info_nce(), cosine() and negative_permutations().
    """
    def value(frame, goal):
        return cosine(frame, goal) / (1 - gamma)

    start, now, next_, _, end = frames[:, :5].unbind(1)
    perms = negative_permutations(negatives, len(frames))
    last = frames[:, -1]
    loss = info_nce(cosine(last[:, None], texts) / temperature)  # (B, B)
    loss = loss + implicit_value_loss(value, start, now, next_, end, gamma, perms)
    if language_weight:
        by_text = implicit_value_loss(value, start, now, next_, texts, gamma, perms)
        loss = loss + language_weight * by_text
    return loss

def cosine_reward(frames: torch.Tensor, text: torch.Tensor):
    """The reward under test, of unit vectors: frames (E, T, D), text (D,) -> (E, T)."""
    return frames @ text

# {name: (loss, learning rate, constants, does it read the sentence?)}. For triplet, r3m and liv the
# best of four settings, on 13 of the 40 tasks, left out of training for that (data/study/trial.py).
# tcn and vip, which read no sentence, have what an earlier study chose, from another start.
OBJECTIVES = {
    "triplet": (triplet_loss, 4e-3, {"margin": 0.2}, True),
    "tcn": (tcn_loss, 2e-3, {"temperature": 0.1}, False),
    "r3m": (r3m_loss, 2e-3, {"temperature": 0.03, "negatives": 3}, True),
    "vip": (vip_loss, 2e-3, {"scale": 20.0}, False),
    "liv": (liv_loss, 4e-3, {"temperature": 1.0, "language_weight": 1.0}, True),
    "zeroshot": (None, 1e-3, {}, True),  # the backbone as it is: no rate is used
}

# 4. The training loop --------------------------------------
# A step: draw a batch, embed it, ask the objective for its number, move the weights. The learning
# rate climbs first, while AdamW's averages are new, and falls to 0, so that the last steps settle.

def training_episodes(data: Dataset) -> dict[str, list[int]]:
    """The episodes to train on, {task: their numbers}. Raises InputError if there are none."""
    episodes = {}
    for e in data.select(split="train", source="expert"):
        if group_of(data.task[e]) == "seen":
            episodes.setdefault(data.task[e], []).append(e)
    if not episodes:
        raise InputError(f"{data.path} has no experts of seen tasks to train on")
    return dict(sorted(episodes.items()))

def sample_batch(episodes: dict[str, list], T: int, rng, batch: int):
    """A video each of `batch` tasks, by default one of each of the forty, and five frames of each:
    numbers of episodes (B,), of their frames (B, 5). Start and end are of the first and last fifth
    (R3M), next follows now (VIP). With fewer tasks than videos some repeat: then R3M and LIV meet
    another video with the same sentence, call it wrong, and learn less."""
    repeat = batch > len(episodes)
    tasks = rng.choice(list(episodes), size=batch, replace=repeat)
    fifth = max(T // 5, 1)
    frame_ids = []
    for _ in tasks:
        start = rng.integers(0, fifth)
        end = rng.integers(T - fifth, T)
        now = rng.integers(start + 1, end - 2)
        later = rng.integers(now + 2, end)
        frame_ids.append([start, now, now + 1, later, end])
    return np.array([rng.choice(episodes[task]) for task in tasks]), np.array(frame_ids)

def rate_at(step: int, steps: int, peak: float):
    """The learning rate of a step, from 1 to steps: a line up, a cosine down."""
    rise = step / max(1, steps // 10)
    fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
    return peak * min(rise, fall)

def takes_before(loss):
    """Whether a loss asks for the embeddings before training."""
    return "before" in inspect.signature(loss).parameters

def train(model: RewardModel, data: Dataset, instructions: dict, loss_function, config: dict,
          labels: str = "times", saved=None) -> list[dict]:
    """Train the model in place, by seed, steps, batch and learning_rate of config: the same bits on
    the same CPU and number of threads. labels: what the loss gets, "times" or "rewards". saved: a
    file to save to some ten times, and to go on from. Returns the log."""
    steps = config["steps"]
    rng = np.random.default_rng(config["seed"])
    episodes = training_episodes(data)
    videos = {}
    for chosen in episodes.values():
        videos.update(zip(chosen, data.load(chosen)))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    fused = model.mean.device.type != "mps"  # faster, where it exists
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01, fused=fused)
    untrained = copy.deepcopy(model).eval() if takes_before(loss_function) else None
    log = []
    if saved and saved.exists():
        log = load_checkpoint(saved, model, optimizer, rng, config)

    model.train()
    bar = tqdm(range(len(log) + 1, steps + 1), "training", steps, initial=len(log))
    for step in bar:
        episode_ids, frame_ids = sample_batch(episodes, data.T, rng, config["batch"])
        pictures = np.stack([videos[e][ids] for e, ids in zip(episode_ids, frame_ids)])
        sentences = [instructions[task]["instruction"] for task in data.task[episode_ids]]
        times = frame_ids / (data.T - 1)
        if labels == "rewards":
            times = data.rewards[episode_ids[:, None], frame_ids]
        times = torch.tensor(times).float().to(model.mean.device)
        frames = model.embed_frames(pictures)  # (B, 5, D)
        texts = model.embed_texts(sentences)  # (B, D)
        extra = {}
        if untrained:
            with torch.no_grad():
                extra["before"] = (untrained.embed_frames(pictures),
                                   untrained.embed_texts(sentences))
        loss = loss_function(frames.clone(), texts.clone(), times, **extra)  # may write into them

        optimizer.zero_grad(set_to_none=True)
        backward(loss, texts, weights, step, config)
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, config["learning_rate"])
        optimizer.step()

        with torch.no_grad():  # how often the reward rose from one frame to the next
            ordered = (cosine(frames, texts[:, None]).diff(dim=1) > 0).float().mean().item()
        log.append({"step": step, "loss": loss.item(), "ordered": ordered})
        bar.set_postfix(loss=f"{loss.item():.3f}", ordered=f"{ordered:.2f}", refresh=False)
        if saved and (step % max(1, steps // 10) == 0 or step == steps):
            save_checkpoint(saved, model, optimizer, rng, log, config)
    return log

def backward(loss, texts: torch.Tensor, weights: list, step: int, config: dict):
    """Give the weights their gradients. Raises InputError if these are none, or not finite."""
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        raise InputError("the loss must be one number, a tensor made of the embeddings")
    texts.retain_grad()  # loss.backward() leaves a gradient there if the loss has read the texts
    loss.backward()
    if texts.grad is None and config.get("cosine"):
        raise InputError("the loss does not read the texts, so the reward, their cosine with the "
                         "frames, is not trained. If you mean it, its file needs COSINE = False")
    norm = nn.utils.clip_grad_norm_(weights, 1.0)  # tames the odd batch
    if not (loss + norm).isfinite():
        raise InputError(f"step {step}: the loss is {loss.item()}, its gradient {norm.item()}; "
                         "try a lower --learning-rate")
    if step == 1 and norm == 0:
        raise InputError("there is nothing to learn: the gradient of the first step is 0; try a "
                         "larger --batch")

def save_checkpoint(path, model, optimizer, rng, log: list[dict], config: dict):
    """Write all that the next step depends on (on a CPU), and the configuration of the run."""
    state = {"config": config, "log": log, "weights": trained_weights(model),
             "optimizer": optimizer.state_dict(), "numpy": rng.bit_generator.state,
             "torch": torch.get_rng_state()}
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getvalue())

def load_checkpoint(path, model, optimizer, rng, config: dict) -> list[dict]:
    """Put all of it back where save_checkpoint() found it. Returns the log."""
    with reading(path):
        if zipfile.ZipFile(path).testzip():  # a checksum in it does not fit
            raise ValueError("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != config:
            raise ValueError("it belongs to another run")
        put_weights(model, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["numpy"]
        torch.set_rng_state(state["torch"])
        return state["log"]

# 5. The evaluation metrics ---------------------------------
# Does the reward rise while an expert works (VOC)? Does it order pictures as the simulator's does
# (ranking accuracy)? Does it read (paraphrases, retrieval, opposites)? A clock, a reward that only
# knows how much time has passed, gets .8 in ranking within episodes: even a failing arm mostly gets
# closer. So we compare two episodes at the SAME time, too. There a clock ties, and gets .5.
# `predicted` is the model's reward, `true_reward` the simulator's: (E, T), of one task's episodes.

METRICS = {  # name in metrics.json: (what it is, the value of a reward that knows nothing)
    "voc": ("VOC: order of experts' frames", 0.0),
    "voc_paraphrase": ("VOC under unseen paraphrases", 0.0),
    "voc_opposite": ("VOC under the opposite sentence", 0.0),
    "opposite_gap": ("VOC minus VOC of the opposite", 0.0),
    "ranking_accuracy_within": ("ranking accuracy within episodes", 0.5),
    "ranking_accuracy_same_time": ("ranking accuracy at the same time", 0.5),
    "ranking_accuracy_across": ("ranking accuracy across episodes", 0.5),
    "success_auroc": ("success beats failure (AUROC)", 0.5),
    "retrieval_top1": ("the end prefers its own text", 0.02),  # of 50
}

FEWEST_PAIRS = 50  # at the same time: with fewer a task has no such ranking accuracy

def value_order_correlation(predicted: np.ndarray):
    """VOC: Spearman correlation of rewards (..., T) with time: (...,). Ties share their rank, a
    constant gets 0. Source: GVL, 2411.04549, and OpenGVL's code."""
    T = predicted.shape[-1]
    ranks = scipy.stats.rankdata(predicted, axis=-1) - (T + 1) / 2
    centred_time = np.arange(T) - (T - 1) / 2
    norm = np.sqrt((ranks**2).sum(-1) * (centred_time**2).sum())
    return np.divide(ranks @ centred_time, norm, out=np.zeros_like(norm), where=norm != 0)

def worse_frames(true_reward: np.ndarray, pairs: str = "within", threshold: float = 0.1):
    """Pairs of a frame i and a worse one j, of rewards (E, T): bool (E T, E T). pairs: "within" an
    episode, "across" different ones, or at the "same_time" of different ones. Worse: its true
    reward is lower by more than the threshold, which is our choice."""
    # As columns (E T, 1): a column against its transpose compares row i with column j, all pairs.
    episode, frame = np.indices(true_reward.shape).reshape(2, -1, 1)
    r = np.float64(true_reward).reshape(-1, 1)
    same_episode = episode == episode.T
    kinds = {"within": same_episode, "across": ~same_episode,
             "same_time": ~same_episode & (frame == frame.T)}
    return kinds[pairs] & (r.T < r - threshold)

def ranking_accuracy(predicted: np.ndarray, true_reward: np.ndarray, pairs: str = "within",
                     threshold: float = 0.1):
    """Share of the pairs of worse_frames() that are put in the right order; ties count half. Both
    (E, T) -> 0 to 1, NaN without pairs or if a reward is NaN. Uses worse_frames()."""
    worse = worse_frames(true_reward, pairs, threshold)
    p = predicted.reshape(-1, 1)  # (E T, 1)
    if not worse.any() or np.isnan(p).any() or np.isnan(true_reward).any():
        return math.nan
    right = (p > p.T)[worse].sum() + (p == p.T)[worse].sum() / 2
    return right / worse.sum()

def reading_metrics(under: np.ndarray, own: int, opposite: int) -> dict[str, float]:
    """Order and reading of a task's experts. under (M + 3, E, T): the experts' rewards under each
    of the M instructions, then under the task's 3 paraphrases. own, opposite: the rows of its
    instruction and of the opposite one (own again if there is none: then NaN). Uses
    value_order_correlation().
    """
    ends = under[:-3, :, -1]  # (M, E)
    first = (ends >= ends[own]).sum(0) == 1  # (E,): the own one, alone
    voc = value_order_correlation(under[[own, opposite, -3, -2, -1]]).mean(1)  # (5,)
    voc_opposite = voc[1] if opposite != own else math.nan
    return {"voc": voc[0], "voc_paraphrase": voc[2:].mean(), "voc_opposite": voc_opposite,
            "opposite_gap": voc[0] - voc_opposite,
            "retrieval_top1": first.mean() if len(ends) > 1 else math.nan}

def paired_p_value(scores: np.ndarray, reference: np.ndarray):
    """Do two objectives differ over the same tasks (n,)? If only chance set them apart, each task's
    difference could as well have the other sign: p is the share of all such flips whose mean is as
    far from 0. If there are more than 9,999, so many random ones are drawn."""
    differences = np.subtract(scores, reference)
    if np.isnan(differences).any():
        return math.nan
    flips = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=9999,
        random_state=0)
    return float(flips.pvalue)

@torch.inference_mode()
def evaluate(model: RewardModel, data: Dataset, instructions: dict, reward=cosine_reward):
    """All metrics on the test episodes. Returns what average_over_tasks() does, and "predicted":
    {number of an episode: its rewards}, "sentences": M. A reward() with a third parameter, `embed`,
    gets a function that embeds sentences. Raises InputError."""
    model.eval()
    sentences = distinct_sentences(instructions)
    texts = model.embed_texts(sentences).cpu()  # (M, D)
    if "embed" in inspect.signature(reward).parameters:
        reward = functools.partial(reward, embed=lambda some: model.embed_texts(some).cpu())
    judge = functools.partial(evaluate_task, model, data, instructions, reward, texts)
    tasks = sorted(set(data.task[data.split == "test"].tolist()))

    # Small matrix products do not keep many cores busy: judge tasks side by side, few cores each.
    cores = torch.get_num_threads()
    workers = 1 if model.mean.device.type == "mps" else min(4, cores)
    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(cores // workers,))
    scores = {}
    predicted = {}
    with pool, parametrize.cached():  # W + B A is computed once
        judged = tqdm(pool.map(judge, tasks), "evaluating", len(tasks), leave=False)
        for task, (scored, rewards) in zip(tasks, judged):
            scores[task] = scored
            predicted.update(rewards)
    report = average_over_tasks(scores)
    report["predicted"] = dict(sorted(predicted.items()))
    report["sentences"] = len(sentences)
    return report

@torch.inference_mode()  # again: it holds for one thread
def evaluate_task(model, data, instructions, reward, texts, task: str) -> tuple[dict, dict]:
    """{metric: score} of a task, and {an episode's number: its rewards}."""
    episodes = data.select(split="test", task=task)
    truth = data.rewards[episodes]
    expert = data.source[episodes] == "expert"
    pictures = np.stack([data.pictures(e) for e in episodes])
    frames = model.embed_frames(pictures).cpu()  # (E, T, D)
    paraphrases = model.embed_texts(instructions[task]["paraphrases"]).cpu()

    # reward() must give (E, T). If E = T a wrong (T, E) would go unnoticed: try one episode. It
    # gets copies, in case it writes into them.
    shape = np.shape(reward(frames[:1].clone(), texts[0].clone()))
    texts = torch.cat([texts, paraphrases])  # (M + 3, D)
    under = np.stack([reward(frames.clone(), text.clone()) for text in texts])  # (M + 3, E, T)
    if shape != (1, data.T) or under.shape[1:] != frames.shape[:2] or not np.isfinite(under).all():
        raise InputError(f"rewards must be finite, (E, T); one episode of {data.T} got {shape}")

    sentences = distinct_sentences(instructions)
    own = sentences.index(instructions[task]["instruction"])
    opposite = instructions[task].get("opposite") or task
    opposite = sentences.index(instructions[opposite]["instruction"])
    p = under[own]
    ends = p[:, -1:]
    success = data.success[episodes, -1:]
    # VOC judges experts by time, "within" and "same_time" judge mixed episodes by the simulator's
    # reward, "across" all. AUROC is the ranking accuracy of last pictures, success being the truth.
    scores = reading_metrics(under[:, expert], own, opposite)
    mixed = p[~expert]
    true_mixed = truth[~expert]
    scores["ranking_accuracy_within"] = ranking_accuracy(mixed, true_mixed, "within")
    scores["pairs_same_time"] = int(worse_frames(true_mixed, "same_time").sum())
    if scores["pairs_same_time"] >= FEWEST_PAIRS:
        same_time = ranking_accuracy(mixed, true_mixed, "same_time")
        scores["ranking_accuracy_same_time"] = same_time
    scores["ranking_accuracy_across"] = ranking_accuracy(p, truth, "across")
    scores["success_auroc"] = ranking_accuracy(ends, success, "across")
    scores = {metric: score for metric, score in scores.items() if not math.isnan(score)}
    return scores, dict(zip(episodes.tolist(), p.tolist()))

def average_over_tasks(tasks: dict[str, dict]):
    """{task: {metric: score}} -> {"seen": means, "unseen": means, "tasks": what was given}. Means
    are {metric: {"value", "tasks" (how many), "interval"}}. The interval is a bootstrap: 95 % of
    the means over tasks drawn again with replacement."""
    report = {"seen": {}, "unseen": {}, "tasks": tasks}
    for group, metric in itertools.product(("seen", "unseen"), METRICS):
        scores = [found[metric] for task, found in tasks.items()
                  if group_of(task) == group and metric in found]
        if scores:
            drawn = np.random.default_rng(0).choice(scores, (1000, len(scores))).mean(1)
            report[group][metric] = {"value": np.mean(scores), "tasks": len(scores),
                                     "interval": np.quantile(drawn, [0.025, 0.975])}
    return report

# 6. A run: settings in, a folder out -----------------------
# config.json is the first file in the folder, metrics.json the last: with it a folder is whole.

# Numbers of episodes, made of seeds in collect_task(), stay below 2**32.
RANGES = {"seed": (0, 400_000), "seeds": (1, 1000), "lora": (0, 1000), "steps": (1, 10**6),
          "batch": (1, 10_000), "learning_rate": (1e-9, 1), "expert": (1, 1000), "mixed": (0, 1000),
          "frames": (5, 1000), "size": (8, 1000), "workers": (1, 1000)}

def check_numbers(numbers: dict):
    """Raise InputError for a number out of range, among the options or in a config.json."""
    for name, (least, most) in RANGES.items():
        value = numbers.get(name)
        if value is not None and not least <= value <= most:
            raise InputError(f"{name} {value} is not between {least} and {most}")
    if (numbers.get("frames") or 1) * (numbers.get("size") or 1) > 16383:
        raise InputError("--frames x --size is over 16383, the limit of WebP")

def digest(*files):
    """SHA-256 of a file, or of the names and the SHA-256 of several."""
    if len(files) == 1:
        return hashlib.sha256(Path(files[0]).read_bytes()).hexdigest()
    lines = [f"{Path(file).name} {digest(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

def to_json(content: dict):
    """A dictionary as JSON. There may be arrays in it."""
    return json.dumps(content, indent=1, default=np.ndarray.tolist).encode()

THIS_FILE = digest(__file__)  # as it is when it is run, whatever is written to it later

def deciding_files(config: dict) -> dict[str, Path]:
    """All files that decide the outcome of a run, but this one. What is no file is a name."""
    files = {}
    for name in ("objective", "pretrained", "data", "instructions"):
        path = Path(config[name] or "")
        if path.is_file() and not (name == "objective" and config[name] in OBJECTIVES):
            files[name] = path
    return files

def checksums(config: dict) -> dict[str, str]:
    """Of this file and of deciding_files(). An objective may import the files beside it: they
    count, too."""
    found = {"vlmrm.py": THIS_FILE}
    for name, path in deciding_files(config).items():
        files = [path]
        if name == "objective":
            files = sorted(file for file in path.parent.glob("[!.]*.py") if file.is_file())
        found[name] = digest(*files)
    return found

# An objective may be a reader's own file. Most of this keeps it from changing its rivals unseen.

@contextlib.contextmanager
def running(name: str):
    """Turn what goes wrong in a reader's own objective into one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as problem:
        where = name
        for call in traceback.extract_tb(problem.__traceback__):
            if call.filename == name:
                where = f"{name}, line {call.lineno}"
        if name in OBJECTIVES or isinstance(problem, InputError):
            raise
        if isinstance(problem, OSError) and where == name:  # not in the file: a full disk, say
            raise
        raise InputError(f"{where}: {type(problem).__name__}: {problem}") from problem

def is_readers_own(module):
    """Whether a module is neither Python's nor an installed package's."""
    python = Path(os.__file__).parent
    for place in (getattr(module, "__file__", None), *getattr(module, "__path__", [])):
        if place and not {"site-packages", "dist-packages"} & set(Path(place).parts):
            if python not in Path(place).parents:
                return True
    return False

@contextlib.contextmanager
def undone(path: str):
    """Undo what a reader's file does beside defining: other objectives run in this process, too.
    Raises InputError if it changes this module."""
    tables = (OBJECTIVES, METRICS, RANGES, TINY, PER_EPISODE, PER_PICTURE)
    contents = copy.deepcopy(tables)
    ours = dict(globals())
    classes = {kind: dict(vars(kind)) for kind in (RewardModel, Dataset, LoRA)}
    modules = set(sys.modules)
    folders = sys.path.copy()
    working = os.getcwd()
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        changed = [name for name in ours if globals()[name] is not ours[name]]
        globals().update(ours)
        for kind, methods in classes.items():
            for name, method in methods.items():
                if vars(kind).get(name) is not method:
                    setattr(kind, name, method)
                    changed.append(f"{kind.__name__}.{name}")
        for table, content in zip(tables, contents):
            if table != content:
                table.clear()
                table.update(content)
                changed.append("OBJECTIVES, or another table")
        sys.path[:] = folders
        os.chdir(working)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:  # another folder may have one of the same name
            if is_readers_own(sys.modules[name]):
                del sys.modules[name]
    if changed:
        raise InputError(f"{path} changes vlmrm.{changed[0]}, and so its rivals")

def get_objective(name: str):
    """What a name in OBJECTIVES, or a Python file, defines. A file has at least one of
        loss(frames, texts, times)                     see section 3
        reward(frames (E, T, D), text (D,)) -> (E, T)  under test in place of the cosine
        TUNED = (learning rate, {constant: value})     handed to the loss
        LABELS = "rewards"                             times (B, K) are the simulator's rewards
        COSINE = False                                 the loss does not read the sentence
    A loss has no memory and draws random numbers from torch alone: a run that was stopped would go
    on with others. Raises InputError."""
    if name in OBJECTIVES:
        loss, rate, constants, reads = OBJECTIVES[name]
        defined = {"loss": loss, "TUNED": (rate, constants), "COSINE": reads}
    else:
        with running(name), undone(name):
            defined = runpy.run_path(name)
        if "loss" not in defined and "reward" not in defined:
            raise InputError(f"{name} defines neither loss() nor reward()")
        if defined.setdefault("LABELS", "times") not in ("times", "rewards"):
            raise InputError(f"{name}: LABELS must be times or rewards")
        if not isinstance(defined.get("COSINE", True), bool):
            raise InputError(f"{name}: COSINE must be True or False")
        if isinstance(defined.get("loss"), nn.Module):
            raise InputError(f"{name}: nobody trains the weights of a loss. Make it a function")
    return {"loss": None, "reward": cosine_reward, "TUNED": (2e-3, {}), "LABELS": "times",
            "COSINE": "reward" not in defined, **defined}

def configuration(args, objective: str, seed: int):
    """What decides the outcome of a run: options, constants, checksums of all files involved."""
    config = {"objective": objective, "seed": seed}
    for name in ("backbone", "pretrained", "lora", "steps", "batch", "data", "instructions"):
        config[name] = getattr(args, name)
    if args.backbone == "tiny" and args.pretrained is None:
        config["pretrained"] = DATA / "tiny.safetensors"
    for name, path in deciding_files(config).items():
        config[name] = str(path.resolve())
    config["sha256"] = checksums(config)
    parts = get_objective(config["objective"])
    with running(config["objective"]):
        rate, constants = parts["TUNED"]
        for name, value in constants.items():
            if not isinstance(name, str) or type(value) not in (bool, int, float, str) or (
                    value != value):  # NaN
                raise ValueError(f"{name}: {value!r}: a constant is a plain number or a string")
        # The rates are those of adapters. All weights together want smaller steps.
        config["learning_rate"] = args.learning_rate or (rate if args.lora else rate / 4)
        config["constants"] = constants
        config["cosine"] = parts["COSINE"]
        check_numbers(config)
        return json.loads(json.dumps(config, default=os.fspath))  # as it will be read again

def claim_folder(config: dict, runs: Path) -> tuple[Path, bool]:
    """The folder of a run, runs/triplet-seed0 or -2, -3, ..., the first that is free or holds this
    very run, and whether it was free. One process alone can create the config.json in it."""
    name = f"{Path(config['objective']).stem}-seed{config['seed']}"
    for n in itertools.count(1):
        folder = runs / (f"{name}-{n}" if n > 1 else name)
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "config.json"
        with contextlib.suppress(FileExistsError):
            if not os.listdir(folder):
                with open(settings, "xb") as file:
                    file.write(to_json(config))
                return folder, True
        if settings.exists() and settings.read_bytes() == to_json(config):
            return folder, False

def prepare_model(config: dict, device: str = "auto", load: bool = True):
    """The backbone as a run starts from it, in bfloat16 where that is faster; not load: only its
    shape. Raises InputError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    if device == "auto":
        device = next(name for name in there if there[name])
    kind = str(device).partition(":")[0]
    if not there.get(kind):
        raise InputError(f"no {device} device here; --device cpu is everywhere")
    torch.manual_seed(config["seed"])  # decides the adapters' start, and random backbones
    with torch.device("cpu"):
        model = build_backbone(config["backbone"], config["pretrained"], load)
        if config["lora"]:
            add_lora(model, config["lora"])
    if kind == "cuda":
        model.low_precision = torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in older torch
        model.low_precision = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return model.to(device)

def load_reward_model(folder, device: str = "auto"):
    """The trained model of a run's folder, ready to score(pictures, sentence), or InputError."""
    settings = Path(folder, "config.json")
    config = read_json(settings)
    with reading(settings), torch.random.fork_rng():  # the caller's random numbers stay
        check_numbers(config)
        if not config["cosine"]:
            raise ValueError("it was not trained for the cosine of picture and sentence")
        load = config["lora"] > 0  # otherwise all weights are in the folder
        if load and "pretrained" in config["sha256"]:
            if not Path(config["pretrained"]).exists():  # the folder comes from elsewhere
                config["pretrained"] = str(DATA / Path(config["pretrained"]).name)
            if digest(config["pretrained"]) != config["sha256"]["pretrained"]:
                raise ValueError("the weights of its backbone have changed since this run")
        model = prepare_model(config, device, load)
    weights = Path(folder, "model.safetensors")
    report = Path(folder, "metrics.json")
    with reading(weights):
        if report.exists() and read_json(report).get("model_sha256") != digest(weights):
            raise ValueError("its checksum in metrics.json is another one")
        put_weights(model, load_file(weights))
    merge_lora(model)
    return model.eval().requires_grad_(False)

def run(config: dict, runs: Path, device: str = "auto") -> tuple[Path, dict]:
    """Do a run, or go on with it, unless it is done. Returns its folder and its metrics.json."""
    folder, new = claim_folder(config, runs)
    name = f"{Path(config['objective']).stem}, seed {config['seed']}"
    if (folder / "metrics.json").exists():
        print(f"{name}: done before; delete {folder} to repeat it")
    else:
        print(f"{name}: {folder}", flush=True)
        try:
            with running(config["objective"]), undone(config["objective"]):
                train_and_evaluate(config, folder, device)
        finally:
            if new and os.listdir(folder) == ["config.json"]:  # nothing was begun
                (folder / "config.json").unlink()
                folder.rmdir()
    for left in (*folder.glob("checkpoint.pt"), *folder.glob("*.unfinished")):
        left.unlink(missing_ok=True)
    report = read_json(folder / "metrics.json")
    needed = {"seen", "unseen", "tasks", "predicted", "sentences", "trained_on", "wall_seconds"}
    if not needed <= set(report) or not (folder / "model.safetensors").exists():
        raise InputError(f"metrics.json or model.safetensors is damaged: delete {folder}")
    return folder, report

def train_and_evaluate(config: dict, folder: Path, device: str):
    """Fill the folder of a run. Raises InputError."""
    began = time.perf_counter()
    parts = get_objective(config["objective"])
    data = Dataset(config["data"])
    if not len(data.select(split="test", source="expert")):
        raise InputError(f"{data.path} has no experts to test on: collect at least 4 a task")
    instructions = load_instructions(config["instructions"], data.task)
    model = prepare_model(config, device)
    if checksums(config) != config["sha256"]:
        raise InputError("a file that decides this run has changed: give the command again")
    for entry in instructions.values():
        for sentence in (entry["instruction"], *entry["paraphrases"]):
            model.check_sentence(sentence)

    log = []
    trained_on = 0
    if parts["loss"]:
        if parts["LABELS"] == "rewards" and not data.rewards.any():
            raise InputError(f"{data.path} has no rewards, which this objective learns from")
        trained_on = sum(map(len, training_episodes(data).values()))
        loss = functools.partial(parts["loss"], **config["constants"])
        saved = folder / "checkpoint.pt"
        log = train(model, data, instructions, loss, config, parts["LABELS"], saved)
    report = evaluate(model, data, instructions, parts["reward"])
    report["log"] = log
    write_whole(folder / "model.safetensors", save(trained_weights(model)))
    draw_curves(report, data, instructions, folder / "curves.png")
    report |= {"torch": torch.__version__, "device": str(model.mean.device),
               "model_sha256": digest(folder / "model.safetensors"),
               "trained_on": trained_on,
               "wall_seconds": time.perf_counter() - began}
    write_whole(folder / "metrics.json", to_json(report))

def run_all(args):
    """Every objective asked for, with every seed; then the table of the one run, or of all."""
    configs = []
    for name in args.objective:
        for objective in (OBJECTIVES if name == "all" else [name]):
            for seed in range(args.seed, args.seed + args.seeds):
                config = configuration(args, objective, seed)
                if config not in configs:  # an objective may be given twice
                    configs.append(config)
    reports = {}
    for config in configs:
        _, report = run(config, args.runs, args.device)
        reports.setdefault(config["objective"], []).append(report)
    if len(configs) > 1:
        compare(reports, args.runs)
    else:
        print_report(report)  # the only one

def print_report(report: dict):
    """The table of one run."""
    print(f"{'':34}{'seen tasks':>22}{'unseen tasks':>22}{'by chance':>11}")
    for metric, (text, chance) in METRICS.items():
        if metric == "retrieval_top1":
            chance = 1 / report["sentences"]
        line = f"{text:34}"
        for group in ("seen", "unseen"):
            cell = "-"
            if metric in report[group]:
                low, high = report[group][metric]["interval"]
                cell = f"{report[group][metric]['value']:.2f}"
                if report[group][metric]["tasks"] > 1:
                    cell += f" [{low:.2f}, {high:.2f}]"
            line += f"{cell:>22}"
        print(f"{line}{chance:>11.2f}")
    print(f"[95 % intervals, over tasks]\n{report['trained_on']} episodes to train on, "
          f"{len(report['predicted'])} to test; {report['wall_seconds']:.0f} s after the imports")

def compare(reports: dict[str, list[dict]], runs: Path):
    """Print and keep a table of {objective: [report of each seed]}: mean ± std over seeds; p says
    whether a row differs from the first, over tasks."""
    titles = ["objective"]
    rows = {name: [Path(name).stem] for name in reports}
    first = next(iter(reports))
    for metric in ("voc", "voc_opposite", "ranking_accuracy_same_time"):
        for group in ("seen", "unseen"):
            titles.append(f"{METRICS[metric][0]}, {group} tasks")
            scores = {name: task_scores(reports[name], metric, group) for name in reports}
            for name, values in scores.items():  # (seeds, tasks)
                cell = f"{values.mean():.2f}" if values.size else "-"
                if values.size and len(values) > 1:
                    cell += f" ± {values.mean(1).std(ddof=1):.2f}"
                if name != first and values.shape[1] > 1:
                    p = paired_p_value(values.mean(0), scores[first].mean(0))
                    cell += f" (p {p:.3f})" if p >= 0.001 else " (p < .001)"
                rows[name].append(cell)
    lines = [titles, ["---"] * len(titles), *rows.values()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for n in itertools.count(1):  # other comparisons' tables stay
        path = runs / ("table.md" if n == 1 else f"table-{n}.md")
        if not path.exists() or path.read_bytes() == table.encode(errors="replace"):
            break
    write_whole(path, table.encode(errors="replace"))
    print(f"{table}\nThis table is {path}")

def task_scores(reports: list[dict], metric: str, group: str):
    """A metric on the tasks of a group that have it: (seeds, tasks)."""
    return np.array([[scores[metric] for task, scores in report["tasks"].items()
                      if group_of(task) == group and metric in scores] for report in reports])

def draw_curves(report: dict, data: Dataset, instructions: dict, path: Path):
    """Draw four test episodes with their rewards, an expert and a failure of a seen and an unseen
    task, and the loss."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(5, 2, width_ratios=(3, 1))
    failed = (data.source == "mixed") & ~data.success.any(1)
    kinds = itertools.product((data.source == "expert", failed), ("seen", "unseen"))
    for (strip, axis), (fits, group) in zip(axes, kinds):  # the fifth row is for the loss
        episodes = [e for e in report["predicted"] if fits[e] and group_of(data.task[e]) == group]
        if not episodes:
            continue
        e = episodes[len(episodes) // 2]
        shown = data.pictures(e)[np.linspace(0, data.T - 1, 8).astype(int)]
        shown = np.pad(shown, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255)
        strip.imshow(np.concatenate(shown, axis=1))
        strip.set_title(f"{instructions[data.task[e]]['instruction']} ({data.source[e]}, "
                        f"{group} task)", loc="left", fontsize=11, parse_math=False)
        axis.plot(report["predicted"][e], color="#c8384e")
        axis.set_ylabel("model's reward", color="#c8384e")
        if np.ptp(data.rewards[e]):  # videos of no simulator have none: all 0
            axis = axis.twinx()
            axis.plot(data.rewards[e], color="#30638e")
            axis.set_ylabel("simulator's", color="#30638e")
    axes[-1, 1].plot([entry["loss"] for entry in report["log"]], color="0.3")
    axes[-1, 1].set(xlabel="step", ylabel="loss")
    for strip in axes[:, 0]:
        strip.set_axis_off()
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_whole(path, png.getvalue())

# 7. The command line ---------------------------------------

def parse_arguments(argv: list[str] = None):
    """The options, from argv or the command line. Raises InputError."""
    def refuse(text):
        raise InputError(f"{text}; see --help")

    parser = argparse.ArgumentParser("vlmrm", description="Train and test reward models.")
    parser.error = refuse
    add = parser.add_argument_group("training").add_argument
    names = ", ".join(OBJECTIVES)
    add("--objective", nargs="+", default=["triplet"], metavar="NAME",
        help=f"{names}, or a file with your own; several, or all, are compared")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--seeds", type=int, default=1, help="how many, from --seed on (1)")
    add("--backbone", default="tiny", help="tiny, or any of open_clip (tiny)")
    add("--pretrained", help="its weights: a tag of open_clip, a file, or none")
    add("--lora", type=int, default=8, help="rank of adapters; 0: all weights train (8)")
    add("--steps", type=int, default=60, help="of the optimiser (60)")
    add("--batch", type=int, default=40, help="videos a step, 5 frames of each (40)")
    add("--learning-rate", type=float, help="at its peak (the objective's own)")
    add("--data", type=Path, default=DATA / "metaworld.npz", help="(data/metaworld.npz)")
    add("--instructions", type=Path, default=DATA / "instructions.json", help="its sentences")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--runs", type=Path, default=Path("runs"), help="where their folders are (runs)")
    add = parser.add_argument_group("making a data set").add_argument
    add("--collect", action="store_true", help="write episodes to --data")
    add("--tasks", nargs="+", default=[], help="such as drawer-open-v3 (all 50)")
    add("--expert", type=int, default=14, help="experts a task (14)")
    add("--mixed", type=int, default=6, help="mixed episodes a task (6)")
    add("--frames", type=int, default=24, help="pictures an episode (24)")
    add("--size", type=int, default=96, help="pixels, square (96)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    args = parser.parse_args(argv)

    check_numbers(vars(args))
    if args.tasks and not args.collect:
        raise InputError("--tasks is for --collect: a run takes all tasks of its --data")
    for k, name in enumerate(args.objective):
        known = DATA / "objectives" / f"{name}.py"
        if known.is_file():
            args.objective[k] = str(known)
        elif name not in ("all", *OBJECTIVES) and not (Path(name).is_file() and name[-3:] == ".py"):
            raise InputError(f"{name!r} is not all, {names}, or a Python file")
    return args

def exit_code(program: str, work):
    """Do work(). Returns 0, or 2 after what the user can mend, which is one line; 130 after
    Ctrl-C."""
    warnings.simplefilter("ignore")
    matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
    try:
        work()
    except (InputError, OSError, BrokenExecutor) as problem:  # OSError: a full disk, say
        print(f"{program}:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as problem:
        if "memory" not in str(problem) and not isinstance(problem, MemoryError):
            raise
        print(f"{program}: not enough memory; try a smaller --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; give the command again", file=sys.stderr)
        return 130
    return 0

def main(argv: list[str] = None):
    """The program. Returns its exit code."""
    def work():
        args = parse_arguments(argv)
        if args.collect:
            collect(args)
        else:
            run_all(args)

    return exit_code("vlmrm", work)

def mend_streams():
    """Printing must not fail: whoever started us may have closed a stream, and not every terminal
    has a ±."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="replace")
        setattr(sys, name, stream)

if __name__ == "__main__":
    mend_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
