"""Where processes meet before JAX joins them.

JAX's own coordination service ends a process from C++, with a stack trace and
without a name, when another one does not come. So process 0 first meets the
others itself, on the same port and over plain TCP, and knows who is missing.
The connections stay open for `lifeline.py`.
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Collection, Iterator

_LIMIT = 1 << 26  # bytes of a message
_HELLO_SECONDS = 5  # for a stranger on the port to say who it is


class Link:
  """A connection to another process: lines of JSON, both ways."""

  def __init__(self, connection: socket.socket):
    self._socket = connection
    self._rest = b""
    self._lock = threading.Lock()

  def send(self, message: dict) -> None:
    """Send a message; nothing happens if the other has gone."""
    with self._lock, contextlib.suppress(OSError):
      self._socket.settimeout(None)
      self._socket.sendall(json.dumps(message).encode() + b"\n")

  def receive(self, seconds: float | None = None) -> dict | None:
    """Return the next message, None if the other has gone.

    Raises:
      TimeoutError: there was none in that time.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while b"\n" not in self._rest:
      left = None if end is None else max(end - time.monotonic(), 0.0)
      if not select.select([self._socket], [], [], left)[0]:
        raise TimeoutError
      try:
        part = self._socket.recv(1 << 16)
      except OSError:
        part = b""
      if not part or len(self._rest) > _LIMIT:
        return None
      self._rest += part
    line, _, self._rest = self._rest.partition(b"\n")
    try:
      message = json.loads(line)
    except ValueError:
      return None  # not one of us
    return message if isinstance(message, dict) else None

  def gone(self) -> bool:
    """Return whether the other has hung up, as far as can be seen now."""
    if not select.select([self._socket], [], [], 0)[0]:
      return False
    try:
      return not self._socket.recv(1, socket.MSG_PEEK)
    except OSError:
      return True

  def close(self) -> None:
    self._socket.close()


def _keep_alive(connection: socket.socket, silence: int) -> socket.socket:
  """Let the kernel hang up on a machine that is silent for so many seconds."""
  options = {
    "TCP_KEEPIDLE": max(silence // 4, 1),
    "TCP_KEEPINTVL": max(silence // 4, 1),
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": silence * 1000,
  }
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in options.items():
    if hasattr(socket, name):  # Linux has all of them
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  return connection


def meet(
  address: str, processes: int, process: int, seconds: int, silence: int
) -> tuple[dict[int, Link], dict[int, str]]:
  """Return links and names of the other processes when all are here.

  Process 0 has a link to each, the others have one to process 0.

  Args:
    address: HOST:PORT of process 0.
    silence: seconds after which a machine that no longer answers is given up.

  Raises:
    OSError: not all came within `seconds`; the message says who did not.
  """
  if process == 0:
    return _Host(address, processes, seconds, silence).gather()
  return _join(address, processes, process, seconds, silence)


def split(address: str) -> tuple[str, int]:
  """Return host and port of HOST:PORT.

  Raises:
    ValueError: it is something else.
  """
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
    raise ValueError(
      f"coordinator {address!r} is not HOST:PORT; give one like 10.0.0.2:8476."
    )
  return host.strip("[]"), int(port)


class _Host:
  """Process 0 while it waits for the others."""

  def __init__(self, address: str, processes: int, seconds: int, silence: int):
    self.address, self.processes = address, processes
    self.seconds, self.silence = seconds, silence
    self.links: dict[int, Link] = {}
    self.names = {0: _name(0)}

  def gather(self) -> tuple[dict[int, Link], dict[int, str]]:
    try:
      with _listener(split(self.address)[1]) as listener:
        self._wait(listener)
    except BaseException:
      for link in self.links.values():
        link.close()
      raise
    self._tell({"names": [self.names[p] for p in range(self.processes)]})
    return self.links, self.names

  def _wait(self, listener: socket.socket) -> None:
    end = time.monotonic() + self.seconds
    while len(self.links) < self.processes - 1:
      left = end - time.monotonic()
      if left <= 0:
        message = _missing(
          self.address, self.processes, self.names, self.seconds
        )
        self._tell({"error": message})
        raise OSError(message)
      listener.settimeout(min(left, 0.5))
      with contextlib.suppress(TimeoutError):
        connection, _ = listener.accept()
        self._answer(Link(_keep_alive(connection, self.silence)))
      for process in [p for p, link in self.links.items() if link.gone()]:
        self._forget(process)

  def _forget(self, process: int) -> None:
    self.links.pop(process).close()
    del self.names[process]

  def _answer(self, link: Link) -> None:
    try:
      hello = link.receive(_HELLO_SECONDS) or {}
    except TimeoutError:
      hello = {}
    process, name = hello.get("process"), hello.get("name")
    if not isinstance(process, int) or not isinstance(name, str):
      link.close()  # a port scanner, say
      return
    error = self._objection(process, name, hello.get("processes"))
    if error:
      link.send({"error": error})
      link.close()
      return
    if process in self.links:
      self._forget(process)
    self.links[process], self.names[process] = link, name
    self._tell({"here": sorted(self.names)})

  def _objection(self, process: int, name: str, processes) -> str | None:
    if processes != self.processes:
      return (
        f"{name} was told of {processes} processes and {self.names[0]} of "
        f"{self.processes}; give all the same number."
      )
    if process in self.names and not (process and self.links[process].gone()):
      return (
        f"{name} and {self.names[process]} say that they are process "
        f"{process}; give each an id of its own."
      )
    return None

  def _tell(self, message: dict) -> None:
    for link in self.links.values():
      link.send(message)


def _join(
  address: str, processes: int, process: int, seconds: int, silence: int
) -> tuple[dict[int, Link], dict[int, str]]:
  end = time.monotonic() + seconds
  here, reason = None, "nothing came back"
  while (left := end - time.monotonic()) > 0:
    try:
      connection = socket.create_connection(split(address), min(left, 5))
    except OSError as error:  # not there yet, or a name not known yet
      reason = error.strerror or str(error)
      time.sleep(min(left, 0.2))
      continue
    link = Link(_keep_alive(connection, silence))
    link.send(
      {"process": process, "processes": processes, "name": _name(process)}
    )
    last = {}
    # Process 0 is there: it is the one to say when time is up.
    for last in _messages(link, end + seconds):
      here = last.get("here", here)
      if "names" in last:
        return {0: link}, dict(enumerate(last["names"]))
      if "error" in last:
        break
    link.close()
    if "error" in last:
      raise OSError(last["error"])
    time.sleep(min(max(end - time.monotonic(), 0.0), 0.2))
  if here:
    raise OSError(_missing(address, processes, here, seconds))
  raise OSError(
    f"coordinator {address} did not answer process {process} in {seconds} s "
    f"({reason}); start process 0 there, and see that the address is right and "
    "its port open."
  )


def _messages(link: Link, end: float) -> Iterator[dict]:
  """Yield what comes until the other has gone or time is up."""
  with contextlib.suppress(TimeoutError):
    while message := link.receive(max(end - time.monotonic(), 0.0)):
      yield message


def _missing(
  address: str, processes: int, here: Collection[int], seconds: int
) -> str:
  missing = [str(p) for p in range(processes) if p not in here]
  if len(missing) > 8:
    missing[8:] = [f"{len(missing) - 8} more"]
  *most, last = missing
  them = f"{', '.join(most)} and {last} are" if most else f"{last} is"
  return (
    f"{len(here)} of {processes} processes joined {address} in {seconds} s; "
    f"{them} missing: start {'them' if most else 'it'}, or look at "
    f"{'their logs' if most else 'its log'}."
  )


def _name(process: int) -> str:
  return f"process {process} ({socket.gethostname()}, pid {os.getpid()})"


def _listener(port: int) -> socket.socket:
  """Return a socket that listens on all addresses, as JAX will after it."""
  dual = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ("::" if dual else "", port),
      family=socket.AF_INET6 if dual else socket.AF_INET,
      dualstack_ipv6=dual,
      backlog=1024,
    )
  except OSError as error:
    raise OSError(
      f"process 0 cannot listen on port {port} ({error.strerror}); end what "
      "uses it, or give another port to all."
    ) from None
