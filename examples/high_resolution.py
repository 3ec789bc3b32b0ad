# %% [markdown]
# # High resolution
#
# A model paints well at the size it was trained at. For a larger picture, `GSPN2UpscalePipeline` paints at that size
# first, enlarges, adds a little noise, and denoises again, stage by stage. With GSPN-2 the cost of a stage grows with
# its pixels. `docs/large_images.md` tells what else runs out of memory at 4K, and the switches against it.

# %%
import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from gspn2_diffusion.pipelines.gspn2_upscale import GSPN2UpscalePipeline

from gspn2_diffusion import apply_gspn2
from gspn2_diffusion.assets import tiny_adapter_path, tiny_scenes_path
from gspn2_diffusion.loading import GUIDANCE_SCALE

# %%
parser = argparse.ArgumentParser(description="A large picture in stages.")
parser.add_argument("--model", default=str(tiny_scenes_path()), help="folder of a diffusers pipeline")
parser.add_argument("--adapter", help="folder of its adapter (default: the shipped one, or untrained layers)")
parser.add_argument("--prompt", default="a large red circle above a small blue square")
parser.add_argument("--height", type=int, default=256)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE, help="classifier-free guidance")
parser.add_argument("--strengths", type=float, nargs="+", default=[0.16, 0.08, 0.04], help="noise of the later stages")
parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0], help="guidance of the later stages")
parser.add_argument("--out", default="outputs/large")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
shipped = args.model == str(tiny_scenes_path()) and (tiny_adapter_path() / "config.json").is_file()

pipe = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
apply_gspn2(pipe, args.adapter or (tiny_adapter_path() if shipped else None))

# %% [markdown]
# ## Stage by stage
#
# With a `folder`, finished stages are kept: the same call after an interruption goes on where it stopped.

# %%
large = GSPN2UpscalePipeline.from_pipe(pipe)
result = large(
    args.prompt,
    height=args.height,
    width=args.width,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance_scale,
    strengths=args.strengths,
    guidance_scales=args.guidance_scales,
    generator=torch.Generator().manual_seed(0),
)
Path(args.out).mkdir(parents=True, exist_ok=True)
for number, stage in enumerate(result.stages, 1):
    stage.save(Path(args.out) / f"stage-{number}-{stage.width}x{stage.height}.png")
print(f"{len(result.stages)} stages, up to {result.images[0].width} x {result.images[0].height}, in {args.out}")
