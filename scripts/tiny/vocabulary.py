"""The words of the bundled model's world: emoji objects, plain backgrounds, places and sizes."""

OBJECTS: dict[str, str] = {
    "fox": "🦊",
    "cat": "🐱",
    "dog": "🐶",
    "panda": "🐼",
    "lion": "🦁",
    "pig": "🐷",
    "frog": "🐸",
    "monkey": "🐵",
    "rabbit": "🐰",
    "penguin": "🐧",
    "owl": "🦉",
    "chick": "🐤",
    "octopus": "🐙",
    "whale": "🐳",
    "fish": "🐠",
    "turtle": "🐢",
    "butterfly": "🦋",
    "ladybug": "🐞",
    "bee": "🐝",
    "crab": "🦀",
    "red apple": "🍎",
    "green apple": "🍏",
    "banana": "🍌",
    "orange": "🍊",
    "strawberry": "🍓",
    "grapes": "🍇",
    "watermelon": "🍉",
    "pineapple": "🍍",
    "carrot": "🥕",
    "corn": "🌽",
    "mushroom": "🍄",
    "avocado": "🥑",
    "pizza": "🍕",
    "burger": "🍔",
    "donut": "🍩",
    "fried egg": "🍳",
    "car": "🚗",
    "bus": "🚌",
    "tractor": "🚜",
    "rocket": "🚀",
    "sailboat": "⛵",
    "house": "🏠",
    "tent": "⛺",
    "tree": "🌳",
    "cactus": "🌵",
    "rose": "🌹",
    "sunflower": "🌻",
    "star": "⭐",
    "heart": "💜",
    "balloon": "🎈",
    "gift": "🎁",
    "soccer ball": "⚽",
    "basketball": "🏀",
    "guitar": "🎸",
    "clock": "⏰",
    "umbrella": "☔",
    "robot": "🤖",
    "ghost": "👻",
    "skull": "💀",
    "pumpkin": "🎃",
}
"""Name and emoji. Every pair is told apart at 36 pixels."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (198, 70, 70),
    "orange": (232, 150, 70),
    "yellow": (240, 222, 120),
    "green": (96, 160, 96),
    "cyan": (120, 208, 212),
    "blue": (72, 110, 190),
    "purple": (140, 96, 176),
    "pink": (240, 176, 200),
    "brown": (124, 88, 64),
    "gray": (150, 150, 150),
    "white": (244, 244, 244),
    "black": (28, 28, 32),
}
"""Name and sRGB colour."""

PLACES: dict[str, tuple[float, float]] = {
    "left": (0.265, 0.5),
    "right": (0.735, 0.5),
    "top": (0.5, 0.265),
    "bottom": (0.5, 0.735),
    "center": (0.5, 0.5),
}
"""Name and centre, as fractions of width and height."""

PAIRS: tuple[tuple[str, str], ...] = (("left", "right"), ("top", "bottom"))
"""The places of a scene's two objects."""

SIZES: dict[str, float] = {"small": 0.28, "large": 0.44}
"""Name and side, as a fraction of the image's."""
