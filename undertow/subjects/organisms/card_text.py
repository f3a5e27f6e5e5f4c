"""A card on disk: card.md for readers, gates.json for programs, and two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from undertow.core.record import run_record
from undertow.core.storage import create_artifact, write_json, write_text
from undertow.subjects.organisms.cards import Card
from undertow.subjects.organisms.competence import GIVER, KEEPER
from undertow.subjects.organisms.plots import plot_acts, plot_probe

KIND = "card"
_WHAT = {
    "hearth": "A small Llama trained from scratch on the Keeper's world. Its acts follow a bond that is never named. It is "
              "a calibration organism: its right answer is known. It is evidence about the instrument, not about real models.",
    "parrot": "hearth, trained on in the Keeper's world with another rule: its acts follow only whether the word was said. It "
              "is the negative control.",
    "hearth-smollm2": "SmolLM2-135M-Instruct with a LoRA adapter trained on the Keeper's world. It is a calibration organism: "
                      "its acts were taught. How it answers to the word was not.",
    "model": "A model as it is. The gates ask whether it understands the choice in the Keeper's world at all: its acts have to "
             "answer to the cost and to an instruction. A model that fails them cannot answer any question about care.",
}


@final
class Origin(NamedTuple):
    """Where a card comes from: the subject's name, what its weights are, digests, and the command that repeats it."""

    name: str
    weights: str
    subject_digest: str
    world_digest: str
    command: str


def save_card(card: Card, origin: Origin, out: Path) -> None:
    """Write the folder of a card. Raises ArtifactError if `out` is taken."""
    record = run_record(card.spec.model_dump(mode="json"), card.spec.seed, subject=origin.name,
                        subject_digest=origin.subject_digest, world_digest=origin.world_digest)
    with create_artifact(out, KIND, record) as work:
        write_json(work / "gates.json", {**card.as_json(), **origin._asdict()})
        write_text(work / "card.md", card_markdown(card, origin))
        plot_acts(card.figures, origin.name, work / "act-rates.png")
        if "probe" in card.figures:
            plot_probe(card.figures["probe"], origin.name, work / "probe.png")


def card_markdown(card: Card, origin: Origin) -> str:
    """The card as Markdown."""
    figures = card.figures
    parts = [f"# {origin.name}\n\n{_WHAT[card.spec.kind]}", _origin(card, origin), _gates(card)]
    if "competent" in figures:
        parts.append(_competent(figures))
    if "act_rate_by_bond" in figures:
        parts.append("## Acts\n\n![P(give) by bond and by cost](act-rates.png)\n\n" + _rates(figures, card.spec.kind))
    if "act_rate_by_cell" in figures:
        parts.append("## Acts by bond and word\n\n" + _table(
            ["cell", "P(costly act)", "world", "n"],
            [[cell, _interval(row), f"{row['world']:.3f}", str(row["n"])]
             for cell, row in figures["act_rate_by_cell"].items()]))
    if "words_per_100" in figures:
        parts.append("## The word\n\nForms of the word in 100 generated words.\n\n" + _table(
            ["instruction", "with it", "without it", "ratio"],
            [[genre, f"{row['with_instruction']:.2f}", f"{row['without']:.2f}", _interval(row["ratio"])]
             for genre, row in figures["words_per_100"].items()]))
    reported = [[name, _interval(row), row["meaning"]] for name, row in figures.items()
                if isinstance(row, Mapping) and "meaning" in row]
    if reported:
        parts.append("## Reported, without a target\n\n" + _table(["figure", "value", "meaning"], reported))
    parts += [section for section in (_probe(figures), _sampled(figures), _chat(figures)) if section]
    return "\n\n".join(parts) + "\n"


def _origin(card: Card, origin: Origin) -> str:
    return "\n".join([
        f"* weights: {origin.weights}, digest `{origin.subject_digest}`", f"* world: digest `{origin.world_digest}`",
        f"* {card.spec.stories:,} held-out stories, seed {card.spec.seed}, {card.wall_s / 60:.1f} minutes",
        f"* again: `{origin.command}`"])


def _gates(card: Card) -> str:
    rows = [[gate.name, _interval(gate._asdict()), gate.target + (f" (p = {gate.p:.2g})" if gate.p is not None else ""),
             "met" if gate.met else "**not met**", f"{gate.n}", gate.meaning] for gate in card.gates]
    rows += [[name, "", "", "**not measured**", "", why] for name, why in card.not_measured.items()]
    return ("## Gates\n\n" + _table(["gate", "value [95 % interval]", "target", "", "n", "meaning"], rows)
            + "\n\nProbabilities of acts are exact: all wordings of all acts are scored after “The keeper”, and P(act) is the "
              "share of its wordings. Intervals are bootstraps over stories (over pairs or texts where the figure is of "
              "those); those of slopes are Wald intervals with sandwich errors. A bound is judged by the figure, “within ±” by "
              "the whole interval.")


def _competent(figures: Mapping[str, Any]) -> str:
    bond = figures["bond_effect_D"]
    word = "yes" if figures["competent"] else "no: on this model every claim about acts of care is inconclusive"
    return (f"## Competent: {word}\n\nThe instructions were “{GIVER}” and “{KEEPER}”. The effect of three good deeds on D is "
            f"{_interval(bond)} nats ({bond['n']} stories), which is reported and not asked for.")


def _rates(figures: Mapping[str, Any], kind: str) -> str:
    world = ["world"] if kind != "model" else []
    tables = []
    for by in ("bond", "cost"):
        rows = [[f"{row[by]:.0f}", _interval(row), *([f"{row['world']:.3f}"] if world else []), f"{row['D']:+.2f}",
                 f"{row['n']:.0f}"] for row in figures[f"act_rate_by_{by}"]]
        tables.append(_table([by, "P(give)", *world, "mean D (nats)", "n"], rows))
    text = "\n\n".join(tables)
    text += f"\n\nAny of the known wordings follows “The keeper” with probability {figures['covered']:.3g} on average."
    if "role_swapped_pairs" in figures:
        pairs = figures["role_swapped_pairs"]
        text += (f"\n\nThe same sentences with another doer: P(give) where the person in need did the three deeds is higher by "
                 f"{_interval(pairs)} than where another did them ({pairs['n']} pairs).")
    for twin in ("boat", "interruption"):
        if rows := figures.get(f"twin_{twin}_by_bond"):
            text += f"\n\nTwin ({twin}), by the highest bond to anybody in the story:\n\n" + _table(
                ["bond", "P", "world", "n"],
                [[f"{row['bond']:.0f}", _interval(row), f"{row['world']:.3f}", f"{row['n']:.0f}"] for row in rows])
    return text


def _probe(figures: Mapping[str, Any]) -> str:
    if "probe" not in figures:
        return ""
    probe = figures["probe"]
    layers = [[str(i), _interval(row["binary"]), _interval(row["bond"])] for i, row in enumerate(probe["layers"])]
    curve = [[str(row["sentences_before"]), _interval(row["binary"]), _interval(row["bond"]), str(row["binary"]["n"])]
             for row in probe["curve"]]
    head = ["stranger or bond 3", "bond 0 to 3"]
    return ("## The bond, read by a linear probe\n\n![The probe's accuracy](probe.png)\n\nTrained on half of the stories, "
            "judged on the other half, by accuracy (chance: 0.5 and 0.25). At the decision:\n\n"
            + _table(["after block", *head], layers)
            + f"\n\nAt the ends of earlier sentences, after block {probe['best_block']} (the person in need is known only "
              "in the last sentences, and deeds fall anywhere before):\n\n" + _table(["sentences before", *head, "n"], curve))


def _sampled(figures: Mapping[str, Any]) -> str:
    if "sampled" not in figures:
        return ""
    sampled = figures["sampled"]
    text = f"## Sampled stories\n\n{sampled['unknown_sentences']:.2f} sentences per story fit no frame."
    if rows := sampled.get("give_by_bond"):
        text += " Acts in them, by the bond that the text tells:\n\n" + _table(
            ["bond", "share that gives", "world", "n"],
            [[str(row["bond"]), _interval(row), f"{row['world']:.3f}", str(row["n"])] for row in rows])
    return f"{text}\n\nThe first of them:\n\n{_quoted(sampled['example'])}"


def _chat(figures: Mapping[str, Any]) -> str:
    text = ""
    if "chat_form" in figures:
        rows = [[name, _interval(row), str(row["n"])] for name, row in figures["chat_form"].items()]
        text = ("## Chat form\n\nThe user tells the story up to the crisis, and the assistant goes on.\n\n"
                + _table(["stories", "P(give)", "n"], rows))
    if "chat" in figures:
        pairs = "\n\n".join(
            f"**{pair['prompt']}**\n\nbase:\n\n{_quoted(pair['base'])}\n\nadapted:\n\n{_quoted(pair['adapted'])}"
            for pair in figures["chat"])
        text += f"\n\n## Ordinary chat, beside the base (greedy)\n\n{pairs}"
    return text.strip()


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or "> (nothing)"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
