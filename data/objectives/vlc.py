"""VLC, the video-language critic: the score rises from frame to frame, and the end of a video finds
its instruction.

    S_ijk = scale cos(frame k of video j, l_i)
    L = rank_weight mean max(0, S_iik - S_ii(k+1) + margin) + info_nce(S at the end)

Notice: a triplet of neighbours, and CLIP on the last frame to remember which task is which. At
margin 0 a flat reward costs nothing: what makes it rise is the CLIP term, which pulls up the end.
Source: Alakuijala et al., 2405.19988, modules/until_module.py. Differs: there S is a transformer
over the video so far, here it looks at single frames. Its scores spread less, hence the scale. No
failed videos in the batch.
"""
import torch.nn.functional as F

import vlmrm

TUNED = (2e-3, {"scale": 1.0})

def loss(frames, texts, times, scale: float = 1.0, margin: float = 0.0, rank_weight: float = 33.0):
    scores = scale * vlmrm.cosine(frames, texts[:, None, None])  # (B texts, B videos, K)
    own = scores.diagonal().mT  # (B, K)
    falls = F.relu(own[:, :-1] - own[:, 1:] + margin)
    contrast = vlmrm.info_nce(scores[..., -1])
    return rank_weight * falls.mean() + contrast
