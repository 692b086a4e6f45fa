"""base/objects/oracle.py: Oracle's own client against a server that answers as its documentation says."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tundish.base.objects.contract import ObjectStore
from tundish.base.objects.opening import open_store
from tundish.base.objects.oracle import OracleBucket
from tundish.errors import StoreError

pytestmark = pytest.mark.slow  # importing Oracle's client takes seconds
OBJECTS = dict[str, bytes]
PAGE = 3


@pytest.fixture
def objects() -> OBJECTS:
    """What the bucket `b` of the namespace `ns` holds."""
    return {}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objects: OBJECTS) -> Iterator[ObjectStore]:
    """The folder lab/x of the bucket."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    class Service(BaseHTTPRequestHandler):
        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            parts, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
            if parts.path == "/n/" or parts.path == "/n":
                return self.answer(200, b'"ns"', content_type="application/json")
            if not parts.path.startswith("/n/ns/b/b"):
                error = json.dumps({"code": "BucketNotFound", "message": "no bucket"}).encode()
                return self.answer(404, error, content_type="application/json")
            if parts.path == "/n/ns/b/b/o":
                start, prefix = query.get("start", [""])[0], query.get("prefix", [""])[0]
                names = sorted(name for name in objects if name.startswith(prefix) and name >= start)
                page = [{"name": n, "size": len(objects[n]), "etag": str(hash(objects[n]))} for n in names[:PAGE]]
                content = {"objects": page, "nextStartWith": next(iter(names[PAGE:]), None)}
                return self.answer(200, json.dumps(content).encode(), content_type="application/json")
            if parts.path == "/n/ns/b/b":
                return self.answer(200, b'{"name": "b"}', content_type="application/json")
            content = objects.get(unquote(parts.path.removeprefix("/n/ns/b/b/o/")))
            if content is None:
                return self.answer(404, b'{"code": "ObjectNotFound", "message": "x"}', content_type="application/json")
            first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
            content, tag = content[int(first) : int(last) + 1 if last else None], str(hash(content))
            return self.answer(200, content, content_type="application/octet-stream", etag=tag)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            key = unquote(urlsplit(self.path).path.removeprefix("/n/ns/b/b/o/"))
            objects[key] = self.rfile.read(int(self.headers["content-length"]))
            self.answer(200)

        def do_DELETE(self) -> None:
            key = unquote(urlsplit(self.path).path.removeprefix("/n/ns/b/b/o/"))
            if objects.pop(key, None) is None:
                return self.answer(404, b'{"code": "ObjectNotFound", "message": "x"}', content_type="application/json")
            return self.answer(204)

        def log_message(self, format: str, *args: object) -> None:
            pass

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(*pem))
    (tmp_path / "key.pem").chmod(0o600)
    (tmp_path / "config").write_text(
        f"[lab]\nuser=ocid1.user.oc1..aaaa\nfingerprint={':'.join(['20'] * 16)}\ntenancy=ocid1.tenancy.oc1..aaaa\n"
        f"region=eu-frankfurt-1\nkey_file={tmp_path / 'key.pem'}\n"
    )
    (tmp_path / "config").chmod(0o600)
    monkeypatch.setenv("OCI_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("OCI_CONFIG_PROFILE", "lab")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield _at("oci://b/lab/x/", server)
    server.shutdown()
    server.server_close()


def _at(address: str, server: ThreadingHTTPServer) -> OracleBucket:
    """A store whose client asks the server in place of Oracle's region."""
    store = open_store(address)
    assert isinstance(store, OracleBucket)
    store._client.base_client.endpoint = f"http://127.0.0.1:{server.server_port}"
    return store


def test_what_was_written_is_listed_found_and_read(store: ObjectStore, objects: OBJECTS, tmp_path: Path) -> None:
    """Checkpoints could not be kept in Oracle's store, or be mixed up."""
    for number in (1, 10):
        for part in range(PAGE):
            (tmp_path / "file").write_bytes(f"{number} {part}".encode())
            store.upload(tmp_path / "file", f"ep1-ba{number}/{part}")
    objects["lab/xx/other"] = b""
    assert "lab/x/ep1-ba10/2" in objects
    assert [entry.key for entry in store.list()] == [f"ep1-ba{n}/{part}" for n in (1, 10) for part in range(PAGE)]
    assert [entry.key for entry in store.list("ep1-ba1")] == [f"ep1-ba1/{part}" for part in range(PAGE)]
    entry = store.find("ep1-ba10/1")
    assert entry is not None and entry.size == 4 and entry.version is not None and store.find("none") is None
    assert (store.read("ep1-ba10/1"), store.read("ep1-ba10/1", 1, 2)) == (b"10 1", b"0 ")
    store.download("ep1-ba10/1", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"10 1"
    for _ in range(2):
        store.delete("ep1-ba1/0")
    assert store.find("ep1-ba1/0") is None and store.find("ep1-ba10/0") is not None


def test_missing_credentials_and_buckets_are_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own text is a page of JSON, or a link to its documentation."""
    missing = OracleBucket("oci://none/x")
    missing.__dict__["_client"] = store._client  # type: ignore[attr-defined]
    with pytest.raises(StoreError) as error:
        missing.list()
    assert error.value.message == "oci://none/x: the bucket does not exist. Create it, or correct its name."
    monkeypatch.setenv("OCI_CONFIG_FILE", "/nowhere")
    with pytest.raises(StoreError, match=r"^oci://b/x: there are no usable credentials\. Run `oci setup config`"):
        open_store("oci://b/x").list()
