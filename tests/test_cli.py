"""The command as people use it: what it prints, what it leaves, and what it returns."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from metarec_fast.api import MetaRec
from metarec_fast.cli import main, show
from metarec_fast.cli import study as study_command
from metarec_fast.cli.run import COMMANDS, parse
from metarec_fast.config import Config
from metarec_fast.data import DataWarning, Vocabulary, load_domain, read
from tests.tiny import DOMAINS, config, shop

TINY = [
    "--model.dim=8",
    "--model.codebook-heads=2",
    "--model.codebook-size=8",
    "--model.layers=1",
    "--model.max-length=12",
    "--train.warmup-steps=4",
    "--train.meta-steps=4",
    "--train.batch-size=16",
    "--train.evaluate-every=50",
    "--train.patience=99",
    "--train.threads=1",
    "--cooccurrence.hidden=8",
    "--cooccurrence.warmup-steps=4",
    "--cooccurrence.meta-steps=2",
    "--cooccurrence.finetune-steps=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target with integer ids and a source with strings, as CSV files."""
    folder = tmp_path_factory.mktemp("domains")
    for domain, name, user, item in (
        (DOMAINS.sources[0], "books", "b-{}", "isbn-{}"),
        (DOMAINS.target, "shop", "{}", "{}"),
    ):
        s = domain.sequences
        with open(folder / f"{name}.csv", "w") as file:
            file.write("user_id,item_id,timestamp\n")
            for u in range(len(s)):
                for e in range(s.offsets[u], s.offsets[u + 1]):
                    file.write(f"{user.format(u + 500)},{item.format(s.items[e] + 9000)},{s.times[e]}\n")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A run of two methods that Ctrl-C stopped, up to where it stopped: its command, its folder and its log."""
    out = folder / "run"
    command = ["train", "--target=shop", "--source=books", f"--folder={folder}", f"--out={out}", *TINY]
    command += ["--train.finetune-steps=200", "--methods", "target_only", "metarec"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metarec_fast", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = out / "log.jsonl"
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        output = process.communicate(timeout=60)
    finally:
        process.kill()
    stopped = [json.loads(line) for line in log.read_text().splitlines()]
    checkpoint = json.loads((out / "target_only" / "checkpoint" / "checkpoint.json").read_text())
    finished = main([*command, "--resume"])
    return command, out, process.returncode, output, stopped, checkpoint, finished


def test_ctrl_c_saves_and_returns_130(run):
    _, _, status, (stdout, stderr), stopped, checkpoint, _ = run
    assert status == 130, stderr
    assert "Traceback" not in stderr
    assert "stopped in finetune at step" in stdout and "--resume" in stdout
    last = [entry for entry in stopped if "losses" in entry][-1]
    assert checkpoint["step"] == last["step"] < 208


def test_resume_goes_on_to_the_end(run):
    _, out, *_, finished = run
    assert finished == 0
    steps = [
        entry["step"]
        for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if entry["run"] == "target only" and entry["stage"] == "finetune" and "losses" in entry
    ]
    assert steps == list(range(1, 209))  # no step twice, none left out


def test_the_run_folder(run):
    out = run[1]
    assert {p.name for p in out.iterdir()} == {
        *("config.json", "log.jsonl", "metrics.json", "run.json", "table.md"),
        *("target_only", "metarec"),
    }
    config = Config.load(out / "config.json")
    assert (config.model.dim, config.train.finetune_steps) == (8, 200)
    record = json.loads((out / "metrics.json").read_text())
    assert [r["method"] for r in record["results"]][1:] == ["target only", "MetaRec"]
    assert record["seed"] == 0 and record["versions"]["metarec_fast"] and record["backends"]["cpu"]["isa"]
    assert set(record["history"]) == {"target_only", "metarec"}
    model = MetaRec.from_pretrained(out / "metarec" / "model")
    metrics = model.evaluate()
    assert record["results"][2]["NDCG@10"] == metrics.ndcg[10]
    assert record["protocol"] == metrics.protocol
    table = (out / "table.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| ")]) == 4
    assert f"{metrics.ndcg[10]:.4f}" in table[4] and table[-1] == metrics.protocol


def test_a_profiled_run_shows_where_its_time_goes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["train", "--target=shop", f"--folder={folder}", f"--out={tmp_path}", *TINY, "--profile"]
    command += ["--train.finetune-steps=10", "--train.method=target_only"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "target only finetune:" in shown and "Roofline:" in shown
    assert json.loads((tmp_path / "profile.json").read_text())[0]["parts"]["loss"]["ms"] > 0
    assert (tmp_path / "profile.svg").read_text().startswith("<svg")


def test_each_method_with_sources_gets_a_verdict(run, capsys):
    command, out, *_ = run
    assert main([*command, "--resume"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text())["history"]["metarec"]["transfer_report"]
    assert f"MetaRec: {report['verdict']}" in shown and "target only: " not in shown
    assert "overlap of codes with shop: books " in shown
    assert f"report: {out / 'metarec' / 'report.html'}" in shown
    assert report["verdict"].split(":")[0] in (out / "metarec" / "report.html").read_text()
    assert not (out / "target_only" / "report.html").exists()


def test_one_method_is_held_against_target_only(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["train", "--target=shop", "--source=books", f"--folder={folder}", f"--out={tmp_path}", *TINY]
    assert main([*command, "--train.finetune-steps=4", "--train.meta-steps=20"]) == 0
    shown = capsys.readouterr().out
    history = json.loads((tmp_path / "metrics.json").read_text())["history"]["metarec"]
    report = history["transfer_report"]
    assert f"MetaRec: {report['verdict']}" in shown and "books: weight 1.00, similarity " in shown
    assert ("(target only returned)" in shown) == (report["returned"] == "target_only")
    assert (tmp_path / "metarec" / "target_only" / "checkpoint").is_dir()
    assert (
        main([*command, "--train.finetune-steps=4", "--train.no-compare-target-only", f"--out={tmp_path / 'b'}"]) == 0
    )
    assert "transfer" not in capsys.readouterr().out.lower()


def test_adapt_makes_a_model_of_another_domain(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["adapt", model, "--target=books", f"--folder={folder}", f"--out={tmp_path}", "--steps=6", "--lr=0.01"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    adapted = MetaRec.from_pretrained(tmp_path / "model")
    assert adapted.domain.name == "books" and adapted.history.adapted_from == "shop"
    assert (adapted.config.train.finetune_steps, adapted.config.train.finetune_lr) == (6, 0.01)
    assert "MetaRec, adapted from shop" in shown and f"{adapted.evaluate().ndcg[10]:.4f}" in shown
    assert f"model: {tmp_path / 'model'}" in shown and "Transfer" not in shown
    assert main(["recommend", str(tmp_path / "model"), "--users", "b-500", "--k", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["b-500"]) == 2
    assert main([*command, "--compare-target-only", "--resume"]) == 0
    shown = capsys.readouterr().out
    report = MetaRec.from_pretrained(tmp_path / "model").history.transfer_report
    assert report["verdict"] in shown and (tmp_path / "report.html").exists()


@pytest.fixture
def model(run):
    return str(run[1] / "metarec" / "model")


@pytest.mark.parametrize("width", ["80", "160"])
def test_figures_are_whole_on_any_terminal(model, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["evaluate", model]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert len(re.findall(r"\b[01]\.[0-9]{4}\b", shown)) == 2 * 4  # NDCG@10 among all items beside


@pytest.mark.parametrize(("split", "rows"), [("test", 2), ("valid", 1)])
def test_evaluate(model, capsys, monkeypatch, split, rows):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["evaluate", model, f"--split={split}"]) == 0
    shown = capsys.readouterr().out
    assert f"{MetaRec.from_pretrained(model).evaluate(split).ndcg[10]:.4f}" in shown
    assert shown.count("(untrained)") == rows - 1 and "MetaRec" in shown


def test_recommend_as_json(model, capsys):
    assert main(["recommend", model, "--users", "500", "503", "--k", "3", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    want = MetaRec.from_pretrained(model).recommend([500, 503], k=3)
    assert results == {"500": [list(p) for p in want[0]], "503": [list(p) for p in want[1]]}


def test_items_that_nobody_trained_on_are_ranked_and_recommended_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    model = MetaRec.fit([], shop(), config=config(train={"method": "target_only"}))
    model.save_pretrained(tmp_path / "model")
    for option, count in (([], 20), (["--catalogue=all"], 60)):
        queries = ["recommend", str(tmp_path / "model"), "--users=u3", "--k=60", "--include-seen", "--json"]
        assert main([*queries, *option]) == 0
        assert len(json.loads(capsys.readouterr().out)["u3"]) == count
    found, everywhere = model.evaluate(), model.evaluate(catalogue="all")
    assert main(["evaluate", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert "NDCG@10, all items" in shown and f"{found.ndcg[10]:.4f}" in shown and f"{everywhere.ndcg[10]:.4f}" in shown
    assert f"{found.outside} targets outside the catalogue count as misses" in " ".join(shown.split())
    assert main(["evaluate", str(tmp_path / "model"), "--catalogue=all"]) == 0
    shown = capsys.readouterr().out
    assert "all 60 items ranked" in shown and "NDCG@10, all items" not in shown


def test_recommend_for_a_history_as_a_table(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recommend", model, "--history", "9000", "9001", "--k", "2"]) == 0
    shown = capsys.readouterr().out
    for item, score in MetaRec.from_pretrained(model).recommend(histories=[[9000, 9001]], k=2)[0]:
        assert str(item) in shown and f"{score:.3f}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "alice"], "ids here are integers, got 'alice'"),
        (["--users", "1"], "unknown id 1"),
        ([], "either --users or --history"),
        (["--users", "500", "--history", "9000"], "either --users or --history"),
        (["--users", "500", "--k", "0"], "--k must be at least 1, got 0"),
    ],
    ids=str,
)
def test_recommend_says_what_is_wrong(model, capsys, options, message):
    assert main(["recommend", model, *options]) == 2
    assert_one_line(capsys, message)


def assert_one_line(capsys, message):
    error = capsys.readouterr().err
    assert error.startswith("metarec-fast: ") and message in error and error.count("\n") == 1, error


def test_a_file_that_cannot_be_read_is_named_with_its_line(folder, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("user_id,item_id,timestamp\nu,i,1\nu,j,yesterday\n")
    assert main(["train", f"--target={tmp_path / 'bad.csv'}", f"--source={folder / 'books.csv'}"]) == 2
    error = capsys.readouterr().err
    assert "bad.csv:3" in error and "Traceback" not in error


def test_import_writes_a_domain_that_train_takes(folder, tmp_path, capsys):
    for name in ("shop", "books"):
        assert main(["import", str(folder / f"{name}.csv"), str(tmp_path / name), "--memory=8MB"]) == 0
        shown = capsys.readouterr().out
        domain, whole = load_domain(tmp_path / name), read(folder / f"{name}.csv")
        assert domain.users == whole.users and domain.items == whole.items
        assert f"{domain.report.rows:,} rows, 0 rejected" in shown and "rows a second" in shown
    out = tmp_path / "run"
    by_name, by_path = "--source=books", f"--target={tmp_path / 'shop'}"
    options = [f"--folder={tmp_path}", f"--out={out}", *TINY, "--train.finetune-steps=4", "--methods", "target_only"]
    assert main(["train", by_path, by_name, *options]) == 0
    assert json.loads((out / "metrics.json").read_text())["results"]
    assert "shop: 40 users" in capsys.readouterr().out


def test_import_tells_what_it_left_out(tmp_path, capsys):
    (tmp_path / "d.csv").write_text("u,i,at\na,x,1\na,,2\nb,x,soon\n")
    command = ["import", str(tmp_path / "d.csv"), str(tmp_path / "d"), "--user=u", "--item=i", "--time=at"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "d.csv:3: missing item" in error and not (tmp_path / "d").exists()
    assert main([*command, "--on-error=skip", "--name=shop"]) == 0
    shown = capsys.readouterr().out
    assert "shop: 1 users" in shown and "3 rows, 2 rejected" in shown and "d.csv:4: time 'soon'" in shown
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


def mangled(folder, to):
    """The two domains of a folder with a bad row and a repeated one in the target, and times of an unusual name."""
    lines = (folder / "shop.csv").read_text().splitlines()
    (to / "shop.csv").write_text("\n".join([*lines, "777,,5", lines[1], "778,9001,soon"]))
    (to / "books.csv").write_text((folder / "books.csv").read_text().replace("timestamp", "my_clock_time"))
    return len(lines) + 1


@pytest.mark.parametrize("command", ["train", "adapt", "audit-transfer", "study"])
def test_what_is_skipped_and_ignored_is_reported(folder, study_file, tmp_path, capsys, monkeypatch, recwarn, command):
    bad = mangled(folder, tmp_path)
    options = [f"--folder={tmp_path}", "--on-error=skip", f"--out={tmp_path / 'out'}"]
    if command in ("train", "adapt"):
        start = ["adapt", "model"] if command == "adapt" else ["train"]
        parsed = parse([*start, "--target=shop", *options])
        show.load_named(["shop", "books"], parsed)
    elif command == "audit-transfer":
        nothing = SimpleNamespace(complete=False)
        monkeypatch.setattr(study_command, "run_study", lambda *given, **options: (0, nothing))
        assert main(["audit-transfer", "--target=shop", "--source=books", *options]) == 0
    else:
        assert main(["study", str(study_file), "--fractions", "0.5", "--arms", "popularity", *options]) == 0
    shown = capsys.readouterr().out
    target, source = tmp_path / "shop.csv", tmp_path / "books.csv"
    assert (
        f"2 of {bad + 1:,} rows skipped" in shown and f"{target}: {bad + 1:,} rows, 2 rejected, 1 duplicates" in shown
    )
    assert f"{target}:{bad}: missing item" in shown and f"{target}:{bad + 2}: time 'soon' is neither" in shown
    assert "ordered by column 'timestamp'" in shown and "in the order of rows: no time column" in shown
    assert f"{source}: events stay in the order of rows" in shown and "'my_clock_time' looks like times" in shown
    assert not [w for w in recwarn if issubclass(w.category, DataWarning)]  # said once


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--target=nowhere", "--source=else"], "domain 'nowhere' is neither a file nor in"),
        (["train", "--target=shop", "--folder={folder}"], "at least one source"),
        (["train", "--target=shop", "--source=shop", "--folder={folder}"], "different names"),
        (["evaluate", "{folder}"], "holds no saved model"),
        (["adapt", "{folder}", "--target=shop"], "holds no saved model"),
        (["audit-transfer", "--target=shop", "--source=books", "--leave-out", "--folder={folder}"], "two sources"),
        (["study", "nothing"], "STUDY must be smoke, short, published or a JSON file, got 'nothing'"),
        (["study", "smoke", "--arms", "wings"], "study 'smoke' has no arm 'wings'"),
        (["study", "published", "--folder={folder}"], "domain 'amazon14_office' is neither a file nor in"),
        (["audit-transfer", "--target=shop", "--folder={folder}"], "an audit needs sources"),
        (
            ["demo", "--preset", "nonsense"],
            "--preset must be 'default', 'abstract', 'metaadapt_literal' or 'demo', got 'nonsense'",
        ),
        (["demo", "--config", "{folder}/none.json"], "none.json"),
        (["demo", "--config", "{folder}/shop.csv"], "configuration"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert main([part.format(folder=folder) for part in command]) == 2
    assert_one_line(capsys, message)


def test_another_configuration_cannot_resume(run, capsys):
    assert main([*run[0], "--resume", "--train.seed=1"]) == 2
    assert_one_line(capsys, "another configuration")
    assert Config.load(run[1] / "config.json").train.seed == 0


def test_a_configuration_file_starts_and_options_change_it(run):
    from metarec_fast.cli.options import config_of

    path = str(run[1] / "config.json")
    saved = Config.load(path)
    for given in (["--config", path], [f"--config={path}"]):
        command = parse(["train", "--target=shop", *given, "--train.lr=0.5"])
        assert config_of(command) == saved.replace(train={"lr": 0.5})
    assert config_of(parse(["demo", "--preset=abstract"])).model.vq == "quantized"


# studies


@pytest.fixture(scope="module")
def study_file(folder):
    """A study of the files in the folder, as JSON."""
    from metarec_fast.study import Arm, Comparison, Study
    from tests.study.problems import TRAIN

    options = {"model": {"dim": 8, "codebook_heads": 2, "codebook_size": 8, "layers": 1}, "train": TRAIN}
    options["cooccurrence"] = dataclasses.asdict(config().cooccurrence)
    plan = Study(
        name="files",
        targets=("shop",),
        sources=("books",),
        arms=(Arm(name="popularity", group="baseline", baseline="popularity"), Arm(name="ours", group="ours")),
        fractions=(0.5, 1.0),
        comparisons=(Comparison(arm="ours", against=("popularity",)),),
        options=options,
    )
    path = folder / "study.json"
    path.write_text(plan.to_json())
    return path


def test_a_study_prints_costs_and_verdicts_and_goes_on(study_file, folder, tmp_path, capsys):
    command = ["study", str(study_file), f"--folder={folder}", f"--out={tmp_path}"]
    assert main([*command, "--fractions", "0.5", "--arms", "popularity"]) == 0
    shown = capsys.readouterr().out
    assert "1/1  shop 0.5 popularity seed 0: NDCG@10 " in shown and "1 of 4 cells" in shown
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "popularity seed 0" not in shown.split("ours against")[0].split("2/4")[0]  # there already
    assert re.search(r"4/4  shop 1 ours seed 0: NDCG@10 0\.\d{4} \(validation .*\)  \d+ s, 29 steps", shown)
    assert "ours against popularity" in shown and "| shop, 50% | popularity | " in shown and "mean gain" in shown
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(files) == {"study.json", "results.csv", "comparisons.csv", "tables.md", "gains.svg", "shop.svg"}
    (tmp_path / "tables.md").unlink()
    assert main([*command, "--report-only"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files
    assert main([*command, "--report-only", "--archive"]) == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {*files, "cells.tar.xz"}
    assert main(["study", str(tmp_path / "study.json"), f"--folder={folder}", f"--out={tmp_path}"]) == 0
    assert "4 of 4 cells" in capsys.readouterr().out  # what was written down describes the study


def test_a_study_describes_itself(capsys):
    from metarec_fast.study import Study, preset

    assert main(["study", "smoke", "--describe"]) == 0
    smoke = preset("smoke")
    assert Study.from_json(capsys.readouterr().out).configs(next(smoke.cells())) == smoke.configs(next(smoke.cells()))


def test_a_cell_that_fails_is_named_and_the_status_is_1(study_file, folder, tmp_path, capsys):
    record = json.loads(study_file.read_text())
    record["options"]["train"]["device"] = "cuda:99"
    (tmp_path / "bad.json").write_text(json.dumps(record))
    command = ["study", str(tmp_path / "bad.json"), f"--folder={folder}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.err.count("failed: ValueError: train.device is 'cuda:99'") == 2
    assert "2 of 4 cells" in captured.out


def test_audit_transfer_gives_a_verdict(folder, tmp_path, capsys):
    command = ["audit-transfer", "--target=shop", "--source=books", f"--folder={folder}", f"--out={tmp_path}"]
    assert main([*command, *TINY, "--train.finetune-steps=4", "--seeds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "shop: 40 users" in shown and "6/6  shop 1 all-kinds seed 0" in shown
    assert re.search(r"^The sources (help|harm|make no difference)", shown, re.MULTILINE)
    assert (tmp_path / "tables.md").exists()


def test_adapting_to_a_domain_without_two_events_of_a_user_says_so(model, tmp_path, capsys):
    (tmp_path / "few.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u{i},x,{i}\n" for i in range(5)))
    assert main(["adapt", model, f"--target={tmp_path / 'few.csv'}", f"--out={tmp_path}"]) == 2
    assert_one_line(capsys, "domain 'few' has no user with two training events")


def test_an_audit_leaves_each_source_out(folder, tmp_path, capsys):
    shutil.copy(folder / "books.csv", folder / "toys.csv")
    command = ["audit-transfer", "--target=shop", "--source=books", "--source=toys", f"--folder={folder}"]
    options = [f"--out={tmp_path}", "--seeds", "0", "--no-weights", "--leave-out", "--train.finetune-steps=4"]
    assert main([*command, *options, *TINY]) == 0
    shown = capsys.readouterr().out
    assert "7/7  shop 1 without-toys seed 0" in shown and "6/7  shop 1 without-books seed 0" in shown
    reported = re.findall(r"^(?:No verdict on|It cannot be shown that)? ?(\w+)(?: \w+)? beside the other", shown, re.M)
    assert reported == ["books", "toys"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"metarec-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_usage_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_an_unknown_command(capsys):
    assert main(["fly"]) == 2
    captured = capsys.readouterr()
    assert "unknown command 'fly'" in captured.err and not captured.out


def test_an_unknown_option():
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--wings"])
    assert end.value.code == 2


def test_doctor(capsys):
    from metarec_fast import _C

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert _C.active_isa() in shown and "GPU" in shown and "Triton" in shown


@pytest.mark.parametrize(
    ("environment", "first", "expected"),
    [
        ({"METAREC_FAST_ISA": "sse9"}, "", "METAREC_FAST_ISA must be one of {"),
        ({}, "sys.modules['metarec_fast._C'] = None", "C++ extension of metarec_fast cannot be loaded: expected"),
    ],
)
def test_doctor_says_what_is_wrong(environment, first, expected):
    code = f"import sys; {first}\nfrom metarec_fast.cli import main; sys.exit(main(['doctor']))"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 1 and expected in run.stderr and "Traceback" not in run.stderr
    assert "not usable" in run.stdout and "torch" in run.stdout


def test_version(capsys):
    from metarec_fast import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"metarec-fast {__version__}\n"


def test_ids_from_the_command_line():
    assert Vocabulary(["7", "a"]).parse(["7", "zz"]) == ["7", "zz"]
    assert Vocabulary([7, -2]).parse(["7", "-2", "99"]) == [7, -2, 99]
    for text in ("1.0", "1_0", "", " 7", "٧"):
        with pytest.raises(ValueError, match="ids here are integers"):
            Vocabulary([7]).parse([text])


def test_a_run_is_not_overwritten_unless_requested(folder, tmp_path, capsys):
    out = tmp_path / "run"
    quick = [f"--folder={folder}", f"--out={out}", *TINY, "--train.finetune-steps=4", "--methods", "target_only"]
    assert main(["train", "--target=shop", *quick]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    for target in ("shop", "books"):
        assert main(["train", f"--target={target}", *quick]) == 2
        reported = capsys.readouterr().err
        assert f"{out} holds a run already: target 'shop', method target_only" in reported and "--overwrite" in reported
    assert main(["train", "--target=books", "--resume", *quick]) == 2
    assert "target: 'books', was 'shop'" in capsys.readouterr().err.replace("targets", "target")
    assert main(["train", "--target=books", "--resume", "--overwrite", *quick]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(["train", "--target=books", "--overwrite", *quick]) == 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in entries if "losses" in e and e["stage"] == "finetune"]
    assert steps == sorted(set(steps))  # of the new run alone
    assert MetaRec.from_pretrained(out / "target_only" / "model").domain.name == "books"


def test_the_demo_replaces_a_demo_where_nobody_chose_the_folder_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--train.finetune-steps=2", "--model.cooccurrence=none", "--methods", "target_only"]
    assert main(["demo", *tiny]) == 0
    assert main(["demo", *tiny]) == 0
    assert "replacing the demo in runs/demo" in capsys.readouterr().out
    assert main(["demo", "--out=runs/demo", *tiny]) == 2
    assert "runs/demo holds a run already" in capsys.readouterr().err
    (tmp_path / "runs" / "demo" / "run.json").unlink()  # a run of which nobody knows what it is
    assert main(["demo", *tiny]) == 2
    assert "runs/demo holds a run already: files checkpoint" not in (reported := capsys.readouterr().err)
    assert "runs/demo holds a run already: files" in reported


# messages in the command's words


@pytest.mark.parametrize(
    ("command", "message", "want"),
    [
        ("train", "train.batch_size must be at least 1, got 0", "--train.batch-size must be at least 1, got 0"),
        ("train", "model.cooccurrence='learned' needs two users", "--model.cooccurrence learned needs two users"),
        ("train", "pass overwrite=True", "pass --overwrite"),
        ("train", "--overwrite (overwrite=True) replaces it", "--overwrite replaces it"),
        ("train", "on_error='skip' counts them", "--on-error skip counts them"),
        ("adapt", "train.finetune_lr must be finite", "--lr must be finite"),
        ("recommend", "k must be at least 1, got 0", "--k must be at least 1, got 0"),
        ("recommend", "unknown id 'k' at users[1]", "unknown id 'k' at users[1]"),
        ("study", "processes must be at least 1, got 0", "--processes must be at least 1, got 0"),
        ("audit-transfer", "leave_out needs at least two sources", "--leave-out needs at least two sources"),
        ("evaluate", "the model must have data.split", "the model must have data.split"),
        ("import", "file.csv:3: time 'x' is no date", "file.csv:3: time 'x' is no date"),
    ],
)
def test_an_error_names_the_flag(command, message, want):
    from metarec_fast.cli.options import in_flags

    assert in_flags(message, COMMANDS[command][0]) == want


def test_invalid_options_are_said_before_data_is_read(folder, tmp_path, capsys):
    command = ["train", "--target=nowhere", "--source=nowhere"]
    for option, message in (
        ("--train.batch-size=0", "--train.batch-size must be at least 1, got 0"),
        ("--train.seed=-1", "--train.seed must be in [0, 2**63), got -1"),
        ("--model.dim=12", "--model.dim must be a multiple of --model.codebook-heads"),
        ("--train.device=cuda:99", "--train.device is 'cuda:99'"),
    ):
        assert main([*command, option]) == 2
        assert_one_line(capsys, message)


def test_ctrl_c_before_training_is_reported_in_a_line(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("metarec_fast.data.read", interrupted)
    assert main(["train", "--target=books", f"--folder={folder}", "--train.method=target_only"]) == 130
    assert_one_line(capsys, "interrupted")


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_recommend_goes_on_without_ids_it_does_not_know(model, capsys):
    assert main(["recommend", model, "--users", "500", "1", "alice", "--k", "2", "--json"]) == 1
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)) == ["500"]
    assert "unknown id 1; left out" in captured.err and "got 'alice'; left out" in captured.err
