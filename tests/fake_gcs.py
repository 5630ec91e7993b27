"""Google Cloud Storage's JSON API on a port of this machine, objects in memory: as much of it as its clients call here.

TensorStore, gcsfs and google-cloud-storage each find it through an environment variable (`environment`).
"""

import base64
import email
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class FakeGcs:
    """A server of buckets that exist as soon as they are named. `objects`: {(bucket, name): (bytes, generation)}."""

    def __init__(self):
        self.objects, self.lock, self.generation, self.sessions = {}, threading.Lock(), 0, {}
        self.requests = []  # (method, path)
        self.forbidden = False  # refuses everything
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self):
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for a bucket's kind by an API that is not here
        }

    def names(self, bucket):
        return sorted(name for b, name in self.objects if b == bucket)

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def put(self, bucket, name, data, match=None):
        """Stores an object; returns its resource, or None where its generation is not the expected one."""
        with self.lock:
            if match is not None and self.objects.get((bucket, name), (b"", 0))[1] != int(match):
                return None
            self.generation += 1
            self.objects[bucket, name] = (data, self.generation)
            return self.resource(bucket, name)

    def resource(self, bucket, name):
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that has gone is no error of the server."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeGcs

    def log_message(self, *_):
        pass

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        self.store.requests.append((self.command, self.path))
        if self.store.forbidden:
            status, headers, data = self.json({"error": {"code": 403, "message": "no access to this bucket"}}, 403)
        else:
            status, headers, data = self.answer(self.command, self.path, dict(self.headers), body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def answer(self, method, path, headers, body):
        url = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        headers = {k.lower(): v for k, v in headers.items()}
        if url.path.startswith("/batch"):
            return self.batch(headers, body)
        if url.path.startswith("/session/"):
            return self.resume(url.path, headers, body)
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path):
            return self.upload(urllib.parse.unquote(found[1]), query, headers, body)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?/?", url.path)
        if not found:
            return self.json({"error": {"code": 404, "message": f"no such method {path}"}}, 404)
        bucket, name = (None if part is None else urllib.parse.unquote(part) for part in found.groups())
        if "/o" not in url.path[len("/storage/v1/b/") :]:
            return self.json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
        if name is None:
            return self.list(bucket, query)
        return self.object(method, bucket, name, query, headers)

    def list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name in self.store.names(bucket):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.store.resource(bucket, name))
        return self.json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def object(self, method, bucket, name, query, headers):
        stored = self.store.objects.get((bucket, name))
        if stored is None:
            return self.json({"error": {"code": 404, "message": "No such object"}}, 404)
        data, generation = stored
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        if method == "DELETE":
            with self.store.lock:
                self.store.objects.pop((bucket, name), None)
            return 204, {}, b""
        if query.get("alt") != "media":
            return self.json(self.store.resource(bucket, name))
        told = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if "range" in headers:
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", headers["range"]).groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
            return 206, told | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
        return 200, told, data

    def upload(self, bucket, query, headers, body):
        kind, match = query.get("uploadType"), query.get("ifGenerationMatch")
        if kind == "media":
            return self.stored(bucket, query["name"], body, match)
        if kind == "multipart":
            resource, data = _parts(headers["content-type"], body)
            return self.stored(bucket, query.get("name") or json.loads(resource)["name"], data, match)
        name = query.get("name") or json.loads(body)["name"]
        session = f"/session/{len(self.store.sessions)}"
        self.store.sessions[session] = [bucket, name, b"", match]
        return 200, {"Location": self.store.url + session}, b""

    def resume(self, path, headers, body):
        session = self.store.sessions[path]
        session[2] += body
        total = headers.get("content-range", "bytes 0-0/0").rpartition("/")[2]
        if total == "*" or int(total) > len(session[2]):
            return 308, {"Range": f"bytes=0-{max(0, len(session[2]) - 1)}"}, b""
        return self.stored(*session)

    def stored(self, bucket, name, data, match):
        resource = self.store.put(bucket, name, data, match)
        if resource is None:
            return self.json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        return self.json(resource)

    def batch(self, headers, body):
        boundary, answers = "answer", []
        for part in _messages(headers["content-type"], body):
            text = part.get_payload(decode=True).decode()
            method, path, _ = text.split("\r\n")[0].split(" ", 2)
            status, _, data = self.answer(
                method, urllib.parse.urlsplit(path)._replace(scheme="", netloc="").geturl(), {}, b""
            )
            name = part.get("Content-ID", "").strip("<>")
            answers.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{name}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
                f"{data.decode()}\r\n"
            )
        content = "".join(answers) + f"--{boundary}--\r\n"
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, content.encode()

    def json(self, tree, status=200):
        return status, {"Content-Type": "application/json"}, json.dumps(tree).encode()


def _messages(content_type, body):
    return email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body).get_payload()


def _parts(content_type, body):
    """The two parts of a multipart upload, as they were sent: a MIME parser would change an object's bytes."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
    both = body.split(boundary)[1:3]
    contents = (part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1] for part in both)
    return (content.removesuffix(b"\n").removesuffix(b"\r") for content in contents)
