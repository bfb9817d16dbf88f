"""Anchored (ours): from frame to frame the right share of what remains gets done; a video moves
along its own sentence and no other's; frames stay where they were before training.

    L = mean over u != v [(hop(p; u, v) - hop(t; u, v))^2] + directions info_nce(R) + keep mean
    |o - o_before|^2,  p = sigmoid(scale cos(o, l)),
    R_ij = 3 sum_(steps a, b of video i) l_j . (b - a) / |b - a|

Notice: the untrained model looks at each batch too (`before`).
Source: hops are of Robo-Dopamine (2512.23703, there a VLM words them), R of DecisionNCE-T
(2402.18137), the last term is feature distillation (1606.09282). The mixture is ours. Uses
vlmrm.info_nce() and the loss of hop.py.
"""
import runpy
from pathlib import Path

import torch.nn.functional as F

import vlmrm

TUNED = (2e-3, {"keep": 1.0})
hop_loss = runpy.run_path(str(Path(__file__).with_name("hop.py")))["loss"]

def loss(frames, texts, times, before, scale: float = 5.0, keep: float = 1.0,
         directions: float = 0.1):
    order = hop_loss(frames, texts, times, scale)
    steps = frames[:, [0, 1, 3, 4]].diff(dim=1)  # (B, 3, D), but not to the next: too close
    moved = F.normalize(steps, dim=-1, eps=1e-6).sum(dim=1)  # (B, D)
    contrast = vlmrm.info_nce(3 * moved @ texts.T)
    away = (frames - before[0]).square().sum(dim=-1).mean()
    return order + directions * contrast + keep * away
