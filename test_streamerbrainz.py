"""The specification of streamerbrainz.py, in the order of the file: first what computes, in virtual
time; then what touches the world, over real sockets on free ports and in real processes.

Real captures lie outside the repository; the tests that read them are skipped without them.
"""
from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import os
import pathlib
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from xml.sax.saxutils import quoteattr

import pytest

import streamerbrainz as sb
from streamerbrainz import BUFFERING, PAUSED, PLAYING, STOPPED, Change, Look, Outage, Recovery

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "streamerbrainz.py"
CAPTURES = HERE.parent / "shared" / "captures"
TOKEN = "s3cret-t0ken-never-to-be-seen"
THUMB = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4 + b"\r\n--" + b"-" * 24 + b"\r\n\xff\xd9"
SONG = {"type": "track", "ratingKey": "101", "title": "Karma Police", "grandparentTitle": "Radiohead",
        "parentTitle": "OK Computer", "duration": 264000}
OTHER = {**SONG, "ratingKey": "102", "title": "No Surprises"}


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


# === Limits ===

def test_every_limit_is_a_positive_number():
    limits = {name: value for name, value in vars(sb).items() if re.fullmatch(r"MAX_\w+|\w+_S", name)}
    assert len(limits) > 12
    for name, value in limits.items():
        for each in value if isinstance(value, tuple) else (value,):
            assert each > 0, name


# === Items ===

@pytest.mark.parametrize("value, expected", [
    ("x", "x"), ("", ""), (7, "7"), (True, ""), (None, ""), ([], ""), ({"a": 1}, ""), (1.5, ""),
    ("x" * 5000, "x" * 1000), (10 ** 400, "")])
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


# === Webhook ===

MULTIPART, BODY = sb.encode_webhook(payload(), THUMB)


def test_a_webhook_is_parsed_from_its_multipart_body():
    webhook, thumb = sb.parse_webhook(MULTIPART, BODY)
    assert webhook == sb.Webhook("media.play", "m1", "Living Room", sb.parse_item(SONG), None)
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


@pytest.mark.parametrize("content_type, body, status, sentence", [
    ("multipart/form-data; boundary=B", b"", 400, "The body is cut short: its closing boundary is missing."),
    ("multipart/form-data; boundary=B", b"--B--", 400, "The part named payload is missing, which holds a webhook's JSON."),
    ("multipart/form-data", b"--B--", 400, "The Content-Type names no valid boundary of the parts."),
    ("multipart/form-data; boundary=" + "x" * 71, b"", 400, "The Content-Type names no valid boundary of the parts."),
    ("multipart/form-data; boundary=\xe9", b"", 400, "The Content-Type names no valid boundary of the parts."),
    ("multipart/form-data; boundary=B", b"--B\r\n--B--", 400, "A part of the body has no end of its header."),
    ("multipart/form-data; boundary=B", part('name="x"', "") * 17 + b"--B--", 400, "The body has more than 16 parts."),
    ("multipart/form-data; boundary=B", part('name="payload"', "{") + b"--B--", 400, "The payload is not JSON."),
    ("application/json", b"\xff\xfe", 400, "The payload is not JSON."),
    ("application/json", b"[" * 200000, 400, "The payload is not JSON."),
    ("application/json", b"9" * 5000, 400, "The payload is not JSON."),
    ("application/json", b" " * (2 ** 20 + 1), 413, "The payload is larger than 1048576 bytes."),
    *(("application/json", body, 400, "The payload is not a Plex webhook: it names no event.")
      for body in (b"[]", b"null", b"7", b'"media.play"', b"{}", b'{"event": null}', b'{"event": 7}', b'{"event": ""}', b'[["event"]]')),
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


# === Sessions ===

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
NO_LIST = "The server's answer is XML, but no list of sessions. Does -plex-server-url point to Plex Media Server?"
DOCTYPE = "The server's answer has a DOCTYPE, which Plex never sends."
BOMB = '<!DOCTYPE M [<!ENTITY a "lol">' + "".join(
    f'<!ENTITY {b} "{"&" + a + ";" * 1}">' for a, b in zip("abcdefg", "bcdefgh", strict=True)) + "]><MediaContainer>&h;</MediaContainer>"


@pytest.mark.parametrize("xml, sentence", [
    (b"", NOT_XML), (b"<html><h1>401 Unauthorized</h1></html>", NO_LIST), (b"<html><br></html>", NOT_XML), (b"\x00\xff<<<", NOT_XML),
    (b'<Response code="503" title="Maintenance"/>', NO_LIST), (sessions_xml(session_xml())[:200], NOT_XML),
    (b"<!DOCTYPE html><html/>", DOCTYPE), (BOMB.encode(), DOCTYPE), (b"<MediaContainer>&boom;</MediaContainer>", NOT_XML),
    ('<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a><MediaContainer/>'.encode("utf-16"), NOT_XML)])
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


# === Player ===

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

    def show(self, *each):
        """From now on the sessions show these; none: the server cannot be reached."""
        self.world = None if each == (None,) else sessions(*each)

    def wait(self, seconds=0.0):
        """Let time go by, looking when a look is due."""
        end = self.at + seconds
        while self.player.look_at is not None and self.player.look_at <= end:
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
    assert set(sb.TRANSITIONS.values()) == set(believed)
    assert set(sb.CLAIMS.values()) == set(believed)


@pytest.mark.parametrize("believed", (STOPPED, PLAYING, PAUSED))
@pytest.mark.parametrize("witnessed", (STOPPED, PLAYING, PAUSED, BUFFERING))
@pytest.mark.parametrize("same", (True, False))
def test_each_transition_is_reported_once_and_only_if_it_is_a_change(believed, witnessed, same):
    judge = Judge(state=believed, item=sb.parse_item(SONG))
    judge.show(*[] if witnessed == STOPPED else [session_xml(witnessed, item=SONG if same else OTHER)])
    judge.wait(0)
    known = same or witnessed == STOPPED
    becomes = sb.TRANSITIONS[believed if known else STOPPED, witnessed]
    changed = becomes != believed or not known
    assert judge.said() == ([(becomes, A if known else B)] if changed else [])
    judge.observe(Look(judge.world))
    assert judge.said() == []


def test_music_that_plays_at_the_start_is_reported():
    judge = Judge()
    judge.show(session_xml(offset="61000"))
    judge.wait(0)
    assert judge.reports == [Change(PLAYING, sb.parse_item(SONG), 61000, "Living Room", "m1")]


def test_a_webhook_is_a_reason_to_look_at_once_and_nothing_more():
    judge = Judge(look_at=None, poll_interval_s=0.0)
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
    judge.wait(0.25)
    assert judge.said() == [(PLAYING, A)]
    judge.hear("media.stop")
    judge.wait(lag)
    assert judge.said() == []
    judge.show()
    judge.wait(0.25)
    assert judge.said() == [(STOPPED, A)]


def test_looks_end_when_the_sessions_bear_the_webhook_out_or_time_is_up():
    judge = Judge(poll_interval_s=0.0)
    judge.show(session_xml())
    judge.hear("media.play")
    judge.wait(60)
    assert judge.looks == 1
    judge.hear("media.pause")
    judge.wait(60)
    assert judge.looks == 2 + len(sb.RELOOK_S) and judge.player.claim is None
    judge.hear("media.stop", item=OTHER)                   # of an item that is over: borne out
    judge.wait(60)
    assert judge.looks == 3 + len(sb.RELOOK_S)


def test_a_stopped_player_is_reported_once_although_its_session_is_gone():
    judge = Judge()
    judge.show(session_xml(offset="61000"))
    judge.wait(0)
    judge.at = 5.0
    judge.show()
    for _ in range(3):
        judge.hear("media.stop")
        judge.wait(1)
    assert judge.reports[1:] == [Change(STOPPED, sb.parse_item(SONG), 66000, "Living Room", "m1")]


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
    judge.show(session_xml(BUFFERING))
    judge.hear("media.resume")
    judge.wait(8)
    assert judge.said() == [(PLAYING, A), (PAUSED, A)]
    judge.show(session_xml(PLAYING))
    judge.wait(sb.BUFFERING_S)
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


# Webhooks alone

def alone():
    return Judge(has_server=False, look_at=None, poll_interval_s=0.0)


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
    assert judge.player.look_at is None


def test_without_a_server_what_comes_too_late_is_passed_over():
    judge = alone()
    for event, item in (("play", SONG), ("play", OTHER), ("stop", SONG), ("pause", SONG), ("pause", OTHER), ("resume", SONG), ("stop", OTHER)):
        judge.hear(f"media.{event}", item)
    assert judge.said() == [(PLAYING, A), (PLAYING, B), (PAUSED, B), (STOPPED, B)]


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


# === Words ===

@pytest.mark.parametrize("value, expected", [
    ("Radiohead", "Radiohead"), ("OK Computer", '"OK Computer"'), ("", '""'), (None, '""'), (7, "7"), ('"live"', '"\\"live\\""'),
    ("a=b", '"a=b"'), ("it's", '"it\'s"'), ("back\\slash", '"back\\\\slash"'), ("Søn", "Søn"), ("日本", "日本"),
    ("a\nstate=playing", '"a\\nstate=playing"'), ("\x1b[31m", '"\\u001b[31m"'), ("\x9b31m", '"\\u009b31m"'),
    ("\u202eevil", '"\\u202eevil"'), ("\u2028", '"\\u2028"'), ("\ud800", '"\\ud800"'), ("\x7f", '"\\u007f"'), ("\U000e0001", '"\\udb40\\udc01"')])
def test_a_value_is_quoted_so_that_it_forges_and_colours_nothing(value, expected):
    assert sb.quoted(value) == expected
    assert sb.quoted(value).isprintable()
    assert json.loads(expected if expected.startswith('"') else json.dumps(expected)) == ("" if value is None else str(value))


def change(**fields):
    return Change(PLAYING, sb.parse_item({**SONG, **fields}), 61000, "Living Room", "m1")


@pytest.mark.parametrize("fields, line", [
    ({}, 'state=playing title="Karma Police" artist=Radiohead album="OK Computer" position_ms=61000 duration_ms=264000 player="Living Room"'),
    ({"type": "episode", "parentIndex": 1, "index": 0, "grandparentTitle": "Twin Peaks", "title": "Pilot"},
     'state=playing title=Pilot show="Twin Peaks" season=1 episode=0 position_ms=61000 duration_ms=264000 player="Living Room"'),
    ({"type": "movie", "title": "October Sky", "duration": None},
     'state=playing title="October Sky" artist="" album="" position_ms=61000 duration_ms=0 player="Living Room"')])
def test_a_change_is_one_line_with_the_contracts_keys_in_order(fields, line):
    assert sb.text_line("", sb.change_fields(change(**fields), name_machine=False)) == line


def test_a_line_adds_the_machine_where_asked_and_the_reason_where_there_is_one():
    fields = sb.change_fields(sb.replace(change(), reason="frozen"), name_machine=True)
    assert list(fields)[-2:] == ["machine_id", "reason"] and fields["reason"] == "frozen"


def test_json_lines_have_the_same_keys_and_are_ascii_safe():
    fields = sb.change_fields(change(title="\x1b\n\u202e日本"), name_machine=False)
    line = sb.json_line("", fields)
    assert line.isprintable() and json.loads(line) == fields and list(json.loads(line)) == list(fields)


@pytest.mark.parametrize("player, age, sentence", [
    (None, None, "no player yet; no webhook yet"),
    (sb.PlayerState("m1", True), None, "stopped; no webhook yet"),
    (sb.PlayerState("m1", True, state=PLAYING, item=sb.parse_item(SONG), player_title="Living Room"), 12.3,
     'playing "Karma Police" by Radiohead on Living Room; last webhook 12 s ago'),
    (sb.PlayerState("m1", True, outage=Outage("starting", "It starts.")), 3600, "It starts; last webhook 3600 s ago")])
def test_the_status_is_a_speaking_line(player, age, sentence):
    assert sb.status_sentence(player, age) == sentence


def test_the_upper_half_touches_nothing():
    upper = PROGRAM.read_text(encoding="utf-8").partition("below this line")[0].partition("VERSION =")[2]
    for world in ("time.", "open(", "socket", "threading", "os.", "sys.", "log.", "print(", "queue", "environ"):
        assert not re.search(rf"(?<![\w./]){re.escape(world)}", re.sub(r'""".*?"""|#.*', "", upper, flags=re.S)), world
