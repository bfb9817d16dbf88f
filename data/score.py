"""Reward every frame of a video with a trained model.

    python vlmrm.py --score clip.mp4 --instruction "open the drawer"
"""
import argparse
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

import vlmrm


def read_frames(path: Path) -> np.ndarray:
    """The frames of a video, GIF or image, or of a folder of images in the order of their names:
    uint8 (N, H, W, 3). Grey and transparent pictures become red, green and blue.

    Raises InputError when there are none, when they cannot be read or differ in size.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in (
                ".png", ".jpg", ".jpeg", ".webp", ".bmp"))
            frames = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
            with Image.open(path) as picture:
                frames = []
                for k in range(getattr(picture, "n_frames", 1)):
                    picture.seek(k)
                    frames.append(np.asarray(picture.convert("RGB")))
        else:
            frames = list(imageio.imiter(path, plugin="FFMPEG"))
    except FileNotFoundError:
        raise vlmrm.InputError(f"no video at {path}") from None
    except Exception as problem:  # every format has errors of its own
        raise vlmrm.InputError(f"cannot read {path} as a video: "
                         f"{(str(problem) or repr(problem)).splitlines()[0][:120]}") from None
    if not frames:
        raise vlmrm.InputError(f"{path} has no pictures in it")
    if len({frame.shape for frame in frames}) > 1:
        raise vlmrm.InputError(f"the pictures in {path} differ in size")
    return np.stack(frames)


def main(args: argparse.Namespace) -> None:
    """Print the reward of every frame of args.score, and draw them beside it."""
    if not args.instruction:
        raise vlmrm.InputError('--score needs the sentence: --instruction "open the drawer"')
    if not (args.model / "config.json").exists():
        raise vlmrm.InputError(f"no trained model in {args.model}: train one with 'python vlmrm.py "
                         "--objective triplet', or name another --model")
    frames = read_frames(args.score)
    rewards = vlmrm.load_reward_model(args.model, args.device).score(frames, args.instruction)
    picture = args.score.with_name(args.score.stem + "-rewards.png")
    with vlmrm.whole_file(picture) as unfinished:
        vlmrm.companion("report").draw_video(frames, rewards, args.instruction, unfinished)
    print("frame  reward")
    for number, reward in enumerate(rewards):
        print(f"{number:5}  {reward:.4f}")
    voc = vlmrm.value_order_correlation(rewards[None])[0]
    print(f"VOC {voc:.2f} (1: rises all along); best frame {rewards.argmax()}; drawn in {picture}")
