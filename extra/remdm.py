"""ReMDM (Wang et al. 2025, capped): ancestral sampling in which a revealed token may be masked again and redrawn.

Shapes: B batch, L length.
"""
import torch

from mdlm import check_steps


def remasked_path(masked, steps, eta, order="random", generator=None):
    """The network calls: masked [B, L] -> for each step yields what is masked before it, and what it reveals, both
    [B, L] bool, as `mdlm.revealing_path`; a row for which a step reveals nothing is not called.

    At the step from t to s = t - 1/steps, with alpha = 1 - t, a revealed place is masked again with probability
    sigma = min(eta, (1 - alpha_s) / alpha_t), a masked one is revealed with (alpha_s - (1 - sigma) alpha_t) / (1 -
    alpha_t): the share of masks after step k is 1 - k / steps, as without. Whether a place is masked does not depend on
    the network: it is a two-state Markov chain, drawn beforehand.
    """
    check_steps("remdm", steps, order)
    if not 0 <= eta <= 1:
        raise ValueError(f"remask must lie in [0, 1], got {eta}")
    u = torch.rand(steps, *masked.shape, generator=generator, device=masked.device)
    state = masked                            # what is masked now (B, L)
    for k in range(steps):
        alpha_t = k / steps
        alpha_s = (k + 1) / steps
        sigma = 0.0  # at t = 1 there is nothing to mask again
        if k > 0:
            sigma = min(eta, (1 - alpha_s) / alpha_t)
        reveal_rate = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        revealed = state & (u[k] < reveal_rate)
        remasked = masked & ~state & (u[k] < sigma)
        if revealed.any():
            yield state, revealed
        state = state & ~revealed | remasked
