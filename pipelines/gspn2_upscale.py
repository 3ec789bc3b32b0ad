"""Large pictures in stages: text to image at the model's own size, then image to image at twice the size, again and
again. Load it with `DiffusionPipeline.from_pretrained(model, custom_pipeline="gspn2_upscale.py")`, or put it around a
pipeline that is there already with `GSPN2UpscalePipeline.from_pipe(pipe)`.

The denoising is the stock pipelines' own. Starting each stage from the one before and noising it only a little
(SDEdit, arXiv 2108.01073) keeps the composition of the size that the model was trained at.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.utils import BaseOutput, logging
from PIL import Image, PngImagePlugin

from gspn2_diffusion.memory import SWITCHES, active_switches, available_switches, memory_switches

logger = logging.get_logger(__name__)

STRENGTHS = (0.32, 0.24, 0.16, 0.08)
LARGEST_BASE = 1.6  # times the area that the model was trained for; of more, a quarter is nearer
VAE_TILING_ABOVE = 2048 * 2048
PNG_LEVEL = 1  # smooth pictures are written almost twice as fast as at the default level, and a tenth larger
STATE = "state.json"
# Set by this pipeline for each stage.
OWN_ARGUMENTS = {
    "self", "prompt", "image", "height", "width", "strength", "num_inference_steps", "generator", "latents",
    "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end", "kwargs",
}  # fmt: skip


@dataclass
class GSPN2UpscaleOutput(BaseOutput):
    """Result of `GSPN2UpscalePipeline`.

    Args:
        images: the final picture, in a list as everywhere in diffusers.
        stages: the picture after each stage, the final one included.
    """

    images: list[Image.Image]
    stages: list[Image.Image]


class GSPN2UpscalePipeline(DiffusionPipeline):
    """Text to a large picture, by driving the stock text-to-image and image-to-image pipelines of one model.

    Takes every model for which diffusers has both. Components are shared, so a patched UNet or transformer is patched
    in each stage, and offloading, LoRA and `memory_switches` work as on any pipeline.
    """

    _optional_components: ClassVar[list[str]] = [
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
        "unet", "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
    ]  # fmt: skip

    def __init__(
        self,
        vae: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        unet: Any = None,
        transformer: Any = None,
        scheduler: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__()
        given = dict(locals())
        components = {name: given[name] for name in self._optional_components}
        self.register_modules(**components)
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._text2img = self._stock_pipeline({k: v for k, v in components.items() if v is not None})
        self._derive()

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        # Every type may come. diffusers 0.35 fails on annotations that are strings or unions.
        return dict.fromkeys(inspect.signature(cls.__init__).parameters, (inspect.Signature.empty,))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> GSPN2UpscalePipeline:
        """Puts the upscaling around a stock text-to-image pipeline; all components are shared, none is copied or cast.

        Args:
            pipeline: any pipeline for which `AutoPipelineForImage2Image.from_pipe` knows the other half.

        Raises:
            ValueError: diffusers has no image-to-image pipeline for it.
            TypeError: other arguments; set them on `pipeline`.
        """
        if kwargs:
            raise TypeError(f"from_pipe got {', '.join(kwargs)}; set it on the stock pipeline before.")
        new = cls.__new__(cls)
        DiffusionPipeline.__init__(new)
        new.register_modules(**{name: getattr(pipeline, name, None) for name in cls._optional_components})
        new.register_to_config(**{k: v for k, v in pipeline.config.items() if k not in pipeline.components})
        new._text2img = pipeline
        new._derive()
        return new

    def _derive(self) -> None:
        stock = self._text2img
        try:
            self._img2img = AutoPipelineForImage2Image.from_pipe(stock)
        except ValueError as error:
            raise ValueError(
                f"diffusers has no image-to-image pipeline for {type(stock).__name__}, which the larger stages need; "
                "use a model that has one, such as Stable Diffusion, SDXL, SD3 or Flux."
            ) from error
        self.model_cpu_offload_seq = stock.model_cpu_offload_seq
        self._exclude_from_cpu_offload = stock._exclude_from_cpu_offload

    def _stock_pipeline(self, components: dict[str, Any]) -> DiffusionPipeline:
        """The stock text-to-image pipeline that these components belong to, found by their names and types."""
        for name, stock in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
            if name not in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING:
                continue
            modules, options = stock._get_signature_keys(stock)
            # SD3 runs, and is saved, without T5 too, though diffusers does not call it optional.
            required = set(modules) - set(stock._optional_components) - {"text_encoder_3", "tokenizer_3"}
            types = stock._get_signature_types()
            models = [
                n for n, c in components.items() if isinstance(c, torch.nn.Module) and n in ("unet", "transformer")
            ]
            if (
                required <= set(components) <= set(modules)
                and models
                and all(inspect.Signature.empty in types[n] or type(components[n]) in types[n] for n in models)
            ):
                given = {key: self.config[key] for key in options if self.config.get(key) is not None}
                return stock(**{module: components.get(module) for module in modules}, **given)
        raise ValueError(
            f"No stock pipeline with both text-to-image and image-to-image takes {', '.join(sorted(components))}; "
            "load the stock pipeline yourself and use GSPN2UpscalePipeline.from_pipe."
        )

    @property
    def stock_pipelines(self) -> tuple[DiffusionPipeline, DiffusionPipeline]:
        """The text-to-image and the image-to-image pipeline that do the work."""
        return self._text2img, self._img2img

    @property
    def size_multiple(self) -> int:
        """What every picture's sides must be divisible by."""
        # The stock pipelines ask for 8, and for whole patches of latents in transformers.
        factor = getattr(self._text2img, "vae_scale_factor", 8)
        return math.lcm(8, factor) if self.unet is not None else math.lcm(16, 2 * factor)

    @property
    def native_size(self) -> int:
        """Side of the square pictures that the model was trained on."""
        default = getattr(self._text2img, "default_sample_size", None)
        if default is None:
            sample = (self.unet or self.transformer).config.sample_size
            default = sample if isinstance(sample, int) else max(sample)
        return default * getattr(self._text2img, "vae_scale_factor", 8)

    def stage_sizes(self, height: int, width: int, base_size: int | None = None) -> list[tuple[int, int]]:
        """(height, width) of each stage, each side about twice the one before; the first has 0.4 to 1.6 times
        `base_size`'s area (less for pictures that are smaller), near to what the model was trained for.

        Raises:
            ValueError: a side is not a positive multiple of `size_multiple`.
        """
        return stage_sizes(height, width, base_size or self.native_size, self.size_multiple)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        *,
        num_inference_steps: int = 50,
        strengths: Sequence[float] = STRENGTHS,
        guidance_scales: Sequence[float] | None = None,
        base_size: int | None = None,
        generator: torch.Generator | None = None,
        folder: str | os.PathLike[str] | None = None,
        vae_tiling: bool | None = None,
        callback_on_stage_end: Callable[[int, int, Image.Image], None] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        **stock_arguments: Any,
    ) -> GSPN2UpscaleOutput:
        """One picture of any size and aspect ratio.

        Args:
            prompt: what to draw.
            height, width: sides of the final picture in pixels; the model's own size by default.
            num_inference_steps: steps of a full denoising; a stage of strength s runs about s times as many.
            strengths: how much noise each stage after the first starts from, 0 to 1; the last one serves for all that
                follow. The default is what LinFusion uses for SDXL at 2K, 4K, 8K and 16K.
            guidance_scales: guidance of each stage after the first, likewise; None keeps `guidance_scale` in all of
                them. Without guidance (1, in models that guide by a second prediction) a stage takes half the time.
            base_size: side of the square whose area the first stage is near to; the model's own by default.
            generator: draws one seed for each stage; None draws them from torch's global generator.
            folder: keeps each finished stage (PNG) and the state (JSON) there. Called again with the same arguments,
                the pipeline goes on after the last finished stage and makes the same final picture.
            vae_tiling: None tiles the VAE in stages above 2048 x 2048 pixels.
            callback_on_stage_end: called with (stage, number of stages, picture) after each stage.
            callback_on_step_end: diffusers' own, passed to each stage.
            **stock_arguments: passed to those of the two stock pipelines that know them, such as `negative_prompt`,
                `guidance_scale`, `prompt_2`, `ip_adapter_image`.

        Raises:
            ValueError: a size, strength or number of steps that cannot work, or a folder that holds another picture.
            TypeError: an argument that neither stock pipeline has.
            InterruptedError: a callback set `interrupt`; finished stages are in the folder.
            torch.OutOfMemoryError: with the switches that would have helped.
        """
        height, width = height or self.native_size, width or self.native_size
        sizes = self.stage_sizes(height, width, base_size)
        if not strengths or not all(0 < strength <= 1 for strength in strengths):
            raise ValueError(f"strengths is {tuple(strengths)}; pass numbers above 0 and at most 1.")
        if guidance_scales is not None and not (guidance_scales and all(0 <= g < math.inf for g in guidance_scales)):
            raise ValueError(f"guidance_scales is {tuple(guidance_scales)}; pass numbers of at least 0, or None.")
        if guidance_scales is not None and "guidance_scale" not in _parameters(self._img2img):
            raise TypeError(f"{type(self._img2img).__name__} has no guidance_scale; leave guidance_scales out.")
        stage_strengths = [1.0, *for_stages(strengths, len(sizes) - 1)]
        stage_guidance = for_stages(guidance_scales, len(sizes) - 1) if guidance_scales is not None else None
        self._check_call(prompt, stage_strengths, num_inference_steps, stock_arguments)
        # More bits would not survive JSON readers that keep numbers as doubles.
        seeds = torch.randint(2**53, (len(sizes),), generator=generator, device=_device_of(generator)).tolist()
        request = {
            "pipeline": type(self._text2img).__name__,
            "model": str(self._text2img.config.get("_name_or_path")),
            "parameters": sum(p.numel() for p in (self.unet or self.transformer).parameters()),
            "scheduler": type(self.scheduler).__name__,
            "prompt": prompt,
            "sizes": [list(size) for size in sizes],
            "strengths": stage_strengths,
            "guidance_scales": stage_guidance,
            "num_inference_steps": num_inference_steps,
            "vae_tiling": vae_tiling,
            "arguments": {name: _describe(value) for name, value in sorted(stock_arguments.items())},
        }
        store = _StageFolder(folder, request, seeds, keep_seeds=generator is None) if folder is not None else None
        seeds = store.seeds if store else seeds
        images = store.load() if store else []
        if images:
            logger.info("Going on after stage %d of %d.", len(images), len(sizes))

        steps = [max(1, min(num_inference_steps, int(num_inference_steps * s))) for s in stage_strengths]
        with self.progress_bar(total=sum(steps)) as bar:
            bar.update(sum(steps[: len(images)]))
            for stage in range(len(images), len(sizes)):
                bar.set_description(f"stage {stage + 1}/{len(sizes)} {sizes[stage][1]} x {sizes[stage][0]}")
                arguments = dict(
                    stock_arguments,
                    prompt=prompt,
                    num_inference_steps=num_inference_steps,
                    # On the host, so that the noise does not depend on the device.
                    generator=torch.Generator().manual_seed(seeds[stage]),
                    callback_on_step_end=_Progress(bar, steps[stage], callback_on_step_end),
                )
                if stage:
                    larger = images[-1].resize((sizes[stage][1], sizes[stage][0]), Image.Resampling.LANCZOS)
                    arguments.update(image=larger, strength=stage_strengths[stage])
                    if stage_guidance is not None:
                        arguments["guidance_scale"] = stage_guidance[stage - 1]
                image = self._run_stage(stage, sizes[stage], arguments, vae_tiling)
                bar.update(sum(steps[: stage + 1]) - bar.n)
                if store:
                    store.save(image)
                images.append(image)
                if callback_on_stage_end is not None:
                    callback_on_stage_end(stage, len(sizes), image)
        return GSPN2UpscaleOutput(images=[images[-1]], stages=images)

    def _check_call(
        self, prompt: Any, strengths: Sequence[float], num_inference_steps: Any, arguments: dict[str, Any]
    ) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is a {type(prompt).__name__}; pass one string and call again for more pictures.")
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; pass at least 1.")
        if int(min(strengths) * num_inference_steps) < 1:
            raise ValueError(
                f"strength {min(strengths)} of {num_inference_steps} steps is less than one step; "
                f"use at least {math.ceil(1 / min(strengths))} steps or a larger strength."
            )
        known = _parameters(self._text2img) | _parameters(self._img2img)
        if unknown := sorted(set(arguments) - (known - OWN_ARGUMENTS)):
            raise TypeError(
                f"{', '.join(unknown)} is no argument of {type(self._text2img).__name__}, "
                f"{type(self._img2img).__name__} or this pipeline; check the spelling."
            )

    def _run_stage(
        self, stage: int, size: tuple[int, int], arguments: dict[str, Any], vae_tiling: bool | None
    ) -> Image.Image:
        stock = self._img2img if stage else self._text2img
        known = _parameters(stock)
        arguments = {name: value for name, value in arguments.items() if name in known}
        if "height" in known:
            arguments.update(height=size[0], width=size[1])
        wanted = math.prod(size) > VAE_TILING_ABOVE if vae_tiling is None else vae_tiling
        tiling = wanted and "vae_tiling" in available_switches(self)
        with _quiet(stock), memory_switches(self, vae_tiling=tiling):
            try:
                image = stock(**arguments).images[0]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                message = self._out_of_memory(stock, stage, size, error)
                raise torch.OutOfMemoryError(message) from error
            finally:
                self.maybe_free_model_hooks()
        if getattr(stock, "interrupt", False):
            raise InterruptedError(f"Stopped in stage {stage + 1}; call again with the same folder to go on.")
        return image

    def _out_of_memory(self, stock: Any, stage: int, size: tuple[int, int], error: BaseException) -> str:
        in_vae = any(owner is self.vae for owner in _owners(error.__traceback__))
        off = [name for name in available_switches(self) if name not in active_switches(self)]
        helpful = [name for name in off if (name == "vae_tiling") == in_vae]
        needs = "" if in_vae else self._needs(stock, size)
        remedies = [f"{name} ({SWITCHES[name]})" for name in helpful]
        if not getattr(self, "_all_hooks", None):
            remedies.append("enable_model_cpu_offload()")
        advice = needs or (f"turn on {', or '.join(remedies)}" if remedies else "make a smaller picture")
        where = "the VAE" if in_vae else "the denoiser"
        return f"Out of memory in {where} at {size[1]} x {size[0]} (stage {stage + 1}); {advice}. ({error})"

    def _needs(self, stock: Any, size: tuple[int, int]) -> str:
        """Which switches the plan says would have helped; nothing where it cannot say."""
        from gspn2_diffusion.plan import rescue

        try:
            found = rescue(self, *size, guidance=getattr(stock, "do_classifier_free_guidance", True))
        except Exception as problem:  # in an error's message, whatever goes wrong must not hide that error
            logger.debug("No plan for the error's message: %s", problem)
            return ""
        before, after, limit = (f"{count / 2**30:.3g}" for count in (found.before, found.after, found.limit))
        names = " and ".join(f"{name} ({SWITCHES[name]})" for name in found.switches)
        if not names and found.before <= found.limit:
            return ""
        if not names:
            return f"it needs about {before} of {limit} GiB and no further switch would help: make a smaller picture"
        enough = "" if found.after <= found.limit else ", which is still too much: make a smaller picture too"
        return f"turn on {names}: it would need about {after} GiB instead of {before}, of {limit}{enough}"


def stage_sizes(height: int, width: int, base_size: int, multiple: int) -> list[tuple[int, int]]:
    """As `GSPN2UpscalePipeline.stage_sizes`, for a model whose sides are multiples of `multiple`."""
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or side < multiple or side % multiple:
            nearest = max(multiple, round(side / multiple) * multiple)
            raise ValueError(f"{name} is {side}; this model needs a multiple of {multiple}, such as {nearest}.")
    sizes = [(height, width)]
    while math.prod(sizes[0]) > base_size**2 * LARGEST_BASE and min(sizes[0]) > multiple:
        sizes.insert(0, tuple(math.ceil(side / 2 / multiple) * multiple for side in sizes[0]))  # type: ignore[arg-type]
    return sizes


class _Progress:
    """Step callback of a stage: moves the bar, then calls the user's."""

    def __init__(self, bar: Any, steps: int, callback: Callable[..., Any] | None) -> None:
        self.bar, self.left, self.callback = bar, steps, callback
        # diffusers reads which tensors to hand over from a callback object.
        self.tensor_inputs = getattr(callback, "tensor_inputs", ["latents"])

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.left:
            self.left -= 1
            self.bar.update()
        result = self.callback(pipe, step, timestep, tensors) if self.callback is not None else None
        return tensors if result is None else result


class _StageFolder:
    """Seeds and finished stages on disk: `stage_1_1024x576.png`, ... and `state.json`, each written whole or not."""

    def __init__(
        self, folder: str | os.PathLike[str], request: dict[str, Any], seeds: list[int], keep_seeds: bool
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"version": 1, "request": request, "seeds": seeds, "stages": []}
        path = self.folder / STATE
        if not path.is_file():
            self.write()
            return
        try:
            found = json.loads(path.read_text())
            before, stages, kept = found["request"], found["stages"], found["seeds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to start again.") from error
        differing = [name for name in request if before.get(name) != request[name]]
        if kept != seeds and not keep_seeds:
            differing.append("the generator's seed")
        if differing:
            raise ValueError(
                f"{self.folder} holds another picture ({', '.join(differing)} differs); "
                "use another folder, or the same arguments to go on."
            )
        self.state.update(seeds=kept, stages=stages)

    @property
    def seeds(self) -> list[int]:
        return self.state["seeds"]

    def load(self) -> list[Image.Image]:
        """The finished stages, up to the first whose file is not what was written."""
        images: list[Image.Image] = []
        for entry in self.state["stages"]:
            path = self.folder / entry["file"]
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                logger.warning("%s is missing or changed; going on from the stage before it.", path)
                break
            # Image.open refuses more than 179 million pixels, and 16K has 268 million.
            with PngImagePlugin.PngImageFile(path) as image:
                image.load()
                images.append(image.copy())
        self.state["stages"] = self.state["stages"][: len(images)]
        return images

    def save(self, image: Image.Image) -> None:
        number = len(self.state["stages"]) + 1
        name = f"stage_{number}_{image.width}x{image.height}.png"
        with _replacing(self.folder / name) as temporary:
            image.save(temporary, format="PNG", compress_level=PNG_LEVEL)
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        self.state["stages"].append({"file": name, "sha256": digest})
        self.write()

    def write(self) -> None:
        with _replacing(self.folder / STATE) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that takes `path`'s place once it is on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the stock pipeline's own bar inside ours."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def for_stages(values: Sequence[float], count: int) -> list[float]:
    """One for each of `count` stages; the last one serves for all that follow."""
    return [float(values[min(i, len(values) - 1)]) for i in range(count)]


def _parameters(pipe: Any) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters)


def _device_of(generator: torch.Generator | None) -> torch.device | None:
    return generator.device if generator is not None else None


def _describe(value: Any) -> Any:
    """A JSON value that differs when the argument does."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return type(value).__name__


def _owners(traceback: TracebackType | None) -> Iterator[Any]:
    """The `self` of each frame of a traceback."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals.get("self")
        traceback = traceback.tb_next
