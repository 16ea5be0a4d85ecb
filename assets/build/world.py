"""The embedded world as data: which sprites, which words, which splits, which prompts.

Nothing here draws or trains.  `scenes.py` renders from this data, `build.py` trains on it, and the `sprites`
stage writes it to `assets/world/world.json` for programs that only read the world.
"""

from __future__ import annotations

PACKAGE = "@lobehub/fluent-emoji-3d"
PACKAGE_VERSION = "1.1.0"
LICENCE = "MIT"
IMAGE_SIZE = 64
SPRITE_SIZE = 96

#: The 48 objects the base model knows: plain noun -> code point of the sprite in the package.
OBJECTS = {
    "apple": "1f34e", "banana": "1f34c", "strawberry": "1f353", "pineapple": "1f34d", "burger": "1f354",
    "pizza": "1f355", "donut": "1f369", "cake": "1f382", "mushroom": "1f344", "flower": "1f33b",
    "cactus": "1f335", "tree": "1f333", "dog": "1f436", "cat": "1f408", "bird": "1f426", "duck": "1f986",
    "penguin": "1f427", "fish": "1f41f", "turtle": "1f422", "octopus": "1f419", "crab": "1f980", "frog": "1f438",
    "fox": "1f98a", "lion": "1f981", "panda": "1f43c", "bear": "1f43b", "butterfly": "1f98b", "elephant": "1f418",
    "pig": "1f437", "rabbit": "1f430", "car": "1f697", "bus": "1f68c", "train": "1f682", "rocket": "1f680",
    "airplane": "2708-fe0f", "boat": "26f5", "bicycle": "1f6b2", "house": "1f3e0", "hat": "1f3a9",
    "crown": "1f451", "shoe": "1f45f", "bag": "1f45c", "ball": "26bd", "guitar": "1f3b8", "clock": "23f0",
    "teapot": "1fad6", "umbrella": "2602-fe0f", "robot": "1f916",
}

#: Held-out subjects: name -> (code point, class noun).  The class noun is a known object, the sprite is not.
#: The first one is the demonstration of the project's README.
SUBJECTS = {
    "owl": ("1f989", "bird"),
    "teddy": ("1f9f8", "bear"),
    "castle": ("1f3f0", "house"),
    "taxi": ("1f695", "car"),
    "backpack": ("1f392", "bag"),
    "poodle": ("1f429", "dog"),
    "palm": ("1f334", "tree"),
    "basketball": ("1f3c0", "ball"),
}

#: Tokens kept whole by the tokenizer and never seen in training: DreamBooth identifiers.
IDENTIFIERS = ("sks", "zwx", "qnv")

#: Background -> phrases that name it; the first is the plain one, used for evaluation.
BACKGROUNDS = {
    "grass": ("on grass", "on the grass", "on green grass"),
    "sand": ("on sand", "on the sand", "on the beach sand", "on the beach"),
    "snow": ("on snow", "on the snow", "in the snow"),
    "night sky": ("in the night sky", "at night", "in a starry night sky"),
    "brick wall": ("on a brick wall", "on a red brick wall", "in front of a brick wall"),
    "checkerboard": ("on a checkerboard", "on a checkerboard floor", "on the checkerboard"),
    "water": ("on water", "on the water", "in the water"),
    "wooden floor": ("on a wooden floor", "on the wooden floor", "on wood"),
    "sunset": ("at sunset", "in front of a sunset", "in the sunset"),
    "blue": ("on a plain blue background", "on a blue background", "on blue"),
    "pink": ("on a plain pink background", "on a pink background", "on pink"),
    "yellow": ("on a plain yellow background", "on a yellow background", "on yellow"),
}

#: Property -> the word for it in a caption.  Sizes and tints are the only properties.
SIZES = {"big": (0.80, 0.92), "small": (0.28, 0.38)}
TINTS = {"blue tinted": (70, 120, 255), "red tinted": (255, 60, 50), "green tinted": (50, 220, 80), "gray": None}
PROPERTIES = (*SIZES, *TINTS)

#: Things that another object can wear: drawn on top of it.
ACCESSORIES = ("hat", "crown")

#: Caption templates and their weights; {x} is the noun phrase, {bg} the background phrase.
TEMPLATES = (
    ("{x} {bg}", 0.46), ("a photo of {x} {bg}", 0.28), ("a picture of {x} {bg}", 0.08), ("the photo of {x} {bg}", 0.04),
    ("a photo of {x}", 0.09), ("{x}", 0.05),
)

#: What kind of scene, with weights.
KINDS = (("plain", 0.62), ("property", 0.20), ("pair", 0.13), ("accessory", 0.05))

#: Seeds.  A scene is a function of its seed and of the pool of sprites it draws from.
SPLITS = {
    "train": {"first_seed": 0, "count": 40000, "pool": "known"},
    "heldout": {"first_seed": 1_000_000, "count": 1000, "pool": "known"},
    "clip_train": {"first_seed": 2_000_000, "count": 20000, "pool": "all"},
    "clip_heldout": {"first_seed": 3_000_000, "count": 1000, "pool": "all"},
    "subjects": {"first_seed": 4_000_000, "count": 5, "pool": "subject"},
}

#: 25 prompts in the manner of DreamBooth, written for this world; {} is the subject phrase ("sks bird").
#: `ask` says what the image must show besides the subject.
PROMPTS = (
    # a new place
    ("a {} on grass", {"background": "grass"}),
    ("a {} on the beach sand", {"background": "sand"}),
    ("a photo of a {} in the snow", {"background": "snow"}),
    ("a {} in the night sky", {"background": "night sky"}),
    ("a {} on a brick wall", {"background": "brick wall"}),
    ("a photo of a {} on a checkerboard floor", {"background": "checkerboard"}),
    ("a {} in the water", {"background": "water"}),
    ("a photo of a {} on a wooden floor", {"background": "wooden floor"}),
    ("a {} at sunset", {"background": "sunset"}),
    ("a {} on a plain pink background", {"background": "pink"}),
    ("a photo of a {} on a blue background", {"background": "blue"}),
    # a property
    ("a big {} on sand", {"property": "big", "background": "sand"}),
    ("a small {} on snow", {"property": "small", "background": "snow"}),
    ("a photo of a small {} on a brick wall", {"property": "small", "background": "brick wall"}),
    ("a blue tinted {} on grass", {"property": "blue tinted", "background": "grass"}),
    ("a red tinted {} on snow", {"property": "red tinted", "background": "snow"}),
    ("a green tinted {} on a wooden floor", {"property": "green tinted", "background": "wooden floor"}),
    ("a photo of a gray {} on a yellow background", {"property": "gray", "background": "yellow"}),
    # an accessory
    ("a {} wearing a hat on the beach", {"accessory": "hat", "background": "sand"}),
    ("a {} wearing a crown on grass", {"accessory": "crown", "background": "grass"}),
    ("a photo of a {} wearing a crown at sunset", {"accessory": "crown", "background": "sunset"}),
    # a second object
    ("a {} and an apple on grass", {"second": "apple", "background": "grass"}),
    ("a {} next to a fish in the water", {"second": "fish", "background": "water"}),
    ("a photo of a {} and a rocket in the night sky", {"second": "rocket", "background": "night sky"}),
    ("a {} next to a house in the snow", {"second": "house", "background": "snow"}),
)


def sprites() -> dict[str, str]:
    """Every shipped sprite: name -> code point, known objects first, then subjects."""
    return {**OBJECTS, **{name: code for name, (code, _) in SUBJECTS.items()}}


def noun(name: str) -> str:
    """The noun a caption uses for a sprite: its own name, or the class noun for a held-out subject."""
    return SUBJECTS[name][1] if name in SUBJECTS else name


def pool(name: str) -> list[str]:
    """Sprite names of a pool: `known`, `subject` or `all`."""
    return {"known": list(OBJECTS), "subject": list(SUBJECTS), "all": [*OBJECTS, *SUBJECTS]}[name]


def article(phrase: str) -> str:
    """The noun phrase with "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def as_json() -> dict:
    """All of the above as one JSON-serialisable dictionary (the content of world.json)."""
    subjects = {
        name: {"class_noun": cls, "sprite": f"sprites/{name}.webp", "photos": f"subjects/{name}",
               "instance_prompt": f"a photo of a {IDENTIFIERS[0]} {cls}", "class_prompt": f"a photo of a {cls}"}
        for name, (_, cls) in SUBJECTS.items()
    }
    return {
        "source": {"package": PACKAGE, "version": PACKAGE_VERSION, "licence": LICENCE, "code_points": sprites()},
        "image_size": IMAGE_SIZE,
        "objects": list(OBJECTS),
        "backgrounds": {name: list(phrases) for name, phrases in BACKGROUNDS.items()},
        "properties": list(PROPERTIES),
        "accessories": list(ACCESSORIES),
        "identifiers": list(IDENTIFIERS),
        "splits": SPLITS,
        "subjects": subjects,
        "prompts": [{"prompt": text, "ask": ask} for text, ask in PROMPTS],
    }
