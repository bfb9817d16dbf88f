"""Ten exercises, easy to hard. Write your answers into a file answers.py beside vlmrm.py:

    python data/exercises.py          what there is to do
    python data/exercises.py 3        check your answer to exercise 3

1. A LOSS BY HAND. A video's five frames have the cosines 0.0, 0.3, 0.2, 0.2, 0.6 with its
   instruction. What is triplet_loss at margin 0.1?   answer_1 = ...
2. THE PLANTED BUG. planted_loss() in data/exercises.py wants to be decisionnce_p_loss() and is
   not: it rewards a model whose cosines are simply all higher under the right sentence. Which
   character is wrong?
   def answer_2(frames, texts, times): the loss, mended
3. MARGIN AGAINST TEMPERATURE. softplus(s x) / s is a soft max(0, x). From which s on do the two
   never differ by more than 0.01? To within 1 %.   answer_3 = ...
4. WHY DOES TCN FAIL HERE? Show that its loss says nothing about the reward: for given frames
   (B, 5, D) find sentences under which the reward FALLS in every video (VOC < 0), whatever the
   frames' TCN loss is. D is larger than 5.   def answer_4(frames): texts (B, D), unit vectors
5. A NEW TASK. Make answer_5.npz and answer_5.json, which teach something that Meta-World does not
   have (film a drawer at home; or draw it): at least 10 experts of one task that is not among the
   50, with its sentence and three paraphrases. The README shows how, under "Train on your own
   videos". The check trains on them, and wants a VOC above .5 on the test experts.
6. A NEW CAMERA. Meta-World has more than one: take "topview" or "corner3". Change one line, and
   python vlmrm.py --collect --tasks drawer-open-v3 --expert 2 --mixed 1 --output answer_6.npz
   (And "behindGripper"? It hangs the right way up: what would be wrong?)
7. A NEW BACKBONE. def answer_7(): a RewardModel whose vision tower is made of convolutions, two at
   least, without attention; the text tower may stay. It must reach validation VOC .9 in 60 steps.
8. YOUR OWN OBJECTIVE. Write a loss that is none of those in vlmrm.py, and beat triplet's mean VOC
   on unseen tasks over seeds 0, 1, 2 by more than its standard deviation. The check trains three
   times, 3 minutes: 120 steps of 40 videos, learning rate 2e-3. Do not choose by it: leave some
   seen tasks out of training, and choose by those.   def answer_8(frames, texts, times): the loss
9. A REWARD THAT IS HARD TO HACK. You get the rewards of 16 models, (16, N), for the N test frames
   of one task, in no order of time: a model for each objective with a loss, in the order of
   vlmrm.OBJECTIVES. Combine them: when the best of 1, 2, 4, ... 128 frames is picked by your
   reward, the simulator's reward of the pick must never fall, and end above that of the model
   which one would choose on seen tasks. (Means over the ten unseen tasks. data/results/rewards.npz
   has the seen ones too, to choose by.)   def answer_9(rewards): (N,)
10. A ROW OF THE TABLE. Reproduce an objective's three seeds on a GPU: python vlmrm.py --objective
   NAME --seed 0 --device cuda --runs runs/gpu, then --seed 1 and 2. Is its VOC on seen and unseen
   tasks within what the spread over seeds allows?   answer_10 = "NAME"
"""
import importlib.util
import json
import math
import operator
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent  # where the answers are

if __name__ == "__main__":  # before the imports that take seconds
    if len(sys.argv) == 1:
        sys.exit(print(__doc__))
    if sys.argv[1:] not in [[str(number)] for number in range(1, 11)]:
        print("there are the exercises 1 to 10: python data/exercises.py 3")
        sys.exit(2)
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import vlmrm  # noqa: E402  (it lies one folder up)


def planted_loss(frames, texts, times, scale: float = 100.0) -> torch.Tensor:
    """Exercise 2: one character differs from what it should be."""
    rewards = vlmrm.cosine(frames[:, None], texts[:, None])  # (B videos, B texts, K)
    half = frames.shape[1] // 2
    return vlmrm.matching_loss(
        scale * (rewards[..., half:].sum(-1) - rewards[..., :half].sum(-1)))


def random_batch(B: int = 6, D: int = 16, seed: int = 0):
    """Unit vectors (B, 5, D), (B, D), and times (B, 5) in order."""
    generator = torch.Generator().manual_seed(seed)
    frames = F.normalize(torch.randn(B, 5, D, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(B, D, generator=generator), dim=-1)
    return frames, texts, torch.rand(B, 5, generator=generator).sort(dim=1).values


def check_1(answer):
    cosines = torch.tensor([0.0, 0.3, 0.2, 0.2, 0.6])
    frames = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=-1)[None]  # (1, 5, 2)
    loss = vlmrm.triplet_loss(frames, torch.tensor([[1.0, 0.0]]), None).item()
    return abs(answer - loss) < 1e-4, f"you said {answer}"


def check_2(answer):
    worst = max(abs(answer(*random_batch(seed=seed)).item()
                    - vlmrm.decisionnce_p_loss(*random_batch(seed=seed)).item())
                for seed in range(5))
    return worst < 1e-3, f"the largest difference from decisionnce_p_loss is {worst:.4f}"


def check_3(answer):
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)

    def gap(s):
        return (F.softplus(s * x) / s - x.relu()).max().item()

    return gap(1.01 * answer) <= 0.01 <= gap(0.99 * answer), (
        f"at s = {answer} the largest difference is {gap(answer):.5f}")


def check_4(answer):
    frames, texts, times = random_batch()
    found = answer(frames)
    values = torch.einsum("btd,bd->bt", frames, found).numpy()
    voc = vlmrm.value_order_correlation(values)
    unit = torch.allclose(found.norm(dim=-1), torch.ones(len(frames)), atol=1e-4)
    same = vlmrm.tcn_loss(frames, found, times) == vlmrm.tcn_loss(frames, texts, times)
    return bool(unit and same and (voc < 0).all()), f"VOC of the videos {voc.round(2)}, unit {unit}"


def check_5():
    args = vlmrm.parse_arguments(["--data", str(ROOT / "answer_5.npz"),
                                  "--instructions", str(ROOT / "answer_5.json"),
                                  "--batch", "1", "--learning-rate", "1e-4"])  # as in the README
    data, sentences = vlmrm.load_data(args)
    known = vlmrm.load_instructions(HERE / "instructions.json")
    new = {str(task): len(data.select(task=task, source="expert"))
           for task in {*data.task} - {*known}}
    if max(new.values(), default=0) < 10:
        return False, f"experts of tasks that are not Meta-World's: {new}"
    model = vlmrm.prepare_model(args)
    vlmrm.train(model, data, sentences, vlmrm.triplet_loss, steps=args.steps, batch=args.batch,
                learning_rate=args.learning_rate, seed=args.seed)
    tasks = vlmrm.evaluate(model, data, sentences)["tasks"]
    found = {task: round(float(tasks[task]["voc"]), 2) for task in new}
    return max(found.values()) > 0.5, f"VOC on the test experts: {found}"


def check_6():
    mine, shipped = vlmrm.Dataset(ROOT / "answer_6.npz"), vlmrm.Dataset(HERE / "metaworld.npz")
    first = shipped.select(task="drawer-open-v3")[0]
    frames, old = mine.frames(0).astype(int), shipped.frames(first)
    if frames.shape != old.shape or not np.allclose(mine.rewards[0], shipped.rewards[first],
                                                    atol=1e-3):
        return False, "its first episode is not the one of the shipped data: change the camera only"
    # Turned or mirrored pictures of the old camera are no new one.
    apart = min(np.abs(frames - old[:, ::rows, ::columns]).mean()
                for rows in (1, -1) for columns in (1, -1))
    return apart > 10, f"its pictures differ from the old camera's by {apart:.0f} grey levels"


def check_7(answer):
    torch.manual_seed(0)
    model = answer()
    kinds = [type(part) for part in model.clip.visual.modules()]
    if torch.nn.MultiheadAttention in kinds or kinds.count(torch.nn.Conv2d) < 2:
        return False, "its vision tower has attention in it, or fewer than two Conv2d"
    data, sentences = vlmrm.load_data(vlmrm.parse_arguments([]))
    log = vlmrm.train(model, data, sentences, vlmrm.triplet_loss, steps=60, batch=40,
                      learning_rate=vlmrm.LEARNING_RATE, seed=0)
    voc = log[-1]["validation_voc"]
    return voc > 0.9, f"validation VOC {voc:.2f}"


def check_8(answer):
    batch = random_batch()
    twins = [name for name, loss in vlmrm.OBJECTIVES.items()
             if loss and torch.isclose(loss(*batch), answer(*batch))]
    if twins:
        return False, f"this is {twins[0]}"
    data, sentences = vlmrm.load_data(vlmrm.parse_arguments([]))
    scores = []
    for seed in range(3):
        args = vlmrm.parse_arguments(["--seed", str(seed)])
        model = vlmrm.prepare_model(args)
        vlmrm.train(model, data, sentences, answer, steps=args.steps, batch=args.batch,
                    learning_rate=vlmrm.LEARNING_RATE, seed=seed)
        scores.append(vlmrm.evaluate(model, data, sentences)["unseen"]["voc"]["value"])
    triplet = saved("triplet", "unseen")
    return np.mean(scores) > np.mean(triplet) + np.std(triplet, ddof=1), (
        f"yours {np.round(scores, 2)}, triplet's {np.round(triplet, 2)}")


def saved(objective: str, group: str) -> list[float]:
    """VOC of the seeds in data/results."""
    runs, shown, _ = vlmrm.companion("report").load(HERE / "results")
    return [run[group]["voc"]["value"] for run in runs[objective, shown[objective]]]


def check_9(answer):
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    rewards = np.load(HERE / "results" / "rewards.npz")
    trained = [name for name, loss in vlmrm.OBJECTIVES.items() if loss]
    values = np.float32([rewards[f"{name}/values"] for name in trained])  # (16, E, T)
    test, draws = data.select(split="test"), 2 ** np.arange(8)

    def picks(tasks, reward):
        """The simulator's reward of the best of 1, 2, ... 128 frames, by a reward of the 16."""
        found = []
        for task in tasks:
            where = data.task[test] == task
            models, truth = values[:, where].reshape(16, -1), data.rewards[test[where]].ravel()
            order = np.argsort(models[0], kind="stable")  # hides time
            mine = np.asarray(reward(models[:, order]))
            if mine.shape != truth.shape or not np.isfinite(mine).all():
                raise ValueError(f"{truth.shape} finite rewards are wanted, these are {mine.shape}")
            found.append([vlmrm.companion("study").best_of(mine, truth[order], n) for n in draws])
        return np.mean(found, axis=0)

    yours = picks(vlmrm.UNSEEN_TASKS, answer)
    singles = [picks(vlmrm.UNSEEN_TASKS, operator.itemgetter(i)) for i in range(len(trained))]
    twins = [name for name, its in zip(trained, singles) if np.allclose(yours, its)]
    if twins:
        return False, f"this is {twins[0]} alone"
    seen = sorted({*data.task} - {*vlmrm.UNSEEN_TASKS})
    chosen = max((i for i, name in enumerate(trained) if name not in vlmrm.ORACLES),
                 key=lambda i: picks(seen, operator.itemgetter(i))[-1])
    return (np.diff(yours) > -1e-3).all() and yours[-1] > singles[chosen][-1], (
        f"the simulator's reward of the best of {draws}: by yours {yours.round(2)}, by "
        f"{trained[chosen]}, the best on seen tasks, {singles[chosen].round(2)}")


def check_10(answer):
    vlmrm.check_objective(answer)
    theirs = {group: saved(answer, group) for group in ("seen", "unseen")}
    mine, devices = {"seen": [], "unseen": []}, set()
    for seed in range(3):
        folder = ROOT / "runs" / "gpu" / f"{answer}-seed{seed}"
        vlmrm.plumbing.refuse_other_settings(folder, vlmrm.configuration(vlmrm.parse_arguments(
            ["--objective", answer, "--seed", str(seed)])))
        if not (folder / "metrics.json").exists():
            return False, f"the run in {folder} is not finished"
        devices.add(vlmrm.plumbing.read_config(folder)["device"])
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for group in mine:
            mine[group].append(metrics[group]["voc"]["value"])
    close, remarks = devices == {"cuda"}, [f"on {', '.join(sorted(devices))}"]
    for group in mine:
        # The difference of two means of three: its error is sqrt(2/3) of one run's spread.
        limit = 3 * math.sqrt(2 / 3) * max(np.std(theirs[group], ddof=1), 0.01)
        close &= abs(np.mean(mine[group]) - np.mean(theirs[group])) < limit
        remarks.append(f"{group}: {np.mean(mine[group]):.2f} against {np.mean(theirs[group]):.2f} "
                       f"± {limit:.2f}")
    return close, "; ".join(remarks)


CHECKS = {number: globals()[f"check_{number}"] for number in range(1, 11)}


def load_answer(number: int):
    """answer_<number> of answers.py."""
    path = ROOT / "answers.py"
    if not path.exists():
        raise vlmrm.InputError(f"write answer_{number} into {path}")
    spec = importlib.util.spec_from_file_location("answers", path)
    answers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    if not hasattr(answers, f"answer_{number}"):
        raise vlmrm.InputError(f"{path} has no answer_{number}")
    return getattr(answers, f"answer_{number}")


def main() -> int:
    number = int(sys.argv[1])
    try:
        answer = [] if number in (5, 6) else [load_answer(number)]  # 5 and 6 are files
        right, remark = CHECKS[number](*answer)
    except vlmrm.InputError as problem:
        right, remark = False, problem
    except Exception as problem:  # the reader's code may fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__)
                 if Path(frame.filename).name == "answers.py"]
        what = f"{type(problem).__name__}: {vlmrm.plumbing.first_line(problem, 200)}"
        right, remark = False, what + (f" (answers.py, line {lines[-1]})" if lines else "")
    print(f"{'right' if right else 'not yet'}: {remark}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
