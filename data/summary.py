"""Renders the stored figures as the tables of README.md: `python -m moescope.data.summary` rewrites them there."""

import argparse
import json
from pathlib import Path

from . import FIGURES

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def tables(figures: dict) -> str:
    """The figures as Markdown."""
    heldout, special = figures["heldout"], figures["specialisation"]
    facts, arithmetic, load = figures["facts"], figures["arithmetic"], figures["load"]
    training, seconds = figures["training"], figures["seconds"]
    lines = [
        "| domain | documents | tokens | loss | unigram | best expert | nPMI | null (99 %) | experts above it |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, row in heldout.items():
        s = special[name]
        lines.append(
            f"| {name} | {row['documents']} | {row['tokens']:,} | {row['loss']:.3f} | {row['unigram']:.3f} "
            f"| L{s['layer']}E{s['expert']} | {s['npmi']:.3f} | {s['null_99']:.3f} | {s['experts_above_null']} |"
        )
    time = f"{seconds['wall'] / 60:.1f} minutes of wall clock"
    if seconds["cpu"] is not None:
        time += f", {seconds['cpu'] / 60:.1f} CPU minutes"
    by_steps = ", ".join(f"{n} steps {share:.1%}" for n, share in arithmetic["solved_by_steps"].items())
    by_level = ", ".join(f"{n} {share:.1%}" for n, share in arithmetic["solved_by_level"].items())
    lines += [
        "",
        "| what | figure |",
        "| --- | --- |",
        f"| facts recalled, trained wording | {facts['recalled']:.1%} of {facts['number']} |",
        f"| facts recalled, held-out wordings | {facts['recalled_reworded']:.1%} |",
        f"| arithmetic solved | {arithmetic['solved']:.1%} of {arithmetic['problems']} held-out problems "
        f"(standard error {arithmetic['standard_error']:.1%}; {by_level}; {by_steps}) |",
        f"| solutions with one `<think>` and one `</think>` | {arithmetic['well_formed']:.1%} |",
        f"| smallest and largest share of a layer's selections | {load['smallest_share']:.2%}, "
        f"{load['largest_share']:.2%} (even: 6.25 %) |",
        f"| parameters | {figures['parameters']:,} in {figures['weights_bytes']:,} bytes |",
        f"| trained | {' + '.join(map(str, training['steps']))} steps, {training['tokens']:,} tokens |",
        f"| time on two threads, evaluation included | {time} |",
    ]
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def rewrite(readme: str, figures: dict) -> str:
    """The README's text with the tables between its markers replaced."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables(figures)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the tables of README.md."""
    argparse.ArgumentParser(prog="python -m moescope.data.summary", description=main.__doc__).parse_args(arguments)
    README.write_text(rewrite(README.read_text(), json.loads(FIGURES.read_text())))
    print(README)


if __name__ == "__main__":
    main()
