"""The options of vlmrm.py, which reads them before its slow imports: nothing here may be slow.

    python vlmrm.py --help
"""
import argparse
import os
from pathlib import Path

DATA = Path(__file__).resolve().parent


def number(kind: type, minimum: float, maximum: float = 10**6):
    """A type for argparse: int or float, from `minimum` to `maximum`."""
    def value(text: str):
        if not minimum <= (found := kind(text)) <= maximum:  # nan fails this too
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return found
    value.__name__ = "whole number" if kind is int else "number"  # as argparse will call it
    return value


def plain_name(text: str) -> str:
    """A type for argparse: the name of a folder, not a path."""
    if text in ("", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; --runs chooses the folder")
    return text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from argv or the command line. Bad ones end in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Train and test vision-language reward models on Meta-World, one learning "
                    "objective at a time.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"vlmrm: {' '.join(text.split())}; see --help\n")
    what = parser.add_argument_group("what to do")
    what.add_argument("--objective", default="triplet", metavar="NAME",
                      help="what to train the backbone with, then evaluate: triplet, preference, "
                           "progress, clip, decisionnce-p, decisionnce-t, vlc, tcn, r3m, vip, liv, "
                           "hilp, tcn-text, vip-text, hilp-text, preference-oracle; without "
                           "training zeroshot, goal-baseline, clock, moved; all compares them")
    modes = what.add_mutually_exclusive_group()
    modes.add_argument("--resume", type=Path, metavar="FOLDER",
                       help="go on with a run that was stopped; all settings come from its folder")
    modes.add_argument("--score", type=Path, metavar="VIDEO", help="reward every frame of a video, "
                       "GIF, image or folder of images, with a trained --model")
    modes.add_argument("--tune", action="store_true",
                       help="try the grid of the objective on validation episodes instead")
    modes.add_argument("--ensemble", type=number(int, 2), metavar="N",
                       help="combine N models of the objective, and pick the best of many frames")
    modes.add_argument("--collect", action="store_true", help="make a data set instead")
    what.add_argument("--seed", type=number(int, 0, 10**5), default=0, help="of all that is random")
    what.add_argument("--seeds", type=number(int, 1), default=3,
                      help="how many, from --seed on, with --objective all")
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--backbone", default="tiny", help="tiny, thumbnail, or any of open_clip")
    backbone.add_argument("--pretrained", help="open_clip tag, checkpoint file, or 'none' for "
                          "random weights; not given, tiny takes its own from data/")
    backbone.add_argument("--lora", type=number(int, 0, 1024), default=0, metavar="RANK",
                          help="train low-rank adapters of this rank; 0 trains every weight")
    training = parser.add_argument_group("training")
    training.add_argument("--data", type=Path, default=DATA / "metaworld.npz", help="data set")
    training.add_argument("--instructions", type=Path, default=DATA / "instructions.json",
                          help="the sentences of its tasks")
    training.add_argument("--steps", type=number(int, 1), default=120, help="optimiser steps")
    training.add_argument("--batch", type=number(int, 1), default=40, help="videos, 5 frames each")
    training.add_argument("--setting", choices=("tuned", "faithful"), default="tuned",
                          help="constants chosen on validation episodes, or the official ones")
    training.add_argument("--learning-rate", type=number(float, 1e-9, 10),
                          help="peak, AdamW; not given, that of the setting")
    training.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
                          help="auto takes the first there is")
    training.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    training.add_argument("--name", type=plain_name, help="of the run's own folder; not given, "
                          "objective and seed, or study")
    add_other_options(parser)
    args = parser.parse_args(argv)
    refuse_idle_options(parser, args)
    return args


def add_other_options(parser: argparse.ArgumentParser) -> None:
    """The options of what is not training."""
    reward = parser.add_argument_group("reward of goal-baseline")
    reward.add_argument("--alpha", type=number(float, 0, 1), default=0.5,
                        help="0 is the cosine, 1 the direction from baseline to goal alone")
    reward.add_argument("--baseline", default="a robot arm over a table", help="the scene before")
    use = parser.add_argument_group("use (with --score)")
    use.add_argument("--instruction", help="what the video should show")
    use.add_argument("--model", type=Path, default=Path("runs/triplet-seed0"), metavar="FOLDER",
                     help="the run whose model scores")
    collection = parser.add_argument_group("collection (with --collect)")
    collection.add_argument("--tasks", nargs="+", default=[], metavar="TASK",
                            help="such as drawer-open-v3; none means all 50")
    collection.add_argument("--expert", type=number(int, 1, 1000), default=14,
                            help="experts per task")
    collection.add_argument("--mixed", type=number(int, 0, 1000), default=6,
                            help="mixed episodes per task")
    collection.add_argument("--frames", type=number(int, 5), default=24, help="frames per episode")
    collection.add_argument("--size", type=number(int, 8), default=96, help="pixels, square")
    collection.add_argument("--vary", action="store_true",
                            help="another camera, other colours and light in each episode")
    collection.add_argument("--output", type=Path, default=Path("collected.npz"), help="data set")
    collection.add_argument("--workers", type=number(int, 1), default=os.cpu_count(),
                            help="processes")


def refuse_idle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End in one line if an option was given that belongs to something else."""
    use = {"instruction", "model"}
    collection = {"tasks", "expert", "mixed", "frames", "size", "vary", "output", "workers"}
    obeyed = {"score": use | {"device"}, "collect": collection | {"seed", "instructions"},
              "resume": {"device"}}
    mode = next((mode for mode in obeyed if getattr(args, mode)), "training")
    idle = set(vars(args)) - obeyed.get(mode, set(vars(args)) - use - collection) - {mode}
    if args.objective != "all":
        idle |= {"seeds"} | ({"alpha", "baseline"} if args.objective != "goal-baseline" else set())
    if args.tune:
        idle |= {"learning_rate", "setting", "seeds", "alpha", "baseline"}
    for option in sorted(idle):
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} has no effect here")
