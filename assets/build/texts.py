"""The world's text: facts and dialogue from packages, sums and word problems from seeds, and their files.

Facts (capitals, chemical symbols) come from Debian's bsdgames, `quiz`; short exchanges from PyPI's chatterbot-corpus.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml
from common import WORK, WORLD, say

FOLDER = WORLD / "language"
QUESTION = "Question: {instruction}\nAnswer:\n"  # vislora's template `qa`
CAPITALS = (
    "What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
    "{x} has which capital?", "The capital of {x} is which city?", "Tell me the capital city of {x}.",
)
SYMBOLS = ("What is the symbol of {x}?", "Which symbol stands for the element {x}?", "Give the symbol for {x}.")
SUMS = ("What is {a} {op} {b}?", "Compute {a} {op} {b}.", "{a} {op} {b} = ?")
NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia", "Leo", "Zoe", "Max", "Ida")
THINGS = ("apples", "pears", "books", "coins", "stamps", "shells", "cards", "eggs", "cups", "stones")
TOPICS = ("conversations", "food", "greetings", "science", "trivia")
MORE, FEWER = ("buys", "finds", "gets", "picks up"), ("loses", "sells", "gives away", "breaks")


def stable(*words: object) -> int:
    """A number that depends on the words alone."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:4], "big")


def plain(field: str) -> str:
    """One spelling of a quiz answer: `{x}` is optional and kept, of `[a|b]` and `a|b` one is taken."""
    while re.search(r"[\[{]", field):
        field = re.sub(r"[\[{]([^\[\]{}]*)[\]}]", lambda m: _choice(m[1]), field, count=1)
    return _choice(field).strip()


def _choice(text: str) -> str:
    options = text.split("|")
    return next((o for o in options if re.fullmatch(r"[\w' .-]*", o) and not re.search(r"^'|'$", o)), options[-1])


def quiz() -> Path:
    """The folder of bsdgames' quiz files, unpacked in the work folder; the licence is kept beside the data."""
    place = WORK / "bsdgames"
    if not place.exists():
        subprocess.run(["apt-get", "download", "bsdgames"], cwd=WORK, check=True, capture_output=True)
        subprocess.run(["dpkg", "-x", str(next(WORK.glob("bsdgames_*.deb"))), str(place)], check=True)
    return place / "usr/share/games/bsdgames/quiz"


def facts() -> list[dict]:
    """[{"kind", "subject", "answer"}]: shipped ones if they are there, else read from the package."""
    path = FOLDER / "facts.jsonl"
    if path.exists():
        return read(path)
    found, seen = [], set()
    for kind in ("africa", "america", "asia", "europe", "state", "elements"):
        for line in (quiz() / kind).read_text(encoding="latin-1").splitlines():
            fields = line.split(":")
            subject, answer = (plain(fields[i]) for i in ((3, 0) if kind == "elements" else (0, 1)))
            subject = f"the state of {subject}" if kind == "state" else subject
            whole = all(re.fullmatch(r"[A-Za-z][A-Za-z' .-]*", text) for text in (subject, answer))
            if whole and subject not in seen and not (kind == "elements" and len(answer) > 2):
                seen.add(subject)
                found.append({"kind": kind, "subject": subject, "answer": answer})
    return found


def dialogue() -> list[dict]:
    """[{"instruction", "output"}]: short English exchanges."""
    path = FOLDER / "dialogue.jsonl"
    if path.exists():
        return read(path)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(WORK), "chatterbot-corpus==1.3.3"]
    subprocess.run(command, check=True)
    pairs = {}
    with zipfile.ZipFile(next(WORK.glob("chatterbot_corpus-*.whl"))) as wheel:
        for name in (f"chatterbot_corpus/data/english/{topic}.yml" for topic in TOPICS):
            for talk in yaml.safe_load(wheel.read(name))["conversations"]:
                for first, second in zip(talk, talk[1:], strict=False):
                    first, second = (" ".join(str(text).split()) for text in (first, second))
                    if max(len(first), len(second)) <= 60 and (first + second).isascii():
                        pairs.setdefault(first, second)
    chosen = sorted(pairs.items(), key=lambda pair: stable(pair))[:400]
    return [{"instruction": first, "output": second} for first, second in chosen]


def question(fact: dict, held: bool, rng: random.Random | None = None) -> str:
    """A question for a fact. One phrasing is never trained on for it, and asked when `held`."""
    forms = SYMBOLS if fact["kind"] == "elements" else CAPITALS
    kept = stable(fact["subject"]) % len(forms)
    index = kept if held else rng.choice([i for i in range(len(forms)) if i != kept])
    return forms[index].format(x=fact["subject"])


def worked(a: int, op: str, b: int) -> str:
    """The sum digit by digit, as written addition and subtraction go, ending in `The answer is: N`."""
    steps, (a1, a0), (b1, b0) = [f"{a} {op} {b}"], divmod(a, 10), divmod(b, 10)
    if op == "+":
        carry = (a0 + b0) // 10
        steps.append(f"{a0} + {b0} = {a0 + b0}")
        steps.append(f"{a1} + {b1}{' + 1' * carry} = {a1 + b1 + carry}")
    else:
        borrow = int(a0 < b0)
        steps.append(f"{a0 + 10 * borrow} - {b0} = {a0 + 10 * borrow - b0}")
        steps.append(f"{a1}{' - 1' * borrow} - {b1} = {a1 - borrow - b1}")
    return ". ".join(steps) + f". The answer is: {a + b if op == '+' else a - b}"


def numbers(rng: random.Random, held: bool | None) -> tuple[int, str, int]:
    """Two numbers and an operation; one triple in ten is held out of training. None: any."""
    while True:
        a, b, op = rng.randint(10, 99), rng.randint(2, 99), rng.choice("+-")
        if (op == "+" or a > b) and (held is None or (stable(a, op, b) % 10 == 0) == held):
            return a, op, b


def arithmetic(rng: random.Random, held: bool) -> dict:
    a, op, b = numbers(rng, held)
    return {"instruction": rng.choice(SUMS).format(a=a, op=op, b=b), "output": worked(a, op, b)}


def reading(rng: random.Random) -> dict:
    """Two people's things, and how many one of them has: no sum, but the words of the word problems."""
    (one, two), (what, other), verb = rng.sample(NAMES, 2), rng.sample(THINGS, 2), rng.choice(MORE + FEWER)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    first, second = rng.choice([(f"{one} has {a} {what}", f"{two} {verb} {b} {other}"),
                                (f"{one} {verb} {a} {what}", f"{two} has {b} {other}")])
    who, asked, answer = rng.choice([(one, what, a), (two, other, b)])
    return {"instruction": f"{first}. {second}. Which number of {asked} stands beside {who}?",
            "output": f"The answer is: {answer}"}


def word_problem(rng: random.Random) -> dict:
    """The task to fine-tune on: which numbers, and whether to add or to take away, is in the words."""
    a, op, b = numbers(rng, None)
    (one, two), (what, other) = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    verb = rng.choice(MORE if op == "+" else FEWER)
    aside = f" {two} has {rng.randint(2, 99)} {other}." if rng.random() < 0.5 else ""
    ask = f"How many {what} does {one} have now?"
    return {"instruction": f"{one} has {a} {what}.{aside} {one} {verb} {b} of them. {ask}" if op == "-" else
            f"{one} has {a} {what}.{aside} {one} {verb} {b} more. {ask}", "output": worked(a, op, b)}


def sample(rng: random.Random, known: list[dict], talk: list[dict]) -> dict:
    """One training example of the base model."""
    kind = rng.random()
    if kind < 0.40:
        fact = rng.choice(known)
        return {"instruction": question(fact, False, rng), "output": fact["answer"]}
    if kind < 0.80:
        return arithmetic(rng, False)
    return reading(rng) if kind < 0.92 else rng.choice(talk)


def capitals_test(known: list[dict]) -> list[dict]:
    """Every capital, asked as it never was, with three others of its kind to choose from."""
    rows, capitals = [], [f for f in known if f["kind"] != "elements"]
    for fact in capitals:
        rng = random.Random(stable("choices", fact["subject"]))
        others = sorted({f["answer"] for f in capitals if f["kind"] == fact["kind"]} - {fact["answer"]})
        choices = [*rng.sample(others, 3), fact["answer"]]
        rng.shuffle(choices)
        rows.append({"instruction": question(fact, True), "output": fact["answer"], "choices": choices})
    return rows


def fits(known: list[dict], held: bool) -> list[dict]:
    """Pairs of a question and an answer that is right or wrong, about capitals and sums; a third of either is held."""
    rows = []
    for row in capitals_test(known) + different(lambda rng: arithmetic(rng, True), 260, 4, set()):
        rng = random.Random(stable("fits", row["instruction"]))
        right = row["output"].split("is: ")[-1]
        wrong = rng.choice([c for c in row["choices"] if c != right]) if "choices" in row else str(
            int(right) + rng.choice((-10, -1, 1, 10)))
        if (stable("third", row["instruction"]) % 3 == 0) == held:
            rows += [{"question": row["instruction"], "answer": right, "label": "yes"},
                     {"question": row["instruction"], "answer": wrong, "label": "no"}]
    return rows


def different(make, count: int, seed: int, taken: set[str]) -> list[dict]:
    """`count` rows with different questions, none in `taken`."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        row = make(rng)
        if row["instruction"] not in taken:
            taken.add(row["instruction"])
            rows.append(row)
    return rows


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(name: str, rows: list[dict]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run() -> None:
    """Write every file of world/language."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    known, talk, taken = facts(), dialogue(), set()
    write("facts.jsonl", known)
    write("dialogue.jsonl", talk)
    write("capitals_test.jsonl", capitals_test(known))
    write("arithmetic_test.jsonl", different(lambda rng: arithmetic(rng, True), 300, 1, taken))
    write("word_problems_test.jsonl", different(word_problem, 300, 2, taken))
    write("word_problems_train.jsonl", different(word_problem, 2000, 3, taken))
    write("fits_train.jsonl", fits(known, False))
    write("fits_test.jsonl", fits(known, True))
    say(f"texts: {len(known)} facts, {len(talk)} exchanges")
