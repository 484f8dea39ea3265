"""Every choice of a training run, checked when it is made and stored in each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from difusores.training.losses import PREDICTION_TYPES

PRECISIONS = ("fp32", "bf16")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """The options of `difusores train`; the command line is made from these fields.

    Raises:
        ValueError: a value is not allowed; the message names the option, the value and what is allowed.
    """

    data: str = field(
        metadata={
            "help": "mnist (or the fetched .npz file), or a folder of pictures whose sub-folders are classes"
        }
    )
    out: str = field(metadata={"help": "folder of the run: checkpoints, sample grids, the exported pipeline"})
    init: str = _option("", "pipeline folder or bundled name whose weights the run begins with")
    resolution: int = _option(32, "height and width of the images")
    channels: int = _option(1, "1 (grey) or 3 (RGB)")
    widths: tuple[int, ...] = _option(
        (16, 32, 64, 128), "channels at each resolution of the UNet, halved from one to the next"
    )
    layers_per_block: int = _option(1, "residual blocks at each resolution")
    attention: tuple[int, ...] = _option((8,), "resolutions (heights) that have self-attention")
    head_dim: int = _option(16, "channels of an attention head")
    norm_groups: int = _option(8, "groups of the group normalisations; divides every width")
    class_conditional: bool = _option(False, "give the network the class, so that it can be asked for one")
    label_dropout: float = _option(0.1, "part of the labels replaced by the null label, which guidance needs")
    prediction_type: str = _option("v_prediction", f"what is predicted: {', '.join(PREDICTION_TYPES)}")
    beta_schedule: str = _option("squaredcos_cap_v2", f"noise schedule: {', '.join(BETA_SCHEDULES)}")
    train_timesteps: int = _option(1000, "noise levels of the schedule")
    min_snr_gamma: float = _option(
        0.0, "gamma of the min-SNR loss weight, 5 in its paper; 0 for equal weights"
    )
    steps: int = _option(5_000, "optimizer steps")
    batch_size: int = _option(32, "images a step, over all devices together")
    learning_rate: float = _option(1e-3, "peak learning rate of AdamW")
    warmup_steps: int = _option(100, "steps of linear warm-up; a cosine to 0 follows")
    weight_decay: float = _option(0.01, "of AdamW")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this L2 norm")
    ema_decay: float = _option(0.998, "of the averaged weights, which are exported")
    flip: bool = _option(False, "mirror images at random")
    precision: str = _option("fp32", f"of the network's arithmetic (autocast): {', '.join(PRECISIONS)}")
    seed: int = _option(0, "of the weights, the order of the images, and the noise")
    log_every: int = _option(20, "steps between lines of progress")
    checkpoint_every: int = _option(500, "steps between checkpoints")
    keep_checkpoints: int = _option(2, "checkpoints that are kept, the newest ones")
    sample_every: int = _option(500, "steps between sample grids; 0 for none")
    sample_steps: int = _option(25, "DDIM steps of the sample grids")
    guidance: float = _option(2.0, "classifier-free guidance scale of the sample grids")

    def __post_init__(self) -> None:
        for name in ("resolution", "layers_per_block", "head_dim", "norm_groups", "train_timesteps", "steps"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "sample_steps"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("warmup_steps", "sample_every", "min_snr_gamma", "weight_decay", "guidance"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        self._require("seed", 0 <= self.seed < 2**31, f"0 to {2**31 - 1}")
        self._require("out", bool(self.out), "the name of a folder")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "above 0")
        for name in ("label_dropout", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "0 to below 1")
        self._require("channels", self.channels in (1, 3), "1 and 3")
        self._require("channels", not self.is_mnist or self.channels == 1, "1 for mnist")
        self._require(
            "prediction_type", self.prediction_type in PREDICTION_TYPES, ", ".join(PREDICTION_TYPES)
        )
        self._require("beta_schedule", self.beta_schedule in BETA_SCHEDULES, ", ".join(BETA_SCHEDULES))
        self._require("precision", self.precision in PRECISIONS, ", ".join(PRECISIONS))
        self._require("warmup_steps", self.warmup_steps <= self.steps, f"at most steps, {self.steps}")
        if self.sample_every:
            fits = self.sample_steps <= self.train_timesteps
            self._require("sample_steps", fits, f"at most train_timesteps, {self.train_timesteps}")
        fits = bool(self.widths) and all(w >= 1 and w % self.norm_groups == 0 for w in self.widths)
        self._require("widths", fits, f"multiples of norm_groups, {self.norm_groups}")
        factor = 2 ** (len(self.widths) - 1)
        self._require("resolution", self.resolution % factor == 0, f"multiples of {factor} with these widths")
        heights = self.heights
        self._require(
            "attention", set(self.attention) <= set(heights), f"among {', '.join(map(str, heights))}"
        )

    def _require(self, name: str, fulfilled: bool, allowed: str) -> None:
        if not fulfilled:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(self, name)!r}; allowed: {allowed}")

    @property
    def is_mnist(self) -> bool:
        """Whether the data are the MNIST digits, fetched to the cache or to the file that is named."""
        return self.data == "mnist" or self.data.endswith(".npz")

    @property
    def heights(self) -> tuple[int, ...]:
        """Height and width of the features at each resolution of the UNet."""
        return tuple(self.resolution >> level for level in range(len(self.widths)))
