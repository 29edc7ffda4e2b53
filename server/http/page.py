"""The page at `/`: files that are read once, and sent with a policy that lets them reach nothing but this server."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

from server.http.routes import PAGE_PATHS

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script or style, nobody else's files, no frame, no form that is sent anywhere, no text that becomes markup.
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    # Kept, and asked for again: a new version of the server is a new page at once.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent. tag: its ETag, weak since it stands for both encodings."""

    content_type: str
    plain: bytes
    packed: bytes
    tag: str

    @classmethod
    def of(cls, path: Path) -> PageFile:
        """Read and compress it. Raises OSError."""
        plain = path.read_bytes()
        tag = f'W/"{hashlib.sha256(plain).hexdigest()[:32]}"'
        return cls(_TYPES[path.suffix], plain, gzip.compress(plain, mtime=0), tag)

    def answer(self, headers: Headers) -> Response:
        """200 with the file, or 304 to who has it already. headers: those of the request."""
        sent = _HEADERS | {"etag": self.tag}
        if self.tag in (tag.strip() for tag in headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=sent)
        sent["content-type"] = self.content_type
        if "gzip" in (name.strip() for name in headers.get("accept-encoding", "").split(",")):
            return Response(self.packed, headers=sent | {"content-encoding": "gzip"})
        return Response(self.plain, headers=sent)


def page_files() -> dict[str, PageFile]:
    """Every file of the page by its path."""
    return {path: PageFile.of(_FOLDER / name) for path, name in PAGE_PATHS.items()}
