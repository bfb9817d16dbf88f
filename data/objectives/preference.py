"""Preference: the later frame is better with a probability that grows with its lead.

    L = mean over pairs of -log sigmoid(scale (cos(late, l) - cos(early, l)))

Notice: a triplet with a soft margin (Bradley-Terry), whose pairs never stop pulling. Equal `times`
make no pair.
Source: RL-VLM-F, Wang et al., 2402.03681, reward_model.py. Differs: there a VLM says which of two
frames is better, and a CNN without language learns it. Uses vlmrm.cosine().
"""
import torch.nn.functional as F

import vlmrm

TUNED = (2e-3, {"scale": 20.0})

def loss(frames, texts, times, scale: float = 1.0):
    reward = scale * vlmrm.cosine(frames, texts[:, None])  # (B, K)
    better = times[:, :, None] > times[:, None]  # (B, K, K)
    lead = reward[:, :, None] - reward[:, None]
    return (better * F.softplus(-lead)).sum() / better.sum().clamp(min=1)
