"""A control, the distance from the start: the reward is how far the frame is from the first one.

    r(o_k) = |o_k - o_0|

Notice: it knows no sentence and was not trained, yet most tasks move things away from where they
were. A model should do better than this.
Source: our own. Uses vlmrm.negative_distance().
"""
import vlmrm

def reward(frames, text):
    return -vlmrm.negative_distance(frames, frames[:, :1])  # (E, T)
