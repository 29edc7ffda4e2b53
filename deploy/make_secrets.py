"""Makes what docker-compose.yml reads as secrets: `python3 deploy/make_secrets.py`. Needs Python 3.11 and nothing else.

In deploy/secrets: keys.toml (hashes), the keys of Prometheus (role metrics) and of the load test (role infer), and
Grafana's password. Prints a key of your own, once. What is there already is left as it is.

The folder can be entered by its owner alone; the files in it can be read by all, since each container has a user of its
own, who sees only the file that is mounted for it.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.keys import create_key, parse_keys, read_keys  # noqa: E402

YOURS = "me"
ROLES = {"prometheus": "metrics", "loadtest": "infer"}


def make(folder: Path) -> str | None:
    """Make what is missing. Returns your own key if it is new. Raises KeysError for a keys.toml that cannot be used."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "keys.toml"
    names = {entry.name for entry in parse_keys(read_keys(path))} if path.exists() else set()
    yours = None if YOURS in names else create_key(path, YOURS, ["infer"], {})
    for name, role in ROLES.items():
        if name not in names:
            _write(folder / f"{name}.key", create_key(path, name, [role], {}))
    if not (folder / "grafana.password").exists():
        _write(folder / "grafana.password", secrets.token_urlsafe(18))
    path.chmod(0o644)
    return yours


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def main() -> int:
    """Make them beside this file, and say what to do with them."""
    folder = ROOT / "deploy" / "secrets"
    yours = make(folder)
    print(f"The secrets are in {folder}. Grafana: user admin, password in grafana.password.")
    if yours is not None:
        print(f"Your API key, shown this once: {yours}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
