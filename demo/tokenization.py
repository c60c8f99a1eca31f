"""The demo's byte-level BPE, of Qwen's kind but with a vocabulary of its own."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from . import lexicon
from .captions import caption
from .configs import TEMPLATE
from .world import HANZI, Sign, sample_scene

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONNECTIVES = [
    "的",
    "和",
    "画",
    "在",
    "有",
    "小",
    "大",
    "是",
    "从",
    "到",
    "字",
    "“",
    "”",
    "「",
    "」",
    "，",
    "。",
    "一个",
    "一块",
    "一颗",
    "两个",
    "三个",
    "两颗",
    "三颗",
    "牌子",
    "写着",
    "文字",
    "背景",
    "渐变",
    "上面叠着",
    "牌子上写着",
    "画面：",
    "请画",
    "一张图",
]


def english_lines(count: int, seed: int = 0) -> list[str]:
    """Captions without the signs' texts, so that no merge joins characters that are to be drawn."""
    rng, lines = random.Random(seed), []
    while len(lines) < count:
        scene = sample_scene(rng)
        if scene.sign:
            scene.sign = Sign("", scene.sign.ink, scene.sign.board, scene.sign.place)
        text, _ = caption(rng, scene)
        if text.isascii():
            lines.append(TEMPLATE.format(text))
    return lines


def train_tokenizer(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chinese = list(HANZI) + CONNECTIVES
    for table in (lexicon.COLOUR_ZH, lexicon.KIND_ZH, lexicon.PLACE_ZH):
        chinese += [word for words in table.values() for word in words]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        min_frequency=50,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(english_lines(20000) + chinese * 300, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt in the chat template → token ids."""
    return tokenizer.encode(TEMPLATE.format(text), add_special_tokens=False).ids
