"""Images out of noise, by hand and then by the pipeline. /
Imágenes a partir de ruido, a mano y después con el pipeline.

    python examples/unconditional.py FOLDER [OUT]

FOLDER holds a DDPM pipeline with the parts "unet" and "scheduler", such as google/ddpm-cat-256 or one that
`python -m difusores train` wrote. The pictures are written into OUT (the current folder). /
FOLDER contiene un pipeline DDPM con las partes «unet» y «scheduler», como google/ddpm-cat-256 o uno escrito
por `python -m difusores train`. Las imágenes se escriben en OUT (la carpeta actual).

Another library is a matter of the import line. / Cambiar de biblioteca es cambiar la línea de importación.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from difusores import DDPMPipeline, DDPMScheduler, UNet2DModel

folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else ".")

# 1. The parts: a network that predicts noise, and a scheduler that knows how much noise each step has.
#    Las partes: una red que predice el ruido y un planificador que sabe cuánto ruido tiene cada paso.
model = UNet2DModel.from_pretrained(folder, subfolder="unet")
scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
size, channels = model.config.sample_size, model.config.in_channels
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters / parámetros, {size}x{size} pixels / píxeles"
)

# 2. One prediction, at t = 0: the network is shown noise and says what noise it sees.
#    Una predicción, en t = 0: a la red se le muestra ruido y dice qué ruido ve.
generator = torch.Generator().manual_seed(42)
sample = torch.randn(1, channels, size, size, generator=generator)
with torch.no_grad():
    noise = model(sample=sample, timestep=0).sample
print(f"predicted / predicho: {tuple(noise.shape)}, std {noise.std():.3f}")

# 3. The loop of 50 steps, by hand: predict the noise, take a part of it away, go on with what is left.
#    El bucle de 50 pasos, a mano: predecir el ruido, quitar una parte, seguir con lo que queda.
scheduler.set_timesteps(50)
for t in scheduler.timesteps:
    with torch.no_grad():
        noise = model(sample, t).sample
    sample = scheduler.step(noise, t, sample, generator=generator).prev_sample


def picture(sample: torch.Tensor) -> Image.Image:
    """[1, C, H, W] in [-1, 1] as an image. / [1, C, H, W] en [-1, 1] como imagen."""
    pixels = ((sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


picture(sample).save(out / "by_hand.png")

# 4. The same in one call, and with the same seed the same picture.
#    Lo mismo en una llamada y, con la misma semilla, la misma imagen.
pipeline = DDPMPipeline.from_pretrained(folder)
image = pipeline(num_inference_steps=50, generator=torch.Generator().manual_seed(42)).images[0]
image.save(out / "by_pipeline.png")
print(f"by_hand.png, by_pipeline.png -> {out}")
