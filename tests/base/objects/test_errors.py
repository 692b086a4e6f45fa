"""base/objects: what a store answers, as a sentence; each answer is one that S3, Google or Azure documents."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tundish.base.objects import cloud
from tundish.base.objects.opening import open_store
from tundish.errors import StoreError

Serve = Callable[[int, str], str]


def _s3(code: str) -> str:
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>of S3</Message></Error>'


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(cloud, "RETRIES", 1)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server that gives every request one answer; S3_ENDPOINT_URL names it."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: str) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body.encode())

            do_HEAD = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setenv("S3_ENDPOINT_URL", address)
        return address

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


LOGIN = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "NoSuchBucket", "the bucket does not exist. Create it, or correct its name."),
        (
            403,
            "InvalidAccessKeyId",
            "the access key does not exist there. Check AWS_ACCESS_KEY_ID, AWS_PROFILE and S3_",
        ),
        (403, "SignatureDoesNotMatch", f"the secret key is wrong. Check the credentials. {LOGIN}"),
        (403, "AccessDenied", "access denied (403). Check that these credentials may read and write there."),
        (400, "ExpiredToken", "the credentials have expired. Log in again."),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong."),
        (503, "SlowDown", "the server failed (503). Try again later."),
    ],
)
def test_what_a_store_answers_is_one_sentence(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str, sentence: str
) -> None:
    """A trace of Rust would reach the user, without what to do."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheimes wort")
    serve(status, _s3(code))
    store = open_store("s3://bucket/folder/")
    (tmp_path / "file").write_bytes(b"content")
    for where, action in {
        "": lambda: store.list(),
        "/x.jsonl": lambda: store.read("x.jsonl"),
        "/y.jsonl": lambda: store.upload(tmp_path / "file", "y.jsonl"),
    }.items():
        with pytest.raises(StoreError) as error:
            action()
        assert error.value.message.startswith(f"s3://bucket/folder{where}: {sentence}")
        assert error.value.message.isprintable() and "geheim" not in error.value.message


def test_missing_credentials_are_named(serve: Serve) -> None:
    """`access denied` alone would send the user to the bucket's policy."""
    serve(403, _s3("AccessDenied"))
    with pytest.raises(StoreError) as error:
        open_store("s3://bucket/x").list()
    assert error.value.message == f"s3://bucket/x: access denied (403), and there are no credentials. {LOGIN}"


@pytest.mark.parametrize(
    ("endpoint", "sentence"),
    [
        ("http://127.0.0.1:1", "connection refused. Check the network, and S3_ENDPOINT_URL"),
        ("http://no-such-host.invalid", "the host name cannot be resolved. Check the network, and S3_ENDPOINT_URL"),
    ],
)
def test_a_store_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, endpoint: str, sentence: str) -> None:
    """Rust's client says `error sending request`."""
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError) as error:
        open_store("s3://bucket/x").read("y")
    assert error.value.message.startswith(f"s3://bucket/x/y: {sentence}")


def test_a_server_without_tls_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """`https` before the address of a plain server is the usual mistake with a store of one's own."""
    monkeypatch.setenv("S3_ENDPOINT_URL", serve(200, "").replace("http:", "https:"))
    with pytest.raises(
        StoreError, match=r"no secure connection \(TLS\) is possible\. Check that the endpoint speaks h"
    ):
        open_store("s3://bucket/x").list()


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """`create()` would wait for ever."""
    import socket

    monkeypatch.setattr(cloud, "READ_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"^s3://bucket/x: no answer in time"):
            open_store("s3://bucket/x").list()
