"""What the tools share: where vlmrm.py is, how they begin and end, what they check. Each imports
it first, and so runs from any folder."""
import argparse
import logging
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    import vlmrm  # it takes seconds
except KeyboardInterrupt:
    print("\nstopped", file=sys.stderr)
    sys.exit(130)

import imageio.v3 as imageio
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

class Parser(argparse.ArgumentParser):
    """Options. What is wrong with them is one line, too."""
    def error(self, message: str):
        raise vlmrm.InputError(f"{message}; see --help")

def main(parser: Parser, work, argv: list[str] = None) -> int:
    """Do work(args) with the options of argv or the command line, whose numbers are those that
    --collect takes. Returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    logging.disable(logging.ERROR)  # what matters is said in one line
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # a docstring keeps its lines
    vlmrm.mend_streams()

    def checked_work():
        args = parser.parse_args(argv)
        vlmrm.check_numbers(vars(args))
        work(args)

    return vlmrm.exit_code(parser.prog, checked_work)

def check_outputs(*paths: Path) -> None:
    """Before the work: InputError or OSError for an output that exists or cannot be written."""
    made = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            made.append(path)
    except FileExistsError as problem:
        raise vlmrm.InputError(f"{problem.filename} exists, or is asked for twice: delete it, or "
                               "choose another name") from None
    finally:
        for path in made:
            path.unlink()

def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown. The first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def open_image(path: Path):
    """An image as Pillow opens it, or None for a film, which is not for Pillow: of motion JPEG it
    would read the first picture."""
    if path.suffix.lower() in (".mjpeg", ".mjpg"):
        return None
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return None
    if image.format == "MPEG":
        return None
    return image

def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, RGB; what can be seen through is on white. Raises ValueError."""
    if image.mode.startswith(("I", "F")):
        raise ValueError("its values are not bytes")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def in_order(folder: Path) -> list[Path]:
    """The files of a folder by their numbers: 10.png comes after 9.jpeg. Raises InputError if they
    are not numbered alike, as a-1.png and a-2.png are."""
    numbered = []
    for file in folder.glob("[!.]*"):
        match = re.fullmatch(r"(|.*\D)(?<!\d\.)(\d+)", file.stem)  # 0.5 is no whole number
        if not match:
            raise vlmrm.InputError(f"{file}: pictures of a folder are numbered: 1.png, 2.png, ...")
        numbered.append((match[1], int(match[2]), file))
    names = {name for name, _, _ in numbered}
    if len(names) > 1:
        raise vlmrm.InputError(f"{folder} mixes pictures called {', '.join(sorted(names)[:5])}")
    return [file for _, _, file in sorted(numbered)]

def read_pictures(path: Path):
    """Yield the pictures of a film, an image or a folder of numbered images, PIL's, upright, RGB.
    Raises InputError."""
    if path.is_dir():
        for file in in_order(path):
            yield from read_pictures(file)
        return
    with vlmrm.reading(path):
        image = open_image(path)
        if image is None:  # its own pictures, none twice to fill up seconds
            images = map(Image.fromarray, imageio.imiter(
                path, plugin="FFMPEG", output_params=["-fps_mode", "passthrough"]))
        elif image.format in ("AVIF", "GIF", "PNG", "TIFF", "WEBP"):  # a photo may have a thumbnail
            images = ImageSequence.Iterator(image)
        else:
            images = [image]
        for image in images:
            yield to_rgb(image)

def split_episodes(episodes: list[dict]) -> list[dict]:
    """Give each episode of one task its split, and print what is too little for the test."""
    vlmrm.assign_splits(episodes)
    for source, what in (("expert", "successful"), ("mixed", "failing")):
        splits = [episode["split"] for episode in episodes if episode["source"] == source]
        if splits and "test" not in splits:
            print(f"{episodes[0]['task']}: only {len(splits)} {what}, none is left for the test")
    return episodes

def check_names(tasks) -> None:
    """Raise InputError for tasks of one's own that have the name of one that nobody trains on."""
    for task in tasks:
        if vlmrm.group_of(task) == "unseen":
            raise vlmrm.InputError(f"{task} is an unseen task of Meta-World: take another name")
