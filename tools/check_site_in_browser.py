"""Open every page of the built site in headless Chromium, as wide as a laptop and as narrow as a phone.

    python tools/check_site_in_browser.py [PAGE ...] [--pictures FOLDER]

Fails if a page is wider than its window, if code, a table or a formula is cut off, or if a script fails. The pages are
loaded one after the other in a frame of a page that this script serves on this machine.
"""

import argparse
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "_docs"
WIDTHS = (1280, 390)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
FRAME = """<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;height:900px"></iframe><script>
const jobs = JOBS, found = [], frame = document.getElementById("frame");
const boxes = "article pre, article pre > code, article table, article .output, article math";
const ours = part => !part.src || part.src.startsWith(location.origin);  // pictures of other sites may not be at hand
const hides = box => ["hidden", "clip"].includes(getComputedStyle(box).overflowX);
function judge(page, width) {
  const inside = frame.contentDocument, article = inside.querySelector("article");
  const wide = page.endsWith("?plain") ? article.getBoundingClientRect().right : inside.documentElement.scrollWidth;
  const note = words => found.push(`${page} at ${width}: ${words}`);
  if (wide > width) note(`the page is ${Math.ceil(wide)} wide`);
  for (const box of inside.querySelectorAll(boxes))
    if (hides(box) && box.scrollWidth > box.clientWidth + 1) note(`cut off: ${box.textContent.trim().slice(0, 60)}`);
  for (const image of inside.querySelectorAll("article img"))
    if (ours(image) && !image.naturalWidth) note(`no picture ${image.src}`);
}
function next(number) {
  if (number == jobs.length) return fetch("/found", {method: "POST", body: JSON.stringify(found)});
  const [page, width] = jobs[number];
  frame.style.width = width + "px";
  frame.onload = () => setTimeout(() => { judge(page, width); next(number + 1); }, page.endsWith("?plain") ? 0 : 500);
  frame.src = "/" + page;
  const watch = setInterval(() => {
    const inner = frame.contentWindow;
    if (inner.location.pathname + inner.location.search != "/" + page) return;
    clearInterval(watch);
    inner.addEventListener("error", event => {
      if (event.message || ours(event.target)) found.push(`${page}: ${event.message || "no file " + event.target.src}`);
    }, true);
  }, 1);
}
next(0);
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    "Serves the site and the page with the frame, and receives the results."

    def do_GET(self):
        if self.path == "/frame.html":
            self.send_page(self.server.frame)
        elif self.path.endswith("?plain"):
            text = (SITE / self.path[1:].removesuffix("?plain")).read_text(encoding="utf8")
            self.send_page(re.sub(r"<script\b.*?</script>", "", text, flags=re.S))
        else:
            super().do_GET()

    def send_page(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


def chromium() -> str:
    "The path of the browser."
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    sys.exit("no Chromium on this machine: install the package `chromium`")


def served(frame: str) -> http.server.ThreadingHTTPServer:
    "A server of the site on this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    server.frame, server.found, server.done = frame, None, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def look(pages: list[str], limit: float) -> list[str]:
    "The problems of the pages; an error if the browser does not finish."
    scripted = {page.split("/")[0]: page for page in pages}.values()  # scripts are the same on all pages of a folder
    jobs = [(page if page in scripted else f"{page}?plain", width) for width in WIDTHS for page in pages]
    server = served(FRAME.replace("JOBS", json.dumps(jobs)))
    with tempfile.TemporaryDirectory() as profile:
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        browser = subprocess.Popen(
            [
                chromium(),
                *FLAGS,
                f"--user-data-dir={profile}",
                "--window-size=1400,1000",
                "--remote-debugging-port=0",
                address,
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            if not server.done.wait(limit):
                return [f"the browser did not finish within {limit:.0f} s"]
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return server.found


def take_pictures(pages: list[str], folder: Path) -> None:
    "A picture of the top of each page at both widths."
    folder.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for page in pages:
            style = f"border:0;width:{width}px;height:2200px"
            server = served(f'<!doctype html><body style="margin:0"><iframe src="/{page}" style="{style}">')
            target = folder / f"{page.replace('/', '_').removesuffix('.html')}_{width}.png"
            with tempfile.TemporaryDirectory() as profile:
                command = [chromium(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={max(width, 500)},2200"]
                address = f"http://127.0.0.1:{server.server_port}/frame.html"
                subprocess.run([*command, f"--screenshot={target}", address], check=True, capture_output=True)
            server.shutdown()
            print(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="pages of the site; all by default")
    parser.add_argument("--pictures", type=Path, help="also write a picture of the top of each page here")
    options = parser.parse_args()
    every = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html")
    pages = options.pages or every
    if not pages:
        sys.exit("there is no site yet: run `make docs`")
    found = look(pages, limit=60 + 4 * len(pages))
    if options.pictures:
        take_pictures(pages, options.pictures)
    print(*found, f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
