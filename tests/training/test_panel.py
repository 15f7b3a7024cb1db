"""report.html: all evaluations, no scripts, no links."""

import html.parser
import json
import re

import numpy as np

from var_jax.training import panel


class Tags(html.parser.HTMLParser):
  """Collects tags and their attributes; what is opened must be closed."""

  def __init__(self):
    super().__init__()
    self.found, self.open = [], []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


RECORDS = [
  {"step": 10, "loss": 3.0},
  {"step": 10, "eval/psnr": 11.5, "eval/used/0": 4.0, "eval/used/1": 9.0},
  {"step": 20, "eval/psnr": "nan", "eval/used/0": 5.0, "eval/used/1": 7.0},
  {"step": 30, "eval/psnr": 12.5, "eval/used/0": 6.0, "eval/used/1": 8.0},
]


def test_charts_have_the_points_of_evaluations():
  charts = panel.charts_of(RECORDS)
  assert charts == {
    "psnr": {"": [(10, 11.5), (30, 12.5)]},
    "used": {
      "0": [(10, 4.0), (20, 5.0), (30, 6.0)],
      "1": [(10, 9.0), (20, 7.0), (30, 8.0)],
    },
  }


def test_a_page_is_whole_and_stands_alone(tmp_path):
  workdir = tmp_path / "a <run>"
  workdir.mkdir()
  lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
  (workdir / "metrics.jsonl").write_text(lines)
  picture = np.zeros((4, 6, 3), np.uint8)
  panel.write(workdir, {"reconstructions": picture})
  text = (workdir / "report.html").read_text()
  page = Tags()
  page.feed(text)
  assert not page.open
  names = [tag for tag, _ in page.found]
  assert names.count("svg") == 2 and names.count("polyline") == 3
  assert not {"script", "link", "a"} & {*names}
  (image,) = [attributes for tag, attributes in page.found if tag == "img"]
  assert image["src"].startswith("data:image/png;base64,")
  assert "a &lt;run&gt;" in text and "<run>" not in text
  # The table has what the last evaluation found.
  rows = re.findall(r"<tr>(.+?)</tr>", text)
  assert [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows] == [
    ["scale", "used"], ["0", "6"], ["1", "8"],
  ]  # fmt: skip
  assert len(list(workdir.iterdir())) == 2


def test_higher_is_drawn_higher_and_later_to_the_right():
  (line,) = re.findall(
    r'points="(.+?)"', panel.render("x", {"a": {"": [(1, 2.0), (5, 9.0)]}}, {})
  )
  (x0, y0), (x1, y1) = [map(float, point.split(",")) for point in line.split()]
  assert x0 < x1 and y0 > y1


def test_one_evaluation_is_a_page_too():
  text = panel.render("x", {"a": {"": [(1, 2.0)]}}, {})
  assert "nan" not in text and "step" in text
