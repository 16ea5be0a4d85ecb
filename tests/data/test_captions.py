"""Every photo gets its own caption or the run does not start."""

import json
import logging

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vislora.data.captions import captions, check_tokens
from vislora.data.images import scan
from vislora.errors import InputError


def photos(folder, *names):
    for i, name in enumerate(names):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / name)
    return scan(folder, 32)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def write(folder, *entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def test_one_prompt_for_all(tmp_path, caplog):
    shots = photos(tmp_path, "a.png", "b.png")
    assert captions(shots, tmp_path, "a  photo of\tsks dog\n") == ["a photo of sks dog"] * 2
    assert said(caplog) == []
    with pytest.raises(InputError, match="--instance_prompt: is not given, and .* holds no captions"):
        captions(shots, tmp_path, None)
    with pytest.raises(InputError, match="--instance_prompt: is an empty caption"):
        captions(shots, tmp_path, " ")


def test_sidecars_go_before_the_prompt_and_metadata_before_both(tmp_path, caplog):
    shots = photos(tmp_path, "b.png", "a.png", "c.d.jpg")
    for stem in ("a", "b", "c.d"):
        (tmp_path / f"{stem}.txt").write_text(f"caption of {stem}")
    assert captions(shots, tmp_path, "all") == ["caption of a", "caption of b", "caption of c.d"]
    assert said(caplog) == []
    write(tmp_path, *({"file_name": p.path.name, "text": f"line {p.path.name}", "mood": "calm"} for p in shots[::-1]))
    assert captions(shots, tmp_path, "all") == ["line a.png", "line b.png", "line c.d.jpg"]
    assert len(said(caplog)) == 1 and "the .txt captions beside it are not" in said(caplog)[0]
    assert captions(shots, tmp_path, None, column="mood") == ["calm"] * 3


def test_captions_follow_the_order_of_the_photos(tmp_path):
    shots = photos(tmp_path, "a.png", "b.png")
    write(tmp_path, {"file_name": "a.png", "text": "A"}, {"file_name": "b.png", "text": "B"})
    assert captions(shots[::-1], tmp_path, None) == ["B", "A"]


@pytest.mark.case("P08")
def test_a_missing_caption_names_the_first_five_photos(tmp_path):
    shots = photos(tmp_path, *(f"{i}.png" for i in range(8)))
    (tmp_path / "3.txt").write_text("x")
    with pytest.raises(
        InputError, match="7 of 8 photos have no caption: 0.png, 1.png, 2.png, 4.png, 5.png, … -> .*txt"
    ):
        captions(shots, tmp_path, "all")
    write(tmp_path, *({"file_name": f"{i}.png", "text": "x"} for i in range(7)))
    with pytest.raises(InputError, match="1 of 8 photos have no caption: 7.png -> .*metadata.jsonl"):
        captions(shots, tmp_path, "all")


@pytest.mark.case("P09")
def test_captions_of_absent_photos_are_one_warning(tmp_path, caplog):
    shots = photos(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").write_bytes(b"\xff\xfe")  # never read
    assert captions(shots, tmp_path, None) == ["x"]
    write(tmp_path, {"file_name": "a.png", "text": "y"}, {"file_name": "sub/a.png", "text": "z"})
    (tmp_path / "a.txt").unlink()
    assert captions(shots, tmp_path, None) == ["y"]
    (tmp_path / "metadata.jsonl").unlink()
    assert captions(shots, tmp_path, "all") == ["all"]
    assert [line.split(": ", 1)[1] for line in said(caplog)] == [
        "1 captions without their photo: gone.txt",
        "1 captions without their photo: sub/a.png",
        "1 captions without their photo: gone.txt",
    ]


@pytest.mark.parametrize(
    "data, caption",
    [
        pytest.param(b"\xef\xbb\xbfa dog", "a dog", marks=pytest.mark.case("P01")),
        pytest.param(b"a dog\r\nin snow\r\n", "a dog in snow", marks=pytest.mark.case("P04")),
        ("Zoë 👩‍👧 שלום".encode(), "Zoë 👩‍👧 שלום"),
    ],
)
def test_text_that_is_read(tmp_path, data, caption):
    shots = photos(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    assert captions(shots, tmp_path, None) == [caption]


@pytest.mark.parametrize(
    "data, words",
    [
        pytest.param("a dog".encode("utf-16"), "is UTF-16 -> save it as UTF-8", marks=pytest.mark.case("P02")),
        ("a dog".encode("utf-32"), "is UTF-32"),
        pytest.param(
            "a dog".encode("utf-16-le"), r"control character U\+0000 at character 2 -> .*UTF-16",
            marks=pytest.mark.case("P02"),
        ),
        pytest.param(
            "Zoë".encode("cp1252"), "is not UTF-8 .byte 0xeb at offset 2. -> .*iconv -f CP1252",
            marks=pytest.mark.case("P03"),
        ),
        pytest.param(b"", "is an empty caption", marks=pytest.mark.case("P05")),
        (b"\xef\xbb\xbf \r\n", "is an empty caption"),
        pytest.param(b"a\x1b[31mdog", r"control character U\+001B at character 2", marks=pytest.mark.case("P07")),
        (b"a\x0cdog", r"U\+000C"),
        ("a\x85b".encode(), r"U\+0085"),
    ],
)
def test_text_that_is_refused(tmp_path, data, words):
    shots = photos(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=f"a.txt: .*{words}|a.txt: {words}"):
        captions(shots, tmp_path, "all")


@pytest.mark.case("P10")
@pytest.mark.parametrize(
    "line, words",
    [
        ("{nonsense", ":3: is not JSON"),
        ("[1]", ":3: names no file_name"),
        ('{"text": "x"}', ":3: names no file_name"),
        ('{"file_name": "b.png", "caption": "x"}', ":3: has no text 'text' .it has caption. -> .*--caption_column"),
        ('{"file_name": "b.png", "text": 3}', ":3: has no text 'text'"),
        ('{"file_name": "a.png", "text": "x"}', ":3: .*again"),
        ('{"file_name": "b.png", "text": " "}', ":3: is an empty caption"),
        ('{"file_name": "b.png", "text": "a\\u0000"}', r":3: holds the control character U\+0000"),
        ('{"file_name": "b.png", "text": "\\ud800"}', r":3: holds the control character U\+D800"),
        ("[" * 100_000, ":3: is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, words):
    shots = photos(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "x"}\r\n\r\n' + line.encode() + b"\n")
    with pytest.raises(InputError, match=f"metadata.jsonl{words}") as caught:
        captions(shots, tmp_path, "all")
    assert "\n" not in str(caught.value)


def tokenizer(limit):
    """Words as tokens, between a begin and an end token as CLIP has them."""
    words = ["<b>", "<e>", "<u>", *(f"w{i}" for i in range(20))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<u>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 0), ("<e>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<b>",
        eos_token="<e>",
        unk_token="<u>",
        **({"model_max_length": limit} if limit else {}),
    )


@pytest.mark.case("P06")
def test_a_lost_tail_is_shown_once_per_text(caplog):
    fits, long = "w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4 w5 w6 w7 w8"
    assert len(tokenizer(8)(fits)["input_ids"]) == 8
    assert check_tokens(tokenizer(8), [fits, long, "w0", long], "--instance_prompt") == 1
    assert said(caplog) == ['--instance_prompt: 8 tokens, the model reads 6; lost: "w7 w8"']
    caplog.clear()
    assert check_tokens(tokenizer(8), [long, fits, long + " w9"], ["a.txt", "b.txt", "c.txt"]) == 2
    assert sorted(said(caplog)) == [
        'a.txt: 8 tokens, the model reads 6; lost: "w7 w8"',
        'c.txt: 9 tokens, the model reads 6; lost: "w7 w8 w9"',
    ]
    assert check_tokens(tokenizer(None), [long * 50], "x") == 0
