"""Progress: the reward is the time that has passed; under a wrong instruction there is none.

    p = sigmoid(scale cos(o, l));  L = 1/2 mean [ (p(o, l) - t)^2 + (p(o, l') - 0)^2 ]

Notice: it takes progress for even in time: a pause costs. A clip also rewinds at its end.
Source: ReWiND, Zhang et al., 2505.10911; SARM, 2509.25358. Differs: no network over time, and the
scale is ours. Uses vlmrm.cosine() and vlmrm.negative_permutations().
"""
import torch
import torch.nn.functional as F

import vlmrm

TUNED = (2e-3, {"scale": 5.0})

def loss(frames, texts, times, scale: float = 10.0):
    rewound = frames[:, :-1].flip(1)
    frames = torch.cat([frames, rewound], dim=1)[:, 1:]  # (B, 2 K - 2, D)
    times = torch.cat([times, times[:, :-1].flip(1)], dim=1)[:, 1:]
    wrong = texts[vlmrm.negative_permutations(1, len(texts))]  # (1, B, D); (0, B, D) if B = 1
    sentences = torch.cat([texts[None], wrong])  # (2, B, D)
    targets = torch.stack([times, torch.zeros_like(times)])[:len(sentences)]
    p = torch.sigmoid(scale * vlmrm.cosine(frames, sentences[:, :, None]))
    return F.mse_loss(p, targets)
