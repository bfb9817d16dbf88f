"""
Train a vision-language reward model, measure it, and change only its learning objective.

Such a model looks at a picture and a sentence ("open the drawer") and returns a number that should
rise as the task gets done. Ours is the plainest there is: two towers map frame and sentence to unit
vectors, and their cosine is the reward. What it is worth depends on the objective it was trained
with, and that is what this file compares, after "Revisiting the learning objectives of
vision-language reward models" (arXiv 2512.20675): same backbone, same videos, same evaluation.

    python vlmrm.py --objective triplet     train, test, draw: 40 seconds on two CPU cores
    python vlmrm.py --objective all --seeds 3                               the study
    python vlmrm.py --tune --objective all                                  choose its constants
    python vlmrm.py --objective triplet --ensemble 5                        several models as one
    python vlmrm.py --collect --tasks reach-v3 push-v3 --output two.npz     make your own videos
    python vlmrm.py --data two.npz --batch 2                                and train on them
    python vlmrm.py --backbone ViT-B-32-quickgelu --pretrained openai --lora 8     a real CLIP
    python vlmrm.py --help

Expect of triplet (mean ± std of seeds 0, 1, 2; torch 2.15 on two cores of an AMD EPYC):
    VOC (order of an expert's frames, 1 is best)       0.93 ± 0.00 seen tasks, 0.55 ± 0.04 unseen
    ranking accuracy (chance .5)                       0.77 ± 0.01 seen tasks, 0.65 ± 0.02 unseen

In order: 1 data, 2 backbone, 3 objectives, 4 training, 5 metrics, 6 a run, 7 the study, 8 command
line. Tables and pictures are drawn by data/report.py: there is nothing to learn from them.

Left out on purpose: a configuration system (argparse is one), a trainer class (it is one loop),
experiment trackers (a run is a folder of five files), data loaders (a batch is drawn in a few ms),
downloads (data and starting weights are in data/).
"""
import time

STARTED = time.perf_counter()  # the wall time of a run counts its imports

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import runpy
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import open_clip  # the CLIP architectures and tokenizers
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image  # WebP
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from tqdm import tqdm

DATA = Path(__file__).resolve().parent / "data"

# -----------------------------------------------------------------------------
# 1. Dataset collection
#
# A reward model learns what "further along" looks like, so it needs videos in which things get
# done. Meta-World comes with a scripted policy for each of its 50 tasks: run it and you have an
# expert. Two kinds of episodes are collected:
#   expert  the scripted policy; only episodes that succeed are kept, cut 5 steps after success.
#           We train on some of them; on the others, time itself says which frame is further.
#   mixed   the same policy with noise on its actions, for 150 steps: some succeed, most dither,
#           fail or go backwards. Nobody trains on them. Here time says less, and the
#           simulator's own dense reward (0 to 10) says which frame is better.
# Ten tasks are never trained on. Each has a sibling among the other forty (open the drawer, close
# the drawer): they show whether a model reads the instruction or goes by the look of the scene.

UNSEEN_TASKS = (
    "button-press-v3", "coffee-pull-v3", "door-open-v3", "door-unlock-v3", "drawer-open-v3",
    "faucet-open-v3", "handle-pull-side-v3", "plate-slide-back-v3", "push-wall-v3",
    "window-close-v3")


def group_of(task: str) -> str:
    """"unseen" for the ten tasks that nobody trains on, "seen" for the others."""
    return "unseen" if task in UNSEEN_TASKS else "seen"


class InputError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""


def load_instructions(path: Path) -> dict[str, dict]:
    """Read the sentences: {task: {"instruction", "paraphrases" (3), "opposite" (some tasks)}}.

    Training only ever sees "instruction". "opposite" names the task that undoes this one.
    Raises InputError when the file is missing or is not such a dictionary.
    """
    try:
        sentences = json.loads(path.read_text(encoding="utf-8"))
        for entry in sentences.values():
            if not (isinstance(entry["instruction"], str) and len(entry["paraphrases"]) == 3):
                raise ValueError("every task needs one instruction and three paraphrases")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(f"cannot use the instructions in {path}: {problem!r}") from None
    return sentences


def roll_out(env, policy, rng, steps: int, noise: float, random_share: float):
    """Run one episode. Returns a snapshot of the simulator, the reward and the success flag of
    every step, as three lists. With noise 0 this is the expert, which stops after its success.

    noise is the standard deviation of the Gaussian noise on each action (actions lie in [-1, 1]),
    random_share the probability that a step's action is drawn uniformly instead.
    """
    snapshots, rewards, successes = [], [], []
    observation, _ = env.reset()
    for _ in range(steps):
        action = policy.get_action(observation)
        if rng.random() < random_share:
            action = rng.uniform(-1, 1, size=4)  # x, y, z, gripper
        action = np.clip(action + noise * rng.normal(size=4), -1, 1)
        observation, reward, _, _, info = env.step(action)
        # Rendering costs 20 times a simulation step, and which frames we want depends on how long
        # the episode turns out to be: keep the states (cheap), draw the chosen few afterwards.
        snapshots.append(copy.copy(env.data))
        rewards.append(reward)
        successes.append(bool(info["success"]))
        if noise == 0 and any(successes[:-5]):
            break
    return snapshots, rewards, successes


def open_task(task: str, size: int):
    """The simulator of a task, its scripted policy, and a renderer of size x size pictures.

    The renderer is 10 to 20 times as fast as env.render() where there is no GPU: shadows,
    reflections and multisampling are what makes software rendering slow, and nothing the reward
    model needs. One renderer may live per process: a second one, opened while the first is not
    closed, returns stale frames without a word.
    Raises InputError when Meta-World or a graphics library is missing.
    """
    if sys.platform == "linux":  # mujoco reads this once, at import: draw in software by default
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    warnings.filterwarnings("ignore", message="Constant")  # policies overshoot [-1, 1]; we clip
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as policies

        env = environments[task + "-goal-observable"](seed=0)
        env.model.vis.quality.offsamples = 0  # multisampling; read when the renderer is made
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = size
        renderer = mujoco.Renderer(env.model, size, size)
    except ModuleNotFoundError as problem:
        raise InputError(
            f"--collect needs {problem.name}, which supports Python 3.10 to 3.13: "
            "pip install -r requirements.txt") from None
    except (ImportError, AttributeError, RuntimeError, OSError) as problem:
        raise InputError(
            "cannot render: no OpenGL library answered. On Debian or Ubuntu run 'apt-get install "
            "libosmesa6'; with an NVIDIA GPU set MUJOCO_GL=egl "
            f"({type(problem).__name__}: {str(problem).splitlines()[0][:80]})") from None
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return env, policies[task], renderer


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
    episodes, attempts = [], 0
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
        snapshots, rewards, successes = roll_out(
            env, policy(), rng, steps=150 if mixed else 300,
            noise=rng.uniform(0.3, 1.5) if mixed else 0.0,
            random_share=rng.choice([0.0, 0.3, 0.7]) if mixed else 0.0)
        attempts += 1
        if not mixed and not any(successes):
            continue
        steps = np.linspace(0, len(snapshots) - 1, job["frames"]).round().astype(int)
        frames = np.empty((len(steps), size, size, 3), np.uint8)
        for i, step in enumerate(steps):
            renderer.update_scene(snapshots[step], camera="corner4")
            # The camera hangs upside down. Turn the picture, which flips BOTH axes: flipping the
            # rows alone looks right, but mirrors the scene, and left becomes right.
            frames[i] = renderer.render()[::-1, ::-1]
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
    """Give each episode of one task its split, by the order of its seed (ours, not the paper's).

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
    known = sorted(load_instructions(DATA / "instructions.json"))
    for task in args.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3, cutoff=0)
            raise InputError(f"unknown task {task!r}; did you mean {', '.join(near)}?")
    if args.frames * args.size > 16383:
        raise InputError(f"--frames {args.frames} of --size {args.size} do not fit into one WebP "
                         "strip: their product may be 16383 at most")
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder; name the file to write")
    jobs = [{"task": task, "expert": args.expert, "mixed": args.mixed, "frames": args.frames,
             "size": args.size, "seed": args.seed} for task in args.tasks or known]
    episodes = []
    context = multiprocessing.get_context("spawn")  # a forked process inherits a broken GL state
    with context.Pool(min(args.workers, len(jobs))) as pool, \
            tqdm(total=len(jobs), desc="collecting", unit="task") as bar:
        for found in pool.imap(collect_task, jobs):
            episodes += found
            bar.set_postfix(episodes=len(episodes),
                            end_in_success=sum(episode["success"][-1] for episode in episodes))
            bar.update()
    write_dataset(args.output, episodes)
    print(f"wrote {len(episodes)} episodes of {len(jobs)} tasks to {args.output} "
          f"({args.output.stat().st_size / 1e6:.1f} MB)")


def write_dataset(path: Path, episodes: list[dict]) -> None:
    """Write the episodes as one plain npz: an array per field, the WebP strips end to end."""
    fields = {name: np.array([episode[name] for episode in episodes])
              for name in ("task", "split", "source", "seed", "rewards", "success")}
    fields["steps"] = np.int16([episode["steps"] for episode in episodes])
    fields["offsets"] = np.cumsum([0] + [len(episode["strip"]) for episode in episodes])
    fields["strips"] = np.frombuffer(b"".join(episode["strip"] for episode in episodes), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # given a name, savez would add .npz to one that has no suffix
        np.savez(file, **fields)


class Dataset:
    """The episodes of one npz file: E episodes of T frames, S x S pixels each.

    task, split, source, seed   (E,) names, "train"/"validation"/"test", "expert"/"mixed", integer
    rewards, success, steps     (E, T) simulator's reward (0 to 10), success flag, step index
    Raises InputError when the file is missing or lacks a field.
    """

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as file:  # a pickle could run any code
                fields = {name: file[name] for name in (
                    "task", "split", "source", "seed", "rewards", "success", "steps",
                    "offsets", "strips")}
        except FileNotFoundError:
            raise InputError(f"no data set at {path}: make one with --collect "
                             f"--output {path}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
                zipfile.BadZipFile) as problem:
            raise InputError(f"{path} is not a data set of this program: {problem}") from None
        self.offsets, self.strips = fields.pop("offsets"), fields.pop("strips")
        for name, values in fields.items():
            setattr(self, name, values)
        self.path, (self.E, self.T) = path, self.rewards.shape
        if self.T < 5:
            raise InputError(f"{path} has {self.T} frames per episode; training takes 5 of each")
        # Unpacking an episode takes 2.5 ms. The most recent 512 stay unpacked: enough for all the
        # training episodes of the default data, and a bound on memory for any other.
        self.frames = functools.lru_cache(maxsize=512)(self.unpack)

    def unpack(self, episode: int) -> np.ndarray:
        """The frames of one episode, uint8 (T, S, S, 3)."""
        strip = self.strips[self.offsets[episode]:self.offsets[episode + 1]]
        pixels = np.asarray(Image.open(io.BytesIO(strip.tobytes())).convert("RGB"))
        return pixels.reshape(self.T, pixels.shape[1], pixels.shape[1], 3)

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
# is the whole reward model; an objective only decides where the vectors go.

# Ours, not the paper's (which fine-tunes SigLIP2): small enough to train while you watch. On
# validation, towers three times as costly were no better, nor were three text layers than this one,
# little more than a bag of words. The weights in data/ come from `--objective clip`.
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
        pixels = pixels.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.encode(self.clip.encode_image, (pixels - self.mean) / self.std)
        return features.view(*frames.shape[:-3], -1)

    def embed_texts(self, sentences: list[str]) -> torch.Tensor:
        """M sentences -> unit vectors (M, D), float32."""
        return self.encode(self.clip.encode_text, self.tokenizer(sentences).to(self.mean.device))

    @torch.inference_mode()
    def score(self, frames: np.ndarray, instruction: str) -> np.ndarray:
        """Rewards of uint8 frames (N, H, W, 3) of any size, for one sentence: float32 (N,).

        The reward is the cosine of frame and sentence, in [-1, 1]: compare frames under one
        sentence, not sentences under one frame.
        """
        text = self.embed_texts([instruction])[0]  # (D,)
        parts = [self.embed_frames(torch.tensor(frames[i:i + 256])) @ text
                 for i in range(0, len(frames), 256)]
        return torch.cat(parts).cpu().numpy()


def build_backbone(name: str, pretrained: str | None) -> RewardModel:
    """Build `tiny` or any open_clip model. `pretrained` is a tag, a checkpoint path or "none".

    Without it tiny gets its own weights, and any other model is refused: random weights are never a
    silent choice. Raises InputError for an unknown model or tag, or when weights cannot be had.
    """
    if name == "tiny":
        clip, tokenizer = open_clip.CLIP(**TINY), tiny_tokenizer()
        clip.visual.image_mean = clip.visual.image_std = (0.5, 0.5, 0.5)
        model = RewardModel(clip, tokenizer)
        pretrained = pretrained or str(DATA / "tiny.safetensors")
        if pretrained != "none":
            load_weights(model, Path(pretrained))
        return model
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()], 5, cutoff=0)
        raise InputError(f"unknown backbone {name!r}; the nearest names are {', '.join(near)} "
                         "(all: python -c 'import open_clip; print(open_clip.list_models())')")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in ["none", *tags] or Path(pretrained).is_file()):
        given = f"has no weights {pretrained!r}" if pretrained else "needs --pretrained"
        raise InputError(f"{name} {given}: give a checkpoint file, "
                         f"'none' for random weights, or one of {', '.join(tags) or 'no tag'}")
    logging.disable(logging.ERROR)  # open_clip logs at length what we say in one line
    try:
        clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
        if tags and pretrained not in tags:  # a file does not say how its pixels were normalised
            published = open_clip.get_pretrained_cfg(name, tags[0])
            clip.visual.image_mean, clip.visual.image_std = (
                published.get("mean"), published.get("std"))
        return RewardModel(clip, open_clip.get_tokenizer(name))
    except ImportError as problem:
        raise InputError(f"{name} needs another package: {problem}") from None
    except Exception as problem:  # hubs fail in as many ways as there are network libraries
        reason = (str(problem).strip() or repr(problem)).splitlines()[0][:120]
        raise InputError(f"cannot load {name} / {pretrained}: {reason}. Without a network, "
                         "download the checkpoint elsewhere; --pretrained takes its path") from None
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
    convolution, embeddings, norms and the last projection of each tower stay frozen.
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


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all that is not frozen: with LoRA the adapters and the normalisation alone."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in unfrozen(model).items()}, path)


def unfrozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without its frozen weights: what a run folder has to remember."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: state for name, state in model.state_dict().items() if name not in frozen}


def load_weights(model: nn.Module, path: Path) -> None:
    """Read back what save_weights() wrote. Raises InputError if the file does not fit the model."""
    try:
        weights = load_file(path)
        if odd := sorted(set(weights) ^ set(unfrozen(model))):
            raise ValueError(f"{len(odd)} weights too many or missing, such as {odd[0]}")
        model.load_state_dict(weights, strict=False)
    except FileNotFoundError:
        raise InputError(f"no weights at {path}") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise InputError(f"{path} does not fit this model: {reason}") from None


# -----------------------------------------------------------------------------
# 3. The learning objectives
#
# Every objective sees the same batch: B videos of B different tasks, so that no sentence fits two
# of them, and of each K = 5 frames in order of time,
#
#     frames  (B, K, D)   embeddings of start < now < next = now + 1 < later < end
#     texts   (B, D)      embedding of the instruction of each video
#     times   (B, K)      share of the episode that has passed at each frame, 0 to 1
#
# and returns one number. It is free to ignore what it has no use for. Notation: cos(a, b) is the
# cosine, |a - b| the Euclidean distance, e = 1e-8 (it keeps logarithms finite), l the instruction,
# l' that of another video. The frames start, now, next, end are o0, o, o', og; TCN and R3M call
# now, later, end s0, s1, s2. Means are over the batch unless the equation says otherwise.
#
# The constants in the signatures are the official ones. With them TCN, R3M, VIP, LIV, DecisionNCE
# and VLC return, value and gradient, what the authors' code returns, HILP's core and the goal
# baseline the value (the tests compare with data/golden/). Where the official codes contrast with
# other videos, they draw random permutations of the batch, which now and then pair a video with
# itself. Our batches come in random order, so we shift them by 1, 2, 3 places: as random, never
# itself, and the loss stays a pure function.

LOG_EPS = math.log(1e-8)


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
    rises with time, and nothing else: no other video, no other sentence ever enters.
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
    dropped: privileged labels, on the same expert frames, so not a peer of the others.
    Source: RL-VLM-F, Wang et al., 2402.03681, reward_model.py. Differs: there a VLM labels pairs of
    any two frames, and a CNN without language learns from them, its output in (-1, 1) like ours.
    """
    reward = scale * cosine(frames, texts[:, None])  # (B, K)
    better = times[:, :, None] > times[:, None]  # (B, K, K)
    lead = reward[:, :, None] - reward[:, None]
    return (better * F.softplus(-lead)).sum() / better.sum().clamp(min=1)


def progress_loss(frames, texts, times, scale: float = 10.0) -> torch.Tensor:
    """Progress: the reward is the share of the episode that has passed; under a wrong instruction
    there is no progress.

        p = sigmoid(scale cos(o, l));  L = 1/2 mean [ (p(o, l) - t)^2 + (p(o, l') - 0)^2 ]

    The other objectives order frames; this one says how far apart they are. After ReWiND the clip
    is continued by its own rewinding, with the targets it had on the way up: to a model of single
    frames this shows no new pair, only the middle twice.
    Source: ReWiND, Zhang et al., 2505.10911; SARM, 2509.25358. Differs: no network over time, the
    sigmoid of a scaled cosine instead of a head. No official form for single frames: scale ours.
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

    Knows nothing of time: any frame of the right video will do. Here it warms up `tiny`.
    Source: Radford et al., 2103.00020. Differs: CLIP learns the scale; ours is where it starts.
    """
    return matching_loss(scale * cosine(frames.transpose(0, 1)[:, :, None], texts))  # of (K, B, B)


def decisionnce_p_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-P: the progress made in a video finds the instruction it was made under.

        R_ij = scale [ sum_late cos(o, l_j) - sum_early cos(o, l_j) ] over the frames of video i,
        L = matching_loss(R)

    The reward has to rise more under its own instruction than under others: how a scene looks
    cancels, so nothing is gained by telling tasks apart by their furniture. What it does under all
    sentences alike cancels too: unlike triplet's, this reward may fall, if only less than others.
    Source: Li et al., 2402.18137, losses.py. Differs: two late and two early frames instead of one
    (the code allows both); the middle one of five is left out.
    """
    rewards = cosine(frames[:, None], texts[:, None])  # (B videos, B texts, K)
    half = frames.shape[1] // 2
    return matching_loss(scale * (rewards[..., -half:].sum(-1) - rewards[..., :half].sum(-1)))


def decisionnce_t_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """DecisionNCE-T: the direction in which a video moves points along its instruction.

        R_ij = scale sum_k d_ik . l_j,  d_ik = (o_k+1 - o_k) / (|o_k+1 - o_k| + 1e-6)
        L = matching_loss(R)

    The length of a step is divided away: one in which little happens counts as much as one that
    gets the task done, and two nearly equal frames give a random direction.
    Source: Li et al., 2402.18137, losses.py. Differs: three steps instead of one (the code allows
    both); the middle one of five frames is left out, being too close to its neighbour.
    """
    half = frames.shape[1] // 2
    steps = torch.cat([frames[:, :half], frames[:, -half:]], dim=1).diff(dim=1)  # (B, K - 1, D)
    directions = steps / (torch.linalg.vector_norm(steps, dim=-1, keepdim=True) + 1e-6)
    return matching_loss(scale * directions.sum(1) @ F.normalize(texts, dim=-1).T)


def vlc_loss(frames, texts, times, scale: float = 1.0, margin: float = 0.0,
             rank_weight: float = 33.0) -> torch.Tensor:
    """VLC, the video-language critic: the score rises from frame to frame, and the end of a video
    finds its instruction.

        S_ijk = scale cos(frame k of video j, l_i)
        L = rank_weight mean max(0, S_iik - S_ii(k+1) + margin) + matching_loss(S at the end)

    A triplet of neighbours, and CLIP on the last frame to remember which task is which.
    Source: Alakuijala et al., 2405.19988, modules/until_module.py. Differs: S is a transformer
    over the video so far; ours, over single frames, moves less, which the scale can mend. No
    failed videos in the batch.
    """
    scores = scale * cosine(frames, texts[:, None, None])  # (B texts, B videos, K)
    own = scores.diagonal().mT  # (B, K)
    falls = F.relu(own[:, :-1] - own[:, 1:] + margin)
    return rank_weight * falls.mean() + matching_loss(scores[..., -1])


def softmax_loss(positive: torch.Tensor, negatives: list[torch.Tensor]) -> torch.Tensor:
    """-log(e + p) with p = exp(pos) / (e + exp(pos) + sum exp(neg)), elementwise: (B,).

    Adding e to the denominator is adding log e as one more logit: no exp() ever overflows.
    """
    floor = torch.full_like(positive, LOG_EPS)
    log_p = positive - torch.logsumexp(torch.stack([positive, *negatives, floor]), dim=0)
    return -torch.logaddexp(log_p, floor)


def tcn_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3) -> torch.Tensor:
    """TCN, time-contrastive: frames close in time are close, far in time far, other videos far.

        S(a, b) = -|a - b| / temperature
        L = 1/2 mean [ -log p(s2 -> s1) - log p(s1 -> s0) ],  where the pair (s2, s1) competes with
        (s2, s0) and s2 of other videos, the pair (s1, s0) with (s2, s0) and s0 of other videos

    Ignores the instruction: the image tower moves, the text tower does not, and what becomes of
    their cosine is left to chance. Its own reward is the distance to an image of the goal.
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
    """l1 mean |x|_1 + l2 mean |x|_2 over all embeddings. Constant l2 part when x has unit norm."""
    return (l1 * frames.abs().sum(-1) + l2 * torch.linalg.vector_norm(frames, dim=-1)).mean()


def r3m_loss(frames, texts, times, temperature: float = 1.0, negatives: int = 3,
             l1: float = 1e-5, l2: float = 1e-5) -> torch.Tensor:
    """R3M: TCN, and a score G(o, l) of progress under the instruction that grows with time.

        L = L_tcn + mean 1/3 sum_(pos, neg) -log p(pos) + l1 |x|_1 + l2 |x|_2,  where G(pos, l)
        competes with G(neg, l) and, under the SAME sentence, with G(pos, l) of other videos' pos;
        (pos, neg) = (end, start), (s1, s0), (s2, s1);  G = cos / temperature

    A later frame wins against an earlier one, the right video against the wrong one: a reward must
    tell both. With unit vectors and no temperature the softmax is nearly flat: small gradients.
    Source: Nair et al., 2203.12601, r3m/trainer.py. Differs: the official head is an MLP over the
    first frame, this one and frozen DistilBERT; ours is the cosine, the reward that is tested; and
    s2 = end, unless a sixth frame is the end. A text of zeros = no caption.
    """
    start, s0, _, s1, s2 = frames[:, :5].unbind(1)
    end = frames[:, -1]
    language = 0
    for positive, negative in ((end, start), (s1, s0), (s2, s1)):
        rivals = [negative, *(positive[perm] for perm in shifts(negatives, len(frames)))]
        language = language + softmax_loss(
            cosine(positive, texts) / temperature,
            [cosine(rival, texts) / temperature for rival in rivals]) / 3
    captioned = texts.any(dim=-1)  # (B,)
    tcn = tcn_loss(frames, texts, times, temperature, negatives)
    used = torch.stack([start, s0, s1, s2, end])
    return tcn + (captioned * language).mean() + norm_penalty(used, l1, l2)


def value_loss(value, start, now, next, goal, gamma: float, perms: torch.Tensor) -> torch.Tensor:
    """The core of VIP and LIV: learn from videos alone a value V(o; goal), minus the discounted
    number of steps to the goal.

        L = (1 - gamma) mean -V(o0; og) + log(e + mean exp(1 + V(o; og) - gamma V(o'; og)))
            [ + the same second term over other videos' (o, o') under this goal ]

    Each step costs 1, so V(o) = -1 + gamma V(o') for whoever walks straight to the goal. The first
    term pulls the start towards the goal; the second punishes steps that fall short of this
    equation, the worst ones most. Frames (B, D), perms (m, B).
    """
    def step_penalty(now, next):
        residual = 1 + value(now, goal) - gamma * value(next, goal)
        log_mean = torch.logsumexp(residual.flatten(), dim=0) - math.log(residual.numel())
        return torch.logaddexp(log_mean, log_mean.new_tensor(LOG_EPS))

    loss = (1 - gamma) * -value(start, goal).mean() + step_penalty(now, next)
    return loss + step_penalty(now[perms], next[perms]) if len(perms) else loss


def vip_loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.98, negatives: int = 3,
             l1: float = 1e-3, l2: float = 1e-3) -> torch.Tensor:
    """VIP: the distance to the goal image counts the steps still to go, learnt as a value function.

        V(o; og) = -scale |o - og|;  L = value_loss(V) + l1 |x|_1 + l2 |x|_2

    Ignores the instruction: its own reward needs an image of the goal. Each log can be lowered by
    driving intermediate frames away from the goal, down to log e; only the length of the vectors
    stops it. With unit vectors and scale 1, V lies in [-2, 0], while a goal 23 frames away should
    get -(1 - .98^23) / .02 = -18.6: the scale is ours.
    Source: Ma et al., 2210.00030, vip/trainer.py and the released Ego4D constants. Differs: the
    goal is the end of the episode rather than of a random part of it.
    """
    start, now, next, _, goal = frames.unbind(1)

    def value(a, b):
        return scale * negative_distance(a, b)

    return (value_loss(value, start, now, next, goal, gamma, shifts(negatives, len(frames)))
            + norm_penalty(torch.stack([start, goal, now, next]), l1, l2))


def liv_loss(frames, texts, times, temperature: float = 1.0, gamma: float = 0.98,
             language_weight: float = 0.0, negatives: int = 0) -> torch.Tensor:
    """LIV: VIP in the space of CLIP, so that the instruction can stand where the goal image stood.

        V(o; og) = cos(o, og) / (1 - gamma);  M_ij = cos(og_i, l_j) / temperature
        L = matching_loss(M) + value_loss(V; goal og) + w_lang value_loss(V; goal l)

    The division makes room for V to count steps. The CLIP term has logit scale 1, on cosines nearly
    flat: 40 captions start at log 40 = 3.69, and end at best at log(1 + 39 exp(-40/39)) = 2.71.
    Source: Ma et al., 2306.00958, liv/trainer.py with the constants of its finetune.yaml (where
    w_lang = 0 and negatives = 0), where the frame that meets the caption is the end: the last of
    `frames`, a sixth if there is one. Differs: only in the batch.
    """
    start, now, next, _, goal = frames[:, :5].unbind(1)

    def value(a, b):
        return cosine(a, b) / (1 - gamma)

    loss = matching_loss(cosine(frames[:, None, -1], texts) / temperature)
    for goal, weight in ((goal, 1.0), (texts, language_weight)):
        if weight:
            loss = loss + weight * value_loss(
                value, start, now, next, goal, gamma, shifts(negatives, len(frames)))
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
    steps, by temporal differences. As in VIP, unit vectors can only be 2 apart, and the scale is
    ours. Frames of other videos are goals that are never reached: they keep videos apart.
    Source: Park et al., 2402.15567, hilp_gcrl/src/agents/hilp.py. Differs: one network instead of
    two; its own output, detached, instead of a slow copy; goals from five frames.
    """
    _, now, next, later, end = frames.unbind(1)
    goals = torch.stack([next, later, end, *end[shifts(1, len(frames))]])  # (4, B, D)

    def value(state):
        squared = (state - goals).square().sum(-1).clamp(min=1e-6)
        return -scale * squared.sqrt().flatten()[None]  # (1, 4 B): one network

    v = value(now)
    return expectile_loss(v, v.detach(), value(next).detach(), torch.zeros_like(v[0]),
                          gamma, expectile)


def instruction_as_goal(loss):
    """The language version of an objective that ignores language: the instruction takes the place
    of the last frame, which is the goal of VIP and HILP, and the latest of TCN's three. Ours."""
    def with_instruction(frames, texts, times, **constants):
        return loss(torch.cat([frames[:, :-1], texts[:, None]], dim=1), texts, times, **constants)
    return with_instruction


def goal_baseline_reward(frames, goal, baseline, alpha: float = 0.5) -> torch.Tensor:
    """VLM-RM: no training; part of what does not point from a baseline to the goal is ignored.

        d = g - b;  r = 1 - 1/2 |P (o - g)|^2,  P = alpha d d^T / |d|^2 + (1 - alpha) I

    g and b embed the instruction and a sentence about the scene before anything is done ("a robot
    arm over a table"), o is the frame, of unit norm; all (..., D), they broadcast. alpha = 0 gives
    the cosine, alpha = 1 counts movement along d alone; beyond the goal r falls again.
    Source: Rocamonde et al., 2310.12921, src/vlmrm/reward_model.py. No difference.
    """
    direction, offset = goal - baseline, F.normalize(frames, dim=-1) - goal
    along = (offset * direction).sum(-1) ** 2 / direction.square().sum(-1)  # squared lengths
    across = offset.square().sum(-1) - along
    return 1 - (along + (1 - alpha) ** 2 * across) / 2


# To add an objective, write its function and give it a name here.
OBJECTIVES = {
    "zeroshot": None,  # the backbone as it is; tiny has been warmed up with clip
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

# `--setting faithful` trains with the constants of the signatures, at the first of the learning
# rates below (the optimiser is ours in any case). They were chosen for other backbones and free
# norms, so `--setting tuned` lets every objective choose, each from the same number of settings:
# one of two learning rates, and of three values of one constant of its own, the official one first.
LEARNING_RATES = (2e-3, 5e-4)
GRID = {
    "clip": ("scale", (1 / 0.07, 5.0, 50.0)),
    "tcn": ("temperature", (1.0, 0.3, 0.1)),
    "tcn-text": ("temperature", (1.0, 0.1, 0.03)),
    "r3m": ("temperature", (1.0, 0.3, 0.1)),
    "vip": ("scale", (1.0, 5.0, 20.0)),
    "vip-text": ("scale", (1.0, 5.0, 20.0)),
    "hilp": ("scale", (1.0, 5.0, 20.0)),
    "hilp-text": ("scale", (1.0, 5.0, 20.0)),
    "liv": ("temperature", (1.0, 0.1, 0.03)),
    "decisionnce-p": ("scale", (100.0, 10.0, 3.0)),
    "decisionnce-t": ("scale", (100.0, 10.0, 3.0)),
    "vlc": ("scale", (1.0, 20.0, 100.0)),
    "preference": ("scale", (1.0, 20.0, 100.0)),
    "preference-oracle": ("scale", (1.0, 20.0, 100.0)),
    "progress": ("scale", (10.0, 5.0, 20.0)),
    "triplet": ("margin", (0.1, 0.05, 0.2)),
}
# What won on the validation episodes: python vlmrm.py --tune --objective all
TUNED = {  # objective: (learning rate, its constant)
    "clip": (5e-4, 50.0), "tcn": (5e-4, 0.3), "tcn-text": (5e-4, 0.03), "r3m": (2e-3, 0.3),
    "vip": (5e-4, 5.0), "vip-text": (5e-4, 1.0), "hilp": (5e-4, 5.0), "hilp-text": (2e-3, 1.0),
    "liv": (2e-3, 0.1), "decisionnce-p": (5e-4, 3.0), "decisionnce-t": (2e-3, 3.0),
    "vlc": (5e-4, 20.0), "preference": (5e-4, 100.0), "preference-oracle": (2e-3, 20.0),
    "progress": (5e-4, 10.0), "triplet": (2e-3, 0.1),
}


# -----------------------------------------------------------------------------
# 4. The training loop
#
# One loop for every objective and every device. A step: draw a batch, embed its frames and its
# captions once, ask the objective for its number, move the weights.


def pick_device(name: str) -> torch.device:
    """"auto" is the first of cuda, mps, cpu that this machine has."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise InputError(f"no {name} device here; use --device auto")
    return torch.device(name)


def to_device(model: RewardModel, device: torch.device) -> RewardModel:
    """Move the model to the device; multiply in bfloat16 where that is faster there."""
    if device.type == "cuda":
        model.low_precision = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: float32
        model.low_precision = capabilities.get("avx512_bf16", False)
    return model.to(device)


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
          batch: int, learning_rate: float, seed: int, oracle: bool = False) -> list[dict]:
    """Train the model in place. Returns the log: step, loss, seconds and, now and then, validation
    VOC. Same seed, same CPU, same number of threads: the same weights, bit for bit.

    oracle hands the simulator's rewards to the loss in the place of times.
    Raises InputError when the loss stops being finite, with the step and what broke.
    """
    device, rng = model.mean.device, np.random.default_rng(seed)
    train_set = data.select(split="train", source="expert")
    episodes = {task: train_set[data.task[train_set] == task]
                for task in np.unique(data.task[train_set])}
    if batch > len(episodes):
        raise InputError(f"--batch {batch} needs as many tasks to train on, and {data.path} has "
                         f"{len(episodes)}: every video of a batch comes from another task")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, weight_decay=0.01, fused=device.type in ("cuda", "cpu"))
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up in a line, down along a cosine
        optimizer, lambda step: min((step + 1) / warmup,
                                    0.5 + 0.5 * math.cos(math.pi * step / steps)))
    log, latest = [], "?"
    model.train()
    with tqdm(range(1, steps + 1), desc="training", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            began = time.perf_counter()
            chosen, numbers = sample_batch(episodes, data.T, rng, batch)  # (B,), (B, 5)
            pixels = np.stack([data.frames(e)[n] for e, n in zip(chosen, numbers)])
            times = data.rewards[chosen[:, None], numbers] if oracle else numbers / (data.T - 1)
            frames = model.embed_frames(torch.from_numpy(pixels))  # (B, 5, D)
            texts = model.embed_texts(
                [sentences[task]["instruction"] for task in data.task[chosen]])  # (B, D)
            loss = loss_function(frames, texts, torch.tensor(times).float().to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise InputError(f"step {step}: the loss is {loss.item()}, the gradient's norm "
                                 f"{norm.item()}; lower --learning-rate ({learning_rate})")
            optimizer.step()
            schedule.step()
            log.append({"step": step, "loss": loss.item(), "seconds": time.perf_counter() - began})
            if step % max(1, steps // 5) == 0 or step == steps:
                log[-1]["validation_voc"] = voc = validation_voc(model, data, sentences)
                latest = f"{voc:.2f}"
                model.train()
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", validation_voc=latest)
    return log


# -----------------------------------------------------------------------------
# 5. The evaluation metrics
#
# Two questions. Does the reward rise while an expert works (VOC)? Does it put frames in the order
# in which the simulator's reward puts them (ranking accuracy)? And some more, to see what a model
# that does well on these has in truth learnt: does it read the instruction?
#
# Values are (E, T): the model's reward of T frames of each of E episodes. Every metric comes from
# sums over episodes, so a bootstrap over episodes needs no second pass over the frames: draw how
# often each episode counts, R times, and weigh the sums.


def value_order_correlation(values: np.ndarray) -> np.ndarray:
    """VOC: Spearman correlation of each row of values (E, T) with time. (E,), in [-1, 1].

        1 = always rising, 0 = no order, -1 = always falling. Ties share their rank; a constant row
        counts 0.
    Source: GVL, 2411.04549, and OpenGVL's code for constants.
    """
    ranks = scipy.stats.rankdata(values, axis=-1)
    centred_time = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    ranks = ranks - ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1) * (centred_time**2).sum())
    return np.divide(ranks @ centred_time, norm, out=np.zeros(len(ranks)), where=norm > 0)


def pair_counts(values: np.ndarray, rewards: np.ndarray, threshold: float = 0.1):
    """Count the frame pairs that the values order as the rewards do.

    values, rewards (E, T). Returns correct and total, both (E, E): entry (i, j) is about pairs of a
    frame of episode i that is better by more than the threshold (0.1 on Meta-World's scale of 0 to
    10, our choice) than a frame of episode j; equal values count half. The diagonal is the pairs
    within an episode.
    """
    v, r = values.reshape(-1), rewards.reshape(-1)  # (E * T,)
    better = r[:, None] - r > threshold
    correct = better * ((v[:, None] > v) + 0.5 * (v[:, None] == v))
    E, T = values.shape
    return [pairs.reshape(E, T, E, T).sum((1, 3), dtype=float) for pairs in (correct, better)]


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


def weighted_ratio(weights: np.ndarray, correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """sum correct / sum total, episodes counted by weights (R, E); NaN where nothing counts. (R,)

    correct, total are (E,) for metrics of single episodes, (E, E) for metrics of pairs of them.
    """
    if correct.ndim == 2:
        correct, total = weights @ correct, weights @ total  # (R, E)
    above, below = (weights * correct).sum(-1), (weights * total).sum(-1)
    return np.divide(above, below, out=np.full(len(weights), np.nan), where=below > 0)


@torch.inference_mode()
def embed_episodes(model: RewardModel, data: Dataset, episodes, every: int = 1) -> torch.Tensor:
    """Embeddings of every n-th frame of the episodes: (E, ceil(T / every), D), on the CPU."""
    model.eval()
    return torch.cat([
        model.embed_frames(torch.from_numpy(
            np.stack([data.frames(e)[::every] for e in episodes[i:i + 10]]))).cpu()
        for i in tqdm(range(0, len(episodes), 10), desc="evaluating", unit="batch", leave=False,
                      # no second bar while training; None: none where there is no terminal
                      disable=True if every > 1 else None, dynamic_ncols=True)])


@torch.inference_mode()
def validation_voc(model: RewardModel, data: Dataset, sentences: dict, every: int = 3,
                   goal_images: bool = False) -> float:
    """VOC on every n-th frame of the validation experts: to watch a run, and, with every frame, to
    choose settings. With goal_images the reward is that of goal_image_rewards()."""
    episodes = data.select(split="validation", source="expert")
    if len(episodes) == 0:
        return math.nan
    frames = embed_episodes(model, data, episodes, every)  # (E, ceil(T / every), D)
    task = data.task[episodes]
    if goal_images:
        values = goal_image_rewards(frames, task, np.ones(len(task), bool))
    else:
        texts = model.embed_texts([sentences[name]["instruction"] for name in task])
        values = torch.einsum("etd,ed->et", frames, texts.cpu()).numpy()
    return float(value_order_correlation(values).mean())


def goal_image_rewards(frames: torch.Tensor, task: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """The reward of whoever has seen the goal: -|o - g|, averaged over the last frames g of the
    OTHER experts of the task. frames (E, T, D), task and expert (E,) -> (E, T); 0 if there is none.
    """
    values = np.zeros(frames.shape[:2], np.float32)
    for i in range(len(frames)):
        others = np.flatnonzero((task == task[i]) & expert & (np.arange(len(task)) != i))
        if len(others):
            values[i] = negative_distance(frames[i, :, None], frames[others, -1]).mean(1)
    return values


def score_episodes(model: RewardModel, data: Dataset, sentences: dict, test: np.ndarray,
                   own_reward=None):
    """Rewards of the test episodes {"": cosines (E, T), "goal_": by goal images, "own_":
    own_reward(frames, texts)}, metrics that have one score per episode {name: (scores (E,), 1 where
    it is defined (E,))}, and the sentence that each last frame prefers (E,)."""
    frames = embed_episodes(model, data, test)  # (E, T, D)
    tasks = list(sentences)
    with torch.inference_mode():
        texts = model.embed_texts([entry["instruction"] for entry in sentences.values()]).cpu()
        paraphrases = model.embed_texts([text for entry in sentences.values()
                                         for text in entry["paraphrases"]]).cpu()
    own = np.array([tasks.index(task) for task in data.task[test]])  # (E,)
    other = np.array([tasks.index(sentences[task].get("opposite", task))
                      for task in data.task[test]])  # (E,); the task itself if it has no opposite

    def rewards_under(texts):  # one text for each episode, (E, D)
        return torch.einsum("etd,ed->et", frames, texts).numpy()

    values = {"": rewards_under(texts[own]), "goal_": goal_image_rewards(
        frames, data.task[test], data.source[test] == "expert")}
    voc = value_order_correlation(values[""])
    voc_paraphrase = np.mean([value_order_correlation(rewards_under(paraphrases[3 * own + k]))
                              for k in range(3)], axis=0)
    voc_opposite = value_order_correlation(rewards_under(texts[other]))
    last = (frames[:, -1] @ texts.T).numpy()  # (E, tasks): whose end does it look like?
    rank = (last >= last[np.arange(len(test)), own][:, None]).sum(1)  # 1 = the right one, alone
    expert = (data.source[test] == "expert").astype(float)
    single = {
        "voc": (voc, expert), "voc_paraphrase": (voc_paraphrase, expert),
        "antonym": (voc - voc_opposite, expert * (own != other)),
        "retrieval_top1": (rank <= 1, expert), "retrieval_top5": (rank <= 5, expert)}
    if own_reward:
        values["own_"] = own_reward(frames, texts[own][:, None]).numpy()
    for prefix in values.keys() - {""}:
        single[prefix + "voc"] = value_order_correlation(values[prefix]), expert
    return values, single, last.argmax(1)


def bootstrap_weights(rng, source: np.ndarray, replicates: int) -> np.ndarray:
    """How often each episode counts: (1 + replicates, E). Row 0 is the data as they are.

    Experts and mixed episodes are drawn apart, so that every replicate has as many of either.
    """
    weights = np.ones((1 + replicates, len(source)))
    for kind in np.unique(source):
        group = np.flatnonzero(source == kind)
        weights[1:, group] = rng.multinomial(
            len(group), np.full(len(group), 1 / len(group)), size=replicates)
    return weights


def evaluate(model: RewardModel, data: Dataset, sentences: dict, own_reward=None) -> dict:
    """All metrics on the test episodes, see summarise(), and "preferred": see score_episodes()."""
    test = data.select(split="test")
    values, single, preferred = score_episodes(model, data, sentences, test, own_reward)
    return summarise(data, test, values, single) | {"preferred": preferred}


def summarise(data: Dataset, test: np.ndarray, values: dict[str, np.ndarray], single: dict,
              replicates: int = 1000) -> dict:
    """The report: {"seen", "unseen": {metric: {value, tasks, interval}}, "tasks": {task: scores}}.

    values {prefix: (E, T)} and single are score_episodes()'s. A metric is computed for each task,
    then averaged over tasks. Its interval holds 95 % of the averages that come out when each task's
    episodes are drawn again, with replacement. Also returned: "episodes" and "values".
    """
    rng, rows = np.random.default_rng(0), {}  # metric -> task -> (1 + replicates,)
    for task in np.unique(data.task[test]):
        mine = np.flatnonzero(data.task[test] == task)
        source, rewards = data.source[test[mine]], data.rewards[test[mine]]
        weights = bootstrap_weights(rng, source, replicates)
        mixed, across = source == "mixed", 1 - np.eye(len(mine))
        counts = {name: (scores[mine] * which[mine], which[mine])
                  for name, (scores, which) in single.items()}
        for prefix, v in values.items():
            correct, total = pair_counts(v[mine], rewards)
            counts[prefix + "ranking_accuracy_within"] = (
                np.diag(correct) * mixed, np.diag(total) * mixed)
            counts[prefix + "ranking_accuracy_across"] = correct * across, total * across
            counts[prefix + "success_auroc"] = pair_counts(  # does success get more than failure?
                v[mine, -1:], data.success[test[mine], -1:].astype(float))
            rows.setdefault(prefix + "epic", {})[task] = epic_distance(weights, v[mine], rewards)
        for metric, (above, below) in counts.items():
            rows.setdefault(metric, {})[task] = weighted_ratio(weights, above, below)
    return average_over_tasks(rows) | {"episodes": test, "values": values}


def average_over_tasks(rows: dict) -> dict:
    """rows: metric -> task -> (1 + replicates,), NaN where undefined. See summarise()."""
    report = {"seen": {}, "unseen": {}, "tasks": {}}
    for metric, by_task in rows.items():
        defined = {task: row for task, row in by_task.items() if not np.isnan(row[0])}
        for task, row in defined.items():
            report["tasks"].setdefault(task, {})[metric] = row[0]
        for group in ("seen", "unseen"):
            chosen = [row for task, row in defined.items() if group_of(task) == group]
            if chosen:
                means = np.nanmean(chosen, axis=0)
                report[group][metric] = {"value": means[0], "tasks": len(chosen),
                                         "interval": np.nanquantile(means[1:], [0.025, 0.975])}
    return report


# -----------------------------------------------------------------------------
# 6. A run: its settings, its report, and the model as others use it

def load_reward_model(run_dir: str | Path, device: str = "auto") -> RewardModel:
    """The trained model of a run folder, ready to score(frames, instruction).

    Raises InputError when the folder is no run or its weights do not fit. A model with LoRA also
    needs the pretrained weights it was trained on, from the same place as then.
    """
    run_dir = Path(run_dir)
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        backbone, pretrained, lora = config["backbone"], config["pretrained"], config["lora"]
    except (OSError, ValueError, KeyError) as problem:
        raise InputError(f"{run_dir} is not the folder of a run: {problem!r}") from None
    if lora:
        model = build_backbone(backbone, pretrained)
        add_lora(model, lora)
    else:
        model = build_backbone(backbone, "none")
    load_weights(model, run_dir / "model.safetensors")
    return to_device(model, pick_device(device)).eval()


def load_data(args: argparse.Namespace) -> tuple[Dataset, dict]:
    """The data set and the sentences. Raises InputError when they do not fit each other."""
    sentences, data = load_instructions(DATA / "instructions.json"), Dataset(args.data)
    if strangers := set(data.task) - set(sentences):
        raise InputError(f"{args.data} has tasks without an instruction: "
                         + ", ".join(sorted(strangers)))
    if not len(data.select(split="test")):
        raise InputError(f"{args.data} has no test episodes: collect 4 experts per task or more")
    return data, sentences


def settings_of(objective: str, setting: str) -> tuple[float, dict]:
    """Learning rate, and the constants that replace those of the loss's signature."""
    if setting == "faithful" or objective not in TUNED:
        return LEARNING_RATES[0], {}
    learning_rate, value = TUNED[objective]
    return learning_rate, {GRID[objective][0]: value}


def configuration(args: argparse.Namespace) -> dict:
    """All that decides the outcome of a run, versions and machine apart."""
    learning_rate, constants = settings_of(args.objective, args.setting)
    return {key: getattr(args, key) for key in (
        "objective", "setting", "seed", "backbone", "pretrained", "lora", "steps", "batch")} | {
        "learning_rate": args.learning_rate or learning_rate, "constants": constants,
        "alpha": args.alpha, "baseline": args.baseline,
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest()}


def prepare_model(args: argparse.Namespace) -> RewardModel:
    """The backbone as a run with these arguments starts from it."""
    device = pick_device(args.device)
    if args.lora and args.pretrained == "none":
        raise InputError("--lora adapts pretrained weights, and --pretrained none has none; a run "
                         "stores the adapters alone")
    torch.manual_seed(args.seed)  # decides the adapters' start, and random backbones
    model = build_backbone(args.backbone, args.pretrained)
    if args.lora:
        add_lora(model, args.lora)
    return to_device(model, device)


def own_reward_of(args: argparse.Namespace, model: RewardModel):
    """The reward of what is neither the cosine nor the distance to goal images: a function of
    frames (E, T, D) and texts (E, 1, D), or None."""
    if args.objective == "goal-baseline":
        with torch.inference_mode():
            baseline = model.eval().embed_texts([args.baseline])[0].cpu()
        return lambda frames, texts: goal_baseline_reward(frames, texts, baseline, args.alpha)
    return {
        "clock": lambda frames, texts: torch.arange(frames.shape[1]).repeat(len(frames), 1),
        "moved": lambda frames, texts: -negative_distance(frames, frames[:, :1]),
    }.get(args.objective)


@functools.cache
def report_functions() -> dict:
    """data/report.py: tables and pictures, nothing to learn from."""
    return runpy.run_path(str(DATA / "report.py"))


def train_objective(args: argparse.Namespace, model: RewardModel, data: Dataset, sentences: dict,
                    objective: str, learning_rate: float, constants: dict) -> list[dict]:
    """train() with an objective by name, and constants in place of those of its signature."""
    return train(model, data, sentences, functools.partial(OBJECTIVES[objective], **constants),
                 steps=args.steps, batch=args.batch, learning_rate=learning_rate, seed=args.seed,
                 oracle=objective in ORACLES)


def run(args: argparse.Namespace, data: Dataset, sentences: dict, started: float,
        folder: Path) -> dict:
    """Train one objective, evaluate it, and leave everything in a run folder. Returns the report.

    started is the perf_counter() from which its wall time counts.
    """
    config = configuration(args)
    model = prepare_model(args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.objective} on {args.backbone}, {trained / 1e6:.1f} M weights to train, "
          f"{model.mean.device}{', bfloat16' if model.low_precision else ''}; {data.E} episodes of "
          f"{len(np.unique(data.task))} tasks from {data.path}")
    log = train_objective(args, model, data, sentences, args.objective, config["learning_rate"],
                          config["constants"]) if OBJECTIVES[args.objective] else []
    report = evaluate(model, data, sentences, own_reward_of(args, model))
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "model.safetensors")
    report_functions()["draw_curves"](
        report, data, sentences, f"{args.objective}: rewards of test episodes over time",
        folder / "curves.png")
    np.savez(folder / "rewards.npz", episodes=report["episodes"], preferred=report["preferred"],
             **{prefix + "values": values for prefix, values in report["values"].items()})
    write_json(folder / "config.json", config | {
        "device": str(model.mean.device), "cores": os.cpu_count(), "torch": torch.__version__,
        "open_clip": open_clip.__version__, "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}"})
    report["wall_seconds"] = round(time.perf_counter() - started, 1)
    report["frames_per_second"] = round(
        5 * args.batch / np.median([entry["seconds"] for entry in log])) if log else None
    write_json(folder / "metrics.json", {  # last: a folder that has it is whole
        "objective": args.objective, "seed": args.seed, "log": log} | {
        key: report[key] for key in ("wall_seconds", "frames_per_second", "seen", "unseen",
                                     "tasks")})
    return report


def run_once(args: argparse.Namespace, data: Dataset, sentences: dict) -> None:
    """One run, in runs/<name>; without a name objective and seed, and a number if that is taken."""
    if args.name and (args.runs / args.name).exists():
        raise InputError(f"{args.runs / args.name} exists: choose another --name, or remove it")
    folder, n = args.runs / (args.name or f"{args.objective}-seed{args.seed}"), 2
    while folder.exists():
        folder, n = args.runs / f"{args.objective}-seed{args.seed}-{n}", n + 1
    report = run(args, data, sentences, STARTED, folder)
    print(report_functions()["format_report"](report))
    print(f"{report['wall_seconds']:.0f} s in all. Weights, metrics and pictures are in {folder}")


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, default=lambda array: array.tolist())
    path.write_text(text + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# 7. The study: every objective, on the same frames, by the same steps
#
# A comparison is a list of runs. Each has a folder of its own, and those that are there are not
# done again: stop it when you like, the same command goes on.


def finish(args: argparse.Namespace, data: Dataset, sentences: dict, jobs: list) -> list[Path]:
    """Do the runs that are missing. jobs: (objective, setting, seed). Returns their folders."""
    if len({group_of(task) for task in data.task[data.select(split="test")]}) < 2:
        raise InputError(f"{data.path} has no test episodes of unseen tasks, or of seen ones: a "
                         "comparison needs both")
    folders = []
    for objective, setting, seed in jobs:
        job = argparse.Namespace(**vars(args) | {
            "objective": objective, "setting": setting, "seed": seed})
        folder = args.runs / (args.name or "study") / f"{objective}-{setting}-seed{seed}"
        folders.append(folder)
        progress = f"[{len(folders)}/{len(jobs)}] {folder.name}"
        if not (folder / "metrics.json").exists():
            print(progress, flush=True)
            run(job, data, sentences, time.perf_counter(), folder)
            continue
        made, asked = json.loads((folder / "config.json").read_text()), configuration(job)
        if odd := [key for key in asked if made.get(key) != asked[key]]:
            raise InputError(f"{folder} was made with other settings ({', '.join(odd)}): choose "
                             "another --name, or remove it")
        print(progress + ": done before")
    return folders


def tune(args: argparse.Namespace, data: Dataset, sentences: dict) -> None:
    """Four settings of each objective, judged by VOC on the validation experts of the seen tasks:
    the three constants of the GRID, then the best of them with the second learning rate. Who knows
    no sentence is judged by its VOC under goal images."""
    path = args.runs / (args.name or "study") / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    settings = {key: value for key, value in configuration(args).items() if key in (
        "seed", "backbone", "pretrained", "lora", "steps", "batch", "data_sha256")}
    if found.setdefault("settings", settings) != settings:
        raise InputError(f"{path} was made with other settings: choose another --name, or remove "
                         "it")

    def validate(objective, learning_rate, value):
        key = f"learning rate {learning_rate:g}, {GRID[objective][0]} {value:g}"
        scores = found.setdefault(objective, {})
        if key not in scores:
            model = prepare_model(args)
            train_objective(args, model, data, sentences, objective, learning_rate,
                            {GRID[objective][0]: value})
            scores[key] = round(validation_voc(model, data, sentences, every=1,
                                               goal_images=objective in LANGUAGE_FREE), 4)
            write_json(path, found)
        print(f"{objective:18} {key:38} validation VOC {scores[key]:6.3f}")
        return scores[key]

    for objective in GRID if args.objective == "all" else [args.objective]:
        first, second = LEARNING_RATES
        best = max(GRID[objective][1], key=functools.partial(validate, objective, first))
        validate(objective, second, best)


def round_to_4(number: str) -> float:
    return round(float(number), 4)


def study(args: argparse.Namespace, data: Dataset, sentences: dict) -> None:
    """Compare all objectives over several seeds: tables, and pictures. Where the tuned setting
    differs from the faithful one, the latter is shown too, by its first seed."""
    differs = {objective for objective, (learning_rate, value) in TUNED.items()
               if (learning_rate, value) != (LEARNING_RATES[0], GRID[objective][1][0])}
    jobs = [(objective, "tuned" if objective in differs else "faithful", args.seed + k)
            for k in range(args.seeds) for objective, loss in OBJECTIVES.items()
            if loss or k == 0]  # without training all seeds are alike
    jobs += [(objective, "faithful", args.seed) for objective in OBJECTIVES if objective in differs]
    folders = finish(args, data, sentences, jobs)
    results, rewards = [], {}
    for folder in folders:
        metrics, config = (json.loads((folder / name).read_text(), parse_float=round_to_4)
                           for name in ("metrics.json", "config.json"))
        tasks = {task: {metric: scores[metric] for metric in scores if metric in (
            "voc", "ranking_accuracy_within")} for task, scores in metrics["tasks"].items()}
        del metrics["log"]
        results.append(metrics | {"tasks": tasks, "config": config})
        if config["seed"] == args.seed:
            for name, array in np.load(folder / "rewards.npz").items():
                key = f"{config['objective']}/{name}"  # of the tuned run, if there is one
                if name != "goal_values":
                    rewards.setdefault(key, np.float16(array) if "values" in name else array)
    root = folders[0].parent
    (root / "results.json").write_text(
        "[" + ",\n".join(json.dumps(result) for result in results) + "]\n")
    np.savez_compressed(root / "rewards.npz", **rewards)
    report_functions()["draw_all"](root, data)
    tables = "\n\n".join(report_functions()["tables"](root).values())
    (root / "tables.md").write_text(tables + "\n", encoding="utf-8")
    print(f"{tables}\nresults, tables and figures are in {root}")


def paired_p_values(scores: dict[str, np.ndarray], reference: str) -> dict[str, float]:
    """Does each objective differ from the reference over the same tasks? p-values, corrected.

    scores: {objective: (tasks,)}. If nothing but chance set the two apart, each task's difference
    could as well have had the other sign: p is the share of all such flips (of 9,999 random ones
    beyond 13 tasks) whose mean lies as far from 0. Then Holm's correction: the smallest p times
    their number, the next times one less, and so on.
    """
    p = {name: scipy.stats.permutation_test(
        (values - scores[reference],), np.mean, permutation_type="samples",
        random_state=0).pvalue if len(values) > 1 else 1.0
        for name, values in scores.items() if name != reference}
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


def best_of(values: np.ndarray, truth: np.ndarray, n: int) -> float:
    """Expected truth of the frame that the values like best among n drawn at random, without
    replacement, from these M: values, truth (M,), 1 <= n <= M. Exact, by counting draws.

    Of the C(M, n) draws, C(k, n - 1) have the frame with k lower ones as their best (of two equal
    ones the later counts as higher).
    """
    k, gammaln = np.arange(len(values)), scipy.special.gammaln  # gammaln(n + 1) = log n!
    log_best = gammaln(k + 1) - gammaln(n) - gammaln(k - n + 2)  # -inf where k < n - 1
    log_draws = gammaln(len(k) + 1) - gammaln(n + 1) - gammaln(len(k) - n + 1)
    return float(np.exp(log_best - log_draws) @ truth[np.argsort(values, kind="stable")])


def ensemble(args: argparse.Namespace, data: Dataset, sentences: dict) -> None:
    """Rewards of several independently trained models, combined, and what they are good for.

    Whoever maximises a learned reward finds its errors, the more so the harder the search: pick the
    best of N frames by the reward, and see what the simulator says of the pick. Where models err
    apart, a frame that all of them like is a safer pick. Ours differ only in the order of their
    batches, and share their warm start and its errors: the weaker kind of ensemble.
    Source: Eisenstein et al., "Helping or Herding?", 2312.09244.
    """
    jobs = [(args.objective, args.setting, args.seed + k) for k in range(args.ensemble)]
    folders = finish(args, data, sentences, jobs)
    test = data.select(split="test")
    values = np.stack([np.load(folder / "rewards.npz")["values"] for folder in folders])  # (N,E,T)
    for task in np.unique(data.task[test]):  # models differ in scale, and sentences in level
        mine = values[:, data.task[test] == task]
        values[:, data.task[test] == task] = (
            mine - mine.mean((1, 2), keepdims=True)) / (mine.std((1, 2), keepdims=True) + 1e-9)
    combined = {f"seed {seed}": v for (_, _, seed), v in zip(jobs, values)} | {
        "mean": values.mean(0), "minimum": values.min(0), "mean - std": values.mean(0)
        - values.std(0), "simulator": data.rewards[test]}
    smallest = data.T * np.unique(data.task[test], return_counts=True)[1].min()
    draws = 2 ** np.arange(int(math.log2(smallest)) + 1)
    found = {"draws": draws}
    print(f"{'':12}{'VOC unseen':>12}{'within unseen':>15}   simulator's reward (0 to 10) of the "
          f"best of {draws}, unseen tasks")
    for name, v in combined.items():
        report = summarise(data, test, {"": v}, {"voc": (
            value_order_correlation(v), (data.source[test] == "expert").astype(float))})
        picks = {}
        for task in np.unique(data.task[test]):
            mine = data.task[test] == task
            picks.setdefault(group_of(task), []).append(
                [best_of(v[mine].ravel(), data.rewards[test][mine].ravel(), n) for n in draws])
        found[name] = {group: report[group] | {"best_of": np.mean(picks[group], axis=0)}
                       for group in picks}
        print(f"{name:12}{found[name]['unseen']['voc']['value']:12.2f}"
              f"{found[name]['unseen']['ranking_accuracy_within']['value']:15.2f}   "
              + " ".join(f"{pick:.2f}" for pick in found[name]["unseen"]["best_of"]))
    path = folders[0].parent / f"ensemble-{args.objective}.json"
    write_json(path, found)
    print(f"all figures are in {path}")


# -----------------------------------------------------------------------------
# 8. The command line


def at_least(minimum: int):
    """A type for argparse: whole numbers from `minimum` on."""
    def whole_number(text: str) -> int:
        if (number := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return number
    return whole_number


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and test vision-language reward models on Meta-World, one learning "
                    "objective at a time.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what to do")
    what.add_argument("--objective", choices=[*OBJECTIVES, "all"], default="triplet",
                      help="what to train the backbone with, then evaluate; all compares them")
    what.add_argument("--tune", action="store_true",
                      help="try the grid of the objective on validation episodes instead")
    what.add_argument("--ensemble", type=at_least(2), metavar="N",
                      help="combine N models of the objective, and pick the best of many frames")
    what.add_argument("--collect", action="store_true", help="make a data set instead")
    what.add_argument("--seed", type=at_least(0), default=0, help="of training or collection")
    what.add_argument("--seeds", type=at_least(1), default=3,
                      help="how many, from --seed on, with --objective all")
    model = parser.add_argument_group("backbone")
    model.add_argument("--backbone", default="tiny", help="tiny, or any model of open_clip")
    model.add_argument("--pretrained", help="open_clip tag, checkpoint file, or 'none' for random "
                       "weights; not given, tiny takes its own from data/")
    model.add_argument("--lora", type=at_least(0), default=0, metavar="RANK",
                       help="train low-rank adapters of this rank; 0 trains every weight")
    training = parser.add_argument_group("training")
    training.add_argument("--data", type=Path, default=DATA / "metaworld.npz", help="data set")
    training.add_argument("--steps", type=at_least(1), default=120, help="optimiser steps")
    training.add_argument("--batch", type=at_least(1), default=40, help="videos, 5 frames each")
    training.add_argument("--setting", choices=("tuned", "faithful"), default="tuned",
                          help="constants chosen on validation episodes, or the official ones")
    training.add_argument("--learning-rate", type=positive,
                          help="peak, AdamW; not given, that of the setting")
    training.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
                          help="auto takes the first there is")
    training.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    training.add_argument("--name", help="of the run's own folder; not given, objective and seed, "
                          "or study")
    reward = parser.add_argument_group("reward of goal-baseline")
    reward.add_argument("--alpha", type=float, default=0.5, help="0 is the cosine, 1 the direction "
                        "from baseline to goal alone")
    reward.add_argument("--baseline", default="a robot arm over a table", help="the scene before")
    collection = parser.add_argument_group("collection (with --collect)")
    collection.add_argument("--tasks", nargs="+", default=[], metavar="TASK",
                            help="such as drawer-open-v3; none means all 50")
    collection.add_argument("--expert", type=at_least(1), default=14, help="experts per task")
    collection.add_argument("--mixed", type=at_least(0), default=6, help="mixed episodes per task")
    collection.add_argument("--frames", type=at_least(5), default=24, help="frames per episode")
    collection.add_argument("--size", type=at_least(1), default=96, help="pixels, width and height")
    collection.add_argument("--output", type=Path, default=Path("collected.npz"), help="data set")
    collection.add_argument("--workers", type=at_least(1), default=os.cpu_count(), help="processes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.collect:
            collect(args)
        elif args.tune and args.objective not in [*GRID, "all"]:
            raise InputError(f"{args.objective} has no entry in GRID: there is nothing to tune")
        elif args.ensemble and not OBJECTIVES.get(args.objective):
            raise InputError(f"--ensemble needs an objective that is trained, not {args.objective}")
        else:
            work = (tune if args.tune else ensemble if args.ensemble
                    else study if args.objective == "all" else run_once)
            work(args, *load_data(args))
    except InputError as problem:
        print(f"vlmrm: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvlmrm: stopped. Finished runs are kept; a study, started again, goes on from them",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
