"""The pages in a real browser: plots drawn, labels apart, phones served, nothing fetched.

The browser is Chromium, headless, found through DITHER_BROWSER or the PATH; every host name is mapped to a server on
loopback that logs what it is asked for. Without a browser the tests skip.
"""

from __future__ import annotations

import html as escaping
import json
import os
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dither.report import CompareRecord, InspectRecord, html, inspect_html, plot_svg

WIDTHS = (360, 1200)
ASKED = os.environ.get("DITHER_BROWSER")
BROWSER = ASKED or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the PATH, nor in DITHER_BROWSER"
)


@dataclass
class Site:
    """A folder served on loopback, and the paths that were asked for."""

    folder: Path
    port: int
    asked: list[str] = field(default_factory=list)

    def run(self, profile: Path, *arguments: str) -> str:
        """Run the browser once with a fresh profile; its standard output."""
        command = [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-features=NetworkTimeServiceQuerying",
            "--disable-default-apps",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--host-resolver-rules=MAP * 127.0.0.1:{self.port}, EXCLUDE 127.0.0.1",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def dump(self, profile: Path, page: str) -> Any:
        """What a page wrote into its ``#out`` as JSON."""
        dom = self.run(profile, "--window-size=1400,1000", "--dump-dom", f"http://127.0.0.1:{self.port}/{page}")
        found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
        assert found is not None and found.group(1), dom[-2000:]
        result = json.loads(escaping.unescape(found.group(1)))
        assert "error" not in result, result["error"]
        return result


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            served.asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    served = Site(folder, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()


def harness(site: Site, name: str, frames: list[str]) -> str:
    """A page that holds others in frames and measures them."""
    shutil.copy(Path(__file__).with_name("browser.js"), site.folder)
    head = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre id="out"></pre>'
    (site.folder / name).write_text(head + '<script src="browser.js"></script>' + "".join(frames), encoding="utf-8")
    return name


def embed(name: str, source: str, width: int, more: str = "") -> str:
    return f'<iframe name="{name}" src="{source}" width="{width}" height="900" style="border:0" {more}></iframe>\n'


@pytest.fixture(scope="module")
def measured(
    site: Site, records: dict[str, CompareRecord], inspection: InspectRecord, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Every page at every width, measured in one run of the browser."""
    for name, record in records.items():
        html(record, site.folder / f"{name}.html")
    html(list(records.values()), site.folder / "all.html")
    inspect_html(inspection, site.folder / "inspect.html")
    names = [*records, "all", "inspect"]
    frames = [embed(n, f"{n}.html", width) for n in names for width in WIDTHS]
    frames.append(embed("plain", "typical.html?plain", 1200, 'sandbox="allow-same-origin"'))  # no scripts
    frames.append(embed("pressed", "typical.html?pressed", 1200, "data-press"))
    site.asked.clear()
    result: dict[str, Any] = site.dump(tmp_path_factory.mktemp("profile"), harness(site, "harness.html", frames))
    result["asked"] = list(site.asked)
    result["expected"] = [
        "/harness.html",
        "/browser.js",
        *[f"/{n}.html" for n in names],
        "/typical.html?plain",
        "/typical.html?pressed",
    ]
    return result


def frame(measured: dict[str, Any], name: str, width: int) -> dict[str, Any]:
    return next(f for f in measured["frames"] if f["name"] == name and f["width"] == width)


def test_nothing_is_fetched(measured: dict[str, Any]) -> None:
    # the two widths of a page may share one request through the browser's cache
    assert set(measured["asked"]) == set(measured["expected"])
    assert all(f["resources"] == [] for f in measured["frames"])


def test_the_log_sees_a_fetch_and_the_policy_stops_it(
    site: Site, records: dict[str, CompareRecord], tmp_path: Path
) -> None:
    text = html(records["one"], tmp_path / "one.html").read_text(encoding="utf-8")
    leaking = '<img src="/leak-own.png"><img src="http://elsewhere.test/leak-far.png">'
    leaking += '<link rel="stylesheet" href="/leak.css">'
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", text)
    assert policy is not None
    (site.folder / "kept.html").write_text(text.replace("<main>", f"<main>{leaking}"), encoding="utf-8")
    (site.folder / "open.html").write_text(
        text.replace("<main>", f"<main>{leaking}").replace(policy.group(), ""), encoding="utf-8"
    )
    leaks = {}
    for name in ("open", "kept"):
        site.asked.clear()
        site.run(tmp_path / name, "--dump-dom", f"http://127.0.0.1:{site.port}/{name}.html")
        leaks[name] = {path for path in site.asked if "leak" in path}
    assert leaks == {"open": {"/leak-own.png", "/leak-far.png", "/leak.css"}, "kept": set()}


def test_plots_are_drawn_inside_their_frames(measured: dict[str, Any]) -> None:
    for f in measured["frames"]:
        for plot in f["plots"]:
            where = (f["name"], f["width"], plot["title"])
            assert plot["finite"] and plot["inView"] and plot["described"], where
            assert plot["outside"] == [], where


def test_no_two_labels_overlap(measured: dict[str, Any]) -> None:
    clashes = {
        (f["name"], f["width"], p["title"]): p["clashes"]
        for f in measured["frames"]
        for p in f["plots"]
        if p["clashes"]
    }
    assert not clashes


@pytest.mark.parametrize("width", WIDTHS)
def test_every_row_has_its_mark(measured: dict[str, Any], records: dict[str, CompareRecord], width: int) -> None:
    for name, record in records.items():
        f = frame(measured, name, width)
        shown = [row for row in record.rows if row.status == "ok" and row.bits_per_weight is not None]
        picture = f["plots"][0]
        assert picture["marks"] == len(shown), name
        assert picture["steps"] == (
            1 if any(row.measured and (row.perplexity or 0) < 20 * 18.3 for row in record.rows) else 0
        ), name
        assert f["tables"][0] == len(record.rows) + 1, name
        assert f["scripts"] == 1 and f["images"] == 0 and f["title"] != "owned", name
    typical = frame(measured, "typical", width)
    assert [p["title"] for p in typical["plots"][:4]] == [
        "smollm2: perplexity (log scale) against bits per weight",
        "smollm2: excess over float, % (log scale) against bits per weight",
        "smollm2: error by block",
        "smollm2: what each row took",
    ]
    assert typical["plots"][0]["arrows"] == 3 and typical["plots"][0]["shapes"] == 4
    assert typical["plots"][2]["marks"] >= 12 and typical["plots"][3]["marks"] == 36
    assert len(typical["plots"]) == 4 + 12
    if width == 1200:
        assert typical["plots"][0]["labels"] == 12
    assert frame(measured, "hopeless", width)["plots"][0]["arrows"] == 4
    inspected = frame(measured, "inspect", width)["plots"]
    assert len(inspected) == 3 + 3 and all(plot["marks"] > 20 for plot in inspected)


def test_phones_never_scroll_sideways_and_text_stays_legible(measured: dict[str, Any]) -> None:
    for f in measured["frames"]:
        assert f["scroll"] <= f["width"], (f["name"], f["width"], f["scroll"])
        assert f["smallest"] >= 10, (f["name"], f["width"])


def test_plots_need_no_script(measured: dict[str, Any]) -> None:
    plain, scripted = frame(measured, "plain", 1200), frame(measured, "typical", 1200)
    assert not plain["ran"] and scripted["ran"]
    assert plain["plots"] == scripted["plots"]


def test_sorting_the_theme_and_tooltips(measured: dict[str, Any]) -> None:
    pressed = measured["pressed"]
    light, dark, again = pressed["grounds"]
    assert light == again == "rgb(255, 255, 255)" and dark == "rgb(20, 23, 27)"
    (up, rising), (down, falling) = pressed["orders"]
    assert (up, down) == ("ascending", "descending")
    assert rising[:3] == ["18.30", "20.28", "20.62"] and rising[-1] == "1.4e6" and falling == rising[::-1]
    assert re.fullmatch(r".+: perplexity .+ bits per weight", pressed["tips"][0])
    assert re.fullmatch(r"rtn 4-bit, block \d+: [\d.e-]+", pressed["tips"][1])


def test_dark_mode_follows_the_reader(site: Site, measured: dict[str, Any], tmp_path: Path) -> None:
    grounds = []
    for scheme in ("1", "0"):
        picture = tmp_path / f"{scheme}.png"
        address = f"http://127.0.0.1:{site.port}/one.html"
        site.run(
            tmp_path / scheme,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=500,300",
            f"--screenshot={picture}",
            address,
        )
        grounds.append(pixels(picture)[2][0])
    assert grounds == [(255, 255, 255), (20, 23, 27)]


def test_the_plot_file_is_drawn(site: Site, records: dict[str, CompareRecord], tmp_path: Path) -> None:
    plot_svg(records["typical"], site.folder / "plot.svg")
    picture = tmp_path / "plot.png"
    site.run(
        tmp_path / "profile",
        "--window-size=820,520",
        f"--screenshot={picture}",
        f"http://127.0.0.1:{site.port}/plot.svg",
    )
    seen = [colour for row in pixels(picture) for colour in row]
    for series in ("#0072b2", "#c8500a", "#008560", "#a8457f"):
        colour = tuple(int(series[i : i + 2], 16) for i in (1, 3, 5))
        assert seen.count(colour) > 60, series


def pixels(path: Path) -> list[list[tuple[int, ...]]]:
    """The RGB rows of an 8-bit, non-interlaced PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, size, step = 8, b"", (0, 0), 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            assert depth == 8 and colour in (2, 6) and interlace == 0
            size, step = (width, height), 3 if colour == 2 else 4
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, stride = zlib.decompress(packed), size[0] * step
    rows: list[list[tuple[int, ...]]] = []
    above = bytearray(stride)
    for y in range(size[1]):
        start = y * (stride + 1)
        line = bytearray(raw[start + 1 : start + 1 + stride])
        _unfilter(raw[start], line, above, step)
        rows.append([tuple(line[i : i + 3]) for i in range(0, stride, step)])
        above = line
    return rows


def _unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> None:
    """Undo one row's PNG filter in place (none, sub, up, average, Paeth)."""
    for i in range(len(line)):
        a, b, c = (line[i - step] if i >= step else 0), above[i], (above[i - step] if i >= step else 0)
        if kind == 1:
            guess = a
        elif kind == 2:
            guess = b
        elif kind == 3:
            guess = (a + b) // 2
        elif kind == 4:
            p = a + b - c
            near = sorted(((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c)))
            guess = near[0][2]
        else:
            return
        line[i] = (line[i] + guess) & 255
