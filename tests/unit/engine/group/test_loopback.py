"""The small servers of a group: on the next free port, and silent to whoever lacks the token."""

import asyncio
import logging
import socket
import time

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from zimage_turbo.engine.group import loopback

LIMIT = 1000


async def length(request):
    return web.json_response(len(await request.read()))


@pytest_asyncio.fixture
async def url():
    runner, port = await loopback.serve([web.post("/length", length)], "secret", LIMIT)
    yield f"http://127.0.0.1:{port}/length"
    await runner.cleanup()


async def post(url, body=b"", **headers):
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
        return answer.status, await answer.json() if answer.status == 200 else None


async def test_who_has_the_token_is_answered(url):
    assert await post(url, b"1234", **loopback.headers("secret")) == (200, 4)


@pytest.mark.parametrize("given", [{}, {"Authorization": "secret"}, {"Authorization": "Bearer Secret"}, {"Token": "ü"}])
async def test_who_has_not_is_refused_and_logged(url, given, caplog):
    with caplog.at_level(logging.WARNING):
        assert await post(url, b"1234", **given) == (403, None)
    (record,) = caplog.records
    assert "127.0.0.1 asked a multi-gpu process for /length without its token" in record.getMessage()


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_a_page_in_a_browser_is_refused(url, method):
    """Neither what it asks, nor what a browser asks first on its behalf: whether it may."""
    page = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    async with aiohttp.ClientSession() as session, session.request(method, url, headers=page) as answer:
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("Access-Control-Allow")]


HEAD = b"POST /length HTTP/1.1\r\nHost: localhost\r\n"
UNFINISHED = {
    "nothing": b"",
    "half a head": HEAD,
    "a body that never comes": HEAD + b"Content-Length: 900\r\n\r\n12",
    "one with the token": HEAD + b"Authorization: Bearer secret\r\nContent-Length: 900\r\n\r\n12",
}
WRONG = {
    "no text": (HEAD + b"Authorization: Bearer \xff\r\n\r\n", b" 403 "),
    "a long head": (HEAD + b"A: " + b"a" * (1 << 16) + b"\r\n\r\n", b" 400 "),
    "no HTTP": (b"\x16\x03\x01\x00\xff\r\n\r\n", b" 400 "),
}


async def test_who_says_nonsense_or_never_finishes_is_not_waited_for():
    """Nor does anybody else wait, nor the end."""
    runner, port = await loopback.serve([web.post("/length", length)], "secret", LIMIT)
    open_ones = []
    for said in [*UNFINISHED.values(), *(said for said, _ in WRONG.values())]:
        open_ones.append(await asyncio.open_connection("127.0.0.1", port))
        open_ones[-1][1].write(said)
    for (reader, _), (_, status) in zip(open_ones[len(UNFINISHED) :], WRONG.values(), strict=True):
        assert status in await reader.readline()
    assert await post(f"http://127.0.0.1:{port}/length", b"1234", **loopback.headers("secret")) == (200, 4)
    began = time.monotonic()
    await runner.cleanup()
    assert time.monotonic() - began < 5.0
    for _, writer in open_ones:
        writer.close()


async def test_without_the_token_no_path_can_be_told_from_another(url):
    assert await post(url.replace("length", "nowhere")) == (403, None)


async def test_a_body_over_the_limit_is_refused(url):
    assert (await post(url, bytes(LIMIT), **loopback.headers("secret")))[0] == 200
    assert (await post(url, bytes(LIMIT + 1), **loopback.headers("secret")))[0] == 413


def test_the_next_port_is_taken_where_one_is():
    with loopback.bound("127.0.0.1", 0) as first:
        taken = first.getsockname()[1]
        with loopback.bound("127.0.0.1", taken) as second:
            assert second.getsockname()[1] > taken


def test_other_machines_do_not_reach_it():
    with loopback.bound(loopback.ADDRESS, 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_last_port_is_the_last():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 65535))
        other.listen()
        with pytest.raises(OSError, match="no port from 65535 on is free"):
            loopback.bound("127.0.0.1", 65535)
