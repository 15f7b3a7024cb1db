"""What joined processes tell each other beside the devices.

A run needs all its processes. Each holds a connection to process 0 from the
start (`rendezvous.py`); when a process is killed its kernel closes it, and the
others end at once with a line that names it, in place of waiting in a
collective. JAX's heartbeats stay for what this cannot see, a process that is
there and does nothing.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from var_jax.parallel.rendezvous import Link

# Of a death that shows as an error here, the news comes in this time.
_NEWS_SECONDS = 2.0
# The others need about that to end with a line of their own.
_ENDING_SECONDS = 3.0


def _say(line: str) -> None:
  sys.stdout.flush()
  os.write(2, f"var-jax: {' '.join(line.split())}\n".encode())


def _end() -> None:
  """End, whatever the other threads wait for."""
  os._exit(1)


class Lifeline:
  """This process's end of the connections.

  Args:
    links, names: as of `rendezvous.meet`.
    say, end: called from a thread, say with a line, when one is lost.
  """

  def __init__(
    self,
    process: int,
    links: Mapping[int, Link],
    names: Mapping[int, str],
    say: Callable[[str], None] = _say,
    end: Callable[[], None] = _end,
  ):
    self._process, self._links, self._names = process, links, names
    self._say, self._end = say, end
    self._said = queue.Queue()
    self._leaving = False
    self._losing = threading.Lock()
    for other, link in links.items():
      threading.Thread(
        target=self._watch, args=(other, link), daemon=True
      ).start()

  def exchange(self, value: Any, seconds: float) -> list[Any]:
    """Return what all processes give, by process; JSON.

    No device takes part, so it works where those do not.

    Raises:
      OSError: one gave nothing in that time; the message says which.
    """
    end = time.monotonic() + seconds
    if self._process:
      self._links[0].send({"say": value})
      # The one that knows who is late has the first word.
      return self._hear(end + 5, {})[0]
    values = {0: value}
    while len(values) < len(self._names):
      values |= self._hear(end, values)
    everything = [values[p] for p in sorted(values)]
    self._tell({"say": everything})
    return everything

  def _hear(self, end: float, heard: Mapping[int, Any]) -> dict[int, Any]:
    try:
      other, value = self._said.get(timeout=max(end - time.monotonic(), 0.0))
    except queue.Empty:
      late = [self._names[p] for p in sorted(self._names) if p not in heard]
      late = late if self._process == 0 else [self._names[0]]
      raise OSError(
        f"{', '.join(late)} said nothing in time; look at its log."
      ) from None
    return {other: value}

  def leave(self) -> None:
    """Say that the end of this process is meant."""
    if not self._leaving:
      self._leaving = True
      self._tell({"bye": self._process})

  def fail(self, reason: str) -> None:
    """Tell the others why this process ends, unless one of them is the cause.

    In that case this does not return.
    """
    time.sleep(_NEWS_SECONDS)
    self._leaving = True
    line = f"{self._names[self._process]} stopped: {reason}"
    self._tell({"lost": line})
    self._outlast()

  def _tell(self, message: dict) -> None:
    for link in self._links.values():
      link.send(message)

  def _watch(self, other: int, link: Link) -> None:
    while True:
      message = link.receive()
      if message is None:
        self._lost(
          f"{self._names[other]} is gone without a word: killed, out of "
          "memory, or its machine failed; look there, then run the same "
          "command on all to go on from the newest checkpoint."
        )
        return
      if "lost" in message:
        self._lost(message["lost"])
        return
      if "bye" in message:
        return
      self._said.put((other, message["say"]))

  def _lost(self, line: str) -> None:
    # Of several that end together the first is named.
    with self._losing:
      if not self._leaving:
        self._leaving = True
        self._tell({"lost": line})
        self._say(line)
        self._outlast()
        self._end()

  def _outlast(self) -> None:
    """Let process 0 end last: XLA aborts those that lose its service."""
    end = time.monotonic() + _ENDING_SECONDS
    links = self._links.values() if self._process == 0 else ()
    while time.monotonic() < end and not all(link.gone() for link in links):
      time.sleep(0.05)
