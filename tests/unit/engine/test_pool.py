"""Prompts that begin alike, encoded with pages of keys and values: as afresh, and forgotten when they must be."""

import gc
import random

import comfy.hooks
import comfy.model_management as management
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks

from zimage_turbo.engine import catalogue, encoder, qwen, text, turbo
from zimage_turbo.engine.pool import MOST_PAGES, SIZE, Pool, Shape
from zimage_turbo.tests.comparison import relative_error

CPU = torch.device("cpu")
ROUNDINGS = 8 * torch.finfo(torch.float32).eps  # where sums are of the same numbers in another order
SMALL = Shape(layers=2, heads=1, head_width=4, dtype=torch.float32, width=8, device=CPU)
NAME = "qwen3_4b.transformer.model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return text.load_text_encoder(catalogue.DEMO_FOLDER / "text_encoder", CPU)


@pytest.fixture
def module(clip):
    clip.load_model()
    inner = clip.cond_stage_model.qwen3_4b
    inner.reset_clip_options()
    inner.forwards.clear()
    inner.pool.clear()
    return inner


def tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(1, 900) for _ in range(count)]


def afresh(module, ids: list) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "PAGED", ())
        return module.forward([ids])[0]


def known(module, ids: list) -> tuple[torch.Tensor, int]:
    """States, and how many of the tokens came from pages."""
    before = module.pool.pages.counts["known"] if module.pool.pages else 0
    states = module.forward([ids])[0]
    return states, module.pool.pages.counts["known"] - before


def test_1_000_sequences_of_prompts_are_as_afresh(module, monkeypatch):
    """Styles of up to 60 tokens cut anywhere, and tails; in few pages, so that many are given up on the way."""
    heads = module.transformer.model.config
    page = SIZE * Shape(4, heads.num_key_value_heads, heads.head_dim, torch.float32, heads.hidden_size, CPU).token_bytes
    monkeypatch.setattr(module, "pool", Pool(12 * page))
    random_ = random.Random(7)
    styles = [tokens(60, seed) for seed in range(4)]
    worst = 0.0
    for _ in range(1_000):
        style = random_.choice(styles)
        for _ in range(2):
            tail = [random_.randrange(1, 900) for _ in range(random_.randint(1, 12))]
            ids = style[: random_.randint(0, 60)] + tail
            worst = max(worst, relative_error(module.forward([ids])[0], afresh(module, ids)))
    assert worst <= ROUNDINGS
    counts = module.pool.pages.counts
    assert len(module.pool.pages.found) <= 12 and counts["evicted"] > 500
    assert module.forwards[encoder.PREFIXED] > 1_000 and counts["known"] > 0.3 * counts["tokens"]


@pytest.mark.parametrize("count", [400, 1000])
def test_long_prompts(module, count):
    style = tokens(count - 20)
    for seed in (1, 2):
        states, found = known(module, style + tokens(20, seed))
    assert found == (count - 20) // SIZE * SIZE
    assert relative_error(states, afresh(module, style + tokens(20, 2))) <= ROUNDINGS


def test_only_what_is_behind_is_computed(module):
    style, rows = tokens(150), []
    linear = module.transformer.model.layers[2].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for tail in (tokens(9, 1), tokens(9, 2), tokens(9, 2)):
        module.forward([style + tail])
    handle.remove()
    assert rows == [160, 16, 16]
    assert module.forwards == {turbo.FAST: 1, encoder.PREFIXED: 2}


def test_the_same_prompt_again(module):
    """Of which all whole pages are there: its last token is computed."""
    ids = tokens(2 * SIZE)
    first = module.forward([ids])[0]
    again, found = known(module, ids)
    assert found == SIZE and relative_error(again, first) <= ROUNDINGS


def test_bf16_is_within_its_rounding(module, monkeypatch):
    monkeypatch.setattr(module, "compute", torch.bfloat16)
    style = tokens(70)
    module.forward([style + tokens(9, 1)])
    states, found = known(module, style + tokens(9, 2))
    fresh = afresh(module, style + tokens(9, 2))
    assert found == 64 and relative_error(states, fresh) <= torch.finfo(torch.bfloat16).eps


def test_an_embedding_ends_what_is_shared(module):
    """Its vectors have no number to be found by."""
    style, vectors = tokens(40), torch.randn(3, 256, generator=torch.Generator().manual_seed(4)) * 0.1
    for seed in (1, 2):
        ids = [*style, vectors * seed, *tokens(40, 3)]
        states, found = known(module, ids)
        assert relative_error(states, afresh(module, ids)) <= ROUNDINGS
    assert found == 32 and len(module.pool.pages.found) == 2


@pytest.mark.parametrize("layer", [-1, 0, 2, None])
def test_another_layer_is_encoded_anew(module, layer):
    ids = tokens(50)
    module.forward([ids])
    module.set_clip_options({"layer": layer})
    states, found = known(module, ids)
    assert found == 0 and torch.equal(states, afresh(module, ids))
    assert relative_error(known(module, ids)[0], states) <= ROUNDINGS


def test_several_texts_at_once_are_not_kept(module):
    module.forward([tokens(40), tokens(40, 1)])
    assert module.pool.pages is None


def test_weights_that_nobody_loaded_are_not_known(clip, module, monkeypatch):
    monkeypatch.setattr(management, "current_loaded_models", [])
    module.forward([tokens(40)])
    assert module.pool.pages is None


def test_failing_keeps_nothing(module, monkeypatch):
    def interrupted(*_):
        raise management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(qwen, "feed_forward", interrupted)
        with pytest.raises(management.InterruptProcessingException):
            module.forward([tokens(40)])
    assert not module.pool.pages.found
    assert known(module, tokens(40))[1] == 0


def states(of, prompt: str = "a red circle and a blue ring on a white wall, beside a green square") -> torch.Tensor:
    return of.encode_from_tokens(of.tokenize(prompt))


def patched(clip, layer: int):
    changed = clip.clone()
    change = torch.randn(256, 512, generator=torch.Generator().manual_seed(layer)) * 0.05
    changed.add_patches({NAME.format(layer): (change,)}, 1.0)
    return changed


@pytest.mark.parametrize("moved", [True, False], ids=["weights moved", "weights in the same places"])
def test_a_lora_has_pages_of_its_own(clip, module, monkeypatch, moved):
    """Two in turn and none: each time what those weights give. The allocator may give memory out again."""
    if not moved:
        monkeypatch.setattr(encoder, "addresses", lambda weight: ())
    variants, exact = [clip, patched(clip, 0), patched(clip, 1)], []
    for each in variants:
        module.pool.clear()
        exact.append(states(each))
    assert min(relative_error(exact[a], exact[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    for turn in (1, 2, 0, 2, 1, 0):
        assert torch.equal(states(variants[turn]), exact[turn])
        again = states(variants[turn])
        assert relative_error(again, exact[turn]) <= ROUNDINGS
    assert module.forwards[encoder.PREFIXED] == 6


def test_weights_of_another_type_are_others(module, monkeypatch):
    linear = module.transformer.model.layers[1].mlp.down_proj
    module.forward([tokens(40)])
    with monkeypatch.context() as patch:
        patch.setitem(linear._parameters, "weight", torch.nn.Parameter(linear.weight.half(), requires_grad=False))
        states, found = known(module, tokens(40))
        assert found == 0 and torch.equal(states, afresh(module, tokens(40)))
    assert known(module, tokens(40))[1] == 0


def test_weights_changed_on_the_way_keep_nothing(module, monkeypatch):
    """As the host merges a LoRA while it copies a weight to the GPU."""
    linear = module.transformer.model.layers[1].mlp.down_proj
    module.forward([tokens(40)])
    monkeypatch.setattr(linear, "weight_function", [lambda weight: weight * 2])
    assert torch.equal(module.forward([tokens(40)])[0], afresh(module, tokens(40)))
    assert encoder.PREFIXED not in module.forwards


def test_a_lora_that_is_passed_by_keeps_nothing(clip, module):
    name, generator = "text_encoders." + NAME.format(1).removesuffix(".weight"), torch.Generator().manual_seed(6)
    lora = {
        f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.1
        for part, shape in (("A", (4, 512)), ("B", (256, 4)))
    }
    before = states(clip)
    _, bypass = comfy.sd.load_bypass_lora_for_models(None, clip, lora, 0.0, 1.0)
    assert torch.equal(states(bypass), states(bypass)) and not torch.equal(states(bypass), before)
    assert module.forwards == {turbo.FAST: 4}
    assert relative_error(states(clip), before) <= ROUNDINGS


@pytest.mark.parametrize("schedule", [False, True])
def test_hooked_weights_keep_nothing(clip, module, schedule):
    """Weights that a hook changes in place leave no mark on the module."""
    prompt, name = "a red circle on a wall, beside a blue ring", "text_encoders." + NAME.format(1)
    before = states(clip, prompt)
    lora = {name.removesuffix(".weight") + ".diff": torch.randn(256, 512, generator=torch.Generator().manual_seed(5))}
    (hooked,) = SetClipHooks().apply_hooks(clip, schedule, True, comfy.hooks.create_hook_lora(lora, 0.0, 0.1))
    pairs = [hooked.encode_from_tokens_scheduled(hooked.tokenize(prompt))[0] for _ in range(2)]
    assert torch.equal(pairs[0][0], pairs[1][0]) and relative_error(pairs[0][0], before) > 1e-3
    assert module.forwards == {turbo.FAST: 3}
    assert relative_error(states(clip, prompt), before) <= ROUNDINGS


def test_unloading_frees_the_pages(clip, module):
    states(clip)
    assert module.pool.nbytes > 0
    clip.patcher.detach()
    assert module.pool.nbytes == 0 and module.pool.pages is None
    assert torch.isfinite(states(clip)).all()


def test_no_more_than_the_limit():
    for limit in (0, 1, SIZE * SMALL.token_bytes, 10 * SIZE * SMALL.token_bytes + 5, 2**30):
        pool = Pool(limit)
        with pool.prompt(tokens(100), SMALL, "weights"):
            assert pool.nbytes == min(limit // (SIZE * SMALL.token_bytes), MOST_PAGES) * SIZE * SMALL.token_bytes


def encode(pool: Pool, ids: list[int], state: str = "weights") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a text encoder does with its pool: keys of the last layer, its values and the states, of token numbers."""
    with pool.prompt(ids, SMALL, state) as prompt:
        rows = torch.tensor(ids, dtype=torch.float32)[None, prompt.known :, None]
        for layer in range(SMALL.layers):
            heads = (rows[..., None] + layer).expand(1, -1, 1, 4)
            k, v = prompt.with_known(layer, heads, -heads)
        return k, v, prompt.all_states(rows.expand(1, -1, 8))


def test_nothing_grows_over_10_000_prompts():
    """With an encoder that only keeps its tokens' numbers."""
    pool, random_ = Pool(24 * SIZE * SMALL.token_bytes), random.Random(3)
    style = tokens(64)

    def run(prompts: int) -> None:
        for _ in range(prompts):
            ids = style[: random_.randint(1, 64)] + [random_.randrange(900) for _ in range(random_.randint(1, 40))]
            k, v, last = encode(pool, ids)
            exact = torch.tensor(ids, dtype=torch.float32)
            assert torch.equal(k[0, :, 0, 1], exact + SMALL.layers - 1) and torch.equal(v, -k)
            assert torch.equal(last[0, :, 7], exact)

    run(500)
    gc.collect()
    held, objects, places = pool.nbytes, len(gc.get_objects()), (pool.kv.data_ptr(), pool.states.data_ptr())
    run(10_000)
    gc.collect()
    assert (pool.kv.data_ptr(), pool.states.data_ptr()) == places and pool.nbytes == held
    assert len(gc.get_objects()) - objects < 100
    assert pool.pages.counts["evicted"] > 10_000 and len(pool.pages.free) + len(pool.pages.found) == 24


def test_another_state_forgets():
    pool = Pool(2**20)
    for state, found in (("a", 0), ("a", 32), ("b", 0), ("a", 0)):
        encode(pool, tokens(40), state)
        assert pool.pages.counts["known"] == found


def test_written_in_any_mode():
    """Reserved while gradients are off, used in inference mode, and the other way round."""
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        pool = Pool(2**20)
        with torch.inference_mode(False):
            for mode in (first, second):
                with mode():
                    encode(pool, tokens(40))
        assert pool.pages.counts["known"] == 32
