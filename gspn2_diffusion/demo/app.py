"""The page: what a visitor sees, and how a click becomes a request. The work is done in the modules beside it."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Gradio reports its use to its makers unless told not to before it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import pandas as pd
import torch

from ..cli.generate import slug
from ..loading import GUIDANCE_SCALE, UserError, default_size
from ..png_info import read_png, save_png
from .drawing import draw_sight, enlargement, mark_pixel
from .library import ATTENTION_LABEL, Library
from .painting import MAX_SEED, Cancelled, Limits, Picture, Request, Step, memory_in_use, paint
from .sight import record
from .timing import time_against_resolution
from .visits import Visits

logger = logging.getLogger(__name__)

EXAMPLES = [
    "a large red circle above a small blue square",
    "two small yellow triangles, on a pink background",
    "a large green ring to the left of a small orange diamond",
    "three small blue circles, on a white background",
]
RATIOS = {"1:1": (1, 1), "4:3": (4, 3), "3:4": (3, 4), "16:9": (16, 9), "9:16": (9, 16), "2:1": (2, 1), "1:2": (1, 2)}
CSS = """
footer { display: none !important; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
/* On a narrow screen the pictures come right below the button, and the settings after them. */
#paint-row { display: grid; grid-template: "ask" "result" "settings" / minmax(0, 1fr); }
#ask { grid-area: ask; }
#result { grid-area: result; }
#settings { grid-area: settings; }
@media (min-width: 768px) {
  #paint-row { grid-template: "ask result" auto "settings result" 1fr / minmax(0, 4fr) minmax(0, 6fr); }
}
#seeds { align-items: center; }
#gallery .grid-wrap { min-height: 0; max-height: none; }
#status, #sight-status, #time-status { min-height: 1.5em; font-variant-numeric: tabular-nums; }
/* A table as wide as its cells would push a narrow page sideways. */
#reach { contain: inline-size; }
#gallery .caption-label { font-size: 0.7rem; max-width: calc(100% - 2 * var(--block-label-margin, 4px)); }
"""
CANCELLED = "Cancelled."
# What a request is made of, in the order of the components, and what is read back from a picture.
READ_BACK = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width")
FIELDS = (*READ_BACK, "model", "adapter", "num_images", "compare")
SIGHT_HELP = (
    "Paint a picture, then click on a point of it. For the token under that point, each tile shows which tokens a "
    "layer reads: its four scans, with the gates of this very picture, all four together, and the row of the attention "
    "matrix that the layer replaces. Bright is much; each tile has its own scale."
)
TIME_HELP = (
    "Seconds of one denoising step (with guidance) against the side of a square picture, measured here and now with "
    "the chosen model: the whole step, and its self-attentions alone."
)
CURVES = {
    "attention, whole step": "#c2410c",
    "attention, self-attentions alone": "#fdba74",
    "GSPN-2, whole step": "#4338ca",
    "GSPN-2, self-attentions alone": "#a5b4fc",
}
REACH_HEADERS = ["layer", "map", "right", "left", "down", "up"]


# Gradio hands each call a tracker of its own where it finds one as a default.
PROGRESS = gr.Progress()
# Gradio 6 says it one way, Gradio 5 another.
PRIVATE: dict[str, Any] = (
    {"api_visibility": "private"} if "api_visibility" in inspect.signature(gr.on).parameters else {"api_name": False}
)
# No button that sends a picture elsewhere, and none that hides the head of the figure.
BUTTONS: dict[str, Any] = (
    {"buttons": []}
    if "buttons" in inspect.signature(gr.Image.__init__).parameters
    else {"show_share_button": False, "show_download_button": False, "show_fullscreen_button": False}
)


def build_demo(
    models: Iterable[str | os.PathLike[str]] = (),
    adapters: Iterable[str | os.PathLike[str]] = (),
    *,
    allow_hub: bool = False,
    device: str | None = None,
    limits: Limits | None = None,
    queue_size: int = 32,
) -> gr.Blocks:
    """The demo as a `gradio.Blocks`, for `launch` or for mounting in an application of your own.

    Args:
        models: folders of diffusers pipelines to offer; none of them offers the shipped model and its adapter.
        adapters: folders of GSPN2Adapters to offer.
        allow_hub: let visitors type hub ids too, which makes this machine download what they name.
        device: where to run; None is the best there is.
        limits: what one request may ask for; None is `Limits()`.
        queue_size: requests that may wait; one more is turned away.

    Raises:
        UserError: a folder is not a pipeline or adapter, Gradio is missing, or the device does not exist here.
    """
    limits = limits or Limits()
    library = Library(models, adapters, allow_hub=allow_hub, device=device)
    visits = Visits()
    model_labels, adapter_labels = list(library.models), list(library.adapters)
    with library.lock:
        pipe = library.pipeline(model_labels[0], ATTENTION_LABEL)[0] if model_labels else None
    sides = (512, 512) if pipe is None else default_size(pipe)
    step = 8 if pipe is None else pipe.vae_scale_factor

    @_explained
    def generate(
        visitor: gr.Request,
        progress: gr.Progress = PROGRESS,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        asked = Request.checked(limits, **dict(zip(FIELDS, values, strict=True)))

        def on_step(step: Step) -> None:
            progress((step.done, step.total), desc=f"{step.seconds:.1f} s, {_megabytes(step.memory)}", unit="steps")

        progress((0, asked.steps), desc="waiting for the model", unit="steps")
        shown: list[tuple[str, str]] = []
        lines: list[str] = []
        pair: tuple[str, str] | None = None
        # Gradio copies a picture before it asks for the next one, so the folder may go at the end.
        with visits.job(_page(visitor)) as cancel, tempfile.TemporaryDirectory(prefix="gspn2-") as folder:
            try:
                for picture in paint(library, asked, cancel, on_step):
                    shown.append((_write(picture, folder, len(shown)), _caption(picture)))
                    lines.append(f"{_caption(picture)}: {picture.seconds:.1f} s")
                    if asked.compare and len(shown) == 2:
                        pair = shown[0][0], shown[1][0]
                    yield shown, gr.update(value=pair, visible=pair is not None), _status(lines, library)
            except Cancelled:
                yield shown, gr.update(value=pair, visible=pair is not None), _status([*lines, CANCELLED], library)

    def cancel(visitor: gr.Request) -> str:
        return CANCELLED if visits.stop(_page(visitor)) else "Nothing is running."

    def leave(visitor: gr.Request) -> None:
        visits.leave(_page(visitor))

    @_explained
    def look(
        visitor: gr.Request,
        progress: gr.Progress = PROGRESS,
        *values: Any,
    ) -> tuple[Any, ...]:
        *fields, at = values
        asked = Request.checked(limits, **dict(zip(FIELDS, [*fields, 1, False], strict=True)))
        if not isinstance(at, int | float) or not 0 < at <= 1:
            raise UserError(f"The denoising step is {str(at)[:20]}; use a part of all steps, above 0 and at most 1.")
        progress(0, desc="painting")
        with visits.job(_page(visitor)) as cancel:
            try:
                recording = record(library, asked, max(1, round(at * asked.steps)), cancel)
            except Cancelled:
                return gr.update(), gr.update(), gr.update(), CANCELLED
        visits.keep_recording(_page(visitor), recording)
        centre = recording.image.width // 2, recording.image.height // 2
        return show(recording, centre)

    def show(recording: Any, pixel: tuple[int, int]) -> tuple[Any, ...]:
        figure, table = draw_sight(recording, pixel)
        words = f"Pixel {pixel[0]}, {pixel[1]} at denoising step {recording.step} of {recording.steps}."
        directions = recording.layers[0].mixer.config.directions
        return (
            mark_pixel(recording.image, pixel),
            figure,
            pd.DataFrame(table, columns=["layer", "map", *directions]),
            words,
        )

    @_explained
    def pick(visitor: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        recording = visits.recording(_page(visitor))
        if recording is None:
            raise UserError("The recording of this picture is gone; paint it again.")
        x, y = (int(number) // enlargement(recording.image) for number in event.index)
        width, height = recording.image.size
        return show(recording, (min(max(x, 0), width - 1), min(max(y, 0), height - 1)))

    @_explained
    def measure(
        visitor: gr.Request,
        progress: gr.Progress = PROGRESS,
        *values: Any,
    ) -> Iterator[tuple[Any, str]]:
        model, adapter = values
        rows: list[dict[str, Any]] = []
        progress(0, desc="measuring")
        with visits.job(_page(visitor)) as cancel:
            try:
                for timing in time_against_resolution(library, model, adapter, cancel, limit=limits.side):
                    for what, seconds in (("whole step", timing.step), ("self-attentions alone", timing.mixers)):
                        rows.append({"side": timing.side, "seconds": seconds, "what": f"{timing.mixer}, {what}"})
                    words = f"{timing.side} x {timing.side}, {timing.mixer}: {timing.step:.3f} s a step"
                    # The plot draws only the curves that it has seen at first, so they come together.
                    yield pd.DataFrame(rows) if len(rows) % len(CURVES) == 0 else gr.skip(), words
            except Cancelled:
                del rows[len(rows) - len(rows) % len(CURVES) :]
                yield pd.DataFrame(rows or None, columns=["side", "seconds", "what"]), CANCELLED
                return
        yield pd.DataFrame(rows), f"Measured on {_machine(library)}."

    def model_chosen(model: str) -> tuple[Any, Any]:
        try:
            with library.lock:
                pipe, _ = library.pipeline(model, ATTENTION_LABEL)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        height, width = default_size(pipe)
        return height, width

    def ratio_chosen(ratio: str, height: float, width: float) -> tuple[int, int]:
        across, down = RATIOS[ratio]
        area = height * width
        return tuple(  # type: ignore[return-value]
            int(min(limits.side, max(step, round((area * part / other) ** 0.5 / step) * step)))
            for part, other in ((down, across), (across, down))
        )

    @_explained
    def load_parameters(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return (gr.update(),) * len(READ_BACK)
        try:
            found = read_png(path)
        except (OSError, ValueError) as error:
            raise UserError(str(error).replace(str(path), Path(path).name)) from error
        values = {name: found.get(name) for name in READ_BACK}
        asked = Request.checked(limits, **values, model="", adapter="", num_images=1, compare=False)
        return tuple(getattr(asked, name) for name in READ_BACK)

    with gr.Blocks(title="GSPN-2", analytics_enabled=False, delete_cache=(600, 3600), **_styling(gr.Blocks)) as demo:
        gr.Markdown(
            "# GSPN-2\nText to image whose self-attention is a line scan: four passes over the picture instead of "
            "every pixel against every pixel."
        )
        with gr.Tabs():
            with gr.Tab("Paint"), gr.Row(elem_id="paint-row"):
                with gr.Column(min_width=0, elem_id="ask"):
                    prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=2, elem_id="prompt")
                    negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative")
                    with gr.Row():
                        run = gr.Button("Paint", variant="primary", elem_id="paint")
                        stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
                    compare = gr.Checkbox(label="Compare with attention (same seed)", elem_id="compare")
                with gr.Column(min_width=0, elem_id="result"):
                    status = gr.Markdown("", elem_id="status")
                    slider = gr.ImageSlider(
                        label="attention | GSPN-2", visible=False, type="filepath", elem_id="slider"
                    )
                    gallery = gr.Gallery(
                        label="Pictures",
                        format="png",
                        columns=2,
                        object_fit="contain",
                        elem_id="gallery",
                    )
                    gr.Examples([[text] for text in EXAMPLES], [prompt], label="Try one of these")
                with gr.Column(min_width=0, elem_id="settings"):
                    with gr.Row(elem_id="seeds"):
                        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="seed", min_width=120)
                        dice = gr.Button("Random seed", size="sm", min_width=120)
                    with gr.Row():
                        steps = gr.Slider(1, limits.steps, value=25, step=1, label="Steps", elem_id="steps")
                        guidance = gr.Slider(0, limits.guidance, value=GUIDANCE_SCALE, step=0.5, label="Guidance")
                    with gr.Row():
                        width = gr.Slider(
                            8 * step, limits.side, value=sides[1], step=step, label="Width", elem_id="width"
                        )
                        height = gr.Slider(
                            8 * step, limits.side, value=sides[0], step=step, label="Height", elem_id="height"
                        )
                    ratio = gr.Radio(list(RATIOS), value="1:1", label="Aspect ratio (same area)")
                    images = gr.Slider(1, limits.images, value=1, step=1, label="Pictures", elem_id="images")
                    with gr.Accordion("Model", open=False):
                        model = gr.Dropdown(
                            model_labels,
                            value=model_labels[0] if model_labels else None,
                            label="Model",
                            allow_custom_value=allow_hub,
                            elem_id="model",
                        )
                        adapter = gr.Dropdown(
                            adapter_labels,
                            value=adapter_labels[0],
                            label="Adapter",
                            allow_custom_value=allow_hub,
                            elem_id="adapter",
                        )
                    with gr.Accordion("Read parameters from a picture", open=False):
                        upload = gr.File(label="PNG made by GSPN-2", file_types=[".png"], type="filepath")
            with gr.Tab("What the scan sees", elem_id="sight-tab"):
                gr.Markdown(SIGHT_HELP)
                with gr.Row():
                    with gr.Column(scale=3, min_width=300):
                        at = gr.Slider(0.05, 1, value=0.5, label="Denoising step (1 is the last)")
                        with gr.Row():
                            look_button = gr.Button("Paint and look", variant="primary", elem_id="look")
                            look_stop = gr.Button("Cancel", variant="stop")
                        seen = gr.Image(
                            label="Click on a point",
                            interactive=False,
                            type="pil",
                            format="png",
                            elem_id="seen",
                            **BUTTONS,
                        )
                        sight_status = gr.Markdown("", elem_id="sight-status")
                    with gr.Column(scale=7, min_width=320):
                        figure = gr.Image(show_label=False, interactive=False, format="png", elem_id="sight", **BUTTONS)
                        table = gr.Dataframe(
                            headers=REACH_HEADERS,
                            label="Reach: tokens within which 90 % of what the point reads lies",
                            interactive=False,
                            elem_id="reach",
                        )
            with gr.Tab("Time against resolution", elem_id="time-tab"):
                gr.Markdown(TIME_HELP)
                with gr.Row():
                    time_button = gr.Button("Measure", variant="primary", elem_id="measure")
                    time_stop = gr.Button("Cancel", variant="stop")
                time_status = gr.Markdown("", elem_id="time-status")
                plot = gr.LinePlot(
                    x="side",
                    y="seconds",
                    color="what",
                    x_title="side of the picture, pixels",
                    y_title="seconds",
                    color_title=" ",
                    color_map=CURVES,
                    height=420,
                    elem_id="plot",
                )

        fields = [prompt, negative, seed, steps, guidance, height, width, model, adapter]
        # One request at a time; the others wait in the queue and see their place in it. What the browser sent comes as
        # it is, so that one place, Request.checked, says what is wrong with it.
        turn: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "preprocess": False}
        painting: Any = [
            gr.on(
                [run.click, prompt.submit],
                generate,
                [*fields, images, compare],
                [gallery, slider, status],
                api_name="generate",
                show_progress_on=[gallery],
                trigger_mode="once",
                **turn,
            )
        ]
        looking: Any = look_button.click(
            look,
            [*fields, at],
            [seen, figure, table, sight_status],
            api_name="look",
            show_progress_on=[seen],
            trigger_mode="once",
            **turn,
        )
        timing: Any = time_button.click(
            measure, [model, adapter], [plot, time_status], api_name="measure", trigger_mode="once", **turn
        )
        for button, words, events in (
            (stop, status, painting),
            (look_stop, sight_status, [looking]),
            (time_stop, time_status, [timing]),
        ):
            button.click(cancel, None, words, cancels=events, queue=False, **PRIVATE)
        seen.select(pick, None, [seen, figure, table, sight_status], **PRIVATE, show_progress="hidden")
        dice.click(lambda: random.randrange(MAX_SEED // 2**20), None, seed, queue=False, **PRIVATE)
        ratio.input(ratio_chosen, [ratio, height, width], [height, width], queue=False, **PRIVATE)
        model.change(model_chosen, model, [height, width], **PRIVATE, **turn)
        upload.change(load_parameters, upload, [prompt, negative, seed, steps, guidance, height, width], **PRIVATE)
        demo.unload(leave)
    demo.queue(max_size=queue_size, default_concurrency_limit=4)
    return demo


def launch(
    models: Iterable[str | os.PathLike[str]] = (),
    adapters: Iterable[str | os.PathLike[str]] = (),
    *,
    allow_hub: bool = False,
    device: str | None = None,
    limits: Limits | None = None,
    queue_size: int = 32,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serves the demo until interrupted.

    Args:
        models, adapters, allow_hub, device, limits, queue_size: see `build_demo`.
        host: address to listen on; the default is for this machine only.
        port: None is the first free one from 7860.
        share: ask Gradio for a public address; off unless asked for.
        open_browser: open the page on this machine.
        block: False returns at once and serves in the background; `Blocks.close` ends it.

    Returns:
        The demo and its address.

    Raises:
        UserError: see `build_demo`; also when the port is taken.
    """
    demo = build_demo(models, adapters, allow_hub=allow_hub, device=device, limits=limits, queue_size=queue_size)
    try:
        _, address, _ = demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            show_error=True,
            max_file_size="20mb",
            quiet=True,
            **_styling(gr.Blocks.launch),
        )
    except (OSError, OverflowError) as error:  # taken, forbidden, or beyond 65535
        raise UserError(f"The demo cannot listen on {host}, port {port or '7860 to 7959'}; choose another.") from error
    except ValueError as error:  # Gradio's own look at the page
        raise UserError(
            f"The demo does not answer on {host}, perhaps because a proxy is in the way; set no_proxy={host}."
        ) from error
    if block:
        print(f"The demo is at {address} (Ctrl-C ends it).", flush=True)
        demo.block_thread()
    return demo, address


def _styling(where: Callable[..., Any]) -> dict[str, Any]:
    """Theme and CSS belong to `Blocks` in Gradio 5 and to `launch` in Gradio 6. Fonts of the system: nothing is
    fetched from elsewhere."""
    sans, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    styling = {"theme": gr.themes.Soft(font=sans, font_mono=mono), "css": CSS}
    known = inspect.signature(where).parameters
    return {name: value for name, value in styling.items() if name in known}


def _explained(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A mistake becomes a toast with its sentence; anything else a toast that points to the log."""

    def toast(error: Exception) -> gr.Error:
        if isinstance(error, UserError):
            return gr.Error(str(error), print_exception=False)
        logger.exception("The demo failed")
        return gr.Error("Something went wrong here; the server's log says what.", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def guarded(*args: Any) -> Any:
            try:
                yield from handler(*args)
            except Exception as error:
                raise toast(error) from error

    else:

        @functools.wraps(handler)
        def guarded(*args: Any) -> Any:
            try:
                return handler(*args)
            except Exception as error:
                raise toast(error) from error

    return guarded


def _page(visitor: gr.Request) -> str:
    """Gradio's name for one open page."""
    return str(visitor.session_hash)


def _write(picture: Picture, folder: str, index: int) -> str:
    name = f"{slug(picture.parameters['prompt'])}-{picture.parameters['seed']}-{index}.png"
    return str(save_png(picture.image, Path(folder, name), picture.parameters))


def _caption(picture: Picture) -> str:
    return f"{picture.mixer}, seed {picture.parameters['seed']}"


def _megabytes(memory: int) -> str:
    return f"{memory / 2**20:.0f} MB"


def _status(lines: list[str], library: Library) -> str:
    return "  \n".join([*lines, f"memory in use: {_megabytes(memory_in_use(library.device))}"])


def _machine(library: Library) -> str:
    if library.device.type == "cuda":
        return torch.cuda.get_device_name(library.device)
    threads = torch.get_num_threads()
    return f"{library.device}, {threads} thread{'s' if threads > 1 else ''}"
