"""Put the trained parts together as a half-precision `StableDiffusionPipeline` (`--stage joint`:
`StableDiffusion3Pipeline`).

python examples/tiny_model/export.py --run outputs/tiny --out gspn2_diffusion/assets/tiny-scenes
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from models import make_joint_pipeline, make_scheduler, make_tokenizer, make_unet
from train import encode_all, stage_weights, trained_text_encoder

from gspn2_diffusion.assets import tiny_scenes_path


def unet_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    if not (args.run / "latents.safetensors").exists():
        raise SystemExit(f"{args.run} has no latents.safetensors; run train.py --stage unet there, which writes it.")
    _, vae = encode_all(argparse.Namespace(out=args.run), Accelerator(cpu=True))
    tokenizer = make_tokenizer(args.run / "tokenizer")
    unet = make_unet()
    unet.load_state_dict(stage_weights(args.run / "unet", ema=not args.no_ema))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=trained_text_encoder(argparse.Namespace(out=args.run), tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def joint_pipeline(args: argparse.Namespace) -> StableDiffusion3Pipeline:
    pipe = make_joint_pipeline(args.base)
    pipe.transformer.load_state_dict(stage_weights(args.run / "joint", ema=not args.no_ema))
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --out of train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; replaced if it is there")
    parser.add_argument("--stage", choices=["unet", "joint"], default="unet", help="the denoiser")
    parser.add_argument("--base", type=Path, default=tiny_scenes_path(), help="as for train.py --stage joint")
    parser.add_argument("--no_ema", action="store_true", help="the last weights instead of their running average")
    args = parser.parse_args()
    pipe = joint_pipeline(args) if args.stage == "joint" else unet_pipeline(args)
    shutil.rmtree(args.out, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(args.out)
    tokenizers = args.base / "tokenizer" if args.stage == "joint" else args.run / "tokenizer"
    for folder in args.out.glob("tokenizer*"):  # transformers 4 reads these, transformers 5 tokenizer.json
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizers / name, folder / name)
    # Stored in half, loaded in single precision unless asked otherwise, like the VAE and the denoiser.
    for config in args.out.glob("text_encoder*/config.json"):
        fields = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("dtype", "torch_dtype")}
        config.write_text(json.dumps(fields | {"torch_dtype": "float32"}, indent=2) + "\n")
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
