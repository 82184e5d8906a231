"""The specification of streamerbrainz.py, chapter by chapter in the order of the file: of each first what
computes, in virtual time; then what touches the world, over real sockets on free ports.  Most run in this
process; what is about a process (signals, kills, cron, the demo) starts one.

Real captures lie outside the repository; the tests that read them are skipped without them.
"""
from __future__ import annotations

import ast
import collections
import contextlib
import fcntl
import functools
import heapq
import html
import http.client
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
import types
import typing
import unicodedata
import urllib.parse
import zipfile
from xml.sax.saxutils import quoteattr

import pytest

import streamerbrainz as sb
from streamerbrainz import BUFFERING, PAUSED, PLAYING, STOPPED, Change, Look, Outage

# --- what all chapters share

signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background job ignores Ctrl-C, and so would what we start
HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "streamerbrainz.py"
CAPTURES = HERE.parent / "shared" / "captures"
TOKEN = "s3cret-t0ken-never-to-be-seen"
THUMB = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4 + b"\r\n--" + b"-" * 24 + b"\r\n\xff\xd9"
SONG = {"type": "track", "ratingKey": "101", "title": "Karma Police", "grandparentTitle": "Radiohead",
        "parentTitle": "OK Computer", "duration": 264000}
OTHER = {**SONG, "ratingKey": "102", "title": "No Surprises"}
TRACK = {key: str(value) for key, value in SONG.items()}
PILOT = {"type": "episode", "ratingKey": "1001", "title": "Pilot", "grandparentTitle": "Breaking Bad", "parentIndex": 1, "index": 1,
         "grandparentRatingKey": "1000", "guid": "plex://episode/e1", "grandparentGuid": "plex://show/bb", "year": 2008,
         "Guid": [{"id": "imdb://tt0959621"}, {"id": "tmdb://62085"}, {"id": "tvdb://349232"}]}


def payload(event="media.play", uuid="m1", metadata=SONG, **more):
    """The JSON of a webhook."""
    fields = {"event": event, "user": True, "owner": True, "Account": {"id": 1, "title": "me"},
              "Server": {"title": "nas", "uuid": "0" * 40}, "Player": {"title": "Living Room", "uuid": uuid},
              "Metadata": metadata, **more}
    return json.dumps({key: value for key, value in fields.items() if value is not None}, ensure_ascii=False).encode()


def captures(folder):
    """The real captures of a folder, as parameters; one that skips where there are none."""
    files = sorted((CAPTURES / folder).glob("*.*"))
    skip = pytest.mark.skip(reason=f"no captures at {CAPTURES}")
    return [pytest.param(file, id=file.name) for file in files] or [pytest.param(None, id="none", marks=skip)]


MULTIPART, BODY = sb.encode_webhook(payload(), THUMB)


def eventually(condition, timeout=20.0):
    """Wait until a condition holds; -> its value.  For what another thread or process does, and only for that."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)
    return value


@contextlib.contextmanager
def the_log():
    """Whatever main() sets up for the log is undone."""
    before, raises = (sb.log.handlers[:], sb.log.level, sb.log.propagate), sb.logging.raiseExceptions
    yield
    (sb.log.handlers[:], sb.log.level, sb.log.propagate), sb.logging.raiseExceptions = before, raises


@pytest.fixture
def lines():
    """What is logged, as text lines at DEBUG."""
    heard = []

    class Ear(sb.logging.Handler):
        def emit(self, record):
            heard.append(self.format(record))
    ear = Ear()
    ear.format = functools.partial(sb.log_line, False, True)
    with the_log():
        sb.log.handlers[:] = [ear]
        sb.log.setLevel(sb.logging.DEBUG)
        yield heard


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home that is empty: no test reads the tester's own.  What a test starts has it, too."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name, place in (("HOME", ""), ("XDG_CONFIG_HOME", ".config"), ("XDG_DATA_HOME", ".local/share"), ("XDG_STATE_HOME", ".local/state"),
                        ("XDG_CACHE_HOME", ".cache")):
        monkeypatch.setenv(name, str(folder / place))
    monkeypatch.setattr(sb, "SYSTEM_FLAGS", str(folder / "none"))
    return folder


class Done(typing.NamedTuple):
    """What a command line came to."""
    status: int
    out: str
    err: str


def call(*words):
    """Run a command line in this process, as far as it is no daemon; -> its end."""
    out, err, mask = io.StringIO(), io.StringIO(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.MonkeyPatch.context() as patch, the_log(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sb, "take_signals", lambda *_: None)                 # this process keeps its own
        try:
            status = sb.main([str(word) for word in words])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Done(status, out.getvalue(), err.getvalue())


def start(*words, **more):
    """Run a command line in a process of its own; -> its end."""
    done = subprocess.run([sys.executable, "-W", "error", PROGRAM, *map(str, words)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60, **more)
    return Done(done.returncode, done.stdout, done.stderr)


def config(*words):
    return sb.parse_config(words)


@contextlib.contextmanager
def serving(server):
    """Run a socketserver in a thread."""
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def plex():
    """The demo's stand-in for Plex, with our token."""
    with serving(sb.StandIn(TOKEN, "m1")) as stand_in:
        yield stand_in


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


def secret_file(path):
    return sb.SecretFile("-plex-token-file", str(path))


# Plex: its sessions, its library, and servers that answer as a test wants


def session_xml(state=PLAYING, offset="0", player="m1", key="7", tag="Track", product="Plexamp", item=SONG, **attributes):
    """One session as /status/sessions shows it."""
    fields = {**item, "sessionKey": key, **({} if offset is None else {"viewOffset": offset}), **attributes}
    attrs = " ".join(f"{name}={quoteattr(str(value))}" for name, value in fields.items())
    return (f"<{tag} {attrs}><User id='1' title='me'/><Player machineIdentifier={quoteattr(player)} state={quoteattr(state)} "
            f"title='Living Room' product={quoteattr(product)} platform='Linux'/></{tag}>")


def sessions_xml(*sessions):
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<MediaContainer size="{len(sessions)}">{"".join(sessions)}</MediaContainer>'.encode()


def sessions(*each):
    return sb.parse_sessions(sessions_xml(*each))


NOTE = {"sessionKey": "7", "clientIdentifier": "m1", "guid": "", "ratingKey": "101", "url": "", "key": "/library/metadata/101",
        "viewOffset": 117412, "playQueueItemID": 1, "state": "playing"}


class RawServer:
    """Accepts connections and hands each, after its request's head, to a function of the test."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, contextlib.suppress(OSError):
                    head = b""
                    while b"\r\n\r\n" not in head and (data := connection.recv(65536)):
                        head += data
                    self.requests.append(head)
                    self.answer(connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def http_answer(body, status="200 OK", head="", length=None):
    """An answer for RawServer."""
    content = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n{head}\r\n".encode() + body
    return lambda connection: connection.sendall(content)


def drip(data, interval=0.02):
    def answer(connection):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(interval)
    return answer


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def hang(connection):
    connection.recv(1)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for plex.test and its key, of our own making."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", folder / "key", "-out", folder / "cert",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return folder / "cert", folder / "key"


@contextlib.contextmanager
def tls_server(certificate, answer):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def wrapped(connection):
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(65536)
            answer(secured)
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):
            while True:
                wrapped(listener.accept()[0])
    threading.Thread(target=run, daemon=True).start()
    yield f"https://{{}}:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


STREAM = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
PLAYS = b"event: playing\ndata: " + json.dumps({"PlaySessionStateNotification": NOTE}).encode() + b"\n\n"
NOTIFICATION = sb.Notification(PLAYING, "7", "m1", "101", 117412)
PING = b"event: ping\ndata: {}\n\n"


# Requests to the listener


POST = f"POST /webhooks/plex HTTP/1.1\nHost: x\nContent-Type: {MULTIPART}\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


def chunked(body, size, extension=b"", trailer=b""):
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


def raw(head, body=b""):
    return re.sub("\r?\n", "\r\n", head).encode("latin-1") + b"\r\n" + body


def post(body=BODY, content_type=MULTIPART, path="/webhooks/plex", head="", length=None, method="POST"):
    """The bytes of a request."""
    return (f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\n{head}\r\n").encode("latin-1") + body


def status(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


@pytest.fixture
def listener():
    with Site() as site:
        yield site


def connect(listener):
    return socket.create_connection(("127.0.0.1", listener.port), timeout=10)


def exchange(listener, request):
    """Send bytes, end, and read all that comes back."""
    with connect(listener) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
    return answer


# A daemon, in this process and in its own


class Site:
    """A listener in a thread, with all its pages, and an inbox that nobody empties."""

    def __init__(self, host="127.0.0.1", plex=None, machine_id="m1", gate=None, journal=None):
        self.inbox, self.board, self.gate = queue.SimpleQueue(), sb.Board(plex), gate or sb.Gate()
        self.server = sb.Listener(host, 0)
        self.port = self.server.port
        own_url = functools.partial(sb.own_url, host, self.port, "")
        self.pages = sb.Pages(self.board, bool(self.gate.secret), own_url)
        keep = functools.partial(sb.keep_webhook, self.inbox, journal, self.board, machine_id)
        tell = functools.partial(sb.put_message, self.inbox)
        self.threads = [threading.Thread(target=self.server.serve, args=(self.gate, self.pages, keep, tell), daemon=True)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.inbox.put(signal.SIGTERM)
        self.server.close()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()

    @property
    def taken(self):
        """How many connections are being served."""
        return len(self.server.serving)


class Running(Site):
    """A whole daemon in this process: listener, watcher, stand-in."""

    def __init__(self, plex, token_file, poll=30.0, environ=None, machine_id="m1", gate=None, hooks=None):
        server = sb.PlexServer(plex.url, secret_file(token_file).first) if token_file else None
        super().__init__("127.0.0.1", server, machine_id, gate)
        self.plex, self.hooks, self.systemd = plex, hooks, sb.Systemd(environ or {})
        config = sb.Config(plex_machine_id=machine_id, poll_interval_s=poll)
        self.watcher = sb.Watcher(config, self.inbox, server, self.tell, self.systemd.wake_s)
        self.threads.append(threading.Thread(target=self.watcher.run, daemon=True))

    def tell(self, status, changes):
        for change in changes if self.hooks else ():
            self.hooks.inbox.put(change)
        self.board.publish(status, changes)
        self.systemd.tell(status)

    def send(self, event, item=SONG, **more):
        return self.plex.send_webhook(f"http://127.0.0.1:{self.port}/webhooks/plex", event, item, **more)


def free_port():
    """A free port, and none that the system gives to what connects meanwhile (those are 32768 and more)."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000))) as probe:
            return probe.getsockname()[1]


class Process:
    """The daemon as a user starts it."""

    def __init__(self, *words, env=None):
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", PROGRAM, "-webhooks-port", str(self.port), "-webhooks-host", "127.0.0.1", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env={**os.environ, **(env or {})})
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True).start()

    def __enter__(self):
        eventually(lambda: any("listening" in line for line in self.lines) or self.process.poll() is not None)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def text(self):
        return "".join(self.lines)


def send(daemon, metadata=PILOT, event="media.scrobble", query="", **more):
    """POST a webhook to a daemon; -> the status."""
    content_type, body = sb.encode_webhook(payload(event, metadata=metadata, **more))
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    try:
        connection.request("POST", f"/webhooks/plex{query}", body, {"Content-Type": content_type})
        return connection.getresponse().status
    finally:
        connection.close()


def changes(lines):
    return [re.sub(r" position_ms=\d+| by=\w+", "", line) for line in lines if "state=" in line]


def watcher_alone():
    """A Watcher without a server, which is told things by hand."""
    return sb.Watcher(sb.Config(), queue.SimpleQueue(), None, lambda *_: None)


def state_line(state, title="Karma Police"):
    return f'<6>state={state} title="{title}" artist=Radiohead album="OK Computer" duration_ms=264000 player="Living Room"'


def status_of(player=None, has_server=True, **fields):
    return sb.Status((player or sb.Status().player)._replace(has_server=has_server), **fields)


def known_player(state=PLAYING, item=SONG, **fields):
    return sb.PlayerState("m1", True, state=state, item=sb.parse_item(item), player_title="Living Room", view_offset=61000, moved_at=100.0, **fields)


EVIL = {**SONG, "title": "</script><script>alert(1)</script>", "grandparentTitle": "'\"><img src=x onerror=alert(1)>", "parentTitle": "&amp;"}


def change(**fields):
    return Change(PLAYING, STOPPED, sb.parse_item({**SONG, **fields}), 61000, "Living Room", "m1", "webhook")


# A tracker, and the library that it knows


SERVER = "0" * 40
BREAKING_BAD = {"title": "Breaking Bad", "year": 2008, "tmdb_id": 1396, "tvdb_id": 81189, "imdb_id": "tt0903747", "episodes": [
    {"season": 0, "episode": 1, "title": "Good Cop / Bad Cop"}, {"season": 1, "episode": 1, "title": "Pilot"},
    {"season": 1, "episode": 2, "title": "Cat's in the Bag...", "watched": ["2020-01-02T03:04:05Z"]}]}
HEAT = {"title": "Heat", "year": 1995, "tmdb_id": 949, "watched": []}


def scrobble(metadata=PILOT, event="media.scrobble", **more):
    return sb.parse_payload(payload(event, metadata=metadata, **more))


def legacy(guid, **more):
    return {**PILOT, "guid": guid, "grandparentGuid": None, "Guid": [], **more}


class Library:
    """A stand-in for the server's library, and for TMDB: a path and its answer, or a status."""

    def __init__(self, xml=False):
        self.answers, self.requests, self.xml = {"/identity": {"machineIdentifier": SERVER}}, [], xml
        self.date = None                                   # what its Date says; None: this machine's time
        library = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                library.requests.append(self.path)
                found = library.answers.get(self.path, library.answers.get(path, 404))
                found = found(dict(urllib.parse.parse_qsl(query))) if callable(found) else found
                known = path == "/identity" or TOKEN in (self.headers.get("X-Plex-Token"), self.headers.get("Authorization", "")[7:])
                status, body = (found, b"") if isinstance(found, int) else (200, library.encode(found)) if known else (401, b"")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def date_time_string(self, timestamp=None):
                return library.date() if library.date else super().date_time_string(timestamp)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def encode(self, fields):
        if not self.xml or "tv_results" in fields:
            return json.dumps(fields if "tv_results" in fields else {"MediaContainer": fields}).encode()
        container = sb.ElementTree.Element("MediaContainer", {key: str(value) for key, value in fields.items() if key != "Metadata"})
        for each in fields.get("Metadata", ()):
            element = sb.ElementTree.SubElement(container, "Video", {key: str(value) for key, value in each.items() if key != "Guid"})
            for guid in each.get("Guid", ()):
                sb.ElementTree.SubElement(element, "Guid", guid)
        return sb.ElementTree.tostring(container)

    def __enter__(self):
        threading.Thread(target=functools.partial(self.server.serve_forever, 0.01), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def pages(self, path, items):
        """Give items at a path, in the pages that are asked for."""
        def page(query):
            start, size = int(query.get("X-Plex-Container-Start", 0)), int(query.get("X-Plex-Container-Size", 10 ** 9))
            return {"totalSize": len(items), "Metadata": items[start:start + size]}
        self.answers[path] = page


def server_flags(library, token_file):
    return ("-plex-server-url", library.url, "-plex-token-file", token_file, "-plex-machine-id", "m1", "-no-plex-events")


def flags(database, *more):
    return ("-tracker-db", database, "-rate-limit", "0", *more)


def tracker(path, *words, status=0):
    """What a command of the tracker prints."""
    done = call("tracker", *words, "-tracker-db", path)
    assert done.status == status, done
    return done.out + done.err


@pytest.fixture
def database(tmp_path):
    """The path of a tracker that has Breaking Bad and Heat."""
    path = tmp_path / "tracker.db"
    file = tmp_path / "shows.json"
    file.write_text(json.dumps({"shows": [BREAKING_BAD], "movies": [HEAT]}))
    assert tracker(path, "import", file) == "The tracker now has 1 show, 3 episodes and 1 movie.\n1 play in the file: 1 new, 0 known before.\n"
    return path


def rows(path):
    """The journal."""
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.execute("PRAGMA query_only = 1")
        connection.row_factory = sqlite3.Row
        return [{**row, "status": row["status"] or "waiting"} for row in connection.execute("SELECT * FROM webhook_log ORDER BY id")]


def done(path, count=1):
    """The journal, when so many of it are finished."""
    def finished():
        found = rows(path)
        return found if len(found) >= count and all(row["status"] != "waiting" for row in found) else None
    return eventually(finished)


def plays(path, show_id=1):
    """How often each episode of a show was played."""
    show, = json.loads(tracker(path, "show", show_id, "-json"))
    return [len(each["watched"]) for each in show["episodes"]]


def due(path):
    """The time has come for what is to be tried again."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE webhook_log SET retry_at = 1 WHERE retry_at > 1")


def brief(row):
    return row["status"], row["action"], row["season"], row["episode"], row["show_id"]


class Keeper:
    """The daemon's journal and worker in this process: what is sent is in the file, and then finished."""

    def __init__(self, path, *words):
        self.config = config("-tracker-db", str(path), *map(str, words))
        self.store = sb.Tracker(str(path), create=True, patient=True)
        self.journal = sb.Journal(self.store, self.config.accounts)
        self.worker = sb.Worker(self.config, self.store, sb.server_of(self.config))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.store.close()

    def send(self, metadata=PILOT, event="media.scrobble", **more):
        webhook, _ = sb.parse_webhook(*sb.encode_webhook(payload(event, metadata=metadata, **more)))
        self.journal.append(webhook)
        self.worker.drain()


# === Ground ===

def test_every_limit_is_a_positive_number():
    limits = {name: value for name, value in vars(sb).items() if re.fullmatch(r"MAX_\w+|\w+_S", name)}
    assert len(limits) > 12
    for name, value in limits.items():
        for each in value if isinstance(value, tuple) else (value,):
            assert each > 0, name


@pytest.mark.parametrize("value, expected", [
    ("x", "x"), ("", ""), (7, "7"), (True, ""), (None, ""), ([], ""), ({"a": 1}, ""), (1.5, ""),
    ("x" * 5000, "x" * sb.MAX_TEXT), (10 ** 400, "")])
def test_text_is_bounded_and_never_raises(value, expected):
    assert sb.text(value) == expected


@pytest.mark.parametrize("value, expected", [
    ("61000", 61000), (61000, 61000), (61000.9, 61000), ("0", 0), (0, 0), (None, None), ("", None), ("-1", None), (-1, None),
    (True, None), ("1e9", None), ("1_000", None), (" 7", None), ("٣", None), ("9" * 400, None), (float("nan"), None),
    (float("inf"), None), (2 ** 60, None), ([], None), ({}, None)])
def test_a_number_is_one_of_plex_or_none(value, expected):
    assert sb.number(value) == expected


def test_an_item_is_the_same_from_json_and_from_xml():
    assert sb.parse_item(SONG) == sb.parse_item({key: str(value) for key, value in SONG.items()})


def test_the_artist_is_the_tracks_own_where_plex_gives_it():
    assert sb.parse_item({**SONG, "grandparentTitle": "Various Artists", "originalTitle": "Britney Spears"}).artist == "Britney Spears"
    assert sb.parse_item(SONG).artist == "Radiohead"


@pytest.mark.parametrize("thumb", ["@evil.example/x", "//evil.example/x", "http://evil.example/", "/library/../x?y", "/library/x y", 7, None, "/photo/:/transcode",
                                   "/library/sections/1/refresh", "/library/metadata/1/../../security/token"])
def test_no_token_goes_where_a_thumb_should_not_point(thumb):
    assert sb.parse_item({**SONG, "thumb": thumb}).thumb == ""


@pytest.mark.parametrize("value, expected", [
    ("Radiohead", "Radiohead"), ("OK Computer", '"OK Computer"'), ("", '""'), (None, '""'), (7, "7"), ('"live"', '"\\"live\\""'),
    ("a=b", '"a=b"'), ("it's", '"it\'s"'), ("back\\slash", '"back\\\\slash"'), ("Søn", "Søn"), ("日本", "日本"),
    ("a\nstate=playing", '"a\\nstate=playing"'), ("\x1b[31m", '"\\u001b[31m"'), ("\x9b31m", '"\\u009b31m"'),
    ("\u202eevil", '"\\u202eevil"'), ("\u2028", '"\\u2028"'), ("\ud800", '"\\ud800"'), ("P!nk", '"P!nk"'), ("AC/DC", "AC/DC"), ("R.E.M.", "R.E.M."), ("\x7f", '"\\u007f"'), ("\U000e0001", '"\\udb40\\udc01"')])
def test_a_value_is_quoted_so_that_it_forges_and_colours_nothing(value, expected):
    assert sb.quoted(value) == expected
    assert sb.quoted(value).isprintable()
    assert json.loads(expected if expected.startswith('"') else json.dumps(expected)) == ("" if value is None else str(value))


@pytest.mark.parametrize("fields, line", [
    ({}, 'state=playing title="Karma Police" artist=Radiohead album="OK Computer" position_ms=61000 duration_ms=264000 player="Living Room"'),
    ({"type": "episode", "parentIndex": 1, "index": 0, "grandparentTitle": "Twin Peaks", "title": "Pilot"},
     'state=playing title=Pilot show="Twin Peaks" season=1 episode=0 position_ms=61000 duration_ms=264000 player="Living Room"'),
    ({"type": "movie", "title": "October Sky", "duration": None},
     'state=playing title="October Sky" artist="" album="" position_ms=61000 duration_ms=0 player="Living Room"')])
def test_a_change_is_one_line_with_the_contracts_keys_in_order(fields, line):
    assert sb.text_line("", sb.change_fields(change(**fields), name_machine=False)) == line


def test_a_line_adds_the_machine_where_asked_and_the_reason_where_there_is_one():
    fields = sb.change_fields(change()._replace(reason="frozen"), name_machine=True, say_why=True)
    assert list(fields.items())[-3:] == [("machine_id", "m1"), ("reason", "frozen"), ("by", "webhook")]


def test_json_lines_have_the_same_keys_and_are_ascii_safe():
    fields = sb.change_fields(change(title="\x1b\n\u202e日本"), name_machine=False)
    line = sb.json_line(fields)
    assert line.isprintable() and json.loads(line) == fields and list(json.loads(line)) == list(fields)


@pytest.mark.parametrize("word, at", [("2026-11-21T20:15:00Z", 1795292100), ("2026-11-21T21:15:00+01:00", 1795292100)])
def test_times_are_read_with_their_zone(word, at):
    assert sb.unix_time(word) == at and sb.iso_time(at) == "2026-11-21T20:15:00Z"


ANY_TIME = [0, -1, 1.5, sb.LAST_TIME, 2 ** 31, 2 ** 53, 10 ** 30, -10 ** 30, 1e300, math.inf, -math.inf, math.nan, "abc", "", "4102444800", b"x", [], {}, True]


@pytest.mark.parametrize("at", ANY_TIME)
def test_a_time_of_any_shape_can_be_shown_on_32_bits_too(at, monkeypatch):
    real = time.localtime

    def narrow(at=None):
        if at is not None and not -2 ** 31 <= at < 2 ** 31:
            raise OverflowError("timestamp out of range for platform time_t")
        return real(at)
    monkeypatch.setattr(time, "localtime", narrow)
    assert 0 <= sb.time_of(at) <= sb.LAST_TIME and sb.local_time("%Y", at) in map(str, range(1969, 2039))
    assert re.fullmatch(r"(19|20)\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", sb.iso_time(at))
    entry = sb.play_entry({**PILOT, "viewedAt": at}, SERVER)
    assert 0 <= entry.received_at <= sb.LAST_TIME
    play, = sb.episode_row({**PILOT, "viewCount": 1, "lastViewedAt": at}, 2.0 ** 40)[3]
    assert play is None or 0 <= play <= sb.LAST_TIME


@pytest.mark.parametrize("word", ["9999-12-31T23:59:59Z", "2038-01-19T03:14:08+00:00", "9999-12-31T23:59:59-23:59"])
def test_a_date_beyond_2038_is_the_last_one(word):
    assert sb.unix_time(word) == sb.LAST_TIME and sb.iso_time(sb.LAST_TIME) == "2038-01-19T03:14:07Z"


# --- the world

def test_a_rotated_token_is_read_again_and_a_broken_file_changes_nothing(token_file, lines):
    token = secret_file(token_file).first
    assert token() == TOKEN
    token_file.write_text("")
    assert [token(), token()] == [TOKEN, TOKEN]
    replacement = token_file.with_name("new")
    replacement.write_text("another-token")
    replacement.chmod(0o600)
    replacement.rename(token_file)
    assert token() == "another-token"
    token_file.unlink()
    assert [token(), token()] == ["another-token", "another-token"]
    assert lines == [
        f"<4>the old Plex token stays in use: -plex-token-file: {token_file} is empty, or not a regular file; put the Plex token there.",
        f"<6>the Plex token was read again file={token_file}",
        f"<4>the old Plex token stays in use: -plex-token-file: {token_file} cannot be read (No such file or directory); "
        "put the Plex token there, readable by you only (chmod 600)."]


@pytest.mark.parametrize("pasted", ["x5-Ab_9", " x5-Ab_9\r\n", '"x5-Ab_9"', "'x5-Ab_9'", "\u201cx5-Ab_9\u201d", "\ufeffx5-Ab_9", "X-Plex-Token=x5-Ab_9",
    "x-plex-token: x5-Ab_9", '"X-Plex-Token": "x5-Ab_9"', "&X-Plex-Token=x5-Ab_9&a=b", "export X-Plex-Token='x5-Ab_9'",
    "https://192-168-1-5.0ab.plex.direct:32400/library/metadata/7?checkFiles=1&X-Plex-Token=x5-Ab_9",
    "http://plex:32400/x?X-Plex-Token=x5-Ab_9#top"])
def test_a_token_is_found_in_what_people_paste(pasted, tmp_path, lines):
    assert sb.bare_token(pasted) == "x5-Ab_9"
    file = tmp_path / "token"
    file.write_text(pasted, encoding="utf-8")
    file.chmod(0o600)
    assert sb.read_secrets("-plex-token-file", str(file))[0] == ("x5-Ab_9",)
    assert lines == ([] if pasted.strip() == "x5-Ab_9" else [
        f"<4>-plex-token-file: the token was found, but {file} holds more; put nothing but the token there."])


@pytest.mark.parametrize("pasted", ["", "a b", "http://plex:32400/", "X-Plex-Token=", "token=x"])
def test_what_holds_no_token_stays_what_it_is(pasted):
    assert sb.bare_token(pasted) == pasted


@pytest.mark.parametrize("content, sentence", [
    (b"", "is empty, or not a regular file; put the Plex token there."), (b" \n", "is empty, or not a regular file; put the Plex token there."),
    (b"a b", "holds more than a Plex token; put one word of plain characters there."),
    (b"a\nb", "holds more than a Plex token; put one word of plain characters there."),
    (b"\xff\xfe", "holds more than a Plex token; put one word of plain characters there."),
    (b"x" * 9999, "holds more than a Plex token; put one word of plain characters there."),
    (b"a\r\nX-Evil: 1", "holds more than a Plex token; put one word of plain characters there."),
    (None, "cannot be read (No such file or directory); put the Plex token there, readable by you only (chmod 600).")])
def test_a_token_file_without_a_token_is_the_operators_fault(content, sentence, tmp_path):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(sb.ConfigError) as error:
        secret_file(file)
    assert str(error.value) == f"-plex-token-file: {file} {sentence}"


def test_a_token_file_that_is_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(sb.ConfigError, match="is empty, or not a regular file"):
        secret_file(tmp_path / "fifo")


def test_a_token_file_that_others_can_read_is_a_warning(token_file, lines, monkeypatch):
    secret_file(token_file)
    assert lines == []
    token_file.chmod(0o644)
    secret_file(token_file)
    assert lines == [f"<4>others can read the file of -plex-token-file; correct it with: chmod 600 {token_file}"]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(token_file.parent))       # systemd guards the folder
    secret_file(token_file)
    assert len(lines) == 1


@pytest.mark.parametrize("content, sentence", [
    ("a&b", "holds more than a webhook secret; put one word of plain characters there, or two, each on its own line."),
    ("a\nb\nc", "holds more than a webhook secret; put one word of plain characters there, or two, each on its own line.")])
def test_a_secret_must_survive_a_url(tmp_path, content, sentence):
    file = tmp_path / "secret"
    file.write_text(content)
    with pytest.raises(sb.ConfigError, match=re.escape(sentence)):
        sb.SecretFile("-webhook-secret-file", str(file))


# === Player ===

def test_a_webhook_is_parsed_from_its_multipart_body():
    webhook, thumb = sb.parse_webhook(MULTIPART, BODY)
    assert webhook == sb.Webhook("media.play", "m1", "Living Room", sb.parse_item(SONG), None, "0" * 40, "1", "me", True, None)
    assert thumb == THUMB


def test_plain_json_is_accepted_from_proxies_and_testers():
    webhook, thumb = sb.parse_webhook("application/json; charset=utf-8", payload())
    assert webhook.item == sb.parse_item(SONG) and thumb == b""


def part(name, content, line="\r\n"):
    return f"--B{line}Content-Disposition: form-data; {name}{line}{line}{content}{line}".encode()


@pytest.mark.parametrize("body, thumb", [
    pytest.param(part('name="thumb"; filename="payload"', "T") + part('name="payload"', '{"event":"e"}') + b"--B--", b"T", id="thumb first"),
    pytest.param(part('name=payload', '{"event":"e"}') + b"--B--\r\n", b"", id="no quotes"),
    pytest.param(part('name="payload"; filename="p.json"', '{"event":"e"}') + b"--B--\r\n", b"", id="a filename"),
    pytest.param(part('name="payload"', '{"event":"e"}', "\n") + b"--B--\n", b"", id="LF alone"),
    pytest.param(b"preamble\r\n" + part('name="payload"', '{"event":"e"}') + b"--B-- \r\nepilogue", b"", id="preamble and epilogue"),
    pytest.param(part('name="payload"', '{"event":"e"}') + part('name="payload"', "[]") + b"--B--", b"", id="two: the first"),
    pytest.param(part('name="other"', "x") + part('name="payload"', '{"event":"e"}') + b"--B--", b"", id="another part"),
    pytest.param(part('name="thumb"', "a--Bb\r\n --B\r\n") + part('name="payload"', '{"event":"e"}') + b"--B--", b"a--Bb\r\n --B\r\n",
                 id="delimiters within lines"),
])
def test_parts_are_chosen_by_name_alone(body, thumb):
    assert sb.parse_webhook('multipart/form-data; boundary="B"', body) == (sb.Webhook("e"), thumb)


NO_JSON = "The payload is no JSON object, or has more than 20000 values."


@pytest.mark.parametrize("content_type, body, status, sentence", [
    ("multipart/form-data; boundary=B", b"", 400, "The body is cut short: its closing boundary is missing."),
    ("multipart/form-data; boundary=B", b"--B--", 400, "The part named payload is missing; it holds a webhook's JSON."),
    ("multipart/form-data", b"--B--", 400, "The Content-Type has no valid boundary of the parts."),
    ("multipart/form-data; boundary=" + "x" * 71, b"", 400, "The Content-Type has no valid boundary of the parts."),
    ("multipart/form-data; boundary=\xe9", b"", 400, "The Content-Type has no valid boundary of the parts."),
    ("multipart/form-data; boundary=B", b"--B\r\n--B--", 400, "A part of the body has no end of its header."),
    ("multipart/form-data; boundary=B", part('name="x"', "") * 17 + b"--B--", 400, "The body has more than 16 parts."),
    ("multipart/form-data; boundary=B", part('name="payload"', "{") + b"--B--", 400, NO_JSON),
    ("application/json", b"\xff\xfe", 400, NO_JSON),
    ("application/json", b"[" * 20000, 400, NO_JSON),
    ("application/json", b"[" * 20001, 400, NO_JSON),
    ("application/json", b"9" * 5000, 400, NO_JSON),
    ("application/json", b"null", 400, NO_JSON),
    ("application/json", b" " * (2 ** 20 + 1), 413, "The payload is larger than 1048576 bytes."),
    *(("application/json", body, 400, "The payload is not a Plex webhook: it has no event.")
      for body in (b"[]", b"7", b'"media.play"', b"{}", b'{"event": null}', b'{"event": 7}', b'{"event": ""}', b'[["event"]]')),
    ("text/html", b"<p>", 415, "A Plex webhook is multipart/form-data; this is something else."),
    ("", b"", 415, "A Plex webhook is multipart/form-data; this is something else."),
])
def test_what_is_no_webhook_is_refused_in_a_sentence(content_type, body, status, sentence):
    with pytest.raises(sb.WebhookError) as error:
        sb.parse_webhook(content_type, body)
    assert (error.value.status, str(error.value)) == (status, sentence)


@pytest.mark.parametrize("player", [None, [], 7, "x", {"uuid": 7.5, "title": []}, {"uuid": None}])
@pytest.mark.parametrize("metadata", [None, [], 7, {"title": {}, "duration": "x", "index": -1}])
def test_fields_of_any_shape_count_as_missing(player, metadata):
    webhook, _ = sb.parse_webhook("application/json", json.dumps({"event": "e", "Player": player, "Metadata": metadata}).encode())
    assert webhook.player_uuid == webhook.player_title == ""
    assert webhook.item in (None, sb.Item())


def test_every_truncation_of_a_real_body_is_refused_as_the_senders_fault():
    for end in range(len(BODY) - 4):
        with pytest.raises(sb.WebhookError) as error:
            sb.parse_webhook(MULTIPART, BODY[:end])
        assert error.value.status == 400


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_mutations_raise_nothing_but_a_webhook_error(seed):
    rng = random.Random(seed)
    body = sb.encode_webhook(payload(), THUMB[:40])[1]
    for _ in range(1500):
        mutated, header = bytearray(body), bytearray(MULTIPART.encode())
        for target in (mutated, mutated, header):
            at = rng.randrange(len(target))
            match rng.randrange(4):
                case 0:
                    target[at] = rng.randrange(256)
                case 1:
                    del target[at:at + rng.randrange(1, 30)]
                case 2:
                    target[at:at] = target[rng.randrange(len(target)):][:30]
                case 3:
                    target[at:at + 1] = rng.choice([b"\r\n", b"\0", b"--", b'"', b"\xff", b"{", b"[", b"\\ud800", b";boundary*=x'y'%ff"])
        with contextlib.suppress(sb.WebhookError):
            sb.parse_webhook(header.decode("latin-1"), bytes(mutated))


@pytest.mark.parametrize("file", captures("webhooks"))
def test_real_webhooks_are_parsed(file):
    content = file.read_bytes()
    webhook, thumb = sb.parse_webhook(*sb.encode_webhook(content, THUMB))
    fields = json.loads(content)
    assert webhook.event == fields["event"]
    assert webhook.player_uuid == fields["Player"]["uuid"]
    assert webhook.item.title == fields["Metadata"]["title"]
    assert webhook.item.rating_key == fields["Metadata"]["ratingKey"]
    assert thumb == THUMB


def test_a_session_is_parsed_whole():
    assert sessions(session_xml(offset="61000")) == (sb.Session(
        "7", "m1", PLAYING, sb.parse_item(SONG), 61000, "Living Room", "Plexamp", "Linux", "me"),)


def test_a_session_may_lack_all_but_its_player():
    xml = b"<MediaContainer><Video><Player machineIdentifier='m1'/></Video><Track/><Photo><Player/></Photo>text</MediaContainer>"
    assert sb.parse_sessions(xml) == (sb.Session("", "m1", BUFFERING, sb.Item(), None, "", "", "", ""),)


@pytest.mark.parametrize("file", captures("sessions"))
def test_real_sessions_are_parsed(file):
    found = sb.parse_sessions(file.read_bytes())
    assert len(found) == (0 if "empty" in file.name else 1)
    for session in found:
        assert session.machine_identifier and session.item.title and session.state in (PLAYING, PAUSED)


@pytest.mark.parametrize("title", ["bell \x07", "escape \x1b[31m", "null &#0;", "&#x1F;", "&#xffff;", "\x0b", "&#27;[0m"])
def test_characters_that_xml_forbids_are_stripped(title):
    xml = sessions_xml(session_xml()).decode().replace("Karma Police", title)
    assert len(sb.parse_sessions(xml.encode())) == 1


def test_bytes_that_are_no_utf8_are_no_obstacle():
    assert sb.parse_sessions(sessions_xml(session_xml()).replace(b"Karma", b"K\xff"))[0].item.title == "K\ufffd Police"


NOT_XML = "The server's answer is not XML, or is cut short. Does -plex-server-url point to Plex Media Server?"
NO_LIST = "The server's answer is XML, but not a list of sessions. Does -plex-server-url point to Plex Media Server?"
DOCTYPE = "The server's answer has a DOCTYPE, which Plex never sends."
BOMB = '<!DOCTYPE M [<!ENTITY a "lol">' + "".join(
    f'<!ENTITY {b} "{"&" + a + ";" * 1}">' for a, b in zip("abcdefg", "bcdefgh", strict=True)) + "]><MediaContainer>&h;</MediaContainer>"


@pytest.mark.parametrize("xml, sentence", [
    (b"", NOT_XML), (b"<html><h1>401 Unauthorized</h1></html>", NO_LIST), (b"<html><br></html>", NOT_XML), (b"\x00\xff<<<", NOT_XML),
    (b'<Response code="503" title="Maintenance"/>', NO_LIST), (sessions_xml(session_xml())[:200], NOT_XML),
    (b"<!DOCTYPE html><html/>", DOCTYPE), (BOMB.encode(), DOCTYPE), (b"<MediaContainer>&boom;</MediaContainer>", NOT_XML),
    ('<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a><MediaContainer/>'.encode("utf-16"), DOCTYPE)])
def test_an_answer_that_is_no_list_of_sessions_is_a_plex_error(xml, sentence):
    with pytest.raises(sb.PlexError) as error:
        sb.parse_sessions(xml)
    assert (error.value.fault, str(error.value)) == ("nonsense", sentence)


@pytest.mark.parametrize("first, second", [
    (session_xml(PAUSED, key="9"), session_xml(PLAYING, key="1", item=OTHER)),
    (session_xml(PLAYING, key="9", tag="Photo", type="photo"), session_xml(PLAYING, key="1", item=OTHER)),
    (session_xml(PAUSED, key="9"), session_xml(PAUSED, key="10", item=OTHER)),
    (session_xml(PAUSED, key="9"), session_xml(BUFFERING, key="1", item=OTHER))])
def test_of_two_sessions_of_a_player_the_playing_one_then_no_photo_then_the_newest_counts(first, second):
    for order in ((first, second), (second, first)):
        assert sb.find_session(sessions(*order)).item.rating_key == "102"


def test_no_session_is_found_where_there_is_none():
    assert sb.find_session(()) is None


@pytest.mark.parametrize("body, items, total", [
    (b'{"MediaContainer": {"totalSize": 9, "Metadata": [{"ratingKey": "3", "Guid": [{"id": "tmdb://3"}]}, 7]}}', [("3", ("tmdb://3",))], 9),
    (b'{"MediaContainer": {"Directory": [{"ratingKey": 3}]}}', [("3", ())], None), (b'{"MediaContainer": {}}', [], None),
    (b'\n<?xml version="1.0"?><MediaContainer totalSize="9"><Directory ratingKey="3"><Guid id="tmdb://3"/><Genre tag="x"/></Directory>'
     b'</MediaContainer>', [("3", ("tmdb://3",))], 9)])
def test_a_library_is_the_same_in_json_and_in_xml(body, items, total):
    attributes, found = sb.parse_container(body)
    assert [(sb.parse_item(each).rating_key, sb.item_guids(each)) for each in found] == items
    assert sb.number(attributes.get("totalSize")) == total


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"MediaContainer": []}', b"{", b"[" * 100000, b"<html/>", b"\xff"])
def test_what_is_no_library_is_the_servers_fault(body):
    with pytest.raises(sb.PlexError):
        sb.parse_container(body)


@pytest.mark.parametrize("file", [each for each in captures("metadata") if "plextv" not in str(each) and "tmdb" not in str(each)
                                  and "401" not in str(each)])
def test_real_libraries_are_parsed(file):
    attributes, items = sb.parse_container(file.read_bytes()) if "503" not in file.name else ({"size": 0}, [])
    assert attributes
    for fields in items:
        assert sb.parse_item(fields) and isinstance(sb.item_guids(fields), tuple)
    if "library_shows" in file.name:
        assert sb.parse_ids(sb.item_guids(items[0])) == sb.Ids(3, 3, None)


@pytest.mark.parametrize("data", [
    {"PlaySessionStateNotification": NOTE}, {"PlaySessionStateNotification": [NOTE]},
    {"NotificationContainer": {"type": "playing", "size": 1, "PlaySessionStateNotification": [NOTE]}}])
def test_a_notification_is_the_same_in_each_of_plexs_forms(data):
    assert sb.parse_notifications(json.dumps(data).encode()) == (sb.Notification(PLAYING, "7", "m1", "101", 117412),)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"7", b"{}", b"\xff\xfe", b"[" * 100000, b'{"NotificationContainer": 7}',
                                  b'{"PlaySessionStateNotification": "stopped"}', b'{"PlaySessionStateNotification": [null, 7, {"state": {}}]}',
                                  b'{"PlaySessionStateNotification": {"state": "error"}}'])
def test_what_is_no_notification_is_passed_over(data):
    assert sb.parse_notifications(data) == ()


def test_events_are_read_from_the_lines_of_a_stream():
    stream = b"event: ping\ndata: {}\n\n: a comment\n\nevent: playing\r\ndata: {\"a\":\r\ndata:1}\r\n\r\nno colon\n\ndata: x\n\nevent: cut\ndata: {"
    assert list(sb.read_events(stream.splitlines(keepends=True))) == [("ping", b" {}"), ("playing", b' {"a":1}'), ("", b" x")]


def test_an_event_of_endless_lines_is_bounded():
    (_, data), = sb.read_events([*itertools.repeat(b"data: " + b"x" * 1000, 1000), b""])
    assert len(data) <= sb.MAX_EVENT + 1001


class Judge:
    """advance() in virtual time: a world of sessions, and looks made when the state says so."""

    def __init__(self, **fields):
        self.player = sb.PlayerState("m1", **{"has_server": True, "poll_interval_s": 30.0, "look_at": 0.0, **fields})
        self.at, self.world, self.reports, self.looks = 0.0, (), [], 0

    def observe(self, observation):
        self.player, reports = sb.advance(self.player, observation, self.at)
        self.reports += reports

    def hear(self, event="media.play", item=SONG, uuid="m1", **fields):
        self.observe(sb.Webhook(event, uuid, "Living Room", sb.parse_item(item) if item else None, **fields))

    def note(self, state=PLAYING, rating_key="101", player="m1", key="7", view_offset=None):
        """The event stream says something."""
        self.observe(sb.Notification(state, key, player, rating_key, view_offset))

    def show(self, *each):
        """From now on the sessions show these; none: the server cannot be reached."""
        self.world = None if each == (None,) else sessions(*each)

    def wait(self, seconds=0.0):
        """Let time go by, looking when a look is due."""
        end = self.at + seconds
        while self.player.look_at <= end:
            self.at = max(self.at, self.player.look_at)
            self.looks += 1
            assert self.looks < 10000
            self.observe(Outage("unreachable", "No.") if self.world is None else Look(self.world))
        self.at = end

    def said(self):
        """The changes reported since the last call: (state, title)."""
        said = [(r.state, r.item.title) for r in self.reports if isinstance(r, Change)]
        self.reports = []
        return said


A, B = "Karma Police", "No Surprises"


def test_the_table_of_transitions_is_total():
    believed, witnessed = (STOPPED, PLAYING, PAUSED), (STOPPED, PLAYING, PAUSED, BUFFERING)
    assert set(sb.TRANSITIONS) == set(itertools.product(believed, witnessed))
    assert set(sb.TRANSITIONS.values()) == {*believed, None}
    assert set(sb.CLAIMS.values()) == set(believed)


@pytest.mark.parametrize("believed", (STOPPED, PLAYING, PAUSED))
@pytest.mark.parametrize("witnessed", (STOPPED, PLAYING, PAUSED, BUFFERING))
@pytest.mark.parametrize("same", (True, False))
def test_each_transition_is_reported_once_and_only_if_it_is_a_change(believed, witnessed, same):
    judge = Judge(state=believed, item=sb.parse_item(SONG))
    judge.show(*[] if witnessed == STOPPED else [session_xml(witnessed, item=SONG if same else OTHER)])
    judge.wait(0)
    becomes = sb.TRANSITIONS[believed, witnessed]
    known = same or witnessed == STOPPED or becomes is None
    changed = becomes not in (believed, None) or not known
    assert judge.said() == ([(becomes, A if known else B)] if changed else [])
    judge.observe(Look(judge.world))
    assert judge.said() == []


def test_music_that_plays_at_the_start_is_reported():
    judge = Judge()
    judge.show(session_xml(offset="61000"))
    judge.wait(0)
    assert judge.reports == [Change(PLAYING, STOPPED, sb.parse_item(SONG), 61000, "Living Room", "m1", "sessions")]


def test_a_webhook_is_a_reason_to_look_at_once_and_nothing_more():
    judge = Judge(look_at=math.inf, poll_interval_s=0.0)
    judge.hear("media.play")
    assert judge.said() == [] and judge.player.look_at == judge.at
    judge.wait(60)
    assert judge.said() == []


@pytest.mark.parametrize("lag", [0.0, 0.1, 0.3, 0.7, 1.3, 1.99])
def test_sessions_may_lag_behind_the_webhook_by_up_to_two_seconds(lag):
    judge = Judge()
    judge.hear("media.play")
    judge.wait(lag)
    judge.show(session_xml())
    judge.wait(0.4)
    assert judge.said() == [(PLAYING, A)]
    judge.wait(sb.BUDGET_S)                                # two such series at once would take all looks
    judge.hear("media.stop")
    judge.wait(lag)
    assert judge.said() == []
    judge.show()
    judge.wait(0.4)
    assert judge.said() == [(STOPPED, A)]


def test_looks_end_when_the_sessions_bear_the_webhook_out_or_time_is_up():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml())
    judge.hear("media.play")
    judge.wait(60)
    assert judge.looks == 2                                # the second confirms
    judge.hear("media.pause")
    judge.wait(60)
    assert judge.looks == 3 + len(sb.RELOOK_S) and judge.player.claims == ()
    judge.hear("media.stop", item=OTHER)                   # of an item that is over: borne out
    judge.wait(60)
    assert judge.looks == 5 + len(sb.RELOOK_S)


def test_a_stopped_player_is_reported_once_although_its_session_is_gone():
    judge = Judge()
    judge.show(session_xml(offset="61000"))
    judge.wait(0)
    judge.at = 5.0
    judge.show()
    for _ in range(3):
        judge.hear("media.stop")
        judge.wait(1)
    assert judge.reports[1:] == [Change(STOPPED, PLAYING, sb.parse_item(SONG), 66000, "Living Room", "m1", "webhook")]


def test_a_position_is_never_beyond_the_end():
    judge = Judge()
    judge.show(session_xml(offset="999999"))
    judge.wait(0)
    assert judge.reports[0].position_ms == 264000


def test_a_position_that_is_not_said_runs_on_from_what_was():
    judge = Judge()
    judge.show(session_xml(offset=None, duration=""))
    judge.wait(0)
    judge.at = 10.0
    judge.observe(Look(judge.world))
    judge.at = 15.0
    judge.observe(Look(()))
    assert [report.position_ms for report in judge.reports] == [0, 15000]


def test_webhooks_that_come_twice_late_or_out_of_order_cause_looks_and_nothing_else():
    judge = Judge()
    judge.show(session_xml(item=OTHER))
    for event, item in (("media.play", OTHER), ("media.play", SONG), ("media.stop", SONG), ("media.pause", SONG), ("media.play", OTHER)):
        judge.hear(event, item)
        judge.wait(0.3)
    assert judge.said() == [(PLAYING, B)]


def test_tracks_that_change_as_stop_and_play():
    judge = Judge()
    judge.show(session_xml())
    judge.wait(0)
    judge.show()
    judge.hear("media.stop")
    judge.wait(0.2)
    judge.show(session_xml(item=OTHER, key="8"))
    judge.hear("media.play", OTHER)
    judge.wait(0.2)
    assert judge.said() == [(PLAYING, A), (STOPPED, A), (PLAYING, B)]


def test_a_track_change_at_once_is_one_line():
    judge = Judge()
    judge.show(session_xml())
    judge.wait(0)
    judge.show(session_xml(item=OTHER))
    judge.hear("media.play", OTHER)
    judge.wait(0)
    assert judge.said() == [(PLAYING, A), (PLAYING, B)]


def test_a_new_session_key_for_what_plays_on_is_no_change():
    judge = Judge()
    judge.show(session_xml(key="7"))
    judge.wait(0)
    judge.show(session_xml(key="1", offset="9000"))
    judge.wait(60)
    assert judge.said() == [(PLAYING, A)]


def test_buffering_starts_what_was_stopped_and_leaves_alone_what_is_paused():
    judge = Judge()
    judge.show(session_xml(BUFFERING))
    judge.wait(1)
    judge.show(session_xml(PLAYING))
    judge.wait(2)
    judge.show(session_xml(PAUSED))
    judge.hear("media.pause")
    judge.wait(0)
    judge.show(session_xml(BUFFERING, item=OTHER))
    judge.observe(Look(judge.world))
    judge.wait(8)
    assert judge.said() == [(PLAYING, A), (PAUSED, A)]
    judge.show(session_xml(PAUSED, item=OTHER))
    judge.wait(sb.BUFFERING_S)
    assert judge.said() == [(PAUSED, B)]


def test_what_buffers_plays_when_a_webhook_says_so_too():
    judge = Judge(state=PAUSED, item=sb.parse_item(SONG))
    judge.show(session_xml(BUFFERING))
    judge.hear("media.resume")
    judge.wait(0)
    assert judge.said() == [(PLAYING, A)]


def test_other_players_are_none_of_ours():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(player="m2"))
    judge.wait(0)
    for _ in range(20):
        judge.hear("media.play", uuid="m2")
    judge.hear("library.new", uuid="")
    judge.wait(10)
    assert judge.said() == [] and judge.looks == 2         # one at the start, one for all of theirs


def test_a_player_whose_webhooks_carry_another_uuid_is_found_all_the_same():
    judge = Judge(poll_interval_s=0.0)
    judge.wait(0)
    judge.show(session_xml())
    judge.hear("media.play", uuid="another name of m1")
    judge.wait(sb.FOREIGN_S)
    assert judge.said() == [(PLAYING, A)]


def test_a_slow_look_finds_what_no_webhook_told():
    judge = Judge()
    judge.show(session_xml())
    judge.wait(0)
    judge.show(session_xml(item=OTHER))
    judge.wait(30)
    judge.show()
    judge.wait(30)
    judge.show(session_xml())
    judge.wait(30)
    assert judge.said() == [(PLAYING, A), (PLAYING, B), (STOPPED, B), (PLAYING, A)]
    assert judge.looks == 4


def test_a_paused_player_may_stay_paused_for_hours():
    judge = Judge()
    judge.show(session_xml(offset="1000"))
    judge.wait(0)
    judge.show(session_xml(PAUSED, offset="5000"))
    judge.hear("media.pause")
    judge.wait(20000)
    judge.show(session_xml(PLAYING, offset="5000"))
    judge.hear("media.resume")
    judge.wait(10)
    assert judge.said() == [(PLAYING, A), (PAUSED, A), (PLAYING, A)]
    assert sb.position_ms(judge.player, judge.at) == 15000


@pytest.mark.parametrize("poll", [1.0, 2.0, 30.0, 300.0])
def test_a_player_that_crashed_is_stopped_once_and_plays_again_when_it_moves(poll):
    judge = Judge(poll_interval_s=poll)
    for step in range(10):
        judge.show(session_xml(offset=str(step * 10000)))
        judge.wait(10)
    assert judge.said() == [(PLAYING, A)]
    judge.wait(2 * poll + sb.FROZEN_S + 1)
    assert [(r.state, r.reason) for r in judge.reports] == [(STOPPED, "frozen")]
    judge.wait(1000)
    judge.show(session_xml(offset="123456"))
    judge.wait(poll)
    assert judge.said() == [(STOPPED, A), (PLAYING, A)]
    judge.show()
    judge.wait(poll)
    assert judge.said() == [(STOPPED, A)]


@pytest.mark.parametrize("fields", [{"product": "Plex for Sonos"}, {"offset": None}])
def test_what_never_tells_its_position_is_no_ghost(fields):
    judge = Judge(poll_interval_s=2.0)
    judge.show(session_xml(**fields))
    judge.wait(600)
    assert judge.said() == [(PLAYING, A)]


def test_where_a_position_was_renewed_last_tells_when_its_session_lived_last():
    judge = Judge(poll_interval_s=30.0)                    # two rooms: the player plays two items
    judge.show(session_xml(key="7", offset="0"))
    judge.wait(1)
    judge.note(PLAYING)
    judge.show(session_xml(key="7", offset="10000"), session_xml(key="8", offset="0", item=OTHER))
    judge.wait(9)
    judge.note(PLAYING, "102", key="8")
    judge.wait(0.5)
    judge.note(PLAYING)
    judge.wait(2)
    assert judge.said() == [(PLAYING, A), (PLAYING, B)]
    judge.show(session_xml(key="7", offset="20000"), session_xml(key="8", offset="30000", item=OTHER))
    judge.wait(30)                                         # the slow look finds that both have moved, 7 for 10 s only
    judge.note(PAUSED, "102", key="8")
    judge.show(session_xml(key="7", offset="20000"), session_xml(PAUSED, key="8", offset="31000", item=OTHER))
    judge.wait(20)
    assert judge.said() == [(PAUSED, B)]                   # 7 crashed long ago


def test_a_position_that_the_stream_told_keeps_its_time_when_a_look_shows_it_later():
    judge = Judge(poll_interval_s=30.0)
    judge.show(session_xml())
    judge.wait(20)
    judge.note(PLAYING, view_offset=20000)
    judge.show(session_xml(offset="20000"))
    judge.wait(15)                                         # the slow look comes 10 s after the note
    assert judge.looks == 2 and sb.position_ms(judge.player, judge.at) == 35000


def test_a_look_that_shows_an_older_position_on_the_same_line_does_not_set_the_player_back():
    judge = Judge(poll_interval_s=30.0)
    judge.show(session_xml(offset="0"))
    judge.wait(10)
    judge.note(PLAYING, view_offset=10000)
    judge.wait(10)
    judge.note(PLAYING, view_offset=20000)
    judge.show(session_xml(offset="10000"))                # behind the stream by one renewal
    judge.wait(3)
    judge.hear("media.play")
    judge.wait(0)
    assert sb.position_ms(judge.player, judge.at) == 23000


def test_sessions_that_lag_do_not_undo_a_seek_that_the_stream_told():
    judge = Judge(poll_interval_s=30.0)
    judge.show(session_xml(offset="0"))
    judge.wait(10)
    judge.note(BUFFERING, view_offset=120000)
    judge.show(session_xml(BUFFERING, offset="11000"))
    judge.hear("media.play")
    judge.wait(0.5)
    judge.note(PLAYING, view_offset=120000)
    judge.show(session_xml(offset="12000"))
    judge.wait(0.5)
    judge.hear("media.play")
    judge.wait(0)
    assert sb.position_ms(judge.player, judge.at) == 120500
    judge.wait(3)
    judge.show(session_xml(offset="15000"))                # and later a look shows another: a seek back, untold
    judge.wait(35)
    assert sb.position_ms(judge.player, judge.at) < 60000


def test_what_the_stream_told_of_a_session_counts_when_it_becomes_what_the_player_does():
    judge = Judge(poll_interval_s=30.0)                    # two rooms
    judge.show(session_xml(key="7", offset="0"), session_xml(key="8", offset="0", item=OTHER))
    judge.wait(5)
    judge.note(PLAYING, view_offset=5000)
    judge.show(session_xml(key="7", offset="5000"), session_xml(key="8", offset="0", item=OTHER))
    judge.wait(4)
    judge.note(STOPPED, "102", key="8")
    judge.show(session_xml(key="7", offset="5000"))
    judge.wait(0)
    assert judge.said() == [(PLAYING, B), (PLAYING, A)]
    assert sb.position_ms(judge.player, judge.at) == 9000


def test_an_item_that_begins_again_costs_no_series_of_looks():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(offset="50000"))
    judge.wait(5)
    judge.note(STOPPED, view_offset=55000)
    judge.show(session_xml(offset="0"))
    judge.wait(0.1)
    judge.note(PLAYING, view_offset=0)                     # the stream is in order: the stop is over
    judge.wait(10)
    assert judge.said() == [(PLAYING, A)] and judge.looks <= 4
    assert sb.position_ms(judge.player, judge.at) == 10000


def test_a_new_item_that_buffered_while_the_last_one_was_paused_begins_when_the_stream_says_so():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(PAUSED, key="7"))
    judge.wait(5)
    judge.note(STOPPED)
    judge.show(session_xml(BUFFERING, key="8", item=OTHER))
    judge.wait(sb.FROZEN_S + 5)                            # nobody looks any more
    assert judge.said() == [(PAUSED, A)]
    judge.show(session_xml(PLAYING, key="8", item=OTHER))
    judge.note(PLAYING, "102", key="8")
    judge.wait(0)
    assert judge.said() == [(PLAYING, B)]


def test_what_the_stream_said_of_a_session_is_not_forgotten_at_the_next_look():
    judge = Judge(poll_interval_s=30.0)
    judge.show(session_xml(key="7"))
    for wait_s, offset in ((10, 10000), (8, 0), (10, 10000)):      # the item begins again, and no look comes
        judge.wait(wait_s)
        judge.note(PLAYING, view_offset=offset)
    judge.wait(1)
    judge.note(PLAYING, "102", key="8")                    # a cast
    judge.show(session_xml(key="7", offset="10000"), session_xml(key="8", item=OTHER))
    judge.wait(5)
    judge.note(STOPPED, "102", key="8")
    judge.show(session_xml(key="7", offset="10000"))
    judge.wait(4)
    assert judge.said() == [(PLAYING, A), (PLAYING, B)]    # it has not stopped; whether it lives is told soon
    judge.note(PLAYING, view_offset=20000)
    judge.wait(0)
    assert judge.said() == [(PLAYING, A)]


def test_a_pause_that_the_stream_repeats_is_no_pause_that_a_crash_left_behind():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(key="7"))
    judge.wait(5)
    judge.note(PLAYING, "102", key="8")
    judge.show(session_xml(PAUSED, key="7", offset="5000"), session_xml(key="8", offset="0", item=OTHER))
    judge.wait(0.2)
    judge.note(PAUSED, view_offset=5000)                   # a look has shown it already, and 8 beside it
    judge.wait(1)
    judge.show(session_xml(PAUSED, key="7", offset="5000"))
    judge.note(STOPPED, "102", key="8")
    judge.wait(1)
    assert judge.said() == [(PLAYING, A), (PLAYING, B), (PAUSED, A)]


def test_a_webhook_that_may_be_late_still_tells_of_a_pause():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(PAUSED, key="7"))
    judge.wait(1)
    judge.note(PLAYING)
    judge.show(session_xml(PLAYING, key="7"))
    judge.wait(2)
    judge.note(PAUSED)
    judge.show(session_xml(PAUSED, key="7", offset="2000"))
    judge.wait(1)
    judge.note(PLAYING)
    judge.show(session_xml(PLAYING, key="7", offset="2000"))
    judge.wait(2)
    judge.show(session_xml(PAUSED, key="7", offset="4000"))
    before = judge.looks
    judge.hear("media.pause")                              # of the first pause, or of the second
    judge.wait(5)
    assert judge.looks - before <= 2
    judge.show(session_xml(PAUSED, key="7", offset="4000"), session_xml(key="8", offset="0", item=OTHER))
    judge.note(PLAYING, "102", key="8")
    judge.wait(5)
    judge.show(session_xml(PAUSED, key="7", offset="4000"))
    judge.note(STOPPED, "102", key="8")
    judge.wait(1)
    assert judge.said()[-3:] == [(PAUSED, A), (PLAYING, B), (PAUSED, A)]


def test_an_item_that_just_began_again_when_a_slow_look_came_is_no_ghost():
    judge = Judge(poll_interval_s=32.0)
    judge.show(session_xml())
    judge.wait(41.5)                                       # it began again, unseen, just before the look after 32 s
    assert judge.looks == 2
    for offset in range(10000, 80000, 10000):
        judge.show(session_xml(offset=str(offset)))
        judge.wait(10)
    assert judge.said() == [(PLAYING, A)]
    judge.wait(80)
    assert judge.said() == [(STOPPED, A)]


def test_a_stale_paused_session_is_not_what_the_player_does():
    judge = Judge(poll_interval_s=2.0)
    ghost = session_xml(PAUSED, key="1", item=OTHER)
    judge.show(ghost, session_xml(key="2"))
    judge.wait(0)
    judge.show(ghost, session_xml(PAUSED, key="2"))
    judge.wait(10)
    judge.show(ghost)
    judge.wait(10)
    assert judge.said() == [(PLAYING, A), (PAUSED, A), (STOPPED, A)]
    judge.show(session_xml(PLAYING, key="1", item=OTHER))
    judge.wait(2)
    judge.show(ghost)
    judge.wait(2)
    assert judge.said() == [(PLAYING, B), (PAUSED, B)]


@pytest.mark.parametrize("left", [PLAYING, PAUSED])
def test_a_session_left_by_a_crash_does_not_come_back_when_the_next_one_ends(left):
    judge = Judge(poll_interval_s=5.0)
    ghost = session_xml(left, key="7", offset="40000")
    for world in ([session_xml(key="7", offset="30000")], [ghost], [ghost, session_xml(key="8", offset="0", item=OTHER)],
                  [ghost, session_xml(key="8", offset="5000", item=OTHER)], [ghost]):
        judge.show(*world)
        judge.wait(5)
    judge.wait(100)
    assert judge.said() == [(PLAYING, A), *[(PAUSED, A)] * (left == PAUSED), (PLAYING, B), (STOPPED, B)]
    judge.show(session_xml(PLAYING, key="7", offset="50000"))
    judge.wait(5)
    assert judge.said() == [(PLAYING, A)]


def test_a_true_stop_beside_a_ghost_has_no_reason():
    judge = Judge(poll_interval_s=5.0)
    ghost = session_xml(key="7", offset="40000")
    judge.show(ghost, session_xml(key="8", offset=None, item=OTHER))
    judge.wait(100)
    judge.show(ghost)
    judge.wait(5)
    assert [(r.state, r.item.title, r.reason) for r in judge.reports] == [(PLAYING, B, ""), (STOPPED, B, "")]


def test_a_frozen_player_is_reported_where_it_stood():
    judge = Judge(poll_interval_s=2.0)
    judge.show(session_xml(offset="40000"))
    judge.wait(60)
    assert [(r.state, r.position_ms) for r in judge.reports] == [(PLAYING, 40000), (STOPPED, 40000)]


@pytest.mark.parametrize("poll", [0.0, 300.0])
def test_an_item_that_is_played_again_from_its_begin_is_no_ghost(poll):
    judge = Judge(poll_interval_s=poll)
    judge.show(session_xml())
    judge.hear("media.play")
    judge.wait(5)
    judge.show(session_xml(offset="30000"))
    judge.wait(195)
    judge.show(session_xml())
    judge.hear("media.play")
    judge.wait(5)
    assert judge.said() == [(PLAYING, A)]


def test_a_late_webhook_that_lagging_sessions_bear_out_does_not_end_the_looking():
    judge = Judge()
    judge.show(session_xml(offset="1"))
    judge.wait(5)
    judge.hear("media.pause")
    judge.wait(0.3)
    judge.hear("media.resume")                             # a double of an old one
    judge.wait(1.2)
    judge.show(session_xml(PAUSED, offset="2"))
    judge.wait(sb.LAG_S)
    assert judge.said() == [(PLAYING, A), (PAUSED, A)]


def test_a_player_that_buffers_for_ever_is_not_looked_at_for_ever():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(BUFFERING))
    judge.wait(1800)
    assert judge.looks <= sb.FROZEN_S / sb.BUFFERING_S + 2


def test_a_session_that_says_stopped_is_none():
    assert sessions(session_xml(STOPPED)) == ()


def test_a_paused_track_comes_back_after_the_photo_that_played_over_it():
    judge = Judge(poll_interval_s=2.0)
    photo = session_xml(PLAYING, key="8", tag="Photo", offset=None, item={"type": "photo", "ratingKey": "5", "title": "Cat"})
    for world in ([session_xml()], [session_xml(PAUSED)], [session_xml(PAUSED), photo], [session_xml(PAUSED)]):
        judge.show(*world)
        judge.wait(2)
    assert judge.said() == [(PLAYING, A), (PAUSED, A), (PLAYING, "Cat"), (PAUSED, A)]


def test_an_outage_is_said_once_changes_nothing_and_its_end_is_said_once():
    judge = Judge()
    judge.show(session_xml())
    judge.wait(0)
    judge.reports = []
    judge.show(None)
    judge.wait(300)
    assert judge.player.state == PLAYING
    assert judge.reports == [Outage("unreachable", "No.")]
    assert judge.looks < 25
    judge.show(session_xml(item=OTHER))
    judge.wait(sb.RETRY_MAX_S)
    recovery, change = judge.reports[1:]
    assert 240 <= recovery.after_s <= 330 and (change.state, change.item.title) == (PLAYING, B)


def test_another_fault_in_an_outage_is_said_too():
    judge = Judge()
    for fault in ("unreachable", "starting", "starting", "refused"):
        judge.observe(Outage(fault, fault))
    judge.observe(Look(()))
    assert [getattr(r, "fault", "well") for r in judge.reports] == ["unreachable", "starting", "refused", "well"]


def test_looks_in_an_outage_are_few_however_many_webhooks_come():
    judge = Judge()
    judge.show(None)
    judge.wait(120)
    judge.looks = 0
    for _ in range(1000):
        judge.hear("media.play")
        judge.wait(0.01)
    assert judge.looks <= 10 / sb.RETRY_HEARD_S + 1


def test_a_webhook_in_an_outage_is_borne_out_soon_after_it():
    judge = Judge()
    judge.show(None)
    judge.wait(120)
    judge.hear("media.play")
    judge.show(session_xml())
    judge.wait(sb.RETRY_HEARD_S)
    assert judge.said() == [(PLAYING, A)]


# The event stream

def playing(**fields):
    judge = Judge(**fields)
    judge.show(session_xml())
    judge.wait(0)
    judge.reports = []
    return judge


def test_each_change_that_the_stream_tells_is_looked_at_at_once_and_believed_when_the_sessions_show_it():
    judge = playing(poll_interval_s=0.0)
    for state in (PAUSED, PLAYING, STOPPED):
        judge.show(*[] if state == STOPPED else [session_xml(state)])
        judge.note(state)
        judge.wait(0)
    assert [(r.state, r.by) for r in judge.reports] == [(PAUSED, "events"), (PLAYING, "events"), (STOPPED, "events")]


def test_a_track_change_in_the_stream_is_reported_once_with_what_the_sessions_say_of_it():
    judge = playing()
    judge.note(PLAYING, "102")
    judge.wait(0.5)
    assert judge.said() == []                              # the sessions lag
    judge.show(session_xml(item=OTHER))
    judge.wait(0.25)
    for _ in range(5):
        judge.note(PLAYING, "102")
        judge.wait(10)
    assert judge.said() == [(PLAYING, B)]


def test_a_spurious_stop_of_the_stream_is_no_stop():
    judge = playing(poll_interval_s=0.0)
    for second in range(1, 10):
        judge.note(STOPPED)
        judge.show(session_xml(offset=str(second * 1000)))
        judge.wait(1)
    judge.wait(60)
    assert judge.said() == []


def test_repeats_cost_no_look_and_are_a_sign_of_life():
    judge = playing()
    looks = judge.looks
    for repeat in range(1, 31):
        judge.wait(10)
        judge.note(view_offset=repeat * 10000)
    assert judge.said() == [] and judge.looks - looks <= 300 / 30 + 8
    assert sb.position_ms(judge.player, judge.at) == 264000
    judge.wait(sb.FROZEN_S + 31)
    assert [(r.state, r.reason, r.by) for r in judge.reports if isinstance(r, Change)] == [(STOPPED, "frozen", "silence")]


@pytest.mark.parametrize("player, key, looks", [("m2", "7", 0), ("m2", "99", 0), ("", "7", 1), ("", "99", 1)])
def test_a_notification_without_a_player_is_joined_by_its_session(player, key, looks):
    judge = playing(poll_interval_s=0.0)
    before = judge.looks
    judge.show(session_xml(PAUSED))
    judge.note(PAUSED, player=player, key=key)
    judge.wait(sb.FOREIGN_S)
    assert judge.looks - before == looks and judge.said() == [(PAUSED, A)] * looks


def test_what_went_by_while_the_stream_was_away_is_found_when_it_opens():
    judge = playing(poll_interval_s=0.0)
    judge.show()
    judge.observe(sb.Stream("failed"))
    judge.wait(60)
    assert judge.said() == []
    judge.observe(sb.Stream("opened"))
    judge.wait(0)
    assert [(r.state, r.by) for r in judge.reports] == [(STOPPED, "sessions")]


def test_notifications_in_an_outage_do_not_hurry_the_looks():
    judge = playing()
    judge.show(None)
    judge.note(PAUSED)
    judge.wait(120)
    judge.looks = 0
    for _ in range(1000):
        judge.note(PAUSED)
        judge.observe(sb.Stream("broke"))
        judge.wait(0.01)
    assert judge.looks <= 10 / sb.RETRY_HEARD_S + 1


@pytest.mark.parametrize("by, act", [
    ("webhook", lambda judge: judge.hear("media.pause")), ("events", lambda judge: judge.note(PAUSED)),
    ("sessions", lambda judge: judge.hear("media.rate")), ("poll", lambda judge: None)])
def test_each_change_says_why_it_is_believed(by, act):
    judge = playing()
    judge.wait(5)
    judge.show(session_xml(PAUSED))
    act(judge)
    judge.wait(30)
    assert [(r.state, r.by) for r in judge.reports] == [(PAUSED, by)]


# The proof that webhooks arrive

def evening(judge, hooks=(), noted=True):
    """Play, pause, resume and stop, 20 s each; the webhooks of `hooks` come one second after the stream's word."""
    for event, state in (("media.play", PLAYING), ("media.pause", PAUSED), ("media.resume", PLAYING), ("media.stop", STOPPED)):
        judge.show(*[] if state == STOPPED else [session_xml(state, offset=str(int(judge.at) * 1000 % 99999))])
        if noted:
            judge.note(state)
        judge.wait(1)
        if event in hooks:
            judge.hear(event)
        judge.wait(19)


EVENTS = ("media.play", "media.pause", "media.resume", "media.stop")


def test_a_change_without_its_webhook_is_missed_when_its_time_is_up_though_nothing_else_happens():
    judge = Judge(poll_interval_s=0.0)
    judge.show()
    judge.wait(20)
    assert judge.player.look_at == math.inf and sb.proof_due(judge.player) == math.inf
    judge.show(session_xml())
    judge.note()
    judge.wait()
    changed_at = judge.player.changed_at
    judge.wait(9)                                          # the looks after the change are over
    assert judge.player.proof.missed == 0 and sb.proof_due(judge.player) == changed_at + sb.PROOF_S
    judge.at = sb.proof_due(judge.player)
    judge.observe(None)
    assert judge.player.proof.missed == 1 and sb.proof_due(judge.player) == math.inf


def test_where_webhooks_of_other_players_arrive_the_warning_says_that():
    judge = Judge()
    judge.wait(1)
    judge.hear(uuid="tv")
    evening(judge)
    judge.wait(30)
    assert [r for r in judge.reports if isinstance(r, sb.WebhooksMissing)] == [sb.WebhooksMissing(3, others=True)]
    assert sb.missing_sentence(3, True) == ("webhooks of other players arrive, so the URL is right; but 3 changes of this player in a row came "
                                            "without one. Nothing is lost.")
    judge.hear()                                           # ours: those of others say nothing any more
    assert not judge.player.proof.others


OTHERS = (session_xml(player="tv", key="8"), session_xml(PAUSED, player="phone", key="9"))


@pytest.mark.parametrize("known, shown, expected", [
    ({}, (), {}),
    ({}, OTHERS, {"tv": "Living Room"}),                                        # who has paused is not named
    ({"web": "Den"}, OTHERS, {"web": "Den", "tv": "Living Room"}),
    ({"tv": "Den"}, (), {"tv": "Den"}),
    ({"tv": "Den"}, (session_xml(PAUSED), *OTHERS), {}),                        # ours is there
    ({}, [session_xml(player=f"p{i}", key=str(i)) for i in range(9)], {f"p{i}": "Living Room" for i in range(5)}),
])
def test_players_are_named_that_play_while_ours_was_never_seen(known, shown, expected):
    assert sb.strangers(sb.PlayerState("m1", True), known, sessions(*shown)) == expected
    assert sb.strangers(known_player(), known, sessions(*shown)) == {}          # it was seen before


def test_three_misses_in_a_row_are_one_warning_and_the_next_arrival_is_one_line():
    judge = Judge()
    judge.wait(1)
    evening(judge)
    evening(judge)
    judge.wait(30)
    assert [r for r in judge.reports if isinstance(r, sb.WebhooksMissing)] == [sb.WebhooksMissing(3)]
    assert judge.player.proof.missed == 8
    evening(judge, EVENTS)
    assert [r for r in judge.reports if isinstance(r, sb.WebhooksMissing)][1:] == [sb.WebhooksMissing(8, over=True)]
    proof = judge.player.proof
    assert (proof.arrived, proof.missed, proof.in_a_row, proof.delays_s) == (4, 8, 0, (1.0,) * 4)
    medians = [sb.now_fields(each, 0.0)["webhooks"]["median_delay_s"] for each in (sb.Status(judge.player), sb.Status())]
    assert medians == [1.0, None]


def test_webhooks_that_come_first_have_arrived_and_two_misses_are_no_warning():
    judge = Judge()
    judge.wait(1)
    evening(judge, EVENTS, noted=False)
    assert judge.player.proof.arrived == 4 and set(judge.player.proof.delays_s) == {0.0}
    evening(judge, ("media.resume",))
    judge.wait(30)
    assert (judge.player.proof.missed, judge.player.proof.in_a_row) == (3, 1)
    assert not any(isinstance(r, sb.WebhooksMissing) for r in judge.reports)


def test_no_webhook_is_expected_for_a_skip_a_crash_a_start_before_ours_or_what_an_outage_hid():
    judge = playing(poll_interval_s=2.0)                   # it played before the first look
    for item in (OTHER, SONG, OTHER, SONG):
        judge.show(session_xml(item=item))
        judge.note(PLAYING, item["ratingKey"])
        judge.wait(20)
    judge.show(None)
    judge.wait(20)
    judge.show(session_xml(PAUSED))
    judge.wait(40)
    judge.show(session_xml(PLAYING, offset="7"))
    judge.hear("media.resume")
    judge.wait(100)                                        # frozen
    assert judge.player.proof.missed == 0 and judge.player.state == STOPPED


def test_no_webhook_is_expected_for_skips_while_paused_or_a_ghost_that_comes_back():
    judge = playing(poll_interval_s=2.0)
    judge.show(session_xml(PAUSED))
    judge.hear("media.pause")
    judge.wait(20)
    for item in (OTHER, SONG, OTHER, SONG):
        judge.show(session_xml(PAUSED, item=item))
        judge.wait(20)
    judge.show(session_xml(offset="5"))
    judge.hear("media.resume")
    judge.wait(20)
    for offset in ("10", "20", "30", "40"):
        judge.show(session_xml(offset=offset))
        judge.wait(60)
    assert judge.player.proof.missed == 0 and [r.reason for r in judge.reports if isinstance(r, Change)].count("frozen") == 4


@pytest.mark.parametrize("event", ["media.stop", "media.pause", "media.rate", "foo.bar"])
def test_a_late_webhook_does_not_wake_a_ghost(event):
    judge = playing(poll_interval_s=2.0)
    judge.wait(60)
    judge.hear(event)
    judge.wait(60)
    assert judge.said() == [(STOPPED, A)]


def test_webhooks_under_another_uuid_that_come_first_have_arrived():
    judge = Judge(poll_interval_s=0.0)
    judge.wait(1)
    for event, world in (("media.play", [session_xml()]), ("media.stop", []), ("media.play", [session_xml()])):
        judge.show(*world)
        judge.hear(event, uuid="another name of m1")
        judge.wait(20)
    assert (judge.player.proof.arrived, judge.player.proof.missed) == (3, 0)


def test_repeats_of_what_has_no_rating_key_cost_no_look():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(item={"type": "clip", "title": "Live"}, offset=None))
    judge.wait(0)
    for rating_key in ("", "999") * 5:
        judge.note(PLAYING, rating_key)
        judge.wait(10)
    assert judge.looks == 1


def test_other_peoples_repeats_without_a_player_cost_no_look():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml(), session_xml(player="m2", key="8"))
    judge.wait(0)
    for _ in range(10):
        judge.note(PLAYING, "102", player="", key="8")
        judge.wait(10)
    assert judge.looks == 1


def test_a_flood_of_contradicting_notifications_is_looked_at_a_few_times_a_second():
    judge = playing(poll_interval_s=0.0)
    before = judge.looks
    for number in range(1000):
        judge.note((PAUSED, PLAYING)[number % 2], str(number + 500))
        judge.wait(0.01)
    assert judge.looks - before <= 10 / sb.RELOOK_S[0] + 2


def test_a_webhook_under_another_uuid_proves_as_much():
    judge = playing()
    judge.show(session_xml(PAUSED))
    judge.note(PAUSED)
    judge.wait(1)
    judge.hear("media.pause", uuid="another name of m1")
    judge.wait(60)
    assert (judge.player.proof.arrived, judge.player.proof.missed) == (1, 0)


# Webhooks alone

def alone():
    return Judge(has_server=False, look_at=math.inf, poll_interval_s=0.0)


@pytest.mark.parametrize("events, said", [
    ("play pause resume stop", [PLAYING, PAUSED, PLAYING, STOPPED]),
    ("play play resume scrobble rate", [PLAYING]),
    ("stop stop", []),
    ("pause", [PAUSED]),
    ("scrobble unheard.of", [])])
def test_without_a_server_the_webhooks_decide(events, said):
    judge = alone()
    for event in events.split():
        judge.hear(f"media.{event}")
    assert judge.said() == [(state, A) for state in said]
    assert judge.player.look_at == math.inf


def test_without_a_server_what_comes_too_late_is_passed_over():
    judge = alone()
    for event, item in (("play", SONG), ("play", OTHER), ("stop", SONG), ("pause", SONG), ("pause", OTHER), ("resume", SONG), ("stop", OTHER)):
        judge.hear(f"media.{event}", item)
    assert judge.said() == [(PLAYING, A), (PLAYING, B), (PAUSED, B), (STOPPED, B)]


def test_without_a_server_a_skip_that_no_webhook_told_is_caught_up_with():
    judge = alone()
    judge.hear("media.play")
    judge.at = 200.0
    judge.hear("media.stop", OTHER)                        # the queue went on from A to B, silently
    judge.hear("media.play")
    judge.at = 400.0
    judge.hear("media.pause", OTHER)
    judge.at = 600.0
    judge.hear("media.pause", SONG)                        # and back
    assert judge.said() == [(PLAYING, A), (STOPPED, B), (PLAYING, A), (PAUSED, B), (PAUSED, A)]


def test_without_a_server_a_late_webhook_does_not_wake_a_stopped_player():
    judge = alone()
    for event in ("media.play", "media.stop", "media.pause", "media.resume"):
        judge.hear(event)
    assert judge.said() == [(PLAYING, A), (STOPPED, A)]


def test_without_a_server_the_position_is_the_webhooks_or_runs_on():
    judge = alone()
    judge.hear("media.play")
    judge.at = 60.0
    judge.hear("media.pause")
    judge.at = 90.0
    judge.hear("media.resume", view_offset=59000)
    judge.at = 100.0
    judge.hear("media.stop")
    assert [r.position_ms for r in judge.reports] == [0, 60000, 59000, 69000]


def test_without_a_server_a_webhook_that_lacks_its_item_means_the_current_one():
    judge = alone()
    judge.hear("media.play", item=None)
    judge.hear("media.play")
    judge.hear("media.pause", item=None)
    judge.hear("media.play", uuid="m2", item=OTHER)
    assert judge.said() == [(PLAYING, A), (PAUSED, A)]


@pytest.mark.parametrize("stopped_s, said", [(0.0, []), (5.0, []), (9.5, []), (10.5, [(PAUSED, A)]), (60.0, [(PAUSED, A)])])
def test_without_a_server_a_webhook_of_what_was_stopped_is_late_for_ten_seconds(stopped_s, said):
    judge = alone()
    judge.hear("media.play")
    judge.hear("media.stop")
    judge.said()
    judge.wait(stopped_s)
    judge.hear("media.pause")
    assert judge.said() == said


@pytest.mark.parametrize("left_s, said", [(0.0, []), (5.0, []), (9.5, []), (10.5, [(STOPPED, A)]), (60.0, [(STOPPED, A)])])
def test_without_a_server_a_stop_of_the_item_before_is_late_for_ten_seconds(left_s, said):
    judge = alone()
    judge.hear("media.play")
    judge.hear("media.play", OTHER)
    judge.said()
    judge.wait(left_s)
    judge.hear("media.stop")
    assert judge.said() == said


# The promise, on random evenings

@pytest.mark.parametrize("seed", range(60))
def test_every_change_is_reported_once_in_order_and_never_falsely(seed):
    """Random changes, sessions that lag, webhooks that are lost, doubled and late: what is reported was true."""
    rng = random.Random(seed)
    lossy, lag_max = seed % 3 == 0, rng.choice([0.0, 0.5, 1.5])
    judge = Judge(poll_interval_s=2.0)
    at, state, item, truth, events = 1.0, STOPPED, 0, [(0.0, STOPPED, "")], []
    shown = 0.0
    for _ in range(60):
        state = rng.choice([PAUSED, PLAYING, STOPPED] if state == PLAYING else [PLAYING, STOPPED] if state == PAUSED else [PLAYING])
        started = state == PLAYING and (truth[-1][1] != PAUSED or rng.random() < 0.3)
        item += started
        fields = {**SONG, "ratingKey": str(item), "title": f"T{item}"}
        truth.append((at, state, f"T{item}"))
        shown = max(shown + 1e-6, at + rng.uniform(0, lag_max))
        events.append((shown, judge.show, [] if state == STOPPED else [session_xml(state, offset=str(int(at * 1000) % 99999), item=fields)]))
        event = {PAUSED: "media.pause", STOPPED: "media.stop"}.get(state, "media.play" if started else "media.resume")
        for _ in range(0 if lossy and rng.random() < 0.2 else rng.choice([1, 1, 1, 3])):
            events.append((at + rng.uniform(0.005, 0.5), judge.hear, [event, fields]))
        at += rng.uniform(2.1, 6.0)
    for when, act, args in sorted(events, key=lambda event: event[0]):
        judge.wait(when - judge.at)
        act(*args)
    judge.wait(5)
    said = judge.said()
    true = [(state, title) for _, state, title in truth[1:]]
    remaining = iter(true)
    assert all(each in remaining for each in said), "something was reported that was not true, or out of order"
    assert all(one != other for one, other in itertools.pairwise(said))
    assert said[-1] == true[-1]
    if not lossy:
        assert said == true


# What random evenings taught

def test_a_webhook_of_one_item_wakes_no_ghost_of_another():
    judge = playing(poll_interval_s=2.0)
    judge.wait(60)
    assert judge.said() == [(STOPPED, A)]
    judge.hear("media.play", OTHER)
    judge.wait(0.5)                                        # the sessions lag, and show the ghost alone
    judge.show(session_xml(), session_xml(key="8", item=OTHER))
    judge.wait(5)
    assert judge.said() == [(PLAYING, B)]


@pytest.mark.parametrize("told", [None, 40000])
def test_what_was_stopped_begins_at_0_or_where_a_witness_says(told):
    judge = playing(poll_interval_s=2.0)
    judge.wait(6)
    judge.show()
    judge.note(STOPPED)
    judge.wait(5)
    judge.show(session_xml(offset=None, key="8"))
    judge.note(key="8", view_offset=told)
    judge.wait(1)
    assert [(r.state, r.position_ms) for r in judge.reports if isinstance(r, Change)] == [(STOPPED, 6000), (PLAYING, told or 0)]
    assert sb.position_ms(judge.player, judge.at) == (told or 0) + 1000


def test_a_late_webhook_does_not_bring_back_the_position_before_a_seek():
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.note(view_offset=90000)                          # the sessions lag: they say 0 still
    judge.hear("media.resume")
    judge.wait(3)
    assert sb.position_ms(judge.player, judge.at) == 93000 and judge.said() == []


def two(first=PLAYING, second=PLAYING, at=0, more=""):
    """Two sessions of our player, 10 s apart in their items; the newer one is of OTHER."""
    return session_xml(first, offset=str(at), key="7"), session_xml(second, offset=str(at), key="8", item=OTHER, **({"tag": more} if more else {}))


def test_of_two_sessions_that_play_the_newest_counts_and_renewals_cost_no_look():
    judge = playing(poll_interval_s=0.0)
    judge.show(*two())
    judge.note(PLAYING, "102", key="8", view_offset=0)
    judge.wait(5)
    looks = judge.looks
    for repeat in range(1, 31):
        judge.show(*two(at=repeat * 10000))
        for key, rating_key in (("7", "101"), ("8", "102")):
            judge.note(PLAYING, rating_key, key=key, view_offset=repeat * 10000)
        judge.wait(10)
    assert judge.said() == [(PLAYING, B)] and judge.looks - looks <= 2
    assert sb.position_ms(judge.player, judge.at) == 264000       # not beyond its end, nor the other one's
    for first, second, said in ((PLAYING, PAUSED, (PLAYING, A)), (PLAYING, PLAYING, (PLAYING, B)), (PAUSED, PLAYING, None), (PAUSED, PAUSED, (PAUSED, B))):
        judge.show(*two(first, second, 301000))
        judge.note(first, key="7")
        judge.note(second, "102", key="8")
        judge.wait(3)
        assert judge.said() == [said] * (said is not None)
    judge.show(two(PAUSED)[0])
    judge.note(STOPPED, "102", key="8")
    judge.wait(3)
    assert judge.said() == [(PAUSED, A)]


@pytest.mark.parametrize("lives", [True, False])
def test_whether_the_older_of_two_sessions_lives_is_waited_for(lives):
    """The newer one ends 3 s after its begin.  Was the older one left by a crash?"""
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.show(*two())
    judge.note(PLAYING, "102", key="8")
    judge.wait(3)
    judge.show(session_xml())
    judge.note(STOPPED, "102", key="8")
    judge.wait(4)
    assert judge.said() == [(PLAYING, B)]
    if lives:
        judge.show(session_xml(offset="10000"))
        judge.note(PLAYING, view_offset=10000)
    judge.wait(sb.LIFE_S)
    assert judge.said() == [(PLAYING, A) if lives else (STOPPED, B)]


def test_no_more_than_twenty_looks_in_ten_seconds_whatever_comes():
    judge, rng, looked = playing(poll_interval_s=1.0), random.Random(1), []
    for _ in range(20000):
        rng.choice([judge.hear, judge.note, lambda: judge.note(PAUSED, str(rng.randrange(500))), lambda: judge.hear("media.pause", OTHER),
                    lambda: judge.hear("media.play", uuid="m2"), lambda: judge.observe(sb.Stream("opened")),
                    lambda: judge.note(PLAYING, player="", key="9")])()
        judge.wait(rng.choice([0.0, 0.01, 0.3]))
        looked += [at for at, _ in judge.player.looked if not looked or at > looked[-1]]
    assert len(looked) > 1000 and all(later - at > 10 for at, later in zip(looked, looked[20:], strict=False))
    assert max(later - at for at, later in itertools.pairwise(looked)) < 2      # and never blind for long


def test_a_claim_is_waited_for_although_others_come():
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.note(PAUSED)
    judge.wait(0.3)
    judge.hear("media.resume")                             # a late double, which the sessions bear out
    judge.wait(0.8)
    judge.show(session_xml(PAUSED))                        # for less than the time to the look that confirms
    judge.wait(0.3)
    judge.show(session_xml())
    judge.wait(5)
    assert judge.said() == [(PAUSED, A), (PLAYING, A)]


def test_what_a_notification_tells_in_an_outage_is_looked_at_soon_after_it():
    judge = playing(poll_interval_s=0.0)
    judge.show(None)
    judge.note(PAUSED)
    judge.wait(100)                                        # the looks are 30 s apart by now
    judge.show(session_xml(offset="100000"))
    judge.note(PLAYING, "102")
    judge.wait(1.1)
    judge.show(session_xml(item=OTHER))
    judge.wait(1)
    assert judge.said() == [(PLAYING, B)]


def test_webhooks_of_changes_too_short_to_be_seen_have_arrived():
    judge = playing()
    for _ in range(6):                                     # each pause is over before a look; then a skip
        judge.hear("media.pause")
        judge.hear("media.resume")
        judge.show(session_xml(PAUSED))
        judge.note(PAUSED)
        judge.wait(1)
        judge.show(session_xml())
        judge.note(PLAYING)
        judge.wait(20)
    judge.show()
    judge.note(STOPPED)
    judge.wait(20)
    assert not any(isinstance(r, sb.WebhooksMissing) for r in judge.reports)


def test_a_stream_that_opens_in_an_outage_shows_that_the_server_lives():
    judge = playing(poll_interval_s=0.0)
    judge.show(None)
    judge.hear("media.pause")
    judge.wait(100)
    judge.show(session_xml(PAUSED))
    judge.observe(sb.Stream("opened"))
    judge.wait(sb.RETRY_HEARD_S)
    assert judge.said() == [(PAUSED, A)]


@pytest.mark.parametrize("events", [["media.pause", "media.rate"], ["media.rate", "media.pause"]])
def test_a_paused_session_is_no_ghost_if_a_witness_told_of_it_before_the_look_or_after(events):
    judge = playing(poll_interval_s=0.0)
    judge.wait(20)
    judge.show(session_xml(PAUSED, offset="20000"))
    for event in events:                                   # either of them brings the look that sees the pause
        judge.hear(event)
        judge.wait(0.2)
    judge.show(session_xml(PAUSED, offset="20000"), session_xml(key="8", item=OTHER))
    judge.note(PLAYING, "102", key="8")
    judge.wait(5)
    judge.show(session_xml(PAUSED, offset="20000"))
    judge.note(STOPPED, "102", key="8")
    judge.wait(5)
    assert judge.said() == [(PAUSED, A), (PLAYING, B), (PAUSED, A)]


def test_a_claim_outlives_a_slow_look_that_began_before_the_sessions_knew():
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.note(PAUSED)
    judge.at += 4.5                                        # the look took so long, and shows what was so at its begin
    judge.observe(Look(judge.world))
    judge.show(session_xml(PAUSED))
    judge.wait(1)
    assert judge.said() == [(PAUSED, A)]


def test_a_webhook_of_a_change_that_was_reported_and_is_over_costs_one_look():
    judge = playing(poll_interval_s=0.0)
    for item in (OTHER, SONG, OTHER):                      # skips, which the stream tells at once
        judge.show(session_xml(item=item))
        judge.note(PLAYING, item["ratingKey"])
        judge.wait(1)
    judge.wait(5)
    looks = judge.looks
    judge.hear("media.play", SONG)                         # its webhook comes late
    judge.wait(10)
    assert judge.looks == looks + 1 and judge.said() == [(PLAYING, B), (PLAYING, A), (PLAYING, B)]
    judge.hear("media.play", SONG)                         # a second one is news
    judge.wait(10)
    assert judge.looks == looks + 2 + len(sb.RELOOK_S)


def test_claims_that_wait_are_few():
    judge = playing(poll_interval_s=0.0)
    for number in range(200):
        judge.note(PLAYING, str(number + 500))
        judge.hear("media.play", {**SONG, "ratingKey": str(number + 900)})
    assert len(judge.player.claims) == sb.MAX_CLAIMS and judge.player.claims[0].identity == "1099"


def test_a_stale_session_that_a_notification_revives_is_looked_at():
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.show(session_xml(), session_xml(PAUSED, key="8", item=OTHER))
    judge.note(PAUSED, "102", key="8")
    judge.wait(20)                                         # the older one has been silent for too long
    assert judge.said() == [(PAUSED, B)]
    judge.show(session_xml(offset="10000"), session_xml(PAUSED, key="8", item=OTHER))
    judge.note(PLAYING, view_offset=10000)
    judge.wait(0.1)
    assert judge.said() == [(PLAYING, A)]


def test_a_webhook_within_ten_seconds_of_changes_says_that_webhooks_arrive():
    judge = playing()
    judge.wait(1)
    judge.hear("media.scrobble")
    for number, state in enumerate((PAUSED, PLAYING, PAUSED, PLAYING)):
        judge.show(session_xml(state, offset=str(number)))
        judge.note(state)
        judge.wait(2)                                      # all within ten seconds of that webhook
    judge.wait(30)
    assert judge.player.proof.missed == 4 and not any(isinstance(r, sb.WebhooksMissing) for r in judge.reports)


@pytest.mark.parametrize("key", ["", "99"])
def test_a_stop_without_its_sessions_key_or_under_a_new_one_is_ours(key):
    judge = playing(poll_interval_s=0.0)
    judge.wait(5)
    judge.note(STOPPED, key=key)
    judge.wait(1)
    judge.show()
    judge.wait(0.3)
    assert judge.said() == [(STOPPED, A)]


# The promise, on random evenings in virtual time: EVENINGS=100000 tries more of them, from seed EVENINGS_FROM on

SONGS = [sb.Item(sb.TRACK, str(n), title=f"T{n}", duration=9_000_000) for n in range(100, 106)]
PHOTOS = [sb.Item(sb.PHOTO, str(n), title=f"P{n}") for n in range(200, 206)]


class Ways(typing.NamedTuple):
    """How Plex and the network behave in an evening; as here it is mild.  Seconds, and shares of 1."""
    lag: float = 0.1              # of the sessions behind the truth, at most
    late: float = 0.1             # of webhooks
    very_late: float = 0.0        # share of webhooks that come 1 to 5 s late
    lost: float = 0.0
    doubled: float = 0.0
    note_late: float = 0.05       # of notifications
    stream: bool = True
    unnamed: bool = False         # notifications do not name their player
    cuts: float = 0.0             # of the stream, a minute
    outages: float = 0.0          # a minute
    slow: float = 0.0             # share of looks that take up to 4 s
    gap: tuple[float, float] = (1.0, 25.0)     # between two things that happen
    mild: bool = True


def harsh(rng):
    return Ways(rng.choice([0.1, 0.5, 1.5, 2.0]), rng.choice([0.1, 0.5]), rng.choice([0, 0.1, 0.3]), rng.choice([0, 0, 0.1, 0.5, 1.0]),
                rng.choice([0, 0.3]), rng.choice([0.05, 0.5]), rng.random() < 0.8, rng.random() < 0.2, rng.choice([0, 0, 0.5]),
                rng.choice([0, 0, 0.3]), rng.choice([0, 0, 0.1]), rng.choice([(0.3, 5.0), (1.0, 25.0), (2.0, 60.0)]), mild=False)


class Play:
    """A session as it truly is: its item, and where it is in it."""

    def __init__(self, key, item, at):
        self.key, self.item, self.state, self.offset, self.at = key, item, PLAYING, 0.0, at
        self.begun, self.crashed_at, self.changed_at = at, math.inf, at

    def position(self, at):
        return self.offset + (min(at, self.crashed_at) - self.at) * 1000 * (self.state == PLAYING)


class Evening:
    """Ten minutes of a player: what is true, what the witnesses say of it, and what advance() makes of that."""
    LENGTH = 600.0

    def __init__(self, seed, ops=None):
        rng = random.Random(seed)
        self.ways = Ways() if seed % 2 else harsh(rng)
        self.queue, self.shows, self.count, self.shown_at = [], [], itertools.count(), 0.0
        self.plays, self.all, self.truth, self.arrivals = [], [], [(0.0, STOPPED, "", [])], []
        self.outages = [(t, t + rng.uniform(1, 40)) for t in self.times(rng, self.ways.outages)]
        for t in self.times(rng, self.ways.cuts):
            self.say(t, sb.Stream("broke"))
            self.say(t + rng.uniform(0.5, 30), sb.Stream("opened"))
        self.ops, at = ops or [], 0.0
        while ops is None and (at := at + rng.uniform(*self.ways.gap)) < self.LENGTH:
            self.ops.append((at, rng.random(), rng.random(), rng.randrange(2**30)))
        self.left = collections.deque(self.ops)

    def times(self, rng, a_minute):
        return [rng.uniform(10, self.LENGTH) for _ in range(int(a_minute * self.LENGTH / 60))]

    # -- what happens

    def until(self, at):
        while self.left and self.left[0][0] <= at:
            self.happen(*self.left.popleft())

    def happen(self, at, which, what, seed):
        rng = random.Random(seed)
        play = rng.choice(self.plays or [None])
        ghosts = self.ways.mild and any(at - each.crashed_at < 60 for each in self.all)
        if which < 0.06:
            return self.other_player(at, rng)
        if not play or (which < 0.14 and len(self.plays) < 2 and not ghosts):
            items = [*SONGS, *PHOTOS] if play else SONGS
            play = Play(str(len(self.all) + 7), rng.choice([each for each in items if not play or each is not play.item]), at)
            self.plays.append(play)
            self.all.append(play)
            return self.tell(at, rng, play, "media.play")
        names = ["resume"] * 6 + ["stop"] * 2 + ["skip"] * 2 if play.state == PAUSED else ["skip"] * 6 + ["stop"] * 4 \
            if play.item.type == sb.PHOTO else ["pause"] * 7 + ["skip"] * 4 + ["seek", "seek", "repeat", "stop", "stop", "stop", "stop"] + \
            ["crash"] * 2 * (at - play.changed_at > 11 and not (self.ways.mild and len(self.plays) > 1))
        name, old = names[int(what * len(names))], play.item
        play.offset, play.at = play.position(at), at
        play.state = {"pause": PAUSED, "resume": PLAYING, "stop": STOPPED}.get(name, play.state)
        if name in ("stop", "crash"):
            self.plays.remove(play)
        if name == "crash":                                # its session stays for minutes
            play.crashed_at = at
            self.judge_truth(at)
            return self.show(at + rng.uniform(180, 900), play.key, None)
        if name == "skip":
            play.item = rng.choice([each for each in (SONGS if old in SONGS else PHOTOS) if each is not old])
        if name in ("skip", "repeat", "seek"):
            play.offset = rng.uniform(0, 5_000_000) if name == "seek" else 0.0
        way = rng.random()
        if name == "skip" and way < 0.3:                   # as stop and play; or as play; or Plex sends nothing
            self.hook(at, rng, "media.stop", old)
        return self.tell(at, rng, play, {"pause": "media.pause", "resume": "media.resume", "stop": "media.stop"}.get(
            name, "media.play" if name == "skip" and way < 0.7 and play.state == PLAYING else ""))

    def other_player(self, at, rng):
        key, item = str(1000 + rng.randrange(3)), rng.choice(SONGS)
        self.hook(at, rng, rng.choice(["media.play", "media.pause", "media.stop"]), item, "m2")
        self.show(at, key, sb.Session(key, "m2", rng.choice([PLAYING, PAUSED]), item, 0, "Kitchen", "Plexamp", "Linux", "me"))
        if self.ways.stream:
            self.say(at, sb.Notification(PLAYING, key, "" if self.ways.unnamed else "m2", item.rating_key, 0))

    def judge_truth(self, at):
        """The newest of our sessions that plays, and no photo if there is a track; since when, and its positions."""
        best = max(self.plays, key=lambda p: (p.state != PAUSED, p.item.type != sb.PHOTO, int(p.key)), default=None)
        value = (best.state, best.item.title) if best else (STOPPED, self.truth[-1][2])
        if value != self.truth[-1][1:3]:
            self.truth.append((at, *value, []))
        if best:
            self.truth[-1][3].append((at, best.offset, best.state == PLAYING))

    # -- what the witnesses say

    def say(self, at, message):
        heapq.heappush(self.queue, (at, next(self.count), message))

    def show(self, at, key, session):
        """From then on the sessions show this; None: it is gone."""
        heapq.heappush(self.shows, (at, next(self.count), key, session))

    def tell(self, at, rng, play, event):
        self.judge_truth(at)
        play.changed_at = at
        self.shown_at = max(self.shown_at, at + rng.uniform(0, self.ways.lag))
        offset = None if play.item.type == sb.PHOTO or (at == play.begun and rng.random() < 0.5) else int(play.offset)
        self.show(self.shown_at, play.key, None if play.state == STOPPED else (play, at, sb.Session(
            play.key, "m1", play.state, play.item, offset, "Living Room", "Plexamp", "Linux", "me")))
        if event:
            self.hook(at, rng, event, play.item)
        if self.ways.stream:
            note = sb.Notification(play.state, play.key, "" if self.ways.unnamed else "m1", play.item.rating_key,
                                   int(play.offset) if rng.random() < 0.8 else None)
            self.say(at + rng.uniform(0, self.ways.note_late), note)
            if play.state == PLAYING:
                self.say(at + 10, (play, at, note._replace(view_offset=int(play.offset))))

    def hook(self, at, rng, event, item, uuid="m1"):
        for _ in range(0 if rng.random() < self.ways.lost else 2 if rng.random() < self.ways.doubled else 1):
            when = at + (rng.uniform(1, 5) if rng.random() < self.ways.very_late else rng.uniform(0, self.ways.late))
            self.arrivals += [when] * (uuid == "m1")
            self.say(when, sb.Webhook(event, uuid, "Living Room", item))

    def sessions(self, shown, at):
        """Plex renews a position every 10 s, until the player crashes."""
        for each in shown.values():
            if isinstance(each, sb.Session):
                yield each
            else:
                play, since, session = each
                renewed = int((min(at, play.crashed_at) - since) // 10)
                yield session if renewed < 1 or session.state != PLAYING or play.item.type == sb.PHOTO else \
                    session._replace(view_offset=(session.view_offset or 0) + renewed * 10_000)

    # -- the Watcher, and what it reported

    def run(self):  # noqa: C901
        rng, ways, shown, cut, now = random.Random(1), self.ways, {}, False, 0.0
        player = sb.PlayerState("m1", True, 30.0, look_at=0.0)
        self.reports, self.looks = [], []

        def observe(observation):
            nonlocal player
            player, reports = sb.advance(player, observation, now)
            self.reports += [(now, report) for report in reports]
        while now < self.LENGTH + 100:
            now = max(now, min([player.look_at, *(each[0][0] for each in (self.queue, self.left) if each)]))
            self.until(now)
            while self.queue and self.queue[0][0] <= now:
                message = heapq.heappop(self.queue)[2]
                if isinstance(message, sb.Stream):
                    cut = message.event == "broke"
                if isinstance(message, tuple) and not hasattr(message, "_fields"):       # the repeat of a notification
                    play, since, note = message
                    if play.changed_at != since or play.crashed_at < now:
                        continue
                    note = note._replace(view_offset=note.view_offset + 10_000)
                    self.say(now + 10, (play, since, note))
                    message = note
                if not (cut and isinstance(message, sb.Notification)):
                    observe(message)
            if player.look_at <= now:
                at = now + rng.random() * (takes := rng.uniform(0.5, 4) if rng.random() < ways.slow else 0.02)
                self.until(at)
                while self.shows and self.shows[0][0] <= at:
                    _, _, key, session = heapq.heappop(self.shows)
                    shown[key] = session
                    if session is None:
                        del shown[key]
                down = any(begin <= now < end for begin, end in self.outages)
                self.looks.append(now)
                now += takes
                observe(Outage("unreachable", "No.") if down else Look(tuple(self.sessions(shown, at))))
                now += sb.REST_S
        self.final = player.state, player.item.title if player.item else ""
        return self

    def problems(self):  # noqa: C901
        """What was false, twice, missed or late, too many looks, an alarm, or wrong at the end; as (kind, when, what)."""
        truth, ends, at_k, last = self.truth, [each[0] for each in self.truth[1:]] + [math.inf], 0, None
        seen, found, crashes = {}, [], [(each.crashed_at, each.item.title) for each in self.all if each.crashed_at < math.inf]
        for at, report in self.reports:
            if isinstance(report, sb.WebhooksMissing) and not report.over and not self.ways.lost and any(at - 30 < when < at for when in self.arrivals):
                found.append(("alarm", at, report))
            if not isinstance(report, Change):
                continue
            value, stopped = (report.state, report.item.title), report.state == STOPPED
            if value == last:
                found.append(("twice", at, value))
            last = value
            k = next((k for k in range(at_k + 1, len(truth)) if truth[k][0] <= at < ends[k] + (2 if self.ways.mild else 8) and
                      (truth[k][1:3] == value or truth[k][1] == STOPPED == report.state)), None)
            if k is not None:
                at_k = k
                seen[k] = at
                where = [offset + (at - since) * 1000 * runs for since, offset, runs in truth[k][3] if since <= at]
                if self.ways.mild and at < ends[k] and not stopped and report.item in SONGS and \
                        min(abs(report.position_ms - each) for each in where) > (11_500 if len(self.all) > 1 else 1_500):
                    found.append(("position", at, (*value, report.position_ms, where)))
            # Nobody can know that a second session crashed just before the first one ended; nor whether a paused one of
            # which no witness told was left by a crash.
            elif not (any(0 < at - when < sb.LIFE_S + 4 and title == value[1] for when, title in crashes) or
                      (stopped and self.ways.lost and [each[1] for each in truth if each[0] <= at][-1] == PAUSED)):
                found.append(("false", at, value))
        for k in range(1, len(truth) if self.ways.mild else 0):
            since, crashed = truth[k][0], any(when == truth[k][0] for when, _ in crashes)
            again = k > 1 and any(when == truth[k - 1][0] for when, _ in crashes) and truth[k - 2][1:3] == truth[k][1:3]
            # Nor what was left by a crash before it has been silent for long, nor whether a session lives that is silent
            # since a newer one began.
            unknown = [when for when, _ in crashes if 0 < since - when < 60] + [
                each.begun for each in self.all if 0 < since - each.begun < sb.LIFE_S and each is not self.all[0]] * (len(self.all) > 1)
            if not again and not unknown and (seen.get(k, math.inf) - since > (75 if crashed else 1.5)) and ends[k] - since > (75 if crashed else 0.7):
                found.append(("missed" if k not in seen else "late", since, truth[k][1:3]))
        found += [("storm", one, "") for one, other in zip(self.looks, self.looks[20:], strict=False) if other - one <= 10.0]
        if self.final != truth[-1][1:3] and not self.final[0] == truth[-1][1] == STOPPED:
            found.append(("final", self.LENGTH, (self.final, truth[-1][1:3])))
        return found


def shrunk(seed, kind):
    """The fewest things that must happen in an evening for a problem of this kind, found by leaving out more and more."""
    def fails(ops):
        return any(each[0] == kind for each in Evening(seed, ops).run().problems())
    ops, size = Evening(seed).ops, 64
    while size:
        tries = [ops[:i] + ops[i + size:] for i in range(0, len(ops), size)]
        if less := next((each for each in tries if len(each) < len(ops) and fails(each)), None):
            ops = less
        else:
            size //= 2
    return ops


def test_random_evenings():
    """Mild ones are told without a fault; in harsh ones a report in 10,000 may be false, and the final state is right."""
    first, count = int(os.environ.get("EVENINGS_FROM", "0")), int(os.environ.get("EVENINGS", "1000"))
    changes, found = 0, []
    for seed in range(first, first + count):
        evening = Evening(seed).run()
        changes += 0 if evening.ways.mild else sum(isinstance(report, Change) for _, report in evening.reports)
        found += [(seed, *each) for each in evening.problems()]
    false = [each for each in found if each[1] == "false" and each[0] % 2 == 0]
    worst = [each for each in found if each not in false] + (false if len(false) > changes / 10_000 else [])
    print(f"seeds {first} to {first + count - 1}: {changes} changes in harsh evenings, {len(false)} of them false")
    for seed, kind, *_ in worst[:3]:
        print(f"seed {seed}, {kind}; it needs no more than: {shrunk(seed, kind)}")
    assert worst == []


@pytest.mark.parametrize("hear, more", [(lambda judge: judge.hear("media.play", uuid="m2"), 0),
                                        (lambda judge: judge.note(PLAYING, "102", player="", key="99"), 1)])
def test_what_may_be_of_another_player_is_looked_at_a_second_later(hear, more):
    judge = playing(poll_interval_s=0.0)
    before = judge.looks
    hear(judge)
    judge.wait(0.9)
    hear(judge)                                            # the look that is due is not put off
    assert judge.looks == before
    judge.wait(0.2)
    assert judge.looks == before + 1
    judge.wait(60)
    assert judge.looks == before + 1 + more                # one for both; a session that nobody shows is looked for twice


# --- the world

def look_at(url, token=TOKEN, **more):
    return sb.PlexServer(url, lambda: token, **more).sessions()


def test_a_look_asks_for_the_sessions_with_the_token_in_its_header_alone():
    with RawServer(http_answer(sessions_xml(session_xml()))) as server:
        assert look_at(server.url + "/base/path") == sessions(session_xml())
        head = server.requests[0].decode()
    assert head.startswith("GET /base/path/status/sessions HTTP/1.1\r\n")
    assert head.lower().count(TOKEN) == 1 and f"x-plex-token: {TOKEN}\r\n" in head.lower()


def huge(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n<MediaContainer>")
    for _ in range(3000):
        connection.sendall(b"<Track/>" * 8192)


WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
BROKEN_TYPE = "{} does not speak HTTP as Plex does (TypeError)."          # some Pythons' email.message takes it, and finds no XML
NO_PLEX = "Does -plex-server-url point to Plex Media Server?"


@pytest.mark.parametrize("answer, fault, sentence", [
    (http_answer(b"<html>401</html>", "401 Unauthorized"), "refused",
     "{} refuses the token (401): run `streamerbrainz.py login` as the server's owner."),
    (http_answer(b"", "403 Forbidden"), "forbidden",
     "{} does not show its sessions to this token (403): it must be the server owner's."),
    (http_answer(b'<Response code="503" title="Maintenance"/>', "503 Service Unavailable"), "starting",
     "{} is still starting, or in maintenance (503)."),
    (http_answer(b"", "404 Not Found"), "missing", "{} answers 404 to /status/sessions. " + NO_PLEX),
    (http_answer(b"", "500 Oh"), "nonsense", "{} answers 500 to /status/sessions. " + NO_PLEX),
    (http_answer(b"", "302 Found", "Location: http://127.0.0.1:1/elsewhere\r\n"), "nonsense",
     "{} redirects elsewhere (302), where the token must not go: give the final address as -plex-server-url."),
    (http_answer(b"<html></html>"), "nonsense", NO_LIST),
    (http_answer(sessions_xml(session_xml())[:150]), "nonsense", NOT_XML),
    (http_answer(sessions_xml(session_xml())[:150], length=9999), "nonsense", "{} does not speak HTTP as Plex does (IncompleteRead)."),
    (http_answer(b"<!DOCTYPE a><a/>"), "nonsense", DOCTYPE),
    (huge, "nonsense", "{} answered far more than Plex does."),
    (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 3_000_000), "nonsense",
     "{} answered far more than Plex does."),
    (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc"), "nonsense",
     "{} does not speak HTTP as Plex does (ValueError)."),
    (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x; boundary*=x; boundary*0=y\r\n\r\n"), "nonsense",
     BROKEN_TYPE),
    (hang, "unreachable", "{} did not answer within 0.3 s."),
    (drip(WELL), "unreachable", "{} did not answer within 0.3 s."),
    (drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 20), "unreachable", "{} did not answer within 0.3 s."),
    *((answer, "unreachable", "{} drops the connection: does Plex demand https (Settings > Network > Secure connections)?")
      for answer in (reset, lambda connection: None)),
    (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "nonsense", "{} does not speak HTTP as Plex does (BadStatusLine)."),
    (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"), "nonsense",
     "{} does not speak HTTP as Plex does (HTTPException)."),
])
def test_each_fault_of_the_server_has_a_sentence_of_its_own_in_time(answer, fault, sentence, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.3)
    with RawServer(answer) as server:
        with pytest.raises(sb.PlexError) as error:
            look_at(server.url)
        also = NOT_XML if sentence == BROKEN_TYPE else sentence
        assert error.value.fault == fault and str(error.value) in (sentence.format(server.url), also.format(server.url))
        assert TOKEN not in repr(error.value)


class EagerReader(io.BufferedReader):
    """What io.BufferedReader is where its default takes 128 KiB at once."""

    def __init__(self, raw, buffer_size=2 ** 17):
        super().__init__(raw, buffer_size)


@pytest.mark.parametrize("size", [8_000, 16_500, 140_000, 900_000])
@pytest.mark.parametrize("form", ["fixed", "chunked", "until close"])
def test_an_answer_of_any_size_is_read_however_it_is_sent_and_however_eager_the_reader(size, form, monkeypatch):
    monkeypatch.setattr(sb.io, "BufferedReader", EagerReader)
    body = (sessions_xml(session_xml()) * 4000)[:size]
    head = {"fixed": f"Content-Length: {size}\r\n", "chunked": CHUNKED, "until close": ""}[form]
    whole = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + (chunked(body, 4000) if form == "chunked" else body)
    for cuts in ((), (whole.index(b"\r\n\r\n") + 4,), (1, 9, 60, 8191, 8192, 8193, 16384, 16400)):
        pieces = [whole[i:j] for i, j in itertools.pairwise((0, *cuts, len(whole)))]
        with RawServer(lambda connection, pieces=pieces: [(connection.sendall(piece), time.sleep(0.002)) for piece in pieces]) as server:
            assert sb.exchange(server.url, {}).body == body, cuts


def test_a_server_that_is_not_there_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        address = placeholder.getsockname()
    with pytest.raises(sb.PlexError, match=r"^http://127\.0\.0\.1:\d+ cannot be reached: Connection refused\.$"):
        look_at(f"http://127.0.0.1:{address[1]}")
    with pytest.raises(sb.PlexError, match=r"^http://no\.such\.host\.invalid:1 cannot be reached: .+\.$"):
        look_at("http://no.such.host.invalid:1")


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with RawServer(http_answer(sessions_xml())) as server:
        assert look_at(server.url) == ()


def test_https_is_verified_and_a_ca_of_ones_own_can_be_given(certificate):
    with tls_server(certificate, http_answer(sessions_xml(session_xml()))) as url:
        assert look_at(url.format("localhost"), ca_file=str(certificate[0])) == sessions(session_xml())
        with pytest.raises(sb.PlexError, match=r"certificate that does not fit \(self.signed certificate\)"):
            look_at(url.format("localhost"))
        with pytest.raises(sb.PlexError, match=r"certificate that does not fit \(IP address mismatch"):
            look_at(url.format("127.0.0.1"), ca_file=str(certificate[0]))


@pytest.mark.parametrize("begin, end, said", [("20350101", "20360101", "not yet valid"), ("20200101", "20210101", "has expired")])
def test_a_certificate_of_another_time_names_the_clock(certificate, tmp_path, begin, end, said):
    (tmp_path / "index").touch()
    (tmp_path / "config").write_text(f"[ca]\ndefault_ca=a\n[a]\ndatabase={tmp_path}/index\nnew_certs_dir={tmp_path}\nrand_serial=yes\n"
                                     "default_md=sha256\npolicy=p\nx509_extensions=x\n[p]\ncommonName=supplied\n[x]\nsubjectAltName=DNS:localhost\n")
    key, request, cert = certificate[1], tmp_path / "request", tmp_path / "cert"
    for words in (("req", "-new", "-key", key, "-subj", "/CN=localhost", "-out", request),
                  ("ca", "-batch", "-notext", "-selfsign", "-config", tmp_path / "config", "-keyfile", key, "-in", request, "-out", cert,
                   "-startdate", f"{begin}000000Z", "-enddate", f"{end}000000Z")):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    with tls_server((cert, key), http_answer(sessions_xml())) as url, pytest.raises(sb.PlexError) as error:
        look_at(url.format("localhost"), ca_file=str(cert))
    assert re.fullmatch(rf"https://localhost:\d+ has a certificate that does not fit \(certificate (is )?{said}[^)]*\): this machine's clock says "
                        rf"{time.strftime('%Y-%m-%d')} ..:..; if that is wrong, see `timedatectl`, else renew the certificate\.", str(error.value))


def test_a_whole_answer_over_tls_has_the_same_time_limit(certificate, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.3)
    match = r"did not answer within 0.3 s"
    with tls_server(certificate, drip(WELL)) as url, pytest.raises(sb.PlexError, match=match):
        look_at(url.format("localhost"), ca_file=str(certificate[0]))


@pytest.mark.parametrize("ca_file", ["nothing/there.pem", "LICENSE"])
def test_a_ca_file_that_is_none_is_the_operators_fault(ca_file):
    with pytest.raises(sb.ConfigError, match=r"^-plex-ca-file: .* is not a CA bundle \(.+\); give a PEM file\.$"):
        look_at("https://127.0.0.1:1", ca_file=str(HERE / ca_file))


def told(url, enough, timeout=8.0):
    """What watch_stream() puts into the inbox, until it is enough."""
    heard, plex = [], sb.PlexServer(url, lambda: TOKEN)

    class Done(BaseException):
        pass

    class Heard:
        def qsize(self):
            return 0

        def put(self, message):
            heard.append(message)
            if enough(heard):
                raise Done
    thread = threading.Thread(target=lambda: contextlib.suppress(Done).__enter__() or run(), daemon=True)

    def run():
        with contextlib.suppress(Done):
            sb.watch_stream(plex, Heard())
    thread.start()
    thread.join(timeout)
    assert not thread.is_alive(), heard
    return heard


def test_the_stream_is_asked_for_with_the_token_in_its_header_alone():
    with RawServer(lambda connection: connection.sendall(STREAM.encode() + PING + PLAYS)) as server:
        assert told(server.url + "/base", lambda heard: len(heard) == 2) == [sb.Stream("opened"), NOTIFICATION]
        head = server.requests[0].decode()
    assert head.startswith("GET /base/:/eventsource/notifications?filters=playing HTTP/1.1\r\n")
    assert head.count(TOKEN) == 1 and f"x-plex-token: {TOKEN}\r\n" in head.lower()


def test_a_chunked_stream_is_read_however_it_is_cut():
    body = PING + PLAYS
    for size in (1, 2, 3, 7, 50, len(body)):
        answer = STREAM.replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n").encode() + chunked(body, size)[:-5]
        with RawServer(lambda connection, answer=answer: connection.sendall(answer)) as server:
            assert told(server.url, lambda heard: len(heard) == 2) == [sb.Stream("opened"), NOTIFICATION], size


@pytest.mark.parametrize("answer, event, fault, sentence", [
    (lambda c: c.sendall(STREAM.encode() + PLAYS[:50]), "broke", "unreachable", "{} ended the event stream."),
    (lambda c: c.sendall(STREAM.encode()[:-2] + CHUNKED.encode() + b"\r\n40\r\n" + PLAYS[:50]), "broke", "nonsense", None),
    (lambda c: c.sendall(STREAM.encode()[:-2] + CHUNKED.encode() + b"\r\n-5\r\n" + PLAYS), "broke", "nonsense", None),
    (lambda c: c.sendall(STREAM.encode()[:-2] + CHUNKED.encode() + b"\r\nffffffffffffffff\r\n" + PLAYS), "broke", "nonsense", None),
    (lambda c: c.sendall(STREAM.encode()[:-2] + b"Content-Type: multipart/x; boundary*=x; boundary*0=y\r\n\r\n"), "broke", "unreachable", None),
    (lambda c: c.sendall(STREAM.encode() + b"data: " + b"x" * 200_000), "broke", "unreachable", "{} ended the event stream."),
    (lambda c: (c.sendall(STREAM.encode() + PING), c.recv(1)), "broke", "unreachable", "{} did not answer within 0.3 s."),
    (lambda c: (c.sendall(STREAM.encode()), drip(b"x" * 400)(c)), "broke", "unreachable", "{} did not answer within 0.3 s."),
    (lambda c: (c.sendall(STREAM.encode()), reset(c)), "broke", "unreachable", None),
    (lambda c: None, "failed", "unreachable", None),
    (http_answer(b"", "404 Not Found"), "failed", "missing", "{} answers 404 to /:/eventsource/notifications. " + NO_PLEX),
    (http_answer(b"", "401 Unauthorized"), "failed", "refused", None),
    (http_answer(b"", "503 Service Unavailable"), "failed", "starting", None),
])
def test_every_way_to_break_a_stream_is_told_and_it_is_opened_again(answer, event, fault, sentence, monkeypatch):
    monkeypatch.setattr(sb, "SILENCE_S", 0.3)
    monkeypatch.setattr(sb, "STREAM_MIN_S", 0.01)
    monkeypatch.setattr(sb, "STREAM_RARE_S", 0.01)
    with RawServer(answer) as server:
        heard = told(server.url, lambda heard: sum(isinstance(each, sb.Stream) and each.event == event for each in heard) == 2)
    broken = [each for each in heard if isinstance(each, sb.Stream) and each.event == event]
    assert [each.fault for each in broken] == [fault, fault]
    if sentence:
        assert broken[0].sentence == sentence.format(server.url)


def test_a_stream_that_is_refused_is_tried_rarely_and_one_that_breaks_less_and_less_often():
    pauses = []

    class Done(BaseException):
        pass

    def sleep(pause_s):
        pauses.append(pause_s)
        if len(pauses) == 20:
            raise Done
    for status_, low, high in (("404 Not Found", 0.8 * sb.STREAM_RARE_S, 1.2 * sb.STREAM_RARE_S), ("503 No", 0.2, 1.2 * sb.STREAM_MAX_S)):
        pauses.clear()
        with RawServer(http_answer(b"", status_)) as server, pytest.raises(Done):
            plex = sb.PlexServer(server.url, lambda: TOKEN)
            plex.renewed = types.SimpleNamespace(wait=sleep, clear=lambda: None)
            sb.watch_stream(plex, queue.SimpleQueue())
        assert all(low <= pause <= high for pause in pauses)
    assert pauses[0] < 0.4 and pauses[-1] > 0.8 * sb.STREAM_MAX_S


EMOJI = "\N{GRINNING FACE}".encode()
JSON_PAGE = b'{"MediaContainer":{"Metadata":['


HOSTILE = [
    (JSON_PAGE, b"[],", b"1]}}"), (JSON_PAGE, b"{},", b"1]}}"), (JSON_PAGE, b'{"a":1},', b"1]}}"), (JSON_PAGE, b"1e9,", b"1]}}"), (b"", b"[", b""),
    (JSON_PAGE, b'"' + EMOJI + b'",', b"1]}}"), (JSON_PAGE + b'"' + EMOJI, b"x", b'"]}}'), (JSON_PAGE + b'"', EMOJI, b'"]}}'), (b"", b'{"a":', b""),
    (b"<MediaContainer>", b"<a/>", b"</MediaContainer>"), (b"<MediaContainer>", b'<a b=""/>', b"</MediaContainer>"),
    (b"<MediaContainer>", b"<a>", b""), (b"<MediaContainer a='" + EMOJI, b"x", b"'/>"), (b"<MediaContainer a='", EMOJI, b"'/>"),
    (b"<MediaContainer a='", b"\xff", b"'/>"), (b"<MediaContainer a='", b"&#1;", b"'/>"), (b"<MediaContainer a='", b"\x01", b"'/>")]


def test_an_answer_of_any_content_takes_little_memory():
    script = """if True:
        import ast, resource, sys
        sys.path.insert(0, sys.argv[1])
        import streamerbrainz as sb
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for begin, unit, end in ast.literal_eval(sys.argv[2]):
            for most in (sb.MAX_VALUES // 3, sb.MAX_VALUES // 2, sb.MAX_VALUES, sb.MAX_LIBRARY_PAGE):
                count = min(most, (sb.MAX_LIBRARY_PAGE - len(begin) - len(end)) // len(unit))
                try:
                    sb.parse_container(begin + unit * count + end)
                except sb.PlexError:
                    pass
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            assert taken < 26, f"{taken} MB for {begin + unit}"          # above the 30 of the program
        """
    done = subprocess.run([sys.executable, "-c", script, str(HERE), repr(HOSTILE)], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("head", [b"Content-Length: 200000000000", b"Content-Length: %d" % 10 ** 30, b"Transfer-Encoding: chunked\r\n\r\n7fffffffffff"])
@pytest.mark.parametrize("ask", [lambda plex: plex.sessions(), lambda plex: plex.server_id, lambda plex: plex.get("/library/metadata/1/thumb/1", room=sb.MAX_COVER),
                                 lambda plex: next(plex.pages("/accounts")), lambda plex: list(plex.notifications())])
def test_no_number_of_an_answer_is_allocated(head, ask, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 1.0)
    with RawServer(lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + b"x" * 1000)) as server, pytest.raises(sb.PlexError):
        ask(sb.PlexServer(server.url, lambda: TOKEN))


def test_memory_that_is_out_is_a_servers_fault_or_costs_a_connection(listener, monkeypatch):
    def none(*_, **__):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(sb.json, "loads", none)
        assert sb.json_value(b"{}") is None
        patch.setattr(sb._Answer, "read", none)
        with RawServer(http_answer(b"{}")) as server, pytest.raises(sb.PlexError):
            sb.exchange(server.url, {})
        patch.setattr(sb.ElementTree, "XMLParser", lambda **_: type("Parser", (), {"feed": none})())
        with pytest.raises(sb.PlexError):
            sb.parse_xml(b"<MediaContainer/>")
        patch.setitem(listener.pages.paths, "/", none)
        assert get(listener)[0] is None
    assert get(listener, "/healthz")[0] == 200 and listener.inbox.empty()


def test_a_list_that_is_kept_is_bounded(token_file, monkeypatch):
    monkeypatch.setattr(sb, "MAX_LISTED", 120)
    with Library() as library:
        library.answers["/accounts"] = lambda query: {"totalSize": 2 ** 52, "Metadata": [
            {"ratingKey": query["X-Plex-Container-Start"] + str(i)} for i in range(sb.PAGE_ITEMS)]}
        assert len(list(sb.PlexServer(library.url, secret_file(token_file).first).items("/accounts"))) == 120
        assert len(library.requests) == 3


def test_a_listing_without_end_ends(token_file):
    with Library() as library:
        library.answers["/library/sections/1/all"] = lambda query: {"totalSize": 2 ** 52, "Metadata": [{"ratingKey": "1"}]}
        plex = sb.PlexServer(library.url, secret_file(token_file).first)
        assert [page.end for page in plex.pages("/library/sections/1/all")] == [1]


def test_notifications_leave_room_for_webhooks():
    inbox = queue.SimpleQueue()
    plays = PLAYS * 3 * sb.MAX_NOTED
    with RawServer(lambda connection: connection.sendall(STREAM.encode() + plays)) as server:
        threading.Thread(target=sb.watch_stream, args=(sb.PlexServer(server.url, lambda: TOKEN), inbox), daemon=True).start()
        eventually(lambda: inbox.qsize() == sb.MAX_NOTED + 1)          # the last of all: that it broke
    heard = [inbox.get() for _ in range(sb.MAX_NOTED + 1)]
    assert [each.event for each in heard if isinstance(each, sb.Stream)] == ["opened", "broke"]
    assert heard.count(NOTIFICATION) == sb.MAX_NOTED - 1


def test_a_new_token_opens_the_stream_at_once():
    token = ["wrong"]

    def answer(connection):
        known = f"x-plex-token: {TOKEN}".encode() in server.requests[-1].lower()
        stream = b"eventsource" in server.requests[-1]
        (http_answer(sessions_xml(), "200 OK" if known else "401 No") if not stream or not known
         else lambda c: c.sendall(STREAM.encode() + PING))(connection)
    inbox = queue.SimpleQueue()
    with RawServer(answer) as server:
        plex = sb.PlexServer(server.url, lambda: token[0])
        threading.Thread(target=sb.watch_stream, args=(plex, inbox), daemon=True).start()
        assert inbox.get(timeout=5).fault == "refused"
        token[0] = TOKEN
        assert plex.sessions() == ()
        assert inbox.get(timeout=5) == sb.Stream("opened")


def test_from_a_real_webhook_to_a_true_line(plex, token_file, lines):
    with Running(plex, token_file) as daemon:
        for event, state in (("media.play", PLAYING), ("media.pause", PAUSED), ("media.resume", PLAYING), ("media.stop", STOPPED)):
            plex.turn(state, TRACK)
            daemon.send(event, thumb=THUMB)
            eventually(lambda state=state: changes(lines)[-1:] == [state_line(state)])
    assert changes(lines) == [state_line(state) for state in (PLAYING, PAUSED, PLAYING, STOPPED)]
    assert any('webhook event=media.play player="Living Room" machine_id=m1 title="Karma Police" result=reported' in line or 'result="a look"' in line for line in lines)


def test_a_burst_of_webhooks_costs_a_handful_of_looks(plex, token_file, lines):
    looks = []
    sessions_before = plex.sessions
    plex.sessions = lambda: looks.append(time.sleep(0.2)) or sessions_before()
    plex.turn(PLAYING, TRACK)
    with Running(plex, token_file) as daemon:
        eventually(lambda: changes(lines))
        looks.clear()
        begin = time.monotonic()
        with connect(daemon) as connection:
            for _ in range(1000):
                connection.sendall(post())
            answers = b""
            while answers.count(b"HTTP/1.1 200 OK") < 1000:
                answers += connection.recv(65536)
        sent_s = time.monotonic() - begin
        eventually(lambda: daemon.inbox.empty() and not daemon.watcher.players["m1"].claims)
    assert len(looks) <= sent_s / 0.2 + 5                  # one look at a time while they come, then two: 4 on a quiet machine


def test_webhooks_are_answered_while_the_server_hangs(token_file, lines, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 60.0)
    asked, release = threading.Event(), threading.Event()
    with RawServer(lambda connection: (asked.set(), release.wait(60))) as server, serving(sb.StandIn(TOKEN, "m1")) as sender:
        server.send_webhook = sender.send_webhook
        with Running(server, token_file) as daemon:
            assert asked.wait(20)
            assert [daemon.send("media.play") for _ in range(20)] == [200] * 20
            assert len(server.requests) == 1 and lines == []           # that look has not ended
            release.set()


def test_a_refused_token_is_said_once_as_an_error_and_a_new_one_mends_it(plex, token_file, lines):
    plex.turn(PLAYING, TRACK)
    token_file.write_text("wrong")
    with Running(plex, token_file) as daemon:
        eventually(lambda: any("refuses the token" in line for line in lines))
        token_file.write_text(TOKEN)
        daemon.send("media.play")
        eventually(lambda: changes(lines))
    assert [line[:40] for line in lines if line.startswith("<3>")] == ["<3>no answer from Plex: http://127.0.0.1"]
    assert any(line.startswith("<6>Plex answers again after") for line in lines)
    assert not any(TOKEN in line for line in lines)


def test_without_a_server_each_new_player_is_named_with_its_flag(plex, lines):
    with Running(plex, None, machine_id="") as daemon:
        for uuid in ("m1", "m2 \x1b[31m", "m1"):
            exchange(daemon, post(*reversed(sb.encode_webhook(payload(uuid=uuid)))))
        exchange(daemon, post(*reversed(sb.encode_webhook(payload("library.new", metadata=SONG, Player=None)))))
        eventually(lambda: any("library.new" in line for line in lines))
    heard = '<6>new player; to watch only this one, add -plex-machine-id {} player="Living Room"'
    assert [line for line in lines if line.startswith("<6>new player")] == [heard.format("m1"), heard.format(r"'m2 \u001b[31m'")]
    assert changes(lines) == [state_line(PLAYING) + " machine_id=m1", state_line(PLAYING) + r' machine_id="m2 \u001b[31m"']


def test_without_a_server_one_player_can_be_chosen_all_the_same(plex, lines):
    with Running(plex, None) as daemon:
        for uuid in ("m2", "m1"):
            exchange(daemon, post(*reversed(sb.encode_webhook(payload(uuid=uuid)))))
        eventually(lambda: changes(lines))
    assert changes(lines) == [state_line(PLAYING) + " machine_id=m1"]


def test_players_that_are_remembered_are_bounded(plex, lines):
    watcher = watcher_alone()
    for number in range(sb.MAX_PLAYERS * 3):
        watcher.hear(sb.Webhook("media.play", f"m{number}", item=sb.parse_item(SONG)))
        watcher.hear(sb.Webhook("media.play", "mine", item=sb.parse_item(SONG)))
    assert len(watcher.players) == sb.MAX_PLAYERS and len(changes(lines)) == sb.MAX_PLAYERS * 3 + 1


def test_a_wrong_path_is_one_warning_a_minute(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sb.time, "monotonic", lambda: now[0])
    watcher = watcher_alone()
    for now[0] in (100.0, 101.0, 159.0, 161.0):
        watcher.refuse(sb.Refused(404, "No.", "/plex\n<3>", "192.168.1.5", is_webhook=True))
        watcher.refuse(sb.Refused(404, "No.", "/robots.txt", "192.168.1.6", is_webhook=False))
    assert [line for line in lines if not line.startswith("<7>")] == [r'<4>a Plex server sends webhooks to a wrong path; the URL in Plex must end in /webhooks/plex path="/plex\n<3>" '
                     "address=192.168.1.5"] * 2


def test_a_stream_that_the_server_does_not_give_is_said_once(lines):
    watcher = watcher_alone()
    for event, fault in (("failed", "missing"), ("failed", "missing"), ("opened", ""), ("broke", "unreachable"), ("failed", "refused")):
        watcher.note_stream(sb.Stream(event, fault, "So."))
    assert [line for line in lines if line.startswith("<6>")] == [
        "<6>no event stream, the server has none (404): a change without a webhook is found by the next slow look",
        "<6>the event stream is there now",
        "<6>no event stream, the server refuses the token in the X-Plex-Token header for it (401): "
        "a change without a webhook is found by the next slow look"]


def test_a_change_says_why_it_is_believed_at_debug_and_in_a_counter(plex, token_file, lines):
    plex.turn(PLAYING, TRACK)
    with Running(plex, token_file) as daemon:
        eventually(lambda: changes(lines))
    assert lines[-1].endswith(' player="Living Room" by=sessions')
    assert daemon.watcher.status.reported == {(PLAYING, "sessions"): 1}
    sb.log.setLevel(sb.logging.INFO)
    daemon.watcher.report(change())
    assert lines[-1].endswith(' player="Living Room"')


def test_missing_webhooks_are_a_warning_that_names_leg_and_causes_in_order(lines):
    watcher = watcher_alone()
    watcher.report(sb.WebhooksMissing(3))
    watcher.report(sb.WebhooksMissing(7, over=True))
    assert lines == ["<4>webhooks do not arrive: 3 changes in a row came without one. Without Plex Pass this is normal, and nothing is lost. Else the Plex "
                     "server cannot reach the URL, or it is missing in the account's webhooks. To find out: streamerbrainz.py doctor",
                     "<6>webhooks arrive again; 7 were missing"]


class Server(RawServer):
    """A server of today, whose answers a test changes; and a Watcher for it."""

    def __init__(self, machine_id="m1", **root):
        super().__init__(self.reply)
        self.root, self.shown = {"friendlyName": "nas", "version": "1.41.3.9314-a0bfb8370", "ownerFeatures": "pass,webhooks", **root}, ()
        self.others = {"/clients": {"MediaContainer": {"Server": [{"name": "Kitchen", "machineIdentifier": "m2"}]}}}
        self.watcher = sb.Watcher(sb.Config(plex_machine_id=machine_id), queue.SimpleQueue(), sb.PlexServer(self.url, lambda: TOKEN), lambda *_: None)

    def reply(self, connection):
        path = self.requests[-1].split(b" ")[1].decode()
        fields = {"/": {"MediaContainer": self.root}, **self.others}.get(path)
        body = sessions_xml(*self.shown) if path == "/status/sessions" else json.dumps(fields).encode()
        http_answer(body, "200 OK" if path == "/status/sessions" or fields else "404 Not Found", "Connection: close\r\n")(connection)


@pytest.mark.parametrize("machine_id, root, shown, line", [
    ("m1", {}, (), "Plex answers: nas 1.41.3; the player plays nothing now"),
    ("m2", {}, (), "Plex answers: nas 1.41.3; Kitchen plays nothing now"),
    ("m1", {}, (session_xml(),), 'Plex answers: nas 1.41.3; Living Room is playing "Karma Police" by Radiohead'),
    ("m1", {"ownerFeatures": "sync"}, (session_xml(PAUSED),),
     'Plex answers: nas 1.41.3 (without Plex Pass: it sends no webhooks); Living Room is paused "Karma Police" by Radiohead'),
    ("m1", {"friendlyName": ["x"], "version": 7, "ownerFeatures": {}}, (), "Plex answers: 7; the player plays nothing now"),
])
def test_at_the_start_it_is_said_once_who_answers_and_what_the_player_does(machine_id, root, shown, line, lines):
    with Server(machine_id, **root) as server:
        server.shown = shown
        server.watcher.look()
        server.watcher.look()
        assert [each for each in lines if "Plex answers" in each] == [f"<6>{line}"]
        assert lines[0] == f"<6>{line}"                                         # before the change
        asked = sum(b"GET / " in each for each in server.requests)
        server.watcher.judge(Outage("unreachable", "No."))
        server.watcher.ask_at = 0.0                                             # as after an outage: asked again, said if it is another
        server.watcher.look()
        assert sum(b"GET / " in each for each in server.requests) == asked + 1
        server.root = {"friendlyName": "nas", "version": "1.42.0.1"}
        server.watcher.ask_at = 0.0
        server.watcher.look()
        assert sum("Plex answers: " in each for each in lines) == 2


@pytest.mark.parametrize("about", [{"MediaContainer": {"Server": [{"machineIdentifier": [], "name": {}}, {"machineIdentifier": {}}]}}, {"MediaContainer": []}, []])
def test_what_a_server_tells_of_itself_may_have_any_shape(about, lines):
    with Server() as server:
        server.others["/clients"] = about
        server.watcher.look()
        assert lines == ["<6>Plex answers: nas 1.41.3; the player plays nothing now"]


def test_a_server_that_is_too_busy_to_tell_of_itself_is_asked_again_and_keeps_nobody_waiting(lines, monkeypatch):
    monkeypatch.setattr(sb, "ABOUT_S", 0.1)
    with Server() as server:
        server.others["/"] = None
        ask, server.answer = server.answer, lambda connection: time.sleep(0.3) if b"GET / " in server.requests[-1] else ask(connection)
        begun = time.monotonic()
        server.watcher.look()
        assert time.monotonic() - begun < 0.3 and lines == [] and server.watcher.ask_at > begun + 50
        server.answer = ask
        del server.others["/"]
        server.watcher.ask_at = 0.0
        server.watcher.look()
        assert [each for each in lines if "Plex answers" in each] == ["<6>Plex answers: nas 1.41.3; the player plays nothing now"]


def test_an_old_server_that_tells_nothing_of_itself_is_named_by_its_address(plex, lines):
    watcher = sb.Watcher(sb.Config(plex_machine_id="m1"), queue.SimpleQueue(), sb.PlexServer(plex.url, lambda: TOKEN), lambda *_: None)
    watcher.look()
    watcher.look()
    assert lines == [f"<6>Plex answers: {plex.url}; the player plays nothing now"] and watcher.status.has_pass is None


def test_a_machine_id_that_was_never_seen_is_a_warning_that_names_those_that_play(lines):
    with Server("typo") as server:
        look = server.watcher.look
        look()
        assert not any(each.startswith("<4>") for each in lines)
        server.shown = (session_xml(player="m2"),)
        look()
        look()
        assert [each for each in lines if each.startswith("<4>")] == [
            "<4>the player typo has not been seen yet, but others play: Living Room is m2. If you mean one of them, give its flag: -plex-machine-id m2"]
        server.shown = (session_xml(player="a b", key="9"),)
        look()
        assert sum(each.startswith("<4>") for each in lines) == 2 and "Living Room is m2; Living Room is a b." in lines[-1]
        status = server.watcher.status
        for is_open, word in ((True, "-plex-machine-id m2"), (False, "the log names them")):
            code, fields = sb.health(status, sb.Glance(), 1.0, is_open)
            assert (code, fields["status"], len(fields["degraded"])) == (200, "degraded", 1) and word in fields["degraded"][0]
        assert sb.banners(status, sb.Glance()) == [lines[-1][3:]]
        server.shown = (session_xml(player="typo"),)
        look()
        assert server.watcher.status.strangers == {} and sb.health(server.watcher.status, sb.Glance(), 1.0)[1]["status"] == "ok"


def test_without_plex_pass_nothing_is_missing(lines):
    with Server(ownerFeatures="sync,home") as server:
        server.watcher.look()
        lines.clear()
        missed = server.watcher.players["m1"].proof._replace(in_a_row=3, missed=3)
        server.watcher.players["m1"] = server.watcher.players["m1"]._replace(proof=missed)
        server.watcher.report(sb.WebhooksMissing(3))
        server.watcher.publish(None)
        status = server.watcher.status
        assert lines == [] and sb.health(status, sb.Glance(), 1.0)[1]["degraded"] == []
        assert sb.witnesses(status, 1.0)["webhooks"] == {"up": None, "words": "not sent without Plex Pass"}
        page = sb.status_page(status, 1.0, "http://x", False, "N", False, None, lambda form, at: "20:15")
        assert "<li class=dim><span class=dim>\u2013</span> <b>Webhooks</b>: not sent without Plex Pass</li>" in page
        assert "<details id=paste>" in page                                     # nobody has to paste it


def test_the_proof_is_counted_by_the_clock(monkeypatch, plex, token_file):
    monkeypatch.setattr(sb, "PROOF_S", 0.3)
    with Running(plex, token_file, poll=0) as daemon:
        eventually(lambda: daemon.board.status.looks)
        plex.turn(PLAYING, TRACK)
        daemon.inbox.put(sb.Stream("opened"))                                   # a look; no webhook, and nothing after it
        eventually(lambda: daemon.board.status.player.proof.missed == 1)


def test_the_main_loop_itself_pings_the_watchdog(plex, token_file, lines, tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5)
        plex.turn(PLAYING, TRACK)
        with Running(plex, token_file, environ={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}):
            eventually(lambda: manager.recv(500).startswith(b'WATCHDOG=1\nSTATUS=playing "Karma Police" by Radiohead on Living Room; no'))
            assert manager.recv(500).startswith(b"WATCHDOG=1\n")


def test_a_crash_of_a_request_thread_is_raised_in_the_main_thread():
    inbox = queue.SimpleQueue()
    inbox.put(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        sb.Watcher(sb.Config(), inbox, None, lambda *_: None).run()


@pytest.fixture
def names(monkeypatch):
    """The name servers: what they know, how often they were asked, and whether they answer."""
    ask = socket.getaddrinfo

    class Names:
        known, asked, answer = {}, [], threading.Event()

        def getaddrinfo(self, host, port, *words, flags=0, **more):
            if flags & socket.AI_NUMERICHOST:
                return ask(host, port, *words, flags=flags, **more)
            self.asked.append(host)
            assert self.answer.wait(20)
            if host not in self.known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return ask(self.known[host], port, *words, flags=socket.AI_NUMERICHOST, **more)
    names = Names()
    names.known, names.asked = {}, []
    monkeypatch.setattr(sb.socket, "getaddrinfo", names.getaddrinfo)
    monkeypatch.setattr(sb, "KNOWN", {})
    yield names
    names.answer.set()
    eventually(lambda: not lookups())


def lookups():
    return [each for each in threading.enumerate() if each.name.startswith("names ")]


def found(host, port=1, in_s=5.0):
    return [each[4][:2] for each in sb.find_addresses(host, port, time.monotonic() + in_s)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "192.168.1.5", "::ffff:10.0.0.1"])
def test_an_address_needs_no_lookup_and_no_thread(names, host):
    assert found(host, 32400) == [(host, 32400)]
    assert not names.asked and not lookups()


def test_nobody_waits_for_silent_name_servers_longer_than_they_want_and_all_wait_for_one_lookup(names):
    failures = []

    def ask():
        with pytest.raises(OSError, match="the name servers do not answer") as caught:
            found("plex", in_s=0.2)
        failures.append(caught)
    begun = time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 20 and time.monotonic() - begun < 1.0 and names.asked == ["plex"] and len(lookups()) == 1
    names.known["plex"] = "10.0.0.1"
    names.answer.set()                                     # late: nobody waits for it any more
    eventually(lambda: not lookups())
    assert found("PLEX", 7, in_s=-1) == [("10.0.0.1", 7)] and names.asked == ["plex"]


def test_the_last_addresses_serve_when_the_lookup_fails_or_does_not_end(names, monkeypatch):
    monkeypatch.setattr(sb, "NAME_S", 0.1)
    names.answer.set()
    names.known["plex"] = "10.0.0.1"
    assert found("plex") == [("10.0.0.1", 1)]
    names.known["plex"] = "10.0.0.2"
    assert found("plex") == [("10.0.0.2", 1)]              # each time anew
    names.known.clear()
    assert found("plex") == [("10.0.0.2", 1)]
    with pytest.raises(OSError, match="Name or service not known"):
        found("other")
    names.answer.clear()
    begun = time.monotonic()
    assert [found("plex") for _ in range(3)] == [[("10.0.0.2", 1)]] * 3
    assert time.monotonic() - begun < 1.0                  # each waits for NAME_S
    assert names.asked == ["plex", "plex", "plex", "other", "plex"]
    with pytest.raises(OSError, match="Name or service not known"):
        found("other", in_s=0)                             # what is known of it, without a lookup
    assert names.asked[-1] == "plex"


def test_only_a_few_lookups_go_on_at_once(names):
    for number in range(30):
        with pytest.raises(OSError, match="the name servers do not answer"):
            found(f"name{number}", in_s=0.001)
    assert len(lookups()) == sb.MAX_LOOKUPS == len(names.asked)
    names.answer.set()
    eventually(lambda: not lookups())
    assert not lookups()


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "a\0b", "", "pl\xe9x..x"])
def test_what_cannot_be_a_name_is_an_error_of_the_system(monkeypatch, host):
    monkeypatch.setattr(sb, "KNOWN", {})
    with pytest.raises(OSError):
        found(host, in_s=2.0)


def test_a_machine_without_threads_has_no_names_but_goes_on(names, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(sb.threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="the name servers do not answer"):
        found("plex")


def test_a_look_waits_for_names_within_its_own_time(names, plex, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.2)
    port = plex.server_address[1]
    server = sb.PlexServer(f"http://plex.test:{port}", lambda: TOKEN)
    watcher = sb.Watcher(sb.Config(plex_machine_id="m1"), queue.SimpleQueue(), server, lambda *_: None)
    begun = time.monotonic()
    watcher.look()
    assert time.monotonic() - begun < 1.0
    assert watcher.players["m1"].outage.sentence == f"http://plex.test:{port} cannot be reached: the name servers do not answer."
    names.known["plex.test"] = "127.0.0.1"
    names.answer.set()
    watcher.look()
    assert watcher.players["m1"].outage is None
    names.known.clear()
    watcher.look()
    assert watcher.players["m1"].outage is None            # the last address is still good


@pytest.mark.parametrize("url", ["http://plex.test:32400", "http://localhost:32400", "http://127.0.0.1:32400", "http://[::1]:32400", "http://a..b", ""])
def test_this_machines_address_is_known_without_any_name_server(names, url):
    begun = time.monotonic()
    address = sb.guess_address(url)
    assert time.monotonic() - begun < 0.2 and not names.asked and address
    if "localhost" in url or "127" in url:
        assert address == "127.0.0.1"
    names.known["plex.test"] = "127.0.0.7"                 # once a look has found it, it counts
    names.answer.set()
    found("plex.test")
    assert sb.guess_address("http://plex.test:32400") == "127.0.0.1"


def test_without_a_server_nothing_can_be_looked_at():
    watcher = watcher_alone()
    watcher.hear(sb.parse_payload(payload()))
    for message in (signal.SIGHUP, signal.SIGTERM):
        watcher.inbox.put(message)
    watcher.run()
    assert watcher.players and watcher.due() == math.inf


# === Page ===

@pytest.mark.parametrize("player, age, sentence", [
    (None, None, "no player yet; no webhook yet"),
    (sb.PlayerState("m1", True), None, "stopped; no webhook yet"),
    (sb.PlayerState("m1", True, state=PLAYING, item=sb.parse_item(SONG), player_title="Living Room"), 12.3,
     'playing "Karma Police" by Radiohead on Living Room; last webhook 12 s ago'),
    (sb.PlayerState("m1", True, outage=Outage("starting", "It starts.")), 3600, "It starts; last webhook 60 min ago")])
def test_the_status_is_a_speaking_line(player, age, sentence):
    assert sb.status_sentence(status_of(player, webhook_at=None if age is None else 5000.0 - age), 5000.0) == sentence


def test_now_has_the_logs_keys_first_and_moves_on():
    fields = sb.now_fields(status_of(known_player(), has_server=True, looks={"ok": 1}), 102.0)
    assert list(fields)[:7] == ["state", "title", "artist", "album", "position_ms", "duration_ms", "player"]
    assert (fields["state"], fields["position_ms"], fields["machine_id"], fields["cover"]) == (PLAYING, 63000, "m1", "cover?key=101")
    assert fields["witnesses"]["sessions"] == {"up": True, "words": "the server answers"}
    assert sb.now_fields(sb.Status(), 1.0)["state"] == STOPPED
    for status, up in ((sb.Status(), None), (status_of(has_server=True, stream_missing=True), None), (status_of(has_server=True), False),
                       (status_of(has_server=True, stream_open=True), True)):
        assert sb.witnesses(status, 1.0)["events"]["up"] is up


def out(fault="unreachable", at=0.0):
    return known_player(outage=Outage(fault, "http://nas:32400 fails."), outage_at=at)


@pytest.mark.parametrize("status, seen, expected", [
    (sb.Status(), {}, (200, "ok")), (status_of(known_player(), busy_since=986), {"waiting_s": 299}, (200, "ok")),
    (sb.Status(busy_since=984), {}, (503, "failing")), (sb.Status(), {"waiting_s": 301}, (503, "failing")),
    (sb.Status(), {"broken": "It is gone."}, (503, "failing")),
    (status_of(out(at=701)), {}, (200, "degraded")), (status_of(out(at=699)), {}, (503, "failing")),
    (status_of(out("refused", 999)), {}, (503, "failing")), (status_of(out("forbidden", 999)), {}, (503, "failing")),
    (status_of(known_player(proof=sb.Proof(in_a_row=3))), {}, (200, "degraded")), (status_of(known_player(proof=sb.Proof(in_a_row=2))), {}, (200, "ok"))])
def test_health_is_bad_only_where_a_person_should_come(status, seen, expected):
    code, fields = sb.health(status, sb.Glance(**{key: value and "/home/pi/tracker.db " if key == "broken" else value for key, value in seen.items()}), 1000.0)
    assert "http" not in json.dumps(fields) and "/home" not in json.dumps(fields)      # whoever asks
    assert (code, fields["status"]) == expected and bool(fields["reasons"]) == (code == 503)


def test_metrics_are_what_prometheus_reads():
    parser = pytest.importorskip("prometheus_client.parser")
    status = status_of(known_player(proof=sb.Proof(missed=2)), has_server=True, webhook_at=90.0, webhook_time=1700000000.0,
                       webhooks={("media.play", "ok"): 3, ("other", "401"): 1}, looks={"ok": 5, "unreachable": 1}, reported={(PLAYING, "webhook"): 2})
    said = sb.metric_lines(status, {"success": 4, "waiting": 1}, sb.process_figures(1.0), 102.0)
    samples = {(each.name, *each.labels.values()): each.value for family in parser.text_string_to_metric_families(said) for each in family.samples}
    assert samples["plex_up",] == 1 and samples["streamerbrainz_build_info", sb.VERSION] == 1 and samples["streamerbrainz_player_position_seconds",] == 63
    assert [samples["streamerbrainz_player_state", each] for each in (PLAYING, PAUSED, STOPPED)] == [1, 0, 0]
    assert samples["streamerbrainz_webhooks_total", "media.play", "ok"] == 3 and samples["streamerbrainz_webhooks_total", "other", "401"] == 1
    assert samples["streamerbrainz_webhook_last_timestamp_seconds",] == 1700000000 and samples["streamerbrainz_webhook_missed_total",] == 2
    assert samples["streamerbrainz_looks_total", "unreachable"] == 1 and samples["streamerbrainz_changes_total", PLAYING, "webhook"] == 2
    assert samples["streamerbrainz_tracker_rows_total", "success"] == 4 and samples["process_resident_memory_bytes",] > 1e6
    assert "Karma" not in said and "Living" not in said
    assert "plex_up" not in sb.metric_lines(sb.Status(), {}, {}, 1.0)


@pytest.mark.parametrize("seconds, words", [(0, "0 s ago"), (59.6, "60 s ago"), (119, "119 s ago"), (240, "4 min ago"), (7199, "120 min ago"),
                                            (7200, "2 h ago"), (172_000, "48 h ago"), (172_800, "2 days ago"), (8.64e6, "100 days ago")])
def test_how_long_ago_is_said_as_people_say_it(seconds, words):
    assert sb.ago(seconds) == words


@pytest.mark.parametrize("ms, words", [(0, "0:00"), (59_999, "0:59"), (264_000, "4:24"), (3_599_999, "59:59"), (3_702_000, "1:01:42"), (36_000_000, "10:00:00")])
def test_positions_have_hours_where_there_are_any(ms, words):
    assert sb.clock(ms) == words


@pytest.mark.parametrize("player, title", [
    (sb.PlayerState("m1", True), "StreamerBrainz"), (known_player(STOPPED), "StreamerBrainz"),
    (known_player(), "\u25b6\ufe0e Karma Police \u2013 Radiohead"), (known_player(PAUSED), "\u275a\u275a Karma Police \u2013 Radiohead"),
    (known_player(item={"type": "movie", "title": "</title><b>"}), "\u25b6\ufe0e </title><b>")])
def test_the_tab_is_called_what_plays(player, title):
    assert sb.page_title(player) == title
    assert f"<title>{html.escape(title)}</title>" in page_of(status_of(player))


def page_of(status, tracked=None, url="http://pi:3001/webhooks/plex", has_secret=False, big=False):
    return sb.status_page(status, 1.0, url, has_secret, "N", True, tracked, lambda form, at: "20:15", big)


def test_what_needs_a_person_comes_first():
    player = known_player()._replace(outage=Outage("refused", "nas refuses the token (401)."), machine_identifier="m1")
    seen = sb.Glance(conflicts=((4, "The Office", "multiple_matches"),), broken="it is gone")
    said = page_of(status_of(player, strangers={"m2": "Den"}), seen)
    places = [said.index(word) for word in ("refuses the token (401).", "The watch tracker cannot be used: it is gone",
                                            "Which show is it?", '<a href="/questions/4">', "<section class", "How it knows")]
    assert places == sorted(places) and "-plex-machine-id m2" in said[:places[-2]]
    assert "class=banner>" not in page_of(status_of(known_player())).replace("<p id=lost class=banner hidden>", "")
    passing = known_player()._replace(outage=Outage("unreachable", "nas is off."))
    assert "<p class=banner>" not in page_of(status_of(passing))                 # nobody has to come for that


def test_the_url_folds_away_once_webhooks_arrive():
    assert "<details id=paste open>" in page_of(sb.Status()) and "<details id=paste>" in page_of(sb.Status(webhook_at=0.5))


def test_foreign_words_do_not_turn_the_page_around():
    item = {**SONG, "title": "\u202eKarma", "grandparentTitle": "\u05d0\u05d1", "parentTitle": "\u2067x"}
    change_ = sb.Change(PLAYING, STOPPED, sb.parse_item(item), 0, "x", "m1", "events")
    said = page_of(status_of(known_player(item=item), changes=((1.0, change_),)), sb.Glance(((1.0, "\u202ex"),), ((1, "\u202ey", "k"),)))
    body = said[said.index("<body"):]
    assert all(re.search(rf"<bdi>[^<]*{each}[^<]*</bdi>", body) for each in "\u202e\u05d0\u2067")
    assert not re.search("[\u202e\u2067\u05d0]", re.sub("<bdi>[^<]*</bdi>", "", body))


def test_a_screen_on_the_wall_shows_what_plays_and_nothing_else(listener):
    publish(listener, changes=1)
    code, said = get(listener, "/?big")
    assert code == 200 and "<body class=big>" in said and "Karma Police" in said and "Radiohead" in said and 'id=position>' in said
    assert not any(word in said[said.index("<body"):] for word in ("OK Computer", "Living Room", "How it knows", "<footer", "<nav", "id=url"))
    assert all("<body class=big>" not in get(listener, path)[1] for path in ("/", "/?x=bigger", "/?token=a"))


def luminance(colour):
    parts = [int(colour[i] * 2 if len(colour) == 4 else colour[2 * i - 1:2 * i + 1], 16) / 255 for i in (1, 2, 3)]
    return sum(weight * (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4) for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_every_colour_of_words_has_a_contrast_of_four_and_a_half():
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})\b", block)) for block in re.findall(r":root \{(.*?)\}", sb.STYLE, re.DOTALL))
    big = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})\b", re.search(r"\.big \{(.*?)\}", sb.STYLE, re.DOTALL)[1]))
    pairs = [(theme[word], theme[below]) for theme in (light, {**light, **dark}) for word, below in (
        ("text", "page"), ("dim", "page"), ("good", "page"), ("bad", "page"), ("accent", "page"), ("text", "warn"), ("dim", "warn"), ("on-accent", "accent"))]
    for colours in [*pairs, (big["dim"], "#000"), (big["accent"], "#000")]:
        low, high = sorted(map(luminance, colours))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colours
    assert set(re.findall(r"(?<![-\w])color: ([^;} ]+)", sb.STYLE)) == {f"var(--{name})" for name in ("text", "dim", "good", "bad", "on-accent", "accent")} | {
        "inherit", "#fff"}


def test_a_browser_without_the_secret_gets_a_small_page_that_says_what_is_missing(listener, tmp_path):
    listener.gate.secret, listener.pages.has_secret = webhook_secret(tmp_path), True
    publish(listener)
    answer = exchange(listener, raw("GET / HTTP/1.1\nHost: x\nAccept: text/html,*/*\n"))
    assert status(answer) == 401 and b"<h1>The secret is missing</h1>" in answer and b"name=token" in answer and b"Karma" not in answer
    assert b"\r\nContent-Security-Policy: default-src 'none'; " in answer and SECRET.encode() not in answer
    for request_ in (raw("GET / HTTP/1.1\nHost: x\n"), post(head="Accept: */*\r\n")):                 # curl, Plex
        assert exchange(listener, request_).endswith(b"\r\n\r\nThe secret is missing or wrong: the URL must end in ?token= and the secret.\n")


def test_every_foreign_string_of_the_page_is_escaped():
    change = sb.Change(PLAYING, STOPPED, sb.parse_item(EVIL), 0, "<b>", "m1", "<i>")
    seen = sb.Glance(((1.0, "<u>x"),), ((1, "<s>y", "no_match"),))
    said = sb.status_page(status_of(known_player(item=EVIL)._replace(player_title="<h6>", outage=Outage("x", "<em>")), changes=((1.0, change),), has_server=True),
                          1.0, "http://x/<q>", True, "N", True, seen, lambda form, at: "20:15")
    assert "alert(1)" in said and not re.search(r"<script>|<img src=x|<b>\)|<h6>|<em>|<u>|<s>|<q>|<i>", said)
    assert said.count("<script") == 1 and not re.search(r"(src|href)=.?(https?:|//)", said)


# --- the world

def get(listener, path="/", head=""):
    """Status and body of a GET."""
    answer = exchange(listener, raw(f"GET {path} HTTP/1.1\nHost: pi.lan:3001\n{head}"))
    return status(answer), answer.partition(b"\r\n\r\n")[2].decode()


def seen_everywhere(listener):
    """As if it listened on all addresses."""
    listener.pages.own_url = functools.partial(sb.own_url, "::", listener.port, "")


def publish(listener, state=PLAYING, item=SONG, changes=0, **fields):
    change = sb.Change(state, STOPPED, sb.parse_item(item), 0, "Living Room", "m1", "webhook")
    listener.board.publish(status_of(known_player(state, item), **fields), [change] * changes)


def events(listener):
    """An open /events, after its first comment."""
    connection = connect(listener)
    connection.sendall(raw("GET /events HTTP/1.1\nHost: x\n"))
    head = b""
    while b": StreamerBrainz\n\n" not in head:
        head += connection.recv(65536)
    assert b"Content-Type: text/event-stream" in head
    return connection


def test_the_page_shows_what_plays_and_no_secret(listener, tmp_path):
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef")
    file.chmod(0o600)
    listener.gate.secret, listener.pages.has_secret = sb.SecretFile("-webhook-secret-file", str(file)), True
    publish(listener)
    assert get(listener)[0] == 401
    seen_everywhere(listener)
    code, said = get(listener, "/?token=0123456789abcdef")
    assert code == 200 and "Karma Police" in said and "http://pi.lan:3001/webhooks/plex" in said and "0123456789abcdef" not in said
    listener.board.brought = ("101", THUMB)
    assert '<img alt="" data-src="cover?key=101">' in get(listener, "/?token=0123456789abcdef")[1]      # the script adds the secret
    answer = exchange(listener, raw("GET /?token=0123456789abcdef HTTP/1.1\nHost: x\n"))
    assert b"\r\nContent-Security-Policy: default-src 'none'; " in answer and b"unsafe" not in answer


@pytest.mark.parametrize("host", ["localhost:3001", "127.0.0.1", "[::1]:3001", "evil\"><script>", "a b", ""])
def test_the_url_to_paste_is_never_localhost_nor_what_a_stranger_says(listener, host):
    seen_everywhere(listener)
    said = exchange(listener, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()).decode()
    url = re.search('data-plain="([^"]*)"', said)[1]
    assert re.fullmatch(rf"http://[\w.-]+:{listener.port}/webhooks/plex", url) and "localhost" not in url and "//127." not in url


def test_now_and_figures_are_served(listener):
    publish(listener, has_server=True, looks={"ok": 1})
    code, said = get(listener, "/now")
    assert code == 200 and json.loads(said)["title"] == "Karma Police"
    code, said = get(listener, "/metrics")
    assert code == 200 and "\nplex_up 1\n" in "\n" + said


def test_a_stalled_main_loop_and_a_tracker_that_is_gone_are_503(listener, tmp_path):
    listener.board.status = sb.Status(busy_since=time.monotonic() - 60)
    store = sb.Tracker(str(tmp_path / "gone.db"), create=True)
    listener.pages.glance = functools.partial(sb.glance, store)
    (tmp_path / "gone.db").unlink()
    code, said = get(listener, "/healthz")
    assert code == 503 and [reason.split(" ")[0] for reason in json.loads(said)["reasons"]] == ["-tracker-db:", "the"]


def test_the_picture_is_the_webhooks_else_the_servers_without_its_token(listener, token_file):
    jpeg = b"\xff\xd8\xff" + b"x" * 1000
    asked = []

    def answer(connection):
        asked.append(1)
        http_answer(jpeg)(connection)
    assert get(listener, "/cover")[0] == 404
    publish(listener)
    assert get(listener, "/cover")[0] == 404
    publish(listener, item={**SONG, "thumb": "/library/metadata/1/thumb/2"})
    assert "<img" not in get(listener)[1]                           # nobody to ask
    with RawServer(answer) as server:
        listener.board.plex = sb.PlexServer(server.url, secret_file(token_file).first)
        publish(listener, item={**SONG, "thumb": "/library/metadata/1/thumb/2"})
        for _ in range(2):
            assert exchange(listener, raw("GET /cover?key=101 HTTP/1.1\nHost: x\n")).endswith(jpeg)
        assert len(asked) == 1 and server.requests[0].startswith(b"GET /library/metadata/1/thumb/2 HTTP/1.1\r\n")
        listener.board.brought = ("101", b"\xff\xd8\xffwebhook")
        assert exchange(listener, raw("GET /cover HTTP/1.1\nHost: x\n")).endswith(b"webhook")


@pytest.mark.parametrize("broken", [http_answer(b"\xff\xd8\xffhalf", length=5000), http_answer(b""), http_answer(b"", "500 Oh")])
def test_a_picture_that_is_cut_short_or_missing_is_not_shown_nor_kept_and_asked_for_again_later(listener, token_file, monkeypatch, broken):
    answers = [broken, http_answer(b"\xff\xd8\xffwhole")]
    publish(listener, item={**SONG, "thumb": "/library/metadata/1/thumb/2"})
    with RawServer(lambda connection: answers[0](connection)) as server:
        listener.board.plex = sb.PlexServer(server.url, secret_file(token_file).first)
        for _ in range(2):
            assert get(listener, "/cover")[0] == 404
        assert len(server.requests) == 1                            # nobody waits for it twice
        answers.pop(0)
        listener.board.retry_at = 0.0                              # the pause is over
        assert exchange(listener, raw("GET /cover HTTP/1.1\nHost: x\n")).endswith(b"whole")


def test_pictures_of_a_server_that_hangs_hold_their_threads_for_one_answers_time_and_then_none(listener, token_file, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.4)
    publish(listener, item={**SONG, "thumb": "/library/metadata/1/thumb/2"})
    with RawServer(hang) as server:
        listener.board.plex = sb.PlexServer(server.url, secret_file(token_file).first)
        began, codes = time.monotonic(), []
        threads = [threading.Thread(target=lambda: codes.append(get(listener, "/cover")[0])) for _ in range(70)]
        for work in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                work(thread)
    assert codes == [404] * 70 and time.monotonic() - began < 2.0 and len(server.requests) == 1


def test_events_come_as_they_are_reported_and_sixteen_may_listen(listener):
    streams = [events(listener) for _ in range(sb.MAX_STREAMS)]
    assert get(listener, "/events")[0] == 503 and get(listener, "/now")[0] == 200
    publish(listener, changes=1)
    for stream in streams:
        event = stream.recv(65536).decode()
        assert event.startswith("event: change\ndata: {") and json.loads(event.splitlines()[1][6:])["title"] == "Karma Police"
        stream.close()
    eventually(lambda: (publish(listener, changes=1), not listener.board.streams)[1])      # they are gone, and their room is free
    events(listener).close()


def test_a_listener_to_events_that_does_not_read_is_dropped(listener, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.3)
    stream = events(listener)
    huge = {**SONG, "title": "x" * 400, "parentTitle": "y" * 400}
    for _ in range(2000):
        publish(listener, item=huge, changes=5)
        if not listener.board.streams:
            break
        time.sleep(0.001)
    eventually(lambda: not listener.board.streams)
    stream.close()


def test_events_are_kept_alive(listener, monkeypatch):
    monkeypatch.setattr(sb, "EVENT_ALIVE_S", 0.05)
    stream = events(listener)
    assert stream.recv(100).startswith(b": alive\n\n")
    stream.close()


@pytest.mark.parametrize("unread, left", [(1, 1), (19, 19), (20, 20), (21, 20), (22, 20), (100, 20)])
def test_a_listener_to_events_that_leaves_more_than_twenty_unread_is_dropped(unread, left, monkeypatch):
    monkeypatch.setattr(sb, "EVENT_ALIVE_S", 0.01)
    board = sb.Board()
    stream = board.events()
    assert next(stream) == b": StreamerBrainz\n\n"
    for _ in range(unread):
        board.publish(sb.Status(), [change()])
    events = [event.partition(b"\n")[0] for event in itertools.islice(stream, left + 1)]
    assert events == [b"event: change"] * left + [b": alive"] * (unread <= 20)          # or the stream has ended
    stream.close()
    assert board.streams == []


def test_a_change_is_on_the_page_without_a_reload_in_a_real_browser(plex, token_file, lines, monkeypatch):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    asked, show_page, shown = [], sb.Pages.page, threading.Event()

    def noting(self, *words):
        asked.append(self.board.status.player.item.title if self.board.status.player.item else "")
        return show_page(self, *words)

    def late(self, *_):
        """No picture, and that late: until it comes the page is not complete."""
        shown.wait(20)
        raise sb.WebhookError(404, "No.")
    monkeypatch.setattr(sb.Pages, "page", noting)
    monkeypatch.setattr(sb.Pages, "cover", late)
    plex.turn(PLAYING, {key: str(value) for key, value in {**EVIL, "thumb": "/library/metadata/1/thumb/2"}.items()})
    with Running(plex, token_file, poll=0.2) as daemon:
        eventually(lambda: daemon.board.status.player and daemon.board.status.player.item)
        browser = subprocess.Popen([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--timeout=20000", "--dump-dom",
                                    f"http://127.0.0.1:{daemon.port}/"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            eventually(lambda: daemon.board.streams, 30)
            plex.turn(PLAYING, {key: str(value) for key, value in OTHER.items()})
            daemon.send("media.play", {key: str(value) for key, value in OTHER.items()})
            eventually(lambda: "No Surprises" in asked)    # by the event: of itself it asks each 30 s
            time.sleep(0.3)                                # for the browser to lay it out: it does not tell
            shown.set()
            dom = browser.communicate(timeout=40)[0]
        finally:
            browser.kill()
    assert "<h1><bdi>No Surprises</bdi></h1>" in dom and "<title>\u25b6\ufe0e No Surprises" in dom and "alert(1)&lt;/script&gt;" in dom
    assert '<button id="copy">' in dom                     # the script ran: it is no longer hidden


def test_a_page_whose_daemon_is_gone_says_so_and_its_clock_stops(listener):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    shown, gone, show_page = threading.Event(), threading.Event(), listener.pages.paths["/"]

    def page(*words):
        if gone.is_set():
            raise ConnectionResetError                     # as if nobody were there
        return show_page(*words)

    def late(*_):
        """No picture, and that late: until it comes the page is not complete."""
        shown.wait(20)
        raise sb.WebhookError(404, "No.")
    listener.pages.paths |= {"/": page, "/cover": late}
    listener.board.brought = ("101", THUMB)
    listener.board.publish(status_of(known_player()._replace(view_offset=0, moved_at=time.monotonic())), [])
    browser = subprocess.Popen([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--timeout=20000", "--dump-dom",
                                f"http://127.0.0.1:{listener.port}/"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        eventually(lambda: listener.board.streams, 30)
        gone.set()
        listener.board.streams[0].put(None)                # the stream of events ends
        time.sleep(4)
        shown.set()
        dom = browser.communicate(timeout=40)[0]
    finally:
        browser.kill()
    assert '<p id="lost" class="banner">Connection lost' in dom and '<body class="lost">' in dom
    assert re.search(r'id="position">0:0[0-2]<', dom)      # of some six seconds


# === Listener ===

def test_tokens_come_back_evenly_and_never_more_than_a_minutes_worth():
    assert sb.spend(0.0, 30.0, 100) == (49.0, 0.0) and sb.spend(0.0, 1e9, 100) == (99, 0.0)
    tokens, wait_s = sb.spend(0.5, 0.0, 60)
    assert (tokens, wait_s) == (0.5, 0.5)
    passed, tokens = 0, 60.0
    for _ in range(600):                                            # ten a second for a minute
        tokens, wait_s = sb.spend(tokens, 0.1, 60)
        passed += not wait_s
    assert passed == 120 - 1 or passed == 120


# --- the world

SECRET = "0123456789abcdef"


def webhook_secret(folder):
    file = folder / "webhook-secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    return sb.SecretFile("-webhook-secret-file", str(file))


HELP = b"Nothing is here. Plex sends its webhooks to /webhooks/plex.\n"


def test_a_webhook_is_answered_and_in_the_inbox(listener):
    answer = exchange(listener, post())
    assert status(answer) == 200 and b"\r\nServer: StreamerBrainz/" + sb.VERSION.encode() + b"\r\n" in answer
    assert listener.inbox.get(timeout=5) == sb.parse_webhook(MULTIPART, BODY)[0]
    assert listener.board.brought == ("101", THUMB)


def test_only_the_latest_picture_of_our_player_is_kept(listener):
    for metadata, uuid, thumb in ((SONG, "m1", b"one"), (OTHER, "m1", b"two"), (SONG, "m2", b"three"), (OTHER, "m1", b"")):
        content_type, body = sb.encode_webhook(payload(uuid=uuid, metadata=metadata), thumb)
        assert status(exchange(listener, post(body, content_type))) == 200
    assert listener.board.brought == ("102", b"two")


@pytest.mark.parametrize("request_, expected, body", [
    pytest.param(post(), 200, b"", id="a webhook"),
    pytest.param(post(path="/webhooks/plex?token=x"), 200, b"", id="a query"),
    pytest.param(post(payload(), "application/json"), 200, b"", id="JSON"),
    pytest.param(raw(POST + CHUNKED, chunked(BODY, 100)), 200, b"", id="chunked"),
    pytest.param(raw(POST + CHUNKED, chunked(BODY, 7, b";x=y", b"A: b\r\n")), 200, b"", id="chunk extensions and trailers"),
    pytest.param(raw("GET /healthz HTTP/1.1\nHost: x\n"), 200,
                 b'{"status": "ok", "version": "%s", "reasons": [], "degraded": []}\n' % sb.VERSION.encode(), id="healthz"),
    pytest.param(raw("HEAD /healthz HTTP/1.1\nHost: x\n"), 200, b"", id="HEAD"),
    pytest.param(raw("GET /healthz HTTP/1.0\n"), 200, None, id="HTTP/1.0"),
    pytest.param(post(b"{}", "application/json"), 400, b"The payload is not a Plex webhook: it has no event.\n", id="no webhook"),
    pytest.param(post(length=len(BODY) + 1), 400, b"The body is shorter than its Content-Length.\n", id="cut short"),
    pytest.param(post(length="x"), 400, b"The Content-Length is not a number.\n", id="no number"),
    pytest.param(post(length="-5"), 400, b"The Content-Length is not a number.\n", id="negative"),
    pytest.param(post(head="Content-Length: 7\r\n"), 400, b"The Content-Length is not a number.\n", id="two lengths"),
    pytest.param(post(head=CHUNKED), 400, b"A body is either chunked or has a Content-Length.\n", id="smuggling"),
    pytest.param(raw(POST + "Transfer-Encoding: gzip\n"), 400, b"A body is either chunked or has a Content-Length.\n", id="a coding"),
    pytest.param(raw(POST + CHUNKED, b"5\r\nab"), 400, b"A chunk of the body is cut short, or longer than its size.\n", id="a chunk cut short"),
    pytest.param(raw(POST + CHUNKED, b"2\r\nabc\r\n"), 400, b"A chunk of the body is cut short, or longer than its size.\n", id="a chunk too long"),
    pytest.param(raw(POST + CHUNKED, b"-1\r\n"), 400, b"A chunk of the body has no size.\n", id="a chunk without size"),
    pytest.param(raw(POST + CHUNKED, b"0\r\n" + b"A: b\r\n" * 101), 400, b"The chunked body has too many trailers.\n", id="trailers"),
    pytest.param(raw(POST + CHUNKED, b"fffffff\r\n"), 413, b"The body is larger than 8388608 bytes.\n", id="chunks too large"),
    pytest.param(post(path="/"), 405, b"Only GET, HEAD is answered here. Plex sends its webhooks to /webhooks/plex.\n", id="/"),
    pytest.param(post(path="/webhooks/plex/"), 404, HELP, id="a slash too many"),
    pytest.param(raw("GET /metric HTTP/1.1\nHost: x\n"), 404, HELP, id="metric"),
    pytest.param(raw("GET /webhooks/plex HTTP/1.1\nHost: x\n"), 405, b"Only POST is answered here.\n", id="GET"),
    pytest.param(post(method="PUT"), 405, b"Only POST is answered here.\n", id="PUT"),
    pytest.param(post(method="FROB"), 405, b"Only POST is answered here.\n", id="a method unheard of"),
    pytest.param(post(path="/healthz"), 405, b"Only GET, HEAD is answered here.\n", id="POST healthz"),
    pytest.param(raw(POST), 411, b"The request has no Content-Length.\n", id="no length"),
    pytest.param(post(length=8 * 2 ** 20 + 1), 413, b"The body is larger than 8388608 bytes.\n", id="too large"),
    pytest.param(post(b"x" * 2_000_000, "application/json"), 413, b"The payload is larger than 1048576 bytes.\n", id="a large payload"),
    pytest.param(post(b"a=b", "application/x-www-form-urlencoded"), 415,
                 b"A Plex webhook is multipart/form-data; this is something else.\n", id="a form"),
    pytest.param(raw("GET / HTTP/3.0\n"), 400, b"This is not an HTTP request that we understand.\n", id="HTTP/3.0"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, None, id="TLS"),
    pytest.param(raw("GET /" + "a" * 70000 + " HTTP/1.1\n"), 431, None, id="a long path"),
    pytest.param(raw("GET / HTTP/1.1\n" + ("A: " + "b" * 30000 + "\n") * 2), 431, None, id="a long head"),
    pytest.param(raw("GET http://pi:3001/healthz?x HTTP/1.1\nHost: x\n"), 200, None, id="absolute form"),
    pytest.param(raw("GET /healthz HTTP/1.1\nX Y: z\nContent-Length: 5\n", b"GET /"), 400, b"A line of the request's head is not a header.\n",
                 id="splitting"),
    pytest.param(raw(POST + "Transfer-Encoding: chunked\nTransfer-Encoding: gzip\n"), 400, b"A body is either chunked or has a Content-Length.\n", id="two codings"),
    *(pytest.param(post(content_type="multipart/form-data; " + parameters), 400, None, id=parameters[:30]) for parameters in (
        "boundary*=idna''bb", "boundary*=a\0b''bb", "boundary*=x; boundary*0=y", "boundary*" + "9" * 250 + "=bb", ";" * 5000,
        '"' + ";" * 5000)),
    pytest.param(post(b"--B\r\nContent-Disposition: form-data; name*=x; name*0=y\r\n\r\n\r\n--B--", "multipart/form-data; boundary=B"), 400, None,
                 id="a part's name"),
    pytest.param(raw("GET / HTTP/1.1\n" + "A: b\n" * 200), 431, None, id="many headers"),
    pytest.param(b"", None, b"", id="nothing"),
    *(pytest.param(damaged, 400, None, id=f"a bare CR {number}") for number, damaged in enumerate((
        b"GET /healthz\r HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /healthz HTTP/1.1\r\r\nHost: x\r\n\r\n", b"\rGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\rOrigin: y\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\rHost: x\r\n\r\n",
        raw(POST, b"").replace(b"\r\n\r\n", b"\r\nA: b\r\n\r\r\n"), post(head="X: a\rContent-Length: 3\r\n"), post(head="Transfer-Encoding\r: chunked\r\n"),
        raw(POST + CHUNKED, b"5\rx\r\nabcde\r\n0\r\n\r\n"), raw(POST + CHUNKED, b"5;a=\r\r\nabcde\r\n0\r\n\r\n"), raw(POST + CHUNKED, b"5\r\nabcde\r\r\n0\r\n\r\n"),
        raw(POST + CHUNKED, b"0\r\nA: b\rC: d\r\n\r\n"), raw(POST + CHUNKED, b"0\r\n\r\r\n")))),
    *(pytest.param(blank + raw("GET /healthz HTTP/1.1\nHost: x\n"), 200, None, id=f"blank lines {number}") for number, blank in enumerate((
        b"\r\n", b"\n", b"\r\n" * 5, b"\n\r\n\n"))),
    pytest.param(b"\r\n" * 9000, 431, None, id="blank lines for ever"), pytest.param(b"\r\n", None, b"", id="a blank line alone"),
    pytest.param(raw(POST + CHUNKED, b"5;" + b"a" * 2000 + b"\r\nabcde\r\n0\r\n\r\n"), 400, b"A chunk of the body has no size.\n", id="a long extension"),
    pytest.param(post(b'{"event": "x", "y": [' + b"0," * 20001 + b"0]}", "application/json"), 400, b"The payload is no JSON object, or has more than 20000 values.\n", id="many values"),
])
def test_each_request_has_its_status_and_a_sentence_that_helps(listener, request_, expected, body):
    answer = exchange(listener, request_)
    assert status(answer) == expected
    if body is not None and answer:
        assert answer.partition(b"\r\n\r\n")[2] == body
    if expected == 405:
        assert b"\r\nAllow: " in answer


def test_requests_in_one_connection_are_answered_in_turn(listener):
    both = post() + raw("GET /nowhere HTTP/1.1\nHost: x\n") + post() + raw("GET /healthz HTTP/1.1\nHost: x\nConnection: close\n")
    answer = exchange(listener, both)
    assert [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200, 404, 200, 200]


def test_a_body_is_asked_for_when_the_sender_waits_for_it(listener):
    with connect(listener) as connection:
        connection.sendall(post(b"", length=len(BODY), head="Expect: 100-continue\r\n"))
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert status(connection.recv(4096)) == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(listener):
    with connect(listener) as connection:
        connection.sendall(post(b"", length=10 ** 9, head="Expect: 100-continue\r\n"))
        assert status(connection.recv(4096)) == 413


def test_a_refusal_arrives_although_the_sender_is_still_sending(listener, monkeypatch):
    monkeypatch.setattr(sb, "LINGER_S", 60.0)
    with connect(listener) as connection:
        connection.sendall(post(b"", length=10 ** 9))
        for _ in range(64):                                # MB: far more than the buffers of two sockets hold
            connection.sendall(bytes(2 ** 20))
        assert status(connection.recv(65536)) == 413


def test_a_large_body_is_read_whole(listener):
    thumb = random.Random(1).randbytes(3_000_000)
    content_type, body = sb.encode_webhook(payload(), thumb)
    for request_ in (post(body, content_type), raw(f"POST /webhooks/plex HTTP/1.1\nContent-Type: {content_type}\n{CHUNKED}", chunked(body, 65536))):
        listener.board.brought = ("", b"")
        assert status(exchange(listener, request_)) == 200
        assert eventually(lambda: listener.board.brought[1]) == thumb


def test_a_refusal_gives_no_cookie_of_who_asked_before_on_the_same_connection(listener, tmp_path):
    listener.gate.secret, listener.pages.has_secret = webhook_secret(tmp_path), True
    ask = "GET /{} HTTP/1.1\nHost: x\nAccept: text/html\n"
    with connect(listener) as connection:                                       # of a proxy
        connection.sendall(raw(ask.format(f"?token={SECRET}")) + raw(ask.format("") + "Connection: close\n"))
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    first, _, second = answers.partition(b"HTTP/1.1 401 ")
    assert b"Set-Cookie: " in first and second and b"Set-Cookie" not in second


def test_a_webhook_to_a_wrong_path_is_told_the_right_one_and_warned_of_once_a_minute(lines, listener):
    watcher = watcher_alone()
    for path, code in (("/", 405), ("/webhooks/plex/", 404), ("/webhook", 404), ("/now", 405)):
        answer = exchange(listener, post(path=path, head="User-Agent: PlexMediaServer/1.41.3\r\n"))
        assert status(answer) == code and (path == "/now" or b"Plex sends its webhooks to /webhooks/plex.\n" in answer)
        refused = listener.inbox.get(timeout=5)
        assert refused.is_webhook
        watcher.refuse(refused)
    assert [each for each in lines if each.startswith("<4>")] == [
        f"<4>a Plex server sends webhooks to a wrong path; the URL in Plex must end in /webhooks/plex path={path} address=127.0.0.1"
        for path in ("/", "/webhooks/plex/")]                                   # one for each status
    exchange(listener, raw("GET /webhooks/plex HTTP/1.1\nHost: x\n"))          # a person looks what is there
    assert not listener.inbox.get(timeout=5).is_webhook


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_address_of_ipv4_is_written_as_such_on_a_socket_for_both():
    with Site("::") as site:
        exchange(site, post(path="/wrong"))
        assert site.inbox.get(timeout=5).address == "127.0.0.1"


def test_what_is_refused_is_told_of_without_its_query(listener):
    exchange(listener, post(path="/plex?token=x", head="User-Agent: PlexMediaServer/1.41.3\r\n"))
    exchange(listener, post(path="/plex", head="User-Agent: curl\r\n"))
    assert [listener.inbox.get(timeout=5) for _ in range(2)] == [
        sb.Refused(404, HELP.decode().strip(), "/plex", "127.0.0.1", from_plex) for from_plex in (True, False)]


def test_senders_that_drip_large_bodies_do_not_keep_a_large_thumb_away(listener, monkeypatch):
    monkeypatch.setattr(sb, "LARGE_S", 0.2)
    monkeypatch.setattr(sb, "REQUEST_S", 60.0)
    content_type, body = sb.encode_webhook(payload(), b"x" * 300_000)
    chunks = raw(POST + CHUNKED, b"30000\r\n" + b"x" * 1000)
    slow = [connect(listener) for _ in range(4 * sb.MAX_LARGE_BODIES)]
    for number, connection in enumerate(slow):
        connection.sendall((post(b"x" * 150_000, length=200_000), post(b"x", length=200_000), chunks)[number % 3])
    assert status(exchange(listener, post(body, content_type))) == 200
    for connection in slow:
        connection.close()


def test_too_much_that_waits_is_the_only_503(listener, monkeypatch):
    for _ in range(sb.MAX_INBOX - 2):
        listener.inbox.put(None)
    answers = [exchange(listener, post()) for _ in range(3)]
    assert [status(answer) for answer in answers] == [200, 200, 503]
    assert b"\r\nRetry-After: 5\r\n" in answers[2]


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_sender_that_drips_is_dropped_and_the_others_keep_their_answers(listener, monkeypatch, part):
    monkeypatch.setattr(sb, "HEAD_S" if part == "head" else "REQUEST_S", 0.3)
    monkeypatch.setattr(sb, "LINGER_S", 0.1)
    with connect(listener) as slow:
        slow.sendall(post()[:100 if part == "head" else -100])
        assert status(exchange(listener, post())) == 200
        with pytest.raises(OSError):
            for _ in range(1000):                          # a byte each 20 ms: no wait for the next one is long
                slow.sendall(b"x")
                time.sleep(0.02)
    eventually(lambda: not listener.taken)


def test_an_idle_connection_is_closed(listener, monkeypatch):
    monkeypatch.setattr(sb, "KEEP_ALIVE_S", 0.1)
    with connect(listener) as connection:
        assert connection.recv(1) == b""


def connect_from(address, listener):
    """A connection from another address of this machine: another sender."""
    return socket.create_connection(("127.0.0.1", listener.port), timeout=10, source_address=(address, 0))


def ask_from(address, listener, request_):
    """The answer to a request from there, and how long it took."""
    began = time.monotonic()
    with connect_from(address, listener) as connection:
        connection.sendall(request_)
        return status(connection.recv(65536)), time.monotonic() - began


@pytest.mark.parametrize("no_headers", [None, {}])
def test_a_request_of_http_0_9_is_answered_and_ends_nothing(tmp_path, monkeypatch, no_headers):
    original = sb.http.server.BaseHTTPRequestHandler.parse_request

    def parse_request(handler):
        parsed = original(handler)
        if parsed and handler.request_version == "HTTP/0.9" and no_headers is not None:
            handler.headers = no_headers                   # as some Pythons do
        return parsed
    monkeypatch.setattr(sb.http.server.BaseHTTPRequestHandler, "parse_request", parse_request)
    (tmp_path / "secret").write_text("abc")
    (tmp_path / "secret").chmod(0o600)
    for gate in (sb.Gate(), sb.Gate(sb.SecretFile("-webhook-secret-file", str(tmp_path / "secret")))):
        with Site(gate=gate) as site:
            for path, word in (("/healthz", b'"reasons"'), ("/now", b"state"), ("/", b"<html"), ("/no", b"Nothing is here"),
                               ("/webhooks/plex", b"Only POST")):
                answer = exchange(site, f"GET {path}\r\n\r\n".encode())
                assert word in answer or (gate.secret and b"The secret is missing" in answer), answer
            bugs = [each for each in iter(lambda: site.inbox.get() if site.inbox.qsize() else None, None) if isinstance(each, BaseException)]
            assert not bugs


def test_a_head_that_was_read_ahead_with_a_body_is_bounded_as_any_other(listener, monkeypatch):
    monkeypatch.setattr(sb.io, "BufferedReader", EagerReader)
    content_type, body = sb.encode_webhook(payload(), THUMB * 20)
    answers = exchange(listener, post(body, content_type) + raw(f"GET /healthz HTTP/1.1\nHost: x\nA: {'x' * 40_000}\n"))
    assert re.findall(rb"^HTTP/1.1 (\d+)", answers, re.M) in ([b"200", b"431"], [b"200", b"400"])


def test_threads_are_bounded_and_the_connection_one_too_many_waits(listener, monkeypatch):
    monkeypatch.setattr(sb, "KEEP_ALIVE_S", 1.0)
    before = threading.active_count()
    idle = [connect_from(f"127.0.0.{n % 5 + 2}", listener) for n in range(sb.MAX_CONNECTIONS + 20)]
    eventually(lambda: listener.taken == sb.MAX_CONNECTIONS and len(listener.server.parked) == 20)
    assert threading.active_count() <= before + sb.MAX_CONNECTIONS
    assert status(exchange(listener, post())) == 200
    for connection in idle:
        connection.close()


def test_a_thousand_slow_connections_of_one_sender_keep_no_other_out(listener):
    slow, answers = [], []
    for n in range(1000):
        slow.append(connect(listener))
        slow[-1].sendall(post()[:n % 300])                 # nothing yet, half a head, half a body
        if n % 50 == 49:
            answers.append(ask_from(f"127.0.0.{n // 50 + 2}", listener, post()))
    assert all(code == 200 and took_s < 0.1 for code, took_s in answers), answers
    assert collections.Counter(listener.server.serving.values())["127.0.0.1"] <= sb.MAX_OF_ONE
    assert len(listener.server.parked) <= sb.MAX_PARKED
    for connection in slow:
        connection.close()
    assert status(exchange(listener, post())) == 200       # what was parked and has gone holds nobody up


def test_where_too_many_wait_the_newest_of_the_one_with_most_is_closed(listener, monkeypatch):
    monkeypatch.setattr(sb, "MAX_PARKED", 10)
    many = [connect_from("127.0.0.2", listener) for _ in range(sb.MAX_OF_ONE + 10)]
    eventually(lambda: len(listener.server.parked) == 10)
    few = [connect_from("127.0.0.3", listener) for _ in range(sb.MAX_OF_ONE + 1)]
    assert many[-1].recv(1) == b"" and len(listener.server.parked) == 10
    assert [who for who, _ in listener.server.parked.values()] == ["127.0.0.2"] * 9 + ["127.0.0.3"]
    for connection in many + few:
        connection.close()


def test_idle_connections_give_way_to_those_of_their_sender_that_wait(listener):
    def kept(connection):
        connection.sendall(post())
        return b"Connection: close" not in connection.recv(65536)
    idle = [connect(listener) for _ in range(sb.MAX_OF_ONE)]
    assert all(kept(connection) for connection in idle)    # 8 of them may stay for 5 s, the others for 1 s
    began = time.monotonic()
    answers = [exchange(listener, post()) for _ in range(5)]
    assert [status(answer) for answer in answers] == [200] * 5 and time.monotonic() - began < 2.0
    for connection in idle:
        connection.close()


def test_a_burst_over_a_hundred_connections_of_one_sender_is_answered_fast(listener):
    def send_five(connection):
        for _ in range(5):
            connection.sendall(post())
            answer = connection.recv(65536)
            codes.append(status(answer))
            if b"Connection: close" in answer:
                connection.close()
                connection = connect(listener)
        connection.close()
    codes, began = [], time.monotonic()
    threads = [threading.Thread(target=send_five, args=(connect(listener),)) for _ in range(100)]
    for work in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            work(thread)
    assert codes == [200] * 500 and time.monotonic() - began < 5.0


def test_a_connection_that_is_reset_anywhere_in_a_request_is_no_bug(listener):
    whole = post()
    for end in (*range(1, 30), *range(30, len(whole), 37)):
        with connect(listener) as connection:
            connection.sendall(whole[:end])
            reset(connection)
    assert status(exchange(listener, whole)) == 200
    eventually(lambda: not listener.taken)
    while not listener.inbox.empty():
        assert not isinstance(listener.inbox.get(), BaseException)


def test_a_bug_in_a_request_thread_ends_the_process_and_a_broken_connection_does_not(listener, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError("ours")
    with connect(listener) as connection:
        connection.sendall(post()[:50])
        reset(connection)
    assert listener.inbox.empty()
    monkeypatch.setattr(sb, "parse_webhook", bug)
    exchange(listener, post())
    assert repr(listener.inbox.get(timeout=5)) == "ZeroDivisionError('ours')"


@pytest.mark.parametrize("seed", range(3))
def test_mutated_requests_over_a_socket_are_the_senders_fault(listener, seed):
    rng, whole = random.Random(seed), post(sb.encode_webhook(payload(), THUMB[:30])[1])
    with connect(listener) as alive:
        for _ in range(150):
            request_ = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(request_))
                request_[at:at + rng.randrange(5)] = rng.choice([b"", b"\0", b"\r\n", b"\xff", b":", b" ", b"chunked", b"9" * 30])
            got = status(exchange(listener, bytes(request_)))
            assert got is None or got < 500, bytes(request_)
        alive.sendall(post())
        assert status(alive.recv(4096)) == 200
    while not listener.inbox.empty():
        assert isinstance(listener.inbox.get(), sb.Webhook | sb.Refused)


@pytest.mark.parametrize("host, addresses", [("", ["127.0.0.1", "::1"]), ("127.0.0.1", ["127.0.0.1"]), ("::1", ["::1"]), ("localhost", ["localhost"])])
def test_it_listens_on_ipv4_and_ipv6(host, addresses):
    if "::1" in addresses and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Site(host) as listener:
        for address in addresses:
            connection = http.client.HTTPConnection(address, listener.port, timeout=5)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()


def test_where_all_threads_are_taken_a_connection_that_had_its_second_ends_with_its_answer(monkeypatch):
    monkeypatch.setattr(sb, "MAX_CONNECTIONS", 2)
    now = [1000.0]
    monkeypatch.setattr(sb.time, "monotonic", lambda: now[0])

    def kept(connection):
        connection.sendall(raw("GET /healthz HTTP/1.1\nHost: x\n"))
        answer = connection.recv(65536)
        assert status(answer) == 200
        return b"\r\nConnection: close\r\n" not in answer
    with Site() as listener, connect(listener) as one:
        assert kept(one)
        now[0] += 1.5
        assert kept(one)                                   # nobody else is there
        with connect(listener) as two:
            assert kept(two)
            now[0] += 0.9
            assert kept(two)
            now[0] += 0.2
            assert not kept(two) and two.recv(1) == b""


@pytest.mark.parametrize("head, expected", [
    ("", 200), ("Sec-Fetch-Site: none\r\n", 200), ("Sec-Fetch-Site: same-origin\r\n", 200), ("Origin: null\r\n", 403), ("Origin:\r\n", 403),
    ("origin: http://x\r\n", 403), ("Origin: http://evil.example\r\n", 403), ("Sec-Fetch-Site: cross-site\r\n", 403),
    ("Sec-Fetch-Site: same-site\r\n", 403), ("Sec-Fetch-Site: x\r\n", 403)])
@pytest.mark.parametrize("with_secret", [False, True])
def test_no_website_sends_webhooks(listener, tmp_path, head, expected, with_secret):
    if with_secret:
        listener.gate.secret = webhook_secret(tmp_path)
    answer = exchange(listener, post(path=f"/webhooks/plex?token={SECRET}", head=head))
    assert status(answer) == expected and b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in answer
    assert expected == 200 or answer.endswith(b"A website may not send webhooks; Plex sends them without an Origin.\n")
    assert isinstance(listener.inbox.get(timeout=5), sb.Webhook if expected == 200 else sb.Refused)


@pytest.mark.parametrize("host, foreign", [
    ("", False), ("pi", False), ("localhost:3001", False), ("LOCALHOST", False), ("192.168.1.7", False), ("192.168.1.7:3001", False), ("[::1]", False),
    ("[fd00::1]:3001", False), ("[::ffff:192.168.1.7]:80", False), ("pi.local", False), ("pi.lan:3001", False), ("PI.Home.", False), ("a.b.internal:1", False),
    ("pi.home.arpa.:3001", False), ("mine.example.org", False), ("Mine.Example.ORG.:3001", False), ("evil.example", True), ("evil.example:3001", True),
    ("evil.example.", True), ("EVIL.EXAMPLE", True), ("local.evil.example", True), ("evil.lan.example", True), ("evillocal.example", True), ("home.arpa", True),
    ("192.168.1.7.evil.example", True), ("127.1", True), ("0x7f.0.0.1", True), ("192.168.1", True), ("[evil.example]", True), ("localhost.evil.example", True),
    ("pi.lan@evil.example", True), ("evil.example:80:80", True), ("a.local:x", True), ("x.mine.example.org", True), ("evil.example/.lan", False)])
def test_a_name_that_a_website_may_have_shows_nothing(listener, monkeypatch, tmp_path, host, foreign):
    assert sb.is_foreign(host, "mine.example.org") == foreign
    monkeypatch.setattr(sb.socket, "gethostname", lambda: "mine.example.org")
    line = f"Host: {host}\r\n" if host else ""
    for method, path in (("GET", "/"), ("HEAD", "/now"), ("GET", "/healthz")):
        answer = exchange(listener, f"{method} {path} HTTP/1.1\r\n{line}Connection: close\r\n\r\n".encode())
        assert status(answer) == (421 if foreign else 200) and b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in answer
    assert status(exchange(listener, post().replace(b"Host: x", b"Host: " + host.encode()))) == 200      # Plex may know us by any name
    listener.gate.secret = webhook_secret(tmp_path)                 # which a website does not know
    assert status(exchange(listener, f"GET /?token={SECRET} HTTP/1.1\r\n{line}Connection: close\r\n\r\n".encode())) == 200


def test_of_two_hosts_none_may_be_foreign(listener):
    assert get(listener, "/now", "Host: evil.example\n")[0] == 421 and get(listener, "/now", "Host: pi\n")[0] == 200


ATTACK = """<img src="{url}/cover"><script>
const url = "{url}", form = new FormData();
form.append("payload", '{payload}');
const post = more => fetch(url + "/webhooks/plex", {{method: "POST", body: form, ...more}}), get = more => fetch(url + "/now", more);
const asks = [() => post({{mode: "no-cors"}}), () => post({{referrerPolicy: "no-referrer"}}), () => get(), () => get({{mode: "no-cors"}})];
onload = async () => {{
  const got = [document.querySelector("img").naturalWidth];
  for (const ask of asks) {{ try {{ got.push((await ask()).type) }} catch (e) {{ got.push("blocked") }} }}
  await fetch("/" + got.join());
  navigator.sendBeacon(url + "/webhooks/plex", form);
  document.querySelector("form").submit();
}};
</script><form action="{url}/webhooks/plex" method="post" enctype="multipart/form-data"><input name="payload" value="x"></form>"""
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cfc0f01f00"
                    "050001ff89993d1d0000000049454e44ae426082")


def test_no_website_in_a_real_browser_sends_or_reads(listener):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    asked, sent = [], []

    class Website(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.format(url=f"http://127.0.0.1:{listener.port}", payload=payload().decode()).encode())

        def log_message(self, *_):
            pass
    publish(listener)
    listener.board.brought = ("101", PNG)
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Website)) as website:
        port = website.server_address[1]
        browsers = [subprocess.Popen([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
                                      f"http://{host}:{port}/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    for host in ("127.0.0.1", "localhost")]         # of the same site, but another origin; of another site
        try:
            while len(sent) < 8:
                sent += [each for each in [listener.inbox.get(timeout=30)] if each.path != "/favicon.ico"]
            eventually(lambda: len([path for path in asked if "," in path]) == 2)
        finally:
            for browser in browsers:
                browser.kill()
                browser.wait()
    assert [(each.status, each.path) for each in sent] == [(403, "/webhooks/plex")] * 8
    assert [path for path in asked if "," in path] == ["/0,blocked,blocked,blocked,blocked"] * 2


def test_doctors_webhook_arrives_and_changes_nothing(listener):
    content_type, body = sb.encode_webhook(json.dumps({"event": sb.TEST_EVENT}).encode())
    answer = exchange(listener, post(body, content_type))
    assert status(answer) == 200 and answer.endswith(b"streamerbrainz.test has arrived\n") and listener.inbox.empty()


def test_a_secret_with_a_plus_works_as_it_is_and_one_in_a_wrong_place_is_not_logged(tmp_path):
    file = tmp_path / "secret"
    file.write_text("SECRET+of/base64=")
    file.chmod(0o600)
    gate = sb.Gate(sb.SecretFile("-webhook-secret-file", str(file)))
    gate.check("token=SECRET+of/base64=", "::1")
    gate.check("token=SECRET%2Bof%2Fbase64%3D", "::1")
    for path in ("/webhooks/plex%3Ftoken=SECRET+of/base64=", "/webhooks/plex&token=SECRET+of/base64=", "/x;SECRET+of/base64="):
        assert "SECRET" not in gate.plain(path)
    file.write_text("SECRETpath")
    gate.check("token=SECRETpath", "::1")
    for path, shown in (("/webhooks/plex/SECRETpath", "/webhooks/plex..."), ("/webhooks/plex" + "a" * 190 + "SECRETpath", "/webhooks/plex..."),
                        ("/webhooks/plex", "/webhooks/plex"), ("/SECRETpath", "/..."), ("/now", "/now"), ("/nowSECRET", "/..."), ("", "/..."),
                        ("/webhooks/plex%2fSECRET", "/webhooks/plex..."), ("/%77ebhooks/plex/SECRET", "/...")):
        assert gate.plain(path, ["/now"]) == shown


def test_a_secret_is_asked_for_everywhere_but_at_healthz_and_can_be_rotated(plex, tmp_path, lines, home):
    file = tmp_path / "secret"
    done = [call("secret", "-webhook-secret-file", file) for _ in range(2)]
    assert [each.status for each in done] == [0, 0] and stat.S_IMODE(file.stat().st_mode) == 0o600
    new, old = file.read_text().split()
    assert len(new) == 43 and done[0].out.endswith(f":3001/webhooks/plex?token={old}\n") and done[1].out.endswith(f"?token={new}\n")
    assert "The old URL still works." in done[1].err and new not in done[1].err
    assert call("secret").status == 0
    assert stat.S_IMODE((home / ".config/streamerbrainz/webhook-secret").stat().st_mode) == 0o600
    with Running(plex, None, gate=sb.Gate(sb.SecretFile("-webhook-secret-file", str(file)), 100)) as daemon:
        assert [send(daemon, event="media.rate", query=query) for query in (
            f"?token={new}", f"?secret={new}", f"?token={old}", f"?x=1&token={new}", f"?token=wrong&secret={old}", "", "?token=", f"?token={new}x",
            f"?tok={new}", "?token=%ff", "?" + "token=a&" * 900)] == [200] * 5 + [401] * 6
        for path, expected in (("/", 401), ("/nothing", 401), ("/healthz", 200), (f"/?token={new}", 200), (f"/x?token={new}", 404)):
            answer = exchange(daemon, raw(f"GET {path} HTTP/1.1\nHost: x\n"))
            assert status(answer) == expected and (b"\r\nWWW-Authenticate: Secret\r\n" in answer) == (expected == 401)
        eventually(lambda: any("without the secret" in line for line in lines))
        file.write_text(new + "\n")                                 # the old one is withdrawn
        assert [send(daemon, event="media.rate", query=f"?token={each}") for each in (new, old)] == [200, 401]
    said = "\n".join(lines)
    assert len([line for line in lines if line.startswith("<4>") and "without the secret" in line]) == 1 and new not in said and old not in said


def test_a_rate_limit_is_a_minutes_worth_for_each_address(lines):
    with Site("", gate=sb.Gate(None, 3)) as listener:
        answers = [exchange(listener, post(head="X-Forwarded-For: 10.0.0.1\r\n")) for _ in range(4)]
        assert [status(answer) for answer in answers] == [200, 200, 200, 429]
        assert re.search(rb"\r\nRetry-After: (20|1\d)\r\n", answers[3])
        assert status(exchange(listener, raw("GET /healthz HTTP/1.1\r\nHost: x"))) == 200
        assert listener.gate.tokens.keys() == {"127.0.0.1"}


def test_guesses_are_bounded_by_any_method_and_cost_the_right_secret_neither_its_rate_nor_more_than_a_second(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(sb, "GUESS_S", 0.01)
    monkeypatch.setattr(sb.time, "sleep", waited.append)
    with Site(gate=sb.Gate(webhook_secret(tmp_path), 100)) as listener:
        def codes(count, *requests):
            return [status(exchange(listener, requests[n % len(requests)])) for n in range(count)]
        right = post(path=f"/webhooks/plex?token={SECRET}")
        wrong = (post(), post(path="/webhooks/plex?token=x"), raw("GET / HTTP/1.1\nHost: x\n"), raw("HEAD /now?token=y HTTP/1.1\nHost: x\n"),
                 post(path="/nowhere", method="PUT"), post(method="FROB"))
        assert codes(sb.MAX_GUESSES, *wrong) == [401] * sb.MAX_GUESSES
        assert waited == []
        answer = exchange(listener, post())
        assert status(answer) == 429 and re.search(rb"\r\nRetry-After: [12]\r\n", answer) and waited == [0.01]
        assert codes(6, *wrong[:2]) == [429] * 6 and codes(1, right) == [200] and len(waited) == 8
        assert codes(3, raw("GET /healthz HTTP/1.1\nHost: x\n")) == [200] * 3
        assert ask_from("127.0.0.2", listener, post())[0] == 401 and len(waited) == 8      # another sender
        assert listener.gate.tokens["127.0.0.1"][0] == 99           # of the rate only what is Plex's was spent


@pytest.mark.parametrize("address, who", [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3:4:5:6", "20010db800010002"),
                                          ("2001:db8:1:2::1", "20010db800010002"), ("fe80::1%eth0", "fe80000000000000")])
def test_a_sender_is_an_ipv4_address_or_a_household_of_ipv6(address, who):
    assert sb.sender(address) == who


def test_addresses_that_are_remembered_are_bounded():
    gate = sb.Gate(None, 100)
    for n in range(3 * sb.MAX_ADDRESSES):
        gate.count(gate.tokens, f"10.{n // 65536}.{n // 256 % 256}.{n % 256}", 100, "webhooks")
    assert len(gate.tokens) == sb.MAX_ADDRESSES


# === Hooks ===

def test_a_hooks_environment_has_librespots_names_and_no_token():
    lossless = sb.parse_item({**SONG, "guid": "plex://track/1"})._replace(sample_rate=96000, bit_depth=24)
    environment = sb.hook_environment(sb.Change(PLAYING, STOPPED, lossless, 61000, "Living\0 Room", "m1", "webhook"), "playing")
    assert environment == {
        "PLAYER_EVENT": "playing", "TRACK_ID": "plex://track/1", "NAME": "Karma Police", "ARTISTS": "Radiohead", "ALBUM": "OK Computer",
        "DURATION_MS": "264000", "POSITION_MS": "61000", "PLEX_PLAYER_ID": "m1", "PLEX_PLAYER_TITLE": "Living Room", "PLEX_TYPE": "track",
        "PLEX_RATING_KEY": "101", "PLEX_SAMPLE_RATE": "96000", "PLEX_BIT_DEPTH": "24", "OLD_STATE": STOPPED}
    assert "ARTISTS" not in sb.hook_environment(change(type="episode", originalTitle="Der Anfang"), "playing")        # a title, no artist


@pytest.mark.parametrize("waiting, event, after", [
    ([], "playing", ["playing"]), (["playing"], "paused", ["paused"]), (["active", "playing"], "stopped", ["active", "stopped"]),
    (["active", "playing"], "inactive", ["playing"]), (["stopped"], "inactive", ["stopped", "inactive"]), (["inactive"], "active", []),
    (["inactive", "stopped"], "active", ["stopped"]), (["watched", "playing"], "stopped", ["watched", "stopped"]), (["watched"], "watched", ["watched"] * 2),
    (["inactive", "watched"], "active", ["watched"]), (["watched"] * 50, "watched", ["watched"] * 50)])
def test_the_newest_change_wins_and_the_amplifier_is_never_left_wrong(waiting, event, after):
    assert [name for name, _ in sb.enqueue([(name, {}) for name in waiting], event, {})] == after


def test_an_amplifier_is_told_active_once_and_inactive_after_the_last_playing():
    def after(amplifier, state, at, machine="m1"):
        return sb.after_change(amplifier, sb.Change(state, STOPPED, sb.Item(), 0, "", machine, ""), at, 10.0)
    amplifier, told = after(sb.Amplifier(), PLAYING, 0.0)
    assert told and amplifier == sb.Amplifier(frozenset({"m1"}))
    assert after(amplifier, PLAYING, 1.0) == (amplifier, False)
    amplifier, told = after(amplifier, PAUSED, 2.0)
    assert not told and amplifier.off_at == 12.0
    assert after(amplifier, STOPPED, 5.0)[0].off_at == 12.0         # nothing has played since 2.0
    assert after(amplifier, PLAYING, 11.0) == (sb.Amplifier(frozenset({"m1"})), False)
    assert after(sb.Amplifier(), PAUSED, 0.0) == (sb.Amplifier(), False)
    both = after(after(sb.Amplifier(), PLAYING, 0.0)[0], PLAYING, 1.0, "m2")[0]
    assert after(both, STOPPED, 2.0, "m2")[0].off_at == math.inf    # the other one plays on


# --- the world

def written(file):
    return file.read_text().split("\n")[:-1] if file.exists() else []


@pytest.fixture
def hook(tmp_path):
    """A hook that appends $PLAYER_EVENT $NAME to a file; its command line, and the file."""
    script, file = tmp_path / "hook", tmp_path / "called"
    script.write_text(f'#!/bin/sh\necho "$PLAYER_EVENT $NAME" >> {file}\n')
    script.chmod(0o755)
    return str(script), file


@contextlib.contextmanager
def hooking(command, active_timeout_s=10.0):
    """Hooks in a thread, which ends with the test: later it would write into the log of another one."""
    hooks = sb.Hooks(sb.hook_command(command), active_timeout_s)
    take = hooks.take

    def take_or_end(change):
        if change is None:
            raise EOFError
        take(change)

    def run():
        with contextlib.suppress(EOFError):
            hooks.run()
    hooks.take = take_or_end
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield hooks
    finally:
        hooks.inbox.put(None)
        thread.join(20)
        assert not thread.is_alive()


def changed(state=PLAYING, old=STOPPED, item=SONG):
    return sb.Change(state, old, sb.parse_item(item), 0, "Living Room", "m1", "webhook")


def test_a_hook_is_run_for_each_change_in_order_and_switches_an_amplifier(hook):
    command, file = hook
    with hooking(command, 0.5) as hooks:
        for n, change in enumerate((changed(), changed(PLAYING, PLAYING, OTHER), changed(PAUSED, PLAYING, OTHER), changed(STOPPED, PAUSED, OTHER)), 2):
            hooks.inbox.put(change)
            eventually(lambda n=n: len(written(file)) == n)
        assert written(file) == ["active Karma Police", "playing Karma Police", "track_changed No Surprises", "paused No Surprises",
                                 "stopped No Surprises"]
        eventually(lambda: written(file)[-1] == "inactive No Surprises")
        hooks.inbox.put(changed())
        eventually(lambda: written(file)[-2:] == ["active Karma Police", "playing Karma Police"])


def test_a_hook_is_started_at_once_when_the_line_of_its_change_is_in_the_log(plex, hook, token_file, lines, monkeypatch):
    command, file = hook
    rested, sleep = threading.Event(), time.sleep
    monkeypatch.setattr(sb.time, "sleep", lambda seconds: rested.wait(20) if seconds == sb.REST_S else sleep(seconds))
    plex.turn(PLAYING, TRACK)
    with hooking(command) as hooks, Running(plex, token_file, hooks=hooks):
        try:
            eventually(lambda: changes(lines))
            eventually(lambda: written(file) == ["active Karma Police", "playing Karma Police"], 5)      # ... not after the rest
            assert changes(lines) == [state_line(PLAYING)]
        finally:
            rested.set()


def test_a_slow_hook_delays_nobody_and_the_newest_change_wins(tmp_path):
    script, file = tmp_path / "slow", tmp_path / "called"
    script.write_text(f'#!/bin/sh\necho "$PLAYER_EVENT $NAME" >> {file}\nsleep 0.4\n')
    script.chmod(0o755)
    with hooking(str(script)) as hooks:
        hooks.inbox.put(changed())
        eventually(lambda: written(file))
        for state, old in ((PAUSED, PLAYING), (PLAYING, PAUSED), (STOPPED, PLAYING)):
            hooks.inbox.put(changed(state, old))
        eventually(lambda: written(file) == ["active Karma Police", "stopped Karma Police"])


def test_a_hook_that_fails_is_a_warning_with_its_status_and_output(tmp_path, lines):
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\necho no such relay >&2\nexit 3\n")
    script.chmod(0o755)
    with hooking(str(script)) as hooks:
        hooks.inbox.put(changed())
        eventually(lambda: '<4>the -on-event command failed event=playing status=3 output="no such relay"' in lines)
        script.unlink()
        hooks.inbox.put(changed(PAUSED, PLAYING))
        eventually(lambda: any("could not be started (No such file or directory) event=paused" in line for line in lines))


def test_a_hook_that_takes_too_long_is_ended_with_its_whole_group(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(sb, "HOOK_S", 0.3)
    monkeypatch.setattr(sb, "HOOK_GRACE_S", 0.2)
    script, file = tmp_path / "hangs", tmp_path / "pids"
    script.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 60 &\necho $! $$ > {file}\nwhile :; do sleep 60; done\n")
    script.chmod(0o755)
    assert sb.run_hook([str(script)], {})[0] is None
    for pid in written(file)[0].split():
        eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}") or " Z " in pathlib.Path(f"/proc/{pid}/stat").read_text())


def test_a_hook_with_a_flood_of_output_is_read_and_bounded():
    code, output = sb.run_hook(["/bin/sh", "-c", "head -c 10000000 /dev/zero; exit 7"], {})
    assert code == 7 and len(output) == sb.MAX_OUTPUT
    assert sb.run_hook(["/bin/sh", "-c", "kill -9 $$"], {})[0] == 137


def test_a_hook_has_no_signal_blocked_and_nothing_of_systemds():
    environment = {"NOTIFY_SOCKET": "/x", "CREDENTIALS_DIRECTORY": "/y"}
    script = ("import signal,sys,os; sys.path.insert(0, sys.argv[1]); import streamerbrainz as sb; sb.block_signals(); "
              "print(sb.run_hook(['/bin/sh', '-c', 'env; exec grep SigBlk /proc/self/status'], {'A': 'b'})[1].decode())")
    said = subprocess.run([sys.executable, "-c", script, HERE], capture_output=True, text=True, timeout=20, env={**os.environ, **environment}).stdout
    assert "SigBlk:\t0000000000000000" in said and "A=b" in said and "NOTIFY_SOCKET" not in said and "CREDENTIALS_DIRECTORY" not in said


def gone(pid):
    """Whether a process has ended, if only its parent has not noticed."""
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def hooks_that_run(command, script):
    """Hooks that have just been told of a change, with a script as their command."""
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    hooks = sb.Hooks(sb.hook_command(str(command)), 10.0)
    threading.Thread(target=hooks.run, daemon=True).start()
    hooks.inbox.put(changed())
    return hooks


@pytest.mark.parametrize("script, grace", [
    ("sleep 60", False), ("sleep 60 & echo $! >> {file}; wait", False), ("trap '' TERM; while :; do sleep 1; done", True),
    ("(trap '' TERM; echo $$ >> {file}; exec sleep 60) & echo $! >> {file}; wait", False), ("exec sleep 60 > /dev/null 2>&1", False), ("exec yes", False),
    ("yes & echo $! >> {file}; trap '' TERM; while :; do sleep 1; done", True),
    ("trap 'sleep 0.1; echo well >> {file}; exit' TERM; while :; do sleep 0.01; done", False)])
def test_a_hook_that_runs_when_the_daemon_stops_is_ended_with_all_its_children(tmp_path, lines, script, grace):
    file, command = tmp_path / "pids", tmp_path / "hook"
    hooks = hooks_that_run(command, f"echo $$ >> {file}\n{script.format(file=file)}")
    eventually(lambda: len(written(file)) > script.count("echo $!"))
    hooks.inbox.put(changed(PAUSED, PLAYING))              # it waits, and is not run any more
    begun = time.monotonic()
    hooks.end()
    took_s = time.monotonic() - begun
    assert (sb.HOOK_STOP_S if grace else 0) <= took_s < 2 * sb.HOOK_STOP_S
    pids = [line for line in written(file) if line != "well"]
    assert ("well" in written(file)) == ("well" in script)
    for pid in pids:
        eventually(lambda pid=pid: gone(pid), 1)
    hooks.inbox.put(changed(STOPPED, PAUSED))
    time.sleep(0.05)
    assert [line for line in written(file) if line != "well"] == pids
    assert not [line for line in lines if line.startswith("<4>")]


def test_a_hook_that_has_ended_keeps_nobody_and_its_children_stay(tmp_path):
    file, command = tmp_path / "pid", tmp_path / "hook"
    hooks = hooks_that_run(command, f"sleep 60 > /dev/null 2>&1 &\necho $! >> {file}")
    eventually(lambda: len(written(file)) == 2)            # active, playing
    eventually(lambda: not hooks.running.locked())
    begun = time.monotonic()
    hooks.end()
    assert time.monotonic() - begun < 0.1
    for pid in written(file):
        assert not gone(pid)
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("command, sentence", [
    ("/no/such/thing x", "-on-event: the file that it names is missing or not executable; give its whole path, and chmod +x it."),
    ("/etc/passwd", "-on-event: /etc/passwd is missing or not executable; give its whole path, and chmod +x it."),
    ("'x", "-on-event: the command has a quote without its end; put both or none."), (" ", "-on-event: the command is missing or not executable; "
                                                                             "give its whole path, and chmod +x it.")])
def test_a_hook_that_cannot_run_is_told_at_the_start(command, sentence):
    with pytest.raises(sb.ConfigError, match=f"^{re.escape(sentence)}$"):
        sb.hook_command(command)
    assert call("-webhooks-port", free_port(), "-webhooks-host", "127.0.0.1", "-on-event", command) == (2, "", f"streamerbrainz: {sentence}\n")


def test_a_hook_is_tried_by_hand(hook):
    command, file = hook
    assert "    SHOW='Breaking Bad'\n    SEASON=1\n    EPISODE=1\n" in call("hook", "watched", "-on-event", command).out
    assert written(file) == ["watched Pilot"]
    file.unlink()
    status, out, _ = call("hook", "track_changed", "-on-event", command)
    assert status == 0 and out.splitlines()[0] == command and "    PLAYER_EVENT=track_changed\n" in out and out.endswith("exit status 0\n")
    assert written(file) == ["track_changed Karma Police"]
    status, out, err = call("hook", "frob", "-on-event", command)
    assert status == 2 and "name one event of playing, paused, stopped, track_changed, active, inactive, watched" in err


# === Tracker ===

@pytest.mark.parametrize("guid, expected", [
    ("com.plexapp.agents.thetvdb://73244/1/2?lang=en", ("tvdb_id", 73244, 1, 2)),
    ("com.plexapp.agents.themoviedb://1396?lang=en", ("tmdb_id", 1396, None, None)),
    ("com.plexapp.agents.imdb://tt0386676/1/1?lang=en", ("imdb_id", "tt0386676", 1, 1)),
    ("com.plexapp.agents.imdb://tt0072684?lang=en", ("imdb_id", "tt0072684", None, None)),
    ("com.plexapp.agents.hama://tvdb-81797/22/70?lang=en", ("tvdb_id", 81797, 22, 70)),
    ("com.plexapp.agents.hama://tvdb2-81797/22/70", ("tvdb_id", 81797, 22, 70)),
    ("com.plexapp.agents.hama://imdb-tt0386676", ("imdb_id", "tt0386676", None, None)),
    ("com.plexapp.agents.hama://tmdb-1396/0/3", ("tmdb_id", 1396, 0, 3)),
    ("tmdb://1396", ("tmdb_id", 1396, None, None)), ("tvdb://0081189", ("tvdb_id", 81189, None, None)),
    ("imdb://tt903747", ("imdb_id", "tt0903747", None, None)),
    ("com.plexapp.agents.hama://anidb-17494/1/7?lang=en", None), ("com.plexapp.agents.none://73244/1/1", None), ("local://8369", None),
    ("plex://show/5d9c0876ec357c001f9ad189", None), ("tmdb://tt1396", None), ("imdb://1396", None), ("tmdb://", None), ("tmdb://0", None),
    ("tmdb://-1", None), ("tmdb://99999999999999999", None), ("", None), ("iva://api/2.0/tmdb://1", None)])
def test_a_guid_names_a_database_and_an_id_or_nothing(guid, expected):
    assert sb.parse_guid(guid) == expected


@pytest.mark.parametrize("title, normal, year, country", [
    ("HUNTER×HUNTER", "hunter x hunter", None, ""), ("Æon Flux", "aeon flux", None, ""), ("Alien³", "alien 3", None, ""), ("Ranma ½", "ranma 1 2", None, ""),
    ("Hawaiʻi Five-0", "hawaii five 0", None, ""), ("Bob´s Burgers™", "bobs burgers", None, ""), ("ŒUVRE Łódź Øresund", "oeuvre lodz oresund", None, ""),
    ("Kızıl İstanbul", "kizil istanbul", None, ""), ("Ófærð Þór Đà", "ofaerd thor da", None, ""), ("Romeo + Juliet", "romeo and juliet", None, ""),
    ("The Office (US)", "office", None, "US"), ("Castle (2009)", "castle", 2009, ""), ("The Office (USA) (2005)", "office", 2005, "US"),
    ("Pokémon", "pokemon", None, ""), ("POKÉMON", "pokemon", None, ""), ("Law & Order: SVU", "law and order svu", None, ""),
    ("Marvel's Agents of S.H.I.E.L.D.", "marvels agents of shield", None, ""), ("M*A*S*H", "mash", None, ""), ("9-1-1", "9 1 1", None, ""),
    ("A", "a", None, ""), ("The The", "the", None, ""), ("(2009)", "2009", None, ""), ("???", "???", None, ""), ("", "", None, ""),
    ("1923", "1923", None, ""), ("進撃の巨人", "進撃の巨人", None, ""), ("Weißensee", "weissensee", None, ""), ("Law & Order (SVU)", "law and order svu", None, ""),
    ("Shameless (UK)", "shameless", None, "UK"), ("Shameless (GB)", "shameless", None, "UK"), ("Bron_Broen", "bron broen", None, "")])
def test_a_title_is_taken_apart(title, normal, year, country):
    article = "the" if title.startswith("The ") else ""
    assert sb.parse_title(title) == sb.Title(normal, article, year, country)


@pytest.mark.parametrize("one, two, expected", [
    ("word", "two words", 0.363636), ("cat", "cat", 1.0), ("cat", "dog", 0.0), ("foo bar", "bar foo", 1.0), ("", "", 1.0), ("a", "", 0.0),
    ("breaking bad", "braking bad", 9 / 14)])
def test_similarity_is_that_of_pg_trgm(one, two, expected):
    assert sb.similarity(one, two) == pytest.approx(expected, abs=1e-6)


def known(*shows, kind="episode"):
    return [sb.Show(kind, title, year, sb.Ids(*ids), i) for i, (title, year, *ids) in enumerate(shows, 1)]


def wanted(title, year=None, *ids, own=False, kind="episode"):
    return sb.Show(kind, title, year, sb.Ids(*ids), own_year=own)


ICARLY = ("iCarly", 2007), ("iCarly", 2021)
OFFICES = ("The Office (US)", 2005), ("The Office (UK)", 2001)


@pytest.mark.parametrize("want, shows, expected", [
    (wanted("Breaking Bad", 2010), [("Breaking Bad", 2008)], (1, 1.0)),
    (wanted("breaking BAD"), [("Breaking Bad", 2008)], (1, 1.0)),
    (wanted("Castle (2009)", 2012), [("Castle", 2009)], (1, 1.0)),
    (wanted("Castle", 2012), [("Castle (2009)", None)], (1, 1.0)),
    (wanted("Castle (2009)"), [("Castle", 2003)], "ambiguous"),
    (wanted("The Office (US)", 2007), OFFICES, (1, 1.0)),
    (wanted("The Office", 2005, own=True), OFFICES, (1, 1.0)),
    (wanted("The Office", 2001), OFFICES, (2, 1.0)),
    (wanted("The Office", 2013), OFFICES, "ambiguous"),                       # either may have a season then
    (wanted("The Office (US)", 2007), [("The Office", 2001)], "ambiguous"),   # the British one, perhaps
    (wanted("The Office (US)"), [("The Office (UK)", 2001)], "no_match"),
    (wanted("iCarly", 2007), ICARLY, (1, 1.0)), (wanted("iCarly", 2021), ICARLY, (2, 1.0)), (wanted("iCarly (2021)", 2023), ICARLY, (2, 1.0)),
    (wanted("iCarly", 2010), ICARLY, (1, 1.0)),                               # the season's year: the new one had not begun
    (wanted("iCarly", 2023), ICARLY, "multiple_matches"), (wanted("iCarly"), ICARLY, "multiple_matches"),
    (wanted("iCarly", 2007), ICARLY[1:], "ambiguous"),                        # an episode before its show
    (wanted("American Horror Story", 2018), [("American Horror Story", 2011), ("American Horror Stories", 2021)], (1, 1.0)),
    (wanted("American Horror Story", 2011), [("American Horror Stories", 2021)], "ambiguous"),
    (wanted("Star Trek Discovery", 2017), [("Star Trek: Discovery", 2017), ("Star Trek: Picard", 2020)], (1, 1.0)),
    (wanted("Greys Anatomie", 2005), [("Grey's Anatomy", 2005)], "ambiguous"),
    (wanted("Buffy, Vampire Slayer", 1997), [("Buffy the Vampire Slayer", 1997)], (1, 0.94)),
    (wanted("NonExistent Show XYZ"), [("Breaking Bad", 2008)], "no_match"), (wanted("X"), [], "no_match"),
    (wanted("Battlestar Galactica", 2005, 1), [("Battlestar Galactica", 2004, 2)], "no_match"),   # another id is another show
    (wanted("Battlestar Galactica", 2005, 1), [("Battlestar Galactica", 2004, None, 7)], (1, 1.0)),
    (wanted("Pokémon", 1999), [("POKEMON", 1998)], (1, 1.0)),
    (wanted("Heat", 1995, own=True, kind="movie"), [("The Heat", 2013), ("Heat", 1995)], (2, 1.0)),
    (wanted("Heat", 1995, own=True, kind="movie"), [("The Heat", 2013)], "ambiguous")])
def test_titles_choose_a_show_only_where_it_is_certain(want, shows, expected):
    verdict = sb.choose_show(want, known(*shows, kind=want.type))
    assert (verdict.kind if isinstance(verdict, sb.Conflict) else (verdict.show_id, verdict.confidence)) == expected


ASK = "ask"
DOCTORS = ("Doctor Who", 1963, 26), ("Doctor Who", 2005, 13), ("Doctor Who", 2024, 2)
GHOSTS = ("Ghosts", 2019, 5), ("Ghosts", 2021, 4)
SKINS = ("Skins", 2007, 7), ("Skins", 2011, 1)
SHAMELESS = ("Shameless", 2004, 11), ("Shameless", 2011, 11)
CSI = ("CSI: Crime Scene Investigation", 2000, 15), ("CSI: Miami", 2002, 10), ("CSI: NY", 2004, 9), ("CSI: Cyber", 2015, 2), ("CSI: Vegas", 2021, 3)
NCIS = ("NCIS", 2003, 21), ("NCIS: Los Angeles", 2009, 14), ("NCIS: New Orleans", 2014, 7), ("NCIS: Sydney", 2023, 2)
ORDER = ("Law & Order", 1990, 24), ("Law & Order: Special Victims Unit", 1999, 25), ("Law & Order: Criminal Intent", 2001, 10)
POWER = ("Power", 2014, 6), ("Power Book II: Ghost", 2020, 4), ("Power Book III: Raising Kanan", 2021, 4), ("Power Book IV: Force", 2022, 2)
TREK = ("Star Trek", 1966, 3), ("Star Trek: The Next Generation", 1987, 7), ("Star Trek: Discovery", 2017, 5), ("Star Trek: Strange New Worlds", 2022, 3)
DEAD = ("The Walking Dead", 2010, 11), ("Fear the Walking Dead", 2015, 8), ("The Walking Dead: Dead City", 2023, 2), ("The Walking Dead: World Beyond", 2020, 2)
BALLS = ("Dragon Ball", 1986, 9), ("Dragon Ball Z", 1989, 9), ("Dragon Ball GT", 1996, 2), ("Dragon Ball Kai", 2009, 2), ("Dragon Ball Super", 2015, 5)
V = ("V", 1984, 1), ("V", 2009, 2)
FRASIERS = ("Frasier", 1993, 11), ("Frasier", 2023, 2)
GALACTICAS = ("Battlestar Galactica", 1978, 1), ("Battlestar Galactica", 2004, 4)

# What was watched: title, year, season (None: a movie), perhaps the episode -> the tracker's shows: title, year, perhaps
# the last season -> the one that is meant (counted from 1), or ASK.
TITLES = [
    # a remake whose original alone is known
    ("One Piece", 2023, 1, [("One Piece", 1999, 22)], ASK),
    ("One Piece", 2026, 2, [("One Piece", 1999, 22)], ASK),
    ("Avatar: The Last Airbender", 2024, 1, [("Avatar: The Last Airbender", 2005, 3)], ASK),
    ("Frasier", 2023, 1, FRASIERS[:1], ASK),
    ("Frasier", 2024, 2, FRASIERS[:1], ASK),
    ("Quantum Leap", 2022, 1, [("Quantum Leap", 1989, 5)], ASK),
    ("Quantum Leap", 2023, 2, [("Quantum Leap", 1989, 5)], ASK),
    ("Gossip Girl", 2021, 1, [("Gossip Girl", 2007, 6)], ASK),
    ("Gossip Girl", 2022, 2, [("Gossip Girl", 2007, 6)], ASK),
    ("Perry Mason", 2020, 1, [("Perry Mason", 1957, 9)], ASK),
    ("Perry Mason", 2023, 2, [("Perry Mason", 1957, 9)], ASK),
    ("Death Note", 2015, 1, [("Death Note", 2006, 1)], ASK),
    ("Ranma ½", 2024, 1, [("Ranma 1/2", 1989, 7)], ASK),
    ("Hawaii Five-0", 2010, 1, [("Hawaii Five-O", 1968, 12)], ASK),
    ("Hawaii Five-O", 2019, 10, [("Hawaii Five-O", 1968, 12)], ASK),
    ("MacGyver", 2020, 5, [("MacGyver", 1985, 7)], ASK),
    ("Magnum P.I.", 2023, 5, [("Magnum, P.I.", 1980, 8)], ASK),
    ("Charmed", 2022, 4, [("Charmed", 1998, 8)], ASK),
    ("Dynasty", 2021, 4, [("Dynasty", 1981, 9)], ASK),
    ("Battlestar Galactica", 2008, 4, GALACTICAS[:1], ASK),
    ("House of Cards", 2013, 1, [("House of Cards", 1990, 1)], ASK),
    ("House of Cards", 2018, 6, [("House of Cards", 1990, 1)], ASK),
    ("Lost in Space", 2021, 3, [("Lost in Space", 1965, 3)], ASK),
    ("One Day at a Time", 2019, 3, [("One Day at a Time", 1975, 9)], ASK),
    ("Kung Fu", 2021, 1, [("Kung Fu", 1972, 3)], ASK),
    ("Dallas", 2013, 2, [("Dallas", 1978, 14)], ASK),
    ("Night Court", 2023, 1, [("Night Court", 1984, 9)], ASK),
    ("The Equalizer", 2023, 4, [("The Equalizer", 1985, 4)], ASK),
    ("All Creatures Great and Small", 2021, 2, [("All Creatures Great & Small", 1978, 7)], ASK),
    ("Poldark", 2016, 2, [("Poldark", 1975, 2)], ASK),
    ("Fruits Basket", 2020, 2, [("Fruits Basket", 2001, 1)], ASK),
    ("Hunter x Hunter", 2011, 1, [("Hunter × Hunter", 1999, 3)], ASK),
    ("Trigun", 2023, 1, [("Trigun", 1998, 1)], ASK),
    ("Spice and Wolf", 2024, 1, [("Spice & Wolf", 2008, 2)], ASK),
    ("Ben 10", 2020, 4, [("Ben 10", 2005, 4)], ASK),
    ("The Twilight Zone", 2019, 1, [("The Twilight Zone", 1959, 5)], ASK),
    ("DuckTales", 2018, 2, [("DuckTales", 1987, 4)], ASK),
    ("Teenage Mutant Ninja Turtles", 2012, 1, [("Teenage Mutant Ninja Turtles", 2003, 7)], ASK),
    ("Teenage Mutant Ninja Turtles", 2017, 5, [("Teenage Mutant Ninja Turtles", 2003, 7)], ASK),
    ("Shōgun", 2024, 1, [("Shogun", 1980, 1)], ASK),
    ("Matlock", 2024, 1, [("Matlock", 1986, 9)], ASK),
    ("Heartbreak High", 2024, 2, [("Heartbreak High", 1994, 7)], ASK),
    ("Roots", 2016, 1, [("Roots", 1977, 1)], ASK),
    ("The Wonder Years", 2021, 1, [("The Wonder Years", 1988)], ASK),
    ("Animaniacs", 2020, 1, [("Animaniacs", 1993, 5)], ASK),
    # both are known: the year and the season tell which
    ("Frasier", 2023, 1, FRASIERS, 2),
    ("Frasier", 2002, 10, FRASIERS, 1),
    ("Frasier", 2024, 2, FRASIERS, 2),
    ("Ghosts", 2019, 1, GHOSTS, 1),
    ("Ghosts", 2021, 3, GHOSTS, 1),
    ("Ghosts", 2022, 4, GHOSTS, 1),
    ("Ghosts", 2021, 1, GHOSTS, 2),
    ("Ghosts", 2022, 2, GHOSTS, 2),
    ("Ghosts", 2024, 4, GHOSTS, 2),
    ("Ghosts", 2023, 5, GHOSTS, 1),
    ("Skins", 2011, 5, SKINS, 1),
    ("Skins", 2011, 1, SKINS, 2),
    ("Skins", 2012, 6, SKINS, 1),
    ("Shameless", 2011, 8, SHAMELESS, 1),
    ("Shameless", 2011, 1, SHAMELESS, 2),
    ("Shameless", 2013, 10, SHAMELESS, 1),
    ("Shameless", 2018, 8, SHAMELESS, 2),
    ("Doctor Who", 1975, 13, DOCTORS, 1),
    ("Doctor Who", 2010, 5, DOCTORS, 2),
    ("Doctor Who", 2021, 13, DOCTORS, 2),
    ("Doctor Who", 2024, 1, DOCTORS, 3),
    ("Doctor Who", 2025, 2, DOCTORS, 3),
    ("Doctor Who", 2025, 2, DOCTORS[:2], ASK),
    ("Doctor Who", 2024, 1, DOCTORS[1:2], ASK),
    ("Doctor Who", 2005, 1, DOCTORS[:1], ASK),
    ("Doctor Who", 2021, 13, DOCTORS[:1], ASK),
    ("Doctor Who (2005)", 2013, 7, [("Doctor Who", 1963, 26), ("Doctor Who", 2005, 13)], 2),
    ("Doctor Who (1963)", 1970, 7, DOCTORS, 1),
    ("Doctor Who", 2013, 0, DOCTORS, 2),
    ("Doctor Who", 2013, 0, DOCTORS[:1], ASK),
    ("V", 2009, 1, V, 2),
    ("V", 2011, 2, V, 2),
    ("V", 2009, 1, V[:1], ASK),
    ("V", 1984, 1, V, 1),
    ("Battlestar Galactica", 2004, 1, GALACTICAS, 2),
    ("Battlestar Galactica", 1978, 1, GALACTICAS, 1),
    ("Battlestar Galactica", 2009, 4, GALACTICAS, 2),
    ("Fullmetal Alchemist", 2003, 1, [("Fullmetal Alchemist", 2003, 1), ("Fullmetal Alchemist: Brotherhood", 2009, 1)], 1),
    ("Hunter x Hunter", 2011, 1, [("HUNTER×HUNTER", 1999, 1), ("HUNTER×HUNTER", 2011, 3)], 2),
    ("Hunter x Hunter", 2014, 1, 140, [("Hunter × Hunter", 1999, 1), ("Hunter × Hunter", 2011, 1)], 2),
    # two namesakes, of which only one is known
    ("Ghosts", 2021, 1, GHOSTS[:1], ASK),
    ("Ghosts", 2022, 4, GHOSTS[1:], ASK),
    ("Ghosts", 2023, 5, GHOSTS[1:], ASK),
    ("Ghosts", 2019, 1, GHOSTS[1:], ASK),
    ("Skins", 2011, 5, SKINS[1:], ASK),
    ("Skins", 2012, 6, SKINS[1:], ASK),
    ("Skins", 2011, 1, SKINS[:1], ASK),
    ("Shameless", 2012, 2, SHAMELESS[:1], ASK),
    ("Shameless", 2012, 9, SHAMELESS[1:], ASK),
    ("Being Human", 2011, 1, [("Being Human", 2008, 5)], ASK),
    ("Life on Mars", 2008, 1, [("Life on Mars", 2006, 2)], ASK),
    ("The Inbetweeners", 2012, 1, [("The Inbetweeners", 2008, 3)], ASK),
    ("The Returned", 2015, 1, [("The Returned", 2012, 2)], ASK),
    ("Top Gear", 2010, 1, [("Top Gear", 2002, 33)], ASK),
    ("Top Gear", 2011, 2, [("Top Gear", 2002, 33)], ASK),
    ("Euphoria", 2019, 1, [("Euphoria", 2012, 1)], ASK),
    # countries
    ("The Office (US)", 2005, 1, [("The Office", 2005, 9)], 1),
    ("The Office (US)", 2006, 3, [("The Office", 2001, 2)], ASK),
    ("The Office", 2005, 2, [("The Office (US)", 2005, 9), ("The Office (UK)", 2001, 2)], 1),
    ("The Office (US)", 2005, 1, [("The Office (UK)", 2001, 2)], ASK),
    ("Queer as Folk (US)", 2000, 1, [("Queer as Folk", 1999, 2)], ASK),
    ("Queer as Folk (UK)", 1999, 1, [("Queer as Folk (GB)", 1999, 2)], 1),
    ("Shameless (US)", 2011, 1, [("Shameless", 2004, 11)], ASK),
    ("Shameless (US)", 2012, 2, SHAMELESS, 2),
    ("House of Cards (US)", 2013, 1, [("House of Cards", 2013, 6)], 1),
    ("Love Island", 2015, 1, [("Love Island UK", 2015, 11)], ASK),
    ("Love Island", 2019, 1, [("Love Island", 2015, 11)], ASK),
    ("MasterChef Australia", 2010, 2, [("MasterChef", 2010, 14)], ASK),
    ("The Traitors (US)", 2023, 1, [("The Traitors", 2022, 3)], ASK),
    ("The Bachelor (AU)", 2013, 1, [("The Bachelor (US)", 2002, 28)], ASK),
    ("Kitchen Nightmares (US)", 2007, 1, [("Kitchen Nightmares", 2007, 8)], 1),
    # late seasons, pauses, two seasons a year, one season for ever
    ("The Simpsons", 2022, 34, [("The Simpsons", 1989, 36)], 1),
    ("The Simpsons", 1990, 1, [("The Simpsons", 1989, 1)], 1),
    ("South Park", 2023, 26, [("South Park", 1997, 26)], 1),
    ("Law & Order", 2022, 21, ORDER, 1),
    ("Family Guy", 2005, 4, [("Family Guy", 1999, 22)], 1),
    ("SpongeBob SquarePants", 2020, 13, [("SpongeBob SquarePants", 1999, 15)], 1),
    ("Curb Your Enthusiasm", 2017, 9, [("Curb Your Enthusiasm", 2000, 12)], 1),
    ("Futurama", 2023, 8, [("Futurama", 1999, 10)], 1),
    ("Futurama", 2010, 6, [("Futurama", 1999, 10)], 1),
    ("Trailer Park Boys", 2014, 8, [("Trailer Park Boys", 2001, 12)], 1),
    ("Young Justice", 2019, 3, [("Young Justice", 2010, 4)], ASK),
    ("Top Gear", 2005, 7, [("Top Gear", 2002, 33)], 1),
    ("Prison Break", 2017, 5, [("Prison Break", 2005, 5)], 1),
    ("Prison Break", 2017, 5, [("Prison Break", 2005, 4)], 1),
    ("Prison Break", 2017, 5, [("Prison Break", 2005)], ASK),
    ("The X-Files", 2016, 10, [("The X-Files", 1993, 11)], 1),
    ("Twin Peaks: The Return", 2017, 1, [("Twin Peaks", 1990, 2)], ASK),
    ("Twin Peaks", 1991, 2, [("Twin Peaks", 1990, 3)], 1),
    ("Will & Grace", 2017, 9, [("Will and Grace", 1998, 11)], 1),
    ("Roseanne", 2018, 10, [("Roseanne", 1988, 10)], 1),
    ("Criminal Minds", 2022, 16, [("Criminal Minds", 2005, 18)], 1),
    ("Black Mirror", 2023, 6, [("Black Mirror", 2011, 7)], 1),
    ("True Detective", 2024, 4, [("True Detective", 2014, 4)], 1),
    ("Fargo", 2023, 5, [("Fargo", 2014, 5)], 1),
    ("Stranger Things", 2022, 4, [("Stranger Things", 2016, 4)], 1),
    ("Stranger Things", 2025, 5, [("Stranger Things", 2016, 4)], 1),
    ("Severance", 2025, 2, [("Severance", 2022, 1)], 1),
    ("Good Omens", 2023, 2, [("Good Omens", 2019, 2)], 1),
    ("Sherlock", 2017, 4, [("Sherlock", 2010, 4)], 1),
    ("Survivor", 2021, 41, [("Survivor", 2000, 47)], 1),
    ("The Amazing Race", 2012, 20, [("The Amazing Race", 2001, 36)], 1),
    ("Red Dwarf", 1988, 2, [("Red Dwarf", 1988, 12)], 1),
    ("Bleach", 2012, 1, 366, [("Bleach", 2004, 1)], 1),
    ("Detective Conan", 2023, 1, 1100, [("Detective Conan", 1996, 1)], 1),
    ("MythBusters", 2012, 2012, [("MythBusters", 2003, 2018)], 1),
    ("Grey's Anatomy", 2022, 19, [("Grey’s Anatomy", 2005, 19)], 1),
    # sequels and spin-offs
    ("CSI: NY", 2004, 1, CSI, 3),
    ("CSI: NY", 2004, 1, CSI[:2], ASK),
    ("CSI: Vegas", 2021, 1, CSI[:4], ASK),
    ("CSI: Miami", 2010, 9, CSI, 2),
    ("CSI", 2003, 4, CSI[:1], ASK),
    ("NCIS", 2013, 11, NCIS, 1),
    ("NCIS: Hawai'i", 2021, 1, NCIS, ASK),
    ("NCIS: Hawaiʻi", 2022, 2, [*NCIS, ("NCIS: Hawai‘i", 2021, 3)], 5),
    ("NCIS: LA", 2009, 1, NCIS[:1], ASK),
    ("Law & Order: LA", 2010, 1, ORDER, ASK),
    ("Law & Order: UK", 2009, 1, ORDER, ASK),
    ("Law and Order", 1995, 6, ORDER, 1),
    ("Law & Order Special Victims Unit", 2013, 15, ORDER, 2),
    ("Law & Order: SVU", 2013, 15, ORDER, ASK),
    ("Law & Order: LA", 2010, 21, ORDER[:1], ASK),
    ("Power Book II: Ghost", 2021, 2, POWER, 2),
    ("Power Book III: Raising Kanan", 2022, 2, POWER, 3),
    ("Power Book IV: Force", 2022, 1, POWER[:3], ASK),
    ("Power", 2016, 3, POWER, 1),
    ("Star Trek The Next Generation", 1990, 4, TREK, 2),
    ("Star Trek: The Original Series", 1966, 1, TREK, ASK),
    ("Star Trek: Discovery", 2020, 3, TREK, 3),
    ("Star Trek: Next Generation", 1990, 4, TREK, 2),
    ("Star Trek: Picard", 2020, 1, TREK, ASK),
    ("Star Trek", 1966, 1, TREK, 1),
    ("Fear the Walking Dead", 2015, 1, DEAD, 2),
    ("Fear the Walking Dead", 2015, 1, DEAD[:1], ASK),
    ("The Walking Dead", 2021, 11, DEAD, 1),
    ("The Walking Dead: Daryl Dixon", 2023, 1, DEAD, ASK),
    ("Better Call Saul", 2015, 1, [("Breaking Bad", 2008, 5)], ASK),
    ("9-1-1: Lone Star", 2020, 1, [("9-1-1", 2018, 8)], ASK),
    ("9-1-1", 2023, 6, [("9-1-1", 2018, 8), ("9-1-1: Lone Star", 2020, 5)], 1),
    ("24: Legacy", 2017, 1, [("24", 2001, 8)], ASK),
    ("24", 2010, 8, [("24", 2001, 9)], 1),
    ("American Horror Stories", 2021, 1, [("American Horror Story", 2011, 12)], ASK),
    # anime, and titles in other scripts
    ("Boku no Hero Academia", 2016, 1, [("My Hero Academia", 2016, 7)], ASK),
    ("My Hero Academia", 2024, 7, [("My Hero Academia", 2016, 7)], 1),
    ("Attack on Titan: The Final Season", 2020, 1, [("Attack on Titan", 2013, 4)], ASK),
    ("Attack on Titan", 2020, 4, [("Attack on Titan", 2013, 4)], 1),
    ("Naruto: Shippuden", 2007, 1, [("Naruto", 2002, 5)], ASK),
    ("Naruto Shippūden", 2012, 12, [("Naruto", 2002, 5), ("Naruto: Shippuden", 2007, 22)], 2),
    ("Dragon Ball", 1986, 1, BALLS, 1),
    ("Dragon Ball Z", 1995, 9, BALLS, 2),
    ("Dragon Ball GT", 1996, 1, BALLS, 3),
    ("Dragon Ball Z", 1989, 1, BALLS[:1], ASK),
    ("Dragon Ball Super", 2017, 1, 90, BALLS, 5),
    ("Dragonball Z", 1989, 1, BALLS, ASK),
    ("Dragon Ball Kai", 2009, 1, BALLS[1:2], ASK),
    ("Bleach: Thousand-Year Blood War", 2022, 1, [("Bleach", 2004, 16)], ASK),
    ("Tokyo Ghoul √A", 2015, 1, [("Tokyo Ghoul", 2014, 2)], ASK),
    ("Tokyo Ghoul:re", 2018, 1, [("Tokyo Ghoul", 2014, 2)], ASK),
    ("SPY×FAMILY", 2022, 1, [("SPY x FAMILY", 2022, 3)], 1),
    ("進撃の巨人", 2013, 1, [("進撃の巨人", 2013, 4)], 1),
    ("鬼滅の刃", 2019, 1, [("Demon Slayer", 2019, 4)], ASK),
    ("오징어 게임", 2021, 1, [("오징어 게임", 2021, 3)], 1),
    ("Слово пацана", 2023, 1, [("СЛОВО ПАЦАНА", 2023, 1)], 1),
    ("Метод", 2020, 2, [("Метод", 2015, 2)], 1),
    ("La casa de papel", 2017, 1, [("Money Heist", 2017, 5)], ASK),
    ("La Casa de Papel", 2019, 3, [("La casa de papel", 2017, 5)], 1),
    ("Élite", 2018, 1, [("Elite", 2018, 8)], 1),
    ("Ófærð", 2015, 1, [("Ofaerd", 2015, 3)], 1),
    ("Kızıl Goncalar", 2023, 1, [("Kizil Goncalar", 2023, 2)], 1),
    ("Ślepnąc od świateł", 2018, 1, [("Slepnac od swiatel", 2018, 1)], 1),
    ("Rita", 2012, 1, [("RITA", 2012, 5)], 1),
    ("Bron/Broen", 2011, 1, [("Bron | Broen", 2011, 4)], 1),
    ("Kærlighed", 2020, 1, [("Kaerlighed", 2020, 1)], 1),
    ("Chłopi", 1972, 1, [("Chlopi", 1972, 1)], 1),
    ("Đi Về Miền Có Nắng", 2020, 1, [("Di ve mien co nang", 2020, 1)], 1),
    ("Babylon Berlin", 2022, 4, [("Babylon Berlin", 2017, 4)], 1),
    # punctuation, articles, numbers, one word or letter
    ("Æon Flux", 1991, 1, [("Aeon Flux", 1991, 3)], 1),
    ("M.A.S.H", 1975, 4, [("M*A*S*H", 1972, 11)], 1),
    ("Marvels Agents of SHIELD", 2013, 1, [("Marvel's Agents of S.H.I.E.L.D.", 2013, 7)], 1),
    ("Love, Death & Robots", 2019, 1, [("LOVE DEATH + ROBOTS", 2019, 4)], 1),
    ("Bob´s Burgers", 2011, 1, [("Bob's Burgers", 2011, 14)], 1),
    ("Rick & Morty", 2021, 5, [("Rick and Morty", 2013, 8)], 1),
    ("The Batman", 2004, 1, [("Batman", 1966, 3)], ASK),
    ("The Batman", 2005, 2, [("Batman", 1966, 3), ("The Batman", 2004, 5)], 2),
    ("4400", 2021, 1, [("The 4400", 2004, 4)], ASK),
    ("The 4400", 2004, 1, [("4400", 2004, 4)], 1),
    ("The 4400", None, 1, [("4400", 2021, 1)], ASK),
    ("The Flash", 2014, 1, [("The Flash", 1990, 1), ("The Flash", 2014, 9)], 2),
    ("Flash", 2016, 3, [("The Flash", 2011)], ASK),
    ("The 100", 2014, 1, [("The 100", 2014, 7)], 1),
    ("You", 2018, 1, [("You", 2018, 5)], 1),
    ("1923", 2022, 1, [("1883", 2021, 1)], ASK),
    ("1883", 2021, 1, [("1883", 2021, 1), ("1923", 2022, 2)], 1),
    ("Class of ’09", 2023, 1, [("Class of '09", 2023, 1)], 1),
    ("Class of '07", 2023, 1, [("Class of '09", 2023, 1)], ASK),
    ("Chernobyl", 2019, 1, [("Chernobyl", 2019, 1)], 1),
    ("Numb3rs", 2005, 1, [("Numbers", 2005, 6)], ASK),
    # a year in a title, or none
    ("Castle (2009)", None, 4, [("Castle", None, 1)], ASK),
    ("Castle (2009)", 2012, 4, [("Castle", None, 8)], ASK),
    ("Castle", None, 4, [("Castle (2009)", None, 8)], ASK),
    ("Castle", 2012, 4, [("Castle (2009)", None, 8)], 1),
    ("Castle", 2012, 4, [("Castle", 2003, 1), ("Castle (2009)", None, 8)], 2),
    ("Frasier (2023)", 2024, 2, FRASIERS, 2),
    ("Frasier (2023)", 2023, 1, FRASIERS[:1], ASK),
    ("Frasier", None, 1, FRASIERS, ASK),
    ("Breaking Bad", None, 1, [("Breaking Bad", 2008, 5)], 1),
    ("Breaking Bad", 2010, 3, [("Breaking Bad", None, 5)], 1),
    ("iCarly", 2023, 3, [("iCarly", 2007, 5), ("iCarly", 2021, 3)], 2),
    # movies
    ("Alien³", 1992, None, [("Alien 3", 1992)], 1),
    ("Aliens", 1986, None, [("Alien", 1979)], ASK),
    ("Dune", 2021, None, [("Dune", 1984)], ASK),
    ("Dune", 2021, None, [("Dune", 1984), ("Dune", 2021)], 2),
    ("Dune: Part Two", 2024, None, [("Dune: Part One", 2021)], ASK),
    ("Rocky II", 1979, None, [("Rocky III", 1982)], ASK),
    ("It", 2017, None, [("It", 1990)], ASK),
    ("It Chapter Two", 2019, None, [("It", 2017)], ASK),
    ("The Batman", 2022, None, [("Batman", 1989)], ASK),
    ("Us", 2019, None, [("Us", 2019)], 1),
    ("The Heat", 2013, None, [("Heat", 1995), ("The Heat", 2013)], 2),
    ("[REC]²", 2009, None, [("[REC] 2", 2009)], 1),
    ("Heat", None, None, [("Heat", 1986), ("Heat", 1995)], ASK),
    ("Amélie", 2002, None, [("Amelie", 2001)], 1),
    ("Kill Bill: Vol. 2", 2004, None, [("Kill Bill: Vol. 1", 2003)], ASK),
    ("Romeo + Juliet", 1996, None, [("Romeo and Juliet", 1968)], ASK),
    # a word twice, or the same words in another order
    ("Sing Sing", 2024, None, [("Sing", 2023)], ASK),
    ("Knock", 2016, None, [("Knock Knock", 2015)], ASK),
    ("Bang Bang Kiss", 2005, None, [("Kiss Kiss Bang Bang", 2005)], ASK),
    ("Girl Lost", 2018, None, [("Lost Girl", 2018)], ASK),
    ("Kiss Kiss, Bang Bang", 2005, None, [("Kiss Kiss Bang Bang", 2005)], 1)]


def test_no_title_is_taken_where_a_careful_person_would_see_a_difference():
    wrong = {}
    for title, year, season, *episode, shows, expected in TITLES:
        kind = "movie" if season is None else "episode"
        want = sb.Show(kind, title, year, own_year=season is None, season=season, episode=(episode or [1])[0])
        verdict = sb.choose_show(want, [sb.Show(kind, *show[:2], id=i, seasons=max(show[2:], default=0)) for i, show in enumerate(shows, 1)])
        if (found := verdict.show_id if isinstance(verdict, sb.Match) else ASK) != expected:
            wrong[title, year, season] = found, expected
    assert len(TITLES) >= 250 and not wrong


@pytest.mark.parametrize("one, two, different", [
    ("The Dundies", "Merger", True), ("The Owl", "The Bone Plot", True), ("Minimum Viable Product", "Minimum Viable Product", False),
    ("The Dundies", "the dundies!", False), ("Episode 3", "Merger", False), ("Pilot", "Merger", False), ("Chapter Nine", "The Dundies", False),
    ("", "Merger", False), ("Gray", "Merger", True), ("M", "Merger", False), ("Die Büroolympiade", "Office Olympics", True), ("オフィス", "Office Olympics", False),
    ("2005-11-02", "Merger", False), ("Seeing Red", "Seeing Red (1)", False), ("Office Olympic", "Office Olympics", False)])
def test_titles_of_episodes_tell_of_two_shows(one, two, different):
    assert sb.other_episode(one, two) is sb.other_episode(two, one) is different


@pytest.mark.parametrize("year, theirs, ours, taken", [
    (2005, "The Dundies", "Merger", False), (2005, "Merger", "Merger", True), (2005, "Episode 1", "Merger", True), (2005, "", "Merger", True),
    (2002, "The Dundies", "Merger", True), (None, "The Dundies", "Merger", False)])       # the year agrees: it may be a translation
def test_a_title_of_no_sure_year_is_asked_about_where_the_episode_has_another_title_here(store, year, theirs, ours, taken):
    with store.transaction():
        show_id = store.add_show(sb.Show(sb.SHOW, "The Office", 2001))
        store.add_episodes(show_id, [(2, 1, ours), (2, 2, "Appraisals"), (1, 1, "Downsize")])
    wanted = {**PILOT, "grandparentTitle": "The Office", "grandparentGuid": "plex://show/us", "grandparentRatingKey": "77", "parentIndex": 2,
              "title": theirs, "year": year}
    assert (finish(store, metadata=wanted)[1] == "marked_watched") is taken


def test_a_title_that_all_episodes_of_a_show_have_tells_nothing(store):
    with store.transaction():
        show_id = store.add_show(sb.Show(sb.SHOW, "The Office", 2001))
        store.add_episodes(show_id, [(2, number, "Unknown") for number in range(1, 7)])
    assert finish(store, metadata={**PILOT, "grandparentTitle": "The Office", "grandparentGuid": "plex://show/us", "grandparentRatingKey": "77",
                                   "parentIndex": 2, "title": "The Dundies", "year": 2005})[1] == "marked_watched"


def test_among_many_alike_titles_only_the_most_similar_are_compared(store):
    with store.transaction():
        for number in range(300):
            store.add_show(sb.Show(sb.SHOW, f"Show number {number}", 2000))
        store.add_episodes(store.add_show(sb.Show(sb.SHOW, "Show number 777", 2008)), [(1, 1, "Pilot")])
    assert finish(store, metadata={**PILOT, "grandparentTitle": "Show number 777", "grandparentRatingKey": "77", "grandparentGuid": "plex://show/777"})[1] == "marked_watched"


def test_an_episodes_own_ids_never_identify_its_show():
    entry = sb.entry_of(scrobble(), 1.0)
    assert entry.guids == "imdb://tt0959621 tmdb://62085 tvdb://349232"
    assert entry.show == sb.Show("episode", "Breaking Bad", 2008, sb.Ids(), own_year=False, season=1, episode=1, episode_title="Pilot")
    assert (entry.season, entry.episode, entry.subject, entry.show_guid) == (1, 1, "key:1000", "plex://show/bb")


def test_a_legacy_agents_guid_is_the_shows_and_a_movies_ids_are_its_own():
    legacy = {**PILOT, "guid": "com.plexapp.agents.thetvdb://81189/3/7?lang=en", "grandparentGuid": None, "parentIndex": None, "index": None}
    entry = sb.entry_of(scrobble(legacy), 1.0)
    assert entry.show.ids == sb.Ids(None, 81189) and (entry.season, entry.episode) == (3, 7)
    assert entry.guid_of_show == "com.plexapp.agents.thetvdb://81189"
    movie = {"type": "movie", "ratingKey": "5", "title": "Heat", "year": 1995, "guid": "plex://movie/x", "Guid": [{"id": "tmdb://949"}]}
    entry = sb.entry_of(scrobble(movie), 1.0)
    assert entry.show == sb.Show("movie", "Heat", 1995, sb.Ids(949), season=0) and (entry.season, entry.episode, entry.subject) == (0, 0, "key:5")


@pytest.mark.parametrize("webhook, accounts, expected", [
    (scrobble(event="media.play"), "", ("ignored", "event_not_scrobble")),
    (scrobble({**PILOT, "type": "track"}), "", ("ignored", "not_supported_type")),
    (scrobble({**PILOT, "type": "clip"}), "", ("ignored", "not_supported_type")),
    (scrobble({**PILOT, "type": "movie", "subtype": "clip"}), "", ("ignored", "not_supported_type")), (scrobble(Account={"id": 139, "title": "me"}), "1", None),
    (scrobble(user=False, Account={"id": 139, "title": "me"}), "1", ("ignored", "other_account")),
    (scrobble({**PILOT, "parentIndex": 202604, "index": 2 ** 31}), "", None), (scrobble({**PILOT, "index": 2 ** 31 + 1}), "", ("failed", "validation_failed")),
    (scrobble(legacy("com.plexapp.agents.thetvdb://1/2026/26041103", parentIndex=None, index=None)), "", None),
    (scrobble(None), "", ("ignored", "not_supported_type")),
    (scrobble(user=False), "", ("ignored", "other_account")), (scrobble(user=False), "*", None), (scrobble(user="yes"), "", ("ignored", "other_account")),
    (scrobble(user=False, Account={"id": 7, "title": "Anna"}), "bob, anna", None), (scrobble(user=False, Account={"id": 7, "title": "Anna"}), "7", None),
    (scrobble(Account={"id": 7, "title": "Anna"}), "Bob", ("ignored", "other_account")), (scrobble(Account=None), "Bob", ("ignored", "other_account")),
    (scrobble({**PILOT, "index": None}), "", ("failed", "validation_failed")), (scrobble({**PILOT, "parentIndex": None}), "", ("failed", "validation_failed")),
    (scrobble({**PILOT, "grandparentTitle": ""}), "", ("failed", "validation_failed")), (scrobble({**PILOT, "parentIndex": 0}), "", None),
    (scrobble(), "", None)])
def test_what_marks_nothing_is_known_at_once(webhook, accounts, expected):
    outcome = sb.first_outcome(webhook, sb.entry_of(webhook, 1.0), accounts)
    assert (outcome and (outcome.status, outcome.action)) == expected
    assert outcome is None or outcome.reason


def test_a_season_is_a_grid_that_fits_80_columns():
    assert sb.season_lines(1, [(1, True), (2, False), (4, True)]) == f"Season 1    {'#. #':50}  2 of 3"
    assert sb.season_lines(202604, [(26041103, True), (26041105, False)]) == f"Season 202604  {'#.':50}  1 of 2"      # by date
    assert sb.season_lines(0, [(3, True)]) == f"Specials    {'  #':50}  1 of 1"
    assert max(map(len, sb.season_lines(12, [(n, True) for n in range(1, 130)]).splitlines())) <= 80


@pytest.mark.parametrize("line, expected", [
    ("x" * 80, "x" * 80), ("x" * 81, "x" * 79 + "…"), ("", ""), ("進" * 40, "進" * 40), ("進" * 41, "進" * 39 + "…"), ("x" + "進" * 40, "x" + "進" * 39 + "…")])
def test_a_line_is_cut_to_80_columns_of_which_a_wide_character_takes_two(line, expected):
    assert sb.cut(line) == expected


def test_entries_that_can_pass_are_tried_for_a_day_less_and_less_often():
    waits = list(itertools.takewhile(lambda wait_s: wait_s is not None, map(sb.retry_after_s, itertools.count())))
    assert waits[:3] == [30, 60, 120] and waits[-1] == 3600 and 80000 < sum(waits) < 90000


TRAKT_SHOW = {"title": "Breaking Bad", "year": 2008, "ids": {"trakt": 1388, "imdb": "tt0903747", "tmdb": 1396, "tvdb": 81189, "plex": {"guid": None}}}
TRAKT_MOVIE = {"title": "Saint", "year": 2010, "ids": {"trakt": 31265, "imdb": None, "tmdb": 45756}}
YAMTRACK_CSV = ('"title","media_id","source","media_type","season_number","episode_number","status","end_date","progressed_at","created_at"\n'
                '"Pilots","7","tmdb","tv","","","In progress","","",""\n"Pilots","7","tmdb","season","1","","In progress","","",""\n'
                '"Pilots","7","tmdb","episode","1","2","","2024-01-15 22:00:00+00:00","2025-01-01 00:00:00+00:00",""\n'
                '"Pilots","7","tmdb","episode","1","2","","","2025-01-01 00:00:00+00:00",""\n'
                '"Saint","7","tmdb","movie","","","Completed","","","2026-07-13 00:49:07.250+02:00"\n'
                '"Own, ""and"" mine","7","manual","episode","1","1","","2024-02-09","",""\n')


def watched(at="2026-04-01T11:10:00.000Z", season=1, number=1, show=TRAKT_SHOW, **more):
    """An entry of Trakt's history."""
    return {"id": 1, "watched_at": at, "action": "scrobble", "type": "episode", "show": show,
            "episode": {"season": season, "number": number, "title": "Pilot", "ids": {"tmdb": 62085, "imdb": "tt0959621"}}, **more}


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    """The bytes of a zip with these files, those that are no bytes as JSON."""
    with zipfile.ZipFile(whole := io.BytesIO(), "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
    return whole.getvalue()


@pytest.mark.parametrize("content", [
    json.dumps([watched()]), "\ufeff \r\n" + json.dumps([watched()], indent=2), zipped({"watched-history.json": [watched()]}),
    zipped({"ratings-movies.json": [{}], "watched-history-10.json": [watched()], "watched-history-9.json": [], "watched-shows.json": [{}]}),
    zipped({"trakt-me/watched/history-1.json": [watched()], "trakt-me/watched/": b"", "_errors.json": []}, zipfile.ZIP_STORED),
    zipped({"history.json": [watched()], "watched-movies.json": b"no JSON", "__MACOSX/._history.json": b"\0"})])
def test_trakts_history_is_recognised_by_what_is_in_the_file(content):
    content = content if isinstance(content, bytes) else content.encode()
    show = sb.Show("episode", "Breaking Bad", 2008, sb.Ids(1396, 81189, "tt0903747"))
    assert sb.read_foreign(content, "f") == ([(show, [(1, 1, "Pilot", (1775041800,))])], [])


@pytest.mark.parametrize("entries, plays", [
    ([watched(), watched()], (1775041800,)), ([watched("2026-04-01T11:11:00.000Z"), watched()], (1775041800,)),
    ([watched("2026-04-01T11:11:01Z"), watched()], (1775041800, 1775041861)),
    ([watched(f"2026-04-01T11:1{minute}:00Z") for minute in (3, 1, 0, 2)], (1775041800, 1775041920)), ([watched("2026-04-01T13:10:00+02:00")], (1775041800,)),
    ([watched(), watched("1970-01-01T00:00:00Z"), watched("1970-12-31T23:59:59Z")], (1775041800, None, None)),
    ([watched("1971-01-01T00:00:00Z"), watched("0001-01-01T00:00:00Z")], (31536000, None)), ([watched("9999-12-31T23:59:59Z")], (sb.LAST_TIME,))])
def test_the_times_of_a_play_in_trakts_history(entries, plays):
    assert sb.read_foreign(json.dumps(entries).encode(), "f")[0][0][1] == [(1, 1, "Pilot", plays)]


def test_each_show_of_trakt_has_its_own_ids_and_no_null_is_an_id():
    nobody = {"title": "Nobody", "year": None, "ids": {"trakt": None, "tmdb": None, "imdb": "", "tvdb": 0}}
    shows = [TRAKT_SHOW, nobody, {**nobody, "title": "Nobody 2"}, {**nobody, "ids": {"trakt": 5, "tmdb": True, "imdb": "0903747"}}, {**nobody, "ids": None}]
    entries = [*(watched(show=show) for show in shows), watched(type="movie", movie=TRAKT_MOVIE, season=None)]
    found, left = sb.read_foreign(json.dumps(entries).encode(), "f")
    assert [(show.type, show.title, show.ids) for show, _ in found] == [
        ("episode", "Breaking Bad", sb.Ids(1396, 81189, "tt0903747")), ("episode", "Nobody", sb.Ids()), ("episode", "Nobody 2", sb.Ids()),
        ("episode", "Nobody", sb.Ids()), ("movie", "Saint", sb.Ids(45756))]
    assert found[-1][1] == [(0, 0, "Saint", (1775041800,))] and found[1][1] == [(1, 1, "Pilot", (1775041800, ))]
    assert left == ["1 left out: a double of another play."]                 # of Nobody: in one file null is null


def test_what_is_left_out_of_a_history_is_counted_and_said():
    entries = [watched(season=2026, number=2**31), *(watched(number=n) for n in (2**31 + 1, -1, 1.5, None, "x", True)), watched(show=None),
               watched(show={"title": ""}), watched(at=None), watched(at="2026-04-01T11:10:00"), watched(at=7), watched(type="season"), 7, None]
    found, left = sb.read_foreign(zipped({"history.json": entries, "_errors.json": [{"file": "watched-history-2"}]}), "f")
    assert [row[:2] for _, rows in found for row in rows] == [(2026, 2**31)]
    assert left == ["The export is incomplete, says its _errors.json: ask Trakt for a new one.", "8 left out: no title, or no season or number.",
                    "3 left out: a time that cannot be read.", "3 left out: neither an episode nor a movie."]


def test_yamtracks_csv_is_read_by_its_columns():
    found, left = sb.read_foreign(b"\xef\xbb\xbf" + YAMTRACK_CSV.replace("\n", "\r\n").encode(), "f")
    assert {show.title: (show.type, show.ids, rows) for show, rows in found} == {
        "Pilots": ("episode", sb.Ids(7), [(1, 2, "", (1705356000, 1735689600))]), "Saint": ("movie", sb.Ids(7), [(0, 0, "Saint", (1783896547,))]),
        'Own, "and" mine': ("episode", sb.Ids(), [(1, 1, "", (1707480000,))])} and left == []     # a day alone: its noon
    rows = ("title,media_id,source,media_type,season_number,episode_number,status,repeats,watch_date\nA,2,tmdb,episode,1,1,,1,2024-02-09\n"
            "A!,2,tmdb,episode,1,2,,0,\nD,,manual,episode,1,1,,,\nE,,manual,episode,1,1,,,\nB,3,tmdb,movie,,,Planning,0,\nC,4,mal,anime,1,1,Completed,0,2024-02-09\nA,2,tmdb,episode,,3,,0,\n")
    found, left = sb.read_foreign(rows.encode(), "f")
    assert found == [(sb.Show("episode", "A", None, sb.Ids(2)), [(1, 1, "", (1707480000, None)), (1, 2, "", (None,))]),
                     (sb.Show("episode", "D"), [(1, 1, "", (None,))]), (sb.Show("episode", "E"), [(1, 1, "", (None,))])]
    assert sorted(left) == ["1 left out: a movie that is not completed.", "1 left out: media such as anime, manga, games and books.",
                            "1 left out: no title, or no season or number."]


NO_HISTORY = "f has no watch history; give Trakt's zip or its watched-history.json, Yamtrack's CSV, or JSON of `tracker export`."


@pytest.mark.parametrize("content, sentence", [
    (b"", NO_HISTORY), (b"Date,Name,Year\n", NO_HISTORY), (b"<html>", NO_HISTORY), (b"[]", NO_HISTORY), (zipped({"watched-shows.json": [{}]}), NO_HISTORY),
    (b'[{"plays": 1, "last_watched_at": "2026-04-01T11:10:00Z", "show": {}}]', f"{NO_HISTORY} 1 left out: neither an episode nor a movie."),
    (b"[1", "f is damaged (Expecting ',' delimiter: line 1 column 3 (char 2)); export it again."),
    (zipped({"history.json": b"7"}), "f is damaged ("),
    (zipped({"history.json": [watched()]})[:-9], "f is damaged (File is not a zip file); export it again."),
    (zipped({"history.json": [watched()]}, zipfile.ZIP_BZIP2), "f is damaged (an unusual compression); export it again."),
    (zipped({"history.json": [watched()]}).replace(b"history.json", b"history\n\33son", 1), "f is damaged (File name in directory 'history.json'"),
    (b"[" * 10**5, "f is damaged (maximum recursion depth exceeded" if sys.version_info < (3, 14) else "f is damaged (Stack overflow"),
    (YAMTRACK_CSV[:-2].encode(), "f is damaged (unexpected end of data); export it again."),
    (YAMTRACK_CSV.encode() + b'"a","b"\n', "f is damaged (a row has too many or too few columns); export it again."),
    (YAMTRACK_CSV.encode() + b",,,,,,,,,,,\n", "f is damaged (a row has too many or too few columns); export it again."),
    (YAMTRACK_CSV.encode() + b'"\xff"\n', "f is damaged ('utf-8' codec can't decode byte 0xff in")], ids=itertools.count())
def test_a_file_that_is_none_of_them_or_damaged_is_refused_in_a_sentence(content, sentence):
    with pytest.raises(sb.ConfigError) as error:
        sb.read_foreign(content, "f")
    assert str(error.value).startswith(f"tracker import: {sentence}") and ("damaged" in sentence) == str(error.value).endswith("; export it again.")


def test_json_of_our_own_form_is_left_to_its_reader():
    assert sb.read_foreign(b'\xef\xbb\xbf\n {"shows": []}', "f") is None


def test_a_zip_cannot_unpack_to_more_than_its_bounds_nor_lie_about_its_sizes(monkeypatch):
    monkeypatch.setattr(sb, "MAX_FILE", 1 << 20)
    monkeypatch.setattr(sb, "MAX_FILES", 2 << 20)
    one, most = b" " * (1 << 19) + json.dumps([watched()]).encode(), b" " * ((1 << 20) - 2) + b"[]"
    assert sb.read_foreign(zipped({"history.json": one, "history-1.json": most}), "f")[0]
    for files in ({"history.json": b" " + most}, {"history-1.json": most, "history-2.json": most, "history-3.json": b"[]"}):
        for lie in (b"\2\0\0\0", b"\xff\xff\xff\0", None):
            size = len(next(iter(files.values()))).to_bytes(4, "little")
            with pytest.raises(sb.ConfigError, match="is damaged"):
                sb.read_foreign(zipped(files).replace(size, lie or size), "f")
    with pytest.raises(sb.ConfigError, match="over 1 MiB in a file, or over 2 MiB in all"):
        sb.read_foreign(zipped(files), "f")
    bomb = zipped({"history.json": bytes(1 << 25)})
    tracemalloc.start()
    try:
        with pytest.raises(sb.ConfigError, match="over 1 MiB"):
            sb.read_foreign(bomb, "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    with pytest.raises(sb.ConfigError, match="has over 1 MiB"):
        sb.read_foreign(most + b" ", "f")


def test_no_mutation_of_a_foreign_history_is_more_than_a_refusal():
    chance, pieces = random.Random(11), [b'"', b"\n", b",", b"[", b"{", b"null", b"-1", b"\0", b"\xff\xff\xff\xff", b"PK\3\4", b"9" * 40, b"\\ud800"]
    sound = [zipped({"a/watched-history-1.json": [watched()], "_errors.json": []}), json.dumps([watched()]).encode(), YAMTRACK_CSV.encode()]
    kinds = collections.Counter()
    for i in range(6000):
        content = bytearray(sound[i % 3])
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(content))
            content[at:at + chance.choice((0, 1, 30))] = chance.choice((*pieces, bytes([chance.randrange(256)]), b""))
        try:
            kinds[bool(sb.read_foreign(bytes(content), "f"))] += 1
        except sb.ConfigError as error:
            assert len(str(error)) < 400 and str(error).isprintable()
    assert kinds[True] > 500


def test_what_is_written_as_trakts_history_is_read_back_to_the_same_plays():
    chance, whole = random.Random(5), []
    for i in range(40):
        show = sb.Show(chance.choice(("episode", "movie")), f"Title {i} \u9032 \"", chance.choice((None, 2008)),
                       sb.Ids(*(chance.choice((None, i + 1)) for _ in range(2)), chance.choice((None, f"tt{i + 1:07}"))))
        places = [(0, 0)] if show.type == "movie" else [(s, n) for s in (0, 1, 2026) for n in chance.sample(range(10**8), 3)]
        times = [(*(10**9 + 61 * at for at in sorted(chance.sample(range(10**7), chance.randrange(1, 4)))), *[None] * chance.randrange(2)) for _ in places]
        whole.append((show, sorted((*place, show.title if show.type == "movie" else "Pilot", each) for place, each in zip(places, times, strict=True))))
    entries = sb.trakt_history([*whole, (sb.Show("episode", "Not watched"), [(1, 1, "", ())])])
    assert [each["watched_at"] for each in entries] == sorted((each["watched_at"] for each in entries), reverse=True)
    assert {each["watched_at"] for each in entries if each["watched_at"] < "1971"} == {"1970-01-01T00:00:00.000Z"}
    assert "null" not in json.dumps([each.get("show", each.get("movie"))["ids"] for each in entries])
    for content in (json.dumps(entries).encode(), zipped({"watched-history-1.json": entries[:50], "watched-history-2.json": entries[50:]})):
        found, left = sb.read_foreign(content, "f")
        assert sorted(found, key=str) == sorted(whole, key=str) and left == []
    movie = next(each for each in entries if each["type"] == "movie")
    assert movie.keys() == {"watched_at", "action", "type", "movie"} and movie["action"] == "watch"


HISTORIES = {"trakt_watched-history.json": (7, 9, ["1 left out: a double of another play."]),
             "import_yamtrack_2024-10.csv": (2, 25, ["3 left out: media such as anime, manga, games and books."]),
             "yamtrack_2026.csv": (1, 1, ["1 left out: a movie that is not completed."]), "letterboxd_diary.csv": None, "letterboxd_watched.csv": None}


@pytest.mark.parametrize("file", captures("history"))
def test_real_histories_are_read_as_far_as_they_are_known(file):
    if (expected := HISTORIES[file.name]) is None:
        with pytest.raises(sb.ConfigError, match="has no watch history"):
            sb.read_foreign(file.read_bytes(), "f")
    else:
        found, left = sb.read_foreign(file.read_bytes(), "f")
        assert (len(found), sum(len(plays) for _, rows in found for *_, plays in rows), left) == expected
        assert all(show.ids.tmdb_id for show, _ in found)


# --- the world

@pytest.mark.parametrize("guid, by, confidence", [
    ("com.plexapp.agents.themoviedb://1396?lang=en", "tmdb_id", "1.00"), ("com.plexapp.agents.thetvdb://81189/1/1?lang=en", "tvdb_id", "0.95"),
    ("com.plexapp.agents.imdb://tt0903747/1/1?lang=en", "imdb_id", "0.95"), ("com.plexapp.agents.hama://tvdb-81189/1/1", "tvdb_id", "0.95")])
def test_a_legacy_guid_marks_the_episode_of_its_show(database, lines, guid, by, confidence):
    with Keeper(database) as keeper:
        keeper.send(legacy(guid, grandparentTitle="Another Title"))
    assert [brief(row) for row in rows(database)] == [("success", "marked_watched", 1, 1, 1)]
    assert lines == [f'<6>webhook status=success action=marked_watched show="Another Title" season=1 episode=1 by={by} confidence={confidence}']
    show, = json.loads(tracker(database, "show", "1", "-json"))
    assert [len(each["watched"]) for each in show["episodes"]] == [0, 1, 1] and show["episodes"][1]["watched"][0].endswith("Z")


@pytest.mark.parametrize("guid, source", [("com.plexapp.agents.thetvdb://777/1/1?lang=en", "tvdb_id"), ("com.plexapp.agents.imdb://tt0000777/1/1", "imdb_id")])
def test_what_only_tmdb_can_say_is_asked_there_once(database, token_file, lines, monkeypatch, guid, source):
    with Library() as tmdb:
        monkeypatch.setenv("STREAMERBRAINZ_TMDB_URL", tmdb.url)
        tmdb.answers["/3/find/777"] = tmdb.answers["/3/find/tt0000777"] = {
            "tv_results": [{"id": 1396}], "tv_episode_results": [{"id": 5, "show_id": 6}], "movie_results": [{"id": 7}]}
        with Keeper(database, "-tmdb-token-file", token_file) as keeper:
            for n in (1, 2):
                keeper.send(legacy(guid, ratingKey=str(n), grandparentRatingKey=str(n), index=n, grandparentTitle="?"))
        assert [brief(row) for row in rows(database)] == [("success", "marked_watched", 1, 1, 1), ("success", "already_watched", 1, 2, 1)]
        assert f"by={source} confidence=0.95" in lines[0] and TOKEN not in "".join(lines)
        assert [request.partition("?")[2] for request in tmdb.requests] == [f"external_source={source}"]


def test_tmdb_that_is_busy_is_asked_again_later(database, token_file, lines, monkeypatch):
    with Library() as tmdb, Keeper(database, "-tmdb-token-file", token_file) as keeper:
        tmdb.answers["/3/find/777"] = 429
        monkeypatch.setenv("STREAMERBRAINZ_TMDB_URL", tmdb.url)
        keeper.send(legacy("com.plexapp.agents.thetvdb://777/1/1"))
        row, = rows(database)
        assert (row["status"], row["action"], row["reason"]) == ("failed", "plex_unreachable", "TMDB answers 429.")
        assert "action=plex_unreachable" in lines[-1]
        tmdb.answers["/3/find/777"] = {"tv_results": [{"id": 1396}]}
        assert 25 < row["retry_at"] - row["received_at"] < 40
        assert keeper.worker.drain() == 0
        due(database)
        assert keeper.worker.drain() == 1
    assert [brief(row) for row in rows(database)] == [("success", "marked_watched", 1, 1, 1)]


def test_a_show_that_nothing_is_like_waits_for_a_person_once(database, lines):
    stranger = {**PILOT, "grandparentTitle": "NonExistent Show XYZ", "grandparentGuid": "plex://show/nonexistent123456"}
    with Keeper(database) as keeper:
        for n in (1, 2):
            keeper.send({**stranger, "ratingKey": str(n), "index": n})
        assert [brief(row) for row in rows(database)] == [("failed", "conflict_created", 1, 1, None), ("failed", "conflict_created", 1, 2, None)]
        conflict, = json.loads(tracker(database, "conflicts", "-json"))
        assert (conflict["kind"], conflict["title"], conflict["waiting"], conflict["candidates"]) == ("no_match", "NonExistent Show XYZ", 2, [])
        assert len([line for line in lines if "conflict_created" in line and not line.startswith("<7>")]) == 1
        assert tracker(database, "resolve", 1, "new").startswith("Conflict 1 is resolved. 2 waiting webhooks were processed.\n")
        assert [brief(row) for row in rows(database)] == [("success", "marked_watched", 1, 1, 3), ("success", "marked_watched", 1, 2, 3)]
        assert tracker(database, "resolve", 1, "new") == "Conflict 1 is resolved. 0 waiting webhooks were processed.\n"
        assert tracker(database, "conflicts") == "No conflicts: nothing is waiting for you.\n"
        keeper.send({**stranger, "ratingKey": "1", "index": 1})        # a duplicate by now
        keeper.send({**stranger, "ratingKey": "3", "index": 2})
        assert [brief(row)[:2] for row in rows(database)[2:]] == [("duplicate", "ignored_duplicate"), ("success", "already_watched")]
    show, = json.loads(tracker(database, "show", "3", "-json"))
    assert [len(each["watched"]) for each in show["episodes"]] == [1, 2]
    assert show["year"] is None                                     # 2008 may be the season's
    first = sb.iso_time(rows(database)[0]["received_at"])
    assert show["episodes"][0]["watched"] == [first]               # at its own time, not at that of the resolution


def test_what_a_person_ignores_stays_ignored(database):
    stranger = {**PILOT, "grandparentTitle": "Braking Bad", "grandparentGuid": None}
    with Keeper(database) as keeper:
        keeper.send(stranger)
        row, = rows(database)
        assert row["reason"] == "ambiguous: Braking Bad (2008) may be Breaking Bad (2008) (0.74)" and row["conflict_id"] == 1
        assert "tracker resolve 1 1   # 0.74 Breaking Bad (2008)\n    tracker resolve 1 new\n    tracker resolve 1 ignore\n" in tracker(database, "conflicts")
        tracker(database, "resolve", 1, "ignore")
        keeper.send({**stranger, "ratingKey": "9"})
        assert [brief(row) for row in rows(database)] == [("ignored", "auto_mark_disabled", 1, 1, None)] * 2
        assert tracker(database, "resolve", 1, 1).startswith("Conflict 1 is resolved")          # another mind
        assert [brief(row)[:2] for row in rows(database)] == [("success", "marked_watched"), ("success", "already_watched")]      # what was ignored, too
        keeper.send({**stranger, "ratingKey": "10"})
        assert brief(rows(database)[2]) == ("success", "already_watched", 1, 1, 1)


def test_what_is_no_finished_episode_is_a_small_row_with_its_reason(database, lines):
    with Keeper(database) as keeper:
        keeper.send(event="media.play")
        keeper.send({**SONG, "Guid": None})
        keeper.send(user=False, Account={"id": 7, "title": "Anna"})
        keeper.send({**PILOT, "index": None})
    found = rows(database)
    assert [(row["status"], row["action"]) for row in found] == [
        ("ignored", "event_not_scrobble"), ("ignored", "not_supported_type"), ("ignored", "other_account"), ("failed", "validation_failed")]
    assert [row["reason"] for row in found] == [
        "only media.scrobble tells that something was finished, not media.play", "only episodes and movies are tracked, not a track",
        "Anna is not the owner of the webhook; -accounts can add others", "the webhook has no episode number"]
    assert 'webhook status=failed action=validation_failed show="Breaking Bad" season=1 episode="" reason=' in lines[-1]
    assert (found[0]["rating_key"], found[0]["guid"], found[0]["show_title"]) == (None, None, None)

    def listed(*words):
        return len(json.loads(tracker(database, "log", "-json", *words)))
    assert [listed(), listed("-status", "ignored"), listed("-show", "breaking"), listed("-last", "1")] == [4, 3, 2, 1]


@pytest.mark.parametrize("metadata", [PILOT, {**PILOT, "ratingKey": "1002", "parentIndex": 0},
                                      {"type": "movie", "ratingKey": "5", "title": "Heat", "year": 1995, "guid": "plex://movie/x"}])
def test_the_same_within_five_minutes_is_one_mark_and_one_duplicate(database, metadata):
    with Keeper(database) as keeper, contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for _ in range(2):
            keeper.send(metadata)
        assert [brief(row)[:2] for row in rows(database)] == [("success", "marked_watched"), ("duplicate", "ignored_duplicate")]
        assert connection.execute("SELECT count(*) FROM play").fetchone() == (2,)
        for earlier_s, found in ((200, ("duplicate", "ignored_duplicate")), (301, ("success", "already_watched"))):
            connection.execute("UPDATE webhook_log SET received_at = received_at - ?", (earlier_s,))
            keeper.send(metadata)
            assert brief(rows(database)[-1])[:2] == found
        first, = connection.execute("SELECT received_at FROM webhook_log WHERE id = 1").fetchone()
        assert connection.execute("SELECT max(watched_at), sum(plays) FROM watched").fetchone() == (int(first + 501), 3)


def test_a_file_with_two_episodes_marks_both(database):
    with Keeper(database) as keeper:
        for n in (1, 2):
            keeper.send({**PILOT, "ratingKey": f"100{n}", "index": n})
    assert [brief(row)[1:4] for row in rows(database)] == [("marked_watched", 1, 1), ("already_watched", 1, 2)]


def test_a_failure_blocks_no_retry_and_nothing_is_marked_where_that_is_switched_off(database):
    with Keeper(database, "-no-auto-mark-watched") as keeper:
        for n in (99, 1):
            keeper.send({**PILOT, "index": n})
    assert [brief(row) for row in rows(database)] == [("failed", "conflict_created", 1, 99, None), ("ignored", "auto_mark_disabled", 1, 1, 1)]
    with Keeper(database) as keeper:
        keeper.send()
    assert brief(rows(database)[2]) == ("success", "marked_watched", 1, 1, 1)


@pytest.mark.parametrize("xml", [False, True])
def test_the_servers_ids_find_the_show_and_its_new_episodes(database, token_file, lines, xml):
    with Library(xml) as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.answers["/library/metadata/1000"] = {"Metadata": [
            {"ratingKey": "1000", "guid": "plex://show/bb", "title": "Breaking Bad: La Serie", "year": 2008, "Guid": [{"id": "tmdb://1396"}]}]}
        library.answers["/library/metadata/1000/allLeaves"] = {"Metadata": [{"parentIndex": 1, "index": n, "title": f"E{n}"} for n in range(1, 8)]}
        keeper.send({**PILOT, "index": 7, "grandparentTitle": "Something else"})
        assert brief(rows(database)[0]) == ("success", "marked_watched", 1, 7, 1)
        assert [request.partition("?")[0] for request in library.requests if "metadata" in request] == [
            "/library/metadata/1000", "/library/metadata/1000/allLeaves"]
        library.answers.pop("/library/metadata/1000")
        keeper.send({**PILOT, "ratingKey": "1", "grandparentTitle": "Something else"})      # by the mapping now
        assert brief(rows(database)[1]) == ("success", "marked_watched", 1, 1, 1)
        assert "by=mapping confidence=1.00" in lines[-1]
        rebuilt = {**PILOT, "ratingKey": "2", "grandparentTitle": "A Show Unheard Of", "grandparentGuid": "plex://show/other"}
        keeper.send(rebuilt)                               # another show has that key now
        assert brief(rows(database)[2])[:2] == ("failed", "conflict_created")
        assert TOKEN not in "".join(lines)


def test_another_servers_keys_are_not_asked_of_ours(database, token_file):
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.answers["/library/metadata/1000"] = {"Metadata": [{"title": "Wrong", "Guid": [{"id": "tmdb://1396"}]}]}
        keeper.send({**PILOT, "grandparentTitle": "A Show Unheard Of"}, Server={"uuid": "f" * 40})
        assert brief(rows(database)[0])[:2] == ("failed", "conflict_created")
        assert not [request for request in library.requests if "metadata" in request]


def test_a_legacy_show_is_known_by_its_key_after_an_import(tmp_path, token_file, lines):
    path = tmp_path / "t.db"
    with Library() as library:
        shows, leaves = library_of(library, 1)
        shows[0].update(guid="com.plexapp.agents.thetvdb://81189?lang=en", Guid=[])
        leaves[0]["guid"] = "com.plexapp.agents.thetvdb://81189/1/1?lang=en"
        brought(path, library, token_file)
    with Keeper(path) as keeper:
        keeper.send(legacy("com.plexapp.agents.thetvdb://81189/1/3?lang=en", index=3))
        assert "by=mapping" in lines[-1]
        keeper.send(legacy("com.plexapp.agents.thetvdb://999/1/4?lang=en", index=4, ratingKey="4", grandparentTitle="?"))
    assert rows(path)[1]["action"] == "conflict_created"   # another show has that key now


@pytest.mark.parametrize("answer, fault", [(503, "starting"), (401, "refused")])
def test_a_server_that_is_down_is_asked_again_and_the_show_is_not_guessed(database, token_file, answer, fault):
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.answers["/library/metadata/1000"] = answer
        keeper.send()
        assert brief(rows(database)[0])[:2] == ("failed", "plex_unreachable") and keeper.worker.down.fault == fault
        library.answers["/library/metadata/1000"] = {"Metadata": [{"guid": "plex://show/bb", "Guid": [{"id": "tmdb://1396"}]}]}
        due(database)
        assert keeper.worker.drain() == 1
    assert brief(rows(database)[0]) == ("success", "marked_watched", 1, 1, 1)


def test_a_show_of_certain_identity_is_added_with_its_episodes_where_that_is_wanted(database, token_file):
    metadata = {**PILOT, "grandparentTitle": "Severance", "grandparentRatingKey": "7", "grandparentGuid": "plex://show/sev", "index": 2}
    with Library() as library, Keeper(database, *server_flags(library, token_file), "-auto-add-shows") as keeper:
        library.answers["/library/metadata/7"] = {"Metadata": [{"guid": "plex://show/sev", "title": "Severance", "year": 2022,
                                                                "Guid": [{"id": "tmdb://95396"}, {"id": "tvdb://371980"}]}]}
        library.answers["/library/metadata/7/allLeaves"] = {"Metadata": [{"parentIndex": 1, "index": n, "title": f"E{n}"} for n in range(1, 10)]}
        keeper.send(metadata)
        assert brief(rows(database)[0]) == ("success", "auto_added_show", 1, 2, 3)
        unknown = {**metadata, "grandparentTitle": "Nobody Knows", "ratingKey": "8", "grandparentRatingKey": "8",
                   "grandparentGuid": "plex://show/nk"}
        keeper.send(unknown)                               # no ids: not certain
        assert brief(rows(database)[1])[:2] == ("failed", "conflict_created")
    show, = json.loads(tracker(database, "show", "3", "-json"))
    assert (show["title"], show["year"], show["tmdb_id"], show["tvdb_id"], len(show["episodes"])) == ("Severance", 2022, 95396, 371980, 9)


def test_what_the_history_has_and_no_webhook_told_is_recovered_once(database, token_file):
    now = int(time.time())

    def note(*value):
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            if value:
                connection.execute("UPDATE note SET value = ? WHERE name = 'history'", value)
            return int(connection.execute("SELECT value FROM note WHERE name = 'history'").fetchone()[0])
    note(str(now - 9000))
    play = {"type": "episode", "ratingKey": "1001", "grandparentKey": "/library/metadata/1000", "title": "Pilot", "grandparentTitle": "Breaking Bad",
            "parentIndex": 1, "index": 1, "accountID": 1, "viewedAt": now - 7200}
    plays = [play, {**play, "ratingKey": "1009", "accountID": 2}, {**play, "ratingKey": "1008", "type": "track"},
             {**play, "ratingKey": "1007", "parentIndex": 0, "viewedAt": now - 1}]
    with Library() as library:
        library.pages("/status/sessions/history/all", plays)
        for _ in range(2):
            with Keeper(database, *server_flags(library, token_file)) as keeper:
                assert keeper.worker.recover()
                keeper.worker.drain()
                assert [brief(row) for row in rows(database)] == [("success", "recovered", 1, 1, 1)]
        asked = [request for request in library.requests if "history" in request]
        assert asked[-1].startswith(f"/status/sessions/history/all?sort=viewedAt:asc&viewedAt%3E={now - 7200}&")
        with Keeper(database, *server_flags(library, token_file)) as keeper:        # ... nor what a webhook told
            keeper.send({**PILOT, "ratingKey": "1002", "index": 2})
            assert brief(rows(database)[1])[:2] == ("success", "already_watched")
            plays.append({**play, "ratingKey": "1002", "index": 2, "viewedAt": now - 100})
            assert keeper.worker.recover() and note() == now - 100
            assert len(rows(database)) == 2
    show, = json.loads(tracker(database, "show", "1", "-json"))
    assert show["episodes"][1]["watched"] == [sb.iso_time(now - 7200)] and len(show["episodes"][2]["watched"]) == 2


def test_a_hook_is_told_what_was_marked_as_watched_once(database, tmp_path):
    hook, told = tmp_path / "hook", tmp_path / "told"
    hook.write_text(f'#!/bin/sh\necho "$PLAYER_EVENT|$NAME|$SHOW|$SEASON|$EPISODE|$PLEX_RATING_KEY|$ARTISTS" >> {told}\n')
    hook.chmod(0o755)
    with Process(*flags(database), "-on-event", hook) as daemon:
        for more in ({}, {"ratingKey": "2", "index": 2}, {"ratingKey": "5", "type": "movie", "title": "Heat", "year": 1995, "grandparentTitle": None, "Guid": []}):
            assert send(daemon, {**PILOT, **more}) == 200               # the second was watched before
        eventually(lambda: told.exists() and told.read_text().count("\n") == 2)
    assert told.read_text().splitlines() == ["watched|Pilot|Breaking Bad|1|1|1001|", "watched|Heat||||5|"]


def test_what_is_marked_by_hand_in_plex_is_found_once_with_one_page_when_nothing_is_new(database, token_file):
    now = int(time.time())
    marks = [{**PILOT, "viewCount": 1, "lastViewedAt": now - 90000}, {**PILOT, "ratingKey": "7", "index": 9, "viewCount": 1}]      # ticked whole: no time
    fresh = {**PILOT, "ratingKey": "1002", "index": 2, "viewCount": 2, "lastViewedAt": now - 80000}
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.answers["/library/sections"] = {"Metadata": [{"key": "1", "type": "show"}, {"key": "2", "type": "movie"}, {"key": "3", "type": "artist"}]}
        library.pages("/status/sessions/history/all", [])
        library.pages("/library/sections/1/all", marks)
        library.pages("/library/sections/2/all", [])

        def read():
            library.requests.clear()
            assert keeper.worker.recover()
            keeper.worker.drain()
            return [row["action"] for row in rows(database)], len([request for request in library.requests if "/all?type" in request])
        assert read() == ([], 2)                                        # the first time it is only noted how far it came
        marks.insert(0, fresh)
        assert read() == (["marked_in_plex"], 2) == read()
        assert plays(database) == [0, 0, 2]
        keeper.send()
        for n, more in enumerate(({}, {"viewOffset": 9000}, {"index": 2, "viewCount": 2}, {"lastViewedAt": now + 90}, {"type": "clip"})):      # told by a webhook; begun; begun; later; a clip
            marks.insert(0, {**PILOT, "ratingKey": f"{n or 1001}", "viewCount": 5, "lastViewedAt": now - 70 + n, **more})
        marks[:] = sorted(marks, key=lambda each: -each.get("lastViewedAt", 0))
        assert read() == (["marked_in_plex", "marked_watched"], 2)
        marks.insert(0, {**PILOT, "ratingKey": "55", "title": "Heat", "type": "movie", "lastViewedAt": 5, "viewCount": 1})
        assert read()[0] == ["marked_in_plex", "marked_watched"]        # not sorted: an unknown word is ignored in silence
    with Library() as library, Keeper(database, *server_flags(library, token_file), "-accounts", "7") as keeper:
        library.pages("/status/sessions/history/all", [])
        assert keeper.worker.recover() and not [request for request in library.requests if "sections" in request]


def test_a_kill_between_the_answer_and_the_mark_loses_and_doubles_nothing(database):
    sent = 0
    for delay_s, burst in itertools.product((0, 0.0005, 0.002, 0.005, 0.02), (1, 3, 8)):
        with Process(*flags(database)) as daemon:
            for _ in range(burst):
                sent += 1
                assert send(daemon, {**PILOT, "ratingKey": str(sent), "Account": None}, Account={"id": sent, "title": "x"}) == 200
            time.sleep(delay_s)                            # in no row, in the middle of one, or between two
            daemon.process.kill()
    with Process(*flags(database)):
        found = done(database, sent)
    assert [row["status"] for row in found] == ["success"] * sent and [row["action"] for row in found].count("marked_watched") == 1
    assert plays(database)[1] == sent


@pytest.fixture
def store(database):
    """The tracker of `database`, opened."""
    tracker = sb.Tracker(str(database))
    yield tracker
    tracker.close()


def finish(store, plex=None, metadata=PILOT, words=(), **more):
    """What a worker makes of a webhook."""
    worker = sb.Worker(config("-tracker-db", store.path, *words), store, plex)
    with store.transaction():
        store.add_entry(sb.entry_of(scrobble(metadata, **more), time.time()), None)
    worker.drain()
    return tuple(store.one("SELECT status, action, show_id FROM webhook_log ORDER BY id DESC LIMIT 1"))


@pytest.mark.parametrize("one, two", [("Part 1", "Part 2"), ("Part One", "Part Two"), ("Episode II", "Episode III"), ("Vol. 2", "Vol. 3"), ("", "2")])
def test_titles_that_differ_in_a_number_are_never_taken_for_one_another(store, one, two):
    title = "Harry Potter and the Deathly Hallows: "
    with store.transaction():
        store.add_show(sb.Show("movie", title + one, 2010))
    movie = {"type": "movie", "ratingKey": "5", "title": title + two, "year": 2011, "guid": "plex://movie/x"}
    assert finish(store, metadata=movie) == ("failed", "conflict_created", None)


@pytest.mark.parametrize("title, year, known", [("You (2018)", None, "You"), ("24", 2001, "24 (2001)"), ("The Office", 2005, "The Office (US)")])
def test_short_titles_meet_their_qualified_form(store, title, year, known):
    with store.transaction():
        show_id = store.add_show(sb.Show("episode", known, year or 2018))
        store.add_episodes(show_id, [(1, 1, "")])
    assert finish(store, metadata={**PILOT, "grandparentTitle": title, "year": year or 2018})[2] == show_id


def test_castle_and_castle_2009_are_two_shows(store):
    with store.transaction():
        for title, year in (("Castle", 2003), ("Castle (2009)", None)):
            store.add_show(sb.Show("episode", title, year))
    assert finish(store, metadata={**PILOT, "grandparentTitle": "Castle", "year": 2012})[:2] == ("failed", "conflict_created")
    assert "ambiguous" in store.one("SELECT kind FROM conflict")["kind"]
    assert sb.upsert_show(store, sb.Show("episode", "The Office (US)")) != sb.upsert_show(store, sb.Show("episode", "The Office (UK)"))


def test_the_season_and_those_that_the_tracker_has_tell_whether_a_year_fits(store):
    with store.transaction():
        for title, year, seasons in ("Prison Break", 2005, 5), ("Frasier", 1993, 11), ("Futurama", 1999, 0):
            show_id = store.add_show(sb.Show("episode", title, year))
            store.add_episodes(show_id, [(season, 1, "") for season in range(1, seasons + 1)])
    watched = {**PILOT, "parentIndex": 5, "index": 1, "year": 2017}
    assert finish(store, metadata={**watched, "grandparentTitle": "Prison Break"})[:2] == ("success", "marked_watched")
    for title, season, year in (("Frasier", 2, 2024), ("Futurama", 8, 2023)):
        other = {**watched, "grandparentTitle": title, "parentIndex": season, "year": year, "grandparentRatingKey": title, "grandparentGuid": ""}
        assert finish(store, metadata=other) == ("failed", "conflict_created", None), title


def test_an_episodes_guid_in_another_database_is_none_of_its_show(store):
    with store.transaction():
        other = store.add_show(sb.Show("episode", "Other", 2001, sb.Ids(62085)))
        store.add_episodes(other, [(1, 1, "")])
    assert finish(store, metadata={**PILOT, "guid": "tmdb://62085", "grandparentGuid": None}) == ("success", "marked_watched", 1)


def test_an_id_that_a_surer_one_contradicts_is_not_believed(store):
    assert store.match_ids(sb.Show("episode", "?", ids=sb.Ids(1396))) == sb.Match(1, "tmdb_id", 1.0)
    asked = store.match_ids(sb.Show("episode", "?", ids=sb.Ids(1396, 5)))            # two shows of Plex may have one id at TMDB
    assert (asked.kind, [(each.show.id, each.score) for each in asked.candidates]) == ("ambiguous", [(1, 1.0)])
    assert store.match_ids(sb.Show("episode", "?", ids=sb.Ids(999, 81189))) is None


def test_a_title_and_a_rating_key_that_look_alike_are_two_things(store):
    with store.transaction():
        store.map(sb.Entry(1.0, "", SERVER, type="episode", show_key="24"), sb.Match(1, "title", 1.0))
    assert finish(store, metadata={**PILOT, "grandparentTitle": "24", "grandparentRatingKey": None, "grandparentGuid": None})[1] == "conflict_created"


def test_another_guid_of_plexs_on_the_same_server_is_another_show(store):
    with store.transaction():
        store.map(sb.Entry(1.0, "", SERVER, type="episode", show_key="3", show_guid="plex://show/three"), sb.Match(1, "import", 1.0))
    assert finish(store, metadata={**PILOT, "year": None})[1] == "conflict_created"
    assert finish(store, metadata={**PILOT, "ratingKey": "2", "year": None}, Server={"uuid": "f" * 40})[1] == "marked_watched"


def test_a_key_that_another_show_has_now_takes_no_mark_and_no_answer_of_the_first_along(store):
    first, other = ({**PILOT, "grandparentTitle": title, "grandparentGuid": f"plex://show/{title}", "grandparentRatingKey": "7", "year": None}
                    for title in ("Dawn", "Dusk"))
    with store.transaction():
        ids = [store.add_show(sb.Show("episode", title)) for title in ("Dawn of Days", "Dusk of Days")]
    assert finish(store, metadata=first)[1] == "conflict_created"
    with store.transaction():
        store.resolve(1, ids[0])
    sb.Worker(sb.Config(), store, None).drain()
    assert finish(store, metadata={**other, "ratingKey": "2"})[1] == "conflict_created"       # the library was built anew
    with store.transaction():
        assert store.resolve(2, 0) == 0
    sb.Worker(sb.Config(), store, None).drain()
    assert [tuple(row) for row in store.all("SELECT show_id, count(*) FROM play WHERE entry_id NOT NULL GROUP BY show_id")] == [(ids[0], 1)]
    again = {"grandparentRatingKey": "8"}                      # both answers are known by Plex's guid, whatever the key
    assert finish(store, metadata={**other, "ratingKey": "3", **again})[1] == "auto_mark_disabled"
    with store.transaction():                                  # and a third show has the key of the one that is ignored
        store.map(sb.Entry(1.0, "", SERVER, type="episode", show_key="7", show_guid="plex://show/third"), sb.Match(ids[1], "import", 1.0))
    assert finish(store, metadata={**other, "ratingKey": "4", **again})[1] == "auto_mark_disabled"
    assert finish(store, metadata={**first, "ratingKey": "5", "index": 2, **again})[1] == "marked_watched"
    aside = store.one("SELECT id FROM mapping WHERE guid = 'plex://show/Dusk'")[0]             # another mind: both are done anew
    with store.transaction():
        store.remap(aside, ids[1])
    assert sb.Worker(sb.Config(), store, None).drain() == 3
    assert store.one("SELECT count(*) FROM play WHERE mapping_id = ?", aside)[0] == 3


def test_an_episode_is_looked_up_without_a_look_at_all_plays(store):
    with store.transaction():
        store.connection.executemany("INSERT INTO play VALUES (NULL, 2, 0, 0, ?, 'import', NULL, NULL)", [(at,) for at in range(5000)])
    steps = []                                                 # of SQLite's machine, in thousands
    store.connection.set_progress_handler(lambda: steps.append(1), 1000)
    assert store.episode(1, 1, 1)["plays"] == 0 and store.episode(2, 0, 0)["plays"] == 5000
    steps.clear()
    assert (store.episode(1, 1, 1)["title"], store.episode(1, 1, 99), steps) == ("Pilot", None, [])


def mappings(path, *words):
    """Each mapping: the server's title, our show's id, and by what."""
    return [(each["title"], each["show_id"], each["by"]) for each in json.loads(tracker(path, "mappings", *words, "-json"))]


def test_a_title_is_remembered_only_where_the_episode_is_there_and_was_marked(database):
    with Keeper(database, "-no-auto-mark-watched") as keeper:
        keeper.send()
        assert rows(database)[0]["action"] == "auto_mark_disabled" and mappings(database) == []
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "ratingKey": "2", "index": 9})
        assert rows(database)[1]["reason"] == "ambiguous: Breaking Bad (2008) may be Breaking Bad (2008) (1.00), which lacks this episode" and mappings(database) == []
        keeper.send({**PILOT, "ratingKey": "3"})
        assert brief(rows(database)[2])[:2] == ("success", "marked_watched") and mappings(database) == [("Breaking Bad", 1, "title")]


@pytest.mark.parametrize("told, action, mapped", [
    ({"Guid": [{"id": "tmdb://1396"}]}, "already_watched", ("Breaking Bad", 1, "tmdb_id")),                # proved
    ({"Guid": [{"id": "tmdb://2"}]}, "conflict_created", ("Breaking Bad", 1, "title")), ({"year": 2024}, "conflict_created", ("Breaking Bad", 1, "title")),
    ({"Guid": [{"id": "tmdb://1396"}, {"id": "tvdb://5"}]}, "conflict_created", ("Breaking Bad", 1, "title")), ({}, "already_watched", ("Breaking Bad", 1, "title"))])
@pytest.mark.parametrize("by", ["title", "earlier"])
def test_what_a_title_said_is_doubted_where_ids_or_years_say_otherwise(database, token_file, told, action, mapped, by):
    with Keeper(database) as keeper:
        keeper.send()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE mapping SET by = ?, at = 1", (by,))
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.answers["/library/metadata/1000"] = {"Metadata": [{"guid": PILOT["grandparentGuid"], "title": "Breaking Bad", **told}]}
        keeper.send({**PILOT, "ratingKey": "2", "index": 2})
        assert rows(database)[1]["action"] == action
        assert mappings(database) == [mapped if mapped[2] != "title" else ("Breaking Bad", 1, by)]
        library.answers["/library/metadata/1000"] = 500                                                    # what was doubted stays so
        keeper.send({**PILOT, "ratingKey": "3", "index": 2})
        assert rows(database)[2]["action"] == action
        if action == "conflict_created":
            assert "1 play moved" in tracker(database, "resolve", 1, "new") and plays(database) == [0, 0, 1] and plays(database, 3) == [1, 2]
            library.answers["/library/metadata/1000"] = {"Metadata": [{"title": "Breaking Bad", "year": 2008, "Guid": [{"id": "tmdb://1396"}]}]}
            keeper.send({**PILOT, "ratingKey": "4", "index": 2})
            assert brief(rows(database)[3]) == ("success", "already_watched", 1, 2, 3)                      # a person's answer is not doubted


def test_a_certain_id_vouches_for_an_episode_that_the_tracker_lacks(database):
    guid = "com.plexapp.agents.thetvdb://81189/6/{}?lang=en"
    with Keeper(database) as keeper:
        for n in (1, 2):
            keeper.send(legacy(guid.format(n), ratingKey=str(n), parentIndex=6, index=n, title=f"New {n}"))
        assert [brief(row) for row in rows(database)] == [("success", "marked_watched", 6, n, 1) for n in (1, 2)]
    assert [each["title"] for each in json.loads(tracker(database, "show", 1, "-json"))[0]["episodes"][3:]] == ["New 1", "New 2"]


def test_an_answer_teaches_the_ids_that_came_with_it_but_moves_none(database, token_file):
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        for key, ids in (("7", ["tmdb://777", "tvdb://888"]), ("8", ["tmdb://777", "tvdb://999"])):
            library.answers[f"/library/metadata/{key}"] = {"Metadata": [{"title": f"Show {key}", "Guid": [{"id": each} for each in ids]}]}
            keeper.send({**PILOT, "ratingKey": key, "grandparentTitle": f"Show {key}", "grandparentRatingKey": key, "grandparentGuid": f"plex://show/{key}"})
        tracker(database, "resolve", 1, "new")
        tracker(database, "resolve", 2, 1)                              # contradicts both: nothing is learned
        keeper.send({**PILOT, "ratingKey": "9", "index": 5, "grandparentTitle": "?", "grandparentRatingKey": "9", "grandparentGuid": "com.plexapp.agents.thetvdb://888"})
    shows = json.loads(tracker(database, "export"))["shows"]
    assert [(show["tmdb_id"], show["tvdb_id"]) for show in shows] == [(1396, 81189), (777, 888)] and rows(database)[2]["show_id"] == 3


def test_a_library_that_is_built_anew_asks_nothing_and_what_is_ignored_stays_so(tmp_path, token_file):
    path = tmp_path / "t.db"
    with Library() as library:
        shows, leaves = library_of(library, 2, 1, 3)
        for each in shows:
            each["Guid"] = []
        brought(path, library, token_file)
        tracker(path, "map", 2, "ignore")
        for each in (*shows, *leaves):                                  # other keys, a film has one of the old
            each.update({key: str(int(each[key]) + 1) for key in ("ratingKey", "grandparentRatingKey") if key in each}, title="Other " + each["title"])
        library.answers["/identity"] = {"machineIdentifier": "f" * 40}
        assert brought(path, library, token_file).startswith("The tracker now has 2 shows, 6 episodes and 1 movie.\n")
        assert tracker(path, "conflicts") == "No conflicts: nothing is waiting for you.\n" and ("Show 1001", None, "person") in mappings(path)


def test_two_shows_with_one_id_at_tmdb_and_two_at_tvdb_are_a_question(tmp_path, token_file):
    path = tmp_path / "t.db"
    with Library() as library:
        shows, _ = library_of(library, 2, 1, 3)
        for n, each in enumerate(shows):
            each["Guid"] = [{"id": "tmdb://5"}, {"id": f"tvdb://{n + 1}"}]
        for _ in range(2):
            assert brought(path, library, token_file).startswith("The tracker now has 1 show, 3 episodes and 1 movie.\n")
        conflict, = json.loads(tracker(path, "conflicts", "-json"))
        assert (conflict["title"], [each["title"] for each in conflict["candidates"]]) == ("Show 1001", ["Show 1000"])
        tracker(path, "resolve", 1, "new")
        for _ in range(2):
            assert brought(path, library, token_file).startswith("The tracker now has 2 shows, 6 episodes and 1 movie.\n")
        assert mappings(path)[1:] == [("Heat", 2, "import"), ("Show 1001", 3, "person")]


def test_a_local_guid_proves_nothing(store):
    local = {**PILOT, "grandparentGuid": "local://1000", "guid": "local://1001"}
    assert finish(store, metadata=local)[1] == "marked_watched"
    assert finish(store, metadata={**local, "ratingKey": "2", "index": 2})[1] == "already_watched"
    assert finish(store, metadata={**local, "ratingKey": "3", "grandparentTitle": "Another"})[1] == "conflict_created"     # the key of an older library


def test_two_servers_may_have_the_same_key(store):
    assert finish(store)[1] == "marked_watched"
    other = {**PILOT, "grandparentTitle": "Unheard Of", "grandparentGuid": "plex://show/other"}
    assert finish(store, metadata=other, Server={"uuid": "f" * 40})[1] == "conflict_created"
    moved = {**PILOT, "ratingKey": "77", "index": 2, "grandparentTitle": "?", "grandparentRatingKey": "78"}
    assert finish(store, metadata=moved, Server={"uuid": "e" * 40}) == ("success", "already_watched", 1)      # by Plex's guid of the show, on any server


def test_what_a_person_resolves_meanwhile_is_heeded(store, database):
    class Slow:
        """A server, during whose answer a person resolves the conflict."""
        @property
        def server_id(self):
            return "0" * 40

        def items(self, path):
            other = sb.Tracker(str(database))
            with other.transaction():
                other.map(sb.Entry(1.0, "", SERVER, type="episode", show_key="1000", show_guid="plex://show/bb"), sb.Match(1, "mapping", 1.0))
            other.close()
            return iter(())
    assert finish(store, Slow(), {**PILOT, "grandparentTitle": "Unheard Of"}) == ("success", "marked_watched", 1)
    assert store.all("SELECT id FROM conflict") == []


def test_an_entry_that_another_process_finished_meanwhile_is_not_finished_twice(store, database, lines):
    class Slow:
        """A server, during whose answer another process finishes the entry."""
        @property
        def server_id(self):
            other = sb.Tracker(str(database))
            assert sb.Worker(config("-tracker-db", "x"), other, None).drain() == 1
            other.close()
            return "0" * 40

        def items(self, path):
            return iter(())
    assert finish(store, Slow()) == ("success", "marked_watched", 1)
    assert plays(database)[1] == 1 and len([line for line in lines if "action=" in line]) == 1


@pytest.mark.parametrize("accounts, ids", [("", {"1"}), ("*", None), ("Anna, 12", {"anna", "12", "7"}), ("Nobody", {"nobody"}), ("139", {"139", "1"})])
def test_accounts_are_known_to_the_history_by_their_ids(store, token_file, accounts, ids):
    with Library() as library:
        library.answers["/accounts"] = {"Metadata": [{"id": 1, "name": "me"}, {"id": 7, "name": "Anna"}]}
        plex = sb.PlexServer(library.url, secret_file(token_file).first)
        worker = sb.Worker(config("-tracker-db", "x", "-accounts", accounts), store, plex)
        finish(store, Account={"id": 139, "title": "Me"})               # the owner's id at plex.tv, in a webhook
        assert worker.accounts(worker.plex) == ids
        del library.answers["/accounts"]
        assert worker.accounts(worker.plex) == (ids if accounts in ("", "*") else {each.strip().lower() for each in accounts.split(",")})


@pytest.mark.parametrize("answer", [404, 403, 500])
def test_a_server_without_a_history_is_no_error(store, token_file, lines, answer):
    with Library() as library:
        library.answers["/status/sessions/history/all"] = answer
        assert sb.Worker(config("-tracker-db", "x"), store, sb.PlexServer(library.url, secret_file(token_file).first)).recover()
    assert [line for line in lines if not line.startswith("<7>")] == []


def test_a_movie_is_found_by_tmdb_and_added_where_that_is_wanted(store, token_file, monkeypatch):
    movie = {"type": "movie", "ratingKey": "5", "title": "Hitze", "year": 1995, "guid": "com.plexapp.agents.imdb://tt0113277?lang=de"}
    with Library() as tmdb:
        tmdb.answers["/3/find/tt0113277"] = {"tv_results": [{"id": 7}], "movie_results": [{"id": 949}]}
        monkeypatch.setenv("STREAMERBRAINZ_TMDB_URL", tmdb.url)
        assert finish(store, metadata=movie, words=("-tmdb-token-file", str(token_file))) == ("success", "marked_watched", 2)
    other = {**movie, "ratingKey": "6", "guid": "com.plexapp.agents.imdb://tt0078748", "title": "Alien", "year": 1979}
    assert finish(store, metadata=other, words=("-auto-add-shows",)) == ("success", "auto_added_show", 3)
    assert finish(store, metadata={**other, "ratingKey": "7"}) == ("success", "already_watched", 3)


def test_the_cli_leaves_to_the_daemon_what_is_the_daemons(database):
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("INSERT INTO conflict (created_at, kind, server, type, subject, guid, title, candidates) "
                           "VALUES (1, 'no_match', '', 'episode', 'key:9', '', 'X', '[]')")
    store = sb.Tracker(str(database))
    with store.transaction():
        store.add_entry(sb.entry_of(scrobble(), 1.0), None)
    store.close()
    assert tracker(database, "resolve", 1, "ignore") == "Conflict 1 is resolved. 0 waiting webhooks were processed.\n"
    assert [row["status"] for row in rows(database)] == ["waiting"]


def test_a_file_that_is_damaged_or_deleted_meanwhile_is_503_and_the_daemon_lives(database):
    with Process(*flags(database)) as daemon:
        assert send(daemon) == 200
        done(database)
        database.rename(database.with_name("away.db"))
        assert send(daemon, {**PILOT, "ratingKey": "2"}) == 503
        eventually(lambda: "was deleted; put it back, or restart StreamerBrainz." in daemon.text())
        assert daemon.process.poll() is None and "Traceback" not in daemon.text()
        database.with_name("away.db").rename(database)
        eventually(lambda: send(daemon, {**PILOT, "ratingKey": "2"}) == 200)
        assert [row["rating_key"] for row in done(database, 2)] == ["1001", "2"]


@contextlib.contextmanager
def working(worker, journal):
    """The worker in its thread."""
    def run():
        with contextlib.suppress(SystemExit):
            worker.run(journal.written)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    worker.drain = sys.exit                                # ends the thread
    journal.written.set()
    thread.join(10)
    assert not thread.is_alive()


PAGE = 4096


def overwrite(path, content, *pages):
    with open(path, "r+b") as file:
        for page in pages or range(path.stat().st_size // PAGE):
            file.seek(page * PAGE)
            file.write(content)


@pytest.mark.parametrize("damage", [
    lambda path: overwrite(path, b"\xff" * PAGE, 0), lambda path: overwrite(path, bytes(PAGE), 0, 1, 2), lambda path: overwrite(path, b"\xff" * 9, *range(1, 9)),
    lambda path: os.truncate(path, 5 * PAGE + 7), lambda path: overwrite(path, b"\x99\x98" * 20, *range(1, 9)), lambda path: sqlite3.connect(path).execute("PRAGMA application_id = 5"),
    lambda path: sqlite3.connect(path).execute("UPDATE note SET value = 'abc'").connection.commit(),
    lambda path: sqlite3.connect(path).execute("DROP TABLE webhook_log")])
def test_a_daemon_that_starts_with_a_damaged_tracker_reports_what_plays_and_goes_on_with_a_good_one(database, damage, lines, monkeypatch):
    monkeypatch.setattr(sb, "REOPEN_S", 0.05)
    monkeypatch.setattr(sb, "TRACKER_RETRY_S", 0.05)
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "ratingKey": "0"})
    good = database.read_bytes()
    damage(database)
    tracker = sb.Tracker(str(database), create=True, patient=True)
    journal, worker = sb.Journal(tracker, ""), sb.Worker(config("-tracker-db", str(database)), tracker, None)
    with Site(journal=journal) as listener, working(worker, journal):
        listener.pages.glance = functools.partial(sb.glance, tracker)
        codes = [send(listener, {**PILOT, "ratingKey": str(i)}) for i in range(5)]
        heard = [listener.inbox.get() for _ in range(listener.inbox.qsize())]
        assert set(codes) <= {200, 503} and sum(isinstance(each, sb.Webhook) for each in heard) == 5
        if damage.__code__.co_names[0] == "overwrite" or set(codes) == {503}:
            eventually(lambda: any(line.startswith("<3>") and str(database) in line for line in lines))
        for end in ("-wal", "-shm"):
            database.with_name(database.name + end).unlink(missing_ok=True)
        (fresh := database.with_name("good")).write_bytes(good)
        fresh.rename(database)
        eventually(lambda: send(listener, {**PILOT, "ratingKey": "9"}) == 200)
        eventually(lambda: get(listener, "/healthz")[0] == 200)
        eventually(lambda: [row["rating_key"] for row in rows(database) if row["status"] == "success"])
    tracker.close()


def test_a_tracker_that_is_locked_at_the_start_is_opened_later_but_only_for_the_daemon(database, monkeypatch):
    monkeypatch.setattr(sb, "DATABASE_S", 0.05)
    monkeypatch.setattr(sb, "REOPEN_S", 0.0)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        journal = sb.Journal(sb.Tracker(str(database), create=True, patient=True), "")
        for wrong in (lambda: journal.append(scrobble()), lambda: sb.Tracker(str(database), create=True)):
            with pytest.raises(sb.TrackerError, match="database is locked"):
                wrong()
        assert "database is locked" in sb.glance(journal.tracker).broken
        other.execute("ROLLBACK")
    journal.append(scrobble())
    assert sb.glance(journal.tracker).broken == "" and len(rows(database)) == 1
    journal.tracker.close()


@pytest.mark.parametrize("raised", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), OverflowError("too large"), MemoryError(), TypeError("wrong"), ValueError("x"),
                                    AttributeError("x"), KeyError("x"), sqlite3.OperationalError("no such table: show"), sqlite3.ProgrammingError("x")])
def test_whatever_a_damaged_file_makes_sqlite_raise_is_a_fault_of_the_tracker_and_passes(database, lines, raised, monkeypatch):
    monkeypatch.setattr(sb, "REOPEN_S", 0.0)
    with Keeper(database) as keeper:
        class Broken:
            in_transaction = False

            def execute(self, *_):
                raise raised

            def close(self):
                pass
        for use in (lambda: keeper.send(), lambda: keeper.worker.drain(), lambda: keeper.store.one("SELECT 1")):
            with monkeypatch.context() as patch:
                patch.setattr(keeper.store, "connection", Broken())
                with contextlib.suppress(type(raised)), pytest.raises(sb.TrackerError, match=f"^{re.escape(str(database))} is damaged "):
                    use()
            with contextlib.suppress(type(raised)):
                use()


def test_a_bug_in_the_worker_is_an_error_with_its_traceback_and_the_worker_goes_on(database, lines, monkeypatch):
    monkeypatch.setattr(sb, "TRACKER_RETRY_S", 0.01)
    with Keeper(database) as keeper:
        drain, calls = keeper.worker.drain, []

        def failing():
            calls.append(1)
            if len(calls) < 3:
                raise NotImplementedError("a bug")
            return drain()
        keeper.journal.append(scrobble())
        keeper.worker.drain = failing
        with working(keeper.worker, keeper.journal):
            done(database)
            eventually(lambda: "<6>the tracker works again" in lines)
    errors = [line for line in lines if line.startswith("<3>")]
    assert len(errors) == 1 and errors[0].startswith('<3>the tracker cannot work for now: a bug traceback="Traceback ')


@pytest.mark.parametrize("seed", range(12))
def test_a_log_that_is_deleted_replaced_or_cut_loses_nothing_that_was_acknowledged(database, seed):
    chance, acknowledged = random.Random(seed), []
    store = sb.Tracker(str(database))

    def hurt(end):
        path = database.with_name(database.name + end)
        if path.exists():
            kind = chance.randrange(3 if end == "-shm" else 2)
            if kind == 1:
                shutil.copy(path, path.with_name("copy"))
                path.with_name("copy").rename(path)
            elif kind == 2:                               # SQLite has mapped it: what is behind the end would be a SIGBUS
                os.truncate(path, chance.randrange(32768))
            else:
                path.unlink()
    for n in range(30):
        with contextlib.suppress(sb.TrackerError):
            with store.transaction():
                store.add_entry(sb.Entry(1.0, "x", title=str(n)), None)
            acknowledged.append(str(n))
        for end in chance.choice([(), (), ("-wal",), ("-shm",), ("-wal", "-shm")]):
            hurt(end)
    assert len(acknowledged) == 30 and len(store.all("SELECT 1 FROM webhook_log")) == 30
    with contextlib.ExitStack() as stack:                  # what a kill -9 would leave
        for end in ("", "-wal"):
            shutil.copy(f"{database}{end}", f"{database}.copy{end}")
        copy = stack.enter_context(contextlib.closing(sqlite3.connect(f"{database}.copy")))
        assert [row[0] for row in copy.execute("SELECT title FROM webhook_log ORDER BY id")] == acknowledged
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()


@pytest.mark.parametrize("link", [False, True])
def test_a_log_that_is_cut_short_or_lies_behind_a_link_is_noticed(tmp_path, link, lines):
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "t.db"
    path.touch()
    (tmp_path / "link.db").symlink_to(path)
    store = sb.Tracker(str(tmp_path / "link.db" if link else path), create=True)
    with store.transaction():
        store.add_entry(sb.Entry(1.0, "x", title="a"), None)
    if link:
        path.with_name("t.db-wal").unlink()                # what was acknowledged comes into the database first
    else:
        os.truncate(path.with_name("t.db-wal"), 0)         # it is gone, but nothing more is written after it
    with contextlib.suppress(sb.TrackerError), store.transaction():
        store.add_entry(sb.Entry(1.0, "x", title="b"), None)
    assert any("was deleted or replaced" in line for line in lines)
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        titles = [row[0] for row in connection.execute("SELECT title FROM webhook_log")]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",) and (titles == ["a", "b"] if link else "b" in titles)


@pytest.mark.parametrize("content, log", [(bytes(8192), b""), (b"", b"x" * 5000)])
def test_what_a_power_cut_leaves_is_a_damaged_tracker(tmp_path, content, log):
    path = tmp_path / "t.db"
    path.write_bytes(content)
    if log:
        path.with_name("t.db-wal").write_bytes(log)
    with pytest.raises(sb.TrackerError, match="is damaged"), sb.Tracker(str(path), create=True, patient=True).transaction():
        pass
    assert path.read_bytes() == content and (not log or path.with_name("t.db-wal").read_bytes() == log)


def test_what_is_no_database_ends_the_start_but_never_a_daemon_that_runs(tmp_path):
    path = tmp_path / "t.db"
    path.write_bytes(b"webhook_log" * 1000)
    store = sb.Tracker(str(path), create=True, patient=True)
    path.write_bytes(b"\x1f\x8b" * 5000)
    store.retry_at = 0.0
    with pytest.raises(sb.TrackerError), store.transaction():
        pass
    with pytest.raises(sb.ConfigError):
        sb.Tracker(str(path), create=True, patient=True)


def test_only_the_daemon_corrects_what_a_clock_gave_that_was_set(database, monkeypatch):
    real, daemon, command = time.time, sb.Tracker(str(database), patient=True), sb.Tracker(str(database))
    monkeypatch.setattr(time, "time", lambda: real() + 7 * 3600)
    for store in (daemon, command):
        with store.transaction():
            store.add_entry(sb.Entry(time.time(), "x"), None)
    with command.transaction():
        pass
    assert all(abs(row["received_at"] - time.time()) < 60 for row in rows(database))
    for store in (daemon, command):
        store.close()


def test_a_clock_before_the_programs_own_date_is_not_believed(database, monkeypatch):
    real, viewed = time.time, sb.BUILT + 86400
    with Keeper(database) as keeper:
        monkeypatch.setattr(time, "time", lambda: real() - 1.7e9)
        keeper.send({**PILOT, "lastViewedAt": viewed})
        keeper.send({**PILOT, "ratingKey": "2", "index": 2, "lastViewedAt": sb.BUILT - 9})        # an earlier viewing: our time, which is mended below
        assert [row["received_at"] for row in rows(database)] == [viewed, pytest.approx(real() - 1.7e9, abs=60)]
        monkeypatch.setattr(time, "time", real)
        keeper.send(event="media.play")
        assert [row["received_at"] for row in rows(database)[:2]] == [viewed, pytest.approx(real(), abs=60)]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert [at for at, in connection.execute("SELECT at FROM play WHERE source = 'webhook'")] == [viewed, pytest.approx(real(), abs=60)]


@pytest.mark.parametrize("off_h", [-7, 3, -24 * 365 * 40, 24 * 365 * 4])
def test_the_servers_clock_counts_where_ours_is_an_hour_from_it(database, token_file, monkeypatch, off_h):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + off_h * 3600)
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.date = lambda: sb.email.utils.formatdate(real(), usegmt=True)
        keeper.store.plex = keeper.worker.plex
        assert keeper.worker.plex.ahead_s is None          # the server has not answered yet: the first is by our clock, until it does
        keeper.send({**PILOT, "ratingKey": "1"})
        keeper.worker.plex.get("/identity")
        keeper.send({**PILOT, "ratingKey": "2", "index": 2})
        monkeypatch.setattr(time, "time", real)            # NTP: this is no jump, for the server's time was right
        keeper.send({**PILOT, "ratingKey": "3", "index": 3})
        keeper.send(event="media.play")
    assert all(abs(row["received_at"] - real()) < 60 for row in rows(database)) and len(rows(database)) == 4
    with contextlib.closing(sqlite3.connect(database)) as connection:
        plays = [at for at, in connection.execute("SELECT at FROM play WHERE source = 'webhook'")]
    assert len(plays) >= 2 and all(abs(at - real()) < 60 for at in plays)


@pytest.mark.parametrize("off_s, date", [(1800, None), (7200, "nonsense"), (7200, "Thu, 01 Jan 1970 00:00:00 GMT"), (7200, "Sun, 99 Nov 99999999999 00:00:00 GMT")])
def test_a_server_that_is_minutes_off_or_has_no_clock_changes_no_time(database, token_file, monkeypatch, off_s, date):
    real = time.time
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        library.date = lambda: date or sb.email.utils.formatdate(real() + off_s, usegmt=True)
        keeper.store.plex = keeper.worker.plex
        keeper.worker.plex.get("/identity")
        keeper.send()
        assert abs(rows(database)[0]["received_at"] - real()) < 60


def test_what_a_clock_ahead_has_put_off_for_years_is_brought_back(store, token_file):
    with store.transaction():
        store.add_entry(sb.entry_of(scrobble(), 1.0), None)
        store.write("UPDATE webhook_log SET retry_at = 4e9, status = 'failed'")
        store.take_note("history", 4 * 10 ** 9)
    sb.Worker(config("-tracker-db", "x"), store, None).bound_times(2e9)
    assert store.one("SELECT retry_at FROM webhook_log")[0] == 2e9 + 3600 and store.note("history") == 2 * 10 ** 9


@pytest.mark.parametrize("day, action", [("2021-10-07", "conflict_created"), ("2019-04-15", "recovered"), ("", "recovered"), ("soon", "recovered"), (None, "recovered")])
def test_the_day_of_an_episode_in_the_history_tells_its_year(database, token_file, day, action):
    gone = {"type": "episode", "ratingKey": "77", "grandparentTitle": "Ghosts", "title": "Pilot", "parentIndex": 1, "index": 1, "accountID": 1,
            "viewedAt": int(time.time()) - 90, "originallyAvailableAt": day}                     # its show was deleted there
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        with keeper.store.transaction():
            keeper.store.add_episodes(keeper.store.add_show(sb.Show(sb.SHOW, "Ghosts", 2019)), [(1, 1, "Who Do You Think You Are?"), (1, 2, "Gorilla War")])
            keeper.store.take_note("history", int(time.time()) - 3600)
        library.pages("/status/sessions/history/all", [gone])
        assert keeper.worker.recover()
        keeper.worker.drain()
    assert [row["action"] for row in rows(database)] == [action]


def test_a_new_show_is_none_of_those_that_were_offered_though_it_has_the_same_title(database):
    ghosts = {**PILOT, "grandparentTitle": "Ghosts", "year": None}
    with Keeper(database) as keeper:
        for no, key in enumerate(("21", "22"), 1):
            keeper.send({**ghosts, "ratingKey": key, "grandparentRatingKey": key, "grandparentGuid": f"plex://show/{key}"})
            assert [each["id"] for each in json.loads(tracker(database, "conflicts", "-json"))] == [no]
            for _ in range(2):                                                                     # a second click
                tracker(database, "resolve", no, "new")
    assert [(row["action"], row["show_id"]) for row in rows(database)] == [("marked_watched", 3), ("marked_watched", 4)]
    assert len(json.loads(tracker(database, "shows", "Ghosts", "-json"))) == 2


A_YEAR_S = 365 * 86400


@pytest.mark.parametrize("off_s", [-50 * A_YEAR_S, 10 * A_YEAR_S])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_wrong_clock_at_a_start_makes_no_old_plays_new(database, token_file, monkeypatch, off_s, is_there):
    real, path = time.time, database.with_name("new.db")             # of which one was there before the clock was wrong
    with Library() as library:
        library.pages("/status/sessions/history/all", [{**PILOT, "accountID": 1, "viewedAt": sb.BUILT - A_YEAR_S}])
        library.pages("/library/sections", [{"key": "2", "type": "show", "title": "TV"}])
        library.pages("/library/sections/2/all", [{**PILOT, "lastViewedAt": sb.BUILT - 2 * A_YEAR_S, "viewCount": 1}])
        library.date, answers = lambda: sb.email.utils.formatdate(real(), usegmt=True), library.answers
        for file in database, path:
            library.answers = answers if is_there else {}
            monkeypatch.setattr(time, "time", lambda: real() + off_s)
            for _ in range(2):
                with Keeper(file, *server_flags(library, token_file)) as keeper:
                    keeper.store.plex = keeper.worker.plex
                    keeper.worker.bound_times(keeper.store.now())
                    keeper.worker.recover()
                    keeper.worker.drain()
                library.answers = answers
                monkeypatch.setattr(time, "time", real)
            assert rows(file) == []


def test_the_history_waits_until_somebody_knows_the_time(database, token_file, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e6)
    with Library() as library, Keeper(database, *server_flags(library, token_file)) as keeper:
        keeper.store.plex, library.date = keeper.worker.plex, lambda: "Thu, 01 Jan 1970 00:00:00 GMT"
        before = keeper.store.note("history")
        keeper.worker.bound_times(keeper.store.now())
        assert not keeper.worker.recover() and keeper.store.note("history") == before > sb.BUILT


@pytest.mark.parametrize("off_s", [-50 * A_YEAR_S, 10 * A_YEAR_S])
def test_what_was_unmarked_by_a_wrong_clock_stays_so_until_it_is_played_anew(database, monkeypatch, off_s):
    real = time.time
    with Keeper(database) as keeper:
        monkeypatch.setattr(time, "time", lambda: real() + off_s)
        with keeper.store.transaction():
            keeper.store.unmark(1, 1, 1)
        keeper.worker.bound_times(keeper.store.now())
        monkeypatch.setattr(time, "time", real)
        keeper.worker.bound_times(keeper.store.now())
        with keeper.store.transaction():
            assert [keeper.store.add_plays(1, (1, 1, "", (int(real()) + later_s,)), sb.LIBRARY) for later_s in (-86400, 5)] == [0, 1]


def test_an_empty_word_is_no_show_even_where_there_is_only_one(tmp_path):
    path, file = tmp_path / "t.db", tmp_path / "f.json"
    file.write_text(json.dumps({"shows": [BREAKING_BAD]}))
    tracker(path, "import", file)
    for word in "", " ":
        assert "there is no such show" in tracker(path, "unmark", word, status=2)
    assert plays(path)[2] == 1


def test_what_is_marked_while_nobody_knows_the_time_has_no_date(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e6)
    with store.transaction():
        store.mark(1, 0, 1)
        store.mark(1, 0, 1, 1000)
    assert [at for at, in store.all("SELECT at FROM play WHERE season = 0 AND show_id = 1 ORDER BY id")] == [None, 1000]


def test_an_import_by_a_wrong_clock_keeps_the_dates(tmp_path, token_file, monkeypatch):
    real, path, at = time.time, tmp_path / "t.db", sb.BUILT - A_YEAR_S
    monkeypatch.setattr(time, "time", lambda: 1e6)
    with Library() as library, Keeper(path, *server_flags(library, token_file)) as keeper:
        library.date = lambda: sb.email.utils.formatdate(real(), usegmt=True)
        library.pages("/library/sections", [{"key": "1", "type": "movie", "title": "Films"}])
        library.pages("/library/sections/1/all", [{"type": "movie", "ratingKey": "5", "title": "Heat", "year": 1995, "lastViewedAt": at, "viewCount": 1}])
        sb.import_library(keeper.store, keeper.worker.plex)
        assert keeper.store.one("SELECT at FROM play")[0] == at


def test_a_backup_in_the_place_of_the_database_is_opened_without_the_old_ones_log(database):
    backup = database.with_name("backup")
    shutil.copy(database, backup)
    with Keeper(database) as keeper:
        keeper.send()
        shutil.copy(database, old := database.with_name("old"))
        backup.rename(database)
        keeper.send({**PILOT, "ratingKey": "5"})
        assert [row["rating_key"] for row in rows(database)] == ["5"] and old.exists()
        database.unlink()
        with pytest.raises(sb.TrackerError, match="was deleted; put it back, or restart StreamerBrainz"):
            keeper.send()
        assert not database.exists()


def test_each_webhook_is_answered_in_time_while_another_process_holds_the_file(database, monkeypatch):
    monkeypatch.setattr(sb, "DATABASE_S", 0.3)
    monkeypatch.setattr(sb, "TRACKER_RETRY_S", 0.01)
    with Keeper(database) as keeper, Site(journal=keeper.journal) as listener, \
            contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other, working(keeper.worker, keeper.journal):
        listener.pages.glance = functools.partial(sb.glance, keeper.store)
        assert send(listener) == 200
        other.execute("BEGIN EXCLUSIVE")
        answers = queue.SimpleQueue()

        def post_one(n):
            began = time.monotonic()
            answers.put((send(listener, {**PILOT, "ratingKey": str(n)}), time.monotonic() - began))
        for n in range(30):
            threading.Thread(target=post_one, args=(n,), daemon=True).start()
        found = [answers.get(timeout=10) for _ in range(30)]
        other.execute("ROLLBACK")
        assert {status for status, _ in found} == {503} and max(took for _, took in found) < 1.2     # two waits, and the threads
        eventually(lambda: send(listener) == 200)
        done(database, 2)


@pytest.mark.parametrize("behind_h", [0, 1, 5, 7, 720, -3])
def test_a_clock_that_is_set_while_the_daemon_runs_corrects_what_it_received_before(database, token_file, monkeypatch, behind_h):
    real, behind_s = time.time, 3600 * behind_h
    monkeypatch.setattr(sb, "HISTORY_REST_S", 0.0)
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "ratingKey": "77"})          # of an earlier run: it stays
        keeper.worker.drain()
    early = rows(database)[0]["received_at"]
    with Library() as library:
        monkeypatch.setattr(time, "time", lambda: real() - behind_s)
        with Keeper(database, *server_flags(library, token_file)) as keeper:
            keeper.send({**PILOT, "ratingKey": "1003", "parentIndex": 0, "index": 1})
            keeper.worker.drain()
            keeper.send({**PILOT, "ratingKey": "9", "grandparentRatingKey": "9", "grandparentGuid": "plex://show/x", "grandparentTitle": "?"})
            monkeypatch.setattr(time, "time", real)        # NTP
            library.pages("/status/sessions/history/all", [{**PILOT, "ratingKey": "1003", "parentIndex": 0, "index": 1, "accountID": 1, "viewedAt": int(real())}])
            for _ in range(2):
                assert keeper.worker.recover()
                keeper.worker.drain()
    first, *later = rows(database)
    assert first["received_at"] == early and len(later) == 2 and all(abs(row["received_at"] - real()) < 60 for row in later)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        watched_at, played = connection.execute("SELECT watched_at, plays FROM watched WHERE season = 0").fetchone()
    assert played == 1 and watched_at == int(later[0]["received_at"])


@pytest.mark.parametrize("change", [
    f"UPDATE webhook_log SET {column} = {value}" for column in ("received_at", "title", "season", "show_title", "retry_at", "guid", "attempts", "guids", "status")
    for value in ("x'ff00'", "'abc'", "1e300", "CAST(x'ff' AS TEXT)", "-9223372036854775808")] + [
    "UPDATE show SET title = x'ff'", "UPDATE show SET title = CAST(x'ff' AS TEXT)", "UPDATE play SET at = 'abc'", "UPDATE play SET at = 1e300",
    "UPDATE note SET value = 'abc'", "UPDATE conflict SET candidates = '{'", "UPDATE conflict SET candidates = '[[]]'", "UPDATE conflict SET created_at = 1e300"])
def test_values_that_we_never_wrote_end_no_command_with_a_traceback(database, change, capsys):
    with Keeper(database) as keeper:
        for n, title in enumerate(("Breaking Bad", "?")):
            keeper.send({**PILOT, "ratingKey": str(n), "grandparentTitle": title, "grandparentGuid": "", "grandparentRatingKey": str(n)})
        keeper.worker.drain()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(change)
    for words in (["log"], ["log", "-json"], ["shows"], ["show", "1"], ["conflicts"], ["export"], ["resolve", "1", "new"]):
        said = call("tracker", *words, "-tracker-db", database)
        assert said.status in (0, 1) and (said.status == 0 or said.err.startswith(f"streamerbrainz: {database}")), said
    store = sb.Tracker(str(database))
    assert isinstance(sb.glance(store), sb.Glance)
    store.close()


@pytest.mark.parametrize("make, sentence", [
    (lambda path: path.write_bytes(b"no database at all, but long enough to be read as one" * 40), "is not a database; name another file."),
    (lambda path: path.mkdir(), "is not a regular file; name one."), (lambda path: os.mkfifo(path), "is not a regular file; name one."),
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)"), "is a database of another program; name another file."),
    (lambda path: [sb.Tracker(str(path), create=True).close(), sqlite3.connect(path).execute("PRAGMA user_version = 3")],
     "was made by a newer version of StreamerBrainz (form 3; this one knows form 2); update streamerbrainz.py.")])
def test_a_file_that_is_no_tracker_of_ours_is_the_operators_fault(tmp_path, make, sentence):
    path = tmp_path / "x.db"
    make(path)
    done = call("-webhooks-port", free_port(), "-webhooks-host", "127.0.0.1", "-tracker-db", path)
    assert done == (2, "", f"streamerbrainz: -tracker-db: {path} {sentence}\n")


def test_a_folder_that_is_missing_is_told_with_the_remedy(tmp_path):
    path = tmp_path / "no" / "t.db"
    assert call("-webhooks-port", free_port(), "-webhooks-host", "127.0.0.1", "-tracker-db", path) == (
        2, "", f"streamerbrainz: -tracker-db: {path} cannot be opened (No such file or directory); create its folder, writable by you.\n")
    assert "the daemon and `tracker import` create it." in tracker(tmp_path / "t.db", "shows", status=2)


def test_what_cannot_be_written_is_503_and_never_a_false_200(database, lines, monkeypatch):
    monkeypatch.setattr(sb, "DATABASE_S", 0.2)
    with Keeper(database) as keeper, Site(journal=keeper.journal) as listener, \
            contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        assert send(listener) == 200
        other.execute("BEGIN IMMEDIATE")                   # another program holds the file for too long
        assert [send(listener, {**PILOT, "ratingKey": "2"}) for _ in range(2)] == [503, 503]
        other.execute("ROLLBACK")
        assert send(listener, {**PILOT, "ratingKey": "3"}) == 200
        keeper.worker.drain()
    assert [row["rating_key"] for row in rows(database)] == ["1001", "3"]
    said = [line for line in lines if "webhook status" not in line and not line.startswith("<7>")]
    assert len(said) == 2 and said[1] == "<6>the tracker can be written again"
    assert said[0].startswith("<3>webhooks are refused (503), because the tracker cannot be written: ") and "database is locked" in said[0]


def test_a_disk_that_is_full_is_503_and_what_was_acknowledged_is_there(database):
    with contextlib.closing(sqlite3.connect(database)) as connection:
        pages, = connection.execute("PRAGMA page_count").fetchone()
    store = sb.Tracker(str(database))
    store.connection.execute(f"PRAGMA max_page_count = {pages + 2}")          # as a full disk: SQLITE_FULL
    journal, safe = sb.Journal(store, ""), 0
    with pytest.raises(sb.TrackerError, match=r"database or disk is full; check that it can be written"):
        for _ in range(500):
            journal.append(scrobble())
            safe += 1
    assert 0 < safe < 500 and len(rows(database)) == safe
    status_, healthy = sb.health(status_of(), sb.glance(store, journal), 0.0)
    assert status_ == 503 and "-tracker-db: it cannot be written, so webhooks are refused: is the disk full?" in healthy["reasons"]
    store.connection.execute("PRAGMA max_page_count = 1000000")
    journal.append(scrobble())
    assert not sb.glance(store, journal).refused
    store.close()


def test_a_clean_stop_leaves_no_log_beside_the_database(database):
    with Process(*flags(database)) as daemon:
        assert send(daemon) == 200
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(5) == 0
    assert [each.name for each in database.parent.glob("tracker.db*")] == ["tracker.db"]
    with contextlib.closing(sqlite3.connect(database)) as other, Process(*flags(database)) as daemon:
        assert send(daemon) == 200
        other.execute("BEGIN IMMEDIATE")                            # who writes is not waited for long
        at = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(5) == 0 and time.monotonic() - at < 1.5


def test_a_hundred_other_webhooks_cost_no_scrobble_and_scrobbles_have_a_limit_too(database):
    with Process("-tracker-db", database, "-rate-limit", "20") as daemon:
        assert [send(daemon, event="library.new") for _ in range(100)].count(200) in (20, 21)
        assert [send(daemon, {**PILOT, "ratingKey": str(n)}) for n in range(40)].count(200) in (20, 21)
        assert send(daemon, {**PILOT, "summary": "x" * sb.MAX_SCROBBLE}) == 429


def test_words_that_are_no_unicode_find_nothing(database):
    assert tracker(database, "log", "-show", "\udcff") == "No entry matches.\n"
    assert tracker(database, "shows", "\udcff") == "No title matches.\n"


def test_half_surrogates_of_json_are_no_obstacle(database):
    journal = sb.Journal(sb.Tracker(str(database)), "")
    metadata = {**PILOT, "title": "\ud800", "thumb": "\ud800", "grandparentTitle": "\udfff?", "guid": "\ud800", "ratingKey": "\ud800\0", "Guid": [{"id": "\ud800"}]}
    for event, kind in (("media.scrobble", "episode"), ("media.play\ud800", "\ud800")):
        journal.append(sb.parse_payload(json.dumps({"event": event, "user": True, "Metadata": {**metadata, "type": kind}, "Server": {"uuid": "\ud800"},
                                                    "Account": {"id": "\ud800", "title": "\ud800"}}).encode()))
    store = sb.Tracker(str(database))
    assert sb.Worker(config("-tracker-db", "x"), store, None).drain() == 1
    assert [row["action"] for row in rows(database)] == ["conflict_created", "event_not_scrobble"]
    store.close()


def test_one_commit_serves_all_that_wait(database):
    store = sb.Tracker(str(database))
    journal, commits = sb.Journal(store, ""), []
    commit = journal.commit
    journal.commit = lambda: (commits.append(len(journal.waiting)), commit())
    with store.lock:
        threads = [threading.Thread(target=journal.append, args=(scrobble(),)) for _ in range(20)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(journal.waiting) == 20)
    for thread in threads:
        thread.join(5)
    assert commits == [20] and len(rows(database)) == 20 and journal.written.is_set()


def test_without_a_tracker_sqlite_is_not_even_imported():
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import streamerbrainz; print('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20).stdout == "False\n"


def test_what_the_history_tells_after_its_row_was_pruned_is_one_play_and_no_new_row_has_the_id_of_an_old_one(store):
    worker = sb.Worker(config("-tracker-db", store.path), store, None)
    told = sb.entry_of(scrobble(event="history"), float(int(time.time()) - 100 * 86400))
    for _ in range(3):                                         # each hour: read, prune, finish
        with store.transaction():
            store.add_entry(told, None)
        worker.prune()
        worker.drain()
    worker.prune()
    plays_of_it = [tuple(row) for row in store.all("SELECT at, entry_id FROM play WHERE source = 'history'")]
    assert plays_of_it == [(told.received_at, 1)] and [row["id"] for row in store.all("SELECT id FROM webhook_log")] == [3]


def test_finished_rows_are_pruned_and_what_failed_stays(database):
    with sqlite3.connect(database) as connection:
        old = time.time() - 91 * 86400
        for state, retry_at in (("success", None), ("ignored", None), ("duplicate", None), ("failed", None), (None, 9e9)):
            connection.execute("INSERT INTO webhook_log (received_at, event, server, account_id, account, rating_key, guid, title, show_title, "
                               "show_key, show_guid, guids, type, status, retry_at) VALUES (?, 'x', '', '', '', '', '', '', '', '', '', '', '', ?, ?)",
                               (old, state, retry_at))
    store = sb.Tracker(str(database))
    sb.Worker(config(*map(str, flags(database, "-tracker-log-days", "0"))), store, None).prune()
    assert len(rows(database)) == 5
    sb.Worker(config(*map(str, flags(database))), store, None).prune()
    assert [row["status"] for row in rows(database)] == ["failed", "waiting"]
    store.close()


def episode_fields(show, season, number, **more):
    return {"ratingKey": f"{show}{season:02}{number:03}", "grandparentRatingKey": str(show), "type": "episode", "title": f"Episode {number}",
            "parentIndex": season, "index": number, **more}


def library_of(library, shows=3, seasons=2, episodes=5):
    """Fill a stand-in with a movie and shows, of which the first two episodes of each season are watched."""
    library.answers["/library/sections"] = {"Metadata": [
        {"key": "1", "type": "show", "title": "Series"}, {"key": "2", "type": "movie", "title": "Films"}, {"key": "3", "type": "artist", "title": "Music"}]}
    each = [{"ratingKey": str(n), "type": "show", "guid": f"plex://show/{n}", "title": f"Show {n}", "year": 2000 + n, "Guid": [{"id": f"tmdb://{n}"}]}
            for n in range(1000, 1000 + shows)]
    leaves = [episode_fields(n, season, number, **({"viewCount": 2, "lastViewedAt": 1600000000 + number} if number < 3 else {}))
              for n in range(1000, 1000 + shows) for season in range(1, 1 + seasons) for number in range(1, 1 + episodes)]
    films = [{"ratingKey": "4", "type": "movie", "subtype": "clip", "title": "Birthday", "viewCount": 1},
             {"ratingKey": "5", "type": "movie", "guid": "plex://movie/heat", "title": "Heat", "year": 1995, "viewCount": 1, "Guid": [{"id": "imdb://tt0113277"}]}]

    def section(query):
        start, size = int(query["X-Plex-Container-Start"]), int(query["X-Plex-Container-Size"])
        items = {"1": films, "2": each, "4": leaves}[query["type"]]
        return {"totalSize": len(items), "Metadata": items[start:start + size]}
    library.answers["/library/sections/1/all"] = library.answers["/library/sections/2/all"] = section
    return each, leaves


def brought(path, library, token_file, status=0):
    return tracker(path, "import", *server_flags(library, token_file), status=status)


@pytest.mark.parametrize("xml", [False, True])
def test_an_import_brings_all_and_twice_is_as_once(tmp_path, token_file, xml):
    path = tmp_path / "t.db"
    with Library(xml) as library:
        library_of(library)
        for _ in range(2):
            said = brought(path, library, token_file)
            assert said.startswith("The tracker now has 3 shows, 30 episodes and 1 movie.\n") and "Series: episodes: 30 of 30\n" in said
            exported = json.loads(tracker(path, "export"))
            assert [(show["title"], show["year"], show["tmdb_id"]) for show in exported["shows"]] == [(f"Show {n}", 2000 + n, n) for n in (1000, 1001, 1002)]
            assert exported["shows"][0]["episodes"][0] == {"season": 1, "episode": 1, "title": "Episode 1", "watched": ["2020-09-13T12:26:41Z", None]}
            assert exported["shows"][0]["episodes"][4]["watched"] == [] and exported["movies"][0]["watched"] == [None]
        listed = tracker(path, "shows")
        assert re.search(r"^ +\d  4 of 10     2020-09-13  Show 1000 \(3000\)$", listed, re.M) and re.search(r"^ +\d  movie: yes  .* Heat \(1995\)$", listed, re.M)
        assert tracker(path, "shows", "1001", "show").count("\n") == 2
        assert "Season 2    ##...  " in tracker(path, "show", json.loads(tracker(path, "shows", "1000", "-json"))[0]["id"])


def test_an_import_never_unwatches_and_an_earlier_date_stays(tmp_path, token_file):
    path = tmp_path / "t.db"
    with Library() as library:
        _, leaves = library_of(library, 1, 1, 3)
        brought(path, library, token_file)
        leaves[0].pop("viewCount")                                  # unwatched on the server
        leaves[1].update(viewCount=3, lastViewedAt=1700000000)      # watched again
        leaves[2].update(viewCount=1, lastViewedAt=1500000000)
        brought(path, library, token_file)
    watched = json.loads(tracker(path, "export"))["shows"][0]["episodes"]
    assert [each["watched"] for each in watched] == [
        [sb.iso_time(1600000001), None], [sb.iso_time(1600000002), sb.iso_time(1700000000), None], [sb.iso_time(1500000000)]]


def test_an_import_that_was_ended_goes_on_where_it_was(tmp_path, token_file):
    path = tmp_path / "t.db"
    with Library() as library:
        library_of(library, 4, 10, 40)                              # 1,600 episodes: 32 pages
        section, asked = library.answers["/library/sections/1/all"], []

        def failing(query):
            asked.append((query["type"], query["X-Plex-Container-Start"]))
            return 500 if asked[-1] == ("4", "1000") and asked.count(("4", "1000")) == 1 else section(query)
        library.answers["/library/sections/1/all"] = failing
        assert "answers 500" in brought(path, library, token_file, status=1)
        assert len(json.loads(tracker(path, "export"))["shows"]) == 4
        assert brought(path, library, token_file).startswith("The tracker now has 4 shows, 1600 episodes and 1 movie.\n")
        assert [start for kind, start in asked if kind == "4"] == [str(n) for n in (*range(0, 1001, 50), *range(1000, 1600, 50))]
        brought(path, library, token_file)
        assert [start for kind, start in asked if kind == "4"][33:] == [str(n) for n in range(0, 1600, 50)]
    assert sum(len(show["episodes"]) for show in json.loads(tracker(path, "export"))["shows"]) == 1600


def test_a_library_without_a_total_is_read_until_a_short_page(tmp_path, token_file):
    with Library() as library:
        library_of(library, 2, 5, 12)                               # 120 episodes: 3 pages
        section = library.answers["/library/sections/1/all"]
        library.answers["/library/sections/1/all"] = lambda query: {"Metadata": section(query)["Metadata"]}
        assert brought(tmp_path / "t.db", library, token_file).startswith("The tracker now has 2 shows, 120 episodes and 1 movie.\n")


def test_a_library_that_changes_while_it_is_imported_is_begun_again(tmp_path, token_file):
    path, asked = tmp_path / "t.db", []
    with Library() as library:
        _, leaves = library_of(library, 2, 5, 12)
        section = library.answers["/library/sections/1/all"]

        def changing(query):
            asked.append(query["X-Plex-Container-Start"]) if query["type"] == "4" else None
            if asked == ["0", "50"]:
                del leaves[:5]                                      # what was the 50th is on the first page now
            return section(query)
        library.answers["/library/sections/1/all"] = changing
        assert brought(path, library, token_file).startswith("The tracker now has 2 shows, 120 episodes and 1 movie.\n")
        assert asked == ["0", "50", "0", "50", "100"]

        def always(query):
            return {**section(query), "totalSize": 1000 + len(asked.append("x") or asked)} if query["type"] == "4" else section(query)
        library.answers["/library/sections/1/all"] = always
        assert "Series: episodes change all the time; import them when no scan of it runs." in brought(path, library, token_file, status=1)


def test_an_import_counts_what_it_leaves_out_and_says_why(tmp_path, token_file):
    with Library() as library:
        _, leaves = library_of(library, 1, 1, 7)
        for leaf in leaves[:6]:
            leaf.pop("index")
        leaves.append(episode_fields(999, 1, 1))                    # of a show that is not in the library
        said = brought(tmp_path / "t.db", library, token_file)
    assert "\n6 episodes without a number were left out.\n" in said and "\n1 episode without a certain show was left out.\n" in said
    assert "\n1 clip such as a home video was left out.\n" in said


def test_an_import_does_what_waited_for_it(tmp_path, token_file):
    path = tmp_path / "t.db"
    waiting = {**PILOT, "grandparentTitle": "Show 1000", "grandparentRatingKey": "1000", "grandparentGuid": "plex://show/1000", "index": 4}
    with Library() as library:
        library_of(library)
        with Process("-tracker-db", path) as daemon:
            assert send(daemon, waiting) == 200
            assert done(path)[0]["action"] == "conflict_created"
            brought(path, library, token_file)
            assert brief(rows(path)[0])[:2] == ("success", "marked_watched") and tracker(path, "conflicts") == "No conflicts: nothing is waiting for you.\n"
            assert send(daemon, {**waiting, "index": 6, "ratingKey": "6"}) == 200
            assert done(path, 2)[1]["action"] == "marked_watched"      # its show is certain, so the episode exists


def test_an_import_of_a_file_does_what_waited_for_it_too(store, database, tmp_path):
    severance = {**PILOT, "grandparentTitle": "Severance", "grandparentRatingKey": "7", "grandparentGuid": "plex://show/sev", "year": 2022}
    assert finish(store, metadata=severance)[1] == "conflict_created"
    assert finish(store, metadata={**PILOT, "ratingKey": "2", "index": 9})[1] == "conflict_created"
    assert finish(store, metadata={**PILOT, "ratingKey": "3", "grandparentTitle": "Unheard Of", "grandparentRatingKey": "8", "grandparentGuid": "plex://show/u"})[1] == "conflict_created"
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"shows": [{"title": "Severance", "year": 2022, "episodes": [{"season": 1, "episode": 1}]},
                                          {**BREAKING_BAD, "episodes": [{"season": 1, "episode": 9}]}]}))
    tracker(database, "import", file)
    assert [row["action"] for row in rows(database)] == ["marked_watched", "marked_watched", "conflict_created"]
    assert [each["title"] for each in json.loads(tracker(database, "conflicts", "-json"))] == ["Unheard Of"]


SIX_HOURS, T0 = 6 * 3600, 1_700_000_000


@pytest.mark.parametrize("known, told, source, more, dates", [
    ([], (5, None), "import", [5, None], []), ([(5, "import")], (5, None), "import", [None], []), ([(5, "import"), (None, "import")], (5, None), "import", [], []),
    ([(T0, "webhook")], (T0 + SIX_HOURS,), "history", [], []), ([(T0, "webhook")], (T0 + SIX_HOURS + 1,), "history", [T0 + SIX_HOURS + 1], []),
    ([(T0, "webhook")], (T0,), "webhook", [T0], []), ([(T0, "webhook")], (T0 + 400,), "webhook", [T0 + 400], []), ([(T0, "import")], (T0 - 900,), "webhook", [], []),
    ([(T0, "import")], (T0 + 60,), "import", [], []), ([(T0, "import")], (T0 + 61,), "import", [T0 + 61], []), ([(T0, "import")], (T0 + 3000,), "library", [], []),
    ([(None, "import")], (T0,), "library", [], [T0]), ([(None, "import")], (T0,), "webhook", [T0], []), ([(None, "import")], (T0,), "history", [T0], []),
    ([(T0, "library")], (T0, None, None), "library", [None, None], []), ([(T0, "library"), (None, "library")], (T0 + 90000, None), "library", [], [T0 + 90000]),
    ([(T0, "webhook"), (T0 + 9000, "webhook")], (T0 + 9000, T0), "import", [], []), ([(T0, "webhook")], (T0, T0 + 9000), "import", [T0 + 9000], []),
    ([(T0, "hand")], (T0,), "hand", [], []), ([(T0, "hand")], (T0 + 1,), "hand", [T0 + 1], []), ([(5, "webhook")] * 2, (5, 5, 5), "import", [5], [])])
def test_each_play_is_one_play_whoever_tells_of_it_and_in_whatever_order(known, told, source, more, dates):
    assert sb.new_plays(known, told, source) == (more, dates)


def form_1(path, old):
    """A tracker as version 0.1.0 wrote it."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(old + f"""
            INSERT INTO show VALUES (1, 'episode', 'Show', 'show', 2000, 1, NULL, NULL), (2, 'movie', 'Film', 'film', 2001, 2, NULL, NULL);
            INSERT INTO episode VALUES (1, 1, 1, 'Seen', 1600000000, 3), (1, 1, 2, 'Not', NULL, 0), (1, 1, 3, 'Sometime', NULL, 2), (1, 1, 4, 'Once', 1500000000, 1),
                (2, 0, 0, 'Film', 1650000000, 2);
            INSERT INTO mapping VALUES ('s', 'episode', 'key:7', 'plex://show/7', 1, 0.95), ('s', 'movie', 'key:8', '', 2, 1.0), ('s', 'episode', 'key:9', '', NULL, 1.0);
            INSERT INTO conflict VALUES (1, 1.0, 'no_match', 's', 'episode', 'key:9', '', 'X', NULL, NULL, NULL, NULL, '[]', 'ignore');
            INSERT INTO webhook_log (id, received_at, event, server, account_id, account, type, rating_key, show_key, season, episode, status, show_id) VALUES
                (1, 1600000000.5, 'media.scrobble', 's', '', '', 'episode', '71', '7', 1, 1, 'success', 1),
                (2, 1700000000.5, 'history', 's', '', '', 'episode', '71', '7', 1, 1, 'success', 1),
                (3, 1650000000.5, 'media.scrobble', 's', '', '', 'movie', '8', '', 0, 0, 'success', 2), (4, 1.0, 'media.scrobble', 's', '', '', 'movie', '8', '', 0, 0, 'failed', 2);
            PRAGMA application_id = {sb.APPLICATION_ID}; PRAGMA user_version = 1""")


SCHEMA_1 = """
    CREATE TABLE show (id INTEGER PRIMARY KEY, type TEXT NOT NULL, title TEXT NOT NULL, normal TEXT NOT NULL, year INTEGER, tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT,
        UNIQUE (type, tmdb_id), UNIQUE (type, tvdb_id), UNIQUE (type, imdb_id)); CREATE INDEX show_normal ON show (normal, type);
    CREATE TABLE episode (show_id INTEGER NOT NULL REFERENCES show, season INTEGER NOT NULL, episode INTEGER NOT NULL, title TEXT NOT NULL, watched_at INTEGER,
        plays INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (show_id, season, episode)) WITHOUT ROWID;
    CREATE TABLE mapping (server TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL, guid TEXT NOT NULL, show_id INTEGER REFERENCES show, confidence REAL NOT NULL,
        PRIMARY KEY (server, type, subject)) WITHOUT ROWID; CREATE INDEX mapping_show ON mapping (show_id);
    CREATE TABLE conflict (id INTEGER PRIMARY KEY, created_at REAL NOT NULL, kind TEXT NOT NULL, server TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
        guid TEXT NOT NULL, title TEXT NOT NULL, year INTEGER, tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT, candidates TEXT NOT NULL, resolution TEXT);
    CREATE UNIQUE INDEX conflict_open ON conflict (server, type, subject) WHERE resolution IS NULL;
    CREATE TABLE webhook_log (id INTEGER PRIMARY KEY, received_at REAL NOT NULL, event TEXT NOT NULL, server TEXT NOT NULL, account_id TEXT NOT NULL, account TEXT NOT NULL,
        type TEXT, rating_key TEXT, guid TEXT, title TEXT, show_title TEXT, season INTEGER, episode INTEGER, year INTEGER, show_key TEXT, show_guid TEXT, guids TEXT,
        status TEXT, action TEXT, reason TEXT, show_id INTEGER, conflict_id INTEGER, attempts INTEGER NOT NULL DEFAULT 0, retry_at REAL);
    CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"""


@pytest.mark.parametrize("more", ["", "CREATE TABLE trigram (x); CREATE TABLE found (x);"])
@pytest.mark.parametrize("first", [["shows"], ["mark", "1", "S09"]])
def test_a_file_of_form_1_is_carried_over_once_after_a_copy(tmp_path, more, first):
    path = tmp_path / "t.db"
    form_1(path, SCHEMA_1 + more)
    before = path.read_bytes()
    tracker(path, *first)
    assert (tmp_path / "t.db.form1").stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db.form1")) as copy, contextlib.closing(sqlite3.connect(path)) as now:
        assert copy.execute("SELECT count(*), sum(plays) FROM episode").fetchone() == (5, 8) and copy.execute("PRAGMA user_version").fetchone() == (1,)
        assert now.execute("SELECT season, episode, at, source, mapping_id, entry_id FROM play ORDER BY show_id, season, episode, at NULLS LAST").fetchall() == [
            (1, 1, 1600000000, "webhook", 1, 1), (1, 1, 1700000000, "history", 1, 2), (1, 1, None, "import", None, None), (1, 3, None, "import", None, None),
            (1, 3, None, "import", None, None), (1, 4, 1500000000, "import", None, None), (0, 0, 1650000000, "webhook", 3, 3), (0, 0, None, "import", None, None)]
        assert sorted(now.execute("SELECT subject, show_id, by FROM mapping")) == [("key:7", 1, "earlier"), ("key:8", 2, "earlier"), ("key:9", None, "person")]
        tables = {name for name, in now.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        assert tables == {"show", "episode", "play", "mapping", "conflict", "webhook_log", "note"}
    (tmp_path / "t.db.form1").unlink()
    tracker(path, "shows")
    assert not (tmp_path / "t.db.form1").exists() and before[:6] == b"SQLite"


def test_a_form_that_cannot_be_carried_over_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "t.db"
    form_1(path, SCHEMA_1)
    with monkeypatch.context() as patch:
        patch.setattr(sb, "MIGRATIONS", {1: (*sb.MIGRATIONS[1][:-1], "SELECT no_such_function()")})
        assert "no_such_function" in tracker(path, "shows", status=1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,) and connection.execute("SELECT sum(plays) FROM episode").fetchone() == (8,)
    assert "Show (2000)" in tracker(path, "shows")


LATER = "-at: give it to `tracker mark` only, with a time that has passed."


def test_a_mark_by_hand_can_be_taken_back_and_stays_so_until_it_is_watched_anew(database, tmp_path):
    file = tmp_path / "again.json"
    file.write_text(json.dumps({"shows": [BREAKING_BAD]}))
    assert tracker(database, "mark", 1, "S01") == "1 play marked as watched.\n" and plays(database) == [0, 1, 1]
    assert tracker(database, "mark", 1) == "1 play marked as watched.\n" and tracker(database, "mark", 1) == "0 plays marked as watched.\n"
    assert tracker(database, "mark", 1, "s1e2", "-at", "2021-01-02T03:04:05Z") == "1 play marked as watched.\n" and plays(database) == [1, 1, 2]
    assert tracker(database, "unmark", 1, "S01E02") == "2 plays taken back.\n" and plays(database) == [1, 1, 0]
    tracker(database, "import", file)
    assert plays(database) == [1, 1, 0]
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "ratingKey": "1002", "index": 2})
    assert plays(database) == [1, 1, 1]
    assert tracker(database, "mark", 1, "S07E09") == "1 play marked as watched.\n"      # a person says that it exists
    assert "next:" not in tracker(database, "show", 1)
    assert tracker(database, "unmark", 1) == "4 plays taken back.\n" and "next: S01E01  Pilot\n" in tracker(database, "show", "breaking", "bad")
    assert tracker(database, "mark", 2) == "1 play marked as watched.\n" and tracker(database, "show", "heat").endswith(", 1 play\n")
    assert tracker(database, "mark", 2) == "0 plays marked as watched.\n"
    assert tracker(database, "mark", "heat", "-at", "2021-01-02T03:04:05Z") == "1 play marked as watched.\n" and tracker(database, "show", 2).endswith(", 2 plays\n")
    for words, said in ((["mark", 2, "S01E01"], "Heat (1995) is a movie: it has no episodes."), (["unmark", 2, "S01"], "Heat (1995) is a movie: it has no episodes."),
                        (["mark", ""], "there is no such show; `tracker shows` prints their ids."),
                        (["mark", 1, "S1E2147483649"], "S1E2147483649 is no episode or season; write it as S01E02 or S01."),
                        (["mark", 1, "S1E"], "S1E is no episode or season; write it as S01E02 or S01."), (["mark", "99"], "there is no such show; `tracker shows` prints their ids."),
                        (["unmark", 1, "S09E01"], "Breaking Bad (2008) has no such episode; see `tracker show 1`."),
                        (["mark", 2, "S01E02"], "Heat (1995) is a movie: it has no episodes."),
                        (["mark", 1, "S01E02", "-at", "2037-01-02T03:04:05Z"], LATER), (["mark", 1, "S01E02", "-at", "2096-01-02T03:04:05Z"], LATER),
                        (["unmark", 1, "S01E02", "-at", "2021-01-02T03:04:05Z"], LATER),
                        (["mark", 1, "-at", "noon"], "-at: give a time such as 2026-11-21T20:15:00Z (see: streamerbrainz.py -h)")):
        assert tracker(database, *words, status=2) == f"streamerbrainz: {said}\n"


def test_what_was_taken_back_stays_so_in_a_file_that_is_made_of_an_export(database, tmp_path):
    tracker(database, "unmark", 1, "S01E02")
    tracker(database, "unmark", 2)
    (tmp_path / "all.json").write_text(tracker(database, "export"))
    anew, file = tmp_path / "anew.db", tmp_path / "again.json"
    file.write_text(json.dumps({"shows": [BREAKING_BAD], "movies": [HEAT]}))
    for _ in range(2):                                              # a second time changes nothing
        tracker(anew, "import", tmp_path / "all.json")
        tracker(anew, "import", file)                               # which has a play of that episode
        assert tracker(anew, "export") == (tmp_path / "all.json").read_text() and plays(anew) == [0, 0, 0]
    assert len(json.loads((tmp_path / "all.json").read_text())["unmarked"]) == 2
    tracker(anew, "mark", 1, "S01E02")
    assert plays(anew) == [0, 0, 1]


@pytest.mark.parametrize("wrong, sentence", [
    ({}, "unmarked[0].show is not in the file."), ({"show": 1}, "unmarked[0].show is not in the file."), ({"show": None}, "unmarked[0].show is not in the file."),
    ({"show": 0}, "unmarked[0] needs a season and an episode from 0 to 2147483648."), ({"show": 0, "season": 1, "episode": 1}, "unmarked[0] has a time unlike 2026-11-21T20:15:00Z."),
    ({"show": 0, "season": 1, "episode": 1, "at": "noon"}, "unmarked[0] has a time unlike 2026-11-21T20:15:00Z.")])
def test_a_mark_taken_back_that_no_file_can_mean_is_refused_with_its_place(tmp_path, wrong, sentence):
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"shows": [{"title": "A", "episodes": [{"season": 1, "episode": 1}]}], "unmarked": [wrong]}))
    assert tracker(tmp_path / "t.db", "import", file, status=2) == f"streamerbrainz: tracker import: {sentence}\n"


def test_a_long_title_of_the_servers_leaves_room_for_ours(database):
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "grandparentTitle": "A title of so many words that no terminal has room for both of them", "grandparentGuid": None})
    tracker(database, "resolve", 1, 1)
    line, = tracker(database, "mappings").splitlines()[1:]
    assert len(line) <= 80 and line.endswith("\u2026 -> 1 Breaking Bad (2008)")


def test_a_full_disk_is_one_sentence_about_what_is_being_written(database, tmp_path):
    for words in (["export"], ["shows"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, PROGRAM, "tracker", *words, "-tracker-db", database], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (1, "streamerbrainz: the output is cut: the disk is full.\n")
    store, full = sb.Tracker(str(database)), tmp_path / "full.db"

    class Full(sqlite3.Connection):
        def __init__(self, *words, **more):
            super().__init__(*words, **more)
            self.execute("PRAGMA max_page_count = 1")
    with contextlib.closing(store), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "sqlite3", types.SimpleNamespace(**{**vars(sqlite3), "connect": functools.partial(sqlite3.connect, factory=Full)}))
        with pytest.raises(sb.TrackerError, match=re.escape(f"{full} cannot be made (database or disk is full); check that its disk has space.")):
            store.backup(str(full))
    assert not list(tmp_path.glob("full*"))


def test_what_a_wrong_mapping_marked_moves_along(database):
    stranger = {**PILOT, "grandparentTitle": "Stranger", "grandparentRatingKey": "5", "grandparentGuid": "plex://show/stranger"}
    with Keeper(database) as keeper:
        keeper.send(stranger)
        tracker(database, "resolve", 1, 1)
        assert plays(database) == [0, 1, 1]
        assert tracker(database, "resolve", 1, "new") == "Conflict 1 is resolved. 0 waiting webhooks were processed. 1 play moved.\n"
        assert plays(database) == [0, 0, 1] and plays(database, 3) == [1] and brief(rows(database)[0]) == ("success", "marked_watched", 1, 1, 3)
        tracker(database, "resolve", 1, "ignore")
        assert plays(database, 3) == [0] and brief(rows(database)[0]) == ("ignored", "auto_mark_disabled", 1, 1, None)
        assert tracker(database, "resolve", 1, 1).startswith("Conflict 1 is resolved. 1 waiting webhook was processed.\n")
        assert plays(database) == [0, 1, 1] and brief(rows(database)[0]) == ("success", "marked_watched", 1, 1, 1)
        mapping, = json.loads(tracker(database, "mappings", "stranger", "-json"))
        assert {key: mapping[key] for key in ("title", "show", "by", "confidence", "plays")} == {
            "title": "Stranger", "show": "Breaking Bad", "by": "person", "confidence": 1.0, "plays": 1}
        assert re.search(r"^ +1  person    1\.00  20\d\d-\d\d-\d\d  Stranger -> 1 Breaking Bad \(2008\)$", tracker(database, "mappings"), re.M)
        assert tracker(database, "map", mapping["id"], 3) == f"Mapping {mapping['id']} is corrected; 1 play moved.\n" and plays(database, 3) == [1]
        assert {tracker(database, "map", mapping["id"], "new") for _ in range(2)} == {f"Mapping {mapping['id']} is corrected; 0 plays moved.\n"}
        assert [show["title"] for show in json.loads(tracker(database, "shows", "-json"))].count(mapping["title"]) == 1      # once, however often it is asked for
        assert tracker(database, "map", mapping["id"], "forget").startswith(f"Mapping {mapping['id']} is corrected; 1 play moved.\n")
        assert brief(rows(database)[0]) == ("success", "marked_watched", 1, 1, 3) and "  title     " in tracker(database, "mappings")     # judged anew
    for words, said in ((["map", 9, "new"], "there is no such mapping; `tracker mappings` prints their ids."), (["map", "1"], "tracker map: call it as: tracker map MAPPING SHOW|new|ignore|forget")):
        assert tracker(database, *words, status=2) == f"streamerbrainz: {said}\n"


def test_what_no_row_of_the_journal_can_bring_back_outlives_that_its_show_is_ignored(store):
    entry = sb.Entry(1.0, "import", SERVER, type="episode", show_key="7", show_title="Dawn")
    with store.transaction():
        store.map(entry, sb.Match(2, "title", 1.0))
        mapping_id = store.mapping(entry)["id"]
        store.add_plays(2, (1, 3, "Three", (1700000000, None)), "library", mapping_id)
        store.add_plays(2, (1, 3, "Three", (1600000000,)), "history", mapping_id, 99)         # its row was pruned
        assert store.remap(mapping_id, 0) == 3 and store.remap(mapping_id, 0) == 0
        assert store.episode(2, 1, 3)["plays"] == 0
        for show_id in (1, 2, 1):
            assert store.remap(mapping_id, show_id) == 3
            assert [row[3] for row in sb.plays_of(store, show_id) if row[:2] == (1, 3)] == [(1600000000, 1700000000, None)]
        assert sb.correct(store, "mapping", mapping_id, "forget") == (0, 3)
        assert store.one("SELECT count(*) FROM play WHERE mapping_id NOT NULL")[0] == 0


def test_a_movie_that_an_answer_adds_can_be_marked(store):
    entry = sb.Entry(1.0, "import", SERVER, type="movie", rating_key="7", title="Dawn")
    with store.transaction():
        no, _ = store.add_conflict(entry, entry.show, sb.Conflict("no_match"))
        show_id, _ = sb.correct(store, "conflict", no, "new")
        assert store.mark(show_id, 0, None) == 1
        with pytest.raises(sb.ConfigError, match="no such show"):
            sb.correct(store, "conflict", no, " ")


def test_a_backup_is_whole_while_the_daemon_writes_and_can_be_restored(database, tmp_path):
    copy = tmp_path / "copy.db"
    with Keeper(database) as keeper:
        keeper.send()
        assert tracker(database, "backup", copy) == f"The tracker was copied to {copy}.\n" and copy.stat().st_mode & 0o777 == 0o600
        keeper.send({**PILOT, "ratingKey": "2", "parentIndex": 0})
    assert plays(copy) == [0, 1, 1] and plays(database) == [1, 1, 1]
    assert tracker(database, "backup", copy, status=2) == f"streamerbrainz: tracker backup: {copy} exists; name a new file.\n"
    assert "cannot be written (No such file or directory); name another file." in tracker(database, "backup", "/no/such/copy.db", status=2)


def test_an_export_brings_mappings_what_is_ignored_and_open_conflicts(database, tmp_path):
    file, other = tmp_path / "export.json", tmp_path / "other.db"
    stranger = {**PILOT, "grandparentTitle": "Stranger", "grandparentRatingKey": "5", "grandparentGuid": "plex://show/stranger"}
    with Keeper(database) as keeper:
        keeper.send()
        keeper.send(stranger)
        tracker(database, "resolve", 1, "ignore")
        keeper.send({**stranger, "grandparentTitle": "Other", "grandparentRatingKey": "6", "grandparentGuid": "plex://show/other"})
    file.write_text(tracker(database, "export"))
    for _ in range(2):
        tracker(other, "import", file)
        assert tracker(other, "export") == file.read_text()
    with Keeper(other) as keeper:
        keeper.send({**PILOT, "ratingKey": "1002", "index": 2, "grandparentTitle": "?"})
        keeper.send(stranger)
    assert [brief(row)[:2] for row in rows(other)] == [("success", "already_watched"), ("ignored", "auto_mark_disabled")]
    assert [each["title"] for each in json.loads(tracker(other, "conflicts", "-json"))] == ["Other"]


def test_what_is_exported_can_be_imported_elsewhere_and_twice(database, tmp_path):
    file, other = tmp_path / "export.json", tmp_path / "other.db"
    file.write_text(tracker(database, "export"))
    for _ in range(2):
        tracker(other, "import", file)
        assert tracker(other, "export") == file.read_text()


@pytest.mark.parametrize("content, sentence", [
    ({"shows": [{"title": "A", "yaer": 2008}]}, "shows[0] has an unknown key; known are title, year, tmdb_id, tvdb_id, imdb_id, episodes."),
    ({"shows": [{"title": "A", "episodes": [{"season": 1, "episode": 1}, {"season": 1, "episode": 2, "seen": 1}]}]},
     "shows[0].episodes[1] has an unknown key; known are season, episode, title, watched, watched_at, plays."),
    ({"films": []}, "the file has an unknown key; known are shows, movies, mappings, conflicts, unmarked."), ({"shows": [{}]}, "shows[0] has no title."),
    ({"shows": [{"title": "A", "year": "2008"}]}, "shows[0].year has the wrong type."), ([], "{} has no watch history; give Trakt's zip or its watched-history.json, Yamtrack's CSV, or JSON of `tracker export`."),
    ({"shows": [{"title": "A", "tmdb_id": True}]}, "shows[0].tmdb_id has the wrong type."), ({"movies": [7]}, "movies[0] is not an object."),
    ({"shows": [{"title": "A", "episodes": [{"season": 1}]}]}, "shows[0].episodes[0] needs a season and an episode from 0 to 2147483648."),
    ({"shows": [{"title": "A", "episodes": [{"season": -1, "episode": 1}]}]}, "shows[0].episodes[0].season is out of range."),
    ({"movies": [{"title": "A", "watched_at": "yesterday"}]}, "movies[0] has a time unlike 2026-11-21T20:15:00Z."),
    ({"movies": [{"title": "A", "watched_at": "2026-11-21T20:15:00"}]}, "movies[0] has a time unlike 2026-11-21T20:15:00Z."),
    ({"movies": [{"title": "A", "imdb_id": "1"}]}, "movies[0].imdb_id is not an id such as tt0903747."),
    ({"mappings": [{"server": "s", "key": "key:1"}]}, "mappings[0].type is neither show nor movie."),
    ({"conflicts": [{"server": "s", "key": "key:1", "type": "track"}]}, "conflicts[0].type is neither show nor movie."),
    ({"shows": [{"title": "A"}], "movies": [{"title": "B"}], "mappings": [{"type": "show", "show": 1}]}, "mappings[0].show is not a show in the file."),
    ({"shows": [{"title": "A"}], "mappings": [{"type": "movie", "show": 0}]}, "mappings[0].show is not a movie in the file."),
    ({"shows": [{"title": "A", "tmdb_id": 10 ** 30}]}, "shows[0].tmdb_id is out of range.")])
def test_a_file_with_a_mistake_is_refused_whole_with_its_place(tmp_path, content, sentence):
    file = tmp_path / "f.json"
    file.write_text(json.dumps(content))
    assert tracker(tmp_path / "t.db", "import", file, status=2) == f"streamerbrainz: tracker import: {sentence.format(file)}\n"
    assert tracker(tmp_path / "t.db", "shows") == "The tracker is empty. `tracker import` reads your Plex library into it.\n"


@pytest.mark.parametrize("words, sentence", [
    ("tracker", f"tracker: say one of {', '.join(sb.TRACKER_COMMANDS)}; see: streamerbrainz.py -h"),
    ("tracker frob", f"tracker: say one of {', '.join(sb.TRACKER_COMMANDS)}; see: streamerbrainz.py -h"),
    ("tracker shows", "tracker: name the database with -tracker-db FILE, or turn it on: setup -tracker-db FILE."), ("tracker show -tracker-db {}", "tracker show: call it as: tracker show ID|WORDS..."),
    ("tracker resolve 1 -tracker-db {}", "tracker resolve: call it as: tracker resolve ID SHOW|new|ignore"),
    ("tracker resolve 7 new -tracker-db {}", "there is no such conflict; `tracker conflicts` prints their ids."),
    ("tracker show 99 -tracker-db {}", "there is no such show; `tracker shows` prints their ids."),
    ("tracker import /no/such -tracker-db {}", "tracker import: the file that it names cannot be read as JSON (No such file or directory)."),
    ("tracker import -tracker-db {}", "tracker import: give -plex-server-url and -plex-token-file, or a FILE.json."),
    ("tracker log -status frob -tracker-db {}", "-status: give one of success, failed, ignored, duplicate, waiting (see: streamerbrainz.py -h)"),
    ("-tmdb-token-file t", "-tmdb-token-file is given, but no -tracker-db; only the tracker uses it."),
    ("-rate-limit x", "-rate-limit: give a whole number from 0 to 1000000 (see: streamerbrainz.py -h)"),
    ("secret -webhook-secret-file /no/such/f", "secret: the file that it names cannot be written (No such file or directory); make its folder, writable by you.")])
def test_a_wrong_call_of_the_tracker_is_one_sentence_and_status_2(words, sentence, database):
    done = call(*words.format(database).split())
    assert done == (2, "", f"streamerbrainz: {sentence}\n")


def test_what_is_looked_at_fits_80_columns_and_holds_no_control_characters(tmp_path, database):
    evil = {"shows": [{"title": "\x1b[31m" + "long " * 40 + "\u202e", "year": 2001, "episodes": [{"season": s, "episode": e} for s in (0, 1, 20) for e in range(1, 120)]},
                      {"title": "進撃の巨人" * 12, "year": 2013, "episodes": [{"season": 1, "episode": 1}]}],
            "mappings": [{"type": "show", "key": "key:1", "by": "\x1b[31m" * 9, "show": 0}], "conflicts": [{"type": "movie", "title": "\x1b", "kind": "\x1b[31m" * 9}]}
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    tracker(database, "import", tmp_path / "evil.json")
    with Keeper(database) as keeper:
        keeper.send({**PILOT, "grandparentTitle": "\x1b[32m" + "wide " * 50, "title": "\n"})
        keeper.send({**PILOT, "grandparentTitle": "巨人" * 60, "ratingKey": "2"})
    for words in (("shows",), ("show", 3), ("show", 4), ("log",), ("conflicts",), ("mappings",)):
        said = tracker(database, *words)
        assert max(map(len, said.splitlines())) <= 80, said
        assert said.replace("\n", "").isprintable(), said
    for line in tracker(database, "shows").splitlines():
        assert sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in line) <= 80, line


WORDS = ("river night house city stone garden winter summer doctor secret lost king queen blood moon star iron silver dark bright last first dead "
         "living north south island ocean fire glass paper bridge tower shadow mirror road train hotel hospital school")


def test_of_many_shows_the_one_most_alike_is_the_closest_match(store):
    chance = random.Random(2)
    titles = sorted({f"the {' '.join(chance.sample(WORDS.split(), 3))} {n % 97 or ''}".strip().title() for n in range(2000)})
    with store.transaction():
        for title in titles:
            store.add_show(sb.Show("episode", title, 1990))
    for title in [*chance.sample(titles, 6), "Zzyzx Qqqq"]:
        letters = list(title)
        letters[chance.randrange(len(letters))] = chance.choice("abcx")
        misspelt = "".join(letters)
        scores = {each: sb.similarity(sb.normal(misspelt), sb.normal(each)) for each in [*titles, "Breaking Bad"]}
        best = max(scores.values())
        verdict = store.match_title(sb.Show("episode", misspelt, 1950))       # of another year: never certain
        found = verdict.candidates[0] if isinstance(verdict, sb.Conflict) and verdict.candidates else None
        if isinstance(verdict, sb.Match):
            assert scores[store.shows("id = ?", verdict.show_id)[0].title] == best
        elif best < sb.MIN_SIMILARITY:
            assert verdict.kind == "no_match" and found is None
        else:
            assert scores[found.show.title] == best and found.score == pytest.approx(best, abs=0.01)


# === Browse ===

# --- the world

OURS = "Origin: http://pi.lan:3001\n"


class Shelf(Site):
    """A listener with the pages of a tracker, and a worker that hears of each change."""

    def __init__(self, database, folder, has_secret=True):
        super().__init__(gate=sb.Gate(webhook_secret(folder) if has_secret else None))
        self.keeper = Keeper(database)
        self.pages.glance = functools.partial(sb.glance, self.keeper.store)
        sb.add_pages(self.pages, self.keeper.store, self.keeper.journal.written)
        self.threads.append(threading.Thread(target=self.work, daemon=True))
        self.ended = False

    def work(self):
        while not self.ended:
            if self.keeper.journal.written.wait(0.02):
                self.keeper.journal.written.clear()
                self.keeper.worker.drain()

    def __exit__(self, *ends):
        self.ended = True
        super().__exit__(*ends)
        self.keeper.store.close()

    def get(self, path, head=None):
        """Status and body."""
        return get(self, path, f"Cookie: {self.cookie}\n" if head is None else head)

    def post(self, path, body="", head=OURS, cookie=None, content_type="application/x-www-form-urlencoded"):
        """Status, where it leads to, and body."""
        head = f"Cookie: {self.cookie if cookie is None else cookie}\n{head}"
        answer = exchange(self, raw(f"POST {path} HTTP/1.1\nHost: pi.lan:3001\nContent-Type: {content_type}\nContent-Length: {len(body)}\n{head}", body.encode()))
        place = re.search(rb"\r\nLocation: (.*)\r\n", answer)
        return status(answer), place and place[1].decode(), answer.partition(b"\r\n\r\n")[2].decode()

    @property
    def cookie(self):
        return f"x=y; {sb.COOKIE}={sb.cookie_of(SECRET)}"

    def watched(self, show_id=1):
        return {(row[0], row[1]) for row in self.keeper.store.all("SELECT DISTINCT season, episode FROM play WHERE show_id = ?", show_id)}


@pytest.fixture
def shelf(database, tmp_path, lines):
    with Shelf(database, tmp_path) as site:
        yield site


STRANGER = {**PILOT, "grandparentTitle": "Braking <b>Bad", "grandparentGuid": None}


def test_the_secret_gives_a_cookie_that_does_not_tell_it_and_opens_each_page(shelf, monkeypatch):
    answer = exchange(shelf, raw(f"GET /?token={SECRET} HTTP/1.1\nHost: x\n"))
    cookie = re.search(rb"\r\nSet-Cookie: (streamerbrainz=[0-9a-f]{64}); Path=/; Max-Age=\d+; HttpOnly; SameSite=Strict\r\n", answer)[1].decode()
    assert SECRET not in cookie and cookie in shelf.cookie
    for path in ("/", "/now", "/watched", "/watched/1", "/questions", "/mappings", "/log"):
        assert shelf.get(path, f"Cookie: a=b; {cookie}\n")[0] == shelf.get(f"{path}?token={SECRET}", "")[0] == 200
    assert b"Set-Cookie" not in exchange(shelf, raw(f"GET /now?token={SECRET} HTTP/1.1\nHost: x\n"))
    assert shelf.get("/now?token=wrong")[0] == 200                  # the cookie is enough
    monkeypatch.setattr(sb, "MAX_GUESSES", 5)
    wrong = [f"Cookie: streamerbrainz={word}\n" for word in ("", SECRET, "0" * 64, cookie[15:-1], "\xff", sb.cookie_of("another"))]
    assert [shelf.get("/watched", head)[0] for head in wrong] == [401] * 5 + [429]      # each is a guess
    assert shelf.get("/healthz", "")[0] == 200


def test_shows_are_listed_the_last_watched_first_found_by_words_and_paged(shelf, monkeypatch):
    said = shelf.get("/watched")[1]
    assert '<a href="/watched/1"><bdi>Breaking Bad (2008)</bdi></a>' in said and ">Heat (1995)</bdi></a>" in said and 'aria-current=page>Watched' in said
    said = shelf.get("/watched?q=BREAKING&x=%00%ff")[1]
    assert "Breaking Bad" in said and "Heat" not in said and 'value="BREAKING"' in said
    assert "Nothing is here." in shelf.get("/watched?q=%22%3E%3Cscript%3E")[1] and "<script>" not in shelf.get("/watched?q=%22%3E%3Cscript%3E")[1]
    monkeypatch.setattr(sb, "PAGE_ROWS", 1)
    pages = [shelf.get(f"/watched?q=&page={page}")[1] for page in ("1", "2", "3", "0", "-1", "9" * 15, "9" * 5000)]
    assert [("Breaking" in page) + ("Heat" in page) for page in pages] == [1, 1, 0, 1, 1, 0, 1]
    assert 'page=2">More' in pages[0] and 'page=1">Back' in pages[1] and "More" not in pages[1]


def test_an_episode_a_season_and_a_movie_are_marked_and_taken_back(shelf):
    before = shelf.watched()
    first, *_ = [code for code in ((1, 1), (1, 2)) if code not in before]
    code = "S{:02}E{:02}".format(*first)
    assert f'value="mark {code}"' in shelf.get("/watched/1")[1]
    assert shelf.post("/watched/1?page=1", f"word=mark+{code}") == (303, f"/watched/1?page=1#{code[:3]}", "")
    assert first in shelf.watched() and f'value="unmark {code}"' in shelf.get("/watched/1")[1] and "(hand)" in shelf.get("/watched/1")[1]
    shelf.post("/watched/1", f"word=mark+{code}")                   # a double click
    assert shelf.keeper.store.one("SELECT count(*) FROM play WHERE source = 'hand'")[0] == 1
    shelf.post("/watched/1", f"word=unmark+{code}")
    assert first not in shelf.watched()
    shelf.post("/watched/1", "word=mark+S01")
    assert {(1, 1), (1, 2)} <= shelf.watched()
    shelf.post("/watched/1", "word=unmark+S01")
    assert not {code for code in shelf.watched() if code[0] == 1} and "Next: S01E01" in shelf.get("/watched/1")[1]
    for word, seen in (("unmark", set()), ("mark", {(0, 0)})):
        assert shelf.post("/watched/2", f"word={word}+S00")[0] == 303 and shelf.watched(2) == seen


def test_a_question_is_answered_and_again_and_a_mapping_corrected(shelf):
    shelf.keeper.send(STRANGER)
    said = shelf.get("/questions")[1]
    assert "Braking &lt;b&gt;Bad" in said and re.search(r'<button name=word value="1" title="">Breaking Bad \(2008\) \(0\.\d\d\)</button>', said)
    assert ">Breaking Bad (2008)</button>" in shelf.get("/questions/1?q=breaking")[1] and ">Heat" not in shelf.get("/questions/1?q=heat")[1]
    before = shelf.watched()
    assert shelf.post("/questions/1", "word=new")[:2] == (303, "/questions")
    eventually(lambda: shelf.watched(3) == {(1, 1)})
    assert "answered: Braking &lt;b&gt;Bad" in shelf.get("/questions")[1] and '<a href="/watched/3">' in shelf.get("/log")[1]
    shelf.post("/questions/1", "word=1")                            # another mind
    assert not shelf.watched(3) and shelf.watched() == before | {(1, 1)}
    said = shelf.get("/mappings?q=braking")[1]
    assert "Breaking Bad (2008), by person 1.00, 1 play<br>" in said and 'value="forget"' in said
    assert shelf.post("/mappings/1", "word=3")[:2] == (303, "/mappings") and shelf.watched(3) == {(1, 1)}
    shelf.post("/mappings/1", "word=ignore")
    assert not shelf.watched(3) and "ignored, by person" in shelf.get("/mappings/1")[1]
    shelf.post("/mappings/1", "word=forget")
    eventually(lambda: shelf.watched(3) == {(1, 1)})                # judged anew, and there is such a show by now
    assert ", by title 1.00" in shelf.get("/mappings/1")[1]


def test_the_log_says_what_became_of_each_webhook_by_status_and_paged(shelf, monkeypatch):
    shelf.keeper.send(STRANGER)
    shelf.keeper.send(event="media.play")
    shelf.keeper.send({**SONG, "title": "<i>x"}, event="media.rate")
    said = shelf.get("/log")[1]
    assert "conflict_created" in said and "event_not_scrobble" in said and "Braking &lt;b&gt;Bad S01E01" in said and "<i>x" not in said and "&lt;i&gt;x" in said
    assert "S01E01</bdi></a></span> <span" in said                       # the date does not stick to it
    assert "event_not_scrobble" not in shelf.get("/log?status=failed")[1] and "Nothing is here." in shelf.get("/log?status=duplicate")[1]
    monkeypatch.setattr(sb, "PAGE_ROWS", 1)
    assert [shelf.get(f"/log?page={page}")[1].count("class=row") for page in (1, 2, 3, 4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("path, body, code", [
    ("/watched/99", "word=mark+S01E01", 404), ("/watched/ID", "word=mark+S01E01", 404), ("/watched/1", "word=mark+S09E09", 400), ("/watched/1", "word=mark", 400),
    ("/watched/1", "", 400), ("/watched/1", "word=drop+S01E01", 400), ("/watched/1", "word=mark+S9999999999E9999999999", 400), ("/watched/1", "%00=%ff&" * 400, 400),
    ("/questions/9", "word=new", 404), ("/questions/1", "word=99", 400), ("/questions/1", "word=2", 400), ("/questions/1", "", 400), ("/questions/1", "word=%00%ff", 400),
    ("/mappings/9", "word=new", 404), ("/watched/1", "x" * 5000, 400), ("/watched", "word=1", 405), ("/watched/x", "", 404), ("/watched/12345678901", "", 404),
    ("/log/1", "", 404), ("/questions/9999999999", "word=" + "9" * 16, 404), ("/questions/1", "word=" + "9" * 16, 400)])
def test_a_form_that_asks_for_what_is_not_there_is_refused_with_a_sentence(shelf, path, body, code):
    shelf.keeper.send(STRANGER)
    before = shelf.watched()
    found = shelf.post(path, body)
    assert found[0] == code and found[2].endswith(".\n") and shelf.watched() == before
    assert shelf.get("/questions")[0] == 200                        # the database is well
    assert [shelf.get(page)[0] for page in ("/watched/99", "/questions/99", "/mappings/99", "/watched/ID")] == [404] * 4


@pytest.mark.parametrize("head, code", [
    ("", 403), ("Origin: http://evil.example\n", 403), ("Origin: null\n", 403), ("Origin: http://pi.lan\n", 403), ("Origin: http://pi.lan:8080\n", 403),
    ("Sec-Fetch-Site: cross-site\n", 403), ("Sec-Fetch-Site: same-site\n", 403), (OURS + "Sec-Fetch-Site: cross-site\n", 403), (OURS, 303),
    ("Origin: https://pi.lan:3001\n", 303), ("Sec-Fetch-Site: same-origin\n", 303), ("Sec-Fetch-Site: none\n", 303)])
def test_only_our_own_pages_may_change_something(shelf, head, code):
    before = shelf.watched(2)
    assert shelf.post("/watched/2", "word=unmark+S00", head)[0] == code and shelf.watched(2) == (set() if code == 303 else before)


def test_nobody_without_the_secret_changes_something_nor_does_a_get(shelf, database, tmp_path):
    shelf.post("/watched/2", "word=mark+S00")
    before = shelf.watched(2)
    assert before and [shelf.post("/watched/2", "word=unmark+S00", cookie=cookie)[0] for cookie in ("", "streamerbrainz=wrong")] == [401, 401]
    assert shelf.post("/watched/2?token=wrong", "word=unmark+S00", cookie="")[0] == 401
    assert shelf.get("/watched/2?word=unmark+S00")[0] == 200 and shelf.watched(2) == before
    assert shelf.post("/watched/2", "word=unmark+S00", content_type="text/plain")[0] == 400 and shelf.watched(2) == before
    assert "<fieldset disabled>" not in shelf.get("/watched/2")[1]
    assert shelf.post(f"/watched/2?token={SECRET}", "word=unmark+S00", cookie="")[0] == 303 and not shelf.watched(2)
    with Shelf(database, tmp_path, has_secret=False) as open_to_all:
        code, said = open_to_all.get("/watched/2")
        assert code == 200 and "<fieldset disabled>" in said and "button:disabled {" in said and "<code>streamerbrainz.py secret</code>" in said
        found = open_to_all.post("/watched/2", "word=mark+S00")
        assert found[0] == 403 and "streamerbrainz.py secret" in found[2] and not open_to_all.watched(2)
        assert status(exchange(open_to_all, raw("GET /watched HTTP/1.1\nHost: evil.example\n"))) == 421


def test_the_pages_load_nothing_foreign_and_a_tracker_that_is_gone_is_503(shelf, database):
    for path in ("/watched", "/watched/1", "/questions", "/mappings", "/log"):
        answer = exchange(shelf, raw(f"GET {path} HTTP/1.1\nHost: x\nCookie: {shelf.cookie}\n"))
        assert b"\r\nContent-Security-Policy: default-src 'none'; " in answer and b"unsafe" not in answer and not re.search(rb"(src|href)=.?(https?:|//)", answer)
    database.unlink()
    assert shelf.get("/watched")[0] == shelf.post("/watched/1", "word=mark+S01")[0] == 503


class Browser:
    """A real Chromium, told what to do through a pipe."""

    def __init__(self, chromium, folder):
        ours, theirs = os.pipe(), os.pipe()

        def arrange():
            for low, high in ((ours[0], 3), (theirs[1], 4)):
                os.dup2(os.dup2(low, high + 200), high)
        self.process = subprocess.Popen([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                                         f"--user-data-dir={folder}"], preexec_fn=arrange, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        self.into, self.out, self.session, self.count = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb"), {}, 0
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def do(self, method, **words):
        self.count += 1
        self.into.write(json.dumps({"id": self.count, "method": method, "params": words, **self.session}).encode() + b"\0")
        while True:
            said = json.loads(b"".join(iter(lambda: self.out.read(1).strip(b"\0"), b"")))
            if said.get("id") == self.count:
                return said.get("result", {})          # none: the page has just changed

    def run(self, script):
        return self.do("Runtime.evaluate", expression=script, returnByValue=True).get("result", {}).get("value")

    def open(self, url):
        self.do("Page.navigate", url=url)
        eventually(lambda: self.run("document.readyState") == "complete" and self.run("location.href") == url)

    def click(self, word, path):
        """Click on the one link or button of a page that begins with this word."""
        eventually(lambda: self.run("document.readyState + location.pathname") == f"complete{path}")
        script = f"e = [...document.querySelectorAll('a, button:enabled')].filter(e => e.textContent.startsWith({json.dumps(word)})); e.length === 1 && !e[0].click()"
        eventually(lambda: self.run(script))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.into.close()
        self.out.close()


FOREIGN = """<!DOCTYPE html><form action="{url}/watched/1" method=post><input name=word value="mark S01"></form><script>document.forms[0].submit()</script>"""


def test_in_a_real_browser_clicks_answer_a_question_and_a_foreign_site_changes_nothing(shelf, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")

    class Website(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(FOREIGN.format(url=url).encode())

        def log_message(self, *_):
            pass
    url, browser = f"http://127.0.0.1:{shelf.port}", Browser(chromium, tmp_path / "chromium")
    shelf.keeper.send(STRANGER)
    shelf.post("/watched/1", "word=unmark+S01")
    try:
        browser.open(f"{url}/?token={SECRET}")
        assert browser.run("document.cookie") == ""
        browser.click("Questions", "/")
        browser.click("Breaking Bad (2008) (0.", "/questions")
        eventually(lambda: (1, 1) in shelf.watched())               # what waited
        eventually(lambda: "answered: Breaking Bad" in (browser.run("document.body.textContent") or ""))
        browser.click("Watched", "/questions")
        browser.click("Breaking Bad (2008)", "/watched")
        browser.click("2", "/watched/1")
        eventually(lambda: (1, 2) in shelf.watched())
        shelf.post("/watched/1", "word=unmark+S01")
        while not shelf.inbox.empty():
            shelf.inbox.get()
        with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Website)) as website:
            for host, code in (("127.0.0.1", 403), ("localhost", 401)):     # of the same site, with the cookie; of another one
                browser.do("Page.navigate", url=f"http://{host}:{website.server_address[1]}/")
                while (refused := shelf.inbox.get(timeout=30)).status == 404:       # /favicon.ico, which is not there
                    pass
                assert refused.status == code
    finally:
        browser.close()
    assert not {code for code in shelf.watched() if code[0] == 1}


# === Daemon ===

# --- the world


def test_under_systemd_each_line_has_its_priority_and_no_time():
    with open("/dev/null", "w") as elsewhere:
        assert not sb.in_journal({"JOURNAL_STREAM": f"{os.fstat(elsewhere.fileno()).st_dev}:1"})
    status_ = os.fstat(2)
    assert sb.in_journal({"JOURNAL_STREAM": f"{status_.st_dev}:{status_.st_ino}"})
    record = sb.logging.makeLogRecord({"msg": "%s", "args": ("a\nb",), "levelno": sb.logging.WARNING, "fields": {"a": "x y"}})
    assert sb.log_line(as_json=False, journal=True, record=record) == r'<4>a\nb a="x y"'


def hold(descriptor, action):
    """Ctrl-S or Ctrl-Q on a terminal."""
    if os.isatty(descriptor):
        termios.tcflow(descriptor, action)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("make", [os.pipe, lambda: [each.detach() for each in socket.socketpair()], os.openpty])
def test_what_nobody_reads_of_the_log_is_dropped_at_once_counted_and_told_when_it_is_read_again(make, held):
    reader, writer = make()
    with the_log(), open(writer, "w") as stream, open(reader, "rb", buffering=0) as heard:
        handler = sb.LogHandler(stream)
        handler.format = functools.partial(sb.log_line, False, True)
        sb.log.handlers[:], sb.log.level, sb.log.propagate = [handler], sb.logging.INFO, False
        for turn in range(2):
            logged, begun, text = 0, time.monotonic(), b""
            if held:
                hold(writer, termios.TCOOFF)
            while handler.dropped < 5 and logged < 50_000:
                sb.say(sb.logging.INFO, f"{turn} {logged} " + "\u00e9" * 60)
                logged += 1
            assert handler.dropped == 5 and time.monotonic() - begun < 5
            if held:
                hold(writer, termios.TCOON)
            while b"were dropped: nobody read them" not in text:       # it is told although nothing else is logged
                text += heard.read(65536)
            while sb.select.select([heard], [], [], 0.05)[0]:           # until there is room for sure
                text += heard.read(65536)
            sb.say(sb.logging.INFO, "after")
            while b"after" not in text:
                text += heard.read(65536)
            lines = text.decode("utf-8", "replace").replace("\r", "").splitlines()
            whole = [line for line in lines if re.fullmatch(rf"<6>{turn} \d+ \u00e9{{60}}", line)]
            told = [int(each) for each in re.findall(r"<4>(\d+) lines of the log were dropped: nobody read them\n", "\n".join(lines))]
            assert lines[-1] == "<6>after" and told[-1] == 5       # a busy terminal has room now and then meanwhile, and tells of fewer
            assert len(whole) - (logged - sum(told)) in range(1 + len(told)) and len(lines) - len(whole) <= 1 + 2 * len(told)      # some were torn
        eventually(lambda: "log" not in [thread.name for thread in threading.enumerate()])


def test_what_cannot_be_told_at_once_of_dropped_lines_is_told_later():
    reader, writer = os.pipe()
    with the_log(), open(writer, "w") as stream, open(reader, "rb", buffering=0) as heard:
        handler = sb.LogHandler(stream)
        sb.log.handlers[:], sb.log.level, sb.log.propagate = [handler], sb.logging.INFO, False
        while handler.dropped < 3:
            sb.say(sb.logging.INFO, "x" * 1000)
        with handler.lock:                                 # while the thread that tells of it waits for this lock ...
            room = len(heard.read(65536))
            os.write(writer, b"y" * room)                  # ... there is no room again
        text = ""
        while "3 lines" not in text:
            text += heard.read(65536).decode()
    assert text.endswith("3 lines of the log were dropped: nobody read them\n")


def test_a_log_that_is_closed_or_broken_harms_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with the_log(), open(writer, "w") as stream:
        handler = sb.LogHandler(stream)
        sb.log.handlers[:] = [handler]
        for _ in range(3):
            sb.say(sb.logging.ERROR, "x" * 9000)
    handler.handle(sb.logging.makeLogRecord({"msg": "x", "levelno": sb.logging.ERROR}))       # closed now
    assert handler.dropped == 0


def test_a_daemon_whose_log_nobody_reads_answers_and_ends_in_time():
    port = free_port()
    with subprocess.Popen([sys.executable, PROGRAM, "-webhooks-host", "127.0.0.1", "-webhooks-port", str(port), "-log-level", "debug"],
                          stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process, contextlib.ExitStack() as stop:
        os.set_blocking(process.stderr.fileno(), False)
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 8192)
        address, text = types.SimpleNamespace(port=port), b""

        def heard(pattern):
            nonlocal text
            text += process.stderr.read() or b""
            return re.findall(pattern, text)
        stop.callback(process.kill)
        eventually(lambda: heard(b"listening"))
        begun = time.monotonic()
        for _ in range(200):
            assert status(exchange(address, post())) == 200
        assert time.monotonic() - begun < 5
        eventually(lambda: sum(map(int, heard(rb"WARN  (\d+) lines of the log were dropped: nobody read them\n"))) > 5)
        for _ in range(60):
            exchange(address, post())
        process.terminate()
        assert process.wait(5) == 0                        # although nobody reads it


def test_systemd_is_told_and_a_manager_that_is_gone_is_no_error(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        systemd = sb.Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "4000000"})
        assert systemd.wake_s == 2.0
        systemd.notify("READY=1", "STATUS=well")
        assert manager.recv(100) == b"READY=1\nSTATUS=well"
    os.unlink(address)
    systemd.notify("READY=1")


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "4000000"}, {"NOTIFY_SOCKET": "/x"}, {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "-1"},
                                     {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}])
def test_without_a_watchdog_nothing_is_pinged(environ):
    assert sb.Systemd(environ).wake_s == math.inf


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_whoever_is_connected(number):
    with Process() as daemon, connect(daemon) as idle:
        idle.sendall(raw("GET /healthz HTTP/1.1\nHost: x\n"))
        assert status(idle.recv(65536)) == 200             # and the connection is kept
        daemon.process.send_signal(number)
        assert daemon.process.wait(20) == 0
        eventually(lambda: daemon.text().endswith("stopped listening\n"))
    assert "Traceback" not in daemon.text()


def test_a_signal_is_not_lost_however_early_it_comes():
    for _ in range(6):
        with Process() as daemon:
            daemon.process.terminate()
            assert daemon.process.wait(20) == 0


def test_an_idle_daemon_holds_no_more_than_40_mb():
    with Process() as daemon:
        def resident_mb():
            return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text())[1]) / 1024
        eventually(lambda: resident_mb() < 40)


def test_a_bug_ends_the_process_with_its_traceback_and_status_1():
    script = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import streamerbrainz as sb; sb.Watcher.run = lambda self: 1 / 0; "
              f"sys.exit(sb.main(['-webhooks-port', '{free_port()}']))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1 and "ZeroDivisionError" in done.stderr


def test_under_nohup_a_closed_terminal_does_not_end_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)              # as nohup does; a child inherits it
    try:
        daemon = Process()
    finally:
        signal.signal(signal.SIGHUP, before)
    with daemon:
        daemon.process.send_signal(signal.SIGHUP)
        assert status(exchange(daemon, raw("GET /healthz HTTP/1.1\nHost: x\n"))) == 200
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0


def test_a_signal_that_comes_twice_at_once_is_one():
    for _ in range(4):
        with Process() as daemon:
            for _ in range(2):
                daemon.process.terminate()
            assert daemon.process.wait(20) == 0


def test_sighup_brings_a_look_at_once_and_it_goes_on(plex, token_file):
    words = ("-plex-token-file", token_file, "-plex-machine-id", "m1", "-no-plex-events", "-poll-interval", "0", "-plex-server-url")
    with Process(*words, plex.url) as daemon:
        for state in (PLAYING, PAUSED, STOPPED):
            plex.turn(state, TRACK)                        # nobody tells of it
            daemon.process.send_signal(signal.SIGHUP)
            eventually(lambda state=state: f"state={state}" in daemon.text(), 5)
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0


@contextlib.contextmanager
def notified(path):
    """What a daemon tells the service manager at a path: READY=1 and all that follows, with its time."""
    said = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)

        def listen():
            with contextlib.suppress(OSError):
                while True:
                    said.append((time.monotonic(), manager.recv(4096).decode()))
        threading.Thread(target=listen, daemon=True).start()
        yield said
        manager.shutdown(socket.SHUT_RDWR)


SILENT = """
import sys, threading; sys.path.insert(0, sys.argv.pop(1)); import streamerbrainz as sb
ask = sb.socket.getaddrinfo
def getaddrinfo(host, *words, flags=0, **more):
    return ask(host, *words, flags=flags, **more) if flags & sb.socket.AI_NUMERICHOST else threading.Event().wait()
sb.socket.getaddrinfo = getaddrinfo
sys.exit(sb.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_silent_name_servers_it_is_ready_answers_and_stops_at_once(tmp_path, token_file, number):
    port, address = free_port(), str(tmp_path / "notify")
    words = ("-plex-server-url", "http://plex.test:32400", "-plex-token-file", token_file, "-plex-machine-id", "m1", "-tracker-db", tmp_path / "db",
             "-webhooks-port", port)
    with notified(address) as said:
        begun = time.monotonic()
        daemon = subprocess.Popen([sys.executable, "-W", "error", "-c", SILENT, HERE, *map(str, words)], stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000"})
        ready_at = eventually(lambda: next((at for at, each in said if each == "READY=1"), None))
        assert ready_at - begun < 5.0                      # 0.3 s, on a machine that is not busy
        begun, where = time.monotonic(), types.SimpleNamespace(port=port)
        assert b"/webhooks/plex" in exchange(where, raw("GET / HTTP/1.1\nHost: localhost\nConnection: close\n"))
        assert time.monotonic() - begun < 0.5
        begun = time.monotonic()
        daemon.send_signal(number)                         # while the first look waits for the name
        _, err = daemon.communicate(timeout=20)
        took_s = time.monotonic() - begun
        eventually(lambda: any("STOPPING=1" in each for _, each in said))
    assert (daemon.returncode, err.count("stopped listening")) == (0, 1) and "Traceback" not in err and took_s < 2.0        # 0.3 s


def test_a_hook_ends_with_the_daemon_that_hangs_in_a_look(plex, token_file, tmp_path):
    hook, pid, hanging = tmp_path / "hook", tmp_path / "pid", threading.Event()
    hook.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {pid}\nsleep 60 & wait; sleep 60\n")
    hook.chmod(0o755)

    def answer(connection):
        if len(server.requests) > 1:
            hanging.set()
            hang(connection)
        http_answer(sessions_xml(session_xml()))(connection)
    words = ("-plex-token-file", token_file, "-plex-machine-id", "m1", "-no-plex-events", "-on-event", hook, "-plex-server-url")
    with RawServer(answer) as server, Process(*words, server.url) as daemon:
        eventually(lambda: written(pid))
        daemon.process.send_signal(signal.SIGHUP)
        assert hanging.wait(10)
        begun = time.monotonic()
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0 and time.monotonic() - begun < 2.0        # 0.6 s, on a machine that is not busy
        eventually(lambda: gone(written(pid)[0]), 1)
        eventually(lambda: daemon.text().count("stopped listening\n") == 1)


def test_the_watchdog_hears_of_us_before_each_long_sleep(tmp_path, monkeypatch):
    address, now = str(tmp_path / "notify"), [1000.0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.setblocking(False)
        systemd = sb.Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000"})
        monkeypatch.setattr(sb.time, "monotonic", lambda: now[0])
        heard, gaps, chance = 1000.0, [], random.Random(1)
        for _ in range(3000):
            systemd.tell(sb.Status())
            with contextlib.suppress(BlockingIOError):
                assert manager.recv(500).startswith(b"WATCHDOG=1")
                gaps.append(now[0] - heard)
                heard = now[0]
            now[0] += chance.choice((0.01, 0.3, sb.PLEX_S, systemd.wake_s, chance.uniform(0, systemd.wake_s)))
    assert max(gaps) < 35 and len(gaps) < 2900


@pytest.mark.parametrize("urls, said", [
    ("AAAA", ""), ("AABBA", "BA"), ("NNAA", "a"), ("NBNB", "b"), ("ANNA", ""), ("ANB", "B"), ("ABAB", "BAB"), ("NNN", "")])
def test_an_address_that_came_late_or_has_changed_is_said_once(urls, said, lines, monkeypatch):
    answers = iter({"N": f"http://{socket.gethostname()}:3001/webhooks/plex"}.get(each, f"http://10.0.0.{each}:3001/webhooks/plex") for each in urls)
    now = [0.0]
    monkeypatch.setattr(sb, "configured_url", lambda config, port: next(answers))
    monkeypatch.setattr(sb.time, "monotonic", lambda: now[0])
    address = sb.announce(sb.Config(), 3001, "?token=...")
    next(address)
    assert len(lines) == 1 and lines[0].startswith("<6>listening version=")
    for _ in range(len(urls) - 1):
        for _ in range(5):
            next(address)                                  # five times in a moment: nothing is asked
        now[0] += sb.ADDRESS_S
        next(address)
    next(address)
    news = [("known now" in line, re.search(r"//10\.0\.0\.(\w):3001/webhooks/plex\?token=\.\.\.", line)) for line in lines[1:]]
    assert "".join(where[1].lower() if known else where[1] for known, where in news if where) == said


def test_signals_again_and_again_change_nothing_of_the_end(plex, token_file):
    words = ("-plex-token-file", token_file, "-plex-machine-id", "m1", "-no-plex-events", "-plex-server-url")
    with RawServer(hang) as server, Process(*words, server.url) as daemon:
        eventually(lambda: server.requests)
        begun = time.monotonic()
        while daemon.process.poll() is None:               # while a look hangs
            daemon.process.terminate()
            time.sleep(0.02)
        assert daemon.process.wait(20) == 0 and time.monotonic() - begun < 2


def test_under_systemd_a_port_that_another_of_ours_holds_is_an_error():
    with Process() as daemon:
        again = start("-webhooks-port", daemon.port, "-webhooks-host", "127.0.0.1", env={**os.environ, "NOTIFY_SOCKET": "/nowhere"})
    assert again.status == 2 and re.fullmatch(
        rf"streamerbrainz: -webhooks-port: another StreamerBrainz, \S+ \(process {daemon.process.pid}\), listens on {daemon.port}; "
        r"end it \(and remove its cron lines\) first\.\n", again.err)


def test_started_twice_it_says_so_and_exits_0_for_cron():
    with Process() as daemon:
        again = start("-webhooks-port", daemon.port, "-webhooks-host", "127.0.0.1", "-log-level", "debug")
        assert again.status == 0
        assert again.err.endswith(f" DEBUG StreamerBrainz already listens there: nothing to do port={daemon.port}\n")
        assert len(again.err.splitlines()) == 1
        assert start("-webhooks-port", daemon.port, "-webhooks-host", "127.0.0.1") == (0, "", "")      # cron's log has no line a minute


def test_a_port_that_another_program_holds_is_an_error_that_names_it():
    with RawServer(lambda connection: None) as holder:
        port = holder.listener.getsockname()[1]
        done = start("-webhooks-port", port, "-webhooks-host", "127.0.0.1")
    name = pathlib.Path("/proc/self/comm").read_text().strip()
    assert (done.status, done.err) == (2, f"streamerbrainz: -webhooks-port: {port} is held by {name} (process {os.getpid()}); "
                                       "end that, or give another port.\n")


def test_a_whole_run_shows_the_token_nowhere(plex, token_file):
    plex.turn(PLAYING, TRACK)
    words = ("-plex-server-url", plex.url, "-plex-token-file", token_file, "-plex-machine-id", "m1", "-log-level", "debug", "-poll-interval", "1")
    with Process(*words) as daemon:
        eventually(lambda: "state=playing" in daemon.text())
        url = f"http://127.0.0.1:{daemon.port}/webhooks/plex"
        for content, word in ((TOKEN[::-1], "refuses the token"), ("two words", "stays in use"), (TOKEN, "answers again")):
            token_file.write_text(content)
            plex.send_webhook(url, "media.play", TRACK)
            eventually(lambda word=word: word in daemon.text())
        proc = pathlib.Path(f"/proc/{daemon.process.pid}")
        seen = daemon.text().encode() + (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0
    seen += daemon.text().encode()
    assert TOKEN.encode() not in seen and TOKEN[::-1].encode() not in seen and b"Traceback" not in seen


def test_json_lines_of_a_whole_run_can_be_parsed(plex, token_file):
    plex.turn(PLAYING, {**TRACK, "title": 'T\x85 "\\ \u2028 日本'})
    with Process("-plex-server-url", plex.url, "-plex-token-file", token_file, "-plex-machine-id", "m1", "-log-format", "json") as daemon:
        eventually(lambda: '"state": "playing"' in daemon.text())              # not only "Plex answers: ... is playing ..."
    assert [fields["title"] for fields in map(json.loads, daemon.lines) if "state" in fields] == ['T\x85 "\\ \u2028 日本']
    assert [list(json.loads(line))[:2] for line in daemon.lines] == [["time", "level"]] * len(daemon.lines)


def test_players_shows_each_with_its_flag_and_marks_the_configured_one(token_file):
    film = session_xml(PAUSED, player="m 2", tag="Video", product="", item={"type": "movie", "title": "October Sky"})
    episode = session_xml(player="m3", tag="Video", item={"type": "episode", "title": "Pilot", "grandparentTitle": "Twin Peaks"})
    with RawServer(http_answer(sessions_xml(session_xml(), film, episode))) as server:
        words = ("players", server.url.removeprefix("http://"), "-plex-token-file", token_file, "-plex-machine-id", "m1")
        assert call(*words) == (0, """\
* Living Room (Plexamp, Linux, configured)
    playing "Karma Police" by Radiohead
    -plex-machine-id m1

  Living Room (Linux)
    paused "October Sky"
    -plex-machine-id 'm 2'

  Living Room (Plexamp, Linux)
    playing "Pilot" of Twin Peaks
    -plex-machine-id m3
""", "")
        code, out, _ = call(*words, "-json")
    assert code == 0 and [(row["machine_id"], row["state"], row["configured"]) for row in json.loads(out)] == [
        ("m1", "playing", True), ("m 2", "paused", False), ("m3", "playing", False)]


def test_players_helps_when_nothing_plays_and_when_the_server_does_not_answer(plex, token_file):
    words = ("players", plex.url, "-plex-token-file", token_file)
    assert call(*words) == (
        0, f"Nothing plays on {plex.url}. A player shows up only while it plays: press play, then try again.\n", "")
    assert call(*words, "-json") == (0, "[]\n", "")
    token_file.write_text("wrong")
    assert call(*words) == (
        1, "", f"streamerbrainz: {plex.url} refuses the token (401): run `streamerbrainz.py login` as the server's owner.\n")


def test_players_asks_for_the_token_on_a_terminal(plex, monkeypatch):
    monkeypatch.setattr(sb.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sb.getpass, "getpass", lambda prompt: TOKEN)
    assert call("players", plex.url).status == 0
    monkeypatch.setattr(sb.getpass, "getpass", lambda prompt: "")
    assert call("players", plex.url) == (2, "", "streamerbrainz: players: a token is one word of plain characters.\n")


def test_the_log_of_a_command_does_not_outlive_it(lines):
    before = sb.log.handlers[:], sb.log.level
    assert call("tracker").status == 2 and (sb.log.handlers, sb.log.level) == before


# === Setup ===

@pytest.mark.parametrize("url, shown", [
    ("http://pi:3001/webhooks/plex?token=SECRET", "http://pi:3001/webhooks/plex?token=..."), ("http://u:SECRET@pi/", "http://pi/"),
    ("http://pi/webhooks/plex&token=SECRET", "http://pi/webhooks/plex?token=..."), ("http://pi/plex?SECRET", "http://pi/plex?token=..."),
    ("https://hooks.example/api/webhook/SECRET", "https://hooks.example/..."), ("SECRETSECRET", "/..."), ("http://pi/plex", "http://pi/plex"), ("", ""),
    ("http://u:p@SECRET@pi/plex", "http://pi/plex"), ("http://u:12/SECRET@pi/plex", "/..."), ("http://u:1?SECRET@pi/", "/..."),
    ("http://u:1#SECRET@pi/", "/..."), ("http://ha:8123/webhooks/SECRET", "http://ha:8123/..."), ("http://ha/webhooks/plexSECRET", "http://ha/..."),
    ("http://ha/webhooks/plex/SECRET", "http://ha/..."), ("http://ha/SECRET", "http://ha/..."), ("http://[::1]:3001/webhooks/plex", "http://[::1]:3001/webhooks/plex"),
    ("http://pi/webhooks/plex?token=SECRET@x", "http://pi/webhooks/plex?token=..."), ("ftp://u:SECRET@pi/", "/..."), ("http://pi/plex%3fSECRET", "http://pi/...")])
def test_no_url_is_shown_with_what_may_be_a_secret(url, shown):
    assert sb.without_secrets(url) == shown and "SECRET" not in shown


@pytest.mark.parametrize("status_, body, said", [
    (401, b'{"errors": [{"code": 1001, "message": "User could not be authenticated", "status": 401}]}',
     "refused: plex.tv answers 401 (User could not be authenticated): sign in anew: streamerbrainz.py login."),
    (401, b'<?xml version="1.0"?>\n<errors>\n  <error code="1001" message="User could not be authenticated" status="401"/>\n</errors>',
     "refused: plex.tv answers 401 (User could not be authenticated): sign in anew: streamerbrainz.py login."),
    (403, b'<errors><error code="1043" message="This action is not available for this user" status="403"/></errors>', f"pass: {sb.NO_PASS}"),
    (403, b'{"errors":[{"code":1043}]}', f"pass: {sb.NO_PASS}"),
    (404, b'{"errors": [{"code": 1020, "message": "Code not found or expired", "status": 404}]}',
     "missing: plex.tv answers 404 (Code not found or expired): begin anew."),
    (500, b"<html>", "starting: plex.tv answers 500: try again later."), (502, b"\xff" * 500, "starting: plex.tv answers 502: try again later.")])
def test_a_refusal_of_plex_tv_is_read_from_json_and_from_xml(status_, body, said):
    error = sb.plextv_error(status_, body)
    assert f"{error.fault}: {error}" == said


ODD = [b"", b"null", b"[]", b"{}", b"7", b'"x"', b"[null]", b"[[]]", b"[7]", b"<html/>", b"\xff", b"[" * 9999, b'{"id": {}, "code": [], "username": 7e9}',
       b'[{"clientIdentifier": {}, "provides": 7, "connections": {"a": 1}}]', b'[{"url": 7}]', b'[{"url": "x"}, null]', b'[{"provides": "server"}]']


@pytest.mark.parametrize("parse", [sb.parse_pin, sb.parse_account, sb.parse_resources, sb.parse_webhooks, sb.parse_now])
def test_no_answer_of_an_odd_shape_is_a_traceback(parse):
    for body in ODD:
        try:
            parse(body)
        except sb.PlexError as error:
            assert error.fault == "nonsense" and re.fullmatch("plex.tv answers without .*; try again later.", str(error))


def test_an_account_may_have_plex_pass_and_a_sign_in_lasts_as_long_as_plex_says():
    account = {"username": "ann", "subscription": {"active": True, "features": ["webhooks", "sync"]}}
    assert sb.parse_account(json.dumps(account).encode()) == ("ann", True)
    assert sb.parse_account(b'{"username": "", "title": "Kids", "subscription": {"features": ["sync"]}}') == ("Kids", False)
    pin = {"id": 111, "code": "7RQZ", "expiresIn": 900, "authToken": None}
    assert sb.parse_pin(json.dumps(pin).encode()) == ("111", "7RQZ", 900, "")
    assert sb.parse_pin(json.dumps({**pin, "authToken": TOKEN, "expiresIn": 10 ** 9}).encode()) == ("111", "7RQZ", sb.MAX_PIN_S, TOKEN)
    with pytest.raises(sb.PlexError):
        sb.parse_pin(json.dumps({**pin, "id": "1/../../user"}).encode())


def connection(address="192.168.1.5", port=32400, local=True, relay=False, uri=None):
    dashed = re.sub("[.:]", "-", address)
    return {"protocol": "https", "address": address, "port": port, "uri": uri or f"https://{dashed}.abc.plex.direct:{port}", "local": local, "relay": relay}


def resource(name="nas", identifier=SERVER, *connections, owned=True, provides="server", **more):
    return {"name": name, "product": "Plex Media Server", "provides": provides, "clientIdentifier": identifier, "owned": owned,
            "accessToken": "another-secret", "connections": [*connections], **more}


def test_http_at_home_comes_before_https_and_the_relay_never():
    body = json.dumps([resource("nas", "s1", connection("2.2.2.2", 443, False), connection("178.3.2.1", 8443, False, True), connection(), connection("fd00::5")),
                       resource("attic", "s2", owned=False, sourceTitle="bob"), resource("TV", "p1", provides="client,player", product="Plex for TV")]).encode()
    nas, attic, tv = sb.parse_resources(body)
    assert nas.urls == ["http://192.168.1.5:32400", "http://[fd00::5]:32400", "https://192-168-1-5.abc.plex.direct:32400",
                        "https://fd00--5.abc.plex.direct:32400", "https://2-2-2-2.abc.plex.direct:443"]
    assert (nas.owner, attic.owner, tv.provides, tv.product) == ("", "bob", ["client", "player"], "Plex for TV")
    assert sb.server_urls([connection("1.2.3.4/x"), connection(uri="https://evil.example/@plex.direct"), {"local": True}, None]) == [
        "http://192.168.1.5:32400", "https://1-2-3-4/x.abc.plex.direct:32400"][:1]


def test_a_list_of_webhooks_that_cannot_be_read_whole_is_not_read_at_all():
    assert sb.parse_webhooks(b"[]") == [] and sb.parse_webhooks(b'[{"url": "http://a"}, {"url": "x"}]') == ["http://a", "x"]
    xml = b'<?xml version="1.0"?>\n<webhooks>\n  <webhook url="http://a/?b=1&amp;c=2"/>\n  <webhook url="x"/>\n</webhooks>\n'
    assert sb.parse_webhooks(xml) == ["http://a/?b=1&c=2", "x"] and sb.parse_webhooks(b"<webhooks/>") == []
    assert sb.parse_webhooks(b'<?xml version="1.0" encoding="utf-7"?><MediaContainer><webhook url="x"/></MediaContainer>') == ["x"]
    for odd in (b"<webhooks><webhook/></webhooks>", b"<webhooks><hook url='x'/></webhooks>", b"<webhooks><webhook url='x'/>", xml[:-14],
                b"<user/>", b"<html><webhook url='x'/><p/></html>", b"<errors><error/></errors>", b'<!DOCTYPE a [<!ENTITY b "c">]><webhooks/>', b"<webhooks><!DOCTYPE x></webhooks>"):
        with pytest.raises(sb.PlexError):
            sb.parse_webhooks(odd)
    for odd in ([{"url": "x" * 9999}], [{}], [{"url": None}], [{"url": ""}], [{"url": "x"}] * 101, None, {}, {"url": "x"}):
        with pytest.raises(sb.PlexError):
            sb.parse_webhooks(json.dumps(odd).encode())


@pytest.mark.parametrize("before, after", [
    ([], ["ours"]), (["a"], ["a", "ours"]), (["a", "old", "b"], ["a", "ours", "b"]), (["old", "a", "old2"], ["ours", "a"]), (["a", "a"], ["a", "a", "ours"]),
    (["ours", "a"], ["ours", "a"]), (["a", "ours", "old"], ["a", "ours"])])
def test_our_webhook_takes_the_place_of_an_old_one_and_others_stay_in_order(before, after):
    is_ours = {"ours", "old", "old2"}.__contains__
    assert sb.with_webhook(before, "ours", is_ours) == after
    assert sb.with_webhook(before, "", is_ours) == [url for url in before if not is_ours(url)]


@pytest.mark.parametrize("before, after", [
    ("", "-a 1\n-b 'x y'\n"), ("# mine\n\n-log-level debug  # all\n", "# mine\n\n-log-level debug  # all\n-a 1\n-b 'x y'\n"),
    ("-b 'x y'   # kept\n# between\n-a 2 # the NAS\n-c 3", "-b 'x y'   # kept\n# between\n-a 1 # the NAS\n-c 3\n"),
    ("--a=2\r\n-b=old\r\n", "-a 1\n-b 'x y'\n"), ("#-a 2\n-ab 2\n-a 2\n-a 3\n-b \"x y\"\n", "#-a 2\n-ab 2\n-a 1\n-a 1\n-b \"x y\"\n")])
def test_of_a_file_of_flags_only_the_lines_that_differ_are_written(before, after):
    values = {"-a": "1", "-b": "x y"}
    assert sb.with_flags(before, values) == after and sb.with_flags(after, values) == after


def test_what_is_written_into_the_flags_is_read_back_as_it_was(tmp_path):
    values = {"-plex-machine-id": "-a'b#c d", "-plex-server-url": "http://plex:32400", "-plex-token-file": "~/a b/token"}
    (tmp_path / "flags").write_text(sb.with_flags("-no-plex-events\n", values))
    read = config(f"@{tmp_path}/flags")
    assert (read.plex_machine_id, read.plex_token_file, read.plex_events) == ("-a'b#c d", os.path.expanduser("~/a b/token"), False)


def test_a_code_is_drawn_large_if_it_can_be():
    assert [line.rstrip() for line in sb.large("7I").splitlines()] == [
        "        ######  ######", "            ##    ##", "            ##    ##", "          ##      ##", "          ##    ######"]
    drawn = {each: sb.large(each) for each in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert len({*drawn.values()}) == 36 and all(len(lines.splitlines()) == 5 for lines in drawn.values()) and sb.large("a") == sb.large("A")
    assert max(map(len, sb.large("W" * 8).splitlines())) <= 80 and not sb.large("\u0661_").strip() and not sb.large("A" * 25).strip()


def test_what_the_daemon_tells_of_its_witnesses_is_said_in_words():
    changes = [{"at": "T", "state": state, "title": "x", "by": by} for state, by in (("paused", "events"), ("playing", "webhook"), ("stopped", "poll"))]
    assert sb.parse_now(json.dumps({"changes": changes, "webhooks": {"arrived": 2, "median_delay_s": 0.25}}).encode()) == ([
        'T paused "x": seen by the event stream first, then by the sessions', 'T playing "x": seen by a webhook first, then by the sessions',
        'T stopped "x": seen by the sessions'], 2, 0.25)


# --- the world


class Cloud:
    """A stand-in for plex.tv, in Plex's own words.  A test changes what it answers."""
    ACCOUNT: typing.ClassVar = {"id": 1, "username": "ann", "email": "ann@example.com", "subscription": {"active": True, "features": ["webhooks", "sync"]}}

    def __init__(self):
        self.requests, self.urls, self.polls, self.pins, self.resources = [], [], 0, 0, []
        self.entered_after, self.tokens, self.account = 1, {TOKEN}, self.ACCOUNT
        self.instead = {}                                  # (method, path): what is answered instead, one after the other
        cloud = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def answer(self):                              # any method
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                path = self.path.partition("?")[0]
                cloud.requests.append((self.command, self.path, dict(self.headers), body))
                waiting = cloud.instead.get((self.command, path)) or [None]
                found = waiting[0] if len(waiting) == 1 else waiting.pop(0)
                found = found() if callable(found) else found
                status, fields, *head = found or cloud.answer(self.command, path, self.headers, body)
                content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
                self.send_response(status)
                for name, value in head:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass
        for method in ("GET", "POST", "DELETE"):
            setattr(Answer, f"do_{method}", Answer.answer)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def error(self, status, code, message):
        return status, {"errors": [{"code": code, "message": message, "status": status}]}

    def answer(self, method, path, headers, body):
        if not headers.get("X-Plex-Client-Identifier"):
            return self.error(400, 1000, "X-Plex-Client-Identifier is missing")
        pin = {"id": 111222333 + self.pins, "code": f"7RQ{self.pins}", "product": "0", "trusted": False, "expiresIn": 900, "authToken": None}
        if path.startswith("/api/v2/pins"):
            if method == "POST":
                self.pins, self.polls = self.pins + 1, 0
                return 201, {**pin, "id": pin["id"] + 1, "code": f"7RQ{self.pins}"}
            self.polls += 1
            return 200, {**pin, "authToken": TOKEN if self.polls > self.entered_after else None}
        if headers.get("X-Plex-Token") not in self.tokens:
            return self.error(401, 1001, "User could not be authenticated")
        if path == "/api/v2/users/signout":
            self.tokens.clear()
            return 204, b""
        if path == "/api/v2/user/webhooks":
            if "webhooks" not in self.account["subscription"]["features"]:
                return 403, b'<errors>\n  <error code="1043" message="This action is not available for this user" status="403"/>\n</errors>\n'
            if method == "POST":
                self.urls = [url for name, url in urllib.parse.parse_qsl(body) if name == "urls[]"]
            return (201 if method == "POST" else 200), [{"url": url} for url in self.urls]
        return {"/api/v2/user": (200, self.account), "/api/v2/resources": (200, self.resources)}.get(path) or self.error(404, 1020, "Not found")


@pytest.fixture
def cloud(monkeypatch):
    """A plex.tv, and waits that are short."""
    cloud = Cloud()
    monkeypatch.setenv("STREAMERBRAINZ_PLEXTV_URL", cloud.url)
    for name in ("TRY_S", "GDM_S"):
        monkeypatch.setattr(sb, name, 0.02)
    monkeypatch.setattr(sb, "NEARBY", "http://127.0.0.1:9")
    with serving(cloud.server):
        yield cloud


def test_login_writes_the_token_of_who_enters_the_code(cloud, home):
    done = call("login", "-yes")
    file = home / ".config/streamerbrainz/plex-token"
    assert done.status == 0 and file.read_text() == f"{TOKEN}\n" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "https://plex.tv/link/?pin=7RQ1" in done.out and re.search("^ +7RQ1$", done.out, re.M) and "##" not in done.out and TOKEN not in done.out + done.err
    assert "Signed in as ann" in done.out and max(map(len, done.out.splitlines())) <= 80
    told = [{name: value for name, value in headers.items() if name.startswith("X-Plex")} for _, _, headers, _ in cloud.requests]
    assert {each["X-Plex-Client-Identifier"] for each in told} == {(home / ".config/streamerbrainz/client-id").read_text().strip()}
    assert told[0].keys() == {"X-Plex-Client-Identifier", "X-Plex-Product", "X-Plex-Version", "X-Plex-Platform", "X-Plex-Device-Name"}
    assert all(TOKEN not in path for _, path, _, _ in cloud.requests)
    before = len(cloud.requests)
    assert "Signed in as ann" in call("login", "-yes").out                     # it is kept, and nobody is asked again
    assert [path for _, path, _, _ in cloud.requests[before:]] == ["/api/v2/user"]


def test_a_token_that_has_ended_is_replaced_and_one_that_may_be_valid_is_kept(cloud, home):
    file = home / ".config/streamerbrainz/plex-token"
    file.parent.mkdir(parents=True)
    file.write_text("old-token")
    file.chmod(0o600)
    cloud.instead["GET", "/api/v2/user"] = [(503, b"<html>busy</html>")]
    assert "plex.tv answers 503: try again later." in call("login", "-yes").out and file.read_text() == "old-token" and cloud.pins == 0
    cloud.instead.clear()
    done = call("login", "-yes")
    assert "User could not be authenticated" in done.out and file.read_text() == f"{TOKEN}\n"


def test_a_code_that_ended_is_followed_by_a_new_one_and_four_are_enough(cloud, home):
    gone = cloud.error(404, 1020, "Code not found or expired")
    pending = 200, {"id": 1, "code": "7RQ1", "expiresIn": 900, "authToken": None}
    cloud.instead["GET", "/api/v2/pins/111222334"] = [pending, gone]
    done = call("login", "-yes")
    assert done.status == 0 and done.out.count("no longer valid: it expired, or it was denied.") == 1 and re.search("^ +7RQ2$", done.out, re.M)
    (home / ".config/streamerbrainz/plex-token").unlink()
    cloud.instead["GET", "/api/v2/pins/111222336"] = cloud.instead["GET", "/api/v2/pins/111222337"] = [gone]
    cloud.instead["GET", "/api/v2/pins/111222338"] = cloud.instead["GET", "/api/v2/pins/111222339"] = [gone]
    done = call("login", "-yes")
    assert (done.status, done.err) == (1, "streamerbrainz: None of 4 codes was entered; run this again when you are at a browser.\n")
    assert not (home / ".config/streamerbrainz/plex-token").exists()


def test_a_code_expires_by_our_clock_too(cloud):
    cloud.entered_after = 10 ** 9
    cloud.instead["POST", "/api/v2/pins"] = [(201, {"id": 5, "code": "ABCD", "expiresIn": 1, "authToken": None})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sb, "MAX_CODES", 1)
        assert call("login", "-yes").status == 1


def test_plex_tv_is_waited_for_as_it_says_and_not_for_ever(cloud, home):
    cloud.instead["POST", "/api/v2/pins"] = [(429, b"Too many", ("Retry-After", "0")), None]
    done = call("login", "-yes")
    assert done.status == 0 and "plex.tv is asked too often (429); waiting 0 s." in done.err
    (home / ".config/streamerbrainz/plex-token").unlink()
    cloud.instead["POST", "/api/v2/pins"] = [(429, b"", ("Retry-After", "0"))]
    assert call("login", "-yes").err.endswith("streamerbrainz: plex.tv answers 429: try again later.\n")


def test_without_plex_tv_the_way_out_is_said(monkeypatch, cloud):
    monkeypatch.setenv("STREAMERBRAINZ_PLEXTV_URL", "http://127.0.0.1:9")
    done = call("login", "-yes")
    assert (done.status, done.err) == (1, "streamerbrainz: http://127.0.0.1:9 cannot be reached: Connection refused. "
                                          "Is this machine online? Try again later.\n")


def test_a_home_that_cannot_be_written_is_noticed_before_plex_tv_is_asked(cloud, home):
    (home / ".config").write_text("a file")
    done = call("login", "-yes")
    assert done.status == 2 and done.err.startswith("streamerbrainz: login: ") and "cannot be written" in done.err and not cloud.requests


@pytest.mark.parametrize("words", ["setup", "login", "webhook add", "webhook remove", "uninstall"])
def test_without_a_terminal_and_without_yes_what_is_needed_is_said(words):
    done = start(*words.split())
    assert done.status == 2 and done.out == "" and len(done.err.splitlines()) == 1 and "give -yes for all defaults" in done.err


@pytest.fixture
def signed_in(cloud, home):
    """The home of somebody who has signed in, with a webhook secret."""
    folder = home / ".config/streamerbrainz"
    folder.mkdir(parents=True)
    for name, content in (("plex-token", TOKEN), ("webhook-secret", "new-secret\nold-secret\n"), ("flags", "-webhook-secret-file ~/.config/streamerbrainz/webhook-secret\n")):
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    return folder


def ours(query="?token=new-secret", host=None, port=3001):
    return f"http://{host or sb.guess_address('')}:{port}/webhooks/plex{query}"


@pytest.mark.parametrize("old", [
    "http://localhost:3001/webhooks/plex", "http://127.0.0.1:3001/webhooks/plex?token=x", "http://192.0.2.7:3001/webhooks/plex?token=old-secret",
    "http://192.0.2.7:3001/webhooks/plex?token=new-secret", "{ours}?token=another", "{ours}?token=old-secret", "{ours}"])
def test_webhook_add_puts_right_what_was_ours_and_leaves_the_others(cloud, signed_in, old, monkeypatch):
    cloud.urls = ["https://example.com/a?b=1&c=%20", old.format(ours=ours("")), "http://192.0.2.1:3001/other", "not a URL [", "http://[::1"]
    done = call("webhook", "add", "-yes")
    assert done.status == 0 and "   - done: " in done.out, done
    assert cloud.urls == ["https://example.com/a?b=1&c=%20", ours(), "http://192.0.2.1:3001/other", "not a URL [", "http://[::1"]
    assert " ".join(done.out.split()).endswith("of your Plex account (4 others stay)") and "new-secret" not in done.out + done.err and max(map(len, done.out.splitlines())) <= 80
    writes = sum(method == "POST" for method, *_ in cloud.requests)
    assert "All is as it should be." in call("webhook", "add", "-yes").out and sum(method == "POST" for method, *_ in cloud.requests) == writes == 1
    assert call("webhook", "remove", "-yes").status == 0 and ours() not in cloud.urls and len(cloud.urls) == 4


@pytest.mark.parametrize("theirs", [
    "http://192.0.2.50:3001/webhooks/plex?token=another-pi", "http://192.0.2.50:3001/api/webhooks/plex", "http://u:p@192.0.2.50:3001/webhooks/plex",
    "http://192.0.2.50:3002/webhooks/plex", "https://home.example/other/webhooks/plex", "https://home.example/webhooks/plex?token=another"])
def test_the_webhook_of_another_program_is_never_taken_for_ours(cloud, signed_in, theirs, monkeypatch):
    monkeypatch.setattr(sb, "send_to", lambda url: "fails")                  # it is switched off
    cloud.urls = [theirs]
    assert call("webhook", "add", "https://home.example/sb/webhooks/plex", "-yes").status == 0
    assert cloud.urls == [theirs, "https://home.example/sb/webhooks/plex?token=new-secret"]
    assert "All is as it should be." in call("webhook", "add", "https://home.example/sb/webhooks/plex", "-yes").out
    assert call("webhook", "remove", "-yes").status == 0 and cloud.urls == [theirs]


def test_a_webhook_that_cannot_be_written_back_is_not_read(cloud, signed_in):
    cloud.instead["GET", "/api/v2/user/webhooks"] = [(200, b'[{"url": "http://\\ud800/"}]')]
    done = call("webhook", "add", "-yes")
    assert done.status == 1 and "a list of webhooks that can be read whole" in done.err and not any(method == "POST" for method, *_ in cloud.requests)


def test_an_old_address_is_ours_unless_a_streamerbrainz_answers_there(cloud, signed_in, monkeypatch):
    with Site() as other:
        port = ("-webhooks-port", other.port)
        cloud.urls = [f"http://127.0.0.2:{other.port}/webhooks/plex"]
        monkeypatch.setattr(sb, "is_here", lambda host: False)
        monkeypatch.setattr(sb, "send_to", lambda url: sb.ARRIVES)
        assert call("webhook", "add", "-yes", *port).status == 0 and cloud.urls[0] == f"http://127.0.0.2:{other.port}/webhooks/plex" and len(cloud.urls) == 2
        monkeypatch.setattr(sb, "send_to", lambda url: "fails")
        assert call("webhook", "add", "-yes", *port).status == 0 and len(cloud.urls) == 1


def test_the_webhook_of_a_tunnel_is_added_with_the_secret_and_then_left_alone(cloud, signed_in):
    cloud.urls = ["http://localhost:3001/webhooks/plex"]
    assert call("webhook", "add", "https://pi.example.invalid/", "-yes").status == 0
    assert cloud.urls == ["https://pi.example.invalid/webhooks/plex?token=new-secret"]
    assert "All is as it should be." in call("webhook", "add", "-yes").out
    assert call("webhook", "list").out == "https://pi.example.invalid/webhooks/plex?token=...\n"
    assert call("webhook", "remove", "-yes").status == 0 and cloud.urls == []
    assert cloud.requests[-2][3] == "urls="
    for words in (("add", "ftp://x"), ("frob",), ("list", "http://x"), ("add", "http://x/?token=SECRET")):
        done = call("webhook", *words)
        assert done.status == 2 and "SECRET" not in done.err


def test_without_a_token_the_remedy_is_to_sign_in(cloud, home):
    for words in (("list",), ("add", "-yes"), ("remove", "-yes"), ()):
        assert call("webhook", *words) == (2, "", "streamerbrainz: webhook: there is no token; sign in first: streamerbrainz.py login\n")
    assert cloud.requests == []


def test_webhooks_that_come_as_xml_are_read_and_written_whole(cloud, signed_in):
    cloud.instead["GET", "/api/v2/user/webhooks"] = [(200, b'<webhooks>\n <webhook url="https://example.com/a?b=1&amp;c=2"/>\n</webhooks>'), None]
    assert call("webhook", "list").out == "https://example.com/...\n"
    cloud.instead["GET", "/api/v2/user/webhooks"] = [(200, b'<webhooks>\n <webhook url="https://example.com/a?b=1&amp;c=2"/>\n</webhooks>')] * 2 + [None]
    assert call("webhook", "add", "-yes").status == 0 and cloud.urls == ["https://example.com/a?b=1&c=2", ours()]


def test_another_program_that_writes_in_between_is_said_and_it_is_tried_once_more(cloud, signed_in):
    def steal():
        cloud.instead["POST", "/api/v2/user/webhooks"] = None
        cloud.urls = ["http://theirs/"]
        return 201, []
    cloud.instead["POST", "/api/v2/user/webhooks"] = [steal]
    done = call("webhook", "add", "-yes")
    assert "Another program wrote the account's webhooks in between; once more." in done.out and cloud.urls == ["http://theirs/", ours()]
    cloud.urls, cloud.instead["POST", "/api/v2/user/webhooks"] = [], [(201, [])]
    done = call("webhook", "add", "-yes")
    assert done.status == 1 and "another program writes them, too" in done.err


@pytest.mark.parametrize("answer", [(500, b""), (200, b"<html/>"), (200, {}), (200, [{"url": None}]), (200, [{"link": "x"}]), (401, b"")])
def test_webhooks_that_cannot_be_read_are_never_written(cloud, signed_in, answer):
    cloud.instead["GET", "/api/v2/user/webhooks"] = [answer]
    done = call("webhook", "add", "-yes")
    assert done.status == 1 and len(done.err.splitlines()) == 1 and not any(method == "POST" for method, *_ in cloud.requests)


def test_without_plex_pass_that_is_said_in_one_line(cloud, signed_in):
    cloud.account = {**cloud.ACCOUNT, "subscription": {"features": ["sync"]}}
    assert call("webhook", "add", "-yes") == (1, "", f"streamerbrainz: {sb.NO_PASS}\n")


class Terminal:
    """A command line on a pseudo-terminal of its own, typed at by a test."""

    BEGIN = "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"        # of the child: Ctrl-C is for it
    WHOLE = BEGIN + "os.execv(sys.executable, [sys.executable, '-W', 'error', 'streamerbrainz.py', *sys.argv[1:]])"
    QUICK = BEGIN + ("import streamerbrainz as sb\nsb.TRY_S = sb.GDM_S = sb.TOKEN_S = 0.05\n"
                     "sb.NEARBY = 'http://127.0.0.1:9'\nsys.exit(sb.main(sys.argv[1:]))")

    def __init__(self, *words, path, quick=True):
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.said = ""
        self.process = subprocess.Popen([sys.executable, "-W", "error", "-c", self.QUICK if quick else self.WHOLE, *map(str, words)], cwd=HERE,
                                        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                                        env={**os.environ, "PATH": f"{path}:/usr/bin:/bin"})
        os.close(slave)

    def hear(self, words, seconds=20.0):
        """Wait until the words are said, after what was heard before."""
        until = time.monotonic() + seconds
        while words not in self.said:
            assert select.select([self.master], (), (), max(0.0, until - time.monotonic()))[0], f"{words!r} was not said, but:\n{self.said}"
            try:
                self.said += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:                                # all have closed it
                raise AssertionError(f"{words!r} was not said, but:\n{self.said}") from None
        before, _, self.said = self.said.partition(words)
        return before + words

    def type(self, line):
        os.write(self.master, line.encode())

    def end(self, seconds=20.0):
        """What it says until it ends; -> that, and the exit status."""
        until = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while True:
                assert select.select([self.master], (), (), max(0.0, until - time.monotonic()))[0], f"it does not end:\n{self.said}"
                self.said += os.read(self.master, 65536).decode("utf-8", "replace")
        return self.said, self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


class Nas(Library):
    """A server whose sessions a test turns, and which takes the token."""

    def __init__(self):
        super().__init__()
        self.playing, self.refusals = {}, 0                # machine identifier -> state
        self.answers |= {"/status/sessions": self.sessions, "/": {"friendlyName": "nas"}}

    def sessions(self, query):
        if self.refusals > 0:
            self.refusals -= 1
            return 401
        return sessions_xml(*(session_xml(state, player=player, key=str(i)) for i, (player, state) in enumerate(self.playing.items())))

    def encode(self, fields):
        return fields if isinstance(fields, bytes) else super().encode(fields)


SYSTEMCTL = """#!/bin/sh
# Starts the unit's program as systemd would, and stops it.
echo "systemctl $*" >>"$HOME/calls"
stop() { [ -f "$HOME/pid" ] && kill "$(cat "$HOME/pid")" 2>/dev/null; rm -f "$HOME/pid"; }
start() {
    stop; cd /
    %s "$HOME/.local/bin/streamerbrainz.py" "@$HOME/.config/streamerbrainz/flags" -plex-token-file "$HOME/.config/streamerbrainz/plex-token" >"$HOME/log" 2>&1 </dev/null &
    echo $! >"$HOME/pid"
}
case "$*" in
    *is-active*) [ -f "$HOME/pid" ] ;;
    *enable*--now*|*restart*) start ;;
    *disable*) stop ;;
esac
exit $?
"""


@pytest.fixture
def machine(cloud, home, tmp_path):
    """A machine with a systemd for users, an account with a server, and a player on it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, content in (("systemctl", SYSTEMCTL % sys.executable), ("loginctl", '#!/bin/sh\necho "loginctl $*" >>"$HOME/calls"\n')):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    with Nas() as nas:
        host, port = nas.url[7:].split(":")
        cloud.resources = [resource("nas", SERVER, connection("127.0.0.2", 9), connection(host, int(port))),
                           resource("TV", "tv1", provides="client,player", product="Plex for TV", owned=False),
                           resource("attic", "s2", owned=False, sourceTitle="bob")]
        cloud.nas, cloud.tools, cloud.port, cloud.config = nas, tools, free_port(), home / ".config/streamerbrainz"
        cloud.words = ("-webhooks-port", cloud.port, "-webhooks-host", "127.0.0.1")
        yield cloud
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((home / "pid").read_text()), signal.SIGKILL)


def test_setup_goes_from_one_file_to_a_proven_line_with_one_code_and_two_answers(machine, home):
    machine.urls = ["https://example.com/theirs"]
    machine.nas.refusals = 2                               # the token is new
    begun = time.monotonic()
    with Terminal("setup", *machine.words, path=machine.tools, quick=False) as person:
        signing_in = person.hear("2. Server")          # large, and once more as it can be copied
        assert sb.large("7RQ1").replace("\n", "\r\n") in signing_in and re.search(r"\r\n +7RQ1\r\n\r\n", signing_in)
        person.hear("Press play on your player.")
        machine.nas.playing["m1"] = PLAYING
        person.hear("[y/N]")
        person.type("\n")
        plan = person.hear("[Y/n]")
        assert all(word in plan for word in ("webhook-secret", "flags", ".local/bin/streamerbrainz.py", "streamerbrainz.service", "start the daemon",
                                             f"add http://127.0.0.1:{machine.port}/webhooks/plex?token=... to"))
        assert not (home / ".local").exists() and machine.urls == ["https://example.com/theirs"] and not (machine.config / "flags").exists()
        person.type("\n")
        person.hear("Press pause on your player")
        machine.nas.playing["m1"] = PAUSED
        assert sb.exchange(machine.urls[1], {"Content-Type": MULTIPART}, sb.encode_webhook(payload("media.pause"))[1]).status == 200
        proof, status_ = person.end()
    assert status_ == 0 and 'paused "Karma Police": seen by' in proof and "Its webhook came within" in proof, proof
    assert time.monotonic() - begun < 60
    secret = (machine.config / "webhook-secret").read_text().strip()
    assert machine.urls == ["https://example.com/theirs", f"http://127.0.0.1:{machine.port}/webhooks/plex?token={secret}"]
    assert f"http://127.0.0.1:{machine.port}/?token={secret}" in proof
    assert (machine.config / "flags").read_text() == (
        f"-plex-server-url {machine.nas.url}\n-plex-token-file ~/.config/streamerbrainz/plex-token\n-plex-machine-id m1\n"
        f"-webhook-secret-file ~/.config/streamerbrainz/webhook-secret\n-webhooks-host 127.0.0.1\n-webhooks-port {machine.port}\n")
    assert {stat.S_IMODE((machine.config / name).stat().st_mode) for name in ("flags", "plex-token", "webhook-secret", "client-id")} == {0o600}
    assert (home / ".local/bin/streamerbrainz.py").read_text() == PROGRAM.read_text()
    assert (home / ".config/systemd/user/streamerbrainz.service").read_text().startswith("# User unit of StreamerBrainz")
    calls = (home / "calls").read_text()
    assert "systemctl --user daemon-reload\nsystemctl --user enable --now streamerbrainz\nloginctl enable-linger" in calls and TOKEN not in calls
    assert TOKEN not in (home / "log").read_text() and secret not in (home / "log").read_text() + calls


def flat(text):
    """What was said, whatever its lines."""
    return " ".join(text.split())


@pytest.fixture
def script(machine, monkeypatch):
    """setup as a script runs it, in this process: nobody answers."""
    monkeypatch.setenv("PATH", f"{machine.tools}:/usr/bin:/bin")
    monkeypatch.setattr(sb, "TOKEN_S", 0.1)
    monkeypatch.setattr(sb, "START_S", 10.0)
    machine.nas.playing["m1"] = PLAYING

    def run(*words):
        done = call("setup", "-yes", *machine.words, *words)
        assert TOKEN not in done.out + done.err and "Traceback" not in done.err and max(map(len, [*done.out.splitlines(), ""])) <= 80
        return done
    machine.run = run
    return machine


def test_setup_without_questions_and_again_says_what_is_well_and_keeps_what_was_written_by_hand(script, home):
    script.config.mkdir(parents=True)
    (script.config / "flags").write_text("# by hand\n-log-level debug   # all\n-webhooks-port 1 # the port\n")
    done = script.run()
    assert done.status == 0 and done.err == "" and len(script.urls) == 1, done
    assert (script.config / "flags").read_text().startswith(f"# by hand\n-log-level debug   # all\n-webhooks-port {script.port} # the port\n-plex-server-url ")
    written = {file: file.stat().st_mtime_ns for file in script.config.iterdir()}
    calls = (home / "calls").read_text()
    done = script.run()
    assert done.status == 0 and "All is as it should be." in done.out and script.pins == 1
    assert {file: file.stat().st_mtime_ns for file in script.config.iterdir()} == written
    assert "enable" not in (home / "calls").read_text()[len(calls):]
    (script.config / "flags").write_text((script.config / "flags").read_text().replace("-plex-machine-id m1", "-plex-machine-id m2"))
    assert script.run("-plex-machine-id", "m1").status == 0                # a flag that is given is the answer
    assert "-plex-machine-id m1\n" in (script.config / "flags").read_text() and "restart streamerbrainz" in (home / "calls").read_text()


def test_the_tracker_is_filled_before_the_daemon_starts(script, home):
    script.nas.answers |= {"/library/sections": {"Directory": [{"key": "1", "type": "movie", "title": "Films"}]}, "/accounts": {}}
    script.nas.pages("/library/sections/1/all", [{"ratingKey": "7", "type": "movie", "title": "Heat", "year": 1995}])
    database = home / ".local/share/streamerbrainz/tracker.db"
    done = script.run("-tracker-db", database)
    assert done.status == 0 and "The tracker now has 0 shows, 0 episodes and 1 movie." in done.out
    assert "-tracker-db ~/.local/share/streamerbrainz/tracker.db\n" in (script.config / "flags").read_text()
    assert "Heat" in call("tracker", "shows").out                          # the flags are read unasked


WRONG = [
    ("none of the account's", lambda it: it.resources.clear(), (), 2, "No server of this account is known. ... name it with -plex-server-url."),
    ("shared only", lambda it: it.resources.pop(0), (), 2, "attic belongs to bob."),
    ("unreachable", lambda it: it.resources[0].update(connections=[connection("127.0.0.1", 9), connection("192.0.2.9", 9, False, True)]), (), 2,
     "nas at http://127.0.0.1:9 cannot be reached: Connection refused. ... nas at https://127-0-0-1.abc.plex.direct:9 cannot be reached: ... "
     "allow plex.direct in its DNS rebind protection."),
    ("another server", lambda it: it.nas.answers.update({"/identity": {"machineIdentifier": "other"}}), (), 2, "another server answers there."),
    ("not the owner", lambda it: it.nas.answers.update({"/status/sessions": 401}), (), 1,
     "shows what plays to its owner only, not to ann. Run this again, and sign in as the owner."),
    ("a friend", lambda it: it.nas.answers.update({"/status/sessions": 403}), (), 1, "shows what plays to its owner only, not to ann."),
    ("a server that fails", lambda it: it.nas.answers.update({"/status/sessions": 500}), (), 1, "answers 500 to /status/sessions."),
    ("nothing plays", lambda it: it.nas.playing.clear(), (), 2, "0 players play now; let one play, or give -plex-machine-id."),
    ("two play", lambda it: it.nas.playing.update(m2=PLAYING), (), 2, "2 players play now; let one play, or give -plex-machine-id."),
    ("systemd fails", lambda it: (it.tools / "systemctl").write_text("#!/bin/sh\ncase $* in *enable*) echo Job failed.; exit 1;; *is-active*) exit 3;; esac\n"), (), 2,
     "`systemctl --user enable --now streamerbrainz` failed (Job failed.); see: journalctl --user-unit streamerbrainz"),
    ("resources in XML", lambda it: it.instead.update({("GET", "/api/v2/resources"): [(200, b"<resources/>")]}), (), 2, "plex.tv answers without a list of servers"),
]


@pytest.mark.parametrize("break_it, words, status_, said", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_each_wrong_turn_has_its_sentence_and_leaves_what_was_there(script, home, break_it, words, status_, said):
    break_it(script)
    script.urls = ["https://example.com/theirs"]
    done = script.run(*words)
    assert done.status == status_ and len(done.err.splitlines()) == 1, done
    for part in said.split(" ... "):
        assert part in flat(done.out + done.err), (part, done)
    assert script.urls == ["https://example.com/theirs"] and (not (script.config / "flags").exists() or "systemctl" in done.err)


def test_the_token_of_somebody_who_is_not_the_owner_is_given_back(script):
    script.nas.answers["/status/sessions"] = 401
    assert script.run().status == 1 and script.tokens == set() and not (script.config / "plex-token").exists()


def test_a_server_that_is_found_in_the_network_is_the_default(script, monkeypatch):
    script.resources.clear()
    monkeypatch.setattr(sb, "NEARBY", script.nas.url)
    assert script.run().status == 0 and f"-plex-server-url {script.nas.url}\n" in (script.config / "flags").read_text()


def test_servers_in_the_network_are_asked_for(monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        monkeypatch.setattr(sb, "GDM", server.getsockname())

        def answer():
            asked, sender = server.recvfrom(100)
            for port in (32400, 32401):
                server.sendto(b"HTTP/1.0 200 OK\r\nContent-Type: plex/media-server\r\nName: nas\r\nPort: %d\r\n\r\n" % port, sender)
            server.sendto(b"HTTP/1.0 500 x\r\nPort: 1\r\n", sender)
            assert asked.startswith(b"M-SEARCH * HTTP/1.0")
        threading.Thread(target=answer, daemon=True).start()
        assert sb.nearby() == [sb.NEARBY, "http://127.0.0.1:32400", "http://127.0.0.1:32401"][-2 if sb.NEARBY.endswith(":32400") else -3:]


def test_without_plex_pass_setup_ends_well(script):
    script.account = {**script.ACCOUNT, "subscription": {"features": ["sync"]}}
    done = script.run()
    assert done.status == 0 and sb.NO_PASS in flat(done.out) and not any(path.endswith("webhooks") for _, path, _, _ in script.requests)


def test_a_port_that_another_program_has_is_left_to_it(script):
    with socket.create_server(("127.0.0.1", script.port)):
        done = script.run()
    assert done.status == 0 and f"-webhooks-port: {script.port} is held by" in done.out
    assert f"-webhooks-port {script.port + 1}\n" in (script.config / "flags").read_text() and f":{script.port + 1}/" in script.urls[0]


def test_without_systemd_the_lines_for_cron_are_shown(script):
    (script.tools / "systemctl").write_text("#!/bin/sh\necho Failed to connect to bus; exit 1\n")
    script_port = script.port
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sb, "START_S", 0.1)
        done, again = script.run(), script.run()
    line = f"* * * * * {'flock -no .sb.lock ' if shutil.which('flock') else ''}python3 .local/bin/streamerbrainz.py >>sb.log 2>&1"
    assert f"\n\n{line}\n\n" in done.out and done.status == 1 and "The daemon does not answer. See: ~/sb.log" in done.err
    assert f"    {line}\n" in pathlib.Path(HERE, "README.md").read_text() or not shutil.which("flock")
    assert "show you the lines for cron" in " ".join(again.out.split()) and "write" not in again.out      # until a daemon listens
    assert not (script.config.parent / "systemd").exists() and script_port


@pytest.mark.parametrize("answers, heard", [([], "Sign in"), ([], "Press play"), ([("Press play", "1\n")], "[y/N]"), ([("Press play", "1\n"), ("[y/N]", "n\n")], "[Y/n]")])
@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_at_each_question_leaves_what_is_done_and_says_so(machine, home, answers, heard, key):
    if key == "\x04" and heard == "Sign in":
        pytest.skip("nothing is asked there")
    machine.entered_after = 10 ** 9 if heard == "Sign in" else 1
    with Terminal("setup", *machine.words, path=machine.tools) as person:
        for question, answer in answers:
            person.hear(question)
            person.type(answer)
        person.hear(heard)
        time.sleep(0.2 if heard == "Sign in" else 0)
        person.type(key)
        said, status_ = person.end()
    assert status_ == 1 and "Stopped. What is done stays; `streamerbrainz.py setup` goes on from there." in flat(said) and "Traceback" not in said
    assert not (machine.config / "flags").exists() and not (home / ".local").exists() and machine.urls == []
    assert (machine.config / "plex-token").exists() == (heard != "Sign in")


def test_a_person_who_says_no_changes_nothing_and_several_servers_and_players_are_chosen_by_number(machine, home):
    machine.resources.insert(0, resource("old", "s9", connection("127.0.0.1", 9)))
    machine.nas.playing |= {"m1": PLAYING, "m2": PAUSED}
    with Terminal("setup", *machine.words, path=machine.tools) as person:
        assert re.search(r" 1  old\r\n +2  nas\r\n", person.hear("Type its number. [1]"))
        person.type("3\n")
        person.hear("Type a number from 1 to 2.")
        person.type("2\n")
        person.hear("Press play on your player.")
        assert re.search(r" 1  Living Room \(Plexamp\), playing .*\r\n +2  Living Room \(Plexamp\), paused", person.hear("Type its number. [1]"))
        person.type("2\n")
        person.hear("The player is m2.")
        person.hear("[y/N]")
        person.type("perhaps\n")
        person.hear("Type y or n.")
        person.type("y\n")
        person.hear("read your library into the tracker")
        person.hear("[Y/n]")
        person.type("n\n")
        said, status_ = person.end()
    assert status_ == 1 and "Nothing was done." in said
    assert {file.name for file in machine.config.iterdir()} == {"client-id", "plex-token"} and not (home / ".local").exists() and machine.urls == []


def test_uninstall_takes_back_what_setup_did_and_leaves_what_is_the_persons(script, home):
    script.nas.answers |= {"/library/sections": {"Directory": []}, "/accounts": {}}
    script.urls = ["https://example.com/theirs"]
    database = home / ".local/share/streamerbrainz/tracker.db"
    assert script.run("-tracker-db", database).status == 0 and len(script.urls) == 2
    done = call("uninstall", "-yes")
    assert done.status == 0 and script.urls == ["https://example.com/theirs"] and script.tokens == set()
    assert not (home / "pid").exists() and not (home / ".local/bin/streamerbrainz.py").exists() and not list(home.glob(".config/systemd/user/*"))
    assert {file.name for file in script.config.iterdir()} == {"flags", "webhook-secret", "client-id"} and database.exists()
    with Terminal("uninstall", path=script.tools) as person:
        for _ in range(2):
            person.hear("[y/N]")
            person.type("y\n")
        assert person.end()[1] == 0
    assert list(script.config.iterdir()) == [] and not list(database.parent.iterdir())


def test_paths_that_are_relative_are_written_as_the_daemon_needs_them(script, home, tmp_path, monkeypatch):
    script.nas.answers |= {"/library/sections": {"Directory": []}, "/accounts": {}}
    monkeypatch.chdir(tmp_path)
    assert script.run("-tracker-db", "x.db", "-webhook-secret-file", "a/secret").status == 0
    flags = (script.config / "flags").read_text()
    assert f"-tracker-db {tmp_path}/x.db\n" in flags and f"-webhook-secret-file {tmp_path}/a/secret\n" in flags
    unit = (home / ".config/systemd/user/streamerbrainz.service").read_text()
    assert f"\nBindPaths=-{tmp_path}\nReadWritePaths=-{tmp_path}\n" in unit
    assert f"\nBindReadOnlyPaths={tmp_path}/a %h/.local/bin %h/.config/streamerbrainz\n" in unit


def test_the_unit_shows_a_python_of_ones_own_in_the_home(home, monkeypatch):
    assert sb.unit_text(sb.Config(plex_token_file=sb.usual("plex-token"))) == sb.UNIT
    monkeypatch.setattr(sb, "command_fault", lambda *words: "it is too old")
    monkeypatch.setattr(sb.sys, "executable", str(home / ".pyenv/versions/3.13.1/bin/python3"))
    monkeypatch.setattr(sb.sys, "base_prefix", str(home / ".pyenv/versions/3.13.1"))
    unit = sb.unit_text(sb.Config(plex_token_file="/srv/token"))
    assert "\nExecStart=%h/.pyenv/versions/3.13.1/bin/python3 -I -X faulthandler %h/.local/bin/" in unit
    assert "\nBindReadOnlyPaths=%h/.pyenv/versions/3.13.1 %h/.local/bin %h/.config/streamerbrainz\n" in unit
    assert "\nLoadCredential=plex-token:/srv/token\n" in unit


def test_uninstall_says_what_it_cannot_do_and_what_stays(script, home):
    assert script.run().status == 0
    unit = home / ".config/systemd/user/streamerbrainz.service"
    works = (script.tools / "systemctl").read_text()
    (script.tools / "systemctl").write_text("#!/bin/sh\necho Failed to connect to bus; exit 1\n")
    done = call("uninstall", "-yes")
    assert done.status == 1 and "`systemctl --user disable --now streamerbrainz` failed (Failed to connect to bus)" in flat(done.out) and unit.exists()
    (script.tools / "systemctl").write_text(works)
    done = call("uninstall", "-yes")
    assert done.status == 0 and "loginctl disable-linger" in flat(done.out) and not unit.exists() and not (home / "pid").exists()
    assert (home / "calls").read_text().endswith("disable --now streamerbrainz\nsystemctl --user daemon-reload\nsystemctl --user reset-failed streamerbrainz\n")


def test_the_token_goes_to_no_address_that_plex_tv_does_not_know(script, monkeypatch):
    asked = []
    monkeypatch.setattr(sb, "nearby", lambda: [sb.NEARBY, script.nas.url])      # somebody there says that it is the server
    script.resources = [resource("nas", SERVER, connection("127.0.0.2", 9))]
    monkeypatch.setattr(script.nas, "sessions", lambda query: asked.append(query) or b"<MediaContainer/>")
    assert script.run().status == 2 and not asked


def test_a_flag_that_is_the_default_is_written_where_the_file_says_otherwise(script, monkeypatch):
    script.config.mkdir(parents=True)
    (script.config / "flags").write_text(f"-webhooks-port {script.port}\n")
    for step in ("choose_port", "start_daemon", "prove"):
        monkeypatch.setattr(sb.Setup, step, lambda *_: 0)
    script.words = ("-webhooks-port", "3001")
    assert script.run().status == 0 and (script.config / "flags").read_text().startswith("-webhooks-port 3001\n")


def test_flags_from_elsewhere_go_along_and_a_file_that_cannot_be_read_is_left_alone(script, home):
    (home / "mine").write_text("-active-timeout 20   # the DSP\n")
    assert script.run(f"@{home}/mine").status == 0
    assert (script.config / "flags").read_text().startswith("-active-timeout 20   # the DSP\n-plex-server-url ")
    for content in (b"-plex-machine-id 'm1\n", b"# f\xfcr mich\n"):
        (script.config / "flags").write_bytes(content)
        done = script.run(f"@{home}/mine")
        assert done.status == 2 and "cannot be read (" in done.err and (script.config / "flags").read_bytes() == content


def test_a_library_that_was_not_read_to_its_end_is_read_again(script, home):
    database = home / ".local/share/streamerbrainz/tracker.db"
    script.nas.answers["/library/sections"] = 500
    assert script.run("-tracker-db", database).status == 1
    script.nas.answers |= {"/library/sections": {"Directory": []}, "/accounts": {}}
    assert "read your library into the tracker" in script.run("-tracker-db", database).out
    assert "All is as it should be." in script.run("-tracker-db", database).out


def test_a_link_stays_one_and_a_file_that_cannot_be_written_whole_leaves_nothing(home, tmp_path, monkeypatch):
    (tmp_path / "dotfiles").write_text("old\n")
    (home / "flags").symlink_to(tmp_path / "dotfiles")
    sb.write_private(str(home / "flags"), "new\n", "setup")
    assert (home / "flags").is_symlink() and (tmp_path / "dotfiles").read_text() == "new\n"
    monkeypatch.setattr(sb.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(sb.ConfigError, match=re.escape("cannot be written (No space left on device)")):
        sb.write_private(str(home / "flags"), "more\n", "setup")
    assert {file.name for file in [*home.iterdir(), *tmp_path.iterdir()]} >= {"flags", "dotfiles"} and not list(tmp_path.glob("dotfiles?*"))


@pytest.mark.parametrize("command", ["setup", "login"])
def test_a_token_in_the_place_of_its_file_is_not_repeated(cloud, home, command):
    done = call(command, "-yes", "-plex-token-file", "AbCdEfGhIjKlMnOpQrSt")
    assert done.status == 2 and "AbCdEf" not in done.out + done.err and "give the name of a file" in done.err


@pytest.mark.parametrize("words", ["-tracker-db {home}/x.db", "-webhook-secret-file {home}/a b/secret", "-tracker-db {home}/50%/x.db"])
def test_a_path_that_the_unit_cannot_show_is_refused(script, home, words):
    done = script.run(*(word.format(home=home) for word in words.split(" ", 1)))
    assert done.status == 2 and "the unit cannot show ~/" in done.err and not script.urls
    assert f"the unit cannot show ~{words.partition('}')[2]} alone" in done.err


def test_where_there_is_no_unit_a_path_may_be_anything(script, home, monkeypatch):
    (script.tools / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(sb, "START_S", 0.1)
    assert "the unit cannot show" not in script.run("-tracker-db", home / "x.db").err and (script.config / "flags").exists()


def test_doctor_sends_one_webhook_to_each_url(sick, monkeypatch):
    sent = []
    monkeypatch.setattr(sb, "send_to", lambda url: sent.append(url) or "fails: it is silent")
    sick.urls = [{"url": "https://streamerbrainz.invalid/webhooks/plex?token=0123456789abcdef"}]
    assert "start the tunnel or proxy" in json.dumps(sick.examine()) and len(sent) == len(set(sent)) == 2


def test_a_look_that_fails_does_not_end_setup_while_it_waits_for_the_player(machine):
    with Terminal("setup", *machine.words, path=machine.tools) as person:
        person.hear("Press play on your player.")
        machine.nas.answers["/status/sessions"] = 500
        time.sleep(0.3)
        machine.nas.playing["m1"] = PLAYING
        machine.nas.answers["/status/sessions"] = machine.nas.sessions
        person.hear("The player is m1.")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_streams_are_no_traceback(home, closed):
    for words in ("setup", "login -yes", "-h", "webhook list"):
        done = subprocess.run(f"{shlex.quote(sys.executable)} {PROGRAM} {words} {closed}", shell=True, capture_output=True, text=True, timeout=30,
                              env={**os.environ, "STREAMERBRAINZ_PLEXTV_URL": "http://127.0.0.1:9"})
        assert "Traceback" not in done.stderr and done.returncode in (0, 1, 2)


def test_uninstall_goes_on_where_plex_tv_fails(script, home):
    assert script.run().status == 0
    script.instead["GET", "/api/v2/user/webhooks"] = script.instead["DELETE", "/api/v2/users/signout"] = [(503, b"")]
    done = call("uninstall", "-yes")
    assert (script.config / "plex-token").exists()                         # to try it again with
    assert done.status == 1 and done.out.count("plex.tv answers 503: try again later.") == 1 and "The token stays: " in done.out and not (home / ".local/bin/streamerbrainz.py").exists()


def test_who_is_not_the_owner_may_sign_out_and_in_anew_but_no_script_forgets_a_token(script):
    script.config.mkdir(parents=True)
    (script.config / "plex-token").write_text(TOKEN)
    (script.config / "plex-token").chmod(0o600)
    script.nas.answers["/status/sessions"] = 401
    assert script.run().status == 1 and (script.config / "plex-token").exists() and script.tokens
    with Terminal("setup", *script.words, path=script.tools) as person:
        person.hear("Sign this account out? [Y/n]")
        person.type("\n")
        said, status_ = person.end()
    assert status_ == 1 and "sign in as the owner" in flat(said) and not (script.config / "plex-token").exists() and not script.tokens


def test_a_daemon_that_somebody_else_started_is_not_doubled(script):
    with Process() as daemon:
        done = call("setup", "-yes", "-webhooks-host", "127.0.0.1", "-webhooks-port", daemon.port)
    assert done.status == 2 and "another StreamerBrainz (python" in done.err and "end it, and remove its cron lines." in done.err
    assert not (script.config / "flags").exists()


def test_an_odd_now_is_no_traceback():
    for odd in ({}, {"webhooks": 7, "changes": [7, {"at": {}}]}, {"webhooks": {"arrived": "x", "median_delay_s": "soon"}, "changes": {}}):
        assert sb.parse_now(json.dumps(odd).encode())[1:] == (0, 0.0)


# === Doctor ===

# --- the world

class Healthy(Library):
    """A server, plex.tv and a daemon where all is well; a test breaks one thing."""

    def __init__(self):
        super().__init__()
        self.root = {"friendlyName": "nas", "ownerFeatures": "pass,webhooks", "myPlexSigninState": "ok"}
        self.answers |= {"/": lambda query: self.root, "/status/sessions": {"Metadata": []},
                         "/:/prefs": {"Setting": [{"id": "webHooksEnabled", "value": True}]}, "/diagnostics/logs": 404,
                         "/api/v2/user/webhooks": lambda query: self.urls}
        self.urls = []

    def encode(self, fields):
        return fields if isinstance(fields, bytes) else super().encode(fields) if isinstance(fields, dict) else json.dumps(fields).encode()


HAS_A_SESSION = b'<MediaContainer size="1"><Track sessionKey="7" ratingKey="101" title="x"><Player machineIdentifier="%b" title="Living Room" state="playing"/></Track></MediaContainer>'


@pytest.fixture
def sick(plex, tmp_path, token_file, monkeypatch):
    """Examine a set-up: findings by check, after what a test breaks in it."""
    with Healthy() as server, contextlib.ExitStack() as stack:
        monkeypatch.setenv("STREAMERBRAINZ_PLEXTV_URL", server.url)
        secret = tmp_path / "secret"
        secret.write_text("0123456789abcdef")
        secret.chmod(0o600)
        gate = sb.Gate(sb.SecretFile("-webhook-secret-file", str(secret)))
        daemon = stack.enter_context(Running(plex, None, gate=gate))

        def examine(*words):
            done = call("doctor", "-json", *server.words, *words)
            assert done.err == "" and done.status in (0, 1), done
            found = json.loads(done.out)
            assert done.status == any(each["status"] == "FAIL" for each in found["findings"])
            assert TOKEN not in done.out and "0123456789abcdef" not in done.out
            assert all(each["remedy"] for each in found["findings"] if each["status"] == "FAIL")
            return found
        server.words = (*server_flags(server, token_file), "-webhooks-port", daemon.port, "-webhook-secret-file", secret, "-webhooks-host", "127.0.0.1")
        server.port, server.daemon, server.stop, server.examine, server.token_file = daemon.port, daemon, stack.close, examine, token_file
        server.answers["/status/sessions"] = HAS_A_SESSION % b"m1"
        server.urls = [{"url": f"http://127.0.0.1:{daemon.port}/webhooks/plex?token=0123456789abcdef"}]
        yield server


def server_finding(checks):
    """What doctor finds of a server that it has been given."""
    checks.met.add(sb.SERVER)
    return next(each for each in checks.run() if each.check == "server")


def failed(found):
    return {each["check"]: each["evidence"] for each in found["findings"] if each["status"] == "FAIL"}


def test_doctor_asks_the_daemon_whatever_name_it_listens_on(monkeypatch):
    monkeypatch.setattr(sb, "local_url", lambda config, path: server.url + path)
    with RawServer(http_answer(b"{}", head=f"Server: {sb.USER_AGENT}\r\n")) as server:
        checks = sb.Doctor(sb.Config(webhooks_host="pi.example.org"))
        assert (checks.daemon().status, checks.arrivals().status) == ("ok", "skip")
    for request_ in server.requests:
        assert re.findall(rb"\r\nhost: *(.*?)\r\n", request_.lower()) == [b"localhost"]


def test_a_healthy_set_up_has_no_fail(sick):
    found = sick.examine()
    assert failed(found) == {} and found["causes"] == []
    assert {each["check"] for each in found["findings"] if each["status"] == "ok"} >= {
        "flags", "-plex-token-file", "-webhook-secret-file", "server", "clock", "token", "Plex Pass", "signed in", "webhooks switch", "player",
        "webhook in the account", "daemon", "test webhook"}


def url(sick, **parts):
    fields = {"scheme": "http", "host": "127.0.0.1", "port": sick.port, "path": "/webhooks/plex", "secret": "0123456789abcdef", **parts}
    sick.urls = [{"url": "{scheme}://{host}:{port}{path}?token={secret}".format_map(fields)}]


def refused(sick, status, *, query="?token=0123456789abcdef", **more):
    """A webhook that the daemon has refused, and counted."""
    exchange(sick.daemon, post(path=f"/webhooks/plex{query}", **more))
    eventually(lambda: any(code == status for _, code in sick.daemon.board.status.webhooks))


BROKEN = [
    ("token", "refuses the token (401)", lambda sick: sick.answers.update({"/": 401})),
    ("token", "(403)", lambda sick: sick.answers.update({"/status/sessions": 403})),
    ("Plex Pass", "the owner's features have no webhooks: none is ever sent", lambda sick: sick.root.update(ownerFeatures="lyrics,sync")),
    ("signed in", "the server is not signed in to plex.tv (none)", lambda sick: sick.root.update(myPlexSigninState="none")),
    ("webhooks switch", "webhooks are off in the server's settings", lambda sick: sick.answers.update(
        {"/:/prefs": {"Setting": [{"id": "webHooksEnabled", "value": False}]}})),
    ("player", "m1 has no session, but others have: Living Room is m2", lambda sick: sick.answers.update({"/status/sessions": HAS_A_SESSION % b"m2"})),
    ("player", "Living Room has another identifier now: M1, not m1", lambda sick: sick.answers.update({"/status/sessions": HAS_A_SESSION % b"M1"})),
    ("webhook in the account", "the account has no webhook at all", lambda sick: sick.urls.clear()),
    ("webhook in the account", "the port is 1, not", lambda sick: url(sick, port=1)),
    ("webhook in the account", "the path is /plex, not /webhooks/plex", lambda sick: url(sick, path="/plex")),
    ("webhook in the account", "the secret is another one", lambda sick: url(sick, secret="wrong")),
    ("webhook in the account", "the secret is missing", lambda sick: url(sick, secret="")),
    ("webhook in the account", "it is https, and StreamerBrainz speaks http", lambda sick: url(sick, scheme="https")),
    ("webhook in the account", "has no address (a container's name?)", lambda sick: url(sick, host="streamerbrainz.invalid")),
    ("-plex-token-file", "others can read", lambda sick: sick.token_file.chmod(0o644)),
    ("-plex-token-file", "is empty, or not a regular file", lambda sick: sick.token_file.write_text("")),
    ("-plex-token-file", "holds more than a Plex token", lambda sick: sick.token_file.write_text("a\nb")),
    ("webhooks so far", "refused: 1 with 401", lambda sick: refused(sick, "401", query="?token=x")),
    ("webhooks so far", "refused: 1 with 413", lambda sick: refused(sick, "413", length=10 ** 8)),
    ("daemon", "nothing listens on port", lambda sick: sick.stop())]


@pytest.mark.parametrize("check, evidence, break_it", BROKEN)
def test_each_thing_that_is_broken_is_found(sick, check, evidence, break_it):
    break_it(sick)
    found = failed(sick.examine())
    assert evidence in found.get(check, ""), found


@pytest.mark.parametrize("url_", ["http://127.0.0.1:{port}/api/webhook/-SECRET", "http://me:p@SECRET@127.0.0.1:{port}/webhooks/plex",
                                  "http://me:1/SECRET@127.0.0.1:{port}/webhooks/plex", "http://127.0.0.1:{port}/webhooks/SECRET", "http://x.invalid/SECRET",
                                  "https://127.0.0.1:{port}/SECRET?a=SECRET", "http://127.0.0.1:1/webhooks/plex/SECRET", "ftp://SECRET/", "http://127.0.0.1:{port}/webhooks/plex?SECRET"])
def test_nothing_of_other_peoples_webhooks_is_shown_but_where_they_go(sick, url_):
    sick.urls = [{"url": url_.format(port=sick.port)}]
    assert "SECRET" not in json.dumps(sick.examine())


def test_a_webhook_that_goes_to_another_machine_is_found(sick, monkeypatch):
    monkeypatch.setattr(sb, "PLEX_S", 0.5)                 # nobody answers there
    url(sick, host="192.0.2.77")
    assert "the host 192.0.2.77 is not this machine" in failed(sick.examine())["webhook in the account"]


def test_a_server_that_does_not_answer_skips_what_needs_it(sick):
    sick.server.shutdown()
    sick.server.server_close()
    found = sick.examine()
    assert "cannot be reached: Connection refused" in failed(found)["server"]
    assert {each["check"] for each in found["findings"] if each["status"] == "skip"} >= {"token", "player", "webhook in the account"}


def test_a_container_that_calls_localhost_is_told_the_address_to_use(monkeypatch):
    checks = sb.Doctor(sb.Config(plex_server_url="http://192.0.2.9:32400", webhooks_port=3001))
    said, = sb.differences("http://localhost:3001/webhooks/plex", checks.config, ())
    assert said.startswith("localhost is the server itself there; the address of this machine is ")
    assert sb.differences("http://localhost:3001/webhooks/plex", sb.Config(plex_server_url="http://127.0.0.1:32400"), ()) == []


@pytest.mark.parametrize("head, status_, body, check, evidence", [
    ("nginx", "200 OK", {}, "daemon", "is held by "), ("StreamerBrainz/0.0.9", "200 OK", {}, "daemon", "it is version 0.0.9, and this is "),
    (sb.USER_AGENT, "503 x", {"reasons": ["It stalls."]}, "daemon", "/healthz answers 503: It stalls."),
    (sb.USER_AGENT, "401 x", {}, "webhooks so far", "/now answers 401"),
    (sb.USER_AGENT, "200 OK", {"webhooks": {"last_s": 1, "in_a_row_missed": 3}, "witnesses": {"webhooks": {"up": False, "words": "They do not."}}},
     "each change with its webhook", "They do not."),
    (sb.USER_AGENT, "200 OK", {}, "test webhook", "is answered, but not by StreamerBrainz"),
    (sb.USER_AGENT, "500 x", {}, "test webhook", "is refused with 500")])
def test_what_listens_on_the_port_is_looked_at(head, status_, body, check, evidence):
    with RawServer(http_answer(json.dumps(body).encode(), status_, f"Server: {head}\r\n")) as server:
        checks = sb.Doctor(sb.Config(webhooks_host="127.0.0.1", webhooks_port=int(server.url.rpartition(":")[2])))
        found = [each for each in checks.run() if each.status == "FAIL" and each.check == check]
    assert evidence in found[0].evidence and found[0].remedy


@pytest.mark.parametrize("answer, evidence", [
    (reset, "does Plex demand https (Settings > Network > Secure connections)?"), (http_answer(b"", "503 x"), "is still starting"),
    (http_answer(b"<html/>"), "Does -plex-server-url point to Plex Media Server?")])
def test_a_server_that_answers_wrongly_is_told_from_one_that_is_not_there(answer, evidence):
    with RawServer(answer) as server:
        checks = sb.Doctor(sb.Config(plex_server_url=server.url))
        checks.plex = sb.PlexServer(server.url, lambda: TOKEN)
        found = server_finding(checks)
    assert found.status == "FAIL" and evidence in found.evidence and found.remedy


def test_a_certificate_of_another_name_is_told_from_a_server_that_is_not_there(certificate):
    with tls_server(certificate, http_answer(b"")) as url:
        checks = sb.Doctor(sb.Config(plex_server_url=url.format("127.0.0.1")))
        checks.plex = sb.PlexServer(url.format("127.0.0.1"), lambda: TOKEN, str(certificate[0]))
        found = server_finding(checks)
    assert found.status == "FAIL" and "has a certificate that does not fit (IP address mismatch" in found.evidence and found.remedy


@pytest.mark.parametrize("answer", [None, [], 7, "x", {}, {"url": 7}, [None], [7], ["x"], [[]], [{}], [{"url": None}], [{"url": "ftp://x"}], [{"url": "//x"}],
                                    [{"url": "http://["}], [{"url": "x" * 9999}], [{"url": "http://127.0.0.1:9/webhooks/plex"}] * 300])
def test_odd_answers_of_plex_tv_are_no_traceback(sick, answer):
    sick.urls = answer
    found = sick.examine()
    assert not [each for each in found["findings"] if "failed itself" in each["evidence"]]


@pytest.mark.parametrize("answer", [{"ownerFeatures": 7}, {"myPlexSigninState": []}, {"friendlyName": None}])
def test_odd_answers_of_the_server_are_no_traceback(sick, answer):
    sick.root = answer
    for path in ("/:/prefs", "/identity"):
        sick.answers[path] = {"Setting": [None, 7, {}, {"id": [], "value": {}}], "version": {}}
    assert not [each for each in sick.examine()["findings"] if "failed itself" in each["evidence"]]


@pytest.mark.parametrize("off_s, status", [(0, "ok"), (3600, "FAIL"), (-3600, "FAIL")])
def test_clocks_are_compared(off_s, status):
    now = time.time()
    assert sb.compare_clocks(sb.email.utils.formatdate(now + off_s, usegmt=True), now).status == status
    assert sb.compare_clocks("nonsense", now).status == "skip"


def test_a_tracker_is_examined_too(sick, database):
    found = sick.examine("-tracker-db", database)
    said = {each["check"]: each for each in found["findings"]}["tracker"]
    assert said["status"] == "ok" and said["evidence"] == "intact, form 2; last webhook: none yet; 0 open conflicts, 0 failed webhooks"
    with open(database, "r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 4)
    assert "malformed" in failed(sick.examine("-tracker-db", database))["tracker"]
    assert "cannot be opened" in failed(sick.examine("-tracker-db", str(database) + "x"))["tracker"]


UNIT_OF_OURS = pathlib.Path(HERE, "streamerbrainz.service").read_text()


@pytest.mark.parametrize("more, path, write, shown", [
    ("", "/home/pi/.local/bin/lamp", False, True), ("", "/home/pi/bin/lamp", False, False), ("", "/usr/bin/lamp", False, True),
    ("", "/home/pi/.local/binary", False, False), ("", "/home/pi/.config/streamerbrainz/x", False, True), ("", "/home/pix/y", False, True),
    ("", "/home/pi/.config/streamerbrainz", True, False), ("", "/home/pi/.local/share/streamerbrainz", True, True),
    ("", "/home/pi/tv", True, False), ("BindPaths=%h/tv\n", "/home/pi/tv", True, True), ("BindReadOnlyPaths=%h/tv\n", "/home/pi/tv", True, False),
    ("BindReadOnlyPaths=-%h/a -%h/bin\n", "/home/pi/bin/lamp", False, True), ("BindReadOnlyPaths=/srv/x:%h/bin\n", "/home/pi/bin/lamp", False, True),
    ("TemporaryFileSystem=\n", "/home/pi/bin/lamp", False, True)])
def test_a_unit_shows_what_it_binds(more, path, write, shown):
    assert bool(sb.unit_shows(f"{UNIT_OF_OURS}\n{more}", "/home/pi", path, write)) is shown
    assert sb.unit_shows("", "/home/pi", path, write)


def test_doctor_checks_by_hand_what_the_unit_hides(sick, home):
    def said(*words):
        return next(each for each in sick.examine(*words)["findings"] if each["check"] == "unit")
    lamp, link = home / "bin/lamp", home / ".local/bin/lamp"
    for file in (lamp, link, home / ".config/systemd/user/streamerbrainz.service"):
        file.parent.mkdir(parents=True, exist_ok=True)
    lamp.write_text("#!/bin/sh\n")
    lamp.chmod(0o755)
    link.symlink_to(lamp)
    assert said("-on-event", lamp)["status"] == "skip"                          # there is no unit
    unit = home / ".config/systemd/user/streamerbrainz.service"
    unit.write_text(UNIT_OF_OURS)
    assert said()["status"] == said("-tracker-db", home / ".local/share/streamerbrainz/tracker.db")["status"] == "ok"
    for words in (("-on-event", f"{lamp} 17"), ("-on-event", link), ("-tracker-db", home / "bin/x.db"), ("-tmdb-token-file", home / "bin/t")):
        found = said(*words)
        assert found["status"] == "FAIL" and found["evidence"].startswith(f"it hides {home}/bin") and "BindReadOnlyPaths=" in found["remedy"]
    found = said("-on-event", home / "bin/none")                                # nothing hides what is not there
    assert found["status"] == "FAIL" and "BindReadOnlyPaths=" not in found["remedy"]
    dropped = unit.with_name("streamerbrainz.service.d")
    dropped.mkdir()
    (dropped / "override.conf").write_text("[Service]\nBindReadOnlyPaths=%h/bin\n")
    assert said("-on-event", link)["status"] == "ok"


def test_doctor_ends_well_where_there_is_no_fault(sick):
    assert call("doctor", *sick.words).out.endswith("\n\nNo fault found.\n")
    sick.answers["/:/prefs"] = {"Setting": [{"id": "WebHooksEnabled", "value": "0"}]}
    assert "No fault found." not in call("doctor", *sick.words).out


@pytest.mark.parametrize("push, said", [(False, True), ("0", True), ("false", True), (True, False), ("1", False), (None, False)])
def test_doctor_tells_of_push_notifications_that_are_off(sick, push, said):
    settings = [{"id": "WebHooksEnabled", "value": True}, *([{"id": "PushNotificationsEnabled", "value": push}] if push is not None else [])]
    sick.answers["/:/prefs"] = {"Setting": settings}
    found = sick.examine()
    assert ("library.new" in next(each for each in found["findings"] if each["check"] == "webhooks switch")["evidence"]) is said and not failed(found)


def test_doctor_hints_at_a_restart_where_all_is_well_but_no_webhook_came(sick):
    def delivery():
        return next(each for each in sick.examine()["findings"] if each["check"] == "test webhook")
    assert "restart the server" in delivery()["evidence"] and delivery()["status"] == "ok"
    sick.daemon.inbox.put(sb.Webhook("media.play", "m1"))
    eventually(lambda: sick.daemon.board.status.webhook_at)
    assert "restart the server" not in delivery()["evidence"]


def test_the_likely_causes_come_best_first_and_lines_fit_80_columns(sick):
    sick.root.update(ownerFeatures="sync", myPlexSigninState="none")
    sick.answers["/:/prefs"] = {"Setting": [{"id": "webHooksEnabled", "value": "0"}]}
    assert [each.split(" ")[0] for each in sick.examine()["causes"]] == ["the", "webhooks", "the"]
    done = call("doctor", *sick.words)
    assert done.status == 1 and "\x1b" not in done.out and "Why webhooks may not arrive, the likeliest first:\n1. Plex Pass: " in done.out
    assert max(len(line) for line in done.out.splitlines() if "http" not in line) <= 80
    assert "FAIL  Plex Pass: the owner's features have no webhooks: none is ever sent\n      -> get Plex Pass" in done.out


def test_without_any_configuration_doctor_still_says_what_it_can():
    done = start("doctor", "-webhooks-port", free_port())
    assert done.status == 1 and "skip  server: not asked: no server is configured" in done.out and "FAIL  daemon: nothing listens" in done.out
    assert done.err == ""


# === Demo ===

# --- the world


def test_the_demo_plays_an_evening_in_which_every_line_is_true():
    done = subprocess.run([sys.executable, "-W", "error", PROGRAM, "demo", "-speed", "40"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    said = [re.search(r"state=(\w+) title=(\"[^\"]*\"|\S+)", line).groups() for line in done.stderr.splitlines() if "state=" in line]
    assert said == [("playing", '"Karma Police"'), ("paused", '"Karma Police"'), ("playing", '"Karma Police"'), ("playing", '"No Surprises"'),
                    ("playing", "Teardrop"), ("stopped", "Teardrop"), ("playing", "Pilot"), ("stopped", "Pilot"), ("playing", "Teardrop")]
    assert "# You press play in Plexamp." in done.stdout


def test_the_demo_shows_pictures_events_and_a_question_at_the_port_that_was_given():
    port = free_port()
    with subprocess.Popen([sys.executable, "-W", "error", PROGRAM, "demo", "-webhooks-host", "127.0.0.1", "-webhooks-port", str(port), "-speed", "20"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        page = f"http://127.0.0.1:{port}/"
        said = "".join(iter(demo.stdout.readline, "# You press play in Plexamp.\n"))
        now = eventually(lambda: (found := json.loads(sb.exchange(page + "now", {}).body))["state"] == PLAYING and found)
        picture = sb.exchange(page + now["cover"], {})
        assert picture.headers["Content-Type"] == "image/png" and picture.body.startswith(b"\x89PNG") and now["witnesses"]["events"]["up"]
        eventually(lambda: "The Office" in sb.exchange(page, {}).body.decode().partition("<section")[0])     # the question comes first
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 0 and f"Look at it: {page} " in said and "action=marked_watched" in err and "action=conflict_created" in err


def test_the_demo_waits_on_a_terminal_with_its_page_open(home):
    port = free_port()
    with Terminal("demo", "-webhooks-port", port, "-webhooks-host", "127.0.0.1", "-speed", 100, path=home, quick=False) as demo:
        demo.hear("# The page stays open; Ctrl-C ends it.")
        assert sb.exchange(f"http://127.0.0.1:{port}/healthz", {}).status == 200
        demo.type("\x03")
        said, code = demo.end()
    assert code == 0 and "stopped listening" in said and "Traceback" not in said


def test_the_demo_ends_with_its_terminal(home, tmp_path):
    master, slave = os.openpty()
    demo = subprocess.Popen([sys.executable, PROGRAM, "demo", "-webhooks-port", str(free_port()), "-speed", "100"], stdin=slave, stdout=slave, stderr=slave,
                            start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    os.close(slave)
    said = b""
    while b"# The page stays open" not in said:
        said += os.read(master, 65536)
    os.close(master)                                       # the ssh that it ran in has gone
    demo.wait(10)
    assert not list(tmp_path.glob("tmp*"))                 # and its tracker with it


def test_the_demo_takes_another_port_where_a_daemon_has_it():
    with Process() as daemon:
        done = start("demo", "-webhooks-port", daemon.port, "-webhooks-host", "127.0.0.1", "-speed", "100")
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ ", done.out)[1])
    assert done.status == 0 and port != daemon.port


def test_the_stand_ins_stream_pings_as_plex_does_and_forgets_who_has_gone(monkeypatch):
    monkeypatch.setattr(sb, "PING_S", 0.02)
    with serving(sb.StandIn(TOKEN, "m1", has_events=True)) as stand_in:
        with socket.create_connection(("127.0.0.1", stand_in.server_address[1])) as connection:
            connection.sendall(f"GET /:/eventsource/notifications HTTP/1.1\r\nX-Plex-Token: {TOKEN}\r\n\r\n".encode())
            said = b""
            while said.count(b"event: ping\ndata: {}\n\n") < 2:
                said += connection.recv(65536)
            stand_in.turn(PLAYING, TRACK)
            while b'"state": "playing"' not in said:
                said += connection.recv(65536)
        eventually(lambda: not stand_in.streams)


def test_each_cover_of_the_demo_is_a_picture_of_its_own():
    pictures = [sb.picture(item["ratingKey"]) for _, _, _, item, _, _ in sb.EVENING if item]
    assert len(set(pictures)) == 5 and all(len(each) < 5000 for each in pictures)


def test_control_c_ends_the_demo_cleanly():
    demo = subprocess.Popen([sys.executable, PROGRAM, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in demo.stderr:
        if "command ran event=playing" in line:
            break
    demo.send_signal(signal.SIGINT)
    _, err = demo.communicate(timeout=10)
    assert demo.returncode == 0 and err.endswith("stopped listening\n") and "Traceback" not in err


# === main ===

ALL = ("-plex-server-url", "http://plex:32400/", "-plex-token-file", "t", "-plex-machine-id", "m1")


def test_the_defaults_are_those_of_the_contract():
    assert config() == sb.Config(
        "run", (), "", 3001, "", None, "", "", "", "", 30.0, True, "", 10.0, "", 90, True, False, "", "", "info", "text", False, "", "", 20,
        "", None, 1.0, False, "")
    assert config().webhooks_a_minute == 0
    assert config("-webhook-secret-file", "f").webhooks_a_minute == config("-tracker-db", "f").webhooks_a_minute == 100
    assert config("-tracker-db", "f", "-rate-limit", "0").webhooks_a_minute == 0


def test_flags_have_one_dash_or_two_and_values_after_a_blank_or_a_sign():
    one = config(*ALL, "-webhooks-port", "8080", "-poll-interval=0", "-log-format", "json")
    assert one == config(*(f"-{word}" if word.startswith("-") else word for word in ALL), "--webhooks-port=8080",
                         "--poll-interval", "0", "--log-format=json")
    assert (one.plex_server_url, one.webhooks_port, one.poll_interval_s, one.log_format) == ("http://plex:32400", 8080, 0.0, "json")


def test_flags_come_from_a_file_with_comments_and_quotes(tmp_path):
    file = tmp_path / "flags"
    file.write_text('\ufeff# StreamerBrainz\n\n-plex-server-url http://plex:32400   # the NAS\r\n--plex-token-file "/a b/token"\n-plex-machine-id=m1\n')
    assert config(f"@{file}") == sb.Config(plex_server_url="http://plex:32400", plex_token_file="/a b/token", plex_machine_id="m1",
                                           flags_file=str(file))
    assert config("players", f"@{file}").command == "players"


def test_flags_are_read_in_their_usual_place_and_the_command_line_wins(home, tmp_path, monkeypatch):
    usual, system = home / ".config/streamerbrainz/flags", tmp_path / "system"
    system.write_text("-webhooks-port 1111\n")
    monkeypatch.setattr(sb, "SYSTEM_FLAGS", str(system))
    assert (config("doctor").webhooks_port, config("doctor").flags_file) == (1111, str(system))
    usual.parent.mkdir(parents=True)
    usual.write_text("-webhooks-port 2222\n-tracker-db ~/.local/share/streamerbrainz/tracker.db\n")
    assert (config("doctor").webhooks_port, config("doctor").tracker_db) == (2222, f"{home}/.local/share/streamerbrainz/tracker.db")
    assert config("doctor", "-webhooks-port", "3333").webhooks_port == 3333
    (home / "mine").write_text("-webhooks-port 4444\n")
    for words in (("doctor", "-webhooks-port", "5", "@~/mine"), ("doctor", "@~/mine", "-webhooks-port", "5")):
        assert config(*words) == sb.Config("doctor", webhooks_port=5, flags_file=f"{home}/mine")      # these replace the usual ones
    assert config("demo") == sb.Config("demo")             # it must neither write into the tracker nor switch an amplifier
    assert flat(call("doctor").out).startswith(f"ok flags: no server is configured: webhooks are the only source (read from {usual}) ")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert config("doctor").webhooks_port == 2222
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")      # which its specification wants to be ignored
    assert config("doctor").webhooks_port == 2222


def test_the_log_says_which_flags_were_read(home):
    file = home / ".config/streamerbrainz/flags"
    file.parent.mkdir(parents=True)
    file.write_text("-log-level debug\n")
    with Process() as daemon:
        eventually(lambda: f" flags={file}\n" in daemon.text())


@pytest.mark.parametrize("words, sentence", [
    ("frob", "there is no such command; the commands are run, players, doctor, tracker, secret, hook, demo, setup, login, webhook, uninstall, help, version."),
    ("-frob", "there is no flag -frob; see: streamerbrainz.py -h."),
    ("-plex-token SECRET", "there is no flag -plex-token; see: streamerbrainz.py -h. The token goes into a file: -plex-token-file."),
    ("--plex-token=SECRET", "there is no flag -plex-token; see: streamerbrainz.py -h. The token goes into a file: -plex-token-file."),
    ("players host SECRET", "there is a word too many. (Each value stands after its flag. No token goes on the command line, "
     "where ps shows it: see -plex-token-file.)"),
    ("run SECRET", "there is a word too many. (Each value stands after its flag. No token goes on the command line, "
     "where ps shows it: see -plex-token-file.)"),
    ("-webhooks-port 70000", "-webhooks-port: give a whole number from 1 to 65535 (see: streamerbrainz.py -h)"),
    ("-webhooks-port", "-webhooks-port: it needs a value (see: streamerbrainz.py -h)"),
    ("-poll-interval 0.5", "-poll-interval: give a number from 1 to 86400, or 0 (see: streamerbrainz.py -h)"),
    ("-poll-interval nan", "-poll-interval: give a number from 1 to 86400, or 0 (see: streamerbrainz.py -h)"),
    ("demo -speed 0", "-speed: give a number from 1 to 100 (see: streamerbrainz.py -h)"),
    ("-plex-server-url plex:32400", "-plex-server-url: this is no URL of a server; give one such as http://192.168.1.5:32400 "
     "(see: streamerbrainz.py -h)"),
    ("-plex-server-url http://h/?X-Plex-Token=SECRET", "-plex-server-url: the URL carries more than an address; "
     "the token goes into a -plex-token-file (see: streamerbrainz.py -h)"),
    ("-plex-server-url http://u:SECRET@h", "-plex-server-url: the URL carries more than an address; "
     "the token goes into a -plex-token-file (see: streamerbrainz.py -h)"),
    ("-plex-server-url http://[", "-plex-server-url: this is no URL of a server; give one such as http://192.168.1.5:32400 "
     "(see: streamerbrainz.py -h)"),
    ("-plex-server-url http://h", "half a configuration: to ask the server, add -plex-token-file and -plex-machine-id; to use "
     "webhooks only, give neither -plex-server-url nor -plex-token-file. (`streamerbrainz.py players` shows the identifiers.)"),
    ("-plex-server-url http://h -plex-machine-id m", "half a configuration: to ask the server, add -plex-token-file; to use webhooks only, give "
     "neither -plex-server-url nor -plex-token-file."),
    ("-plex-server-url http://plex..lan", "-plex-server-url: this is no URL of a server; give one such as http://192.168.1.5:32400 "
     "(see: streamerbrainz.py -h)"),
    ("-plex-ca-file c", "-plex-ca-file is given, but no -plex-server-url that begins with https://."),
    ("players", "players: name the server, as in: streamerbrainz.py players 192.168.1.5:32400"),
    ("players host", "players: give the token in a file, with -plex-token-file."),
    ("-webhooks-host a..b", "-webhooks-host: cannot listen there (that cannot be a host's name); give an address of this machine."),
    ("players http://[", "players: this is no URL of a server; give one such as http://192.168.1.5:32400."),
    ("@/no/such", "@FILE: the file that it names cannot be read (No such file or directory); name a file of flags."),
])
def test_a_wrong_call_is_one_sentence_and_status_2(words, sentence):
    assert call(*words.split()) == (2, "", f"streamerbrainz: {sentence}\n")
    assert "SECRET" not in sentence


@pytest.mark.parametrize("content, sentence", [
    ("-plex-machine-id 'x", "a line of the @FILE has a quote without its end; put both or none."),
    ("-plex-machine-id x y", "a line of the @FILE has more than a flag and its value: -plex-machine-id; put the value in quotes."),
    ("SECRET", "a line of the @FILE does not begin with a flag, as in: -webhooks-port 3001"),
    ("# f\udcfcr", "the @FILE is not UTF-8; save it as UTF-8."),
    ("@{}", "a line of the @FILE does not begin with a flag, as in: -webhooks-port 3001")])
def test_a_file_of_flags_with_a_mistake_is_told(content, sentence, tmp_path):
    file = tmp_path / "flags"
    file.write_text(content.format(file), errors="surrogateescape")
    with pytest.raises(sb.ConfigError, match=f"^{re.escape(sentence)}$"):
        config(f"@{file}")


@pytest.mark.parametrize("content", [b"\x00", b"-plex-machine-id a\x00b", b"x" * 70_000, b"# \n" * 70_000, "-log-level warn".encode("utf-16")])
def test_a_file_that_cannot_be_one_of_flags_is_refused(content, tmp_path):
    file = tmp_path / "flags"
    file.write_bytes(content)
    with pytest.raises(sb.ConfigError):
        config(f"@{file}")


def test_files_of_flags_name_no_other_and_nothing_endless_is_read(tmp_path):
    one, two, fifo = tmp_path / "one", tmp_path / "two", tmp_path / "fifo"
    one.write_text(f"-plex-machine-id @{two}\n-accounts @{one}")
    two.write_text(f"@{one}")
    os.mkfifo(fifo)
    assert (config("demo", f"@{one}").plex_machine_id, config("demo", f"@{one}").accounts) == (f"@{two}", f"@{one}")
    for file in (fifo, "/dev/zero", "/dev/full", tmp_path, "/proc/self/mem"):
        with pytest.raises(sb.ConfigError, match=f"^@FILE: {file} cannot be read \\(.+\\); name a file of flags\\.$"):
            config(f"@{file}")
    with pytest.raises(sb.ConfigError, match="NUL"):
        config("-plex-token-file", "a\0b")


def valued_flags():
    return re.findall(r"^ *(-[a-z-]+) [A-Z]+  ", sb.Config.__doc__, re.M)


PLEX_AT = "-plex-server-url https://127.0.0.1:1 -plex-machine-id m -webhooks-port {port} -webhooks-host 127.0.0.1 "


@pytest.mark.parametrize("words", [
    "S", "@S", "@/S", "@./S", "@../S", "@S/S", "-S", "--S", "-S=S", "-a=S", "-plex-S", "-plex-token=S", "-json=S", "-h=S", "run S", "doctor S", "demo S",
    "secret S", "run -webhook-secret-file S", "-plex-token-file S " + PLEX_AT, "-plex-token-file /S " + PLEX_AT,
    "-plex-token-file {token} -plex-ca-file S " + PLEX_AT, "-plex-token-file {token} -plex-ca-file S/S " + PLEX_AT,
    "players S", "players S:32400", "players http://S", "players https://S:1/", "players u:S@h", "players h?S", "players h#S", "players http://h:S",
    "players 127.0.0.1:1/S -plex-token-file {token}", "players 127.0.0.1:1 -plex-token-file S", "players {server}/S -plex-token-file {token}",
    "players http://{server}/S/S -plex-token-file {token}", "players S -plex-token-file {token}",
    "-webhooks-host S..x", "-webhooks-host S/S", "-on-event S", "-on-event 'S", "-on-event /S", "-on-event S/S", "hook S", "hook S S", "hook playing -on-event S",
    "hook playing -on-event 'S", "hook S -on-event S", "secret -webhook-secret-file S/S", "-tmdb-token-file S", "-tmdb-token-file S -tracker-db {db} -webhooks-port {port}",
    "tracker S", "tracker S -tracker-db {db}", "tracker show S -tracker-db {db}", "tracker show -tracker-db S 1", "tracker shows -tracker-db S",
    "tracker shows -tracker-db S/S", "tracker import -tracker-db S/S", "tracker import S -tracker-db {db}", "tracker import {token} -tracker-db {db}",
    "tracker import {keys} -tracker-db {db}", "tracker resolve S S -tracker-db {db}", "tracker log -status S -tracker-db {db}", "tracker log S -tracker-db {db}",
    "-tracker-db S/S -webhooks-port {port}", "@{token}", "@{line}", "@{quote}", "@{equals}", *(f"{flag} S S" for flag in valued_flags()), *(f"{flag}=S S" for flag in valued_flags())])
def test_a_word_that_may_be_a_token_is_repeated_in_no_error(words, tmp_path, token_file, database, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("line", f"-log-level {TOKEN} {TOKEN}"), ("quote", f"-x'{TOKEN}"), ("equals", f"-log-level={TOKEN} x"),
                          ("keys", json.dumps({TOKEN: 1}))):
        (tmp_path / name).write_text(content)
    with RawServer(http_answer(b"", "404 Not Found")) as server:
        values = {name: tmp_path / name for name in ("line", "quote", "equals", "keys")}
        done = call(*re.sub(r"\bS\b", TOKEN, words).format(port=free_port(), token=token_file, db=database, server=server.url[7:], **values).split())
    assert done.status in (1, 2) and done.err.startswith("streamerbrainz: ") and len(done.err.splitlines()) == 1, done
    assert TOKEN not in done.out + done.err and TOKEN[:8] not in done.err, done


def test_a_host_is_no_token_and_a_file_that_is_there_or_has_a_folder_is_named(tmp_path):
    for host in ("plex", "plex-media-server", "plexmediaserver:32400", "nas.home.arpa", "[fe80::1]:32400", "192.168.100.100:32400", "a-very-long-name.lan:1"):
        port = "" if re.search(r":\d+$", host) else ":32400"                    # players HOST: where Plex listens
        assert config("players", host).words == (f"http://{host}{port}",)
    for url_ in ("http://plex", "https://plex.example.org", "http://plex/sub"):
        assert config("players", url_).words == (url_,)
    assert sb.shown_path(str(tmp_path / "no" / "t")) == str(tmp_path / "no" / "t")
    for path in ("", "/", ".", "..", "x", "/x", "./x", "../x", "x/y", "/x/y", "a\0b", "x" * 5000):
        assert sb.shown_path(path) == "the file that it names", path


@pytest.mark.parametrize("words", ["-log-level debug doctor", "doctor -log-level debug", "-log-level=debug doctor"])
def test_flags_may_stand_before_the_command(words):
    assert config(*words.split()) == sb.Config("doctor", log_level="debug")
    assert config("-json", "tracker", "-last", "3", "log").words == ("log",) and config("-json", "tracker", "log").json


def test_help_is_a_command_and_a_flag_anywhere():
    for words in (["help"], ["-h"], ["--help"], ["doctor", "-help"], ["-webhooks-port", "5", "help"]):
        done = call(*words)
        assert (done.status, done.err) == (0, "") and done.out.startswith("usage: streamerbrainz.py [COMMAND] [FLAGS] [@FILE]\n")
    assert call("-version") == call("version") == (0, f"streamerbrainz {sb.VERSION}\n", "")


@pytest.mark.parametrize("words", [("-h",), ("-version",), ("help",), ("secret", "-webhook-secret-file", "{}/secret")])
def test_a_reader_that_has_gone_is_no_exception(words, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, PROGRAM, *(word.format(tmp_path) for word in words)], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writer)
    assert not re.search("Exception|Traceback|Error", done.stderr)


def test_what_the_unit_hides_is_told_apart_from_what_is_not_there(home, monkeypatch):
    path = f"{home}/bin/lamp"
    assert sb.shown_path(path) == path
    monkeypatch.setenv("INVOCATION_ID", "1")
    assert sb.shown_path(path) == path                                          # a home that is no mount: another unit
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(home))
    note = (" (if it is there, the unit hides it: it shows ~/.local/bin, ~/.config/streamerbrainz and, to write, "
            "~/.local/share/streamerbrainz only)")
    assert sb.shown_path(path) == path + note and sb.shown_path("/usr/bin/lamp") == "/usr/bin/lamp"
    with pytest.raises(sb.ConfigError, match=re.escape(f"-on-event: {path}{note} is missing or not executable;")):
        sb.hook_command(path)
    with pytest.raises(sb.ConfigError, match=re.escape(f"-tracker-db: {home}/tv/x.db{note} cannot be opened (")):
        sb.Tracker(f"{home}/tv/x.db", create=True)


@pytest.mark.parametrize("seed", range(2))
def test_no_command_line_raises_anything_but_a_config_error(seed, tmp_path):
    chance = random.Random(seed)
    flags = [*valued_flags(), "-json", "-no-plex-events", "-h", "-x", "--", "-", "", "=", "@", "\0", "\udcff", "'", '"', "\n", "#", "9" * 500, "1e9", "nan"]
    words = [*flags, *sb.COMMANDS, "http://h:1/", "http://[", "//", "@/dev/zero", "-1", "0", "30", "info", "text"]
    for _ in range(400):
        line = ["".join(chance.choices(words, k=chance.randint(1, 2))) if chance.random() < 0.3 else chance.choice(words)
                for _ in range(chance.randint(0, 6))]
        (tmp_path / "flags").write_bytes(" ".join(chance.choices([*words, "\n", "\r"], k=8)).encode("utf-8", "surrogateescape"))
        for each in (line, [*line, f"@{tmp_path}/flags"]):
            with contextlib.suppress(sb.ConfigError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
                assert isinstance(config(*each), sb.Config)


def test_the_help_fits_80_columns_and_names_each_flag():
    done = start("-h")
    assert done.status == 0 and max(map(len, done.out.splitlines())) <= 80
    assert {word.split()[0] for word in re.findall(r"^    ([a-z|]+) ", done.out, re.M) for word in word.split("|")} >= sb.TRACKER_COMMANDS.keys()
    assert set(re.findall(r"^\| `(-[a-z-]+)", (HERE / "README.md").read_text(), re.M)) == set(re.findall(r"^  (-[a-z-]+)", done.out, re.M))


@pytest.mark.parametrize("words, status", [("frob", 2), ("-plex-token SECRET", 2), ("tracker shows -tracker-db /no/such", 2), ("players localhost:1 -plex-token-file {}", 1)])
def test_the_exit_status_and_the_sentence_are_those_of_the_process(words, status, token_file):
    words = words.format(token_file).split()
    assert start(*words) == call(*words) and call(*words).status == status


def old_pythons():
    """Python 3.8, 3.9 and 3.10, where they are installed, as parameters."""
    found = {}
    for version in ("3.8", "3.9", "3.10"):
        for python in (shutil.which(f"python{version}"), *sorted(pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))):
            words = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            if python and subprocess.run(words, capture_output=True, text=True).stdout == f"{version}\n":        # (a shim may be of none)
                found[version] = str(python)
    skip = pytest.mark.skip(reason="no Python before 3.11 is installed")
    return [pytest.param(version, python, id=version) for version, python in found.items()] or [pytest.param("", "", id="none", marks=skip)]


@pytest.mark.parametrize("version, python", old_pythons())
@pytest.mark.parametrize("word", ["-h", "frob"])
def test_an_old_python_is_told_so_in_one_sentence(version, python, word):
    done = subprocess.run([python, PROGRAM, word], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"streamerbrainz: needs Python 3.11 or newer; this is {version}\n")


# === README and the unit ===

CHAPTERS = ("Ground", "Player", "Page", "Listener", "Hooks", "Tracker", "Browse", "Daemon", "Setup", "Doctor", "Demo", "main")
WORLD = {"time", "os", "sys", "socket", "threading", "queue", "logging", "select", "signal", "subprocess", "tempfile", "shutil", "ssl", "http",
         "urllib.request", "log", "say", "open", "print", "input"}


class Chapter(typing.NamedTuple):
    """A chapter of the program, as it is and as it says."""
    name: str
    needs: dict[str, set[str]]                             # by chapter: the names that it says it uses of it
    defines: set[str]                                      # at module level
    uses: set[str]                                         # names that it reads, but for variables of its functions
    pure_uses: set[str]                                    # ... before "# --- the world"


def defined_names(nodes):
    """The names that some statements define, those within an `if` or `try` too."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from defined_names(node.body)
        else:
            yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))


def variables(node):
    """The names that are a variable within a function, a lambda or a comprehension, and all that stands in it."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        nodes = [node.args, *(node.body if isinstance(node.body, list) else [node.body])]
    else:
        nodes = [node] if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) else []
    for each in itertools.chain.from_iterable(map(ast.walk, nodes)):
        if isinstance(each, ast.arg):
            yield each.arg
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id


def used_names(node, local=frozenset()):
    """The names that a node reads, in annotations too, but for variables; a module of a package as urllib.request."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.name for alias in node.names)
    inside = local | set(variables(node))
    for field, value in ast.iter_fields(node):
        outside = field in ("decorator_list", "returns", "args") and isinstance(node, ast.FunctionDef)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from used_names(each, local if outside else inside)


def chapters(source):
    """The chapters of a program's source."""
    lines, found, tree = source.split("\n"), [], ast.parse(source)
    marks = [(number, re.match(r"# === (\w+)", line)[1]) for number, line in enumerate(lines, 1) if line.startswith("# === ")]
    for (begin, name), (end, _) in zip(marks, [*marks[1:], (len(lines) + 1, "")], strict=True):
        inside = [node for node in tree.body if begin < node.lineno < end]
        no_mark = begin if name == "main" else end         # main is all world
        world = next((n for n in range(begin, end) if lines[n - 1].startswith("# --- the world")), no_mark)
        comment = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines[begin - 1:end]))
        needs = {}
        for sentence in re.findall(r"^# Needs (of .*(?:\n#   .*)*)", comment, re.M):
            for chapter, names in re.findall(r"of (\w+):\s([^;]*)", sentence):
                needs[chapter] = needs.get(chapter, set()) | set(re.findall(r"\w+", names))
        found.append(Chapter(name, needs, set(defined_names(inside)), {used for node in inside for used in used_names(node)},
                             {used for node in inside if node.lineno < world for used in used_names(node)}))
    return found


def complaints(source):
    """Where a program's chapters use more or less than they say, or a pure part the world."""
    found, said = chapters(source), []
    for chapter in found:
        others = [other for other in found if other.name not in (chapter.name, "Ground")]
        for other in others:
            used, named = chapter.uses & other.defines - chapter.defines, chapter.needs.get(other.name, set())
            if used - named:
                said.append(f"{chapter.name}: add to '# Needs of {other.name}:' {', '.join(sorted(used - named))}")
            if named - used:
                said.append(f"{chapter.name}: take from '# Needs of {other.name}:' {', '.join(sorted(named - used))}")
        if unknown := chapter.needs.keys() - {other.name for other in others}:
            said.append(f"{chapter.name}: nothing can be needed of {', '.join(sorted(unknown))}")
        if touched := chapter.pure_uses & WORLD:
            said.append(f"{chapter.name}: its pure part touches the world: {', '.join(sorted(touched))}")
    return said


SMALL = '''
"""Words."""
import time

# === Ground: words (text) ===
# Needs: nothing

def text(value):
    return str(value)


# --- the world

def say(word):
    print(word)


# === Player: what plays (Item, play) ===
# Needs: Ground

MAX = 7


class Item:
    title: str


# --- the world

def play(item: Item) -> None:
    say(time.time())


# === Page: HTML (page) ===
# Needs: Ground
# Needs of Player: Item,
#   MAX

def page(item: Item | None) -> str:
    return text(MAX)


# === main: flags (main) ===
# Needs of Page: page
# Needs of Player: play

if __name__ == "__main__":
    play(page(None))
'''


@pytest.mark.parametrize("old, new, said", [
    ("", "", []),
    ("Needs of Player: play", "Needs of Player: play, Item", ["main: take from '# Needs of Player:' Item"]),
    ("Item,\n#   MAX", "MAX", ["Page: add to '# Needs of Player:' Item"]),
    ("Page: page\n# Needs of Player: play", "Page: page;\n#   of Player: play", []),
    ("Page: page\n# Needs of Player: play", "Page: page; of Player: play, Item", ["main: take from '# Needs of Player:' Item"]),
    ("# Needs of Page: page\n", "", ["main: add to '# Needs of Page:' page"]),
    ("Needs of Page", "Needs of Paper", ["main: add to '# Needs of Page:' page", "main: nothing can be needed of Paper"]),
    ("return str(value)", "return open(value)", ["Ground: its pure part touches the world: open"]),
    ("return str(value)", "return value.open(time=1)", []),
    ("return str(value)", "log = [value for time in value]\n    return log", []),
    ("return text(MAX)", "import urllib.request\n    return text(MAX)", ["Page: its pure part touches the world: urllib.request"]),
    ("return text(MAX)", "return text(MAX + time.time())", ["Page: its pure part touches the world: time"]),
    ("def page(item: Item | None)", "def page(play: Item, item=None)", []),
    ("def page(item: Item | None)", "def page(item=play)", ["Page: add to '# Needs of Player:' play", "Page: take from '# Needs of Player:' Item"]),
    ("return text(MAX)", "return say(MAX)", ["Page: its pure part touches the world: say"])])
def test_the_reader_of_chapters_sees_each_slip(old, new, said):
    assert old in SMALL and complaints(SMALL.replace(old, new)) == said


def test_each_chapter_needs_what_it_says_and_its_pure_part_touches_nothing():
    source = PROGRAM.read_text(encoding="utf-8")
    assert tuple(chapter.name for chapter in chapters(source)) == CHAPTERS
    assert not complaints(source), "\n" + "\n".join(complaints(source))


def test_the_tests_have_the_programs_chapters():
    marks = re.findall(r"^# === ([\w ]+) ===$", pathlib.Path(__file__).read_text(encoding="utf-8"), re.M)
    assert tuple(marks) == (*CHAPTERS, "README and the unit")


def test_readme_names_each_default_as_the_program_has_it():
    readme, defaults = (HERE / "README.md").read_text(), sb.Config()
    rows = dict(re.findall(r"^\| `-([a-z-]+) \w+` \| `([^`]+)` \|", readme, re.M))
    assert rows == {"webhooks-port": str(defaults.webhooks_port), "poll-interval": f"{defaults.poll_interval_s:g}",
                    "log-level": defaults.log_level, "log-format": defaults.log_format, "speed": f"{defaults.speed:g}",
                    "tracker-log-days": str(defaults.tracker_log_days), "last": str(defaults.last),
                    "active-timeout": f"{defaults.active_timeout_s:g}"}


def test_the_unit_calls_the_program_with_flags_that_it_knows():
    unit = (HERE / "streamerbrainz.service").read_text()
    command = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.M)[1])
    words = command[command.index("%h/.local/bin/streamerbrainz.py") + 1:]
    assert words == ["@%h/.config/streamerbrainz/flags", "-plex-token-file", "%d/plex-token"] and unit == sb.UNIT
    assert "journalctl --user-unit streamerbrainz -f" in unit.partition("[Unit]")[0]
    assert f"RestartPreventExitStatus={sb.main(['-frob'])}\n" in unit


def test_the_top_of_the_repository_has_five_files():
    if not (HERE / ".git").exists():
        pytest.skip("no repository")
    listed = ["git", "-c", "safe.directory=*", "-C", HERE, "ls-files"]      # whoever owns the folder
    tracked = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(name for name in tracked if not name.startswith(".")) == [
        "LICENSE", "README.md", "streamerbrainz.py", "streamerbrainz.service", "test_streamerbrainz.py"]
    assert stat.S_ISREG((HERE / "streamerbrainz.py").stat().st_mode)
