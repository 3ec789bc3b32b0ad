"""The training loop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from ..adapter import GSPN2Adapter, few
from ..assets import tiny_scenes_path
from ..loading import SHIPPED, open_pipeline, start_layers, writable_folder
from ..patching import gspn2_disabled, remove_gspn2
from ..patching.families import find_model
from .arguments import DivergedError, TrainingArguments, TrainingError
from .checkpoint import PARTIAL, PREFIX, Checkpoints, full_copy, trained_values
from .encode import EncodedDataset, encode_datasets
from .objective import Objective
from .rollout import Rollout
from .sampling import (
    BatchOrder,
    Parts,
    PlacedSamples,
    StepSampler,
    held_out,
    loader,
    to_device,
    turns,
    without_rows,
)
from .student import StudentStep

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PATIENCE = 20
"""Steps in a row without a finite gradient after which a run is given up."""


def train(args: TrainingArguments, pipe: Any = None) -> Path | None:
    """Runs a training from its options and returns the folder of the trained adapter (None after `--encode_only`).

    Args:
        args: the options.
        pipe: the pipeline if it is loaded already; it is patched and moved, and loses the parts that training does not
            need. None loads `args.pretrained_model_name_or_path`.

    Raises:
        CheckpointError: a checkpoint could not be written or read.
        DivergedError: the loss stays NaN or infinite.
        TrainingError: options and data or model do not go together.
    """
    folder = writable_folder(args.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        )
    except ValueError as error:
        # Such as fp16 without a GPU.
        raise TrainingError(f"accelerate refuses these options: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("--mixed_precision fp16 needs a GPU; use bf16 or no.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes == 1:
        # Each would train alone and write to the same folder.
        raise TrainingError(
            f"{started} processes were started without a GPU to join them; use `accelerate launch --cpu`."
        )
    if args.report_to and not accelerator.log_with:
        raise TrainingError(f"--report_to {args.report_to} needs the package {args.report_to}; install it.")
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    _fit_backend(args, accelerator)
    # FSDP2 shards parameters of one type together and casts them itself.
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    dtype = torch.float32 if fsdp else DTYPES.get(accelerator.mixed_precision, torch.float32)
    if pipe is None:
        shipped = args.pretrained_model_name_or_path == SHIPPED
        path: Any = tiny_scenes_path() if shipped else args.pretrained_model_name_or_path
        pipe = open_pipeline(path, dtype, revision=args.revision, variant=args.variant)
    pipe.to(accelerator.device)
    remove_gspn2(pipe)
    # Half precision overflows in some VAEs (SDXL's).
    for part, wanted in ((find_model(pipe), dtype), (pipe.vae, torch.float32)):
        if part.dtype != wanted:
            part.to(dtype=wanted)
    folders = encode_datasets(args, pipe, accelerator)
    caches = {cache: EncodedDataset(cache) for cache in folders}
    data = [caches[cache] for cache in folders]
    if broken := data[0].broken:
        logger.warning("%d images cannot be read and are left out: %s", len(broken), few(broken, 20))
    if args.encode_only:
        return None
    if accelerator.is_main_process:
        args.save(folder / "training_args.json")
    return _Run(args, accelerator, pipe, data, folder).run()


def _fit_backend(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuses what FSDP cannot do, and tells DeepSpeed what it would take from a data loader or a file of its own."""
    kind = accelerator.distributed_type
    for flag, used in (("layerwise_steps", args.layerwise_steps), ("validation_prompts", args.validation_prompts)):
        if kind == DistributedType.FSDP and used:
            # Both run parts of the model by themselves, without the hooks that gather their weights.
            raise TrainingError(f"--{flag} does not work with FSDP; leave it out, or use DDP or DeepSpeed.")
    if kind == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        if zero.get("stage") not in (1, 2) or zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise TrainingError(
                "Of DeepSpeed, ZeRO stages 1 and 2 without offloading are supported; for less, use FSDP2."
            )
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_clipping"] = args.max_grad_norm


class _Run:
    """One training run after its data is encoded."""

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, pipe: Any, data: list[EncodedDataset], folder: Path
    ) -> None:
        self.args, self.accelerator, self.pipe, self.folder = args, accelerator, pipe, folder
        denoiser: Any = find_model(pipe)
        denoiser.requires_grad_(False)
        denoiser.eval()
        self.adapter = self._layers(denoiser)
        self.objective = make_objective(pipe.scheduler, args, data[0].facts["timestep_scale"])
        self.parts = args.parts()
        how = (args.rollout_steps, args.rollout_stop)
        rollouts = [
            Rollout(self.objective, own.empty, args.rollouts(part), part.guidance_scale, *how, part.strength)
            for part, own in zip(self.parts, data, strict=True)
            if args.rollout_share
        ]
        weights = (args.noise_loss_weight, args.output_loss_weight, args.layer_loss_weight)
        module = StudentStep(denoiser, self.objective, *weights, rollouts, args.guided_loss_weight)
        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if not args.validation_prompts:
            # Encoded already; only pictures need them again.
            for name, part in pipe.components.items():
                if isinstance(part, torch.nn.Module) and part is not denoiser:
                    pipe.register_modules(**{name: None})
        parameters = list(self.adapter.parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.rate = learning_rates(args)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.student: StudentStep = accelerator.unwrap_model(self.module)
        self.ema = EMAModel(trained_values(self.adapter), decay=args.ema_decay) if args.use_ema else None
        self.checkpoints = Checkpoints(
            folder, accelerator, self.adapter, self.optimizer, self.ema, args.checkpoints_total_limit, rollouts
        )
        split = held_out(data[0], args.holdout_samples, args.seed)
        hidden = [data[0].rows[index] for index in split[1]]
        self.samples: list[PlacedSamples] = []
        self.orders: list[BatchOrder] = []
        self.held_out: list[list[int]] = []
        for number, (part, own) in enumerate(zip(self.parts, data, strict=True)):
            trained, out = split if own is data[0] else without_rows(own, hidden)
            # Parts draw independently, the first as if it were alone.
            seed = args.seed + (number << 32)
            empty = args.proportion_empty_prompts
            self.samples.append(PlacedSamples(own, self.objective, seed, empty, part.strength, number))
            total = part.batch * accelerator.num_processes * args.gradient_accumulation_steps
            self.orders.append(BatchOrder(own.sizes, trained, total, seed))
            self.held_out.append(out)
        self.turns = turns([part.share for part in self.parts], args.max_train_steps)
        self.log = Log(folder / "log.jsonl", accelerator)
        if args.report_to:
            accelerator.init_trackers(args.tracker_project_name, config=_plain(args))

    def _layers(self, denoiser: Any) -> GSPN2Adapter:
        config = self.args.operator_config() if self.args.adapter is None else None
        patching = logging.getLogger("gspn2_diffusion.patching")
        level = patching.level
        # The warning about untrained layers is for users who want pictures now.
        patching.setLevel(logging.ERROR)
        try:
            adapter: Any = start_layers(denoiser, self.args.adapter, config)
        finally:
            patching.setLevel(level)
        adapter.requires_grad_(True)
        # Trained weights stay in float32; autocast brings their products to the model's type.
        cast_training_params(adapter, dtype=torch.float32)
        return adapter

    def run(self) -> Path:
        with self.checkpoints.on_a_full_disk():
            # A bar left open would be drawn below the message that ends a run.
            with ExitStack() as bars:
                self._train(bars)
            self._finish()
        return self.folder

    def _train(self, bars: ExitStack) -> None:
        args, accelerator = self.args, self.accelerator
        start = self.checkpoints.load(args.resume_from_checkpoint) if args.resume_from_checkpoint else 0
        self.log.start(start)
        if accelerator.is_main_process:
            for partial in self.folder.glob(PREFIX + "*" + PARTIAL):
                shutil.rmtree(partial)
        trainable = sum(p.numel() for p in self.adapter.parameters())
        logger.info(
            "Training %d layers (%.2f M parameters), steps %d to %d.",
            len(self.adapter.layer_names),
            trainable / 1e6,
            start,
            args.max_train_steps,
        )
        for number, (samples, order) in enumerate(zip(self.samples, self.orders, strict=True)):
            logger.info(
                "%d samples of %s pixels, noise up to strength %g, %d per step, %d steps.",
                order.samples,
                samples.data.sizes[0],
                samples.strength,
                order.total,
                sum(part == number for part, _ in self.turns),
            )
        sampler = StepSampler(
            self.orders,
            self.turns[start:],
            args.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        batches = iter(loader(Parts(self.samples), sampler, args.dataloader_num_workers))
        if start == 0:
            self._watch(0)
        bar = bars.enter_context(
            tqdm(total=args.max_train_steps, initial=start, desc="steps", disable=not accelerator.is_local_main_process)
        )
        failed, since, watch = 0, start, time.perf_counter()
        sums: dict[str, Any] = defaultdict(float)
        for step in range(start, args.max_train_steps):
            layerwise = step < args.layerwise_steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            for _ in range(args.gradient_accumulation_steps):
                batch = to_device(next(batches), accelerator.device)
                with accelerator.accumulate(self.module):
                    loss, parts = self.module(**batch, layerwise=layerwise)
                    accelerator.backward(loss)
                    for name, part in {"loss": loss.detach(), **parts}.items():
                        sums[name] += part / args.gradient_accumulation_steps
                    if accelerator.sync_gradients:
                        # DeepSpeed clips by itself and may not say to what.
                        norm = float(accelerator.clip_grad_norm_(self.adapter.parameters(), args.max_grad_norm) or 0)
                        finite = norm < float("inf")
                        # A GradScaler meets infinities as part of its search and skips the step by itself.
                        if finite or accelerator.scaler is not None:
                            self.optimizer.step()
                        failed = 0 if finite else failed + 1
                        sums["skipped_steps"] += 0.0 if finite else 1.0
                        sums["grad_norm"] += norm if finite else 0.0
                    self.optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if failed >= PATIENCE:
                raise DivergedError(
                    f"No finite gradient for {PATIENCE} steps up to step {done}; lower --learning_rate, use bf16 "
                    "instead of fp16, or resume from an earlier checkpoint."
                )
            if self.ema is not None:
                self.ema.step(trained_values(self.adapter))
            bar.update()
            # A line never spans both stages.
            if done % args.logging_steps == 0 or done in (args.layerwise_steps, args.max_train_steps):
                count, seconds = done - since, time.perf_counter() - watch
                means = {name: self._mean(value, count) for name, value in sums.items()}
                means["skipped_steps"] = round(means["skipped_steps"] * count)
                seen = sum(self.orders[part].total for part, _ in self.turns[since:done])
                means |= {"lr": self.rate(step), "samples_per_second": seen / seconds}
                if torch.cuda.is_available():
                    means["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                self.log.write(done, {"stage": "layerwise" if layerwise else "end to end", **means})
                bar.set_postfix(loss=f"{means['loss']:.4g}")
                sums.clear()
            self._watch(done)
            if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
                self.checkpoints.save(done)
            if not sums:
                since, watch = done, time.perf_counter()

    def _mean(self, value: Any, count: int) -> float:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "mean")) / count

    def _watch(self, done: int) -> None:
        """Distance to the teacher, and pictures, at the steps at which they are due."""
        args = self.args
        regular = done > 0 and (done % args.validation_steps == 0 or done == args.max_train_steps)
        if self.held_out[0] and (regular or done in args.distance_steps):
            distances: dict[str, float] = {}
            with self._averaged():
                for number, part in enumerate(self.parts):
                    name = f"_{part.resolution}@{part.strength:g}" if number else ""
                    if self.held_out[number]:
                        output, layers = self._distance(number)
                        distances |= {f"distance{name}": output, f"layer_distance{name}": layers}
            self.log.write(done, distances)
        if args.validation_prompts and regular and self.accelerator.is_main_process:
            with self._averaged(), self.accelerator.autocast():
                self._draw(done)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside the block the layers have the average's weights, those that will be saved."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.adapter.parameters())
        self.ema.copy_to(self.adapter.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.adapter.parameters())

    def _draw(self, done: int) -> None:
        """A strip of pictures, one for each prompt, each from its own fixed noise."""
        folder = self.folder / "validation"
        folder.mkdir(exist_ok=True)
        if not (folder / "teacher.png").is_file():
            with gspn2_disabled(self.student.denoiser):
                taught = self._pictures()
                make_image_grid(taught, 1, len(taught)).save(folder / "teacher.png")
        from .report import STEM

        pictures = self._pictures()
        make_image_grid(pictures, 1, len(pictures)).save(folder / f"{STEM}{done:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({"validation": pictures}, step=done)
            else:
                tracker.log_images(
                    {"validation": np.stack([np.asarray(p) for p in pictures])}, done, dataformats="NHWC"
                )

    def _pictures(self) -> list[Any]:
        height, width = map(int, self.samples[0].data.sizes[0].split("x"))
        return [
            self.pipe(
                prompt,
                height=height,
                width=width,
                num_inference_steps=self.args.validation_inference_steps,
                guidance_scale=self.args.validation_guidance_scale,
                generator=torch.Generator().manual_seed(self.args.seed + place),
            ).images[0]
            for place, prompt in enumerate(self.args.validation_prompts or [])
        ]

    def _distance(self, part: int) -> tuple[float, float]:
        """Mean over a part's held-out samples, with timesteps spread evenly and noise that is always the same."""
        samples, out, size = self.samples[part], self.held_out[part], self.parts[part].batch
        items = [samples.fixed(place, index, len(out)) for place, index in enumerate(out)]
        output, layers = 0.0, 0.0
        with torch.no_grad():
            for start in range(0, len(items), size):
                batch = items[start : start + size]
                of_output, of_layers = self.module(
                    **to_device(samples.collate(batch), self.accelerator.device), measure=True
                )
                output += of_output * len(batch) / len(items)
                layers += of_layers * len(batch) / len(items)
        return output, layers

    def _finish(self) -> None:
        # Here, as `python -m gspn2_diffusion.training.report` would otherwise find itself imported already.
        from .report import write_report

        adapter = full_copy(
            self.adapter, self.ema.shadow_params if self.ema is not None else trained_values(self.adapter)
        )
        if self.accelerator.is_main_process:
            adapter.save_pretrained(self.folder)
            logger.info("Saved the adapter to %s; what happened is in %s.", self.folder, write_report(self.folder))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def make_objective(scheduler: Any, args: TrainingArguments, timestep_scale: float = 1.0) -> Objective:
    return Objective(
        scheduler,
        timestep_scale,
        args.weighting_scheme,
        args.snr_gamma,
        args.logit_mean,
        args.logit_std,
        args.mode_scale,
    )


def learning_rates(args: TrainingArguments) -> Callable[[int], float]:
    """Step -> learning rate. The schedule is diffusers' and begins with the second stage."""
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    factor = get_scheduler(
        args.lr_scheduler,
        dummy,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(1, args.max_train_steps - args.layerwise_steps),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    ).lr_lambdas[0]
    first = args.layerwise_learning_rate or args.learning_rate

    def rate(step: int) -> float:
        return first if step < args.layerwise_steps else args.learning_rate * factor(step - args.layerwise_steps)

    return rate


class Log:
    """`log.jsonl`: one object a line, with its step. Also passes numbers on to the trackers.

    Args:
        path: of the file.
        accelerator: of the run; only its main process writes.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def start(self, step: int) -> None:
        """Drops lines after `step`, which a resumed run will write again, and one that a kill or a full disk cut."""
        if not self.accelerator.is_main_process:
            return
        lines = self.path.read_text().splitlines() if step and self.path.is_file() else []
        partial = self.path.with_suffix(PARTIAL)
        partial.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
        os.replace(partial, self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if not isinstance(value, str)}, step=step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def _plain(args: TrainingArguments) -> dict[str, Any]:
    """Options as trackers take them: numbers and strings."""
    values = vars(args).items()
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values if v is not None}
