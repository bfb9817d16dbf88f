"""Triplet, and a little of DecisionNCE-T: a video moves along its own sentence, not another's.

    L = L_triplet + w info_nce(M)
    M_ij = 3 sum_(steps a -> b of video i) l_j . (b - a)/|b - a|

Notice: triplet has no wrong sentence, so nothing makes it read. The second term has, and is kept
small, as it does not care for order. An arm of our trial, which chose the constants.
Source: ours, of triplet and of Li et al., 2402.18137. Uses vlmrm.triplet_loss() and
vlmrm.info_nce().
"""
import torch.nn.functional as F

import vlmrm

TUNED = (1e-3, {"margin": 0.2, "directions": 0.01})

def loss(frames, texts, times, margin: float = 0.1, directions: float = 0.03):
    steps = frames[:, [0, 1, 3, 4]].diff(dim=1)  # (B, 3, D), but not to the next: too close
    moved = F.normalize(steps, dim=-1, eps=1e-6).sum(dim=1)  # (B, D)
    contrast = vlmrm.info_nce(3 * moved @ texts.T)
    return vlmrm.triplet_loss(frames, texts, times, margin) + directions * contrast
