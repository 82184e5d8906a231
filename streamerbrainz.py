#!/usr/bin/env python3
"""StreamerBrainz tells what your Plex player is doing, and remembers what you have watched.

It receives the webhooks of Plex Media Server, asks its sessions about one player, mostly Plexamp, and logs each change:

    state=playing title="Karma Police" artist=Radiohead album="OK Computer" ...

It also shows each change on a page, runs a command for it, and marks finished episodes and movies as watched in a
database.  It installs itself (`setup`), and finds out why webhooks do not arrive (`doctor`).

Three sources tell of a change; we call them witnesses.  A webhook says that something happened.  The server's event
stream tells each change at once.  /status/sessions says what is so now.  Each of them is wrong at times: webhooks get
lost, doubled and late; the stream breaks; sessions lag behind, and keep a crashed player for minutes.  So one pure
function, advance(), is the judge of what they say.  It promises: each true change is reported once, in order and soon;
nothing is reported that was not true; whatever is reported as playing is later reported as stopped, once.

    Plex Media Server          (a browser, curl, Prometheus)
      |  POST /webhooks/plex     |  GET / /now /events /healthz /metrics, /watched and the tracker's others
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

    setup, login, webhook, doctor ---- sign-in, servers, the URLs of webhooks ----> plex.tv
    setup, doctor -------------------- /now, /healthz, a test webhook ------------> the Listener above

How to read it.  The file is a book of chapters; `grep '^# ===' streamerbrainz.py` lists them.  Each begins with what it
is for, the way of its data, its threads, and what it needs of others besides Ground (a test checks that).  Its first
part is pure: it computes and decides, and touches no clock, file, socket, thread, log or environment; time comes in as
an argument.  The second part, below `# --- the world`, does what was decided.  To understand Hooks, read Ground and
Hooks.  If you do not want the tracker, skip Tracker and Browse: no chapter before them needs them.

thread             owns                                never
main               nothing: it starts the others       stays: its end frees memory (see outlive_main)
watcher            the PlayerStates and when to look   waits for Plex over PLEX_S
listener           the listening socket                reads from a connection
request (0 to 64)  one connection and its bytes        queries Plex (but for a picture), decides (but for corrections)
worker             the tracker's shows and marks       asks a server within a transaction
hooks              the one command that runs           delays the watcher
stream             its connection to the server        decides
names (0 to 4)     the lookup of one name              makes anybody wait past their deadline
log (0 or 1)       waiting until stderr has room       writes before
signals            all signals: the others block them  decides (the inbox gets them), but ends us if the watcher hangs
(`setup` and `demo` start others, too: see there.)
Threads exchange values that never change: through the inbox (a SimpleQueue) and the queues in Board.streams, or by
replacing one reference (Board.status; in KNOWN, a name's addresses).  Shared under locks of their own are the Gate (who
may send), the Listener (its connections), Tracker, Board (pictures).  All use PlexServer; only the watcher changes its
token.

Vocabulary: Plex's own words, transliterated: rating_key, view_offset, machine_identifier.
  server   Plex Media Server, always        player   the machine that plays
  session  an item that a player has now    item     a track, episode, movie, clip, photo
  look     one query of /status/sessions    listener our own HTTP side
  show     a series; in the tracker also a  entry    a row of the tracker's journal: a webhook, or a play
           movie, as season 0, episode 0             that is known only from the server's history
  contract what users and other programs rely on: flags, keys of the log and of JSON, paths, statuses, exit statuses
Units: Plex's times are integer milliseconds; our own end in _s (seconds).  `at`: monotonic s; in the tracker, Unix s.
Exit status: 0 success; 1 it failed; 2 wrong use or wrong configuration.
"""
from __future__ import annotations

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
import glob
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
import traceback
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

if sys.version_info < (3, 11):      # noqa: UP036  # older Pythons can read this file, but not run it
    sys.stderr.write("streamerbrainz: needs Python 3.11 or newer; this is {}.{}\n".format(*sys.version_info))
    sys.exit(2)

# === Ground: what every chapter uses (Config, errors, Item, Change, the log's words, secrets) ===
# What for: the values that travel through the whole program, and the few words in which it speaks.
# Way: Plex's attributes -> Item; a change of the player -> Change -> the keys of a log line
# Threads: none.  Values never change, so every thread may read them.

VERSION = "0.1.0"
BUILT = 1793491200            # when this program was not there yet (2026-11-01): a clock before it is wrong
USER_AGENT = f"StreamerBrainz/{VERSION}"      # and the Server header
PLEX_S = 5.0                  # for one whole answer of a server; Plex in the same house takes milliseconds
WARN_AGAIN_S = 60.0           # between two equal warnings that strangers can cause

class Config(NamedTuple):
    """What the flags say, checked; made by parse_config().  This is the help of the flags (see help_text()):

    -webhooks-port PORT        HTTP listener port (default 3001)
    -webhooks-host HOST        address to listen on (default: all, IPv4 and IPv6)
    -webhook-secret-file FILE  secret that each webhook must bring as ?token=
    -rate-limit N              webhooks a minute from one address; 0: any (default 100 with a secret or the tracker)
    -plex-server-url URL       e.g. http://plex.home.arpa:32400
    -plex-token-file FILE      file that holds the Plex token
    -plex-ca-file FILE         CA bundle for an https server with its own certificate
    -plex-machine-id ID        machineIdentifier of the player
    -poll-interval S           seconds between slow looks, in case webhooks and events are lost (default 30; 0 for none)
    -no-plex-events            do not open the server's event stream
    -on-event COMMAND          command to run on each change, with its arguments
    -active-timeout S          seconds without playing until the command is run with inactive (default 10)
    -tracker-db FILE           SQLite file of the watch tracker; turns the tracker on
    -tracker-log-days N        days to keep the finished entries of its journal (default 90; 0 for ever)
    -no-auto-mark-watched      find the show of each webhook, but mark nothing
    -auto-add-shows            add a missing show if it is certain which one it is
    -accounts NAMES            accounts whose watching counts: titles or ids, with commas; * for all (default: owner's)
    -tmdb-token-file FILE      TMDB API token, for shows that only TMDB can identify
    -log-level LEVEL           error, warn, info (default) or debug
    -log-format FORMAT         text (logfmt, default) or json
    -json                      players, doctor, tracker: print JSON
    -status STATUS             tracker log: success, failed, ignored, duplicate or waiting
    -show SHOW                 tracker log: of this show, by its id or words of its title
    -last N                    tracker log: how many entries (default 20; 0: all)
    -as FORM                   tracker export: trakt, for Trakt and what reads its history (default: our own)
    -at TIME                   tracker mark: when, as 2026-11-21T20:15:00Z (default: now)
    -speed N                   demo: how many times faster (default 1)
    -yes                       setup, login, webhook, uninstall: take each default, and ask nothing
    """
    command: str = "run"           # one of COMMANDS
    words: tuple[str, ...] = ()    # after the command: HOST:PORT for players, a command for tracker, an event for hook
    webhooks_host: str = ""        # "": all addresses
    webhooks_port: int = 3001
    webhook_secret_file: str = ""  # "": webhooks need no secret
    rate_limit: int | None = None  # 0: no limit; None: not given, see webhooks_a_minute
    plex_server_url: str = ""      # no slash at its end; "": webhooks only
    plex_token_file: str = ""
    plex_ca_file: str = ""         # "": the system's CAs
    plex_machine_id: str = ""
    poll_interval_s: float = 30.0  # 0: no slow looks
    plex_events: bool = True
    on_event: str = ""             # "": no command
    active_timeout_s: float = 10.0
    tracker_db: str = ""           # "": no tracker
    tracker_log_days: int = 90     # 0: for ever
    auto_mark_watched: bool = True
    auto_add_shows: bool = False
    accounts: str = ""             # "*": all; "": the webhook's owner
    tmdb_token_file: str = ""
    log_level: str = "info"
    log_format: str = "text"
    json: bool = False
    status: str = ""               # "": entries with any status
    show: str = ""                 # "": entries of all shows
    last: int = 20
    as_: str = ""                  # "": our own form
    at: int | None = None          # Unix s; None: now
    speed: float = 1.0
    yes: bool = False
    flags_file: str = ""           # where flags were read from; "": from the command line only

    @property
    def webhooks_a_minute(self) -> int:
        """How many webhooks one address may send; 0: no limit, as for those that cause a look and no more."""
        return 100 * bool(self.webhook_secret_file or self.tracker_db) if self.rate_limit is None else self.rate_limit

# -- Errors: by whose fault
class ConfigError(Exception):
    """The operator's fault: one sentence that names the flag and the remedy."""

class WebhookError(Exception):
    """The sender's fault: the HTTP status (4xx; 503 when too much is waiting), a sentence, headers of the answer."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] = MappingProxyType({})):
        super().__init__(sentence)
        self.status, self.headers = status, {**({"Retry-After": "5"} if status == 503 else {}), **headers}

class PlexError(Exception):
    """The fault of a server that was asked (Plex, plex.tv, TMDB) or of the network, as a sentence."""
    # fault: unreachable, starting (503), refused (401), forbidden (403: not owner's), pass (no Pass), missing, nonsense

    def __init__(self, fault: str, sentence: str):
        super().__init__(sentence)
        self.fault = fault

class TrackerError(Exception):
    """The fault of the disk or of the tracker's database, as a sentence."""

# -- Items: Plex's attributes -> Item (parse_item)
# JSON and XML have the same names, and numbers may be strings.  Any other shape counts as missing: nothing here raises.
MAX_TEXT = 500                # characters kept of a title or a name; 200 are many
LAST_TIME = 2**31 - 1         # the last second that every system can show: a clock of 32 bits ends here, in 2038
MAX_VALUES = 100_000          # of an answer: each costs up to 80 bytes in JSON, 200 in XML; a library's page has 50,000

def text(value: object, most: int = MAX_TEXT) -> str:
    """A foreign value as text of limited length; "" for anything but text and numbers."""
    if isinstance(value, str):    # JSON can hold half of a surrogate pair, which no output can encode: it becomes "?"
        return value[:most] if value.isascii() else value[:most].encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else ""

def number(value: object) -> int | None:
    """A foreign value as an int from 0 to 2**53; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 16:
        value = int(value)
    return int(value) if isinstance(value, (int, float)) and type(value) is not bool and 0 <= value <= 2**53 else None

def json_object(value: object) -> Mapping[str, Any]:
    """A foreign value as a JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}

def time_of(value: object) -> int:
    """A foreign Unix time, bounded: from 0 to LAST_TIME; 0 for anything else."""
    return min(number(value) or 0, LAST_TIME)

def http_time(date: object) -> float | None:
    """The Unix time in a Date header; None for anything else."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):       # what email.utils raises on other words
        return email.utils.parsedate_to_datetime(str(date)).timestamp()
    return None

def json_value(content: bytes, most: int = MAX_VALUES) -> object:
    """The value in foreign JSON; None also if it is not JSON, nested too deep, or has too many values."""
    try:
        return json.loads(content) if len(content) <= most or sum(map(content.count, b",:[{")) <= most else None
    except (ValueError, RecursionError, MemoryError):
        return None

TRACK, EPISODE, MOVIE, PHOTO = "track", "episode", "movie", "photo"       # of Item.type

class Item(NamedTuple):
    """What is played, as webhooks and sessions both describe it."""
    type: str = ""                # TRACK, EPISODE, MOVIE, PHOTO, clip, ...
    rating_key: str = ""          # the server's id; hex for video on demand, "" for live TV
    guid: str = ""                # plex://track/..., com.plexapp.agents..., local://...
    title: str = ""
    parent_title: str = ""        # the album or season
    grandparent_title: str = ""   # the album's artist ("Various Artists") or the show
    original_title: str = ""      # the track's own artist, where it differs
    parent_index: int | None = None   # season; None: not given
    index: int | None = None      # type: ignore[assignment]  # episode or track; None: not given (tuple has one, too)
    duration: int | None = None   # ms; None: not given
    thumb: str = ""               # path of its picture on the server; "": not given
    sample_rate: int | None = None    # Hz; None: not given (webhooks)
    bit_depth: int | None = None  # None: not given (webhooks, lossy formats)

    @property
    def identity(self) -> str:
        """What distinguishes this item from every other on the same server."""
        return self.rating_key or self.guid or self.title

    @property
    def artist(self) -> str:
        """The artist of a track; of an episode, the show."""
        return self.original_title or self.grandparent_title

def parse_item(attributes: Mapping[str, Any]) -> Item:
    """The Item in Plex's attributes (JSON Metadata, or those of an XML element)."""
    get = attributes.get
    # We fetch a picture with the owner's token: its path must not lead to another host, nor start something there.
    picture = re.fullmatch(r"/library/metadata/\w+/(thumb|art|poster)(/\w+)?", text(get("thumb")), re.ASCII)
    # Home videos and what is from YouTube come as movies of the subtype clip.
    word = text(get("subtype" if get("subtype") == "clip" else "type"))
    return Item(type=word, guid=text(get("guid")), grandparent_title=text(get("grandparentTitle")),
                rating_key=text(get("ratingKey")), title=text(get("title")), parent_title=text(get("parentTitle")),
                index=number(get("index")), original_title=text(get("originalTitle")), duration=number(get("duration")),
                parent_index=number(get("parentIndex")), thumb=picture[0] if picture else "")

# What a player does.  BUFFERING is a start, a seek, a skip, or a word of Plex that we do not know.
PLAYING, PAUSED, STOPPED, BUFFERING = "playing", "paused", "stopped", "buffering"

class Change(NamedTuple):
    """One change of the player.  Log, page, hook and metrics all report these, and nothing else."""
    state: str                    # PLAYING, PAUSED or STOPPED
    old_state: str                # before it
    item: Item                    # what plays; what played last when STOPPED
    position_ms: int              # as Plex last said; when STOPPED, plus the time since then; 0: not given
    player_title: str
    machine_identifier: str
    by: str                       # what made us believe it: webhook, events, sessions, poll or silence
    reason: str = ""              # "frozen": the session still exists, but nothing in it moves; "": none

# -- Words: values -> log line, JSON, sentence
def printable(line: str) -> str:
    """A line in which no character can start a new line, colour a terminal or turn the reading direction."""
    return line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)

def quoted(value: object) -> str:
    """A value of the text log: bare if it cannot be misread, else a JSON string.  No title can forge a line."""
    bare = "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    is_plain = re.fullmatch(r"[\w.:/+-]+", bare) and bare.isprintable()
    return bare if is_plain else printable(json.dumps(bare, ensure_ascii=False))

def text_line(sentence: str, fields: Mapping[str, object]) -> str:
    """A line of the text log: a sentence (or ""), then logfmt."""
    return " ".join(filter(None, [printable(sentence), *(f"{key}={quoted(each)}" for key, each in fields.items())]))

def json_line(fields: Mapping[str, object]) -> str:
    """A line of the JSON log: one object."""
    return printable(json.dumps(fields, ensure_ascii=False))

def change_fields(change: Change, name_machine: bool, say_why: bool = False) -> dict[str, object]:
    """A Change as keys and values of the log, in the order that is promised to other programs."""
    item = change.item            # name_machine: with the player's identifier; say_why: with what made us believe it
    of = ({"show": item.grandparent_title, "season": item.parent_index, "episode": item.index}
          if item.type == EPISODE else {"artist": item.artist, "album": item.parent_title}
          if item.type == TRACK else {"artist": "", "album": ""})
    more = (("machine_id", name_machine, change.machine_identifier), ("reason", change.reason, change.reason),
            ("by", say_why, change.by))
    return {"state": change.state, "title": item.title, **of, "position_ms": change.position_ms, "duration_ms":
            item.duration or 0, "player": change.player_title, **{key: each for key, wanted, each in more if wanted}}

def were(count: int) -> str:
    """The verb of so many things."""
    return "was" if count == 1 else "were"

def playing_sentence(state: str, item: Item | None) -> str:
    """What a player does, in words: 'playing "Karma Police" by Radiohead'."""
    if item is None:
        return STOPPED
    by = f" by {item.artist}" if item.type == TRACK and item.artist else ""
    of = f" of {item.grandparent_title}" if item.type == EPISODE and item.grandparent_title else ""
    return f'{state} "{item.title}"{of}{by}'

def iso_time(at: float | None) -> str | None:
    """A Unix time as it stands in JSON: 2026-11-21T20:15:00Z; None for None."""
    return None if at is None else f"{datetime.datetime.fromtimestamp(time_of(at), datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"

def bare_token(pasted: str) -> str:
    """The Plex token in what a person copied: alone, in quotes, as X-Plex-Token=... or in a whole URL."""
    found = re.search(r"X-Plex-Token[\"']?\s*[=:]\s*[\"']?([^\s\"'&<#]+)", pasted, re.I)
    return urllib.parse.unquote(found[1]) if found else pasted.strip(" \t\r\n\"'\u2018\u2019\u201c\u201d\ufeff")

# --- the world
log = logging.getLogger("streamerbrainz")

def say(level: int, sentence: str, **fields: object) -> None:
    """Log one fact: a sentence (or ""), and its keys and values."""
    log.log(level, "%s", sentence, extra={"fields": fields})

def why(error: object) -> str:
    """Why the system refused, in its own words and without its numbers."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__

def print_rows(config: Config, rows: Sequence[Mapping[str, Any]], lines: str) -> int:
    """Print the rows as JSON if -json is given, else the lines; -> the exit status."""
    print(json.dumps(rows, indent=2) if config.json else lines)
    return 0

def local_time(form: str, at: float | None) -> str:
    """A Unix time in this machine's time zone, in a form of strftime(); "" for None."""
    return "" if at is None else time.strftime(form, time.localtime(time_of(at)))

def shown_path(path: str) -> str:
    """A path for a message, if a part of it is there; a token that was given in a path's place is not shown."""
    # Of a missing file, such as ~/.config/streamerbrainz/plex-token, at least the home exists; of a token nothing does.
    part = path
    while part.strip("/.") and not os.path.lexists(part):
        part = os.path.dirname(part)
    if not part.strip("/."):                          # "/" and "." always exist
        return "the file that it names"
    return path + (" (if it is there, the unit hides it: it shows ~/.local/bin, ~/.config/streamerbrainz and, "
                   "to write, ~/.local/share/streamerbrainz only)") * is_hidden(path)

def is_hidden(path: str) -> bool:
    """Whether a path is missing for us, but may exist: our unit mounts an empty home over the real one."""
    home = os.path.expanduser("~")
    in_unit = "INVOCATION_ID" in os.environ and os.path.ismount(home)
    return in_unit and path.startswith(f"{home}/") and not os.path.exists(path)

# -- Our files: their usual places, and how they are written
SYSTEM_FLAGS = "/etc/streamerbrainz/flags"            # of a system unit

def usual(name: str) -> str:
    """The path of one of our files (flags, plex-token, webhook-secret, client-id, tracker.db) in its usual place."""
    variable, folder = ("XDG_DATA_HOME", "~/.local/share") if name == "tracker.db" else ("XDG_CONFIG_HOME", "~/.config")
    base = os.environ.get(variable, "")               # its specification wants a relative one to be ignored
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser(folder), "streamerbrainz", name)

def write_private(path: str, content: str, by: str, new_folder: bool = True, mode: int = 0o600) -> None:
    """Write a file beside its place and move it there, so that it is whole; raises ConfigError.  by: the command."""
    folder, name = os.path.split(place := os.path.realpath(path))      # a link, such as one to dotfiles, stays one
    try:
        if new_folder:
            os.makedirs(folder, 0o700, exist_ok=True)
        with contextlib.ExitStack() as failed:
            with tempfile.NamedTemporaryFile("w", dir=folder, prefix=name, delete=False, encoding="utf-8") as file:
                failed.callback(os.unlink, file.name)
                file.write(content)
            os.chmod(file.name, mode)
            os.replace(file.name, place)
            failed.pop_all()
    except OSError as error:
        raise ConfigError(f"{by}: {shown_path(path)} cannot be written ({why(error)}); "
                          "make its folder, writable by you.") from error

# -- Secrets in files: read again when the file changes
MAX_TOKEN_FILE = 4096         # bytes; Plex's tokens have 20 characters
SECRETS = {"-plex-token-file": "Plex token", "-webhook-secret-file": "webhook secret", "-tmdb-token-file": "TMDB token"}

def file_version(file: str | int) -> tuple[int, ...] | None:
    """Numbers that differ after a file (path or descriptor) was written or replaced; None: not a regular file."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG((status := os.stat(file)).st_mode):
            return status.st_ino, status.st_size, status.st_mtime_ns
    return None

def is_private(path: str, mode: int) -> bool:
    """Whether no other user can read a file.  systemd's credentials only look readable: their folder is closed."""
    return not mode & 0o077 or os.path.dirname(path) == os.environ.get("CREDENTIALS_DIRECTORY")

def read_regular(path: str, most: int) -> tuple[bytes, int, tuple[int, ...] | None]:
    """The first bytes of a file, its mode and its version (None: no regular file, and not read); raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:      # a FIFO would block for ever
        mode, version = os.fstat(file.fileno()).st_mode, file_version(file.fileno())
        return file.read(most) if version else b"", mode, version

def read_secrets(flag: str, path: str) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """The secrets in a flag's file (of webhooks two lines at most), and the file's version; raises ConfigError."""
    name, most = SECRETS[flag], 2 if flag == "-webhook-secret-file" else 1
    try:
        content, mode, version = read_regular(path, MAX_TOKEN_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: {shown_path(path)} cannot be read ({why(error)}); "
                          f"put the {name} there, readable by you only (chmod 600).") from error
    if not (content := content.strip()):
        raise ConfigError(f"{flag}: {path} is empty, or not a regular file; put the {name} there.")
    if flag == "-plex-token-file" and (token := bare_token(content.decode("utf-8", "replace")).encode()) != content:
        say(logging.WARNING, f"{flag}: the token was found, but {path} holds more; put nothing but the token there.")
        content = token
    words = [line.strip() for line in content.split(b"\n")]
    plain = rb"[!-~]+" if flag != "-webhook-secret-file" else rb"[!\"$'-~]+"      # & # % mean something in a URL
    if len(content) > MAX_TOKEN_FILE or len(words) > most or not all(re.fullmatch(plain, word) for word in words):
        raise ConfigError(f"{flag}: {path} holds more than a {name}; put one word of plain characters there"
                          f"{', or two, each on its own line' if most > 1 else ''}.")
    if not is_private(path, mode):
        say(logging.WARNING, f"others can read the file of {flag}; correct it with: chmod 600 {shlex.quote(path)}")
    return tuple(word.decode("ascii") for word in words), version

class SecretFile:
    """The secrets in a file, read again when it has changed.  For one thread, or under a lock."""

    def __init__(self, flag: str, path: str):
        """flag: one of SECRETS, which reads this file.  Raises ConfigError if there is no secret in it."""
        self.flag, self.path = flag, path
        self.words, self.version = read_secrets(flag, path)

    def renewed(self) -> tuple[str, ...]:
        """The secrets that are valid now.  While the file is being replaced or cannot be read: the last ones."""
        if self.version != (version := file_version(self.path)):
            try:
                self.words, self.version = read_secrets(self.flag, self.path)
                say(logging.INFO, f"the {SECRETS[self.flag]} was read again", file=self.path)
            except ConfigError as error:
                self.version = version                # say it once; try again when the file changes
                say(logging.WARNING, f"the old {SECRETS[self.flag]} stays in use: {error}")
        return self.words

    def first(self) -> str:
        """The first of them that are valid now."""
        return self.renewed()[0]

# === Player: what Plex says -> what is true (parse_webhook, parse_sessions, advance, PlexServer, Watcher) ===
# What for: to know what the chosen player does, and to report each change of it once, in order and never falsely.
# Way: bytes -> Webhook, Notification, Look -> advance() -> PlayerState and Changes -> tell(Status, Changes)
# Threads: "watcher" owns the PlayerStates, asks, decides; "stream" reads events into its inbox; "names" look names up.

# -- Webhook: bytes -> Webhook (parse_webhook)
# More than these limits costs too much: JSON as Python objects takes 25 times its bytes; email.parser is quadratic.
MAX_GUIDS, MAX_PARTS, MAX_PAYLOAD = 16, 16, 2**20             # Plex sends 3 guids, 2 parts and 10 kB of JSON
MAX_PAYLOAD_VALUES = 20_000   # in a payload's JSON, by the characters that stand before one; Plex's have about 500
MAX_PART_HEADER, MAX_CONTENT_TYPE = 1024, 300                 # Plex sends under 100 bytes, and 81 characters

class Scrobble(NamedTuple):
    """What a finished episode or movie tells besides its Item."""
    show_key: str = ""            # grandparentRatingKey: the show on its server; "": not given
    show_guid: str = ""           # grandparentGuid; "": not given (legacy agents)
    guids: tuple[str, ...] = ()   # the item's own in other databases: imdb://, tmdb://, tvdb://
    year: int | None = None       # of the episode, its season or the movie; None: not given
    viewed_at: int = 0            # lastViewedAt, by the server's clock (Unix s); 0: not given

def item_guids(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids in Plex's `Guid`, a list of {"id": "tmdb://1396"}."""
    found = attributes.get("Guid")
    return tuple(text(json_object(each).get("id")) for each in (found[:MAX_GUIDS] if isinstance(found, list) else ()))

def parse_scrobble(attributes: Mapping[str, Any]) -> Scrobble:
    """The Scrobble in Plex's attributes (JSON Metadata)."""
    year = number(attributes.get("year")) or number(text(attributes.get("originallyAvailableAt"))[:4])    # 2021-10-07
    return Scrobble(text(attributes.get("grandparentRatingKey")), text(attributes.get("grandparentGuid")),
                    item_guids(attributes), year or None, time_of(attributes.get("lastViewedAt")))

class Webhook(NamedTuple):
    """One webhook of Plex Media Server."""
    event: str                    # media.play, library.new, ...; unknown ones will come
    player_uuid: str = ""         # very probably the player's machineIdentifier; "": no player
    player_title: str = ""
    item: Item | None = None      # None: not given
    view_offset: int | None = None  # ms; None: not given (usual)
    server: str = ""              # Server.uuid: its machineIdentifier; "": not given
    account_id: str = ""          # Account.id: the server's, or plex.tv's; the owner's is not always 1
    account: str = ""             # Account.title: a name, or an e-mail address
    user: bool = False            # the person is the owner of the account that has this webhook
    scrobble: Scrobble | None = None      # only in a media.scrobble

Body = bytes | bytearray | mmap.mmap      # of a request: small, in chunks, large

def parameter(message: email.message.Message, name: str, header: str) -> str:
    """A parameter of a header; "" if it is missing, or in a form that Plex never uses (RFC 2231)."""
    with contextlib.suppress(ValueError, TypeError, LookupError):     # email.message's, on broken RFC 2231 forms
        return value if isinstance(value := message.get_param(name, "", header), str) else ""
    return ""

# The name in a part's header; "": it has none.  Plex sends the same two headers each time.
part_name = functools.lru_cache(maxsize=16)(lambda header: parameter(
    email.parser.BytesHeaderParser().parsebytes(header), "name", "Content-Disposition"))

def delimiters(body: Body, delimiter: bytes) -> Iterator[tuple[int, int]]:
    """Where each delimiter line (with the line break before it) and the part after it begin; raises WebhookError."""
    end = 0
    for _ in range(MAX_PARTS + 1):
        if (start := body.find(delimiter, end)) < 0:
            raise WebhookError(400, "The body is cut short: its closing boundary is missing.")
        end = start + len(delimiter)
        if start and body[start - 1] != 0x0A:         # in the middle of a line, in a JPEG for example
            continue
        yield start - (2 if body[start - 2:start] == b"\r\n" else 1), body.find(b"\n", end) + 1
        if body[end:end + 2] == b"--":
            return
    raise WebhookError(400, f"The body has more than {MAX_PARTS} parts.")

def parse_multipart(boundary: str, body: Body) -> dict[str, memoryview]:
    """The parts named payload and thumb of a multipart body; the first, if a name comes twice."""
    # We cut the body ourselves: if a picture of 100 kB is in it, email.parser takes 1.8 ms and six times its memory.
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():              # RFC 2046, 5.1.1
        raise WebhookError(400, "The Content-Type has no valid boundary of the parts.")
    parts: dict[str, memoryview] = {}
    for (_, start), (stop, _) in itertools.pairwise(delimiters(body, b"--" + boundary.encode("ascii"))):
        if (blank := re.compile(rb"\r?\n\r?\n").search(body, start - 2, min(stop, start + MAX_PART_HEADER))) is None:
            raise WebhookError(400, "A part of the body has no end of its header.")
        if (name := part_name(bytes(body[start:blank.start()]))) in ("payload", "thumb"):
            parts.setdefault(name, memoryview(body)[blank.end():stop])
    return parts

def parse_payload(payload: Body | memoryview) -> Webhook:
    """The Webhook in a payload's JSON, which is UTF-8 whatever its header says; raises WebhookError."""
    if len(payload) > MAX_PAYLOAD:
        raise WebhookError(413, f"The payload is larger than {MAX_PAYLOAD} bytes.")
    if (content := json_value(bytes(payload), MAX_PAYLOAD_VALUES)) is None:
        raise WebhookError(400, f"The payload is no JSON object, or has more than {MAX_PAYLOAD_VALUES} values.")
    event = (fields := json_object(content)).get("event")
    if not isinstance(event, str) or not event:
        raise WebhookError(400, "The payload is not a Plex webhook: it has no event.")
    player, metadata, account = (json_object(fields.get(name)) for name in ("Player", "Metadata", "Account"))
    return Webhook(event=text(event), player_uuid=text(player.get("uuid")), player_title=text(player.get("title")),
                   item=parse_item(metadata) if metadata else None, view_offset=number(metadata.get("viewOffset")),
                   server=text(json_object(fields.get("Server")).get("uuid")), account_id=text(account.get("id")),
                   account=text(account.get("title")), user=fields.get("user") is True,
                   scrobble=parse_scrobble(metadata) if event == "media.scrobble" else None)

def parse_webhook(content_type: str, body: Body) -> tuple[Webhook, memoryview]:
    """The Webhook in a request's body, and a view of its JPEG (empty: none); raises WebhookError."""
    if len(content_type) > MAX_CONTENT_TYPE:
        raise WebhookError(400, f"The Content-Type is longer than {MAX_CONTENT_TYPE} characters.")
    header = email.message.Message()
    header["Content-Type"] = content_type
    if (media_type := header.get_content_type()) == "application/json":       # from proxies and testers
        return parse_payload(body), memoryview(b"")
    if media_type != "multipart/form-data":
        raise WebhookError(415, "A Plex webhook is multipart/form-data; this is something else.")
    parts = parse_multipart(parameter(header, "boundary", "Content-Type"), body)
    if "payload" not in parts:
        raise WebhookError(400, "The part named payload is missing; it holds a webhook's JSON.")
    return parse_payload(parts["payload"]), parts.get("thumb", memoryview(b""))

def encode_webhook(payload: bytes, thumb: bytes = b"") -> tuple[str, bytes]:
    """Content-Type and body of a webhook in the form in which Plex sends it; for doctor, the demo and tests."""
    boundary = "-" * 24 + "Ag1hQ8fKx0PzJm3Wc5Ys7T"
    part = b"--%b\r\nContent-Disposition: form-data; name=%b\r\nContent-Type: %b\r\n\r\n%b\r\n"
    parts = ((b'"payload"', b"application/json", payload), (b'"thumb"; filename="thumb.jpg"', b"image/jpeg", thumb))
    body = b"".join(part % (boundary.encode(), *fields) for fields in parts[:1 + bool(thumb)])
    return f"multipart/form-data; boundary={boundary}", body + b"--%b--\r\n" % boundary.encode()

# -- Sessions: XML -> (Session, ...) (parse_sessions)
STILL_PRODUCTS = frozenset({"Plex for Sonos"})    # whose viewOffset stands still while they play; a capture shows it
IS_PLEX = "Does -plex-server-url point to Plex Media Server?"

class Session(NamedTuple):
    """One item that a player has now, from /status/sessions."""
    session_key: str              # the server's number; one number lasts over track changes
    machine_identifier: str       # of the player
    state: str                    # PLAYING, PAUSED or BUFFERING; an unknown word counts as BUFFERING
    item: Item
    view_offset: int | None       # ms, renewed every 10 to 15 s; None: not given (at the start, live TV)
    player_title: str
    product: str                  # Plexamp, Plex Web, Plex for Sonos, ...
    platform: str                 # Linux, iOS, ...
    user: str                     # the user's name; "": not given (a local player)

    @property
    def must_move(self) -> bool:
        """Whether its view_offset should move: it says that it plays, and gives a position."""
        return self.state == PLAYING and self.view_offset is not None and self.product not in STILL_PRODUCTS

# XML 1.0 forbids these, and Plex puts them into titles all the same: as characters and as references.
_CONTROLS, _NO_CHARACTERS = bytes((*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20))), re.compile(b"\xef\xbf[\xbe\xbf]")
_REFERENCES = re.compile(rb"&#(?:0*(?:[0-8]|11|12|1[4-9]|2\d|3[01])|x0*(?:[0-8bBcCeEfF]|1[0-9a-fA-F]|[fF]{3}[eEfF]));")

def parse_xml(xml: bytes) -> ElementTree.Element:
    """The MediaContainer of an answer; raises PlexError if there is none."""
    if 2 * sum(map(xml.count, b"<=&")) > MAX_VALUES:
        raise PlexError("nonsense", f"The server's answer holds over {MAX_VALUES} values, far more than Plex's.")
    try:
        # As bytes: one emoji makes each character of a str four bytes.
        plain = _NO_CHARACTERS.sub(b"", xml.decode("utf-8", "replace").encode().translate(None, _CONTROLS))
        # Refused before its entities can grow ("billion laughs").  No title has it: in those, "<" is a reference.
        if b"<!DOCTYPE" in (plain := _REFERENCES.sub(b"", plain)):
            raise PlexError("nonsense", "The server's answer has a DOCTYPE, which Plex never sends.")
        root = ElementTree.fromstring(plain, ElementTree.XMLParser(encoding="utf-8"))
    except (ElementTree.ParseError, MemoryError) as error:
        raise PlexError("nonsense", f"The server's answer is not XML, or is cut short. {IS_PLEX}") from error
    if root.tag != "MediaContainer":
        raise PlexError("nonsense", f"The server's answer is XML, but not a list of sessions. {IS_PLEX}")
    return root

def parse_sessions(xml: bytes) -> tuple[Session, ...]:
    """The sessions that have a player in an answer of /status/sessions; raises PlexError if it is no such answer."""
    found = []
    for element in parse_xml(xml):                    # a Track, a Video, a Photo or another one
        player, user, audio = ({} if (child := element.find(path)) is None else child.attrib
                               for path in ("Player", "User", "Media/Part/Stream[@streamType='2']"))
        state, item = player.get("state"), parse_item(element.attrib)._replace(
            sample_rate=number(audio.get("samplingRate")), bit_depth=number(audio.get("bitDepth")))
        if player.get("machineIdentifier") and state != STOPPED:
            found.append(Session(
                text(element.get("sessionKey")), text(player["machineIdentifier"]), state if state in (PLAYING, PAUSED)
                else BUFFERING, item, number(element.get("viewOffset")), text(player.get("title")),
                text(player.get("product")), text(player.get("platform")), text(user.get("title"))))
    return tuple(found)

def find_session(sessions: Sequence[Session]) -> Session | None:
    """Which of one player's sessions shows what it does: a playing one first, a photo last, then the newest."""
    # A player can have several: a paused track and a photo over it, or what a crash left behind.
    return max(sessions, default=None, key=lambda session: (
        session.state != PAUSED, session.item.type != PHOTO, number(session.session_key) or 0))

# -- Library: JSON or XML -> items (parse_container)
def parse_container(body: bytes) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The attributes of a MediaContainer, and those of each item in it, as JSON names them; raises PlexError."""
    if (body := body.lstrip())[:1] == b"<":           # we ask for JSON; older servers, and some paths, answer in XML
        root = parse_xml(body)
        return root.attrib, [each.attrib | {"Guid": [guid.attrib for guid in each.findall("Guid")]} for each in root]
    if not isinstance(container := json_object(json_value(body)).get("MediaContainer"), dict):
        raise PlexError("nonsense", f"The server's answer is neither JSON nor XML of Plex, or is cut short. {IS_PLEX}")
    lists = (container.get(name) for name in ("Metadata", "Directory", "Video", "Account", "Setting", "Server"))
    found = next((each for each in lists if isinstance(each, list)), [])
    return container, [each for each in found if isinstance(each, dict)]

# -- Notifications: lines of the event stream -> (Notification, ...) (read_events, parse_notifications)
MAX_EVENT = 64 * 1024         # bytes of an event of the stream; 300 are usual

class Notification(NamedTuple):
    """One `playing` event of the server's event stream: at each change, and about every 10 s while it plays."""
    state: str                    # PLAYING, PAUSED, STOPPED or BUFFERING
    session_key: str              # as in Session
    client_identifier: str        # the player's machineIdentifier; "": not given (older servers)
    rating_key: str               # as in Item
    view_offset: int | None       # ms; None: not given

def read_events(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The (event, data) of each server-sent event in a stream's lines; comments and other fields are ignored."""
    event, data = "", b""
    for line in lines:
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if field == b"event":
            event = value.strip().decode("utf-8", "replace")
        elif field == b"data" and len(data) <= MAX_EVENT:
            data += value
        elif not field and not value:                 # an empty line ends the event
            if data:
                yield event, data
            event, data = "", b""

def parse_notifications(data: bytes) -> tuple[Notification, ...]:
    """The notifications in an event's data: one, or a list, perhaps in a container.  Other shapes: none."""
    fields = json_object(json_value(data))
    found = json_object(fields.get("NotificationContainer", fields)).get("PlaySessionStateNotification")
    each = [json_object(one) for one in (found if isinstance(found, list) else [found])]
    return tuple(Notification(one["state"], text(one.get("sessionKey")), text(one.get("clientIdentifier")),
                              text(one.get("ratingKey")), number(one.get("viewOffset")))
                 for one in each if one.get("state") in (PLAYING, PAUSED, STOPPED, BUFFERING))

# -- The judge: an observation -> PlayerState and reports (advance)
# All that decides what is reported stands here.  There are three witnesses:
#   a webhook       says that something happened.  It can be lost, doubled, late or out of order.
#   a notification  of the event stream says each change at once.  The stream can break.
#   a look          says what is so now.  Sessions lag behind by up to LAG_S, their positions by up to LIFE_S, and a
#                   player that crashed stays in them for 3 to 30 minutes.
# Where there is a server to ask, only a look changes what is believed; a webhook or a notification is a reason to look
# at once, and a Claim.  Where there is none, the webhooks decide.  Three rules do the most:
#   A claim waits for the sessions that it is about: until they agree, we look again for some seconds.
#   A session counts while it lives: while it moves, or a witness speaks of it.  Others stand still: a crash left them.
#   Of positions, the latest that a witness said counts.

TRANSITIONS = {      # (what is believed, what a witness says) -> what is believed then; None: wait until it says more
    (STOPPED, STOPPED): STOPPED, (STOPPED, PLAYING): PLAYING, (STOPPED, PAUSED): PAUSED, (STOPPED, BUFFERING): PLAYING,
    (PLAYING, STOPPED): STOPPED, (PLAYING, PLAYING): PLAYING, (PLAYING, PAUSED): PAUSED, (PLAYING, BUFFERING): PLAYING,
    (PAUSED, STOPPED): STOPPED, (PAUSED, PLAYING): PLAYING, (PAUSED, PAUSED): PAUSED, (PAUSED, BUFFERING): None}
# What a webhook's event claims about its player; all other events claim nothing.
CLAIMS = {"media.play": PLAYING, "media.resume": PLAYING, "playback.started": PLAYING,
          "media.pause": PAUSED, "media.stop": STOPPED}
# From a look that failed to the next: first; at most, as it doubles; after a witness, for that shows the server lives.
RETRY_MIN_S, RETRY_MAX_S, RETRY_HEARD_S = 0.25, 16.0, 1.0
FOREIGN_S = 1.0     # from another player's webhook to a look: on some servers webhooks have another uuid for our player
LAG_S, LATE_S = 2.0, 10.0     # how late sessions show a change, seldom later; how late a webhook comes (5 s were seen)
BUFFERING_S = 2.0             # from one look to the next while a player buffers; for FROZEN_S, no longer
# When to look after a claim, until sessions agree: often enough to see a change of 2 s, seldom enough for MAX_LOOKS.
RELOOK_S = (0.1, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.5)
MAX_CLAIMS, MAX_SESSIONS = 16, 16     # claims that may wait (a skip makes three); a player's sessions, the last ones
WHOSE_S = (FOREIGN_S, 2.5)    # the same after a notification that does not say whose it is, until a look shows that
# No more than MAX_LOOKS in any BUDGET_S.  One claim may have FREE_LOOKS at once, a whole series; the rest is spread.
MAX_LOOKS, BUDGET_S, FREE_LOOKS = 20, 10.01, 12
LIFE_S = 16.0     # what plays shows life in it: Plex renews its position, and repeats its notification, each 10 to 15 s
# How long a playing view_offset stands still until its player counts as dead: two renewals and more, and a prime, for a
# track on repeat is there again if its length divides it; and until the next look at least: it may have begun again.
FROZEN_S, STILL_S = 41.0, 14.0
PROOF_S, PROOF_MISSES = 10.0, 3   # between a change and its webhook; missing in a row for a warning, as one may be lost
MAX_STRANGERS = 5             # other players that are named when ours is not seen
MAX_EARLY, MAX_DELAYS = 20, 20        # webhooks that wait for a look to show their change; delays, for their median

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

Observation = Webhook | Look | Outage | Notification | Stream | None      # None: nothing but that time has passed

class Recovery(NamedTuple):
    """The server answers again."""
    after_s: float                # since the first look that failed

class Claim(NamedTuple):
    """What a webhook or a notification says, until the sessions agree or time is up."""
    state: str                    # PLAYING, PAUSED or STOPPED
    identity: str                 # Item.identity; "": not given
    by: str                       # webhook or events
    session_key: str              # Session.session_key; "": not given (webhooks)
    at: float                     # when it was said
    view_offset: int | None = None    # ms; None: not given, or perhaps late (webhooks)
    ours: bool = True             # False: perhaps of another player

    def about(self, session: Session) -> bool:
        """Whether it speaks of a session.  A notification of live TV may have a rating key that the session lacks."""
        same_item = self.identity in ("", session.item.identity) or (self.session_key and not session.item.rating_key)
        return self.session_key in ("", session.session_key) and bool(same_item)

    def met_by(self, sessions: Iterable[Session]) -> bool:
        """Whether the player's sessions agree.  One that buffers is about to play."""
        states = {PLAYING if each.state == BUFFERING else each.state for each in sessions if self.about(each)}
        return self.state in (states or {STOPPED})

class Trace(NamedTuple):
    """What is remembered of a session from one look to the next."""
    session: Session              # as the last look showed it
    since: float                  # when this state at this view_offset was first seen
    alive_at: float               # its last sign of life, as far as known: a change in it, or a witness's word
    born: tuple[float, int]       # when its session_key was first seen, and that as a number; 0: it is none
    seen_at: float                # when the last look was that showed it
    told: bool = False            # a witness told of its state, too: that is no pause that a crash left behind
    said: tuple[float, int] = (-math.inf, 0)      # when the stream told its view_offset last, and that; ms
    stale: bool = False           # a newer session began after its last sign of life; until the next such sign

class Expected(NamedTuple):
    """A change whose webhook has not come yet, or a webhook whose change has not been seen yet."""
    state: str                    # PLAYING, PAUSED or STOPPED
    identity: str                 # Item.identity; "": not given
    at: float                     # when it was seen
    documented: bool = True       # Plex documents a webhook for it: if none comes, one is missing

    def matches(self, other: Expected | Claim) -> bool:
        """Whether both can belong to the same change of the player."""
        return self.state == other.state and (self.identity == other.identity or "" in (self.identity, other.identity))

class Proof(NamedTuple):
    """Whether webhooks arrive, as far as the other witnesses can tell."""
    changes: tuple[Expected, ...] = ()    # still without their webhook
    webhooks: tuple[Expected, ...] = ()   # still without their change
    arrived: int = 0
    missed: int = 0
    in_a_row: int = 0             # missed since the last one that arrived
    heard_at: float = -math.inf   # when the last webhook of our player came, whatever it told
    others: bool = False          # webhooks of other players have come since
    delays_s: tuple[float, ...] = ()      # of the last that arrived, from the change to its webhook; 0: it came first

class PlayerState(NamedTuple):
    """What is known of one player."""
    machine_identifier: str
    has_server: bool              # its sessions can be asked
    poll_interval_s: float = 0.0  # between slow looks; 0: none
    state: str = STOPPED          # as reported last
    item: Item | None = None      # what plays, or played last; None: nothing yet
    session_key: str = ""         # of the session that showed it
    previous: str = ""            # Item.identity of what played before it
    player_title: str = ""
    view_offset: int = 0          # ms; 0: not given
    moved_at: float = 0.0         # when view_offset was first seen
    changed_at: float = -math.inf  # when state or item changed last
    claims: tuple[Claim, ...] = ()    # what webhooks and notifications say, and the sessions do not yet; newest first
    looked: tuple[tuple[float, bool], ...] = ()   # when the last MAX_LOOKS looks were, and whether each found a change
    look_at: float = math.inf     # when to look next; infinity: not before something is heard
    look_why: str = "sessions"    # "poll": the next look is a slow look; "sessions": there is a reason for it
    proof: Proof = Proof()
    traces: tuple[Trace, ...] = ()
    foreign_keys: frozenset[str] = frozenset()    # Session.session_key of the other players, at the last look
    outage: Outage | None = None  # None: the last look succeeded
    outage_at: float = 0.0        # when it began
    retries: int = 0              # looks that failed in it

    def plays(self, identity: str) -> bool:
        """Whether that is the item that plays, or played last."""
        return self.item is not None and self.item.identity == identity

class WebhooksMissing(NamedTuple):
    """Changes were seen, but the webhooks that Plex documents for them did not come; or they arrive again."""
    in_a_row: int
    over: bool = False            # they arrive again
    others: bool = False          # those of other players arrive

Report = Change | Outage | Recovery | WebhooksMissing
Verdict = tuple[PlayerState, tuple[Report, ...]]      # the player after an observation, and what to report

def clamp(view_offset: int, item: Item | None) -> int:
    """A position that is not beyond the item's end; ms."""
    return min(view_offset, item.duration) if item and item.duration else view_offset

def position_ms(player: PlayerState, at: float) -> int:
    """Where the player is in its item at a time: the last position that Plex gave, plus the time since then; ms."""
    return clamp(player.view_offset + int((at - player.moved_at) * 1000) * (player.state == PLAYING), player.item)

def look_no_later(player: PlayerState, at: float) -> PlayerState:
    """The player, with its next look no later than a time."""
    return player if player.look_at <= at else player._replace(look_at=at, look_why="sessions")

def within_budget(player: PlayerState) -> PlayerState:
    """The player, with its next look put off until the budget allows it; not if nearly each look finds a change."""
    recent = [each for each in player.looked if each[0] > player.look_at - BUDGET_S]
    is_demo = 0 < player.poll_interval_s < BUDGET_S / MAX_LOOKS       # so short only in a quick one
    if is_demo or len(recent) < FREE_LOOKS or sum(found for _, found in recent) > 0.7 * len(recent):
        return player
    gap_s = (recent[0][0] + BUDGET_S - recent[-1][0]) / (MAX_LOOKS + 1 - len(recent))
    return player._replace(look_at=max(player.look_at, recent[-1][0] + gap_s))

def look_soon(player: PlayerState, at: float, wait_s: float = 0.0) -> PlayerState:
    """The player, with its next look after wait_s at the latest; in an outage Plex gets a rest."""
    return look_no_later(player, at + (RETRY_HEARD_S if player.outage else wait_s))

def claimed(player: PlayerState, claim: Claim, at: float, wait_s: float = 0.0) -> PlayerState:
    """The player with one more claim, and a look soon."""
    same = [each for each in player.claims if each[:4] == claim[:4]]
    if claim.ours or not same:                        # who repeats that somebody plays does not put off the looks
        player = player._replace(claims=(claim, *(each for each in player.claims if each not in same))[:MAX_CLAIMS])
    return look_soon(player, at, wait_s)

def revived(player: PlayerState, claim: Claim, at: float) -> PlayerState:
    """The player after a sign of life of the session that a claim is about, and of no other."""
    # A webhook names no session: it may mean what plays, but wakes no ghost of the same item, or of the item before.
    key = claim.session_key or (player.session_key if player.state != STOPPED else None)
    return player if claim.state == STOPPED else player._replace(traces=tuple(
        trace._replace(alive_at=at, told=trace.told or claim.state == trace.session.state, stale=False,
                       said=trace.said if claim.view_offset is None else (at, claim.view_offset))
        if trace.session.session_key == key and claim.about(trace.session) else trace for trace in player.traces))

def become(player: PlayerState, witnessed: str, item: Item | None, view_offset: int, moved_at: float, at: float,
           player_title: str, by: str, reason: str = "") -> Verdict:
    """A witness is believed: the player after it, and the Change, if anything changed."""
    # witnessed: what the player does, and with which item; moved_at: when it was at view_offset.
    state = TRANSITIONS[player.state, witnessed]
    if item is None or state is None or state == player.state == STOPPED:
        return player, ()
    same = player.plays(item.identity)
    old_state, changed = player.state, state != player.state or (state != STOPPED and not same)
    player = player._replace(state=state, item=item, view_offset=clamp(view_offset, item), moved_at=moved_at,
        changed_at=at if changed else player.changed_at, player_title=player_title or player.player_title,
        previous=player.previous if same or not player.item else player.item.identity)
    change = state, old_state, item, player.view_offset, player.player_title, player.machine_identifier, by, reason
    return player, (Change(*change),) if changed else ()

def after_webhook_alone(player: PlayerState, webhook: Webhook, at: float) -> Verdict:
    """After a webhook, where there is no server to ask: it is believed, unless it is late."""
    # Late: a pause of the item before this one, or a resume of what has stopped, that Plex sent before the last change.
    state, item = CLAIMS.get(webhook.event), webhook.item or player.item
    if state is None or item is None or webhook.player_uuid != player.machine_identifier:
        return player, ()
    left = item.identity == player.previous or (player.state == STOPPED and player.plays(item.identity))
    if left and webhook.event != "media.play" and at < player.changed_at + LATE_S:
        return player, ()
    goes_on = position_ms(player, at) if player.state != STOPPED and player.plays(item.identity) else 0
    return become(player, state, item, goes_on if webhook.view_offset is None else webhook.view_offset, at, at,
                  webhook.player_title, "webhook")

def after_webhook(player: PlayerState, webhook: Webhook, at: float) -> Verdict:
    """After a webhook: a reason to look, at once for our player, soon for another one."""
    if not player.has_server:
        return after_webhook_alone(player, webhook, at)
    state, ours = CLAIMS.get(webhook.event), webhook.player_uuid == player.machine_identifier
    if not ours or state is None:
        return look_soon(player, at, 0.0 if ours else FOREIGN_S) if webhook.player_uuid else player, ()
    claim = Claim(state, webhook.item.identity if webhook.item else "", "webhook", "", at)
    known = player.state == state and player.plays(claim.identity)      # else it may tell what is over: for one look
    late = not known and any(each.matches(claim) for each in player.proof.changes)
    return claimed(revived(player, claim, at), claim._replace(at=at - RELOOK_S[-1]) if late else claim, at), ()

def after_notification(player: PlayerState, notification: Notification, at: float) -> Verdict:
    """After a notification: what is known already is a sign of life, anything else a claim and a reason to look."""
    # Older servers do not name the player: then the session tells whose it is, and an unknown one needs a look to tell.
    key, keys = notification.session_key, {trace.session.session_key for trace in player.traces}
    named = notification.client_identifier
    if named not in ("", player.machine_identifier) or (not named and key in player.foreign_keys):
        return player, ()
    state = TRANSITIONS[player.state if key == player.session_key else STOPPED, notification.state] or PAUSED
    keyless = named and state == STOPPED and key not in keys      # it may come without a key, or under a new one
    said = Claim(state, notification.rating_key, "events", "" if keyless else key, at, notification.view_offset)
    known = [trace for trace in player.traces if said.about(trace.session)]
    if not named and key not in keys and (key or not known):
        return claimed(player, said._replace(ours=False), at, FOREIGN_S), ()
    if not known and state == STOPPED:                # of an item that is over already
        return player, ()
    # The stream is in order: what it said before of this item in this session is over.
    player = player._replace(claims=tuple(each for each in player.claims if each[1:4] != said[1:4]))
    alive = revived(player, said, at)
    if not known or not all(repeats(player, trace.session, notification.state) for trace in known):
        return claimed(alive, said, at), ()
    if said.view_offset is not None and player.session_key in {trace.session.session_key for trace in known}:
        alive = alive._replace(view_offset=clamp(said.view_offset, player.item), moved_at=at)
    return look_no_later(alive, at) if any(trace.stale for trace in known) else alive, ()

def repeats(player: PlayerState, session: Session, said: str) -> bool:
    """Whether a notification repeats what is known of a session; of what the player plays, that is what we reported."""
    # That another one plays is news while what we reported does not: a new item has buffered, and begins.
    reported = session.session_key == player.session_key and player.plays(session.item.identity)
    believed = player.state if reported else PLAYING if session.state == BUFFERING else session.state
    return TRANSITIONS[believed, said] in (believed, None) and (reported or said != PLAYING or player.state == PLAYING)


def after_stream(player: PlayerState, stream: Stream, at: float) -> Verdict:
    """After the event stream opened or broke: a look, for changes may have happened while nobody listened."""
    return (player if stream.event == "failed" or not player.has_server else look_soon(player, at)), ()

def follow(player: PlayerState, session: Session, at: float) -> Trace:
    """A session's trace after a look.  It is alive if its state or position have changed, or if it is new."""
    same = [trace for trace in player.traces if trace.session.session_key == session.session_key]
    before = next((trace for trace in same if trace.session.item.identity == session.item.identity), None)
    told = any(claim.state == session.state and claim.about(session) for claim in player.claims) or \
        any(trace.told and trace.session.state == session.state for trace in same)
    if before and (before.session.state, before.session.view_offset) == (session.state, session.view_offset):
        return before._replace(session=session, told=told, seen_at=at)
    alive_at = at
    if before and before.session.state == PLAYING and session.must_move and before.seen_at < before.since + LIFE_S:
        # It played on, and the last look may be long ago: where it was renewed last tells when, if it did not pause.
        moved_s = ((session.view_offset or 0) - (before.session.view_offset or 0)) / 1000
        alive_at = at if moved_s < 0 else min(at, max(before.alive_at, before.seen_at, before.since + moved_s))
    born = same[0].born if same else (at, number(session.session_key) or 0)
    return Trace(session, at, alive_at, born, at, told, before.said if before else (-math.inf, 0))

def frozen(trace: Trace, at: float) -> bool:
    """Whether a session says that it plays, but nothing has moved for FROZEN_S: its player crashed."""
    return trace.session.must_move and at - max(trace.since, trace.alive_at) >= FROZEN_S

def outlast(trace: Trace, traces: Sequence[Trace]) -> Trace:
    """A session's trace, stale if a newer session of the player began after its last sign of life."""
    # As after a crash and a new start.  A photo is no newer session: people look at photos while a track is paused.
    still = trace.session.must_move or (trace.session.state == PAUSED and not trace.told)
    newer = still and any(each.born > trace.born and each.born[0] >= trace.alive_at and each.session.item.type != PHOTO
                          for each in traces)
    return trace._replace(stale=True) if newer else trace

def may_live(player: PlayerState, trace: Trace, at: float) -> bool:
    """Whether a session counts.  What is believed to play does until it is frozen, another that plays for LIFE_S."""
    # Of two that play (a cast, several rooms), the other one is what the player does when the newest ends, if it lives.
    if not trace.session.must_move:
        return not trace.stale
    believed = player.state == PLAYING and player.session_key == trace.session.session_key and not trace.stale
    return not frozen(trace, at) if believed else at - trace.alive_at < LIFE_S

def schedule(player: PlayerState, traces: Sequence[Trace], chosen: Trace | None, at: float) -> PlayerState:
    """The player after a successful look, with the time of the next one.  traces: of the sessions that live."""
    begun = min(player.look_at, at)                   # a look may take PLEX_S
    keys = {trace.session.session_key for trace in traces}
    met = [each for each in player.claims if (each.session_key or None) in player.foreign_keys or
           ((each.ours or each.session_key in keys) and each.met_by(trace.session for trace in traces))]
    waits_s = {True: RELOOK_S, False: WHOSE_S}
    over = max((each.at for each in met if each.by == "webhook"), default=-math.inf)     # with it, those before it are
    claims = tuple(each for each in player.claims if each not in met and begun < each.at + waits_s[each.ours][-1]
                   and (each.by != "webhook" or each.at > over))
    due = [trace.alive_at + LIFE_S for trace in traces if trace.stale]      # by then it has shown life, or is dead
    for claim in {each.ours: each for each in claims[::-1]}.values():       # the newest of each kind serves all others
        first = min(each.at for each in claims if each[:2] == claim[:2])      # who says the same begins no new series
        marks = (*(first + wait_s for wait_s in waits_s[claim.ours]), claim.at + waits_s[claim.ours][-1])
        due.append(next((mark for mark in marks if mark > at), at))
    if any(claim.ours for claim in met):
        due.append(at + LAG_S)                        # a doubled, older claim may agree with sessions that lag
    if player.poll_interval_s and chosen and chosen.session.must_move and chosen.since < at:
        due.append(max(chosen.since + FROZEN_S, chosen.alive_at + FROZEN_S, at + STILL_S))
    if chosen and chosen.session.state == BUFFERING and at - chosen.since < FROZEN_S:
        due.append(at + BUFFERING_S)
    slow = at + (player.poll_interval_s or math.inf)
    return look_no_later(player._replace(claims=claims, look_at=slow, look_why="poll"), min(due, default=math.inf))

def believe(player: PlayerState, chosen: Trace, at: float) -> Verdict:
    """After a look that shows what the player does.  Its position is the latest that a witness said."""
    session, state, since = chosen.session, chosen.session.state, chosen.since
    about = [claim for claim in player.claims if claim.about(session)]
    if state == BUFFERING and any(claim.state == PLAYING for claim in about):
        state = PLAYING                               # two witnesses agree: it is starting
    by = next((claim.by for claim in about if claim.state == state), player.look_why)
    said_at, view_offset, moved_at = -math.inf, 0, at
    if player.state != STOPPED and player.plays(session.item.identity):      # what was stopped begins at 0
        said_at = player.moved_at if player.session_key == session.session_key else -math.inf
        moved_at = player.moved_at if player.state == state else at
        view_offset = position_ms(player, moved_at)
    told_at, told = max([chosen.said, *((each.at, each.view_offset) for each in about if each.view_offset is not None)])
    if said_at <= told_at > -math.inf:
        said_at, view_offset, moved_at = told_at, told, told_at
    if session.view_offset is not None and since > max(said_at, told_at + LAG_S):
        behind_s = since - moved_at + (view_offset - session.view_offset) / 1000
        if state != PLAYING or since >= said_at + LIFE_S or not 0 <= behind_s < LIFE_S:      # else not renewed since
            view_offset, moved_at = session.view_offset, since
    return become(player._replace(session_key=session.session_key), state, session.item, view_offset, moved_at, at,
                  session.player_title, by)

def after_look(player: PlayerState, look: Look, at: float) -> Verdict:
    """After a look: the sessions decide, except for those of a player that crashed."""
    # Of our player's sessions that live, the chosen one is what the player does.  If there is none, it has stopped: its
    # session is gone, or frozen.  If the chosen one is stale, nobody knows yet what the player does: nothing changes.
    changes: tuple[Report, ...] = ()
    back: tuple[Report, ...] = (Recovery(at - player.outage_at),) if player.outage else ()
    ours = [session for session in look.sessions if session.machine_identifier == player.machine_identifier]
    keys = frozenset(each.session_key for each in look.sessions if each.machine_identifier != player.machine_identifier)
    traces = [follow(player, session, at) for session in ours[-MAX_SESSIONS:]]
    traces = [outlast(trace, traces) for trace in traces]
    live = {trace.session: trace for trace in traces if may_live(player, trace, at)}
    chosen = live[session] if (session := find_session([*live])) else None
    if chosen and not chosen.stale:
        player, changes = believe(player, chosen, at)
    elif not chosen:
        died = any(frozen(trace, at) and player.plays(trace.session.item.identity) for trace in traces)
        by = next((each.by for each in player.claims if each.state == STOPPED and each.ours), player.look_why)
        player, changes = become(player, STOPPED, player.item, player.view_offset if died else position_ms(player, at),
                                 at, at, "", *(("silence", "frozen") if died else (by,)))
    player = player._replace(outage=None, retries=0, foreign_keys=keys, traces=tuple(traces))
    return schedule(player, [*live.values()], chosen, at), back + changes

def after_outage(player: PlayerState, outage: Outage, at: float) -> Verdict:
    """After a look that failed: nothing that is believed changes, and the next looks come after longer waits."""
    wait_s = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(player.retries, 10))
    news = () if player.outage and player.outage.fault == outage.fault else (outage,)
    since = player.outage_at if player.outage else at
    return player._replace(outage=outage, outage_at=since, retries=player.retries + 1, look_at=at + wait_s), news

def documented(change: Change, before: PlayerState) -> bool:
    """Whether Plex documents a webhook for a change: start, pause, resume and stop."""
    # There is none for a skip within the queue, for a crash (reason), and for one that was no crash: it plays on.
    same = before.plays(change.item.identity)
    back = change.old_state == STOPPED and any(before.plays(each.session.item.identity) for each in before.traces)
    skip = change.state == PLAYING and change.old_state != STOPPED
    return not (change.reason or (back if same else skip) or change.state == change.old_state)

def prove(before: PlayerState, after: Verdict, observation: Observation, at: float) -> Verdict:
    """The player with its Proof after an observation, and what that adds to the reports."""
    # Each documented change must have its webhook, whichever comes first, and under any player's uuid: it reached us.
    # What an outage hid proves nothing.  No alarm while our player's come: one may be of a change too short to be seen.
    (player, reports), proof, delays_s = after, before.proof, list[float]()
    changes = [each for each in proof.changes if at - each.at < PROOF_S]
    webhooks = [each for each in proof.webhooks if at - each.at < PROOF_S]
    missed = [each for each in proof.changes if each.documented and at - each.at >= PROOF_S]
    heard = observation if isinstance(observation, Webhook) else Webhook("")
    ours = heard.player_uuid == player.machine_identifier
    if heard.event in CLAIMS:
        webhook = Expected(CLAIMS[heard.event], heard.item.identity if heard.item else "", at)
        if met := next((each for each in changes if each.matches(webhook)), None):
            changes.remove(met)
            delays_s.append(at - met.at)
        else:
            webhooks.append(webhook)
    for change in reports:                            # what the first look shows had begun before us
        if isinstance(change, Change) and before.looked and not before.outage:
            seen = Expected(change.state, change.item.identity, at, documented(change, before))
            if any(each.matches(seen) for each in webhooks):
                webhooks = [each for each in webhooks if not each.matches(seen)]
                delays_s.append(0.0)
            else:
                changes.append(seen)
    in_a_row = 0 if delays_s or ours else proof.in_a_row + sum(each.at - PROOF_S > proof.heard_at for each in missed)
    is_news = (in_a_row >= PROOF_MISSES) != (proof.in_a_row >= PROOF_MISSES)
    others = not ours and (proof.others or bool(heard.player_uuid))
    news = (WebhooksMissing(in_a_row or proof.in_a_row, not in_a_row, others),) if is_news else ()
    proof = Proof(tuple(changes), tuple(webhooks[-MAX_EARLY:]), proof.arrived + len(delays_s),
                  proof.missed + len(missed), in_a_row, at if ours else proof.heard_at, others,
                  (*proof.delays_s, *delays_s)[-MAX_DELAYS:])
    return player._replace(proof=proof), reports + news

def proof_due(player: PlayerState) -> float:
    """When the next change counts as one without its webhook; infinity: each has its own."""
    return min((each.at + PROOF_S for each in player.proof.changes if each.documented), default=math.inf)

def missing_sentence(in_a_row: int, others: bool) -> str:
    """What log and page say when webhooks do not arrive.  others: those of other players do."""
    if others:
        return (f"webhooks of other players arrive, so the URL is right; but {in_a_row} changes of this player in a "
                "row came without one. Nothing is lost.")
    return (f"webhooks do not arrive: {in_a_row} changes in a row came without one. "
            "Without Plex Pass this is normal, and nothing is lost.")

def strangers(player: PlayerState, known: Mapping[str, str], sessions: Iterable[Session]) -> Mapping[str, str]:
    """The titles of other players, by machine_identifier, that play while ours was never seen; none once it was."""
    if player.item or any(each.machine_identifier == player.machine_identifier for each in sessions):
        return {}
    found = {each.machine_identifier: each.player_title for each in sessions if each.state == PLAYING}
    return dict([*known.items(), *(each for each in found.items() if each[0] not in known)][:MAX_STRANGERS])

def greeting(server: str, has_pass: bool | None, session: Session | None, player_title: str) -> str:
    """What the log says once: which server answers, and what our player does there.  session: the player's."""
    without = " (without Plex Pass: it sends no webhooks)" * (has_pass is False)
    doing = f"is {playing_sentence(session.state, session.item)}" if session else "plays nothing now"
    return f"Plex answers: {server}{without}; {player_title or 'the player'} {doing}"

def strangers_sentence(machine_identifier: str, others: Mapping[str, str]) -> str:
    """What log and page say when other players play, and ours was never seen."""
    names = "; ".join(printable(f"{title or 'a player'} is {key}") for key, title in others.items())
    return (f"the player {machine_identifier} has not been seen yet, but others play: {names}. If you mean one of "
            f"them, give its flag: -plex-machine-id {shlex.quote(next(iter(others)))}")

AFTER: dict[type, Callable[[PlayerState, Any, float], Verdict]] = {Webhook: after_webhook, Outage: after_outage,
    Notification: after_notification, Stream: after_stream, Look: after_look}

def advance(before: PlayerState, observation: Observation, at: float) -> Verdict:
    """The judge: the player after an observation, and what to report, in order."""
    # at: monotonic seconds; observations come in the order of `at`.  The new state's look_at says when to look next.
    player, reports = AFTER[type(observation)](before, observation, at) if observation else (before, ())
    if isinstance(observation, (Look, Outage)):
        found = any(isinstance(report, Change) for report in reports)
        player = player._replace(looked=(*player.looked, (at, found))[-MAX_LOOKS:])
    if not player.has_server:
        return player, reports                        # the webhooks are the only witness: nothing proves them
    return prove(before, (within_budget(player), reports), observation, at)

# -- Status: what the Watcher knows, for the other chapters
EVENTS = frozenset((*CLAIMS, "media.rate", "media.scrobble", "library.new", "library.on.deck", "admin.database.backup",
                    "admin.database.corrupted", "device.new"))  # documented by Plex; all others are "other" in metrics

class Status(NamedTuple):
    """What the Watcher knows.  Each change of it makes a new one, which any thread may read."""
    player: PlayerState = PlayerState("", has_server=False)     # the one that changed last; without a name: none yet
    changes: tuple[tuple[float, Change], ...] = ()      # the last, newest first, with their Unix times
    stream_open: bool = False     # the event stream
    stream_missing: bool = False  # the server has none, or we were told not to open it
    webhook_at: float | None = None   # monotonic s of the last webhook; None: none yet
    webhook_time: float = 0.0     # the same in Unix s; 0: none yet
    webhooks: Mapping[tuple[str, str], int] = MappingProxyType({})      # how many by (event, result)
    looks: Mapping[str, int] = MappingProxyType({})                     # how many by result
    reported: Mapping[tuple[str, str], int] = MappingProxyType({})      # how many changes by (state, by)
    busy_since: float | None = None   # monotonic s; None: the main loop waits for something to do
    has_pass: bool | None = None      # the server sends webhooks, for its owner has Plex Pass; None: it does not tell
    strangers: Mapping[str, str] = MappingProxyType({})     # see strangers()

def counted(counts: Mapping[Any, int], key: object) -> Mapping[Any, int]:
    """Counts with one more of a key."""
    return {**counts, key: counts.get(key, 0) + 1}

# --- the world
# -- HTTP: one way to ask a server (exchange)
MAX_HEAD = 8 * 1024           # bytes of a head, as in nginx; Plex's have under 500.  email.parser is quadratic
MAX_ANSWER = 2**20            # bytes of an answer; a session takes 3 to 30 kB

class TooMuch(http.client.HTTPException):
    """The other side sent more than it may."""

class BoundedReader(io.RawIOBase):
    """A connection's bytes: at most `room` of them, and until a deadline, however many reads they take."""
    # A time limit on each read is not enough: a sender that drips one byte a second never reaches it.  A BufferedReader
    # above it takes MAX_HEAD bytes at once: the 128 KiB of some Pythons would be read ahead of the next head's limit.

    def __init__(self, connection: socket.socket, seconds: float, room: int):
        self.connection, self.raw = connection, connection.makefile("rb", buffering=0)
        self.allow(seconds, room)

    def allow(self, seconds: float, room: int) -> None:
        """From now on: so many seconds, and so many bytes."""
        self.deadline, self.room = time.monotonic() + seconds, room

    def readable(self) -> bool:       # io asks
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there, never more than there is room for; raises TimeoutError, TooMuch."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("the time for the whole message is up")
        if self.room <= 0:
            raise TooMuch
        self.connection.settimeout(left)
        count = self.raw.readinto(memoryview(buffer)[:self.room]) or 0
        self.room -= count
        return count

    def close(self) -> None:
        """Close our end of the connection, too."""
        self.raw.close()
        super().close()

# -- Names: a name -> its addresses, however silent the name servers are (find_addresses)
# getaddrinfo() knows no deadline, and can take 40 s: so each lookup has a thread.  Flags and account name few hosts.
MAX_LOOKUPS, NAME_S = 4, 1.0  # at once; s until we take the last good addresses (the C library asks again after 5 s)
KNOWN: dict[str, list[tuple[Any, ...]] | str] = {}        # of each name, what getaddrinfo() gave last, or why nothing
_LOOKUPS = threading.Lock()                   # for who starts one

def look_up(host: str) -> None:
    """Ask the name servers; a thread of its own, which ends when it may: its addresses serve who asks next."""
    try:
        KNOWN[host] = list(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM))
    except (OSError, ValueError) as error:
        if not isinstance(KNOWN.get(host), list):
            KNOWN[host] = why(error) if isinstance(error, OSError) else "that cannot be a host's name"

def find_addresses(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """The addresses of a host, as getaddrinfo() gives them; raises OSError.  deadline: monotonic s; 0: no lookup."""
    with contextlib.suppress(OSError, ValueError):    # an address needs no lookup, and no thread
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
    host, left = host.lower(), deadline - time.monotonic()
    with _LOOKUPS, contextlib.suppress(RuntimeError):             # this machine has no more threads
        running = {each.name: each for each in threading.enumerate() if each.name.startswith("names ")}
        if (lookup := running.get(f"names {host}")) is None and len(running) < MAX_LOOKUPS and left > 0:
            (lookup := threading.Thread(target=look_up, args=(host,), name=f"names {host}", daemon=True)).start()
    if lookup and lookup.is_alive() and left > 0:
        lookup.join(min(left, NAME_S) if isinstance(KNOWN.get(host), list) else left)
    if isinstance(found := KNOWN.get(host, "the name servers do not answer"), str):
        raise OSError(found)
    return [(*kind, (address[0], port, *address[2:])) for *kind, address in found]

class _Answer(http.client.HTTPResponse):
    """An answer that is read within a deadline."""

    def __init__(self, connection: socket.socket, *args: Any, deadline: float, **kwargs: Any):
        super().__init__(connection, *args, **kwargs)
        self.fp.close()
        self.reader = BoundedReader(connection, deadline - time.monotonic(), MAX_HEAD)
        self.fp = io.BufferedReader(self.reader, MAX_HEAD)

class _Connection(http.client.HTTPConnection):
    """A connection whose timeout counts from its making to the last byte of its one answer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.deadline = time.monotonic() + (self.timeout or 0)
        self.response_class = functools.partial(_Answer, deadline=self.deadline)  # type: ignore[assignment]

    def connect(self) -> None:
        """Connect to the first address of the name that answers before the deadline; raises OSError."""
        failure: OSError = TimeoutError()
        found = find_addresses(self.host, self.port, self.deadline)
        for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
            self.sock = socket.socket(family, kind, protocol)
            try:
                self.sock.settimeout(max(0.001, (self.deadline - time.monotonic()) / left))     # some may be silent
                self.sock.connect(address)
                self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))     # for TLS, too
                return
            except OSError as error:
                self.sock.close()
                failure = error
        raise failure

class _ConnectionTLS(http.client.HTTPSConnection, _Connection):
    """The same over TLS."""

def origin(url: str) -> str:
    """What messages show of a URL: scheme, host and port.  Its path may be a token in the wrong place."""
    return urllib.parse.urljoin(url, "/")[:-1]

@contextlib.contextmanager
def network_faults(url: str, timeout_s: float) -> Iterator[None]:
    """For calls of http.client and nothing else: all that they raise on foreign bytes becomes a PlexError."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, TypeError, LookupError, OverflowError, MemoryError) as seen:
        cause = seen.reason if isinstance(seen, urllib.error.URLError) else seen
        fault, said = "unreachable", f"cannot be reached: {why(cause)}."
        if isinstance(cause, ssl.SSLCertVerificationError):
            # A Pi without a network has no clock, and begins with the day of its last stop.
            now = local_time("%Y-%m-%d %H:%M", time.time())
            hint = (f"this machine's clock says {now}; if that is wrong, see `timedatectl`, else renew the certificate."
                    if cause.verify_code in (9, 10) else          # OpenSSL's: not yet valid, expired
                    "give the address in it (...plex.direct), or its CA as -plex-ca-file.")
            said = f"has a certificate that does not fit ({cause.verify_message}): {hint}"
        elif not isinstance(cause, OSError):
            fault, said = "nonsense", ("answered far more than Plex does." if isinstance(cause, TooMuch) else
                                       f"does not speak HTTP as Plex does ({type(cause).__name__}).")
        elif isinstance(cause, TimeoutError):
            said = f"did not answer within {timeout_s:g} s."
        elif isinstance(cause, ConnectionResetError) and url.startswith("http:"):
            said = "drops the connection: does Plex demand https (Settings > Network > Secure connections)?"
        elif not urllib.parse.urlsplit(url).port:
            said += " It has no port: Plex usually listens on 32400."
        raise PlexError(fault, f"{origin(url)} {said}") from None

def open_answer(url: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float,
                context: ssl.SSLContext | None, method: str = "") -> _Answer:
    """An answer of any status, of which the head is read; for the caller to close.  Raises PlexError."""
    with network_faults(url, timeout_s):
        request = urllib.request.Request(url, body, {"User-Agent": USER_AGENT, **headers}, method=method or None)
        request.timeout = timeout_s
        kind, more = (_ConnectionTLS, {"context": context}) if request.type == "https" else (_Connection, {})
        # urllib's handler for http, used alone: it knows no proxy, no redirect, no file://
        return urllib.request.AbstractHTTPHandler().do_open(kind, request, **more)  # type: ignore[return-value]

class Reply(NamedTuple):
    """A whole answer."""
    status: int
    headers: email.message.Message
    body: bytes

def exchange(url: str, headers: Mapping[str, str], body: bytes | None = None, *, timeout_s: float = 0.0,
             room: int = MAX_ANSWER, context: ssl.SSLContext | None = None, method: str = "") -> Reply:
    """Ask a server: GET, POST if there is a body, or a method.  The Reply may have any status.  Raises PlexError."""
    # timeout_s: from the connection to the last byte; 0: PLEX_S.  room: for the body, in bytes.  No proxy, no redirect.
    timeout_s = timeout_s or PLEX_S
    with open_answer(url, headers, body, timeout_s, context, method) as answer, network_faults(url, timeout_s):
        answer.reader.room = room + MAX_HEAD          # for the sizes of chunks, too
        content = b"".join(iter(functools.partial(answer.read, MAX_HEAD), b""))   # the length it gives takes no memory
        if len(content) > room:
            raise TooMuch
        if answer.length:                             # bytes that should have come, too
            raise http.client.IncompleteRead(b"", answer.length)
        return Reply(answer.status, answer.headers, content)

@functools.lru_cache(maxsize=4)         # to load the CAs takes 30 ms, and the tracker asks TMDB for each show
def tls_context(url: str, ca_file: str = "") -> ssl.SSLContext | None:
    """How to verify an https server; None for http.  Raises ConfigError for a bad ca_file ("": the system's CAs)."""
    try:
        return ssl.create_default_context(cafile=ca_file or None) if url.startswith("https:") else None
    except OSError as error:                          # ssl.SSLError is one, too
        raise ConfigError(f"-plex-ca-file: {shown_path(ca_file)} is not a CA bundle ({why(error)}); "
                          "give a PEM file.") from error

# -- Plex Media Server (PlexServer)
MAX_LIBRARY_PAGE, PAGE_ITEMS = 2 * 2**20, 50      # bytes of a library's page, and its items: of 5 to 10 kB, seldom 40
# From what a server told of itself to the next question, when it has answered and when it has not; and ABOUT_S
ABOUT_AGAIN_S, ABOUT_SOON_S = 86400.0, 60.0
ABOUT_S = 2.0                 # for what only a line at the start needs, while the watcher waits
MAX_ITEMS, MAX_LISTED = 2_000_000, 12_000         # of all pages; of a list in memory: a soap opera has 10,000 episodes
SILENCE_S = 30.0              # without a line, the event stream is broken: Plex pings on it every 10 s
# From a stream that broke to the next try: the first time, at most (it grows by half each time), and WITHOUT_STREAM.
STREAM_MIN_S, STREAM_MAX_S, STREAM_RARE_S = 0.25, 60.0, 600.0
WITHOUT_STREAM = {"missing": "the server has none (404)",
                  "refused": "the server refuses the token in the X-Plex-Token header for it (401)"}

STATUSES = {                  # what an HTTP status means: (fault, what stands after the URL)
    401: ("refused", "refuses the token (401): run `streamerbrainz.py login` as the server's owner."),
    403: ("forbidden", "does not show its sessions to this token (403): it must be the server owner's."),
    404: ("missing", "answers {status} to {path}. " + IS_PLEX),
    503: ("starting", "is still starting, or in maintenance (503)."),
    **dict.fromkeys(range(300, 400), ("nonsense", "redirects elsewhere ({status}), where the token must not go: "
                                                  "give the final address as -plex-server-url."))}

def check_status(status: int, url: str, path: str) -> None:
    """Raise PlexError for any HTTP status but 200."""
    if status != 200:
        fault, said = STATUSES.get(status, ("nonsense", STATUSES[404][1]))
        raise PlexError(fault, f"{origin(url)} {said.format(status=status, path=path.partition('?')[0])}")

def boot_s() -> float:
    """How long ago the machine booted, its sleep included: no one sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)

class LibraryPage(NamedTuple):
    """A page of a library, or of the server's history."""
    items: list[Mapping[str, Any]]    # Plex's attributes of each
    end: int                      # items up to the page's end
    total: int | None             # items in all; None: not given

class PlexServer:
    """Plex Media Server at a URL.  The token travels in the X-Plex-Token header only, and to that URL only."""

    def __init__(self, url: str, token: Callable[[], str], ca_file: str = ""):
        """token: gives the token that is valid now.  Raises ConfigError for a bad ca_file."""
        self.url, self.token, self.current_token = url, token, token()
        self.renewed = threading.Event()              # there is a new token: try again what the old one was refused for
        self.ahead_s: float | None = None             # its clock minus the time since our boot; None: not known
        self.context = tls_context(url, ca_file)

    def get(self, path: str, timeout_s: float = 0.0, room: int = MAX_ANSWER, **headers: str) -> Reply:
        """What is at a path: a Reply with status 200, as exchange() gives it; raises PlexError."""
        reply = exchange(self.url + path, {"X-Plex-Token": self.current_token, **headers}, timeout_s=timeout_s,
                         room=room, context=self.context)
        if (now := http_time(reply.headers.get("Date")) or 0) > BUILT:
            self.ahead_s = now - boot_s()
        check_status(reply.status, self.url, path)
        return reply

    def sessions(self) -> tuple[Session, ...]:
        """What plays now, on all players; raises PlexError.  Reads the token again, if its file has changed."""
        if (token := self.token()) != self.current_token:
            self.current_token = token
            self.renewed.set()
        return parse_sessions(self.get("/status/sessions").body)

    def container(self, path: str, timeout_s: float = 0.0, room: int = MAX_ANSWER
                  ) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
        """A MediaContainer and its items, as parse_container() gives them; raises PlexError."""
        return parse_container(self.get(path, timeout_s, room, Accept="application/json").body)

    def pages(self, path: str, start: int = 0, timeout_s: float = 0.0) -> Iterator[LibraryPage]:
        """The items at a path, page by page, from item number `start` on; raises PlexError."""
        path += f"{'&' if '?' in path else '?'}X-Plex-Container-Size={PAGE_ITEMS}&X-Plex-Container-Start="
        before: object = None
        while start < MAX_ITEMS:
            attributes, items = self.container(f"{path}{start}", timeout_s, MAX_LIBRARY_PAGE)
            if not items or items[0] == before:       # the end, or a server that ignores the page's start
                return
            start, before, total = start + len(items), items[0], number(attributes.get("totalSize"))
            yield LibraryPage(items, start, total)
            if len(items) < PAGE_ITEMS if total is None else start >= total:
                return
        raise PlexError("nonsense", f"{origin(self.url)} lists more than {MAX_ITEMS} items.")

    def items(self, path: str) -> Iterator[Mapping[str, Any]]:
        """The first MAX_LISTED items at a path, on whichever pages; raises PlexError."""
        return itertools.islice((fields for page in self.pages(path) for fields in page.items), MAX_LISTED)

    @functools.cached_property
    def server_id(self) -> str:
        """The server's machineIdentifier; raises PlexError."""
        return text(self.container("/identity")[0].get("machineIdentifier"))

    def about(self) -> tuple[str, bool | None]:
        """The server's name and version ("nas 1.41.3"), and whether it sends webhooks (None: it does not tell)."""
        get = self.container("/", ABOUT_S)[0].get     # raises PlexError
        version, features = ".".join(text(get("version")).split(".")[:3]), text(get("ownerFeatures"), 10_000)
        return f"{text(get('friendlyName'))} {version}".strip(), "webhooks" in features.split(",") if features else None

    def player_title(self, machine_identifier: str) -> str:
        """The title of a player that is connected, even if it plays nothing; "": not known.  Raises PlexError."""
        return next((text(each.get("name")) for each in self.container("/clients", ABOUT_S)[1]
                     if each.get("machineIdentifier") == machine_identifier), "")

    def notifications(self) -> Iterator[Notification | None]:
        """None when the event stream is open, then each notification when it comes; raises PlexError when it breaks."""
        # For the stream's own thread.  It uses the token of the last look.
        path, headers = "/:/eventsource/notifications?filters=playing", {"X-Plex-Token": self.current_token}
        with open_answer(self.url + path, headers, None, PLEX_S, self.context) as answer:
            check_status(answer.status, self.url, path)
            yield None
            for event, data in read_events(self.lines(answer)):
                if event == "playing":
                    yield from parse_notifications(data)

    def lines(self, answer: _Answer) -> Iterator[bytes]:
        """The lines of an endless answer; raises PlexError when it ends, or is silent for SILENCE_S."""
        while True:
            answer.reader.allow(SILENCE_S, MAX_EVENT + MAX_HEAD)
            with network_faults(self.url, SILENCE_S):
                line = answer.readline(MAX_EVENT + 1)
            if not line or len(line) > MAX_EVENT:
                raise PlexError("unreachable", f"{origin(self.url)} ended the event stream.")
            yield line

def server_of(config: Config) -> PlexServer | None:
    """The configured server; None: there is none.  Raises ConfigError."""
    return PlexServer(config.plex_server_url, SecretFile("-plex-token-file", config.plex_token_file).first,
                      config.plex_ca_file) if config.plex_server_url and config.plex_token_file else None

# -- The inbox, and the Watcher: the one owner of the PlayerStates
MAX_INBOX = 2000              # messages that may wait: 400 a second while a look hangs for PLEX_S
MAX_NOTED = 100               # the same for a notification: webhooks need the room, and it comes again after 10 s
REST_S = 0.01                 # after each wake-up: webhooks of one moment (a stop and a play, or doubles) share a look
MAX_PLAYERS, MAX_RECENT = 50, 10      # players remembered where there is no server to ask; changes that the page shows

class Refused(NamedTuple):
    """A request that was refused."""
    status: int                   # of the answer
    sentence: str                 # and its body
    path: str                     # without its query
    address: str                  # of the sender
    is_webhook: bool              # it was meant to be one: by its path, or its User-Agent is Plex's

# An exception is a bug of ours in another thread: the watcher raises it, and so ends the process.
Message = Webhook | Notification | Stream | Refused | signal.Signals | BaseException
Inbox = queue.SimpleQueue[Message]
# What a person can correct, and how; each is a warning, once a minute.
WRONG_PATH = "a Plex server sends webhooks to a wrong path; the URL in Plex must end in /webhooks/plex"
REFUSALS = {
    401: "a webhook without the secret, or with a wrong one, was refused; correct the URL in Plex with: "
         "streamerbrainz.py webhook add",
    404: WRONG_PATH,
    405: WRONG_PATH,
    429: "too many webhooks came from one address (-rate-limit), or without the secret, and were refused"}

def put_message(inbox: Inbox, message: Message, most: int = MAX_INBOX) -> bool:
    """Put a message into the inbox, unless so many wait there; -> whether it was put."""
    if has_room := inbox.qsize() < most or isinstance(message, BaseException):
        inbox.put(message)
    return has_room

def watch_stream(plex: PlexServer, inbox: Inbox) -> NoReturn:
    """The stream's thread: read the event stream for ever, and put what it says into the inbox."""
    pause_s = STREAM_MIN_S
    while True:
        event, opened_at = "failed", time.monotonic()
        try:
            for notification in plex.notifications():
                event = "broke"
                put_message(inbox, notification or Stream("opened"), MAX_NOTED if notification else sys.maxsize)
        except PlexError as error:
            inbox.put(Stream(event, error.fault, str(error)))
            if time.monotonic() - opened_at > SILENCE_S / 3:       # long enough for a ping: it worked
                pause_s = STREAM_MIN_S
            plex.renewed.wait((STREAM_RARE_S if error.fault in WITHOUT_STREAM else pause_s) * random.uniform(0.8, 1.2))
            plex.renewed.clear()
            pause_s = min(STREAM_MAX_S, pause_s * 1.5)

class Watcher:
    """Takes messages from the inbox, looks when a look is due, and reports what advance() says."""

    def __init__(self, config: Config, inbox: Inbox, plex: PlexServer | None,
                 tell: Callable[[Status, Sequence[Change]], object], wake_s: float = math.inf):
        """tell: hears of each new Status, and of the Changes since the last one.  wake_s: the longest sleep."""
        self.config, self.inbox, self.plex, self.tell, self.wake_s = config, inbox, plex, tell, wake_s
        self.latest = config.plex_machine_id         # the player that changed last
        self.players = {self.latest: PlayerState(    # by machine_identifier: the configured one, or all heard of
            self.latest, True, config.poll_interval_s, look_at=time.monotonic())} if plex else {}
        self.status = Status(stream_missing=not config.plex_events)
        self.news: list[Change] = []                 # not told yet
        self.server = ""                             # its name and version, as said last; "": not said yet
        self.ask_at = 0.0                            # monotonic s; when it is to be asked for them (again)
        self.warn_at: dict[int, float] = {}          # by a refusal's status: when it may be a warning again
        self.handlers: dict[type, Callable[[Any], object]] = {
            Webhook: self.hear, Notification: self.judge, Stream: self.note_stream, Refused: self.refuse,
            signal.Signals: lambda _: self.judge(Stream("opened"))}        # SIGHUP: a look, as when that opens

    def run(self) -> None:
        """Work until SIGTERM comes; raises what another thread crashed with."""
        while True:
            self.publish(None)
            messages: list[Message] = []
            wait_s = min(self.wake_s, max(0.0, self.due() - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                messages.append(self.inbox.get(timeout=None if wait_s == math.inf else wait_s))
                messages += [self.inbox.get_nowait() for _ in range(self.inbox.qsize())]
            self.publish(time.monotonic())
            for message in messages:
                if message == signal.SIGTERM:
                    return self.publish(None)
                if isinstance(message, BaseException):
                    raise message
                self.handlers[type(message)](message)
            now = time.monotonic()
            if any(player.look_at <= now for player in self.players.values()):
                self.look()
            elif self.due() <= now:
                self.judge(None)
            time.sleep(REST_S)

    def publish(self, busy_since: float | None) -> None:
        """Tell what is known now.  busy_since: None before a wait."""
        player = self.players.get(self.latest, self.status.player)
        self.status = self.status._replace(player=player, busy_since=busy_since)
        news, self.news = self.news, []
        self.tell(self.status, news)

    def due(self) -> float:
        """When the next look or proof is due; infinity: not before something is heard."""
        return min((min(player.look_at, proof_due(player)) for player in self.players.values()), default=math.inf)

    def refuse(self, refused: Refused) -> None:
        """A line for a request that was refused: a warning, once a minute, if a person can correct it."""
        if refused.is_webhook:
            self.status = self.status._replace(webhooks=counted(self.status.webhooks, ("other", str(refused.status))))
            if refused.status in REFUSALS and time.monotonic() >= self.warn_at.get(refused.status, -math.inf):
                self.warn_at[refused.status] = time.monotonic() + WARN_AGAIN_S
                say(logging.WARNING, REFUSALS[refused.status], path=refused.path, address=refused.address)
        say(logging.DEBUG, "refused", status=refused.status, path=refused.path, address=refused.address,
            result=refused.sentence)

    def meet(self, key: str, title: str) -> PlayerState:
        """Without a server: a new player becomes one of ours, and its flag is said, for a newcomer to copy."""
        if crowded := len(self.players) >= MAX_PLAYERS:     # forget the one silent longest, rather a stopped one
            del self.players[min(self.players, key=lambda each: self.players[each].state != STOPPED)]
        say(logging.DEBUG if crowded else logging.INFO,
            f"new player; to watch only this one, add -plex-machine-id {shlex.quote(key)}", player=title)
        return PlayerState(key, has_server=False)

    def hear(self, webhook: Webhook) -> None:
        """A webhook: let each player that it may concern be judged, and say what became of it (but for the tracker)."""
        event, key, title = webhook.event, webhook.player_uuid, webhook.player_title
        has_pass = self.status.has_pass if self.status.has_pass is None or event not in CLAIMS else True
        self.status = self.status._replace(
            webhook_at=time.monotonic(), webhook_time=time.time(), has_pass=has_pass,
            webhooks=counted(self.status.webhooks, (event if event in EVENTS else "other", "ok")))
        if not self.plex and key and event in CLAIMS and self.config.plex_machine_id in ("", key):
            self.players[key] = self.players.pop(key) if key in self.players else self.meet(key, title)
        result = "reported" if self.judge(webhook) else "a look" if self.plex and key else "nothing new"
        say(logging.DEBUG, "webhook", event=event, player=title, machine_id=key,
            title=webhook.item.title if webhook.item else "", result=result)

    def note_stream(self, stream: Stream) -> None:
        """The event stream opened or broke.  A missing stream is said once; a break is usual, and DEBUG."""
        self.judge(stream)
        was_missing, is_open = self.status.stream_missing, stream.event == "opened"
        is_missing = stream.event == "failed" and (was_missing or stream.fault in WITHOUT_STREAM)
        if is_missing and not was_missing:
            missing = WITHOUT_STREAM[stream.fault]
            say(logging.INFO, f"no event stream, {missing}: a change without a webhook is found by the next slow look")
        elif is_open and was_missing:
            say(logging.INFO, "the event stream is there now")
        else:
            say(logging.DEBUG, f"the event stream {stream.event}", reason=stream.sentence)
        self.status = self.status._replace(stream_open=is_open, stream_missing=is_missing)

    def look(self) -> None:
        """Ask the server, and let the answer be judged."""
        assert self.plex
        observation: Observation
        until = time.monotonic() + PLEX_S
        try:
            observation = Look(sessions := self.plex.sessions())
        except PlexError as error:
            observation, self.ask_at = Outage(error.fault, str(error)), 0.0
        else:
            if self.ask_at <= time.monotonic() < until - 2 * ABOUT_S:
                self.greet(self.plex, sessions)
            self.note_strangers(sessions)
        self.judge(observation)
        self.status = self.status._replace(looks=counted(self.status.looks, getattr(observation, "fault", "ok")))
        self.publish(time.monotonic())

    def greet(self, plex: PlexServer, sessions: Sequence[Session]) -> None:
        """Say once which server answers; after an outage again, if it is another one, or was updated."""
        ours, said, self.ask_at = self.config.plex_machine_id, self.server, time.monotonic() + ABOUT_AGAIN_S
        session = find_session([each for each in sessions if each.machine_identifier == ours])
        title = session.player_title if session else ""
        try:
            name, has_pass = plex.about()
            self.server, self.status = name or said, self.status._replace(has_pass=has_pass)
            if self.server != said:
                title = title or plex.player_title(ours)
        except PlexError as error:                    # an old server does not tell all of this
            if error.fault in ("unreachable", "starting") and not self.server:
                self.ask_at = time.monotonic() + ABOUT_SOON_S
                return
        self.server = self.server or origin(plex.url)
        if self.server != said:
            say(logging.INFO, greeting(self.server, self.status.has_pass, session, title))

    def note_strangers(self, sessions: Sequence[Session]) -> None:
        """Warn if other players play and ours was never seen; again only if they are others."""
        ours = self.config.plex_machine_id
        others = strangers(self.players[ours], self.status.strangers, sessions)
        if others and others != self.status.strangers:
            say(logging.WARNING, strangers_sentence(ours, others))
        self.status = self.status._replace(strangers=others)

    def judge(self, observation: Observation) -> int:
        """Let each player's state advance, and report; -> how many reports there were."""
        count = 0
        for key, player in self.players.items():
            self.players[key], reports = advance(player, observation, time.monotonic())
            for report in reports:
                self.latest, count = key, count + 1
                self.report(report)
        return count

    def report(self, report: Report) -> None:
        """Log a report; a Change is told to the other chapters, too."""
        if isinstance(report, Change):
            say(logging.INFO, "", **change_fields(report, not self.plex, log.isEnabledFor(logging.DEBUG)))
            self.news.append(report)
            self.status = self.status._replace(changes=((time.time(), report), *self.status.changes)[:MAX_RECENT],
                                               reported=counted(self.status.reported, (report.state, report.by)))
        elif isinstance(report, Outage):
            level = {"unreachable": logging.INFO, "starting": logging.INFO, "nonsense": logging.WARNING}
            hint = " Is -plex-server-url right? To find out: streamerbrainz.py doctor" * (
                not self.server and report.fault == "unreachable")
            say(level.get(report.fault, logging.ERROR), f"no answer from Plex: {report.sentence}{hint}")
        elif isinstance(report, Recovery):
            say(logging.INFO, f"Plex answers again after {report.after_s:.0f} s")
        elif report.over:
            say(logging.INFO, f"webhooks arrive again; {report.in_a_row} {were(report.in_a_row)} missing")
        elif self.status.has_pass is not False:       # without Plex Pass none come, and nothing is wrong
            reach = ("" if report.others else
                     " Else the Plex server cannot reach the URL, or it is missing in the account's webhooks.")
            say(logging.WARNING, f"{missing_sentence(report.in_a_row, report.others)}{reach} "
                "To find out: streamerbrainz.py doctor")

# === Page: Status -> page, JSON, health, metrics (status_page, health, metric_lines, Board, Pages) ===
# What for: to show a person, curl and Prometheus what plays, whether all is well, and whether webhooks arrive.
# Way: Status -> Board -> a method of Pages -> Answer, which the Listener sends
# Threads: the watcher puts each new Status on the Board; request threads read it there.  The pictures have a lock.
# Needs of Player: PROOF_MISSES, PlayerState, PlexServer, Status, missing_sentence, position_ms, strangers_sentence

# -- Status -> words, JSON, metrics
# How long the watcher is busy (a look takes PLEX_S); an outage, or a webhook's wait.
STALL_S, UNHEALTHY_S = 15.0, 300.0

class Glance(NamedTuple):
    """What the watch tracker shows of itself, in one reading."""
    marked: tuple[tuple[float, str], ...] = ()        # the last, with their Unix times
    conflicts: tuple[tuple[int, str, str], ...] = ()  # open ones: id, name, kind
    waiting_s: float = 0.0        # age of the oldest entry that the worker has not touched; 0: none
    entries: Mapping[str, int] = MappingProxyType({})     # how many, by status
    broken: str = ""              # why it cannot be read; "": it can
    refused: bool = False         # the last webhook was answered 503, for it cannot be written

def ago(seconds: float) -> str:
    """How long ago something was, in words: 4 min ago."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

def status_sentence(status: Status, at: float) -> str:
    """The daemon in one line, for `systemctl status`."""
    player = status.player
    where = f" on {player.player_title}" if player.player_title and player.item else ""
    doing = (player.outage.sentence.rstrip(".") if player.outage else
             playing_sentence(player.state, player.item) + where if player.machine_identifier else "no player yet")
    heard = "no webhook yet" if status.webhook_at is None else f"last webhook {ago(at - status.webhook_at)}"
    return printable(f"{doing}; {heard}")

def webhooks_missing(status: Status) -> bool:
    """Whether webhooks should come, and do not.  Without Plex Pass none are sent, and nothing is wrong."""
    return status.player.proof.in_a_row >= PROOF_MISSES and status.has_pass is not False

def proof_sentence(status: Status, at: float) -> str:
    """Whether webhooks arrive, in words."""
    proof = status.player.proof
    heard = "none so far" if status.webhook_at is None else f"the last one {ago(at - status.webhook_at)}"
    if webhooks_missing(status):
        words = missing_sentence(proof.in_a_row, proof.others)
        return f"{words} `streamerbrainz.py doctor` finds out why ({heard})."
    if proof.delays_s:
        return (f"Webhooks arrive ({proof.arrived} came with {'its' if proof.arrived == 1 else 'their'} change, "
                f"{proof.missed} {were(proof.missed)} missing; {heard}).")
    return "not sent without Plex Pass" if status.has_pass is False else \
        f"Whether webhooks arrive is not known yet ({heard})."

def witnesses(status: Status, at: float) -> dict[str, dict[str, Any]]:
    """How each of the three witnesses is: up (True, False, or None: not known) and words."""
    outage, proof, has_server = status.player.outage, status.player.proof, status.player.has_server
    sessions = "no server is configured" if not has_server else \
        outage.sentence if outage else "the server answers" if status.looks else "not asked yet"
    arrive = False if webhooks_missing(status) else True if proof.delays_s else None
    return {"webhooks": {"up": arrive, "words": proof_sentence(status, at)},
            "sessions": {"up": not outage if has_server else None, "words": sessions},
            "events": {"up": status.stream_open or (None if status.stream_missing or not has_server else False),
                       "words": "the event stream is open" if status.stream_open else "no event stream"}}

def now_fields(status: Status, at: float) -> dict[str, object]:
    """What plays, as /now tells it: first the log's keys, then how that is known."""
    player, item, proof = status.player, status.player.item, status.player.proof
    fields = change_fields(Change(player.state, "", item or Item(), position_ms(player, at), player.player_title,
                                  player.machine_identifier, ""), name_machine=False)
    return {**fields, "type": item.type if item else "", "machine_id": player.machine_identifier,
            "cover": f"cover?key={urllib.parse.quote(item.identity, '')}" if item else "",
            "witnesses": witnesses(status, at), "version": VERSION,
            "webhooks": {"last_s": None if status.webhook_at is None else round(at - status.webhook_at, 1),
                         "count": sum(n for (_, result), n in status.webhooks.items() if result == "ok"),
                         "refused": {result: n for (_, result), n in status.webhooks.items() if result != "ok"},
                         "arrived": proof.arrived, "missed": proof.missed, "in_a_row_missed": proof.in_a_row,
                         "median_delay_s": next(iter(sorted(proof.delays_s)[len(proof.delays_s) // 2:]), None)},
            "changes": [{"at": iso_time(when), **change_fields(change, True, True)} for when, change in status.changes]}

def health(status: Status, tracked: Glance, at: float, is_open: bool = True) -> tuple[int, dict[str, object]]:
    """The HTTP status of /healthz and its JSON: 503 with its reasons when a person should come."""
    # Less than that is "degraded".  is_open: everybody may read all our pages; else no name of a player is told here.
    player, reasons, degraded = status.player, ["-tracker-db: it cannot be read"] * bool(tracked.broken), list[str]()
    reasons += ["-tracker-db: it cannot be written, so webhooks are refused: is the disk full?"] * tracked.refused
    if status.busy_since is not None and at - status.busy_since > STALL_S:
        reasons.append(f"the main loop has been busy for {at - status.busy_since:.0f} s")
    if player.outage:
        # Strangers may read this: the sentence with the server's URL is in the log and on the page.
        lasts_s, fault = at - player.outage_at, player.outage.fault
        (reasons if fault in ("refused", "forbidden") or lasts_s >= UNHEALTHY_S else degraded).append(
            f"looks at the server have failed for {lasts_s:.0f} s ({fault})")
    if tracked.waiting_s >= UNHEALTHY_S:
        reasons.append(f"a webhook has been waiting for the tracker for {tracked.waiting_s:.0f} s")
    degraded += [proof_sentence(status, at)] * webhooks_missing(status)
    if status.strangers:
        degraded.append(strangers_sentence(player.machine_identifier, status.strangers) if is_open else
                        "the player has not been seen yet, but others play: the log names them")
    word = "failing" if reasons else "degraded" if degraded else "ok"
    return (503 if reasons else 200), {"status": word, "version": VERSION, "reasons": reasons, "degraded": degraded}

def metric_lines(status: Status, rows: Mapping[str, int], process: Mapping[str, float], at: float) -> str:
    """All figures, for Prometheus; no title, user or session is in a label.  rows: of the journal, by status."""
    player, us, lines, position_s = status.player, "streamerbrainz", list[str](), position_ms(status.player, at) / 1000
    states, last = {each: each == player.state for each in (PLAYING, PAUSED, STOPPED)}, status.webhook_time
    up: Any = bool(status.looks) and not player.outage if player.has_server else {}
    # Name, kind, help, the names of the labels, and samples by the labels' values (or its one).
    families: list[tuple[str, str, str, tuple[str, ...], Mapping[Any, float] | float]] = [
        ("plex_up", "gauge", "Whether the last look at the sessions succeeded.", (), up),
        (f"{us}_build_info", "gauge", "The version.", ("version",), {VERSION: 1}),
        (f"{us}_player_state", "gauge", "1 for what the player does.", ("state",), states),
        (f"{us}_player_position_seconds", "gauge", "Where the player is in its item.", (), position_s),
        (f"{us}_webhooks_total", "counter", "Webhooks by event and result: ok, or the status of a refusal.",
         ("event", "result"), status.webhooks),
        (f"{us}_webhook_last_timestamp_seconds", "gauge", "When the last webhook came; 0: none yet.", (), last),
        (f"{us}_webhook_missed_total", "counter", "Changes that came without their webhook.", (), player.proof.missed),
        (f"{us}_looks_total", "counter", "Queries of the sessions by result.", ("result",), status.looks),
        (f"{us}_changes_total", "counter", "Reported changes by state and by what made us believe them.",
         ("state", "by"), status.reported),
        (f"{us}_tracker_rows_total", "gauge", "Entries of the tracker's journal by status.", ("status",), rows),
        *((name, "counter" if name.endswith("_total") else "gauge", "Of this process.", (), figure)
          for name, figure in process.items())]
    for name, kind, words, labels, samples in families:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"] if samples != {} else []
        for key, value in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
            pairs = zip(labels, key if isinstance(key, tuple) else (key,), strict=True)
            each = ",".join(f'{label}="{word}"' for label, word in pairs)
            lines.append(f"{name}{f'{{{each}}}' if labels else ''} {float(value):.10g}")
    return "\n".join(lines) + "\n"

# -- Status -> HTML (layout, status_page)
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2937; --dim: #4b5563; --line: #8884; --accent: #b45309;
  --on-accent: #fff; --warn: #fef3c7; --good: #15803d; --bad: #b91c1c }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --text: #e5e7eb; --dim: #a8b0bd; --accent: #f59e0b;
  --on-accent: #000; --warn: #422006; --good: #4ade80; --bad: #f87171 } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 44rem; padding: 1rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text) }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.now { display: flex; gap: 1rem; align-items: center; flex-wrap: wrap } .now div { flex: 1 1 14rem; min-width: 0 }
.now :is(h1, p), #changes li { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden }
img { width: 10rem; height: 10rem; object-fit: cover; border-radius: .5rem; background: var(--line) }
@media (max-width: 30rem) { img { width: 100%; height: auto; aspect-ratio: 1 } }
p, li { margin: .2rem 0 } ul { padding: 0; margin: 0; list-style: none }
.dim, time { color: var(--dim) } .bad { color: var(--bad) } .good { color: var(--good) }
summary { margin: 1.6rem 0 .4rem; font-weight: 700; cursor: pointer } li summary { font-weight: 400 }
.banner { background: var(--warn); border-left: .3rem solid var(--accent); padding: .5rem .8rem; margin: 0 0 1rem }
progress { appearance: none; width: 100%; height: .5rem; border: 0; border-radius: .25rem; overflow: hidden;
  background: var(--line); color: var(--accent) }
progress::-webkit-progress-bar { background: none } progress::-webkit-progress-value { background: var(--accent) }
progress::-moz-progress-bar { background: var(--accent) } .paused progress, .lost progress { opacity: .5 }
code { background: var(--line); padding: .1rem .3rem; border-radius: 3px } footer { margin: 2rem 0; font-size: .85rem }
a { color: inherit; text-decoration-color: var(--accent); text-underline-offset: .15em } form { margin: .5rem 0 }
a[aria-current] { font-weight: 700 } nav { display: flex; flex-wrap: wrap; gap: .2rem .8rem; margin-bottom: 1.2rem }
input { font: inherit; flex: 1; min-width: 8rem } button { font: inherit; padding: .2rem .8rem }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; display: flex; flex-wrap: wrap; gap: .3rem }
.row { display: flex; justify-content: space-between; gap: 1rem; padding: .25rem 0; border-top: 1px solid var(--line) }
.row > :last-child { flex: none; max-width: 50%; text-align: right } .log > .row { display: block }
fieldset button { border: 1px solid var(--line); border-radius: .3rem; background: none; color: inherit }
fieldset [value^=unmark] { background: var(--accent); color: var(--on-accent) } button:enabled { cursor: pointer }
button:disabled { border-style: dashed }
.big { max-width: none; min-height: 100vh; box-sizing: border-box; display: grid; align-content: center;
  font-size: 5vmin; background: #000; color: #fff; --dim: #c4cad4; --accent: #f59e0b; --line: #888c }
.big .now { gap: 5vmin; justify-content: center } .big .now div { flex: 1 1 40vmax } .big h1 { font-size: 9vmin }
.big img { width: auto; height: min(80vh, 42vw); aspect-ratio: 1 } .big progress { height: 2vmin; border-radius: 1vmin }
@media (orientation: portrait) { .big img { width: 88vw; height: auto } }
"""

# The secret is never in the page: the script takes it from its URL.  navigator.clipboard would work over https only.
# A daemon that is gone closes the stream of events, or (without power, or Wi-Fi) does not answer within 5 s.
SCRIPT = """
const by = id => document.getElementById(id), all = rule => document.querySelectorAll(rule);
const query = location.search, secret = (query.match(/[?&](?:token|secret)=([^&]*)/) || [])[1];
const full = url => url.dataset.plain + (secret ? "?token=" + secret : "");
let since = performance.now(), shown = false, folded = null;
const dress = () => {
  for (const b of all("button")) b.hidden = b.id === "show" && !secret;
  for (const i of all("img[data-src]")) i.src = i.dataset.src + (secret ? "&token=" + secret : "");
  if (shown) by("url").textContent = full(by("url"));
  if (folded !== null && by("paste")) by("paste").open = !folded;
};
const lose = lost => { by("lost").hidden = !lost; document.body.classList.toggle("lost", lost); };
const refresh = async () => {
  const limit = new AbortController(), timer = setTimeout(() => limit.abort(), 5000);
  try {
    const answer = await fetch(location.href, { signal: limit.signal });
    if (answer.status === 401) return location.reload();
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok || !page.querySelector("main")) throw 0;             // a proxy's page
    all("main")[0].replaceWith(page.querySelector("main"));
    document.title = page.title; since = performance.now(); dress(); lose(false);
  } catch { lose(true); document.title = "Connection lost"; }
  clearTimeout(timer);
};
document.addEventListener("click", event => {
  if (event.target.tagName === "SUMMARY") folded = by("paste").open;
  if (event.target.id === "show") { shown = true; dress(); }
  if (event.target.id !== "copy") return;
  const url = by("url"), before = url.textContent, selection = getSelection();
  url.textContent = full(url); selection.selectAllChildren(url); document.execCommand("copy");
  selection.removeAllRanges(); url.textContent = before; event.target.textContent = "Copied";
});
setInterval(() => by("lost").hidden && all("progress[data-playing='1']").forEach(p => {
  const at = Math.min(p.max, +p.dataset.position + performance.now() - since), s = Math.floor(at / 1000);
  const two = n => String(n).padStart(2, "0"), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
  p.value = at; by("position").textContent = (h ? h + ":" + two(m) : m) + ":" + two(s % 60);
}), 1000);
const listen = again => {
  const stream = new EventSource("events" + query); stream.addEventListener("change", refresh);
  stream.onopen = () => { if (again) refresh(); again = true; };
  stream.onerror = () => { refresh(); if (stream.readyState === 2) setTimeout(listen, 5000, true); };
};
listen(false); dress(); setInterval(() => { if (!document.hidden) refresh(); }, 10000);
"""

def layout(main: str, nonce: str, script: str, here: str | None, title: str = "StreamerBrainz",
           big: bool = False) -> str:
    """A whole page of ours.  nonce: allows our style and script only.  here: which of the links; None: no links."""
    links = "".join(f'<a href="/{path}"{" aria-current=page" * (path == here)}>{name}</a>' for path, name in (
        ("", "Now"), ("watched", "Watched"), ("questions", "Questions"), ("mappings", "Mappings"), ("log", "Log")))
    nav, footer = f"<nav>{links}</nav>" * (here is not None), f"<footer class=dim>StreamerBrainz {VERSION}</footer>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style nonce="{nonce}">{STYLE}</style></head>
<body{" class=big" * big}>{nav}
<p id=lost class=banner hidden>Connection lost: what you see is old.</p><main>{main}</main>{footer * (not big)}
<script nonce="{nonce}">{script}</script></body></html>
"""

def isolated(words: str) -> str:
    """Foreign words as HTML, which a reading direction in them does not leave."""
    return f"<bdi>{html.escape(words)}</bdi>" if words else ""

def clock(ms: int) -> str:
    """A position or duration as people read it: 4:24, 1:01:42."""
    hours, minutes, seconds = ms // 3_600_000, ms // 60_000 % 60, ms // 1000 % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

def item_words(item: Item) -> tuple[str, str]:
    """What stands below an item's title: the artist and the album, or the show and its episode."""
    season = f"Season {item.parent_index}, episode {item.index}" if item.index is not None else item.parent_title
    return {EPISODE: (item.grandparent_title, season), TRACK: (item.artist, item.parent_title)}.get(item.type, ("", ""))

SIGNS = {PLAYING: "\u25b6\ufe0e", PAUSED: "\u275a\u275a", STOPPED: "\u25a0"}      # U+FE0E: as text, no emoji

def page_title(player: PlayerState) -> str:
    """What the tab of the page is called: what plays."""
    if player.item is None or player.state == STOPPED:
        return "StreamerBrainz"
    return " \u2013 ".join(filter(None, (f"{SIGNS[player.state]} {player.item.title}", item_words(player.item)[0])))

def player_html(player: PlayerState, at: float, has_secret: bool, has_picture: bool, big: bool) -> str:
    """What plays, with its picture and its position.  big: nothing else, for a screen on the wall."""
    if player.item is None:
        return "<section class=now><h1>Nothing has played yet</h1></section>"
    item, position, sign = player.item, position_ms(player, at), SIGNS[player.state]
    whose, of = item_words(item)
    bar = (f'<progress max="{item.duration}" value="{position}" data-position="{position}" '
           f'data-playing="{1 if player.state == PLAYING else ""}"></progress><p class=dim>{sign * big} '
           f"<span id=position>{clock(position)}</span> of {clock(item.duration)}</p>"
           ) if item.duration else f"<p>{sign * big}</p>"
    source = "data-src" if has_secret else "src"      # the script adds the secret
    cover = f'<img alt="" {source}="cover?key={urllib.parse.quote(item.identity, "")}">' if has_picture else ""
    where = f" on {isolated(player.player_title)}" if player.player_title else ""
    above, below = f"<p class=dim>{sign} {player.state}{where}</p>", f"<p class=dim>{isolated(of)}</p>"
    return (f'<section class="now {player.state}">{cover}<div>{above * (not big)}<h1>{isolated(item.title)}</h1>'
            f"<p>{isolated(whose)}</p>{below * (not big)}{bar}</div></section>")

def banners(status: Status, tracked: Glance) -> list[str]:
    """What needs a person, in sentences."""
    outage, found = status.player.outage, list[str]()
    if outage and outage.fault in ("refused", "forbidden"):
        found.append(outage.sentence)
    if status.strangers:
        found.append(strangers_sentence(status.player.machine_identifier, status.strangers))
    return found + [f"The watch tracker cannot be used: {tracked.broken}"] * bool(tracked.broken)

def witness_rows(status: Status, at: float) -> str:
    """How each witness is, as rows of a list."""
    marks = {True: "good>\u2713", False: "bad>\u2717", None: "dim>\u2013"}
    names = {"webhooks": "Webhooks", "sessions": "Sessions", "events": "Event stream"}
    return "".join(f"<li{' class=dim' * (each['up'] is None)}><span class={marks[each['up']]}</span> "
                   f"<b>{names[name]}</b>: {html.escape(each['words'])}</li>"
                   for name, each in witnesses(status, at).items())

def change_rows(status: Status, local: Callable[[str, float], str]) -> str:
    """The last changes, as rows of a list."""
    return "".join(f"<li><time>{local('%H:%M:%S', when)}</time> {change.state} <b>{isolated(change.item.title)}</b> "
                   f"{isolated(item_words(change.item)[0])} <span class=dim>({html.escape(change.by)})</span></li>"
                   for when, change in status.changes)

def status_page(status: Status, at: float, url: str, has_secret: bool, nonce: str, has_picture: bool,
                tracked: Glance | None, local: Callable[[str, float], str], big: bool = False) -> str:
    """The status page.  url: to paste into Plex, without the secret.  tracked: None without a tracker."""
    # nonce: as in layout().  local: a Unix time in a form of strftime(), as local_time().  big: only what plays.
    seen, title = tracked or Glance(), page_title(status.player)
    now = player_html(status.player, at, has_secret, has_picture, big)
    if big:
        return layout(now, nonce, SCRIPT, None, title, big)
    marked = "".join(f"<li><time>{local('%m-%d %H:%M', at)}</time> {isolated(name)}</li>" for at, name in seen.marked)
    waiting = "".join(f'<li><a href="/questions/{no}">{isolated(name)}</a> ({html.escape(kind.replace("_", " "))})</li>'
                      for no, name, kind in seen.conflicts)
    first = "".join(f"<p class=banner>{html.escape(words)}</p>" for words in banners(status, seen))
    first += f"<div class=banner><b>Which show is it?</b><ul>{waiting}</ul></div>" if waiting else ""
    watched = f"<h2>Watched</h2><ul>{marked or '<li class=dim>nothing yet</li>'}</ul>" if tracked else ""
    dots = "?token=\u2022\u2022\u2022\u2022\u2022\u2022\u2022\u2022" if has_secret else ""
    is_needed = status.webhook_at is None and status.has_pass is not False
    return layout(f"""{first}{now}<details id=paste{" open" * is_needed}><summary>The URL to paste into Plex</summary>
<p><code id=url data-plain="{html.escape(url)}">{html.escape(url)}{dots}</code></p>
<p><button id=copy hidden>Copy</button> <button id=show hidden>Show the secret</button></p></details>
<h2>How it knows</h2><ul>{witness_rows(status, at)}</ul>
<h2>Changes</h2><ul id=changes>{change_rows(status, local) or '<li class=dim>none yet</li>'}</ul>{watched}""",
                  nonce, SCRIPT, "" if tracked else None, title)

def locked_page(nonce: str) -> str:
    """What a browser shows that does not bring the secret."""
    return layout("""<h1>The secret is missing</h1><p>This page is shown to those who know the webhook secret. Enter it,
or add it to the address once: <code>?token=SECRET</code></p><form><fieldset><input type=password name=token
placeholder=Secret aria-label=Secret autofocus><button>Open</button></fieldset></form><p class=dim>It is in the file of
-webhook-secret-file, usually <code>~/.config/streamerbrainz/webhook-secret</code>, where the daemon runs.</p>""",
                  nonce, "", None)

# --- the world
# -- Board: what the request threads show
# Of /events: subscribers (each holds a thread), what one may leave unread, the silence until a comment keeps it open.
MAX_STREAMS, MAX_UNREAD, EVENT_ALIVE_S = 16, 20, 15.0
MAX_COVER, COVER_RETRY_S = 4 * 2**20, 10.0    # bytes of a picture; pause after none came, for each try may take PLEX_S

class Board:
    """The latest Status, the pictures of what plays, and a queue for each subscriber of /events."""

    def __init__(self, plex: PlexServer | None = None):
        self.status, self.plex = Status(), plex       # status: replaced by the watcher, read by all
        self.streams: list[queue.SimpleQueue[bytes | None]] = []
        self.brought = self.fetched = ("", b"")       # by a webhook; by us: Item.identity and picture, replaced as one
        self.lock, self.retry_at = threading.Lock(), 0.0      # monotonic s; not before that the server is asked again

    def publish(self, status: Status, changes: Sequence[Change]) -> None:
        """Replace the Status, and tell each stream of the changes.  A stream that reads too slowly is ended."""
        self.status = status
        for change in changes:
            event = f"event: change\ndata: {json_line(change_fields(change, True, True))}\n\n".encode()
            for stream in self.streams[:]:
                stream.put(event if stream.qsize() < MAX_UNREAD else None)

    def events(self) -> Iterator[bytes]:
        """The body of /events: each change, until the subscriber is too slow; its first item may raise WebhookError."""
        if len(self.streams) >= MAX_STREAMS:
            raise WebhookError(503, f"{MAX_STREAMS} programs are subscribed already.")
        stream: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.streams.append(stream)
        try:
            event: bytes | None = b": StreamerBrainz\n\n"
            while event is not None:
                yield event
                event = b": alive\n\n"
                with contextlib.suppress(queue.Empty):
                    event = stream.get(timeout=EVENT_ALIVE_S)
        finally:
            self.streams.remove(stream)

    def cover(self, item: Item) -> bytes:
        """The picture of an item; b"": none."""
        if (brought := self.brought)[0] == item.identity:
            return brought[1]
        with self.lock:          # one request thread at a time asks the server for a picture; the others wait for it
            if self.fetched[0] != item.identity and item.thumb and self.plex and time.monotonic() >= self.retry_at:
                self.retry_at = time.monotonic() + PLEX_S + COVER_RETRY_S       # those who wait now must not ask again
                with contextlib.suppress(PlexError):
                    if picture := self.plex.get(item.thumb, room=MAX_COVER).body:
                        self.fetched, self.retry_at = (item.identity, picture), 0.0
            return self.fetched[1] if self.fetched[0] == item.identity else b""

# -- Pages: a path -> an Answer
PICTURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}       # by how they begin

def process_figures(started_at: float) -> dict[str, float]:
    """The figures of this process, by Prometheus' names."""
    figures = {"process_start_time_seconds": started_at, "process_cpu_seconds_total": time.process_time(),
               "process_threads": threading.active_count()}
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        figures["process_resident_memory_bytes"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return figures

class Answer(NamedTuple):
    """What a request is answered."""
    status: int = 200
    body: bytes = b""
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = MappingProxyType({"Cache-Control": "no-store"})    # not for all: see send()
    events: Iterator[bytes] | None = None     # instead of a body: it goes on until one side ends it

def html_answer(content: str, nonce: str) -> Answer:
    """A page as an Answer.  It may load nothing but its own style, script and picture."""
    # With "no-referrer" a browser would send its own forms without an Origin; see Handler.own_form().
    policy = ("default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
              f"frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'")
    return Answer(200, content.encode("utf-8", "replace"), "text/html; charset=utf-8", {
        "Content-Security-Policy": policy, "Referrer-Policy": "same-origin", "Cache-Control": "no-store"})

class Pages:
    """What each path shows.  Its methods run in request threads, and change nothing; forms are of other chapters."""

    def __init__(self, board: Board, has_secret: bool, own_url: Callable[[str], str]):
        self.board, self.has_secret, self.own_url = board, has_secret, own_url      # of webhooks, from a Host header
        self.glance: Callable[[], Glance | None] = lambda: None      # reads the tracker; None: there is none
        self.started_at = time.time()
        # A path may end in /ID: then the number that is asked for follows the query and the Host, or the form.
        self.forms: dict[str, Callable[..., Answer]] = {}
        self.paths: dict[str, Callable[..., Answer]] = {"/": self.page, "/now": self.now, "/cover": self.cover,
            "/healthz": self.healthz, "/metrics": self.metrics,
            "/events": lambda query, host: Answer(media_type="text/event-stream", events=board.events())}

    def page(self, query: str, host: str) -> Answer:
        """The status page."""
        board, status, nonce = self.board, self.board.status, secrets.token_urlsafe(16)
        item, big = status.player.item, "big" in re.split("[&=]", query)
        has_picture = bool(item and (item.identity == board.brought[0] or (item.thumb and board.plex)))
        return html_answer(status_page(status, time.monotonic(), self.own_url(host), self.has_secret, nonce,
                                       has_picture, self.glance(), local_time, big), nonce)

    def now(self, query: str, host: str) -> Answer:
        """What plays, as JSON."""
        fields = now_fields(self.board.status, time.monotonic())
        return Answer(200, f"{json_line(fields)}\n".encode("utf-8", "replace"), "application/json")

    def cover(self, query: str, host: str) -> Answer:
        """The picture of what plays.  key: of the item that the asking page shows."""
        item, key = self.board.status.player.item, urllib.parse.parse_qs(query).get("key", [""])[0]
        picture = self.board.cover(item) if item and key in ("", item.identity) else b""
        if not (media_type := next((kind for begin, kind in PICTURES.items() if picture.startswith(begin)), "")):
            raise WebhookError(404, "There is no picture of what plays.")
        return Answer(200, picture, media_type, {"Cache-Control": "private, max-age=3600"})

    def healthz(self, query: str, host: str) -> Answer:
        """Whether all is well, as JSON; 503 with the reasons if it is not."""
        code, fields = health(self.board.status, self.glance() or Glance(), time.monotonic(), not self.has_secret)
        return Answer(code, f"{json_line(fields)}\n".encode("utf-8", "replace"), "application/json")

    def metrics(self, query: str, host: str) -> Answer:
        """All figures, for Prometheus."""
        rows, process = (self.glance() or Glance()).entries, process_figures(self.started_at)
        lines = metric_lines(self.board.status, rows, process, time.monotonic())
        return Answer(200, lines.encode(), "text/plain; version=0.0.4; charset=utf-8")

# === Listener: sockets -> webhooks; pages -> sockets (spend, Gate, Handler, Listener, secret) ===
# What for: to answer every request at once and with a true status, whoever sends it and whatever it is.
# Way: connection -> Gate (secret, rate) -> body -> parse_webhook -> keep(webhook, thumb), the Daemon's -> 200
#                                        -> a method of Pages -> Answer -----------------------------> 200
# Threads: "listener" accepts; each connection has a thread of its own, 64 at most, 16 for one sender; the others are
#   parked.  A thread owns its socket and its bytes.  All share the Gate and the list of connections, under their locks.
# Needs of Player: MAX_HEAD, REST_S, Body, BoundedReader, Refused, TooMuch, find_addresses, parse_webhook;
#   of Page: Answer, Pages, html_answer, locked_page

# -- Who may send, and how often
MAX_PAIRS = 4                 # of a URL's query that are read: each may be a guess
WEBHOOK_PATH = "/webhooks/plex"
TEST_EVENT = "streamerbrainz.test"    # of doctor's webhook, which changes nothing
HOME_NAMES = (".local", ".lan", ".home", ".internal", ".home.arpa")      # no website has such a name
COOKIE, COOKIE_S = "streamerbrainz", 365 * 86400      # our cookie's name, and for how long a browser keeps it
FORM_TYPE, MAX_FORM = "application/x-www-form-urlencoded", 4096       # bytes of a form: ours have 20

def spend(tokens: float, since_s: float, a_minute: int) -> tuple[float, float]:
    """A token bucket: what an address has left after one webhook, and how long it must wait in s (0: it may pass)."""
    tokens = min(a_minute, tokens + since_s * a_minute / 60)      # it had these since_s ago; at most a_minute
    return (tokens - 1, 0.0) if tokens >= 1 else (tokens, (1 - tokens) * 60 / a_minute)

def is_foreign(host: str, own_name: str) -> bool:
    """Whether a Host header may be a website's name."""
    # Its owner can let it lead to our address, and so read us in a browser here: to that, all is one origin.
    name = re.sub(r"\.?(:\d*)?$", "", host.strip().lower())
    is_address = re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\]", name)
    return "." in name and not is_address and not name.endswith(HOME_NAMES) and name != own_name.lower()

def given_secrets(query: str) -> list[bytes]:
    """The secrets in a URL's query.  A "+" stays a "+": `openssl rand -base64` makes such secrets."""
    pairs = (pair.partition("=") for pair in query.split("&")[:MAX_PAIRS])
    return [urllib.parse.unquote_to_bytes(value) for name, _, value in pairs if name in ("token", "secret") and value]

def cookie_of(secret: str) -> str:
    """What a browser keeps to prove that it was given a secret.  It does not tell the secret."""
    return hmac.new(secret.encode(), b"cookie", "sha256").hexdigest()

def webhook_url(host: str, port: int) -> str:
    """The URL of our webhooks."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{WEBHOOK_PATH}"

# --- the world
MAX_ADDRESSES = 1000          # whose requests are counted; the one that was silent longest is forgotten
MAX_GUESSES = 30              # requests a minute of one sender that lack the secret
GUESS_S = 1.0                 # how late its secrets are compared after more: its 16 threads can send 16 URLs a second

def sender(address: str) -> str:
    """Who sends from an address: an IPv4 address, or the /64 of an IPv6 address, which belongs to one household."""
    address = address.partition("%")[0].removeprefix("::ffff:")
    return address if "." in address else socket.inet_pton(socket.AF_INET6, address)[:8].hex()

class Gate:
    """Decides who may send: who knows the secret, and not too often from one address.  For any thread."""

    def __init__(self, secret: SecretFile | None = None, a_minute: int = 0):      # webhooks of one sender; 0: no limit
        self.secret, self.a_minute, self.lock = secret, a_minute, threading.Lock()
        # Sender -> tokens left, and when: for webhooks; for media.scrobble when those are used up; without the secret.
        self.tokens, self.scrobbles, self.guesses = (dict[str, tuple[float, float]]() for _ in range(3))

    def count(self, buckets: dict[str, tuple[float, float]], address: str, a_minute: int, what: str) -> None:
        """Take a token from a sender's bucket; raises WebhookError 429 if it is empty."""
        with self.lock:
            who, now = sender(address), time.monotonic()
            tokens, at = buckets.pop(who, (float(a_minute), now))
            tokens, wait_s = spend(tokens, now - at, a_minute)
            buckets[who] = tokens, now
            if len(buckets) > MAX_ADDRESSES:
                del buckets[next(iter(buckets))]
        if wait_s:
            raise WebhookError(429, f"More than {a_minute} {what} a minute came from your address; "
                               "try again in a moment.", {"Retry-After": str(math.ceil(wait_s))})

    def plain(self, path: str, ours: Iterable[str] = ()) -> str:
        """A path as it may be logged.  With a secret only our own: somebody may have put it into another one."""
        if self.secret is None:
            return re.match(r"[\w/.~-]*", urllib.parse.unquote(path), re.ASCII)[0][:MAX_TEXT]  # type: ignore[index]
        return path if path in (WEBHOOK_PATH, *ours) else f"{WEBHOOK_PATH if path.startswith(WEBHOOK_PATH) else '/'}..."

    def check(self, query: str, address: str, cookies: Iterable[str] | None = None) -> str:
        """Check the secret in a URL's query or a cookie; -> a cookie that proves the former.  Raises WebhookError."""
        if self.secret is None:
            return ""
        tokens, at = self.guesses.get(sender(address), (math.inf, 0.0))
        if spend(tokens, time.monotonic() - at, MAX_GUESSES)[1]:
            time.sleep(GUESS_S)
        with self.lock:
            words = self.secret.renewed()
        told = [word for each in given_secrets(query) for word in words if hmac.compare_digest(each, word.encode())]
        given = re.findall(rf"(?:^|;) *{COOKIE}=([0-9a-f]+)", ";".join(cookies or ()))[:MAX_PAIRS]
        known = [hmac.compare_digest(each, cookie_of(word)) for each in given for word in words]
        if not told and not any(known):
            self.count(self.guesses, address, MAX_GUESSES, "requests without the secret")
            raise WebhookError(401, "The secret is missing or wrong: the URL must end in ?token= and the secret.",
                               {"WWW-Authenticate": "Secret"})
        return cookie_of(told[0]) if told else ""

# -- Our own address
def guess_address(plex_url: str) -> str:
    """This machine's address as the Plex server, or else its own network, sees it; its name while it has none."""
    # Nothing is sent, and no name is looked up: what the last look found counts.  192.0.2.1 is nowhere (RFC 5737).
    server = urllib.parse.urlsplit(plex_url).hostname or ""
    for host in ("127.0.0.1" if server == "localhost" else server, "192.0.2.1"):
        with contextlib.suppress(OSError):
            family, *_, address = min(find_addresses(host, 9, deadline=0.0))      # IPv4 before IPv6
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return socket.gethostname()

def configured_url(config: Config, port: int) -> str:
    """The URL of our webhooks, for the Plex server."""
    everywhere = config.webhooks_host in ("", "0.0.0.0", "::")
    return webhook_url(guess_address(config.plex_server_url) if everywhere else config.webhooks_host, port)

def own_url(bound_to: str, port: int, plex_url: str, host: str) -> str:
    """The URL of our webhooks, for the page.  host: the Host header: how the browser reaches this machine."""
    # A browser on this machine says "localhost", which is useless for a Plex server elsewhere.
    is_demo, here = bound_to in ("127.0.0.1", "::1"), re.fullmatch(r"(localhost|127\.[\d.]+|\[::1\])(:\d+)?", host)
    if is_demo or here or not re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9A-Fa-f:]+\](:\d+)?", host, re.ASCII):
        return webhook_url(bound_to if is_demo else guess_address(plex_url), port)
    return f"http://{host}{WEBHOOK_PATH}"

def listening_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address to bind for a host; "" is every address, of IPv6 too if the machine has it; raises OSError."""
    host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    family, *_, address = find_addresses(host, port, time.monotonic() + PLEX_S)[0]
    return family, address

# -- Handler: one connection, its requests one after the other
MAX_BODY, MAX_SCROBBLE = 8 * 2**20, 64 * 1024     # bytes of a webhook (a thumb: 1 MB), of one beyond the rate (10 kB)
LARGE_BODY, MAX_LARGE_BODIES = 128 * 1024, 4      # bytes, above most thumbs; how many larger ones are in memory at once
MAX_TRAILERS = 100            # lines after a chunked body; http.server takes as many headers
NOT_HEADERS = email.errors.MissingHeaderBodySeparatorDefect, email.errors.FirstHeaderLineIsContinuationDefect
KEEP_ALIVE_S = 5.0            # how long an idle connection may hold its thread, as in Apache and Node
CROWDED_S, TURN_S = 1.0, 0.1  # its age when threads are scarce, or others of its sender wait: some webhooks, not one
# To read a head; a body, which Plex sends in milliseconds; what of a body is over LARGE_BODY (1 MB in 3 s: slow Wi-Fi).
HEAD_S, REQUEST_S, LARGE_S = 3.0, 10.0, 3.0
LINGER_S = 2.0                # how long a refused sender may go on sending; nginx gives 5 s

class LineReader(io.BufferedReader):
    """Reads the lines of requests.  One with a CR alone is refused: others might read two in it (RFC 9112, 2.2)."""

    def readline(self, size: int | None = -1, /) -> bytes:
        """The next line, or so much of it."""
        line = super().readline(size)
        if line.count(b"\r") != line.endswith(b"\r\n"):
            raise WebhookError(400, "A line of the request has a CR without an LF.")
        return line

class Handler(http.server.BaseHTTPRequestHandler):
    """One connection.  Each request is answered at once; only a picture may wait for Plex."""
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True     # head and body of an answer in one packet
    requestline = command = path = cookie = ""      # until a head is read
    server: Listener
    rfile: io.BufferedReader

    def setup(self) -> None:
        """Read by a BoundedReader: it holds every limit of time and size below."""
        super().setup()
        self.rfile.close()
        self.opened_at, self.reader = time.monotonic(), BoundedReader(self.connection, KEEP_ALIVE_S, MAX_HEAD)
        self.rfile = LineReader(self.reader, MAX_HEAD)

    def handle_one_request(self) -> None:
        """Wait for a request for KEEP_ALIVE_S, read its head within HEAD_S and its body within REQUEST_S, answer."""
        self.close_connection = True
        patience_s = max(self.server.patience_s(self.connection), 0 if self.requestline else CROWDED_S)
        self.reader.allow(min(KEEP_ALIVE_S, patience_s), MAX_HEAD)
        try:
            while self.rfile.peek(1)[:1] in (b"\r", b"\n"):      # blank lines before a request (RFC 9112, 2.2)
                self.rfile.readline(2)
            if self.rfile.peek(1):
                self.reader.deadline = time.monotonic() + HEAD_S
                super().handle_one_request()
        except (TooMuch, WebhookError) as error:      # a line alone is too long, or has a CR alone
            self.send_error(431 if isinstance(error, TooMuch) else 400)

    def parse_request(self) -> bool:
        """Parse the head; from here on the limits of the body hold."""
        try:
            return super().parse_request()
        except (ValueError, TypeError, LookupError):  # email.parser raises these on a broken Content-Type
            self.send_error(400)
            return False
        finally:
            self.reader.allow(REQUEST_S, sys.maxsize)

    def respond(self) -> None:
        """Answer a request of which the head is read."""
        if isinstance(self.headers, dict):            # HTTP/0.9 has none, and some Pythons say so
            self.headers = email.message.Message()
        with contextlib.ExitStack() as held:          # until the error is gone, too: its frames keep the body
            try:
                self.admit()
                self.route(self.read_body(held))
            except WebhookError as error:
                self.refuse(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server refuses a broken head (never as 5xx), or an unknown method (501): the path decides on those."""
        self.close_connection, self.request_version = True, self.protocol_version
        if code == 501:
            return self.respond()
        return self.send(Answer(code if code < 500 else 400, b"This is not an HTTP request that we understand.\n"))

    def admit(self) -> None:
        """Refuse a website, and who does not know the secret or sends too much, before the body is read."""
        gate, headers, address = self.server.gate, self.headers, self.client_address[0]
        self.cookie = ""                              # a proxy may send what many people ask on one connection
        self.target, _, self.query = re.sub("^https?://[^/?]*", "", self.path).partition("?")    # proxies name the host
        is_webhook = self.target == WEBHOOK_PATH
        if is_webhook and ("Origin" in headers or headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")):
            raise WebhookError(403, "A website may not send webhooks; Plex sends them without an Origin.")
        if not gate.secret and self.command in ("GET", "HEAD") and any(
                is_foreign(host, socket.gethostname()) for host in headers.get_all("Host", [])):
            raise WebhookError(421, "A website may have this name, so nothing is shown under it: use this machine's "
                               "address or own name, or a -webhook-secret-file.")
        self.cookie = "" if self.target == "/healthz" else gate.check(self.query, address, headers.get_all("Cookie"))
        self.excess = False
        if is_webhook and gate.a_minute:              # last: strangers must not spend what Plex may send
            try:
                gate.count(gate.tokens, address, gate.a_minute, "webhooks")
            except WebhookError:                      # it may be a scrobble, which is small: it has no picture
                self.excess = self.command == "POST" and 0 < (self.length() or 0) <= MAX_SCROBBLE
                if not self.excess:
                    raise

    def route(self, body: Body) -> None:
        """Answer a request that is read whole; raises WebhookError."""
        pages, numbered = self.server.pages, re.fullmatch(r"(/\w+/)(\d{1,10})", self.target, re.ASCII)
        key, ids = (f"{numbered[1]}ID", [int(numbered[2])]) if numbered else (self.target, [])
        if key != WEBHOOK_PATH and key not in pages.paths:
            raise WebhookError(404, f"Nothing is here. Plex sends its webhooks to {WEBHOOK_PATH}.")
        allowed = "POST" if key == WEBHOOK_PATH else "GET, HEAD" + ", POST" * (key in pages.forms)
        if self.command not in allowed.split(", "):
            hint = f" Plex sends its webhooks to {WEBHOOK_PATH}." * (self.target == "/")
            raise WebhookError(405, f"Only {allowed} is answered here.{hint}", {"Allow": allowed})
        if key in pages.paths:
            return self.send(pages.forms[key](self.own_form(body), *ids) if self.command == "POST" else
                             pages.paths[key](self.query, self.headers.get("Host", ""), *ids))
        webhook, thumb = parse_webhook(self.headers.get("Content-Type", ""), body)
        if self.excess:
            gate, scrobble = self.server.gate, webhook.event == "media.scrobble"
            gate.count(gate.scrobbles if scrobble else gate.tokens, self.client_address[0], gate.a_minute, "webhooks")
        if webhook.event == TEST_EVENT:
            return self.send(Answer(body=f"{TEST_EVENT} has arrived\n".encode()))
        self.server.keep(webhook, thumb)
        return self.send(Answer(headers={}))

    def own_form(self, body: Body) -> str:
        """The query, and the form of our own page, from somebody who knows the secret; raises WebhookError."""
        # Browsers tell Sec-Fetch-Site to https and localhost only, and with each form its Origin.
        site, host, origin = (self.headers.get(name, "") for name in ("Sec-Fetch-Site", "Host", "Origin"))
        if not self.server.gate.secret:
            raise WebhookError(403, "Nothing can be changed without a secret; `streamerbrainz.py secret` makes one.")
        if (site or origin) not in (("same-origin", "none") if site else (f"http://{host}", f"https://{host}")):
            raise WebhookError(403, "Only our own pages may change something here.")
        if len(body) > MAX_FORM or not self.headers.get("Content-Type", "").startswith(FORM_TYPE):
            raise WebhookError(400, f"This is no form ({FORM_TYPE}) of at most {MAX_FORM} bytes.")
        return f"{self.query}&{bytes(body).decode('utf-8', 'replace')}"

    def refuse(self, error: WebhookError) -> None:
        """Answer what is wrong, and tell of it."""
        # Its body is not read, or nobody knows where it ends; but what has no such path or method is read whole.
        self.close_connection |= error.status not in (404, 405)
        self.send(self.refusal(error))
        path, address = self.server.gate.plain(self.target, self.server.pages.paths), self.client_address[0]
        self.server.tell(Refused(error.status, str(error), path, address.removeprefix("::ffff:"),
                                 self.was_webhook(error.status)))

    def refusal(self, error: WebhookError) -> Answer:
        """What a request that is refused is answered: a sentence; to a browser without the secret, a page."""
        if error.status != 401 or "text/html" not in self.headers.get("Accept", ""):
            return Answer(error.status, f"{error}\n".encode(), headers=error.headers)
        nonce = secrets.token_urlsafe(16)
        page = html_answer(locked_page(nonce), nonce)
        return page._replace(status=error.status, headers={**page.headers, **error.headers})

    def was_webhook(self, status: int) -> bool:
        """Whether what was refused was meant to be a webhook: by its path, or if that is wrong by its sender."""
        agent = self.headers.get("User-Agent", "")
        if status in (404, 405):
            return self.command == "POST" and agent.startswith("PlexMediaServer/")
        return self.target == WEBHOOK_PATH and agent != USER_AGENT        # doctor's tests are nobody's fault

    def length(self) -> int | None:
        """Bytes of the body; None: it comes in chunks.  Raises WebhookError if missing, ambiguous or too many."""
        lengths, codings = self.headers.get_all("Content-Length", []), self.headers.get_all("Transfer-Encoding", [])
        if any(isinstance(defect, NOT_HEADERS) for defect in self.headers.defects) or self.headers.get_unixfrom():
            raise WebhookError(400, "A line of the request's head is not a header.")
        if codings and (lengths or [coding.strip().lower() for coding in codings] != ["chunked"]):
            raise WebhookError(400, "A body is either chunked or has a Content-Length.")
        if not (codings or lengths) and self.command in ("POST", "PUT", "PATCH"):
            raise WebhookError(411, "The request has no Content-Length.")
        if lengths and (len({*lengths}) > 1 or not re.fullmatch("[0-9]{1,19}", lengths[0])):
            raise WebhookError(400, "The Content-Length is not a number.")
        if (length := int(lengths[0]) if lengths else 0) > MAX_BODY:
            raise WebhookError(413, f"The body is larger than {MAX_BODY} bytes.")
        return None if codings else length

    def fill(self, body: bytearray | mmap.mmap, start: int, stop: int, held: contextlib.ExitStack) -> bool:
        """Read the bytes of a body from start to stop; -> whether all came."""
        if start < LARGE_BODY < stop:
            return self.fill(body, start, LARGE_BODY, held) and self.fill(body, LARGE_BODY, stop, held)
        if start == LARGE_BODY:                       # wait for a place among the large bodies, until `held` is closed
            held.enter_context(self.server.turns[hash(sender(self.client_address[0])) % len(self.server.turns)])
            held.enter_context(self.server.large_bodies)
            self.reader.deadline = time.monotonic() + LARGE_S
        return self.rfile.readinto(memoryview(body)[start:stop]) == stop - start

    def read_body(self, held: contextlib.ExitStack) -> Body:
        """The whole body; what trailers follow one in chunks (RFC 9112, 7.1) is ignored.  Raises WebhookError."""
        if (length := self.length()) is not None:
            # A large one has pages of its own: malloc would keep 2 MB for each thread.
            whole = mmap.mmap(-1, length) if length > LARGE_BODY else bytearray(length)
            if not self.fill(whole, 0, length, held):
                raise WebhookError(400, "The body is shorter than its Content-Length.")
            return whole
        body, total = mmap.mmap(-1, MAX_BODY), 0      # of which only what comes takes memory
        while True:
            if not (size := re.fullmatch(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(;.*)?\r?\n", self.rfile.readline(1025))):
                raise WebhookError(400, "A chunk of the body has no size.")
            start, total = total, total + int(size[1], 16)
            if total == start:                        # the last
                break
            if total > MAX_BODY:
                raise WebhookError(413, f"The body is larger than {MAX_BODY} bytes.")
            if not self.fill(body, start, total, held) or self.rfile.readline(3).strip():
                raise WebhookError(400, "A chunk of the body is cut short, or longer than its size.")
        if all(self.rfile.readline(65537).strip() for _ in range(MAX_TRAILERS)):
            raise WebhookError(400, "The chunked body has too many trailers.")
        body.resize(total or 1)
        return body

    def handle_expect_100(self) -> bool:
        """Ask for the body, unless its size alone is refused."""
        with contextlib.suppress(WebhookError):       # then respond() refuses it
            self.length()
            super().handle_expect_100()
            self.wfile.flush()
        return True

    def send(self, answer: Answer) -> None:
        """Send an answer; all go through here, except for "100 Continue".  Events are sent until one side ends them."""
        events, content = answer.events, answer.body
        if events:
            content = next(events)                    # raises WebhookError 503 before anything is sent
            self.close_connection = True
            with self.server.changing():
                self.server.serving[self.connection] = "events"      # nobody's: MAX_STREAMS is limit enough
        self.close_connection |= time.monotonic() > self.opened_at + self.server.patience_s(self.connection)
        self.send_response_only(answer.status)
        shows = self.cookie and answer.status == 200 and answer.media_type.startswith("text/html")
        cookie = f"{COOKIE}={self.cookie}; Path=/; Max-Age={COOKIE_S}; HttpOnly; SameSite=Strict"
        headers = {"Server": USER_AGENT, "Date": self.date_time_string(),     # a second start knows the first by Server
                   "Content-Length": "" if events else str(len(content)),
                   "Cross-Origin-Resource-Policy": "same-origin",             # no website may use it, as an image say
                   "Content-Type": answer.media_type if content else "",
                   "X-Content-Type-Options": "nosniff" if content else "", "Set-Cookie": cookie if shows else "",
                   **answer.headers, "Connection": "close" if self.close_connection else ""}
        for name in filter(headers.get, headers):
            self.send_header(name, headers[name])
        self.end_headers()
        if self.command != "HEAD":
            self.connection.settimeout(PLEX_S)
            for piece in itertools.chain((content,), events or ()):
                self.wfile.write(piece)
                self.wfile.flush()                    # raises OSError when the subscriber has gone

    def finish(self) -> None:
        """Close so that a refusal arrives: closing while bytes are unread would reset the connection, and lose it."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.allow(LINGER_S, sys.maxsize)
            while self.reader.readinto(bytearray(65536)):
                pass
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the Watcher logs what became of a webhook."""

# -- Listener: the socket, and a thread for each connection
# Threads at once (8 MB of stack each, mostly untouched), and of one sender; what waits (a descriptor each, of 1024).
MAX_CONNECTIONS, MAX_OF_ONE, MAX_PARKED = 64, 16, 256

class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The HTTP listener.  It listens as soon as it is made (or raises OSError); what comes waits for serve()."""
    # A thousand slow connections of one sender keep no other out: beyond its MAX_OF_ONE they are accepted and parked.
    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024        # a burst of connections waits here, instead of for TCP to try again

    def __init__(self, host: str, port: int):
        self.serving: dict[Any, str] = {}                # each connection that has a thread -> its sender
        self.parked: dict[Any, tuple[str, Any]] = {}     # that waits for one, the oldest first -> sender, address
        self.lock, self.closing = threading.Lock(), threading.Event()      # lock: for both; see changing()
        self.large_bodies = threading.BoundedSemaphore(MAX_LARGE_BODIES)
        self.turns = [threading.Lock() for _ in range(MAX_CONNECTIONS)]      # one large body of a sender at a time
        self.address_family, address = listening_address(host, port)
        super().__init__(address, Handler)
        self.port = int(self.server_address[1])

    def server_bind(self) -> None:
        """Accept IPv4 on an IPv6 socket, too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def serve(self, gate: Gate, pages: Pages, keep: Callable[..., object], tell: Callable[..., object]) -> None:
        """Answer requests until close(); then free the port.  For a thread of its own, it wakes for requests only."""
        # keep(Webhook, thumb): makes both safe, or raises WebhookError; tell(): hears of refusals and of our bugs.
        self.gate, self.pages, self.keep, self.tell = gate, pages, keep, tell
        while not self.closing.is_set():
            self.handle_request()
        self.server_close()

    def close(self) -> None:
        """End serve(), from another thread; open connections end with the process."""
        self.closing.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)   # wakes handle_request()

    def patience_s(self, request: Any) -> float:
        """How old a connection may become, as far as others need its thread; inf: as it likes."""
        with self.lock:
            who, threads = self.serving[request], list(self.serving.values())
            waits = who in (each for each, _ in self.parked.values())
            scarce = len(threads) >= MAX_CONNECTIONS or threads.count(who) > MAX_OF_ONE // 2
            return TURN_S if waits else CROWDED_S if scarce else math.inf

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(REST_S)                        # this machine has no more files
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Park a connection until its sender has a thread for it; the listener itself never waits."""
        with self.changing():
            self.parked[request] = sender(client_address[0]), client_address

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change the connections in it: then each that may gets a thread; where too many still wait, one is closed."""
        # To start a thread takes long where many run: so not under the lock, for which all of them would wait.
        ready = []
        with self.lock:
            yield
            threads = collections.Counter(self.serving.values())
            for request, (who, _) in list(self.parked.items()):
                if len(self.serving) < MAX_CONNECTIONS and threads[who] < MAX_OF_ONE:
                    self.serving[request] = who
                    threads[who] += 1
                    ready.append((request, self.parked.pop(request)[1]))
            if len(self.parked) > MAX_PARKED:         # the newest of the sender that has most
                most = collections.Counter(who for who, _ in self.parked.values()).most_common(1)[0][0]
                newest = next(each for each, (who, _) in reversed(self.parked.items()) if who == most)
                del self.parked[newest]
                super().shutdown_request(newest)
        for request, address in ready:
            try:
                super().process_request(request, address)
            except RuntimeError:                      # this machine has no more threads
                self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        super().shutdown_request(request)
        with self.changing():
            self.serving.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, was idle, or is too much for the memory, ends; all else is a bug, and ends us."""
        if (error := sys.exc_info()[1]) and not isinstance(error, (OSError, MemoryError)):
            self.tell(error)

# -- secret: a new webhook secret, and the URL to paste
def make_secret(config: Config) -> int:
    """Make a webhook secret, and print the URL to paste.  The old one stays valid, as the file's second line."""
    path = config.webhook_secret_file or usual("webhook-secret")
    before = read_secrets("-webhook-secret-file", path)[0][:1] if os.path.exists(path) and os.path.getsize(path) else ()
    secret = secrets.token_urlsafe(32)
    write_private(path, "\n".join((secret, *before)) + "\n", "secret", new_folder=not config.webhook_secret_file)
    print(f"{configured_url(config, config.webhooks_port)}?token={secret}")
    print("This is the URL for Plex: streamerbrainz.py webhook add, or in Plex Web: Settings > Account > Webhooks."
          f"{' The old URL still works.' if before else ''}\nThe secret "
          f"is in {path}.\nGive the daemon this flag: -webhook-secret-file {shlex.quote(path)}", file=sys.stderr)
    return 0

# === Hooks: a Change -> a command (hook_environment, after_change, enqueue, run_hook, Hooks, hook) ===
# What for: to run the user's command (-on-event) for each change, for example to switch an amplifier on and off.
# Way: Change -> Hooks.inbox -> the events to tell -> the command with its environment -> a line of the log
# Threads: "hooks" runs one command at a time.  It owns the Amplifier and the waiting events, and delays nobody.

Waiting = list[tuple[str, dict[str, str]]]    # (event, environment) of the commands still to run
SWITCHES = ("active", "inactive")             # for an amplifier: something plays; nothing has played for some seconds
MAX_WATCHED = 50              # events `watched` that wait: an evening's, but not all that an import finds

def hook_environment(change: Change, event: str) -> dict[str, str]:
    """What a hook finds in its environment, besides ours (see run_hook).  Scripts for librespot find its names."""
    item = change.item
    return plain_environment({"PLAYER_EVENT": event, "TRACK_ID": item.guid or item.identity, "NAME": item.title,
        "ARTISTS": item.artist if item.type == TRACK else "", "ALBUM": item.parent_title, "REASON": change.reason,
        "DURATION_MS": item.duration or 0, "POSITION_MS": change.position_ms, "OLD_STATE": change.old_state,
        "PLEX_PLAYER_ID": change.machine_identifier, "PLEX_PLAYER_TITLE": change.player_title, "PLEX_TYPE": item.type,
        "PLEX_RATING_KEY": item.rating_key, "PLEX_SAMPLE_RATE": item.sample_rate, "PLEX_BIT_DEPTH": item.bit_depth})

def plain_environment(values: Mapping[str, object]) -> dict[str, str]:
    """Variables of a hook, without those that are not given."""
    return {name: text(str(value)).replace("\0", "") for name, value in values.items() if value not in ("", None)}

class Amplifier(NamedTuple):
    """Whether the hook was told `active`, and when it must be told `inactive`."""
    playing: frozenset[str] = frozenset()     # machine_identifiers
    off_at: float = math.inf      # monotonic s, once nothing plays any more; inf: not before something changes

def after_change(amplifier: Amplifier, change: Change, at: float, active_timeout_s: float) -> tuple[Amplifier, bool]:
    """The amplifier after a change of a player, and whether the hook must be told `active` first."""
    if change.state == PLAYING:
        return Amplifier(amplifier.playing | {change.machine_identifier}), amplifier == Amplifier()
    playing = amplifier.playing - {change.machine_identifier}
    return Amplifier(playing, at + active_timeout_s if amplifier.playing and not playing else amplifier.off_at), False

def enqueue(waiting: Waiting, event: str, environment: dict[str, str]) -> Waiting:
    """The events that wait while a slow command runs, with one more."""
    # Of changes only the newest matters.  A switch stays until its opposite comes: neither is told.  `watched` stays.
    changes = [each for each in waiting if each[0] not in SWITCHES]
    if event == "watched":
        return [*waiting, (event, environment)] if len(waiting) < MAX_WATCHED else waiting
    if event in SWITCHES:
        return changes if len(changes) < len(waiting) else [*waiting, (event, environment)]
    return [*(each for each in waiting if each[0] in (*SWITCHES, "watched")), (event, environment)]

# --- the world
# A hook's time (an amplifier takes one second), then from SIGTERM to SIGKILL; the latter when the daemon stops.
HOOK_S, HOOK_GRACE_S, HOOK_STOP_S = 30.0, 2.0, 0.3
MAX_OUTPUT = 4096             # bytes of a hook's output that are read
# What systemd says to us, and to nobody else.
NOT_FOR_HOOKS = {b"NOTIFY_SOCKET", b"WATCHDOG_PID", b"WATCHDOG_USEC", b"CREDENTIALS_DIRECTORY", b"JOURNAL_STREAM"}

def hook_command(words: str) -> list[str]:
    """The whole path and the arguments of -on-event; raises ConfigError."""
    try:
        program, *arguments = shlex.split(words) or [""]
    except ValueError as error:
        raise ConfigError("-on-event: the command has a quote without its end; put both or none.") from error
    if not (path := shutil.which(os.path.expanduser(program))):
        raise ConfigError(f"-on-event: {shown_path(program) if words.strip() else 'the command'} is missing or "
                          "not executable; give its whole path, and chmod +x it.")
    return [os.path.abspath(path), *arguments]

def read_output(reader: int, exited: int, stopping: Sequence[int]) -> tuple[float, bytes]:
    """How long a command may take to end (0: it has ended), and the beginning of its output.  exited: its pidfd."""
    output, watched, deadline = b"", [reader, exited, *stopping], time.monotonic() + HOOK_S
    while (left := deadline - time.monotonic()) > 0:
        ready = select.select(watched, (), (), left)[0]
        if reader in ready and ready[-1] not in stopping:
            data = os.read(reader, 65536)
            output = (output + data)[:MAX_OUTPUT]
            if not data:
                watched.remove(reader)
        elif ready:
            return 0.0 if exited in ready else HOOK_STOP_S, output
    return HOOK_GRACE_S, output

def run_hook(command: Sequence[str], environment: Mapping[str, str], *stopping: int) -> tuple[int | None, bytes]:
    """Run a command, in its own process group; -> its exit status, and its output's beginning.  Raises OSError."""
    # The status: 128 + the signal that ended it; None: we ended its process group, after HOOK_S or for `stopping`.
    ours = {name: value for name, value in os.environb.items() if name not in NOT_FOR_HOOKS}
    given = {name.encode(): value.encode() for name, value in environment.items()}        # UTF-8 in every locale
    reader, writer = os.pipe()
    files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), *((os.POSIX_SPAWN_DUP2, writer, n) for n in (1, 2))]
    with open(reader, "rb"):                          # each `with` is there to close its descriptor
        with open(writer, "wb"):
            # posix_spawn is quick, and unblocks the signals that our threads block, which a child inherits.
            pid = os.posix_spawn(command[0], list(command), ours | given, file_actions=files, setpgroup=0,
                                 setsigmask=(), setsigdef=(signal.SIGPIPE,))
        with open(os.pidfd_open(pid), "rb", buffering=0) as exited:
            grace_s, output = read_output(reader, exited.fileno(), stopping)
            for signal_no in (signal.SIGTERM, signal.SIGKILL) if grace_s else ():
                with contextlib.suppress(OSError):    # it has gone, or belongs to another user (sudo)
                    os.killpg(pid, signal_no)
                select.select([exited], (), (), grace_s)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, os.WNOHANG if grace_s else 0)[1])
        return None if grace_s else code if code >= 0 else 128 - code, output

class Hooks:
    """Runs the -on-event command, one event at a time, in a thread of its own.  level: of the line that says it ran."""

    def __init__(self, command: Sequence[str], active_timeout_s: float, level: int = logging.DEBUG):
        self.command, self.active_timeout_s, self.level = command, active_timeout_s, level
        self.inbox: queue.SimpleQueue[Change | dict[str, str]] = queue.SimpleQueue()      # or what tells of `watched`
        self.amplifier, self.latest, self.waiting = Amplifier(), dict[str, str](), Waiting()
        # running: held while a command runs.  ended, and stopping can be read: end() was called.
        self.running, self.stopping, self.ended = threading.Lock(), os.eventfd(0), False

    def run(self) -> None:
        """Until end()."""
        while not self.ended:
            with contextlib.suppress(queue.Empty):
                while True:                           # take all that came; wait for more only if no command waits
                    left_s = max(0.0, self.amplifier.off_at - time.monotonic())
                    self.take(self.inbox.get(not self.waiting, min(left_s, threading.TIMEOUT_MAX)))
            if time.monotonic() >= self.amplifier.off_at:
                self.amplifier, self.waiting = Amplifier(), enqueue(self.waiting, "inactive", self.latest)
            if self.waiting:
                with self.running:
                    self.call(*self.waiting.pop(0))

    def end(self) -> None:
        """End the command that runs, as run_hook() does, and run no other: the lock is never given back."""
        self.ended = True
        os.eventfd_write(self.stopping, 1)
        self.running.acquire(timeout=2 * HOOK_STOP_S)

    def take(self, change: Change | dict[str, str]) -> None:
        """Add the events of a change, or `watched`, to those that wait."""
        if isinstance(change, dict):
            self.waiting = enqueue(self.waiting, "watched", change)
            return
        event = "track_changed" if change.state == change.old_state else change.state      # librespot's words
        self.latest = hook_environment(change, event)
        self.amplifier, switched_on = after_change(self.amplifier, change, time.monotonic(), self.active_timeout_s)
        for each in ("active", event) if switched_on else (event,):
            self.waiting = enqueue(self.waiting, each, self.latest)

    def call(self, event: str, environment: Mapping[str, str]) -> None:
        """Run the command once, and log how it ended."""
        try:
            status, output = run_hook(self.command, {**environment, "PLAYER_EVENT": event}, self.stopping)
        except OSError as error:
            say(logging.WARNING, f"the -on-event command could not be started ({why(error)})", event=event,
                command=self.command[0])
            return
        said = output.decode("utf-8", "replace").strip()
        if self.ended:
            say(self.level, "the -on-event command ended with the daemon", event=event, status=status)
        elif status is None:
            say(logging.WARNING, f"the -on-event command took more than {HOOK_S:g} s, and was ended", event=event)
        elif status:
            say(logging.WARNING, "the -on-event command failed", event=event, status=status, output=said[-MAX_TEXT:])
        else:
            say(self.level, "the -on-event command ran", event=event, output=said[:MAX_TEXT])

# -- hook: try the command by hand
HOOK_EVENTS = (PLAYING, PAUSED, STOPPED, "track_changed", *SWITCHES, "watched")
SAMPLE = Item(TRACK, "101", "plex://track/5d07cdb2403c640290f4b12a", "Karma Police", "OK Computer", "Radiohead",
              duration=264000, sample_rate=44100, bit_depth=16)
WATCHED_SAMPLE = {"PLAYER_EVENT": "watched", "NAME": "Pilot", "SHOW": "Breaking Bad", "SEASON": "1", "EPISODE": "1",
                  "PLEX_TYPE": EPISODE, "PLEX_RATING_KEY": "62085", "TRACK_ID": "plex://episode/5d9c08f4ba2eb9001fb0a4d9"}

def hook(config: Config) -> int:
    """Run the -on-event command once, with sample values, and print everything about it."""
    if len(config.words) != 1 or config.words[0] not in HOOK_EVENTS:
        raise ConfigError(f"hook: name one event of {', '.join(HOOK_EVENTS)}, as in: hook playing -on-event COMMAND")
    if not config.on_event:
        raise ConfigError("hook: give the command, -on-event 'COMMAND ARGS', here or in the flags file.")
    event, command = config.words[0], hook_command(config.on_event)
    before = STOPPED if event in (PLAYING, "active") else PLAYING
    change = Change(event, before, SAMPLE, 61000, "Living Room", "sample-player", "hook")
    environment = WATCHED_SAMPLE if event == "watched" else hook_environment(change, event)
    values = (f"    {name}={shlex.quote(value)}" for name, value in environment.items())
    print("\n".join([shlex.join(command), *values]), flush=True)
    try:
        status, output = run_hook(command, environment)
    except OSError as error:
        raise ConfigError(f"-on-event: {command[0]} could not be started ({why(error)}).") from error
    print(output.decode("utf-8", "replace"), end="" if output.endswith(b"\n") or not output else "\n")
    print(f"exit status {status}" if status is not None else f"it took more than {HOOK_S:g} s, and was ended")
    return int(status != 0)

# === Tracker: a finished episode -> its show, marked as watched (choose_show, Tracker, Journal, Worker) ===
# What for: with -tracker-db, each media.scrobble of an episode or a movie is marked as watched, once and for the right
#   show, or it waits as a conflict for a person.  A webhook that was answered 200 is never lost.
# Way: Webhook -> Journal (an Entry in the table webhook_log, on the disk before the 200) -> Worker -> Match | Conflict
#   -> Outcome.  The mark and the entry's status are one transaction: a kill at any moment loses and doubles nothing.
# Threads: request threads append to the journal.  "worker" alone finishes the entries: shows and marks have no other
#   writer in the daemon but a person (see Browse).  All share one connection to the database, in turn.
# Needs of Player: PlexServer, Scrobble, Webhook, boot_s, exchange, item_guids, parse_scrobble, server_of, tls_context;
#   of Page: Glance

# -- Ids: guids -> Ids (parse_guid, parse_ids)
# No season or episode has a higher number than MAX_NUMBER (some are dates: 26041103), nor was one watched more often.
SHOW, MAX_NUMBER, MAX_PLAYS = EPISODE, 2**31, 1000       # Show.type: the database calls a show by what is watched of it
# Two witnesses tell of one play if their times differ by at most six hours: somebody may have paused for dinner.  What
# one witness tells are two plays, but for what is written twice within a minute.
SAME_PLAY_S, SAME_SOURCE = 6 * 3600.0, {"import": 60, "library": 0, "history": 0, "hand": 0}
# A database's name in a guid -> our column for its ids; and the guids in which they stand:
# tmdb://1396, com.plexapp.agents.thetvdb://73244/1/1?lang=en, com.plexapp.agents.hama://tvdb2-81797/22/70
DATABASES = {"tmdb": "tmdb_id", "themoviedb": "tmdb_id", "tvdb": "tvdb_id", "thetvdb": "tvdb_id", "imdb": "imdb_id"}
_GUID = re.compile(r"(?:com\.plexapp\.agents\.(?:hama://)?)?(thetvdb|themoviedb|tvdb|tmdb|imdb)\d?(?:://|-)"
                   r"(tt)?0*([1-9]\d{0,9})(?:/(\d{1,10})/(\d{1,10}))?(?:[/?].*)?", re.ASCII)

class Ids(NamedTuple):
    """The ids of a show or movie in other databases; None: not known."""
    tmdb_id: int | None = None
    tvdb_id: int | None = None
    imdb_id: str | None = None    # tt0903747

    def contradicts(self, others: Sequence[int | str | None]) -> bool:
        """Whether both (others: Ids, or its first) have an id in one database, and the ids differ: two shows."""
        return any(None not in pair and pair[0] != pair[1] for pair in zip(self, others, strict=False))

def parse_guid(guid: str) -> tuple[str, Any, int | None, int | None] | None:
    """A guid's column (see DATABASES), id (as in Ids), season and episode; None for a guid without such an id."""
    # Legacy agents give an episode the id of its *show*, then season and episode; a short guid (tmdb://), its own id.
    if not (found := _GUID.fullmatch(guid)) or (found[1] == "imdb") != bool(found[2]):
        return None
    return DATABASES[found[1]], f"tt{found[3]:0>7}" if found[2] else int(found[3]), number(found[4]), number(found[5])

def parse_ids(guids: Iterable[str]) -> Ids:
    """The ids in these guids; if there are two of one database, the first."""
    return Ids(**{parsed[0]: parsed[1] for parsed in map(parse_guid, [*guids][::-1]) if parsed})

# -- Titles: a title -> Match | Conflict (parse_title, similarity, choose_show)
# A mark on the wrong show is worse than a question: what is uncertain is asked.  A movie is a show of one episode, 0x0.
# Characters that Unicode's decomposition (NFKD) leaves as they are, spelt out; the okina and its look-alikes and the
# trademark sign, left out; superscripts, subscripts and fractions, made words: the 3 of "Alien 3" may be a small one.
SPELT = {0xd7: " x ", 0xe6: "ae", 0x153: "oe", 0xf8: "o", 0x142: "l", 0x131: "i", 0x111: "d", 0xf0: "d", 0xfe: "th",
         **dict.fromkeys((0x60, 0xb4, *range(0x2b9, 0x2c0), *range(0x2018, 0x201c), 0x2032, 0x2122), ""), 0x26: " and ",
         0x2b: " and ", **{n: f" {chr(n)}" for n in (0xb2, 0xb3, 0xb9, *range(0xbc, 0xbf), *range(0x2070, 0x208a))}}

def parts(title: str) -> tuple[str, str]:
    """A title without case, accents, punctuation and leading article; and that article."""
    plain = unicodedata.normalize("NFKD", title.casefold().translate(SPELT))
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", re.sub("[\u0300-\u036f.'*]", "", plain)))
    first = len(words) > 1 and words[0] in ("the", "a", "an")
    return " ".join(words[first:]) or title.strip(), " ".join(words[:first])

def normal(title: str) -> str:
    """A title by which it is sought: of "The Office" and "office!", it is "office"."""
    return parts(title)[0]

class Title(NamedTuple):
    """A title, split into its parts: "The Office (US) (2005)".  Two titles are equal if their first two are."""
    normal: str                   # office
    article: str                  # the; "": it has none
    year: int | None              # 2005; None: it has none
    country: str                  # US, a code of two letters; "": it has none

# The year or country behind a title, in brackets; and of two codes of one country, the usual one.
_QUALIFIER = re.compile(r"(.*\S)\s*[(\[](\d{4}|[A-Z]{2}|USA)[)\]]\s*", re.DOTALL)
COUNTRIES = {"USA": "US", "GB": "UK"}

def parse_title(title: str) -> Title:
    """The Title that Plex or a person wrote."""
    year, country = None, ""
    while qualified := _QUALIFIER.fullmatch(title):
        title, word = qualified.groups()
        year, country = (int(word), country) if word.isdigit() else (year, COUNTRIES.get(word, word))
    return Title(*parts(title), year, country)

def named(title: str, year: int | None) -> str:
    """How a person calls a show or movie: 'Castle (2009)'."""
    return f"{title} ({year})" if year and parse_title(title).year is None else title

@functools.lru_cache(2048)    # a title that came without an id is compared with all others
def trigrams(title: str) -> frozenset[str]:
    """The trigrams of a normal title, as PostgreSQL's pg_trgm makes them: two blanks before each word, one after."""
    return frozenset(f"  {word} "[i:i + 3] for word in title.split() for i in range(len(word) + 1))

def similarity(one: str, two: str) -> float:
    """How similar two normal titles are, 0 to 1: the share of their trigrams that both have (pg_trgm's similarity)."""
    a, b = trigrams(one), trigrams(two)
    return len(a & b) / len(a | b) if a or b else float(one == two)

class Show(NamedTuple):
    """A show or movie, in the tracker or as a server describes it."""
    type: str                     # SHOW or MOVIE
    title: str
    year: int | None = None       # the first; None: not known
    ids: Ids = Ids()
    id: int = 0                   # the tracker's; 0: not in it
    own_year: bool = True         # False: the year is that of a season or an episode
    season: int | None = None     # of the episode that was watched; None: not known
    episode: int = 0              # its number in the season; 0: not known
    episode_title: str = ""       # of that episode, as Plex or the tracker has it; "": not known
    seasons: int = 0              # the last season that the tracker has of it; 0: not known

class Match(NamedTuple):
    """The show that is meant."""
    show_id: int                  # the tracker's; 0: a person chose to ignore this show
    by: str                       # mapping, tmdb_id, tvdb_id, imdb_id, title; new: it was added; import
    confidence: float             # 0 to 1

class Candidate(NamedTuple):
    """A show that may be meant."""
    show: Show
    score: float                  # 0 to 1
    fits: int                     # 1: the year fits; 0: possible; -1: year, country, a number or a word differs

class Conflict(NamedTuple):
    """It is not certain which show is meant."""
    kind: str                     # multiple_matches, ambiguous, no_match
    candidates: tuple[Candidate, ...] = ()
    lacks: bool = False           # the candidate would be meant, but does not have the episode

# How much an id is trusted, in the order in which they are tried and stand in Ids; as in the contract.
CONFIDENCE = {"tmdb_id": 1.0, "tvdb_id": 0.95, "imdb_id": 0.95}
GUESSED = "title", "earlier"  # of Match.by: no id and no person proves it
# A title is taken if its score is higher than 0.9; as in the contract, as YEAR_ADDS.  A person is asked about at most 5
# titles, for more would not be read; and about none whose similarity is under 0.5: they share little but "of the".
TAKEN_ABOVE, MAX_CANDIDATES, MIN_SIMILARITY = 0.9, 5, 0.5
YEAR_ADDS: Mapping[int | None, float] = {1: 0.10, 0: 0.05, -1: 0.0, None: 0.0}  # added to the score, by years_agree()
# The numbers in a normal title: "part 1" is not "part 2", although the titles are very similar.
_NUMBER = re.compile(r"\d+|\b(?:[ivx]+|one|two|three|four|five|six|seven|eight|nine|ten)\b")
_PLAIN = re.compile(r"\d|\b(?:episode|chapter|part|pilot|premiere|finale|special|untitled)\b")      # an episode's title
# Seasons from FIRST_YEAR on are years: no rule holds.  An anime may have one season for ever, of over EPISODES_A_YEAR.
LEFT_OUT, FIRST_YEAR, EPISODES_A_YEAR = {"and", "the"}, 1900, 25     # LEFT_OUT: words that people leave out of a title

def season_fits(age: int, wanted: Show, known: Show) -> int:
    """As years_agree(), for a season's year; age: how many years that is after the known show's first."""
    season, late_special = wanted.season or 0, wanted.season == 0 and age > known.seasons + 3 > 3
    if age < -1 or not 0 < season < FIRST_YEAR:
        return -1 if age < -1 or late_special else 1 if age <= 1 else 0
    lag = age - (season - 1)      # usually there is one season a year
    if abs(lag) <= 1:
        return 1
    # Survivor has two seasons a year.  A namesake that began after the show that is meant has not so many yet: in 2022
    # the British Ghosts had season 4, and the American one was a year old.
    if lag < 0:
        return 0 if 5 < season <= (known.seasons or season) and 2 * season <= 5 * age + 2 else -1
    # Pauses add up, and a show that comes back (Prison Break, The X-Files) does so with its last seasons.  A remake
    # whose original alone is known (Frasier) has but the first ones; or the original is too old (Hawaii Five-0).
    last = season > 8 or 4 * season >= 3 * known.seasons or lag <= season
    back = 3 < season <= known.seasons + 1 and last and lag < 3 * season
    return 0 if back or lag <= (4 if season > 1 else 1 + wanted.episode // EPISODES_A_YEAR) else -1

def years_agree(wanted: Show, wanted_title: Title, known: Show, known_title: Title) -> int | None:
    """1: within one; 0: possible; -1: the years speak against; None: not known."""
    # The webhook of an episode tells the year of its season: "iCarly", season 4 in 2010, may well be the show of 2007,
    # but not the one of 2021.  A year in the title, "iCarly (2021)", is always the show's own.
    year, known_year = wanted_title.year or wanted.year, known_title.year or known.year
    if year is None or known_year is None:
        return None if wanted_title.year == known_title.year else -1
    own, age = wanted.own_year or wanted_title.year is not None, year - known_year
    # Where only one title names a country, there may be another version: Queer as Folk (UK) 1999, (US) 2000.
    if age and (own or wanted.season == 1) and wanted_title.country != known_title.country:
        return -1
    return season_fits(age, wanted, known) if not own else 1 if abs(age) <= 1 else -1

def other_episode(one: str, two: str) -> bool:
    """Whether these titles are those of two episodes.  "Pilot", "Episode 3" and a translation do not tell."""
    titles = [normal(one), normal(two)]
    tell = all(len(each) > 2 and each.isascii() and not _PLAIN.search(each) for each in titles)
    return tell and similarity(*titles) < MIN_SIMILARITY / 2

def candidate(wanted: Show, known: Show) -> Candidate | None:
    """A known show as one that may be meant; None if it cannot be."""
    # Only offered to a person: what differs in year, country, number or word; an unequal title, unless its year fits.
    title, known_title = parse_title(wanted.title), parse_title(known.title)
    countries, alike = {title.country, known_title.country}, similarity(title.normal, known_title.normal)
    if wanted.ids.contradicts(known.ids) or (len(countries) == 2 and "" not in countries) or alike < MIN_SIMILARITY:
        return None
    years = years_agree(wanted, title, known, known_title)
    score = min(1.0, alike + YEAR_ADDS[years])
    words, theirs = ([word for word in each.normal.split() if word not in LEFT_OUT] for each in (title, known_title))
    differs = years == -1 or (years != 1 and (len(countries) == 2 or title[:2] != known_title[:2] or other_episode(
        wanted.episode_title, known.episode_title))) or \
        len(words) != len(theirs) or (words != theirs and sorted(words) == sorted(theirs)) or \
        _NUMBER.findall(title.normal) != _NUMBER.findall(known_title.normal)
    return Candidate(known, min(score, TAKEN_ABOVE), -1) if differs else Candidate(known, score, years or 0)

def choose_show(wanted: Show, known: Iterable[Show]) -> Match | Conflict:
    """Which of the known shows is meant, by title and year.  An equal title wins over all similar ones."""
    # If several shows have it, the one whose year fits is meant; if no year fits, the only one that is possible.
    found = sorted(filter(None, (candidate(wanted, show) for show in known)), key=lambda each: -each.score)
    above = [each for each in found if each.score > TAKEN_ABOVE]
    exact = [each for each in above if parse_title(each.show.title)[:2] == parse_title(wanted.title)[:2]]
    some = [each for each in exact if each.fits == 1] or exact or above
    if len(some) == 1:
        return Match(some[0].show.id, "title", round(some[0].score, 2))
    return Conflict("multiple_matches" if some else "ambiguous" if found else "no_match", tuple(found[:MAX_CANDIDATES]))

# -- The journal: Webhook -> Entry, Outcome (entry_of, first_outcome)
# The statuses of an entry; and two of its events: that of a webhook that counts, and of a play for which none came.
ENTRY_STATUSES = SUCCESS, FAILED, IGNORED, DUPLICATE = "success", "failed", "ignored", "duplicate"
SCROBBLE, HISTORY = "media.scrobble", "history"
WEBHOOK, LIBRARY, HAND, IMPORT = "webhook", "library", "hand", "import"      # where a play is known from; so is HISTORY
FOUND = {HISTORY: "recovered", LIBRARY: "marked_in_plex"}     # the events without a webhook, and the action of each

class Entry(NamedTuple):
    """One row of the tracker's journal: a webhook, or a play that only the server's history told of."""
    # The fields are columns of webhook_log; those from `type` on are Plex's words about the item.
    received_at: float            # Unix s; of a play from the history: when it was viewed
    event: str                    # the webhook's; HISTORY
    server: str = ""              # its machineIdentifier (Server.uuid); "": not given
    account_id: str = ""          # Account.id; "": not given
    account: str = ""             # Account.title
    type: str = ""                # EPISODE, MOVIE, or what is not tracked
    rating_key: str = ""
    guid: str = ""
    title: str = ""               # of the episode or movie
    show_title: str = ""          # grandparentTitle
    season: int | None = None     # a movie's is 0; None: not given
    episode: int | None = None    # its number in the season; a movie's is 0; None: not given
    year: int | None = None       # of the episode, its season or the movie; None: not given
    show_key: str = ""            # grandparentRatingKey; "": not given
    show_guid: str = ""           # grandparentGuid; "": not given (legacy agents)
    guids: str = ""               # the item's own ids (tmdb://62085 ...), separated by blanks
    id: int = 0                   # 0: not in the journal yet
    attempts: int = 0             # how often the worker tried to finish it, without success

    @property
    def name(self) -> str:
        """The title of the show or movie."""
        return self.title if self.type == MOVIE else self.show_title

    @property
    def guid_of_show(self) -> str:
        """The guid of the show or movie, without ?lang=; "": not given.  A legacy agent's episode has it in its own."""
        legacy = re.match(r"com\.plexapp\.agents\.[^/]*://[^/?]+", self.guid)
        own = self.guid if self.type == MOVIE else legacy[0] if legacy else ""
        return re.sub(r"^local://.*", "", self.show_guid or own).partition("?")[0]     # that is only the key again

    @property
    def key(self) -> str:
        """The server's rating key of the show or movie; "": not given."""
        return self.rating_key if self.type == MOVIE else self.show_key

    @property
    def subject(self) -> str:
        """What the show or movie is called on its server, for a mapping: by its key, else its guid, else its title."""
        return f"key:{self.key}" if self.key else f"guid:{own}" if (own := self.guid_of_show) else f"title:{self.name}"

    @property
    def show(self) -> Show:
        """The show or movie, as far as the entry describes it.  The ids of an episode are not those of its show."""
        movie = self.type == MOVIE
        guids = (self.guid, *self.guids.split()) if movie else (self.show_guid, self.guid_of_show)
        return Show(self.type, self.name, self.year, parse_ids(guids), 0, movie, self.season, self.episode or 0,
                    "" if movie else self.title)

class Outcome(NamedTuple):
    """What became of an entry."""
    status: str                   # SUCCESS, FAILED, IGNORED, DUPLICATE
    action: str                   # as in the contract: marked_watched, conflict_created, ...
    reason: str = ""              # for a person
    match: Match | None = None
    retry: bool = False           # the failure may pass: try again later

# An entry whose server cannot be asked is tried again after 30 s, for a server restarts in that time.  Each pause is
# twice as long as the last, up to an hour: one that was away all evening is found within it.  30 attempts take a day.
ENTRY_RETRY_MIN_S, ENTRY_RETRY_MAX_S, MAX_ATTEMPTS = 30.0, 3600.0, 30

def retry_after_s(attempts: int) -> float | None:
    """How long to wait after an attempt in vain; None: give up.  attempts: made in vain before it."""
    # Only this pause counts: that the server is back wakes nobody.
    return min(ENTRY_RETRY_MAX_S, ENTRY_RETRY_MIN_S * 2 ** attempts) if attempts < MAX_ATTEMPTS else None

def entry_of(webhook: Webhook, at: float) -> Entry:
    """The Entry of a webhook that came at this Unix time.  A legacy agent's guid fills in season and episode."""
    item, scrobble = webhook.item or Item(), webhook.scrobble or Scrobble()
    legacy = (parse_guid(item.guid) or (None,) * 4)[2:]
    given = (0, 0) if item.type == MOVIE else (item.parent_index, item.index)
    season, episode = (old if new is None else new for old, new in zip(legacy, given, strict=True))
    return Entry(at, webhook.event, webhook.server, webhook.account_id, webhook.account, item.type, item.rating_key,
                 item.guid, item.title, item.grandparent_title, season, episode, scrobble.year, scrobble.show_key,
                 scrobble.show_guid, " ".join(scrobble.guids))

def disagree(told: Show, known: Show) -> bool:
    """Whether ids or years speak against it that these are one show."""
    later = told.year - known.year if told.year and known.year else 0         # a season's year may be much later
    return told.ids.contradicts(known.ids) or later < -1 or (told.own_year and later > 1)

def play_entry(fields: Mapping[str, Any], server: str, event: str = HISTORY) -> Entry:
    """The Entry of a play that the server's history tells of, or a library (event LIBRARY): as that of a webhook."""
    # The history has the show's key only in a path, /library/metadata/1000.
    scrobble, at = parse_scrobble(fields), fields.get("viewedAt" if event == HISTORY else "lastViewedAt")
    key = scrobble.show_key or text(fields.get("grandparentKey")).rpartition("/")[2]
    return entry_of(Webhook(event, item=parse_item(fields), server=server, account_id=text(fields.get("accountID")),
                            scrobble=scrobble._replace(show_key=key)), float(time_of(at)))

def missing_word(entry: Entry) -> str:
    """What an entry needs but does not have; "": nothing."""
    numbers = {"type": 0 if entry.type in (EPISODE, MOVIE) else None, "title": 0 if entry.name else None,
               "season": entry.season, "episode number": entry.episode}
    return next((word for word, value in numbers.items() if value is None or value > MAX_NUMBER), "")

def split_accounts(accounts: str) -> set[str]:
    """The titles and ids in -accounts."""
    return {name.strip().casefold() for name in accounts.split(",")} - {""}

def first_outcome(webhook: Webhook, entry: Entry, accounts: str) -> Outcome | None:
    """What becomes of a webhook that marks nothing, whatever is in the tracker; None: the worker decides."""
    if webhook.event != SCROBBLE:
        return Outcome(IGNORED, "event_not_scrobble",
                       f"only media.scrobble tells that something was finished, not {webhook.event}")
    if entry.type not in (EPISODE, MOVIE):
        what = f"a {entry.type}" if entry.type else "an item without a type"
        return Outcome(IGNORED, "not_supported_type", f"only episodes and movies are tracked, not {what}")
    # The owner's id is 1 to the server; in webhooks it is the one at plex.tv.  Without -accounts only the owner counts.
    names = {webhook.account.casefold(), webhook.account_id, "1" if webhook.user else ""}
    if accounts != "*" and not (names & split_accounts(accounts) if accounts else webhook.user):
        reason = "is not in -accounts" if accounts else "is not the owner of the webhook; -accounts can add others"
        return Outcome(IGNORED, "other_account", f"{webhook.account or 'the account'} {reason}")
    missing = missing_word(entry)
    return Outcome(FAILED, "validation_failed", f"the webhook has no {missing}") if missing else None

# -- Words: -> log, terminal, JSON (conflict_reason, unix_time, episode_row, season_lines)
def conflict_reason(show: Show, conflict: Conflict) -> str:
    """Why a person is asked."""
    name = named(show.title, show.year)
    best = ", ".join(f"{named(each.show.title, each.show.year)} ({each.score:.2f})" for each in conflict.candidates[:3])
    said = {"no_match": f"nothing in the tracker is similar to {name}", "ambiguous": f"{name} may be {best}",
            "multiple_matches": f"{name} may be any of {best}"}
    return f"{conflict.kind}: {said[conflict.kind]}{', which lacks this episode' * conflict.lacks}"

def unix_time(word: str) -> int:
    """The Unix time of a word such as 2026-11-21T20:15:00Z; raises ValueError, also for a time without a zone."""
    with contextlib.suppress(ValueError, OverflowError):
        if (moment := datetime.datetime.fromisoformat(word)).tzinfo:
            return time_of(int(moment.timestamp()))
    raise ValueError("give a time such as 2026-11-21T20:15:00Z")

Plays = tuple[int | None, ...]                # each time that an episode was watched: Unix s; None: not known when
EpisodeRow = tuple[int, int, str, Plays]      # what a witness tells: season and number (of a movie 0, 0), title, plays

def episode_row(fields: Mapping[str, Any], at: float) -> EpisodeRow | None:
    """An episode or movie of a server's library; None: it has no season or no number.  at: now (Unix s)."""
    # lastViewedAt alone means begun, not watched; and what was ticked whole has none.
    item, last = parse_item(fields), number(fields.get("lastViewedAt"))
    count = min(number(fields.get("viewCount")) or 0, MAX_PLAYS)
    season, episode = (0, 0) if item.type == MOVIE else (item.parent_index, item.index)
    if season is None or episode is None or max(season, episode) > MAX_NUMBER:
        return None
    return season, episode, item.title, (time_of(last) if last and last <= at else None, *[None] * (count - 1))[:count]

def new_plays(known: Sequence[tuple[int | None, str]], told: Plays, source: str) -> tuple[list[int | None], list[int]]:
    """What a witness's plays add to those that are known, each with its source: plays, and dates of undated ones."""
    # Each play that is told is one that is known, if one fits: the nearest within SAME_PLAY_S (of the same source:
    # within SAME_SOURCE); else, for a witness of the past, one without a date.
    left, more, dates = list(known), list[int | None](), list[int]()
    for at in sorted(told, key=lambda each: (each is None, each)):
        near = [each for each in left if at is not None and each[0] is not None and
                abs(at - each[0]) <= (SAME_SOURCE.get(source, -1) if source == each[1] else SAME_PLAY_S)]
        undated = [each for each in left if (each[0] is None or at is None) and source in (LIBRARY, IMPORT)]
        if same := min(near, key=lambda each: abs((at or 0) - (each[0] or 0)), default=next(iter(undated), None)):
            left.remove(same)
            if same[0] is None and at is not None:
                dates.append(at)
        else:
            more.append(at)
    return more, dates

def cut(line: str, width: int = 80) -> str:
    """A line in at most so many columns of a terminal, in which the wide letters of East Asia take two."""
    ends = list(itertools.accumulate((1 + (unicodedata.east_asian_width(c) in "WF") for c in line), initial=0))
    return line if ends[-1] <= width else line[:sum(end < width for end in ends[1:])] + "\u2026"

def season_lines(season: int, episodes: Sequence[tuple[int, bool]]) -> str:
    """A season as a grid of its (number, watched): # watched, . not watched, a blank for a number that is missing."""
    watched = dict(episodes)                          # by number; numbers that are dates (26041103) have no blanks
    numbers = sorted(watched) if max(watched) > 2 * len(watched) + 100 else range(min(1, *watched), max(watched) + 1)
    cells = "".join({True: "#", False: ".", None: " "}[watched.get(number)] for number in numbers)
    name = f"Season {season}" if season else "Specials"
    lines = [f"{'' if i else name:10}  {cells[i:i + 50]:50}" for i in range(0, len(cells), 50)]
    return "\n".join(lines) + f"  {sum(watched.values())} of {len(watched)}"

# -- Foreign histories: Trakt's export, Yamtrack's CSV <-> shows and plays (read_foreign, trakt_history)
# A damaged file is refused.  What is of no use in a sound one is left out, counted and said.
MAX_FILE, MAX_FILES = 100 << 20, 500 << 20    # bytes of a file, also in a zip, and of all in it: zips lie about sizes
# Read of Trakt's zip, in any folder: watched-history-1.json, watched/history-1.json, history.json; _errors.json.
_TRAKT_FILE = re.compile(r"(?:.*/)?(?:(?:watched-)?history(?:-\d+)?|_errors)\.json")
# Columns in every version of Yamtrack; those that tell when it was watched, the surest first; Trakt's sign for no time.
YAMTRACK = {"media_id", "source", "media_type", "title", "season_number", "episode_number", "status"}
YAMTRACK_TIMES, UNKNOWN_TIME = ("end_date", "watch_date", "progressed_at", "created_at"), "1970-01-01T00:00:00.000Z"
History = tuple[list[tuple[Show, list[EpisodeRow]]], list[str]]     # and what was left out, in sentences
# What tells its show from others, the show, season, number, title, Unix s; or why it is left out.
Play = tuple[object, Show, int, int, str, int | None] | str

def play_of(key: object, show: Show, season: object, episode: object, title: object, watched_at: object) -> Play:
    """A Play in foreign words.  Numbers can be dates (26041103); a time before 1971 is not known."""
    place = [each for each in map(number, map(text, (season, episode))) if each is not None and each <= MAX_NUMBER]
    word = text(watched_at)       # a day alone: noon in Greenwich is that day nearly everywhere
    try:
        at = unix_time(f"{word}T12:00Z" if re.fullmatch(r"\d{4}-\d\d-\d\d", word, re.ASCII) else word)
    except ValueError:
        return "a time that cannot be read"
    if not show.title or len(place) < 2:
        return "no title, or no season or number"
    return key, show, place[0], place[1], text(title), at if at >= 365 * 86400 else None

def gathered(plays: Iterable[Play], apart_s: int) -> History:
    """The plays by show and episode; those at most apart_s apart are one (-1: none are)."""
    shows: dict[object, tuple[Show, dict[tuple[int, int], tuple[str, list[int | None]]]]] = {}
    told = list(plays)
    left = collections.Counter(play for play in told if isinstance(play, str))
    for key, show, season, episode, title, at in sorted((play for play in told if not isinstance(play, str)),
                                                        key=lambda play: math.inf if play[-1] is None else play[-1]):
        times = shows.setdefault(key, (show, {}))[1].setdefault((season, episode), (title, []))[1]
        if times and at is not None and at - (times[-1] or 0) <= apart_s:
            left["a double of another play"] += 1
        else:
            times.append(at)
    return [(show, [(*place, title, tuple(times)) for place, (title, times) in sorted(rows.items())])
            for show, rows in shows.values()], [f"{count:,} left out: {each}." for each, count in left.most_common()]

def trakt_plays(entries: Iterable[object]) -> Iterator[Play]:
    """The plays in entries of Trakt's histories."""
    for entry in map(json_object, entries):
        kind, movie = text(entry.get("type")), json_object(entry.get("movie"))
        of, what = (movie, {**movie, "season": 0, "number": 0}) if kind == MOVIE else \
            (json_object(entry.get("show")), json_object(entry.get("episode")))
        ids = json_object(of.get("ids"))             # the show's; those of `what` are the episode's own
        show = Show(kind, text(of.get("title")), number(text(of.get("year"))) or None,
                    parse_ids(f"{name}://{text(ids.get(name))}" for name in ("tmdb", "tvdb", "imdb")))
        yield play_of((text(ids.get("trakt")), show), show, what.get("season"), what.get("number"), what.get("title"),
                      entry.get("watched_at")) if kind in (SHOW, MOVIE) else "neither an episode nor a movie"

def yamtrack_plays(rows: Iterable[Mapping[str, str]]) -> Iterator[Play]:
    """The plays in Yamtrack's rows: each of an episode is one, and each of a completed movie."""
    for row in rows:
        kind, key = row["media_type"], (row["media_type"], row["source"], row["media_id"] or row["title"])
        if kind == SHOW or (kind == MOVIE and row["status"] == "Completed"):
            show = Show(kind, text(row["title"]), ids=Ids(parse_ids([f"{row['source']}://{row['media_id']}"]).tmdb_id))
            place = (row["season_number"], row["episode_number"], "") if kind == SHOW else ("0", "0", show.title)
            at = next(filter(None, map(row.get, YAMTRACK_TIMES)), UNKNOWN_TIME)
            for word in (at, *[UNKNOWN_TIME] * min(number(row.get("repeats")) or 0, 99)):    # 2024: watched again
                yield play_of(key, show, *place, word)
        elif kind not in ("tv", "season"):
            yield "a movie that is not completed" if kind == MOVIE else "media such as anime, manga, games and books"

def unzipped(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The histories in Trakt's zip, each with its name, and _errors.json; raises as zipfile does."""
    import zipfile  # here, as csv and zlib below: the daemon does not pay for it
    rest = MAX_FILES
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        for name in filter(_TRAKT_FILE.fullmatch, dict.fromkeys(file.namelist())):    # plays are put in order by time
            if file.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile("an unusual compression")           # a piece of it can unpack to any size
            with file.open(name) as unpacked:
                part = unpacked.read(min(MAX_FILE, rest) + 1)
            if len(part) > min(MAX_FILE, rest):
                raise zipfile.BadZipFile(f"over {MAX_FILE >> 20} MiB in a file, or over {MAX_FILES >> 20} MiB in all")
            rest -= len(part)
            yield name, part

def foreign_rows(content: bytes, form: str, place: str, said: list[str]) -> Iterator[Any]:
    """The entries of Trakt's histories (form: zip or json), or the rows of Yamtrack's CSV; raises ConfigError."""
    import csv
    import zipfile
    import zlib
    try:
        for name, part in unzipped(content) if form == "zip" else [("", content)] if form == "json" else ():
            if not name.endswith("_errors.json"):
                yield from json.loads(part)
            elif part.strip() not in (b"", b"[]", b"{}"):
                said.append("The export is incomplete, says its _errors.json: ask Trakt for a new one.")
        if form == "csv":
            for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True):
                if None in row or None in row.values() or not row.keys() >= YAMTRACK:
                    raise csv.Error("a row has too many or too few columns")
                yield row
    except (csv.Error, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError, RuntimeError,
            OverflowError) as error:                  # an offset in the zip that a system of 32 bits cannot take
        reason = printable(text(why(error), 100))
        raise ConfigError(f"tracker import: {place} is damaged ({reason}); export it again.") from error

def read_foreign(content: bytes, place: str) -> History | None:
    """What a foreign file tells, by what is in it; None: JSON of our own form, if of any.  Raises ConfigError."""
    if len(content) > MAX_FILE:
        raise ConfigError(f"tracker import: {place} has over {MAX_FILE >> 20} MiB: that is no export of one person.")
    said, start = list[str](), content[:4096].decode("ascii", "ignore").lstrip()
    form = "zip" if start.startswith(("PK\3\4", "PK\5\6")) else {"[": "json", "{": "own"}.get(start[:1]) or (
        "csv" if {*re.findall(r"\w+", start.partition("\n")[0])} >= YAMTRACK else "")
    if form == "own":
        return None
    rows = foreign_rows(content, form, place, said)
    found, left = gathered(yamtrack_plays(rows), -1) if form == "csv" else gathered(trakt_plays(rows), 60)
    said += left
    if not found:
        raise ConfigError(" ".join([f"tracker import: {place} has no watch history; give Trakt's zip or its "
                                    "watched-history.json, Yamtrack's CSV, or JSON of `tracker export`.", *said]))
    return found, said

def trakt_history(history: Iterable[tuple[Show, list[EpisodeRow]]]) -> list[dict[str, Any]]:
    """The plays as entries of Trakt's history, the newest first."""
    found: list[dict[str, Any]] = []
    for show, episodes in history:
        ids = {name: each for name, each in zip(("tmdb", "tvdb", "imdb"), show.ids, strict=True) if each}
        of = {"title": show.title, "year": show.year, "ids": ids}
        for season, episode, title, plays in episodes:
            what = {"type": MOVIE, MOVIE: of} if show.type == MOVIE else {"type": SHOW, "show": of, SHOW: {
                "season": season, "number": episode, "title": title, "ids": {}}}
            found += [{"watched_at": f"{iso_time(at or 0)}"[:-1] + ".000Z", "action": "watch", **what} for at in plays]
    return sorted(found, key=lambda entry: str(entry["watched_at"]), reverse=True)

# --- the world
# -- The database: Tracker
APPLICATION_ID, SCHEMA_VERSION = 0x5342547A, 2      # in the file's head: tell it from other files, and newer versions
SCHEMA = (      # times are Unix seconds
    # A show (type "episode") or a movie.  normal: see parse_title().  year: the first.  NULL: not known.
    """CREATE TABLE show (id INTEGER PRIMARY KEY, type TEXT NOT NULL, title TEXT NOT NULL, normal TEXT NOT NULL,
        year INTEGER, tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT,
        UNIQUE (type, tmdb_id), UNIQUE (type, tvdb_id), UNIQUE (type, imdb_id))""",
    "CREATE INDEX show_normal ON show (normal, type)",
    # A movie has one, 0x0.  unmarked_at: when a person unmarked it: library, history, import mark only what is later.
    """CREATE TABLE episode (show_id INTEGER NOT NULL REFERENCES show, season INTEGER NOT NULL, episode INTEGER NOT
        NULL, title TEXT NOT NULL, unmarked_at INTEGER, PRIMARY KEY (show_id, season, episode)) WITHOUT ROWID""",
    # Each viewing.  show_id: 0: ignored, see remap().  at: NULL: unknown.  source: see WEBHOOK.  entry_id: its entry.
    """CREATE TABLE play (id INTEGER PRIMARY KEY, show_id INTEGER NOT NULL, season INTEGER NOT NULL,
        episode INTEGER NOT NULL, at INTEGER, source TEXT NOT NULL, mapping_id INTEGER, entry_id INTEGER)""",
    "CREATE INDEX play_episode ON play (show_id, season, episode, at)", "CREATE INDEX play_show ON play (show_id, at)",
    "CREATE INDEX play_mapping ON play (mapping_id) WHERE mapping_id IS NOT NULL",
    """CREATE VIEW watched AS SELECT show_id, season, episode, min(at) AS watched_at, max(at) AS last_at,
        count(*) AS plays FROM play GROUP BY show_id, season, episode""",
    # Which of our shows a server's show is: see mapping().  subject: of Entry, or set_aside().  show_id: NULL: ignored.
    """CREATE TABLE mapping (id INTEGER PRIMARY KEY, server TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
        guid TEXT NOT NULL, title TEXT NOT NULL, show_id INTEGER REFERENCES show, by TEXT NOT NULL,
        confidence REAL NOT NULL, at INTEGER, UNIQUE (server, type, subject))""",
    "CREATE INDEX mapping_show ON mapping (show_id)", "CREATE INDEX mapping_guid ON mapping (guid) WHERE guid LIKE 'plex://%'",
    # A question; else as mapping and show.  candidates: [[show_id, score], ...].  resolution: a show's id, or "ignore".
    """CREATE TABLE conflict (id INTEGER PRIMARY KEY, created_at REAL NOT NULL, kind TEXT NOT NULL,
        server TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL, guid TEXT NOT NULL, title TEXT NOT NULL,
        year INTEGER, tmdb_id INTEGER, tvdb_id INTEGER, imdb_id TEXT, candidates TEXT NOT NULL, resolution TEXT)""",
    "CREATE UNIQUE INDEX conflict_open ON conflict (server, type, subject) WHERE resolution IS NULL",
    "CREATE VIEW open_conflict AS SELECT * FROM conflict WHERE resolution IS NULL",
    # The journal: see Entry and Outcome.  status: NULL: not begun.  retry_at: when to finish or retry; NULL: finished.
    """CREATE TABLE webhook_log (id INTEGER PRIMARY KEY, received_at REAL NOT NULL, event TEXT NOT NULL,
        server TEXT NOT NULL, account_id TEXT NOT NULL, account TEXT NOT NULL,
        type TEXT, rating_key TEXT, guid TEXT, title TEXT, show_title TEXT, season INTEGER, episode INTEGER,
        year INTEGER, show_key TEXT, show_guid TEXT, guids TEXT, status TEXT, action TEXT, reason TEXT,
        show_id INTEGER, conflict_id INTEGER, attempts INTEGER NOT NULL DEFAULT 0, retry_at REAL)""",
    "CREATE INDEX webhook_log_due ON webhook_log (retry_at) WHERE retry_at IS NOT NULL",
    "CREATE INDEX webhook_log_play ON webhook_log (rating_key, received_at) WHERE rating_key IS NOT NULL",
    "CREATE INDEX webhook_log_old ON webhook_log (received_at) WHERE retry_at IS NULL AND status <> 'failed'",
    "CREATE INDEX webhook_log_conflict ON webhook_log (conflict_id) WHERE conflict_id IS NOT NULL",
    "CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",     # how far a reading has come
    f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {SCHEMA_VERSION}")
# form -> what carries a file to the next.  Form 1 kept an episode's first date and count; the journal knows more dates.
MIGRATIONS = {1: (
    "UPDATE show SET normal = normal_title(title)", "DROP TABLE IF EXISTS trigram", "DROP TABLE IF EXISTS found",
    "DROP INDEX mapping_show", "ALTER TABLE episode RENAME TO episode_1", "ALTER TABLE mapping RENAME TO mapping_1",
    *(each for each in SCHEMA if re.search("(TABLE|INDEX|VIEW) (?!show|conflict|webhook_log|note)", each)),
    "INSERT INTO episode SELECT show_id, season, episode, title, NULL FROM episode_1",
    "INSERT INTO mapping SELECT NULL, server, type, subject, guid, '', show_id, iif(EXISTS (SELECT 1 FROM conflict c "
    "WHERE (c.server, c.type, c.subject) = (m.server, m.type, m.subject) AND resolution IS NOT NULL), 'person', "
    "'earlier'), confidence, NULL FROM mapping_1 m",
    """INSERT INTO play SELECT NULL, l.show_id, season, episode, CAST(received_at AS INTEGER),
        iif(event = 'history', 'history', 'webhook'), m.id, l.id FROM webhook_log l JOIN episode_1 USING (show_id,
        season, episode) LEFT JOIN mapping m ON (m.server, m.type, m.subject) = (l.server, l.type, 'key:' ||
        iif(l.type = 'movie', rating_key, show_key)) WHERE status = 'success' AND plays > 0""",
    """INSERT INTO play SELECT NULL, *, 'import', NULL, NULL FROM (SELECT show_id, season, episode, watched_at FROM
        episode_1 WHERE watched_at NOT NULL EXCEPT SELECT show_id, season, episode, at FROM play)""",
    f"""INSERT INTO play WITH RECURSIVE rest AS (SELECT e.show_id, e.season, e.episode, min(e.plays, {MAX_PLAYS}) -
        coalesce(w.plays, 0) AS lack FROM episode_1 e LEFT JOIN watched w USING (show_id, season, episode) WHERE
        lack > 0 UNION ALL SELECT show_id, season, episode, lack - 1 FROM rest WHERE lack > 1)
        SELECT NULL, show_id, season, episode, NULL, 'import', NULL, NULL FROM rest""",
    "DROP TABLE episode_1", "DROP TABLE mapping_1", "PRAGMA user_version = 2")}
# How long to wait for another process that writes: its transactions take milliseconds, as does a BATCH of entries read
# at once.  A webhook may wait so twice, and is answered in 5 s.  After a fault the file is opened again each REOPEN_S.
# No clock drifts by CLOCK_JUMP_S in a month; one CLOCK_WRONG_S from the server's is wrong: a Pi boots without the time.
DATABASE_S, BATCH, REOPEN_S, CLOCK_JUMP_S, CLOCK_WRONG_S = 2.0, 200, 1.0, 60, 3600
SOME = "show_id = ? AND season = ifnull(?, season) AND episode = ifnull(?, episode)"      # None: all of them
# Whether a mapping's key is its show's still.  If guid (or without one, title) differs, the library was built anew.
STILL = "(guid = nullif(:guid, '') OR '' IN (guid, :guid) AND (title = :title OR '' IN (title, :title)))"
DUPLICATE_S = 300.0           # two scrobbles of an item within it are one; as in the contract
# What Python raises at values of a damaged file (sqlite3: UnicodeDecodeError even while it words its own error).
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)

class Tracker:
    """The watch tracker's database.  All methods raise TrackerError; those that write must be within transaction()."""
    # One connection for all threads: SQLite opens a replaced log (-wal) anew only if no other has the old one open.

    def __init__(self, path: str, create: bool = False, write: bool = True, patient: bool = False):
        """Open the file; raises ConfigError if that is no tracker.  write: False: nobody who writes is waited for."""
        # patient: a damaged, locked or full file is no error now; each use tries to open it.
        import sqlite3  # here: the daemon without -tracker-db does not pay for it
        self.path, self.may_write, self.patient = os.path.realpath(path), write, patient
        self.lock, self.sqlite3 = threading.RLock(), sqlite3
        self.connection: Any = None
        self.files: tuple[int, ...] = ()              # inodes of the file, -wal and -shm; (): it was never open
        self.sizes = [0, 0, 0]                        # their bytes, at most; SQLite may have mapped the -shm
        self.fault, self.retry_at = "", 0.0           # why it must be opened anew ("": it need not); monotonic s
        self.plex: PlexServer | None = None           # whose clock is right if ours is far from it
        try:
            # O_EXCL and O_PATH: to open the file for reading and close it would drop the locks that SQLite has on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600) if create else os.open(path, os.O_PATH))
        except OSError as error:
            hint = "create its folder, writable by you" if create else "the daemon and `tracker import` create it"
            raise ConfigError(f"-tracker-db: {shown_path(path)} cannot be opened ({why(error)}); {hint}.") from error
        if file_version(path) is None:
            raise ConfigError(f"-tracker-db: {path} is not a regular file; name one.")
        with contextlib.suppress(*(TrackerError,) if patient else ()), self.faults():
            self.open()

    def inodes(self) -> tuple[int, ...]:
        """The inodes of the database, its log (-wal) and the log's index (-shm); 0: it is missing, or was cut short."""
        found = [file_version(self.path + end) or (0, 0) for end in ("", "-wal", "-shm")]
        with contextlib.suppress(OSError):
            # A mapped page behind the end of its file ends the process (SIGBUS).  SQLite makes an empty index anew.
            for size in (0, self.sizes[2]) if found[2][1] < self.sizes[2] else ():
                os.truncate(self.path + "-shm", size)
        known = [inode if size >= most else 0 for (inode, size, *_), most in zip(found, self.sizes, strict=True)]
        self.sizes = [max(size, most) for (_, size, *_), most in zip(found, self.sizes, strict=True)]
        return (*known[:2], found[2][0])

    def open(self) -> None:
        """Open the file, anew if it was open; raises ConfigError if it is not one of our trackers."""
        self.leave()
        if not os.path.getsize(self.path) and (file_version(self.path + "-wal") or (0, 0))[1]:
            raise self.sqlite3.DatabaseError("it is empty, but its -wal is not")      # SQLite would delete the log
        path = f"file:{urllib.parse.quote(os.fsencode(self.path))}?mode=rw"  # SQLite must not make a deleted one anew
        connection = self.connection = self.sqlite3.connect(path, uri=True, isolation_level=None, timeout=DATABASE_S,
                                                            check_same_thread=False)
        connection.row_factory = self.sqlite3.Row
        connection.create_function("has_words", 2, lambda title, words: all(      # words: as of normal()
            word in text(title).casefold() for word in words.split()))
        connection.create_function("normal_title", 1, lambda title: parse_title(text(title)).normal)
        for function in (similarity, named, local_time):
            connection.create_function(function.__name__, 2, function)
        connection.execute("PRAGMA cache_size = -1000")
        connection.execute("BEGIN IMMEDIATE" if self.may_write else "BEGIN")
        ours, version, tables = (connection.execute(query).fetchone()[0] for query in (
            "PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema"))
        if self.may_write and not (ours or tables or self.files):
            for statement in SCHEMA:
                connection.execute(statement)
            self.take_note("history", int(self.now()))
        elif ours != APPLICATION_ID:
            if self.was_ours():
                raise ValueError("its head is another file's")
            raise ConfigError(f"-tracker-db: {self.path} is a database of another program; name another file.")
        elif version > SCHEMA_VERSION:
            raise ConfigError(f"-tracker-db: {self.path} was made by a newer version of StreamerBrainz "
                              f"(form {version}; this one knows form {SCHEMA_VERSION}); update streamerbrainz.py.")
        connection.execute("COMMIT")
        if ours and version < SCHEMA_VERSION:
            self.carry_over(version)
        connection.execute("PRAGMA journal_mode = WAL")
        last, = connection.execute("SELECT coalesce(max(id), 0) FROM webhook_log").fetchone()       # this makes the log
        if not self.files:                            # entries after this one were received by this clock
            self.since, self.ahead_s = last, self.clock_ahead_s()
        self.files, self.fault = self.inodes(), ""

    def carry_over(self, version: int) -> None:
        """Bring a file of an earlier form to ours, in one transaction, after a copy beside it."""
        copy = f"{self.path}.form{version}"
        if not os.path.exists(copy):
            self.backup(copy)
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")          # another process may have done it meanwhile
            for form in range(self.connection.execute("PRAGMA user_version").fetchone()[0], SCHEMA_VERSION):
                for statement in MIGRATIONS[form]:
                    self.connection.execute(statement)
        say(logging.INFO, f"the tracker was brought to form {SCHEMA_VERSION}; what it was is in {copy}")

    def backup(self, path: str) -> None:
        """Copy the database as it is now, whoever writes; raises ConfigError if that cannot be written."""
        try:
            os.close(os.open(path + ".new", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            with contextlib.closing(self.sqlite3.connect(path + ".new")) as copy:
                self.connection.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            os.rename(path + ".new", path)
        except OSError as error:
            raise ConfigError(f"{shown_path(path)} cannot be written ({why(error)}); name another file.") from error
        except self.sqlite3.OperationalError as error:
            os.unlink(path + ".new")
            raise TrackerError(f"{path} cannot be made ({why(error)}); check that its disk has space.") from error

    def leave(self) -> None:
        """Close a connection that is no good; raises TrackerError if that would lose what was acknowledged."""
        # A log that was deleted exists only as long as this connection: what is in it comes into the database first
        # (also into one that was moved away).  What lies in its place is foreign, but SQLite would believe it: it goes.
        now = self.inodes()
        if self.connection and self.files not in ((), now):
            with contextlib.suppress(self.sqlite3.DatabaseError):
                if self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    raise TrackerError(f"{self.path}: its log was deleted while another program reads it; end that.")
                if now[0] == self.files[0]:
                    self.connection.execute("PRAGMA journal_mode = DELETE")
            say(logging.WARNING, f"{self.path} or its -wal was deleted or replaced; it is opened again")
            self.files = now
        self.close()
        self.sizes = [0, 0, 0]
        if self.files and not now[0]:
            raise TrackerError(f"{self.path} was deleted; put it back, or restart StreamerBrainz.")

    def was_ours(self) -> bool:
        """Whether a file that is no database now was one of our trackers; zeros are what a power cut leaves."""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            return re.search(rb"webhook_log|media\.[ps]|plex://|\A\0+\Z", file.read(2**20)) is not None
        return True

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """What SQLite says as a TrackerError: of a damaged file it says anything, even that a table is missing."""
        try:
            yield
        except (self.sqlite3.Error, *DAMAGE) as error:
            name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
            if name == "SQLITE_NOTADB" and not (self.files or self.fault or self.was_ours() or self.inodes()[1]):
                raise ConfigError(f"-tracker-db: {self.path} is not a database; name another file.") from error
            damaged = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR"))
            advice = " is damaged ({}): stop StreamerBrainz, move a backup there, delete -wal and -shm." if damaged \
                else ": {}; check that it can be written, and that the disk has space."
            sentence = f"{self.path}{advice.format(why(error))}"
            self.fault = self.fault if self.files and name.startswith(("SQLITE_BUSY", "SQLITE_FULL")) else sentence
            raise TrackerError(sentence) from error

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Have the connection alone, opened anew if there was a fault or the file was deleted or replaced."""
        with self.lock, self.faults():
            # What is broken waits REOPEN_S.  What was replaced does not: only we may still have its acknowledged rows.
            if self.fault and time.monotonic() < self.retry_at:
                raise TrackerError(self.fault)
            if self.fault or (not self.connection.in_transaction and self.inodes() != self.files):
                self.retry_at, self.fault = time.monotonic() + REOPEN_S, self.fault or f"{self.path} was replaced"
                try:
                    self.open()
                except ConfigError as error:
                    raise TrackerError(str(error)) from error
            yield

    def turn(self) -> contextlib.ExitStack:
        """Have the connection alone soon, or raise TrackerError: somebody waits for an answer."""
        if not self.lock.acquire(timeout=DATABASE_S):
            raise TrackerError(f"{self.path} is busy; try again later.")
        held = contextlib.ExitStack()
        held.callback(self.lock.release)
        return held

    @contextlib.contextmanager
    def transaction(self, lasting: bool = True) -> Iterator[None]:
        """Commit all that is written within it, or nothing.  lasting: wait for the disk; else the next such does so."""
        with self.guarded():
            self.connection.execute(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
            self.connection.execute("BEGIN IMMEDIATE")
            with self.connection:                     # COMMIT, or after any exception ROLLBACK
                ahead_s = self.set_clock()
                yield
            self.ahead_s = ahead_s
            if self.inodes() != self.files:           # SQLite itself would go on to write into such a file
                raise TrackerError(f"{self.path} or its -wal was deleted or replaced meanwhile; try again.")

    def clock_ahead_s(self) -> float:
        """Unix time minus boot_s(), by our clock, or by the server's if ours is wrong: it changes if that is set."""
        ours, theirs = time.time() - boot_s(), self.plex.ahead_s if self.plex else None
        return ours if theirs is None or abs(theirs - ours) <= CLOCK_WRONG_S else theirs

    def now(self) -> float:
        """Unix time, as well as it is known."""
        return self.clock_ahead_s() + boot_s()

    def set_clock(self) -> float:
        """If the clock was set: correct the times that it gave to this process before; -> clock_ahead_s()."""
        # Else a play has two times, its webhook's and the history's, and would count twice.  The history's are right.
        ahead_s = self.clock_ahead_s()
        # Only the daemon does so: another process does not know which entries are older than a jump.
        if self.patient and abs(jump_s := round(ahead_s - self.ahead_s)) >= CLOCK_JUMP_S:
            # What has the server's time, or would lie ahead, was right before (see Journal.append).
            jump = jump_s, self.since, jump_s, self.now() + CLOCK_JUMP_S
            self.write("UPDATE play SET at = at + ? WHERE entry_id > ? AND source = 'webhook' AND at + ? <= ?", *jump)
            self.write("UPDATE webhook_log SET received_at = received_at + ? WHERE id > ? AND event NOT IN "
                       "('history', 'library') AND received_at + ? <= ?", *jump)
            self.write("UPDATE webhook_log SET retry_at = retry_at + ? WHERE id > ? AND retry_at > 0", *jump[:2])
        return ahead_s

    def all(self, query: str, *values: object, **named: object) -> list[Any]:
        """The rows of a query, each a sqlite3.Row.  Its values stand for ?, or by name for :name."""
        with self.guarded():
            return list(self.connection.execute(query, named or values))

    def one(self, query: str, *values: object, **named: object) -> Any:
        """The first row of a query; None: there is none."""
        return next(iter(self.all(query, *values, **named)), None)

    def write(self, statement: str, *values: object) -> Any:
        """Run a statement; returns its cursor."""
        return self.connection.execute(statement, values)

    def insert(self, table: str, **row: object) -> int:
        """Add a row to a table; returns its id."""
        marks = ", ".join("?" * len(row))
        return int(self.write(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", *row.values()).lastrowid)

    def close(self) -> None:
        """Close the file; raises nothing."""
        with contextlib.suppress(AttributeError, self.sqlite3.Error):
            self.connection.close()

    def note(self, name: str) -> int:
        """How far something came; 0: it has not begun."""
        return int(self.one("SELECT coalesce(max(value), 0) FROM note WHERE name = ?", name)[0])

    def take_note(self, name: str, value: int) -> None:
        """Remember how far something came."""
        self.write("INSERT OR REPLACE INTO note VALUES (?, ?)", name, str(value))

    # -- the journal
    def add_entry(self, entry: Entry, outcome: Outcome | None) -> None:
        """Add an entry; outcome None: the worker is to finish it.  Of the many but media.scrobble, a short row."""
        kept = ("received_at", "event", "server", "account_id", "account", "type", "title") \
            if outcome and outcome.action == "event_not_scrobble" else Entry._fields[:-2]      # not id, attempts
        ends = dict(zip(("status", "action", "reason"), outcome, strict=False)) if outcome else {"retry_at": 0.0}
        self.insert("webhook_log", **{name: getattr(entry, name) for name in kept}, **ends)

    def entries(self, condition: str, *values: object) -> list[Entry]:
        """The entries that fulfil a condition."""
        rows = self.all(f"SELECT {', '.join(Entry._fields)} FROM webhook_log WHERE {condition}", *values)
        return [Entry(*row) for row in rows]

    def is_duplicate(self, entry: Entry) -> bool:
        """Whether the same account finished the same item (live TV: without key) within DUPLICATE_S, with success."""
        same = ("rating_key", "guid", "title", "show_title", "season", "episode", "server", "account", "account_id")
        return self.one(f"SELECT 1 FROM webhook_log WHERE {' AND '.join(f'{name} IS :{name}' for name in same)} AND "
                        "received_at BETWEEN :received_at - :within_s AND :received_at + :within_s AND "
                        "status = 'success' AND id <> :id", **entry._asdict(), within_s=DUPLICATE_S) is not None

    # -- shows
    def shows(self, condition: str, *values: object, table: str = "show") -> list[Show]:
        """The shows and movies that fulfil a condition.  The table may be conflict, too: it has the same columns."""
        return [Show(row["type"], row["title"], row["year"], Ids(*row[3:6]), row["id"]) for row in self.all(
            f"SELECT type, title, year, tmdb_id, tvdb_id, imdb_id, id FROM {table} WHERE {condition}", *values)]

    def doubt(self, score: float, *show_ids: int) -> Conflict:
        """A Conflict: it may be one of these shows, or another."""
        known = [show for show_id in dict.fromkeys(show_ids) for show in self.shows("id = ?", show_id)]
        return Conflict("ambiguous", tuple(Candidate(show, score, 0) for show in known))

    def match_ids(self, show: Show) -> Match | Conflict | None:
        """The show that has one of these ids.  One that contradicts a more certain id is not meant."""
        # One that contradicts a less certain id is a question: Plex may have two shows with one id at TMDB.
        doubts: list[int] = []
        for i, (column, confidence) in enumerate(CONFIDENCE.items()):
            for known in self.shows(f"type = ? AND {column} = ?", show.type, show.ids[i]) if show.ids[i] else ():
                if not known.ids.contradicts(show.ids):
                    return Match(known.id, column, confidence)
                doubts += [known.id] * (not known.ids.contradicts(show.ids[:i]))
        return self.doubt(1.0, *doubts) if doubts else None

    def match_title(self, show: Show) -> Match | Conflict:
        """The show that is meant by title and year."""
        # Only shows without mapping and known ids come here: the look at every title takes 10 ms for 1,000 shows.
        alike = self.shows("""id IN (SELECT id FROM (SELECT id, similarity(normal, ?) AS s FROM show WHERE type = ?)
            WHERE s >= ? ORDER BY s DESC LIMIT 50)""", parse_title(show.title).normal, show.type, MIN_SIMILARITY)
        # A title that all its episodes have is none.
        return choose_show(show, [each._replace(episode_title=title if titles > 1 else "", seasons=seasons)
                                  for each in alike for title, titles, seasons in self.all(
            "SELECT max(iif(season = ? AND episode = ?, title, '')), count(DISTINCT title), coalesce(max(season), 0) "
            "FROM episode WHERE show_id = ?", show.season, show.episode, each.id)])

    def mapping(self, entry: Entry) -> Any:
        """The row of the mapping of an entry's show: by its key, else by Plex's guid, on any server; None: none."""
        return self.one(f"""SELECT *, (server, subject) = (:server, :subject) AS own FROM mapping WHERE type = :type AND
            (own AND {STILL} OR :guid LIKE 'plex://%' AND guid = :guid) ORDER BY own DESC, by = 'person' DESC, at DESC
            """, server=entry.server, type=entry.type, subject=entry.subject, guid=entry.guid_of_show, title=entry.name)

    def set_aside(self, server: str, type: str, subject: str, guid: str, title: str) -> None:
        """Before a mapping is made: keep that of the show whose key it was, under a subject that no entry has."""
        self.all(f"UPDATE mapping SET subject = subject || ' ' || id WHERE (server, type, subject) = (:server, :type, "
                 f":subject) AND {STILL} IS NOT 1", server=server, type=type, subject=subject, guid=guid, title=title)

    def known(self, entry: Entry, show: Show) -> Match | Conflict | None:
        """Which show an entry's show was found to be before, or is by its ids; a Conflict where these disagree."""
        # What only a title said is checked each time; once it is doubted, it counts no more until a person answers.
        row, found = self.mapping(entry), self.match_ids(show)
        if row and (row["by"] not in GUESSED or row["show_id"] is None):
            return Match(row["show_id"] or 0, "mapping", row["confidence"])
        if row is None or isinstance(found, Conflict) or (found and found.show_id == row["show_id"]):
            return found
        match = Match(row["show_id"], "mapping", row["confidence"])
        is_asked = self.one("SELECT 1 FROM open_conflict WHERE (server, type, subject) = (?, ?, ?) "
                            "AND created_at >= ?", entry.server, entry.type, entry.subject, (row["at"] or 0) + 1)
        doubted = found or is_asked or disagree(show, *self.shows("id = ?", match.show_id))
        return self.doubt(match.confidence, found.show_id if found else 0, match.show_id) if doubted else match

    def is_another(self, entry: Entry, show_id: int) -> bool:
        """Whether the server has this show already, under another guid of Plex's: each show has only one."""
        return entry.guid_of_show.startswith("plex://") and self.one("""SELECT 1 FROM mapping WHERE show_id = ? AND
            server = ? AND guid LIKE 'plex://%' AND guid <> ?""", show_id, entry.server, entry.guid_of_show) is not None

    def map(self, entry: Entry, match: Match) -> None:
        """Remember which show an entry's show is."""
        self.set_aside(entry.server, entry.type, entry.subject, entry.guid_of_show, entry.name)
        self.write("INSERT INTO mapping VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                   "guid = excluded.guid, title = excluded.title, show_id = excluded.show_id, by = excluded.by, "
                   "confidence = excluded.confidence, at = excluded.at", entry.server, entry.type, entry.subject,
                   entry.guid_of_show, entry.name, match.show_id or None, match.by, match.confidence, int(self.now()))

    def add_show(self, show: Show) -> int:
        """Add a show; returns its id.  A year that may be a season's is left out."""
        show_id = self.insert("show", type=show.type, title=show.title, normal=parse_title(show.title).normal,
                              year=show.year if show.own_year else None)
        self.learn_ids(show_id, show.ids)
        self.add_episodes(show_id, [(0, 0, "")] * (show.type == MOVIE))
        return show_id

    def learn_ids(self, show_id: int, ids: Ids) -> None:
        """Fill in the ids that a show does not have, and that no other show has; none if one contradicts."""
        contradicted = any(known.ids.contradicts(ids) for known in self.shows("id = ?", show_id))
        for column, value in () if contradicted else ids._asdict().items():
            self.write(f"UPDATE OR IGNORE show SET {column} = ? WHERE id = ? AND {column} IS NULL", value, show_id)

    def add_episodes(self, show_id: int, episodes: Iterable[Sequence[object]]) -> None:
        """Add or complete episodes of a show, each by its season, number and title."""
        self.connection.executemany(f"INSERT INTO episode VALUES ({show_id}, ?, ?, ?, NULL) ON CONFLICT DO UPDATE SET "
                                    "title = ifnull(nullif(excluded.title, ''), title)", (row[:3] for row in episodes))

    def add_plays(self, show_id: int, row: EpisodeRow, source: str, mapping_id: int | None = None,
                  entry_id: int | None = None) -> int:
        """Add an episode, and those of its plays that are not known yet; -> how many plays were added."""
        place, told = (show_id, *row[:2]), row[3]
        self.add_episodes(show_id, [row])
        if not told:
            return 0
        unmarked, = self.one("SELECT unmarked_at FROM episode WHERE (show_id, season, episode) = (?, ?, ?)", *place)
        if unmarked is not None and source in (LIBRARY, HISTORY, IMPORT):
            told = tuple(at for at in told if at is not None and at > unmarked)
        known = self.all("SELECT at, source FROM play WHERE (show_id, season, episode) = (?, ?, ?)", *place)
        more, dates = new_plays([(at, by) for at, by in known], told, source)
        for date in dates:
            self.write("UPDATE play SET at = ?, source = ? WHERE id = (SELECT min(id) FROM play WHERE at IS NULL AND "
                       "(show_id, season, episode) = (?, ?, ?))", date, source, *place)
        for at in more:
            self.write("INSERT INTO play VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", *place, at, source, mapping_id, entry_id)
        return len(more)

    def episode(self, show_id: int, season: int | None, episode: int | None) -> Any:
        """The row of a show's episode, with its plays, counted (the view counts all there are); None: it has none."""
        return self.one("""SELECT *, (SELECT count(*) FROM play WHERE (show_id, season, episode) = (e.show_id, e.season,
            e.episode)) AS plays FROM episode e WHERE (show_id, season, episode) = (?,?,?)""", show_id, season, episode)

    # -- what a person corrects
    def mark(self, show_id: int, season: int | None, episode: int | None, at: int | None = None) -> int:
        """Mark what is not watched yet of a show or season; an episode at a time once more; -> how many plays."""
        some = self.all("SELECT season, episode, title FROM episode LEFT JOIN watched USING (show_id, season, episode) "
                        f"WHERE {SOME} AND (plays IS NULL OR ?)", show_id, season, episode, None not in (episode, at))
        now = int(self.now())
        when = at if at is not None else now if now > BUILT else None
        return sum(self.add_plays(show_id, (*row, (when,)), HAND) for row in some)

    def unmark(self, show_id: int, season: int | None, episode: int | None) -> int:
        """Take the marks of a show (a season, an episode; None: of all) back; -> how many plays that were."""
        self.write(f"UPDATE episode SET unmarked_at = ? WHERE {SOME}", int(self.now()), show_id, season, episode)
        return int(self.write(f"DELETE FROM play WHERE {SOME}", show_id, season, episode).rowcount)

    def remap(self, no: int, show_id: int) -> int:
        """Say which show is meant (0: ignore it): its plays move along, what was ignored is done anew; -> how many."""
        # If it is ignored, plays whose entry was pruned, or that an import told, are kept as those of show 0.
        # What one witness told of an episode moves at once, first those that may be undated: they match any play.
        plays = self.all("""SELECT play.id, at, play.season, play.episode, ifnull(e.title, ''), source, l.id FROM play
            LEFT JOIN episode e USING (show_id, season, episode) LEFT JOIN webhook_log l ON l.id = entry_id WHERE
            mapping_id = ? AND play.show_id <> ? ORDER BY 3, 4, source IN ('webhook', 'history'), 6, 7""", no, show_id)
        self.write("UPDATE mapping SET show_id = ?, by = 'person', confidence = 1.0, at = ? WHERE id = ?",
                   show_id or None, int(self.now()), no)
        self.write("""UPDATE webhook_log AS l SET retry_at = 0 FROM mapping m WHERE m.id = ? AND (l.server, l.type,
            action) = (m.server, m.type, 'auto_mark_disabled') AND (subject IN ('key:' || iif(m.type = 'movie',
            rating_key, show_key), 'guid:' || show_guid, 'title:' || iif(m.type = 'movie', l.title, show_title))
            OR m.guid LIKE 'plex://%' AND m.guid = iif(m.type = 'movie', l.guid, show_guid))""", no)
        for (*place, title, source, entry_id), rows in itertools.groupby(plays, key=lambda row: row[2:]):
            ids, told = zip(*(row[:2] for row in rows), strict=True)
            change = "UPDATE play SET show_id = 0" if not (show_id or entry_id) else "DELETE FROM play"
            self.connection.executemany(f"{change} WHERE id = ?", ((each,) for each in ids))
            if show_id:
                self.add_plays(show_id, (*place, title, told), source, no, entry_id)
            self.write("UPDATE webhook_log SET show_id = ?, status = ?, action = ? WHERE id = ?", show_id or None,
                       *((SUCCESS, "marked_watched") if show_id else (IGNORED, "auto_mark_disabled")), entry_id)
        return len(plays)

    # -- conflicts
    def add_conflict(self, entry: Entry, show: Show, conflict: Conflict) -> tuple[int, bool]:
        """The id of the open conflict about an entry's show, and whether it is new."""
        if known := self.one("SELECT id FROM open_conflict WHERE (server, type, subject) = (?, ?, ?)",
                             entry.server, entry.type, entry.subject):
            return known["id"], False
        candidates = json.dumps([[each.show.id, round(each.score, 2)] for each in conflict.candidates])
        return self.insert("conflict", created_at=self.now(), kind=conflict.kind, server=entry.server, type=entry.type,
                           subject=entry.subject, guid=entry.guid_of_show, title=show.title, candidates=candidates,
                           year=show.year if show.own_year else None, **show.ids._asdict()), True

    def resolve(self, no: int, show_id: int) -> int:
        """Close a conflict by the show that is meant (0: ignore it); -> how many plays of an earlier answer moved."""
        self.set_aside(*self.one("SELECT server, type, subject, guid, title FROM conflict WHERE id = ?", no))
        mapping_id, = self.one("""INSERT INTO mapping SELECT NULL, server, type, subject, guid, title, NULL, 'person',
            1, NULL FROM conflict WHERE id = ? ON CONFLICT DO UPDATE SET guid = excluded.guid RETURNING id""", no)
        moved = self.remap(mapping_id, show_id)
        for show in self.shows("id = ?", no, table="conflict") if show_id else ():
            self.learn_ids(show_id, show.ids)
        self.close_conflict(no, show_id)
        return moved

    def close_conflict(self, no: int, show_id: int) -> None:
        """Note the answer, and let the entries that wait be finished."""
        self.write("UPDATE conflict SET resolution = ? WHERE id = ?", str(show_id or "ignore"), no)
        self.write("UPDATE webhook_log SET retry_at = 0 WHERE conflict_id = ? AND action = 'conflict_created'", no)

def glance(tracker: Tracker, journal: Journal | None = None) -> Glance:
    """What the pages, /healthz and /metrics show of a tracker: one short reading, which raises nothing."""
    try:
        with tracker.turn(), tracker.guarded():
            marked = tracker.all("SELECT received_at, iif(type = 'movie', title, printf('%s S%02dE%02d', show_title, "
                                 "season, episode)) FROM webhook_log WHERE status = 'success' ORDER BY id DESC LIMIT 5")
            asked = tracker.all("SELECT id, title, year, kind FROM open_conflict ORDER BY id LIMIT 5")
            counts = tracker.all("SELECT coalesce(status, 'waiting'), count(*) FROM webhook_log GROUP BY 1")
            oldest, = tracker.one("SELECT min(received_at) FROM webhook_log WHERE retry_at NOT NULL AND status IS NULL")
            return Glance(tuple((time_of(at), text(name)) for at, name in marked), tuple(
                (no, named(text(title), year), text(kind)) for no, title, year, kind in asked), 0.0 if oldest is None
                else tracker.now() - oldest, dict(map(tuple, counts)), refused=bool(journal and journal.fault))
    except TrackerError as error:
        return Glance(broken=str(error))

# -- On the disk before the answer: Journal
def report_outcome(entry: Entry, outcome: Outcome, conflict_id: int | None = None) -> None:
    """Log what became of an entry.  conflict_id: of a new conflict."""
    # A failure that is tried again is a warning only once, and so is a conflict that several episodes wait for.
    level = {SUCCESS: logging.INFO, FAILED: logging.WARNING}.get(outcome.status, logging.DEBUG)
    said = entry.attempts > 0 if outcome.retry else outcome.action == "conflict_created" and conflict_id is None
    about = {"title": entry.name} if entry.type != EPISODE else \
        {"show": entry.name, "season": entry.season, "episode": entry.episode}
    match = {"by": outcome.match.by, "confidence": outcome.match.confidence} if outcome.match else {}
    say(logging.DEBUG if said else level, "webhook", status=outcome.status, action=outcome.action, **about, **match,
        **{key: value for key, value in (("reason", outcome.reason), ("conflict", conflict_id)) if value})

class Journal:
    """Entries that are on the disk before their webhooks are answered."""
    # The thread that comes first commits for all: a burst waits for the disk (10 to 50 ms on an SD card) a few times.

    def __init__(self, tracker: Tracker, accounts: str):
        self.tracker, self.accounts = tracker, accounts
        # Each an entry; its outcome (None: the worker decides); how the commit ended (empty: it has not).
        self.waiting: collections.deque[tuple[Entry, Outcome | None, list[TrackerError | None]]] = collections.deque()
        self.written = threading.Event()              # set when there is something for the worker
        self.fault: TrackerError | None = None        # of the last commit

    def append(self, webhook: Webhook) -> None:
        """Commit a webhook's entry to the disk; raises TrackerError: then it must not be answered 200."""
        at, viewed_at = self.tracker.now(), webhook.scrobble.viewed_at if webhook.scrobble else 0
        entry = entry_of(webhook, viewed_at if at < BUILT < viewed_at else at)
        outcome, result = first_outcome(webhook, entry, self.accounts), list[TrackerError | None]()
        self.waiting.append((entry, outcome, result))
        with self.tracker.turn():                     # if it does not come, the entry may be committed later
            if not result:                            # else another thread has committed it meanwhile
                self.commit()
        if error := result[0]:
            raise error
        if outcome and outcome.action != "event_not_scrobble":
            report_outcome(entry, outcome)

    def commit(self) -> None:
        """Write the entries of all that wait, in one transaction, and tell each waiting thread how it ended."""
        tickets = [self.waiting.popleft() for _ in range(len(self.waiting))]
        before, self.fault = self.fault, None
        try:
            with self.tracker.transaction():
                for entry, outcome, _ in tickets:
                    self.tracker.add_entry(entry, outcome)
            if before:
                say(logging.INFO, "the tracker can be written again")
        except TrackerError as error:
            self.fault = error
            say(logging.DEBUG if before else logging.ERROR,
                f"webhooks are refused (503), because the tracker cannot be written: {error}")
        for _, outcome, result in tickets:
            result.append(self.fault)
            if not (self.fault or outcome):
                self.written.set()

# -- Entries -> marks and conflicts: find_in_tmdb, Worker
def find_in_tmdb(token: str, type: str, column: str, value: object) -> int | None:
    """The TMDB id of a show or movie, by its id in another database; None: not found.  Raises PlexError."""
    url = os.environ.get("STREAMERBRAINZ_TMDB_URL", "https://api.themoviedb.org")       # the variable is for tests
    reply = exchange(f"{url}/3/find/{value}?external_source={column}", {"Authorization": f"Bearer {token}"},
                     context=tls_context(url))        # the token travels in a header only
    if reply.status != 200:
        hint = ": put a valid token into the -tmdb-token-file" if reply.status in (401, 403) else ""
        raise PlexError("refused" if hint else "unreachable", f"TMDB answers {reply.status}{hint}.")
    if not isinstance(answer := json_value(reply.body), dict):
        raise PlexError("nonsense", "TMDB did not answer in JSON.")
    found = answer.get("movie_results" if type == MOVIE else "tv_results")       # there are other kinds, too
    return number(json_object(found[0]).get("id")) if isinstance(found, list) and len(found) == 1 else None

# The history is read hourly, or a minute after the server was down, up to a minute ago: webhooks may still come.
HISTORY_S, HISTORY_RETRY_S, HISTORY_REST_S = 3600.0, 60.0, 60.0
MAX_TITLE = 200               # characters of an episode's title in a list of MAX_LISTED, which must fit into memory
TRACKER_RETRY_S = 30.0        # from a fault of the tracker (the disk is full) to the next try

class Asked(NamedTuple):
    """What the servers say about an entry's show."""
    show: Show
    match: Match | None = None    # the show in the tracker that TMDB means; None: it was not asked, or knows none
    episodes: Sequence[EpisodeRow] = ()   # those that our server has, if they may be needed, without plays

class Worker:
    """Finishes the journal's entries: finds the show, then marks what was watched, or makes a conflict."""
    # It asks the server and TMDB before a transaction, not within: answers to webhooks wait for its end.

    def __init__(self, config: Config, tracker: Tracker, plex: PlexServer | None):      # None: none can be asked
        self.config, self.tracker, self.plex = config, tracker, plex
        self.tmdb_token = SecretFile("-tmdb-token-file", path).first if (path := config.tmdb_token_file) else None
        self.down: PlexError | None = None            # why nobody is asked any more in this round: all would time out
        self.found: dict[tuple[str, str, object], int | None] = {}       # TMDB's answers
        self.tell: Callable[[Entry], object] | None = None      # what to call when something was marked as watched

    def run(self, written: threading.Event) -> None:
        """Work for ever: on what is due, and on plays without a webhook.  written: set when there is more to do."""
        history_at, pause_s, fails = 0.0, 0.0, False
        while True:
            written.wait(max(0.0, pause_s))
            written.clear()
            try:
                with self.tracker.faults():
                    if time.monotonic() >= history_at:
                        self.bound_times(self.tracker.now())
                        history_at = time.monotonic() + (HISTORY_S if self.recover() else HISTORY_RETRY_S)
                        self.prune()
                    self.drain()
                    due_s, = self.tracker.one("SELECT ifnull(min(retry_at), 1e12) - ? FROM webhook_log WHERE retry_at "
                                              "NOT NULL", self.tracker.now())
                    if fails:
                        say(logging.INFO, "the tracker works again")
                    pause_s, fails = min(history_at - time.monotonic(), due_s), False
            except Exception as error:                # a bug of ours ends neither the log nor the hooks
                known = isinstance(error, TrackerError) and not log.isEnabledFor(logging.DEBUG)
                say(logging.DEBUG if fails else logging.ERROR, f"the tracker cannot work for now: {why(error)}",
                    **{} if known else {"traceback": traceback.format_exc()})
                pause_s, fails = TRACKER_RETRY_S, True

    def bound_times(self, now: float) -> None:
        """Bring back what a clock that was ahead has put off for years, and what a person unmarked by a wrong clock."""
        with self.tracker.transaction(lasting=False):
            self.tracker.write("UPDATE webhook_log SET retry_at = ? WHERE retry_at > ?", *[now + ENTRY_RETRY_MAX_S] * 2)
            if now > BUILT:           # else it is this clock that is wrong
                self.tracker.take_note("history", min(self.tracker.note("history"), int(now)))
                self.tracker.write("UPDATE episode SET unmarked_at = ? WHERE unmarked_at NOT BETWEEN ? AND ?",
                                   int(now), BUILT, now)

    def drain(self, again: bool = False) -> int:
        """Finish all entries that are due (again: only those that a person's answer changes); -> how many."""
        count, self.down = 0, None
        while entries := self.tracker.entries("retry_at <= ? AND (NOT ? OR retry_at = 0 AND status NOT NULL) "
                                              "ORDER BY retry_at, id LIMIT ?", self.tracker.now(), again, BATCH):
            for entry in entries:
                self.finish(entry)
            count += len(entries)
        return count

    def finish(self, entry: Entry) -> None:
        """Find out what becomes of an entry, and write it down in one transaction."""
        # While servers are asked, another process may finish or resolve it, and the clock be set: it is read anew then.
        verdict: Match | Conflict | PlexError | None = None
        asked, conflict_id, new = Asked(entry.show), None, False
        try:
            asked = self.ask(entry)
        except PlexError as error:
            verdict, self.down = error, error if error.fault != "nonsense" else None     # that may be only this item
        with self.tracker.transaction(lasting=False):
            row = self.tracker.one("SELECT received_at, status NOT NULL AND retry_at IS NULL AND action NOT IN "
                                   "('conflict_created', 'episode_not_found') FROM webhook_log WHERE id = ?", entry.id)
            if row is None or row[1]:
                return
            entry = entry._replace(received_at=row[0])
            verdict = verdict or self.decide(entry, asked)
            outcome = self.conclude(entry, asked, verdict)
            if outcome.action == "conflict_created" and isinstance(verdict, Conflict):
                conflict_id, new = self.tracker.add_conflict(entry, asked.show, verdict)
            wait_s = retry_after_s(entry.attempts) if outcome.retry else None       # None + now is NULL: finished
            self.tracker.write("""UPDATE webhook_log SET status = ?, action = ?, reason = ?, show_id = nullif(?, 0),
                conflict_id = ?, retry_at = ? + ?, attempts = attempts + 1 WHERE id = ?""", *outcome[:3], outcome.match
                and outcome.match.show_id, conflict_id, wait_s, self.tracker.now(), entry.id)
        report_outcome(entry, outcome, conflict_id if new else None)
        if self.tell and outcome.status == SUCCESS and outcome.action != "already_watched":
            self.tell(entry)

    def ask(self, entry: Entry) -> Asked:
        """Ask the servers for what is needed to finish an entry; raises PlexError."""
        # Only: the server about a show that is not certain and about missing episodes; TMDB about ids that no show has.
        asked, row = Asked(entry.show), self.tracker.mapping(entry)
        if row and row["by"] in GUESSED:
            with contextlib.suppress(PlexError):      # what is known will do
                asked = Asked(self.ask_server(entry))
        elif not (row or self.tracker.match_ids(asked.show)):
            show = self.ask_server(entry)
            asked = Asked(show, None if self.tracker.match_ids(show) else self.ask_tmdb(show))
        verdict = self.decide(entry, asked)
        wanted = self.may_add(asked.show, verdict) if isinstance(verdict, Conflict) else \
            verdict.show_id and self.tracker.episode(verdict.show_id, entry.season, entry.episode) is None
        if not wanted:
            return asked
        leaves = self.library(entry, entry.show_key if entry.type == EPISODE else "", "/allLeaves")
        rows = filter(None, (episode_row(fields, 0.0) for fields in leaves))
        return asked._replace(episodes=[(*row[:2], row[2][:MAX_TITLE], ()) for row in rows])

    def decide(self, entry: Entry, asked: Asked) -> Match | Conflict:
        """Which of our shows an entry's show is, by what the servers say and what the database knows now."""
        verdict = self.tracker.known(entry, asked.show) or asked.match or self.tracker.match_title(asked.show)
        if isinstance(verdict, Match) and verdict.by == "title":
            if self.tracker.is_another(entry, verdict.show_id):
                return self.tracker.doubt(TAKEN_ABOVE, verdict.show_id)
            if self.tracker.episode(verdict.show_id, entry.season, entry.episode) is None:
                return self.tracker.doubt(verdict.confidence, verdict.show_id)._replace(lacks=True)
        return verdict

    def conclude(self, entry: Entry, asked: Asked, verdict: Match | Conflict | PlexError) -> Outcome:
        """Mark, add or leave alone what an entry tells of; within the transaction that finishes it."""
        if self.tracker.is_duplicate(entry):
            return Outcome(DUPLICATE, "ignored_duplicate", "the same account finished the same item "
                           f"within {DUPLICATE_S:.0f} s of this", verdict if isinstance(verdict, Match) else None)
        if isinstance(verdict, Match):
            return self.mark(entry, asked, verdict)
        if isinstance(verdict, PlexError):
            return Outcome(FAILED, "plex_unreachable", str(verdict), retry=True)
        if not self.may_add(asked.show, verdict):
            return Outcome(FAILED, "conflict_created", conflict_reason(asked.show, verdict))
        outcome = self.mark(entry, asked, Match(self.tracker.add_show(asked.show), "new", 1.0))
        return outcome._replace(action="auto_added_show") if outcome.action == "marked_watched" else outcome

    def mark(self, entry: Entry, asked: Asked, match: Match) -> Outcome:
        """Remember which show is meant, add the episodes that it does not have yet, and mark the entry's."""
        if not match.show_id:
            return Outcome(IGNORED, "auto_mark_disabled", "a person chose to ignore this show")
        if match.by in CONFIDENCE:
            self.tracker.learn_ids(match.show_id, asked.show.ids)
        if match.by != "mapping" and (match.by not in GUESSED or self.config.auto_mark_watched):
            self.tracker.map(entry, match)
        mapping = self.tracker.mapping(entry)
        is_certain = mapping and mapping["by"] not in GUESSED     # then Plex vouches that it has this episode
        own = (entry.season or 0, entry.episode or 0, entry.title[:MAX_TITLE] if entry.type == EPISODE else "")
        self.tracker.add_episodes(match.show_id, [*asked.episodes, *[own] * bool(is_certain)])
        row = self.tracker.episode(match.show_id, entry.season, entry.episode)
        if row is None:
            return Outcome(FAILED, "episode_not_found", "the show has no such episode, here or on the server; "
                           "`tracker import` tries again", match)
        if not self.config.auto_mark_watched:
            return Outcome(IGNORED, "auto_mark_disabled", "-no-auto-mark-watched is given", match)
        source = entry.event if entry.event in FOUND else WEBHOOK
        added = self.tracker.add_plays(match.show_id, (*row[1:4], (int(entry.received_at),)), source,
                                       mapping and mapping["id"], entry.id)
        if not added and not row["plays"]:
            return Outcome(IGNORED, "auto_mark_disabled", "a person took this mark back later", match)
        if row["plays"] and not (added and source == LIBRARY):
            return Outcome(SUCCESS, "already_watched", "the first date stays", match)
        return Outcome(SUCCESS, FOUND.get(source, "marked_watched"), "", match)

    def may_add(self, show: Show, conflict: Conflict) -> bool:
        """Whether a show that is missing in the tracker is certain enough to be added."""
        alike = any(each.score > TAKEN_ABOVE for each in conflict.candidates)
        return self.config.auto_add_shows and any(show.ids) and not alike

    # -- what the servers know
    def ask_server(self, entry: Entry) -> Show:
        """An entry's show, with what our server says about it; raises PlexError."""
        show = entry.show
        for fields in self.library(entry, entry.key, "?includeGuids=1"):
            guid = text(fields.get("guid")).partition("?")[0]
            if "" in (guid, entry.guid_of_show) or guid == entry.guid_of_show:
                ids, year = parse_ids((*item_guids(fields), guid, entry.guid_of_show)), number(fields.get("year"))
                return show._replace(title=text(fields.get("title")) or show.title, year=year or show.year, ids=ids,
                                     own_year=year is not None or show.own_year)
        return show

    def library(self, entry: Entry, key: str, path: str) -> Iterator[Mapping[str, Any]]:
        """What our server's library has about a rating key; nothing for an entry of another server: its keys differ."""
        if self.down:
            raise self.down
        try:
            if self.plex and key and entry.server in ("", self.plex.server_id):
                yield from self.plex.items(f"/library/metadata/{urllib.parse.quote(key, '')}{path}")
        except PlexError as error:
            if error.fault != "missing":
                raise

    def ask_tmdb(self, show: Show) -> Match | None:
        """The show in the tracker that TMDB says has one of these ids; raises PlexError."""
        token = self.tmdb_token() if self.tmdb_token and show.ids.tmdb_id is None else ""
        for column in ("imdb_id",) if show.type == MOVIE else ("tvdb_id", "imdb_id"):   # it knows no movie of TheTVDB
            asked = show.type, column, getattr(show.ids, column)
            if token and asked[-1]:
                self.found[asked] = self.found.get(asked) or find_in_tmdb(token, *asked)
                for known in self.tracker.shows("type = ? AND tmdb_id = ?", show.type, self.found[asked]):
                    return Match(known.id, column, CONFIDENCE[column])
        return None

    # -- plays without a webhook
    def recover(self) -> bool:
        """Put plays of the server's history, and marks, into the journal if no webhook told; -> whether it answered."""
        if not self.plex:
            return True
        try:
            server, accounts = self.plex.server_id, self.accounts(self.plex)
            since, until = self.tracker.note("history"), int(self.tracker.now() - HISTORY_REST_S)
            if until < BUILT:                         # the server does not know what time it is either
                return False
            since = since if since >= BUILT else until        # the file was made by a clock that was wrong
            for page in self.plex.pages(f"/status/sessions/history/all?sort=viewedAt:asc&viewedAt%3E={since}"):
                plays = [play_entry(fields, server) for fields in page.items]
                with self.tracker.transaction(lasting=False):         # with its entries, how far the history was read
                    for play, fields in zip(plays, page.items, strict=True):
                        counts = play.rating_key and (accounts is None or play.account_id in accounts)
                        if counts and since <= play.received_at <= until and self.is_new(play, fields):
                            self.tracker.add_entry(play, None)
                    times = [int(play.received_at) for play in plays if play.received_at <= until]
                    self.tracker.take_note("history", max([since, *times]))
            if accounts is None or "1" in accounts:   # a library tells only what its owner watched
                self.read_marks(self.plex, server, until)
        except PlexError as error:
            say(logging.DEBUG, f"the server's history was not read: {error}")
            return error.fault not in ("unreachable", "starting")
        return True

    def read_marks(self, plex: PlexServer, server: str, until: int) -> None:
        """Put what was marked by hand in Plex since the last reading into the journal; raises PlexError."""
        # Neither a webhook nor the history tells of it.  The first reading only notes how far it came.
        for section in plex.items("/library/sections"):
            key, kind = text(section.get("key")), {"movie": 1, "show": 4}.get(text(section.get("type")))
            if kind:
                note = f"marks {server} {key}"
                since, newest, last = self.tracker.note(note), 1, LAST_TIME
                for page in plex.pages(f"/library/sections/{urllib.parse.quote(key, '')}/all?type={kind}&unwatched=0&"
                                       "sort=lastViewedAt:desc&includeGuids=1"):
                    marks = [play_entry(fields, server, LIBRARY) for fields in page.items]
                    times = [last, *(int(each.received_at) for each in marks)]
                    newest, last = max([newest, *(at for at in times[1:] if at <= until)]), times[-1]
                    if times != sorted(times, reverse=True):      # an unknown sort is ignored in silence
                        newest = since
                        break
                    with self.tracker.transaction(lasting=False):
                        for mark, fields in zip(marks, page.items, strict=True):
                            if since and since < mark.received_at <= until and self.is_new(mark, fields):
                                self.tracker.add_entry(mark, None)
                    if not since or last <= since:
                        break
                with self.tracker.transaction(lasting=False):
                    self.tracker.take_note(note, max(since, newest))

    def is_new(self, play: Entry, fields: Mapping[str, Any]) -> bool:
        """Whether a play, of which these fields tell, can be marked, and is not in the journal already."""
        if play.event == LIBRARY:     # what was begun again has a new lastViewedAt, too, but no more plays than before
            row, count = self.tracker.mapping(play), number(fields.get("viewCount")) or 0
            known = row and self.tracker.episode(row["show_id"], play.season, play.episode)
            if number(fields.get("viewOffset")) or count <= (known["plays"] if known else 0):
                return False
        return not missing_word(play) and self.tracker.one(
            "SELECT 1 FROM webhook_log WHERE rating_key = ? AND abs(received_at - ?) <= ? AND server IN (?, '') "
            "AND event IN (?, ?, ?) AND action IS NOT 'other_account'", play.rating_key, play.received_at, SAME_PLAY_S,
            play.server, SCROBBLE, HISTORY, LIBRARY) is None

    def accounts(self, plex: PlexServer) -> set[str] | None:
        """The ids of -accounts in the server's history; None: all count.  Raises PlexError."""
        if self.config.accounts in ("", "*"):
            return None if self.config.accounts else {"1"}              # 1 is the owner
        wanted = split_accounts(self.config.accounts)         # an id of plex.tv has the name that a webhook gave it
        names = wanted | {row[0].casefold() for each in wanted for row in self.tracker.all(
            "SELECT account FROM webhook_log WHERE account_id = ? ORDER BY id DESC LIMIT 1", each)} - {""}
        try:
            return wanted | {text(each.get("id"), 20) for each in plex.items("/accounts")
                             if text(each.get("name")).casefold() in names}
        except PlexError as error:
            if error.fault in ("unreachable", "starting"):
                raise
            return wanted

    def prune(self) -> None:
        """Delete old entries that are finished; failed ones stay.  In short transactions: answers wait for them."""
        # The last one stays, too: a new entry would get its id, by which a play of long ago names its own (entry_id).
        before = self.tracker.now() - self.config.tracker_log_days * 86400
        deleted = BATCH if self.config.tracker_log_days else 0
        while deleted == BATCH:
            with self.tracker.transaction(lasting=False):
                deleted = self.tracker.write("""DELETE FROM webhook_log WHERE id IN (SELECT id FROM webhook_log WHERE
                    received_at < ? AND status <> 'failed' AND retry_at IS NULL AND
                    id < (SELECT max(id) FROM webhook_log) LIMIT ?)""", before, BATCH).rowcount

# -- Commands: import
KINDS = {SHOW: "show", MOVIE: "movie"}        # a type in the database -> what a person calls it
IMPORT_S, MAX_IMPORTS = 60.0, 5       # for one page: a small NAS takes seconds; how often a library is begun again
# Of a library's type: what a person calls its items, their Show.type ("": episodes, for shows), and Plex's parameters.
LIBRARIES = {"movie": (("movies", MOVIE, "type=1&includeGuids=1"),),
             "show": (("shows", SHOW, "type=2&includeGuids=1"), ("episodes", "", "type=4"))}
# Keys of the JSON form of import and export, and their types.  show: which show or movie in it, from 0; null: ignored.
SHOW_KEYS = {"title": str, "year": int, "tmdb_id": int, "tvdb_id": int, "imdb_id": str}
PLAY_KEYS = {"watched": list, "watched_at": str, "plays": int}        # the last two: of earlier versions
EPISODE_KEYS = {"season": int, "episode": int, "title": str, **PLAY_KEYS}
SERVER_KEYS = {"server": str, "type": str, "key": str, "guid": str, "title": str}
MORE_KEYS = {"mappings": SERVER_KEYS | {"by": str, "show": int}, "conflicts": SERVER_KEYS | SHOW_KEYS | {"kind": str},
             "unmarked": {"show": int, "season": int, "episode": int, "at": str}}

def same_show(tracker: Tracker, show: Show, others: Iterable[int] = ()) -> int:
    """The id of a show of the same title and year; 0: none.  others: ids that a person says are not it."""
    # Unlike for a webhook, a similar title is not enough: an import that mixes up two shows does so for good.
    title = parse_title(show.title)
    return next((known.id for known in tracker.shows("normal = ? AND type = ?", title.normal, show.type) if
                 (known.year, parse_title(known.title)) == (show.year, title) and known.id not in others and
                 not known.ids.contradicts(show.ids)), 0)

def upsert_show(tracker: Tracker, show: Show, others: Iterable[int] = ()) -> int:
    """The id of a show in the tracker, added if it is missing; within a transaction.  others: as in same_show()."""
    found = tracker.match_ids(show)
    show_id = found.show_id if isinstance(found, Match) else same_show(tracker, show, others) or tracker.add_show(show)
    tracker.learn_ids(show_id, show.ids)
    return show_id

def plural(count: int, word: str) -> str:
    """How many of something: "1 play", "2 plays"."""
    return f"{count} {word}{'s' * (count != 1)}"

def import_item(tracker: Tracker, server: str, type: str, fields: Mapping[str, Any]) -> str:
    """Add a show or movie (its type) and the mapping from its key; or an episode (type "") whose show is mapped."""
    # A movie and an episode bring when they were watched.  -> what is left out, for a person; "": it is not.
    if (item := parse_item(fields)).type == "clip":
        return "clip such as a home video"
    key, guid, name = (item.rating_key, item.guid, item.title) if type else (
        text(fields.get("grandparentRatingKey")), "", item.grandparent_title)
    entry = Entry(0.0, IMPORT, server, "", "", type or SHOW, key, "", name, name, show_key=key, show_guid=guid)
    ids, year = (parse_ids((*item_guids(fields), guid)), number(fields.get("year"))) if type else (Ids(), None)
    match = tracker.known(entry, show := Show(type or SHOW, name, year, ids))
    if type and match is None and (same := same_show(tracker, show)):
        match = tracker.doubt(1.0, same) if tracker.is_another(entry, same) else Match(same, "title", 1.0)
    if isinstance(match, Conflict):
        if type:
            tracker.add_conflict(entry, show, match)
        return f"{KINDS[type]} without a certain match" if type else "episode without a certain show"
    if type and (match is None or match.show_id):
        match = match or Match(tracker.add_show(show), IMPORT, 1.0)
        tracker.learn_ids(match.show_id, show.ids)
        tracker.map(entry, match._replace(by=tracker.mapping(entry)["by"]) if match.by == "mapping" else match)
    if type == SHOW or match is None:
        return "" if type else "episode without a certain show"
    if (row := episode_row(fields, tracker.now())) and match.show_id:
        tracker.add_plays(match.show_id, row, LIBRARY, tracker.mapping(entry)["id"])
    return "" if row else "episode without a number"

def import_section(tracker: Tracker, plex: PlexServer, type: str, path: str, note: str, said: str) -> Mapping[str, int]:
    """Import a library, anew if its items moved meanwhile; -> what was left out.  Raises PlexError."""
    # Each page is a transaction that also notes how far it came: an import that was stopped continues there.
    for _ in range(MAX_IMPORTS):
        left, totals = collections.Counter[str](), set[int | None]()
        for page in plex.pages(path, tracker.note(note), IMPORT_S):
            totals.add(page.total)
            with tracker.transaction():
                left.update(filter(None, (import_item(tracker, plex.server_id, type, each) for each in page.items)))
                tracker.take_note(note, page.end if len(totals) == 1 else 0)
            if len(totals) > 1:
                break
            total = max(page.total or 0, page.end)
            print(f"{said}: {page.end} of {total}", file=sys.stderr, flush=True,
                  end="\r" if sys.stderr.isatty() and page.end < total else "\n")
        else:
            return left
    raise PlexError("nonsense", f"{said} change all the time; import them when no scan of it runs.")

def import_library(tracker: Tracker, plex: PlexServer) -> None:
    """Import a server's libraries of movies and of shows; raises PlexError, TrackerError."""
    # The newest items come last, so that what is added to the library meanwhile moves no page.
    left, server, tracker.plex = collections.Counter[str](), plex.server_id, plex    # its clock is right if ours is not
    for fields in plex.items("/library/sections"):
        key, title = urllib.parse.quote(text(fields.get("key")), ""), text(fields.get("title"))
        for name, show_type, query in LIBRARIES.get(text(fields.get("type")), ()):
            path, note = f"/library/sections/{key}/all?{query}&sort=addedAt:asc", f"import {server} {key} {name}"
            left.update(import_section(tracker, plex, show_type, path, note, f"{title}: {name}"))
    for what, count in left.items():
        noun, _, which = what.partition(" ")
        print(f"{plural(count, noun)} {which} {were(count)} left out.", file=sys.stderr)
    with tracker.transaction():
        tracker.write("DELETE FROM note WHERE name LIKE 'import %'")
        tracker.take_note("imported", 1)

def catch_up(tracker: Tracker, worker: Worker) -> None:
    """After an import: try again to finish what waited, then close the conflicts whose shows are known now."""
    for entry in tracker.entries("action IN ('conflict_created', 'episode_not_found')"):
        worker.finish(entry)
    with tracker.transaction():
        for row in tracker.all("SELECT c.id, show_id FROM open_conflict c JOIN mapping m USING (server, type, subject) "
                               "WHERE show_id NOT NULL AND (by NOT IN (?, ?) OR at >= CAST(created_at AS INTEGER)) "
                               "AND (m.guid = c.guid OR '' IN (m.guid, c.guid))", *GUESSED):
            tracker.close_conflict(*row)

def checked(value: object, place: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """An object of an import file, if its keys and types are known; raises ConfigError with its place in the file."""
    if not isinstance(value, dict):
        raise ConfigError(f"tracker import: {place} is not an object.")
    for key, each in value.items():
        wrong = f" has an unknown key; known are {', '.join(keys)}" if key not in keys else "" if each is None else \
            f".{key} has the wrong type" if type(each) is not keys[key] else \
            f".{key} is out of range" if isinstance(each, int) and not 0 <= each <= 2**53 else ".imdb_id is not an id" \
            " such as tt0903747" if key == "imdb_id" and not re.fullmatch(r"tt\d{5,10}", str(each), re.ASCII) else ""
        if wrong:
            raise ConfigError(f"tracker import: {place}{wrong}.")
    return value

def read_episode(fields: Mapping[str, Any], place: str) -> EpisodeRow:
    """An episode in the JSON form; raises ConfigError.  What is watched was played at least once."""
    season, episode = fields.get("season"), fields.get("episode")
    if season is None or episode is None or max(season, episode) > MAX_NUMBER:
        raise ConfigError(f"tracker import: {place} needs a season and an episode from 0 to {MAX_NUMBER}.")
    told = [fields["watched_at"]] if fields.get("watched_at") else []
    told += [None] * (min(fields.get("plays") or 0, MAX_PLAYS) - len(told))       # below 0: none
    try:
        plays = tuple(None if each is None else unix_time(each) for each in (*(fields.get("watched") or ()), *told))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"tracker import: {place} has a time unlike 2026-11-21T20:15:00Z.") from error
    return season, episode, text(fields.get("title")), plays[:MAX_PLAYS]

def read_whole(path: str) -> tuple[dict[str, Any], History]:
    """A file in the JSON form ({}: a foreign one), and the shows and movies in it; raises ConfigError."""
    try:
        with open("/dev/stdin" if path == "-" else path, "rb") as file:
            content = file.read(MAX_FILE + 1)
        if foreign := read_foreign(content, shown_path(path)):
            return {}, foreign
        whole = checked(json.loads(content), "the file", dict.fromkeys(("shows", "movies", *MORE_KEYS), list))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"tracker import: {shown_path(path)} cannot be read as JSON ({why(error)}).") from error
    return whole, ([*read_shows(whole)], [])

def read_shows(whole: Mapping[str, Any]) -> Iterator[tuple[Show, list[EpisodeRow]]]:
    """The shows and movies of a file in the JSON form; raises ConfigError."""
    for name, kind, keys in (("shows", SHOW, {"episodes": list}), ("movies", MOVIE, PLAY_KEYS)):
        for i, value in enumerate(whole.get(name) or ()):
            fields = checked(value, place := f"{name}[{i}]", {**SHOW_KEYS, **keys})
            places = {f"{place}.episodes[{j}]": each for j, each in enumerate(fields.get("episodes") or ())}
            episodes = [read_episode(checked(each, where, EPISODE_KEYS), where) for where, each in places.items()] \
                if kind == SHOW else [read_episode({**fields, "season": 0, "episode": 0}, place)]
            if not fields.get("title"):
                raise ConfigError(f"tracker import: {place} has no title.")
            ids = Ids(*(fields.get(column) or None for column in CONFIDENCE))
            yield Show(kind, text(fields["title"]), fields.get("year"), ids), episodes

def tracker_import(config: Config, tracker: Tracker) -> int:
    """Bring shows, movies and what was watched: from a file, or from the server."""
    plex = server_of(config)
    if len(config.words) > 1:
        whole, (read, left) = read_whole(config.words[1])     # all of it is checked before anything is written
        ids, n, new = list[int](), sum(len(row[3]) for _, rows in read for row in rows), 0
        with tracker.transaction():
            for i, (show, episodes) in enumerate(read, 1):
                ids.append(upsert_show(tracker, show))
                new += sum(tracker.add_plays(ids[-1], row, IMPORT) for row in episodes)
                if sys.stderr.isatty():
                    print(f"{i} of {len(read)} titles", file=sys.stderr, end="\r" if i < len(read) else "\n")
            restore(tracker, whole, ids)
        print(*left, f"{plural(n, 'play')} in the file: {new} new, {n - new} known before.", sep="\n", file=sys.stderr)
    elif plex is None:
        raise ConfigError("tracker import: give -plex-server-url and -plex-token-file, or a FILE.json.")
    else:
        try:
            import_library(tracker, plex)
        except KeyboardInterrupt:
            raise TrackerError("the import was stopped; run it again to continue.") from None
    catch_up(tracker, Worker(config, tracker, plex))
    shows, movies = (tracker.one("SELECT count(*) FROM show WHERE type = ?", each)[0] for each in (SHOW, MOVIE))
    episodes = tracker.one("SELECT count(*) FROM episode")[0] - movies
    return print_rows(config, [{"shows": shows, "episodes": episodes, "movies": movies}], "The tracker now has "
                      f"{plural(shows, 'show')}, {plural(episodes, 'episode')} and {plural(movies, 'movie')}.")

# -- Commands: export, shows, show, log, conflicts, resolve
# What commands print and pages show, of titles with :words; :most (-1: all) from :skip on.  CHOICES: the answers that a
# person may choose, [[id, title, year, score], ...]: candidates, and what was searched for.
SHOWS = """SELECT id, type, title, year, tmdb_id, tvdb_id, imdb_id, (SELECT count(DISTINCT season << 32 | episode) FROM
    play WHERE show_id = s.id) AS watched, (SELECT count(*) FROM episode WHERE show_id = s.id) AS episodes,
    last_watched_at FROM (SELECT *, (SELECT max(at) FROM play WHERE show_id = show.id) AS last_watched_at FROM show
    WHERE has_words(normal || ' ' || title, :words) ORDER BY last_watched_at DESC, normal LIMIT :most OFFSET :skip) s"""
MAPPINGS = """SELECT m.id, server, m.type, m.title, subject, guid, show_id, show.title AS show, year, by, confidence,
    at, (SELECT count(*) FROM play WHERE mapping_id = m.id) AS plays FROM mapping m LEFT JOIN show ON show.id = show_id
    WHERE iif(:id IS NULL, has_words(printf('%s %s %s', show.normal, show.title, m.title), :words), m.id = :id)
    ORDER BY m.id DESC LIMIT :most OFFSET :skip"""
CHOICES = """(SELECT json_group_array(json_array(id, title, year, score)) FROM (SELECT show.id, show.title, show.year,
    json_extract(value, '$[1]') AS score FROM json_each({}) JOIN show ON show.id = json_extract(value, '$[0]')
    UNION ALL SELECT * FROM (SELECT id, title, year, NULL FROM show WHERE :words <> '' AND show.type = {}.type AND
    has_words(normal, :words) ORDER BY normal LIMIT 20)))"""
QUESTIONS = f"""SELECT id, created_at, kind, type, title, year, (SELECT count(*) FROM webhook_log WHERE conflict_id =
    c.id) AS waiting, {CHOICES.format("c.candidates", "c")} AS candidates, resolution FROM conflict c"""
ENTRIES = """SELECT received_at, event, account, title, season, episode, coalesce(status, 'waiting') AS status, action,
    reason, show_id, type, show_title AS show, conflict_id FROM webhook_log WHERE
    :status IN ('', coalesce(status, 'waiting')) AND (:show = '' OR show_id = :show_id OR (:show_id IS NULL AND
    has_words(iif(type = 'movie', title, show_title), :show))) ORDER BY id DESC LIMIT :most OFFSET :skip"""

def plays_of(tracker: Tracker, show_id: int) -> list[EpisodeRow]:
    """The episodes of a show or movie, each with its plays."""
    rows = tracker.all("SELECT season, episode, title, play.id, at FROM episode LEFT JOIN play USING (show_id, season, "
                       "episode) WHERE show_id = ? ORDER BY season, episode, at NULLS LAST", show_id)
    return [(*key, tuple(at for *_, play_id, at in group if play_id)) for key, group in itertools.groupby(
        rows, key=lambda row: row[:3])]

def show_fields(tracker: Tracker, show: Show) -> dict[str, Any]:
    """A show or movie in the JSON form of import and export."""
    episodes = [{"season": season, "episode": episode, "title": title, "watched": [iso_time(at) for at in plays]}
                for season, episode, title, plays in plays_of(tracker, show.id)]
    more = {"episodes": episodes} if show.type == SHOW else {"watched": episodes[0]["watched"] if episodes else []}
    return {"title": show.title, "year": show.year, **show.ids._asdict(), **more}

def restore(tracker: Tracker, whole: Mapping[str, Any], ids: Sequence[int]) -> None:
    """Bring all but shows, movies and plays of a file in the JSON form; raises ConfigError.  ids: of its shows."""
    # What is mapped or asked already stays as it is.  The database calls a show otherwise.
    known = {"show": (SHOW, range(shows := len(whole.get("shows") or ()))), "movie": (MOVIE, range(shows, len(ids)))}
    for i, value in enumerate(whole.get("unmarked") or ()):
        fields = checked(value, where := f"unmarked[{i}]", MORE_KEYS["unmarked"])
        if (which := fields.get("show")) is None or which >= len(ids):
            raise ConfigError(f"tracker import: {where}.show is not in the file.")
        season, episode, _, told = read_episode({**fields, "watched": [fields.get("at") or ""]}, where)
        tracker.write(f"UPDATE episode SET unmarked_at = max(ifnull(unmarked_at, 0), ?) WHERE {SOME}",
                      *told, ids[which], season, episode)
    for name in ("mappings", "conflicts"):
        for i, value in enumerate(whole.get(name) or ()):
            fields, now = checked(value, where := f"{name}[{i}]", MORE_KEYS[name]), int(time.time())
            which, place = fields.get("show"), [text(fields.get(key)) for key in SERVER_KEYS]
            if place[1] not in known:
                raise ConfigError(f"tracker import: {where}.type is neither show nor movie.")
            if which is not None and which not in known[place[1]][1]:
                raise ConfigError(f"tracker import: {where}.show is not a {place[1]} in the file.")
            place[1] = known[place[1]][0]
            row = [now, text(fields.get("kind")), *place, *map(fields.get, ("year", *CONFIDENCE)), "[]", None]
            if name == "mappings":
                row = [*place, None if which is None else ids[which], text(fields.get("by")) or IMPORT, 1.0, now]
            tracker.write(f"INSERT OR IGNORE INTO {name[:-1]} VALUES (NULL{', ?' * len(row)})", *row)

def tracker_export(config: Config, tracker: Tracker) -> int:
    """Print all but the journal in the JSON form, each show on its own line; or the plays as Trakt's history."""
    kinds = {kind: tracker.shows("type = ? ORDER BY normal, id", kind) for kind in (SHOW, MOVIE)}
    if config.as_ == "trakt":
        entries = trakt_history((show, plays_of(tracker, show.id)) for shows in kinds.values() for show in shows)
        print("[", ",\n ".join(map(json.dumps, entries)), "]", sep="")
        return 0
    places = {show.id: i for i, show in enumerate(itertools.chain(*kinds.values()))}
    more: dict[str, list[dict[str, object]]] = {name: [] for name in MORE_KEYS}
    tables = ("mapping", "open_conflict", "episode WHERE unmarked_at NOT NULL")
    for (name, keys), table in zip(MORE_KEYS.items(), tables, strict=True):
        for row in map(dict, tracker.all(f"SELECT * FROM {table} ORDER BY 1, 2, 3")):
            row |= {"key": row.get("subject"), "show": places.get(row.get("show_id", 0)),
                    "type": KINDS.get(row.get("type", "")), "at": iso_time(row.get("unmarked_at"))}
            more[name].append({key: row[key] for key in keys})
    shows, movies = ((show_fields(tracker, show) for show in each) for each in kinds.values())
    for i, (name, rows) in enumerate({"shows": shows, "movies": movies, **more}.items()):
        print(f'{", " if i else "{"}"{name}": [')
        sys.stdout.writelines(f"{',' if j else ' '}{json.dumps(row)}\n" for j, row in enumerate(rows))
        print("]")
    print("}")
    return 0

def tracker_shows(config: Config, tracker: Tracker) -> int:
    """Print each show and movie, the last watched first."""
    words = normal(text(" ".join(config.words[1:])))
    rows = [dict(row) for row in tracker.all(SHOWS, words=words, most=-1, skip=0)]
    lines = ["   ID  WATCHED     LAST        TITLE"]
    for row in rows:
        movie = f"movie: {'yes' if row['watched'] else 'no'}"
        watched = movie if row["type"] == MOVIE else f"{row['watched']} of {row['episodes']}"
        day = local_time("%Y-%m-%d", row["last_watched_at"])
        lines.append(cut(f"{row['id']:5}  {watched:10}  {day:10}  {printable(named(row['title'], row['year']))}"))
        row |= {"type": KINDS[row["type"]], "last_watched_at": iso_time(row["last_watched_at"])}
    empty = "The tracker is empty. `tracker import` reads your Plex library into it."
    return print_rows(config, rows, "\n".join(lines) if rows else "No title matches." if words else empty)

def show_of(tracker: Tracker, words: str) -> Show:
    """The show or movie with the id, or the words of its title, that a person typed; raises ConfigError."""
    sought = normal(text(words))
    found = tracker.shows("id = ?", number(words) or 0) or (tracker.shows(
        "has_words(normal || ' ' || title, ?) ORDER BY normal LIMIT 9", sought) if sought else [])
    if len(found) != 1:
        some = ", ".join(f"{show.id} {printable(named(show.title, show.year))}" for show in found)
        raise ConfigError(f"which one: {some}? Give its id." if found else
                          "there is no such show; `tracker shows` prints their ids.")
    return found[0]

def episodes_of(word: str) -> tuple[int | None, int | None]:
    """The season and episode of a word such as S01E02 or S01; None: all.  Raises ConfigError."""
    found = re.fullmatch(r"(?:[sS](\d{1,10})(?:[eE](\d{1,10}))?)?", word, re.ASCII)
    if not found or any(int(each) > MAX_NUMBER for each in found.groups("0")):      # no import would read it back
        raise ConfigError(f"{word} is no episode or season; write it as S01E02 or S01.")
    return number(found[1]), number(found[2])

def tracker_mark(config: Config, tracker: Tracker) -> int:
    """Mark what was watched, or take it back: a show, a season or an episode; a movie."""
    name, show = config.words[0], show_of(tracker, config.words[1])
    if config.at is not None and (name == "unmark" or config.at > tracker.now()):
        raise ConfigError("-at: give it to `tracker mark` only, with a time that has passed.")
    place = season, episode = episodes_of("".join(config.words[2:]) or "S00E00" * (show.type == MOVIE))
    if show.type == MOVIE and place != (0, 0):
        raise ConfigError(f"{named(show.title, show.year)} is a movie: it has no episodes.")
    with tracker.transaction():
        if episode is not None and not tracker.episode(show.id, season, episode):
            if name == "unmark":
                raise ConfigError(f"{named(show.title, show.year)} has no such episode; see `tracker show {show.id}`.")
            tracker.add_episodes(show.id, [(*place, "")])         # a person says that it exists
        count = tracker.mark(show.id, *place, config.at) if name == "mark" else tracker.unmark(show.id, *place)
    said = {"mark": "marked as watched", "unmark": "taken back"}[name]
    return print_rows(config, [{"show_id": show.id, "plays": count}], f"{plural(count, 'play')} {said}.")

def tracker_mappings(config: Config, tracker: Tracker) -> int:
    """Print which of our shows each show of the servers is, and by what it was found."""
    words = normal(text(" ".join(config.words[1:])))
    rows = [dict(row) for row in tracker.all(MAPPINGS, id=None, words=words, most=-1, skip=0)][::-1]
    lines = ["   ID  BY        CONF  DAY         THE SERVER'S -> OURS"]
    for row in rows:
        day = local_time("%Y-%m-%d", row["at"])
        ours = f"{row['show_id']} {named(row['show'] or '?', row['year'])}" if row["show_id"] else "ignored"
        names = f"{cut(row['title'] or row['subject'], max(20, 41 - len(ours)))} -> {ours}"
        lines.append(cut(printable(f"{row['id']:5}  {row['by']:8}  {row['confidence']:.2f}  {day:10}  {names}")))
        row |= {"type": KINDS[row["type"]], "at": iso_time(row["at"])}
    return print_rows(config, rows, "\n".join(lines) if rows else "No mapping matches.")

def correct(tracker: Tracker, table: str, no: int, word: str) -> tuple[int, int]:
    """Answer a conflict or correct a mapping (table); -> the show's id (0: none), and how many plays moved."""
    # word: a show, "new", "ignore", or of a mapping "forget".  Within a transaction; raises ConfigError.
    row, is_mapping = tracker.one(f"SELECT * FROM {table} WHERE id = ?", no), table == "mapping"
    if row is None:
        raise ConfigError(f"there is no such {table}; `tracker {table}s` prints their ids.")
    known = None if word in ("new", "ignore", *["forget"] * is_mapping) else show_of(tracker, word)
    if known and known.type != row["type"]:
        raise ConfigError("one is a movie, the other is not: see `tracker shows`.")
    show_id = known.id if known else 0
    if word == "new":
        # Asked twice, it is the show that this mapping alone has made.
        own = tracker.one("SELECT id FROM show WHERE id = ? AND title = ? AND NOT EXISTS (SELECT 1 FROM mapping WHERE "
                          "show_id = show.id AND id <> ?)", row["show_id"], row["title"], no) if is_mapping else None
        show_id = own[0] if own and row["by"] == "person" else tracker.add_show(Show(row["type"], row["title"])) \
            if is_mapping else upsert_show(tracker, tracker.shows("id = ?", no, table=table)[0],
                                           [show_id for show_id, _ in json.loads(row["candidates"])])
    if show_id and not is_mapping:                    # the person says that these episodes exist
        tracker.add_episodes(show_id, tracker.all("SELECT season, episode, title FROM webhook_log WHERE "
                                                  "conflict_id = ? AND season NOT NULL", no))
    moved = tracker.remap(no, show_id) if is_mapping else tracker.resolve(no, show_id)
    if word == "forget":                              # what it marked is judged anew
        tracker.write("DELETE FROM play WHERE mapping_id = ?", no)
        tracker.remap(no, 0)
        tracker.write("DELETE FROM mapping WHERE id = ?", no)
    return show_id, moved

def tracker_correct(config: Config, tracker: Tracker) -> int:
    """Say which show is meant, by a mapping or in a conflict; what was marked before moves along."""
    table, no = {"map": "mapping", "resolve": "conflict"}[config.words[0]], number(config.words[1]) or 0
    with tracker.transaction():
        show_id, moved = correct(tracker, table, no, config.words[2])
    done, plays = Worker(config, tracker, server_of(config)).drain(again=True), f" {plural(moved, 'play')} moved."
    row = {table: no, "show_id": show_id or None}
    if table == "mapping":
        return print_rows(config, [{**row, "moved": moved}], f"Mapping {no} is corrected;{plays}")
    said = f"{plural(done, 'waiting webhook')} {were(done)} processed.{plays if moved else ''}"
    return print_rows(config, [{**row, "done": done}], f"Conflict {no} is resolved. {said}")

def tracker_backup(config: Config, tracker: Tracker) -> int:
    """Copy the database into a new file, whoever writes meanwhile."""
    path = config.words[1]
    if os.path.lexists(path):
        raise ConfigError(f"tracker backup: {path} exists; name a new file.")
    tracker.backup(path)
    return print_rows(config, [{"file": path}], f"The tracker was copied to {path}.")

def days(watched: Mapping[str, Any]) -> str:
    """The days on which an episode or movie in the JSON form was watched; "?": not known when."""
    return " ".join(local_time("%Y-%m-%d", each and unix_time(each)) or "?" for each in watched["watched"])

def tracker_show(config: Config, tracker: Tracker) -> int:
    """Print a show's seasons, each as a grid of what was watched, and its episodes; or when a movie was watched."""
    show = show_of(tracker, " ".join(config.words[1:]))
    fields, ids = show_fields(tracker, show), [f"{name} {each}" for name, each in show.ids._asdict().items() if each]
    lines = [textwrap.fill(printable(named(show.title, show.year)) + (f"  ({', '.join(ids)})" if ids else ""), 80)]
    for season, group in itertools.groupby(fields.get("episodes", ()), key=lambda each: each["season"]):
        episodes = list(group)
        lines.append(season_lines(season, [(each["episode"], bool(each["watched"])) for each in episodes]))
        for each in episodes if len(config.words) > 2 or not config.words[1].isdigit() else ():
            lines.append(cut(f"  S{season:02}E{each['episode']:02}  {printable(each['title'])}  {days(each)}".rstrip()))
    if show.type == MOVIE:
        count = plural(len(fields["watched"]), "play")
        lines.append(f"watched {days(fields)}, {count}" if fields["watched"] else "not watched")
    elif following := next((each for each in fields["episodes"] if each["season"] and not each["watched"]), None):
        lines.append(cut(f"next: S{following['season']:02}E{following['episode']:02}  {printable(following['title'])}"))
    return print_rows(config, [{"id": show.id, "type": KINDS[show.type], **fields}], "\n".join(lines))

def log_lines(row: Mapping[str, Any]) -> str:
    """An entry in the lines of `tracker log`; a reason only where a person may want to act."""
    is_episode = row["type"] == EPISODE and None not in (row["season"], row["episode"])
    behind = f" S{row['season']:02}E{row['episode']:02}" if is_episode else ""
    first = printable(f"{local_time('%m-%d %H:%M', row['received_at'])}  {row['status']:9}  "
                      f"{row['action'] or row['event']:18}  ")
    line = first + cut(printable(row["show"] or row["title"] or ""), 80 - len(first) - len(behind)) + behind
    reason = printable(row["reason"] or "") if row["status"] in (FAILED, IGNORED) else ""
    return "\n".join([line, *(f"{'':13}{part}" for part in textwrap.wrap(reason, 67))])

def tracker_log(config: Config, tracker: Tracker) -> int:
    """Print what became of the last webhooks, the newest last."""
    rows = tracker.all(ENTRIES, status=config.status, show=text(config.show).casefold(), show_id=number(config.show),
                       most=config.last or -1, skip=0)[::-1]
    nothing = "No entry matches." if config.status or config.show else "No webhook has arrived yet."
    return print_rows(config, [{**row, "received_at": iso_time(row["received_at"])} for row in rows],
                      "\n".join(map(log_lines, rows)) or nothing)

def tracker_conflicts(config: Config, tracker: Tracker) -> int:
    """Print the open conflicts, each with the commands that resolve it."""
    rows, lines = [], []
    columns = "id, created_at, kind, type, title, year, waiting, candidates"
    for row in tracker.all(f"SELECT {columns} FROM ({QUESTIONS}) WHERE resolution IS NULL ORDER BY id", words=""):
        known = json.loads(row["candidates"])
        rows.append({**row, "created_at": iso_time(row["created_at"]), "type": KINDS[row["type"]], "candidates": [
            dict(zip(("show_id", "title", "year", "score"), each, strict=True)) for each in known]})
        name, command = printable(named(row["title"], row["year"])), f"    tracker resolve {row['id']}"
        lines += [cut(f"{row['id']}: {cut(name, 45)} ({printable(row['kind'])}, {row['waiting']} waiting)"),
                  *(cut(f"{command} {show_id}   # {score:.2f} {printable(named(title, year))}")
                    for show_id, title, year, score in known), f"{command} new", f"{command} ignore"]
    lines += ["Any other show's id may be given, too; `tracker shows WORDS` finds it."] * bool(lines)
    return print_rows(config, rows, "\n".join(lines) or "No conflicts: nothing is waiting for you.")

# command -> its function, and its words: those in brackets may be left out
TRACKER_COMMANDS = {"import": (tracker_import, "[FILE]"), "export": (tracker_export, ""),
    "backup": (tracker_backup, "FILE"), "shows": (tracker_shows, "[WORDS...]"), "show": (tracker_show, "ID|WORDS..."),
    "log": (tracker_log, ""), "mark": (tracker_mark, "ID [S01E02|S01]"), "unmark": (tracker_mark, "ID [S01E02|S01]"),
    "mappings": (tracker_mappings, "[WORDS...]"), "map": (tracker_correct, "MAPPING SHOW|new|ignore|forget"),
    "conflicts": (tracker_conflicts, ""), "resolve": (tracker_correct, "ID SHOW|new|ignore")}

def tracker_command(config: Config) -> int:
    """Run one of the commands of `tracker`; returns the exit status."""
    name, *given = config.words or ("",)
    if name not in TRACKER_COMMANDS:
        raise ConfigError(f"tracker: say one of {', '.join(TRACKER_COMMANDS)}; see: streamerbrainz.py -h")
    (command, words), may_write = TRACKER_COMMANDS[name], name in ("import", "mark", "unmark", "map", "resolve")
    most = len(words.split())
    if not most - words.count("[") <= len(given) <= (99 if "..." in words else most):
        raise ConfigError(f"tracker {name}: call it as: tracker {name} {words}".rstrip())
    if not config.tracker_db:
        raise ConfigError("tracker: name the database with -tracker-db FILE, or turn it on: setup -tracker-db FILE.")
    with contextlib.closing(Tracker(config.tracker_db, name == "import", may_write)) as tracker, tracker.guarded():
        return command(config, tracker)

# === Browse: the tracker in a browser (list_html, show_html, add_pages) ===
# What for: to see what was watched and what became of each webhook, and to correct it by a click.
# Way: VIEWS: a path -> rows of the tracker -> HTML -> Answer; FORMS: a form -> a change, which the worker finishes
# Threads: request threads read, and write what a person corrects.  None has the tracker while it makes HTML.
# Needs of Page: Answer, Pages, html_answer, isolated, layout; of Tracker: CHOICES, CONFIDENCE, ENTRIES, ENTRY_STATUSES,
#   KINDS, MAPPINGS, QUESTIONS, SHOWS, SOME, Tracker, correct, episodes_of, named, normal

# Rows of a list on one page; episodes of a show; and the highest number of a page: SQLite counts to 2**63.
PAGE_ROWS, PAGE_EPISODES, MAX_PAGE = 100, 1000, 10**6
# A mark that is taken back loses its date.
ASK_FIRST = """document.addEventListener("submit", event => { const word = (event.submitter || {}).value || "";
  if (word.startsWith("unmark") && !confirm("Take back " + word.slice(7) + "?")) event.preventDefault(); });"""

def row_html(path: str, name: str, more: str) -> str:
    """A row of a list: a link (path "": none) by a name, and what else there is to say: HTML."""
    link = f'<a href="/{path}">{isolated(name)}</a>' if path else isolated(name)
    return f"<li class=row><span>{link}</span> <span class=dim>{more}</span></li>"

def form_html(buttons: Iterable[tuple[str, str, str]], may: bool, action: str = "") -> str:
    """A form of buttons, each with its value, word and title.  may: whether this person may change something."""
    words = "".join(f'<button name=word value="{value}" title="{html.escape(title)}">{html.escape(word)}</button>'
                    for value, word, title in buttons)
    return f"<form method=post{action}><fieldset{'' if may else ' disabled'}>{words}</fieldset></form>"

def search_html(words: str, action: str = "") -> str:
    """A field to search for a title."""
    return (f'<form{action}><fieldset><input type=search name=q value="{html.escape(words)}" '
            'placeholder="Words of a title" aria-label="Words of a title"><button>Search</button></fieldset></form>')

def list_html(head: str, rows: Sequence[Any], words: str, may: bool) -> str:
    """A list.  A question that is open, or alone, has a button for each answer, and a search for others."""
    lines, is_asked = [], False
    for row in rows:
        said = html.escape(row["said"]) + (f"<br><time>{row['day']}</time>" if row["day"] else "")
        if row["open"] is None or not (row["open"] or len(rows) == 1):
            lines.append(row_html(row["path"], row["name"], said))
            continue
        to, is_asked = f' action="/{row["path"]}"', True
        buttons = [(str(show_id), named(title, year) + (f" ({score:.2f})" if score else ""), "")
                   for show_id, title, year, score in json.loads(row["candidates"])]
        buttons += [("new", f"A new {KINDS[row['type']]}", ""), ("ignore", "Ignore it", "")]
        buttons += [("forget", "Forget it", "")] * row["path"].startswith("mappings")
        lines.append(f"<h2>{isolated(row['name'])}</h2><p class=dim>{said}</p>{form_html(buttons, may, to)}"
                     f"{search_html(words, to)}")
    return f"{head.format('' if is_asked else search_html(words))}{''.join(lines)}</ul>"

def season_html(rows: Sequence[Any], may: bool) -> str:
    """A season as a grid: a click marks an episode, or takes its marks back; below it, when each was watched."""
    cells, lines, season, code = [], [], rows[0]["season"], f"S{rows[0]['season']:02}"
    for row in rows:
        plays = html.escape(row["plays"] or "").replace("\n", "<br>")
        cells.append((f"{'un' * bool(plays)}mark {code}E{row['episode']:02}", str(row["episode"]), row["name"]))
        lines.append(row_html("", f"{row['episode']} {row['name']}", plays))
    left = sum(value.startswith("mark") for value, *_ in cells)
    whole = form_html([(f"mark {code}", "Mark as watched", "") if left else (f"unmark {code}", "Take back", "")], may)
    if rows[0]["type"] == MOVIE:
        return f"{whole}<p>{plays}</p>"
    return (f"<h2 id={code}>{f'Season {season}' if season else 'Specials'} <span class=dim>{len(cells) - left} of "
            f"{len(cells)}</span></h2>{form_html(cells, may)}<details><summary class=dim>Titles and dates</summary>"
            f"{whole}<ul>{''.join(lines)}</ul></details>")

def show_html(rows: Sequence[Any], may: bool) -> str:
    """A show, with what to watch next and its seasons; or a movie."""
    show, episodes = rows[0], [row for row in rows if row["season"] is not None]
    ids = html.escape(", ".join(f"{column[:4]} {show[column]}" for column in CONFIDENCE if show[column]))
    following = next((f"<p>Next: S{row['season']:02}E{row['episode']:02} <b>{isolated(row['name'])}</b></p>"
                      for row in episodes if row["season"] and not row["plays"]), "")
    return (f"<h1>{isolated(named(show['title'], show['year']))}</h1><p class=dim>{ids}</p>{following}" + "".join(
        season_html(list(group), may) for _, group in itertools.groupby(episodes, lambda row: row["season"])))

# path -> the head of its list ("": it shows a show), and the query for the rows.  Those of a list have a path, a name,
# what is said, a day ("": none), and whether a person must answer (NULL: there is nothing to answer).
LOG_LINKS = " ".join(f'<a href="/log?status={each}">{each or "all"}</a>' for each in ("", *ENTRY_STATUSES, "waiting"))
VIEWS = {
    "/watched": ("<h1>Watched</h1>{}<ul>", f"""SELECT 'watched/' || id AS path, named(title, year) AS name,
        local_time('%Y-%m-%d', last_watched_at) AS day, NULL AS open, iif(type = 'episode', watched || ' of ' ||
        episodes, iif(watched, 'movie', 'movie, not yet')) AS said FROM ({SHOWS})"""),
    "/watched/ID": ("", """SELECT show.*, season, episode, e.title AS name, (SELECT group_concat(iif(at IS NULL,
        'some day', local_time('%Y-%m-%d %H:%M', at)) || ' (' || source || ')', char(10)) FROM (SELECT at, source
        FROM play WHERE (show_id, season, episode) = (e.show_id, e.season, e.episode) ORDER BY at LIMIT 20)) AS plays
        FROM show LEFT JOIN episode e ON show_id = id WHERE id = :id ORDER BY season, episode
        LIMIT :most OFFSET :skip"""),
    "/log": (f"<h1>What became of each webhook</h1><p>{LOG_LINKS}</p><ul class=log>", f"""SELECT NULL AS open,
        coalesce('watched/' || show_id, 'questions/' || conflict_id, '') AS path, '' AS day,
        coalesce(nullif(iif(type = 'movie', '', show), ''), nullif(title, ''), event) || iif(type = 'episode' AND
        season + episode NOT NULL, printf(' S%02dE%02d', season, episode), '') AS name,
        local_time('%Y-%m-%d %H:%M ', received_at) || status || ifnull(' ' || action, '') ||
        ifnull(' ' || reason, '') AS said FROM ({ENTRIES})"""),
    **dict.fromkeys(("/questions", "/questions/ID"), ("<h1>Which show is it?</h1><ul>", f"""SELECT type, candidates,
        'questions/' || id AS path, named(title, year) AS name, '' AS day, resolution IS NULL AS open,
        iif(resolution IS NULL, replace(kind, '_', ' ') || ', ' || waiting || ' waiting', 'answered: ' ||
        ifnull((SELECT named(title, year) FROM show WHERE id = resolution), resolution)) AS said
        FROM ({QUESTIONS}) WHERE ifnull(:id, id) = id ORDER BY open DESC, id DESC LIMIT :most OFFSET :skip""")),
    **dict.fromkeys(("/mappings", "/mappings/ID"), ("<h1>Mappings</h1>{}<ul>", f"""SELECT type, 0 AS open,
        'mappings/' || id AS path, iif(title = '', subject, title) AS name, local_time('%Y-%m-%d', at) AS day,
        iif(show_id, named(show, m.year), 'ignored') || printf(', by %s %.2f, %d play%s', by, confidence, plays,
        iif(plays = 1, '', 's')) AS said, {CHOICES.format("'[]'", "m")} AS candidates FROM ({MAPPINGS}) m"""))}

# --- the world
FORMS = {"/watched/ID": "show", "/questions/ID": "conflict", "/mappings/ID": "mapping"}       # ID: of this table

def tracker_answer(work: Callable[..., Answer], tracker: Tracker, *asked: object) -> Answer:
    """What tracker_page() or tracker_change() answers; 400 for what is asked wrongly, 503 if the disk fails."""
    try:
        with tracker.faults():
            return work(tracker, *asked)
    except ConfigError as error:
        raise WebhookError(400, f"{str(error)[0].upper()}{str(error)[1:]}") from error
    except TrackerError as error:
        raise WebhookError(503, "The watch tracker cannot be used now; try again later.") from error

def tracker_page(tracker: Tracker, may: bool, path: str, query: str, host: str, no: int | None = None) -> Answer:
    """A page.  may: whether this person may change something.  no: the number in its path; None: it has none."""
    asked, nonce, (head, sql) = dict(urllib.parse.parse_qsl(query)), secrets.token_urlsafe(16), VIEWS[path]
    page, size = min(number(asked.get("page")) or 1, MAX_PAGE), PAGE_EPISODES if no else PAGE_ROWS
    words, status = text(asked.get("q")), text(asked.get("status"))
    with tracker.turn():
        rows = tracker.all(sql, id=no, words=normal(words), status=status, show="", show_id=None,
                           most=size + 1, skip=(page - 1) * size)
    if path.endswith("/ID") and not rows:
        raise WebhookError(404, "There is no such thing here.")
    ways = [(word, urllib.parse.urlencode({"q": words, "status": status, "page": to})) for word, to, there in (
        ("Back", page - 1, page > 1), ("More", page + 1, len(rows) > size)) if there]
    links = " ".join(f'<a href="?{html.escape(way)}">{word}</a>' for word, way in ways)
    tip = "" if may else ("To change something here, give the daemon a webhook secret: <code>streamerbrainz.py "
                          "secret</code> makes one.")
    main = list_html(head, rows[:size], words, may) if head else show_html(rows[:size], may)
    main += f"<p>{links}</p><p class=dim>{'' if rows else 'Nothing is here. '}{tip}</p>"
    return html_answer(layout(main, nonce, ASK_FIRST, path.split("/")[1]), nonce)

def tracker_change(tracker: Tracker, written: threading.Event, path: str, form: str, no: int = 0) -> Answer:
    """Do what a form says, and show a page again.  A button of a show says "mark S01E02", "unmark S01"."""
    fields, table, place = dict(urllib.parse.parse_qsl(form)), FORMS[path], path.removesuffix("/ID")
    word = text(fields.get("word"))
    with tracker.turn(), tracker.transaction():
        if not tracker.one(f"SELECT 1 FROM {table} WHERE id = ?", no):
            raise WebhookError(404, "There is no such thing here.")
        if table == "show":
            name, _, code = word.partition(" ")
            season, episode = episodes_of(code)
            if name not in ("mark", "unmark") or season is None or not tracker.one(
                    f"SELECT 1 FROM episode WHERE {SOME}", no, season, episode):
                raise ConfigError("there is no such episode.")
            (tracker.mark if name == "mark" else tracker.unmark)(no, season, episode)
            place = f"/watched/{no}?page={number(fields.get('page')) or 1}#{code.partition('E')[0]}"
        else:
            correct(tracker, table, no, word)
    written.set()
    return Answer(303, headers={"Location": place, "Cache-Control": "no-store"})

def add_pages(pages: Pages, tracker: Tracker, written: threading.Event) -> None:
    """Add the tracker's pages and forms to the others.  written: tells the worker that there is more to do."""
    by = functools.partial
    pages.paths |= {path: by(tracker_answer, tracker_page, tracker, pages.has_secret, path) for path in VIEWS}
    pages.forms |= {path: by(tracker_answer, tracker_change, tracker, written, path) for path in FORMS}

# === Daemon: all of it together (run, players) ===
# What for: the program that runs all day, with its log, signals and threads; and `players`, to configure it.
# Way: Config -> Listener, PlexServer, Hooks, Tracker -> serve() starts their threads -> Watcher.run() until SIGTERM
# Threads: "signals" waits for signals, which all others block.  A bug in any thread ends the process, with a traceback.
# Needs of Player: CLAIMS, Inbox, PlexServer, Reply, Session, Status, Watcher, Webhook, exchange, origin, put_message,
#   server_of, watch_stream; of Page: MAX_COVER, Board, Pages, status_sentence; of Listener: LARGE_BODY, Gate, Listener,
#   configured_url, own_url, webhook_url; of Hooks: Hooks, hook_command, plain_environment; of Tracker: Entry, Journal,
#   Tracker, Worker, glance; of Browse: add_pages

def check_complete(config: Config) -> None:
    """Raise ConfigError if flags that need each other are not all there."""
    missing = [flag for flag in ("-plex-server-url", "-plex-token-file", "-plex-machine-id")
               if not getattr(config, flag[1:].replace("-", "_"))]
    if missing and (config.plex_server_url or config.plex_token_file):
        hint = " (`streamerbrainz.py players` shows the identifiers.)" if "-plex-machine-id" in missing else ""
        raise ConfigError(f"half a configuration: to ask the server, add {' and '.join(missing)}; "
                          f"to use webhooks only, give neither -plex-server-url nor -plex-token-file.{hint}")
    if config.plex_ca_file and not config.plex_server_url.startswith("https:"):
        raise ConfigError("-plex-ca-file is given, but no -plex-server-url that begins with https://.")
    if config.tmdb_token_file and not config.tracker_db:
        raise ConfigError("-tmdb-token-file is given, but no -tracker-db; only the tracker uses it.")

def session_row(session: Session, configured: bool) -> tuple[dict[str, object], str]:
    """A Session as `players` prints it: with the log's and Plex's words; in three lines, the last a flag to copy."""
    item, name, machine_id = session.item, session.player_title, session.machine_identifier
    made = ", ".join(filter(None, (session.product, session.platform, "configured" if configured else "")))
    lines = (f"{' *'[configured]} {name or 'without a name'}{f' ({made})' if made else ''}",
             f"    {playing_sentence(session.state, item)}", f"    -plex-machine-id {shlex.quote(machine_id)}")
    return {"machine_id": machine_id, "player": name, "product": session.product, "platform": session.platform,
            "user": session.user, "state": session.state, "type": item.type, "title": item.title,
            "grandparent_title": item.grandparent_title, "parent_title": item.parent_title,
            "configured": configured}, "\n".join(map(printable, lines))

# --- the world
# -- The log
LEVELS = {"error": (logging.ERROR, 3), "warn": (logging.WARNING, 4),      # and the journal's priorities
          "info": (logging.INFO, 6), "debug": (logging.DEBUG, 7)}

def log_line(as_json: bool, journal: bool, record: logging.LogRecord) -> str:
    """A record of say() as a line of the log.  journal (systemd's): with its priority and no time."""
    sentence, fields = record.getMessage(), getattr(record, "fields", {})
    level, priority = next((name, priority) for name, (no, priority) in LEVELS.items() if no <= record.levelno)
    at = "" if journal else local_time("%Y-%m-%dT%H:%M:%S%z" if as_json else "%Y-%m-%d %H:%M:%S", record.created)
    head = {key: word for key, word in (("time", at), ("level", level), ("msg", sentence)) if word}
    begin = f"{at} {level.upper():5} " if at else ""
    line = json_line({**head, **fields}) if as_json else f"{begin}{text_line(sentence, fields)}"
    return f"<{priority}>{line}" if journal else line

def in_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr goes to the systemd journal, which reads a line's priority (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):            # stderr may be closed
        status = os.fstat(2)
        return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False

class LogHandler(logging.Handler):
    """Writes the log to a stream, and never blocks: on a pipe, the journal or a terminal that is held."""

    def __init__(self, stream: Any):      # raises OSError if it has no descriptor
        super().__init__()
        self.descriptor, self.encoding, self.room = stream.fileno(), stream.encoding, select.poll()
        self.dropped, self.torn = 0, b""              # torn: what ends a line that was cut off
        # A terminal may have room for half of a line, and block.  Opened anew, it does not; nor do others notice.
        with contextlib.suppress(OSError):            # it is no terminal
            self.descriptor = os.open(os.ttyname(self.descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self.room.register(self.descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it.  One for a stream that is closed or broken is lost."""
        # A pipe or socket that has room takes PIPE_BUF bytes without a wait: nothing else of its settings is touched.
        line = whole = self.torn + f"{self.format(record)}\n".encode(self.encoding, "backslashreplace")
        with contextlib.suppress(OSError, RuntimeError):        # RuntimeError: no more threads
            with contextlib.suppress(BlockingIOError):
                while line and not self.dropped and self.room.poll(0):
                    line = line[os.write(self.descriptor, line[:select.PIPE_BUF]):]
            self.torn = b"" if not line else b"\n" if len(line) < len(whole) else self.torn
            if line and not self.dropped:
                threading.Thread(target=self.tell, name="log", daemon=True).start()
            self.dropped += bool(line)

    def tell(self) -> None:
        """When there is room again, say how many were dropped; in a thread: the next line may come hours later."""
        self.room.poll()
        with self.lock:  # type: ignore[union-attr]
            dropped, self.dropped = self.dropped, 0
            say(logging.WARNING, f"{dropped} lines of the log were dropped: nobody read them")
            self.dropped *= dropped                   # no room for that, either: the next thread tells

def set_up_log(config: Config) -> None:
    """Send the log to stderr, in the form that the flags say."""
    logging.raiseExceptions = False               # a closed stderr must not end the daemon
    handler: logging.Handler = logging.StreamHandler()
    with contextlib.suppress(OSError, AttributeError):        # stderr is a test's, or closed
        handler = LogHandler(sys.stderr)
    handler.format = functools.partial(  # type: ignore[method-assign]
        log_line, config.log_format == "json", in_journal(os.environ))
    log.handlers[:], log.propagate = [handler], False
    log.setLevel(LEVELS[config.log_level][0])

# -- systemd
class Systemd:
    """The service manager (sd_notify(3)); if there is none, nothing happens."""

    def __init__(self, environ: Mapping[str, str]):
        self.address = re.sub("^@", "\0", environ.get("NOTIFY_SOCKET", ""))
        usec = number(environ.get("WATCHDOG_USEC")) or 0
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.wake_s = usec / 2e6 if usec and ours and self.address else math.inf      # half of the watchdog's patience
        self.pinged_at, self.told = -math.inf, ""

    def notify(self, *assignments: str) -> None:
        """Send READY=1 and the like; a manager that has gone, or was never there, is no error."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.settimeout(STOP_S)               # a manager that does not read must not stop us
            notifier.sendto("\n".join(assignments).encode(), self.address)

    def tell(self, status: Status) -> None:
        """Send STATUS= when it changes, and WATCHDOG=1 in time.  The main loop calls this: it is what can hang."""
        if self.address:
            now = time.monotonic()
            sentence = status_sentence(status, now)
            doing = sentence.rpartition(";")[0]       # without the age of the last webhook, which always changes
            if doing != self.told or now >= self.pinged_at + self.wake_s / 20:       # else a sleep could follow
                self.notify("WATCHDOG=1", f"STATUS={sentence}")
                self.pinged_at, self.told = now, doing

# -- Signals and threads
STOP_S, CLOSE_S = 0.3, 0.5    # for the watcher to end (milliseconds, unless it asks a server), then for a tracker write
ADDRESS_S, WAKE_S = 10.0, 60.0    # between questions for our address; the longest sleep, after which it is asked for

def block_signals() -> set[signal.Signals]:
    """Block the signals for us, but not one that `nohup` ignores, in this thread and all it will start; -> those."""
    signals = {no for no in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(no) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals

def take_signals(signals: set[signal.Signals], inbox: Inbox, end: Callable[[], object]) -> NoReturn:
    """SIGHUP is a look, any other signal the end; a thread of its own, while all others block signals."""
    # No handler: Python runs it in the main thread, which has ended.  If the watcher hangs, this one ends the process.
    while signal.sigwait(signals) == signal.SIGHUP:
        inbox.put(signal.SIGHUP)
    inbox.put(signal.SIGTERM)
    time.sleep(STOP_S)
    end()
    os._exit(0)

def announce(config: Config, port: int, query: str) -> Iterator[None]:
    """Log our webhooks' URL, and again when this machine has another address (DHCP) or one at last."""
    said, nameless = configured_url(config, port), webhook_url(socket.gethostname(), port)
    flags = {"flags": config.flags_file} if config.flags_file else {}
    say(logging.INFO, "listening", version=VERSION, webhook_url=said + query, **flags)
    while True:
        asked_at = time.monotonic()
        while time.monotonic() < asked_at + ADDRESS_S:
            yield                                     # goes on whenever the watcher does
        if (url := configured_url(config, port)) not in (said, nameless):
            news = "is known now" if said == nameless else "has changed"
            say(logging.INFO, f"this machine's address {news}: Plex needs this URL", webhook_url=url + query)
            said = url

def say_goodbye(listener: Listener, systemd: Systemd, hooks: Hooks | None, trackers: Sequence[Tracker],
                lock: threading.Lock) -> None:
    """The end, once: in the watcher, or in the thread of the signals if the watcher hangs."""
    with lock:
        if not listener.closing.is_set():
            systemd.notify("STOPPING=1")
            listener.close()
            if hooks:
                hooks.end()
            for tracker in trackers:                  # none or one, which is closed so that no -wal stays
                if tracker.lock.acquire(timeout=CLOSE_S):     # and kept: nobody opens it again
                    tracker.close()
            say(logging.INFO, "stopped listening")

def start(name: str, inbox: Inbox, target: Callable[..., object], *args: object) -> None:
    """Start a thread that ends with the process.  A bug in it is told to the watcher, which ends the process."""
    def carefully() -> None:
        try:
            target(*args)
        except Exception as error:
            inbox.put(error)
    threading.Thread(target=carefully, name=name, daemon=True).start()

def watched_environment(entry: Entry) -> dict[str, str]:
    """What a hook finds in its environment when an episode or movie was marked as watched."""
    number_of = {"SEASON": entry.season, "EPISODE": entry.episode} if entry.type == EPISODE else {}
    return plain_environment({"PLAYER_EVENT": "watched", "NAME": entry.title, "SHOW": entry.show_title, **number_of,
                              "PLEX_TYPE": entry.type, "PLEX_RATING_KEY": entry.rating_key, "TRACK_ID": entry.guid})

def keep_webhook(inbox: Inbox, journal: Journal | None, board: Board, machine_id: str, webhook: Webhook,
                 thumb: memoryview) -> None:
    """Give a webhook to the watcher, and put it into the journal; raises WebhookError 503 if it is not safe there."""
    if not put_message(inbox, webhook):
        raise WebhookError(503, "Too many webhooks are waiting; try again in a moment.")
    if journal:                                       # if a write fails, the webhook is judged all the same
        try:
            journal.append(webhook)
        except TrackerError as error:
            raise WebhookError(503, "The watch tracker cannot be written now; try again later.") from error
    ours = machine_id in ("", webhook.player_uuid) and webhook.event in CLAIMS and len(thumb) <= MAX_COVER
    if thumb and ours and webhook.item and webhook.item.identity != board.brought[0]:
        board.brought = webhook.item.identity, bytes(thumb)

def serve(config: Config, listener: Listener, gate: Gate, plex: PlexServer | None, hooks: Hooks | None,
          inbox: Inbox) -> Callable[[], None]:
    """Start all threads; -> what is left to do: to watch the player, until SIGTERM is in the inbox."""
    systemd, board, trackers, journal = Systemd(os.environ), Board(plex), list[Tracker](), None
    end = functools.partial(say_goodbye, listener, systemd, hooks, trackers, threading.Lock())
    start("signals", inbox, take_signals, block_signals(), inbox, end)
    own = functools.partial(own_url, str(listener.server_address[0]), listener.port, config.plex_server_url)
    pages = Pages(board, bool(gate.secret), own)
    if config.tracker_db:
        trackers.append(tracker := Tracker(config.tracker_db, create=True, patient=True))
        tracker.plex = plex
        journal, worker = Journal(tracker, config.accounts), Worker(config, tracker, plex)
        if hooks:
            worker.tell = lambda entry: hooks.inbox.put(watched_environment(entry))
        start("worker", inbox, worker.run, journal.written)
        pages.glance = functools.partial(glance, tracker, journal)
        add_pages(pages, tracker, journal.written)
    keep = functools.partial(keep_webhook, inbox, journal, board, config.plex_machine_id)
    start("listener", inbox, listener.serve, gate, pages, keep, functools.partial(put_message, inbox))
    address = announce(config, listener.port, "?token=..." if gate.secret else "")
    next(address)
    if plex is None:
        say(logging.INFO, "no -plex-server-url: only webhooks tell what plays")
    elif config.plex_events:
        start("stream", inbox, watch_stream, plex, inbox)
    if hooks:
        start("hooks", inbox, hooks.run)
    def tell(status: Status, changes: Sequence[Change]) -> None:
        if hooks:
            for change in changes:
                hooks.inbox.put(change)
        board.publish(status, changes)
        systemd.tell(status)
        next(address)
    def watch() -> None:
        try:
            Watcher(config, inbox, plex, tell, min(systemd.wake_s, WAKE_S)).run()
        finally:
            end()
    systemd.notify("READY=1")
    return watch

def outlive_main(work: Callable[[], None]) -> None:
    """Do the daemon's work in a thread that goes on after the main thread has ended: Python waits for it."""
    # For CPython keeps the syntax tree of a script, 10 MB of this one, until its main thread ends.
    stays = (3, 12) <= sys.version_info < (3, 12, 3)          # they start no thread after the main thread's end
    def go_on() -> None:
        try:
            if not stays:
                threading.main_thread().join()
            with contextlib.suppress(ImportError, OSError, AttributeError):      # another C library lacks it
                import ctypes  # here: the other commands do without
                ctypes.CDLL(None).malloc_trim(0)
                ctypes.CDLL(None).mallopt(-3, LARGE_BODY)       # M_MMAP_THRESHOLD: else each thread keeps a picture
            work()
        except BaseException:                         # a bug of ours: systemd starts the daemon again
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return go_on() if stays else threading.Thread(target=go_on, name="watcher").start()

# -- The port: free, ours already, or another program's
def local_url(config: Config, path: str) -> str:
    """The URL at which this machine reaches a daemon with these flags; 0.0.0.0 and :: are none to connect to."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.webhooks_host, config.webhooks_host)
    return urllib.parse.urljoin(webhook_url(host, config.webhooks_port), path)

def ask_daemon(config: Config, path: str) -> Reply:
    """What a daemon with these flags answers; raises PlexError."""
    return exchange(local_url(config, path), {"Host": "localhost"})       # our own name may look like a website's

def port_holder(port: int) -> str:
    """The program that listens on a TCP port, as far as /proc shows it: other users' only to root.  "": not shown."""
    # A line has the local address in hexadecimal, the state (0A: listening) and the socket's inode, as its 10th word.
    links = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:
            links |= {f"socket:[{fields[9]}]" for fields in map(str.split, lines)
                      if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port}
    for pid in filter(str.isdigit, os.listdir("/proc") if links else ()):
        with contextlib.suppress(OSError):
            if any(os.readlink(f"/proc/{pid}/fd/{fd}") in links for fd in os.listdir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                    return f"{comm.read().strip()} (process {pid})"
    return ""

def open_listener(config: Config) -> Listener | None:
    """The listener; None: another StreamerBrainz has the port.  Raises ConfigError, with what to do about it."""
    host, port = config.webhooks_host, config.webhooks_port
    try:
        return Listener(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(
                f"-webhooks-port: {port} is for root only; give one above 1023." if error.errno == errno.EACCES else
                f"-webhooks-host: cannot listen there ({why(error)}); give an address of this machine.") from error
        other = ""
        with contextlib.suppress(PlexError):
            other = ask_daemon(config, "/healthz").headers.get("Server", "")
        if not other.startswith("StreamerBrainz/"):
            raise ConfigError(f"-webhooks-port: {port} is held by {port_holder(port) or 'another program'}; "
                              "end that, or give another port.") from error
        # systemd takes an end without READY=1 for a failure: there, "nothing to do" must be an error.
        if os.environ.get("NOTIFY_SOCKET"):
            holder = f", {name}," if (name := port_holder(port)) else ""
            raise ConfigError(f"-webhooks-port: another StreamerBrainz{holder} listens on {port}; "
                              "end it (and remove its cron lines) first.") from error
        return None

# -- run, players
def run(config: Config) -> int:
    """The daemon.  If another one listens already, it says so and ends well: a cron line may start it each minute."""
    secret = SecretFile("-webhook-secret-file", config.webhook_secret_file) if config.webhook_secret_file else None
    hooks = Hooks(hook_command(config.on_event), config.active_timeout_s) if config.on_event else None
    plex = server_of(config)
    if listener := open_listener(config):
        outlive_main(serve(config, listener, Gate(secret, config.webhooks_a_minute), plex, hooks, queue.SimpleQueue()))
    else:
        level = logging.INFO if sys.stderr and sys.stderr.isatty() else logging.DEBUG      # cron asks each minute
        say(level, "StreamerBrainz already listens there: nothing to do", port=config.webhooks_port)
    return 0

def players(config: Config) -> int:
    """Print every player in the sessions."""
    url, token = config.words[0] if config.words else config.plex_server_url, ""
    if not url:
        raise ConfigError("players: name the server, as in: streamerbrainz.py players 192.168.1.5:32400")
    if not config.plex_token_file and not sys.stdin.isatty():
        raise ConfigError("players: give the token in a file, with -plex-token-file.")
    with contextlib.suppress(EOFError):               # without echo; and on a command line, ps would show it
        token = (read_secrets("-plex-token-file", config.plex_token_file)[0][0] if config.plex_token_file else
                 bare_token(getpass.getpass("Plex token (it is not shown): ")))
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("players: a token is one word of plain characters.")
    rows = [session_row(session, session.machine_identifier == config.plex_machine_id)
            for session in PlexServer(url, lambda: token, config.plex_ca_file).sessions()]
    nothing = f"Nothing plays on {origin(url)}. A player shows up only while it plays: press play, then try again."
    return print_rows(config, [fields for fields, _ in rows], "\n\n".join(lines for _, lines in rows) or nothing)

# === Setup: one file -> a daemon that was seen to work (ask_plextv, Setup, login, webhook, setup, uninstall) ===
# What for: nobody should have to find a token, an identifier or an address, or to edit a file.  `setup` goes the whole
#   way and `uninstall` takes it back; `login` and `webhook` are steps of it alone.  Nothing is changed before a yes.
# Way: a code -> token -> the account's servers -> an address that answers -> the player in its sessions
#   -> files, daemon, webhook -> each witness of a change, as the running daemon tells it
# Threads: one for each address of a server that is tried.
# Needs of Player: KNOWN, MAX_LOOKUPS, PlexServer, Session, encode_webhook, exchange, find_addresses, origin,
#   tls_context; of Page: clock; of Listener: TEST_EVENT, WEBHOOK_PATH, configured_url, given_secrets, guess_address;
#   of Hooks: run_hook; of Tracker: Tracker, plural, tracker_command; of Daemon: ask_daemon, open_listener, port_holder

# -- Answers of plex.tv, which may have any shape -> values, or a PlexError
# Servers and players that are read; webhooks of the account, which are read whole or not at all, since they are written
# back; characters of a URL.  How long a code may last (Plex says 900 s).
MAX_RESOURCES, MAX_URLS, MAX_URL, MAX_PIN_S = 200, 100, 2000, 1800
WITHOUT = "plex.tv answers without {}; try again later."      # of an answer of another shape
NO_PASS = "This account has no Plex Pass: Plex sends no webhooks, and none are needed."

class Resource(NamedTuple):
    """A server or player of the account."""
    name: str
    identifier: str               # clientIdentifier: its machineIdentifier
    product: str
    provides: Sequence[str]       # server, player, ...
    owner: str                    # who shares it; "": it is the account's own
    urls: Sequence[str]           # of a server, the best first

def plextv_error(status: int, body: bytes) -> PlexError:
    """Why plex.tv refused: by the status, and its own code and words, which are JSON, or XML all the same."""
    code, said = (re.search(rb'\b%b"?\s*[:=]\s*"?([^"<>{},]{1,200})' % name, body) for name in (b"code", b"message"))
    if code and code[1] == b"1043":
        return PlexError("pass", NO_PASS)
    fault, remedy = {401: ("refused", "sign in anew: streamerbrainz.py login"), 404: ("missing", "begin anew"),
                     403: ("forbidden", "use the right account")}.get(status, ("starting", "try again later"))
    words = f" ({text(said[1].decode('utf-8', 'replace'))})" if said else ""
    return PlexError(fault, f"plex.tv answers {status}{words}: {remedy}.")

def parse_pin(body: bytes) -> tuple[str, str, int, str]:
    """A sign-in's id, the code to enter, how many seconds it lasts, and the token: "" until it is entered."""
    fields = json_object(json_value(body))
    pin_id, code, token = (text(fields.get(key)) for key in ("id", "code", "authToken"))
    if not (re.fullmatch(r"\w+", pin_id) and re.fullmatch(r"\w{1,40}", code) and re.fullmatch("[!-~]*", token)):
        raise PlexError("nonsense", WITHOUT.format("a code to enter"))
    return pin_id, code, min(number(fields.get("expiresIn")) or MAX_PIN_S, MAX_PIN_S), token

def parse_account(body: bytes) -> tuple[str, bool]:
    """The name of an account, and whether it has webhooks (with Plex Pass)."""
    fields = json_object(json_value(body))
    if not (name := next(filter(None, (text(fields.get(key)) for key in ("username", "title", "email"))), "")):
        raise PlexError("nonsense", WITHOUT.format("the account's name"))
    features = json_object(fields.get("subscription")).get("features")
    return name, isinstance(features, list) and "webhooks" in features

def server_urls(connections: object) -> list[str]:
    """The URLs of a server: http in its own network, https there, https from elsewhere.  Never Plex's relay."""
    found = dict[str, int]()      # and the rank of each
    for get in (json_object(each).get for each in (connections[:MAX_URLS] if isinstance(connections, list) else ())):
        host, is_local = text(get("address")), get("local") is True
        plain = f"http://{f'[{host}]' if ':' in host else host}:{number(get('port')) or ''}" if is_local else ""
        for rank, url in ((0, plain), (2 - is_local, text(get("uri")))):
            if not get("relay") and re.fullmatch(r"https?://([\w.-]+|\[[\w:.]+\])(:\d{1,5})?", url, re.ASCII):
                found.setdefault(url, rank)
    return sorted(found, key=found.__getitem__)

def parse_resources(body: bytes) -> list[Resource]:
    """The servers and players of an account."""
    if not isinstance(found := json_value(body), list):
        raise PlexError("nonsense", WITHOUT.format("a list of servers"))
    return [Resource(text(get("name")), identifier, text(get("product")), text(get("provides")).split(","),
                     "" if get("owned") is True else text(get("sourceTitle")) or "another person",
                     server_urls(get("connections")))
            for get in (json_object(each).get for each in found[:MAX_RESOURCES])
            if re.fullmatch("[!-~]+", identifier := text(get("clientIdentifier")))]

def parse_webhooks(body: bytes) -> list[str]:
    """The URLs of the account's webhooks, all of them; in JSON, or in XML all the same."""
    found = json_value(body)
    with contextlib.suppress(ElementTree.ParseError, MemoryError):       # it is JSON, or neither
        root = ElementTree.fromstring(b"" if b"<!" in body else body, ElementTree.XMLParser(encoding="utf-8"))
        found = [each.attrib if each.tag == "webhook" else None for each in root]
        found = found if found or root.tag == "webhooks" else None
    urls = [json_object(each).get("url") for each in found] if isinstance(found, list) else [None]
    if len(urls) > MAX_URLS or not all(isinstance(url, str) and "" != url == text(url, MAX_URL) for url in urls):
        raise PlexError("nonsense", WITHOUT.format("a list of webhooks that can be read whole"))
    return [str(url) for url in urls]

class Witnessed(NamedTuple):
    """What a daemon has witnessed of its player."""
    changes: Sequence[str]        # the newest first, in words, each with its time before it
    arrived: int                  # webhooks that came with their change
    delay_s: float                # their median delay; 0: none came

def parse_now(now: bytes) -> Witnessed:
    """What a daemon's /now tells."""
    fields = json_object(json_value(now))
    webhooks, changes = json_object(fields.get("webhooks")), fields.get("changes")
    delay_s, first = webhooks.get("median_delay_s"), {"events": "the event stream first, then by ",
                                                      "webhook": "a webhook first, then by "}
    said = [f'{text(each.get("at"))} {text(each.get("state"))} "{text(each.get("title"))}": seen by '
            f'{first.get(text(each.get("by")), "")}the sessions'
            for each in map(json_object, changes if isinstance(changes, list) else ())]
    return Witnessed(said, number(webhooks.get("arrived")) or 0, delay_s if isinstance(delay_s, (int, float)) else 0.0)

# Dots of 0 to 9 and A to Z: of each five rows of three, in octal.
FONT = ("755572622771747717175571174717747577112275757757172575565656344436555674647746443455355755722271115255655"
        "444475776565555255526564425573656553421672222555575555255775552555522271247")

def large(code: str) -> str:
    """A code drawn in large characters, as lines."""
    drawn = code if re.fullmatch("[0-9A-Za-z]{1,8}", code) else ""
    rows = ("0".join(f"{int(FONT[5 * int(each, 36) + row]):03b}" for each in drawn) for row in range(5))
    return "".join(f"{'':8}{row}\n".replace("0", "  ").replace("1", "##") for row in rows)

# -- What is to be written: webhooks, flags, the unit
def with_webhook(urls: Sequence[str], ours: str, is_ours: Callable[[str], bool]) -> list[str]:
    """The URLs with ours in the place of the first that is ours, or at the end; "": without it.  The others stay."""
    mine = [is_ours(url) for url in urls]
    place = (*mine, True).index(True)
    kept = [url for url, is_mine in zip(urls, mine, strict=True) if not is_mine]
    return [*kept[:place], *([ours] if ours else ()), *kept[place:]]

def with_flags(content: str, values: Mapping[str, str]) -> str:
    """A flags file in which these flags have these values.  Its other lines stay, and new ones stand at the end."""
    content = "".join(f"{line}\n" for line in content.splitlines())
    for flag, value in values.items():
        plain = value if re.fullmatch(r"[\w@%+=:,./~-]+", value, re.ASCII) else shlex.quote(value)
        line = f"{flag}{'=' if value.startswith('-') else ' '}{plain}"
        def renewed(found: re.Match[str], line: str = line, value: str = value) -> str:
            is_same = shlex.split(found[1], comments=True) == [value]
            return found[0] if is_same else line + (found[2] or "")
        pattern = rf"^[ \t]*-?{flag}(?:[ \t]*=|[ \t]+)(\S.*?)([ \t]+#[^'\"\n]*)?$"
        content, count = re.subn(pattern, renewed, content, flags=re.MULTILINE)
        content += "" if count else f"{line}\n"
    return content

# A host that may be a token (Plex's have 20 characters), as no "plex.lan" and no "plex-media-server" is.
TOKEN_LIKE = r"(?![a-z-]+(:\d*)?$)[\w-]{16,}(:\d*)?"

def server_url(word: str) -> str:
    """The base URL of a server, without a slash at its end; raises ValueError, without the URL: it may hold a token."""
    try:
        parts = urllib.parse.urlsplit(word)
        if (parts.scheme not in ("http", "https") or not (parts.hostname and parts.hostname.encode("idna"))
                or parts.port == 0 or not re.fullmatch("[!-~]+", word) or re.fullmatch(TOKEN_LIKE, parts.netloc)):
            raise ValueError(word)
    except ValueError:                                # "http://[", a port above 65535, or "plex..lan"
        raise ValueError("this is no URL of a server; give one such as http://192.168.1.5:32400") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("the URL carries more than an address; the token goes into a -plex-token-file")
    return word.rstrip("/?#")

def named_server(words: str) -> str:
    """The base URL of a server that a person names by HOST, HOST:PORT or a URL; raises ValueError, as server_url()."""
    if "//" in words:
        return server_url(words)
    url = server_url(f"http://{words}")
    return url if urllib.parse.urlsplit(url).port or "/" in words else f"{url}:32400"

def without_secrets(url: str) -> str:
    """A URL without what may be a secret in it: user, password, query, and a path of other words than ours."""
    found = re.fullmatch(r"(https?://)(?:[^/?#]*@)?((?:[\w.-]+|\[[\da-f:.]+\])(?::\d+)?)"
                         r"((?:/(?:webhooks?|plex)(?![\w.~%@-]))*/?)(.*)", url, re.I | re.S)
    # In "http://me:1/2@host/" the password goes on behind what looks like the host and its port.
    if not found or ("@" in found[4] and len(found[3]) < 2):
        return url and "/..."
    scheme, host, path, rest = found.groups()
    return scheme + host + (f"{path}?token=..." if rest[:1] in ("&", ";", "?", "#") else "/..." if rest else path)

def url_parts(url: str) -> urllib.parse.SplitResult | None:
    """The parts of an http URL; None: it is none."""
    with contextlib.suppress(ValueError):             # "http://[", or a port above 65535
        parts = urllib.parse.urlsplit(url)
        return parts if parts.hostname and parts.port != 0 and re.fullmatch("https?://[!-~]+", url) else None
    return None

def has_secret(url: str, valid: Iterable[str]) -> bool:
    """Whether a URL has one of these secrets."""
    return not {*given_secrets(url.partition("?")[2])}.isdisjoint(each.encode() for each in valid)

def wrapped(words: str, begin: str) -> str:
    """Words as lines of 80 columns: the first after `begin`, the others below it.  A URL is never broken."""
    return textwrap.fill(printable(words), 80, initial_indent=begin, subsequent_indent=" " * len(begin),
                         break_on_hyphens=False, break_long_words=False)

# streamerbrainz.service (a test holds both equal), with "|" for each line's end.
UNIT = """# User unit of StreamerBrainz: ~/.config/systemd/user/streamerbrainz.service|# Nothing in here needs \
editing: the flags are in ~/.config/streamerbrainz/flags, the Plex|# token in ~/.config/streamerbrainz/plex-token \
(mode 600).  To change the unit all the|# same, use a drop-in: systemctl --user edit streamerbrainz|# What it says: \
journalctl --user-unit streamerbrainz -f||[Unit]|Description=StreamerBrainz, what the Plex player is doing||[Service]|\
Type=notify|ExecStart=/usr/bin/python3 -I -X faulthandler %h/.local/bin/streamerbrainz.py \
@%h/.config/streamerbrainz/flags -plex-token-file %d/plex-token|\
LoadCredential=plex-token:%h/.config/streamerbrainz/plex-token|Restart=on-failure|RestartSec=5|# A wrong flag does not \
mend itself.|RestartPreventExitStatus=2|TimeoutStopSec=20|# A hung main loop is ended with SIGABRT; faulthandler then \
writes every thread's stack to the journal.|WatchdogSec=60||CapabilityBoundingSet=|LockPersonality=yes|\
MemoryDenyWriteExecute=yes|MemoryMax=256M|NoNewPrivileges=yes|PrivateDevices=yes|PrivateTmp=yes|# In a user unit the \
lines about files and capabilities work only with this one.|PrivateUsers=yes|ProtectClock=yes|ProtectControlGroups=yes|\
# Not "yes": that would hide /run/user, and with it the socket for READY=1.|ProtectHome=read-only|ProtectHostname=yes|\
ProtectKernelLogs=yes|ProtectKernelModules=yes|ProtectKernelTunables=yes|ProtectSystem=strict|RemoveIPC=yes|# AF_UNIX \
for READY=1, AF_NETLINK for name look-ups.|RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX|\
RestrictNamespaces=yes|RestrictRealtime=yes|RestrictSUIDSGID=yes|SystemCallArchitectures=native|\
SystemCallFilter=@system-service|SystemCallFilter=~@privileged @resources|TasksMax=96|# An empty home, but for what is \
read, and for the watch tracker's folder where there is one.|TemporaryFileSystem=%h:ro|BindReadOnlyPaths=%h/.local/bin \
%h/.config/streamerbrainz|BindPaths=-%h/.local/share/streamerbrainz|ReadWritePaths=-%h/.local/share/streamerbrainz|\
UMask=0077||[Install]|WantedBy=default.target|""".replace("|", "\n")

# --- the world
# -- plex.tv
# For an answer; after a 429 that does not say how long to wait, and at most; how often.
PLEXTV_S, BUSY_S, MAX_BUSY_S, MAX_BUSY = 10.0, 5, 60, 3
PINS, USER, WEBHOOKS = "/api/v2/pins", "/api/v2/user", "/api/v2/user/webhooks"
RESOURCES, SIGN_OUT = "/api/v2/resources?includeHttps=1&includeRelay=1&includeIPv6=1", "/api/v2/users/signout"

def ask_plextv(by: str, token: str, path: str, body: bytes | None = None, method: str = "") -> bytes:
    """The body of plex.tv's answer to this device; raises PlexError, and ConfigError if its id cannot be kept."""
    # by: the command, for which a client-id is made.  Another one is another device in the account.
    if not re.fullmatch(r"[\w-]{8,}", known := read_text(usual("client-id")).strip(), re.ASCII):
        write_private(usual("client-id"), (known := secrets.token_hex(16)) + "\n", by)
    url = os.environ.get("STREAMERBRAINZ_PLEXTV_URL", "https://plex.tv")      # the tests have a plex.tv of their own
    headers = {"Accept": "application/json", "X-Plex-Client-Identifier": known, "X-Plex-Product": "StreamerBrainz",
               "X-Plex-Version": VERSION, "X-Plex-Platform": sys.platform.capitalize(),
               "X-Plex-Device-Name": re.sub("[^!-~]", "?", socket.gethostname())}
    headers |= {"X-Plex-Token": token} if token else {}
    for left in range(MAX_BUSY, -1, -1):
        try:
            reply = exchange(url + path, headers, body, timeout_s=PLEXTV_S, context=tls_context(url), method=method)
        except PlexError as error:                    # without the advice, which is for our server
            said = str(error).partition(". ")[0].rstrip(".")
            raise PlexError(error.fault, f"{said}. Is this machine online? Try again later.") from None
        if reply.status != 429 or not left:
            break
        told = number(reply.headers.get("Retry-After"))
        wait_s = min(BUSY_S if told is None else told, MAX_BUSY_S)
        print(f"   plex.tv is asked too often (429); waiting {wait_s} s.", file=sys.stderr, flush=True)
        time.sleep(wait_s)
    if not 200 <= reply.status < 300:
        raise plextv_error(reply.status, reply.body)
    return reply.body

# -- Addresses: of servers, and of this machine
NEARBY, GDM, GDM_S = "http://127.0.0.1:32400", ("239.0.0.250", 32414), 1.0    # where servers listen for M-SEARCH

def nearby() -> list[str]:
    """The URLs of servers that answer in this network, and where one on this machine would be."""
    found, until = [NEARBY], time.monotonic() + GDM_S
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.sendto(b"M-SEARCH * HTTP/1.0\r\n\r\n", GDM)
        while (left := until - time.monotonic()) > 0 and len(found) < MAX_URLS:
            asker.settimeout(left)
            answer, (address, _) = asker.recvfrom(4096)
            port = re.match(rb"[^\n]*200 OK(?s:.*)\n *Port: *(\d{1,5})", answer)
            found += [f"http://{address}:{int(port[1])}"] if port else []
    return list(dict.fromkeys(found))

# What is said of a URL in the account.  NOT_HERE ends what is said of another machine: it may forward to us, as a proxy
# does.  Then a webhook is sent there, and ARRIVES proves it.
NO_URL, NOT_HERE, ARRIVES = "it is not an http URL", "nor a way to it", "arrives"
ITSELF = "is the server itself there"         # is said of localhost

def is_here(host: str) -> bool | None:
    """Whether a host is this machine: no socket can be bound to another one's address.  None: it has no address."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in find_addresses(host, 0, time.monotonic() + PLEX_S):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
        return False
    return None

def send_to(url: str) -> str:
    """What becomes of a webhook that is sent to this URL, in words; ARRIVES: it reaches a StreamerBrainz."""
    # It is one of our own, TEST_EVENT, which the listener answers with its name and otherwise ignores.
    content_type, body = encode_webhook(json.dumps({"event": TEST_EVENT}).encode())
    try:
        reply = exchange(url, {"Content-Type": content_type}, body, context=tls_context(url))
    except PlexError as error:
        return f"fails: it {str(error).partition(' ')[2].partition('. ')[0]}"
    if TEST_EVENT.encode() in reply.body:
        return ARRIVES
    return "is answered, but not by StreamerBrainz" if reply.status == 200 else f"is refused with {reply.status}"

def differences(url: str, config: Config, valid: Sequence[str]) -> list[str]:
    """How a URL differs from one that works, each in words; first the host, the usual mistake.  valid: secrets."""
    if not (parts := url_parts(url)) or (shown := without_secrets(url)) == "/...":
        return [NO_URL]
    # "localhost" is right only where both are one machine.  A server in a container is another one.
    host, address = str(parts.hostname), guess_address(config.plex_server_url)
    is_local = host in ("localhost", "::1") or host.startswith("127.")
    here = is_here((urllib.parse.urlsplit(config.plex_server_url).hostname or host) if is_local else host)
    port, path = parts.port or (443 if parts.scheme == "https" else 80), urllib.parse.urlsplit(shown).path or "/"
    differs = {
        f"{host} {ITSELF}; the address of this machine is {address}": is_local and not here,
        f"the host {host} has no address (a container's name?); this machine is {address}":
            not is_local and here is None,
        f"the host {host} is not this machine, {address}, {NOT_HERE}": not is_local and here is False,
        f"it is {parts.scheme}, and StreamerBrainz speaks http; "
        "Plex does not deliver to a certificate of your own": parts.scheme != "http",
        f"the port is {port}, not {config.webhooks_port}": port != config.webhooks_port,
        f"the path is {path}, not {WEBHOOK_PATH}": parts.path != WEBHOOK_PATH,
        f"the secret is {'another one' if given_secrets(parts.query) else 'missing'}":
            valid and not has_secret(url, valid)}
    return [words for words, so in differs.items() if so]

# -- The system, and its files
def command_fault(*words: str) -> str:
    """Run a command of the system; -> why it failed, "": it did not."""
    if not (path := shutil.which(words[0])):
        return f"{words[0]} is missing"
    runtime = {"XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")}     # `su` sets none
    status, output = run_hook([path, *words[1:]], runtime)
    return "" if status == 0 else text(output.decode("utf-8", "replace").strip()) or f"status {status}"

def systemctl(*commands: str) -> None:
    """Run commands of systemctl; raises ConfigError for the first that fails."""
    for words in commands:
        if fault := command_fault("systemctl", "--user", *words.split()):
            raise ConfigError(f"`systemctl --user {words}` failed ({fault}); see: {JOURNAL}")

def tilde(path: str) -> str:
    """A path, with ~ for the home."""
    return re.sub(f"^{re.escape(os.path.expanduser('~'))}(?=/)", "~", path)

def read_text(path: str) -> str:
    """What is in a file of ours; "" if it is not there, or unlike anything that we write."""
    with contextlib.suppress(OSError, ValueError):
        return read_regular(path, 2**21)[0].decode("utf-8-sig")
    return ""

def remove(*paths: str) -> None:
    """Delete files that may be there; raises OSError."""
    for path in filter(os.path.lexists, paths):
        os.unlink(path)

def unit_path() -> str:
    """Where systemd looks for our unit of this user."""
    return usual("flags").removesuffix("streamerbrainz/flags") + "systemd/user/streamerbrainz.service"

def unit_text(config: Config) -> str:
    """The unit for this machine and these flags: its Python, our places, and what else of the home is read."""
    home, files = os.path.expanduser("~"), [each for each in (config.plex_ca_file, config.webhook_secret_file) if each]
    for each in (config.plex_token_file, usual("flags"), *files, config.tracker_db):
        if re.search(r"[\s%\"'\\]", each) or (each == config.tracker_db and os.path.dirname(each) == home):
            raise ConfigError(f"setup: the unit cannot show {tilde(each)} alone: give it a folder of its own, and no "
                              "blank or sign of systemd (% \" ' \\) in its path.")
    unit, read = UNIT, [each if os.path.dirname(each) == home else os.path.dirname(each) for each in files]
    if command_fault("/usr/bin/python3", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"):
        unit = unit.replace("/usr/bin/python3", os.path.realpath(sys.executable))
        read.append(sys.base_prefix)                  # it may be in the home, as pyenv's
    here, data = map(os.path.dirname, (usual("flags"), config.tracker_db or usual("tracker.db")))
    more = (f"{each} " for each in sorted({*read} - {here}))
    for place, path in (("plex-token:%h/.config/streamerbrainz/plex-token", f"plex-token:{config.plex_token_file}"),
                        ("%h/.config/streamerbrainz", here), ("%h/.local/share/streamerbrainz", data),
                        ("ReadOnlyPaths=", "".join(("ReadOnlyPaths=", *more)))):
        unit = unit.replace(place, path)
    return unit.replace(f"{home}/", "%h/")

# -- setup, step by step
JOURNAL = "journalctl --user-unit streamerbrainz"
# From one try to the next (plex.tv: once a second at most); codes until we give up; how long a server may take to know
# a new token, a daemon to listen (cron starts it each minute), a person to press pause and play, a webhook to follow.
TRY_S, MAX_CODES, TOKEN_S, START_S, PROVE_S, FOLLOW_S = 1.0, 4, 10.0, 70.0, 180.0, 12.0
OWNED = ("plex_server_url", "plex_token_file", "plex_ca_file", "plex_machine_id", "webhook_secret_file",
         "webhooks_host", "webhooks_port", "tracker_db")      # whose flags setup writes
Todo = tuple[str, Callable[[], object]]       # what is to be done, in words, and how

class Setup:
    """The steps, with what they know so far and their words with a person.  With -yes each default is the answer."""
    account = ""                  # its name; "": not known
    has_webhooks = True           # the account, as far as it is known
    is_new = False                # signed in just now
    failed = False                # an error was told
    plex: PlexServer              # from step 2 on

    def __init__(self, config: Config):
        """Raises ConfigError if nobody can answer, or the webhook secret cannot be read."""
        asks = config.command != "webhook" or config.words[:1] in (("add",), ("remove",))
        if asks and not config.yes and not sys.stdin.isatty():
            flags = ", and other answers as flags (-plex-server-url, -plex-machine-id, -tracker-db)"
            raise ConfigError(f"{config.command}: it asks, but there is no terminal to answer on; give -yes for all "
                              f"defaults{flags * (config.command == 'setup')}.")
        if re.fullmatch(TOKEN_LIKE, config.plex_token_file) and not os.path.exists(config.plex_token_file):
            raise ConfigError("-plex-token-file: give the name of a file, and no token.")
        new_secret = usual("webhook-secret") if config.command == "setup" else ""
        paths = {"plex_ca_file": config.plex_ca_file, "tracker_db": config.tracker_db,
                 "plex_token_file": config.plex_token_file or usual("plex-token"),
                 "webhook_secret_file": config.webhook_secret_file or new_secret}
        # With each answer as its flag.  The daemon has another working directory: so no path is relative.
        absolute: Any = {field: os.path.abspath(path) for field, path in paths.items() if path}
        self.config = config._replace(**absolute)
        self.yes, self.program = config.yes, os.path.expanduser("~/.local/bin/streamerbrainz.py")
        self.token, self.sent = "", functools.cache(send_to)       # some URLs are silent for PLEX_S
        path = self.config.webhook_secret_file
        self.secrets = read_secrets("-webhook-secret-file", path)[0] if os.path.exists(path) else ()
        with contextlib.suppress(ConfigError):        # there is no token yet
            self.token = read_secrets("-plex-token-file", self.config.plex_token_file)[0][0]

    def call(self, path: str, body: bytes | None = None, method: str = "") -> bytes:
        """What plex.tv answers; raises PlexError, and ConfigError if nobody has signed in."""
        if not (self.token or path.startswith(PINS)):
            raise ConfigError(f"{self.config.command}: there is no token; sign in first: streamerbrainz.py login")
        return ask_plextv(self.config.command, self.token, path, body, method)

    # -- Words with a person
    def tell(self, words: str, begin: str = "   ") -> None:
        """Say something, in lines of 80 columns."""
        print(wrapped(words, begin), flush=True)

    def tries(self, words: str, seconds: float) -> Iterator[None]:
        """Tries until some seconds are over, the first one now.  Between them a terminal shows what is waited for."""
        until, shows = time.monotonic() + seconds, sys.stdout.isatty()
        yield
        while (left_s := until - time.monotonic()) > 0:
            print(f"   {f'{words}: {clock(int(left_s * 1000))} left':70}" * shows, end="", flush=True)
            time.sleep(TRY_S)
            print(f"\r{'':73}\r" * shows, end="", flush=True)
            yield

    def ask(self, question: str, default: str, look: Callable[[], str] = str) -> str:
        """What a person answers, or what look(), called meanwhile, finds; the default for Enter, and with -yes."""
        # Not input(): of a Ctrl-C just before it reads, Python hears only after the next line.
        print(wrapped(question + f" [{default}]" * bool(default), "   "), end="\n" if self.yes else " ", flush=True)
        while not (self.yes or select.select([sys.stdin], (), (), TRY_S)[0]):
            if found := look():
                print()
                return found
        if not (line := "\n" if self.yes else sys.stdin.readline()):
            raise KeyboardInterrupt                   # Ctrl-D
        return line.strip() or default

    def agree(self, question: str, default: str = "Y/n") -> bool:
        """Whether a person says yes."""
        while (answer := self.ask(question, default).lower()) not in ("y", "yes", "n", "no", "y/n"):
            self.tell("Type y or n.")
        return default == "Y/n" if answer == "y/n" else answer[0] == "y"

    def choose(self, names: Mapping[str, str], default: str = "1", look: Callable[[], str] = str) -> str:
        """Which of these (key: words) a person means by its number, or look(), which finds a key meanwhile."""
        for i, words in enumerate(names.values(), 1):
            self.tell(words, f"   {i:2}  ")
        while (answer := self.ask("Type its number." if names else "None yet.", default, look)) not in names:
            if 1 <= (no := number(answer) or 0) <= len(names):
                return list(names)[no - 1]
            self.tell(f"Type a number from 1 to {len(names)}." if names else "It must play to be seen.")
        return answer

    def propose(self, todo: Sequence[Todo], *kinds: type[Exception]) -> int:
        """Show what is to be done, and do it after a yes, forgiving these kinds of errors; -> the exit status."""
        self.tell("This is what is left to do:" if todo else "All is as it should be.")
        for words, _ in todo:
            self.tell(words, "   - ")
        if todo and not self.agree("Do all this?"):
            self.tell("Nothing was done.")
            return 1
        self.failed = False                           # what could not be asked before did no harm
        for words, work in todo:
            with self.forgiving(*kinds):
                work()
                self.tell(f"done: {words}", "   - ")
        return 0

    @contextlib.contextmanager
    def forgiving(self, *kinds: type[Exception]) -> Iterator[None]:
        """An error of these kinds within it is told, and the rest goes on."""
        try:
            yield
        except kinds as error:
            self.tell(str(error))
            self.failed |= getattr(error, "fault", "") not in ("pass", "missing")

    # -- The steps
    def login(self) -> int:
        """Step 1: a token that plex.tv accepts is in its file; -> 0, the exit status of `login`."""
        path = tilde(self.config.plex_token_file)
        try:
            if self.token:
                self.account, self.has_webhooks = parse_account(self.call(USER))
        except PlexError as error:
            self.tell(str(error))
            self.token = "" if error.fault == "refused" else self.token     # else it may be valid
        if not self.token:
            self.tell(f"You enter a code at plex.tv. That makes a token, which is written to {path}, for you only; in "
                      f"your account it is listed under Authorized Devices, as {socket.gethostname()}.")
            self.token, self.is_new = self.new_token(), True
            write_private(self.config.plex_token_file, f"{self.token}\n", self.config.command)
            self.account, self.has_webhooks = parse_account(self.call(USER))
        self.tell(f"{f'Signed in as {self.account}; t' if self.account else 'T'}he token is in {path}.")
        return 0

    def new_token(self) -> str:
        """The token of whoever enters our code."""
        for _ in range(MAX_CODES):
            pin_id, code, lasts_s, _ = parse_pin(self.call(PINS, b""))
            self.tell(f"Open https://plex.tv/link/?pin={code} in any browser, signed in as the server's owner. "
                      "The code is:")
            print(f"\n{large(code) * sys.stdout.isatty()}{'':24}{code}\n", flush=True)
            for _ in self.tries("waiting for it", lasts_s):
                if token := self.entered(pin_id):
                    return token
                if token is None:
                    break
            self.tell("This code is no longer valid: it expired, or it was denied.")
        raise PlexError("refused", f"None of {MAX_CODES} codes was entered; run this again when you are at a browser.")

    def entered(self, pin_id: str) -> str | None:
        """The token, once the code of a sign-in was entered; "": not yet; None: the code is no longer valid."""
        try:
            return parse_pin(self.call(f"{PINS}/{pin_id}"))[3]
        except PlexError as error:
            if error.fault not in ("missing", "unreachable", "starting"):
                raise
            return None if error.fault == "missing" else ""       # the other faults may pass

    def find_server(self) -> None:
        """Step 2: the URL at which the server shows its sessions is known.  It may take seconds to know a new token."""
        url = self.reach("Your server", [self.config.plex_server_url], "") or self.other_server()
        self.plex = PlexServer(url, lambda: self.token, self.config.plex_ca_file)
        for _ in self.tries("the server does not take the token yet", TOKEN_S):
            try:
                self.plex.sessions()
                break
            except PlexError as error:
                if (fault := error.fault) not in ("refused", "forbidden"):
                    raise
        else:
            # A new one goes, so that all is as before; an old one, so that another account can sign in.
            if self.is_new or (not self.yes and self.agree("Sign this account out?")):
                with self.forgiving(PlexError):
                    self.sign_out()
            raise PlexError(fault, f"{origin(url)} shows what plays to its owner only, not to "
                            f"{self.account or 'this account'}. Run this again, and sign in as the owner.")
        self.config = self.config._replace(plex_server_url=url)
        self.tell(f"The server at {url} answers, and takes the token.")

    def reach(self, name: str, urls: Iterable[str], identifier: str) -> str:
        """The first URL at which the server with this identifier ("": any) answers; "": none, and why is told."""
        def fault(url: str) -> str:                   # /identity needs no token: none is sent
            try:
                found = PlexServer(url, str, self.config.plex_ca_file).container("/identity")[0]
                return "" if identifier in ("", found.get("machineIdentifier")) else "another server answers there."
            except PlexError as error:
                host = urllib.parse.urlsplit(url).hostname or ""
                is_blocked = host.endswith(".plex.direct") and isinstance(KNOWN.get(host), str)
                return str(error).removeprefix(f"{url} ") + (
                    " The router may block such names: allow plex.direct in its DNS rebind protection." * is_blocked)
        import concurrent.futures  # here: all else does without
        found, faults = [*filter(None, urls)], list[str]()
        for scheme, most in (("http:", MAX_URLS), ("https:", MAX_LOOKUPS)):     # those of https have names to look up
            some = [url for url in found if url.startswith(scheme)]
            for url, why_not in zip(some, concurrent.futures.ThreadPoolExecutor(most).map(fault, some), strict=True):
                if not why_not:
                    return url
                faults.append(f"{name} at {url} {why_not}")
        for each in faults if name else ():
            self.tell(each, "   - ")
        return ""

    @functools.cached_property
    def resources(self) -> list[Resource]:
        """The account's servers and players, as far as plex.tv tells them."""
        with self.forgiving(PlexError):
            return parse_resources(self.call(RESOURCES))
        return []

    def other_server(self) -> str:
        """The URL of one of the account's servers that answers; else of the one that a person names."""
        self.tell("Looking for your server.")
        servers = {each.identifier: each for each in self.resources if "server" in each.provides}
        if owned := {each.identifier: each.name for each in servers.values() if not each.owner}:
            server = servers[self.choose(owned) if len(owned) > 1 else next(iter(owned))]
            url, default = self.reach(server.name, server.urls, server.identifier), ""
            if not url and (near := self.reach("", nearby(), server.identifier)) and (near == NEARBY or (
                    not self.yes and self.agree(f"{near} says that it is {server.name}, but plex.tv does not know this "
                                                "address. Give it the token?", "y/N"))):
                url = near
        else:
            shared = "".join(f" {each.name} belongs to {each.owner}." for each in servers.values())
            self.tell(f"No server of this account is known.{shared}")
            url, default = "", self.reach("", nearby()[:1] if self.yes else nearby(), "")
        while not url:
            word = self.ask("Its address, such as http://192.168.1.5:32400", default)
            try:
                url = named_server(word)
            except ValueError as error:
                if self.yes:
                    raise ConfigError("setup: no server was found; name it with -plex-server-url.") from error
                self.tell(f"{error}.")
        return url

    def choose_player(self) -> None:
        """Step 3: the player's identifier is known."""
        self.config = self.config._replace(plex_machine_id=self.config.plex_machine_id or self.ask_player())
        self.tell(f"The player is {self.config.plex_machine_id}.")

    def ask_player(self) -> str:
        """The machine_identifier of the player that begins to play now, or that a person chooses."""
        names, playing = dict[str, str](), set[str]()
        def begun() -> str:
            nonlocal playing
            before, playing, found = playing, set(), list[Session]()
            with contextlib.suppress(PlexError):      # the next look may succeed
                found = sorted(self.plex.sessions(), key=lambda each: each.state != PLAYING)
            for each in found:
                if (key := each.machine_identifier).isprintable():
                    names[key] = (f"{each.player_title or 'a player'} ({each.product}), "
                                  f"{playing_sentence(each.state, each.item)}")
                    playing |= {key} if each.state == PLAYING else set()
            return next(iter(playing - before), "")
        begun()                                       # what plays now began before it was asked for
        for each in self.resources:
            if "player" in each.provides:
                names.setdefault(each.identifier, f"{each.name} ({each.product}), silent")
        if self.yes and len(playing) != 1:
            raise ConfigError(f"setup: {len(playing)} players play now; let one play, or give -plex-machine-id.")
        self.tell("Press play on your player.")
        chosen = self.choose(names, "1" if playing else "", begun)
        self.tell(names[chosen])
        return chosen

    def choose_tracker(self) -> None:
        """Step 4: whether to keep what is watched is known."""
        path = tilde(self.config.tracker_db or usual("tracker.db"))
        if not (self.config.tracker_db or self.config.flags_file) and self.agree(
                f"Keep which episodes and movies you watch, in {path}?", "y/N"):
            self.config = self.config._replace(tracker_db=usual("tracker.db"))
        self.tell(f"What you watch is kept in {path}" if self.config.tracker_db else
                  f"What you watch is not kept. To keep it: setup -tracker-db {path}")
        if self.config.tracker_db and not self.has_webhooks:
            self.tell("Without Plex Pass, it is read from the server's history, each hour.")

    def choose_port(self, is_ours: bool) -> bool:
        """The port is the first that is free, or has the daemon (is_ours: a StreamerBrainz there): then True."""
        for port in range(self.config.webhooks_port, 65536):
            self.config = self.config._replace(webhooks_port=port)
            try:
                if listener := open_listener(self.config):
                    listener.server_close()
                elif not is_ours:
                    raise ConfigError(f"setup: another StreamerBrainz ({port_holder(port) or 'of another user'}) "
                                      f"listens on {port}; end it, and remove its cron lines.")
                return listener is None
            except ConfigError as error:
                if " is held by " not in str(error):
                    raise
                self.tell(f"{error} Trying {port + 1} now.")
        raise ConfigError("setup: no port is free; give one with -webhooks-port.")

    def install(self) -> int:
        """Steps 5 to 7, after a yes: what is still to be written and started is."""
        has_systemd = not command_fault("systemctl", "--user", "show-environment")
        is_active = has_systemd and not command_fault("systemctl", "--user", "is-active", "--quiet", "streamerbrainz")
        listens = self.choose_port(is_active or not has_systemd)
        self.secrets = self.secrets or (secrets.token_urlsafe(32),)
        unit = unit_text(self.config) if has_systemd else ""          # cron shows the daemon all files
        flags, values = self.flags_text(), dict[str, str]()
        for field in OWNED:
            flag, value = f"-{field.replace('_', '-')}", getattr(self.config, field)
            if value != getattr(Config(), field) or re.search(rf"^\s*-?{flag}\b", flags, re.MULTILINE):
                values[flag] = tilde(str(value))
        files = {self.config.webhook_secret_file: ("".join(f"{each}\n" for each in self.secrets), 0o600),
                 usual("flags"): (with_flags(flags, values), 0o600),
                 self.program: (read_text(__file__), 0o755), unit_path(): (unit, 0o644)}
        todo: list[Todo] = [
            (f"write {tilde(path)}", functools.partial(write_private, path, content, "setup", mode=mode))
            for path, (content, mode) in files.items() if content and content.strip() != read_text(path).strip()]
        if self.config.tracker_db and self.lacks_library():
            todo.append(("read your library into the tracker", self.fill_tracker))
        if has_systemd and (todo or self.is_new or not is_active):     # systemd hands a token over at the start
            todo.append(("start the daemon, now and at each boot", functools.partial(self.start_daemon, is_active)))
        elif not has_systemd and (todo or not listens):
            todo.append(("show you the lines for cron (systemd is not here for users)",
                         functools.partial(self.show_cron, listens)))
        with self.forgiving(PlexError):
            todo += [(change, self.write_webhook)] if (change := self.change(add=True)) else []
        return self.propose(todo, PlexError)          # the daemon does without a webhook

    def flags_text(self) -> str:
        """The flags file as it is, or that of which it takes the place (/etc, @FILE); raises ConfigError."""
        path = next((each for each in (usual("flags"), self.config.flags_file) if os.path.exists(each)), "")
        content = read_text(path) if path else ""
        try:
            if path and not content and os.path.getsize(path):
                raise ValueError("it is no UTF-8")
            for line in content.splitlines():
                shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"setup: {tilde(path)} cannot be read ({error}); correct it, or move it away.") from error
        return content

    def lacks_library(self) -> bool:
        """Whether the library was not read into the tracker yet, or not to its end."""
        with contextlib.suppress(ConfigError, TrackerError), \
                contextlib.closing(Tracker(self.config.tracker_db, write=False)) as tracker:
            return not (tracker.note("imported") or tracker.one("SELECT EXISTS (SELECT 1 FROM show) AND NOT EXISTS ("
                                                                "SELECT 1 FROM note WHERE name LIKE 'import %')")[0])
        return not os.path.exists(self.config.tracker_db)

    def fill_tracker(self) -> None:
        """Read the server's library into a new tracker."""
        os.makedirs(os.path.dirname(self.config.tracker_db), 0o700, exist_ok=True)
        tracker_command(self.config._replace(words=("import",)))

    def start_daemon(self, is_active: bool) -> None:
        """Start the unit, now and at each boot; one that is active already starts anew."""
        systemctl("daemon-reload", "enable --now streamerbrainz", *["restart streamerbrainz"] * is_active)
        if not os.path.exists(f"/var/lib/systemd/linger/{getpass.getuser()}") and (
                fault := command_fault("loginctl", "enable-linger", str(os.getuid()))):
            self.tell(f"It will end when you log out ({fault}). Run: sudo loginctl enable-linger $USER")

    def show_cron(self, listens: bool) -> None:
        """Tell a person what to enter into the crontab, and wait until that is done.  listens: a daemon does so now."""
        lock = "flock -no .sb.lock " * bool(shutil.which("flock"))       # so that no Python starts while a daemon runs
        self.tell("Run `crontab -e`, enter this line if it is not there, and save:")
        print(f"\n* * * * * {lock}python3 .local/bin/streamerbrainz.py >>sb.log 2>&1\n")
        if listens:
            self.tell("A daemon runs with the old flags. End it: pkill -f streamerbrainz.py; cron starts it anew.")
        self.ask("Then press", "Enter")

    # -- The webhook of the account
    def right_url(self) -> str:
        """The URL of our webhooks, with the secret: the one that a person gives, or this machine's."""
        url = "".join(self.config.words[1:]).rstrip("/") or configured_url(self.config, self.config.webhooks_port)
        secret = f"?token={urllib.parse.quote(self.secrets[0], '')}" if self.secrets else ""
        return url + WEBHOOK_PATH * (url.count("/") == 2) + secret

    def is_ours(self, url: str) -> bool:
        """Whether a webhook of the account leads to this daemon, or did so once."""
        if not (parts := url_parts(url)):
            return False
        if has_secret(url, self.secrets) or re.split("[?#]", url)[0] == self.right_url().partition("?")[0]:
            return True
        # An address of long ago is one at which no StreamerBrainz answers; but one with a secret is another's.
        return parts.path == WEBHOOK_PATH and parts.port == self.config.webhooks_port and "@" not in parts.netloc and (
            bool(is_here(str(parts.hostname))) or not (given_secrets(parts.query) or self.sent(url) == ARRIVES))

    def planned(self, add: bool) -> tuple[list[str], list[str]]:
        """The URLs of the account's webhooks, and what they should be; raises PlexError."""
        def is_right(url: str) -> bool:               # or, with our secret, a person's: for a proxy, or a tunnel
            return not differences(url, self.config, self.secrets[:1]) or (
                has_secret(url, self.secrets) and not re.match(r"http://(\d|\[|localhost)", url))
        urls = parse_webhooks(self.call(WEBHOOKS))
        right = next(filter(is_right, () if self.config.words[1:] else urls), self.right_url()) if add else ""
        return urls, with_webhook(urls, right, self.is_ours)

    def change(self, add: bool) -> str:
        """What is to be changed in the account's webhooks, in words; "": nothing.  Raises PlexError."""
        if not self.has_webhooks:
            raise PlexError("pass", NO_PASS)
        before, after = map(collections.Counter, self.planned(add))
        old, new = (", ".join(map(without_secrets, each.elements())) for each in (before - after, after - before))
        words = f"put the new secret into {new} in" if old == new else f"add {new} to" if not old else \
            f"replace {old} by {new} in" if new else f"take {old} out of"
        others = f" ({plural(count, 'other')} stay{'s' * (count == 1)})" if (count := (before & after).total()) else ""
        return f"{words} the webhooks of your Plex account{others}" if old or new else ""

    def write_webhook(self, add: bool = True) -> None:
        """Put our URL into the account's webhooks, in the place of an old one, or take it out; raises PlexError."""
        for tries in range(3):                        # each reads first: what is written replaces them all
            before, after = self.planned(add)
            if before == after:
                return
            if tries == 2:
                raise PlexError("nonsense", "The account's webhooks are not as they were written: another program "
                                            "writes them, too. See: streamerbrainz.py webhook list")
            if tries:
                self.tell("Another program wrote the account's webhooks in between; once more.")
            self.call(WEBHOOKS, (urllib.parse.urlencode([("urls[]", url) for url in after]) or "urls=").encode())

    def webhook(self) -> int:
        """Show the account's webhooks, put ours into them, or take it out."""
        name, *given = self.config.words or ("list",)
        if name not in ("list", "add", "remove") or (given and name != "add") or not all(
                re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", each, re.ASCII) for each in given):
            raise ConfigError("webhook: call it as webhook list, webhook remove or webhook add [URL], with a URL such "
                              "as https://pi.example.org/webhooks/plex (the secret is added to it).")
        if name == "list":
            urls = [*map(without_secrets, parse_webhooks(self.call(WEBHOOKS)))]
            return print_rows(self.config, [{"url": each} for each in urls], "\n".join(urls) or "There is no webhook.")
        if given and ITSELF in (wrong := differences(given[0], self.config, ()) or [""])[0]:
            raise ConfigError(f"webhook: {wrong[0]}; give that.")
        change, work = self.change(name == "add"), functools.partial(self.write_webhook, name == "add")
        return self.propose([(change, work)] if change else [])

    # -- The proof, and the way back
    def prove(self) -> int:
        """Step 8: show what the daemon witnesses of its player now; -> the exit status."""
        tries = self.tries("waiting for the daemon to listen", START_S)
        if not (before := next(filter(None, (self.witnessed() for _ in tries)), None)):
            raise PlexError("unreachable", "The daemon does not answer. See: " + (
                JOURNAL if os.path.exists(unit_path()) else "~/sb.log, which the line for cron makes"))
        self.tell("The daemon listens." + " Press pause on your player, and play again." * (not self.yes))
        status = 0 if self.yes else self.watch(before)
        page = self.right_url().replace(WEBHOOK_PATH, "/")
        secret = f" (with ?token= and the first line of {tilde(self.config.webhook_secret_file)})" * ("?" in page)
        self.tell(f"What plays, in a browser: {page if sys.stdout.isatty() else page.partition('?')[0] + secret}")
        return status

    def witnessed(self) -> Witnessed | None:
        """What the daemon has witnessed so far; None: it does not answer."""
        with contextlib.suppress(PlexError):
            reply = ask_daemon(self.config, "/now?" + self.right_url().partition("?")[2])
            return parse_now(reply.body) if reply.status == 200 else None
        return None

    def watch(self, before: Witnessed) -> int:
        """Tell what the daemon witnesses, until a change has come with its webhook; -> 1: no change came."""
        now, changed_at = before, math.inf
        for _ in self.tries("waiting", PROVE_S):
            known, now = now, self.witnessed() or now
            for words in [each for each in now.changes if each not in known.changes][::-1]:
                self.tell(words.partition(" ")[2])
                changed_at = min(changed_at, time.monotonic())
            if now.arrived != before.arrived:
                median = f" (the median of {now.arrived})" * (now.arrived > 1)
                self.tell(f"Its webhook came within {now.delay_s:.1f} s of it{median}.")
                return 0
            if time.monotonic() > changed_at + FOLLOW_S * self.has_webhooks:
                break
        if changed_at == math.inf:
            self.tell("Nothing came. To find out why: streamerbrainz.py doctor")
            return 1
        self.tell("No webhook came with it. Some servers use a new URL only after a restart. To find out why: "
                  "streamerbrainz.py doctor" if self.has_webhooks else "No webhook came: they need Plex Pass.")
        return 0

    def sign_out(self) -> None:
        """End the token, and delete its file; raises PlexError if plex.tv does not hear of it."""
        try:
            self.call(SIGN_OUT, method="DELETE")
        except PlexError as error:
            if error.fault != "refused":              # it has ended already
                raise
        remove(self.config.plex_token_file)
        self.tell("Signed out; the token is deleted.")

    # -- The commands
    def setup(self) -> int:
        """Go from this one file to a daemon that was seen to work."""
        steps: dict[str, Callable[[], object]] = {
            "1. Sign in": self.login, "2. Server": self.find_server, "3. Player": self.choose_player,
            "4. Watch tracker": self.choose_tracker, "5. Files, daemon, webhook": self.install, "6. Proof": self.prove}
        for heading, step in steps.items():
            print(f"\n{heading}", flush=True)
            if step():
                return 1
        return int(self.failed)

    def uninstall(self) -> int:
        """Take back what setup did, each after a yes."""
        def stop_daemon() -> None:
            systemctl("disable --now streamerbrainz")
            remove(unit_path())
            systemctl("daemon-reload")
            command_fault("systemctl", "--user", "reset-failed", "streamerbrainz")
            self.tell("Other services of yours still start at boot. If there are none: loginctl disable-linger")
        is_needed = False                             # the token, still
        def leave_account() -> None:
            nonlocal is_needed
            try:
                self.write_webhook(False)
            except PlexError as error:
                is_needed = error.fault not in ("pass", "refused")
                raise
        def sign_out() -> None:
            if is_needed:
                raise ConfigError("The token stays: without it nobody could take the webhook out later.")
            self.sign_out()
        files, database = [usual(name) for name in ("flags", "webhook-secret", "client-id")], self.config.tracker_db
        data = [database, f"{database}-wal", f"{database}-shm"] if database else []
        steps: tuple[tuple[object, str, str, Callable[[], object]], ...] = (
            (os.path.exists(unit_path()), "Stop the daemon, and remove its unit?", "Y/n", stop_daemon),
            (self.token, "Take our webhook out of your Plex account?", "Y/n", leave_account),
            (self.token, "Sign out at plex.tv, and delete the token?", "Y/n", sign_out),
            (os.path.exists(self.program), f"Delete {tilde(self.program)}?", "Y/n", lambda: remove(self.program)),
            (any(map(os.path.exists, files)), "Delete the flags and the secret?", "y/N", lambda: remove(*files)),
            (any(map(os.path.exists, data)), f"Delete {tilde(database)}, all that you have watched?", "y/N",
             lambda: remove(*data)))
        for is_there, question, default, work in steps:
            if is_there and self.agree(question, default):
                with self.forgiving(PlexError, ConfigError, OSError):
                    work()
        self.tell("All else stays as it is, also the lines of a crontab (crontab -e), and a daemon that they started "
                  "(pkill -f streamerbrainz.py).")
        return int(self.failed)

def guided(config: Config) -> int:
    """`login`, `webhook`, `setup` or `uninstall`.  Ctrl-C leaves what is done."""
    guide = Setup(config)
    try:
        return int(getattr(guide, config.command)())
    except KeyboardInterrupt:
        print()
        guide.tell(f"Stopped. What is done stays; `streamerbrainz.py {config.command}` goes on from there.")
        return 1

# === Doctor: why do webhooks not arrive? (Finding, Doctor, doctor) ===
# What for: to say what to correct where a webhook gets lost: the server's settings, plex.tv, the network, our listener.
# Way: Config -> Doctor asks, in the order in which the checks build on one another -> Finding -> lines or JSON
# Threads: none.  It asks the daemon, another process, over HTTP, like the server and plex.tv; it changes nothing there.
# Needs of Player: PROOF_MISSES, PlexServer, Session, origin, parse_container, server_of; of Listener: WEBHOOK_PATH,
#   configured_url; of Hooks: hook_command; of Tracker: SCHEMA_VERSION, Tracker, plural; of Daemon: ask_daemon,
#   check_complete, port_holder; of Setup: ARRIVES, NOT_HERE, NO_URL, WEBHOOKS, ask_plextv, differences, has_secret,
#   parse_webhooks, read_text, send_to, unit_path, without_secrets, wrapped

OK, FAIL, SKIP = "ok", "FAIL", "skip"
# What a check may need before it can run, in the words of its SKIP.
SERVER, ANSWER = "no server is configured, or its token cannot be read", "the server does not answer"
OWNER, DAEMON = "the server does not accept the token", "the daemon does not listen"
CLOCK_S = 60.0                # how much two clocks may differ: NTP keeps them within a second
SERVER_LOG = ("the server's own log says why: Plex Web, Settings > Troubleshooting > Download Logs, in Plex Media "
              "Server.log the lines with `Webhook: Error delivering payload`")

class Finding(NamedTuple):
    """What one check found."""
    status: str                   # OK, FAIL, or SKIP: it could not be checked
    evidence: str
    remedy: str = ""              # the command or click that corrects it; only shown with a FAIL
    likely: int = 0               # 1 to 9: how likely this FAIL is why webhooks do not arrive; 0: it is not
    check: str = ""               # what was checked; Doctor.run() fills it in

# -- Verdicts: an answer -> Finding
def compare_clocks(date: str, now: float) -> Finding:
    """Is our clock right?  The server tells its own in the Date header of each answer.  now: Unix s."""
    if (theirs := http_time(date)) is None:
        return Finding(SKIP, "the server does not tell its time")
    if abs(off_s := now - theirs) <= CLOCK_S:
        return Finding(OK, f"within {CLOCK_S:.0f} s of the server's")
    return Finding(FAIL, f"it is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the server's",
                   "sudo timedatectl set-ntp true   # here and on the server")

OFF = ("0", "false")          # of a setting; "0" is XML's
# A check -> which values are right, what is said of them and of others, the remedy, how likely it is.  Plex sends
# webhooks only for an owner with Plex Pass, from a server signed in to plex.tv, which keeps the URLs, if they are on.
TOLD: Mapping[str, tuple[Callable[[str], bool], str, str, str, int]] = {
    "Plex Pass": (lambda features: "webhooks" in features.split(","), "the owner's features have webhooks",
                  "the owner's features have no webhooks: none is ever sent", "get Plex Pass at "
                  "https://plex.tv/plex-pass, or do without: the event stream reports each change, too", 9),
    "signed in": (lambda state: state == "ok", "the server is signed in to plex.tv",
                  "the server is not signed in to plex.tv ({})", "Plex Web: Settings > General > Sign in", 6),
    "webhooks switch": (lambda value: value not in OFF, "on", "webhooks are off in the server's settings",
                        "Plex Web: Settings > Network > Webhooks: on", 8)}

def verdict(check: str, value: str) -> Finding:
    """What a value of the server means for a check in TOLD.  "": it did not tell; older servers tell less."""
    if not value:
        return Finding(SKIP, "the server does not tell it")
    is_right, good, bad, remedy, likely = TOLD[check]
    return Finding(OK, good) if is_right(value) else Finding(FAIL, bad.format(value), remedy, likely)

def unit_shows(unit: str, home: str, path: str, write: bool) -> bool:
    """Whether a unit (its text, and that of its drop-ins) lets the daemon read, or write, a path."""
    lines = re.findall(r"^(TemporaryFileSystem|Bind(?:ReadOnly)?Paths)=(.*)$", unit, re.MULTILINE)
    empty = [value for name, value in lines if name == "TemporaryFileSystem"][-1:]
    shown = [word.lstrip("-").rpartition(":")[2].replace("%h", home) for name, value in lines for word in value.split()
             if name == "BindPaths" or (name == "BindReadOnlyPaths" and not write)]
    is_hidden = path.startswith(f"{home}/") and empty and empty[0].startswith("%h")
    return not is_hidden or any(f"{path}/".startswith(f"{folder}/") for folder in shown)

def find_player(sessions: Sequence[Session], ours: str, title: object) -> Finding:
    """Does the configured player exist?  Only a player that plays now can be seen."""
    # A player that was reinstalled has another identifier than `ours`, but often its old title, which the daemon knows.
    if not sessions:
        return Finding(SKIP, "nothing plays: press play on it, and run this again")
    if any(each.machine_identifier == ours for each in sessions):
        return Finding(OK, f"{ours} has a session")
    same = [each for each in sessions if each.machine_identifier.lower() == ours.lower()
            or (title and each.player_title == title)]
    best = (same or sessions)[0]
    known = "; ".join(f"{each.player_title or 'a player'} is {each.machine_identifier}" for each in sessions[:5])
    return Finding(FAIL, f"{best.player_title} has another identifier now: {best.machine_identifier}, not {ours}"
                   if same else f"{ours} has no session, but others have: {known}",
                   f"streamerbrainz.py setup -plex-machine-id {shlex.quote(best.machine_identifier)}", 3)

# --- the world
class Doctor:
    """Asks the daemon, the server and plex.tv, and yields the findings."""
    plex: PlexServer              # only where SERVER is met

    def __init__(self, config: Config):
        self.config, self.port, self.met = config, config.webhooks_port, {""}     # met: the needs that are met so far
        self.secrets = self.hidden = tuple[str, ...]()        # of webhooks; and all: no finding may show them
        self.now = self.root = json_object(None)      # the daemon's /now; the server's "/", which only its owner gets
        self.date = self.query = ""                   # of the server's answer; the end of our URLs, with a secret
        self.sent = functools.cache(send_to)          # some URLs are silent for PLEX_S
        self.is_silent = False                        # no webhook has come, or none with the last changes
        self.url = ""                                 # the closest match in the account; and what it should be:
        self.right_url = configured_url(config, self.port) + ("?token=..." if config.webhook_secret_file else "")

    def checks(self) -> Iterator[tuple[str, str, Callable[[], Finding], str]]:
        """The checks in their order: name, need ("": none), function, and the remedy for an error that ends it."""
        config = self.config      # each is run before the next is asked for, so that one can depend on another
        yield "flags", "", self.flags, "streamerbrainz.py setup   # or give doctor the daemon's flags"
        for flag in SECRETS:
            if path := getattr(config, flag[1:].replace("-", "_")):       # Config.plex_token_file, and so on
                login = "streamerbrainz.py login" * (flag == "-plex-token-file" and not os.path.exists(path))
                yield flag, "", functools.partial(self.secret_file, flag, path), login
        if config.on_event:
            yield "-on-event", "", lambda: Finding(OK, shlex.join(hook_command(config.on_event))), ""
        yield "unit", "", self.unit, ""
        yield "daemon", "", self.daemon, ""
        yield "webhooks so far", DAEMON, self.arrivals, ""
        yield "each change with its webhook", DAEMON, self.each_change, ""
        yield ("server", SERVER, self.server,
               f"curl -i {origin(config.plex_server_url)}/identity   # from here.  Does it run, at this address?")
        yield "clock", ANSWER, lambda: compare_clocks(self.date, time.time()), ""
        yield "token", ANSWER, self.token, "streamerbrainz.py login   # as the server's owner"
        yield "Plex Pass", OWNER, lambda: verdict("Plex Pass", text(self.root.get("ownerFeatures"), 10000)), ""
        yield "signed in", OWNER, lambda: verdict("signed in", text(self.root.get("myPlexSigninState"))), ""
        yield "webhooks switch", OWNER, self.switch, ""
        yield "player", OWNER, lambda: find_player(
            self.plex.sessions(), config.plex_machine_id, self.now.get("player")), ""
        yield "webhook in the account", SERVER, self.webhook, ""
        yield "test webhook", DAEMON, self.delivery, ""
        if config.tracker_db:
            yield "tracker", "", self.tracker, "correct that, or `tracker import` into a new file"

    def failure(self, error: Exception) -> Finding:
        """What an error means that ended a check without a known remedy: a FAIL; but a SKIP if it is a server's."""
        if isinstance(error, PlexError):
            return Finding(SKIP, str(error).partition(". ")[0])       # what follows is advice for our server
        # Such as "-on-event: lamp.sh is missing; make it executable."
        evidence, _, advice = re.sub("^-[a-z-]+: ", "", str(error)).partition("; ")
        if path := re.match("-webhook-secret-file: (.*) (?:cannot be read|is empty)", str(error)):
            file = shlex.quote(path[1]) if path[1] == self.config.webhook_secret_file else "FILE"
            advice = f"streamerbrainz.py secret -webhook-secret-file {file}"
        return Finding(FAIL, evidence, advice or "correct it", 5 if path else 0)

    def run(self) -> Iterator[Finding]:
        """All findings, without a secret in them."""
        for name, need, check, known_remedy in self.checks():
            try:
                finding = check() if need in self.met else Finding(SKIP, f"not asked: {need}")
            except (ConfigError, TrackerError, PlexError) as error:
                finding = Finding(FAIL, str(error), known_remedy) if known_remedy else self.failure(error)
            evidence, remedy = finding.evidence, finding.remedy if finding.status == FAIL else ""
            for word in self.hidden:
                evidence, remedy = evidence.replace(word, "..."), remedy.replace(word, "...")
            yield Finding(finding.status, evidence, remedy, finding.likely, name)

    # -- Our own flags, files and daemon
    def flags(self) -> Finding:
        """Are the flags complete?"""
        with contextlib.suppress(ConfigError):        # the token file has its own check, which says why
            if plex := server_of(self.config):
                self.plex = plex
                self.met.add(SERVER)
        check_complete(self.config)
        read = f" (read from {self.config.flags_file})" if self.config.flags_file else ""
        return Finding(OK, ("they are complete" if self.config.plex_server_url else
                            "no server is configured: webhooks are the only source") + read)

    def unit(self) -> Finding:
        """Does the unit show the daemon what the flags name?  It hides most of the home."""
        config, file, home = self.config, unit_path(), os.path.expanduser("~")
        if not (unit := read_text(file)):
            return Finding(SKIP, "there is no user unit")
        unit = "\n".join([unit, *map(read_text, sorted(glob.glob(f"{glob.escape(file)}.d/*.conf")))])
        command = hook_command(config.on_event)[:1] if config.on_event else []
        files = [(each, False) for each in (*command, config.plex_ca_file, config.tmdb_token_file) if each]
        files += [(os.path.dirname(config.tracker_db), True)] if config.tracker_db else []
        unseen = [each for path, write in files for each in (os.path.abspath(path), os.path.realpath(path))
                  if not unit_shows(unit, home, each, write)]
        if not unseen:
            return Finding(OK, "it shows the daemon all that the flags name")
        return Finding(FAIL, f"it hides {' and '.join(dict.fromkeys(unseen))} from the daemon",
                       "move it to ~/.local/bin, a database to ~/.local/share/streamerbrainz; or run `systemctl "
                       "--user edit streamerbrainz`, and enter [Service] and BindReadOnlyPaths=FOLDER (for a database "
                       "BindPaths=)")

    def secret_file(self, flag: str, path: str) -> Finding:
        """Does a file hold its secret, and can nobody else read it?"""
        self.hidden += (words := read_secrets(flag, path)[0])
        if flag == "-webhook-secret-file":
            self.secrets, self.query = words, f"?token={urllib.parse.quote(words[0], '')}"
        if is_private(path, mode := os.stat(path).st_mode):
            return Finding(OK, f"{path}, readable by you only")
        return Finding(FAIL, f"others can read {path} (mode {stat.S_IMODE(mode):o})", f"chmod 600 {shlex.quote(path)}")

    def daemon(self) -> Finding:
        """Does StreamerBrainz listen on the port, in this version, and is it healthy?"""
        # Another version: the file was replaced since it began.
        try:
            reply = ask_daemon(self.config, "/healthz")
        except PlexError:
            holder = port_holder(self.port)
            return Finding(FAIL, f"port {self.port} is held by {holder}, which does not answer as StreamerBrainz does"
                           if holder else f"nothing listens on port {self.port}",
                           "systemctl --user restart streamerbrainz   # or: streamerbrainz.py setup"
                           if os.path.exists(unit_path()) else "streamerbrainz.py setup   # it starts the daemon", 8)
        program, _, version = str(reply.headers.get("Server", "")).partition("/")
        if program != "StreamerBrainz":
            return Finding(FAIL, f"port {self.port} is held by {port_holder(self.port) or 'another program'}",
                           "end that, or give another -webhooks-port, and change the URL in Plex", 8)
        self.met.add(DAEMON)
        if version != VERSION:
            return Finding(FAIL, f"it is version {version}, and this is {VERSION}",
                           "systemctl --user restart streamerbrainz")
        if reply.status != 200:
            reasons = json_object(json_value(reply.body)).get("reasons")
            words = "; ".join(map(text, reasons)) if isinstance(reasons, list) else ""
            return Finding(FAIL, f"/healthz answers {reply.status}: {words}", "fix the reasons listed")
        return Finding(OK, f"version {version}, healthy")

    def arrivals(self) -> Finding:
        """Which webhooks has the daemon received, and which has it refused?"""
        # Refused ones matter only while the right ones do not come: else the mistake was corrected since.
        reply = ask_daemon(self.config, f"/now{self.query}")
        if reply.status != 200:
            return Finding(FAIL, f"/now answers {reply.status}", "give doctor the daemon's -webhook-secret-file", 2)
        self.now = json_object(json_value(reply.body))
        seen = json_object(self.now.get("webhooks"))
        last_s, missed = seen.get("last_s"), number(seen.get("in_a_row_missed")) or 0
        heard = "none has come since the daemon started" if last_s is None else f"the last came {last_s} s ago"
        refused = ", ".join(f"{count} with {status}" for status, count in json_object(seen.get("refused")).items())
        self.is_silent = last_s is None or missed >= PROOF_MISSES
        found = FAIL if refused and self.is_silent else SKIP if last_s is None else OK
        return Finding(found, heard + (f"; refused: {refused}" if refused else ""), "compare the URL in Plex with "
                       f"{self.right_url} (401: the secret, 404: the path, 413: too large)", 7)

    def each_change(self) -> Finding:
        """Does a webhook come with each change that the sessions show?  The daemon itself has compared them."""
        witness = json_object(json_object(self.now.get("witnesses")).get("webhooks"))
        status = OK if witness.get("up") else SKIP if witness.get("up") is None else FAIL
        return Finding(status, text(witness.get("words")), f"correct the other failures; {SERVER_LOG}")

    # -- The server
    def server(self) -> Finding:
        """Does the server answer?  /identity needs no token, so that a wrong one is not taken for a wrong address."""
        asked_at = time.monotonic()
        reply = self.plex.get("/identity", Accept="application/json")
        version = text(parse_container(reply.body)[0].get("version"))
        self.date = str(reply.headers.get("Date", ""))
        self.met.add(ANSWER)
        return Finding(OK, f"version {version} answers after {(time.monotonic() - asked_at) * 1000:.0f} ms")

    def token(self) -> Finding:
        """Does the server accept the token as its owner's?  Only the owner may read the sessions."""
        self.root = self.plex.container("/")[0]
        self.plex.container("/status/sessions")
        self.met.add(OWNER)
        return Finding(OK, f"accepted as the owner's of {text(self.root.get('friendlyName')) or 'the server'}")

    def switch(self) -> Finding:
        """Are webhooks on in the server's settings?  Servers write webHooksEnabled or WebHooksEnabled."""
        values = {text(each.get("id")).lower(): str(each.get("value")).lower()
                  for each in self.plex.container("/:/prefs")[1]}
        found = verdict("webhooks switch", values.get("webhooksenabled", ""))
        push = "; push notifications are off, without which no library.new comes (nothing here needs that one)"
        return found._replace(evidence=found.evidence + push * (values.get("pushnotificationsenabled") in OFF))

    # -- The way of a webhook: the URL in the account, the delivery, the tracker's journal
    def webhook(self) -> Finding:
        """Has the owner's account at plex.tv a webhook that leads here?"""
        if not (urls := parse_webhooks(ask_plextv("doctor", self.plex.current_token, WEBHOOKS))):
            return Finding(FAIL, "the account has no webhook at all",
                           f"streamerbrainz.py webhook add   # or Plex Web: Settings > Webhooks: {self.right_url}", 9)
        closest, wrong = min(((url, differences(url, self.config, self.secrets)) for url in urls),
                             key=lambda pair: len(pair[1]))
        self.url = closest if wrong != [NO_URL] and WEBHOOK_PATH in closest else ""     # never send to other programs
        # A tunnel or a proxy may lead here.
        foreign = closest.startswith("https:") or any(each.endswith(NOT_HERE) for each in wrong)
        if not wrong or (self.url and foreign and self.sent(closest) == ARRIVES):
            return Finding(OK, without_secrets(closest))
        remedy = f"streamerbrainz.py webhook add   # it enters {self.right_url}"
        if has_secret(closest, self.secrets) and re.match("https://[a-z]", closest):
            wrong, remedy = [f"nothing of ours answers there: it {self.sent(closest)}"], \
                f"start the tunnel or proxy there; or, without one: {remedy}"
        return Finding(FAIL, f"of {len(urls)}, {without_secrets(closest)} is the closest match, but {'; '.join(wrong)}",
                       remedy, 9)

    def delivery(self) -> Finding:
        """Does a webhook arrive that is sent from here, to the account's URL and to the one that should be there?"""
        tried = {url: self.sent(url) for url in (self.url, configured_url(self.config, self.port) + self.query) if url}
        said = "; ".join(f"to {without_secrets(url)} {words}" for url, words in tried.items())
        if set(tried.values()) == {ARRIVES}:
            hint = "; if Plex's do not come, restart the server: some use a new URL only then"
            return Finding(OK, said + hint * bool(self.url and self.is_silent))
        return Finding(FAIL, said, "give doctor the daemon's -webhook-secret-file" if "with 401" in said else
                       f"curl -i {self.right_url}   # from the server's machine; {SERVER_LOG}", 6)

    def tracker(self) -> Finding:
        """Is the tracker's file intact, and do its conflicts need a person?"""
        with contextlib.closing(Tracker(self.config.tracker_db, write=False)) as tracker, tracker.guarded():
            intact = tracker.one("PRAGMA quick_check")[0]
            last, failed, conflicts = tracker.one("SELECT max(received_at), count(*) FILTER (WHERE status = 'failed'), "
                                                  "(SELECT count(*) FROM open_conflict) FROM webhook_log")
        if intact != "ok":
            return Finding(FAIL, f"the file is damaged: {intact}",
                           "`tracker export` what can be read, and `tracker import` it into a new file", 4)
        return Finding(OK, f"intact, form {SCHEMA_VERSION}; last webhook: {iso_time(last) or 'none yet'}; "
                       f"{plural(conflicts, 'open conflict')}, {plural(failed, 'failed webhook')}")

def doctor(config: Config) -> int:
    """Print each finding, then the likely causes, likeliest first; -> 1 if a check failed."""
    log.setLevel(logging.ERROR)                       # what would be a warning is a finding here
    findings = []
    for each in Doctor(config).run():
        findings.append(each)
        if not config.json:
            print(wrapped(f"{each.check}: {each.evidence}", f"{each.status:4}  "),
                  *filter(None, [wrapped(each.remedy, "      -> ")]), sep="\n", flush=True)
    causes = sorted((each for each in findings if each.status == FAIL and each.likely), key=lambda each: -each.likely)
    if config.json:
        found = [{name: getattr(each, name) for name in ("status", "check", "evidence", "remedy")} for each in findings]
        print(json.dumps({"findings": found, "causes": [each.evidence for each in causes]}, indent=2))
    elif causes:
        print("\nWhy webhooks may not arrive, the likeliest first:",
              *(wrapped(f"{each.check}: {each.evidence}", f"{i}. ") for i, each in enumerate(causes, 1)), sep="\n")
    elif not any(each.status == FAIL for each in findings):
        print("\nNo fault found.")
    return int(any(each.status == FAIL for each in findings))

# === Demo: an evening of a player, without any Plex (StandIn, demo) ===
# What for: to see the program work before there is a server for it; and StandIn is the server of the tests.
# Way: EVENING -> StandIn (its sessions, events and webhooks) -> the real listener and the real daemon -> log lines
# Threads: "stand-in" answers for Plex, "evening" plays the script, main watches.  The rest is as in the Daemon.
# Needs of Player: Inbox, PlexServer, encode_webhook, exchange; of Listener: WEBHOOK_PATH, Gate, Listener,
#   configured_url; of Hooks: Hooks, hook_command; of Tracker: tracker_command; of Daemon: block_signals, local_url,
#   open_listener, serve, start; of Setup: wrapped

def _attributes(kind: str, key: str, title: str, of: str, parent: str, duration: str, **more: str) -> dict[str, str]:
    """An item as Plex's attributes of it."""
    return {"type": kind, "ratingKey": key, "title": title, "grandparentTitle": of, "parentTitle": parent,
            "duration": duration, "thumb": f"/library/metadata/{key}/thumb/1", **more}

_KARMA_POLICE = _attributes("track", "101", "Karma Police", "Radiohead", "OK Computer", "264000")
_NO_SURPRISES = _attributes("track", "102", "No Surprises", "Radiohead", "OK Computer", "229000")
_TEARDROP = _attributes("track", "103", "Teardrop", "Massive Attack", "Mezzanine", "331000")
_PILOT = _attributes("episode", "201", "Pilot", "Twin Peaks", "Season 1", "5640000", parentIndex="1", index="1")
_TRAINING = _attributes("episode", "301", "Training", "The Office", "Season 1", "1740000", parentIndex="1", index="4")
# What the demo's watch tracker knows before, as `tracker import FILE` reads it.  Which Office it is, a person must say.
DEMO_LIBRARY = {"shows": [{"title": "Twin Peaks", "year": 1990, "episodes": [{"season": 1, "episode": 1}]},
                          {"title": "The Office", "year": 2001}, {"title": "The Office", "year": 2005}]}
CRASHED = "crashed"               # its session stays, and stands still
# (second, what the viewer reads, state, item, the webhook that Plex sends, how often it sends it)
EVENING: tuple[tuple[float, str, str, dict[str, str], str, int], ...] = (
    (0, "You press play in Plexamp.", PLAYING, _KARMA_POLICE, "media.play", 1),
    (12, "The telephone rings: you press pause.", PAUSED, _KARMA_POLICE, "media.pause", 1),
    (25, "You press play again. Plex sends the webhook three times.", PLAYING, _KARMA_POLICE, "media.resume", 3),
    (36, "The next track begins.", PLAYING, _NO_SURPRISES, "media.play", 1),
    (46, "You skip to another track: Plex sends no webhook, the event stream tells it.", PLAYING, _TEARDROP, "", 0),
    (58, "You press stop: the session ends.", STOPPED, _TEARDROP, "media.stop", 1),
    (66, "You watch something instead.", PLAYING, _PILOT, "media.play", 1),
    (78, "You have seen it: the tracker marks it as watched.", PLAYING, _PILOT, "media.scrobble", 1),
    (80, "You press stop.", STOPPED, _PILOT, "media.stop", 1),
    (84, "You finish another one. Which Office? The tracker asks.", STOPPED, _TRAINING, "media.scrobble", 1),
    (90, "Some music again.", PLAYING, _TEARDROP, "media.play", 1),
    (100, "Plexamp crashes. Plex shows it as playing for up to 30 minutes; we find out in 41 seconds (of real time).",
     CRASHED, _TEARDROP, "", 0),
    (145, "That was the evening.", "", {}, "", 0))
PING_S = 10.0                     # as Plex; a stream that says nothing for SILENCE_S is broken
PICTURE_SIZE = 96                 # pixels

def picture(key: str) -> bytes:
    """A cover for a ratingKey, drawn by us: a PNG of rings, each item's in its own colour."""
    import zlib  # here: only the demo draws
    light, dark = (bytes(int(key) * by % 160 + shade for by in (37, 71, 113)) for shade in (95, 40))
    rows = b"".join(b"\0" + b"".join((light, dark)[((x - 30) ** 2 + (y - 30) ** 2) // 500 % 2]
                                     for x in range(PICTURE_SIZE)) for y in range(PICTURE_SIZE))
    header = 2 * PICTURE_SIZE.to_bytes(4) + bytes((8, 2, 0, 0, 0))        # 8 bits each of red, green and blue
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))

# --- the world
class _StandInHandler(http.server.BaseHTTPRequestHandler):
    """GET of the sessions, with the token in its header.  Unless it has events, it knows no other path, as old ones."""
    server: StandIn

    def do_GET(self) -> None:
        """Answer as Plex; where that refuses, with a page of HTML."""
        known, modern = self.headers.get("X-Plex-Token") == self.server.token, self.server.streams is not None
        if not known:
            self.answer(401)
        elif self.path == "/status/sessions":
            self.answer(200, self.server.sessions())
        elif modern and self.path == "/":
            self.answer(200, b'<MediaContainer friendlyName="stand-in" version="1.41.3.9314-a0bfb8370"/>')
        elif modern and (found := re.fullmatch(r"/library/metadata/(\d+)/thumb/1", self.path)):
            self.answer(200, picture(found[1]))
        elif modern and self.path.startswith("/:/eventsource/"):
            self.stream()
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"") -> None:
        """Send a whole answer, and log nothing: the log is the daemon's."""
        body = body or b"<html><body><h1>%d</h1></body></html>" % status
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        """The event stream, with a ping where nothing happens, until the daemon has gone."""
        events: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.send_response_only(200)
        self.end_headers()
        self.server.streams.append(events)  # type: ignore[union-attr]
        with contextlib.suppress(OSError):
            while True:
                event = b"event: ping\ndata: {}\n\n"
                with contextlib.suppress(queue.Empty):
                    event = b"event: playing\ndata: %b\n\n" % events.get(timeout=PING_S)
                self.wfile.write(event)
        self.server.streams.remove(events)  # type: ignore[union-attr]

class StandIn(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A small stand-in for Plex Media Server: the sessions of one player over HTTP, and webhooks in Plex's form."""
    daemon_threads = True

    def __init__(self, token: str = "stand-in-token", machine_identifier: str = "demo-player", speed: float = 1.0,
                 has_events: bool = False):
        self.token, self.machine_identifier, self.speed = token, machine_identifier, speed      # times faster
        self.streams: list[queue.SimpleQueue[bytes]] | None = [] if has_events else None
        # The state, the item's attributes, its view_offset in ms, and since when (monotonic s).
        self.now: tuple[str, dict[str, str], float, float] = (STOPPED, {}, 0.0, 0.0)
        super().__init__(("127.0.0.1", 0), _StandInHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"       # as for -plex-server-url

    def view_offset(self) -> float:
        """Where the player is, ms."""
        state, _, offset, since = self.now
        return offset + max(0.0, time.monotonic() - since) * 1000 * self.speed if state == PLAYING else offset

    def turn(self, state: str, attributes: dict[str, str]) -> None:
        """The player plays, pauses or stops an item; another item starts at its beginning.  Or it crashes."""
        offset = self.view_offset() if self.now[1] == attributes else 0.0
        if state == CRASHED:
            self.now = PLAYING, attributes, offset, math.inf
            return
        self.now = (STOPPED, {}, 0.0, 0.0) if state == STOPPED else (state, attributes, offset, time.monotonic())
        for stream in self.streams or ():
            stream.put(json.dumps({"PlaySessionStateNotification": {
                "sessionKey": "7", "clientIdentifier": self.machine_identifier, "ratingKey": attributes["ratingKey"],
                "viewOffset": int(offset), "state": state}}).encode())

    def sessions(self) -> bytes:
        """The body of /status/sessions."""
        state, attributes, _, _ = self.now
        container = ElementTree.Element("MediaContainer", size="0" if state == STOPPED else "1")
        if state != STOPPED:
            kind, position = "Track" if attributes["type"] == "track" else "Video", str(int(self.view_offset()))
            item = ElementTree.SubElement(container, kind, attributes | {"sessionKey": "7", "viewOffset": position})
            ElementTree.SubElement(item, "User", id="1", title="demo")
            ElementTree.SubElement(item, "Player", machineIdentifier=self.machine_identifier, title="Living Room",
                                   product="Plexamp", platform="Linux", state=state)
        return bytes(ElementTree.tostring(container, encoding="utf-8", xml_declaration=True))

    def send_webhook(self, url: str, event: str, attributes: Mapping[str, str], thumb: bytes = b"") -> int:
        """POST a webhook as Plex does; -> the status of the answer.  thumb: a JPEG, which Plex sends with some."""
        payload = {"event": event, "user": True, "owner": True, "Account": {"id": 1, "title": "demo"},
                   "Server": {"title": "stand-in", "uuid": "0" * 40}, "Metadata": attributes,
                   "Player": {"local": True, "title": "Living Room", "uuid": self.machine_identifier}}
        kind, body = encode_webhook(json.dumps(payload).encode(), thumb)
        return exchange(url, {"Content-Type": kind, "User-Agent": "PlexMediaServer/1.41.3.9314-a0bfb8370"}, body).status

def play_evening(plex: StandIn, url: str, inbox: Inbox) -> None:
    """Play the script against the listener at a URL.  On a terminal the page stays there, else SIGTERM follows."""
    start = time.monotonic() + 0.5                    # when the first events come, the daemon listens
    for second, words, state, item, event, count in EVENING:
        time.sleep(max(0.0, start + second / plex.speed - time.monotonic()))
        print(f"\n{wrapped(words, '# ')}", flush=True)
        is_stopped = state == STOPPED == plex.now[0]
        if state and not is_stopped and (state, item) != plex.now[:2]:        # a scrobble alone changes nothing
            plex.turn(state, item)
        for _ in range(count):
            plex.send_webhook(url, event, item)
    if sys.stdout.isatty():
        print("# The page stays open; Ctrl-C ends it.", flush=True)
        closed = select.poll()
        closed.register(sys.stdout, 0)
        closed.poll()                                 # until the terminal is
    inbox.put(signal.SIGTERM)

def demo(config: Config) -> int:
    """Play an evening: the stand-in sends real webhooks to the real daemon, which looks at the stand-in's sessions."""
    sample = "/bin/sh -c 'echo amplifier, lamp or curl: $PLAYER_EVENT $NAME'"
    hooks = Hooks(hook_command(config.on_event or sample), config.active_timeout_s / config.speed, logging.INFO)
    inbox: Inbox = queue.SimpleQueue()
    block_signals()                                   # before the first thread: else one of them would get Ctrl-C
    with StandIn(speed=config.speed, has_events=True) as plex, tempfile.TemporaryDirectory() as folder, \
            (open_listener(config) or Listener(config.webhooks_host, 0)) as listener:     # your daemon may have that
        database, library = os.path.join(folder, "tracker.db"), os.path.join(folder, "library.json")
        config = config._replace(plex_machine_id=plex.machine_identifier, poll_interval_s=10 / config.speed,
                                 tracker_db=database, words=("import", library), webhooks_port=listener.port)
        write_private(library, json.dumps(DEMO_LIBRARY), "demo")
        page = urllib.parse.urljoin(configured_url(config, listener.port), "/")
        print(f"A stand-in for Plex plays an evening of {EVENING[-1][0] / plex.speed:.0f} seconds; Ctrl-C ends it.\n"
              f"Look at it: {page} (also /now, /events, /healthz, /metrics, /?big)", flush=True)
        tracker_command(config)
        start("stand-in", inbox, plex.serve_forever, 0.05)
        start("evening", inbox, play_evening, plex, local_url(config, WEBHOOK_PATH), inbox)
        serve(config, listener, Gate(), PlexServer(plex.url, lambda: plex.token), hooks, inbox)()
        plex.shutdown()
    return 0

# === main: flags and commands (parse_config, main) ===
# What for: the words of the command line become a Config, or one sentence that says what is wrong with them.
# Way: words, and those of each @FILE -> parse_words -> Config -> COMMANDS -> exit status
# Needs of Listener: make_secret; of Hooks: hook; of Tracker: ENTRY_STATUSES, tracker_command, unix_time; of Daemon:
#   LEVELS, check_complete, in_journal, players, run, set_up_log; of Setup: guided, named_server, server_url, wrapped;
#   of Doctor: doctor; of Demo: demo

MAX_FLAGS = 2**16             # bytes of an @FILE; all flags with a comment each take 3 kB

def flag_in(word: str) -> str:
    """The flag in a word, for a message.  Nothing else of a word that we do not know is repeated: it may be a token."""
    name = re.sub("^--", "-", word).partition("=")[0]
    return name if re.fullmatch("-[a-z-]{1,30}", name) else "-..."

def a_number(lowest: int, highest: int, or_zero: bool, is_whole: bool, word: str) -> float:
    """The number in a word; raises ValueError.  or_zero: 0 turns something off."""
    # What float() and int() take, too, is none: "nan", "1e3", "-1", "1_000".
    value = float(word) if re.fullmatch(r"[0-9]+" if is_whole else r"[0-9]+(\.[0-9]+)?", word) else math.nan
    if not (lowest <= value <= highest or (or_zero and value == 0)):
        raise ValueError(f"give a {'whole ' * is_whole}number from {lowest} to {highest}{', or 0' * or_zero}")
    return int(value) if is_whole else value

def one_of(words: Iterable[str], word: str) -> str:
    """The word, if it is one of these; raises ValueError."""
    if word not in words:
        raise ValueError(f"give one of {', '.join(words)}")
    return word

# How to read the values of flags that do not take every word: a function, and what it gets before the word.
_COUNT, _INTERVAL = (a_number, 0, 10**6, False, True), (a_number, 1, 86400, True, False)
READERS: dict[str, tuple[Any, ...]] = {
    "webhooks_port": (a_number, 1, 65535, False, True), "speed": (a_number, 1, 100, False, False), "last": _COUNT,
    "rate_limit": _COUNT, "tracker_log_days": _COUNT, "poll_interval_s": _INTERVAL, "active_timeout_s": _INTERVAL,
    "plex_server_url": (server_url,), "at": (unix_time,), "log_level": (one_of, LEVELS), "as_": (one_of, ("trakt",)),
    "log_format": (one_of, ("text", "json")), "status": (one_of, (*ENTRY_STATUSES, "waiting"))}

PATHS = ("plex_token_file", "plex_ca_file", "webhook_secret_file", "tmdb_token_file", "tracker_db")

def help_text() -> str:
    """The help: the commands in main's docstring, the flags in Config's."""
    first, commands, notes = map(textwrap.dedent, str(main.__doc__).rstrip().split("\n\n"))
    flags = re.findall(r"^ *(-[a-z-]+(?: [A-Z]+)?)  +(.+)$", str(Config.__doc__), re.MULTILINE)
    flags += [("-h, -help", "this help"), ("-version", "the version")]
    listed = "\n".join(["flags:", *(wrapped(words, f"  {flag:25} ") for flag, words in flags)])
    return "\n\n".join(["usage: streamerbrainz.py [COMMAND] [FLAGS] [@FILE]", first, commands, listed, notes])

def parse_words(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags in some words, by Config's fields, and the other words; raises ConfigError."""
    # No message repeats a value: it may be a token, or a URL with one.  argparse's do, and differ between Pythons; and
    # it takes 5 ms of each start.  A value that begins with a dash needs the form -flag=VALUE.
    flags = dict(re.findall(r"^ *(-[a-z-]+)(?: ([A-Z]+))?  ", str(Config.__doc__), re.MULTILINE))
    found, others, ahead = dict[str, Any](), list[str](), iter(words)
    for word in ahead:
        name, sign, value = re.sub("^--", "-", word).partition("=")
        field = name[1:].removeprefix("no-").replace("-", "_")
        field = next((each for each in (field, f"{field}_s", f"{field}_") if each in Config._fields), field)
        if not word.startswith("-") or word == "-":
            others.append(word)
        elif name not in flags:
            hint = " The token goes into a file: -plex-token-file." if "token" in flag_in(word) else ""
            raise ConfigError(f"there is no flag {flag_in(word)}; see: streamerbrainz.py -h.{hint}")
        else:
            try:
                if sign and not flags[name]:
                    raise ValueError("it takes no value")
                if flags[name] and not sign and (value := next(ahead, "-")).startswith("-"):
                    raise ValueError("it needs a value")
                read, *limits = READERS.get(field, (str,))
                found[field] = read(*limits, value) if flags[name] else not name.startswith("-no-")
            except ValueError as error:
                raise ConfigError(f"{name}: {error} (see: streamerbrainz.py -h)") from error
    return found, others

# --- the world
def show_help(config: Config) -> int:
    """Print the help, or the version."""
    print(help_text() if config.command == "help" else f"streamerbrainz {VERSION}")
    return 0

COMMANDS: dict[str, Callable[[Config], int]] = {"run": run, "players": players, "doctor": doctor,
    "tracker": tracker_command, "secret": make_secret, "hook": hook, "demo": demo, "setup": guided, "login": guided,
    "webhook": guided, "uninstall": guided, "help": show_help, "version": show_help}

def read_flags(path: str) -> list[str]:
    """The words in an @FILE, each line quoted as in a shell; raises ConfigError."""
    # In it, a word that begins with @ is a value: no file names another one, or itself.  Notepad begins it with a mark.
    try:
        content, _, version = read_regular(path, MAX_FLAGS + 1)
        if version is None or len(content) > MAX_FLAGS or b"\0" in content:
            raise OSError(f"it is no text file of at most {MAX_FLAGS} bytes")
        lines = [shlex.split(line, comments=True) for line in content.decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"@FILE: {shown_path(path)} cannot be read ({why(error)}); name a file of flags.") from error
    except UnicodeDecodeError as error:
        raise ConfigError("the @FILE is not UTF-8; save it as UTF-8.") from error
    except ValueError as error:
        raise ConfigError("a line of the @FILE has a quote without its end; put both or none.") from error
    for words in filter(None, lines):
        if not re.match("-[a-z-]", words[0]):
            raise ConfigError("a line of the @FILE does not begin with a flag, as in: -webhooks-port 3001")
        if len(words) > 2:
            raise ConfigError(f"a line of the @FILE has more than a flag and its value: {flag_in(words[0])}; "
                              "put the value in quotes.")
    return [word for words in lines for word in words]

def parse_config(words: Sequence[str]) -> Config:
    """The Config in the words of a command line; raises ConfigError."""
    if asked := {"-h", "-help", "--help", "-version", "--version"} & {*words}:
        return Config(command="help" if asked - {"-version", "--version"} else "version")
    if "\0" in "".join(words):
        raise ConfigError("a word has a NUL character in it; type it again.")
    typed, files = [word for word in words if word[:1] != "@"], [word[1:] for word in words if word[:1] == "@"]
    given, rest = parse_words(typed)
    command = rest.pop(0) if rest else "run"
    if command not in COMMANDS:
        raise ConfigError(f"there is no such command; the commands are {', '.join(COMMANDS)}.")
    # Not for the demo: it must neither write into your tracker nor switch your amplifier.
    places = (usual("flags"), SYSTEM_FLAGS) if not files and command not in ("demo", "help", "version") else ()
    files = [*map(os.path.expanduser, files), *list(filter(os.path.exists, places))[:1]]
    read, more = parse_words(word for file in files for word in read_flags(file))
    flags, rest = read | given, [*more, *rest]
    if len(rest) > {"players": 1, "tracker": 99, "hook": 1, "webhook": 2}.get(command, 0):
        raise ConfigError("there is a word too many. (Each value stands after its flag. No token goes on the command "
                          "line, where ps shows it: see -plex-token-file.)")
    if command == "players":                          # its word is HOST, HOST:PORT or a URL
        try:
            rest = [named_server(word) for word in rest]
        except ValueError as error:
            raise ConfigError(f"players: {error}.") from error
    flags |= {field: os.path.expanduser(flags[field]) for field in PATHS if field in flags}
    config = Config(command=command, words=tuple(rest), flags_file=", ".join(files), **flags)
    if command == "run":
        check_complete(config)
    return config

def main(words: Sequence[str]) -> int:        # (Its docstring is the help: see help_text().)
    """Tells what your Plex player is doing.

    commands:
      run                  the daemon (this is what happens without a command)
      setup                from this one file to a daemon that was seen to work
      login                signs in at plex.tv by a code, and writes the token file
      webhook list         the webhooks of your Plex account
      webhook add [URL]    puts ours into it; URL: where the server reaches it
      webhook remove       takes ours out of it
      uninstall            takes back what setup did
      players [HOST:PORT]  every player in the sessions, with its machine identifier
      doctor               why do webhooks not arrive?
      tracker ...          the watch tracker:
        import [FILE]        all shows and movies, and what is watched
        export               the same as JSON, as import FILE reads it
        backup FILE          a copy of the database, also while the daemon runs
        shows [WORDS]        each show, with how much of it is watched
        show ID              its seasons as grids, # watched
        log                  what became of the last webhooks
        conflicts            what needs your decision
        resolve ID SHOW|new|ignore   your decision
        mark|unmark ID [S01E02|S01]  it was watched, or it was not
        mappings [WORDS]     which of your shows each of the server's is
        map MAPPING SHOW|new|ignore|forget   no, it is another
      secret               makes a webhook secret, and prints the URL to paste
      hook EVENT           runs the -on-event command once, by hand
      demo                 an evening of a player, without any Plex
      help                 this help

    @FILE reads flags from a file, one a line, with # comments.
    Two dashes do as well as one.
    Exit status: 0 success; 1 it failed; 2 wrong use or wrong configuration.
    """
    try:
        sys.stdin, sys.stdout = sys.stdin or io.StringIO(), sys.stdout or io.StringIO()       # closed by <&- or >&-
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)     # a title may be in a script that a terminal lacks
        config = parse_config(words)
        set_up_log(config)
        status = COMMANDS[config.command](config)
        print(end="", flush=True)                     # what cannot be written is known now
        return status
    except (ConfigError, TrackerError, PlexError) as error:
        print(f"{'<3>' if in_journal(os.environ) else 'streamerbrainz: '}{printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 1
    except OSError as error:                          # streamerbrainz.py players | head, or > FILE on a full disk
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail to flush stdout at its end
        sys.stderr.write("streamerbrainz: the output is cut: the disk is full.\n" * (error.errno == errno.ENOSPC))
        return 1

if __name__ == "__main__":
    at = sys.orig_argv.index(sys.argv[0]) if sys.argv[0] in sys.orig_argv else 0
    if (3, 12) <= sys.version_info < (3, 12, 3) and at and "-c" not in sys.orig_argv:       # see outlive_main
        again = "import runpy, sys; runpy.run_path(sys.argv.pop(0) and sys.argv[0], run_name='__main__')"
        os.execv(sys.executable, [*sys.orig_argv[:at], "-c", again, *sys.orig_argv[at:]])
    sys.exit(main(sys.argv[1:]))
