"""What vlmrm.py needs and its reader does not: messages, files that are written whole, weights and
checkpoints, the folder of a run, the form of a data set.
"""
import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout  # torch brings it along
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from vlmrm import InputError


def progress_bar(*items, **options):
    """tqdm; without a terminal, in a log file, a line every 20 s instead of ten a second."""
    terminal = sys.stderr.isatty()
    return tqdm(*items, dynamic_ncols=terminal, mininterval=0.1 if terminal else 20, **options)


def unknown(kind: str, name: str, known: list[str]) -> InputError:
    """The error for a name that does not exist: the nearest ones that do."""
    near = difflib.get_close_matches(name, known, 5, cutoff=0)
    return InputError(f"unknown {kind} {name!r}; the nearest names are {', '.join(near)}")


def one_line(problem) -> str:
    """What is wrong, without line breaks: names that were typed may have some."""
    return " ".join(str(problem).split())


def first_line(problem: Exception, length: int) -> str:
    """The beginning of what another library says is wrong, or its kind if it says nothing."""
    return (str(problem).strip() or repr(problem)).splitlines()[0][:length]


@contextlib.contextmanager
def whole_file(path: Path):
    """Write a file whole or not at all: under another name, which is then changed to this one."""
    unfinished = path.with_stem(path.stem + ".unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before its name says that it is there
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary, arrays in it as lists, whole or not at all."""
    text = json.dumps(content, indent=1, default=lambda array: array.tolist())
    with whole_file(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while some := file.read(2**24):  # it may be larger than memory
            digest.update(some)
    return digest.hexdigest()


def unfrozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without its frozen weights: all that a run has to remember."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: state.cpu().contiguous() for name, state in model.state_dict().items()
            if name not in frozen}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all that is not frozen: with LoRA the adapters and the normalisation alone."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(unfrozen(model)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read back what save_weights() wrote. Raises InputError if the file does not fit the model."""
    try:
        weights = load_file(path)
        if odd := sorted(set(weights) ^ set(unfrozen(model))):
            raise ValueError(f"{len(odd)} weights too many or missing, such as {odd[0]}")
        if odd := [name for name, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"{odd[0]} is not finite")
        model.load_state_dict(weights, strict=False)
    except FileNotFoundError:
        raise InputError(f"no weights at {path}") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        raise InputError(f"{path} does not fit this model: {one_line(problem)[:200]}") from None


def save_checkpoint(path: Path, model: nn.Module, optimizer, log: list[dict]) -> None:
    """Write all that the next step depends on (on a CPU), whole or not at all."""
    tensors = {f"model.{name}": state for name, state in unfrozen(model).items()}
    for i, states in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": state for name, state in states.items()}
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors | {"generator": torch.get_rng_state()},
                                    metadata={"log": json.dumps(log)}))


def load_checkpoint(path: Path, model: nn.Module, optimizer) -> list[dict]:
    """Put model and optimiser where save_checkpoint() left them. Returns the log.

    Raises InputError if the file is damaged or does not fit the model.
    """
    try:
        with safe_open(path, "pt") as file:
            log, weights, states = json.loads(file.metadata()["log"]), {}, {}
            for key in file.keys():
                kind, _, name = key.partition(".")
                if kind == "model":
                    weights[name] = file.get_tensor(key)
                elif kind == "optimizer":
                    i, name = name.split(".")
                    states.setdefault(int(i), {})[name] = file.get_tensor(key)
            torch.set_rng_state(file.get_tensor("generator"))
        model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
        raise InputError(f"cannot go on from {path}: {str(problem)[:150]!r}; remove it to start "
                         "from the beginning") from None
    return log


def read_config(folder: Path) -> dict:
    """The settings of a run. Raises InputError when the folder is no run."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if lacking := {"objective", "backbone", "pretrained", "lora"} - set(config):
            raise ValueError(f"config.json lacks {sorted(lacking)[0]}")
    except (OSError, ValueError, TypeError) as problem:
        raise InputError(f"{folder}/config.json is damaged: {problem!r}") from None
    return config


def refuse_other_settings(folder: Path, config: dict) -> None:
    """Raise InputError unless the run in the folder was made with these settings."""
    made = read_config(folder)
    if odd := [key for key in config if made.get(key) != config[key]]:
        raise InputError(f"{folder} was made with other settings or data ({', '.join(odd)}): "
                         "choose another --name, or remove it")


@contextlib.contextmanager
def locked(folder: Path):
    """Keep other processes out of a run's folder. Raises InputError when one is in there.

    The system lets go of the lock when its owner dies, however it dies. A new folder is removed
    again if what it was made for cannot even begin.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", blocking=False):
            try:
                yield
            except OSError:  # the disk is full, say: that can be mended, and the run can go on
                raise
            except Exception:
                if new and not (folder / "checkpoint.safetensors").exists():
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            with contextlib.suppress(OSError):  # Windows does not remove what is open
                (folder / "lock").unlink()
    except Timeout:
        raise InputError(f"{folder} is in use by another process: choose another --name") from None


def find_strips(path: Path) -> tuple[int, int]:
    """Where in a data set's file the bytes of the array `strips` begin, and how many there are."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("strips.npy")
        with archive.open(entry) as array:
            np.lib.format.read_magic(array)
            (length,), _, dtype = np.lib.format.read_array_header_1_0(array)
            header = array.tell()
    if dtype != np.uint8 or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("strips must be bytes, and not compressed")
    with open(path, "rb") as file:  # name and extra field come before the array itself
        file.seek(entry.header_offset + 26)
        header += entry.header_offset + 30 + int(np.fromfile(file, "<u2", 2).sum())
    return header, length


def check_dataset(data) -> None:
    """Raise ValueError, with the reason, where the arrays are not what Dataset's docstring says."""
    for name, kinds, shape in (
            ("task", "U", (data.E,)), ("split", "U", (data.E,)), ("source", "U", (data.E,)),
            ("seed", "iu", (data.E,)), ("offsets", "iu", (data.E + 1,)),
            ("rewards", "f", (data.E, data.T)), ("success", "b", (data.E, data.T)),
            ("steps", "iu", (data.E, data.T))):
        array = getattr(data, name)
        if array.dtype.kind not in kinds or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, and should be {shape}")
    if data.E == 0 or data.T < 5:
        raise ValueError(f"{data.E} episodes of {data.T} frames; training takes 5 frames each")
    if not np.isfinite(data.rewards).all():
        raise ValueError("some rewards are not finite")
    if odd := {*data.split} - {"train", "validation", "test"} | {*data.source} - {
            "expert", "mixed"}:
        raise ValueError(f"unknown split or source '{sorted(odd)[0]}'")
    if (data.offsets[0], data.offsets[-1]) != (0, data.length) or (
            np.diff(data.offsets.astype(np.int64)) <= 0).any():
        raise ValueError("the offsets of the episodes do not fit the strips")
