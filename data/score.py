"""Reward every frame of a video with a trained model.

    python vlmrm.py --score clip.mp4 --instruction "open the drawer"
"""
import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

import vlmrm

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def pictures_in(path: Path) -> Iterator[np.ndarray]:
    """The frames of a film, GIF or image, or of a folder of images in the order of their names, in
    which numbers count as numbers: 2.png comes before 10.png."""
    if path.is_dir():
        for file in sorted(path.iterdir(), key=lambda file: [
                int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]):
            if file.suffix.lower() in PICTURES and not file.stem.endswith("-rewards"):  # ours
                yield from pictures_in(file)
    elif path.suffix.lower() in (*PICTURES, ".gif"):
        with Image.open(path) as picture:
            for k in range(getattr(picture, "n_frames", 1)):
                picture.seek(k)
                yield np.asarray(picture.convert("RGB"))  # from grey and transparent ones too
    else:
        yield from imageio.imiter(path, plugin="FFMPEG")


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Frames uint8 (H, W, 3) of whatever lies there, one by one: a film may be larger than memory.

    Raises InputError when there are none, when they cannot be read or differ in size.
    """
    shape = None
    try:
        for frame in pictures_in(path):
            shape = shape or frame.shape
            if frame.shape != shape:
                raise vlmrm.InputError(f"the pictures in {path} differ in size")
            yield frame
    except vlmrm.InputError:
        raise
    except FileNotFoundError:
        raise vlmrm.InputError(f"no video at {path}") from None
    except Exception as problem:  # every format has errors of its own
        raise vlmrm.InputError(f"cannot read {path} as a video: "
                               f"{vlmrm.first_line(problem, 120)}") from None
    if shape is None:
        raise vlmrm.InputError(f"{path} has no pictures in it")


def main(args: argparse.Namespace) -> None:
    """Print the reward of every frame of args.score, and draw them beside it."""
    if not args.instruction:
        raise vlmrm.InputError('--score needs the sentence: --instruction "open the drawer"')
    if not (args.model / "config.json").exists():
        raise vlmrm.InputError(f"no trained model in {args.model}: train one with 'python vlmrm.py "
                               "--objective triplet', or name another --model")
    objective = vlmrm.read_config(args.model)["objective"]
    if objective in vlmrm.LANGUAGE_FREE:
        raise vlmrm.InputError(f"the model in {args.model} was trained by {objective}, which knows "
                               "no sentence: its cosine with one means nothing")
    if objective != "zeroshot" and vlmrm.OBJECTIVES.get(objective, True) is None:
        raise vlmrm.InputError(f"{objective} is a control with a reward of its own, no model")
    model = vlmrm.load_reward_model(args.model, args.device)
    rewards, thumbnails, frames = [], [], read_frames(args.score)
    for some in iter(lambda: list(itertools.islice(frames, 32)), []):
        rewards += model.score(np.stack(some), args.instruction).tolist()
        for frame in some:
            small = Image.fromarray(frame)
            small.thumbnail((160, 160))
            thumbnails.append(np.asarray(small))
    picture = args.score.with_name(args.score.stem + "-rewards.png")
    with vlmrm.whole_file(picture) as unfinished:
        vlmrm.companion("report").draw_video(np.stack(thumbnails), np.array(rewards),
                                             args.instruction, unfinished)
    print("frame  reward")
    for number, reward in enumerate(rewards):
        print(f"{number:5}  {reward:.4f}")
    voc = vlmrm.value_order_correlation(np.array([rewards]))[0]
    print(f"VOC {voc:.2f} (1: rises all along), best frame {np.argmax(rewards)}; see {picture}")
