"""Every path that is answered, and the role that it needs: what is not in this table does not exist.

The table is asked for the path as it was sent, byte for byte. `//generate`, `/%67enerate` and `/Generate` are other
paths, so no spelling of a path can reach a route by another rule than its own.
"""

from __future__ import annotations

from server.generation import Problem
from server.http.errors import HttpError

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"

INFER, METRICS, ADMIN = "infer", "metrics", "admin"

# None: open to everyone. Whoever asks for them learns that a process is there, and whether it is ready.
ROLE_OF: dict[str, str | None] = {
    "/generate": INFER,
    COMPLETIONS: INFER,
    CHAT: INFER,
    MODELS: INFER,
    "/tokenize": INFER,
    "/detokenize": INFER,
    "/plan": INFER,
    "/info": INFER,
    "/livez": None,
    "/readyz": None,
    "/health": None,
    "/metrics": METRICS,
}
DOCUMENTATION: dict[str, str | None] = {"/docs": INFER, "/openapi.json": INFER}
ROUTES = tuple(ROLE_OF)
GENERATING = ("/generate", COMPLETIONS, CHAT)

# What an API of this kind has, and what is missing for it here.
_NOT_SERVED = {b"/v1/embeddings": "No encoder model is served here, so there are no embeddings."}

# The page and its files. They are open: they are the same everywhere, and what the page asks for, it asks with a key.
PAGE = "/"
PAGE_FILES = (
    *("style.css", "icon.svg"),
    *("app.js", "api.js", "code.js", "controls.js", "dom.js", "filters.js", "forms.js", "inspector.js", "next.js"),
    *("output.js", "panel.js", "parameters.js", "prompt.js", "run.js", "server.js", "snippets.js", "words.js"),
)
PAGE_PATHS = {PAGE: "index.html", **{f"/static/{name}": name for name in PAGE_FILES}}

# The one route with a part that varies. A model's name may hold a slash, and clients encode it or do not.
_ONE_MODEL = MODELS + "/"


def find_route(raw_path: bytes, documented: bool = False) -> str | None:
    """The route of a path as it was sent; None if there is none. All files of the page are one route, the page."""
    path = raw_path.decode("latin-1")
    if path in PAGE_PATHS:
        return PAGE
    if path in ROLE_OF or (documented and path in DOCUMENTATION):
        return path
    return MODELS if path.startswith(_ONE_MODEL) and len(path) > len(_ONE_MODEL) else None


def role_of(route: str) -> str | None:
    """The role that a route needs; None if it is open."""
    if route == PAGE:
        return None
    return ROLE_OF[route] if route in ROLE_OF else DOCUMENTATION[route]


def not_found(raw_path: bytes = b"") -> HttpError:
    """The answer to a path that is not in the table. The path is not repeated: an answer holds nothing that could be
    taken for markup."""
    if raw_path in _NOT_SERVED:
        return HttpError("unsupported", [Problem(None, _NOT_SERVED[raw_path])])
    return HttpError("not_found", [Problem(None, f"No such route. There are {', '.join(ROUTES)}.")])
