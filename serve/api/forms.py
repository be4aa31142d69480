"""Reads multipart/form-data with one file, and writes the file to disk as it comes (RFC 7578).

Fields and the number of parts are bounded here; the file's draft bounds the file.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.client_data.files import Draft
from serve.errors import InvalidRequest

FIELD_BYTES_MAX = 1024
HEADER_BYTES_MAX = 4096
PARTS_MAX = 16


class FileForm:
    """Reads one form. `fields` holds its texts; `filename` is None until a file has come.

    file_field: the name of the file's field. `read` also raises what the draft raises.
    """

    def __init__(self, content_type: str, draft: Draft, file_field: str = "file") -> None:
        """Raises InvalidRequest if the body is not a form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
            raise InvalidRequest("Send the file as multipart/form-data.", file_field, "invalid_content_type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._draft = draft
        self._file_field = file_field
        self._parts = 0
        self._in_file = False
        self._name = ""
        self._value = bytearray()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._pieces: list[bytes] = []
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": lambda data, start, end: self._on_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._on_header(1, data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": lambda data, start, end: self._on_data(data[start:end]),
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Raises InvalidRequest for a malformed form, or one without a file."""
        try:
            async for piece in body:
                self._parser.write(piece)
                if self._pieces:
                    await asyncio.to_thread(self._flush)
        except FormParserError as error:
            raise InvalidRequest("The form is malformed.", None, "invalid_value") from error
        if not self._ended:
            raise InvalidRequest("The form ends too early.", None, "invalid_value")
        if self.filename is None:
            name = self._file_field
            raise InvalidRequest(f"'{name}' is missing.", name, "missing_required_parameter")

    def _flush(self) -> None:
        for piece in self._pieces:
            self._draft.write(piece)
        self._pieces.clear()

    def _on_part(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise InvalidRequest(f"The form may have {PARTS_MAX} parts.", None, "invalid_value")
        self._in_file, self._name, self._disposition = False, "", b""
        self._value.clear()

    def _on_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if len(self._header[which]) > HEADER_BYTES_MAX:
            raise InvalidRequest("A part's header is too long.", None, "invalid_value")

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name != self._file_field:
            return
        if self.filename is not None:
            raise InvalidRequest("Send one file at a time.", self._file_field, "invalid_value")
        self._in_file = True
        self.filename = filename_of(self._disposition, options.get(b"filename", b""))

    def _on_data(self, data: bytes) -> None:
        if self._in_file:
            self._pieces.append(data)
            return
        self._value.extend(data)
        if len(self._value) > FIELD_BYTES_MAX:
            raise InvalidRequest(f"'{self._name[:64]}' is too long.", self._name[:64], "invalid_value")

    def _on_part_end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self._ended = True


def filename_of(disposition: bytes, plain: bytes) -> str:
    """The file's name: of `filename*` (RFC 5987), else `plain`, the value of `filename`.

    .NET's clients send both, the plain one as an encoded word (RFC 2047). RFC 7578 wants UTF-8 bytes in it,
    as all other clients send them. A value that cannot be decoded stays as it is.
    """
    if extended := _EXTENDED.search(_QUOTED.sub(b"", disposition)):
        charset, value = (part.decode("latin-1") for part in extended.groups())
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return unquote_to_bytes(value).decode(charset)
    name = plain.decode(errors="replace")
    if _ENCODED_WORD.fullmatch(name):
        with contextlib.suppress(HeaderParseError, UnicodeDecodeError, LookupError, ValueError):
            return str(make_header(decode_header(name))) or name
    return name


# The charset, the language and the percent-encoded value, outside of what stands in quotes.
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*([\w.:-]+)'[\w-]*'([^\s;]*)", re.IGNORECASE)
_ENCODED_WORD = re.compile(r"(=\?[\w.:*-]+\?[bq]\?[^?\s]*\?=\s*)+", re.IGNORECASE)
