"""What the others are told of one of them: three ends in one process."""

import queue
import socket
import threading
import time
from concurrent import futures

import pytest

from var_jax.parallel import lifeline
from var_jax.parallel.rendezvous import Link


class Group:
  """Lifelines of three processes, all in this one."""

  def __init__(self):
    processes = 3
    pairs = {p: socket.socketpair() for p in range(1, processes)}
    hosts = {p: Link(pair[0]) for p, pair in pairs.items()}
    names = {p: f"process {p}" for p in range(processes)}
    self.said, self.ended = queue.Queue(), queue.Queue()
    self.links = [hosts, *({0: Link(pair[1])} for pair in pairs.values())]
    self.lines = [
      lifeline.Lifeline(
        p,
        links,
        names,
        lambda line, p=p: self.said.put((p, line)),
        lambda p=p: self.ended.put(p),
      )
      for p, links in enumerate(self.links)
    ]

  def kill(self, process):
    """Hang up as the kernel does; a dead process says nothing itself."""
    self.lines[process]._leaving = True
    for link in self.links[process].values():
      link._socket.shutdown(socket.SHUT_RDWR)

  def told(self, count):
    """Return what so many processes say before they end."""
    said = dict(self.said.get(timeout=10) for _ in range(count))
    ended = {self.ended.get(timeout=10) for _ in range(count)}
    assert ended == said.keys()
    return said


@pytest.fixture
def group(monkeypatch):
  # Nobody waits for news, or for the others to end.
  monkeypatch.setattr(lifeline, "_NEWS_SECONDS", 0.0)
  monkeypatch.setattr(lifeline, "_ENDING_SECONDS", 0.1)
  group = Group()
  yield group
  for process, line in enumerate(group.lines):
    line.leave()
    group.kill(process)
  for thread in threading.enumerate():
    if thread.name.endswith("(_watch)"):
      thread.join(5)
  for links in group.links:
    for link in links.values():
      link.close()


def test_all_hear_what_each_says(group):
  with futures.ThreadPoolExecutor(3) as pool:
    for part in ("first", "second"):
      values = [{part: p, "text": "x" * 100_000} for p in range(3)]
      heard = pool.map(lambda line, v: line.exchange(v, 5), group.lines, values)
      assert list(heard) == [values] * 3


def test_who_says_nothing_is_named(group):
  with futures.ThreadPoolExecutor(2) as pool:
    host = pool.submit(group.lines[0].exchange, 0, 0.3)
    pool.submit(group.lines[2].exchange, 0, -4.0)
    with pytest.raises(OSError, match="^process 1 said nothing in time; look"):
      host.result()


@pytest.mark.parametrize("killed", [0, 1])
def test_of_a_process_that_is_killed_the_others_say_so_and_end(group, killed):
  group.kill(killed)
  said = group.told(2)
  assert killed not in said
  for line in said.values():
    assert line.startswith(f"process {killed} is gone without a word")


@pytest.mark.parametrize("failed", [0, 1])
def test_of_a_process_that_fails_the_others_tell_why(group, failed):
  group.lines[failed].fail("a disk is full")
  said = group.told(2)
  assert failed not in said
  assert set(said.values()) == {f"process {failed} stopped: a disk is full"}


def test_processes_that_leave_are_not_missed(group):
  for process in (1, 2, 0):
    group.lines[process].leave()
    group.kill(process)
  time.sleep(0.3)
  assert group.said.empty() and group.ended.empty()
