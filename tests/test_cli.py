"""The commands as a user types them: output, exit codes, and errors that name field, value, rule and remedy."""

import json
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from vramplan.cli import COMMANDS, main
from vramplan.device import GpuProcess, LiveGpu
from vramplan.runconfig import RunConfig

RTX3060_GPT = [
    "--n-layer", "4", "--n-head", "4", "--n-embd", "256", "--vocab-size", "4096", "--block-size", "256", "--bias",
]  # fmt: skip


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="vramplan")
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.output
    return result


def run_json(*args):
    return json.loads(run(*args, "--json").stdout)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    run("plan", "--gpu", "4070", "--params", "125M", "-o", path)
    return path


def test_every_command_has_help():
    assert set(COMMANDS) <= set(run("--help").stdout.split())
    for command in COMMANDS:
        assert "Usage" in run(command, "--help").stdout


def test_plan_shows_arithmetic_breakdown_and_what_lost():
    text = run("plan", "--gpu", "4070", "--params", "125M").stdout
    for words in (
        "12L/12H/768E", "= 524,288 tokens per step", "0.75 GiB assumed for the desktop", "AdamW state",
        "logits and loss", "context and workspaces", "free", "needs at least", "OOM risk", "stated margin", "tokens/s",
        "MFU", "Runners-up", "Other shapes",
    ):  # fmt: skip
        assert words in text
    assert " GB" not in text


def test_plan_json_has_the_published_keys():
    answer = run_json("plan", "--gpu", "rtx4070", "--params", "125M", "--top", "3")
    assert len(answer["plans"]) == 3
    first = answer["plans"][0]
    assert (first["config"]["n_layer"], first["config"]["n_head"], first["config"]["n_embd"]) == (12, 12, 768)
    assert first["config"]["batch_size"] * first["config"]["grad_accum"] * first["config"]["block_size"] == 524288
    assert first["estimate"]["process_bytes"] <= answer["budget_bytes"]
    assert answer["considered"] > 10_000


def test_plan_never_imports_torch():
    code = (
        "import sys; from vramplan.cli import main\n"
        "try: main(['plan', '--gpu', '4070', '--params', '125M', '--json'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_headless_vram_and_reserve_change_the_budget():
    named = run_json("plan", "--gpu", "4070", "--params", "125M")
    headless = run_json("plan", "--gpu", "4070", "--params", "125M", "--headless")
    free = run_json("plan", "--gpu", "4070", "--params", "125M", "--vram", "8.3GiB")
    kept = run_json("plan", "--gpu", "4070", "--params", "125M", "--vram", "9.3GiB", "--reserve", "1GiB")
    assert headless["budget_bytes"] - named["budget_bytes"] == 3 * 2**28
    assert free["budget_bytes"] == kept["budget_bytes"] == int(8.3 * 2**30)


def test_pinned_settings_are_kept():
    answer = run_json(
        "plan", "--gpu", "4070", "--params", "125M", "--batch-size", "4", "--no-compile", "--dtype", "float16",
        "--loss", "chunked", "--checkpointing", "block", "--optimizer", "adamw8bit",
    )  # fmt: skip
    config = answer["plans"][0]["config"]
    kept = ("batch_size", "compile", "dtype", "loss", "checkpointing", "optimizer")
    assert [config[k] for k in kept] == [4, False, "float16", "chunked", "block", "adamw8bit"]


def test_turing_gets_float16():
    assert run_json("plan", "--gpu", "2080 Ti", "--params", "125M")["plans"][0]["config"]["dtype"] == "float16"


def test_cpu_plan_is_float32_eager_and_has_no_speed():
    answer = run_json("plan", "--gpu", "cpu", "--vram", "4GiB", "--params", "7M", "--tokens-per-step", "16384")
    first = answer["plans"][0]
    assert (first["config"]["compile"], first["config"]["device"]) == (False, "cpu")
    assert first["tokens_per_second"] is None
    assert first["config"]["checkpointing"] == "none"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--gpu", "4070"], 2, ["--params", "is required"]),
        (["--gpu", "4080x", "--params", "125M"], 2, ["4080x", "RTX 4080", "vramplan gpus"]),
        (["--gpu", "4070", "--n-embd", "512", "--n-head", "12"], 2,
         ["n_embd=512", "n_head=12", "n_head=8", "n_embd=768", "tokens/s", "GiB"]),
        (["--gpu", "4070", "--params", "125M", "--tokens-per-step", "524300"], 2, ["524288", "525312"]),
        (["--gpu", "4070", "--params", "125M", "--vram", "12"], 2, ["has no unit", "12GiB", "12GB"]),
        (["--gpu", "4070", "--params", "125M", "--vram", "0GiB"], 2, ["--vram", "positive"]),
        (["--gpu", "4070", "--params", "125M", "--max-risk", "2"], 2, ["--max-risk", "between 0 and 0.5"]),
        (["--gpu", "4070", "--params", "lots"], 2, ["--params", "lots", "125M"]),
        (["--gpu", "4070", "--n-layer", "0", "--n-head", "0", "--n-embd", "-4"], 2,
         ["n_layer=0", "n_head=0", "n_embd=-4", "at least 1"]),
        (["--gpu", "4070", "--params", "125M", "--batch-size", "12"], 2, ["batch_size=12", "8", "16"]),
        (["--gpu", "4070", "--params", "125M", "--train"], 2, ["--data", "required"]),
        (["--gpu", "cpu", "--vram", "8GiB", "--params", "7M", "--compile", "on"], 2, ["--compile", "CPU"]),
        (["--gpu", "4070", "--params", "7B"], 3, ["needs at least", "GiB free", "largest published shape"]),
    ],
)  # fmt: skip
def test_bad_requests_are_one_clear_error(args, code, words):
    result = run("plan", *args, code=code)
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output


def test_estimate_of_the_measured_rtx_3060_row():
    answer = run_json("estimate", *RTX3060_GPT, "--batch-size", "32", "--dtype", "float32", "--workload", "autocast")
    assert answer["peak_allocated_bytes"] / 2**20 == pytest.approx(1106.3, rel=1e-3)
    assert answer["peak_phase"] == "loss backward"
    assert answer["parameters"] == 4_273_664
    assert sum(answer["breakdown"].values()) == answer["process_bytes"]


def test_estimate_with_a_card_adds_fit_risk_and_speed():
    shape = ["--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--batch-size", "16", "--workload", "nanogpt"]
    eager = run_json("estimate", *shape, "--gpu", "4070")
    compiled = run_json("estimate", *shape, "--gpu", "4070", "--compile")
    assert not eager["fits"]
    assert eager["oom_risk"] > 0.99
    assert compiled["peak_allocated_bytes"] < eager["peak_allocated_bytes"]
    assert {"budget_bytes", "tokens_per_second", "mfu"} <= set(compiled)
    assert "verdict" in run("estimate", *shape, "--gpu", "4070").stdout


def test_estimate_lists_every_problem_at_once():
    text = run("estimate", "--n-layer", "12", "--loss", "chunked", "--workload", "nanogpt", code=2).stderr
    for words in ("--n-head", "--n-embd", "--batch-size", 'loss="chunked" does not exist'):
        assert words in text


def test_estimate_flags_override_the_file(plan_file, tmp_path):
    config = tmp_path / "run.toml"
    run("apply", plan_file, "-o", config)
    from_file = run_json("estimate", config)
    smaller = run_json("estimate", config, "--batch-size", "1")
    assert smaller["process_bytes"] < from_file["process_bytes"]
    assert from_file["process_bytes"] == json.loads(plan_file.read_text())["plans"][0]["estimate"]["process_bytes"]


def test_apply_writes_a_run_configuration(plan_file, tmp_path):
    config = tmp_path / "run.toml"
    assert "Next: vramplan train" in run("apply", plan_file, "--rank", "2", "-o", config).stdout
    loaded = RunConfig.load(config)
    second = json.loads(plan_file.read_text())["plans"][1]
    assert loaded.step.batch_size == second["config"]["batch_size"]
    assert loaded.plan.process_bytes == second["estimate"]["process_bytes"]
    assert loaded.tokens_per_step == 524288
    assert tomllib.loads(run("apply", plan_file).stdout)["model"]["n_embd"] == 768
    assert "beyond" in run("apply", plan_file, "--rank", "40", code=2).stderr


def test_apply_for_nanogpt_is_replanned_with_its_memory(plan_file, tmp_path):
    text = run("apply", plan_file, "--format", "nanogpt").stdout
    names: dict[str, object] = {}
    exec(text, {}, names)  # what nanoGPT's configurator does with this file
    assert names["batch_size"] * names["gradient_accumulation_steps"] * names["block_size"] == 524288
    assert (names["n_layer"], names["n_head"], names["n_embd"]) == (12, 12, 768)
    shape = ["--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--workload", "nanogpt"]
    compiled = "--compile" if names["compile"] else "--no-compile"
    batch = ["--batch-size", names["batch_size"], "--grad-accum", names["gradient_accumulation_steps"]]
    assert run_json("estimate", *shape, *batch, compiled, "--dtype", names["dtype"], "--gpu", "4070")["fits"]


def test_gpus_lists_and_shows():
    assert len(run_json("gpus")) >= 45
    card = run_json("gpus", "RTX", "4070", "Ti", "SUPER")[0]
    assert card["name"] == "RTX 4070 Ti SUPER"
    assert "58.3 TFLOPS" in run("gpus", "4070").stdout
    assert "RTX 4090" in run("gpus").stdout


def test_report_of_a_plan_and_of_a_configuration(plan_file, tmp_path):
    text = run("report", plan_file).stdout
    for words in ("OOM-risk report", "headroom", "Levers", "largest batch", "activation checkpointing", "By phase"):
        assert words in text
    answer = run_json("report", plan_file, "--rank", "2")
    assert {"levers", "top_tensors", "oom_risk", "headroom_bytes"} <= set(answer)
    config = tmp_path / "run.toml"
    run("apply", plan_file, "-o", config)
    tighter = run_json("report", config, "--gpu", "4070", "--vram", "6GiB")
    assert tighter["oom_risk"] > 0.99
    missing = run("report", tmp_path / "nowhere.toml", code=2).stderr
    assert "does not exist" in missing


def test_unknown_files_are_clear_errors(tmp_path):
    assert "does not exist" in run("apply", tmp_path / "no.json", code=2).stderr
    assert "does not exist" in run("train", tmp_path / "no.toml", "--data", "x", "--out", tmp_path / "r", code=2).stderr
    assert "--out" in run("train", tmp_path / "no.toml", code=2).stderr


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "--gpu", "4070", "--params", "1T"],
        ["plan", "--gpu", "4070", "--params", "125M", "--tokens-per-step", "1T"],
        ["plan", "--gpu", "4070", "--n-layer", "1000000", "--n-head", "12", "--n-embd", "768"],
        ["plan", "--gpu", "4070", "--params", "125M", "--max-risk", "1e-300"],
        ["plan", "--gpu", "4070", "--params", "10K"],
        ["plan", "--gpu", "4070", "--params", "125M", "--n-embd", "0"],
        ["plan", "--gpu", "4070", "--params", "125M", "--out", "runs/x"],
        ["estimate", "--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--batch-size", str(10**20)],
        ["estimate", "--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--batch-size", "1", "--reserve", "1GiB"],
        [
            "estimate",
            "--n-layer",
            "2",
            "--n-head",
            "2",
            "--n-embd",
            "64",
            "--batch-size",
            "1",
            "--gpu",
            "cpu",
            "--compile",
        ],
    ],
    ids=lambda args: " ".join(args)[:60],
)
def test_absurd_requests_are_refused_at_once(args):
    assert run(*args, code=2).stderr.startswith("Error: ")


def test_report_uses_the_plans_own_risk_limit_and_device(plan_file, tmp_path):
    assert json.loads(run("report", plan_file, "--json").stdout)["max_risk"] == 0.01
    kept = run_json("report", plan_file, "--reserve", "3GiB")
    assert kept["budget_bytes"] < run_json("report", plan_file)["budget_bytes"]
    assert "cuda" in run("report", plan_file, "--gpu", "cpu", code=2).stderr
    renamed = tmp_path / "best.plan"
    renamed.write_text(plan_file.read_text())
    assert "OOM-risk report" in run("report", renamed).stdout


def test_a_size_far_from_the_one_asked_for_is_a_warning():
    text = run(
        "plan", "--gpu", "4070", "--params", "125M", "--n-layer", "12", "--n-head", "12", "--n-embd", "384"
    ).stdout
    assert "41.0M parameters, far from the 125.0M asked for" in text


def test_auto_plans_for_what_is_free_now_and_names_who_holds_the_rest(monkeypatch):
    desktop = (GpuProcess(411, "firefox", 2 * 2**30), GpuProcess(7, "Xorg", None))
    card = LiveGpu(0, "NVIDIA GeForce RTX 4070", 12282 * 2**20, int(8.3 * 2**30), "580.1", (8, 9), desktop)
    monkeypatch.setattr("vramplan.cli.options.live_gpu", lambda: card)
    text = run("plan", "--gpu", "auto", "--params", "125M", "--no-compile").stdout
    for words in ("8.30 GiB is free", "firefox (pid 411) holds 2.00 GiB", "Xorg (pid 7)", "12L/12H/768E"):
        assert words in text
    answer = run_json("plan", "--params", "125M", "--no-compile")
    assert answer["budget_bytes"] == int(8.3 * 2**30)
    assert answer["plans"][0]["needs_bytes"] <= answer["budget_bytes"]


def test_a_live_card_outside_the_catalogue_is_planned_for_memory(monkeypatch):
    card = LiveGpu(0, "NVIDIA TITAN V", 12 * 2**30, 11 * 2**30, "580.1", (7, 0), ())
    monkeypatch.setattr("vramplan.cli.options.live_gpu", lambda: card)
    answer = run_json("plan", "--params", "125M", "--no-compile")
    assert answer["plans"][0]["tokens_per_second"] is None
    assert answer["plans"][0]["needs_bytes"] <= 11 * 2**30
    assert "not in the catalogue" in run("plan", "--params", "125M", "--no-compile").stdout
