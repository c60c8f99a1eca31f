"""HTTP between the processes of a group: a small server that answers those alone who know the group's token."""

import errno
import hmac
import itertools
import logging
import socket
from collections.abc import Iterable

from aiohttp import web

FIRST_PORT = 17860
ADDRESS = "127.0.0.1"
_BACKLOG = 128
_END_SECONDS = 0.5  # for requests that come in at the end; a stranger's, whose body never comes, would hold it up


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def serve(
    routes: Iterable[web.RouteDef], token: str, body_limit: int, address: str = ADDRESS, first_port: int = FIRST_PORT
) -> tuple[web.AppRunner, int]:
    """A running server and its port: the first from `first_port` on that is free. body_limit: of a request, in bytes.

    Whoever does not give the token gets 403, whatever it asks for.
    """
    application = web.Application(middlewares=[_guard(token)], client_max_size=body_limit)
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=_END_SECONDS)
    await runner.setup()
    listener = bound(address, first_port)
    await web.SockSite(runner, listener).start()
    return runner, listener.getsockname()[1]


def bound(address: str, first_port: int) -> socket.socket:
    """A socket that listens at the first port from `first_port` on that is free. Raises OSError, if none is too."""
    for port in itertools.count(first_port):
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            # As a server does: a port whose last connections are only fading out is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            # Another that was bound just now, and does not listen yet, is noticed only here.
            listener.listen(_BACKLOG)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"{error.strerror}: {address}, port {port}") from error
        except OverflowError as error:
            raise OSError(errno.EADDRINUSE, f"no port from {first_port} on is free at {address}") from error


def _guard(token: str):
    expected = headers(token)["Authorization"].encode()

    @web.middleware
    async def guard(request: web.Request, handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")  # the bytes that came
        if hmac.compare_digest(given, expected):
            return await handler(request)
        logging.warning(
            "Z-Image-Turbo: %s asked a multi-gpu process for %s without its token, and was refused.",
            request.remote,
            request.path,
        )
        return web.json_response({"error": "the group's token is missing or wrong"}, status=403)

    return guard
