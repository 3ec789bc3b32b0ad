# %% [markdown]
# # Patch a pipeline
#
# Replace the self-attention of a diffusers pipeline with GSPN-2, look at what changed, switch between the two, and
# take it out again. With the shipped model it runs offline in seconds; `--model` takes any folder of a supported
# pipeline.

# %%
import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from gspn2_diffusion import apply_gspn2, gspn2_disabled, remove_gspn2
from gspn2_diffusion.assets import tiny_adapter_path, tiny_scenes_path
from gspn2_diffusion.loading import GUIDANCE_SCALE
from gspn2_diffusion.pictures import side_by_side

# %%
parser = argparse.ArgumentParser(description="Patch a pipeline and compare.")
parser.add_argument("--model", default=str(tiny_scenes_path()), help="folder of a diffusers pipeline")
parser.add_argument("--adapter", help="folder of its adapter (default: the shipped one, or untrained layers)")
parser.add_argument("--prompt", default="a large red circle above a small blue square")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE, help="classifier-free guidance")
parser.add_argument("--out", default="outputs/patched.png")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
shipped = args.model == str(tiny_scenes_path()) and (tiny_adapter_path() / "config.json").is_file()
adapter_source = args.adapter or (tiny_adapter_path() if shipped else None)

pipe = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)


def paint():
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return pipe(args.prompt, generator=torch.Generator().manual_seed(0), **options).images[0]


before = paint()

# %% [markdown]
# ## Apply
#
# `apply_gspn2` patches in place and returns the adapter that owns the new layers. Applying twice is the same as once.

# %%
adapter = apply_gspn2(pipe, adapter_source)
print(f"{len(adapter.layer_names)} self-attentions replaced, the first: {adapter.layer_names[0]}")
print(adapter.layer(adapter.layer_names[0]))
scanned = paint()

# %% [markdown]
# ## Compare
#
# Under `gspn2_disabled` the original attention runs, from the same weights: to the last bit what it was.

# %%
with gspn2_disabled(pipe):
    teacher = paint()
assert teacher.tobytes() == before.tobytes()

Path(args.out).parent.mkdir(parents=True, exist_ok=True)
side_by_side([("attention", teacher), ("GSPN-2", scanned)]).save(args.out)
print(f"The comparison is in {args.out}")

# %% [markdown]
# ## Remove
#
# Nothing stays behind: same modules, same keys, same pictures.

# %%
remove_gspn2(pipe)
assert paint().tobytes() == before.tobytes()
assert not any("gspn2" in key for key in pipe.unet.state_dict()), "nothing of ours is left in the model"
print("Removed: the pipeline paints what it painted before.")
