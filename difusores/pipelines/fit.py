"""What a scheduler needs of the model: by this a model's own scheduler and another one are compared."""

from __future__ import annotations

from typing import Any, NamedTuple


class Needs(NamedTuple):
    """What a model is trained for, as far as a scheduler says.

    Attributes:
        prediction: what the model predicts.
        time: what it is told, in words.
        data: standard deviation of the data that the model's input and output are scaled for.
    """

    prediction: str
    time: str
    data: float = 1.0


_LEVEL, _ANGLE = "log(sigma) / 4", "2 atan(sigma) / pi"
_FIXED = {
    "ScoreSdeVeScheduler": Needs("'score'", "sigma"),
    "ScoreSdeVpScheduler": Needs("'-epsilon'", "a real number from 0 to 1"),
    "KarrasVeScheduler": Needs("'-epsilon'", "sigma"),
    "IPNDMScheduler": Needs("'epsilon'", _ANGLE),
}
"""Of classes without options that count here."""


def needs(scheduler: Any) -> Needs | None:
    """What the model has to predict, and is told; None where the scheduler is of an unknown kind.

    By the names of its class and of those above, since it may be another library's.
    """
    names = {each.__name__ for each in type(scheduler).__mro__}
    fixed = [_FIXED[name] for name in _FIXED if name in names]
    if fixed:
        return fixed[0]
    config = getattr(scheduler, "config", {})
    kind = repr(config.get("prediction_type", "epsilon"))
    total = config.get("num_train_timesteps")
    data = float(config.get("sigma_data", 1.0))
    if "CMStochasticIterativeScheduler" in names:
        return Needs("the image, preconditioned from sigma_min on", "250 log(sigma)", data)
    if names & {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}:
        return Needs("'flow_prediction'", f"sigma * {total}")
    if config.get("use_flow_sigmas"):
        return Needs(kind, f"sigma * {total}")
    if "CosineDPMSolverMultistepScheduler" in names:
        return Needs(_preconditioned(kind), _ANGLE, data)
    if names & {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}:
        return Needs(_preconditioned(kind), _LEVEL, data)
    if config.get("timestep_type") == "continuous" and kind == "'v_prediction'":
        return Needs(kind, _LEVEL)
    return Needs(kind, f"{total} training steps") if hasattr(scheduler, "betas") else None


def _preconditioned(kind: str) -> str:
    """With "epsilon" such a model predicts the negative of "v_prediction", and not the noise."""
    return "'epsilon' of EDM" if kind == "'epsilon'" else kind
