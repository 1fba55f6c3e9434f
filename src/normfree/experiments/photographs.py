"""Eight square crops of the two photographs that come with scikit-learn, as a folder of PNG files.

For the demo: real images that every development machine has. ``python -m normfree.experiments.photographs FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def write_photographs(folder: Path, pixels: int = 320) -> list[Path]:
    """Writes the crops, pixels × pixels each, and returns their paths.

    Raises:
        ImportError: scikit-learn is not installed.
        OSError: the folder cannot be written to.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    pictures = load_sample_images()
    for name, picture in zip(pictures.filenames, pictures.images, strict=True):
        height, width = picture.shape[:2]
        for index, (top, left) in enumerate(
            (top, left) for top in (0, height - pixels) for left in (0, width - pixels)
        ):
            path = folder / f"{Path(name).stem}-{index}.png"
            Image.fromarray(picture[top : top + pixels, left : left + pixels]).save(path)
            paths.append(path)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m normfree.experiments.photographs FOLDER")
    written = write_photographs(Path(sys.argv[1]))
    print(f"wrote {len(written)} crops to {sys.argv[1]}")
