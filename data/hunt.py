"""The hunt for an objective that orders frames as triplet does, and still reads. It stays beside
vlmrm.py to make data/results/hunt.json again: all that was tried, losers included.

    python data/scenes.py collect --out runs/scenes/test --seed 1 --scenes 80      captions, 45 s
    python data/hunt.py --device cuda --workers 15          9 minutes on an H200 and 16 cores

Judges: the forty seen tasks are dealt into five folds, and each run leaves out one of them. All
figures are of left-out tasks. The ten unseen ones have no part in it. Every candidate has four
settings. The rule was there before the first run: of all settings that keep 80 % of the start's
opposite gap and have a success AUROC of .75, the largest mean of VOC and 2 RA - 1, RA the ranking
accuracy at the same time. The same command goes on with what was stopped (runs/hunt.json).
"""
import argparse
import copy
import functools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import vlmrm  # before torch: see there

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import scenes
from study import interpolate

# -----------------------------------------------------------------------------
# What may be added to the order of frames. b has what a loss gets, and `table`, the rewards
# (B, K, B) of each video under each instruction of the batch, its diagonal `reward` (B, K), and
# `table_before`, that of the start's frames under the same instructions as they are now.

def divergence(table, before, temperature=0.07) -> torch.Tensor:
    """KL from the start's softmax over sentences (the last dimension) to the model's."""
    before, now = ((x / temperature).log_softmax(-1) for x in (before, table))
    return F.kl_div(now, before, log_target=True, reduction="none").sum(-1).mean()

def wrong(table: torch.Tensor) -> torch.Tensor:
    """A table without each video's own sentence: (B, K, B - 1)."""
    own = torch.eye(len(table), dtype=torch.bool, device=table.device)[:, None].expand_as(table)
    return table[~own].view(*table.shape[:2], -1)

def nearest(b) -> torch.Tensor:
    """Rewards (B, K) under the wrong sentence that is most like the own one."""
    likeness = (b.texts @ b.texts.T).detach().fill_diagonal_(-1)
    return b.table[torch.arange(len(b.table)), :, likeness.argmax(1)]

def triplet(reward: torch.Tensor, margin) -> torch.Tensor:
    early, late = torch.triu_indices(reward.shape[1], reward.shape[1], offset=1)
    return F.relu(margin - reward[:, late] + reward[:, early]).mean()

def opposite(b) -> torch.Tensor:
    """The reversed triplet under opposite sentences, of the few tasks whose is trained on too."""
    place = {text: i for i, text in enumerate(b.said)}
    rows = [-b.table[i, :, place[b.opposites[text]]] for text, i in place.items()
            if b.opposites.get(text) in place]
    return triplet(torch.stack(rows), 0.1) if rows else b.reward.sum() * 0

def captioned(b, pool: str = "captions") -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of the frames with some captions, now and at the start: (B, K, 96) each."""
    some = [getattr(b, pool)[i] for i in b.rng.choice(len(getattr(b, pool)), 96, replace=False)]
    with torch.no_grad():
        before = b.frames_before @ b.first.embed_texts(some).T
    return b.frames @ b.model.embed_texts(some).T, before

def directions(b) -> torch.Tensor:
    """DecisionNCE-T's contrast over videos."""
    steps = b.frames[:, [0, 1, 3, 4]].diff(dim=1)
    return vlmrm.info_nce(3 * F.normalize(steps, dim=-1, eps=1e-6).sum(1) @ b.texts.T)

def rivals(b) -> torch.Tensor:
    """R3M's contrast over videos: under its sentence a video's frames beat those of all others."""
    return -(b.table.permute(1, 2, 0) / 0.07).log_softmax(-1).diagonal(
        dim1=-2, dim2=-1)[[1, 3, 4]].mean()

TERMS = {
    "clip": lambda b: vlmrm.info_nce(b.table[:, -1] / 0.07),
    "kl": lambda b: divergence(b.table, b.table_before),
    "kl_wrong": lambda b: divergence(wrong(b.table), wrong(b.table_before)),
    "captions": lambda b: divergence(*captioned(b)),
    "captions_seen": lambda b: divergence(*captioned(b, "captions_seen")),
    "captions_sharp": lambda b: divergence(*captioned(b), 0.03),
    "captions_flat": lambda b: divergence(*captioned(b), 0.2),
    "caption_cosines": lambda b: F.mse_loss(*captioned(b)),
    "caption_changes": lambda b: F.mse_loss(*(table.diff(dim=1) for table in captioned(b))),
    "level": lambda b: b.reward[:, 0].var() + b.reward[:, -1].var(),
    "anchor": lambda b: F.mse_loss(wrong(b.table), wrong(b.table_before)),
    "features": lambda b: (b.frames - b.frames_before).square().sum(-1).mean(),
    "wrong": lambda b: F.relu(0.1 - b.reward[..., None] + wrong(b.table))[:, 3:].mean(),
    "nearest": lambda b: triplet(-nearest(b), 0.0),
    "rivals": rivals, "directions": directions, "opposite": opposite,
}

ZOO = {name: vlmrm.get_objective(str(HERE / "objectives" / f"{name}.py"))["loss"]
       for name in ("hop", "timerewarder")}

def mixture(frames, texts, times, *, order="triplet", margin=0.1, scale=20.0, noise=0.0,
            specific=0.0, frozen_text=False, context=None, **weights) -> torch.Tensor:
    """The order of frames under their sentence, and a weighted sum of TERMS."""
    texts = texts.detach() if frozen_text else texts
    b = SimpleNamespace(frames=frames, texts=texts, **vars(context))
    b.table, b.table_before = (torch.einsum("bkd,md->bkm", *both) for both in (
        (frames, texts), (b.frames_before, texts.detach())))
    b.reward = reward = b.table.diagonal(dim1=0, dim2=2).T
    if noise:  # the sentence, shaken
        shaken = texts + noise * F.normalize(torch.randn_like(texts), dim=-1)
        reward = torch.einsum("bkd,bd->bk", frames, F.normalize(shaken, dim=-1))
    reward = reward - specific * wrong(b.table).mean(-1)
    early, late = torch.triu_indices(5, 5, offset=1)
    rise, passed = reward[:, late] - reward[:, early], times[:, late] - times[:, early]
    loss = {"triplet": lambda: F.relu(margin - rise).mean(),
            "timed": lambda: F.relu(margin * passed - rise).mean(),
            "preference": lambda: F.softplus(-scale * rise).mean(),
            "distance": lambda: 0.8 * (rise / margin - passed).square().mean(),
            "hop": lambda: ZOO["hop"](frames, texts, times, scale),
            "timerewarder": lambda: ZOO["timerewarder"](frames, texts, times, scale)}[order]()
    return loss + sum(weight * TERMS[name](b) for name, weight in weights.items())

# -----------------------------------------------------------------------------
# What was tried

def four(name: str, *values, **fixed) -> list[dict]:
    return [fixed | {name: value} for value in values]

def grid(*names: str, values, **fixed) -> list[dict]:
    return [fixed | dict(zip(names, some)) for some in values]

DEFAULT = {"lora": 8, "learning_rate": 2e-3, "steps": 60, "seed": 0}  # of a run
ALL = {"lora": 0, "learning_rate": 5e-4}
BOTH = ((0.1, 0.03), (0.1, 0.1), (0.3, 0.03), (0.3, 0.1))
HUNT = {  # candidate: its settings; the first of "triplet" also gives WiSE-FT
    "start": [{"steps": 0}],
    "triplet": four("margin", 0.1, 0.05, 0.2) + [{"learning_rate": 4e-3}],
    "triplet, all weights": four("learning_rate", 1.25e-4, 2.5e-4, 5e-4, 1e-3, lora=0),
    "triplet, other seeds": grid("seed", "learning_rate", values=(
        (1, 2e-3), (2, 2e-3), (1, 4e-3), (2, 4e-3))),
    "rank of the adapters": four("lora", 1, 2, 4, 32),
    "more steps": grid("steps", "learning_rate", values=(
        (120, 2e-3), (120, 1e-3), (240, 2e-3), (240, 1e-3))),
    "preference": four("scale", 10.0, 20.0, 40.0, 80.0, order="preference"),
    "signed distance": four("margin", 0.1, 0.2, 0.4, 0.8, order="distance"),
    "timed margin": four("margin", 0.2, 0.4, 0.8, 1.6, order="timed"),
    "frozen text": four("learning_rate", 1e-3, 2e-3, 4e-3, 8e-3, frozen_text=True),
    "noise": four("noise", 0.3, 0.6, 1.0, 1.5),
    "paraphrases": four("paraphrases", 0.25, 0.5, 0.75, 1.0),
    "specific": four("specific", 0.25, 0.5, 0.75, 1.0),
    **{name: four(name, *values) for name, values in {
        "clip": (0.01, 0.03, 0.1, 0.3), "wrong": (0.1, 0.3, 1.0, 3.0),
        "nearest": (0.1, 0.3, 1.0, 3.0), "opposite": (0.1, 0.3, 1.0, 3.0),
        "rivals": (0.01, 0.03, 0.1, 0.3), "directions": (0.01, 0.03, 0.1, 0.3),
        "features": (0.03, 0.1, 0.3, 1.0), "anchor": (1.0, 3.0, 10.0, 30.0),
        "kl": (0.1, 0.3, 1.0, 3.0), "kl_wrong": (0.1, 0.3, 1.0, 3.0),
        "captions": (0.1, 0.3, 1.0, 3.0), "level": (1.0, 3.0, 10.0, 30.0)}.items()},
    "kl, all weights": four("kl", 0.1, 0.3, 1.0, 3.0, **ALL),
    "kl, frozen text": four("kl", 0.1, 0.3, 1.0, 3.0, frozen_text=True),
    "kl, preference": four("kl", 0.3, 1.0, 3.0, 10.0, order="preference"),
    "kl, signed distance": four("kl", 0.03, 0.1, 0.3, 1.0, order="distance", margin=0.4),
    "kl, directions": grid("kl", "directions", values=(
        (0.3, 0.03), (0.3, 0.1), (1.0, 0.03), (1.0, 0.1))),
    "kl, rivals": grid("kl", "rivals", values=((0.3, 0.01), (0.3, 0.03), (1.0, 0.01), (1.0, 0.03))),
    "kl, 180 steps": grid("kl", "learning_rate", steps=180, values=(
        (0.3, 2e-3), (0.3, 1e-3), (1.0, 2e-3), (1.0, 1e-3))),
    "kl, noise": grid("kl", "noise", values=((0.3, 0.6), (0.3, 1.0), (1.0, 0.6), (1.0, 1.0))),
    "kl, paraphrases": grid("kl", "paraphrases", values=(
        (0.3, 0.5), (0.3, 0.75), (1.0, 0.5), (1.0, 0.75))),
    "directions, preference": four("directions", 0.1, 0.3, 1.0, 3.0, order="preference"),
    "features, directions": grid("features", "directions", values=(
        (0.3, 0.03), (0.3, 0.1), (1.0, 0.03), (1.0, 0.1))),
    "features, directions, all weights": grid("features", "directions", **ALL, values=(
        (0.3, 0.03), (1.0, 0.03))),
    "hop": grid("scale", "lora", "learning_rate", order="hop", values=(
        (5.0, 8, 2e-3), (5.0, 0, 5e-4))),
    "hop, features, directions": grid("features", "directions", order="hop", scale=5.0, values=(
        (0.3, 0.03), (1.0, 0.1), (3.0, 0.1), (3.0, 0.3))),
    "hop, features, directions, all weights": grid(
        "features", "directions", order="hop", scale=5.0, **ALL, values=((1.0, 0.1), (3.0, 0.3))),
    "captions, all weights": four("captions", 0.1, 0.3, 1.0, 3.0, **ALL),
    "captions, all weights, 1e-3": four("captions", 0.1, 0.3, 1.0, 3.0, lora=0, learning_rate=1e-3),
    "captions of seen things, all weights": four("captions_seen", 0.03, 0.1, 0.3, 1.0, **ALL),
    "captions, other softmax, all weights": four("captions_sharp", 0.03, 0.1, **ALL) + four(
        "captions_flat", 0.3, 1.0, **ALL),
    "caption cosines, all weights": four("caption_cosines", 3.0, 10.0, 30.0, 100.0, **ALL),
    "caption changes, all weights": four("caption_changes", 10.0, 30.0, 100.0, 300.0, **ALL),
    "captions, directions, all weights": grid("captions", "directions", values=BOTH, **ALL),
    "captions, directions, 4e-3": grid("captions", "directions", learning_rate=4e-3, values=(
        (0.03, 0.03), (0.03, 0.1), (0.1, 0.03), (0.1, 0.1))),
    "captions, directions, rank 32": grid("captions", "directions", lora=32, values=(
        (0.03, 0.03), (0.03, 0.1), (0.1, 0.03), (0.1, 0.1))),
    "captions, directions, all weights, more": grid("captions", "directions", **ALL, values=(
        (0.03, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 0.3))),
    "captions, directions, more steps": grid("captions", "directions", "steps", **ALL, values=(
        (0.1, 0.1, 120), (0.3, 0.1, 120), (0.3, 0.3, 120), (0.3, 0.1, 240))),
    "captions, directions, opposite": grid("captions", "directions", "opposite", **ALL, values=(
        (0.1, 0.1, 0.1), (0.1, 0.1, 0.3), (0.1, 0.03, 0.3), (0.3, 0.1, 0.3))),
    "captions, opposite, all weights": grid("captions", "opposite", **ALL, values=(
        (0.1, 0.1), (0.1, 0.3), (0.3, 0.1), (0.3, 0.3))),
    "captions, specific, all weights": grid("captions", "specific", **ALL, values=(
        (0.1, 0.25), (0.1, 0.5), (0.3, 0.25), (0.3, 0.5))),
    "captions, other order, all weights": [ALL | {"captions": 0.1} | other for other in (
        {"margin": 0.2}, {"noise": 1.0}, {"order": "distance", "margin": 0.8},
        {"order": "timed", "margin": 0.4})],
    "the best once more, seed 1": [some | {"seed": 1} for some in (
        ALL | {"captions": 0.1}, ALL | {"captions": 0.3, "directions": 0.03},
        ALL | {"captions": 0.1, "specific": 0.5},
        {"lora": 0, "learning_rate": 1e-3, "captions": 0.3},
        {"learning_rate": 4e-3, "captions": 0.1, "directions": 0.03},
        {"learning_rate": 4e-3, "captions": 0.3, "directions": 0.03},
        {"features": 0.3, "directions": 0.03})],
}
METRICS = ("voc", "ranking_accuracy_same_time", "ranking_accuracy_within", "opposite_gap",
           "success_auroc", "retrieval_top1", "voc_paraphrase")

# -----------------------------------------------------------------------------
# The runs

class Reworded(dict):
    """Sentences of which training gets a paraphrase in a share of cases."""
    share, rng = 0.0, np.random.default_rng(0)

    def __getitem__(self, task):
        entry = super().__getitem__(task)
        return entry if self.rng.random() >= self.share else {
            "instruction": self.rng.choice(entry["paraphrases"])}

def figures(model, data, sentences: dict) -> dict:
    """Of the left-out tasks: {task: {metric: score}}."""
    return {task: {metric: round(float(scores[metric]), 4) for metric in METRICS
                   if metric in scores}
            for task, scores in vlmrm.evaluate(model, data, sentences)["tasks"].items()}

def one_run(job: dict) -> dict:
    """Train with one setting, leave out one fold. Returns {candidate: {setting: figures()}}."""
    data, sentences = copy.copy(SHARED.data), SHARED.sentences
    seen = sorted(set(sentences) - set(SHARED.unseen))
    left_out = seen[job["fold"]::5]
    vlmrm.UNSEEN_TASKS = SHARED.unseen + tuple(left_out)
    data.split = np.where(np.isin(data.task, left_out), "test", np.where(
        np.isin(data.task, SHARED.unseen) | (data.split != "train"), "validation", "train"))
    setting = dict(job["setting"])
    config = {"backbone": "tiny", "pretrained": None, "batch": 32} | {
        name: setting.pop(name, value) for name, value in DEFAULT.items()}
    model = vlmrm.prepare_model(config, job["device"])
    first, wording = copy.deepcopy(model).eval(), Reworded(sentences)
    wording.share, wording.rng = setting.pop("paraphrases", 0), np.random.default_rng(0)
    context = SimpleNamespace(model=model, first=first, said=[], captions=SHARED.captions,
                              rng=np.random.default_rng(0), opposites=SHARED.opposites)
    context.captions_seen = sorted(set().union(*(
        SHARED.caption_of[task] for task in seen if task not in left_out)))

    def loss(frames, texts, times, start):
        context.frames_before = start[0]
        return mixture(frames, texts[:len(frames)], times, context=context, **setting)

    embed = model.embed_texts

    def listen(said):  # a term or two need the words
        context.said = said[:config["batch"]] if len(said) > config["batch"] else context.said
        return embed(said)

    model.embed_texts = listen
    if config["steps"]:
        vlmrm.train(model, data, wording, loss, config)
    found = {job["candidate"]: {job["name"]: figures(model, data, sentences)}}
    if job["candidate"] == "triplet" and setting.get("margin") == 0.1:
        ends = [{name: weight.clone() for name, weight in vlmrm.trained_weights(some).items()}
                for some in (first, model)]
        for share in (0.25, 0.5, 0.75, 0.9):
            vlmrm.put_weights(model, interpolate(*ends, share))
            found.setdefault("WiSE-FT", {})[f"share {share}"] = figures(model, data, sentences)
    return found

def prepare(args) -> SimpleNamespace:
    """What all runs share, before processes are forked: unpacked videos, captions."""
    data, sentences = vlmrm.Dataset(args.data), vlmrm.load_instructions(args.instructions)
    videos = data.load(np.arange(data.E))
    data.load = lambda episodes: videos[episodes]
    known = scenes.load_scenes([args.scenes], sorted(sentences))
    tokenizer, rng = vlmrm.tiny_tokenizer(), np.random.default_rng(0)
    caption_of = {task: {*scenes.describe(known, task, rows, rng, tokenizer)[0]}
                  for task, rows in known["rows"].items()}
    return SimpleNamespace(
        data=data, sentences=sentences, unseen=vlmrm.UNSEEN_TASKS, caption_of=caption_of,
        captions=sorted(set().union(*caption_of.values())),
        opposites={entry["instruction"]: sentences[entry["opposite"]]["instruction"]
                   for entry in sentences.values() if "opposite" in entry})

def summary(found: dict) -> dict:
    """{candidate: {setting: {metric: mean over the left-out tasks of all folds}}}."""
    means = {}
    for candidate, settings in found.items():
        for name, folds in settings.items():
            tasks = [scores for fold in folds.values() for scores in fold.values()]
            means.setdefault(candidate, {})[name] = {
                metric: round(float(np.mean([s[metric] for s in tasks if metric in s])), 3)
                for metric in METRICS}
    return means

def main() -> None:
    global SHARED
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=vlmrm.DATA / "metaworld.npz")
    add("--instructions", type=Path, default=vlmrm.DATA / "instructions.json")
    add("--scenes", type=Path, default=Path("runs/scenes/test"), help="(runs/scenes/test)")
    add("--runs", type=Path, default=Path("runs"), help="where hunt.json of each task goes (runs)")
    add("--results", type=Path, default=HERE / "results", help="its means (data/results)")
    add("--device", default="auto")
    add("--workers", type=int, default=1)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    found = vlmrm.read_json(path) if (path := args.runs / "hunt.json").exists() else {}
    jobs = [{"candidate": candidate, "setting": setting, "fold": fold, "device": args.device,
             "name": ", ".join(f"{key} {value}" for key, value in setting.items())}
            for candidate, settings in HUNT.items() for setting in settings for fold in range(5)]
    jobs = [job for job in jobs
            if str(job["fold"]) not in found.get(job["candidate"], {}).get(job["name"], {})]
    SHARED = prepare(args)
    torch.set_num_threads(1 if args.workers > 1 else torch.get_num_threads())
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        for job, new in zip(jobs, tqdm(pool.map(one_run, jobs), "hunting", total=len(jobs))):
            for candidate, settings in new.items():
                for name, some in settings.items():
                    found.setdefault(candidate, {}).setdefault(name, {})[str(job["fold"])] = some
            vlmrm.write_whole(path, json.dumps(found).encode())
    vlmrm.write_whole(args.results / "hunt.json", summary(found))

if __name__ == "__main__":
    main()
