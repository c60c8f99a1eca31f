"""What ranks do, on the demo: to the bit the pictures that this process draws, in order, whatever rank draws them."""

import contextlib
import datetime
import itertools
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch

from zimage_turbo.engine import catalogue, duties, ode, prompt_batch, sampling, spread, text
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.faults import Refused
from zimage_turbo.engine.group.launch import Setup
from zimage_turbo.engine.group.team import Limits
from zimage_turbo.engine.group.worker import Rank
from zimage_turbo.tests.comparison import relative_error

LIMIT = 180.0
PROMPTS = ("a red circle at the top left", 'a white sign that says "AB"', "a small blue star below a green square")
SIZES = ((128, 128), (96, 160), (128, 96), (160, 96), (112, 128))
STEPS = 4


@pytest.fixture(scope="module")
def group():
    with contextlib.closing(Group(Setup(("cpu", "cpu")), Limits(start=LIMIT))) as made:
        keep_demo(made)
        yield made


def keep_demo(group):
    parts = catalogue.resolve("demo", "auto", "auto")
    models = {"diffusion_model": str(parts.diffusion_model), "vae": str(parts.vae)}
    request = models | {"key": "demo", "precision": "auto", "attention": "auto", "cache": False}
    group.keep("demo", "load", request, LIMIT)


@pytest.fixture(scope="module")
def positives(demo):
    with torch.inference_mode():
        return [text.encode(demo[1], prompt) for prompt in PROMPTS]


@pytest.fixture
def one_thread():
    """As ranks compute: other numbers of threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def common(**changes):
    settings = {"key": "demo", "sigmas": ode.sigmas(STEPS), "solver": "official", "tolerance": 0.05}
    return settings | {"previews": False, "ranks": None} | changes


def images(positives, count=5):
    """Of several prompts and sizes."""
    made = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        start = torch.zeros(1, 16, height // 8, width // 8)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(number))
        positive = positives[number % len(positives)]
        made.append({"noise": noise, "latent": start, "mask": None, "seed": number, "positive": positive})
    return made


def drawn_here(demo, image):
    patcher = demo[0]
    height, width = image["noise"].shape[-2:]
    empty = sampling.empty_latent(patcher, 8 * width, 8 * height, 1)
    return sampling.sample(patcher, image["positive"], empty, image["seed"], ode.sigmas(STEPS))["samples"]


@pytest.fixture(scope="module", autouse=True)
def threads_of_ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def test_five_images_on_two_ranks_are_those_of_one_process(group, demo, positives, one_thread):
    wanted, steps = images(positives), []
    drawn = spread.draw(group, common(), wanted, LIMIT, lambda image, *step: steps.append((image, *step)))
    assert [result["image"] for result in drawn] == [0, 1, 2, 3, 4]
    for image, result in zip(wanted, drawn, strict=True):
        assert torch.equal(result["latent"], drawn_here(demo, image))
        assert result["report"]["nfe"] == STEPS
    for image in range(5):
        assert [step for each, *step in steps if each == image] == [[step + 1, STEPS, None] for step in range(STEPS)]


def test_both_ranks_draw(group, positives):
    ranks = set()
    shares = {0: 3, 1: 2}

    def on_progress(rank, told):
        ranks.add((rank, told["image"]))

    wanted = [image | {"number": number} for number, image in enumerate(images(positives))]
    plan = {0: common() | {"images": wanted[:3]}, 1: common() | {"images": wanted[3:]}}
    group.call("draw", lambda size: plan, LIMIT, on_progress)
    assert {rank: len({image for each, image in ranks if each == rank}) for rank in shares} == shares


def test_previews_are_clean_latents_on_the_way(group, positives):
    (image,), previews = images(positives, 1), []
    spread.draw(group, common(previews=True), [image], LIMIT, lambda *step: previews.append(step[-1]))
    assert len(previews) == STEPS and all(each.shape == image["noise"].shape for each in previews)


@pytest.fixture
def paces(monkeypatch):
    """Every Pace of a duty: its limit, and after how many steps it was waited for."""
    made = []

    class Pace:
        def __init__(self, device, limit):
            self.limit, self.steps, self.waited = limit, 0, []
            made.append(self)

        def step(self):
            self.steps += 1

        def wait(self):
            self.waited.append(self.steps)

    monkeypatch.setattr(duties, "Pace", Pace)
    return made


@pytest.fixture
def rank(demo):
    made = Rank(0, 1, torch.device("cpu"), datetime.timedelta(seconds=9))
    made.models["demo"] = duties.Loaded(demo[0], demo[2])
    return made


@pytest.mark.parametrize(
    ("changes", "drained"),
    [({}, [STEPS]), ({"previews": True}, [1, 2, 3, 4]), ({"solver": "implicit"}, [1, 2, 3, 4])],
    ids=["official", "previews", "another solver"],
)
def test_a_rank_waits_with_a_limit_wherever_it_waits(rank, positives, paces, changes, drained):
    """After which steps: before all that would wait for the GPU, and knows no limit."""
    request = common(**changes) | {"images": [image | {"number": 0} for image in images(positives, 1)]}
    duties.draw(rank, SimpleNamespace(request=request, check=lambda: None, tell=lambda told: None))
    (pace,) = paces
    assert pace.waited == drained and pace.limit is None, "one that is asked alone waits for nobody"


@pytest.mark.parametrize("together", [None, SimpleNamespace(leads=True)], ids=["alone", "together"])
def test_an_evaluation_is_waited_for_with_a_limit(rank, positives, paces, monkeypatch, together):
    states, extra = positives[0][0]
    prompt = {"number": 0, "name": "one", "context": states, "num_tokens": states.shape[1], "lengths": None}
    duties.prompt(rank, SimpleNamespace(request=prompt | {"attention_mask": extra.get("attention_mask")}))
    monkeypatch.setattr(duties, "_together", lambda rank, numbers: together)
    monkeypatch.setattr(duties.Loaded, "joined", lambda self, together: contextlib.nullcontext())
    given = {"key": "demo", "prompt": 0, "first": 0, "x": torch.randn(1, 16, 12, 10), "timesteps": torch.tensor([0.5])}
    duties.evaluate(rank, SimpleNamespace(request=given | {"ranks": None}))
    (pace,) = paces
    assert pace.waited == [1] and pace.limit == (rank.limit if together else None)


def test_one_evaluation_of_prompts_of_several_lengths(group, demo, positives, one_thread):
    """Two of three rows by one rank, as a batch, and one by the other."""
    x, timesteps = torch.randn(3, 16, 12, 10), torch.tensor([0.3, 0.8, 0.5])
    ((context, extra),) = prompt_batch.gathered(positives)
    lengths = prompt_batch.lengths_of(extra)
    prompt = {"context": context, "num_tokens": max(lengths), "attention_mask": extra["attention_mask"]}
    group.keep("prompt 2", "prompt", prompt | {"number": 2, "name": "three", "lengths": lengths}, LIMIT)
    there = spread.evaluate(group, {"key": "demo", "prompt": 2}, x, timesteps, LIMIT)
    here = [
        demo[0].model.diffusion_model(x[row][None], timesteps[row][None], states, states.shape[1], None)
        for row, ((states, _),) in enumerate(positives)
    ]
    assert len(set(lengths)) > 1
    assert relative_error(there, torch.cat(here)) < 1e-5


def test_cancel_leaves_the_ranks_well(group, positives):
    pids = [rank["pid"] for rank in group.document()["ranks"]]

    def interrupted(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spread.draw(group, common(sigmas=ode.sigmas(100)), images(positives, 2), LIMIT, interrupted)
    assert len(spread.draw(group, common(), images(positives, 2), LIMIT)) == 2
    assert [rank["pid"] for rank in group.document()["ranks"]] == pids


@pytest.mark.parametrize(
    ("operation", "request_", "words"),
    [
        ("draw", common(key="other", images=[]), "rank 0 holds no model 'other', but: demo."),
        ("load", {"key": "no", "diffusion_model": "/nowhere/no.safetensors", "vae": None, "precision": "auto",
                  "attention": "auto", "cache": False}, "'no.safetensors' is not there. Put it back"),
        ("load", {"key": "no", "diffusion_model": str(catalogue.DEMO_FOLDER / "transformer"), "vae": None,
                  "precision": "fp8", "attention": "auto", "cache": False}, "precision 'fp8' cannot be used on cpu"),
        ("encode", {"key": "demo", "text_encoder": {"path": "/nowhere/words.safetensors", "precision": "auto"},
                    "layer": None, "images": []}, "'words.safetensors' is not there. Put it back"),
    ],
    ids=["a model that was not loaded", "a file that is not there", "a precision that the device lacks",
         "a text encoder that is not there"],
)  # fmt: skip
def test_wrong_requests(group, operation, request_, words):
    with pytest.raises(Refused) as raised:
        group.call(operation, lambda size: {0: request_}, LIMIT)
    assert words in str(raised.value)
    keep_demo(group)  # one that cannot be loaded has taken its place


def test_images_that_are_there_when_a_rank_is_killed_are_kept(group, demo, positives, one_thread):
    """The others are drawn anew, by ranks that load the model again."""
    wanted, begun, latents = images(positives), [], []
    victim, killer = psutil.Process(group.document()["ranks"][0]["pid"]), threading.Event()

    def on_step(image, step, steps, preview):
        begun.append((image, step))
        if (image, step) == (1, 1) and not killer.is_set():
            killer.set()
            victim.kill()

    for result in spread.draw(group, common(), wanted, LIMIT, on_step):
        latents.append(result["latent"])
    assert all(torch.equal(latent, drawn_here(demo, image)) for latent, image in zip(latents, wanted, strict=True))
    assert begun.count((0, 1)) == 1, "the first image was there, and is not drawn twice"
    assert begun.count((1, 1)) == 2
    assert "rank 0 (cpu) ended during 'draw'" in group.document()["last_fault"]["what"]


@pytest.fixture
def prompts(demo):
    """What `duties.encode` is asked for, and the tokens of forty prompts."""
    numbers = ("three", "seven", "nine", "two", "five")
    file = str(catalogue.resolve("demo", "auto", "auto").text_encoder)
    common = {"key": "demo", "text_encoder": {"path": file, "precision": "auto"}, "layer": None}
    return common, [demo[1].tokenize(f"{number} squares in row {row}") for row in range(8) for number in numbers]


def assert_encoded(there, tokens, clip):
    for ((states, extra),), each in zip(there, tokens, strict=True):
        ((wanted, known),) = text.unpadded(clip, each)
        assert torch.equal(states, wanted) and torch.equal(extra["attention_mask"], known["attention_mask"])
        assert extra.keys() == known.keys()


def test_prompts_are_encoded_in_order(group, demo, prompts, one_thread):
    """Also by ranks that took others' place, as those of the test before."""
    assert_encoded(spread.encode(group, *prompts, LIMIT), prompts[1], demo[1])


def test_a_rank_killed_while_it_encodes_loses_no_prompt(group, demo, prompts, one_thread):
    """It stands still until it is killed, or it might be done before."""
    victim, looks = psutil.Process(group.document()["ranks"][1]["pid"]), itertools.count()
    victim.suspend()

    def check():
        if next(looks) == 2:
            victim.kill()

    assert_encoded(spread.encode(group, *prompts, LIMIT, check), prompts[1], demo[1])
    assert "rank 1 (cpu) ended" in group.document()["last_fault"]["what"]


def test_forgotten_models_are_gone(group, positives):
    group.call("forget", lambda size: {1: {"key": "demo"}}, LIMIT)
    group.call("forget", lambda size: {1: {"key": "demo"}}, LIMIT)
    with pytest.raises(Refused, match="rank 1 holds no model 'demo', but: none"):
        group.call("draw", lambda size: {1: common(images=[])}, LIMIT)
