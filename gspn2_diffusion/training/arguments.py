"""The options of the training scripts: diffusers' flag names, in one dataclass that is checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from ..layers import GSPN2Config
from ..loading import SHIPPED, UserError


class TrainingError(UserError, ValueError):
    """Options, data or a model that cannot be trained with; the message states the fact and the remedy."""


@dataclass(frozen=True)
class Part:
    """One size of pictures of a run.

    Args:
        resolution: side in pixels; None is the model's own.
        samples: use only the first so many; None for all.
        share: of the steps.
        strength: highest noise level, as in image-to-image: share of the timesteps, from the picture.
        guidance_scale: of the student's own sampling.
        batch: samples in a forward pass of one process.
        encode_batch: samples encoded at a time.
    """

    resolution: int | None
    samples: int | None
    share: float
    strength: float
    guidance_scale: float
    batch: int
    encode_batch: int


class DivergedError(UserError, FloatingPointError):
    """The gradient stays NaN or infinite; the message states the remedies."""


# What new layers are made of; an adapter has its own.
LAYER_OPTIONS = (
    "init",
    "proxy_dim",
    "gates",
    "groups",
    "normalizer",
    "merge",
    "segment",
    "decay",
    "layers",
    "min_side",
    "control",
)
# Lists of one number for all of --resolution, or one for each.
SPREAD = ("max_train_samples", "rollout_guidance_scale")
ROLLOUT_GUIDANCE_SCALE = 5.0


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArguments:
    """Options shared by `examples/distill.py` and `examples/train_text_to_image.py`.

    Raises:
        ValueError: an option is out of its range, or two contradict one another; the message names them.
    """

    # Model
    pretrained_model_name_or_path: str | None = _help(
        "Pipeline to convert (required): a folder, a hub id, or tiny-scenes, the shipped one."
    )
    revision: str | None = _help("Revision of a hub model.")
    variant: str | None = _help("Variant of the weight files, such as fp16.")
    adapter: str | None = _help("Start from this trained adapter (folder or hub id) instead of new layers.")

    # New layers (GSPN2Config)
    init: Literal["teacher", "random"] = _help(
        "Start new layers from the attention they replace, or at random.", "teacher"
    )
    proxy_dim: str = _help("Width of the scan: channels (16) or a ratio of the layer's width (0.125).", "0.125")
    gates: Literal["per_direction", "shared"] = _help("Gates of each direction, or one pair for all.", "per_direction")
    groups: int = _help("Weight groups of the scan.", 1)
    normalizer: Literal["sigmoid", "softmax"] = _help("How the three taps' logits become weights.", "sigmoid")
    merge: Literal["concat", "sum"] = _help("How the directions are merged.", "concat")
    segment: int | None = _help("Restart the scan every so many lines; default: global scan.")
    decay: bool = _help("Let the scan's state decay by 1 - lam, so that it stays bounded.", False)
    layers: str | None = _help("Shell pattern of the self-attentions to replace; default: all.")
    min_side: int = _help("Replace only self-attentions whose map has at least so many tokens on its smaller side.", 0)
    control: Literal["none"] | None = _help(
        "'none': the control without token mixing. The same layers with the same parameters, but the scan restarts at "
        "every line (segment 1), so that no token sees another."
    )

    # Data
    train_data_dir: str | None = _help("Image folder with metadata.jsonl (file_name and a caption column).")
    dataset_name: str | None = _help("Dataset of the hub, or a builder such as webdataset with --data_files.")
    dataset_config_name: str | None = _help("Configuration of the dataset.")
    dataset_split: str = _help("Split of the dataset.", "train")
    data_files: list[str] | None = field(default=None, metadata={"help": "Files for the dataset builder."})
    image_column: str = _help("Column of the images.", "image")
    caption_column: str = _help("Column of the captions.", "text")
    max_train_samples: list[int] | None = field(
        default=None, metadata={"help": "Use only the first so many samples; one number, or one for each --resolution."}
    )
    resolution: list[int] | None = field(
        default=None,
        metadata={
            "help": "Side in pixels (with buckets: root of the area); of several, which may repeat, steps take turns. "
            "Default: the model's own."
        },
    )
    resolution_shares: list[float] | None = field(
        default=None, metadata={"help": "Share of the steps for each --resolution. Default: equal shares."}
    )
    resolution_strengths: list[float] | None = field(
        default=None,
        metadata={
            "help": "Highest noise level for each --resolution, as image-to-image's strength: only timesteps below it "
            "are drawn, and sampled states begin with the noised picture and go on to the end. Default: 1, from noise."
        },
    )
    aspect_ratio_buckets: bool = _help("Keep each image's aspect ratio, in buckets of equal area.", False)
    bucket_step: int = _help("Sides of buckets are multiples of this many pixels.", 64)
    max_aspect_ratio: float = _help("Widest bucket: longer side over shorter side.", 2.0)
    proportion_empty_prompts: float = _help("Share of samples trained with an empty caption.", 0.1)
    holdout_samples: int = _help("Samples kept out of training to measure the distance to the teacher.", 16)

    # Pre-encoding
    cache_dir: str | None = _help("Folder of the encoded latents and captions. Default: OUTPUT_DIR/cache.")
    cache_dtype: Literal["float16", "bfloat16", "float32"] = _help("Storage type of the cache.", "float16")
    cache_shard_size: int = _help("Samples in one file of the cache.", 1024)
    encode_batch_size: int = _help("Samples encoded at a time, at the first --resolution.", 16)
    encode_only: bool = _help("Write the cache and stop.", False)

    # Run
    output_dir: str = _help("Folder of the adapter, checkpoints, log and report.", "outputs/gspn2-adapter")
    seed: int = _help("Seed of the order, noise, timesteps and caption dropout.", 0)
    train_batch_size: int = _help(
        "Samples in a forward pass of one process, at the first --resolution; at others as many as have its pixels.", 16
    )
    gradient_accumulation_steps: int = _help("Forward passes per optimizer step.", 1)
    max_train_steps: int = _help("Optimizer steps.", 10000)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _help("Default: what accelerate was configured with.")
    gradient_checkpointing: bool = _help("Recompute activations in backward: less memory, more time.", False)
    allow_tf32: bool = _help("TensorFloat-32 matrix products on Ampere and later.", False)
    dataloader_num_workers: int = _help("Processes that read the cache.", 0)

    # Losses
    noise_loss_weight: float = _help("Weight of the loss against the true noise (or velocity).", 1.0)
    output_loss_weight: float = _help("Weight of the loss against the teacher's output.", 0.5)
    layer_loss_weight: float = _help("Weight of the mean loss against the outputs of the teacher's attentions.", 0.5)
    layerwise_steps: int = _help(
        "First stage, so many steps: each new layer learns its attention's output from the teacher's own input of that "
        "layer. Needs no backward pass through the model.",
        0,
    )
    snr_gamma: float | None = _help("Min-SNR weighting of the noise loss (arXiv 2303.09556); 5.0 is usual.")
    weighting_scheme: Literal["none", "logit_normal", "mode"] = _help(
        "Density of timesteps, as in diffusers' scripts; 'none' is uniform.", "none"
    )
    logit_mean: float = _help("Mean of logit_normal; below 0 prefers noisy samples.", 0.0)
    logit_std: float = _help("Standard deviation of logit_normal.", 1.0)
    mode_scale: float = _help("Scale of mode.", 1.29)

    # On-policy states
    guided_loss_weight: float = _help(
        "Weight of the loss against the teacher's guided output, over the squared guidance scale, in the states of "
        "--rollout_share.",
        1.0,
    )
    rollout_share: float = _help(
        "Share of the samples whose place is taken by states of the student's own guided sampling, one denoising step "
        "for each training step (each asks for a prediction with its caption and one without).",
        0.0,
    )
    rollout_guidance_scale: list[float] | None = field(
        default=None,
        metadata={
            "help": "Guidance of that sampling, 1 for none; one number or one for each --resolution. Default: 5."
        },
    )
    rollout_steps: int = _help("Denoising steps of that sampling.", 25)
    rollout_stop: float = _help("Share of them, from noise, after which another picture is begun.", 1.0)

    # Optimizer
    learning_rate: float = _help("Peak learning rate.", 1e-4)
    layerwise_learning_rate: float | None = _help("Learning rate of the first stage. Default: --learning_rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _help("Schedule of the learning rate.", "constant")
    lr_warmup_steps: int = _help("Steps of linear warm-up.", 0)
    lr_num_cycles: int = _help("Restarts of cosine_with_restarts.", 1)
    lr_power: float = _help("Power of polynomial.", 1.0)
    adam_beta1: float = _help("AdamW's beta1.", 0.9)
    adam_beta2: float = _help("AdamW's beta2.", 0.999)
    adam_weight_decay: float = _help("AdamW's weight decay.", 0.0)
    adam_epsilon: float = _help("AdamW's epsilon.", 1e-8)
    max_grad_norm: float = _help("Clip gradients to this norm.", 1.0)
    use_ema: bool = _help("Keep an exponential moving average of the weights, and save that as the adapter.", False)
    ema_decay: float = _help("Decay of the average.", 0.9999)

    # Checkpoints
    checkpointing_steps: int = _help("Steps between checkpoints.", 500)
    checkpoints_total_limit: int | None = _help("Keep only the newest so many checkpoints.")
    resume_from_checkpoint: str | None = _help("'latest', or a checkpoint's folder.")

    # Watching
    distance_steps: list[int] = field(
        default_factory=lambda: [0, 100, 1000],
        metadata={"help": "Steps at which to measure the distance to the teacher."},
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts drawn with the teacher and the student while training."}
    )
    validation_steps: int = _help("Steps between validations (pictures, and the distance to the teacher).", 500)
    validation_inference_steps: int = _help("Denoising steps of a validation picture.", 25)
    validation_guidance_scale: float = _help("Guidance of a validation picture.", 7.5)
    logging_steps: int = _help("Steps between lines of the log.", 10)
    report_to: Literal["tensorboard", "wandb"] | None = _help("Tracker. Default: log.jsonl only.")
    tracker_project_name: str = _help("Project name in the tracker.", "gspn2")

    def __post_init__(self) -> None:
        for name in ("resolution", *SPREAD):
            if isinstance(value := getattr(self, name), int | float):
                setattr(self, name, [value])
        if not self.pretrained_model_name_or_path:
            raise ValueError("--pretrained_model_name_or_path is missing; pass a pipeline's folder or hub id.")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("Pass exactly one of --train_data_dir and --dataset_name.")
        self._refuse_idle_flags()
        for name in ("noise_loss_weight", "output_loss_weight", "layer_loss_weight", "guided_loss_weight",
                     "layerwise_steps", "lr_warmup_steps", "holdout_samples", "adam_weight_decay",
                     "dataloader_num_workers"):  # fmt: skip
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "validation_steps", "logging_steps", "cache_shard_size", "encode_batch_size", "bucket_step",
                     "validation_inference_steps", "lr_num_cycles", "rollout_steps"):  # fmt: skip
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "lr_power", "logit_std", "rollout_stop"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("checkpoints_total_limit", "snr_gamma", "layerwise_learning_rate"):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        self._check_resolutions()
        for name in ("proportion_empty_prompts", "rollout_share", "rollout_stop"):
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        if self.rollout_share and not self.output_loss_weight + self.guided_loss_weight:
            raise ValueError(
                "--rollout_share needs --output_loss_weight or --guided_loss_weight above 0; no other loss is for "
                "these states."
            )
        for part in self.parts() if self.rollout_share else ():
            if not self.rollouts(part):
                where = f" ({part.batch} at {part.resolution} pixels)" if len(self.parts()) > 1 else ""
                raise ValueError(
                    f"--rollout_share {self.rollout_share} of --train_batch_size {self.train_batch_size}{where} is "
                    "less than one sample; raise either."
                )
        self._check("max_aspect_ratio", self.max_aspect_ratio >= 1, "at least 1")
        if not self.noise_loss_weight + self.output_loss_weight + self.layer_loss_weight:
            raise ValueError("All loss weights are 0; give at least one of them a positive value.")
        if self.adapter is None:
            self.operator_config()

    def _check(self, name: str, holds: bool, needs: str) -> None:
        if not holds:
            raise ValueError(f"--{name} is {getattr(self, name)}; it must be {needs}.")

    def _check_resolutions(self) -> None:
        """Lists that go with `--resolution` are as long and in their ranges."""
        count = len(self.resolution or [0])
        for name, most in (
            ("resolution", None),
            ("max_train_samples", None),
            ("resolution_shares", None),
            ("resolution_strengths", 1),
            ("rollout_guidance_scale", None),
        ):
            values = getattr(self, name)
            if values is None:
                continue
            self._check(name, bool(values) and all(value > 0 for value in values), "above 0")
            self._check(name, most is None or max(values) <= most, f"at most {most}")
            if len(values) != count and not (name in SPREAD and len(values) == 1):
                raise ValueError(f"--{name} has {len(values)} values for {count} of --resolution; give as many.")
        first: dict[int | None, Part] = {}
        for part in self.parts():
            if first.setdefault(part.resolution, part).samples != part.samples:
                raise ValueError(
                    f"--max_train_samples differs for the same --resolution {part.resolution}, which is encoded once; "
                    "give the same number."
                )

    def _refuse_idle_flags(self) -> None:
        """A flag that would have no effect beside the others is refused rather than ignored."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}

        def changed(*names: str) -> list[str]:
            return [f"--{name}" for name in names if getattr(self, name) != defaults[name]]

        for idle, names, remedy in (
            (self._is_folder(), ("revision",), "the model is a folder, not on the hub"),
            (self.adapter is not None, LAYER_OPTIONS, "--adapter brings its own options"),
            (self.control is not None, ("segment",), "--control none sets the segment"),
            (self.dataset_name is None, ("dataset_config_name", "dataset_split", "data_files", "image_column"),
             "only --dataset_name reads it"),
            (not self.aspect_ratio_buckets, ("bucket_step", "max_aspect_ratio"), "pass --aspect_ratio_buckets"),
            (not self.use_ema, ("ema_decay",), "pass --use_ema"),
            (not self.validation_prompts, ("validation_inference_steps", "validation_guidance_scale"),
             "pass --validation_prompts"),
            (not self.layerwise_steps, ("layerwise_learning_rate",), "pass --layerwise_steps"),
            (self.report_to is None, ("tracker_project_name",), "pass --report_to"),
            (self.lr_scheduler == "constant", ("lr_warmup_steps",), "use --lr_scheduler constant_with_warmup"),
            (self.lr_scheduler != "cosine_with_restarts", ("lr_num_cycles",),
             "use --lr_scheduler cosine_with_restarts"),
            (self.lr_scheduler != "polynomial", ("lr_power",), "use --lr_scheduler polynomial"),
            (not self.noise_loss_weight, ("snr_gamma",), "--noise_loss_weight is 0"),
            (self.weighting_scheme != "logit_normal", ("logit_mean", "logit_std"),
             "use --weighting_scheme logit_normal"),
            (len(self.resolution or []) < 2, ("resolution_shares",), "name several --resolution"),
            (not self.rollout_share,
             ("rollout_guidance_scale", "rollout_steps", "rollout_stop", "guided_loss_weight"), "pass --rollout_share"),
            (self.weighting_scheme != "mode", ("mode_scale",), "use --weighting_scheme mode"),
        ):  # fmt: skip
            if idle and (flags := changed(*names)):
                raise ValueError(f"{', '.join(flags)} would have no effect: {remedy}.")

    def _is_folder(self) -> bool:
        name = self.pretrained_model_name_or_path or ""
        return name == SHIPPED or Path(name).is_dir()

    def operator_config(self) -> GSPN2Config:
        """The options of new layers."""
        try:
            proxy_dim: float | int = float(self.proxy_dim) if "." in self.proxy_dim else int(self.proxy_dim)
        except ValueError as error:
            raise ValueError(f"--proxy_dim is {self.proxy_dim}; it must be a whole number or a ratio.") from error
        return GSPN2Config(
            proxy_dim=proxy_dim,
            gates=self.gates,
            groups=self.groups,
            normalizer=self.normalizer,
            merge=self.merge,
            segment=1 if self.control == "none" else self.segment,
            decay=self.decay,
            layers=self.layers,
            min_side=self.min_side,
            init=self.init,
        )

    def parts(self) -> list[Part]:
        """The sizes of pictures that steps take turns in, one for each `--resolution`."""
        sides: list[Any] = [None] if self.resolution is None else self.resolution
        samples: list[Any] = [None] if self.max_train_samples is None else self.max_train_samples

        def spread(values: list[Any]) -> list[Any]:
            return values * len(sides) if len(values) == 1 else values

        rows = zip(
            sides,
            spread(samples),
            self.resolution_shares or [1.0] * len(sides),
            self.resolution_strengths or [1.0] * len(sides),
            spread(self.rollout_guidance_scale or [ROLLOUT_GUIDANCE_SCALE]),
            strict=True,
        )
        parts = []
        for side, most, share, strength, guidance in rows:
            area = (sides[0] / side) ** 2 if side and sides[0] else 1.0
            batch, encode_batch = (max(1, round(n * area)) for n in (self.train_batch_size, self.encode_batch_size))
            parts.append(Part(side, most, share, strength, guidance, batch, encode_batch))
        return parts

    def rollouts(self, part: Part) -> int:
        """Samples of a batch whose place is taken by states of the student's sampling."""
        return round(self.rollout_share * part.batch)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


@dataclass
class TextToImageArguments(TrainingArguments):
    """`examples/train_text_to_image.py`: the noise loss alone, no teacher."""

    output_loss_weight: float = _help("Weight of the loss against the teacher's output; above 0 it distils.", 0.0)
    layer_loss_weight: float = _help("Weight of the loss against the outputs of the teacher's attentions.", 0.0)


def make_parser(kind: type[TrainingArguments] = TrainingArguments, prog: str | None = None) -> HfArgumentParser:
    """The parser of a training script's flags."""
    summary = (kind.__doc__ or "").partition("\n")[0]
    # argparse's own usage lists some 80 flags, above which an error's message would scroll away.
    usage = "%(prog)s --FLAG VALUE ... (--help lists them)"
    parser = HfArgumentParser(kind, prog=prog, usage=usage, description=summary, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file of flags.")
    return parser


def parse_args(
    kind: type[TrainingArguments] = TrainingArguments, argv: list[str] | None = None, prog: str | None = None
) -> TrainingArguments:
    """Command line -> options. `--config FILE.yaml` holds any of the flags; those on the command line win.

    A flag or key that does not exist, or an abbreviation of one that does, ends the program with a message.
    """
    parser = make_parser(kind, prog)
    first, _ = parser.parse_known_args(argv)
    if first.config:
        try:
            values = yaml.safe_load(Path(first.config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {first.config} cannot be read: {error}")
        known = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            parser.error(
                f"--config {first.config} has unknown keys {unknown if isinstance(values, dict) else values!r}."
            )
        # As if typed before the command line, so that types and choices are checked the same way.
        typed = [part for key, value in values.items() for part in _as_flags(key, value)]
        argv = typed + (sys.argv[1:] if argv is None else argv)
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    try:
        return kind(**namespace)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def _as_flags(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *(str(item) for item in values)]
