"""The training loop: runs a `TrainConfig` from its first step, or from its last checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difusores.models import UNet2DModel
from difusores.pipelines import DDIMPipeline, DDPMPipeline
from difusores.pipelines.images import write_grid
from difusores.schedulers import DDPMScheduler
from difusores.training import checkpoint
from difusores.training.config import TrainConfig
from difusores.training.data import Digits, ImageFolder, batch_indices, load_folder, load_mnist
from difusores.training.ema import EMA
from difusores.training.losses import add_noise, diffusion_loss
from difusores.training.progress import Progress, learning_rate

GRID_COLUMNS = 10
OUTPUTS = ("checkpoints", "samples", "pipeline", "classes.json")  # what a run writes into its folder


def build_model(config: TrainConfig, num_classes: int) -> UNet2DModel:
    """The UNet of `config`; with classes, label `num_classes` is the null label."""
    attends = [height in config.attention for height in config.heights]
    return UNet2DModel(
        sample_size=config.resolution,
        in_channels=config.channels,
        out_channels=config.channels,
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=config.head_dim,
        norm_num_groups=config.norm_groups,
        num_class_embeds=num_classes + 1 if config.class_conditional else None,
    )


def _copy_weights(source: str, model: UNet2DModel) -> None:
    """Load the weights of the UNet in the pipeline `source`, which must be of `model`'s shape."""
    found = UNet2DModel.from_pretrained(source, subfolder="unet")
    shapes, wanted = ({name: tuple(w.shape) for name, w in m.state_dict().items()} for m in (found, model))
    if shapes != wanted:
        differing = sorted(
            name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)
        )
        name = differing[0]
        raise ValueError(
            f"--init is {source!r}, whose UNet is another than these options describe: {name} has shape "
            f"{shapes.get(name)} there, {wanted.get(name)} here"
        )
    model.load_state_dict(found.state_dict())


def build_scheduler(config: TrainConfig) -> DDPMScheduler:
    """The noise schedule of `config`; its configuration is written beside the model."""
    return DDPMScheduler(
        num_train_timesteps=config.train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        # Only noise has to be clipped: far out, a small error of it is a large one of the image.
        clip_sample=config.prediction_type == "epsilon",
        timestep_spacing="trailing",
    )


def load_data(config: TrainConfig) -> Digits | ImageFolder:
    """The images of `config`: those of the digits that belong to the generator, or all in the folder."""
    if config.is_mnist:
        file = None if config.data == "mnist" else Path(config.data)
        return load_mnist("generator", file, config.resolution)
    data = load_folder(Path(config.data), config.resolution, config.channels)
    if config.class_conditional and len(data.class_names) < 2:
        raise ValueError(
            f"--class-conditional needs classes: {config.data} has no two sub-folders with pictures"
        )
    return data


class Trainer:
    """What a run consists of: data, model, optimizer, average, and the step it is at.

    Args:
        config: the run.
        state: a checkpoint's state to go on from; None to begin.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
        except ImportError as error:
            raise ImportError("training needs accelerate: pip install accelerate") from error
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            # Said in so many words, or processes launched together on CPUs would not find each other.
            cpu=not torch.accelerator.is_available(),
            # Else gradients are summed in another order from the second step on, and a resumed run begins
            # with the order of the first: not bit for bit with three processes or more. (PyTorch warns
            # that no parameter is unused; that is meant.)
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.gather_object = gather_object
        processes = self.accelerator.num_processes
        if config.batch_size % processes:
            raise ValueError(
                f"--batch-size is {config.batch_size}; allowed: multiples of the {processes} processes"
            )
        self.data = load_data(config)
        self.num_classes = len(self.data.class_names)
        if state is not None:
            self._check(state)
        set_seed(config.seed)
        model = build_model(config, self.num_classes)
        self.scheduler = build_scheduler(config)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.accelerator.device, torch.float32)
        self.step = 0
        self.last: dict[str, Tensor] = {}
        set_seed(config.seed + self.accelerator.process_index)  # the same weights, each process its own noise
        if state is not None:
            model.load_state_dict(state["model"])
        elif config.init:
            _copy_weights(config.init, model)
        self.ema = EMA(model.to(self.accelerator.device), config.ema_decay)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if state is not None:
            self._restore(state)

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` is of a run with other processes or other images."""
        processes = self.accelerator.num_processes
        if len(state["rng"]) != processes:
            raise ValueError(
                f"the run was begun with {len(state['rng'])} processes and cannot go on with {processes}"
            )
        data, before, now = self.config.data, set(state["class_names"]), set(self.data.class_names)
        if before != now:
            changes = [f"class {name} is gone" for name in sorted(before - now)]
            changes += [f"class {name} is new" for name in sorted(now - before)]
            raise ValueError(f"{data} is not as when the run was begun: {', '.join(changes)}")
        if state["images"] != len(self.data):
            raise ValueError(
                f"{data} held {state['images']} images when the run was begun, now {len(self.data)}"
            )
        if state["fingerprint"] != self.data.fingerprint:
            raise ValueError(f"{data} holds files of other names than when the run was begun")

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        checkpoint.set_rng_state(state["rng"][self.accelerator.process_index])

    def state(self) -> dict[str, Any]:
        """Everything from which the run can go on bit for bit. All processes must call it."""
        return {
            "config": asdict(self.config),
            "images": len(self.data),
            "class_names": self.data.class_names,
            "fingerprint": self.data.fingerprint,
            "step": self.step,
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "rng": self.gather_object([checkpoint.rng_state()]),
        }

    @property
    def plain_model(self) -> nn.Module:
        """The model without the wrapper for several devices."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """This process's images, fp32 [B, C, S, S], and labels, int64 [B], for the next step."""
        config, device = self.config, self.accelerator.device
        indices = batch_indices(self.step, config.batch_size, len(self.data), config.seed)
        indices = indices.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        images = self.data.batch(indices)
        if config.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = None
        if config.class_conditional:
            dropped = torch.rand(len(images)) < config.label_dropout
            labels = self.data.labels[indices].masked_fill(dropped, self.num_classes).to(device)
        return images.to(device), labels

    def train_step(self) -> Tensor:
        """One optimizer step; returns this process's loss, a scalar."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        images, labels = self.batch()
        # Drawn on the CPU, so that a run does not depend on the device.
        noise = torch.randn(images.shape).to(images.device)
        timesteps = torch.randint(config.train_timesteps, (len(images),)).to(images.device)
        alphas = self.alphas_cumprod[timesteps]
        noisy = add_noise(images, noise, alphas)
        with self.accelerator.autocast():
            prediction = self.model(noisy, timesteps, class_labels=labels).sample
        loss = diffusion_loss(
            prediction, config.prediction_type, images, noise, alphas, config.min_snr_gamma or None
        )
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.last = {"loss": loss.detach(), "gradient norm": norm}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.plain_model)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write the pipeline folder of the averaged weights, and a checkpoint. All processes must call it.

        Raises:
            FloatingPointError: the loss or the gradients are not finite, so that the weights are spoilt.
        """
        # Of the last step only: what was not finite before has made these so too.
        for name, value in self.last.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} is {value.item()} at step {self.step}; try a smaller --learning-rate"
                )
        state, out = self.state(), Path(self.config.out)
        if self.accelerator.is_main_process:
            # The checkpoint last: a process killed in between writes the folder again when it is resumed.
            pipeline = DDPMPipeline(unet=self.ema.model, scheduler=self.scheduler)
            checkpoint.write_folder(out / "pipeline", pipeline.save_pretrained)
            checkpoint.save(out / "checkpoints", self.step, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def sample_grid(self, path: Path) -> None:
        """Sample with the averaged weights and write a picture: a row for each class, or one row."""
        config = self.config
        pipeline = DDIMPipeline(unet=self.ema.model, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        rows = min(self.num_classes, GRID_COLUMNS) if config.class_conditional else 1
        options: dict[str, Any] = {}
        if config.class_conditional:
            labels = [row for row in range(rows) for _ in range(GRID_COLUMNS)]
            options = {"class_labels": labels, "guidance_scale": config.guidance}
        output: Any = pipeline(
            batch_size=rows * GRID_COLUMNS,
            generator=torch.Generator().manual_seed(config.seed),
            num_inference_steps=config.sample_steps,
            output_type="np",
            **options,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_grid(output.images, path, GRID_COLUMNS)


def _refuse_what_is_there(config: TrainConfig) -> None:
    """A new run must not write over another, or into the pictures that it reads."""
    out = Path(config.out)
    for name in OUTPUTS:
        if (out / name).exists():
            raise FileExistsError(
                f"{out} holds {name} already: go on with --resume {out}, or name another --out"
            )
    if not config.is_mnist and out.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(f"--out {out} lies in --data {config.data}, which the run reads")


def _describe(trainer: Trainer) -> None:
    """Print what is trained on what, and write the classes' names to classes.json: number -> name."""
    config, names = trainer.config, trainer.data.class_names
    parameters = sum(p.numel() for p in trainer.plain_model.parameters())
    sizes = f"{len(trainer.data)} images, {len(names)} classes, {parameters / 1e6:.2f} M parameters"
    print(f"{sizes}; from step {trainer.step}", flush=True)
    if config.class_conditional:
        print("classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(names)), flush=True)
        text = json.dumps(dict(enumerate(names)), ensure_ascii=False, indent=1) + "\n"
        (Path(config.out) / "classes.json").write_text(text, encoding="utf-8")


def train(config: TrainConfig, state: dict[str, Any] | None = None) -> Path:
    """Run `config` to its end, from `state` where that is given. Returns the folder of the exported pipeline.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ImportError: accelerate is missing. FileExistsError: a new run, and `out` holds one already.
        ValueError, OSError: see `TrainConfig`, `load_data`.
    """
    if state is None:
        _refuse_what_is_there(config)
    trainer = Trainer(config, state)
    is_main = trainer.accelerator.is_main_process
    out = Path(config.out)
    if is_main:
        out.mkdir(parents=True, exist_ok=True)  # now, so that a folder that cannot be made costs no training
        _describe(trainer)
    begun_at = trainer.step
    progress = Progress(config, trainer.step)
    while trainer.step < config.steps:
        loss = trainer.train_step()
        if is_main:
            progress.report(trainer.step, loss)
        last = trainer.step == config.steps
        if last or trainer.step % config.checkpoint_every == 0:
            trainer.save()  # before the grid, which may fail
        if config.sample_every and is_main and (last or trainer.step % config.sample_every == 0):
            trainer.sample_grid(out / "samples" / f"step-{trainer.step:08d}.png")
    trainer.accelerator.end_training()
    if is_main:
        done = "exported" if begun_at < config.steps else f"all {config.steps} steps are done already, see"
        print(f"{done} {out / 'pipeline'}")
    return out / "pipeline"
