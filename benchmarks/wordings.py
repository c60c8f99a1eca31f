"""The same scenes said in English, Chinese and both, with and without [zh] tags, and Chinese as it gets typed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from zimage_turbo.demo import captions
from zimage_turbo.demo.lexicon import QUOTES_ZH
from zimage_turbo.demo.world import Scene, sample_scene
from zimage_turbo.engine.prompts import ONE_CONTEXT, OWN_SEGMENTS

SIDE = 256
MIXED, CHINESE = "English, Chinese sign", "Chinese"


@dataclass(frozen=True)
class Writing:
    """Another way to type Chinese. marks: around what is to be drawn; table: of the characters outside of them."""

    name: str
    marks: str | None = None
    table: tuple[str, str] = ("", "")

    def of(self, text: str, sign: str) -> str:
        (usual,) = (marks for marks in set(QUOTES_ZH) if marks.format(sign) in text)
        outside = str.maketrans(*self.table)
        before, after = (part.translate(outside) for part in text.split(usual.format(sign)))
        return f"{before}{(self.marks or usual).format(sign)}{after}"


RADICALS = ("一大小色心方文白黑", "⼀⼤⼩⾊⼼⽅⽂⽩⿊")  # as copied out of a PDF
WRITINGS = (
    Writing("title marks 《》", "《{}》"),
    Writing("white corner quotes 『』", "『{}』"),
    Writing("vertical quotes ﹁﹂", "﹁{}﹂"),
    Writing("full-width quotes ＂", "＂{}＂"),
    Writing("half-width commas", table=("，", ",")),
    Writing("wide spaces for commas", table=("，", "\u3000")),
    Writing("small commas ﹐", table=("，", "﹐")),
    Writing("radicals for characters", table=RADICALS),
    Writing("title marks, half-width commas, radicals", "《{}》", (RADICALS[0] + "，", RADICALS[1] + ",")),
)


@dataclass(frozen=True)
class Cell:
    """A column of prompts: how they are said, whether the Chinese is tagged, and how spans are encoded."""

    wording: str
    tagged: bool
    spans: str = ONE_CONTEXT

    @property
    def name(self) -> str:
        return self.wording + (f", [zh], {self.spans}" if self.tagged else "")


CELLS = (
    Cell("English", False),
    *(Cell(wording, *how) for wording in (CHINESE, MIXED)
      for how in ((False,), (True, ONE_CONTEXT), (True, OWN_SEGMENTS))),
    *(Cell(writing.name, tagged) for writing in WRITINGS for tagged in (False, True)),
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A scene, the seed of its picture, and what each cell says of it."""

    scene: Scene
    seed: int
    texts: dict[Cell, str]


def said(count: int, seed: int = 4) -> Iterator[Said]:
    """Scenes of 256 x 256 with shapes and a sign, of which everything is said. Their signs' texts, where longer than a
    character, are none of training's; the sentences are put together here."""
    rng = random.Random(seed)
    while count:
        scene = sample_scene(rng, SIDE, SIDE, test=True)
        if scene.sign and scene.shapes and not scene.stacked:
            yield Said(scene, rng.randrange(2**31), texts(rng, scene))
            count -= 1


def texts(rng: random.Random, scene: Scene) -> dict[Cell, str]:
    english, chinese = things(rng, scene, False), things(rng, scene, True)
    signs = [captions.sign_words(rng, scene.sign, zh, 0.0)[0] for zh in (False, True)]
    whole = "，".join((*chinese, signs[1]))
    found = {CELLS[0]: ", ".join((*english, signs[0]))}
    for cell in CELLS[1:]:
        if cell.wording == MIXED:
            found[cell] = ", ".join((*english, tagged(signs[1]) if cell.tagged else signs[1]))
        else:
            writing = next((each for each in WRITINGS if each.name == cell.wording), Writing(CHINESE))
            typed = writing.of(whole, scene.sign.text)
            found[cell] = tagged(typed) if cell.tagged else typed
    return found


def things(rng: random.Random, scene: Scene, zh: bool) -> list[str]:
    """The shapes and the background."""
    shape = captions.shape_zh if zh else captions.shape_en
    return [*(shape(rng, each, False) for each in scene.shapes), captions.ground_words(rng, scene.ground, zh)]


def tagged(text: str) -> str:
    return f"[zh]{text}[/zh]"
