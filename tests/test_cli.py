"""The commands as a user types them: output, exit codes, and errors that name field, value, rule and remedy."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from vramplan.cli import COMMANDS, main
from vramplan.device import GpuProcess, LiveGpu
from vramplan.planner.candidates import candidates_near, conventional
from vramplan.planner.shape import Shape
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
        "12L/12H/768E", "= 524,288 tokens per step", "0.75 GiB assumed for the desktop", "optimizer state",
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


def test_a_plan_without_its_optional_entries_can_be_applied(tmp_path):
    run(
        "plan", "--gpu", "4070", "--n-layer", 12, "--n-head", 12, "--n-embd", 768, "--top", 1, "-o", tmp_path / "p.json"
    )
    content = json.loads((tmp_path / "p.json").read_text())
    for name in ("gpu", "target_parameters"):
        del content[name]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert RunConfig.from_toml(run("apply", tmp_path / "p.json").stdout).plan.gpu is None
    assert "n_layer = 12" in run("apply", tmp_path / "p.json", "--format", "nanogpt").stdout


def test_allocator_settings_change_what_is_reserved():
    shape = ("--n-layer", 12, "--n-head", 12, "--n-embd", 768)
    words = ("estimate", *shape, "--batch-size", 8, "--checkpointing", "block")
    plain, expandable = run_json(*words), run_json(*words, "--alloc-conf", "expandable_segments:True")
    assert plain["peak_reserved_bytes"] > 1.05 * expandable["peak_reserved_bytes"]
    assert expandable["peak_reserved_bytes"] >= expandable["peak_allocated_bytes"]
    assert "did you mean expandable_segments" in run(*words, "--alloc-conf", "expandable:True", code=2).stderr


def test_what_does_not_fit_comes_with_the_smallest_change_that_does():
    words = ("estimate", "--n-layer", 12, "--n-head", 12, "--n-embd", 576, "--batch-size", 16, "--grad-accum", 32,
             "--workload", "nanogpt", "--compile", "--gpu", "4070", "--vram", "8.3GiB", "--headless")  # fmt: skip
    assert "repair     batch 8 x 64 instead of 16 x 32" in run(*words).stdout
    answer = run_json(*words)
    assert (answer["fits"], answer["repair"]["config"]["batch_size"]) == (False, 8)
    assert run_json(*words[:-3], "--headless")["repair"] is None


def test_values_that_no_option_takes_are_reported_with_everything_else(tmp_path):
    text = run("plan", "--gpu", "4071", "--params", "12X", "--tokens-per-step", "500000", "--block-size", "0",
               "--vocab-size", "-1", "--max-risk", "7", "--vram", "8", "-o", "", code=2).stderr  # fmt: skip
    for words in ('gpu="4071"', '--params="12X"', "block_size=0", "vocab_size=-1", '--max-risk="7"', '--vram="8"',
                  '--output="" is empty'):  # fmt: skip
        assert words in text, words
    (tmp_path / "bad.toml").write_text("[model]\nn_layer = 0\n")
    text = run("estimate", tmp_path / "bad.toml", "--gpu", "4071", "--vram", "8", code=2).stderr
    for words in ('gpu="4071"', '--vram="8"', "model.n_head is required"):
        assert words in text, words
    text = run("train", tmp_path / "bad.toml", "--data", "nope", "--out", "", code=2).stderr
    for words in ('--out="" is empty', 'data="nope" does not exist', "model.n_head is required"):
        assert words in text, words


@pytest.mark.parametrize(
    ("words", "only"),
    [
        (["estimate", "--n-layer", 2, "--n-head", 2, "--n-embd", 64, "--batch-size", 2, "--vram", "abc",
          "--reserve", "1GiB"], "--vram"),
        (["plan", "--vram", "abc", "--params", "10M"], "--vram"),
        (["plan", "--vram", "8GiB", "--params", "10M", "--tokens-per-step", "abc", "--block-size", 1000],
         "--tokens-per-step"),
        (["train", "--resume", "--out", ""], "--out"),
        (["estimate", "--n-layer", 2, "--n-head", 2, "--n-embd", 64, "--batch-size", 2, "--gpu", "cpu",
          "--alloc-conf", "expandable_segments:True"], "--alloc-conf"),
    ],
)  # fmt: skip
def test_one_bad_value_is_one_problem(words, only):
    text = run(*words, code=2).stderr
    assert text.startswith(f"Error: {only}="), text
    assert "problems" not in text


def test_output_follows_links_and_leaves_devices_alone(tmp_path):
    tiny = ("--gpu", "4070", "--n-layer", 12, "--n-head", 12, "--n-embd", 768, "--top", 1)
    (tmp_path / "plan.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "plan.json")
    run("plan", *tiny, "-o", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "plan.json").read_text())["plans"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        run("plan", *tiny, "-o", tmp_path / "pipe")
        assert json.loads(reader.stdout.read())["plans"]
    assert (tmp_path / "pipe").is_fifo()


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
        (["--gpu", "4070", "--params", "125M", "--max-risk", "2"], 2, ["--max-risk", "at most 50%"]),
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


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (["--n-layer", "0", "--n-head", "-1", "--n-embd", "0", "--vocab-size", "-5", "--block-size", "0",
          "--batch-size", "0"],
         ["n_layer=0", "n_head=-1", "n_embd=0", "vocab_size=-5", "block_size=0", "--batch-size=0"]),
        (["--gpu", "xyz", "--tokens-per-step", "1000", "--vocab-size", "0", "--params", "125M"],
         ['gpu="xyz"', "tokens_per_step=1000", "vocab_size=0"]),
        (["--batch-size", "3", "--n-embd", "512", "--n-head", "12", "--params", "125M", "--tokens-per-step", "2049"],
         ["tokens_per_step=2049", "n_embd=512"]),
        (["--compile", "on", "--no-compile", "--headless", "--reserve", "1GiB", "--params", "125M"],
         ["--no-compile", "--reserve"]),
    ],
)  # fmt: skip
def test_all_problems_of_a_request_come_at_once(args, fields):
    text = run("plan", *(() if "--gpu" in args else ("--gpu", "4070")), *args, code=2).stderr
    for field in fields:
        assert text.count(f"* {field}") == 1, text


def test_what_was_not_stated_is_said():
    assert "Not given, so assumed: n_head 12, n_embd 768." in run("plan", "--gpu", "4070", "--n-layer", "24").stdout
    text = run("plan", "--gpu", "4070", "--n-embd", "500").stdout
    assert "assumed: n_layer 12, n_head 10." in text
    assert "unlike published GPTs" in text


def test_a_minimum_that_is_printed_is_enough():
    text = run("plan", "--gpu", "4070", "--params", "125M", "--vram", "1.90GiB", code=3).stderr
    least = re.search(r"needs at least (\S+) GiB free", text).group(1)
    assert run_json("plan", "--gpu", "4070", "--params", "125M", "--vram", f"{least}GiB")["plans"]
    needs = re.search(r"needs at least (\S+) GiB free", run("plan", "--gpu", "4070", "--params", "125M").stdout).group(
        1
    )
    best = ("--gpu", "4070", "--params", "125M", "--batch-size", "16", "--loss", "full")
    assert run_json("plan", *best, "--vram", f"{needs}GiB")["plans"][0]["config"]["compile"]


def test_nothing_fits_names_a_shape_near_the_target_that_does():
    text = run("plan", "--gpu", "4070", "--params", "125M", "--vram", "1.80GiB", "--tolerance", "10%", code=3).stderr
    label, size = re.search(r"Also near the target, (\S+) \((\S+)M\) fits", text).groups()
    assert 112.5 <= float(size) <= 137.5
    dims = [w for name, n in zip(("layer", "head", "embd"), re.findall(r"\d+", label), strict=True)
            for w in (f"--n-{name}", n)]  # fmt: skip
    assert run_json("plan", "--gpu", "4070", *dims, "--vram", "1.80GiB")["plans"]


def test_the_fastest_shape_is_the_fastest_of_all_conventional_ones():
    answer = run_json("plan", "--gpu", "4070", "--params", "125M", "--tolerance", "20%", "--shape", "fastest")
    like = Shape(n_layer=1, n_head=1, n_embd=64)
    shapes = [s for s in candidates_near(125_000_000, 0.2, like) if conventional(s)]
    assert answer["considered"] == len(shapes) * 1800
    best = answer["plans"][0]
    for shape in shapes:
        dims = ("--n-layer", shape.n_layer, "--n-head", shape.n_head, "--n-embd", shape.n_embd)
        alone = run_json("plan", "--gpu", "4070", *dims, "--top", "1")["plans"][0]
        assert alone["tokens_per_second"] <= best["tokens_per_second"] * (1 + 1e-9)


def test_on_a_cpu_the_largest_batch_does_not_win():
    answer = run_json("plan", "--gpu", "cpu", "--vram", "20GiB", "--params", "30M")["plans"]
    assert answer[0]["config"]["batch_size"] * 1024 == 8192
    assert "the same FLOPs" in answer[1]["reason"]


def test_a_size_alone_is_a_gpu_that_is_not_named():
    text = run("plan", "--vram", "8.3GiB", "--params", "125M").stdout
    assert "Plan for a GPU of this size: 8.30 GiB" in text
    assert "unknown without a card's name" in text
    configs = [p["config"] for p in run_json("plan", "--vram", "8.3GiB", "--params", "125M", "--top", "5")["plans"]]
    assert {c["dtype"] for c in configs} == {"bfloat16"}
    assert configs[0]["compile"]


def test_more_memory_than_the_card_has_is_said():
    text = run("plan", "--gpu", "4070", "--vram", "40GiB", "--params", "125M").stdout
    assert "40.00 GiB is more than the RTX 4070 has: 11.71 GiB can be used of it." in text


@pytest.mark.parametrize(
    ("made", "asked", "budget"),
    [
        (["--gpu", "4070", "--vram", "8.3GiB"], ["--reserve", "0.5GiB"], 7.8),
        (["--vram", "8.3GiB"], ["--reserve", "0.5GiB"], 7.8),
        (["--gpu", "4070"], ["--reserve", "0GiB"], 11.713),
        (["--gpu", "4070"], ["--headless"], 11.713),
        (["--gpu", "4070"], ["--vram", "9GiB"], 9.0),
    ],
)
def test_a_report_can_keep_back_more_or_less_than_the_plan(made, asked, budget, tmp_path):
    path, config = tmp_path / "plan.json", tmp_path / "run.toml"
    run("plan", *made, "--params", "125M", "-o", path)
    run("apply", path, "-o", config)
    for subject in (path, config):
        assert run_json("report", subject, *asked)["budget_bytes"] / 2**30 == pytest.approx(budget, abs=2e-3)


def test_another_scripts_plan_does_not_lead_to_our_trainer(tmp_path):
    path, config = tmp_path / "plan.json", tmp_path / "run.toml"
    text = run("plan", "--gpu", "4070", "--params", "125M", "--workload", "nanogpt", "-o", path).stdout
    assert "memory of the nanogpt workload" in text
    assert "--format nanogpt" in text
    assert "vramplan train" not in text
    assert "vramplan train" not in run("apply", path, "-o", config).stdout
    start = ("plan", "--params", "125M", "--workload", "nanogpt", "--train", "--data", "x", "--out", tmp_path / "r")
    assert "--train starts this trainer" in run(*start, code=2).stderr


def test_apply_takes_max_steps_for_nanogpt_and_never_overwrites_its_plan(plan_file, tmp_path):
    text = run("apply", plan_file, "--format", "nanogpt", "--max-steps", "7").stdout
    assert "max_iters = 7\n" in text
    assert "lr_decay_iters = 7\n" in text
    before = plan_file.read_bytes()
    assert "is the plan file itself" in run("apply", plan_file, "-o", plan_file, code=2).stderr
    assert plan_file.read_bytes() == before


def test_a_head_too_wide_for_fused_attention_is_outside_the_model():
    shape = ("--n-layer", "12", "--n-head", "1", "--n-embd", "768")
    assert "Outside the model: head_dim 768" in run("estimate", *shape, "--batch-size", "1").stdout
    assert run_json("estimate", *shape, "--batch-size", "1")["caveats"]
    assert any("head_dim 768" in note for note in run_json("plan", "--gpu", "4070", *shape)["notes"])


def test_cpu_in_capitals_is_the_cpu():
    args = ("estimate", "--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--batch-size", "1", "--gpu")
    one, other = (run_json(*args, name) for name in ("cpu", "CPU"))
    assert one["process_bytes"] == other["process_bytes"]


def test_eight_bit_states_come_with_their_price():
    text = run("plan", "--gpu", "4070", "--params", "350M", "--vram", "4.6GiB").stdout
    assert "none does without this cost in numerics" in text
    assert "vramplan[8bit]" in text


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
    for words in (
        "OOM-risk report",
        "headroom",
        "Levers",
        "largest batch",
        "activation checkpointing",
        "phase by phase",
    ):
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


# ------------------------------------------------------------------- layouts, optimizers, releases of torch

MODERN = ("--norm", "rmsnorm", "--positions", "rotary", "--mlp", "swiglu", "--n-kv-head", "4", "--qk-norm",
          "--logit-softcap", "30")  # fmt: skip


def test_a_modern_layout_is_planned_applied_and_estimated(tmp_path):
    plans, config = tmp_path / "plan.json", tmp_path / "run.toml"
    text = run("plan", "--gpu", "4070", "--params", "125M", *MODERN, "-o", plans).stdout
    for words in ("RMSNorm, rotary positions, SwiGLU, 4 key heads, QK-norm, logits capped at 30", "GiB"):
        assert words in " ".join(text.split())
    run("apply", plans, "-o", config)
    shape = RunConfig.load(config).shape
    assert (shape.norm, shape.positions, shape.mlp, shape.n_kv_head) == ("rmsnorm", "rotary", "swiglu", 4)
    assert (shape.qk_norm, shape.logit_softcap) == (True, 30.0)
    assert shape.n_head % 4 == 0
    best = json.loads(plans.read_text())["plans"][0]["estimate"]["process_bytes"]
    assert run_json("estimate", config)["process_bytes"] == best
    assert "has no RMSNorm" in run("apply", plans, "--format", "nanogpt", code=2).stderr


def test_the_options_of_a_file_are_overridden_by_flags(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('[model]\nn_layer = 4\nn_head = 4\nn_embd = 256\nmlp = "relu2"\n[step]\nbatch_size = 8\n')
    relu = run_json("estimate", config)["parameters"]
    assert run_json("estimate", config, "--mlp", "gelu")["parameters"] == relu
    assert run_json("estimate", config, "--positions", "rotary")["parameters"] == relu - 1024 * 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n-kv-head", "5", "--n-layer", "12", "--n-head", "12", "--n-embd", "768"), "use one of 1, 2, 3, 4, 6, 12"),
        (("--workload", "nanogpt", "--norm", "rmsnorm"), "RMSNorm"),
        (("--logit-softcap", "-1"), "logit_softcap=-1.0 must be at least 0"),
        (
            ("--n-layer", "2", "--n-head", "5", "--n-embd", "255", "--positions", "rotary"),
            "rotary positions turn pairs",
        ),
        (("--optimizer", "adamw-stochastic"), "use dtype=pure-bfloat16"),
        (("--optimizer", "adamw-in-backward", "--compile", "on"), "returns all gradients at once"),
        (("--torch", "nightly"), "is not a version"),
    ],
)
def test_options_that_cannot_be_met_are_one_clear_error(words, message):
    target = () if "--n-embd" in words else ("--params", "125M")
    assert message in " ".join(run("plan", "--gpu", "4070", *target, *words, code=2).stderr.split())


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        (("--dtype", "pure-bfloat16"), "adamw-stochastic"),
        (("--optimizer", "muon"), "muon"),
        (("--dtype", "tf32"), "adamw-fused"),
        (("--optimizer", "adamw-in-backward", "--tokens-per-step", "8192"), "adamw-in-backward"),
    ],
)
def test_other_optimizers_and_dtypes_are_planned_when_asked_for(words, optimizer, tmp_path):
    plans, config = tmp_path / "plan.json", tmp_path / "run.toml"
    best = run_json("plan", "--gpu", "4070", "--params", "125M", *words, "-o", plans)["plans"][0]
    assert best["config"]["optimizer"] == optimizer
    run("apply", plans, "-o", config)
    assert (RunConfig.load(config).train.grad_clip == 0) == (optimizer == "adamw-in-backward")


def test_a_plan_names_the_torch_it_is_for_and_one_that_was_not_traced_costs_certainty():
    shape = ("--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--batch-size", "16", "--compile")
    known, unknown = (run_json("estimate", "--gpu", "4070", *shape, "--torch", v) for v in ("2.13", "2.40"))
    assert not known["caveats"]
    assert "torch 2.40" in unknown["caveats"][0]
    assert unknown["needs_bytes"] > 1.1 * known["needs_bytes"]
    plan = run_json("plan", "--gpu", "4070", "--params", "125M", "--torch", "2.11")["plans"][0]
    assert plan["config"]["torch"] == "2.11"
