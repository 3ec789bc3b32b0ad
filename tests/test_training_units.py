"""The parts of training: options, objectives, order of samples, losses."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gspn2_diffusion import GSPN2Config, apply_gspn2, gspn2_disabled
from gspn2_diffusion.training import TextToImageArguments, TrainingArguments, parse_args
from gspn2_diffusion.training.arguments import Part
from gspn2_diffusion.training.data import bucket_sizes
from gspn2_diffusion.training.objective import Objective
from gspn2_diffusion.training.sampling import BatchOrder, StepSampler, turns
from gspn2_diffusion.training.student import StudentStep
from gspn2_diffusion.training.trainer import learning_rates

from . import tiny_models

NEEDED = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data"]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse_args(argv=[*NEEDED, *argv])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_step", "3"], "unrecognized arguments: --max_train_step"),
        (["--learning_rat", "3"], "unrecognized arguments: --learning_rat"),
        (["--gates", "both"], "invalid choice: 'both'"),
        (["--max_train_steps", "0"], "--max_train_steps is 0; it must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate is -1.0; it must be above 0"),
        (["--ema_decay", "0.9"], "--ema_decay would have no effect: pass --use_ema"),
        (["--segment", "4", "--control", "none"], "--segment would have no effect"),
        (["--adapter", "a", "--groups", "2"], "--groups would have no effect: --adapter brings its own options"),
        (["--lr_warmup_steps", "5"], "use --lr_scheduler constant_with_warmup"),
        (["--dataset_name", "name"], "exactly one of --train_data_dir and --dataset_name"),
        (["--proxy_dim", "0"], "proxy_dim is 0"),
        (["--proxy_dim", "wide"], "proxy_dim"),
        (
            ["--noise_loss_weight", "0", "--output_loss_weight", "0", "--layer_loss_weight", "0"],
            "All loss weights are 0",
        ),
        (["--proportion_empty_prompts", "2"], "from 0 to 1"),
        (["--rollout_share", "1.5"], "--rollout_share is 1.5; it must be from 0 to 1"),
        (["--rollout_share", "0.01"], "--rollout_share 0.01 of --train_batch_size 16 is less than one sample"),
        (
            ["--rollout_share", "0.5", "--output_loss_weight", "0", "--guided_loss_weight", "0"],
            "--rollout_share needs --output_loss_weight or",
        ),
        (["--resolution", "64", "0"], "--resolution is [64, 0]; it must be above 0"),
        (["--resolution", "64", "128", "--resolution_shares", "1"], "--resolution_shares has 1 values for 2 of"),
        (["--resolution_strengths", "1.5"], "--resolution_strengths is [1.5]; it must be at most 1"),
        (
            ["--rollout_share", "0.5", "--rollout_guidance_scale", "4", "1"],
            "--rollout_guidance_scale has 2 values for 1 of --resolution; give as many",
        ),
        (["--rollout_guidance_scale", "0"], "--rollout_guidance_scale would have no effect: pass --rollout_share"),
        (
            ["--rollout_share", "0.5", "--rollout_guidance_scale", "0"],
            "--rollout_guidance_scale is [0.0]; it must be above 0",
        ),
        (["--resolution_shares", "0.5"], "--resolution_shares would have no effect: name several --resolution"),
        (
            ["--resolution", "64", "64", "--max_train_samples", "5", "6"],
            "--max_train_samples differs for the same --resolution 64",
        ),
        (
            ["--resolution", "64", "256", "--rollout_share", "0.4"],
            "--train_batch_size 16 (1 at 256 pixels) is less than one sample",
        ),
        (["--rollout_stop", "0.5"], "--rollout_stop would have no effect: pass --rollout_share"),
    ],
)
def test_bad_options_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(argv, capsys)


def test_missing_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv=["--train_data_dir", "data"])
    assert "--pretrained_model_name_or_path is missing" in capsys.readouterr().err


def test_a_yaml_file_holds_flags_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 0.01\nseed: 5\nuse_ema: true\nvalidation_prompts: [a b, c]\nsegment: null\n")
    args = parse_args(argv=[*NEEDED, "--config", str(path), "--seed", "7"])
    assert (args.learning_rate, args.seed, args.use_ema, args.validation_prompts) == (0.01, 7, True, ["a b", "c"])
    path.write_text("learning_rat: 0.01\n")
    assert "learning_rat" in refused(["--config", str(path)], capsys)
    assert "cannot be read" in refused(["--config", str(tmp_path / "none.yaml")], capsys)


def test_the_shipped_yaml_is_valid() -> None:
    path = Path(__file__).parents[1] / "examples" / "distill_sdxl.yaml"
    args = parse_args(argv=["--config", str(path), "--train_data_dir", "data"])
    assert args.layerwise_steps == 2000


def test_every_option_is_read() -> None:
    """An option that no code reads cannot have an effect."""
    folder = Path(__file__).parents[1] / "gspn2_diffusion" / "training"
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "arguments.py")
    code += (folder / "arguments.py").read_text().split("def operator_config")[1]
    for field in dataclasses.fields(TrainingArguments):
        assert re.search(rf"(args|self)\.{field.name}\b", code), field.name


def test_text_to_image_has_no_teacher_unless_asked() -> None:
    args = parse_args(TextToImageArguments, NEEDED)
    assert (args.noise_loss_weight, args.output_loss_weight, args.layer_loss_weight) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_targets(prediction: str) -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type=prediction)
    objective = Objective(scheduler, snr_gamma=5.0)
    latents, noise, steps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    noisy, timesteps, target = objective.noised(latents, noise, steps)
    beta = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)[steps]
    alpha, sigma = kept.sqrt().view(-1, 1, 1, 1).float(), (1 - kept).sqrt().view(-1, 1, 1, 1).float()
    torch.testing.assert_close(noisy, alpha * latents + sigma * noise, rtol=1e-4, atol=1e-5)
    expected = noise if prediction == "epsilon" else alpha * noise - sigma * latents
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    assert timesteps.tolist() == steps.tolist()
    snr = kept / (1 - kept)
    weight = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.weights(steps).double(), weight, rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]


def test_flow_matching_targets() -> None:
    torch.manual_seed(0)
    objective = Objective(FlowMatchEulerDiscreteScheduler(shift=3.0), timestep_scale=0.001)
    latents, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    noisy, timesteps, target = objective.noised(latents, noise, torch.tensor([0, 500]))
    t = 3 * 0.5 / (1 + 2 * 0.5)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(noisy[1], (1 - t) * latents[1] + t * noise[1])
    torch.testing.assert_close(timesteps, torch.tensor([1.0, t]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(target, noise - latents)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_timesteps_are_drawn_by_scheme(scheme: str, scheduler: Any) -> None:
    objective = Objective(scheduler, weighting_scheme=scheme)
    drawn = [objective.draw(torch.Generator().manual_seed(seed)) for seed in range(400)]
    middle = sum(250 <= step < 750 for step in drawn) / len(drawn)
    assert min(drawn) >= 0 and max(drawn) < 1000
    low, high = {"none": (0.4, 0.6), "logit_normal": (0.65, 0.8), "mode": (0.5, 0.9)}[scheme]
    assert low < middle < high


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_mean_below_zero_prefers_noisy_samples(scheduler: Any) -> None:
    objective = Objective(scheduler, weighting_scheme="logit_normal", logit_mean=-1.0)
    indices = torch.tensor([objective.draw(torch.Generator().manual_seed(seed)) for seed in range(400)])
    latents, noise = torch.zeros(400, 1), torch.ones(400, 1)
    share, _, _ = objective.noised(latents, noise, indices)
    even, _, _ = objective.noised(latents, noise, torch.linspace(0, 999, 400).long())
    assert share.mean() > even.mean() + 0.1


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDIMScheduler(prediction_type="sample"), {}, "prediction_type 'sample' is not supported"),
        (FlowMatchEulerDiscreteScheduler(), {"snr_gamma": 5.0}, "--snr_gamma has no meaning"),
    ],
)
def test_objectives_refuse_what_does_not_fit(scheduler: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(scheduler, **options)


def test_steps_are_of_one_size_and_an_epoch_sees_every_sample() -> None:
    sizes = ["wide"] * 7 + ["tall"] * 10
    order = BatchOrder(sizes, list(range(17)), total=4, seed=3)
    assert order.steps_per_epoch == 2 + 3
    first = [order.step(step) for step in range(5)]
    assert all(len(step) == 4 and len({sizes[i] for i in step}) == 1 for step in first)
    assert {i for step in first for i in step} == set(range(17))
    assert first != [order.step(step) for step in range(5, 10)]
    # A resumed run asks for a later step first.
    assert BatchOrder(sizes, list(range(17)), total=4, seed=3).step(3) == first[3]
    assert BatchOrder(sizes[:3], [0, 1, 2], total=8, seed=0).step(0).__len__() == 8


def test_processes_and_accumulation_share_out_the_same_step() -> None:
    order = BatchOrder(["a"] * 30, list(range(30)), total=12, seed=0)

    def placed(micro: int, accumulation: int, world: int) -> set[tuple[int, int, int]]:
        samplers = [StepSampler([order], [(0, 1), (0, 2)], accumulation, rank, world) for rank in range(world)]
        batches = [batch for sampler in samplers for batch in sampler]
        assert all(len(batch) == micro for batch in batches) and len(batches) == 2 * accumulation * world
        return {item for batch in batches for item in batch}

    assert placed(12, 1, 1) == placed(3, 2, 2) == placed(2, 1, 6)


@pytest.mark.parametrize("shares", [[1.0], [1.0, 1.0], [0.5, 0.3, 0.2], [5.0, 1.0, 1.0, 0.1]])
def test_turns_keep_to_the_shares_at_every_moment(shares: list[float]) -> None:
    order = turns(shares, 200)
    for done in range(1, 201):
        counts = Counter(part for part, _ in order[:done])
        for part, share in enumerate(shares):
            assert abs(counts[part] - done * share / sum(shares)) < len(shares)
    for part in range(len(shares)):
        turn = [number for p, number in order if p == part]
        assert turn == list(range(len(turn)))
    assert turns(shares, 50) == order[:50]


def test_parts_have_the_pixels_of_the_first_and_their_own_options() -> None:
    flags = "--resolution 128 256 64 256 --max_train_samples 9 8 7 8 --resolution_shares 4 2 1 1"
    flags += " --resolution_strengths 1 0.3 0.2 0.1 --train_batch_size 24 --encode_batch_size 2"
    flags += " --rollout_share 0.5 --rollout_guidance_scale 4 1 1 2"
    args = parse_args(argv=[*NEEDED, *flags.split()])
    assert args.parts() == [
        Part(128, 9, 4.0, 1.0, 4.0, 24, 2),
        Part(256, 8, 2.0, 0.3, 1.0, 6, 1),
        Part(64, 7, 1.0, 0.2, 1.0, 96, 8),
        Part(256, 8, 1.0, 0.1, 2.0, 6, 1),
    ]
    assert parse_args(argv=NEEDED).parts() == [Part(None, None, 1.0, 1.0, 5.0, 16, 16)]


@pytest.mark.parametrize("scheduler", [tiny_models.scheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_strength_bounds_the_noise(scheduler: Any) -> None:
    objective = Objective(scheduler)
    steps, zeros, ones = objective.steps, torch.zeros(1), torch.ones(1)

    def level(index: int) -> float:
        return float(objective.noised(zeros, ones, torch.tensor([index]))[0])

    levels = [level(objective.below(index, 0.3)) for index in range(steps)]
    highest = sorted(level(index) for index in range(steps))[int(0.3 * steps) - 1]
    assert max(levels) == highest and min(levels) == min(map(level, range(steps)))
    assert [objective.below(index, 1.0) for index in range(steps)] == list(range(steps))


def test_bucket_sizes_keep_the_area_and_the_step() -> None:
    sizes = bucket_sizes(1024, 64, 2.0)
    assert (1024, 1024) in sizes and (768, 1344) in sizes and (1344, 768) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert abs(height * width / 1024**2 - 1) < 0.1 and max(height / width, width / height) <= 2


def test_learning_rates_of_the_two_stages() -> None:
    args = TrainingArguments(
        pretrained_model_name_or_path="model",
        train_data_dir="data",
        layerwise_steps=10,
        layerwise_learning_rate=0.5,
        learning_rate=0.1,
        max_train_steps=30,
        lr_scheduler="linear",
        lr_warmup_steps=4,
    )
    rate = learning_rates(args)
    assert rate(9) == 0.5 and rate(10) == 0
    assert rate(12) == pytest.approx(0.05) and rate(14) == pytest.approx(0.1) and rate(22) == pytest.approx(0.05)


def step_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = tiny_models.unet_inputs(8, 8)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "indices": torch.tensor([10, 700]),
        "conditions": {"encoder_hidden_states": inputs["encoder_hidden_states"]},
    }


def test_losses_are_what_they_say() -> None:
    unet, inputs = tiny_models.unet(), step_inputs()
    apply_gspn2(unet)
    objective = Objective(tiny_models.scheduler())
    loss, parts = StudentStep(unet, objective, 1.0, 0.5, 0.5)(**inputs)
    noisy, timesteps, target = objective.noised(inputs["latents"], inputs["noise"], inputs["indices"])
    call = {"timestep": timesteps, **inputs["conditions"]}
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(lambda m, a, out, n=name: outputs.setdefault(n, []).append(out))
    with torch.no_grad():
        student = unet(noisy, **call).sample
        with gspn2_disabled(unet):
            teacher = unet(noisy, **call).sample
    layers = [(a - b).square().mean() for a, b in outputs.values()]
    torch.testing.assert_close(parts["noise"], (student - target).square().mean())
    torch.testing.assert_close(parts["output"], (student - teacher).square().mean())
    torch.testing.assert_close(parts["layers"], torch.stack(layers).mean())
    torch.testing.assert_close(loss.detach(), parts["noise"] + 0.5 * parts["output"] + 0.5 * parts["layers"])


def test_the_first_stage_learns_from_the_teachers_own_inputs() -> None:
    unet, inputs = tiny_models.unet(), step_inputs()
    adapter = apply_gspn2(unet)
    unet.requires_grad_(False)
    adapter.requires_grad_(True)
    step = StudentStep(unet, Objective(tiny_models.scheduler()), 1.0, 0.5, 0.5)
    loss, parts = step(**inputs, layerwise=True)
    assert list(parts) == ["layers"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(adapter.parameters()))
    # No layer's gradient depends on another layer.
    first = adapter.layer_names[0]
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith(first):
                parameter.zero_()
    adapter.zero_grad()
    step(**inputs, layerwise=True)[0].backward()
    for name, parameter in adapter.named_parameters():
        if not name.startswith(first):
            torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=0)


def test_the_control_mixes_no_tokens() -> None:
    args = TrainingArguments(pretrained_model_name_or_path="model", train_data_dir="data", control="none")
    config = args.operator_config()
    assert config == GSPN2Config(segment=1)
    unet, full = tiny_models.unet(), tiny_models.unet()
    adapter, mixing = apply_gspn2(unet, config=config), apply_gspn2(full)
    count = [sum(p.numel() for p in a.parameters()) for a in (adapter, mixing)]
    assert count[0] == count[1]
    name = adapter.layer_names[0]
    tokens = torch.randn(1, 16, adapter.layer(name).channels)
    changed = tokens.clone()
    changed[:, 5] += 1
    moved = (adapter.layer(name)(changed, 4, 4) - adapter.layer(name)(tokens, 4, 4)).abs().amax(-1)[0]
    assert moved[5] > 0 and moved.count_nonzero() == 1
    assert (mixing.layer(name)(changed, 4, 4) - mixing.layer(name)(tokens, 4, 4)).abs().amax(-1).count_nonzero() > 1
