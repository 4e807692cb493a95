# SPDX-License-Identifier: Apache-2.0
"""`make manifests`: everything that is rendered from the chart and its rules, written anew."""

from __future__ import annotations

from tests.manifests import INSTALL, OVERLAYS, render


def main() -> None:
    """Writes the files that differ, and removes overlays that are none any more."""
    files = render.files()
    for path in sorted(OVERLAYS.rglob("*.yaml")):
        if path not in files:
            print(f"{path.relative_to(INSTALL)}: removed")
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    for path, text in files.items():
        if path.is_symlink() or not path.exists() or path.read_text() != text:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"{path}: written")


if __name__ == "__main__":
    main()
