"""VLM-RM: no training; part of what does not point from a baseline to the goal is ignored.

    d = g - b;  r = 1 - 1/2 |P (o - g)|^2,  P = alpha d d^T / |d|^2 + (1 - alpha) I

g and b embed the instruction and a sentence about the scene before anything is done, o is the
frame. alpha = 0 gives the cosine, alpha = 1 counts movement along d alone.
Notice: beyond the goal r falls again. The two sentences must differ by what the task changes: on a
backbone that knows no order it finds none.
Source: Rocamonde et al., 2310.12921, src/vlmrm/reward_model.py. Differs: if the two sentences are
equal, this is a number and not NaN.
"""
import torch.nn.functional as F

BASELINE = "a robot arm over a table"

def goal_baseline_reward(frames, goal, baseline, alpha: float = 0.5):
    direction = goal - baseline  # (D,)
    offset = F.normalize(frames, dim=-1) - goal  # (E, T, D)
    length = direction.square().sum(-1).clamp(min=1e-12)
    along = (offset * direction).sum(-1) ** 2 / length  # (E, T)
    across = offset.square().sum(-1) - along
    return 1 - (along + (1 - alpha) ** 2 * across) / 2

def reward(frames, text, embed):
    return goal_baseline_reward(frames, text, embed([BASELINE])[0])
