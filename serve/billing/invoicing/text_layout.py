"""Text layout sets text of any script on PDF pages: fonts, shapes and directions.

fpdf2 sets the lines. It splits a text into fragments by script, which cuts marks off their letters, and keeps
only two levels of direction, which turns numbers within right-to-left words around. So fragments are made
here: by direction (UAX #9), font and script, and a line's fragments are put in order by level (rule L2).
"""

from collections.abc import Iterable, Sequence
from itertools import count, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fpdf import FPDF
from fpdf.bidi import BidiParagraph
from fpdf.enums import TextDirection, TextMode
from fpdf.line_break import Fragment, TextLine
from fpdf.unicode_script import UnicodeScript, get_unicode_script

from serve.billing.invoicing.typefaces import (
    BOLD,
    REGULAR,
    Typeface,
    clusters,
    cut,
    is_plain,
    typeface_of,
    typefaces_of,
)

Item = TypeVar("Item")

STROKE = 0.02  # of the letter's size: how much bolder a font without a bold weight is drawn
# Fonts whose letters stand side by side, one glyph each: readers copy them right without more.
UNJOINED = ("notosanscjk", "notosanshebrew", "notosansarmenian", "notosansgeorgian", "notosanssymbols")
NEUTRAL = (UnicodeScript.COMMON, UnicodeScript.INHERITED, UnicodeScript.UNKNOWN)


class _Fragment(Fragment):  # type: ignore[misc] # fpdf2 is not typed
    """Carries its text as it was typed, for readers that copy: shaping reorders and joins letters."""

    def render_pdf_text(self, *args: Any, **settings: Any) -> str:
        shown = str(super().render_pdf_text(*args, **settings))
        typed = self.string.encode("utf-16-be").hex().upper()
        return f"/Span <</ActualText <FEFF{typed}>>> BDC {shown} EMC" if shown else shown


class _Line(TextLine):  # type: ignore[misc] # fpdf2 is not typed
    """Orders the fragments of a line by their levels of direction."""

    def get_ordered_fragments(self) -> list[Fragment]:
        return visual_order([(_level(fragment), fragment) for fragment in self.fragments])


class TextSheet(FPDF):  # type: ignore[misc] # fpdf2 is not typed
    """Sets `text`, which every font needed is cut for. Text outside of it must be ASCII."""

    def __init__(self, text: str) -> None:
        super().__init__(format="A4", unit="mm")
        aliases = (f"{{nb{number}}}" for number in count())
        self.alias_nb_pages(next(alias for alias in aliases if alias not in text))
        self.family = "helvetica"
        self._faces: tuple[Typeface, ...] = ()
        if not is_plain(text):
            self._faces = typefaces_of(text)
            self._letters = {face: set[str]() for face in self._faces}
            self._letters[self._faces[0]].update(map(chr, range(0x20, 0x7F)))
            self._sort(text)
            self._folder = TemporaryDirectory(prefix="bespoke-fonts-")
            self.family = self._faces[0].name
            for style in ("", "B"):
                self._font(self._faces[0], style)
            self.set_text_shaping(True)

    def _sort(self, text: str) -> None:
        for cluster in set(clusters(text)):
            face = typeface_of(cluster, self._faces)
            if face is not None:
                self._letters[face].update(cluster)

    def _font(self, face: Typeface, style: str) -> Any:
        """Returns the font of the document's letters in `face`, cut when the first of them is set."""
        key = face.name + style
        if key not in self.fonts:
            path = Path(self._folder.name) / f"{key}.ttf"
            path.write_bytes(cut(face, frozenset(self._letters[face]), BOLD if style else REGULAR))
            self.add_font(face.name, style, path)
        return self.fonts[key]

    def pdf(self) -> bytes:
        """Returns the finished document."""
        try:
            return bytes(self.output())
        finally:
            if self._faces:
                self._folder.cleanup()

    def _preload_bidirectional_text(self, text: str, markdown: bool) -> Sequence[Fragment]:
        if not self._faces or self.in_footer:
            fragments: Sequence[Fragment] = super()._preload_bidirectional_text(text, markdown)
            return fragments
        lines = text.split("\n")
        made: list[Fragment] = []
        for number, line in enumerate(lines):
            made.extend(self._fragments(line))
            if number < len(lines) - 1:
                made.append(self._fragment("\n", self._faces[0], 0))
        return made

    def _fragments(self, line: str) -> Iterable[Fragment]:
        characters = BidiParagraph("".join(clusters(line)), preserve_bn_chars=True).characters
        for level, run in groupby(characters, key=lambda character: int(character.embedding_level)):
            script, pending, face = UnicodeScript.COMMON, "", self._faces[0]
            for cluster in clusters("".join(character.character for character in run)):
                its_face = typeface_of(cluster, self._faces) or self._faces[0]
                its_script = get_unicode_script(cluster[0])
                its_script = script if its_script in NEUTRAL else its_script
                if pending and (its_face != face or (its_script != script and script not in NEUTRAL)):
                    yield self._fragment(pending, face, level)
                    pending = ""
                pending, face, script = pending + cluster, its_face, its_script
            if pending:
                yield self._fragment(pending, face, level)

    def _fragment(self, text: str, face: Typeface, level: int) -> Fragment:
        state = self._get_current_graphics_state()
        bold = "B" in self.font_style
        state.font_family = face.name
        state.current_font = self._font(face, "B" if bold and face.has_weights else "")
        if bold and not face.has_weights:
            state.text_mode, state.draw_color = TextMode.FILL_STROKE, state.text_color
            state.line_width = STROKE * self.font_size_pt
        direction = TextDirection.RTL if level % 2 else TextDirection.LTR
        state.text_shaping = {
            **self.text_shaping,
            "fragment_direction": direction,
            "paragraph_direction": direction,
            "level": level,
        }
        return (Fragment if face == self._faces[0] or face.name.startswith(UNJOINED) else _Fragment)(
            list(text), state, self.k
        )

    def _render_styled_text_line(self, text_line: TextLine, *args: Any, **settings: Any) -> bool:
        line = _Line(*text_line) if self._faces else text_line
        return bool(super()._render_styled_text_line(line, *args, **settings))


def visual_order(levelled: Sequence[tuple[int, Item]]) -> list[Item]:
    """Returns items in the order in which they are seen from the left, each given with its level."""
    order = list(levelled)
    odd_min = min((level for level, _ in order if level % 2), default=0)
    for level in range(max((level for level, _ in order), default=0), odd_min - 1 if odd_min else 0, -1):
        turned: list[tuple[int, Item]] = []
        for above, run in groupby(order, key=lambda pair: pair[0] >= level):
            part = list(run)
            turned.extend(reversed(part) if above else part)
        order = turned
    return [item for _, item in order]


def _level(fragment: Fragment) -> int:
    shaping = fragment.text_shaping_parameters
    return int((shaping or {}).get("level", 0))
