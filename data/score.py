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
from PIL import Image, ImageOps

import vlmrm

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def pictures_in(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """File and frame, for the frames of a film, GIF or image, or of a folder of images in the order
    of their names, in which numbers count as numbers: 2.png comes before 10.png."""
    if path.is_dir():
        for file in sorted(path.iterdir(), key=lambda file: [
                int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]):
            if file.suffix.lower() in PICTURES and not file.stem.endswith("-rewards"):  # ours
                yield from pictures_in(file)
    elif path.suffix.lower() in (*PICTURES, ".gif"):
        with Image.open(path) as picture:
            for k in range(getattr(picture, "n_frames", 1)):
                picture.seek(k)
                upright = ImageOps.exif_transpose(picture)  # phones turn pictures by a remark
                yield path.name, np.asarray(upright.convert("RGB"))  # grey, transparent ones too
    else:
        for frame in imageio.imiter(path, plugin="FFMPEG"):
            yield path.name, frame


def read_frames(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """File and frame, uint8 (H, W, 3), of whatever lies there, one by one: a film may be larger
    than memory.

    Raises InputError when there are none, when they cannot be read or differ in size.
    """
    shape = None
    try:
        for file, frame in pictures_in(path):
            shape = shape or frame.shape
            if frame.shape != shape:
                raise vlmrm.InputError(f"the pictures in {path} differ in size")
            yield file, frame
    except vlmrm.InputError:
        raise
    except FileNotFoundError:
        raise vlmrm.InputError(f"no video at {path}") from None
    except Exception as problem:  # every format has errors of its own
        raise vlmrm.InputError(f"cannot read {path} as a video: "
                               f"{vlmrm.plumbing.first_line(problem, 120)}") from None
    if shape is None:
        raise vlmrm.InputError(f"{path} has no pictures in it")


def main(args: argparse.Namespace) -> None:
    """Print the reward of every frame of args.score, and draw them beside it."""
    if not args.instruction:
        raise vlmrm.InputError('--score needs the sentence: --instruction "open the drawer"')
    if not (args.model / "config.json").exists():
        raise vlmrm.InputError(f"no trained model in {args.model}: train one with 'python vlmrm.py "
                               "--objective triplet', or name another --model")
    objective = vlmrm.plumbing.read_config(args.model)["objective"]
    if objective in vlmrm.LANGUAGE_FREE:
        raise vlmrm.InputError(f"the model in {args.model} was trained by {objective}, which knows "
                               "no sentence: its cosine with one means nothing")
    if objective != "zeroshot" and vlmrm.OBJECTIVES.get(objective, True) is None:
        raise vlmrm.InputError(f"{objective} is a control with a reward of its own, no model")
    model = vlmrm.load_reward_model(args.model, args.device)
    rewards, thumbnails, files, every, frames = [], [], [], 1, read_frames(args.score)
    for some in iter(lambda: list(itertools.islice(frames, 32)), []):
        rewards += model.score(np.stack([frame for _, frame in some]), args.instruction).tolist()
        for file, frame in some:
            if len(files) % every == 0:
                thumbnails.append(Image.fromarray(frame))
                thumbnails[-1].thumbnail((160, 160))
            files.append(file)
        if len(thumbnails) > 100:  # a few are drawn, and a film may be long: keep every second
            thumbnails, every = thumbnails[::2], 2 * every
    print("frame  reward")
    for number, (reward, file) in enumerate(zip(rewards, files)):
        print(f"{number:5}  {reward:.4f}  {file if args.score.is_dir() else ''}".rstrip())
    if len(rewards) == 1:
        print("one frame: there is no curve to draw")
        return
    video = args.score if args.score.name else args.score.resolve()  # "." has no name
    picture = video.with_name(video.name + "-rewards.png")
    with vlmrm.plumbing.whole_file(picture) as unfinished:
        vlmrm.companion("report").draw_video(np.stack(thumbnails), np.array(rewards),
                                             args.instruction, unfinished)
    voc = vlmrm.value_order_correlation(np.array([rewards]))[0]
    print(f"VOC {voc:.2f} (1: rises all along), best frame {np.argmax(rewards)}; see {picture}")
