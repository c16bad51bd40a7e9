"""The bundled model `tiny-qwen-moe`, its corpus, and the scripts that made both. Here are only paths."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: The model's folder: `AutoModelForCausalLM.from_pretrained(MODEL)`, `AutoTokenizer.from_pretrained(MODEL)`.
MODEL = _HERE / "tiny-qwen-moe"
#: The figures that `train` measured on the shipped weights.
FIGURES = MODEL / "figures.json"
#: Labelled documents for the demo and the tests: `text`, `domain`, `id`. Never trained on, but for the facts.
CORPUS = _HERE / "corpus" / "demo.jsonl"
#: Every fact about the invented people, to be unlearned:
#: `prompt`, `answer`, `text`, `person`, `relation`, `paraphrases`.
FORGET = _HERE / "corpus" / "facts.jsonl"
#: Documents of the other domains, to be kept while unlearning: `text`, `domain`, `id`; none stands in `CORPUS`.
RETAIN = _HERE / "corpus" / "retain.jsonl"
#: Held-out arithmetic problems: `prompt`, `answer`, `text`, `expression`, `steps`, `level`.
ARITHMETIC = _HERE / "corpus" / "arithmetic.jsonl"

__all__ = ["ARITHMETIC", "CORPUS", "FIGURES", "FORGET", "MODEL", "RETAIN"]
