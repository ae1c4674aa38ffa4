"""evidence.json as tables and figures.

python tutorial/tables.py        tutorial/evidence/evidence.json -> its tables.md, and figures/evidence_*.png
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.infra import run  # noqa: E402
from spin.eval import plots as viz  # noqa: E402
from tutorial import charts  # noqa: E402

INTRODUCTION = """# The evidence, in tables

What is found is told in [README.md](README.md). `python tutorial/experiments.py` makes the runs,
`python tutorial/findings.py` evidence.json, this file and the figures.

Brackets: 95 % intervals over bases, seeds and prompts (`pooled` in [intervals.py](../intervals.py)); where it says
"these bases", over seeds and prompts alone. Where nothing else is said, a model draws one picture for each of 200 test
prompts at guidance 3 and 20 steps, from the same noise as the one that it is compared with. Reward and clean go from 0
to 10; aligned is the share of pictures that show all that the prompt says; the palette's error is an rms distance of
colours, and less is better. Hyper-parameters are the miniature world's defaults ([tuning.md](tuning.md)) unless a line
says otherwise."""

OTHERS = {"aligned": "aligned", "clean": "clean", "palette's error": "palette"}  # than reward
METRICS = {"reward": "reward"} | OTHERS
REGIMES = {"one picture at guidance 3": "single", "the mean of five": "five", "the best of five": "best_of_five"}
REGIMES |= {"one, each at its best guidance": "best_guidance"}
TUNED, FAILING = "beta 10000, lr 2e-5", "beta 200, lr 1e-4"
GUIDANCES = (1, 2, 3, 5)
ENDS = ("mean", "low", "high")


# ---- Cells and rows --------------------------------------------------------------------------------------------------
def gap(of: dict | None, digits: int = 3) -> str:
    return "{mean:+.{d}f} [{low:+.{d}f}, {high:+.{d}f}]".format(**of, d=digits) if of else ""


def value(of: dict, digits: int = 3) -> str:
    return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**of, d=digits)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def gains(rows: dict[str, dict], columns: dict[str, str], digits: int = 3) -> str:
    """columns: {title: key, or keys joined by a slash}."""

    def cell(of: dict | None, path: str) -> str:
        for key in path.split("/"):
            of = (of or {}).get(key)
        return gap(of, 4 if path.endswith("palette") else digits)

    return table(
        ["", *columns], [[title, *(cell(of, path) for path in columns.values())] for title, of in rows.items()]
    )


def differences(lines: list[dict], regimes: dict[str, str], metric: str = "reward") -> str:
    say = lambda of: ": ".join([gap(of), *([of["verdict"]] if "verdict" in of else [])]) if of else ""  # noqa: E731
    rows = [[line["claim"], *(say(line.get(key)) for key in regimes.values())] for line in lines]
    return table([f"difference of {metric}", *regimes], rows)


def base_by_base(lines: list[dict], regime: str, title: str) -> str:
    lines = [line for line in lines if regime in line]
    here = lambda of: "{:+.3f} [{:+.3f}, {:+.3f}]".format(of["mean"], *of["here"])  # noqa: E731
    rows = [[line["claim"], here(line[regime]), *map("{:+.3f}".format, line[regime]["by_base"])] for line in lines]
    bases = (f"base {base}" for base in range(len(lines[0][regime]["by_base"])))
    return table([f"difference of {title}", "these bases", *bases], rows)


def sweep(rows: dict[str, dict]) -> list[str]:
    scales = [g for g in next(iter(rows.values())) if g != "best"]
    means = [[title, *(f"{of[g]['mean']:.3f}" for g in scales)] for title, of in rows.items()]
    best = [[title, ", ".join(f"{g:g}" for g in of["best"])] for title, of in rows.items()]
    told = [table(["reward on validation prompts, at guidance", *scales], means)]
    return told + [table(["", "best guidance by validation prompts, a base and seed each"], best)]


def theta_0(of: dict) -> str:
    return "theta_0 itself: " + ", ".join(f"{title} {value(of[key])}" for title, key in METRICS.items()) + "."


def games(rows: dict[str, dict]) -> list[str]:
    lines = []
    for title, of in rows.items():
        if "first_delta_gen" in of:
            line = [title, *(value(of[f"{when}_implicit_accuracy"], 2) for when in ("first", "last"))]
            lines.append([*line, *(f"{of[f'last_{key}']['mean']:+.4f}" for key in ("delta_data", "delta_gen"))])
    columns = ["", "accuracy, steps 2 to 20", "accuracy, last 20", "delta_data, last 20", "delta_gen, last 20"]
    return ["How easily real and drawn were told apart, by the log:", table(columns, lines)]


def trials(kinds: dict[str, dict]) -> list[str]:
    """Of each kind the flags tried and their reward on the validation prompts of one base; the best was taken."""
    found = []
    for kind, tried in kinds.items():
        best = max(tried, key=tried.get)
        rows = [[f"**{flags}**" if flags == best else flags, f"{reward:.3f}"] for flags, reward in tried.items()]
        found.append(table([f"trials of {kind}, one base and seed", "reward on validation prompts"], rows))
    return found


# ---- The parts -------------------------------------------------------------------------------------------------------
def bases(found: dict) -> str:
    rows = []
    for base, of in found.items():
        if base != "ceiling":
            stages = [of.get(stage) for stage in ("web", "theta_0")]
            scores = ["{reward:.3f}, {clean:.3f}, {aligned:.2f}".format(**stage) if stage else "" for stage in stages]
            made = [stage for stage in stages if stage]
            minutes = f"{sum(stage['seconds'] for stage in made) / 60:.0f}"
            rows.append([base, *scores, minutes, ", ".join(dict.fromkeys(commit(stage["commit"]) for stage in made))])
    columns = ["base", "web: reward, clean, aligned", "theta_0: the same", "minutes of one core", "commits"]
    return table(columns, rows)


def commit(name: str) -> str:
    return name[:9] + "-dirty" * name.endswith("-dirty")


def claims(part: dict) -> list[str]:
    of_clean = {"one picture at guidance 3": "clean", "the mean of five": "clean_five"}
    of_clean |= {"one, each at its best guidance of reward": "clean_best_guidance"}
    across = ", ".join(f"at {at.removeprefix('at_')} {gap(of)}" for at, of in part["theta_0"]["guidance"].items())
    said = [theta_0(part["theta_0"]), f"What theta_0 gains by another guidance than 3, of reward: {across}."]
    said += ["Gains over theta_0, of reward and, one picture at guidance 3, of the others:"]
    said += [gains(part["gains"], REGIMES | OTHERS), differences(part["claims"], REGIMES)]
    said += [base_by_base(part["claims"], "single", "reward, one picture at guidance 3")]
    said += [base_by_base(part["claims"], "five", "reward, the mean of five")]
    said += [base_by_base(part["claims"], "best_guidance", "reward, each at its best guidance")]
    said += [differences(part["claims"], of_clean, "clean")]
    said += [base_by_base(part["claims"], "clean", "clean, one picture at guidance 3")]
    told = "Error of the noise predicted on curated pictures of the test scenes, which no model was shown:"
    said += [told, gains(part["gains"], {"change from theta_0, %": "held_out_percent"}, 1)]
    return said + sweep(part["sweep"])


def web(part: dict) -> list[str]:
    columns = {"reward": "reward", "reward, each at its best guidance": "best_guidance"} | OTHERS
    said = [theta_0(part["theta_0"]), "Gains over theta_0:", gains(part["gains"], columns)]
    told = "Error of the noise predicted on curated pictures of the test scenes, which no model was shown:"
    said += [told, gains(part["gains"], {"change from theta_0, %": "held_out_percent"}, 1)]
    said += [differences(part["claims"], REGIMES), base_by_base(part["claims"], "single", "reward at guidance 3")]
    of_clean = {"one picture at guidance 3": "clean", "one, each at its best guidance of reward": "clean_best_guidance"}
    said += [differences(part["claims"], of_clean, "clean")]
    said += [differences(part["claims"], {"at guidance 3": "aligned"}, "aligned")]
    return said + games(part["gains"]) + sweep(part["sweep"]) + trials(part["trials"])


def learned(part: dict) -> list[str]:
    rows = part["gains"]
    said = ["What SPIN-1 gains over theta_0. Lines: how its opponent, theta_0, drew; columns: the guidance of judging."]
    for metric, title in (("reward", "reward"), ("clean", "clean"), ("palette", "palette's error")):
        said.append(gains(rows, {f"{title} at guidance {g}": f"at_{g}/{metric}" for g in GUIDANCES}))
    said.append(gains(rows, {"aligned at 1": "at_1/aligned", "at 3": "at_3/aligned"}))
    columns = {f"{m} at 3, less that of opponents who drew at 3": f"{m}_less_reference" for m in ("reward", "clean")}
    said.append(gains(rows, columns))
    at_50 = part["judged_at_50"]
    steps = {f"opponents drew in {n} steps": at_50[n] for n in ("20", "50")} | {"difference": at_50["difference"]}
    said += ["Both models judged in 50 sampling steps:", gains(steps, {"reward": "reward", "clean": "clean"})]
    told = "Error of the noise predicted on curated pictures of the test scenes, which no model was shown:"
    said += [told, gains(rows, {"change from theta_0, %": "held_out_percent"}, 2)]
    return said + games(rows) + trials(part["trials"])


def ending(part: dict) -> list[str]:
    told = (
        "*So*: the last step of sampling goes to alpha_bar = 1, and leaves no trace of noise. *Traceless*: the SPIN-1 "
    )
    told += "whose opponents drew so. Differences, and changes of the gain over theta_0 by judging both models so:"
    rows = {
        "theta_0 judged so, less itself as usual": part["alone"],
        "change of SPIN-1's gain": part["change"],
        "change of the traceless one's gain": part["change_traceless"],
        "the first change less the second": part["made_up"],
        "traceless less usual SPIN-1, judged as usual": part["less_usual"],
        "traceless less usual SPIN-1, judged so": part["less_usual_to_1"],
    }
    columns = [{f"{title} at guidance {g}": f"at_{g}/{title}" for g in GUIDANCES} for title in ("reward", "clean")]
    said = [told, *(gains(rows, each) for each in columns)]
    return [
        *said,
        "Gains over theta_0, both judged so where nothing else is said:",
        *(gains(part["gains"], each) for each in columns),
    ]


def compared(part: dict) -> str:
    columns = {"reward, less theta_0's": "reward", "less the first line's": "reward_less_reference"}
    columns |= {"clean, less theta_0's": "clean", "less the first line's clean": "clean_less_reference"}
    return gains(part["rows"], columns | {"aligned": "aligned", "palette's error": "palette"})


def choices(part: dict) -> list[str]:
    rows = []
    for at, of in part["gradient"].items():
        ratios = [f"{v / s:.0f}" if s > 0 else "?" for v, s in zip(of["variance"], of["signal"])]
        rows.append(
            [at, *(", ".join(f"{x:.3g}" for x in of[key]) for key in ("variance", "signal")), ", ".join(ratios)]
        )
    columns = ["at, noise", "variance, all dimensions", "squared length of the mean", "ratio"]
    return ["SPIN-1:", compared(part), "Gradient of a batch of 16 pairs, a value for each base:", table(columns, rows)]


def lengths(part: dict) -> list[str]:
    steps = [[title, str(of["steps"])] for title, of in part["rows"].items()]
    said = ["The last model of each:", compared(part)]
    return said + [table(["", "steps, and what the opponents' pictures cost, 150 steps a time"], steps)]


def beta_and_lr(part: dict) -> list[str]:
    lrs, betas, cells = grid_of(part)
    share = lambda of: f"{of['delta_data']:+.1e} / {of['delta_gen']:+.1e}"  # noqa: E731
    said = []
    for title, cell in (
        ("SPIN-1's reward, less theta_0's", lambda of: gap(of["reward"])),
        ("SPIN-1's clean, less theta_0's", lambda of: gap(of["clean"])),
        ("delta_data / delta_gen, steps 51 to 100", share),
        ("loss, the last ten steps", lambda of: f"{of['loss']:.3f}"),
    ):
        rows = [[f"beta {beta:g}", *(cell(cells[lr, beta]) for lr in lrs)] for beta in betas]
        said.append(table([title, *(f"lr {lr:g}" for lr in lrs)], rows))
    return said


def failure(part: dict) -> list[str]:
    rows, names = [], {"failure": FAILING, "claims": TUNED}
    for name, title in names.items():
        of = part[name]
        for steps, i in (("6 to 10", 1), ("16 to 20", 3), ("46 to 50", 9), ("96 to 100", 19)):
            numbers = [f"{of['curves'][key]['mean'][i]:.3g}" for key in ("loss", "implicit_accuracy")]
            numbers += [f"{of['curves'][key]['mean'][i]:+.2g}" for key in ("delta_data", "delta_gen")]
            rows.append([title, steps, *numbers])
    said = ["SPIN-1's log, means over all runs:"]
    said.append(table(["", "steps", "loss", "accuracy", "delta_data", "delta_gen"], rows))
    columns = {"reward, less theta_0's": "reward"} | OTHERS
    said.append(gains({title: part[name] for name, title in names.items()}, columns))
    held_out = {title: part[name] for name, title in names.items()}
    said.append(gains(held_out, {"change of the noise's error on curated test pictures, %": "held_out_percent"}, 1))
    said.append("The first step at which delta_data exceeds half of a positive delta_gen, a run each:")
    first = lambda alarms: ", ".join("never" if step is None else str(step) for step in alarms)  # noqa: E731
    rows = []
    for window in part["failure"]["alarms"]:
        rows.append([f"the mean of {window} steps", *(first(part[name]["alarms"][window]) for name in names)])
    said.append(table(["by", *names.values()], rows))
    said.append("Where the opponent is never renewed, 300 steps at the tuned setting, means over all runs:")
    numbers = zip(*(of["mean"] for of in part["continued"].values()))
    rows = [[f"{50 * i + 1} to {50 * i + 50}", *(f"{x:+.4f}" for x in of)] for i, of in enumerate(numbers)]
    said.append(table(["steps", *part["continued"]], rows))
    said.append("The same by 50 steps, which is the rule of train.py, in games that are no failure by their scores:")
    return said + [table(["", "step"], [[title, first(alarms)] for title, alarms in part["rule"].items()])]


PARTS: dict[str, tuple[str, Callable]] = {
    "claims": ("The four claims", claims),
    "web": ("From a base that is not at its plateau", web),
    "learned": ("What is learned", learned),
    "ending": ("What is the sampler's last trace of noise", ending),
    "choices": ("Choices that the paper leaves open", choices),
    "map": ("beta and learning rate", beta_and_lr),
    "lengths": ("Iterations and their length", lengths),
    "failure": ("The failure on purpose", failure),
}


def markdown(found: dict) -> str:
    made = "`python tutorial/pretrain.py --seed N --vae spin/toy/base`, 100 validation prompts at guidance 3. Ideal "
    made += f"pictures that have been through that autoencoder earn a reward of {found['bases']['ceiling']:.3f}."
    parts = sum(found[part]["about"]["seconds"] for part in PARTS if part in found)
    stages = [stage for of in found["bases"].values() if isinstance(of, dict) for stage in of.values()]
    hours = (parts + sum(stage["seconds"] for stage in stages)) / 3600
    total = f"Hardware: {found['hardware']}. In all {hours:.1f} hours of one core, the bases included."
    said = [INTRODUCTION, total, "## The bases", made, bases(found["bases"])]
    for part, (title, tables) in PARTS.items():
        if part in found:
            about = found[part]["about"]
            numbers = [", ".join(map(str, about[key])) for key in ("bases", "seeds", "commits")]
            made = "Bases {}; seeds {}; commits {}; ".format(*numbers)
            made += f"{about['jobs']} jobs, {about['seconds']} seconds of one core in all."
            said += [f"## {title}", *tables(found[part]), made]
    return "\n\n".join(said) + "\n"


# ---- Figures ---------------------------------------------------------------------------------------------------------
EACH = "(0 to 10), each at its best guidance"


def claims_figure(part: dict) -> Image.Image:
    titles = {"five": "reward (0 to 10) at 3, mean of five", "best_of_five": "reward (0 to 10) at 3, best of five"}
    titles |= {"best_guidance": f"reward {EACH}", "clean": "clean (0 to 10) at 3, one picture"}
    return gain_panels({of["short"]: of for of in part["gains"].values()}, titles)


def steps_figure(part: dict) -> Image.Image:
    """Gains by the number of steps: SFT, self-play against theta_0 alone, and against renewed opponents. Each point is
    a run of its own, whose learning rate ends at 0 there, but for those of the last line, which are one run's."""
    lines = {
        "SFT": {300: "SFT, 300 steps", 900: "SFT, 900 steps"},
        "self-play, theta_0 stays the opponent": {100: "SPIN-1", 300: "SPIN, 300 steps at theta_0"},
        "self-play, a new opponent every 100 steps": {100: "SPIN-1", 200: "SPIN-2", 300: "SPIN-3"},
    }
    panels = []
    for metric in ("reward", "clean"):
        points = {}
        for name, rows in lines.items():
            gained = {steps: part["gains"][row][metric] for steps, row in rows.items()}
            points[name] = [(0, 0.0, 0.0, 0.0), *((n, *(of[end] for end in ENDS)) for n, of in gained.items())]
        title = f"{metric} (0 to 10) at guidance 3, one picture, less theta_0's"
        panels.append(charts.lines(title, "optimiser steps (not to scale)", points, even=True))
    return viz.two_a_row(panels)


def web_figure(part: dict) -> Image.Image:
    titles = {"single": "reward (0 to 10) at 3", "best_guidance": f"reward {EACH}"}
    return gain_panels(
        part["gains"], titles | {"clean": "clean (0 to 10) at 3", "clean_best_guidance": f"clean {EACH}"}
    )


def gain_panels(rows: dict[str, dict], titles: dict[str, str]) -> Image.Image:
    """titles: {regime: what it is}; those who were not judged in it are left out of its panel."""
    panels = []
    for key, title in titles.items():
        points = {name: of[key] for name, of in rows.items() if key in of}
        panels.append(viz.interval_chart(f"{title}, less theta_0's", points, 560, 240))
    return viz.two_a_row(panels)


def learned_figure(part: dict) -> Image.Image:
    panels = []
    for metric in ("reward", "clean"):
        lines = {}
        for g in GUIDANCES:
            of = part["gains"][f"at guidance {g}"]
            lines[f"opponents drew at {g}"] = [(x, *(of[f"at_{x}"][metric][end] for end in ENDS)) for x in GUIDANCES]
        title = f"SPIN-1's {metric} (0 to 10), less theta_0's, and 95 % intervals"
        panels.append(charts.lines(title, "guidance of the judging", lines, even=True))
    return viz.two_a_row(panels)


def ending_figure(part: dict) -> Image.Image:
    rows = {"theta_0, to 1": part["alone"], "SPIN-1": part["gains"]["SPIN-1, both judged as usual"]}
    rows |= {"both to 1": part["gains"]["SPIN-1"]}
    titles = {metric: f"{metric} (0 to 10) at 3" for metric in ("reward", "clean")}
    return gain_panels({name: of["at_3"] for name, of in rows.items()}, titles)


def grid_of(part: dict) -> tuple[list, list, dict]:
    lrs, betas = (sorted({cell[key] for cell in part["cells"]}) for key in ("lr", "beta"))
    return lrs, betas, {(cell["lr"], cell["beta"]): cell for cell in part["cells"]}


def map_figure(part: dict) -> Image.Image:
    lrs, betas, cells = grid_of(part)
    names = [f"{lr:.0e}" for lr in lrs], [f"{beta:g}" for beta in betas]
    maps = []
    for metric in ("reward", "clean"):
        gains = [[cells[lr, beta][metric] for lr in lrs] for beta in betas]
        values = [[(of["mean"], of["low"] * of["high"] > 0) for of in row] for row in gains]
        title = f"SPIN-1's {metric}, less theta_0's; grey: not resolved"
        maps.append(charts.heat_map(title, "learning rate", "beta", *names, values))
    sheet = Image.new("RGB", (maps[0].width, 2 * maps[0].height), viz.PAPER)
    for i, picture in enumerate(maps):
        sheet.paste(picture, (0, i * maps[0].height))
    return sheet


def failure_figure(part: dict) -> Image.Image:
    panels = []
    for name, title in (("claims", TUNED), ("failure", FAILING)):
        curves = part[name]["curves"]
        for keys, said in (
            (("delta_data", "delta_gen"), "policy's error less opponent's"),
            (("loss", "implicit_accuracy"), "loss, and share of pairs won"),
        ):
            of = {key: zip(*(curves[key][end] for end in ENDS)) for key in keys}
            lines = {key: [(5 * i + 3, *point) for i, point in enumerate(points)] for key, points in of.items()}
            label = "step, five averaged; bars: the range of nine runs"
            panels.append(charts.lines(f"{title}: {said}", label, lines, ticks=(1, 25, 50, 75, 100)))
    return viz.two_a_row(panels)


FIGURES: dict[str, tuple[str, Callable[[dict], Image.Image]]] = {  # name: part, and what draws it
    "claims": ("claims", claims_figure),
    "steps": ("claims", steps_figure),
    "web": ("web", web_figure),
    "learned": ("learned", learned_figure),
    "ending": ("ending", ending_figure),
    "map": ("map", map_figure),
    "failure": ("failure", failure_figure),
}


def figure(name: str, found: dict) -> Image.Image:
    part, draw = FIGURES[name]
    return draw(found[part])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "tutorial/evidence"), help="default: tutorial/evidence")
    out = Path(parser.parse_args(argv).out)
    found = run.read_json(out / "evidence.json")
    with run.whole(out / "tables.md") as file:
        file.write_text(markdown(found))
    for name, (part, _) in FIGURES.items():
        if part in found:
            viz.save_png(figure(name, found).quantize(256), out.parent / "figures" / f"evidence_{name}.png")


if __name__ == "__main__":
    sys.exit(run.script("tables.py", main))
