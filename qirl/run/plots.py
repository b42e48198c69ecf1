"""Pictures of a run: line panels as inline SVG, sample images as data URIs, grids as PNG."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image, ImageDraw, ImageFont

# Drawn in these stand-in colours, which become CSS variables, so that a panel follows dark and light.
_INK, _RULE = "#010203", "#010204"
_SERIES = tuple(f"#0102{i:02x}" for i in range(0x10, 0x18))
N_COLORS = len(_SERIES)
_STYLE = {"svg.fonttype": "none", "path.simplify_threshold": 0.3, "axes.formatter.useoffset": False}
_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve: steps [n], values [n]; color: index in the palette; exact: without moving average."""

    steps: np.ndarray
    values: np.ndarray
    color: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    exact: bool = False

    def mean(self) -> np.ndarray:
        return self.values if self.exact else smooth(self.values)


def smooth(values: np.ndarray) -> np.ndarray:
    """A Gaussian moving average over about a twentieth of the curve; fewer than 8 values stay as they are."""
    n = len(values)
    if n < 8:
        return values
    sigma = max(1.0, n / 40)
    reach = min(int(3 * sigma) + 1, (n - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(n), kernel, "same")


def panel(
    name: str,
    lines: Sequence[Line],
    span: float = 0.0,
    log: bool = False,
    rule: float | None = None,
    marks: Sequence[int] = (),
) -> str:
    """One small chart as an <svg> to stand in HTML: the raw curve faint, its moving average over it.

    name: makes the ids in the SVG its own. span: the least height of the y axis, so that noise does not fill
    it. log: logarithmic y axis where the values are positive and span much. rule: a horizontal line. marks:
    steps marked on the x axis.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if rule is not None:
            axes.axhline(rule, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for line in lines:
            _draw(axes, line)
        if marks:
            base = axes.get_xaxis_transform()
            axes.plot(marks, [0.03] * len(marks), "x", color=_SERIES[1], transform=base, markersize=5, clip_on=False)
        _dress(axes, lines, span, log)
        return _svg(figure)


def _draw(axes, line: Line) -> None:
    color = _SERIES[line.color % N_COLORS]
    if line.low is not None and line.high is not None:
        steps, low, high = _thin(line.steps, line.low, line.high)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    if len(line.values) == 1:
        axes.plot(line.steps, line.values, "o", color=color, markersize=5)
        return
    steps, raw, mean = _thin(line.steps, line.values, line.mean())
    if len(line.values) >= 8 and not line.exact:
        axes.plot(steps, raw, color=color, linewidth=0.9, alpha=0.28)
    axes.plot(steps, mean, color=color, linewidth=1.9, solid_capstyle="round", solid_joinstyle="round")


def _thin(*arrays: np.ndarray) -> list[np.ndarray]:
    """At most _POINTS points: means over equal bins."""
    n = len(arrays[0])
    if n <= _POINTS:
        return list(arrays)
    edges = np.linspace(0, n, _POINTS + 1).astype(int)
    return [np.add.reduceat(array.astype(float), edges[:-1]) / np.diff(edges) for array in arrays]


def _dress(axes, lines: Sequence[Line], span: float, log: bool) -> None:
    values = np.concatenate([line.values for line in lines]) if lines else np.zeros(1)
    if log and (values > 0).all() and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        low, high = axes.get_ylim()
        if high - low < span:
            middle = (low + high) / 2
            low, high = middle - span / 2, middle + span / 2
        if low < 0 <= values.min():
            low, high = -0.03 * (high - low), high - low if values.max() == 0 else high
        axes.set_ylim(low, high)
        if np.abs(values).max() < 1e-3:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0, pad=5)
    axes.margins(x=0.015)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """The <svg> element alone, without prolog, namespaces and fixed size, in the palette of the page."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)[0]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"font: [\d.]+px [^;\"]*", "font: 8.5px inherit", body)
    body = body.replace(_INK, "var(--ink-soft)").replace(_RULE, "var(--rule)")
    for index, color in enumerate(_SERIES):
        body = body.replace(color, f"var(--c{index})")
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg class="chart" {box} role="img" aria-hidden="true">{body}'


def grid(images: np.ndarray, scale: int = 1, captions: Sequence[str] | None = None, gap: int = 0) -> Image.Image:
    """Images in rows and columns, enlarged without smoothing.

    images: uint8 [rows, columns, H, W, 3]. captions: one per column, wrapped above it. gap: pixels around
    each image. Without captions cell (r, c) lies at (r, c) times the cell size, so it can be cut up again.
    Raises ValueError for another shape or dtype, or a wrong number of captions.
    """
    if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"grid wants uint8 [rows, columns, H, W, 3], got {images.dtype} {list(images.shape)}")
    rows, columns, height, width, _ = images.shape
    if captions is not None and len(captions) != columns:
        raise ValueError(f"grid got {len(captions)} captions for {columns} columns")
    cell_h, cell_w = height * scale + 2 * gap, width * scale + 2 * gap
    font = ImageFont.load_default(12)
    texts = [_wrap(text, font, cell_w - 6) for text in captions or ()]
    top = max((text.count("\n") + 1 for text in texts), default=0) * 16 + (8 if texts else 0)
    picture = Image.new("RGB", (columns * cell_w, top + rows * cell_h), "white")
    draw = ImageDraw.Draw(picture)
    for c, text in enumerate(texts):
        at = (c * cell_w + cell_w / 2, top - 5)
        draw.multiline_text(at, text, fill="#333333", font=font, anchor="md", align="center", spacing=3)
    for r in range(rows):
        for c in range(columns):
            image = Image.fromarray(images[r, c]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            picture.paste(image, (c * cell_w + gap, top + r * cell_h + gap))
    return picture


SHOWN = 256  # pixels of the longer side of an image in a row


def row(images: Sequence[np.ndarray]) -> Image.Image:
    """Images uint8 [H, W, 3] of any sizes side by side, in white cells of one size: four times as large, or SHOWN pixels.

    Small ones are enlarged without smoothing, so that the row of images of one size can be cut up again.
    """
    longest = max(max(image.shape[:2]) for image in images)
    scale = 4 if 4 * longest <= SHOWN else 1
    if longest > SHOWN:
        images = [_shrunk(image, SHOWN / longest) for image in images]
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    cells = np.full((1, len(images), height, width, 3), 255, np.uint8)
    for cell, image in zip(cells[0], images, strict=True):
        cell[: image.shape[0], : image.shape[1]] = image
    return grid(cells, scale)


def _shrunk(image: np.ndarray, factor: float) -> np.ndarray:
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def compared(blocks: Mapping[str, np.ndarray], captions: Sequence[str], scale: int = 6) -> Image.Image:
    """The same prompts and seeds by several models: a block of rows each, with its label; columns are prompts.

    blocks: uint8 [prompts, H, W, 3] each, or [seeds, prompts, H, W, 3] for several rows a block.
    Raises ValueError if their shapes differ or there is not one caption per prompt.
    """
    shapes = {label: list(images.shape) for label, images in blocks.items()}
    if len(set(map(tuple, shapes.values()))) != 1:
        raise ValueError(f"the blocks have the shapes {shapes}; they must be equal")
    gap = max(2, scale // 2)
    grids = []
    for images in blocks.values():
        rows = images[None] if images.ndim == 4 else images
        grids.append(grid(rows, scale, captions if not grids else None, gap))
    font = ImageFont.load_default(16)
    measure = ImageDraw.Draw(grids[0])
    margin = int(max(measure.multiline_textbbox((0, 0), label, font=font)[2] for label in blocks)) + 24
    between, height = 4 * gap, grids[-1].height if len(grids) > 1 else 0
    size = (margin + grids[0].width + gap, sum(g.height for g in grids) + between * (len(grids) - 1) + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for number, (label, own) in enumerate(zip(blocks, grids, strict=True)):
        if number:
            draw.line(
                (margin + gap, top - between // 2, size[0] - 2 * gap, top - between // 2), fill="#d0d0d0", width=1
            )
        picture.paste(own, (margin, top))
        middle = top + own.height - (height or own.height) / 2
        draw.multiline_text((margin - 12, middle), label, fill="#111111", font=font, anchor="rm", align="right")
        top += own.height + between
    return picture


def intervals(name: str, rows: Mapping[str, tuple[float, float, float]], rule: float | None = None) -> str:
    """Values with their intervals, one line a row, as an <svg>; rows: label to (value, low, high), the first one on top.

    name: as for `panel`. rule: a vertical line, such as the rating of the anchor.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.5, 0.55 + 0.27 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if rule is not None:
            axes.axvline(rule, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for place, (value, low, high) in enumerate(rows.values()):
            axes.plot([low, high], [place, place], color=_SERIES[0], linewidth=1.9, alpha=0.55, solid_capstyle="round")
            axes.plot([value], [place], "o", color=_SERIES[0], markersize=5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8.5, length=0, pad=5)
        return _svg(figure)


def _wrap(text: str, font, width: float) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def over_training(samples: Path, budget: int, rows: int = 8) -> dict[str, Any] | None:
    """The monitor images of a run's samples folder, spread over training, first and last included.

    Returns {"prompts", "guidance", "width" of an image in pixels, "rows": [{"step", "images": [data URI]}]},
    of about `budget` bytes at most, or None if there are no samples. Half-written ones are left out.
    """
    found = [read for path in sorted(samples.glob("step_*.json")) if (read := _sample_row(path))]
    found = [(about, cells) for about, cells in found if about["prompts"] == found[-1][0]["prompts"]]
    if not found:
        return None
    about, cells = found[-1]
    each = sum(len(data_uri(cell)) for cell in cells)
    rows = min(len(found), max(2, min(rows, budget // each)))
    chosen = [found[round(i)] for i in np.linspace(0 if rows > 1 else len(found) - 1, len(found) - 1, rows)]
    shown = [{"step": row["step"], "images": [data_uri(cell) for cell in images]} for row, images in chosen]
    return {**about, "width": cells[0].width, "rows": shown}


def _sample_row(path: Path) -> tuple[dict[str, Any], list[Image.Image]] | None:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        image = _open(path.with_suffix(".png"))
        prompts, step = [str(prompt) for prompt in about["prompts"]], int(about["step"])
        width = image.width // len(prompts)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    cells = [image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(len(prompts))]
    return {"step": step, "prompts": prompts, "guidance": about.get("guidance")}, cells


def groups(samples: Path, palette: Mapping[str, int], budget: int, ends: int = 3) -> list[dict[str, Any]]:
    """Best and worst images of the first and the last recorded group, with scores and advantages.

    Returns [{"step", "prompt", "size", "width", "best": [image], "worst": [image]}], where an image is
    {"src": data URI, "advantage", "scores": [{"name", "color", "value"}]}; at most `budget` bytes.
    """
    paths = sorted(samples.glob("group_*.json"))
    found = [read for path in paths[:1] + paths[1:][-1:] if (read := _group(path, palette, ends))]
    while sum(len(i["src"]) for g in found for i in g["best"] + g["worst"]) > budget:
        found = found[1:]
    return found


def _group(path: Path, palette: Mapping[str, int], ends: int) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        images = [_open(path.with_name(Path(name).name)) for name in about["images"]]
        shown = [
            {
                "src": data_uri(image),
                "advantage": about["advantages"][i] if about.get("advantages") else None,
                "scores": [
                    {"name": name, "color": palette.get(name, 0), "value": value}
                    for name, value in about["scores"][i].items()
                ],
            }
            for i, image in enumerate(images)
        ]
        width, ends = images[0].width, min(ends, max(1, len(shown) // 2))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    rest = shown[ends:]
    about = {
        "step": about.get("step"),
        "prompt": str(about.get("prompt", "")),
        "size": len(shown),
        "width": width,
    }
    return {**about, "best": shown[:ends], "worst": rest[-ends:]}


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def data_uri(image: Image.Image, largest: int = 256) -> str:
    """A data: URI of `image`, shrunk to `largest` pixels: PNG, or JPEG from 128 pixels on."""
    image = image.copy()
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "jpeg" if image.width >= 128 else "png"
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
