"""How far the learned world is trusted."""

import torch as th


def trusted(novelty: th.Tensor, quantile: float, alive: th.Tensor | None = None) -> th.Tensor:
    """
    One up to where a trajectory first comes upon more novelty than a share ``quantile`` of all starts have, zero from
    there on: (h, n, 1). The first step always counts, and behind an end there is nothing new.

    What a world errs in adds up along a trajectory until it is in states that cannot be, a body within the ground say.
    There members may agree, and the policy do well; they disagree on the way. Source: MACURA (Frauenknecht et al.,
    ICML 2024), there by the divergence of the members' distributions.

    :param novelty: at each state and action (:meth:`~sb3_mismatch.dynamics.Dynamics.novelty`), (h, n, 1)
    :param alive: one where no end came before the step, (h, n, 1); ``None``: nowhere
    """
    known = novelty <= novelty[0].quantile(quantile)
    if alive is not None:
        known = known | (alive == 0)
    return th.cat([th.ones_like(novelty[:1]), known[1:].to(novelty.dtype)]).cumprod(dim=0)
