"""Whole training runs on a tiny pipeline: they learn, resume to the bit, and agree however a step is split."""

from __future__ import annotations

import json
import random
import resource
import runpy
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from gspn2_diffusion import GSPN2Adapter, apply_gspn2
from gspn2_diffusion.loading import UserError, ending_in_a_sentence
from gspn2_diffusion.training import train
from gspn2_diffusion.training.checkpoint import CheckpointError, checkpoints
from gspn2_diffusion.training.encode import Conditioner, EncodedDataset
from gspn2_diffusion.training.objective import Objective
from gspn2_diffusion.training.report import plot_distances
from gspn2_diffusion.training.sampling import held_out, without_rows
from gspn2_diffusion.training.student import StudentStep

from . import tiny_models
from .test_upscale import sd3_pipe
from .tiny_families import CASES
from .training_runs import SIZE, arguments, free_port, image_folder, log_of, start_child

WEIGHTS = "diffusion_pytorch_model.safetensors"
ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"
BINNING = {"pixart": {"use_resolution_binning": False}}
# One step whose change of the weights is the gradient: Adam with epsilon 1 moves by g / (|g| + 1).
GRADIENT = {
    "max_train_steps": 1,
    "learning_rate": 1.0,
    "adam_epsilon": 1.0,
    "max_grad_norm": 1e9,
    "proportion_empty_prompts": 0.5,
    "distance_steps": [],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline and an image folder."""
    root = tmp_path_factory.mktemp("training")
    tiny_models.sd_pipe().save_pretrained(root / "pipe")
    return root / "pipe", image_folder(root / "data")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS)


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_distillation_brings_the_student_to_the_teacher(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = arguments(
        *folders,
        out,
        layerwise_steps=20,
        max_train_steps=30,
        learning_rate=3e-3,
        distance_steps=[0, 20],
        use_ema=True,
        ema_decay=0.9,
        validation_prompts=["a", "b"],
        validation_inference_steps=1,
        checkpointing_steps=10,
        checkpoints_total_limit=2,
        report_to="tensorboard",
    )
    train(args)
    log = log_of(out)
    distances = {line["step"]: line for line in log if "distance" in line}
    assert list(distances) == [0, 20, 30]
    assert distances[20]["layer_distance"] < 0.7 * distances[0]["layer_distance"]
    assert distances[30]["distance"] < 0.7 * distances[0]["distance"]
    stages = {line["step"]: line["stage"] for line in log if "stage" in line}
    assert stages[20] == "layerwise" and stages[21] == "end to end"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-20", "checkpoint-30"]

    adapter = GSPN2Adapter.from_pretrained(out)
    apply_gspn2(tiny_models.sd_pipe(), adapter)
    last = GSPN2Adapter.from_pretrained(out / "checkpoint-30" / "adapter")
    assert any(not torch.equal(a, b) for a, b in zip(adapter.parameters(), last.parameters(), strict=True)), (
        "no average"
    )

    report = (out / "report.md").read_text()
    assert "| 20 |" in report and "learning_rate: 0.003" in report
    for picture in ("report.png", "validation.png", "validation/teacher.png", "validation/step-000030.png"):
        assert (out / picture).is_file(), picture
    assert list((out / "logs").rglob("events.out.tfevents*"))
    plot_distances([out, out], tmp_path / "distances.png")
    assert (tmp_path / "distances.png").stat().st_size > 0


def test_killed_runs_resume_to_the_bit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    options: dict[str, Any] = {"max_train_steps": 12, "checkpointing_steps": 1, "use_ema": True, "distance_steps": []}
    options |= {"rollout_share": 0.5, "rollout_steps": 4}
    whole = start_child(arguments(*folders, tmp_path / "whole", **options))
    out, args = tmp_path / "killed", None
    for kill in sorted(moments.sample(range(2, 11), 3)):
        args = arguments(*folders, out, **options, resume_from_checkpoint="latest")
        child = start_child(args)
        while last_step(out) < kill:
            time.sleep(0.002)
            assert child.is_alive(), "the run ended before it was killed"
        time.sleep(moments.random() * 0.05)
        child.kill()
        child.join()
    assert args is not None
    child = start_child(args)
    child.join()
    whole.join()
    assert child.exitcode == 0 and whole.exitcode == 0
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    steps = [line["step"] for line in log_of(out) if "loss" in line]
    assert steps == list(range(1, 13))


def test_several_sizes_take_turns_and_resume_to_the_bit(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "resolution": [SIZE, 2 * SIZE, SIZE],
        "resolution_shares": [0.5, 0.25, 0.25],
        "resolution_strengths": [1.0, 0.5, 0.3],
        "max_train_samples": [12, 8, 12],
        "train_batch_size": 8,
        "max_train_steps": 8,
        "rollout_share": 0.5,
        "rollout_steps": 5,
        "rollout_guidance_scale": [4.0, 1.0, 2.0],
        "checkpointing_steps": 5,
        "holdout_samples": 4,
        "distance_steps": [0],
        "use_ema": True,
        "cache_dir": str(tmp_path / "cache"),
    }
    seen: list[tuple[int, str, int, bool]] = []
    forward = StudentStep.forward

    def watched(self: Any, **batch: Any) -> Any:
        if not batch.get("measure"):
            part, noise = batch["part"], int(batch["indices"].max()) / self.objective.steps
            below = noise < options["resolution_strengths"][part]
            assert self.rollouts[part].guidance_scale == options["rollout_guidance_scale"][part]
            seen.append((part, batch["size"], len(batch["latents"]), below))
        return forward(self, **batch)

    monkeypatch.setattr(StudentStep, "forward", watched)
    train(arguments(*folders, tmp_path / "whole", **options))
    small, large = f"{SIZE}x{SIZE}", f"{2 * SIZE}x{2 * SIZE}"
    assert seen == 2 * [(0, small, 8, True), (1, large, 2, True), (2, small, 8, True), (0, small, 8, True)]
    first = log_of(tmp_path / "whole")[0]
    assert {"distance", "distance_32@0.5", "distance_16@0.3"} < first.keys()

    checkpoint = tmp_path / "whole" / "checkpoint-5"
    train(arguments(*folders, tmp_path / "resumed", **options, resume_from_checkpoint=str(checkpoint)))
    assert len(seen) == 8 + 3
    assert (tmp_path / "resumed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()

    # A picture held out at one size is held out at all.
    base, other = (EncodedDataset(tmp_path / "cache" / str(side)) for side in (SIZE, 2 * SIZE))
    _, out = held_out(base, 4, 0)
    rows = [base.rows[index] for index in out]
    kept, hidden = without_rows(other, rows)
    assert {other.rows[index] for index in kept} == set(range(8)) - set(rows)
    text = "encoder_hidden_states"
    for index in hidden:
        same = out[rows.index(other.rows[index])]
        assert torch.equal(other[index][text], base[same][text])


def last_step(out: Path) -> int:
    """The last whole line's step of a log that another process is writing."""
    path = out / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_a_full_disk_stops_the_run_and_loses_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(arguments(*folders, out, max_train_steps=2, distance_steps=[]))
    before = {path: path.read_bytes() for path in (out / "checkpoint-2").rglob("*") if path.is_file()}
    # Half a checkpoint and half a line, as a kill leaves them, are not taken for whole ones.
    (out / "checkpoint-3.partial").mkdir()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    more = arguments(*folders, out, max_train_steps=4, distance_steps=[], resume_from_checkpoint="latest")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 is intact.*Free some space"):
            train(more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(out) == [out / "checkpoint-2"]
    assert all(path.read_bytes() == content for path, content in before.items())
    train(more)
    assert checkpoints(out)[-1].name == "checkpoint-4"
    assert [line["step"] for line in log_of(out) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["distill", "train_text_to_image"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pretrained_model_name_or_path", "/no/such/dir"], "there is no such folder; check the path"),
        (["--pretrained_model_name_or_path", "no-such"], "no such folder and no such download; check the name"),
        (["--adapter", "./nowhere"], "The adapter could not be applied: there is no such folder"),
        (["--layers", "*nothing*"], "selects none of the 7 self-attentions"),
        (["--train_data_dir", "/no/such/dir"], "has no metadata.jsonl; write one line"),
        (["--resume_from_checkpoint", "checkpoint-9"], "is not a whole checkpoint"),
        (["--output_dir", "/dev/null/folder"], "cannot be written to"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_scripts_end_in_a_sentence(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipe, data = map(str, folders)
    given = ["--pretrained_model_name_or_path", pipe, "--train_data_dir", data, "--output_dir", str(tmp_path)]
    given += ["--cache_dir", f"{data}-cache", "--resolution", str(SIZE)]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *given, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ACCELERATE.parent / f"{name}.py"), run_name="__main__")
    # Printed by Python as the last line, with exit status 1.
    assert str(ended.value.code).startswith(f"{name}.py: ") and message in str(ended.value.code)


def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), ending_in_a_sentence():
        raise ZeroDivisionError


def test_resuming_what_is_not_there_or_not_ours(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(arguments(*folders, out, distance_steps=[], resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        train(arguments(*folders, out, resume_from_checkpoint="checkpoint-99"))
    with pytest.raises(CheckpointError, match="other layers"):
        train(arguments(*folders, out, resume_from_checkpoint="latest", groups=2))
    with pytest.raises(CheckpointError, match="without --use_ema"):
        train(arguments(*folders, out, resume_from_checkpoint="latest", use_ema=True))


def test_a_step_is_the_same_however_it_is_split(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train(arguments(*folders, tmp_path / "one", **GRADIENT, train_batch_size=4))
    start = weights(tmp_path / "one")
    ddp = arguments(*folders, tmp_path / "two", **GRADIENT, train_batch_size=2)
    port = free_port()
    ranks = [start_child(ddp, rank, 2, port) for rank in range(2)]
    train(arguments(*folders, tmp_path / "accumulated", **GRADIENT, train_batch_size=1, gradient_accumulation_steps=4))
    train(arguments(*folders, tmp_path / "recomputed", **GRADIENT, train_batch_size=4, gradient_checkpointing=True))
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    for other in ("two", "accumulated", "recomputed"):
        assert_near(weights(tmp_path / other), start)


def test_fsdp_trains_and_saves_the_same_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """FSDP2 on two processes: the gradient and the files of one process, which can go on from the checkpoint."""
    port = free_port()
    sharded = arguments(*folders, tmp_path / "sharded", **GRADIENT, train_batch_size=2, use_ema=True)
    ranks = [start_child(sharded, rank, 2, port, backend="fsdp2") for rank in range(2)]
    options = {**GRADIENT, "train_batch_size": 4, "use_ema": True}
    train(arguments(*folders, tmp_path / "one", **options))
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert_near(weights(tmp_path / "sharded"), weights(tmp_path / "one"))
    for name in ("sharded", "one"):
        more = {**options, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
        train(arguments(*folders, tmp_path / name, **more))
    assert_near(weights(tmp_path / "sharded"), weights(tmp_path / "one"))


def test_deepspeed_trains_and_saves_the_same_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """ZeRO-2 on two processes: the gradient, the clipping and the files of one process; each goes on from the other's
    checkpoint."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    options = {**GRADIENT, "use_ema": True, "ema_decay": 0.5, "layerwise_steps": 2, "max_grad_norm": 0.01}
    more = {**options, "max_train_steps": 3, "resume_from_checkpoint": "latest"}

    def sharded(name: str, **options: Any) -> None:
        port = free_port()
        args = arguments(*folders, tmp_path / name, **options, train_batch_size=1, gradient_accumulation_steps=2)
        ranks = [start_child(args, rank, 2, port, backend="deepspeed_zero2") for rank in range(2)]
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0

    sharded("sharded", **options)
    train(arguments(*folders, tmp_path / "one", **options, train_batch_size=4))
    assert_near(weights(tmp_path / "sharded"), weights(tmp_path / "one"))
    for name in ("sharded", "one"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-first")
    for name in ("sharded-first", "one"):
        train(arguments(*folders, tmp_path / name, **more, train_batch_size=4))
    for name in ("sharded", "one-first"):
        sharded(name, **more)
    for name in ("sharded", "sharded-first", "one-first"):
        assert_near(weights(tmp_path / name), weights(tmp_path / "one"))
        assert checkpoints(tmp_path / name)[-1].name == "checkpoint-3"


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_the_shipped_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert {key for key in config.fsdp_config} <= known
    assert {key for key in config.deepspeed_config} <= known


def test_text_to_image_needs_no_teacher(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train(arguments(*folders, tmp_path / "run", output_loss_weight=0.0, layer_loss_weight=0.0, distance_steps=[]))
    line = next(line for line in log_of(tmp_path / "run") if "loss" in line)
    assert line["loss"] == line["noise"] and "output" not in line and "layers" not in line


def test_a_broken_gradient_is_skipped_and_twenty_end_the_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    args = arguments(
        *folders, tmp_path / "run", max_train_steps=30, learning_rate=1e30, max_grad_norm=1e30, holdout_samples=0
    )
    with pytest.raises(FloatingPointError, match="No finite gradient for 20 steps"):
        train(args)


def test_the_cache_is_resumed_and_broken_pictures_are_named(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = image_folder(tmp_path / "data", 9)
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:100])
    (data / "7.png").unlink()
    args = arguments(folders[0], data, tmp_path / "run", cache_shard_size=3, encode_only=True)
    assert train(args) is None
    cache = Path(args.cache_dir or "")
    assert EncodedDataset(cache).broken == ["4.png", "7.png"] and len(EncodedDataset(cache)) == 7
    assert "2 images cannot be read and are left out: 4.png, 7.png" in caplog.text

    shards = sorted(cache.glob("shard-*"))
    first = {path: path.stat().st_mtime_ns for path in shards}
    content = shards[1].read_bytes()
    shards[1].unlink()
    train(args)
    assert shards[1].read_bytes() == content
    assert [path.stat().st_mtime_ns == first[path] for path in shards] == [True, False, True]
    with pytest.raises(ValueError, match=r"cache of another run.*shard_size"):
        train(arguments(folders[0], data, tmp_path / "run", cache_shard_size=4))


def test_a_webdataset_is_read_like_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 4)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for line in map(json.loads, (data / "metadata.jsonl").read_text().splitlines()):
            stem = Path(line["file_name"]).stem
            (tmp_path / f"{stem}.txt").write_text(line["text"])
            tar.add(data / line["file_name"], f"{stem}.png")
            tar.add(tmp_path / f"{stem}.txt", f"{stem}.txt")
    train(arguments(folders[0], data, tmp_path / "folder", encode_only=True))
    other = dict(train_data_dir=None, dataset_name="webdataset", data_files=[str(tmp_path / "shard.tar")])
    other |= dict(image_column="png", caption_column="txt", cache_dir=str(tmp_path / "tar-cache"))
    train(arguments(folders[0], data, tmp_path / "tar", encode_only=True, **other))
    shard = "shard-000000000.safetensors"
    got, expected = load_file(tmp_path / "tar-cache" / shard), load_file(tmp_path / "data-cache" / shard)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def test_buckets_keep_aspect_ratios_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 12, sizes=((32, 32), (80, 48), (48, 80)))
    options: dict[str, Any] = {"resolution": 32, "aspect_ratio_buckets": True, "bucket_step": 8}
    train(arguments(folders[0], data, tmp_path / "run", **options, distance_steps=[]))
    encoded = EncodedDataset(tmp_path / "data-cache")
    assert set(encoded.sizes) == {"32x32", "24x40", "40x24"}
    for index, size in enumerate(encoded.sizes):
        height, width = map(int, size.split("x"))
        assert encoded[index]["latents"].shape == (4, height // 2, width // 2)


def test_sdxl_is_conditioned_as_its_pipeline_does(tmp_path: Path) -> None:
    tiny_models.sdxl_pipe().save_pretrained(tmp_path / "pipe")
    data = image_folder(tmp_path / "data")
    train(arguments(tmp_path / "pipe", data, tmp_path / "run", max_train_steps=2))
    sample = EncodedDataset(tmp_path / "data-cache")[0]
    assert sample["added_cond_kwargs.time_ids"].tolist() == [SIZE, SIZE, 0, 0, SIZE, SIZE]
    pipe = tiny_models.sdxl_pipe()
    prompt, _, pooled, _ = pipe.encode_prompt("picture a", do_classifier_free_guidance=False)
    torch.testing.assert_close(sample["encoder_hidden_states"].float(), prompt[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample["added_cond_kwargs.text_embeds"].float(), pooled[0], rtol=1e-3, atol=1e-3)


FAMILIES = {
    "sd3": (sd3_pipe, 1.0, False),
    "pixart": (tiny_models.pixart_pipe, 1.0, False),
    "flux": (tiny_models.flux_pipe, 0.001, True),
    "flux-guidance": (lambda: tiny_models.flux_pipe(guidance_embeds=True), 0.001, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_train(name: str, tmp_path: Path) -> None:
    """Flow matching (SD3, Flux on packed latents), epsilon with a learnt variance (PixArt); both stages."""
    make, scale, packed = FAMILIES[name]
    data = image_folder(tmp_path / "data")
    out = tmp_path / "run"
    args = arguments(Path("tiny"), data, out, layerwise_steps=10, max_train_steps=12, learning_rate=1e-3)
    train(args, make())
    facts = EncodedDataset(tmp_path / "data-cache").facts
    assert facts == {"timestep_scale": pytest.approx(scale), "packed": packed}
    distances = [line["layer_distance"] for line in log_of(out) if "distance" in line]
    assert distances[-1] < distances[0]
    apply_gspn2(make(), out)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_target_leads_the_pipelines_own_scheduler_to_the_picture(name: str) -> None:
    """At each step of the pipeline: the training timestep of the same noise level is what its denoiser gets, and the
    training target in place of the denoiser's output takes one last step of its scheduler to the clean latents."""
    make, scale, _ = FAMILIES[name]
    pipe = make()
    objective = Objective(pipe.scheduler, scale)
    seen: list[float] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    pipe(
        "a",
        height=16,
        width=16,
        num_inference_steps=4,
        output_type="latent",
        guidance_scale=1.0,
        **BINNING.get(name, {}),
    )
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for given, timestep in zip(seen, pipe.scheduler.timesteps, strict=True):
        assert given == pytest.approx(float(timestep) * scale)
        # The index whose noise level the pipeline is at.
        levels = objective.scheduler.timesteps if objective.flow else torch.arange(objective.steps)
        index = (levels - timestep).abs().argmin().view(1)
        noisy, trained, target = objective.noised(latents, noise, index)
        assert float(trained) == pytest.approx(given, abs=1.001 * scale)
        if objective.flow:
            step = type(pipe.scheduler).from_config(pipe.scheduler.config)
            step.set_timesteps(sigmas=[float(objective.scheduler.sigmas[index])])
            back = step.step(target, step.timesteps[0], noisy).prev_sample
        else:
            pipe.scheduler._step_index = int((pipe.scheduler.timesteps == timestep).nonzero())
            back = pipe.scheduler.convert_model_output(target, sample=noisy)
        torch.testing.assert_close(back, latents, rtol=0, atol=2e-3)


def test_sizes_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data")
    with pytest.raises(UserError, match="height is 18; this model needs a multiple of 4"):
        train(arguments(Path("tiny"), data, tmp_path / "run", resolution=18), tiny_models.flux_pipe())


def test_processes_that_did_not_find_one_another_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started .* use `accelerate launch --cpu`"):
        train(arguments(*folders, tmp_path / "run"))


def test_models_whose_training_is_not_tested_are_refused() -> None:
    with pytest.raises(ValueError, match="Training of DiTTransformer2DModel is not tested yet"):
        Conditioner(CASES["DiTTransformer2DModel"].build())
