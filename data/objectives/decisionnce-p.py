"""DecisionNCE-P: the progress made in a video finds the instruction it was made under.

    L = info_nce(R),  R_ij = scale [ sum_late cos(o, l_j) - sum_early cos(o, l_j) ] of video i

Notice: how a scene looks cancels, so nothing is gained by telling tasks apart by furniture. A rise
common to all sentences cancels too.
Source: Li et al., 2402.18137, losses.py. Differs: two late and two early frames, not one (the code
allows both). Uses vlmrm.cosine() and vlmrm.info_nce().
"""
import vlmrm

TUNED = (2e-3, {"scale": 10.0})

def loss(frames, texts, times, scale: float = 100.0):
    rewards = vlmrm.cosine(frames[:, None], texts[:, None])  # (B videos, B texts, K)
    half = frames.shape[1] // 2
    gained = rewards[..., -half:].sum(-1) - rewards[..., :half].sum(-1)
    return vlmrm.info_nce(scale * gained)
