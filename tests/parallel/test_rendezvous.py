"""Processes that find each other: real sockets, without JAX."""

import contextlib
import socket
import threading
import time
from concurrent import futures

import pytest

from var_jax.parallel import rendezvous


def address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def meet(where, processes, those, seconds=1):
  """Return what `rendezvous.meet` returns or raises in each of those."""
  with futures.ThreadPoolExecutor(len(those)) as pool:
    calls = [
      pool.submit(rendezvous.meet, where, processes, p, seconds, 10)
      for p in those
    ]
    return [call.exception() or call.result() for call in calls]


def close(meetings):
  for links, _ in meetings:
    for link in links.values():
      link.close()


def test_processes_meet():
  meetings = meet(address(), 3, [2, 0, 1], seconds=10)
  links, names = meetings[1]
  assert sorted(links) == [1, 2]
  assert [sorted(names) for _, names in meetings] == [[0, 1, 2]] * 3
  assert names[2].startswith("process 2 (")
  close(meetings)


@pytest.mark.parametrize(
  "processes, missing, message",
  [
    (4, [1, 3], "2 of 4 processes joined {} in 1 s; 1 and 3 are missing: start "
     "them, or look at their logs."),
    (3, [1], "2 of 3 processes joined {} in 1 s; 1 is missing: start it, or "
     "look at its log."),
    (12, range(2, 12), "2 of 12 processes joined {} in 1 s; 2, 3, 4, 5, 6, 7, "
     "8, 9 and 2 more are missing: start them, or look at their logs."),
  ],
)  # fmt: skip
def test_who_is_missing_is_named_to_those_who_came(processes, missing, message):
  where = address()
  came = [p for p in range(processes) if p not in missing]
  errors = meet(where, processes, came)
  assert [type(error) for error in errors] == [OSError, OSError]
  assert {str(error) for error in errors} == {message.format(where)}


def test_a_coordinator_that_does_not_answer_is_named_in_time():
  where, begin = address(), time.monotonic()
  (error,) = meet(where, 2, [1])
  assert time.monotonic() - begin < 3
  assert f"coordinator {where} did not answer process 1 in 1 s" in str(error)
  assert "Connection refused" in str(error)


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    (error,) = meet(f"127.0.0.1:{port}", 2, [0])
  assert f"cannot listen on port {port} (Address already in" in str(error)


def test_something_else_that_answers_is_not_the_coordinator():
  with socket.create_server(("127.0.0.1", 0)) as other:
    threading.Thread(target=hang_up_on, args=(other,), daemon=True).start()
    (error,) = meet(f"127.0.0.1:{other.getsockname()[1]}", 2, [1])
  assert "did not answer process 1 in 1 s (nothing came back)" in str(error)


def hang_up_on(server):
  with contextlib.suppress(OSError):
    while True:
      server.accept()[0].close()


def test_strangers_and_those_who_left_do_not_count():
  where = address()
  with futures.ThreadPoolExecutor(3) as pool:
    host = pool.submit(rendezvous.meet, where, 3, 0, 20, 10)
    say_and_leave(where, b"GET / HTTP/1.1\n")
    say_and_leave(where, b'{"process": 1, "processes": 3, "name": "dead"}\n')
    # A process that was started again takes the place of its dead self.
    rest = [pool.submit(rendezvous.meet, where, 3, p, 20, 10) for p in (1, 2)]
    meetings = [call.result() for call in (host, *rest)]
  assert meetings[0][1][1].startswith("process 1 (")
  close(meetings)


def test_who_came_and_left_is_missing():
  where = address()
  with futures.ThreadPoolExecutor(1) as pool:
    host = pool.submit(rendezvous.meet, where, 3, 0, 2, 10)
    say_and_leave(where, b'{"process": 1, "processes": 3, "name": "dead"}\n')
    message = str(host.exception())
  assert message.startswith(f"1 of 3 processes joined {where} in 2 s; 1 and 2")


def say_and_leave(where, line):
  end = time.monotonic() + 5
  while time.monotonic() < end:
    with contextlib.suppress(ConnectionRefusedError):
      with socket.create_connection(rendezvous.split(where)) as stranger:
        stranger.sendall(line)
      return
    time.sleep(0.05)


def test_two_who_say_they_are_the_same_are_told():
  where = address()
  errors = sorted(str(error) for error in meet(where, 3, [0, 1, 1]))
  told = f"2 of 3 processes joined {where} in 1 s; 2 is missing"
  assert [error.startswith(told) for error in errors] == [True, True, False]
  assert "say that they are process 1; give each an id of its own" in errors[2]


def test_who_was_told_of_another_number_is_refused():
  where = address()
  with futures.ThreadPoolExecutor(2) as pool:
    host = pool.submit(rendezvous.meet, where, 2, 0, 2, 10)
    other = pool.submit(rendezvous.meet, where, 3, 1, 2, 10)
    assert "was told of 3 processes and process 0 (" in str(other.exception())
    assert "1 of 2 processes joined" in str(host.exception())
