"""HILP: the distance between two frames is the number of steps from one to the other.

    V(o; g) = -scale |o - g|;  L = expectile_loss(V) over the goals o', later, og, and the og of
    another video

Notice: no sentence. VIP makes V rise along the video; this fits it to a count of steps. A goal in
another video is never reached, which keeps videos apart. Unit vectors are 2 apart at most: the
scale, which makes up for that, is ours.
Source: Park et al., 2402.15567, hilp_gcrl/src/agents/hilp.py. Differs: one network instead of two;
its own output, detached, instead of a slow copy; goals from five frames.
"""
import torch

import vlmrm

TUNED = (2e-3, {"scale": 5.0})
COSINE = False  # it reads no sentence

def expectile_loss(value, target, next_target, success, gamma: float, expectile: float):
    """The core: V(o; g) moves to -1 + gamma V(o'; g), faster up than down. An expectile near 1 is
    almost a maximum: V becomes the length of the shortest way seen.

        L = sum_i mean w (q_i - V_i)^2,  q_i = r + gamma (1 - success) V_i(o'; g),  r = success - 1,
        w = expectile if min_i q_i >= mean_i V_i(o; g), else 1 - expectile

    value, target, next_target (n, B): V_i(o; g) of n networks, and V_i(o; g), V_i(o'; g) without
    gradient. success (B,): 1 where o is the goal.
    """
    rewards = success - 1
    goes_on = gamma * (1 - success)
    advantage = rewards + goes_on * next_target.min(0).values - target.mean(0)  # (B,)
    weight = torch.where(advantage >= 0, expectile, 1 - expectile)
    error = rewards + goes_on * next_target - value  # (n, B)
    return (weight * error**2).mean(-1).sum()

def loss(frames, texts, times, scale: float = 1.0, gamma: float = 0.99, expectile: float = 0.95):
    _, now, next_, later, end = frames.unbind(1)
    others = end[vlmrm.negative_permutations(1, len(frames))]  # (1, B, D); (0, B, D) if B = 1
    goals = torch.cat([torch.stack([next_, later, end]), others])  # (4, B, D)

    def value(state):
        squared = (state - goals).square().sum(-1).clamp(min=1e-6)
        return -scale * squared.sqrt().flatten()[None]  # (1, 4 B): one network

    v = value(now)
    never = torch.zeros_like(v[0])  # now is no goal
    return expectile_loss(v, v.detach(), value(next_).detach(), never, gamma, expectile)
