"""Stable Diffusion part by part, then as a pipeline whose parts are changed. /
Stable Diffusion pieza a pieza, y luego como un pipeline cuyas piezas se cambian.

    python examples/stable_diffusion.py FOLDER [OUT]

FOLDER holds a Stable Diffusion 1.x or 2.x pipeline, such as CompVis/stable-diffusion-v1-4. The pictures are
written into OUT (the current folder). / FOLDER contiene un pipeline de Stable Diffusion 1.x o 2.x, como
CompVis/stable-diffusion-v1-4. Las imágenes se escriben en OUT (la carpeta actual).

Another library is a matter of the import line. / Cambiar de biblioteca es cambiar la línea de importación.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from difusores import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else ".")
PROMPT = "a photograph of an astronaut riding a horse"
GUIDANCE, STEPS, SEED = 7.5, 75, 42

# 1. The parts, each from its own folder. / Las piezas, cada una de su carpeta.
tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler")

# 2. The prompt as vectors, and the empty prompt for guidance.
#    El texto como vectores, y el texto vacío para la guía.
length = tokenizer.model_max_length
options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
with torch.no_grad():
    text = text_encoder(tokenizer([PROMPT], **options).input_ids)[0]
    nothing = text_encoder(tokenizer([""], **options).input_ids)[0]
context = torch.cat((nothing, text))

# 3. Noise to begin with, in the scheduler's scale. / El ruido inicial, en la escala del planificador.
side = unet.config.sample_size
generator = torch.Generator().manual_seed(SEED)
latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
latents = latents * scheduler.init_noise_sigma

# 4. The loop by hand: two predictions a step, with the text and without it; their difference is stretched.
#    El bucle a mano: dos predicciones por paso, con el texto y sin él; su diferencia se amplía.
scheduler.set_timesteps(STEPS)
for t in scheduler.timesteps:
    both = scheduler.scale_model_input(torch.cat((latents, latents)), timestep=t)
    with torch.no_grad():
        without_text, with_text = unet(both, t, encoder_hidden_states=context).sample.chunk(2)
    noise = without_text + GUIDANCE * (with_text - without_text)
    latents = scheduler.step(noise, t, latents).prev_sample

# 5. Latents to pixels. / De latentes a píxeles.
with torch.no_grad():
    decoded = vae.decode(latents / 0.18215).sample
pixels = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
Image.fromarray(pixels.numpy()).save(out / "by_hand.png")

# 6. The same parts as a pipeline: look at them, and change the scheduler.
#    Las mismas piezas como pipeline: mirarlas y cambiar el planificador.
pipeline = StableDiffusionPipeline.from_pretrained(folder)
print("parts / piezas:", ", ".join(sorted(pipeline.components)))
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def draw(name: str) -> None:
    """A picture of the pipeline, as a file. / Una imagen del pipeline, como archivo."""
    generator = torch.Generator().manual_seed(SEED)
    output = pipeline(PROMPT, num_inference_steps=100, guidance_scale=GUIDANCE, generator=generator)
    print(f"{name}: marked / marcada: {output.nsfw_content_detected}")
    output.images[0].save(out / f"{name}.png")


draw("by_pipeline")

# 7. Build another pipeline from the parts, without the safety checker.
#    Construir otro pipeline con las piezas, sin el filtro de seguridad.
parts = {**pipeline.components, "safety_checker": None, "feature_extractor": None}
pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
draw("unchecked")


# 8. Put another decoder in: anything with `decode(latents)`. Here it paints in grey.
#    Poner otro decodificador: cualquier cosa con `decode(latents)`. Aquí pinta en gris.
class GreyDecoder:
    """Pictures without colour of another decoder's. / Imágenes sin color de las de otro decodificador."""

    def __init__(self, decoder):
        self.decoder, self.config, self.dtype = decoder, decoder.config, decoder.dtype

    def decode(self, latents, **options):
        grey = self.decoder.decode(latents).sample.mean(dim=1, keepdim=True)
        return (grey.repeat(1, 3, 1, 1),)


pipeline.vae = GreyDecoder(vae)
draw("other_decoder")
print(f"by_hand.png, by_pipeline.png, unchecked.png, other_decoder.png -> {out}")
