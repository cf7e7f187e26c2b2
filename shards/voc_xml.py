"""What a PASCAL VOC annotation names: XML of any encoding, without entities, which can make a file endless."""

from __future__ import annotations

import codecs
import re
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from esol.base.errors import DataError
from shards.inputs import read_bytes
from shards.names import matcher, tidy
from shards.samples import check_labels

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_STARTS = (  # byte order marks, UTF-32's before UTF-16's that they start with; then "<" without a mark
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)


def labels_of(name: str) -> set[str]:
    """The classes of all objects of an annotation, case and spaces aside; DataError names file and object."""
    tree = _parse(_text(read_bytes(name), name), name)
    match = matcher(CLASSES)
    found = []
    for number, thing in enumerate(tree.iter("object"), 1):
        label = tidy(thing.findtext("name", ""))
        if not label:
            raise DataError(f"{name}: object {number} has no name")
        found.append(match(label))
    return set(check_labels(found, CLASSES, name))


def _text(data: bytes, name: str) -> str:
    """By byte order mark, else by zero bytes, else as the file declares, else UTF-8."""
    if not data.strip():
        raise DataError(f"{name} is empty")
    encodings = [encoding for start, encoding in _STARTS if data.startswith(start)]
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"']", data[:300])
    encoding = encodings[0] if encodings else declared[1].decode() if declared else "utf-8"
    if not encodings and encoding.lower().startswith(("utf-16", "utf16", "utf-32", "ucs-2", "unicode")):
        encoding = "utf-8"  # such a declaration without a zero byte was copied from memory to the file
    try:
        return data.decode(encoding)
    except (LookupError, UnicodeError) as error:
        raise DataError(f"{name} is not text of the encoding {encoding}: {error}") from error


def _parse(text: str, name: str) -> Element:
    builder = TreeBuilder()
    parser = expat.ParserCreate("utf-8")  # whatever the file declares, since it is decoded by now

    def refuse(entity: str, *_: object) -> None:
        raise DataError(f"{name} has the entity {entity}; annotations need none, and they can make a file endless")

    parser.EntityDeclHandler = parser.SkippedEntityHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(text.strip().encode(), True)
        return builder.close()
    except (expat.ExpatError, UnicodeError) as error:
        raise DataError(f"{name} is not valid XML: {error}") from error
