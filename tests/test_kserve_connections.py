"""
What clients that send and take nothing do to a webhook: nothing to others, and not for long.
"""

import asyncio
import socket
import ssl
import threading
import time
from contextlib import ExitStack, suppress

import pytest
from waiting import until

uvicorn = pytest.importorskip("uvicorn", reason="the extra `webhook` is not installed")
trustme = pytest.importorskip("trustme", reason="`trustme` is not installed, which makes the certificates")

from kserve_pvc.kserve import Policy, _connections, _webhook  # noqa: E402

READY = b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"


class Running:
    """
    The webhook's server in a thread, on a port of its own.
    """

    def __init__(self, tmp_path=None):
        options = {**_webhook._UVICORN_OPTIONS, "limit_concurrency": _connections.MAX_CONNECTIONS + 1}
        application = _webhook.Webhook(policy=Policy()).application((), reload_seconds=60)
        config = uvicorn.Config(application, **options)
        config.load()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.context = ssl.create_default_context()
        if tmp_path is not None:
            authority = trustme.CA()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("localhost").configure_cert(context)
            authority.configure_trust(self.context)
            config.ssl = context
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with asyncio.Runner(loop_factory=_connections.BoundedLoop) as runner:
            runner.run(self.server.serve(sockets=[self.listener]))

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.listener.close()

    def connect(self):
        return socket.create_connection(self.address, 10)

    def is_ready(self):
        with self.connect() as client:
            client.sendall(READY)
            return client.recv(1000).startswith(b"HTTP/1.1 200")


def is_closed(client):
    """
    Whether the server has ended a connection; waits until it does.
    """
    try:
        while client.recv(1000):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.fixture
def few(monkeypatch):
    """
    The bounds of the server, reduced.
    """
    monkeypatch.setattr(_connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(_connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(_connections, "HANDSHAKE_SECONDS", 0.4)


@pytest.mark.parametrize("sent", [b"", b"POST /mutate-pods HT", b"GET /readyz HTTP/1.1\r\nHost: h\r\nX: "])
def test_a_header_is_not_waited_for(few, sent):
    """
    A connection without a complete header is ended after some seconds, also if more of the header keeps arriving.
    """
    with Running() as running, running.connect() as client:
        client.sendall(sent)
        began = time.monotonic()
        if sent:
            with suppress(OSError):
                for _ in range(30):
                    time.sleep(0.05)
                    client.sendall(b"x")

        assert is_closed(client)
        assert time.monotonic() - began < 5


def test_a_second_header_is_not_waited_for(few):
    """
    A connection that was kept after a response has as long for the next header, from its first byte.
    """
    with Running() as running, running.connect() as client:
        client.sendall(READY)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /rea")

        assert is_closed(client)


@pytest.mark.parametrize("sent", [b"", READY], ids=["silent", "kept"])
def test_connections_that_wait_keep_no_others_out(few, monkeypatch, sent):
    """
    More connections than there may be, without a request or kept after one, do not keep another client from an answer:
    the oldest make way.
    """
    monkeypatch.setattr(_connections, "HEAD_SECONDS", 60.0)
    with Running() as running, ExitStack() as stack:
        waiting = [stack.enter_context(running.connect()) for _ in range(20)]
        for client in waiting:
            with suppress(OSError):
                client.sendall(sent)

        assert [running.is_ready() for _ in range(3)] == [True] * 3
        assert is_closed(waiting[0])


def test_a_request_ends(few, monkeypatch):
    """
    A client that sends its body too slowly, or does not take its response, is given up.
    """
    monkeypatch.setattr(_connections, "REQUEST_SECONDS", 0.3)
    with Running() as running, running.connect() as client:
        head = "POST /mutate-pods HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        client.sendall(head.encode() + b"{")

        assert is_closed(client)


def test_requests_on_one_connection_are_all_answered(few):
    """
    A client may send several requests on one connection, also ahead of the responses, and pause in between.
    """
    with Running() as running, running.connect() as client:
        client.sendall(READY * 3)
        found = b""
        while found.count(b"ok\n") < 3:
            found += client.recv(1000)
        time.sleep(0.6)
        client.sendall(READY)

        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_handshake_is_not_waited_for(few, tmp_path):
    """
    A connection that does not begin with TLS, or not at all, is ended soon, and others are served meanwhile.
    """
    with Running(tmp_path) as running, running.connect() as client, running.connect() as other:
        with running.context.wrap_socket(running.connect(), server_hostname="localhost") as good:
            good.sendall(READY)
            assert good.recv(1000).startswith(b"HTTP/1.1 200")
        other.sendall(b"\x16\x03\x01")

        assert is_closed(client)
        assert is_closed(other)
