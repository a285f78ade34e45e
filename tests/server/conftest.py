"""The server's tests are skipped where its packages are not installed."""

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed: klein-mlx[server-test]")
pytest.importorskip("httpx", reason="the tests' clients are not installed: klein-mlx[server-test]")
