"""DPO-Diff's parts against known answers: mixtures of words, the shortcut gradient, word lists, attacks, whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from test_run import pixels
from torch import Tensor

from ipgo_opt import BadInput, Result, RunFailed, optimize, resume
from ipgo_opt.models import EMBEDDED
from ipgo_opt.models.mixing import Mixed, Slot
from ipgo_opt.models.prediction import clean, levels
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.models.shortcut import shortcut_step
from ipgo_opt.rewards.base import prepare
from ipgo_opt.rewards.clip import encoder
from ipgo_opt.rewards.similarity import prepare_similarity, similarity
from ipgo_opt.spaces.wordlists import LIBRARY, WordLists, from_file, from_vocabulary, from_wordnet, source_of
from ipgo_opt.spaces.wordnet import WordNet, installed
from ipgo_opt.spaces.words import Position, Template, WordSpace, negative_template, prompt_template

TEXT, NEGATIVE = "a fox and a rocket", "red, blurry"
LISTS = {
    "synonyms": {"fox": ["cat", "red panda", "unicorn"], "and": ["left of"]},
    "additions": [["at sunset", ", neon"]],
    "negative": ["blurry", ["dog", "green dog"]],
}


def weights(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).requires_grad_(grad)


# Mixtures


@pytest.mark.parametrize("xl", [False, True], ids=["SD", "SDXL"])
@pytest.mark.parametrize("word", ["fox", "unicornio", "red panda", "cat"])
def test_all_weight_on_the_written_word_is_the_plain_prompt(xl, word):
    """Exactly, whatever the number of its tokens, in both halves and in the pooled embeddings."""
    sampler = Sampler(tiny.pipeline_xl() if xl else tiny.pipeline(), tiny.settings())
    words = ("fox", "unicornio", "red panda", "cat", "")
    text, one_hot = TEXT.replace("fox", word), weights(*(float(one == word) for one in words))
    negative = Mixed(NEGATIVE, (Slot(5, 11, ("blurry", "dog"), weights(1, 0)),))
    mixed = sampler.encode_mixed(Mixed(text, (Slot(2, 2 + len(word), words, one_hot),)), negative)
    plain = sampler.encode(text, NEGATIVE)
    assert torch.equal(mixed.prompt_embeds, plain.prompt_embeds)
    assert torch.equal(mixed.negative_prompt_embeds, plain.negative_prompt_embeds)
    assert mixed.extra.keys() == plain.extra.keys()
    assert all(torch.equal(mixed.extra[name], plain.extra[name]) for name in plain.extra)


def test_a_mixture_is_the_weighted_sum_of_input_embeddings():
    """Token by token; a choice without a token in a place adds nothing there, and one that is too long is cut."""
    pipe = tiny.pipeline()
    table, read = pipe.text_encoder.get_input_embeddings(), []
    hook = table.register_forward_hook(lambda module, given, out: read.append((given[0], out)))
    words, share = ("robot", "fox", "unicorn house", ""), (0.5, 0.2, 0.2, 0.1)
    ids = [pipe.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    length = len(ids[0])
    assert 0 < len(ids[1]) < length < len(ids[2])
    slot = Slot(2, 7, words, weights(*share))
    Sampler(pipe, tiny.settings(guidance_scale=1.0)).encode_mixed(Mixed("a robot here", (slot,)), Mixed(""))
    hook.remove()
    whole, states = next((given, out) for given, out in read if given.ndim == 2)
    row = whole[0].tolist()
    first = next(n for n in range(len(row)) if row[n : n + length] == ids[0])
    for n in range(length):
        summed = sum(p * table.weight[one[n]] for p, one in zip(share, ids, strict=True) if n < len(one))
        torch.testing.assert_close(states[0, first + n], summed)
    others = [n for n in range(len(row)) if not first <= n < first + length]
    assert torch.equal(states[0, others], table.weight[whole[0, others]])


def test_a_text_that_is_cut_keeps_its_mixtures():
    """The end that the encoder does not read is lost, the words before it are found."""
    sampler = tiny.sampler()
    text = TEXT + " on a purple background" * 40
    slots = (
        Slot(2, 5, ("fox", "cat"), weights(1, 0)),
        Slot(len(text) - 10, len(text), ("background", "cat"), weights(1, 0)),
    )
    mixed = sampler.encode_mixed(Mixed(text, slots), Mixed(""))
    assert torch.equal(mixed.prompt_embeds, sampler.encode(text).prompt_embeds)


def test_the_pipeline_is_left_as_it_was():
    sampler = tiny.sampler()
    before = sampler.encode(TEXT).prompt_embeds
    sampler.encode_mixed(Mixed(TEXT, (Slot(2, 5, ("fox", "cat"), weights(0.3, 0.7)),)), Mixed(""))
    assert torch.equal(sampler.encode(TEXT).prompt_embeds, before)
    assert "forward" not in vars(sampler.pipeline.text_encoder.get_input_embeddings())


# The shortcut


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_clean_estimate_is_the_schedulers_own(name, kind):
    """pred_original_sample where it gives one; what DPM-Solver++ converts the denoiser's answer to."""
    scheduler = type(tiny.scheduler(name)).from_config(tiny.scheduler(name).config, prediction_type=kind)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
    for n, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
        found = clean(scheduler, output, sample, *levels(scheduler, t, sample))
        step = scheduler.step(output, t, sample)
        if name == "DPMSolverMultistepScheduler":
            expected = scheduler.model_outputs[-1]
        elif name == "EulerDiscreteScheduler" and kind == "sample":
            pytest.skip("Euler does not implement it")
        else:
            expected = step.pred_original_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"step {n}")
        sample = step.prev_sample


def test_the_clean_estimate_of_a_flow():
    """x0 where the denoiser answers the true velocity ε − x0."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        sample = (1 - sigma) * x0 + sigma * noise
        found = clean(scheduler, noise - x0, sample, *levels(scheduler, t, sample))
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


def test_what_is_not_known_is_refused():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(BadInput, match="EDMEulerScheduler"):
        clean(scheduler, *[torch.zeros(1, 4, 4, 4)] * 4)


def test_the_last_step_of_ddim_is_the_image_itself():
    """Where ᾱ of what follows is 1, DDIM's last step returns x̂0: the estimate there is the finished image."""
    pipe = tiny.pipeline(schedule="DDIMScheduler")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    sampler = Sampler(pipe, tiny.settings())
    encoded = sampler.encode(TEXT)
    torch.testing.assert_close(sampler.generate(encoded, [3], shortcut=3), sampler.generate(encoded, [3]))
    assert not torch.allclose(sampler.generate(encoded, [3], shortcut=1), sampler.generate(encoded, [3]), atol=1e-3)


@pytest.mark.parametrize(("steps", "at"), [(4, 1), (12, 1), (12, 5)])
def test_the_cost_does_not_depend_on_the_steps_that_follow(steps, at):
    """Two halves in each step up to the one with the gradient; one image of the budget."""
    sampler = tiny.sampler(num_inference_steps=steps)
    sampler.generate(sampler.encode(TEXT), [0], shortcut=at)
    assert (sampler.denoiser_calls, sampler.images) == (2 * (at + 1), 1)


def test_the_schedule():
    """15 of 50 at first, one step on after every two updates; the same shares of other numbers of steps."""
    assert [shortcut_step(u, 0.3, 50) for u in range(20)] == [15 + u // 2 for u in range(20)]
    assert [shortcut_step(u, 0.3, 10) for u in range(20)] == [3] * 10 + [4] * 10
    assert shortcut_step(500, 0.3, 10) == 9
    assert shortcut_step(0, 0.0, 1) == 0


@pytest.mark.parametrize("schedule", ["DDIMScheduler", "LMSDiscreteScheduler"])
def test_the_shortcut_gradient_is_the_slope(schedule):
    """Of the reward of the estimate, by finite differences in float64, through prompt and negative prompt.

    Earlier steps do not see the weights: there the mixture is held as it is.
    """
    sampler = tiny.sampler(torch.float64, schedule)
    start = torch.tensor([0.5, 0.3, 0.2, 0.6, 0.4], dtype=torch.float64)

    def encoded(x: Tensor) -> Any:
        prompt = Mixed(TEXT, (Slot(2, 5, ("fox", "cat", "unicornio"), x[:3]),))
        return sampler.encode_mixed(prompt, Mixed(NEGATIVE, (Slot(0, 3, ("red", "blue"), x[3:]),)))

    def score(x: Tensor) -> Tensor:
        return tiny.Redness()(sampler.generate(encoded(x), [5], gradient=True, shortcut=0), [TEXT]).sum()

    leaf = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(leaf), leaf)
    step = 1e-2  # images come back in float32
    for k in range(5):
        aside = torch.eye(5, dtype=torch.float64)[k] * step
        with torch.no_grad():
            change = (score(start + aside) - score(start - aside)) / (2 * step)
        assert slope[k].item() == pytest.approx(change.item(), rel=0.03, abs=1e-5)
    assert slope.abs().max() > 2e-4


# Templates


def test_the_first_choices_give_the_text_itself():
    """And others what a person would write."""
    lists = WordLists.read(LISTS, "here")
    prompt = "A Fox, and  a rocket"
    template = prompt_template(prompt, lists, attack=False)
    assert [position.choices[0] for position in template.positions] == ["Fox", "and", ""]
    assert template.write([0, 0, 0])[0] == prompt
    assert template.write([2, 1, 1])[0] == "A red panda, left of  a rocket at sunset"
    assert template.write([1, 0, 2])[0] == "A cat, and  a rocket, neon"
    plain = prompt_template(TEXT, lists, attack=False)
    assert plain.write([4, 2, 0])[0] == "a a rocket"
    negative = negative_template("red", lists)
    assert [negative.write(chosen)[0] for chosen in ([0, 0], [1, 0], [1, 2])] == [
        "red",
        "red, blurry",
        "red, blurry, green dog",
    ]
    assert negative_template("", lists).write([0, 1])[0] == "dog"


def test_the_spans_are_those_of_the_choices():
    template = Template("one two three", (Position(0, 3, ("one", "", "uno")), Position(8, 13, ("three", "", "tres"))))
    for chosen in np.ndindex(3, 3):
        text, spans = template.write(chosen)
        written = [position.choices[k] for position, k in zip(template.positions, chosen, strict=True)]
        assert [text[start:stop] for start, stop in spans] == written
        assert text == " ".join(word for word in (written[0], "two", written[1]) if word)


def test_an_attack_exchanges_words_only():
    template = prompt_template(TEXT, WordLists.read(LISTS, "here"), attack=True)
    assert [position.choices for position in template.positions] == [
        ("fox", "cat", "red panda", "unicorn"),
        ("and", "left of"),
    ]


def test_phrases_come_before_their_words():
    lists = WordLists.read({"synonyms": {"fox": ["cat"], "red fox": ["red cat"]}}, "here")
    template = prompt_template("a red fox and a fox, foxes", lists, attack=True)
    assert [position.choices[0] for position in template.positions] == ["red fox", "fox"]


# Word lists


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "can't be read"),
        ('{"synonyms": {"fox": ["cat"]}', "can't be read"),
        ("[1]", "an object with members.*but got list"),
        ('{"synonym": {}}', "members among synonyms, additions, negative, but got the members 'synonym'"),
        ('{"synonyms": ["fox"]}', "`synonyms` of .* must be an object"),
        ('{"synonyms": {"fox": "cat"}}', "choices for 'fox'.*but got \"cat\""),
        ('{"synonyms": {"fox": ["cat", 3]}}', "choices for 'fox'"),
        ('{"negative": {"fox": ["cat"]}}', "`negative` of .* must be a list"),
        ('{"additions": [["at dawn", null]]}', "choices for 'additions'"),
        ('{"synonyms": {"fox": ["' + "x" * 201 + '"]}}', "at most 200 characters"),
    ],
)
def test_a_file_that_holds_no_lists_is_refused_in_one_line(tmp_path, text, shown):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(BadInput, match=shown) as caught:
        from_file(tmp_path / "words.json")
    assert "\n" not in str(caught.value)


def test_what_is_read_is_written_the_same():
    lists = WordLists.read(LISTS, "here")
    assert lists.negative == (("blurry",), ("dog", "green dog"))
    assert WordLists.read(json.loads(lists.json()), "here") == lists


@pytest.mark.parametrize(
    "lists",
    [{}, {"synonyms": {"wolf": ["dog"]}}, {"synonyms": {"fox": ["FOX", " fox "]}}, {"negative": [[], ""]}],
    ids=str,
)
def test_empty_lists_leave_nothing(tiny_folder, tmp_path, lists):
    """One line before weights load, and no directory."""
    (tmp_path / "words.json").write_text(json.dumps(lists))
    task = "attack" if "FOX" in str(lists) else "improve"
    with pytest.raises(BadInput, match="a choice for a word of the prompt, but for 'a fox'"):
        run(tiny_folder, "a fox", words=str(tmp_path / "words.json"), task=task, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_order_of_the_sources(tmp_path, monkeypatch):
    vocabulary = EMBEDDED["emoji"] / "words.json"
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert source_of("words.json", vocabulary, True) == "words.json"
    assert source_of("", vocabulary, True) == "vocabulary"
    assert source_of("", None, True) == "llm"
    with pytest.raises(BadInput, match="--words FILE"):
        source_of("", None, False)
    for missing in ("vocabulary", "wordnet", "llm"):
        with pytest.raises(BadInput, match=f"words '{missing}' was asked for, but"):
            source_of(missing, None, False)
    write_wordnet(tmp_path)
    assert source_of("", None, True) == "wordnet"


def write_wordnet(folder: Path) -> Path:
    """A WordNet of three synsets in the format of wndb(5WN)."""
    lines = {"noun": [("n", ["fox", "red_fox"], "")], "adj": [("a", ["big", "large(p)"], "!"), ("a", ["small"], "!")]}
    for kind in ("noun", "verb", "adj", "adv"):
        data, offsets = "  1 licence\n", []
        for synset_type, words, pointer in lines.get(kind, []):
            offsets.append((len(data), words))
            listed = " ".join(f"{word} 0" for word in words)
            pointers = "001 ! {} a 0101" if pointer else "000"
            data += f"{len(data):08d} 00 {synset_type} {len(words):02x} {listed} {pointers} | a gloss  \n"
        if kind == "adj":  # big and small are opposed; offsets have eight digits
            data = data.replace("{}", f"{offsets[1][0] + 6:08d}", 1).replace("{}", f"{offsets[0][0]:08d}", 1)
            offsets[1] = (offsets[1][0] + 6, offsets[1][1])
            head, tail = data[: offsets[1][0]], data[offsets[1][0] :]
            data = head + f"{offsets[1][0]:08d}" + tail[8:]
        index = "  1 licence\n"
        for offset, words in offsets:
            for word in words:
                index += f"{word.split('(')[0]} {kind[0]} 1 0 1 1 {offset:08d}  \n"
        (folder / f"data.{kind}").write_text(data)
        (folder / f"index.{kind}").write_text(index)
    return folder


def test_wordnets_format(tmp_path):
    wordnet = WordNet(write_wordnet(tmp_path))
    assert wordnet.synonyms("fox") == ("red fox",)
    assert wordnet.synonyms("Red fox") == ("fox",)
    assert wordnet.synonyms("big") == ("large",)
    assert (wordnet.antonyms("big"), wordnet.antonyms("small")) == (("small",), ("big",))
    assert wordnet.antonyms("large") == ()
    assert wordnet.synonyms("nothing") == wordnet.synonyms("a") == ()
    lists = from_wordnet("a big fox", wordnet)
    assert lists.synonyms == {"big": ("large",), "fox": ("red fox",)}
    assert lists.negative == (("small",), *((entry,) for entry in LIBRARY))
    (tmp_path / "data.adv").unlink()
    with pytest.raises(BadInput, match=r"data\.adv"):
        WordNet(tmp_path)


@pytest.mark.skipif(installed() is None, reason="WordNet is not installed (Debian: wordnet-base)")
def test_the_real_wordnet():
    wordnet = WordNet(installed())
    assert "automobile" in wordnet.synonyms("car")
    assert "unhappy" in wordnet.antonyms("happy")
    assert wordnet.synonyms("at") == ()


def test_the_embedded_models_words_are_its_worlds(monkeypatch):
    """Every thing, place and style that training drew, and no other."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from training import world

    known = json.loads((EMBEDDED["emoji"] / "words.json").read_text())
    assert known["things"] == {kind: list(things) for kind, things in world.CATEGORIES.items()}
    assert set(known["places"]) == {world.place(one) for one in world.BACKGROUNDS}
    assert known["styles"] == list(world.STYLES)
    assert set(known["relations"]) == {"and", *(phrase for pair in world.RELATIONS.values() for phrase in pair)}


def test_the_embedded_models_lists():
    path = EMBEDDED["emoji"] / "words.json"
    lists = from_vocabulary("a fox and a large rocket", path, False)
    assert lists.synonyms["fox"] == ("large fox", "medium fox", "small fox")
    assert "rocket" not in lists.synonyms
    assert "left of" in lists.synonyms["and"]
    assert len(lists.additions) == 1
    assert not any({"fox", "rocket"} & set(choices) for choices in lists.negative)
    attack = from_vocabulary("a fox at sunset, neon", path, True)
    assert "cat" in attack.synonyms["fox"]
    assert set(attack.synonyms) == {"fox", "at sunset", "neon"}
    assert from_vocabulary("a fox at sunset", path, False).additions == ()


# The space


def space(seed: int = 0, **changed: Any) -> WordSpace:
    return WordSpace(TEXT, "", tiny.sampler(**changed), lambda: WordLists.read(LISTS, "here"), seed=seed)


def test_both_views_say_the_same():
    """Numbers of choices, and coefficients of which those choices' are the largest; starts are the raw prompt."""
    words = space()
    few, full = words.coordinates(full=False), words.coordinates(full=True)
    assert full.groups == words.sizes == (5, 3, 3, 2, 3)
    assert few.upper.tolist() == [4, 2, 2, 1, 2]
    assert words.texts(few.start, full=False) == words.texts(full.start, full=True) == (TEXT, "")
    numbers = torch.tensor([2.0, 1, 0, 1, 2])
    corner = torch.cat([torch.eye(n)[int(k)] * 3 for n, k in zip(words.sizes, numbers, strict=True)])
    assert (
        words.texts(numbers, full=False)
        == words.texts(corner, full=True)
        == ("a red panda left of a rocket", "blurry, green dog")
    )
    raw = words.sampler.encode(TEXT)
    made, penalty = words.apply(torch.stack([few.start, numbers]), raw, full=False)
    assert torch.equal(made.prompt_embeds[:1], raw.prompt_embeds)
    assert torch.equal(
        made.negative_prompt_embeds[1:], words.sampler.encode("a", "blurry, green dog").negative_prompt_embeds
    )
    assert penalty.tolist() == [0, 0]


def test_draws_follow_the_coefficients():
    """The heaviest choice of Gumbel-softmax is a draw from softmax(x): frequencies over 2,000 seeds and rows."""
    words = space()
    words.sampler = Recorder()  # type: ignore[assignment]
    words.__dict__["templates"] = (prompt_template(TEXT, words.lists, attack=True), Template(""))
    x = torch.tensor([1.5, 0.0, 0.5, 0.0, 1.0, 0.0])
    for k in range(2000):
        words.seed = k // 4
        words._relaxed(x, k % 4)
    picked = np.bincount(words.sampler.first, minlength=4) / 2000  # type: ignore[attr-defined]
    np.testing.assert_allclose(picked, x[:4].softmax(0), atol=0.035)


class Recorder:
    """Takes the place of a sampler that encodes mixtures: notes which choice of the first slot weighs most."""

    def __init__(self) -> None:
        self.first: list[int] = []

    def encode_mixed(self, prompt: Mixed, negative: Mixed) -> None:
        assert float(prompt.slots[0].weights.sum()) == pytest.approx(1)
        self.first.append(int(prompt.slots[0].weights.argmax()))


def test_a_point_is_the_same_mixture_on_every_occasion():
    """But another one in another row, for another seed and at another point."""
    start = space().coordinates(full=True).start

    def mixture(seed: int, row: int, x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return space(seed)._relaxed(leaf, row).prompt_embeds.detach()

    first = mixture(0, 0, start)
    assert torch.equal(first, mixture(0, 0, start))
    for other in (mixture(1, 0, start), mixture(0, 1, start), mixture(0, 0, start + 0.01)):
        assert not torch.equal(first, other)


def test_lists_are_kept_with_the_run():
    """A loaded space asks no source."""

    def fail() -> WordLists:
        raise AssertionError

    first, second = space(), WordSpace(TEXT, "", tiny.sampler(), fail)
    second.load_state_dict(first.state_dict())
    assert second.lists == first.lists
    assert second.sizes == first.sizes


def test_without_guidance_there_is_no_negative_prompt():
    assert space(guidance_scale=1.0).sizes == (5, 3, 3)


# Rewards and similarity


def test_the_spherical_reward_is_half_the_squared_angle():
    """2·arcsin²(‖x − y‖/2) = θ²/2 for an angle θ, of the same embeddings as clip."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompts = ["a fox", "a cat at night", "two rockets", "a fox"]
    cosine, sphere = (prepare(name).load("cpu")(images, prompts) for name in ("clip", "clip-spherical"))
    torch.testing.assert_close(sphere, -cosine.acos().square() / 2, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(sphere.sum(), images)[0].abs().max() > 0


def test_similarity_by_the_embedded_clip():
    embed = prepare_similarity("clip", True)("cpu")
    found = similarity(embed, ["a fox", "a cat", "a castle at sunset"], "a fox")
    texts = encoder("clip", "cpu").texts(["a fox", "a cat", "a castle at sunset"])
    torch.testing.assert_close(found, texts @ texts[0])
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] > found[2]


def test_similarity_by_a_function(tmp_path):
    """Of texts; what it returns is checked."""
    (tmp_path / "own.py").write_text(
        "def lengths(texts):\n    return [[len(text), 1.0] for text in texts]\n"
        "def torn(texts):\n    return [1.0]\ndef broken(texts):\n    return 1 / 0\nnumber = 3\n"
    )
    embed = prepare_similarity(f"{tmp_path}/own.py:lengths", True)("cpu")
    assert similarity(embed, ["aa", "b"], "cc").tolist() == pytest.approx([1, 3 / math.sqrt(10)])
    for name, shown in (("torn", r"embeddings \(2, D\)"), ("broken", "ZeroDivisionError")):
        with pytest.raises(RunFailed, match=shown):
            similarity(prepare_similarity(f"{tmp_path}/own.py:{name}", True)("cpu"), ["aa"], "cc")
    for spec, shown in (
        ("own", "similarity must be"),
        ("aesthetic", "similarity must be"),
        (f"{tmp_path}/own.py:number", "a int"),
    ):
        with pytest.raises(BadInput, match=shown):
            prepare_similarity(spec, True)


def test_texts_below_the_floor_take_words_back():
    """The word that helps most first, until the floor is kept."""
    lists = WordLists({"a": ("x",), "b": ("y",), "c": ("z",)})
    words = WordSpace("a b c", "", tiny.sampler(), lambda: lists, attack=True)
    cost = {"x": 0.3, "y": 0.1, "z": 0.05}
    last = torch.ones(3)
    for floor, expected in ((0.5, "x y z"), (0.84, "a y z"), (0.86, "a b z"), (0.96, "a b c")):
        words.keep_similar(lambda texts: torch.tensor([1 - sum(cost.get(c, 0) for c in one) for one in texts]), floor)
        assert words.texts(last, full=False)[0] == expected


# Runs


def run(folder: Path, prompt: str = TEXT, reward: Any = None, **changed: Any) -> Result:
    """A short run on the tiny pipeline, with the lists beside it."""
    settings: dict[str, Any] = {**tiny.RUN, "space": "words", "budget": 13, "words": str(folder / "lists.json")}
    return optimize(prompt, reward=reward or tiny.Redness(), model=str(folder), **(settings | changed))


@pytest.fixture(autouse=True, scope="module")
def lists(tiny_folder: Path) -> None:
    """Beside the tiny model, for `run`."""
    (tiny_folder / "lists.json").write_text(json.dumps(LISTS))


@pytest.mark.parametrize("strategy", ["hybrid", "gpo", "evolution", "random"])
def test_the_best_image_comes_back_from_the_text(tiny_folder, tmp_path, strategy):
    """Plain diffusers, given the prompt and the negative prompt that were found, draws best.png."""
    result = run(tiny_folder, strategy=strategy, out=tmp_path, held_out=0, seed=3)
    assert result.reward > result.raw_reward
    found = result.summary["optimized"]
    assert json.loads((tmp_path / "run.json").read_text())["result"]["optimized"] == found
    assert found != {"prompt": TEXT, "negative_prompt": ""}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    image = pipe(
        **found, generator=torch.Generator("cpu").manual_seed(3), num_inference_steps=3, guidance_scale=3.0
    ).images[0]  # fmt: skip
    assert pixels(image) == pixels(Image.open(tmp_path / "best.png"))
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata()["optimized_prompt"] == found["prompt"]
    assert found["prompt"] in (tmp_path / "report.html").read_text()


def test_estimates_are_paid_for_and_never_the_result(tiny_folder):
    """Half of the budget, without a text in its lines; denoiser calls are those that the shortcut makes."""
    result = run(tiny_folder, strategy="hybrid", budget=21, held_out=0)
    estimates = [record.get("estimate", False) for record in result.history]
    assert estimates == [False] + [True] * 10 + [False] * 10
    assert all(("prompt" in record) != record.get("estimate", False) for record in result.history)
    real = [record["reward"] for record in result.history if not record.get("estimate")]
    assert result.reward == max(real)
    assert result.history[11]["best"] == max(real[:2])
    assert result.summary["denoiser_calls"] == 2 * (11 * 3 + sum(shortcut_step(u, 0.3, 3) + 1 for u in range(10)))


class Stopped(tiny.Redness):
    """Redness, until Ctrl-C is pressed in a call of that number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__call__(images, prompts)


@pytest.mark.parametrize("strategy", ["hybrid", "gpo", "evolution"])
@pytest.mark.parametrize("at", [4, 11])
def test_a_stopped_search_ends_as_if_it_never_had_been(tiny_folder, tmp_path, strategy, at):
    """In the gradient's part and in what follows."""

    def told(result: Result) -> list[Any]:
        return [
            {key: value for key, value in record.items() if key not in ("seconds", "parts")}
            for record in result.history
        ]

    whole = run(tiny_folder, strategy=strategy, budget=15, held_out=0)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, reward=Stopped(at), strategy=strategy, budget=15, held_out=0, out=tmp_path)
    again = resume(tmp_path, reward=tiny.Redness())
    assert told(again) == told(whole)
    assert again.summary["optimized"] == whole.summary["optimized"]


def test_an_attack_lowers_the_reward_above_the_floor():
    """On the embedded model: every prompt that was tried is at least as similar as the floor; the reward is negated."""
    prompt = "a fox and a rocket"
    settings: dict[str, Any] = {"space": "words", "task": "attack", "reward": "clip", "strategy": "evolution"}
    settings |= {"held_out": 0, "num_inference_steps": 4, "judge": "none"}
    result = optimize(prompt, budget=21, **settings)
    tried = [record["prompt"] for record in result.history]
    assert len(set(tried)) > 2
    embed = prepare_similarity("clip", True)("cpu")
    assert similarity(embed, tried, prompt).min() >= 0.9
    assert all(record["reward"] == pytest.approx(-record["parts"]["clip"]) for record in result.history)
    assert result.reward > result.raw_reward
    assert all(record["negative_prompt"] == "" for record in result.history)
    strict = optimize(prompt, budget=8, similarity_floor=1.0, **settings)
    assert {record["prompt"] for record in strict.history} == {prompt}


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"strategy": "gradient"}, "the space of words is searched by hybrid"),
        ({"space": "tokens", "strategy": "hybrid"}, "'hybrid' searches the space of words, but got space='tokens'"),
        ({"space": "tokens", "strategy": "llm"}, "searches the space of texts"),
        ({"space": "tokens", "task": "attack"}, "an attack exchanges words"),
        ({"task": "defend"}, "task must be one of improve, attack, but got 'defend'"),
        ({"task": "attack", "similarity": "fox"}, "similarity must be"),
        ({"similarity_floor": 1.5}, "similarity_floor=1.5"),
        ({"shortcut_start": 1.0}, r"shortcut_start=1\.0"),
        ({"words": "nowhere.json"}, "'nowhere.json' can't be read: No such file"),
        ({"reward": "jpeg-incompressibility"}, "'hybrid' needs a differentiable reward"),
        ({"memory": "sequential-offload"}, "does not go with a gradient"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, shown):
    with pytest.raises(BadInput, match=shown) as caught:
        optimize("a fox", **({"space": "words", "out": tmp_path / "run"} | settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
