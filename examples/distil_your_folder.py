# %% [markdown]
# # Distil on a folder of your own, in minutes
#
# From a pipeline and a folder of captioned pictures to a GSPN-2 adapter. This is the short version: a few hundred
# steps on a few hundred pictures, to see that it learns. `docs/training.md` has the recipe for a real run, on
# `examples/distill.py`.
#
# The folder is an ordinary image folder: pictures, and a `metadata.jsonl` with one line a picture, `{"file_name":
# "0001.png", "text": "a caption"}`. Without `--train_data_dir`, scenes are rendered for the shipped model.

# %%
import argparse
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from gspn2_diffusion import apply_gspn2, gspn2_disabled
from gspn2_diffusion.assets import tiny_scenes_path
from gspn2_diffusion.loading import GUIDANCE_SCALE
from gspn2_diffusion.pictures import side_by_side
from gspn2_diffusion.training import parse_args, train

# %%
parser = argparse.ArgumentParser(description="A short distillation.")
parser.add_argument("--model", default=str(tiny_scenes_path()), help="folder of a diffusers pipeline")
parser.add_argument("--train_data_dir", help="image folder with metadata.jsonl (default: rendered scenes)")
parser.add_argument("--max_train_steps", type=int, default=200)
parser.add_argument("--layerwise_steps", type=int, default=100)
parser.add_argument("--train_batch_size", type=int, default=8)
parser.add_argument("--steps", type=int, default=25, help="denoising steps of the pictures painted before and after")
parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE, help="classifier-free guidance")
parser.add_argument("--prompt", default="a large red circle above a small blue square")
parser.add_argument("--out", default="outputs/distilled")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
out = Path(args.out)

# %% [markdown]
# ## The pictures

# %%
if args.train_data_dir is None:
    args.train_data_dir = str(out / "scenes")
    scenes = Path(__file__).parent / "scenes" / "scenes.py"
    subprocess.run([sys.executable, str(scenes), "--out", args.train_data_dir, "--num", "400"], check=True)

# %% [markdown]
# ## Before: attention, and the scan at its start
#
# The new layers start from a truncated SVD of the attention they replace, so this is not noise, but not good either.


# %%
def paint(pipe):
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return pipe(args.prompt, generator=torch.Generator().manual_seed(0), **options).images[0]


pipe = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
apply_gspn2(pipe)
start = paint(pipe)
with gspn2_disabled(pipe):
    teacher = paint(pipe)

# %% [markdown]
# ## Distil
#
# First each layer alone learns its attention's output, then all together learn the noise, the teacher's output and
# the teacher's attentions. These are the flags of `examples/distill.py`; on several GPUs put `accelerate launch`
# before that.

# %%
train(
    parse_args(
        argv=[
            f"--pretrained_model_name_or_path={args.model}",
            f"--train_data_dir={args.train_data_dir}",
            f"--output_dir={out / 'adapter'}",
            f"--train_batch_size={args.train_batch_size}",
            f"--layerwise_steps={args.layerwise_steps}",
            f"--max_train_steps={args.max_train_steps}",
            "--learning_rate=5e-4",
            "--holdout_samples=4",
        ]
    )
)

# %% [markdown]
# ## After

# %%
apply_gspn2(pipe, out / "adapter")
student = paint(pipe)
side_by_side([("attention", teacher), ("start", start), ("distilled", student)]).save(out / "comparison.png")
print(f"The adapter is in {out / 'adapter'}, the comparison in {out / 'comparison.png'}")
