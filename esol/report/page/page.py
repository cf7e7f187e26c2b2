"""Writes RUN/report.html: what went in, what each stage came to, and a gallery of all photos.

With EMBEDDED photos or fewer the page is one file. With more it holds the thumbnails, and loads the rest from
report_files/ as scripts, so that it works without a server. Whatever comes from a run is escaped.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esol.base.files import atomic_write
from esol.base.palette import voc_palette
from esol.base.strangers import content, json_tree, refuse_links, without_following
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.pipeline import records
from esol.pipeline.records import Manifest
from esol.report.page import charts, layers
from esol.report.page.layers import CHUNK, FILES, Album, read_numbers
from esol.report.tables import best_masks, stage_rows, summary_rows

PAGE, FIRST = "report.html", "draw_first.csv"
EMBEDDED = 500  # photos that one file holds whole
MOST_METRICS = 1 << 30  # bytes of metrics.jsonl: of some ten million steps
FIRST_COUNT = 20  # photos to draw first


def write_page(run_dir: Path, config: Config, index: Index, reader: ShardReader, beat: layers.Beat) -> Path:
    """Writes the page anew from all stages that have finished, and returns its path; beat: tells the watchdog."""
    refuse_links(run_dir / FILES)
    album = Album(run_dir, index, reader, _photos(config, index), beat)
    found = records.manifests(run_dir)
    layers.write_photos(album)
    shown: list[dict[str, Any]] = [{"name": "photos", "kind": "photo"}]
    for name, own in found.items():
        if own.makes == "maps":
            layers.write_maps(album, name, own.output)
            sources = read_numbers(album.folder, name)["sources"]
            shown.append({"name": name, "kind": "maps", "sources": sources})
        elif own.makes in ("masks", "predictions"):
            layers.write_masks(album, name, own.output)
            shown.append({"name": name, "kind": "mask"})
    masks = index.members.get("mask.png")
    if masks is not None and (masks[album.ordinals, 0] >= 0).any():
        layers.write_truth(album)
        shown.append({"name": "truth", "kind": "mask"})
    best = best_masks(found)
    drawn = read_numbers(album.folder, "photos")
    about = _about(album, shown, best, drawn["shapes"])
    _write_first(run_dir, about)
    target, temporary = run_dir / PAGE, run_dir / f"{PAGE}.tmp"
    with open(temporary, "w", encoding="utf-8", opener=without_following) as page:
        for part in _parts(run_dir, config, album, found, about, drawn["thumbs"]):
            page.write(part)
    temporary.replace(target)
    return target


def _photos(config: Config, index: Index) -> np.ndarray:
    """Those of the splits that masks or predictions are made for, evenly spread where there are too many."""
    data = config.data
    names = {data.mask_split, data.score_split, data.eval_split, data.train_split} & index.splits.keys()
    ordinals = np.unique(np.concatenate([index.split(name) for name in sorted(names)]))
    if len(ordinals) > config.tracking.page:
        ordinals = ordinals[np.linspace(0, len(ordinals) - 1, config.tracking.page).astype(int)]
    return ordinals


def _about(album: Album, shown: list[dict[str, Any]], best: str, shapes: Sequence[Any]) -> dict[str, Any]:
    """What the gallery's script gets to know of every photo, without pictures."""
    index = album.index
    numbers = read_numbers(album.folder, best) if best else {}
    photos = [
        {
            "key": str(index.keys[ordinal]),
            "labels": album.labels(ordinal),
            "shape": shapes[i],
            "judge": numbers.get("judge", [None] * (i + 1))[i],
            "iou": numbers.get("iou", [None] * (i + 1))[i],
            "lost": numbers.get("lost", [[]] * (i + 1))[i],
        }
        for i, ordinal in enumerate(album.ordinals.tolist())
    ]
    colours = [f"rgb({r},{g},{b})" for r, g, b in voc_palette()[: len(index.classes) + 1].tolist()]
    whole = len(photos) <= EMBEDDED
    return {"classes": list(index.classes), "colours": colours, "layers": shown, "photos": photos, "best": best,
            "chunk": CHUNK, "files": "" if whole else FILES}  # fmt: skip


def _write_first(run_dir: Path, about: Mapping[str, Any]) -> None:
    """draw_first.csv: the photos whose masks the judge trusts least, which are worth drawing first."""
    if not about["best"]:
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("photo", "judge", "classes that its mask lacks"))
    for photo in _first_photos(about):
        rows.writerow((photo["key"], photo["judge"], ";".join(about["classes"][c] for c in photo["lost"] or ())))
    atomic_write(run_dir / FIRST, text.getvalue())


def _first_photos(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    photos = about["photos"]
    places = least_trusted([photo["judge"] for photo in photos], [photo["lost"] for photo in photos])
    return [photos[place] for place in places[:FIRST_COUNT]]


def least_trusted(judge: list[float | None], lost: list[list[int] | None]) -> list[int]:
    """Places of the photos that have a mask to be judged: those that lack a class first, then by rising judge."""
    known = [i for i, value in enumerate(judge) if value is not None]
    return sorted(known, key=lambda i: (not lost[i], judge[i], i))


def _parts(
    run_dir: Path,
    config: Config,
    album: Album,
    found: Mapping[str, Manifest],
    about: Mapping[str, Any],
    thumbs: Sequence[str],
) -> Iterator[str]:
    static = files("esol.report.page")
    style, script = (static.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = escape(run_dir.resolve().name)
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{style}</style></head><body><header><h1>{title}</h1>"
    yield f"<p>{escape(_sentence(album, found, about))}</p>"
    yield "<nav><a href=#gallery>Photos</a> <a href=#chain>Stages</a> <a href=#charts>Charts</a> "
    yield "<a href=#pictures>Pictures</a></nav></header><main>"
    yield _gallery(about)
    yield _first(about)
    yield _chain(config, found)
    yield _charts(run_dir, album, found)
    yield from _pictures(run_dir)
    yield f"</main><footer>esol, {time.strftime('%Y-%m-%d %H:%M')}. The numbers: esol report {title}."
    yield " DeepLab needs no label to predict.</footer>"
    yield f"<script>const ABOUT={layers.script(about)};\n{script}</script>"
    for start in range(0, len(thumbs), 500):
        yield f"<script>ESOL.thumbs({layers.script(thumbs[start : start + 500])})</script>\n"
    if not about["files"]:
        for layer in about["layers"]:
            for start in range(0, len(album.ordinals), CHUNK):
                name = f"{layer['name']}-{start // CHUNK:04d}.js"
                yield f"<script>{(album.folder / name).read_text()}</script>\n"
    yield "<script>ESOL.start()</script></body></html>\n"


def _sentence(album: Album, found: Mapping[str, Manifest], about: Mapping[str, Any]) -> str:
    shown = sum(bool(photo["labels"]) for photo in about["photos"])
    empty = len(about["photos"]) - shown
    text = f"{len(about['photos'])} photos"
    if len(about["photos"]) < len(album.index):
        text += f" of the {len(album.index)} in the shards"
    text += f", {len(album.index.classes)} class{'es' if len(album.index.classes) > 1 else ''}"
    text += f", {empty} photos without any object" if empty else ""
    if about["best"]:
        text += f". The judge, which needs no drawn masks, takes the masks of {about['best']}"
    return f"{text}. Stages that have finished: {', '.join(found)}."


def _gallery(about: Mapping[str, Any]) -> str:
    counts = [0] * len(about["classes"])
    for photo in about["photos"]:
        for c in photo["labels"]:
            counts[c] += 1
    legend = "".join(
        f'<button type=button class=class data-class="{i}"><i style="background:{colour}"></i>{escape(name)} '
        f"<small>{count}</small></button>"
        for i, (name, colour, count) in enumerate(zip(about["classes"], about["colours"][1:], counts, strict=True))
    )
    scored = any(photo["iou"] is not None for photo in about["photos"])
    orders = [("worst", "worst IoU first")] if scored else []
    orders += [("trust", "least trusted by the judge first"), ("name", "by name"), ("class", "by class")]
    options = "".join(f'<option value="{value}">{words}</option>' for value, words in orders)
    return f"""<section id=gallery><h2>Photos</h2>
<noscript><p>The gallery needs JavaScript. <a href=#pictures>The pictures below</a> show some photos after every
stage.</p>
<style>#grid,#legend,.tools{{display:none}}</style></noscript>
<div class=tools><div id=layers role=group aria-label="what is shown"></div>
<label>threshold <input id=threshold type=range min=0 max=100 value=0> <output id=level>map</output></label>
<label>order <select id=order>{options}</select></label></div>
<div id=legend aria-label="classes, click one to see its photos alone">{legend}</div>
<div id=grid tabindex=0 aria-label="all photos; arrow keys move, Enter opens one"><div id=room></div></div></section>
<dialog id=large aria-label="one photo"><form method=dialog><button aria-label=close>&#215;</button></form>
<h3 id=caption></h3><div id=views></div><p class=hint>arrow keys: next photo, Esc: back</p></dialog>"""


def _first(about: Mapping[str, Any]) -> str:
    items = []
    for photo in _first_photos(about):
        lost = ", ".join(about["classes"][c] for c in photo["lost"] or ())
        items.append(f"<li>{escape(photo['key'])}{f' (lacks {escape(lost)})' if lost else ''}</li>")
    if not items:
        return ""
    return (
        f"<details><summary>Draw these {len(items)} first: the photos whose masks of {escape(about['best'])} the judge "
        f"trusts least, also in {FIRST}</summary><ol>{''.join(items)}</ol></details>"
    )


def _chain(config: Config, found: Mapping[str, Manifest]) -> str:
    rows = []
    made = {row.name: row for row in stage_rows(found)}
    for name in dict.fromkeys((*config.stages, *found)):
        if name not in made:
            rows.append(f"<tr class=todo><th>{escape(name)}</th><td colspan=4>not yet</td></tr>")
            continue
        row = made[name]
        cells = (f"{row.seconds:.0f}", _number(row.judge), _number(row.miou), row.remark)
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    total = sum(row.seconds for row in made.values())
    head = "<tr><th>stage</th><th>seconds</th><th>judge</th><th>mIoU</th><th></th></tr>"
    scores = "".join(
        f"<tr><th>{escape(what)}</th><td>{escape(one.split)}</td><td>{_number(one.miou)}</td>"
        f"<td>{_number(one.precision)}</td><td>{_number(one.recall)}</td></tr>"
        for what, one, _ in summary_rows(found)
    )
    if scores:
        names = "<tr><th>of</th><th>split</th><th>mIoU</th><th>precision</th><th>recall</th></tr>"
        scores = f"<h3>Against the drawn masks</h3><table>{names}{scores}</table>"
    return (
        f"<section id=chain><h2>Stages</h2><table>{head}{''.join(rows)}</table><p>{total / 60:.1f} minutes in all. The "
        "judge ranks masks without any drawn ones, by the photo's edges and its labels; higher is better, and 1 is a "
        f"mask that knows nothing of the photo.</p>{scores}</section>"
    )


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def _charts(run_dir: Path, album: Album, found: Mapping[str, Manifest]) -> str:
    index = album.index
    drawn: list[str] = []
    if index.labels is not None:
        counts = dict(zip(index.classes, index.labels[album.ordinals].sum(0).tolist(), strict=True))
        drawn.append(charts.bars("Photos of each class", counts, "photos"))
    drawn += [
        charts.lines(f"Loss of {name}", {"loss": points}, "step", "loss") for name, points in _losses(run_dir).items()
    ]
    for name, own in found.items():
        if curves := _read(run_dir / name / "curves.json"):
            by_threshold = {s: [(p["threshold"], p["miou"] or np.nan) for p in rows] for s, rows in curves.items()}
            drawn.append(charts.lines(f"{name}: mIoU by threshold", by_threshold, "threshold", "mIoU, %"))
            ways = {s: [(p["recall"] or np.nan, p["precision"] or np.nan) for p in rows] for s, rows in curves.items()}
            drawn.append(charts.lines(f"{name}: precision over recall", ways, "recall, %", "precision, %"))
        if own.last_scores and own.last_scores.classes:
            values = {label: one.get("iou", np.nan) for label, one in own.last_scores.classes.items()}
            drawn.append(charts.bars(f"IoU of {name}", values, "%", 100))
        if matrix := _read(run_dir / name / "confusion.json"):
            drawn.append(charts.confusion(f"{name}: true label by row, %", matrix, ("background", *index.classes)))
    return f"<section id=charts><h2>Charts</h2><div class=charts>{''.join(drawn)}</div></section>"


def _losses(run_dir: Path) -> dict[str, list[tuple[float, float]]]:
    """Stage -> (step, loss); a step that was logged twice, after a resume, counts as the later."""
    points: dict[str, dict[int, float]] = {}
    path = run_dir / "metrics.jsonl"
    text = content(path, MOST_METRICS).decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        if '"loss"' not in line:
            continue
        try:
            record = json_tree(line)
            stage, step, loss = record["stage"], int(record["step"]), record["metrics"]["loss"]
            if loss is not None:
                points.setdefault(str(stage), {})[step] = float(loss)
        except (ValueError, KeyError, TypeError):
            continue
    return {stage: sorted(own.items()) for stage, own in points.items()}


def _read(path: Path) -> Any:
    return json_tree(content(path)) if path.exists() else None


def _pictures(run_dir: Path) -> Iterator[str]:
    """The sheets that stages have drawn, as JPEG: what a browser without JavaScript has to look at."""
    yield "<section id=pictures><h2>Pictures after each stage</h2>"
    stages = list(records.manifests(run_dir))
    paths = sorted((run_dir / "pictures").glob("*.png"), key=lambda p: stages.index(p.stem) if p.stem in stages else -1)
    for path in paths:
        with Image.open(io.BytesIO(content(path)), formats=["PNG"]) as sheet:
            data = layers.encoded(sheet.convert("RGB"), "JPEG", quality=75)
        name = escape(path.stem)
        picture = f'<img loading=lazy alt="{name}" src="data:image/jpeg;base64,{data}">'
        yield f"<details open><summary>{name}</summary>{picture}</details>"
    yield "</section>"
