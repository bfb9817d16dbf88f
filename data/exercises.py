"""Ten exercises, easy to hard. Write your answers into a file answers.py beside vlmrm.py:

    python data/exercises.py          what there is to do
    python data/exercises.py 3        check your answer to exercise 3

1. A LOSS BY HAND. A video's five frames have the cosines 0.0, 0.3, 0.2, 0.2, 0.6 with its
   instruction. What is triplet_loss at margin 0.1? answer_1 = ...
2. THE PLANTED BUG. planted_loss() in data/exercises.py wants to be decisionnce_p_loss() and is
   not: it rewards a model whose cosines are simply all higher under the right sentence. Which
   character is wrong?
   def answer_2(frames, texts, times): the loss, mended
3. MARGIN AGAINST TEMPERATURE. softplus(s x) / s is a soft max(0, x). From which s on do the two
   never differ by more than 0.01? Two digits will do. answer_3 = ...
4. WHY DOES TCN FAIL HERE? Show that its loss says nothing about the reward: for given frames
   (B, 5, D) find sentences under which the reward FALLS in every video (VOC < 0), whatever the
   frames' TCN loss is. D is larger than 5.   def answer_4(frames): texts (B, D), unit vectors
5. A NEW TASK. Make answer_5.npz with write_dataset() and answer_5.json, which teach something that
   Meta-World does not have (film a drawer at home; or draw it): at least 10 experts of one task
   that is not among the 50, with its sentence and three paraphrases.
6. A NEW CAMERA. Meta-World has more than one ("topview", "behindGripper"). Change one line, and
   python vlmrm.py --collect --tasks drawer-open-v3 --expert 2 --mixed 1 --output answer_6.npz
7. A NEW BACKBONE. def answer_7(): a RewardModel without a transformer in its vision tower (a few
   convolutions will do; the text tower may stay). It must reach validation VOC .5 in 60 steps.
8. YOUR OWN OBJECTIVE. Write a loss that is not in vlmrm.py, and beat triplet's mean VOC on unseen
   tasks over seeds 0, 1, 2 (the check trains three times, 3 minutes). Choose its constants on
   validation episodes, not by this check.   def answer_8(frames, texts, times): the loss
9. A REWARD THAT IS HARD TO HACK. You get the rewards of 16 models, one per objective: (16, E, T)
   for the E episodes of one unseen task. Combine them so that the best of 128 frames by your
   reward is better, by the simulator, than the best by any single model.
   def answer_9(rewards): (E, T)
10. A ROW OF THE TABLE. Reproduce an objective's three seeds on a GPU, in runs/: python vlmrm.py
   --objective NAME --seed 0 (1, 2) --device cuda. Is its VOC on seen and unseen tasks within what
   the spread over seeds allows?   answer_10 = NAME
"""
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

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
    args = vlmrm.parse_arguments(["--data", "answer_5.npz", "--instructions", "answer_5.json"])
    data, sentences = vlmrm.load_data(args)
    known = vlmrm.load_instructions(HERE / "instructions.json")
    new = {task: len(data.select(task=task, source="expert")) for task in {*data.task} - {*known}}
    moving = all(np.ptp(data.frames(e).astype(int), axis=0).max() > 20 for e in range(data.E))
    return any(count >= 10 for count in new.values()) and moving, (
        f"experts of new tasks: {new}; something moves in every episode: {moving}")


def check_6():
    mine, shipped = vlmrm.Dataset(Path("answer_6.npz")), vlmrm.Dataset(HERE / "metaworld.npz")
    first = shipped.select(task="drawer-open-v3")[0]
    same = np.allclose(mine.rewards[0], shipped.rewards[first], atol=1e-3)
    apart = np.abs(mine.frames(0).astype(int) - shipped.frames(first)).mean()
    return same and apart > 10, (f"same episode: {same}; its pictures differ by {apart:.0f} grey "
                                 "levels")


def check_7(answer):
    torch.manual_seed(0)
    model = answer()
    if any(isinstance(part, torch.nn.MultiheadAttention) for part in model.clip.visual.modules()):
        return False, "its vision tower has attention in it"
    data, sentences = vlmrm.load_data(vlmrm.parse_arguments([]))
    log = vlmrm.train(model, data, sentences, vlmrm.triplet_loss, steps=60, batch=40,
                      learning_rate=vlmrm.LEARNING_RATE, seed=0)
    voc = log[-1]["validation_voc"]
    return voc > 0.5, f"validation VOC {voc:.2f}"


def check_8(answer):
    data, sentences = vlmrm.load_data(vlmrm.parse_arguments([]))
    scores = []
    for seed in range(3):
        args = vlmrm.parse_arguments(["--seed", str(seed)])
        model = vlmrm.prepare_model(args)
        vlmrm.train(model, data, sentences, answer, steps=args.steps, batch=args.batch,
                    learning_rate=vlmrm.LEARNING_RATE, seed=seed)
        scores.append(vlmrm.evaluate(model, data, sentences)["unseen"]["voc"]["value"])
    triplet = saved("triplet", "unseen")
    return np.mean(scores) > np.mean(triplet), (
        f"yours {np.round(scores, 2)}, triplet's {np.round(triplet, 2)}")


def saved(objective: str, group: str) -> list[float]:
    """VOC of the seeds in data/results."""
    runs, shown, _ = vlmrm.companion("report").load(HERE / "results")
    return [run[group]["voc"]["value"] for run in runs[objective, shown[objective]]]


def check_9(answer):
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    rewards = {name: array.astype(np.float32) for name, array in
               np.load(HERE / "results" / "rewards.npz").items()}
    trained = [name for name, loss in vlmrm.OBJECTIVES.items() if loss]
    test, picks = data.select(split="test"), []
    for task in vlmrm.UNSEEN_TASKS:
        where = data.task[test] == task
        truth = data.rewards[test[where]].ravel()
        models = np.stack([rewards[f"{name}/values"][where] for name in trained])  # (16, E, T)
        picks.append([vlmrm.companion("study").best_of(np.ravel(values), truth, 128)
                      for values in (answer(models.copy()), *models)])
    mine, *singles = np.mean(picks, axis=0)
    best = int(np.argmax(singles))
    return mine > singles[best], (f"best of 128 by yours {mine:.2f} (of 10), by the best single "
                                  f"model, {trained[best]}, {singles[best]:.2f}")


def check_10(answer):
    folders = [Path("runs") / f"{answer}-seed{seed}" for seed in range(3)]
    devices = [vlmrm.read_config(folder)["device"] for folder in folders]
    found, close = {}, True
    for group in ("seen", "unseen"):
        mine = [json.loads((folder / "metrics.json").read_text())[group]["voc"]["value"]
                for folder in folders]
        theirs = saved(answer, group)
        # The difference of two means of three: its error is sqrt(2/3) of one run's spread.
        spread = math.sqrt(2 / 3) * max(np.std(theirs, ddof=1), np.std(mine, ddof=1), 0.01)
        close &= abs(np.mean(mine) - np.mean(theirs)) < 3 * spread
        found[group] = f"{np.mean(mine):.2f} against {np.mean(theirs):.2f} ± {3 * spread:.2f}"
    return close and set(devices) == {"cuda"}, f"{found}, on {devices}"


CHECKS = {number: globals()[f"check_{number}"] for number in range(1, 11)}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in map(str, CHECKS):
        print(__doc__)
        return 2
    number, answer = int(sys.argv[1]), []
    if number not in (5, 6):  # whose answers are files
        if not Path("answers.py").exists():
            print(f"write answer_{number} into answers.py, in this folder")
            return 2
        spec = importlib.util.spec_from_file_location("answers", "answers.py")
        answers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(answers)
        if not hasattr(answers, f"answer_{number}"):
            print(f"answers.py has no answer_{number}")
            return 2
        answer = [getattr(answers, f"answer_{number}")]
    try:
        right, remark = CHECKS[number](*answer)
    except vlmrm.InputError as problem:
        right, remark = False, problem
    print(f"{'right' if right else 'not yet'}: {remark}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
