"""TimeRewarder: how far apart in time two frames are, and which comes first.

    d = (v - u) / (T - 1);  L = mean over ordered pairs u != v of CE(two-hot(d), softmax over bins)
    logit of a bin at c: -((scale (cos(o_v, l) - cos(o_u, l)) - c) / width)^2 / 2

Notice: not only the order but the size of a step is learned, backwards too.
Source: Liu et al., 2509.26627: 20 bins from -1 to 1, two-hot targets. Differs: there a network sees
both frames, draws more near pairs and knows no sentence. Here the distance is a difference of two
cosines; the bell curve around it, over the bins, and the scale are ours. Uses vlmrm.cosine().
"""
import torch

import vlmrm

TUNED = (2e-3, {"scale": 1.25})

def loss(frames, texts, times, scale: float = 2.5, bins: int = 20):
    reward = scale * vlmrm.cosine(frames, texts[:, None])  # (B, K)
    u, v = (~torch.eye(frames.shape[1], dtype=torch.bool)).nonzero().T  # ordered pairs
    width = 2 / (bins - 1)
    centres = width * torch.arange(bins).to(reward) - 1
    distance = times[:, v, None] - times[:, u, None]  # (B, P, 1)
    target = (1 - (distance - centres).abs() / width).clamp(min=0)  # two-hot: the bins around it
    predicted = reward[:, v, None] - reward[:, u, None]
    logits = -((predicted - centres) / width).square() / 2  # (B, P, bins)
    return -(target * logits.log_softmax(-1)).sum(-1).mean()
