"""Build captioned emoji pictures from npm packages: the example data and the base model's training set.

    python -m examples.emoji example     # examples/fluent-emoji: Fluent Emoji 3D, 256x256 WebP
    python -m examples.emoji base        # .cache/emoji-base: Fluent flat and Noto, drawn from SVG
    python -m examples.emoji pictures    # .cache/emoji-pictures: both, for the autoencoder, of the
                                         # 3D pictures only those that the demo trains on
    python -m examples.emoji subject     # examples/fluent-cat: nine 3D pictures of one cat, no captions
    python -m examples.emoji pairs       # examples/emoji-pairs: the same things flat and in 3D, 128x128

Each but the subject writes the ImageFolder layout (`metadata.jsonl` with `file_name` and `text`). The
concepts are those that all three hands have drawn, so the example shares the base model's words but
not its style.
Needs npm, and the `dev` extra (resvg-py).
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from ray_jobs.data.curation.splits import Shares, content_digest, split_of

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

# name@version -> sha256 of the package's tarball
PACKAGES = {
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "fluentui-emoji@1.3.0": "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
}

# Subgroups of emojibase-data that show a thing on its own: faces, animals, plants, food, objects.
SUBGROUPS = [
    *("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical"),
    *("face-sleepy", "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative"),
    *("face-costume", "cat-face", "monkey-face", "heart"),
    *("animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine"),
    *("animal-bug", "plant-flower", "plant-other"),
    *("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet", "drink"),
    *("dishware", "transport-ground", "transport-water", "transport-air", "sky-weather"),
    *("sport", "game", "arts-crafts", "clothing", "musical-instrument", "computer"),
    *("light-video", "tool", "household"),
]

# Slugs of the pictures that show the same cat.
CAT = [
    *("grinning-cat-with-smiling-eyes", "cat-with-tears-of-joy", "smiling-cat-with-heart-eyes"),
    *("cat-with-wry-smile", "kissing-cat", "weary-cat", "crying-cat", "pouting-cat", "cat-face"),
]

PICTURE_SIZE = 128  # pixels a side of the pictures drawn from SVG, and of pairs
PAIR_EVERY = 3  # of the things, in their order, so that every group has some


def fetch(package: str) -> Path:
    """Unpack `package` (npm, checked against its sha256) under the cache; return its folder."""
    folder = CACHE / "npm" / re.sub(r"[^\w.-]+", "-", package).strip("-")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", package],
        cwd=folder.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    tarball = folder.parent / packed.stdout.split()[-1]
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != PACKAGES[package]:
        raise ValueError(f"{package}: sha256 {digest}, expected {PACKAGES[package]}")
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(tarball) as archive:
        archive.extractall(aside, filter="data")
    (aside / "package").rename(folder)
    shutil.rmtree(aside)
    tarball.unlink()
    return folder


def slug(label: str) -> str:
    """`cat with wry smile` -> `cat-with-wry-smile`: how both SVG packages name their files."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", label.lower())).strip("-")


def with_article(label: str) -> str:
    """`red apple` -> `a red apple`; plurals stay bare."""
    head = re.split(" with | of | on | in ", label)[0]
    if re.search(r"[^s]s$", head):
        return label
    return f"{'an' if label[0] in 'aeio' else 'a'} {label}"


def concepts() -> list[dict[str, Any]]:
    """Emoji that every package draws: `slug`, `caption`, `tags`, and each hand's file or SVG."""
    emojibase = fetch("emojibase-data@17.0.0") / "en"
    groups = json.loads((emojibase.parent / "meta" / "groups.json").read_text())
    wanted = {int(key) for key, name in groups["subgroups"].items() if name in SUBGROUPS}
    flat = fetch("fluentui-emoji@1.3.0") / "icons" / "flat"
    noto = json.loads((fetch("@iconify-json/noto@1.2.9") / "icons.json").read_text())["icons"]
    three = fetch("@lobehub/fluent-emoji-3d@1.1.0") / "assets"
    found = []
    for emoji in json.loads((emojibase / "data.json").read_text()):
        name = slug(emoji["label"])
        codes = emoji["hexcode"].lower()
        picture = three / f"{codes}.webp"
        if emoji.get("subgroup") not in wanted or name not in noto:
            continue
        if not picture.exists() or not (flat / f"{name}.svg").exists():
            continue
        icon = noto[name]
        width, height = icon.get("width", 128), icon.get("height", 128)
        found.append(
            {
                "slug": name,
                "caption": with_article(emoji["label"]),
                "tags": ", ".join(emoji.get("tags", [])[:3]),
                "3d": picture,
                "flat": (flat / f"{name}.svg").read_text(),
                "noto": '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>',
            }
        )
    return found


def draw(svg: str, path: Path) -> None:
    """Draw `svg` on white as a picture of PICTURE_SIZE pixels a side."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE, height=PICTURE_SIZE))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (PICTURE_SIZE, PICTURE_SIZE), "white")
    canvas.alpha_composite(drawn, ((PICTURE_SIZE - drawn.width) // 2, (PICTURE_SIZE - drawn.height) // 2))
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    canvas.convert("RGB").save(path, **options)


def write_folder(folder: Path, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder}: {len(rows)} captioned pictures")


def build_example(folder: Path) -> list[dict[str, str]]:
    """Copy the 3D pictures; one caption each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for concept in concepts():
        name = f"images/{concept['slug']}.webp"
        shutil.copyfile(concept["3d"], folder / name)
        rows.append({"file_name": name, "text": concept["caption"]})
    return rows


def build_base(folder: Path) -> list[dict[str, str]]:
    """Draw the flat pictures; two captions each (bare, and with tags, so that the words are learnt).

    Noto is what a caption means by itself; Fluent flat, whose designs the 3D pictures share, has to be
    asked for. So the example is not only shaded otherwise, but drawn by another hand.
    """
    rows = []
    for hand, mark in (("noto", ""), ("flat", ", flat")):
        (folder / hand).mkdir(parents=True, exist_ok=True)
        for concept in concepts():
            name = f"{hand}/{concept['slug']}.png"
            draw(concept[hand], folder / name)
            rows.append({"file_name": name, "text": concept["caption"] + mark})
            rows.append({"file_name": name, "text": f"{concept['caption']}{mark}: {concept['tags']}"})
    return rows


def build_pairs(folder: Path) -> list[dict[str, str]]:
    """Write what edits are trained on: the flat picture of a thing, and the 3D one that it should become."""
    from PIL import Image

    for name in ("before", "after"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for concept in concepts()[::PAIR_EVERY]:
        name = f"{concept['slug']}.webp"
        draw(concept["flat"], folder / "before" / name)
        with Image.open(concept["3d"]) as solid:
            smaller = solid.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
        smaller.save(folder / "after" / name, quality=90, method=6)
        text = f"render it in 3D: {concept['caption']}"
        rows.append({"file_name": f"after/{name}", "before": f"before/{name}", "text": text})
    return rows


def build_subject(folder: Path) -> None:
    """Copy the 3D pictures of the cat."""
    for concept in concepts():
        if concept["slug"] in CAT:
            shutil.copyfile(concept["3d"], folder / f"{concept['slug']}.webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["example", "base", "pictures", "subject", "pairs"])
    what = parser.parse_args().what
    if what == "example":
        folder = ROOT / "examples" / "fluent-emoji"
        write_folder(folder, build_example(folder))
    elif what == "base":
        folder = CACHE / "emoji-base"
        write_folder(folder, build_base(folder))
    elif what == "pairs":
        folder = ROOT / "examples" / "emoji-pairs"
        write_folder(folder, build_pairs(folder))
    elif what == "subject":
        build_subject(ROOT / "examples" / "fluent-cat")
    else:
        folder = CACHE / "emoji-pictures"
        rows = build_base(folder)[::2]
        for row in build_example(folder):
            digest = content_digest((folder / row["file_name"]).read_bytes())
            if split_of(digest, Shares(seed=0, validation=0.15, test=0.15)) == "train":
                rows.append(row)
        write_folder(folder, rows)


if __name__ == "__main__":
    main()
