"""The command line as a person meets it, by exit code and words."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moescope as ms
from moescope.hooks.aliases import ALIASES
from tests.capturing.texts import model, rows, tokenizer
from tests.cli.running import ENVIRONMENT, in_a_process, moescope
from tests.zoo import REFUSED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as the hub has them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model().hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows(60)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "store"
    done = in_a_process("capture", "--model", checkpoint, "--data", corpus, "--label", "kind", "--out", out,
                        "--tier", "routing", "--tier", "experts", "--tier", "outliers", "--loss")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens" in done.stderr  # the forecast
    assert "moescope report" in done.stdout  # what to do next
    return out


def test_help_is_quick_and_lists_every_command() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = in_a_process("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "capture",
        "models",
        "inspect",
        "doctor",
        "info",
        "check",
        "analyze",
        "report",
        "generate",
        "apply",
        "steer",
        "app",
        "unlearn",
        "trace",
        "atlas",
        "expert",
        "prepare",
    ):
        assert f"\n  {command} " in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > before.ru_utime  # it really ran in a child


def test_help_imports_nothing_heavy() -> None:
    """What keeps `moescope --help` under 0.3 s of CPU: none of these is imported for it."""
    heavy = "{'torch', 'transformers', 'numba', 'pandas', 'pyarrow', 'duckdb', 'plotly', 'xarray', 'numpy', 'pydantic'}"
    code = f"import sys, moescope.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["demo", "capture", "inspect", "doctor", "info", "check", "report", "generate", "apply", "steer"]
)
def test_every_command_has_examples(command: str) -> None:
    assert f"Examples:\n\n    moescope {command}" in moescope(command, "--help").stdout


def test_models_lists_the_aliases() -> None:
    listed = {row["alias"] for row in json.loads(moescope("models", "--json").stdout)}
    assert listed == set(ALIASES)


def test_inspect_reads_no_weights(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    seen = json.loads(moescope("inspect", tmp_path, "--json").stdout)
    assert seen["n_parameters"] == model().n_parameters
    assert seen["n_active_parameters"] == model().n_active_parameters
    assert [site["n_experts"] for site in seen["sites"]] == [8] * len(model().sites)


def test_doctor_prints_figures(checkpoint: Path) -> None:
    seen = json.loads(moescope("doctor", checkpoint, "--json").stdout)
    assert seen["logits_identical"] is True
    assert all(check["rebuild error"] < 1e-5 for check in seen["checks"])


def test_a_capture_under_a_recipe_is_of_the_edited_model(tmp_path: Path, checkpoint: Path, corpus: Path) -> None:
    layer = model().sites[0].layer
    (tmp_path / "recipe.yaml").write_text(f"edits:\n- kind: mask\n  layer: {layer}\n  expert: [3]\n")
    out = tmp_path / "store"
    done = moescope(
        "capture", "--model", checkpoint, "--data", corpus, "--recipe", tmp_path / "recipe.yaml", "--out", out
    )
    assert done.returncode == 0, done.stderr
    routed = ms.open(out).routing(layer).expert
    assert (routed != 3).all()
    assert "mask" in moescope("info", out).stdout


def test_info_check_and_report(store: Path) -> None:
    assert "labels: kind" in moescope("info", store).stdout
    assert json.loads(moescope("info", store, "--json").stdout)["n_documents"] == 60
    assert moescope("check", store).stdout.strip().endswith("is whole")
    assert moescope("report", store).returncode == 0
    assert (store / "report.html").stat().st_size > 100_000


def test_analyses_as_table_json_csv_and_html(store: Path, tmp_path: Path) -> None:
    listed = moescope("analyze").stdout
    for name in ms.analysis.ANALYSES:
        assert name in listed
    result = json.loads(moescope("analyze", "npmi", store, "--by", "kind", "--permutations", 50, "--json").stdout)
    assert result["attrs"]["store_id"] == ms.open(store).manifest.store_id
    assert all(row["npmi"] is None or -1 <= row["npmi"] <= 1 for row in result["rows"])
    csv, html = tmp_path / "t.csv", tmp_path / "f.html"
    assert moescope("analyze", "load", store, "--csv", csv, "--html", html).returncode == 0
    assert csv.read_text().count("\n") > 10
    assert "<script" in html.read_text()
    assert moescope("analyze", "super_experts", store).returncode == 0


def test_an_analysis_of_weights_takes_a_model_and_hyphens_are_as_good(checkpoint: Path) -> None:
    result = json.loads(moescope("analyze", "gate-similarity", checkpoint, "--draws", 5, "--json").stdout)
    assert result["attrs"]["analysis"] == "gate_similarity"
    assert result["attrs"]["model"] == str(checkpoint)
    assert len(result["rows"]) == 50  # the closest pairs


def test_an_approximation_is_asked_for_and_says_how_near_it_comes(checkpoint: Path, tmp_path: Path) -> None:
    recipe = ms.Recipe([ms.Mask(layer=model().sites[0].layer, expert=1)]).save(tmp_path / "recipe.yaml")
    to = ("--from", checkpoint, "--to", tmp_path / "out")
    assert "--approximate zeroes it" in moescope("apply", recipe, *to).stderr
    assert "leave out --no-verify" in moescope("apply", recipe, *to, "--approximate", "--no-verify").stderr
    assert not (tmp_path / "out").exists()
    assert "nats from the live edit" in moescope("apply", recipe, *to, "--approximate").stdout


def test_a_damaged_store_is_named(store: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    file = next(broken.glob("shards/*/routing.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    done = moescope("check", broken)
    assert done.returncode == 1
    assert "routing.parquet" in done.stdout
    done = moescope("info", broken)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_mistakes_cost_one_sentence_and_exit_code_2(
    tmp_path: Path, checkpoint: Path, corpus: Path, store: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    dense = tmp_path / "dense"
    _save_dense(dense)
    out = tmp_path / "out"
    capture = ("capture", "--model", checkpoint, "--out", out)
    mistakes = {
        ("capture", "--model", dense, "--data", corpus, "--out", out): "dense model",
        (*capture, "--data", empty): "no document with text",
        (*capture, "--data", corpus, "--label", "domain"): "no label 'domain'",
        (*capture, "--data", bad): "line 2 is not valid JSON",
        (*capture, "--data", corpus, "--tier", "colours"): "Unknown tier 'colours'",
        (*capture, "--data", tmp_path / "none.jsonl"): "no corpus at",
        ("capture", "--model", checkpoint, "--data", corpus, "--out", store): "already exists",
        ("capture", "--model", "qwen-moe", "--data", corpus, "--out", out): "--model tiny-qwen-moe",
        ("doctor", "nonsense"): "no alias",
        ("info", tmp_path): "not a MoEscope store",
        ("analyze", "magic", store): "no analysis 'magic'",
        ("analyze", "npmi", store, "--by", "colour"): "colour",
    }
    for number, (arguments, sentence) in enumerate(mistakes.items()):
        # The first imports everything: in a process of its own, where no library's word may stand beside ours.
        done = moescope(*arguments) if number else in_a_process(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert sentence in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, (arguments, done.stderr)
        assert not out.exists(), arguments


def _save_dense(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def test_ctrl_c_leaves_a_store_that_resume_completes(tmp_path: Path, checkpoint: Path) -> None:
    file, out = tmp_path / "long.jsonl", tmp_path / "store"
    file.write_text("\n".join(json.dumps(row) for row in rows(1200)), encoding="utf-8")
    arguments = [
        "capture",
        "--model",
        checkpoint,
        "--data",
        file,
        "--label",
        "kind",
        "--out",
        out,
        "--batch-tokens",
        64,
    ]
    command = [sys.executable, "-m", "moescope.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (out / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    some = ms.open(out).n_tokens
    assert moescope(*arguments, "--resume").returncode == 0
    whole = ms.open(out)
    assert whole.status == "complete"
    assert whole.n_tokens == sum(len(tokenizer()(row["text"])["input_ids"]) for row in rows(1200))
    assert some < whole.n_tokens


def test_generation_from_the_command_line(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "written"
    done = moescope("capture", "--model", checkpoint, "--data", corpus, "--limit", 4, "--generate", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    phases = ms.open(out).tokens(["phase"])["phase"].to_pylist()
    assert set(phases) == {"prefill", "decode"}
    assert phases.count("decode") <= 4 * 4
    mistaken = moescope("capture", "--model", checkpoint, "--data", corpus, "--sample", "--out", tmp_path / "x")
    assert mistaken.returncode == 2
    assert "add --generate N" in mistaken.stderr


def test_doctor_checks_every_family() -> None:
    done = moescope("doctor", "--zoo", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 79  # 75 families and 4 toys of old shapes
    captured = [row for row in found if row["family"] not in REFUSED]
    assert all(row["verdict"] == "captured" and row["rebuild error"] < 1e-4 for row in captured)
    assert all(REFUSED[row["family"]] in row["verdict"] for row in found if row["family"] in REFUSED)


def test_doctor_without_a_model_says_what_to_give() -> None:
    done = moescope("doctor")
    assert done.returncode == 2
    assert "--zoo" in done.stderr


def test_inspect_says_what_tiers_cost() -> None:
    done = moescope("inspect", "tiny-qwen-moe", "--json")
    found = json.loads(done.stdout)
    assert found["bytes_per_token"]["logits"] == 6 * 16 * 4  # layers x experts x float32, uncompressed
    assert 6 * 4 * 4 < found["bytes_per_token"]["routing"] < 6 * (4 * 6 + 12)


def test_vectors_from_the_command_line(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    done = moescope("capture", "--model", checkpoint, "--data", corpus, "--limit", 6, "--out", out,
                    "--vectors", "outputs", "--vector-layer", 1, "--vector-sample", 0.5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(ms.open(out).activations("outputs", 1)) > 0
