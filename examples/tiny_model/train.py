"""Train the shipped model from scratch on an image folder of scenes: VAE, text encoder, UNet (the teacher).

    python examples/scenes/scenes.py --out outputs/scenes --num 40000
    accelerate launch examples/tiny_model/train.py --data outputs/scenes --out outputs/tiny
    python examples/tiny_model/export.py --run outputs/tiny --out gspn2_diffusion/assets/tiny-scenes

A stage of its own, `joint`, trains a Stable Diffusion 3 (joint attention, flow matching) around the VAE and the text
encoder of a trained tiny model, the shipped one unless `--base` names another:

    python examples/tiny_model/train.py --stage joint --data outputs/scenes --out outputs/tiny-joint
    python examples/tiny_model/export.py --stage joint --run outputs/tiny-joint --out outputs/tiny-scenes-sd3

A stage that is started again goes on from its last checkpoint, so that the same command, given `--minutes`, can be run
until it says that all is trained. Losses are appended to `OUT/STAGE.jsonl`.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from models import make_joint_pipeline, make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae
from muon import MuonAdamW, parameter_groups
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from gspn2_diffusion.assets import tiny_scenes_path
from gspn2_diffusion.evaluation.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    parse_prompt,
)
from gspn2_diffusion.training.encode import Conditioner, encode_pictures

TIMED = 60
"""Steps after which `--fill` knows how many more there will be."""


class Folder:
    """An image folder with `metadata.jsonl`: captions, and pictures as uint8 (N, 128, 128, 3) decoded once."""

    def __init__(self, root: Path, limit: int | None = None):
        self.root = root
        lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()][:limit]
        self.files = [line["file_name"] for line in lines]
        self.captions = [line["text"] for line in lines]

    def pictures(self) -> torch.Tensor:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            read = pool.map(lambda name: np.asarray(Image.open(self.root / name).convert("RGB")), self.files)
            return torch.from_numpy(np.stack(list(tqdm(read, total=len(self.files), desc="pictures"))))


def stage_weights(folder: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights of a stage's last checkpoint; with `ema` their running average."""
    tensors = load_file(folder / "checkpoint.safetensors")
    names = [k for k in tensors if k.startswith("model.")]
    weights = {k[6:]: tensors[k] for k in names}
    if ema:
        # The average holds parameters only, in the module's order, which the file does not keep.
        order = json.loads((folder / "state.json").read_text())["parameters"]
        weights |= {name: tensors[f"ema.{i}"] for i, name in enumerate(order)}
    return weights


def steps_done(folder: Path) -> int:
    state = folder / "state.json"
    return json.loads(state.read_text())["step"] if state.exists() else 0


def to_model(pictures: torch.Tensor, device) -> torch.Tensor:
    return pictures.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class Run:
    """Checkpoints (safetensors, optimizer included), the learning rate's schedule and the log of one stage."""

    def __init__(self, args, model: nn.Module, optimizer: MuonAdamW, accelerator: Accelerator):
        self.args, self.model, self.optimizer, self.accelerator = args, model, optimizer, accelerator
        self.ema = None
        if args.ema:
            self.ema = EMAModel(model.parameters(), decay=args.ema, use_ema_warmup=True, power=0.75, foreach=True)
        self.folder = args.out / args.stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.first = self.step = steps_done(self.folder)
        self.halfway = 0.0
        if args.fill:
            args.steps = sys.maxsize  # until `fill_time` knows
        if self.step:
            self.load()

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {f"model.{k}": v for k, v in self.accelerator.unwrap_model(self.model).state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        if self.ema:
            out |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        return {k: v.detach().cpu().contiguous().clone() for k, v in out.items()}

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        names = [name for name, _ in self.accelerator.unwrap_model(self.model).named_parameters()]
        temporary = self.folder / "checkpoint.part"
        save_file(self.tensors(), temporary)
        temporary.replace(self.folder / "checkpoint.safetensors")
        (self.folder / "state.json").write_text(json.dumps({"step": self.step, "parameters": names}))

    def load(self) -> None:
        tensors = load_file(self.folder / "checkpoint.safetensors")
        part = lambda name: {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}  # noqa: E731
        self.accelerator.unwrap_model(self.model).load_state_dict(part("model"))
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, value in part("optimizer").items():
            i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict(state)
        if self.ema:
            for i, value in part("ema").items():
                self.ema.shadow_params[int(i)].copy_(value)
            self.ema.optimization_step = self.step

    def generators(self):
        """Each step's own generators, so that a resumed run sees what an uninterrupted one would."""
        seed = [self.args.seed, self.accelerator.process_index, self.step]
        rng = np.random.default_rng(seed)
        return rng, torch.Generator(self.accelerator.device).manual_seed(int(rng.integers(2**62)))

    def rate(self) -> float:
        """Linear warm-up, then linear decay to nothing."""
        warm = min(1.0, (self.step + 1) / self.args.warmup)
        left = (self.args.steps - self.step) / max(self.args.steps * self.args.decay, 1)
        return min(warm, left)

    def train(self, loss_of) -> int:
        """Run `loss_of(rng, generator) -> (loss, figures)` until the last step or the time is up; the step reached.

        Figures may be tensors: the device is waited for when a line of the log is due, not at each step.
        """
        started, log = time.monotonic(), []
        bar = tqdm(
            initial=self.step,
            total=None if self.args.fill else self.args.steps,
            desc=self.args.stage,
            disable=not self.accelerator.is_main_process,
            mininterval=10,
        )
        with open(self.args.out / f"{self.args.stage}.jsonl", "a") as file:
            while self.step < self.args.steps and time.monotonic() - started < self.args.minutes * 60:
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * self.rate()
                loss, figures = loss_of(*self.generators())
                self.accelerator.backward(loss)
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema:
                    self.ema.step(self.model.parameters())
                self.step += 1
                bar.update()
                # Kept as tensors: reading a number waits for the GPU.
                log.append({"loss": loss.detach(), "norm": norm, **figures})
                if self.step % self.args.log_every == 0 and self.accelerator.is_main_process:
                    mean = {k: round(float(sum(entry[k] for entry in log)) / len(log), 5) for k in log[0]}
                    seconds = round(time.monotonic() - started, 1)
                    file.write(json.dumps({"step": self.step, "seconds": seconds, **mean}) + "\n")
                    file.flush()
                    bar.set_postfix(mean)
                    log.clear()
                if self.step % self.args.save_every == 0:
                    self.save()
                if self.args.fill:
                    self.fill_time(started, loss)
        self.save()
        return self.step

    def fill_time(self, started: float, loss: torch.Tensor) -> None:
        """After `TIMED` steps, of which the first half compiles and warms up: as many steps as the time allows."""
        done = self.step - self.first
        if done not in (TIMED // 2, TIMED):
            return
        loss.item()  # waits for the device
        now = time.monotonic()
        if done == TIMED:
            left = self.args.minutes * 60 - (now - started)
            self.args.steps = self.step + max(1, int(0.97 * left * (TIMED // 2) / (now - self.halfway)))
        self.halfway = now


def train_vae(args, accelerator: Accelerator) -> int:
    """Crops for the first four fifths (four times cheaper), whole pictures for the last."""
    if accelerator.num_processes > 1:
        raise SystemExit("The VAE trains in one process; start --stage vae with --num_processes 1.")
    pictures = Folder(args.data, args.limit or 8000).pictures()
    model = make_vae()
    model, optimizer = accelerator.prepare(model, MuonAdamW(parameter_groups(model, lr=args.lr)))
    run = Run(args, model, optimizer, accelerator)
    (args.out / "latents.safetensors").unlink(missing_ok=True)  # an earlier VAE's
    vae = accelerator.unwrap_model(model)

    def loss_of(rng, generator):
        whole = run.step >= 0.8 * args.steps
        size, batch = (128, max(args.batch // 4, 1)) if whole else (64, args.batch)
        index = rng.integers(len(pictures), size=batch)
        corners = rng.integers(0, 128 - size + 1, size=(batch, 2))
        crops = [pictures[i, y : y + size, x : x + size] for i, (y, x) in zip(index, corners, strict=True)]
        x = to_model(torch.stack(crops), accelerator.device)
        posterior = vae.encode(x).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = (restored.float() - x).abs().mean() + (restored.float() - x).square().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        figures = {"error": error.detach(), "kl": kl.detach(), "std": posterior.std.mean().detach(), "size": size}
        return error + args.kl * kl, figures

    return run.train(loss_of)


NOUNS = {word: i for i, word in enumerate(SHAPES)} | {word: SHAPES.index(shape) for word, shape in PLURALS.items()}
ATTRIBUTES = {"shape": SHAPES, "colour": (None, *COLOURS), "size": (None, *SIZES), "count": (1, 2, 3, 4)}
SCENE = {"relation": (None, *RELATIONS), "background": (None, *BACKGROUNDS), "pattern": (None, *PATTERNS)}
IGNORE = -100


class TextReader(nn.Module):
    """Heads that read a caption's meaning off the text encoder: each noun's own attributes and its group's place where
    the noun stands (causal attention: what was said so far), everything at the end of the text.

    Learning to bind words to one another is cheap here and dear in the diffusion loss. The heads are thrown away.
    """

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.nouns = {tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in NOUNS}
        width = encoder.config.hidden_size
        own = [len(values) for values in ATTRIBUTES.values()] + [len(RELATIONS) + 1, 2]
        whole = [len(values) + 1 for values in ATTRIBUTES.values()] * 2 + [len(values) for values in SCENE.values()]
        self.own_sizes, self.whole_sizes = own, whole
        self.own, self.whole = nn.Linear(width, sum(own)), nn.Linear(width, sum(whole))

    def targets(self, caption: str, ids: list[int]) -> tuple[list[list[int]], list[int]]:
        claims = parse_prompt(caption)
        described = [[values.index(getattr(g, k)) for k, values in ATTRIBUTES.items()] for g in claims.groups]
        relation = SCENE["relation"].index(claims.relation)
        places = [i for i, token in enumerate(ids) if token in self.nouns]
        own = [[IGNORE] * len(self.own_sizes) for _ in ids]
        for order, (place, attributes) in enumerate(zip(places, described, strict=True)):
            own[place] = [*attributes, relation if order else 0, order]
        absent = [[len(values) for values in ATTRIBUTES.values()]] * (2 - len(described))
        scene = [values.index(getattr(claims, k)) for k, values in SCENE.items()]
        return own, [*(value for attributes in described + absent for value in attributes), *scene]

    def forward(self, captions: list[str]) -> torch.Tensor:
        """Mean cross-entropy of all claims."""
        device = self.own.weight.device
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        own, whole = zip(*(self.targets(c, ids) for c, ids in zip(captions, tokens.tolist(), strict=True)), strict=True)
        hidden = self.encoder(tokens.to(device))[0]
        own, whole = torch.tensor(own, device=device), torch.tensor(whole, device=device)
        end = (tokens == self.tokenizer.eos_token_id).int().argmax(1).to(device)
        # The end of the text and the padding after it: all that cross-attention may read the whole meaning from.
        after = torch.arange(tokens.shape[1], device=device)[None] >= end[:, None]
        whole = whole[:, None].expand(-1, tokens.shape[1], -1).masked_fill(~after[..., None], IGNORE)
        losses = []
        for head, sizes, target in ((self.own, self.own_sizes, own), (self.whole, self.whole_sizes, whole)):
            for i, logits in enumerate(head(hidden).float().split(sizes, -1)):
                losses.append(F.cross_entropy(logits.flatten(0, 1), target[..., i].flatten(), ignore_index=IGNORE))
        return torch.stack(losses).mean()


def train_text(args, accelerator: Accelerator) -> int:
    """The text encoder learns to bind attributes to nouns from captions alone."""
    captions = Folder(args.data, args.limit).captions
    tokenizer = make_tokenizer(args.out / "tokenizer")
    reader = TextReader(make_text_encoder(tokenizer), tokenizer)
    reader, optimizer = accelerator.prepare(reader, MuonAdamW(parameter_groups(reader, lr=args.lr)))
    run = Run(args, reader, optimizer, accelerator)

    def loss_of(rng, generator):
        return reader([captions[i] for i in rng.integers(len(captions), size=args.batch)]), {}

    return run.train(loss_of)


@torch.no_grad()
def encode_all(args, accelerator: Accelerator) -> tuple[torch.Tensor, AutoencoderKL]:
    """Latents of every picture, and the VAE with its latent channels brought to mean 0 and deviation 1 (exactly, in the
    1 x 1 convolutions around them: `StableDiffusionPipeline` knows a scale but no shift)."""
    cache = args.out / "latents.safetensors"
    vae = make_vae()
    vae.load_state_dict(stage_weights(args.out / "vae"))
    vae.to(accelerator.device).eval()
    if cache.exists():
        kept = load_file(cache)
        latents, mean, std = kept["latents"], kept["mean"], kept["std"]
    else:
        pictures = Folder(args.data, args.limit).pictures()
        batches = tqdm(pictures.split(64), desc="latents")
        latents = torch.cat([vae.encode(to_model(p, accelerator.device)).latent_dist.mean.cpu() for p in batches])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        latents = ((latents - mean[:, None, None]) / std[:, None, None]).half().contiguous()
        if accelerator.is_main_process:
            save_file({"latents": latents, "mean": mean, "std": std}, cache)
    mean, std = mean.to(accelerator.device), std.to(accelerator.device)
    before, after = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat([1 / std, torch.ones_like(std)])
    before.weight.mul_(scale[:, None, None, None])
    before.bias.copy_(torch.cat([(before.bias[:4] - mean) / std, before.bias[4:] - 2 * std.log()]))
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(std[None, :, None, None])
    return latents, vae


def trained_text_encoder(args, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    encoder = make_text_encoder(tokenizer)
    weights = stage_weights(args.out / "text")
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")})
    return encoder.eval()


class Samples:
    """Latents and what the denoiser is given with each caption, on the device, with the draws of a training step.

    Args:
        captions: N captions.
        latents: (N, 4, 16, 16).
        conditions: tensors of N + 1 rows; the last belongs to the empty caption.
    """

    def __init__(self, args, captions: list[str], latents: torch.Tensor, conditions: dict[str, torch.Tensor], device):
        self.args, self.latents, self.device = args, latents.to(device), device
        self.conditions = {name: value.to(device) for name, value in conditions.items()}
        groups = torch.tensor([len(parse_prompt(caption).groups) for caption in captions[: len(latents)]])
        self.kinds = [(groups == number).nonzero()[:, 0].to(device) for number in (1, 2)]

    def draw(self, generator) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Latents, noise, conditions and times in [0, 1), of which 1 is noise alone. Nothing waits for the device."""
        args, batch, device = self.args, self.args.batch, self.device

        def uniform() -> torch.Tensor:
            return torch.rand(batch, generator=generator, device=device)

        def one_of(rows: torch.Tensor) -> torch.Tensor:
            return rows[torch.randint(len(rows), (batch,), generator=generator, device=device)]

        index = torch.randint(len(self.latents), (batch,), generator=generator, device=device)
        if args.two_kinds is not None:
            index = torch.where(uniform() < args.two_kinds, one_of(self.kinds[1]), one_of(self.kinds[0]))
        x = self.latents[index].float()
        rows = torch.where(uniform() < args.drop, len(self.latents), index)
        noise = torch.randn(x.shape, generator=generator, device=device)
        # Stratified, and denser at high noise, where the caption decides what is drawn.
        times = ((torch.arange(batch, device=device) + uniform()) / batch) ** 0.75
        return x, noise, {name: value[rows].float() for name, value in self.conditions.items()}, times


def loss_and_figures(predicted: torch.Tensor, target: torch.Tensor, times: torch.Tensor):
    each = (predicted.float() - target).square().mean((1, 2, 3))
    high = (times > 0.7).float()
    means = {"high_noise": (each * high).sum() / high.sum(), "low_noise": (each * (1 - high)).sum() / (1 - high).sum()}
    return each.mean(), {name: value.detach() for name, value in means.items()}


def train_unet(args, accelerator: Accelerator) -> int:
    """The teacher: v-prediction on cached latents and embeddings; a tenth of the captions is dropped for guidance."""
    captions = Folder(args.data, args.limit).captions
    latents, _ = encode_all(args, accelerator)
    tokenizer = make_tokenizer(args.out / "tokenizer")
    encoder = trained_text_encoder(args, tokenizer).to(accelerator.device)
    tokens = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = torch.cat([encoder(part.to(accelerator.device))[0].half() for part in tokens.split(500)])
    samples = Samples(args, captions, latents, {"states": states}, accelerator.device)
    model = make_unet()
    model, optimizer = accelerator.prepare(model, MuonAdamW(parameter_groups(model, lr=args.lr)))
    run = Run(args, model, optimizer, accelerator)
    forward = torch.compile(model) if args.compile else model
    scheduler = make_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    total = scheduler.config.num_train_timesteps

    def loss_of(rng, generator):
        x, noise, conditions, times = samples.draw(generator)
        timesteps = (times * total).long().clamp(0, total - 1)
        target = scheduler.get_velocity(x, noise, timesteps)
        predicted = forward(scheduler.add_noise(x, noise, timesteps), timesteps, conditions["states"]).sample
        return loss_and_figures(predicted, target, times)

    return run.train(loss_of)


@torch.no_grad()
def joint_samples(args, pipe: StableDiffusion3Pipeline, device) -> Samples:
    """The folder as the pipeline encodes it."""
    folder = Folder(args.data, args.limit)
    pipe.to(device)
    conditioner, pieces, parts = Conditioner(pipe), [*folder.captions, ""], []
    for start in tqdm(range(0, len(pieces), 500), desc="captions"):
        own, _, _ = conditioner(pieces[start : start + 500], (128, 128))
        parts.append({name: value.half() for name, value in own.items()})
    conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    batches = tqdm(folder.pictures().split(64), desc="latents")
    latents = torch.cat(
        [encode_pictures(pipe, to_model(pictures, device), packed=False).half() for pictures in batches]
    )
    return Samples(args, folder.captions, latents, conditions, device)


def train_joint(args, accelerator: Accelerator) -> int:
    """A teacher with joint attention: flow matching with Stable Diffusion 3's transformer."""
    pipe = make_joint_pipeline(args.base)
    samples = joint_samples(args, pipe, accelerator.device)
    model = pipe.transformer.requires_grad_(True)
    model, optimizer = accelerator.prepare(model, MuonAdamW(parameter_groups(model, lr=args.lr)))
    run = Run(args, model, optimizer, accelerator)
    if args.compile:
        # Block by block: the blocks are alike, so little is compiled. Where no compiler is, they run as they are.
        torch._dynamo.config.suppress_errors = True
        for block in accelerator.unwrap_model(model).transformer_blocks:
            block.compile()
    total = pipe.scheduler.config.num_train_timesteps

    def loss_of(rng, generator):
        x, noise, conditions, times = samples.draw(generator)
        mixed = x.lerp(noise, times[:, None, None, None])
        predicted = model(mixed, timestep=times * total, **conditions, return_dict=False)[0]
        return loss_and_figures(predicted, noise - x, times)

    return run.train(loss_of)


STAGES = {"vae": train_vae, "text": train_text, "unet": train_unet, "joint": train_joint}
# The shipped model.
ALL = ("vae", "text", "unet")
DEFAULTS = {
    "vae": {"steps": 4000, "batch": 16, "lr": 3e-3, "ema": 0.0},
    "text": {"steps": 500, "batch": 128, "lr": 2e-3, "ema": 0.0},
    "unet": {"steps": 15000, "batch": 128, "lr": 3e-3, "ema": 0.999},
    "joint": {"steps": 8000, "batch": 512, "lr": 2e-3, "ema": 0.999},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder with metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all", help=f"all: {', '.join(ALL)}")
    parser.add_argument("--base", type=Path, default=tiny_scenes_path(), help="joint: pipeline to take the parts from")
    parser.add_argument("--steps", type=int, help="of one stage")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, with a checkpoint, after this long")
    parser.add_argument("--fill", action="store_true", help="as many steps as fit into --minutes, not --steps")
    parser.add_argument("--limit", type=int, help="use only the first pictures")
    parser.add_argument("--batch", type=int, help="samples of a step on each process")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--ema", type=float, help="decay of the running average, 0 for none")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the VAE's KL term")
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions dropped, for guidance")
    parser.add_argument(
        "--two_kinds", type=float, help="share of captions with two kinds of object; default: as they come"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet, or the blocks of joint")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--log_every", type=int, default=25)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: what accelerate finds")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.stage == "all" and args.steps is not None:
        parser.error("--steps is the length of one stage; name it with --stage")
    if args.fill and (args.stage == "all" or args.steps is not None or args.minutes == float("inf")):
        parser.error("--fill needs --stage and --minutes, and no --steps")
    return args


def for_stage(args: argparse.Namespace, stage: str) -> argparse.Namespace:
    chosen = {k: v for k, v in vars(args).items() if v is not None}
    return argparse.Namespace(**{**vars(args), **DEFAULTS[stage], **chosen, "stage": stage})


def main() -> None:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda was asked for but torch finds no CUDA device; leave it out to train on the CPU."
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for stage in ALL if args.stage == "all" else [args.stage]:
        chosen = for_stage(args, stage)
        if steps_done(args.out / stage) >= chosen.steps and not args.fill:
            accelerator.print(f"{stage}: done before.")
            continue
        chosen.minutes = args.minutes - (time.monotonic() - started) / 60
        set_seed(args.seed)
        step = STAGES[stage](chosen, accelerator)
        if step < chosen.steps:
            accelerator.print(f"{stage}: {step} of {chosen.steps} steps; run the same command again to go on.")
            return
        accelerator.print(f"{stage}: all {step} steps done.")


if __name__ == "__main__":
    main()
