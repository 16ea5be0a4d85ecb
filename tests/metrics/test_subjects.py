"""Subjects and prompts, as google/dreambooth's folders, the world and runs give them."""

from __future__ import annotations

import pytest

from vislora.errors import InputError
from vislora.metrics import drift, subjects
from vislora.metrics.pictures import examine, listing

LISTS = """Classes

subject_name,class
can,can
plush,stuffed animal
rex,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in a box'.format(unique_token, class_token),
'a green {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a coat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def copy(tmp_path):
    place = tmp_path / "dreambooth" / "dataset"
    for name in ("can", "plush", "rex"):
        (place / name).mkdir(parents=True)
    (place / "prompts_and_classes.txt").write_text(LISTS)
    return place


def test_the_layout_of_google_dreambooth(copy):
    for folder in (copy, copy.parent):
        can, plush, rex = subjects.google(folder)
        assert (plush.name, plush.noun, plush.photos) == ("plush", "stuffed animal", copy / "plush")
        assert can.templates == ("a {} in a box", "a green {}") and rex.templates == ("a {} in a coat",)
    assert plush.prompt(plush.templates[1], "sks") == "a green sks stuffed animal"
    assert plush.text(plush.templates[1], "sks", "without_token") == "a green stuffed animal"
    assert plush.text(plush.templates[1], "sks", "with_token") == "a green sks stuffed animal"
    assert plush.text(plush.templates[1], "sks", "class") == "a photo of a stuffed animal"
    assert subjects.chosen([can, plush, rex], ["rex"]) == [rex]
    with pytest.raises(InputError, match=r"'rx' is no subject.*did you mean rex"):
        subjects.chosen([can, plush, rex], ["rx"])


def test_an_incomplete_copy_is_refused(copy):
    (copy / "rex").rmdir()
    with pytest.raises(InputError, match="1 subjects without a folder: rex"):
        subjects.google(copy)
    (copy / "prompts_and_classes.txt").write_text(LISTS.split("Live")[0])
    with pytest.raises(InputError, match="gives 3 subjects, 2 and 0 prompts"):
        subjects.google(copy)
    with pytest.raises(InputError, match="no such file"):
        subjects.google(copy / "can")


def test_the_world_has_eight_subjects_and_25_prompts():
    found = subjects.dataset(None)
    assert len(found) == 8 and all(len(s.templates) == 25 and s.photos.is_dir() for s in found)
    owl = next(s for s in found if s.name == "owl")
    assert owl.prompt(owl.templates[0], "sks") == "a sks bird on grass"
    unrelated = drift.unrelated_prompts(True, owl.noun)
    assert len(set(unrelated)) == 10 and not any("bird" in prompt for prompt in unrelated)
    assert unrelated[0].startswith("an apple on")
    of_class = drift.class_prompts(owl.noun, owl.templates)
    assert len(set(of_class)) == 5 and all("bird" in prompt and "sks" not in prompt for prompt in of_class)


@pytest.mark.parametrize(
    ("noun", "without"),
    [("astronaut", ["an astronaut"]), ("sports car", ["sports car"]), ("car", ["sports car"]), ("Car", ["sports car"]),
     ("stuffed animal", []), ("glass of milk", []), ("fisherman", ["fisherman"]), ("art", []), ("", []),
     ("steam engine", ["steam locomotive"])],
)  # fmt: skip
def test_unrelated_prompts_hold_no_word_of_the_noun(noun, without):
    """Whole words of it: "glass of milk" is neither two glasses nor a bowl of ramen, and art is not in a cart."""
    kept = drift.unrelated_prompts(False, noun)
    assert [prompt for prompt in drift.UNRELATED if not any(words in prompt for words in without)] == list(kept)


def test_the_world_s_unrelated_prompts_hold_no_word_of_the_noun():
    assert drift.unrelated_prompts(True, "toy bear") == drift.unrelated_prompts(True, "bear")
    assert drift.unrelated_prompts(True, "bear") != drift.unrelated_prompts(True, "dragon")


@pytest.mark.parametrize(
    ("instance", "of_class", "expected"),
    [("a photo of a sks dog", "a photo of a dog", ("sks", "dog")),
     ("a photo of sks dog.", "a photo of dog", ("sks", "dog")),
     ("a photo of olis xyz stuffed animal", "a photo of a stuffed animal", ("olis xyz", "stuffed animal")),
     ("sks dog", "dog", ("sks", "dog"))],
)  # fmt: skip
def test_the_token_is_what_only_the_instance_prompt_says(instance, of_class, expected):
    assert subjects.token_and_noun(instance, of_class) == expected


@pytest.mark.parametrize(("instance", "of_class"), [("a sks dog", None), ("a dog", "a dog"), ("a sks", "a photo of a")])
def test_prompts_without_a_token_are_refused(instance, of_class):
    with pytest.raises(InputError, match="give --token and --class_noun"):
        subjects.token_and_noun(instance, of_class)


def test_templates_have_one_place(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a {} here\n\n a blue {} \n")
    assert subjects.read_templates(file) == ("a {} here", "a blue {}")
    for text, wrong in (("a dog", "has not one {}"), ("a {0} {1}", "has not one {}"), ("", "holds no prompt")):
        file.write_text(text)
        with pytest.raises(InputError, match=wrong):
            subjects.read_templates(file)


def test_every_unreadable_image_is_named(noise):
    place = noise("some", ["b.png", "a.png", "c.png"])
    (place / "a.png").write_bytes(b"")
    (place / "c.png").write_bytes((place / "b.png").read_bytes()[:90])
    (place / "notes.txt").write_text("none")
    with pytest.raises(InputError, match=r"2 cannot be read: .*a.png is empty.*c.png cannot be decoded"):
        examine(listing(place))
    with pytest.raises(InputError, match="holds no image"):
        listing(noise("empty", []))
