"""One sampling step in PyTorch: classifier-free guidance and the sampler's update."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def guided_step(
    latent: Tensor,
    epsilon: Tensor,
    guidance_scale: float,
    coefficients: Sequence[float],
    previous_epsilon: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a step.

    Args:
        latent: (N, C, h, w) float32.
        epsilon: (2 N, C, h, w) float32, the predictions with the condition, then those without it.
        guidance_scale: 1 is without guidance.
        coefficients: a row of `runtime.diffusion.ddim.Schedule.coefficients`: the factors of latent, guided
            epsilon, and the epsilon of the step before.
        previous_epsilon: (N, C, h, w), what the step before returned; None if the sampler does not use it.

    Returns:
        The next latent and the guided epsilon, both (N, C, h, w).
    """
    conditional, unconditional = epsilon.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    from_latent, from_epsilon, from_previous = coefficients
    next_latent = from_latent * latent + from_epsilon * guided
    if previous_epsilon is not None:
        next_latent = next_latent + from_previous * previous_epsilon
    return next_latent, guided
