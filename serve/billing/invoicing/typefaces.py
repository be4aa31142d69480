"""Typefaces choose and cut the fonts that a document's text needs, whatever fonts the machine has.

Noto Sans covers the alphabets, Noto Sans CJK covers Chinese, Japanese and Korean. Both are packages of the
lock file, under the SIL Open Font License. What no font covers is named, so that it can be refused in time.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import regex
from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont, newTable
from fontTools.varLib.instancer import instantiateVariableFont

REGULAR, BOLD = 400, 700
# Letters without a glyph: joiners, marks of direction, and places where a line may or may not end.
INVISIBLE = frozenset("\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060")
UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
CJK_REGIONS = ("JP", "KR", "SC", "TC")  # the first faces of the collection, in its order


@dataclass(frozen=True, slots=True)
class Typeface:
    """Names one face of a font file. `number` is its position in a collection."""

    name: str
    path: Path
    number: int = -1

    @property
    def has_weights(self) -> bool:
        return self.number < 0


@cache
def _alphabets() -> tuple[Typeface, ...]:
    """Returns Noto Sans, then its siblings for one script each, symbols last."""
    paths = [Path(str(path)) for path in files("manimgx_fonts").iterdir()]
    upright = {path.name.partition("[")[0]: path for path in paths if path.suffix == ".ttf"}
    names = sorted(upright.keys() - {"NotoEmoji", "NotoSans-Italic", "NotoSansSymbols", "NotoSans"})
    return tuple(Typeface(name.lower(), upright[name]) for name in ("NotoSans", *names, "NotoSansSymbols"))


@cache
def _covered(face: Typeface) -> frozenset[int]:
    with TTFont(face.path, fontNumber=face.number, lazy=True) as font:
        return frozenset(font.getBestCmap())


def typefaces_of(text: str) -> tuple[Typeface, ...]:
    """Returns the fonts for `text`, in the order in which a letter is looked for."""
    collection = Path(str(files("noto_cjk_sans_otc") / "NotoSansCJK-Regular.ttc"))
    region = _region(text)
    return *_alphabets(), Typeface(f"notosanscjk{region.lower()}", collection, CJK_REGIONS.index(region))


def _region(text: str) -> str:
    """Tells whose forms of Chinese characters `text` has: by its kana or hangul, else by its characters."""
    if regex.search(r"[\p{Hiragana}\p{Katakana}]", text):
        return "JP"
    if regex.search(r"\p{Hangul}", text):
        return "KR"
    characters = "".join(regex.findall(r"[\p{Han}\p{Bopomofo}]", text))
    try:
        characters.encode("gb2312")
    except UnicodeEncodeError:
        return "TC" if _is_encodable(characters, "big5") else "SC"
    return "SC"


def _is_encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def clusters(text: str) -> Iterator[str]:
    """Splits `text` into what a reader takes for one letter each: a base with its marks, composed."""
    for cluster in regex.findall(r"\X", text):
        yield unicodedata.normalize("NFC", cluster) if len(cluster) > 1 else cluster


def typeface_of(cluster: str, faces: tuple[Typeface, ...]) -> Typeface | None:
    """Returns the first font that has the whole cluster, or None."""
    letters = [letter for letter in cluster if letter not in INVISIBLE]
    if any(unicodedata.category(letter) in UNPRINTABLE for letter in letters):
        return None
    return next((face for face in faces if _covered(face).issuperset(map(ord, letters))), None)


def unprintable(text: str) -> list[str]:
    """Returns the clusters of `text` that no font has, each once, in their order."""
    if is_plain(text):
        return []
    faces = typefaces_of(text)
    wanted = (cluster for cluster in dict.fromkeys(clusters(text)) if not is_plain(cluster))
    return [cluster for cluster in wanted if typeface_of(cluster, faces) is None]


def described(cluster: str) -> str:
    """Names a cluster for a message: the letter, and its code points."""
    points = " ".join(f"U+{ord(letter):04X}" for letter in cluster[:8])
    shown = "".join(letter for letter in cluster if unicodedata.category(letter) not in UNPRINTABLE)
    return f"'{shown[:8]}' ({points})" if shown else points


def is_plain(text: str) -> bool:
    """Tells whether the fonts that every PDF reader has cover `text`: they have printable Latin-1."""
    return all(letter == "\n" or " " <= letter <= "~" or "\xa0" <= letter <= "\xff" for letter in text)


@lru_cache(maxsize=128)  # a customer's documents have the same letters month after month
def cut(face: Typeface, letters: frozenset[str], weight: int) -> bytes:
    """Returns a font of `letters` alone, in one weight, with what joins and places them."""
    font = TTFont(face.path, fontNumber=face.number, lazy=True, recalcTimestamp=False)
    options = Options()
    options.notdef_outline = True
    options.drop_tables += ["BASE", "STAT", "VORG", "vhea", "vmtx"]
    if weight == REGULAR:  # the weight that a variable font's outlines have
        options.drop_tables += ["fvar", "gvar", "avar", "HVAR", "MVAR", "cvar"]
    subsetter = Subsetter(options)
    subsetter.populate(text="".join(letters | {" "}))
    subsetter.subset(font)
    if "fvar" in font:
        instantiateVariableFont(font, {"wght": weight}, inplace=True, static=True)
    if "CFF " in font:
        _draw_with_quadratics(font)
    buffer = BytesIO()
    font.save(buffer)
    font.close()
    return buffer.getvalue()


def _draw_with_quadratics(font: TTFont) -> None:
    """Turns a font's cubic outlines into TrueType's, which every reader of PDF draws and copies well."""
    order, outlines = font.getGlyphOrder(), font.getGlyphSet()
    glyphs = {}
    for name in order:
        pen = TTGlyphPen(None)
        outlines[name].draw(Cu2QuPen(pen, 0.5, reverse_direction=True))
        glyphs[name] = pen.glyph()
    font["loca"], font["glyf"] = newTable("loca"), newTable("glyf")
    font["glyf"].glyphOrder, font["glyf"].glyphs = order, glyphs
    del font["CFF "]
    maxp = font["maxp"]
    maxp.tableVersion = 0x00010000
    for name in ("maxZones", "maxTwilightPoints", "maxStorage", "maxFunctionDefs", "maxInstructionDefs"):
        setattr(maxp, name, 0)
    maxp.maxStackElements = maxp.maxSizeOfInstructions = 0
    maxp.maxComponentElements = maxp.maxComponentDepth = 0
    font["post"].formatType, font["post"].extraNames, font["post"].mapping = 2.0, [], {}
    font["post"].glyphOrder = order
    font.sfntVersion = "\x00\x01\x00\x00"
