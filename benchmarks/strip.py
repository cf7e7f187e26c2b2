"""The README's picture: what a run makes of a photo that it has never seen, from one word that says what is in it.

python -m benchmarks.strip RUN PHOTO LABEL OUT.jpg

RUN has classify to psa; docs/cat.jpg is scikit-image's chelsea.png by a run of benchmarks.transfer's animals-3131.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from esol.config import MapsConfig, WalkConfig
from esol.data.index import Index
from esol.data.transforms import decode, within
from esol.models.affinity_net import AffinityNet
from esol.models.regrid import squeeze_to_grid
from esol.ops.class_maps import class_maps
from esol.ops.pseudo_labels import psa_scores, pseudo_masks
from esol.pipeline import records
from esol.pipeline.cam import new_backbone, ran_with_maps, trained_heads
from esol.pipeline.weights import restore
from esol.report.pictures import Pixels, heat, paint

SIDE, TILE, MARGIN = 500, 320, 8  # pixels: the photo as the networks see it, a tile, and between tiles


@torch.no_grad()
def tiles(run: Path, photo: Path, label: str) -> dict[str, Pixels]:
    """The photo, every head's class map of the label, and the mask of PSA and the CRF."""
    config = ran_with_maps(run)
    classes = Index.load(config.data.root).classes
    image, own = within(decode(photo.read_bytes(), str(photo)), SIDE), config.section(MapsConfig)
    labels = torch.zeros(1, len(classes))
    labels[0, classes.index(label)] = 1
    heads = trained_heads(config, len(classes)).eval()
    maps = class_maps([image], labels, heads, scales=own.scales, flip=own.flip, long_side=own.long_side)[0]
    pixels = image.permute(1, 2, 0).numpy()
    found = {"photo": pixels}
    names = {"cam": "where a classifier looks", "expand": "Expansion", "shrink": "Shrinkage"}
    found |= {names[source]: heat(pixels, one.full[0].numpy()) for source, one in maps.items() if source in names}
    config = records.ran_with(run, "psa_masks")
    net = restore(AffinityNet(new_backbone(config, output_stride=8)), config, "psa").eval()
    walk: WalkConfig = config.named("psa_masks")
    last = list(maps.values())[-1]
    scores = psa_scores([last.low], [net(squeeze_to_grid(image, 8))[0]], [(image.shape[1], image.shape[2])], walk)
    [(_, mask)] = pseudo_masks([image], scores, [last.classes], walk)
    found["mask"] = paint(pixels, mask.numpy())
    return found


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    found = tiles(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    height = round(TILE * next(iter(found.values())).shape[0] / next(iter(found.values())).shape[1])
    strip = Image.new("RGB", (len(found) * (TILE + MARGIN) - MARGIN, height + 28), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(17)
    for column, (heading, pixels) in enumerate(found.items()):
        left = column * (TILE + MARGIN)
        strip.paste(Image.fromarray(pixels).resize((TILE, height), Image.Resampling.LANCZOS), (left, 28))
        draw.text((left + 2, 3), heading, fill="black", font=font)
    strip.save(sys.argv[4], quality=88)


if __name__ == "__main__":
    main()
