"""From a scene to words: English, Chinese or both, with anything from everything said to almost nothing.

`caption` returns the words together with a `Scene` of what they say, in which None stands for what they leave open.
"""

import random
from dataclasses import replace

from . import lexicon as lex
from .world import Scene, Shape, Sign

Said = tuple[str, Scene]


def pick(rng: random.Random, words: list[str]) -> str:
    """The usual word half of the time, else any of them."""
    return words[0] if rng.random() < 0.5 else rng.choice(words)


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def colour_en(rng: random.Random, colour: str) -> str:
    return pick(rng, lex.COLOUR_EN.get(colour, [colour]))


def colour_zh(rng: random.Random, colour: str) -> str:
    return pick(rng, lex.COLOUR_ZH[colour])


def keep(rng: random.Random, value: str | None, drop: float) -> str | None:
    return None if rng.random() < drop else value


def thin_shape(rng: random.Random, shape: Shape, drop: float) -> Shape:
    """A shape with some of its attributes left unsaid; the kind always stays."""
    return Shape(
        shape.kind, keep(rng, shape.colour, 0.2 * drop), keep(rng, shape.size, drop), keep(rng, shape.place, drop)
    )


def shape_en(rng: random.Random, said: Shape, bare: bool) -> str:
    words = []
    if said.size:
        words.append(pick(rng, lex.SIZE_EN[said.size]))
    if said.colour:
        words.append(colour_en(rng, said.colour))
    words = " ".join([*words, pick(rng, lex.KIND_EN[said.kind])])
    words = words if bare else article(words)
    if not said.place:
        return words
    place = pick(rng, lex.PLACE_EN[said.place])
    if place.startswith(("top", "bottom")):
        return f"{words} {place}"
    return f"{place}, {words}" if rng.random() < 0.06 else f"{words} {place}"


def thing_zh(rng: random.Random, said: Shape) -> str:
    colour = colour_zh(rng, said.colour) if said.colour else ""
    size = pick(rng, lex.SIZE_ZH[said.size]) if said.size else ""
    kind = pick(rng, lex.KIND_ZH[said.kind])
    if colour and size:
        return rng.choice([f"{colour}的{size}{kind}", f"{size}{colour}{kind}", f"{size}的{colour}{kind}"])
    if colour:
        return rng.choice([f"{colour}的{kind}", f"{colour}{kind}"])
    return size + kind


def shape_zh(rng: random.Random, said: Shape, bare: bool) -> str:
    count = "" if bare else "一" + pick(rng, lex.MEASURE_ZH.get(said.kind, ["个"]))
    thing = count + thing_zh(rng, said)
    if not said.place:
        return thing
    place = pick(rng, lex.PLACE_ZH[said.place])
    if rng.random() < 0.13:
        return f"{thing}在{place}"
    return rng.choice([f"{place}有{thing}", f"{place}有{thing}", f"{place}{thing}"])


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith(("x", "s")) else "s")


def group_words(rng: random.Random, shapes: list[Shape], zh: bool, drop: float) -> tuple[str, list[Shape]]:
    """Shapes that are alike, named by their number."""
    first = shapes[0]
    said = Shape(first.kind, keep(rng, first.colour, 0.4 * drop), keep(rng, first.size, drop))
    if zh:
        words = lex.NUMBER_ZH[len(shapes)] + pick(rng, lex.MEASURE_ZH.get(first.kind, ["个"])) + thing_zh(rng, said)
    else:
        parts = [lex.NUMBER_EN[len(shapes)]]
        parts += [pick(rng, lex.SIZE_EN[said.size])] if said.size else []
        parts += [colour_en(rng, said.colour)] if said.colour else []
        words = " ".join([*parts, plural(pick(rng, lex.KIND_EN[first.kind]))])
    return words, [replace(said) for _ in shapes]


def stack_words(rng: random.Random, shapes: list[Shape], zh: bool, drop: float) -> tuple[str, list[Shape]]:
    below, above = (thin_shape(rng, s, drop) for s in shapes)
    below.colour, above.colour, above.place = shapes[0].colour, shapes[1].colour, None
    if zh:
        words = f"{shape_zh(rng, below, False)}，上面叠着{shape_zh(rng, above, False)}"
    else:
        link = rng.choice(["on top of", "in front of", "on"])
        words = f"{shape_en(rng, above, False)} {link} {shape_en(rng, replace(below, place=None), False)}"
        words += " " + pick(rng, lex.PLACE_EN[below.place]) if below.place else ""
    return words, [below, above]


def relation_between(first: Shape, second: Shape, unit: float) -> str | None:
    if second.y - first.y > 60 * unit and abs(first.x - second.x) < 50 * unit:
        return "above"
    if second.x - first.x > 60 * unit and abs(first.y - second.y) < 50 * unit:
        return "left of"
    return None


def relation_words(rng: random.Random, shapes: list[Shape], relation: str, zh: bool, drop: float):
    """Two shapes, the first of which lies above or left of the second; returns the words and what they say."""
    said = [replace(thin_shape(rng, s, drop), place=None, colour=s.colour) for s in shapes]
    if zh:
        link = pick(rng, lex.RELATION_ZH[relation])
        words = f"{shape_zh(rng, said[0], False)}在{shape_zh(rng, said[1], False)}的{link}"
    else:
        link = pick(rng, lex.RELATION_EN[relation])
        words = f"{shape_en(rng, said[0], False)} {link} {shape_en(rng, said[1], False)}"
    return words, said


def quoted(rng: random.Random, text: str, zh: bool) -> str:
    return rng.choice(lex.QUOTES_ZH if zh else lex.QUOTES_EN).format(text)


def sign_en(rng: random.Random, said: Sign, is_board: bool, bare: bool) -> str:
    text = quoted(rng, said.text, False)
    ink = colour_en(rng, said.ink) if said.ink else None
    place = " " + pick(rng, lex.PLACE_EN[said.place]) if said.place else ""
    if not is_board:
        noun = rng.choice(["text", "word", "letters"])
        if ink:
            return rng.choice(
                [f"the {ink} {noun} {text}{place}", f"the {noun} {text} in {ink}{place}", f"{text} in {ink}{place}"]
            )
        return rng.choice([f"the {noun} {text}{place}", f"{noun} {text}{place}", f"{text}{place}"])
    board = " ".join([colour_en(rng, said.board)] if said.board else []) + " sign" if said.board else "sign"
    board = board if bare else article(board)
    says = rng.choice(["that says", "saying", "that reads"])
    if ink:
        return rng.choice([f"{board}{place} with the {ink} text {text}", f"{board}{place} {says} {text} in {ink}"])
    if said.text.isascii() and rng.random() < 0.3:
        text = said.text
    return rng.choice([f"{board}{place} {says} {text}", f"{board}{place} with the text {text}"])


def sign_zh(rng: random.Random, said: Sign, is_board: bool, bare: bool) -> str:
    text = quoted(rng, said.text, True)
    place = pick(rng, lex.PLACE_ZH[said.place]) if said.place else ""
    ink = colour_zh(rng, said.ink) if said.ink else ""
    if not is_board:
        if ink:
            return rng.choice([f"{place}写着{ink}文字{text}", f"{place}{ink}的字{text}", f"{place}有{ink}的字{text}"])
        return rng.choice([f"{place}写着{text}", f"{place}文字{text}", f"{place}写着文字{text}"])
    board = colour_zh(rng, said.board) if said.board else ""
    if place:
        link = "的" if board else ""
        head = rng.choice(
            [f"{place}的{board}牌子上写着", f"{place}有一块{board}牌子，写着", f"{place}一块{board}{link}牌子写着"]
        )
        return head + (rng.choice([f"{ink}文字{text}", f"{ink}的{text}"]) if ink else text)
    count = "" if bare else "一块"
    writing = f"{ink}文字{text}" if ink else text
    return rng.choice(
        [
            f"写着{writing}的{board}牌子",
            f"{count}写着{writing}的{board}牌子",
            f"{count}{board}牌子，写着{writing}",
            f"{count}{board}牌子上写着{writing}",
        ]
    )


def ground_words(rng: random.Random, ground: tuple[str, str], zh: bool) -> str:
    if zh:
        first, second = (colour_zh(rng, c) for c in ground)
        if ground[0] == ground[1]:
            return rng.choice([f"{first}背景", f"背景是{first}", f"{first}的背景"])
        return rng.choice([f"背景从{first}渐变到{second}", f"从{first}到{second}的渐变背景"])
    first, second = (colour_en(rng, c) for c in ground)
    if ground[0] == ground[1]:
        plain = f"{first} background"
        return rng.choice([f"on a {plain}", plain, plain, article(plain)])
    return rng.choice([f"background from {first} to {second}", f"on a gradient from {first} to {second}"])


def shapes_words(rng: random.Random, scene: Scene, pick_zh, drop: float) -> tuple[list[str], Scene]:
    """Phrases for all shapes, and the scene of what they say."""
    shapes, said = scene.shapes, Scene(scene.width, scene.height, None, stacked=scene.stacked)
    alike = len(shapes) > 1 and len({(s.kind, s.colour, s.size) for s in shapes}) == 1
    relation = relation_between(*shapes, scene.unit) if len(shapes) == 2 else None
    if scene.stacked:
        words, said.shapes = stack_words(rng, shapes, pick_zh(), drop)
        return [words], said
    if alike and rng.random() < 0.8 * drop:
        words, said.shapes = group_words(rng, shapes, pick_zh(), drop)
        return [words], said
    if relation and rng.random() < 0.4 * drop:
        words, said.shapes = relation_words(rng, shapes, relation, pick_zh(), drop)
        said.relation = relation
        return [words], said
    bare = rng.random() < 0.25
    said.shapes = [thin_shape(rng, s, drop) for s in shapes]
    return [(shape_zh if pick_zh() else shape_en)(rng, s, bare) for s in said.shapes], said


def sign_words(rng: random.Random, sign: Sign, zh: bool, drop: float) -> tuple[str, Sign]:
    said = Sign(sign.text, keep(rng, sign.ink, drop), keep(rng, sign.board, drop), keep(rng, sign.place, drop))
    bare = rng.random() < 0.2
    return (sign_zh if zh else sign_en)(rng, said, sign.board is not None, bare), said


def caption(rng: random.Random, scene: Scene, drop: float | None = None) -> Said:
    """`drop` is the chance of leaving an attribute unsaid (0: everything is said); None draws it as in training."""
    if drop is None:
        drop = rng.choices([0.0, 0.2, 0.5, 0.9], [0.35, 0.15, 0.2, 0.3])[0]
    style = rng.choices(["en", "zh", "mixed"], [0.5, 0.37, 0.13])[0]

    def pick_zh() -> bool:
        return style == "zh" or (style == "mixed" and rng.random() < 0.5)

    parts, said = shapes_words(rng, scene, pick_zh, drop)
    if scene.sign:
        words, said.sign = sign_words(rng, scene.sign, pick_zh(), drop)
        parts.insert(rng.randrange(len(parts) + 1), words)
    if not parts or rng.random() >= drop:
        said.ground = scene.ground
        parts.insert(rng.choice([0, len(parts), len(parts)]), ground_words(rng, scene.ground, pick_zh()))
    if style == "zh":
        text = rng.choice(["，", "，", "，", "和" if said.ground is None else "，"]).join(parts)
        text = (rng.choice(lex.OPENINGS_ZH) if rng.random() < 0.1 else "") + text + ("。" if rng.random() < 0.1 else "")
        return text, said
    glue = " and " if style == "en" and said.ground is None and rng.random() < 0.5 else ", "
    text = glue.join(parts)
    if style == "en" and not text.startswith(("on ", "background ")) and rng.random() < 0.12:
        text = rng.choice(lex.OPENINGS_EN) + text
    if rng.random() < 0.12 and text[0].islower():
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else ""), said
