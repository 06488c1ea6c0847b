"""Composition of a dataset as HTML: words, repeated captions, sizes, brightness, classes; what is rare."""

from collections.abc import Mapping
from html import escape

from ray_jobs.report.elements import counted, histogram_svg, note, table
from ray_jobs.run.manifest import Class, Composition, Spread

TITLES = {
    "side": ("Size", "shorter side in pixels"),
    "brightness": ("Brightness", "mean luma, of 0..255"),
}
FEW = 0.05  # share of pictures below which dark or bright ones are called rare
DARK_BELOW, BRIGHT_FROM = 64, 192  # mean luma


def composition_section(found: Composition) -> str:
    """Section of a report about what the kept pictures and their captions are; "" if it is not known."""
    if not found.pictures:
        return ""
    parts = [
        "<h3>Captions</h3>",
        _words(found),
        _repeated(found),
        "<h3>Pictures</h3>",
        *map(note, _rare(found)),
    ]
    parts.append(f'<div class="cards measures">{_cards(found.spreads, "")}</div>')
    if found.column:
        parts += [f"<h3>By {escape(found.column)}</h3>", *map(note, _scarce(found)), _classes(found)]
    return "".join(parts)


def _words(found: Composition) -> str:
    words = ", ".join(f"{word} ({count:,})" for word, count in found.words.items())
    return note(
        f"Most frequent words, with the captions that have them, without articles and prepositions: {words}."
    )


def _repeated(found: Composition) -> str:
    if not found.repeated:
        return note("No two pictures have the same caption.")
    rows = [(caption, f"{count:,}") for caption, count in found.repeated.items()]
    share = found.num_repeated / found.pictures
    words = f"{counted(found.num_repeated, 'picture')} ({share:.0%}) have a caption that others have too."
    return note(words) + table(("most repeated captions", "pictures"), rows, "numbers repeated")


def _rare(found: Composition) -> list[str]:
    """Sentences about what most pictures are not."""
    sentences = []
    if found.enlarged:
        share = found.enlarged / found.pictures
        pictures = counted(found.enlarged, "picture")
        sentences.append(
            f"{pictures} ({share:.0%}) have a shorter side below data.resolution, and are enlarged."
        )
    if spread := found.spreads.get("brightness"):
        dark = sum(n for low, n in zip(spread.edges, spread.counts, strict=False) if low < DARK_BELOW)
        bright = sum(n for low, n in zip(spread.edges, spread.counts, strict=False) if low >= BRIGHT_FROM)
        for kind, count in (("Dark", dark), ("Bright", bright)):
            if count < FEW * found.pictures:
                sentences.append(
                    f"{kind} pictures are rare: {count:,} of {found.pictures:,} have a mean luma "
                    f"{f'below {DARK_BELOW}' if kind == 'Dark' else f'of {BRIGHT_FROM} or more'}."
                )
    return sentences


def _scarce(found: Composition) -> list[str]:
    if not found.num_scarce:
        return [f"No value of {found.column} has less than half of an equal share."]
    names = ", ".join(f"{value or '(empty)'} ({count:,})" for value, count in found.scarce.items())
    more = (
        f" and {found.num_scarce - len(found.scarce):,} more" if found.num_scarce > len(found.scarce) else ""
    )
    return [
        f"Under-represented, with less than half of an equal share of the pictures: {names}{more}. "
        "Add pictures."
    ]


def _classes(found: Composition) -> str:
    """Pictures of the most frequent values, with their sizes and brightness."""
    rows = [
        (value or "(empty)", f"{each.pictures:,}", f"{each.pictures / found.pictures:.1%}")
        for value, each in found.classes.items()
    ]
    more = found.num_classes - len(found.classes)
    rest = note(f"{more:,} more values are not shown.") if more else ""
    cards = "".join(_of_class(value, each) for value, each in found.classes.items())
    head = (found.column, "pictures", "share")
    return table(head, rows, "numbers") + rest + f'<div class="cards measures">{cards}</div>'


def _of_class(value: str, each: Class) -> str:
    return _cards(each.spreads, f"{value or '(empty)'}: ")


def _cards(spreads: Mapping[str, Spread], prefix: str) -> str:
    cards = []
    for name, spread in spreads.items():
        title, unit = TITLES.get(name, (name, ""))
        title = prefix + (title.lower() if prefix else title)
        head = f"<figcaption>{escape(title)}<small>{escape(unit)}</small></figcaption>"
        plot = histogram_svg(spread.edges, spread.counts, f"Number of pictures over {title}")
        cards.append(f'<figure class="card">{head}{plot}</figure>')
    return "".join(cards)
