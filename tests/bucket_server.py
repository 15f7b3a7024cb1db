"""Serve gs://bucket from memory: an emulator of Google's storage, on loopback.

What TensorStore needs and the emulator lacks is added: the generation of what
is read, and requests that hold for one generation only.

Prints the port once it can be reached; ends with its standard input.
"""

import contextlib
import re
import socket
import sys
import urllib.parse

from gcp_storage_emulator import exceptions, storage
from gcp_storage_emulator import server as emulator

_OBJECT = re.compile(r"(?:/\w+)?/storage/v1/b/(\w+)/o(?:/(.+))?")


class Handler(emulator.RequestHandler):
  """Answers one request; one thread answers all of them, in turn."""

  def handle(self):
    with contextlib.suppress(ConnectionError):  # who asked has gone
      super().handle()

  def do_GET(self):
    self._answer(super().do_GET)

  def do_POST(self):
    self._answer(super().do_POST)

  def do_DELETE(self):
    self._answer(super().do_DELETE)

  def end_headers(self):
    if generation := self._generation():
      self.send_header("x-goog-generation", generation)
    super().end_headers()

  def _answer(self, answer):
    if "expect" in self.headers:  # else the client waits a second
      self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    query = self._query()
    now = self._generation() or "0"
    if query.get("ifGenerationMatch", now) != now:
      self._refuse(412)
    elif query.get("ifGenerationNotMatch") == now != "0":
      self._refuse(304)
    else:
      answer()

  def _refuse(self, code):
    self.rfile.read(int(self.headers.get("content-length", 0)))
    self.send_response(code)
    self.send_header("content-length", "0")
    self.end_headers()

  def _query(self):
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))

  def _generation(self):
    """Return that of the object that is asked for, None if there is none."""
    found = _OBJECT.fullmatch(urllib.parse.urlsplit(self.path).path)
    name = found and (found[2] or self._query().get("name"))
    if not name:
      return None
    try:
      there = self.storage.get_file_obj(found[1], urllib.parse.unquote(name))
    except exceptions.NotFound:
      return None
    return there["generation"]


def main():
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  emulator.RequestHandler = Handler
  # It would write down what it holds after every change.
  storage.Storage._write_config_to_file = lambda self: None
  server = emulator.create_server(
    "127.0.0.1", port, in_memory=True, default_bucket="bucket"
  )
  server.start()
  print(port, flush=True)
  sys.stdin.read()
  server.stop()


if __name__ == "__main__":
  main()
