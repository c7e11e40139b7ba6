"""Who is trusted with what under secure aggregation, in one picture.

.venv/bin/python studies/secure_picture.py        docs/figures/secure.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from reports import look

ROOT = Path(__file__).parents[1]
# Left, bottom, width, height; colour; title; what it knows.
BOXES = {
    "operator": (
        (0.3, 6.9, 9.4, 1.25), look.GREEN, "Who makes keys and roster",
        "sees nothing of a run; is trusted to say whose key is whose, by a way that the server has no hand in",
    ),
    "clients": (
        (0.3, 1.4, 3.5, 4.3), look.BLUE, "A client",
        "knows its data, its update,\nits own keys and masks\n\ntrusts its own program, the roster,\n"
        "and that fewer than a third of the\nothers work for the server\n\nanswers each stage once, or ends\n"
        "the round",
    ),
    "server": (
        (6.2, 1.4, 3.5, 4.3), look.VERMILLION, "The server",
        "knows who takes part, public keys,\nsealed shares it cannot open,\nvectors that look like noise\n\n"
        "learns the sum: mean update and\nloss, number of examples\n\nprofile malicious: is trusted with\n"
        "nothing; semi-honest: keeps to the\nprotocol. It can stop a round, and\nthen has no sum",
    ),
    "others": (
        (0.3, 0.0, 9.4, 1.0), look.GREY, "Who gets the model",
        "whatever a model and its sums tell of the data: differential privacy bounds that, masks do not",
    ),
}  # fmt: skip
# Height, text above, text below; to the right, or back.
ARROWS = [
    (5.1, "signed keys, sealed shares", "", True),
    (4.3, "model; others' keys, shares", "", False),
    (3.4, "update + masks", "4 bytes a number", True),
    (2.5, "who was counted", "", False),
    (1.75, "shares that open masks", "", True),
]


def draw(path: Path) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(9.2, 6.2), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(-0.2, 8.3))
    axes.axis("off")
    for corner, color, title, text in BOXES.values():
        _box(axes, corner, color, title, text)
    for height, above, below, right in ARROWS:
        ends = ((3.9, height), (6.1, height))
        start, end = ends if right else ends[::-1]
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": look.INK, "lw": 1.3})
        axes.text(5, height + 0.08, above, ha="center", va="bottom", fontsize=9, color=look.INK)
        axes.text(5, height - 0.08, below, ha="center", va="top", fontsize=9, color=look.INK)
    for x, text in ((2.05, "its own key, and the roster"), (7.95, "the roster")):
        axes.annotate("", (x, 5.75), (x, 6.85), arrowprops={"arrowstyle": "-|>", "color": look.GREEN, "lw": 1.3})
        axes.text(x + 0.12, 6.3, text, va="center", fontsize=9, color=look.GREEN)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _box(axes: Axes, corner: tuple[float, float, float, float], color: str, title: str, text: str) -> None:
    left, bottom, width, height = corner
    style = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0.03,rounding_size=0.12", facecolor="white", edgecolor=color,
        linewidth=1.6,
    )  # fmt: skip
    axes.add_patch(style)
    axes.text(left + 0.15, bottom + height - 0.15, title, va="top", fontsize=11, weight="bold", color=color)
    axes.text(left + 0.15, bottom + height - 0.62, text, va="top", fontsize=10, color=look.INK, linespacing=1.4)


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "secure.png")
