"""The UNet and the noisy-image classifier of ADM (Dhariwal & Nichol 2021, "Diffusion models beat GANs").

Configurations have the names of guided-diffusion's command lines, and parameters those of its checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from difusores.configuration import register_to_config
from difusores.models.adm_blocks import (
    GROUPS,
    UPSAMPLER_WIDTHS,
    WIDTHS,
    AttentionBlock,
    AttentionPool2d,
    Numbers,
    ResBlock,
    Row,
    Upsample,
    attended_levels,
    check_image,
    head_count,
    time_layers,
    times_of,
    way_down,
    widths_of,
)
from difusores.models.embeddings import Timesteps
from difusores.models.layers import GroupNormAct
from difusores.models.modeling import ModelMixin
from difusores.models.unet_2d import UNet2DOutput
from difusores.ops import cat_channels


class ADMUNet(ModelMixin):
    """Takes noisy images and timesteps and returns a prediction, and its variance if that is learned.

    Args:
        image_size: height and width for which it was trained; `attention_resolutions` refer to it, and the
            network takes any multiple of 2 ** (number of resolutions - 1).
        num_channels: the width that `channel_mult` multiplies.
        num_res_blocks: residual blocks at each resolution on the way down; one more on the way up.
        num_heads, num_heads_upsample: of attention on the way down and up; -1 there for `num_heads`.
        num_head_channels: width of a head in place of a number of heads; -1 for none.
        attention_resolutions: heights of the images that are attended to, "32,16,8" or a sequence.
        channel_mult: of each resolution, "1,2,3,4" or a sequence; "" for what guided-diffusion has for
            `image_size`, which is 64, 128, 256 or 512.
        dropout: probability, in training only.
        class_cond: class labels are needed.
        use_scale_shift_norm: time and class scale and shift after normalisation; else they are added before.
        resblock_updown: residual blocks halve and double; else convolutions do.
        use_new_attention_order: see `AttentionBlock`.
        learn_sigma: twice the channels come out, the second half for the variance.
        small_size: height and width of the smaller images that an upsampler is given; None for others.
        in_channels: of the images.
        num_classes: rows of the label table.
        label_type: "class" for labels out of a table, "number" for real ones, embedded by two layers.

    Raises:
        ValueError: an option has a value that is not among those above, or widths do not go together.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        num_channels: int = 128,
        num_res_blocks: int = 2,
        num_heads: int = 4,
        num_heads_upsample: int = -1,
        num_head_channels: int = -1,
        attention_resolutions: Numbers = "16,8",
        channel_mult: Numbers = "",
        dropout: float = 0.0,
        class_cond: bool = False,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        learn_sigma: bool = False,
        small_size: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        label_type: str = "class",
    ) -> None:
        super().__init__()
        if label_type not in ("class", "number"):
            raise ValueError(f"label_type is {label_type!r}; allowed are 'class' and 'number'")
        known = WIDTHS if small_size is None else UPSAMPLER_WIDTHS
        widths = widths_of(num_channels, channel_mult, image_size, known)
        attended = attended_levels(attention_resolutions, image_size, len(widths))
        emb_width = 4 * num_channels

        def residual(width_in: int, width_out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(width_in, width_out, emb_width, dropout, use_scale_shift_norm, resample)

        def attend(width: int, number: int = num_heads) -> AttentionBlock:
            return AttentionBlock(
                width, head_count(width, number, num_head_channels), use_new_attention_order
            )

        self.time_proj = Timesteps(num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = time_layers(num_channels)
        self.label_emb: nn.Module | None = None
        if class_cond and label_type == "class":
            self.label_emb = nn.Embedding(num_classes, emb_width)
        elif class_cond:
            self.label_emb = nn.Sequential(
                nn.Linear(1, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
            )
        given = in_channels if small_size is None else 2 * in_channels
        self.input_blocks, states = way_down(
            given, widths, num_res_blocks, attended, residual, attend, resblock_updown
        )
        width = widths[-1]
        self.middle_block = Row(residual(width, width), attend(width), residual(width, width))
        self.output_blocks = nn.ModuleList()
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        for level, out_width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                row: list[nn.Module] = [residual(width + states.pop(), out_width)]
                width = out_width
                if 2**level in attended:
                    row.append(attend(width, heads_up))
                if level and i == num_res_blocks:
                    row.append(residual(width, width, resample="up") if resblock_updown else Upsample(width))
                self.output_blocks.append(Row(*row))
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.out = nn.Sequential(
            GroupNormAct(GROUPS, width, 1e-5), nn.Identity(), nn.Conv2d(width, out_channels, 3, padding=1)
        )
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[2].bias)  # type: ignore[arg-type]
        self.factor = 2 ** (len(widths) - 1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            sample: [N, in_channels, H, W] in the model's dtype, NCHW or channels_last; H and W are multiples
                of 2 ** (number of resolutions - 1).
            timestep: a number or a tensor of no dimension, [1] or [N]; real ones are not cut off.
            class_labels: [N], integers or, with `label_type="number"`, real numbers.
            low_res: [N, in_channels, h, w], smaller images in [-1, 1], brought to H and W bilinearly; for
                upsamplers alone.
            return_dict: return a `UNet2DOutput`; else a tuple of one.

        Returns:
            sample: [N, in_channels, H, W], or [N, 2 * in_channels, H, W] with a learned variance.

        Raises:
            ValueError: a shape is not one of those above, or labels or `low_res` are missing or not expected.
        """
        check_image(sample, self.config["in_channels"], self.factor)
        if (low_res is None) != (self.config["small_size"] is None):
            expected = "takes no low_res" if low_res is not None else "is an upsampler and needs low_res"
            raise ValueError(f"this model {expected}")
        if (class_labels is None) == (self.label_emb is not None):
            kind = (
                "needs class_labels, one per image" if self.label_emb is not None else "takes no class_labels"
            )
            raise ValueError(f"this model {kind}: class_cond is {self.config['class_cond']}")
        emb = self._embed(times_of(timestep, sample), class_labels)
        x = sample
        if low_res is not None:
            if low_res.ndim != 4 or low_res.shape[:2] != sample.shape[:2]:
                raise ValueError(
                    f"low_res has shape {list(low_res.shape)}; needed is "
                    f"[{sample.shape[0]}, {sample.shape[1]}, h, w]"
                )
            low_res = low_res.to(sample.dtype)
            low_res = F.interpolate(low_res, tuple(sample.shape[2:]), mode="bilinear")
            x = torch.cat((x, low_res), dim=1)
        states = []
        for block in self.input_blocks:
            x = block(x, emb)
            states.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(cat_channels(x, states.pop()), emb)
        x = self.out(x)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _embed(self, times: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        dtype = self.dtype
        emb: torch.Tensor = self.time_embed(self.time_proj(times).to(dtype))
        if class_labels is None or self.label_emb is None:
            return emb
        if class_labels.shape != times.shape:
            raise ValueError(
                f"class_labels have shape {list(class_labels.shape)}; needed is {list(times.shape)}"
            )
        if isinstance(self.label_emb, nn.Embedding):
            label_emb: torch.Tensor = self.label_emb(class_labels)
        else:
            label_emb = self.label_emb(class_labels.to(dtype)[:, None])
        return emb + label_emb


class ADMClassifier(ModelMixin):
    """Classifies noisy images: the way down of an `ADMUNet`, with attention pooling at its end.

    Args:
        image_size: height and width of its images, 64, 128, 256 or 512 unless `channel_mult` is given.
        classifier_width, classifier_depth: as `num_channels` and `num_res_blocks` of `ADMUNet`.
        classifier_attention_resolutions: as `attention_resolutions` there; heads are 64 channels wide.
        classifier_use_scale_shift_norm, classifier_resblock_updown: as there.
        classifier_pool: "attention".
        channel_mult: as there.
        num_head_channels: width of a head.
        in_channels: of the images.
        num_classes: how many logits come out.

    Raises:
        ValueError: an option has a value that is not among those above, or widths do not go together.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        classifier_width: int = 128,
        classifier_depth: int = 2,
        classifier_attention_resolutions: Numbers = "32,16,8",
        classifier_use_scale_shift_norm: bool = True,
        classifier_resblock_updown: bool = True,
        classifier_pool: str = "attention",
        channel_mult: Numbers = "",
        num_head_channels: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if classifier_pool != "attention":
            raise ValueError(f"classifier_pool is {classifier_pool!r}; allowed is 'attention'")
        widths = widths_of(classifier_width, channel_mult, image_size, WIDTHS)
        attended = attended_levels(classifier_attention_resolutions, image_size, len(widths))

        def residual(width_in: int, width_out: int, resample: str | None = None) -> ResBlock:
            scale_shift = classifier_use_scale_shift_norm
            return ResBlock(width_in, width_out, 4 * classifier_width, 0.0, scale_shift, resample)

        def attend(width: int) -> AttentionBlock:
            return AttentionBlock(width, head_count(width, 1, num_head_channels), new_order=False)

        self.time_proj = Timesteps(classifier_width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = time_layers(classifier_width)
        self.input_blocks, _ = way_down(
            in_channels, widths, classifier_depth, attended, residual, attend, classifier_resblock_updown
        )
        width, self.factor = widths[-1], 2 ** (len(widths) - 1)
        self.middle_block = Row(residual(width, width), attend(width), residual(width, width))
        pool = AttentionPool2d(image_size // self.factor, width, num_head_channels, num_classes)
        self.out = nn.Sequential(GroupNormAct(GROUPS, width, 1e-5), nn.Identity(), pool)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """Classify noisy images.

        Args:
            sample: [N, in_channels, image_size, image_size] in the model's dtype.
            timestep: a number or a tensor of no dimension, [1] or [N].

        Returns:
            [N, num_classes], logits. Differentiable in `sample`.

        Raises:
            ValueError: a shape is not one of those above.
        """
        side = self.config["image_size"]
        check_image(sample, self.config["in_channels"], self.factor)
        if tuple(sample.shape[2:]) != (side, side):
            raise ValueError(
                f"sample has shape {list(sample.shape)}; this classifier's images are {side}x{side}"
            )
        emb = self.time_embed(self.time_proj(times_of(timestep, sample)).to(self.dtype))
        x = sample
        for block in self.input_blocks:
            x = block(x, emb)
        out: torch.Tensor = self.out(self.middle_block(x, emb))
        return out
