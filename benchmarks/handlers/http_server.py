"""A trivial application behind an HTTP server: answers every request with 60 constant bytes.

python http_server.py "granian, RSGI" --port 8000
"""

import argparse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

ANSWER = b'{"predictions": [{"label": "red", "score": 0.576116884766}]}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
RSGI_HEADERS = [(name.decode(), value.decode()) for name, value in HEADERS]
HOST = "127.0.0.1"
QUIET: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """The application as ASGI."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


async def rsgi(scope: Any, protocol: Any) -> None:
    """The application as RSGI."""
    await protocol()
    protocol.response_bytes(200, RSGI_HEADERS, ANSWER)


def uvicorn_c(port: int) -> None:
    """uvicorn with httptools and uvloop."""
    import uvicorn

    uvicorn.run(app, host=HOST, port=port, loop="uvloop", http="httptools", **QUIET)


def uvicorn_python(port: int) -> None:
    """uvicorn in pure Python."""
    import uvicorn

    uvicorn.run(app, host=HOST, port=port, loop="asyncio", http="h11", **QUIET)


def granian_asgi(port: int) -> None:
    """granian with ASGI."""
    _granian("http_server:app", port, "asginl")


def granian_rsgi(port: int) -> None:
    """granian with RSGI."""
    _granian("http_server:rsgi", port, "rsgi")


def hypercorn_h11(port: int) -> None:
    """hypercorn with h11 and uvloop."""
    import uvloop
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"{HOST}:{port}"]
    uvloop.run(serve(app, config))


def _granian(target: str, port: int, interface: str) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops

    Granian(
        target,
        address=HOST,
        port=port,
        interface=Interfaces(interface),
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        workers=1,
        log_access=False,
    ).serve()


SERVERS: dict[str, Callable[[int], None]] = {
    "uvicorn, uvloop and httptools": uvicorn_c,
    "uvicorn, asyncio and h11": uvicorn_python,
    "granian, ASGI": granian_asgi,
    "granian, RSGI": granian_rsgi,
    "hypercorn, uvloop and h11": hypercorn_h11,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    SERVERS[options.server](options.port)
