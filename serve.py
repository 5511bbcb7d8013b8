"""A page on which a class does the crowdworkers' work: two replies, one choice (HH §2.1, §2.2).

    python serve.py out/toy-0                  # for browsers on this machine
    python serve.py out/toy-0 --host 0.0.0.0   # for a room: people join with the printed code

CLASS.md is the lecturer's guide, page.html the page, and classroom.py knows who may do what. This
file stands between them and the network, and trusts nothing from there. Read it in this order:
  1. Server   how many may connect, for how long, and the addresses it answers to
  2. Handler  one request: what is refused, what is passed on, and the answer
  3. Secrets  the join code and the lecturer's key, which outlive the server
  4. Command
"""
import argparse
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, errors_in_one_sentence, read_text, write_atomically)

from agreement import Judge
from choices import ChoiceFile
from classroom import Classroom, Refusal, Replies, as_bytes
from conversation import Speaker
from report import digest

PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 16_384   # bytes; the longest line of text, escaped, has 6,000

# ---- 1. Server ---------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A thread for each connection, and one request a connection. A client that is slow or silent
    costs one thread until its time is over; nobody waits for it."""
    daemon_threads = True
    request_queue_size = 128      # a whole class connects at once
    MAX_CONNECTIONS = 400
    MAX_FROM_ONE_ADDRESS = 200    # a school may have one address for everybody
    LIFETIME = 90.0               # seconds; longer than anybody waits for replies
    CHECK_EVERY = 1.0             # seconds

    def __init__(self, host: str, port: int, room: Classroom, secret: "Secrets", judge: Judge):
        """Raises UserError if the port or the address cannot be used."""
        self.room, self.secret, self.judge, self.page = room, secret, judge, Page(read_text(PAGE))
        self.open = {}  # connection -> (address, time at which it is closed)
        self.guard = threading.Lock()
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.names.add(f"{socket.gethostname().lower()}.local")
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on --host {host} --port {port} ({reason}): use another "
                            "--port, or the address of this machine as --host") from None
        threading.Thread(target=self.close_old_ones, daemon=True).start()

    def server_bind(self):
        """Without the library's search for this machine's full name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def verify_request(self, request, client_address) -> bool:
        """Whether there is room for another connection."""
        address = client_address[0]
        with self.guard:
            from_here = Counter(other for other, _ in self.open.values())[address]
            if len(self.open) >= self.MAX_CONNECTIONS or from_here >= self.MAX_FROM_ONE_ADDRESS:
                return False
            self.open[request] = (address, time.monotonic() + self.LIFETIME)
        return True

    def shutdown_request(self, request):
        if request in self.open:  # if not, this is the thread that lets clients in
            try:  # a connection that closes on unread bytes loses the answer, so read them
                request.shutdown(socket.SHUT_WR)
                request.settimeout(1.0)
                while request.recv(MAX_BODY):
                    pass
            except OSError:
                pass  # it is closed already, or the client is slow to close it
        with self.guard:
            self.open.pop(request, None)
        super().shutdown_request(request)

    def close_old_ones(self):
        """A client that sends a byte now and then never meets a timeout, but it meets this."""
        while True:
            time.sleep(self.CHECK_EVERY)
            now = time.monotonic()
            with self.guard:
                for request, (_, end) in self.open.items():
                    if now > end:
                        try:
                            request.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            pass  # it has just closed

    def handle_error(self, request, client_address):
        """A client that goes away is no error; anything else is a bug of ours, and has a
        traceback in the terminal."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def is_ours(self, host: str | None) -> bool:
        """Whether a Host header names this server. Another site's page can make a browser send
        requests here by a name of its own that leads here (DNS rebinding); an address cannot lie
        like this."""
        name = re.sub(r":\d+$", "", (host or "").lower())
        if name and name in self.names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


class Page:
    """page.html, and the headers that keep a browser from running or loading anything else."""

    def __init__(self, text: str):
        self.body = text.encode()
        hashes = {}
        for tag in ("script", "style"):
            content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
            hashes[tag] = digest(content)
        self.headers = {
            "Content-Security-Policy":
                f"default-src 'none'; script-src {hashes['script']}; "
                f"style-src {hashes['style']}; img-src data:; connect-src 'self'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store", "Connection": "close"}


# ---- 2. Handler --------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One request. Everything but GET / and five POSTs of JSON is refused."""
    timeout = 10.0     # seconds that the client may be silent
    WRONG_CODE = 1.0   # seconds until the answer: with all connections, a month for all codes
    server: Server

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def get(self):
        self.check_origin()
        if self.path != "/":
            raise Refusal(404, "there is nothing here but /")
        self.send(200, self.server.page.body, "text/html; charset=utf-8")

    def post(self):
        self.check_origin()
        actions = {"/join": self.join, "/state": self.state, "/say": self.say,
                   "/choose": self.choose, "/class": self.overview}
        if self.path not in actions:
            raise Refusal(404, "there is nothing here")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "send JSON")  # another site's page may send text without asking
        self.send_json(200, actions[self.path](self.body()))

    # -- what is passed on

    def join(self, request: dict) -> dict:
        try:
            return self.server.room.join(request.get("name"), request.get("code"))
        except Refusal as refusal:
            if refusal.status == 403:
                time.sleep(self.WRONG_CODE)
            raise

    def state(self, request: dict) -> dict:
        return self.server.room.state(request.get("token"))

    def say(self, request: dict) -> dict:
        return self.server.room.say(request.get("token"), request)

    def choose(self, request: dict) -> dict:
        return self.server.room.choose(request.get("token"), request)

    def overview(self, request: dict) -> dict:
        given, key = str(request.get("key")), self.server.secret.lecturer
        if not hmac.compare_digest(as_bytes(given), as_bytes(key)):
            raise Refusal(401, "This link is not the one that the lecturer's terminal shows.")
        return self.server.judge.overview(self.server.room.records())

    # -- what is refused

    def check_origin(self):
        """Raise Refusal for a request that another site's page makes a browser send."""
        if not self.server.is_ours(self.headers.get("Host")):
            raise Refusal(421, "use the address that the terminal shows")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Refusal(403, "this request comes from another site's page")

    def body(self) -> dict:
        """The JSON object that was sent."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length):
            raise Refusal(411, "say how long the request is")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"the request has more than {MAX_BODY:,} bytes")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refusal(400, "the request is not JSON") from None
        if not isinstance(found, dict):
            raise Refusal(400, "the request is not a JSON object")
        return found

    # -- the answer

    def answer(self, action):
        try:
            action()
        except Refusal as refusal:
            self.send_json(refusal.status, {"error": str(refusal)} | refusal.more)
        except UserError as error:  # a full disk, for example: the page tries again
            print(f"serve.py: {error}", file=sys.stderr)
            self.send_json(507, {"error": "the server cannot store it; its terminal says why"})
        except OSError:
            raise  # the client is gone
        except Exception:
            self.send_json(500, {"error": "the server has a bug, described in its terminal"})
            raise

    def send_json(self, status: int, content: dict):
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str):
        self.send_response(status)
        for name, value in self.server.page.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """The library calls this for methods and requests that it does not understand."""
        self.send_json(code, {"error": "this server does not understand the request"})

    def version_string(self):
        return "serve.py"

    def log_message(self, *args):
        """No line for each request: they would hide what matters."""


# ---- 3. Secrets --------------------------------------------------------------


class Secrets:
    """The key that signs tokens, the join code and the lecturer's key. They lie in a file beside
    the choices, readable by its owner only, so that a class goes on after a restart."""
    LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # none that look alike

    def __init__(self, path: Path):
        if not os.path.exists(path):
            code = "".join(secrets.choice(self.LETTERS) for _ in range(6))
            made = {"code": code, "key": secrets.token_hex(16), "lecturer": secrets.token_hex(8)}
            mask = os.umask(0o077)  # so nobody else can read the file, from its first byte on
            try:
                write_atomically(path, json.dumps(made).encode())
            finally:
                os.umask(mask)
        try:
            found = json.loads(read_text(path))
            self.code, self.key = str(found["code"]), bytes.fromhex(found["key"])
            self.lecturer = str(found["lecturer"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} does not hold a join code and keys: delete it, and everybody "
                            "joins anew") from None


# ---- 4. Command --------------------------------------------------------------


def addresses(host: str, port: int) -> list[str]:
    """The page's addresses, as people type them."""
    if host not in ("0.0.0.0", "::"):
        return [f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"]
    found = [f"http://127.0.0.1:{port}/"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; it only picks the way out
            found.insert(0, f"http://{probe.getsockname()[0]}:{port}/")
        except OSError:
            pass  # no network
    return found


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def command(folder: str, model: str, against: str, pm: str, choices: str, host: str, port: int,
            goal: int, temperature: float, seed: int, device: str):
    if goal < 1:
        raise UserError(f"--goal {goal}: must be above 0")
    first = Speaker(folder, model, temperature, device)
    second = Speaker(folder, against, temperature, device) if against else first
    path = Path(choices or Path(folder, "class.jsonl"))
    file = ChoiceFile(path)
    for note in file.notes:
        print(f"serve.py: {note}", file=sys.stderr)
    secret = Secrets(path.with_name(f"{path.stem}.keys.json"))
    replies = Replies(first, second, seed)
    room = Classroom(file, replies, secret.key, "" if is_local(host) else secret.code, goal,
                     first.toy, seed)
    server = Server(host, port, room, secret, Judge(folder, pm, device, first.toy))
    replies.start()
    found = addresses(host, server.server_port)
    print(f"page:      {'  or  '.join(found)}")
    if room.code:
        print(f"join code: {room.code}")
    print(f"lecturer:  {found[-1]}#lecturer={secret.lecturer}")
    print(f"choices:   {path} ({len(file.records):,} so far); Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{len(room.records()):,} choices are in {path}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", help="output folder of a run")
    add("--model", default="initial.pt", help="language model of the folder that replies")
    add("--against", default="", help="another one, for the second reply (empty: the same)")
    add("--pm", default="pm.pt", help="preference model of the lecturer's table, or its path")
    add("--choices", default="", help="file of the choices (empty: class.jsonl in the folder)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: the network")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    add("--goal", type=int, default=20, help="choices that fill a person's progress bar")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--seed", type=int, default=0, help="of the prompts, the replies and their sides")
    add("--device", default="cpu", help="cpu, cuda, ... (auto: a GPU if any)")
    with errors_in_one_sentence():
        command(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
