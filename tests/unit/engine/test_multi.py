"""multi-gpu through the loader's MODEL and VAE, on two ranks without a GPU: the pictures of one process, to the bit."""

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import comfy.hooks
import comfy.model_management as management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_model_advanced as advanced
import node_helpers
import pytest
import torch

import nodes as host_nodes
from zimage_turbo.engine import devices, encodings, evaluations, multi, ode, sampling, text
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.current import current
from zimage_turbo.engine.group.launch import Hosts, Setup
from zimage_turbo.engine.group.team import Team
from zimage_turbo.engine.topology import Gpu, Topology
from zimage_turbo.nodes.loader import ZImageTurboLoader
from zimage_turbo.nodes.sampler import ZImageTurboSampler
from zimage_turbo.nodes.text_encoder import ZImageTurboTextEncode
from zimage_turbo.tests.comparison import relative_error

PROMPTS = 'a red circle at the top left\na white sign that says "AB"\na small blue star below a green square'
SIDE, STEPS = 128, 3
UP = "qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Here and on ranks: other numbers of threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
    current.close()


@pytest.fixture(scope="module")
def spread():
    """MODEL, CLIP and VAE of the demo on two ranks."""
    with torch.inference_mode():
        return ZImageTurboLoader.execute("demo", "auto", "auto", "auto", "multi-gpu").args


def test_processes_without_a_gpu_are_told_of(spread, monkeypatch):
    said = multi.spread_of(spread[0]).remark
    assert "no GPU that it can use" in said and said.endswith("ranks on the processor (2)")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert multi.Spread(Setup(devices.ranks(0)), Path(), Path(), "auto", "auto", "auto").remark is None


def drawn(model, positive, **changes):
    settings = {"seed": 5, "steps": STEPS, "denoise": 1.0, "width": SIDE, "height": SIDE, "batch_size": 1} | changes
    return ZImageTurboSampler.execute(model, positive, **settings)


def one_by_one(model, positives, seed=5):
    """Each prompt alone on this process, from the noise of its row."""
    latents = []
    for row, positive in enumerate(positives):
        latent = sampling.empty_latent(model, SIDE, SIDE, 1) | {"batch_index": [row]}
        latents.append(sampling.sample(model, positive, latent, seed, ode.sigmas(STEPS))["samples"])
    return torch.cat(latents)


def stock(model, positive, negative=None, cfg=1.0, batch=2, steps=STEPS):
    """What the host's KSampler draws."""
    latent = {"samples": torch.zeros(batch, 16, SIDE // 8, SIDE // 8)}
    settings = {"seed": 5, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    settings |= {"positive": positive, "negative": negative or positive, "latent_image": latent}
    return host_nodes.KSampler().sample(model, **settings)[0]["samples"]


def loaded_here(model) -> bool:
    return any(each.model.model is model.model for each in management.current_loaded_models)


def lora_file(demo):
    generator = torch.Generator().manual_seed(1)
    width = demo[0].model.diffusion_model.dim
    return {
        f"diffusion_model.{layer}.attention.out.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.2
        for layer in ("layers.0", "context_refiner.0")
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }


def test_a_batch_of_prompts(spread, demo, monkeypatch):
    model, clip, vae = spread
    positive = ZImageTurboTextEncode.execute(clip, PROMPTS, one_per_line=True)[0]
    latent, report, *_ = drawn(model, positive).args
    wanted = one_by_one(demo[0], [text.encode(demo[1], line) for line in PROMPTS.split("\n")])
    assert torch.equal(latent["samples"], wanted)
    assert f'"nfe": {STEPS}' in report
    pictures = torch.cat([demo[2].decode(row) for row in wanted.split(1)])
    assert torch.equal(vae.decode(latent["samples"]), pictures)
    with monkeypatch.context() as patch:  # as on ranks that cannot open this process's memory
        patch.setattr(Team, "shares", False)
        assert torch.equal(vae.decode(latent["samples"]), pictures)
    state = current.document()
    assert state["state"] == "ok" and len(state["ranks"]) == 2
    reason = "3 images whole, 2 ranks"
    size = f"{SIDE}x{SIDE}"
    assert state["choice"] == {
        "split": "images", "ranks_a_picture": 1, "pictures": 3, "size": size, "reason": reason
    }  # fmt: skip


def test_pictures_of_one_prompt(spread, demo):
    positive = text.encode(demo[1], "a red circle")
    latent = drawn(spread[0], positive, batch_size=3)[0]["samples"]
    assert torch.equal(latent, one_by_one(demo[0], [positive] * 3))


def test_adaptive_says_what_each_picture_took(spread, demo):
    positive = ZImageTurboTextEncode.execute(spread[1], PROMPTS, one_per_line=True)[0]
    node = drawn(spread[0], positive, steps=12, solver="adaptive", tolerance=0.02)
    alone = [text.encode(demo[1], line) for line in PROMPTS.split("\n")]
    reports = []
    for row, each in enumerate(alone):
        latent = sampling.empty_latent(demo[0], SIDE, SIDE, 1) | {"batch_index": [row]}
        reports += sampling.sample_and_report(demo[0], each, latent, 5, ode.sigmas(12), "adaptive", 0.02)[1]
    assert [ode.Report.of(told) for told in _list(node[1])] == ode.common(reports)


def _list(report: str) -> list:
    told = json.loads(report)
    return told if isinstance(told, list) else [told]


@pytest.fixture
def encoded_here(monkeypatch):
    """The CLIPs for which this process encodes prompts from now on; two new ones are enough for ranks."""
    monkeypatch.setattr(encodings, "LEAST", 2)
    clips, unpadded = [], text.unpadded
    monkeypatch.setattr(text, "unpadded", lambda clip, tokens: clips.append(clip) or unpadded(clip, tokens))
    return clips


def encoded(clip, lines, **options):
    node = ZImageTurboTextEncode.execute(clip, "\n".join(lines), one_per_line=True, **options)
    ((states, extra),) = node[0]
    return states, extra["attention_mask"], node.ui.value


@pytest.mark.parametrize("options", [{}, {"spans": "own segments", "zh_weight": 0.6}], ids=["plain", "options"])
def test_new_prompts_are_encoded_by_ranks(spread, demo, encoded_here, options):
    """Each as alone in one process, in order; what the node shows is the same."""
    lines = ("yellow star", "[zh]写着“福”的牌子[/zh]", "orange ring", "yellow star", "left [zh]绿色的圆[/zh]")
    there, here = (encoded(each[1], lines, **options) for each in (spread, demo))
    assert set(encoded_here) == {demo[1]}
    assert torch.equal(there[0], here[0]) and torch.equal(there[1], here[1]) and there[2] == here[2]


def test_what_prompts_are_encoded_here(spread, demo, encoded_here, monkeypatch):
    """One that is new, none that is known, and all of a CLIP that is not as in the file or must move."""
    lines, clip = ("violet heart", "brown triangle"), spread[1].clone()
    encoded(clip, lines)
    encoded(clip, lines)
    assert encoded_here == []
    encoded(clip, (*lines, "a third one"))
    assert encoded_here == [clip]
    clip.clip_layer(-3)
    deep = demo[1].clone()
    deep.clip_layer(-3)
    assert torch.equal(encoded(clip, lines)[0], encoded(deep, lines)[0])
    assert encoded_here[1:] == [deep, deep]
    clip.add_patches({UP: (torch.full((512, 256), 0.1),)}, 1.0)
    encoded(clip, lines)
    assert encoded_here[3:] == [clip, clip]
    short = spread[1].clone()
    with monkeypatch.context() as patch:  # as where the text encoder has no room beside the diffusion model
        patch.setattr(short.patcher, "is_dynamic", lambda: True)
        encoded(short, ("grey arrow", "pink arrow"))
    assert encoded_here[5:] == [short, short]


def test_a_lora_reaches_every_rank_and_leaves(spread, demo):
    file, positive = lora_file(demo), text.encode(demo[1], "a red circle")
    there, here = (comfy.sd.load_lora_for_models(each[0], None, file, 1.0, 0.0)[0] for each in (spread, demo))
    plain, plain_by_stock = drawn(spread[0], positive, batch_size=2)[0]["samples"], stock(spread[0], positive)
    with_lora, with_lora_by_stock = drawn(there, positive, batch_size=2)[0]["samples"], stock(there, positive)
    wanted, wanted_by_stock = one_by_one(here, [positive] * 2), stock(here, positive)
    management.unload_all_models()
    assert torch.equal(with_lora, wanted) and not torch.equal(with_lora, plain)
    assert relative_error(with_lora_by_stock, wanted_by_stock) < 1e-5
    assert torch.equal(drawn(spread[0], positive, batch_size=2)[0]["samples"], plain)
    assert torch.equal(stock(spread[0], positive), plain_by_stock)


def test_image_to_image_with_a_mask(spread, demo):
    positive, latent = text.encode(demo[1], "a red circle"), torch.randn(2, 16, SIDE // 8, SIDE // 8)
    mask = (torch.rand(2, 1, SIDE, SIDE) > 0.5).float()
    both = drawn(spread[0], positive, denoise=0.6, latent_image={"samples": latent, "noise_mask": mask})[0]["samples"]
    for row in range(2):
        start = {"samples": latent[row : row + 1], "noise_mask": mask[row : row + 1], "batch_index": [row]}
        alone = drawn(demo[0], positive, denoise=0.6, latent_image=start)[0]["samples"]
        assert torch.equal(both[row : row + 1], alone)


def test_a_shift_node_changes_nothing_for_our_sampler(spread, demo):
    (shifted,) = advanced.ModelSamplingAuraFlow().patch_aura(spread[0], 3.0)
    assert multi.refusal(shifted, text.encode(demo[1], "a star"), "official") is None


def test_what_ranks_cannot_be_told_is_computed_here(spread, demo, caplog):
    caplog.set_level("INFO")
    positive = text.encode(demo[1], "a red circle")
    wrapped = spread[0].clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    latent = drawn(wrapped, positive)[0]["samples"]
    assert torch.equal(latent, one_by_one(demo[0], [positive]))
    assert "computed by one GPU alone, as another node changes how the model is computed" in caplog.text


def told_prompts(monkeypatch) -> list[str]:
    """Under which keys ranks are told prompts from now on."""
    told, keep = [], Group.keep

    def noted(group, key, operation, *rest, **watching):
        told.extend([key] if operation == "prompt" else [])
        keep(group, key, operation, *rest, **watching)

    monkeypatch.setattr(Group, "keep", noted)
    return told


def test_a_stock_sampler_has_its_evaluations_made_by_ranks(spread, demo, monkeypatch, caplog):
    """The weights are not loaded here, and ranks are told prompts once."""
    caplog.set_level("INFO")
    positive = ZImageTurboTextEncode.execute(spread[1], PROMPTS, one_per_line=True)[0]
    negative = text.encode(demo[1], "a blue star")
    management.unload_all_models()
    wanted = [stock(demo[0], positive, negative, cfg, batch=3) for cfg in (1.0, 2.5)]
    told = told_prompts(monkeypatch)
    assert relative_error(stock(spread[0], positive, negative, 1.0, batch=3), wanted[0]) < 1e-5
    assert relative_error(stock(spread[0], positive, negative, 2.5, batch=3), wanted[1]) < 1e-5
    assert len(told) == 2 and not loaded_here(spread[0]) and "one GPU alone" not in caplog.text
    assert caplog.text.count("3 images whole") <= 2


def test_more_prompts_at_a_step_than_ranks_keep(spread, demo, monkeypatch):
    """Areas of a picture, each with a prompt of its own, two and two of one length."""
    entries = []
    for number in range(6):
        words = " ".join(["red" if number % 2 else "blue"] * (1 + 4 * (number // 2)))
        area = (4 + 2 * number, 16, 2 * number % 4, 0)
        entries += node_helpers.conditioning_set_values(text.encode(demo[1], words), {"area": area, "strength": 1.0})
    told = told_prompts(monkeypatch)
    assert relative_error(stock(spread[0], entries), stock(demo[0], entries)) < 1e-5
    assert set(told) == {f"prompt {number}" for number in range(evaluations.PROMPTS)}


def test_a_noise_schedule_is_that_of_the_model_that_runs(spread, demo):
    """Though the weights are not loaded here, which is when the host puts it in its place."""
    (shifted,), (wanted,) = (advanced.ModelSamplingAuraFlow().patch_aura(each[0], 12.0) for each in (spread, demo))
    late = node_helpers.conditioning_set_values(text.encode(demo[1], "a star"), {"start_percent": 0.5})
    positive = late + node_helpers.conditioning_set_values(text.encode(demo[1], "a circle"), {"end_percent": 0.5})
    for there, here in ((shifted, wanted), (spread[0], demo[0])):
        assert relative_error(stock(there, positive, steps=4), stock(here, positive, steps=4)) < 1e-5


def guided_by_less(args):
    """Of a MODEL's results and those with its blocks patched, as by the host's skip-layer guidance."""
    options = comfy.model_patcher.create_model_options_clone(args["model_options"])
    options["transformer_options"]["patches"] = {"double_block": [lambda given: {"img": given["img_input"]}]}
    (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
    return args["denoised"] + 0.5 * (args["cond_denoised"] - other)


def test_evaluations_that_ranks_cannot_be_told_are_computed_here(spread, demo, caplog):
    caplog.set_level("INFO")
    positive = text.encode(demo[1], "a red circle")
    there, here = (each[0].clone() for each in (spread, demo))
    for model in (there, here):
        model.set_model_sampler_post_cfg_function(guided_by_less)
    management.unload_all_models()
    assert relative_error(stock(there, positive), stock(here, positive)) < 1e-5
    reason = "evaluations are computed by one GPU alone, as transformer_options has patches"
    assert caplog.text.count(reason) == 1 and loaded_here(there)


def test_prompts_that_ranks_cannot_be_told(spread, demo, caplog):
    caplog.set_level("INFO")
    positive = text.encode(demo[1], "a red circle")
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": {}}))
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    assert relative_error(stock(spread[0], hooked), stock(demo[0], positive)) < 1e-5
    assert "this run is computed by one GPU alone, as a prompt has hooks" in caplog.text


@pytest.fixture(scope="module")
def joint():
    """MODEL and VAE of the demo on two ranks that draw each picture together."""
    with torch.inference_mode():
        return ZImageTurboLoader.execute("demo", "auto", "auto", "auto", "multi-gpu", split="sequence").args


def test_two_ranks_draw_each_picture_together(joint, demo, caplog):
    caplog.set_level("INFO")
    positive = text.encode(demo[1], 'a white sign that says "AB"')
    latent = drawn(joint[0], positive, batch_size=2)[0]["samples"]
    assert relative_error(latent, one_by_one(demo[0], [positive] * 2)) < 1e-5
    assert relative_error(stock(joint[0], positive), stock(demo[0], positive)) < 1e-5
    assert caplog.text.count("each image split over 2 ranks, as asked") == 1, "said when it changes"
    choice = current.document()["choice"]
    assert (choice["split"], choice["ranks_a_picture"]) == ("sequence", 2)


def test_ranks_that_draw_together_stop_together(joint, demo, monkeypatch):
    positive = text.encode(demo[1], "a red circle")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(management.InterruptProcessingException):
            drawn(joint[0], positive, steps=60)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40)
        with pytest.raises(management.InterruptProcessingException):
            stock(joint[0], positive, steps=60)
    fault = current.document()["last_fault"]
    latent = drawn(joint[0], positive)[0]["samples"]
    assert relative_error(latent, one_by_one(demo[0], [positive])) < 1e-5
    assert fault is None and current.document()["last_fault"] is None


def test_how_long_an_evaluation_takes_by_how_many_ranks(joint):
    given = joint[0].get_attachment(multi.ATTACHMENT)
    group, request = given.group(), {"key": given.key, "sizes": [1, 2], "islands": [[0, 1]]}
    request |= {"shape": [1, 16, 16, 16], "tokens": 20}
    group.keep("meeting 2", "meet", {"islands": [[0, 1]], "size": 2}, 60.0)
    told = group.call("measure", lambda size: dict.fromkeys(range(size), request), 60.0)
    assert all(set(seconds) == {"1", "2"} and min(seconds.values()) > 0 for seconds in told.values())


def test_a_solver_of_another_pack_is_run_here(spread, demo, monkeypatch):
    monkeypatch.setitem(ode.SOLVERS, "coarse", ode.SOLVERS["official"])
    assert "another pack" in multi.refusal(spread[0], text.encode(demo[1], "a star"), "coarse")


def interrupt_after(patch, looks: int) -> None:
    """As if the user pressed Cancel after so many looks."""
    calls = iter([False] * looks + [True])

    def look():
        if next(calls, False):
            raise management.InterruptProcessingException

    patch.setattr(management, "throw_exception_if_processing_interrupted", look)


def test_interrupt_stops_all_and_the_next_prompt_runs(spread, demo, monkeypatch):
    positive = text.encode(demo[1], "a red circle")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(management.InterruptProcessingException):
            drawn(spread[0], positive, batch_size=4, steps=60)
    assert torch.equal(drawn(spread[0], positive)[0]["samples"], one_by_one(demo[0], [positive]))


def test_the_group_is_owned_by_model_vae_and_their_clones(encoded_here):
    """And by nothing else that stays, as the CLIP may: a group ends when its owners have."""
    model, clip, vae = ZImageTurboLoader.execute("demo", "auto", "auto", "auto", "multi-gpu").args
    given = weakref.ref(multi.spread_of(model))
    clone = model.clone()
    del model
    assert given() is clone.get_attachment(multi.ATTACHMENT)
    del clone
    gc.collect()
    assert given() is vae.spread
    del vae
    gc.collect()
    assert given() is None
    encoded(clip, ("white moon", "black moon"))
    assert encoded_here == [clip, clip]


def test_interrupt_stops_ranks_that_encode(spread, encoded_here, monkeypatch):
    """And what they were at is encoded when it is asked for again."""
    lines = ("crimson hexagon", "teal pentagon", "maroon octagon")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(management.InterruptProcessingException):
            encoded(spread[1], lines)
    assert len(encoded(spread[1], lines)[0]) == 3 and current.document()["last_fault"] is None
    assert encoded_here == []


NVLINKED = Topology(tuple(Gpu(index, "", "", None) for index in range(4)), frozenset({(0, 1), (2, 3)}))


@pytest.mark.parametrize(
    ("places", "islands"),
    [
        ([("here", "cuda:0"), ("here", "cuda:1"), ("here", "cuda:2"), ("here", "cuda:3")], [[0, 1], [2, 3]]),
        ([("here", "cuda:0"), ("here", "cuda:2"), ("here", "cuda:3")], [[1, 2], [0]]),
        ([("there", "cuda:0"), ("there", "cuda:1"), ("here", "cuda:2"), ("here", "cuda:3")], [[2, 3], [0, 1]]),
        ([("here", "cpu"), ("there", "cpu"), ("here", "cpu")], [[0, 2], [1]]),
    ],
    ids=["all", "one is broken", "two machines", "processors"],
)
def test_islands_are_of_the_ranks_that_there_are(monkeypatch, places, islands):
    monkeypatch.setattr(multi.topology, "read", lambda: NVLINKED)
    setup = SimpleNamespace(address="here")
    group = SimpleNamespace(setup=setup, places=lambda check: dict(enumerate(places)))
    assert sorted(multi._islands(group)) == sorted(islands)


def test_gpus_without_links_draw_together_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(multi.topology, "read", lambda: Topology(NVLINKED.gpus))
    places = {number: ("here", f"cuda:{number}") for number in range(4)} | {4: ("there", ""), 5: ("there", "")}
    group = SimpleNamespace(setup=SimpleNamespace(address="here"), places=lambda check: places)
    assert multi._islands(group, asked=True) == [[0, 1, 2, 3], [4, 5]]
    assert multi._islands(group) == [[0], [1], [2], [3], [4, 5]]


def test_several_machines_as_the_environment_says(monkeypatch):
    for name, value in (("HOSTS", "2"), ("ADDRESS", "10.0.0.1"), ("TOKEN", "known to both")):
        monkeypatch.setenv(f"ZIMAGE_GROUP_{name}", value)
    begun = []
    monkeypatch.setattr(multi.current, "begin", lambda setup, owner: begun.append(owner))
    model = ZImageTurboLoader.execute("demo", "auto", "auto", "auto", "multi-gpu")[0]
    assert multi.spread_of(model).setup.hosts == Hosts(2, "10.0.0.1")
    assert begun == [multi.spread_of(model)], "their start is not waited for by the first picture"


def test_teams_leave_no_gpu_idle(monkeypatch):
    islands, met, measured = [list(range(8)), [8, 9]], [], []
    monkeypatch.setattr(multi, "_islands", lambda group, asked: islands)
    monkeypatch.setattr(multi.Spread, "_measured", lambda *_: measured.append(1) or {1: 1.0, 4: 0.3})
    given = multi.Spread(Setup(("cuda:0",) * 10), Path(), Path(), "auto", "auto", "auto")
    group = SimpleNamespace(kept=lambda key: None, keep=lambda key, *asked, **_: met.append(asked[1]["size"]), about={})
    choose = given.choice(group, torch.Size((1, 16, 8, 8)), 20)
    assert met == [2, 4, 8] and choose(1, 10).groups == ((0, 1, 2, 3),)
    given.choice(group, torch.Size((1, 16, 9, 8)), 20)
    assert len(measured) == 1, "sizes alike are measured once"
    given.choice(group, torch.Size((1, 16, 16, 8)), 20)
    assert len(measured) == 2


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.ranks(0) == ("cuda:0", "cuda:1") and devices.ranks(1) == ("cuda:0",)
    with pytest.raises(ValueError, match="num_gpus is 3, but there are 2"):
        devices.ranks(3)
