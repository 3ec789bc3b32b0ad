"""Every flag of the training scripts changes what it says, or is refused; a flag without an entry here fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from gspn2_diffusion.training import TextToImageArguments, TrainingArguments, parse_args, report, train, trainer
from gspn2_diffusion.training.arguments import make_parser
from gspn2_diffusion.training.data import Rows
from gspn2_diffusion.training.encode import target_sizes
from gspn2_diffusion.training.report import write_report
from gspn2_diffusion.training.trainer import learning_rates, make_objective

from . import tiny_models
from .training_runs import SIZE, image_folder

ALWAYS = f"--resolution {SIZE} --train_batch_size 2 --max_train_steps 2 --logging_steps 1 --distance_steps 0"
TIMINGS = ("samples_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pipe (and its fp16 variant with other weights), pipe2, data, and a data set in Parquet files."""
    import datasets

    root = tmp_path_factory.mktemp("flags")
    for name, factor in (("pipe", 1.0), ("pipe2", 1.1)):
        pipe = tiny_models.sd_pipe()
        pipe.unet.conv_in.weight.data *= factor
        pipe.save_pretrained(root / name)
    pipe.save_pretrained(root / "pipe", variant="fp16")
    data = image_folder(root / "data", 6)
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for name, word in (("a", "first"), ("b", "second"), ("c", "third")):
        records = [
            {
                "image": {"bytes": (data / line["file_name"]).read_bytes(), "path": line["file_name"]},
                "other": {"bytes": (data / "0.png").read_bytes(), "path": "0.png"},
                "text": f"{word} {line['text']}",
                "long": f"a long caption of {line['text']}",
            }
            for line in lines
        ]
        (root / "set").mkdir(exist_ok=True)
        table = datasets.Dataset.from_list(records)
        table.cast_column("image", datasets.Image()).cast_column("other", datasets.Image()).to_parquet(
            root / "set" / f"{name}.parquet"
        )
    splits = "[{split: train, path: a.parquet}, {split: test, path: b.parquet}]"
    configs = f"[{{config_name: default, data_files: {splits}}}, {{config_name: more, data_files: c.parquet}}]"
    (root / "set" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    return root


@pytest.fixture(autouse=True)
def _light_and_clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without the report, which takes longer than the run and has tests of its own; accelerate's state reset."""
    monkeypatch.setattr(report, "write_report", lambda folder: folder)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


Look = Callable[[TrainingArguments, Path], Any]


def layers(args: TrainingArguments, root: Path) -> Any:
    return args.operator_config()


def rates(args: TrainingArguments, root: Path) -> Any:
    return [learning_rates(args)(step) for step in range(args.max_train_steps)]


def sizes(args: TrainingArguments, root: Path) -> Any:
    return [target_sizes(args, tiny_models.sd_pipe(), part.resolution) for part in args.parts()]


def rows(args: TrainingArguments, root: Path) -> Any:
    found = Rows(args, args.parts()[0].samples).read(0, 100)
    return [(row.caption, row.picture["bytes"] if isinstance(row.picture, dict) else row.picture) for row in found]


def timesteps(args: TrainingArguments, root: Path) -> Any:
    """Of a diffusion and of a flow-matching model."""
    generator = torch.Generator().manual_seed(0)
    schedulers = (DDPMScheduler(), FlowMatchEulerDiscreteScheduler())
    return [[make_objective(scheduler, args).draw(generator) for _ in range(20)] for scheduler in schedulers]


def run(args: TrainingArguments, root: Path) -> dict[str, Any]:
    """What a training leaves behind, but for what only repeats the options."""
    folder = train(args)
    assert folder is not None
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "weights": {name: t.tolist() for name, t in load_file(folder / "diffusion_pytorch_model.safetensors").items()},
        "log": [{key: value for key, value in line.items() if key not in TIMINGS} for line in log],
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "trackers": sorted(path.name for path in (folder / "logs").glob("*")),
        "pictures": {p.name: Image.open(p).tobytes() for p in (folder / "validation").glob("*.png")},
    }


def weights(args: TrainingArguments, root: Path) -> Any:
    return run(args, root)["weights"]


def log(args: TrainingArguments, root: Path) -> Any:
    return run(args, root)["log"]


def saved(args: TrainingArguments, root: Path) -> Any:
    return run(args, root)["checkpoints"]


def trackers(args: TrainingArguments, root: Path) -> Any:
    return run(args, root)["trackers"]


def pictures(args: TrainingArguments, root: Path) -> Any:
    return run(args, root)["pictures"]


def place(args: TrainingArguments, root: Path) -> Any:
    return train(args)


def passes(args: TrainingArguments, root: Path) -> Any:
    """Calls of a block of the model, recomputations included."""
    pipe, calls = tiny_models.sd_pipe(), []
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    train(args, pipe)
    return len(calls)


def cache(args: TrainingArguments, root: Path) -> Any:
    """What a fresh cache holds, and the encoder's calls."""
    pipe, calls = tiny_models.sd_pipe(), []
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    args.cache_dir = args.output_dir + "-cache"
    trained = train(args, pipe)
    shards = sorted(Path(args.cache_dir).glob("shard-*"))
    return trained is not None, len(shards), {str(t.dtype) for t in load_file(shards[0]).values()}, len(calls)


def workers(args: TrainingArguments, root: Path) -> Any:
    seen, loader = [], trainer.loader

    def noting(samples: Any, sampler: Any, number: int) -> Any:
        made = loader(samples, sampler, number)
        seen.append(made.num_workers)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loader", noting)
        train(args)
    return seen


def tf32(args: TrainingArguments, root: Path) -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        train(args)
        return torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def folder_of_cache(args: TrainingArguments, root: Path) -> Any:
    args.encode_only = True
    train(args)
    return sorted(p.name for p in root.glob("elsewhere/*"))


def options(args: TrainingArguments, root: Path) -> Any:
    return args


class Flag(NamedTuple):
    """What to look at, the flag with its value, and what both the run with it and the one without also have."""

    look: Look
    value: str
    both: str = ""


HUB = "--dataset_name ROOT/set"
DRAWING = "--validation_prompts a --validation_inference_steps 1 --validation_steps 1"
ROLLOUT = "--rollout_share 0.5"
TWO_SIZES = f"--resolution {SIZE} {2 * SIZE} --train_batch_size 4 --cache_dir OUT/cache"
FLAGS = {
    "pretrained_model_name_or_path": Flag(weights, "ROOT/pipe2", "--cache_dir OUT/cache"),
    "variant": Flag(weights, "fp16"),
    "adapter": Flag(weights, "ROOT/trained"),
    "init": Flag(layers, "random"),
    "proxy_dim": Flag(layers, "16"),
    "gates": Flag(layers, "shared"),
    "groups": Flag(layers, "2"),
    "normalizer": Flag(layers, "softmax"),
    "merge": Flag(layers, "sum"),
    "segment": Flag(layers, "3"),
    "decay": Flag(layers, ""),
    "layers": Flag(layers, "*mid*"),
    "min_side": Flag(layers, "4"),
    "control": Flag(layers, "none"),
    "train_data_dir": Flag(rows, "ROOT/data2"),
    "dataset_name": Flag(rows, "ROOT/set"),
    "dataset_config_name": Flag(rows, "more", HUB),
    "dataset_split": Flag(rows, "test", HUB),
    "data_files": Flag(rows, "ROOT/set/b.parquet", "--dataset_name parquet --data_files ROOT/set/a.parquet"),
    "image_column": Flag(rows, "other", HUB),
    "caption_column": Flag(rows, "long", HUB),
    "max_train_samples": Flag(rows, "3"),
    "resolution": Flag(sizes, "32"),
    "resolution_shares": Flag(weights, "1 2", TWO_SIZES),
    "resolution_strengths": Flag(weights, "1 0.3", TWO_SIZES),
    "aspect_ratio_buckets": Flag(sizes, "", "--resolution 512"),
    "bucket_step": Flag(sizes, "4", "--aspect_ratio_buckets"),
    "max_aspect_ratio": Flag(sizes, "1.2", "--aspect_ratio_buckets --bucket_step 4"),
    "proportion_empty_prompts": Flag(weights, "1"),
    "holdout_samples": Flag(log, "1"),
    "cache_dir": Flag(folder_of_cache, "ROOT/elsewhere"),
    "cache_dtype": Flag(cache, "float32", "--encode_only"),
    "cache_shard_size": Flag(cache, "2", "--encode_only"),
    "encode_batch_size": Flag(cache, "1", "--encode_only"),
    "encode_only": Flag(cache, ""),
    "output_dir": Flag(place, "ROOT/out"),
    "seed": Flag(weights, "1"),
    "train_batch_size": Flag(weights, "4"),
    "gradient_accumulation_steps": Flag(weights, "2"),
    "max_train_steps": Flag(log, "3"),
    "mixed_precision": Flag(weights, "bf16"),
    "gradient_checkpointing": Flag(passes, ""),
    "allow_tf32": Flag(tf32, ""),
    "dataloader_num_workers": Flag(workers, "1"),
    "noise_loss_weight": Flag(weights, "0"),
    "output_loss_weight": Flag(weights, "9"),
    "layer_loss_weight": Flag(weights, "9"),
    "layerwise_steps": Flag(log, "1"),
    "snr_gamma": Flag(weights, "5"),
    "weighting_scheme": Flag(timesteps, "logit_normal"),
    "logit_mean": Flag(timesteps, "-1", "--weighting_scheme logit_normal"),
    "logit_std": Flag(timesteps, "2", "--weighting_scheme logit_normal"),
    "mode_scale": Flag(timesteps, "0.5", "--weighting_scheme mode"),
    "guided_loss_weight": Flag(weights, "9", ROLLOUT),
    "rollout_share": Flag(weights, "0.5"),
    "rollout_guidance_scale": Flag(weights, "2", f"{ROLLOUT} --rollout_steps 4"),
    "rollout_steps": Flag(weights, "3", f"{ROLLOUT} --max_train_steps 3"),
    "rollout_stop": Flag(weights, "0.1", f"{ROLLOUT} --rollout_steps 4 --max_train_steps 3"),
    "learning_rate": Flag(rates, "1"),
    "layerwise_learning_rate": Flag(rates, "1", "--layerwise_steps 1"),
    "lr_scheduler": Flag(rates, "cosine"),
    "lr_warmup_steps": Flag(rates, "2", "--lr_scheduler constant_with_warmup"),
    "lr_num_cycles": Flag(rates, "3", "--lr_scheduler cosine_with_restarts --max_train_steps 9"),
    "lr_power": Flag(rates, "3", "--lr_scheduler polynomial"),
    "adam_beta1": Flag(weights, "0.1"),
    "adam_beta2": Flag(weights, "0.1"),
    "adam_weight_decay": Flag(weights, "9"),
    "adam_epsilon": Flag(weights, "1"),
    "max_grad_norm": Flag(weights, "1e-8"),
    "use_ema": Flag(weights, "", "--max_train_steps 4"),
    "ema_decay": Flag(weights, "0.05", "--use_ema --max_train_steps 4"),
    "checkpointing_steps": Flag(saved, "1"),
    "checkpoints_total_limit": Flag(saved, "1", "--checkpointing_steps 1"),
    "resume_from_checkpoint": Flag(weights, "ROOT/trained/checkpoint-2", "--max_train_steps 3 --learning_rate 1"),
    "distance_steps": Flag(log, "1"),
    "validation_prompts": Flag(pictures, "a b"),
    "validation_steps": Flag(pictures, "1", "--validation_prompts a --validation_inference_steps 1"),
    "validation_inference_steps": Flag(pictures, "2", "--validation_prompts a --validation_steps 2"),
    "validation_guidance_scale": Flag(pictures, "1", DRAWING),
    "logging_steps": Flag(log, "2"),
    "report_to": Flag(trackers, "tensorboard"),
    "tracker_project_name": Flag(trackers, "mine", "--report_to tensorboard"),
    "config": Flag(options, "ROOT/options.yaml"),
}
REFUSED = {
    "revision": ("--revision main", "--revision would have no effect: the model is a folder"),
    "tracker_project_name": (
        "--tracker_project_name a",
        "--tracker_project_name would have no effect: pass --report_to",
    ),
    "misspelt": ("--learning_rates 1", "unrecognized arguments: --learning_rates"),
    "abbreviated": ("--learning 1", "unrecognized arguments: --learning"),
}


def made(root: Path, out: Path, flags: str) -> TrainingArguments:
    """Options from the command line; a flag given twice has its last value."""
    out.mkdir(parents=True, exist_ok=True)
    whole = f"--pretrained_model_name_or_path ROOT/pipe --train_data_dir ROOT/data --output_dir OUT {ALWAYS} {flags}"
    if "--dataset_name" in flags:
        whole = whole.replace("--train_data_dir ROOT/data", "")
    if "--cache_dir" not in whole:
        whole += " --cache_dir ROOT/cache"
    words = whole.replace("ROOT", str(root)).replace("OUT", str(out)).split()
    return parse_args(argv=words)


def test_every_flag_of_both_scripts_has_an_entry() -> None:
    for kind in (TrainingArguments, TextToImageArguments):
        flags = {action.dest for action in make_parser(kind)._actions} - {"help"}
        assert flags == FLAGS.keys() | REFUSED.keys() & flags


@pytest.fixture(scope="module")
def seen() -> dict[tuple[Look, str], Any]:
    """What runs without the flag left: many flags are compared with the same one."""
    return {}


@pytest.mark.parametrize("name", FLAGS)
def test_flag_changes_what_it_says(name: str, root: Path, tmp_path: Path, seen: dict) -> None:
    look, value, both = FLAGS[name]
    _prepare(name, root)
    key = (run if look in (weights, log, saved, trackers, pictures) else look, both)
    if key not in seen:
        seen[key] = key[0](made(root, tmp_path / "without", both), root)
        AcceleratorState._reset_state(reset_partial_state=True)
    without = seen[key]
    if key[0] is run:
        aspects = {weights: "weights", log: "log", saved: "checkpoints", trackers: "trackers", pictures: "pictures"}
        without = without[aspects[look]]
    with_flag = look(made(root, tmp_path / "with", f"{both} --{name} {value}"), root)
    assert with_flag != without, f"--{name} {value} changes nothing"


def _prepare(name: str, root: Path) -> None:
    """What a flag's value names."""
    if name == "train_data_dir" and not (root / "data2").is_dir():
        image_folder(root / "data2", 3)
    if name in ("adapter", "resume_from_checkpoint") and not (root / "trained").is_dir():
        train(made(root, root / "trained", "--learning_rate 0.5"))
        AcceleratorState._reset_state(reset_partial_state=True)
    if name == "config":
        (root / "options.yaml").write_text("learning_rate: 0.25\n")


@pytest.mark.parametrize("name", REFUSED)
def test_flag_is_refused(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[name]
    with pytest.raises(SystemExit):
        made(root, tmp_path, flags)
    assert message in capsys.readouterr().err


def test_options_of_layers_reach_the_adapter(root: Path, tmp_path: Path) -> None:
    args = made(root, tmp_path / "out", "--proxy_dim 16 --gates shared --groups 2 --decay --layers *mid*")
    train(args)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = args.operator_config().to_dict()
    assert {name: config["operator"][name] for name in expected} == expected
    write_report(tmp_path / "out")
    assert "\ngroups: 2" in (tmp_path / "out" / "report.md").read_text()
    train(made(root, tmp_path / "next", f"--adapter {tmp_path / 'out'}"))
    write_report(tmp_path / "next")
    assert "\ngroups" not in (tmp_path / "next" / "report.md").read_text(), "the adapter's own, not the default"
