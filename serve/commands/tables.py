"""Tables and records for a terminal or a pipe. No width cuts or breaks a name that is typed again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAP = "  "


@dataclass(frozen=True, slots=True)
class _Row:
    cells: Sequence[str]
    style: str


class Table:
    """Holds rows of plain cells under headers, and prints itself as wide as its reader can show.

    A pipe gets each row on one line. A terminal gets its own width: columns without any value are left out,
    and cells fold between words. Where a single word would have to break, each row is printed as a record
    instead, as psql's `\\x auto` does. Headers that start with '>' are those of numbers, aligned right; with
    '!', of names with spaces in them, which do not fold either.
    """

    def __init__(self, *headers: str, title: str | None = None) -> None:
        self._headers = tuple(header.lstrip(">!") for header in headers)
        self._numeric = tuple(header.startswith(">") for header in headers)
        self._whole = tuple(header.startswith("!") for header in headers)
        self._title = title
        self._rows: list[_Row] = []

    @property
    def row_count(self) -> int:
        return len(self._rows)

    def add_row(self, *cells: str, style: str = "") -> None:
        if len(cells) != len(self._headers):
            raise ValueError(f"{len(cells)} cells for {len(self._headers)} columns")
        self._rows.append(_Row(cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title is not None:
            yield _line(self._title, "italic")
        width_max = options.max_width if console.is_terminal else None
        widths = self._widths(width_max)
        if widths is not None:
            yield from self._lines(console, widths)
            return
        for number, row in enumerate(self._rows):
            if number:
                yield Text()
            yield record(zip(self._headers, row.cells, strict=True), style=row.style)

    def _widths(self, width_max: int | None) -> dict[int, int] | None:
        """The width of each column that is shown, by its position. None if a word would have to break."""
        columns = {
            position: [header, *(row.cells[position] for row in self._rows)]
            for position, header in enumerate(self._headers)
        }
        if width_max is not None and self._rows:
            columns = {position: cells for position, cells in columns.items() if any(cells[1:])}
        widths = {position: max(map(cell_len, cells)) for position, cells in columns.items()}
        if width_max is None or not self._rows:
            return widths
        least = {
            position: max(
                cell_len(word)
                for cell in cells
                for word in ([cell] if self._whole[position] else cell.split() or [""])
            )
            for position, cells in columns.items()
        }
        available = width_max - len(GAP) * (len(columns) - 1)
        if sum(least.values()) > available:
            return None
        while sum(widths.values()) > available:
            foldable = [position for position in widths if widths[position] > least[position]]
            widths[max(foldable, key=widths.__getitem__)] -= 1
        return widths

    def _lines(self, console: Console, widths: dict[int, int]) -> Iterator[Text]:
        for row in (_Row(self._headers, "bold"), *self._rows):
            columns = [
                [self._aligned(line.plain.rstrip(), position, width) for line in wrapped]
                for position, width in widths.items()
                for wrapped in [Text(row.cells[position]).wrap(console, width or 1)]
            ]
            blanks = [" " * width for width in widths.values()]
            for parts in zip_longest(*columns):
                cells = (blank if part is None else part for part, blank in zip(parts, blanks, strict=True))
                yield _line(GAP.join(cells).rstrip(), row.style)

    def _aligned(self, text: str, position: int, width: int) -> str:
        padding = " " * (width - cell_len(text))
        return padding + text if self._numeric[position] else text + padding


def record(fields: Iterable[tuple[str, str]], *, style: str = "") -> Text:
    """Names and values, one pair a line; fields without a value are left out."""
    pairs = [(name, value) for name, value in fields if value]
    width = max((cell_len(name) for name, _ in pairs), default=0)
    lines = (Text.assemble((f"{name:<{width}}", "bold"), GAP, (value, style)) for name, value in pairs)
    return _line("\n", "").join(lines)


def _line(text: str, style: str) -> Text:
    """A line that is not wrapped here: the terminal wraps it, and a copy of it stays whole."""
    return Text(text, style, no_wrap=True, overflow="ignore")
