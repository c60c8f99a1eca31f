"""Several prompts in one CONDITIONING: every row is what its prompt gives alone, by our forward and by the host's."""

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT

import nodes as host_nodes
from zimage_turbo.engine import forward, ode, prompt_batch, prompts, sampling, turbo
from zimage_turbo.engine.model import load_model
from zimage_turbo.engine.prompt_batch import PromptLengths
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer

LINES = [
    "a red circle",
    "[zh]写着“新年快乐”的牌子[/zh]",
    "two large purple hearts, mint background, on a small sign" * 3,
]
# Each side of where padding to 32 tokens ends; alone in its padded length and not; not in order.
ODD = [(33, 1, 64, 32, 31, 65), (1, 2), (32, 64), (40, 40, 40), (96,)]
ROUNDING = 1e-5  # of a forward in fp32, whose products may be summed in another order in another batch


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_model(small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2), "fp32")


@pytest.fixture
def lines(demo):
    return [prompts.encode(demo[1], line)[0] for line in LINES]


def request_of(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(len(lengths), 16, 12, 10, generator=generator)
    timesteps = torch.rand(len(lengths), generator=generator)
    context = torch.zeros(len(lengths), max(lengths), 256)
    for row, length in zip(context, lengths, strict=True):
        row[:length] = torch.randn(length, 256, generator=generator)
    return x, timesteps, context


def alone(run, lengths, x, timesteps, context, **options):
    return torch.cat(
        [
            run(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1, :length], length, **options)
            for i, length in enumerate(lengths)
        ]
    )


def assert_rows_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert max(relative_error(one, other) for one, other in zip(ours, theirs, strict=True)) < ROUNDING


@pytest.mark.parametrize("lengths", ODD, ids=str)
def test_each_row_is_what_it_is_alone(small, lengths):
    module, given = small.model.diffusion_model, request_of(lengths)
    before = module.forwards[turbo.FAST]
    together = module._forward(*given, sum(lengths), prompt_lengths=lengths)
    assert module.forwards[turbo.FAST] == before + len({-(-length // 32) for length in lengths})
    assert_rows_equal(together, alone(module._forward, lengths, *given))


@pytest.mark.parametrize("lengths", ODD[:3], ids=str)
def test_a_forward_that_is_the_hosts_gets_rows_of_one_length(small, lengths):
    """With patches, which our fast forward does not know; the same wrapper serves a model that is not ours."""
    module, given = small.model.diffusion_model, request_of(lengths)
    seen = []
    options = {"patches": {"noise_refiner": [lambda given: seen.append(given["txt"].shape[:2]) or {}]}}
    together = module._forward(*given, sum(lengths), transformer_options=options, prompt_lengths=lengths)
    padded = [(1, -(-length // 32) * 32) for length in lengths for _ in range(2)]
    assert seen == padded
    assert_rows_equal(together, alone(module._forward, lengths, *given))


def test_other_arguments_of_the_hosts_forward_go_with_their_rows(small):
    module, lengths = small.model.diffusion_model, (3, 40, 3)
    x, timesteps, context = request_of(lengths)
    latents, pooled, seen = torch.randn(3, 16, 8, 8), torch.randn(1, 7), []

    def execute(x, timesteps, context, num_tokens, attention_mask, **others):
        seen.append((len(x), num_tokens, attention_mask, others))
        return NextDiT._forward(module, x, timesteps, context, num_tokens, ref_latents=others["ref_latents"])

    together = prompt_batch.each_length(
        execute,
        x,
        timesteps,
        context,
        46,
        context[..., 0],
        ref_latents=[latents],
        pooled=pooled,
        prompt_lengths=lengths,
    )
    assert [each[:3] for each in seen] == [(2, 3, None), (1, 40, None)]
    assert all(each[3]["pooled"] is pooled for each in seen)
    for i, length in enumerate(lengths):
        rows = slice(i, i + 1)
        single = (x[rows], timesteps[rows], context[rows, :length], length)
        assert relative_error(together[rows], NextDiT._forward(module, *single, ref_latents=[latents[rows]])) < ROUNDING


def test_without_lengths_the_hosts_forward_is_left_alone():
    given = object()
    assert prompt_batch.each_length(lambda *given, **named: (given, named), 1, 2, given, 4, control=None) == (
        (1, 2, given, 4, None),
        {"control": None},
    )


def test_what_the_host_does_with_zeros_is_another_picture(small):
    """Why the lengths must be told: it attends to them."""
    module, given = small.model.diffusion_model, request_of((33, 1))
    ignored = NextDiT._forward(module, *given, 34, prompt_lengths=(33, 1))
    assert relative_error(ignored[1], module._forward(*given, 34, prompt_lengths=(33, 1))[1]) > 0.01


def test_rows_of_the_learned_padding(small):
    """A row's own states, then the learned token, whatever stood there."""
    module, (_, _, context) = small.model.diffusion_model, request_of((5, 33))
    compute = forward.Compute(torch.float32)
    captions = forward.refine_caption(module, context, compute, (5, 33))
    context[0, 5:] = 7.0
    assert torch.equal(forward.refine_caption(module, context, compute, (5, 33)), captions)
    assert captions.shape[:2] == (2, 64)


def test_captions_are_refined_once_for_these_lengths(small, monkeypatch):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of((33, 5, 20))
    refined, refine = [], forward.refine_caption
    monkeypatch.setattr(forward, "refine_caption", lambda *given: refined.append(given[-1]) or refine(*given))
    options = {"uuids": ["a prompt"]}
    for lengths in ((33, 5, 20), (33, 5, 20), (33, 20, 20)):
        module._forward(x, timesteps, context, 0, transformer_options=options, prompt_lengths=lengths)
    assert refined == [[33], [5, 20], [33], [20, 20]]


def test_states_that_other_nodes_joined_are_refused(small, demo, lines):
    x, timesteps, context = request_of((33, 5))
    for lengths in ((32, 5), (33, 5, 5)):
        with pytest.raises(ValueError, match=rf"{len(lengths)} prompts.*\[2, 33, 256\].*one_per_line off"):
            small.model.diffusion_model._forward(x, timesteps, context, 0, prompt_lengths=lengths)
    both = prompt_batch.gathered(lines[:2])
    (joined,) = host_nodes.ConditioningConcat().concat(both, both)
    with pytest.raises(ValueError, match="another node joined or cut its states"):
        sampling.sample(demo[0], joined, sampling.empty_latent(demo[0], 64, 64, 2), 1, ode.sigmas(1))


def test_gathered_and_split(lines):
    both = prompt_batch.gathered(lines)
    ((states, extra),) = both
    lengths = tuple(one[0][0].shape[1] for one in lines)
    assert len(set(lengths)) == 3 and states.shape[:2] == (3, max(lengths))
    assert prompt_batch.lengths_of(extra) == lengths and prompt_batch.count(both) == 3
    assert extra["attention_mask"].sum(1).tolist() == list(lengths)
    assert all(not row[length:].any() for row, length in zip(states, lengths, strict=True))
    for ((row, its),), ((one, expected),) in zip(prompt_batch.split(both), lines, strict=True):
        assert torch.equal(row, one) and torch.equal(its["attention_mask"], expected["attention_mask"])
        assert "hooks" not in its and not its["model_conds"]
    assert prompt_batch.gathered(lines[:1]) is lines[0] and prompt_batch.split(lines[0]) == [lines[0]]


def test_prompts_of_one_length_need_no_hook(lines):
    ((_, extra),) = prompt_batch.gathered([lines[0], lines[0]])
    assert "hooks" not in extra and prompt_batch.lengths_of(extra) == (lines[0][0][0].shape[1],) * 2


def test_several_of_each_prompt_stand_side_by_side(lines):
    both = prompt_batch.gathered(lines[:2])
    for combined in (both, both + lines[2], lines[2] + prompt_batch.gathered(lines)):
        rows, repeated = prompt_batch.split(combined), prompt_batch.split(prompt_batch.repeated(combined, 2))
        assert len(repeated) == 2 * len(rows) == 2 * prompt_batch.count(combined)
        for number, row in enumerate(repeated):
            expected = rows[number // 2]
            assert all(torch.equal(one, other) for (one, _), (other, _) in zip(row, expected, strict=True))
    assert prompt_batch.repeated(lines[0], 3) == lines[0]


def test_the_hosts_batch_must_hold_every_prompt():
    lengths = PromptLengths((3, 7))
    assert lengths.process_cond(batch_size=4, area=None).cond == (3, 7, 3, 7)
    assert lengths.concat([]) == (3, 7) and not lengths.can_concat(PromptLengths((3, 7)))
    for batch_size in (1, 3):
        with pytest.raises(ValueError, match=rf"holds 2 prompts, but the latent batch is {batch_size}: set .* to 2 or"):
            lengths.process_cond(batch_size=batch_size)


def test_only_our_hook_is_taken_off(lines):
    ((_, extra),) = prompt_batch.gathered(lines)
    assert "hooks" not in prompt_batch.unhooked(extra) and len(extra["hooks"]) == 1
    lora = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    ((_, with_lora),) = comfy.hooks.set_hooks_for_conditioning(prompt_batch.gathered(lines), lora)
    assert len(with_lora["hooks"]) == 2
    (left,) = prompt_batch.unhooked(with_lora)["hooks"].hooks
    assert left == lora.hooks[0]
    ((_, encoded_with),) = prompt_batch.gathered([comfy.hooks.set_hooks_for_conditioning(line, lora) for line in lines])
    assert len(encoded_with["hooks"]) == 2
    assert prompt_batch.unhooked({"hooks": lora})["hooks"] is lora


@pytest.fixture
def theirs(demo):
    """The demo's weights in the host's own class, as a stock loader gives them."""
    model = demo[0].clone()
    module = model.model.diffusion_model
    ours, wrappers = module.__class__, model.wrappers
    model.wrappers = {}
    module.__class__ = NextDiT
    yield model
    module.__class__, model.wrappers = ours, wrappers


def drawn_alone(sample, lines, start, repeats=1):
    """What each prompt gives alone from the noise of its place in the batch."""
    rows = []
    for number in range(len(lines) * repeats):
        latent = {"samples": start["samples"][:1], "batch_index": [number]}
        rows.append(sample(lines[number % len(lines)], latent))
    return torch.cat(rows)


@pytest.mark.parametrize("which", ["demo", "theirs"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_stock_sampler_draws_each_prompt(demo, lines, request, which, repeats):
    """Rows repeat as the host repeats a conditioning; on a model that is not ours by the hook."""
    patcher = demo[0] if which == "demo" else request.getfixturevalue("theirs")

    def sample(positive, latent):
        return host_nodes.KSampler().sample(patcher, 3, 2, 1.0, "euler", "simple", positive, positive, latent)[0][
            "samples"
        ]

    start = sampling.empty_latent(patcher, 64, 64, len(lines) * repeats)
    assert_rows_equal(sample(prompt_batch.gathered(lines), start), drawn_alone(sample, lines, start, repeats))


@pytest.mark.parametrize("which", ["demo", "theirs"])
def test_our_sampler_draws_each_prompt(demo, lines, request, which):
    patcher = demo[0] if which == "demo" else request.getfixturevalue("theirs")

    def sample(positive, latent):
        return sampling.sample(patcher, positive, latent, 3, ode.sigmas(2))["samples"]

    start = sampling.empty_latent(patcher, 64, 64, len(lines))
    assert_rows_equal(sample(prompt_batch.gathered(lines), start), drawn_alone(sample, lines, start))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_beside_other_conditionings(demo, lines, cfg):
    """Guidance, and prompts that the host composites, as if drawn prompt by prompt."""
    patcher = demo[0]

    def sample(positive, latent, negative):
        return host_nodes.KSampler().sample(patcher, 3, 2, cfg, "euler", "simple", positive, negative, latent)[0][
            "samples"
        ]

    start = sampling.empty_latent(patcher, 64, 64, 2)
    both, one = prompt_batch.gathered(lines[:2]), lines[2]
    expected = drawn_alone(lambda positive, latent: sample(positive + one, latent, one), lines[:2], start)
    assert_rows_equal(sample(both + one, start, one), expected)
    swapped = prompt_batch.gathered(lines[1::-1])
    expected = torch.cat(
        [sample(lines[i], {"samples": start["samples"][:1], "batch_index": [i]}, lines[1 - i]) for i in range(2)]
    )
    assert_rows_equal(sample(both, start, swapped), expected)


def test_the_hook_costs_our_model_nothing(demo, lines, monkeypatch):
    """It is off before the first evaluation: captions are refined once, by the fast forward, and no hook is applied."""
    patcher, hooked, refined = demo[0], [], []
    apply, refine = type(patcher).apply_hooks, forward.refine_caption
    monkeypatch.setattr(
        type(patcher), "apply_hooks", lambda self, hooks, **how: hooked.append(hooks) or apply(self, hooks, **how)
    )
    monkeypatch.setattr(forward, "refine_caption", lambda *given: refined.append(given[-1]) or refine(*given))
    positive, start = prompt_batch.gathered(lines), sampling.empty_latent(patcher, 64, 64, 3)
    host_nodes.KSampler().sample(patcher, 3, 4, 1.0, "euler", "simple", positive, positive, start)
    assert set(hooked) == {None} and len(hooked) >= 4
    assert sorted(length for lengths in refined for length in lengths) == sorted(
        prompt_batch.lengths_of(positive[0][1])
    )
