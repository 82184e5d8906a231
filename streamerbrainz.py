#!/usr/bin/env python3
"""StreamerBrainz tells what your Plex player is doing, and keeps what you have watched.

It receives the webhooks of Plex Media Server, asks the server's sessions about one
chosen player (mostly Plexamp), and logs each change of that player:

    state=playing title="Karma Police" artist=Radiohead album="OK Computer" ...

It also shows it on a page, runs a command for it, and keeps what was watched ("The watch
tracker" below); and it finds out why webhooks do not arrive (`doctor`).

A webhook says that something happened, the server's event stream says each change as it
happens, /status/sessions says what is so now.  Each of them lies at times: webhooks get
lost, doubled and overtaken, the stream breaks, sessions lag behind, and keep a crashed
player for minutes.  So they are witnesses, and one pure function, advance(), is the judge.
Its promise: each true change is reported once, in order and soon, nothing is reported that
was not true, and every playing ends in one stopped.

    Plex Media Server          (a browser, curl, Prometheus)
      |  POST /webhooks/plex     |  GET / /now /events /healthz /metrics
      v                          v
    Listener ---- bytes -> Webhook -----> inbox <--- signals
      |  a thread for each connection       |   ^
      |                 ^                   |   +--- Notification <- event stream
      v  with           +---- Board         v
    Journal  -tracker-db   Status ^----- Watcher ---- "look" ----> PlexServer
      |  committed, then 200              |  ^                  GET /status/sessions
      v       advance(player, ..., at) ---+  +------ bytes -> (Session, ...)
    Worker -> Match -> marked             |
                                          +--> Change -> log line, Hooks, systemd's STATUS=

thread              owns                               never
main (Watcher)      the PlayerStates and when to look  waits longer than PLEX_S (and the resolver)
listener            the listening socket, deadlines    reads from a connection
request (0 to 64)   one connection and its bytes       queries Plex (but for a picture), decides
worker              the tracker's shows and marks      delays an answer or the Watcher
hooks               the one command that runs          delays the Watcher
stream              its connection to the server       decides
signals             the signals, blocked elsewhere     does more than put into the inbox
What crosses threads are values that never change, through the inbox (a SimpleQueue) or by
replacing one reference (Board.status).  The exceptions: Listener.deadlines, a dict with one
entry for each connection, which its thread moves on; Board.streams, a list of queues; and
what has a lock: the Gate, the Journal and the Covers.

Vocabulary: Plex's own words, transliterated: rating_key, view_offset, machine_identifier.
  server   Plex Media Server, always        player   the machine that plays
  session  an item that a player has now    item     a track, episode, movie, clip, photo
  look     one query of /status/sessions    listener our own HTTP side
  show     a series, or a movie (of one     entry    a row of the tracker's journal: a webhook,
           episode, 0x0) in the tracker              or a play that only the history told
Units: Plex's times are integer milliseconds; our own end in _s; `at` is monotonic seconds.
Exit status: 0 well; 1 it could not go on; 2 wrong use or wrong configuration.

The watch tracker: each webhook is a row of the journal, committed before its answer.  The
worker finds the show of each media.scrobble, by what it was before, by the show's ids, or by
title and year; it marks the episode, or makes a conflict for a person.  A row is finished in
one transaction: a kill at any moment loses and doubles nothing.

The upper half of this file computes and touches nothing; the lower half touches the
world and decides nothing.  `grep '^# ===' streamerbrainz.py` is the table of contents.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import email.errors
import email.message
import email.parser
import email.utils
import errno
import functools
import getpass
import heapq
import hmac
import html
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

VERSION = "0.1.0"
USER_AGENT = f"StreamerBrainz/{VERSION}"      # and the Server header

# === Limits: what is bounded, by how much, and why ===

MAX_BODY = 8 * 2**20          # bytes of a webhook; the largest thumb seen is about 1 MB
MAX_PAYLOAD = 2**20           # bytes of its JSON; 10 kB is usual, and JSON grows 25-fold as objects
MAX_PARTS = 16                # of a multipart body; Plex sends 2
MAX_PART_HEADER = 1024        # bytes; Plex's have under 100.  email.parser's time grows with its square
MAX_CONTENT_TYPE = 300        # characters; Plex's have 81
MAX_HEAD = 8 * 1024           # bytes of a request's head, as nginx; Plex's have under 500.  email.parser is quadratic
MAX_PAIRS = 16                # of a URL's query that are read
MAX_PATH = 200                # characters of a path that are logged
MAX_SESSIONS = 2**20          # bytes of /status/sessions; a session takes 3 to 30 kB
MAX_EVENT = 64 * 1024         # bytes of an event of the stream; 300 are usual
MAX_TEXT = 500                # characters kept of a title or a name; 200 are many
MAX_TOKEN_FILE = 4096         # bytes; Plex's tokens have 20 characters
MAX_INBOX = 2000              # messages that may wait; 400 a second during a look that hangs
MAX_NOTED = 100               # ... for notifications to be put beside them; one that is left out comes again
MAX_CONNECTIONS = 64          # request threads at once; each may hold 8 MB of stack, mostly untouched
LARGE_BODY = 128 * 1024       # bytes; few thumbs are larger.  What is more is read by so many at once:
MAX_LARGE_BODIES = 8          # ... with thumbs of 1 MB they take no more memory than the interpreter
MAX_PLAYERS = 50              # remembered when webhooks alone tell of every player
REQUEST_S = 10.0              # to read one whole request; Plex sends a webhook in milliseconds
HEAD_S = 3.0                  # ... of which for its head
KEEP_ALIVE_S = 5.0            # that an idle connection may hold its thread; as Apache and Node do
CROWDED_S = 1.0               # ... and any, when all threads are taken
LARGE_S = 3.0                 # ... to read what is over LARGE_BODY; 1 MB in it is slow Wi-Fi
LINGER_S = 2.0                # that a refused sender may go on sending unread; nginx gives 5
REAP_S = 1.0                  # between two checks of both, while there are connections
PLEX_S = 5.0                  # for one whole answer of the server, on a LAN; also the longest way out
RETRY_MIN_S = 0.25            # from a look that failed to the next; it doubles ...
RETRY_MAX_S = 30.0            # ... up to this: as a slow look
RETRY_HEARD_S = 1.0           # ... and is no more than this when a webhook shows that the server lives
REST_S = 0.01                 # after a look: the webhooks of one moment (stop and play, doubles) share the next
FOREIGN_S = 1.0               # from another player's webhook to a look (its uuid is but a hint)

# From a look that does not bear a webhook out to the next.  Sessions lag by up to 2 s: steps of
# 0.25 s find a change that holds for 2 s only, which steps that double would miss.
RELOOK_S = (0.1, 0.15, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 1.0)

CONFIRM_S = 2.0               # from a look that bears it out to one more: sessions that lag may bear out an old one
LATE_S = 10.0                 # that a webhook may come late; 5 s were seen
BUFFERING_S = 2.0             # to the next look while a player buffers, for FROZEN_S
SILENCE_S = 30.0              # without a line from the event stream: it is broken.  It pings each 10 s
STREAM_MIN_S = 0.25           # from a stream that broke to the next try; it grows by half each time ...
STREAM_MAX_S = 60.0           # ... up to this
STREAM_RARE_S = 600.0         # where the server has none (404), or refuses the token for it (401)
PROOF_S = 10.0                # within which a change and its webhook belong together; webhooks up to 5 s late were seen
PROOF_MISSES = 3              # in a row make a warning: one alone may have been lost, or never sent
MAX_EARLY = 20                # webhooks that are kept for changes not seen yet
MAX_GUIDS = 16                # read of an item; Plex sends 3
MAX_CANDIDATES = 5            # shows that a person is asked about
MAX_SIMILAR = 20              # ... or compared with
MAX_POSTINGS = 60_000         # of the trigrams' index, that are read for them: 5 ms
MAX_PAGE = 8 * 2**20          # bytes of a page of the library: up to 40 kB an item, 5 to 10 are usual
PAGE = 200                    # items of a page
BATCH = 200                   # rows that are held, or deleted in one transaction: some milliseconds
MAX_ITEMS = 2_000_000         # of a library, or of the history
MAX_NUMBER = 100_000          # of a season or an episode; seasons can be years, a soap has 10,000 episodes
MAX_ADDRESSES = 1000          # whose webhooks are counted; the one silent longest goes
MAX_ATTEMPTS = 30             # to finish an entry of the journal: they take a day
ROW_MIN_S = 30.0              # from the first of them to the next; it doubles ...
ROW_MAX_S = 3600.0            # ... up to this
DUPLICATE_S = 300.0           # between two scrobbles of an item that are one; the contract's
HISTORY_S = 3600.0            # between two looks into the server's history
HISTORY_REST_S = 60.0         # that a webhook may come later than its play is in there
HISTORY_RETRY_S = 60.0        # ... after one at a server that is down
SAME_PLAY_S = 6 * 3600.0      # between a webhook and its play in there: the play may be dated to its end, after a pause
FOUND_NOTHING_S = 86400.0     # that TMDB's "nothing" is believed
DATABASE_S = 5.0              # to wait for another process that writes into the tracker
TRACKER_RETRY_S = 30.0        # from a tracker that cannot go on (full disk) to the next try
IMPORT_S = 60.0               # for a page of an import: a small NAS takes seconds for 500 items

FROZEN_S = 41.0               # a playing view_offset that stands still for three renewals of 10 to 15 s; a prime, so
                              # that a short track on repeat is not seen at one place by each slow look

MAX_STREAMS = 16              # listeners of /events at once; each holds a thread
MAX_UNREAD = 20               # events that one may have left unread; then it is dropped
EVENT_ALIVE_S = 15.0          # between two comments that keep it alive
MAX_RECENT = 10               # changes on the page
MAX_COVER = 4 * 2**20         # bytes of a picture from the server
MAX_OUTPUT = 4096             # bytes of a hook's output that are read
MAX_LOGS = 256 * 2**20        # bytes of the server's logs, which doctor reads, packed ...
MAX_LOG_LINES = 500_000       # ... and lines of them
HOOK_S = 30.0                 # for a hook; an amplifier takes one
HOOK_GRACE_S = 2.0            # from SIGTERM to SIGKILL
STALL_S = 15.0                # that the main loop may be busy: a look takes PLEX_S, and the resolver its time
UNHEALTHY_S = 300.0           # of an outage, or a webhook that waits; the contract's
CLOCK_S = 60.0                # that two clocks may differ
WATCH_REST_S = 0.25           # between two looks of `doctor -watch`
WARN_AGAIN_S = 60.0           # between two equal warnings that strangers can cause


class Config(NamedTuple):
    """What the flags say, checked; made by parse_config()."""
    command: str = "run"           # run, players, doctor, tracker, secret, hook, demo
    words: tuple[str, ...] = ()    # after the command: HOST:PORT for players, a command for tracker, an event for hook
    webhooks_host: str = ""        # address to listen on; "": all, IPv4 and IPv6
    webhooks_port: int = 3001      # 0: a free one (demo and tests)
    webhook_secret_file: str = ""  # path; "": webhooks need no secret
    rate_limit: int | None = None  # webhooks a minute from one address; 0: no limit; None: as it is safe
    plex_server_url: str = ""      # no slash at its end; "": webhooks alone
    plex_token_file: str = ""      # path
    plex_ca_file: str = ""         # path of a CA bundle; "": the system's
    plex_machine_id: str = ""      # Plex's machineIdentifier of the player
    poll_interval_s: float = 30.0  # between slow looks; 0: none
    plex_events: bool = True       # open the server's event stream
    on_event: str = ""             # command to run on each change
    active_timeout_s: float = 10.0  # from the last playing to the hook's `inactive`
    tracker_db: str = ""           # path of the watch tracker's database; "": no tracker
    tracker_log_days: int = 90     # that finished rows are kept; 0: for ever
    auto_mark_watched: bool = True  # False: find the show, mark nothing
    auto_add_shows: bool = False   # add a show of certain identity that the tracker lacks
    accounts: str = ""             # titles or ids, separated by commas; "*": all; "": the webhook's owner
    tmdb_token_file: str = ""      # path
    log_level: str = "info"        # error, warn, info, debug
    log_format: str = "text"       # text, json
    json: bool = False             # players, tracker: print JSON
    status: str = ""               # tracker log: only such rows; "": all
    show: str = ""                 # tracker log: only this show's, by id or words; "": all
    last: int = 20                 # tracker log: rows at most
    watch_s: float = 0.0           # doctor: how long to watch the witnesses
    speed: float = 1.0             # demo: times faster

    @property
    def webhooks_a_minute(self) -> int:
        """From one address; 0: no limit."""
        if self.rate_limit is not None:
            return self.rate_limit
        return 100 if self.webhook_secret_file or self.tracker_db else 0


# === Errors: by whose fault ===

class ConfigError(Exception):
    """The operator's fault: one sentence that names the flag and the remedy."""


class WebhookError(Exception):
    """The sender's fault: the HTTP status (4xx; 503 when too much waits) and a sentence for the body.

    retry_s: after which it may be tried again (429, 503).
    """

    def __init__(self, status: int, sentence: str, retry_s: int = 5):
        super().__init__(sentence)
        self.status, self.retry_s = status, retry_s


class PlexError(Exception):
    """The server's or the network's fault, as a sentence.

    fault: "unreachable" (nothing answers), "starting" (503), "refused" (401: the token),
    "forbidden" (403: another user's token), "missing" (404) or "nonsense" (an answer that is not Plex's).
    """

    def __init__(self, fault: str, sentence: str):
        super().__init__(sentence)
        self.fault = fault


class TrackerError(Exception):
    """The disk's or the database's fault, as a sentence."""


# === Items: Plex's attributes -> Item (parse_item) ===
# JSON metadata and XML attributes have the same names; in XML each value is a string, in
# JSON a number may be one.  Whatever else comes counts as missing: nothing here raises.

def text(value: object, most: int = MAX_TEXT) -> str:
    """A foreign value as bounded text; "" for what is no text.  Half surrogates, which JSON can hold, become "?"."""
    if isinstance(value, str):
        value = value[:most]
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else ""


def number(value: object) -> int | None:
    """A foreign value as an int from 0 to 2**53; None for what is no such number."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 16:
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 2**53:
        return int(value)
    return None


def mapping(value: object) -> Mapping[str, Any]:
    """A foreign value as a mapping; empty for what is none."""
    return value if isinstance(value, dict) else {}


class Item(NamedTuple):
    """What is played, as webhooks and sessions both describe it."""
    type: str = ""                # track, episode, movie, clip, photo, ...
    rating_key: str = ""          # the server's id; hex for video on demand, "" for live TV
    guid: str = ""                # plex://track/..., com.plexapp.agents..., local://...
    title: str = ""
    parent_title: str = ""        # the album or season
    grandparent_title: str = ""   # the album's artist ("Various Artists") or the show
    original_title: str = ""      # the track's own artist, where it differs
    parent_index: int | None = None   # season; None: not said
    index: int | None = None      # type: ignore[assignment]  # episode or track; None: not said (tuple has one, too)
    duration: int | None = None   # ms; None: not said
    thumb: str = ""               # path of its picture on the server; "": not said
    sample_rate: int | None = None    # Hz; None: not said (webhooks)
    bit_depth: int | None = None  # None: not said (webhooks, lossy formats)

    @property
    def identity(self) -> str:
        """What tells this item from another on the same server."""
        return self.rating_key or self.guid or self.title

    @property
    def artist(self) -> str:
        """The artist of a track."""
        return self.original_title or self.grandparent_title


def picture_path(value: object) -> str:
    """The path of a picture in the server's library; "" for anything else: no token must go there, nothing be begun."""
    path = text(value)
    return path if re.fullmatch(r"/library/metadata/\w+/(thumb|art|poster)(/\w+)?", path, re.ASCII) else ""


def parse_item(attributes: Mapping[str, Any]) -> Item:
    """The Item of Plex's attributes (JSON Metadata, or an XML element's)."""
    return Item(type=text(attributes.get("type")), rating_key=text(attributes.get("ratingKey")),
                guid=text(attributes.get("guid")), title=text(attributes.get("title")),
                parent_title=text(attributes.get("parentTitle")),
                grandparent_title=text(attributes.get("grandparentTitle")),
                original_title=text(attributes.get("originalTitle")),
                parent_index=number(attributes.get("parentIndex")), index=number(attributes.get("index")),
                duration=number(attributes.get("duration")), thumb=picture_path(attributes.get("thumb")))


# === Webhook: bytes -> Webhook (parse_webhook) ===

class Scrobble(NamedTuple):
    """What a finished episode or movie tells besides its Item."""
    show_key: str = ""            # grandparentRatingKey: the show on its server; "": not said
    show_guid: str = ""           # grandparentGuid; "": not said (legacy agents)
    guids: tuple[str, ...] = ()   # the item's own in other databases: imdb://, tmdb://, tvdb://
    year: int | None = None       # of the episode, its season or the movie; None: not said


def item_guids(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids in Plex's `Guid`, a list of {"id": "tmdb://1396"}."""
    found = attributes.get("Guid")
    return tuple(text(mapping(each).get("id")) for each in (found[:MAX_GUIDS] if isinstance(found, list) else ()))


def parse_scrobble(attributes: Mapping[str, Any]) -> Scrobble:
    """The Scrobble of Plex's attributes (JSON Metadata)."""
    return Scrobble(text(attributes.get("grandparentRatingKey")), text(attributes.get("grandparentGuid")),
                    item_guids(attributes), number(attributes.get("year")))


class Webhook(NamedTuple):
    """One webhook of Plex Media Server."""
    event: str                    # media.play, library.new, ...; unknown ones will come
    player_uuid: str = ""         # very probably the player's machineIdentifier; "": of no player
    player_title: str = ""
    item: Item | None = None      # None: not said
    view_offset: int | None = None  # ms; None: not said (mostly)
    server: str = ""              # Server.uuid: its machineIdentifier; "": not said
    account_id: str = ""          # Account.id: the server's, or plex.tv's; the owner's is not always 1
    account: str = ""             # Account.title: a name, or an e-mail address
    user: bool = False            # the account whose webhook it is did it
    scrobble: Scrobble | None = None      # of a media.scrobble


def encode_webhook(payload: bytes, thumb: bytes = b"") -> tuple[str, bytes]:
    """Content-Type and body of a webhook in the form in which Plex sends it."""
    boundary = "-" * 24 + "Ag1hQ8fKx0PzJm3Wc5Ys7T"
    part = b"--%b\r\nContent-Disposition: form-data; name=%b\r\nContent-Type: %b\r\n\r\n%b\r\n"
    parts = [(b'"payload"', b"application/json", payload)]
    if thumb:
        parts.append((b'"thumb"; filename="thumb.jpg"', b"image/jpeg", thumb))
    body = b"".join(part % (boundary.encode(), *fields) for fields in parts) + b"--%b--\r\n" % boundary.encode()
    return f"multipart/form-data; boundary={boundary}", body


Body = bytes | bytearray | mmap.mmap      # of a request: small, in chunks, large
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


def parameter(message: email.message.Message, name: str, header: str) -> str:
    """A parameter of a header; "" where there is none.  Plex's are plain: none is continued or has a charset."""
    try:
        value = message.get_param(name, "", header)
    except (ValueError, TypeError, LookupError):      # email.message's, on RFC 2231 forms that make no sense
        return ""
    return value if isinstance(value, str) else ""


@functools.lru_cache(maxsize=16)        # Plex sends the same two headers for ever
def part_name(header: bytes) -> str:
    """The name that a part's header gives it; "": none."""
    return parameter(email.parser.BytesHeaderParser().parsebytes(header), "name", "Content-Disposition")


def delimiters(body: Body, delimiter: bytes) -> Iterator[tuple[int, int]]:
    """Where each line `delimiter` of a body begins (its line break included) and what follows begins.

    Raises WebhookError unless the closing delimiter comes, too.
    """
    end = 0
    for _ in range(MAX_PARTS + 1):
        start = body.find(delimiter, end)
        if start < 0:
            raise WebhookError(400, "The body is cut short: its closing boundary is missing.")
        end = start + len(delimiter)
        if start and body[start - 1] != 0x0A:                               # only within a line: no delimiter
            continue
        yield start - (2 if body[start - 2:start] == b"\r\n" else 1), body.find(b"\n", end) + 1
        if body[end:end + 2] == b"--":
            return
    raise WebhookError(400, f"The body has more than {MAX_PARTS} parts.")


def parse_multipart(boundary: str, body: Body) -> dict[str, memoryview]:
    """The parts of a multipart body that are named payload and thumb, the first of each name.

    email.parser reads each part's header.  The body is cut at its delimiters here: as a
    whole it costs the parser 1.8 ms and 6 times its size for a picture of 100 kB.
    """
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():              # RFC 2046, 5.1.1
        raise WebhookError(400, "The Content-Type names no valid boundary of the parts.")
    parts: dict[str, memoryview] = {}
    starts = list(delimiters(body, b"--" + boundary.encode("ascii")))
    for (_, start), (stop, _) in itertools.pairwise(starts):
        blank = _BLANK_LINE.search(body, start - 2, min(stop, start + MAX_PART_HEADER))
        if blank is None:
            raise WebhookError(400, "A part of the body has no end of its header.")
        name = part_name(bytes(body[start:blank.start()]))
        if name in ("payload", "thumb"):
            parts.setdefault(name, memoryview(body)[blank.end():stop])
    return parts


def parse_payload(payload: bytes) -> Webhook:
    """The Webhook of its JSON, which is UTF-8 whatever its part says."""
    if len(payload) > MAX_PAYLOAD:
        raise WebhookError(413, f"The payload is larger than {MAX_PAYLOAD} bytes.")
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise WebhookError(400, "The payload is not JSON.") from error
    event = mapping(fields).get("event")
    if not isinstance(event, str) or not event:
        raise WebhookError(400, "The payload is not a Plex webhook: it names no event.")
    player, metadata = mapping(fields.get("Player")), mapping(fields.get("Metadata"))
    account = mapping(fields.get("Account"))
    return Webhook(event=text(event), player_uuid=text(player.get("uuid")), player_title=text(player.get("title")),
                   item=parse_item(metadata) if metadata else None,
                   view_offset=number(metadata.get("viewOffset")),
                   server=text(mapping(fields.get("Server")).get("uuid")),
                   account_id=text(account.get("id")), account=text(account.get("title")),
                   user=fields.get("user") is True,
                   scrobble=parse_scrobble(metadata) if event == "media.scrobble" else None)


def parse_webhook(content_type: str, body: Body) -> tuple[Webhook, memoryview]:
    """The Webhook in a request's body (multipart/form-data as Plex sends it, or plain JSON), and its JPEG, a view.

    Raises WebhookError 400 (not a webhook), 413 (payload too large) or 415 (another type).
    """
    if len(content_type) > MAX_CONTENT_TYPE:
        raise WebhookError(400, f"The Content-Type is longer than {MAX_CONTENT_TYPE} characters.")
    header = email.message.Message()
    header["Content-Type"] = content_type
    media_type = header.get_content_type()
    if media_type == "application/json":
        return parse_payload(bytes(body)), memoryview(b"")
    if media_type != "multipart/form-data":
        raise WebhookError(415, "A Plex webhook is multipart/form-data; this is something else.")
    parts = parse_multipart(parameter(header, "boundary", "Content-Type"), body)
    if "payload" not in parts:
        raise WebhookError(400, "The part named payload is missing, which holds a webhook's JSON.")
    return parse_payload(bytes(parts["payload"])), parts.get("thumb", memoryview(b""))


# === Sessions: XML -> (Session, ...) (parse_sessions) ===

PLAYING, PAUSED, STOPPED, BUFFERING = "playing", "paused", "stopped", "buffering"

# Products whose view_offset stands still while they play: a capture of Plex for Sonos shows it.
FREEZING_PRODUCTS = frozenset({"Plex for Sonos"})


class Session(NamedTuple):
    """One item that a player has now, from /status/sessions."""
    session_key: str              # the server's number; it lasts over track changes
    machine_identifier: str       # of the player
    state: str                    # PLAYING, PAUSED or BUFFERING; an unknown word counts as BUFFERING
    item: Item
    view_offset: int | None       # ms, renewed every 10 to 15 s; None: not said (at the start, live TV)
    player_title: str
    product: str                  # Plexamp, Plex Web, Plex for Sonos, ...
    platform: str                 # Linux, iOS, ...
    user: str                     # the user's name; "": not said (a local player)

    @property
    def key(self) -> tuple[str, str]:
        """What tells this play from another of the same player."""
        return self.session_key, self.item.identity

    @property
    def can_freeze(self) -> bool:
        """Whether it claims to play, and so its view_offset should move."""
        return self.state == PLAYING and self.view_offset is not None and self.product not in FREEZING_PRODUCTS


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE before its entities can grow: Plex never sends one."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise PlexError("nonsense", "The server's answer has a DOCTYPE, which Plex never sends.")


# Forbidden in XML 1.0, and yet in Plex's titles: as characters and as references.
_CONTROLS = dict.fromkeys((*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0xFFFE, 0xFFFF))

_REFERENCES = re.compile(r"&#(?:0*(?:[0-8]|11|12|1[4-9]|2\d|3[01])|x0*(?:[0-8bBcCeEfF]|1[0-9a-fA-F]|[fF]{3}[eEfF]));")


def parse_session_item(element: ElementTree.Element) -> Item:
    """The Item of a session, with what its audio stream tells."""
    item = parse_item(element.attrib)
    audio = element.find("Media/Part/Stream[@streamType='2']")
    return item if audio is None else item._replace(sample_rate=number(audio.get("samplingRate")),
                                              bit_depth=number(audio.get("bitDepth")))


def parse_session(element: ElementTree.Element) -> Session | None:
    """The Session of a Track, Video, Photo or other element; None where no player has it."""
    player, user = element.find("Player"), element.find("User")
    if player is None or not player.get("machineIdentifier") or player.get("state") == STOPPED:
        return None
    state = player.get("state")
    return Session(session_key=text(element.get("sessionKey")),
                   machine_identifier=text(player.get("machineIdentifier")),
                   state=state if state in (PLAYING, PAUSED) else BUFFERING,
                   item=parse_session_item(element), view_offset=number(element.get("viewOffset")),
                   player_title=text(player.get("title")), product=text(player.get("product")),
                   platform=text(player.get("platform")), user=text(user.get("title")) if user is not None else "")


def parse_xml(xml: bytes) -> ElementTree.Element:
    """The MediaContainer of an answer; raises PlexError where it is none."""
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(_REFERENCES.sub("", xml.decode("utf-8", "replace").translate(_CONTROLS)))
        root = parser.close()
    except ElementTree.ParseError as error:
        raise PlexError("nonsense", "The server's answer is not XML, or is cut short. "
                        "Does -plex-server-url point to Plex Media Server?") from error
    if root.tag != "MediaContainer":
        raise PlexError("nonsense", "The server's answer is XML, but no list of sessions. "
                        "Does -plex-server-url point to Plex Media Server?")
    return root


def parse_sessions(xml: bytes) -> tuple[Session, ...]:
    """The sessions in an answer of /status/sessions; raises PlexError where it is no such answer."""
    return tuple(session for element in parse_xml(xml) if (session := parse_session(element)))


def find_session(sessions: Sequence[Session]) -> Session | None:
    """Which of one player's sessions is what it does: the playing one, not the photo, the newest."""
    def rank(session: Session) -> tuple[bool, bool, int]:
        return session.state != PAUSED, session.item.type != "photo", number(session.session_key) or 0
    return max(sessions, key=rank, default=None)


# === Library: JSON or XML -> items (parse_container) ===

def parse_container(body: bytes) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The attributes of a MediaContainer and of each item in it, as JSON names them; raises PlexError.

    We ask for JSON; older servers, and some paths, answer in XML all the same.
    """
    if (body := body.lstrip())[:1] == b"<":
        root = parse_xml(body)
        return root.attrib, [each.attrib | {"Guid": [guid.attrib for guid in each.findall("Guid")]} for each in root]
    try:
        container = mapping(json.loads(body)).get("MediaContainer")
    except (ValueError, RecursionError):
        container = None
    if not isinstance(container, dict):
        raise PlexError("nonsense", "The server's answer is neither JSON nor XML of Plex's, or is cut short. "
                        "Does -plex-server-url point to Plex Media Server?")
    lists = (container.get(name) for name in ("Metadata", "Directory", "Video", "Account", "Setting"))
    found = next((each for each in lists if isinstance(each, list)), [])
    return container, [each for each in found if isinstance(each, dict)]


# === Notifications: stream lines -> (Notification, ...) (read_events, parse_notifications) ===

class Notification(NamedTuple):
    """One `playing` event of the server's event stream: at each change, and about every 10 s while it plays."""
    state: str                    # PLAYING, PAUSED, STOPPED or BUFFERING
    session_key: str              # as in Session
    client_identifier: str        # the player's machineIdentifier; "": not said (older servers)
    rating_key: str               # as in Item
    view_offset: int | None       # ms; None: not said


def read_events(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The (event, data) of each server-sent event in a stream's lines; comments and other fields are passed over."""
    event, data = "", b""
    for line in lines:
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if field == b"event":
            event = value.strip().decode("utf-8", "replace")
        elif field == b"data" and len(data) <= MAX_EVENT:
            data += value
        elif not field and not value:
            if data:
                yield event, data
            event, data = "", b""


def parse_notifications(data: bytes) -> tuple[Notification, ...]:
    """The notifications in an event's data: one, or a list, perhaps in a container.  Of any other shape: none."""
    try:
        fields = mapping(json.loads(data))
    except (ValueError, RecursionError):
        return ()
    found = mapping(fields.get("NotificationContainer", fields)).get("PlaySessionStateNotification")
    each = [mapping(one) for one in (found if isinstance(found, list) else [found])]
    return tuple(Notification(state=one["state"], session_key=text(one.get("sessionKey")),
                              client_identifier=text(one.get("clientIdentifier")),
                              rating_key=text(one.get("ratingKey")), view_offset=number(one.get("viewOffset")))
                 for one in each if one.get("state") in (PLAYING, PAUSED, STOPPED, BUFFERING))


# === Player: Observation -> PlayerState, reports (advance) ===
# All that decides what is reported lives here.  Webhooks and notifications are reasons to
# look, and claims that a look should bear out; the sessions decide.  Where there is no server
# to ask, the webhooks decide.  A look that shows what is known changes nothing.

# (what is believed, what a witness says) -> what is believed then; None: wait for what comes of it.
# BUFFERING is a start, a seek, a skip, or a word that we do not know.
TRANSITIONS = {
    (STOPPED, STOPPED): STOPPED, (STOPPED, PLAYING): PLAYING, (STOPPED, PAUSED): PAUSED, (STOPPED, BUFFERING): PLAYING,
    (PLAYING, STOPPED): STOPPED, (PLAYING, PLAYING): PLAYING, (PLAYING, PAUSED): PAUSED, (PLAYING, BUFFERING): PLAYING,
    (PAUSED, STOPPED): STOPPED, (PAUSED, PLAYING): PLAYING, (PAUSED, PAUSED): PAUSED, (PAUSED, BUFFERING): None,
}

# What an event claims of its player's state; all others claim nothing.
CLAIMS = {"media.play": PLAYING, "media.resume": PLAYING, "playback.started": PLAYING,
          "media.pause": PAUSED, "media.stop": STOPPED}


class Look(NamedTuple):
    """What /status/sessions showed, of all players."""
    sessions: tuple[Session, ...]


class Outage(NamedTuple):
    """A look that failed."""
    fault: str                    # as in PlexError
    sentence: str                 # as in PlexError


class Stream(NamedTuple):
    """The event stream opened, broke after it was open, or could not be opened."""
    event: str                    # opened, broke or failed
    fault: str = ""               # as in PlexError; "": opened
    sentence: str = ""            # as in PlexError


Observation = Webhook | Look | Outage | Notification | Stream


class Recovery(NamedTuple):
    """The server answers again."""
    after_s: float                # since the first look that failed


class Claim(NamedTuple):
    """What a webhook or a notification says, until the sessions bear it out or time is up."""
    state: str                    # PLAYING, PAUSED or STOPPED
    identity: str                 # Item.identity; "": not said
    by: str                       # webhook or events

    def met_by(self, state: str, item: Item | None) -> bool:
        """Whether this is so, or was so and is over (an item that stopped, and another plays)."""
        same = item is None or self.identity in ("", item.identity)
        return state == STOPPED or not same if self.state == STOPPED else state == self.state and same


class Trace(NamedTuple):
    """What is remembered of a session from look to look."""
    session: Session              # as the last look showed it
    since: float                  # when this state at this view_offset was first seen
    stale: bool = False           # it stood still beside the one that was chosen: left over, until it moves


class Expected(NamedTuple):
    """A change whose webhook has not come yet, or a webhook whose change has not been seen yet."""
    state: str                    # PLAYING, PAUSED or STOPPED
    identity: str                 # Item.identity; "": not said
    at: float                     # when it was seen

    def matches(self, other: Expected) -> bool:
        """Whether both are of one moment of the player."""
        return self.state == other.state and (self.identity == other.identity or "" in (self.identity, other.identity))


class Proof(NamedTuple):
    """Whether webhooks arrive, as far as the other witnesses can tell."""
    armed: bool = False           # the first look is over: what it showed had begun before us
    changes: tuple[Expected, ...] = ()    # without their webhook so far
    webhooks: tuple[Expected, ...] = ()   # without their change so far
    arrived: int = 0
    missed: int = 0
    in_a_row: int = 0             # missed since the last that arrived
    delays_s: tuple[float, ...] = ()      # of the last that arrived, from the change to its webhook; 0: it came first

    @property
    def median_delay_s(self) -> float | None:
        """Of the last that arrived; None: none has."""
        return sorted(self.delays_s)[len(self.delays_s) // 2] if self.delays_s else None


class PlayerState(NamedTuple):
    """What is known of one player."""
    machine_identifier: str
    has_server: bool              # its sessions can be asked
    poll_interval_s: float = 0.0  # between slow looks; 0: none
    state: str = STOPPED          # as reported last
    item: Item | None = None      # what plays, or played last; None: nothing yet
    previous: str = ""            # Item.identity of what played before it
    player_title: str = ""
    view_offset: int = 0          # ms; 0: not said
    moved_at: float = 0.0         # when view_offset was first seen
    changed_at: float = -math.inf  # when state or item changed last
    heard_at: float = -math.inf   # when the player gave a sign of life, but for its sessions
    claim: Claim | None = None    # what a webhook says, and the sessions do not yet
    looks: int = 0                # in vain so far: for the claim, or in the outage
    look_at: float | None = None  # when to look next; None: not before something is heard
    look_why: str = "sessions"    # "poll": that is a slow look; "sessions": something made it so
    proof: Proof = Proof()
    traces: tuple[Trace, ...] = ()
    foreign_keys: frozenset[str] = frozenset()    # Session.session_key of the other players, at the last look
    outage: Outage | None = None  # None: the last look went well
    outage_at: float = 0.0        # when it began

    def plays(self, identity: str) -> bool:
        """Whether that is the item that plays, or played last."""
        return self.item is not None and self.item.identity == identity


def clamp(view_offset: int, item: Item | None) -> int:
    """A position that is not beyond the item's end; ms."""
    return min(view_offset, item.duration) if item and item.duration else view_offset


def position_ms(player: PlayerState, at: float) -> int:
    """Where the player is in its item now, as far as that is known; ms."""
    ran_on = int((at - player.moved_at) * 1000) if player.state == PLAYING else 0
    return clamp(player.view_offset + ran_on, player.item)


class Change(NamedTuple):
    """One change of the player, as it is reported."""
    state: str                    # PLAYING, PAUSED or STOPPED
    old_state: str                # before it
    item: Item                    # what it plays; what played last when STOPPED
    position_ms: int              # as Plex last said it, run on to now when STOPPED; 0: not said
    player_title: str
    machine_identifier: str
    by: str                       # why it is believed: webhook, events, sessions, poll or silence
    reason: str = ""              # "frozen": the session is there, but stands still; "": as the state says


class WebhooksMissing(NamedTuple):
    """Changes go by without the webhooks that Plex documents for them."""
    in_a_row: int


class WebhooksBack(NamedTuple):
    """Webhooks come again."""
    missed: int                   # in a row, before


Report = Change | Outage | Recovery | WebhooksMissing | WebhooksBack
Verdict = tuple[PlayerState, tuple[Report, ...]]      # the player after an observation, and what is to be reported


def look_no_later(player: PlayerState, at: float) -> PlayerState:
    """The player, to be looked at by then."""
    if player.look_at is not None and player.look_at <= at:
        return player
    return player._replace(look_at=at, look_why="sessions")


def become(player: PlayerState, witnessed: str, item: Item | None, view_offset: int | None, moved_at: float, at: float,
           player_title: str, by: str, reason: str = "") -> Verdict:
    """A witness is believed: the change, if it is one.  view_offset None: not said."""
    state = TRANSITIONS[player.state, witnessed]
    if item is None or state is None:
        return player, ()
    same = player.plays(item.identity)
    old_state, changed = player.state, state != player.state or (state != STOPPED and not same)
    if view_offset is None:
        view_offset, moved_at = position_ms(player, at) if same else 0, at
    player = player._replace(state=state, item=item, view_offset=clamp(view_offset, item), moved_at=moved_at,
                     changed_at=at if changed else player.changed_at,
                     previous=player.previous if same or not player.item else player.item.identity,
                     player_title=player_title or player.player_title)
    change = Change(state, old_state, item, player.view_offset, player.player_title, player.machine_identifier, by,
                    reason)
    return player, (change,) if changed else ()


def after_testimony(player: PlayerState, webhook: Webhook, at: float) -> Verdict:
    """Where webhooks are the only witness: what they say is so, unless they are of what has just been left."""
    claimed, item = CLAIMS.get(webhook.event), webhook.item or player.item
    if claimed is None or item is None or webhook.player_uuid != player.machine_identifier:
        return player, ()
    left = item.identity == player.previous or (player.state == STOPPED and player.plays(item.identity))
    if left and webhook.event != "media.play" and at < player.changed_at + LATE_S:
        return player, ()
    return become(player, claimed, item, webhook.view_offset, at, at, webhook.player_title, "webhook")


def after_webhook(player: PlayerState, webhook: Webhook, at: float) -> Verdict:
    """A webhook of a player is a reason to look: at once if of ours, soon if of another."""
    if not webhook.player_uuid:
        return player, ()
    ours = webhook.player_uuid == player.machine_identifier
    if ours and CLAIMS.get(webhook.event) == PLAYING:
        player = player._replace(heard_at=at)
    if ours and webhook.event in CLAIMS:
        claim = Claim(CLAIMS[webhook.event], webhook.item.identity if webhook.item else "", "webhook")
        player = player._replace(claim=claim, looks=player.looks if player.outage else 0)
    wait_s = RETRY_HEARD_S if player.outage else 0.0 if ours else FOREIGN_S
    return look_no_later(player, at + wait_s), ()


def after_notification(player: PlayerState, notification: Notification, at: float) -> Verdict:
    """A notification that says what is known is a sign of life; any other is a claim, and a reason to look at once."""
    if notification.client_identifier not in ("", player.machine_identifier):
        return player, ()
    if not notification.client_identifier:
        if notification.session_key in player.foreign_keys:
            return player, ()
        if notification.session_key not in {trace.session.session_key for trace in player.traces}:
            return look_no_later(player, at + FOREIGN_S), ()            # whose it is, the sessions know
    if notification.state in (PLAYING, BUFFERING):
        player = player._replace(heard_at=at)
    unnamed = player.item is not None and "" in (notification.rating_key, player.item.rating_key)      # live TV
    same, state = unnamed or player.plays(notification.rating_key), TRANSITIONS[player.state, notification.state]
    if state in (player.state, None) and (same or state == STOPPED):
        if same and notification.view_offset is not None:
            player = player._replace(view_offset=clamp(notification.view_offset, player.item), moved_at=at)
        return player, ()
    disputed = player.claim is not None and player.claim.by == "events"   # the next look is due, soon enough
    claim = Claim(state or PAUSED, notification.rating_key, "events")
    player = player._replace(claim=claim, looks=player.looks if player.outage else 0)
    if disputed and player.look_at is not None:
        return player, ()
    return look_no_later(player, at + (RETRY_HEARD_S if player.outage else 0.0)), ()


def after_stream(player: PlayerState, stream: Stream, at: float) -> Verdict:
    """Changes may have gone by while the stream was away, or in the event in which it broke."""
    return (player if stream.event == "failed" or player.outage else look_no_later(player, at)), ()


def follow(trace: Trace | None, session: Session, at: float) -> Trace:
    """A session's trace with what this look shows of it."""
    before = trace and (trace.session.state, trace.session.view_offset)
    if trace and before == (session.state, session.view_offset):
        return trace._replace(session=session)
    return Trace(session, at)


def frozen(trace: Trace, heard_at: float, at: float) -> bool:
    """Whether a session claims to play, and nothing has moved for too long."""
    return trace.session.can_freeze and at - max(trace.since, heard_at) >= FROZEN_S


def outlast(trace: Trace, chosen: Session | None, at: float) -> Trace:
    """A session's trace after the choice: one that stands still beside the chosen one is stale.

    It was left by a player that crashed or was restarted, and must not come back when the
    chosen one ends.  A photo is no such rival: it plays over a paused track.
    """
    if chosen is None or trace.session is chosen or chosen.item.type == "photo":
        return trace
    still = trace.session.state == PAUSED or (trace.session.can_freeze and trace.since < at)
    return trace._replace(stale=True) if still else trace


def schedule(player: PlayerState, chosen: Trace | None, at: float) -> PlayerState:
    """When to look again after a look that went well."""
    claim, met = player.claim, player.claim is None or player.claim.met_by(player.state, player.item)
    if not met and player.looks < len(RELOOK_S):
        return player._replace(look_at=at + RELOOK_S[player.looks], look_why="sessions", looks=player.looks + 1)
    slow = at + player.poll_interval_s if player.poll_interval_s else None
    player = player._replace(claim=None, looks=0, look_at=slow, look_why="poll")
    if claim and met:
        player = look_no_later(player, at + CONFIRM_S)
    if slow and chosen and chosen.session.can_freeze and chosen.since < at:
        player = look_no_later(player, max(chosen.since, player.heard_at) + FROZEN_S)
    if chosen and chosen.session.state == BUFFERING and at - chosen.since < FROZEN_S:
        player = look_no_later(player, at + BUFFERING_S)
    return player


def after_look(player: PlayerState, look: Look, at: float) -> Verdict:
    """The sessions decide, but for ghosts among them; a claim that they do not bear out asks for another look."""
    reports: tuple[Report, ...] = ()
    if player.outage:
        reports = (Recovery(at - player.outage_at),)
        player = player._replace(outage=None, looks=0)
    known = {trace.session.key: trace for trace in player.traces}
    traces = [follow(known.get(session.key), session, at)
              for session in look.sessions if session.machine_identifier == player.machine_identifier]
    dead = [trace for trace in traces if frozen(trace, player.heard_at, at)]
    session = find_session([trace.session for trace in traces if not trace.stale and trace not in dead])
    chosen = next((trace for trace in traces if trace.session is session), None)
    claim, by = player.claim, player.look_why
    if chosen and session:
        state = session.state
        if state == BUFFERING and claim and claim.state == PLAYING and claim.met_by(PLAYING, session.item):
            state = PLAYING                           # two witnesses: it will play
        by = claim.by if claim and claim.met_by(state, session.item) else by
        player, changes = become(player, state, session.item, session.view_offset, chosen.since, at,
                                 session.player_title, by)
    elif player.item and any(player.plays(trace.session.item.identity) for trace in dead):
        player, changes = become(player, STOPPED, player.item, player.view_offset, at, at, "", "silence", "frozen")
    else:
        by = claim.by if claim and claim.state == STOPPED else by
        player, changes = become(player, STOPPED, player.item, None, at, at, "", by)
    keys = frozenset(each.session_key for each in look.sessions if each.machine_identifier != player.machine_identifier)
    player = player._replace(foreign_keys=keys, traces=tuple(outlast(trace, session, at) for trace in traces))
    return schedule(player, chosen, at), reports + changes


def after_outage(player: PlayerState, outage: Outage, at: float) -> Verdict:
    """A look that failed changes nothing that is believed; look again, less and less often."""
    looks = player.looks + 1 if player.outage else 1
    wait_s = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(looks - 1, 10))
    news = () if player.outage and player.outage.fault == outage.fault else (outage,)
    since = player.outage_at if player.outage else at
    return player._replace(outage=outage, outage_at=since, looks=looks, look_at=at + wait_s), news


def documented(change: Change, before: PlayerState) -> bool:
    """Whether Plex documents a webhook for a change: start, pause, resume and stop; not a skip within the queue,
    nor a ghost that was taken for stopped and comes back."""
    same = before.plays(change.item.identity)
    left = any(before.plays(trace.session.item.identity) for trace in before.traces)
    back = same and left and change.old_state == STOPPED
    skip = not same and change.state == PLAYING and change.old_state != STOPPED
    return not (change.reason or back or skip or change.state == change.old_state)


def prove(before: PlayerState, player: PlayerState, observation: Observation, reports: tuple[Report, ...],
          at: float) -> Verdict:
    """The proof that webhooks arrive: each documented change belongs to a webhook, whichever comes first."""
    proof = player.proof
    changes = [each for each in proof.changes if at - each.at < PROOF_S]
    webhooks = [each for each in proof.webhooks if at - each.at < PROOF_S]
    missed, delays_s = len(proof.changes) - len(changes), []
    if isinstance(observation, Webhook) and observation.event in CLAIMS:
        webhook = Expected(CLAIMS[observation.event], observation.item.identity if observation.item else "", at)
        if met := next((each for each in changes if each.matches(webhook)), None):
            changes.remove(met)
            delays_s.append(at - met.at)
        else:
            webhooks.append(webhook)
    just_back = not proof.armed or any(isinstance(report, Recovery) for report in reports)
    for change in reports:
        if isinstance(change, Change) and not just_back and documented(change, before):
            seen = Expected(change.state, change.item.identity, at)
            if any(each.matches(seen) for each in webhooks):
                webhooks = [each for each in webhooks if not each.matches(seen)]
                delays_s.append(0.0)
            else:
                changes.append(seen)
    in_a_row = 0 if delays_s else proof.in_a_row + missed
    news: tuple[Report, ...] = ()
    if proof.in_a_row < PROOF_MISSES <= in_a_row:
        news = (WebhooksMissing(in_a_row),)
    elif delays_s and proof.in_a_row >= PROOF_MISSES:
        news = (WebhooksBack(proof.in_a_row),)
    proof = Proof(proof.armed or isinstance(observation, Look), tuple(changes), tuple(webhooks[-MAX_EARLY:]),
                  proof.arrived + len(delays_s), proof.missed + missed, in_a_row,
                  (*proof.delays_s, *delays_s)[-MAX_EARLY:])
    return player._replace(proof=proof), news


def advance(player: PlayerState, observation: Observation, at: float) -> Verdict:
    """The judge: the player after an observation, and what is to be reported, in order.

    The state's look_at says when to look (again); observations come in the order of `at`.
    """
    before = player
    match observation:
        case Webhook() if not player.has_server:
            return after_testimony(player, observation, at)
        case Webhook():
            player, reports = after_webhook(player, observation, at)
        case Notification():
            player, reports = after_notification(player, observation, at)
        case Stream():
            player, reports = after_stream(player, observation, at)
        case Look():
            player, reports = after_look(player, observation, at)
        case Outage():
            player, reports = after_outage(player, observation, at)
    player, news = prove(before, player, observation, reports, at)
    return player, reports + news


# === Rates: how often somebody may send (spend) ===

def spend(tokens: float, since_s: float, a_minute: int) -> tuple[float, float]:
    """What is left of an address's tokens (a minute's worth at most) after one webhook, and how long to wait for one.

    since_s: since its tokens were so many.  A wait of 0: it may pass.
    """
    tokens = min(a_minute, tokens + since_s * a_minute / 60)
    return (tokens - 1, 0.0) if tokens >= 1 else (tokens, (1 - tokens) * 60 / a_minute)


# === Shows: guids, titles -> Match (parse_guid, similarity, choose_show) ===
# A mark on the wrong show is worse than a question: what is not certain becomes a conflict,
# which a person resolves.  A movie is a show of one episode, 0x0.

EPISODE, MOVIE = "episode", "movie"

# A name of a database in a guid -> our column of that id.
DATABASES = {"tmdb": "tmdb_id", "themoviedb": "tmdb_id", "tvdb": "tvdb_id", "thetvdb": "tvdb_id", "imdb": "imdb_id"}

# tmdb://1396, com.plexapp.agents.thetvdb://73244/1/1?lang=en, com.plexapp.agents.hama://tvdb2-81797/22/70
_GUID = re.compile(r"(?:com\.plexapp\.agents\.(?:hama://)?)?(thetvdb|themoviedb|tvdb|tmdb|imdb)\d?(?:://|-)"
                   r"(tt)?0*([1-9]\d{0,9})(?:/(\d{1,4})/(\d{1,4}))?(?:[/?].*)?", re.ASCII)


class Ids(NamedTuple):
    """What a show or movie is in other databases; None: not known."""
    tmdb_id: int | None = None
    tvdb_id: int | None = None
    imdb_id: str | None = None    # tt0903747

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.tmdb_id, self.tvdb_id, self.imdb_id))

    def contradicts(self, other: Ids) -> bool:
        """Whether both have an id in one database, and not the same."""
        pairs = ((self.tmdb_id, other.tmdb_id), (self.tvdb_id, other.tvdb_id), (self.imdb_id, other.imdb_id))
        return any(one is not None and two is not None and one != two for one, two in pairs)


def parse_guid(guid: str) -> tuple[str, int | str, int | None, int | None] | None:
    """A guid's column (of DATABASES), id, season and episode; None for one that names no such id.

    A legacy agent's guid of an episode carries the id of the *show*; tmdb://, tvdb:// and
    imdb:// are those of the item that has them.
    """
    found = _GUID.fullmatch(guid)
    if found is None or (found[1] == "imdb") != bool(found[2]):
        return None
    value = f"tt{found[3]:0>7}" if found[2] else int(found[3])
    return DATABASES[found[1]], value, number(found[4]), number(found[5])


def parse_ids(guids: Iterable[str]) -> Ids:
    """The ids in some guids, the first of each database."""
    found: dict[str, Any] = {}
    for parsed in map(parse_guid, guids):
        if parsed:
            found.setdefault(parsed[0], parsed[1])
    return Ids(**found)


def normal(title: str) -> str:
    """A title by which equal titles are equal, whoever typed them."""
    plain = re.sub("[\u0300-\u036f.'\u2018\u2019`*\u00b4]", "", unicodedata.normalize("NFKD", title.casefold()))
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", plain.replace("&", " and ")))
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words) or title.strip()


class Title(NamedTuple):
    """A show's title, taken apart."""
    normal: str                   # case, accents, punctuation and a leading article aside
    year: int | None              # of "(2009)"
    country: str                  # of "(US)": a code of two letters


_QUALIFIER = re.compile(r"(.*\S)\s*[(\[](\d{4}|[A-Z]{2}|USA)[)\]]\s*", re.DOTALL)
COUNTRIES = {"USA": "US", "GB": "UK"}


def parse_title(title: str) -> Title:
    """The Title of what Plex shows."""
    year, country = None, ""
    while qualified := _QUALIFIER.fullmatch(title):
        title, word = qualified[1], qualified[2]
        if word.isdigit():
            year = int(word)
        else:
            country = COUNTRIES.get(word, word)
    return Title(normal(title), year, country)


def trigrams(title: str) -> frozenset[str]:
    """The trigrams of a normal title as PostgreSQL's pg_trgm makes them: words with two blanks before, one after."""
    return frozenset(padded[i:i + 3] for word in title.split() for padded in (f"  {word} ",)
                     for i in range(len(padded) - 2))


def similarity(one: str, two: str) -> float:
    """How alike two normal titles are, 0 to 1: the share of their trigrams that both have (pg_trgm's similarity)."""
    a, b = trigrams(one), trigrams(two)
    return len(a & b) / len(a | b) if a or b else float(one == two)


class Show(NamedTuple):
    """A show or movie, in the tracker or as a server tells of it."""
    type: str                     # EPISODE: a show; MOVIE
    title: str
    year: int | None = None       # the first; None: not known
    ids: Ids = Ids()
    id: int = 0                   # the tracker's; 0: not in it
    own_year: bool = True         # False: the year may be the season's or the episode's


class Match(NamedTuple):
    """The show that is meant."""
    show_id: int                  # the tracker's; 0: one that a person chose to ignore
    by: str                       # mapping, tmdb_id, tvdb_id, imdb_id, title; new: it was added
    confidence: float             # 0 to 1


class Candidate(NamedTuple):
    """A show that may be meant."""
    show: Show
    score: float                  # 0 to 1
    year: int                     # how well the years agree: 1 within one, 0 possible, -1 not


class Conflict(NamedTuple):
    """No one show is meant for certain."""
    kind: str                     # multiple_matches, ambiguous, no_match
    candidates: tuple[Candidate, ...] = ()


CONFIDENCE = {"tmdb_id": 1.0, "tvdb_id": 0.95, "imdb_id": 0.95}      # in the order in which they are asked
TAKEN_ABOVE = 0.9                 # score of a title that is taken; the contract's
MIN_SIMILARITY = 0.5              # of a title that a person is asked about
YEAR_FITS, YEAR_LATER = 0.10, 0.05    # a show that began in that year, or before it; the contract's
_NUMBER = re.compile(r"\d+|[ivx]+|one|two|three|four|five|six|seven|eight|nine|ten")


def numbers(title: str) -> list[str]:
    """The numbers in a normal title: "part 1" is not "part 2", however alike they are."""
    return [word for word in title.split() if _NUMBER.fullmatch(word)]


def years_agree(wanted: Show, wanted_title: Title, known: Show, known_title: Title) -> int | None:
    """1: within one; 0: the show began earlier, and the year may be a season's; -1: neither; None: not known."""
    own = wanted.own_year or wanted_title.year is not None
    year, known_year = wanted_title.year or wanted.year, known_title.year or known.year
    if year is None or known_year is None:
        return None
    return 1 if abs(year - known_year) <= 1 else 0 if known_year < year and not own else -1


def candidate(wanted: Show, known: Show) -> Candidate | None:
    """A known show as what may be meant; None where it cannot be."""
    title, known_title = parse_title(wanted.title), parse_title(known.title)
    if wanted.ids.contradicts(known.ids) or (title.country and known_title.country and
                                             title.country != known_title.country):
        return None
    alike, years = similarity(title.normal, known_title.normal), years_agree(wanted, title, known, known_title)
    if alike < MIN_SIMILARITY:
        return None
    score = min(1.0, alike + {1: YEAR_FITS, 0: YEAR_LATER}.get(-1 if years is None else years, 0.0))
    doubtful = (years == -1 or (title.country != known_title.country and years != 1)
                or numbers(title.normal) != numbers(known_title.normal))
    return Candidate(known, min(score, TAKEN_ABOVE) if doubtful else score, -1 if doubtful else years or 0)


def choose_show(wanted: Show, known: Iterable[Show]) -> Match | Conflict:
    """Which of the known shows is meant, by title and year.

    An exact title is taken before all that are similar: where several have it, the one whose
    year fits; where none fits, the only one that is possible.
    """
    found = sorted(filter(None, (candidate(wanted, show) for show in known)), key=lambda each: -each.score)
    above = [each for each in found if each.score > TAKEN_ABOVE]
    exact = [each for each in above if parse_title(each.show.title).normal == parse_title(wanted.title).normal]
    for some in ([each for each in exact if each.year == 1], exact, above):
        if len(some) == 1:
            return Match(some[0].show.id, "title", round(some[0].score, 2))
        if some:
            return Conflict("multiple_matches", tuple(found[:MAX_CANDIDATES]))
    return Conflict("ambiguous" if found else "no_match", tuple(found[:MAX_CANDIDATES]))


def candidates_of(show: Show, known: Show | None) -> tuple[Candidate, ...]:
    """One show, as what may be meant."""
    found = candidate(show, known) if known else None
    return (found._replace(score=min(found.score, TAKEN_ABOVE)),) if found else ()


# === Watching: Webhook -> Entry, Outcome (first_outcome) ===

SUCCESS, FAILED, IGNORED, DUPLICATE = "success", "failed", "ignored", "duplicate"


class Entry(NamedTuple):
    """A row of the tracker's journal: a webhook, or a play that only the server's history told of."""
    received_at: float            # Unix s; of a play from the history: when it was viewed
    event: str                    # the webhook's; HISTORY
    server: str                   # its machineIdentifier (Server.uuid); "": not said
    account_id: str               # Account.id; "": not said
    account: str                  # Account.title
    item: Item
    scrobble: Scrobble
    id: int = 0                   # of the row; 0: not in the journal yet
    attempts: int = 0             # to finish it, in vain so far

    @property
    def season(self) -> int | None:
        """The episode's season; a movie's is 0.  None: not said."""
        said = self.item.parent_index if self.item.parent_index is not None else self.from_guid[0]
        return 0 if self.item.type == MOVIE else said

    @property
    def episode(self) -> int | None:
        """Its number in the season; a movie's is 0.  None: not said."""
        said = self.item.index if self.item.index is not None else self.from_guid[1]
        return 0 if self.item.type == MOVIE else said

    @property
    def from_guid(self) -> tuple[int | None, int | None]:
        """Season and episode in a legacy agent's guid."""
        parsed = parse_guid(self.item.guid)
        return parsed[2:] if parsed else (None, None)

    @property
    def title(self) -> str:
        """Of the show or movie."""
        return self.item.title if self.item.type == MOVIE else self.item.grandparent_title

    @property
    def show_guid(self) -> str:
        """The guid of the show or movie, without ?lang=; "": not said."""
        legacy = re.match(r"com\.plexapp\.agents\.[^/]*://[^/?]+", self.item.guid)
        own = self.item.guid if self.item.type == MOVIE else legacy[0] if legacy else ""
        return (self.scrobble.show_guid or own).partition("?")[0]

    @property
    def subject(self) -> str:
        """What the show or movie is on its server, to which a mapping is made."""
        key = self.item.rating_key if self.item.type == MOVIE else self.scrobble.show_key
        return f"key:{key}" if key else f"guid:{self.show_guid}" if self.show_guid else f"title:{self.title}"

    @property
    def show(self) -> Show:
        """The show or movie, as far as this tells of it: an episode's own ids are none of its show."""
        movie = self.item.type == MOVIE
        guids = (self.item.guid, *self.scrobble.guids) if movie else (self.scrobble.show_guid, self.show_guid)
        return Show(self.item.type, self.title, self.scrobble.year, parse_ids(guids), own_year=movie)


SCROBBLE, HISTORY = "media.scrobble", "history"       # the event of a webhook; of a play that none told


class Outcome(NamedTuple):
    """What became of an entry."""
    status: str                   # SUCCESS, FAILED, IGNORED, DUPLICATE
    action: str                   # as in the contract: marked_watched, conflict_created, ...
    reason: str = ""              # for a person
    match: Match | None = None
    retry: bool = False           # it can pass: try again


def retry_after_s(attempts: int) -> float | None:
    """How long after so many attempts and one more an entry is tried again; None: it has been tried for a day."""
    return min(ROW_MAX_S, ROW_MIN_S * 2 ** attempts) if attempts < MAX_ATTEMPTS else None


def entry_of(webhook: Webhook, at: float) -> Entry:
    """The Entry of a webhook that came at a Unix time."""
    return Entry(at, webhook.event, webhook.server, webhook.account_id, webhook.account, webhook.item or Item(),
                 webhook.scrobble or Scrobble())


def is_number(value: int | None) -> bool:
    """Whether a season or an episode can have that number."""
    return value is not None and value <= MAX_NUMBER


def missing_word(entry: Entry) -> str:
    """What an entry lacks to be matched; "": nothing."""
    return "title" if not entry.title else "season" if not is_number(entry.season) else \
        "episode number" if not is_number(entry.episode) else ""


def watched_state(fields: Mapping[str, Any], at: float) -> tuple[int | None, int]:
    """When an item was watched (of `at`, where the server does not say) and how often; None: it was not."""
    plays = number(fields.get("viewCount")) or 0
    return min(number(fields.get("lastViewedAt")) or int(at), int(at)) if plays else None, plays


def split_accounts(accounts: str) -> set[str]:
    """The titles and ids in -accounts."""
    return {name.strip().casefold() for name in accounts.split(",")} - {""}


def history_entry(fields: Mapping[str, Any], server: str, accounts: set[str] | None) -> Entry | None:
    """The Entry of a play in the server's history; None for what is not tracked.  accounts: None: all count."""
    item, account = parse_item(fields), text(fields.get("accountID"))
    key = text(fields.get("grandparentRatingKey")) or text(fields.get("grandparentKey")).rpartition("/")[2]
    entry = Entry(float(number(fields.get("viewedAt")) or 0), HISTORY, server, account, "", item,
                  parse_scrobble(fields)._replace(show_key=key))
    wrong = item.type not in (EPISODE, MOVIE) or not item.rating_key or missing_word(entry)
    return None if wrong or (accounts is not None and account not in accounts) else entry


def counts(webhook: Webhook, accounts: str) -> bool:
    """Whether an account's watching counts.  accounts: as -accounts; "": the one whose webhook it is."""
    if accounts in ("", "*"):
        return webhook.user or bool(accounts)
    return bool({webhook.account.casefold(), webhook.account_id} & split_accounts(accounts))


def first_outcome(webhook: Webhook, entry: Entry, accounts: str) -> Outcome | None:
    """What becomes of a webhook that marks nothing, whatever the tracker knows; None: the worker decides."""
    if webhook.event != SCROBBLE:
        return Outcome(IGNORED, "event_not_scrobble", f"only media.scrobble tells that something was finished, "
                       f"not {webhook.event}")
    if entry.item.type not in (EPISODE, MOVIE):
        return Outcome(IGNORED, "not_supported_type", f"only episodes and movies are tracked, not "
                       f"{f'a {entry.item.type}' if entry.item.type else 'an item without a type'}")
    if not counts(webhook, accounts):
        return Outcome(IGNORED, "other_account",
                       f"{webhook.account or 'the account'} is not the owner, or none of -accounts")
    if missing := missing_word(entry):
        return Outcome(FAILED, "validation_failed", f"the webhook names no {missing}")
    return None


# === Words: values -> log line, JSON, sentence ===

def change_fields(change: Change, name_machine: bool, say_why: bool = False) -> dict[str, object]:
    """A Change as the log's keys and values, in the contract's order; name_machine adds the player's identifier,
    say_why what it is believed for."""
    item = change.item
    fields: dict[str, object] = {"state": change.state, "title": item.title}
    if item.type == "episode":
        fields |= {"show": item.grandparent_title, "season": item.parent_index, "episode": item.index}
    elif item.type == "track":
        fields |= {"artist": item.artist, "album": item.parent_title}
    else:
        fields |= {"artist": "", "album": ""}
    fields |= {"position_ms": change.position_ms, "duration_ms": item.duration or 0, "player": change.player_title}
    if name_machine:
        fields["machine_id"] = change.machine_identifier
    if change.reason:
        fields["reason"] = change.reason
    if say_why:
        fields["by"] = change.by
    return fields


def printable(line: str) -> str:
    """A line in which no character forges a line, colours a terminal or turns the reading direction."""
    return line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def quoted(value: object) -> str:
    """A value of the text log: bare where nothing can be mistaken, else as a JSON string."""
    bare = "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    if re.fullmatch(r"[\w.:/+-]+", bare) and bare.isprintable():
        return bare
    return printable(json.dumps(bare, ensure_ascii=False))


def text_line(sentence: str, fields: Mapping[str, object]) -> str:
    """A line of the text log: a sentence, if any, and logfmt."""
    pairs = [f"{key}={quoted(value)}" for key, value in fields.items()]
    return " ".join([printable(sentence), *pairs] if sentence else pairs)


def json_line(fields: Mapping[str, object]) -> str:
    """A line of the JSON log: one object."""
    return printable(json.dumps(fields, ensure_ascii=False))


def playing_sentence(state: str, item: Item | None) -> str:
    """What a player does, in words: 'playing "Karma Police" by Radiohead'."""
    if item is None:
        return STOPPED
    by = item.artist if item.type == "track" else ""
    of = item.grandparent_title if item.type == "episode" else ""
    return f'{state} "{item.title}"{f" of {of}" if of else ""}{f" by {by}" if by else ""}'


def status_sentence(player: PlayerState | None, webhook_age_s: float | None) -> str:
    """The daemon in one line, for `systemctl status`."""
    doing = "no player yet"
    if player and player.outage:
        doing = player.outage.sentence.rstrip(".")
    elif player:
        where = f" on {player.player_title}" if player.player_title and player.item else ""
        doing = playing_sentence(player.state, player.item) + where
    heard = "no webhook yet" if webhook_age_s is None else f"last webhook {webhook_age_s:.0f} s ago"
    return printable(f"{doing}; {heard}")


def session_fields(session: Session, configured: bool) -> dict[str, object]:
    """A Session as `players -json` prints it, with the log's and Plex's words."""
    item = session.item
    return {"machine_id": session.machine_identifier, "player": session.player_title, "product": session.product,
            "platform": session.platform, "user": session.user, "state": session.state, "type": item.type,
            "title": item.title, "grandparent_title": item.grandparent_title, "parent_title": item.parent_title,
            "configured": configured}


def session_lines(session: Session, configured: bool) -> str:
    """A Session as `players` prints it: three short lines, the last one a flag to copy."""
    made = ", ".join(filter(None, (session.product, session.platform)))
    what = ", ".join(filter(None, (made, "configured" if configured else "")))
    lines = (f"{'* ' if configured else '  '}{session.player_title or 'without a name'}{f' ({what})' if what else ''}",
             f"    {playing_sentence(session.state, session.item)}",
             f"    -plex-machine-id {shlex.quote(session.machine_identifier)}")
    return "\n".join(map(printable, lines))


def named(title: str, year: int | None) -> str:
    """A show or movie as a person knows it: 'Castle (2009)'."""
    return f"{title} ({year})" if year and parse_title(title).year is None else title


def conflict_reason(show: Show, conflict: Conflict) -> str:
    """Why a person is asked."""
    name = named(show.title, show.year)
    best = ", ".join(f"{named(each.show.title, each.show.year)} ({each.score:.2f})" for each in conflict.candidates[:3])
    said = {"no_match": f"nothing in the tracker is like {name}", "ambiguous": f"{name} may be {best}",
            "multiple_matches": f"{name} may be each of {best}"}
    return f"{conflict.kind}: {said[conflict.kind]}"


def outcome_fields(entry: Entry, outcome: Outcome) -> dict[str, object]:
    """What became of an entry, as the log's keys and values."""
    fields: dict[str, object] = {"status": outcome.status, "action": outcome.action}
    if entry.item.type == EPISODE:
        fields |= {"show": entry.title, "season": entry.season, "episode": entry.episode}
    else:
        fields |= {"title": entry.title}
    if outcome.match:
        fields |= {"by": outcome.match.by, "confidence": outcome.match.confidence}
    return fields | ({"reason": outcome.reason} if outcome.reason else {})


def iso_time(at: float | None) -> str | None:
    """A Unix time as the tracker's JSON has it: 2026-11-21T20:15:00Z."""
    return None if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def unix_time(word: str) -> int:
    """The Unix time of such a word, or of one with another zone; raises ValueError."""
    moment = datetime.datetime.fromisoformat(word)
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return max(0, int(moment.timestamp()))


def columns(line: str) -> int:
    """How many columns of a terminal a line takes."""
    return len(line) + sum(unicodedata.east_asian_width(c) in "WF" for c in line)


def shortened(line: str, width: int) -> str:
    """A line in so many columns."""
    if columns(line) <= width:
        return line
    while columns(line) >= max(width, 1):
        line = line[:-1]
    return line + "\u2026"


def table(rows: Sequence[Sequence[str]], wide: int) -> str:
    """Rows in columns, 80 wide at most, of which column `wide` gives way."""
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    widths[wide] = max(8, min(widths[wide], 80 - sum(widths) + widths[wide] - 2 * (len(widths) - 1)))
    cells = ((shortened(cell, width), width) for row in rows for cell, width in zip(row, widths, strict=True))
    padded = [cell + " " * (width - columns(cell)) for cell, width in cells]
    return "\n".join("  ".join(padded[i:i + len(widths)]).rstrip() for i in range(0, len(padded), len(widths)))


def season_lines(season: int, episodes: Sequence[tuple[int, bool]]) -> str:
    """A season as a grid of its (number, watched): # watched, . not, a blank for a number that is missing."""
    watched = dict(episodes)
    numbers = range(min(1, *watched), max(watched) + 1)
    cells = "".join({True: "#", False: ".", None: " "}[watched.get(number)] for number in numbers)
    name = f"Season {season}" if season else "Specials"
    lines = [f"{'' if i else name:10}  {cells[i:i + 50]:50}" for i in range(0, len(cells), 50)]
    return "\n".join(lines) + f"  {sum(watched.values())} of {len(watched)}"


# === Status: what the daemon knows -> JSON, page, metrics, hook environment ===

class Status(NamedTuple):
    """What the Watcher knows; it publishes a new one after each change of it."""
    player: PlayerState | None = None     # the one that changed last
    changes: tuple[tuple[float, Change], ...] = ()      # the last, newest first, with their Unix times
    has_server: bool = False
    stream_open: bool = False     # the event stream
    stream_missed: bool = False   # the server has none, or it is not to be opened
    webhook_at: float | None = None   # monotonic s, the last; None: none yet
    webhook_time: float = 0.0     # the same in Unix s; 0: none yet
    webhooks: Mapping[tuple[str, str], int] = MappingProxyType({})      # by (event, result)
    looks: Mapping[str, int] = MappingProxyType({})                     # by result
    reported: Mapping[tuple[str, str], int] = MappingProxyType({})      # changes by (state, by)


# The events of Plex's documentation, as a label of the metrics; all others are "other".
EVENTS = frozenset((*CLAIMS, "media.rate", "media.scrobble", "library.new", "library.on.deck", "admin.database.backup",
                    "admin.database.corrupted", "device.new"))


def proof_sentence(status: Status, at: float) -> str:
    """Whether webhooks arrive, in words."""
    proof = status.player.proof if status.player else Proof()
    heard = "none has come yet" if status.webhook_at is None else f"the last came {at - status.webhook_at:.0f} s ago"
    if proof.in_a_row >= PROOF_MISSES:
        return (f"Webhooks do not arrive: {proof.in_a_row} changes in a row came without one ({heard}). "
                "Ask `streamerbrainz.py doctor`; without Plex Pass none are sent, and all is well.")
    if proof.delays_s:
        return f"Webhooks arrive ({proof.arrived} belonged to a change, {proof.missed} were missed; {heard})."
    return f"Whether webhooks arrive is not known yet ({heard})."


def witnesses(status: Status, at: float) -> dict[str, dict[str, Any]]:
    """How each of the three witnesses is, in words."""
    outage = status.player.outage if status.player else None
    sessions = "no server is configured" if not status.has_server else \
        outage.sentence if outage else "the server answers" if status.looks else "not asked yet"
    proof = status.player.proof if status.player else Proof()
    arrive = False if proof.in_a_row >= PROOF_MISSES else True if proof.delays_s else None
    return {"webhooks": {"up": arrive, "words": proof_sentence(status, at)},
            "sessions": {"up": None if not status.has_server else not outage, "words": sessions},
            "events": {"up": True if status.stream_open else None if status.stream_missed or not status.has_server
                       else False, "words": "the event stream is open" if status.stream_open else "no event stream"}}


def now_fields(status: Status, at: float) -> dict[str, object]:
    """What plays, as /now tells it: the log's keys, then how that is known."""
    player = status.player
    item = player.item if player else None
    fields: dict[str, object] = {"state": STOPPED, "title": "", "artist": "", "album": "", "position_ms": 0,
                                 "duration_ms": 0, "player": player.player_title if player else ""}
    if player and item:
        fields = change_fields(Change(player.state, "", item, position_ms(player, at), player.player_title,
                                      player.machine_identifier, ""), name_machine=False)
    return {**fields, "type": item.type if item else "", "machine_id": player.machine_identifier if player else "",
            "cover": f"cover?key={urllib.parse.quote(item.identity, '')}" if item else "",
            "witnesses": witnesses(status, at), "version": VERSION,
            "webhooks": {"last_s": None if status.webhook_at is None else round(at - status.webhook_at, 1),
                         "count": sum(n for (_, result), n in status.webhooks.items() if result == "ok"),
                         "refused": {result: n for (_, result), n in status.webhooks.items() if result != "ok"},
                         "arrived": player.proof.arrived if player else 0,
                         "missed": player.proof.missed if player else 0,
                         "in_a_row_missed": player.proof.in_a_row if player else 0,
                         "median_delay_s": player.proof.median_delay_s if player else None},
            "changes": [{"at": iso_time(when), **change_fields(change, name_machine=True), "by": change.by}
                        for when, change in status.changes]}


def health(status: Status, busy_s: float, waiting_s: float, broken: str, at: float) -> tuple[int, dict[str, object]]:
    """The HTTP status of /healthz and its JSON.

    busy_s: that the main loop has not come to wait; waiting_s: the age of the oldest
    journalled webhook that the tracker's worker has not touched; broken: why the tracker
    cannot be read, "" where it can.
    """
    player, reasons, degraded = status.player, [broken] if broken else [], []
    if busy_s > STALL_S:
        reasons.append(f"the main loop has been busy for {busy_s:.0f} s")
    if player and player.outage and player.outage.fault in ("refused", "forbidden"):
        reasons.append(player.outage.sentence)
    elif player and player.outage and at - player.outage_at >= UNHEALTHY_S:
        reasons.append(f"the server has not answered for {at - player.outage_at:.0f} s: {player.outage.sentence}")
    elif player and player.outage:
        degraded.append(player.outage.sentence)
    if waiting_s >= UNHEALTHY_S:
        reasons.append(f"a journalled webhook has been waiting for {waiting_s:.0f} s")
    if player and player.proof.in_a_row >= PROOF_MISSES:
        degraded.append(proof_sentence(status, at))
    word = "failing" if reasons else "degraded" if degraded else "ok"
    return (503 if reasons else 200), {"status": word, "version": VERSION, "reasons": reasons, "degraded": degraded}


def metric_lines(status: Status, rows: Mapping[str, int], process: Mapping[str, float], at: float) -> str:
    """All figures in Prometheus' text format.  rows: of the tracker's journal, by status; process: name -> value."""
    player = status.player
    proof = player.proof if player else Proof()
    state = player.state if player else STOPPED
    families: list[tuple[str, str, str, Mapping[tuple[tuple[str, str], ...], float]]] = [
        ("streamerbrainz_build_info", "gauge", "The version.", {(("version", VERSION),): 1}),
        ("streamerbrainz_player_state", "gauge", "1 for what the player does.",
         {(("state", each),): each == state for each in (PLAYING, PAUSED, STOPPED)}),
        ("streamerbrainz_player_position_seconds", "gauge", "Where the player is in its item.",
         {(): position_ms(player, at) / 1000 if player else 0}),
        ("streamerbrainz_webhooks_total", "counter", "Webhooks by event and result: ok, or the status of a refusal.",
         {(("event", event), ("result", result)): n for (event, result), n in status.webhooks.items()}),
        ("streamerbrainz_webhook_last_timestamp_seconds", "gauge", "When the last webhook came; 0: none yet.",
         {(): status.webhook_time}),
        ("streamerbrainz_webhook_missed_total", "counter", "Changes that came without their webhook.",
         {(): proof.missed}),
        ("streamerbrainz_looks_total", "counter", "Queries of the sessions by result.",
         {(("result", result),): n for result, n in status.looks.items()}),
        ("streamerbrainz_changes_total", "counter", "Reported changes by state and by what they are believed for.",
         {(("state", state), ("by", by)): n for (state, by), n in status.reported.items()}),
        ("streamerbrainz_tracker_rows_total", "gauge", "Rows of the tracker's journal by status.",
         {(("status", each),): n for each, n in rows.items()})]
    for name, value in process.items():
        families.append((name, "counter" if name.endswith("_total") else "gauge", "Of this process.", {(): value}))
    if status.has_server:
        up = bool(status.looks) and not (player and player.outage)
        families.insert(0, ("plex_up", "gauge", "Whether the last look at the sessions went well.", {(): up}))
    lines = []
    for name, kind, words, samples in families:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"] if samples else []
        for labels, value in samples.items():
            each = ",".join(f'{label}="{word}"' for label, word in labels)
            lines.append(f"{name}{{{each}}} {float(value):.10g}" if labels else f"{name} {float(value):.10g}")
    return "\n".join(lines) + "\n"


def hook_event(change: Change) -> str:
    """What librespot's --onevent would call a change."""
    return "track_changed" if change.state == change.old_state else change.state


def hook_environment(change: Change, event: str) -> dict[str, str]:
    """A hook's environment, with librespot's names, so that people's scripts work, and some of Plex."""
    item = change.item
    values = {"PLAYER_EVENT": event, "TRACK_ID": item.guid or item.identity, "NAME": item.title,
              "ARTISTS": item.artist, "ALBUM": item.parent_title, "DURATION_MS": item.duration or 0,
              "POSITION_MS": change.position_ms, "PLEX_PLAYER_ID": change.machine_identifier,
              "PLEX_PLAYER_TITLE": change.player_title, "PLEX_TYPE": item.type, "PLEX_RATING_KEY": item.rating_key,
              "PLEX_SAMPLE_RATE": item.sample_rate, "PLEX_BIT_DEPTH": item.bit_depth,
              "OLD_STATE": change.old_state, "REASON": change.reason}
    return {name: text(str(value)).replace("\0", "") for name, value in values.items() if value not in ("", None)}


class Amplifier(NamedTuple):
    """Whether the hook has been told that a player is active, and when it will be told that none is."""
    playing: frozenset[str] = frozenset()     # machine_identifiers
    active: bool = False
    off_at: float | None = None   # monotonic s; None: not before something changes


def after_change(amplifier: Amplifier, change: Change, at: float, active_timeout_s: float) -> tuple[Amplifier, bool]:
    """The amplifier after a change of a player, and whether it has to be told `active` first."""
    if change.state == PLAYING:
        return Amplifier(amplifier.playing | {change.machine_identifier}, True), not amplifier.active
    playing = amplifier.playing - {change.machine_identifier}
    ended = amplifier.active and not playing and amplifier.off_at is None
    return Amplifier(playing, amplifier.active, at + active_timeout_s if ended else amplifier.off_at), False


SWITCHES = ("active", "inactive")


def enqueue(waiting: Sequence[tuple[str, dict[str, str]]], event: str, environment: dict[str, str]
            ) -> list[tuple[str, dict[str, str]]]:
    """What waits for the hook when there is one event more: the newest change wins over those that wait."""
    rest = [each for each in waiting if each[0] not in SWITCHES]
    if event in SWITCHES:                             # on and off again before anybody was told: neither is told
        return rest if len(rest) < len(waiting) else [*waiting, (event, environment)]
    return [*(each for each in waiting if each[0] in SWITCHES), (event, environment)]


# === Page: what plays -> HTML (page) ===

STYLE = """
:root { color-scheme: light dark; --dim: #6b7280; --line: #8884; --accent: #d97706 }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 44rem; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.now { display: flex; gap: 1rem; align-items: center; flex-wrap: wrap } .now div { flex: 1 1 14rem; min-width: 0 }
img { width: 10rem; height: 10rem; object-fit: cover; border-radius: .5rem; background: var(--line) }
p { margin: .2rem 0; overflow-wrap: anywhere } .dim, time { color: var(--dim) }
.bad { color: #dc2626 } .good { color: #16a34a }
progress { width: 100%; height: .4rem; accent-color: var(--accent) } li { margin: .2rem 0; overflow-wrap: anywhere }
ul { padding: 0; margin: 0; list-style: none }
code { overflow-wrap: anywhere; background: var(--line); padding: .1rem .3rem; border-radius: .2rem }
button { font: inherit; padding: .2rem .8rem } footer { margin-top: 2rem; font-size: .85rem }
"""

SCRIPT = """
const main = () => document.querySelector("main"), bar = () => document.querySelector("progress");
const query = location.search, secret = (query.match(/[?&](?:token|secret)=([^&]*)/) || [])[1];
const full = url => url.dataset.plain + (secret ? "?token=" + secret : "");
const clock = s => Math.floor(s / 60) + ":" + String(Math.floor(s % 60)).padStart(2, "0");
let since = performance.now(), shown = false;
const dress = () => {
  for (const b of document.querySelectorAll("button")) b.hidden = b.id === "show" && !secret;
  for (const i of document.querySelectorAll("img[data-src]")) i.src = i.dataset.src + "&token=" + secret;
  const url = document.getElementById("url");
  if (shown) url.textContent = full(url);
};
const refresh = async () => {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  main().replaceWith(new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main"));
  since = performance.now(); dress();
};
document.addEventListener("click", event => {
  const url = document.getElementById("url");
  if (event.target.id === "show") { shown = true; dress(); }
  if (event.target.id === "copy") {
    const before = url.textContent;
    url.textContent = full(url);
    const range = document.createRange(); range.selectNodeContents(url);
    getSelection().removeAllRanges(); getSelection().addRange(range);
    document.execCommand("copy"); getSelection().removeAllRanges();
    url.textContent = before; event.target.textContent = "Copied";
  }
});
setInterval(() => {
  const p = bar(); if (!p || !p.dataset.playing) return;
  const at = Math.min(p.max, +p.dataset.position + performance.now() - since);
  p.value = at; document.getElementById("position").textContent = clock(at / 1000);
}, 1000);
const listen = again => {
  const stream = new EventSource("events" + query);
  stream.addEventListener("change", refresh);
  stream.onopen = () => { if (again) refresh(); again = true; };
  stream.onerror = () => { if (stream.readyState === 2) setTimeout(listen, 5000, true); };
};
listen(false);
setInterval(() => { if (!document.hidden) refresh(); }, 30000);
dress();
"""


def clock(ms: int) -> str:
    """A position or duration as people read it: 4:24."""
    return f"{ms // 60000}:{ms // 1000 % 60:02}"


def item_words(item: Item) -> tuple[str, str]:
    """What stands under an item's title: whose it is, and of what."""
    if item.type == EPISODE:
        season = f"Season {item.parent_index}, episode {item.index}" if item.index is not None else item.parent_title
        return item.grandparent_title, season
    return (item.artist, item.parent_title) if item.type == "track" else ("", "")


class Glance(NamedTuple):
    """What the page shows of the watch tracker."""
    marked: tuple[tuple[float, str], ...] = ()        # the last, with their Unix times
    conflicts: tuple[tuple[int, str, str], ...] = ()  # open ones: id, name, kind


def page(status: Status, at: float, url: str, has_secret: bool, nonce: str, has_picture: bool,
         seen: Glance | None, local_time: Callable[[str, float], str]) -> str:
    """The status page.

    url: to paste into Plex, without the secret, which is never in the page.  local_time: a
    Unix time in a form of strftime().
    """
    escape = html.escape
    player, item = status.player, status.player.item if status.player else None
    position, state = position_ms(player, at) if player else 0, player.state if player else STOPPED
    now = "<h1>Nothing has played yet</h1>"
    if player and item:
        whose, of = item_words(item)
        bar = (f'<progress max="{item.duration}" value="{position}" data-position="{position}" '
               f'data-playing="{1 if state == PLAYING else ""}"></progress><p class=dim><span id=position>'
               f"{clock(position)}</span> of {clock(item.duration)}</p>") if item.duration else ""
        source = "data-src" if has_secret else "src"          # the script adds the secret, which it finds in the URL
        cover = f'<img alt="" {source}="cover?key={urllib.parse.quote(item.identity, "")}">' if has_picture else ""
        now = (f"{cover}<div><p class=dim>{escape(state)}"
               f"{escape(f' on {player.player_title}' if player.player_title else '')}</p><h1>{escape(item.title)}</h1>"
               f"<p>{escape(whose)}</p><p class=dim>{escape(of)}</p>{bar}</div>")
    marks = {True: "<span class=good>\u2713</span>", False: "<span class=bad>\u2717</span>",
             None: "<span class=dim>\u2013</span>"}
    told = "".join(f"<li>{marks[each['up']]} <b>{name}</b>: {escape(each['words'])}</li>"
                    for name, each in witnesses(status, at).items())
    changes = "".join(
        f"<li><time>{local_time('%H:%M:%S', when)}</time> {escape(change.state)} "
        f"<b>{escape(change.item.title)}</b> {escape(item_words(change.item)[0])} <span class=dim>({escape(change.by)})"
        "</span></li>" for when, change in status.changes)
    tracked = ""
    if seen:
        marked = "".join(f"<li><time>{local_time('%m-%d %H:%M', when)}</time> {escape(name)}</li>"
                         for when, name in seen.marked)
        waiting = "".join(f"<li>{escape(name)} ({kind}): <code>streamerbrainz.py tracker resolve {number} "
                          "new</code>, or ignore, or the show's id</li>" for number, name, kind in seen.conflicts)
        tracked = (f"<h2>Watched</h2><ul>{marked or '<li class=dim>nothing yet</li>'}</ul>" +
                   (f"<h2>Which show is it?</h2><ul>{waiting}</ul>" if waiting else ""))
    dots = "?token=\u2022\u2022\u2022\u2022\u2022\u2022\u2022\u2022" if has_secret else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>StreamerBrainz</title><link rel="icon" href="data:,"><style nonce="{nonce}">{STYLE}</style></head>
<body><main><section class=now>{now}</section>
<h2>Witnesses</h2><ul>{told}</ul>
<h2>The URL to paste into Plex</h2>
<p><code id=url data-plain="{escape(url)}">{escape(url)}{dots}</code></p>
<p><button id=copy hidden>Copy</button> <button id=show hidden>Show the secret</button></p>
<h2>Changes</h2><ul>{changes or '<li class=dim>none yet</li>'}</ul>
{tracked}</main>
<footer class=dim>StreamerBrainz {VERSION}</footer>
<script nonce="{nonce}">{SCRIPT}</script></body></html>
"""


# =============== below this line the program touches the world, and decides nothing ===============

log = logging.getLogger("streamerbrainz")


def say(level: int, sentence: str, **fields: object) -> None:
    """Log a fact: a sentence, if any, and its keys and values."""
    log.log(level, "%s", sentence, extra={"fields": fields})


# === Plex: HTTP -> bytes (PlexServer) ===

class TooMuch(http.client.HTTPException):
    """A server sent more than there was room for."""


class BoundedReader(io.RawIOBase):
    """A connection's bytes, until `deadline` and at most `room` of them, however many reads they take.

    A time limit on each read is none: a peer that drips a byte at a time never meets it.
    """

    def __init__(self, connection: socket.socket, deadline: float, room: int):
        self.connection, self.deadline, self.room = connection, deadline, room
        self.raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the whole message is up")
        self.connection.settimeout(left)
        count = self.raw.readinto(buffer) or 0
        self.room -= count
        if self.room < 0:
            raise TooMuch
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is read whole within a deadline, or not at all."""

    def __init__(self, connection: socket.socket, *args: Any, deadline: float, **kwargs: Any):
        super().__init__(connection, *args, **kwargs)
        self.fp.close()
        self.reader = BoundedReader(connection, deadline, 2 * MAX_HEAD)       # twice: it reads ahead
        self.fp = io.BufferedReader(self.reader)

    def begin(self) -> None:
        """Read the head; then there is room for the body."""
        super().begin()
        self.reader.room = MAX_SESSIONS + MAX_HEAD


class _WholeAnswer(http.client.HTTPConnection):
    """A connection whose timeout counts from its making to the last byte of its one answer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.deadline = time.monotonic() + (self.timeout or 0)
        self.response_class = functools.partial(_Answer, deadline=self.deadline)  # type: ignore[assignment]
        self._create_connection = self.connect_in_time       # by which connect() connects

    def connect_in_time(self, address: tuple[str, int], *args: object) -> socket.socket:
        """A connection to the first address of a name that answers before the deadline; OSError: none does."""
        failure: OSError = TimeoutError()
        for family, kind, protocol, _, sockaddr in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(max(0.001, self.deadline - time.monotonic()))
                connection.connect(sockaddr)
                connection.settimeout(max(0.001, self.deadline - time.monotonic()))     # for TLS, too
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure


class _WholeAnswerTLS(_WholeAnswer, http.client.HTTPSConnection):
    """The same over TLS."""


class _PlexHandler(urllib.request.AbstractHTTPHandler):
    """urllib's http and https with whole answers.  Alone in its opener: no proxy, no redirect, no file://."""

    def __init__(self, context: ssl.SSLContext | None):
        super().__init__()
        self.context = context

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_WholeAnswer, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_WholeAnswerTLS, request, context=self.context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def why(error: object) -> str:
    """Why the system refused, in its own words and without its numbers."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def status_error(status: int, url: str, path: str) -> PlexError:
    """What an HTTP status other than 200 means."""
    if status == 401:
        return PlexError("refused", f"{url} refuses the token (401): put a valid one of the server's owner "
                         "into the -plex-token-file.")
    if status == 403:
        return PlexError("forbidden", f"{url} does not show its sessions to this token (403): "
                         "it must be the server owner's.")
    if status == 503:
        return PlexError("starting", f"{url} is still starting, or at maintenance (503).")
    if 300 <= status < 400:
        return PlexError("nonsense", f"{url} redirects elsewhere ({status}), where the token must not go: "
                         "give the final address as -plex-server-url.")
    return PlexError("missing" if status == 404 else "nonsense", f"{url} answers {status} to {path}: "
                     "is -plex-server-url that of Plex Media Server?")


def network_error(error: Exception, url: str, timeout_s: float) -> PlexError:
    """What went wrong on the way to a server."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return PlexError("unreachable", f"{url} has a certificate that does not fit ({cause.verify_message}): give the "
                         "address in it (...plex.direct), or its CA as -plex-ca-file.")
    if isinstance(cause, TooMuch):
        return PlexError("nonsense", f"{url} answered far more than Plex does.")
    if isinstance(cause, TimeoutError):
        return PlexError("unreachable", f"{url} did not answer within {timeout_s:g} s.")
    if not isinstance(cause, OSError):
        return PlexError("nonsense", f"{url} does not speak HTTP as Plex does ({type(cause).__name__}).")
    if isinstance(cause, ConnectionResetError) and url.startswith("http:"):
        return PlexError("unreachable", f"{url} drops the connection: "
                         "does Plex demand https (Settings > Network > Secure connections)?")
    hint = "" if urllib.parse.urlsplit(url).port else " It has no port: Plex listens on 32400, as a rule."
    return PlexError("unreachable", f"{url} cannot be reached: {why(cause)}.{hint}")


def plain_opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """What opens http and https, and nothing else: see _PlexHandler."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_PlexHandler(context))
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener


class LibraryPage(NamedTuple):
    """A page of a library, or of the server's history."""
    items: list[Mapping[str, Any]]    # Plex's attributes of each
    end: int                      # items up to the page's end
    total: int                    # items in all


class PlexServer:
    """Plex Media Server at a URL.  The token travels in the X-Plex-Token header only, and to that URL only."""

    def __init__(self, url: str, token: Callable[[], str], ca_file: str = ""):
        """token: gives the token as it is now.  Raises ConfigError for a ca_file that is none."""
        self.url, self.token, self.current_token = url, token, token()
        self.renewed = threading.Event()              # the token is another one: try again what it was refused for
        try:
            context = ssl.create_default_context(cafile=ca_file or None) if url.startswith("https:") else None
        except OSError as error:                      # ssl.SSLError is one
            raise ConfigError(f"-plex-ca-file: {ca_file} is no CA bundle ({why(error)}); "
                              "give a PEM file.") from error
        self.opener = plain_opener(context)

    @contextlib.contextmanager
    def open(self, path: str, timeout_s: float = 0.0, **headers: str) -> Iterator[_Answer]:
        """A 200 answer, to be read within timeout_s (0: PLEX_S) from now; raises PlexError, also for what fails while
        it is read."""
        request = urllib.request.Request(self.url + path, headers={
            "X-Plex-Token": self.current_token, "User-Agent": USER_AGENT, **headers})
        try:
            with self.opener.open(request, timeout=timeout_s or PLEX_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            error.close()
            raise status_error(error.code, self.url, path.partition("?")[0]) from None
        except (OSError, http.client.HTTPException) as error:       # URLError is an OSError
            raise network_error(error, self.url, timeout_s or PLEX_S) from None
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise network_error(error, self.url, timeout_s or PLEX_S) from None     # http.client's, on nonsense

    def sessions(self) -> tuple[Session, ...]:
        """What plays now, on all players, within PLEX_S; raises PlexError."""
        token = self.token()
        if token != self.current_token:
            self.current_token = token
            self.renewed.set()
        with self.open("/status/sessions") as response:
            body = response.read(MAX_SESSIONS + 1)
            if len(body) > MAX_SESSIONS:
                raise TooMuch
        return parse_sessions(body)

    def container(self, path: str, timeout_s: float = 0.0) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
        """A MediaContainer and its items, as parse_container() gives them; raises PlexError."""
        with self.open(path, timeout_s, Accept="application/json") as response:
            response.reader.room = MAX_PAGE
            return parse_container(response.read())

    def pages(self, path: str, start: int = 0, timeout_s: float = 0.0) -> Iterator[LibraryPage]:
        """The items at a path in pages, from the item `start` on; raises PlexError."""
        path += "&" if "?" in path else "?"
        before: object = None
        while start < MAX_ITEMS:
            attributes, items = self.container(f"{path}X-Plex-Container-Start={start}&X-Plex-Container-Size={PAGE}",
                                               timeout_s)
            end = start + len(items)
            page = LibraryPage(items, end, number(attributes.get("totalSize")) or end)
            if not items or items[0] == before:       # the end, or a server that does not know pages
                return
            yield page
            if end >= page.total:
                return
            start, before = end, items[0]
        raise PlexError("nonsense", f"{self.url} lists more than {MAX_ITEMS} items.")

    def identity(self) -> str:
        """The server's machineIdentifier; raises PlexError."""
        return text(self.container("/identity")[0].get("machineIdentifier"))

    def notifications(self) -> Iterator[Notification | None]:
        """None when the event stream is open, then each notification as it comes; raises PlexError when it breaks.

        For a thread of its own: it uses the token that the last look used.
        """
        with self.open("/:/eventsource/notifications?filters=playing") as response:
            yield None
            for event, data in read_events(self.lines(response)):
                if event == "playing":
                    yield from parse_notifications(data)

    def lines(self, response: _Answer) -> Iterator[bytes]:
        """The lines of an answer without end; raises PlexError when it ends all the same, or falls silent."""
        while True:
            response.reader.deadline, response.reader.room = time.monotonic() + SILENCE_S, MAX_EVENT + MAX_HEAD
            try:
                line = response.readline(MAX_EVENT + 1)
            except TimeoutError:
                raise PlexError("unreachable", f"{self.url} sent no event for {SILENCE_S:g} s.") from None
            if not line or len(line) > MAX_EVENT:
                raise PlexError("unreachable", f"{self.url} ended the event stream.")
            yield line


WITHOUT_STREAM = {"missing": "the server has none (404)",
                  "refused": "the server refuses the token in the X-Plex-Token header for it (401)"}


def follow_stream(plex: PlexServer, tell: Callable[[Notification | Stream], object],
                  pause: Callable[[float], object]) -> None:
    """Read the event stream for ever, and tell what it says; a thread of its own, which ends with the process.

    pause: sleeps for so many seconds, or until there is a reason to try again.
    """
    pause_s = STREAM_MIN_S
    while True:
        event, opened_at = "failed", time.monotonic()
        try:
            for notification in plex.notifications():
                event = "broke"
                tell(notification or Stream("opened"))
        except PlexError as error:
            tell(Stream(event, error.fault, str(error)))
            if time.monotonic() - opened_at > SILENCE_S / 3:       # it has pinged: it was well
                pause_s = STREAM_MIN_S
            rare = event == "failed" and error.fault in WITHOUT_STREAM
            pause((STREAM_RARE_S if rare else pause_s) * random.uniform(0.8, 1.2))
            pause_s = min(STREAM_MAX_S, pause_s * 1.5)


def file_version(file: str | int) -> tuple[int, ...] | None:
    """What differs when a file (its path or descriptor) was written or replaced; None for what is no regular file."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        if stat.S_ISREG(status.st_mode):
            return status.st_ino, status.st_size, status.st_mtime_ns
    return None


SECRETS = {"-plex-token-file": "Plex token", "-webhook-secret-file": "webhook secret", "-tmdb-token-file": "TMDB token"}


def read_secrets(flag: str, path: str, most: int) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """The secrets in a flag's file, one a line, and the file's version.  Warns of a file that others can read."""
    name = SECRETS[flag]
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:      # a FIFO would block for ever
            mode, version = os.fstat(file.fileno()).st_mode, file_version(file.fileno())
            content = file.read(MAX_TOKEN_FILE + 1).strip() if version else b""
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be read ({why(error)}); "
                          f"put the {name} there, readable by you alone (chmod 600).") from error
    if not content:
        raise ConfigError(f"{flag}: {path} is empty, or no regular file; put the {name} there.")
    words = [line.strip() for line in content.split(b"\n")]
    plain = rb"[!-~]+" if flag != "-webhook-secret-file" else rb"[!\"$'-~]+"      # & # % mean something in a URL
    if len(content) > MAX_TOKEN_FILE or len(words) > most or not all(re.fullmatch(plain, word) for word in words):
        raise ConfigError(f"{flag}: {path} holds more than a {name}; put one word of plain characters there"
                          f"{', or two, each on a line of its own' if most > 1 else ''}.")
    # systemd's credentials are guarded by their folder; their ACLs look like group bits
    guarded = os.path.dirname(path) == os.environ.get("CREDENTIALS_DIRECTORY")
    if mode & 0o077 and not guarded:
        say(logging.WARNING, f"others can read the file of {flag}; mend it with: chmod 600 {shlex.quote(path)}")
    return tuple(word.decode("ascii") for word in words), version


class SecretFile:
    """The secrets in a file, read again when it has changed.  For one thread, or under a lock."""

    def __init__(self, flag: str, path: str, most: int = 1):
        """most: lines that it may have.  Raises ConfigError where there is no secret in it."""
        self.flag, self.path, self.most = flag, path, most
        self.words, self.version = read_secrets(flag, path, most)

    def renewed(self) -> tuple[str, ...]:
        """The secrets as they are now; as they were, while the file is being replaced or cannot be read."""
        if self.version != (version := file_version(self.path)):
            try:
                self.words, self.version = read_secrets(self.flag, self.path, self.most)
                say(logging.INFO, f"the {SECRETS[self.flag]} was read again", file=self.path)
            except ConfigError as error:
                self.version = version                # said once, and tried again when the file changes
                say(logging.WARNING, f"the {SECRETS[self.flag]} stays as it was: {error}")
        return self.words

    def first(self) -> str:
        """The first of them, as it is now."""
        return self.renewed()[0]


# === Tracker: Entry, Match -> SQLite (Tracker, Journal) ===

# Its application_id and user_version tell a tracker from any other file, and from one of a later version.
APPLICATION_ID, SCHEMA_VERSION = 0x5342547A, 1

SCHEMA = """
CREATE TABLE show (                     -- a show, or a movie
    id INTEGER PRIMARY KEY,
    type TEXT NOT NULL,                 -- episode: a show, whose episodes are watched; movie
    title TEXT NOT NULL,
    normal TEXT NOT NULL,               -- the title as parse_title() makes it
    year INTEGER,                       -- the first; NULL: not known
    tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT,         -- NULL: not known
    UNIQUE (type, tmdb_id), UNIQUE (type, tvdb_id), UNIQUE (type, imdb_id)
);
CREATE INDEX show_normal ON show (normal, type);
CREATE TABLE trigram (                  -- of the shows' normal titles
    trigram TEXT NOT NULL,
    size INTEGER NOT NULL,              -- how many a title has
    shows BLOB NOT NULL,                -- the ids of those that have it, 4 bytes each, the machine's order
    PRIMARY KEY (trigram, size)
) WITHOUT ROWID;
CREATE TABLE episode (                  -- of a show; a movie has one, 0x0
    show_id INTEGER NOT NULL REFERENCES show, season INTEGER NOT NULL, episode INTEGER NOT NULL,
    title TEXT NOT NULL,
    watched_at INTEGER,                 -- Unix s, the first time; NULL: not watched
    plays INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (show_id, season, episode)
) WITHOUT ROWID;
CREATE TABLE mapping (                  -- what a server's show is here
    server TEXT NOT NULL,               -- its machineIdentifier
    type TEXT NOT NULL,
    subject TEXT NOT NULL,              -- key: and the show's rating key there; else guid: or title:
    guid TEXT NOT NULL,                 -- the show's under that key: a rebuilt library has another
    show_id INTEGER REFERENCES show,    -- NULL: a person chose to ignore it
    confidence REAL NOT NULL,
    PRIMARY KEY (server, type, subject)
) WITHOUT ROWID;
CREATE INDEX mapping_show ON mapping (show_id);
CREATE TABLE conflict (                 -- what waits for a person, or did
    id INTEGER PRIMARY KEY,
    created_at REAL NOT NULL,           -- Unix s
    kind TEXT NOT NULL,                 -- multiple_matches, ambiguous, no_match
    server TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL, guid TEXT NOT NULL,    -- as in mapping
    title TEXT NOT NULL, year INTEGER, tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT,      -- as in show
    candidates TEXT NOT NULL,           -- JSON: [[show_id, score], ...]
    resolution TEXT                     -- a show's id, or ignore; NULL: it is open
);
CREATE UNIQUE INDEX conflict_open ON conflict (server, type, subject) WHERE resolution IS NULL;
CREATE TABLE webhook_log (              -- the journal: what came, and what became of it
    id INTEGER PRIMARY KEY,
    received_at REAL NOT NULL,          -- Unix s; of a play from the history: when it was viewed
    event TEXT NOT NULL, server TEXT NOT NULL, account_id TEXT NOT NULL, account TEXT NOT NULL,
    type TEXT, rating_key TEXT, guid TEXT, title TEXT,      -- of the item, as the next line: Plex's words
    show_title TEXT, season INTEGER, episode INTEGER, year INTEGER, show_key TEXT, show_guid TEXT,
    guids TEXT,                         -- separated by blanks
    status TEXT,                        -- success, failed, ignored, duplicate; NULL: not begun
    action TEXT, reason TEXT, show_id INTEGER, conflict_id INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0,
    retry_at REAL                       -- Unix s, when it is to be done (again); NULL: it is done
);
CREATE INDEX webhook_log_due ON webhook_log (retry_at) WHERE retry_at IS NOT NULL;
CREATE INDEX webhook_log_play ON webhook_log (rating_key, received_at) WHERE rating_key IS NOT NULL;
CREATE INDEX webhook_log_old ON webhook_log (received_at) WHERE retry_at IS NULL AND status <> 'failed';
CREATE INDEX webhook_log_conflict ON webhook_log (conflict_id) WHERE conflict_id IS NOT NULL;
CREATE TABLE found (                    -- what TMDB found
    source TEXT NOT NULL, external_id TEXT NOT NULL,
    tmdb_id INTEGER,                    -- NULL: nothing
    at REAL NOT NULL,                   -- Unix s
    PRIMARY KEY (source, external_id)
) WITHOUT ROWID;
CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;   -- how far an import or the history came
"""


class Tracker:
    """The watch tracker's database, for one thread at a time.  All methods raise TrackerError.

    Methods that write are to be called within transaction().
    """

    def __init__(self, path: str, create: bool = False, lasting: bool = True, writing: threading.Lock | None = None,
                 write: bool = True):
        """Open the file.

        write: False: it is only read, and waits for nobody who writes.  lasting: a commit
        waits for the disk; else only a lasting one after it makes it so.  writing: shared by
        the connections of a process, so that they wait for one another and not for SQLite.
        """
        import sqlite3  # here: without -tracker-db it costs nothing

        self.path, self.writing, self.Error = path, writing or threading.Lock(), sqlite3.Error
        self.inode = 0                                # 0: it is being opened
        try:
            with contextlib.suppress(FileExistsError):        # (to open and close one drops SQLite's locks on it)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600) if create else os.open(path, os.O_PATH))
        except OSError as error:
            hint = "make its folder, writable by you" if create else "the daemon and `tracker import` make it"
            raise ConfigError(f"-tracker-db: {path} cannot be opened ({why(error)}); {hint}.") from error
        if file_version(path) is None:
            raise ConfigError(f"-tracker-db: {path} is no regular file; name one.")
        with self.guarded():
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=DATABASE_S)
            self.connection.execute("PRAGMA cache_size = -1000")
            self.begin(write)
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
        self.inode = os.stat(path).st_ino

    def begin(self, write: bool) -> None:
        """See that the file is a tracker of ours that can be written, or make it one."""
        self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        ours, version = self.one("PRAGMA application_id")[0], self.one("PRAGMA user_version")[0]
        if write and not ours and not self.one("SELECT count(*) FROM sqlite_schema")[0]:
            for statement in SCHEMA.split(";\n"):
                self.connection.execute(statement)
            self.connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self.connection.execute("INSERT INTO note VALUES ('history', ?)", (str(int(time.time())),))
        elif ours != APPLICATION_ID:
            raise ConfigError(f"-tracker-db: {self.path} is a database of another program; name another file.")
        elif version != SCHEMA_VERSION:
            raise ConfigError(f"-tracker-db: {self.path} is of a newer version of StreamerBrainz (its form is "
                              f"{version}, this one knows {SCHEMA_VERSION}); update streamerbrainz.py.")
        self.connection.execute("COMMIT")

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What SQLite says, as a TrackerError."""
        try:
            yield
        except self.Error as error:
            if self.inode == 0 and getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
                raise ConfigError(f"-tracker-db: {self.path} is no database; name another file.") from error
            raise TrackerError(f"{self.path}: {error}; see that it can be written, that the disk has room, "
                               "and that it is no damaged file.") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        version = file_version(self.path)
        if version is None or version[0] != self.inode:
            raise TrackerError(f"{self.path} was deleted or replaced; start again.")
        with self.writing, self.guarded():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def all(self, query: str, *values: object) -> list[Any]:
        """The rows of a query."""
        with self.guarded():
            return self.connection.execute(query, values).fetchall()

    def one(self, query: str, *values: object) -> Any:
        """The first row of a query; None: there is none."""
        with self.guarded():
            return self.connection.execute(query, values).fetchone()

    def write(self, statement: str, *values: object) -> Any:
        """Run a statement; -> its cursor."""
        return self.connection.execute(statement, values)

    def close(self) -> None:
        """Close the file; raises nothing."""
        with contextlib.suppress(self.Error):
            self.connection.close()

    def note(self, name: str) -> str:
        """What was noted; "": nothing."""
        row = self.one("SELECT value FROM note WHERE name = ?", name)
        return row[0] if row else ""

    def take_note(self, name: str, value: object) -> None:
        """Note how far something came."""
        self.write("INSERT OR REPLACE INTO note VALUES (?, ?)", name, str(value))

    # -- the journal

    def add_entry(self, entry: Entry, outcome: Outcome | None) -> None:
        """A row for an entry.  outcome None: to be done by the worker."""
        item, more = entry.item, entry.scrobble
        row: dict[str, object] = {"received_at": entry.received_at, "event": entry.event,
                                  "server": entry.server, "account_id": entry.account_id,
                                  "account": entry.account, "type": item.type, "title": item.title}
        if outcome is None or outcome.action != "event_not_scrobble":
            row |= {"rating_key": item.rating_key, "guid": item.guid,
                    "show_title": item.grandparent_title, "season": entry.season, "episode": entry.episode,
                    "year": more.year, "show_key": more.show_key, "show_guid": more.show_guid,
                    "guids": " ".join(more.guids)}
        if outcome:
            row |= {"status": outcome.status, "action": outcome.action, "reason": outcome.reason}
        else:
            row["retry_at"] = 0.0
        self.write(f"INSERT INTO webhook_log ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", *row.values())

    def due_entries(self, at: float, conflict_id: int | None = None) -> list[Entry]:
        """Some entries that are to be done by then, the oldest first.  conflict_id: only what waits for that one."""
        if conflict_id:
            return self.entries("conflict_id = ? AND retry_at <= ? ORDER BY id", conflict_id, at)
        return self.entries("retry_at <= ? ORDER BY retry_at, id LIMIT ?", at, BATCH)

    def entries(self, condition: str, *values: object) -> list[Entry]:
        """The entries for which a condition holds."""
        rows = self.all("SELECT received_at, event, server, account_id, account, type, rating_key, guid, title, "
                        "show_title, season, episode, show_key, show_guid, guids, year, id, attempts FROM webhook_log "
                        "WHERE " + condition, *values)
        return [Entry(row[0], row[1], row[2], row[3], row[4],
                      Item(row[5], row[6], row[7], row[8], "", row[9], parent_index=row[10], index=row[11]),
                      Scrobble(row[12], row[13], tuple(row[14].split()), row[15]), row[16], row[17]) for row in rows]

    def next_due(self) -> float:
        """When the next entry is due; infinity: none is."""
        at = self.one("SELECT min(retry_at) FROM webhook_log WHERE retry_at IS NOT NULL")[0]
        return math.inf if at is None else float(at)

    def is_done(self, entry: Entry) -> bool:
        """Whether an entry has been done meanwhile, by another process."""
        return self.one("SELECT 1 FROM webhook_log WHERE id = ? AND status IS NOT NULL AND retry_at IS NULL AND "
                        "action NOT IN ('conflict_created', 'episode_not_found')", entry.id) is not None

    def is_duplicate(self, entry: Entry) -> bool:
        """Whether the same account finished the same item just before or after, and that was a success."""
        item = entry.item
        return self.one("SELECT 1 FROM webhook_log WHERE rating_key = ? AND (rating_key <> '' OR (guid = ? AND "
                        "title = ? AND show_title = ? AND season IS ? AND episode IS ?)) AND "
                        "received_at BETWEEN ? AND ? AND server = ? AND account_id = ? AND account = ? AND "
                        "status = 'success' AND id <> ?", item.rating_key, item.guid, item.title,
                        item.grandparent_title, entry.season, entry.episode, entry.received_at - DUPLICATE_S,
                        entry.received_at + DUPLICATE_S, entry.server, entry.account_id, entry.account,
                        entry.id) is not None

    def knows_play(self, rating_key: str, server: str, viewed_at: float) -> bool:
        """Whether a play in the server's history is in the journal."""
        return self.one("SELECT 1 FROM webhook_log WHERE rating_key = ? AND received_at BETWEEN ? AND ? AND "
                        "server IN (?, '') AND event IN (?, ?) AND action IS NOT 'other_account'",
                        rating_key, viewed_at - SAME_PLAY_S, viewed_at + SAME_PLAY_S, server, SCROBBLE,
                        HISTORY) is not None

    def finish(self, entry: Entry, outcome: Outcome, retry_at: float | None, conflict_id: int | None) -> None:
        """What became of an entry."""
        self.write("UPDATE webhook_log SET status = ?, action = ?, reason = ?, show_id = ?, conflict_id = ?, "
                   "attempts = attempts + 1, retry_at = ? WHERE id = ?", outcome.status, outcome.action,
                   outcome.reason, outcome.match.show_id or None if outcome.match else None, conflict_id,
                   retry_at, entry.id)

    def prune(self, before: float) -> bool:
        """Delete some finished rows that are older; what failed stays.  -> Whether there may be more."""
        deleted = self.write("DELETE FROM webhook_log WHERE id IN (SELECT id FROM webhook_log WHERE received_at < ? "
                             "AND status <> 'failed' AND retry_at IS NULL LIMIT ?)", before, BATCH).rowcount
        return int(deleted) == BATCH

    # -- shows

    def show(self, show_id: int) -> Show | None:
        """The show or movie with an id."""
        rows = self.shows("id = ?", show_id)
        return rows[0] if rows else None

    def shows(self, condition: str, *values: object) -> list[Show]:
        """The shows and movies for which a condition holds."""
        rows = self.all("SELECT type, title, year, tmdb_id, tvdb_id, imdb_id, id FROM show WHERE " + condition, *values)
        return [Show(row[0], row[1], row[2], Ids(row[3], row[4], row[5]), row[6]) for row in rows]

    def match_ids(self, show: Show) -> Match | None:
        """The show that has one of these ids, the surest first."""
        surer = Ids()
        for column, confidence in CONFIDENCE.items():
            if value := getattr(show.ids, column):
                for known in self.shows(f"type = ? AND {column} = ?", show.type, value):
                    if not known.ids.contradicts(surer):
                        return Match(known.id, column, confidence)
                surer = surer._replace(**{column: value})
        return None

    def match_title(self, show: Show) -> Match | Conflict:
        """The show that is meant by title and year."""
        wanted = parse_title(show.title).normal
        exact = self.shows("normal = ? AND type = ?", wanted, show.type)
        verdict = choose_show(show, exact)
        if isinstance(verdict, Match):
            return verdict
        return choose_show(show, {each.id: each for each in exact + self.similar(wanted, show.type)}.values())

    def similar(self, wanted: str, type: str) -> list[Show]:
        """The shows whose titles are most like a normal title, by the index of their trigrams.

        All that are like enough to be taken are found.  Where there is none, those that a
        person may be asked about are, as far as MAX_POSTINGS of the index tell.
        """
        for share, most in ((TAKEN_ABOVE - YEAR_FITS, math.inf), (MIN_SIMILARITY, MAX_POSTINGS)):
            ids = self.sharing(sorted(trigrams(wanted)), share, most)
            found = self.all(f"SELECT normal, id FROM show WHERE id IN ({', '.join('?' * len(ids))}) AND +type = ?",
                             *ids, type)
            alike = [(each, row[1]) for row in found if (each := similarity(wanted, row[0])) >= share]
            if best := heapq.nlargest(MAX_SIMILAR, alike):
                return self.shows(f"id IN ({', '.join('?' * len(best))})", *(show_id for _, show_id in best))
        return []

    def sharing(self, each: Sequence[str], share: float, most: float) -> list[int]:
        """The ids of the shows, BATCH at most, that may share so much with n trigrams.

        A title that does has neither too few trigrams nor too many, and one at least of the
        rarest n - share * n + 1 of these: the long lists of the usual ones are not read.
        """
        sizes = math.ceil(share * len(each) - 1e-9), int(len(each) / share + 1e-9)
        within = f"trigram IN ({', '.join('?' * len(each))}) AND size BETWEEN ? AND ?"
        lengths = dict.fromkeys(each, 0) | dict(self.all(
            f"SELECT trigram, sum(length(shows)) / 4 FROM trigram WHERE {within} GROUP BY trigram", *each, *sizes))
        rare = sorted(each, key=lengths.__getitem__)[:len(each) - sizes[0] + 1]
        read = [one for one, sum_ in zip(rare, itertools.accumulate(map(lengths.__getitem__, rare)), strict=True)
                if sum_ <= most]
        lists: dict[int, list[bytes]] = collections.defaultdict(list)
        for size, shows in self.all(f"SELECT size, shows FROM trigram WHERE {within}",
                                    *read, *[""] * (len(each) - len(read)), *sizes):
            lists[size].append(shows)
        counts: collections.Counter[int] = collections.Counter()
        for size in lists:
            least = share * (len(each) + size) / (1 + share) - (len(each) - len(read)) - 1e-9
            shared = collections.Counter(memoryview(b"".join(lists[size])).cast("I"))
            counts.update({show_id: count for show_id, count in shared.items() if count >= least})
        return [show_id for show_id, _ in counts.most_common(BATCH)]

    def mapped(self, entry: Entry) -> Match | None:
        """The show that an entry's was found to be before; None: not known, or another one has its key now."""
        row = self.one("SELECT show_id, confidence, guid FROM mapping WHERE server = ? AND type = ? AND subject = ?",
                       entry.server, entry.item.type, entry.subject)
        if row is None or (row[2] and entry.show_guid and row[2] != entry.show_guid):
            return None
        return Match(row[0] or 0, "mapping", row[1])

    def is_another(self, entry: Entry, show_id: int) -> bool:
        """Whether a show is on an entry's server already, under another guid of Plex's: each show has but one."""
        return entry.show_guid.startswith("plex://") and self.one(
            "SELECT 1 FROM mapping WHERE show_id = ? AND server = ? AND guid LIKE 'plex://%' AND guid <> ?", show_id,
            entry.server, entry.show_guid) is not None

    def map(self, server: str, type: str, subject: str, guid: str, match: Match) -> None:
        """Remember what a server's show is; where a show is deleted, so is the mapping."""
        self.write("INSERT OR REPLACE INTO mapping VALUES (?, ?, ?, ?, ?, ?)", server, type, subject,
                   guid, match.show_id or None, match.confidence)

    def add_show(self, show: Show) -> int:
        """Add a show; -> its id.  A year that may be a season's is none of its."""
        plain = parse_title(show.title).normal
        show_id = self.write("INSERT INTO show (type, title, normal, year) VALUES (?, ?, ?, ?)", show.type,
                             show.title, plain, show.year if show.own_year else None).lastrowid
        each = trigrams(plain)
        self.connection.executemany(
            "INSERT INTO trigram VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
            "shows = CAST(shows || excluded.shows AS BLOB)",
            [(one, len(each), show_id.to_bytes(4, sys.byteorder)) for one in each])
        self.learn_ids(show_id, show.ids)
        return int(show_id)

    def learn_ids(self, show_id: int, ids: Ids) -> None:
        """Fill in ids that a show lacks and no other has."""
        for column in CONFIDENCE:
            if value := getattr(ids, column):
                self.write(f"UPDATE OR IGNORE show SET {column} = ? WHERE id = ? AND {column} IS NULL", value, show_id)

    def add_episodes(self, rows: Iterable[tuple[int, int, int, str, int | None, int]]) -> None:
        """Add or complete episodes: (show_id, season, episode, title, watched_at, plays).  An earlier date stays."""
        self.connection.executemany(
            "INSERT INTO episode VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "title = coalesce(nullif(excluded.title, ''), title), plays = max(plays, excluded.plays), "
            "watched_at = min(coalesce(watched_at, excluded.watched_at), coalesce(excluded.watched_at, watched_at))",
            [(*row[:3], row[3], *row[4:]) for row in rows])

    def has_episode(self, show_id: int, season: int | None, episode: int | None) -> bool:
        """Whether a show has an episode."""
        return self.one("SELECT 1 FROM episode WHERE show_id = ? AND season = ? AND episode = ?", show_id, season,
                        episode) is not None

    def mark(self, show_id: int, season: int | None, episode: int | None, at: float) -> bool:
        """Mark an episode as watched; -> whether it was not.  The first date stays, plays are counted."""
        watched = self.one("SELECT watched_at FROM episode WHERE show_id = ? AND season = ? AND episode = ?", show_id,
                           season, episode)[0]
        self.write("UPDATE episode SET plays = plays + 1, watched_at = ? WHERE show_id = ? AND season = ? AND "
                   "episode = ?", int(at) if watched is None else min(watched, int(at)), show_id, season, episode)
        return watched is None

    # -- conflicts

    def add_conflict(self, entry: Entry, show: Show, conflict: Conflict) -> tuple[int, bool]:
        """The open conflict about an entry's show, and whether it is new."""
        key = (entry.server, entry.item.type, entry.subject)
        known = self.one("SELECT id FROM conflict WHERE server = ? AND type = ? AND subject = ? AND resolution IS NULL",
                         *key)
        if known:
            return known[0], False
        candidates = json.dumps([[each.show.id, round(each.score, 2)] for each in conflict.candidates])
        ids = show.ids
        row = (time.time(), conflict.kind, *key, entry.show_guid, show.title,
               show.year if show.own_year else None, ids.tmdb_id,
               ids.tvdb_id, ids.imdb_id, candidates, None)
        return self.write(f"INSERT INTO conflict VALUES (NULL, {', '.join('?' * len(row))})", *row).lastrowid, True

    def resolve(self, conflict_id: int, show_id: int) -> None:
        """End a conflict: remember what its show is (0: ignored), and let what waited be done.  Twice is as once."""
        self.write("INSERT OR REPLACE INTO mapping SELECT server, type, subject, guid, ?, 1.0 FROM conflict "
                   "WHERE id = ?", show_id or None, conflict_id)
        self.write("UPDATE conflict SET resolution = ? WHERE id = ?", str(show_id or "ignore"), conflict_id)
        self.write("UPDATE webhook_log SET retry_at = 0 WHERE conflict_id = ? AND action = 'conflict_created'",
                   conflict_id)


def report_outcome(entry: Entry, outcome: Outcome, conflict_id: int | None = None) -> None:
    """A line of the log for what became of a webhook; a new conflict's names it."""
    level = {SUCCESS: logging.INFO, FAILED: logging.WARNING}.get(outcome.status, logging.DEBUG)
    said = entry.attempts > 0 if outcome.retry else outcome.action == "conflict_created" and conflict_id is None
    level = logging.DEBUG if said else level
    say(level, "webhook", **outcome_fields(entry, outcome), **({"conflict": conflict_id} if conflict_id else {}))


class _Ticket:
    """One request's place in a commit."""

    def __init__(self, entry: Entry, outcome: Outcome | None):
        self.entry, self.outcome = entry, outcome
        self.done = False
        self.error: TrackerError | None = TrackerError("the journal failed")      # until it is committed


class Journal:
    """Rows that are on the disk before their webhooks are answered.

    Request threads append; whoever comes first commits for all that wait: a burst costs a few
    waits for the disk, not one for each webhook.
    """

    def __init__(self, tracker: Tracker, accounts: str):
        """tracker: lasting, and used by nobody else."""
        self.tracker, self.accounts = tracker, accounts
        self.waiting: collections.deque[_Ticket] = collections.deque()
        self.committing = threading.Lock()
        self.written = threading.Event()              # there is something for the worker
        self.fails, self.said_at = False, -math.inf  # the latest commit; when that was said

    def append(self, webhook: Webhook) -> None:
        """Commit a webhook's row to the disk; raises TrackerError."""
        entry = entry_of(webhook, time.time())
        ticket = _Ticket(entry, first_outcome(webhook, entry, self.accounts))
        self.waiting.append(ticket)
        with self.committing:
            if not ticket.done:
                self.commit([self.waiting.popleft() for _ in range(len(self.waiting))])
        if ticket.error:
            raise ticket.error
        if ticket.outcome and ticket.outcome.action != "event_not_scrobble":
            report_outcome(ticket.entry, ticket.outcome)

    def commit(self, tickets: Sequence[_Ticket]) -> None:
        """Write the rows of all that wait, in one transaction."""
        try:
            with self.tracker.transaction():
                for ticket in tickets:
                    self.tracker.add_entry(ticket.entry, ticket.outcome)
            for ticket in tickets:
                ticket.error = None
            if self.fails:
                say(logging.INFO, "the tracker can be written again")
            self.fails = False
        except TrackerError as error:
            if time.monotonic() >= self.said_at + WARN_AGAIN_S:
                self.said_at = time.monotonic()
                say(logging.ERROR, f"webhooks are refused (503), for the tracker cannot be written: {error}")
            self.fails = True
            for ticket in tickets:
                ticket.error = error
        finally:
            for ticket in tickets:
                ticket.done = True
        if any(ticket.outcome is None and not ticket.error for ticket in tickets):
            self.written.set()


# === Worker: what is due in the journal -> marks, conflicts (Worker) ===

class TmdbError(Exception):
    """TMDB's or the network's fault, as a sentence; it can pass."""


class Tmdb:
    """themoviedb.org, which knows what shows of other databases are.  The token travels in a header only."""

    def __init__(self, token: Callable[[], str]):
        self.token = token
        self.url = os.environ.get("STREAMERBRAINZ_TMDB_URL", "https://api.themoviedb.org")       # a test's
        self.opener = plain_opener(ssl.create_default_context() if self.url.startswith("https:") else None)

    def find(self, column: str, value: object, type: str) -> int | None:
        """The TMDB id of a show's or movie's id of another database; None: it knows none.  Raises TmdbError."""
        request = urllib.request.Request(f"{self.url}/3/find/{value}?external_source={column}", headers={
            "Authorization": f"Bearer {self.token()}", "User-Agent": USER_AGENT})
        try:
            with self.opener.open(request, timeout=PLEX_S) as response:
                answer = mapping(json.loads(response.read(MAX_SESSIONS)))
        except urllib.error.HTTPError as error:
            error.close()
            hint = ": put a valid token into the -tmdb-token-file" if error.code in (401, 403) else ""
            raise TmdbError(f"TMDB answers {error.code}{hint}.") from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise TmdbError(f"TMDB cannot be reached ({why(getattr(error, 'reason', error))}).") from None
        found = answer.get("movie_results" if type == MOVIE else "tv_results")       # others are of other kinds
        return number(mapping(found[0]).get("id")) if isinstance(found, list) and len(found) == 1 else None


class Worker:
    """Finishes the journal's entries: finds the show, and marks what was watched or makes a conflict.

    The one writer of shows and marks in the daemon.  What it asks of the server and of TMDB it
    asks before a transaction; each entry is finished in one, so that a kill loses and doubles nothing.
    """

    def __init__(self, config: Config, tracker: Tracker, plex: PlexServer | None):
        self.config, self.tracker, self.plex = config, tracker, plex
        self.tmdb = Tmdb(SecretFile("-tmdb-token-file", config.tmdb_token_file).first) if config.tmdb_token_file \
            else None
        self.machine_identifier = ""                  # the server's, when it has said it
        self.down: PlexError | TmdbError | None = None        # why nobody can be asked any more, in this round

    def run(self, written: threading.Event) -> None:
        """For ever: what is due, and what no webhook told.  written: set when there is more to do."""
        history_at, pause_s, fails = 0.0, 0.0, False
        while True:
            written.wait(max(0.0, pause_s))
            written.clear()
            try:
                if time.monotonic() >= history_at:
                    history_at = time.monotonic() + (HISTORY_S if self.recover() else HISTORY_RETRY_S)
                    self.prune()
                self.drain()
                pause_s = min(history_at - time.monotonic(), self.tracker.next_due() - time.time())
                if fails:
                    say(logging.INFO, "the tracker goes on")
                fails = False
            except TrackerError as error:
                say(logging.DEBUG if fails else logging.ERROR, f"the tracker cannot go on for now: {error}")
                pause_s, fails = TRACKER_RETRY_S, True

    def drain(self, conflict_id: int | None = None) -> int:
        """Finish all that is due, or that waits for a conflict; -> how many there were."""
        count, self.down = 0, None
        while entries := self.tracker.due_entries(time.time(), conflict_id):
            for entry in entries:
                self.finish(entry)
            count += len(entries)
        return count

    def finish(self, entry: Entry) -> None:
        """Find out what becomes of an entry, and write it down."""
        verdict: Match | Conflict | PlexError | TmdbError
        show, episodes = entry.show, []
        try:
            show, verdict = self.identify(entry)
            wanted = isinstance(verdict, Conflict) and self.may_add(show, verdict)
            if wanted or (isinstance(verdict, Match) and verdict.show_id and
                          not self.tracker.has_episode(verdict.show_id, entry.season, entry.episode)):
                episodes = self.episodes(entry)
        except (PlexError, TmdbError) as error:
            verdict = error
        new = False
        with self.tracker.transaction():
            if self.tracker.is_done(entry):
                return
            if not isinstance(verdict, Match) or verdict.by != "mapping":
                verdict = self.tracker.mapped(entry) or verdict       # another process may have written meanwhile
            if isinstance(verdict, Conflict):
                verdict = self.tracker.match_ids(show) or self.tracker.match_title(show)
            if isinstance(verdict, Match) and verdict.by == "title" and self.tracker.is_another(entry, verdict.show_id):
                verdict = Conflict("ambiguous", candidates_of(show, self.tracker.show(verdict.show_id)))
            outcome, conflict_id = self.conclude(entry, show, verdict, episodes), None
            if outcome.action == "conflict_created" and isinstance(verdict, Conflict):
                conflict_id, new = self.tracker.add_conflict(entry, show, verdict)
            wait_s = retry_after_s(entry.attempts) if outcome.retry else None
            self.tracker.finish(entry, outcome, None if wait_s is None else time.time() + wait_s, conflict_id)
        report_outcome(entry, outcome, conflict_id if new else None)

    def conclude(self, entry: Entry, show: Show, verdict: Match | Conflict | PlexError | TmdbError,
                 episodes: Sequence[tuple[int, int, str]]) -> Outcome:
        """What becomes of an entry, done within the transaction that writes it down."""
        if self.tracker.is_duplicate(entry):
            return Outcome(DUPLICATE, "ignored_duplicate", f"the same was finished within {DUPLICATE_S:.0f} s of this",
                           verdict if isinstance(verdict, Match) else None)
        if isinstance(verdict, Match):
            return self.mark(entry, show, verdict, episodes)
        if not isinstance(verdict, Conflict):
            return Outcome(FAILED, "plex_unreachable", str(verdict), retry=True)
        if not self.may_add(show, verdict):
            return Outcome(FAILED, "conflict_created", conflict_reason(show, verdict))
        match = Match(self.tracker.add_show(show), "new", 1.0)
        outcome = self.mark(entry, show, match, [*episodes, (entry.season or 0, entry.episode or 0, entry.item.title)])
        return outcome._replace(action="auto_added_show") if outcome.action == "marked_watched" else outcome

    def mark(self, entry: Entry, show: Show, match: Match, episodes: Sequence[tuple[int, int, str]]) -> Outcome:
        """Mark an entry's episode of the show that is meant; episodes: that the show may lack."""
        if not match.show_id:
            return Outcome(IGNORED, "auto_mark_disabled", "a person chose to ignore this show")
        if match.by != "mapping":
            self.tracker.map(entry.server, entry.item.type, entry.subject, entry.show_guid, match)
            if match.by in CONFIDENCE:
                self.tracker.learn_ids(match.show_id, show.ids)
        self.tracker.add_episodes((match.show_id, *episode, None, 0) for episode in episodes)
        if not self.tracker.has_episode(match.show_id, entry.season, entry.episode):
            return Outcome(FAILED, "episode_not_found", "the show has no such episode, here or on the server; "
                           "`tracker import` tries again", match)
        if not self.config.auto_mark_watched:
            return Outcome(IGNORED, "auto_mark_disabled", "-no-auto-mark-watched is given", match)
        if not self.tracker.mark(match.show_id, entry.season, entry.episode, entry.received_at):
            return Outcome(SUCCESS, "already_watched", "its first date stays", match)
        return Outcome(SUCCESS, "recovered" if entry.event == HISTORY else "marked_watched", "", match)

    def may_add(self, show: Show, conflict: Conflict) -> bool:
        """Whether a show that the tracker lacks is certain enough to be added."""
        alike = any(each.score > TAKEN_ABOVE for each in conflict.candidates)
        return self.config.auto_add_shows and bool(show.ids) and not alike

    # -- which show

    def identify(self, entry: Entry) -> tuple[Show, Match | Conflict]:
        """An entry's show, as far as it is known, and which of the tracker's it is; raises PlexError, TmdbError."""
        show = entry.show
        if mapped := self.tracker.mapped(entry):
            return show, mapped
        if match := self.tracker.match_ids(show):
            return show, match
        show = self.ask_server(entry)
        return show, self.tracker.match_ids(show) or self.ask_tmdb(show) or self.tracker.match_title(show)

    def ask_server(self, entry: Entry) -> Show:
        """The show of an entry with what the server says of it, where it is our server."""
        show, key = entry.show, entry.item.rating_key if entry.item.type == MOVIE else entry.scrobble.show_key
        for fields in self.library(entry, f"/library/metadata/{urllib.parse.quote(key, '')}?includeGuids=1", key):
            guid = text(fields.get("guid")).partition("?")[0]
            if "" in (guid, entry.show_guid) or guid == entry.show_guid:
                known, year = parse_ids((*item_guids(fields), guid, entry.show_guid)), number(fields.get("year"))
                return Show(show.type, text(fields.get("title")) or show.title, year or show.year, known,
                            own_year=year is not None or show.own_year)
        return show

    def episodes(self, entry: Entry) -> list[tuple[int, int, str]]:
        """Season, number and title of each episode that the server has of an entry's show."""
        key = entry.scrobble.show_key if entry.item.type == EPISODE else ""
        found = (parse_item(fields) for fields in
                 self.library(entry, f"/library/metadata/{urllib.parse.quote(key, '')}/allLeaves", key))
        return [(item.parent_index or 0, item.index or 0, item.title) for item in found
                if is_number(item.parent_index) and is_number(item.index)]

    def library(self, entry: Entry, path: str, key: str) -> list[Mapping[str, Any]]:
        """What our server's library has at a path; nothing where the entry is of another server."""
        if self.down:
            raise self.down
        if not self.plex or not key:
            return []
        try:
            if entry.server not in ("", self.identity()):
                return []
            return [fields for page in self.plex.pages(path) for fields in page.items]
        except PlexError as error:
            if error.fault == "missing":
                return []
            self.down = error if error.fault != "nonsense" else None      # that may be this one item's
            raise

    def identity(self) -> str:
        """The server's machineIdentifier; raises PlexError."""
        if not self.machine_identifier and self.plex:
            self.machine_identifier = self.plex.identity()
        return self.machine_identifier

    def ask_tmdb(self, show: Show) -> Match | None:
        """The show that TMDB says has one of these ids; raises TmdbError."""
        for column in ("tvdb_id", "imdb_id"):
            value = getattr(show.ids, column)
            if self.tmdb and value and show.ids.tmdb_id is None and (show.type, column) != (MOVIE, "tvdb_id"):
                tmdb_id = self.find(column, value, show.type)
                for known in self.tracker.shows("type = ? AND tmdb_id = ?", show.type, tmdb_id) if tmdb_id else ():
                    return Match(known.id, column, CONFIDENCE[column])
        return None

    def find(self, column: str, value: object, type: str) -> int | None:
        """As of Tmdb, remembered: what it found for ever, that it found nothing for a day."""
        assert self.tmdb
        source = f"{type} {column}"
        row = self.tracker.one("SELECT tmdb_id, at FROM found WHERE source = ? AND external_id = ?", source, value)
        if row and (row[0] or time.time() - row[1] < FOUND_NOTHING_S):
            return int(row[0]) if row[0] else None
        if self.down:
            raise self.down
        try:
            tmdb_id = self.tmdb.find(column, value, type)
        except TmdbError as error:
            self.down = error
            raise
        with self.tracker.transaction():
            self.tracker.write("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", source, str(value), tmdb_id,
                               time.time())
        return tmdb_id

    # -- what no webhook told

    def recover(self) -> bool:
        """Put into the journal what the server's history has and no webhook told; -> whether the server answered."""
        if not self.plex:
            return True
        since, until = int(self.tracker.note("history")), int(time.time() - HISTORY_REST_S)
        try:
            server, accounts = self.identity(), self.accounts()
            path = f"/status/sessions/history/all?sort=viewedAt:asc&viewedAt%3E={since}"
            for page in self.plex.pages(path):
                plays = [(entry, number(fields.get("viewedAt")) or 0) for fields in page.items
                         if (entry := history_entry(fields, server, accounts))]
                with self.tracker.transaction():
                    for entry, viewed_at in plays:
                        if since <= viewed_at <= until and not self.tracker.knows_play(entry.item.rating_key, server,
                                                                                        viewed_at):
                            self.tracker.add_entry(entry, None)
                    seen = [number(fields.get("viewedAt")) or 0 for fields in page.items]
                    self.tracker.take_note("history", max([since, *(at for at in seen if at <= until)]))
        except PlexError as error:
            say(logging.DEBUG, f"the server's history was not read: {error}")
            return error.fault not in ("unreachable", "starting")
        return True

    def accounts(self) -> set[str] | None:
        """The ids by which the server knows -accounts; None: all count.  Raises PlexError."""
        if self.config.accounts in ("", "*"):
            return None if self.config.accounts else {"1"}              # 1 is the owner
        assert self.plex
        wanted = split_accounts(self.config.accounts)
        try:
            known = [fields for page in self.plex.pages("/accounts") for fields in page.items]
        except PlexError as error:
            if error.fault in ("unreachable", "starting"):
                raise
            known = []
        return wanted | {text(each.get("id")) for each in known if text(each.get("name")).casefold() in wanted}

    def prune(self) -> None:
        """Delete old rows that are finished."""
        more = self.config.tracker_log_days > 0
        while more:
            with self.tracker.transaction():          # short ones: answers wait for them
                more = self.tracker.prune(time.time() - self.config.tracker_log_days * 86400)


# === Listener: sockets -> inbox; Status -> sockets ===

class Board:
    """What the Watcher tells the request threads: references that it replaces, and a queue for each stream."""

    def __init__(self) -> None:
        self.status = Status()
        self.busy_since: float | None = None          # monotonic s; None: the main loop waits for something to do
        self.streams: list[queue.SimpleQueue[bytes | None]] = []
        self.room = threading.BoundedSemaphore(MAX_STREAMS)

    def publish(self, status: Status, changes: Sequence[Change]) -> None:
        """Replace what is known, and tell each stream of the changes; one that reads too slowly is dropped."""
        self.status = status
        for change in changes:
            fields = json_line({**change_fields(change, name_machine=True), "by": change.by})
            for stream in self.streams[:]:
                stream.put(f"event: change\ndata: {fields}\n\n".encode() if stream.qsize() < MAX_UNREAD else None)

    @contextlib.contextmanager
    def stream(self) -> Iterator[queue.SimpleQueue[bytes | None]]:
        """A queue of events, each as it is sent; None: the end.  Raises WebhookError 503 where there are too many."""
        if not self.room.acquire(blocking=False):
            raise WebhookError(503, f"{MAX_STREAMS} listen to the events already.")
        stream: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.streams.append(stream)
        try:
            yield stream
        finally:
            self.streams.remove(stream)
            self.room.release()


class Covers:
    """The server's pictures, the latest kept.

    One request thread at a time asks the server for one, and waits for it; no other does.
    """

    def __init__(self, plex: PlexServer | None):
        self.plex, self.lock, self.latest = plex, threading.Lock(), ("", b"")

    def get(self, item: Item) -> bytes:
        """The picture of an item; b"": there is none."""
        with self.lock:
            if self.latest[0] != item.identity and item.thumb and (picture := self.fetch(item.thumb)):
                self.latest = item.identity, picture
            return self.latest[1] if self.latest[0] == item.identity else b""

    def fetch(self, path: str) -> bytes:
        """What the server has at a path of its library; b"": nothing, or too much."""
        with contextlib.suppress(PlexError):
            if self.plex:
                with self.plex.open(path) as response:
                    response.reader.room = MAX_COVER
                    return response.read()
        return b""


def local_time(form: str, at: float) -> str:
    """A Unix time in this machine's time zone."""
    return time.strftime(form, time.localtime(at))


def picture_type(picture: bytes) -> str:
    """What kind of picture these bytes are; "": none that a page shows."""
    kinds = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
    return next((kind for begin, kind in kinds.items() if picture.startswith(begin)), "")


def process_figures(started_at: float) -> dict[str, float]:
    """The figures of this process, by Prometheus' names."""
    figures = {"process_start_time_seconds": started_at, "process_cpu_seconds_total": time.process_time(),
               "process_threads": threading.active_count()}
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        figures["process_resident_memory_bytes"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return figures


def glance(path: str) -> Glance:
    """What the page shows of a tracker; raises TrackerError, ConfigError."""
    with contextlib.closing(Tracker(path, write=False)) as store:
        marked = store.all("SELECT received_at, type, show_title, season, episode, title FROM webhook_log WHERE "
                           "status = 'success' ORDER BY id DESC LIMIT 5")
        conflicts = store.all("SELECT id, title, year, kind FROM conflict WHERE resolution IS NULL ORDER BY id LIMIT 5")
    return Glance(tuple((row[0], f"{row[2]} S{row[3]:02}E{row[4]:02}" if row[1] == EPISODE else row[5])
                        for row in marked),
                  tuple((row[0], named(row[1], row[2]), row[3]) for row in conflicts))


def journal_rows(store: Tracker) -> dict[str, int]:
    """Rows of the journal by status."""
    return dict(store.all("SELECT coalesce(status, 'waiting'), count(*) FROM webhook_log GROUP BY 1"))


def oldest_waiting_s(path: str) -> float:
    """The age of the oldest entry that has not been begun; raises TrackerError, ConfigError."""
    with contextlib.closing(Tracker(path, write=False)) as store:
        oldest = store.one("SELECT min(received_at) FROM webhook_log WHERE retry_at IS NOT NULL AND status IS NULL")[0]
    return 0.0 if oldest is None else time.time() - oldest


class Refused(NamedTuple):
    """A request that was refused."""
    status: int                   # of the answer
    sentence: str                 # and its body
    path: str
    address: str                  # who sent it
    from_plex: bool               # by its User-Agent


class Crash(NamedTuple):
    """A bug of ours in another thread: it ends the process from the main thread."""
    error: BaseException


class Stop(NamedTuple):
    """A signal to end."""


class Reload(NamedTuple):
    """A signal to read the token again."""


def sender(address: str) -> str:
    """Who sends from an address: an IPv4 address, or the /64 of an IPv6 address, which is one household's."""
    address = address.partition("%")[0].removeprefix("::ffff:")
    return address if "." in address else socket.inet_pton(socket.AF_INET6, address)[:8].hex()


def given_secrets(query: str) -> list[bytes]:
    """The secrets in a URL's query: a "+" is one, and no blank, as `openssl rand -base64` makes them."""
    pairs = (pair.partition("=") for pair in query.split("&")[:MAX_PAIRS])
    return [urllib.parse.unquote_to_bytes(value) for name, _, value in pairs if name in ("token", "secret") and value]


class Gate:
    """Who may send: who knows the secret, and not too often from one address."""

    def __init__(self, secret: SecretFile | None = None, a_minute: int = 0):
        """a_minute: webhooks from one address; 0: no limit."""
        self.secret, self.a_minute = secret, a_minute
        self.tokens: dict[str, tuple[float, float]] = {}     # sender -> tokens left, and when
        self.lock = threading.Lock()

    def count(self, address: str) -> None:
        """Count a webhook; raises WebhookError 429."""
        if not self.a_minute:
            return
        with self.lock:
            who, now = sender(address), time.monotonic()
            tokens, at = self.tokens.pop(who, (float(self.a_minute), now))
            tokens, wait_s = spend(tokens, now - at, self.a_minute)
            self.tokens[who] = tokens, now
            if len(self.tokens) > MAX_ADDRESSES:
                del self.tokens[next(iter(self.tokens))]
        if wait_s:
            raise WebhookError(429, f"More than {self.a_minute} webhooks a minute came from your address; "
                               "try again in a moment.", math.ceil(wait_s))

    def plain(self, path: str) -> str:
        """A path as it may be logged: what was pasted wrongly may have the secret in it."""
        path = re.match(r"[\w/.~-]*", path, re.ASCII)[0][:MAX_PATH]  # type: ignore[index]
        for word in self.secret.words if self.secret else ():
            path = path.replace(word, "...")
        return path

    def check(self, query: str) -> None:
        """Check the secret in a URL's query; raises WebhookError 401."""
        if self.secret is None:
            return
        with self.lock:
            words = self.secret.renewed()
        known = [hmac.compare_digest(each, word.encode("ascii")) for each in given_secrets(query) for word in words]
        if not any(known):
            raise WebhookError(401, "The secret is missing or wrong: the URL must end in ?token= and the secret.")


Message = Webhook | Notification | Stream | Refused | Crash | Stop | Reload
WEBHOOK_PATH = "/webhooks/plex"
EVERYWHERE = ("", "0.0.0.0", "::")    # of -webhooks-host
TEST_EVENT = "streamerbrainz.test"    # of doctor's webhook, which changes nothing


def guess_address(plex_url: str) -> str:
    """This machine's address as its network, or the server, sees it; no packet is sent."""
    server = urllib.parse.urlsplit(plex_url).hostname or "192.0.2.1"
    with contextlib.suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server, 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()


def webhook_url(host: str, port: int) -> str:
    """The URL of our webhooks."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{WEBHOOK_PATH}"


def listening_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address to bind for a host; "" is every address, of IPv6 too where the machine has it."""
    if host:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return family, address
    return (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (socket.AF_INET, ("0.0.0.0", port))


class _Head:
    """The lines of a request's head, at most MAX_HEAD bytes of them."""

    def __init__(self, rest: io.BufferedReader):
        self.rest, self.room = rest, MAX_HEAD

    def readline(self, limit: int) -> bytes:
        """As of a file; raises LineTooLong, which http.server answers with 431, when the head is too long."""
        if self.room < 0:
            raise http.client.LineTooLong("head")
        line = self.rest.readline(min(limit, self.room + 1))
        self.room -= len(line)
        return line

    def close(self) -> None:
        """As of a file: the connection broke within its head."""
        self.rest.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: its requests in turn, each answered at once; only a picture may wait for Plex."""
    protocol_version = "HTTP/1.1"
    wbufsize = -1                    # head and body of an answer in one packet
    disable_nagle_algorithm = True
    retry_s = 5                      # of an answer 429 or 503
    server: Listener
    rfile: io.BufferedReader

    def setup(self) -> None:
        super().setup()
        self.opened_at = time.monotonic()

    def handle_one_request(self) -> None:
        """Wait for a request for KEEP_ALIVE_S, read its head within HEAD_S, the rest within REQUEST_S, and answer."""
        self.close_connection = True
        self.server.deadlines[self.connection] = time.monotonic() + KEEP_ALIVE_S
        if self.rfile.peek(1):
            self.server.deadlines[self.connection] = time.monotonic() + HEAD_S
            self.rfile = _Head(self.rfile)  # type: ignore[assignment]
            super().handle_one_request()

    def parse_request(self) -> bool:
        """Parse the head; what follows is read without its limits."""
        try:
            return super().parse_request()
        except (ValueError, TypeError, LookupError):  # email.parser's, on a Content-Type that makes no sense
            self.send_error(400)
            return False
        finally:
            self.rfile = self.rfile.rest  # type: ignore[attr-defined]
            self.server.deadlines[self.connection] = time.monotonic() + REQUEST_S

    def __getattr__(self, name: str) -> Callable[[], None]:
        """do_GET, do_POST and every other method: the path decides what is allowed."""
        if name.startswith("do_"):
            return self.respond
        raise AttributeError(name)

    def respond(self) -> None:
        """Answer a request whose head is read."""
        try:
            with contextlib.ExitStack() as held:
                self.admit()
                length = self.length()
                self.route(self.read_chunks(held) if length is None else self.read_exactly(length, held))
        except WebhookError as error:
            self.refuse(error)

    def admit(self) -> None:
        """Turn away who sends too much or does not know the secret, before the body is read."""
        gate, path = self.server.gate, self.target()
        try:
            if path == WEBHOOK_PATH:
                gate.count(self.client_address[0])
            if path != "/healthz":
                gate.check(self.path.partition("?")[2])
        except WebhookError:
            self.close_connection = True
            raise

    def refuse(self, error: WebhookError) -> None:
        """Answer what is wrong, and tell of it."""
        self.retry_s = error.retry_s
        self.answer(error.status, f"{error}\n")
        if self.headers.get("User-Agent") == USER_AGENT:
            return                                    # doctor's: it changes nothing
        from_plex = self.headers.get("User-Agent", "").startswith("PlexMediaServer/")
        self.server.tell(Refused(error.status, str(error), self.server.gate.plain(self.target()),
                                 self.client_address[0], from_plex))

    def route(self, body: Body) -> None:
        """Answer a request that is read whole; raises WebhookError."""
        path = self.target()
        pages = {"/": self.show_page, "/now": self.tell_now, "/events": self.tell_events, "/cover": self.show_cover,
                 "/healthz": self.tell_health, "/metrics": self.tell_metrics}
        if path == WEBHOOK_PATH:
            self.allow("POST")
            webhook, thumb = parse_webhook(self.headers.get("Content-Type", ""), body)
            if webhook.event != TEST_EVENT:           # doctor's: it changes nothing
                self.server.take(webhook, thumb)
            self.answer(200, f"{TEST_EVENT} has arrived\n" if webhook.event == TEST_EVENT else "")
        elif path in pages:
            self.allow("GET", "HEAD")
            pages[path]()
        else:
            raise WebhookError(404, f"Nothing is here. Plex sends its webhooks to {WEBHOOK_PATH}.")

    def show_page(self) -> None:
        """The status page."""
        nonce, has_secret = secrets.token_urlsafe(16), self.server.gate.secret is not None
        shown = None
        with contextlib.suppress(TrackerError, ConfigError):
            shown = glance(self.server.tracker_db) if self.server.tracker_db else None
        status = self.server.board.status
        item = status.player.item if status.player else None
        has_picture = item is not None and (self.server.thumb[0] == item.identity or
                                            bool(item.thumb and self.server.covers.plex))
        content = page(status, time.monotonic(), self.own_url(), has_secret, nonce, has_picture, shown,
                       local_time)
        self.answer(200, content, "text/html; charset=utf-8", {
            "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})

    def own_url(self) -> str:
        """The URL of our webhooks, as whoever asks for the page sees this machine; the server is elsewhere, perhaps."""
        host = self.headers.get("Host", "")
        here = re.fullmatch(r"(localhost|127\.[\d.]+|\[::1\])(:\d+)?", host)
        if self.server.server_address[0] in ("127.0.0.1", "::1"):
            return webhook_url(self.server.server_address[0], self.server.port)       # the demo's
        if here or not re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9A-Fa-f:]+\](:\d+)?", host, re.ASCII):
            return webhook_url(guess_address(self.server.plex_url), self.server.port)
        return f"http://{host}{WEBHOOK_PATH}"

    def show_cover(self) -> None:
        """The picture of what plays: the webhook's, else the server's."""
        player = self.server.board.status.player
        item = player.item if player else None
        picture, key = b"", urllib.parse.parse_qs(self.path.partition("?")[2]).get("key", [""])[0]
        if item and key in ("", item.identity):
            identity, jpeg = self.server.thumb
            picture = jpeg if identity == item.identity else self.server.covers.get(item)
        if not (kind := picture_type(picture)):
            raise WebhookError(404, "There is no picture of what plays.")
        self.answer(200, picture, kind, {"Cache-Control": "private, max-age=3600"})

    def tell_now(self) -> None:
        """What plays, as JSON."""
        fields = now_fields(self.server.board.status, time.monotonic())
        self.answer(200, json_line(fields) + "\n", "application/json", {"Cache-Control": "no-store"})

    def tell_events(self) -> None:
        """Each change, as it is reported, until whoever listens goes or is too slow."""
        with self.server.board.stream() as stream, contextlib.suppress(OSError):
            self.close_connection = True
            self.server.deadlines[self.connection] = math.inf      # nothing is read any more
            self.connection.settimeout(PLEX_S)
            self.send_response(200)
            for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"),
                                ("Connection", "close"), ("X-Content-Type-Options", "nosniff")):
                self.send_header(name, value)
            self.end_headers()
            event: bytes | None = b": StreamerBrainz\n\n"
            while event is not None and self.command != "HEAD":
                self.wfile.write(event)
                self.wfile.flush()
                try:
                    event = stream.get(timeout=EVENT_ALIVE_S)
                except queue.Empty:
                    event = b": alive\n\n"

    def tell_health(self) -> None:
        """Whether all is well, as JSON; 503 with the reasons where it is not."""
        board, oldest_s, broken = self.server.board, 0.0, ""
        try:
            oldest_s = oldest_waiting_s(self.server.tracker_db) if self.server.tracker_db else 0.0
        except (TrackerError, ConfigError) as error:
            broken = str(error)
        busy_since = board.busy_since
        busy_s = time.monotonic() - busy_since if busy_since is not None else 0.0
        status, fields = health(board.status, busy_s, oldest_s, broken, time.monotonic())
        self.answer(status, json_line(fields) + "\n", "application/json", {"Cache-Control": "no-store"})

    def tell_metrics(self) -> None:
        """All figures, for Prometheus."""
        rows: dict[str, int] = {}
        if self.server.tracker_db:
            with contextlib.suppress(TrackerError, ConfigError), \
                    contextlib.closing(Tracker(self.server.tracker_db, write=False)) as store:
                rows = journal_rows(store)
        figures = process_figures(self.server.started_at)
        content = metric_lines(self.server.board.status, rows, figures, time.monotonic())
        self.answer(200, content, "text/plain; version=0.0.4; charset=utf-8", {"Cache-Control": "no-store"})

    def target(self) -> str:
        """The path that is asked for, without its query; proxies put scheme and host before it."""
        return re.sub(r"^https?://[^/]*", "", self.path).partition("?")[0]

    def allow(self, *methods: str) -> None:
        if self.command not in methods:
            self.allowed = ", ".join(methods)
            raise WebhookError(405, f"Only {self.allowed} is answered here.")

    def length(self) -> int | None:
        """Bytes of the body; None: in chunks.  Raises WebhookError for what is ambiguous, missing or too much."""
        lengths, codings = self.headers.get_all("Content-Length", []), self.headers.get_all("Transfer-Encoding", [])
        if any(isinstance(defect, email.errors.MissingHeaderBodySeparatorDefect) for defect in self.headers.defects):
            raise self.broken(400, "A line of the request's head is no header.")
        if codings:
            if lengths or [coding.strip().lower() for coding in codings] != ["chunked"]:
                raise self.broken(400, "A body is either chunked or has a Content-Length.")
            return None
        if not lengths:
            if self.command in ("POST", "PUT", "PATCH"):
                raise self.broken(411, "The request has no Content-Length.")
            return 0
        if len(set(lengths)) > 1 or not (lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 20):
            raise self.broken(400, "The Content-Length is not a number.")
        if int(lengths[0]) > MAX_BODY:
            raise self.broken(413, f"The body is larger than {MAX_BODY} bytes.")
        return int(lengths[0])

    def broken(self, status: int, sentence: str) -> WebhookError:
        """An error after which the connection cannot go on: where the next request begins is not known."""
        self.close_connection = True
        return WebhookError(status, sentence)

    def enter_large(self, held: contextlib.ExitStack) -> None:
        """Wait for a place among the large bodies, until `held` is closed; then be quick."""
        held.enter_context(self.server.large_bodies)
        self.server.deadlines[self.connection] = min(self.server.deadlines[self.connection], time.monotonic() + LARGE_S)

    def read_exactly(self, length: int, held: contextlib.ExitStack) -> Body:
        """A body of so many bytes.  A large one gets pages of its own: malloc would keep them, for each thread."""
        if length <= LARGE_BODY:
            body: Body = self.rfile.read(length)
            got = len(body)
        else:
            body = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with memoryview(body) as view:
                got = self.rfile.readinto(view[:LARGE_BODY])
                if got == LARGE_BODY:
                    self.enter_large(held)
                    got += self.rfile.readinto(view[LARGE_BODY:])
        if got < length:
            raise self.broken(400, "The body is shorter than its Content-Length.")
        return body

    def read_chunks(self, held: contextlib.ExitStack) -> bytearray:
        """A body with Transfer-Encoding: chunked (RFC 9112, 7.1), of at most MAX_BODY; trailers are passed over."""
        body = bytearray()
        while size := self.chunk_size():
            total = len(body) + size
            if total > MAX_BODY:
                raise self.broken(413, f"The body is larger than {MAX_BODY} bytes.")
            if len(body) <= LARGE_BODY < total:
                self.enter_large(held)
            body += self.rfile.read(size)
            if len(body) < total:
                raise self.broken(400, "A chunk of the body is cut short.")
            if self.rfile.readline(3).strip():
                raise self.broken(400, "A chunk of the body is longer than its size.")
        for _ in range(100):                          # trailers, as many as http.server takes headers
            if not self.rfile.readline(65537).strip():
                return body
        raise self.broken(400, "The chunked body has too many trailers.")

    def chunk_size(self) -> int:
        """The size of the next chunk; 0: the last."""
        size = self.rfile.readline(1025).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size):
            raise self.broken(400, "A chunk of the body has no size.")
        return int(size, 16)

    def handle_expect_100(self) -> bool:
        """Invite the body, unless its size alone is refused."""
        try:
            self.length()
        except WebhookError as error:
            self.refuse(error)
            return False
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def answer(self, status: int, body: str | bytes = "", media_type: str = "text/plain; charset=utf-8",
               headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Send a whole answer."""
        content = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
        if len(self.server.deadlines) >= MAX_CONNECTIONS and time.monotonic() - self.opened_at > CROWDED_S:
            self.close_connection = True              # others wait for a thread
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("Content-Type", media_type)
            self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", self.allowed)
        if status in (429, 503):
            self.send_header("Retry-After", str(self.retry_s))
        if status == 401:
            self.send_header("WWW-Authenticate", "Secret")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own refusals (of a broken head), as plain text; the sender's fault is never a 5xx."""
        self.close_connection, self.request_version = True, self.protocol_version
        self.answer(code if code < 500 else 400, "This is no HTTP request that is understood here.\n")

    def finish(self) -> None:
        """Close so that a refusal arrives: to close on unread bytes would reset it away."""
        super().finish()
        self.server.deadlines[self.connection] = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(65536):
                pass

    def version_string(self) -> str:
        """The Server header, by which another start of ours knows this one."""
        return USER_AGENT

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what becomes of a webhook is the Watcher's to say."""


class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The HTTP listener.  Owns the listening socket; a thread for each of at most MAX_CONNECTIONS connections.

    serve() runs in a thread of its own until close() is called from another one.  Time limits
    hold for whole requests: one on each read is none, a peer that drips bytes never meets it.
    """
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024        # a burst of connections waits here, not for TCP to try again

    def __init__(self, host: str, port: int, inbox: queue.SimpleQueue[Message], machine_identifier: str = "",
                 gate: Gate | None = None, board: Board | None = None):
        """host "": all addresses.  port 0: a free one.  Raises OSError as bind() does."""
        self.inbox, self.machine_identifier, self.gate = inbox, machine_identifier, gate or Gate()
        self.journal: Journal | None = None                  # with a tracker: what is written before the answer
        self.tracker_db, self.plex_url, self.started_at = "", "", time.time()
        self.board, self.covers = board or Board(), Covers(None)
        self.deadlines: dict[socket.socket, float] = {}      # of each open connection; its thread moves it on
        self.room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.large_bodies = threading.BoundedSemaphore(MAX_LARGE_BODIES)
        self.thumb = ("", b"")       # Item.identity and JPEG, the latest; replaced by the thread that has a new one
        self.closing = threading.Event()
        self.address_family, address = listening_address(host, port)
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    def serve(self) -> None:
        """Accept connections and end those whose time is up, until close(); then free the port.  Sleeps in between."""
        while not self.closing.is_set():
            if self.room.acquire(timeout=REAP_S):    # the connection one too many waits in the kernel
                self.room.release()                  # (none but process_request, called below, takes it for good)
                soon = any(deadline < math.inf for deadline in list(self.deadlines.values()))
                self.timeout = REAP_S if soon else None
                self.handle_request()
            for connection, deadline in list(self.deadlines.items()):
                if time.monotonic() > deadline:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)     # its thread reads the end, however it waits
        self.server_close()

    def close(self) -> None:
        """End serve(), from another thread; open connections end with the process."""
        self.closing.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)   # wakes handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread."""
        self.room.acquire()
        self.deadlines[request] = time.monotonic() + KEEP_ALIVE_S
        try:
            super().process_request(request, client_address)
        except RuntimeError:                          # no more threads on this machine
            self.forget(request)
            self.shutdown_request(request)

    def forget(self, request: Any) -> None:
        """A connection is over."""
        self.deadlines.pop(request, None)
        self.room.release()

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(REST_S)                        # no more files on this machine: do not spin
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is its peer's affair; anything else is a bug of ours."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            self.inbox.put(Crash(error))

    def tell(self, message: Message) -> bool:
        """Put a message into the inbox; -> whether there was room for it."""
        room = self.inbox.qsize() < MAX_INBOX
        if room:
            self.inbox.put(message)
        return room

    def take(self, webhook: Webhook, thumb: memoryview) -> None:
        """Put a webhook into the inbox and the journal, its thumb aside; raises WebhookError 503: it is not safe."""
        if not self.tell(webhook):
            raise WebhookError(503, "Too many webhooks wait; try again in a moment.")
        if self.journal:
            try:
                self.journal.append(webhook)
            except TrackerError as error:
                raise WebhookError(503, "The watch tracker cannot be written now; try again later.") from error
        ours = self.machine_identifier in ("", webhook.player_uuid)
        if thumb and ours and webhook.item and webhook.item.identity != self.thumb[0]:
            self.thumb = webhook.item.identity, bytes(thumb)


# === Hooks: Change -> a command (Hooks) ===

def hook_command(words: str) -> list[str]:
    """The resolved path and the arguments of -on-event; raises ConfigError."""
    try:
        arguments = shlex.split(words)
    except ValueError as error:
        raise ConfigError(f"-on-event: {words} has a quote without its end; put both or none.") from error
    path = shutil.which(arguments[0]) if arguments else None
    if path is None:
        raise ConfigError(f"-on-event: {arguments[0] if arguments else 'the command'} is missing or not executable; "
                          "give its whole path, and chmod +x it.")
    return [os.path.abspath(path), *arguments[1:]]


def run_hook(command: Sequence[str], environment: dict[str, str]) -> tuple[int | None, bytes]:
    """Run a command; -> its exit status (128 and the signal's number where one ended it; None: its time was up), and
    the begin of its output.  Its whole process group is ended when its time is up.

    By posix_spawn, which is quick, and alone can undo that we block SIGNALS.
    """
    ours = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM"}
    given = {name.encode(): value.encode() for name, value in environment.items()}        # whatever the locale is
    given = {name: value for name, value in os.environb.items() if name.decode("ascii", "replace") not in ours} | given
    reader, writer = os.pipe()
    try:
        pid = os.posix_spawn(command[0], list(command), given, setpgroup=0, setsigmask=(),
                             setsigdef=(signal.SIGPIPE,), file_actions=[
                                 (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                                 (os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)])
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    exited, output, deadline = -1, b"", time.monotonic() + HOOK_S
    try:
        exited = os.pidfd_open(pid)
        watched = [reader, exited]
        while (left := deadline - time.monotonic()) > 0:
            ready = select.select(watched, (), (), left)[0]
            if reader in ready:
                data = os.read(reader, 65536)
                output = (output + data)[:MAX_OUTPUT]
                if not data:
                    watched.remove(reader)
            elif exited in ready:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                return (code if code >= 0 else 128 - code), output
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):        # it is gone, or another user's (sudo)
                os.killpg(pid, number)
            select.select([exited], (), (), HOOK_GRACE_S)
        return None, output
    finally:
        os.close(reader)
        if exited >= 0:
            os.close(exited)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


class Hooks:
    """Runs the -on-event command, one event at a time, in a thread of its own; the newest change wins."""

    def __init__(self, command: Sequence[str], active_timeout_s: float, level: int = logging.DEBUG):
        """level: of the line that says that the command ran."""
        self.command, self.active_timeout_s, self.level = command, active_timeout_s, level
        self.inbox: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self.amplifier, self.latest = Amplifier(), dict[str, str]()
        self.waiting: list[tuple[str, dict[str, str]]] = []

    def run(self) -> None:
        """For ever."""
        while True:
            self.receive(None if self.waiting else self.amplifier.off_at)
            if self.waiting:
                event, environment = self.waiting.pop(0)
                self.call(event, environment)

    def receive(self, until: float | None) -> None:
        """Queue the changes that came; wait for one where nothing waits for the command."""
        with contextlib.suppress(queue.Empty):
            if not self.waiting:
                self.take(self.inbox.get(timeout=None if until is None else max(0.0, until - time.monotonic())))
            while True:
                self.take(self.inbox.get_nowait())
        if self.amplifier.off_at is not None and time.monotonic() >= self.amplifier.off_at:
            self.amplifier = Amplifier()
            self.waiting = enqueue(self.waiting, "inactive", {**self.latest, "PLAYER_EVENT": "inactive"})

    def take(self, change: Change) -> None:
        """Queue what a change is to the command."""
        event = hook_event(change)
        self.latest = hook_environment(change, event)
        self.amplifier, switched_on = after_change(self.amplifier, change, time.monotonic(), self.active_timeout_s)
        if switched_on:
            self.waiting = enqueue(self.waiting, "active", {**self.latest, "PLAYER_EVENT": "active"})
        self.waiting = enqueue(self.waiting, event, self.latest)

    def call(self, event: str, environment: dict[str, str]) -> None:
        """Run the command once, and log how it ended."""
        try:
            status, output = run_hook(self.command, environment)
        except OSError as error:
            say(logging.WARNING, f"the -on-event command could not be started ({why(error)})", event=event,
                command=self.command[0])
            return
        said = output.decode("utf-8", "replace").strip()
        if status is None:
            say(logging.WARNING, f"the -on-event command took more than {HOOK_S:g} s, and was ended", event=event)
        elif status:
            say(logging.WARNING, "the -on-event command failed", event=event, status=status, output=said[-MAX_TEXT:])
        else:
            say(self.level, "the -on-event command ran", event=event, output=said[:MAX_TEXT])


# === systemd: READY, STATUS, WATCHDOG, STOPPING ===

class Systemd:
    """The service manager, where there is one (sd_notify(3)); else nothing happens."""

    def __init__(self, environ: Mapping[str, str]):
        address = environ.get("NOTIFY_SOCKET", "")
        self.address = "\0" + address[1:] if address.startswith("@") else address
        usec = number(environ.get("WATCHDOG_USEC")) or 0
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.ping_s = usec / 2e6 if usec and ours and address else None       # None: no watchdog

    def notify(self, *assignments: str) -> None:
        """Send READY=1 and the like; a manager that is gone is no error."""
        if self.address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.sendto("\n".join(assignments).encode(), self.address)


# === Watcher: the one owner of the players' states ===

class Watcher:
    """Takes messages from the inbox, looks when a look is due, and reports what advance() says."""

    def __init__(self, config: Config, inbox: queue.SimpleQueue[Message], plex: PlexServer | None, systemd: Systemd,
                 board: Board | None = None, hooks: Hooks | None = None):
        self.board, self.hooks = board or Board(), hooks
        self.config, self.inbox, self.plex, self.systemd = config, inbox, plex, systemd
        self.players: dict[str, PlayerState] = {}    # by machine_identifier: the configured one, or all heard of
        if plex:
            self.players[config.plex_machine_id] = PlayerState(
                config.plex_machine_id, has_server=True, poll_interval_s=config.poll_interval_s,
                look_at=time.monotonic())
        self.latest = config.plex_machine_id         # the player that changed last
        self.webhook_at: float | None = None
        self.ping_at = time.monotonic()
        self.warned_at: dict[int, float] = {}        # by the status of what was refused
        self.stream_missed = False                   # the server has been found to have no event stream
        self.stream_open = False
        self.webhook_time = 0.0                      # as webhook_at, in Unix s
        self.webhooks: collections.Counter[tuple[str, str]] = collections.Counter()     # by (event, result)
        self.looks: collections.Counter[str] = collections.Counter()                    # by result
        self.changes: collections.Counter[tuple[str, str]] = collections.Counter()      # by (state, by)
        self.recent: collections.deque[tuple[float, Change]] = collections.deque(maxlen=MAX_RECENT)
        self.news: list[Change] = []                 # reported, and not published yet
        self.stopping = False

    def run(self) -> None:
        """Until Stop; raises what a request thread crashed with."""
        while not self.stopping:
            for message in self.receive():
                self.handle(message)
            if (due := self.due()) is not None and due <= time.monotonic() and not self.stopping:
                self.look()
            self.publish()
            self.tell_systemd()

    def publish(self) -> None:
        """Tell the request threads what is known now."""
        status = Status(self.players.get(self.latest), tuple(self.recent)[::-1], bool(self.plex), self.stream_open,
                        self.stream_missed or not self.config.plex_events, self.webhook_at, self.webhook_time,
                        dict(self.webhooks), dict(self.looks), dict(self.changes))
        self.board.publish(status, self.news)
        self.news = []

    def due(self) -> float | None:
        """When the next look is due; None: not before something is heard."""
        return min((p.look_at for p in self.players.values() if p.look_at is not None), default=None)

    def receive(self) -> Iterator[Message]:
        """What is in the inbox, after a wait for something to do."""
        times = [at for at in (self.due(), self.ping_at if self.systemd.ping_s else None) if at is not None]
        self.board.busy_since = None
        with contextlib.suppress(queue.Empty):
            message = self.inbox.get(timeout=max(0.0, min(times) - time.monotonic()) if times else None)
            self.board.busy_since = time.monotonic()
            yield message
            for _ in range(self.inbox.qsize()):
                yield self.inbox.get_nowait()

    def handle(self, message: Message) -> None:
        """One message."""
        match message:
            case Webhook():
                self.hear(message)
            case Notification():
                self.judge(message)
            case Stream():
                self.stream_open = message.event == "opened"
                self.judge(message)
                self.note_stream(message)
            case Refused():
                self.refuse(message)
            case Reload() if self.plex:
                self.plex.token()
                self.players = {key: p._replace(look_at=time.monotonic()) for key, p in self.players.items()}
            case Stop():
                self.stopping = True
            case Crash():
                raise message.error

    def refuse(self, refused: Refused) -> None:
        """A line for a request that was refused; what a person can mend is a warning, one a minute."""
        causes = {401: "a webhook without the secret, or with a wrong one, was refused; the URL in Plex must be the "
                       "one that `streamerbrainz.py secret` prints",
                  404: f"a Plex server sends webhooks to a wrong path; the URL in Plex must end in {WEBHOOK_PATH}",
                  429: "more webhooks than -rate-limit allows came from one address, and were refused"}
        ours = refused.from_plex if refused.status == 404 else refused.path == WEBHOOK_PATH
        if ours:
            self.webhooks["other", str(refused.status)] += 1
        again_at = self.warned_at.get(refused.status, -math.inf) + WARN_AGAIN_S
        if refused.status in causes and ours and time.monotonic() >= again_at:
            self.warned_at[refused.status] = time.monotonic()
            say(logging.WARNING, causes[refused.status], path=refused.path, address=refused.address)
        say(logging.DEBUG, "refused", status=refused.status, path=refused.path, address=refused.address,
            result=refused.sentence)

    def hear(self, webhook: Webhook) -> None:
        """A webhook: every player it may concern."""
        self.webhook_at, self.webhook_time = time.monotonic(), time.time()
        self.webhooks[webhook.event if webhook.event in EVENTS else "other", "ok"] += 1
        chosen = self.config.plex_machine_id in ("", webhook.player_uuid)
        if not self.plex and webhook.player_uuid and webhook.event in CLAIMS and chosen:
            self.meet(webhook)
        reported = self.judge(webhook)
        ours = webhook.player_uuid in self.players
        result = "reported" if reported else "nothing new" if not self.plex or not webhook.player_uuid \
            else "a look" if ours else "another player's: a look"
        say(logging.DEBUG, "webhook", event=webhook.event, player=webhook.player_title, machine_id=webhook.player_uuid,
            title=webhook.item.title if webhook.item else "", result=result)

    def note_stream(self, stream: Stream) -> None:
        """A line for the event stream: one that the server does not give is said once, a break is usual."""
        without = WITHOUT_STREAM.get(stream.fault) if stream.event == "failed" else None
        if without and not self.stream_missed:
            say(logging.INFO, f"no event stream, {without}: changes without a webhook wait for a slow look")
        elif stream.event == "opened" and self.stream_missed:
            say(logging.INFO, "the event stream is there now")
        else:
            say(logging.DEBUG, f"the event stream {stream.event}", reason=stream.sentence)
        self.stream_missed = without is not None or (self.stream_missed and stream.event == "failed")

    def meet(self, webhook: Webhook) -> None:
        """Without a server: a player that was not heard of before becomes one of ours, for the newcomer to choose."""
        player = self.players.pop(webhook.player_uuid, None)
        if player is None:
            crowded = len(self.players) >= MAX_PLAYERS
            if crowded:                              # the one that was silent longest goes, best one that has stopped
                stopped = (key for key, each in self.players.items() if each.state == STOPPED)
                del self.players[next(stopped, next(iter(self.players)))]
            player = PlayerState(webhook.player_uuid, has_server=False)
            say(logging.DEBUG if crowded else logging.INFO, "a player was heard of; the flag that chooses it: "
                f"-plex-machine-id {shlex.quote(webhook.player_uuid)}", player=webhook.player_title)
        self.players[webhook.player_uuid] = player

    def look(self) -> None:
        """Ask the server, and let the answer be judged."""
        assert self.plex
        self.board.busy_since = time.monotonic()
        try:
            self.judge(Look(self.plex.sessions()))
            self.looks["ok"] += 1
        except PlexError as error:
            self.judge(Outage(error.fault, str(error)))
            self.looks[error.fault] += 1
        time.sleep(REST_S)

    def judge(self, observation: Observation) -> int:
        """Let each player's state advance, and report; -> how many reports there were."""
        count = 0
        for key, player in self.players.items():
            self.players[key], reports = advance(player, observation, time.monotonic())
            for report in reports:
                self.latest, self.ping_at, count = key, time.monotonic(), count + 1
                self.report(report)
        return count

    def report(self, report: Report) -> None:
        """A line of the log."""
        match report:
            case Change():
                self.changes[report.state, report.by] += 1
                say(logging.INFO, "", **change_fields(report, not self.plex, log.isEnabledFor(logging.DEBUG)))
                if self.hooks:
                    self.hooks.inbox.put(report)
                self.recent.append((time.time(), report))
                self.news.append(report)
            case Outage():
                level = {"unreachable": logging.INFO, "starting": logging.INFO, "nonsense": logging.WARNING}
                say(level.get(report.fault, logging.ERROR), f"no answer from Plex: {report.sentence}")
            case Recovery():
                say(logging.INFO, f"Plex answers again after {report.after_s:.0f} s")
            case WebhooksMissing():
                say(logging.WARNING, f"webhooks do not arrive: {report.in_a_row} changes in a row came without one. "
                    "The Plex server cannot reach the URL, or the account's webhooks do not have it, or there is no "
                    "Plex Pass (then all is well: the other witnesses tell). `streamerbrainz.py doctor` finds out")
            case WebhooksBack():
                say(logging.INFO, f"webhooks arrive again, after {report.missed} that were missed")

    def tell_systemd(self) -> None:
        """STATUS= after each report, and WATCHDOG=1 from the very loop that can hang."""
        if self.systemd.address and time.monotonic() >= self.ping_at:
            age = None if self.webhook_at is None else time.monotonic() - self.webhook_at
            self.systemd.notify("WATCHDOG=1", f"STATUS={status_sentence(self.players.get(self.latest), age)}")
            self.ping_at = time.monotonic() + (self.systemd.ping_s or math.inf)


# === Commands: run, players, demo ===

LEVELS = {"error": (logging.ERROR, 3), "warn": (logging.WARNING, 4),      # and the journal's priorities
          "info": (logging.INFO, 6), "debug": (logging.DEBUG, 7)}


class LogFormatter(logging.Formatter):
    """The log's lines, from records that say() made."""

    def __init__(self, as_json: bool, journal: bool):
        super().__init__()
        self.as_json, self.journal = as_json, journal

    def format(self, record: logging.LogRecord) -> str:
        sentence, fields = record.getMessage(), getattr(record, "fields", {})
        level, priority = next((name, priority) for name, (no, priority) in LEVELS.items() if no <= record.levelno)
        now = time.localtime(record.created)
        if self.as_json:
            stamp = {} if self.journal else {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z", now)}
            message = {"msg": sentence} if sentence else {}
            line = json_line({**stamp, "level": level, **message, **fields})
        else:
            line = text_line(sentence, fields)
            if not self.journal:
                line = f"{time.strftime('%Y-%m-%d %H:%M:%S', now)} {level.upper():5} {line}"
        return f"<{priority}>{line}" if self.journal else line


def in_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the systemd journal's, which reads a line's priority (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up_log(config: Config) -> None:
    """Send the log to stderr, as the flags say."""
    logging.raiseExceptions = False               # a closed stderr must not end the daemon
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(config.log_format == "json", in_journal(os.environ)))
    log.handlers[:] = [handler]
    log.setLevel(LEVELS[config.log_level][0])
    log.propagate = False


def watch_stream(plex: PlexServer, inbox: queue.SimpleQueue[Message]) -> None:
    """The stream's thread: notifications go into the inbox while it is nearly empty, so that webhooks find room."""
    def tell(message: Notification | Stream) -> None:
        if isinstance(message, Stream) or inbox.qsize() < MAX_NOTED:
            inbox.put(message)

    def pause(pause_s: float) -> None:
        plex.renewed.wait(pause_s)
        plex.renewed.clear()
    follow_stream(plex, tell, pause)


SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def take_signals(inbox: queue.SimpleQueue[Message]) -> None:
    """Turn signals into messages, for ever; a thread of its own, while all others block SIGNALS.

    A handler would run in the main thread, and not at all if the signal comes in the moment
    before that waits for its inbox.  After the first signal to end, a second one, or a main
    thread that does not come to its end, ends the process the hard way.
    """
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        inbox.put(Reload())
    inbox.put(Stop())
    signal.sigtimedwait(SIGNALS - {signal.SIGHUP}, PLEX_S + 1)
    os._exit(1)


def carefully(target: Callable[[], None], inbox: queue.SimpleQueue[Message]) -> None:
    """A thread whose bug ends the process from the main thread."""
    try:
        target()
    except Exception as error:
        inbox.put(Crash(error))


def serve(config: Config, inbox: queue.SimpleQueue[Message], listener: Listener, plex: PlexServer | None,
          hooks: Hooks | None = None) -> Watcher:
    """Start all threads; -> the Watcher, for watch()."""
    systemd = Systemd(os.environ)
    listener.tracker_db, listener.plex_url, listener.covers = config.tracker_db, config.plex_server_url, Covers(plex)
    if hooks:
        threading.Thread(target=carefully, args=(hooks.run, inbox), name="hooks", daemon=True).start()
    threading.Thread(target=take_signals, args=(inbox,), name="signals", daemon=True).start()
    if config.tracker_db:
        listener.journal = Journal(Tracker(config.tracker_db, create=True), config.accounts)
    threading.Thread(target=listener.serve, name="listener", daemon=True).start()
    everywhere = config.webhooks_host in EVERYWHERE
    url = webhook_url(guess_address(config.plex_server_url) if everywhere else config.webhooks_host, listener.port)
    say(logging.INFO, "listening", version=VERSION, webhook_url=url + ("?token=..." if listener.gate.secret else ""))
    if plex is None:
        say(logging.INFO, "no -plex-server-url: the webhooks alone tell")
    elif config.plex_events:
        follow = functools.partial(watch_stream, plex, inbox)
        threading.Thread(target=carefully, args=(follow, inbox), name="stream", daemon=True).start()
    if listener.journal:
        tracker = Tracker(config.tracker_db, lasting=False, writing=listener.journal.tracker.writing)
        work = functools.partial(Worker(config, tracker, plex).run, listener.journal.written)
        threading.Thread(target=carefully, args=(work, inbox), name="worker", daemon=True).start()
    systemd.notify("READY=1")
    return Watcher(config, inbox, plex, systemd, listener.board, hooks)


def watch(watcher: Watcher, listener: Listener) -> int:
    """Watch until Stop is in the inbox, then listen no more; -> the exit status."""
    with listener:
        try:
            watcher.run()
        finally:
            watcher.systemd.notify("STOPPING=1")
            listener.close()
            say(logging.INFO, "stopped listening")
    return 0


def runs_already(config: Config) -> bool:
    """Whether another StreamerBrainz answers on our port."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.webhooks_host, config.webhooks_host)
    connection = http.client.HTTPConnection(host, config.webhooks_port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().getheader("Server", "").startswith("StreamerBrainz/")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def socket_holder(link: str) -> str:
    """The process that has a socket open; "" for one that we may not look into."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd.path) == link for fd in os.scandir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                    return f"{comm.read().strip()} (process {pid})"
    return ""


def port_holder(port: int) -> str:
    """The program that listens on a TCP port, as far as /proc shows it to us."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:
            for fields in map(str.split, lines):
                listens = fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port
                if listens and (holder := socket_holder(f"socket:[{fields[9]}]")):
                    return holder
    return "another program"


def listening_error(error: OSError, config: Config) -> ConfigError:
    """Why we cannot listen, and what to do about it."""
    port, host = config.webhooks_port, config.webhooks_host
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"-webhooks-port: {port} is held by {port_holder(port)}; end that, or give another port.")
    if error.errno == errno.EACCES:
        return ConfigError(f"-webhooks-port: {port} is for root alone; give one above 1023.")
    return ConfigError(f"-webhooks-host: cannot listen on {host or 'any address'} ({why(error)}); "
                       "give an address of this machine.")


def check_complete(config: Config) -> None:
    """Raise ConfigError for half a configuration."""
    together = {"-plex-server-url": config.plex_server_url, "-plex-token-file": config.plex_token_file,
                "-plex-machine-id": config.plex_machine_id}
    missing = [flag for flag, value in together.items() if not value]
    if missing and (config.plex_server_url or config.plex_token_file):
        hint = " (`streamerbrainz.py players` shows the identifiers.)" if "-plex-machine-id" in missing else ""
        raise ConfigError(f"half a configuration: give {' and '.join(missing)}, too, to ask the server; "
                          f"or neither -plex-server-url nor -plex-token-file, for webhooks alone.{hint}")
    if config.plex_ca_file and not config.plex_server_url.startswith("https:"):
        raise ConfigError("-plex-ca-file is given, but no -plex-server-url that begins with https://.")
    if config.tmdb_token_file and not config.tracker_db:
        raise ConfigError("-tmdb-token-file is given, but no -tracker-db, which alone needs it.")


def server_of(config: Config) -> PlexServer | None:
    """The configured server; None: there is none."""
    if not config.plex_server_url or not config.plex_token_file:
        return None
    return PlexServer(config.plex_server_url, SecretFile("-plex-token-file", config.plex_token_file).first,
                      config.plex_ca_file)


def run(config: Config) -> Callable[[], int]:
    """The daemon, started; -> what remains to be done, see carry_on()."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)        # in all threads: one takes them, see take_signals()
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    secret = SecretFile("-webhook-secret-file", config.webhook_secret_file, 2) if config.webhook_secret_file else None
    try:
        listener = Listener(config.webhooks_host, config.webhooks_port, inbox, config.plex_machine_id,
                            Gate(secret, config.webhooks_a_minute))
    except OSError as error:
        if error.errno == errno.EADDRINUSE and runs_already(config):
            if os.environ.get("NOTIFY_SOCKET"):           # systemd would take an end without READY=1 for a failure
                holder = port_holder(config.webhooks_port)
                raise ConfigError(f"-webhooks-port: another StreamerBrainz, {holder}, listens on "
                                  f"{config.webhooks_port}; end that (and its cron lines) first.") from error
            say(logging.INFO, "StreamerBrainz already listens there: nothing to do", port=config.webhooks_port)
            return int
        raise listening_error(error, config) from error
    try:
        hooks = Hooks(hook_command(config.on_event), config.active_timeout_s) if config.on_event else None
        return functools.partial(watch, serve(config, inbox, listener, server_of(config), hooks), listener)
    except BaseException:
        listener.server_close()
        raise


def ask_token() -> Callable[[], str]:
    """The token, asked for on the terminal without echo: on a command line, ps would show it."""
    if not sys.stdin.isatty():
        raise ConfigError("players: give the token in a file, with -plex-token-file.")
    try:
        token = getpass.getpass("Plex token (it is not shown): ").strip()
    except EOFError:
        token = ""
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("players: a token is one word of plain characters.")
    return lambda: token


def players(config: Config) -> int:
    """Print every player in the sessions."""
    url = config.words[0] if config.words else config.plex_server_url
    if not url:
        raise ConfigError("players: name the server, as in: streamerbrainz.py players 192.168.1.5:32400")
    token = SecretFile("-plex-token-file", config.plex_token_file).first if config.plex_token_file else ask_token()
    sessions = PlexServer(url, token, config.plex_ca_file).sessions()
    rows = [(session, session.machine_identifier == config.plex_machine_id) for session in sessions]
    if config.json:
        print(json.dumps([session_fields(*row) for row in rows], indent=2))
    elif rows:
        print("\n\n".join(session_lines(*row) for row in rows))
    else:
        print(f"Nothing plays on {url} now. A player shows up only while it plays: press play on it, then try again.")
    return 0


# === Doctor: why do webhooks not arrive? (doctor) ===
# Each check is a method of Doctor that yields findings; it asks, and never changes anything.

OK, FAIL, SKIP = "ok", "FAIL", "skip"
PLEX_TV = "https://plex.tv"
ELSEWHERE = "nor a way to it"     # of a host that may be a proxy's, or a container's


class Finding(NamedTuple):
    """What one check found."""
    status: str                   # OK, FAIL, or SKIP: it could not be known
    check: str                    # what was looked at
    evidence: str
    remedy: str = ""              # of a FAIL: the command or click that mends it
    likely: int = 0               # 1 to 9: how likely this is why webhooks do not arrive; 0: it is not


def without_secrets(url: str) -> str:
    """A URL without what may be a secret in it: its query, its user, a path that is not ours."""
    url = re.sub(r"//[^/@]*@", "//", url)
    parts = re.match(r"([^/]*//[^/?#]*)?([\w/.~-]*)", url, re.ASCII)
    origin, path = parts.groups("") if parts else ("", "")
    query = "?token=..." if len(url) > len(origin + path) else ""
    return origin + (path if path.startswith("/webhooks/") or len(path) < 8 else "/...") + query


def own_addresses() -> set[str]:
    """The addresses of this machine, 127.0.0.1 and ::1 among them."""
    found = {"127.0.0.1", "::1"}
    with contextlib.suppress(OSError), open("/proc/net/fib_trie", encoding="ascii") as lines:
        address = ""
        for line in lines:
            if "|--" in line:
                address = line.split()[-1]
            elif "/32 host LOCAL" in line:
                found.add(address)
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as lines:
        found |= {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])) for line in lines}
    return found


def resolved(host: str) -> set[str]:
    """The addresses of a name; empty: it has none."""
    with contextlib.suppress(OSError, UnicodeError):
        return {str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return set()


def http_ask(url: str, headers: Mapping[str, str], body: bytes | None = None) -> tuple[int, str, bytes]:
    """Status, Server header and begin of the body of any answer within PLEX_S; raises OSError where none comes."""
    opener = plain_opener(ssl.create_default_context() if url.startswith("https:") else None)
    try:
        request = urllib.request.Request(url, body, {"User-Agent": USER_AGENT, **headers})
        try:
            response = opener.open(request, timeout=PLEX_S)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            return response.status, response.headers.get("Server", ""), response.read(MAX_SESSIONS)
    except urllib.error.URLError as error:
        raise OSError(why(error.reason)) from error
    except (http.client.HTTPException, ValueError, TypeError, LookupError, AttributeError) as error:
        raise OSError(why(error)) from error


class Doctor:
    """The checks, in the order in which they build on one another."""

    def __init__(self, config: Config):
        self.config, self.port = config, config.webhooks_port
        self.plex: PlexServer | None = None           # when it is configured and its token can be read
        self.answers = False                          # it does
        self.secrets: tuple[str, ...] = ()            # of webhooks
        self.url = ""                                 # of the webhook in the account that is nearest to ours
        self.listens = self.arriving = False          # the daemon does; webhooks do
        self.here = own_addresses()
        self.plex_tv = os.environ.get("STREAMERBRAINZ_PLEXTV_URL", PLEX_TV)       # a test's

    def run(self) -> Iterator[Finding]:
        """All findings, without a secret in them."""
        for check in (self.configuration, self.server, self.account, self.player, self.daemon, self.webhook,
                      self.delivery, self.server_log, self.tracker):
            try:
                for finding in check():
                    evidence, remedy = finding.evidence, finding.remedy
                    for secret in filter(None, (*self.secrets, self.plex.current_token if self.plex else "")):
                        evidence, remedy = evidence.replace(secret, "..."), remedy.replace(secret, "...")
                    yield finding._replace(evidence=evidence, remedy=remedy)
            except Exception as error:                # the other checks are worth having all the same
                yield Finding(SKIP, check.__name__, f"this check failed itself ({type(error).__name__}): "
                              "please report it")

    # -- what we are told

    def configuration(self) -> Iterator[Finding]:
        try:
            check_complete(self.config)
            yield Finding(OK, "flags", "they are complete" if self.config.plex_server_url else
                          "no server is configured: the webhooks alone tell")
        except ConfigError as error:
            yield Finding(FAIL, "flags", str(error),
                          "streamerbrainz.py doctor -plex-token-file FILE @FILE   # as the daemon gets them")
        for flag, path, most in (("-plex-token-file", self.config.plex_token_file, 1),
                                 ("-webhook-secret-file", self.config.webhook_secret_file, 2),
                                 ("-tmdb-token-file", self.config.tmdb_token_file, 1)):
            if path:
                yield self.secret_file(flag, path, most)
        if self.config.on_event:
            try:
                yield Finding(OK, "-on-event", shlex.join(hook_command(self.config.on_event)))
            except ConfigError as error:
                yield Finding(FAIL, "-on-event", str(error).removeprefix("-on-event: "),
                              "streamerbrainz.py hook playing @FILE   # tries it")
        if self.config.plex_server_url and self.config.plex_token_file:
            with contextlib.suppress(ConfigError):
                self.plex = server_of(self.config)

    def secret_file(self, flag: str, path: str, most: int) -> Finding:
        """A file that holds a secret."""
        try:
            words, _ = read_secrets(flag, path, most)
        except ConfigError as error:
            make = f"streamerbrainz.py secret {flag} {shlex.quote(path)}" if flag == "-webhook-secret-file" else \
                f"(umask 077; cat > {shlex.quote(path)})   # then type it, and Ctrl-D"
            return Finding(FAIL, flag, str(error).removeprefix(f"{flag}: "), make,
                           5 if flag == "-webhook-secret-file" else 0)
        if flag == "-webhook-secret-file":
            self.secrets = words
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077 and os.path.dirname(path) != os.environ.get("CREDENTIALS_DIRECTORY"):
            return Finding(FAIL, flag, f"others can read {path} (mode {mode:o})", f"chmod 600 {shlex.quote(path)}")
        return Finding(OK, flag, f"{path}, readable by you alone")

    # -- the server

    def server(self) -> Iterator[Finding]:
        if self.plex is None:
            yield Finding(SKIP, "server", "not asked: no server is configured, or its token cannot be read")
            return
        host = urllib.parse.urlsplit(self.plex.url).hostname or ""
        addresses = resolved(host)
        start = time.monotonic()
        try:
            with self.plex.open("/identity", Accept="application/json") as response:
                attributes, date = parse_container(response.read())[0], response.headers.get("Date", "")
        except PlexError as error:
            yield Finding(FAIL, "server", f"{error} ({host}: {', '.join(sorted(addresses)) or 'it has no address'})",
                          f"curl -i {self.plex.url}/identity   # from here; then see that it runs, and the address")
            return
        self.answers = True
        where = ", ".join(sorted(addresses)) or host
        yield Finding(OK, "server", f"version {text(attributes.get('version'))} at {where} "
                      f"answers after {(time.monotonic() - start) * 1000:.0f} ms")
        yield self.clock(date)

    def clock(self, date: str) -> Finding:
        """Our clock beside the server's Date header."""
        try:
            off_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        except (ValueError, TypeError, OverflowError):
            return Finding(SKIP, "clock", "the server does not tell its time")
        if abs(off_s) > CLOCK_S:
            how = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the server's"
            return Finding(FAIL, "clock", f"it is {how}",
                           "sudo timedatectl set-ntp true   # here and on the server")
        return Finding(OK, "clock", f"within {CLOCK_S:.0f} s of the server's")

    def account(self) -> Iterator[Finding]:
        if not self.plex or not self.answers:
            yield Finding(SKIP, "token", "not tried: no server answers")
            return
        try:
            root = self.plex.container("/")[0]
            self.plex.container("/status/sessions")
        except PlexError as error:
            yield Finding(FAIL, "token", str(error), "README, Install, step 2: put the owner's token into the file")
            return
        yield Finding(OK, "token", f"accepted as the owner's of {text(root.get('friendlyName')) or 'the server'}")
        features = text(root.get("ownerFeatures"), 10000).split(",")
        if features == [""]:
            yield Finding(SKIP, "Plex Pass", "the server does not tell its owner's features")
        elif "webhooks" in features:
            yield Finding(OK, "Plex Pass", "the owner's features have webhooks")
        else:
            yield Finding(FAIL, "Plex Pass", "the owner's features have no webhooks: none is ever sent",
                          "get Plex Pass at https://plex.tv/plex-pass, or leave it: the event stream tells all", 9)
        signed_in = text(root.get("myPlexSigninState"))
        if signed_in and signed_in != "ok":
            yield Finding(FAIL, "signed in", f"the server is not signed in to plex.tv ({signed_in})",
                          "Plex Web: Settings > General > Sign in", 6)
        elif signed_in:
            yield Finding(OK, "signed in", "the server is signed in to plex.tv")
        try:
            settings = {text(each.get("id")): text(each.get("value")) or str(each.get("value"))
                        for each in self.plex.container("/:/prefs")[1]}
        except PlexError as error:
            settings = {"": str(error)}
        value = settings.get("webHooksEnabled", "").lower()
        if value in ("0", "false"):
            yield Finding(FAIL, "webhooks switch", "webhooks are off in the server's settings",
                          "Plex Web: Settings > Network > Webhooks: on", 8)
        else:
            yield Finding(OK if value else SKIP, "webhooks switch", "on" if value else "the server does not tell it")

    def player(self) -> Iterator[Finding]:
        if not self.plex or not self.answers:
            yield Finding(SKIP, "player", "the server does not answer")
            return
        try:
            sessions = self.plex.sessions()
        except PlexError as error:
            yield Finding(SKIP, "player", str(error))
            return
        ours = self.config.plex_machine_id
        if any(session.machine_identifier == ours for session in sessions):
            yield Finding(OK, "player", f"{ours} has a session")
        elif not sessions:
            yield Finding(SKIP, "player", "nothing plays: press play on it, and run this again")
        else:
            said, known = self.ask_daemon("/now")[1], "; ".join(
                f"{session.player_title or 'a player'} is {session.machine_identifier}" for session in sessions[:5])
            title = text(said.get("player"))
            same = [session for session in sessions if session.machine_identifier.lower() == ours.lower()
                    or (title and session.player_title == title)]
            near = f"{same[0].player_title} has another identifier now: {same[0].machine_identifier}, not {ours}" \
                if same else f"{ours} has no session, but others have: {known}"
            best = same[0] if same else sessions[0]
            yield Finding(FAIL, "player", near,
                          f"-plex-machine-id {shlex.quote(best.machine_identifier)}   # if that is the one", 3)

    # -- the webhook in the account

    def webhook(self) -> Iterator[Finding]:
        if not self.plex:
            yield Finding(SKIP, "webhook in the account", "there is no token to ask plex.tv with")
            return
        try:
            status, _, body = http_ask(f"{self.plex_tv}/api/v2/user/webhooks", {
                "Accept": "application/json", "X-Plex-Token": self.plex.current_token,
                "X-Plex-Client-Identifier": "streamerbrainz"})
            found = json.loads(body) if status == 200 else None
        except (OSError, ValueError, RecursionError) as error:
            yield Finding(SKIP, "webhook in the account", f"plex.tv cannot be asked ({why(error)})")
            return
        if not isinstance(found, list):
            yield Finding(SKIP, "webhook in the account", f"plex.tv answers {status}")
            return
        urls = [url for each in found[:100] if (url := text(mapping(each).get("url"), 2000))]
        ranked = sorted(((self.differences(url), url) for url in urls), key=lambda pair: len(pair[0]))
        if not ranked:
            yield Finding(FAIL, "webhook in the account", "the account has no webhook at all",
                          f"Plex Web: Settings > Account > Webhooks > Add Webhook: {self.right_url()}", 9)
            return
        differences, self.url = ranked[0]
        elsewhere = any(each.endswith(ELSEWHERE) for each in differences)     # a proxy or a tunnel may be a way to it
        if not differences or (elsewhere and self.arrives(self.url)[0]):
            yield Finding(OK, "webhook in the account", without_secrets(self.url))
        else:
            yield Finding(FAIL, "webhook in the account", f"of {len(ranked)}, {without_secrets(self.url)} is nearest, "
                          f"but {'; '.join(differences)}", f"replace it by {self.right_url()}", 9)

    def right_url(self) -> str:
        """The URL that should be there; the secret is the operator's to put in."""
        url = webhook_url(guess_address(self.config.plex_server_url), self.port)
        return f"{url}?token=..." if self.secrets else url

    def differences(self, url: str) -> list[str]:
        """In what a URL differs from one that works, each in words."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            return ["it is no URL"]
        address = guess_address(self.config.plex_server_url)
        found, addresses = [], resolved(host)
        server = urllib.parse.urlsplit(self.config.plex_server_url).hostname or "localhost"
        if addresses & {"127.0.0.1", "::1"} or host.startswith("127."):
            if not resolved(server) & self.here:
                found.append(f"{host} is the server itself there; the address of this machine is {address}")
        elif not addresses:
            found.append(f"the host {host} has no address (a container's name?); this machine is {address}")
        elif not addresses & self.here:
            found.append(f"the host {host} is not this machine, {address}, {ELSEWHERE}")
        if parts.scheme != "http":
            found.append(f"it is {parts.scheme}, and StreamerBrainz speaks http; "
                         "Plex does not deliver to a certificate of your own")
        if port != self.port:
            found.append(f"the port is {port}, not {self.port}")
        if parts.path != WEBHOOK_PATH:
            path = re.match(r"[\w/.~-]*", parts.path, re.ASCII)
            found.append(f"the path is {path[0] if path and path[0] else '/'}, not {WEBHOOK_PATH}")
        given = set(given_secrets(parts.query))
        if self.secrets and not given & {each.encode("ascii") for each in self.secrets}:
            found.append("the secret is another one" if given else "the secret is missing")
        return found

    # -- delivery

    def query(self) -> str:
        """The secret, as a URL's query."""
        return f"?token={urllib.parse.quote(self.secrets[0], '')}" if self.secrets else ""

    def ask_daemon(self, path: str) -> tuple[int, Mapping[str, Any], str]:
        """Status, JSON and Server header of our own daemon; status 0: nothing listens there."""
        host = "127.0.0.1" if self.config.webhooks_host in EVERYWHERE else self.config.webhooks_host
        try:
            url = webhook_url(host, self.port).removesuffix(WEBHOOK_PATH) + path + self.query()
            status, server, body = http_ask(url, {})
        except OSError:
            return 0, {}, ""
        try:
            return status, mapping(json.loads(body)), server
        except (ValueError, RecursionError):
            return status, {}, server

    def daemon(self) -> Iterator[Finding]:
        status, said, server = self.ask_daemon("/healthz")
        if not status:
            yield Finding(FAIL, "daemon", f"nothing listens on port {self.port}",
                          "systemctl --user start streamerbrainz   # or as README, Install, step 5", 8)
            return
        if not server.startswith("StreamerBrainz/"):
            yield Finding(FAIL, "daemon", f"port {self.port} is held by {port_holder(self.port)}",
                          "end that, or give another -webhooks-port, and change the URL in Plex", 8)
            return
        self.listens = True
        version, reasons = server.partition("/")[2], said.get("reasons")
        words = "; ".join(map(text, reasons)) if isinstance(reasons, list) else ""
        if version != VERSION:
            yield Finding(FAIL, "daemon", f"it is version {version}, and this is {VERSION}",
                          "systemctl --user restart streamerbrainz")
        elif status != 200:
            yield Finding(FAIL, "daemon", f"/healthz answers {status}: {words}", "mend what it says")
        else:
            yield Finding(OK, "daemon", f"version {version}, healthy")
        status, now, _ = self.ask_daemon("/now")
        if status != 200:
            yield Finding(FAIL, "webhooks so far", f"/now answers {status}",
                          "give doctor the daemon's -webhook-secret-file", 2)
            return
        seen = mapping(now.get("webhooks"))
        refused = ", ".join(f"{count} with {status}" for status, count in mapping(seen.get("refused")).items())
        last, verdict = seen.get("last_s"), text(mapping(mapping(now.get("witnesses")).get("webhooks")).get("words"))
        heard = f"the last came {last} s ago" if last is not None else "none has come since the daemon started"
        verdict_known = mapping(mapping(now.get("witnesses")).get("webhooks")).get("up") is not None
        bad = (number(seen.get("in_a_row_missed")) or 0) >= PROOF_MISSES
        self.arriving = last is not None and not bad
        heard += f"; refused: {refused}" if refused else ""
        if refused and (bad or last is None):
            yield Finding(FAIL, "webhooks so far", heard, f"compare the URL in Plex with {self.right_url()} "
                          "(401: the secret, 404: the path, 413: too large)", 7)
        else:
            yield Finding(SKIP if last is None else OK, "webhooks so far", heard)
        yield Finding(FAIL if bad else OK if verdict_known else SKIP, "each change with its webhook", verdict,
                      "see the other failures" if bad else "")

    def delivery(self) -> Iterator[Finding]:
        if not self.listens:
            yield Finding(SKIP, "test webhook", "no daemon listens")
            return
        hosts = {each for each in self.here if "." in each} if self.config.webhooks_host in EVERYWHERE else \
            {self.config.webhooks_host}
        urls = dict.fromkeys([self.url, *(webhook_url(host, self.port) + self.query() for host in sorted(hosts))])
        for url in filter(None, urls):
            arrived, words = self.arrives(url)
            remedy = "" if arrived else "give doctor the daemon's -webhook-secret-file" if words.endswith("401") else \
                f"curl -i {self.right_url()}   # from the server's machine"
            yield Finding(OK if arrived else FAIL, "test webhook", f"to {without_secrets(url)} {words}", remedy, 6)

    def arrives(self, url: str) -> tuple[bool, str]:
        """Whether a webhook that changes nothing arrives at a StreamerBrainz, and what happens to it in words."""
        content_type, sent = encode_webhook(json.dumps({"event": TEST_EVENT}).encode())
        try:
            status, _, body = http_ask(url, {"Content-Type": content_type}, sent)
        except OSError as error:
            return False, f"fails ({why(error)})"
        if TEST_EVENT.encode() in body:
            return True, "arrives"
        return False, "is answered, but not by StreamerBrainz" if status == 200 else f"is refused with {status}"

    def server_log(self) -> Iterator[Finding]:
        import zipfile  # here: no other command needs them
        import zlib

        if not self.plex or not self.answers:
            yield Finding(SKIP, "server's log", "the server does not answer")
            return
        try:
            with self.plex.open("/diagnostics/logs", IMPORT_S) as response, tempfile.TemporaryFile() as copy:
                response.reader.room = MAX_LOGS
                shutil.copyfileobj(response, copy)
                with zipfile.ZipFile(copy) as logs:
                    each = (line for name in logs.namelist()[:50] if name.endswith("Plex Media Server.log")
                            for line in iter(functools.partial(logs.open(name).readline, MAX_EVENT), b""))
                    lines = [line[:MAX_TEXT] for line in itertools.islice(each, MAX_LOG_LINES)
                             if b"Webhook: Error delivering payload" in line][-1000:]
        except (PlexError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
            yield Finding(SKIP, "server's log", "the server does not give it")
            return
        if lines and not self.arriving:
            last = re.sub(r"(?<==)[^\s&]+", "...", lines[-1].decode("utf-8", "replace").strip())
            yield Finding(FAIL, "server's log", f"{len(lines)} deliveries failed; the last: {last}",
                          "see that the server's machine can reach the URL: curl -i URL from there", 7)
        else:
            yield Finding(OK, "server's log", f"{len(lines)} deliveries failed before, but webhooks arrive now" if lines
                          else "no delivery failed")

    def tracker(self) -> Iterator[Finding]:
        if not self.config.tracker_db:
            return
        try:
            store = Tracker(self.config.tracker_db, write=False)
        except (ConfigError, TrackerError) as error:
            yield Finding(FAIL, "tracker", str(error), "mend the file, or `tracker import` into a new one", 4)
            return
        try:
            intact, count = store.one("PRAGMA quick_check")[0], journal_rows(store)
            last = store.one("SELECT max(received_at) FROM webhook_log")[0]
            conflicts = store.one("SELECT count(*) FROM conflict WHERE resolution IS NULL")[0]
        except TrackerError as error:
            intact, count, last, conflicts = str(error), {}, None, 0
        finally:
            store.close()
        if intact != "ok":
            yield Finding(FAIL, "tracker", f"the file is damaged: {intact}",
                          "`tracker export` what can be read, and `tracker import` it into a new file", 4)
            return
        yield Finding(OK, "tracker", f"intact, form {SCHEMA_VERSION}; last webhook: {iso_time(last) or 'none yet'}; "
                      f"{conflicts} open conflicts, {count.get(FAILED, 0)} failed rows")


def finding_lines(finding: Finding, colours: bool) -> str:
    """A finding as lines of 80 columns."""
    colour = {OK: "32", FAIL: "31", SKIP: "33"}[finding.status]
    word = f"\x1b[{colour}m{finding.status:4}\x1b[0m" if colours else f"{finding.status:4}"
    said = textwrap.fill(printable(f"{finding.check}: {finding.evidence}"), 74, subsequent_indent="      ",
                         break_on_hyphens=False)
    remedy = textwrap.fill(printable(finding.remedy), 70, initial_indent="      -> ", subsequent_indent="         ",
                           break_long_words=False, break_on_hyphens=False)
    return f"{word}  {said}" + (f"\n{remedy}" if finding.remedy else "")


def see_sessions(checks: Doctor, end: float, saw: Callable[[str], None]) -> None:
    """Say so when a look shows what the one before did not."""
    before: frozenset[object] | None = None
    while checks.plex and time.monotonic() < end:
        with contextlib.suppress(PlexError):
            now = frozenset((each.key, each.state) for each in checks.plex.sessions()
                            if each.machine_identifier == checks.config.plex_machine_id)
            if before is not None and now - before:
                saw("sessions")
            before = now
        time.sleep(WATCH_REST_S)


def see_events(checks: Doctor, end: float, saw: Callable[[str], None]) -> None:
    """Say so when the event stream tells of the player."""
    while checks.plex and time.monotonic() < end:
        with contextlib.suppress(PlexError):
            for notification in checks.plex.notifications():
                if notification and notification.client_identifier in ("", checks.config.plex_machine_id):
                    saw("events")
        time.sleep(WATCH_REST_S)


def see_webhooks(checks: Doctor, end: float, saw: Callable[[str], None]) -> None:
    """Say so when the daemon has got one more webhook."""
    before: object = None
    while time.monotonic() < end:
        now = mapping(checks.ask_daemon("/now")[1].get("webhooks")).get("count")
        if None not in (before, now) and now != before:
            saw("webhook")
        before = before if now is None else now
        time.sleep(WATCH_REST_S)


def watch_witnesses(checks: Doctor, watch_s: float, tell: Callable[[str], None]) -> None:
    """Tell for so long which witness sees a play, and how long after the first one."""
    tell("\nPress play now, on the player.")
    inbox: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
    seen: dict[str, float] = {}
    end = time.monotonic() + watch_s
    for see in (see_webhooks, see_sessions, see_events):
        threading.Thread(target=see, args=(checks, end, lambda name: inbox.put((name, time.monotonic()))),
                         daemon=True).start()
    while (left := end - time.monotonic()) > 0 and len(seen) < 3:
        with contextlib.suppress(queue.Empty):
            name, at = inbox.get(timeout=left)
            if seen.setdefault(name, at) == at:
                tell(f"{name:9} saw it {at - min(seen.values()):.1f} s after the first")
    for name in sorted({"webhook", "sessions", "events"} - seen.keys()):
        tell(f"{name:9} saw nothing in {watch_s:g} s")


def doctor(config: Config) -> int:
    """Print each finding, and the likely causes, best first."""
    log.setLevel(logging.ERROR)                       # what would be warned of is a finding
    checks = Doctor(config)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    findings = []
    for finding in checks.run():
        findings.append(finding)
        if not config.json:
            print(finding_lines(finding, colours), flush=True)
    causes = sorted((each for each in findings if each.status == FAIL and each.likely), key=lambda each: -each.likely)
    if config.json:
        print(json.dumps({"findings": [{"status": each.status, "check": each.check, "evidence": each.evidence,
                                        "remedy": each.remedy} for each in findings],
                          "causes": [each.evidence for each in causes]}, indent=2))
    elif causes:
        print("\nWhy webhooks may not arrive, the likeliest first:")
        for i, each in enumerate(causes, 1):
            print(textwrap.fill(printable(f"{i}. {each.check}: {each.evidence}"), 80, subsequent_indent="   "))
    if config.watch_s:
        said = sys.stderr if config.json else sys.stdout
        watch_witnesses(checks, config.watch_s, functools.partial(print, file=said, flush=True))
    return int(any(each.status == FAIL for each in findings))


# === Tracker commands: import, export, shows, show, log, conflicts, resolve ===

class Progress:
    """How far long work is: a bar on a terminal, else a line now and then.  Both on stderr."""

    def __init__(self, name: str):
        self.name, self.terminal = name, sys.stderr.isatty()
        self.told_at = time.monotonic()

    def tell(self, count: int, total: int) -> None:
        """So many of so many are done."""
        rest_s = 0.1 if self.terminal else 5.0
        if count >= total or time.monotonic() - self.told_at >= rest_s:
            self.told_at = time.monotonic()
            filled = 30 * count // max(total, 1)
            bar = f"\r{self.name:24.24} [{'#' * filled}{'.' * (30 - filled)}] {count} of {total}"
            end = "\n" if count >= total or not self.terminal else ""
            print(bar if self.terminal else f"{self.name}: {count} of {total}", end=end, file=sys.stderr, flush=True)


def upsert_show(tracker: Tracker, show: Show, mapped: Match | None = None) -> int:
    """The id of a show in the tracker, which gets it if it lacks it; within a transaction."""
    if not (found := mapped or tracker.match_ids(show)):
        title = parse_title(show.title)
        same = [known for known in tracker.shows("normal = ? AND type = ?", title.normal, show.type)
                if (known.year, parse_title(known.title)) == (show.year, title) and not known.ids.contradicts(show.ids)]
        if not same:
            return tracker.add_show(show)
        found = Match(same[0].id, "title", 1.0)
    tracker.learn_ids(found.show_id, show.ids)
    return found.show_id


class LibraryImport:
    """The import of a server's libraries: a page a transaction, so that an import that was ended goes on there."""

    def __init__(self, tracker: Tracker, plex: PlexServer):
        self.tracker, self.plex, self.server = tracker, plex, plex.identity()

    def run(self) -> None:
        """Bring all; raises PlexError, TrackerError."""
        sections = [(text(each.get("key")), text(each.get("type")), text(each.get("title")))
                    for page in self.plex.pages("/library/sections") for each in page.items]
        for key, holds, title in sections:
            if holds == "movie":
                self.section(key, 1, f"{title}: movies", self.add_movies)
            elif holds == "show":
                self.section(key, 2, f"{title}: shows", self.add_shows)
                self.section(key, 4, f"{title}: episodes", self.add_episodes)
        with self.tracker.transaction():
            self.tracker.write("DELETE FROM note WHERE name LIKE 'import %'")

    def section(self, key: str, kind: int, name: str, add: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        """Bring what a section has of one of Plex's numbered types, from where an import before was ended."""
        note, progress = f"import {self.server} {key} {kind}", Progress(name)
        path = (f"/library/sections/{urllib.parse.quote(key, '')}/all?type={kind}&includeGuids={int(kind != 4)}"
                "&sort=addedAt:asc")                  # what is new comes last, and moves no page
        for page in self.plex.pages(path, int(self.tracker.note(note) or 0), IMPORT_S):
            with self.tracker.transaction():
                add(page.items)
                self.tracker.take_note(note, page.end)
            progress.tell(page.end, max(page.total, page.end))

    def add_shows(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add a page of shows."""
        for fields in items:
            self.add(EPISODE, fields)

    def add_movies(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add a page of movies, each with whether it was watched."""
        rows = [(self.add(MOVIE, fields), 0, 0, text(fields.get("title")), *watched_state(fields, time.time()))
                for fields in items]
        self.tracker.add_episodes(row for row in rows if row[0])

    def add(self, type: str, fields: Mapping[str, Any]) -> int:
        """Add a show or movie, and what it is on the server; -> its id."""
        item, guids = parse_item(fields), item_guids(fields)
        show = Show(type, item.title, number(fields.get("year")), parse_ids((*guids, item.guid)))
        entry = Entry(0.0, "import", self.server, "", "", item._replace(type=type),
                      Scrobble(item.rating_key, item.guid))
        mapped = self.tracker.mapped(entry)
        if mapped and not mapped.show_id:
            return 0                                  # a person chose to ignore it
        show_id = upsert_show(self.tracker, show, mapped)
        if mapped is None:
            self.tracker.map(self.server, type, entry.subject, entry.show_guid, Match(show_id, "import", 1.0))
        return show_id

    def add_episodes(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add a page of episodes, each with whether it was watched."""
        keys = {f"key:{text(fields.get('grandparentRatingKey'))}" for fields in items}
        found = self.tracker.all("SELECT subject, show_id FROM mapping WHERE server = ? AND type = 'episode' AND "
                                 f"show_id NOT NULL AND subject IN ({', '.join('?' * len(keys))})", self.server, *keys)
        shows, rows, now = dict(found), [], time.time()
        for fields in items:
            item, show_id = parse_item(fields), shows.get(f"key:{text(fields.get('grandparentRatingKey'))}")
            if show_id and is_number(item.parent_index) and is_number(item.index):
                rows.append((show_id, item.parent_index or 0, item.index or 0, item.title, *watched_state(fields, now)))
        self.tracker.add_episodes(rows)


def settle(tracker: Tracker) -> None:
    """End the conflicts whose shows have come."""
    with tracker.transaction():
        found = tracker.all("SELECT conflict.id, show_id FROM conflict JOIN mapping USING (server, type, subject) "
                            "WHERE resolution IS NULL AND show_id NOT NULL AND "
                            "(mapping.guid = conflict.guid OR '' IN (mapping.guid, conflict.guid))")
        for conflict_id, show_id in found:
            tracker.resolve(conflict_id, show_id)


def catch_up(tracker: Tracker, worker: Worker) -> None:
    """After an import: try again what waited for it, and end the conflicts that this ends."""
    settle(tracker)
    for entry in tracker.entries("action IN ('conflict_created', 'episode_not_found')"):
        worker.finish(entry)
    settle(tracker)


def checked(value: object, place: str, keys: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A mapping of an import file, whose keys and types are known; raises ConfigError with its place."""
    if not isinstance(value, dict):
        raise ConfigError(f"tracker import: {place} is no object.")
    for key, each in value.items():
        if key not in keys:
            raise ConfigError(f"tracker import: {place} has an unknown key {quoted(key)}; "
                              f"known are {', '.join(keys)}.")
        if each is not None and (not isinstance(each, keys[key]) or isinstance(each, bool)):
            raise ConfigError(f"tracker import: {place}.{key} is of the wrong type.")
        if isinstance(each, int) and not 0 <= each <= 2**53:
            raise ConfigError(f"tracker import: {place}.{key} is out of range.")
    return value


SHOW_KEYS = {"title": str, "year": int, "tmdb_id": int, "tvdb_id": int, "imdb_id": str}
PLAY_KEYS = {"watched_at": str, "plays": int}
EPISODE_KEYS = {"season": int, "episode": int, "title": str, **PLAY_KEYS}


def read_show(fields: Mapping[str, Any], type: str, place: str) -> Show:
    """A Show of the JSON form."""
    if not fields.get("title"):
        raise ConfigError(f"tracker import: {place} has no title.")
    imdb_id = fields.get("imdb_id")
    if imdb_id is not None and not re.fullmatch(r"tt\d{5,10}", imdb_id, re.ASCII):
        raise ConfigError(f"tracker import: {place}.imdb_id is none such as tt0903747.")
    return Show(type, text(fields["title"]), fields.get("year"),
                Ids(fields.get("tmdb_id") or None, fields.get("tvdb_id") or None, imdb_id))


def read_plays(fields: Mapping[str, Any], place: str) -> tuple[int | None, int]:
    """watched_at and plays of the JSON form; played once at least, if watched."""
    try:
        watched_at = unix_time(fields["watched_at"]) if fields.get("watched_at") else None
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"tracker import: {place}.watched_at is no time such as 2026-11-21T20:15:00Z.") from error
    return watched_at, max(fields.get("plays") or 0, int(watched_at is not None))


def read_file(path: str) -> Iterator[tuple[Show, list[tuple[int, int, str, int | None, int]]]]:
    """The shows and movies of a file in the JSON form, each with its episodes; raises ConfigError."""
    try:
        with open("/dev/stdin" if path == "-" else path, encoding="utf-8") as file:
            whole = checked(json.load(file), "the file", {"shows": list, "movies": list})
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"tracker import: {path} cannot be read as JSON ({why(error)}).") from error
    for i, each in enumerate(whole.get("shows") or ()):
        place = f"shows[{i}]"
        show, rows = checked(each, place, {**SHOW_KEYS, "episodes": list}), []
        for j, each in enumerate(show.get("episodes") or ()):
            fields = checked(each, f"{place}.episodes[{j}]", EPISODE_KEYS)
            if not is_number(fields.get("season")) or not is_number(fields.get("episode")):
                raise ConfigError(f"tracker import: {place}.episodes[{j}] has no season or no episode that can be.")
            rows.append((fields["season"], fields["episode"], text(fields.get("title")),
                         *read_plays(fields, f"{place}.episodes[{j}]")))
        yield read_show(show, EPISODE, place), rows
    for i, each in enumerate(whole.get("movies") or ()):
        movie = checked(each, f"movies[{i}]", {**SHOW_KEYS, **PLAY_KEYS})
        yield read_show(movie, MOVIE, f"movies[{i}]"), [(0, 0, text(movie.get("title")),
                                                         *read_plays(movie, f"movies[{i}]"))]


def print_rows(config: Config, rows: Sequence[Mapping[str, Any]], lines: Callable[[], str], nothing: str) -> int:
    """Rows as JSON where -json asks for it, else as lines."""
    print(json.dumps(rows, indent=2, ensure_ascii=False) if config.json else lines() if rows else nothing)
    return 0


def said_counts(config: Config, tracker: Tracker) -> int:
    """Print how much is in the tracker."""
    row = tracker.one("SELECT count(*) FILTER (WHERE type = 'episode'), count(*) FILTER (WHERE type = 'movie'), "
                      "(SELECT count(*) FROM episode) FROM show")
    counts = {"shows": row[0], "episodes": row[2] - row[1], "movies": row[1]}
    return print_rows(config, [counts], lambda: "{shows} shows, {episodes} episodes and {movies} movies are here now."
                      .format_map(counts), "")


def tracker_import(config: Config, tracker: Tracker) -> int:
    """Bring shows, movies and what was watched: from a file, or from the server."""
    if len(config.words) > 1:
        read = list(read_file(config.words[1]))       # all of it is checked before anything is written
        with tracker.transaction():
            for show, rows in read:
                show_id = upsert_show(tracker, show)
                tracker.add_episodes((show_id, *row) for row in rows)
        catch_up(tracker, Worker(config, tracker, server_of(config)))
        return said_counts(config, tracker)
    plex = server_of(config)
    if plex is None:
        raise ConfigError("tracker import: give -plex-server-url and -plex-token-file, or a FILE.json.")
    try:
        library = LibraryImport(tracker, plex)
        library.run()
    except KeyboardInterrupt:
        print("\nstreamerbrainz: the import was ended; run it again, and it goes on where it was.", file=sys.stderr)
        return 1
    catch_up(tracker, Worker(config, tracker, plex))
    return said_counts(config, tracker)


def show_fields(tracker: Tracker, show: Show) -> dict[str, Any]:
    """A show or movie in the JSON form of import and export."""
    ids = show.ids
    fields = {"title": show.title, "year": show.year, "tmdb_id": ids.tmdb_id, "tvdb_id": ids.tvdb_id,
              "imdb_id": ids.imdb_id}
    rows = tracker.all("SELECT season, episode, title, watched_at, plays FROM episode WHERE show_id = ?", show.id)
    each = [{"season": row[0], "episode": row[1], "title": row[2], "watched_at": iso_time(row[3]), "plays": row[4]}
            for row in rows]
    if show.type == EPISODE:
        return {**fields, "episodes": each}
    played = each[0] if each else {"watched_at": None, "plays": 0}
    return {**fields, "watched_at": played["watched_at"], "plays": played["plays"]}


def tracker_export(config: Config, tracker: Tracker) -> int:
    """Print all shows and movies in the JSON form, one a line."""
    for key, holds in (("shows", EPISODE), ("movies", MOVIE)):
        print(f'{{"{key}": [' if holds == EPISODE else f', "{key}": [')
        for i, show in enumerate(tracker.shows("type = ? ORDER BY normal, id", holds)):
            print(f"{',' if i else ' '}{json.dumps(show_fields(tracker, show), ensure_ascii=False)}")
        print("]")
    print("}")
    return 0


KINDS = {EPISODE: "show", MOVIE: "movie"}     # a type in the database -> what a person calls it


def local_day(at: float | None) -> str:
    """A day, in local time; "": none."""
    return "" if at is None else local_time("%Y-%m-%d", at)


def tracker_shows(config: Config, tracker: Tracker) -> int:
    """Print each show and movie, the one that was watched last first."""
    words = normal(text(" ".join(config.words[1:]))).split() if config.words[1:] else []
    condition = "".join(" AND normal || ' ' || show.title LIKE ?" for _ in words)
    found = tracker.all(
        "SELECT show.id, type, show.title, year, tmdb_id, tvdb_id, imdb_id, count(watched_at), count(episode), "
        "max(watched_at) FROM show LEFT JOIN episode ON show_id = show.id WHERE 1" + condition +
        " GROUP BY show.id ORDER BY max(watched_at) DESC NULLS LAST, normal", *(f"%{word}%" for word in words))
    names = ("id", "type", "title", "year", "tmdb_id", "tvdb_id", "imdb_id", "watched", "episodes", "last_watched_at")
    rows = [dict(zip(names, row, strict=True)) | {"type": KINDS[row[1]],
                                                  "last_watched_at": iso_time(row[9])} for row in found]

    def lines() -> str:
        return table([("ID", "TITLE", "WATCHED", "LAST")] + [
            (str(row[0]), printable(named(row[2], row[3])),
             ("movie" if row[7] else "movie, not") if row[1] == MOVIE else f"{row[7]} of {row[8]}", local_day(row[9]))
            for row in found], 1)
    nothing = "No title is like that." if words else "It is empty; `tracker import` brings what the server has."
    return print_rows(config, rows, lines, nothing)


def show_of(tracker: Tracker, word: str) -> Show:
    """The show or movie whose id a word is; raises ConfigError."""
    show = tracker.show(number(word) or 0)
    if show is None:
        raise ConfigError(f"there is no show {quoted(word)}; `tracker shows` tells their ids.")
    return show


def tracker_show(config: Config, tracker: Tracker) -> int:
    """Print a show's seasons as grids of watched and not."""
    show = show_of(tracker, config.words[1])
    rows = tracker.all("SELECT season, episode, watched_at, plays FROM episode WHERE show_id = ?", show.id)

    def lines() -> str:
        ids = ", ".join(f"{name} {value}" for name in CONFIDENCE if (value := getattr(show.ids, name)))
        head = textwrap.fill(printable(named(show.title, show.year)) + (f"  ({ids})" if ids else ""), 80)
        if show.type == MOVIE:
            watched = f"watched {local_day(rows[0][2])}, {rows[0][3]} plays" if rows and rows[0][2] else "not watched"
            return f"{head}\n{watched}"
        seasons = itertools.groupby(rows, key=lambda row: row[0])
        return "\n".join([head, *(season_lines(season, [(row[1], row[2] is not None) for row in each])
                                  for season, each in seasons)])
    return print_rows(config, [{"id": show.id, "type": KINDS[show.type],
                                **show_fields(tracker, show)}], lines, "")


def tracker_log(config: Config, tracker: Tracker) -> int:
    """Print what became of the last webhooks, the newest last."""
    conditions, values = ["1"], []
    if config.status:
        conditions.append("coalesce(status, 'waiting') = ?")
        values.append(config.status)
    if number(config.show) is not None:
        conditions.append("show_id = ?")
        values.append(config.show)
    else:
        for word in text(config.show).split():
            conditions.append("(show_title LIKE ? OR (type = 'movie' AND title LIKE ?))")
            values += [f"%{word}%"] * 2
    names = ("received_at", "event", "account", "title", "season", "episode", "status", "action", "reason", "show_id",
             "type", "show", "conflict_id")
    found = tracker.all("SELECT received_at, event, account, title, season, episode, coalesce(status, 'waiting'), "
                        "action, reason, show_id, type, show_title, conflict_id FROM webhook_log "
                        f"WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?", *values, config.last or -1)[::-1]
    rows = [dict(zip(names, row, strict=True)) | {"received_at": iso_time(row[0])} for row in found]

    def line(row: Sequence[Any]) -> str:
        numbers = f" S{row[4]:02}E{row[5]:02}" if row[10] == EPISODE and None not in row[4:6] else ""
        first = f"{local_time('%m-%d %H:%M', row[0])}  {row[6]:9}  {row[7] or row[1]:18}  "
        what = shortened(printable(row[11] or row[3] or ""), 80 - len(first) - len(numbers)) + numbers
        indent = " " * 13
        reason = textwrap.fill(printable(row[8] or ""), 80, initial_indent=indent, subsequent_indent=indent)
        return printable(first) + what + (f"\n{reason}" if row[8] and row[6] in (FAILED, IGNORED) else "")
    nothing = "No row is like that." if config.status or config.show else "Nothing came yet."
    return print_rows(config, rows, lambda: "\n".join(map(line, found)), nothing)


def tracker_conflicts(config: Config, tracker: Tracker) -> int:
    """Print what waits for a person, with the commands that end it."""
    found = tracker.all("SELECT id, created_at, kind, type, title, year, (SELECT count(*) FROM webhook_log WHERE "
                        "conflict_id = conflict.id), candidates FROM conflict WHERE resolution IS NULL ORDER BY id")
    rows = []
    for row in found:
        each = [(show, score) for show_id, score in json.loads(row[7]) if (show := tracker.show(show_id))]
        names = ("id", "created_at", "kind", "type", "title", "year", "waiting")
        rows.append(dict(zip(names, row[:7], strict=True)) | {
            "created_at": iso_time(row[1]), "type": KINDS[row[3]], "candidates": [
                {"show_id": show.id, "title": show.title, "year": show.year, "score": score} for show, score in each]})

    def lines() -> str:
        said = []
        for row in rows:
            name = printable(named(row["title"], row["year"]))
            said.append(f"{row['id']}: {shortened(name, 45)} ({row['kind']}, {row['waiting']} waiting)")
            said += [f"    tracker resolve {row['id']} {each['show_id']}   # {each['score']:.2f} "
                     f"{printable(named(each['title'], each['year']))}"[:80] for each in row["candidates"]]
            said += [f"    tracker resolve {row['id']} {word}" for word in ("new", "ignore")]
        return "\n".join(said)
    return print_rows(config, rows, lines, "Nothing waits for you.")


def tracker_resolve(config: Config, tracker: Tracker) -> int:
    """End a conflict: it is that show, a new one, or to be ignored."""
    _, conflict_id, word = config.words
    row = tracker.one("SELECT type, title, year, tmdb_id, tvdb_id, imdb_id, resolution FROM conflict WHERE id = ?",
                      number(conflict_id) or 0)
    if row is None:
        raise ConfigError(f"there is no conflict {quoted(conflict_id)}; `tracker conflicts` tells their ids.")
    show = Show(row[0], row[1], row[2], Ids(row[3], row[4], row[5]))
    known = None if word in ("new", "ignore") else show_of(tracker, word)
    if known and known.type != show.type:
        raise ConfigError("a movie is no show: `tracker shows` tells which is which.")
    if word == "new" and row[6] not in (None, "ignore"):
        known = show_of(tracker, row[6])              # it was resolved before: that is the new one
    with tracker.transaction():
        show_id = 0 if word == "ignore" else known.id if known else upsert_show(tracker, show)
        if show_id:                                   # a person vouches for what was watched
            waited = tracker.all("SELECT season, episode, title FROM webhook_log WHERE conflict_id = ? AND "
                                 "season IS NOT NULL", number(conflict_id))
            tracker.add_episodes((show_id, *each, None, 0) for each in waited)
        tracker.resolve(number(conflict_id) or 0, show_id)
    done = Worker(config, tracker, server_of(config)).drain(number(conflict_id))
    stays = " What was marked before stays." if row[6] not in (None, str(show_id or "ignore")) else ""
    said = f"Conflict {conflict_id} is resolved; {done} that waited {'is' if done == 1 else 'are'} done.{stays}"
    return print_rows(config, [{"conflict": number(conflict_id), "show_id": show_id or None, "done": done}],
                      lambda: said, "")


# command -> its function, the words that it takes, how many of them at least, and whether it makes the file
TRACKER_COMMANDS: dict[str, tuple[Callable[[Config, Tracker], int], str, int, bool]] = {
    "import": (tracker_import, "[FILE]", 0, True), "export": (tracker_export, "", 0, False),
    "shows": (tracker_shows, "[WORDS...]", 0, False), "show": (tracker_show, "ID", 1, False),
    "log": (tracker_log, "", 0, False), "conflicts": (tracker_conflicts, "", 0, False),
    "resolve": (tracker_resolve, "ID SHOW|new|ignore", 2, False)}


def tracker_command(config: Config) -> int:
    """One of the tracker's commands."""
    name = config.words[0] if config.words else ""
    if name not in TRACKER_COMMANDS:
        raise ConfigError(f"tracker: say one of {', '.join(TRACKER_COMMANDS)}; see: streamerbrainz.py -h")
    command, words, least, create = TRACKER_COMMANDS[name]
    if not least <= len(config.words) - 1 <= (99 if "..." in words else len(words.split())):
        raise ConfigError(f"tracker {name}: it is called as: tracker {name} {words}".rstrip())
    if not config.tracker_db:
        raise ConfigError("tracker: name the database, -tracker-db FILE, or the @FILE that has its flag.")
    with contextlib.closing(Tracker(config.tracker_db, create, write=create or name == "resolve")) as tracker:
        return command(config, tracker)


def make_secret(config: Config) -> int:
    """Make a webhook secret, and print the URL to paste.  The one before stays valid, as the file's second line."""
    path = config.webhook_secret_file or os.path.expanduser("~/.config/streamerbrainz/webhook-secret")
    before = SecretFile("-webhook-secret-file", path, 2).words[:1] if os.path.exists(path) else ()
    secret = secrets.token_urlsafe(32)
    try:
        folder, name = os.path.split(os.path.abspath(path))
        if not config.webhook_secret_file:
            os.makedirs(folder, 0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=name, delete=False) as file:      # mode 600
            file.write("\n".join((secret, *before)) + "\n")
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"secret: {path} cannot be written ({why(error)}); "
                          "make its folder, writable by you.") from error
    everywhere = config.webhooks_host in EVERYWHERE
    host = guess_address(config.plex_server_url) if everywhere else config.webhooks_host
    print(f"{webhook_url(host, config.webhooks_port)}?token={secret}")
    print(f"Paste this URL into Plex's Settings > Webhooks.{' The one before it still works.' if before else ''} "
          f"The secret is in {path}: give the daemon -webhook-secret-file {shlex.quote(path)}", file=sys.stderr)
    return 0


# === Hook by hand: the command, its environment, its end (hook) ===

SAMPLE = Item("track", "101", "plex://track/5d07cdb2403c640290f4b12a", "Karma Police", "OK Computer", "Radiohead",
              duration=264000, sample_rate=44100, bit_depth=16)

HOOK_EVENTS = ("playing", "paused", "stopped", "track_changed", "active", "inactive")


def hook(config: Config) -> int:
    """Run the -on-event command once, with sample values, and show all of it."""
    if len(config.words) != 1 or config.words[0] not in HOOK_EVENTS:
        raise ConfigError(f"hook: name one event of {', '.join(HOOK_EVENTS)}, as in: hook playing -on-event COMMAND")
    if not config.on_event:
        raise ConfigError("hook: give the command, -on-event 'COMMAND ARGS', or the @FILE that has its flag.")
    command, state = hook_command(config.on_event), config.words[0] if config.words[0] in (PAUSED, STOPPED) else PLAYING
    old_state = STOPPED if config.words[0] in (PLAYING, "active") else PLAYING
    change = Change(state, old_state, SAMPLE, 61000, "Living Room", "sample-player",
                    "hook")
    environment = hook_environment(change, config.words[0])
    values = (f"    {name}={shlex.quote(value)}" for name, value in environment.items())
    print("\n".join([shlex.join(command), *values]), flush=True)
    try:
        status, output = run_hook(command, environment)
    except OSError as error:
        raise ConfigError(f"-on-event: {command[0]} could not be started ({why(error)}).") from error
    print(output.decode("utf-8", "replace"), end="" if output.endswith(b"\n") or not output else "\n")
    print(f"exit status {status}" if status is not None else f"it took more than {HOOK_S:g} s, and was ended")
    return int(status != 0)


# === Demo: an evening of a player, without any Plex ===

class _StandInHandler(http.server.BaseHTTPRequestHandler):
    """GET /status/sessions, with the token in its header."""
    server: StandIn

    def do_GET(self) -> None:
        known = self.headers.get("X-Plex-Token") == self.server.token
        status = 401 if not known else 200 if self.path == "/status/sessions" else 404
        body = self.server.sessions() if status == 200 else b"<html><body><h1>%d</h1></body></html>" % status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the demo's log is the daemon's."""


class StandIn(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A small stand-in for Plex Media Server: the sessions of one player over HTTP, and webhooks in Plex's form."""
    daemon_threads = True

    def __init__(self, token: str = "stand-in-token", machine_identifier: str = "demo-player"):
        self.token, self.machine_identifier = token, machine_identifier
        # state, attributes, view_offset in ms, since when; None: stopped
        self.now: tuple[str, dict[str, str], float, float] | None = None
        self.speed = 1.0
        super().__init__(("127.0.0.1", 0), _StandInHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def view_offset(self) -> float:
        """Where the player is, ms."""
        if self.now is None:
            return 0.0
        state, _, offset, since = self.now
        return offset + (time.monotonic() - since) * 1000 * self.speed if state == PLAYING else offset

    def turn(self, state: str, attributes: dict[str, str]) -> None:
        """The player plays, pauses or stops an item; another item starts at its begin."""
        offset = self.view_offset() if self.now and self.now[1] == attributes else 0.0
        self.now = None if state == STOPPED else (state, attributes, offset, time.monotonic())

    def sessions(self) -> bytes:
        """The answer of /status/sessions."""
        container = ElementTree.Element("MediaContainer", size="0" if self.now is None else "1")
        if self.now is not None:
            state, attributes, _, _ = self.now
            item = ElementTree.SubElement(
                container, "Track" if attributes["type"] == "track" else "Video",
                attributes | {"sessionKey": "7", "viewOffset": str(int(self.view_offset()))})
            ElementTree.SubElement(item, "User", id="1", title="demo")
            ElementTree.SubElement(item, "Player", machineIdentifier=self.machine_identifier, title="Living Room",
                                   product="Plexamp", platform="Linux", state=state)
        return bytes(ElementTree.tostring(container, encoding="utf-8", xml_declaration=True))

    def send_webhook(self, url: str, event: str, attributes: Mapping[str, str], thumb: bytes = b"") -> int:
        """POST a webhook as Plex does; -> the status of the answer."""
        payload = {"event": event, "user": True, "owner": True, "Account": {"id": 1, "title": "demo"},
                   "Server": {"title": "stand-in", "uuid": "0" * 40}, "Metadata": attributes,
                   "Player": {"local": True, "title": "Living Room", "uuid": self.machine_identifier}}
        content_type, body = encode_webhook(json.dumps(payload).encode(), thumb)
        request = urllib.request.Request(url, body, {
            "Content-Type": content_type, "User-Agent": "PlexMediaServer/1.41.3.9314-a0bfb8370"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return int(response.status)


def _track(key: str, title: str, artist: str, album: str, seconds: int) -> dict[str, str]:
    return {"type": "track", "ratingKey": key, "title": title, "grandparentTitle": artist, "parentTitle": album,
            "duration": f"{seconds}000"}


_KARMA_POLICE = _track("101", "Karma Police", "Radiohead", "OK Computer", 264)
_NO_SURPRISES = _track("102", "No Surprises", "Radiohead", "OK Computer", 229)
_TEARDROP = _track("103", "Teardrop", "Massive Attack", "Mezzanine", 331)

_PILOT = {"type": "episode", "ratingKey": "201", "title": "Pilot", "grandparentTitle": "Twin Peaks",
          "parentTitle": "Season 1", "parentIndex": "1", "index": "1", "duration": "5640000"}

# (second, what the viewer reads, state, item, the webhook that Plex sends, its number)
EVENING: tuple[tuple[float, str, str, dict[str, str], str, int], ...] = (
    (0, "You press play in Plexamp.", PLAYING, _KARMA_POLICE, "media.play", 1),
    (15, "The telephone rings: you press pause.", PAUSED, _KARMA_POLICE, "media.pause", 1),
    (25, "You go on. Plex sends the webhook three times.", PLAYING, _KARMA_POLICE, "media.resume", 3),
    (40, "The next track begins.", PLAYING, _NO_SURPRISES, "media.play", 1),
    (55, "You skip within the queue: no webhook is sent, a slow look finds it.", PLAYING, _TEARDROP, "", 0),
    (75, "You press stop: the session is gone, and that is the stop.", STOPPED, _TEARDROP, "media.stop", 1),
    (85, "You watch something instead.", PLAYING, _PILOT, "media.play", 1),
    (105, "Enough for tonight.", STOPPED, _PILOT, "media.stop", 1),
    (115, "That was the evening.", STOPPED, _PILOT, "", 0),
)


def play_evening(plex: StandIn, port: int, speed: float, inbox: queue.SimpleQueue[Message]) -> None:
    """The evening's events at their times, then Stop."""
    start = time.monotonic() + 0.5
    for second, words, state, item, event, count in EVENING:
        time.sleep(max(0.0, start + second / speed - time.monotonic()))
        print(f"\n# {words}", flush=True)
        plex.turn(state, item)
        for _ in range(count):
            plex.send_webhook(f"http://127.0.0.1:{port}{WEBHOOK_PATH}", event, item)
    inbox.put(Stop())


def demo(config: Config) -> int:
    """Play an evening: a stand-in for Plex sends real webhooks to the real listener, which looks at the stand-in."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)        # in all threads: one takes them, see take_signals()
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    with StandIn() as plex, tempfile.TemporaryDirectory() as folder:
        plex.speed = config.speed
        token_file = os.path.join(folder, "token")
        with open(os.open(token_file, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
            file.write(plex.token)
        threading.Thread(target=plex.serve_forever, daemon=True).start()
        config = config._replace(webhooks_host="127.0.0.1", plex_machine_id=plex.machine_identifier,
                         poll_interval_s=10 / config.speed)
        listener = Listener(config.webhooks_host, 0, inbox, config.plex_machine_id)
        length_s = EVENING[-1][0] / config.speed
        print(f"A stand-in for Plex plays an evening of {length_s:.0f} seconds; Ctrl-C ends it.\n"
              f"Look at it: http://127.0.0.1:{listener.port}/ (also /now, /events, /healthz, /metrics)", flush=True)
        sample = "/bin/sh -c 'echo amplifier, lamp or curl: $PLAYER_EVENT $NAME'"
        hooks = Hooks(hook_command(config.on_event or sample), config.active_timeout_s / config.speed, logging.INFO)
        threading.Thread(target=play_evening, args=(plex, listener.port, config.speed, inbox), daemon=True).start()
        server = PlexServer(plex.url, SecretFile("-plex-token-file", token_file).first)
        watch(serve(config, inbox, listener, server, hooks), listener)
        plex.shutdown()
    return 0


# === main ===

COMMANDS: dict[str, Callable[[Config], int | Callable[[], int]]] = {"run": run, "players": players, "doctor": doctor,
                                                "tracker": tracker_command, "secret": make_secret, "hook": hook,
                                                "demo": demo}

USAGE = "streamerbrainz.py [COMMAND] [FLAGS] [@FILE]"

DESCRIPTION = """Tells what your Plex player is doing.

commands:
  run                  the daemon (this is what happens without a command)
  players [HOST:PORT]  every player in the sessions, with its machine identifier
  doctor               why do webhooks not arrive?
  tracker ...          the watch tracker:
    import [FILE]        all shows and movies, and what is watched
    export               the same as JSON, as import FILE reads it
    shows [WORDS]        each show, with how much of it is watched
    show ID              its seasons as grids, # watched
    log                  what became of the last webhooks
    conflicts            what waits for you
    resolve ID SHOW|new|ignore   end a conflict
  secret               makes a webhook secret, and prints the URL to paste
  hook EVENT           runs the -on-event command once, by hand
  demo                 an evening of a player, without any Plex"""

EPILOG = """@FILE reads flags from a file, one a line, with # comments.
Two dashes do as well as one.
Exit status: 0 well; 1 it could not go on; 2 wrong use or wrong configuration."""

NOT_UTF_8 = "the @FILE is not UTF-8; save it as UTF-8."
HelpFormatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=80)


def two_dashes(words: Sequence[str]) -> list[str]:
    """Arguments with -flag as --flag."""
    return [f"-{word}" if re.match("-[a-z]{2}", word) else word for word in words]


class FlagParser(argparse.ArgumentParser):
    """argparse with flags in Go's style, files of flags, and errors as ConfigErrors.

    Inside, each flag has two dashes: with one, argparse would take -plex-token for -plex-token-file.
    """

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument --?", "-", message)
        message = re.sub(r"^\[Errno \d+\] (.*): '(.*)'$", r"@\2 cannot be read (\1); name a file of flags", message)
        raise ConfigError(f"{message} (see: streamerbrainz.py -h)")

    def format_help(self) -> str:
        return super().format_help().replace(" --", " -")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The arguments in a line of an @FILE, words quoted as in a shell."""
        if re.search("[\udc80-\udcff]", arg_line):
            raise ConfigError(NOT_UTF_8)
        arg_line = arg_line.removeprefix("\ufeff")            # of Windows' Notepad
        try:
            words = shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise ConfigError("a line of the @FILE has a quote without its end; put both or none.") from error
        if words and not re.match("-[a-z-]", words[0]):
            raise ConfigError("a line of the @FILE does not begin with a flag, as in: -webhooks-port 3001")
        if len(words) > 2:
            raise ConfigError(f"a line of the @FILE has more than a flag and its value: {quoted(words[0])}; "
                              "put the value in quotes.")
        return two_dashes(words)


def port_number(word: str) -> int:
    """A TCP port."""
    if (value := number(word)) is None or not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{quoted(word)} is no port; give a number from 1 to 65535")
    return value


def whole_number(word: str) -> int:
    """A number from 0 to a million."""
    if (value := number(word)) is None or value > 10**6:
        raise argparse.ArgumentTypeError(f"{quoted(word)} is no whole number from 0 to 1000000")
    return value


def interval_s(word: str) -> float:
    """An interval of 0 (none) or 1 s to a day."""
    if not re.fullmatch(r"\d+(\.\d+)?", word) or not (float(word) == 0 or 1 <= float(word) <= 86400):
        raise argparse.ArgumentTypeError(f"{quoted(word)} is no interval; give 0, or seconds from 1 to 86400")
    return float(word)


def speed_factor(word: str) -> float:
    """A factor from 1 to 100."""
    if not re.fullmatch(r"\d+(\.\d+)?", word) or not 1 <= float(word) <= 100:
        raise argparse.ArgumentTypeError(f"{quoted(word)} is no speed; give a number from 1 to 100")
    return float(word)


def server_url(word: str) -> str:
    """The base URL of a server, without a slash at its end.  The URL itself is in no message: it may hold a token."""
    try:
        parts = urllib.parse.urlsplit(word)
        valid = (parts.scheme in ("http", "https") and parts.hostname and parts.hostname.encode("idna")
                 and parts.port != 0 and re.fullmatch("[!-~]+", word))
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError("this is no URL of a server; give one such as http://192.168.1.5:32400")
    if parts.username is not None or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError("the URL carries more than an address; the token goes into a -plex-token-file")
    return word.rstrip("/?#")


def flag_parser() -> FlagParser:
    """All flags of all commands."""
    parser = FlagParser(prog="streamerbrainz.py", usage=USAGE, description=DESCRIPTION, epilog=EPILOG,
                        formatter_class=HelpFormatter, add_help=False, allow_abbrev=False,
                        fromfile_prefix_chars="@", argument_default=argparse.SUPPRESS)    # the defaults are Config's
    flags = parser.add_argument_group("flags").add_argument
    flags("--webhooks-port", type=port_number, metavar="PORT", help="HTTP listener port (default 3001)")
    flags("--webhooks-host", metavar="HOST", help="address to listen on (default: all, IPv4 and IPv6)")
    flags("--webhook-secret-file", metavar="FILE", help="secret that each webhook must bring as ?token=")
    flags("--rate-limit", type=whole_number, metavar="N",
          help="webhooks a minute from one address (default 100 with a secret or the tracker, else none; 0 for none)")
    flags("--plex-server-url", type=server_url, metavar="URL", help="e.g. http://plex.home.arpa:32400")
    flags("--plex-token-file", metavar="FILE", help="file that holds the Plex token")
    flags("--plex-ca-file", metavar="FILE", help="CA bundle for an https server with its own certificate")
    flags("--plex-machine-id", metavar="ID", help="machineIdentifier of the player")
    flags("--poll-interval", type=interval_s, metavar="S", dest="poll_interval_s",
          help="seconds between slow looks, in case all else is lost (default 30; 0 for none)")
    flags("--no-plex-events", action="store_false", dest="plex_events", help="do not open the server's event stream")
    flags("--on-event", metavar="COMMAND", help="command to run on each change, with its arguments")
    flags("--active-timeout", type=interval_s, metavar="S", dest="active_timeout_s",
          help="seconds from the last playing to the command's inactive (default 10)")
    flags("--tracker-db", metavar="FILE", help="SQLite file of the watch tracker; turns the tracker on")
    flags("--tracker-log-days", type=whole_number, metavar="N",
          help="days that finished rows of its journal are kept (default 90; 0 for ever)")
    flags("--no-auto-mark-watched", action="store_false", dest="auto_mark_watched",
          help="find the show of each webhook, but mark nothing")
    flags("--auto-add-shows", action="store_true", help="add a show of certain identity that the tracker lacks")
    flags("--accounts", metavar="NAMES",
          help="Plex accounts whose watching counts: titles or ids, with commas; * for all (default: the owner's)")
    flags("--tmdb-token-file", metavar="FILE", help="TMDB API token, for shows that only TMDB can identify")
    flags("--log-level", choices=tuple(LEVELS), metavar="LEVEL", help="error, warn, info (default) or debug")
    flags("--log-format", choices=("text", "json"), metavar="FORMAT", help="text (logfmt, default) or json")
    flags("--json", action="store_true", help="players, doctor, tracker: print JSON")
    flags("--watch", type=interval_s, metavar="S", dest="watch_s",
          help="doctor: then tell for so many seconds which witness sees a play")
    flags("--status", choices=(SUCCESS, FAILED, IGNORED, DUPLICATE, "waiting"), metavar="STATUS",
          help="tracker log: success, failed, ignored, duplicate or waiting")
    flags("--show", metavar="SHOW", help="tracker log: of this show, by its id or words of its title")
    flags("--last", type=whole_number, metavar="N", help="tracker log: so many rows (default 20)")
    flags("--speed", type=speed_factor, metavar="N", help="demo: so many times faster (default 1)")
    flags("-h", "--help", action="help", help="this help")
    flags("--version", action="version", version=f"streamerbrainz {VERSION}", help="the version")
    return parser


def players_url(word: str) -> str:
    """The URL of a server that is given as HOST:PORT or as a URL."""
    try:
        return server_url(word if "//" in word else f"http://{word}")
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"players: {error}.") from error


def unknown_words(words: Sequence[str]) -> str:
    """What is said of words that are no flags.  A word may be a token: only flags are repeated."""
    flag = next(re.sub("^--?|=.*", "-", word).rstrip("-") for word in words if word.startswith("-"))
    hint = " The token goes into a file: -plex-token-file." if "token" in flag else ""
    return f"there is no flag {quoted(flag)}; see: streamerbrainz.py -h.{hint}"


def parse_config(words: Sequence[str]) -> Config:
    """The Config in the words of a command line; raises ConfigError."""
    words = two_dashes(words)
    command = words.pop(0) if words and not words[0].startswith(("-", "@")) else "run"
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {quoted(command)}; the commands are {', '.join(COMMANDS)}.")
    try:
        flags, unknown = flag_parser().parse_known_args(words)
    except UnicodeDecodeError as error:                 # Python 3.11; later ones decode what is none as surrogates
        raise ConfigError(NOT_UTF_8) from error
    if any(word.startswith("-") and word != "-" for word in unknown):
        raise ConfigError(unknown_words(unknown))
    if len(unknown) > {"players": 1, "tracker": 99, "hook": 1}.get(command, 0):
        raise ConfigError("there is a word too many. (The command comes first, each value after its flag. No token "
                          "goes on the command line, where ps shows it: see -plex-token-file.)")
    if command == "players":
        unknown = [players_url(word) for word in unknown]
    config = Config(command=command, words=tuple(unknown), **vars(flags))
    if command == "run":
        check_complete(config)
    return config


def main(words: Sequence[str]) -> int | Callable[[], int]:
    """Run a command line; -> the exit status, or what is to be called for it."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")        # titles in every script, terminals in one
        config = parse_config(words)
        set_up_log(config)
        return COMMANDS[config.command](config)
    except (ConfigError, TrackerError, PlexError) as error:
        print(f"{'<3>' if in_journal(os.environ) else 'streamerbrainz: '}{printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:                           # streamerbrainz.py players | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def carry_on(remains: Callable[[], int]) -> NoReturn:
    """Do what remains when the script has come to its end, and exit with the status that it returns.

    CPython holds the syntax tree of a script until then: 10 MB of this one.  What it calls
    afterwards, still in the main thread and with all in working order, is sys.excepthook.
    """
    def after_the_script(*_: object) -> NoReturn:
        sys.excepthook = sys.__excepthook__
        with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):      # another libc, or forbidden
            import ctypes  # here: the daemon has begun

            ctypes.CDLL(None).malloc_trim(0)          # what is free goes back to the system
        try:
            status = remains()
        except Exception:                             # a bug of ours
            sys.__excepthook__(*sys.exc_info())
            status = 1
        sys.exit(status)
    sys.excepthook = after_the_script
    raise RuntimeError("nothing is wrong: the script ends here, and the hook carries on")


if __name__ == "__main__":
    outcome = main(sys.argv[1:])
    if callable(outcome):
        carry_on(outcome)
    sys.exit(outcome)
