"""Exit code 0 while the server of this container is ready for requests: GET /readyz on STET_PORT. Needs no curl."""

from __future__ import annotations

import os
import sys
import urllib.request


def main() -> int:
    """Ask once. Whatever goes wrong is one line and exit code 1."""
    url = f"http://127.0.0.1:{os.environ.get('STET_PORT', '8000')}/readyz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4) as answer:
            print(answer.read().decode())
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
