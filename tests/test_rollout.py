"""States of the student's own sampling: diffusers' samplers are the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gspn2_diffusion import apply_gspn2, gspn2_disabled
from gspn2_diffusion.training.objective import Objective
from gspn2_diffusion.training.rollout import Rollout
from gspn2_diffusion.training.student import StudentStep

from . import tiny_models

SCALE, STEPS = 3.0, 5


def ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")


@pytest.mark.parametrize("scheduler", [ddim("epsilon"), ddim("v_prediction"), FlowMatchEulerDiscreteScheduler()])
def test_a_step_is_the_samplers(scheduler: Any) -> None:
    objective = Objective(scheduler)
    indices = torch.tensor(objective.schedule(STEPS))
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2, 4, 3, 3, generator=generator)
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    # Euler's sampler spaces its levels over 1 ... 1/1000; it is given ours.
    scheduler.set_timesteps(
        **{"sigmas": objective.scheduler.sigmas[indices].numpy()} if flow else {"num_inference_steps": STEPS}
    )
    torch.testing.assert_close(objective.timesteps(indices).float(), scheduler.timesteps.float())
    expected = state
    for place in range(STEPS - 1):
        output = torch.randn(state.shape, generator=generator)
        expected = scheduler.step(output, scheduler.timesteps[place], expected).prev_sample
        state = objective.move(state, output, indices[place].repeat(2), indices[place + 1].repeat(2))
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


def inputs(rows: int) -> dict[str, Any]:
    text = tiny_models.unet_inputs(8, 8)["encoder_hidden_states"]
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=generator),
        "noise": torch.randn(rows, 4, 8, 8, generator=generator),
        "indices": torch.arange(10, 10 + rows),
        "conditions": {"encoder_hidden_states": torch.randn(rows, *text.shape[1:], generator=generator)},
        "size": "16x16",
    }


def empty() -> dict[str, dict[str, torch.Tensor]]:
    shape = tiny_models.unet_inputs(8, 8)["encoder_hidden_states"].shape[1:]
    text = {"encoder_hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(2))}
    return {size: text for size in ("16x16", "a", "b")}


def test_trajectories_are_the_students_sampling_and_the_loss_is_guided() -> None:
    unet = tiny_models.unet()
    apply_gspn2(unet)
    scheduler = ddim("epsilon")
    objective = Objective(scheduler)
    rollout = Rollout(objective, empty(), 1, SCALE, STEPS)
    step = StudentStep(unet, objective, 0.0, 0.5, 0.0, [rollout], guided_weight=3.0)
    given = inputs(2)
    scheduler.set_timesteps(STEPS)
    state, text = given["noise"][:1], given["conditions"]["encoder_hidden_states"][:1]
    both = torch.cat((text, empty()["16x16"]["encoder_hidden_states"][None]))

    def answer(at: int) -> torch.Tensor:
        return unet(torch.cat((state, state)), at, both).sample

    def guided(outputs: torch.Tensor) -> torch.Tensor:
        return outputs[1:] + SCALE * (outputs[:1] - outputs[1:])

    for place, at in enumerate(scheduler.timesteps.tolist()):
        with torch.no_grad():
            loss, parts = step(**given)
            student = answer(at)
            with gspn2_disabled(unet):
                teacher = answer(at)
        if place == 0:
            # The first trajectory of the only slot stops after one step, the next one has them all.
            rollout.sizes["16x16"] |= {"left": torch.full((1,), STEPS - 1)}
        expected = (guided(student) - guided(teacher)).square().mean() / SCALE**2
        torch.testing.assert_close(parts["guided"], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss, 0.5 * parts["output"] + 3 * parts["guided"])
        state = scheduler.step(guided(student), at, state).prev_sample
    # All steps are taken: the next one begins with this batch's noise and caption.
    later = inputs(2)
    later["noise"] = later["noise"] + 1
    with torch.no_grad():
        step(**later)
    states, indices, rows = rollout.states("16x16", later["latents"], later["noise"], later["conditions"])
    assert indices.tolist() == [objective.schedule(STEPS)[1]] * 2 and states.shape[0] == 2
    torch.testing.assert_close(rows["encoder_hidden_states"][1], empty()["16x16"]["encoder_hidden_states"])


def test_the_samples_that_stay_are_trained_as_before() -> None:
    unet = tiny_models.unet()
    apply_gspn2(unet)
    objective, given = Objective(ddim("epsilon")), inputs(3)
    with torch.no_grad():
        rollout = Rollout(objective, empty(), 1, SCALE, STEPS)
        _, parts = StudentStep(unet, objective, 1.0, 1.0, 0.0, [rollout])(**given)
        rest = {name: value[1:] for name, value in given.items() if name in ("latents", "noise", "indices")}
        text = {"encoder_hidden_states": given["conditions"]["encoder_hidden_states"][1:]}
        _, alone = StudentStep(unet, objective, 1.0, 1.0, 0.0)(**rest, conditions=text)
    torch.testing.assert_close(parts["noise"], alone["noise"])


def test_noise_levels_spread_out_and_every_size_has_its_own() -> None:
    objective = Objective(ddim("epsilon"))
    rollout = Rollout(objective, empty(), 6, 1.0, steps=10, stop=0.4)
    given = inputs(6)
    seen = []
    for number in range(12):
        for size in ("a", "b") if number > 5 else ("a",):
            states, indices, _ = rollout.states(size, given["latents"], given["noise"], given["conditions"])
            assert len(states) == 6  # no guidance: one prediction of each
            if size == "a":
                seen.append(sorted(indices.tolist(), reverse=True))
            rollout.advance(size, torch.zeros_like(states))
    levels = objective.schedule(10)
    assert seen[0] == [levels[0]] * 6
    assert all(set(at) == set(levels[:4]) for at in seen[4:])
    assert set(rollout.sizes) == {"a", "b"}


@pytest.mark.parametrize("scheduler", [ddim("v_prediction"), FlowMatchEulerDiscreteScheduler()])
def test_below_full_strength_trajectories_are_image_to_image(scheduler: Any) -> None:
    """Which steps and which noise: as diffusers' image-to-image pipelines take them."""
    steps, strength = 25, 0.16
    objective, given = Objective(scheduler), inputs(3)
    rollout = Rollout(objective, empty(), 3, 1.0, steps, stop=0.1, strength=strength)
    begin = steps - min(int(steps * strength), steps)  # StableDiffusionImg2ImgPipeline.get_timesteps
    seen = []
    for _ in range(8):
        states, indices, _ = rollout.states("a", given["latents"], given["noise"], given["conditions"])
        if not seen:
            expected, _, _ = objective.noised(given["latents"], given["noise"], indices)
            torch.testing.assert_close(states, expected)
        seen.append(indices.tolist())
        rollout.advance("a", torch.zeros_like(states))
    assert seen[0] == [objective.schedule(steps)[begin]] * 3
    assert {index for at in seen for index in at} == set(objective.schedule(steps)[begin:])


def test_saved_trajectories_go_on_as_the_others() -> None:
    objective, given = Objective(ddim("v_prediction")), inputs(4)
    first, second = (Rollout(objective, empty(), 4, SCALE, STEPS) for _ in range(2))
    arguments = ("16x16", given["latents"], given["noise"], given["conditions"])
    for _ in range(3):
        states, _, _ = first.states(*arguments)
        first.advance("16x16", first.guided(states * 0.1))
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    for one, other in zip(first.states(*arguments)[:2], second.states(*arguments)[:2], strict=True):
        assert torch.equal(one, other)
