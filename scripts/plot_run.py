"""Plot the loss of a run over its phases, from metrics.jsonl to a PNG beside it.

python -m scripts.plot_run logs/quickstart
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that holds metrics.jsonl")
    parser.add_argument("--output", type=Path, help="default: loss.png in that folder")
    args = parser.parse_args()
    with user_errors():
        path = args.run / "metrics.jsonl"
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} has no metrics yet; train first")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        output = args.output or args.run / "loss.png"
        plot(rows, args.run.name, output)
        print(f"loss curve: {output}")


def plot(rows: list[dict], title: str, output: Path) -> None:
    """Training loss step by step and smoothed, held-out loss per source, learning rate below, a band for each phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=[3, 1], layout="constrained")
    steps, losses = [row["step"] for row in rows], [float(row["loss"]) for row in rows]
    top.plot(steps, losses, color="0.75", linewidth=0.8, label="training")
    sources = sorted({key.split("/")[1] for row in rows for key in row if key.startswith("val/") and key.count("/") == 2})
    for source in sources:
        points = [(row["step"], float(row[f"val/{source}/loss"])) for row in rows if f"val/{source}/loss" in row]
        top.plot(*zip(*points, strict=True), "o--", markersize=4, linewidth=0.9, label=f"held out: {source}")
    for i, (phase, part) in enumerate(groupby(rows, key=lambda row: row["phase"])):
        rows_of_phase = list(part)
        of_phase, smooth = [row["step"] for row in rows_of_phase], [float(rows_of_phase[0]["loss"])]
        for row in rows_of_phase[1:]:  # afresh in each phase: another phase is another text
            smooth.append(0.9 * smooth[-1] + 0.1 * float(row["loss"]))
        top.plot(of_phase, smooth, color="black", linewidth=1.4, label=None if i else "training, smoothed")
        for axis in (top, below):
            axis.axvspan(of_phase[0] - 1, of_phase[-1], color=f"C{i}", alpha=0.08)
        top.text((of_phase[0] + of_phase[-1]) / 2, 1.01, phase, transform=top.get_xaxis_transform(), ha="center", fontsize=9)
    below.plot(steps, [row["lr"] for row in rows], color="C3")
    top.set(ylabel="loss (nats a token)")
    top.set_title(title, loc="left", pad=18)
    below.set(ylabel="learning rate", xlabel="step")
    top.legend(fontsize=8)
    figure.savefig(output, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
