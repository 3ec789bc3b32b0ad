"""The demo below its page: what it offers, what it refuses, what it paints, what it says the scan sees."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.demo.drawing import draw_sight, heat, spread, token_of
from gspn2_diffusion.demo.library import ATTENTION_LABEL, UNTRAINED_LABEL, Library
from gspn2_diffusion.demo.painting import MAX_SEED, Cancelled, Limits, Request, paint
from gspn2_diffusion.demo.sight import attention_row, reach_in_tokens, record, scan_reach
from gspn2_diffusion.demo.timing import time_against_resolution
from gspn2_diffusion.demo.visits import Visits
from gspn2_diffusion.layers import GSPN2Layer
from gspn2_diffusion.loading import UserError
from gspn2_diffusion.ops import gspn2_scan_reference

from . import demo_folders

GOOD = dict(
    prompt="a b",
    negative_prompt="",
    seed=3,
    steps=1,
    guidance_scale=5.0,
    height=32,
    width=48,
    model="painter",
    adapter="scans",
    num_images=1,
    compare=False,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return demo_folders.save(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def library(folders):
    return Library([folders[0]], [folders[1]], device="cpu")


def ask(**changes):
    return Request.checked(Limits(), **{**GOOD, **changes})


def pictures(library, **changes):
    return [np.asarray(picture.image) for picture in paint(library, ask(**changes), threading.Event())]


def test_it_offers_what_it_was_given_and_names_no_path(library, folders, tmp_path):
    assert list(library.models) == ["painter"]
    assert list(library.adapters) == ["scans", UNTRAINED_LABEL, ATTENTION_LABEL]
    (tmp_path / "painter").mkdir()
    shutil.copy(folders[0] / "model_index.json", tmp_path / "painter")
    two = Library([folders[0], tmp_path / "painter"], device="cpu")
    assert list(two.models) == ["painter", "painter (2)"]


@pytest.mark.parametrize("label", ["../painter", "/etc/passwd", "", None, "painter/../painter", 7, ["painter"], {}])
def test_nothing_else_is_on_offer(library, folders, label):
    for name in (label, str(folders[0])):
        with library.lock, pytest.raises(UserError, match="is not on offer"):
            library.pipeline(name, ATTENTION_LABEL)
        with library.lock, pytest.raises(UserError, match="is not on offer"):
            library.pipeline("painter", name)


def test_hub_ids_only_when_allowed_and_never_a_local_path(library, folders, monkeypatch):
    with pytest.raises(UserError, match="is not on offer"):
        library._source("someone/model", library.models, "model")
    open_library = Library([folders[0]], allow_hub=True, device="cpu")
    assert open_library._source("someone/model", open_library.models, "model") == "someone/model"
    monkeypatch.chdir(folders[0].parent)
    for path in ("painter/unet", "./painter", "../x", "a/b/c", "a b/c"):
        with pytest.raises(UserError, match="is not on offer"):
            open_library._source(path, open_library.models, "model")


def test_a_folder_that_is_none_is_refused_at_the_start(tmp_path, folders):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        Library([tmp_path])
    with pytest.raises(UserError, match=r"no config\.json"):
        Library([folders[0]], [tmp_path])


BAD = [
    ({"prompt": "  "}, "The prompt is empty"),
    ({"prompt": None}, "The prompt is empty"),
    ({"prompt": ["a"]}, "type words"),
    ({"prompt": "a" * 1001}, "1001 characters"),
    ({"negative_prompt": "a" * 1001}, "1001 characters"),
    ({"seed": -1}, "Seed is -1"),
    ({"seed": MAX_SEED}, "use a whole number"),
    ({"seed": None}, "Seed is missing"),
    ({"steps": 0}, "Steps is 0"),
    ({"steps": 2.5}, "Steps is 2.5"),
    ({"steps": "many"}, "Steps is 'many'"),
    ({"steps": True}, "Steps is True"),
    ({"guidance_scale": float("nan")}, "Guidance is nan"),
    ({"guidance_scale": -0.5}, "Guidance is -0.5"),
    ({"height": 100000}, "Height is 100000"),
    ({"width": float("inf")}, "Width is inf"),
    ({"num_images": 9}, "Number of pictures is 9"),
    ({"compare": "yes"}, "Compare is 'yes'"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_requests_are_explained(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ask(**changes)


def test_bad_sizes_and_pairs_are_explained_before_anything_is_painted(library):
    with pytest.raises(UserError, match="height is 33; this model needs a multiple of"):
        pictures(library, height=33)
    with pytest.raises(UserError, match="Compare needs an adapter"):
        pictures(library, adapter=ATTENTION_LABEL, compare=True)


def test_compare_paints_what_each_alone_paints(library):
    attention, scan = pictures(library, compare=True)
    assert scan.shape == (32, 48, 3)
    assert (scan == pictures(library)[0]).all()
    assert (attention == pictures(library, adapter=ATTENTION_LABEL)[0]).all()
    assert (scan != attention).any()


def test_picture_i_has_seed_plus_i(library):
    first, second = paint(library, ask(num_images=2), threading.Event())
    assert (np.asarray(second.image) == pictures(library, seed=4)[0]).all()
    assert [first.parameters["seed"], second.parameters["seed"]] == [3, 4]
    assert first.parameters["adapter"] == "scans"


def test_two_at_once_do_not_mix(library):
    """Different prompts, seeds, sizes and adapters, interleaved picture by picture."""
    asks = [{"seed": 0}, {"seed": 9, "height": 48, "adapter": ATTENTION_LABEL}, {"prompt": "c", "compare": True}]
    alone = [pictures(library, num_images=2, **changes) for changes in asks]
    together: list = [None] * len(asks)

    def visit(index):
        together[index] = pictures(library, num_images=2, **asks[index])

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_cancel_stops_at_the_next_step_and_lets_the_next_one_in(library):
    cancel, steps = threading.Event(), []

    def on_step(step):
        steps.append(step)
        cancel.set()

    with pytest.raises(Cancelled):
        list(paint(library, ask(steps=50), cancel, on_step))
    assert len(steps) == 1 and (steps[0].done, steps[0].total) == (1, 50) and steps[0].memory > 0
    assert len(pictures(library)) == 1


def test_cancel_while_waiting(library):
    cancel = threading.Event()
    cancel.set()
    with library.lock, pytest.raises(Cancelled):
        list(paint(library, ask(), cancel))


def test_visits_stop_their_own_jobs_only():
    visits = Visits()
    with visits.job("a") as first, visits.job("a") as second, visits.job("b") as other:
        assert visits.stop("a") and first.is_set() and second.is_set() and not other.is_set()
    assert not visits.stop("a")


@pytest.fixture(scope="module")
def recording(library):
    return record(library, ask(), 1, threading.Event())


@pytest.mark.parametrize("decay", [False, True])
def test_reach_is_what_an_impulse_carries(recording, decay):
    """The reference scan, fed one impulse at a time, against one gradient of the fast path."""
    layer = next(layer for layer in recording.layers if layer.grid[0] != layer.grid[1])
    if decay:
        channels = layer.tokens.shape[-1]
        torch.manual_seed(0)
        layer = replace(layer, mixer=GSPN2Layer(channels, channels, GSPN2Config(decay=True)))
    (height, width), mixer = layer.grid, layer.mixer
    row, column = height // 2, width // 3
    seen = scan_reach(layer, row, column)
    with torch.no_grad():
        x, lam, u, logits = mixer.scan_inputs(layer.tokens, height, width)
        out = mixer.scaled_out_weight(height, width).norm(dim=0).view(4, mixer.width)
        into = mixer.scan_in.weight[: mixer.width].norm(dim=1)
        for at in [(0, 0), (row, column), (row, 0), (0, column), (height - 1, width - 1), (row + 1, column - 1)]:
            impulse = torch.zeros_like(x)
            impulse[0, at[0], at[1]] = 1
            y = gspn2_scan_reference(impulse, lam, u, logits, decay=decay)[0, row, column].abs()
            torch.testing.assert_close(seen[:, at[0], at[1]], (y * out * into).sum(-1))


def test_a_token_sees_only_what_lies_behind_it(recording):
    seen = scan_reach(recording.layers[0], 2, 3)
    right, left, down, up = seen
    assert not right[:, 4:].any() and not left[:, :3].any() and not down[3:].any() and not up[:2].any()
    assert right[2, 3] > 0 and not right[:, 3][torch.arange(seen.shape[1]) != 2].any()


def test_attention_row_is_diffusers_own(recording):
    layer = recording.layers[0]
    attention, tokens = layer.attention, layer.tokens
    with torch.no_grad():
        query, key = (attention.head_to_batch_dim(project(tokens)) for project in (attention.to_q, attention.to_k))
        scores = attention.get_attention_scores(query, key)  # (heads, N, N)
    row, column = 1, 2
    expected = scores.mean(0)[row * layer.grid[1] + column].view(layer.grid)
    torch.testing.assert_close(attention_row(layer, row, column), expected)


def test_reach_in_tokens():
    seen = torch.zeros(4, 6)
    seen[1, :4] = torch.tensor([0.0, 0.2, 0.3, 0.5])
    assert reach_in_tokens(seen, "right", 1, 3) == 2
    assert reach_in_tokens(seen, "right", 1, 3, share=0.5) == 0
    assert reach_in_tokens(seen.flip(1), "left", 1, 2) == 2
    assert reach_in_tokens(seen.T, "down", 3, 1) == 2
    assert reach_in_tokens(seen.T.flip(0), "up", 2, 1) == 2


def test_the_figure(recording):
    figure, table = draw_sight(recording, (47, 31))
    assert len(table) == len(recording.layers) and len(table[0]) == 2 + 4
    assert np.asarray(figure).std() > 10
    assert token_of((47, 31), (48, 32), (8, 12)) == (7, 11)
    assert (
        spread(7, 16) == list(range(7))
        and spread(0, 16) == []
        and spread(70, 16)[0] == 0
        and spread(70, 16)[-1] == 69
        and len(spread(70, 16)) == 16
    )
    assert np.asarray(heat(np.zeros((3, 3)), (9, 9))).std(axis=(0, 1)).max() == 0


def test_there_is_no_scan_to_see_without_an_adapter(library):
    with pytest.raises(UserError, match="choose one"):
        record(library, ask(adapter=ATTENTION_LABEL), 1, threading.Event())


def test_time_against_resolution(library):
    timings = list(time_against_resolution(library, "painter", "scans", threading.Event(), limit=64, repeats=1))
    assert [(timing.side, timing.mixer) for timing in timings][:2] == [(16, "GSPN-2"), (16, "attention")]
    assert all(0 < timing.mixers < timing.step for timing in timings)
