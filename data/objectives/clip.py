"""CLIP: a frame and its own instruction find each other among all pairs of the batch.

    L = info_nce(M) averaged over the frames of a video, M_ij = scale cos(o_i, l_j)

Notice: start and end fit the sentence alike. It orders nothing, and tells tasks apart best of all.
Source: Radford et al., 2103.00020. Differs: CLIP learns the scale; ours is where it starts. Uses
vlmrm.cosine() and vlmrm.info_nce().
"""
import vlmrm

TUNED = (5e-4, {"scale": 50.0})

def loss(frames, texts, times, scale: float = 1 / 0.07):
    scores = scale * vlmrm.cosine(frames.transpose(0, 1)[:, :, None], texts)  # (K, B, B)
    return vlmrm.info_nce(scores)
