"""A Google Cloud Storage on this machine: those calls of its JSON API that gcsfs and Orbax make.

Objects are in memory, each replaced at once and under a new generation, with the conditions
(ifGenerationMatch, ifGenerationNotMatch) by which writers exclude each other. Point clients to it
with `environment()`. `python storage.py PORT BUCKET` serves until it is ended.
"""

from __future__ import annotations

import base64
import email
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Object:
    content: bytes
    generation: int


class Storage(ThreadingHTTPServer):
    """The server, and what a test looks at.

    Attributes:
      objects: by bucket and name.
      forbidden: methods that the account may not use, such as "DELETE"; "BUCKET": to look at one.
      history: bucket, name and content of all writes in their order; None: it was deleted.
      last_write: number of the write after which all others are refused, as if their process had
        died; None: there is no such write.
    """

    daemon_threads = True

    def __init__(self, *buckets: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.objects: dict[str, dict[str, Object]] = {bucket: {} for bucket in buckets}
        self.forbidden: set[str] = set()
        self.history: list[tuple[str, str, bytes | None]] = []
        self.last_write: int | None = None
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.numbers = itertools.count(1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has gone
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        """Variables that lead clients here."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            # gcsfs would ask a gRPC service, and Google's own, what kind of bucket it has.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    @property
    def writes(self) -> int:
        return len(self.history)

    def states(self, since: int) -> Iterator[dict[str, bytes]]:
        """The objects of all buckets after each of the writes, by name; since that many."""
        state: dict[str, bytes] = {}
        for _, name, content in self.history[since:]:
            if content is None:
                del state[name]
            else:
                state[name] = content
            yield state

    def files(self, bucket: str, folder: str) -> dict[str, bytes]:
        """The objects in a folder, by their names in it."""
        prefix = f"{folder}/"
        return {
            name.removeprefix(prefix): found.content
            for name, found in self.objects[bucket].items()
            if name.startswith(prefix)
        }

    @contextmanager
    def serving(self) -> Iterator[Storage]:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body together: apart, the second would wait for the first one's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Storage

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length) if length else b""
        path = re.fullmatch(
            r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path
        )
        try:
            with self.server.lock:
                if path is None:
                    raise _Refused(501, f"no such call here: {self.command} {self.path}")
                kind, bucket, key = path.groups()
                if bucket not in self.server.objects:
                    raise _Refused(404, "The specified bucket does not exist.")
                self.bucket, self.held = bucket, self.server.objects[bucket]
                if kind == "upload":
                    self._upload()
                elif not url.path.rstrip("/").endswith("/o") and key is None:
                    self._allow("BUCKET")
                    self._json({"kind": "storage#bucket", "name": bucket})
                elif key is None:
                    self._list()
                elif self.command == "DELETE":
                    self._delete(unquote(key))
                else:
                    self._get(unquote(key), kind)
        except _Refused as error:
            content = {"error": {"code": error.status, "message": str(error)}}
            self._answer(error.status, json.dumps(content).encode(), {})

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _allow(self, operation: str) -> None:
        if operation in self.server.forbidden:
            raise _Refused(403, f"The account does not have access ({operation}).")

    def _write(self, name: str, content: bytes | None) -> None:
        """Notes that an object is about to change."""
        history, last = self.server.history, self.server.last_write
        if last is not None and len(history) >= last:
            raise _Refused(403, "The process that asks is dead.")
        history.append((self.bucket, name, content))

    def _meets_conditions(self, name: str, query: dict[str, str]) -> None:
        now = self.held[name].generation if name in self.held else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise _Refused(412, f"the generation of {name} is {now}")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now and now:
            raise _Refused(304, "")

    def _list(self) -> None:
        self._allow("LIST")
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = self.query.get("pageToken", "")
        most = int(self.query.get("maxResults", 1000))
        found: dict[str, Any] = {}  # a name, or a prefix that stands for many
        for name in sorted(self.held):
            if not name.startswith(prefix) or name < self.query.get("startOffset", ""):
                continue
            if "endOffset" in self.query and name >= self.query["endOffset"]:
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            shown = prefix + head + cut if cut else name
            if shown > after:
                found[shown] = None if cut else self._description(name)
        page = list(found.items())[:most]
        content: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [item for _, item in page if item],
            "prefixes": [name for name, item in page if item is None],
        }
        if len(found) > most:
            content["nextPageToken"] = page[-1][0]
        self._json(content)

    def _get(self, name: str, kind: str | None) -> None:
        self._allow("GET")
        if name not in self.held:
            raise _Refused(404, f"No such object: {self.bucket}/{name}")
        self._meets_conditions(name, self.query)
        if kind != "download" and self.query.get("alt") != "media":
            self._json(self._description(name))
            return
        found = self.held[name]
        headers = {"X-Goog-Generation": str(found.generation)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, found.content, headers)
            return
        size = len(found.content)
        start, stop = int(span[1]), min(int(span[2]) + 1 if span[2] else size, size)
        if start >= size:
            raise _Refused(416, f"{name} has {size} bytes")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._answer(206, found.content[start:stop], headers)

    def _delete(self, name: str) -> None:
        self._allow("DELETE")
        if name not in self.held:
            raise _Refused(404, f"No such object: {self.bucket}/{name}")
        self._meets_conditions(name, self.query)
        self._write(name, None)
        del self.held[name]
        self._answer(204, b"", {})

    def _upload(self) -> None:
        self._allow("POST")
        if "upload_id" in self.query:
            self._continue_upload(self.query["upload_id"])
            return
        how = self.query["uploadType"]
        if how == "media":
            self._store(self.query["name"], self.body, self.query)
        elif how == "multipart":
            kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = email.message_from_bytes(kind + self.body).get_payload()
            about, content = (part.get_payload(decode=True) for part in parts)
            name = self.query.get("name") or json.loads(about)["name"]
            self._store(name, content, self.query)
        else:
            about = json.loads(self.body or b"{}")
            upload = f"upload{next(self.server.numbers)}"
            name = self.query.get("name") or about["name"]
            self.server.uploads[upload] = (self.bucket, name, dict(self.query), bytearray())
            address = f"http://127.0.0.1:{self.server.server_port}{urlsplit(self.path).path}"
            location = f"{address}?uploadType=resumable&upload_id={upload}"
            self._answer(200, b"", {"Location": location})

    def _continue_upload(self, upload: str) -> None:
        """The object is there when the last part is."""
        _, name, query, content = self.server.uploads[upload]
        if self.command == "DELETE":
            del self.server.uploads[upload]
            self._answer(499, b"", {})
            return
        span = self.headers.get("Content-Range", "")
        parsed = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", span)
        if span and parsed is None:
            raise _Refused(400, f"Content-Range: {span}")
        if parsed is not None and parsed[1] and int(parsed[1]) != len(content):
            raise _Refused(503, f"{len(content)} bytes have come, and this begins at {parsed[1]}")
        content.extend(self.body)
        if parsed is None or parsed[3] == str(len(content)):
            self._store(name, bytes(content), query)
            del self.server.uploads[upload]
            return
        self._answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {})

    def _store(self, name: str, content: bytes, query: dict[str, str]) -> None:
        self._meets_conditions(name, query)
        self._write(name, content)
        self.held[name] = Object(content, 1_000_000 + next(self.server.numbers))
        self._json(self._description(name))

    def _description(self, name: str) -> dict[str, Any]:
        found = self.held[name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": self.bucket,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
            "updated": time,
            "timeCreated": time,
        }

    def _json(self, content: dict[str, Any]) -> None:
        kind = {"Content-Type": "application/json; charset=UTF-8"}
        self._answer(200, json.dumps(content).encode(), kind)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)


if __name__ == "__main__":
    Storage(*sys.argv[2:], port=int(sys.argv[1])).serve_forever()
