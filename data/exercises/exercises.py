"""Eleven exercises, easy to hard, and their checks. They stay beside vlmrm.py because reading it is
half of learning it. Write your answers into a file answers.py beside vlmrm.py:

    python data/exercises.py          what there is to do
    python data/exercises.py 3        check your answer to exercise 3

1. A LOSS BY HAND. A video's five frames have the cosines 0.0, 0.3, 0.2, 0.2, 0.6 with its
   instruction. What is triplet_loss at margin 0.1?   answer_1 = ...
2. THE PLANTED BUG. planted_loss() in data/exercises.py wants to be DecisionNCE-P, written out in
   loops, and is not: it also rewards a model whose cosines are simply all higher under the right
   sentence. Where is the mistake?
   def answer_2(frames, texts, times): the loss, mended
3. MARGIN AGAINST TEMPERATURE. softplus(s x) / s is a soft max(0, x). From which s on do the two
   never differ by more than 0.01? To within 1 %.   answer_3 = ...
4. WHY DOES TCN FAIL HERE? Show that its loss says nothing about the reward: for given frames
   (B, 5, D) find sentences under which the reward FALLS in every video (VOC < 0), whatever the
   frames' TCN loss is. D is larger than 5.   def answer_4(frames): texts (B, D), unit vectors
5. A NEW TASK. Make answer_5.npz and answer_5.json, which teach something that Meta-World does not
   have (film a drawer at home; or draw it): at least 10 experts of one task that is not among the
   50, with its sentence and three paraphrases. write_dataset() says what an episode is. The check
   trains on them (--batch 1), and wants a VOC above .5 on the test experts.
6. A NEW CAMERA. Meta-World has more than one: take "topview" or "corner3". Change one line, and
   python vlmrm.py --collect --tasks drawer-open-v3 --expert 2 --mixed 1 --data answer_6.npz
   (And "behindGripper"? It hangs the right way up: what would be wrong?)
7. A NEW BACKBONE. def answer_7(): a RewardModel whose vision tower is made of convolutions, two at
   least, without attention; the text tower may stay. Seen tasks must have a VOC of .9 in 60 steps.
8. THE REPAIR. Let triplet move all weights, and fast:
   python vlmrm.py --objective triplet --lora 0 --learning-rate 2e-3 --runs runs/rough
   What has become of door-open, an unseen task (metrics.json, tasks, door-open-v3, voc)? And of the
   mean "VOC minus VOC of the opposite" of unseen tasks? The start has .56 and .65. Write a file
   answer_8.py beside vlmrm.py, with a loss(frames, texts, times) or one that takes `before` too,
   none of ours: under the same options it must order unseen tasks better than triplet, and keep a
   gap of .5. The check trains both. Do not choose by it: leave seen tasks out of training, and
   choose by those.
9. A REWARD THAT IS HARD TO HACK. You get the rewards of 19 models, (19, N), for the N test frames
   of one task, in no order of time: a model for each objective with a loss, of vlmrm.py and
   data/objectives/, by name. Combine them: when the best of 1, 2, 4, ... 128 frames is picked by
   your reward, the simulator's reward of the pick must never fall, and end above that of the model
   which one would choose on seen tasks. (Means over the ten unseen tasks. data/results/rewards.npz
   has the seen ones too, to choose by.)   def answer_9(rewards): (N,)
10. A ROW OF THE TABLE. Reproduce an objective's three seeds on a GPU: python vlmrm.py --objective
   NAME --seeds 3 --device cuda --runs runs/gpu. Is its VOC on seen and unseen tasks within what the
   spread over seeds allows?   answer_10 = "NAME"
11. A BATCH LARGER THAN THE MEMORY. loss(frames, texts) holds every video against every other, and
   there is memory for two of the eight. Leave in the model the gradients that one backward pass of
   all would, though embed_frames() and embed_texts() never see more than two videos at once. (What
   does a loss need of the towers, and what do these need of it? GradCache, 2101.06983.)
   def answer_11(model, loss, pixels, said): pixels (8, 5, S, S, 3), said 8 sentences
"""
import argparse
import math
import operator
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent  # where the answers are

if __name__ == "__main__":  # before the imports that take seconds
    if len(sys.argv) == 1:
        sys.exit(print(__doc__))
    if sys.argv[1:] not in [[str(number)] for number in range(1, 12)]:
        print("there are the exercises 1 to 11: python data/exercises.py 3")
        sys.exit(2)
sys.path[:0] = [str(ROOT), str(HERE)]

import vlmrm  # before torch: see there

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
import report
from study import all_objectives

def planted_loss(frames, texts, times, scale: float = 100.0):  # exercise 2
    frames, texts = F.normalize(frames, dim=-1), F.normalize(texts, dim=-1)
    videos, length = frames.shape[:2]
    progress = torch.zeros(videos, videos)
    for i in range(videos):
        for j in range(videos):
            early = sum(frames[i, k] @ texts[j] for k in range(length // 2))
            late = sum(frames[i, k] @ texts[j] for k in range(length // 2, length))
            progress[i, j] = scale * (late - early)
    own = torch.arange(videos)
    return (F.cross_entropy(progress, own) + F.cross_entropy(progress.T, own)) / 2

def random_batch(seed: int = 0):
    """Frames (6, 5, 16) and texts (6, 16), unit vectors, and times (6, 5)."""
    vectors = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(seed))
    frames, texts = F.normalize(vectors, dim=-1).split((5, 1), dim=1)
    return frames, texts[:, 0], torch.linspace(0, 1, 5).expand(6, 5)

def best_of(predicted: np.ndarray, truth: np.ndarray, n: int) -> float:
    """Expected truth of the frame that is predicted best among n drawn at random, without
    replacement, from these M: predicted, truth (M,), 1 <= n <= M. Exact: of the C(M, n) draws,
    C(k, n - 1) have the frame with k lower ones as their best (of two equal ones the later)."""
    k, log_factorial = np.arange(len(predicted)), lambda x: scipy.special.gammaln(x + 1)
    log_best = log_factorial(k) - log_factorial(n - 1) - log_factorial(k - n + 1)  # or -inf
    log_draws = log_factorial(len(k)) - log_factorial(n) - log_factorial(len(k) - n)
    return float(np.exp(log_best - log_draws) @ truth[np.argsort(predicted, kind="stable")])

def configuration(*options: str, objective: str = "triplet") -> dict:
    """The configuration of a run with these options."""
    args = vars(vlmrm.parse_arguments([*options])) | {"objective": objective}
    return vlmrm.configuration(argparse.Namespace(**args))

def saved(objective: str, group: str) -> list[float]:
    """VOC of the seeds in data/results, trained as by default."""
    runs = report.load(HERE / "results")[objective][report.FIRST]
    return [run[group]["voc"]["value"] for run in runs]

def check_1(answer):
    cosines = torch.tensor([0.0, 0.3, 0.2, 0.2, 0.6])
    frames = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=-1)[None]  # (1, 5, 2)
    loss = vlmrm.triplet_loss(frames, torch.tensor([[1.0, 0.0]]), None).item()
    return abs(answer - loss) < 1e-4, f"you said {answer}"

def check_2(answer):
    right = vlmrm.get_objective(all_objectives()["decisionnce-p"])["loss"]
    worst = max(abs(answer(*batch) - right(*batch)).item() for batch in map(random_batch, range(5)))
    return worst < 1e-3, f"the largest difference from DecisionNCE-P is {worst:.4f}"

def check_3(answer):
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    gap = lambda s: (F.softplus(s * x) / s - x.relu()).max().item()
    return gap(1.01 * answer) <= 0.01 <= gap(0.99 * answer), (
        f"at s = {answer} the largest difference is {gap(answer):.5f}")

def check_4(answer):
    frames = random_batch()[0]
    found = answer(frames)
    voc = vlmrm.value_order_correlation(torch.einsum("btd,bd->bt", frames, found).numpy())
    unit = torch.allclose(found.norm(dim=-1), torch.ones(len(frames)), atol=1e-4)
    return bool(unit and (voc < 0).all()), f"VOC of the videos {voc.round(2)}, unit {unit}"

def check_5():
    data = vlmrm.Dataset(ROOT / "answer_5.npz")
    known = vlmrm.load_instructions(HERE / "instructions.json")
    new = {str(task): len(data.select(task=task, source="expert"))
           for task in {*data.task} - {*known}}
    if max(new.values(), default=0) < 10:
        return False, f"experts of tasks that are not Meta-World's: {new}"
    config = configuration("--data", str(ROOT / "answer_5.npz"), "--batch", "1", "--instructions",
                           str(ROOT / "answer_5.json"))
    with tempfile.TemporaryDirectory() as folder:
        tasks = vlmrm.run(config, vlmrm.folder_for(config, Path(folder)))["tasks"]
    found = {task: round(tasks[task]["voc"], 2) for task in new if "voc" in tasks.get(task, {})}
    return max(found.values(), default=0) > 0.5, f"VOC on the test experts: {found}"

def check_6():
    mine, shipped = vlmrm.Dataset(ROOT / "answer_6.npz"), vlmrm.Dataset(HERE / "metaworld.npz")
    first = shipped.select(task="drawer-open-v3")[0]
    frames, old = mine.frames(0).astype(int), shipped.frames(first)
    same = np.allclose(mine.rewards[0], shipped.rewards[first], atol=1e-3)
    if frames.shape != old.shape or not same:
        return False, "its first episode is not the one of the shipped data: change the camera only"
    apart = min(np.abs(frames - old[:, ::rows, ::columns]).mean()  # turned ones are no new camera
                for rows in (1, -1) for columns in (1, -1))
    return apart > 10, f"its pictures differ from the old camera's by {apart:.0f} grey levels"

def check_7(answer):
    torch.manual_seed(0)
    model, config = answer(), configuration("--steps", "60")
    kinds = [type(part) for part in model.clip.visual.modules()]
    if torch.nn.MultiheadAttention in kinds or kinds.count(torch.nn.Conv2d) < 2:
        return False, "its vision tower has attention in it, or fewer than two Conv2d"
    data, sentences = vlmrm.Dataset(config["data"]), vlmrm.load_instructions(config["instructions"])
    vlmrm.train(model, data, sentences, vlmrm.triplet_loss, config)
    voc = vlmrm.evaluate(model, data, sentences)["seen"]["voc"]["value"]
    return voc > 0.9, f"VOC on seen tasks {voc:.2f}"

def check_8():
    path, batch = str(ROOT / "answer_8.py"), random_batch()
    answer = vlmrm.get_objective(path)
    usual = vlmrm.get_objective("triplet")
    if not answer["loss"] or any(answer[key] != usual[key] for key in ("reward", "LABELS")):
        return False, "it takes a loss, the reward is the cosine, and the labels are the times"

    def value(loss):
        before = {"before": [x.roll(1, -1) for x in batch[:2]]} if vlmrm.takes_before(loss) else {}
        return loss(*batch, **before)

    if twins := [name for name, other in all_objectives().items()
                 if (loss := vlmrm.get_objective(other)["loss"])
                 and torch.isclose(value(loss), value(answer["loss"]))]:
        return False, f"this is {twins[0]}"
    voc, gap = {}, {}
    for name in ("triplet", path):
        config = configuration("--lora", "0", "--learning-rate", "2e-3", objective=name)
        unseen = vlmrm.run(config, vlmrm.folder_for(config, ROOT / "runs" / "rough"))["unseen"]
        voc[name], gap[name] = (round(unseen[metric]["value"], 2)
                                for metric in ("voc", "opposite_gap"))
    return voc[path] > voc["triplet"] and gap[path] >= 0.5, (
        f"VOC {voc[path]}, triplet's {voc['triplet']}; VOC minus VOC of the opposite {gap[path]}, "
        f"triplet's {gap['triplet']}")

def check_9(answer):
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    parts = {name: vlmrm.get_objective(path) for name, path in sorted(all_objectives().items())}
    trained = [name for name in parts if parts[name]["loss"]]
    with np.load(HERE / "results" / "rewards.npz") as file:
        predicted = np.float32([file[f"{name}/predicted"] for name in trained])  # (19, E, T)
    test, draws = data.select(split="test"), 2 ** np.arange(8)

    def picks(tasks, reward):  # the simulator's reward of the best of 1, 2, ... 128 frames
        found = []
        for task in tasks:
            where = data.task[test] == task
            models = predicted[:, where].reshape(len(trained), -1)
            truth = data.rewards[test[where]].ravel()
            order = np.argsort(models[0], kind="stable")  # hides time
            mine = np.asarray(reward(models[:, order]))
            if mine.shape != truth.shape or not np.isfinite(mine).all():
                raise ValueError(f"not {truth.shape} finite rewards")
            found.append([best_of(mine, truth[order], n) for n in draws])
        return np.mean(found, axis=0)

    yours = picks(vlmrm.UNSEEN_TASKS, answer)
    singles = [picks(vlmrm.UNSEEN_TASKS, operator.itemgetter(i)) for i in range(len(trained))]
    if twins := [name for name, its in zip(trained, singles) if np.allclose(yours, its)]:
        return False, f"this is {twins[0]} alone"
    seen = sorted({*data.task} - {*vlmrm.UNSEEN_TASKS})
    chosen = max((i for i, name in enumerate(trained) if parts[name]["LABELS"] == "times"),
                 key=lambda i: picks(seen, operator.itemgetter(i))[-1])
    return (np.diff(yours) > -1e-3).all() and yours[-1] > singles[chosen][-1], (
        f"the simulator's reward of the best of {draws}: by yours {yours.round(2)}, by "
        f"{trained[chosen]}, the best on seen tasks, {singles[chosen].round(2)}")

def check_10(answer):
    if not vlmrm.get_objective(all_objectives()[answer])["loss"]:
        return False, f"{answer} does not train"
    runs = []
    for seed in range(3):
        config = configuration("--seed", str(seed), objective=all_objectives()[answer])
        folder = ROOT / "runs" / "gpu" / f"{answer}-seed{seed}"
        runs.append(vlmrm.read_json(folder / "metrics.json"))
        if (vlmrm.read_json(folder / "config.json") != config
                or not runs[-1]["device"].startswith("cuda")):
            return False, f"{folder} has other settings, or was not made on a GPU"
    found = {group: (saved(answer, group), [run[group]["voc"]["value"] for run in runs])
             for group in ("seen", "unseen")}
    # Two means of three differ with sqrt(2/3) of one run's spread.
    return all(abs(np.mean(mine) - np.mean(theirs)) < 3 * math.sqrt(2 / 3) * max(
        np.std(theirs, ddof=1), 0.01) for theirs, mine in found.values()), f"{found}"

def check_11(answer):
    config, data = configuration(), vlmrm.Dataset(HERE / "metaworld.npz")
    sentences = vlmrm.load_instructions(config["instructions"])
    tasks = list(sentences)[:8]
    said = [sentences[task]["instruction"] for task in tasks]
    pixels = data.load([data.select(task=task)[0] for task in tasks])[:, [0, 8, 9, 15, 23]]
    loss, found, sizes = lambda frames, texts: vlmrm.info_nce(9 * frames[:, -1] @ texts.T), [], [0]

    def watched(embed, unit: int):
        return lambda inputs: (sizes.append(np.size(inputs) / unit), embed(inputs))[1]

    for fill in (lambda model, loss, pixels, said: loss(
            model.embed_frames(pixels), model.embed_texts(said)).backward(), answer):
        model, sizes[:] = vlmrm.prepare_model(config, "cpu"), []
        model.low_precision = False
        model.embed_frames = watched(model.embed_frames, pixels[0].size)
        model.embed_texts = watched(model.embed_texts, 1)
        fill(model, loss, pixels, said)
        found.append(torch.cat([weight.grad.ravel() for weight in model.parameters()
                                if weight.grad is not None]))
    whole, mine = found
    wrong = ((whole - mine).norm() / whole.norm()).item() if len(whole) == len(mine) else math.inf
    return wrong < 1e-4 and max(sizes) <= 2, (
        f"the gradient is wrong by {wrong:.1e} of itself; at most {max(sizes):g} videos at once")

CHECKS = {number: globals()[f"check_{number}"] for number in range(1, 12)}

def main() -> int:
    number = int(sys.argv[1])
    try:
        right, remark = CHECKS[number](*([] if number in (5, 6, 8) else [  # files of their own
            runpy.run_path(str(ROOT / "answers.py"))[f"answer_{number}"]]))
    except vlmrm.InputError as problem:
        right, remark = False, problem
    except Exception as problem:  # the reader's code may fail in any way
        lines = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in
                 traceback.extract_tb(problem.__traceback__) if "answer" in frame.filename]
        text = " ".join(str(problem).split())[:200]
        right, remark = False, f"{type(problem).__name__}: {text}{lines[-1] if lines else ''}"
    print(f"{'right' if right else 'not yet'}: {remark}")
    return 0 if right else 1

if __name__ == "__main__":
    sys.exit(main())
