"""DecisionNCE-T: the direction in which a video moves points along its instruction.

    L = info_nce(R),  R_ij = scale sum_(steps a -> b of video i) l_j . (b - a)/(|b - a| + 1e-6)

Notice: it takes a task for one direction. A step in which little happens counts as much as one that
gets the task done.
Source: Li et al., 2402.18137, losses.py. Differs: three steps, not one (the code allows both). The
middle frame is too close to its neighbour. Uses vlmrm.info_nce().
"""
import torch
import torch.nn.functional as F

import vlmrm

TUNED = (2e-3, {"scale": 3.0})

def loss(frames, texts, times, scale: float = 100.0):
    half = frames.shape[1] // 2
    steps = torch.cat([frames[:, :half], frames[:, -half:]], dim=1).diff(dim=1)  # (B, 3, D)
    lengths = torch.linalg.vector_norm(steps, dim=-1, keepdim=True)
    directions = (steps / (lengths + 1e-6)).sum(1)  # (B, D)
    return vlmrm.info_nce(scale * directions @ F.normalize(texts, dim=-1).T)
