"""How long a browser takes to show a page of compare.py --html.

    python studies/paint.py report.html

Opens a copy in headless Chromium three times and prints its size and the time of the first paint, in
milliseconds from the start of the navigation (the browser's own start is not in it). The copy lacks the
page's security policy, which forbids the script that measures."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

POLICY = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
WATCH = """<head><script>new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) console.log("PAINT", entry.name, entry.startTime);
}).observe({type: "paint", buffered: true});</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def first_paint(browser, page, folder):
    """Milliseconds from the start of the navigation to the first paint of a page, float."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder}/profile", "--window-size=1440,1000"]
    command += [f"--screenshot={folder}/page.png", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'"PAINT first-paint ([\d.]+)', done.stderr)
    if not found:
        sys.exit(f"{browser} painted nothing: {done.stderr[-300:]}")
    return float(found[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("page", type=Path, help="a page that compare.py --html wrote")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is installed")
    text = args.page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(re.sub(POLICY, "", text).replace("<head>", WATCH, 1), encoding="utf-8")
        times = [first_paint(browser, copy, folder) for _ in range(3)]
    print(f"{args.page}: {args.page.stat().st_size / 1e6:.2f} MB")
    print(f"first paint: {', '.join(f'{time:.0f}' for time in times)} ms")


if __name__ == "__main__":
    main()
