"""Draw the README's picture from the metrics of the reference run; needs matplotlib.

    python reference/hero.py

Each dot is one RLHF iteration on training prompts: the PM's mean score and the true mean utility of
the policy's responses, over the policy's distance from the initial policy, sqrt(KL).
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

FOLDER = Path(__file__).parent
GREY = "#808080"  # readable on white and on dark pages


def main():
    distances, scores, truths = [], [], []
    for line in (FOLDER / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        if numbers["stage"] == "rl" and "score" in numbers:
            distances.append(max(numbers["kl"], 0.0) ** 0.5)
            scores.append(numbers["score"])
            truths.append(numbers["truth"])
    figure, axes = pyplot.subplots(figsize=(6, 3.4), dpi=110)
    axes.plot(distances, truths, "o", markersize=4, color="#2a7fba", label="true utility")
    axes.plot(distances, scores, "^", markersize=4, color="#d9822b", label="PM score")
    axes.set_xlabel("sqrt(KL) from the initial policy (KL in nats)", color=GREY)
    axes.set_ylabel("mean of an iteration's responses", color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_color(GREY)
    figure.tight_layout()
    figure.savefig(FOLDER / "hero.png", transparent=True)


if __name__ == "__main__":
    main()
